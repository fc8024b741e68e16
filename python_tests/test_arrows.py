"""The arrows of docs/how-it-works.md are those of the code: which module may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "msn_ext"

# From the top down. A module imports from lower layers and from its own package, so those of one
# layer never import each other: training knows nothing of decoding, nor decoding of training.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"custom_generate", "explain", "recipe", "spec_bench", "tuning"},
    {"generation"},
    {"profile"},
    {"decoding", "training", "demo"},
    {"ops"},
    {"_C", "families", "gates", "jsonl", "memory", "paths", "terminal"},
]
# The executable specification is for tests, and for fitting, which is done offline.
USE_THE_REFERENCE = {"decoding.drafters.calibration"}


def imports_of(root: Path) -> dict[str, set[str]]:
    """Return what every module of a package imports: modules of it by their names without the
    package's, others by the first part of theirs with ``/`` before it.
    """
    files = {}
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        files[".".join(part for part in parts if part != "__init__")] = file
    known = {*files, "_C"}

    def resolved(name: str) -> str:
        top, _, inside = name.partition(".")
        if top != root.name:
            return f"/{top}"
        while inside and inside not in known:
            inside = inside.rpartition(".")[0]
        return inside

    return {
        module: {resolved(name) for name in _names(file, module, root.name)}
        for module, file in files.items()
    }


def _names(file: Path, module: str, package: str) -> Iterator[str]:
    """Yield the full dotted names that a file imports, wherever in it."""
    here = [package, *filter(None, module.split("."))]
    if file.name != "__init__.py":
        here.pop()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) + 1 - node.level] if node.level else []
            base = [*base, *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def wrong_arrows(imports: dict[str, set[str]]) -> list[str]:
    """Return the imports that are against the rules."""
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    wrong = []
    for module, imported in imports.items():
        top = module.split(".")[0]
        for other in sorted(imported):
            below = other.split(".")[0]
            if other.startswith("/"):
                allowed = other != "/transformers" or not module.startswith("decoding.drafters")
            elif not module:  # the public names' homes are imported once they are used
                allowed = other == "ops"
            elif not other:  # the public names
                allowed = top == "cli"
            elif other.startswith("ops.reference"):
                allowed = module.startswith("ops.reference") or module in USE_THE_REFERENCE
            elif module.startswith("decoding.drafters") and below == "decoding":
                clock = "decoding.ranks", "decoding.sizing"
                allowed = other.startswith("decoding.drafters") or other in clock
            else:
                allowed = top == below or level[top] < level[below]
            if not allowed:
                wrong.append(f"{module} imports {other or 'the package'}")
    return wrong


def cycle(imports: dict[str, set[str]]) -> list[str]:
    """Return modules each of which imports the next, the last the first; none if there are none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        for other in sorted(imports.get(module, set()) - done - {""}):
            if found := follow(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (follow(module, []) for module in imports if module)), [])


def test_modules_import_downwards_only():
    assert wrong_arrows(imports_of(PACKAGE)) == []


def test_there_is_no_cycle():
    assert cycle(imports_of(PACKAGE)) == []


def test_all_modules_are_seen():
    imports = imports_of(PACKAGE)
    assert "decoding" in imports["generation"] and "_C" in imports["ops.tree"]
    assert "/torch" in imports["ops.tree"] and "generation" in imports["explain.recording"]
    tops = {module.split(".")[0] for module in imports} - {""}
    assert tops | {"_C"} == set().union(*LAYERS)


@pytest.mark.parametrize(
    "module, line, wrong",
    [
        (
            "decoding/loop.py",
            "from msn_ext.training import data",
            "decoding.loop imports training.data",
        ),
        ("training/data.py", "import msn_ext.decoding.loop", "training.data imports decoding.loop"),
        ("ops/tree.py", "from ..decoding import loop", "ops.tree imports decoding.loop"),
        ("jsonl.py", "from .cli import main", "jsonl imports cli.main"),
        ("recipe.py", "from . import explain", "recipe imports explain"),
        (
            "ops/tree.py",
            "def f():\n    from .reference import tree",
            "ops.tree imports ops.reference.tree",
        ),
        ("decoding/loop.py", "from msn_ext import generate", "decoding.loop imports the package"),
        (
            "decoding/drafters/sam.py",
            "from transformers import PreTrainedModel",
            "decoding.drafters.sam imports /transformers",
        ),
        (
            "decoding/drafters/sam.py",
            "from .. import loop",
            "decoding.drafters.sam imports decoding.loop",
        ),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path, module, line, wrong):
    root = made_up(tmp_path, {module: line})
    assert wrong_arrows(imports_of(root)) == [wrong]


def test_right_arrows_are_none_of_them(tmp_path):
    right = {
        "cli/main.py": "from msn_ext import generate\nfrom ..recipe import x",
        "recipe.py": "from .training import data\nfrom .generation import y",
        "decoding/loop.py": "from msn_ext import ops, _C\nimport torch, transformers",
        "decoding/drafters/sam.py": "from ..sizing import z\nfrom msn_ext.ops import tree",
        "decoding/drafters/calibration.py": "from msn_ext.ops import reference",
        "__init__.py": "from msn_ext.ops import _C",
    }
    assert wrong_arrows(imports_of(made_up(tmp_path, right))) == []


def test_a_cycle_is_found(tmp_path):
    circle = {
        "decoding/loop.py": "from .sizing import a",
        "decoding/sizing.py": "from . import loop",
    }
    imports = imports_of(made_up(tmp_path, circle))
    assert wrong_arrows(imports) == []
    assert sorted(cycle(imports)) == ["decoding.loop", "decoding.sizing"]


def made_up(folder: Path, content: dict[str, str]) -> Path:
    """A package with some of the modules' names, empty but for ``content``."""
    root = folder / "msn_ext"
    names = """__init__ cli/__init__ cli/main recipe explain generation jsonl decoding/__init__
        decoding/loop decoding/sizing decoding/drafters/__init__ decoding/drafters/sam
        decoding/drafters/calibration training/__init__ training/data ops/__init__ ops/tree
        ops/reference/__init__ ops/reference/tree""".split()
    for name in names:
        file = root / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content.get(f"{name}.py", ""))
    return root

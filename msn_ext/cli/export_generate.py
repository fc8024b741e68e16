"""``msn export-generate``: the folder by which transformers decodes with msn_ext by itself."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from .common import CommandError

HELP = "have transformers' own tools decode with msn_ext"
DESCRIPTION = (
    "Put a folder custom_generate/ into a model's folder. What loads that model with"
    " trust_remote_code=True (`transformers serve`, pipelines, lm-evaluation-harness) then decodes"
    " with msn_ext, and so does model.generate(custom_generate=DIR, trust_remote_code=True) for any"
    " model. Text stays what it was; take the folder away to undo it."
)
FILES = "generate.py", "requirements.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="a model's folder, or a new one")


def run(arguments: argparse.Namespace) -> int:
    source = Path(__file__).parents[1] / "custom_generate"
    target: Path = arguments.folder / "custom_generate"
    for name in FILES:
        there = target / name
        if there.exists() and there.read_bytes() != (source / name).read_bytes():
            raise CommandError(f"{there}: there is another one; move it away first")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise CommandError(f"{target}: {error.strerror}") from error
    print(f"{target} is there: load the model with trust_remote_code=True")
    return 0

"""`msn train` on a disk that gets full: a message with option and path, and the same command goes
on once there is room, to the same figures.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from helpers.conversations import command
from msn_ext.paths import no_room, replacing

pytest.importorskip("peft")
pytest.importorskip("accelerate")
CASES = {
    "figures": ("4k", []),
    "answers": ("8k", ["--self-distill", "--max-new-tokens", "9"]),
    "checkpoint": ("60k", ["--gate"]),
    "second checkpoint": ("240k", ["--max-steps", "4", "--gate"]),
    "adapter": ("152k", ["--gate"]),
}
SAID = {
    "figures": "/out/figures.json: No space left on device",
    "answers": "/out/answers.jsonl: No space left on device",
}
# In a namespace of its own: disks of the sizes, each is filled and then made larger.
SCRIPT = """
import contextlib, io, json, os, subprocess, sys
from msn_ext import cli
for name, (size, arguments, folder) in json.load(open(sys.argv[1])).items():
    os.makedirs(folder)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=" + size, "none", folder], check=True)
    found = []
    for output in (folder + "/out", folder + "/out", folder + "-whole"):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            with contextlib.redirect_stdout(io.StringIO()):
                code = cli.main([x if x != "OUT" else output for x in arguments])
        files = sorted(os.listdir(output))
        figures = json.load(open(output + "/figures.json")) if "figures.json" in files else {}
        found.append([code, said.getvalue(), files, figures])
        subprocess.run(["mount", "-o", "remount,size=60m", folder], check=True)
    print(json.dumps([name, found]))
"""


@pytest.fixture(scope="module")
def runs(folder, data, tmp_path_factory):
    """By case: exit code, standard error, files and figures of the run that finds no room, of the
    same once there is some, and of one that had it from the beginning.
    """
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a disk of a small size cannot be made here")
    root = tmp_path_factory.mktemp("disks")
    cases = {
        name: (
            size,
            command(folder, data, "OUT", "--max-steps", "2", "--save-steps", "2", *more),
            str(root / name),
        )
        for name, (size, more) in CASES.items()
    }
    (root / "cases.json").write_text(json.dumps(cases))
    run = subprocess.run(
        [unshare, "-rm", sys.executable, "-c", SCRIPT, str(root / "cases.json")],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=root,  # not where the source may lie, uncompiled
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = (line for line in run.stdout.splitlines() if line.startswith("["))
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_is_named_and_the_run_goes_on(runs, name):
    (code, said, files, figures), again, whole = runs[name]
    assert code == 1 and "after" not in figures and "adapter_model.safetensors" not in files
    assert said.splitlines()[-1].startswith("msn: --output ") and f"{name}/out" in said
    path, _, reason = SAID.get(name, "").rpartition(": ")
    assert path in said and reason in said and "the same command goes on" in said
    assert not [file for file in files if file.startswith(".")]
    assert again[0] == whole[0] == 0, again[1] + whole[1]
    assert again[2] == whole[2] and "adapter_model.safetensors" in whole[2]
    for part in ("before", "after"):
        assert again[3][part] == whole[3][part]
    losses = [[x["loss"] for x in run[3]["log"] if "loss" in x] for run in (again, whole)]
    assert losses[0] == losses[1] and losses[0]


def test_what_is_written_in_part_takes_no_file_s_place(tmp_path):
    file = tmp_path / "figures.json"
    file.write_text("before")
    named = pytest.raises(OSError, match=r"No space left on device.*figures\.json")
    with named, replacing(file) as unfinished:
        unfinished.unlink()
        unfinished.symlink_to("/dev/full")
        unfinished.write_text("after")
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_other_errors_are_no_full_disk():
    assert no_room(RuntimeError("CUDA out of memory")) is None
    assert no_room(FileNotFoundError(2, "No such file or directory", "x")) is None
    assert no_room(ValueError("I/O error: no such file (os error 2)")) is None
    full = no_room(ValueError("I/O error: No space left on device (os error 28)"))
    assert full == "No space left on device"

"""Hypothesis profiles and the ``device`` fixture.

``MSN_TEST_DEVICES=cuda`` runs on a GPU what runs on one, and nothing else; without CUDA kernels or
a GPU, those tests fail. ``MSN_TEST_RESULTS=FILE`` appends a line of JSON per test as it ends.
"""

import json
import os
import shutil
from pathlib import Path

# Tests that run beside others, and the processes that they start, have a core each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

import msn_ext
from helpers.conversations import DATA, TEMPLATE, tiny_llama
from helpers.samples import byte_tokenizer

for name, examples in [("msn", 100), ("sanitizers", 15)]:
    settings.register_profile(
        name,
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("msn")

HAVE_CUDA = bool(torch.cuda.is_available() and msn_ext.build_info()["cuda"])
DEVICES = os.environ.get("MSN_TEST_DEVICES", "cpu,cuda" if HAVE_CUDA else "cpu").split(",")
if HAVE_CUDA and "cuda" in DEVICES and "PYTEST_XDIST_WORKER" in os.environ:
    # None of the processes side by side takes the others' part of the GPU's memory.
    torch.cuda.set_per_process_memory_fraction(0.8 / int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))


@pytest.fixture(scope="session", params=DEVICES)
def device(request) -> str:
    if request.param == "cuda" and not HAVE_CUDA:
        pytest.fail("MSN_TEST_DEVICES=cuda, but there is no GPU or msn_ext was built without CUDA")
    return request.param


def pytest_collection_modifyitems(config, items):
    if "cpu" not in DEVICES:
        others = [item for item in items if "device" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "device" in item.fixturenames]


def pytest_runtest_logreport(report):
    file = os.environ.get("MSN_TEST_RESULTS")
    once = report.when == "call" or report.outcome != "passed"
    if file and once and "PYTEST_XDIST_WORKER" not in os.environ:
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            row["error"] = report.longreprtext[-4000:]
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, make)`` returns a folder that ``make(folder)`` has filled, called once in a run
    of the tests, whichever of its processes asks first.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made(name: str, make) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """A tiny chat model."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(path)
    byte_tokenizer(TEMPLATE).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """Conversations to train it on."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, DATA)))
    return str(path)

"""Hypothesis profiles and the ``device`` fixture.

``MSN_REQUIRE_CUDA=1`` turns missing CUDA kernels or a missing GPU from an absence into a failure.
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
WANT_CUDA = os.environ.get("MSN_REQUIRE_CUDA") == "1"


@pytest.fixture(scope="session", params=["cpu", "cuda"] if HAVE_CUDA or WANT_CUDA else ["cpu"])
def device(request) -> str:
    if request.param == "cuda" and not HAVE_CUDA:
        pytest.fail("MSN_REQUIRE_CUDA=1, but there is no GPU or msn_ext was built without CUDA")
    return request.param


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

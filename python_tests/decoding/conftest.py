"""Fixtures of the tests of decoding."""

import pytest
import torch

from helpers import runners
from helpers.runners import CountingBackend
from helpers.tape import TapeBackend
from msn_ext.decoding import capture


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models are faster without threads, and the rest of the machine is left alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "auto"])
def each_engine(request, monkeypatch) -> str:
    """Decode by the model's own forward pass; then by ours, where there is a plan."""
    monkeypatch.setenv("MSN_ENGINE", request.param)
    return request.param


@pytest.fixture
def tapes(device, monkeypatch):
    """Return what was recorded; steps on the CPU are, too. Models and prompts lie on the device."""
    kind = TapeBackend if device == "cpu" else CountingBackend
    monkeypatch.setitem(capture.BACKENDS, device, kind)
    monkeypatch.setattr(kind, "made", [])
    monkeypatch.setenv("MSN_ENGINE", "torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runners.where = device
    yield kind.made
    torch.set_num_threads(threads)

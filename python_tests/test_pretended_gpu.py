"""What a GPU machine tests, on a GPU that is not there (helpers/pretended_gpu.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.pretended_gpu import PretendedGpu

HERE = Path(__file__).parent
# Several minutes, and nothing about devices that others do not show.
LONG = "sampled_steps_draw or cache_grows or verified_as_by_their_parts or uniform_over_the_text"


@pytest.mark.parametrize("folder, least", [("decoding", 150), ("ops", 800)])
def test_tests_of_a_gpu_keep_to_its_device(folder, least):
    """Where one does not, the first minutes on a GPU would go to the test's own mistakes."""
    plugins = "-p", "helpers.pretended_gpu", "-p", "no:cacheprovider", "-p", "no:xdist"
    command = [sys.executable, "-P", "-m", "pytest", "-q", *plugins, "-k", f"not ({LONG})"]
    its = "PYTEST_XDIST", "PYTEST_ADDOPTS", "MSN_TEST_RESULTS"
    alone = {name: x for name, x in os.environ.items() if not name.startswith(its)}
    run = subprocess.run(
        [*command, f"{HERE}/{folder}"],
        env=alone | {"MSN_TEST_DEVICES": "cuda", "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0 and passed and int(passed[1]) > least, (
        run.stdout[-5000:] + run.stderr
    )


def test_tensors_of_two_devices_do_not_meet():
    model, here = nn.Linear(3, 2), torch.ones(2, 3)
    with PretendedGpu():
        there, model = here.to("cuda"), model.to("cuda")
        assert (there.device, here.device) == (torch.device("cuda:0"), torch.device("cpu"))
        assert model(there).device.type == torch.zeros(1, device="cuda").device.type == "cuda"
        assert (there + torch.tensor(2.0)).device.type == "cuda", "numbers may lie anywhere"
        assert (there + 2).cpu().device.type == "cpu" and there.tolist() == here.tolist()
        assert there.copy_(here * 5).device.type == "cuda" and here.sum() == 6
        there[:1] = here[:1]
        there[torch.tensor([0])] = torch.tensor(5.0)
        assert torch.equal(there.cpu(), here * 5)
        for mixed in (
            lambda: there + here,
            lambda: model(here),
            lambda: torch.cat([there, here]),
            lambda: here[there[0].long() > 3],
            lambda: torch.equal(there, here),
            lambda: torch.stack([there.sum(), here.sum()]),
            lambda: here + there.sum(),
            lambda: here.__setitem__(there[0].long() > 3, 1.0),
            lambda: there.__setitem__(torch.tensor([1, 0]), here),
        ):
            with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(AssertionError, match="device"):
            torch.testing.assert_close(there, here * 5)

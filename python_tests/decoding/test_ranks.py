"""A model that two processes compute together (``tp_plan="auto"``) gives the text of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

import msn_ext
from helpers import tensor_parallel
from helpers.commands import save
from helpers.conversations import repeating_llama
from msn_ext.decoding import ranks


@pytest.fixture(scope="module")
def model():
    return repeating_llama(200).double()


@pytest.fixture(scope="module")
def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(3))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.fixture(scope="module")
def texts(model, prompts, tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each process says; they must not wait for each other for ever."""
    folder = tmp_path_factory.mktemp("ranks")
    save(folder / "model", model)
    torch.save(prompts, folder / "prompts.pt")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*launcher, "--nproc-per-node=2", tensor_parallel.__file__, str(folder)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    undivided = "must be divisible by the tensor parallel size" in run.stderr
    if undivided and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this transformers cannot divide 257 tokens among two processes")
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def test_greedy_text_is_that_of_one_process(model, prompts, texts):
    """Also where trees are sized by the clock, which is another one in each process."""
    want = model.generate(**prompts, max_new_tokens=tensor_parallel.NEW, do_sample=False)
    for said in texts:
        for name in ("none", "paper", "auto", "mine"):
            assert torch.equal(said[name], want), name


def test_all_processes_draw_the_first_ones_text(model, prompts, texts):
    torch.manual_seed(0)
    options = dict(prompts, max_new_tokens=tensor_parallel.NEW, do_sample=True)
    want = msn_ext.generate(model, draft="none", engine="torch", **options)
    for said in texts:
        assert torch.equal(said["sampled"], want)


def test_one_process_asks_nobody(model):
    assert ranks.ranks_of(model) is None
    assert ranks.seconds() <= ranks.seconds()

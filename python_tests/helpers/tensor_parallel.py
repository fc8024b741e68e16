"""Decode with a model that several processes compute together: the script of
decoding/test_ranks.py, one process of it.

    torchrun --nproc-per-node 2 tensor_parallel.py FOLDER
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DistributedConfig

import msn_ext

NEW = 48


def decode(folder: Path) -> dict[str, torch.Tensor]:
    """Return texts by how they were decoded; each process has a clock and a seed of its own."""
    rank = dist.get_rank()
    distributed = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", distributed_config=distributed, dtype=torch.float64
    ).eval()
    prompts = torch.load(folder / "prompts.pt")
    options = dict(prompts, max_new_tokens=NEW, engine="auto")
    now = time.perf_counter_ns
    time.perf_counter_ns = lambda: now() * (1 + 50 * rank) + rank * now() % 99991 * 5000
    torch.manual_seed(rank)
    drafts = dict(none="none", paper="paper", auto="auto", mine=msn_ext.BestFirst())
    found = {
        name: msn_ext.generate(model, draft=draft, **options) for name, draft in drafts.items()
    }
    found["sampled"] = msn_ext.generate(model, do_sample=True, draft="auto", **options)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    torch.save(decode(folder), folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()

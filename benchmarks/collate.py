"""Time NoisyCollator: to how many tokens a second it adds noise on one core, which a data loader's
worker would wait for.

    python benchmarks/collate.py --json out.json

Batches of 32 samples of 1024 tokens, 300 of them a prompt; the time of the collator that it wraps
is a line of its own, and not in the others. Medians of 15 batches.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from machine import cpu_name, git_commit
from transformers import LlamaConfig

from msn_ext import NoisyCollator
from msn_ext.recipe.settings import NoiseSettings
from msn_ext.training.data import Collate

SAMPLES, TOKENS, PROMPT, VOCABULARY = 32, 1024, 300, 49152
LAYOUTS = (("replace", 1), ("replace", 8), ("branch", 8), ("branch", 24))


def tokens_per_second(collate, samples: list) -> float:
    seconds = []
    for _ in range(16):
        start = time.perf_counter()
        collate(samples)
        seconds.append(time.perf_counter() - start)
    return SAMPLES * TOKENS / statistics.median(seconds[1:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(
        VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0)
    ).tolist()
    samples = [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in ids]
    inner = Collate(pad_token_id=2)
    batch, config = inner(samples), LlamaConfig(attn_implementation="sdpa")
    found = {"the wrapped collator": tokens_per_second(inner, samples)}
    for layout, segments in LAYOUTS:
        noise = NoiseSettings(layout=layout, segments=segments)
        noisy = NoisyCollator(lambda _: batch, seed=0, config=config, **noise.of_collator(0))
        name = f"{layout}, {segments} segments of {noise.chosen()['length']}"
        found[name] = tokens_per_second(noisy, samples)
    for name, value in found.items():
        print(f"{name:<28}{value / 1e6:8.2f} million tokens/s")
    if options.json:
        about = {"commit": git_commit(), "cpu": cpu_name(), "torch": torch.__version__}
        about["command"] = "python benchmarks/collate.py --json FILE"
        options.json.write_text(json.dumps(about | {"tokens per second": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

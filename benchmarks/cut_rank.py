"""Cut the products B A of a LoRA to fewer ranks, their largest singular values: what a smaller
adapter might have learned.

    python benchmarks/cut_rank.py ADAPTER --rank 8 --output DIR
    python benchmarks/cut_rank.py ADAPTER --rank 4 --dtype bfloat16 --output DIR

Prints the share of the products' squares that is left.
"""

import argparse
import json
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def cut(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return matrices [rank, inputs] and [outputs, rank] whose product is nearest to b @ a, and the
    share of its squares that they have.
    """
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, sizes, v = torch.linalg.svd(r_b @ r_a.T)
    squares, root = sizes.square(), sizes[:rank].sqrt()
    small_a, small_b = (root[:, None] * v[:rank]) @ q_a.T, q_b @ u[:, :rank] * root
    kept = float(squares[:rank].sum() / squares.sum())
    return small_a.to(a.dtype).contiguous(), small_b.to(b.dtype).contiguous(), kept


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=pathlib.Path, help="a folder of PEFT's, with a LoRA")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="(default: as it was)")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args(arguments)
    config = json.loads((options.adapter / CONFIG).read_text())
    if not 1 <= options.rank <= config["r"] or config["rank_pattern"] or config["alpha_pattern"]:
        parser.error(f"--rank {options.rank}; expected 1 to the adapter's {config['r']}, of all")
    weights = load_file(options.adapter / WEIGHTS)
    shares = []
    for name in [name for name in weights if ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        weights[name], weights[other], share = cut(weights[name], weights[other], options.rank)
        shares.append(share)
    if options.dtype:
        weights = {name: its.to(getattr(torch, options.dtype)) for name, its in weights.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(weights, options.output / WEIGHTS, metadata={"format": "pt"})
    # PEFT's scaling stays what it was.
    config |= {"r": options.rank, "lora_alpha": config["lora_alpha"] * options.rank / config["r"]}
    (options.output / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    mean, least = 100 * sum(shares) / len(shares), 100 * min(shares)
    print(f"{mean:.1f} % of the squares of {len(shares)} products, {least:.1f} % of one")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Fuzzes the emulated CUDA kernels against msn_ext.ops.reference; by hand:

    python python_tests/emulation/fuzz.py --rounds 50 --seed 0

builds them in a temporary folder. A round is one random case of each op. Each tensor of a case lies
in a block of 0xff bytes (NaN, -1), gaps between strides included, in which every byte is compared
with what it shall be in the end. The block ends at a page that cannot be accessed: a read past it
is fatal.
"""

import argparse
import faulthandler
import random
import signal
import sys
import tempfile
from pathlib import Path

import build
import torch
from fuzz_drafting import (
    draft_trees_of_every_size,
    fuzz_append_tails,
    fuzz_draft_tree,
    fuzz_fill_tree,
    fuzz_index_suffixes,
    fuzz_keep_continuation,
    fuzz_keep_tail,
    fuzz_lookup_ngram,
    fuzz_remember_guesses,
    fuzz_top_guesses,
)
from fuzz_fused import fuzz_gated_activation, fuzz_residual_norm, fuzz_rotary_cache
from fuzz_noise import fuzz_draw_noise
from fuzz_tree import (
    fuzz_advance_text,
    fuzz_commit_kv,
    fuzz_place_tree,
    fuzz_tree_ancestors,
    fuzz_tree_attention,
    fuzz_verify_logits,
    fuzz_verify_tree,
)

import msn_ext
from msn_ext import _C

NODES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256]
OPS = {
    "tree_ancestors": fuzz_tree_ancestors,
    "verify_tree": fuzz_verify_tree,
    "lookup_ngram": fuzz_lookup_ngram,
    "fill_tree": fuzz_fill_tree,
    "commit_kv": fuzz_commit_kv,
    "verify_logits": fuzz_verify_logits,
    "place_tree": fuzz_place_tree,
    "advance_text": fuzz_advance_text,
    "tree_attention": fuzz_tree_attention,
    "top_guesses": fuzz_top_guesses,
    "index_suffixes": fuzz_index_suffixes,
    "remember_guesses": fuzz_remember_guesses,
    "keep_continuation": fuzz_keep_continuation,
    "keep_tail": fuzz_keep_tail,
    "draft_tree": fuzz_draft_tree,
    "append_tails": fuzz_append_tails,
    "draw_noise": fuzz_draw_noise,
    "residual_norm": fuzz_residual_norm,
    "rotary_cache": fuzz_rotary_cache,
    "gated_activation": fuzz_gated_activation,
}


def run(ops: list[str], rounds: int, seed: int) -> None:
    if "draft_tree" in ops:
        draft_trees_of_every_size()
    for at in range(rounds):
        for op in ops:
            rng = random.Random(f"{seed} {op} {at}")
            torch.manual_seed(rng.getrandbits(32))
            try:
                OPS[op](rng, NODES[at % len(NODES)])
            except BaseException:
                print(f"{op} fails in round {at} of seed {seed}", file=sys.stderr)
                raise
    print(f"{rounds} rounds agree: {' '.join(ops)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2 * len(NODES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument(
        "--built", action="store_true", help="PYTHONPATH has the emulated build (else one is made)"
    )
    args = parser.parse_args()
    if not args.built:
        with tempfile.TemporaryDirectory() as folder:
            build.build(Path(folder))
            return build.fuzz(Path(folder), *sys.argv[1:]).returncode
    assert msn_ext.build_info()["cpu_isa"] == "emulated CUDA", (
        f"not an emulated build: {_C.__file__}"
    )
    torch.set_num_threads(1)
    faulthandler.enable()
    faulthandler.register(
        signal.SIGTRAP, chain=True
    )  # what the compiler's checks end with on some machines
    run(args.ops, args.rounds, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The CUDA kernels where there is no GPU: compiled for the CPU over a small emulation of CUDA.

What is proved is the kernels' logic, down to barriers, alignment and bounds, against
msn_ext.ops.reference; emulation/cuda_runtime.h lists what only a GPU can show.
"""

import re
import shutil
import subprocess

import pytest

from emulation import build

ROUNDS = 39  # three of each size of tree; a mistake is looked for in more
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


# What is wrong: kernel, text, what stands there instead.
MISTAKES = {
    "bounds": ("commit_kv", "&& node < room", ""),
    "alignment": (
        "commit_kv",
        "while (all % cache.unit) cache.unit /= 2;",
        "while (stretch % cache.unit) cache.unit /= 2;",
    ),
    "barrier": ("tree_ancestors", "__syncthreads();", ""),
    "race": (
        "index_suffixes",
        "atomicMax(table + slot_of(hash, slots), static_cast<int32_t>(end));",
        "table[slot_of(hash, slots)] = end;",
    ),
    "gaps": ("index_suffixes", "if (!tokens) continue;", ""),
    "order": ("draft_tree", "__double_as_longlong(value) - 1;", "__double_as_longlong(value);"),
    "after the corpus": (
        "draft_tree",
        "const Sources row_0 = first_row();",
        "Sources row_0 = first_row(); ++row_0.corpus_length;",
    ),
    "warp": ("draft_tree", "__syncwarp();", ""),
    "stale look-ups": ("draft_tree", "waiting[i].expansion = -1;", ";"),
    "another path's look-up": ("draft_tree", "&last->place", "&head->place"),
    "seen by all": (
        "draft_tree",
        "__syncthreads();  // all have seen that",
        "// all have seen that",
    ),
    "shared memory unasked": (
        "draft_tree",
        'check("draft_tree",\n        cudaFuncSetAttribute',
        'if (nodes > 25) check("draft_tree",\n        cudaFuncSetAttribute',
    ),
    "shared memory declared": ("draft_tree", "kMostShared - sizeof(Round)", "kMostShared"),
    "next ones": ("draft_tree", "if (i < lane && other > value) stops = true;", ""),
    "rank": ("draw_noise", "before == rank", "before >= rank"),
    "end of text": ("advance_text", "if (ended) count = end + 1;", ""),
    "padding": ("place_tree", "below < 0 ? 0 : below", "below"),
    "depth": ("keep_continuation", "at < nodes ?", "true ?"),
    "tail's rows": ("keep_tail", "tail < 0 ? i :", "tail <= 0 ? i :"),
    "nodes alone": ("keep_tail", "count <= pass.rows", "true"),
    "ties": ("append_tails", "&& node < row", "&& node > row"),
    "all chances": (
        "append_tails",
        "chance[row] = mine;\n    __syncthreads();",
        "chance[row] = mine;",
    ),
    "ends": ("append_tails", "mine > 0 && ", ""),
    "last one": ("verify_logits", "trees.nodes * rows.parts - 1", "trees.nodes * rows.parts - 2"),
    "released": ("verify_logits", "__threadfence();\n    const int of_row", "const int of_row"),
    "acquired": ("verify_logits", "__threadfence();\n    shared.last_of_row", "shared.last_of_row"),
    "last of both": (
        "verify_logits",
        "if (!shared.last_of_tree) return;",
        "if (!shared.last_of_tree || !shared.last_of_row) return;",
    ),
    "bound": ("top_guesses", "distance >= kGuesses) ? other", "distance > 1) ? other"),
    "crowd": ("top_guesses", "if (shared.n_reached <= kMostReached) return", "return"),
    "NaN among pairs": ("top_guesses", "x = __hmax2_nan(x, x);", ""),
    "stream": ("residual_norm", "to_float(store(sums, h + i), sums);", ""),
    "wide weights": ("residual_norm", "&norm.weight, ", ""),
    "slots": ("rotary_cache", "before > p.slots - p.nodes", "false"),
    "all heads": ("rotary_cache", "return block_sum(sum, scratch);", "return warp_sum(sum);"),
    "rows": ("gated_activation", "whole_rows(gate, 16) && ", ""),
    "copies": ("tree_attention_mma", "await_copies<0>();", "await_copies<1>();"),
    "stages": (
        "tree_attention_mma",
        "__syncthreads();  // the tile is there",
        "// the tile is there",
    ),
    "window": ("tree_attention_mma", "tile < w.dense_from", "false"),
    "NaN": ("tree_attention_mma", "if (!finite<T>(value)) value = 0;", ""),
    "shared memory of another device": (
        "tree_attention_mma",
        "S::kBytes, stream, p",
        "S::kBytes + (1 << 18), stream, p",
    ),
    "NaN of a pair": ("tree_attention_mma", "0x80008000", "0x8000"),
    "warps": ("tree_attention_mma", "of[i].x - finite_base", "of[0].x - finite_base"),
    "bytes": (
        "tree_attention_wgmma",
        "arrive_and_expect(full, S::kStage)",
        "arrive_and_expect(full, S::kMatrix)",
    ),
    "registers before products": ("tree_attention_wgmma", "  open_products();", ""),
    "registers after products": (
        "tree_attention_wgmma",
        "await_products<0>();",
        "await_products<1>();",
    ),
    "descriptor": ("tree_attention_wgmma", "d % kBox * 2", "d % kBox"),
    "async proxy": (
        "tree_attention_wgmma",
        "  publish_shared();\n  __syncthreads();\n}",
        "  __syncthreads();\n}",
    ),
    "splits": ("tree_attention_merge", "split < blocks ?", "split < blocks - 1 ?"),
    "early": ("tree_attention_merge", "  await_launch_before();", ""),
}

SEEDS = {"stale look-ups": 9}
"""Where the usual cases make a mistake's kernel run forever before they make it wrong."""


@pytest.fixture(scope="module")
def emulated(once):
    """Folder with a build of the checkout's kernels."""
    return once("emulated", build.build)


def fuzz(folder, *options: str) -> subprocess.CompletedProcess:
    return build.fuzz(folder, "--rounds", str(ROUNDS), *options, timeout=300, capture_output=True)


def test_the_kernels_do_what_the_reference_says(emulated):
    """Every op on random cases, malformed ones included: the reference's values, nothing else
    touched, no hang.
    """
    run = fuzz(emulated)
    assert run.returncode == 0 and f"{ROUNDS} rounds agree" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_kernel_is_found(emulated, tmp_path, mistake):
    """Negative controls: the same build with one mistake in one kernel fails in that op."""
    kernel, old, new = MISTAKES[mistake]
    mutant = shutil.copytree(emulated, tmp_path / "mutant")
    build.mutate(mutant, f"{kernel}.cu", old, new)
    op = re.sub("(?<=tree_attention)_.*", "", kernel)
    seed = str(SEEDS.get(mistake, 0))
    run = fuzz(mutant, "--ops", op, "--rounds", "130", "--seed", seed)
    found = "emulation: " in run.stderr or "fuzz_" in run.stderr
    assert run.returncode != 0 and found and "ImportError" not in run.stderr, (
        run.stdout + run.stderr
    )

"""The CUDA kernels where there is no GPU: compiled for the CPU over a small emulation of CUDA.

What is proved is the kernels' logic, down to barriers, alignment and bounds, against
msn_ext.ops.reference; emulation/cuda_runtime.h lists what only a GPU can show.
"""

import shutil
import subprocess

import pytest

from emulation import build

ROUNDS = 104  # eight of each size of tree
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


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


@pytest.mark.parametrize(
    "kernel, old, new",
    [
        ("commit_kv", "&& node < room", ""),
        (
            "commit_kv",
            "while (all % cache.unit) cache.unit /= 2;",
            "while (stretch % cache.unit) cache.unit /= 2;",
        ),
        ("tree_ancestors", "__syncthreads();", ""),
        (
            "index_suffixes",
            "atomicMax(table + slot_of(hash, slots), static_cast<int32_t>(end));",
            "table[slot_of(hash, slots)] = end;",
        ),
        ("index_suffixes", "if (!tokens) continue;", ""),
        ("draft_tree", "__double_as_longlong(value) - 1;", "__double_as_longlong(value);"),
        (
            "draft_tree",
            "const Sources row_0 = first_row();",
            "Sources row_0 = first_row(); ++row_0.corpus_length;",
        ),
        ("draw_noise", "before == rank", "before >= rank"),
        ("advance_text", "if (ended) count = end + 1;", ""),
        ("place_tree", "below < 0 ? 0 : below", "below"),
        ("keep_continuation", "at < nodes ?", "true ?"),
        ("draft_tree", "__syncwarp();", ""),
        ("draft_tree", "waiting[i].expansion = -1;", ";"),
        ("draft_tree", "expansion.next = -1;", ""),
        ("draft_tree", "at == likeliest ? next : -1", "next"),
        ("draft_tree", "__syncthreads();  // all have seen that", "// all have seen that"),
        ("draft_tree", "if (i < lane && other > value) stops = true;", ""),
        ("verify_logits", "trees.nodes * rows.parts - 1", "trees.nodes * rows.parts - 2"),
        ("verify_logits", "__threadfence();\n    const int of_row", "const int of_row"),
        ("verify_logits", "__threadfence();\n    shared.last_of_row", "shared.last_of_row"),
        ("top_guesses", "distance >= kGuesses) ? other", "distance > 1) ? other"),
        ("top_guesses", "if (shared.n_reached <= kMostReached) return", "return"),
        ("top_guesses", "x = __hmax2_nan(x, x);", ""),
        ("tree_attention_mma", "await_copies<0>();", "await_copies<1>();"),
        ("tree_attention_mma", "__syncthreads();  // the tile is there", "// the tile is there"),
        ("tree_attention_mma", "tile < w.dense_from", "false"),
        ("tree_attention_mma", "if (!finite<T>(value)) value = 0;", ""),
        ("tree_attention_mma", "r, w.blocks, w.lane", "r, w.blocks - 1, w.lane"),
        ("tree_attention_mma", "if (threadIdx.x == 0) arrived[task] = 0;", ""),
        ("residual_norm", "widen(store(sums, h + i), sums);", ""),
        ("residual_norm", "&norm.weight, ", ""),
        ("rotary_cache", "before > p.slots - p.nodes", "false"),
        ("rotary_cache", "return block_sum(sum, scratch);", "return warp_sum(sum);"),
        ("gated_activation", "whole_rows(gate, 16) && ", ""),
        (
            "tree_attention_mma",
            "__threadfence();\n  __syncthreads();\n  bool last",
            "__syncthreads();\n  bool last",
        ),
        (
            "tree_attention_mma",
            "__threadfence();\n  if (threadIdx.x == 0) arrived",
            "if (!threadIdx.x) arrived",
        ),
        ("tree_attention_mma", "if (S::kBytes > 48 * 1024)", "if (false)"),
        ("tree_attention_mma", "S::kBytes, stream, p", "S::kBytes + (1 << 18), stream, p"),
    ],
    ids=[
        "bounds",
        "alignment",
        "barrier",
        "race",
        "gaps",
        "order",
        "after the corpus",
        "rank",
        "end of text",
        "padding",
        "depth",
        "warp",
        "stale look-ups",
        "another's look-up",
        "siblings",
        "seen by all",
        "next ones",
        "last one",
        "released",
        "acquired",
        "bound",
        "crowd",
        "NaN among pairs",
        "copies",
        "stages",
        "window",
        "NaN",
        "splits",
        "counter",
        "stream",
        "wide weights",
        "slots",
        "all heads",
        "rows",
        "sums released",
        "sums acquired",
        "shared memory unasked",
        "shared memory of another device",
    ],
)
def test_a_mistake_in_a_kernel_is_found(emulated, tmp_path, kernel, old, new):
    """Negative controls: the same build with one mistake in one kernel fails in that op."""
    mutant = shutil.copytree(emulated, tmp_path / "mutant")
    build.mutate(mutant, f"{kernel}.cu", old, new)
    run = fuzz(mutant, "--ops", kernel.removesuffix("_mma"))
    assert run.returncode != 0 and ("emulation: " in run.stderr or "fuzz_" in run.stderr), (
        run.stdout + run.stderr
    )

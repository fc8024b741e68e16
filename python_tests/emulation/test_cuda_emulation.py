"""The CUDA kernels where there is no GPU: compiled for the CPU over a small emulation of CUDA.

What is proved is the kernels' logic, down to barriers, alignment and bounds, against
msn_ext.ops.reference; emulation/cuda_runtime.h lists what only a GPU can show.
"""

import re
import shutil
import subprocess

import pytest

from emulation import build

ROUNDS = 130  # ten of each size of tree
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
            "atomicMax(table + slot, static_cast<int32_t>(end));",
            "table[slot] = end;",
        ),
        ("index_suffixes", "if (!tokens) break;", ""),
        ("draft_tree", "waiting[middle].value >= mine.value", "waiting[middle].value > mine.value"),
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
        ("verify_logits", "== nodes - 1", "== nodes - 2"),
        ("tree_attention", "from += tile_keys", "from += kKeys"),
        ("tree_attention_mma", "await_copies<0>();", "await_copies<1>();"),
        ("tree_attention_mma", "__syncthreads();  // the tile is there", "// the tile is there"),
        ("tree_attention_mma", "tile < w.dense_from", "false"),
        ("tree_attention_mma", "if (!finite<T>(value)) value = 0;", ""),
        ("tree_attention_mma", "0x80008000", "0x8000"),
        (
            "tree_attention_wgmma",
            "arrive_and_expect(full, S::kStage)",
            "arrive_and_expect(full, S::kMatrix)",
        ),
        ("tree_attention_wgmma", "  open_products();", ""),
        ("tree_attention_wgmma", "await_products<0>();", "await_products<1>();"),
        ("tree_attention_wgmma", "d % kBox * 2", "d % kBox"),
        (
            "tree_attention_wgmma",
            "  publish_shared();\n  __syncthreads();\n}",
            "  __syncthreads();\n}",
        ),
        ("tree_attention_mma", "of[i].x - finite_base", "of[0].x - finite_base"),
        ("tree_attention_merge", "split < blocks ?", "split < blocks - 1 ?"),
        ("tree_attention_merge", "own[i].x - finite_base", "own[0].x - finite_base"),
        ("tree_attention_merge", "first < kWarp ? shares.of[0] : shares.of[1]", "shares.of[0]"),
        ("tree_attention_merge", "  await_launch_before();", ""),
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
        "last one",
        "fewer keys",
        "copies",
        "stages",
        "window",
        "NaN",
        "NaN of a pair",
        "bytes",
        "registers before products",
        "registers after products",
        "descriptor",
        "async proxy",
        "warps",
        "splits",
        "a split's maximum",
        "more than 32 splits",
        "early",
    ],
)
def test_a_mistake_in_a_kernel_is_found(emulated, tmp_path, kernel, old, new):
    """Negative controls: the same build with one mistake in one kernel fails in that op."""
    mutant = shutil.copytree(emulated, tmp_path / "mutant")
    build.mutate(mutant, f"{kernel}.cu", old, new)
    run = fuzz(mutant, "--ops", re.sub("(?<=tree_attention)_.*", "", kernel))
    assert run.returncode != 0 and ("emulation: " in run.stderr or "fuzz_" in run.stderr), (
        run.stdout + run.stderr
    )

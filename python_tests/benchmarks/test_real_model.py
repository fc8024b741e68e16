"""The demo model decodes real prompts as plain transformers does, in fewer passes.

A short version of ``benchmarks/decode.py --prompts 40 --new-tokens 128``, whose result is committed
under benchmarks/results.
"""

import sys

import pytest

from helpers import BENCHMARKS
from msn_ext import demo


@pytest.fixture(scope="module")
def decode():
    """benchmarks/decode.py, a script."""
    sys.path.insert(0, str(BENCHMARKS))
    import decode

    sys.path.remove(str(BENCHMARKS))
    return decode


@pytest.fixture(scope="module")
def model_and_tokenizer():
    try:
        demo.source_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return demo.load_model(progress=False)


def test_same_text_in_fewer_passes(decode, model_and_tokenizer):
    if not decode.SPECBENCH.is_file():
        pytest.skip("the shared benchmark prompts are not beside the checkout")
    prompts = [
        p
        for p in decode.load_prompts(decode.SPECBENCH, 12)
        if p[0] in ("translation", "math_reasoning")
    ][:3]
    drafts = ["paper", "lookup"]
    rows = decode.measure(*model_and_tokenizer, prompts, drafts, 40, done={}, save=lambda row: None)
    by_draft = {
        draft: [row for row in rows if row["draft"] == draft] for draft in ("transformers", *drafts)
    }
    for draft in drafts:
        for row, plain in zip(by_draft[draft], by_draft["transformers"]):
            if (
                row["tokens"] != plain["tokens"]
            ):  # only where two tokens are as good as equally likely
                assert row["gap"] < decode.NEAR_TIE, row
    for draft, least in (("paper", 1.15), ("lookup", 1.03)):
        tokens = sum(len(row["tokens"]) for row in by_draft[draft])
        passes = sum(len(row["accept_lengths"]) for row in by_draft[draft])
        assert tokens / passes > least, draft

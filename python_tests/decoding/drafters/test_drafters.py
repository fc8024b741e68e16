"""Drafters' settings, and a drafter of the user's own."""

import re

import pytest
import torch

from helpers import ROOT
from helpers.families import tiny_model
from msn_ext import generate
from msn_ext.decoding import BestFirst, Lookahead, SamDecoding, TokenRecycling


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Lookahead(window=0), "window is 0; expected 1"),
        (lambda: Lookahead(ngram=2), "ngram is 2; expected 3"),
        (lambda: Lookahead(guesses=-1), "guesses is -1; expected 0"),
        (lambda: Lookahead(window=60, guesses=60), "tree of 480 nodes; expected at most 256"),
        (lambda: BestFirst(budget=0), "budget is 0; expected None or 1 to 256"),
        (lambda: BestFirst(budget=8.0), "budget is 8.0"),
        (lambda: BestFirst(sources="suffix"), "sources is 'suffix'; expected a tuple"),
        (
            lambda: BestFirst(factors=torch.full((348,), torch.nan, dtype=torch.float64)),
            "factors holds a value outside",
        ),
        (
            lambda: BestFirst(sources=("suffix", "tables")),
            "sources has 'tables'; expected some of denoised, adjacency, suffix",
        ),
        (lambda: BestFirst(max_depth=-1), "max_depth is -1; expected 0 to 256"),
        (lambda: BestFirst(foresight=2.0), "foresight is 2.0; expected 0 to 1"),
        (
            lambda: BestFirst(factors=torch.ones(3)),
            "factors has shape [3] and dtype torch.float32; expected [348], float64",
        ),
        (lambda: SamDecoding(most=1), "most is 1; expected 2 to 256"),
        (lambda: SamDecoding(growth=0), "growth is 0"),
        (lambda: TokenRecycling(0), "budget is 0; expected 1 to 81"),
        (lambda: TokenRecycling(82), "budget is 82"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_the_example_of_the_docs_runs_and_helps():
    page = (ROOT / "docs" / "drafters.md").read_text(encoding="utf-8")
    example = next(
        block.split("```")[0] for block in page.split("```python\n") if "class Known" in block
    )
    names: dict = {}
    exec(example, names)
    model, ids = tiny_model("llama", 3), torch.tensor([[5, 9, 4, 7]])
    settings = dict(do_sample=False, max_new_tokens=40, eos_token_id=None)
    expected = model.generate(ids, **settings)
    known = names["Known"]([expected[0].tolist(), [1, 2, 3]])
    out = generate(model, ids, draft=known, return_dict_in_generate=True, **settings)
    assert torch.equal(out.sequences, expected)
    assert len(out.accept_lengths[0]) < 12

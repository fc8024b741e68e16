"""Draws from the few logits that top-k keeps are draws from all of them: the same candidates with
the same probabilities, and the same text for a seed.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from helpers.cases import seeded
from helpers.families import tiny_model
from msn_ext import generate
from msn_ext.decoding import candidates as module
from msn_ext.decoding.candidates import INDIFFERENT, candidates, largest
from msn_ext.decoding.processors import processed

AFTER = {
    "nothing": [],
    "temperature": [TemperatureLogitsWarper(1.7)],
    "top-k": [TopKLogitsWarper(5)],
    "top-p": [TopPLogitsWarper(0.8)],
    "min-p": [MinPLogitsWarper(0.1, min_tokens_to_keep=3)],
    "typical": [TypicalLogitsWarper(0.7)],
    "epsilon": [EpsilonLogitsWarper(0.01)],
    "eta": [EtaLogitsWarper(0.02, device="cpu")],
    "normalized": [LogitNormalization()],
    "several": [MinPLogitsWarper(0.02), TopPLogitsWarper(0.9), TemperatureLogitsWarper(0.5)],
}
TEXTS = SimpleNamespace()  # nobody looks at them


def logits_of(rows=7, vocabulary=500, seed=0):
    return 3 * torch.randn(1, rows, vocabulary, generator=seeded(seed))


def whole(scores, tokens, vocabulary):
    """Scores of all tokens."""
    return torch.full((len(scores), vocabulary), -float("inf")).scatter(1, tokens, scores)


def both(logits, processors, may_wait=True):
    processors = LogitsProcessorList(processors)
    (found,) = candidates(logits, processors, TEXTS, may_wait)
    (expected,) = processed(logits, processors, TEXTS)
    return found, expected


def test_every_one_of_them_is_tried():
    assert {type(p) for those in AFTER.values() for p in those} == INDIFFERENT


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("k", [1, 20, 499, 600])
@pytest.mark.parametrize(
    "before",
    [
        [],
        [TemperatureLogitsWarper(0.7)],
        [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.95)],
    ],
)
def test_candidates_are_those_of_the_vocabulary(name, k, before):
    logits = logits_of()
    processors = [*before, TopKLogitsWarper(k), *AFTER[name]]
    (_, scores, tokens), (places, expected) = both(logits, processors)
    assert places == slice(0, 64) and tokens.shape == scores.shape
    assert bool((tokens.diff(dim=1) > 0).all())
    found = whole(scores, tokens, logits.shape[-1])
    assert torch.equal(found.isneginf(), expected.isneginf())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_ties_stay_together():
    """As top-k has it, which drops what is less than the k-th."""
    logits = logits_of(rows=3, vocabulary=40)
    logits[0, 1, 5:30] = logits[0, 1].max() + 1
    (_, scores, tokens), (_, expected) = both(logits, [TopKLogitsWarper(4)])
    assert tokens.shape == (3, 25)
    assert torch.equal(whole(scores, tokens, 40), expected)
    assert (~scores.isneginf()).sum(1).tolist() == [4, 25, 4]
    values, _ = largest(torch.zeros(2, 9), 3)
    assert values.shape == (2, 9), "all are equal"


@pytest.mark.parametrize("vocabulary, k", [(500, 1), (500, 20), (500, 499), (9000, 3), (9000, 50)])
def test_the_largest_are_picked_out(vocabulary, k, monkeypatch):
    """What is sorted out beforehand is what would be kept, value by value."""
    monkeypatch.setattr(module, "largest", None)  # not asked
    logits = logits_of(vocabulary=vocabulary)
    ((_, scores, tokens),) = candidates(logits, LogitsProcessorList([TopKLogitsWarper(k)]), 0, True)
    values, expected = logits[0].topk(k)
    assert torch.equal(tokens, expected.sort(1).values)
    assert torch.equal(scores.sort(1, descending=True).values, values)


def test_what_a_division_might_make_equal_is_not_picked_out(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "largest", lambda scores, k: asked.append(k) or largest(scores, k))
    k, plain = 20, logits_of(vocabulary=9000)
    kth = plain[0, 3].topk(k).values[-1]
    for value in (kth, kth * (1 + 1e-7), kth * (1 - 1e-6), float("nan"), float("inf"), 1e31):
        logits = plain.clone()
        logits[0, 3, 4321] = value
        (_, scores, tokens), (_, expected) = both(
            logits, [TemperatureLogitsWarper(1e3), TopKLogitsWarper(k)]
        )
        assert asked.pop() == k and not asked, value
        if value == value:
            assert torch.equal(whole(scores, tokens, 9000), expected)
    both(plain * 0, [TopKLogitsWarper(k)])
    both(plain.double(), [TopKLogitsWarper(k)])
    both(plain, [TemperatureLogitsWarper(1e6), TopKLogitsWarper(k)])
    assert asked == [k] * 3
    logits = plain.clone()
    logits[0, 3, 4321] = kth * (1 - 1e-4)
    both(logits, [TemperatureLogitsWarper(1e3), TopKLogitsWarper(k)])
    assert asked == [k] * 3, "far enough"


def test_of_tokens_without_probability_some_are_enough():
    """Of the first row only two have one; the third one's ties are kept all the same."""
    logits = logits_of(rows=3, vocabulary=40)
    logits[0, 0, 2:] = -float("inf")
    (_, scores, tokens), (_, expected) = both(logits, [TopKLogitsWarper(4)])
    assert tokens.shape == (3, 4)
    assert torch.equal(whole(scores, tokens, 40), expected)
    logits[0, 2, :7] = logits[0, 2].max() + 1
    (_, scores, tokens), (_, expected) = both(logits, [TopKLogitsWarper(4)])
    assert tokens.shape == (3, 7)
    assert torch.equal(whole(scores, tokens, 40), expected)


def test_where_all_logits_go_on():
    """What comes after top-k needs them, it keeps others, or the host may not wait."""
    logits = logits_of()
    suppressed = SuppressTokensLogitsProcessor([3], device="cpu")
    for processors, may_wait in (
        ([TopKLogitsWarper(4), suppressed], True),
        ([TopKLogitsWarper(4, filter_value=-9.0), TopPLogitsWarper(0.9)], True),
        ([TopPLogitsWarper(0.9)], True),
        ([TopKLogitsWarper(4)], False),
    ):
        (_, scores, tokens), (_, expected) = both(logits, processors, may_wait)
        assert tokens is None and torch.equal(scores, expected)
    (_, _, tokens), _ = both(logits, [suppressed, TopKLogitsWarper(4)])
    assert tokens is not None


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize("draft", ["none", "auto"])
def test_texts(engine, draft, monkeypatch):
    """Also behind a penalty, which looks at the text, and in batches."""
    model, narrowed = tiny_model("llama", 3), []
    ids = torch.tensor([[5, 9, 5, 9, 5], [7, 3, 11, 7, 3]])

    def run(seed):
        torch.manual_seed(seed)
        options = dict(do_sample=True, temperature=0.9, top_k=12, top_p=0.8, min_p=0.01)
        options |= dict(repetition_penalty=1.05, max_new_tokens=30, eos_token_id=None)
        return generate(model, ids, draft=draft, engine=engine, pad_token_id=0, **options)

    def noted(scores, k):
        narrowed.append(k)
        return largest(scores, k)

    monkeypatch.setattr(module, "largest", noted)
    found = [run(seed) for seed in range(4)]
    assert set(narrowed) == {12}
    monkeypatch.setattr(module, "narrowing", lambda processors: None)
    assert all(torch.equal(text, run(seed)) for seed, text in enumerate(found))
    assert not torch.equal(found[0], found[1])


def test_nan_is_no_token():
    """It has to show as an error, not as a draw."""
    model = tiny_model("llama", 3)
    with torch.no_grad():
        model.lm_head.weight[4, 0] = float("nan")
    ids = torch.tensor([[5, 9, 5, 9, 5]])
    with pytest.raises(ValueError, match="probabilities for row 0 hold NaN"):
        generate(model, ids, do_sample=True, top_k=5, top_p=0.9, max_new_tokens=5, engine="torch")

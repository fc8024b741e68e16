"""Best-first drafting: what it proposes and remembers."""

import pytest
import torch

from helpers.drafters import CPU, passes, text, verify
from helpers.families import VOCAB
from msn_ext.decoding import BestFirst, Corpus
from msn_ext.decoding.drafters.best_first import SOURCES
from msn_ext.ops import reference


def test_a_new_one_has_nothing_to_forget():
    BestFirst(8).forget()


@pytest.mark.parametrize(
    "known", [None, Corpus.build([[1, 2, 3, 0, 1], [3, 2, 1, 0] * 9], VOCAB, progress=False)]
)
def test_best_first_proposes_what_its_tables_hold_and_fills_them_from_every_pass(known):
    """Its tables, kept here by the reference ops from what it is shown, give its next tree."""
    drafter = BestFirst(budget=24, corpus=known)
    nothing = torch.zeros(8, 0, dtype=torch.int32)
    corpus = (known.tokens, known.suffixes) if known else (nothing[0], nothing)
    drafter.start(2, VOCAB, CPU)
    generator = torch.Generator().manual_seed(0)
    history, lengths = torch.randint(0, 4, (2, 64), generator=generator), torch.tensor([9, 12])
    drafter.first(history, lengths)
    contexts = torch.zeros(3, 1 << 16, 9, dtype=torch.int32)
    denoised = torch.full((2, 20, 8), -1, dtype=torch.int32)
    gained = []
    for _ in range(5):
        heads = torch.zeros(2, 8, 64, dtype=torch.int32)
        reference.index_suffixes(heads, history, torch.zeros_like(lengths), lengths)
        tables = denoised, contexts, contexts[:, :0], heads, *corpus, drafter._factors
        expected = reference.draft_tree(history, lengths, *tables, 24, 20, 0.05)
        draft = drafter.propose(history, lengths)
        assert torch.equal(draft.tokens, expected[0]) and torch.equal(draft.parents, expected[1])
        assert torch.equal(drafter.probability, expected[2]) and torch.equal(
            drafter.sources, expected[3]
        )
        logits = torch.randn(2, 24, VOCAB, generator=generator)
        logits[..., :4] += 2  # few tokens, so that guesses come true
        verified = verify(draft, logits, history, lengths)
        drafter.observe(verified)
        guesses = reference.top_guesses(logits)
        reference.remember_guesses(
            contexts, history, lengths, draft.tokens, draft.parents, verified.path, guesses
        )
        denoised.fill_(-1)
        for b, row in enumerate(verified.continuation.tolist()):
            for depth, node in enumerate(node for node in row if node >= 0):
                denoised[b, depth] = guesses[b, node]
        for b, (path, count) in enumerate(zip(verified.path, verified.accept_length.tolist())):
            history[b, lengths[b] : lengths[b] + count] = verified.targets[b, path[:count]]
        lengths = lengths + verified.accept_length
        gained += verified.accept_length.tolist()
    assert max(gained) > 1 and (denoised >= 0).any()


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_drafts_alone_and_more_find_more(source):
    alone, nothing = (
        passes(BestFirst(budget=32, sources=(source,))),
        passes(BestFirst(budget=32, sources=(), foresight=0)),
    )
    assert passes(BestFirst(budget=32)) <= alone < nothing


def test_an_object_remembers_from_call_to_call():
    drafter = BestFirst(budget=32)
    cold = passes(BestFirst(budget=32))
    assert passes(drafter) == cold and passes(drafter) < cold
    for vocabulary in (7, VOCAB):  # of another model's tokens nothing is kept
        drafter.start(1, vocabulary, CPU)
        history, lengths = text([4, 5, 6, 4, 5])
        tokens = drafter.propose(history, lengths).tokens
        assert set(tokens.flatten().tolist()) <= {4, 5, 6}


def test_rows_that_have_ended_do_not_count():
    """A row that gains nothing any more would go on promising what it promised last."""
    drafter = BestFirst()
    drafter.start(2, VOCAB, CPU)
    history, lengths = text([1, 2, 3] * 6, [4, 5, 6] * 6)
    history = torch.cat([history, torch.zeros(2, 60, dtype=torch.int64)], 1)
    drafter._sizer.choose = lambda expected: (promised.append(expected[-1]), 4)[1]
    promised: list = []
    drafter.propose(history, lengths)
    assert drafter._growing.tolist() == [True, True]
    drafter.propose(history, lengths + torch.tensor([2, 0]))
    assert drafter._growing.tolist() == [True, False]
    assert promised[-1] == pytest.approx(float(drafter.probability[0].sum()) - 1)

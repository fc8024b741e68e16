"""Lookahead decoding against its paper's rules followed step by step."""

import itertools

import torch

from helpers.drafters import CPU, text, verify
from helpers.families import VOCAB
from msn_ext import Draft
from msn_ext.decoding import Lookahead
from msn_ext.ops import reference


def test_lookahead_window_pool_and_guesses():
    """A model whose answer to a token is fixed (t -> 3 t + 1 mod 8) lets every n-gram be told
    beforehand.
    """
    size, window, ngram = 8, 4, 4

    def answer(tokens):
        return (3 * tokens + 1) % size

    drafter = Lookahead(window, ngram, guesses=2)
    drafter.start(1, size, CPU)
    history, lengths = text([4, 5, 6, 7])
    level = drafter.first(history, lengths)
    assert level.shape == (1, window + ngram - 3) and torch.isin(level, history[0, :4]).all()
    draft = Draft.of(
        torch.cat([torch.tensor([[7]]), level], 1),
        torch.arange(-1, level.shape[1], dtype=torch.int32),
    )

    def step(draft):
        logits = torch.nn.functional.one_hot(answer(draft.tokens), size).float()
        drafter.observe(verify(draft, logits, history, lengths))

    step(draft)
    root, sizes = 7, []
    for _ in range(12):
        root = int(answer(torch.tensor(root)))
        history[0, 4], lengths = root, torch.tensor([5])
        draft = drafter.propose(history, lengths)
        sizes.append(len(draft))
        step(draft)
    # filling: (columns x levels) 4+1 x 2, then the whole window, then guesses for the root as well
    assert sizes[:2] == [10, 12] and max(sizes) > window * (ngram - 1)
    for pool in drafter._pools:
        assert pool and all(len(entries) <= 2 for entries in pool.values())
        roots = {
            7,
            6,
            3,
            2,
        }  # below the root stands what was expected of another token there (Jacobi)
        assert set(pool) - roots
        for key, entries in pool.items():
            for found in entries:
                chain = found if key in roots else (key, *found)
                for before, after in itertools.pairwise(chain):
                    assert after == int(answer(torch.tensor(before)))


def test_lookahead_sees_its_window_as_the_paper_draws_it():
    """A token of level l, column j, sees levels 1 to l of its column and level 0 up to j."""
    drafter = Lookahead(5, 4, guesses=0)
    drafter.start(1, VOCAB, CPU)
    history, lengths = text([4, 5, 6])
    drafter.first(history, lengths)
    columns = 5
    drafter._levels = [
        torch.zeros(1, n, dtype=torch.int64) for n in (columns - 1, columns, columns)
    ]
    seen = reference.ancestor_matrix(drafter.propose(history, lengths).ancestors)[0]
    for level in range(3):
        for column in range(columns):
            expected = {*range(column + 1)} | {
                columns * above + column for above in range(1, level + 1)
            }
            assert set(seen[columns * level + column].nonzero().flatten().tolist()) == expected

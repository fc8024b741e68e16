"""What each drafter proposes and remembers, against its paper's rules followed step by step."""

import pathlib
import re

import pytest
import torch
from families import VOCAB, tiny_model

from msn_ext import Draft, Verified, generate, ops
from msn_ext.decoding import Lookahead, TokenRecycling

CPU = torch.device("cpu")


def text(*rows):
    """History [B, C] with rubbish behind the texts, and lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    history = torch.full((len(rows), int(lengths.max()) + 3), -7)
    for b, row in enumerate(rows):
        history[b, : len(row)] = torch.tensor(row)
    return history, lengths


def verify(draft: Draft, logits: torch.Tensor) -> Verified:
    targets = logits.argmax(-1)
    accepted, path, _, continuation = ops.verify_tree(draft.tokens, targets, draft.parents)
    return Verified(draft, logits, targets, path, accepted, continuation)


# ---- Token Recycling -----------------------------------------------------------------------------


def test_recycling_fills_its_tree_from_the_matrix_and_the_last_duplicate_wins():
    drafter = TokenRecycling()
    drafter.start(2, VOCAB, CPU)
    matrix = torch.zeros(VOCAB, 8, dtype=torch.int64)
    history, lengths = text([4, 5, 6], [9, 8])
    generator = torch.Generator().manual_seed(0)
    wins = 0
    for _ in range(6):
        draft = drafter.propose(history, lengths)
        assert len(draft) == 81 and int(draft.depth.max()) == 6
        assert [int((draft.depth == d).sum()) for d in range(7)] == [1, 8, 21, 25, 15, 8, 3]
        children: dict = {}
        for node, parent in enumerate(draft.parents.tolist()):
            if parent >= 0:
                rank = children[parent] = children.get(parent, -1) + 1
                assert torch.equal(draft.tokens[:, node], matrix[draft.tokens[:, parent], rank])
        assert torch.equal(draft.tokens[:, 0], torch.tensor([6, 8]))
        logits = torch.randn(2, 81, VOCAB, generator=generator)
        drafter.observe(verify(draft, logits))
        for row, scores in zip(draft.tokens.tolist(), logits):
            for token, score in zip(row, scores):
                wins += bool(matrix[token].any())
                matrix[token] = score.topk(8).indices
    assert wins > 100, "no duplicates, nothing was tried"


def test_recycling_keeps_its_matrix_for_the_next_call_only_in_the_same_object():
    model, ids = tiny_model("llama", 3), torch.tensor([[5, 9, 4, 7]])
    settings = dict(do_sample=False, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True)
    cold = [len(generate(model, ids, draft="recycling", **settings).accept_lengths[0]) for _ in range(2)]
    drafter = TokenRecycling()
    warm = [len(generate(model, ids, draft=drafter, **settings).accept_lengths[0]) for _ in range(2)]
    assert cold == [warm[0]] * 2 and warm[1] < warm[0]
    small = tiny_model("gpt2", 0)
    drafter.start(1, 11, CPU)  # another vocabulary: another matrix
    generate(small, ids, draft=drafter, **settings)


# ---- Lookahead -----------------------------------------------------------------------------------


def test_lookahead_window_pool_and_guesses():
    """A model whose answer to a token is fixed (t -> 3 t + 1 mod 8) lets every n-gram be told beforehand."""
    size, window, ngram = 8, 4, 4
    answer = lambda tokens: (3 * tokens + 1) % size  # noqa: E731
    drafter = Lookahead(window, ngram, guesses=2)
    drafter.start(1, size, CPU)
    history, lengths = text([4, 5, 6, 7])
    level = drafter.first(history, lengths)
    assert level.shape == (1, window + ngram - 3) and torch.isin(level, history[0, :4]).all()
    draft = Draft.of(torch.cat([torch.tensor([[7]]), level], 1), torch.arange(-1, level.shape[1], dtype=torch.int32))

    def step(draft):
        logits = torch.nn.functional.one_hot(answer(draft.tokens), size).float()
        drafter.observe(verify(draft, logits))

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
        roots = {7, 6, 3, 2}  # below the root stands what was expected of another token there (Jacobi)
        assert set(pool) - roots
        for key, entries in pool.items():
            for found in entries:
                chain = found if key in roots else (key, *found)
                for before, after in zip(chain, chain[1:]):
                    assert after == int(answer(torch.tensor(before)))


def test_lookahead_sees_its_window_as_the_paper_draws_it():
    """A token of level l, column j, sees levels 1 to l of its column and level 0 up to j."""
    drafter = Lookahead(5, 4, guesses=0)
    drafter.start(1, VOCAB, CPU)
    history, lengths = text([4, 5, 6])
    drafter.first(history, lengths)
    columns = 5
    drafter._levels = [torch.zeros(1, n, dtype=torch.int64) for n in (columns - 1, columns, columns)]
    seen = ops.reference.ancestor_matrix(drafter.propose(history, lengths).ancestors)[0]
    for level in range(3):
        for column in range(columns):
            expected = {*range(column + 1)} | {columns * above + column for above in range(1, level + 1)}
            assert set(seen[columns * level + column].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Lookahead(window=0), "window is 0; expected 1"),
        (lambda: Lookahead(ngram=2), "ngram is 2; expected 3"),
        (lambda: Lookahead(guesses=-1), "guesses is -1; expected 0"),
        (lambda: Lookahead(window=60, guesses=60), "tree of 480 nodes; expected at most 256"),
        (lambda: TokenRecycling(0), "budget is 0; expected 1 to 81"),
        (lambda: TokenRecycling(82), "budget is 82"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ---- one's own -----------------------------------------------------------------------------------


def test_the_example_of_the_docs_runs_and_helps():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "drafters.md").read_text(encoding="utf-8")
    example = page.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(example, names)
    model, ids = tiny_model("llama", 3), torch.tensor([[5, 9, 4, 7]])
    settings = dict(do_sample=False, max_new_tokens=40, eos_token_id=None)
    expected = model.generate(ids, **settings)
    known = names["Known"]([expected[0].tolist(), [1, 2, 3]])
    out = generate(model, ids, draft=known, return_dict_in_generate=True, **settings)
    assert torch.equal(out.sequences, expected)
    assert len(out.accept_lengths[0]) < 12

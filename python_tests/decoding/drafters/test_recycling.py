"""Token Recycling against its paper's rules followed step by step."""

import torch

from helpers.drafters import CPU, text, verify
from helpers.families import VOCAB, tiny_model
from msn_ext import generate
from msn_ext.decoding import TokenRecycling


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
        drafter.observe(verify(draft, logits, history, lengths))
        for row, scores in zip(draft.tokens.tolist(), logits):
            for token, score in zip(row, scores):
                wins += bool(matrix[token].any())
                matrix[token] = score.topk(8).indices
    assert wins > 100, "no duplicates, nothing was tried"


def test_recycling_keeps_its_matrix_for_the_next_call_only_in_the_same_object():
    model, ids = tiny_model("llama", 3), torch.tensor([[5, 9, 4, 7]])
    settings = dict(
        do_sample=False, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True
    )
    cold = [
        len(generate(model, ids, draft="recycling", **settings).accept_lengths[0]) for _ in range(2)
    ]
    drafter = TokenRecycling()
    warm = [
        len(generate(model, ids, draft=drafter, **settings).accept_lengths[0]) for _ in range(2)
    ]
    assert cold == [warm[0]] * 2 and warm[1] < warm[0]
    small = tiny_model("gpt2", 0)
    drafter.start(1, 11, CPU)  # another vocabulary: another matrix
    generate(small, ids, draft=drafter, **settings)

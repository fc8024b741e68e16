"""What a drafter of one's own proposes wrongly is refused with a sentence that says what."""

import pytest
import torch

from helpers.families import VOCAB, tiny_model
from msn_ext import Draft, DraftTree, generate
from msn_ext.decoding import TokenRecycling
from msn_ext.decoding.drafters.checks import checked_draft, is_others

IDS = torch.tensor([[5, 9, 4, 7, 5, 9], [3, 3, 8, 9, 9, 20]])
SETTINGS = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
PARENTS = torch.tensor([-1, 0, 0, 1], dtype=torch.int32)
NONE = torch.zeros(2, 0, dtype=torch.int64)


class Proposes:
    max_depth = 3

    def __init__(self, propose=None, first=None):
        self._propose = propose or (lambda: Draft.of(tokens(), PARENTS))
        self._first = first or (lambda: NONE)

    def start(self, batch, vocabulary, device):
        pass

    def first(self, history, lengths):
        return self._first()

    def propose(self, history, lengths):
        return self._propose()

    def observe(self, verified):
        pass


def tokens(rows: int = 2, nodes: int = 4, of: int = 9, dtype=torch.int64):
    return torch.full((rows, nodes), of, dtype=dtype)


def draft(**wrong) -> Draft:
    right = Draft.of(tokens(), PARENTS)
    return Draft(**(vars(right) | wrong))


@pytest.mark.parametrize(
    "propose, message",
    [
        (lambda: None, "Proposes.propose gave None; expected a Draft"),
        (lambda: tokens(), "Proposes.propose gave torch.int64 .2, 4. on cpu; expected a Draft"),
        (lambda: draft(tokens=None), r"gave tokens None; expected torch.int64 \[2, 1 to 256\]"),
        (lambda: draft(tokens=tokens(rows=1)), r"tokens torch.int64 \[1, 4\] .*; expected .*\[2,"),
        (lambda: draft(tokens=tokens()[0]), r"tokens torch.int64 \[4\] on cpu; expected"),
        (lambda: draft(tokens=tokens(dtype=torch.int32)), "tokens torch.int32 .*; expected"),
        (lambda: draft(tokens=tokens(nodes=0)), r"tokens torch.int64 \[2, 0\] .*1 to 256"),
        (lambda: draft(tokens=tokens(nodes=257)), r"tokens torch.int64 \[2, 257\] .*1 to 256"),
        (lambda: draft(tokens=tokens().to("meta")), "tokens torch.int64 .* on meta; .* on cpu"),
        (lambda: draft(tokens=tokens(nodes=5)), r"parents torch.int32 \[4\] .*; expected .*\[5\]"),
        (lambda: draft(parents=PARENTS.long()), "parents torch.int64 .*; expected torch.int32"),
        (lambda: draft(parents=PARENTS.repeat(3, 1)), r"parents .*\[3, 4\] .*; .*\[2, 4\]"),
        (lambda: draft(parents=PARENTS.repeat(2, 1)), r"ancestors .*\[4, 1\] .*; .*\[2, 4, 1\]"),
        (lambda: draft(depth=None), r"depth None; expected torch.int32 \[4\] on cpu"),
        (lambda: draft(parents=PARENTS.flip(0)), "parents"),
        (
            lambda: draft(tokens=tokens(of=VOCAB)),
            "a token that is none of the vocabulary; .*0 to 23",
        ),
        (lambda: draft(tokens=tokens(of=-1)), "a token that is none of the vocabulary"),
        (lambda: draft(tokens=tokens(of=1 << 40)), "a token that is none of the vocabulary"),
        (lambda: draft(ancestors=torch.full((4, 1), 15)), "ancestors or depth that are not those"),
        (lambda: draft(ancestors=torch.full((4, 1), -1)), "ancestors or depth that are not those"),
        (
            lambda: draft(depth=torch.tensor([0, 1, 2, 3], dtype=torch.int32)),
            "Proposes.propose gave ancestors or depth that are not those of its parents",
        ),
    ],
)
def test_proposals(propose, message, each_engine):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("llama", 3), IDS, draft=Proposes(propose), **SETTINGS)


@pytest.mark.parametrize(
    "first, message",
    [
        (lambda: None, r"Proposes.first gave None; expected torch.int64 \[2, n\] on cpu"),
        (lambda: [[3], [4]], "Proposes.first gave a list; expected"),
        (lambda: tokens(rows=3), r"first gave torch.int64 \[3, 4\] on cpu; expected"),
        (lambda: tokens()[0], r"first gave torch.int64 \[4\] on cpu; expected"),
        (lambda: tokens().float(), r"first gave torch.float32 .*; expected torch.int64"),
        (lambda: tokens(nodes=256), r"first gave torch.int64 \[2, 256\]"),
        (lambda: tokens(of=VOCAB), "a token that is none of the vocabulary; expected 0 to 23"),
        (lambda: tokens(of=-3), "a token that is none of the vocabulary"),
    ],
)
def test_first_guesses(first, message, each_engine):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("llama", 3), IDS, draft=Proposes(first=first), **SETTINGS)


def test_right_proposals_pass(each_engine):
    """Any token at the root, padding, the same draft again with other tokens in its tensor."""
    model = tiny_model("llama", 3)
    expected = model.generate(IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)
    own = tokens()
    again = Draft.of(own, torch.tensor([[-1, 0, -1, 1], [-1, 0, 0, 0]], dtype=torch.int32))
    proposed = []

    def propose():
        proposed.append(own[:, 0].tolist())
        own[:, 0], own[:, 1:] = 999, len(proposed)
        return again

    drafter = Proposes(propose, first=lambda: tokens(nodes=2))
    assert torch.equal(generate(model, IDS, draft=drafter, **SETTINGS), expected)
    assert [999, 999] not in proposed[1:]  # the root's place holds the text's last tokens


class Inherits(TokenRecycling):
    """Somebody's own class."""


def test_who_is_checked():
    """Nothing of ours: its proposals cost nothing more."""
    assert not is_others(TokenRecycling())
    assert is_others(Inherits()) and is_others(Proposes())


def test_no_value_is_read_on_the_host():
    """A device need not be waited for: meta tensors have no values."""
    device = torch.device("meta")
    shape = DraftTree.paper().tensors(torch.device("cpu"))
    nodes = len(shape.parents)
    proposal = Draft(
        torch.zeros(2, nodes, dtype=torch.int64, device=device),
        *(x.to(device) for x in (shape.parents, shape.ancestors, shape.depth)),
    )
    history = torch.zeros(2, 9, dtype=torch.int64, device=device)
    assert checked_draft(proposal, Proposes(), history, VOCAB)[1].shape == ()

"""Record what every step of an answer knew and gained."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoding import BestFirst, Verified
from ..decoding.drafters import ObservedDrafter
from ..generation import generate

TAIL = 48
"""Tokens of the text before a step that are kept to be shown."""


@dataclass
class Step:
    """One recorded pass: what it checked and gained, on the host. Nodes are numbered from 0, the
    root.

    Attributes:
        number: of the pass; 1 is the first after the prompt's.
        text: the end of the text before it; its last token is the root.
        tokens, parents: of every node, without padding; the root's parent is -1.
        probability: that the node is accepted, as :func:`msn_ext.ops.draft_tree` expects it.
        sources: of every node, the sum of the bits of :data:`msn_ext.explain.SOURCES`.
        path: the accepted nodes, root first.
        bonus: the model's own token after them.
        kept: tokens gained; less than ``accept_length`` where the answer ends among them.
        passes: of the whole answer, the prompt's not counted; 0 while it is not known.
    """

    number: int
    text: list[int]
    tokens: list[int]
    parents: list[int]
    probability: list[float]
    sources: list[int]
    path: list[int]
    bonus: int
    kept: int
    passes: int

    @property
    def accept_length(self) -> int:
        return len(self.path)

    @property
    def expected(self) -> float:
        """Return the expected accept length; the root stands for the bonus, which is certain."""
        return sum(self.probability)

    @property
    def gained(self) -> list[int]:
        """Return the tokens of the path and the bonus."""
        return [*(self.tokens[node] for node in self.path[1:]), self.bonus]


@dataclass
class Answer:
    """A recorded answer.

    Attributes:
        prompt: its tokens.
        opening: the tokens that the prompt's pass gained.
        steps: every pass after it, in order.
    """

    prompt: list[int]
    opening: list[int]
    steps: list[Step]

    @property
    def tokens(self) -> list[int]:
        """Return the tokens of the answer, without the prompt's."""
        gained = (step.gained[: step.kept] for step in self.steps)
        return [*self.opening, *itertools.chain.from_iterable(gained)]


class Recorder(ObservedDrafter):
    """Best-first drafting, for a batch of one, that keeps a :class:`Step` of every pass but the
    prompt's.

    Args:
        nodes: per tree, root included, 1 to 256.

    Attributes:
        steps: of the last call of ``generate``, in order.
    """

    def __init__(self, nodes: int):
        self._best_first = BestFirst(nodes, tails=False)
        super().__init__(self._best_first)

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        if batch != 1:
            raise ValueError(f"batch is {batch}; expected 1: one row's steps are kept")
        super().start(batch, vocabulary, device)
        self.steps: list[Step] = []
        self._prompt = True

    def observe(self, verified: Verified) -> None:
        super().observe(verified)
        if not self._prompt:
            self.steps.append(self._step(verified))
        self._prompt = False

    def _step(self, verified: Verified) -> Step:
        draft, drafter = verified.draft, self._best_first
        length, accepted = int(verified.lengths[0]), int(verified.accept_length[0])
        tokens = draft.tokens[0].tolist()
        parents = draft.parents.reshape(-1, len(draft))[0].tolist()
        nodes = 1 + sum(parent >= 0 for parent in parents)  # padding comes last
        probability, sources = [1.0] * nodes, [0] * nodes  # where only the root was checked
        if draft is drafter.draft and drafter.probability is not None:
            probability = drafter.probability[0, :nodes].tolist()
            sources = drafter.sources[0, :nodes].tolist()
        path = verified.path[0, :accepted].tolist()
        return Step(
            number=len(self.steps) + 1,
            text=verified.history[0, max(0, length - TAIL) : length].tolist(),
            tokens=tokens[:nodes],
            parents=parents[:nodes],
            probability=probability,
            sources=sources,
            path=path,
            bonus=int(verified.targets[0, path[-1]]),
            kept=accepted,
            passes=0,
        )


def record(
    model, input_ids: Tensor, nodes: int, max_new_tokens: int, engine: str = "auto"
) -> list[Step]:
    """Return the steps of :func:`record_answer`, which takes the same arguments."""
    return record_answer(model, input_ids, nodes, max_new_tokens, engine).steps


def record_answer(
    model, input_ids: Tensor, nodes: int, max_new_tokens: int, engine: str = "auto"
) -> Answer:
    """Decode greedily with trees of ``nodes`` nodes, and keep every pass after the prompt's.

    Args:
        model: a causal language model.
        input_ids: int64 [1, P].
        nodes: per tree, root included, 1 to 256.
        max_new_tokens: to gain.
        engine: as for :func:`msn_ext.generate`.

    Returns:
        The answer, with one step a pass; none where the prompt's pass gained everything.
    """
    drafter = Recorder(nodes)
    out = generate(
        model,
        input_ids,
        draft=drafter,
        engine=engine,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    lengths = out.accept_lengths[0].tolist()
    for step, kept in zip(drafter.steps, lengths[1:], strict=True):
        step.kept, step.passes = kept, len(drafter.steps)
    prompt = input_ids[0].tolist()
    opening = out.sequences[0, len(prompt) : len(prompt) + lengths[0]].tolist()
    return Answer(prompt, opening, drafter.steps)

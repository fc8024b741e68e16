"""Steps of the native engine as most calls take them, in two calls of C++: best-first drafting or
none, and greedy verification.

They do what :class:`.decoder.Decoder` else does an op at a time. A pass leaves nothing of Python or
torch in any cache, so that each of some fifty calls costs microseconds there, and all of them a
tenth of a small model's step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msn_ext import _C
from msn_ext.ops import MAX_NODES

from .drafters import BestFirst, Drafter
from .drafters.jacobi import drafts_nothing
from .drafters.sources import tails_of
from .forward.native import NativeForward


def can_draft(drafter: Drafter) -> bool:
    """Return whether :class:`NativeSteps` drafts as this drafter does, which has been started."""
    return drafts_nothing(drafter) or type(drafter) is BestFirst


class NativeSteps:
    """Drafts, checks and commits, for a decoder whose largest logits are its next tokens.

    Args:
        forward: of the model; its logits are float32.
        drafter: one that :func:`can_draft` knows.
        vocabulary: of the model.
        texts: ``history`` and ``lengths``, ``remaining``, ``last_position``, ``ends``, as
            :func:`msn_ext.ops.place_tree` and :func:`msn_ext.ops.advance_text` take them, changed
            in place.
    """

    def __init__(
        self, forward: NativeForward, drafter: Drafter, vocabulary: int, **texts: Tensor
    ) -> None:
        def room(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device="cpu")

        batch = len(texts["lengths"])
        self._forward, self._lengths = forward, texts["lengths"]
        self._drafter = drafter if isinstance(drafter, BestFirst) else None
        self._gained, self._status = room(batch, MAX_NODES), room(3, batch)
        self._accepted = room(batch)
        known, depth, foresight, tails = None, 0, 0.0, None
        if self._drafter is not None:
            known, tails = self._drafter.tables(texts["history"]), self._drafter.tails
            depth, foresight = self._drafter.depth, self._drafter.foresight
        self._steps = _C.NativeSteps(
            forward.bound,
            dict(texts, gained=self._gained, status=self._status, accept_length=self._accepted),
            known,
            vocabulary,
            depth,
            foresight,
            1 if tails is None else tails.length,
            -1 if tails is None else tails.noise,
        )

    @property
    def pass_seconds(self) -> float:
        """Seconds that forward passes took, of all steps so far."""
        return self._steps.pass_seconds()

    def step(self, last_root: int) -> tuple[Tensor, Tensor]:
        """Run a step; return ``gained`` [B, 256] and ``status`` [3, B] as
        :func:`msn_ext.ops.advance_text` gives them, until the next one.

        Args:
            last_root: the last slot that a root stands in, or a later one.
        """
        drafter, nodes, tails = self._drafter, 1, 0
        if drafter is not None:
            looked_at = drafter.look(self._lengths)
            expected = self._steps.draft(looked_at, drafter.growing_rows())
            nodes = drafter.budget or drafter.choose(expected)
            tails = 0 if drafter.tails is None else tails_of(nodes)
        self._forward.begin_step(last_root + nodes)
        self._steps.check(nodes, tails, torch.get_num_threads())
        if drafter is not None:
            drafter.count(self._accepted)
        return self._gained, self._status

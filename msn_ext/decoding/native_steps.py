"""Steps of the native engine as most calls take them, in two or three calls of C++: best-first
drafting or none, and verification by the largest logits or by what is drawn from them.

They do what :class:`.decoder.Decoder` else does an op at a time. A pass leaves nothing of Python or
torch in any cache, so that each of some fifty calls costs microseconds there, and all of them a
tenth of a small model's step.
"""

from __future__ import annotations

from collections.abc import Callable

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
    """Drafts, checks and commits, for a decoder whose next tokens are functions of a node's logits.

    Args:
        forward: of the model; its logits are float32.
        drafter: one that :func:`can_draft` knows.
        vocabulary: of the model.
        draw: gives the next tokens int64 [B, N] for logits float32 [B, N, V] at positions int64
            [B, N]; None: they are the largest logits'.
        texts: ``history`` and ``lengths``, ``remaining``, ``last_position``, ``ends``, as
            :func:`msn_ext.ops.place_tree` and :func:`msn_ext.ops.advance_text` take them, changed
            in place.
    """

    def __init__(
        self,
        forward: NativeForward,
        drafter: Drafter,
        vocabulary: int,
        draw: Callable[[Tensor, Tensor], Tensor] | None,
        **texts: Tensor,
    ) -> None:
        def room(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device="cpu")

        batch = len(texts["lengths"])
        self._forward, self._lengths = forward, texts["lengths"]
        self._drafter = drafter if isinstance(drafter, BestFirst) else None
        self._gained, self._status = room(batch, MAX_NODES), room(3, batch)
        self._accepted = room(batch)
        self._draw = draw
        self._logits, self._positions = torch.empty(0, device="cpu"), room(batch * MAX_NODES)
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
        if self._draw is None:
            self._steps.check(nodes, tails, torch.get_num_threads())
        else:
            self._check_drawn(nodes, tails, self._draw)
        if drafter is not None:
            drafter.count(self._accepted)
        return self._gained, self._status

    def _check_drawn(
        self, nodes: int, tails: int, draw: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Check a tree of so many nodes by what is drawn after each."""
        batch = len(self._lengths)
        count = batch * nodes * self._forward.vocabulary
        if len(self._logits) < count:  # kept, since new memory costs more than what is drawn
            self._logits = torch.empty(count, device="cpu")
        logits = self._logits[:count].view(batch, nodes, -1)
        positions = self._positions[: batch * nodes].view(batch, nodes)
        self._steps.look(nodes, tails, logits, positions, torch.get_num_threads())
        self._steps.accept(draw(logits, positions))

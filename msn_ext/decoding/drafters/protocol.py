"""The contract of a drafter: what it proposes, what it is shown (and in which precision logits are
compared), and what capturing asks of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from msn_ext import ops

from .tails import chained_parents, laid_out, with_tails
from .tree import TreeTensors


def as_compared(logits: Tensor) -> Tensor:
    """Return logits in the float32 in which transformers compares them; what is narrower compares
    the same.
    """
    return logits.float() if logits.dtype == torch.float64 else logits


@dataclass
class Draft:
    """Guesses for the next tokens, laid out as a tree; all on the model's device. Made by
    :meth:`of`.

    The decoder writes the last token of the text into ``tokens[:, 0]``, in place. A drafter may
    propose the same draft again, with other tokens in the same tensor.

    Attributes:
        tokens: int64 [B, N], at most 256 nodes, all in the vocabulary, padding too; node 0 stands
            for the last token of the text, whatever it holds.
        parents: int32 [N] or [B, N]; -1 at the root and at padding, which is never accepted.
        ancestors: int64 [N, W] or [B, N, W], and
        depth: int32 [N] or [B, N], as :func:`msn_ext.ops.tree_ancestors` gives them for
            ``parents``.
        tails: the last so many nodes of every row are noise, which a model with a gated noise
            adapter computes with it, and other models as they are. They have the ancestors and
            depths of chains below other nodes, but -1 as parents: they are never accepted.
    """

    tokens: Tensor
    parents: Tensor
    ancestors: Tensor
    depth: Tensor
    tails: int = 0

    @classmethod
    def of(cls, tokens: Tensor, parents: Tensor) -> Draft:
        """Make a draft from its tokens and parents."""
        parents = parents.contiguous()  # once, and not in each op that reads them
        return cls(tokens, parents, *ops.tree_ancestors(parents, validate=False))

    @classmethod
    def shaped(cls, tokens: Tensor, shape: TreeTensors) -> Draft:
        """Make a draft on a tree whose tensors are there already."""
        return cls(tokens, shape.parents, shape.ancestors, shape.depth)

    @classmethod
    def with_tails(
        cls, tokens: Tensor, parents: Tensor, ends: Tensor, length: int, token: int | Tensor
    ) -> Draft:
        """Make a draft of N nodes, and after them K chains of noise, each below one of them; on the
        device, which nothing waits for.

        Args:
            tokens, parents: of the nodes, int64 [B, N] and int32 [N] or [B, N].
            ends: int64 [B, K], the node above each chain; -1: none, its rows are padding.
            length: rows of a chain, >= 1.
            token: noise, one of the vocabulary; or int64, what broadcasts to [B, K * length].

        Raises:
            ValueError: these are more than 256 nodes.
        """
        more = len(tokens), ends.shape[1] * length
        noise = torch.as_tensor(token, dtype=tokens.dtype, device=tokens.device).expand(more)
        tree = with_tails(parents, ends, length)
        return cls(torch.cat([tokens, noise], 1), *tree, tails=more[1])

    def grown(self, tokens: Tensor, parents: Tensor) -> Draft:
        """Return a draft of more nodes, of which the first are this one's, and its tails after
        them.

        Args:
            tokens, parents: of the nodes without tails, int64 [B, N] and int32 [B, N].
        """
        if not self.tails:
            return Draft.of(tokens, parents)
        before = len(self) - self.tails
        above = chained_parents(self.parents, self.ancestors, self.tails)[..., before:]
        above = above.expand(len(tokens), -1)
        above = torch.where(above < before, above, above + parents.shape[1] - before)
        tree = laid_out(
            torch.cat([parents, above], 1), torch.cat([parents, torch.full_like(above, -1)], 1)
        )
        return Draft(torch.cat([tokens, self.tokens[:, before:]], 1), *tree, tails=self.tails)

    def __len__(self) -> int:
        return self.tokens.shape[1]


@dataclass
class Verified:
    """A draft and the model's answer to it, of one forward pass; all on the model's device.

    Attributes:
        draft: the guesses.
        read_logits: gives ``logits``; only while it is observed, since a pass may compute them when
            they are read.
        targets: int64 [B, N], the token the model itself puts after each node.
        path, accept_length, continuation: as :func:`msn_ext.ops.verify_tree` gives them.
        history, lengths: the text before the pass, as :class:`Drafter` has it.
        guesses: int32 [B, N, 8], as :func:`msn_ext.ops.top_guesses` gives them of ``logits``; None
            where verifying did not need them (:meth:`top_guesses`).
    """

    draft: Draft
    read_logits: Callable[[], Tensor]
    targets: Tensor
    path: Tensor
    accept_length: Tensor
    continuation: Tensor
    history: Tensor
    lengths: Tensor
    guesses: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """[B, N, V], of the token after every node."""
        return self.read_logits()

    def top_guesses(self) -> Tensor:
        """Return ``guesses``, computed now where they are None."""
        if self.guesses is None:
            return ops.top_guesses(as_compared(self.logits))
        return self.guesses


@runtime_checkable
class Drafter(Protocol):
    """A source of guesses. It can be wrong, never harmful: it only decides where the model looks.

    ``history[b, :lengths[b]]`` is the text of row b so far, prompt included, without padding; what
    comes after it is rubbish. Both grow in place: what is to be kept must be copied.
    docs/drafters.md has an example.

    Attributes:
        max_depth: bound on the depth of any node it proposes.
    """

    max_depth: int

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        """Begin a new call of ``generate`` with ``batch`` rows."""

    def first(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Return the guesses after the prompt in the first pass, a chain: int64 [B, n], n >= 0."""

    def propose(self, history: Tensor, lengths: Tensor) -> Draft:
        """Return the tree of a later pass."""

    def observe(self, verified: Verified) -> None:
        """Learn from a pass. Now and then it checked the root alone, although more was proposed."""


class Noise(Protocol):
    """What a gated noise adapter was trained for.

    Attributes:
        length: noise tokens in a row.
        content: a token, or the name of what they were drawn from (:class:`msn_ext.NoisyCollator`).
    """

    length: int
    content: str | int


@runtime_checkable
class NoiseDrafter(Protocol):
    """A drafter whose drafts may have tails of noise rows."""

    def use_noise(self, noise: Noise | None) -> None:
        """Draft for a model with a gated adapter from the next start on; None: without one."""


@runtime_checkable
class CapturableDrafter(Drafter, Protocol):
    """A drafter whose steps may be captured and replayed (:mod:`msn_ext.decoding.runner`).

    Its ``propose`` and ``observe`` do not ask the device anything, keep their state in place, and
    ``propose`` gives as many nodes as ``plan`` said. A class says so itself: one that inherits
    these methods from another is not captured, since its own ``observe`` may do what it likes.

    Attributes:
        report: what ``observe_step`` wants to know of a proposal, on the device; None: nothing.
        allocations: how often its state was laid out anew, at other places of memory.
    """

    @property
    def report(self) -> Tensor | None: ...

    allocations: int

    def plan(self) -> int:
        """Return the number of nodes of the next tree."""

    def observe_step(
        self, report: Tensor | None, nodes: int, gained: list[int], seconds: float
    ) -> None:
        """Learn from a step, which the host hears of one step late.

        Args:
            report: of its proposal, on the host.
            nodes: of its tree.
            gained: tokens per row.
            seconds: that it took.
        """

    def forget(self) -> None:
        """Forget the tokens that are remembered from call to call."""


class ObservedDrafter:
    """Drafts as another drafter does; a subclass looks on in its own ``observe``.

    Args:
        drafter: the one that drafts; a subclass reads its public attributes only.
    """

    def __init__(self, drafter: Drafter):
        self.drafter, self.max_depth = drafter, drafter.max_depth

    def use_noise(self, noise: Noise | None) -> None:
        if isinstance(self.drafter, NoiseDrafter):
            self.drafter.use_noise(noise)
            self.max_depth = self.drafter.max_depth

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        self.drafter.start(batch, vocabulary, device)

    def first(self, history: Tensor, lengths: Tensor) -> Tensor:
        return self.drafter.first(history, lengths)

    def propose(self, history: Tensor, lengths: Tensor) -> Draft:
        return self.drafter.propose(history, lengths)

    def observe(self, verified: Verified) -> None:
        self.drafter.observe(verified)

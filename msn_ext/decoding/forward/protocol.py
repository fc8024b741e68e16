"""What the decoder asks of a forward pass, which there are three of: the model's own
(:mod:`.transformers`), one over packed weights (:mod:`.native`), and one that fuses what stands
between a GPU's products (:mod:`.fused`).

Shapes: B rows of the batch, P slots of the padded prompts, N nodes, W words of ancestor bits, V the
vocabulary. Slots and positions are those of :class:`msn_ext.decoding.request.Request`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

from msn_ext.ops.tree import VerifiedLogits

from ..past import KeysValues


class Answers:
    """What a model says to the nodes of trees.

    Args:
        logits: [B, N, V], or what computes them if somebody reads them before the next pass.
        verified: what :func:`msn_ext.ops.verify_logits` gives; None where the pass has not found it
            by the way, or was not asked.
    """

    def __init__(
        self, logits: Tensor | Callable[[], Tensor], verified: VerifiedLogits | None = None
    ):
        self._logits, self.verified = logits, verified

    @property
    def logits(self) -> Tensor:
        if not isinstance(self._logits, Tensor):
            self._logits = self._logits()
        return self._logits


class ForwardPass(Protocol):
    """Computes prompts and trees of a batch, and keeps their keys and values."""

    def clear(self) -> None:
        """Forget what is cached, for other prompts."""

    def load(self, keys_values: Iterable[KeysValues], slots: int, offsets: Tensor) -> None:
        """Take over by layer what an earlier pass cached in the first slots, or in the last of
        them (windows).

        Raises:
            ValueError: it is another model's; says why. Or the next pass says so.
        """

    def cached(self, slots: int) -> Iterable[KeysValues]:
        """Return by layer what is cached in the first slots."""
        ...

    def read(
        self, ids: Tensor, positions: Tensor, offsets: Tensor, keep: int, start: int = 0
    ) -> Tensor:
        """Compute whole texts from slot ``start`` on; what is before is cached.

        Args:
            ids, positions: int64 [B, P].
            offsets: int64 [B], slots of padding before each text.
            keep: at most P - ``start``.

        Returns:
            Logits [B, keep, V] of the last ``keep`` slots.
        """
        ...

    def check(
        self,
        tokens: Tensor,
        positions: Tensor,
        prefix: Tensor,
        offsets: Tensor,
        ancestors: Tensor,
        end: int,
        tails: int = 0,
        parents: Tensor | None = None,
    ) -> Answers:
        """Compute trees after what is cached.

        Args:
            tokens, positions: int64 [B, N].
            prefix: int64 [B], slots before the roots.
            ancestors: int64 [N, W] or [B, N, W].
            end: bounds ``prefix + N``; the host knows it without asking the device.
            tails: the last so many nodes of every row are noise: they are computed with the gated
                adapter that the pass was made with, if with one; all others never are.
            parents: int32 [N] or [B, N], of what is verified greedily; None: it is not.
        """
        ...

    def commit(self, prefix: Tensor, path: Tensor, accepted: Tensor) -> None:
        """Keep the accepted path of the trees (see :func:`msn_ext.ops.commit_kv`)."""

    def make_room(self, slots: int, most: int) -> bool:
        """Make the room for ``slots`` slots a row where it is fixed; return whether what is cached
        moved.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        ...

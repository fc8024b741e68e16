"""The native forward pass: a packed plan, and the cache of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from msn_ext import _C

from .packed import PackedPlan

CHUNK = 96
"""Tokens of a text that are computed at once: enough to be limited by arithmetic, few enough to stay
in cache."""


class NativeForward:
    """Runs a packed plan over the rows of a batch, each with its own cached prefix.

    Rows have no padding here: slot = position. What a row gets does not depend, bit for bit, on how
    many rows, nodes or threads it is computed with.
    """

    def __init__(self, packed: PackedPlan, batch: int):
        self.packed = packed
        attention = packed.plan.layers[0].attention
        self._heads, self._size = attention.kv_heads, attention.head_size
        self._batch, self._slots = batch, 0
        self._keys = self._values = torch.empty(0)
        self._pass = packed.forward_pass()
        self._positions = 0

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def _reserve(self, slots: int) -> None:
        """Make room for so many slots a row, and tables for as many positions."""
        if slots > self._positions:
            for which, (cosines, sines) in enumerate(self.packed.tables(slots)):
                self._pass.set_rotary(which, cosines, sines)
            self._positions = max(slots, self.packed.rotary_positions)
        if slots <= self._slots:
            return
        width, old = _C.CACHE_WIDTH, self._slots
        self._slots = max(256, -(-max(slots, old * 3 // 2) // width) * width)
        rows = len(self.packed.plan.layers), self._batch, self._heads
        panels = -(-self._size // width)
        dtype = self.packed.cache_dtype
        keys = torch.empty(*rows, self._slots * self._size, dtype=dtype)
        values = torch.empty(*rows, panels * self._slots * width, dtype=dtype)
        if old:
            keys[..., : old * self._size] = self._keys
            of_panels = values.unflatten(-1, (panels, self._slots * width))
            of_panels[..., : old * width] = self._values.unflatten(-1, (panels, old * width))
        self._keys, self._values = keys, values
        self._pass.set_cache(keys, values, self._batch, self._slots)

    def read(self, ids: Tensor, positions: Tensor, offsets: Tensor, keep: int) -> Tensor:
        """Read texts from their beginning.

        Args:
            ids, positions: int64 [B, slots], the first ``offsets[b]`` of row b padding.
            keep: how many of the last tokens to give logits for.

        Returns:
            Logits [B, keep, V], float32 or float64.
        """
        batch, slots = ids.shape
        self._reserve(slots)
        logits = torch.empty(batch, keep, self.packed.head.outputs, dtype=self.packed.dtype)
        for b, offset in enumerate(offsets.tolist()):
            tokens, at = ids[b, offset:].contiguous(), positions[b, offset:].contiguous()
            count = len(tokens)
            parts = -(-count // CHUNK)
            for part in range(parts):
                begin, end = count * part // parts, count * (part + 1) // parts
                kept = max(0, end - max(begin, count - keep))
                done = keep - (count - end) - kept
                self._pass.read(
                    b,
                    tokens[begin:end],
                    at[begin:end],
                    begin,
                    kept,
                    logits[b, done : done + kept] if kept else logits[b, :0],
                    torch.get_num_threads(),
                )
        return logits

    def check(self, tokens: Tensor, positions: Tensor, prefix: Tensor, ancestors: Tensor) -> Tensor:
        """Compute trees.

        Args:
            tokens, positions: int64 [B, N].
            prefix: int64 [B], tokens before the root.
            ancestors: int64 [N, W] or [B, N, W].

        Returns:
            Logits [B, N, V], float32 or float64.
        """
        batch, nodes = tokens.shape
        self._reserve(int(prefix.max()) + nodes)
        logits = torch.empty(batch, nodes, self.packed.head.outputs, dtype=self.packed.dtype)
        self._pass.step(
            tokens, positions, ancestors, prefix, logits, torch.get_num_threads()
        )
        return logits

    def commit(self, prefix: Tensor, path: Tensor, accepted: Tensor) -> None:
        """Keep the accepted path behind the prefix (see :func:`msn_ext.ops.commit_kv`)."""
        self._pass.commit(prefix, path, accepted)

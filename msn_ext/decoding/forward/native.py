"""The native forward pass: a packed plan, and the cache of a batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from msn_ext import _C
from msn_ext.ops.tree import new_verified_logits

from ..past import KeysValues
from .adapter import NoiseAdapter
from .packed import PackedPlan
from .packed_adapter import packed_adapter
from .protocol import Answers

CHUNK = 96
"""Tokens of a text that are computed at once: enough to be limited by arithmetic, few enough to
stay in cache.
"""


class NativeForward:
    """Runs a packed plan over the rows of a batch, each with its own cached prefix.

    Rows have no padding in the cache: slot = position. What a row gets does not depend, bit for
    bit, on how many rows, nodes or threads it is computed with.

    Args:
        packed: the model's.
        batch: rows.
        noise: the model's gated adapter; None: it has none.

    Attributes:
        bound: the packed plan with this cache.
    """

    def __init__(self, packed: PackedPlan, batch: int, noise: NoiseAdapter | None = None):
        self._packed, self.vocabulary = packed, packed.head.outputs
        attention = packed.plan.layers[0].attention
        self._heads, self._size = attention.kv_heads, attention.head_size
        # Two numbers of a key lie side by side in bfloat16; and two slots of a value.
        self._pair = 2 if packed.cache_dtype == torch.bfloat16 else 1
        # For transformers, as its own cache has them: int8 weights' is bfloat16, which goes back
        # unchanged.
        exact = torch.promote_types(packed.cache_dtype, packed.plan.embedding.dtype)
        is_exact = exact == packed.plan.embedding.dtype
        self._dtype = exact if is_exact else packed.cache_dtype
        self._batch, self._slots = batch, 0
        self._keys = self._values = torch.empty(0, device="cpu")
        self.bound = packed.forward_pass()
        if noise is not None:
            self.bound.set_adapter(packed_adapter(packed, noise))
        self._positions, self._passes, self._reads_logits = 0, 0, False
        self._offsets, self._padded = torch.zeros(batch, dtype=torch.int64, device="cpu"), False

    @property
    def verifies(self) -> bool:
        """Whether a pass may verify greedily: its logits are float32."""
        return self._packed.dtype == torch.float32

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def _reserve(self, slots: int) -> None:
        """Make room for so many slots a row, and tables for as many positions."""
        if slots > self._positions:
            for which, (cosines, sines) in enumerate(self._packed.tables(slots)):
                self.bound.set_rotary(which, cosines, sines)
            self._positions = max(slots, self._packed.rotary_positions)
        if slots <= self._slots:
            return
        width, old = _C.CACHE_WIDTH, self._slots
        self._slots = max(256, -(-max(slots, old * 3 // 2) // width) * width)
        rows = len(self._packed.plan.layers), self._batch, self._heads
        panels = -(-self._size // width)
        dtype = self._packed.cache_dtype
        size = -(-self._size // self._pair) * self._pair
        keys = torch.empty(*rows, self._slots * size, dtype=dtype, device="cpu")
        values = torch.empty(*rows, panels * self._slots * width, dtype=dtype, device="cpu")
        if old:
            keys[..., : old * size] = self._keys
            of_panels = values.unflatten(-1, (panels, self._slots * width))
            of_panels[..., : old * width] = self._values.unflatten(-1, (panels, old * width))
        self._keys, self._values = keys, values
        self.bound.set_cache(keys, values, self._batch, self._slots)

    def _logits(self, batch: int, rows: int) -> Tensor:
        shape = batch, rows, self.vocabulary
        return torch.empty(shape, dtype=self._packed.dtype, device="cpu")

    def clear(self) -> None:
        pass  # what is cached is overwritten before it is read

    def make_room(self, slots: int, most: int) -> bool:
        raise NotImplementedError("steps on a CPU are not captured, so that no room is fixed")

    def load(self, keys_values: Iterable[KeysValues], slots: int, offsets: Tensor) -> None:
        self._reserve(slots)
        expected = self._heads, self._size, {self._packed.cache_dtype, self._dtype}
        whole = -(-slots // _C.CACHE_WIDTH) * _C.CACHE_WIDTH
        for number, layer in enumerate(keys_values):
            _, heads, count, size = layer[0].shape
            if (heads, size) != expected[:2] or layer[0].dtype not in expected[2]:
                raise ValueError(
                    f"past_key_values has {heads} heads of {size} {layer[0].dtype}; expected"
                    f" {self._heads} heads of {self._size} {self._dtype}, as the model's"
                )
            for b, offset in enumerate(offsets.tolist()):
                if offset >= slots:
                    continue  # nothing but padding
                for to, of in zip(self._stored(number, b), layer):
                    text = to.new_zeros(heads, whole, to.shape[-2] * to.shape[-1])
                    first = max(slots - count, offset)
                    text[:, first - offset : slots - offset, :size] = of[b, :, first - slots :]
                    to[:, : whole // to.shape[2]] = text.unflatten(-1, to.shape[-2:]).unflatten(
                        1, (-1, to.shape[2])
                    )

    def cached(self, slots: int) -> Iterable[KeysValues]:
        for number in range(len(self._packed.plan.layers)):
            shape = self._batch, self._heads, slots, self._size
            layer = torch.zeros(2, *shape, dtype=self._dtype, device="cpu")
            for b, offset in enumerate(self._offsets.tolist()):
                for to, of in zip(layer, self._stored(number, b)):
                    text = of.flatten(3, 4).flatten(1, 2)
                    to[b, :, offset:] = text[:, : slots - offset, : self._size]
            yield layer[0], layer[1]

    def _stored(self, layer: int, b: int) -> KeysValues:
        """Return keys and values of a row as the kernels store them, seen as [heads, slots / n, n,
        numbers of a head / m, m], of which n and m are the storage's business.
        """
        width, pair = _C.CACHE_WIDTH, self._pair
        keys = self._keys[layer, b].unflatten(-1, (self._slots // width, -1, width, pair))
        values = self._values[layer, b].unflatten(-1, (-1, self._slots // pair, width, pair))
        return keys.permute(0, 1, 3, 2, 4), values.permute(0, 2, 4, 1, 3)

    def read(
        self, ids: Tensor, positions: Tensor, offsets: Tensor, keep: int, start: int = 0
    ) -> Tensor:
        batch, slots = ids.shape
        self._reserve(slots)
        self._passes += 1
        self._offsets, self._padded = offsets, bool((offsets > 0).any())
        logits = self._logits(batch, keep)
        for b, offset in enumerate(offsets.tolist()):
            first = max(offset, start)
            tokens, at = ids[b, first:].contiguous(), positions[b, first:].contiguous()
            count = len(tokens)
            parts = -(-count // CHUNK)
            for part in range(parts):
                begin, end = count * part // parts, count * (part + 1) // parts
                kept = max(0, end - max(begin, count - keep))
                done = keep - (count - end) - kept
                self.bound.read(
                    b,
                    tokens[begin:end],
                    at[begin:end],
                    first - offset + begin,
                    kept,
                    logits[b, done : done + kept] if kept else logits[b, :0],
                    torch.get_num_threads(),
                )
        return logits

    def begin_step(self, end: int) -> None:
        """Make room for trees that end at slot ``end``."""
        self._reserve(end)
        self._passes += 1

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
        self.begin_step(end)
        verified = shaped = logits = None
        if parents is not None and self.verifies:
            verified = new_verified_logits(tokens)
            shaped = parents.contiguous(), *verified
        if not verified or self._reads_logits or self._packed.screen is None:
            logits = self._logits(*tokens.shape)
        before = prefix - offsets if self._padded else prefix
        self.bound.step(
            tokens.contiguous(),
            positions.contiguous(),
            ancestors.contiguous(),
            before.contiguous(),
            logits,
            shaped,
            tails,
            torch.get_num_threads(),
        )
        self._reads_logits, now = False, self._passes
        return Answers(lambda: self._late(logits, tokens, now), verified)

    def _late(self, logits: Tensor | None, tokens: Tensor, number: int) -> Tensor:
        """Return the logits of the last trees, which were pass ``number``. Who wants them once will
        want them again: the next pass computes them at once.
        """
        self._reads_logits = True
        if logits is None:
            if number != self._passes:
                raise RuntimeError(
                    "logits of an earlier pass, which nobody had read then, are gone; read"
                    " Verified.logits in observe()"
                )
            logits = self._logits(*tokens.shape)
            self.bound.logits(logits, torch.get_num_threads())
        return logits

    def commit(self, prefix: Tensor, path: Tensor, accepted: Tensor) -> None:
        before = prefix - self._offsets if self._padded else prefix
        self.bound.commit(before, path, accepted)

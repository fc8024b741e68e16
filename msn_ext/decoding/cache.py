"""The key/value cache of tree decoding: full storage, written at the slots of each row."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from msn_ext import ops


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, heads, capacity, size] each (latents for MLA models)."""

    # Windows are the mask's business: a window may reach back past rejected nodes.
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: TreeCache):
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def load(self, keys: Tensor, values: Tensor, slots: int) -> None:
        """Take over the keys and values before slot ``slots``, or the last of them."""
        if self.is_initialized:
            _check(keys, self.keys)
        else:
            self.lazy_initialization(keys, values)
        for to, of in ((self.keys, keys), (self.values, values)):
            to[:, :, slots - of.shape[2] : slots] = of

    def _empty(self, like: Tensor) -> Tensor:
        batch, heads, _, size = like.shape
        # Zeros: a dense mask gives unused slots weight 0, but 0 x NaN would still be NaN.
        return like.new_zeros(batch, heads, self._cache.capacity, size)

    def grow(self) -> None:
        if not self.is_initialized:
            return
        old = self.keys, self.values
        self.keys, self.values = (self._empty(x) for x in old)
        for new, kept in zip((self.keys, self.values), old):
            new[:, :, : kept.shape[2]] = kept

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        _check(self.keys, key_states)
        at = self._cache.write_index
        self.keys.transpose(1, 2)[at] = key_states.transpose(1, 2)
        self.values.transpose(1, 2)[at] = value_states.transpose(1, 2)
        end = self._cache.end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self._cache.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.end, 0

    def get_max_length(self) -> int:
        return -1


def _check(came: Tensor, expected: Tensor) -> None:
    """Refuse keys of ``past_key_values`` that are not of the model's kind."""
    kinds = [(x.shape[1], x.shape[3], x.dtype) for x in (came, expected)]
    if kinds[0] != kinds[1]:
        came_, expected_ = ("{} heads of {} {}".format(*kind) for kind in kinds)
        raise ValueError(f"past_key_values has {came_}; expected {expected_}, as the model's")


class TreeCache(Cache):
    """A cache whose rows grow at their own pace.

    Row b holds left padding in slots [0, offsets[b]), then the accepted prefix, then the nodes of
    the tree that is being checked; :meth:`commit` moves the accepted ones up. Storage grows by half
    when it is full.

    Args:
        config: the model's text config, for the number of layers.
        fixed: slots that are there from the beginning, and are attended to whole; None: as many as
            are needed.
    """

    def __init__(self, config, fixed: int | None = None):
        self.capacity = self._fixed = fixed or 0
        self.start = self.end = 0
        self.write_index: tuple = ()
        self._layers = [TreeLayer(self) for _ in DynamicCache(config=config).layers]
        super().__init__(layers=[*self._layers])

    def _reserve(self, slots: int) -> None:
        if slots > self.capacity:
            self.capacity = max(slots, self.capacity * 3 // 2)
            for layer in self._layers:
                layer.grow()

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._stored())

    def _stored(self) -> list[Tensor]:
        """Return keys and values of the layers that were written, in turn."""
        return [
            x for layer in self._layers if layer.is_initialized for x in (layer.keys, layer.values)
        ]

    def fit(self, slots: int, most: int) -> bool:
        """Double the fixed slots, up to ``most``, where they are fewer than ``slots``; return
        whether everything moved.
        """
        if slots <= self._fixed:
            return False
        self._fixed = max(slots, min(2 * self._fixed, most))
        self._reserve(self._fixed)
        return True

    def clear(self) -> None:
        """Zero everything: NaN would come through a dense mask."""
        for x in self._stored():
            x.zero_()

    def load(self, keys_values: Iterable[tuple[Tensor, Tensor]], slots: int) -> None:
        """Take over by layer the keys and values of the first ``slots`` slots of every row, or the
        last of them.
        """
        self._reserve(slots)
        for layer, (keys, values) in zip(self._layers, keys_values):
            layer.load(keys, values, slots)

    def first(self, slots: int) -> list[tuple[Tensor, Tensor]]:
        """Return by layer the keys and values of the first slots of every row: views."""
        return [(layer.keys[:, :, :slots], layer.values[:, :, :slots]) for layer in self._layers]

    def at_start(self, count: int, start: int = 0) -> None:
        """Let the next forward pass write the slots from ``start`` to ``count`` of every row."""
        self._reserve(count)
        self.start, self.end = start, count
        self.write_index = (slice(None), slice(start, count))

    def reach(self, end: int) -> None:
        """Make room for slots up to ``end``; up to there the next tree attends, or to all of fixed
        slots.
        """
        self.end = self._fixed or end
        self._reserve(self.end)

    def at(self, lengths: Tensor, nodes: int, end: int) -> None:
        """Let the next forward pass write ``nodes`` tokens of row b from slot ``lengths[b]`` on.

        ``end`` bounds lengths + nodes: the host knows it without asking the device.
        """
        self.reach(end)
        self.start = self.end - nodes
        rows = torch.arange(lengths.shape[0], device=lengths.device)[:, None]
        self.write_index = (rows, lengths[:, None] + torch.arange(nodes, device=lengths.device))

    def commit(self, lengths: Tensor, path: Tensor, accept_length: Tensor) -> None:
        """Keep the accepted path (see :func:`msn_ext.ops.commit_kv`)."""
        ops.commit_kv(self._stored(), lengths, path, accept_length)

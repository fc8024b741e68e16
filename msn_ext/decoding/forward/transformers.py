"""The model's own forward pass: transformers computes it, attention to a tree is ours."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import KernelAttention, MaskAttention, TreeContext
from ..cache import TreeCache
from ..past import KeysValues
from .adapter import NoiseAdapter
from .protocol import Answers


class TransformersForward:
    """Calls the model with a cache that its rows write at their own slots.

    Args:
        attention: how the model attends to a tree.
        fixed: slots of the cache that are there from the beginning; None: as many as are needed.
        noise: the model's gated adapter; None: it has none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: KernelAttention | MaskAttention,
        fixed: int | None = None,
        noise: NoiseAdapter | None = None,
    ):
        # Captured steps stay as long as the model does, and no longer.
        self._model = weakref.ref(model)
        self._attention, self._noise = attention, noise
        self._cache = TreeCache(model.config.get_text_config(decoder=True), fixed=fixed)
        # GenerationMixin's, which PreTrainedModel does not declare.
        limits_logits = model._supports_logits_to_keep()  # type: ignore[operator]
        self._forwards_all_logits = not limits_logits

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "a decoder is used while its model is there"
        return model

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    def clear(self) -> None:
        self._cache.clear()

    def make_room(self, slots: int, most: int) -> bool:
        return self._cache.fit(slots, most)

    def load(self, keys_values: Iterable[KeysValues], slots: int, offsets: Tensor) -> None:
        self._cache.load(keys_values, slots)

    def cached(self, slots: int) -> Iterable[KeysValues]:
        return self._cache.first(slots)

    def read(
        self, ids: Tensor, positions: Tensor, offsets: Tensor, keep: int, start: int = 0
    ) -> Tensor:
        slots = ids.shape[1]
        self._cache.at_start(slots, start)
        padded = bool((offsets > 0).any())
        columns = torch.arange(slots, device=ids.device)
        mask = (columns >= offsets[:, None]).long() if padded else None
        return self._attention.over_text(
            lambda: self._logits(ids[:, start:], positions[:, start:], mask, keep)
        )

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
        nodes = tokens.shape[1]
        self._cache.at(prefix, nodes, end)
        context = TreeContext(prefix, offsets, ancestors)
        logits = self._attention.over_tree(
            context,
            self._cache.end,
            lambda mask: self._logits(tokens, positions, mask, nodes, tails),
        )
        return Answers(logits)

    def _logits(self, ids: Tensor, positions: Tensor, mask, keep: int, tails: int = 0) -> Tensor:
        limit = {} if self._forwards_all_logits else {"logits_to_keep": keep}
        with self._of_text_and_noise(ids, tails):
            return self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                **limit,
            ).logits[:, -keep:]

    def _of_text_and_noise(self, ids: Tensor, tails: int) -> contextlib.AbstractContextManager:
        """Keep the adapter to the tails of rows int64 [B, N], where there is one."""
        if self._noise is None:
            return contextlib.nullcontext()
        batch, nodes = ids.shape
        return self._noise.over(batch, nodes, tails)

    def commit(self, prefix: Tensor, path: Tensor, accepted: Tensor) -> None:
        self._cache.commit(prefix, path, accepted)

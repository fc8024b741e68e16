"""Attention to a tree: through our kernel where the model lets us, else by a mask."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from msn_ext import ops
from msn_ext.ops import tree_mask

IMPLEMENTATION = "msn_tree"


@dataclass
class TreeContext:
    """The tree that is being checked, for attention (shapes as in ``ops.tree_attention``).

    Attributes:
        windows: where layers note the sliding window that they ask for, by number; None: they do
            not.
    """

    lengths: Tensor
    offsets: Tensor
    ancestors: Tensor
    windows: dict[int, int] | None = None


_active = threading.local()


def _tree_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    """Attend to the active tree: ``attn_implementation="msn_tree"``, by transformers' attention
    interface.
    """
    tree: TreeContext | None = getattr(_active, "tree", None)
    if tree is None:
        raise RuntimeError(
            "this model is being decoded by msn_ext in another thread; wait for it or use a copy"
        )
    if tree.windows is not None:
        tree.windows[getattr(module, "layer_idx", len(tree.windows))] = sliding_window or 0
    # Cast as around SDPA.
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        query, key, value = (
            x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value)
        )
    out = ops.tree_attention(
        query,
        key,
        value,
        tree.lengths,
        tree.ancestors,
        offsets=tree.offsets,
        scale=scaling,
        window=sliding_window or 0,
        # Older transformers run Gemma 2 through sdpa, which leaves the soft cap out; then so do we.
        softcap=0.0 if _active.replaced == "sdpa" else softcap or 0.0,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, _tree_attention_forward)

_locks: weakref.WeakKeyDictionary[PreTrainedModel, threading.Lock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def _lock_of(model: PreTrainedModel) -> threading.Lock:
    with _locks_guard:
        return _locks.setdefault(model, threading.Lock())


class KernelAttention:
    """Our kernel inside the model, for one forward pass at a time.

    The implementation is switched on the model's configs only while a tree is being checked, under
    a lock per model: prompts run through the implementation the user chose, and two threads that
    generate with one model take turns.
    """

    def __init__(self, model: PreTrainedModel):
        self._lock = _lock_of(model)
        submodels = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        self._configs = list({id(m.config): m.config for m in submodels}.values())
        self._text_config = model.config.get_text_config(decoder=True)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        return type(model)._can_set_attn_implementation()

    def over_text(self) -> contextlib.AbstractContextManager:
        """Within: the model attends as the user set it up."""
        return self._lock

    @contextlib.contextmanager
    def over_tree(self, tree: TreeContext, end: int) -> Iterator[None]:
        """Within: the model attends to ``tree``; yields the mask to call it with (none)."""
        with self._lock:
            # The internal attribute, as set_attn_implementation does: the property also sets
            # sub-configs.
            before = [config._attn_implementation_internal for config in self._configs]
            _active.tree, _active.replaced = tree, self._text_config._attn_implementation
            try:
                for config in self._configs:
                    config._attn_implementation_internal = IMPLEMENTATION
                yield None
            finally:
                for config, implementation in zip(self._configs, before):
                    config._attn_implementation_internal = implementation
                _active.tree = None


class MaskAttention:
    """The model's own attention with a dense mask: [B, 1, N, slots], one per kind of layer."""

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config(decoder=True)
        implementation = config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"{config.model_type} needs a dense mask for tree attention, which"
                f" attn_implementation={implementation!r} cannot take; load it with"
                " attn_implementation='eager' or 'sdpa'"
            )
        self._additive = implementation == "eager"
        self._dtype = model.dtype
        self._window = getattr(config, "sliding_window", None) or 0
        layer_types = getattr(config, "layer_types", None)
        self._layer_types = sorted(set(layer_types)) if layer_types else None

    def _mask(self, tree: TreeContext, end: int, window: int) -> Tensor:
        mask = tree_mask(tree.lengths, tree.ancestors, end, offsets=tree.offsets, window=window)
        if self._additive:
            mask = torch.zeros(mask.shape, dtype=self._dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(self._dtype).min
            )
        return mask

    def over_text(self) -> contextlib.AbstractContextManager:
        """Within: the same; this one changes nothing of the model."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def over_tree(self, tree: TreeContext, end: int) -> Iterator[Tensor | dict[str, Tensor]]:
        """Within: the mask that it yields is for ``tree``, over the first ``end`` cache slots."""
        if self._layer_types is None:
            yield self._mask(tree, end, self._window)
        else:
            windows = {"full_attention": 0, "sliding_attention": self._window}
            yield {kind: self._mask(tree, end, windows[kind]) for kind in self._layer_types}

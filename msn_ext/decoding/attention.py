"""Attention to a tree: through our kernel where the model lets us, else by a mask."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from msn_ext import ops
from msn_ext.ops import tree_mask

from .forward.modules import Modules

IMPLEMENTATION = "msn_tree"

Result = TypeVar("Result")


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


class _Check(NamedTuple):
    """A tree that a thread is checking, the configs that its model attends by, and the text's
    implementation otherwise.
    """

    tree: TreeContext
    configs: tuple[PretrainedConfig, ...]
    replaced: str | None


_active = threading.local()  # its `check`, if any, is the one that this thread is in


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
    check: _Check | None = getattr(_active, "check", None)
    if check is None:
        raise RuntimeError(
            f"attn_implementation is {IMPLEMENTATION!r}, which msn_ext.generate uses by itself;"
            " expected another one, such as 'sdpa'"
        )
    tree = check.tree
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
        softcap=0.0 if check.replaced == "sdpa" else softcap or 0.0,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, _tree_attention_forward)


def _answer_by_thread(config_class: type[PretrainedConfig]) -> None:
    """Let configs of a class say to a thread that checks a tree by them, and to no other, that the
    implementation is ours. Nothing is written to a config, so copies and saved ones are as ever.
    """
    owner = next(c for c in config_class.__mro__ if "_attn_implementation" in vars(c))
    chosen = vars(owner)["_attn_implementation"]
    if getattr(chosen.fget, "by_thread", False):
        return

    # torch.compile traces this for models of others, too: it guards a plain threading.local.
    def implementation(self):
        check = getattr(_active, "check", None)
        if check is not None and any(config is self for config in check.configs):
            return IMPLEMENTATION
        return chosen.fget(self)

    implementation.by_thread = True  # type: ignore[attr-defined]
    answers = property(implementation, chosen.fset, chosen.fdel, chosen.__doc__)
    owner._attn_implementation = answers  # type: ignore[attr-defined]


_locks: weakref.WeakKeyDictionary[PreTrainedModel, threading.RLock] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


class KernelAttention:
    """Our kernel inside the model, for one forward pass at a time.

    While a thread checks a tree, the model's configs name our implementation to that thread, and
    to others the one that the user chose, which reads the prompts, too. So others may call the
    model meanwhile. Threads that generate with one model take turns, a pass each.
    """

    def __init__(self, model: PreTrainedModel, modules: Modules | None = None):
        modules = modules or Modules(model)
        submodels = [m for m in modules.all if isinstance(m, PreTrainedModel)]
        self._configs = tuple({id(m.config): m.config for m in submodels}.values())
        self._text_config = model.config.get_text_config(decoder=True)
        with _guard:
            self._lock = _locks.setdefault(model, threading.RLock())
            for config in self._configs:
                _answer_by_thread(type(config))

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        return type(model)._can_set_attn_implementation()

    def over_text(self, call: Callable[[], Result]) -> Result:
        """Return ``call()``, in which the model attends as the user set it up."""
        return self._attend(None, call)

    def over_tree(self, tree: TreeContext, end: int, call: Callable[[None], Result]) -> Result:
        """Return ``call(mask)``, in which the model attends to ``tree``, without a mask."""
        replaced = self._text_config._attn_implementation_internal
        return self._attend(_Check(tree, self._configs, replaced), lambda: call(None))

    def _attend(self, check: _Check | None, call: Callable[[], Result]) -> Result:
        with self._lock:
            before = getattr(_active, "check", None)  # not None in a hook of the model's
            # Nothing is called on the way in or out, so no interrupt leaves it set.
            try:
                _active.check = check
                return call()
            finally:
                _active.check = before


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

    def over_text(self, call: Callable[[], Result]) -> Result:
        """Return ``call()``; this one changes nothing of the model."""
        return call()

    def over_tree(
        self,
        tree: TreeContext,
        end: int,
        call: Callable[[Tensor | dict[str, Tensor]], Result],
    ) -> Result:
        """Return ``call(mask)``, the mask for ``tree`` over the first ``end`` cache slots."""
        if self._layer_types is None:
            return call(self._mask(tree, end, self._window))
        windows = {"full_attention": 0, "sliding_attention": self._window}
        return call({kind: self._mask(tree, end, windows[kind]) for kind in self._layer_types})

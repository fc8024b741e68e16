"""The models that can be decoded with a tree. What cannot be right is refused, with the reason."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from msn_ext.families import MASK_ONLY, TESTED, WINDOWED

from .attention import KernelAttention, MaskAttention, TreeContext
from .cache import TreeCache
from .drafters import DraftTree
from .forward.adapter import CannotGate, leaving_out
from .forward.modules import Modules


def _refuse(model: PreTrainedModel, reason: str) -> NoReturn:
    raise ValueError(
        f"{type(model).__name__} ({model.config.model_type}) cannot be decoded with a draft tree:"
        f" {reason}"
    )


def rope_types(config) -> set[str]:
    """Return the rotary embedding types of a config; empty without rotary embeddings."""
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = (
        [parameters]
        if "rope_type" in parameters
        else [p for p in parameters.values() if isinstance(p, dict)]
    )
    return {group.get("rope_type", "default") for group in groups}


def longrope_tokens(config) -> int:
    """Return how many tokens 'longrope' has its first factors for; 0: another kind of rope."""
    if "longrope" not in rope_types(config):
        return 0
    return (
        config.rope_parameters.get("original_max_position_embeddings")
        or config.max_position_embeddings
    )


def longrope_boundary(config, input_ids: Tensor, offsets: Tensor, max_new_tokens: int) -> int:
    """Return the slot where 'longrope' switches its factors for the whole batch; 0: not on the way.

    Raises:
        ValueError: it lies on the way of several rows.
    """
    if not (boundary := longrope_tokens(config)):
        return 0
    batch, prompt = input_ids.shape
    boundary += int(offsets.min())
    if not prompt - 1 < boundary < prompt + max_new_tokens:
        return 0
    if batch > 1:
        raise ValueError(
            f"rope_type='longrope' changes its factors at {boundary} tokens, in the middle of this"
            " batch, and rows that grow at their own pace would not switch together; generate row"
            " by row, or stop before"
        )
    return boundary


def looks_ahead(config) -> bool:
    """Return whether the tokens of a prompt attend to later ones, so that a guess after it would
    change them.
    """
    # Gemma 4's "vision" is of images alone.
    both_ways = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    return both_ways or not getattr(config, "is_causal", True)


def _window(config, layer: int) -> int:
    """Return the sliding window of a layer; 0: none."""
    if types := getattr(config, "layer_types", None):
        return (
            (getattr(config, "sliding_window", None) or 0)
            if types[layer] == "sliding_attention"
            else 0
        )
    return (
        getattr(config, "sliding_window", None)
        or getattr(config, "attention_chunk_size", None)
        or 0
    )


def _check_decoder(model) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        _refuse(model, "it is an encoder-decoder model")


def check_model(model: PreTrainedModel) -> None:
    """Refuse before transformers prepares anything for it, an encoder's pass, say.

    Raises:
        ValueError: the model has an encoder, or no weights in memory where its inputs go to.
    """
    _check_decoder(model)
    if isinstance(model, torch.nn.Module) and any(x.is_meta for x in islice(model.parameters(), 1)):
        check_in_memory(model, list(model.parameters()))


def check_in_memory(model: PreTrainedModel, weights: Sequence[Tensor]) -> None:
    """Refuse a model with weights that are not in memory."""
    with torch._C.DisableTorchFunctionSubclass():  # which packed weights would be asked by
        absent = sum(weight.is_meta for weight in weights)
    if absent:
        _refuse(
            model,
            f"{absent} of its {len(weights)} weights are not in memory (device meta): offloaded by"
            " accelerate, or never loaded; expected all, as without device_map or with more"
            " max_memory",
        )


def attention_for(
    model: PreTrainedModel, modules: Modules | None = None
) -> KernelAttention | MaskAttention:
    """Return the way to make ``model`` attend to a tree.

    Args:
        modules: of the model, where somebody has walked them.

    Raises:
        ValueError: the model cannot be decoded with a tree; says why.
    """
    family = model.config.get_text_config(decoder=True).model_type
    modules = modules or Modules(model)
    _check_kind(model)
    _check_adapter(modules)
    _check_layers(model)
    _check_state(modules)
    if family in MASK_ONLY:
        return MaskAttention(model)
    if not KernelAttention.supports(model):
        _refuse(
            model,
            "its attention ignores transformers' AttentionInterface and is not known to follow a"
            " dense mask",
        )
    attention = KernelAttention(model, modules)
    if family not in TESTED:
        if looks_ahead(model.config.get_text_config(decoder=True)):
            _refuse(
                model, "its prompts attend to later tokens; expected one of the tested families"
            )
        if model not in _probed:
            with torch.autocast(model.device.type, enabled=False), leaving_out(model):
                _probe(model, attention)
    return attention


def _check_kind(model: PreTrainedModel) -> None:
    """Refuse models that are no decoders whose nodes can be rolled back and have positions."""
    _check_decoder(model)
    # GenerationMixin's, which PreTrainedModel does not declare.
    dynamic_cache = model._supports_default_dynamic_cache()  # type: ignore[operator]
    if getattr(model, "_is_stateful", False) or not dynamic_cache:
        _refuse(model, "it has recurrent state, which cannot be rolled back past a rejected token")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        _refuse(model, "its forward takes no position_ids")


def _check_adapter(modules: Modules) -> None:
    """Refuse PEFT's adapters of the prompt, whose part is not in the model itself, and gated
    ones that cannot be kept from the text.
    """
    model = modules.model
    # While PEFT's own generate runs, its model prepares the inputs of the one within.
    prepare = vars(model).get("prepare_inputs_for_generation")
    adapter: Any = getattr(getattr(prepare, "__self__", None), "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        _refuse(
            model,
            f"its adapter ({kind}) puts virtual tokens before the text; call its own generate,"
            " without msn_ext, or train an adapter of weights (LoRA, …), which is followed",
        )
    try:
        _ = modules.noise_adapter
    except CannotGate as reason:
        _refuse(model, str(reason))
    hooks = (hook for module in modules.all for hook in module._forward_pre_hooks.values())
    if any(getattr(hook, "keywords", {}).get("alora_offsets") is not None for hook in hooks):
        _refuse(
            model,
            "its adapter (activated LoRA) counts from the end of every call where it begins, which"
            " guesses would shift; call its own generate, without msn_ext",
        )


def _check_layers(model: PreTrainedModel) -> None:
    """Refuse layers that a tree cannot be cached in, or that change what positions mean."""
    config = model.config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        _refuse(model, f"its cache has layers of other kinds than keys and values ({names})")
    known = {"full_attention", "sliding_attention"}
    if other := set(getattr(config, "layer_types", None) or ()) - known:
        _refuse(
            model,
            f"it has layers of {', '.join(sorted(other))}; expected full_attention or"
            " sliding_attention",
        )
    if config.model_type in TESTED - WINDOWED and DynamicSlidingWindowLayer in kinds:
        _refuse(
            model,
            f"sliding_window is {_window(config, 0)}, which cuts its cache, but it attends without"
            " one; expected None",
        )
    if "dynamic" in rope_types(config):
        _refuse(
            model, "rope_type='dynamic' changes the positions of the cached keys as the text grows"
        )


def _check_state(modules: Modules) -> None:
    """Refuse a model on several devices, or in a mode that keeps no cache."""
    model = modules.model
    with torch._C.DisableTorchFunctionSubclass():
        devices = set(map(str, {weight.device for weight in modules.parameters}))
    if len(devices) > 1:
        _refuse(
            model, f"its weights are spread over several devices ({', '.join(sorted(devices))})"
        )
    if any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for module in modules.all
    ):
        _refuse(
            model,
            "gradient checkpointing in training mode keeps no cache; call model.eval() before",
        )


_probed: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


@torch.no_grad()
def _probe(model: PreTrainedModel, attention: KernelAttention) -> None:
    """Compare a small tree with plain forward passes over its paths, once per model."""
    config = model.config.get_text_config(decoder=True)
    tree = DraftTree((-1, 0, 0, 1, 2, 2))
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(
        config.vocab_size, (1, 6 + len(tree)), generator=generator, device="cpu"
    ).to(model.device)
    prefix, nodes = tokens[:, :6], tokens[:, 6:]
    tensors = tree.tensors(model.device)
    lengths = torch.tensor([6], device=model.device)
    cache = TreeCache(config)
    cache.at_start(6)
    model(
        input_ids=prefix,
        position_ids=torch.arange(6, device=model.device)[None],
        past_key_values=cache,
        use_cache=True,
    )
    cache.at(lengths, len(tree), 6 + len(tree))
    windows: dict[int, int] = {}
    context = TreeContext(lengths, torch.zeros_like(lengths), tensors.ancestors, windows)
    over_tree = attention.over_tree(
        context,
        cache.end,
        lambda mask: model(
            input_ids=nodes,
            attention_mask=mask,
            position_ids=lengths[:, None] + tensors.depth,
            past_key_values=cache,
            use_cache=True,
        ),
    )
    found = over_tree.logits[0].float()
    for layer, window in sorted(windows.items()):
        if window != (wanted := _window(config, layer)):
            _refuse(
                model,
                f"layer {layer} attends with sliding_window={window}, and its configuration says"
                f" {wanted} (0: none)",
            )
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    for leaf in (3, 4, 5):
        path = [leaf]
        while path[0]:
            path.insert(0, tree.parents[path[0]])
        plain = (
            model(input_ids=torch.cat([prefix, nodes[:, path]], 1), use_cache=False)
            .logits[0, 6:]
            .float()
        )
        if not torch.allclose(
            found[path], plain, atol=tolerance * plain.abs().max().item(), rtol=0
        ):
            _refuse(model, "a trial tree did not give the logits of plain forward passes")
    _probed.add(model)

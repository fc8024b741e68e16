"""``past_key_values``: keys and values of a text's beginning, from an earlier call and for a later
one, as transformers' ``DynamicCache`` holds them.

A cache that comes out stores every layer whole, windows too: so it can be cropped, and both forward
passes and transformers' own ``generate`` go on from it. Its slots are those of the sequences, left
padding and the padding after rows that ended included, and the last token is not among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

KeysValues = tuple[Tensor, Tensor]
"""Of one layer, [B, heads, slots, size] each."""


def checked_past(past, layers: int, batch: int, prompt: int) -> int:
    """Return how many slots of a prompt need not be read: all that are cached but the last one.

    Args:
        past: what the user gave as ``past_key_values``.
        layers, batch, prompt: of the model and of ``input_ids``.

    Raises:
        ValueError: ``past`` is no such cache, or of another model, batch or text; says why.
    """
    if not isinstance(past, DynamicCache) or past.offloading:
        offloading = " that is offloaded" if getattr(past, "offloading", False) else ""
        raise ValueError(
            f"past_key_values is a {type(past).__name__}{offloading}; expected a DynamicCache"
        )
    slots = past.get_seq_length()
    if not slots:
        return 0
    if len(past.layers) != layers:
        raise ValueError(
            f"past_key_values has {len(past.layers)} layers; expected {layers}, the model's"
        )
    if slots > prompt:
        raise ValueError(
            f"past_key_values holds {slots} tokens; expected at most the {prompt} of input_ids,"
            " which is to be the whole text, what is cached included"
        )
    reused = min(slots, prompt - 1)
    for number, layer in enumerate(_layers(past)):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"past_key_values has a {type(layer).__name__}; expected a DynamicCache of keys and"
                " values"
            )
        if layer.get_seq_length() != slots:
            raise ValueError(
                f"past_key_values holds {layer.get_seq_length()} tokens in layer {number} and"
                f" {slots} in layer 0; expected as many in all"
            )
        if len(layer.keys) != batch:
            raise ValueError(
                f"past_key_values has {len(layer.keys)} rows; expected {batch}, as input_ids"
            )
        if slots - layer.keys.shape[2] > max(0, reused - getattr(layer, "sliding_window", 0) + 1):
            raise ValueError(
                f"past_key_values holds {slots} tokens of {prompt} and only the last"
                f" {layer.keys.shape[2]} in layer {number}, whose window would have to go back;"
                " expected fewer tokens than input_ids has"
            )
    return reused


def reused_of(past: DynamicCache, slots: int) -> Iterator[KeysValues]:
    """Yield by layer the keys and values up to slot ``slots``, of a window's only the last ones."""
    for layer in _layers(past):
        count = layer.keys.shape[2] - (layer.get_seq_length() - slots)
        yield layer.keys[:, :, :count], layer.values[:, :, :count]


def _layers(past: DynamicCache) -> list[Any]:
    return list(past.layers)


def fill(past: DynamicCache, keys_values: Iterable[KeysValues]) -> None:
    """Put copies of other keys and values, by layer, in the place of all that a cache holds."""
    fresh = DynamicCache()
    for number, (keys, values) in enumerate(keys_values):
        fresh.update(keys, values, number)
    past.layers = fresh.layers

"""Decoding as the evaluation of Spec-Bench asks for it (arXiv 2401.07851)."""

from __future__ import annotations

import torch
from torch import Tensor

from .generation import generate


def noise_forward(
    inputs, model, tokenizer, max_new_tokens, temperature=0.0, do_sample=False, **options
) -> tuple[Tensor, int, int, list[int]]:
    """Decode one prompt: the ``forward_func`` of Spec-Bench's ``run_eval``.

    Args:
        inputs: int64 [1, P], or what a tokenizer returns with ``return_tensors="pt"``.
        model: a decoder-only transformers model.
        tokenizer: not used; Spec-Bench gives it.
        max_new_tokens: >= 1.
        temperature: 0 decodes greedily, whatever ``do_sample`` says.
        do_sample: draw from the model's distribution, at that temperature.
        options: further ones of :func:`msn_ext.generate`, such as ``draft="paper"``.

    Returns:
        The tokens with the prompt, int64 [1, P + new]; how many are new; the forward passes, the
        prompt's included; and what each of them gained.

    Raises:
        ValueError: more than one prompt, or what :func:`msn_ext.generate` refuses.
    """
    ids = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"inputs has shape {list(ids.shape)}; expected one prompt, [1, length]")
    if do_sample and temperature > 0:
        options |= dict(do_sample=True, temperature=temperature)
    else:
        options |= dict(do_sample=False)
    out = generate(
        model,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **options,
    )
    gained = out.accept_lengths[0].tolist()
    return out.sequences, sum(gained), len(gained), gained

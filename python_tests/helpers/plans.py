"""Tiny models that plans are read from: every family with a reader, and variants of them.

transformers computes norms, soft-max and rotary tables in float32 whatever the model's dtype;
within ``InFloat64`` it computes them in float64.
"""

import torch
from torch.overrides import TorchFunctionMode

from helpers.families import FAMILIES, tiny_model
from msn_ext import _C
from msn_ext.decoding.forward.families import READERS

ROPE = dict(rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **ROPE)
WHOLE = dict(rope_type="linear", rope_theta=1e6, factor=8.0)
# name -> (a tiny model, settings) that matter to plans alone
VARIANTS = {
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-linear": ("llama", dict(rope_parameters=dict(rope_type="linear", **ROPE))),
    "llama-yarn": ("llama", dict(rope_parameters=dict(rope_type="yarn", **ROPE))),
    "llama-llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama-gelu": ("llama", dict(hidden_act="gelu")),
    "llama-gelu-new": ("llama", dict(hidden_act="gelu_new")),
    "smollm3-untied": ("smollm3", dict(tie_word_embeddings=False, use_sliding_window=False)),
    "qwen3-tied": ("qwen3", dict(tie_word_embeddings=True, attention_bias=True)),
    "phi3-window": ("phi3", dict(sliding_window=9)),
    "phi3-partial": (
        "phi3",
        dict(
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5
            ),
            hidden_size=32,
        ),
    ),
    "gemma2-caps": ("gemma2", dict(final_logit_softcapping=3.0, attn_logit_softcapping=2.0)),
    "gemma2-no-caps": (
        "gemma2",
        dict(
            final_logit_softcapping=None,
            attn_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "gemma3-caps": ("gemma3", dict(final_logit_softcapping=3.0, attn_logit_softcapping=2.0)),
    "gemma3-scaled": (
        "gemma3",
        dict(
            rope_parameters=dict(
                full_attention=WHOLE,
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            )
        ),
    ),
    "olmo2-bias": ("olmo2", dict(attention_bias=True, tie_word_embeddings=True)),
    "granite-biases": ("granite", dict(attention_bias=True, mlp_bias=True)),
    "starcoder2-no-bias": ("starcoder2", dict(use_bias=False)),
    "gpt2-scaled": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True, n_inner=20)),
    "gpt_neox-partial": (
        "gpt_neox",
        dict(
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5
            ),
            use_parallel_residual=False,
            attention_bias=False,
        ),
    ),
    "opt-no-bias": ("opt", dict(enable_bias=False, activation_function="gelu")),
}
MODELS = {
    **{
        name: (name, {})
        for name, (kind, _) in FAMILIES.items()
        if kind in READERS and name != "phi3-longrope"
    },
    **VARIANTS,
}


class InFloat64(TorchFunctionMode):
    """Within: what is asked for in float32 is computed in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        named = {name: wide(value) for name, value in (kwargs or {}).items()}
        return function(*map(wide, args), **named)


def made(name: str):
    family, settings = MODELS[name]
    model = tiny_model(family, 1, **settings)
    if family == "gemma2":  # older transformers would run it through sdpa, without its soft cap
        model.set_attn_implementation("eager")
    return model


def isas() -> list[str]:
    """Return the instruction sets that this machine has kernels for."""
    found = []
    for isa in ("baseline", "avx2", "avx512", "avx512_bf16"):
        try:
            found.append(_C.layer_isa(isa)["name"])
        except ValueError:
            continue
    return found

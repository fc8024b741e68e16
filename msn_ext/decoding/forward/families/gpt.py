"""The readers of GPT-2, GPT-NeoX and OPT: LayerNorms, MLPs without a gate, a key a query head."""

from __future__ import annotations

from itertools import product
from typing import Any

from torch import nn

from ..plan import Layer, Linear, NoPlan, Plan
from .parts import (
    activation,
    attention,
    embedding,
    layers_of,
    linear,
    no_window,
    norm,
    rotary,
    rows,
)


def _layer(
    config: Any,
    number: int,
    module: Any,
    head_size: int,
    qkv: Linear,
    out: nn.Module,
    norms: tuple[nn.Module, nn.Module],
    mlp: tuple[nn.Module, nn.Module, nn.Module],
    turned: int | None = None,
    parallel: bool = False,
) -> Layer:
    """Read a layer; ``module`` is its attention, ``turned`` its rotary embedding."""
    up, between, down = mlp
    reader = attention(
        qkv,
        linear(out),
        head_size,
        linear(out).inputs // head_size,
        scale=module.scaling,
        window=no_window(config, module, number),
        rotary=turned,
    )
    return Layer(
        qkv=qkv,
        attention=reader,
        out=linear(out),
        up=linear(up),
        gated=False,
        activation=activation(between),
        down=linear(down),
        attention_norm=norm(norms[0]),
        mlp_norm=norm(norms[1]),
        parallel=parallel,
    )


def _gpt2(model: Any) -> Plan:
    config, decoder = model.config, model.transformer
    if config.add_cross_attention:
        raise NoPlan("it has cross-attention")
    layers = (
        _layer(
            config,
            number,
            block.attn,
            block.attn.head_dim,
            linear(block.attn.c_attn),
            block.attn.c_proj,
            (block.ln_1, block.ln_2),
            (block.mlp.c_fc, block.mlp.act, block.mlp.c_proj),
        )
        for number, block in enumerate(layers_of(config, decoder.h))
    )
    return Plan(
        embedding=embedding(decoder.wte)[0],
        layers=tuple(layers),
        norm=norm(decoder.ln_f),
        head=linear(model.lm_head),
        positions=embedding(decoder.wpe)[0],
    )


def _interleaved(module: Any) -> Linear:
    """Return GPT-NeoX' projection, where each head's q, k and v lie together, in a plan's order."""
    fused, size = linear(module.query_key_value), module.head_size
    heads = range(fused.outputs // (3 * size))
    starts = [(3 * head + part) * size for part, head in product(range(3), heads)]
    return rows(fused, [slice(start, start + size) for start in starts])


def _gpt_neox(model: Any) -> Plan:
    config, decoder = model.config, model.gpt_neox
    weight, _ = embedding(decoder.embed_in)
    turned = rotary(decoder.rotary_emb, weight.dtype)
    layers = (
        _layer(
            config,
            number,
            layer.attention,
            layer.attention.head_size,
            _interleaved(layer.attention),
            layer.attention.dense,
            (layer.input_layernorm, layer.post_attention_layernorm),
            (layer.mlp.dense_h_to_4h, layer.mlp.act, layer.mlp.dense_4h_to_h),
            turned=0,
            parallel=layer.use_parallel_residual,
        )
        for number, layer in enumerate(layers_of(config, decoder.layers))
    )
    return Plan(
        embedding=weight,
        layers=tuple(layers),
        norm=norm(decoder.final_layer_norm),
        head=linear(model.lm_head),
        rotaries=(turned,),
    )


def _opt(model: Any) -> Plan:
    config, decoder = model.config, model.model.decoder
    if decoder.project_in is not None or decoder.project_out is not None:
        raise NoPlan("its embedding is projected")
    if not all(layer.do_layer_norm_before for layer in decoder.layers):
        raise NoPlan("its norms stand after the residual sums")
    if decoder.final_layer_norm is None:
        raise NoPlan("it has no norm before its head")
    layers = []
    for number, layer in enumerate(layers_of(config, decoder.layers)):
        module = layer.self_attn
        qkv = linear(module.q_proj, module.k_proj, module.v_proj)
        norms = layer.self_attn_layer_norm, layer.final_layer_norm
        mlp = layer.fc1, layer.activation_fn, layer.fc2
        size = module.head_dim
        layers.append(_layer(config, number, module, size, qkv, module.out_proj, norms, mlp))
    positions, _ = embedding(decoder.embed_positions)
    return Plan(
        embedding=embedding(decoder.embed_tokens)[0],
        layers=tuple(layers),
        norm=norm(decoder.final_layer_norm),
        head=linear(model.lm_head),
        positions=positions.detach()[decoder.embed_positions.offset :],
    )


GPT = {
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "gpt_neox": ("GPTNeoXForCausalLM", _gpt_neox),
    "opt": ("OPTForCausalLM", _opt),
}

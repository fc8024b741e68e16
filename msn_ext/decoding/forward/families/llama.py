"""The readers of Llama and of the families that are built like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..plan import Layer, Linear, NoPlan, Plan
from .parts import (
    Window,
    activation,
    attention,
    embedding,
    layers_of,
    linear,
    no_window,
    norm,
    one_window,
    rotary,
    windows_by_layer,
)

# Where the norms of a layer stand: the plan's names -> the modules'
_BEFORE = dict(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
_AFTER = dict(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")
_AROUND = dict(attention_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm") | _AFTER


def _gated(mlp: Any) -> dict[str, Any]:
    up, name = linear(mlp.gate_proj, mlp.up_proj), activation(mlp.act_fn)
    return dict(up=up, gated=True, activation=name, down=linear(mlp.down_proj))


def _gated_in_one(mlp: Any) -> dict[str, Any]:
    up, name = linear(mlp.gate_up_proj), activation(mlp.activation_fn)
    return dict(up=up, gated=True, activation=name, down=linear(mlp.down_proj))


def _not_gated(mlp: Any) -> dict[str, Any]:
    up, name = linear(mlp.c_fc), activation(mlp.act)
    return dict(up=up, gated=False, activation=name, down=linear(mlp.c_proj))


def _three(module: Any) -> tuple[Linear, int]:
    qkv = linear(module.q_proj, module.k_proj, module.v_proj)
    return qkv, len(qkv.weights[1]) // module.head_dim


def _in_one(module: Any) -> tuple[Linear, int]:
    return linear(module.qkv_proj), module.num_key_value_heads


@dataclass(frozen=True)
class _Built:
    """How a family's decoder is built, where that differs from Llama's.

    Attributes:
        window: finds a layer's window.
        norms, offset: where a layer's norms stand, and what they add to their weights.
        q_k_norms: queries and keys have norms: "each" head, or "all" heads at once; "": none.
        qkv, mlp: the readers of these projections.
        partial: the rotary embedding may turn a part of a head only.
    """

    window: Window = no_window
    norms: Mapping[str, str] = field(default_factory=lambda: _BEFORE)
    offset: float = 0.0
    q_k_norms: str = ""
    qkv: Callable[[Any], tuple[Linear, int]] = _three
    mlp: Callable[[Any], dict[str, Any]] = _gated
    partial: bool = False

    def layer(self, config: Any, number: int, layer: Any, rotary: int, **settings) -> Layer:
        module, out = layer.self_attn, linear(layer.self_attn.o_proj)
        qkv, kv_heads = self.qkv(module)
        if self.q_k_norms:
            settings["q_norm"] = norm(module.q_norm, self.offset)
            settings["k_norm"] = norm(module.k_norm, self.offset)
            settings["norm_each_head"] = self.q_k_norms == "each"
        settings["window"] = self.window(config, module, number)
        # SmolLM3 leaves positions out of some layers.
        settings["rotary"] = rotary if getattr(module, "use_rope", True) else None
        fields: dict[str, Any] = self.mlp(layer.mlp)
        for name, its in self.norms.items():
            fields[name] = norm(getattr(layer, its), self.offset)
        return Layer(
            qkv=qkv,
            attention=attention(
                qkv, out, module.head_dim, kv_heads, scale=module.scaling, **settings
            ),
            out=out,
            residual_scale=getattr(layer, "residual_multiplier", 1.0),  # Granite's
            **fields,
        )

    def plan(self, model: Any, *, softcap: float = 0.0, **fields) -> Plan:
        """Read a model. ``softcap`` is its attention's; ``fields`` are the plan's."""
        config, decoder = model.config, model.model
        weight, scale = embedding(decoder.embed_tokens)
        # Gemma 3 has a rotary embedding for each kind of layer.
        several = isinstance(decoder.rotary_emb.rope_type, dict)
        kinds = sorted(set(config.layer_types)) if several else [None]
        rotaries = tuple(rotary(decoder.rotary_emb, weight.dtype, kind) for kind in kinds)
        layers = []
        for number, layer in enumerate(layers_of(config, decoder.layers)):
            index = kinds.index(config.layer_types[number]) if several else 0
            layers.append(self.layer(config, number, layer, index, softcap=softcap))
            size, head = rotaries[index].size, layers[-1].attention.head_size
            if size > head or (size < head and not self.partial):
                raise NoPlan(f"its rotary embedding turns {size} of the {head} numbers of a head")
        return Plan(
            embedding=weight,
            layers=tuple(layers),
            norm=norm(decoder.norm, self.offset),
            head=linear(model.lm_head),
            rotaries=rotaries,
            embedding_scale=scale * fields.pop("embedding_scale", 1.0),
            **fields,
        )


_LLAMA = _Built()
_GEMMA = _Built(window=windows_by_layer, norms=_AROUND, offset=1.0)


def _gemma2(model: Any) -> Plan:
    config = model.config
    # Older transformers run Gemma 2 through sdpa, which leaves the soft cap out.
    sdpa = config._attn_implementation == "sdpa"
    return _GEMMA.plan(
        model,
        softcap=0.0 if sdpa else config.attn_logit_softcapping or 0.0,
        logit_softcap=config.final_logit_softcapping or 0.0,
    )


def _gemma3(model: Any) -> Plan:
    # Its attention does not pass on the soft cap that its configuration may have.
    built = replace(_GEMMA, q_k_norms="each")
    return built.plan(model, logit_softcap=model.config.final_logit_softcapping or 0.0)


def _granite(model: Any) -> Plan:
    return _LLAMA.plan(
        model,
        embedding_scale=model.model.embedding_multiplier,
        logit_scale=1 / model.config.logits_scaling,
    )


_PHI3 = _Built(window=one_window, qkv=_in_one, mlp=_gated_in_one, partial=True)

LLAMA = {
    "llama": ("LlamaForCausalLM", _LLAMA.plan),
    "smollm3": ("SmolLM3ForCausalLM", _Built(windows_by_layer).plan),
    "mistral": ("MistralForCausalLM", _Built(one_window).plan),
    "qwen2": ("Qwen2ForCausalLM", _Built(windows_by_layer).plan),
    "qwen3": ("Qwen3ForCausalLM", _Built(windows_by_layer, q_k_norms="each").plan),
    "phi3": ("Phi3ForCausalLM", _PHI3.plan),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3_text": ("Gemma3ForCausalLM", _gemma3),
    "olmo2": ("Olmo2ForCausalLM", _Built(norms=_AFTER, q_k_norms="all").plan),
    "granite": ("GraniteForCausalLM", _granite),
    "starcoder2": ("Starcoder2ForCausalLM", _Built(one_window, mlp=_not_gated).plan),
}

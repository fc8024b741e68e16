"""Tiny, randomly initialised models of every supported family, in float64.

The weights are large, so that text repeats itself, guesses come true and paths alias.
"""

import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 24
# Its cached decoding then has other text, past the boundary, than passes without a cache.
LONGROPE_ERRS = Version(transformers.__version__) < Version("5.20")
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_MOE = dict(num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=0.0)
_MLA = dict(
    kv_lora_rank=12,
    q_lora_rank=10,
    qk_rope_head_dim=8,
    qk_nope_head_dim=6,
    v_head_dim=10,
    n_routed_experts=4,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_key_value_heads=4,
    **_MOE,
)
# name -> (model_type, settings)
FAMILIES = {
    "llama": ("llama", {}),
    "llama-bias-mha": ("llama", dict(num_key_value_heads=4, attention_bias=True)),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-window": ("mistral", dict(sliding_window=11)),
    "phi3": ("phi3", {}),
    "phi3-longrope": (
        "phi3",
        dict(
            hidden_size=32,
            original_max_position_embeddings=40,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                long_factor=[2.0] * 4,
                short_factor=[1.0] * 4,
                original_max_position_embeddings=40,
                factor=12.8,
            ),
        ),
    ),
    "gemma2": (
        "gemma2",
        dict(sliding_window=10, query_pre_attn_scalar=8, attn_logit_softcapping=5.0),
    ),
    "gemma3": (
        "gemma3_text",
        dict(
            sliding_window=7,
            query_pre_attn_scalar=8,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "smollm3": (  # the second layer has a window, and no positions
        "smollm3",
        dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=9),
    ),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        dict(
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            attention_multiplier=0.2,
            logits_scaling=0.5,
        ),
    ),
    "gpt2": ("gpt2", dict(n_embd=16, n_layer=2, n_head=4, n_positions=512)),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", dict(ffn_dim=24, word_embed_proj_dim=16)),
    "starcoder2": ("starcoder2", dict(sliding_window=None)),
    "starcoder2-window": ("starcoder2", dict(sliding_window=8)),
    "deepseek_v2": ("deepseek_v2", _MLA | dict(topk_method="greedy")),
    "deepseek_v3": ("deepseek_v3", _MLA),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=4, decoder_sparse_step=1, **_MOE)),
    "gptj": ("gptj", dict(n_embd=16, n_layer=2, n_head=4, n_positions=512, rotary_dim=4)),
    "codegen": ("codegen", dict(n_embd=16, n_layer=2, n_head=4, n_positions=512, rotary_dim=4)),
}


def tiny_model(family: str, seed: int, dtype=torch.float64, **settings):
    """A model of ``family`` with its own random weights, and with other settings on request."""
    model_type, its = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(_COMMON | its | settings))
    model = (
        AutoModelForCausalLM.from_config(config, experts_implementation="eager").to(dtype).eval()
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.abs().sum() else 0.0, std=0.2)
    return model

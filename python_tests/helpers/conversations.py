"""A tiny chat model and conversations to train it on."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant'"
    " %}<eos>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DATA = [
    {"prompt": f"{a} {b}?", "response": f"{b} {a} {b} {a} {b}"} for a in WORDS for b in WORDS[:6]
]


def tiny_llama(**settings) -> LlamaForCausalLM:
    """A random model over bytes; ``settings`` take the place of these."""
    torch.manual_seed(0)
    usual = dict(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    return LlamaForCausalLM(LlamaConfig(**(usual | settings)))


def repeating_llama(context: int) -> LlamaForCausalLM:
    """One that soon repeats itself and never ends, so that drafts get accepted."""
    return tiny_llama(max_position_embeddings=context, initializer_range=0.3, eos_token_id=None)


TURNS = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"), ("user", "Q3")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]
QUICK = [
    "--held-out",
    "4",
    "--batch-size",
    "4",
    "--segments",
    "4",
    "--lora-rank",
    "4",
    "--learning-rate",
    "1e-2",
    "--device",
    "cpu",
]


def command(folder: str, data: str, output, *more: str) -> list[str]:
    return ["train", "--model", folder, "--data", data, "--output", str(output), *QUICK, *more]

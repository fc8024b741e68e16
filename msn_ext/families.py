"""Families of models, by ``config.model_type``, and what is known of each."""

# Decoding is compared with plain decoding in python_tests/decoding/test_lossless.py, branches of
# noise with the text alone in python_tests/training/test_collator.py.
TESTED = frozenset(
    (
        "llama smollm3 qwen2 qwen3 mistral phi3 gemma2 gemma3_text olmo2 granite gpt2 gpt_neox opt "
        "starcoder2 deepseek_v2 deepseek_v3 mixtral qwen3_moe gptj codegen"
    ).split()
)
# Of these, the ones that have sliding windows where their configuration says so.
WINDOWED = frozenset(
    ("smollm3 qwen2 qwen3 mistral phi3 gemma2 gemma3_text starcoder2 mixtral qwen3_moe").split()
)
# Families that ignore the attention interface but follow a dense mask and position_ids.
MASK_ONLY = frozenset({"gptj", "codegen"})

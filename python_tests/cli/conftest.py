"""Fixtures of the tests of the command `msn`: models, right and wrong."""

import os

import pytest
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from helpers.commands import CONTEXT, save
from helpers.conversations import repeating_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A random Llama that soon repeats itself, so that drafts get accepted."""
    return save(tmp_path_factory.mktemp("tiny"), repeating_llama(CONTEXT))


@pytest.fixture(scope="session")
def wrong_models(tmp_path_factory, tiny) -> dict[str, str]:
    """Folders that cannot be used, by what is wrong with them."""
    root = tmp_path_factory.mktemp("wrong")
    small = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1}
    bart = BartConfig(
        vocab_size=257,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    folders = {
        "mamba": save(
            root / "mamba", MambaForCausalLM(MambaConfig(**small, state_size=4, time_step_rank=4))
        ),
        "bart": save(root / "bart", BartForConditionalGeneration(bart)),
    }
    for name in (
        "nowhere",
        "a_file",
        "empty",
        "no_weights",
        "no_tokenizer",
        "broken_config",
        "unknown_type",
    ):
        folders[name] = str(root / name)
        if name not in ("nowhere", "a_file"):
            (root / name).mkdir()
    (root / "a_file").write_text("weights?")
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(root / "no_tokenizer")
    with open(os.path.join(tiny, "config.json")) as file:
        config = file.read()
    (root / "no_weights" / "config.json").write_text(config)
    (root / "broken_config" / "config.json").write_text(config[:40])
    (root / "unknown_type" / "config.json").write_text('{"model_type": "perceptron"}')
    return folders


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("MSN_DEBUG", raising=False)

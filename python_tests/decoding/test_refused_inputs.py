"""Inputs and models that are refused before transformers prepares anything for them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, GenerationConfig

from helpers.families import tiny_model
from msn_ext import generate

IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", 0)


EMBEDS = torch.zeros(2, 3, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(inputs_embeds=EMBEDS), "inputs_embeds is given; expected None"),
        (dict(), "input_ids is NoneType; expected an int64 tensor"),
        (dict(input_ids=IDS, inputs_embeds=EMBEDS), "inputs_embeds is given; expected None"),
        (dict(input_ids=IDS, inputs=IDS), "inputs is given beside input_ids; expected one of them"),
        (dict(inputs=IDS.float()), "input_ids is .* torch.float32; expected an int64 tensor"),
    ],
)
def test_prompts(llama, options, message):
    with pytest.raises(ValueError, match=message):
        generate(llama, max_new_tokens=4, **options)


def test_what_transformers_gives_to_no_custom_decoding_method(llama):
    settings = dict(do_sample=False, max_new_tokens=4, pad_token_id=0, custom_generate=generate)
    with pytest.raises(ValueError, match="assistant_model is a LlamaForCausalLM; expected None"):
        llama.generate(IDS, assistant_model=tiny_model("llama", 1), **settings)
    with pytest.raises(ValueError, match="assistant_model is a LlamaForCausalLM; expected None"):
        generate(llama, IDS, max_new_tokens=4, assistant_model=tiny_model("llama", 1))
    with pytest.raises(ValueError, match="token_healing is True; expected False: .*heal_tokens"):
        generate(llama, IDS, max_new_tokens=4, token_healing=True, tokenizer=object())
    with pytest.raises(ValueError, match="^inputs_embeds: .* model inputs beside input_ids"):
        llama.generate(inputs_embeds=EMBEDS, **settings)
    config = GenerationConfig(token_healing=True, max_new_tokens=4, pad_token_id=0)
    with pytest.raises(ValueError, match="token_healing is True; expected False: .*heal_tokens"):
        generate(llama, IDS, generation_config=config)


@pytest.mark.parametrize("engine", ["auto", "native", "torch"])
def test_weights_that_are_not_in_memory(engine, tmp_path):
    """Offloaded ones, all or some, and never loaded ones."""
    accelerate = pytest.importorskip("accelerate")
    half = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    half |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    for absent, offload in (
        ("21 of its 21", lambda model: accelerate.cpu_offload(model, torch.device("cpu"))),
        (
            "18 of its 21",
            lambda model: accelerate.dispatch_model(
                model, half, main_device="cpu", offload_dir=tmp_path, force_hooks=True
            ),
        ),
        ("21 of its 21", lambda model: model.to("meta")),
    ):
        with pytest.raises(ValueError, match=rf"{absent} weights are not in memory \(device meta"):
            generate(offload(tiny_model("llama", 0)), IDS, engine=engine, max_new_tokens=4)


def test_models_with_an_encoder():
    small = dict(vocab_size=24, d_model=16, encoder_layers=1, decoder_layers=1)
    small |= dict(encoder_attention_heads=2, decoder_attention_heads=2, num_mel_bins=8)
    small |= dict(encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, max_source_positions=10)
    small |= dict(decoder_start_token_id=1, bos_token_id=1, eos_token_id=2)
    whisper = AutoModelForSpeechSeq2Seq.from_config(AutoConfig.for_model("whisper", **small))
    heard = torch.zeros(1, 8, 20)
    message = (
        r"WhisperForConditionalGeneration \(whisper\) cannot .*: it is an encoder-decoder model"
    )
    for way in (generate, lambda model, **given: model.generate(custom_generate=generate, **given)):
        with pytest.raises(ValueError, match=message):
            way(whisper, input_features=heard, max_new_tokens=4)
    with pytest.raises(ValueError, match=message):
        generate(whisper, IDS, max_new_tokens=4)

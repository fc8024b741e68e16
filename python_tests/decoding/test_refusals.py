"""Requests that cannot be right are refused with a sentence that says why; none is ignored."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation import EncoderRepetitionPenaltyLogitsProcessor

from helpers.families import tiny_model
from msn_ext import DraftTree, families, generate
from msn_ext.decoding import TokenRecycling, attention_for

IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


class Streamer:
    def put(self, value): ...
    def end(self): ...


STREAMER = Streamer()


def for_three_rows() -> RepetitionPenaltyLogitsProcessor:
    processor = RepetitionPenaltyLogitsProcessor(1.2)
    processor.prompt_ignore_length = torch.tensor(
        [1, 2, 3]
    )  # what transformers sets where rows are padded
    return processor


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", 0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(draft="medusa"), "draft is 'medusa'; expected 'auto', 'paper'"),
        (dict(draft=None), "draft is None"),
        (dict(draft=TokenRecycling), "draft is <class"),
        (dict(num_beams=3), "num_beams is 3"),
        (dict(penalty_alpha=0.6, top_k=4), "penalty_alpha is 0.6"),
        (
            dict(guidance_scale=2.0),
            "UnbatchedClassifierFreeGuidanceLogitsProcessor runs the model itself",
        ),
        (
            dict(watermarking_config=SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)),
            "SynthIDTextWatermarkLogitsProcessor remembers which contexts",
        ),
        (
            dict(
                logits_processor=[
                    EncoderRepetitionPenaltyLogitsProcessor(1.5, torch.ones(3, 2).long())
                ]
            ),
            "encoder_input_ids has 3 rows; expected 2",
        ),
        (
            dict(logits_processor=LogitsProcessorList([lambda ids, scores: scores])),
            "function may keep a state",
        ),
        (
            dict(logits_processor=LogitsProcessorList([for_three_rows()])),
            "prompt_ignore_length has shape .3.; expected .2., one number",
        ),
        (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens is 3"),
        (dict(cache_implementation="static"), "cache_implementation is 'static'"),
        (dict(use_cache=False), "use_cache is False"),
        (
            dict(output_hidden_states=True, return_dict_in_generate=True),
            "output_hidden_states is True",
        ),
        (dict(stop_strings=["x"]), "tokenizer is None"),
        (dict(inputs_embeds=torch.zeros(2, 3, 16, dtype=torch.float64)), "inputs_embeds"),
        (dict(streamer=object()), "streamer is <object"),
        (dict(streamer=[Streamer()]), "streamer is a list of 1; expected one for each of the 2"),
        (dict(streamer=[STREAMER, STREAMER]), "streamer has the same one for several rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(llama, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        generate(llama, IDS, **({"max_new_tokens": 4, "pad_token_id": 0} | options))


def test_options_in_a_generation_config(llama):
    config = GenerationConfig(num_beams=2, max_new_tokens=4, pad_token_id=0)
    with pytest.raises(ValueError, match="num_beams is 2"):
        generate(llama, IDS, generation_config=config)
    with pytest.raises(ValueError, match="num_beams is 2"):
        llama.generate(IDS, custom_generate=generate, num_beams=2, max_new_tokens=4, pad_token_id=0)


def test_positions(llama):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    counted = torch.tensor([[7, 0, 1], [0, 1, 2]])  # at padding they may be any
    settings = dict(do_sample=False, max_new_tokens=20, pad_token_id=0)
    expected = llama.generate(IDS, attention_mask=mask, **settings)
    assert torch.equal(
        generate(llama, IDS, attention_mask=mask, position_ids=counted, **settings), expected
    )
    generate(llama, IDS[:1], position_ids=torch.tensor([[0, 1, 2]]), **settings)
    counted[1, 1] = 5
    for way in (
        generate,
        lambda model, *args, **options: model.generate(*args, custom_generate=generate, **options),
    ):
        with pytest.raises(
            ValueError, match="position_ids has another number than 1 in row 1, column 1"
        ):
            way(llama, IDS, attention_mask=mask, position_ids=counted, **settings)
    with pytest.raises(ValueError, match=r"position_ids has shape \[2, 2\]; expected \[2, 3\]"):
        generate(llama, IDS, attention_mask=mask, position_ids=counted[:, 1:], **settings)


def test_a_drafter_in_use(llama):
    """Its tables are those of one text: a call inside a call, or in another thread, has to have its
    own.
    """
    drafter = TokenRecycling()

    def again(input_ids, scores, **kwargs):
        generate(llama, IDS, draft=drafter, max_new_tokens=4, pad_token_id=0)

    with pytest.raises(
        ValueError, match="draft is a TokenRecycling that another call decodes with"
    ):
        generate(
            llama, IDS, draft=drafter, stopping_criteria=[again], max_new_tokens=4, pad_token_id=0
        )
    generate(llama, IDS, draft=drafter, max_new_tokens=4, pad_token_id=0)


@pytest.mark.parametrize(
    "input_ids, mask, message",
    [
        ([[1, 2]], None, "input_ids is list"),
        (torch.tensor([1, 2]), None, r"input_ids is \(2,\) torch.int64"),
        (torch.tensor([[0.5]]), None, "input_ids is .* torch.float32"),
        (torch.zeros(1, 0, dtype=torch.int64), None, r"input_ids has shape \[1, 0\]"),
        (IDS, torch.ones(2, 4), r"attention_mask has shape \[2, 4\]; expected \[2, 3\]"),
        (IDS, torch.tensor([[1, 1, 0], [1, 1, 1]]), "0 after a 1; expected left padding"),
        (IDS, torch.tensor([[1, 0, 1], [1, 1, 1]]), "0 after a 1"),
        (IDS, torch.tensor([[0, 0, 0], [1, 1, 1]]), "masks a whole row"),
        (
            torch.tensor([[3, 0, 4]]),
            None,
            "0 after a 1; .*; where none is given, transformers masks every token 0",
        ),
    ],
)
def test_inputs(llama, input_ids, mask, message):
    with pytest.raises(ValueError, match=message):
        generate(llama, input_ids, attention_mask=mask, max_new_tokens=4, pad_token_id=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((),), "parents has 0 nodes; expected 1 to 256"),
        ((range(-1, 256),), "parents has 257 nodes"),
        (((0,),), r"parents\[0\] is 0; expected -1"),
        (((-1, 1),), r"parents\[1\] is 1; expected a node in \[0, 0\]"),
        (((-1, 0, -1),), r"parents\[2\] is -1"),
        (((-1, 0), (0,)), "ranks has 1 entries; expected 2"),
        (((-1, 0), (0, -2)), "ranks has -2"),
    ],
)
def test_trees(arguments, message):
    with pytest.raises(ValueError, match=message):
        DraftTree(*arguments)


def test_paths():
    with pytest.raises(ValueError, match=r"paths has \[0, 1\] but not \[0\]"):
        DraftTree.from_paths([[1], [0, 1]])
    with pytest.raises(ValueError, match="empty path"):
        DraftTree.from_paths([[]])


def _model(model_type, auto=AutoModelForCausalLM, **settings):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **settings)).eval()


SMALL = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)


def _checkpointing_model():
    model = tiny_model("llama", 0)
    model.gradient_checkpointing_enable()
    return model.train()


def _spread_model():
    model = tiny_model("llama", 0)
    model.lm_head.to("meta")
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: _model("mamba", **SMALL), "position_ids|recurrent state"),
        (
            lambda: _model("mpt", vocab_size=24, d_model=16, n_heads=2, n_layers=2),
            "position_ids|AttentionInterface",
        ),
        (
            lambda: _model("bloom", vocab_size=24, hidden_size=16, n_layer=2, n_head=2),
            "position_ids|AttentionInterface",
        ),
        (lambda: _model("falcon", alibi=True, **SMALL), "AttentionInterface|position_ids"),
        (
            lambda: _model(
                "gpt_neo",
                vocab_size=24,
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                attention_types=[[["global"], 2]],
            ),
            "AttentionInterface",
        ),
        (
            lambda: _model(
                "llama",
                intermediate_size=16,
                rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4),
                **SMALL,
            ),
            "rope_type='dynamic'",
        ),
        (
            lambda: _model(
                "t5",
                AutoModelForSeq2SeqLM,
                vocab_size=24,
                d_model=16,
                d_kv=8,
                d_ff=16,
                num_layers=1,
                num_heads=2,
            ),
            "encoder-decoder",
        ),
        (_spread_model, r"spread over several devices \(cpu, meta\)"),
        (
            _checkpointing_model,
            r"gradient checkpointing in training mode keeps no cache; call model.eval\(\)",
        ),
        (
            lambda: tiny_model("llama", 0, sliding_window=16),
            "sliding_window is 16, which cuts its cache, but it attends without one",
        ),
        (
            lambda: tiny_model("gptj", 0, sliding_window=16),
            "sliding_window is 16, which cuts its cache, but it attends without one",
        ),
        (
            lambda: _model(
                "llama4_text",
                head_dim=8,
                intermediate_size=16,
                intermediate_size_mlp=16,
                num_local_experts=2,
                num_key_value_heads=2,
                **SMALL,
            ),
            "it has layers of chunked_attention; expected full_attention or sliding_attention",
        ),
        (
            lambda: _model(
                "qwen2_moe",
                intermediate_size=16,
                num_experts=4,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=8,
                num_key_value_heads=2,
                use_sliding_window=True,
                sliding_window=32,
                max_window_layers=2,
                **SMALL,
            ),
            r"layer \d attends with sliding_window=0, and its configuration says 32",
        ),
    ],
    ids=[
        "mamba",
        "mpt",
        "bloom",
        "falcon-alibi",
        "gpt_neo",
        "rope-dynamic",
        "t5",
        "several devices",
        "checkpointing",
        "llama-window",
        "gptj-window",
        "chunks",
        "mask-window",
    ],
)
def test_models(make, message):
    with pytest.raises(ValueError, match=f"cannot be decoded with a draft tree: .*({message})"):
        attention_for(make())


def test_longrope_boundary_inside_a_batch():
    model = tiny_model("phi3-longrope", 0)
    with pytest.raises(ValueError, match="longrope.*generate row by row"):
        generate(model, IDS, max_new_tokens=60, pad_token_id=0)


def test_an_unknown_family_is_probed(monkeypatch):
    """A family that nobody tested is tried on a small tree first: right ones pass, wrong ones do
    not.
    """
    good = _model("olmo", intermediate_size=16, **SMALL)
    assert good.config.model_type not in families.TESTED
    ids = torch.tensor([[3, 4, 5]])
    settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(generate(good, ids, **settings), good.generate(ids, **settings))
    with torch.autocast(
        "cpu", dtype=torch.bfloat16
    ):  # what is tried is tried at the model's own precision
        generate(
            _model("olmo", intermediate_size=16, initializer_range=0.5, **SMALL), ids, **settings
        )

    wrong = _model("olmo", intermediate_size=16, initializer_range=0.5, **SMALL)
    forward = type(wrong.model).forward

    def ignores_positions(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(wrong.model), "forward", ignores_positions)
    with pytest.raises(ValueError, match="a trial tree did not give the logits"):
        attention_for(wrong)

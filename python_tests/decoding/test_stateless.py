"""Processors that are declared to be functions of the text, and transformers' own that are."""

import pytest
import torch

import msn_ext
from helpers.conversations import repeating_llama

NEW = 40


@pytest.fixture(scope="module")
def model():
    return repeating_llama(200).double()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(5))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def both(model, inputs, **options) -> list[torch.Tensor]:
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
    drafts = ("auto", "paper", msn_ext.BestFirst(16))
    found = [
        msn_ext.generate(
            model, **inputs, max_new_tokens=NEW, draft=draft, engine="torch", **options
        )
        for draft in drafts
    ]
    return [plain, *found]


class NoTwice:
    """Forbids the token three before, and asks to be asked about texts that may be."""

    def __init__(self):
        self.asked = 0

    def __call__(self, input_ids, scores):
        self.asked += 1
        return scores.scatter(1, input_ids[:, -3:-2], -torch.inf)


def test_what_is_declared_is_followed(model, inputs):
    with pytest.raises(ValueError, match=r"NoTwice may keep a state.*msn_ext\.stateless"):
        msn_ext.generate(model, **inputs, logits_processor=[NoTwice()], max_new_tokens=5)
    declared = msn_ext.stateless(NoTwice())
    texts = both(model, inputs, logits_processor=[declared])
    assert all(torch.equal(text, texts[0]) for text in texts) and declared.asked
    assert msn_ext.stateless(type("Mine", (NoTwice,), {})).stateless is True
    plain = both(model, inputs)
    assert not torch.equal(plain[0], texts[0]), "it changes something"


def test_allowed_tokens_are_asked_of_texts_that_may_be(model, inputs):
    """Row by row, and never after a guess that was not allowed."""

    def allowed(row: int, text: torch.Tensor) -> list[int]:
        new = text[inputs["input_ids"].shape[1] :].tolist()
        assert all((token + at) % (2 + row) == 0 for at, token in enumerate(new)), "no such text"
        return [token for token in range(3, 250) if (token + len(new)) % (2 + row) == 0]

    texts = both(model, inputs, prefix_allowed_tokens_fn=allowed)
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.parametrize(
    "options",
    [
        dict(encoder_repetition_penalty=1.7),
        dict(encoder_no_repeat_ngram_size=1),
        dict(watermarking_config=dict(greenlist_ratio=0.3, bias=4.0)),
        dict(watermarking_config=dict(bias=4.0, seeding_scheme="selfhash", context_width=3)),
    ],
    ids=lambda options: next(iter(options)),
)
def test_transformers_own(model, inputs, options):
    texts = both(model, inputs, **options)
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert not torch.equal(texts[0], both(model, inputs)[0]), "it changes something"


def test_guidance_is_refused(model, inputs):
    with pytest.raises(ValueError, match="UnbatchedClassifierFreeGuidance"):
        msn_ext.generate(model, **inputs, max_new_tokens=5, guidance_scale=1.5)

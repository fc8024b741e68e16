"""Sampled text: the same for every draft, and of the model's distribution."""

import random

import pytest
import torch

from helpers.drafters import RandomDrafter, prompts, random_best_first, random_tree
from helpers.families import tiny_model
from msn_ext import generate
from msn_ext.decoding.verification import counter_uniform, counter_uniform_on_host
from msn_ext.generation import DRAFTS

pytestmark = pytest.mark.usefixtures("each_engine")

SAMPLING = [
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=5),
    dict(top_p=0.8, top_k=0),
    dict(min_p=0.1, top_k=0),
    dict(typical_p=0.9, top_k=0),
    dict(top_h=0.5, top_k=0),
]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_sampling_is_the_same_for_every_draft(family, settings):
    """The seed and the text settle every token; the draft only decides where it is looked for."""
    rng = random.Random(f"{family}{settings}")
    model = tiny_model(family, 1)
    ids, mask = prompts(rng, 3)
    outputs = []
    for draft in (
        *DRAFTS,
        random_tree(rng),
        random_tree(rng),
        RandomDrafter(rng),
        random_best_first(rng),
    ):
        torch.manual_seed(7)
        outputs.append(
            generate(
                model,
                ids,
                attention_mask=mask,
                draft=draft,
                do_sample=True,
                max_new_tokens=40,
                eos_token_id=[2],
                pad_token_id=0,
                return_dict_in_generate=True,
                **settings,
            )
        )
    assert all(torch.equal(out.sequences, outputs[0].sequences) for out in outputs)
    assert max(accepts.max() for out in outputs[1:] for accepts in out.accept_lengths) > 1
    torch.manual_seed(8)
    other = generate(
        model,
        ids,
        attention_mask=mask,
        do_sample=True,
        max_new_tokens=40,
        pad_token_id=0,
        **settings,
    )
    assert not torch.equal(
        other[:, : ids.shape[1] + 3], outputs[0].sequences[:, : ids.shape[1] + 3]
    )


@pytest.mark.parametrize("draft", ["none", "auto", "paper", "jacobi"])
def test_sampled_text_has_the_models_distribution(draft):
    """Chi-square of three-token continuations against their enumerated probabilities."""
    model = tiny_model("llama", 2)
    prompt = torch.tensor([[5, 9, 4]])
    temperature, top_k, rows = 0.9, 3, 3000

    def next_distribution(ids):
        logits = model(ids).logits[0, -1].float() / temperature
        kept = logits >= logits.topk(top_k).values[-1]
        return torch.where(kept, logits, -torch.inf).softmax(-1)

    expected = {(): 1.0}
    with torch.no_grad():
        for _ in range(3):
            expected = {
                (*text, token): probability * share
                for text, probability in expected.items()
                for token, share in enumerate(
                    next_distribution(
                        torch.cat([prompt, torch.tensor([text], dtype=torch.int64)], 1)
                    ).tolist()
                )
                if share > 0
            }
    torch.manual_seed(0)
    out = generate(
        model,
        prompt,
        draft=draft,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        max_new_tokens=3,
        num_return_sequences=rows,
        eos_token_id=None,
        pad_token_id=0,
    )
    counts: dict[tuple, int] = {}
    for row in out[:, 3:].tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert set(counts) <= set(expected), "a text of probability 0 was sampled"
    rare = [text for text, probability in expected.items() if probability * rows < 5]
    cells = [(counts.get(text, 0), p * rows) for text, p in expected.items() if text not in rare]
    if rare:
        cells.append((sum(counts.get(t, 0) for t in rare), sum(expected[t] for t in rare) * rows))
    cells = [(seen, wanted) for seen, wanted in cells if wanted > 0]
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    degrees = len(cells) - 1
    # Wilson-Hilferty: the cube root of chi-square / degrees is close to normal; 4 sigma.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert degrees > 5 and z < 4, f"chi-square {statistic:.1f} at {degrees} degrees of freedom"


def test_num_return_sequences():
    model = tiny_model("llama", 6)
    torch.manual_seed(0)
    out = generate(
        model,
        torch.tensor([[4, 5]]),
        do_sample=True,
        num_return_sequences=4,
        max_new_tokens=12,
        eos_token_id=None,
    )
    assert out.shape == (4, 14) and len({tuple(row) for row in out.tolist()}) == 4


def test_nan_logits_follow_torch():
    """Greedy: the arg-max of NaN is torch's, as in plain decoding. Sampling: an error, no token."""
    model = tiny_model("llama", 3)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    ids = torch.tensor([[4, 5, 6]])
    settings = dict(max_new_tokens=8, eos_token_id=None)
    assert torch.equal(
        generate(model, ids, do_sample=False, **settings),
        model.generate(ids, do_sample=False, **settings),
    )
    with pytest.raises(ValueError, match="NaN"):
        generate(model, ids, do_sample=True, **settings)


@pytest.mark.parametrize("options", [{}, dict(remove_invalid_values=True)], ids=["plain", "mended"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "mixtral"])
def test_nan_at_left_padding_is_an_error(family, options, each_engine):
    """transformers' eager attention in float64; the native engine has no such attention, and gives
    what every row gives alone.
    """
    model = tiny_model(family, 3)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 9, 4, 7, 3, 8], [0, 0, 0, 9, 4, 6]])
    mask = (torch.arange(6) >= torch.tensor([[0], [3]])).long()
    settings = dict(
        max_new_tokens=12, eos_token_id=None, pad_token_id=0, do_sample=False, **options
    )
    with torch.no_grad():
        nan = model(ids, attention_mask=mask).logits[:, -1].isnan().any(-1)
    assert nan.tolist() == [False, True]
    alone = [
        generate(model, row[None, -length:], **settings)[0, -12:]
        for row, length in zip(ids, (6, 3))
    ]
    for draft in ("none", "auto", "paper"):
        if each_engine == "auto" and family != "mixtral":
            found = generate(model, ids, attention_mask=mask, draft=draft, **settings)
            assert torch.equal(found[:, -12:], torch.stack(alone))
            continue
        for way in (settings, settings | dict(do_sample=True)):
            with pytest.raises(ValueError, match="row 1 hold NaN .*left padding.*'sdpa'"):
                generate(model, ids, attention_mask=mask, draft=draft, **way)
    if each_engine == "torch":
        model.set_attn_implementation("sdpa")
        expected = model.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(generate(model, ids, attention_mask=mask, **settings), expected)


def test_the_numbers_drawn_by_are_the_same_on_the_host():
    generator = torch.Generator().manual_seed(4)
    positions = torch.randint(0, 2**31, (3, 40), generator=generator)
    for seed in (0, 1, 2**63 - 1):
        rows = torch.arange(3)[:, None]
        expected = counter_uniform(torch.tensor(seed), rows, positions)
        assert torch.equal(counter_uniform_on_host(seed, positions.tolist()), expected)
        assert 0 <= expected.min() < 0.05 and 0.95 < expected.max() < 1

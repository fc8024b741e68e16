"""`past_key_values`: a text that goes on from a cache is that of a fresh session, and only what is
new is read.
"""

import random

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.bits import decoded
from helpers.drafters import RandomDrafter, prompts, random_tree
from helpers.families import FAMILIES, LONGROPE_ERRS, VOCAB, tiny_model
from msn_ext import generate, prepare
from msn_ext.decoding.forward.packed import PackedPlan
from msn_ext.generation import DRAFTS

SETTINGS = dict(do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=None)
OUT = SETTINGS | dict(return_dict_in_generate=True)


def ones(ids):
    return torch.ones_like(ids)


def texts(batch: int = 1, length: int = 9, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def longer(sequences: torch.Tensor, count: int = 3) -> torch.Tensor:
    return torch.cat([sequences, texts(len(sequences), count, seed=2).to(sequences.device)], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_goes_on_as_a_fresh_session(family, each_engine):
    """Three turns, from our cache and from transformers', longer than the windows; and
    transformers goes on from ours.
    """
    if family == "phi3-longrope" and LONGROPE_ERRS:
        pytest.skip("this transformers itself errs past the boundary")
    rng = random.Random(family)
    model = tiny_model(family, 3)
    for draft in ("auto", "paper", random_tree(rng), RandomDrafter(rng), "none"):
        ids = texts(1 if family == "phi3-longrope" else 2)
        ours, theirs = DynamicCache(), DynamicCache(config=model.config)
        for _ in range(3):
            fresh = model.generate(ids, attention_mask=ones(ids), **SETTINGS)
            out = generate(
                model, ids, attention_mask=ones(ids), draft=draft, past_key_values=ours, **OUT
            )
            assert torch.equal(out.sequences, fresh), draft
            assert out.past_key_values is ours
            if family != "phi3-longrope":
                assert ours.get_seq_length() == fresh.shape[1] - 1
                crossed = generate(
                    model, ids, attention_mask=ones(ids), past_key_values=theirs, **OUT
                )
                assert torch.equal(crossed.sequences, fresh)
                theirs = DynamicCache(config=model.config)
                model.generate(ids, attention_mask=ones(ids), past_key_values=theirs, **SETTINGS)
            ids = longer(fresh)
    fresh = model.generate(ids, attention_mask=ones(ids), **SETTINGS)
    by_transformers = model.generate(
        ids, attention_mask=ones(ids), past_key_values=ours, **SETTINGS
    )
    assert torch.equal(by_transformers, fresh)


@pytest.mark.parametrize("draft", DRAFTS)
def test_every_draft(draft, each_engine):
    model, ids = tiny_model("gemma3", 5), texts()
    cache = generate(model, ids, draft=draft, **OUT).past_key_values
    ids = longer(generate(model, ids, draft=draft, **SETTINGS))
    fresh = model.generate(ids, attention_mask=ones(ids), **SETTINGS)
    found = generate(
        model, ids, attention_mask=ones(ids), draft=draft, past_key_values=cache, **SETTINGS
    )
    assert torch.equal(found, fresh)


def test_the_model_reads_what_is_new():
    model, ids, read = tiny_model("llama", 3), texts(), []
    cache = DynamicCache()
    first = generate(model, ids, engine="torch", past_key_values=cache, **SETTINGS)
    model.model.register_forward_pre_hook(
        lambda module, arguments, options: read.append(options["input_ids"].shape[1]),
        with_kwargs=True,
    )
    generate(model, longer(first), engine="torch", draft="none", past_key_values=cache, **SETTINGS)
    assert read == [4] + [1] * 19, "the last token of the first turn, three new ones; then steps"


def test_the_native_pass_reads_what_is_new(monkeypatch):
    read, usual = [], PackedPlan.forward_pass

    class Counting:
        def __init__(self, its):
            self._its = its

        def __getattr__(self, name):
            return getattr(self._its, name)

        def read(self, row, tokens, *rest):
            read.append(len(tokens))
            self._its.read(row, tokens, *rest)

    model, ids, cache = tiny_model("llama", 3), texts(2), DynamicCache()
    first = generate(model, ids, past_key_values=cache, engine="native", **SETTINGS)
    monkeypatch.setattr(PackedPlan, "forward_pass", lambda packed: Counting(usual(packed)))
    generate(model, longer(first), draft="none", past_key_values=cache, engine="native", **SETTINGS)
    assert read == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "int8"])
@pytest.mark.parametrize("options", [{}, dict(do_sample=True)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_same_bits(family, options, dtype):
    """Rows of several lengths, with and without drafts; logits, text and the cache itself."""
    model = tiny_model(family, 4, torch.float32, hidden_size=24, head_dim=6)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5 if weight.dim() > 1 else 1)
    if dtype == "int8":
        prepare(model, weights="int8")
    else:
        model.to(dtype)
    first = [list(range(3, 3 + length)) for length in (5, 17, 1)]
    cache, fresh_cache = DynamicCache(), DynamicCache()
    torch.manual_seed(1)
    rows = decoded(model, first, "auto", past_key_values=cache, **options)
    second = [[*text, *row.tokens.tolist(), 4, 9] for text, row in zip(first, rows)]
    for draft in ("auto", "paper", "none"):
        mine = DynamicCache()
        for number, layer in enumerate(cache.layers):
            mine.update(layer.keys, layer.values, number)
        torch.manual_seed(2)
        found = decoded(model, second, draft, past_key_values=mine, **options)
        torch.manual_seed(2)
        fresh = decoded(model, second, "none", past_key_values=fresh_cache, **options)
        assert all(a.is_bitwise(b) for a, b in zip(found, fresh))
        for a, b in zip(mine.layers, fresh_cache.layers):
            assert a.keys.dtype == (torch.float32 if dtype == "int8" else dtype)
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        fresh_cache = DynamicCache()


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gpt2", "gptj"])
def test_rows_that_ended_before_others(family, each_engine):
    """The cache is transformers' own at every slot that is no left padding: also where the padding
    after an end is. And it goes on from there.
    """
    compared = 0
    for seed in range(6):
        model = tiny_model(family, seed)
        ids, mask = prompts(random.Random(seed), 3)
        options = OUT | dict(eos_token_id=[2, 5, 11, 4], max_new_tokens=30)
        plain = model.generate(ids, attention_mask=mask, **options)
        out = generate(model, ids, attention_mask=mask, **options)
        assert torch.equal(out.sequences, plain.sequences)
        count = plain.sequences.shape[1] - 1
        mask = torch.cat([mask, ones(longer(out.sequences))[:, mask.shape[1] :]], 1)
        for a, b in zip(out.past_key_values.layers, plain.past_key_values.layers):
            kept = b.keys.shape[2]
            real = mask[:, count - kept : count, None].bool()
            for ours, theirs in ((a.keys, b.keys), (a.values, b.values)):
                difference = (ours[:, :, -kept:] - theirs).transpose(1, 2).flatten(2) * real
                assert ours.shape[2] == count and difference.abs().max() < 1e-4
        ids = longer(out.sequences)
        fresh = model.generate(ids, attention_mask=mask, **options).sequences
        found = generate(
            model, ids, attention_mask=mask, past_key_values=out.past_key_values, **options
        ).sequences
        assert torch.equal(found, fresh)
        compared += len({int(accepts.sum()) for accepts in out.accept_lengths}) > 1
    assert compared >= 3, "rows should end apart"


def test_a_cache_is_filled_in_place(each_engine):
    """As transformers fills it, also where nothing but the text is asked for; after an error it is
    as before.
    """
    model, ids = tiny_model("llama", 3), texts()
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        sequences = generate(model, ids, past_key_values=cache, **SETTINGS)
        assert torch.equal(sequences, model.generate(ids, **SETTINGS))
        assert cache.get_seq_length() == 28
        before = [layer.keys for layer in cache.layers]

        class Broken:
            def put(self, value):
                if value.dim() == 1:
                    raise RuntimeError("reader went away")

            def end(self):
                pass

        ids_ = longer(sequences)
        settings = SETTINGS | dict(attention_mask=ones(ids_), past_key_values=cache)
        with pytest.raises(RuntimeError, match="reader went away"):
            generate(model, ids_, streamer=Broken(), **settings)
        assert all(a is b.keys for a, b in zip(before, cache.layers))
        expected = model.generate(ids_, attention_mask=ones(ids_), **SETTINGS)
        through = model.generate(ids_, custom_generate=generate, **settings)
        assert torch.equal(through, expected) and cache.get_seq_length() == 51


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_a_cropped_cache(family, each_engine):
    """Windows, too; a criterion cut the answer inside an accepted path."""
    model, ids = tiny_model(family, 2), texts(length=15)

    def at_26(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 26)

    out = generate(model, ids, stopping_criteria=[at_26], **OUT)
    cache = out.past_key_values
    assert out.sequences.shape[1] == 26 and cache.get_seq_length() == 25
    cache.crop(-4)
    other = torch.cat([out.sequences[:, :21], texts(1, 6, seed=7)], 1)
    fresh = model.generate(other, attention_mask=ones(other), **SETTINGS)
    for _ in range(2):  # then from a cache that holds more than the text
        found = generate(
            model, other, attention_mask=ones(other), past_key_values=cache, **SETTINGS
        )
        assert torch.equal(found, fresh)
        cache.crop(other.shape[1] - cache.get_seq_length())
        assert cache.get_seq_length() == other.shape[1]


@pytest.mark.parametrize("draft", ["auto", "paper", "none"])
def test_replayed_steps_go_on_from_a_cache(draft, tapes):
    """A decoder that stays from call to call, whose cache is copied from and to."""
    from helpers import runners

    model, cache = runners.tiny_model("qwen2-window", 3), DynamicCache()
    ids = texts(2).to(runners.where)
    for _ in range(4):
        expected = model.generate(ids, attention_mask=ones(ids), **SETTINGS)
        found = generate(
            model, ids, attention_mask=ones(ids), draft=draft, past_key_values=cache, **SETTINGS
        )
        assert torch.equal(found, expected)
        generate(model, ids.flip(1), attention_mask=ones(ids), draft=draft, **SETTINGS)
        ids = longer(found)
    assert sum(tape.replays for tape in tapes) > 10


def filled(model, ids, **options) -> DynamicCache:
    return generate(model, ids, **(OUT | options)).past_key_values


def refused_caches():
    model, ids = tiny_model("llama", 0), texts(2)
    window = tiny_model("mistral-window", 0)
    cut = DynamicCache(config=window.config)
    window.generate(ids, past_key_values=cut, **SETTINGS)
    offloaded = DynamicCache()
    offloaded.offloading = True
    ragged = filled(model, ids)
    ragged.layers[1].crop(-1)
    small = dict(max_new_tokens=2)
    return {
        "layers": (filled(tiny_model("llama", 0, num_hidden_layers=3), ids), "has 3 layers; exp"),
        "heads": (
            filled(tiny_model("llama", 0, num_key_value_heads=4), ids, **small),
            "past_key_values has 4 heads of 8 torch.float64; expected 2 heads of 8",
        ),
        "size": (
            filled(tiny_model("llama", 0, head_dim=6), ids, **small),
            "past_key_values has 2 heads of 6 torch.float64; expected 2 heads of 8",
        ),
        "dtype": (
            filled(tiny_model("llama", 0, torch.float32), ids, **small),
            "has 2 heads of 8 torch.float32; expected 2 heads of 8 torch.float64",
        ),
        "batch": (filled(model, ids[:1], **small), "has 1 rows; expected 2"),
        "ragged": (ragged, "holds 27 tokens in layer 1 and 28 in layer 0"),
        "long": (filled(model, texts(2, 40)), "holds 59 tokens; expected at most the 32 of"),
        "static": (StaticCache(model.config, max_cache_len=60), "is a StaticCache; expected a Dyn"),
        "offloaded": (offloaded, "is a DynamicCache that is offloaded; expected"),
        "cut": (cut, "only the last"),
    }


@pytest.mark.parametrize(
    "name",
    "layers heads size dtype batch ragged long static offloaded cut".split(),
)
def test_refused_caches(name, each_engine):
    """Before anything is changed."""
    cache, message = refused_caches()[name]
    model = tiny_model("mistral-window" if name == "cut" else "llama", 0)
    ids = texts(2, 28 if name == "cut" else 32)
    before = [layer.keys for layer in getattr(cache, "layers", [])]
    with pytest.raises(ValueError, match=message):
        generate(model, ids, past_key_values=cache, **SETTINGS)
    assert all(a is b.keys for a, b in zip(before, getattr(cache, "layers", [])))


def test_new_tokens_alone_are_refused(each_engine):
    """Transformers takes them with a mask of the whole text."""
    model, ids = tiny_model("llama", 0), texts(2)
    cache = filled(model, ids)
    for way in (generate, lambda m, *a, **k: m.generate(*a, custom_generate=generate, **k)):
        for mask in (torch.ones(2, 31, dtype=torch.int64), torch.arange(31).expand(2, 31) > 2):
            with pytest.raises(
                ValueError, match=r"attention_mask has shape .2, 31.; expected .2, 3"
            ):
                way(
                    model,
                    texts(2, 3),
                    attention_mask=mask.long(),
                    past_key_values=cache,
                    **SETTINGS,
                )


def test_longrope_forgets_where_its_factors_switch(each_engine):
    """A cache from before is used up to there, and what comes out beyond is empty."""
    model = tiny_model("phi3-longrope", 2)
    switch = model.config.rope_parameters["original_max_position_embeddings"]
    ids, cache, kept = texts(), DynamicCache(), []
    while ids.shape[1] < switch + 30:
        fresh = model.generate(ids, attention_mask=ones(ids), **(SETTINGS | dict(max_new_tokens=5)))
        found = generate(
            model,
            ids,
            attention_mask=ones(ids),
            past_key_values=cache,
            **(SETTINGS | dict(max_new_tokens=5)),
        )
        assert torch.equal(found, fresh)
        kept.append(cache.get_seq_length())
        assert kept[-1] == (found.shape[1] - 1 if found.shape[1] - 1 <= switch else 0)
        ids = longer(found)
    assert 0 in kept and max(kept) > 0

"""NoisyCollator: what becomes of a batch, for every layout and form of batch, and what a model
makes of it.
"""

import copy
import pickle

import pytest
import torch

from helpers.cases import assert_equal
from helpers.families import FAMILIES, VOCAB, tiny_model
from helpers.samples import NONE, Pad, flatten, sample, samples
from msn_ext import NoisyCollator, lowest_loss_starts
from msn_ext.families import TESTED
from msn_ext.training.attach import guess
from msn_ext.training.layouts import sample_bounds, unmark

LENGTH = 4  # of a segment, where nothing else is said
CONFIG = tiny_model("llama", 0).config


def annotated(*arguments, **settings) -> NoisyCollator:
    collator = NoisyCollator(*arguments, **{"seed": 5} | settings)
    collator.annotate = True
    return collator


def test_padding_belongs_to_no_sample():
    rows = samples(3)
    sizes = [len(row["input_ids"]) for row in rows]
    width = max(sizes)
    assert sample_bounds(Pad()(rows)).tolist() == [[i, 0, n] for i, n in enumerate(sizes)]
    assert sample_bounds(Pad("left")(rows)).tolist() == [
        [i, width - n, width] for i, n in enumerate(sizes)
    ]
    batch = Pad()(rows)
    del batch["attention_mask"]
    assert sample_bounds(batch).tolist() == [[i, 0, width] for i in range(3)]


def test_packed_samples_are_told_apart():
    rows = samples(3)
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    ends = sizes.cumsum(0)
    expected = [[0, int(end - n), int(end)] for end, n in zip(ends, sizes)]
    batch = flatten(rows)
    assert sample_bounds(batch).tolist() == expected
    bounds = torch.cat([ends.new_zeros(1), ends]).int()
    by_bounds = {"input_ids": batch["input_ids"], "cu_seq_lens_q": bounds}
    assert sample_bounds(by_bounds).tolist() == expected
    two = {
        name: torch.cat([x, x]) for name, x in batch.items()
    }  # two packed rows, the second with padding
    two["attention_mask"] = torch.ones_like(two["input_ids"])
    two["attention_mask"][1, -3:] = 0
    shortened = [[1, begin, min(end, int(ends[-1]) - 3)] for _, begin, end in expected]
    assert sample_bounds(two).tolist() == expected + shortened


@pytest.mark.parametrize("inner", [Pad(), Pad("left"), flatten], ids=["right", "left", "packed"])
def test_replaced_tokens_are_noise_and_nothing_else_changes(inner):
    rows = samples(8)
    clean, noisy = inner(rows), annotated(inner, segments=2)(rows)
    depth, before = noisy.pop("noise_depth"), noisy.pop("noise_before")
    assert set(noisy) == set(clean)
    columns = torch.arange(depth.shape[1]).expand_as(depth)
    assert_equal(before, torch.where(depth > 0, columns - 1, -1))
    for name in set(clean) - {"input_ids"}:
        assert_equal(noisy[name], clean[name])
    assert_equal(noisy["input_ids"][depth == 0], clean["input_ids"][depth == 0])
    assert (clean["labels"][depth > 0] != NONE).all()
    segments = (depth == 1).sum()
    assert segments == 16 and sorted(depth[depth > 0].tolist()) == sorted([1, 2, 3, 4] * 16)
    assert (noisy["input_ids"] != clean["input_ids"]).sum() > 40
    for row, begin, end in sample_bounds(clean).tolist():
        for at in (depth[row, begin:end] > 0).nonzero()[:, 0].tolist():
            assert (
                noisy["input_ids"][row, begin + at] in clean["input_ids"][row, begin : begin + at]
            )


def test_the_batch_of_the_inner_collator_is_left_alone():
    kept = []
    inner = Pad()

    def keeping(rows):
        kept.append(inner(rows))
        return kept[-1]

    NoisyCollator(keeping)(rows := samples(4))
    for name, x in inner(rows).items():
        assert_equal(kept[0][name], x)


def test_short_responses_become_noise_as_a_whole():
    row = sample(20, 18)
    depth = annotated(Pad())([row, sample(20, 19), sample(9, 9)])["noise_depth"]
    assert depth[0].tolist() == [0] * 18 + [1, 2]
    assert depth[1].tolist() == [0] * 19 + [1]
    assert depth[2].sum() == 0


def test_several_turns_all_get_noise():
    row = sample(60, 5)
    row["labels"][20:40] = NONE
    collator, seen = annotated(Pad(), segments=1), torch.zeros(60, dtype=torch.int64)
    for epoch in range(300):
        collator.set_epoch(epoch)
        seen += collator([row])["noise_depth"][0] > 0
    assert seen[:5].sum() == seen[20:40].sum() == 0
    assert (seen[5:20] > 0).all() and (seen[40:] > 0).all()


def test_kept_tokens_stay_and_are_not_drawn():
    rows = samples(20)
    kept = (5, 6, 7)
    clean, noisy = Pad()(rows), NoisyCollator(Pad(), segments=3, keep_token_ids=kept, seed=0)(rows)
    special = torch.isin(clean["input_ids"], torch.tensor(kept))
    assert_equal(noisy["input_ids"][special], clean["input_ids"][special])
    assert not torch.isin(noisy["input_ids"][~special], torch.tensor(kept)).any()


@pytest.mark.parametrize("content", ["ahead", "mixed", "random"])
def test_content_comes_from_the_text_or_the_vocabulary(content):
    rows = [sample(40, 10, vocabulary=VOCAB, seed=i) for i in range(50)]
    noisy = annotated(Pad(), content=content, segments=3, config=CONFIG)(rows)
    special = noisy["input_ids"][noisy["noise_depth"] > 0] < 3  # the samples have none of these
    share = special.float().mean().item() * VOCAB / 3
    assert share == pytest.approx(
        {"ahead": 0.0, "mixed": 0.5, "random": 1.0}[content], abs=0.25 if content != "ahead" else 0
    )


@pytest.mark.parametrize("layout", ["replace", "branch"])
def test_a_token_is_all_of_the_noise(layout):
    """At the places that other content has, and there alone."""
    rows, shape = samples(8), dict(segments=3, layout=layout, config=CONFIG)
    masked, drawn = (annotated(Pad(), content=content, **shape)(rows) for content in (23, "ahead"))
    noise = masked["noise_depth"] > 0
    assert_equal(masked["noise_depth"], drawn["noise_depth"])
    assert (masked["input_ids"][noise] == 23).all() and noise.any()
    assert_equal(masked["input_ids"][~noise], drawn["input_ids"][~noise])


def noise_of(collator, rows) -> list:
    batch = collator(rows)
    return [
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]


def test_noise_depends_on_seed_epoch_and_sample_alone():
    rows = samples(12)
    collator = NoisyCollator(Pad(), seed=1)
    first = noise_of(collator, rows)
    assert noise_of(collator, rows) == first
    assert noise_of(collator, rows[::-1]) == first[::-1]
    assert noise_of(NoisyCollator(Pad("left", to=99), seed=1), rows) == first
    collator.set_epoch(1)
    second = noise_of(collator, rows)
    assert sum(a != b for a, b in zip(first, second)) > 9
    other = noise_of(NoisyCollator(Pad(), seed=2), rows)
    assert sum(a != b for a, b in zip(first, other)) > 9
    assert sum(a != b for a, b in zip(second, other)) > 9  # seed 1, epoch 1 is not seed 2, epoch 0
    torch.manual_seed(77)
    default = noise_of(NoisyCollator(Pad()), rows)
    assert default == noise_of(NoisyCollator(Pad(), seed=77), rows)


@pytest.mark.parametrize(
    "workers, options",
    [
        (1, {}),
        (2, {}),
        (2, {"persistent_workers": True}),
        (2, {"multiprocessing_context": "spawn"}),
    ],
)
def test_noise_does_not_depend_on_workers(workers, options):
    """Workers that live on learn of a new epoch, too."""
    rows = samples(10)

    def epochs(**settings) -> list:
        collator = NoisyCollator(Pad(to=40), seed=1)
        loader = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=collator, **settings)
        seen = []
        for epoch in range(3):
            collator.set_epoch(epoch)
            seen.append(torch.cat([batch["input_ids"] for batch in loader]).tolist())
        return seen

    alone = epochs()
    assert alone[0] != alone[1] != alone[2]
    assert epochs(num_workers=workers, **options) == alone


def test_paused_is_the_inner_collator():
    rows, inner = samples(4), Pad()
    collator = NoisyCollator(inner)
    with collator.paused():
        for name, x in inner(rows).items():
            assert_equal(collator(rows)[name], x)
    assert not torch.equal(collator(rows)["input_ids"], inner(rows)["input_ids"])


def test_workers_that_live_on_are_paused_too():
    rows = samples(8, VOCAB)
    collator = NoisyCollator(Pad(), seed=1)
    loader = torch.utils.data.DataLoader(
        rows, 4, collate_fn=collator, num_workers=1, persistent_workers=True
    )
    assert any(
        (batch["input_ids"] != clean["input_ids"]).any()
        for batch, clean in zip(loader, (Pad()(rows[:4]), Pad()(rows[4:])))
    )
    with collator.paused():
        for batch, clean in zip(loader, (Pad()(rows[:4]), Pad()(rows[4:])), strict=True):
            assert_equal(batch["input_ids"], clean["input_ids"])


def test_a_batch_stays_what_it_was():
    """Such as a BatchEncoding, which goes to a device as a whole."""
    from transformers import BatchEncoding

    rows = samples(3, VOCAB)
    for layout in ("replace", "branch"):
        collator = NoisyCollator(
            lambda rows: BatchEncoding(Pad()(rows)), layout=layout, seed=1, config=CONFIG
        )
        batch = collator(rows)
        assert isinstance(batch, BatchEncoding)
        plain = NoisyCollator(Pad(), layout=layout, seed=1, config=CONFIG)(rows)
        assert set(batch.to("cpu")) == set(plain)
        for name, x in plain.items():
            assert_equal(batch[name], x)


def test_a_collator_can_be_pickled_and_copied():
    rows = samples(4)
    collator = NoisyCollator(Pad(), seed=1, layout="branch", segments=3, config=CONFIG)
    for twin in (pickle.loads(pickle.dumps(collator)), copy.deepcopy(collator)):
        for name, x in collator(rows).items():
            assert_equal(twin(rows)[name], x)


def loss_sum(model, batch) -> torch.Tensor:
    """Cross-entropy summed over the labels, in the model's dtype (transformers takes its own in
    float32).
    """
    batch = dict(batch)
    labels = batch.pop("labels")[:, 1:]
    return torch.nn.functional.cross_entropy(
        model(**batch).logits[:, :-1][labels != NONE], labels[labels != NONE], reduction="sum"
    )


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


ROUNDING = ("gemma2", "gemma3_text", "deepseek_v2", "deepseek_v3")  # compute a part in float32


def close(got, expected, config) -> None:
    """To the last digits; where a part of the model computes in float32, to its last ones."""
    rounds = config._attn_implementation == "eager" or config.model_type in ROUNDING
    tolerance = 2e-5 if rounds else 1e-10
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


FORMS = {"right": Pad(), "packed": flatten}
ALL = [name for name in FAMILIES if name != "phi3-longrope"]


@pytest.mark.parametrize(
    "attention, form", [("sdpa", "right"), ("sdpa", "packed"), ("eager", "right")]
)
@pytest.mark.parametrize("family", ALL)
def test_the_clean_part_is_as_without_branches(family, attention, form):
    """Logits, loss and gradients, in float64."""
    model = tiny_model(family, 1)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{family} has no sdpa")
    model.set_attn_implementation(attention)
    rows = samples(3, VOCAB)
    batch = annotated(FORMS[form], layout="branch", segments=5, config=model.config)(rows)
    depth, _ = unmark(batch, model.config, LENGTH)
    inner = FORMS[form](rows)
    width = inner["input_ids"].shape[1]
    assert_equal(batch["input_ids"][:, :width], inner["input_ids"])
    assert_equal(batch["labels"][:, :width], inner["labels"])
    assert (depth > 0).sum() > 40 and depth[:, :width].sum() == 0

    logits = model(**batch).logits
    alone = [Pad()([row]) for row in rows]
    for (row, begin, end), one in zip(sample_bounds(inner).tolist(), alone):
        close(logits[row, begin:end], model(**one).logits[0], model.config)
    batch["labels"][:, width:] = NONE  # branches are there, and count nothing
    loss, expected = loss_sum(model, batch), sum(loss_sum(model, one) for one in alone)
    close(loss, expected, model.config)
    close(gradients(model, loss / 50), gradients(model, expected / 50), model.config)


@pytest.mark.parametrize("family", ALL)
def test_a_branch_is_the_paper_s_sample_up_to_its_end(family):
    """The same noise in place gives the same logits there, and both are asked for the same clean
    tokens.
    """
    model = tiny_model(family, 2)
    rows = samples(2, VOCAB, seed=3)
    clean = Pad()(rows)
    width = clean["input_ids"].shape[1]
    batch = annotated(Pad(), layout="branch", segments=6, config=model.config)(rows)
    depth, before = unmark(batch, model.config, LENGTH)
    logits = model(**batch).logits
    segments = (depth == 1).nonzero().tolist()
    assert len(segments) == 12
    for row, at in segments:
        start, size = int(batch["position_ids"][row, at]), 4
        assert before[row, at : at + size].tolist() == [start - 1, at, at + 1, at + 2]
        placed = clean["input_ids"][row].clone()
        placed[start : start + size] = batch["input_ids"][row, at : at + size]
        real = int(clean["attention_mask"][row].sum())
        said = model(input_ids=placed[None, :real]).logits[0]
        size = min(size, real - start)
        close(logits[row, at : at + size], said[start : start + size], model.config)
        asked = clean["labels"][row, start + 1 : start + 1 + size].tolist() + [NONE] * (
            size + 1 - (real - start)
        )
        asked = [x if start + 1 + i < real else NONE for i, x in enumerate(asked)]
        assert batch["labels"][row, at + 1 : at + 1 + size].tolist() == asked[:size]
    assert (batch["labels"][:, width] == NONE).all()


def test_a_wrong_mask_would_be_seen():
    """Negative control: with plain causal attention the clean part stays, the branches do not."""
    model = tiny_model("llama", 1)
    rows = samples(2, VOCAB)
    batch = NoisyCollator(Pad(), layout="branch", segments=3, config=model.config, seed=0)(rows)
    right = model(**batch).logits
    total = batch["input_ids"].shape[1]
    wrong = model(
        **batch | {"attention_mask": torch.ones(total, total).tril().bool().expand(2, 1, -1, -1)}
    ).logits
    width = len(rows[0]["input_ids"])
    assert not torch.allclose(right[0, width:-1], wrong[0, width:-1], atol=1e-3)


@pytest.mark.parametrize("layout", ["replace", "branch"])
def test_own_guesses_begin_wrong_and_go_on_as_the_model_does(layout):
    """The first is the likeliest after the clean text that is not right, the others the likeliest
    after the drawn noise.
    """
    model = tiny_model("llama", 4)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    rows = samples(4, VOCAB)
    for row in rows:  # what the model says is sometimes right
        said = model(input_ids=row["input_ids"][None]).logits[0].argmax(-1)
        row["input_ids"][15] = said[14]
        row["labels"][15] = said[14]
    batch = annotated(
        Pad(),
        layout=layout,
        segments=2 if layout == "replace" else 9,
        content="self",
        config=model.config,
    )(rows)
    depth, before = unmark(batch, model.config, LENGTH)
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    found = guess(model, batch, depth, before, torch.empty(0, dtype=torch.int64))
    assert_equal(found[depth == 0], batch["input_ids"][depth == 0])
    seconds = 0
    for row, at in depth.nonzero().tolist():
        if depth[row, at] > 1:
            assert found[row, at] == logits[row, at - 1].argmax()
            continue
        place = int(batch["position_ids"][row, at]) if layout == "branch" else at
        order = logits[row, place - 1].argsort(descending=True)[:2].tolist()
        right = int(rows[row]["input_ids"][place])
        assert found[row, at] == (order[1] if order[0] == right else order[0]) != right
        seconds += order[0] == right
    assert seconds, "the likeliest was right nowhere: nothing was tested"


def test_kept_tokens_are_no_guesses():
    model, rows = tiny_model("llama", 4), samples(4, VOCAB)
    batch = annotated(Pad(), segments=3, content="self", config=model.config)(rows)
    depth, before = unmark(batch, model.config, LENGTH)
    keep = torch.arange(0, VOCAB, 2)
    usual, found = (guess(model, batch, depth, before, k)[depth > 0] for k in (keep[:0], keep))
    assert (usual % 2 == 0).any() and not (found % 2 == 0).any()


def test_branches_without_any_response():
    batch = NoisyCollator(Pad(), layout="branch", segments=3, config=CONFIG)(
        [sample(9, 9), sample(7, 7)]
    )
    assert batch["input_ids"].shape == (2, 10) and (batch["labels"] == NONE).all()
    assert torch.isfinite(tiny_model("llama", 1)(**batch).logits).all()


def test_the_lowest_loss_is_found():
    model = tiny_model("llama", 3)
    rows = [*samples(7, VOCAB), sample(12, 10)]
    for collator, batch_size in ((None, 1), (Pad(), 3), (Pad("left"), 2)):
        if isinstance(collator, Pad) and collator.side == "left":
            continue  # rotary positions differ by a shift, losses in the last digits
        starts = lowest_loss_starts(model, rows, collator, batch_size=batch_size, progress=False)
        assert len(starts) == 8
        for row, start in zip(rows, starts.values()):
            said = model(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
            loss = [0.0, *(-said.gather(1, row["input_ids"][1:, None])[:, 0]).tolist()]
            places = [at for at in range(1, len(loss) - 3) if row["labels"][at] != NONE] or [10]
            assert start == min(places, key=lambda at: sum(loss[at : at + 4]))
    noisy = annotated(Pad(), location=starts)(rows)
    assert [int((depth == 1).nonzero()[0, 0]) for depth in noisy["noise_depth"]] == list(
        starts.values()
    )
    packed = annotated(flatten, location=starts)(rows)
    found = (packed["noise_depth"] == 1).nonzero()[:, 1] - sample_bounds(flatten(rows))[:, 1]
    assert found.tolist() == list(starts.values())
    with pytest.warns(UserWarning, match="location knows no start"):
        unknown = annotated(Pad(), location=type(starts)())(rows)
    assert (unknown["noise_depth"] == 1).sum() == 8


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(length=0), "length is 0; expected 1 to 64"),
        (dict(length=4.0), "length is 4.0"),
        (dict(segments=257), "segments is 257; expected 1 to 256"),
        (dict(layout="beside"), "layout is 'beside'; expected 'replace' or 'branch'"),
        (
            dict(content="own"),
            "content is 'own'; expected one of 'ahead', 'random', 'mixed', 'self', or a token id",
        ),
        (dict(location="ppl"), "location is 'ppl'; expected 'random' or what lowest_loss_starts"),
        (dict(layout="branch"), "config is None; layout='branch' needs"),
        (dict(content="random"), "config is None; content='random' needs"),
        (dict(content=-1), "content is -1; expected one of"),
        (dict(content=True), "content is True; expected one of"),
        (dict(content=VOCAB, config=CONFIG), f"content is {VOCAB}; expected a token below {VOCAB}"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NoisyCollator(Pad(), **settings)


def test_wrong_batches_are_refused():
    with pytest.raises(ValueError, match="inner is None; expected a collator"):
        NoisyCollator(None)
    with pytest.raises(
        ValueError, match="inner gave a batch without labels, but input_ids; expected labels"
    ):
        NoisyCollator(lambda rows: {"input_ids": torch.zeros(1, 4)})([])
    with pytest.raises(ValueError, match="inner gave a list"):
        NoisyCollator(lambda rows: [1])([])
    with pytest.raises(ValueError, match="content='self' needs the model"):
        NoisyCollator(Pad(), content="self")(samples(1))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels has shape \[1, 3\]; expected that of input_ids"):
        NoisyCollator(lambda rows: {"input_ids": ids, "labels": ids[:, 1:]})([])
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 1, 4, 4\]"):
        NoisyCollator(
            lambda rows: {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(1, 1, 4, 4)}
        )([])
    with pytest.raises(ValueError, match=r"position_ids has shape \[3, 1, 4\]"):
        NoisyCollator(
            lambda rows: {"input_ids": ids, "labels": ids, "position_ids": torch.ones(3, 1, 4)}
        )([])


def test_tensors_that_branches_would_lengthen_are_refused():
    collator = NoisyCollator(
        lambda rows: Pad()(rows) | {"token_type_ids": Pad()(rows)["labels"]},
        layout="branch",
        config=CONFIG,
    )
    with pytest.raises(
        ValueError, match="does not know what token_type_ids .* would be at the branches"
    ):
        collator(samples(2))


def test_gaps_in_a_mask_are_refused_with_branches():
    batch = Pad()(samples(2, VOCAB))
    batch["attention_mask"][1, 5] = 0
    with pytest.raises(ValueError, match="attention_mask has a gap in row 1"):
        NoisyCollator(lambda _: batch, layout="branch", config=CONFIG)([])
    NoisyCollator(lambda _: batch)([])


def test_models_that_cannot_take_branches_are_refused():
    config = copy.deepcopy(CONFIG)
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' does not take"):
        NoisyCollator(Pad(), layout="branch", config=config)
    config = copy.deepcopy(CONFIG)
    config.model_type = "mpt"
    with pytest.raises(ValueError, match="not known of mpt; expected one of"):
        NoisyCollator(Pad(), layout="branch", config=config)


def test_every_family_that_may_have_branches_is_tested():
    assert {tiny_model(name, 0).config.model_type for name in ALL} == TESTED

"""Steps in two or three calls of C++ are the steps that ops make one by one: the same text, the
same tokens a pass, the same tables afterwards; and what they are not made for goes by ops.
"""

import random

import pytest
import torch

from helpers.drafters import random_habits
from helpers.families import tiny_model
from helpers.layers import needs_screens
from helpers.noise import gated
from msn_ext import _C, BestFirst, Corpus, generate, prepare
from msn_ext.decoding.decoder import Decoder
from msn_ext.decoding.forward import packed as packing
from msn_ext.decoding.forward.families import plan_for
from msn_ext.decoding.forward.native import NativeForward
from msn_ext.decoding.native_steps import NativeSteps
from msn_ext.decoding.sizing import StepTimes
from msn_ext.gates import mark_gated

VOCABULARY, NEW = 61, 40
SIZES = dict(vocab_size=VOCABULARY, hidden_size=24, intermediate_size=40, head_dim=8)
FLAT = {1: 1.0, 8: 1.1, 64: 1.6, 512: 9.0}  # seconds of a step: sizes change with the text


def made(dtype=torch.float32, **settings):
    model = tiny_model("llama", 3, torch.float32, **SIZES, **settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.4 if weight.dim() > 1 else 1)  # so that texts repeat themselves
    return model.to(dtype)


def corpus() -> Corpus:
    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(0, VOCABULARY, (20, 30), generator=generator)
    return Corpus.build(texts, VOCABULARY, progress=False)


DRAFTERS = {
    **{f"{nodes} nodes": lambda nodes=nodes: BestFirst(nodes) for nodes in (1, 2, 8, 65, 256)},
    "by itself": lambda: BestFirst(times=StepTimes(FLAT, "cpu")),
    "shallow": lambda: BestFirst(16, max_depth=2),
    "of its root": lambda: BestFirst(16, max_depth=0),
    "no foresight": lambda: BestFirst(16, foresight=0.0),
    "one source": lambda: BestFirst(16, sources=("adjacency",)),
    "no adjacency": lambda: BestFirst(16, sources=("denoised", "suffix")),
    "a corpus": lambda: BestFirst(12, corpus=corpus()),
    "habits": lambda: BestFirst(12, habits=random_habits(random.Random(6), VOCABULARY)),
}
PROMPTS = [[5, 9, 5, 9, 5, 9, 5], [7, 3, 11] * 5, [2] * 4 + [8, 1, 8], [13]]


def answers(model, rows: int, draft, **options):
    """Decode a left-padded batch."""
    longest = max(map(len, PROMPTS[:rows]))
    pads = [longest - len(prompt) for prompt in PROMPTS[:rows]]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, PROMPTS)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    settings = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=[17, 23])
    return generate(
        model,
        ids,
        attention_mask=mask,
        draft=draft,
        engine="native",
        return_dict_in_generate=True,
        **(settings | options),
    )


@pytest.fixture
def steps(monkeypatch) -> list:
    """Return what has run a step in C++ so far, a step an entry."""
    seen, step = [], NativeSteps.step

    def counted(self, last_root):
        seen.append(self)
        return step(self, last_root)

    monkeypatch.setattr(NativeSteps, "step", counted)
    return seen


def by_ops(monkeypatch, *args, **options):
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_steps_in_cpp", lambda self: None)
        return answers(*args, **options)


def expect_same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.accept_lengths, expected.accept_lengths, strict=True):
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", DRAFTERS)
def test_steps_are_those_of_the_ops(name, rows, steps, monkeypatch):
    model, ours, theirs = made(), DRAFTERS[name](), DRAFTERS[name]()
    found = answers(model, rows, ours)
    passes = len(steps)
    assert passes
    expect_same(found, by_ops(monkeypatch, model, rows, theirs))
    assert len(steps) == passes, "the others went by ops"
    for table, expected in zip(tables(ours), tables(theirs), strict=True):
        assert torch.equal(table, expected)
    again = answers(model, rows, ours)  # what is remembered from call to call is used
    expect_same(again, by_ops(monkeypatch, model, rows, theirs))
    gained = max(int(row.max()) for row in found.accept_lengths)
    assert (gained > 1) == (name not in ("1 nodes", "of its root")), "guesses come true"


SAMPLED = {
    "plain": dict(top_k=0),
    "top-k": dict(top_k=9, temperature=0.6),
    "top-p": dict(top_k=0, top_p=0.8),
    "all": dict(top_k=12, top_p=0.9, min_p=0.02, temperature=1.3),
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("settings", SAMPLED)
@pytest.mark.parametrize("name", ["8 nodes", "65 nodes", "habits", "none", "tails"])
def test_draws_are_those_of_the_ops(name, settings, rows, steps, monkeypatch):
    """With the same seed, and with another one other draws."""
    model = made()
    if name == "tails":
        model = gated(model)
        mark_gated(model.peft_config["default"], 2, 5)
    made_by = {"none": lambda: "none", "tails": lambda: BestFirst(12), **DRAFTERS}[name]
    ours, theirs = made_by(), made_by()
    options = dict(do_sample=True, **SAMPLED[settings])
    torch.manual_seed(3)
    found = answers(model, rows, ours, **options)
    passes = len(steps)
    assert passes
    torch.manual_seed(3)
    expect_same(found, by_ops(monkeypatch, model, rows, theirs, **options))
    assert len(steps) == passes, "the others went by ops"
    if name != "none":
        for table, expected in zip(tables(ours), tables(theirs), strict=True):
            assert torch.equal(table, expected)
    torch.manual_seed(4)
    assert not torch.equal(answers(model, rows, ours, **options).sequences, found.sequences)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("nodes", [4, 8, 64, 256, None])
@pytest.mark.parametrize("content", [5, "ahead"])
def test_tails(content, nodes, rows, steps, monkeypatch):
    """Noise rows below some nodes, where the model has a gated adapter."""
    model = gated(made())
    mark_gated(model.peft_config["default"], 2, content)
    ours, theirs = (BestFirst(nodes, times=StepTimes(FLAT, "cpu")) for _ in range(2))
    for _ in range(2):
        found = answers(model, rows, ours)
        passes = len(steps)
        expect_same(found, by_ops(monkeypatch, model, rows, theirs))
        assert passes and len(steps) == passes
        for table, expected in zip(tables(ours), tables(theirs), strict=True):
            assert torch.equal(table, expected)
        assert ours.tails is not None and theirs.tails is not None
        assert torch.equal(ours.tails.factors, theirs.tails.factors)
    if nodes != 4:  # which has none
        without = answers(model, rows, BestFirst(nodes, times=StepTimes(FLAT, "cpu"), tails=False))
        assert torch.equal(without.sequences, found.sequences)


def tables(drafter: BestFirst) -> list[torch.Tensor]:
    assert drafter.suffix is not None
    suffix = drafter.suffix
    known = drafter.denoised.guesses, drafter.adjacency.adjacency, suffix.suffixes, suffix.indexed
    return [table.clone() for table in known]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("draft", ["none", "auto"])
def test_texts(draft, dtype, steps, monkeypatch):
    model = made(dtype)
    for rows in 1, 3:
        found = answers(model, rows, draft)
        assert steps
        expected = by_ops(monkeypatch, model, rows, "none")
        assert torch.equal(found.sequences, expected.sequences)


@needs_screens
@pytest.mark.parametrize("draft", ["none", "auto"])
def test_a_screened_head(draft, steps, monkeypatch):
    expected = by_ops(monkeypatch, made(), 3, "none")
    monkeypatch.setattr(packing, "SCREENED", 0)
    found = answers(made(), 3, draft)
    assert steps and torch.equal(found.sequences, expected.sequences)


def test_int8_streams_and_criteria(steps, monkeypatch):
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.tokens.append(None)

    def stop(ids, scores):
        return torch.tensor([len(row) > 33 for row in ids])

    model, told = prepare(made(), weights="int8"), []
    for run in answers, lambda *args, **options: by_ops(monkeypatch, *args, **options):
        streamer = Streamer()
        out = run(model, 1, BestFirst(8), streamer=streamer, stopping_criteria=[stop])
        told.append((streamer.tokens, out.sequences.tolist()))
    assert steps and told[0] == told[1] and len(told[0][1][0]) == 34


def test_what_goes_by_ops(steps):
    """What looks at a step's parts: processors of texts, kept logits, drafters of one's own."""

    class Own(BestFirst):
        pass

    model = made()
    for options in (
        dict(repetition_penalty=1.2),
        dict(do_sample=True, repetition_penalty=1.2),
        dict(do_sample=True, no_repeat_ngram_size=3),
        dict(output_logits=True),
        dict(draft=Own(8)),
        dict(draft="jacobi"),
        dict(draft="paper"),
    ):
        answers(model, 1, **(dict(draft=BestFirst(8)) | options))
        assert not steps, options
    answers(made(torch.float64), 1, BestFirst(8))
    assert not steps, "logits in float64"


# ---- the binding ---------------------------------------------------------------------------------


class Bound:
    """What the extension's class takes, of two rows."""

    def __init__(self):
        self.forward = NativeForward(packing.PackedPlan(plan_for(made()), "float32"), 2)
        drafter = BestFirst(8)
        drafter.start(2, VOCABULARY, torch.device("cpu"))
        long = dict(dtype=torch.int64)
        history = torch.zeros(2, 300, **long)
        self.text = dict(
            history=history,
            lengths=torch.ones(2, **long),
            remaining=torch.full((2,), 9),
            last_position=torch.full((2,), 40),
            ends=torch.tensor([17]),
            gained=torch.zeros(2, 256, **long),
            status=torch.zeros(3, 2, **long),
            accept_length=torch.zeros(2, **long),
        )
        self.known = drafter.tables(history)
        self.numbers = VOCABULARY, 20, 0.05, 1, -1

    def make(self):
        return _C.NativeSteps(self.forward.bound, self.text, self.known, *self.numbers)


@pytest.mark.parametrize("which", ["text", "known"])
def test_wrong_tensors_are_refused_by_name(which):
    names = list(vars(Bound())[which])
    for name in names:
        for wrong in (lambda x: x.float().bool(), lambda x: x[..., :0].unsqueeze(0)):
            bound = Bound()
            vars(bound)[which][name] = wrong(vars(bound)[which][name])
            with pytest.raises(ValueError, match=name):
                bound.make()
        bound = Bound()
        del vars(bound)[which][name]
        with pytest.raises(ValueError, match=f"{name} is missing"):
            bound.make()


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((0, 20, 0.05, 1, -1), "vocabulary is 0"),
        ((61, 257, 0.05, 1, -1), "max_depth is 257"),
        ((61, 20, 1.5, 1, -1), "foresight is 1.5"),
        ((61, 20, 0.05, 0, -1), "length is 0"),
        ((61, 20, 0.05, 1, 61), "noise is 61"),
    ],
)
def test_wrong_numbers_are_refused_by_name(numbers, message):
    bound = Bound()
    bound.numbers = numbers
    with pytest.raises(ValueError, match=message):
        bound.make()


def test_nodes_that_were_not_drafted_are_refused():
    bound = Bound()
    bound.forward.begin_step(64)
    steps = bound.make()
    with pytest.raises(ValueError, match="nodes is 2; expected 1 to 1"):
        steps.check(2, 0, 1)
    with pytest.raises(ValueError, match="nodes is 257"):
        steps.draft(257, [0])
    with pytest.raises(ValueError, match="row is 2"):
        steps.draft(4, [2])
    assert steps.draft(4, []) == []
    expected = steps.draft(4, [0, 1])
    assert len(expected) == 4 and expected[0] == 0.0
    with pytest.raises(ValueError, match="nodes is 5; expected 1 to 4"):
        steps.check(5, 0, 1)
    with pytest.raises(ValueError, match="tails is 1; expected 0 to 0"):
        steps.check(4, 1, 1)
    steps.check(4, 0, 1)
    gained = bound.text["status"][0]
    assert gained.min() > 0 and torch.equal(bound.text["lengths"], 1 + gained)
    assert torch.equal(bound.text["remaining"], 9 - gained)


def test_steps_by_targets_are_refused_where_they_do_not_fit():
    bound = Bound()
    bound.forward.begin_step(64)
    steps = bound.make()
    steps.draft(4, [])
    targets = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="there is no step that was looked at"):
        steps.accept(targets)
    logits, positions = torch.zeros(2, 4, VOCABULARY), torch.zeros_like(targets)
    with pytest.raises(ValueError, match="nodes is 5; expected 1 to 4"):
        steps.look(5, 0, logits, positions, 1)
    with pytest.raises(ValueError, match="logits"):
        steps.look(4, 0, logits[:, :3].contiguous(), positions, 1)
    with pytest.raises(ValueError, match="positions"):
        steps.look(4, 0, logits, positions.int(), 1)
    steps.look(4, 0, logits, positions, 1)
    assert bool(logits.any()) and positions[:, 0].tolist() == [0, 0]
    with pytest.raises(ValueError, match="targets"):
        steps.accept(targets[:, :3].contiguous())
    steps.accept(logits.argmax(-1))
    assert int(bound.text["status"][0].min()) > 0
    with pytest.raises(ValueError, match="there is no step that was looked at"):
        steps.accept(targets)


def test_there_is_nothing_to_draft_from():
    bound = Bound()
    bound.known = None
    with pytest.raises(ValueError, match="nothing to draft from"):
        bound.make().draft(4, [0])

"""Recorded steps give what steps one by one give: on a GPU as CUDA graphs, on the CPU on a tape
(tape.py).
"""

import logging

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import StoppingCriteriaList

from helpers import runners
from helpers.families import FAMILIES, LONGROPE_ERRS
from helpers.noise import gated_tiny
from helpers.runners import (
    DRAFTS,
    EndsAfter,
    ours,
    plain,
    prompts,
    sampled,
    tiny_model,
)
from helpers.tape import TapeBackend, TapeStep
from msn_ext import Draft, DraftTree, generate
from msn_ext.decoding import BestFirst, TreeDrafter, capture
from msn_ext.decoding.sizing import CAPTURED_SIZES
from msn_ext.tuning import ROUNDS, SIZES, measure_step_times

pytestmark = pytest.mark.usefixtures("tapes")  # steps on the CPU are recorded, too


SAMPLED = {
    "as it is": {},
    "penalised": dict(repetition_penalty=1.2, temperature=0.8),
    "usual": dict(temperature=0.7, top_k=20, top_p=0.9),
    "min_p": dict(min_p=0.05, temperature=1.5),
    "typical": dict(typical_p=0.8),
    "epsilon": dict(epsilon_cutoff=0.01),
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
def test_replayed_steps_give_plain_decodings_text(family, draft, tapes):
    """Token for token in float64: other prompts one after the other, batches of two sizes, an end
    of text.
    """
    model = tiny_model(family, 3)
    draft = DRAFTS[draft]()
    for seed, batch in ((0, 2), (1, 2), (2, 1), (3, 2), (4, 1)):
        # Gemma 2 in transformers' own attention gives NaN at padding (float64).
        ids, mask = prompts(seed, batch, length=8 + 3 * seed, padded=family != "gemma2")
        options = dict(max_new_tokens=30, eos_token_id=None)
        if seed == 3:
            options["eos_token_id"] = int(plain(model, ids, mask, **options)[0, ids.shape[1] + 5])
        want = plain(model, ids, mask, **options)
        assert torch.equal(ours(model, ids, mask, draft, **options), want)
    if isinstance(draft, str) or not hasattr(draft, "propose"):
        assert len(tapes) <= 3, "prompts that only differ in length share a decoder"
    assert sum(tape.replays for tape in tapes) > 10
    most = len(CAPTURED_SIZES) + 1  # each once, and one step more to see whether it waits
    assert all(len(tape.captures) <= tape.warm_ups <= most for tape in tapes)


@pytest.mark.parametrize("tails", [False, True])
def test_a_step_launches_little_beside_its_model(tails, tapes):
    """Counted as in docs/kernels.md: every operation that is no view is at most a launch; with
    tails no more of them than without.
    """
    if runners.where != "cpu":
        pytest.skip("counted on the tape")
    if tails:
        pytest.importorskip("peft")
    model, marks = gated_tiny("llama") if tails else tiny_model("llama", 3), []

    def mark(*_):
        mode = _get_current_dispatch_mode()
        if isinstance(mode, TapeStep):
            marks.append(len(mode.operations))

    base = model.get_base_model() if tails else model
    base.register_forward_pre_hook(mark)
    base.register_forward_hook(mark)
    drafter = BestFirst(16)
    ours(model, *prompts(0, 1), drafter, max_new_tokens=20)
    assert (drafter.tails is not None) == tails
    (captured,) = tapes[0].captures
    begin, end = marks
    names = [
        str(operation[0]) for operation in captured.operations[:begin] + captured.operations[end:]
    ]
    assert sum(name.startswith("msn_ext.") for name in names) == 9 and len(names) <= 14


def test_families_that_can_be_recorded(tapes):
    replays, differ = {}, set()
    for family in FAMILIES:
        if family == "phi3-longrope" and LONGROPE_ERRS:
            continue
        model = tiny_model(family, 1)
        ids, mask = prompts(
            5, 1 if family == "phi3-longrope" else 2, padded=family not in ("gemma2", "gemma3")
        )
        options = dict(max_new_tokens=40, eos_token_id=None)
        text = ours(model, ids, mask, "paper", **options)
        if not torch.equal(text, plain(model, ids, mask, **options)):
            differ.add(family)
        replays[family] = sum(tape.replays for tape in tapes)
        tapes.clear()
    assert not differ
    eager = {family for family, count in replays.items() if not count}
    # The host picks experts on a CPU; on a GPU that is for transformers to choose.
    experts = {"deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe"}
    # longrope changes what positions mean on the way.
    assert eager - experts == {"phi3-longrope"} & replays.keys()
    assert runners.where != "cpu" or experts <= eager


@pytest.mark.parametrize("settings", SAMPLED)
@pytest.mark.parametrize("draft", ["auto", "paper", "none"])
def test_sampled_steps_draw_what_steps_one_by_one_draw(draft, settings, tapes, monkeypatch):
    """Seed by seed in float64, from one recording; the same seed gives the same text again."""
    model, calls = tiny_model("llama", 3), [(seed, 1 + seed % 2) for seed in (0, 2, 1, 3, 2)]
    padded = (
        settings != "penalised"
    )  # which rows with padding tell apart: then it looks at the text itself

    def run():
        return [
            sampled(
                model, *prompts(batch, batch, padded=padded), draft, seed, **SAMPLED[settings]
            ).tolist()
            for seed, batch in calls
        ]

    recorded = run()
    assert len(tapes) == 2 and sum(tape.replays for tape in tapes) > 10
    monkeypatch.delitem(capture.BACKENDS, runners.where)
    assert run() == recorded
    assert recorded[0] != recorded[1] and recorded[1] == recorded[4]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_repetition_penalty_is_recorded(batch, tapes):
    """It asks only which tokens a text has. Prompts of other lengths use the same recording."""
    model = tiny_model("llama", 3)
    for seed in range(4):
        ids, mask = prompts(seed, batch, length=8 + 3 * seed, padded=False)
        options = dict(max_new_tokens=40, repetition_penalty=1.3, eos_token_id=None)
        assert torch.equal(
            ours(model, ids, mask, "auto", **options), plain(model, ids, mask, **options)
        )
    assert len(tapes) == 1 and tapes[0].replays > 10


def test_samplers_settings_are_not_mixed_up(tapes, monkeypatch):
    """A recording holds its temperature; greedy decoding in between has none."""
    model, (ids, mask) = tiny_model("llama", 3), prompts(0)
    want = plain(model, ids, mask, max_new_tokens=30)

    def run():
        return [
            sampled(model, ids, mask, "paper", 5, temperature=t).tolist()
            for t in (0.5, 2.0, 0.5, 2.0)
        ]

    recorded = run()
    for _ in range(2):
        assert torch.equal(ours(model, ids, mask, "paper", max_new_tokens=30), want)
    assert len(tapes) == 3 and all(tape.replays for tape in tapes)
    monkeypatch.delitem(capture.BACKENDS, runners.where)
    assert recorded == run() and recorded[0] == recorded[2] != recorded[1]


def test_a_draw_from_nan_is_an_error_and_no_wild_read(tapes):
    """The step under way when the host reads of it has to look up some token's embedding."""
    model, (ids, mask) = tiny_model("llama", 3), prompts(0)
    head = model.lm_head.weight.detach().clone()
    sampled(model, ids, mask, "paper", 0)
    sampled(model, ids, mask, "paper", 0)
    assert sum(tape.replays for tape in tapes)
    for _ in range(2):
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="probabilities for row 0 hold NaN"):
            sampled(model, ids, mask, "paper", 0)
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    assert sampled(model, ids, mask, "paper", 0).shape[1] == ids.shape[1] + 30


def test_stopping_criteria_end_a_row_where_they_would(tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0)
    criteria = StoppingCriteriaList([EndsAfter(ids.shape[1] + 17)])
    want = plain(model, ids, mask, max_new_tokens=40, stopping_criteria=criteria)
    assert torch.equal(
        ours(model, ids, mask, "auto", max_new_tokens=40, stopping_criteria=criteria), want
    )
    assert tapes[0].replays


def test_accept_lengths_and_streams_are_those_of_steps_one_by_one(tapes, monkeypatch):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0, batch=1)

    class Stream:
        def __init__(self):
            self.got = []

        def put(self, tokens):
            self.got.append(tokens.flatten().tolist())

        def end(self):
            self.got.append("end")

    results = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.delitem(capture.BACKENDS, runners.where)
        for _ in range(2):
            stream = Stream()
            out = ours(
                model,
                ids,
                mask,
                "paper",
                max_new_tokens=40,
                streamer=stream,
                return_dict_in_generate=True,
            )
            results.append((out.sequences.tolist(), out.accept_lengths[0].tolist(), stream.got))
    assert all(result == results[0] for result in results)
    assert tapes[0].replays


def test_what_cannot_be_recorded_is_decoded_step_by_step(tapes, caplog):
    class Listener(TreeDrafter):
        """Inherits from one that can be recorded, and asks the device."""

        def observe(self, verified):
            super().observe(verified)
            verified.accept_length.tolist()

    model = tiny_model("llama", 3)
    ids, mask = prompts(0)
    want = plain(model, ids, mask, max_new_tokens=20)
    with caplog.at_level(logging.INFO, "msn_ext"):
        assert torch.equal(
            ours(model, ids, mask, Listener(DraftTree.chain(3)), max_new_tokens=20), want
        )
        assert "Listener may ask the device" in caplog.text
        options = dict(no_repeat_ngram_size=3, max_new_tokens=20)
        assert torch.equal(
            ours(model, ids, mask, "auto", **options), plain(model, ids, mask, **options)
        )
        assert "NoRepeatNGramLogitsProcessor looks at the text before" in caplog.text
        options = dict(do_sample=True, eta_cutoff=0.01, max_new_tokens=5, pad_token_id=0)
        generate(model, ids, attention_mask=mask, draft="auto", **options)
        assert "EtaLogitsWarper, which is applied, has more than plain settings" in caplog.text
        generate(
            model,
            ids,
            attention_mask=mask,
            draft="auto",
            do_sample=True,
            top_h=0.5,
            max_new_tokens=5,
            pad_token_id=0,
        )
        assert "TopHLogitsWarper asks the device" in caplog.text
    assert not tapes


@pytest.mark.parametrize("seen", [True, False], ids=["in rehearsal", "while capturing"])
def test_a_step_that_asks_the_device_after_all_falls_back(tapes, caplog, monkeypatch, seen):
    if not seen:
        if runners.where != "cpu":
            pytest.skip("a failed capture leaves torch's generators of this process capturing")
        backend = capture.BACKENDS[runners.where]
        monkeypatch.setattr(backend, "rehearse", lambda self, step: (self.warm_up(step), None))
    model = tiny_model("llama", 3)
    ids, mask = prompts(0)
    forward = model.model.layers[0].mlp.forward
    monkeypatch.setattr(
        model.model.layers[0].mlp, "forward", lambda x: forward(x) if float(x.sum()) < 1e9 else x
    )
    want = plain(model, ids, mask, max_new_tokens=30)
    for _ in range(2):
        assert torch.equal(ours(model, ids, mask, "auto", max_new_tokens=30), want)
    assert "cannot be captured" in caplog.text and caplog.text.count("cannot be captured") == 1
    assert not any(tape.replays for tape in tapes)
    assert seen == ("it waits for the device" in caplog.text)


def test_tuning_measures_recorded_steps_where_decoding_takes_them(tapes):
    times = measure_step_times(tiny_model("llama", 3), context=32, progress=False)
    assert list(times) == list(SIZES) and all(times.values())
    assert len(tapes[0].captures) == tapes[0].warm_ups == len(SIZES), "each size is recorded once"
    assert tapes[0].replays == (ROUNDS - 1) * len(SIZES)


def test_a_tape_notices_what_a_graph_could_not_repeat():
    """Negative control of the tape: state that moves, and a question to the device."""
    state = [torch.zeros(2)]

    def moves():
        state[0] = state[0] + 1
        return state[0]

    recording = TapeBackend(None).capture(moves)
    for _ in range(3):
        recording.replay()
    assert recording.result.tolist() == [1, 1], "the old place was read each time"

    count = torch.zeros(2)
    recording = TapeBackend(None).capture(lambda: count.add_(1))
    assert count.tolist() == [0, 0], "recording runs nothing"
    for _ in range(3):
        recording.replay()
    assert count.tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="asks the device"):
        TapeBackend(None).capture(lambda: count.sum().item())


class OneDraft:
    """Counts up from the last token, in the same `Draft` and the same tensor at every pass."""

    max_depth, report, allocations = 3, None, 0

    def start(self, batch, vocabulary, device):
        self.wrong = torch.zeros(batch, dtype=torch.int64, device=device)  # passes
        self._up = torch.arange(1, 4, device=device)
        self._vocabulary = vocabulary
        self._tokens = torch.zeros(batch, 4, dtype=torch.int64, device=device)
        parents = torch.arange(-1, 3, dtype=torch.int32, device=device)
        self._draft = Draft.of(self._tokens, parents)

    def first(self, history, lengths):
        return history.new_empty(len(lengths), 0)

    def plan(self):
        return 4

    def propose(self, history, lengths):
        last = history.gather(1, lengths[:, None] - 1)
        self._tokens[:, 1:] = (last + self._up) % self._vocabulary
        return self._draft

    def observe(self, verified):
        tokens = verified.draft.tokens
        if tokens.shape[1] == 4:  # not the prompt's pass
            up = (tokens[:, :1] + self._up) % self._vocabulary
            self.wrong += (tokens[:, 1:] != up).any(1)

    def observe_step(self, report, nodes, gained, seconds):
        pass

    def forget(self):
        pass


@pytest.mark.parametrize("captured", [True, False])
def test_a_drafter_may_propose_the_same_draft_again(captured, tapes, monkeypatch):
    if not captured:
        monkeypatch.setenv("MSN_GRAPHS", "off")
    model, (ids, mask) = tiny_model("llama", 3), prompts(0)
    options = dict(max_new_tokens=30, eos_token_id=None)
    drafter = OneDraft()
    assert torch.equal(
        ours(model, ids, mask, drafter, **options), plain(model, ids, mask, **options)
    )
    assert not drafter.wrong.any(), "guesses that were made for an earlier text"
    assert (sum(tape.replays for tape in tapes) > 10) == captured

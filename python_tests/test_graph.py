"""Recorded steps give what steps one by one give: on a GPU as CUDA graphs, on the CPU on a tape
(tape.py).
"""

import contextlib
import gc
import itertools
import logging
import random
import weakref
from typing import ClassVar

import families
import pytest
import torch
from families import FAMILIES, VOCAB
from tape import Recorder, Recording
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import StoppingCriteria, StoppingCriteriaList

from msn_ext import DraftTree, generate
from msn_ext.decoding import BestFirst, TreeDrafter, graph, step
from msn_ext.decoding.budget import RECORDED as RECORDED_SIZES
from msn_ext.tuning import ROUNDS, SIZES, measure_step_times

DRAFTS = {
    "auto": lambda: "auto",
    "auto of 16": lambda: BestFirst(16),
    "paper": lambda: "paper",
    "a chain": lambda: DraftTree.chain(4),
    "none": lambda: "none",
}


class GpuRecorder(graph.Recorder):
    """Counts as the tape's does."""

    made: ClassVar[list] = []

    def __init__(self, device):
        super().__init__(device)
        self.recordings, self.warm_ups, self.replays = [], 0, 0
        GpuRecorder.made.append(self)

    def warm_up(self, step):
        self.warm_ups += 1
        return super().warm_up(step)

    def record(self, step):
        recording, recorder = super().record(step), self
        replay = recording.replay

        def counted():
            recorder.replays += 1
            replay()

        recording.replay = counted
        self.recordings.append(recording)
        return recording


@pytest.fixture(autouse=True)
def tapes(device, monkeypatch):
    """What was recorded; steps on the CPU are, too. Models and prompts are made on the device."""
    kind = Recorder if device == "cpu" else GpuRecorder
    monkeypatch.setitem(graph.RECORDERS, device, kind)
    monkeypatch.setattr(kind, "made", [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    global where
    where = device
    yield kind.made
    torch.set_num_threads(threads)


where = "cpu"


def tiny_model(family: str, seed: int):
    return families.tiny_model(family, seed).to(where)


def prompts(seed: int, batch: int = 2, length: int = 12, padded: bool = True):
    """Left-padded ids and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for b in range(1, batch * padded):
        mask[b, : 3 * b] = 0
    return ids.masked_fill(mask == 0, 0).to(where), mask.to(where)


def plain(model, ids, mask, **options):
    return model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)


def ours(model, ids, mask, draft, **options):
    return generate(
        model, ids, attention_mask=mask, draft=draft, do_sample=False, pad_token_id=0, **options
    )


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
    assert all(len(tape.recordings) <= tape.warm_ups <= len(RECORDED_SIZES) for tape in tapes)


def test_a_step_launches_little_beside_its_model(tapes):
    """As docs/kernels.md counts it; every operation that is no view is at most a launch."""
    if where != "cpu":
        pytest.skip("counted on the tape")
    model, marks = tiny_model("llama", 3), []

    def mark(*_):
        mode = _get_current_dispatch_mode()
        if isinstance(mode, Recording):
            marks.append(len(mode.operations))

    model.register_forward_pre_hook(mark)
    model.register_forward_hook(mark)
    ours(model, *prompts(0, 1), BestFirst(16), max_new_tokens=20)
    (recording,) = tapes[0].recordings
    begin, end = marks
    names = [
        str(operation[0]) for operation in recording.operations[:begin] + recording.operations[end:]
    ]
    assert sum(name.startswith("msn_ext.") for name in names) == 7 and len(names) <= 27


def test_families_that_can_be_recorded(tapes):
    replays = {}
    for family in FAMILIES:
        model = tiny_model(family, 1)
        ids, mask = prompts(
            5, 1 if family == "phi3-longrope" else 2, padded=family not in ("gemma2", "gemma3")
        )
        options = dict(max_new_tokens=40, eos_token_id=None)
        assert torch.equal(
            ours(model, ids, mask, "paper", **options), plain(model, ids, mask, **options)
        ), family
        replays[family] = sum(tape.replays for tape in tapes)
        tapes.clear()
    # Experts are picked by the host here; longrope changes what positions mean on the way.
    eager = {"deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe", "phi3-longrope"}
    assert {family for family, count in replays.items() if not count} == eager


SAMPLED = {
    "as it is": {},
    "penalised": dict(repetition_penalty=1.2, temperature=0.8),
    "usual": dict(temperature=0.7, top_k=20, top_p=0.9),
    "min_p": dict(min_p=0.05, temperature=1.5),
    "typical": dict(typical_p=0.8),
    "epsilon": dict(epsilon_cutoff=0.01),
}


def sampled(model, ids, mask, draft, seed: int, **options):
    torch.manual_seed(seed)
    return generate(
        model,
        ids,
        attention_mask=mask,
        draft=draft,
        do_sample=True,
        pad_token_id=0,
        max_new_tokens=30,
        eos_token_id=None,
        **{"top_k": 0} | options,
    )


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
    monkeypatch.delitem(graph.RECORDERS, where)
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
    monkeypatch.delitem(graph.RECORDERS, where)
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


class EndsAfter(StoppingCriteria):
    def __init__(self, tokens: int):
        self._tokens = tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(
            input_ids.shape[:1], input_ids.shape[1] >= self._tokens, device=input_ids.device
        )


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
            monkeypatch.delitem(graph.RECORDERS, where)
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


def test_a_drafter_that_was_elsewhere_in_between_is_recorded_anew(tapes):
    """Its tables lie at other places then; recordings that point to the old ones would read what is
    not theirs.
    """
    model, drafter = tiny_model("llama", 3), BestFirst(16)
    for batch in (2, 1, 2, 2, 1):
        ids, mask = prompts(batch, batch)
        for _ in range(2):
            assert torch.equal(
                ours(model, ids, mask, drafter, max_new_tokens=30),
                plain(model, ids, mask, max_new_tokens=30),
            )
    assert sum(len(tape.recordings) for tape in tapes) == 4


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


def test_a_step_that_asks_the_device_after_all_falls_back(tapes, caplog, monkeypatch):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0)
    forward = model.model.layers[0].mlp.forward
    monkeypatch.setattr(
        model.model.layers[0].mlp, "forward", lambda x: forward(x) if float(x.sum()) < 1e9 else x
    )
    want = plain(model, ids, mask, max_new_tokens=30)
    for _ in range(2):
        assert torch.equal(ours(model, ids, mask, "auto", max_new_tokens=30), want)
    assert "cannot be recorded" in caplog.text and caplog.text.count("cannot be recorded") == 1
    assert not any(tape.replays for tape in tapes)


def test_a_failed_call_leaves_nothing_behind(tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0)

    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyError("broken")

    want = plain(model, ids, mask, max_new_tokens=20)
    assert torch.equal(ours(model, ids, mask, "auto", max_new_tokens=20), want)
    with pytest.raises(KeyError):
        ours(
            model,
            ids,
            mask,
            "auto",
            max_new_tokens=20,
            stopping_criteria=StoppingCriteriaList([Broken()]),
        )
    assert torch.equal(ours(model, ids, mask, "auto", max_new_tokens=20), want)


def test_recordings_are_few_and_go_with_their_model(tapes):
    model = tiny_model("llama", 3)
    rng = random.Random(0)
    for batch in range(1, 8):
        ids, mask = prompts(rng.randrange(100), 1 + batch % 3)
        drafter = rng.choice(["auto", "paper", "none", "jacobi"])
        ours(model, ids, mask, drafter, max_new_tokens=12)
    kept = [replay for replays in graph._kept[model].values() for replay in replays]
    assert len(kept) == graph.KEPT
    watched = [weakref.ref(replay.decoder) for replay in kept] + [weakref.ref(model)]
    del kept, model
    gc.collect()
    assert not any(ref() for ref in watched)


def test_caches_that_are_kept_are_bounded(tapes, monkeypatch):
    model = tiny_model("llama", 3)
    for batch in (1, 2, 3):
        ours(model, *prompts(0, batch), "auto", max_new_tokens=5)
    sizes = [
        replay.decoder.cache_bytes for replays in graph._kept[model].values() for replay in replays
    ]
    assert len(sizes) == 3 and sizes[0] > 0 and sizes == [sizes[0], 2 * sizes[0], 3 * sizes[0]]
    kind = type(tapes[0])
    monkeypatch.setattr(kind, "memory", sizes[0] + sizes[2] - 1, raising=False)
    for replays in graph._kept[model].values():
        for replay in replays:
            replay.recorder.memory = kind.memory
    ours(model, *prompts(1, 3), "auto", max_new_tokens=5)
    assert [
        replay.decoder.cache_bytes for replays in graph._kept[model].values() for replay in replays
    ] == [sizes[2]]


def test_tuning_measures_recorded_steps_where_decoding_takes_them(tapes):
    times = measure_step_times(tiny_model("llama", 3), context=32, progress=False)
    assert list(times) == list(SIZES) and all(times.values())
    assert len(tapes[0].recordings) == tapes[0].warm_ups == len(SIZES), "each size is recorded once"
    assert tapes[0].replays == (ROUNDS - 1) * len(SIZES)


def test_other_weights_are_not_taken_for_the_recorded_ones(tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0)
    ours(model, ids, mask, "auto", max_new_tokens=30)
    other = tiny_model("llama", 4)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(
        ours(model, ids, mask, "auto", max_new_tokens=30),
        plain(other, ids, mask, max_new_tokens=30),
    )


def hook(model):
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 0.1)
    yield
    handle.remove()
    yield


def hook_before(model):
    handle = model.model.layers[1].register_forward_pre_hook(
        lambda module, args: (args[0] * 3, *args[1:])
    )
    yield
    handle.remove()
    yield


def replaced(model):
    module, forward = model.model.layers[0].mlp, model.model.layers[0].mlp.forward
    module.forward = lambda x: forward(x) * 0.1
    yield
    del module.forward
    yield


def implementation(model):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if before == "sdpa" else "sdpa")
    yield
    model.set_attn_implementation(before)
    yield


def training(model):
    model.train()
    yield
    model.eval()
    yield


def adapters(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    for name in "ab":
        settings = dict(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model.add_adapter(peft.LoraConfig(**settings), adapter_name=name)
    model.to(torch.float64)
    for name in "aba":
        model.set_adapter(name)
        yield
    model.disable_adapters()
    yield
    model.enable_adapters()
    yield


def one_adapter(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    ).double()
    yield
    with adapted.disable_adapter():
        yield
    yield
    adapted.merge_adapter()
    yield


@pytest.mark.parametrize(
    "change", [hook, hook_before, replaced, implementation, training, adapters, one_adapter]
)
def test_a_recording_is_of_the_way_that_the_model_computes(change, tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0, padded=False)
    texts = []
    for _ in itertools.chain([None], change(model)):
        want = plain(model, ids, mask, max_new_tokens=30, eos_token_id=None)
        for _ in range(2):
            assert torch.equal(
                ours(model, ids, mask, "paper", max_new_tokens=30, eos_token_id=None), want
            )
        texts.append(want.tolist())
    assert len(tapes) > 1 and all(tape.replays for tape in tapes)
    assert change in (implementation, training) or texts[1] != texts[0], "a change that matters"


@contextlib.contextmanager
def unrecorded():
    recorder = graph.RECORDERS.pop(where)
    yield
    graph.RECORDERS[where] = recorder


def test_recordings_under_autocast_read_the_weights_themselves(tapes):
    """Autocast keeps narrow copies of weights while it is on, and none behind it."""
    model = tiny_model("llama", 3).float()
    other = tiny_model("llama", 4).float().state_dict()
    ids, mask = prompts(0)
    options = dict(max_new_tokens=30, eos_token_id=None)
    wanted, found = [], []
    for weights in (model.state_dict(), other):
        model.load_state_dict(weights)
        with torch.autocast(where, dtype=torch.bfloat16):
            with unrecorded():
                wanted.append(ours(model, ids, mask, "paper", **options).tolist())
            found.append(ours(model, ids, mask, "paper", **options).tolist())
        assert torch.equal(
            ours(model, ids, mask, "paper", **options), plain(model, ids, mask, **options)
        )
    assert found == wanted and found[0] != found[1]
    assert len(tapes) == 2 and all(tape.replays for tape in tapes)


def test_a_cache_grows_with_its_text(tapes, monkeypatch):
    """It begins with few slots; where they end, everything moves and is recorded anew."""
    monkeypatch.setattr(step, "AT_FIRST", 520)
    for family in ("llama", "gptj"):
        tapes.clear()
        model = tiny_model(family, 3)
        kept = []
        for seed, length in ((0, 8), (1, 8), (2, 100)):
            ids, mask = prompts(seed, 2, length=length)
            options = dict(max_new_tokens=360, eos_token_id=None)
            assert torch.equal(
                ours(model, ids, mask, DraftTree.chain(4), **options),
                plain(model, ids, mask, **options),
            )
            ((replay,),) = graph._kept[model].values()
            kept.append(replay.decoder._cache.capacity)
        assert 8 + 520 < kept[0] == kept[1] == kept[2] == graph.room_for(460)
        assert len(tapes[0].recordings) == 2 and tapes[0].warm_ups == 2, (
            "before it grew, and behind"
        )
    long = dict(max_new_tokens=100_000, eos_token_id=int(ids[0, -1]))
    ours(
        model,
        ids,
        mask,
        "none",
        **long,
        stopping_criteria=StoppingCriteriaList([EndsAfter(ids.shape[1] + 9)]),
    )
    replay = next(reversed(graph._kept[model].values()))[0]
    assert replay.decoder.cache_bytes < 1e7, "no room for tokens that may never come"


def test_equal_trees_share_a_recording(tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0)
    for _ in range(4):
        ours(model, ids, mask, DraftTree.chain(4), max_new_tokens=20)
    assert len(tapes) == 1 and len(tapes[0].recordings) == 1


def test_what_a_recording_reads_of_a_tree_stays(tapes):
    """The tensors of a tree are forgotten when many others come; kernels would go on reading where
    they were.
    """
    model, drafter = tiny_model("llama", 3), TreeDrafter(DraftTree.chain(4))
    ours(model, *prompts(0), drafter, max_new_tokens=20)
    read = weakref.ref(drafter._tree.tensors(torch.device(where)).parents)
    for tape in tapes:
        tape.recordings.clear()
    for replays in graph._kept[model].values():
        for replay in replays:
            replay._recordings.clear()
    DraftTree.tensors.cache_clear()
    gc.collect()
    assert read() is not None


def test_failed_calls_leave_no_keys(tapes):
    model = tiny_model("llama", 3)
    ids, mask = prompts(0, padded=False)

    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyError("broken")

    for penalty in (1.1, 1.2, 1.3):
        ours(model, ids, mask, "none", max_new_tokens=5, repetition_penalty=penalty)
        with pytest.raises(KeyError):
            ours(
                model,
                ids,
                mask,
                "none",
                max_new_tokens=5,
                repetition_penalty=penalty,
                stopping_criteria=[Broken()],
            )
    assert not graph._kept[model]


def test_a_failed_capture_leaves_the_stream_that_was(monkeypatch):
    """As torch.cuda.graph behaves: where capturing fails at its end, its stream stays the current
    one.
    """
    current = ["the user's"]

    @contextlib.contextmanager
    def stream(other):
        before = current[0]
        current[0] = other
        try:
            yield
        finally:
            current[0] = before

    class Graph:
        def __init__(self, graph, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local", "other threads may go on"

        def __enter__(self):
            current[0] = "the side stream"

        def __exit__(self, *error):
            raise RuntimeError("capture failed")

    class Side:
        device = "cuda:0"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    with pytest.raises(RuntimeError, match="capture failed"):
        graph.CudaRecording(lambda: None, None, Side())
    assert current == ["the user's"]


def test_a_step_under_way_is_awaited_before_its_recording_may_go(tapes, monkeypatch):
    model, waits = tiny_model("llama", 3), []
    monkeypatch.setattr(graph.RECORDERS[where], "wait", lambda self: waits.append(self))
    ours(model, *prompts(0), "paper", max_new_tokens=5)
    assert waits == tapes
    with pytest.raises(ValueError, match="NaN"):
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        sampled(model, *prompts(0), "paper", 0)
    assert waits == tapes and len(tapes) == 2


def test_a_tape_notices_what_a_graph_could_not_repeat():
    """Negative control of the tape: state that moves, and a question to the device."""
    state = [torch.zeros(2)]

    def moves():
        state[0] = state[0] + 1
        return state[0]

    recording = Recorder(None).record(moves)
    for _ in range(3):
        recording.replay()
    assert recording.gained.tolist() == [1, 1], "the old place was read each time"

    count = torch.zeros(2)
    recording = Recorder(None).record(lambda: count.add_(1))
    assert count.tolist() == [0, 0], "recording runs nothing"
    for _ in range(3):
        recording.replay()
    assert count.tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="asks the device"):
        Recorder(None).record(lambda: count.sum().item())

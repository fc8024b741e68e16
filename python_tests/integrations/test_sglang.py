"""The plug-in for SGLang: what it tells SGLang, and whole answers by its worker, with stand-ins and
with SGLang's own Python where that is installed. No GPU has run it.
"""

import importlib
import importlib.util
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import sglang_modules
from helpers.drafters import random_habits
from helpers.families import VOCAB, tiny_model
from helpers.sglang_server import plain_text, tree_logits

PLUGIN = Path(__file__).resolve().parents[2] / "integrations" / "sglang"
ARGUMENTS = dict(
    device="cuda",
    speculative_num_draft_tokens=None,
    speculative_num_steps=None,
    speculative_adaptive=False,
    speculative_ngram_capacity=1000,
    speculative_ngram_max_bfs_breadth=10,
)


def put(kind: str, context) -> None:
    if kind == "stand-ins":
        sglang_modules.put_stand_ins(context)
    elif importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    else:
        sglang_modules.put_installed(context)


@pytest.fixture(params=["stand-ins", "SGLang"])
def kind(request):
    yield request.param
    sglang_modules.forget_modules()


def registered(kind: str, context=None):
    put(kind, context or sglang_modules.context())
    importlib.import_module("msn_ext_sglang").register()
    algorithms = importlib.import_module("sglang.srt.speculative.spec_info").SpeculativeAlgorithm
    return algorithms, algorithms.from_string("MSN")


# ---- registration --------------------------------------------------------------------------------


def test_the_entry_point_is_the_function():
    project = (PLUGIN / "pyproject.toml").read_text(encoding="utf-8")
    points = project[project.index('[project.entry-points."sglang.srt.plugins"]') :]
    name, function = re.search(r'^msn = "(\w+):(\w+)"$', points, re.M).groups()
    assert callable(getattr(importlib.import_module(name), function))


def test_it_is_ngram_in_all_but_name_and_worker(kind):
    algorithms, ours = registered(kind)
    assert ours.name == "MSN" and ours.supports_overlap
    for name in vars(algorithms):
        if name.startswith(("is_", "supports_", "has_", "carries_")):
            assert getattr(ours, name)() == getattr(algorithms.NGRAM, name)(), name
    assert ours.is_ngram() and not ours.is_none() and ours.get_platform_worker_cls() is None
    assert callable(ours.create_future_map)
    server_args = SimpleNamespace(disable_overlap_schedule=False)
    ngram_worker = importlib.import_module("sglang.srt.speculative.ngram_worker")
    assert issubclass(ours.create_worker(server_args), ngram_worker.NGRAMWorker)


def test_it_takes_no_name_twice(kind):
    registered(kind)
    with pytest.raises(ValueError, match="MSN"):
        importlib.import_module("msn_ext_sglang").register()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(speculative_num_draft_tokens=1), "--speculative-num-draft-tokens is 1; expected 2"),
        (dict(speculative_num_draft_tokens=300), "--speculative-num-draft-tokens is 300"),
        (dict(speculative_ngram_capacity=-1), "--speculative-ngram-capacity is -1; expected 0"),
        (dict(speculative_adaptive=True), "--speculative-adaptive is set; expected not"),
    ],
)
def test_wrong_options_are_named(kind, wrong, message):
    _, ours = registered(kind)
    ours.validate_server_args(SimpleNamespace(**ARGUMENTS))
    with pytest.raises(ValueError, match=message):
        ours.validate_server_args(SimpleNamespace(**(ARGUMENTS | wrong)))


def test_ngrams_rules_for_options_hold_with_stand_ins():
    _, ours = registered("stand-ins")
    server_args = SimpleNamespace(**ARGUMENTS)
    ours.handle_server_args(server_args)
    assert server_args.speculative_num_draft_tokens == 12  # assigned: the only thing that is noted
    assert server_args.speculative_eagle_topk == 10 and not server_args.enable_mixed_chunk
    sglang_modules.forget_modules()


def test_sglang_resolves_its_options():
    """By SGLang's own code, which notes what a registered algorithm assigns."""
    registered("SGLang")
    arguments = importlib.import_module("sglang.srt.server_args").ServerArgs
    overrides = importlib.import_module("sglang.srt.arg_groups.overrides")
    hook = importlib.import_module("sglang.srt.arg_groups.speculative_hook")
    resolved = []
    for name in ("NGRAM", "MSN"):
        server_args = arguments(
            model_path="x",
            speculative_algorithm=name,
            device="cuda",
            page_size=1,
            attention_backend="flashinfer",
        )
        hook.handle_speculative_decoding(server_args)
        view = overrides.resolving_view(server_args)
        resolved.append({x: getattr(view, x) for x in overrides.field_names(arguments)})
    ngram, msn = resolved
    assert ngram.pop("speculative_algorithm") == "NGRAM"
    assert msn.pop("speculative_algorithm") == "MSN"
    assert msn == ngram and msn["speculative_num_draft_tokens"] == 12
    sglang_modules.forget_modules()


def test_the_options_that_the_page_names_are_there(kind):
    page = (PLUGIN / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--(speculative[\w-]+)", page))
    put(kind, sglang_modules.context())
    there = {"speculative_algorithm", *sglang_modules.SETTINGS}
    if kind == "SGLang":
        arguments = importlib.import_module("sglang.srt.server_args").ServerArgs
        there = importlib.import_module("sglang.srt.arg_groups.overrides").field_names(arguments)
    assert len(named) == 5 and {name.replace("-", "_") for name in named} <= set(there)


# ---- the worker ----------------------------------------------------------------------------------


class Target:
    """The model's worker: the whole text again in each pass, in the place of its cache."""

    def __init__(self, model, mode):
        self.model, self._mode = model, mode
        config = SimpleNamespace(vocab_size=VOCAB)
        self.model_runner = SimpleNamespace(
            model_config=config, max_running_requests=8, watermark_state=None
        )
        self.verified = 0

    def get_memory_pool(self):
        return None, None

    def forward_batch_generation(self, batch, pp_proxy_tensors=None, is_verify=False):
        if is_verify:
            logits, at = [], 0
            width = batch.spec_info.draft_token_num
            for row, req in enumerate(batch.reqs):
                prefix, tree = req.text[:-1], batch.input_ids.view(-1, width)[row].tolist()
                assert tree[0] == req.text[-1] and int(batch.seq_lens[row]) == len(prefix)
                size = width * (len(prefix) + width)
                mask = batch.spec_info.custom_mask[at : at + size].view(width, -1)
                at += size
                assert mask[:, : len(prefix)].all()
                depth = batch.spec_info.positions.view(-1, width)[row] - len(prefix)
                logits.append(
                    tree_logits(self.model, prefix, tree, mask[:, len(prefix) :], depth.tolist())
                )
            self.verified += len(batch.reqs)
            logits, tokens = torch.cat(logits), None
        else:
            ids = [torch.tensor([req.text]) for req in batch.reqs]
            with torch.no_grad():
                logits = torch.cat([self.model(one).logits[:, -1] for one in ids])
            tokens = logits.argmax(-1)
        return SimpleNamespace(
            logits_output=SimpleNamespace(next_token_logits=logits),
            next_token_ids=tokens,
            can_run_cuda_graph=False,
        )


class Server:
    """Requests that come and go. With overlap, what a pass accepted reaches a request's
    ``output_ids`` after the next pass began.
    """

    def __init__(self, worker, mode, width: int, overlap: bool):
        self.worker, self.mode, self.width, self.overlap = worker, mode, width, overlap
        self.running, self.relayed = [], {}

    def batch(self, reqs, mode):
        lengths = torch.tensor([len(req.text) - 1 for req in reqs])
        spec_info = SimpleNamespace(accept_tokens=None, accept_lens=None)
        if reqs and all(req.rid in self.relayed for req in reqs):
            tokens, lens = zip(*(self.relayed[req.rid] for req in reqs))
            spec_info.accept_tokens, spec_info.accept_lens = torch.cat(tokens), torch.stack(lens)
        return SimpleNamespace(
            reqs=reqs,
            forward_mode=mode,
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            spec_info=spec_info,
            input_ids=None,
            req_pool_indices=None,
            req_to_token_pool=SimpleNamespace(req_to_token=None),
            sampling_info=SimpleNamespace(has_watermark_candidates=False),
            has_grammar=False,
            grammar_needs_sync=lambda: False,
            return_logprob=False,
        )

    def step(self, reqs, mode) -> None:
        late = [(req, req.pending) for req in reqs]
        result = self.worker.forward_batch_generation(self.batch(reqs, mode))
        tokens = result.next_draft_input.accept_tokens.view(-1, self.width)
        lens = result.next_draft_input.accept_lens
        for req, pending in late:
            req.output_ids += pending
        for row, req in enumerate(reqs):
            new = tokens[row, : int(lens[row])].tolist()
            req.text += new
            self.relayed[req.rid] = tokens[row], lens[row]
            req.pending = new if self.overlap else []
            req.output_ids += [] if self.overlap else new

    def answer(self, prompts: dict[str, list[int]], new: int, seed: int) -> dict:
        numbers, waiting, answers = random.Random(seed), dict(prompts), {}
        while waiting or self.running:
            while waiting and len(self.running) < 4 and numbers.random() < 0.7:
                rid, prompt = waiting.popitem()
                req = SimpleNamespace(
                    rid=rid,
                    origin_input_ids_unpadded=prompt,
                    output_ids=[],
                    pending=[],
                    text=list(prompt),
                )
                self.step([req], self.mode.EXTEND)
                self.running.append(req)
            if self.running:
                numbers.shuffle(self.running)
                self.step(list(self.running), self.mode.DECODE)
            for req in [*self.running]:
                if len(req.text) >= len(prompts[req.rid]) + new:
                    answers[req.rid] = req.text[len(prompts[req.rid]) :][:new]
                    self.running.remove(req)
                    del self.relayed[req.rid]
        return answers


def served(kind: str, overlap: bool, **settings):
    """Return a server of our worker with a tiny model, and the model's worker."""
    context = sglang_modules.context(overlap=overlap, **settings)
    _, ours = registered(kind, context)
    mode = importlib.import_module("sglang.srt.model_executor.forward_batch_info").ForwardMode
    target = Target(tiny_model("llama", 3, eos_token_id=None), mode)
    server_args = SimpleNamespace(disable_overlap_schedule=not overlap)
    worker = ours.create_worker(server_args)(
        server_args=server_args, gpu_id=0, nccl_port=0, target_worker=target
    )
    worker.alloc_memory_pool()
    width = context.get_spec().speculative_num_draft_tokens
    return Server(worker, mode, width, overlap), target


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("width", [2, 8])
def test_answers_are_the_models_own(kind, overlap, width):
    server, target = served(kind, overlap, speculative_num_draft_tokens=width)
    numbers = random.Random(9)
    prompts = {f"r{i}": numbers.choices(range(VOCAB), k=numbers.randint(2, 30)) for i in range(8)}
    got = server.answer(prompts, 30, seed=width)
    assert got == {rid: plain_text(target.model, prompt, 30) for rid, prompt in prompts.items()}
    assert target.verified < 0.9 * 8 * 30
    drafts = server.worker.ngram_corpus
    # Whole texts were known, although the worker gets ends of 5 tokens, and those gone forgotten.
    assert len(drafts._live.row_of) <= 4
    assert server.worker.max_trie_depth >= width + 1


def test_a_server_drafts_from_habits(kind, monkeypatch, tmp_path):
    """Those of the file that MSN_HABITS names; one that is none is named before a model is read."""
    path = tmp_path / "habits.safetensors"
    monkeypatch.setenv("MSN_HABITS", str(path))
    _, ours = registered(kind)
    with pytest.raises(ValueError, match="MSN_HABITS is"):
        ours.validate_server_args(SimpleNamespace(**ARGUMENTS))
    sglang_modules.forget_modules()
    random_habits(random.Random(1)).save(path)
    server, target = served(kind, True)
    prompt = random.Random(2).choices(range(VOCAB), k=20)
    got = server.answer({"r": prompt}, 30, seed=0)["r"]
    assert got == plain_text(target.model, prompt, 30)
    assert server.worker.ngram_corpus._habits.any()


def test_what_the_model_said_is_drafted_from(kind, monkeypatch):
    numbers, passes = random.Random(9), []
    prompts = {f"r{i}": numbers.choices(range(VOCAB), k=20) for i in range(6)}
    for forgetful in (False, True):
        server, target = served(kind, True)
        if forgetful:
            monkeypatch.setattr(type(server.worker.ngram_corpus), "remember", lambda *_: None)
        server.answer(prompts, 30, seed=1)
        passes.append(target.verified)
    assert passes[0] < passes[1]


def test_the_whole_text_is_drafted_from(kind):
    """An n-gram of the prompt, far before the end that NGRAM passes."""
    server, _ = served(kind, True)
    numbers, drafted = random.Random(1), []
    get = server.worker.ngram_corpus.batch_get

    def noted(ids, tails, totals):
        drafted.append((tails[0], get(ids, tails, totals)[0].tolist()))
        return get(ids, tails, totals)

    server.worker.ngram_corpus.batch_get = noted
    server.answer({"r": numbers.choices(range(VOCAB), k=300)}, 10, seed=0)
    live = len(drafted[0][0])
    assert live == 9  # the width and one
    fresh = type(server.worker.ngram_corpus)(draft_token_num=8, capacity=0, vocabulary=VOCAB)
    alone = fresh.batch_get(["x"], [drafted[0][0]], [live])[0].tolist()
    assert alone != drafted[0][1]


def test_the_cache_can_be_cleared_between_passes(kind):
    """``/flush_cache``, between a pass and the next."""
    server, target = served(kind, False)
    prompts = {"a": [1, 2, 3, 4], "b": [5, 6, 7]}
    want = {rid: plain_text(target.model, prompt, 12) for rid, prompt in prompts.items()}
    assert server.answer(prompts, 12, seed=1) == want
    server.worker.clear_cache_pool()
    assert server.answer(prompts, 12, seed=2) == want

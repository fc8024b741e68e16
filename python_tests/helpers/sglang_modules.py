"""SGLang's modules that our plug-in builds on: the installed ones, with what only a GPU or a
compiled kernel can do replaced by plain PyTorch, or stand-ins with the same signatures.

The signatures are those of SGLang 0.5.23: `speculative/spec_info.py` (SpeculativeAlgorithm,
register), `speculative/spec_registry.py` (CustomSpecAlgo), `arg_groups/overrides.py` (what a
registered algorithm assigns is noted), `speculative/ngram_worker.py` (NGRAMWorker) and
`speculative/cpp_ngram/ngram_corpus.py` (NgramCorpus).
"""

import enum
import importlib
import importlib.util
import sys
import types
from types import SimpleNamespace

import torch

from .sglang_server import accepted, links

SPECULATIVE = "sglang.srt.speculative"
SETTINGS = dict(
    speculative_num_draft_tokens=8,
    speculative_num_steps=1,
    speculative_eagle_topk=10,
    speculative_ngram_min_bfs_breadth=1,
    speculative_ngram_max_bfs_breadth=10,
    speculative_ngram_match_type="BFS",
    speculative_ngram_max_trie_depth=5,
    speculative_ngram_capacity=1000,
    speculative_ngram_external_corpus_path=None,
    speculative_ngram_external_sam_budget=0,
    speculative_ngram_external_corpus_max_tokens=10_000_000,
)


def forget_modules() -> None:
    """So that the next import finds others."""
    for name in [*sys.modules]:
        if name.split(".")[0] in ("sglang", "sgl_kernel") or name.startswith(
            ("msn_ext_sglang.algorithm", "msn_ext_sglang.worker")
        ):
            del sys.modules[name]


def module(name: str, **contents) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(contents)
    made.__path__ = []
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, made)
    return made


# ---- what a GPU does -----------------------------------------------------------------------------


def reconstruct(mask, lengths, positions, index, child, sibling, batch, width) -> None:
    """`reconstruct_indices_from_tree_mask`: fills the tensors that it is given."""
    index.copy_(torch.arange(batch * width).view(batch, width))
    for row, tree in enumerate(mask.view(batch, width, width).tolist()):
        depth, children, siblings = links(tree)
        positions.view(batch, width)[row] = lengths[row] + torch.tensor(depth)
        child[row], sibling[row] = torch.tensor(children), torch.tensor(siblings)


def greedy(verify_input, batch, logits_output, *_, **__):
    """`eagle_sample`: predicted tokens, accept lengths with the bonus token, accepted nodes."""
    width = verify_input.draft_token_num
    predicted = logits_output.next_token_logits.argmax(-1)
    nodes = torch.full((len(batch.reqs), width), -1, dtype=torch.int32)
    for row in range(len(batch.reqs)):
        path = accepted(
            verify_input.draft_token.view(-1, width)[row].tolist(),
            verify_input.retrieve_next_token[row].tolist(),
            verify_input.retrieve_next_sibling[row].tolist(),
            predicted.view(-1, width)[row].tolist().__getitem__,
        )
        nodes[row, : len(path)] = torch.tensor(path) + row * width
    return predicted.int(), (nodes >= 0).sum(-1).int(), nodes


# ---- stand-ins -----------------------------------------------------------------------------------


class SpeculativeAlgorithm(enum.Enum):
    EAGLE = "EAGLE"
    NGRAM = "NGRAM"
    NONE = "NONE"

    @classmethod
    def register(cls, name, *, supports_overlap=False, validate_server_args=None, spec_class=None):
        if name.upper() in cls.__members__ or name.upper() in REGISTRY:
            raise ValueError(f"'{name.upper()}' is registered")
        questions = {x for x in vars(cls) if x.startswith(("is_", "supports_"))}
        assert questions <= set(dir(spec_class)), "an algorithm answers what others do"

        def decorator(factory):
            REGISTRY[name.upper()] = spec_class(
                name=name.upper(),
                factory=factory,
                supports_overlap=supports_overlap,
                validate_server_args=validate_server_args,
            )
            return factory

        return decorator

    @classmethod
    def from_string(cls, name):
        return cls[name] if name in cls.__members__ else REGISTRY[name]

    def is_none(self):
        return self is SpeculativeAlgorithm.NONE

    def is_eagle(self):
        return self is SpeculativeAlgorithm.EAGLE

    def is_ngram(self):
        return self is SpeculativeAlgorithm.NGRAM

    def supports_mixed_chunk(self):
        return self.is_eagle()

    def has_draft_kv(self):
        return not self.is_ngram()

    def carries_draft_hidden_states(self):
        return self.is_eagle()

    def create_future_map(self, device, req_to_token_pool, needs_cpu_seq_lens=True, **_):
        return SimpleNamespace(spec_algo=self, device=device)

    def handle_server_args(self, server_args):
        assert self.is_ngram()
        chosen = dict(enable_mixed_chunk=False, max_running_requests=48)
        chosen["speculative_eagle_topk"] = server_args.speculative_ngram_max_bfs_breadth
        if server_args.speculative_num_draft_tokens is None:
            chosen["speculative_num_draft_tokens"] = 12
        server_args._resolved_overrides.append(("_handle_ngram", chosen))

    def create_worker(self, server_args):
        raise AssertionError("a registered algorithm has a worker of its own")

    def get_platform_worker_cls(self):
        raise AssertionError("NGRAM's on this platform is none of ours")


REGISTRY: dict = {}


class CustomSpecAlgo:
    def __init__(self, name, factory, *, supports_overlap=False, validate_server_args=None):
        self.name, self.factory = name, factory
        self.supports_overlap, self.validate_server_args = supports_overlap, validate_server_args

    def is_none(self):
        return False

    def is_eagle(self):
        return False

    def is_ngram(self):
        return False

    def supports_mixed_chunk(self):
        return False

    def has_draft_kv(self):
        return True

    def handle_server_args(self, server_args):
        pass

    def create_worker(self, server_args):
        return self.factory(server_args)


class NgramCorpus:
    def __init__(self, **_):
        raise AssertionError("compiled and given its memory in vain")


def worker_class(context) -> type:
    """A worker that asks its corpus what NGRAM's asks it, when that does."""

    class NGRAMWorker:
        def __init__(self, server_args, gpu_id, nccl_port, target_worker):
            spec = context.get_spec()
            prefix = "speculative_ngram_"
            its = "min_bfs_breadth max_bfs_breadth match_type capacity max_trie_depth"
            self.target_worker, self.model_runner = target_worker, target_worker.model_runner
            self.enable_overlap = not context.get_schedule().disable_overlap_schedule
            self.draft_token_num = spec.speculative_num_draft_tokens
            self.max_trie_depth = spec.speculative_ngram_max_trie_depth
            self._gone: set = set()
            self.ngram_corpus = sys.modules[f"{SPECULATIVE}.ngram_worker"].NgramCorpus(
                draft_token_num=self.draft_token_num,
                external_sam_budget=spec.speculative_ngram_external_sam_budget,
                external_corpus_max_tokens=spec.speculative_ngram_external_corpus_max_tokens,
                **{name: getattr(spec, prefix + name) for name in its.split()},
            )

        def alloc_memory_pool(self, **_):
            pass

        def clear_cache_pool(self):
            self.ngram_corpus.reset()

        def _prepare_draft_tokens(self, batch):
            most, width = self.max_trie_depth, self.draft_token_num
            tails, totals = [], []
            for row, req in enumerate(batch.reqs):
                new = []
                if self.enable_overlap and not batch.grammar_needs_sync():
                    length = int(batch.spec_info.accept_lens[row])
                    new = batch.spec_info.accept_tokens.tolist()[row * width :][:length]
                text = [*req.origin_input_ids_unpadded, *req.output_ids, *new]
                tails.append(text[-most:])
                totals.append(len(text))
            self.ngram_corpus.synchronize()
            return self.ngram_corpus.batch_get([req.rid for req in batch.reqs], tails, totals)

        def forward_batch_generation(self, batch, on_publish=None, pp_proxy_tensors=None):
            count, width = len(batch.reqs), self.draft_token_num
            if not batch.forward_mode.is_decode():
                done = self.target_worker.forward_batch_generation(batch)
                tokens = torch.zeros(count, width, dtype=torch.int32)
                tokens[:, 0] = done.next_token_ids
                return self._result(done, tokens, torch.ones(count, dtype=torch.int32))
            tokens, mask = map(torch.from_numpy, self._prepare_draft_tokens(batch))
            index, child, sibling = (torch.empty(count, width, dtype=int) for _ in range(3))
            positions = torch.empty(count * width, dtype=torch.int64)
            reconstruct(mask, batch.seq_lens, positions, index, child, sibling, count, width)
            full = []
            for row, tree in enumerate(mask.view(count, width, width).bool()):
                before = torch.ones(width, int(batch.seq_lens_cpu[row]), dtype=torch.bool)
                full.append(torch.cat([before, tree], 1).flatten())
            batch.spec_info = SimpleNamespace(
                draft_token=tokens,
                custom_mask=torch.cat(full),
                positions=positions,
                retrieve_next_token=child,
                retrieve_next_sibling=sibling,
                draft_token_num=width,
            )
            batch.input_ids = tokens
            done = self.target_worker.forward_batch_generation(batch, is_verify=True)
            predicted, lengths, nodes = greedy(batch.spec_info, batch, done.logits_output)
            self.ngram_corpus.batch_put([[0]] * count)
            here = {req.rid for req in batch.reqs}
            self.ngram_corpus.erase_match_state(list(self._gone - here))
            self._gone = here
            return self._result(done, predicted[nodes.long()], lengths)

        def _result(self, done, tokens, lengths):
            relayed = SimpleNamespace(accept_tokens=tokens.flatten(), accept_lens=lengths)
            return SimpleNamespace(
                logits_output=done.logits_output, accept_lens=lengths, next_draft_input=relayed
            )

    return NGRAMWorker


class ForwardMode(enum.Enum):
    EXTEND = 1
    DECODE = 2

    def is_decode(self):
        return self is ForwardMode.DECODE


def put_stand_ins(context) -> None:
    """Make them what `import sglang` finds."""
    forget_modules()
    REGISTRY.clear()
    for name in ("sglang", "sglang.srt", SPECULATIVE, "sglang.srt.model_executor"):
        module(name)
    module(f"{SPECULATIVE}.spec_info", SpeculativeAlgorithm=SpeculativeAlgorithm)
    module(f"{SPECULATIVE}.spec_registry", CustomSpecAlgo=CustomSpecAlgo)
    module(
        f"{SPECULATIVE}.ngram_worker", NGRAMWorker=worker_class(context), NgramCorpus=NgramCorpus
    )
    module("sglang.srt.model_executor.forward_batch_info", ForwardMode=ForwardMode)


def put_installed(context) -> None:
    """Import SGLang as it is installed; its worker runs without a GPU and its kernels."""
    forget_modules()
    if importlib.util.find_spec("sgl_kernel") is None:  # compiled; nothing here calls it

        class Anything(types.ModuleType):
            def __getattr__(self, name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return None

        for name in ("sgl_kernel", "sgl_kernel.speculative"):
            sys.modules[name] = Anything(name)
            sys.modules[name].__path__ = []
    worker = importlib.import_module(f"{SPECULATIVE}.ngram_worker")
    for name in ("get_spec", "get_schedule", "get_device"):
        setattr(worker, name, getattr(context, name))
    for name in (
        "record_stream_for_v2_verify set_time_batch prepare_mamba_track_for_verify"
        " commit_mamba_states_after_verify move_accept_tokens_to_target_kvcache"
        " assign_extend_cache_locs_func maybe_detect_nan maybe_detect_inf"
    ).split():
        assert callable(getattr(worker, name))
        setattr(worker, name, lambda *_, **__: None)
    worker.reconstruct_indices_from_tree_mask_func = reconstruct
    worker.eagle_sample = greedy
    worker.NgramCorpus = NgramCorpus


def context(**settings) -> SimpleNamespace:
    """What `runtime_context` says, with NGRAM's defaults but for ``settings``."""
    overlap = settings.pop("overlap", False)
    spec = SimpleNamespace(**(SETTINGS | settings))
    schedule = SimpleNamespace(disable_overlap_schedule=not overlap, page_size=1)
    return SimpleNamespace(
        get_spec=lambda: spec,
        get_schedule=lambda: schedule,
        get_device=lambda: SimpleNamespace(device="cpu"),
    )

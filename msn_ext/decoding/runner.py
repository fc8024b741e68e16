"""Runners: they run a decoder's steps, one by one, or captured and replayed.

A captured step repeats the same kernels on the same memory, so it is of one size of tree, and
everything that a step changes it changes in place (:class:`.decoder.Decoder` with ``room``). The
host learns what a step gained while the next one runs. Graph runners stay with their model from
call to call, a few of them, and are dropped with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn.modules import module as hooks
from transformers import PreTrainedModel
from transformers.generation import TopHLogitsWarper

from msn_ext import ops
from msn_ext.ops import MAX_NODES

from .capture import BACKENDS, CaptureBackend, CapturedStep
from .decoder import Decoder, PassResult
from .drafters import CapturableDrafter, DraftTree
from .forward.packed import PackedPlan
from .processors import at_once
from .request import Request
from .verification import Sampler

logger = logging.getLogger("msn_ext")

MAX_RUNNERS = 4
"""Graph runners that are kept for a model."""
MAX_CAPTURES = 16
"""Of a runner, one per size of tree: more than ``auto`` chooses from, and than ``msn tune``
measures.
"""
ROOM_STEP = 512
"""Slots of a cache come in multiples of this, so that one decoder serves prompts of many lengths.
"""
PLAIN = int, float, bool, str, type(None)
"""Settings of a processor of logits that captures can be told apart by."""


class PendingStep:
    """A forward pass under way; ``result()`` waits for it, once: its status is on the host then."""

    def __init__(self, result: Callable[[], PassResult]):
        self.result = result


class EagerRunner:
    """Runs the steps of a decoder one by one."""

    runs_ahead = False  # whether a step may be launched before the host knows the last one's result

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def prefill(self) -> PendingStep:
        """Run the prompts' pass."""
        return PendingStep(self.decoder.prefill().to_host)

    def step(self) -> PendingStep:
        """Run one step."""
        return PendingStep(self.decoder.step().to_host)


class GraphRunner:
    """Runs the steps of a decoder with a fixed room: captured and replayed where that is possible.

    Args:
        decoder: its drafter is a :class:`.drafters.CapturableDrafter`.
        backend: of the decoder's device.
    """

    runs_ahead = True

    def __init__(self, decoder: Decoder, backend: CaptureBackend):
        self.decoder, self.backend = decoder, backend
        self._drafter = cast(CapturableDrafter, decoder.drafter)
        # By nodes, the last used last: the step, and its drafter's report.
        self.captures: OrderedDict[int, tuple[CapturedStep, Tensor | None]] = OrderedDict()
        self._warm: set[int] = set()
        self._rehearsed = False
        self._workspace = ops.Workspace()
        self._allocations = self._drafter.allocations
        self._cannot_capture = False
        self._last_result_at: float | None = None

    def begin(self, request: Request) -> None:
        """Begin with the prompts of another request with the same :func:`_pool_key`."""
        if isinstance(request.draft, str):  # not the user's own object, which would remember
            self._drafter.forget()
        if isinstance(request.targets, Sampler):
            cast(Sampler, self.decoder.targets).begin(request.targets)
        self.decoder.begin(request)
        self._last_result_at = None
        if self.decoder.make_room() or self._allocations != self._drafter.allocations:
            self._drop_captures()

    def _drop_captures(self) -> None:
        """Drop them all: something that they read lies elsewhere now."""
        self.backend.synchronize()
        self.captures.clear()
        self._warm.clear()

    def prefill(self) -> PendingStep:
        """Run the prompts' pass, which is never captured."""
        return PendingStep(self.decoder.prefill().to_host)

    def step(self) -> PendingStep:
        """Launch one step; nothing waits for it yet."""
        if self.decoder.make_room():
            self._drop_captures()
        nodes = self._drafter.plan()
        usual = self._cannot_capture or nodes in self.captures  # takes the time of such a step
        if not usual:
            self._last_result_at = None
        with self._workspace:
            if nodes in self.captures or self._capture(nodes):
                self.captures.move_to_end(nodes)
                captured, report = self.captures[nodes]
                captured.replay()
                result = captured.result
            else:
                result, report = self._run_once(nodes), self._drafter.report
        reports = [] if report is None else [report]
        copies, wait = self.backend.copy_to_host([result.tokens, result.status, *reports])

        def fetch() -> PassResult:
            wait()
            now, before = time.perf_counter(), self._last_result_at
            self._last_result_at = now
            tokens, status, *reports = (x.clone() for x in copies)
            if usual and before is not None:
                report = reports[0] if reports else None
                self._drafter.observe_step(report, nodes, status[0].tolist(), now - before)
            return PassResult(tokens, status)

        return PendingStep(fetch)

    def _run_once(self, nodes: int) -> PassResult:
        """Run a step of this size as it is; the second one of all shows whether steps wait."""
        waits = None
        if self._warm and not self._rehearsed and not self._cannot_capture:
            self._rehearsed = True
            with _capture_lock:
                result, waits = self.backend.rehearse(self.decoder.step)
        else:
            result = self.backend.warm_up(self.decoder.step)
        self._warm.add(nodes)
        if waits is not None:
            self._refuse(f"it waits for the device ({waits})")
        return result

    def _refuse(self, reason: object) -> None:
        self._cannot_capture = True
        logger.warning(
            "msn_ext decodes without CUDA graphs: a step of this model cannot be captured: %s",
            reason,
        )

    def _capture(self, nodes: int) -> bool:
        """Capture a step of this size, if one has run before; return whether it is there."""
        if self._cannot_capture or not self._rehearsed or nodes not in self._warm:
            return False
        cached = torch.is_autocast_cache_enabled()
        # A cached copy of a weight would be read where it no longer is.
        torch.set_autocast_cache_enabled(False)
        try:
            with _capture_lock:  # one at a time: torch's allocator knows of one
                captured = self.backend.capture(self.decoder.step)
        except RuntimeError as error:  # of what torch's report left out
            self._refuse(error)
            return False
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.captures[nodes] = captured, self._drafter.report
        self._allocations = self._drafter.allocations
        if len(self.captures) > MAX_CAPTURES:
            self.captures.popitem(last=False)
        return True


class RunnerPool:
    """The graph runners of one model that are kept from call to call."""

    def __init__(self) -> None:
        self._entries: list[tuple[Hashable, GraphRunner]] = []  # the last used last

    def __iter__(self) -> Iterator[GraphRunner]:
        return iter([runner for _, runner in self._entries])

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, key: Hashable) -> GraphRunner | None:
        """Take out a runner that was put in by this key; None: there is none."""
        for at in reversed(range(len(self._entries))):
            if self._entries[at][0] == key:
                return self._entries.pop(at)[1]
        return None

    def put(self, key: Hashable, runner: GraphRunner) -> None:
        """Keep a runner; the ones not used for longest are dropped where there are too many or
        their caches take too much memory.
        """
        self._entries.append((key, runner))
        while len(self._entries) > MAX_RUNNERS or self._bytes() > runner.backend.memory:
            self._entries.pop(0)

    def _bytes(self) -> int:
        return sum(runner.decoder.cache_bytes for runner in self)


pools: weakref.WeakKeyDictionary[PreTrainedModel, RunnerPool] = weakref.WeakKeyDictionary()
"""The runners of every model."""
_pools_lock = threading.Lock()
_capture_lock = threading.Lock()


@contextlib.contextmanager
def runner_for(request: Request) -> Iterator[EagerRunner | GraphRunner]:
    """Give a runner at the beginning of its prompts, a :class:`GraphRunner` where possible."""
    if (reason := why_eager(request)) is not None:
        logger.info("msn_ext decodes without CUDA graphs: %s", reason)
        yield EagerRunner(Decoder(request))
        return
    room = room_for(request.input_ids.shape[1] + request.max_new_tokens)
    key = _pool_key(request, room)
    with _pools_lock:
        pool = pools.setdefault(request.model, RunnerPool())
        runner = pool.take(key)
    if runner is None:
        device = request.input_ids.device
        runner = GraphRunner(Decoder(request, room), BACKENDS[device.type](device))
    else:
        runner.begin(request)
    try:
        yield runner
    finally:
        runner.backend.synchronize()  # it may be dropped now, with a step under way
    with _pools_lock:  # not after an error, which may have left it in any state
        pool.put(key, runner)


def why_eager(request: Request) -> str | None:
    """Return why steps are not captured; None: they may be."""
    drafter, device = request.drafter, request.input_ids.device
    if isinstance(request.native_plan, PackedPlan):
        return "the native engine runs steps on a CPU as they are"
    if request.outputs:
        return "the logits of every token are kept"
    if device.type not in BACKENDS:
        return f"the model is on {device.type}"
    if os.environ.get("MSN_GRAPHS", "on") == "off":
        return "MSN_GRAPHS is off"
    if not (isinstance(drafter, CapturableDrafter) and "plan" in vars(type(drafter))):
        return (
            f"{type(drafter).__name__} may ask the device while it drafts: it has no plan,"
            " observe_step, forget, report and allocations of its own"
        )
    for processor in request.processors:
        if type(processor) is TopHLogitsWarper:
            return "TopHLogitsWarper asks the device"
        if not at_once(processor):
            return f"{type(processor).__name__} looks at the text before"
        if not all(isinstance(value, PLAIN) for value in vars(processor).values()):
            return f"{type(processor).__name__}, which is applied, has more than plain settings"
    if request.ranks is not None:
        return "several processes compute the model together"
    if request.longrope_boundary:
        return "rope_type='longrope' changes its factors on the way"
    return None


def room_for(tokens: int) -> int:
    """Return the slots of a cache for texts of so many tokens, the last tree included."""
    return -(-(tokens + MAX_NODES) // ROOM_STEP) * ROOM_STEP


def _pool_key(request: Request, room: int) -> Hashable:
    """Return all that a captured step depends on beside the values that it reads."""
    model, draft = request.model, request.draft
    weights = ((x.data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers()))
    settings = ((type(p), *sorted(vars(p).items())) for p in request.processors)
    return (
        len(request.input_ids),
        room,
        id(request.native_plan),  # which a kept runner keeps
        request.eos_token_ids.shape,
        draft if isinstance(draft, (str, DraftTree)) else id(draft),
        type(request.attention),
        request.noise_adapter is None,
        _computation(model, request.input_ids.device),
        hash(tuple(weights)),
        type(request.targets),
        *settings,
    )


def _computation(model: PreTrainedModel, device: torch.device) -> int:
    """Return a hash of what a step computes by beside its weights: settings, hooks, adapters."""
    ways: list = [torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)]
    ways += (*hooks._global_forward_pre_hooks, None, *hooks._global_forward_hooks)
    for module in model.modules():
        ways += (
            *module._forward_pre_hooks,
            None,
            *module._forward_hooks,
            module.training,
            id(vars(module).get("forward")),
        )
        if isinstance(module, PreTrainedModel):
            ways.append(module.config._attn_implementation)
        # A layer of PEFT's
        if isinstance(getattr(type(module), "disable_adapters", None), property):
            adapters = "disable_adapters", "active_adapter", "merged_adapters", "scaling"
            ways.append(repr([getattr(module, name, None) for name in adapters]))
    return hash(tuple(ways))

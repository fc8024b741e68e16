"""A decoder's steps recorded and replayed: on a GPU, one launch instead of some hundred (CUDA
graphs).

A recording repeats the same kernels on the same memory, so it is of one size of tree, and
everything that a step changes it changes in place (:class:`.Decoder` with ``room``). The host
reads what a step gained while the next one runs. Recordings stay with their model from call to
call, a few of them, and go when it goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.modules import module as hooks
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import TopHLogitsWarper

from msn_ext import ops
from msn_ext.ops import MAX_NODES

from .decoder import Decoder, Gained, Targets, longrope_boundary
from .drafters.protocol import Drafter
from .drafters.tree import DraftTree
from .processors import at_once
from .verification import Sampler

logger = logging.getLogger("msn_ext")

KEPT = 4
"""Decoders with their recordings that are kept for a model, at most;"""
SHARE = 0.1
"""and of the device's memory, what their caches may take in all."""
RECORDINGS = 16
"""Of a decoder, one per size of tree: more than ``auto`` chooses from, and than ``msn tune``
measures.
"""
ROOM = 512
"""Slots of a cache come in multiples of this, so that one decoder serves prompts of many lengths.
"""


@runtime_checkable
class Plannable(Protocol):
    """What a :class:`.drafters.Drafter` needs beside for its steps to be recorded: ``propose`` and
    ``observe`` do not ask the device anything, keep their state in place, and ``propose`` gives as
    many nodes as ``plan`` said.

    A class says so itself: one that inherits these from another is not recorded, since it may do in
    ``observe`` what it likes.

    Attributes:
        report: what ``told`` wants to know of a proposal, on the device; None: nothing.
        allocations: how often its state was laid out anew, at other places of memory.
    """

    report: Tensor | None
    allocations: int

    def plan(self) -> int:
        """The nodes of the next tree."""

    def told(self, report: Tensor | None, nodes: int, gained: list[int], seconds: float) -> None:
        """What came of a step: its report, its nodes, the tokens per row, and its time. It comes
        one step late.
        """


class CudaRecording:
    """The kernels of one step."""

    def __init__(self, step: Callable[[], Gained], pool, stream: torch.cuda.Stream):
        self._graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(
                torch.cuda.current_stream(stream.device)
            ),  # which a failure would leave switched
            torch.cuda.graph(
                self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ),
        ):
            self.gained = step()

    def replay(self) -> None:
        self._graph.replay()


class Recorder:
    """Where steps are recorded: a CUDA device. A test has one of its own for the CPU.

    Attributes:
        memory: bytes of caches that may be kept from call to call.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)
        self._host: dict[tuple, list[list[Tensor]]] = {}
        self.memory = int(SHARE * torch.cuda.get_device_properties(device).total_memory)

    def warm_up(self, step: Callable[[], Gained]) -> Gained:
        """A step outside any recording, on another stream than the default one, as recording asks
        for.
        """
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            gained = step()
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        return gained

    def record(self, step: Callable[[], Gained]) -> CudaRecording:
        return CudaRecording(step, self._pool, self._side)

    def to_host(self, tensors: list[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """Copies that are under way, and what waits for them. The last copies but one are
        overwritten.
        """
        shapes = tuple((x.shape, x.dtype) for x in tensors)
        slots = self._host.setdefault(shapes, [])
        if len(slots) < 2:
            slots.append(
                [
                    torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
                    for x in tensors
                ]
            )
        else:
            slots.append(slots.pop(0))
        for to, x in zip(slots[-1], tensors):
            to.copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return slots[-1], event.synchronize

    def wait(self) -> None:
        """Until all that was launched has run."""
        torch.cuda.current_stream(self._device).synchronize()


PLAIN = int, float, bool, str, type(None)
"""Settings of a processor of logits that recordings can be told apart by."""

RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": Recorder}
"""By type of device."""


class Late:
    """What a step gained, on its way to the host; read as :class:`.decoder.Gained`, once."""

    def __init__(self, read: Callable[[], Gained]):
        self.read = read


class Replay:
    """The steps of a decoder with a fixed room, recorded where that is possible.

    Args:
        decoder: its drafter is :class:`Plannable`.
        recorder: of the decoder's device.
    """

    ahead = True  # a step may be launched before the last one was read

    def __init__(self, decoder: Decoder, recorder: Recorder):
        self.decoder, self.recorder = decoder, recorder
        self._recordings: OrderedDict[int, tuple] = (
            OrderedDict()
        )  # by nodes: recording, its drafter's report
        self._warm: set[int] = set()
        self._workspace = ops.Workspace()
        self._allocations = decoder.drafter.allocations
        self._refused = False
        self._read_at: float | None = None

    def begin(self, *prompt) -> None:
        """As :meth:`.step.Decoder.begin`."""
        self.decoder.begin(*prompt)
        self._read_at = None
        if self.decoder.make_room() or self._allocations != self.decoder.drafter.allocations:
            self._forget()

    def _forget(self) -> None:
        """What was recorded: something that it reads lies elsewhere now."""
        self.recorder.wait()
        self._recordings.clear()
        self._warm.clear()

    def step(self) -> Late:
        """Launches one step; nothing waits for it yet."""
        if self.decoder.make_room():
            self._forget()
        drafter = self.decoder.drafter
        nodes = drafter.plan()
        usual = self._refused or nodes in self._recordings  # takes the time that such a step takes
        if not usual:
            self._read_at = None
        with self._workspace:
            if nodes in self._recordings or self._record(nodes):
                self._recordings.move_to_end(nodes)
                recording, report = self._recordings[nodes]
                recording.replay()
                gained = recording.gained
            else:
                gained = self.recorder.warm_up(self.decoder.step)
                report = drafter.report
        there, wait = self.recorder.to_host(
            [gained.tokens, gained.status, *([] if report is None else [report])]
        )

        def read() -> Gained:
            wait()
            now, before = time.perf_counter(), self._read_at
            self._read_at = now
            tokens, status, *reports = (x.clone() for x in there)
            if usual and before is not None:
                drafter.told(
                    reports[0] if reports else None, nodes, status[0].tolist(), now - before
                )
            return Gained(tokens, status)

        return Late(read)

    def _record(self, nodes: int) -> bool:
        """Whether a step with so many nodes could be recorded; it has to run once before."""
        if self._refused or nodes not in self._warm:
            self._warm.add(nodes)
            return False
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(
            False
        )  # of weights, which would be read where they no longer are
        try:
            with _recording:  # one at a time: torch's allocator knows of one
                recording = self.recorder.record(self.decoder.step)
        except RuntimeError as error:
            self._refused = True
            logger.warning(
                "msn_ext decodes without CUDA graphs: a step of this model cannot be recorded: %s",
                error,
            )
            return False
        finally:
            torch.set_autocast_cache_enabled(cached)
        self._recordings[nodes] = recording, self.decoder.drafter.report
        self._allocations = self.decoder.drafter.allocations
        if len(self._recordings) > RECORDINGS:
            self._recordings.popitem(last=False)
        return True


class Eager:
    """The steps of a decoder one by one."""

    ahead = False

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.step = decoder.step


_kept: weakref.WeakKeyDictionary[PreTrainedModel, OrderedDict[tuple, list[Replay]]] = (
    weakref.WeakKeyDictionary()
)
_guard = threading.Lock()
_recording = threading.Lock()


def why_eager(
    device: torch.device, drafter: Drafter, processors: LogitsProcessorList
) -> str | None:
    """Why steps are not recorded; None: they may be."""
    if device.type not in RECORDERS:
        return f"the model is on {device.type}"
    if os.environ.get("MSN_GRAPHS", "on") == "off":
        return "MSN_GRAPHS is off"
    if not (isinstance(drafter, Plannable) and "plan" in vars(type(drafter))):
        return f"{type(drafter).__name__} may ask the device while it drafts"
    for processor in processors:
        if type(processor) is TopHLogitsWarper:
            return "TopHLogitsWarper asks the device"
        if not at_once(processor):
            return f"{type(processor).__name__} looks at the text before"
        if not all(isinstance(value, PLAIN) for value in vars(processor).values()):
            return f"{type(processor).__name__}, which is applied, has more than plain settings"
    return None


def _ways(model: PreTrainedModel, device: torch.device) -> int:
    """What else a step computes by beside the values of weights: settings, hooks and adapters,
    hashed.
    """
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
        if isinstance(
            getattr(type(module), "disable_adapters", None), property
        ):  # a layer of PEFT's
            adapters = "disable_adapters", "active_adapter", "merged_adapters", "scaling"
            ways.append(repr([getattr(module, name, None) for name in adapters]))
    return hash(tuple(ways))


def room_for(tokens: int) -> int:
    """Slots of a cache for texts of so many tokens, the last tree included."""
    return -(-(tokens + MAX_NODES) // ROOM) * ROOM


@contextlib.contextmanager
def steps(
    model: PreTrainedModel,
    attention,
    draft: object,
    drafter: Drafter,
    targets: Targets,
    processors: LogitsProcessorList,
    input_ids: Tensor,
    offsets: Tensor,
    max_new_tokens: int,
    eos_token_ids: Tensor,
) -> Iterator[Replay | Eager]:
    """A decoder at the beginning of its prompts (arguments as :class:`.Decoder` has them),
    recorded where possible.

    Args:
        draft: what the user asked to draft with, a name or an object; recordings are kept by it.
    """
    prompt = input_ids, offsets, max_new_tokens, eos_token_ids
    reason = why_eager(input_ids.device, drafter, processors)
    if reason is None and longrope_boundary(
        model.config.get_text_config(decoder=True), *prompt[:3]
    ):
        reason = "rope_type='longrope' changes its factors on the way"

    def make(room: int | None = None) -> Decoder:
        return Decoder(
            model,
            attention,
            input_ids,
            offsets,
            drafter,
            targets,
            processors,
            *prompt[2:],
            room=room,
        )

    if reason is not None:
        logger.info("msn_ext decodes without CUDA graphs: %s", reason)
        yield Eager(make())
        return
    room = room_for(input_ids.shape[1] + max_new_tokens)
    by = draft if isinstance(draft, (str, DraftTree)) else id(draft)
    key = (
        *input_ids.shape[:1],
        room,
        eos_token_ids.shape,
        by,
        type(attention),
        _ways(model, input_ids.device),
    )
    key += (hash(tuple((x.data_ptr(), x.dtype) for x in (*model.parameters(), *model.buffers()))),)
    key += (
        type(targets),
        *((type(processor), *sorted(vars(processor).items())) for processor in processors),
    )
    with _guard:
        kept = _kept.setdefault(model, OrderedDict())
        replay = _take(kept, key)
    if replay is None:
        replay = Replay(make(room), RECORDERS[input_ids.device.type](input_ids.device))
    else:
        if isinstance(draft, str) and hasattr(replay.decoder.drafter, "forget"):
            replay.decoder.drafter.forget()
        if isinstance(targets, Sampler):
            replay.decoder.targets.begin(targets)
        replay.begin(*prompt)
    try:
        yield replay
    finally:
        replay.recorder.wait()  # it may be dropped now, with a step under way
    with _guard:  # not after an error: its state is anybody's guess
        kept.setdefault(key, []).append(replay)
        kept.move_to_end(key)
        while sum(map(len, kept.values())) > KEPT or _bytes(kept) > replay.recorder.memory:
            _take(kept, next(iter(kept)))


def _take(kept: OrderedDict[tuple, list[Replay]], key: tuple) -> Replay | None:
    """One of those that are kept by a key, which goes with the last of them."""
    replays = kept.get(key)
    if not replays:
        return None
    replay = replays.pop()
    if not replays:
        del kept[key]
    return replay


def _bytes(kept: OrderedDict[tuple, list[Replay]]) -> int:
    return sum(replay.decoder.cache_bytes for replays in kept.values() for replay in replays)

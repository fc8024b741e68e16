"""Which forward pass a model is decoded by: ``engine="auto"``, ``"native"`` or ``"torch"``."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msn_ext import _C

from .drafters import DraftTree
from .forward.families import plan_for
from .forward.native import NativeForward
from .forward.packed import PackedPlan
from .forward.plan import NoPlan, Plan

logger = logging.getLogger("msn_ext")

ENGINES = "auto", "native", "torch"
SPARE = 2.0
"""Weights are packed beside the model's where so many times their size is free."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of a model: its packed plan, and what its weights were then."""

    packed: PackedPlan
    stamp: int


_kept: weakref.WeakKeyDictionary[PreTrainedModel, Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def packed_for(model: PreTrainedModel, engine: str) -> PackedPlan | None:
    """Return the packed plan that ``model`` is decoded by; None: the model's own forward pass.

    Weights are packed at the first call, and again where they have changed. Changes are noticed by
    the tensors' addresses and version counters and by a sample of their bytes (every 64th line of
    64 bytes): only single numbers that are changed behind torch's back stay unnoticed.

    Args:
        engine: "native", "torch" or "auto": what the variable ``MSN_ENGINE`` says, which is "auto"
            if it is not set.

    Raises:
        ValueError: ``engine`` is none, or ``"native"`` and impossible; says why.
    """
    chosen = "engine"
    if engine == "auto" and "MSN_ENGINE" in os.environ:
        chosen, engine = "MSN_ENGINE", os.environ["MSN_ENGINE"]
    if engine not in ENGINES:
        names = ", ".join(repr(name) for name in ENGINES)
        raise ValueError(f"{chosen} is {engine!r}; expected {names}")
    if engine == "torch":
        return None
    try:
        with _lock:
            return _current(model, must=engine == "native")
    except NoPlan as reason:
        if engine == "native":
            raise ValueError(
                f"{chosen} is 'native', which {type(model).__name__} cannot be decoded by: {reason}"
            ) from None
        logger.info("msn_ext decodes by the model's own forward pass: %s", reason)
        return None


def _current(model: PreTrainedModel, must: bool) -> PackedPlan:
    plan = plan_for(model)
    stamp = _stamp(model)
    kept = _kept.get(model)
    if kept is not None and kept.stamp == stamp:
        return kept.packed
    weights = str(model.dtype).removeprefix("torch.")
    if not must:
        _check_memory(plan, weights)
    _kept.pop(model, None)  # its memory first
    packed = PackedPlan(plan, weights)
    _check_logits(model, packed)
    _kept[model] = Kept(packed, stamp)
    return packed


def _stamp(model: PreTrainedModel) -> int:
    """Return a number that changes with the weights, the attention in use, and the ISA."""
    weights = [*model.parameters(), *model.buffers()]
    if any(weight.is_inference() for weight in weights):
        raise NoPlan("it was made under torch.inference_mode(), where no change is counted")
    identity = tuple((weight.data_ptr(), weight._version) for weight in weights)
    sample = _C.sample_hash([weight.detach() for weight in weights if weight.is_contiguous()])
    config = model.config.get_text_config(decoder=True)
    return hash((identity, sample, config._attn_implementation, os.environ.get("MSN_ISA")))


# ---- memory --------------------------------------------------------------------------------------


def _check_memory(plan: Plan, weights: str) -> None:
    """Refuse to pack a copy where memory does not plainly suffice."""
    linears = [
        linear for layer in plan.layers for linear in (layer.qkv, layer.out, layer.up, layer.down)
    ]
    needed = sum(
        _C.packed_bytes(weights, "", linear.outputs, linear.inputs, 1)
        for linear in (*linears, plan.head)
    )
    available = free_memory()
    if available is not None and needed * SPARE > available:
        raise NoPlan(
            f"its packed weights take {needed / 1e9:.1f} GB beside the model's, and"
            f" {available / 1e9:.1f} GB are free (twice as much is asked for);"
            " msn_ext.prepare(model) packs them in place"
        )


def free_memory() -> int | None:
    """Return the bytes that this process may still take; None: not known."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:  # of the container
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


# ---- the check before first use ------------------------------------------------------------------


@torch.no_grad()
def _check_logits(model: PreTrainedModel, packed: PackedPlan) -> None:
    """Refuse a plan that does not give the model's own logits on a random tree after a random text,
    longer than the model's window where that is short.
    """
    windows = [layer.attention.window for layer in packed.plan.layers]
    prefix = 6 + min((window for window in windows if 0 < window <= 600), default=0)
    tree = DraftTree((-1, 0, 0, 1, 2, 2))
    generator = torch.Generator("cpu").manual_seed(0)
    vocabulary = packed.head.outputs
    tokens = torch.randint(vocabulary, (1, prefix + len(tree)), generator=generator, device="cpu")
    text, nodes = tokens[:, :prefix], tokens[:, prefix:].contiguous()
    tensors = tree.tensors(torch.device("cpu"))
    native, none, at = (
        NativeForward(packed, 1),
        torch.tensor([0], device="cpu"),
        torch.tensor([prefix], device="cpu"),
    )
    first = native.read(text, torch.arange(prefix, device="cpu")[None], none, 1)
    positions = prefix + tensors.depth.long()[None]
    found = native.check(nodes, positions, at, none, tensors.ancestors, prefix + len(tree))
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    for leaf in (3, 4, 5):
        path = [leaf]
        while path[0]:
            path.insert(0, tree.parents[path[0]])
        ids = torch.cat([text, nodes[:, path]], 1)
        plain = model(input_ids=ids, use_cache=False).logits[0, prefix - 1 :]
        ours = torch.cat([first[0], found[0, path]])
        if (difference := _relative(ours, plain)) > tolerance:
            raise NoPlan(
                f"its plan does not give its own logits (they differ by {difference:.2g} of the"
                " largest)"
            )


def _relative(ours: Tensor, plain: Tensor) -> float:
    """Return the largest difference relative to the largest logit; infinite where one is NaN."""
    plain = plain.to(ours.dtype)
    difference = ((ours - plain).abs().max() / plain.abs().max()).item()
    return difference if difference == difference else float("inf")

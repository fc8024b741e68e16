"""Which forward pass a model is decoded by: ``engine="auto"``, ``"native"`` or ``"torch"``."""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msn_ext import _C

from .attention import KernelAttention
from .drafters import DraftTree
from .forward import ForwardPass
from .forward.adapter import leaving_out
from .forward.families import check, plan_for
from .forward.families.checks import DTYPES
from .forward.families.settings import settings_of
from .forward.fused import FusedForward, FusedPlan, lay_together
from .forward.modules import Modules, parameters_of
from .forward.native import NativeForward
from .forward.packed import PackedPlan, linears
from .forward.packed_weight import PackedWeight
from .forward.plan import NoPlan, Plan, is_same
from .forward.prepared import pack_in_place, prepared_of, unpack_in_place

logger = logging.getLogger("msn_ext")

ENGINES = "auto", "native", "torch"
AUTOMATIC = {"cpu"}
"""Types of devices where "auto" takes the native engine: it has been measured there."""
PACKED_ON = {"cpu"}
"""Types of devices where the native engine packs weights; on others it fuses what stands between
torch's products.
"""
SPARE = 2.0
"""Weights are packed beside the model's where so many times their size is free."""


NativePlan = PackedPlan | FusedPlan
"""What the native engine's forward passes run, on a CPU and elsewhere."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of a model: its plan, and the weights and settings that it was read from."""

    plan: NativePlan
    weights: tuple
    settings: tuple


_kept: weakref.WeakKeyDictionary[PreTrainedModel, Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def engine_of(plan: NativePlan | None) -> str:
    """Return what computes the passes: "native" where there is such a plan, else "torch"."""
    return "torch" if plan is None else "native"


def native_plan_for(
    model: PreTrainedModel, engine: str, modules: Modules | None = None
) -> NativePlan | None:
    """Return the plan that ``model`` is decoded by, packed on a CPU and fused on other devices;
    None: the model's own forward pass.

    Weights are packed at the first call, and again where they have changed. Changes are noticed by
    the tensors' addresses and version counters and by a sample of their bytes (every 64th line of
    64 bytes): only single numbers that are changed behind torch's back stay unnoticed. Plans are
    read anew where a module has other settings or parts.

    Args:
        engine: "native", "torch" or "auto": what the variable ``MSN_ENGINE`` says, which is "auto"
            if it is not set.
        modules: of the model, where somebody has walked them.

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
        if engine == "auto" and model.device.type not in AUTOMATIC:
            raise NoPlan(f"'auto' does not take the native engine on {model.device.type} yet")
        modules = modules or Modules(model)
        with _lock:
            if model.device.type in PACKED_ON:
                return _packed(modules, must=engine == "native")
            return _fused(modules)
    except NoPlan as reason:
        if engine == "native":
            raise ValueError(
                f"{chosen} is 'native', which {type(model).__name__} cannot be decoded by: {reason}"
            ) from None
        logger.info("msn_ext decodes by the model's own forward pass: %s", reason)
        return None


def _packed(modules: Modules, must: bool) -> PackedPlan:
    model = modules.model
    prepared = prepared_of(model, modules.all)
    if prepared:
        prepared.check(modules)
    else:
        check(modules)
    settings = settings_of(modules)
    stamp = _stamp(modules)
    plan = _kept_or_read(model, stamp, settings, prepared.plan if prepared else plan_for)
    if isinstance(plan, PackedPlan):
        return plan
    assert isinstance(plan, Plan)
    weights = str(model.dtype).removeprefix("torch.")
    if not must and not prepared:
        _check_memory(plan, weights)
    _kept.pop(model, None)  # its memory first
    packed = prepared.packed(plan) if prepared else PackedPlan(plan, weights)
    tolerance = 1e-3 if packed.weights in ("float32", "float64") else 0.1
    _check_logits(model, plan, NativeForward(packed, 1), tolerance)
    _kept[model] = Kept(packed, stamp, settings)
    return packed


def _fused(modules: Modules) -> FusedPlan:
    """Return a plan over the model's weights where they lie; they may change there at any time."""
    model = modules.model
    check(modules, model.device)
    settings = settings_of(modules)
    read = functools.partial(plan_for, device=model.device)
    plan = _kept_or_read(model, _addresses(modules), settings, read)
    if isinstance(plan, FusedPlan):
        return plan
    assert isinstance(plan, Plan)
    lay_together(model, plan)
    fused = FusedPlan(plan)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    _check_logits(model, plan, FusedForward(fused, model, KernelAttention(model)), tolerance)
    _kept[model] = Kept(fused, _addresses(modules), settings)
    return fused


def _kept_or_read(
    model: PreTrainedModel,
    weights: tuple,
    settings: tuple,
    read: Callable[[PreTrainedModel], Plan],
) -> NativePlan | Plan:
    """Return what is kept of a model, if that is of these weights and of the plan that would be
    read now; else that plan.
    """
    kept = _kept.get(model)
    if kept is None or kept.weights != weights:
        return read(model)
    if kept.settings == settings:
        return kept.plan
    plan = read(model)
    if not is_same(plan, kept.plan.plan):
        return plan
    _kept[model] = replace(kept, settings=settings)
    return kept.plan


def _addresses(modules: Modules) -> tuple:
    """Return where the weights lie."""
    return tuple(tensor.data_ptr() for tensor in (*modules.parameters, *modules.buffers))


def _stamp(modules: Modules) -> tuple:
    """Return what changes with the weights and with the ISA; an adapter's have one of their own
    (:mod:`.forward.packed_adapter`).
    """
    tensors = [*parameters_of(modules.base), *modules.buffers]
    weights = [tensor for tensor in tensors if not isinstance(tensor, PackedWeight)]
    if any(weight.is_inference() for weight in weights):
        raise NoPlan("it was made under torch.inference_mode(), where no change is counted")
    identity = tuple((weight.data_ptr(), weight._version) for weight in weights)
    packed = tuple(id(tensor) for tensor in tensors if isinstance(tensor, PackedWeight))
    sample = _C.sample_hash([weight.detach() for weight in weights if weight.is_contiguous()])
    return identity, packed, sample, os.environ.get("MSN_ISA")


# ---- one copy of the weights ---------------------------------------------------------------------


def prepare(
    model: PreTrainedModel, dtype: torch.dtype | None = None, weights: str | None = None
) -> PreTrainedModel:
    """Pack a model's linear weights in place, for the native engine: one copy of the weights.

    The packed bytes take the place of the dense ones, layer by layer, a tied embedding's with the
    head's. Names, shapes, ``state_dict``, saving, and the model's own forward and gradients stay;
    the latter unpack every weight they use, which is slow. Weights cannot be changed while they are
    packed: optimizers and ``load_state_dict`` raise; ``model.to(...)`` that changes the dtype or
    the device makes dense weights again.

    Args:
        model: what ``generate(engine="native")`` decodes, on the CPU.
        dtype: float64, float32, bfloat16 or float16: the model's parameters are rounded to it
            (buffers stay); None: that of the model.
        weights: ``"int8"``: linear weights are rounded to int8, with a scale for each block of
            inputs of an output. That is lossy: ``state_dict`` gives the rounded weights. None: as
            ``dtype`` says, bit for bit.

    Returns:
        The model. One that is prepared so already stays; one that is prepared otherwise is undone
        by :func:`unprepare` first.

    Raises:
        ValueError: the model cannot be decoded natively, or an argument is none of these; says
            why. The model has dense weights then.
    """
    if weights not in (None, "int8"):
        raise ValueError(f"weights is {weights!r}; expected None or 'int8'")
    if dtype not in (None, *DTYPES):
        names = ", ".join(map(str, DTYPES))
        raise ValueError(f"dtype is {dtype}; expected None, {names}")
    dtype = dtype or model.dtype
    packed_as = weights or str(dtype).removeprefix("torch.")
    with _lock:
        now = prepared_of(model)
        if now is not None and (now.weights, now.dtype) == (packed_as, dtype):
            return model
        try:
            if Modules(model).adapted:
                raise NoPlan("it has an adapter; unload it before, or decode without preparing")
            _unprepare(model)
            pack_in_place(model, packed_as, dtype)
            model.config.dtype = dtype
            _packed(Modules(model), must=True)
            _C.release_freed()
        except NoPlan as reason:
            _unprepare(model)
            name = type(model).__name__
            raise ValueError(f"{name} cannot be prepared: {reason}") from None
    return model


def unprepare(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`prepare`: make the packed weights of a model dense ones again, and return it.

    They are what was packed: rounded where that rounded. A model without packed weights stays.
    """
    with _lock:
        _unprepare(model)
    return model


def _unprepare(model: PreTrainedModel) -> None:
    _kept.pop(model, None)
    unpack_in_place(model)


# ---- memory --------------------------------------------------------------------------------------


def _check_memory(plan: Plan, weights: str) -> None:
    """Refuse to pack a copy where memory does not plainly suffice."""
    all_of = [linear for layer in plan.layers for linear in linears(layer)[0]]
    needed = sum(
        _C.packed_bytes(weights, "", linear.outputs, linear.inputs, 1)
        for linear in (*all_of, plan.head)
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
def _check_logits(model: PreTrainedModel, plan: Plan, ours: ForwardPass, tolerance: float) -> None:
    """Refuse a plan whose pass does not give the model's own logits on a random tree after a random
    text, longer than the model's window where that is short.
    """
    windows = [layer.attention.window for layer in plan.layers]
    prefix = 6 + min((window for window in windows if 0 < window <= 600), default=0)
    tree, device = DraftTree((-1, 0, 0, 1, 2, 2)), model.device
    table = plan.positions
    if table is not None and len(table) <= prefix + tree.max_depth:
        raise NoPlan(f"its {len(table)} positions are too few to try its plan on")
    generator = torch.Generator("cpu").manual_seed(0)
    shape = 1, prefix + len(tree)
    tokens = torch.randint(plan.head.outputs, shape, generator=generator, device="cpu").to(device)
    text, nodes = tokens[:, :prefix], tokens[:, prefix:].contiguous()
    tensors = tree.tensors(device)
    none, at = torch.tensor([0], device=device), torch.tensor([prefix], device=device)
    with leaving_out(model):  # where it is the model's own
        first = ours.read(text, torch.arange(prefix, device=device)[None], none, 1)
    positions = prefix + tensors.depth.long()[None]
    found = ours.check(nodes, positions, at, none, tensors.ancestors, prefix + len(tree)).logits
    for leaf in (3, 4, 5):
        path = [leaf]
        while path[0]:
            path.insert(0, tree.parents[path[0]])
        ids = torch.cat([text, nodes[:, path]], 1)
        with leaving_out(model):
            plain = model(input_ids=ids, use_cache=False).logits[0, prefix - 1 :]
        difference = _relative(torch.cat([first[0], found[0, path]]), plain)
        if difference > tolerance:
            raise NoPlan(
                f"its plan does not give its own logits (they differ by {difference:.2g} of the"
                " largest)"
            )


def _relative(ours: Tensor, plain: Tensor) -> float:
    """Return the largest difference relative to the largest logit; infinite where one is NaN."""
    plain = plain.to(ours.dtype)
    difference = ((ours - plain).abs().max() / plain.abs().max()).item()
    return difference if difference == difference else float("inf")

"""The readers of plans: a model of a known family in, a :class:`Plan` out.

A family's reader is a few lines in :mod:`.llama` or :mod:`.gpt`, made of :mod:`.parts`. What a plan
cannot tell is refused before, in :mod:`.checks`.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..modules import Modules
from ..plan import NoPlan, Plan
from .checks import check_computation, check_config, check_weights
from .gpt import GPT
from .llama import LLAMA

__all__ = ["READERS", "check", "plan_for"]

# model_type -> (the class of transformers that is read, its reader)
READERS = LLAMA | GPT


CPU = torch.device("cpu")


def check(its: Modules, device: torch.device = CPU) -> None:
    """Refuse a model before its plan is read, as :func:`plan_for` does."""
    family = getattr(getattr(its.model, "config", None), "model_type", None)
    if family not in READERS:
        raise NoPlan(f"no plan is known for the family {family!r}")
    check_computation(its, READERS[family][0], device.type)
    check_weights(its, device)
    check_config(its.model.config)


def plan_for(model: PreTrainedModel, device: torch.device = CPU) -> Plan:
    """Read a model's plan; its tensors are the model's own parameters and views of them.

    Its weights are to lie on ``device``.

    The attention in use is read too (``"sdpa"`` leaves Gemma 2's soft cap out), so nobody may be
    decoding with the model meanwhile.

    Raises:
        NoPlan: ``model`` is of no known family, or computes something that is not in a plan: its
            class, modules, hooks, adapters, settings or weights are not plainly its family's.
    """
    check(Modules(model), device)
    _, read = READERS[model.config.model_type]
    plan = read(model)
    if len(plan.embedding) < plan.head.outputs:
        rows = len(plan.embedding)
        raise NoPlan(f"its head has {plan.head.outputs} outputs, and its embedding {rows} rows")
    return plan

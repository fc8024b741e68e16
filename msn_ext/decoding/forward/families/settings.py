"""What the readers of plans see beside classes and weights: as long as it stays the same, a plan
that was read stays right.
"""

from __future__ import annotations

from itertools import filterfalse

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modules import Modules

_IS_OF_EVERY_MODULE = frozenset(vars(nn.Module())).__contains__
_PLAIN = {bool, int, float, str, type(None)}


def settings_of(its: Modules) -> tuple:
    """Return a model's configuration, and of its modules, without adapters that are left out, the
    settings and the names of their parts. Modules and tensors are told apart by their identity.

    Raises:
        CannotGate: a gated adapter cannot be left out.
    """
    found: list[object] = [repr(vars(its.model.config))]
    for module in its.base:
        found.append(type(module))
        for parts in (module._modules, module._parameters, module._buffers):
            if parts:
                found += parts
                found += map(id, parts.values())
        whole = isinstance(module, PreTrainedModel)  # which keeps books that change
        its_own = vars(module)
        for name in filterfalse(_IS_OF_EVERY_MODULE, its_own):
            value = its_own[name]
            if type(value) in _PLAIN:
                found += name, value
            elif isinstance(value, Tensor):
                found += name, id(value)
            elif isinstance(value, (dict, list, tuple)) and not whole:
                found += name, repr(value)
    return tuple(found)

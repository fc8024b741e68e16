"""The method ``generate`` of a model, which ours calls, is called by, or takes the place of."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar, cast

from transformers import GenerationMixin

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

TRANSFORMERS = GenerationMixin.generate
"""As transformers has it, whatever took its place later."""


def model_by_name(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Take ``model=`` beside a positional prompt, too: transformers calls the function of a folder
    ``custom_generate`` so.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        if "model" in kwargs:
            args = kwargs.pop("model"), *args
        return function(*args, **kwargs)

    return cast(Callable[Arguments, Result], call)


def method_of(model: Any) -> Callable:
    """Return the method ``generate`` of the model's class, or what a wrapper passes on. Of the
    instance, it may be ours.

    Raises:
        ValueError: the model has none.
    """
    method = getattr(type(model), "generate", None)
    if method is not None:
        return functools.partial(method, model)
    return getattr(model, "generate", None) or transformers_method_of(model)


def transformers_method_of(model: Any) -> Callable:
    """Return transformers' own ``generate`` of the model, although a class has another one.

    Raises:
        ValueError: the model is none of transformers' that generate.
    """
    if isinstance(model, GenerationMixin):
        return functools.partial(TRANSFORMERS, cast(Any, model))
    hint = ", such as its .module" if hasattr(model, "module") else ""
    raise ValueError(
        f"model is a {type(model).__name__}, which has no generate; expected a causal language"
        f" model of transformers{hint}"
    )


def argument_of_caller(name: str) -> Any:
    """Return an argument of the ``model.generate`` that calls us back, which hands it to no custom
    decoding method; None: it has none, or does not call us.
    """
    code = inspect.unwrap(TRANSFORMERS).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame and frame.f_locals[name]

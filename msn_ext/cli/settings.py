"""Options of the command line from the fields of settings (:mod:`msn_ext.recipe.settings`)."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any, TypeVar

from msn_ext.recipe.settings import Numbers, Option, Settings, options

from .common import number

Kind = TypeVar("Kind", bound=Settings)


def add_settings(parser: argparse._ActionsContainer, settings: Settings, *names: str) -> None:
    """Add an option for each field of settings that is one, or only for those of these names.

    Args:
        settings: whose values are the defaults.
    """
    for field, option in options(settings):
        if not names or field.name in names:
            default = getattr(settings, field.name)
            form = _form(option, default, default == field.default)
            parser.add_argument("--" + field.name.replace("_", "-"), **form)


def _form(option: Option, default, usual: bool) -> dict[str, Any]:
    """Return argparse's arguments for an option."""
    if option.values is bool:
        return {"action": "store_true", "default": default, "help": option.help}
    words = f"{default:g}" if isinstance(default, float) else f"{default}"
    if usual and option.shown is not None:
        words = option.shown
    help = f"{option.help} (default: {words})".strip() if words else option.help
    form: dict[str, Any] = {"default": default, "help": help, "metavar": option.metavar}
    if isinstance(option.values, Numbers):
        kind, holds, expected = option.values
        form["type"] = functools.partial(number, kind=kind, holds=holds, expected=expected)
    else:
        form["choices"] = option.values
    return form


def settings_from(arguments: argparse.Namespace, settings: Kind) -> Kind:
    """Return the settings with the values that the command line has for them.

    Raises:
        ValueError: a value is none that its option takes.
    """
    given = vars(arguments)
    names = [field.name for field, _ in options(settings) if field.name in given]
    return dataclasses.replace(settings, **{name: given[name] for name in names})

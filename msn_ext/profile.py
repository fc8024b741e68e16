"""Keep what is known of a model: how long a step takes on a machine by its tokens, the factors of
guesses, and what it usually says.

``msn tune`` writes a profile, ``msn habits`` the habits; ``draft="auto"`` reads both. One file per
shape of model, of a profile also per device and dtype, so a fine-tuned model shares its base
model's.
"""

from __future__ import annotations

import json
import platform
import re
import warnings
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .decoding import BestFirst, Corpus, Habits
from .decoding.drafters import factors
from .decoding.sizing import StepTimes
from .paths import cache_root, replacing


@dataclass
class Profile:
    """A model's figures on a machine.

    Attributes:
        times: seconds of a step by the tokens that it computes.
        factors: float64 [348], fitted to this model; None: those of the package.
        about: how they were found, for people.
    """

    times: dict[int, float]
    factors: Tensor | None = None
    about: dict = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = None if self.factors is None else factors.tables(self.factors)
        text = json.dumps({"about": self.about, "times": self.times, "factors": tables}, indent=1)
        with replacing(path) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: it is none; says what is wrong.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            times = {int(tokens): float(seconds) for tokens, seconds in content["times"].items()}
            tables = content["factors"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no profile: {error!r}") from error
        if not times or not all(
            tokens >= 1 and 0 < seconds < float("inf") for tokens, seconds in times.items()
        ):
            raise ValueError(f"{path} is no profile: times is {times}; expected seconds by tokens")
        return cls(
            times,
            None if tables is None else factors.from_tables(tables, str(path)),
            content.get("about", {}),
        )


def machine(device: torch.device) -> str:
    """Return the device's name, for a CPU with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        name = found[1]
    return f"{name} {torch.get_num_threads()} threads"


def profile_path(model, engine: str = "torch") -> Path:
    """Return the path of a model's profile on its device, under :func:`.paths.cache_root`.

    Args:
        engine: what computes the forward passes, "native" or "torch".
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    name = f"{type(model).__name__} {size} {dtype} {machine(model.device)}"
    if engine != "torch":
        name += f" {engine}"
    return cache_root() / "profiles" / (re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") + ".json")


def habits_path(model) -> Path:
    """Return the path of a model's habits, under :func:`.paths.cache_root`."""
    size = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    name = f"{type(model).__name__}-{size}-{vocabulary}.safetensors"
    return cache_root() / "habits" / name


# Of every model, by device, dtype and engine: the times of its steps, and its factors.
_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# Of every model: its habits, None where there are none.
_habits: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def auto(
    model, corpus: Corpus | None = None, engine: str = "torch", habits: Habits | None = None
) -> BestFirst:
    """Return best-first drafting for a model: by its profile, its habits, and what this process has
    seen of its steps.

    Args:
        engine: what computes the forward passes, "native" or "torch".
        habits: of the model; None: those that ``msn habits`` keeps for it, if any.
    """
    known, key = _known.setdefault(model, {}), (str(model.device), model.dtype, engine)
    if key not in known:
        profile = None
        try:
            if (path := profile_path(model, engine)).exists():
                profile = Profile.load(path)
        except (OSError, RuntimeError, ValueError) as error:  # Runtime: there is no home directory
            warnings.warn(f"drafting goes on without a profile: {error}", stacklevel=2)
        times = StepTimes(profile.times if profile else None, model.device.type)
        known[key] = times, profile.factors if profile else None
    times, fitted = known[key]
    if habits is None:
        habits = kept_habits(model)
    if habits is not None:
        fitted = None  # they bring their own, fitted with them
    return BestFirst(times=times, factors=fitted, corpus=corpus, habits=habits)


def kept_habits(model) -> Habits | None:
    """Return the habits that ``msn habits`` keeps for a model, looked for once; None: there are
    none.
    """
    if model not in _habits:
        _habits[model] = None
        try:
            if (path := habits_path(model)).exists():
                _habits[model] = Habits.load(path)
        except (OSError, RuntimeError, ValueError) as error:  # Runtime: there is no home directory
            warnings.warn(f"drafting goes on without habits: {error}", stacklevel=3)
    return _habits[model]

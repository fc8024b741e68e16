"""Settings of noisy fine-tuning, each defined once: its default, its values, its words for
``--help``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from msn_ext.training import Starts

LENGTH, CONTENT, SEGMENTS = 4, "ahead", {"branch": 24, "replace": 1, "none": 1}
GATED_LENGTH, GATED_CONTENT, GATED_SEGMENTS = 1, "mask", 128
NOISE_WEIGHT, TAUGHT_WEIGHT, SETTLING = 0.3, 0.03, 2 / 3
LORA_RATE, TAUGHT_RATE, FULL_RATE = 1e-3, 3e-4, 2e-5


class Numbers(NamedTuple):
    """The numbers that an option takes."""

    kind: type[int] | type[float]
    holds: Callable[[Any], bool]
    expected: str


def whole(least: int, most: int | None = None) -> Numbers:
    """Return the whole numbers of at least ``least``, and at most ``most``."""
    if most is None:
        return Numbers(int, lambda x: x >= least, f"a whole number of at least {least}")
    return Numbers(int, lambda x: least <= x <= most, f"a whole number from {least} to {most}")


ABOVE_0 = Numbers(float, lambda x: 0 < x < float("inf"), "a number above 0")


@dataclass(frozen=True)
class Option:
    """A setting as an option of the command line.

    Attributes:
        values: numbers, texts to choose from, or bool for a switch.
        help: without the default.
        metavar: of the value.
        shown: what help says instead of the default's value; "": nothing.
    """

    values: Numbers | tuple[str, ...] | type[bool]
    help: str = ""
    metavar: str | None = None
    shown: str | None = None

    def check(self, name: str, value) -> None:
        """Raise ValueError, with the option's name, for a value that it does not take."""
        if isinstance(self.values, Numbers):
            kinds = (int,) if self.values.kind is int else (int, float)
            right = type(value) in kinds and self.values.holds(value)
            expected = self.values.expected
        elif isinstance(self.values, tuple):
            right = value in self.values
            expected = "one of " + ", ".join(map(repr, self.values))
        else:
            right, expected = isinstance(value, bool), "True or False"
        if not right:
            raise ValueError(f"{name} is {value!r}; expected {expected}")


def option(
    default, values, help: str = "", metavar: str | None = None, shown: str | None = None
) -> Any:
    """Return a field that is an :class:`Option` of the command line, too."""
    return field(default=default, metadata={"option": Option(values, help, metavar, shown)})


def options(settings: Settings) -> list[tuple[Field, Option]]:
    """Return the fields of settings that are options."""
    return [(f, f.metadata["option"]) for f in fields(settings) if "option" in f.metadata]


@dataclass(frozen=True)
class Settings:
    """Fields that are checked when they are set; the default of a field is always right."""

    def __post_init__(self) -> None:
        for f, found in options(self):
            if (value := getattr(self, f.name)) != f.default:
                found.check(f.name, value)


BESIDE_GATE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "layout": (
        lambda layout: layout == "branch",
        "the text beside the noise teaches it; expected branch",
    ),
    "content": (
        lambda content: content != "self",
        "noise is what the untouched model would have to guess; expected another one",
    ),
    "noise_weight": (
        lambda weight: weight is None,
        "noise alone is learned; leave it out",
    ),
    "lora_rank": (lambda rank: rank > 0, "an adapter is what is gated; expected 1 or more"),
    "teacher": (
        lambda teacher: teacher is None,
        "the untouched model is the teacher by itself; leave it out",
    ),
}
"""Which values of other settings go with a gate, and why no others."""


def check_gate(settings: Mapping[str, Any], name: Callable[[str], str] = str) -> None:
    """Raise ValueError where settings do not go with ``gate``, or need it.

    Args:
        settings: some or all of the fields of :class:`NoiseSettings` and :class:`TrainSettings`.
        name: of a setting, as the message shall have it.
    """
    if not settings["gate"]:
        if settings["curriculum"]:
            raise ValueError(f"{name('curriculum')} needs {name('gate')}")
        return
    for setting, (fits, why) in BESIDE_GATE.items():
        if setting in settings and not fits(value := settings[setting]):
            raise ValueError(f"{name('gate')} does not go with {name(setting)} {value}: {why}")


@dataclass(frozen=True)
class SampleSettings(Settings):
    """Settings of the samples: the conversations they are made of, and whose answers they hold."""

    samples: int | None = option(
        None, whole(1), "conversations, as many of each file", "N", shown="all"
    )
    self_distill: bool = option(False, bool, "learn the model's own answers to the first questions")
    max_new_tokens: int = option(256, whole(1), "of an answer of its own", "N")


@dataclass(frozen=True)
class NoiseSettings(Settings):
    """Settings of the noise: its place in a sample, its content, and what a label after it counts.

    Attributes:
        layout: of :class:`msn_ext.NoisyCollator`; "none": no noise, plain fine-tuning.
        gate: the adapter is for the noise alone (:func:`msn_ext.add_noise`), in branches; labels
            have no weight.
        curriculum: with ``gate``, segments grow from 1 token to ``length``.
        noise_weight: a tenth of it in the last third of the steps, so that what the model says on
            clean text settles. None: 0.3 for branches; in place 1 throughout, as the paper;
            with a teacher :func:`decided`.
        teacher: "base": of :func:`msn_ext.add_noise`; "labels": none. None: :func:`decided`.
        content: of :class:`msn_ext.NoisyCollator`, or "mask": the tokenizer's padding throughout.
        length, segments, location: of :class:`msn_ext.NoisyCollator`. ``length``, ``segments`` and
            ``content`` are None where the layout and the gate choose them (:meth:`chosen`).
    """

    layout: str = option("branch", ("branch", "replace", "none"))
    gate: bool = option(
        False, bool, "an adapter for the noise alone: what the model says of a text cannot change"
    )
    divergence: str = option(
        "kl",
        ("kl", "tv", "both"),
        "from the untouched model, with --gate or --teacher base",
    )
    teacher: str | None = option(
        None,
        ("base", "labels"),
        "what is learned: what the model says of the clean text without the adapter, or the labels",
        shown="base for an adapter with --self-distill, otherwise labels",
    )
    length: int | None = option(
        None,
        whole(1, 64),
        "noise tokens of a segment",
        "N",
        shown=f"{LENGTH}, with --gate {GATED_LENGTH}",
    )
    curriculum: bool = option(False, bool, "segments grow from 1 token to --length, with --gate")
    segments: int | None = option(
        None,
        whole(1, 256),
        "of noise in a sample",
        "N",
        shown=f"{SEGMENTS['branch']} branches, with --gate {GATED_SEGMENTS},"
        f" {SEGMENTS['replace']} in place",
    )
    content: str | None = option(
        None,
        ("ahead", "random", "mixed", "self", "mask"),
        shown=f"{CONTENT}, with --gate {GATED_CONTENT}",
    )
    noise_weight: float | None = option(
        None,
        ABOVE_0,
        "of a label after noise, where a clean one counts 1; a tenth of it in the last third of the"
        " steps",
        "X",
        shown=f"{NOISE_WEIGHT} for branches, with --teacher base {TAUGHT_WEIGHT}; in place"
        " 1 throughout, as in the paper",
    )
    location: str | Starts = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gate(vars(self))
        if self.teacher == "base" and (why := self._untaught()):
            raise ValueError(f"teacher 'base' and {why} do not go together")

    def _untaught(self) -> str | None:
        """Return the setting that leaves a teacher nothing to teach, if any."""
        if self.layout == "none":
            return "layout 'none', plain fine-tuning,"
        return "content 'self'" if self.content == "self" else None

    def chosen(self) -> dict[str, Any]:
        """Return ``length``, ``segments`` and ``content`` with their defaults."""
        gated = GATED_LENGTH, GATED_SEGMENTS, GATED_CONTENT
        usual = LENGTH, SEGMENTS[self.layout], CONTENT
        names = "length", "segments", "content"
        return {
            name: default if (value := getattr(self, name)) is None else value
            for name, default in zip(names, gated if self.gate else usual)
        }

    def of_collator(self, mask: int) -> dict[str, Any]:
        """Return the settings of :class:`msn_ext.NoisyCollator`, all but the seed.

        Args:
            mask: the token that stands for noise where ``content`` is "mask".
        """
        found = self.chosen() | {"layout": self.layout, "location": self.location}
        return found | ({"content": mask} if found["content"] == "mask" else {})

    def loss_weights(self) -> tuple[float, float] | Callable[[float], tuple[float, float]]:
        """Return ``loss_weights`` of :func:`msn_ext.add_noise`."""
        weight = self.noise_weight
        if weight is None:
            if self.layout == "replace":
                return 1.0, 1.0
            weight = NOISE_WEIGHT
        return lambda done: (1.0, weight if done < SETTLING else weight / 10)


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Settings of the training: length of samples, samples held out, how the others are learned.

    Attributes:
        lora_rank: of the adapter; 0: all weights are trained.
        learning_rate: None: 1e-3 for an adapter, 2e-5 for all weights (the paper's); of an adapter
            that the base model teaches :func:`decided`.
        max_steps: -1: as many as ``epochs`` takes.
        seed: of the samples held out, the adapter, the order of the samples, and the noise.
    """

    lora_rank: int = option(16, whole(0, 1024), "0: all weights", "R")
    learning_rate: float | None = option(
        None,
        ABOVE_0,
        metavar="X",
        shown="1e-3 for an adapter, with --teacher base 3e-4; 2e-5 for all weights",
    )
    epochs: float = option(1.0, ABOVE_0, metavar="N")
    max_steps: int = option(-1, whole(1), "stop after so many steps", "N", shown="")
    batch_size: int = option(4, whole(1), "samples of a step", "N")
    max_length: int = option(512, whole(1), "tokens of a sample", "N")
    save_steps: int = option(50, whole(1), "between checkpoints", "N")
    held_out: int = option(32, whole(1), "samples for the figures", "N")
    bf16: bool = option(False, bool, "compute in bfloat16 (the weights stay float32)")
    seed: int = option(0, whole(0, 2**32 - 1), metavar="N")

    @property
    def rate(self) -> float:
        """The learning rate, with its default."""
        return self.learning_rate or (LORA_RATE if self.lora_rank else FULL_RATE)


def decided(
    noise: NoiseSettings, training: TrainSettings, self_distill: bool
) -> tuple[NoiseSettings, TrainSettings]:
    """Return settings with the teacher, the learning rate and the weight of noise that they leave
    open: where a model learns its own answers by an adapter, it is held to its own distribution, at
    a lower rate, and noise weighs less.

    Raises:
        ValueError: there is no adapter, without which the base model could teach.
    """
    if noise.gate:
        return noise, training
    if noise.teacher == "base" and not training.lora_rank:
        raise ValueError("teacher 'base' needs an adapter, but lora_rank is 0; expected 1 or more")
    if noise.teacher is None:
        base = self_distill and training.lora_rank and noise._untaught() is None
        noise = replace(noise, teacher="base" if base else "labels")
    if noise.teacher == "base" and noise.noise_weight is None:
        noise = replace(noise, noise_weight=TAUGHT_WEIGHT)
    if noise.teacher == "base" and training.learning_rate is None:
        training = replace(training, learning_rate=TAUGHT_RATE)
    return noise, training

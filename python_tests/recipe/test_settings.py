"""Settings: what they take, in the same words for the command line and for Python."""

import argparse
import subprocess
import sys

import pytest

from helpers.families import tiny_model
from msn_ext import NoisyCollator
from msn_ext.cli.settings import add_settings, settings_from
from msn_ext.recipe.settings import (
    NoiseSettings,
    Numbers,
    SampleSettings,
    TrainSettings,
    options,
)

ALL = (SampleSettings, NoiseSettings, TrainSettings)


def parsed(settings, *arguments: str, names: tuple[str, ...] = ()):
    parser = argparse.ArgumentParser()
    add_settings(parser, settings, *names)
    return settings_from(parser.parse_args(arguments), settings)


@pytest.mark.parametrize("kind", ALL)
def test_the_command_line_has_the_defaults_of_python(kind):
    assert parsed(kind()) == kind()


def test_options_are_settings():
    given = parsed(NoiseSettings(), "--segments", "3", "--noise-weight", "2", "--content", "self")
    assert given == NoiseSettings(segments=3, noise_weight=2.0, content="self")
    assert parsed(TrainSettings(), "--bf16", "--lora-rank", "0").bf16


def test_a_benchmark_has_some_options_and_defaults_of_its_own():
    own = TrainSettings(max_length=400, seed=7)
    assert parsed(own, "--epochs", "2", names=("epochs", "max_length")) == TrainSettings(
        max_length=400, seed=7, epochs=2.0
    )
    parser = argparse.ArgumentParser()
    add_settings(parser, own, "max_length", "epochs")
    assert "(default: 400)" in parser.format_help() and "--seed" not in parser.format_help()


@pytest.mark.parametrize(
    "kind, wrong, expected",
    [
        (NoiseSettings, {"length": 65}, "length is 65; expected a whole number from 1 to 64"),
        (NoiseSettings, {"length": True}, "length is True; expected a whole number from 1 to 64"),
        (NoiseSettings, {"segments": 0}, "segments is 0; expected a whole number from 1 to 256"),
        (NoiseSettings, {"layout": "tree"}, "layout is 'tree'; expected one of 'branch', "),
        (NoiseSettings, {"noise_weight": -1}, "noise_weight is -1; expected a number above 0"),
        (TrainSettings, {"batch_size": 0}, "batch_size is 0; expected a whole number of at least"),
        (TrainSettings, {"batch_size": 2.5}, "batch_size is 2.5; expected a whole number"),
        (TrainSettings, {"epochs": float("nan")}, "epochs is nan; expected a number above 0"),
        (TrainSettings, {"bf16": "yes"}, "bf16 is 'yes'; expected True or False"),
        (TrainSettings, {"seed": 2**32}, "seed is 4294967296; expected a whole number from 0"),
        (SampleSettings, {"samples": "all"}, "samples is 'all'; expected a whole number"),
    ],
)
def test_wrong_settings_are_named(kind, wrong, expected):
    with pytest.raises(ValueError, match=expected):
        kind(**wrong)


def test_settings_take_what_the_collator_takes():
    config = tiny_model("llama", 0).config
    found = {field.name: option.values for field, option in options(NoiseSettings())}

    def collator(**settings):
        return NoisyCollator(lambda samples: {}, config=config, **settings)

    for name in ("length", "segments"):
        assert isinstance(found[name], Numbers)
        for value in (0, 1, 64, 65, 256, 257):
            if found[name].holds(value):
                collator(**{name: value})
            else:
                with pytest.raises(ValueError, match=f"{name} is {value}; expected 1 to"):
                    collator(**{name: value})
    for name, other in (("layout", "none"), ("content", "other")):
        with pytest.raises(ValueError, match=name) as error:
            collator(**{name: other})
        for value in set(found[name]) - {other, "mask"}:  # which stands for a token's id
            assert repr(value) in str(error.value)
            collator(**{name: value})


@pytest.mark.parametrize("layout, segments", [("branch", 24), ("replace", 1)])
def test_segments_depend_on_the_layout(layout, segments):
    assert NoiseSettings(layout=layout).of_collator(0)["segments"] == segments
    assert NoiseSettings(layout=layout, segments=9).of_collator(0)["segments"] == 9


def test_a_gate_has_defaults_of_its_own():
    """Those that learn most (docs/training.md)."""
    of_collator = NoiseSettings(gate=True).of_collator(7)
    assert of_collator == {
        "layout": "branch",
        "length": 1,
        "segments": 128,
        "content": 7,
        "location": "random",
    }
    given = parsed(NoiseSettings(), "--gate", "--length", "3", "--content", "ahead")
    assert given.chosen() == {"length": 3, "segments": 128, "content": "ahead"}
    usual = {"length": 4, "segments": 24, "content": "ahead"}
    assert parsed(NoiseSettings()).chosen() == usual


def test_settings_need_no_torch(tmp_path):
    code = "import sys, msn_ext.cli, msn_ext.recipe.settings; assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

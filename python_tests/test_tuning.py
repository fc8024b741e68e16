"""Measurements of `msn tune`, the profile that keeps them, and `draft="auto"`, which goes by it."""

import functools
import json
import time
import warnings

import pytest
import torch

from helpers.families import tiny_model
from msn_ext import generate, profile
from msn_ext.decoding.drafters import calibration, factors
from msn_ext.profile import Profile, profile_path
from msn_ext.tuning import ROUNDS, learn_factors, measure_step_times, tune

IDS = torch.tensor([[5, 9, 4, 7]])
SETTINGS = dict(do_sample=False, max_new_tokens=40, eos_token_id=None, return_dict_in_generate=True)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model without a profile, in a cache of its own, decoded by its own forward pass."""
    monkeypatch.setenv("MSN_CACHE", str(tmp_path))
    monkeypatch.setenv("MSN_ENGINE", "torch")
    model = tiny_model("llama", 3)
    profile._known.pop(model, None)
    return model


def tokens(text: str) -> torch.Tensor:
    return torch.tensor([[3 + ord(letter) % 20 for letter in text]], dtype=torch.int64).view(1, -1)


def accept_lengths(model) -> list[int]:
    return generate(model, IDS, **SETTINGS).accept_lengths[0].tolist()


def test_a_profile_is_kept_whole(tmp_path):
    path = tmp_path / "new" / "profile.json"
    kept = Profile({1: 0.5, 64: 0.75}, factors.load() * 2, {"commit": "abc"})
    kept.save(path)
    found = Profile.load(path)
    assert found.times == kept.times and found.about == kept.about
    torch.testing.assert_close(found.factors, kept.factors, rtol=6e-3, atol=0)  # three digits
    Profile({1: 0.5}).save(path)
    assert Profile.load(path).factors is None and [p.name for p in path.parent.iterdir()] == [
        "profile.json"
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is no profile"),
        ("[]", "is no profile"),
        ('{"times": {}, "factors": null}', "times is {}"),
        ('{"times": {"1": -1}, "factors": null}', "times is"),
        ('{"times": {"1": 1}, "factors": {}}', "bias has shape"),
        ('{"times": {"1": 1}, "factors": 5}', "bias is no table"),
        ('{"times": {"1": 1}, "factors": {"bias": [[null]]}}', "bias is no table"),
    ],
)
def test_what_is_no_profile_is_refused_and_decoding_goes_on(model, content, message):
    path = profile_path(model)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Profile.load(path)
    with pytest.warns(UserWarning, match="goes on without a profile"):
        out = generate(model, IDS, **SETTINGS)
    assert torch.equal(out.sequences, model.generate(IDS, **SETTINGS).sequences)


@pytest.mark.parametrize("dear", [True, False])
def test_auto_goes_by_the_profile(model, dear):
    Profile({1: 1e-9, 500: 1.0 if dear else 1e-9}).save(profile_path(model))
    accepts = accept_lengths(model)
    if dear:
        assert accepts[1:] == [1] * (len(accepts) - 1)
    else:
        assert max(accepts[1:]) > 1


def test_auto_remembers_the_times_of_a_model_in_this_process(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = profile.auto(model)
        generate(model, IDS, draft=first, **SETTINGS)
        assert first._times(8) < 0.5 and profile.auto(model)._times is first._times
    assert (
        profile.auto(tiny_model("llama", 3).double())._times is not first._times
        or model.dtype == torch.float64
    )


def test_paths_tell_models_machines_and_dtypes_apart(model):
    paths = {
        profile_path(model),
        profile_path(tiny_model("gpt2", 3)),
        profile_path(tiny_model("llama", 3, torch.bfloat16)),
    }
    assert len(paths) == 3 and all(path.parent == profile_path(model).parent for path in paths)


def test_the_native_engine_has_times_and_profiles_of_its_own(model, monkeypatch):
    monkeypatch.setenv("MSN_ENGINE", "native")
    plain = model.generate(IDS, **SETTINGS).sequences
    assert torch.equal(generate(model, IDS, **SETTINGS).sequences, plain)
    assert profile.auto(model, engine="native")._times is not profile.auto(model)._times
    found, path = tune(model, [], context=8, progress=False)
    assert path == profile_path(model, "native") != profile_path(model)
    assert found.about["engine"] == "native"
    profile._known.pop(model)
    assert torch.equal(generate(model, IDS, **SETTINGS).sequences, plain)
    assert profile.auto(model, engine="native")._times(1) == found.times[1]


def test_step_times_are_those_of_whole_steps(model, monkeypatch):
    sizes = (1, 4, 64)
    seen, forward = [], model.forward

    @functools.wraps(forward)
    def slow(*args, **kwargs):
        seen.append(kwargs["input_ids"].shape[1])
        time.sleep(0.002 * seen[-1] ** 0.5)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", slow)
    times = measure_step_times(model, context=32, sizes=sizes, progress=False)
    assert list(times) == list(sizes) and seen[1:] == [*sizes] * ROUNDS
    for size in sizes:
        assert times[size] >= 0.002 * size**0.5
    assert times[64] > times[1]


def test_fitting_finds_the_factors_that_made_the_records():
    """Draws from known factors; the fit comes near them where there is evidence, and stays where
    there is none.
    """
    generator = torch.Generator().manual_seed(0)
    truth = factors.load()
    bias, sure, unsure = 0, 36 + 12 + 7, 36 + 12 + 2
    truth[[bias, sure, unsure]] = torch.tensor([0.5, 8.0, 0.25], dtype=torch.float64)
    records: list = []
    for _ in range(6000):
        scores = torch.tensor([1.0, 0.5 * 8.0, 0.5 * 0.25, 0.5 * 0.25], dtype=torch.float64)
        came = int(torch.multinomial(scores / scores.sum(), 1, generator=generator))
        records.append((bias, [(11, sure), (12, unsure), (13, unsure)], [99, 11, 12, 13][came]))
    prior = torch.ones_like(truth)
    fitted, before, after = calibration.fit(records, prior)
    assert fitted[bias] * fitted[sure] == pytest.approx(4.0, rel=0.1)
    assert fitted[bias] * fitted[unsure] == pytest.approx(0.125, rel=0.2)
    untouched = torch.ones(len(prior), dtype=torch.bool)
    untouched[[bias, sure, unsure]] = False
    torch.testing.assert_close(fitted[untouched], prior[untouched])
    assert after > before + 0.3


def test_learned_factors_make_the_models_own_answers_likelier(model):
    prior = torch.ones(348, dtype=torch.float64)
    fitted, about = learn_factors(
        model, [*map(tokens, ["abcabc", "hello world", "zzz"])], prior, progress=False
    )
    assert about["prompts"] == 3 and about["nodes"] > 30 and about["after"] > about["before"]
    assert (
        fitted.shape == prior.shape and bool((fitted > 0).all()) and not torch.equal(fitted, prior)
    )


def test_prompts_that_do_not_fit_are_passed_over(model, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 20)
    prior = torch.ones(348, dtype=torch.float64)
    _, about = learn_factors(
        model, [*map(tokens, ["abcabc", "z" * 20, "", "z" * 40])], prior, progress=False
    )
    assert about["prompts"] == 1
    with pytest.raises(ValueError, match="0 of 1 fit"):
        learn_factors(model, [*map(tokens, ["z" * 40])], prior, progress=False)


def test_the_factors_of_the_package_say_what_they_come_from():
    about = json.loads(factors.SHIPPED.read_text())
    assert about["model"] and about["prompts"] and about["nodes"] > 1000

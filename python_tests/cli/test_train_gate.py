"""`msn train --gate`: an adapter for the noise alone."""

import json

import pytest
import torch

from helpers.cases import one_thread
from helpers.conversations import command
from msn_ext import cli
from msn_ext.cli.loading import load
from msn_ext.gates import gated_noise
from msn_ext.recipe.metrics import DRAFTS

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
GATED = ["--gate", "--length", "2"]


@pytest.fixture(scope="module")
def trained(folder, data, tmp_path_factory):
    """The folder of a run, and what it said."""
    output = tmp_path_factory.mktemp("gated") / "out"
    with one_thread(), pytest.MonkeyPatch.context() as patched:
        said: list[str] = []
        patched.setattr("builtins.print", lambda *words, **_: said.append(" ".join(words)))
        assert cli.main(command(folder, data, output, *GATED, "--epochs", "6")) == 0, said
    return output, "\n".join(said)


def test_the_noise_gets_better_and_the_text_stays(trained):
    output, said = trained
    figures = json.loads((output / "figures.json").read_text())
    before, after = figures["before"], figures["after"]
    for name in ("loss", "accuracy", "tokens"):
        assert before[name] == after[name]
    for name in ("top1", "top8", "top10"):
        assert len(before[name]) == 2
        assert sum(after[name]) > 1.2 * sum(before[name]), name
    assert set(before["MAT"]) == set(after["MAT"]) == set(DRAFTS)
    assert before["MAT"]["paper"] == after["MAT"]["paper"], "it has no tails"
    assert figures["verdict"] in said and figures["verdict"].split(":")[0] in (
        "paid",
        "did not pay",
    )
    assert "tokens a pass, auto@64" in said and "among eight after 2, %" in said
    assert "text: the base model's" in said and "a gated adapter, which stays beside" in said
    assert all("clean_loss" not in log for log in figures["log"])


def test_its_adapter_is_loaded_as_one_that_is_gated(folder, trained):
    output, _ = trained
    ids = torch.tensor([[104, 101, 108, 108, 111]])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model, _, _ = load(str(output), None, "cpu")
    mark = {"gated": True, "length": 2, "content": 256}
    assert gated_noise(model.peft_config["default"]) == mark
    with torch.no_grad():
        text = base(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, text)
        assert not torch.equal(model(input_ids=ids).logits, text), "it is there, and not merged"


def test_training_in_bfloat16_leaves_a_model_that_computes_as_before(folder, data, tmp_path):
    output = tmp_path / "out"
    with one_thread():
        options = [*GATED, "--bf16", "--divergence", "both", "--max-steps", "1"]
        assert cli.main(command(folder, data, output, *options)) == 0
    figures = json.loads((output / "figures.json").read_text())
    assert figures["after"]["loss"] == figures["before"]["loss"]


def test_a_base_model_that_changed_is_no_result(folder, data, tmp_path, capsys, monkeypatch):
    """The check finds one weight that moved by one bit."""
    import msn_ext.recipe.train as recipe

    trained = recipe.train

    def harmful(model, *arguments, **settings):
        model, log = trained(model, *arguments, **settings)
        weight = model.get_base_model().lm_head.weight.data
        weight[3, 0] = torch.nextafter(weight[3, 0], torch.tensor(9.0))
        return model, log

    monkeypatch.setattr(recipe, "train", harmful)
    output = tmp_path / "out"
    assert cli.main(command(folder, data, output, *GATED, "--max-steps", "1")) == 1
    assert "changed what the base model says of a text" in capsys.readouterr().err
    assert "after" not in json.loads((output / "figures.json").read_text())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--lora-rank", "0"], "--gate does not go with --lora-rank 0: an adapter is what"),
        (["--layout", "replace"], "--gate does not go with --layout replace: the text beside"),
        (["--layout", "none"], "--gate does not go with --layout none: the text beside"),
        (["--noise-weight", "0.3"], "--gate does not go with --noise-weight 0.3: noise alone"),
        (["--content", "self"], "--gate does not go with --content self: noise is what"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_does_not_go_with_a_gate(folder, data, tmp_path, capsys, more, message):
    assert cli.main(command(folder, data, tmp_path / "out", "--gate", *more)) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_curriculum_is_a_gate_s(folder, data, tmp_path, capsys):
    assert cli.main(command(folder, data, tmp_path / "out", "--curriculum")) == 2
    assert "--curriculum needs --gate" in capsys.readouterr().err

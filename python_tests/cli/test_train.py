"""`msn train`: the command and its figures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from helpers.cases import one_thread
from helpers.conversations import DATA, TEMPLATE, command, tiny_llama
from helpers.samples import byte_tokenizer
from msn_ext import cli

pytest.importorskip("peft")
pytest.importorskip("accelerate")


def test_a_model_learns_to_guess(folder, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(command(folder, data, output, "--epochs", "6")) == 0
    said = capsys.readouterr().out
    assert "56 samples" in said and "4 held out" in said and "tokens a pass, auto@64" in said
    assert "paid: " in said.splitlines()[-2]
    figures = json.loads((output / "figures.json").read_text())
    before, after = figures["before"], figures["after"]
    assert after["loss"] < 0.8 * before["loss"]
    assert sum(after["top10"]) > 1.2 * sum(before["top10"])
    assert (
        cli.main(
            [
                "generate",
                "--model",
                str(output),
                "--prompt",
                "one two?",
                "--max-new-tokens",
                "5",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    capsys.readouterr()
    # The same command again has nothing left to do; another one is refused.
    assert cli.main(command(folder, data, output, "--epochs", "6")) == 0
    assert json.loads((output / "figures.json").read_text())["after"] == after
    assert cli.main(command(folder, data, output, "--epochs", "7")) == 1
    assert "holds a run with --epochs 6.0, now it is 7.0" in capsys.readouterr().err


def test_damage_is_said(folder, data, tmp_path, capsys):
    """Also where nothing is left to do."""
    output, options = tmp_path / "out", ["--learning-rate", "5", "--max-steps", "8"]
    for _ in range(2):
        assert cli.main(command(folder, data, output, *options)) == 0
        said = capsys.readouterr()
        assert "msn: the training damaged the model: " in said.err and "--gate" in said.err
        assert "paid: " in said.out or "did not pay: " in said.out
    figures = json.loads((output / "figures.json").read_text())
    assert figures["verdict"] in said.out and figures["damage"]
    assert all(found in said.err for found in figures["damage"])
    before, after = (figures[when]["passes"]["auto@64"] for when in ("before", "after"))
    assert len(before) == len(after) == 4


KEPT = (
    "model data samples self_distill max_new_tokens layout length segments content noise_weight"
    " lora_rank learning_rate epochs max_steps batch_size max_length held_out bf16 seed"
)


def test_figures_of_other_texts_are_measured_anew(folder, data, tmp_path):
    """A version before let the model say its own, which the figures after are not compared with."""
    output, options = tmp_path / "out", ["--max-steps", "1"]
    assert cli.main(command(folder, data, output, *options)) == 0
    file = output / "figures.json"
    figures = json.loads(file.read_text())
    before = figures["before"]
    del figures["after"], before["passes"]
    file.write_text(json.dumps(figures | {"before": before | {"MAT": {"auto@64": 9.0}}}))
    assert cli.main(command(folder, data, output, *options)) == 0
    assert json.loads(file.read_text())["before"]["MAT"] == before["MAT"] != {"auto@64": 9.0}


LATER = {"gate", "divergence", "curriculum", "teacher"}


def test_a_folder_names_settings_as_it_always_has(folder, data, tmp_path):
    """Another version has to resume the run, or to say which setting is another one."""
    output = tmp_path / "out"
    assert cli.main(command(folder, data, output, "--max-steps", "1", "--segments", "7")) == 0
    kept = json.loads((output / "settings.json").read_text())
    assert set(kept) == {*KEPT.split(), *LATER, "content of --data"}
    assert kept["segments"] == 7 and kept["noise_weight"] is None and kept["data"] == [data]


def test_a_run_of_a_version_before_some_settings_is_resumed(folder, data, tmp_path, capsys):
    """What its folder does not name has its default; figures are not forgotten."""
    output, options = tmp_path / "out", ["--max-steps", "1"]
    assert cli.main(command(folder, data, output, *options)) == 0
    settings, figures = (output / name for name in ("settings.json", "figures.json"))
    kept = json.loads(settings.read_text())
    settings.write_text(json.dumps({name: x for name, x in kept.items() if name not in LATER}))
    before = figures.read_bytes()
    assert cli.main(command(folder, data, output, *options)) == 0
    assert "trained already" in capsys.readouterr().out and figures.read_bytes() == before
    assert json.loads(settings.read_text()) == kept
    settings.write_text(json.dumps({name: x for name, x in kept.items() if name not in LATER}))
    assert cli.main(command(folder, data, output, *options, "--divergence", "tv")) == 1
    assert "holds a run with --divergence kl, now it is tv" in capsys.readouterr().err


def test_what_went_wrong_may_be_corrected(folder, data, tmp_path, capsys, monkeypatch):
    """Until there is a checkpoint; answers that are there are not asked for again."""
    output, answers = (
        tmp_path / "out",
        [
            "--self-distill",
            "--max-new-tokens",
            "9",
            "--max-steps",
            "2",
        ],
    )

    def out_of_memory(*arguments, **settings):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("msn_ext.recipe.train.train", out_of_memory)
        assert cli.main(command(folder, data, output, *answers)) == 1
    written = (output / "answers.jsonl").read_text()
    assert cli.main(command(folder, data, output, *answers[:2], "10", *answers[3:])) == 1
    assert "holds a run with --max-new-tokens 9, now it is 10" in capsys.readouterr().err
    (output / "checkpoint-old").mkdir()  # the user's
    assert (
        cli.main(command(folder, data, output, *answers, "--batch-size", "2", "--length", "3")) == 0
    )
    assert (output / "answers.jsonl").read_text() == written
    figures = json.loads((output / "figures.json").read_text())
    assert len(figures["before"]["top1"]) == len(figures["after"]["top1"]) == 3


def test_a_run_is_not_resumed_with_changed_data(folder, data, tmp_path, capsys):
    file, output = tmp_path / "data.jsonl", tmp_path / "out"
    shutil.copy(data, file)
    assert cli.main(command(folder, str(file), output, "--max-steps", "1")) == 0
    file.write_text(file.read_text().replace("one", "two"))
    assert cli.main(command(folder, str(file), output, "--max-steps", "1")) == 1
    assert "holds a run with content of --data" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["replace", "none"])
def test_families_without_branches_are_trained_in_place(data, tmp_path, capsys, layout):
    from transformers import OlmoConfig, OlmoForCausalLM

    path = tmp_path / "olmo"
    OlmoForCausalLM(
        OlmoConfig(**tiny_llama().config.to_diff_dict() | {"model_type": "olmo"})
    ).save_pretrained(path)
    byte_tokenizer(TEMPLATE).save_pretrained(path)
    assert cli.main(command(str(path), data, tmp_path / "branch")) == 1
    assert "layout='replace'" in capsys.readouterr().err and not (tmp_path / "branch").exists()
    assert (
        cli.main(command(str(path), data, tmp_path / "out", "--layout", layout, "--max-steps", "3"))
        == 0
    )
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert (
        len(figures["after"]["top1"]) == 4 and figures["after"]["loss"] != figures["before"]["loss"]
    )


def test_questions_without_room_or_words_are_left_out(folder, tmp_path, capsys):
    odd = [
        {"prompt": "x" * 600},
        {
            "messages": [
                {"role": "assistant", "content": "hello"},
                {"role": "user", "content": "a?"},
                {"role": "assistant", "content": "b"},
            ]
        },
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, odd + DATA[:20])))
    for more in ([], ["--self-distill"]):
        options = ["--max-steps", "1", "--max-new-tokens", "9", *more]
        assert cli.main(command(folder, str(file), tmp_path / f"out{len(more)}", *options)) == 0, (
            capsys.readouterr().err
        )
        assert "2 conversations begin without a question" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, value",
    [("--length", "65"), ("--segments", "257"), ("--seed", "-1"), ("--lora-rank", "-1")],
)
def test_ranges_are_told_before_anything_is_done(folder, data, tmp_path, capsys, option, value):
    assert cli.main(command(folder, data, tmp_path / "out", option, value)) == 2
    assert f"'{value}' is not a whole number from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"prompt": "a"}\n{"prompt": "\xfc"}\n', "line 2 cannot be read: byte 0xfc"),
        (b'{"prompt": "a"}\n{"question": "b"}\n', "line 2 has neither messages nor a prompt"),
        (b"", "holds no conversations"),
    ],
    ids=["latin", "fields", "empty"],
)
def test_wrong_data_is_named_by_option_file_and_line(folder, tmp_path, capsys, content, message):
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    assert cli.main(command(folder, str(file), tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert f"--data {file}" in said and message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_gpu_is_chosen_elsewhere(folder, data, tmp_path, capsys):
    assert cli.main(command(folder, data, tmp_path / "out", "--device", "cuda:1")) == 1
    assert "CUDA_VISIBLE_DEVICES" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--layout", "replace"],
        ["--content", "self"],
        ["--layout", "none"],
        ["--lora-rank", "0"],
        ["--bf16", "--self-distill", "--max-new-tokens", "9"],
    ],
)
def test_other_ways_to_train(folder, data, tmp_path, capsys, more):
    assert (
        cli.main(
            command(folder, data, tmp_path / "out", "--max-steps", "6", "--samples", "30", *more)
        )
        == 0
    ), capsys.readouterr().err
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["after"] != figures["before"]
    assert ("noise_loss" in str(figures["log"])) == ("none" not in more)


@pytest.mark.parametrize(
    "more, noise",
    [
        ([], (0.3, 0.03)),
        (["--noise-weight", "2"], (2, 0.2)),
        (["--layout", "replace"], (1, 1)),
        (["--layout", "replace", "--noise-weight", "2"], (2, 0.2)),
    ],
)
def test_noise_weighs_less_in_the_last_third(folder, data, tmp_path, monkeypatch, more, noise):
    told: list = []

    def add_noise(trainer, *, loss_weights, **settings):
        at = loss_weights if callable(loss_weights) else lambda done: loss_weights
        told.extend(at(done) for done in (0, 0.6, 0.7, 1))
        raise RuntimeError("enough")

    monkeypatch.setattr("msn_ext.recipe.train.add_noise", add_noise)
    assert cli.main(command(folder, data, tmp_path / "out", *more)) == 1
    first, last = noise
    assert told == [pytest.approx(pair) for pair in [(1, first), (1, first), (1, last), (1, last)]]


OWN = ["--self-distill", "--max-new-tokens", "9"]


@pytest.mark.parametrize(
    "more, teacher, rate",
    [
        ([], None, 1e-3),
        (OWN, "base", 3e-4),
        ([*OWN, "--learning-rate", "0.5"], "base", 0.5),
        ([*OWN, "--teacher", "labels"], None, 1e-3),
        ([*OWN, "--lora-rank", "0"], None, 2e-5),
        ([*OWN, "--content", "self"], None, 1e-3),
        (["--teacher", "base", "--divergence", "tv"], "base", 3e-4),
    ],
)
def test_who_teaches(folder, data, tmp_path, monkeypatch, more, teacher, rate):
    """What a model says itself is learned from its own distribution, at a lower rate."""
    told: list = []

    def add_noise(trainer, **settings):
        told.extend([settings.get("teacher"), trainer.args.learning_rate])
        weight = 0.03 if settings.get("teacher") else 0.3
        assert settings["loss_weights"](0.0) == (1.0, weight)
        assert settings.get("divergence", "tv") == "tv" or "tv" not in more
        raise RuntimeError("enough")

    monkeypatch.setattr("msn_ext.recipe.train.add_noise", add_noise)
    given = command(folder, data, tmp_path / "out", "--samples", "20", *more)
    if "--learning-rate" not in more:
        at = given.index("--learning-rate")
        del given[at : at + 2]
    assert cli.main(given) == 1 and told == [teacher, pytest.approx(rate)]
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert kept["teacher"] == teacher


@pytest.mark.parametrize(
    "more, message",
    [
        (["--lora-rank", "0"], "teacher 'base' needs an adapter, but lora_rank is 0"),
        (["--layout", "none"], "teacher 'base' and layout 'none', plain fine-tuning,"),
        (["--content", "self"], "teacher 'base' and content 'self' do not go together"),
        (["--gate"], "--gate does not go with --teacher base"),
    ],
)
def test_what_has_no_teacher(folder, data, tmp_path, capsys, more, message):
    assert cli.main(command(folder, data, tmp_path / "out", "--teacher", "base", *more)) > 0
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_several_processes_are_refused(folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(command(folder, data, tmp_path / "out")) == 1
    assert "msn train is one process" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_wrong_data_is_one_line(folder, tmp_path, capsys, monkeypatch):
    def unreachable(name, split):
        raise ConnectionError(f"couldn't reach {name}")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"prompt": "a", "response": "b"}) for _ in range(3)))
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text("\n".join(json.dumps({"prompt": f"a{i}"}) for i in range(20)))
    for path, message in (
        (few, "--data has 3 conversations; expected 5 or more"),
        (unanswered, "--data has no answers to learn"),
        (tmp_path / "none.jsonl", f"--data {tmp_path / 'none.jsonl'}: No such file"),
        ("someone/conversations", "couldn't reach someone/conversations"),
    ):
        assert cli.main(command(folder, str(path), tmp_path / "out")) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "None" not in error
    assert not (tmp_path / "out").exists(), "the corrected command is not refused"


@pytest.mark.parametrize(
    "more, names",
    [
        (["--max-steps", "120"], ("clean_loss", "noise_loss", "noise_accuracy")),
        (
            ["--max-steps", "60", "--gate", "--curriculum", "--content", "mask"],
            ("noise_loss", "noise_accuracy", "noise_accuracy_8"),
        ),
    ],
    ids=["branch", "gate"],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(folder, data, tmp_path, capsys, more, names):
    """Kill -9 after a checkpoint: in another process, the same losses from there on as in a run
    without a break.
    """
    options = ["--save-steps", "7", *more]
    steps = int(more[1])

    def finish(output):
        with one_thread():
            assert cli.main(command(folder, data, output, *options)) == 0, capsys.readouterr().err
        return {
            log["step"]: log
            for log in json.loads((output / "figures.json").read_text())["log"]
            if "loss" in log
        }

    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", "msn_ext", *command(folder, data, broken, *options)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    until = time.time() + 200
    while (
        not (broken / "checkpoint-7" / "trainer_state.json").exists()
        and process.poll() is None
        and time.time() < until
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "adapter_model.safetensors").exists(), "it was killed too late"
    cut_off = broken / "checkpoint-9999"  # killed while it was being written
    shutil.copytree(broken / "checkpoint-7", cut_off)
    state = (cut_off / "trainer_state.json").read_text()
    (cut_off / "trainer_state.json").write_text(state[: len(state) // 2])
    found, expected = finish(broken), finish(tmp_path / "whole")
    assert list(found) == list(expected) == list(range(1, steps + 1))
    for step, log in expected.items():
        for name in ("loss", *names):
            assert found[step][name] == pytest.approx(log[name], abs=1e-6), (step, name)

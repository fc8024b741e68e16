"""Runs with a gate: segments that grow, logs after a break, an adapter that is saved and loaded,
its accuracy.
"""

import json
import shutil

import pytest
import torch

from helpers.families import tiny_model
from helpers.noise import OnlyNoise
from helpers.samples import NONE, Pad
from helpers.trainers import ROWS, trainer_for, with_adapter
from msn_ext import NoisyCollator, add_noise
from msn_ext.gates import gated_noise, mark_gated
from msn_ext.training import gate, layouts
from msn_ext.training.evaluation import noise_accuracy

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
CONTENT = 7


def annotated(model, rows=ROWS[:4], **settings):
    noisy = NoisyCollator(
        Pad(), config=model.config, layout="branch", seed=1, **dict(segments=6, length=3) | settings
    )
    noisy.annotate = noisy.gated = True
    return noisy(rows)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_shortened_batch_is_the_beginning_of_its_branches(length):
    """Also where a response is shorter than a branch, so that rows have unlike numbers of them."""
    model = with_adapter(tiny_model("llama", 1))
    ids = ROWS[0]["input_ids"]
    short = ROWS[0] | {"labels": torch.full_like(ids, NONE)}
    short["labels"][3:5] = ids[3:5]
    batch = annotated(model, [short, *ROWS[1:4]])
    cut = layouts.shorten(dict(batch), length)
    depth, left = batch["noise_depth"], cut["noise_depth"]
    assert int(left.max()) == length and int((cut["labels"] >= 0).sum()) == int((left > 0).sum())
    assert (length == 3) == (cut["input_ids"].shape == batch["input_ids"].shape)
    whole = gate.noise_pass(model, model, dict(batch), model.config, 3)
    part = gate.noise_pass(model, model, dict(cut), model.config, 3)
    first = depth[depth > 0] <= length
    assert int(first.sum()) == len(part.student) > 10
    for name in ("teacher", "student"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[first])


@pytest.mark.parametrize("workers", [0, 2])
def test_segments_grow_in_equal_shares_of_the_steps(tmp_path, workers):
    trainer = trainer_for(
        tmp_path,
        with_adapter(),
        max_steps=9,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        dataloader_num_workers=workers,
    )
    add_noise(trainer, gate=True, length=3, segments=4, seed=1, curriculum=True)
    lengths: list[tuple[int, int]] = []
    inner = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        lengths.append((trainer.state.global_step, int(inputs["noise_depth"].max())))
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert lengths == [(step, 1 + step // 3) for step in range(9) for _ in range(2)]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    # A step's loss is the mean over the noise tokens that are left in it.
    assert all(log["loss"] == pytest.approx(log["noise_loss"], rel=1e-3) for log in logs)
    assert gated_noise(trainer.model.peft_config["default"])["length"] == 3


def test_a_curriculum_needs_a_gate(tmp_path):
    with pytest.raises(ValueError, match="curriculum is True; expected False, or gate=True"):
        add_noise(trainer_for(tmp_path), curriculum=True)


@pytest.mark.parametrize("noise", [dict(gate=True, curriculum=True), dict(layout="branch")])
@pytest.mark.parametrize("at", [2, 4, 6])
def test_the_log_after_a_break_is_of_the_same_steps(tmp_path, noise, at):
    """Logs after steps 5 and 10, a break right after a checkpoint between or before them."""

    def run(folder):
        trainer = trainer_for(
            folder,
            with_adapter(),
            max_steps=10,
            logging_steps=5,
            save_strategy="steps",
            save_steps=2,
        )
        return add_noise(trainer, **noise, segments=3, seed=1)

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "resumed")
    folder = tmp_path / "resumed" / f"checkpoint-{at}"
    shutil.copytree(tmp_path / "whole" / folder.name, folder)
    resumed.train(resume_from_checkpoint=str(folder))
    logs = [[x for x in y.state.log_history if "loss" in x] for y in (whole, resumed)]
    assert [log["step"] for log in logs[1]] == [5, 10]
    for mine, theirs in zip(*logs):
        names = [name for name in mine if name.startswith(("noise_", "clean_"))]
        assert len(names) == 3
        for name in names:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-6), name


def test_a_checkpoint_s_figures_are_a_part_of_its_state(tmp_path):
    """Sums since the last log, with their step; none right after a log."""
    trainer = trainer_for(
        tmp_path, with_adapter(), max_steps=4, logging_steps=3, save_strategy="steps", save_steps=1
    )
    add_noise(trainer, gate=True, segments=3, seed=1).train()
    kept = [
        json.loads((tmp_path / f"checkpoint-{n}" / "trainer_state.json").read_text())
        for n in (1, 2, 3, 4)
    ]
    kept = [state["stateful_callbacks"]["msn_ext"]["attributes"] for state in kept]
    assert [x["step"] for x in kept] == [1, 2, 3, 4]
    assert [x["sums"] is None for x in kept] == [False, False, True, False]
    assert kept[0]["sums"][1] < kept[1]["sums"][1]  # noise tokens


def test_an_adapter_that_was_saved_says_the_same_on_noise(tmp_path):
    """PEFT's round trip: logits of noise and of text, in every bit, and it is still gated."""
    trainer = trainer_for(tmp_path, with_adapter(), max_steps=3, learning_rate=1e-2)
    add_noise(trainer, gate=True, length=3, seed=1, content=CONTENT).train()
    trainer.save_model(str(tmp_path / "out"))
    base = tiny_model("llama", 1, torch.float32)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    assert gated_noise(again.peft_config["default"]) == {
        "gated": True,
        "length": 3,
        "content": CONTENT,
    }
    batch = annotated(again, content=CONTENT)
    found = [
        gate.noise_pass(model, model, dict(batch), again.config, 3)
        for model in (trainer.model.eval(), again)
    ]
    assert torch.equal(found[0].student, found[1].student)
    assert torch.equal(found[0].teacher, found[1].teacher)
    assert not torch.equal(found[1].student, found[1].teacher)


def test_gradients_are_those_of_the_adapter_alone(tmp_path):
    model = with_adapter()
    trainer = trainer_for(tmp_path, model, max_steps=1)
    add_noise(trainer, gate=True, length=2, seed=1)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(model, batch).backward()
    gradients = {name for name, x in model.named_parameters() if x.grad is not None}
    assert gradients == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_accuracy_of_a_gated_adapter_is_that_of_noise_in_place():
    """Each segment put into its text, where the adapter's part of all other rows is taken away."""
    model = with_adapter(tiny_model("llama", 1)).eval()
    for x in model.parameters():
        if x.requires_grad:
            x.data.mul_(4)
    mark_gated(model.peft_config["default"], 2, CONTENT)
    rows = [{name: x.tolist() for name, x in row.items()} for row in ROWS[:6]]
    samples = [{name: torch.tensor(x) for name, x in row.items()} for row in rows]
    found = noise_accuracy(model, samples, Pad(), length=2, content=CONTENT, progress=False)
    with model.disable_adapter():
        plain = noise_accuracy(model.get_base_model(), samples, Pad(), length=2, progress=False)
    assert found.loss == pytest.approx(plain.loss, rel=1e-6) and found.tokens == plain.tokens
    assert found.accuracy == pytest.approx(plain.accuracy)

    noisy = NoisyCollator(
        Pad(), length=2, segments=12, content=CONTENT, layout="branch", seed=0, config=model.config
    )
    noisy.annotate = True
    tops = {1: found.top1, 8: found.top8, 10: found.top10}
    hits: dict = {(top, depth): [] for top in tops for depth in (1, 2)}
    for sample in samples:
        batch, ids, labels = noisy([sample]), sample["input_ids"], sample["labels"]
        for at in (batch["noise_depth"][0] > 0).nonzero()[:, 0].tolist():
            depth, place = (int(batch[name][0, at]) for name in ("noise_depth", "position_ids"))
            if place + 1 == len(ids) or labels[place + 1] == NONE:
                continue
            noise = torch.zeros(len(ids), dtype=torch.bool)
            noise[place - depth + 1 : place + 1] = True
            text = torch.where(noise, CONTENT, ids)
            with torch.no_grad(), OnlyNoise(model, noise[None]):
                said = model(input_ids=text[None]).logits[0, place]
            order = said.argsort(descending=True).tolist()
            for top in tops:
                hits[top, depth].append(int(ids[place + 1]) in order[:top])
    for (top, depth), right in hits.items():
        assert len(right) > 30
        assert tops[top][depth - 1] == pytest.approx(sum(right) / len(right)), (top, depth)

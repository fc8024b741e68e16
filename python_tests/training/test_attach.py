"""add_noise in the trainers that people use: transformers, TRL, with PEFT, checkpointing, compiled,
in bfloat16, in two processes. What they must not do: evaluate with noise, forget epochs, change the
loss.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import several_processes
from helpers.cases import one_thread
from helpers.families import VOCAB, tiny_model
from helpers.samples import NONE, Pad, word_tokenizer
from helpers.trainers import ROWS, arguments, trainer_for
from msn_ext import NoisyCollator, add_noise
from msn_ext.training.layouts import unmark

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
LENGTH = 4  # of a segment
LAYOUTS = ["replace", "branch"]


def seen_by(model) -> list[dict]:
    """The batches that the model is asked about, from now on: training or not, and what came."""
    batches: list[dict] = []
    model.register_forward_pre_hook(
        lambda model, _, given: batches.append({"training": model.training} | given),
        with_kwargs=True,
    )
    return batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", ["replace", "branch"])
def test_a_trainer_trains_with_noise_and_evaluates_without(tmp_path, layout, workers):
    trainer = trainer_for(
        tmp_path, num_train_epochs=2, eval_strategy="epoch", dataloader_num_workers=workers
    )
    clean = trainer.evaluate()["eval_loss"]
    assert add_noise(trainer, layout=layout, seed=1) is trainer
    assert trainer.evaluate()["eval_loss"] == clean
    batches = seen_by(trainer.model)
    trainer.train()
    learned = [batch for batch in batches if batch["training"]]
    evaluated = [batch for batch in batches if not batch["training"]]
    assert len(learned) == 12 and len(evaluated) == 2
    text = {tuple(row["input_ids"].tolist()) for row in ROWS}

    def is_clean(batch) -> bool:
        rows = zip(batch["input_ids"], batch["attention_mask"])
        return batch["attention_mask"].dim() == 2 and all(
            tuple(row[mask.bool()].tolist()) in text for row, mask in rows
        )

    assert all(map(is_clean, evaluated)) and not any(map(is_clean, learned))
    # Another epoch, other noise: no noisy row comes twice.
    rows = [tuple(row.tolist()) for batch in learned for row in batch["input_ids"]]
    assert len(set(rows)) == len(rows)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 12 and all(
        {"clean_loss", "noise_loss", "noise_accuracy"} <= set(log) for log in logs
    )
    assert not any("clean_loss" in log for log in trainer.state.log_history if "eval_loss" in log)
    assert isinstance(trainer.data_collator, NoisyCollator)
    trainer.predict(ROWS[:4])
    assert is_clean(batches[-1])


def test_logged_losses_are_those_of_the_labels(tmp_path):
    trainer = trainer_for(tmp_path, learning_rate=0.0)
    add_noise(trainer, layout="branch", segments=3, seed=1)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    parts = {"clean": [0.0, 0], "noise": [0.0, 0]}
    right, total = 0, [0.0, 0]
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            depth = unmark(batch, trainer.model.config, LENGTH)[0][:, :-1]
            said, labels = trainer.model(**batch).logits[:, :-1], batch["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(
                said.flatten(0, 1), labels.flatten(), reduction="none"
            ).view(labels.shape)
            for name, chosen in (("clean", depth == 0), ("noise", depth > 0)):
                chosen = chosen & (labels != NONE)
                parts[name][0] += float(loss[chosen].sum())
                parts[name][1] += int(chosen.sum())
                total[0] += float(loss[chosen].sum())
                total[1] += int(chosen.sum())
            right += int((said.argmax(-1) == labels)[(depth > 0) & (labels != NONE)].sum())
    counts = parts["noise"][1]
    assert counts > 200

    def mean(name: str) -> float:  # every step has its own number of labels, but nearly the same
        return sum(log[name] for log in logs) / len(logs)

    assert mean("clean_loss") == pytest.approx(parts["clean"][0] / parts["clean"][1], rel=0.1)
    assert mean("noise_loss") == pytest.approx(parts["noise"][0] / counts, rel=0.1)
    assert mean("noise_accuracy") == pytest.approx(right / counts, abs=0.05)
    assert mean("loss") == pytest.approx(total[0] / total[1], rel=0.1)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_loss_weights_weigh_the_gradients(tmp_path, weights, accumulate):
    """The trainer's loss with weights is a sum over its labels, each with its own weight."""
    trainer = trainer_for(
        tmp_path,
        rows=ROWS[: 4 * accumulate],
        gradient_accumulation_steps=accumulate,
        max_grad_norm=1e9,
    )
    add_noise(trainer, layout="branch", segments=3, seed=1, loss_weights=weights)
    gradients: list = []

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, model=None, **kwargs):
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    trainer.add_callback(Keep())
    model = tiny_model("llama", 1, torch.float32)  # as the trainer's before its first step
    batches = list(trainer.get_train_dataloader())
    count = sum(int((batch["labels"][:, 1:] != NONE).sum()) for batch in batches)
    for batch in batches:
        depth = unmark(batch, model.config, LENGTH)[0][:, :-1]
        labels = batch.pop("labels")[:, 1:]
        said = model(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            said.flatten(0, 1), labels.flatten(), reduction="none"
        ).view(labels.shape)
        (loss * torch.where(depth > 0, weights[1], weights[0])).sum().div(count).backward()
    trainer.train()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients[0], expected, rtol=1e-3, atol=1e-5)


def test_loss_weights_may_change_on_the_way(tmp_path):
    shares: list[float] = []

    def weights(done):
        shares.append(done)
        return (1.0, 1.0) if done < 0.5 else (0.0, 0.0)

    trainer = add_noise(
        trainer_for(tmp_path), layout="branch", segments=2, seed=1, loss_weights=weights
    )
    trainer.train()
    assert shares == pytest.approx([step / 6 for step in range(6)])
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [loss > 0 for loss in losses] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("wrong", [(1, -1), (1, 2, 3), 0.3, (float("nan"), 1), "ab"], ids=str)
def test_wrong_loss_weights_are_named(tmp_path, wrong):
    with pytest.raises(ValueError, match="loss_weights is"):
        add_noise(trainer_for(tmp_path), loss_weights=wrong)
    trainer = add_noise(trainer_for(tmp_path), loss_weights=lambda done: wrong)
    with pytest.raises(ValueError, match="loss_weights is"):
        trainer.train()


def test_the_model_s_own_guesses_as_noise(tmp_path):
    trainer = add_noise(trainer_for(tmp_path), layout="branch", segments=2, content="self", seed=1)
    passes = seen_by(trainer.model)
    trainer.train()
    assert len(passes) == 12, "two passes a step"
    for drawn, learned in zip(passes[::2], passes[1::2]):
        assert "labels" not in drawn and "labels" in learned
        assert (drawn["input_ids"] != learned["input_ids"]).any()
    assert trainer.state.log_history[0]["noise_loss"] > 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_trainers_that_read_the_mask_find_one_entry_a_token(tmp_path, family):
    """The mask of branches, for models with windows a dict of them, is made where the model is
    asked.
    """
    model = tiny_model(family, 1, torch.float32)
    trainer = trainer_for(
        tmp_path, model, include_num_input_tokens_seen="non_padding", num_train_epochs=1
    )
    add_noise(trainer, layout="branch", segments=3, seed=1)
    masks = []
    trainer.model.register_forward_hook(
        lambda model, _, given, outputs: masks.append(given["attention_mask"]), with_kwargs=True
    )
    trainer.train()
    clean, noise = sum(len(row["input_ids"]) for row in ROWS), 24 * 3 * 4
    assert clean < trainer.state.num_input_tokens_seen <= clean + noise
    assert all(
        (mask["full_attention"] if family == "gemma2" else mask).dim() == 4 for mask in masks
    )


def test_passes_over_data_without_a_length_are_told_apart(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ROWS[:12])

    trainer = transformers.Trainer(
        tiny_model("llama", 1, torch.float32),
        arguments(tmp_path, max_steps=12),
        Pad(),
        train_dataset=Endless(),
    )
    add_noise(trainer, seed=1)
    batches = seen_by(trainer.model)
    trainer.train()
    passes = {
        tuple(tuple(row) for batch in batches[at : at + 3] for row in batch["input_ids"].tolist())
        for at in range(0, 12, 3)
    }
    assert len(batches) == 12 and len(passes) == 4


def test_weights_are_refused_where_the_loss_is_another_one(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().logsumexp(-1).mean()

    for trainer, name in (
        (trainer_for(tmp_path, label_smoothing_factor=0.1), "label_smoothing_factor"),
        (
            transformers.Trainer(
                tiny_model("llama", 1),
                arguments(tmp_path),
                Pad(),
                train_dataset=ROWS,
                compute_loss_func=own,
            ),
            "compute_loss_func",
        ),
    ):
        for weights in ((1, 0.5), lambda done: (1, 1)):
            with pytest.raises(ValueError, match=f"the trainer has {name}"):
                add_noise(trainer, loss_weights=weights)
        add_noise(trainer).train()


def test_a_loss_of_nothing_stays_nothing(tmp_path):
    trainer = trainer_for(tmp_path, rows=ROWS[:4])
    add_noise(trainer, loss_weights=(1, 0.3), seed=1)
    logits = torch.zeros(1, 5, 8).index_fill(2, torch.tensor([3]), 1e4).requires_grad_()
    labels, depth = torch.full((1, 5), 3), torch.tensor([[0, 0, 1, 1, 0]])
    loss = trainer.noise._observe(
        torch.zeros(()), transformers.modeling_outputs.CausalLMOutput(logits=logits), labels, depth
    )
    loss.backward()
    assert loss == 0 and torch.isfinite(logits.grad).all()


def test_a_loss_without_logits_is_learned_and_not_observed(tmp_path):
    class Quiet(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
            return torch.nn.functional.cross_entropy(
                model.lm_head(hidden)[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
            )

    def quiet() -> transformers.Trainer:
        return Quiet(
            tiny_model("llama", 1, torch.float32),
            arguments(tmp_path, max_steps=2),
            Pad(),
            train_dataset=ROWS,
        )

    trainer = add_noise(quiet())
    with pytest.warns(UserWarning, match="without logits"):
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and not any("noise_loss" in log for log in logs)
    trainer = trainer_for(tmp_path)
    forward = trainer.model.forward

    @functools.wraps(forward)
    def loss_alone(*args, **kwargs):
        return transformers.modeling_outputs.CausalLMOutputWithPast(forward(*args, **kwargs).loss)

    trainer.model.forward = loss_alone
    with pytest.raises(ValueError, match="loss_weights need the logits"):
        add_noise(trainer, loss_weights=(1, 0.5)).train()


def test_a_prompt_of_peft_s_comes_before_the_text(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama", 1, torch.float32),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    with pytest.raises(ValueError, match="expected layout='replace'"):
        add_noise(trainer_for(tmp_path, model), layout="branch")
    trainer = add_noise(trainer_for(tmp_path, model, max_steps=2), seed=1)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(
        min(log["clean_loss"], log["noise_loss"]) - 1e-3
        <= log["loss"]
        <= max(log["clean_loss"], log["noise_loss"]) + 1e-3
        for log in logs
    )


def test_the_loss_that_balances_experts_does_not_go_with_branches(tmp_path):
    model = tiny_model("mixtral", 1, torch.float32)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="router_aux_loss_coef=0"):
        add_noise(trainer_for(tmp_path, model), layout="branch").train()
    add_noise(trainer_for(tmp_path, model, max_steps=2), layout="replace").train()


def test_a_tokenizer_that_would_be_saved_still_is(tmp_path):
    class WithTokenizer(Pad):
        tokenizer = word_tokenizer(VOCAB)

    trainer = trainer_for(tmp_path)
    trainer.data_collator = WithTokenizer()
    add_noise(trainer)
    trainer.save_model()
    assert (tmp_path / "tokenizer.json").exists()


def test_noise_can_be_added_once(tmp_path):
    trainer = add_noise(trainer_for(tmp_path))
    with pytest.raises(ValueError, match="trainer has noise already"):
        add_noise(trainer)
    with pytest.raises(ValueError, match="length is 0"):
        add_noise(trainer_for(tmp_path), length=0)


@pytest.mark.parametrize("layout", ["replace", "branch"])
def test_with_lora_checkpointing_and_bfloat16(tmp_path, layout):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama", 1, torch.float32),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_for(
        tmp_path,
        model,
        num_train_epochs=4,
        learning_rate=2e-2,
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    add_noise(trainer, layout=layout, segments=2, seed=1)
    trainer.train()
    losses = [log["noise_loss"] for log in trainer.state.log_history if "noise_loss" in log]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_compiled(tmp_path):
    def losses(**settings) -> list[float]:
        trainer = add_noise(
            trainer_for(tmp_path, max_steps=3, **settings), layout="branch", segments=2, seed=1
        )
        trainer.train()
        return [log["noise_loss"] for log in trainer.state.log_history if "noise_loss" in log]

    torch.compiler.reset()
    compiled = losses(torch_compile=True, torch_compile_backend="aot_eager")
    assert compiled == pytest.approx(losses(), rel=1e-4) and len(compiled) == 3


@pytest.mark.parametrize("form", ["plain", "padding_free", "packing", "windows"])
@pytest.mark.parametrize(
    "layout, weights", [("replace", (1.0, 1.0)), ("branch", (1.0, 1.0)), ("branch", (0.5, 2.0))]
)
def test_trl(tmp_path, layout, weights, form):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [
        {
            "input_ids": row["input_ids"].tolist(),
            "completion_mask": (row["labels"] != NONE).int().tolist(),
        }
        for row in ROWS
    ]
    settings = {
        "plain": {},
        "windows": {},
        "padding_free": dict(padding_free=True, max_length=None),
        "packing": dict(packing=True, max_length=64),
    }[form]
    config = arguments(
        tmp_path,
        trl.SFTConfig,
        bf16=False,
        per_device_eval_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        **settings,
    )
    data = datasets.Dataset.from_list(rows)
    model = tiny_model("gemma2" if form == "windows" else "llama", 1, torch.float32)
    trainer = trl.SFTTrainer(
        model,
        config,
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=word_tokenizer(VOCAB),
    )
    clean = trainer.evaluate()["eval_loss"]
    add_noise(trainer, layout=layout, segments=2, seed=1, loss_weights=weights)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(clean, rel=1e-6)
    passes = seen_by(trainer.model)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(passes) == len(logs), "one pass a step"
    losses = [log["noise_loss"] for log in logs]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert logs[-1]["num_tokens"] < 24 * (40 + 8) * 2, "of tokens, not of pairs"
    if weights == (1.0, 1.0):
        for log in logs:
            low, high = sorted((log["clean_loss"], log["noise_loss"]))
            assert low - 1e-3 <= log["loss"] <= high + 1e-3


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """The weights after training in one process, and its log, by layout."""
    with one_thread():
        return {
            layout: several_processes.learn(tmp_path_factory.mktemp("alone"), layout)
            for layout in [*LAYOUTS, "gate"]
        }


@pytest.mark.parametrize(
    "kind, layout",
    [
        ("ddp", "replace"),
        ("ddp", "branch"),
        ("ddp", "gate"),
        ("fsdp", "replace"),
        ("fsdp", "branch"),
        ("fsdp", "gate"),
    ],
)
def test_two_processes_learn_what_one_learns(once, alone, kind, layout):
    """Each sample has the noise that it has in one process, so the weights end the same, and the
    figures in the log are those of all processes.
    """
    pytest.importorskip("peft")
    fsdp = kind == "fsdp"

    def launch(folder: Path) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [several_processes.__file__, str(folder), *["--fsdp"] * fsdp, *LAYOUTS, "gate"]
        run = subprocess.run(
            [*launcher, "--nproc-per-node=2", *script],
            cwd=folder,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(sys.path),
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
                "CUDA_VISIBLE_DEVICES": "",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr[-3000:]

    expected, log = alone[layout]
    found, logged = torch.load(once(kind, launch) / f"{layout}.pt")
    start = several_processes.model_for(layout).state_dict()
    moved = max(float((x - start[name]).abs().max()) for name, x in expected.items())
    assert moved > 1e-3
    for mine, theirs in zip(log, logged, strict=True):
        figures = [name for name in mine if name.startswith(("noise_", "clean_"))]
        assert figures or "train_loss" in mine
        for name in figures:
            assert theirs[name] == pytest.approx(mine[name], abs=1e-3), name
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, rtol=0, atol=moved / 50, msg=lambda text: f"{name}: {text}"
        )

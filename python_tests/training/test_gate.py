"""add_noise(gate=True): an adapter for noise alone, taught by the untouched model."""

import json
import math
import warnings

import pytest
import torch

from helpers.families import VOCAB, tiny_model
from helpers.noise import OnlyNoise
from helpers.samples import Pad, flatten, word_tokenizer
from helpers.trainers import ROWS, after_a_step, arguments, trainer_for, with_adapter
from msn_ext import NoisyCollator, add_noise
from msn_ext.gates import gated_noise
from msn_ext.training import gate, layouts

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
FAMILIES = ["llama", "qwen2", "gemma3", "mistral", "gpt2"]


def noisy_batch(model, rows=ROWS[:4], collator=None, **settings):
    config = model.config.get_text_config(decoder=True)
    noisy = NoisyCollator(
        collator or Pad(),
        config=config,
        layout="branch",
        seed=1,
        **dict(segments=6, length=3) | settings,
    )
    noisy.annotate = True
    return noisy(rows), noisy


def one_pass(model, batch, config, length, kind: str):
    """The same by another method: one pass over text and noise, where the adapter's contribution to
    the rows of the text is taken away where it arises.
    """
    batch = dict(batch)
    depth, _ = layouts.unmark(batch, config, length)
    noise = depth > 0
    given = {name: x for name, x in batch.items() if name != "labels"}
    with OnlyNoise(model, noise):
        logits = model(**given, use_cache=False).logits
    rows, columns = noise.nonzero(as_tuple=True)
    places = [
        int(((batch["position_ids"][r] == batch["position_ids"][r, c]) & ~noise[r]).nonzero()[0])
        for r, c in zip(rows, columns)
    ]
    student, teacher = logits[rows, columns], logits[rows, torch.tensor(places)].detach()
    p, q = teacher.softmax(-1), student.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    tv = (p - q).abs().sum(-1) / 2
    return {"kl": kl, "tv": tv, "both": kl + tv}[kind]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", gate.DIVERGENCES)
def test_two_parts_are_one_pass_with_the_adapter_taken_away_from_the_text(family, kind):
    """Losses and gradients in float64; left and right padding by turns."""
    model = with_adapter(tiny_model(family, 1))
    config = model.config.get_text_config(decoder=True)
    batch, noisy = noisy_batch(model, collator=Pad("left" if family == "qwen2" else "right"))
    want = one_pass(model, batch, config, noisy.length, kind)
    want.sum().backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert gradients and all("lora_" in name for name in gradients)
    model.zero_grad()
    found = gate.noise_pass(model, model, dict(batch), config, noisy.length)
    losses = gate.divergences(found.student, found.teacher, kind)
    assert len(losses) > 20 and bool((want >= 0).all())
    torch.testing.assert_close(losses, want, rtol=1e-9, atol=1e-12)
    losses.sum().backward()
    for name, x in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(x.grad, gradients[name], rtol=1e-8, atol=1e-10)
        else:
            assert x.grad is None, name


def test_the_teacher_is_the_base_model_alone():
    """Bit for bit the base model's logits of the same text, whatever the adapter does."""
    model = with_adapter(tiny_model("llama", 1))
    batch, noisy = noisy_batch(model, ROWS[:1])
    config = model.config
    found = gate.noise_pass(model, model, dict(batch), config, noisy.length)
    for x in model.parameters():
        if x.requires_grad:
            x.data.mul_(3)
    again = gate.noise_pass(model, model, dict(batch), config, noisy.length)
    assert torch.equal(found.teacher, again.teacher) and not torch.equal(
        found.student, again.student
    )
    text = ROWS[0]["input_ids"][None]
    with model.disable_adapter(), torch.no_grad():
        plain = model(input_ids=text).logits[0]
    depth, before, _ = (batch[name] for name in layouts.ANNOTATIONS)
    for (row, column), logits in zip((depth > 0).nonzero().tolist(), found.teacher):
        d = int(depth[row, column])
        torch.testing.assert_close(logits, plain[int(before[row, column - d + 1]) + d])
    assert not found.teacher.requires_grad and model.training


def test_samples_that_are_packed_are_apart():
    """A row of several samples gives what each gives alone."""
    model = with_adapter(tiny_model("llama", 1))
    noises = dict(segments=4, length=2, content="ahead")
    packed, noisy = noisy_batch(model, ROWS[:3], flatten, **noises)
    together = gate.noise_pass(model, model, packed, model.config, noisy.length)
    alone = [
        gate.noise_pass(
            model, model, noisy_batch(model, [row], **noises)[0], model.config, noisy.length
        )
        for row in ROWS[:3]
    ]
    for name in ("teacher", "student"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(one, name) for one in alone])
        )


def test_training_moves_the_adapter_alone_and_the_noise_gets_better(tmp_path):
    model = with_adapter()
    before = {name: x.clone() for name, x in model.named_parameters()}
    trainer = trainer_for(tmp_path, model, num_train_epochs=12, learning_rate=1e-2)
    assert add_noise(trainer, gate=True, segments=8, length=2, seed=1) is trainer
    trainer.train()
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name]) == ("lora_" not in name), name
    logs = [log for log in trainer.state.log_history if "noise_loss" in log]
    assert len(logs) == 72 and all("clean_loss" not in log for log in logs)
    losses = [log["noise_loss"] for log in logs]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert all(0 <= log["noise_accuracy"] <= log["noise_accuracy_8"] <= 1 for log in logs)
    # The trainer's own loss is the figure's mean.
    assert all(math.isclose(log["loss"], log["noise_loss"], rel_tol=1e-3) for log in logs)


def test_evaluation_leaves_the_adapter_out(tmp_path):
    trainer = trainer_for(tmp_path, with_adapter())
    with trainer.model.disable_adapter():
        base = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] != base
    add_noise(trainer, gate=True)
    assert trainer.evaluate()["eval_loss"] == base


def test_steps_of_several_batches_count_every_noise_token_alike(tmp_path):
    """The same step from batches of 4 and from twice 2, of unlike sizes."""
    sizes = ((4, 1), (2, 2), (1, 4))
    found = [after_a_step(tmp_path, *each, gate=True, segments=5, length=3) for each in sizes]
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_texts_without_labels_and_batches_without_room(tmp_path):
    """Noise may be anywhere in a text without labels; a text of one token has none."""
    rows = [{"input_ids": row["input_ids"]} for row in ROWS[:4]]

    def collate(batch):
        most = max(len(row["input_ids"]) for row in batch)
        ids = torch.zeros(len(batch), most, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(batch):
            ids[at, : len(row["input_ids"])], mask[at, : len(row["input_ids"])] = (
                row["input_ids"],
                1,
            )
        return {"input_ids": ids, "attention_mask": mask}

    trainer = trainer_for(tmp_path, with_adapter(), rows=rows, collator=collate, max_steps=1)
    add_noise(trainer, gate=True, segments=64, length=1, seed=1)
    (batch,) = trainer.get_train_dataloader()
    noise = batch["noise_depth"] > 0
    assert int(noise.sum()) == sum(len(row["input_ids"]) - 1 for row in rows)
    assert int((batch["labels"] >= 0).sum()) == int(noise.sum())
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["noise_loss"])

    single = [{"input_ids": torch.tensor([3])}] * 4
    trainer = trainer_for(tmp_path, with_adapter(), rows=single, collator=collate, max_steps=1)
    add_noise(trainer, gate=True)
    trainer.train()
    assert "noise_loss" not in trainer.state.log_history[0]


def test_its_folder_is_an_ordinary_one_that_says_that_it_is_gated(tmp_path):
    trainer = trainer_for(tmp_path, with_adapter(), save_strategy="epoch", max_steps=3)
    add_noise(trainer, gate=True, length=2, content="mixed")
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    for folder in (tmp_path / "out", *tmp_path.glob("checkpoint-*")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            config = peft.PeftConfig.from_pretrained(str(folder))
        assert gated_noise(config) == {"gated": True, "length": 2, "content": "mixed"}
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["peft_type"] == "LORA"
    again = peft.PeftModel.from_pretrained(
        tiny_model("llama", 1, torch.float32), str(tmp_path / "out")
    )
    assert gated_noise(again.peft_config["default"])["length"] == 2
    for (name, x), (_, y) in zip(again.named_parameters(), trainer.model.named_parameters()):
        assert torch.equal(x, y), name
    assert gated_noise(with_adapter().peft_config["default"]) is None


def test_a_run_goes_on_where_it_was(tmp_path):
    def run(folder, **settings):
        trainer = trainer_for(
            folder, with_adapter(), max_steps=4, save_strategy="steps", save_steps=2, **settings
        )
        add_noise(trainer, gate=True, segments=4, seed=1)
        return trainer

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for x, y in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(x, y)


def refused(folder, match: str, model=None, **settings):
    trainer = trainer_for(folder, with_adapter() if model is None else model)
    refused_by(trainer, match, **settings)


def refused_by(trainer, match: str, **settings):
    with pytest.raises(ValueError, match=match):
        add_noise(trainer, gate=True, **settings)
    assert not isinstance(trainer.data_collator, NoisyCollator), "nothing changed"


@pytest.mark.parametrize(
    "adapter, what",
    [
        (dict(use_dora=True), "use_dora=True"),
        (dict(bias="lora_only"), "bias='lora_only'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices"),
    ],
)
def test_adapters_that_cannot_be_gated(tmp_path, adapter, what):
    model = with_adapter(**adapter)
    refused(tmp_path, f"adapter 'default' has {what}", model)


def test_what_does_not_go_with_a_gate(tmp_path):
    plain = tiny_model("llama", 1, torch.float32)
    refused(tmp_path, "the model is a LlamaForCausalLM", plain)
    other = peft.get_peft_model(
        tiny_model("llama", 1, torch.float32), peft.VeraConfig(task_type="CAUSAL_LM", r=4)
    )
    refused(tmp_path, "peft_type='VERA'", other)
    thawed = with_adapter()
    thawed.get_input_embeddings().weight.requires_grad_(True)
    refused(tmp_path, "embed_tokens.weight would be trained", thawed)
    refused(tmp_path, "layout='replace'", layout="replace")
    refused(tmp_path, "content='self'", content="self")
    refused(tmp_path, "loss_weights", loss_weights=(1.0, 0.3))
    refused(tmp_path, "divergence is 'js'; expected 'kl', 'tv', 'both'", divergence="js")


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing", "model"])
def test_checkpointing_would_drop_what_the_noise_reads(tmp_path, name):
    """By either name of transformers', in the arguments or turned on in the model already."""
    trainer = trainer_for(tmp_path, with_adapter())
    if name == "model":
        for module in trainer.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
    else:
        setattr(trainer.args, name, True)
    refused_by(trainer, "gradient checkpointing")


@pytest.mark.parametrize("form", ["padded", "packing"])
def test_in_trls_trainer(tmp_path, form):
    """Of TRL, too, in bfloat16 and in parts of a step; the text stays what it was."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [
        {"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in ROWS
    ]
    config = arguments(
        tmp_path,
        trl.SFTConfig,
        bf16=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=12,
        learning_rate=2e-2,
        gradient_checkpointing=False,
        **(dict(packing=True, max_length=64) if form == "packing" else {}),
    )
    model = with_adapter()
    before = {name: x.clone() for name, x in model.named_parameters()}
    trainer = trl.SFTTrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(VOCAB),
    )
    add_noise(trainer, gate=True, segments=4, seed=1)
    trainer.train()
    losses = [log["noise_loss"] for log in trainer.state.log_history if "noise_loss" in log]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name]) == ("lora_" not in name), name

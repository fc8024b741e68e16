"""add_noise(teacher="base"): an adapter that learns what the model says without it."""

import math

import pytest
import torch

from helpers.families import VOCAB, tiny_model
from helpers.samples import Pad, flatten, word_tokenizer
from helpers.trainers import ROWS, after_a_step, arguments, trainer_for, with_adapter
from msn_ext import NoisyCollator, add_noise
from msn_ext.training import layouts

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
NOISES = {
    "branch": dict(layout="branch", segments=5, length=3),
    "replace": dict(layout="replace", segments=2, length=3),
}


def expected(model, trainer, batch, weights, kind: str):
    """The loss by another method: row by row, the base model reads the text without noise or
    padding, and says what every label's place has to learn.
    """
    batch = dict(batch)
    labels = batch["labels"]
    depth, _ = layouts.unmark(batch, trainer.data_collator.config, trainer.data_collator.length)
    said = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    losses = []
    for row in range(len(labels)):
        # Which of the trainer's rows it is, its labels say.
        texts = [x for x in ROWS if starts_with(labels[row], x["labels"])]
        (text,) = texts
        with model.disable_adapter(), torch.no_grad():
            base = model(input_ids=text["input_ids"][None]).logits[0]
        for column in range(labels.shape[1] - 1):
            if labels[row, column + 1] == -100:
                continue
            noisy, place = int(depth[row, column]) > 0, column
            if noisy and "position_ids" in batch:
                place = int(batch["position_ids"][row, column])
            p, q = base[place].softmax(-1), said[row, column].softmax(-1)
            kl, tv = (p * (p / q).log()).sum(), (p - q).abs().sum() / 2
            losses.append(weights[noisy] * {"kl": kl, "tv": tv, "both": kl + tv}[kind])
    return torch.stack(losses).sum() / len(losses)


def starts_with(labels, text) -> bool:
    return len(labels) >= len(text) and torch.equal(labels[: len(text)], text)


@pytest.mark.parametrize("layout", NOISES)
@pytest.mark.parametrize(
    "family, kind", [("llama", "kl"), ("gemma3", "both"), ("mistral-window", "tv")]
)
def test_labels_learn_the_base_models_distribution_on_the_clean_text(
    tmp_path, family, kind, layout
):
    """Loss and gradients, in float64."""
    model, weights = with_adapter(tiny_model(family, 1)), (1.0, 0.3)
    trainer = trainer_for(tmp_path, model)
    add_noise(
        trainer,
        teacher="base",
        divergence=kind,
        loss_weights=weights,
        seed=1,
        **NOISES[layout],
    )
    batch = trainer.data_collator(ROWS[:4])
    assert int((batch["noise_depth"] > 0).sum()) > 15
    want = expected(model, trainer, batch, weights, kind)
    want.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, want, rtol=1e-8, atol=1e-10)
    loss.backward()
    assert gradients and all("lora_" in name for name in gradients)
    for name, x in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(x.grad, gradients[name], rtol=1e-7, atol=1e-9)
        else:
            assert x.grad is None, name


@pytest.mark.parametrize("teacher", [None, "base"])
def test_an_adapter_that_says_nothing_new_has_nothing_to_unlearn(tmp_path, teacher):
    """On clean text; labels that are not the model's likeliest tokens would move it at once."""
    model = with_adapter(tiny_model("llama", 1))
    for name, x in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(x)
    trainer = trainer_for(tmp_path, model)
    add_noise(trainer, teacher=teacher, loss_weights=(1.0, 0.0), seed=1, **NOISES["branch"])
    trainer.compute_loss(model, trainer.data_collator(ROWS[:4])).backward()
    largest = max(float(x.grad.abs().max()) for x in model.parameters() if x.grad is not None)
    assert largest < 1e-12 if teacher else largest > 1e-3


def test_what_the_model_says_is_kept_while_it_learns_to_guess(tmp_path):
    """Texts are random: labels teach to say others, the base model to say the same."""
    changed, guesses = {}, {}
    for teacher in (None, "base"):
        model = with_adapter()
        for name, x in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(x)
        trainer = trainer_for(tmp_path, model, num_train_epochs=15, learning_rate=1e-2)
        add_noise(trainer, teacher=teacher, segments=8, length=2, layout="branch", seed=1)
        before = {name: x.clone() for name, x in model.named_parameters()}
        trainer.train()
        for name, x in model.named_parameters():
            assert torch.equal(x, before[name]) == ("lora_" not in name), name
        ids = Pad()(ROWS)["input_ids"]
        with torch.no_grad():
            said = model(input_ids=ids).logits.argmax(-1)
            with model.disable_adapter():
                base = model(input_ids=ids).logits.argmax(-1)
        changed[teacher] = float((said != base).float().mean())
        logs = [log for log in trainer.state.log_history if "noise_loss" in log]
        assert abs(logs[0]["clean_loss"]) < (1e-6 if teacher else math.inf)
        guesses[teacher] = [log["noise_loss"] for log in logs]
    assert changed["base"] < 0.5 * changed[None]
    assert sum(guesses["base"][-6:]) < 0.8 * sum(guesses["base"][:6])


def test_steps_of_several_batches_count_every_label_alike(tmp_path):
    """The same step from a batch of 4 and from twice 2, of unlike sizes."""
    sizes = ((4, 1), (2, 2), (1, 4))
    found = [after_a_step(tmp_path, *each, teacher="base", **NOISES["branch"]) for each in sizes]
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_packed_samples_are_apart(tmp_path):
    """Three samples in a row give what each gives alone; evaluation stays plain."""
    model = with_adapter(tiny_model("llama", 1))
    trainer = trainer_for(tmp_path, model, collator=flatten)
    base = trainer.evaluate()["eval_loss"]
    add_noise(trainer, teacher="base", seed=1, **NOISES["branch"])
    assert trainer.evaluate()["eval_loss"] == base
    collator = trainer.data_collator
    batches = [collator(rows) for rows in (ROWS[:3], ROWS[:1], ROWS[1:2], ROWS[2:3])]
    counts = [int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches]
    assert counts[0] == sum(counts[1:])
    losses = [float(trainer.compute_loss(model, batch).detach()) for batch in batches]
    alone = sum(loss * count for loss, count in zip(losses[1:], counts[1:]))
    assert math.isclose(losses[0] * counts[0], alone, rel_tol=1e-8)


def refused(trainer, match: str, **settings):
    with pytest.raises(ValueError, match=match):
        add_noise(trainer, **{"teacher": "base"} | settings)
    assert not isinstance(trainer.data_collator, NoisyCollator), "nothing changed"


def test_what_has_no_such_teacher(tmp_path):
    plain = tiny_model("llama", 1, torch.float32)
    refused(trainer_for(tmp_path, plain), "the model is a LlamaForCausalLM")
    refused(trainer_for(tmp_path, with_adapter()), "teacher is 'ema'; expected", teacher="ema")
    refused(trainer_for(tmp_path, with_adapter()), "divergence is 'js'; expected", divergence="js")
    refused(trainer_for(tmp_path, with_adapter()), "gate=True has the base model as", gate=True)
    biases = with_adapter(tiny_model("qwen2", 1, torch.float32), bias="all")
    refused(trainer_for(tmp_path, biases), "bias would be trained")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = peft.get_peft_model(tiny_model("llama", 1, torch.float32), prompt)
    refused(trainer_for(tmp_path, prompted), "a PEFT prompt")
    refused(trainer_for(tmp_path, with_adapter()), "content='self'", content="self")


@pytest.mark.parametrize("form", ["padded", "packing", "checkpointing"])
def test_in_trls_trainer(tmp_path, form):
    """In bfloat16 and in parts of a step."""
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
        gradient_checkpointing=form == "checkpointing",
        **(dict(packing=True, max_length=64) if form == "packing" else {}),
    )
    model = with_adapter()
    trainer = trl.SFTTrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(VOCAB),
    )
    add_noise(trainer, teacher="base", layout="branch", segments=4, seed=1)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "noise_loss" in log]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])

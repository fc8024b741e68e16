"""Trainers of tiny models."""

import warnings

import torch
import transformers

from helpers.families import VOCAB, tiny_model
from helpers.samples import Pad, samples
from msn_ext import add_noise

ROWS = samples(24, VOCAB)


def arguments(folder, kind=transformers.TrainingArguments, **settings):
    usual = dict(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=3,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=1,
    )
    return kind(**usual | settings)


def trainer_for(
    folder, model=None, rows=ROWS, collator=None, kind=transformers.Trainer, **settings
) -> transformers.Trainer:
    model = tiny_model("llama", 1, torch.float32) if model is None else model
    given = dict(train_dataset=rows, eval_dataset=rows[:8])
    return kind(model, arguments(folder, **settings), collator or Pad(), **given)


def with_adapter(model=None, **settings):
    """A model with a LoRA whose weights matter: PEFT's own begin as nothing."""
    import peft

    model = tiny_model("llama", 1, torch.float32) if model is None else model
    usual = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of GPT-2's Conv1D
        torch.manual_seed(5)
        model = peft.get_peft_model(model, peft.LoraConfig(**usual | settings))
        for name, x in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(x, std=0.05)
    return model


def after_a_step(folder, size: int, steps: int, **noise) -> list[torch.Tensor]:
    """The trained weights, float64, after a step of ``steps`` batches of ``size`` rows."""
    model = with_adapter(tiny_model("llama", 1, torch.float64))
    trainer = trainer_for(
        folder,
        model,
        ROWS[:4],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
    )
    add_noise(trainer, seed=1, **noise)
    trainer.train()
    return [x.detach().clone() for x in model.parameters() if x.requires_grad]

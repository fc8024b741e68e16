"""Train with noise: a Trainer of transformers, an adapter of PEFT, checkpoints to resume from."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import cast

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from msn_ext.terminal import progress_bar
from msn_ext.training import add_noise
from msn_ext.training.data import Collate

from .samples import pad_of
from .settings import NoiseSettings, TrainSettings, check_gate


def train(
    model,
    tokenizer,
    samples: list[dict],
    output: Path,
    noise: NoiseSettings,
    settings: TrainSettings,
    *,
    progress: bool = True,
):
    """Fine-tune with noise; resume from the last checkpoint in ``output``, if there is one.

    Args:
        model: trained in place; with ``lora_rank`` it gets an adapter.
        samples: of :func:`msn_ext.recipe.samples.samples_of`.
        output: for checkpoints, and in the end the adapter or model, and the tokenizer.

    Returns:
        The trained model (with ``lora_rank`` a PEFT model) and the trainer's log, a dict per entry.
    """
    if not samples:
        raise ValueError(
            "samples is empty; expected conversations with answers that fit into the length"
        )
    check_gate(vars(noise) | vars(settings))
    if settings.lora_rank:
        model = _with_adapter(model, settings)
    trainer = _Trainer(
        model,
        _training_arguments(model, output, settings),
        Collate(pad_of(tokenizer)),
        train_dataset=samples,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if progress:
        trainer.add_callback(_Bar())
    if noise.layout != "none":
        collating = noise.of_collator(pad_of(tokenizer)) | {"seed": settings.seed}
        if noise.gate:
            collating |= {"divergence": noise.divergence, "curriculum": noise.curriculum}
            add_noise(trainer, gate=True, **collating)
        else:
            if noise.teacher == "base":
                collating |= {"divergence": noise.divergence, "teacher": "base"}
            add_noise(trainer, loss_weights=noise.loss_weights(), **collating)
    checkpoint = last_checkpoint(output)
    if checkpoint and (state := _state(checkpoint)).global_step >= state.max_steps:
        # Where all steps are done within an epoch, the Trainer would take another one.
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    _save(trainer, tokenizer, output)
    # Not in bfloat16 any more, where that was computed in.
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return model, trainer.state.log_history


def _save(trainer, tokenizer, output: Path) -> None:
    """Write the model and its tokenizer; files in ``output`` are whole."""
    unfinished = output / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        trainer.save_model(str(unfinished))
        tokenizer.save_pretrained(str(unfinished))
        for file in unfinished.iterdir():
            file.replace(output / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _with_adapter(model, settings: TrainSettings):
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    return get_peft_model(model, adapter)


def _training_arguments(model, output: Path, settings: TrainSettings) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(output),
        report_to=[],
        seed=settings.seed,
        use_cpu=model.device.type == "cpu",
        bf16=settings.bf16,
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        # A log at every checkpoint: the next one is of the same steps in a resumed run.
        logging_steps=math.gcd(5, settings.save_steps),
        save_steps=settings.save_steps,
        save_total_limit=2,
        disable_tqdm=True,
    )
    # Or the Trainer splits batches over all GPUs that it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Trainer(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return ByLength(
            [len(sample["input_ids"]) for sample in cast(list[dict], self.train_dataset)],
            self.args.train_batch_size,
            self.args.seed,
        )


class ByLength(Sampler):
    """Batches of like lengths, which have little padding, others in every epoch.

    As transformers' own, but the order depends on the seed and the epoch alone, so that a resumed
    run has it, too.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed((self._seed << 20) + self._epoch)
        return iter(
            get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)
        )


class _Bar(TrainerCallback):
    """A progress bar with both losses and the accuracy after noise."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = progress_bar(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            smoothing=0.05,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"clean_loss": "loss", "noise_loss": "after noise"}
        shown = {shown: logs[name] for name, shown in names.items() if logs and name in logs}
        if shown:
            self._bar.set_postfix(
                {name: f"{value:.3f}" for name, value in shown.items()}
                | {"right": f"{100 * logs.get('noise_accuracy', 0.0):.0f} %"},
                refresh=False,
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()


def _state(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


def last_checkpoint(output: Path) -> str | None:
    """Return the last checkpoint that is whole: the Trainer writes its state last, and may have
    been killed before.
    """
    numbers = [folder.name.removeprefix("checkpoint-") for folder in output.glob("checkpoint-*")]
    for number in sorted(filter(str.isdecimal, numbers), key=int, reverse=True):
        folder = output / f"checkpoint-{number}"
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return str(folder)
        except (OSError, ValueError):
            continue
    return None

"""Time a training step of an adapter for the noise alone against one of today's branches: tokens of
text and noise a second, with the same LoRA, the same batches and the same optimizer.

    OMP_NUM_THREADS=2 python benchmarks/gate.py --json out.json
    python benchmarks/gate.py --device cuda --bf16 --model PATH_OR_ID

Batches of random tokens, of which the first quarter is a prompt. With a gate the text is computed
without a gradient and teaches, else text and noise are learned in one pass. Rounds of steps of a
Trainer by turns, each a forward and a backward pass and the optimizer's step, the first of a round
not counted; medians.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import conditions, load_model
from machine import wait
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from msn_ext.cli.common import positive_int
from msn_ext.cli.settings import add_settings, settings_from
from msn_ext.recipe.settings import NoiseSettings, TrainSettings
from msn_ext.training import add_noise
from msn_ext.training.data import Collate

STEPS = 4  # of a round
NOISE = NoiseSettings(segments=24)
TRAINING = TrainSettings(max_length=256)
WAYS = ("branch", "gate")


def trainer_for(way: str, model, folder: str, options, training: TrainSettings) -> Trainer:
    """Return a trainer with noise of a way; the model gets an adapter of its own."""
    from peft import LoraConfig, get_peft_model

    rank = training.lora_rank
    adapter = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    arguments = TrainingArguments(
        output_dir=folder,
        report_to=[],
        use_cpu=options.device == "cpu",
        bf16=training.bf16,
        per_device_train_batch_size=training.batch_size,
        num_train_epochs=1,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)
    length, size = training.max_length, training.batch_size * STEPS
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(model.config.vocab_size, (size, length), generator=generator).tolist()
    prompt = length // 4
    samples = [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in rows]
    trainer = Trainer(get_peft_model(model, adapter), arguments, Collate(0), train_dataset=samples)
    noise = settings_from(options, NOISE).of_collator(0)
    return add_noise(trainer, gate=way == "gate", **noise, seed=0)


class Clock(TrainerCallback):
    """Takes the seconds of a trainer's steps, all but the first of a round."""

    def __init__(self, device: str):
        self._device, self.seconds = device, []

    def on_step_begin(self, args, state, control, **kwargs):
        wait(self._device)
        self._begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait(self._device)
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self._begun)


def measure(trainers: dict[str, Trainer], rounds: int, device: str) -> dict[str, float]:
    """Return tokens a second by way."""
    clocks, tokens = {}, {}
    for way, trainer in trainers.items():
        batch = next(iter(trainer.get_train_dataloader()))
        tokens[way] = int(batch["attention_mask"].sum())  # of every batch
        clocks[way] = Clock(device)
        trainer.add_callback(clocks[way])
        trainer.remove_callback(PrinterCallback)
    for _ in range(rounds):
        for trainer in trainers.values():
            trainer.train()
    return {way: tokens[way] / statistics.median(clock.seconds) for way, clock in clocks.items()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="path or id; the demo model where none is named")
    add_settings(parser, NOISE, "length", "segments")
    add_settings(parser, TRAINING, "batch_size", "max_length", "lora_rank", "bf16")
    parser.add_argument(
        "--rounds", type=positive_int, default=5, help=f"of {STEPS} steps (default: 5)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    options = parser.parse_args(arguments)
    options.dtype = "float32"
    training = settings_from(options, TRAINING)
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            model, _ = load_model(options)
            trainers[way] = trainer_for(way, model, folder, options, training)
        found = measure(trainers, options.rounds, options.device)
    for way, rate in found.items():
        print(f"{way:<8}{rate:10,.0f} tokens/s")
    ratio = found["gate"] / found["branch"]
    print(f"{'':<8}{ratio:10.2f} x")
    if options.json:
        about = conditions(trainers["gate"].model, "gate.py", arguments)
        content = about | {"tokens per second": found, "ratio": ratio}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

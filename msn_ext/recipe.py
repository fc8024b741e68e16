"""Noisy fine-tuning, from a file to a model with better guesses: what ``msn train`` does, step by
step.

The engine is transformers' Trainer, the adapter PEFT's; what is added is :func:`msn_ext.add_noise`,
answers of the model itself, and figures before and after.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from .decoding import BestFirst
from .generation import generate
from .jsonl import whole_rows
from .training import Starts, add_noise
from .training.data import Collate, Messages, encode, prompt_ids
from .training.evaluation import new_trigrams, noise_accuracy
from .training.layouts import NO_LABEL

NOISE_WEIGHT, SETTLING = 0.3, 2 / 3
LORA_RATE, FULL_RATE = 1e-3, 2e-5
CIRCLING = 16
"""So many trigrams in a row that an answer has had before: from there on it goes round in circles.
"""
DECODED = 16  # questions that accept lengths are measured on
DRAFTS = {
    "paper": lambda: "paper",
    "auto@64": lambda: BestFirst(64),
    "auto@8": lambda: BestFirst(8),
}


def split(conversations: list, held_out: int, seed: int = 0) -> tuple[list, list]:
    """Shuffled, in two: what is learned, and ``held_out`` at most a fifth for the figures; no first
    question is in both.
    """
    shuffled = random.Random(seed).sample(conversations, len(conversations))
    held_out = min(held_out, len(shuffled) // 5)
    held = shuffled[:held_out]
    return unasked(shuffled[held_out:], held), held


def unasked(conversations: list[Messages], others: list[Messages]) -> list[Messages]:
    """Those whose first question none of the others has."""
    asked = {_key(question_of(messages)) for messages in others}
    return [messages for messages in conversations if _key(question_of(messages)) not in asked]


def askable(tokenizer, conversations: list[Messages], room: int) -> list[Messages]:
    """Those that begin with a question, of fewer than ``room`` tokens."""
    asked = [(question_of(messages), messages) for messages in conversations]
    return [
        messages
        for question, messages in asked
        if question and len(prompt_ids(tokenizer, question)) < room
    ]


def context_of(model) -> int:
    """Tokens that a model reads at most, as its configuration says."""
    return (
        getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        or sys.maxsize
    )


def self_distill(
    model,
    tokenizer,
    conversations: Iterable[Messages],
    path: Path,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    progress: bool = True,
) -> list[dict]:
    """The model's own greedy answers to the first questions, so that training keeps what it says.

    The answers lie in ``path``, a line each, and are not asked for again: an interrupted run goes
    on.

    Returns:
        Per question ``messages`` (without answer), ``tokens`` (the answer, int), ``response`` (its
        text) and ``ended`` (it is complete), in the order of the questions.
    """
    questions = [question_of(messages) for messages in conversations]
    done = {_key(row["messages"]): row for row in whole_rows(path)}
    missing = {key: messages for messages in questions if (key := _key(messages)) not in done}
    prompts = {key: prompt_ids(tokenizer, messages) for key, messages in missing.items()}
    # Of one length, as far as can be: a batch takes as long as its longest row.
    order = sorted(missing, key=lambda key: len(prompts[key]))
    path.parent.mkdir(parents=True, exist_ok=True)
    pad = pad_of(tokenizer)
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(
            total=len(questions),
            initial=len(questions) - len(order),
            unit="answer",
            desc="self-distill",
            disable=not progress,
        ) as bar,
    ):
        for at in range(0, len(order), batch_size):
            keys = order[at : at + batch_size]
            width = max(len(prompts[key]) for key in keys)
            ids = torch.tensor(
                [[pad] * (width - len(prompts[key])) + prompts[key] for key in keys],
                device=model.device,
            )
            mask = torch.tensor(
                [[0] * (width - len(prompts[key])) + [1] * len(prompts[key]) for key in keys],
                device=model.device,
            )
            out = generate(
                model,
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                pad_token_id=pad,
            )
            for key, row, gained in zip(
                keys, out.sequences[:, width:].tolist(), out.accept_lengths
            ):
                tokens = row[: int(gained.sum())]
                ended = tokens[-1:] == [tokenizer.eos_token_id]
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                done[key] = {
                    "messages": missing[key],
                    "response": text,
                    "tokens": tokens,
                    "ended": ended,
                }
                file.write(json.dumps(done[key], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(keys))
    return [done[_key(messages)] for messages in questions]


def question_of(messages: Messages) -> Messages:
    """What comes before the first answer."""
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[0]] if answers else messages


def _key(messages: Messages) -> str:
    return hashlib.blake2b(
        json.dumps(messages, ensure_ascii=False).encode(), digest_size=16
    ).hexdigest()


def before_circling(tokens: list[int]) -> list[int]:
    """An answer up to where it begins to repeat itself at length, as small models do under greedy
    decoding.

    Learned, the rest would teach to repeat, and repetition passes for fast decoding.
    """
    seen: set[tuple[int, ...]] = set()
    run = 0
    for at, trigram in enumerate(zip(tokens, tokens[1:], tokens[2:])):
        run = run + 1 if trigram in seen else 0
        if run == CIRCLING:
            return tokens[: at - CIRCLING + 3]
        seen.add(trigram)
    return tokens


def samples_of(tokenizer, rows: list, max_length: int) -> list[dict]:
    """Training samples of conversations, or of rows of :func:`self_distill`, those only
    :func:`before_circling`; without those that have no label left.
    """
    samples = []
    for row in rows:
        if isinstance(row, dict):
            prompt = prompt_ids(tokenizer, row["messages"])
            answer = before_circling(row["tokens"])
            sample = {"input_ids": prompt + answer, "labels": [NO_LABEL] * len(prompt) + answer}
            sample = {name: values[:max_length] for name, values in sample.items()}
            samples.append(sample if len(prompt) < max_length and answer else None)
        else:
            samples.append(encode(tokenizer, row, max_length))
    return [sample for sample in samples if sample is not None]


def mean_accept_length(
    model,
    tokenizer,
    questions: list[Messages],
    draft,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> tuple[float, float]:
    """Tokens per forward pass of greedy decoding (MAT), the prompt's pass included, and what share
    of the answers' trigrams is new.

    Args:
        draft: makes a ``draft=`` for every question.
    """
    tokens = passes = 0
    answers = []
    for messages in tqdm(
        questions, desc="accept length", unit="prompt", leave=False, disable=not progress
    ):
        ids = torch.tensor([prompt_ids(tokenizer, question_of(messages))], device=model.device)
        options = dict(do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
        out = generate(model, ids, draft=draft(), **options)
        answers.append(out.sequences[0, ids.shape[1] :].tolist())
        tokens, passes = tokens + len(answers[-1]), passes + len(out.accept_lengths[0])
    return tokens / passes, new_trigrams(answers)


def figures(
    model,
    tokenizer,
    samples: list[dict],
    questions: list[Messages],
    length: int,
    progress: bool = True,
) -> dict:
    """What is compared: of :class:`.training.evaluation.NoiseAccuracy` behind up to ``length``
    noise tokens; by draft the accept lengths of some questions (``MAT``); and, since they are high,
    too, where a model repeats itself, what share of the answers' trigrams is new to the answer
    (``new``).
    """
    found = asdict(
        noise_accuracy(model, samples, Collate(pad_of(tokenizer)), length=length, progress=progress)
    )
    asked = questions[:DECODED]
    decoded = {
        name: mean_accept_length(model, tokenizer, asked, draft, progress=progress)
        for name, draft in DRAFTS.items()
    }
    return found | {
        "MAT": {name: mat for name, (mat, _) in decoded.items()},
        "new": min(new for _, new in decoded.values()),
    }


def pad_of(tokenizer) -> int:
    """What fills rows up; masked, so that any token will do."""
    return next(
        (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None),
        0,
    )


class _Bar(TrainerCallback):
    """A progress bar with both losses and the accuracy behind noise."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            smoothing=0.05,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "clean_loss" in logs:
            shown = {"loss": logs["clean_loss"], "behind noise": logs.get("noise_loss", 0.0)}
            self._bar.set_postfix(
                {name: f"{value:.3f}" for name, value in shown.items()}
                | {"right": f"{100 * logs.get('noise_accuracy', 0.0):.0f} %"}
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()


def train(
    model,
    tokenizer,
    samples: list[dict],
    output: Path,
    *,
    layout: str | None = "branch",
    length: int = 4,
    segments: int = 24,
    content: str = "ahead",
    location: str | Starts = "random",
    noise_weight: float | None = None,
    lora_rank: int = 16,
    learning_rate: float | None = None,
    epochs: float = 1.0,
    max_steps: int = -1,
    batch_size: int = 4,
    save_steps: int = 50,
    seed: int = 0,
    bf16: bool = False,
    progress: bool = True,
):
    """Fine-tune with noise; goes on from the last checkpoint in ``output``, if there is one.

    Args:
        model: trained in place; with ``lora_rank`` (0: all weights) it gets an adapter.
        samples: of :func:`samples_of`.
        output: for checkpoints, and in the end the adapter or model, and the tokenizer.
        layout, length, segments, content, location: of :func:`msn_ext.add_noise`; layout None: no
            noise, plain fine-tuning, for comparison.
        learning_rate: None: 1e-3 for an adapter, 2e-5 for all weights (the paper's).
        noise_weight: of a label behind noise, where a clean one counts 1; a tenth of it in the last
            third of the steps, so that what the model says on clean text settles. None: for
            branches 0.3; in place 1 throughout, as the paper.

    Returns:
        The trained model (with ``lora_rank`` a PEFT model) and the trainer's log, a dict per entry.
    """
    if not samples:
        raise ValueError(
            "samples is empty; expected conversations with answers that fit into the length"
        )
    if learning_rate is None:
        learning_rate = LORA_RATE if lora_rank else FULL_RATE
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(
            r=lora_rank,
            lora_alpha=2 * lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        model = get_peft_model(model, adapter)
    arguments = TrainingArguments(
        output_dir=str(output),
        report_to=[],
        seed=seed,
        use_cpu=model.device.type == "cpu",
        bf16=bf16,
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=5,
        save_steps=save_steps,
        save_total_limit=2,
        disable_tqdm=True,
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # or the Trainer splits batches over all that it sees
    trainer = _Trainer(model, arguments, Collate(pad_of(tokenizer)), train_dataset=samples)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if progress:
        trainer.add_callback(_Bar())
    if layout is not None:
        settings = dict(
            layout=layout,
            length=length,
            segments=segments,
            content=content,
            location=location,
            seed=seed,
        )
        add_noise(trainer, loss_weights=_weights(layout, noise_weight), **settings)
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    trainer.save_model(str(output))
    tokenizer.save_pretrained(str(output))
    return model, trainer.state.log_history


class _Trainer(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return ByLength(
            [len(sample["input_ids"]) for sample in self.train_dataset],
            self.args.train_batch_size,
            self.args.seed,
        )


class ByLength(Sampler):
    """Batches of like lengths, which have little padding, others in every epoch.

    As transformers' own, but the order depends on the seed and the epoch alone, so that a run that
    goes on has it, too.
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


def _weights(layout: str, noise_weight: float | None):
    """As :func:`msn_ext.add_noise` takes them."""
    if noise_weight is None:
        if layout == "replace":
            return 1.0, 1.0
        noise_weight = NOISE_WEIGHT
    return lambda done: (1.0, noise_weight if done < SETTLING else noise_weight / 10)


def last_checkpoint(output: Path) -> str | None:
    """The last one that is whole: the Trainer writes its state last, and may have been killed
    before.
    """
    numbered = [
        folder
        for folder in output.glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdecimal()
    ]
    for folder in sorted(
        numbered, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), reverse=True
    ):
        try:
            json.loads((folder / "trainer_state.json").read_text())
            return str(folder)
        except (OSError, ValueError):
            continue
    return None

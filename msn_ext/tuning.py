"""Measure a model on this machine for ``draft="auto"``: seconds of a step by its size, and its own
factors.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from msn_ext.terminal import progress_bar

from .decoding import BestFirst, Habits, Request, runner_for
from .decoding.drafters.calibration import FactorRecorder, Record, fit
from .decoding.drafters.factors import load as shipped_factors
from .decoding.drafters.habits import HabitRecorder
from .decoding.engine import engine_of, native_plan_for
from .generation import generate
from .jsonl import lines, row
from .profile import Profile, machine, profile_path

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
ROUNDS = 9
WARM_UP = 2


@torch.no_grad()
def measure_step_times(
    model,
    context: int | None = None,
    sizes: tuple[int, ...] = SIZES,
    progress: bool = True,
    engine: str = "auto",
) -> dict[int, float]:
    """Return the seconds of a whole step, drafting to commit, by the nodes of its tree; batch 1.

    The sizes take turns, so that whatever else the machine does meets all alike. The first two
    rounds warm up, and capture where decoding does (:mod:`.decoding.runner`); of the others the
    median counts.

    Args:
        context: tokens of the text before the first step, as :func:`checked_context` has it.
        engine: as for :func:`msn_ext.generate`.

    Raises:
        ValueError: the context is too long for the model.
    """
    context = checked_context(model, context)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    text = torch.randint(vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
    drafter = BestFirst(budget=1)
    request = Request.greedy_unpadded(model, text.to(model.device), drafter, context, engine)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    bar = progress_bar(
        total=ROUNDS * len(sizes), unit="step", desc="step times", leave=False, disable=not progress
    )
    with runner_for(request) as runner, bar:
        gained = int(runner.prefill().result().status[0])
        for _ in range(ROUNDS):
            for size in sizes:
                runner.decoder.advance(gained)
                drafter.budget = size
                start = time.perf_counter()
                gained += int(runner.step().result().status[0])
                seconds[size].append(time.perf_counter() - start)
                bar.update()
    return {size: statistics.median(taken[WARM_UP:]) for size, taken in seconds.items()}


def checked_context(model, context: int | None) -> int:
    """Return the tokens before a step; None: 256, or fewer where the model has no room for them.

    Raises:
        ValueError: more than half of the model's positions, and the steps need the other half.
    """
    most = max(1, _context_of(model, 1 << 30) // 2)
    if context is not None and not 1 <= context <= most:
        raise ValueError(
            f"context is {context}; expected 1 to {most}, half of the positions that the model has"
        )
    return min(256, most) if context is None else context


def _context_of(model, otherwise: int) -> int:
    """Return the positions that a model can take, ``otherwise`` where it does not say."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or otherwise


def learn_factors(
    model,
    prompts: list[Tensor],
    prior: Tensor,
    progress: bool = True,
    engine: str = "auto",
    habits: Habits | None = None,
) -> tuple[Tensor, dict]:
    """Return the factors under which the model's own answers to some prompts are likeliest.

    Args:
        prompts: int64 [1, P], fifty or more, such as will be asked; each gets an answer of up to
            128 tokens. Those that leave no room for an answer are passed over.
        prior: float64 [348], where the fit begins and stays near for want of evidence.
        engine: as for :func:`msn_ext.generate`.
        habits: to weigh them, too; of answers to other prompts.

    Returns:
        The factors, and a summary: prompts and nodes, mean log-likelihood before and after.

    Raises:
        ValueError: no prompt got an answer to learn from.
    """
    records: list[Record] = []
    asked = 0
    context = _context_of(model, 1 << 30)
    for prompt in progress_bar(
        prompts, unit="prompt", desc="factors", leave=False, disable=not progress
    ):
        length = prompt.shape[1]
        if not 0 < length < context:
            continue  # nothing to ask, or no room for an answer
        asked += 1
        generate(
            model,
            prompt.to(model.device),
            draft=FactorRecorder(records, BestFirst(64, factors=prior, tails=False, habits=habits)),
            engine=engine,
            do_sample=False,
            max_new_tokens=min(128, context - length),
        )
    if not any(entries for _, entries, _ in records):
        raise ValueError(
            f"prompts gave no answers to learn from; {asked} of {len(prompts)} fit into the model's"
            " context"
        )
    fitted, before, after = fit(records, prior)
    return fitted, {"prompts": asked, "nodes": len(records), "before": before, "after": after}


def learn_habits(
    model,
    prompts: list[Tensor],
    new_tokens: int = 256,
    batch: int = 16,
    progress: bool = True,
    engine: str = "auto",
) -> tuple[Habits, dict]:
    """Return what a model usually says, counted over its own greedy answers to some prompts, and
    weighed on its answers to a tenth of them, two hundred at most, which are not counted.

    Args:
        prompts: int64 [1, P], a thousand or more, such as will be asked. Those that leave no room
            for an answer are passed over.
        new_tokens: of an answer, at most.
        batch: answers that are written side by side, without drafts.
        engine: as for :func:`msn_ext.generate`.

    Returns:
        The habits, and a summary: prompts and tokens that were counted, and that of
        :func:`learn_factors`.

    Raises:
        ValueError: fewer than two prompts fit into the model's context.
    """
    room = _context_of(model, 1 << 30) - new_tokens
    fitting = [prompt for prompt in prompts if 0 < prompt.shape[1] <= room]
    if len(fitting) < 2:
        raise ValueError(
            f"{len(fitting)} of {len(prompts)} prompts leave room for {new_tokens} tokens more in"
            " the model's context; expected two at least"
        )
    held_out = min(200, max(1, len(fitting) // 10))
    counted = fitting[held_out:]
    recorder = HabitRecorder(BestFirst(1))
    with progress_bar(
        total=len(counted), unit="answer", desc="habits", leave=False, disable=not progress
    ) as bar:
        for begin in range(0, len(counted), batch):
            some = counted[begin : begin + batch]
            ids, mask = _left_padded(some)
            generate(
                model,
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                draft=recorder,
                engine=engine,
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
            bar.update(len(some))
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    habits = recorder.habits(vocabulary)
    habits.factors, about = learn_factors(
        model, fitting[:held_out], habits.factors, progress, engine, habits
    )
    return habits, {"prompts": len(counted), "tokens": len(recorder), "factors": about}


def _left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return prompts int64 [1, P] as int64 [B, longest], padding before them, and their mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for its_ids, its_mask, prompt in zip(ids, mask, prompts):
        its_ids[longest - prompt.shape[1] :] = prompt[0]
        its_mask[longest - prompt.shape[1] :] = 1
    return ids, mask


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a file: JSON lines with ``prompt`` or ``turns`` (the first counts), or
    plain lines.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged or holds no prompt; names the file and the line.
    """
    prompts = [
        _prompt(line.strip(), f"{path}: line {number}")
        for number, line in lines(path)
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _prompt(line: str, place: str) -> str:
    if not line.startswith("{"):
        return line
    fields = row(line, place)
    turns = fields.get("turns")
    prompt = fields.get("prompt") or (turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(prompt, str):
        raise ValueError(
            f"{place} has neither a prompt nor turns that are text, but {', '.join(fields)}"
        )
    return prompt


def tune(
    model,
    prompts: list[Tensor],
    context: int | None = None,
    progress: bool = True,
    engine: str = "auto",
) -> tuple[Profile, Path]:
    """Measure a model, learn its factors from ``prompts`` if there are any, and keep both where
    "auto" looks.

    Factors of an earlier profile are kept where no prompts are given.

    Args:
        context: tokens before a step, as :func:`checked_context` has it.
        engine: as for :func:`msn_ext.generate`; the profile is of the one that runs.

    Raises:
        ValueError: the context is too long for the model.
    """
    context = checked_context(model, context)
    engine = engine_of(native_plan_for(model, engine))
    path = profile_path(model, engine)
    earlier = None
    if path.exists():
        with contextlib.suppress(ValueError):  # it is replaced
            earlier = Profile.load(path)
    times = measure_step_times(model, context, progress=progress, engine=engine)
    about = {
        "model": model.config._name_or_path or model.config.model_type,
        "device": machine(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "engine": engine,
        "context": context,
        "torch": torch.__version__,
    }
    found = Profile(times, about=about)
    if prompts:
        found.save(path)  # whatever becomes of the prompts
        found.factors, about["factors"] = learn_factors(
            model, prompts, shipped_factors(), progress, engine
        )
    elif earlier and earlier.factors is not None:
        found.factors, about["factors"] = earlier.factors, earlier.about.get("factors")
    found.save(path)
    return found, path

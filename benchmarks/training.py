"""Compare ways to train for decoding: what the paper's tables 1, 3 and 4 and its figure 4 ask, at a
small scale.

    python benchmarks/training.py --data prompts.jsonl … --samples 900 --output DIR
    # hours on a CPU, minutes on a GPU
    python benchmarks/training.py --summary DIR     # its table and plots, nothing run

Everything is trained from the same weights on the same self-distilled answers, in the same order:
plain fine-tuning (sft), noise in place (replace) and branches (branch), for L = 1, 4, 8 noise
tokens a segment; noise in place where the loss is lowest (replace-4-ppl); the model's own guesses
as noise (branch-4-self); and sft and replace for as many tokens as the branches compute
(…-compute). A branch run has 96 noise tokens a sample, whatever L. So has the adapter for noise
alone (gated), a mask each, which is asked for as noise and decodes in the tails of best-first
trees. Measured on held-out answers: next-token loss, accuracy after 1 to 8 noise tokens, and tokens
per pass (MAT) of the paper's tree, of best-first trees, and of Jacobi chains of 1 to 8 guesses.
These decode the same text for all, whatever they would have said: a model that has learned to
repeat itself would seem fast on its own.

DIR keeps the answers, a folder of checkpoints an experiment, and a line of results.jsonl for each
that is done; the same command resumes where it was interrupted.
"""

import argparse
import copy
import functools
import os
import pathlib
import resource
import sys
import time
from dataclasses import asdict, replace

import torch
from common import Results, conditions, load_model
from plot import lines
from replay import make_drafter

from msn_ext.cli.settings import add_settings, settings_from
from msn_ext.jsonl import draw
from msn_ext.recipe.replay import mean_accept_length, passes, texts_of
from msn_ext.recipe.samples import pad_of, samples_of, split
from msn_ext.recipe.self_distill import self_distill
from msn_ext.recipe.settings import NoiseSettings, SampleSettings, TrainSettings
from msn_ext.recipe.train import ByLength, train
from msn_ext.training import NoisyCollator, lowest_loss_starts
from msn_ext.training.data import Collate, read_conversations
from msn_ext.training.evaluation import noise_accuracy

NOISE = 96  # tokens of a branch run's sample
DEEPEST = 8
CHAINS = (1, 2, 4, 8)
DRAFTS = ["paper", "auto@8", "auto@64", *(f"jacobi@{n}" for n in CHAINS)]
REPLAYED = 12  # answers
SAMPLING, TRAINING = SampleSettings(samples=900), TrainSettings(held_out=48, max_length=400)


def experiments() -> dict[str, dict]:
    """Return what :class:`NoiseSettings` are changed, by name of experiment; layout None: no noise;
    ``compute``: train for as many tokens as the branches of L = 4.
    """
    branches = {
        length: dict(layout="branch", length=length, segments=NOISE // length)
        for length in (1, 4, 8)
    }
    in_place = {length: dict(layout="replace", length=length, segments=1) for length in (1, 4, 8)}
    return {
        "base": {},
        "sft": dict(layout=None),
        "branch-4": branches[4],
        "replace-4": in_place[4],
        "replace-4-compute": in_place[4] | {"compute": True},
        "sft-compute": dict(layout=None, compute=True),
        "branch-4-self": branches[4] | {"content": "self"},
        "replace-4-ppl": in_place[4] | {"location": "ppl"},
        "branch-1": branches[1],
        "branch-8": branches[8],
        "replace-1": in_place[1],
        "replace-8": in_place[8],
        "gated": dict(layout="branch", gate=True, segments=NOISE),
    }


def noise_of(changed: dict) -> NoiseSettings:
    """Return the settings of an experiment."""
    changed = {name: value for name, value in changed.items() if name != "compute"}
    return NoiseSettings(**changed | {"layout": changed["layout"] or "none"})


def compute_ratio(samples: list[dict], collate, config, batch_size: int) -> float:
    """Return the tokens that a branch run computes for one of a run in place, over an epoch's
    batches.
    """
    noisy = NoisyCollator(collate, layout="branch", segments=NOISE // 4, seed=0, config=config)
    order = list(ByLength([len(sample["input_ids"]) for sample in samples], batch_size, seed=0))
    batches = [
        [samples[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)
    ]
    return sum(noisy(batch)["input_ids"].numel() for batch in batches) / sum(
        collate(batch)["input_ids"].numel() for batch in batches
    )


def accept_lengths(model, held: list[dict]) -> dict[str, float]:
    """Return the tokens per pass by draft, on held-out answers."""
    texts = texts_of(held[:REPLAYED])
    drafts = {draft: functools.partial(make_drafter, draft) for draft in DRAFTS}
    taken = passes(model, texts, drafts)
    return {draft: mean_accept_length(texts, each) for draft, each in taken.items()}


def run(
    name: str,
    changed: dict,
    model,
    tokenizer,
    samples: list[dict],
    held: list[dict],
    training: TrainSettings,
    work: pathlib.Path,
) -> dict:
    """Train a copy of the model as an experiment asks, and return its row of the results."""
    model, collate, content = copy.deepcopy(model), Collate(pad_of(tokenizer)), "ahead"
    row = {"experiment": name, "settings": changed, "samples": len(samples)}
    start = time.time()
    if changed:
        noise = noise_of(changed)
        if changed.get("compute"):
            ratio = compute_ratio(samples, collate, model.config, training.batch_size)
            training = replace(training, epochs=training.epochs * ratio)
        if noise.location == "ppl":
            starts = lowest_loss_starts(model, samples, collate, length=noise.chosen()["length"])
            noise = replace(noise, location=starts)
        trained, log = train(model, tokenizer, samples, work, noise, training)
        model = trained if noise.gate else trained.merge_and_unload()
        content = noise.of_collator(pad_of(tokenizer))["content"]
        row |= {"epochs": training.epochs, "log": [entry for entry in log if "loss" in entry]}
    row["training seconds"] = round(time.time() - start)
    # Of all experiments so far.
    row["peak bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accuracy = noise_accuracy(model.eval(), held, collate, length=DEEPEST, content=content)
    row |= asdict(accuracy)
    return row | {"MAT": accept_lengths(model.to(torch.bfloat16) if training.bf16 else model, held)}


def summarise(rows: list[dict]) -> str:
    table = [
        f"{'':<20}{'loss':>8}"
        + "".join(f"{'top-1 @' + str(d):>11}" for d in (1, 2, 4, 8))
        + "".join(f"{n:>10}" for n in rows[0]["MAT"])
    ]
    for row in rows:
        accuracy = "".join(f"{100 * row['top1'][d - 1]:>10.1f}%" for d in (1, 2, 4, 8))
        table.append(
            f"{row['experiment']:<20}{row['loss']:>8.4f}{accuracy}"
            + "".join(f"{x:>10.2f}" for x in row["MAT"].values())
        )
    return "\n".join(table)


def draw_plots(rows: list[dict], output: pathlib.Path) -> None:
    accuracy = {
        row["experiment"]: [(d + 1, 100 * value) for d, value in enumerate(row["top1"])]
        for row in rows
    }
    chains = {
        row["experiment"]: [(n, row["MAT"][f"jacobi@{n}"] - 1) for n in CHAINS] for row in rows
    }
    losses = {
        row["experiment"]: [(e["step"], e["noise_loss"]) for e in row["log"] if "noise_loss" in e]
        for row in rows
        if "log" in row
    }
    (output / "accuracy.svg").write_text(
        lines("Right next token after noise, %", "noise tokens before it", accuracy)
    )
    (output / "chains.svg").write_text(
        lines("Tokens per pass of a Jacobi chain, beyond the first", "guesses in the chain", chains)
    )
    if any(losses.values()):
        curves = {name: curve for name, curve in losses.items() if curve}
        (output / "losses.svg").write_text(lines("Loss after noise while training", "step", curves))


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="path or id; the demo model where none is named")
    parser.add_argument(
        "--data", nargs="+", default=[], help="as of msn train; the answers are the model's own"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="folder for answers, checkpoints and results"
    )
    add_settings(parser, SAMPLING, "samples", "max_new_tokens")
    add_settings(parser, TRAINING, "held_out", "max_length", "epochs", "batch_size", "bf16")
    parser.add_argument("--only", help="comma-separated experiments (default: all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--summary",
        type=pathlib.Path,
        help="print the table of such a folder, draw its plots and stop",
    )
    return parser


def main(arguments: list[str]) -> int:
    parser = arguments_parser()
    options = parser.parse_args(arguments)
    output = options.summary or options.output
    if output is None or not (options.summary or options.data):
        parser.error("expected --data and --output, or --summary")
    results = Results(output / "results.jsonl")
    if options.summary:
        print(summarise(results.rows))
        draw_plots(results.rows, output)
        return 0
    chosen = experiments()
    if options.only:
        if unknown := set(options.only.split(",")) - set(chosen):
            parser.error(
                f"--only has {', '.join(sorted(unknown))}; expected some of {', '.join(chosen)}"
            )
        chosen = {name: chosen[name] for name in options.only.split(",")}

    options.dtype = "float32"
    model, tokenizer = load_model(options)
    files = [read_conversations(os.path.expanduser(path)) for path in options.data]
    training = settings_from(options, TRAINING)
    learned, held = split(draw(files, options.samples), training.held_out, training.seed)
    answerer = copy.deepcopy(model).to(torch.bfloat16) if training.bf16 else model
    answers = self_distill(
        answerer,
        tokenizer,
        held + learned,
        output / "answers.jsonl",
        max_new_tokens=options.max_new_tokens,
    )
    samples, evaluated = (
        samples_of(tokenizer, part, training.max_length)
        for part in (answers[len(held) :], answers[: len(held)])
    )
    header = conditions(model, "training.py", arguments)
    done = {row["experiment"] for row in results.rows}
    for name, changed in chosen.items():
        if name not in done:
            print(f"== {name}", flush=True)
            work = output / name
            row = run(name, changed, model, tokenizer, samples, evaluated, training, work)
            results.save(header, row)
    print(summarise(results.rows))
    draw_plots(results.rows, output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

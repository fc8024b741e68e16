"""`msn train`: samples from conversations, the model's own answers, the figures, and a run that is
killed.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from samples import NONE, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from msn_ext import cli, recipe
from msn_ext.training.data import Collate, encode, read_conversations
from msn_ext.training.evaluation import new_trigrams, noise_accuracy
from msn_ext.tuning import draw

pytest.importorskip("peft")
pytest.importorskip("accelerate")

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant'"
    " %}<eos>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DATA = [
    {"prompt": f"{a} {b}?", "response": f"{b} {a} {b} {a} {b}"} for a in WORDS for b in WORDS[:6]
]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(path)
    byte_tokenizer(TEMPLATE).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, DATA)))
    return str(path)


# ---- conversations and samples -------------------------------------------------------------------


def learned(tokenizer, sample: dict) -> list[str]:
    """The parts that have labels, which are the tokens there."""
    parts, on = [], False
    for token, label in zip(sample["input_ids"], sample["labels"]):
        assert label in (NONE, token)
        if label != NONE:
            parts.append([]) if not on else None
            parts[-1].append(token)
        on = label != NONE
    return [tokenizer.decode(part) for part in parts]


TURNS = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"), ("user", "Q3")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]


def test_what_the_assistant_says_is_learned_with_its_end():
    tokenizer = byte_tokenizer(TEMPLATE)
    sample = encode(tokenizer, CHAT, 1000)
    assert learned(tokenizer, sample) == ["A1<eos>", "A2<eos>"]
    assert (
        tokenizer.decode(sample["input_ids"])
        == "<user>Q1<assistant>A1<eos>\n<user>Q2<assistant>A2<eos>\n"
    )
    assert learned(tokenizer, encode(tokenizer, CHAT[:2], 1000)) == ["A1<eos>"]
    assert learned(tokenizer, encode(tokenizer, CHAT, 20)) == ["A"]
    assert encode(tokenizer, CHAT, 19) is None and encode(tokenizer, CHAT[:1], 1000) is None


def test_without_a_template_answers_follow_their_questions():
    tokenizer = byte_tokenizer()
    sample = encode(tokenizer, CHAT, 1000)
    assert tokenizer.decode(sample["input_ids"]) == "Q1A1<eos>Q2A2<eos>"
    assert learned(tokenizer, sample) == ["A1<eos>", "A2<eos>"]


def test_a_template_that_rewrites_the_question_is_refused():
    tokenizer = byte_tokenizer(
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(
        ValueError, match="chat template does not begin an answered conversation .* begins 'Q1'"
    ):
        encode(tokenizer, CHAT, 1000)


def test_earlier_answers_that_a_template_rewrites_are_left_out():
    """As Qwen 3's does, which takes thoughts out of all answers but the last."""
    template = TEMPLATE.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and loop.last %}(thinks){% endif %}{{ m['content'] }}",
    )
    tokenizer = byte_tokenizer(template)
    with pytest.warns(UserWarning, match="only first answers are learned"):
        sample = encode(tokenizer, CHAT, 1000)
    assert learned(tokenizer, sample) == ["(thinks)A1<eos>"]


def test_conversations_are_read(tmp_path):
    rows = [{"messages": CHAT}, {"prompt": "Q", "response": "A", "more": 1}, {"prompt": "Q"}]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read_conversations(str(tmp_path / name)) == [CHAT, [question, answer], [question]]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no conversations"),
        ('{"prompt": "a"}\n{', "line 2 is no JSON"),
        ("[1]", "line 1 is no object"),
        ('{"text": "a"}', "line 1 has neither messages nor a prompt, but text"),
        ('{"messages": [{"role": "user"}]}', "line 1: expected messages with role and content"),
        ('{"messages": ["a"]}', "line 1: expected messages with role and content"),
        ('{"prompt": "a", "response": 3}', "line 1: expected messages with role and content"),
    ],
)
def test_wrong_files_are_refused_by_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_conversations(str(path))
    damaged = tmp_path / "a.jsonl.gz"
    damaged.write_bytes(b"\x1f\x8b no")
    with pytest.raises(ValueError, match="cannot be read"):
        read_conversations(str(damaged))
    with pytest.raises(OSError):
        read_conversations(str(tmp_path / "none.jsonl"))


# ---- the model's own answers ---------------------------------------------------------------------


def test_answers_are_the_model_s_own(tmp_path, monkeypatch):
    model, tokenizer = tiny_llama().double().eval(), byte_tokenizer(TEMPLATE)
    conversations = [[{"role": "user", "content": row["prompt"]}] for row in DATA[:11]] + [CHAT]
    path = tmp_path / "answers.jsonl"
    rows = recipe.self_distill(
        model, tokenizer, conversations, path, max_new_tokens=12, batch_size=4, progress=False
    )
    assert [row["messages"] for row in rows] == [*conversations[:11], CHAT[:1]]
    for row in rows:
        ids = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        plain = model.generate(**ids, do_sample=False, max_new_tokens=12)[
            0, ids["input_ids"].shape[1] :
        ].tolist()
        assert row["tokens"] == plain and row["ended"] == (plain[-1] == 256)
    samples = recipe.samples_of(tokenizer, rows, 1000)
    for sample, row in zip(samples, rows):
        assert [label for label in sample["labels"] if label != NONE] == row["tokens"]
        assert sample["input_ids"][-len(row["tokens"]) :] == row["tokens"]

    # An interrupted run: the last line is cut off; only what is missing is asked for.
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 30])
    asked, original = [], recipe.generate
    monkeypatch.setattr(
        recipe,
        "generate",
        lambda model, ids, *rest, **options: (
            asked.append(len(ids)),
            original(model, ids, *rest, **options),
        )[1],
    )
    again = recipe.self_distill(
        model, tokenizer, conversations, path, max_new_tokens=12, batch_size=4, progress=False
    )
    assert again == rows and asked == [1]
    row = rows[0] | {
        "response": "a\u2028b\x85c\x0b"
    }  # ends of lines to str.splitlines, not to JSON lines
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert recipe.self_distill(model, tokenizer, conversations[:1], path, progress=False) == [row]
    path.write_text("{\n")
    with pytest.raises(ValueError, match="answers.jsonl is damaged"):
        recipe.self_distill(
            model, tokenizer, conversations, path, max_new_tokens=12, progress=False
        )


# ---- figures -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("period", [1, 2, 5, 30])
def test_answers_are_learned_until_they_go_round_in_circles(period):
    fresh, circles = list(range(100, 150)), list(range(period)) * 40
    # The first round is learned, and two tokens of the next, which could still go elsewhere.
    assert recipe.before_circling(fresh + circles) == fresh + circles[: period + 2]
    assert recipe.before_circling(fresh + fresh[:17]) == fresh + fresh[:17], "a quotation"
    assert recipe.before_circling([]) == []


def test_new_trigrams_are_counted_within_an_answer():
    assert new_trigrams([[1, 2, 3, 1, 2, 3]]) == 3 / 4
    assert new_trigrams([[1, 2, 3, 4], [1, 2, 3, 4]]) == 1
    assert new_trigrams([[5] * 102, [1, 2]]) == 1 / 100
    assert new_trigrams([]) == 0


def test_figures_are_those_of_the_noisy_text():
    """Behind one noise token: each segment put into its text, and the model asked."""
    from msn_ext import NoisyCollator

    model, tokenizer = tiny_llama().double().train(), byte_tokenizer(TEMPLATE)
    samples = [
        encode(
            tokenizer,
            [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["response"]},
            ],
            99,
        )
        for r in DATA[:9]
    ]
    found = noise_accuracy(model, samples, Collate(256), length=1, progress=False)
    assert model.training
    model.eval()
    loss = count = right = 0
    hits = {1: [], 10: []}
    noisy = NoisyCollator(
        Collate(256), length=1, segments=12, layout="branch", seed=0, config=model.config
    )
    noisy.annotate = True
    for sample in samples:
        ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
        said = model(input_ids=ids[None]).logits[0].float()
        live = labels[1:] != NONE
        loss += float(
            torch.nn.functional.cross_entropy(said[:-1][live], labels[1:][live], reduction="sum")
        )
        right += int((said[:-1].argmax(-1) == labels[1:])[live].sum())
        count += int(live.sum())
        batch = noisy([sample])
        for at in (batch["noise_depth"][0] == 1).nonzero()[:, 0].tolist():
            place = int(batch["position_ids"][0, at])
            if place + 1 == len(ids) or labels[place + 1] == NONE:
                continue
            text = ids.clone()
            text[place] = batch["input_ids"][0, at]
            order = model(input_ids=text[None]).logits[0, place].argsort(descending=True).tolist()
            for top in hits:
                hits[top].append(int(ids[place + 1]) in order[:top])
    assert found.tokens == count and found.loss == pytest.approx(loss / count, rel=1e-5)
    assert found.accuracy == pytest.approx(right / count)
    assert found.top1 == [pytest.approx(sum(hits[1]) / len(hits[1]))]
    assert found.top10 == [pytest.approx(sum(hits[10]) / len(hits[10]))]


# ---- the command ---------------------------------------------------------------------------------

QUICK = [
    "--held-out",
    "4",
    "--batch-size",
    "4",
    "--segments",
    "4",
    "--lora-rank",
    "4",
    "--learning-rate",
    "1e-2",
    "--device",
    "cpu",
]


def command(folder: str, data: str, output, *more: str) -> list[str]:
    return ["train", "--model", folder, "--data", data, "--output", str(output), *QUICK, *more]


def test_a_model_learns_to_guess(folder, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(command(folder, data, output, "--epochs", "6")) == 0
    said = capsys.readouterr().out
    assert "56 samples" in said and "4 held out" in said and "tokens a pass, auto@64" in said
    figures = json.loads((output / "figures.json").read_text())
    before, after = figures["before"], figures["after"]
    assert after["loss"] < 0.8 * before["loss"]
    assert sum(after["top10"]) > 1.2 * sum(before["top10"])
    assert (
        cli.main(
            [
                "generate",
                "--model",
                str(output),
                "--prompt",
                "one two?",
                "--max-new-tokens",
                "5",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    capsys.readouterr()
    # The same command again has nothing left to do; another one is refused.
    assert cli.main(command(folder, data, output, "--epochs", "6")) == 0
    assert json.loads((output / "figures.json").read_text())["after"] == after
    assert cli.main(command(folder, data, output, "--epochs", "7")) == 1
    assert "holds a run with --epochs 6.0, now it is 7.0" in capsys.readouterr().err


def test_what_went_wrong_may_be_corrected(folder, data, tmp_path, capsys, monkeypatch):
    """Until there is a checkpoint; answers that are there are not asked for again."""
    output, answers = (
        tmp_path / "out",
        [
            "--self-distill",
            "--max-new-tokens",
            "9",
            "--max-steps",
            "2",
        ],
    )

    def out_of_memory(*arguments, **settings):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(recipe, "train", out_of_memory)
        assert cli.main(command(folder, data, output, *answers)) == 1
    written = (output / "answers.jsonl").read_text()
    assert cli.main(command(folder, data, output, *answers[:2], "10", *answers[3:])) == 1
    assert "holds a run with --max-new-tokens 9, now it is 10" in capsys.readouterr().err
    (output / "checkpoint-old").mkdir()  # the user's
    assert (
        cli.main(command(folder, data, output, *answers, "--batch-size", "2", "--length", "3")) == 0
    )
    assert (output / "answers.jsonl").read_text() == written
    figures = json.loads((output / "figures.json").read_text())
    assert len(figures["before"]["top1"]) == len(figures["after"]["top1"]) == 3


def test_changed_data_is_not_gone_on_with(folder, data, tmp_path, capsys):
    file, output = tmp_path / "data.jsonl", tmp_path / "out"
    shutil.copy(data, file)
    assert cli.main(command(folder, str(file), output, "--max-steps", "1")) == 0
    file.write_text(file.read_text().replace("one", "two"))
    assert cli.main(command(folder, str(file), output, "--max-steps", "1")) == 1
    assert "holds a run with content of --data" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["replace", "none"])
def test_families_without_branches_are_trained_in_place(data, tmp_path, capsys, layout):
    from transformers import Olmo2Config, Olmo2ForCausalLM

    path = tmp_path / "olmo"
    Olmo2ForCausalLM(
        Olmo2Config(**tiny_llama().config.to_diff_dict() | {"model_type": "olmo2"})
    ).save_pretrained(path)
    byte_tokenizer(TEMPLATE).save_pretrained(path)
    assert cli.main(command(str(path), data, tmp_path / "branch")) == 1
    assert "layout='replace'" in capsys.readouterr().err and not (tmp_path / "branch").exists()
    assert (
        cli.main(command(str(path), data, tmp_path / "out", "--layout", layout, "--max-steps", "3"))
        == 0
    )
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert (
        len(figures["after"]["top1"]) == 4 and figures["after"]["loss"] != figures["before"]["loss"]
    )


def test_questions_without_room_or_words_are_left_out(folder, tmp_path, capsys):
    odd = [
        {"prompt": "x" * 600},
        {
            "messages": [
                {"role": "assistant", "content": "hello"},
                {"role": "user", "content": "a?"},
                {"role": "assistant", "content": "b"},
            ]
        },
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, odd + DATA[:20])))
    for more in ([], ["--self-distill"]):
        options = ["--max-steps", "1", "--max-new-tokens", "9", *more]
        assert cli.main(command(folder, str(file), tmp_path / f"out{len(more)}", *options)) == 0, (
            capsys.readouterr().err
        )
        assert "2 conversations begin without a question" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option, value",
    [("--length", "65"), ("--segments", "257"), ("--seed", "-1"), ("--lora-rank", "-1")],
)
def test_ranges_are_told_before_anything_is_done(folder, data, tmp_path, capsys, option, value):
    assert cli.main(command(folder, data, tmp_path / "out", option, value)) == 2
    assert f"'{value}' is not a whole number from" in capsys.readouterr().err


def test_the_gpu_is_chosen_elsewhere(folder, data, tmp_path, capsys):
    assert cli.main(command(folder, data, tmp_path / "out", "--device", "cuda:1")) == 1
    assert "CUDA_VISIBLE_DEVICES" in capsys.readouterr().err


def test_no_question_is_learned_and_held_out():
    conversations = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": str(n)}]
        for n in range(3)
        for word in WORDS
    ]
    learned, held = recipe.split(conversations, 4)
    assert len(held) == 4 and learned
    assert not {messages[0]["content"] for messages in learned} & {
        messages[0]["content"] for messages in held
    }


@pytest.mark.parametrize(
    "more",
    [
        ["--layout", "replace"],
        ["--content", "self"],
        ["--layout", "none"],
        ["--lora-rank", "0"],
        ["--bf16", "--self-distill", "--max-new-tokens", "9"],
    ],
)
def test_other_ways_to_train(folder, data, tmp_path, capsys, more):
    assert (
        cli.main(
            command(folder, data, tmp_path / "out", "--max-steps", "6", "--samples", "30", *more)
        )
        == 0
    ), capsys.readouterr().err
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["after"] != figures["before"]
    assert ("noise_loss" in str(figures["log"])) == ("none" not in more)


@pytest.mark.parametrize(
    "more, noise",
    [
        ([], (0.3, 0.03)),
        (["--noise-weight", "2"], (2, 0.2)),
        (["--layout", "replace"], (1, 1)),
        (["--layout", "replace", "--noise-weight", "2"], (2, 0.2)),
    ],
)
def test_noise_weighs_less_in_the_last_third(folder, data, tmp_path, monkeypatch, more, noise):
    told: list = []

    def add_noise(trainer, *, loss_weights, **settings):
        at = loss_weights if callable(loss_weights) else lambda done: loss_weights
        told.extend(at(done) for done in (0, 0.6, 0.7, 1))
        raise RuntimeError("enough")

    monkeypatch.setattr("msn_ext.recipe.add_noise", add_noise)
    assert cli.main(command(folder, data, tmp_path / "out", *more)) == 1
    first, last = noise
    assert told == [pytest.approx(pair) for pair in [(1, first), (1, first), (1, last), (1, last)]]


def test_batches_are_of_like_lengths_and_the_same_for_a_run_that_goes_on():
    lengths = [(7 * i) % 50 for i in range(200)]

    def batches(epoch: int) -> list[list[int]]:
        sampler = recipe.ByLength(lengths, 4, 3)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(200)) and len(sampler) == 200
        return [[lengths[i] for i in order[at : at + 4]] for at in range(0, 200, 4)]

    assert batches(1) == batches(1) != batches(0)
    assert sum(4 * max(batch) - sum(batch) for batch in batches(0)) < 0.1 * sum(lengths)


def test_the_ways_to_train_are_compared(folder, data, tmp_path):
    """benchmarks/training.py: a line an experiment, done ones are not run again, the plots are
    pictures.
    """
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "training.py"
    output, names = tmp_path / "out", "base,branch-4,replace-4-ppl,sft-compute"
    options = [
        "--model",
        folder,
        "--data",
        data,
        "--samples",
        "30",
        "--held-out",
        "4",
        "--max-new-tokens",
        "12",
        "--output",
        output,
    ]

    def run(*more) -> str:
        command = [sys.executable, script, *options, *more]
        run = subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr[-2000:]
        return run.stdout

    first = run("--only", "base,branch-4")
    said = run("--only", names)
    assert "== base" in first and "== base" not in said and "== sft-compute" in said
    header, *rows = map(json.loads, (output / "results.jsonl").read_text().splitlines())
    assert header["command"].startswith("python benchmarks/training.py") and [
        row["experiment"] for row in rows
    ] == names.split(",")
    by_name = {row["experiment"]: row for row in rows}
    assert by_name["sft-compute"]["epochs"] > 1.5 and by_name["branch-4"]["epochs"] == 1
    assert all(len(row["top1"]) == 8 and row["MAT"]["paper"] >= 1 for row in rows)
    assert len({row["loss"] for row in rows}) == 4
    for name in ("accuracy", "chains", "losses"):
        ElementTree.parse(output / f"{name}.svg")


def test_quality_is_compared_on_the_first_model_s_answers(
    folder, data, tmp_path, monkeypatch, capsys
):
    """benchmarks/quality.py: held-out conversations are none of those learned, and all models see
    the same answers.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import quality

    other, output = tmp_path / "other", tmp_path / "results"
    with torch.no_grad():
        changed = tiny_llama()
        changed.lm_head.weight += 0.05 * torch.randn(
            changed.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    changed.save_pretrained(other)
    byte_tokenizer(TEMPLATE).save_pretrained(other)
    tasks = tmp_path / "gsm8k.jsonl"
    tasks.write_text(
        "".join(
            json.dumps({"question": f"{n} and 1?", "answer": f"#### {n + 1}"}) + "\n"
            for n in range(3)
        )
    )
    options = [
        "--data",
        data,
        "--skip",
        "30",
        "--held-out",
        "6",
        "--gsm8k",
        str(tasks),
        "--questions",
        "2",
        "--max-new-tokens",
        "24",
    ]
    for name, model in (("base", folder), ("other", str(other))):
        assert (
            quality.main(
                [
                    "--name",
                    name,
                    "--model",
                    model,
                    "--dtype",
                    "float32",
                    *options,
                    "--output",
                    str(output),
                ]
            )
            == 0
        )
    with pytest.raises(SystemExit):
        quality.main(["--name", "base", "--model", folder, *options, "--output", str(output)])
    capsys.readouterr()
    assert quality.main(["--summary", str(output)]) == 0
    table = capsys.readouterr().out

    header, base, changed = map(json.loads, (output / "results.jsonl").read_text().splitlines())
    assert "quality.py" in header["command"]
    answers = [json.loads(line) for line in (output / "held-out.jsonl").read_text().splitlines()]
    drawn = draw([read_conversations(data)], 36)
    assert sorted(row["messages"][0]["content"] for row in answers) == sorted(
        held[0]["content"] for held in drawn[30:]
    )
    tokenizer, samples = byte_tokenizer(TEMPLATE), []
    for row in answers:
        prompt = recipe.prompt_ids(tokenizer, row["messages"])
        answer = recipe.before_circling(row["tokens"])
        samples.append((prompt, answer))
    for row, path in ((base, folder), (changed, other)):
        model, losses = LlamaForCausalLM.from_pretrained(path), []
        for prompt, answer in samples:
            with torch.no_grad():
                said = (
                    model(torch.tensor([prompt + answer]))
                    .logits[0, len(prompt) - 1 : -1]
                    .log_softmax(-1)
                )
            losses += (-said[torch.arange(len(answer)), torch.tensor(answer)]).tolist()
        assert (
            row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
            and row["held out"] == 6
        )
        assert row["gsm8k"][1] == 2 and f"{row['loss']:.4f}" in table
        assert len((output / f"{row['name']}-gsm8k.jsonl").read_text().splitlines()) == 2
    assert base["loss"] != changed["loss"]


def test_several_processes_are_refused(folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(command(folder, data, tmp_path / "out")) == 1
    assert "msn train is one process" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_wrong_data_is_one_line(folder, tmp_path, capsys, monkeypatch):
    def unreachable(name, split):
        raise ConnectionError(f"couldn't reach {name}")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"prompt": "a", "response": "b"}) for _ in range(3)))
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text("\n".join(json.dumps({"prompt": f"a{i}"}) for i in range(20)))
    for path, message in (
        (few, "--data has 3 conversations; expected 5 or more"),
        (unanswered, "--data has no answers to learn"),
        (tmp_path / "none.jsonl", f"--data {tmp_path / 'none.jsonl'}: No such file"),
        ("someone/conversations", "couldn't reach someone/conversations"),
    ):
        assert cli.main(command(folder, str(path), tmp_path / "out")) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "None" not in error
    assert not (tmp_path / "out").exists(), "the corrected command is not refused"


def test_a_killed_run_goes_on_as_if_it_had_not_been(folder, data, tmp_path):
    """Kill -9 behind a checkpoint: the same losses from there on as in a run without a break."""
    options = ["--max-steps", "120", "--save-steps", "15"]

    def start(output):
        run = [sys.executable, "-m", "msn_ext.cli", *command(folder, data, output, *options)]
        return subprocess.Popen(
            run,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def finish(output):
        process = start(output)
        assert process.wait(timeout=300) == 0, process.stderr.read().decode()[-2000:]
        return {
            log["step"]: log
            for log in json.loads((output / "figures.json").read_text())["log"]
            if "loss" in log
        }

    broken = tmp_path / "broken"
    process = start(broken)
    until = time.time() + 200
    while (
        not (broken / "checkpoint-15" / "trainer_state.json").exists()
        and process.poll() is None
        and time.time() < until
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "adapter_model.safetensors").exists(), "it was killed too late"
    cut_off = broken / "checkpoint-9999"  # killed while it was being written
    shutil.copytree(broken / "checkpoint-15", cut_off)
    state = (cut_off / "trainer_state.json").read_text()
    (cut_off / "trainer_state.json").write_text(state[: len(state) // 2])
    found, expected = finish(broken), finish(tmp_path / "whole")
    assert list(found) == list(expected) == list(range(5, 125, 5))
    for step, log in expected.items():
        for name in ("loss", "clean_loss", "noise_loss", "noise_accuracy"):
            # In the log that goes from the last checkpoint on, means since it cover fewer steps.
            if step % 15 != 0 or name == "loss":
                assert found[step][name] == pytest.approx(log[name], abs=1e-6), (step, name)

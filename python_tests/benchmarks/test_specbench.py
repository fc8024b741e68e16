"""benchmarks/specbench.py: replays, continues a file, sums up."""

import json

import pytest
import torch

from helpers import BENCHMARKS
from helpers.families import VOCAB, tiny_model
from msn_ext import generate
from msn_ext.decoding.drafters import sources


@pytest.fixture
def specbench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import specbench

    return specbench


@pytest.mark.parametrize("end", [None, 3])
def test_replay_gives_what_decoding_gives(specbench, end, monkeypatch):
    """In float64 every drafter's accept lengths are those of real decoding, pass by pass."""
    # Their tables have different sizes, and in small ones other n-grams have the same place.
    made = sources.Suffix.__init__

    def large(suffix, batch, room, device):
        made(suffix, batch, 1 << 17, device)
        suffix.room = room

    monkeypatch.setattr(sources.Suffix, "__init__", large)
    model = tiny_model("llama", 3)
    scratch = torch.full((256, VOCAB), -torch.inf)
    gains = []
    for seed in range(3):
        ids = torch.randint(3, VOCAB, (1, 5 + seed), generator=torch.Generator().manual_seed(seed))
        settings = dict(
            do_sample=False,
            max_new_tokens=50,
            eos_token_id=end,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        text = model.generate(ids, **settings).sequences[0].tolist()
        with torch.no_grad():
            drafters = {name: specbench.make_drafter(name) for name in specbench.DRAFTS}
            replayed = specbench.replay_all(drafters, model, text, ids.shape[1], scratch)
        assert list(replayed) == list(specbench.DRAFTS) and bool((scratch == -torch.inf).all())
        for name, accept_lengths in replayed.items():
            out = generate(model, ids, draft=specbench.make_drafter(name), **settings)
            assert accept_lengths == out.accept_lengths[0].tolist(), name
            gains.append(max(accept_lengths))
    assert end is not None or max(gains) > 4


def test_specbench_goes_on_where_a_file_ends_and_sums_up(specbench, tmp_path, monkeypatch, capsys):
    class Letters:
        def apply_chat_template(self, messages, **options):
            text = "".join(message["content"] for message in messages)[-40:]
            ids = torch.tensor([[3 + ord(letter) % 20 for letter in text]])
            return type("Inputs", (dict,), {"to": lambda self, device: self})(input_ids=ids)

        def decode(self, tokens, **options):
            return "".join(chr(97 + token) for token in tokens)

    data, output = tmp_path / "questions.jsonl", tmp_path / "results.jsonl"
    rows = [
        {"question_id": i, "category": c, "turns": ["abcabc"[i % 3 :]] * t}
        for i, (c, t) in enumerate(zip("wwqwq", (2, 1, 1, 2, 1)))
    ]
    for row in rows:
        row["category"] = {"w": "writing", "q": "qa"}[row["category"]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        specbench, "load_model", lambda options: (tiny_model("llama", 3), Letters())
    )
    options = [
        "--data",
        str(data),
        "--output",
        str(output),
        "--drafts",
        "paper,auto@8",
        "--new-tokens",
        "20",
    ]
    assert specbench.main([*options, "--prompts", "2", "--check", "1"]) == 0
    first = output.read_text().splitlines()
    with output.open("a") as file:
        file.write('{"question": 4, "tok')  # killed here
    assert specbench.main(options) == 0
    lines = output.read_text().splitlines()
    assert lines[: len(first)] == first and len(lines) == 1 + sum(len(row["turns"]) for row in rows)
    seen = [(row["category"], row["question"], row["turn"]) for row in map(json.loads, lines[1:])]
    assert seen == [
        ("mt_bench", 0, 0),
        ("mt_bench", 0, 1),
        ("qa", 2, 0),
        ("mt_bench", 1, 0),
        ("qa", 4, 0),
        ("mt_bench", 3, 0),
        ("mt_bench", 3, 1),
    ]
    capsys.readouterr()
    assert specbench.main(["--summary", str(output)]) == 0
    table = capsys.readouterr().out
    tokens = sum(len(json.loads(line)["tokens"]) for line in lines[1:])
    passes = sum(len(json.loads(line)["accept_lengths"]["auto@8"]) for line in lines[1:])
    assert f"{tokens / passes:.2f}" in next(
        line for line in table.splitlines() if line.startswith("auto@8")
    )
    assert "check on 1 turns: auto@8" in table
    other = tmp_path / "other.jsonl"
    assert (
        specbench.main(
            [*options[:2], "--output", str(other), "--drafts", "auto@8", "--new-tokens", "20"]
        )
        == 0
    )
    capsys.readouterr()
    assert specbench.main(["--summary", str(output), str(other)]) == 0
    table = capsys.readouterr().out
    assert (
        f"{2 * len(lines[1:])} turns" in table and "auto@8" in table and "\npaper" not in table
    ), "what both files have"
    with pytest.raises(SystemExit):
        specbench.main(["--summary", str(tmp_path / "none.jsonl")])
    assert "none.jsonl holds no results" in capsys.readouterr().err


def test_what_the_model_says_after_rejected_guesses_can_be_forgotten(specbench):
    """The same steps by both: what one knows of accepted tokens the other knows, too, and more."""
    model = tiny_model("llama", 3)
    ids = torch.randint(3, VOCAB, (1, 7), generator=torch.Generator().manual_seed(1))
    tables = {}
    for name in ("auto@8", "auto@8-rejected"):
        drafter = specbench.make_drafter(name)
        out = generate(model, ids, draft=drafter, do_sample=False, max_new_tokens=40)
        tables[name] = drafter.adjacency.adjacency
    known = {name: int((table[..., 0] != 0).sum()) for name, table in tables.items()}
    # Every token but the last was verified once: a context of one, two and three tokens each.
    text = out[0].tolist()
    contexts = {tuple(text[end - n : end]) for n in (1, 2, 3) for end in range(7, len(text))}
    assert known["auto@8-rejected"] == len(contexts) < known["auto@8"]

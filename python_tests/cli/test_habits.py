"""`msn habits`."""

import json

import pytest

from helpers.commands import KEYS, generate_json
from msn_ext import Habits, cli, profile


@pytest.fixture
def prompts(tmp_path):
    plain, rows = tmp_path / "plain.txt", tmp_path / "rows.jsonl"
    plain.write_text("hello\nabcabcabc\n")
    rows.write_text('{"prompt": "one two one two"}\n{"turns": ["first", "second"]}\n')
    return [str(plain), str(rows)]


def test_habits_are_counted_kept_and_drafted_from(tiny, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MSN_CACHE", str(tmp_path / "cache"))
    asked = ["--model", tiny, "--max-new-tokens", "40"]
    options = [*asked, "--prompt", "hello"]
    plain = generate_json(capsys, *options)
    output = tmp_path / "own.safetensors"
    assert cli.main(["habits", *prompts, *asked, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert f"kept in {output}" in out and " of 3 answers" in out and " of 1 others" in out
    by_file = generate_json(capsys, *options, "--habits", str(output))
    assert set(by_file) == KEYS and by_file["text"] == plain["text"]

    assert cli.main(["habits", *prompts, *asked, "--samples", "3", "--batch-size", "2"]) == 0
    place = capsys.readouterr().out.splitlines()[-1].removeprefix("kept in ")
    assert place.startswith(str(tmp_path / "cache")) and len(Habits.load(place))
    seen = []
    monkeypatch.setattr(
        profile, "BestFirst", lambda **given: (seen.append(given), profile_best_first(**given))[1]
    )
    again = generate_json(capsys, *options)
    assert again["text"] == plain["text"] and len(seen[-1]["habits"]) == len(Habits.load(place))


profile_best_first = profile.BestFirst


def test_habits_of_another_vocabulary_are_refused(tiny, tmp_path, capsys):
    import torch

    contexts, guesses = torch.zeros(3, 3).int(), torch.zeros(3, 8).int()
    Habits.count(contexts, guesses, 258).save(tmp_path / "x")
    ask = ["generate", "--model", tiny, "--prompt", "hello", "--habits", str(tmp_path / "x")]
    assert cli.main(ask) == 1
    assert "habits are of a vocabulary of 258 tokens, the model has 257" in capsys.readouterr().err


def test_damaged_habits_in_the_cache_are_passed_over(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MSN_CACHE", str(tmp_path))
    monkeypatch.setattr(profile, "habits_path", lambda model: tmp_path / "damaged")
    (tmp_path / "damaged").write_text("nothing")
    with pytest.warns(UserWarning, match="goes on without habits: .*damaged holds no habits"):
        generate_json(capsys, "--model", tiny, "--prompt", "hello", "--max-new-tokens", "4")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "alone"}], "1 of 1 prompts leave room for 40 tokens more"),
        ([{"question": "why?"}], "neither a prompt nor turns"),
    ],
)
def test_prompts_that_give_no_habits(rows, message, tiny, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    command = ["habits", str(file), "--model", tiny, "--max-new-tokens", "40"]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error

"""`msn tune`."""

import pytest
import torch

from msn_ext import cli


def test_tune_measures_and_keeps(tiny, tmp_path, monkeypatch, capsys):
    from msn_ext.profile import Profile

    monkeypatch.setenv("MSN_CACHE", str(tmp_path / "cache"))
    plain, rows = tmp_path / "plain.txt", tmp_path / "rows.jsonl"
    plain.write_text("abcabcabc\n\nsing a song\n")
    rows.write_text('{"prompt": "one two one two"}\n{"turns": ["first", "second"]}\n')
    assert cli.main(["tune", "--model", tiny]) == 0
    out = capsys.readouterr().out.splitlines()
    path = out[-1].removeprefix("kept in ")
    assert out[1].split() == ["1", *out[1].split()[1:2], "1.00x"] and out[-2].split()[0] == "256"
    measured = Profile.load(tmp_path / path)
    assert next(iter(measured.times)) == 1 and measured.factors is None
    assert (
        cli.main(["tune", "--model", tiny, "--prompts", str(plain), str(rows), "--samples", "3"])
        == 0
    )
    assert "factors from 3 prompts" in capsys.readouterr().out
    learned = Profile.load(tmp_path / path)
    assert learned.factors is not None and learned.about["factors"]["prompts"] == 3
    assert cli.main(["tune", "--model", tiny]) == 0  # times anew, the factors stay
    assert torch.equal(Profile.load(tmp_path / path).factors, learned.factors)


@pytest.mark.parametrize(
    "content, part",
    [
        (None, "No such file"),
        ("", "holds no prompts"),
        ('{"question": "why?"}', "neither a prompt nor turns that are text, but question"),
        ("{", "line 1 is no JSON"),
        ('{"turns": "abc"}', "but turns"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_read(content, part, tiny, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["tune", "--model", tiny, "--prompts", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and part in error and "prompts.jsonl" in error

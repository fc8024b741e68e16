"""`msn corpus`."""

import gzip
import os

import pytest

from helpers.commands import KEYS, generate_json
from msn_ext import Corpus, cli


def test_a_corpus_is_built_and_drafted_from(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MSN_CACHE", str(tmp_path))
    options = ["--model", tiny, "--max-new-tokens", "60", "--raw", "--prompt", "hello"]
    plain = generate_json(capsys, *options)
    # The weights are random, so an answer is hardly UTF-8: tokens that stand for no text are left
    # out of its file.
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl.gz"
    text.write_text("hello" + plain["text"], encoding="utf-8")
    with gzip.open(rows, "wt", encoding="utf-8") as file:
        file.write('{"text": "abc"}\n{"prompt": "hello", "response": "hello"}\n')
    for files, documents in ([text], 1), ([rows, text], 4):
        output = tmp_path / "x.corpus"
        assert cli.main(["corpus", *map(str, files), "--model", tiny, "--output", str(output)]) == 0
        words = capsys.readouterr().out.split()
        corpus = Corpus.load(output)
        assert (
            words[0] == str(len(corpus.tokens))
            and words[2] == f"{output.stat().st_size:,}"
            and words[-1] == str(output)
        )
        assert corpus.vocabulary == 257 and int((corpus.tokens < 0).sum()) == documents - 1
    result = generate_json(capsys, *options, "--corpus", str(output))
    assert set(result) == KEYS and result["text"] == plain["text"] and result["draft"] == "auto"

    Corpus.build([[1]], 258, progress=False).save(output)
    assert cli.main(["generate", *options, "--corpus", str(output)]) == 1
    assert "corpus is of a vocabulary of 258 tokens, the model has 257" in capsys.readouterr().err


def test_a_corpus_drafts_by_the_profile(tiny, tmp_path, capsys, monkeypatch):
    from msn_ext import profile

    seen, auto = [], profile.auto
    monkeypatch.setattr(
        profile, "auto", lambda *arguments: (seen.append(auto(*arguments)), seen[-1])[1]
    )
    Corpus.build([[1, 2]], 257, progress=False).save(tmp_path / "x.corpus")
    generate_json(
        capsys,
        "--model",
        tiny,
        "--prompt",
        "hello",
        "--max-new-tokens",
        "4",
        "--corpus",
        str(tmp_path / "x.corpus"),
    )
    (drafter,) = seen
    assert drafter.budget is None and drafter.corpus.tokens.tolist() == [1, 2]


@pytest.mark.parametrize(
    "content, part",
    [
        ("", "documents hold no token"),
        ("{", "line 1 is no JSON"),
        ('\n{"text": "a"}\n[1]\n', "line 3 is no object, but [1]"),
        (
            '{"question": "why?"}',
            "line 1 has neither text nor prompt or response that are text, but question",
        ),
        ('{"text": 5, "prompt": "a"}', "line 1 has neither text"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_documents_that_cannot_be_read(content, part, tiny, tmp_path, capsys):
    file, output = tmp_path / "rows.jsonl", tmp_path / "x.corpus"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["corpus", str(file), "--model", tiny, "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and part in error and ("rows.jsonl" in error or not content)
    assert not output.exists()


def test_output_through_a_link_and_into_no_fifo(tiny, tmp_path, capsys):
    text, output, target = tmp_path / "text.txt", tmp_path / "x.corpus", tmp_path / "target"
    text.write_text("hello")
    output.symlink_to(target.name)
    command = ["corpus", str(text), "--model", tiny, "--output", str(output)]
    assert cli.main(command) == 0
    assert output.is_symlink() and len(Corpus.load(target).tokens) == 5
    output.unlink()
    os.mkfifo(output)
    capsys.readouterr()
    assert cli.main(command) == 2
    assert capsys.readouterr().err == (
        f"msn: --output {output}: expected a file in a folder that exists; this is a FIFO\n"
    )
    assert output.is_fifo()

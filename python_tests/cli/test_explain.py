"""`msn explain`."""

import io
import json
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.conversations import repeating_llama
from helpers.drawings import boxes, drawn
from msn_ext import cli
from msn_ext.explain import record


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A random Llama over bytes that soon repeats itself."""
    folder = tmp_path_factory.mktemp("tiny")
    repeating_llama(context=96).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({character: i for i, character in enumerate([*alphabet, "<eos>"])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def test_command(tiny, tmp_path, capsys, monkeypatch):
    options = ["explain", "--model", tiny, "--nodes", "12", "--max-new-tokens", "24"]
    assert cli.main([*options, "--prompt", "grün <&>"]) == 0
    best = capsys.readouterr().out
    lines, _ = drawn(best)
    assert "\033" not in best and 1 < len(lines) <= 13
    chosen, passes = map(int, re.search(r"pass (\d+) of (\d+) after", best).groups())
    prompt = torch.tensor([PreTrainedTokenizerFast.from_pretrained(tiny)("grün <&>").input_ids])
    kept = [step.kept for step in record(LlamaForCausalLM.from_pretrained(tiny), prompt, 12, 24)]
    assert len(kept) == passes and kept.index(max(kept)) + 1 == chosen
    for number in {1, passes, chosen}:
        file, page = tmp_path / f"{number}.svg", tmp_path / f"{number}.html"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("grün <&>\n".encode())))
        here = ["--pass", str(number), "--svg", str(file), "--html", str(page)]
        assert cli.main([*options, "--prompt", "-", *here]) == 0
        out = capsys.readouterr().out
        assert f"pass {number} of {passes} " in out
        assert len(boxes(file.read_text(encoding="utf-8"))) == len(drawn(out)[0])
        assert (out == best) == (number == chosen)
        html = page.read_text(encoding="utf-8")
        assert '<h1 dir="auto">grün &lt;&amp;&gt;</h1>' in html
        data = json.loads(re.search(r'id="answer">(.*?)</script>', html)[1])
        assert (data["first"], data["least"], len(data["passes"])) == (number, 0, passes)

    page = tmp_path / "page.html"
    least = ["--min-probability", "0.9", "--html", str(page)]
    assert cli.main([*options, "--prompt", "grün <&>", *least]) == 0
    assert "below 90% left out" in capsys.readouterr().out
    assert '"first":1,"least":0.9}' in page.read_text(encoding="utf-8")
    assert cli.main([*options, "--prompt", "grün <&>", "--pass", str(passes + 1)]) == 1
    err = capsys.readouterr().err
    assert err == f"msn: --pass {passes + 1}: after the prompt's pass there were only {passes}\n"


def test_colour_on_a_terminal_unless_told_not_to(tiny, capsys, monkeypatch):
    for no_color, expected in [("", True), ("1", False)]:
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert (
            cli.main(["explain", "--model", tiny, "--prompt", "hello", "--max-new-tokens", "4"])
            == 0
        )
        assert ("\033[" in capsys.readouterr().out) == expected


ASK = ["explain", "--prompt", "hello"]
SHORT = [*ASK, "--model", "{tiny}", "--max-new-tokens"]
WRONG = [
    (["explain"], 2, "--prompt"),
    (["explain", "--prompt", " "], 2, "prompt is empty"),
    ([*ASK, "--pass", "0"], 2, "argument --pass: '0' is not a whole number of at least 1"),
    ([*ASK, "--nodes", "0"], 2, "argument --nodes: '0' is not a whole number of 1 to 256"),
    ([*ASK, "--nodes", "257"], 2, "argument --nodes: '257' is not a whole number of 1 to 256"),
    (
        [*ASK, "--min-probability", "1.5"],
        2,
        "argument --min-probability: '1.5' is not a number of 0 to 1",
    ),
    ([*ASK, "--min-probability", "nan"], 2, "argument --min-probability"),
    ([*ASK, "--max-new-tokens", "0"], 2, "argument --max-new-tokens"),
    ([*ASK, "--dtype", "int3"], 2, "int3"),
    ([*ASK, "--device", "toaster"], 2, "expected cpu, cuda or cuda:N"),
    ([*ASK, "--model", "./nowhere"], 1, "no such folder"),
    (
        [*ASK, "--svg", "/no/such/step.svg"],
        2,
        "--svg /no/such/step.svg: expected a file in a folder that exists",
    ),
    ([*ASK, "--svg", "/"], 2, "--svg /: expected a file"),
    ([*ASK, "--svg", "/dev/full"], 2, "in a folder that exists; this is a device"),
    ([*ASK, "--html", "/dev/full"], 2, "in a folder that exists; this is a device"),
    ([*ASK, "--html", "/no/such/page.html"], 2, "--html /no/such/page.html: expected a file in a"),
    ([*SHORT, "1"], 1, "try more --max-new-tokens"),
    ([*SHORT, "4", "--pass", "1000"], 1, "--pass 1000: after the prompt's pass there were only"),
]


@pytest.mark.parametrize(
    "arguments, code, part", WRONG, ids=[" ".join(case[0])[:60] for case in WRONG]
)
def test_wrong_input_is_one_clear_line(arguments, code, part, tiny, capsys):
    assert cli.main([argument.format(tiny=tiny) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("msn: ") and err.count("\n") == 1 and part in err, err

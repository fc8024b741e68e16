"""The demo's text and figures."""

import io

import pytest
import torch

from helpers.commands import TEMPLATE
from helpers.families import tiny_model
from helpers.samples import byte_tokenizer
from msn_ext.cli import demo as demo_command
from msn_ext.cli import runs


def streamed(passes: list[list[int]], tokenizer=None, **options) -> str:
    stream = io.StringIO()
    streamer = runs.PassStreamer(tokenizer or byte_tokenizer(TEMPLATE), stream, **options)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt is not shown
    for tokens in passes:
        streamer.put(torch.tensor(tokens))
    streamer.end()
    return stream.getvalue()


def tokens_of(text: str) -> list[int]:
    return byte_tokenizer(TEMPLATE)(text).input_ids


def test_streamer_marks_passes_of_several_tokens():
    passes = [tokens_of(text) for text in ("a", "bc", "d", " ef\n", "\n\n", "gh")]
    assert streamed(passes) == "abcd ef\n\n\ngh"
    assert streamed(passes, mark=True) == "a‹bc›d ‹ef›\n\n\n‹gh›"
    a, b, c = runs.PassStreamer.colors
    end = "\033[0m"
    assert streamed(passes, color=True) == f"a{a}bc{end}d{b} ef\n{end}{c}\n\n{end}{a}gh{end}"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_streamer_never_splits_a_character(size):
    text = "naïve 🙂 日本 end"
    tokens = tokens_of(text)
    passes = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    assert streamed(passes) == text
    assert streamed(passes, mark=True).replace("‹", "").replace("›", "") == text
    assert "\ufffd" not in streamed(passes, color=True)


def test_streamer_shows_a_character_that_stays_incomplete():
    tokens = tokens_of("ok é")
    assert streamed([tokens[:-1]]) == "ok \ufffd"
    assert streamed([tokens[:-1], tokens_of("z")]) == "ok \ufffdz"


def test_streamer_leaves_out_special_tokens():
    assert streamed([tokens_of("done"), [256]]) == "done"


def test_streamer_keeps_spaces_that_a_tokenizer_drops_in_front():
    class Words:
        words = (" one", " two", " three")

        def decode(self, tokens, **_):
            return "".join(self.words[token] for token in tokens).removeprefix(" ")

    assert streamed([[0], [1, 2], [0]], Words()) == "one two three one"


def test_histogram():
    assert demo_command.histogram([1] * 8 + [2] * 4 + [4], width=8).splitlines() == [
        "   1  ████████ 8",
        "   2  ████ 4",
        "   3  0",
        "   4  █ 1",
    ]
    assert demo_command.histogram([1] * 1000 + [2], width=8).splitlines()[1] == "   2  ▏ 1"


def test_comparison():
    tokens = tokens_of("abcdef")
    plain = runs.Run(tokens, [1] * 6, 1.0)
    tokenizer = byte_tokenizer(TEMPLATE)

    def shown(drafted: runs.Run) -> str:
        of = {"msn (paper)": drafted, "msn (none)": plain, "transformers, float32": plain}
        return demo_command.comparison(of, "paper", "cpu", tokenizer)

    text = shown(runs.Run(tokens, [1, 3, 2], 0.5, "native"))
    assert text.count("yes, all 6 tokens") == 2 and "2.00×" in text and "Slower" not in text
    assert "our own forward pass" in text
    slow = shown(runs.Run(tokens, [1, 3, 2], 2.0, "torch"))
    assert (
        "0.50×" in slow and "a pass gains 2.00 tokens, but takes as long as 4.0 plain steps" in slow
    )
    assert "the model's forward pass" in slow
    other = shown(runs.Run(tokens_of("abXdef"), [6], 0.5))
    assert "no, from token 3 of 6 on: 'X' here, 'c' there" in other


def test_transformers_gets_the_faster_dtype(monkeypatch):
    model = tiny_model("llama", 2)
    slow = "bfloat16"

    def timed_plain(model, input_ids, tokens):
        return runs.Run([1], [1], 2.0 if str(model.dtype).endswith(slow) else 1.0)

    monkeypatch.setattr(demo_command, "timed_plain", timed_plain)
    chosen, dtype = demo_command.faster(model.float(), torch.tensor([[1]]))
    assert dtype == "float32" and chosen is model
    slow = "float32"
    chosen, dtype = demo_command.faster(model, torch.tensor([[1]]))
    assert dtype == "bfloat16" and chosen.dtype == torch.bfloat16 and model.dtype == torch.float32

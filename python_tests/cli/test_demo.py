"""The demo's text and figures."""

import io

import pytest
import torch

from helpers.commands import TEMPLATE
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
    text = demo_command.comparison(
        runs.Run(tokens, [1, 3, 2], 0.5), plain, "paper", "cpu", byte_tokenizer(TEMPLATE)
    )
    assert "yes, all 6 tokens" in text and "2.00×" in text and "Slower" not in text
    slow = demo_command.comparison(
        runs.Run(tokens, [1, 3, 2], 2.0), plain, "paper", "cpu", byte_tokenizer(TEMPLATE)
    )
    assert (
        "0.50×" in slow and "a pass gains 2.00 tokens, but takes as long as 4.0 plain steps" in slow
    )
    other = demo_command.comparison(
        runs.Run(tokens_of("abXdef"), [6], 0.5), plain, "paper", "cpu", byte_tokenizer(TEMPLATE)
    )
    assert "no, from token 3 of 6 on: 'X' here, 'c' in plain decoding" in other

"""From conversations to samples: what is held out, and how much of an answer is learned."""

import pytest

from helpers.conversations import WORDS
from msn_ext.recipe.samples import before_repetition, split


@pytest.mark.parametrize("period", [1, 2, 5, 30])
def test_answers_are_learned_until_they_repeat_themselves(period):
    fresh, round_again = list(range(100, 150)), list(range(period)) * 40
    # The first round is learned, and two tokens of the next, which could still go elsewhere.
    assert before_repetition(fresh + round_again) == fresh + round_again[: period + 2]
    assert before_repetition(fresh + fresh[:17]) == fresh + fresh[:17], "a quotation"
    assert before_repetition([]) == []


def test_no_question_is_learned_and_held_out():
    conversations = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": str(n)}]
        for n in range(3)
        for word in WORDS
    ]
    learned, held = split(conversations, 4)
    assert len(held) == 4 and learned
    assert not {messages[0]["content"] for messages in learned} & {
        messages[0]["content"] for messages in held
    }

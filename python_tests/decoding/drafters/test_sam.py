"""SAM-Decoding against its paper's rules followed step by step."""

import random

import pytest

from helpers.drafters import CPU, text
from helpers.families import VOCAB
from msn_ext.decoding import SamDecoding
from msn_ext.decoding.drafters.sam import SuffixAutomaton


@pytest.mark.parametrize("letters", [1, 2, 3, 6])
def test_the_automaton_finds_the_first_place_of_the_longest_match(letters):
    for seed in range(25):
        rng = random.Random(f"{letters} {seed}")
        automaton, tokens = SuffixAutomaton(), []
        for _ in range(rng.randrange(1, 70)):
            tokens.append(rng.randrange(letters))
            automaton.append(tokens[-1])
            size = len(tokens)
            places = (
                (n, [end for end in range(n, size) if tokens[end - n : end] == tokens[size - n :]])
                for n in range(size - 1, 0, -1)
            )
            matched, ends = next(((n, ends) for n, ends in places if ends), (0, []))
            assert automaton.matched == matched
            assert not ends or automaton.follows == ends[0]


def test_sam_copies_four_tokens_for_every_one_that_matched():
    drafter = SamDecoding()
    drafter.start(3, VOCAB, CPU)
    history, lengths = text(
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], [1, 2, 3]
    )
    draft = drafter.propose(history, lengths)
    assert draft.tokens.tolist() == [
        [1, 2, 3, 4, 5, 1, 1, 1, 1],
        [2, 3, 4, 5, 6, 7, 8, 9, 1],
        [3] * 9,
    ]
    chain = [*range(-1, 8)]
    assert draft.parents.tolist() == [chain[:5] + [-1] * 4, chain, [-1] * 9]
    history, lengths = text([*range(70), *range(30)], [7] * 3, [7])
    drafter.start(3, VOCAB, CPU)
    assert drafter.propose(history, lengths).depth.max(1).values.tolist() == [59, 1, 0]

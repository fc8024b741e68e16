"""Random calls: equal to plain decoding in float64, or refused for a reason that they have.

``MSN_FUZZ=400`` tries so many of them.
"""

import os
from collections import Counter

import pytest

from helpers.fuzz import Case

PARTS, CASES = 6, int(os.environ.get("MSN_FUZZ", 60))


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("part", range(PARTS))
def test_equal_or_refused(part):
    found = Counter(Case.drawn(seed).check() for seed in range(part, CASES, PARTS))
    print(dict(found))
    assert found["equal"] > sum(found.values()) / 3, "most are decoded"

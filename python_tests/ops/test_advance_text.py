"""advance_text against its specification."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.calls import example
from helpers.cases import (
    assert_equal,
)
from msn_ext import ops
from msn_ext.ops import reference


@st.composite
def texts_that_grow(draw):
    """Arguments of advance_text: ends inside the path, at its end and after it, rows that may gain
    little or nothing.
    """
    rows, nodes = draw(st.integers(0, 4)), draw(st.sampled_from([1, 2, 7, 33, 64, 65, 256]))
    seed = draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    accepted = torch.randint(1, nodes + 1, (rows,), generator=generator)
    path = torch.full((rows, nodes), -1)
    for b in range(rows):
        path[b, : accepted[b]] = (
            torch.randperm(nodes, generator=generator)[: accepted[b]].sort().values
        )
    lengths = torch.randint(0, 30, (rows,), generator=generator)
    vocabulary = draw(st.sampled_from([2, 5, 1000]))
    return {
        "history": torch.randint(0, 99, (rows, 30 + nodes), generator=generator),
        "lengths": lengths,
        "remaining": torch.randint(
            0, draw(st.sampled_from([1, 3, 300])), (rows,), generator=generator
        ),
        "targets": torch.randint(
            0, vocabulary + draw(st.integers(0, 1)), (rows, nodes), generator=generator
        ),
        "path": path,
        "accept_length": accepted,
        "ends": torch.randint(0, vocabulary, (draw(st.integers(0, 3)),), generator=generator),
        "vocabulary": vocabulary,
    }


@given(arguments=texts_that_grow())
def test_texts_grow_as_specified(device, arguments):
    expected = {
        name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    given_ones = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    want, got = reference.advance_text(**expected), ops.advance_text(**given_ones)
    assert_equal([x.cpu() for x in got], want)
    for name in ("history", "lengths", "remaining"):
        assert torch.equal(given_ones[name].cpu(), expected[name]), name


def test_a_text_without_room_is_refused_on_the_cpu():
    arguments = example("advance_text", "cpu")
    for name, value in (
        ("lengths", 9),
        ("lengths", -1),
        ("accept_length", 5),
        ("path", 4),
        ("path", -2),
    ):
        wrong = arguments[name].clone()
        wrong.view(-1)[0] = value
        with pytest.raises(ValueError, match=name):
            ops.advance_text(**{**example("advance_text", "cpu"), name: wrong})

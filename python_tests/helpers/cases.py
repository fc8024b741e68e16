"""Shared by the tests of the ops: trees, tensors of lists, exact comparison."""

import contextlib
import random
import threading

import torch
from hypothesis import strategies as st

from msn_ext import ops
from msn_ext.ops import reference

SIZES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256]
KINDS = ["random", "chain", "star", "deep", "padded"]
EXTREMES = [-(2**31), -2, 2**31 - 1]
CPU_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def build_tree(kind: str, nodes: int, seed: int = 0) -> list[int]:
    """A tree's parents; "padded" has padding in the middle, with dead nodes below it."""
    rng = random.Random(f"{kind} {nodes} {seed}")
    draw = {
        "random": lambda i: rng.randrange(i),
        "chain": lambda i: i - 1,
        "star": lambda i: 0,
        "deep": lambda i: rng.randrange(max(0, i - 3), i),
        "padded": lambda i: rng.randrange(-1, i) if rng.random() < 0.5 else rng.choice([-1, i - 1]),
    }[kind]
    return [-1, *(draw(i) for i in range(1, nodes))]


@st.composite
def trees(draw, rows: int = 1) -> list[list[int]]:
    """One tree a row, all of one size: small ones node by node, larger ones by kind and seed."""
    if draw(st.booleans()):
        nodes = draw(st.integers(1, 12))
        return [[-1, *(draw(st.integers(-1, i - 1)) for i in range(1, nodes))] for _ in range(rows)]
    nodes = draw(st.sampled_from(SIZES) | st.integers(1, 256))
    return [
        build_tree(draw(st.sampled_from(KINDS)), nodes, draw(st.integers(0, 999)))
        for _ in range(rows)
    ]


@st.composite
def malformed_trees(draw) -> tuple[list[int], int]:
    """Parents with one to three wrong entries, and the first of these."""
    parents = draw(trees())[0]
    wrong = draw(st.lists(st.integers(0, len(parents) - 1), min_size=1, max_size=3, unique=True))
    for i in wrong:
        values = [i, i + 1, len(parents), *EXTREMES] + ([0] if i == 0 else [])
        parents[i] = draw(st.sampled_from(values))
    return parents, min(wrong)


def tree_tensor(parents, device: str) -> torch.Tensor:
    return torch.tensor(parents, dtype=torch.int32, device=device)


def integers(values, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def padded(lists: list[list[int]], width: int) -> list[list[int]]:
    return [[*x, *[-1] * (width - len(x))] for x in lists]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def threads(count: int):
    """Within: torch and the CPU kernels compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread():
    """Thousands of tiny torch ops would wait for a second thread on a busy machine."""
    return threads(1)


def assert_equal(got, expected) -> None:
    """Same values, shape, dtype and device."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def bounded(call, seconds: float = 20):
    """Return or raise what ``call`` does; fail if it has not come back after ``seconds``."""
    outcome = []

    def work():
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"no answer after {seconds} s"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def specified(op: str, **arguments):
    """Return the specification's outputs and, where the op works in place, the changed table."""
    device = next(x.device for x in arguments.values() if isinstance(x, torch.Tensor))
    copies = {
        name: x.detach().cpu().clone() if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }
    with one_thread():
        outputs = getattr(reference, op)(**copies)
    if outputs is None:
        outputs = next(iter(copies.values()))
    return (
        outputs.to(device)
        if isinstance(outputs, torch.Tensor)
        else tuple(x.to(device) for x in outputs)
    )


LAYOUTS = ["contiguous", "slots first", "slice", "every other", "layers"]


def lay_out(x: torch.Tensor, layout: str, around: float) -> torch.Tensor:
    """The same values with other strides; the storage around them holds ``around``."""
    b, h, c, d = x.shape
    if layout == "contiguous":
        return x.contiguous()
    view = {
        "slots first": lambda: x.new_full((b, c, h, d), around).transpose(1, 2),
        "slice": lambda: x.new_full((b + 1, h + 2, c + 3, d + 5), around)[1:, 1:-1, 2:-1, 3:-2],
        "every other": lambda: x.new_full((b, h, c, 2 * d), around)[..., ::2],
        "layers": lambda: x.new_full((b, c, 3, h, d), around)[:, :, 1].transpose(1, 2),
    }[layout]()
    return view.copy_(x)


def ancestors_of(parents, device: str) -> torch.Tensor:
    return ops.tree_ancestors(tree_tensor(parents, device))[0]

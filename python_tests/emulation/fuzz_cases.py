"""Random cases of the ops, and memory in which every byte is compared in the end (see fuzz.py)."""

import ctypes
import math
import mmap
import random

import torch

from msn_ext import _C, ops

FAR = [-(2**63), -5, 2**62, 2**63 - 1]  # values that nothing reaches
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None)


def block_of(size: int) -> torch.Tensor:
    """At least a page more than ``size`` bytes, all 0xff, up to a page that cannot be accessed."""
    usable = (size + 2 * PAGE - 1) // PAGE * PAGE
    area = mmap.mmap(-1, usable + PAGE)
    block = torch.frombuffer(area, dtype=torch.uint8, count=usable).fill_(255)
    assert LIBC.mprotect(ctypes.c_void_p(block.data_ptr() + usable), ctypes.c_size_t(PAGE), 0) == 0
    return block


class Memory:
    """The tensors of a case, each inside a block of 0xff bytes, and what the blocks shall hold in
    the end.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.blocks = []

    def place(
        self, values: torch.Tensor, free: int = 0, want: torch.Tensor | None = None, unit: int = 1
    ) -> torch.Tensor:
        """A tensor that holds ``values`` and shall end as ``want`` (None: as it began).

        Its first ``free`` dimensions lie in any order in memory; where there are any, all of them
        may have gaps, those of the last one of whole ``unit`` values.
        """
        dims, rng = values.dim(), self.rng
        order = rng.sample(range(free), free) + list(range(free, dims))
        gaps = (
            [rng.choice([0, 0, 1, 3]) for _ in range(dims)]
            if free and rng.random() < 0.6
            else [0] * dims
        )
        gaps[-1] *= unit
        sizes = [values.shape[d] + gaps[d] for d in order]
        size = math.prod(sizes) * values.element_size()
        block = block_of(size)
        tensor = block[len(block) - size :].view(values.dtype).view(sizes)
        tensor = tensor.permute([order.index(d) for d in range(dims)])
        for d in range(dims):
            step = unit if d == dims - 1 else 1
            tensor = tensor.narrow(d, rng.randrange(gaps[d] // step + 1) * step, values.shape[d])
        tensor.copy_(values)
        end = block.clone()
        twin = end.view(values.dtype).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        if want is not None:
            assert want.shape == values.shape and want.dtype == values.dtype
            twin.copy_(want)
        self.blocks.append((block, end, tensor, twin))
        return tensor

    def check(self) -> None:
        for block, end, tensor, twin in self.blocks:
            if not torch.equal(block, end):
                inside = torch.equal(tensor, twin)
                wrong = (
                    "the bytes around it changed" if inside else f"holds {tensor}, expected {twin}"
                )
                raise AssertionError(f"a tensor {list(tensor.shape)} {tensor.dtype}: {wrong}")


def check_op(op: str, rng: random.Random, inputs, want) -> None:
    """The kernel gives ``want``, bit for bit, and touches nothing else."""
    memory = Memory(rng)
    inputs = [memory.place(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    outputs = [memory.place(torch.full_like(x, 77), want=x) for x in want]
    getattr(_C, op)(*inputs, *outputs)
    memory.check()


def random_tree(rng: random.Random, nodes: int) -> list[int]:
    draw = rng.choice(
        [
            lambda i: rng.randrange(i),
            lambda i: i - 1 if rng.random() < 0.97 else rng.randrange(i),
            lambda i: rng.randrange(min(i, 3)),
            lambda i: rng.randrange(max(0, i - 10), i),
            lambda i: -1 if rng.random() < 0.1 else rng.randrange(i),
        ]
    )
    return [-1, *(draw(i) for i in range(1, nodes))]


def random_parents(rng: random.Random, batch: int, nodes: int) -> torch.Tensor:
    """Well-formed, [N] or [B, N]."""
    if rng.random() < 0.3:
        return torch.tensor(random_tree(rng, nodes), dtype=torch.int32)
    return torch.tensor([random_tree(rng, nodes) for _ in range(batch)], dtype=torch.int32).view(
        batch, nodes
    )


def malformed(rng: random.Random, parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy with malformed entries, and one where these are padding; often both as they were."""
    nodes = parents.shape[-1]
    bad, good = parents.clone(), parents.clone()
    for _ in range(rng.choice([0, 1, 5]) if parents.numel() else 0):
        at = rng.randrange(parents.numel())
        node = at % nodes
        bad.view(-1)[at] = rng.choice([-7, -(2**31), 2**31 - 1, nodes, node, node + 1])
        good.view(-1)[at] = -1
    return bad, good


def spoil(rng: random.Random, lengths: torch.Tensor, near: int) -> torch.Tensor:
    """Lengths of which one may be out of range."""
    lengths = lengths.clone()
    if len(lengths) and rng.random() < 0.4:
        lengths[rng.randrange(len(lengths))] = rng.choice([*FAR, -1, 0, near, near + 1])
    return lengths


def random_history(rng: random.Random, batch: int, capacity: int) -> torch.Tensor:
    if rng.random() < 0.3:
        return torch.arange(capacity).remainder(rng.choice([1, 2, 3, 7])).repeat(batch, 1)
    return torch.randint(0, rng.choice([1, 2, 3, 100]), (batch, capacity))


def random_logits(rng: random.Random, rows: int, vocabulary: int) -> torch.Tensor:
    """Equals, NaN, infinities and numbers close to 0 among them."""
    logits = torch.randn(rows, vocabulary) * rng.choice([0.0, 0.1, 1.0, 5.0])
    if rng.random() < 0.5:
        logits = logits.round()  # equals, -0.0 among them
    for _ in range(rng.choice([0, 1, 3, 2 * vocabulary]) if rows else 0):
        special = rng.choice([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -1e-42])
        logits[rng.randrange(rows), rng.randrange(vocabulary)] = special
    if rows and rng.random() < 0.6:
        rng.choice([crowd, tie, mask])(rng, logits)
    return logits.to(rng.choice([torch.float32, torch.float16, torch.bfloat16]))


def crowd(rng: random.Random, logits: torch.Tensor) -> None:
    """Lowers an eighth of the values, so that most of the others are more than what it has."""
    pieces = torch.arange(logits.shape[1]) // rng.choice([1, 4, 8])
    logits[:, pieces % 8 == rng.randrange(8)] = rng.choice([-math.inf, -9.0])


def tie(rng: random.Random, logits: torch.Tensor) -> None:
    """Puts the largest value to both sides of where rows may be cut, and to other places."""
    cuts = torch.arange(0, logits.shape[1], rng.choice([32, 64, 640]))
    cuts = cuts[torch.rand(len(cuts)) < rng.choice([0.1, 0.5, 1.0])]
    places = torch.cat([cuts, cuts - 1, torch.randint(0, logits.shape[1], (rng.randrange(3),))])
    logits[:, places.clamp(min=0)] = rng.choice([9.0, math.inf, math.nan])


def mask(rng: random.Random, logits: torch.Tensor) -> None:
    """Leaves a few values of every row, or none."""
    logits[torch.rand(logits.shape) > rng.choice([0, 4, 40]) / logits.shape[1]] = -math.inf


def random_tokens(rng: random.Random, *shape: int) -> torch.Tensor:
    """Of a vocabulary so small that contexts meet again; at times any that a guess can hold."""
    return torch.randint(0, rng.choice([1, 2, 3, 5, 40, 1 << 27]), shape)


def random_guesses(rng: random.Random, *shape: int) -> torch.Tensor:
    guesses = random_tokens(rng, *shape, ops.GUESSES) * 16
    guesses = (guesses + torch.randint(0, ops.LEVELS, guesses.shape)).int()
    none = torch.rand(guesses.shape) < rng.choice([0.0, 0.0, 0.3, 0.9])
    return guesses.masked_fill(none, rng.choice([-1, -(2**31)]))

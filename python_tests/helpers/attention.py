"""Calls of tree_attention, held against its specification and the oracle."""

import dataclasses

import torch

from helpers import oracle
from helpers.cases import ancestors_of, integers, lay_out, one_thread, seeded
from msn_ext import ops
from msn_ext.ops import reference


@dataclasses.dataclass
class Attention:
    """A tree_attention call. Slots that no node may see hold ``poison``; queries are ``sharp``
    times as large as keys, so that few keys have most of the weight.
    """

    parents: list[list[int]]
    lengths: list[int]
    offsets: list[int] | None = None
    dtype: torch.dtype = torch.float32
    kv_heads: int = 1
    group: int = 2
    dim: int = 16
    v_dim: int = 16
    scale: float | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    slack: int = 3
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    poison: float = float("nan")
    sharp: float = 1.0
    seed: int = 0

    @property
    def nodes(self) -> int:
        return len(self.parents[0])

    def offset(self, b: int) -> int:
        return self.offsets[b] if self.offsets else 0

    def allowed(self, b: int, node: int) -> list[int]:
        return oracle.allowed_slots(
            self.parents[b], node, self.lengths[b], self.offset(b), self.window
        )

    def arguments(self, device: str) -> dict:
        """The op's arguments; ``ancestors`` is shared where all rows have the same tree."""
        random_source = seeded(self.seed)
        poison = torch.tensor(self.poison).to(self.dtype).item()
        batch, slots = len(self.parents), max(self.lengths) + self.nodes + self.slack
        heads = self.kv_heads * self.group

        def normal(*shape):
            return torch.randn(*shape, generator=random_source, dtype=torch.float64).to(
                device, self.dtype
            )

        q = normal(batch, heads, self.nodes, self.dim) * self.sharp
        k, v = (
            normal(batch, self.kv_heads, slots, self.dim),
            normal(batch, self.kv_heads, slots, self.v_dim),
        )
        sinks = normal(heads) if self.sinks else None
        for b in range(batch):
            unseen = set(range(slots)).difference(*(self.allowed(b, i) for i in range(self.nodes)))
            k[b, :, list(unseen)] = poison
            v[b, :, list(unseen)] = poison
        q, k, v = (lay_out(x, layout, poison) for x, layout in zip((q, k, v), self.layouts))
        shared = all(row == self.parents[0] for row in self.parents)
        return {
            "q": q,
            "k_cache": k,
            "v_cache": v,
            "lengths": integers(self.lengths, device),
            "ancestors": ancestors_of(self.parents[0] if shared else self.parents, device),
            "offsets": integers(self.offsets, device) if self.offsets else None,
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": sinks,
        }

    def tolerance(self, device: str) -> dict:
        """Float sums in another order, and one rounding to the dtype (on CUDA two)."""
        if self.dtype == torch.float64:
            return {"rtol": 1e-11, "atol": 1e-11}
        rounding = 0.0 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps
        return {"rtol": 1e-5 + rounding, "atol": 3e-5 + (rounding if device == "cuda" else 0.0)}

    def check(self, device: str) -> None:
        arguments = self.arguments(device)
        out = ops.tree_attention(**arguments)
        heads = self.kv_heads * self.group
        assert (
            out.shape == (len(self.parents), self.nodes, heads, self.v_dim) and out.is_contiguous()
        )
        assert out.dtype == self.dtype and out.device == arguments["q"].device
        with one_thread():
            exact = oracle.attention(
                parents=self.parents, **{k: x for k, x in arguments.items() if k != "ancestors"}
            )
            specified = reference.tree_attention(**arguments)
        for expected in (exact, specified.cpu().double()):
            torch.testing.assert_close(out.cpu().double(), expected, **self.tolerance(device))

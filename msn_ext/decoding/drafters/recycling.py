"""Token Recycling (Luo et al., ACL 2025, arXiv 2408.08696): the model's last guesses after every
token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .protocol import Draft, Verified
from .tree import DraftTree

# The paper's tree (figure 5; the authors' released data): 80 nodes below the root, a path being the
# rank of each node from the root down.
_PATHS = (
    "0 1 2 3 4 5 6 7 00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70 000 "
    "001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 "
    "300 400 500 0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 "
    "3000 00000 00001 00002 00010 00020 00100 01000 10000 000000 000001 000100"
).split()
SUCCESSORS = 8


class TokenRecycling:
    """Drafts from a matrix that holds, for every token, the 8 tokens the model last put after it.

    The tree has a fixed shape and is filled from the root down: the child of rank k takes the k-th
    entry of its parent's row. Every node of a checked tree, accepted or not, then overwrites the
    row of its token. As in the paper, an empty row is zeros: its token 0 is checked like any other
    guess. Of nodes with the same token the last one counts; of batch rows, the last.

    Args:
        budget: nodes to keep of the paper's 81, root included, shallow ones first.

    The matrix (int64 [vocabulary, 8]) is kept from one ``generate`` to the next while the same
    object is passed (the paper's hot start); ``draft="recycling"`` begins with an empty one.
    """

    def __init__(self, budget: int = 81):
        if not 1 <= budget <= len(_PATHS) + 1:
            raise ValueError(f"budget is {budget}; expected 1 to {len(_PATHS) + 1} nodes")
        self._tree = DraftTree.from_paths([tuple(map(int, path)) for path in _PATHS[: budget - 1]])
        self.max_depth = self._tree.max_depth
        self._matrix = torch.empty(0, 0, dtype=torch.int64, device="cpu")

    def start(self, batch: int, vocabulary: int, device: torch.device) -> None:
        width = min(SUCCESSORS, vocabulary)
        if self._matrix.shape != (vocabulary, width) or self._matrix.device != device:
            self._matrix = torch.zeros(vocabulary, width, dtype=torch.int64, device=device)
        self._shape = self._tree.tensors(device)
        # Per depth: the nodes there, their parents, their ranks.
        depths, parents, ranks = (
            torch.tensor(x, device="cpu")
            for x in (self._tree.depths, self._tree.parents, self._tree.ranks)
        )
        ranks = ranks.clamp(max=width - 1)
        layers = ((depths == depth).nonzero()[:, 0] for depth in range(1, self.max_depth + 1))
        self._layers = [
            tuple(x.to(device) for x in (nodes, parents[nodes], ranks[nodes])) for nodes in layers
        ]

    def first(self, history: Tensor, lengths: Tensor) -> Tensor:
        return history.new_empty(history.shape[0], 0)

    def propose(self, history: Tensor, lengths: Tensor) -> Draft:
        tokens = history.new_empty(history.shape[0], len(self._tree))
        tokens[:, :1] = history.gather(1, lengths[:, None] - 1)
        for nodes, parents, ranks in self._layers:
            tokens[:, nodes] = self._matrix[tokens[:, parents], ranks]
        return Draft.shaped(tokens, self._shape)

    def observe(self, verified: Verified) -> None:
        tokens = verified.draft.tokens.flatten()
        rows = verified.logits.topk(self._matrix.shape[1], dim=-1).indices.flatten(0, 1)
        # An indexed write leaves open which duplicate wins: make every duplicate write the last
        # one's row.
        order = torch.arange(len(tokens), device=tokens.device)
        last = torch.zeros(self._matrix.shape[0], dtype=torch.int64, device=tokens.device)
        last.scatter_reduce_(0, tokens, order, "amax")
        self._matrix[tokens] = rows[last[tokens]]

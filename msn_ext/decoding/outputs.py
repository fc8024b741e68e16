"""``output_scores`` and ``output_logits``: what every new token was taken from."""

from __future__ import annotations

from torch import Tensor

Outputs = dict[str, Tensor]
""""logits" as the model gives them and "scores" as the processors leave them, one of these or both:
float32 [B, n, V].
"""


class TokenOutputs:
    """Gathers outputs, for each new token a tensor [B, V]: rows come at their own pace."""

    def __init__(self) -> None:
        self._tokens: dict[str, list[Tensor]] = {}

    def add(self, outputs: Outputs, first: list[int], begin: list[int], end: list[int]) -> None:
        """Add the outputs of new tokens ``begin[b]`` to ``end[b]`` of each row, which are those
        after the first ``begin[b] - first[b]`` of what is there.
        """
        for name, of in outputs.items():
            tokens = self._tokens.setdefault(name, [])
            tokens += (of.new_zeros(len(of), of.shape[2]) for _ in range(max(end) - len(tokens)))
            for b, row in enumerate(of):
                for at in range(begin[b], end[b]):
                    tokens[at][b] = row[at - first[b]]

    def of(self, name: str, new_tokens: int) -> tuple[Tensor, ...] | None:
        """Return what was added as "logits" or "scores", by new token; None: nothing was."""
        return tuple(self._tokens[name][:new_tokens]) if name in self._tokens else None

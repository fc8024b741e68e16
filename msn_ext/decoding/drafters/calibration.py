"""Fitting the factors of best-first drafting to what a model says on given prompts.

How likely a listed token is depends on which sources list it and how sure they were
(:func:`msn_ext.ops.draft_tree`): a multinomial logit whose weights are the factors' logarithms,
with "none of these" as one more outcome of score 1. It is fitted to the nodes of accepted paths,
where the model's own next token is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msn_ext.ops import SUFFIXES, reference

from .best_first import BestFirst
from .protocol import ObservedDrafter, Verified

PULL = 0.3
"""Nodes' worth of evidence, per factor and unit of its squared logarithm, that holds it at the
prior.
"""

Record = tuple[int, list[tuple[int, int]], int]
"""Of a node on an accepted path: the place of its bias, the (token, place of its factor) of every
entry that was listed, and the model's own next token.
"""


class FactorRecorder(ObservedDrafter):
    """Keeps records of what best-first drafting knew and what came (on the host, slowly).

    Args:
        records: grows.
        drafter: with the source "suffix".
    """

    def __init__(self, records: list[Record], drafter: BestFirst):
        super().__init__(drafter)
        self._records, self._best_first = records, drafter

    def observe(self, verified: Verified) -> None:
        if self._best_first.suffix is not None:  # not in the prompt's pass
            self._record(verified, self._best_first.suffix.suffixes.cpu())
        super().observe(verified)

    def _record(self, verified: Verified, suffixes: Tensor) -> None:
        draft, drafter = verified.draft, self._best_first
        adjacency = drafter.adjacency.adjacency.cpu()
        corpus, corpus_suffixes = drafter.corpus_tables(torch.device("cpu"))
        habits = drafter.habit_table(torch.device("cpu"))
        for b, (tokens, path) in enumerate(zip(draft.tokens.tolist(), verified.path.tolist())):
            text = verified.history[b, : int(verified.lengths[b])].tolist()
            denoised = drafter.denoised.guesses[b].tolist()
            chain = []
            for node in path[: int(verified.accept_length[b])]:
                chain.append(node)
                context = reference.context_of(text, tokens, chain, SUFFIXES[-1])
                bias, listed = reference.listed_after(
                    context,
                    len(chain) - 1,
                    denoised,
                    adjacency,
                    habits,
                    suffixes[b],
                    corpus.numpy(),
                    corpus_suffixes,
                    text,
                )
                entries = [(token, factor) for token, factor, _ in listed]
                self._records.append((bias, entries, int(verified.targets[b, node])))


def fit(records: list[Record], prior: Tensor, rounds: int = 60) -> tuple[Tensor, float, float]:
    """Return the factors under which what came was likeliest, held at ``prior`` where there is
    little evidence.

    Args:
        records: of a few thousand nodes or more.
        prior: float64 [348].
        rounds: of L-BFGS.

    Returns:
        float64 [348]; the mean log-likelihood of a node under the prior and under the result.
    """
    candidates: list[tuple[int, list[int]]] = []  # (node, places of its bias and factors)
    came = []  # per node the candidate that came, -1: none of them
    for node, (bias, entries, truth) in enumerate(records):
        listed: dict[int, list[int]] = {}
        for token, factor in entries:
            listed.setdefault(token, [bias]).append(factor)
        came.append(len(candidates) + list(listed).index(truth) if truth in listed else -1)
        candidates += [(node, places) for places in listed.values()]
    owner = torch.tensor([node for node, _ in candidates], device="cpu")
    sizes = torch.tensor([len(places) for _, places in candidates], device="cpu")
    places = torch.tensor([place for _, listed in candidates for place in listed], device="cpu")
    candidate = torch.arange(len(candidates), device="cpu").repeat_interleave(sizes)
    truths = torch.tensor(came, device="cpu")
    hit = truths >= 0

    def likelihood(logs: Tensor) -> Tensor:
        scores = logs.new_zeros(len(candidates)).index_add(0, candidate, logs[places])
        total = logs.new_ones(len(truths)).index_add(0, owner, scores.exp())
        return (scores[truths.clamp(min=0)] * hit).sum() - total.log().sum()

    start = prior.double().log()
    logs = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logs], max_iter=rounds, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (PULL * (logs - start).square().sum() - likelihood(logs)) / len(truths)
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        before, after = (float(likelihood(x)) / len(truths) for x in (start, logs))
    return logs.detach().exp().clamp(1e-6, 1e6), before, after

"""The ops on tails, specified."""

import torch

from .drafting import keep_continuation
from .tree import tree_ancestors


def append_tails(tokens, parents, probability, history, lengths, nodes, tails, length, noise):
    batch = len(tokens)
    ends = torch.full((batch, tails), -1)
    hidden = torch.full((batch, nodes + tails * length), -1, dtype=torch.int32)
    hidden[:, :nodes] = parents[:, :nodes]
    above, drafted = hidden.clone(), torch.full(hidden.shape, noise)
    drafted[:, :nodes] = tokens[:, :nodes]
    for b, size in enumerate(lengths.tolist()):
        found = _likely_ends(parents[b, :nodes].tolist(), probability[b, :nodes].tolist())
        for tail, end in enumerate(found[:tails]):
            ends[b, tail] = end
        for at in range(tails * length):
            above[b, nodes + at] = nodes + at - 1 if at % length else ends[b, at // length]
            if noise < 0:
                drafted[b, nodes + at] = history[b, (at + 1) * 7919 % size]
    tree = (x.to(tokens.device) for x in (hidden, *tree_ancestors(above)))
    return drafted.to(tokens.device), *tree, ends.to(tokens.device)


def _likely_ends(parents, probability):
    """Return the nodes where a path may end, the likeliest first."""
    chance = list(probability)
    for parent, p in zip(parents, probability):
        if parent >= 0:
            chance[parent] -= p
    ends = [node for node, p in enumerate(chance) if p > 0]
    return sorted(ends, key=lambda node: (-chance[node], node))


def keep_tail(denoised, factors, tables, guesses, continuation, path, accept_length, ends, length):
    keep_continuation(denoised, guesses, continuation)
    factors.copy_(tables[0].expand_as(factors))
    first = guesses.shape[1] - ends.shape[1] * length
    for b, count in enumerate(accept_length.tolist()):
        last = int(path[b, count - 1]) if count else -1
        if last < 0 or last not in ends[b].tolist():
            continue
        begin = first + ends[b].tolist().index(last) * length
        denoised[b] = -1
        said = guesses[b, begin : begin + length][: denoised.shape[1]]
        denoised[b, : len(said)] = said
        factors[b] = tables[1]

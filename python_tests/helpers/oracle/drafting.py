"""A second opinion on drafting: what the text and the memory hold, and the best tree of it."""

import math

import torch

from .noise import SplitMix64, noise_index
from .tree import path


def lookup(text: list[int], max_ngram: int, length: int) -> tuple[list[int], int]:
    """Return what followed the best earlier match of the text's end, and how many matched."""
    best = (0, len(text))
    for end in range(1, len(text)):
        size = 0
        while size < min(end, max_ngram) and text[end - 1 - size] == text[-1 - size]:
            size += 1
        if size:
            best = max(best, (size, end))
    return text[best[1] : best[1] + length], best[0]


def fill(
    candidates: list[list[int]],
    retrieved: list[int],
    text: list[int],
    depth: list[int],
    rank: list[int],
    seed: int,
    row: int,
) -> list[int]:
    """The tokens of one row's tree."""
    tokens = []
    for node, (d, r) in enumerate(zip(depth, rank)):
        column = (
            retrieved
            if r == -1
            else [level[r] if 0 <= r < len(level) else -1 for level in candidates]
        )
        if node == 0 or d < 1:
            tokens.append(text[-1])
        elif d <= len(column) and column[d - 1] >= 0:
            tokens.append(column[d - 1])
        else:
            tokens.append(text[noise_index(seed, row, len(text), d, node)])
    return tokens


EDGES = [0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 0.985]
NGRAMS = [1, 2, 3, 4, 6, 8, 12, 16]


def top(row: torch.Tensor) -> tuple[list[int], list[range]]:
    """The eight likeliest tokens and the levels that each may have, as far as rounding lets that be
    said.
    """
    values, tokens = torch.sort(row.double(), descending=True, stable=True)
    chances = values[:8].softmax(0).nan_to_num(0).tolist()
    levels = [
        [sum(edge <= p + slack for edge in EDGES) for slack in (-1e-12, 1e-12)] for p in chances
    ]
    return tokens[:8].tolist(), [range(low, high + 1) for low, high in levels]


def places(text: list[int], size: int, known: int = 1) -> dict[tuple[int, ...], int]:
    """Find where every n-gram of ``size`` tokens last ended, from the place ``known`` on; the
    newest come last.

    What is negative is no token.
    """
    found = {}
    for end in range(max(size, known), len(text)):
        ngram = tuple(text[end - size : end])
        if min(ngram) >= 0 and text[end] >= 0:
            found.pop(ngram, None)
            found[ngram] = end
    return found


def remember(
    memory: dict[tuple[int, ...], list[int]],
    text: list[int],
    tokens: list[int],
    parents: list[int],
    accepted: list[int],
    guesses: list[list[int]],
) -> None:
    """Note what the model guessed after every context of up to 3 tokens; the newest come last."""
    for node in sorted(range(len(parents)), key=lambda i: (i in accepted, i)):
        own = path(parents, node)
        context = text + [tokens[i] for i in own[1:]]
        for size in range(1, min(3, len(context)) + 1 if own else 1):
            memory.pop(tuple(context[-size:]), None)
            memory[tuple(context[-size:])] = guesses[node]


def hashed(context: tuple[int, ...]) -> int:
    """SplitMix64 of the oldest token, and of that and the token after it, and so on."""
    state = 0
    for token in context:
        state = SplitMix64(state ^ token).next()
    return state


def places_table(text: list[int], slots: int) -> list[list[int]]:
    """[8, slots]"""
    table = [[0] * slots for _ in NGRAMS]
    for row, size in zip(table, NGRAMS):
        for ngram, end in places(text, size).items():
            slot = hashed(ngram) % slots
            row[slot] = max(row[slot], end)
    return table


def memory_table(memory: dict[tuple[int, ...], list[int]], slots: int) -> list[list[list[int]]]:
    """[3, slots, 9]"""
    table = [[[0] * 9 for _ in range(slots)] for _ in range(3)]
    for context, guesses in memory.items():
        check = (hashed(context) // 2**32 | 1).to_bytes(4, "little")
        table[len(context) - 1][hashed(context) % slots] = [
            int.from_bytes(check, "little", signed=True),
            *guesses,
        ]
    return table


class Draft:
    """One row's best-first tree, chosen from all that might come next, which is listed anew for
    every node.
    """

    def __init__(
        self,
        text,
        denoised,
        memory,
        habits,
        suffixes: bool,
        corpus,
        factors: torch.Tensor,
        max_depth: int,
        foresight: float,
    ):
        self.text, self.denoised, self.memory, self.habits = text, denoised, memory, habits
        self.texts = [[text]] * suffixes + [corpus]  # where to look, the first place first
        sizes = [(4, 9), (3, 2, 12), (3, 4, 12), (8, 3, 4)]
        parts = factors.split([math.prod(size) for size in sizes])
        self.bias, self.of_denoised, self.of_memory, self.of_suffix = (
            part.view(size).tolist() for part, size in zip(parts, sizes)
        )
        self.max_depth, self.foresight = max_depth, foresight

    def _followers(self, context: list[int]) -> list[tuple[int, int]]:
        """(index of the n-gram, token) of the different tokens after the ends of a context,
        longest first.
        """
        found = {}
        for level, size in reversed(list(enumerate(NGRAMS))):
            ngram = context[-size:]
            for texts in self.texts:
                after = [
                    text[e]
                    for text in texts
                    for e in range(size, len(text))
                    if text[e - size : e] == ngram
                ]
                if after:
                    found.setdefault(after[-1], level)
                    break
        return [(level, token) for token, level in found.items()]

    def _scores(self, context: list[int], depth: int) -> dict[int, tuple[float, int]]:
        """Token: score and sources, in the order in which they are listed."""
        ends = {n: tuple(context[-n:]) for n in (1, 2, 3) if n <= len(context)}
        recalled, usual = (
            {n: table[end] for n, end in ends.items() if end in table}
            for table in (self.memory, self.habits)
        )
        highest = max(recalled, default=0)
        followers = self._followers(context)

        listed = []  # (token, factor, source)
        for guess in self.denoised[depth] if depth < len(self.denoised) else []:
            table = self.of_denoised[min(depth, 2)][bool(recalled)]
            listed += [(guess // 16, table[guess % 16], 1)] if guess >= 0 else []
        for n, guesses in sorted({**usual, **recalled}.items()):
            listed += [
                (g // 16, self.of_memory[n - 1][highest][g % 16], 2) for g in guesses if g >= 0
            ]
        for rank, (level, token) in enumerate(followers):
            listed.append((token, self.of_suffix[level][min(rank, 2)][highest], 4))

        bias = self.bias[highest][followers[0][0] + 1 if followers else 0]
        return {
            token: (
                math.prod([bias, *(factor for other, factor, _ in listed if other == token)]),
                sum({source for other, _, source in listed if other == token}),
            )
            for token in dict.fromkeys(token for token, _, _ in listed)
        }

    def _children(self, nodes: list[tuple], parent: int) -> list[tuple]:
        """(value, -parent, -place, token, probability, sources) of everything that may follow a
        node.
        """
        above = [parent]
        while above[0] > 0:
            above.insert(0, nodes[above[0]][1])
        depth = len(above) - 1
        if depth == self.max_depth:
            return []
        probability = nodes[parent][2]
        scores = self._scores(self.text + [nodes[i][0] for i in above[1:]], depth)
        if not scores and self.foresight * probability > 0:
            noise = noise_index(0, 0, len(self.text), depth + 1, parent)
            return [(probability * self.foresight, -parent, 0, self.text[noise], 0.0, 8)]
        total = 1.0
        for score, _ in scores.values():
            total += score
        first = max(scores, key=lambda token: scores[token][0], default=None)  # of equals the first
        children = []
        for place, (token, (score, sources)) in enumerate(scores.items()):
            p = probability * min(score / total, 0.99)
            value = p + probability * self.foresight if token == first else p
            children.append((value, -parent, -place, token, p, sources))
        return children

    def nodes(self, count: int) -> list[tuple[int, int, float, int]]:
        """(token, parent, probability, sources) of the ``count`` best nodes, or as many as there
        are.
        """
        nodes = [(self.text[-1], -1, 1.0, 0)]
        while len(nodes) < count:
            taken = {(parent, token) for token, parent, _, _ in nodes}
            waiting = [
                c
                for i in range(len(nodes))
                for c in self._children(nodes, i)
                if (i, c[3]) not in taken
            ]
            if not waiting:
                break
            _, parent, _, token, probability, sources = max(waiting)
            nodes.append((token, -parent, probability, sources))
        return nodes

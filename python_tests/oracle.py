"""A second opinion on every op, by another method than :mod:`msn_ext.ops.reference`.

Rows are plain Python lists. A node's keys are listed slot by slot and attended to as in plain
decoding; a tree is verified level by level from the root; an n-gram is found by measuring every
end; a commit is read from a snapshot; what is known is kept by context in a dict, or searched for
in the text. No masks, no bit words, no batches, and no hashes but to lay out a table.
"""

import math

import torch


def path(parents: list[int], node: int) -> list[int]:
    """The live nodes from the root down to ``node``; empty at padding and below it."""
    if node == 0:
        return [0]
    if parents[node] == -1:
        return []
    above = path(parents, parents[node])
    return [*above, node] if above else []


def words(nodes: list[int], count: int) -> list[int]:
    """A set of nodes as ``count`` signed 64-bit words."""
    bits = bytearray(8 * count)
    for node in nodes:
        bits[node // 8] |= 1 << node % 8
    return [int.from_bytes(bits[8 * w : 8 * w + 8], "little", signed=True) for w in range(count)]


def argmax(row: list[float]) -> int:
    """torch.argmax: a NaN beats every number, the first of equals wins."""
    for i, x in enumerate(row):
        if math.isnan(x):
            return i
    return row.index(max(row))


def _descend(parents: list[int], start: int, follow) -> list[int]:
    """From ``start`` down, level by level, to the smallest node of the last level; without
    ``start``.
    """
    levels = [[start]]
    while levels[-1]:
        above = set(levels[-1])
        levels.append([i for i in range(1, len(parents)) if parents[i] in above and follow(i)])
    last = min(levels[-2])
    down = path(parents, last)
    return down[down.index(start) + 1 :]


def verify(
    tokens: list[int], targets: list[int], parents: list[int]
) -> tuple[int, list[int], int, list[int]]:
    """Accept length, path, bonus token and continuation of one row, the lists without padding."""
    accepted = [0, *_descend(parents, 0, lambda i: tokens[i] == targets[parents[i]])]
    continuation = _descend(parents, accepted[-1], lambda i: True)
    return len(accepted), accepted, targets[accepted[-1]], continuation


def allowed_slots(
    parents: list[int], node: int, length: int, offset: int = 0, window: int = 0
) -> list[int]:
    """The cache slots ``node`` attends to, in the order in which plain decoding would have met
    them.
    """
    own = path(parents, node)
    if not own:
        return []
    slots = [*range(offset, length), *(length + j for j in own)]
    return slots[-window:] if window else slots


def attention(
    q,
    k_cache,
    v_cache,
    lengths,
    parents,
    *,
    offsets=None,
    scale=None,
    window=0,
    softcap=0.0,
    sinks=None,
) -> torch.Tensor:
    """float64 [B, N, H, D_v]; ``parents`` is one list a row."""
    q, k_cache, v_cache = (x.detach().cpu().double() for x in (q, k_cache, v_cache))
    batch, heads, nodes, dim = q.shape
    kv_heads = k_cache.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    out = torch.zeros(batch, nodes, heads, v_cache.shape[3], dtype=torch.float64)
    for b in range(batch):
        offset = 0 if offsets is None else int(offsets[b])
        for node in range(nodes):
            slots = allowed_slots(parents[b], node, int(lengths[b]), offset, window)
            if not slots:
                continue
            query = q[b, :, node].view(kv_heads, heads // kv_heads, dim)
            scores = scale * torch.einsum("hgd,hsd->hgs", query, k_cache[b, :, slots])
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            top = scores.max(-1, keepdim=True).values
            weights = torch.exp(scores - top)
            total = weights.sum(-1, keepdim=True)
            if sinks is not None:
                total = total + torch.exp(sinks.detach().cpu().double().view(kv_heads, -1, 1) - top)
            out[b, node] = torch.einsum(
                "hgs,hsd->hgd", weights / total, v_cache[b, :, slots]
            ).reshape(heads, -1)
    return out


def commit(cache: torch.Tensor, lengths: list[int], paths: list[list[int]]) -> torch.Tensor:
    """A committed copy of ``cache``; ``paths`` holds the accepted nodes alone."""
    after = cache.clone()
    for b, (start, nodes) in enumerate(zip(lengths, paths)):
        for i, node in enumerate(nodes):
            after[b, :, start + i] = cache[b, :, start + node]
    return after


def lookup(text: list[int], max_ngram: int, length: int) -> tuple[list[int], int]:
    """What followed the best earlier match of the end of ``text``, and how many tokens matched."""
    best = (0, len(text))
    for end in range(1, len(text)):
        size = 0
        while size < min(end, max_ngram) and text[end - 1 - size] == text[-1 - size]:
            size += 1
        if size:
            best = max(best, (size, end))
    return text[best[1] : best[1] + length], best[0]


class SplitMix64:
    """The generator as published (Steele, Lea, Flood 2014): a Weyl sequence, then a mix."""

    def __init__(self, seed: int):
        self.state = seed % 2**64

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        for shift, factor in [(30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)]:
            z = (z ^ z // 2**shift) * factor % 2**64
        return z ^ z // 2**31


def noise_index(seed: int, row: int, length: int, depth: int, node: int) -> int:
    """Which of ``length`` tokens the ahead noise of a node is."""
    state = seed % 2**64 ^ SplitMix64(row).next()
    for counter in (length + depth, node):
        state = SplitMix64(state).next() ^ counter
    return SplitMix64(state).next() // 2 % length


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
    """Where every n-gram of ``size`` tokens last ended, from the place ``known`` on; the newest
    come last.

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
    """What the model guessed after every context of up to three tokens; the newest come last."""
    for node in sorted(range(len(parents)), key=lambda i: (i in accepted, i)):
        own = path(parents, node)
        context = text + [tokens[i] for i in own[1:]]
        for size in range(1, min(3, len(context)) + 1 if own else 1):
            memory.pop(tuple(context[-size:]), None)
            memory[tuple(context[-size:])] = guesses[node]


def hashed(context: tuple[int, ...]) -> int:
    """SplitMix64 of the newest token, and of that and the token before it, and so on."""
    state = 0
    for token in reversed(context):
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
        suffixes: bool,
        documents,
        factors: torch.Tensor,
        max_depth: int,
        foresight: float,
    ):
        self.text, self.denoised, self.memory = text, denoised, memory
        self.texts = [[text]] * suffixes + [documents]  # where to look, the first place first
        sizes = [(4, 9), (3, 2, 12), (3, 4, 12), (8, 3, 4)]
        parts = factors.split([math.prod(size) for size in sizes])
        self.bias, self.of_denoised, self.of_memory, self.of_suffix = (
            part.view(size).tolist() for part, size in zip(parts, sizes)
        )
        self.max_depth, self.foresight = max_depth, foresight

    def _followers(self, context: list[int]) -> list[tuple[int, int]]:
        """(index of the n-gram, token) of the different tokens behind the ends of a context,
        longest first.
        """
        found = {}
        for level, size in reversed(list(enumerate(NGRAMS))):
            ngram = context[-size:]
            for texts in self.texts:
                behind = [
                    text[e]
                    for text in texts
                    for e in range(size, len(text))
                    if text[e - size : e] == ngram
                ]
                if behind:
                    found.setdefault(behind[-1], level)
                    break
        return [(level, token) for token, level in found.items()]

    def _scores(self, context: list[int], depth: int) -> dict[int, tuple[float, int]]:
        """Token: score and sources, in the order in which they are listed."""
        recalled = {n: self.memory.get(tuple(context[-n:])) for n in (1, 2, 3) if n <= len(context)}
        recalled = {n: guesses for n, guesses in recalled.items() if guesses is not None}
        highest = max(recalled, default=0)
        followers = self._followers(context)

        listed = []  # (token, factor, source)
        for guess in self.denoised[depth] if depth < len(self.denoised) else []:
            table = self.of_denoised[min(depth, 2)][bool(recalled)]
            listed += [(guess // 16, table[guess % 16], 1)] if guess >= 0 else []
        for n, guesses in recalled.items():
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

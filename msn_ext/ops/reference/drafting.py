"""The ops that draft, specified."""

import torch

from msn_ext.ops import (
    ADJACENCY,
    CEILING,
    DENOISED,
    EDGES,
    FACTORS_ADJACENCY,
    FACTORS_BIAS,
    FACTORS_DENOISED,
    FACTORS_SUFFIX,
    GUESSES,
    LEVELS,
    NOISE,
    ORDERS,
    RETRIEVAL,
    SUFFIX,
    SUFFIXES,
)

from .rules import check_parents, counter_bits, path_to, splitmix64


def lookup_ngram(history, lengths, max_ngram, length):
    batch = history.shape[0]
    tokens = torch.full((batch, length), -1, dtype=torch.int64)
    matched = torch.zeros(batch, dtype=torch.int64)
    for b, size in enumerate(lengths.tolist()):
        row = history[b, :size].tolist()
        for ngram in range(min(max_ngram, size - 1), 0, -1):
            ends = [e for e in range(ngram, size) if row[e - ngram : e] == row[size - ngram :]]
            if ends:
                found = row[ends[-1] : ends[-1] + length]
                tokens[b, : len(found)] = torch.tensor(found)
                matched[b] = ngram
                break
    return tokens.to(history.device), matched.to(history.device)


def fill_tree(candidates, retrieved, history, lengths, depth, rank, seed):
    batch, depths, ranks = candidates.shape
    n = rank.shape[-1]
    depth = depth.expand(batch, n).tolist()
    tokens = torch.zeros(batch, n, dtype=torch.int64)
    for b, size in enumerate(lengths.tolist()):
        for node in range(n):
            d, r = depth[b][node], int(rank[node])
            if node == 0 or d <= 0:
                tokens[b, node] = history[b, size - 1]
                continue
            token = -1
            if r == RETRIEVAL and d <= retrieved.shape[1]:
                token = int(retrieved[b, d - 1])
            elif 0 <= r < ranks and d <= depths:
                token = int(candidates[b, d - 1, r])
            if token < 0:
                token = int(history[b, counter_bits(int(seed), b, size + d, node) % size])
            tokens[b, node] = token
    return tokens.to(history.device)


def top_guesses(logits):
    rows = logits.reshape(-1, logits.shape[-1])
    guesses = torch.full((len(rows), GUESSES), -1, dtype=torch.int32)
    for at, row in enumerate(rows.double().tolist()):
        # Largest first, NaN before everything, the lowest token of equals.
        order = sorted(
            range(len(row)), key=lambda t: (row[t] == row[t], -row[t] if row[t] == row[t] else 0, t)
        )
        best = torch.tensor([row[t] for t in order[:GUESSES]], dtype=torch.float64)
        weights = (best - best[:1]).exp()
        total = 0.0
        for weight in weights.tolist():
            total += weight
        for rank, weight in enumerate(weights.tolist()):
            level = sum(weight / total >= edge for edge in EDGES)
            guesses[at, rank] = order[rank] * 16 + level
    return guesses.view(*logits.shape[:-1], GUESSES).to(logits.device)


def _hash(ngram: list[int]) -> int:
    """Return the hash of some tokens, which are given newest first and hashed oldest first: so an
    n-gram that ends at a node extends one that ends at its parent.
    """
    h = 0
    for token in reversed(ngram):
        h = splitmix64(h ^ token)
    return h


def _signed32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def _check(h: int) -> int:
    """Return what tells contexts in one slot apart; never 0, which is an empty slot."""
    return _signed32(h >> 32 | 1)


def context_of(history: list[int], tokens: list[int], chain: list[int], most: int) -> list[int]:
    """Return the last ``most`` tokens up to the end of ``chain``, newest first."""
    text = history[-most:] + [tokens[node] for node in chain[1:]]
    return text[: -most - 1 : -1]


def index_suffixes(suffixes, history, start, lengths):
    slots = suffixes.shape[2]
    for b, (begin, size) in enumerate(zip(start.tolist(), lengths.tolist())):
        row = history[b].tolist()
        for end in range(max(begin, 1), size):
            before = row[max(0, end - SUFFIXES[-1]) : end][::-1]
            for level, n in enumerate(SUFFIXES):
                if n <= end and min(row[end], *before[:n]) >= 0:
                    suffixes[b, level, _hash(before[:n]) % slots] = end


def remember_guesses(adjacency, history, lengths, tokens, parents, path, guesses):
    check_parents(parents)
    batch, n = tokens.shape
    slots = adjacency.shape[1]
    for b, (size, row) in enumerate(zip(lengths.tolist(), parents.expand(batch, n).tolist())):
        accepted = [node for node in path[b].tolist() if node >= 0]
        for node in [*(i for i in range(n) if i not in accepted), *accepted]:
            chain = path_to(row, node)
            if not chain:
                continue
            context = context_of(history[b, :size].tolist(), tokens[b].tolist(), chain, ORDERS)
            for order in range(len(context)):
                h = _hash(context[: order + 1])
                adjacency[order, h % slots, 0] = _check(h)
                adjacency[order, h % slots, 1:] = guesses[b, node]


def keep_continuation(denoised, guesses, continuation):
    denoised.fill_(-1)
    for b, row in enumerate(continuation.tolist()):
        for depth, node in enumerate(row[: denoised.shape[1]]):
            if node >= 0:
                denoised[b, depth] = guesses[b, node]


def last_place(text, slots, ngram, h):
    """Return where an n-gram (newest token first) of hash h stood last in ``text``, a list or an
    array, by the slots of this n: the place after it; 0: it is not where they point, or nothing
    follows.
    """
    end = int(slots[h % len(slots)]) if len(slots) else 0
    n = len(ngram)
    return end if n <= end < len(text) and list(text[end - n : end])[::-1] == ngram else 0


def _remembered(context, table):
    """Return, by order, the guesses of every order of which the table has this context."""
    remembered, slots = {}, table.shape[1]
    for order in range(min(ORDERS, len(context)) if slots else 0):
        h = _hash(context[: order + 1])
        check, *guesses = table[order, h % slots].tolist()
        if check == _check(h):
            remembered[order] = guesses
    return remembered


def _followers(context, text, suffixes, corpus, corpus_suffixes):
    """Return (index of the n-gram, rank, token) of the different tokens after the last places of
    the ends of a context, the longest first.
    """
    followers: list[tuple[int, int, int]] = []
    for level in reversed(range(len(SUFFIXES))):
        n = SUFFIXES[level]
        if n > len(context):
            continue
        ngram, h = context[:n], _hash(context[:n])
        if end := last_place(text, suffixes[level], ngram, h):
            token = text[end]
        elif (end := last_place(corpus, corpus_suffixes[level], ngram, h)) and min(
            corpus[end], *ngram
        ) >= 0:
            token = int(corpus[end])  # and not what stands between texts
        else:
            continue
        if token not in [other for _, _, other in followers]:
            followers.append((level, len(followers), token))
    return followers


def listed_after(
    context, depth, denoised, adjacency, habits, suffixes, corpus, corpus_suffixes, text
):
    """Return what the sources list after a context (newest first): the place of its bias among the
    factors, and (token, place of its factor, source) as often as a source lists a token.

    The factors are four tables: the bias [highest order known here, habits left out: 0..3, longest
    suffix known here: 0..8]; DENOISED [depth: 0, 1, 2 and more; any context known here; level];
    ADJACENCY [order; highest order known here; level], where habits guess if the order is above the
    highest; SUFFIX [n-gram; rank: 0, 1, 2 and more; highest order
    known here].

    Args:
        denoised, text: lists, of one row; corpus: an array; suffixes: of one row.
    """
    remembered = _remembered(context, adjacency)
    highest = max((order + 1 for order in remembered), default=0)
    known = _remembered(context, habits) | remembered
    followers = _followers(context, text, suffixes, corpus, corpus_suffixes)
    longest = followers[0][0] + 1 if followers else 0

    listed = []
    for guess in denoised[depth] if depth < len(denoised) else ():
        row = min(depth, 2) * 2 + (highest > 0)
        listed.append((guess >> 4, FACTORS_DENOISED + row * LEVELS + guess % 16, DENOISED))
    for order, guesses in sorted(known.items()):
        row = order * (ORDERS + 1) + highest
        for guess in guesses:
            listed.append((guess >> 4, FACTORS_ADJACENCY + row * LEVELS + guess % 16, ADJACENCY))
    for level, rank, token in followers:
        row = level * 3 + min(rank, 2)
        listed.append((token, FACTORS_SUFFIX + row * (ORDERS + 1) + highest, SUFFIX))
    bias = FACTORS_BIAS + highest * (len(SUFFIXES) + 1) + longest
    return bias, [entry for entry in listed if entry[0] >= 0]


def _candidates(context, *known, factors):
    """Return [token, score, sources] of every token that a source lists after a context."""
    bias, listed = listed_after(context, *known)
    candidates: dict[int, list] = {}
    for token, factor, source in listed:
        candidate = candidates.setdefault(token, [token, factors[bias], 0])
        candidate[1] *= factors[factor]
        candidate[2] |= source
    return list(candidates.values())


def draft_tree(
    history,
    lengths,
    denoised,
    adjacency,
    habits,
    suffixes,
    corpus,
    corpus_suffixes,
    factors,
    nodes,
    max_depth,
    foresight,
):
    batch, corpus = history.shape[0], corpus.cpu().numpy()
    tokens = torch.zeros(batch, nodes, dtype=torch.int64)
    parents = torch.full((batch, nodes), -1, dtype=torch.int32)
    probability = torch.zeros(batch, nodes, dtype=torch.float64)
    sources = torch.zeros(batch, nodes, dtype=torch.int32)
    for b, size in enumerate(lengths.tolist()):
        text = history[b, :size].tolist()
        tables = adjacency, habits, suffixes[b], corpus, corpus_suffixes
        known = denoised[b].tolist(), *tables, text
        weights = factors.expand(batch, -1)[b].tolist()
        made = _best_nodes(text, known, weights, nodes, max_depth, foresight)
        for node, (token, parent, p, source) in enumerate(made):
            tokens[b, node], parents[b, node] = token, parent
            probability[b, node], sources[b, node] = p, source
        tokens[b, len(made) :] = text[-1]
    return tuple(x.to(history.device) for x in (tokens, parents, probability, sources))


def _best_nodes(text, known, factors, nodes, max_depth, foresight):
    """Return (token, parent, probability, sources) of the nodes of one row's tree."""
    # (-value, parent, place among the candidates): the most valuable, of equals the one whose
    # parent came first, then as listed. Last what becomes of the node. At first there is the root.
    waiting = [(-1.0, -1, 0, (text[-1], 1.0, 0))]
    made: list[tuple[int, int, float, int]] = []
    chains: list[list[int]] = []
    while waiting and len(made) < nodes:
        best = min(waiting)
        waiting.remove(best)
        _, parent, _, (token, above, source) = best
        node = len(made)
        made.append((token, parent, above, source))
        chains.append([*chains[parent], node] if node else [0])
        depth = len(chains[node]) - 1
        if depth >= max_depth:
            continue
        context = context_of(text, [token for token, *_ in made], chains[node], SUFFIXES[-1])
        found = _candidates(context, depth, *known, factors=factors)
        total = 1.0
        for _, score, _ in found:
            total += score
        if not found and above * foresight > 0:
            noise = counter_bits(0, 0, len(text) + depth + 1, node) % len(text)
            found = [(text[noise], 0.0, NOISE)]
        likeliest = max(range(len(found)), key=lambda at: (found[at][1], -at), default=0)
        for at, (token, score, source) in enumerate(found):
            p = above * min(score / total, CEILING)
            value = p + above * foresight if at == likeliest else p
            waiting.append((-value, node, at, (token, p, source)))
    return made

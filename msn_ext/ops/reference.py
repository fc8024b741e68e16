"""The ops in plain PyTorch: the specification that every kernel is tested against.

Written to be read, not to be fast: loops over rows and nodes, one rule a line.
Signatures, shapes, dtypes and errors are those of :mod:`msn_ext.ops`.
"""

import torch

MAX_NODES = 256
WORD_BITS = 64
RETRIEVAL = -1  # rank of a node that continues the retrieved text, not the model's own guesses
_MASK64 = (1 << 64) - 1


def _chain(parents: list[int], node: int) -> list[int]:
    """The path from the root down to ``node``, both included; empty if ``node`` is dead."""
    path = [node]
    while path[-1] > 0:
        path.append(parents[path[-1]])
    return path[::-1] if path[-1] == 0 else []


def check_parents(parents: torch.Tensor) -> None:
    """Raise ValueError where a node's parent is neither -1 nor an earlier node."""
    for row in parents.reshape(-1, parents.shape[-1]).tolist():
        for node, parent in enumerate(row):
            if parent < -1 or parent >= node:
                expected = "-1" if node == 0 else f"-1 or a node in [0, {node - 1}]"
                raise ValueError(f"parents[{node}] is {parent}; expected {expected}")


def tree_ancestors(parents):
    check_parents(parents)
    n = parents.shape[-1]
    words = (n + WORD_BITS - 1) // WORD_BITS
    rows, depths = [], []
    for row in parents.reshape(-1, n).tolist():
        for node in range(n):
            chain = _chain(row, node)
            bits = sum(1 << a for a in chain)
            for w in range(words):
                word = (bits >> (WORD_BITS * w)) & _MASK64
                rows.append(word - (1 << 64) if word >> 63 else word)  # as a signed integer
            depths.append(len(chain) - 1)
    ancestors = torch.tensor(rows, dtype=torch.int64).view(*parents.shape, words)
    return ancestors.to(parents.device), torch.tensor(depths, dtype=torch.int32).view(
        parents.shape
    ).to(parents.device)


def ancestor_matrix(ancestors):
    """Bit words int64 [..., N, W] as a bool matrix [..., N, N]: [i, j] = j is i or above it."""
    n = ancestors.shape[-2]
    shifts = torch.arange(WORD_BITS, device=ancestors.device)
    bits = (ancestors[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :n].bool()


def tree_mask(lengths, ancestors, slots, *, offsets=None, window=0):
    """Which cache slot each node may attend to, as a bool mask [B, 1, N, slots].

    Prefix slots [offset, length), then the node's ancestors at slot length + index; with a window,
    only those fewer than ``window`` logical positions before the node.
    """
    batch, n = lengths.shape[0], ancestors.shape[-2]
    tree = ancestor_matrix(ancestors).expand(batch, n, n)
    depth = tree.sum(-1) - 1  # [B, N]
    if offsets is None:
        offsets = torch.zeros_like(lengths)
    slot = torch.arange(slots, device=lengths.device)
    prefix = (slot >= offsets[:, None]) & (slot < lengths[:, None])  # [B, S]
    mask = prefix[:, None, :].expand(batch, n, slots) & (depth >= 0)[..., None]
    position = slot.expand(batch, slots) - offsets[:, None]
    node = slot - lengths[:, None]  # [B, S] index of the node that lies in a slot
    inside = (node >= 0) & (node < n)
    index = node.clamp(0, n - 1)
    allowed = tree.gather(2, index[:, None, :].expand(batch, n, slots)) & inside[:, None, :]
    mask = mask | allowed
    if window > 0:
        node_position = (lengths - offsets)[:, None] + depth  # [B, N]
        key_position = torch.where(inside, node_position.gather(1, index), position)
        mask = mask & (node_position[:, :, None] - key_position[:, None, :] < window)
    return mask[:, None]


def tree_attention(
    q,
    k_cache,
    v_cache,
    lengths,
    ancestors,
    *,
    offsets=None,
    scale=None,
    window=0,
    softcap=0.0,
    sinks=None,
):
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, n, dim = q.shape
    group = heads // k_cache.shape[1]
    scale = dim**-0.5 if scale is None else scale
    mask = tree_mask(lengths, ancestors, k_cache.shape[2], offsets=offsets, window=window)
    k = k_cache.to(work).repeat_interleave(group, dim=1)
    v = v_cache.to(work).repeat_interleave(group, dim=1)
    scores = q.to(work) @ k.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(work).view(1, heads, 1, 1).expand(batch, heads, n, 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : mask.shape[-1]]
    # A forbidden key counts for nothing, whatever it holds; a node without keys gives zeros.
    weights = weights.masked_fill(~mask, 0.0)
    out = torch.zeros(batch, heads, n, v.shape[-1], dtype=work, device=q.device)
    for b in range(batch):
        seen = mask[b, 0].any(0)
        out[b] = weights[b][..., seen] @ v[b][:, seen]
    return out.transpose(1, 2).contiguous().to(q.dtype)


def verify_tree(tokens, targets, parents):
    check_parents(parents)
    batch, n = tokens.shape
    all_parents = parents.expand(batch, n).tolist()
    path = torch.full((batch, n), -1, dtype=torch.int64)
    continuation = torch.full((batch, n), -1, dtype=torch.int64)
    accept_length = torch.zeros(batch, dtype=torch.int64)
    bonus = torch.zeros(batch, dtype=torch.int64)
    for b, (row, token, target) in enumerate(zip(all_parents, tokens.tolist(), targets.tolist())):
        chains = [_chain(row, node) for node in range(n)]
        accepted = [c for c in chains if c and all(token[i] == target[row[i]] for i in c[1:])]
        best = max(accepted, key=lambda c: (len(c), -c[-1]))
        below = [c for c in chains if c[: len(best)] == best]
        deepest = max(below, key=lambda c: (len(c), -c[-1]))[len(best) :]
        accept_length[b] = len(best)
        path[b, : len(best)] = torch.tensor(best)
        bonus[b] = target[best[-1]]
        continuation[b, : len(deepest)] = torch.tensor(deepest, dtype=torch.int64)
    return tuple(x.to(tokens.device) for x in (accept_length, path, bonus, continuation))


def commit_kv(caches, lengths, path, accept_length):
    for cache in caches:
        for b, (start, kept) in enumerate(zip(lengths.tolist(), accept_length.tolist())):
            slots = start + path[b, :kept]
            cache[b, :, start : start + kept] = cache[b, :, slots]


def advance_text(history, lengths, remaining, targets, path, accept_length, ends, vocabulary):
    batch = len(targets)
    gained = targets.gather(1, path.clamp(min=0))
    status = torch.zeros(3, batch, dtype=torch.int64, device=history.device)
    for b in range(batch):
        tokens, left, begin = gained[b].tolist(), int(remaining[b]), int(lengths[b])
        tokens = tokens[: min(int(accept_length[b]), max(left, 0))]
        end = next((i for i, token in enumerate(tokens) if token in ends.tolist()), None)
        if end is not None:
            tokens = tokens[: end + 1]
        history[b, begin : begin + len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        lengths[b] += len(tokens)
        remaining[b] = left - len(tokens) if end is None else 0
        invalid = any(not 0 <= token < vocabulary for token in tokens)
        status[:, b] = torch.tensor([len(tokens), int(remaining[b]), invalid])
    return gained, status


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


def splitmix64(x: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014) on an unsigned 64-bit integer."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def counter_bits(seed: int, row: int, position: int, node: int) -> int:
    """63 random bits that depend on nothing but their counter."""
    x = splitmix64((seed & _MASK64) ^ splitmix64(row))
    return splitmix64(splitmix64(x ^ position) ^ node) >> 1


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


# ---- best-first drafting: what is known, and the tree that is made of it
# ----------------------------

GUESSES = 8  # of the model, kept of every row of logits
EDGES = (
    0.02,
    0.05,
    0.1,
    0.2,
    0.35,
    0.5,
    0.65,
    0.8,
    0.9,
    0.96,
    0.985,
)  # between levels of probability
LEVELS = len(EDGES) + 1
ORDERS = 3  # contexts of 1, 2 and 3 tokens
SUFFIXES = (1, 2, 3, 4, 6, 8, 12, 16)  # lengths of the n-grams that are indexed
DENOISED, ADJACENT, SUFFIX, NOISE = 1, 2, 4, 8  # bits of `sources`
CEILING = 0.99  # of the probability of a child, so that it always comes behind its parent

# The factors, one by one (see `draft_tree`): where each table begins, its dimensions behind it.
_BIAS = 0  # [highest order known here: 0..3, longest suffix known here: 0..8]
_DENOISED = _BIAS + (ORDERS + 1) * (
    len(SUFFIXES) + 1
)  # [depth: 0, 1, 2 and more, any context known here, level]
_ADJACENT = _DENOISED + 3 * 2 * LEVELS  # [order, highest order known here, level]
_SUFFIX = (
    _ADJACENT + ORDERS * (ORDERS + 1) * LEVELS
)  # [n-gram, rank: 0, 1, 2 and more, highest order known here]
FACTORS = _SUFFIX + len(SUFFIXES) * 3 * (ORDERS + 1)


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


def verify_logits(logits, tokens, parents):
    guesses = top_guesses(logits)
    targets = (guesses[..., 0] >> 4).long()
    return guesses, targets, *verify_tree(tokens, targets, parents)


def _hashes(context: list[int]) -> list[int]:
    """Of the last 1, 2, 3, … tokens of a context, which is given newest first."""
    hashes, h = [], 0
    for token in context:
        h = splitmix64(h ^ token)
        hashes.append(h)
    return hashes


def _signed32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def _check(h: int) -> int:
    """What tells contexts in one slot apart; never 0, which is an empty slot."""
    return _signed32(h >> 32 | 1)


def context_of(history: list[int], tokens: list[int], chain: list[int], most: int) -> list[int]:
    """The last ``most`` tokens up to the end of ``chain``, newest first."""
    text = history[-most:] + [tokens[node] for node in chain[1:]]
    return text[: -most - 1 : -1]


def index_suffixes(heads, history, start, lengths):
    slots = heads.shape[2]
    for b, (begin, size) in enumerate(zip(start.tolist(), lengths.tolist())):
        row = history[b].tolist()
        for end in range(max(begin, 1), size):
            before = row[max(0, end - SUFFIXES[-1]) : end][::-1]
            hashes = _hashes(before)
            for level, n in enumerate(SUFFIXES):
                if n <= end and min(row[end], *before[:n]) >= 0:
                    heads[b, level, hashes[n - 1] % slots] = end


def remember_guesses(contexts, history, lengths, tokens, parents, path, guesses):
    check_parents(parents)
    batch, n = tokens.shape
    slots = contexts.shape[1]
    for b, (size, row) in enumerate(zip(lengths.tolist(), parents.expand(batch, n).tolist())):
        accepted = [node for node in path[b].tolist() if node >= 0]
        for node in [*(i for i in range(n) if i not in accepted), *accepted]:
            chain = _chain(row, node)
            if not chain:
                continue
            context = context_of(history[b, :size].tolist(), tokens[b].tolist(), chain, ORDERS)
            for order, h in enumerate(_hashes(context)):
                contexts[order, h % slots, 0] = _check(h)
                contexts[order, h % slots, 1:] = guesses[b, node]


def last_place(text, heads, ngram, h):
    """Where an n-gram (newest token first) of hash h stood last in ``text``, a list or an array, by
    its heads of this n: the place behind it; 0: it is not where they point, or nothing follows.
    """
    end = int(heads[h % len(heads)]) if len(heads) else 0
    n = len(ngram)
    return end if n <= end < len(text) and list(text[end - n : end])[::-1] == ngram else 0


def listed_behind(context, depth, denoised, contexts, heads, corpus, corpus_heads, history):
    """What the sources list behind a context (newest first): the place of its bias, and (token,
    place of its factor, source) as often as a source lists a token. Denoised guesses and history as
    lists, the corpus as an array, heads of one row.
    """
    hashes = _hashes(context)
    known = []
    for order, h in enumerate(hashes[:ORDERS]):
        slots = contexts.shape[1]
        row = contexts[order, h % slots].tolist() if slots else [0]
        if row[0] == _check(h):
            known.append((order, row[1:]))
    highest = max((order + 1 for order, _ in known), default=0)

    behind = []  # (index of the n-gram, rank, token), the longest first
    for level in reversed(range(len(SUFFIXES))):
        n = SUFFIXES[level]
        if n > len(hashes):
            continue
        ngram, h, before = context[:n], hashes[n - 1], {token for _, _, token in behind}
        if end := last_place(history, heads[level], ngram, h):
            token = history[end]
        elif (end := last_place(corpus, corpus_heads[level], ngram, h)) and min(
            corpus[end], *ngram
        ) >= 0:
            token = int(corpus[end])  # and not what stands between documents
        else:
            continue
        if token not in before:
            behind.append((level, len(before), token))
    longest = behind[0][0] + 1 if behind else 0

    listed = []
    for guess in denoised[depth] if depth < len(denoised) else ():
        row = min(depth, 2) * 2 + (highest > 0)
        listed.append((guess >> 4, _DENOISED + row * LEVELS + guess % 16, DENOISED))
    for order, row in known:
        for guess in row:
            listed.append(
                (
                    guess >> 4,
                    _ADJACENT + (order * (ORDERS + 1) + highest) * LEVELS + guess % 16,
                    ADJACENT,
                )
            )
    for level, rank, token in behind:
        listed.append(
            (token, _SUFFIX + (level * 3 + min(rank, 2)) * (ORDERS + 1) + highest, SUFFIX)
        )
    return _BIAS + highest * (len(SUFFIXES) + 1) + longest, [
        entry for entry in listed if entry[0] >= 0
    ]


def _candidates(context, *known, factors):
    """[token, score, sources] of every token that a source lists behind a context."""
    bias, listed = listed_behind(context, *known)
    candidates = {}
    for token, factor, source in listed:
        candidate = candidates.setdefault(token, [token, factors[bias], 0])
        candidate[1] *= factors[factor]
        candidate[2] |= source
    return list(candidates.values())


def draft_tree(
    history,
    lengths,
    denoised,
    contexts,
    heads,
    corpus,
    corpus_heads,
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
        rows = denoised[b].tolist()
        # (-value, parent, place among the candidates): the most valuable, of equals the one whose
        # parent came first, then as listed. Behind it what becomes of the node. At first there is
        # the root.
        waiting = [(-1.0, -1, 0, (text[-1], 1.0, 0))]
        made, chains = [], []
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
            known = depth, rows, contexts, heads[b], corpus, corpus_heads, text
            found = _candidates(context, *known, factors=factors.tolist())
            total = 1.0
            for _, score, _ in found:
                total += score
            if not found and above * foresight > 0:
                found = [(text[counter_bits(0, 0, size + depth + 1, node) % size], 0.0, NOISE)]
            likeliest = max(range(len(found)), key=lambda at: (found[at][1], -at), default=0)
            for at, (token, score, source) in enumerate(found):
                p = above * min(score / total, CEILING)
                value = p + above * foresight if at == likeliest else p
                waiting.append((-value, node, at, (token, p, source)))
        for node, (token, parent, p, source) in enumerate(made):
            tokens[b, node], parents[b, node], probability[b, node], sources[b, node] = (
                token,
                parent,
                p,
                source,
            )
        tokens[b, len(made) :] = text[-1]
    return tuple(x.to(history.device) for x in (tokens, parents, probability, sources))


# ---- noisy training: where noise goes in a sample, and what it is
# -----------------------------------

NO_LABEL = -100
ATTEMPTS = 64  # to draw a token that may be noise


def draw_noise(
    input_ids,
    labels,
    documents,
    keep_token_ids,
    starts,
    seed,
    length,
    random=0.0,
    vocabulary=0,
    apart=True,
):
    starts, keep = starts.clone(), set(keep_token_ids.tolist())
    noise = torch.full((*starts.shape, length), -1)
    for d, (row, begin, end) in enumerate(documents.tolist()):
        tokens, response = input_ids[row].tolist(), (labels[row] != NO_LABEL).tolist()
        response = [begin < at < end and response[at] for at in range(len(tokens))]
        size = [0] * (len(tokens) + 1)  # of a segment that starts here
        for at in reversed(range(len(tokens))):
            size[at] = min(size[at + 1] + 1, length) if response[at] else 0
        open_ = [
            at
            for at in range(begin, end)
            if size[at] == length or (response[at] and not response[at - 1])
        ]
        identity = sum(
            splitmix64(tokens[at] & _MASK64 ^ splitmix64(at - begin)) for at in range(begin, end)
        )
        key = splitmix64(seed & _MASK64) ^ identity & _MASK64
        for s in range(starts.shape[1]):
            start = int(starts[d, s])
            if start < 0 and open_:
                start = open_[counter_bits(key, s, 0, 0) % len(open_)]
            if start < 0:
                continue
            if not (start < len(tokens) and response[start]):
                raise ValueError(
                    f"starts[{d}, {s}] is {start}; expected -1 or a place in the document's"
                    " response"
                )
            starts[d, s] = start
            for i in range(size[start]):
                noise[d, s, i] = _draw_token(
                    tokens, begin, start + i, key, s, 1 + i, keep, random, vocabulary
                )
            if apart:
                open_ = [at for at in open_ if at + size[at] <= start or at >= start + size[start]]
            else:
                open_ = [at for at in open_ if at != start]
    return starts, noise.to(starts.device)


def _draw_token(tokens, begin, at, key, segment, place, keep, random, vocabulary):
    if tokens[at] in keep:
        return tokens[at]
    from_vocabulary = (counter_bits(key, segment, place, _MASK64) >> 10) < random * 2.0**53
    for attempt in range(ATTEMPTS):
        bits = counter_bits(key, segment, place, attempt)
        token = bits % vocabulary if from_vocabulary else tokens[begin + bits % (at - begin)]
        if token not in keep:
            return token
    return tokens[at]

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
    return ancestors.to(parents.device), torch.tensor(depths, dtype=torch.int32).view(parents.shape).to(parents.device)


def ancestor_matrix(ancestors):
    """Bit words int64 [..., N, W] as a bool matrix [..., N, N]: [i, j] = j is i or above it."""
    n, words = ancestors.shape[-2:]
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


def tree_attention(q, k_cache, v_cache, lengths, ancestors, *, offsets=None, scale=None, window=0, softcap=0.0, sinks=None):
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

"""The ops on draft trees, specified."""

import torch

from .drafting import top_guesses
from .rules import MASK64, check_parents, path_to

WORD_BITS = 64


def tree_ancestors(parents):
    check_parents(parents)
    n = parents.shape[-1]
    words = (n + WORD_BITS - 1) // WORD_BITS
    rows, depths = [], []
    for row in parents.reshape(-1, n).tolist():
        for node in range(n):
            chain = path_to(row, node)
            bits = sum(1 << a for a in chain)
            for w in range(words):
                word = (bits >> (WORD_BITS * w)) & MASK64
                rows.append(word - (1 << 64) if word >> 63 else word)  # as a signed integer
            depths.append(len(chain) - 1)
    ancestors = torch.tensor(rows, dtype=torch.int64).view(*parents.shape, words)
    depth = torch.tensor(depths, dtype=torch.int32).view(parents.shape)
    return ancestors.to(parents.device), depth.to(parents.device)


def ancestor_matrix(ancestors):
    """Return bit words int64 [..., N, W] as bool [..., N, N]: at i, j whether j is i or above."""
    n = ancestors.shape[-2]
    shifts = torch.arange(WORD_BITS, device=ancestors.device)
    bits = (ancestors[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :n].bool()


def tree_mask(lengths, ancestors, slots, *, offsets=None, window=0):
    """Return which cache slot each node may attend to, as a bool mask [B, 1, N, slots].

    Prefix slots [offset, length), then the node's ancestors at slot length + index; with a window,
    only those fewer than ``window`` logical positions before the node.
    """
    batch, n = lengths.shape[0], ancestors.shape[-2]
    above = ancestor_matrix(ancestors).expand(batch, n, n).tolist()
    mask = torch.zeros(batch, 1, n, slots, dtype=torch.bool)
    for b, length in enumerate(lengths.tolist()):
        offset = 0 if offsets is None else int(offsets[b])
        depth = [sum(row) - 1 for row in above[b]]  # -1: padding, which attends to nothing
        for node in (i for i in range(n) if depth[i] >= 0):
            position = {slot: slot - offset for slot in range(offset, length)}
            for j in range(n):
                if above[b][node][j]:
                    position[length + j] = length - offset + depth[j]
            last = position[length + node]
            near = [slot for slot, at in position.items() if not window or last - at < window]
            mask[b, 0, node, [slot for slot in near if slot < slots]] = True
    return mask.to(lengths.device)


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
        chains = [path_to(row, node) for node in range(n)]
        accepted = [c for c in chains if c and all(token[i] == target[row[i]] for i in c[1:])]
        best = max(accepted, key=lambda c: (len(c), -c[-1]))
        below = [c for c in chains if c[: len(best)] == best]
        deepest = max(below, key=lambda c: (len(c), -c[-1]))[len(best) :]
        accept_length[b] = len(best)
        path[b, : len(best)] = torch.tensor(best)
        bonus[b] = target[best[-1]]
        continuation[b, : len(deepest)] = torch.tensor(deepest, dtype=torch.int64)
    return tuple(x.to(tokens.device) for x in (accept_length, path, bonus, continuation))


def verify_logits(logits, tokens, parents):
    guesses = top_guesses(logits)
    targets = (guesses[..., 0] >> 4).long()
    return guesses, targets, *verify_tree(tokens, targets, parents)


def commit_kv(caches, lengths, path, accept_length):
    for cache in caches:
        for b, (start, kept) in enumerate(zip(lengths.tolist(), accept_length.tolist())):
            slots = start + path[b, :kept]
            cache[b, :, start : start + kept] = cache[b, :, slots]


def place_tree(tokens, history, lengths, offsets, last_position, depth, vocabulary):
    roots = history.gather(1, lengths[:, None] - 1)
    tokens[:, :1] = roots.clamp(max=vocabulary - 1)
    positions = lengths[:, None] - 1 + depth.clamp(min=0)
    return positions.minimum(last_position[:, None]), lengths - 1 + offsets


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

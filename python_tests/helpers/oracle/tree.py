"""A second opinion on the ops of the tree: ancestors, attention, verification, commit."""

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
    lengths = torch.as_tensor(lengths).tolist()
    out = torch.zeros(batch, nodes, heads, v_cache.shape[3], dtype=torch.float64)
    for b in range(batch):
        offset = 0 if offsets is None else int(offsets[b])
        for node in range(nodes):
            slots = allowed_slots(parents[b], node, lengths[b], offset, window)
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

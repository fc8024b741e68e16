"""The ops on draft trees."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from msn_ext import ops

from .common import Case, Model, random_tree
from .drafting import top_guesses

# ---- the eager equivalents -----------------------------------------------------------------------


def ancestor_matrix(parents):
    """bool [N, N], by squaring the one-step matrix; dead nodes have empty rows."""
    n = parents.shape[0]
    nodes = torch.arange(n, device=parents.device)
    reach = (parents[:, None] == nodes) | (nodes[:, None] == nodes)
    for _ in range((n - 1).bit_length()):
        reach = (reach.float() @ reach.float()) > 0
    return reach & reach[:, :1]


def tree_ancestors(parents):
    reach = ancestor_matrix(parents)
    words = (parents.shape[0] + 63) // 64
    bits = F.pad(reach, (0, 64 * words - reach.shape[1])).view(-1, words, 64).long()
    packed = (bits << torch.arange(64, device=parents.device)).sum(-1)
    return packed, (reach.sum(-1) - 1).int()


def attention(q, k, v, mask):
    """Matrix product, softmax, matrix product; the query heads of a group side by side, nothing
    repeated.
    """
    batch, heads, n, dim = q.shape
    kv_heads = k.shape[1]
    scores = q.reshape(batch, kv_heads, -1, dim) @ k.transpose(-1, -2) * dim**-0.5
    scores = scores.view(batch, heads, n, -1).masked_fill(~mask, -torch.inf)
    weights = scores.float().softmax(-1).to(q.dtype).view(batch, kv_heads, -1, k.shape[2])
    return (weights @ v).view(batch, heads, n, -1).transpose(1, 2)


def sdpa_gqa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def sdpa_repeat(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, mask):
    """FlexAttention with the tree's mask, which the first call makes."""
    from torch.nn.attention.flex_attention import create_block_mask

    @functools.cache
    def blocks():
        seen, shape = mask.contiguous(), (None, None, q.shape[2], k.shape[2])
        return create_block_mask(lambda b, h, i, j: seen[i, j], *shape, device=q.device)

    return lambda: compiled_flex()(q, k, v, block_mask=blocks(), enable_gqa=True).transpose(1, 2)


def close(got, expected):
    """Up to what a type rounds. Of many keys an output is a small mean, of which a lost tile is a
    tenth: what is allowed is less.
    """
    if expected.dtype == torch.float32:
        return torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    rounding = 0.05 * float(expected.float().std())
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=rounding)


def verify_tree(tokens, targets, parents, reach):
    """``reach`` is the ancestor matrix of the tree."""
    batch, n = tokens.shape
    nodes = torch.arange(n, device=tokens.device)
    agrees = tokens == targets.gather(1, parents.long().clamp(min=0).expand(batch, n))
    agrees[:, 0] = True
    depth = reach.sum(-1) - 1
    accepted = (agrees[:, None, :] | ~reach).all(-1) & reach[:, 0]
    end = torch.where(accepted, depth * n + (n - 1 - nodes), -1).argmax(-1)
    below = reach[:, end].T
    deepest = torch.where(below, depth * n + (n - 1 - nodes), -1).argmax(-1)

    def by_depth(members, first):
        """Node indices of a set that lies on one path, ``first`` at place 0, then -1."""
        place = torch.where(members, depth - first[:, None], n)
        return tokens.new_full((batch, n + 1), -1).scatter_(1, place, nodes.expand(batch, n))[:, :n]

    accept_length = depth[end] + 1
    path = by_depth(reach[end], torch.zeros_like(end))
    continuation = by_depth(reach[deepest] & ~reach[end], accept_length)
    return accept_length, path, targets.gather(1, end[:, None])[:, 0], continuation


def commit_kv(caches, lengths, path, accept_length):
    """B = 1; reads the accept length back, so that it moves no more than it must."""
    start, kept = int(lengths), int(accept_length)
    slots = start + path[0, :kept]
    for cache in caches:
        cache[:, :, start : start + kept] = cache[:, :, slots]


# ---- the cases: inputs, bytes --------------------------------------------------------------------


def ancestors_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """4 N read (parents); 8 N W + 4 N written (bits, depth)."""
    for n in nodes:
        parents = random_tree(n, device)
        words = (n + 63) // 64
        yield Case(
            f"N={n}",
            4 * n + 8 * n * words + 4 * n,
            lambda: ops.tree_ancestors(parents, validate=False),
            lambda: tree_ancestors(parents),
        )


def attention_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """2 H_kv (length + N) D read (keys and values, once each), 2 H N D (queries, output), of the
    dtype.
    """
    for context in contexts:
        for n in nodes:
            shape = (1, model.kv_heads, context + n + 64, model.head_size)
            k, v = (torch.randn(shape, device=device).to(model.dtype) for _ in range(2))
            q = torch.randn(1, model.heads, n, model.head_size, device=device).to(model.dtype)
            parents = random_tree(n, device)
            ancestors, _ = ops.tree_ancestors(parents)
            lengths = torch.tensor([context], device=device)
            mask = F.pad(ancestor_matrix(parents), (context, 0), value=True)
            k_seen, v_seen = k[:, :, : context + n], v[:, :, : context + n]
            others = {
                "sdpa enable_gqa": lambda: sdpa_gqa(q, k_seen, v_seen, mask),
                "sdpa repeat_interleave": lambda: sdpa_repeat(q, k_seen, v_seen, mask),
            }
            if device == "cuda" and context == contexts[-1] and n in (1, 64):
                others["FlexAttention"] = flex(q, k_seen, v_seen, mask)
            elements = 2 * model.kv_heads * (context + n) + 2 * model.heads * n
            yield Case(
                f"N={n} context={context}",
                elements * model.head_size * model.dtype.itemsize,
                lambda: ops.tree_attention(q, k, v, lengths, ancestors),
                lambda: attention(q, k_seen, v_seen, mask),
                others,
                close,
            )


def verify_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """20 N read (tokens, targets, parents); 16 N + 16 written (path, continuation, accept length,
    bonus).
    """
    for n in nodes:
        parents = random_tree(n, device)
        reach = ancestor_matrix(parents)
        generator = torch.Generator().manual_seed(n)
        tokens, targets = (
            torch.randint(2, (1, n), generator=generator).to(device) for _ in range(2)
        )
        yield Case(
            f"N={n}",
            36 * n + 16,
            lambda: ops.verify_tree(tokens, targets, parents),
            lambda: verify_tree(tokens, targets, parents, reach),
        )


def logits_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """The logits and 12 N read (tokens, parents); 56 N + 16 written (guesses, target, path,
    continuation, …).
    """
    for n in nodes:
        parents = random_tree(n, device)
        reach = ancestor_matrix(parents)
        generator = torch.Generator().manual_seed(n)
        logits = torch.randn(1, n, model.vocabulary, generator=generator).to(device, model.dtype)
        tokens = torch.randint(2, (1, n), generator=generator).to(device)

        def parts():
            guesses = top_guesses(logits)
            targets = logits.argmax(-1)
            return guesses, targets, *verify_tree(tokens, targets, parents, reach)

        yield Case(
            f"N={n}",
            n * model.vocabulary * model.dtype.itemsize + 68 * n + 16,
            lambda: ops.verify_logits(logits, tokens, parents),
            parts,
            # Of guesses, equals may swap.
            check=lambda got, expected: torch.testing.assert_close(got[1:], expected[1:]),
        )


def commit_cases(
    model: Model, nodes: list[int], contexts: list[int], device: str
) -> Iterator[Case]:
    """Keys and values of all layers: 2 x 2 layers H_kv D of the dtype, read and written, per moved
    node.
    """
    context = contexts[len(contexts) // 2]
    for n in nodes:
        kept = min(4, n)
        path = torch.full((1, n), -1, dtype=torch.int64, device=device)
        path[0, :kept] = torch.linspace(0, n - 1, kept).long().to(device)
        moved = int((path[0, :kept] != torch.arange(kept, device=device)).sum())
        shape = (1, model.kv_heads, context + n, model.head_size)
        caches = [
            torch.randn(shape, device=device).to(model.dtype) for _ in range(2 * model.layers)
        ]
        lengths, accepted = (
            torch.tensor([context], device=device),
            torch.tensor([kept], device=device),
        )

        def committed(commit):
            """Return what a commit makes of copies of the tree's slots."""
            tails = [cache[:, :, context - 1 :].clone() for cache in caches]
            commit(tails, torch.ones_like(lengths), path, accepted)
            return tails

        yield Case(
            f"N={n} context={context} layers={model.layers}",
            4 * model.layers * model.kv_heads * model.head_size * model.dtype.itemsize * moved
            + 8 * kept,
            lambda: ops.commit_kv(caches, lengths, path, accepted),
            lambda: commit_kv(caches, lengths, path, accepted),
            waits=True,
            check=lambda *_: torch.testing.assert_close(
                committed(ops.commit_kv), committed(commit_kv), rtol=0, atol=0
            ),
        )


CASES = {
    "tree_ancestors": ancestors_cases,
    "tree_attention": attention_cases,
    "verify_tree": verify_cases,
    "verify_logits": logits_cases,
    "commit_kv": commit_cases,
}

"""Ops on draft trees: attention, verification, and what of a tree stays."""

from collections.abc import Iterator

import torch
from torch import Tensor

from msn_ext import _C

from .drafting import guesses_space, new_guesses
from .registration import dense_rows, expect_dims, op
from .workspace import workspace

VerifiedLogits = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""What :func:`verify_logits` returns."""

# ---- tree_ancestors ------------------------------------------------------------------------------


def tree_ancestors(parents: Tensor, *, validate: bool = True) -> tuple[Tensor, Tensor]:
    """Return ancestor bits and depth of every node of a draft tree.

    Args:
        parents: int32 [N] or [B, N].
        validate: on CUDA, read the result back once (a host sync) and raise on malformed parents.
            The CPU kernel always raises.

    Returns:
        ``ancestors`` int64 [..., N, W]: bit ``j % 64`` of word ``j // 64`` of node i is set where j
        is i or above it; ``depth`` int32 [..., N]: 0 at the root, -1 at padding and below it.

    Raises:
        ValueError: a parent is neither -1 nor an earlier node, or N is not in 1..256.
    """
    ancestors, depth = _tree_ancestors(parents)
    if validate and parents.is_cuda:
        node = torch.arange(parents.shape[-1], device=parents.device)
        bad = (parents < -1) | (parents >= node)
        if bool(bad.any()):
            at = int(bad.nonzero()[0, -1])
            expected = f"-1 or a node in [0, {at - 1}]" if at else "-1"
            raise ValueError(f"parents[{at}] is {int(parents[bad][0])}; expected {expected}")
    return ancestors, depth


@op("tree_ancestors(Tensor parents) -> (Tensor, Tensor)")
def _tree_ancestors(parents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    nodes = parents.shape[-1] if parents.dim() else 0
    ancestors = parents.new_empty((*parents.shape, (nodes + 63) // 64), dtype=torch.int64)
    depth = torch.empty_like(parents, memory_format=torch.contiguous_format)
    yield ancestors, depth
    _C.tree_ancestors(parents.contiguous(), ancestors, depth)


# ---- tree_attention ------------------------------------------------------------------------------


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    *,
    offsets: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from the nodes of a draft tree to the whole prefix and to their own ancestors.

    Node i of row b attends to slots ``offsets[b] <= s < lengths[b]`` and to slot
    ``lengths[b] + j`` for every j in its ancestor bits (itself included). Nothing else is read, so
    other slots may hold anything. A node without bits (padding) gives zeros.

    Args:
        q: [B, H, N, D], float16, bfloat16, float32 or float64; D <= 256.
        k_cache: [B, H_kv, C, D], H a multiple of H_kv, same dtype, strides as they come.
        v_cache: [B, H_kv, C, D_v], D_v <= 256.
        lengths: int64 [B], slots before the root, left padding included; lengths + N <= C.
        ancestors: int64 [N, W] or [B, N, W], from :func:`tree_ancestors`.
        offsets: int64 [B], left padding in slots; None: none.
        scale: of the scores; None: 1 / sqrt(D).
        window: if > 0, only keys fewer than ``window`` *logical* positions before the node
            (a position is slot - offset in the prefix, prefix length + depth in the tree).
        softcap: if > 0, scores become softcap * tanh(scores / softcap).
        sinks: [H], one more score per head that takes part in the softmax and carries no value.

    Returns:
        [B, N, H, D_v] in q's dtype; sums are float32 (float64 for float64).
    """
    return _tree_attention(
        q, k_cache, v_cache, lengths, ancestors, offsets, scale, window, softcap, sinks
    )


@op(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor ancestors,"
    " Tensor? offsets, float? scale, int window, float softcap, Tensor? sinks) -> Tensor"
)
def _tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    offsets: Tensor | None,
    scale: float | None,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Iterator[Tensor]:
    expect_dims("q", q, "[B, H, N, D]")
    expect_dims("v_cache", v_cache, "[B, H_kv, C, D_v]")
    batch, heads, nodes, _ = q.shape
    out = q.new_empty(batch, nodes, heads, v_cache.shape[3])
    yield out
    q, k_cache, v_cache = dense_rows(q), dense_rows(k_cache), dense_rows(v_cache)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    partial = None
    if q.is_cuda:
        partial, _ = workspace(q, _C.attention_space(q, k_cache, v_cache), 0)
    given = q, k_cache, v_cache, lengths, offsets, ancestors, sinks
    _C.tree_attention(*given, scale, window, softcap, out, partial)


def tree_mask(
    lengths: Tensor,
    ancestors: Tensor,
    slots: int,
    *,
    offsets: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Return which cache slot each node may attend to, for a model that needs a dense mask.

    No kernel: plain PyTorch. Arguments are those of :func:`tree_attention`.

    Args:
        slots: C, of the cache.

    Returns:
        bool [B, 1, N, C].
    """
    batch, nodes = lengths.shape[0], ancestors.shape[-2]
    shifts = torch.arange(64, device=ancestors.device)
    tree = ((ancestors[..., None] >> shifts) & 1).flatten(-2)[..., :nodes].bool()
    tree = tree.expand(batch, nodes, nodes)
    depth = tree.sum(-1) - 1  # [B, N]
    if offsets is None:
        offsets = torch.zeros_like(lengths)
    slot = torch.arange(slots, device=lengths.device)
    prefix = (slot >= offsets[:, None]) & (slot < lengths[:, None])  # [B, C]
    mask = prefix[:, None, :].expand(batch, nodes, slots) & (depth >= 0)[..., None]
    node = slot - lengths[:, None]  # [B, C], the node that lies in a slot
    inside = (node >= 0) & (node < nodes)
    node = node.clamp(0, nodes - 1)
    mask = mask | (tree.gather(2, node[:, None].expand(batch, nodes, slots)) & inside[:, None])
    if window > 0:
        query = (lengths - offsets)[:, None] + depth  # [B, N], logical positions
        key = torch.where(inside, query.gather(1, node), slot - offsets[:, None])  # [B, C]
        mask = mask & (query[:, :, None] - key[:, None] < window)
    return mask[:, None]


# ---- verify_tree, verify_logits ------------------------------------------------------------------


@op(
    "verify_tree(Tensor tokens, Tensor targets, Tensor parents) -> (Tensor, Tensor, Tensor, Tensor)"
)
def verify_tree(
    tokens: Tensor, targets: Tensor, parents: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Find the longest path of a draft tree that the model agrees with (arXiv 2406.17404, section
    3.3).

    A node is accepted if its token is its parent's target and its parent is accepted; the root
    always is. Of the accepted nodes the deepest wins; the lowest index breaks ties.

    Args:
        tokens: int64 [B, N], the draft.
        targets: int64 [B, N], the token the model itself puts after each node.
        parents: int32 [N] or [B, N].

    Returns:
        ``accept_length`` int64 [B], tokens gained: accepted drafts and the bonus token, >= 1;
        ``path`` int64 [B, N], the ``accept_length`` accepted nodes, root first, then -1;
        ``bonus`` int64 [B], the target of the last node of the path;
        ``continuation`` int64 [B, N], the rejected nodes on the way to the deepest node below the
        path's end (lowest index breaks ties), then -1: their logits are the next guesses (Jacobi).
    """
    verified = _new_verified(tokens)
    yield verified
    _C.verify_tree(tokens.contiguous(), targets.contiguous(), parents.contiguous(), *verified)


def _new_verified(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expect_dims("tokens", tokens, "[B, N]")
    accept_length = tokens.new_empty(tokens.shape[:1])
    path = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    return accept_length, path, torch.empty_like(accept_length), torch.empty_like(path)


@op(
    "verify_logits(Tensor logits, Tensor tokens, Tensor parents) -> (Tensor, Tensor, Tensor,"
    " Tensor, Tensor, Tensor)"
)
def verify_logits(logits: Tensor, tokens: Tensor, parents: Tensor) -> Iterator[VerifiedLogits]:
    """Verify greedily from the logits on: :func:`top_guesses`, whose first are the targets, and
    :func:`verify_tree`, in one launch on a GPU.

    Args:
        logits: [B, N, V] after every node, float16, bfloat16, float32 or (CPU only) float64; V <=
            2^27.
        tokens: int64 [B, N], the draft.
        parents: int32 [N] or [B, N].

    Returns:
        ``guesses`` int32 [B, N, 8], ``targets`` int64 [B, N], and what :func:`verify_tree` gives.
    """
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits has shape {list(logits.shape)}; expected [*{list(tokens.shape)}, V], as tokens"
        )
    outputs = new_verified_logits(tokens)
    yield outputs
    rows = dense_rows(logits.flatten(0, 1))
    inputs = rows, tokens.contiguous(), parents.contiguous()
    space = guesses_space(rows, len(tokens))
    _C.verify_logits(*inputs, outputs[0].flatten(0, 1), *outputs[1:], *space)


def new_verified_logits(tokens: Tensor) -> VerifiedLogits:
    """Return room for what :func:`verify_logits` returns."""
    guesses, verified = new_guesses(tokens[..., None]), _new_verified(tokens)
    return guesses, torch.empty_like(verified[1]), *verified


# ---- place_tree, commit_kv, advance_text ---------------------------------------------------------


@op(
    "place_tree(Tensor(a!) tokens, Tensor history, Tensor lengths, Tensor offsets, Tensor"
    " last_position, Tensor depth, int vocabulary) -> (Tensor, Tensor)"
)
def place_tree(
    tokens: Tensor,
    history: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    last_position: Tensor,
    depth: Tensor,
    vocabulary: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Put a draft after the text: its root, in place, and where its nodes stand.

    Args:
        tokens: int64 [B, N]; ``tokens[b, 0]`` becomes the last token of row b.
        history: int64 [B, C], contiguous; lengths: int64 [B], >= 1: the text.
        offsets: int64 [B], slots before a row's first token.
        last_position: int64 [B]: positions go no further.
        depth: int32 [N] or [B, N]; padding, -1, stands beside the root.
        vocabulary: >= 1; a last token that is none of it becomes its last one.

    Returns:
        ``positions`` int64 [B, N]; ``prefix`` int64 [B], the slots before the root.
    """
    expect_dims("tokens", tokens, "[B, N]")
    positions, prefix = tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape[0])
    yield positions, prefix
    _C.place_tree(
        tokens,
        history,
        lengths.contiguous(),
        offsets.contiguous(),
        last_position.contiguous(),
        depth.contiguous(),
        vocabulary,
        positions,
        prefix,
    )


@op("commit_kv(Tensor(a!)[] caches, Tensor lengths, Tensor path, Tensor accept_length) -> ()")
def commit_kv(
    caches: list[Tensor], lengths: Tensor, path: Tensor, accept_length: Tensor
) -> Iterator[None]:
    """Move the keys and values of the accepted path up to the end of the prefix, in place.

    For every cache, row b and i < accept_length[b]: slot ``lengths[b] + path[b, i]`` goes to slot
    ``lengths[b] + i``.

    Args:
        caches: tensors [B, heads, C, size] of any dtype and stride, keys and values of all layers;
            all in one launch.
        lengths: int64 [B], slots before the root.
        path: int64 [B, P], increasing along the path, as :func:`verify_tree` gives it.
        accept_length: int64 [B], at most P.
    """
    yield
    _C.commit_kv(caches, lengths, path.contiguous(), accept_length)


@op(
    "advance_text(Tensor(a!) history, Tensor(b!) lengths, Tensor(c!) remaining, Tensor targets,"
    " Tensor path, Tensor accept_length, Tensor ends, int vocabulary) -> (Tensor, Tensor)"
)
def advance_text(
    history: Tensor,
    lengths: Tensor,
    remaining: Tensor,
    targets: Tensor,
    path: Tensor,
    accept_length: Tensor,
    ends: Tensor,
    vocabulary: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Append the gained tokens, the targets along the accepted path, to every row's text, in place.

    A row takes the first ``accept_length`` of them, but no more than it may still gain, and none
    after an end of text; ``history`` from ``lengths`` on, ``lengths`` and ``remaining`` change.

    Args:
        history: int64 [B, C], contiguous, with room for what is gained.
        lengths: int64 [B], tokens of every row so far.
        remaining: int64 [B], tokens that a row may still gain; 0 once it has ended.
        targets, path, accept_length: int64 [B, N], [B, N] and [B], as :func:`verify_tree` takes and
            gives them.
        ends: int64 [E], the tokens that end a text.
        vocabulary: tokens are to be smaller.

    Returns:
        ``gained`` int64 [B, N], the target of each node of the path, root first, then rubbish;
        ``status`` int64 [3, B]: how many of them a row took, what it may still gain, and whether
        one that it took is none of the vocabulary.
    """
    expect_dims("targets", targets, "[B, N]")
    gained, status = targets.new_empty(targets.shape), targets.new_empty(3, targets.shape[0])
    yield gained, status
    _C.advance_text(
        history,
        lengths,
        remaining,
        targets.contiguous(),
        path.contiguous(),
        accept_length.contiguous(),
        ends.contiguous(),
        vocabulary,
        gained,
        status,
    )

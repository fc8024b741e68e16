"""The ops of a decoding step and of noisy training, each a :mod:`torch.library` op with a CPU and a
CUDA kernel.

Shapes: B rows of a batch, N tree nodes (1 to 256), W = ceil(N / 64) words, H query heads, H_kv key
and value heads, C cache slots, D and D_v head sizes. Trees are int32 (``parents``, ``depth``,
``rank``); tokens, lengths and everything torch indexes with are int64. ``parents[0]`` is -1 (the
root), a live node has ``0 <= parents[i] < i``, and a padding node, which is never accepted, has
``parents[i] == -1``. Wrong shapes, dtypes, devices and values raise :class:`ValueError`, which
names the argument; on CUDA, values are not read back: a malformed parent counts as padding and a
slot outside the cache is left alone.

The specification of each op is its plain PyTorch version in :mod:`msn_ext.ops.reference`.
"""

import threading

import torch  # before _C, which shares its OpenMP threads
from torch import Tensor

from msn_ext import _C

from .reference import (
    ADJACENT,
    DENOISED,
    FACTORS,
    GUESSES,
    LEVELS,
    MAX_NODES,
    NO_LABEL,
    NOISE,
    ORDERS,
    RETRIEVAL,
    SUFFIX,
    SUFFIXES,
)

__all__ = [
    "ADJACENT",
    "DENOISED",
    "FACTORS",
    "GUESSES",
    "LEVELS",
    "MAX_NODES",
    "NOISE",
    "NO_LABEL",
    "ORDERS",
    "RETRIEVAL",
    "SUFFIX",
    "SUFFIXES",
    "Workspace",
    "advance_text",
    "commit_kv",
    "draft_tree",
    "draw_noise",
    "fill_tree",
    "index_suffixes",
    "lookup_ngram",
    "remember_guesses",
    "top_guesses",
    "tree_ancestors",
    "tree_attention",
    "verify_logits",
    "verify_tree",
]

_library = torch.library.Library("msn_ext", "DEF")
_ops = torch.ops.msn_ext


def _register(schema: str, impl, fake):
    """Define an op and register its one Python implementation (the kernel picks the backend)."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, impl, "CPU")
    _library.impl(name, impl, "CUDA")
    torch.library.register_fake(f"msn_ext::{name}", fake, lib=_library)


class Workspace:
    """Where the blocks of a launch on a GPU leave sums and counts for each other.

    There is one per device and stream. Within ``with workspace:`` a thread's calls use this one
    instead, for recorded launches (CUDA graphs), whose memory nobody else may use and which must
    stay.
    """

    def __init__(self):
        self._floats: list[Tensor] = []
        self._counters: list[Tensor] = []

    def get(self, like: Tensor, floats: int, counters: int) -> tuple[Tensor, Tensor]:
        """float32 [floats or more], and int32 [counters or more] that are 0 between launches."""
        return self._last(self._floats, like, floats, torch.float32), self._last(
            self._counters, like, counters, torch.int32
        )

    @staticmethod
    def _last(buffers: list[Tensor], like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """One that is large enough. The smaller ones before it stay: recorded launches know where
        they are.
        """
        if not buffers or len(buffers[-1]) < size:
            buffers.append(
                like.new_zeros(max(size, 2 * len(buffers[-1]) if buffers else 0), dtype=dtype)
            )
        return buffers[-1]

    def __enter__(self) -> None:
        _own.workspace, self._before = self, getattr(_own, "workspace", None)

    def __exit__(self, *error) -> None:
        _own.workspace = self._before


_own = threading.local()
_workspaces: dict[tuple[int, int], Workspace] = {}


def _workspace(like: Tensor, floats: int, counters: int) -> tuple[Tensor, Tensor]:
    space = getattr(_own, "workspace", None)
    if space is None:
        key = like.device.index, torch.cuda.current_stream(like.device).cuda_stream
        space = _workspaces.setdefault(key, Workspace())
    return space.get(like, floats, counters)


# ---- tree_ancestors ------------------------------------------------------------------------------


def tree_ancestors(parents: Tensor, *, validate: bool = True) -> tuple[Tensor, Tensor]:
    """Ancestor bits and depth of every node of a draft tree.

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
    ancestors, depth = _ops.tree_ancestors(parents)
    if validate and parents.is_cuda:
        node = torch.arange(parents.shape[-1], device=parents.device)
        bad = (parents < -1) | (parents >= node)
        if bool(bad.any()):
            at = int(bad.nonzero()[0, -1])
            expected = f"-1 or a node in [0, {at - 1}]" if at else "-1"
            raise ValueError(f"parents[{at}] is {int(parents[bad][0])}; expected {expected}")
    return ancestors, depth


def _tree_ancestors_outputs(parents: Tensor) -> tuple[Tensor, Tensor]:
    nodes = parents.shape[-1] if parents.dim() else 0
    ancestors = parents.new_empty((*parents.shape, (nodes + 63) // 64), dtype=torch.int64)
    return ancestors, torch.empty_like(parents, memory_format=torch.contiguous_format)


def _tree_ancestors_impl(parents: Tensor) -> tuple[Tensor, Tensor]:
    ancestors, depth = _tree_ancestors_outputs(parents)
    _C.tree_ancestors(parents.contiguous(), ancestors, depth)
    return ancestors, depth


_register(
    "tree_ancestors(Tensor parents) -> (Tensor, Tensor)",
    _tree_ancestors_impl,
    _tree_ancestors_outputs,
)


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
    """Attention of the nodes of a draft tree: the whole prefix and their own ancestors.

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
    return _ops.tree_attention(
        q, k_cache, v_cache, lengths, ancestors, offsets, scale, window, softcap, sinks
    )


def _tree_attention_output(
    q, k_cache, v_cache, lengths, ancestors, offsets, scale, window, softcap, sinks
):
    if q.dim() != 4 or v_cache.dim() != 4:
        raise ValueError(
            f"q and v_cache have shapes {list(q.shape)} and {list(v_cache.shape)}; expected 4"
            " dimensions"
        )
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v_cache.shape[3])


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _tree_attention_impl(
    q, k_cache, v_cache, lengths, ancestors, offsets, scale, window, softcap, sinks
):
    out = _tree_attention_output(
        q, k_cache, v_cache, lengths, ancestors, offsets, scale, window, softcap, sinks
    )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    q, k_cache, v_cache = _dense_rows(q), _dense_rows(k_cache), _dense_rows(v_cache)
    space = _workspace(q, *_C.attention_space(q, k_cache, v_cache)) if q.is_cuda else (None, None)
    _C.tree_attention(
        q, k_cache, v_cache, lengths, offsets, ancestors, sinks, scale, window, softcap, out, *space
    )
    return out


_register(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor ancestors,"
    " Tensor? offsets, float? scale, int window, float softcap, Tensor? sinks) -> Tensor",
    _tree_attention_impl,
    _tree_attention_output,
)


# ---- verify_tree ---------------------------------------------------------------------------------


def verify_tree(
    tokens: Tensor, targets: Tensor, parents: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The longest path of a draft tree that the model agrees with (arXiv 2406.17404, section 3.3).

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
    return _ops.verify_tree(tokens, targets, parents)


def _verify_tree_outputs(tokens: Tensor, targets: Tensor, parents: Tensor):
    if tokens.dim() != 2:
        raise ValueError(f"tokens has shape {list(tokens.shape)}; expected [B, N]")
    row = tokens.new_empty(tokens.shape[:1])
    return (
        row,
        tokens.new_empty(tokens.shape),
        torch.empty_like(row),
        tokens.new_empty(tokens.shape),
    )


def _verify_tree_impl(tokens: Tensor, targets: Tensor, parents: Tensor):
    out = _verify_tree_outputs(tokens, targets, parents)
    _C.verify_tree(tokens.contiguous(), targets.contiguous(), parents.contiguous(), *out)
    return out


_register(
    "verify_tree(Tensor tokens, Tensor targets, Tensor parents) -> (Tensor, Tensor, Tensor,"
    " Tensor)",
    _verify_tree_impl,
    _verify_tree_outputs,
)


# ---- verify_logits -------------------------------------------------------------------------------


def verify_logits(
    logits: Tensor, tokens: Tensor, parents: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Greedy verification from the logits on: :func:`top_guesses`, whose first are the targets, and
    :func:`verify_tree`, in one launch on a GPU.

    Args:
        logits: [B, N, V] behind every node, float16, bfloat16, float32 or (CPU only) float64; V <=
        2^27.
        tokens: int64 [B, N], the draft.
        parents: int32 [N] or [B, N].

    Returns:
        ``guesses`` int32 [B, N, 8], ``targets`` int64 [B, N], and what :func:`verify_tree` gives.
    """
    return _ops.verify_logits(logits, tokens, parents)


def _verify_logits_outputs(logits: Tensor, tokens: Tensor, parents: Tensor):
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits has shape {list(logits.shape)}; expected [*{list(tokens.shape)}, V], as tokens"
        )
    accepted, path, bonus, continuation = _verify_tree_outputs(tokens, tokens, parents)
    return (
        _top_guesses_output(logits),
        tokens.new_empty(tokens.shape),
        accepted,
        path,
        bonus,
        continuation,
    )


def _verify_logits_impl(logits: Tensor, tokens: Tensor, parents: Tensor):
    out = _verify_logits_outputs(logits, tokens, parents)
    rows, batch = _dense_rows(logits.reshape(-1, logits.shape[-1])), len(tokens)
    arrived = (
        _workspace(tokens, 0, batch)[1]
        if tokens.is_cuda
        else tokens.new_zeros(batch, dtype=torch.int32)
    )
    guesses = out[0].view(-1, GUESSES)
    _C.verify_logits(rows, tokens.contiguous(), parents.contiguous(), guesses, *out[1:], arrived)
    return out


_register(
    "verify_logits(Tensor logits, Tensor tokens, Tensor parents) -> (Tensor, Tensor, Tensor,"
    " Tensor, Tensor, Tensor)",
    _verify_logits_impl,
    _verify_logits_outputs,
)


# ---- commit_kv -----------------------------------------------------------------------------------


def commit_kv(caches: list[Tensor], lengths: Tensor, path: Tensor, accept_length: Tensor) -> None:
    """Move the keys and values of the accepted path up behind the prefix, in place.

    For every cache, row b and i < accept_length[b]: slot ``lengths[b] + path[b, i]`` goes to slot
    ``lengths[b] + i``.

    Args:
        caches: tensors [B, heads, C, size] of any dtype and stride, keys and values of all layers;
            all in one launch.
        lengths: int64 [B], slots before the root.
        path: int64 [B, P], increasing along the path, as :func:`verify_tree` gives it.
        accept_length: int64 [B], at most P.
    """
    _ops.commit_kv(caches, lengths, path, accept_length)


def _commit_kv_impl(caches, lengths, path, accept_length) -> None:
    _C.commit_kv(caches, lengths, path.contiguous(), accept_length)


_register(
    "commit_kv(Tensor(a!)[] caches, Tensor lengths, Tensor path, Tensor accept_length) -> ()",
    _commit_kv_impl,
    lambda caches, lengths, path, accept_length: None,
)


# ---- advance_text --------------------------------------------------------------------------------


def advance_text(
    history: Tensor,
    lengths: Tensor,
    remaining: Tensor,
    targets: Tensor,
    path: Tensor,
    accept_length: Tensor,
    ends: Tensor,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Put the gained tokens, the targets along the accepted path, behind every row's text, in
    place.

    A row takes the first ``accept_length`` of them, but no more than it may still gain, and none
    behind an end of text; ``history`` from ``lengths`` on, ``lengths`` and ``remaining`` change.

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
    return _ops.advance_text(
        history, lengths, remaining, targets, path, accept_length, ends, vocabulary
    )


def _advance_text_outputs(
    history, lengths, remaining, targets, path, accept_length, ends, vocabulary
):
    if targets.dim() != 2:
        raise ValueError(f"targets has shape {list(targets.shape)}; expected [B, N]")
    return targets.new_empty(targets.shape), targets.new_empty(3, targets.shape[0])


def _advance_text_impl(history, lengths, remaining, targets, path, accept_length, ends, vocabulary):
    out = _advance_text_outputs(
        history, lengths, remaining, targets, path, accept_length, ends, vocabulary
    )
    _C.advance_text(
        history,
        lengths,
        remaining,
        targets.contiguous(),
        path.contiguous(),
        accept_length.contiguous(),
        ends.contiguous(),
        vocabulary,
        *out,
    )
    return out


_register(
    "advance_text(Tensor(a!) history, Tensor(b!) lengths, Tensor(c!) remaining, Tensor targets,"
    " Tensor path, Tensor accept_length, Tensor ends, int vocabulary) -> (Tensor, Tensor)",
    _advance_text_impl,
    _advance_text_outputs,
)


# ---- lookup_ngram --------------------------------------------------------------------------------


def lookup_ngram(
    history: Tensor, lengths: Tensor, max_ngram: int, length: int
) -> tuple[Tensor, Tensor]:
    """What followed the longest earlier match of the text's end (arXiv 2406.17404, appendix B).

    The longest suffix of ``history[b, :lengths[b]]`` of at most ``max_ngram`` tokens that also
    ends earlier is looked up; of several matches the most recent one counts.

    Args:
        history: int64 [B, C], the tokens so far; what lies behind ``lengths`` is not read.
        lengths: int64 [B], 1 <= lengths <= C.
        max_ngram: longest suffix to look for, >= 1.
        length: how many tokens to return, >= 0.

    Returns:
        ``tokens`` int64 [B, length], what followed the match, -1 past the end of the text or where
        nothing matched; ``matched`` int64 [B], tokens that matched (0: none).
    """
    return _ops.lookup_ngram(history, lengths, max_ngram, length)


def _lookup_ngram_outputs(history: Tensor, lengths: Tensor, max_ngram: int, length: int):
    if history.dim() != 2:
        raise ValueError(f"history has shape {list(history.shape)}; expected [B, C]")
    if length < 0:
        raise ValueError(f"length is {length}; expected 0 or more")
    return history.new_empty(history.shape[0], length), torch.empty_like(lengths)


def _lookup_ngram_impl(history: Tensor, lengths: Tensor, max_ngram: int, length: int):
    out = _lookup_ngram_outputs(history, lengths, max_ngram, length)
    _C.lookup_ngram(history.contiguous(), lengths, max_ngram, *out)
    return out


_register(
    "lookup_ngram(Tensor history, Tensor lengths, int max_ngram, int length) -> (Tensor, Tensor)",
    _lookup_ngram_impl,
    _lookup_ngram_outputs,
)


# ---- fill_tree -----------------------------------------------------------------------------------


def fill_tree(
    candidates: Tensor,
    retrieved: Tensor,
    history: Tensor,
    lengths: Tensor,
    depth: Tensor,
    rank: Tensor,
    seed: Tensor,
) -> Tensor:
    """The tokens of a draft tree with a fixed shape (arXiv 2406.17404, section 3.3, appendix B).

    The root is the last token of the text. A node at depth d takes ``candidates[b, d - 1, rank]``,
    or with rank -1 ``retrieved[b, d - 1]``; where that is missing or -1, *ahead noise*: a token
    drawn uniformly from the text so far (Eq. 4) by a counter-based generator (SplitMix64 of seed,
    row, position and node), the same on every device.

    Args:
        candidates: int64 [B, depths, ranks], likeliest tokens first; -1: none.
        retrieved: int64 [B, R]; -1: none.
        history: int64 [B, C]; lengths: int64 [B], >= 1.
        depth: int32 [N] or [B, N]; rank: int32 [N].
        seed: int64 [1].

    Returns:
        int64 [B, N].
    """
    return _ops.fill_tree(candidates, retrieved, history, lengths, depth, rank, seed)


def _fill_tree_output(candidates, retrieved, history, lengths, depth, rank, seed):
    if history.dim() != 2 or rank.dim() != 1:
        raise ValueError(
            f"history and rank have shapes {list(history.shape)} and {list(rank.shape)}; expected"
            " [B, C] and [N]"
        )
    return history.new_empty(history.shape[0], rank.shape[0])


def _fill_tree_impl(candidates, retrieved, history, lengths, depth, rank, seed):
    out = _fill_tree_output(candidates, retrieved, history, lengths, depth, rank, seed)
    _C.fill_tree(
        candidates.contiguous(),
        retrieved.contiguous(),
        history.contiguous(),
        lengths,
        depth.contiguous(),
        rank.contiguous(),
        seed,
        out,
    )
    return out


_register(
    "fill_tree(Tensor candidates, Tensor retrieved, Tensor history, Tensor lengths, Tensor depth,"
    " Tensor rank, Tensor seed) -> Tensor",
    _fill_tree_impl,
    _fill_tree_output,
)


# ---- top_guesses ---------------------------------------------------------------------------------


def top_guesses(logits: Tensor) -> Tensor:
    """The eight likeliest tokens of every row of logits and how likely each is among them.

    A *guess* is ``token * 16 + level``. The level is the number of :data:`.reference.EDGES` that
    are no larger than the token's probability in a softmax over the eight (which needs no sum over
    the vocabulary, and so no second pass).

    Args:
        logits: [..., V], float16, bfloat16, float32 or (CPU only) float64; V <= 2^27.

    Returns:
        int32 [..., 8], likeliest first (NaN before everything, as in arg-max; the lowest token of
        equals), -1 where V < 8.
    """
    return _ops.top_guesses(logits)


def _top_guesses_output(logits: Tensor) -> Tensor:
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits has shape {list(logits.shape)}; expected [..., V], V at least 1")
    return logits.new_empty((*logits.shape[:-1], GUESSES), dtype=torch.int32)


def _top_guesses_impl(logits: Tensor) -> Tensor:
    out = _top_guesses_output(logits)
    rows = logits.reshape(-1, logits.shape[-1])
    _C.top_guesses(
        _dense_rows(rows) if len(rows) else rows.new_empty(rows.shape), out.view(-1, GUESSES)
    )
    return out


_register("top_guesses(Tensor logits) -> Tensor", _top_guesses_impl, _top_guesses_output)


# ---- index_suffixes ------------------------------------------------------------------------------


def index_suffixes(heads: Tensor, history: Tensor, start: Tensor, lengths: Tensor) -> None:
    """Note where the last 1, 2, 3, 4, 6, 8, 12 and 16 tokens before every new token stood, in
    place.

    For every row b, place ``max(1, start[b]) <= e < lengths[b]`` and n-gram length, the slot of the
    n-gram that ends before e becomes e. So a slot holds the most recent place, and a token costs
    the same however long the text is. A negative number, such as -1 between two documents, is no
    token: it is in no n-gram, and no n-gram ends before it.

    Args:
        heads: int32 [B, 8, S], zeros at first; n-grams share slots where their hashes do.
        history: int64 [B, C], C < 2^31.
        start: int64 [B], the places before it are indexed already.
        lengths: int64 [B], tokens in the text.
    """
    _ops.index_suffixes(heads, history, start, lengths)


def _index_suffixes_impl(heads, history, start, lengths) -> None:
    _C.index_suffixes(heads, history.contiguous(), start, lengths)


_register(
    "index_suffixes(Tensor(a!) heads, Tensor history, Tensor start, Tensor lengths) -> ()",
    _index_suffixes_impl,
    lambda heads, history, start, lengths: None,
)


# ---- remember_guesses ----------------------------------------------------------------------------


def remember_guesses(
    contexts: Tensor,
    history: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    parents: Tensor,
    path: Tensor,
    guesses: Tensor,
) -> None:
    """Remember, for the last 1, 2 and 3 tokens at every node of a draft, what the model guessed
    next.

    Nodes with one context: later rows over earlier ones, in a row the accepted path over the rest,
    then the higher index. Padding is left out.

    Args:
        contexts: int32 [3, S, 9], zeros at first, changed in place: of an order and a hash slot,
            what tells contexts apart (0: empty) and the guesses.
        history: int64 [B, C]; lengths: int64 [B], >= 1: the text before the pass; its end is the
        root.
        tokens: int64 [B, N]; parents: int32 [N] or [B, N]: the draft.
        path: int64 [B, N], as :func:`verify_tree` gives it.
        guesses: int32 [B, N, 8], as :func:`top_guesses` gives them.
    """
    _ops.remember_guesses(contexts, history, lengths, tokens, parents, path, guesses)


def _remember_guesses_impl(contexts, history, lengths, tokens, parents, path, guesses) -> None:
    rest = (x.contiguous() for x in (history, lengths, tokens, parents, path, guesses))
    _C.remember_guesses(contexts, *rest)


_register(
    "remember_guesses(Tensor(a!) contexts, Tensor history, Tensor lengths, Tensor tokens, Tensor"
    " parents, Tensor path, Tensor guesses) -> ()",
    _remember_guesses_impl,
    lambda contexts, history, lengths, tokens, parents, path, guesses: None,
)


# ---- draft_tree ----------------------------------------------------------------------------------


def draft_tree(
    history: Tensor,
    lengths: Tensor,
    denoised: Tensor,
    contexts: Tensor,
    heads: Tensor,
    corpus: Tensor,
    corpus_heads: Tensor,
    factors: Tensor,
    nodes: int,
    max_depth: int,
    foresight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best ``nodes`` nodes of the tree of everything that any source guesses.

    What may follow a node is what its sources list: the denoised guesses of its depth (arXiv
    2406.17404, section 3.3), those remembered after its last 1, 2 and 3 tokens (Token Recycling,
    arXiv 2408.08696, has the first), and the tokens that followed the last places of its longest
    n-grams: in the text, or where an n-gram has no place there, in the corpus. A token's score is a
    bias times the factor of every source that lists it; its probability given the node is its score
    over 1 (nothing of all this) plus all scores, at most 0.99, and that of a path is the product.

    Nodes are added one by one: of all children of those in the tree always the most valuable. A
    node's value is its probability; the likeliest child of a node (noise, a token of the text, if
    there is no guess) is worth ``foresight`` times its parent's probability more, for if the
    accepted path ends there, what the model says below is a guess of the next step. Of equals the
    one whose parent comes first wins, then denoised guesses before remembered ones before suffixes.
    So the first n nodes are the tree of n nodes, and without foresight no other tree of n nodes has
    a larger expected accept length.

    Args:
        history: int64 [B, C]; lengths: int64 [B], >= 1: the text, whose end is the root.
        denoised: int32 [B, D, 8], guesses for the D next tokens; -1: none.
        contexts: int32 [3, S, 9], of :func:`remember_guesses`; S = 0: none.
        heads: int32 [B, 8, S'], of :func:`index_suffixes`; S' = 0: none.
        corpus: int32 [T], T < 2^31, other texts, for all rows; T = 0: none. A negative number
            stands between them: it matches nothing and is no guess.
        corpus_heads: int32 [8, S''], as ``heads``, of the corpus; S'' = 0: none. What points
            outside the corpus counts as nothing, on every device.
        factors: float64 [348], each 1e-9 to 1e9; :mod:`.reference` has their places.
        nodes: N, root included, 1 to 256.
        max_depth: of any node, 0 to 256.
        foresight: 0 to 1; 0: probability alone counts, and there is no noise.

    Returns:
        ``tokens`` int64 [B, N]; ``parents`` int32 [B, N], -1 at the root and where nothing was left
        to guess; ``probability`` float64 [B, N], that the node will be accepted: their sum is the
        expected accept length; ``sources`` int32 [B, N], the sum of 1 (denoised), 2 (remembered), 4
        (suffix), 8 (noise).
    """
    return _ops.draft_tree(
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
    )


def _draft_tree_outputs(
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
    if history.dim() != 2:
        raise ValueError(f"history has shape {list(history.shape)}; expected [B, C]")
    shape = history.shape[0], nodes
    tokens, parents = history.new_empty(shape), history.new_empty(shape, dtype=torch.int32)
    return tokens, parents, history.new_empty(shape, dtype=torch.float64), torch.empty_like(parents)


def _draft_tree_impl(
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
    if not 1 <= nodes <= MAX_NODES:
        raise ValueError(f"nodes is {nodes}; expected 1 to {MAX_NODES}")
    tables = history, lengths, denoised, contexts, heads, corpus, corpus_heads, factors
    out = _draft_tree_outputs(*tables, nodes, max_depth, foresight)
    _C.draft_tree(*(x.contiguous() for x in tables), max_depth, foresight, *out)
    return out


_register(
    "draft_tree(Tensor history, Tensor lengths, Tensor denoised, Tensor contexts, Tensor heads,"
    " Tensor corpus, Tensor corpus_heads, Tensor factors, int nodes, int max_depth, float"
    " foresight) -> (Tensor, Tensor, Tensor, Tensor)",
    _draft_tree_impl,
    _draft_tree_outputs,
)


# ---- draw_noise ----------------------------------------------------------------------------------


def draw_noise(
    input_ids: Tensor,
    labels: Tensor,
    documents: Tensor,
    keep_token_ids: Tensor,
    starts: Tensor,
    seed: int,
    length: int,
    random: float = 0.0,
    vocabulary: int = 0,
    apart: bool = True,
) -> tuple[Tensor, Tensor]:
    """Where noise goes in every sample of a batch, and what it is (arXiv 2406.17404, Eq. 3 and 4).

    A document's response are its tokens with a label other than -100, but for the document's first.
    A segment starts anywhere in it with equal chance where ``length`` tokens of one response
    follow, or at the beginning of a shorter response, which it fills. The noise of a place is a
    token drawn with equal chance from the document's clean tokens before it, or from the
    vocabulary. What is drawn depends on the seed, the document's tokens and the number of the
    segment alone, not on the batch that the document comes in.

    Args:
        input_ids, labels: int64 [B, T].
        documents: int64 [D, 3]: row, begin and end (one past the last token) of every sample.
        keep_token_ids: int64 [K], ascending: tokens that are neither replaced nor drawn.
        starts: int64 [D, S], 1 to 256 segments each: columns where segments shall start; -1: drawn.
        seed: any 64-bit integer.
        length: of a segment, 1 to 64.
        random: 0 to 1, the share of tokens that are drawn from the vocabulary.
        vocabulary: its size; needed where ``random`` is not 0.
        apart: segments of a document do not overlap; else their starts differ.

    Returns:
        The starts int64 [D, S], -1 where there was no room left; the noise int64 [D, S, L], -1
        behind the end of a segment that is shorter.

    Raises:
        ValueError: also where a given start is not in the document's response (on CUDA it counts as
            no segment).
    """
    return _ops.draw_noise(
        input_ids,
        labels,
        documents,
        keep_token_ids,
        starts,
        seed,
        length,
        random,
        vocabulary,
        apart,
    )


def _draw_noise_outputs(
    input_ids, labels, documents, keep_token_ids, starts, seed, length, random, vocabulary, apart
):
    if starts.dim() != 2:
        raise ValueError(f"starts has shape {list(starts.shape)}; expected [D, S]")
    return torch.empty_like(starts, memory_format=torch.contiguous_format), starts.new_empty(
        *starts.shape, max(length, 0)
    )


def _draw_noise_impl(
    input_ids, labels, documents, keep_token_ids, starts, seed, length, random, vocabulary, apart
):
    out = _draw_noise_outputs(
        input_ids,
        labels,
        documents,
        keep_token_ids,
        starts,
        seed,
        length,
        random,
        vocabulary,
        apart,
    )
    out[0].copy_(starts)
    inputs = (x.contiguous() for x in (input_ids, labels, documents, keep_token_ids))
    _C.draw_noise(*inputs, seed, random, vocabulary, apart, *out)
    return out


_register(
    "draw_noise(Tensor input_ids, Tensor labels, Tensor documents, Tensor keep_token_ids, Tensor"
    " starts, int seed, int length, float random, int vocabulary, bool apart) -> (Tensor, Tensor)",
    _draw_noise_impl,
    _draw_noise_outputs,
)

"""Ops that draft: what is known of what may come, and the trees that are made of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from msn_ext import _C

from .registration import dense_rows, expect_dims, op
from .workspace import workspace

# ---- drafts of a fixed shape: lookup_ngram, fill_tree --------------------------------------------


@op("lookup_ngram(Tensor history, Tensor lengths, int max_ngram, int length) -> (Tensor, Tensor)")
def lookup_ngram(
    history: Tensor, lengths: Tensor, max_ngram: int, length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return what followed the longest earlier match of the text's end (arXiv 2406.17404, appendix
    B).

    The longest suffix of ``history[b, :lengths[b]]`` of at most ``max_ngram`` tokens that also
    ends earlier is looked up; of several matches the most recent one counts.

    Args:
        history: int64 [B, C], the tokens so far; what lies past ``lengths`` is not read.
        lengths: int64 [B], 1 <= lengths <= C.
        max_ngram: longest suffix to look for, >= 1.
        length: how many tokens to return, >= 0.

    Returns:
        ``tokens`` int64 [B, length], what followed the match, -1 past the end of the text or where
        nothing matched; ``matched`` int64 [B], tokens that matched (0: none).
    """
    expect_dims("history", history, "[B, C]")
    if length < 0:
        raise ValueError(f"length is {length}; expected 0 or more")
    tokens, matched = history.new_empty(history.shape[0], length), torch.empty_like(lengths)
    yield tokens, matched
    _C.lookup_ngram(history.contiguous(), lengths, max_ngram, tokens, matched)


@op(
    "fill_tree(Tensor candidates, Tensor retrieved, Tensor history, Tensor lengths, Tensor depth,"
    " Tensor rank, Tensor seed) -> Tensor"
)
def fill_tree(
    candidates: Tensor,
    retrieved: Tensor,
    history: Tensor,
    lengths: Tensor,
    depth: Tensor,
    rank: Tensor,
    seed: Tensor,
) -> Iterator[Tensor]:
    """Choose the tokens of a draft tree with a fixed shape (arXiv 2406.17404, section 3.3, appendix
    B).

    The root is the last token of the text. A node at depth d takes ``candidates[b, d - 1, rank]``,
    or with rank -1 (:data:`.RETRIEVAL`) ``retrieved[b, d - 1]``; where that is missing or -1,
    *ahead noise*: a token drawn uniformly from the text so far (Eq. 4) by a counter-based generator
    (SplitMix64 of seed, row, position and node), the same on every device.

    Args:
        candidates: int64 [B, depths, ranks], likeliest tokens first; -1: none.
        retrieved: int64 [B, R]; -1: none.
        history: int64 [B, C]; lengths: int64 [B], >= 1.
        depth: int32 [N] or [B, N]; rank: int32 [N].
        seed: int64 [1].

    Returns:
        int64 [B, N].
    """
    expect_dims("history", history, "[B, C]")
    expect_dims("rank", rank, "[N]")
    tokens = history.new_empty(history.shape[0], rank.shape[0])
    yield tokens
    candidates, retrieved, history = (x.contiguous() for x in (candidates, retrieved, history))
    depth, rank = depth.contiguous(), rank.contiguous()
    _C.fill_tree(candidates, retrieved, history, lengths, depth, rank, seed, tokens)


# ---- what best-first drafting knows: top_guesses, index_suffixes, remember_guesses ---------------


@op("top_guesses(Tensor logits) -> Tensor")
def top_guesses(logits: Tensor) -> Iterator[Tensor]:
    """Return the eight likeliest tokens of every row of logits and how likely each is among them.

    A *guess* is ``token * 16 + level``. The level is the number of :data:`.EDGES` that are no
    larger than the token's probability in a softmax over the eight (which needs no sum over the
    vocabulary, and so no second pass).

    Args:
        logits: [..., V], float16, bfloat16, float32 or (CPU only) float64; V <= 2^27.

    Returns:
        int32 [..., 8], likeliest first (NaN before everything, as in arg-max; the lowest token of
        equals), -1 where V < 8.
    """
    guesses = new_guesses(logits)
    yield guesses
    rows = logits.reshape(-1, logits.shape[-1])
    rows = dense_rows(rows) if len(rows) else rows.new_empty(rows.shape)
    _C.top_guesses(rows, guesses.view(-1, _C.GUESSES), *guesses_space(rows))


def guesses_space(rows: Tensor, counters: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """Return memory for the blocks that share a row of logits [rows, V] on a GPU, and for so many
    counters more.
    """
    if not rows.is_cuda:
        return None, None
    floats, rows_counters = _C.guesses_space(rows)
    return workspace(rows, floats, rows_counters + counters)


def new_guesses(logits: Tensor) -> Tensor:
    """Return room for the guesses of logits [..., V], int32 [..., 8]."""
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits has shape {list(logits.shape)}; expected [..., V], V at least 1")
    return logits.new_empty((*logits.shape[:-1], _C.GUESSES), dtype=torch.int32)


@op("index_suffixes(Tensor(a!) suffixes, Tensor history, Tensor start, Tensor lengths) -> ()")
def index_suffixes(
    suffixes: Tensor, history: Tensor, start: Tensor, lengths: Tensor
) -> Iterator[None]:
    """Note where the last 1, 2, 3, 4, 6, 8, 12 and 16 tokens before every new token stood, in
    place.

    For every row b, place ``max(1, start[b]) <= e < lengths[b]`` and n-gram length, the slot of the
    n-gram that ends before e becomes e. So a slot holds the most recent place, and a token costs
    the same however long the text is. A negative number, such as -1 between two texts, is no token:
    it is in no n-gram, and no n-gram ends before it.

    Args:
        suffixes: int32 [B, 8, S], zeros at first; n-grams share slots where their hashes do.
        history: int64 [B, C], C < 2^31.
        start: int64 [B], the places before it are indexed already.
        lengths: int64 [B], tokens in the text.
    """
    yield
    _C.index_suffixes(suffixes, history.contiguous(), start, lengths)


@op(
    "remember_guesses(Tensor(a!) adjacency, Tensor history, Tensor lengths, Tensor tokens, Tensor"
    " parents, Tensor path, Tensor guesses) -> ()"
)
def remember_guesses(
    adjacency: Tensor,
    history: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    parents: Tensor,
    path: Tensor,
    guesses: Tensor,
) -> Iterator[None]:
    """Remember, for the last 1, 2 and 3 tokens at every node of a draft, what the model guessed
    next.

    Nodes with one context: later rows over earlier ones, in a row the accepted path over the rest,
    then the higher index. Padding is left out.

    Args:
        adjacency: int32 [3, S, 9], zeros at first, changed in place: of an order and a hash slot,
            what tells contexts apart (0: empty) and the guesses.
        history: int64 [B, C]; lengths: int64 [B], >= 1: the text before the pass; its end is the
            root.
        tokens: int64 [B, N]; parents: int32 [N] or [B, N]: the draft.
        path: int64 [B, N], as :func:`verify_tree` gives it.
        guesses: int32 [B, N, 8], as :func:`top_guesses` gives them.
    """
    yield
    seen = (x.contiguous() for x in (history, lengths, tokens, parents, path, guesses))
    _C.remember_guesses(adjacency, *seen)


@op("keep_continuation(Tensor(a!) denoised, Tensor guesses, Tensor continuation) -> ()")
def keep_continuation(denoised: Tensor, guesses: Tensor, continuation: Tensor) -> Iterator[None]:
    """Keep the guesses at the rejected nodes below the accepted path, by depth, in place: the next
    tree's denoised guesses (Jacobi iteration; arXiv 2406.17404, section 3.3).

    Args:
        denoised: int32 [B, depths, 8]: ``denoised[b, d]`` becomes what was guessed at
            ``continuation[b, d]``, -1 where there is none.
        guesses: int32 [B, N, 8], as :func:`top_guesses` gives them.
        continuation: int64 [B, N], as :func:`verify_tree` gives it.
    """
    yield
    _C.keep_continuation(denoised, guesses.contiguous(), continuation.contiguous())


@op(
    "keep_tail(Tensor(a!) denoised, Tensor(b!) factors, Tensor tables, Tensor guesses, Tensor"
    " continuation, Tensor path, Tensor accept_length, Tensor ends, int length) -> ()"
)
def keep_tail(
    denoised: Tensor,
    factors: Tensor,
    tables: Tensor,
    guesses: Tensor,
    continuation: Tensor,
    path: Tensor,
    accept_length: Tensor,
    ends: Tensor,
    length: int,
) -> Iterator[None]:
    """Keep the guesses of the tail at the end of the accepted path, in place: the next tree's
    denoised guesses. In a row without a tail there, those that :func:`keep_continuation` keeps.

    Args:
        denoised: int32 [B, depths, 8]: ``denoised[b, d]`` becomes what was guessed at the tail's
            row d, -1 where it has none.
        factors: float64 [B, 348], becomes ``tables[1]`` in a row with a tail, else ``tables[0]``.
        tables: float64 [2, 348], of :func:`draft_tree`.
        guesses: int32 [B, N, 8], as :func:`top_guesses` gives them; the last K * length nodes are
            tails.
        continuation, path: int64 [B, N], accept_length: int64 [B], as :func:`verify_tree` gives
            them.
        ends: int64 [B, K], the node above each tail; -1: none.
        length: rows of a tail, >= 1.
    """
    yield
    _C.keep_tail(
        denoised,
        factors,
        tables.contiguous(),
        guesses.contiguous(),
        continuation.contiguous(),
        path.contiguous(),
        accept_length.contiguous(),
        ends.contiguous(),
        length,
    )


# ---- draft_tree, append_tails --------------------------------------------------------------------


# Longer than 60 lines by what is said of its twelve arguments; the code has ten.
@op(
    "draft_tree(Tensor history, Tensor lengths, Tensor denoised, Tensor adjacency, Tensor habits,"
    " Tensor suffixes, Tensor corpus, Tensor corpus_suffixes, Tensor factors, int nodes, int"
    " max_depth, float foresight) -> (Tensor, Tensor, Tensor, Tensor)"
)
def draft_tree(
    history: Tensor,
    lengths: Tensor,
    denoised: Tensor,
    adjacency: Tensor,
    habits: Tensor,
    suffixes: Tensor,
    corpus: Tensor,
    corpus_suffixes: Tensor,
    factors: Tensor,
    nodes: int,
    max_depth: int,
    foresight: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Draft the best ``nodes`` nodes of the tree of everything that any source guesses.

    What may follow a node is what its sources list: the denoised guesses of its depth (arXiv
    2406.17404, section 3.3), those remembered after its last 1, 2 and 3 tokens (the adjacency
    table; Token Recycling, arXiv 2408.08696, has the first), or where one has nothing there, the
    habits; and the tokens that followed the last places of its longest n-grams: in the text, or
    where an n-gram has no place there, in the corpus. A token's score is a bias times the factor of
    every source that lists it; its probability given the node is its score over 1 (nothing of all
    this) plus all scores, at most 0.99, and that of a path is the product.

    Nodes are added one by one: of all children of those in the tree always the most valuable. A
    node's value is its probability; the likeliest child of a node (noise, a token of the text, if
    there is no guess) is worth ``foresight`` times its parent's probability more, for if the
    accepted path ends there, what the model says below is a guess of the next step. Of equals the
    one whose parent comes first wins, then denoised guesses before adjacent ones before suffixes.
    So the first n nodes are the tree of n nodes, and without foresight no other tree of n nodes has
    a larger expected accept length.

    Args:
        history: int64 [B, C]; lengths: int64 [B], >= 1: the text, whose end is the root.
        denoised: int32 [B, D, 8], guesses for the D next tokens; -1: none.
        adjacency: int32 [3, S, 9], of :func:`remember_guesses`; S = 0: none.
        habits: int32 [3, S*, 9], the same, of contexts that ``adjacency`` does not have; S* = 0:
            none.
        suffixes: int32 [B, 8, S'], of :func:`index_suffixes`; S' = 0: none.
        corpus: int32 [T], T < 2^31, other texts, for all rows; T = 0: none. A negative number
            stands between them: it matches nothing and is no guess.
        corpus_suffixes: int32 [8, S''], as ``suffixes``, of the corpus; S'' = 0: none. What points
            outside the corpus counts as nothing, on every device.
        factors: float64 [348] (:data:`.FACTORS`), or [B, 348], each 1e-9 to 1e9: the tables of
            :func:`.reference.listed_after`, one after the other.
        nodes: N, root included, 1 to 256.
        max_depth: of any node, 0 to 256.
        foresight: 0 to 1; 0: probability alone counts, and there is no noise.

    Returns:
        ``tokens`` int64 [B, N]; ``parents`` int32 [B, N], -1 at the root and where nothing was left
        to guess; ``probability`` float64 [B, N], that the node will be accepted: their sum is the
        expected accept length; ``sources`` int32 [B, N], the sum of DENOISED (1), ADJACENCY (2),
        SUFFIX (4) and NOISE (8).
    """
    expect_dims("history", history, "[B, C]")
    if not 1 <= nodes <= _C.MAX_NODES:
        raise ValueError(f"nodes is {nodes}; expected 1 to {_C.MAX_NODES}")
    shape = history.shape[0], nodes
    tokens, parents = history.new_empty(shape), history.new_empty(shape, dtype=torch.int32)
    probability, sources = history.new_empty(shape, dtype=torch.float64), torch.empty_like(parents)
    draft = tokens, parents, probability, sources
    yield draft
    _C.draft_tree(
        history.contiguous(),
        lengths.contiguous(),
        denoised.contiguous(),
        adjacency.contiguous(),
        habits.contiguous(),
        suffixes.contiguous(),
        corpus.contiguous(),
        corpus_suffixes.contiguous(),
        factors.contiguous(),
        max_depth,
        foresight,
        *draft,
    )


@op(
    "append_tails(Tensor tokens, Tensor parents, Tensor probability, Tensor history, Tensor"
    " lengths, int nodes, int tails, int length, int noise) -> (Tensor, Tensor, Tensor, Tensor,"
    " Tensor)"
)
def append_tails(
    tokens: Tensor,
    parents: Tensor,
    probability: Tensor,
    history: Tensor,
    lengths: Tensor,
    nodes: int,
    tails: int,
    length: int,
    noise: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Lay out the first nodes of a tree, and behind them tails: chains of noise rows below the
    nodes where the accepted path ends most likely.

    It ends at a node with the node's probability less those of its children among these nodes,
    one after the other. The likeliest such ends that are more than 0 get a tail, of equals the
    earlier node; rows of other tails are padding.

    Args:
        tokens: int64 [B, M]; parents: int32 [B, M]; probability: float64 [B, M], that a node is
            accepted; as :func:`draft_tree` gives them.
        history: int64 [B, C]; lengths: int64 [B], >= 1: the text.
        nodes: how many of the M the draft has, N.
        tails: K, 0 or more, and
        length: rows of each, 1 or more; N + K * length <= 256.
        noise: the token of all noise rows; -1: tokens of the text.

    Returns:
        ``tokens`` int64 [B, N + K * length]; ``parents`` int32 of this shape, -1 at noise rows;
        ``ancestors`` and ``depth``, as :func:`tree_ancestors` gives them where parents say what
        noise rows stand below; ``ends`` int64 [B, K], the node above each tail, -1: none.
    """
    expect_dims("tokens", tokens, "[B, M]")
    if not 1 <= nodes <= tokens.shape[1]:
        raise ValueError(f"nodes is {nodes}; expected 1 to {tokens.shape[1]}, those of tokens")
    if tails < 0 or length < 1 or nodes + tails * length > _C.MAX_NODES:
        raise ValueError(
            f"tails is {tails} and length is {length} at {nodes} nodes; expected 0 or more tails of"
            f" 1 or more rows, {_C.MAX_NODES} with the nodes at most"
        )
    rows, size = tokens.shape[0], nodes + tails * length
    drafted = tokens.new_empty(rows, size)
    hidden = torch.empty_like(drafted, dtype=torch.int32)
    ancestors = tokens.new_empty(rows, size, (size + 63) // 64)
    draft = drafted, hidden, ancestors, torch.empty_like(hidden), tokens.new_empty(rows, tails)
    yield draft
    _C.append_tails(
        tokens.contiguous(),
        parents.contiguous(),
        probability.contiguous(),
        history.contiguous(),
        lengths.contiguous(),
        length,
        noise,
        *draft,
    )

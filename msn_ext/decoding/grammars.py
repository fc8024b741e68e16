"""Grammars: masks of the tokens that may follow, by xgrammar's matchers, which walk the tree."""

from __future__ import annotations

import json
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from msn_ext.ops import MAX_NODES

from .drafters import Draft

FORCED = 64
"""Tokens that are drafted at most because nothing else fits a grammar."""


def grammar(
    *,
    json_schema: dict[str, Any] | str | None = None,
    regex: str | None = None,
    ebnf: str | None = None,
    tokenizer,
) -> Grammar:
    """Compile a grammar that an answer has to follow, for ``logits_processor=[...]`` of
    :func:`msn_ext.generate` and of ``model.generate``, in any number of calls.

    Args:
        json_schema: as a dict or as text; answers have no more whitespace than ``json.dumps`` puts.
        regex: that the whole answer matches.
        ebnf: xgrammar's, whose first rule is ``root``.
        tokenizer: the model's own; its ``eos_token_id`` ends an answer.

    Raises:
        ImportError: xgrammar is not installed.
        ValueError: not exactly one grammar is given, or xgrammar refuses it.
    """
    given = {
        name: value
        for name, value in dict(json_schema=json_schema, regex=regex, ebnf=ebnf).items()
        if value is not None
    }
    if len(given) != 1:
        raise ValueError(
            f"grammar got {', '.join(given) or 'nothing'}; expected one of json_schema, regex, ebnf"
        )
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__} without eos_token_id; expected the model's"
            " tokenizer, whose end-of-text token ends an answer"
        )
    xgrammar = _xgrammar()
    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, stop_token_ids=[tokenizer.eos_token_id]
    )
    compiler = xgrammar.GrammarCompiler(info)
    try:
        if regex is not None:
            compiled = compiler.compile_regex(regex)
        elif ebnf is not None:
            compiled = compiler.compile_grammar(ebnf)
        else:
            text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
            compiled = compiler.compile_json_schema(text, any_whitespace=False)
    except RuntimeError as error:
        raise ValueError(f"{next(iter(given))} is no grammar for xgrammar: {error}") from error
    return Grammar(compiled, tokenizer)


def _xgrammar():
    try:
        import xgrammar
    except ImportError as error:
        raise ImportError(
            "msn_ext.grammar needs xgrammar: pip install 'msn_ext[grammar]'"
        ) from error
    return xgrammar


class Grammar(LogitsProcessor):
    """A compiled grammar, from :func:`grammar`; takes from the logits what it forbids.

    ``model.generate`` may call it, too: new text begins where the processor is called by another
    list of processors, or with another text than the last one and one token more. Not from several
    threads then; :func:`msn_ext.generate` keeps nothing in it.
    """

    def __init__(self, compiled, tokenizer):
        self.compiled, self.tokenizer = compiled, tokenizer
        self._plain: Matchers | None = None
        self._caller: weakref.ref | None = None
        self._seen: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Tensor:
        """Return the scores [B, V], -inf at tokens that may not follow the texts [B, L]."""
        caller = sys._getframe(1).f_locals.get("self")
        caller = caller if isinstance(caller, LogitsProcessorList) else None
        goes_on = (
            self._plain is not None
            and self._seen is not None
            and (self._caller and self._caller()) is caller
            and self._seen.shape == input_ids[:, :-1].shape
            and torch.equal(self._seen, input_ids[:, :-1])
        )
        if not goes_on:
            self._plain = Matchers(self, len(input_ids))
            self._caller = caller if caller is None else weakref.ref(caller)
        assert self._plain is not None
        if goes_on:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                self._plain.accept(row, [token])
        self._seen = input_ids.clone()
        return self.applied(scores, self._plain.roots().to(scores.device))

    def applied(self, scores: Tensor, masks: Tensor) -> Tensor:
        """Return scores [R, V], -inf where the bits of int32 masks [R, W] are 0, and at what is no
        token of the tokenizer's.
        """
        return _applied(scores, masks, self.compiled.tokenizer_info.vocab_size)


def _applied(scores: Tensor, masks: Tensor, vocabulary: int) -> Tensor:
    bits = masks[..., None] >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1
    allowed = bits.flatten(1)[:, : min(vocabulary, scores.shape[1])] > 0
    allowed = torch.nn.functional.pad(allowed, (0, scores.shape[1] - allowed.shape[1]))
    found = scores.masked_fill(~allowed, -torch.inf)
    # Where what was applied before has left nothing that is allowed: it is allowed still.
    nothing = found.isneginf().all(1, keepdim=True)
    return torch.where(nothing & allowed, 0.0, found)


class Matchers:
    """One matcher a row: where each row's text is in the grammar."""

    def __init__(self, grammar: Grammar, rows: int):
        xgrammar = _xgrammar()
        self._grammar, self._stops = grammar, grammar.compiled.tokenizer_info.stop_token_ids
        self._matchers = [xgrammar.GrammarMatcher(grammar.compiled) for _ in range(rows)]
        self._free = [False] * rows  # of rows whose text the grammar does not have
        self._vocabulary = grammar.compiled.tokenizer_info.vocab_size
        self._words = xgrammar.get_bitmask_shape(1, self._vocabulary)[1]

    def masks(self, count: int) -> Tensor:
        """Return masks [count, W] that allow nothing."""
        return torch.zeros(count, self._words, dtype=torch.int32, device="cpu")

    def restart(self, row: int) -> None:
        """Go back to where the grammar begins."""
        self._matchers[row].reset()
        self._free[row] = False

    def accept(self, row: int, tokens: list[int]) -> None:
        """Go on by tokens of the text. After the grammar's end nothing changes any more; after a
        token that it forbids (padding of a row that ended early), everything is allowed.
        """
        matcher = self._matchers[row]
        for token in tokens:
            if self.ends(row):
                return
            self._free[row] = token >= self._vocabulary or not matcher.accept_token(token)

    def ends(self, row: int) -> bool:
        """Return whether the grammar has no say in what follows, but that the text has ended."""
        return self._free[row] or self._matchers[row].is_terminated()

    def roots(self) -> Tensor:
        """Return the masks of what may follow the texts, int32 [B, W], on the host."""
        masks = self.masks(len(self._matchers))
        for row in range(len(masks)):
            self._fill(row, masks[row])
        return masks

    def _fill(self, row: int, mask: Tensor) -> None:
        if self._free[row]:
            mask.fill_(-1)
        elif self._matchers[row].is_terminated():
            self._allow_ends(mask)
        else:
            self._matchers[row].fill_next_token_bitmask(mask[None])

    def _allow_ends(self, mask: Tensor) -> None:
        for token in self._stops:
            bit = token % 32
            mask[token // 32] |= -(1 << 31) if bit == 31 else 1 << bit

    def tree(self, row: int, tokens: list[int], parents: list[int]) -> Tensor:
        """Return the masks of what may follow the nodes of a tree, int32 [N, W], on the host: after
        a node that the grammar forbids, and at padding, everything.

        The matcher follows the tree depth first, and takes back what it accepted on the way.
        """
        masks = self.masks(len(tokens))
        if self.ends(row):
            self._fill(row, masks[0])
            masks[:] = masks[0].clone()
            return masks
        child, sibling = torch.full((2, len(tokens)), -1, dtype=torch.int64, device="cpu").tolist()
        for node in range(len(tokens) - 1, 0, -1):
            if parents[node] >= 0 and tokens[node] < self._vocabulary:
                sibling[node], child[parents[node]] = child[parents[node]], node
        walk = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in (child, sibling, tokens))
        self._matchers[row].traverse_draft_tree(*walk, masks)
        self._end_nodes(tokens, parents, masks)
        masks[~masks.any(1)] = -1
        return masks

    def _end_nodes(self, tokens: list[int], parents: list[int], masks: Tensor) -> None:
        """Allow nothing but another end after nodes that end the grammar, as after a text."""
        ended: set[int] = set()
        for node in range(1, len(tokens)):
            above, token = parents[node], tokens[node]
            ends = above >= 0 and token in self._stops
            if above in ended or (ends and int(masks[above, token // 32]) >> token % 32 & 1):
                ended.add(node)
                masks[node] = 0
                self._allow_ends(masks[node])

    def forced(self, row: int) -> list[int]:
        """Return tokens that are bound to come: what spells text that nothing else fits, as the
        tokenizer would, which other tokens may spell, too; and the only one that is allowed.
        """
        if self.ends(row):
            return []
        matcher, found = self._matchers[row], list[int]()
        encode = self._grammar.tokenizer.encode
        while len(found) < FORCED and not matcher.is_terminated():
            try:
                text = matcher.find_jump_forward_string()
            except UnicodeDecodeError:  # it begins or ends within a character
                text = ""
            tokens = encode(text, add_special_tokens=False) if text else self._only(row)
            before = len(found)
            for token in tokens[: FORCED - before]:
                if not matcher.accept_token(token):
                    break
                found.append(token)
            if len(found) == before:
                break
        if found:
            matcher.rollback(len(found))
        return found

    def _only(self, row: int) -> list[int]:
        """Return the only token that is allowed, or nothing."""
        mask = self.masks(1)[0]
        self._fill(row, mask)
        words = mask.nonzero()[:, 0].tolist()
        bits = int(mask[words[0]]) & 0xFFFFFFFF if len(words) == 1 else 0
        return [words[0] * 32 + bits.bit_length() - 1] if bits and not bits & (bits - 1) else []


class GrammarFollower:
    """A grammar in one call of ``generate``: guesses what is bound to come, and gives the masks of
    a draft's nodes.
    """

    def __init__(self, grammar: Grammar, rows: int):
        self.grammar, self._matchers = grammar, Matchers(grammar, rows)
        self._prompts: list[int] | None = None  # their lengths
        self._ends: list[int] = []  # of the texts that the matchers have accepted

    def advance(self, history: Tensor, lengths: Tensor) -> None:
        """Go on to the texts ``history`` and ``lengths`` as a drafter has them, or back to them
        from the prompts, which are the texts of the first call.
        """
        ends = lengths.tolist()
        if self._prompts is None:
            self._prompts = self._ends = ends
        for row, (begin, end) in enumerate(zip(self._ends, ends)):
            if end < begin:
                self._matchers.restart(row)
                begin = self._prompts[row]
            if begin < end:
                self._matchers.accept(row, history[row, begin:end].tolist())
        self._ends = ends

    def opening(self, guesses: Tensor) -> Tensor:
        """Return a chain of guesses [B, n] with what is bound to come in front."""
        rows = []
        for row, own in enumerate(guesses.tolist()):
            forced = self._matchers.forced(row)
            rows.append([*forced, *own[len(forced) :]])
        longest = max(map(len, rows))
        rows = [[*row, *[0] * (longest - len(row))] for row in rows]
        return torch.tensor(rows, dtype=torch.int64, device=guesses.device)

    def with_forced(self, draft: Draft) -> Draft:
        """Return a draft with a chain of what is bound to come, which begins with the draft's own
        nodes where it has them; all others behind it. The same object where nothing is new.
        """
        (batch, size), rows = draft.tokens.shape, []
        size -= draft.tails
        parents = draft.parents.expand(batch, -1)[:, :size].tolist()
        for row, (tokens, above) in enumerate(zip(draft.tokens[:, :size].tolist(), parents)):
            forced = self._matchers.forced(row)
            rows.append(_appended(tokens, above, forced, MAX_NODES - draft.tails))
        nodes = max(len(tokens) for tokens, _ in rows)
        if nodes == size:
            return draft
        new = [
            torch.tensor([[*row[i], *[fill] * (nodes - len(row[i]))] for row in rows], dtype=dtype)
            for i, fill, dtype in ((0, 0, torch.int64), (1, -1, torch.int32))
        ]
        return draft.grown(*(x.to(draft.tokens.device) for x in new))

    def masks(self, draft: Draft) -> Tensor:
        """Return the masks of all B * N nodes, int32 [B * N, W], on the draft's device."""
        parents = draft.parents.expand(draft.tokens.shape).tolist()
        rows = enumerate(zip(draft.tokens.tolist(), parents))
        found = [self._matchers.tree(row, *tree) for row, tree in rows]
        return torch.cat(found).to(draft.tokens.device)


def _appended(
    tokens: list[int], parents: list[int], chain: list[int], most: int
) -> tuple[list[int], list[int]]:
    """Return tokens and parents of a tree, and of a chain below its root where it lacks it, as far
    as it may have ``most`` nodes.
    """
    if not chain:
        return tokens, parents
    children = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens))}
    found, above, node = [*tokens], [*parents], 0
    for token in chain:
        below = children.get((node, token))
        if below is None:
            if len(found) == most:
                break
            below = len(found)
            found.append(token)
            above.append(node)
        node = below
    return found, above

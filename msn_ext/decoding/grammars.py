"""Text that follows a grammar: xgrammar's matcher on the nodes of a draft."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Grammar(LogitsProcessor):
    """A processor of logits that leaves the tokens which a grammar allows; made by :func:`grammar`.

    It is a function of the text after the prompt. Its matchers stand at texts that were asked about
    before; the one that has most in common with the next text is rolled back to that and goes on
    from there, so that a node of a draft costs the tokens by which it differs from the node before.

    Args:
        source: an ``xgrammar.Grammar``.
        tokenizer: of the model.
        stop_token_ids: what may follow where the grammar can end; None: as the tokenizer says.
    """

    def __init__(self, source, tokenizer, stop_token_ids: list[int] | None):
        self._source, self._tokenizer, self._stop = source, tokenizer, stop_token_ids
        self._compiled: dict[int, Any] = {}  # by vocabulary
        self._prompt: int | None = None  # slots; None: the first text that is asked about
        self._matchers: list[Matcher] = []
        self._rows = 1  # matchers that pay
        self._seen: Tensor | None = None

    def after(self, prompt: int, rows: int) -> Grammar:
        """Return the same for ``rows`` texts after ``prompt`` slots."""
        other = Grammar(self._source, self._tokenizer, self._stop)
        other._compiled, other._prompt, other._rows = self._compiled, prompt, rows
        return other

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [R, V] with -inf at what the grammar forbids after texts [R, L]."""
        import xgrammar

        begin = self._begin(input_ids)
        vocabulary = scores.shape[-1]
        mask = xgrammar.allocate_token_bitmask(len(scores), vocabulary)
        xgrammar.reset_token_bitmask(mask)
        for row, text in enumerate(input_ids[:, begin:].tolist()):
            matcher = self._nearest(text, vocabulary)
            if matcher.move(text):
                matcher.matcher.fill_next_token_bitmask(mask, row)
        bits = mask.to(scores.device)[..., None] >> torch.arange(32, device=scores.device) & 1
        allowed = bits.flatten(1)[:, :vocabulary].bool()
        return scores.masked_fill(~allowed, -torch.inf)

    def forced(self, text: list[int], most: int, vocabulary: int) -> list[int]:
        """Return the tokens that the grammar leaves no choice about after ``text``, at most
        ``most``.
        """
        import xgrammar

        matcher = self._nearest(text, vocabulary)
        mask = xgrammar.allocate_token_bitmask(1, vocabulary)
        found: list[int] = []
        while len(found) < most and matcher.move([*text, *found]):
            xgrammar.reset_token_bitmask(mask)
            if not matcher.matcher.fill_next_token_bitmask(mask, 0):
                break  # everything is allowed
            words = mask[0].nonzero().flatten().tolist()
            if len(words) != 1 or (word := int(mask[0, words[0]]) & 0xFFFFFFFF) & (word - 1):
                break
            found.append(32 * words[0] + word.bit_length() - 1)
        return found

    def _begin(self, input_ids: Tensor) -> int:
        """Return where the answers begin. Without :meth:`after`, a text that does not go on by a
        token from the one before is a prompt.
        """
        if self._prompt is not None:
            return self._prompt
        seen, self._seen = self._seen, input_ids
        if seen is None or not torch.equal(seen, input_ids[:, :-1]):
            self._first, self._matchers = input_ids.shape[1], []
            self._rows = len(input_ids)
        return self._first

    def _nearest(self, text: list[int], vocabulary: int) -> Matcher:
        """Return the matcher that is fewest tokens away from a text, or a new one."""
        best = min(self._matchers, key=lambda matcher: matcher.away(text), default=None)
        room = len(self._matchers) < self._rows
        if best is None or (room and best.away(text) > len(text)):
            best = Matcher(self._compile(vocabulary))
            self._matchers.append(best)
        return best

    def _compile(self, vocabulary: int):
        import xgrammar

        if vocabulary not in self._compiled:
            tokens = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=vocabulary, stop_token_ids=self._stop
            )
            compiler = xgrammar.GrammarCompiler(tokens)
            self._compiled[vocabulary] = compiler.compile_grammar(self._source)
        return self._compiled[vocabulary]


class Matcher:
    """A matcher that stands at a text, and moves from one to the next by what they differ in."""

    def __init__(self, compiled):
        import xgrammar

        self.matcher = xgrammar.GrammarMatcher(compiled)
        self._text: list[int] = []

    def away(self, text: list[int]) -> int:
        """Return how many tokens are to be taken back and accepted on the way to a text."""
        return len(self._text) + len(text) - 2 * self._common(text)

    def _common(self, text: list[int]) -> int:
        shorter = min(len(text), len(self._text))
        if text[:shorter] == self._text[:shorter]:
            return shorter
        return next(i for i, (a, b) in enumerate(zip(text, self._text)) if a != b)

    def move(self, text: list[int]) -> bool:
        """Go to a text; return whether the grammar allows it and something after it."""
        keep = self._common(text)
        if keep < len(self._text):
            self.matcher.rollback(len(self._text) - keep)
            del self._text[keep:]
        for token in text[keep:]:
            if self.matcher.is_terminated() or not self.matcher.accept_token(token):
                return False
            self._text.append(token)
        return not self.matcher.is_terminated()


def grammar(
    *,
    json_schema: str | dict | None = None,
    regex: str | None = None,
    ebnf: str | None = None,
    tokenizer,
    stop_token_ids: list[int] | None = None,
) -> Grammar:
    """Make a processor of logits that holds the answer to a grammar, by xgrammar (``pip install
    "msn_ext[grammar]"``).

    ``generate(model, ..., logits_processor=[grammar(...)])`` may be called with it again and again;
    ``model.generate`` takes it, too. Guesses follow the grammar, and where it leaves one token
    only, that is a guess which cannot be wrong.

    Args:
        json_schema: a JSON schema, as text or as a dict.
        regex: a regular expression.
        ebnf: a grammar in xgrammar's EBNF, whose first rule is ``root``.
        tokenizer: the model's.
        stop_token_ids: tokens that may end the answer where the grammar can end; None: the
            tokenizer's end of text.

    Raises:
        ImportError: xgrammar is not installed.
        ValueError: not just one of ``json_schema``, ``regex`` and ``ebnf`` is given, or it is not
            well-formed.
    """
    try:
        import xgrammar
    except ImportError as error:
        raise ImportError(
            "msn_ext.grammar needs xgrammar: pip install 'msn_ext[grammar]'"
        ) from error
    given = {"json_schema": json_schema, "regex": regex, "ebnf": ebnf}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        came = ", ".join(given) or "none of them"
        raise ValueError(f"got {came}; expected one of json_schema, regex and ebnf")
    ((kind, text),) = given.items()
    make = {
        "json_schema": xgrammar.Grammar.from_json_schema,
        "regex": xgrammar.Grammar.from_regex,
        "ebnf": xgrammar.Grammar.from_ebnf,
    }[kind]
    try:
        source = make(json.dumps(text) if isinstance(text, dict) else text)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].split(": ", 1)[-1]
        raise ValueError(f"{kind} cannot be read: {reason}") from error
    return Grammar(source, tokenizer, stop_token_ids)

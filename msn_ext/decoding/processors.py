"""transformers' processors of logits, on the nodes of a draft: temperature, top-p, repetition
penalty, …
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from .drafters import Draft
from .grammars import Grammar

ROWS = 64  # of logits that are processed at a time, some of it in float64
PREFIX_FREE = frozenset(
    {
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        MinPLogitsWarper,
        TopHLogitsWarper,
        TypicalLogitsWarper,
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        InfNanRemoveLogitsProcessor,
        LogitNormalization,
        SuppressTokensLogitsProcessor,
    }
)
"""Processors of logits whose result does not depend on the text before."""
PREFIX_BOUND = frozenset(
    {
        RepetitionPenaltyLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        NoBadWordsLogitsProcessor,
        SequenceBiasLogitsProcessor,
        MinLengthLogitsProcessor,
        MinNewTokensLengthLogitsProcessor,
        ExponentialDecayLengthPenalty,
        ForcedBOSTokenLogitsProcessor,
        ForcedEOSTokenLogitsProcessor,
        SuppressTokensAtBeginLogitsProcessor,
        EncoderRepetitionPenaltyLogitsProcessor,
        EncoderNoRepeatNGramLogitsProcessor,
        PrefixConstrainedLogitsProcessor,
        WatermarkLogitsProcessor,
    }
)
"""Processors whose result depends on nothing but the text before and the logits."""

P = TypeVar("P")


def stateless(processor: P) -> P:
    """Declare that what a processor of logits does with a row depends on nothing but that row's
    text and logits: :func:`msn_ext.generate` then asks it about guesses, too, in any order.

    Args:
        processor: a class (as a decorator) or an object, with ``__call__(input_ids, scores)`` for
            int64 [R, L] and float32 [R, V]; gets the attribute ``stateless``.
    """
    processor.stateless = True  # type: ignore[attr-defined]
    return processor


def checked_processors(
    processors: LogitsProcessorList, rows: int, prompt: int
) -> LogitsProcessorList:
    """Return the processors as they apply to the nodes of ``rows`` rows after ``prompt`` slots.

    Raises:
        ValueError: one of them cannot be followed; says why.
    """
    found, known = LogitsProcessorList(), PREFIX_FREE | PREFIX_BOUND
    for processor in processors:
        if isinstance(processor, Grammar):
            processor = processor.after(prompt, rows)
        elif type(processor) not in known and getattr(processor, "stateless", False) is not True:
            names = ", ".join(sorted(kind.__name__ for kind in known))
            raise ValueError(
                f"{type(processor).__name__} may keep a state from token to token, which guesses"
                f" would spoil; msn_ext.generate supports {names}, msn_ext.grammar(…), and what"
                " msn_ext.stateless declares to keep none"
            )
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):  # transformers' own, of padding
            if ignored.shape != (rows,):
                raise ValueError(
                    f"prompt_ignore_length has shape {list(ignored.shape)}; expected [{rows}], one"
                    " number per row"
                )
            if not ignored.any():
                processor = RepetitionPenaltyLogitsProcessor(processor.penalty)
        found.append(processor)
    return found


def at_once(processor: LogitsProcessor) -> bool:
    """Return whether it can run on all nodes at once: it does not look at the text before, or only
    for which tokens are in it.
    """
    if type(processor) is RepetitionPenaltyLogitsProcessor:
        return processor.prompt_ignore_length is None
    return type(processor) in PREFIX_FREE


@dataclass
class Texts:
    """The texts up to the nodes of a draft, for the processors of logits that ask for them.

    Attributes:
        draft: of B rows and N nodes.
        history, lengths: as a :class:`.drafters.Drafter` has them, before the draft was checked.
        prompts: int64 [B, P or more], of which the first ``offsets`` [B] of a row are padding.
    """

    draft: Draft
    history: Tensor
    lengths: Tensor
    prompts: Tensor
    offsets: Tensor

    def before(self, vocabulary: int) -> Tensor:
        """Mark the tokens that the texts have up to the root, padding included: bool [B,
        vocabulary + 1], the last column rubbish.
        """
        text = torch.cat([self.prompts, self.history], dim=1)
        slots, positions = (
            torch.arange(x.shape[1], device=text.device) for x in (self.prompts, self.history)
        )
        there = torch.cat([slots < self.offsets[:, None], positions < self.lengths[:, None]], dim=1)
        found = torch.zeros(len(text), vocabulary + 1, dtype=torch.bool, device=text.device)
        return found.scatter_(1, torch.where(there, text, vocabulary).clamp_(max=vocabulary), True)

    def seen(self, before: Tensor, places: slice) -> Tensor:
        """Mark the same up to some of the B * N nodes, bool [R, vocabulary]."""
        batch, nodes = self.draft.tokens.shape
        node = torch.arange(batch * nodes, device=before.device)[places]
        row, node = node // nodes, node % nodes
        bits = self.draft.ancestors.expand(batch, nodes, -1)[row, node]
        bits = (bits[..., None] >> torch.arange(64, device=bits.device) & 1).flatten(1)[:, :nodes]
        rubbish = before.shape[1] - 1
        above = torch.where(bits > 0, self.draft.tokens[row], rubbish).clamp_(max=rubbish)
        return before[row].scatter_(1, above, True)[:, :rubbish]

    def by_depth(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Go row by row and depth by depth: the row, the places of its nodes among all B * N,
        int64 [R], and the texts up to them, int64 [R, L], as transformers has them, with padding in
        front. Waits for the device; padding nodes have none.
        """
        device, shape = self.history.device, self.draft.tokens.shape
        lengths, offsets = self.lengths.tolist(), self.offsets.tolist()
        rows = zip(
            *(
                x.expand(shape).tolist()
                for x in (self.draft.tokens, self.draft.parents, self.draft.depth)
            )
        )
        for b, (tokens, parents, depths) in enumerate(rows):
            before = torch.cat([self.prompts[b, : offsets[b]], self.history[b, : lengths[b]]])
            paths: list[list[int]] = [[]]
            for node in range(1, len(tokens)):
                paths.append([*paths[parents[node]], tokens[node]] if depths[node] > 0 else [])
            for depth in sorted(set(depths) - {-1}):
                nodes = [node for node in range(len(tokens)) if depths[node] == depth]
                after = torch.tensor(
                    [paths[node] for node in nodes], dtype=torch.int64, device=device
                ).view(len(nodes), depth)
                places = torch.tensor(nodes, device=device) + b * len(tokens)
                yield b, places, torch.cat([before.expand(len(nodes), -1), after], dim=1)


def processed(
    logits: Tensor, processors: LogitsProcessorList, texts: Texts, every: bool = False
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Yield places of nodes among all B * N, and their logits as the processors leave them, float32
    [R, V]. Nodes that the processors forbid after the one above, which are never accepted, may be
    left out, unless ``every`` one is asked for.
    """
    logits = logits.flatten(0, 1)
    if all(map(at_once, processors)):
        yield from _processed_at_once(logits, processors, texts)
        return
    last, nodes = None, texts.draft.tokens.shape[1]
    parents = texts.draft.parents.expand(texts.draft.tokens.shape)
    before: dict[int, Tensor] = {}  # scores of the level above, by place
    for row, places, text in texts.by_depth():
        if row != last:
            last, own, before = row, _of_row(processors, row), {}
        if before and not every:
            # A guess that the processors forbid is never accepted; what comes after it is no text
            # that they would ever be asked about.
            above = (parents[row, places % nodes] + row * nodes).tolist()
            tokens = texts.draft.tokens.flatten()[places].tolist()
            allowed = [
                at in before and before[at][token].item() > -torch.inf
                for at, token in zip(above, tokens)
            ]
            keep = torch.tensor(allowed, device=places.device)
            places, text = places[keep], text[keep]
            if not len(places):
                continue
        raw = cast(torch.FloatTensor, logits[places].float())
        scores = own(cast(torch.LongTensor, text), raw)
        before = dict(zip(places.tolist(), scores))
        yield places, scores


def _processed_at_once(
    logits: Tensor, processors: LogitsProcessorList, texts: Texts
) -> Iterator[tuple[slice, Tensor]]:
    """Process the logits of all nodes [B * N, V], :data:`ROWS` of them at a time."""
    before = (
        None
        if all(type(processor) in PREFIX_FREE for processor in processors)
        else texts.before(logits.shape[-1])
    )
    for begin in range(0, len(logits), ROWS):
        places = slice(begin, begin + ROWS)
        scores = logits[places].float()
        text = scores.new_zeros(len(scores), 1, dtype=torch.int64)
        for processor in processors:
            if type(processor) is RepetitionPenaltyLogitsProcessor:
                penalised = torch.where(
                    scores < 0, scores * processor.penalty, scores / processor.penalty
                )
                assert before is not None, "this one is not free of the text before"
                scores = torch.where(texts.seen(before, places), penalised, scores)
            else:
                scores = processor(text, scores)
        yield places, scores


def _of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """Return the same; of those that tell the rows of a batch apart, what is meant for this one."""
    found = LogitsProcessorList()
    for processor in processors:
        ignored = getattr(processor, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):
            processor = RepetitionPenaltyLogitsProcessor(processor.penalty, int(ignored[row]))
        elif type(processor) in _BY_ROW:
            processor = _BY_ROW[type(processor)](copy.copy(processor), row)
        found.append(processor)
    return found


def _its_prompt(processor, row: int):
    processor.encoder_input_ids = processor.encoder_input_ids[row : row + 1]
    return processor


def _its_ngrams(processor, row: int):
    processor.batch_size, processor.generated_ngrams = 1, [processor.generated_ngrams[row]]
    return processor


def _its_tokens(processor, row: int):
    allowed = processor._prefix_allowed_tokens_fn
    return lambda ids, scores: torch.cat(
        [
            PrefixConstrainedLogitsProcessor(lambda _, text: allowed(row, text), 1)(text, score)
            for text, score in zip(ids.split(1), scores.split(1))
        ]
    )


_BY_ROW = {
    EncoderRepetitionPenaltyLogitsProcessor: _its_prompt,
    EncoderNoRepeatNGramLogitsProcessor: _its_ngrams,
    PrefixConstrainedLogitsProcessor: _its_tokens,
}
"""What makes of a processor that tells rows apart a copy for one of them."""

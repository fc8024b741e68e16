"""``generate``: Hugging Face conventions in, the same output in fewer forward passes out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StopStringCriteria,
)

from . import profile
from .decoding import (
    RETRIEVAL,
    Decoder,
    Drafter,
    DraftTree,
    Lookahead,
    SamDecoding,
    Sampler,
    TokenRecycling,
    TreeDrafter,
    attention_for,
    followed,
    greedy,
    steps,
)

DRAFTS = {
    "auto": None,  # depends on the model
    "paper": DraftTree.paper,
    "jacobi": functools.partial(DraftTree.chain, 6),
    "lookup": functools.partial(DraftTree.chain, 8, rank=RETRIEVAL),
    "suffix": SamDecoding,
    "recycling": TokenRecycling,
    "lookahead": Lookahead,
    "none": functools.partial(DraftTree.chain, 1),
}

# Settings of a GenerationConfig that change the output or its form in a way this version does not
# follow, with the values under which they change nothing.
_NEUTRAL = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "prefill_chunk_size": (None,),
    "cache_implementation": (None, "dynamic"),
    "use_cache": (None, True),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
# Keyword arguments that transformers prepares and this decoder makes itself.
_PREPARED = {"use_cache", "logits_to_keep", "cache_position"}


@dataclass
class MSNGenerateOutput(GenerateDecoderOnlyOutput):
    """What ``model.generate`` returns, and how it came about.

    Attributes:
        sequences: int64 [B, P + new], prompts included, finished rows padded.
        accept_lengths: per row an int64 tensor with one entry a forward pass, the prompt's pass
            first: the tokens that it gained. They sum to the row's new tokens.
    """

    accept_lengths: tuple[Tensor, ...] | None = None


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    draft: str | DraftTree | Drafter = "auto",
    tokenizer=None,
    streamer=None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    **generation_kwargs,
):
    """Generate what ``model.generate`` would, several tokens per forward pass.

    Every pass checks a tree of guesses and keeps the longest path that the model itself would have
    taken (arXiv 2406.17404, section 3.3). Greedy output is that of
    ``model.generate(do_sample=False)``; sampled output has exactly the model's distribution, and
    for a seed (``torch.manual_seed``) it is the same whatever the draft; below float64 both but for
    near-ties. Also usable as ``model.generate(**inputs, custom_generate=msn_ext.generate)``.

    Args:
        model: a decoder-only transformers model.
        input_ids: int64 [B, P], left-padded where the rows differ in length.
        draft: ``"auto"`` (the best guesses of all sources, as many as pay by the clock),
            ``"paper"`` (the paper's 68 guesses), ``"jacobi"`` (a chain of 5 denoised guesses),
            ``"lookup"`` (7 tokens retrieved from the text), ``"suffix"`` (SAM-Decoding, arXiv
            2411.10666), ``"recycling"`` (Token Recycling, arXiv
            2408.08696), ``"lookahead"`` (arXiv 2402.02057), ``"none"`` (plain decoding), a
            :class:`DraftTree` or a :class:`Drafter`.
        tokenizer: needed with ``stop_strings``.
        streamer: gets the prompt, then the tokens of each forward pass, then ``end()`` (batch 1).
        generation_config, generation_kwargs: as for ``model.generate``; among them
            ``attention_mask`` [B, P], 0 at padding (None: as ``model.generate`` infers it).
        logits_processor: only kinds that depend on nothing but the text before and the logits.
        stopping_criteria: asked after every token, row by row, with scores None.

    Returns:
        int64 [B, P + new], or with ``return_dict_in_generate=True`` an :class:`MSNGenerateOutput`.

    Raises:
        ValueError: a model, an option or an input that cannot be followed exactly; says which.
    """
    if getattr(generation_config, "_eos_token_tensor", "unprepared") != "unprepared":
        # transformers calls us back: `custom_generate=msn_ext.generate`, everything prepared.
        prompted = streamer is None  # transformers' own streamer has the prompt
        return _decode(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            draft=draft,
            streamer=_callers_streamer() if prompted else streamer,
            prompted=prompted,
            **generation_kwargs,
        )
    if (
        not isinstance(input_ids, torch.Tensor)
        or input_ids.dim() != 2
        or input_ids.dtype not in (torch.int64, torch.int32)
    ):
        came = (
            f"{tuple(input_ids.shape)} {input_ids.dtype}"
            if isinstance(input_ids, torch.Tensor)
            else type(input_ids).__name__
        )
        raise ValueError(f"input_ids is {came}; expected an int64 tensor [batch, length]")
    if input_ids.shape[0] < 1 or input_ids.shape[1] < 1:
        raise ValueError(
            f"input_ids has shape {list(input_ids.shape)}; expected at least one row and one token"
        )
    attention_mask = generation_kwargs.get("attention_mask")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected"
            f" {list(input_ids.shape)}"
        )

    given = [
        getattr(config, "stop_strings", None)
        for config in (generation_config, model.generation_config)
    ]
    stop_strings = generation_kwargs.get("stop_strings", given[0] or given[1])
    if stop_strings is not None:
        # transformers refuses to make this criterion for a custom decoding method; None here goes
        # before both configs.
        generation_kwargs["stop_strings"] = None
    if stop_strings:
        if tokenizer is None:
            raise ValueError(
                "tokenizer is None; expected the model's tokenizer, which stop_strings needs"
            )
        stopping_criteria = StoppingCriteriaList(
            [*(stopping_criteria or []), StopStringCriteria(tokenizer, stop_strings)]
        )
    return model.generate(
        input_ids.to(model.device, torch.int64),
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        custom_generate=functools.partial(
            _decode, draft=draft, streamer=streamer, given=input_ids.device
        ),
        **generation_kwargs,
    )


def _callers_streamer():
    """The streamer of the ``model.generate`` that calls us back, which hands it to no custom
    decoding method.
    """
    frame, code = sys._getframe(1), inspect.unwrap(GenerationMixin.generate).__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame and frame.f_locals["streamer"]


def _drafter(draft: str | DraftTree | Drafter, model: PreTrainedModel) -> Drafter:
    if draft == "auto":
        return profile.auto(model)
    if isinstance(draft, str) and draft in DRAFTS:
        draft = DRAFTS[draft]()
    if isinstance(draft, DraftTree):
        return TreeDrafter(draft)
    if isinstance(draft, Drafter) and not isinstance(draft, type):
        return draft
    names = ", ".join(repr(name) for name in DRAFTS)
    raise ValueError(
        f"draft is {draft!r}; expected {names}, a DraftTree or a Drafter (an object with max_depth,"
        " start, first, propose and observe)"
    )


def _check_config(config: GenerationConfig) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise ValueError(
                f"{name} is {value!r}; msn_ext.generate does not support it (expected"
                f" {neutral[-1]!r})"
            )


def _padding(input_ids: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """How many slots of each row are left padding, int64 [B]."""
    if attention_mask is None:
        return input_ids.new_zeros(input_ids.shape[0])
    mask = attention_mask.to(input_ids.device).bool()
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        message = (
            "attention_mask has a 0 behind a 1; expected left padding only (padding_side='left')"
        )
        if pad is not None and torch.equal(mask, input_ids != pad):
            message += (
                f"; where none is given, transformers masks every token {pad}, pad_token_id: if it"
                " is to be read, give attention_mask=torch.ones_like(input_ids)"
            )
        raise ValueError(message)
    if not bool(mask[:, -1].all()):
        raise ValueError(
            "attention_mask masks a whole row; expected at least one token in every row"
        )
    return (~mask).sum(1)


def _check_positions(position_ids: Tensor | None, input_ids: Tensor, offsets: Tensor) -> None:
    """``position_ids`` [..., 1 or B, P] are those that the decoder counts itself."""
    if position_ids is None:
        return
    batch, prompt = input_ids.shape
    if position_ids.shape[-2:] not in ((1, prompt), (batch, prompt)):
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)}; expected {[batch, prompt]}"
        )
    counted = torch.arange(prompt, device=offsets.device) - offsets[:, None]
    wrong = (position_ids.to(offsets.device) != counted) & (counted >= 0)
    if bool(wrong.any()):
        *_, row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids has another number than {int(counted[row, column])} in row {row}, column"
            f" {column}; msn_ext.generate counts the tokens that attention_mask does not mask"
        )


def _own_buffers(model: PreTrainedModel) -> None:
    """Of a model made under ``torch.inference_mode()``: rotary embeddings may change theirs in
    place.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_inference():
                setattr(module, name, buffer.clone())


_busy: set[int] = set()
_busy_guard = threading.Lock()


@contextlib.contextmanager
def _alone(drafter: Drafter) -> Iterator[None]:
    """Within: nobody else decodes with ``drafter``."""
    with _busy_guard:
        if id(drafter) in _busy:
            raise ValueError(
                f"draft is a {type(drafter).__name__} that another call decodes with; expected one"
                " of its own"
            )
        _busy.add(id(drafter))
    try:
        yield
    finally:
        with _busy_guard:
            _busy.discard(id(drafter))


@torch.inference_mode(False)  # what stays from call to call could not be changed outside of it
@torch.no_grad()
def _decode(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    draft,
    streamer,
    prompted=False,
    given=None,
    **model_kwargs,
):
    """The decoding loop, called by ``GenerationMixin.generate`` with everything prepared.

    ``prompted``: the streamer has the prompt. ``given``: where the result goes; None: where
    ``input_ids`` are.
    """
    attention_mask, position_ids, past_key_values = (
        model_kwargs.pop(name, None)
        for name in ("attention_mask", "position_ids", "past_key_values")
    )
    _own_buffers(model)
    given, pad = given or input_ids.device, generation_config._pad_token_tensor
    input_ids, pad = input_ids.to(model.device, torch.int64), None if pad is None else int(pad)
    drafter = _drafter(draft, model)
    attention = attention_for(model)
    _check_config(generation_config)
    processors = followed(logits_processor, input_ids.shape[0])
    if unknown := {name for name, value in model_kwargs.items() if value is not None} - _PREPARED:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: msn_ext.generate does not support model inputs beside"
            " input_ids"
        )
    if past_key_values is not None and (
        getattr(past_key_values, "_is_user_defined", False) or past_key_values.get_seq_length()
    ):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}; expected None:"
            " msn_ext.generate fills its own"
        )
    if streamer is not None and input_ids.shape[0] != 1:
        raise ValueError(f"streamer needs a batch of one; input_ids has {input_ids.shape[0]} rows")
    offsets = _padding(input_ids, attention_mask, pad)
    _check_positions(position_ids, input_ids, offsets)
    criteria = [
        c for c in stopping_criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)
    ]
    # A user's criterion takes the place of transformers' own, which has the config's max_length.
    lengths = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
    max_new_tokens = min(lengths or [generation_config.max_length]) - input_ids.shape[1]
    if max_new_tokens < 1:
        raise ValueError(
            f"max_length leaves {max_new_tokens} tokens behind a prompt of {input_ids.shape[1]};"
            " expected 1 or more"
        )

    eos = [c.eos_token_id.flatten() for c in stopping_criteria if type(c) is EosTokenCriteria]
    eos = torch.cat(eos).to(input_ids.device, torch.int64) if eos else input_ids.new_empty(0)
    # Without an end-of-text token transformers pads nothing: rows that a criterion ended go on
    # until the last one has.
    together = (
        len(input_ids) > 1
        and criteria
        and not any(hasattr(c, "eos_token_id") for c in stopping_criteria)
    )
    ends = torch.full(
        (len(input_ids),), max_new_tokens, device="cpu"
    )  # tokens of a row when a criterion ended it
    if generation_config.do_sample:
        targets = Sampler(int(torch.randint(2**63 - 1, (), device="cpu")), input_ids.device)
    else:
        targets = greedy
    passes: list[Tensor] = []  # what each pass gained, int64 [B]
    totals = torch.zeros(input_ids.shape[0], dtype=torch.int64, device="cpu")
    prompt = input_ids, offsets, max_new_tokens, eos
    with (
        _alone(drafter),
        steps(model, attention, draft, drafter, targets, processors, *prompt) as run,
    ):
        decoder = run.decoder
        try:
            if streamer is not None and not prompted:
                streamer.put(input_ids.cpu())
            gained = decoder.prefill()
            while True:
                following = run.step() if run.ahead and not criteria else None
                gained = gained.read()
                counts, remaining, invalid = (
                    gained.status
                )  # all that the host reads, drafters that look at the clock apart
                if invalid.any():
                    row = int(invalid.argmax())
                    raise ValueError(
                        f"the model's probabilities for row {row} hold NaN or infinity; no token"
                        " can be drawn"
                    )
                if criteria:
                    _ask_criteria(criteria, decoder, counts, remaining, totals, ends, together)
                passes.append(counts)
                totals += counts
                if streamer is not None:
                    streamer.put(gained.tokens[0, : int(counts[0])].cpu())
                if not remaining.any() or bool((totals >= ends.max()).all()):
                    break
                decoder.advance(int(totals.max()))
                gained = following or run.step()
        finally:
            if streamer is not None:
                streamer.end()
        longest = min(int(totals.max()), int(ends.max()))
        sequences = decoder.sequences(longest, pad or 0).to(given)
    if not generation_config.return_dict_in_generate:
        return sequences
    counts = (
        torch.stack([torch.zeros_like(totals), *passes], dim=1)
        .cumsum(1)
        .clamp(max=longest)
        .diff(dim=1)
    )
    accept_lengths = tuple(row[row > 0] for row in counts)
    return MSNGenerateOutput(sequences=sequences, accept_lengths=accept_lengths)


def _ask_criteria(
    criteria: list,
    decoder: Decoder,
    counts: Tensor,
    remaining: Tensor,
    totals: Tensor,
    ends: Tensor,
    together: bool,
) -> None:
    """Ask after every token that a pass gained, up to the first one that ends its row.

    ``counts`` and ``remaining`` [B] are the pass's, ``totals`` [B] what came before, ``ends`` [B]
    where rows ended, all on the host. ``together``: it is written down there; else the row is cut,
    and ``counts`` and ``remaining`` corrected.
    """
    for b in counts.nonzero().flatten().tolist():
        if totals[b] >= ends[b]:
            continue
        ids, count = decoder.row(b)[None], int(counts[b])
        for kept in range(1, count + 1):
            seen = ids[:, : ids.shape[1] - count + kept]
            if any(bool(torch.as_tensor(criterion(seen, None)).all()) for criterion in criteria):
                if together:
                    ends[b] = totals[b] + kept
                else:
                    decoder.cut(b, count - kept)
                    counts[b], remaining[b] = kept, 0
                break

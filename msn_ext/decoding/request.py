"""A call of ``generate``, checked: every option that cannot be followed exactly is refused here.

Later, while decoding (:mod:`.loop`), come only: a drafter that another call uses, what a drafter's
``start`` refuses (a corpus of another vocabulary), and probabilities that hold NaN. Models are
refused by :mod:`.support` and :mod:`.rows`, processors of logits by :mod:`.processors`; all are
asked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StopStringCriteria,
)

from .attention import KernelAttention, MaskAttention
from .drafters import Drafter, DraftTree
from .engine import NativePlan, engine_of, native_plan_for
from .forward.adapter import NoiseAdapter
from .forward.modules import Modules
from .past import checked_past
from .processors import checked_processors
from .ranks import Ranks, ranks_of
from .rows import check_rows
from .support import attention_for, longrope_boundary, longrope_tokens, looks_ahead
from .verification import Sampler, Targets, greedy

# Settings of a GenerationConfig that change the output or its form in a way this version does not
# follow, with the values under which they change nothing.
_NEUTRAL: dict[str, tuple] = {
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
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
# Keyword arguments that transformers prepares and this decoder makes itself.
_PREPARED = {"use_cache", "logits_to_keep", "cache_position"}


@dataclass(frozen=True, eq=False)
class Request:
    """One call of ``generate``: what to decode, and how.

    Rows are counted in two ways. A *slot* counts from the first column of the padded batch: prompts
    and caches have slots. A *position* counts a row's tokens without padding: the text so far and
    the model's positions have those. ``slot = position + offsets[b]``.

    Attributes:
        model: a causal language model.
        attention: how it attends to a tree, from :func:`.support.attention_for`.
        input_ids: int64 [B, P], left-padded prompts, by slots; on the model's device.
        offsets: int64 [B], how many slots of each row are padding.
        drafter: where the guesses come from.
        draft: what the user asked to draft with, a name or an object; captured steps are kept by
            it.
        max_new_tokens: to gain per row, exactly unless an end-of-text token or a criterion comes
            first; >= 1.
        eos_token_ids: int64 [E]; what ends a row.
        pad_token_id: what stands after a row that ended before others.
        targets: the next token after every node (:mod:`.verification`).
        processors: of the logits, as :func:`.processors.checked_processors` gives them.
        criteria: asked after every token of a row.
        ends_together: rows that a criterion ended go on until the last one has ended.
        streamer: gets the tokens of each pass; of several rows one of each at a time, or there is
            one for each row.
        streamer_has_prompt: it need not be given the prompt.
        native_plan: for the native engine's forward passes; None: the model's own.
        past: where keys and values of the text come from, and where they go to; None: nowhere.
        past_slots: how many slots of the prompts come from there.
        outputs: what is kept of every new token, "logits" and "scores".
        modules: of the model; None: nobody has walked them for this call.
    """

    model: PreTrainedModel
    attention: KernelAttention | MaskAttention
    input_ids: Tensor
    offsets: Tensor
    drafter: Drafter
    draft: str | DraftTree | Drafter
    max_new_tokens: int
    eos_token_ids: Tensor
    pad_token_id: int = 0
    targets: Targets = greedy
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: Sequence[StoppingCriteria] = ()
    ends_together: bool = False
    streamer: BaseStreamer | Sequence[BaseStreamer] | None = None
    streamer_has_prompt: bool = False
    native_plan: NativePlan | None = None
    past: DynamicCache | None = None
    past_slots: int = 0
    outputs: frozenset[str] = frozenset()
    modules: Modules | None = None

    @property
    def engine(self) -> str:
        """What computes the forward passes: "native" or "torch"."""
        return engine_of(self.native_plan)

    @classmethod
    def greedy_unpadded(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        drafter: Drafter,
        max_new_tokens: int,
        engine: str = "auto",
    ) -> Request:
        """Make a request for greedy decoding, without padding and without an end of text."""
        modules = Modules(model)
        check_rows(model, drafter, len(input_ids), modules)
        return cls(
            model,
            attention_for(model, modules),
            input_ids,
            input_ids.new_zeros(len(input_ids)),
            drafter,
            drafter,
            max_new_tokens,
            input_ids.new_empty(0),
            native_plan=native_plan_for(model, engine, modules),
            modules=modules,
        )

    @cached_property
    def ranks(self) -> Ranks | None:
        """The processes that compute the model together; None: this one alone."""
        return ranks_of(self.model)

    @cached_property
    def noise_adapter(self) -> NoiseAdapter | None:
        """The gated adapter that tails of a draft are computed with; None: the model has none, or
        it is turned off.
        """
        return (self.modules or Modules(self.model)).noise_adapter

    @cached_property
    def longrope_boundary(self) -> int:
        """The slot where 'longrope' switches its factors; 0: not on the way.

        Raises:
            ValueError: it lies on the way of several rows.
        """
        config = self.model.config.get_text_config(decoder=True)
        return longrope_boundary(config, self.input_ids, self.offsets, self.max_new_tokens)


def request_for(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    draft: str | DraftTree | Drafter,
    drafter: Drafter,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    streamer: BaseStreamer | Sequence[BaseStreamer] | None,
    streamer_has_prompt: bool,
    native_plan: NativePlan | None,
    modules: Modules,
    **model_kwargs: Any,
) -> Request:
    """Make a request of what transformers prepared for a custom decoding method.

    Args:
        input_ids: int64 [B, P] on the model's device.
        draft, drafter: what the user asked to draft with, and the drafter that it stands for.
        native_plan: for the native engine's forward passes; None: the model's own.
        modules: of the model.
        model_kwargs: for the model; all but the mask and the positions are refused.

    Raises:
        ValueError: what cannot be followed exactly; says which argument.
    """
    check_rows(model, drafter, len(input_ids), modules)
    attention = attention_for(model, modules)
    _check_config(generation_config)
    processors = checked_processors(logits_processor, len(input_ids))
    attention_mask = model_kwargs.pop("attention_mask", None)
    position_ids = model_kwargs.pop("position_ids", None)
    past = _check_model_kwargs(model_kwargs)
    if not (generation_config.return_dict_in_generate or getattr(past, "_is_user_defined", False)):
        past = None  # transformers' own, which nobody asks for
    given = getattr(generation_config, "_mask_length", input_ids.shape[1])
    if attention_mask is None and given != input_ids.shape[1]:  # ones, which transformers drops
        _check_mask(input_ids, input_ids.new_ones(len(input_ids), given))
    if streamer is not None:
        _check_streamer(streamer, len(input_ids))
    pad = generation_config._pad_token_tensor
    pad_token_id = None if pad is None else int(pad)
    offsets = _padding(input_ids, attention_mask, pad_token_id)
    _check_positions(position_ids, input_ids, offsets)
    request = Request(
        model,
        attention,
        input_ids,
        offsets,
        drafter,
        draft,
        _max_new_tokens(input_ids, stopping_criteria, generation_config),
        _eos_token_ids(input_ids, stopping_criteria),
        pad_token_id or 0,
        _targets(generation_config, input_ids.device, ranks_of(model)),
        processors,
        _others(stopping_criteria),
        # Without an end-of-text token transformers pads nothing.
        ends_together=len(input_ids) > 1
        and not any(hasattr(c, "eos_token_id") for c in stopping_criteria),
        streamer=streamer,
        streamer_has_prompt=streamer_has_prompt,
        native_plan=native_plan,
        past=past,
        past_slots=0 if past is None else _past_slots(past, model, input_ids, offsets),
        outputs=_outputs(generation_config),
        modules=modules,
    )
    _ = request.longrope_boundary  # refuses, too
    return request


def _past_slots(
    past: DynamicCache, model: PreTrainedModel, input_ids: Tensor, offsets: Tensor
) -> int:
    config = model.config.get_text_config(decoder=True)
    slots = checked_past(past, len(DynamicCache(config=config).layers), *input_ids.shape)
    if looks_ahead(config):  # the cached ones have not seen what follows
        return 0
    first_factors = longrope_tokens(config)
    # Beyond them every key is another one; nobody knows by which factors the cached ones turned.
    if first_factors and input_ids.shape[1] > first_factors + int(offsets.min()):
        return 0
    return slots


def _outputs(config: GenerationConfig) -> frozenset[str]:
    names = ("scores", "logits") if config.return_dict_in_generate else ()
    return frozenset(name for name in names if getattr(config, f"output_{name}"))


def prompts_of(input_ids: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Return the prompts, given as ``input_ids`` or, among the options, as ``inputs``, which is
    taken out.

    Raises:
        ValueError: these are no prompts; says so before transformers sees them.
    """
    inputs, attention_mask = options.pop("inputs", None), options.get("attention_mask")
    if options.get("inputs_embeds") is not None:
        raise ValueError(
            "inputs_embeds is given; expected None: msn_ext.generate reads tokens, input_ids"
        )
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs is given beside input_ids; expected one of them")
    if inputs is not None:
        input_ids = inputs
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
    if attention_mask is not None:
        _check_mask(input_ids, attention_mask)
    return input_ids


def _check_mask(input_ids: Tensor, attention_mask: Tensor) -> None:
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected"
            f" {list(input_ids.shape)}: input_ids is to be the whole text, what past_key_values"
            " holds included"
        )


def option(name: str, options: dict[str, Any], configs: Sequence[GenerationConfig | None]) -> Any:
    """Return what an option of ``model.generate`` is, as given or else as configured."""
    if name in options:
        return options[name]
    return next(filter(None, (getattr(config, name, None) for config in configs)), None)


def check_drafting(assistant_model: Any) -> None:
    """Refuse an assistant, which transformers hands to no custom decoding method."""
    if assistant_model is not None:
        raise ValueError(
            f"assistant_model is a {type(assistant_model).__name__}; expected None:"
            " msn_ext.generate drafts without another model, as draft= says"
        )


def check_healing(token_healing: bool | None) -> None:
    """Refuse to change the prompt's last tokens, for which transformers has no tokenizer then."""
    if token_healing:
        raise ValueError(
            f"token_healing is {token_healing!r}; expected False: msn_ext.generate goes on from the"
            " prompt as it is (model.heal_tokens(input_ids, tokenizer) heals it before)"
        )


def with_stop_strings(
    criteria: StoppingCriteriaList | None, stop_strings: str | list[str], tokenizer
) -> StoppingCriteriaList:
    """Return the criteria and one that ends a row at a stop string, which transformers refuses to
    make for a custom decoding method.
    """
    if tokenizer is None:
        raise ValueError(
            "tokenizer is None; expected the model's tokenizer, which stop_strings needs"
        )
    return StoppingCriteriaList([*(criteria or []), StopStringCriteria(tokenizer, stop_strings)])


def one_a_row(streamer) -> bool:
    """Return whether these are several streamers, one for each row."""
    return isinstance(streamer, Sequence) and not hasattr(streamer, "put")


def _check_streamer(streamer, rows: int) -> None:
    """Raise ValueError where this is neither a streamer nor one for each row."""
    several = one_a_row(streamer)
    for each in streamer if several else [streamer]:
        if not (callable(getattr(each, "put", None)) and callable(getattr(each, "end", None))):
            raise ValueError(
                f"streamer is {each!r}; expected an object with put(tokens) and end(), or a list of"
                " them, one for each row"
            )
    if several and len(streamer) != rows:
        raise ValueError(
            f"streamer is a list of {len(streamer)}; expected one for each of the {rows} rows"
        )
    if several and len({id(each) for each in streamer}) < rows:
        raise ValueError(
            "streamer has the same one for several rows; expected one of its own for each"
        )


def _check_config(config: GenerationConfig) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise ValueError(
                f"{name} is {value!r}; msn_ext.generate does not support it (expected"
                f" {neutral[-1]!r})"
            )


def _check_model_kwargs(model_kwargs: dict[str, Any]) -> Any:
    """Raise ValueError where the model is to be given more than prompts; take the cache out."""
    past_key_values = model_kwargs.pop("past_key_values", None)
    # What encoders made of images and sounds is there, and empty, where there are none.
    encoded = model_kwargs.pop("mm_encoder_outputs", None) or {}
    given = {name for name, value in model_kwargs.items() if not _says_nothing(name, value)}
    if unknown := (given | {f"{kind}s" for kind in encoded}) - _PREPARED:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: msn_ext.generate does not support model inputs beside"
            " input_ids"
        )
    return past_key_values


def _says_nothing(name: str, value: Any) -> bool:
    """Return whether a model input is none: nothing, or that all tokens are of type 0, text."""
    types = name in ("token_type_ids", "mm_token_type_ids")
    return value is None or (types and not bool(value.any()))


def _padding(input_ids: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """Return how many slots of each row are left padding, int64 [B]."""
    if attention_mask is None:
        return input_ids.new_zeros(input_ids.shape[0])
    _check_mask(input_ids, attention_mask)
    mask = attention_mask.to(input_ids.device).bool()
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        message = (
            "attention_mask has a 0 after a 1; expected left padding only (padding_side='left')"
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
    """Raise ValueError where ``position_ids`` [..., 1 or B, P] are not those that the decoder
    counts itself.
    """
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


def _max_new_tokens(
    input_ids: Tensor, criteria: StoppingCriteriaList, config: GenerationConfig
) -> int:
    # A user's criterion takes the place of transformers' own, which has the config's max_length.
    lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    prompt = input_ids.shape[1]
    left = min(lengths or [config.max_length]) - prompt
    if left < 1:
        raise ValueError(
            f"max_length leaves {left} tokens after a prompt of {prompt}; expected 1 or more"
        )
    return left


def _others(criteria: StoppingCriteriaList) -> list[StoppingCriteria]:
    """Return the criteria but for those that the decoder follows itself."""
    return [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]


def _eos_token_ids(input_ids: Tensor, criteria: StoppingCriteriaList) -> Tensor:
    eos = [c.eos_token_id.flatten() for c in criteria if type(c) is EosTokenCriteria]
    return torch.cat(eos).to(input_ids.device, torch.int64) if eos else input_ids.new_empty(0)


def _targets(config: GenerationConfig, device: torch.device, ranks: Ranks | None) -> Targets:
    if config.do_sample:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        return Sampler(seed if ranks is None else ranks.first(seed), device)
    return greedy

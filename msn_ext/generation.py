"""``generate``: Hugging Face conventions in, the same output in fewer forward passes out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from . import profile
from .decoding import (
    RETRIEVAL,
    Drafter,
    DraftTree,
    Lookahead,
    SamDecoding,
    TokenRecycling,
    TreeDrafter,
    decode,
)
from .decoding.engine import engine_of, native_plan_for
from .decoding.forward.modules import Modules
from .decoding.method import (
    argument_of_caller,
    method_of,
    model_by_name,
    transformers_method_of,
)
from .decoding.request import (
    check_drafting,
    check_healing,
    option,
    prompts_of,
    request_for,
    with_stop_strings,
)
from .decoding.support import check_in_memory, check_model

DRAFTS: dict[str, Callable[[], DraftTree | Drafter] | None] = {
    "auto": None,  # depends on the model
    "paper": DraftTree.paper,
    "jacobi": functools.partial(DraftTree.chain, 6),
    "lookup": functools.partial(DraftTree.chain, 8, rank=RETRIEVAL),
    "suffix": SamDecoding,
    "recycling": TokenRecycling,
    "lookahead": Lookahead,
    "none": functools.partial(DraftTree.chain, 1),
}


@dataclass
class MSNGenerateOutput(GenerateDecoderOnlyOutput):
    """The output of ``model.generate``, and how it came about.

    Attributes:
        sequences: int64 [B, P + new], prompts included, finished rows padded.
        scores, logits: for every new token float32 [B, V], with ``output_scores`` and
            ``output_logits``: after and before the processors of logits. After a row's end they
            are what the model says of the padding, as plain decoding has it.
        past_key_values: a ``DynamicCache`` of them but for the last token, every layer whole.
        accept_lengths: per row an int64 tensor with one entry a forward pass, the prompt's pass
            first: the tokens that it gained. They sum to the row's new tokens.
        engine: what computed the forward passes, ``"native"`` or ``"torch"``.
    """

    accept_lengths: tuple[Tensor, ...] | None = None
    engine: str | None = None


# Over 60 lines with its docstring, which is the reference of the public function.
@model_by_name
def generate(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    draft: str | DraftTree | Drafter = "auto",
    engine: str = "auto",
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
    near-ties. Also usable as ``model.generate(**inputs, custom_generate=msn_ext.generate)``, in the
    place of a method (``model.generate = functools.partial(msn_ext.generate, model)``), and as the
    function of a model's folder ``custom_generate``.

    Args:
        model: a decoder-only transformers model.
        input_ids: int64 [B, P], left-padded where the rows differ in length; also as ``inputs=``.
        draft: ``"auto"`` (the best guesses of all sources, as many as pay by the clock),
            ``"paper"`` (the paper's 68 guesses), ``"jacobi"`` (a chain of 5 denoised guesses),
            ``"lookup"`` (7 tokens retrieved from the text), ``"suffix"`` (SAM-Decoding, arXiv
            2411.10666), ``"recycling"`` (Token Recycling, arXiv 2408.08696), ``"lookahead"``
            (arXiv 2402.02057), ``"none"`` (plain decoding), a :class:`DraftTree` or a
            :class:`Drafter`.
        engine: ``"native"`` (our own forward pass: over packed weights on the CPU, with fused ops
            on a GPU), ``"torch"`` (the model's own) or ``"auto"`` (native on the CPU where it can
            be; where not, the logger ``msn_ext`` says why at level INFO).
        tokenizer: needed with ``stop_strings``.
        streamer: gets the prompt, then the tokens of each forward pass, then ``end()``. Of several
            rows it gets int64 [B], a token of each, at a time, as in ``model.generate`` (most of
            transformers' refuse that); or a list, one for each row: its prompt without padding, the
            tokens of each pass, ``end()`` where the row ends.
        generation_config, generation_kwargs: as for ``model.generate``; among them
            ``attention_mask`` [B, P], 0 at padding (None: as ``model.generate`` infers it), and
            ``past_key_values``, a ``DynamicCache`` of the beginning of ``input_ids``, which are
            the whole text: only the rest is read. It is filled in place, and may be empty.
        logits_processor: only kinds that depend on nothing but the text before and the logits:
            transformers' own, a :func:`msn_ext.grammar`, and those that are declared
            :func:`msn_ext.stateless`.
        stopping_criteria: asked after every token, with scores None.

    Returns:
        int64 [B, P + new], or with ``return_dict_in_generate=True`` an :class:`MSNGenerateOutput`.

    Raises:
        ValueError: a model, an option or an input that cannot be followed exactly; says which.
    """
    check_model(model)
    if (
        input_ids is not None
        and generation_config is not None
        and hasattr(generation_config, "_eos_token_tensor")
    ):
        # transformers calls us back: `custom_generate=msn_ext.generate`, everything prepared.
        check_drafting(argument_of_caller("assistant_model"))
        ours = streamer is not None  # transformers' own streamer has the prompt
        return _decode(
            model,
            input_ids.to(model.device, torch.int64),
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            draft=draft,
            engine=engine,
            streamer=streamer if ours else argument_of_caller("streamer"),
            streamer_has_prompt=not ours,
            result_device=input_ids.device,
            **generation_kwargs,
        )
    decoding = generation_kwargs.pop("custom_generate", None)
    if isinstance(decoding, functools.partial) and decoding.func is _decode:
        # What the last line calls has called the method that we took the place of.
        return transformers_method_of(model)(
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            custom_generate=decoding,
            **generation_kwargs,
        )
    if decoding not in (None, generate):
        raise ValueError(f"custom_generate is {decoding!r}; expected None: this is such a method")
    method = method_of(model)
    input_ids = prompts_of(input_ids, generation_kwargs)
    configs = generation_config, model.generation_config
    check_drafting(generation_kwargs.get("assistant_model"))
    check_healing(option("token_healing", generation_kwargs, configs))
    stop_strings = option("stop_strings", generation_kwargs, configs)
    if stop_strings is not None:  # none in the place of what both configs say
        generation_kwargs["stop_strings"] = None
        if generation_config is not None and not model.generation_config.stop_strings:
            generation_config = copy.deepcopy(generation_config)
            generation_config.stop_strings = generation_kwargs.pop("stop_strings")
    if stop_strings:
        stopping_criteria = with_stop_strings(stopping_criteria, stop_strings, tokenizer)
    return method(
        input_ids.to(model.device, torch.int64),
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        custom_generate=functools.partial(
            _decode,
            draft=draft,
            engine=engine,
            streamer=streamer,
            result_device=input_ids.device,
        ),
        **generation_kwargs,
    )


@model_by_name
def generate_as_transformers(model: PreTrainedModel, inputs: Tensor | None = None, **kwargs):
    """Generate with the arguments of ``model.generate``: what transformers calls in its place where
    a folder has ``custom_generate/`` (``msn export-generate``).

    Args:
        model: as in :func:`generate`, by name.
        inputs: int64 [B, P]; the same as ``input_ids``.
        kwargs: of ``model.generate`` and of :func:`generate`; None: not given.

    Raises:
        ValueError: as in :func:`generate`.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    return generate(model, inputs=inputs, **given)


def drafter_for(
    draft: str | DraftTree | Drafter,
    model: PreTrainedModel | None,
    engine: str = "torch",
) -> Drafter:
    """Return the drafter that the argument ``draft`` of :func:`generate` stands for.

    Args:
        draft: a name of :data:`DRAFTS`, a tree or a drafter.
        model: needed for "auto".
        engine: what computes the forward passes, "native" or "torch".
    """
    if draft == "auto":
        return profile.auto(model, engine=engine)
    if isinstance(draft, str) and (make := DRAFTS.get(draft)) is not None:
        draft = make()
    if isinstance(draft, DraftTree):
        return TreeDrafter(draft)
    if isinstance(draft, Drafter) and not isinstance(draft, type):
        return draft
    names = ", ".join(repr(name) for name in DRAFTS)
    raise ValueError(
        f"draft is {draft!r}; expected {names}, a DraftTree or a Drafter (an object with max_depth,"
        " start, first, propose and observe)"
    )


@torch.inference_mode(False)  # what stays from call to call could not be changed outside of it
@torch.no_grad()
def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    draft: str | DraftTree | Drafter,
    engine: str,
    generation_config: GenerationConfig,
    result_device: torch.device,
    streamer: BaseStreamer | Sequence[BaseStreamer] | None,
    streamer_has_prompt: bool = False,
    **prepared,
) -> Tensor | MSNGenerateOutput:
    """Decode what ``GenerationMixin.generate`` has prepared: it calls this as its decoding method.

    ``input_ids`` are on the model's device, the result is on ``result_device``.
    """
    modules = Modules(model)
    check_in_memory(model, modules.parameters)
    _own_buffers(modules)
    native_plan = native_plan_for(model, engine, modules)
    request = request_for(
        model,
        input_ids,
        draft=draft,
        drafter=drafter_for(draft, model, engine_of(native_plan)),
        native_plan=native_plan,
        modules=modules,
        generation_config=generation_config,
        streamer=streamer,
        streamer_has_prompt=streamer_has_prompt,
        **prepared,
    )
    decoded = decode(request)
    sequences = decoded.sequences.to(result_device)
    if not generation_config.return_dict_in_generate:
        return sequences
    accept_lengths = decoded.accept_lengths()
    return MSNGenerateOutput(
        sequences=cast(torch.LongTensor, sequences),
        accept_lengths=accept_lengths,
        scores=decoded.output("scores"),  # type: ignore[arg-type]  # of FloatTensor, it says
        logits=decoded.output("logits"),  # type: ignore[arg-type]
        past_key_values=request.past,
        engine=request.engine,
    )


def _own_buffers(modules: Modules) -> None:
    """Make the buffers of a model that was made under ``torch.inference_mode()`` ordinary ones:
    rotary embeddings may change theirs in place.
    """
    for module in modules.all:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                setattr(module, name, buffer.clone())

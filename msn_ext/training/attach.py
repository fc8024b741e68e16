"""Put noise into a trainer that is there already, in one line."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from msn_ext.gates import mark_gated

from .collator import NoisyCollator
from .figures import Figures
from .gate import CHECKPOINTED, GatedLoss, check_gate
from .layouts import ANNOTATIONS, NO_LABEL, branch_mask
from .teacher import TaughtLoss, check_teacher

Weights = tuple[float, float]
PLAIN = (1.0, 1.0)
CROSS_ENTROPY = {("transformers", "Trainer"), ("trl", "SFTTrainer")}
"""Trainers whose loss is plain cross-entropy, unless a setting of theirs says otherwise."""
ROWS = 512  # of logits in float32 at a time


def add_noise(
    trainer,
    *,
    loss_weights: Weights | Callable[[float], Weights] = PLAIN,
    gate: bool = False,
    divergence: str = "kl",
    curriculum: bool = False,
    teacher: str | None = None,
    **settings,
):
    """Put noise into the training batches of a ``transformers.Trainer`` or TRL ``SFTTrainer``::

        trainer = SFTTrainer(model, args, train_dataset=data)
        msn_ext.add_noise(trainer, layout="branch", segments=24)
        trainer.train()

    Evaluation and prediction stay free of noise, epochs are counted. Logged beside the loss:
    ``clean_loss`` and ``noise_loss`` (mean cross-entropy after clean and after noise tokens,
    natural logarithm) and ``noise_accuracy`` (share of noise tokens after which the likeliest
    token is right), since the last log.

    Args:
        trainer: not yet trained; packing and padding-free batches are fine.
        loss_weights: of the labels after clean tokens and after noise, or a function that gives
            them for the share of the steps that are done, 0 to 1; the trainer still divides by the
            number of labels. Others than (1, 1) need a teacher, or a trainer whose loss is plain
            cross-entropy.
        gate: train a PEFT LoRA for the noise alone: the text is computed by the base model, which
            is the teacher of the noise beside it (``layout="branch"``), so that nothing that the
            model says of a text can change. Labels, where there are any, only say where noise may
            be. The trainer's own loss is not computed; evaluation leaves the adapter out. Logged:
            ``noise_loss`` (the divergence), ``noise_accuracy`` and ``noise_accuracy_8`` (share of
            noise tokens after which the base model's likeliest token is the likeliest, and among
            the likeliest eight). The adapter's folder says that it is gated.
        divergence: with ``gate`` or a teacher, of a distribution from the teacher's: ``"kl"``
            (Kullback-Leibler), ``"tv"`` (total variation), ``"both"`` (their sum).
        curriculum: with ``gate``, segments have 1, 2, … ``length`` tokens in equal shares of the
            steps.
        teacher: ``"base"``: without a gate, every label's place learns what a PEFT model says there
            of the clean text without its adapter, not the label: the adapter learns to guess after
            noise, and on clean text it is held to what was said before. One more pass over the
            text, without a gradient; the trainer's own loss is not computed. Logged: ``clean_loss``
            and ``noise_loss`` (the divergences) and ``noise_accuracy`` (of the teacher's likeliest
            token). None: labels are learned.
        settings: of :class:`NoisyCollator`, all but ``inner`` and ``config``.

    Returns:
        The trainer.

    Raises:
        ValueError: a setting is wrong or does not fit the trainer or its model, or the trainer has
            noise already.
        TypeError: there is no such setting.
    """
    known = inspect.signature(NoisyCollator).parameters.keys() - {"inner", "config"}
    if unknown := settings.keys() - known:
        raise TypeError(
            f"add_noise() has no setting {min(unknown)!r}; expected some of"
            f" {', '.join(sorted(known))}"
        )
    if why := _why_not_causal(trainer.model):
        raise ValueError(
            f"trainer has a {type(trainer.model).__name__}, {why}; expected a causal language model"
        )
    if isinstance(trainer.data_collator, NoisyCollator):
        raise ValueError("trainer has noise already: its data_collator is a NoisyCollator")
    if gate:
        _check_gated(trainer, loss_weights, divergence, teacher, settings)
    elif curriculum:
        raise ValueError("curriculum is True; expected False, or gate=True beside it")
    elif teacher is not None:
        check_teacher(trainer.model, teacher, divergence, settings)
    _check_weights(trainer, loss_weights, teacher)
    inner = trainer.data_collator
    noisy = NoisyCollator(inner, config=trainer.model.config, **settings)
    if noisy.layout == "branch" and getattr(
        getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False
    ):
        raise ValueError(
            "layout='branch' and a PEFT prompt, which lengthens the text, do not go together;"
            " expected layout='replace'"
        )
    noisy.annotate, noisy.gated = True, gate
    if hasattr(inner, "tokenizer"):
        noisy.tokenizer = inner.tokenizer
    trainer.data_collator = noisy
    for name in ("get_eval_dataloader", "get_test_dataloader"):
        setattr(trainer, name, _with_collator(trainer, inner, getattr(trainer, name)))
    if gate:
        trainer.noise = _gated_loss(trainer, noisy, divergence, curriculum)
    elif teacher is not None:
        weights = _weights_of_step(trainer, loss_weights)
        trainer.noise = TaughtLoss(trainer, noisy, divergence, weights)
    else:
        trainer.noise = NoisyLoss(trainer, noisy, _weights_of_step(trainer, loss_weights))
    # Imported here: with transformers' callbacks come seconds of imports, which the workers of a
    # data loader would wait for, too, since they import this package for its collator.
    from .epochs import Epochs

    trainer.add_callback(Epochs(noisy, trainer.noise.figures))
    trainer.compute_loss = trainer.noise.around(trainer.compute_loss)
    trainer.log = _with_noise_logged(trainer, trainer.log)
    return trainer


def _check_gated(trainer, loss_weights, divergence: str, teacher, settings: dict) -> None:
    """Raise ValueError where a gate does not fit the trainer or the other settings."""
    if teacher is not None:
        raise ValueError(
            f"gate=True has the base model as its teacher by itself; teacher is {teacher!r},"
            " expected None"
        )
    check_gate(trainer.model, divergence)
    names = "activation_checkpointing", "gradient_checkpointing"  # by release of transformers
    if any(getattr(trainer.args, name, False) for name in names):
        raise ValueError(CHECKPOINTED)
    if settings.setdefault("layout", "branch") != "branch":
        raise ValueError(
            f"gate=True and layout={settings['layout']!r} do not go together: the text"
            " beside the noise is the teacher; expected layout='branch'"
        )
    if settings.get("content") == "self":
        raise ValueError(
            "gate=True and content='self' do not go together: noise is what the"
            " untouched model would have to guess; expected another content"
        )
    if callable(loss_weights) or tuple(loss_weights) != PLAIN:
        raise ValueError(
            "loss_weights weigh labels, which gate=True does without; leave them at (1, 1)"
        )


def _gated_loss(trainer, noisy: NoisyCollator, divergence: str, curriculum: bool) -> GatedLoss:
    """Return the loss of a trainer whose adapters, from now on, say that they are gated."""
    for name in trainer.model.active_adapters:
        mark_gated(trainer.model.peft_config[name], noisy.length, noisy.content)
    loss = GatedLoss(trainer, noisy, divergence)
    if curriculum:
        trainer.get_batch_samples = loss.growing(trainer.get_batch_samples)
    return loss


def _why_not_causal(model) -> str | None:
    """Return why a model does not predict each next token from those before; None: it does, as far
    as it says.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model"
    if hasattr(model, "can_generate") and not model.can_generate():
        return "which does not generate text"
    # Only models that can be both say so (BERT and its like).
    if getattr(config, "is_decoder", True) is False:
        return "which looks at the tokens after, too, as config.is_decoder is False"
    return None


def _check_weights(trainer, loss_weights, teacher) -> None:
    """Raise ValueError where weights are wrong, or weigh another loss than plain cross-entropy."""
    weighed = callable(loss_weights) or _check(loss_weights) != PLAIN
    if weighed and teacher is None and (own := _own_loss(trainer)):
        raise ValueError(
            f"loss_weights weigh plain cross-entropy, but the trainer has {own}; "
            "leave them at (1, 1)"
        )


def _own_loss(trainer) -> str | None:
    """Name what makes a trainer's loss another one than cross-entropy."""
    if "compute_loss" in vars(trainer):
        return "a compute_loss of its own"
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    if (owner.__module__.partition(".")[0], owner.__name__) not in CROSS_ENTROPY:
        return f"the compute_loss of {owner.__qualname__}"
    if getattr(trainer, "label_smoother", None) is not None:
        return "label_smoothing_factor"
    if getattr(trainer, "compute_loss_func", None) is not None:
        return "compute_loss_func"
    kind = getattr(trainer.args, "loss_type", "nll")
    return None if kind == "nll" else f"loss_type={kind!r}"


def _check(weights: Weights) -> Weights:
    try:
        clean, noise = weights
        right = 0 <= clean < float("inf") and 0 <= noise < float("inf")
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"loss_weights is {weights!r}; expected two numbers, 0 or more")
    return clean, noise


def _weights_of_step(trainer, loss_weights) -> Callable[[], Weights]:
    """Return a function that gives the weights of the trainer's current step."""
    if not callable(loss_weights):
        return lambda: loss_weights
    return lambda: _check(loss_weights(trainer.state.global_step / max(trainer.state.max_steps, 1)))


def _with_collator(trainer, collator, make_loader):
    """Return ``make_loader`` with another collator for as long as it runs."""

    @functools.wraps(make_loader)
    def make(*args, **kwargs):
        before, trainer.data_collator = trainer.data_collator, collator
        try:
            return make_loader(*args, **kwargs)
        finally:
            trainer.data_collator = before

    return make


def _with_noise_logged(trainer, log):
    """Return ``log`` of a trainer, with what :class:`NoisyLoss` observed beside the loss."""

    @functools.wraps(log)
    def logging(logs, *args, **kwargs):
        if "loss" in logs:
            logs |= trainer.noise.read()
        return log(logs, *args, **kwargs)

    return logging


class NoisyLoss:
    """Wraps a trainer's loss: with the mask of branches, the model's own guesses as noise, weights,
    and figures for the log.
    """

    def __init__(self, trainer, collator: NoisyCollator, weights: Callable[[], Weights]):
        self._collator, self._weights = collator, weights
        # Of the labels after clean tokens loss and count; after noise loss, count and right ones.
        self.figures = Figures(trainer)

    def around(self, compute_loss):
        """Return ``compute_loss`` of a trainer for annotated batches; others stay as they are."""

        @functools.wraps(compute_loss)
        def computed(model, inputs, *args, **kwargs):
            inputs = dict(inputs)  # a trainer may compute the loss of a batch twice
            depth, before, sample = (inputs.pop(name, None) for name in ANNOTATIONS)
            if depth is None:  # evaluation
                return compute_loss(model, inputs, *args, **kwargs)
            labels = inputs["labels"]
            mask = None
            if sample is not None:
                config, length = self._collator.config, self._collator.length
                mask = branch_mask(depth, before, sample, inputs["position_ids"], config, length)
            with self._hooked(model, mask) as outputs:
                if self._collator.content == "self":
                    inputs["input_ids"] = guess(model, inputs, depth, before, self._collator.keep)
                    outputs.clear()
                result = compute_loss(model, inputs, *args, **kwargs)
            loss, returned = result if isinstance(result, tuple) else (result, None)
            loss = self._observe(loss, outputs[0] if outputs else None, labels, depth)
            return loss if returned is None else (loss, returned)

        return computed

    @contextlib.contextmanager
    def _hooked(self, model, mask) -> Iterator[list]:
        """Give the model ``mask``, unless None, and collect its outputs within this context.

        Trainers and losses read ``attention_mask`` as [B, T'], so that the mask of branches comes
        in where the model is called. The outputs are taken there, too: a trainer may not return
        them, or not without another pass.
        """
        outputs: list = []
        hooks = [model.register_forward_hook(lambda model, given, output: outputs.append(output))]
        if mask is not None:
            with_mask = functools.partial(self._with_mask, mask)
            hooks.append(model.register_forward_pre_hook(with_mask, with_kwargs=True))
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def _with_mask(self, mask, model, args: tuple, given: dict) -> tuple[tuple, dict]:
        routed = given.get("output_router_logits")
        if routed is None:
            routed = getattr(self._collator.config, "output_router_logits", False)
        if routed:
            raise ValueError(
                "layout='branch' and the loss that balances a mixture of experts do not go"
                " together: the model would count by the mask; set router_aux_loss_coef=0 (TRL) or"
                " config.output_router_logits=False, or take layout='replace'"
            )
        return args, given | {"attention_mask": mask}

    def _observe(self, loss: Tensor, outputs, labels: Tensor, depth: Tensor) -> Tensor:
        """Add a batch to the figures; return its loss, weighted."""
        clean, noise = self._weights()
        weighted = (clean, noise) != PLAIN
        targets, noisy = labels[:, 1:], depth[:, :-1] > 0
        live = targets != NO_LABEL
        with torch.set_grad_enabled(weighted):
            found = _by_label(outputs, targets, live)
        if found is None:
            if weighted:
                raise ValueError(
                    "loss_weights need the logits of the model, which this trainer's loss does"
                    " without; leave them at (1, 1)"
                )
            warnings.warn(
                "the trainer's loss does without logits of the model: the losses after noise are"
                " not logged",
                stacklevel=2,
            )
            return loss
        losses, right = found
        noisy = noisy[live]
        seen = losses.detach()
        self.figures.add([seen * ~noisy, ~noisy, seen * noisy, noisy, right & noisy])
        if not weighted or not len(losses):
            return loss
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError(
                "loss_weights cannot be told apart from a mixture of experts' own loss; leave them"
                " at (1, 1)"
            )
        # The trainer alone knows what it divides by and multiplies with: keep both.
        scale = loss.detach() / losses.detach().sum().clamp(min=torch.finfo(losses.dtype).tiny)
        return scale * (losses * torch.where(noisy, noise, clean)).sum()

    def read(self) -> dict[str, float]:
        """Return what was observed up to the last step that is to be logged, once."""
        if (sums := self.figures.read()) is None:
            return {}
        clean_loss, clean_labels, noise_loss, noise_labels, right = sums
        figures = {}
        if clean_labels:
            figures["clean_loss"] = clean_loss / clean_labels
        if noise_labels:
            figures["noise_loss"] = noise_loss / noise_labels
            figures["noise_accuracy"] = right / noise_labels
        return figures


@torch.no_grad()
def guess(model, inputs: dict, depth: Tensor, before: Tensor, keep: Tensor) -> Tensor:
    """Return the batch's tokens with what the model guesses in place of the noise: one more pass,
    one Jacobi iteration.

    A segment's first guess is the likeliest that is wrong: were it right, it would have been
    accepted (the drafts that are checked after it in decoding are after a wrong one, too). Tokens
    of ``keep``, int64 [k], are not guessed.
    """
    ids = inputs["input_ids"].clone()
    outputs = model(**{name: x for name, x in inputs.items() if name != "labels"})
    logits = _logits(outputs, ids.shape[1])
    if logits is None:
        raise ValueError(
            "content='self' needs the logits of the model, which gives none; expected another"
            " content"
        )
    rows, columns = depth.nonzero(as_tuple=True)
    previous = before[rows, columns]
    # [n, V], without the tokens that are kept.
    guesses = logits[rows, previous].index_fill(1, keep.to(ids.device), -torch.inf)
    likeliest = guesses.topk(2, -1).indices
    right = inputs["labels"][rows, previous + 1]
    first = (depth[rows, columns] == 1) & (likeliest[:, 0] == right)
    ids[rows, columns] = torch.where(first, likeliest[:, 1], likeliest[:, 0])
    return ids


def _logits(outputs, width: int) -> Tensor | None:
    """Return [B, width, V] of a model's outputs, without a prompt that PEFT put before the text."""
    logits = (
        outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    )
    if logits is None or logits.dim() != 3 or logits.shape[1] < width:
        return None
    return logits[:, -width:]


def _by_label(outputs, targets: Tensor, live: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return cross-entropy at every label, float32 [n], and whether the likeliest token is right,
    bool [n]; None where the outputs do not tell.
    """
    if getattr(outputs, "log_probs", None) is not None:  # TRL's fused head gives no logits
        return -outputs.log_probs[live].float(), outputs.is_top1[live].bool()
    logits = _logits(outputs, targets.shape[1] + 1)
    if logits is None:
        return None
    places = live.nonzero()
    losses, right = [logits.new_zeros(0, dtype=torch.float32)], [live.new_zeros(0)]
    # In parts, which bounds the memory; gradients keep all of it anyway.
    for part in places.split(max(len(places), 1) if torch.is_grad_enabled() else ROWS):
        at = part[:, 0], part[:, 1]
        said, target = logits[at], targets[at]
        losses.append(torch.nn.functional.cross_entropy(said.float(), target, reduction="none"))
        right.append(said.detach().argmax(-1) == target)
    return torch.cat(losses), torch.cat(right)

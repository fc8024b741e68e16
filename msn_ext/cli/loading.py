"""Load what a command line names: a device, a model, its tokenizer; encode a prompt for it."""

from __future__ import annotations

import argparse
import os
import sys

from msn_ext.gates import gated_noise

from .common import CommandError, UsageError, one_line

ADAPTER = "adapter_config.json"


def load(name: str | None, dtype: str | None, device: str | None):
    """Return a model in evaluation mode, its tokenizer, and its device's name.

    Args:
        name: a folder, also of an adapter, or a hub id; None: the demo model.
        dtype: of the weights; None: as they are stored.
        device: None: :func:`default_device`.
    """
    import torch

    device = _checked_device(device) if device is not None else default_device()
    if name is None:
        from msn_ext.demo import load_model

        model, tokenizer = load_model()
        return model.to(device, getattr(torch, dtype) if dtype else None), tokenizer, device

    from transformers import AutoModelForCausalLM

    from msn_ext.terminal import quiet_transformers

    source, local = _source(name)
    adapter = local and os.path.isfile(os.path.join(source, ADAPTER))
    with quiet_transformers(bars=not local):  # the bars of a download stay
        try:
            make = _with_adapter if adapter else AutoModelForCausalLM.from_pretrained
            model = make(source, dtype=dtype or "auto", trust_remote_code=False)
        except Exception as error:
            raise CommandError(f"--model {name}: {one_line(error)}") from error
        tokenizer = _tokenizer_of(source, name)
    return model.eval().to(device), tokenizer, device


def load_for(arguments: argparse.Namespace):
    """Return what :func:`load` does, for a command with ``--model``, ``--dtype``, ``--device``,
    ``--engine`` and ``--weights``.
    """
    if arguments.weights and arguments.engine == "torch":
        raise UsageError(
            f"--weights {arguments.weights} needs our own forward pass; --engine is torch"
        )
    model, tokenizer, device = load(arguments.model, arguments.dtype, arguments.device)
    if arguments.weights:
        from msn_ext.decoding import prepare

        try:
            prepare(model, weights=arguments.weights)
        except ValueError as error:
            raise CommandError(f"--weights {arguments.weights}: {one_line(error)}") from error
    return model, tokenizer, device


def _with_adapter(source: str, **options):
    """Return a model with the adapter in a folder, as ``msn train`` leaves it: in its weights, or
    beside them, where it is gated.
    """
    try:
        from peft import AutoPeftModelForCausalLM
    except ImportError as error:
        raise CommandError("an adapter; to load it: pip install peft") from error
    model = AutoPeftModelForCausalLM.from_pretrained(source, **options)
    gated = any(map(gated_noise, model.peft_config.values()))
    return model if gated else model.merge_and_unload()


def load_tokenizer(name: str | None):
    """Return a model's tokenizer and its ``vocab_size``, without loading the weights."""
    from msn_ext.terminal import quiet_transformers

    if name is None:
        from msn_ext.demo import load_model

        model, tokenizer = load_model()
        return tokenizer, model.config.vocab_size

    from transformers import AutoConfig

    source, local = _source(name)
    with quiet_transformers(bars=not local):
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            raise CommandError(f"--model {name}: {one_line(error)}") from error
        return _tokenizer_of(source, name), config.get_text_config(decoder=True).vocab_size


def _tokenizer_of(source: str, name: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise CommandError(
            f"--model {name}: its tokenizer is missing or cannot be loaded"
        ) from error


def _source(name: str) -> tuple[str, bool]:
    """Return where a model comes from, and whether that is a folder."""
    folder = os.path.expanduser(name)
    local = os.path.isdir(folder)
    if os.path.isfile(folder):
        raise CommandError(f"--model {name}: a file; expected a folder or a hub id")
    if not local and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise CommandError(f"--model {name}: no such folder")
    if local and not any(
        os.path.isfile(os.path.join(folder, file)) for file in ("config.json", ADAPTER)
    ):
        raise CommandError(f"--model {name}: no config.json in this folder, so it holds no model")
    return (folder if local else name), local


def default_device() -> str:
    """Return ``cuda`` if torch and the kernels can use it, else ``cpu``."""
    import torch

    import msn_ext

    return "cuda" if torch.cuda.is_available() and msn_ext.build_info()["cuda"] else "cpu"


def _checked_device(name: str) -> str:
    """Return ``name``; refuse what is no device, or not one that can be used here."""
    import torch

    import msn_ext

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise CommandError(f"--device {name}: torch finds no CUDA device here")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise CommandError(
                f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted"
                " from 0"
            )
        if not msn_ext.build_info()["cuda"]:
            raise CommandError(
                f"--device {name}: msn_ext has no CUDA kernels here; reinstall it with nvcc on PATH"
            )
    return name


def tokens_of(tokenizer, prompt: str, chat: bool):
    """Return the prompt's tokens, int64 [1, P]; ``chat``: in the chat template if there is one."""
    if chat and tokenizer.chat_template:
        return conversation_tokens(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def conversation_tokens(tokenizer, messages: list[dict[str, str]]):
    """Return the tokens of a conversation up to the next answer, int64 [1, P]; without a chat
    template, of its messages line by line.
    """
    if not tokenizer.chat_template:
        text = "".join(f"{message['content']}\n" for message in messages)
        return tokenizer(text, return_tensors="pt")["input_ids"]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def context_of(model) -> int | None:
    """Return how many tokens the model has positions for; None: it does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def encode(model, tokenizer, prompt: str, chat: bool, max_new_tokens: int):
    """Return the prompt's tokens, int64 [1, P] on the model's device, and how many may follow."""
    input_ids = tokens_of(tokenizer, prompt, chat)
    length = input_ids.shape[1]
    if length == 0:
        raise UsageError("the prompt is empty")
    context = context_of(model)
    if context is not None:
        if length >= context:
            raise CommandError(
                f"the prompt has {length} tokens; the model's context holds {context}, answer"
                " included"
            )
        if length + max_new_tokens > context:
            max_new_tokens = context - length
            print(
                f"msn: the model's context leaves room for {max_new_tokens} new tokens",
                file=sys.stderr,
            )
    return input_ids.to(model.device), max_new_tokens

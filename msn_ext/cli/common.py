"""What the commands share: errors, options, loading a model, encoding a prompt."""

import argparse
import contextlib
import functools
import os
import sys

# Names of msn_ext.generate's drafts; listed here because importing them costs seconds.
DRAFTS = ("auto", "paper", "jacobi", "lookup", "suffix", "recycling", "lookahead", "none")
ADAPTER = "adapter_config.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")


class CommandError(Exception):
    """What the user can put right: printed as one line, without a traceback."""

    exit_code = 1


class UsageError(CommandError):
    """A command line that makes no sense."""

    exit_code = 2


def add_draft_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft",
        choices=DRAFTS,
        default="auto",
        help=(
            "where guesses come from: everything that is known, as much of it as pays (auto), the"
            " paper's tree of 69 nodes, a Jacobi chain, look-up in the text so far, its longest"
            " repetition, Token Recycling, Lookahead decoding, or none, which is plain decoding"
            " (default: auto)"
        ),
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 … (default: cuda if it can be used, else cpu)"
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a folder or a hub id (default: the demo model)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: as they are stored)"
    )
    add_device_option(parser)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from standard input"
    )
    parser.add_argument(
        "--raw", action="store_true", help="the prompt as it is, without the model's chat template"
    )


def load(name: str | None, dtype: str | None, device: str | None):
    """The model, its tokenizer, and the device's name; the demo model where ``name`` is None."""
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
            make = _merged if adapter else AutoModelForCausalLM.from_pretrained
            model = make(source, dtype=dtype or "auto", trust_remote_code=False)
        except Exception as error:
            raise CommandError(f"--model {name}: {one_line(error)}") from error
        tokenizer = _tokenizer_of(source, name)
    return model.eval().to(device), tokenizer, device


def _merged(source: str, **options):
    """A model with the adapter in a folder, as ``msn train`` leaves it, in its weights."""
    try:
        from peft import AutoPeftModelForCausalLM
    except ImportError as error:
        raise CommandError("an adapter; to load it: pip install peft") from error
    return AutoPeftModelForCausalLM.from_pretrained(source, **options).merge_and_unload()


def load_tokenizer(name: str | None):
    """A model's tokenizer and its ``vocab_size``, without the model's weights."""
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
    """Where a model comes from, and whether that is a folder."""
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
    import torch

    import msn_ext

    return "cuda" if torch.cuda.is_available() and msn_ext.build_info()["cuda"] else "cpu"


def _checked_device(name: str) -> str:
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
    """The prompt's tokens [1, P]."""
    if chat and tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def encode(model, tokenizer, prompt: str, chat: bool, max_new_tokens: int):
    """The prompt's tokens [1, P] on the model's device, and how many may follow."""
    input_ids = tokens_of(tokenizer, prompt, chat)
    length = input_ids.shape[1]
    if length == 0:
        raise UsageError("the prompt is empty")
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
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


def standard_input() -> str:
    if sys.stdin is None:
        raise CommandError("cannot read the prompt from standard input: it is closed")
    try:
        text = sys.stdin.buffer.read().decode()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise CommandError(f"cannot read the prompt from standard input: {error}") from error
    return text.removesuffix("\n")


def checked_prompt(text: str) -> str:
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def positive_int(text: str) -> int:
    return number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def from_to(least: int, most: int):
    return functools.partial(
        number,
        kind=int,
        holds=lambda value: least <= value <= most,
        expected=f"a whole number from {least} to {most}",
    )


def positive_float(text: str) -> float:
    return number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def probability(text: str) -> float:
    return number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def number(text: str, kind, holds, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


@contextlib.contextmanager
def status(text: str):
    """Show ``text`` while something runs, on a terminal only."""
    show = sys.stderr.isatty()
    if show:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if show:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """The first line of a message; errors of kinds that are not made for readers also say their
    kind.
    """
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if message and (
        isinstance(error, (CommandError, OSError, ValueError)) or type(error) is RuntimeError
    ):
        return message
    return f"{type(error).__name__}: {message} (MSN_DEBUG=1 shows the traceback)"

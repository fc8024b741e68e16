"""The command ``msn``: demo, generate, explain, tune, corpus, info.

A subcommand is a function that adds its parser to :data:`COMMANDS`' common parser and names, with
``set_defaults(run=…)``, the function that does the work and returns the exit code. torch and
transformers are imported only once a command needs them.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import time
from collections import Counter

# Names of msn_ext.generate's drafts; listed here because importing them costs seconds.
DRAFTS = ("auto", "paper", "jacobi", "lookup", "suffix", "recycling", "lookahead", "none")
DTYPES = ("float32", "bfloat16", "float16", "float64")

PROMPTS = (
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Write a Python function that returns the first n prime numbers, then explain it step by step.",
    "Give me a recipe for pancakes: first the ingredients as a list, then the steps as a numbered list.",
)


class CommandError(Exception):
    """What the user can put right: printed as one line, without a traceback."""

    exit_code = 1


class UsageError(CommandError):
    """A command line that makes no sense."""

    exit_code = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0, 1 for an error, 2 for a wrong command line, 130 for Ctrl-C, 141 where the
        reader of stdout has gone. Errors are one line on stderr; ``MSN_DEBUG=1`` adds the traceback.
    """
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no error
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse, after --help or --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # what is still buffered would raise again when Python closes stdout
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("MSN_DEBUG"):
            raise
        print(f"msn: {_one_line(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _one_line(error: Exception) -> str:
    """The first line of a message; errors of kinds that are not made for readers also say their kind."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if message and (isinstance(error, (CommandError, OSError, ValueError)) or type(error) is RuntimeError):
        return message
    return f"{type(error).__name__}: {message} (MSN_DEBUG=1 shows the traceback)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="msn", description="Several tokens per forward pass from a causal language model, with unchanged output."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    return parser


def _add_draft_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft",
        choices=DRAFTS,
        default="auto",
        help="where guesses come from: everything that is known, as much of it as pays (auto), the paper's tree of 69 "
        "nodes, a Jacobi chain, look-up in the text so far, its longest repetition, Token Recycling, Lookahead decoding, "
        "or none, which is plain decoding (default: auto)",
    )


def _add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if it can be used, else cpu)")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a folder or a hub id (default: the demo model)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are stored)")
    _add_device_option(parser)


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from standard input")
    parser.add_argument("--raw", action="store_true", help="the prompt as it is, without the model's chat template")


# ---- msn demo ------------------------------------------------------------------------------------


def _add_demo(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="stream an answer of a small model, then compare with plain decoding",
        description="Stream an answer of SmolLM2-135M-Instruct, the tokens of one forward pass in one colour, then "
        "decode the same prompt plainly and compare.",
    )
    parser.add_argument("prompt", nargs="?", help="what to ask (default: one of a few built-in prompts)")
    parser.add_argument("--max-new-tokens", type=_positive_int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--no-color", action="store_true", help="mark passes with ‹ › (as does NO_COLOR)")
    _add_draft_option(parser)
    _add_device_option(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments) -> int:
    if arguments.prompt is None:
        prompt = random.choice(PROMPTS)
    else:
        prompt = _checked_prompt(arguments.prompt)
    color = not arguments.no_color and not os.environ.get("NO_COLOR") and sys.stdout.isatty()

    from msn_ext.demo import quiet_transformers

    model, tokenizer, device = _load(None, None, arguments.device)
    with quiet_transformers():
        input_ids, limit = _encode(model, tokenizer, prompt, True, arguments.max_new_tokens)
        # each of the two allocates and compiles something in its first passes
        _timed_plain(model, input_ids, 2)
        _timed(model, input_ids, arguments.draft, None, max_new_tokens=2)

        dtype = str(model.dtype).removeprefix("torch.")
        print(f"SmolLM2-135M-Instruct, {dtype}, {device}. Prompt: {prompt}\n")
        streamer = PassStreamer(tokenizer, sys.stdout, color=color, mark=not color)
        drafted = _timed(model, input_ids, arguments.draft, streamer, max_new_tokens=limit)
        print("\n")
        with _status("plain decoding, for comparison …"):
            plain = _timed_plain(model, input_ids, limit)
        print(comparison(drafted, plain, arguments.draft, device, tokenizer, color))
    return 0


def comparison(drafted: "Run", plain: "Run", draft: str, device: str, tokenizer, color: bool = False) -> str:
    """The demo's closing table.

    Args:
        drafted, plain: the two runs of one prompt.
        draft: the first one's draft.
        device: where both ran.
        tokenizer: shows the first different token, if there is one.
        color: say which colours the text above has.

    Returns:
        Several lines, without a line feed at the end.
    """
    names = [f"msn ({draft})", "plain"]
    lines = [f"{'':14}{'tokens/s':>10}{'forward passes':>16}{'tokens per pass (MAT)':>24}"]
    for name, run in zip(names, (drafted, plain)):
        lines.append(f"{name:14}{run.tokens_per_second:10.1f}{run.passes:16}{run.mat:24.2f}")
    lines += ["", f"Same text?  {_same_text(drafted.tokens, plain.tokens, tokenizer)}"]

    speedup = drafted.tokens_per_second / plain.tokens_per_second
    lines.append(f"Speed-up:   {speedup:.2f}×")
    if speedup < 1 and draft != "none":
        cost = (drafted.seconds / drafted.passes) / (plain.seconds / plain.passes)
        gain = f"a pass gains {drafted.mat:.2f} tokens, but takes as long as {cost:.1f} plain steps"
        lines.append(f"            Slower here: {gain}.")
        if device == "cpu":
            nodes = "each of its 69 nodes" if draft == "paper" else "each guess"
            lines.append(f"            A CPU pays for {nodes}; a GPU, busy with reading the weights, should hardly notice.")

    shown = "one colour a pass, plain for one token" if color else "‹ › around a pass that gained several"
    lines += ["", f"Tokens gained by a pass (in the text above: {shown}):", histogram(drafted.accept_lengths)]
    return "\n".join(lines)


def _same_text(drafted: list[int], plain: list[int], tokenizer) -> str:
    if drafted == plain:
        return f"yes, all {len(plain)} tokens"
    at = next((i for i, pair in enumerate(zip(drafted, plain)) if pair[0] != pair[1]), min(len(drafted), len(plain)))
    ours, theirs = (tokenizer.decode(tokens[at : at + 1]) for tokens in (drafted, plain))
    return (
        f"no, from token {at + 1} of {len(plain)} on: {ours!r} here, {theirs!r} in plain decoding\n"
        "            (where two tokens are almost equally likely, rounding in 16 or 32 bit may decide)"
    )


def histogram(accept_lengths: list[int], width: int = 40) -> str:
    """How many passes gained how many tokens, one bar a line.

    Args:
        accept_lengths: tokens gained, one entry a pass; not empty.
        width: characters of the longest bar.

    Returns:
        Lines of ``tokens  bar  passes``, from 1 to the largest gain, joined by line feeds.
    """
    passes = Counter(accept_lengths)
    most = max(passes.values())
    eighths = " ▏▎▍▌▋▊▉"
    lines = []
    for gain in range(1, max(passes) + 1):
        count = passes[gain]
        length = max(1, round(8 * width * count / most)) if count else 0
        bar = "█" * (length // 8) + eighths[length % 8].strip()
        lines.append(f"{gain:4}  {bar}{' ' if bar else ''}{count}")
    return "\n".join(lines)


@contextlib.contextmanager
def _status(text: str):
    """Show ``text`` while something runs, on a terminal only."""
    show = sys.stderr.isatty()
    if show:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if show:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- msn generate --------------------------------------------------------------------------------


def _add_generate(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="generate with any causal language model",
        description="Generate with any causal language model of transformers, several tokens per forward pass.",
    )
    _add_model_options(parser)
    _add_prompt_options(parser)
    parser.add_argument("--max-new-tokens", type=_positive_int, default=256, metavar="N", help="(default: 256)")
    _add_draft_option(parser)
    parser.add_argument("--corpus", metavar="FILE", help="also draft from texts that msn corpus indexed for this model")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest token")
    sampling.add_argument("--temperature", type=_positive_float, metavar="T")
    sampling.add_argument("--top-k", type=_positive_int, metavar="K")
    sampling.add_argument("--top-p", type=_probability, metavar="P")
    sampling.add_argument("--seed", type=int, metavar="S", help="a seed gives the same text whatever the draft")
    parser.set_defaults(run=_generate)


def _generate(arguments) -> int:
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling and not arguments.do_sample:
        raise UsageError(f"--{next(iter(sampling)).replace('_', '-')} needs --do-sample")
    if arguments.corpus is not None and arguments.draft != "auto":
        raise UsageError(f"--corpus needs --draft auto, which looks into it; --draft is {arguments.draft}")
    prompt = _checked_prompt(_standard_input() if arguments.prompt == "-" else arguments.prompt)

    import torch

    from msn_ext.demo import quiet_transformers

    corpus = None if arguments.corpus is None else _load_corpus(arguments.corpus)
    model, tokenizer, device = _load(arguments.model, arguments.dtype, arguments.device)
    with quiet_transformers():
        input_ids, limit = _encode(model, tokenizer, prompt, not arguments.raw, arguments.max_new_tokens)
        if (seed := sampling.pop("seed", None)) is not None:
            torch.manual_seed(seed)
        streamer = None if arguments.json else PassStreamer(tokenizer, sys.stdout)
        options = {"max_new_tokens": limit, "do_sample": arguments.do_sample, **sampling}
        draft = arguments.draft
        if corpus is not None:
            from msn_ext.profile import auto

            draft = auto(model, corpus)
        run = _timed(model, input_ids, draft, streamer, **options)
    if not arguments.json:
        print()
        return 0
    result = {
        "text": tokenizer.decode(run.tokens, skip_special_tokens=True),
        "new_tokens": len(run.tokens),
        "forward_passes": run.passes,
        "mat": run.mat,
        "tokens_per_second": run.tokens_per_second,
        "accept_lengths": run.accept_lengths,
        "draft": arguments.draft,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    print(json.dumps(result))
    return 0


def _standard_input() -> str:
    if sys.stdin is None:
        raise CommandError("cannot read the prompt from standard input: it is closed")
    try:
        text = sys.stdin.buffer.read().decode()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise CommandError(f"cannot read the prompt from standard input: {error}") from error
    return text.removesuffix("\n")


# ---- msn explain ---------------------------------------------------------------------------------


def _add_explain(subparsers) -> None:
    parser = subparsers.add_parser(
        "explain",
        help="draw one step's draft tree and what the model accepted of it",
        description="Decode greedily with best-first draft trees and draw one forward pass: the tree of guesses, where "
        "they come from, how probable they were, and the path that the model accepted.",
    )
    _add_model_options(parser)
    _add_prompt_options(parser)
    parser.add_argument(
        "--pass",
        dest="number",
        type=_positive_int,
        metavar="K",
        help="the K-th forward pass behind the prompt's (default: the one that gained most)",
    )
    parser.add_argument("--svg", metavar="FILE", help="also write the picture to this file")
    parser.add_argument(
        "--min-probability",
        type=lambda text: _number(text, float, lambda value: 0 <= value <= 1, "a number of 0 to 1"),
        default=0.0,
        metavar="P",
        help="leave out less probable nodes, unless they were accepted (default: 0, show all)",
    )
    parser.add_argument(
        "--nodes",
        type=lambda text: _number(text, int, lambda value: 1 <= value <= 256, "a whole number of 1 to 256"),
        default=32,
        metavar="N",
        help="per tree, root included (default: 32)",
    )
    parser.add_argument("--max-new-tokens", type=_positive_int, default=48, metavar="N", help="(default: 48)")
    parser.set_defaults(run=_explain)


def _explain(arguments) -> int:
    prompt = _checked_prompt(_standard_input() if arguments.prompt == "-" else arguments.prompt)
    svg = None if arguments.svg is None else os.path.expanduser(arguments.svg)
    if svg is not None and (os.path.isdir(svg) or not os.path.isdir(os.path.dirname(svg) or ".")):
        raise UsageError(f"--svg {arguments.svg}: expected a file in a folder that exists")

    from msn_ext.demo import quiet_transformers
    from msn_ext.explain import as_svg, as_text, record

    model, tokenizer, _ = _load(arguments.model, arguments.dtype, arguments.device)
    with quiet_transformers():
        input_ids, limit = _encode(model, tokenizer, prompt, not arguments.raw, arguments.max_new_tokens)
        steps = record(model, input_ids, arguments.nodes, limit)
    if not steps:
        raise CommandError("the prompt's own pass gained the whole answer: there is no tree; try more --max-new-tokens")
    if arguments.number is None:
        step = max(steps, key=lambda step: step.kept)
    elif arguments.number <= len(steps):
        step = steps[arguments.number - 1]
    else:
        raise CommandError(f"--pass {arguments.number}: behind the prompt's pass there were only {len(steps)}")
    if svg is not None:
        picture = as_svg(step, tokenizer, arguments.min_probability)
        try:
            with open(svg, "w", encoding="utf-8") as file:
                file.write(picture)
        except OSError as error:
            raise CommandError(f"--svg {arguments.svg}: {error.strerror or error}") from error
    color = not os.environ.get("NO_COLOR") and sys.stdout.isatty()
    print(as_text(step, tokenizer, arguments.min_probability, color))
    return 0


# ---- msn tune ------------------------------------------------------------------------------------


def _add_tune(subparsers) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="measure a model on this machine, so that drafts are sized to it",
        description="Measure how long a step takes by the nodes of its draft tree, and with --prompts also learn how far "
        "each source of guesses is right for this model. The result is kept for models of this shape, on this device, in "
        "this dtype; generate's default draft goes by it.",
    )
    _add_model_options(parser)
    parser.add_argument("--context", type=_positive_int, default=256, metavar="N", help="tokens before a step (default: 256)")
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="FILE",
        help="such as will be asked: JSON lines with a prompt each (.gz too), or a plain prompt a line",
    )
    parser.add_argument("--samples", type=_positive_int, default=100, metavar="N", help="prompts to draw (default: 100)")
    parser.set_defaults(run=_tune)


def _tune(arguments) -> int:
    from msn_ext.tuning import draw, read_prompts, tune

    try:
        prompts = draw([read_prompts(os.path.expanduser(path)) for path in arguments.prompts or ()], arguments.samples)
    except OSError as error:
        raise CommandError(f"--prompts {error.filename}: {error.strerror}") from error

    from msn_ext.demo import quiet_transformers

    model, tokenizer, _ = _load(arguments.model, arguments.dtype, arguments.device)
    with quiet_transformers():
        encoded = [_tokens(tokenizer, prompt, True) for prompt in prompts]
        profile, path = tune(model, encoded, arguments.context, progress=sys.stderr.isatty())
    plain = profile.times[1]
    print(f"{'nodes':>5} {'ms a step':>10} {'over plain':>11}")
    for nodes, seconds in profile.times.items():
        print(f"{nodes:>5} {1000 * seconds:>10.2f} {seconds / plain:>10.2f}x")
    if prompts:
        learned = profile.about["factors"]
        print(
            f"factors from {learned['prompts']} prompts, {learned['nodes']} nodes: "
            f"log-likelihood {learned['before']:.3f} before, {learned['after']:.3f} after"
        )
    print(f"kept in {path}")
    return 0


# ---- msn corpus ----------------------------------------------------------------------------------


def _add_corpus(subparsers) -> None:
    parser = subparsers.add_parser(
        "corpus",
        help="index texts of your own, so that generate --corpus drafts from them",
        description="Index texts that answers may repeat, such as templates, a code base or earlier answers, for models "
        "with one tokenizer. generate --corpus looks there for what followed the last words.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a text, or JSON lines (.jsonl, .gz too) with text, or with prompt and response",
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="whose tokenizer to use (default: the demo model)")
    parser.add_argument("--output", required=True, metavar="FILE", help="where to keep it")
    parser.set_defaults(run=_corpus)


def _corpus(arguments) -> int:
    files = [os.path.expanduser(path) for path in arguments.files]
    output = os.path.expanduser(arguments.output)
    if os.path.isdir(output) or not os.path.isdir(os.path.dirname(output) or "."):
        raise UsageError(f"--output {arguments.output}: expected a file in a folder that exists")
    if any(os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path) for path in files):
        raise UsageError(f"--output {arguments.output}: one of the texts; it would be overwritten")

    from msn_ext import Corpus
    from msn_ext.demo import quiet_transformers
    from msn_ext.documents import batches, documents

    for path in files:
        if not os.path.isfile(path):
            raise CommandError(f"{path}: no such file")
    tokenizer, vocabulary = _load_tokenizer(arguments.model)
    texts = (text for path in files for text in documents(path))
    tokens = (row for batch in batches(texts) for row in tokenizer(batch, add_special_tokens=False)["input_ids"])
    start = time.perf_counter()
    with quiet_transformers():
        corpus = Corpus.build(tokens, vocabulary, progress=sys.stderr.isatty())
    corpus.save(output)
    seconds = time.perf_counter() - start
    print(f"{len(corpus.tokens):,} tokens, {corpus.nbytes:,} bytes, {seconds:.1f} seconds; kept in {arguments.output}")
    return 0


def _load_corpus(path: str):
    from msn_ext import Corpus

    try:
        return Corpus.load(os.path.expanduser(path))
    except OSError as error:
        raise CommandError(f"--corpus {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CommandError(f"--corpus {error}") from error


# ---- msn info ------------------------------------------------------------------------------------


def _add_info(subparsers) -> None:
    parser = subparsers.add_parser(
        "info", help="what was built and what is in use", description="Show what was built and what is in use."
    )
    parser.set_defaults(run=_info)


def _info(arguments) -> int:
    import platform

    import torch
    import transformers

    import msn_ext
    from msn_ext.demo import source_file
    from msn_ext.paths import cache_root

    info = msn_ext.build_info()
    if info["cuda"]:
        cuda = f"built with CUDA {info['cuda']} for {' '.join(info['cuda_architectures'])}"
    else:
        cuda = "not built (nvcc was not found, or MSN_CUDA=off)"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        demo = f"{source_file().name}; its conversion is kept in {cache_root()}"
    except FileNotFoundError as error:
        demo = str(error)
    rows = {
        "msn_ext": f"{info['version']}, built with {info['compiler']}",
        "CPU kernels": f"{info['cpu_isa']}, {torch.get_num_threads()} threads",
        "CUDA kernels": cuda,
        "GPU": ", ".join(gpus) or "none that torch can use",
        "in use": _default_device(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "demo model": demo,
    }
    for name, value in rows.items():
        print(f"{name:14}{value}")
    return 0


# ---- what the commands share -----------------------------------------------------------------------


class Run:
    """One generated answer: ``tokens``, ``accept_lengths`` (one entry a forward pass) and ``seconds``."""

    def __init__(self, tokens: list[int], accept_lengths: list[int], seconds: float):
        self.tokens, self.accept_lengths, self.seconds = tokens, accept_lengths, seconds

    @property
    def passes(self) -> int:
        return len(self.accept_lengths)

    @property
    def mat(self) -> float:
        """Mean accept length: tokens per forward pass."""
        return len(self.tokens) / self.passes

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


def _timed(model, input_ids, draft, streamer, **options) -> Run:
    from msn_ext import generate

    start = time.perf_counter()
    out = generate(model, input_ids, draft=draft, streamer=streamer, return_dict_in_generate=True, **options)
    tokens = out.sequences[0, input_ids.shape[1] :].tolist()  # waits for the device
    return Run(tokens, out.accept_lengths[0].tolist(), time.perf_counter() - start)


def _timed_plain(model, input_ids, max_new_tokens: int) -> Run:
    import torch

    start = time.perf_counter()
    out = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    tokens = out[0, input_ids.shape[1] :].tolist()
    return Run(tokens, [1] * len(tokens), time.perf_counter() - start)


class PassStreamer:
    """A streamer for ``generate`` that writes text as it comes and shows which pass gained it.

    Args:
        tokenizer: turns tokens into text.
        stream: where the text goes.
        color: the tokens of a pass that gained several in one colour, the next such pass in another.
        mark: put ‹ › around them.
    """

    colors = ("\033[32m", "\033[36m", "\033[35m")

    def __init__(self, tokenizer, stream, *, color: bool = False, mark: bool = False):
        self._decoder = _TextDecoder(tokenizer)
        self._stream = stream
        self._color, self._mark = color, mark
        self._prompt = True
        self._groups = 0

    def put(self, value) -> None:
        """Write the tokens of one forward pass; the first call brings the prompt, which is skipped."""
        if self._prompt:
            self._prompt = False
            return
        tokens = value.flatten().tolist()
        text = "".join(map(self._decoder.push, tokens))
        if len(tokens) > 1 and text:
            if self._color:
                text = f"{self.colors[self._groups % len(self.colors)]}{text}\033[0m"
            elif self._mark and (words := text.strip()):
                before, after = text.split(words)
                text = f"{before}‹{words}›{after}"
            self._groups += 1
        self._write(text)

    def end(self) -> None:
        """Write what was held back in the hope of the rest of a character."""
        self._write(self._decoder.rest())

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _TextDecoder:
    """Tokens to text, one by one: a token that ends inside a character waits for the next.

    Only the tokens since the last whole character and one piece before them are decoded again, so
    that a tokenizer that drops the first space of a text does so only once.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._open: list[int] = []

    def push(self, token: int) -> str:
        self._open.append(token)
        text = self._text()
        if text.endswith("\ufffd"):
            return ""
        self._before, self._open = self._open, []
        return text

    def rest(self) -> str:
        text = self._text()
        self._before, self._open = self._open, []
        return text

    def _text(self) -> str:
        before = self._decode(self._before)
        return self._decode(self._before + self._open)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _load(name: str | None, dtype: str | None, device: str | None):
    """The model, its tokenizer, and the device's name; the demo model where ``name`` is None."""
    import torch

    device = _checked_device(device) if device is not None else _default_device()
    if name is None:
        from msn_ext.demo import load_model

        model, tokenizer = load_model()
        return model.to(device, getattr(torch, dtype) if dtype else None), tokenizer, device

    from transformers import AutoModelForCausalLM

    from msn_ext.demo import quiet_transformers

    source, local = _source(name)
    with quiet_transformers(bars=not local):  # the bars of a download stay
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", trust_remote_code=False)
        except Exception as error:
            raise CommandError(f"--model {name}: {_one_line(error)}") from error
        tokenizer = _tokenizer_of(source, name)
    return model.eval().to(device), tokenizer, device


def _load_tokenizer(name: str | None):
    """A model's tokenizer and its ``vocab_size``, without the model's weights."""
    from msn_ext.demo import quiet_transformers

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
            raise CommandError(f"--model {name}: {_one_line(error)}") from error
        return _tokenizer_of(source, name), config.get_text_config(decoder=True).vocab_size


def _tokenizer_of(source: str, name: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise CommandError(f"--model {name}: its tokenizer is missing or cannot be loaded") from error


def _source(name: str) -> tuple[str, bool]:
    """Where a model comes from, and whether that is a folder."""
    folder = os.path.expanduser(name)
    local = os.path.isdir(folder)
    if os.path.isfile(folder):
        raise CommandError(f"--model {name}: a file; expected a folder or a hub id")
    if not local and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise CommandError(f"--model {name}: no such folder")
    if local and not os.path.isfile(os.path.join(folder, "config.json")):
        raise CommandError(f"--model {name}: no config.json in this folder, so it holds no model")
    return (folder if local else name), local


def _default_device() -> str:
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
            raise CommandError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
        if not msn_ext.build_info()["cuda"]:
            raise CommandError(f"--device {name}: msn_ext has no CUDA kernels here; reinstall it with nvcc on PATH")
    return name


def _tokens(tokenizer, prompt: str, chat: bool):
    """The prompt's tokens [1, P]."""
    if chat and tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def _encode(model, tokenizer, prompt: str, chat: bool, max_new_tokens: int):
    """The prompt's tokens [1, P] on the model's device, and how many may follow."""
    input_ids = _tokens(tokenizer, prompt, chat)
    length = input_ids.shape[1]
    if length == 0:
        raise UsageError("the prompt is empty")
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None:
        if length >= context:
            raise CommandError(f"the prompt has {length} tokens; the model's context holds {context}, answer included")
        if length + max_new_tokens > context:
            max_new_tokens = context - length
            print(f"msn: the model's context leaves room for {max_new_tokens} new tokens", file=sys.stderr)
    return input_ids.to(model.device), max_new_tokens


def _checked_prompt(text: str) -> str:
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def _positive_int(text: str) -> int:
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def _positive_float(text: str) -> float:
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number above 0")


def _probability(text: str) -> float:
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def _number(text: str, kind, holds, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return value


COMMANDS = (_add_demo, _add_generate, _add_explain, _add_tune, _add_corpus, _add_info)

if __name__ == "__main__":
    sys.exit(main())

"""An engine in a process of its own, which decodes what it is asked for: the worker of cpu.py.

    python benchmarks/cpu_engines.py '{"engine": "llama.cpp-Q8_0", "gguf": "model.gguf", ...}'

It loads the engine, answers with a line of JSON (its ``versions``, or what is ``missing``), then
reads requests from stdin, ``{"ids": [...], "new_tokens": 128}``, and answers each with a line:

    tokens    the new ones, the end token included; greedy
    arrivals  pairs: seconds since the request, tokens that came then
    seconds   until the last one
    peak, resident   MiB: of the process so far (VmHWM), and now

Nothing but the engine's own packages is imported, so peers may live in another environment. What
the engine prints goes to stderr.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

LOOKUP = 5  # guesses of transformers' prompt lookup, as in its documentation
LLAMA_LOOKUP = 2  # of llama-cpp-python's, as its README advises for CPUs
CONTEXT_STEP = 256  # contexts are whole multiples, as llama.cpp has them


class Transformers:
    """``model.generate`` as it comes: eager or SDPA attention, a static cache with a compiled
    forward, or prompt lookup.
    """

    packages: tuple[str, ...] = ("torch", "transformers")

    def __init__(self, settings: dict):
        import torch
        from transformers import AutoModelForCausalLM, CompileConfig

        torch.set_num_threads(settings["threads"])
        _, kind, dtype = settings["engine"].split("-")
        self.options: dict = {}
        if kind == "compiled":
            compiled = CompileConfig()
            compiled._compile_all_devices = True  # without it, only on GPUs
            self.options = dict(cache_implementation="static", compile_config=compiled)
        elif kind == "lookup":
            self.options = dict(prompt_lookup_num_tokens=LOOKUP)
        self.model = AutoModelForCausalLM.from_pretrained(
            settings["model"],
            dtype=getattr(torch, dtype),
            attn_implementation="eager" if kind == "eager" else "sdpa",
        ).eval()
        self.end = settings["end"]

    def generate(self, **inputs):
        return self.model.generate(**inputs, **self.options)

    def __call__(self, ids: list[int], new_tokens: int, arrive) -> list[int]:
        import torch

        prompt = torch.tensor([ids])
        out = self.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=self.end or None,
            pad_token_id=self.end[0] if self.end else 0,
            streamer=Streamer(arrive),
        )
        return out[0, len(ids) :].tolist()


class Streamer:
    """A streamer that hands on how many tokens came."""

    def __init__(self, arrive):
        self.arrive, self.prompt_seen = arrive, False

    def put(self, tokens) -> None:
        if self.prompt_seen:
            self.arrive(tokens.numel())
        self.prompt_seen = True

    def end(self) -> None:
        pass


class Ours(Transformers):
    """``msn_ext.generate`` with the engine, draft and dtype of the name: "native-auto-bfloat16",
    "torch-none-float32", "native-b8-float32" for ``BestFirst(8)``; "native-auto-int8": int8
    weights, the rest in bfloat16. Drafts "habits" and "b8h" are "auto" and "b8" by the model's
    habits.
    """

    packages = ("msn_ext", "torch", "transformers")

    def __init__(self, settings: dict):
        import msn_ext.profile

        self.engine, draft, dtype = settings["engine"].split("-")
        budget = draft[1:].removesuffix("h") if draft[0] == "b" else ""
        self.budget, self.draft = int(budget) if budget.isdigit() else None, draft
        self.habits = None
        if draft == "habits" or (self.budget and draft.endswith("h")):
            self.habits = msn_ext.Habits.load(settings["habits"])
        weights = dtype if dtype == "int8" else None
        dtype = "bfloat16" if weights else dtype
        super().__init__(settings | dict(engine=f"transformers-sdpa-{dtype}"))
        if self.engine == "native":
            self.model = msn_ext.prepare(self.model, weights=weights)

    def generate(self, **inputs):
        import msn_ext.profile

        # A new one for every prompt: one that is kept would know the answer at the next repeat.
        draft = self.draft
        if self.budget:
            draft = msn_ext.BestFirst(self.budget, habits=self.habits)
        elif self.habits:
            draft = msn_ext.profile.auto(self.model, engine=self.engine, habits=self.habits)
        return msn_ext.generate(self.model, **inputs, engine=self.engine, draft=draft)


class LlamaCpp:
    """llama-cpp-python on a GGUF file: "llama.cpp-Q8_0", "llama.cpp-BF16-lookup"."""

    packages = ("llama_cpp_python",)

    def __init__(self, settings: dict):
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        _, kind, *lookup = settings["engine"].split("-")
        self.llama = Llama(
            str(gguf_file(settings, kind)),
            n_ctx=-(-settings["context"] // CONTEXT_STEP) * CONTEXT_STEP,
            n_threads=settings["threads"],
            n_threads_batch=settings["threads"],
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=LLAMA_LOOKUP) if lookup else None,
            logits_all=bool(lookup),  # or it fails: a draft model needs them all
            verbose=False,
        )
        self.end = settings["end"]

    def __call__(self, ids: list[int], new_tokens: int, arrive) -> list[int]:
        self.llama.reset()  # or it keeps what the last prompt has in common with this one
        tokens: list[int] = []
        for token in self.llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            tokens.append(token)
            arrive(1)
            if token in self.end or len(tokens) == new_tokens:
                break
        return tokens


class OpenVino:
    """OpenVINO GenAI on a GGUF file: "openvino-Q4_1"."""

    packages = ("openvino", "openvino_genai")

    def __init__(self, settings: dict):
        import openvino_genai

        _, kind = settings["engine"].split("-")
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # or a prompt that comes again costs nothing
        self.pipeline = openvino_genai.LLMPipeline(
            str(gguf_file(settings, kind)),
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=settings["threads"],
        )
        self.end = settings["end"]

    def __call__(self, ids: list[int], new_tokens: int, arrive) -> list[int]:
        import numpy
        import openvino
        import openvino_genai

        class Arrivals(openvino_genai.StreamerBase):
            def write(self, token):
                arrive(len(token) if isinstance(token, list) else 1)
                return openvino_genai.StreamingStatus.RUNNING

            def end(self):
                pass

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = new_tokens, False
        config.stop_token_ids, config.ignore_eos = set(self.end), not self.end
        prompt = openvino_genai.TokenizedInputs(
            openvino.Tensor(numpy.array([ids], dtype=numpy.int64)),
            openvino.Tensor(numpy.ones((1, len(ids)), dtype=numpy.int64)),
        )
        return list(self.pipeline.generate(prompt, config, Arrivals()).tokens[0])


KINDS = {
    "native": Ours,
    "torch": Ours,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
}
PEERS = ("llama.cpp", "openvino")  # what need not be installed


def gguf_file(settings: dict, kind: str) -> Path:
    """Return the model's GGUF file with weights of a ``kind`` ("Q8_0"), made if it is not there."""
    source = Path(settings["gguf"])
    target = Path(settings["gguf_folder"]) / f"{source.stem}-{source.stat().st_size:x}-{kind}.gguf"
    if not target.is_file():
        if importlib.util.find_spec("llama_cpp") is None:
            raise ModuleNotFoundError(f"{target} is not there", name="llama_cpp")
        # in a process of its own, whose memory does not count
        subprocess.run([sys.executable, __file__, "requantise", source, target, kind], check=True)
    return target


def requantise(source: str, target: str, kind: str) -> None:
    """Write the weights of a GGUF file anew in one ``kind``."""
    import llama_cpp

    kinds = dict(F32="ALL_F32", BF16="MOSTLY_BF16", F16="MOSTLY_F16")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kinds.get(kind, f'MOSTLY_{kind}')}")
    options.allow_requantize = True
    unfinished = Path(f"{target}.{os.getpid()}.tmp")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    if llama_cpp.llama_model_quantize(
        source.encode(), os.fsencode(unfinished), llama_cpp.ctypes.byref(options)
    ):
        raise RuntimeError(f"llama.cpp cannot write {source} as {kind}")
    unfinished.rename(target)


def memory() -> dict[str, int]:
    """Return the peak and the present memory of this process, MiB."""
    status = Path("/proc/self/status")
    lines = dict(line.split(":") for line in status.read_text().splitlines() if ":" in line)
    mib = {name: int(lines[name].split()[0]) // 1024 for name in ("VmHWM", "VmRSS")}
    return dict(peak=mib["VmHWM"], resident=mib["VmRSS"])


def answer(engine, ids: list[int], new_tokens: int) -> dict:
    """Return the answer to a request: see the head of this file."""
    arrivals: list[tuple[float, int]] = []
    start = time.perf_counter()
    tokens = engine(
        ids, new_tokens, lambda count: arrivals.append((time.perf_counter() - start, count))
    )
    seconds = time.perf_counter() - start
    return dict(tokens=tokens, arrivals=arrivals, seconds=seconds) | memory()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of packages of those names that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed, in a checkout"
    return found


def serve(load) -> None:
    """Answer the requests on stdin until it ends, with what ``load()`` gives: a function that
    returns the answer to a request's keyword arguments, and the versions of its packages.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what is printed from here on is no answer

        def reply(content: dict) -> None:
            print(json.dumps(content), file=answers, flush=True)

        try:
            function, found = load()
        except ModuleNotFoundError as error:
            reply(dict(missing=error.name))
            return
        reply(dict(versions=found))
        for line in sys.stdin:
            reply(function(**json.loads(line)))


def load(settings: dict):
    """Return what :func:`serve` needs of the engine that the settings name."""
    kind = KINDS[settings["engine"].split("-")[0]]
    engine = kind(settings)
    return functools.partial(answer, engine), versions(kind.packages)


if __name__ == "__main__":
    if sys.argv[1] == "requantise":
        requantise(*sys.argv[2:])
    else:
        serve(lambda: load(json.loads(sys.argv[1])))

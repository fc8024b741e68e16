"""Seconds of a step by its rows, in models of larger shapes with random weights, bfloat16: the
worker of ``cpu.py --shapes``.

    python benchmarks/cpu_shapes.py '{"engine": "native", "shape": "1b", "threads": 2, ...}'

A step is a pass over 1 to 64 tokens after a text of :data:`PREFIX`. "native" and "torch" are steps
of ``msn_ext.generate`` with so many nodes, drafting and verification included; "transformers" is
the model's forward over as many tokens with its cache, "llama.cpp" its `llama_decode` over them,
logits of all rows included.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cpu_engines import memory, serve, versions

PREFIX = 256
STEPS = 7  # whose median is an answer
ENGINES = ("native", "torch", "transformers", "llama.cpp")
SHAPES = {  # those of Llama 3.2
    "1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
    ),
    "3b": dict(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
}


def random_llama(shape: dict):
    """Return a Llama of a shape, bfloat16, its weights a random block over and over, which takes a
    fraction of the time of drawing them all.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **shape,
        max_position_embeddings=2 * PREFIX,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rotary = type(model.model.rotary_emb)(config)  # holds numbers that are no weights
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.model.rotary_emb = rotary
    model.tie_weights()
    block = 0.02 * torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1)
                continue
            flat = weight.view(-1)
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block[: len(part)])
    return model.eval()


def our_steps(model, engine: str, rows: int) -> list[float]:
    """Return the seconds between the tokens of ``msn_ext.generate`` with ``rows`` nodes a step."""
    import torch

    import msn_ext

    class Arrivals(list):
        def put(self, tokens):
            self.append(time.perf_counter())

        def end(self):
            pass

    prompt = torch.arange(PREFIX)[None] % model.config.vocab_size
    arrivals = Arrivals()
    msn_ext.generate(
        model,
        prompt,
        attention_mask=torch.ones_like(prompt),
        engine=engine,
        draft=msn_ext.BestFirst(rows) if rows > 1 else "none",
        do_sample=False,
        max_new_tokens=(STEPS + 2) * rows,
        stopping_criteria=[lambda ids, scores: torch.tensor([len(arrivals) > STEPS + 2])],
        streamer=arrivals,
    )
    return [after - before for before, after in itertools.pairwise(arrivals[2:])]


class Forward:
    """The forward pass of a transformers model."""

    def __init__(self, model):
        import torch
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.arange(PREFIX)[None] % model.config.vocab_size, past_key_values=self.cache)

    def __call__(self, rows: int) -> list[float]:
        import torch

        tokens, seconds = torch.arange(rows)[None], []
        with torch.no_grad():
            for _ in range(STEPS + 1):
                start = time.perf_counter()
                self.model(tokens, past_key_values=self.cache)
                seconds.append(time.perf_counter() - start)
                self.cache.crop(-rows)
        return seconds[1:]


def write_gguf(shape: dict, path: Path) -> None:
    """Write a Llama of a shape for llama.cpp, its weights slices of one random block."""
    import gguf
    import numpy

    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, width = shape["num_attention_heads"], shape["head_dim"]
    key_heads, vocabulary = shape["num_key_value_heads"], shape["vocab_size"]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(2 * PREFIX)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    random = numpy.random.default_rng(0)
    block = 0.02 * random.standard_normal(hidden * max(vocabulary, inner), dtype=numpy.float32)
    block = (block.view(numpy.uint32) >> 16).astype(numpy.uint16)
    bfloat16, ones = gguf.GGMLQuantizationType.BF16, numpy.ones(hidden, dtype=numpy.float32)

    def add(name: str, outputs: int, inputs: int) -> None:
        data = block[: outputs * inputs].reshape(outputs, inputs).view(numpy.uint8)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=bfloat16)

    add("token_embd", vocabulary, hidden)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"blk.{layer}"
        writer.add_tensor(f"{prefix}.attn_norm.weight", ones)
        writer.add_tensor(f"{prefix}.ffn_norm.weight", ones)
        add(f"{prefix}.attn_q", heads * width, hidden)
        add(f"{prefix}.attn_k", key_heads * width, hidden)
        add(f"{prefix}.attn_v", key_heads * width, hidden)
        add(f"{prefix}.attn_output", hidden, heads * width)
        add(f"{prefix}.ffn_gate", inner, hidden)
        add(f"{prefix}.ffn_up", inner, hidden)
        add(f"{prefix}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


class LlamaCpp:
    """llama.cpp's `llama_decode` over rows after a prefix."""

    def __init__(self, path: Path, threads: int):
        import llama_cpp as llama

        llama.llama_backend_init()
        self.llama = llama
        model = llama.llama_model_load_from_file(
            os.fsencode(path), llama.llama_model_default_params()
        )
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch = 2 * PREFIX, PREFIX
        options.n_threads = options.n_threads_batch = threads
        self.context = llama.llama_init_from_model(model, options)
        self.memory = llama.llama_get_memory(self.context)
        self.decode(0, PREFIX)

    def decode(self, start: int, rows: int) -> float:
        llama = self.llama
        batch = llama.llama_batch_init(rows, 0, 1)
        batch.n_tokens = rows
        for i in range(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = i, start + i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        begin = time.perf_counter()
        if llama.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        llama.llama_get_logits(self.context)  # waits for them
        seconds = time.perf_counter() - begin
        llama.llama_batch_free(batch)
        return seconds

    def __call__(self, rows: int) -> list[float]:
        seconds = []
        for _ in range(STEPS + 1):
            seconds.append(self.decode(PREFIX, rows))
            self.llama.llama_memory_seq_rm(self.memory, 0, PREFIX, -1)
        return seconds[1:]


def load(settings: dict):
    """Return what ``serve`` needs: a function that gives the median ``seconds`` of steps of so many
    ``rows``, and versions.
    """
    engine, shape = settings["engine"], SHAPES[settings["shape"]]
    if engine == "llama.cpp":
        path = Path(settings["gguf_folder"]) / f"random-{settings['shape']}-BF16.gguf"
        if not path.is_file():
            write_gguf(shape, path)
        steps: Callable[[int], list[float]] = LlamaCpp(path, settings["threads"])
        packages = ["llama_cpp_python"]
    else:
        import torch

        torch.set_num_threads(settings["threads"])
        model, packages = random_llama(shape), ["torch", "transformers"]
        if engine == "transformers":
            steps = Forward(model)
        else:
            import msn_ext

            if engine == "native":
                model = msn_ext.prepare(model)
            steps = functools.partial(our_steps, model, engine)

    def answer(rows: int) -> dict:
        return dict(seconds=statistics.median(steps(rows)), resident=memory()["resident"])

    return answer, versions(packages)


if __name__ == "__main__":
    serve(lambda: load(json.loads(sys.argv[1])))

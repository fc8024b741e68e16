"""The part of ``closeness.py`` that llama.cpp computes, in an environment that has it."""

import sys

import numpy
from cpu_engines import gguf_file
from llama_cpp import Llama


def main(source: str, folder: str, kind: str, texts: str, results: str) -> None:
    rows = list(numpy.load(texts).values())
    llama = Llama(
        str(gguf_file(dict(gguf=source, gguf_folder=folder), kind)),
        n_ctx=max(map(len, rows)),
        logits_all=True,
        verbose=False,
    )
    logits = []
    for row in rows:
        llama.reset()
        llama.eval(row.tolist())
        logits.append(llama.scores[: len(row)].copy())
    numpy.savez(results, *logits)


if __name__ == "__main__":
    main(*sys.argv[1:])

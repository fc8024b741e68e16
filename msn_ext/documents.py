"""Files of text, line by line and document by document."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator


def lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, unpacked where its name ends in .gz, and their numbers from 1 on.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged or no text; names the file.
    """
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            yield from enumerate(file, 1)
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def documents(path: str) -> Iterator[str]:
    """The documents of a file: the whole of it, or with JSON lines (.jsonl, .jsonl.gz) in every line ``text``, else
    ``prompt`` and ``response``, each of which is one.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or a line holds no document; names the file and the line.
    """
    if not path.removesuffix(".gz").endswith(".jsonl"):
        yield "".join(line for _, line in lines(path))
        return
    for number, line in lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number} is no object, but {line.strip()[:40]}")
        names = ("text",) if "text" in row else ("prompt", "response")
        found = [row[name] for name in names if isinstance(row.get(name), str)]
        if not found:
            expected = "neither text nor prompt or response that are text"
            raise ValueError(f"{path}: line {number} has {expected}, but {', '.join(row)}")
        yield from found


def batches(texts: Iterable[str], characters: int = 1 << 20) -> Iterator[list[str]]:
    """The texts in lists of about so many characters, which a tokenizer can take at once, on all cores."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

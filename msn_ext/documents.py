"""Files of text, line by line and document by document."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path


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


def row(line: str, place: str) -> dict:
    """A line of JSON lines.

    Raises:
        ValueError: it is no JSON object; names the place.
    """
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} is no object, but {line.strip()[:40]}")
    return found


def rows(path: str) -> Iterator[tuple[str, dict]]:
    """The rows of a file of JSON lines, and what to call each in a message; empty lines are left
    out.
    """
    for number, line in lines(path):
        if line.strip():
            place = f"{path}: line {number}"
            yield place, row(line, place)


def whole_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines that somebody may have been killed writing: a last line that
    is cut off is removed.

    Raises:
        ValueError: it is damaged otherwise; names the file.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    try:
        return [
            json.loads(line) for line in content[:end].split(b"\n")[:-1]
        ]  # str.splitlines knows other ends of lines
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to begin anew") from error


def documents(path: str) -> Iterator[str]:
    """The documents of a file: the whole of it, or with JSON lines (.jsonl, .jsonl.gz) in every
    line ``text``, else ``prompt`` and ``response``, each of which is one.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or a line holds no document; names the file and the line.
    """
    if not path.removesuffix(".gz").endswith(".jsonl"):
        yield "".join(line for _, line in lines(path))
        return
    for place, fields in rows(path):
        names = ("text",) if "text" in fields else ("prompt", "response")
        found = [fields[name] for name in names if isinstance(fields.get(name), str)]
        if not found:
            raise ValueError(
                f"{place} has neither text nor prompt or response that are text, but"
                f" {', '.join(fields)}"
            )
        yield from found


def batches(texts: Iterable[str], characters: int = 1 << 20) -> Iterator[list[str]]:
    """The texts in lists of about so many characters, which a tokenizer can take at once, on all
    cores.
    """
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

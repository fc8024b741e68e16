"""Read files of text: lines, rows of JSON lines, the texts of a corpus."""

from __future__ import annotations

import gzip
import json
import os
import random
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

Entry = TypeVar("Entry")


def lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers, from 1; a file whose name ends in .gz is
    unpacked.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged or no text; names the file and the line.
    """
    opened = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        # What is no UTF-8 comes as half characters, which no UTF-8 has, and is found in its line.
        with opened(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                line.encode()
                yield number, line
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00
        raise ValueError(
            f"{path}: line {number} cannot be read: byte 0x{byte:02x} after {error.start}"
            " characters is no UTF-8"
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be read after line {number}: {error}") from error


def row(line: str, place: str) -> dict:
    """Return the object in a line of JSON lines.

    Raises:
        ValueError: it is no JSON object, or a text in it is none; names the place.
    """
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place} is no object, but {line.strip()[:40]}")
    if "\\u" in line:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise ValueError(
                f"{place} has {half}, half of a character, which no text has"
            ) from error
    return found


def rows(path: str) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a file of JSON lines, each after its place as messages name it; empty
    lines are left out.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or a line is no JSON object; names the file and the line.
    """
    for number, line in lines(path):
        if line.strip():
            place = f"{path}: line {number}"
            yield place, row(line, place)


def whole_rows(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines whose writer may have been killed: a last line that
    is cut off is removed from the file. A file that is not there has no rows.

    Raises:
        ValueError: it is damaged otherwise; names the file.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    try:  # not str.splitlines, which knows other ends of lines
        return [json.loads(line) for line in content[:end].split(b"\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to begin anew") from error


def texts(path: str) -> Iterator[str]:
    """Yield the texts of a corpus file: the whole of it, or with JSON lines (.jsonl, .jsonl.gz) of
    every line ``text``, else ``prompt`` and ``response``, each of which is one.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or a line holds no text; names the file and the line.
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
    """Yield the texts in lists of about so many characters, which a tokenizer can take at once, on
    all cores.
    """
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def draw(files: list[list[Entry]], count: int) -> list[Entry]:
    """Return ``count`` of the files' entries, as many from each file as can be, the same ones every
    time.
    """
    shuffled = [random.Random(0).sample(entries, len(entries)) for entries in files]
    in_turn = [
        entries[i]
        for i in range(max(map(len, shuffled), default=0))
        for entries in shuffled
        if i < len(entries)
    ]
    return in_turn[:count]

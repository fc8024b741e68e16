"""Where the package keeps files, and how it writes them: whole or not at all."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What torch says of a checkpoint of which only a part could be written.
_TORCH = re.compile("PytorchStreamWriter|iostream error|unexpected pos")


def cache_root() -> Path:
    """Return the folder of converted models and profiles: ``$MSN_CACHE``, else ``msn_ext`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if os.environ.get("MSN_CACHE"):
        return Path(os.environ["MSN_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "msn_ext"
    return Path.home() / ".cache" / "msn_ext"


def writable_file(path: str | os.PathLike) -> Path:
    """Return the file that is written where ``path`` is: where a symbolic link points to.

    Raises:
        OSError: no file can be there; says what is, if anything.
    """
    expected = "expected a file in a folder that exists"
    try:
        file = Path(os.path.realpath(path))
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except FileNotFoundError:
        if not file.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, expected, str(path)) from None
    except OSError as error:  # a ring of links, a file in a folder's place
        raise OSError(error.errno, f"{expected}: {error.strerror}", str(path)) from error
    else:
        if kind is not None:
            number = errno.EISDIR if file.is_dir() else errno.EINVAL
            raise OSError(number, f"{expected}; this is {kind}", str(path))
    return file


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give the path of an empty file to write; at the end of the block it takes the place of the
    file at ``path``, or is removed where the block raises. A symbolic link stays and what it points
    to is replaced; who has the earlier file open keeps that.

    Raises:
        OSError: there is something else than a file, or it cannot be written; names ``path``.
    """
    file = writable_file(path)
    unfinished = file.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        unfinished.touch(exist_ok=False)
        with naming(unfinished):
            yield unfinished
        if file.exists():
            shutil.copymode(file, unfinished)
        unfinished.replace(file)
    except OSError as error:
        if error.filename != str(unfinished):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that was asked
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Put the name of the file that is written within this context into an error that there is no
    room left for it, which has none.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in _NO_ROOM:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def no_room(error: Exception) -> str | None:
    """Return what an error of Python, safetensors or torch says where it is that there is no room
    left for a file; None: it is another one.
    """
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return str(error.strerror) + (f": {error.filename}" if error.filename else "")
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number and int(number[1]) in _NO_ROOM:
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and _TORCH.search(str(error)):
        return "torch could write a file in part only; is there room left?"
    return None

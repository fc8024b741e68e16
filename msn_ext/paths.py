"""Where the package keeps files, and how it writes them: whole or not at all."""

import contextlib
import errno
import os
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

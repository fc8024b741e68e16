"""Find the folder in which the package keeps files."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of converted models and profiles: ``$MSN_CACHE``, else ``msn_ext`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if os.environ.get("MSN_CACHE"):
        return Path(os.environ["MSN_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "msn_ext"
    return Path.home() / ".cache" / "msn_ext"

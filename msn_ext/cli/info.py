"""``msn info``: what was built and what is in use."""

import argparse

from .loading import default_device

HELP = "what was built and what is in use"
DESCRIPTION = "Show what was built and what is in use."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add none: there is nothing to choose."""


def run(arguments: argparse.Namespace) -> int:
    import platform

    import torch
    import transformers

    import msn_ext
    from msn_ext.demo import source_file
    from msn_ext.paths import cache_root

    info = msn_ext.build_info()
    if info["cuda"]:
        cuda = f"built with CUDA {info['cuda']} for {' '.join(info['cuda_architectures'])}"
    else:
        cuda = "not built (nvcc was not found, or MSN_CUDA=off)"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        demo = f"{source_file().name}; its conversion is kept in {cache_root()}"
    except FileNotFoundError as error:
        demo = str(error)
    rows = {
        "msn_ext": f"{info['version']}, built with {info['compiler']}",
        "CPU kernels": f"{info['cpu_isa']}, {torch.get_num_threads()} threads",
        "CUDA kernels": cuda,
        "GPU": ", ".join(gpus) or "none that torch can use",
        "in use": default_device(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "demo model": demo,
    }
    for name, value in rows.items():
        print(f"{name:14}{value}")
    return 0

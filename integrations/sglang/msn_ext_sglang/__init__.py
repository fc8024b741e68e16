"""SGLang's speculative algorithm MSN: trees of a fixed width, drafted on the CPU by msn_ext and
verified by SGLang as it verifies those of its own algorithm NGRAM.

Written against SGLang 0.5.23; not yet run on a GPU.
"""

NAME = "MSN"


def register() -> None:
    """Register the algorithm; SGLang calls this in each of its processes (entry point)."""
    from .algorithm import register_algorithm

    register_algorithm(NAME)

"""Made-up answers, to be shown."""

import random

from msn_ext.explain import Answer, Step

STRANGE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "-->",
    "]]>",
    "<img src=x onerror=alert(1)>",
    "&lt;&amp;",
    "\"'`${}{{DATA}}",
    "\n\n",
    "\r\n",
    "\t",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "\u2028",
    "\u202eright",
    "مرحبا",
    "שלום",
    "日本",
    "👩\u200d🔬",
    "\ufffd",
    "\\u003c",
    " ",
    "x" * 300,
]


class Words:
    """Token i is the i-th word, or w<i>."""

    def __init__(self, words=()):
        self.words = dict(enumerate(words))

    def decode(self, tokens, **_):
        return "".join(self.words.get(token, f"w{token}") for token in tokens)


def random_answer(seed: int, passes: int = 5, nodes: int | None = None) -> Answer:
    """An answer whose trees have ``nodes`` nodes, or up to 24, of tokens below 3000; some passes
    accept nothing, and the last gains more than counts if it gains more than one.
    """
    rng = random.Random(seed)
    prompt = [rng.randrange(3000) for _ in range(6)]
    opening = [rng.randrange(3000) for _ in range(rng.randint(1, 3))]
    steps, text = [], [*prompt, *opening]
    for number in range(1, passes + 1):
        count = nodes or rng.randint(1, 24)
        parents = [-1, *(rng.randint(max(0, i - 4), i - 1) for i in range(1, count))]
        probability = [1.0]
        for parent in parents[1:]:
            probability.append(probability[parent] * rng.choice([rng.random() ** 3, 0.9]))
        path = [0]
        while rng.random() < 0.8 and (
            children := [i for i in range(count) if parents[i] == path[-1]]
        ):
            path.append(rng.choice(children))
        step = Step(
            number=number,
            text=text[-48:],
            tokens=[text[-1], *(rng.randrange(3000) for _ in range(count - 1))],
            parents=parents,
            probability=probability,
            sources=[0, *(rng.randint(1, 15) for _ in range(count - 1))],
            path=path,
            bonus=rng.randrange(3000),
            kept=len(path),
            passes=passes,
        )
        if number == passes:
            step.kept = max(1, step.kept - 1)
        text += step.gained[: step.kept]
        steps.append(step)
    return Answer(prompt, opening, steps)

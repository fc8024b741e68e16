"""The turns of cpu.py: who is asked for what when, and what is kept of the answers."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from cpu_engines import PEERS
from tqdm import tqdm
from workers import Failed, Missing, Pool


def order(engines: list[str], turn: int, repeat: int) -> list[str]:
    """Return the engines in the order of a turn: another one begins every time, and every other
    repeat goes backwards.
    """
    first = turn % len(engines)
    turned = engines[first:] + engines[:first]
    return turned[::-1] if repeat % 2 else turned


def row_of(engine: str, prompt: dict, repeat: int, answer: dict) -> dict:
    """Return the row that is kept of an answer."""
    arrivals = answer["arrivals"]
    return dict(
        engine=engine,
        category=prompt["category"],
        question=prompt["question"],
        repeat=repeat,
        prompt=len(prompt["ids"]),
        tokens=answer["tokens"],
        seconds=round(answer["seconds"], 5),
        first=round(arrivals[0][0], 5),
        first_tokens=arrivals[0][1],
        passes=len(arrivals),
        peak=answer["peak"],
        resident=answer["resident"],
    )


class Run:
    """Engines asked in turn, as long as they answer.

    Args:
        pool: their workers.
        engines: their names.
        keep: takes every row as soon as it is there.
    """

    def __init__(self, pool: Pool, engines: Iterable[str], keep):
        self.pool, self.engines, self.keep = pool, list(engines), keep

    def ask(self, engine: str, request: dict) -> dict | None:
        """Return the answer; None: the engine is not installed or failed, and is left out from
        now on.
        """
        new = engine not in self.pool.versions
        try:
            answer = self.pool.ask(engine, request)
        except (Failed, Missing) as error:
            self.engines.remove(engine)
            peer = engine.split("-")[0] in PEERS
            why, what = "failed", str(error)
            if isinstance(error, Missing):
                why, what = ("missing", what) if peer else (why, f"{what} is not installed")
            self.keep({"engine": engine, why: what})
            tqdm.write(f"{engine} is left out: {why} {what}", file=sys.stderr)
            return None
        if new:
            self.keep(dict(engine=engine, versions=self.pool.versions[engine]))
        return answer

    def decode(self, prompts: list[dict], repeats: int, block: int, done: set, bandwidth) -> None:
        """Ask every engine for every prompt, ``block`` prompts a turn, but for what is ``done``
        (engine, question, repeat), and measure the ``bandwidth`` after every turn.
        """
        total = len(prompts) * repeats * len(self.engines)
        turn, bar = 0, tqdm(total=total, unit="text", disable=None)
        for repeat in range(repeats):
            for at in range(0, len(prompts), block):
                for engine in order(self.engines, turn, repeat) if self.engines else ():
                    for prompt in prompts[at : at + block]:
                        bar.update()
                        key = engine, prompt["question"], repeat
                        if engine not in self.engines or key in done:
                            continue
                        bar.set_postfix_str(engine)
                        request = dict(ids=prompt["ids"], new_tokens=prompt["new_tokens"])
                        if answer := self.ask(engine, request):
                            self.keep(row_of(engine, prompt, repeat, answer))
                self.keep(dict(bandwidth=bandwidth() / 1e9, repeat=repeat))
                turn += 1
        bar.close()

    def steps(self, rows: list[int], repeats: int) -> None:
        """Ask every engine of shapes for steps of so many rows, all of them in a turn."""
        bar = tqdm(total=len(rows) * repeats * len(self.engines), unit="step", disable=None)
        for repeat in range(repeats):
            for engine in order(self.engines, repeat, repeat) if self.engines else ():
                for count in rows:
                    bar.update()
                    bar.set_postfix_str(engine)
                    if engine in self.engines and (answer := self.ask(engine, dict(rows=count))):
                        kept = dict(engine=engine, rows=count, repeat=repeat)
                        self.keep(kept | {k: answer[k] for k in ("seconds", "resident")})
        bar.close()

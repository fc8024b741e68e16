"""benchmarks/cpu.py: turns, statistics, equality, engines in processes that fail or are missing."""

import json
import os
import random
import sys
import threading
import time

import pytest
import torch
from transformers import AutoConfig

from helpers import BENCHMARKS
from helpers.drafters import random_habits

SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=320,
)
# A worker that says which process it is, after so many seconds.
ECHO = """
import json, os, sys, time
print(json.dumps({"versions": {"echo": "1"}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    time.sleep(request.get("sleep", 0))
    if "fail" in request: raise RuntimeError(request["fail"])
    print(json.dumps({"process": os.getpid(), "peak": 1} | request), flush=True)
"""


def echo(name: str = "") -> list[str]:
    return [sys.executable, "-S", "-c", ECHO]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def row(engine: str, question: int, repeat: int, tokens: list[int], seconds: float, **more) -> dict:
    usual = dict(category="qa", first=0.5, first_tokens=1, passes=len(tokens), peak=9, resident=8)
    named = dict(engine=engine, question=question, repeat=repeat, tokens=tokens, seconds=seconds)
    return usual | named | more


def test_everyone_begins_once_and_repeats_go_backwards():
    from cpu_turns import order

    engines = ["a", "b", "c", "d"]
    turns = [order(engines, turn, 0) for turn in range(4)]
    assert [turn[0] for turn in turns] == engines and turns[1] == ["b", "c", "d", "a"]
    assert order(engines, 1, 1) == ["a", "d", "c", "b"], "another neighbour"
    assert order(engines, 5, 2) == turns[1]


def test_engines_are_named_by_patterns():
    from cpu import ENGINES, chosen

    assert chosen(",".join(ENGINES)) == ENGINES
    assert chosen("openvino-*,native-b7-float32,openvino-F16") == [
        *(f"openvino-{kind}" for kind in ("F16", "Q8_0", "Q4_1")),
        "native-b7-float32",
    ]
    with pytest.raises(ValueError, match="'vllm-\\*' names none of native-none-float32"):
        chosen("vllm-*")


def test_rates_are_of_medians_and_ratios_of_common_prompts():
    from cpu_report import rate, ratio

    # medians 2 and 4 seconds; repeats take 1 + 4, 2 + 4 and 30 + 8
    seconds = {1: (1.0, 2.0, 30.0), 2: (4.0, 4.0, 8.0)}
    rows = [
        row("a", question, repeat, list(range(12)), at)
        for question, times in seconds.items()
        for repeat, at in enumerate(times)
    ]
    assert rate(rows) == 24 / 6
    assert rate(rows, after_prompt=True) == 22 / (1.5 + 3.5)
    slow = [row("b", 1, repeat, list(range(6)), 3.0) for repeat in range(3)]
    slow.append(row("b", 3, 0, list(range(6)), 1e6))  # which the other does not have
    middle, low, high = ratio(rows, slow)
    assert (middle, low, high) == pytest.approx((6 / 2, 0.4 / 2, 12 / 2))


def test_equal_texts_are_counted():
    from cpu_report import equality

    truth = [row("t", question, 0, [1, 2, 3, 4], 1.0) for question in (1, 2, 3)]
    texts = {
        1: [[1, 2, 3, 4], [1, 2, 3, 4]],  # equal
        2: [[1, 2, 3, 4], [1, 2, 9, 4]],  # not in every repeat
        3: [[1, 2, 3], [1, 2, 3]],  # ends early
    }
    rows = [
        row("a", question, repeat, tokens, 1.0)
        for question, both in texts.items()
        for repeat, tokens in enumerate(both)
    ]
    assert equality(rows, truth) == "1/3, 3"  # (4 + 4 + 4 + 2 + 3 + 3) / 6 tokens in common
    assert equality(rows, []) == ""


def test_the_report_says_it_all():
    from cpu_report import FIRST_TOKEN, Report

    def texts(engine: str, seconds: float, tokens=(1, 2, 3, 4), **more) -> list[dict]:
        return [row(engine, question, 0, list(tokens), seconds, **more) for question in (1, 2)]

    rows = [
        dict(engine="transformers-sdpa-float32", versions={"torch": "2"}),
        *texts("transformers-sdpa-float32", 4.0),
        *texts("transformers-eager-bfloat16", 2.0, (1, 2, 3, 9)),
        *texts("transformers-lookup-bfloat16", 1.6),
        *texts("llama.cpp-BF16", 1.0),
        *texts("openvino-Q4_1", 0.8),
        *texts("native-none-bfloat16", 0.5),
        *texts("native-auto-bfloat16", 0.25, passes=2),
        *texts("native-b8-bfloat16", 0.2, (1, 2, 3, 3)),
        *texts("native-habits-bfloat16", 0.48),
        *texts("native-b8h-bfloat16", 0.36),
        row("native-auto-bfloat16", None, 0, [1], 0.2, category=FIRST_TOKEN, first=0.2, peak=11),
        dict(bandwidth=20.0, repeat=0),
        dict(bandwidth=30.0, repeat=0),
        dict(engine="llama.cpp-BF16", failed="at first"),
        dict(engine="llama.cpp-BF16", versions={}),
        dict(engine="openvino-F16", missing="openvino_genai"),
        dict(engine="native", shape="1b", rows=1, repeat=0, seconds=0.05),
        dict(engine="native", shape="1b", rows=8, repeat=0, seconds=0.06),
        dict(idle=0.001),
    ]
    report = Report(rows)
    tables = {
        line.split(" | ")[0].strip("| *"): [cell.strip(" |") for cell in line.split(" | ")[1:]]
        for line in reversed(
            report.engines().splitlines()
        )  # the fastest last, to be told from below
    }
    assert list(tables)[-3] == "native-b8-bfloat16", "the fastest comes first"
    assert tables["native-auto-bfloat16"] == [
        *("16.0 (16.0–16.0)", "-12.0", "2.00", "200", "11", "8", "2/2, 4", "2/2, 4")
    ]
    assert tables["native-b8-bfloat16"][-2:] == ["0/2, 3", "0/2, 3"]
    assert tables["transformers-eager-bfloat16"][-2:] == ["0/2, 3", ""]
    ratios = {
        name: [float(cell.split()[0]) for cell in cells]
        for name, *cells in (x.strip("| ").split(" | ") for x in report.ratios().splitlines()[2:])
    }
    over = ratios["native-auto-bfloat16"]
    assert ratios["native-habits-bfloat16"][-1] == 0.75, "b8h"
    assert over == [8, 8, 6.4, 4, 3.2, 2, 0.8], "eager, eager, lookup, BF16, OpenVINO, none, b8"
    assert "| native-auto-bfloat16 |  |  |  | 2.00 (2.00–2.00) |" in report.categories()
    assert "| 1b native | 50.0 (1.00) | 60.0 (1.20) |" in report.steps()
    text = report.text()
    assert "read bandwidth 25.0 GB/s (20.0–30.0)" in text and "idle workers used 0.10%" in text
    assert text.endswith("\n\nopenvino-F16: missing openvino_genai") and "at first" not in text
    picture = report.picture("Title")
    assert picture.count('id="bar"') == 10 and picture.count("font-weight: 700") == 5


def test_a_worker_that_is_killed_is_reported_at_once():
    from workers import Failed, Worker

    worker = Worker(echo(), timeout=60)
    assert worker.load() == {"echo": "1"}
    assert worker.ask({"x": 3})["x"] == 3
    threading.Timer(0.5, os.kill, (worker.process.pid, 9)).start()
    start = time.perf_counter()
    with pytest.raises(Failed, match="exit status -9"):
        worker.ask({"sleep": 50})
    assert time.perf_counter() - start < 20
    with pytest.raises(Failed, match="exit status -9"):
        worker.ask({})
    worker.stop()


def test_a_worker_that_fails_or_is_late_says_so():
    from workers import Failed, Worker

    for request, message in (
        ({"fail": "out of luck"}, "exit status 1: RuntimeError: out of luck"),
        ({"sleep": 50}, "no answer in 2 s"),
    ):
        worker = Worker(echo(), timeout=2)
        worker.timeout = 60  # to start, on a busy machine
        worker.load()
        worker.timeout = 2 if "sleep" in request else 60
        with pytest.raises(Failed, match=message):
            worker.ask(request)
        worker.stop()


def test_workers_make_room_for_others():
    from workers import Pool

    warmed = []
    with Pool(echo, warmed.append, alive=2) as pool:
        first = {name: pool.ask(name, {})["process"] for name in "ab"}
        assert pool.ask("a", {})["process"] == first["a"]
        pool.ask("c", {})  # in the place of a, which was asked last
        assert pool.ask("b", {})["process"] == first["b"]
        assert pool.ask("a", {})["process"] != first["a"]
        assert len(warmed) == 4 and set(pool.versions) == set("abc")
        gone = list(pool._workers.values())
    assert len(gone) == 2 and all(worker.process.poll() is not None for worker in gone)


def test_a_run_goes_on_without_what_fails_or_is_missing():
    """A peer that is not installed is named; others have to be there."""
    from cpu_turns import Run
    from workers import Pool

    def command(name: str) -> list[str]:
        if name in ("llama.cpp-F32", "transformers-sdpa-float32"):  # -S: nothing installed is seen
            settings = json.dumps(dict(engine=name))
            return [sys.executable, "-S", str(BENCHMARKS / "cpu_engines.py"), settings]
        return echo()

    rows: list[dict] = []
    with Pool(command) as pool:
        run = Run(pool, ["llama.cpp-F32", "openvino-x", "transformers-sdpa-float32"], rows.append)
        assert run.ask("llama.cpp-F32", {}) is None
        assert run.ask("transformers-sdpa-float32", {}) is None
        assert run.ask("openvino-x", {})["peak"] == 1
        assert run.ask("openvino-x", {"fail": "late"}) is None
    assert run.engines == []
    assert rows == [
        {"engine": "llama.cpp-F32", "missing": "llama_cpp"},
        {"engine": "transformers-sdpa-float32", "failed": "torch is not installed"},
        {"engine": "openvino-x", "versions": {"echo": "1"}},
        {"engine": "openvino-x", "failed": "exit status 1: RuntimeError: late"},
    ]


def test_small_models_through_all(folder, tmp_path, monkeypatch, capsys):
    """Ours and transformers decode the same; what is in the file already is not run again."""
    import cpu

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cpu, "FIRST_TOKEN_PROMPT", 64)  # longer ones do not fit into the model
    data, output, plot = (tmp_path / name for name in ("q.jsonl", "r.jsonl", "r.svg"))
    questions = [dict(question_id=i, category="qa", turns=[f"one two {i}?"]) for i in (1, 2)]
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    plain, *ours = ["transformers-sdpa-float32", "torch-b4-float32", "native-habits-float32"]
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    random_habits(random.Random(0), vocabulary).save(tmp_path / "own.safetensors")
    options = ["--habits", str(tmp_path / "own.safetensors")]
    options += ["--model", folder, "--data", str(data), "--output", str(output), "--threads", "1"]
    options += ["--plot", str(plot), "--repeats", "2", "--new-tokens", "12", "--engines"]
    assert cpu.main([*options, ",".join([plain, *ours, "llama.cpp-F32"]), "--prompts", "1"]) == 0
    first = output.read_text().splitlines()
    assert cpu.main([*options, plain, "--prompts", "2"]) == 0
    lines = output.read_text().splitlines()
    header, *rows = map(json.loads, lines)
    assert lines[: len(first)] == first and header["cpu"]
    texts = [row for row in rows if "tokens" in row]
    keys = [(row["engine"], row["question"], row["repeat"]) for row in texts]
    assert len(set(keys)) == len(keys) == 2 * 2 * 3 + 2
    for question in (1, 2, None):
        found = {tuple(row["tokens"]) for row in texts if row["question"] == question}
        assert len(found) == 1, question
    for one in texts:
        assert 0 < one["first"] <= one["seconds"] and one["peak"] > 50
        assert 0 < one["first_tokens"] <= len(one["tokens"])
    assert {row["engine"] for row in rows if "versions" in row} == {plain, *ours}
    assert plot.read_text().count('id="bar"') == 3
    printed = capsys.readouterr().out
    assert "llama.cpp-F32: missing --gguf" in printed and "| 1/1, 12 |" in printed
    assert cpu.main(["--summary", str(output)]) == 0
    assert capsys.readouterr().out == printed[printed.rindex("| engine |") :]


def test_steps_of_random_shapes():
    import cpu_shapes

    model = cpu_shapes.random_llama(SHAPE)
    with torch.no_grad():
        logits = model(torch.arange(9)[None]).logits
    assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits[0].float().std(0).mean() > 0.01, "rows differ"
    forward = cpu_shapes.Forward(model)
    for rows in (1, 5):
        assert len(forward(rows)) == cpu_shapes.STEPS and forward.cache.get_seq_length() == 256
        steps = cpu_shapes.our_steps(model, "torch", rows)
        assert len(steps) >= cpu_shapes.STEPS - 1 and min(steps) > 0


def test_a_gguf_file_of_a_random_shape(tmp_path):
    gguf = pytest.importorskip("gguf")
    import cpu_shapes

    path = tmp_path / "sub" / "random.gguf"
    cpu_shapes.write_gguf(SHAPE, path)
    assert list(path.parent.iterdir()) == [path]
    tensors = {one.name: one for one in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 2 + 2 * 9
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [96, 64]
    assert list(tensors["blk.0.attn_k.weight"].shape) == [64, 32]
    assert tensors["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    values = torch.from_numpy(tensors["token_embd.weight"].data.copy()).view(torch.bfloat16)
    assert values.shape == (320, 64) and 0.015 < float(values.float().std()) < 0.025

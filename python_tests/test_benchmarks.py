"""The benchmarks run and write what they promise."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from families import VOCAB, tiny_model

from msn_ext import generate

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_kernels_quick_run_writes_complete_json(tmp_path):
    file = tmp_path / "kernels.json"
    options = ["--quick", "--device", "cpu", "--ops", "verify_tree", "--json", str(file)]
    command = [str(BENCHMARKS / "kernels.py"), *options]
    run = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(file.read_text())
    about, results = report["environment"], report["results"]
    assert " ".join(command) in about["command"]
    assert about["msn_ext"]["version"] and about["torch"] and about["device"] and about["commit"]
    assert about["copy_bytes_per_second"] > 1e8
    assert [row["size"] for row in results] == ["N=1", "N=16", "N=69"]
    for row in results:
        lower, upper = row["seconds_quartiles"]
        assert row["op"] == "verify_tree" and 0 < lower <= row["seconds"] <= upper
        assert row["bytes"] == 36 * int(row["size"].removeprefix("N=")) + 16
        assert row["eager_ratio"] == row["eager_seconds"] / row["seconds"]
        assert 0 < row["share_of_copy"] < 1
        assert row["size"] in run.stdout
    dots = ElementTree.parse(file.with_suffix(".svg")).iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(dots)) == 2 + 2 * len(results), (
        "of every case the op and eager PyTorch, and a legend"
    )


@pytest.mark.skipif(shutil.which(os.environ.get("CUDACXX", "nvcc")) is None, reason="no nvcc")
def test_no_kernel_spills(tmp_path):
    """As ptxas reports it for one architecture; the committed table has three, and every kernel."""
    file = tmp_path / "registers.txt"
    command = [
        sys.executable,
        str(BENCHMARKS / "registers.py"),
        "--architectures",
        "90",
        "--output",
        str(file),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = [line.rsplit(maxsplit=3)[0] for line in file.read_text().splitlines()[1:-1]]
    committed = (BENCHMARKS / "results" / "registers.txt").read_text().splitlines()[1:-1]
    assert sorted(kernels) == sorted(line.rsplit(maxsplit=5)[0] for line in committed)


def test_steps_are_timed_next_to_transformers(tmp_path):
    file = tmp_path / "steps.jsonl"
    options = [
        "--shape",
        "tiny",
        "--context",
        "20",
        "--nodes",
        "1,16",
        "--batch",
        "1,2",
        "--output",
        str(file),
    ]
    command = [sys.executable, str(BENCHMARKS / "steps.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    header, *rows = map(json.loads, file.read_text().splitlines())
    assert "steps.py" in header["command"] and header["commit"]
    ways = ["1 one by one", "16 one by one", "transformers eager"]
    assert [(row["batch"], row["way"]) for row in rows] == [
        (batch, way) for batch in (1, 2) for way in ways
    ]
    for row in rows:
        assert (
            min(row["all"]) <= row["seconds"] <= max(row["all"])
            and 0 < row["limit"] < row["seconds"]
        )
        assert row["way"] in run.stdout


@pytest.fixture
def specbench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import specbench

    return specbench


@pytest.mark.parametrize("end", [None, 3])
def test_replay_gives_what_decoding_gives(specbench, end):
    """In float64 every drafter's accept lengths are those of real decoding, pass by pass."""
    model = tiny_model("llama", 3)
    scratch = torch.full((256, VOCAB), -torch.inf)
    gains = []
    for seed in range(3):
        ids = torch.randint(3, VOCAB, (1, 5 + seed), generator=torch.Generator().manual_seed(seed))
        settings = dict(
            do_sample=False,
            max_new_tokens=50,
            eos_token_id=end,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        text = model.generate(ids, **settings).sequences[0].tolist()
        with torch.no_grad():
            replayed = specbench.replay_all(
                list(specbench.DRAFTS), model, text, ids.shape[1], scratch
            )
        assert list(replayed) == list(specbench.DRAFTS) and bool((scratch == -torch.inf).all())
        for name, accept_lengths in replayed.items():
            out = generate(model, ids, draft=specbench.make_drafter(name), **settings)
            assert accept_lengths == out.accept_lengths[0].tolist(), name
            gains.append(max(accept_lengths))
    assert end is not None or max(gains) > 4


def test_specbench_goes_on_where_a_file_ends_and_sums_up(specbench, tmp_path, monkeypatch, capsys):
    class Letters:
        def apply_chat_template(self, messages, **options):
            text = "".join(message["content"] for message in messages)[-40:]
            ids = torch.tensor([[3 + ord(letter) % 20 for letter in text]])
            return type("Inputs", (dict,), {"to": lambda self, device: self})(input_ids=ids)

        def decode(self, tokens, **options):
            return "".join(chr(97 + token) for token in tokens)

    data, output = tmp_path / "questions.jsonl", tmp_path / "results.jsonl"
    rows = [
        {"question_id": i, "category": c, "turns": ["abcabc"[i % 3 :]] * t}
        for i, (c, t) in enumerate(zip("wwqwq", (2, 1, 1, 2, 1)))
    ]
    for row in rows:
        row["category"] = {"w": "writing", "q": "qa"}[row["category"]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(
        specbench, "load_model", lambda options: (tiny_model("llama", 3), Letters())
    )
    options = [
        "--data",
        str(data),
        "--output",
        str(output),
        "--drafts",
        "paper,auto@8",
        "--new-tokens",
        "20",
    ]
    assert specbench.main([*options, "--prompts", "2", "--check", "1"]) == 0
    first = output.read_text().splitlines()
    with output.open("a") as file:
        file.write('{"question": 4, "tok')  # killed here
    assert specbench.main(options) == 0
    lines = output.read_text().splitlines()
    assert lines[: len(first)] == first and len(lines) == 1 + sum(len(row["turns"]) for row in rows)
    seen = [(row["category"], row["question"], row["turn"]) for row in map(json.loads, lines[1:])]
    assert seen == [
        ("mt_bench", 0, 0),
        ("mt_bench", 0, 1),
        ("qa", 2, 0),
        ("mt_bench", 1, 0),
        ("qa", 4, 0),
        ("mt_bench", 3, 0),
        ("mt_bench", 3, 1),
    ]
    capsys.readouterr()
    assert specbench.main(["--summary", str(output)]) == 0
    table = capsys.readouterr().out
    tokens = sum(len(json.loads(line)["tokens"]) for line in lines[1:])
    passes = sum(len(json.loads(line)["accept_lengths"]["auto@8"]) for line in lines[1:])
    assert f"{tokens / passes:.2f}" in next(
        line for line in table.splitlines() if line.startswith("auto@8")
    )
    assert "check on 1 turns: auto@8" in table
    other = tmp_path / "other.jsonl"
    assert (
        specbench.main(
            [*options[:2], "--output", str(other), "--drafts", "auto@8", "--new-tokens", "20"]
        )
        == 0
    )
    capsys.readouterr()
    assert specbench.main(["--summary", str(output), str(other)]) == 0
    table = capsys.readouterr().out
    assert (
        f"{2 * len(lines[1:])} turns" in table and "auto@8" in table and "\npaper" not in table
    ), "what both files have"
    with pytest.raises(SystemExit):
        specbench.main(["--summary", str(tmp_path / "none.jsonl")])
    assert "none.jsonl holds no results" in capsys.readouterr().err


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality

    return quality


TASK = {
    "prompt": (
        "from typing import List\n\n\ndef helper(number):\n    return -number\n\n\ndef"
        ' largest(numbers: List[int]) -> int:\n    """ The largest number. """\n'
    ),
    "entry_point": "largest",
    "test": (
        "def check(candidate):\n    assert candidate([1, 3, 2]) == 3\n    assert candidate([-5]) =="
        " -5\n"
    ),
}


@pytest.mark.parametrize(
    "answer, right",
    [
        (
            (
                "Here it is:\n```python\ndef largest(numbers: List[int]) -> int:\n    return"
                " max(numbers)\n```\nIt works."
            ),
            True,
        ),
        ("```\nimport math\n\ndef largest(numbers):\n    return max(numbers)", True),
        ("    return max(numbers)\n", True),
        ("```python\ndef largest(numbers):\n    return -min(map(helper, numbers))\n```", True),
        ("```python\ndef largest(numbers):\n    return numbers[0]\n```", False),
        ("```python\ndef other(numbers):\n    return max(numbers)\n```", False),
        ("I cannot say.", False),
        ("```python\ndef largest(numbers):\n    return bytearray(1 << 34)\n```", False),
        ("```python\nimport sys\nsys.exit(0)\n```", False),
    ],
    ids=[
        "block",
        "open block",
        "body",
        "helper",
        "wrong",
        "other name",
        "no code",
        "too large",
        "exits",
    ],
)
def test_humaneval_answers_are_run(quality, answer, right):
    assert quality.humaneval_right(TASK, answer) is right


def test_a_program_that_does_not_end_is_stopped(quality, monkeypatch):
    monkeypatch.setattr(quality, "SECONDS", 1)
    assert not quality.humaneval_right(
        TASK, "```python\ndef largest(numbers):\n    while True:\n        pass\n```"
    )


@pytest.mark.parametrize(
    "answer, right",
    [
        ("It is 1,234.0 dollars.", True),
        ("First 1234, then 5", False),
        ("none", False),
        ("#### -1234", False),
        ("It is -1234.", False),
        ("$1234.", True),
        ("between 1000-1234", True),
        ("(1300)-1234", True),
    ],
)
def test_gsm8k_answers_are_compared_by_their_last_number(quality, answer, right):
    assert quality.gsm8k_right({"answer": "12 * 3 = 36\n#### 1,234"}, answer) is right

"""benchmarks/quality.py: answers are judged, models are compared."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers import BENCHMARKS
from helpers.conversations import TEMPLATE, tiny_llama
from helpers.samples import byte_tokenizer
from msn_ext.jsonl import draw
from msn_ext.recipe.samples import before_repetition
from msn_ext.training.data import prompt_ids, read_conversations


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


def test_quality_is_compared_on_the_first_model_s_answers(
    folder, data, tmp_path, monkeypatch, capsys
):
    """benchmarks/quality.py: held-out conversations are none of those learned, and all models see
    the same answers.
    """
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality

    other, output = tmp_path / "other", tmp_path / "results"
    with torch.no_grad():
        changed = tiny_llama()
        changed.lm_head.weight += 0.05 * torch.randn(
            changed.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)
        )
    changed.save_pretrained(other)
    byte_tokenizer(TEMPLATE).save_pretrained(other)
    tasks = tmp_path / "gsm8k.jsonl"
    tasks.write_text(
        "".join(
            json.dumps({"question": f"{n} and 1?", "answer": f"#### {n + 1}"}) + "\n"
            for n in range(3)
        )
    )
    options = [
        "--data",
        data,
        "--skip",
        "30",
        "--held-out",
        "6",
        "--gsm8k",
        str(tasks),
        "--questions",
        "2",
        "--max-new-tokens",
        "24",
    ]
    for name, model in (("base", folder), ("other", str(other))):
        assert (
            quality.main(
                [
                    "--name",
                    name,
                    "--model",
                    model,
                    "--dtype",
                    "float32",
                    *options,
                    "--output",
                    str(output),
                ]
            )
            == 0
        )
    with pytest.raises(SystemExit):
        quality.main(["--name", "base", "--model", folder, *options, "--output", str(output)])
    capsys.readouterr()
    assert quality.main(["--summary", str(output)]) == 0
    table = capsys.readouterr().out

    header, base, changed = map(json.loads, (output / "results.jsonl").read_text().splitlines())
    assert "quality.py" in header["command"]
    answers = [json.loads(line) for line in (output / "held-out.jsonl").read_text().splitlines()]
    drawn = draw([read_conversations(data)], 36)
    assert sorted(row["messages"][0]["content"] for row in answers) == sorted(
        held[0]["content"] for held in drawn[30:]
    )
    tokenizer, samples = byte_tokenizer(TEMPLATE), []
    for row in answers:
        prompt = prompt_ids(tokenizer, row["messages"])
        answer = before_repetition(row["tokens"])
        samples.append((prompt, answer))
    for row, path in ((base, folder), (changed, other)):
        model, losses = LlamaForCausalLM.from_pretrained(path), []
        for prompt, answer in samples:
            with torch.no_grad():
                said = (
                    model(torch.tensor([prompt + answer]))
                    .logits[0, len(prompt) - 1 : -1]
                    .log_softmax(-1)
                )
            losses += (-said[torch.arange(len(answer)), torch.tensor(answer)]).tolist()
        assert (
            row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
            and row["held out"] == 6
        )
        assert row["gsm8k"][1] == 2 and f"{row['loss']:.4f}" in table
        assert len((output / f"{row['name']}-gsm8k.jsonl").read_text().splitlines()) == 2
    assert base["loss"] != changed["loss"]

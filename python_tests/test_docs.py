"""What README and docs/*.md show is true: Python runs, with a tiny model in the place of the
reader's; commands are accepted by the real parsers. docs/integrations.md has a test of its own.
"""

import random
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

import msn_ext
from helpers.commands import save
from helpers.conversations import repeating_llama
from helpers.drafters import random_habits
from helpers.families import VOCAB, tiny_model
from helpers.samples import Pad, samples
from msn_ext.cli import COMMANDS, _parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
}
ELSEWHERE = {
    "docs/grammars.md": ROOT / "python_tests" / "decoding" / "test_grammar.py",
    "docs/integrations.md": ROOT / "python_tests" / "integrations" / "test_docs.py",
}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list:
    return [
        pytest.param(page, code, id=f"{page}: {code.strip().splitlines()[0][:40]}")
        for page, text in PAGES.items()
        if page not in ELSEWHERE
        for kind, code in FENCE.findall(text)
        if kind == language
    ]


# ---- Python


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict:
    """What the examples take for granted, and a tiny model wherever one is loaded."""
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "model", repeating_llama(400))
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        cls = getattr(transformers, name)
        load = cls.from_pretrained
        monkeypatch.setattr(
            cls, "from_pretrained", lambda _, load=load, **more: load(folder, **more)
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained("any")
    model = tiny_model("llama", 1, torch.float32)
    of_loaded = transformers.AutoConfig.from_pretrained(folder).vocab_size
    random_habits(random.Random(0), of_loaded).save("own.safetensors")
    usual = dict(report_to=[], use_cpu=True, save_strategy="no", max_steps=1)
    args = transformers.TrainingArguments(output_dir=str(tmp_path / "run"), **usual)
    data = samples(8, VOCAB)

    def trainer(model, args, train_dataset):
        return transformers.Trainer(model, args, Pad(), train_dataset=train_dataset)

    return dict(
        AutoModelForCausalLM=transformers.AutoModelForCausalLM,
        SFTTrainer=trainer,
        args=args,
        data=data,
        generate=msn_ext.generate,
        inputs=tokenizer("Once upon a time", return_tensors="pt"),
        msn_ext=msn_ext,
        name="any",
        texts=["Once upon a time", "Twice upon a time"],
        tokenizer=tokenizer,
        torch=torch,
        trainer=trainer(model, args, data),
    )


@pytest.mark.parametrize("page, code", blocks("python"))
def test_python_runs(page, code, names):
    names["model"] = transformers.AutoModelForCausalLM.from_pretrained("any")
    if "SFTTrainer" in code:
        names["model"] = tiny_model("llama", 1, torch.float32)
    exec(compile(code, page, "exec"), names)
    if "ids" in names:
        plain = msn_ext.generate(
            names["model"], **names["inputs"], max_new_tokens=200, draft="none"
        )
        assert torch.equal(names["ids"], plain)


# ---- commands


def command_lines() -> list:
    """Every command line in a block: of consoles, and indented ones."""
    found = []
    for page, text in PAGES.items():
        if page in ELSEWHERE:
            continue
        consoles = "".join(code for kind, code in FENCE.findall(text) if kind == "console")
        rest = FENCE.sub("", text)
        lines = [*consoles.splitlines(), *re.findall(r"^    ((?:python|make|msn) .*)", rest, re.M)]
        found += [pytest.param(line, id=f"{page}: {line[:50]}") for line in lines if line.strip()]
    return found


def expect_script(file: str, options: list[str]) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    if shared := re.search(r"^from (\w+) import .*\bmake_parser\b", source, re.M):
        source += (ROOT / file).with_name(f"{shared[1]}.py").read_text(encoding="utf-8")
    for option in options:
        assert f'"{option}"' in source, f"{file} has no {option}"


@pytest.mark.parametrize("line", command_lines())
def test_commands_are_accepted(line):
    program, *arguments = shlex.split(line, comments=True)
    options = [argument for argument in arguments if argument.startswith("-")]
    if program == "msn":
        assert callable(_parser().parse_args(arguments).run)
    elif program == "make":
        targets = re.findall(r"^([\w ]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)
        assert {a for a in arguments if "=" not in a} <= {*" ".join(targets).split()}
    elif program == "python" and arguments[0].endswith(".py"):
        expect_script(arguments[0], options)
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in ",".join(re.findall(r"\[(.*?)\]", line)).split(","):
            assert not extra or re.search(rf"^{extra} = \[", project, re.M), extra
    else:
        pytest.fail(f"nobody knows whether {program!r} takes that")


def spans(start: str) -> list:
    """Every piece of code within a sentence that begins so, line feeds taken out."""
    return [
        pytest.param(" ".join(span.split()), id=f"{page}: {' '.join(span.split())[:50]}")
        for page, text in PAGES.items()
        for span in dict.fromkeys(re.findall(rf"`({start}\s[^`]+)`", FENCE.sub("", text)))
    ]


@pytest.mark.parametrize("span", spans("msn"))
def test_commands_within_sentences_exist(span):
    _, command, *arguments = shlex.split(span)
    known = _parser()._subparsers._group_actions[0].choices[command]._option_string_actions
    assert command in COMMANDS
    for argument in arguments:
        if argument.startswith("-"):
            assert argument in known, f"msn {command} has no {argument}"


@pytest.mark.parametrize("span", spans("python"))
def test_scripts_within_sentences_exist(span):
    _, file, *arguments = shlex.split(span)
    if file.endswith(".py"):
        expect_script(file, [argument for argument in arguments if argument.startswith("--")])


# ---- links


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    text = FENCE.sub("", PAGES[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            there = path.read_text(encoding="utf-8")
            heads = re.findall(r"^#+ (.*)", there, re.M)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors or f'<a id="{anchor}">' in there, target


def test_no_page_is_left_out():
    """What is run elsewhere is there, and the rules above find what the pages have."""
    assert all(page in PAGES and file.is_file() for page, file in ELSEWHERE.items())
    assert len(blocks("python")) >= 7 and len(command_lines()) >= 10 and len(spans("msn")) >= 10
    kinds = {kind for text in PAGES.values() for kind, _ in FENCE.findall(text)}
    assert kinds <= {"python", "console"}

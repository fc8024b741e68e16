"""The examples of docs/integrations.md run, each with a tiny model in the place of MODEL."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import msn_ext
from helpers.commands import save
from helpers.conversations import repeating_llama
from msn_ext import cli
from msn_ext.spec_bench import noise_forward

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
BLOCKS = re.findall(r"```(python|console)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
CONSOLE = [code for language, code in BLOCKS if language == "console"]


@pytest.fixture
def names(tmp_path) -> dict:
    """What the examples take for granted."""
    folder = save(tmp_path / "model", repeating_llama(200))
    assert cli.main(["export-generate", folder]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    adapted = get_peft_model(repeating_llama(200), LoraConfig(init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(
        MODEL=folder,
        ADAPTER=str(tmp_path / "adapter"),
        model=model,
        tokenizer=tokenizer,
        inputs=tokenizer("Once upon a time", return_tensors="pt"),
        msn_ext=msn_ext,
        noise_forward=noise_forward,
        AutoModelForCausalLM=AutoModelForCausalLM,
        AutoTokenizer=AutoTokenizer,
        PeftModel=PeftModel,
        pipeline=pipeline,
    )


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("\n")[0][:40])
def test_an_example_gives_the_text_of_plain_decoding(code, names):
    assert code.count("\n") <= 10
    if "litserve" in code:
        names["litserve"] = pytest.importorskip("litserve")
    inputs, tokenizer = names["inputs"], names["tokenizer"]
    names["want"] = names["model"].generate(**inputs, max_new_tokens=30, do_sample=False)
    exec(code, names)  # what a reader would paste
    if "PeftModel" in code or "int8" in code:  # another model than before
        names["want"] = msn_ext.generate(names["model"], **inputs, max_new_tokens=30, draft="none")
    want = tokenizer.decode(names["want"][0], skip_special_tokens=True)
    if "Writer" in names:
        writer = names["Writer"]()
        writer.setup("cpu")
        assert writer.predict({"prompt": "Once upon a time"}) == {"text": want}
    elif "text" in names:
        assert names["text"] == want
    else:
        got = names["ids"] if "ids" in names else names["tokens"]
        assert torch.equal(got, names["want"])


def test_the_commands_are_commands(names, monkeypatch):
    """Those of ours run; of the others the parsers accept the arguments."""
    ran = set()
    for line in "".join(CONSOLE).replace("MODEL", names["MODEL"]).splitlines():
        program, *arguments = shlex.split(line)
        ran.add(program)
        if program == "msn":
            assert cli.main(arguments) == 0
        elif program == "lm_eval":
            harness = pytest.importorskip("lm_eval._cli.harness")
            monkeypatch.setattr("sys.argv", [program, *arguments])
            harness.HarnessCLI().parse_args()
        else:
            from transformers.cli.transformers import app

            app.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    assert ran == {"msn", "transformers", "lm_eval"}


def test_spec_bench_gets_what_it_asks_for(names):
    model, inputs = names["model"], names["inputs"]
    want = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    for given in (inputs, inputs["input_ids"]):
        tokens, new, passes, gained = noise_forward(given, model, names["tokenizer"], 30)
        assert torch.equal(tokens, want)
        assert new == 30 == sum(gained) and passes == len(gained) < 30
    torch.manual_seed(1)
    sampled = noise_forward(inputs, model, None, 30, temperature=0.9, do_sample=True)
    torch.manual_seed(1)
    options = dict(max_new_tokens=30, do_sample=True, temperature=0.9, draft="none")
    assert torch.equal(sampled[0], msn_ext.generate(model, **inputs, **options))
    with pytest.raises(ValueError, match="inputs has shape"):
        noise_forward(torch.ones(2, 3, dtype=torch.int64), model, None, 30)

"""A folder with a gated adapter as --model: the text of its base model."""

import pytest
from transformers import AutoModelForCausalLM

from helpers.noise import gated
from msn_ext import cli
from msn_ext.cli.loading import load
from msn_ext.decoding.forward.adapter import noise_adapter_of

pytest.importorskip("peft")


def test_a_gated_adapter_stays_beside_the_weights(tiny, tmp_path, capsys):
    folder = tmp_path / "gated"
    adapted = gated(AutoModelForCausalLM.from_pretrained(tiny))
    adapted.save_pretrained(folder)
    _, tokenizer, _ = load(tiny, None, "cpu")
    tokenizer.save_pretrained(folder)
    loaded, _, _ = load(str(folder), None, "cpu")
    assert noise_adapter_of(loaded.get_base_model()) is not None
    texts = []
    for path in (tiny, folder):
        arguments = ["--model", str(path), "--prompt", "one two", "--max-new-tokens", "20"]
        assert cli.main(["generate", *arguments, "--device", "cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()

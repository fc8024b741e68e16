"""A folder with a gated adapter as --model: the text of its base model."""

import pytest
import torch

from helpers.families import VOCAB, tiny_model
from helpers.noise import gated
from helpers.samples import word_tokenizer
from msn_ext import cli
from msn_ext.cli.loading import load
from msn_ext.decoding.forward.adapter import noise_adapter_of

pytest.importorskip("peft")


def test_a_gated_adapter_stays_beside_the_weights(tmp_path, capsys):
    base = tmp_path / "base"
    model, tokenizer = tiny_model("llama", 3, torch.float32), word_tokenizer(VOCAB)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    folder = tmp_path / "gated"
    adapted = gated(tiny_model("llama", 3, torch.float32))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded, _, _ = load(str(folder), None, "cpu")
    assert noise_adapter_of(loaded) is not None
    texts = []
    for path in (base, folder):
        arguments = ["--model", str(path), "--prompt", "t5 t9", "--max-new-tokens", "20"]
        assert cli.main(["generate", *arguments, "--device", "cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()

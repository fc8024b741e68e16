"""Shared by the tests of the command `msn`."""

import json

from helpers.samples import byte_tokenizer
from msn_ext import cli

CONTEXT = 96
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
KEYS = {
    "text",
    "new_tokens",
    "forward_passes",
    "mat",
    "tokens_per_second",
    "accept_lengths",
    "draft",
    "device",
    "dtype",
}


def save(folder, model):
    model.save_pretrained(folder)
    byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return str(folder)


def generate_json(capsys, *arguments) -> dict:
    assert cli.main(["generate", "--json", *arguments]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1])


ASK = ["generate", "--prompt", "hello"]

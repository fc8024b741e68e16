"""Without xgrammar, the error says how to get it."""

import sys
import types

import pytest

import msn_ext


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ImportError, match=r"pip install 'msn_ext\[grammar\]'"):
        msn_ext.grammar(regex="a", tokenizer=types.SimpleNamespace(eos_token_id=2))

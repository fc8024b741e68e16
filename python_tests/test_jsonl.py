"""The texts of files."""

import gzip

import pytest

from msn_ext.jsonl import batches, rows, texts


def test_texts_of_files(tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("one\ntwo\n", encoding="utf-8")
    lines = [
        '{"text": "grün", "prompt": "x"}',
        "",
        '{"prompt": "why?", "response": "so", "score": 1}',
        '{"response": "a"}',
    ]
    rows.write_text("\n".join(lines), encoding="utf-8")
    assert list(texts(str(text))) == ["one\ntwo\n"]
    assert list(texts(str(rows))) == ["grün", "why?", "so", "a"]
    assert list(batches(iter(["abc", "", "d", "efghij", "k"]), 4)) == [
        ["abc", "", "d"],
        ["efghij"],
        ["k"],
    ]
    assert list(batches([])) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_what_is_no_text_is_named_by_its_line(tmp_path, name):
    """Whole characters of other tables, and one that is cut off, after lines of many bytes each."""
    for bad, byte in ((b"\xfcber", "fc"), ("ü".encode()[:1], "c3"), (b"\xed\xa0\x80", "ed")):
        before = '{"text": "grün"}\r\n'.encode() * 3000
        content = before + b'{"text": "' + bad + b'"}\n' + before
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        read = texts if name.endswith(".txt") else rows
        match = f"{name}: line 3001 cannot be read: byte 0x{byte} after 10 characters is no UTF-8"
        with pytest.raises(ValueError, match=match):
            list(read(str(path)))
        content = before + b'{"text": "\xf0\x9f\x8c\xb1"}'
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert "\U0001f331" in str(list(read(str(path)))[-1])


def test_where_a_file_is_damaged(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(20000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read after line \d{4}"):
        list(rows(str(path)))

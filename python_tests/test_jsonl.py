"""The texts of files."""

from msn_ext.jsonl import batches, texts


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

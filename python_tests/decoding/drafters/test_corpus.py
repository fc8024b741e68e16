"""A corpus: what is indexed, that the file is what memory was, that it is mapped, and that drafts
come from it.
"""

import os
import random
import re
import struct
import time

import pytest
import torch

from helpers import ROOT, oracle
from helpers.cases import assert_equal
from helpers.families import VOCAB, tiny_model
from msn_ext import BestFirst, Corpus, generate
from msn_ext.decoding.drafters import calibration
from msn_ext.decoding.drafters import corpus as corpus_module
from msn_ext.ops import reference

HEADER = struct.Struct("<16s4q16x")  # magic, version, vocabulary, tokens, slots
SETTINGS = dict(do_sample=False, max_new_tokens=60, eos_token_id=None, return_dict_in_generate=True)
IDS = torch.tensor([[5, 9, 4, 7]])


def build(texts, vocabulary: int = VOCAB) -> Corpus:
    return Corpus.build(texts, vocabulary, progress=False)


def random_texts(seed: int, vocabulary: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(vocabulary) for _ in range(rng.choice([0, 1, 2, 5, 40, 90]))]
        for _ in range(8)
    ] + [[0, 1]]


@pytest.mark.parametrize("chunk", [17, 40, 1 << 22])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_built_is_the_specification_of_the_whole(seed, chunk, monkeypatch):
    """In chunks or at once; documents as lists, tensors of any integers and one by one; empty ones
    left out.
    """
    monkeypatch.setattr(corpus_module, "CHUNK", chunk)
    texts = random_texts(seed)
    built = build(texts)
    whole = [token for text in texts if text for token in [-1, *text]][1:]
    assert built.tokens.tolist() == whole and built.vocabulary == VOCAB
    slots = built.heads.shape[1]
    assert slots & (slots - 1) == 0 and len(whole) // 2 <= slots < len(whole)
    heads = torch.zeros(1, 8, slots, dtype=torch.int32)
    reference.index_suffixes(
        heads, torch.tensor([whole]), torch.tensor([0]), torch.tensor([len(whole)])
    )
    assert_equal(built.heads, heads[0])
    assert len(whole) < 20 or (heads[0] > 0).any(1).all()

    kinds = [torch.int64, torch.int32, torch.uint8]
    as_tensors = build(torch.tensor(text, dtype=kinds[i % 3]) for i, text in enumerate(texts))
    for same in (as_tensors, build(tuple(text) for text in texts)):
        assert_equal(same.tokens, built.tokens)
        assert_equal(same.heads, built.heads)


def test_the_table_has_a_bound(monkeypatch):
    monkeypatch.setattr(corpus_module, "MOST_SLOTS", 8)
    assert build([[1, 2, 3, 4] * 50]).heads.shape == (8, 8)
    assert build([[1]]).heads.shape == (8, 1)


@pytest.mark.parametrize(
    "texts, vocabulary, message",
    [
        ([], 5, "documents hold no token; expected at least one"),
        ([[], torch.zeros(0)], 5, "documents hold no token"),
        ([[1], [0, 5]], 5, "documents[1][1] is 5; expected 0 to 4"),
        ([[1], [0, 3, -1]], 5, "documents[1][2] is -1; expected 0 to 4"),
        ([[2**40]], 5, f"documents[0][0] is {2**40}; expected 0 to 4"),
        (["text"], 5, "documents[0] is no sequence of tokens"),
        ([[1], None], 5, "documents[1] is no sequence of tokens"),
        (
            [[0.5]],
            5,
            "documents[0] has shape [1] and dtype torch.float32; expected whole numbers [n]",
        ),
        ([[[1, 2]]], 5, "documents[0] has shape [1, 2]"),
        ([[True]], 5, "documents[0] has shape [1] and dtype torch.bool"),
        ([[1]], 0, "vocabulary is 0; expected the model's vocab_size"),
        ([[1]], 2**31, "vocabulary is 2147483648"),
        ([[1]], 5.0, "vocabulary is 5.0"),
    ],
)
def test_what_cannot_be_indexed_is_refused_by_name(texts, vocabulary, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(texts, vocabulary)


def test_a_file_holds_what_memory_held(tmp_path):
    path = tmp_path / "x.corpus"
    for seed in range(3):  # over the one before, too
        built = build(random_texts(seed))
        built.save(str(path))
        loaded = Corpus.load(path)
        assert (
            loaded.vocabulary == built.vocabulary
            and loaded.nbytes == built.nbytes == path.stat().st_size
        )
        assert_equal(loaded.tokens, built.tokens)
        assert_equal(loaded.heads, built.heads)
        loaded.save(tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "x.corpus"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """A file that was mapped before stays what it was."""
    path = tmp_path / "x.corpus"
    first, second = build([[1, 2, 3]]), build([[4, 5, 6, 7]])
    first.save(path)
    mapped = Corpus.load(path)
    second.save(path)
    assert_equal(mapped.tokens, first.tokens)
    assert_equal(Corpus.load(path).tokens, second.tokens)
    broken = Corpus(VOCAB, second.tokens, torch.zeros(8, 1, device="meta"))
    with pytest.raises(TypeError, match="meta"):
        broken.save(path)
    assert_equal(Corpus.load(path).tokens, second.tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["x.corpus"]
    with pytest.raises(OSError):
        first.save(tmp_path / "nowhere" / "x.corpus")


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def hollow(path, tokens: int, slots: int):
    """A file of zeros but for its header, which takes no room on the disk."""
    build([[1]]).save(path)
    magic, *_ = HEADER.unpack(path.read_bytes()[:64])
    with open(path, "r+b") as file:
        file.write(HEADER.pack(magic, 2, VOCAB, tokens, slots))
        try:
            file.truncate(64 + 4 * (tokens + 8 * slots))
        except OSError as error:
            pytest.skip(f"no such large file here: {error}")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_a_file_is_mapped_not_read(tmp_path):
    """A file of 1 GB: nothing of it is in memory but the pages that are looked up."""
    path = tmp_path / "large.corpus"
    hollow(path, 1 << 27, 1 << 24)
    before, start = resident(), time.perf_counter()
    large = Corpus.load(path)
    assert time.perf_counter() - start < 1 and large.nbytes == path.stat().st_size > 1 << 30
    with open("/proc/self/maps") as file:
        line = next(line.split() for line in file if line.rstrip().endswith(str(path)))
    low, high = (int(end, 16) for end in line[0].split("-"))
    assert line[1].startswith("r-"), "it can be written to"
    for tensor in large.on(torch.device("cpu")):
        assert low <= tensor.data_ptr() < high
    drafter = BestFirst(16, corpus=large)
    out = generate(tiny_model("llama", 3), IDS, draft=drafter, **SETTINGS)
    assert resident() - before < 200 << 20
    assert torch.equal(out.sequences, tiny_model("llama", 3).generate(IDS, **SETTINGS).sequences)
    path.unlink()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_places_beyond_what_32_bits_can_address(tmp_path):
    """A longest n-gram at the end of 2^31 - 1 tokens, 8 GB, and its head after 3.7 thousand
    million others.
    """
    path, tokens, slots = tmp_path / "large.corpus", 2**31 - 1, 1 << 29
    ngram = list(range(1, 17))
    hollow(path, tokens, slots)
    with open(path, "r+b") as file:
        file.seek(64 + 4 * (tokens - 17))
        file.write(struct.pack("<17i", *ngram, 20))
        file.seek(64 + 4 * (tokens + 7 * slots + oracle.hashed(tuple(ngram)) % slots))
        file.write(struct.pack("<i", tokens - 1))
    drafter = BestFirst(4, sources=("suffix",), corpus=Corpus.load(path), foresight=0.0)
    drafter.start(1, VOCAB, torch.device("cpu"))
    drafter.propose(torch.tensor([[0, *ngram]]), torch.tensor([17]))
    assert drafter.sources.tolist() == [[0, 4, 0, 0]]
    assert drafter.draft.tokens[0, 1] == 20
    path.unlink()


def changed_header(content: bytes, **changes: int) -> bytes:
    magic, *numbers = HEADER.unpack(content[:64])
    fields = dict(zip(("version", "vocabulary", "tokens", "slots"), numbers)) | changes
    return HEADER.pack(magic, *fields.values()) + content[64:]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: b"", "is no corpus: expected a file that msn corpus or Corpus.save wrote"),
        (lambda x: b'{"text": "abc"}', "is no corpus"),
        (lambda x: x[1:], "is no corpus"),
        (lambda x: x.replace(b"\r\n", b"\n", 1), "is no corpus"),
        (lambda x: x[:15], "is no corpus"),
        (lambda x: x[:30], "is cut short: it has 30 bytes; expected a header of 64"),
        (lambda x: x[:-1], "is cut short: it has {less} bytes; expected {size}"),
        (lambda x: x[:64], "is cut short: it has 64 bytes; expected {size}"),
        (lambda x: x + b"\0", "is damaged: it has {more} bytes; expected {size}"),
        (
            lambda x: changed_header(x, version=1),
            "is a corpus of version 1; this msn_ext reads version 2: build it again (msn corpus)",
        ),
        (lambda x: changed_header(x, version=3), "is a corpus of version 3; this msn_ext reads"),
        (lambda x: changed_header(x, tokens=5), "is damaged: it has {size} bytes; expected"),
        (
            lambda x: changed_header(x, tokens=-1),
            "is damaged: its header says vocabulary=24, tokens=-1",
        ),
        (lambda x: changed_header(x, tokens=2**62), "is damaged: its header says"),
        (lambda x: changed_header(x, slots=0), "is damaged: its header says"),
        (lambda x: changed_header(x, slots=2**62), "is damaged: its header says"),
        (lambda x: changed_header(x, vocabulary=0), "is damaged: its header says vocabulary=0"),
    ],
)
def test_damaged_foreign_and_other_versions_files_are_refused_by_name(tmp_path, change, message):
    path = tmp_path / "x.corpus"
    build([[1, 2, 3, 4] * 4]).save(path)
    content = path.read_bytes()
    assert changed_header(content) == content
    path.write_bytes(change(content))
    message = message.format(size=len(content), less=len(content) - 1, more=len(content) + 1)
    with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
        Corpus.load(path)


def test_a_missing_file_is_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        Corpus.load(tmp_path / "x.corpus")


def test_a_device_gets_one_copy():
    known = build([[1, 2, 3]])
    assert known.on("cpu")[0] is known.tokens and known.on(torch.device("cpu"))[1] is known.suffixes
    copy = known.on("meta")
    assert copy[0].device.type == "meta" and all(x is y for x, y in zip(copy, known.on("meta")))


def answer(model, ids=IDS) -> list[int]:
    return model.generate(ids, **SETTINGS).sequences[0].tolist()


@pytest.mark.parametrize("sources", [("suffix",), ("denoised", "adjacency", "suffix")])
def test_a_corpus_that_holds_the_answer_is_worth_many_tokens_a_pass(sources):
    gains = {"nothing": [], "another answer": [], "answer": []}
    for seed in range(4):
        model = tiny_model("llama", seed)
        expected = answer(model)
        other = answer(tiny_model("llama", seed + 50), torch.tensor([[5, 9, 4, 8]]))
        shuffled = random.Random(seed).sample(expected, len(expected))
        corpora = {
            "nothing": None,
            "another answer": build([other, shuffled]),
            "answer": build([other, expected, shuffled]),
        }
        for name, known in corpora.items():
            out = generate(
                model, IDS, draft=BestFirst(24, sources=sources, corpus=known), **SETTINGS
            )
            assert out.sequences[0].tolist() == expected
            gains[name].append(len(expected) / len(out.accept_lengths[0]))
    means = {name: sum(values) / len(values) for name, values in gains.items()}
    assert means["answer"] > 2 * means["nothing"] and means["answer"] > 6
    assert means["another answer"] < 1.3 * means["nothing"], "negative control"


@pytest.mark.parametrize("seed", range(6))
def test_damage_inside_a_corpus_changes_no_output(seed):
    """Heads that point anywhere, numbers that are no tokens of the model, in batches."""
    source = torch.Generator().manual_seed(seed)
    model = tiny_model("llama", seed)
    known = build([answer(model), *random_texts(seed, VOCAB)])
    wild = torch.tensor([-(2**31), -1, 0, VOCAB, VOCAB + 1, 2**31 - 1], dtype=torch.int32)
    for table, share in ((known.suffixes, 0.3), (known.tokens, 0.2)):
        places = torch.rand(table.shape, generator=source) < share
        table[places] = wild[torch.randint(len(wild), (int(places.sum()),), generator=source)]
    prompts = torch.randint(3, VOCAB, (3, 6), generator=source)
    prompts[0, -4:] = IDS[0]
    out = generate(model, prompts, draft=BestFirst(32, corpus=known), pad_token_id=0, **SETTINGS)
    expected = model.generate(prompts, pad_token_id=0, **SETTINGS)
    assert torch.equal(out.sequences, expected.sequences)


def test_guesses_of_a_damaged_corpus_stay_inside_the_vocabulary():
    known = build([[1, 2, 3, 4] * 4])
    known.tokens[known.tokens == 3] = 2**31 - 1
    drafter = BestFirst(16, corpus=known)
    drafter.start(1, VOCAB, torch.device("cpu"))
    tokens = drafter.propose(torch.tensor([[7, 1, 2]]), torch.tensor([3])).tokens
    assert tokens.max() == VOCAB - 1


def test_a_corpus_of_another_vocabulary_is_refused():
    with pytest.raises(
        ValueError,
        match=f"corpus is of a vocabulary of 25 tokens, the model has {VOCAB}; expected one that",
    ):
        generate(
            tiny_model("llama", 0),
            IDS,
            draft=BestFirst(corpus=build([[1]], VOCAB + 1)),
            max_new_tokens=3,
        )


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(corpus="x.corpus"),
            "corpus is 'x.corpus'; expected None or what Corpus.load(path) gives",
        ),
        (
            dict(corpus=build([[1]]), sources=("denoised",)),
            "sources is ('denoised',); expected 'suffix' among them",
        ),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BestFirst(**options)


def test_calibration_records_what_the_corpus_lists():
    """The recorder's lists are those that draft_tree makes its tree of."""
    model, records = tiny_model("llama", 3), []
    expected = answer(model)
    for known in (None, build([expected])):
        records.clear()
        recorder = calibration.FactorRecorder(
            records, BestFirst(budget=24, sources=("suffix",), corpus=known)
        )
        generate(model, IDS, draft=recorder, **SETTINGS)
        listed = [came in {token for token, _ in entries} for _, entries, came in records]
        assert sum(listed) > 0.9 * len(listed) if known else sum(listed) < 0.6 * len(listed)


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "drafters.md").read_text(encoding="utf-8")
    example = next(
        block.split("```")[0] for block in page.split("```python\n") if "Corpus.build" in block
    )
    monkeypatch.chdir(tmp_path)
    model, words = tiny_model("llama", 3), answer(tiny_model("llama", 3))
    model.generation_config.eos_token_id = None
    names = {
        "tokenizer": lambda text, add_special_tokens: {
            "input_ids": [int(word) for word in text.split()]
        },
        "texts": [" ".join(map(str, words))],
        "model": model,
        "inputs": {"input_ids": IDS},
    }
    exec(example, names)
    assert names["ids"][0, : len(words)].tolist() == words and (tmp_path / "faq.corpus").exists()

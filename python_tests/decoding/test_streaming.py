"""Streamers get what plain decoding's get: of a batch, too, a token of each row at a time; or there
is one for each row.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

from helpers.drafters import RandomDrafter, prompts
from helpers.families import VOCAB, tiny_model
from helpers.samples import byte_tokenizer
from msn_ext import generate

SETTINGS = dict(do_sample=False, max_new_tokens=50, pad_token_id=0, return_dict_in_generate=True)


class Recorder:
    def __init__(self, fail_at: int | None = None):
        self.puts, self.ended, self.fail_at = [], 0, fail_at

    def put(self, value):
        assert not self.ended and value.device.type == "cpu" and value.dtype == torch.int64
        self.puts.append(value.clone())
        if len(self.puts) == self.fail_at:
            raise RuntimeError("reader went away")

    def end(self):
        self.ended += 1


def batch(seed: int, end):
    """A model, and settings under which rows end apart: by an end of text, a criterion, or both."""
    model = tiny_model("llama", seed)
    ids, mask = prompts(random.Random(seed), 3)
    options = SETTINGS | dict(attention_mask=mask, eos_token_id=end)
    free = model.generate(ids, **(options | dict(eos_token_id=None))).sequences
    stops = torch.tensor([int(row[ids.shape[1] + at]) for row, at in zip(free, (3, 9, 20))])
    options["stopping_criteria"] = [lambda ids, scores, **_: torch.isin(ids[:, -1], stops)]
    return model, ids, mask, options


@pytest.mark.parametrize("end", [None, [2], [2, 5, 11]])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("through_transformers", [False, True])
def test_a_streamer_of_several_rows(seed, end, through_transformers, each_engine):
    """The same calls as from transformers."""
    model, ids, _, options = batch(seed, end)
    theirs = Recorder()
    expected = model.generate(ids, streamer=theirs, **options)
    for draft in ("auto", "paper", RandomDrafter(random.Random(seed)), "none"):
        ours = Recorder()
        if through_transformers:
            out = model.generate(
                ids, custom_generate=generate, streamer=ours, draft=draft, **options
            )
        else:
            out = generate(model, ids, streamer=ours, draft=draft, **options)
        assert torch.equal(out.sequences, expected.sequences)
        assert len(ours.puts) == len(theirs.puts) and ours.ended == 1
        assert all(torch.equal(a, b) for a, b in zip(ours.puts, theirs.puts))


@pytest.mark.parametrize("end", [None, [2], [2, 5, 11]])
@pytest.mark.parametrize("seed", range(4))
def test_a_streamer_for_each_row(seed, end, each_engine):
    """Prompt without padding, tokens as they come and none that is taken back, the end."""
    model, ids, mask, options = batch(seed, end)
    if seed % 2:
        del options["stopping_criteria"]
    streamers = [Recorder() for _ in ids]
    out = generate(model, ids, streamer=streamers, **options)
    for row, kept, accepts, streamer in zip(out.sequences, mask, out.accept_lengths, streamers):
        prompt, *passes = streamer.puts
        assert torch.equal(prompt, row[: len(kept)][kept.bool()][None]) and streamer.ended == 1
        count = len(kept) + int(accepts.sum())
        assert torch.equal(torch.cat(passes), row[len(kept) : count])
        # What criteria are asked about all rows stays once all have come as far.
        if end is not None and "stopping_criteria" not in options:
            assert [len(tokens) for tokens in passes] == accepts.tolist()


def test_a_row_ends_when_it_ends(each_engine):
    """Not when the last one does."""
    model, ids = tiny_model("llama", 2), torch.tensor([[5, 9, 4, 7], [6, 3, 3, 8]])
    order = []

    class Ordered(Recorder):
        def put(self, value):
            order.append(("put", self))

        def end(self):
            order.append(("end", self))

    first, second = streamers = [Ordered(), Ordered()]
    ends = [lambda ids, scores, **_: (ids[:, 0] == 5) & (ids.shape[1] > 5)]
    generate(
        model, ids, streamer=streamers, stopping_criteria=ends, eos_token_id=[VOCAB], **SETTINGS
    )
    assert order.index(("end", first)) < len(order) - 10 and order[-1] == ("end", second)
    assert order.count(("end", first)) == 1


@pytest.mark.parametrize("fail_at", [1, 3])
def test_all_end_after_an_error(fail_at, each_engine):
    """Of one of them."""
    model, ids, _, options = batch(1, [2])
    streamers = [Recorder(), Recorder(fail_at), Recorder()]
    with pytest.raises(RuntimeError, match="reader went away"):
        generate(model, ids, streamer=streamers, **options)
    assert [streamer.ended for streamer in streamers] == [1, 1, 1]


def test_transformers_own_streamers(each_engine):
    """One for each row; for all rows they refuse, by their own message."""
    model, tokenizer = tiny_model("llama", 2, vocab_size=257), byte_tokenizer()
    texts = ["hello", "well, I"]
    tokenizer.pad_token, tokenizer.padding_side = "<eos>", "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    options = SETTINGS | dict(eos_token_id=256, pad_token_id=256)
    with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
        generate(model, **inputs, streamer=TextStreamer(tokenizer), **options)
    streamers = [
        TextIteratorStreamer(tokenizer, timeout=20, skip_special_tokens=True) for _ in texts
    ]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(generate, model, **inputs, streamer=streamers, **options)
        read = ["".join(streamer) for streamer in streamers]
    for row, text in zip(answer.result().sequences, read):
        assert text == tokenizer.decode(row, skip_special_tokens=True)


def test_replayed_steps(tapes):
    from helpers import runners

    model, ids = runners.tiny_model("llama", 3), torch.tensor([[5, 9, 4, 7], [6, 3, 3, 8]])
    options, theirs, ours = SETTINGS | dict(eos_token_id=[2]), Recorder(), Recorder()
    model.generate(ids.to(runners.where), streamer=theirs, **options)
    generate(model, ids.to(runners.where), streamer=ours, **options)
    assert len(ours.puts) == len(theirs.puts) > 5
    assert all(torch.equal(a, b) for a, b in zip(ours.puts, theirs.puts))
    assert tapes

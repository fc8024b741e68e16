"""Decoding with a draft tree gives what plain decoding gives.

In float64, on randomly initialised models of every family, the comparison is token for token with
``model.generate(do_sample=False)``. The weights are large, so that text repeats, guesses come true
and sibling paths alias; a test at the end checks that they do.
"""

import random

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

import msn_ext
from msn_ext import Draft, DraftTree, generate
from msn_ext.decoding import (
    BestFirst,
    Corpus,
    Decoder,
    TokenRecycling,
    TreeDrafter,
    attention_for,
    greedy,
)
from msn_ext.decoding.attention import KernelAttention, MaskAttention
from msn_ext.decoding.best_first import SOURCES
from msn_ext.decoding.processors import Texts
from msn_ext.decoding.support import TESTED
from msn_ext.decoding.tree import RETRIEVAL
from msn_ext.generation import DRAFTS

SEEDS = 10  # x 22 families: the 200 models and more of the acceptance test


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models are faster without threads, and the rest of the machine is left alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_tree(rng: random.Random) -> DraftTree:
    """Any shape of up to 40 nodes; some nodes retrieve, siblings may even share a rank."""
    nodes = rng.randint(1, 40)
    parents = [-1] + [rng.choice([i - 1, rng.randrange(i)]) for i in range(1, nodes)]
    if rng.random() < 0.3:
        return DraftTree(tuple(parents))
    return DraftTree(
        tuple(parents), tuple(rng.choice([RETRIEVAL, 0, 0, 1, 2, 5]) for _ in range(nodes))
    )


class RandomDrafter:
    """A tree of its own for every row and step: padding anywhere, rubbish at the root, siblings
    that alias, guesses from the text (which repeats, so that many come true), and a chain behind
    the prompt.
    """

    max_depth = 64

    def __init__(self, rng: random.Random):
        self._rng, self.seen = rng, []

    def start(self, batch, vocabulary, device):
        self._vocabulary = vocabulary

    def _tokens(self, history, lengths, count):
        rows = []
        for row, length in zip(history.tolist(), lengths.tolist()):
            at = [self._rng.randrange(length) for _ in range(count)]
            rows.append(
                [
                    row[i] if self._rng.random() < 0.8 else self._rng.randrange(self._vocabulary)
                    for i in at
                ]
            )
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), count)

    def first(self, history, lengths):
        return self._tokens(history, lengths, self._rng.randrange(5))

    def propose(self, history, lengths):
        nodes = self._rng.choice([1, 2, 17, 40, 64, 65])
        parents = [
            [-1] + [self._rng.choice([i - 1, self._rng.randrange(-1, i)]) for i in range(1, nodes)]
            for _ in range(len(lengths))
        ]
        return Draft.of(
            self._tokens(history, lengths, nodes), torch.tensor(parents, dtype=torch.int32)
        )

    def observe(self, verified):
        self.seen.append(verified)


def random_best_first(rng: random.Random) -> BestFirst:
    """Best-first drafting of any size from any sources, weighed anyhow."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    sources = tuple(source for source in SOURCES if rng.random() < 0.7)
    texts = [
        torch.randint(rng.choice([3, VOCAB]), (rng.choice([1, 9, 300]),), generator=generator)
        for _ in range(3)
    ]
    return BestFirst(
        budget=rng.choice([None, 1, 2, 5, 33, 64, 200]),
        sources=sources,
        corpus=(
            Corpus.build(texts, VOCAB, progress=False)
            if "suffix" in sources and rng.random() < 0.5
            else None
        ),
        factors=(
            None
            if rng.random() < 0.5
            else 10 ** (4 * torch.rand(348, generator=generator).double() - 2)
        ),
        max_depth=rng.choice([0, 1, 5, 20, 64]),
        foresight=rng.choice([0.0, 0.05, 1.0]),
    )


def paper_decoder(model, attention, ids, mask) -> Decoder:
    drafter = TreeDrafter(DraftTree.paper())
    return Decoder(
        model,
        attention,
        ids,
        (mask == 0).sum(1),
        drafter,
        greedy,
        LogitsProcessorList(),
        40,
        ids[0, :0],
    )


def prompts(rng: random.Random, batch: int, padded: bool = True):
    """Left-padded prompts of 1 to 14 tokens, and their mask."""
    length = rng.randint(1, 14)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padded:
        for b in range(1, batch):
            mask[b, : rng.randrange(length)] = 0
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_decoding(family, seed):
    """Random trees and the paper's; batches of 1 to 4, ragged; end-of-text inside accepted paths;
    `max_new_tokens` cutting a path."""
    rng = random.Random(f"{family}{seed}")
    model = tiny_model(family, seed)
    # transformers' own eager attention in float64, which these two use, gives NaN at padding
    # (softmax in float32 of a row of least float64s); longrope switches its factors for a whole
    # batch.
    batch = 1 if family == "phi3-longrope" else 1 + seed % 4
    ids, mask = prompts(rng, batch, padded=family not in ("gemma2", "gemma3"))
    settings = dict(
        do_sample=False,
        max_new_tokens=rng.choice([1, 2, 7, 48]),
        eos_token_id=rng.choice([None, [2, 5], [3, 8, 11]]),
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    expected = model.generate(ids, attention_mask=mask, **settings).sequences
    named = rng.choice(["auto", "jacobi", "lookup", "suffix", "recycling", "lookahead", "none"])
    for draft in ("paper", random_tree(rng), RandomDrafter(rng), random_best_first(rng), named):
        out = generate(model, ids, attention_mask=mask, draft=draft, **settings)
        assert torch.equal(out.sequences, expected), draft
        for row, accepts in zip(out.sequences, out.accept_lengths):
            new = int(accepts.sum())
            assert accepts.min() >= 1 and new <= settings["max_new_tokens"]
            assert not row[ids.shape[1] + new :].any(), (
                "something other than padding behind the end"
            )


def test_every_tested_family_is_here():
    assert {tiny_model(family, 0).config.model_type for family in FAMILIES} == TESTED


def test_guesses_come_true_and_alias():
    """The comparison above would prove little if nothing were accepted, or no two paths agreed."""
    accepts, aliased = [], 0
    for seed in range(8):
        model = tiny_model("llama", seed)
        ids, mask = prompts(random.Random(seed), 2)
        decoder = paper_decoder(model, attention_for(model), ids, mask)
        gained = decoder.prefill()
        for _ in range(12):
            accepts += gained.status[0].tolist()
            decoder.advance(int((decoder._lengths - (mask.sum(1))).max()))
            proposed = decoder.drafter.propose(decoder._history, decoder._lengths).tokens
            children = [i for i, parent in enumerate(DraftTree.paper().parents) if parent == 0]
            aliased += sum(len(children) - len(set(row[children].tolist())) for row in proposed)
            gained = decoder.step()
    assert sum(accepts) / len(accepts) > 1.5 and max(accepts) >= 5
    assert aliased > 10


def test_random_drafters_try_what_they_are_for():
    """Accepted guesses, padding between live nodes, rows with different trees."""
    drafter = RandomDrafter(random.Random(0))
    model = tiny_model("llama", 3)
    ids, mask = prompts(random.Random(0), 3)
    generate(
        model,
        ids,
        attention_mask=mask,
        draft=drafter,
        do_sample=False,
        max_new_tokens=60,
        eos_token_id=None,
        pad_token_id=0,
    )
    trees = [
        verified.draft.parents for verified in drafter.seen if verified.draft.parents.dim() == 2
    ]
    assert max(int(verified.accept_length.max()) for verified in drafter.seen) >= 3
    assert sum(bool(((tree[:, 1:-1] < 0) & (tree[:, 2:] >= 0)).any()) for tree in trees) > 5
    assert sum(not torch.equal(tree[0], tree[1]) for tree in trees) > 5


@pytest.mark.parametrize(
    "family", ["llama", "qwen2-window", "gemma3", "mistral-window", "gpt2", "deepseek_v3"]
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dense_masks_equal_the_kernel(family, implementation):
    """The fallback for models that take no attention function of ours, tried on models that do."""
    model = tiny_model(family, 3)
    model.set_attn_implementation(implementation)
    ids, mask = prompts(random.Random(3), 3, padded=implementation == "sdpa")  # eager: see above
    results = []
    for attention in (KernelAttention(model), MaskAttention(model)):
        decoder = paper_decoder(model, attention, ids, mask)
        decoder.prefill()
        for _ in range(10):
            decoder.advance(int((decoder._lengths - mask.sum(1)).max()))
            decoder.step()
        results.append(decoder._history[:, : int(decoder._lengths.min())])
    common = min(result.shape[1] for result in results)
    assert common >= 11 and torch.equal(results[0][:, :common], results[1][:, :common])


@pytest.mark.parametrize("length", [3, 28, 35, 38, 39, 40, 41])
def test_longrope_switches_as_plain_decoding_does(length):
    """At 40 tokens the factors of all positions change, and the text is read anew."""
    model = tiny_model("phi3-longrope", length % 3)
    ids = torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))
    settings = dict(do_sample=False, max_new_tokens=60, eos_token_id=None)
    expected = model.generate(ids, **settings)
    for draft in (*DRAFTS, BestFirst(8, max_depth=0), BestFirst(16, max_depth=3), BestFirst(64)):
        assert torch.equal(generate(model, ids, draft=draft, **settings), expected), draft


def test_attention_implementation_is_restored():
    model = tiny_model("llama", 0)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        generate(model, torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=10)
        assert model.config._attn_implementation == implementation


# ---- sampling ------------------------------------------------------------------------------------

SAMPLING = [
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=5),
    dict(top_p=0.8, top_k=0),
    dict(min_p=0.1, top_k=0),
    dict(typical_p=0.9, top_k=0),
    dict(top_h=0.5, top_k=0),
]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_sampling_is_the_same_for_every_draft(family, settings):
    """The seed and the text settle every token; the draft only decides where it is looked for."""
    rng = random.Random(f"{family}{settings}")
    model = tiny_model(family, 1)
    ids, mask = prompts(rng, 3)
    outputs = []
    for draft in (
        *DRAFTS,
        random_tree(rng),
        random_tree(rng),
        RandomDrafter(rng),
        random_best_first(rng),
    ):
        torch.manual_seed(7)
        outputs.append(
            generate(
                model,
                ids,
                attention_mask=mask,
                draft=draft,
                do_sample=True,
                max_new_tokens=40,
                eos_token_id=[2],
                pad_token_id=0,
                return_dict_in_generate=True,
                **settings,
            )
        )
    assert all(torch.equal(out.sequences, outputs[0].sequences) for out in outputs)
    assert max(accepts.max() for out in outputs[1:] for accepts in out.accept_lengths) > 1
    torch.manual_seed(8)
    other = generate(
        model,
        ids,
        attention_mask=mask,
        do_sample=True,
        max_new_tokens=40,
        pad_token_id=0,
        **settings,
    )
    assert not torch.equal(
        other[:, : ids.shape[1] + 3], outputs[0].sequences[:, : ids.shape[1] + 3]
    )


@pytest.mark.parametrize("draft", ["none", "auto", "paper", "jacobi"])
def test_sampled_text_has_the_models_distribution(draft):
    """Chi-square of three-token continuations against their enumerated probabilities."""
    model = tiny_model("llama", 2)
    prompt = torch.tensor([[5, 9, 4]])
    temperature, top_k, rows = 0.9, 3, 3000

    def next_distribution(ids):
        logits = model(ids).logits[0, -1].float() / temperature
        kept = logits >= logits.topk(top_k).values[-1]
        return torch.where(kept, logits, -torch.inf).softmax(-1)

    expected = {(): 1.0}
    with torch.no_grad():
        for _ in range(3):
            expected = {
                (*text, token): probability * share
                for text, probability in expected.items()
                for token, share in enumerate(
                    next_distribution(
                        torch.cat([prompt, torch.tensor([text], dtype=torch.int64)], 1)
                    ).tolist()
                )
                if share > 0
            }
    torch.manual_seed(0)
    out = generate(
        model,
        prompt,
        draft=draft,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        max_new_tokens=3,
        num_return_sequences=rows,
        eos_token_id=None,
        pad_token_id=0,
    )
    counts: dict[tuple, int] = {}
    for row in out[:, 3:].tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert set(counts) <= set(expected), "a text of probability 0 was sampled"
    rare = [text for text, probability in expected.items() if probability * rows < 5]
    cells = [(counts.get(text, 0), p * rows) for text, p in expected.items() if text not in rare]
    if rare:
        cells.append((sum(counts.get(t, 0) for t in rare), sum(expected[t] for t in rare) * rows))
    cells = [(seen, wanted) for seen, wanted in cells if wanted > 0]
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    degrees = len(cells) - 1
    # Wilson-Hilferty: the cube root of chi-square / degrees is close to normal; 4 sigma.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert degrees > 5 and z < 4, f"chi-square {statistic:.1f} at {degrees} degrees of freedom"


# ---- the Hugging Face side -----------------------------------------------------------------------


def test_custom_generate_is_the_same():
    model = tiny_model("llama", 4)
    ids, mask = prompts(random.Random(4), 3)
    settings = dict(do_sample=False, max_new_tokens=30, pad_token_id=0, eos_token_id=[2])
    expected = model.generate(ids, attention_mask=mask, **settings)
    through_transformers = model.generate(
        ids, attention_mask=mask, custom_generate=msn_ext.generate, **settings
    )
    assert torch.equal(through_transformers, expected)
    assert torch.equal(generate(model, ids, attention_mask=mask, **settings), expected)
    chain = model.generate(
        ids, attention_mask=mask, custom_generate=msn_ext.generate, draft="jacobi", **settings
    )
    assert torch.equal(chain, expected)


@pytest.mark.parametrize("through_transformers", [False, True])
def test_narrow_whole_numbers(through_transformers):
    """int32 ids and ends of text, which tokenizers and users make."""
    model = tiny_model("llama", 3)
    ids = torch.tensor([[5, 9, 4, 7]], dtype=torch.int32)
    settings = dict(do_sample=False, max_new_tokens=30, pad_token_id=0)
    end = model.generate(ids, eos_token_id=None, **settings)[0, 13:14].int()
    for options in (dict(eos_token_id=end), dict(stopping_criteria=[EosTokenCriteria(end)])):
        expected = model.generate(ids, **settings, **options)
        way = dict(custom_generate=generate) if through_transformers else {}
        found = (
            model.generate(ids, **settings, **options, **way)
            if way
            else generate(model, ids, **settings, **options)
        )
        assert (
            torch.equal(found, expected) and found.dtype == expected.dtype and found.shape[1] < 34
        )


def test_greedy_takes_prefix_free_processors():
    model = tiny_model("llama", 5)
    ids = torch.tensor([[4, 5, 6]])
    settings = dict(
        do_sample=False,
        max_new_tokens=20,
        logits_processor=LogitsProcessorList([TemperatureLogitsWarper(0.5)]),
    )
    assert torch.equal(generate(model, ids, **settings), model.generate(ids, **settings))


LOOKING_BACK = {
    "repetition": dict(repetition_penalty=1.3),
    "repetition in the answer": dict(
        logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3, 9)])
    ),
    "no pair twice": dict(no_repeat_ngram_size=2),
    "not before": dict(min_new_tokens=9),
    "not below": dict(min_length=30),
    "bad words": dict(
        bad_words_ids=[
            [7],
            [11],
            *([a, b] for a in range(3, VOCAB) for b in range(3, VOCAB) if (a + b) % 3),
        ]
    ),
    "bias": dict(sequence_bias=[[[5], 3.0], [[6, 7], -3.0], [[4, 3], 4.0]]),
    "decay": dict(exponential_decay_length_penalty=(3, 1.2)),
    "forced end": dict(forced_eos_token_id=2),
    "begin": dict(begin_suppress_tokens=list(range(2, VOCAB, 2))),
    "several": dict(
        repetition_penalty=1.1, no_repeat_ngram_size=4, suppress_tokens=[4, 5], min_new_tokens=5
    ),
}


@pytest.mark.parametrize("settings", LOOKING_BACK)
def test_processors_see_the_text_before_every_node(settings):
    """Those that look at it give plain decoding's tokens, on ragged batches and random trees."""
    changed, longest = False, 0
    for seed in range(4):
        rng = random.Random(f"{settings}{seed}")
        model = tiny_model(rng.choice(["llama", "gpt2", "qwen2"]), seed)
        ids, mask = prompts(rng, 1 + seed)
        plain = dict(
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=[2, 3] if seed % 2 else [2],
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        options = plain | LOOKING_BACK[settings]
        expected = model.generate(ids, attention_mask=mask, **options).sequences
        for draft in (
            "auto",
            "paper",
            "recycling",
            random_tree(rng),
            RandomDrafter(rng),
            random_best_first(rng),
        ):
            out = generate(model, ids, attention_mask=mask, draft=draft, **options)
            assert torch.equal(out.sequences, expected), draft
            longest = max(longest, *(int(accepts.max()) for accepts in out.accept_lengths))
        changed |= not torch.equal(
            model.generate(ids, attention_mask=mask, **plain).sequences, expected
        )
    assert changed and longest > 1, "settings that matter, and guesses that come true beside them"


def test_masked_tokens_are_penalised_too():
    """transformers' processor sees what a mask hides, whichever tokens they are; newer ones, made
    for a batch, leave it out.
    """
    changed = False
    for seed in range(6):
        model = tiny_model("llama", seed)
        ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, :6] = mask[1, :2] = 0
        settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
        texts = [model.generate(ids, attention_mask=mask, **settings)]
        for penalty in (
            dict(logits_processor=[RepetitionPenaltyLogitsProcessor(3.0)]),
            dict(repetition_penalty=3.0),
        ):
            texts.append(model.generate(ids, attention_mask=mask, **penalty, **settings))
            assert torch.equal(
                generate(model, ids, attention_mask=mask, **penalty, **settings), texts[-1]
            )
        changed |= not torch.equal(texts[0], texts[1])
    assert changed


@pytest.mark.parametrize("nodes", [1, 64, 65, 200])
def test_a_nodes_text_has_the_same_tokens_however_it_is_asked_for(nodes):
    rng = random.Random(nodes)
    ids, mask = prompts(rng, 3)
    ids = torch.where(
        mask == 0, torch.randint(3, VOCAB - 1, ids.shape), ids
    )  # masked tokens may be any
    offsets = (mask == 0).sum(1)
    history = torch.full((3, 30), VOCAB - 1)  # rubbish behind the text
    for b, offset in enumerate(offsets.tolist()):
        history[b, : ids.shape[1] - offset] = ids[b, offset:]
    parents = torch.tensor(
        [[-1] + [rng.randrange(-1, i) for i in range(1, nodes)] for _ in range(3)],
        dtype=torch.int32,
    )
    draft = Draft.of(torch.randint(VOCAB - 1, (3, nodes)), parents)
    draft.tokens[:, 0] = ids[:, -1]
    texts = Texts(draft, history, mask.sum(1), ids, offsets)
    before = texts.before(VOCAB)
    chunks = [texts.seen(before, slice(begin, begin + 64)) for begin in range(0, 3 * nodes, 64)]
    found = [row.nonzero()[:, 0].tolist() for row in torch.cat(chunks)]
    named = 0
    for row, places, text in texts.by_depth():
        for place, tokens in zip(places.tolist(), text.tolist()):
            assert (
                row == place // nodes
                and tokens[: ids.shape[1]] == ids[row].tolist()
                and found[place] == sorted(set(tokens))
            )
            named += 1
    assert named == int((draft.depth >= 0).sum())


@pytest.mark.parametrize("settings", ["repetition", "no pair twice", "several"])
def test_sampling_looks_back_the_same_for_every_draft(settings):
    rng = random.Random(settings)
    model = tiny_model("llama", 1)
    ids, mask = prompts(rng, 3)
    options = dict(
        do_sample=True,
        temperature=0.7,
        max_new_tokens=40,
        eos_token_id=[2],
        pad_token_id=0,
        **LOOKING_BACK[settings],
    )
    outputs = []
    for draft in (*DRAFTS, random_tree(rng), RandomDrafter(rng), random_best_first(rng)):
        torch.manual_seed(7)
        outputs.append(generate(model, ids, attention_mask=mask, draft=draft, **options))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_num_return_sequences():
    model = tiny_model("llama", 6)
    torch.manual_seed(0)
    out = generate(
        model,
        torch.tensor([[4, 5]]),
        do_sample=True,
        num_return_sequences=4,
        max_new_tokens=12,
        eos_token_id=None,
    )
    assert out.shape == (4, 14) and len({tuple(row) for row in out.tolist()}) == 4


def test_max_time_stops():
    model = tiny_model("llama", 6)
    out = generate(
        model,
        torch.tensor([[4, 5]]),
        max_new_tokens=400,
        max_time=0.0,
        eos_token_id=None,
        do_sample=False,
    )
    assert out.shape[1] == 3, "the first token is past the deadline already"


def test_custom_stopping_criterion_inside_an_accepted_path():
    """Asked after every token, as plain decoding asks: nothing behind the stop is kept."""
    model = tiny_model("llama", 2)
    ids = torch.tensor([[5, 9, 4, 7]])

    def at_13(input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 13)

    expected = model.generate(
        ids, do_sample=False, max_new_tokens=60, stopping_criteria=[at_13], eos_token_id=None
    )
    out = generate(
        model, ids, do_sample=False, max_new_tokens=60, stopping_criteria=[at_13], eos_token_id=None
    )
    assert torch.equal(out, expected) and out.shape[1] == 13


def test_a_maximum_of_the_users_takes_the_place_of_the_settings():
    model, ids = tiny_model("llama", 2), torch.tensor([[5, 9, 4, 7]])
    for most in (6, 50):
        settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=None)
        expected = model.generate(ids, stopping_criteria=[MaxLengthCriteria(most)], **settings)
        assert expected.shape[1] == most
        assert torch.equal(
            generate(model, ids, stopping_criteria=[MaxLengthCriteria(most)], **settings), expected
        )


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_a_criterion_ends(seed, end):
    """With an end of text they are padded; without one they go on until the last row has ended, as
    in plain decoding.
    """
    rng = random.Random(seed)
    model = tiny_model("llama", seed)
    ids, mask = prompts(rng, 3)
    settings = dict(
        do_sample=False,
        max_new_tokens=50,
        eos_token_id=end,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    free = model.generate(ids, attention_mask=mask, **settings).sequences
    stops = [int(row[ids.shape[1] + at]) for row, at in zip(free, (3, 9, 20))]

    def meets(input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], torch.tensor(stops[: 1 + seed % 3]))

    expected = model.generate(
        ids, attention_mask=mask, stopping_criteria=[meets], **settings
    ).sequences
    for draft in ("auto", "paper", random_tree(rng), RandomDrafter(rng)):
        out = generate(
            model, ids, attention_mask=mask, draft=draft, stopping_criteria=[meets], **settings
        )
        assert torch.equal(out.sequences, expected)
        lengths = [int(accepts.sum()) for accepts in out.accept_lengths]
        assert max(lengths) == expected.shape[1] - ids.shape[1] and (end or len(set(lengths)) == 1)


def test_stop_strings_as_in_plain_decoding():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.BPE({chr(ord("a") + i): i for i in range(VOCAB)}, merges=[]))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    model = tiny_model("llama", 2)
    ids = torch.tensor([[5, 9, 4, 7]])
    settings = dict(do_sample=False, max_new_tokens=60, eos_token_id=None, tokenizer=tokenizer)
    free = tokenizer.convert_ids_to_tokens(generate(model, ids, **settings)[0, 4:])
    for at in (3, 11, 20):  # somewhere in the text, in the middle of accepted paths
        expected = model.generate(ids, stop_strings=free[at], **settings)
        assert torch.equal(generate(model, ids, stop_strings=free[at], **settings), expected)
        assert expected.shape[1] <= 4 + at + 1
        model.generation_config.stop_strings = [free[at]]
        given = GenerationConfig(
            **{key: value for key, value in settings.items() if key != "tokenizer"}
        )
        assert torch.equal(generate(model, ids, **settings), expected)
        assert torch.equal(
            generate(model, ids, generation_config=given, tokenizer=tokenizer), expected
        )
        for nothing in (None, []):
            assert (
                generate(model, ids, stop_strings=nothing, **settings).shape[1] > expected.shape[1]
            )
        model.generation_config.stop_strings = ["never"]
        given.stop_strings = [free[at]]
        assert torch.equal(
            generate(model, ids, generation_config=given, tokenizer=tokenizer), expected
        )
        assert given.stop_strings == [free[at]], "the user's own is left alone"
        model.generation_config.stop_strings = None


class Recorder:
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("through_transformers", [False, True, "partial"])
def test_streamer_gets_the_prompt_and_every_pass(through_transformers):
    import functools

    model, streamer = tiny_model("llama", 2), Recorder()
    ids = torch.tensor([[5, 9, 4, 7]])
    settings = dict(
        do_sample=False, max_new_tokens=30, eos_token_id=None, return_dict_in_generate=True
    )
    if through_transformers == "partial":
        out = model.generate(
            ids, custom_generate=functools.partial(generate, streamer=streamer), **settings
        )
    elif through_transformers:
        out = model.generate(ids, custom_generate=generate, streamer=streamer, **settings)
    else:
        out = generate(model, ids, streamer=streamer, **settings)
    assert torch.equal(streamer.puts[0], ids) and streamer.ended == 1
    assert [len(value) for value in streamer.puts[1:]] == out.accept_lengths[0].tolist()
    assert torch.cat(streamer.puts[1:]).tolist() == out.sequences[0, 4:].tolist()


def test_streamer_ends_when_decoding_fails():
    class Failing(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.puts) == 3:
                raise RuntimeError("reader went away")

    streamer = Failing()
    with pytest.raises(RuntimeError, match="reader went away"):
        generate(
            tiny_model("llama", 2),
            torch.tensor([[5]]),
            streamer=streamer,
            max_new_tokens=30,
            eos_token_id=None,
            do_sample=False,
        )
    assert streamer.ended == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen3"])
def test_autocast(family):
    """Trees attend under autocast as everything else does: tokens are the best ones within
    rounding.
    """
    model = tiny_model(family, 3, torch.float32)
    ids = torch.tensor([[5, 9, 4, 7]])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        out = generate(
            model, ids, draft="paper", do_sample=False, max_new_tokens=40, eos_token_id=None
        )
        logits = model(out[:, :-1]).logits[0, 3:].float()
    chosen = logits.gather(1, out[0, 4:, None]).squeeze(1)
    assert out.shape[1] == 44 and (logits.max(1).values - chosen).max() <= 0.05 * logits.abs().max()


@pytest.mark.parametrize(
    "draft",
    [*DRAFTS, lambda: BestFirst(16), lambda: TreeDrafter(DraftTree.paper()), TokenRecycling],
)
def test_inference_mode(draft):
    """Inside and outside of it, with one drafter, and with a model that was made in it."""
    draft = draft if isinstance(draft, str) else draft()
    settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=None)
    with torch.inference_mode():
        made_inside, inside = tiny_model("llama", 2), torch.tensor([[5, 9, 4, 7]])
        expected = made_inside.generate(inside, **settings)
    for model in (made_inside, tiny_model("llama", 2)):
        with torch.inference_mode():
            assert torch.equal(
                generate(
                    model, inside, attention_mask=torch.ones_like(inside), draft=draft, **settings
                ),
                expected,
            )
        for ids in (inside, inside.clone()):
            assert torch.equal(generate(model, ids, draft=draft, **settings), expected)


def test_inference_mode_and_buffers_that_change():
    with torch.inference_mode():
        model, ids = tiny_model("phi3-longrope", 2), torch.tensor([[5, 9, 4, 7]])
        expected = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=None)
        assert torch.equal(
            generate(model, ids, do_sample=False, max_new_tokens=20, eos_token_id=None), expected
        )
    assert torch.equal(
        generate(model, ids, do_sample=False, max_new_tokens=20, eos_token_id=None), expected
    )


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_default_device_is_left_out(draft):
    """What the host needs is on the host, wherever else tensors are made."""
    model, ids = tiny_model("llama", 2), torch.tensor([[5, 9, 4, 7]])
    settings = dict(do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **settings)
    DraftTree.tensors.cache_clear()
    torch.set_default_device("meta")
    try:
        found = generate(model, ids, draft=draft, **settings)
        generate(model, ids, draft=draft, **(settings | dict(do_sample=True)))
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_two_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_model("llama", 3)
    inputs = [torch.tensor([[3 + i, 9, 4, 7 + i]]) for i in range(6)]
    settings = dict(do_sample=False, max_new_tokens=40, eos_token_id=None)
    expected = [model.generate(ids, **settings) for ids in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: generate(model, ids, **settings), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert model.config._attn_implementation == "sdpa"


def test_nan_logits_follow_torch():
    """Greedy: the arg-max of NaN is torch's, as in plain decoding. Sampling: an error, no token."""
    model = tiny_model("llama", 3)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    ids = torch.tensor([[4, 5, 6]])
    settings = dict(max_new_tokens=8, eos_token_id=None)
    assert torch.equal(
        generate(model, ids, do_sample=False, **settings),
        model.generate(ids, do_sample=False, **settings),
    )
    with pytest.raises(ValueError, match="NaN"):
        generate(model, ids, do_sample=True, **settings)


def test_half_precision_tokens_are_arg_max_to_within_rounding():
    """bfloat16: every token is within rounding of the best one, given the text before it."""
    model = tiny_model("qwen3", 1, torch.bfloat16)
    ids = torch.randint(3, VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
    out = generate(model, ids, do_sample=False, max_new_tokens=60, eos_token_id=None)
    with torch.no_grad():
        logits = model(out[:, :-1]).logits[0, 7:].float()
    chosen = logits.gather(1, out[0, 8:, None]).squeeze(1)
    assert (logits.max(1).values - chosen).max() <= 0.05 * logits.abs().max()

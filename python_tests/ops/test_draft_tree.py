"""draft_tree against its specification and the oracle."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers import oracle
from helpers.cases import (
    EXTREMES,
    assert_equal,
    integers,
    seeded,
    specified,
    tree_tensor,
)
from helpers.knowledge import (
    FACTORS,
    Known,
    Pass,
    corpus_of,
    empty_adjacency,
    empty_suffixes,
    guess,
    histories,
    knowledge,
    only,
)
from msn_ext import ops
from msn_ext.ops import reference

FORESIGHT = [0.0, 0.05, 0.5, 1.0]


@given(
    known=knowledge(),
    nodes=st.integers(1, 20),
    max_depth=st.sampled_from([0, 1, 2, 5, 256]),
    foresight=st.sampled_from(FORESIGHT),
)
def test_drafts_of_random_knowledge(device, known, nodes, max_depth, foresight):
    known.check(nodes, max_depth, foresight, device)


@pytest.mark.parametrize("corpus_texts", [0, 3])
@pytest.mark.parametrize("factors", ["random", "few"])
@pytest.mark.parametrize("seed", range(8))
def test_drafts_of_much_knowledge(device, seed, factors, corpus_texts):
    """Whole texts, so that every list has its say, by the oracle too."""
    options = {
        "suffix_slots": 1 << 20,
        "corpus_texts": corpus_texts,
        "factors": factors,
        "seed": seed,
    }
    known = Known(1, 2 + seed, longest=80, depths=4, passes=4, **options)
    assert known.is_told_apart(known.arguments(device))
    known.check(30, 6, 0.05 * (seed % 2), device)


@pytest.mark.parametrize("places", [1, 2, 3, 4, 8])
def test_every_ngram_may_have_a_follower_of_its_own(device, places):
    """The end of the text stood there before: its last 16 tokens, its last 12, ..., each before
    another token.
    """
    end = list(range(16))
    known = Known(1, 30, depths=0, passes=2, suffix_slots=1 << 16)
    sizes = oracle.NGRAMS[-places:]
    known.texts = [
        [t for size in reversed(sizes) for t in (99, *end[-size:], 2**40 + size)] + [99, *end]
    ]
    arguments = known.arguments(device)
    assert known.is_told_apart(arguments)
    known.check(places + 2, 1, 0.0, device)
    tokens, _, _, sources = ops.draft_tree(**arguments, nodes=60, max_depth=1, foresight=0.0)
    assert sorted(tokens[sources == 4].tolist()) == [2**40 + size for size in sizes]


@pytest.mark.parametrize("of_text", [*range(9)])
def test_the_corpus_is_asked_for_the_ngrams_that_the_text_does_not_have(device, of_text):
    """The text has the shorter n-grams of its end, the corpus all of them: each answers for its
    own.
    """
    end, short = list(range(16)), oracle.NGRAMS[:of_text]
    known = Known(1, 30, depths=0, passes=0, suffix_slots=1 << 16)
    known.texts = [[t for size in reversed(short) for t in (99, *end[-size:], 100 + size)] + end]
    known.corpus = [[98, *end[-size:], 200 + size] for size in reversed(oracle.NGRAMS)]
    arguments = known.arguments(device)
    assert known.is_told_apart(arguments)
    known.check(10, 1, 0.0, device)
    tokens, _, _, sources = ops.draft_tree(**arguments, nodes=60, max_depth=1, foresight=0.0)
    expected = [100 + size if size in short else 200 + size for size in oracle.NGRAMS]
    assert sorted(tokens[sources == 4].tolist()) == sorted(expected)
    for name in (
        "corpus",
        "corpus_suffixes",
    ):  # negative control: without either there are only the text's
        tokens, _, _, sources = ops.draft_tree(
            **{**arguments, name: arguments[name][..., :0]}, nodes=60, max_depth=1, foresight=0.0
        )
        assert sorted(tokens[sources == 4].tolist()) == [100 + size for size in short]


def test_texts_of_a_corpus_do_not_continue_each_other(device):
    """Neither is the next one's beginning after the end of one, nor is what stands between them a
    guess or a match.
    """
    known = Known(1, depths=0, slots=0, suffix_slots=64, passes=0)
    for text, corpus, expected in [
        ([1, 2, 3], [[9, 1, 2, 3], [4, 5]], set()),
        ([1, 2, 3], [[1, 2, 3, 8], [9, 1, 2, 3], [4, 5]], {8}),
        ([5, 1, -1, 2], [[1], [2, 7]], {7}),  # 7 after the 2, not after 1 -1 2
    ]:
        known.texts, known.corpus = [text], corpus
        arguments = {**known.arguments(device), "nodes": 60, "max_depth": 1, "foresight": 0.0}
        got = ops.draft_tree(**arguments)
        assert_equal(got, specified("draft_tree", **arguments))
        assert set(got[0][got[3] > 0].tolist()) == expected
    # Slots that lead to what stands between two texts, or to an n-gram with it inside.
    arguments["factors"] = torch.arange(1.0, FACTORS + 1, dtype=torch.float64, device=device)
    before = ops.draft_tree(**arguments)
    for level, ngram, end in [(0, (2,), 1), (1, (-1, 2), 3), (2, (1, -1, 2), 3)]:
        arguments["corpus_suffixes"][level, oracle.hashed(ngram) % 64] = end
        got = ops.draft_tree(**arguments)
        assert_equal(got, specified("draft_tree", **arguments))
        if level:
            assert_equal(got, before)
        else:
            assert not (got[3] > 0).any()
            arguments["corpus_suffixes"][0, oracle.hashed((2,)) % 64] = 3


@given(known=knowledge(), foresight=st.sampled_from(FORESIGHT))
def test_without_a_corpus_a_draft_is_what_it_was(device, known, foresight):
    """No tokens, no slots, or only gaps: bit for bit the same."""
    options = {"nodes": 30, "max_depth": 5, "foresight": foresight}
    known = dataclasses.replace(known, corpus_texts=0)
    arguments = known.arguments(device)
    assert arguments["corpus"].numel() == 0
    expected = ops.draft_tree(**arguments, **options)
    tokens, suffixes = corpus_of([text * 2 for text in known.texts] or [[1]], 64, device)
    for corpus, corpus_suffixes in [
        (tokens[:0], suffixes),
        (tokens, suffixes[:, :0]),
        (tokens * 0 - 1, suffixes),
        (tokens, suffixes * 0),
    ]:
        assert_equal(
            ops.draft_tree(
                **{**arguments, "corpus": corpus, "corpus_suffixes": corpus_suffixes}, **options
            ),
            expected,
        )


@pytest.mark.parametrize("foresight", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("nodes", [1, 2, 63, 64, 65, 255, 256])
def test_drafts_of_every_size(device, nodes, foresight):
    Known(batch=3, vocabulary=3).check(nodes, 256, foresight, device, by_oracle=False)


@pytest.mark.parametrize("factors", ["random", "ones", "extreme"])
def test_drafts_of_many_guesses(device, factors):
    """More than a thousand candidates wait for their turn."""
    known = Known(1, vocabulary=60, longest=500, depths=8, passes=30, factors=factors)
    known.check(100, 8, 0.05, device, by_oracle=False)


@pytest.mark.parametrize("factors", ["random", "ones", "extreme"])
@pytest.mark.parametrize(
    "depths, slots, suffix_slots", [*itertools.product([0, 3], [0, 1 << 14], [0, 1 << 13])]
)
@pytest.mark.parametrize("foresight", [0.0, 0.05])
def test_drafts_of_some_sources(device, depths, slots, suffix_slots, factors, foresight):
    known = Known(3, 4, depths=depths, slots=slots, suffix_slots=suffix_slots, factors=factors)
    known.check(16, 4, foresight, device)
    arguments = known.arguments(device)
    assert known.is_told_apart(arguments)
    sources = ops.draft_tree(**arguments, nodes=64, max_depth=4, foresight=foresight)[3]
    expected = (depths > 0) + 2 * (slots > 0) + 4 * (suffix_slots > 0)
    assert sum(bit for bit in (1, 2, 4) if (sources & bit).any()) == expected
    assert bool((sources == 8).any()) <= (foresight > 0) and not (sources > 8).any()


def test_a_draft_of_nothing_is_the_root_and_with_foresight_noise_after_it(device):
    """Noise has no probability, so there is none after noise."""
    known = Known(3, depths=0, slots=0, suffix_slots=0)
    arguments = {**known.arguments(device), "nodes": 4, "max_depth": 9}
    last = [text[-1] for text in known.texts]
    tokens, parents, probability, sources = ops.draft_tree(**arguments, foresight=0.0)
    assert tokens.tolist() == [[token] * 4 for token in last]
    assert parents.tolist() == [[-1] * 4] * 3 and sources.tolist() == [[0] * 4] * 3
    assert probability.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 3
    tokens, parents, probability, sources = ops.draft_tree(**arguments, foresight=1e-300)
    noise = [text[oracle.noise_index(0, 0, len(text), 1, 0)] for text in known.texts]
    assert tokens.tolist() == [[end, token, end, end] for end, token in zip(last, noise)]
    assert parents.tolist() == [[-1, 0, -1, -1]] * 3 and sources.tolist() == [[0, 8, 0, 0]] * 3
    assert probability.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 3


def test_a_draft_in_numbers(device):
    """Two guesses after the root, 0.6 and 0.3, and one with 0.5 after either."""
    factors = torch.ones(FACTORS, dtype=torch.float64)
    factors[36:60].view(2, 12)[:, 1:3] = torch.tensor(
        [6.0, 3.0]
    )  # denoised, depth 0, levels 1 and 2
    denoised = [[only(guess(1, 1), guess(2, 2)), only(guess(7))]]
    arguments = {
        "history": integers([[5]], device),
        "lengths": integers([1], device),
        "denoised": tree_tensor(denoised, device),
        "adjacency": empty_adjacency(0, device),
        "habits": empty_adjacency(0, device),
        "suffixes": empty_suffixes(1, 0, device),
        **dict(zip(("corpus", "corpus_suffixes"), corpus_of([], 0, device))),
        "factors": factors.to(device),
    }

    def draft(**options):
        return [x[0].tolist() for x in ops.draft_tree(**arguments, **options)]

    tokens, parents, probability, sources = draft(nodes=6, max_depth=9, foresight=0.0)
    assert tokens == [5, 1, 2, 7, 7, 5] and parents == [
        -1,
        0,
        0,
        1,
        2,
        -1,
    ]  # of equals, the one after the root
    assert probability == pytest.approx([1, 0.6, 0.3, 0.3, 0.15, 0]) and sources == [
        0,
        1,
        1,
        1,
        1,
        0,
    ]
    tokens, parents, probability, _ = draft(nodes=5, max_depth=2, foresight=0.2)
    assert tokens == [5, 1, 7, 2, 7] and parents == [-1, 0, 1, 0, 3]  # 7 is worth 0.3 + 0.2 * 0.6
    assert probability == pytest.approx([1, 0.6, 0.3, 0.3, 0.15])
    tokens, parents, probability, sources = draft(nodes=7, max_depth=9, foresight=1.0)
    assert tokens == [5, 1, 7, 2, 7, 5, 5] and parents == [
        -1,
        0,
        1,
        0,
        3,
        2,
        4,
    ]  # noise: 5 is all the text
    assert probability == pytest.approx([1, 0.6, 0.3, 0.3, 0.15, 0, 0]) and sources == [
        0,
        1,
        1,
        1,
        1,
        8,
        8,
    ]


def worked_example(device: str) -> dict:
    """After 1 2 3 1 2: 8, denoised and remembered after the 2, and 3, remembered and after the
    earlier 1 2.
    """
    factors = torch.ones(FACTORS, dtype=torch.float64)
    bias, denoised, remembered, suffix = factors.split([36, 72, 144, 96])
    bias.view(4, 9)[1, 2] = 2
    denoised.view(3, 2, 12)[0, 1, 11] = 3
    remembered.view(3, 4, 12)[0, 1, :5:4] = torch.tensor([5.0, 7.0])
    suffix.view(8, 3, 4)[1, 0, 1] = 11
    adjacency, suffixes = empty_adjacency(64, device), empty_suffixes(1, 64, device)
    observed = Pass([[2]], [[2]], [[-1]], [[0]], [[only(guess(3, 4), guess(8, 0))]])
    ops.remember_guesses(adjacency, **observed.arguments(device))
    history, lengths = histories([[1, 2, 3, 1, 2]], device)
    ops.index_suffixes(suffixes, history, lengths * 0, lengths)
    return {
        "history": history,
        "lengths": lengths,
        "denoised": tree_tensor([[only(guess(8, 11)), only(guess(6, 5))]], device),
        "adjacency": adjacency,
        "habits": empty_adjacency(0, device),
        "suffixes": suffixes,
        **dict(
            zip(
                ("corpus", "corpus_suffixes"), corpus_of([[7, 2, 1], [5, 1, 2, 4, 4]], 1024, device)
            )
        ),
        "factors": factors.to(device),
        "nodes": 4,
        "max_depth": 1,
        "foresight": 0.0,
    }


def test_scores_are_the_products_of_the_factors(device):
    tokens, parents, probability, sources = (
        x[0].tolist() for x in ops.draft_tree(**worked_example(device))
    )
    scores = {3: 2 * 7 * 11, 8: 2 * 3 * 5}
    assert tokens == [2, 3, 8, 2] and parents == [-1, 0, 0, -1] and sources == [0, 2 + 4, 1 + 2, 0]
    assert probability == pytest.approx(
        [1, *(score / (1 + sum(scores.values())) for score in scores.values()), 0]
    )


def test_a_draft_would_notice_a_changed_factor(device):
    """Negative control: exactly the five factors of the example count."""
    arguments = worked_example(device)
    before = ops.draft_tree(**arguments)[2]
    used = [0 + 1 * 9 + 2, 36 + 12 + 11, 108 + 12, 108 + 12 + 4, 252 + 12 + 1]
    for i in range(FACTORS):
        factors = arguments["factors"].clone()
        factors[i] *= 1.01
        after = ops.draft_tree(**{**arguments, "factors": factors})[2]
        assert torch.equal(after, before) == (i not in used), i


def test_habits_count_where_nothing_is_remembered(device):
    """After 1 2 something is remembered of the 2, and nothing of both."""
    arguments = worked_example(device)
    before = ops.draft_tree(**arguments)
    for context, counts in (([2], False), ([1, 2], True)):
        habit = Pass([context], [context[-1:]], [[-1]], [[0]], [[only(guess(9, 11))]])
        habits = empty_adjacency(64, device)
        ops.remember_guesses(habits, **habit.arguments(device))
        after = ops.draft_tree(**{**arguments, "habits": habits})
        assert counts != all(map(torch.equal, before, after))
        assert counts == (9 in after[0][0].tolist())


def test_a_draft_would_notice_a_changed_entry(device):
    """Negative control: what is known after the root counts, what is known elsewhere does not."""
    arguments = worked_example(device)
    slot = oracle.hashed((2,)) % 64
    place = oracle.hashed((1, 2)) % 64
    before = ops.draft_tree(**arguments)

    def changes(name: str, at, value) -> bool:
        changed = arguments[name].clone()
        changed[at] = value
        return any(
            not torch.equal(x, y)
            for x, y in zip(before, ops.draft_tree(**{**arguments, name: changed}))
        )

    assert changes("adjacency", (0, slot, 0), 1)  # another context has the slot
    assert changes("adjacency", (0, slot, 1), guess(4, 4)) and changes(
        "adjacency", (0, slot, 2), guess(8, 4)
    )
    assert changes("adjacency", (0, slot, 8), guess(4)) and not changes(
        "adjacency", (0, slot, 8), -77
    )
    assert not changes("adjacency", (0, (slot + 1) % 64), 77) and not changes(
        "adjacency", (slice(1, 3),), 77
    )
    assert changes("suffixes", (0, 1, place), 0) and not changes("suffixes", (0, 7), 3)
    for wrong in (1, 3, 4, 5, 6, -1, *EXTREMES):  # not the n-gram, or outside the text
        assert changes("suffixes", (0, 1, place), wrong)
    assert changes("denoised", (0, 0, 0), -1) and changes("denoised", (0, 0, 1), guess(8, 11))
    assert not changes("denoised", (0, 1), guess(8, 11))  # past max_depth
    assert (
        changes("history", (0, 2), 4)
        and changes("history", (0, 0), 4)
        and changes("history", (0, 1), 4)
    )
    assert changes("history", (0, 3), 4) and changes("history", (0, 4), 4)
    assert not changes("history", (0, slice(5, None)), 4)

    arguments["factors"] = torch.arange(1.0, FACTORS + 1, dtype=torch.float64, device=device)
    arguments["history"] = integers(
        [[6, 7, 5, 1, 2]], device
    )  # whose end is in the corpus only, before a 4
    before = ops.draft_tree(**arguments)
    ends = {size: oracle.hashed((5, 1, 2)[3 - size :]) % 1024 for size in (1, 2, 3)}
    assert all(arguments["corpus_suffixes"][size - 1, slot] == 7 for size, slot in ends.items())
    assert (
        changes("corpus", 7, 3) and changes("corpus", 6, 9) and changes("corpus", slice(None), -1)
    )
    assert changes("corpus", 4, 9) and changes(
        "corpus", 5, 9
    )  # a shorter n-gram weighs something else
    assert not changes("corpus", 8, 9) and not changes("corpus", slice(0, 4), 3)
    for wrong in (0, 1, 3, 5, 6, 9, -1, *EXTREMES):
        assert changes("corpus_suffixes", (2, ends[3]), wrong)
    assert not changes("corpus_suffixes", 7, 7)


@given(known=knowledge(), foresight=st.sampled_from(FORESIGHT), junk=st.integers(0, 999))
def test_drafts_survive_any_tables(device, known, foresight, junk):
    """Junk in every table is taken for what the specification takes it for, levels and tokens out
    of range included.
    """
    known = dataclasses.replace(
        known, slots=min(known.slots, 64), suffix_slots=min(known.suffix_slots, 64)
    )
    arguments = {**known.arguments(device), "nodes": 12, "max_depth": 4, "foresight": foresight}
    source = seeded(junk)

    def chance(table: torch.Tensor) -> torch.Tensor:
        return torch.rand(table.shape, generator=source).to(device)

    tables = (
        arguments["denoised"],
        arguments["adjacency"][..., 1:],
        arguments["habits"][..., 1:],
        arguments["suffixes"],
    )  # no context is forgotten
    for table in (*tables, arguments["corpus"], arguments["corpus_suffixes"]):
        noise = torch.randint(-(2**31), 2**31, table.shape, generator=source).int().to(device)
        noise = torch.where(chance(table) < 0.5, noise, noise % 50)
        table.copy_(torch.where(chance(table) < 0.3, table, noise))
    assert_equal(ops.draft_tree(**arguments), specified("draft_tree", **arguments))


@given(
    known=knowledge(), max_depth=st.sampled_from([1, 3, 9]), foresight=st.sampled_from(FORESIGHT)
)
def test_fewer_nodes_are_the_first_of_more(device, known, max_depth, foresight):
    arguments = {**known.arguments(device), "max_depth": max_depth, "foresight": foresight}
    most = ops.draft_tree(**arguments, nodes=256)
    for nodes in (1, 2, 3, 17, 64, 100, 255):
        assert_equal(
            ops.draft_tree(**arguments, nodes=nodes), tuple(x[:, :nodes].contiguous() for x in most)
        )


@given(
    known=knowledge(), max_depth=st.sampled_from([0, 1, 3, 9]), foresight=st.sampled_from(FORESIGHT)
)
def test_a_draft_is_a_tree_of_shrinking_probability(device, known, max_depth, foresight):
    arguments = known.arguments(device)
    draft = ops.draft_tree(**arguments, nodes=100, max_depth=max_depth, foresight=foresight)
    _, depth = ops.tree_ancestors(draft[1])
    for text, tokens, parents, p, sources, depths in zip(
        known.texts, *(x.tolist() for x in (*draft, depth))
    ):
        live = sum(d >= 0 for d in depths)
        assert max(depths) <= max_depth and min(depths[:live]) == 0
        assert (tokens[0], parents[0], p[0], sources[0]) == (text[-1], -1, 1.0, 0)
        assert list(zip(tokens, parents, p, sources))[live:] == [(text[-1], -1, 0.0, 0)] * (
            100 - live
        )
        for node in range(live):
            children = [i for i in range(node + 1, live) if parents[i] == node]
            assert len({tokens[i] for i in children}) == len(children)
            assert all(p[i] <= 0.99 * p[node] for i in children)
            assert sum(p[i] for i in children) <= p[node] * (1 + 1e-12)
            if known.factors != "extreme" and p[node] > 0:
                assert sum(p[i] for i in children) < p[node]
        assert all(
            1 <= s <= 7 or (s == 8 and q == 0 and foresight > 0)
            for s, q in zip(sources[1:live], p[1:live])
        )
        if foresight == 0:
            assert p == sorted(p, reverse=True) and min(p[:live]) > 0


@given(known=knowledge(), max_depth=st.sampled_from([3, 256]), foresight=st.sampled_from(FORESIGHT))
def test_the_draft_of_a_row_ignores_the_others_bit_for_bit(device, known, max_depth, foresight):
    """Nor does it matter what lies past the text or deeper than the tree, or how the arguments
    are strided.
    """
    arguments = {
        **known.arguments(device),
        "nodes": 30,
        "max_depth": max_depth,
        "foresight": foresight,
    }
    together = ops.draft_tree(**arguments)
    per_row = ("history", "lengths", "denoised", "suffixes")
    for b in range(known.batch):
        alone = ops.draft_tree(
            **{**arguments, **{name: arguments[name][b : b + 1] for name in per_row}}
        )
        assert_equal(alone, tuple(x[b : b + 1] for x in together))
    past = (
        torch.arange(arguments["history"].shape[1], device=device) >= arguments["lengths"][:, None]
    )
    arguments["history"].masked_fill_(past, -(2**63))
    arguments["denoised"][:, max_depth:] = guess(1, 11)
    for name in ("history", "denoised", "adjacency", "habits", "suffixes", "corpus_suffixes"):
        arguments[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("corpus", "factors"):
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    assert_equal(ops.draft_tree(**arguments), together)


def test_rows_may_have_factors_of_their_own(device):
    known = Known(3, 4)
    arguments = known.arguments(device) | {"nodes": 30, "max_depth": 6, "foresight": 0.05}
    random = torch.rand(known.batch, FACTORS, dtype=torch.float64, generator=seeded(3)) + 0.1
    factors = random.to(device)
    together = ops.draft_tree(**arguments | {"factors": factors})
    drafts = [ops.draft_tree(**arguments | {"factors": of_row}) for of_row in factors]
    for b, alone in enumerate(drafts):
        assert_equal(tuple(x[b] for x in alone), tuple(x[b] for x in together))
    assert any(not torch.equal(alone[2], together[2]) for alone in drafts)
    of_specification = reference.draft_tree(**arguments | {"factors": factors})
    assert_equal(tuple(x.cpu() for x in together), tuple(x.cpu() for x in of_specification))
    with pytest.raises(ValueError, match=r"factors has shape \[2, 348\]"):
        ops.draft_tree(**arguments | {"factors": factors[:2]})


@given(known=knowledge(), nodes=st.integers(2, 5))
def test_a_draft_without_foresight_is_the_best_of_all_trees_of_its_size(device, known, nodes):
    """Of all that can be chosen from the whole tree of guesses, none is accepted further on
    average.
    """
    known = dataclasses.replace(known, vocabulary=2)
    arguments = {**known.arguments(device), "max_depth": 3, "foresight": 0.0}
    _, parents, probability, _ = (x.tolist() for x in ops.draft_tree(**arguments, nodes=15))
    best = ops.draft_tree(**arguments, nodes=nodes)[2].sum(1).tolist()
    for b in range(known.batch):
        live = [i for i in range(1, 15) if parents[b][i] >= 0]
        assume(len(live) >= nodes - 1)
        chosen = itertools.combinations(live, nodes - 1)
        whole = [c for c in chosen if all(parents[b][i] in (0, *c) for i in c)]
        assert best[b] == pytest.approx(
            1 + max(sum(probability[b][i] for i in c) for c in whole), rel=1e-12
        )


@pytest.mark.parametrize("foresight", [0.0, 0.05, 1.0])
def test_the_sum_of_the_probabilities_is_the_expected_accept_length(device, foresight):
    """Models that continue every node as the draft supposes, 20,000 of them; the bound is six
    standard errors.
    """
    samples, nodes = 20_000, 40
    arguments = Known(1, 5, factors="few").arguments(device)
    tokens, parents, probability, _ = ops.draft_tree(
        **arguments, nodes=nodes, max_depth=9, foresight=foresight
    )
    targets = torch.full((samples, nodes), -7)
    for node, p in enumerate(probability[0].tolist()):
        children = (parents[0] == node).nonzero().flatten().tolist()
        if children and p > 0:
            weights = torch.tensor([probability[0, i].item() / p for i in children])
            weights = torch.cat([weights, 1 - weights.sum(0, True)])
            chosen = torch.multinomial(weights, samples, True, generator=seeded(node))
            targets[:, node] = torch.cat([tokens[0, children].cpu(), integers([-7])])[chosen]
    accepted = ops.verify_tree(tokens.expand(samples, -1), targets.to(device), parents[0])[
        0
    ].double()
    error = accepted.std().item() / samples**0.5
    assert error > 0 and abs(accepted.mean().item() - probability.sum().item()) < 6 * error


def test_a_draft_of_no_rows(device):
    arguments = Known(batch=0).arguments(device)
    shapes = [x.shape for x in ops.draft_tree(**arguments, nodes=7, max_depth=3, foresight=0.5)]
    assert shapes == [(0, 7)] * 4


@pytest.mark.parametrize(
    "factor", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 9e-10, 1.1e9]
)
@pytest.mark.parametrize("at", [0, 100, FACTORS - 1])
def test_a_wrong_factor_is_refused_by_name(factor, at):
    arguments = worked_example("cpu")
    arguments["factors"][at] = factor
    with pytest.raises(ValueError, match=rf"^factors\[{at}\] is .*; expected 1e-9 to 1e9$"):
        ops.draft_tree(**arguments)


def test_the_largest_and_smallest_factors_are_taken(device):
    """Even where all that is listed is one token: a bias, 32 guesses and a suffix."""
    arguments = worked_example(device)
    arguments["denoised"][:] = guess(3, 1)
    observed = Pass([[3, 1, 2]], [[2]], [[-1]], [[0]], [[[guess(3, 1)] * 8]])
    ops.remember_guesses(arguments["adjacency"], **observed.arguments(device))
    for factor, probability in [(1e-9, 1e-306), (1e9, 0.99)]:
        arguments["factors"][:] = factor
        got = ops.draft_tree(**arguments)
        assert_equal(got, specified("draft_tree", **arguments))
        assert got[0].tolist() == [[2, 3, 2, 2]] and got[3].tolist() == [[0, 7, 0, 0]]
        assert got[2][0, 1].item() == pytest.approx(probability, rel=1e-9, abs=0)

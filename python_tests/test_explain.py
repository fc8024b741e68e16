"""The drawn step: text and SVG show the whole tree, exactly what was accepted, and the op's
probabilities.
"""

import random
import re
from xml.etree import ElementTree

import pytest
import torch

from helpers.drawings import SVG, boxes, drawn
from helpers.families import VOCAB, tiny_model
from msn_ext import explain, generate, ops
from msn_ext.explain import Step, as_svg, as_text, record
from msn_ext.explain.outline import columns, percent, token_text


class Words:
    """Token i is the i-th word, or w<i>."""

    def __init__(self, words=()):
        self.words = dict(enumerate(words))

    def decode(self, tokens, **_):
        return "".join(self.words.get(token, f"w{token}") for token in tokens)


def random_step(seed: int, most: int = 40) -> Step:
    """A tree in which every token is another, numbered as its node; the bonus is 1000."""
    rng = random.Random(seed)
    nodes = rng.randint(1, most)
    parents = [
        -1,
        *(rng.randint(max(0, i - rng.choice([1, 3, 40])), i - 1) for i in range(1, nodes)),
    ]
    probability = [1.0]
    for parent in parents[1:]:
        probability.append(probability[parent] * rng.choice([0.0, rng.random() ** 3, 0.9]))
    path = [0]
    while rng.random() < 0.8 and (children := [i for i in range(nodes) if parents[i] == path[-1]]):
        path.append(rng.choice(children))
    return Step(
        number=3,
        text=list(range(2000, 2000 + rng.randint(1, 30))),
        tokens=list(range(nodes)),
        parents=parents,
        probability=probability,
        sources=[0, *(rng.randint(1, 15) for _ in range(nodes - 1))],
        path=path,
        bonus=1000,
        kept=len(path),
        passes=5,
    )


def texts(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("seed", range(40))
def test_text_shows_the_whole_tree(seed):
    step = random_step(seed)
    lines, rest = drawn(as_text(step, Words()))
    nodes = {line["token"]: line for line in lines if not line["bonus"]}
    assert len(lines) == len(nodes) + 1 == len(step.tokens) + 1
    for node, (parent, probability) in enumerate(zip(step.parents, step.probability)):
        line = nodes[f"w{node}"]
        assert line["parent"] == (None if parent < 0 else f"w{parent}")
        assert line["percent"] == percent(probability)
        assert line["mark"] == ("✓" if node in step.path else " ")
        assert line["more"] == 0
        expected = "".join(
            c if step.sources[node] & 1 << bit else "·" for bit, c in enumerate("DASN")
        )
        assert line["sources"] == ("root" if node == 0 else expected)
    (bonus,) = (line for line in lines if line["bonus"])
    assert (bonus["mark"], bonus["token"], bonus["parent"]) == ("★", "w1000", f"w{step.path[-1]}")
    for parent in nodes:  # likeliest first
        siblings = [line["token"] for line in nodes.values() if line["parent"] == parent]
        assert siblings == sorted(siblings, key=lambda token: -step.probability[int(token[1:])])
    assert "left out" not in rest
    assert f"{step.expected:.1f} expected" in rest and "pass 3 of 5" in rest
    for bit, word in enumerate(("denoised", "adjacency", "suffix", "noise")):
        made = [node for node, sources in enumerate(step.sources) if sources & 1 << bit]
        assert re.search(rf"{word} .* {len(made)} +{len(set(made) & set(step.path))}$", rest, re.M)


@pytest.mark.parametrize("seed", range(40))
def test_folding_keeps_the_accepted_path_and_counts_the_rest(seed):
    step, least = random_step(seed), 0.1
    kept = {node for node, p in enumerate(step.probability) if p >= least or node in step.path}
    lines, rest = drawn(as_text(step, Words(), least))
    assert {line["token"] for line in lines if not line["bonus"]} == {f"w{node}" for node in kept}
    hidden = len(step.tokens) - len(kept)
    assert sum(line["more"] for line in lines) == hidden
    assert (
        (f"{hidden} node{'s' * (hidden != 1)} below 10% left out" in rest)
        == (hidden > 0)
        == ("left out" in rest)
    )
    svg = as_svg(step, Words(), least)
    assert len(boxes(svg)) == len(kept) + 1
    assert any("left out" in text for text in texts(svg)) == (hidden > 0)


def test_colours_only_where_asked():
    step = random_step(1)
    colored = as_text(step, Words(), color=True)
    assert "\033[" in colored
    assert re.sub(r"\033\[\d+m", "", colored) == as_text(step, Words())


def test_what_a_pass_was_good_for():
    step = random_step(0)
    step.path, step.kept = [0], 1
    assert "No guess was right: this pass gained 1 token" in as_text(step, Words())
    alone = Step(1, [7], [0], [-1], [1.0], [0], [0], 1000, 1, 1)
    assert "Nothing was guessed: this pass gained 1 token" in as_text(alone, Words())
    chain = Step(1, [7], [0, 1, 2], [-1, 0, 1], [1.0, 0.5, 0.2], [0, 1, 1], [0, 1, 2], 1000, 2, 1)
    for picture in (as_text(chain, Words()), as_svg(chain, Words())):
        assert "This pass gained 3 tokens. Plain decoding would have needed 3 passes." in picture
        assert "Only the first 2 of them counted: there the answer ended." in picture


@pytest.mark.parametrize(
    "probability, text",
    [
        (1, "100%"),
        (0.0996, "10%"),
        (0.0994, "9.9%"),
        (0.412, "41%"),
        (0.0006, "0.1%"),
        (0.0004, "<0.1%"),
        (0, "0%"),
    ],
)
def test_percent(probability, text):
    assert percent(probability) == text


STRANGE = {
    " the": "␣the",
    "\n\n": "⏎⏎",
    "\r\n": "⏎",
    "\t": "⇥",
    "\x1b[31m": "\\x1b[31m",
    "\x00": "\\x00",
    "\ud800": "\\ud800",
    "\u202e": "\\u202e",
    "\uffff": "\\uffff",
    "\ufffd": "#0",  # noqa: F601  # ruff reads the lone surrogate above as the same
    "": "#0",
    "<b>&amp;\"'": "<b>&amp;\"'",
    "]]>": "]]>",
    "日本": "日本",
    "e\u0301": "e\u0301",
    "x" * 60: "x" * 23 + "…",
    "\\n": "\\n",
}


@pytest.mark.parametrize("word", STRANGE, ids=ascii)
def test_strange_tokens(word):
    """Nothing in a token is a command to a terminal or to XML."""
    step = Step(1, [0, 0], [0, 0], [-1, 0], [1.0, 0.5], [0, 3], [0, 1], 0, 2, 1)
    tokenizer, shown = Words([word]), STRANGE[word]
    text = as_text(step, tokenizer)
    assert [line["token"] for line in drawn(text)[0]] == [shown] * 3
    assert all(c.isprintable() for c in text.replace("\n", ""))
    assert texts(as_svg(step, tokenizer)).count(shown) == 3


def test_columns_line_up_after_wide_characters():
    step = Step(1, [0], [0, 1, 2], [-1, 0, 0], [1.0, 0.5, 0.2], [0, 1, 1], [0], 3, 1, 1)
    tree = as_text(step, Words(["日本語", "abcdef", "e\u0301", "x"])).split("\n\n")[1].splitlines()
    assert len({columns(line[: line.index("%")]) for line in tree if "%" in line}) == 1


def test_tokenizers_that_drop_the_first_space():
    class Dropping(Words):
        def decode(self, tokens, **_):
            return super().decode(tokens).removeprefix(" ")

    assert [token_text(Dropping([" one", "two", " "]), token) for token in range(3)] == [
        "␣one",
        "two",
        "␣",
    ]


@pytest.mark.parametrize("seed", range(40))
def test_svg_shows_everything_side_by_side(seed):
    step = random_step(seed)
    svg = as_svg(step, Words())
    root = ElementTree.fromstring(svg)
    assert sorted(t for t in texts(svg) if re.fullmatch(r"w\d+", t)) == sorted(
        f"w{t}" for t in [*step.tokens, 1000]
    )
    kinds = [r.get("class") for r in root.iter(f"{SVG}rect")]
    assert kinds.count("node root") == kinds.count("node bonus") == 1
    assert kinds.count("node accepted") == len(step.path) - 1
    assert kinds.count("node box") == len(step.tokens) - len(step.path)
    edges = [e.get("class") for e in root.iter(f"{SVG}path")]
    assert edges.count("taken") == len(step.path) and len(edges) == len(step.tokens)
    places = boxes(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    for i, (x, y, w, h) in enumerate(places):
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        for x2, y2, w2, h2 in places[:i]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    assert (
        not {"script", "image", "a"} & {e.tag.removeprefix(SVG) for e in root.iter()}
        and "url(" not in svg
    )
    for _, letter, word, *_ in explain.SOURCES:
        assert any(text.startswith(f"{letter}  {word}: ") for text in texts(svg))


@pytest.mark.parametrize("seed", range(4))
def test_steps_are_what_happened(seed, device, monkeypatch):
    model = tiny_model("llama", seed).to(device)
    if seed < 3:  # the last one may end its answer in the middle of a pass
        model.generation_config.eos_token_id = None
    prompt = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(seed)).to(
        device
    )
    trees, original = [], ops.draft_tree

    def draft_tree(*arguments):
        tree = original(*arguments)
        trees.append([x[0].tolist() for x in tree])
        return tree

    monkeypatch.setattr(ops, "draft_tree", draft_tree)
    steps = record(model, prompt, 20, 40)
    out = generate(model, prompt, max_new_tokens=40, draft="none")[0].tolist()
    assert len(steps) == len(trees) > 0

    end = len(out)
    for step in reversed(steps):
        assert out[end - step.kept : end] == step.gained[: step.kept]
        end -= step.kept
        assert out[:end][-explain.TAIL :] == step.text and step.tokens[0] == step.text[-1]
    assert end > prompt.shape[1]
    for number, (step, (tokens, parents, probability, sources)) in enumerate(zip(steps, trees), 1):
        nodes = len(step.tokens)
        assert (step.number, step.passes) == (number, len(steps))
        assert parents[nodes:] == [-1] * (len(parents) - nodes) and step.parents.count(-1) == 1
        assert (step.tokens, step.parents) == (tokens[:nodes], parents[:nodes])
        assert (step.probability, step.sources) == (probability[:nodes], sources[:nodes])
        assert [step.parents[node] for node in step.path] == [-1, *step.path[:-1]]
        assert 1 <= step.kept <= step.accept_length and (
            step.kept == step.accept_length or number == len(steps)
        )
        assert step.bonus not in [
            t for t, parent in zip(step.tokens, step.parents) if parent == step.path[-1]
        ]
    assert any(step.accept_length > 1 for step in steps)


def test_recorder_takes_one_row():
    with pytest.raises(ValueError, match="batch is 2; expected 1"):
        record(tiny_model("llama", 0), torch.full((2, 3), 5), 8, 4)


def test_a_pass_in_which_only_the_root_was_checked():
    """Near the longrope boundary nothing is proposed, and no older tree is shown in its place."""
    model = tiny_model("phi3-longrope", 3)
    model.generation_config.eos_token_id = None
    steps = record(
        model, torch.randint(3, VOCAB, (1, 8), generator=torch.Generator().manual_seed(3)), 16, 60
    )
    alone = [step for step in steps if step.tokens == step.text[-1:]]
    assert alone and any(len(step.tokens) > 1 for step in steps)
    for step in alone:
        assert (step.parents, step.probability, step.sources, step.path) == ([-1], [1.0], [0], [0])

"""The page of an answer in a browser: keys, mouse and fingers step through it; it fits a phone."""

import re

import pytest

from helpers import chromium
from helpers.answers import STRANGE, Words, random_answer
from msn_ext.explain import as_html
from msn_ext.explain.html import shown
from msn_ext.explain.outline import token_text

pytestmark = pytest.mark.skipif(
    chromium.PROGRAM is None, reason=f"needs one of {', '.join(chromium.NAMES)}"
)
NUMBER = "Number(document.getElementById('strip').getAttribute('aria-valuenow'))"
SHOWN = (
    "[...document.querySelectorAll('#text .pass:not(.later)')].map((e) => e.textContent).join('')"
)
TREE = """[...document.querySelectorAll('#tree li')].map((e) => ({
    kind: e.className, token: e.querySelector('bdi').textContent, words: e.title,
    x: e.offsetLeft, y: e.offsetTop, width: e.offsetWidth, height: e.offsetHeight}))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, tmp_path):
    """Opens an answer, and sees that nothing failed and nothing was asked of a network."""

    def show(answer, words=None, fragment="", size=(1280, 800), dark=False, touch=False):
        file = tmp_path / "answer.html"
        file.write_text(as_html(answer, words or Words(), "What was asked?"), encoding="utf-8")
        browser.look(*size, dark, touch)
        browser.open(file, fragment)
        return browser

    yield show
    assert browser.do("1 + 1") == 2  # all events before it have come
    for event in browser.events:
        assert event["method"] not in ("Runtime.exceptionThrown", "Log.entryAdded"), event
        if event["method"] == "Network.requestWillBeSent":
            assert event["params"]["request"]["url"].startswith(("file:", "data:")), event


def text_after(answer, passes: int) -> str:
    count = len(answer.opening) + sum(step.kept for step in answer.steps[:passes])
    return "".join(f"w{token}" for token in answer.tokens[:count])


def test_every_pass_is_shown(page):
    answer = random_answer(0, passes=8)
    tab = page(answer)
    for number, step in enumerate(answer.steps, 1):
        assert tab.do(NUMBER) == number and tab.do("location.hash") == f"#{number}"
        assert tab.do(SHOWN) == text_after(answer, number)
        head = tab.do("document.getElementById('pass-head').textContent")
        assert re.fullmatch(rf"Pass {number} gained {step.kept} tokens?", head)
        gained = tab.do("[...document.querySelectorAll('#gained li')].map((e) => e.textContent)")
        assert gained == [f"w{token}" for token in step.gained]
        cut = tab.do("document.querySelectorAll('#gained .cut').length")
        assert cut == step.accept_length - step.kept
        boxes = tab.do(TREE)
        assert sorted(box["token"] for box in boxes) == sorted(
            f"w{token}" for token in [*step.tokens, step.bonus]
        )
        path = [box for box in boxes if box["kind"] != "rejected"]
        path.sort(key=lambda box: box["x"])
        assert [box["kind"] for box in path] == ["root", *["accepted"] * (len(path) - 2), "bonus"]
        assert [box["token"] for box in path] == [f"w{t}" for t in (step.tokens[0], *step.gained)]
        assert {box["y"] for box in path} == {path[0]["y"]}  # a straight line
        assert tab.do("document.querySelectorAll('#tree .taken').length") == len(path) - 1
        assert tab.do("document.querySelectorAll('#tree path').length") == len(boxes) - 1
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert (
                    a["x"] + a["width"] <= b["x"]
                    or b["x"] + b["width"] <= a["x"]
                    or a["y"] + a["height"] <= b["y"]
                    or b["y"] + b["height"] <= a["y"]
                )
        tab.press("ArrowRight")
    assert tab.do(NUMBER) == 8


@pytest.mark.parametrize(
    "fragment, expected", [("", 1), ("#3", 3), ("#8", 8), ("#99", 8), ("#-4", 1), ("#x", 1)]
)
def test_the_address_names_a_pass(page, fragment, expected):
    tab = page(random_answer(1, passes=8), fragment=fragment)
    assert tab.do(NUMBER) == expected
    tab.do("location.hash = '#2'; new Promise((done) => setTimeout(done, 50))")
    assert tab.do(NUMBER) == 2


def test_keys(page):
    tab = page(random_answer(1, passes=30))
    for key, expected in [
        ("ArrowLeft", 1),
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", 30),
        ("ArrowRight", 30),
        ("Home", 1),
    ]:
        tab.press(key)
        assert tab.do(NUMBER) == expected, key
    tab.do("document.getElementById('strip').focus()")
    for key, expected in [("PageDown", 11), ("ArrowUp", 10), ("ArrowDown", 11), ("PageUp", 1)]:
        tab.press(key)
        assert tab.do(NUMBER) == expected, key


@pytest.mark.parametrize("how", ["key", "button"])
def test_it_plays_and_pauses(page, how):
    tab = page(random_answer(1, passes=3))
    state = "document.getElementById('play').getAttribute('aria-label')"

    def toggle():
        tab.press(" ") if how == "key" else tab.click("#play")

    def until(number):
        tab.do(
            "new Promise((done) => { const look = () => "
            f"{NUMBER} >= {number} ? done() : setTimeout(look, 20); look(); }})"
        )

    assert tab.do(state) == "Play"
    toggle()
    assert tab.do(state) == "Pause"
    until(2)
    toggle()
    assert (tab.do(state), tab.do(NUMBER)) == ("Play", 2)
    toggle()
    until(3)
    assert tab.do(state) == "Play"  # the end
    toggle()
    assert tab.do(NUMBER) == 1  # from the beginning again


def test_buttons_the_strip_and_the_text(page):
    answer = random_answer(1, passes=10)
    tab = page(answer)
    for button, expected in [("next", 2), ("end", 10), ("back", 9), ("home", 1)]:
        tab.click(f"#{button}")
        assert tab.do(NUMBER) == expected
    assert tab.do("document.getElementById('back').disabled") is True
    for across, expected in [(0.55, 6), (0.99, 10), (0.01, 1), (0.75, 8)]:
        tab.click("#strip", across)
        assert tab.do(NUMBER) == expected
    tab.click("#text .pass:nth-child(4) .token")
    assert tab.do(NUMBER) == 3  # the first span is the prompt's pass


def test_fingers_on_a_phone(page):
    tab = page(random_answer(1, passes=10), size=(390, 844), touch=True)
    tab.tap("#next")
    assert tab.do(NUMBER) == 2
    tab.tap("#strip", 0.75)
    assert tab.do(NUMBER) == 8


@pytest.mark.parametrize("width", [320, 390, 821, 1280])
def test_it_fits(page, width):
    """Only boxes of their own scroll sideways, however wide a tree or long a word."""
    answer = random_answer(2, passes=4, nodes=64)
    tab = page(answer, Words(["x" * 300] * 1000), size=(width, 844), touch=width < 800)
    for number in range(1, 5):
        wide, inside = tab.do("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inside == width
        field = tab.do("document.querySelector('#tree .field').offsetWidth")
        box = tab.do("document.getElementById('tree').scrollWidth")
        assert field <= box
        buttons = tab.do(
            "[...document.querySelectorAll('button')]"
            ".map((e) => e.getBoundingClientRect().toJSON())"
        )
        for button in buttons:
            assert button["left"] >= 0 and button["right"] <= width and button["bottom"] <= 844
            assert button["width"] >= 40 and button["height"] >= 40
        tab.press("ArrowRight")
        assert tab.do(NUMBER) == min(number + 1, 4)


def test_strange_tokens_are_text(page):
    answer = random_answer(4, passes=len(STRANGE))
    for step, token in zip(answer.steps, range(len(STRANGE))):
        step.bonus = token
        if step.number < len(answer.steps):
            answer.steps[step.number].tokens[0] = token
    words = Words(STRANGE)
    tab = page(answer, words)
    for token in range(len(STRANGE)):
        bonus = tab.do("document.querySelector('#tree .bonus bdi').textContent")
        assert bonus == token_text(words, token)
        tab.press("ArrowRight")
    assert tab.do("document.querySelectorAll('script').length") == 2
    assert tab.do("document.querySelectorAll('img').length") == 0
    text = tab.do(SHOWN)
    assert all(shown(word) in text for word in STRANGE if word != "\ufffd")


def test_folding_hides_what_is_improbable(page):
    answer = random_answer(0, passes=3, nodes=40)
    tab = page(answer)
    tab.do(
        "const choice = document.getElementById('least'); choice.value = '0.05';"
        " choice.dispatchEvent(new Event('change'))"
    )
    for step in answer.steps:
        kept = [
            node
            for node, probability in enumerate(step.probability)
            if node in step.path or float(f"{probability:.3g}") >= 0.05
        ]
        assert len(tab.do(TREE)) == len(kept) + 1
        folded = tab.do(
            "[...document.querySelectorAll('.folded')].map((e) => Number(e.textContent))"
        )
        assert sum(folded) == 40 - len(kept) > 0
        tab.press("ArrowRight")


def test_light_and_dark(page):
    def colours(dark):
        tab = page(random_answer(0), dark=dark)
        return tab.do(
            "['#pass-card', '#tree .accepted', '#tree .rejected'].flatMap((e) => {"
            " const s = getComputedStyle(document.querySelector(e));"
            " return [s.color, s.backgroundColor].map((c) => c.match(/\\d+/g).slice(0, 3)"
            ".reduce((sum, n) => sum + Number(n), 0) / 3); })"
        )

    for i, (light, dark) in enumerate(zip(colours(False), colours(True))):
        assert (light < 110 and dark > 150) if i % 2 == 0 else (light > 190 and dark < 70)


def test_everything_has_a_name_and_a_visible_focus(page):
    tab = page(random_answer(0, passes=5), fragment="#2")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored")
    ]
    for role in ("button", "slider", "combobox", "region", "heading", "navigation"):
        names = [name for one, name in named if one == role]
        assert names and all(names), role
    assert {name for role, name in named if role == "button"} >= {
        *("First pass", "Previous pass", "Play", "Next pass", "Last pass")
    }
    seen = []
    for _ in range(12):
        tab.press("Tab")
        seen.append(tab.do("document.activeElement.id || document.activeElement.tagName"))
        outline = tab.do("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or seen[-1] == "BODY", seen
    assert {"text", "tree", "least", "strip", "home", "back", "play", "next", "end"} <= set(seen)

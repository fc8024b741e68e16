"""benchmarks/isolated.py: a case that fails, hangs or ends its process costs only itself."""

import importlib

import pytest

from helpers import BENCHMARKS

CASES = """
import os
import sys
import time

import isolated


def work(report, options):
    report.about({"process": os.getpid()})
    for name in options:
        if (name,) in report.done:
            continue
        report.begin(name=name)
        try:
            if name == "fails":
                raise ValueError("no such thing")
            if name == "breaks the device":
                isolated.usable = lambda device: False
                raise RuntimeError("an illegal memory access")
            if name == "ends the process":
                os._exit(3)
            if name == "hangs":
                time.sleep(60)
        except Exception as error:
            report.error(error)
        else:
            report.row(process=os.getpid())


def ends_at_once(report, options):
    sys.exit(4)
"""
NAMES = ["first", "fails", "second", "breaks the device", "third", "ends the process", "hangs"]


@pytest.fixture
def cases(tmp_path, monkeypatch):
    (tmp_path / "msn_cases.py").write_text(CASES)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("msn_cases")


def test_a_case_that_goes_wrong_costs_only_itself(cases):
    from isolated import isolated

    done = {("second",): {"name": "second", "process": 0}}
    names = [*NAMES, "last"]
    found = list(isolated(cases.work, names, "cpu", 8.0, done))
    rows = [content for kind, content in found if kind == "row"]
    assert [row["name"] for row in rows] == [name for name in names if name != "second"]
    assert set(done) == {(name,) for name in names}
    errors = {row["name"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        "fails": "ValueError: no such thing",
        "breaks the device": "RuntimeError: an illegal memory access",
        "ends the process": "ended its process, exit status 3",
        "hangs": "took longer than 8 s",
    }
    processes = [row["process"] for row in rows if "process" in row]
    assert len(processes) == 3 and len(set(processes)) == 3, "three cases after a fresh start each"
    begun = [content["name"] for kind, content in found if kind == "begin"]
    assert len(begun) == len(set(begun)), "nothing is run twice"


def test_a_process_that_ends_before_its_cases_is_an_error(cases):
    from isolated import isolated

    with pytest.raises(RuntimeError, match="before the first of them: .*exit status 4"):
        list(isolated(cases.ends_at_once, ["first"], "cpu", 8.0, {}))

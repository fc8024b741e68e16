"""benchmarks/gate.py times both ways to train."""

import json

import pytest

from helpers import BENCHMARKS
from helpers.cases import one_thread

pytest.importorskip("peft")
pytest.importorskip("accelerate")


def test_both_ways_are_timed(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gate

    file = tmp_path / "out.json"
    sizes = "--batch-size 2 --max-length 40 --segments 4 --length 2 --rounds 1 --lora-rank 2"
    with one_thread():
        assert gate.main(["--model", folder, "--json", str(file), *sizes.split()]) == 0
    found = json.loads(file.read_text())
    rates = found["tokens per second"]
    assert set(rates) == {"branch", "gate"} and min(rates.values()) > 0
    assert found["ratio"] == rates["gate"] / rates["branch"]
    assert "tokens/s" in capsys.readouterr().out


def test_the_batches_are_the_same(folder, tmp_path, monkeypatch):
    """Text and noise; labels say how many, with a gate."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import argparse

    import gate

    options = argparse.Namespace(model=folder, device="cpu", dtype="float32", length=2, segments=3)
    settings = gate.TrainSettings(max_length=40, batch_size=2, lora_rank=2)
    batches = []
    for way in gate.WAYS:
        model, _ = gate.load_model(options)
        trainer = gate.trainer_for(way, model, str(tmp_path), options, settings)
        batches.append(next(iter(trainer.get_train_dataloader())))
    assert set(batches[0]) == set(batches[1])
    for name in set(batches[0]) - {"labels"}:
        assert batches[0][name].tolist() == batches[1][name].tolist(), name
    assert (
        int((batches[1]["labels"] >= 0).sum()) == int((batches[0]["noise_depth"] > 0).sum()) == 12
    )

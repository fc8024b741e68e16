"""benchmarks/cut_rank.py keeps the best product of fewer ranks, and a folder that PEFT loads."""

import pytest
import torch
from safetensors.torch import load_file

from helpers import BENCHMARKS
from helpers.families import tiny_model
from helpers.noise import gated_tiny
from msn_ext.decoding.forward.adapter import noise_adapter_of

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("rank", [1, 2])
def test_products_are_the_nearest_of_that_rank(rank, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cut_rank

    model = gated_tiny("llama")
    model.save_pretrained(tmp_path / "whole")
    cut_rank.main([str(tmp_path / "whole"), "--rank", str(rank), "--output", str(tmp_path / "cut")])
    half = [str(tmp_path / "whole"), "--rank", "1", "--dtype", "bfloat16"]
    cut_rank.main([*half, "--output", str(tmp_path / "half")])
    halves = load_file(tmp_path / "half" / cut_rank.WEIGHTS)
    assert {weight.dtype for weight in halves.values()} == {torch.bfloat16}
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama", 3), tmp_path / "cut")
    pairs = zip(*(noise_adapter_of(m).layers.values() for m in (model, loaded)), strict=True)
    for whole, small in pairs:
        assert small.a.shape[0] == rank and small.scaling == pytest.approx(whole.scaling)
        product = (whole.b @ whole.a).double()
        u, sizes, v = torch.linalg.svd(product, full_matrices=False)
        best = u[:, :rank] * sizes[:rank] @ v[:rank]
        torch.testing.assert_close((small.b @ small.a).double(), best, rtol=1e-4, atol=1e-6)


def test_more_ranks_than_there_are_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cut_rank

    gated_tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        cut_rank.main([str(tmp_path), "--rank", "99", "--output", str(tmp_path / "cut")])
    assert "--rank 99; expected 1 to" in capsys.readouterr().err

"""`msn info`."""

import torch

from msn_ext import cli


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("msn_ext", "CPU kernels", "CUDA kernels", torch.__version__)
    )

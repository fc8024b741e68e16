"""Hypothesis profiles and the ``device`` fixture.

``MSN_REQUIRE_CUDA=1`` turns missing CUDA kernels or a missing GPU from an absence into a failure.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import msn_ext

for name, examples in [("msn", 100), ("sanitizers", 15)]:
    settings.register_profile(
        name,
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("msn")

HAVE_CUDA = bool(torch.cuda.is_available() and msn_ext.build_info()["cuda"])
WANT_CUDA = os.environ.get("MSN_REQUIRE_CUDA") == "1"


@pytest.fixture(scope="session", params=["cpu", "cuda"] if HAVE_CUDA or WANT_CUDA else ["cpu"])
def device(request) -> str:
    if request.param == "cuda" and not HAVE_CUDA:
        pytest.fail("MSN_REQUIRE_CUDA=1, but there is no GPU or msn_ext was built without CUDA")
    return request.param

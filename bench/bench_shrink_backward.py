"""``dA = dsᵀ·drop(x)`` on every backend: ``pytest bench/bench_shrink_backward.py``."""

import pytest

from lorafast.ops import dispatch


@pytest.mark.parametrize("backend", dispatch.backend_names())
def test_shrink_backward(time_operation, backend):
    time_operation("shrink_backward", backend)

"""``dA = dsᵀ·drop(x)`` on every backend: ``pytest bench/bench_shrink_backward.py``."""

import pytest

from lorafast.backends import registry


@pytest.mark.parametrize("backend", registry.names())
def test_shrink_backward(time_operation, backend):
    time_operation("shrink_backward", backend)

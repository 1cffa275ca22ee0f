"""``s = drop(x)·Aᵀ`` on every backend: ``pytest bench/bench_shrink.py``."""

import pytest

from lorafast.backends import registry


@pytest.mark.parametrize("backend", registry.names())
def test_shrink(time_operation, backend):
    time_operation("shrink", backend)

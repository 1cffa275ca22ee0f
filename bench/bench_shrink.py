"""``s = drop(x)·Aᵀ`` on every backend: ``pytest bench/bench_shrink.py``."""

import pytest

from lorafast.ops import dispatch


@pytest.mark.parametrize("backend", dispatch.backend_names())
def test_shrink(time_operation, backend):
    time_operation("shrink", backend)

"""``y = drop(scaling · s·Bᵀ)`` on every backend: ``pytest bench/bench_expand.py``."""

import pytest

from lorafast.backends import registry


@pytest.mark.parametrize("backend", registry.names())
def test_expand(time_operation, backend):
    time_operation("expand", backend)

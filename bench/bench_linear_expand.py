"""``y = x·Wᵀ + scaling·s·Bᵀ + bias``, dx too, by backend: ``pytest bench/bench_linear_expand.py``."""

import pytest

from lorafast.backends import registry


@pytest.mark.parametrize("backend", registry.names())
def test_linear_expand(time_operation, backend):
    time_operation("linear_expand", backend)


@pytest.mark.parametrize("backend", registry.names())
def test_dx(time_operation, backend):
    time_operation("dx", backend)

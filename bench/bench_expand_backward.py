"""``ds`` and ``dB`` on every backend: ``pytest bench/bench_expand_backward.py``."""

import pytest

from lorafast.backends import registry


@pytest.mark.parametrize("backend", registry.names())
def test_expand_backward(time_operation, backend):
    time_operation("expand_backward", backend)

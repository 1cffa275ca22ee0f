"""The whole layer, forward and backward with dx: ``pytest bench/bench_lora_linear.py``."""

import pytest

from lorafast.backends import registry


@pytest.mark.parametrize("contender", ["frozen", "lorafast", "peft", *registry.names()])
def test_lora_linear(time_layer, contender):
    time_layer(contender)

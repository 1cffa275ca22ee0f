import pytest

try:
    # Looks at PEFT's methods, which tests replace.
    import lorafast.integrations.peft.swap  # noqa: F401
except ImportError as error:
    if error.name not in ("peft", "transformers"):
        raise


@pytest.fixture
def served_by_peft(monkeypatch):
    """Counts the calls of accelerated layers that PEFT serves."""
    from peft.tuners.lora import layer as stock_layers

    calls = []
    convolutions = (stock_layers.Conv1d, stock_layers.Conv2d, stock_layers.Conv3d)
    others = (stock_layers.Embedding, stock_layers.MultiheadAttention)
    for cls in (stock_layers.Linear, *others, *convolutions):

        def forward(self, *args, _forward=cls.forward, **kwargs):
            if type(self).__module__.startswith("lorafast"):
                calls.append(self)
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)
    return calls

"""What the conversion tests ask of a model, and a small language model."""

import pytest

from lorafast.nn import AdapterLayer


def adapted(model):
    """Names of the adapted layers, also second names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name for name, module in modules if isinstance(module, AdapterLayer)}


def trained(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def llama_config(**options):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )

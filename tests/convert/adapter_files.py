"""An adapter for the conversion tests' net, as PEFT writes it."""

import json

import pytest
import torch

from lorafast.nn import LoRALinear

safetensors = pytest.importorskip("safetensors.torch")

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
UP_A = "base_model.model.block.up.lora_A.weight"
UP_B = "base_model.model.block.up.lora_B.weight"
DOWN_A = "base_model.model.block.down.lora_A.weight"
DOWN_B = "base_model.model.block.down.lora_B.weight"
HEAD_W = "base_model.model.head.weight"
HEAD_b = "base_model.model.head.bias"


def good_tensors():
    generator = torch.Generator().manual_seed(3)
    shapes = {UP_A: (2, 5), UP_B: (7, 2), DOWN_A: (2, 7), DOWN_B: (3, 2)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def good_config():
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 5,
        "lora_dropout": 0.25,
        "target_modules": ["up", "down"],
    }


def write_adapter(folder, tensors=None, config=None):
    """An adapter for ``block.up`` and ``block.down`` of the net, with changes; None takes away."""
    changed = [
        good | (change or {})
        for good, change in ((good_tensors(), tensors), (good_config(), config))
    ]
    tensors, config = ({k: v for k, v in what.items() if v is not None} for what in changed)
    folder.mkdir(exist_ok=True)
    safetensors.save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def read(folder):
    return json.loads((folder / CONFIG).read_text()), safetensors.load_file(folder / WEIGHTS)


def lora_layers(model):
    return {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}

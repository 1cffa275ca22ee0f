"""The names of the original U-Net, as kohya's files for SDXL have them.

The pairs are those of diffusers 0.42.1. Its converter was held against these names on a small SDXL
U-Net, with all 373 of its linear layers and convolutions: outputs were equal to 1e-14.
"""

import pytest
import torch
from torch import nn

import lorafast
from lorafast.convert.unet_names import original_names

# Of SDXL: three resolutions, attention in the lower two, two residual blocks in each.
PAIRS = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.1.time_emb_proj": "input_blocks.8.0.emb_layers.1",
    "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_out.0": (
        "input_blocks.8.1.transformer_blocks.9.attn1.to_out.0"
    ),
    "mid_block.resnets.0.conv2": "middle_block.0.out_layers.3",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2": (
        "middle_block.1.transformer_blocks.0.ff.net.2"
    ),
    "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.resnets.0.conv1": "output_blocks.3.0.in_layers.2",
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q": (
        "output_blocks.5.1.transformer_blocks.0.attn2.to_q"
    ),
    "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    "conv_out": "out.2",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
}


class Group(nn.Module):
    """Modules by name; it is never called."""


def unet(names=tuple(PAIRS)):
    model = Group()
    # What the numbers depend on: every residual block and attention.
    everything = [f"down_blocks.{i}.resnets.{j}.norm1" for i in range(3) for j in range(2)]
    everything += [f"up_blocks.{i}.resnets.{j}.norm1" for i in range(3) for j in range(3)]
    for name in (*everything, *names):
        around = model
        *path, last = name.split(".")
        for part in path:
            if part not in around._modules:
                around.add_module(part, Group())
            around = around.get_submodule(part)
        around.add_module(last, nn.GroupNorm(1, 5) if last == "norm1" else nn.Linear(5, 5))
    return model


def test_names():
    found = original_names(name for name, _ in unet().named_modules())
    assert {ours: found[ours] for ours in PAIRS} == PAIRS
    linear = {name for name, m in unet().named_modules() if isinstance(m, nn.Linear)}
    assert linear <= found.keys()
    assert not any("norm" in name for name in found)
    assert original_names(["down_blocks", "proj_in"]) == {}


def test_an_upsampler_without_attention_is_the_second():
    found = original_names(
        ["conv_in", "down_blocks", "up_blocks.0", "up_blocks.0.resnets.0",
         "up_blocks.0.upsamplers.0", "up_blocks.0.upsamplers.0.conv"]
    )  # fmt: skip
    assert found["up_blocks.0.upsamplers.0.conv"] == "output_blocks.0.1.conv"


def test_there_and_back(draw_adapters, tmp_path):
    model = draw_adapters(lorafast.adapt(unet(), 2, alpha=3))
    lorafast.save_adapter(model, tmp_path / "peft")
    file = tmp_path / "lora.safetensors"
    written = lorafast.export_adapter(tmp_path / "peft", "kohya-original", model=unet(), file=file)
    assert {key.partition(".")[0] for key in written} == {
        f"lora_unet_{name.replace('.', '_')}" for name in PAIRS.values()
    }
    back, before = (
        lorafast.import_adapter(file, unet()),
        lorafast.Adapter.from_folder(tmp_path / "peft"),
    )
    assert back.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in before.tensors.items())
    assert back.config["lora_alpha"] == 3


def test_refusals(tmp_path):
    lorafast.save_adapter(lorafast.adapt(unet(), 2), tmp_path)
    with pytest.raises(
        ValueError, match="model is NoneType, expected a U-Net for 'kohya-original'"
    ):
        lorafast.export_adapter(tmp_path, "kohya-original")
    with pytest.raises(ValueError, match="model is Group, expected None but for 'kohya-original'"):
        lorafast.export_adapter(tmp_path, "kohya", model=unet())
    with pytest.raises(ValueError, match="model is a Linear, expected a U-Net of diffusers"):
        lorafast.export_adapter(tmp_path, "kohya-original", model=nn.Linear(2, 2))
    few = unet(["conv_in", "conv_out"])
    with pytest.raises(ValueError, match="the original U-Net has no name for add_embedding"):
        lorafast.export_adapter(tmp_path, "kohya-original", model=few)
    key = "lora_unet_output_blocks_9_1_proj_in.lora_down.weight"
    with pytest.raises(
        ValueError, match=rf"{key}, and the model has no layer of that name \(the near"
    ):
        lorafast.import_adapter({key: torch.ones(2, 5)}, unet())

"""Layouts of diffusion models' files, there and back, and what they can't say."""

import json
import re

import pytest
import torch
from torch import nn

import lorafast

safetensors = pytest.importorskip("safetensors.torch")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(6, 4, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(4, 6), nn.Dropout(0.0)])


class UNet(nn.Module):
    """Layers of a diffusion model's names: dots and underscores, a list, convolutions."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention()})])
        self.proj_in = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        h = self.proj_in(self.conv_in(x)).movedim(1, -1)
        attention = self.down_blocks[0]["attn1"]
        return attention.to_out[0](attention.to_q(h))


class TextEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(5, 5), "out_proj": nn.Linear(5, 5)})


TARGETS = ["conv_in", "to_q", "to_out.0", "proj_in"]
X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2))


def unet():
    torch.manual_seed(1)
    return UNet()


@pytest.fixture
def adapter(tmp_path, draw_adapters):
    """One with an alpha of its own for one layer, and a scaling that isn't 1."""
    model = draw_adapters(lorafast.adapt(unet(), r=2, alpha=3, targets=TARGETS))
    model.proj_in.alpha = 5
    lorafast.save_adapter(model, tmp_path / "peft")
    return lorafast.Adapter.from_folder(tmp_path / "peft")


def output(adapter):
    return lorafast.load_adapter(unet(), adapter).eval()(X)


KEYS = {
    "kohya": "lora_unet_down_blocks_0_attn1_to_out_0.lora_down.weight",
    "diffusers": "unet.down_blocks.0.attn1.to_out.0.lora_A.weight",
    "diffusers-old": "unet.down_blocks.0.attn1.to_out.0.lora.down.weight",
}


@pytest.mark.parametrize("layout", KEYS)
def test_there_and_back(layout, adapter, tmp_path, assert_same):
    written = lorafast.export_adapter(adapter, layout, file=tmp_path / "lora.safetensors")
    assert KEYS[layout] in written
    back = lorafast.import_adapter(tmp_path / "lora.safetensors", unet(), folder=tmp_path / "back")
    if layout == "kohya":
        assert float(written["lora_unet_proj_in.alpha"]) == 5
        assert back.config["lora_alpha"] == 3
        assert back.tensors.keys() == adapter.tensors.keys()
        for key, tensor in adapter.tensors.items():
            assert torch.equal(back.tensors[key], tensor), key
    for source in (back, tmp_path / "back"):
        # B · scaling is rounded once where the layout has no alpha.
        assert_same(output(source), output(adapter), eps=8 * torch.finfo(torch.float32).eps)


def test_the_first_layout_of_diffusers(adapter):
    """Names of attention processors, and of text encoders after their projections."""
    plain = lorafast.export_adapter(adapter, "diffusers-old")
    old = {
        re.sub(r"attn1\.(to_\w+)(\.0)?\.lora\.", r"attn1.processor.\1_lora.", key): value
        for key, value in plain.items()
    }
    assert "unet.down_blocks.0.attn1.processor.to_out_lora.down.weight" in old
    back = lorafast.import_adapter(old, unet(), "unet")
    assert all(
        torch.equal(back.tensors[key], value)
        for key, value in lorafast.import_adapter(plain, unet()).tensors.items()
    )
    A, B = torch.ones(2, 5), torch.ones(5, 2)
    for name in ("to_out_lora.{}", "out_proj.lora_linear_layer.{}", "out_proj.lora.{}"):
        tensors = {
            f"text_encoder.self_attn.{name.format(end)}.weight": value
            for end, value in (("down", A), ("up", B))
        }
        found = lorafast.import_adapter(tensors, TextEncoder())
        assert [*found.tensors] == [
            f"base_model.model.self_attn.out_proj.lora_{one}.weight" for one in "AB"
        ]


def test_several_parts_in_one_file(adapter):
    encoder = {
        f"lora_te1_self_attn_q_proj.lora_{end}.weight": value
        for end, value in (("down", torch.ones(2, 5)), ("up", torch.ones(5, 2)))
    }
    older = {key.replace("te1_", "te1_text_model_"): value for key, value in encoder.items()}
    assert len(lorafast.import_adapter(older, TextEncoder()).tensors) == 2
    both = lorafast.export_adapter(adapter, "kohya") | encoder
    with pytest.raises(ValueError, match="adapters of unet and text_encoder: name one as part"):
        lorafast.import_adapter(both, unet())
    found = lorafast.import_adapter(both, TextEncoder(), "text_encoder")
    assert found.config["lora_alpha"] == 2  # without alpha it is r
    assert len(found.tensors) == 2
    assert len(lorafast.import_adapter(both, unet(), "unet").tensors) == 8
    again = lorafast.export_adapter(found, "kohya", "text_encoder", prefix="lora_te1_")
    assert all(torch.equal(again[key], value) for key, value in encoder.items())
    with pytest.raises(ValueError, match="the file has no adapter of text_encoder_2"):
        lorafast.import_adapter(both, TextEncoder(), "text_encoder_2")


def test_alpha_of_the_metadata(adapter, tmp_path):
    """diffusers writes PEFT's config there, a part's name before each field."""
    tensors = lorafast.export_adapter(adapter, "diffusers")
    written = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "unet.use_rslora": True,
        "unet.target_modules": ["x"],
    }
    file = tmp_path / "lora.safetensors"
    safetensors.save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(written)})
    model = lorafast.load_adapter(unet(), lorafast.import_adapter(file, unet()))
    assert model.proj_in.scaling == pytest.approx(6 / 2**0.5, rel=1e-15)
    for field, value in (("init_lora_weights", "pissa"), ("use_dora", True)):
        told = {"lora_adapter_metadata": json.dumps(written | {f"unet.{field}": value})}
        safetensors.save_file(tensors, file, metadata=told)
        with pytest.raises(ValueError, match=f"{field} in the metadata's lora_adapter_metadata is"):
            lorafast.import_adapter(file, unet())


def test_layers_called_as_other_adapters_are():
    """Endings say what a tensor is; other parts are left alone, and the result has its own memory."""
    net = nn.ModuleDict({"oft_proj": nn.Linear(2, 2), "lokr_": nn.Linear(2, 2)})
    tensors = {f"unet.{name}.lora_{one}.weight": torch.ones(2, 2) for name in net for one in "AB"}
    found = lorafast.import_adapter(tensors | {"transformer.x.hada_w1_a": X}, net, "unet")
    for key, tensor in found.tensors.items():
        given = tensors[key.replace("base_model.model", "unet")]
        assert torch.equal(tensor, given)
        assert tensor.data_ptr() != given.data_ptr()


def test_matrices_for_a_convolution_of_one_pixel(adapter):
    """Files from models with linear layers there, which compute the same."""
    tensors = lorafast.export_adapter(adapter, "kohya")
    flat = {k: v.flatten(1) if "proj_in.lora" in k else v for k, v in tensors.items()}
    back = lorafast.import_adapter(flat, unet())
    assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())


BAD = [
    (
        "lora_unet_conv_in.lora_mid.weight",
        (2, 2, 3, 3),
        "has lora_unet_conv_in.lora_mid.weight.*lora_mid",
    ),
    ("lora_unet_conv_in.hada_w1_a", (2, 2), "it is LoHa's"),
    ("lora_unet_conv_in.dora_scale", (6, 1), "it is DoRA's magnitude"),
    ("conv_in.scale", (1,), "has conv_in.scale, a name in no layout that is known"),
    ("lora_unet_input_blocks_1.lora_up.weight", (4, 2), "has no layer of that name"),
    ("unet.proj_im.lora_A.weight", (4, 2), r"no layer of that name \(the nearest is proj_in\)"),
    ("lora_unet_conv_in.lora_up.weight", (6, 2), "_conv_in.lora_up.weight, and no A for conv_in"),
    ("lora_unet_conv_in.alpha", (), "_conv_in.alpha, and no A for conv_in"),
]


@pytest.mark.parametrize(("key", "shape", "sentence"), BAD, ids=[key for key, *_ in BAD])
def test_keys_that_cannot_be(key, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        lorafast.import_adapter({key: torch.ones(shape)}, unet())


def test_shapes_and_names_that_do_not_fit(adapter, tmp_path):
    tensors = lorafast.export_adapter(adapter, "kohya")
    up = "lora_unet_conv_in.lora_up.weight"
    with pytest.raises(
        ValueError, match=rf"{up} has shape \[7, 2\], expected \[6, 2, 1, 1\] for conv_in"
    ):
        lorafast.import_adapter(tensors | {up: torch.ones(7, 2)}, unet())
    with pytest.raises(ValueError, match=rf"{up} has shape \[\], expected a matrix"):
        lorafast.import_adapter(tensors | {up: torch.ones(())}, unet())
    with pytest.raises(ValueError, match=r"conv_in\.alpha has shape \[2\]"):
        lorafast.import_adapter(tensors | {"lora_unet_conv_in.alpha": torch.ones(2)}, unet())
    with pytest.raises(ValueError, match=f"{up} and unet.conv_in.lora_B.weight, both B of conv_in"):
        lorafast.import_adapter(tensors | {"unet.conv_in.lora_B.weight": tensors[up]}, unet())
    twins = nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    pair = {f"lora_unet_a_b.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")}
    with pytest.raises(
        ValueError, match=r"lora_down\.weight, which may be a_b or a\.b of the model"
    ):
        lorafast.import_adapter(pair, twins)
    model = lorafast.adapt(twins, r=2)
    lorafast.save_adapter(model, tmp_path / "twins")
    with pytest.raises(ValueError, match=r"two layers get the name lora_unet_a_b\.lora_down"):
        lorafast.export_adapter(tmp_path / "twins", "kohya")
    with pytest.raises(ValueError, match="expected a linear layer or a convolution"):
        lorafast.import_adapter(pair, nn.ModuleDict({"a_b": nn.Embedding(2, 2)}))


def test_bad_arguments(adapter, tmp_path):
    with pytest.raises(ValueError, match="layout is 'a1111', expected 'kohya'"):
        lorafast.export_adapter(adapter, "a1111")
    with pytest.raises(ValueError, match="part is 'vae', expected one of unet"):
        lorafast.export_adapter(adapter, "kohya", "vae")
    with pytest.raises(
        ValueError, match="part is 'transformer', which kohya's layout has no prefix"
    ):
        lorafast.export_adapter(adapter, "kohya", "transformer")
    with pytest.raises(FileNotFoundError, match="is no file"):
        lorafast.import_adapter(tmp_path / "none", unet())
    with pytest.raises(OSError, match="it is no regular file"):
        lorafast.export_adapter(adapter, "kohya", file=tmp_path)
    with pytest.raises(TypeError, match=r"model is a str, expected an nn\.Module"):
        lorafast.import_adapter({}, "x")
    more = adapter.tensors | {"base_model.model.norm.weight": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"norm\.weight, and the layout 'kohya' holds adapters alone"
    ):
        lorafast.export_adapter(lorafast.Adapter(adapter.config, more), "kohya")
    with pytest.raises(ValueError, match="DoRA's magnitudes"):
        lorafast.export_adapter(
            lorafast.Adapter(adapter.config | {"use_dora": True}, adapter.tensors), "diffusers"
        )

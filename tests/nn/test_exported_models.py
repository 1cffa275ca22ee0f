"""An adapted model exported, of any batch and length; by AOTInductor it runs without lorafast."""

import subprocess
import sys

import pytest
import torch
from small_decoder import decoder, fill_adapters, tokens

import lorafast

OPTIONS = {
    "lora": {"dropout": 0.3},
    "dora": {"use_dora": True},
    "siblings": {"fuse": "siblings"},
    "nf4": {},
    "embedding": {"targets": ("embed_tokens", "q_proj")},
    "bottleneck": {"kind": "pfeiffer", "targets": ["layers.0.mlp"], "bottleneck": 4},
}
QUICK = [("lora", False), ("siblings", False)]


def model_of(kind):
    """The decoder with one of its layers, adapted."""
    model = decoder()
    del model.layers[1]
    if kind == "nf4":
        lorafast.quantize(model, "nf4")
    lorafast.adapt(model, **({} if kind == "bottleneck" else {"r": 4}) | OPTIONS[kind])
    fill_adapters(model)
    return model.eval()


def exported(model, strict=False):
    vary = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = (tokens(2, 8),)
    return torch.export.export(model, example, dynamic_shapes={"tokens": vary}, strict=strict)


def assert_near(found, expected):
    # float32, in another order of sums.
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "strict"),
    [
        pytest.param(kind, strict, marks=[pytest.mark.slow] * ((kind, strict) not in QUICK))
        for kind, strict in [*dict.fromkeys(OPTIONS, False).items(), ("lora", True)]
    ],
)
def test_export(kind, strict):
    model = model_of(kind)
    program = exported(model, strict)
    assert "lorafast" not in str(program.graph)
    module = program.module()
    for ids in (tokens(2, 8), tokens(3, 11, seed=4)):
        assert_near(module(ids), model(ids))
    # The adapter is a part of it, which these programs would notice the lack of.
    with lorafast.disabled(model):
        assert not torch.allclose(module(tokens(2, 8)), model(tokens(2, 8)), rtol=1e-2)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    """Compiled ahead of time, and loaded in a process that has no lorafast."""
    model = model_of("nf4")
    package = torch._inductor.aoti_compile_and_package(
        exported(model), package_path=str(tmp_path / "model.pt2")
    )
    given, result = tmp_path / "ids.pt", tmp_path / "logits.pt"
    several = [tokens(2, 8), tokens(3, 11, seed=4)]
    torch.save(several, given)
    code = (
        "import sys; sys.modules['lorafast'] = None\n"
        "import torch\n"
        f"run = torch._inductor.aoti_load_package({package!r})\n"
        f"torch.save([run(ids) for ids in torch.load({str(given)!r})], {str(result)!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    for ids, found in zip(several, torch.load(result), strict=True):
        assert_near(found, model(ids).detach())

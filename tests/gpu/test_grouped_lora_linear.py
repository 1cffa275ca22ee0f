"""The layer with an adapter per element, on the device: right, the same bits, nothing that waits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from circumstances import MEMORY, WORK, assert_same_bits
from helpers import assert_contract, stacked

from lorafast import reference
from lorafast.functional import grouped_lora_linear

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
E, T, K, N, r, n = 12, 40, 256, 384, 16, 5
SHORT = 8, 32, 48
"""T, K and N of sums that cuBLAS doesn't cut: a GEMM's long one it does, a batched one's it doesn't, and
either is as exact as float32 can be in its order."""
ADAPTER_OF = [0, 4, -1, 0, 0, 1, 4, 0, 2, -1, 0, 0]  # nobody has 3
LEAVES = ("x", "lora_A", "lora_B", "scaling")
FACTORS = ("x", "weight", "lora_A", "lora_B", "scaling")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIVEN = {
    "a list": lambda device: ADAPTER_OF,
    "on the CPU": lambda device: torch.tensor(ADAPTER_OF),
    "on the device": lambda device: torch.tensor(ADAPTER_OF, device=device),
}
given = pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)


def draw(device, dtype=torch.float64, sizes=(T, K, N)):
    rows, depth, width = sizes
    shapes = {"x": (E, rows, depth), "weight": (width, depth), "lora_A": (n, r, depth)}
    shapes |= {"lora_B": (n, width, r), "scaling": (n,), "bias": (width,), "dy": (E, rows, width)}
    return {name: torch.randn(s, dtype=dtype, device=device) for name, s in shapes.items()}


def outputs(layer, t, adapter_of):
    leaves = {name: t[name].detach().requires_grad_() for name in LEAVES}
    y = layer(
        leaves["x"], t["weight"], leaves["lora_A"], leaves["lora_B"], leaves["scaling"],
        adapter_of, t["bias"],
    )  # fmt: skip
    found = torch.autograd.grad(y, list(leaves.values()), t["dy"])
    return y.detach(), *found


@given
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_against_float64(device, given, dtype):
    # Of dscaling's few elements the error is luck: many layers together.
    drawn, adapter_of = [draw(device, sizes=SHORT) for _ in range(64)], given(device)

    def call(run, cast):
        return stacked(of_one(t, run, cast) for t in drawn)

    def of_one(t, run, cast):
        adapters = {name: cast(t[name], torch.float32) for name in LEAVES[1:]}
        layer = reference.grouped_lora_linear if run is reference else grouped_lora_linear
        return outputs(
            layer, {name: cast(v, dtype) for name, v in t.items()} | adapters, adapter_of
        )

    assert_contract(call, None, dtype, rounded_to=dtype)


@given
def test_the_bits_are_the_same_whatever_changes(device, given):
    t, adapter_of = draw(device, torch.bfloat16), given(device)
    assert_same_bits(lambda: outputs(grouped_lora_linear, t, adapter_of), MEMORY | WORK)


@given
@pytest.mark.parametrize("scaling", ["number", "tensor"])
def test_a_step_does_not_wait_for_the_device(device, given, scaling):
    t, adapter_of = draw(device, torch.bfloat16), given(device)

    def step():
        leaves = [t[name].detach().requires_grad_() for name in LEAVES[:3]]
        x, lora_A, lora_B = leaves
        scale = 0.5 if scaling == "number" else t["scaling"]
        y = grouped_lora_linear(x, t["weight"], lora_A, lora_B, scale, adapter_of, t["bias"])
        torch.autograd.grad(y, leaves, t["dy"])

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("lora_bias", [False, True], ids=["", "lora_bias"])
def test_a_mixed_batch_of_PEFTs_does_not_wait_for_the_device(device, lora_bias):
    peft = pytest.importorskip("peft")
    import lorafast

    def config(r):
        return peft.LoraConfig(
            r=r, target_modules=["0"], init_lora_weights=False, lora_bias=lora_bias
        )

    network = torch.nn.Sequential(torch.nn.Linear(K, N)).to(device, torch.bfloat16)
    model = peft.get_peft_model(network, config(16))
    model.add_adapter("other", config(4))
    model = lorafast.accelerate(model.eval(), quiet=True)
    x = torch.randn(4, T, K, device=device, dtype=torch.bfloat16)
    names = ["other", "default", "__base__", "other"]
    model(x, adapter_names=names)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, adapter_names=names).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_the_indices_on_the_device(device):
    t = draw(device, torch.bfloat16)
    adapter_of = torch.tensor(ADAPTER_OF, device=device)

    def forward():
        with torch.no_grad():
            return grouped_lora_linear(*(t[name] for name in FACTORS), adapter_of)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward()
    for shift in range(3):
        adapter_of.copy_(torch.tensor(ADAPTER_OF, device=device).roll(shift))
        t["x"].normal_()
        graph.replay()
        assert torch.equal(y, forward())


OUT_OF_RANGE = """
import torch
from lorafast.functional import grouped_lora_linear
ones = [torch.ones(s, device="cuda") for s in ((2, 8), (8, 8), (3, 1, 8), (3, 8, 1))]
grouped_lora_linear(*ones, 1.0, torch.tensor([0, INDEX], device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("index", [3, -2])
def test_an_index_out_of_range_is_a_device_side_assertion(index):
    code = OUT_OF_RANGE.replace("INDEX", str(index))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert process.returncode != 0
    # What PyTorch raises then is cuBLAS's error or the assertion's, by what comes next.
    assert "adapter_of holds an index that is not from -1 to 2" in process.stderr


@pytest.mark.parametrize("index", [3, -2])
def test_an_index_out_of_range_on_the_host_raises(device, index):
    t = draw(device, torch.float32)
    for adapter_of in ([index] * E, torch.tensor([index] * E)):
        with pytest.raises(ValueError, match="adapter_of holds"):
            outputs(grouped_lora_linear, t | {"lora_A": t["lora_A"][:3], "lora_B": t["lora_B"][:3],
                    "scaling": t["scaling"][:3]}, adapter_of)  # fmt: skip

"""An adapted model in what leaves Python: traced, scripted, exported, as ONNX.

None needs lorafast to run, and the adapter is in all of them.
"""

import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from toy_formats import NegativeLinear

import lorafast
from lorafast.functional import lora_linear
from lorafast.nn import LoRALinear
from lorafast.nn.lora_operand_linear import lora_linear_of

pytestmark = pytest.mark.usefixtures("toy_formats")
CASES = pytest.mark.parametrize(
    ("kind", "rows"), [(nn.Linear, 3), (nn.Linear, 300), (NegativeLinear, 3)]
)


def adapted(kind=nn.Linear, **more):
    """Layers on both sides of where the fused formula begins at 300 rows, with a trained adapter."""
    made = [nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 512), nn.Linear(512, 768)]
    if kind is not nn.Linear:
        made = [kind(layer) if isinstance(layer, nn.Linear) else layer for layer in made]
    model = nn.Sequential(*made)
    lorafast.adapt(model, r=4, **more)
    for layer in model:
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def without_lorafast(tmp_path_factory):
    """``without_lorafast(load, x)``: what a process without this package computes."""
    code = (
        "import sys; sys.modules['lorafast'] = None\n"
        "import torch\n"
        "for line in sys.stdin:\n"
        "    load, x, y = eval(line)\n"
        "    torch.save(eval(load)(torch.load(x)).detach(), y)\n"
        "    print(y, flush=True)\n"
    )
    folder = tmp_path_factory.mktemp("elsewhere")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def compute(load, x):
            given, found = str(folder / "x.pt"), str(folder / "y.pt")
            torch.save(x, given)
            print((load, given, found), file=process.stdin, flush=True)
            # Warnings are on the other stream; a process that fails says nothing here.
            assert process.stdout.readline() == f"{found}\n"
            return torch.load(found)

        yield compute
        process.stdin.close()


@CASES
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript(how, merged, kind, rows, tmp_path, without_lorafast):
    model, x = adapted(kind), torch.randn(rows, 96)
    if merged:
        for layer in model:
            if isinstance(layer, LoRALinear):
                layer.merge()
    script = torch.jit.trace(model, x) if how == "trace" else torch.jit.script(model)
    close(script(x), model(x))
    script.save(str(tmp_path / "model.pt"))
    file = str(tmp_path / "model.pt")
    close(without_lorafast(f"torch.jit.load({file!r})", x), model(x))
    more = torch.randn(rows + 1, 96)
    close(script(more), model(more))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_trains_the_parameters_of_the_layer():
    model, x = adapted(dropout=0.0), torch.randn(5, 96)
    torch.jit.script(model)(x).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert {name.rpartition(".")[2] for name in found} == {"lora_A", "lora_B"}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_script_of_half_precision_keeps_the_range_of_the_adapter(dtype):
    layer = LoRALinear(64, 48, 2, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.fill_(100.0)
        layer.lora_B.fill_(1e-3)
    x = torch.full((3, 64), 50.0, dtype=dtype)  # s is 320,000, out of float16's range
    y = torch.jit.script(layer)(x)
    close(y.float(), torch.full((3, 48), 2 * 320.0 * 1.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_of_float16_is_rounded_once():
    layer = LoRALinear(64, 48, 4, alpha=2800.0, dropout=0.5, bias=False, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.fill_(-600.0 / 64)
        layer.lora_A.fill_(1.0 / 64)
        layer.lora_B.fill_(1.0 / 4)
    x = torch.full((3, 64), 100.0, dtype=torch.float16)
    script = torch.jit.script(layer)
    assert script(torch.full((3, 64), 40_000.0, dtype=torch.float16)).dtype == torch.float16
    y = torch.jit.script(layer.eval())(x)
    torch.testing.assert_close(y, layer(x), rtol=2e-3, atol=0)
    assert y.isfinite().all()


def each(second, quick):
    """``CASES`` with a flag each; those that aren't ``quick`` are a second look."""
    cases = [(*case, flag) for flag in (False, True) for case in CASES.args[1]]
    marked = [pytest.param(*c, marks=[pytest.mark.slow] * (c not in quick)) for c in cases]
    return pytest.mark.parametrize(("kind", "rows", second), marked)


@each("strict", [(nn.Linear, 3, False), (nn.Linear, 300, True), (NegativeLinear, 3, False)])
def test_torch_export(strict, kind, rows, tmp_path, without_lorafast):
    model, x = adapted(kind), torch.randn(rows, 96)
    rows_vary = {"input": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (x,), dynamic_shapes=rows_vary, strict=strict)
    assert "lorafast" not in str(program.graph)
    close(program.module()(x), model(x))
    more = torch.randn(rows + 4, 96)
    close(program.module()(more), model(more))
    file = str(tmp_path / "model.pt2")
    torch.export.save(program, file)
    found = without_lorafast(f"torch.export.load({file!r}).module()", x)
    close(found, model(x))


@each("dynamo", [(nn.Linear, 300, False), (nn.Linear, 3, True), (NegativeLinear, 3, True)])
@pytest.mark.filterwarnings("ignore")
def test_onnx(dynamo, kind, rows, tmp_path):
    onnx = pytest.importorskip("onnx")
    if dynamo:
        pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, x = adapted(kind), torch.randn(rows, 96)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file if dynamo else str(file), dynamo=dynamo, verbose=False)
    exported = onnx.load(file)
    (y,) = ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x.numpy()})
    close(torch.from_numpy(y), model(x))


@pytest.mark.parametrize(
    ("kind", "function"), [(nn.Linear, lora_linear), (NegativeLinear, lora_linear_of)]
)
def test_fx_has_a_node_for_a_layer_and_its_parameters(kind, function):
    model, x = adapted(kind), torch.randn(5, 96)
    traced = torch.fx.symbolic_trace(model)
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [function] * 3
    close(traced(x), model(x))
    traced(x).sum().backward()
    trained = {name for name, p in traced.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_is_traced_with_what_it_has_learnt():
    model, x = adapted(), torch.randn(300, 96)
    model(x).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 1e-4 * parameter.grad
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), buffer)
    buffer.seek(0)
    close(torch.jit.load(buffer)(x), model(x))

"""The page that builds a format: it runs, and what it builds is exact."""

import sys
from pathlib import Path

import pages
import pytest
import torch

import lorafast
from lorafast import operands

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "add-a-format.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's file, to be imported from where it says it is."""
    root = tmp_path_factory.mktemp("page")
    pages.write_files(PAGE, root)
    with pytest.MonkeyPatch.context() as patch:
        folders = [*operands.__path__, str(root / "lorafast" / "operands")]
        patch.setattr(operands, "__path__", folders)
        yield
    sys.modules.pop("lorafast.operands.rowwise", None)


@pytest.fixture
def rowwise(page):
    from lorafast.operands.rowwise import Rowwise

    operands.register(Rowwise)
    yield Rowwise
    operands.unregister("rowwise")


def test_the_page_runs_and_prints_what_it_shows(page):
    before = operands.formats()
    try:
        names = pages.run(PAGE)
    finally:
        for name in set(operands.formats()) - set(before):
            operands.unregister(name)
    assert names["x"].grad is not None
    assert names["weight"].integers.dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_stores_what_it_can_hold_without_loss(rowwise, dtype):
    weight = torch.randint(-127, 128, (5, 6)).to(dtype) / 8
    weight[:, 0] = 127 / 8
    weight[2] = 0
    stored = rowwise.of(weight)
    assert torch.equal(stored.dense(), weight)
    assert stored.dense().dtype == dtype
    assert torch.equal(stored.rows(1, 3), weight[1:3])


@pytest.mark.parametrize("integers", [torch.zeros(5, 6), torch.zeros(5, dtype=torch.int8)])
def test_what_makes_none_is_refused(rowwise, integers):
    x, A, B = torch.randn(3, 6), torch.randn(2, 6), torch.randn(5, 2)
    with pytest.raises(ValueError, match="expected int8"):
        torch.ops.lorafast.lora_linear(
            x, [integers, torch.ones(5)], "rowwise|integers,scales||", A, B, 1.0
        )


def test_compiled(rowwise):
    torch._dynamo.reset()
    layer = lorafast.nn.LoRALinear.from_operand(rowwise.of(torch.randn(48, 64)), 4)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, layer))
    torch.testing.assert_close(found, expected)

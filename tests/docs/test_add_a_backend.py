"""The page that builds a backend: it runs, and what it builds keeps every promise of a backend."""

import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pages
import pytest
import torch
from helpers import assert_contract, problems, several, stacked
from hypothesis import given
from toy_formats import FORMATS, held

pytest.importorskip("numpy")

import lorafast
from lorafast.backends import Plan, Refusal, registry
from lorafast.backends.forced import use_backend
from lorafast.cli import main
from lorafast.core.problem import LAYER_OPERATIONS, OPERATIONS, WANTS, Problem
from lorafast.functional import lora_linear
from lorafast.ops.problems import on_backend

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "add-a-backend.md"
CPU = torch.device("cpu")
SEED = torch.tensor([2026])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's files, to be imported from where they say they are."""
    root = tmp_path_factory.mktemp("page")
    pages.write_files(PAGE, root)
    package = sys.modules["lorafast.backends"]  # the attribute is the function of this name
    with pytest.MonkeyPatch.context() as patch:
        folders = [*package.__path__, str(root / "lorafast" / "backends")]
        patch.setattr(package, "__path__", folders)
        yield root
    for name in [name for name in sys.modules if name.startswith("lorafast.backends.numpy")]:
        del sys.modules[name]


@pytest.fixture
def numpy(page):
    from lorafast.backends.numpy import NumPy

    registry.register(NumPy())
    yield registry.get("numpy")
    registry.unregister("numpy")


@pytest.mark.slow
def test_the_page_runs_and_prints_what_it_shows(page, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # lorafast verify takes ten seconds more with it
    before = registry.names()
    registry.forget_plans()
    try:
        names = pages.run(PAGE)
        assert registry.names() == before
    finally:
        for name in set(registry.names()) - set(before):
            registry.unregister(name)
        registry.forget_plans()
    assert names["status"] == 0
    assert names["x"].grad is not None
    assert names["layer"].lora_A.grad is not None


def operation_calls(p, t):
    def x(cast):
        return p.lay_out(cast(t.x))

    def dy(cast):
        return p.lay_out(cast(t.dy))

    low = lorafast.reference.wide(p.dtype)
    adapter = p.adapter_dtype
    return {
        "shrink": lambda run, cast: run.shrink(
            x(cast), cast(t.lora_A, adapter), p.dropout_p, t.seed
        ),
        "expand": lambda run, cast: run.expand(
            p.lay_out(cast(t.s, low)), cast(t.lora_B, adapter), 0.7, p.dropout_p, t.seed,
            dtype=cast(t.dy).dtype,
        ),
        "linear_expand": lambda run, cast: run.linear_expand(
            x(cast), cast(t.weight), cast(t.s, low), cast(t.lora_B, adapter), 0.7, cast(t.bias)
        ),
        "dx": lambda run, cast: run.linear_expand(
            dy(cast), cast(t.weight), cast(t.ds, low), cast(t.lora_A, adapter).t(), 1.0, None,
            p.dropout_p, t.seed, transposed=True,
        ),
        "expand_backward": lambda run, cast: run.expand_backward(
            dy(cast), cast(t.s, low), cast(t.lora_B, adapter), 0.7
        ),
        "shrink_backward": lambda run, cast: run.shrink_backward(
            cast(t.ds, low), x(cast), p.dropout_p, t.seed, cast(t.lora_A, adapter).dtype
        ),
    }  # fmt: skip


@given(p=problems())
def test_each_operation_keeps_the_contract(numpy, p):
    for call in operation_calls(p, p.tensors(CPU)).values():
        assert_contract(call, on_backend("numpy"), p.dtype)


@given(p=problems())
@pytest.mark.parametrize(
    "format",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("dense", "nf4"))) for n in FORMATS],
)
def test_a_layer_and_its_gradients_keep_the_contract(numpy, toy_formats, format, p):
    drawn = several(p, CPU)

    def outputs(t, layer, cast):
        leaves = [
            p.lay_out(cast(t.x)).detach().requires_grad_(),
            cast(t.lora_A, p.adapter_dtype).detach().requires_grad_(),
            cast(t.lora_B, p.adapter_dtype).detach().requires_grad_(),
        ]
        x, lora_A, lora_B = leaves
        store = FORMATS[format] if layer is lorafast.ops else functools.partial(held, format)
        arguments = (x, store(cast(t.weight)), lora_A, lora_B, 0.5, cast(t.bias))
        with use_backend("numpy"):
            y = layer.lora_linear(*arguments, dropout_p=p.dropout_p, seed=t.seed)
            return y.detach(), *torch.autograd.grad(y, leaves, cast(t.dy))

    def call(layer, cast):
        return stacked(outputs(t, layer, cast) for t in drawn)

    assert_contract(call, lorafast.ops, p.dtype, rounded_to=p.dtype)


NAMES = ("x", "weight", "lora_A", "lora_B", "bias")


@pytest.mark.parametrize(
    "names", [s for n in range(1, 6) for s in itertools.combinations(NAMES, n)], ids="+".join
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_any_of_the_gradients_alone(numpy, names, dropout_p):
    shapes = ((3, 7), (5, 7), (2, 7), (5, 2), (5,))
    leaves = {name: torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=True)}

    def gradients(backend):
        t = {name: leaf.clone().requires_grad_(name in names) for name, leaf in leaves.items()}
        x, weight, lora_A, lora_B, bias = t.values()
        with use_backend(backend):
            y = lorafast.ops.lora_linear(x, weight, lora_A, lora_B, 0.5, bias, dropout_p, SEED)
            return torch.autograd.grad(y.square().sum(), [t[name] for name in names])

    for found, expected in zip(gradients("numpy"), gradients("reference"), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_is_not_wanted_is_not_computed(numpy):
    sizes = {"M": 3, "K": 7, "N": 5, "r": 2}
    dy, s, B = torch.randn(3, 5), torch.randn(3, 2), torch.randn(5, 2)
    for wants in (("ds",), ("dB",), ("dbias",), ("ds", "dbias")):
        problem = Problem(
            "expand_backward", **sizes, dtype=torch.float32, adapter_dtype=torch.float32,
            device=CPU, wants=wants,
        )  # fmt: skip
        found = numpy.plan(problem).run(
            dy, s if "dB" in wants else None, B if "ds" in wants else None, 0.5
        )
        given = [tensor is not None for tensor in found]
        assert given == [name in wants for name in WANTS["expand_backward"]]


@pytest.mark.parametrize("operation", [*OPERATIONS, *LAYER_OPERATIONS])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("meta")}, "an input is on meta, NumPy's arrays are in the CPU's"),
        ({"plain": False}, "an input is a tensor subclass or on another device"),
        ({"dtype": torch.float64}, "the dtype is torch.float64, NumPy computes"),
        ({"adapter_dtype": torch.float64}, "the dtype is torch.float64, NumPy computes"),
    ],
    ids=["device", "plain", "dtype", "adapter_dtype"],
)
def test_what_it_says_it_refuses(numpy, operation, change, reason):
    fields = {
        "dtype": torch.float32, "adapter_dtype": torch.float32, "device": CPU,
        "wants": WANTS.get(operation, ()),
    }  # fmt: skip
    assert isinstance(numpy.plan(Problem(operation, 1, 8, 8, 2, **fields)), Plan)
    answer = numpy.plan(Problem(operation, 1, 8, 8, 2, **fields | change))
    assert isinstance(answer, Refusal)
    assert answer.reason.startswith(reason)


def test_an_operation_to_come_is_refused(numpy):
    problem = Problem("norm_shrink", 1, 8, 8, 2, torch.float32, torch.float32, CPU)
    reason = "norm_shrink is none of the operations in NumPy"
    assert numpy.plan(problem) == Refusal("numpy", reason)


def test_without_numpy_it_is_not_usable(numpy, monkeypatch):
    from lorafast.backends.numpy import backend

    # Its own view of importlib: other backends keep what they find.
    nothing = SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(backend, "importlib", SimpleNamespace(util=nothing))
    registry.forget_plans()
    assert str(lorafast.backends()["numpy"]) == "numpy: NumPy is not installed (pip install numpy)"
    t = [torch.randn(s) for s in ((1, 8), (6, 8), (2, 8), (6, 2))]
    with use_backend("numpy"), pytest.raises(lorafast.BackendError, match="NumPy is not installed"):
        lora_linear(*t, 0.5)
    lora_linear(*t, 0.5)


def test_auto_runs_it_where_it_is_ahead(numpy, monkeypatch):
    from lorafast.backends.numpy import operations

    rows, forward = [], operations.lora_linear
    monkeypatch.setattr(
        operations, "lora_linear", lambda x, *rest: rows.append(len(x)) or forward(x, *rest)
    )
    layer = lorafast.nn.LoRALinear(64, 32, 8)
    for M in (1, 2):
        layer(torch.randn(M, 64))
    assert rows == [1]


def test_compiled_code_runs_it(numpy):
    t = [torch.randn(s) for s in ((4, 8), (6, 8), (2, 8), (6, 2))]
    t[2].requires_grad_()
    compiled = torch.compile(lora_linear, backend="aot_eager")
    with use_backend("numpy"):
        y = compiled(*t, 0.5)
        (dA,) = torch.autograd.grad(y.sum(), t[2])
    expected = lora_linear(*t, 0.5)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dA, torch.autograd.grad(expected.sum(), t[2])[0])


def test_info_lists_it(numpy, capsys):
    assert main(["info"]) == 0
    assert re.search(r"^backend numpy +usable$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_the_folder_and_two_lines_put_it_in_the_tree(tmp_path):
    package = tmp_path / "lorafast"
    shutil.copytree(
        ROOT / "lorafast", package, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True
    )
    for top in ("kernels", "bench", "pyproject.toml"):  # beside the package, as in a checkout
        (tmp_path / top).symlink_to(ROOT / top)
    pages.write_files(PAGE, tmp_path)
    listing = package / "backends" / "__init__.py"
    text = listing.read_text(encoding="utf-8")
    first = "from lorafast.backends.plan import"
    last = "Reference()):"
    assert first in text
    assert last in text
    text = text.replace(first, f"from lorafast.backends.numpy import NumPy\n{first}")
    listing.write_text(text.replace(last, "Reference(), NumPy()):"), encoding="utf-8")

    def python(*words, **environment):
        return subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)} | environment,
        ).stdout

    said = python("-m", "lorafast", "info", LORAFAST_BACKEND="numpy")
    assert re.search(r"^backend numpy +usable$", said, re.MULTILINE)
    assert "numpy for every operation (forced by LORAFAST_BACKEND)" in said
    said = python(
        "-m", "lorafast", "bench", "--against", "numpy,frozen", "--shapes", "4,16,16",
        "--rank", "2", "--seconds", "0.1", "--device", "cpu",
    )  # fmt: skip
    assert re.search(r"^ +numpy +[\d.]+ µs", said, re.MULTILINE), said
    assert "WRONG" not in said

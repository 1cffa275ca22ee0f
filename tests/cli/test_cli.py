import functools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lorafast
from lorafast import reference
from lorafast.backends import Backend, Refusal, grouping, registry
from lorafast.backends.aten import operations as aten
from lorafast.cli import main, verify
from lorafast.core.problem import (
    BOTTLENECK_OPERATIONS,
    GROUPED_OPERATIONS,
    LAYER_OPERATIONS,
    SCALED_OPERATIONS,
)


def test_info_lists_versions_devices_and_backends(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^lorafast +{re.escape(lorafast.__version__)}$", out, re.M)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.M)
    for name, status in lorafast.backends().items():
        line = next(line for line in out.splitlines() if line.startswith(f"backend {name} "))
        assert line.endswith("usable" if status.usable else status.reason)
    assert "chosen" in out


def test_info_says_which_backend_is_forced(capsys):
    with lorafast.use_backend("reference"):
        main(["info"])
    assert "reference for every operation (forced" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["lorafast", pytest.param("python -m lorafast", marks=pytest.mark.slow)]
)
def test_both_ways_to_call_it(command):
    prefix = [sys.executable, "-m", "lorafast"]
    if command == "lorafast":
        prefix = [str(Path(sys.executable).with_name("lorafast"))]
    process = subprocess.run([*prefix, "info"], capture_output=True, text=True, check=True)
    assert process.stdout.startswith("lorafast ")


QUANTIZED = 3
"""Formats that what reads the weight is run over too."""


FEW = ((1, 1, 1, 1), (5, 33, 17, 3))


@pytest.mark.parametrize(
    "shapes", [FEW, pytest.param(verify._SHAPES, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_verify_passes_on_this_machine(capsys, monkeypatch, shapes):
    monkeypatch.setattr(verify, "_SHAPES", shapes)
    assert main(["verify", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^\d+ passed, 0 failed$", out, re.M)
    for name, status in lorafast.backends().items():
        assert (re.search(rf"^{name} +shrink ", out, re.M) is not None) == status.usable
        has = status.usable and "grouped_lora_linear" in registry.get(name).operations
        for operation in GROUPED_OPERATIONS:
            assert (re.search(rf"^{name} +{operation} ", out, re.M) is not None) == has


def test_verify_has_bottlenecks(capsys, monkeypatch):
    monkeypatch.setattr(verify, "_SHAPES", ((70, 20, 13, 2),))
    monkeypatch.setattr(verify, "_calls", lambda shape, p, dtype, of, format: (
        verify._bottleneck_calls(shape, lambda *size: torch.randn(size, dtype=torch.float64))
        if format == "dense" and not p else {}
    ))  # fmt: skip
    assert main(["verify", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    for name, status in lorafast.backends().items():
        for operation in BOTTLENECK_OPERATIONS:
            assert (re.search(rf"^{name} +{operation} ", out, re.M) is not None) == status.usable
    torch.manual_seed(0)
    wrong = aten_bottleneck(registry.get("aten"))
    with registry.standing_in(wrong):
        assert main(["verify", "--dtype", "fp32"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert [line.split()[:2] for line in failed] == [["aten", "bottleneck"]]


def test_verify_has_layers_with_a_vector(capsys, monkeypatch):
    monkeypatch.setattr(verify, "_calls", lambda shape, p, dtype, of, format: (
        verify._scaled_calls(shape, lambda *size: torch.randn(size, dtype=torch.float64))
        if format == "dense" and not p else {}
    ))  # fmt: skip
    assert main(["verify", "--dtype", "fp32", "bf16"]) == 0
    out = capsys.readouterr().out
    for name, status in lorafast.backends().items():
        has = status.usable and "scaled_linear" in registry.get(name).operations
        for operation in SCALED_OPERATIONS:
            assert (re.search(rf"^{name} +{operation} ", out, re.M) is not None) == has


def aten_bottleneck(stock):
    """Of a backend, one whose bottleneck is off by its sign."""

    def negated(y, a):
        return -y, a

    class Wrong(type(stock)):
        def plan(self, problem):
            found = super().plan(problem)
            if problem.operation != "bottleneck":
                return found
            return replace(found, run=lambda *given: negated(*found.run(*given)))

    return Wrong()


def test_verify_fails_on_a_batch_that_is_grouped_wrongly(capsys, monkeypatch):
    monkeypatch.setattr(verify, "_SHAPES", ((5, 33, 17, 3),))
    monkeypatch.setattr(grouping.Grouping, "of_groups", lambda self, factors: factors.flip(0))
    assert main(["verify", "--dtype", "fp32"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    usable = [n for n in ("aten", "cpu", "triton") if lorafast.backends()[n].usable]
    expected = [[backend, name] for backend in usable for name in GROUPED_OPERATIONS]
    assert [line.split()[:2] for line in failed] == expected


class Picky(Backend):
    """The definition, of few rows."""

    name = "cuda"

    def plan(self, problem):
        if problem.M > 5:
            return Refusal(self.name, f"M is {problem.M}, the kernels serve up to 5")
        return registry.definition(problem)


def test_verify_says_what_a_backend_refuses_and_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(verify, "_SHAPES", ((5, 33, 17, 3), (70, 20, 13, 2)))
    with registry.standing_in(Picky()):
        assert main(["verify", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "cuda: shrink not run everywhere, M is 70, the kernels serve up to 5\n" in out
    assert re.search(r"^cuda +shrink +fp32 +\(5, 33, 17, 3\)", out, re.M)


def test_verify_asks_each_backend_to_allow_checks(monkeypatch):
    allowed = []
    for name in registry.names():
        allow = functools.partial(lambda name, device: allowed.append((name, device.type)), name)
        monkeypatch.setattr(registry.get(name), "allow_checks", allow)
    monkeypatch.setattr(verify, "_SHAPES", ())
    assert main(["verify", "--device", "cpu"]) == 0
    assert allowed == [(name, "cpu") for name in registry.names()]


@pytest.mark.slow
def test_triton_that_was_imported_before_is_not_interpreted():
    """It has read its variable then."""
    pytest.importorskip("triton")
    code = (
        "import triton; from lorafast.cli import main; "
        "main(['verify', '--device', 'cpu', '--dtype', 'fp32'])"
    )
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert "triton: not run, " in out
    assert out.endswith(" passed, 0 failed\n")


@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=pytest.mark.slow), "bf16"])
def test_verify_passes_in_every_dtype(capsys, monkeypatch, dtype):
    monkeypatch.setattr(verify, "_SHAPES", ((5, 33, 17, 3),))
    assert main(["verify", "--dtype", dtype]) == 0
    assert "0 failed" in capsys.readouterr().out


def with_a_nan(result):
    result[1, 2] = math.nan
    return result


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [(torch.neg, "off by "), (with_a_nan, "nan at [1, 2], expected ")],
    ids=["sign", "nan"],
)
def test_verify_fails_on_a_wrong_backend(capsys, monkeypatch, wrong, sentence):
    monkeypatch.setattr(verify, "_SHAPES", ((5, 33, 17, 3),))
    monkeypatch.setattr(
        aten,
        "shrink_backward",
        lambda dtype: lambda *given: wrong(reference.shrink_backward(*given, dtype)),
    )
    registry.forget_plans()
    try:
        assert main(["verify", "--dtype", "fp32"]) == 1
    finally:
        registry.forget_plans()
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if "FAILED" in line]
    # Alone, and in a layer's backward, whatever its weight is stored as.
    operations = ["lora_linear_backward", "shrink_backward"] + ["lora_linear_backward"] * QUANTIZED
    assert [line.split()[:2] for line in failed] == [["aten", name] for name in operations]
    assert f" FAILED: {sentence}" in failed[1]


def test_verify_fails_on_a_quantized_weight_that_is_read_wrongly(capsys, monkeypatch):
    """By the native kernels of a CPU: what the reference makes of it isn't theirs."""
    if not registry.backends()["cpu"].usable:
        pytest.skip("the native kernels are not built")
    from lorafast.backends.cpu import dequantize

    right = dequantize.part

    def wrong(weight, *others):
        made = right(weight, *others)
        return made.neg_() if weight.format == "int8" else made

    monkeypatch.setattr(verify, "_SHAPES", ((129, 33, 17, 3),))  # of few rows none is made dense
    monkeypatch.setattr(dequantize, "part", wrong)
    assert main(["verify", "--dtype", "fp32"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    operations = ["lora_linear", "lora_linear_backward", "dx", "linear_expand"]
    assert [line.split()[:3] for line in failed] == [["cpu", name, "int8"] for name in operations]


def test_verify_fails_on_a_layer_that_is_wrong_though_its_operations_are_right(capsys, monkeypatch):
    """Of a backend that has a plan of its own for it."""

    class Wrong(type(registry.get("reference"))):
        name = "wrong"

        def plan(self, problem):
            plan = super().plan(problem)
            if problem.operation not in LAYER_OPERATIONS:
                return plan
            return replace(plan, run=lambda *given: (-plan.run(*given)[0], *plan.run(*given)[1:]))

    monkeypatch.setattr(verify, "_SHAPES", ((5, 33, 17, 3),))
    registry.register(Wrong())
    try:
        assert main(["verify", "--dtype", "fp32"]) == 1
    finally:
        registry.unregister("wrong")
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    expected = [["wrong", name] for name in LAYER_OPERATIONS] * (1 + QUANTIZED)
    assert [line.split()[:2] for line in failed] == expected


def test_a_command_is_required():
    with pytest.raises(SystemExit):
        main([])


@pytest.mark.parametrize(
    "device", ["foo", "mps", "meta", "", "cuda:x", "cuda:-1", "cpu:1000", "cuda:1 "]
)
def test_verify_names_a_device_that_is_none(capsys, device):
    assert main(["verify", "--device", device]) == 2
    assert capsys.readouterr().err == (
        f"lorafast verify: --device is {device!r}, expected cpu, cuda or cuda:<index>\n"
    )


@pytest.mark.parametrize("device", ["cuda:99", "cuda:256"])
def test_verify_names_a_gpu_that_is_not_there(capsys, device):
    assert main(["verify", "--device", device]) == 2
    assert f"--device is {device!r}, and PyTorch sees" in capsys.readouterr().err


def test_packing_asks_for_its_variable_where_it_is_needed(monkeypatch):
    from lorafast.operands import packed

    monkeypatch.setenv(packed.ENVIRONMENT_VARIABLE, "-5")
    monkeypatch.setattr(packed, "_memory", packed._granted_at_import())
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    assert packed.linear(x, weight, None).shape == (2, 4)
    sentence = "LORAFAST_PACK_MEMORY is '-5', expected a number of bytes"
    for _ in range(2):
        with torch.inference_mode(), pytest.raises(ValueError, match=sentence):
            packed.linear(x, weight, None)
    packed.allow_packing(0)
    with torch.inference_mode():
        assert packed.linear(x, weight, None).shape == (2, 4)


def test_info_says_how_much_may_be_packed(capsys, monkeypatch):
    from lorafast.operands import packed

    monkeypatch.setattr(packed, "why_unavailable", lambda: None)
    monkeypatch.setattr(packed, "_memory", 3 << 20)
    main(["info"])
    assert "packed weights          usable, in bfloat16; 3 MiB granted\n" in capsys.readouterr().out

"""Where Triton's launchers can't be executed: each reason is one sentence."""

import re

import pytest
import torch

pytest.importorskip("triton")

from lorafast.kernels.common.launch import INTERPRETED
from lorafast.kernels.shrink import shrink

from ptx import Fault, executed

compiles = pytest.mark.skipif(INTERPRETED, reason="needs a process without TRITON_INTERPRET")
A = torch.ones(16, 32, dtype=torch.bfloat16)


def run(x=A, **options):
    with executed.executed(**options):
        return shrink(x, A, 0.0, None)


def refused(sentence, error=ValueError):
    return pytest.raises(error, match=f"^{re.escape(sentence)}$")


def test_while_triton_is_interpreted(monkeypatch):
    monkeypatch.setattr(executed, "INTERPRETED", True)
    with refused("executing Triton's PTX needs a process without TRITON_INTERPRET", RuntimeError):
        run(arch=90)


@pytest.mark.parametrize("arch", [12, 70, "90", 90.0, None])
def test_what_is_no_architecture(monkeypatch, arch):
    monkeypatch.setattr(executed, "INTERPRETED", False)
    with refused(f"arch is {arch!r}, expected a compute capability from 75 on, as 90"):
        run(arch=arch)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"resident": 0}, "resident is 0, expected an integer from 1 to 2**31 - 1"),
        ({"late": "never"}, "late is 'never', expected one of late, random, soon"),
        ({"seed": -1}, "seed is -1, expected an integer from 0 to 2**64 - 1"),
    ],
    ids=str,
)
def test_what_is_no_schedule(monkeypatch, options, sentence):
    monkeypatch.setattr(executed, "INTERPRETED", False)
    with refused(sentence):
        run(arch=90, **options)


@compiles
@pytest.mark.executed
def test_an_architecture_that_triton_lacks():
    with pytest.raises(
        ValueError, match=r"^Triton makes no PTX of shrink_kernel for arch=200: .+$"
    ):
        run(arch=200)


@compiles
@pytest.mark.executed
def test_what_a_fault_calls_a_tensor():
    """As the kernel's parameter; what it leaves out is said with its place."""
    edit = re.compile(r"^\s*@\S+ st\.global.*$", re.MULTILINE)
    with pytest.raises(
        Fault,
        match=r"^512 bytes of \w+ are never written, the first in \[0, 0\]; its shape is \[16, 16\]$",
    ):
        run(arch=80, edit=lambda ptx: edit.sub("", ptx))


@compiles
@pytest.mark.executed
def test_a_view_of_what_the_block_makes_is_used_as_the_whole_is():
    with executed.executed(arch=80):
        shrink(torch.zeros(17, 32, dtype=torch.bfloat16)[1:], A, 0.0, None)
    with pytest.raises(Fault, match="undefined value"), executed.executed(arch=80):
        shrink(torch.empty(17, 32, dtype=torch.bfloat16)[1:], A, 0.0, None)

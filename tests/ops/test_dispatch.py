import asyncio
import dataclasses
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lorafast
from lorafast.functional import lora_linear
from lorafast.nn import LoRALinear
from lorafast.ops import backend, dispatch, native


def tensors(dtype=torch.float32):
    return [torch.randn(s, dtype=dtype) for s in ((4, 8), (6, 8), (2, 8), (6, 2))]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_backends_say_why_they_are_not_usable(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = lorafast.backends()
    assert list(status) == ["reference", "aten", "triton", "cpu"]
    assert status["aten"].usable
    assert status["aten"].reason is None
    assert not status["triton"].usable
    assert "set TRITON_INTERPRET=1" in status["triton"].reason


def test_triton_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(backend, "_installed", lambda name: False)
    assert lorafast.backends()["triton"].reason == "Triton is not installed (pip install triton)"


def test_old_interpreter_with_new_numpy_is_said(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    versions = {"triton": (3, 6), "numpy": (2, 4)}
    monkeypatch.setattr(backend, "_version", versions.__getitem__)
    assert "upgrade Triton" in lorafast.backends()["triton"].reason


@pytest.mark.parametrize("name", ["reference", "aten", "triton"])
def test_forced_backends_agree(name):
    if not lorafast.backends()[name].usable:
        pytest.skip(lorafast.backends()[name].reason)
    x, weight, lora_A, lora_B = tensors()
    expected = lorafast.reference.lora_linear(x, weight, lora_A, lora_B, 0.5)
    with lorafast.use_backend(name):
        found = lora_linear(x, weight, lora_A, lora_B, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_choice_nests_and_ends_with_the_block():
    assert dispatch.forced() is None
    with lorafast.use_backend("reference"):
        with lorafast.use_backend("auto"):
            assert dispatch.forced() is None
        assert dispatch.forced() == "reference"
        with pytest.raises(KeyError), lorafast.use_backend("aten"):
            raise KeyError
        assert dispatch.forced() == "reference"
    assert dispatch.forced() is None


def test_overlapping_blocks_of_threads_leave_no_choice_behind():
    """Each thread has its own; the first to enter is the first to leave."""
    seen, entered, left = {}, threading.Barrier(2), threading.Event()

    def first():
        with lorafast.use_backend("reference"):
            entered.wait()
            seen["first"] = dispatch.forced()
        left.set()
        seen["first, after"] = dispatch.forced()

    def second():
        with lorafast.use_backend("aten"):
            entered.wait()
            left.wait()
            seen["second"] = dispatch.forced()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen["first"], seen["second"]) == ("reference", "aten")
    assert dispatch.forced() is None


def test_a_thread_without_a_block_follows_the_latest_open_one():
    """Autograd's threads on a GPU and nn.DataParallel's, which run what the block's thread asked for."""

    def of_another_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(dispatch.forced).result()

    with lorafast.use_backend("aten"):
        with lorafast.use_backend("reference"):
            assert of_another_thread() == "reference"
        assert of_another_thread() == "aten"
    assert of_another_thread() is None


def test_a_task_that_outlives_its_block_keeps_no_choice():
    async def late(ended):
        await ended.wait()
        return dispatch.forced()

    async def main():
        ended = asyncio.Event()
        with lorafast.use_backend("reference"):
            task = asyncio.create_task(late(ended))
            await asyncio.sleep(0)
        ended.set()
        return await task

    assert asyncio.run(main()) is None


def test_a_wrong_environment_variable_stops_the_first_call_and_no_import():
    code = (
        "import torch, lorafast; t = torch.ones(2, 2)\n"
        "try: lorafast.functional.lora_linear(t, t, t, t, 1.0)\n"
        "except ValueError as error: print(error)"
    )
    run = run_python(code, LORAFAST_BACKEND="cutlass")
    assert run.stdout.startswith("LORAFAST_BACKEND is 'cutlass', expected one of auto, reference")


def test_unknown_backend_is_refused():
    message = "name is 'cutlass', expected one of auto, reference, aten, triton"
    with pytest.raises(ValueError, match=message), lorafast.use_backend("cutlass"):
        pass


def test_forced_backend_that_cannot_serve_raises_with_the_reason():
    x, weight, lora_A, lora_B = tensors(torch.float64)
    with (
        lorafast.use_backend("triton"),
        pytest.raises(lorafast.BackendError, match="backend 'triton' can't serve lora_linear: "),
    ):
        lora_linear(x, weight, lora_A, lora_B, 0.5)


def test_triton_refuses_mixed_devices_and_subclasses(monkeypatch):
    class Wrapped(torch.Tensor):
        pass

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, _, lora_A, _ = tensors()
    why = dispatch.why_not("triton", "shrink", (x, lora_A.to("meta")))
    assert why == "the inputs are on cpu and meta, expected one device"
    why = dispatch.why_not("triton", "shrink", (x, lora_A.as_subclass(Wrapped)))
    assert why == "an input is a Wrapped, the kernels read plain tensors"


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    x, weight, lora_A, lora_B = tensors()
    lora_A.requires_grad_()
    with lorafast.use_backend("reference"):
        y = lora_linear(x, weight, lora_A, lora_B, 0.5)
    chosen = []
    select = dispatch.select

    def spy(operation, name, *rest):
        chosen.append((operation, name))
        return select(operation, name, *rest)

    monkeypatch.setattr(dispatch, "select", spy)
    y.sum().backward()
    assert chosen == [("shrink", "reference"), ("shrink_backward", "reference")]


def test_environment_variable_forces():
    code = "import lorafast; from lorafast.ops import dispatch; print(dispatch.forced())"
    assert run_python(code, LORAFAST_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(code, LORAFAST_BACKEND="").stdout.strip() == "None"
    wrong = run_python(code, LORAFAST_BACKEND="fast")
    assert wrong.returncode != 0
    assert "LORAFAST_BACKEND is 'fast', expected one of" in wrong.stderr


def test_importing_lorafast_does_not_import_triton():
    code = "import sys, lorafast; print('lorafast.kernels.shrink' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


def test_explain_names_choice_and_reasons(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = torch.nn.Sequential(LoRALinear(8, 8, 2), torch.nn.ReLU(), LoRALinear(8, 4, 2))
    explanation = lorafast.explain(model.double())
    assert set(explanation.layers) == {"0", "2"}
    choice = explanation.layers["0"][0]
    assert (choice.operation, choice.backend) == ("shrink", "aten")
    assert "no CUDA device" in choice.others["triton"]
    text = str(explanation)
    assert "shrink, linear_expand, expand_backward, shrink_backward: aten" in text
    assert "not triton: no CUDA device" in text


def test_explain_takes_the_dtype_of_x_and_says_what_a_forced_backend_lacks(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer = LoRALinear(8, 8, 2)
    with lorafast.use_backend("triton"):
        served = lorafast.explain(layer, torch.randn(3, 8))
        refused = lorafast.explain(layer, torch.randn(3, 8, dtype=torch.float64))
    assert served.layers["(module)"][0].backend == "triton"
    assert refused.layers["(module)"][0].backend is None
    assert "the dtype is torch.float64" in str(refused)


def test_explain_without_a_layer_is_refused():
    with pytest.raises(ValueError, match="has no LoRALinear"):
        lorafast.explain(torch.nn.Linear(2, 2))


@pytest.mark.skipif(native.why_not_loaded() is not None, reason="the native kernels are not built")
class TestAutomaticChoiceOnACPU:
    """The rules that were measured: a mask; bfloat16 up to rank 32; float32 from 128 rows."""

    @pytest.fixture(autouse=True)
    def _has_avx512(self, monkeypatch):
        monkeypatch.setattr(native, "multiplies_bfloat16", lambda: True)
        monkeypatch.setattr(native, "has_avx512", lambda: True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_a_mask(self, dtype):
        x, lora_A = torch.empty(3, 4, dtype=dtype), torch.empty(99, 4)
        assert dispatch.automatic_choice("shrink", x, lora_A, torch.tensor([1]))[0] == "cpu"

    def test_float16_without_a_mask(self):
        x = torch.empty(128, 4, dtype=torch.float16)
        assert dispatch.automatic_choice("shrink", x, torch.empty(2, 4), None)[0] == "aten"

    @pytest.mark.parametrize(
        ("dtype", "missing"),
        [(torch.bfloat16, "multiplies_bfloat16"), (torch.float32, "has_avx512")],
        ids=str,
    )
    def test_the_instructions_that_it_was_measured_with(self, monkeypatch, dtype, missing):
        x, lora_A = torch.empty(128, 4, dtype=dtype), torch.empty(2, 4)
        assert dispatch.automatic_choice("shrink", x, lora_A, None)[0] == "cpu"
        monkeypatch.setattr(native, missing, lambda: False)
        assert dispatch.automatic_choice("shrink", x, lora_A, None)[0] == "aten"

    @pytest.mark.parametrize(
        ("dtype", "few"), [(torch.float32, "aten"), (torch.bfloat16, "cpu")], ids=str
    )
    def test_rows(self, dtype, few):
        for M, expected in ((127, few), (128, "cpu")):
            x = torch.empty(M, 4, dtype=dtype)
            assert dispatch.automatic_choice("shrink", x, torch.empty(2, 4), None)[0] == expected
            layer = LoRALinear(400, 600, 2, dtype=dtype)
            x = torch.empty(M, 400, dtype=dtype)
            chosen = {c.backend for c in lorafast.explain(layer, x).layers["(module)"]}
            assert chosen == {expected}

    def test_a_small_layer_takes_the_fewest_calls(self):
        layer = LoRALinear(40, 60, 2)
        text = str(lorafast.explain(layer, torch.empty(128, 40)))
        assert "aten (a layer so small that the fewest calls are the fastest)" in text

    def test_the_rank_of_every_operation(self):
        M, K, N = 128, 40, 50
        for r, expected in ((32, "cpu"), (33, "aten")):
            x, dy, s = (torch.empty(M, n, dtype=torch.bfloat16) for n in (K, N, r))
            weight = torch.empty(N, K, dtype=torch.bfloat16)
            lora_A, lora_B = torch.empty(r, K), torch.empty(N, r)
            for operation, tensors in (
                ("shrink", (x, lora_A)),
                ("expand_backward", (dy, s, lora_B)),
                ("shrink_backward", (s, x)),
            ):
                assert dispatch.automatic_choice(operation, *tensors)[0] == expected
            for tensors in ((x, weight, s, lora_B, None), (dy, weight.t(), s, lora_A.t(), None)):
                assert dispatch.automatic_choice("linear_expand", *tensors)[0] == "cpu"

    def test_the_whole_layer_goes_where_its_shrink_goes(self):
        from lorafast.ops import cpu

        def whole(M, r, dtype, seed=None, backend=None):
            x, weight = torch.empty(M, 8, dtype=dtype), torch.empty(6, 8, dtype=dtype)
            lora_A, lora_B = torch.empty(r, 8), torch.empty(6, r)
            return dispatch.select_whole(
                "lora_linear", backend, x, lora_A, seed, weight, lora_B, None
            )

        assert whole(4, 32, torch.bfloat16) is cpu.lora_linear
        assert whole(4, 33, torch.bfloat16) is None
        assert whole(4, 33, torch.bfloat16, torch.tensor([1])) is cpu.lora_linear
        assert whole(127, 4, torch.float32) is None
        assert whole(127, 4, torch.float32, backend="cpu") is cpu.lora_linear
        assert whole(128, 4, torch.float32, backend="aten") is None
        with pytest.raises(lorafast.BackendError, match=r"can't serve lora_linear: the dtype is"):
            whole(128, 4, torch.float64, backend="cpu")

    def test_what_the_kernels_refuse(self):
        double, meta = torch.empty(3, 4, dtype=torch.float64), torch.empty(3, 4, device="meta")
        assert dispatch.automatic_choice("shrink", double, double)[0] == "aten"
        assert dispatch.automatic_choice("shrink", meta, meta)[0] == "aten"

    def test_explain_knows_mask_and_rank(self):
        layer = LoRALinear(80, 80, 40, dropout=0.1, dtype=torch.bfloat16)
        chosen = {c.backend for c in lorafast.explain(layer).layers["(module)"]}
        assert chosen == {"cpu"}  # the whole layer goes where its shrink goes
        chosen = {c.operation: c.backend for c in lorafast.explain(layer.eval()).layers["(module)"]}
        assert chosen == {
            "shrink": "aten",
            "linear_expand": "cpu",
            "expand_backward": "aten",
            "shrink_backward": "aten",
        }

    def test_without_the_library_it_is_aten(self, monkeypatch):
        missing = dataclasses.replace(backend.CPU, why_unusable=lambda: "not built")
        monkeypatch.setitem(backend.BACKENDS, "cpu", missing)
        assert (
            dispatch.automatic_choice("shrink", torch.empty(3, 4), torch.empty(2, 4))[0] == "aten"
        )
        y = LoRALinear(600, 800, 2)(torch.randn(64, 600))
        assert y.shape == (64, 800)

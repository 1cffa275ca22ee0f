import asyncio
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers import skip_unless_usable
from torch._subclasses.fake_tensor import FakeTensorMode

import lorafast
from lorafast.backends import Backend, Plan, Refusal, forced, registry
from lorafast.backends.cpu import native
from lorafast.core.problem import LAYER_OPERATIONS, OPERATIONS, Problem
from lorafast.functional import lora_linear
from lorafast.nn import LoRALinear
from lorafast.ops.problems import FROZEN, layer_problem


def tensors(dtype=torch.float32):
    return [torch.randn(s, dtype=dtype) for s in ((4, 8), (6, 8), (2, 8), (6, 2))]


def problem(operation, M=3, K=400, N=600, r=2, dtype=torch.float32, **fields):
    fields = {"device": torch.device("cpu"), "adapter_dtype": torch.float32} | fields
    if operation in ("expand_backward", "lora_linear_backward"):
        fields.setdefault("wants", FROZEN if operation in LAYER_OPERATIONS else ("ds", "dB"))
    elif operation == "lora_linear":
        fields.setdefault("wants", ("y", "s"))
    return Problem(operation, M, K, N, r, dtype, **fields)


def chosen(operation, **fields):
    return registry.choose(problem(operation, **fields)).backend


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
    assert tuple(status) == registry.names()
    assert status["aten"].usable
    assert status["aten"].reason is None
    assert not status["triton"].usable
    assert "set TRITON_INTERPRET=1" in status["triton"].reason


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
    assert forced.forced() is None
    with lorafast.use_backend("reference"):
        with lorafast.use_backend("auto"):
            assert forced.forced() is None
        assert forced.forced() == "reference"
        with pytest.raises(KeyError), lorafast.use_backend("aten"):
            raise KeyError
        assert forced.forced() == "reference"
    assert forced.forced() is None


def test_overlapping_blocks_of_threads_leave_no_choice_behind():
    """Each thread has its own; the first to enter is the first to leave."""
    seen, entered, left = {}, threading.Barrier(2), threading.Event()

    def first():
        with lorafast.use_backend("reference"):
            entered.wait()
            seen["first"] = forced.forced()
        left.set()
        seen["first, after"] = forced.forced()

    def second():
        with lorafast.use_backend("aten"):
            entered.wait()
            left.wait()
            seen["second"] = forced.forced()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (seen["first"], seen["second"]) == ("reference", "aten")
    assert forced.forced() is None


def test_a_thread_without_a_block_follows_the_latest_open_one():
    """Autograd's threads on a GPU and nn.DataParallel's, which run what the block's thread asked for."""

    def of_another_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(forced.forced).result()

    with lorafast.use_backend("aten"):
        with lorafast.use_backend("reference"):
            assert of_another_thread() == "reference"
        assert of_another_thread() == "aten"
    assert of_another_thread() is None


def test_a_task_that_outlives_its_block_keeps_no_choice():
    async def late(ended):
        await ended.wait()
        return forced.forced()

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
    assert run.stdout.startswith("LORAFAST_BACKEND is 'cutlass', expected one of auto, aten")


def test_unknown_backend_is_refused():
    message = f"name is 'cutlass', expected one of auto, {', '.join(registry.names())}$"
    with pytest.raises(ValueError, match=message), lorafast.use_backend("cutlass"):
        pass


def test_forced_backend_that_cannot_serve_raises_with_the_reason():
    x, weight, lora_A, lora_B = tensors(torch.float64)
    with (
        lorafast.use_backend("triton"),
        pytest.raises(lorafast.BackendError, match="backend 'triton' can't serve lora_linear: "),
    ):
        lora_linear(x, weight, lora_A, lora_B, 0.5)


def test_kernels_refuse_mixed_devices_and_subclasses(monkeypatch):
    class Wrapped(torch.Tensor):
        pass

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, weight, lora_A, lora_B = tensors()
    for other in (lora_A.to("meta"), lora_A.as_subclass(Wrapped)):
        problem = layer_problem(x, weight, other, lora_B, None, False, ("y",), layouts=True)
        for name in ("triton", "cpu"):
            answer = registry.plan_of(name, problem)
            assert isinstance(answer, Refusal)
            assert "plain tensors" in answer.reason or "built" in answer.reason


def test_a_sparse_weight_is_left_to_pytorch():
    x, weight, lora_A, lora_B = tensors()
    lora_A.requires_grad_()
    expected = lora_linear(x, weight, lora_A, lora_B, 0.5)
    found = lora_linear(x, weight.to_sparse(), lora_A, lora_B, 0.5)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("error")
def test_a_fake_layer_on_a_gpu_that_is_not_here():
    with FakeTensorMode():
        fake = [torch.empty(tensor.shape, device="cuda") for tensor in tensors()]
    y = lora_linear(*fake, 0.5)  # outside the mode
    assert (y.shape, y.device.type) == ((4, 6), "cuda")


@pytest.mark.parametrize("name", ["aten", "cpu", "triton"])
def test_the_backward_reads_what_was_saved_as_it_lies_now(name):
    """Hooks of autograd may give it back in another layout: offloading to pinned memory does."""
    skip_unless_usable(name)
    half = torch.bfloat16
    x, weight, A, B = (torch.randn(s, dtype=half) for s in ((40, 64), (96, 64), (8, 64), (96, 8)))
    leaves = [tensor.requires_grad_() for tensor in (x, A, B)]
    dy = torch.randn(40, 96, dtype=half)

    def turn(tensor):
        return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor

    with lorafast.use_backend(name):
        y = lora_linear(x, weight, A, B, 0.5)
        with torch.autograd.graph.saved_tensors_hooks(turn, lambda tensor: tensor):
            again = lora_linear(x, weight, A, B, 0.5)
    expected = torch.autograd.grad(y, leaves, dy)
    found = torch.autograd.grad(again, leaves, dy)
    torch.testing.assert_close(found, expected)


def test_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    x, weight, lora_A, lora_B = tensors()
    lora_A.requires_grad_()
    with lorafast.use_backend("reference"):
        y = lora_linear(x, weight, lora_A, lora_B, 0.5)
    chosen = []
    choose = registry.choose

    def spy(problem, name=None):
        chosen.append((problem.operation, problem.wants, name))
        return choose(problem, name)

    monkeypatch.setattr(registry, "choose", spy)
    y.sum().backward()
    assert chosen == [("lora_linear_backward", ("dA",), "reference")]


def test_environment_variable_forces():
    code = "import lorafast; from lorafast.backends import forced; print(forced.forced())"
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
    forward, backward = explanation.layers["0"]
    assert (forward.operation, forward.backend) == ("lora_linear", "aten")
    assert "no CUDA device" in forward.others["triton"]
    assert (backward.operation, backward.backend) == ("lora_linear_backward", "aten")
    text = str(explanation)
    assert "lora_linear: aten (no measurement on this device shows another backend ahead" in text
    assert "shrink on aten: one product" in text
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
        registry.forget_plans()
        yield
        registry.forget_plans()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_a_mask(self, dtype):
        for operation in ("shrink", "expand"):
            assert chosen(operation, M=3, r=99, dtype=dtype, dropout=True) == "cpu"

    def test_float16_without_a_mask(self):
        assert chosen("shrink", M=128, r=2, dtype=torch.float16) == "aten"

    @pytest.mark.parametrize(
        ("dtype", "missing"),
        [(torch.bfloat16, "multiplies_bfloat16"), (torch.float32, "has_avx512")],
        ids=str,
    )
    def test_the_instructions_that_it_was_measured_with(self, monkeypatch, dtype, missing):
        assert chosen("shrink", M=128, dtype=dtype) == "cpu"
        monkeypatch.setattr(native, missing, lambda: False)
        registry.forget_plans()
        assert chosen("shrink", M=128, dtype=dtype) == "aten"

    @pytest.mark.parametrize(
        ("dtype", "few"), [(torch.float32, "aten"), (torch.bfloat16, "cpu")], ids=str
    )
    def test_rows(self, dtype, few):
        for M, expected in ((127, few), (128, "cpu")):
            assert chosen("shrink", M=M, dtype=dtype) == expected
            layer = LoRALinear(400, 600, 2, dtype=dtype)
            x = torch.empty(M, 400, dtype=dtype)
            found = {c.backend for c in lorafast.explain(layer, x).layers["(module)"]}
            assert found == {expected}

    def test_a_small_layer_takes_the_fewest_calls(self):
        layer = LoRALinear(40, 60, 2)
        text = str(lorafast.explain(layer, torch.empty(128, 40)))
        assert "aten (a layer so small that the fewest calls are the fastest)" in text

    def test_small_in_bfloat16_ends_earlier(self):
        for K, expected in ((60, "aten"), (70, "cpu")):
            size = {"M": 16, "K": K, "N": 64, "wants": ("y",)}
            half = torch.bfloat16
            assert chosen("lora_linear", dtype=half, adapter_dtype=half, **size) == expected
        assert chosen("lora_linear", M=128, K=70, N=64, wants=("y",)) == "aten"

    def test_the_tiniest_layer_is_merged_where_nothing_is_lost(self):
        """In bfloat16 W + scaling · B·A would round the update away."""
        tiny = {"M": 4, "K": 64, "N": 64, "r": 8, "wants": ("y",)}
        plans = {
            dtype: registry.choose(problem("lora_linear", dtype=dtype, adapter_dtype=dtype, **tiny))
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        }
        calls = {dtype: plan.launches[0].split()[0] for dtype, plan in plans.items()}
        assert list(calls.values()) == ["2", "2", "3", "3"]

    @pytest.mark.parametrize("fields", [{"K": 8, "N": 9, "r": 10}, {"plain": False}], ids=str)
    def test_the_tiniest_layer_is_not_merged(self, fields):
        """The rank is not low; W may know no call but F.linear."""
        tiny = {"M": 4, "K": 64, "N": 64, "r": 8, "wants": ("y",)} | fields
        assert registry.choose(problem("lora_linear", **tiny)).launches[0].startswith("3 calls")

    @pytest.mark.parametrize("where", [{"tf32": True}, {"device": torch.device("cuda")}], ids=str)
    def test_nothing_is_merged_where_products_are_rounded_or_it_was_not_measured(self, where):
        tiny = {"M": 4, "K": 64, "N": 64, "r": 8, "wants": ("y",)}
        merged, apart = (
            registry.plan_of("aten", problem("lora_linear", **tiny, **more)) for more in ({}, where)
        )
        assert merged.launches[0].startswith("2 calls")
        assert not apart.launches[0].startswith("2 calls")

    def test_the_rank_of_every_operation(self):
        for r, expected in ((32, "cpu"), (33, "aten")):
            for operation in OPERATIONS:
                found = chosen(operation, M=128, r=r, dtype=torch.bfloat16)
                always = {"linear_expand": "cpu", "expand": "aten"}  # whatever the rank
                assert found == always.get(operation, expected)

    def test_the_whole_layer_goes_where_its_shrink_goes(self):
        def forward(M, r, dtype, dropout=False):
            return chosen("lora_linear", M=M, r=r, dtype=dtype, dropout=dropout)

        assert forward(4, 64, torch.bfloat16) == "cpu"
        assert forward(63, 65, torch.bfloat16) == "aten + cpu"
        assert forward(64, 128, torch.bfloat16) == "cpu"
        assert forward(64, 129, torch.bfloat16) == "aten + cpu"
        assert forward(4, 65, torch.bfloat16, dropout=True) == "cpu"
        assert forward(127, 4, torch.float32) == "aten"
        assert forward(128, 4, torch.float32) == "cpu"
        double = problem("lora_linear", M=128, dtype=torch.float64)
        with pytest.raises(lorafast.BackendError, match=r"can't serve lora_linear: the dtype is"):
            registry.choose(double, "cpu")

    def test_what_the_kernels_refuse(self):
        assert chosen("shrink", dtype=torch.float64) == "aten"
        assert chosen("shrink", device=torch.device("meta")) == "aten"

    def test_explain_knows_mask_and_rank(self):
        layer = LoRALinear(160, 160, 129, dropout=0.1, dtype=torch.bfloat16)
        found = {c.backend for c in lorafast.explain(layer).layers["(module)"]}
        assert found == {"cpu"}
        forward, backward = lorafast.explain(layer.eval()).layers["(module)"]
        assert forward.backend == backward.backend == "aten + cpu"
        assert [line.split(":")[0] for line in forward.launches] == [
            "shrink on aten", "linear_expand on cpu",
        ]  # fmt: skip
        assert [line.split(":")[0] for line in backward.launches] == [
            "expand_backward on aten", "shrink_backward on aten", "linear_expand on cpu",
        ]  # fmt: skip

    def test_without_the_library_it_is_aten(self, monkeypatch):
        monkeypatch.setattr(native, "why_not_loaded", lambda: "not built")
        registry.forget_plans()
        assert chosen("shrink", M=128) == "aten"
        y = LoRALinear(600, 800, 2)(torch.randn(64, 600))
        assert y.shape == (64, 800)


class Timed(Backend):
    """Serves everything in the time it was given, or refuses."""

    def __init__(self, name, seconds=None, measured=False, ahead=None, reason=None):
        self.name, self._reason = name, reason
        self._plan = Plan(name, print, ("nothing",), seconds, "a test", measured, ahead)

    def plan(self, problem):
        return self._plan if self._reason is None else Refusal(self.name, self._reason)


@pytest.fixture
def register():
    names = []

    def add(*backends):
        for backend in backends:
            registry.register(backend)
            names.append(backend.name)

    yield add
    for name in names:
        registry.unregister(name)


@pytest.mark.parametrize("operation", [*OPERATIONS, *LAYER_OPERATIONS])
class TestTheChoice:
    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch):
        """Of PyTorch's own backends there is aten, which has no time on a CPU."""
        others = [name for name in registry.names() if name != "aten"]
        for name in others:
            monkeypatch.delitem(registry._backends, name)
        registry.forget_plans()
        yield
        monkeypatch.undo()
        registry.forget_plans()

    def test_the_least_time(self, register, operation):
        register(Timed("slow", 2e-6), Timed("fast", 1e-6), Timed("untimed"))
        assert chosen(operation) == "fast"

    def test_measured_before_modelled(self, register, operation):
        register(Timed("modelled", 1e-6), Timed("measured", 2e-6, measured=True))
        assert chosen(operation) == "measured"

    def test_a_measured_rule_before_any_time_the_later_before_the_earlier(
        self, register, operation
    ):
        register(Timed("first", 9e-6, ahead="so"), Timed("second", ahead="so"), Timed("fast", 1e-9))
        assert chosen(operation) == "second"

    def test_without_a_time_the_first_that_can_serve_it(self, register, operation):
        register(Timed("other"))
        assert chosen(operation) == "aten"

    def test_a_refusal_is_passed_over_and_raised_when_forced(self, register, operation):
        register(Timed("fast", 1e-9, reason="it is Friday"))
        assert chosen(operation) == "aten"
        message = f"backend 'fast' can't serve {operation}: it is Friday"
        with pytest.raises(lorafast.BackendError, match=message):
            registry.choose(problem(operation), "fast")

    def test_plans_are_made_once_until_they_are_forgotten(self, monkeypatch, register, operation):
        asked = []
        plan = Timed.plan
        monkeypatch.setattr(Timed, "plan", lambda self, p: asked.append(p) or plan(self, p))
        register(Timed("fast", 1e-9))
        for _ in range(2):
            registry.choose(problem(operation))
        first = len(asked)
        assert asked.count(problem(operation)) == 1
        registry.forget_plans()
        registry.choose(problem(operation))
        assert len(asked) == 2 * first


def test_a_name_is_taken_once(register):
    register(Timed("mine"))
    for name in ("mine", "auto", "aten"):
        with pytest.raises(ValueError, match=f"there is a backend '{name}' already"):
            registry.register(Timed(name))


def test_a_name_is_a_word():
    for name in ("", "a b", "a + b"):
        with pytest.raises(ValueError, match=f"name is '{re.escape(name)}', expected a word"):
            registry.register(Timed(name))


@pytest.fixture
def copy_of_reference():
    """Another backend that computes; gone at the end, if not before."""

    class Copy(type(registry.get("reference"))):
        name = "copy"
        plain_pytorch = False

    registry.register(Copy())
    yield
    if "copy" in registry.names():
        registry.unregister("copy")


@pytest.mark.usefixtures("copy_of_reference")
class TestABackendThatIsRegisteredNoMore:
    def test_a_call_in_its_block(self):
        t = tensors()
        with lorafast.use_backend("copy"):
            lora_linear(*t, 0.5)
            registry.unregister("copy")
            message = "backend 'copy' can't serve lora_linear: it is registered no more"
            with pytest.raises(lorafast.BackendError, match=message):
                lora_linear(*t, 0.5)
            with pytest.raises(lorafast.BackendError, match="backend 'copy' can't serve lora_lin"):
                torch.func.vmap(lambda x: lora_linear(x, *t[1:], 0.5))(t[0])
            explained = str(lorafast.explain(LoRALinear(8, 6, 2)))
        assert "none (copy is forced and can't: it is registered no more)" in explained
        lora_linear(*t, 0.5)

    def test_the_backward_of_its_forward(self):
        x, weight, lora_A, lora_B = tensors()
        lora_B.requires_grad_()
        with lorafast.use_backend("copy"):
            y = lora_linear(x, weight, lora_A, lora_B, 0.5)
        registry.unregister("copy")
        with pytest.raises(lorafast.BackendError, match="lora_linear_backward: it is registered n"):
            y.sum().backward()

    def test_registered_again_it_serves_again(self):
        t, copy = tensors(), registry.get("copy")
        with lorafast.use_backend("copy"):
            registry.unregister("copy")
            with pytest.raises(lorafast.BackendError):
                lora_linear(*t, 0.5)
            registry.register(copy)
            lora_linear(*t, 0.5)


def test_a_backend_that_comes_after_layers_ran_serves_the_next_call(register):
    t = tensors()
    lora_linear(*t, 0.5)
    served = []

    def run(*arguments):
        served.append("late")
        return lorafast.reference.linear_expand(t[0], t[1], t[0][:, :2], t[3], 0.0), None

    late = Timed("late")
    late._plan = Plan("late", run, ("a test",), ahead="so", differentiable=True)
    late.plan = lambda p: (
        late._plan if p.operation == "lora_linear" else Refusal("late", "the layer alone")
    )
    register(late)
    lora_linear(*t, 0.5)
    assert served == ["late"]


def test_a_plan_that_was_begun_before_plans_were_forgotten_is_not_kept(register):
    """As when another thread registers a backend meanwhile."""
    answers = []

    class Overtaken(Backend):
        name = "overtaken"

        def plan(self, problem):
            answers.append(problem)
            if len(answers) == 1:
                registry.forget_plans()
            return registry.plan_of("aten", problem)

    register(Overtaken())
    x, weight, lora_A, lora_B = tensors()
    with lorafast.use_backend("overtaken"):
        for _ in range(3):
            lora_linear(x, weight, lora_A, lora_B, 0.5)
    assert len(answers) == 2


def test_an_answer_that_is_neither_plan_nor_refusal(register):
    silent = Timed("silent")
    silent.plan = lambda p: None
    register(silent)
    for name in (None, "silent"):
        message = "backend 'silent' answered shrink with None, expected a Plan or a Refusal"
        with pytest.raises(TypeError, match=message):
            registry.choose(problem("shrink"), name)


@pytest.mark.parametrize(
    ("operation", "fields"),
    [
        ("shrink", {}),
        ("lora_linear", {"wants": ("y", "s")}),
        ("lora_linear", {"wants": ("y",), "dropout": True}),
    ],
)
def test_a_differentiable_plan_that_nobody_can_follow(register, operation, fields):
    wrong = Timed("wrong")
    wrong._plan = replace(wrong._plan, differentiable=True)
    register(wrong)
    with pytest.raises(TypeError, match=f"backend 'wrong' answered {operation} with a differentia"):
        registry.choose(problem(operation, **fields), "wrong")


def test_what_a_plan_raises_is_raised_whatever_is_chosen(register):
    """A backend with a fault is not passed over."""

    def plan(p):
        raise RuntimeError("a fault of the backend's own")

    faulty = Timed("faulty")
    faulty.plan = plan
    register(faulty)
    for name in (None, "faulty"):
        with pytest.raises(RuntimeError, match="a fault of the backend's own"):
            registry.choose(problem("shrink"), name)


def test_a_class_is_no_backend():
    with pytest.raises(TypeError, match=r"backend is <class '.*Timed'>, expected an object"):
        registry.register(Timed)


def test_explain_says_what_lost_and_why(register):
    register(
        Timed("early", ahead="on Mondays"),
        Timed("late", ahead="on Tuesdays"),
        Timed("timed", seconds=2e-6),
    )
    registry.get("timed")._plan = replace(registry.get("timed")._plan, source="")
    text = str(lorafast.explain(LoRALinear(8, 8, 2)))
    assert "lora_linear: late (on Tuesdays)\n" in text
    assert "not early: ahead by a rule (on Mondays), but registered before\n" in text
    assert "not timed: 2 µs\n" in text


@pytest.mark.parametrize("name", registry.names())
def test_no_backend_is_asked_for_an_operation_that_it_does_not_know(name):
    answer = registry.plan_of(name, problem("stretch"))
    assert answer == Refusal(name, "it has no stretch")

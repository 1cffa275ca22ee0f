"""The choice on a GPU, without one: records, the model, what explain says of it."""

import pytest
import torch
from lorafast.kernels.tables import tuned

from lorafast.ops import on_gpu, roofline
from lorafast.ops.roofline import Device, Problem, estimate

H200 = Device.of(90, 132)
OPERATIONS = ("shrink", "linear_expand", "expand_backward", "shrink_backward")


def problem(M=8192, K=4096, N=4096, r=16, masked=False, size=2):
    return Problem(M, K, N, r, size, 4, masked)


def test_a_device_is_its_architecture_times_its_multiprocessors():
    assert Device(790e12, 4.2e12).flops == pytest.approx(H200.flops, rel=0.01)
    assert H200.bandwidth == pytest.approx(4.2e12, rel=0.02)
    assert Device.of(103, 148) == Device.of(100, 148)


def test_a_large_product_is_bound_by_arithmetic_and_a_pass_by_bandwidth():
    product = estimate("linear_expand", "triton", problem(), H200)
    assert product.flops == 2 * 8192 * 4096 * 4096
    assert product.seconds == pytest.approx(product.flops / H200.flops / 0.92, rel=0.02)
    shrink = estimate("shrink", "triton", problem(), H200)
    assert shrink.bytes == 8192 * 4096 * 2
    assert shrink.seconds == pytest.approx(shrink.bytes / H200.bandwidth / 0.85 + 3e-6)


def test_a_tiny_call_costs_its_launches():
    tiny = problem(4, 64, 64)
    assert estimate("shrink", "triton", tiny, H200).seconds == pytest.approx(3e-6, rel=0.01)
    assert estimate("expand_backward", "aten", tiny, H200).seconds == pytest.approx(6e-6, rel=0.01)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_more_of_anything_never_costs_less(operation, backend):
    base = estimate(operation, backend, problem(), H200).seconds
    for change in ({"M": 16384}, {"r": 256}, {"masked": True}):
        assert estimate(operation, backend, problem(**change), H200).seconds >= base


def test_thin_operations_go_to_triton_and_the_bare_product_to_the_vendor():
    for operation in ("shrink", "expand_backward", "shrink_backward"):
        assert on_gpu.modelled(operation, problem(), H200)[0] == "triton"
    assert on_gpu.modelled("linear_expand", problem(), H200)[0] == "aten"
    # Under a mask PyTorch's composition of Philox costs more than the product gains.
    assert on_gpu.modelled("linear_expand", problem(masked=True), H200)[0] == "triton"
    assert on_gpu.modelled("linear_expand", problem(masked=True, size=4), H200)[0] == "aten"


@pytest.mark.parametrize("whole", ["lora_linear", "lora_linear_backward"])
def test_the_whole_layer_is_chosen_where_the_model_gains(whole):
    for p in (problem(), problem(masked=True), problem(N=1024), problem(M=512)):
        together = estimate(whole, "triton", p, H200).seconds
        alone = sum(
            estimate(name, on_gpu.modelled(name, part, H200)[0], part, H200).seconds
            for name, part in on_gpu.parts(whole, p)
        )
        backend, reason = on_gpu.modelled_whole(whole, p, H200)
        assert backend == ("triton" if together < alone else None)
        assert ("µs one by one" in reason) is (backend is not None)
    assert on_gpu.modelled_whole(whole, problem(size=4), H200) == (None, "")


def test_a_layer_rides_where_its_launch_does():
    """A pass that no tile hides is no reason for the vendor's product to go."""
    for operation in ("lora_linear", "lora_linear_backward"):
        assert on_gpu.helps(operation, problem(), torch.bfloat16, 90, 132)
        assert not on_gpu.helps(operation, problem(M=512), torch.bfloat16, 90, 132)
        assert not on_gpu.helps(operation, problem(), torch.bfloat16, 80, 108)
    assert not on_gpu.helps("lora_linear", problem(masked=True), torch.bfloat16, 90, 132)
    assert on_gpu.helps("lora_linear_backward", problem(masked=True), torch.bfloat16, 90, 132)


def test_float16_has_no_helpers_and_a_product_of_its_own():
    for operation in ("lora_linear", "lora_linear_backward"):
        assert not on_gpu.helps(operation, problem(), torch.float16, 90, 132)
    # What PyTorch's calls have in float32, they copy.
    widened = Problem(8192, 4096, 4096, 16, 2, 4, False, widened=True)
    for operation in OPERATIONS:
        assert on_gpu.modelled(operation, widened, H200)[0] == "triton"
        times = [estimate(operation, "aten", p, H200) for p in (problem(), widened)]
        assert times[0].bytes < times[1].bytes
        assert times[0].seconds < times[1].seconds


def test_what_reads_float16_is_found_by_its_dtype(monkeypatch):
    """``ds`` comes first and is float32: it is x whose dtype a record names."""
    seen = []
    monkeypatch.setattr(on_gpu, "_choice", lambda *known: seen.append(known))
    x, ds = torch.empty(8, 32, dtype=torch.float16), torch.empty(8, 4)
    on_gpu.choice("shrink_backward", ds, x)
    assert seen[0][2:5] == (torch.float16, torch.float16, "float16")


def test_the_sum_is_shown():
    _, reason = on_gpu.modelled("shrink", problem(), H200)
    assert reason.startswith("no record: modelled aten ")
    assert "GFLOP, 67.1 MB, 1 launch" in reason
    assert str(roofline.Estimate(1e-3, 2e9, 3e6, 2)) == "1,000 µs = 2 GFLOP, 3 MB, 2 launches"


class Pretended:
    """A tensor on a GPU, as far as a choice looks at it."""

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, torch.device("cuda", 0)

    def stride(self, dimension):
        return 1 if dimension == 1 else self.shape[1]


@pytest.fixture
def h200(monkeypatch):
    """An H200 as the choices see it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(on_gpu, "_processor", lambda device: (90, 132))
    caches = (on_gpu._choice, on_gpu._whole, tuned.load, tuned.nearest)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


M, K, N, r = 8192, 4096, 8192, 16


def layer():
    x, dy, s = Pretended(M, K), Pretended(M, N), Pretended(M, r)
    weight, lora_A, lora_B = Pretended(N, K), Pretended(r, K), Pretended(N, r)
    return x, dy, s, weight, lora_A, lora_B


def test_a_record_goes_before_the_model(h200, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))
    pytest.importorskip("triton")
    x, dy, s, weight, lora_A, lora_B = layer()
    calls = {
        "shrink": (x, lora_A),
        "linear_expand": (x, weight, s, lora_B),
        "expand_backward": (dy, s, lora_B),
        "shrink_backward": (s, x),
    }
    modelled = {name: on_gpu.choice(name, *tensors) for name, tensors in calls.items()}
    assert all(reason.startswith("no record") for _, reason in modelled.values())
    keys = {
        "shrink": (M, K, K), "linear_expand": (M, K, N), "expand_backward": (M, N, N),
        "shrink_backward": (M, K, K),
    }  # fmt: skip
    other = {"aten": "triton", "triton": "aten"}
    tuned.save("NVIDIA H200", [
        tuned.Record(
            tuned.Key(name, "bfloat16", *sizes, r), other[modelled[name][0]], None, {"aten": 1e-4}
        )
        for name, sizes in keys.items()
    ])  # fmt: skip
    on_gpu._choice.cache_clear()
    for name, tensors in calls.items():
        backend, reason = on_gpu.choice(name, *tensors)
        assert backend == other[modelled[name][0]]
        assert reason == "measured here by lorafast tune: aten 100 µs"
        seed = Pretended(1, dtype=torch.int64)
        assert on_gpu.choice(name, *tensors, seed)[1].startswith("no record")


def test_a_whole_layer_is_modelled_only_where_its_rules_have_run(h200, monkeypatch):
    x = Pretended(8192, 4096)
    weight, lora_A, lora_B = Pretended(4096, 4096), Pretended(r, 4096), Pretended(4096, r)
    for devices, expected in (((), None), (("NVIDIA H200",), "triton")):
        on_gpu._whole.cache_clear()
        monkeypatch.setattr(on_gpu.tables, "tuned_on", lambda capability, d=devices: d)
        assert on_gpu.whole("lora_linear", x, lora_A, None, weight, lora_B, None)[0] == expected


def test_a_whole_layers_record_is_found_by_its_products_sizes(h200, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))
    pytest.importorskip("triton")
    x, dy, s, weight, lora_A, lora_B = layer()

    def choices():
        on_gpu._whole.cache_clear()
        return (
            on_gpu.whole("lora_linear", x, lora_A, None, weight, lora_B, None)[0],
            on_gpu.whole("lora_linear_backward", x, lora_A, None, dy, weight, lora_B, s)[0],
        )

    for forward, backward in (("triton", "aten"), ("aten", "triton")):
        tuned.save("NVIDIA H200", [
            tuned.Record(tuned.Key("lora_linear", "bfloat16", M, K, N, r), forward, None),
            tuned.Record(
                tuned.Key("lora_linear_backward", "bfloat16", M, N, K, r, transposed=True),
                backward, None,
            ),
        ])  # fmt: skip
        named = {"triton": "triton", "aten": None}
        assert choices() == (named[forward], named[backward])

"""DoRA's norm in evaluation: computed once, anew after a change, and never where it may be another."""

import copy
import importlib
import io
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

import lorafast
from lorafast import operands
from lorafast.nn import LoRAConv2d, LoRAEmbedding, LoRALinear, inactive
from lorafast.operands import NF4
from lorafast.ops import kept_norm

weight_norm = importlib.import_module("lorafast.ops.weight_norm")
K, N, R = 64, 48, 4


def _dense(dtype=torch.float32, **options):
    return LoRALinear(K, N, R, use_dora=True, dtype=dtype, **options)


def _conv1d():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    return LoRALinear.from_linear(transformers.Conv1D(N, K), R, use_dora=True)


def _operand(format):
    weight = operands.quantize(torch.randn(N, K), format)
    return LoRALinear.from_operand(weight, R, use_dora=True)


def _conv(**options):
    made = LoRAConv2d(8, N, 3, R, use_dora=True, **options)
    return made.to(memory_format=torch.channels_last)


MAKE = {
    "dense": _dense,
    "bfloat16": lambda: _dense(torch.bfloat16),
    "conv1d": _conv1d,
    "nf4": lambda: _operand("nf4"),
    "int8": lambda: _operand("int8"),
    "fp8": lambda: _operand("fp8"),
    "conv2d": _conv,
    "embedding": lambda: LoRAEmbedding(K, N, R, use_dora=True),
}
KINDS = pytest.mark.parametrize("kind", MAKE)


def drawn(layer):
    """The layer with an adapter that changes the norms, in evaluation."""
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


def made(kind):
    return drawn(MAKE[kind]())


def given(layer):
    x = layer.example_input(3)
    if x.is_floating_point():
        return torch.randn(x.shape).to(x.dtype)
    return torch.randint(K, x.shape)


@pytest.fixture
def norms(monkeypatch):
    """How often the operation ``weight_norm`` has run."""
    counted, run = Counter(), weight_norm._of_columns

    def counting(*arguments):
        counted["norms"] += 1
        return run(*arguments)

    monkeypatch.setattr(weight_norm, "_of_columns", counting)
    return counted


def evaluated(layer, x):
    with torch.no_grad():
        return layer(x)


def uncached(layer, x):
    kept_norm.forget(layer)
    found = evaluated(layer, x)
    kept_norm.forget(layer)
    return found


def is_kept(layer):
    return kept_norm._kept.get(layer) is not None


@KINDS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_computed_once_and_has_the_same_bits(kind, mode, norms):
    layer = made(kind)
    norms.clear()  # those of its making
    x = given(layer)
    with mode():
        first, second, third = (layer(x) for _ in range(3))
    assert norms["norms"] == 1
    expected = uncached(layer, x)
    assert all(torch.equal(found, expected) for found in (first, second, third))
    assert kept_norm._kept.get(layer) is None
    evaluated(layer, x)
    assert kept_norm._kept[layer].norm.shape == (N,)


def test_the_second_forward_of_a_row_makes_no_weight_dense(monkeypatch):
    layer = made("nf4")
    x, counted, rows = given(layer)[:1], Counter(), NF4.rows

    def counting(weight, begin, end):
        counted["rows"] += end - begin
        return rows(weight, begin, end)

    monkeypatch.setattr(NF4, "rows", counting)
    evaluated(layer, x)
    assert counted["rows"] == N
    evaluated(layer, x)
    assert counted["rows"] == N


def _in_place(name):
    def change(layer):
        with torch.no_grad():
            _tensor(layer, name).mul_(1.5)

    return change


def _tensor(layer, name):
    if name == "weight":
        # Of a quantized weight its scales.
        return list(layer.frozen_tensors().values())[-1]
    names = [n for n in layer.peft_names if n != "lora_magnitude"]
    return layer._parameters[names["AB".index(name)]]


def _in_inference_mode(layer):
    with torch.inference_mode():
        _tensor(layer, "B").mul_(1.5)


def _through_a_view(layer):
    with torch.no_grad():
        _tensor(layer, "B")[0].mul_(3)


def _new_memory(layer):
    tensor = _tensor(layer, "A")
    tensor.data = tensor.data * 2


def _new_memory_twice(layer):
    """Where the first was, if the allocator likes."""
    _new_memory(layer)
    _new_memory(layer)


def _loaded(assign):
    def change(layer):
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        for name in state:
            if name.endswith("_B"):
                state[name] *= 2
        layer.load_state_dict(state, assign=assign)

    return change


def _replaced(layer):
    name = next(n for n in layer.peft_names if n.endswith("_B"))
    setattr(layer, name, nn.Parameter(getattr(layer, name).detach() * 2))


def _over_the_same_memory(layer):
    """Another parameter, of the same version."""
    name = next(n for n in layer.peft_names if n.endswith("_B"))
    old = getattr(layer, name)
    alias = old.data.mul_(2)
    while alias._version < old._version:
        alias.mul_(1)
    setattr(layer, name, nn.Parameter(alias))
    assert getattr(layer, name)._version == old._version


def _swapped(layer):
    B = _tensor(layer, "B")
    torch.utils.swap_tensors(B, nn.Parameter(B.detach() * 2))


def _scaling(layer):
    layer.scaling = layer.scaling * 1.5


def _unseen(layer):
    """What PyTorch doesn't count: between ``train()`` and ``eval()`` it is seen."""
    layer.train()
    _tensor(layer, "B").data.mul_(2)
    layer.eval()


def _unseen_before_eval(layer):
    _tensor(layer, "B").data.mul_(2)
    layer.eval()


def _stepped(kind, **options):
    def change(layer):
        """Trained in evaluation mode, as batch norms are frozen."""
        trained = [_tensor(layer, "A"), _tensor(layer, "B")]
        optimizer = kind(trained, lr=0.1, **options)
        y = layer(given(layer)).float().square().sum()
        evaluated(layer, given(layer))
        y.backward()
        optimizer.step()
        optimizer.zero_grad()

    return change


def _another_adapter(layer):
    options = {"alpha": 3, "dropout": 0.0, "use_rslora": False, "use_dora": True}
    inactive.add(layer, "other", R, adapter_dtype=None, **options)
    inactive.exchange(layer, "other")
    with torch.no_grad():
        _tensor(layer, "A").normal_()
        _tensor(layer, "B").normal_()


def _of_another_dtype(layer):
    layer.double()


CHANGES = {
    "W in place": _in_place("weight"),
    "A in place": _in_place("A"),
    "B in place": _in_place("B"),
    "in inference mode": _in_inference_mode,
    "through a view": _through_a_view,
    "new memory": _new_memory,
    "new memory twice": _new_memory_twice,
    "load_state_dict": _loaded(False),
    "load_state_dict(assign=True)": _loaded(True),
    "another parameter": _replaced,
    "another parameter over the same memory": _over_the_same_memory,
    "swap_tensors": _swapped,
    "scaling": _scaling,
    "unseen between train and eval": _unseen,
    "unseen before eval": _unseen_before_eval,
    "a step of SGD": _stepped(torch.optim.SGD),
    "a step of AdamW": _stepped(torch.optim.AdamW),
    "a step of AdamW, foreach": _stepped(torch.optim.AdamW, foreach=True),
    "a step of AdamW, fused": _stepped(torch.optim.AdamW, fused=True),
    "another adapter": _another_adapter,
    "another dtype": _of_another_dtype,
}


@pytest.mark.filterwarnings("ignore:.*inference")
@KINDS
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(kind, change, norms):
    layer = made(kind)
    norms.clear()  # those of its making
    evaluated(layer, given(layer))
    before = kept_norm._kept[layer].norm
    CHANGES[change](layer)
    x, counted = given(layer), norms["norms"]
    found = evaluated(layer, x)
    assert norms["norms"] == counted + 1
    assert torch.equal(found, uncached(layer, x))
    evaluated(layer, x)
    assert change == "another dtype" or not torch.equal(kept_norm._kept[layer].norm, before)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_backend_that_is_forced_computes_its_own(kind, norms):
    layer = made(kind)
    norms.clear()  # those of its making
    x = given(layer)
    evaluated(layer, x)
    for backend in ("reference", "aten"):
        with lorafast.use_backend(backend):
            found = evaluated(layer, x)
            assert torch.equal(found, uncached(layer, x))
    assert norms["norms"] == 5


def test_merging_drops_it():
    layer = made("dense")
    x = given(layer)
    expected = evaluated(layer, x)
    layer.merge()
    assert not is_kept(layer)
    layer.unmerge()
    assert torch.equal(evaluated(layer, x), expected)


def test_another_place_in_the_same_memory():
    layer = made("dense")
    both, x = torch.randn(2, N, R), given(layer)
    for values in both:
        layer.lora_B.data = values
        assert torch.equal(evaluated(layer, x), uncached(layer, x))
        evaluated(layer, x)


def test_other_memory_in_the_same_place():
    numpy = pytest.importorskip("numpy")
    layer = made("dense")
    values, x = numpy.ones((N, R), dtype="float32"), given(layer)
    for _ in range(2):
        values *= 2  # which PyTorch doesn't count
        layer.lora_B.data = torch.from_numpy(values)
        assert torch.equal(evaluated(layer, x), uncached(layer, x))
        evaluated(layer, x)


def test_none_is_kept_while_a_step_may_follow():
    layer = made("dense")
    x = given(layer)
    layer(x).square().sum().backward()
    for _ in range(2):
        layer.eval()
        evaluated(layer, x)
        assert not is_kept(layer)
    layer.zero_grad()
    evaluated(layer, x)
    assert is_kept(layer)


def test_a_tied_weight_is_seen_by_each_layer_that_holds_it(norms):
    one = made("dense")
    other = drawn(LoRALinear.from_linear(nn.Linear(K, N), R, use_dora=True))
    other.weight = one.weight
    x = given(one)
    norms.clear()
    for layer in (one, other, one, other):
        evaluated(layer, x)
    assert norms["norms"] == 2
    with torch.no_grad():
        one.weight.mul_(2)
    for layer in (one, other):
        assert torch.equal(evaluated(layer, x), uncached(layer, x))


def test_two_adapters_in_turn():
    layer = made("dense")
    x, expected = given(layer), {}
    _another_adapter(layer)
    for name in ("default", "other"):
        inactive.exchange(layer, name)
        expected[name] = uncached(layer, x)
    for name in ("default", "other", "default", "other"):
        inactive.exchange(layer, name)
        assert torch.equal(evaluated(layer, x), expected[name])


@KINDS
def test_none_is_kept_in_training_nor_where_a_gradient_is_asked_for(kind, norms):
    layer = made(kind)
    norms.clear()  # those of its making
    x = given(layer)
    evaluated(layer, x)
    layer(x)
    assert not is_kept(layer)
    layer.train()
    for _ in range(2):
        evaluated(layer, x)
        assert not is_kept(layer)
    assert norms["norms"] == 4


def test_the_flag_alone_is_training():
    layer = made("dense")
    x = given(layer)
    evaluated(layer, x)
    layer.training = True
    evaluated(layer, x)
    assert not is_kept(layer)


def test_a_frozen_adapter_has_gradients_of_x_and_of_its_magnitude(norms):
    layer = made("dense")
    norms.clear()  # those of its making
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    x = given(layer).requires_grad_()

    def gradients():
        return torch.autograd.grad(layer(x).square().sum(), (x, layer.lora_magnitude))

    expected = gradients()
    kept_norm.forget(layer)
    with torch.inference_mode():
        layer(x)
    counted = norms["norms"]
    found = gradients()
    assert norms["norms"] == counted
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ["dense", "bfloat16", "nf4", "conv2d"])
def test_autocast(kind):
    layer = made(kind)
    x = given(layer)
    for _ in range(2):
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert torch.equal(evaluated(layer, x), uncached(layer, x))
                evaluated(layer, x)


def test_none_is_kept_of_a_tensor_whose_changes_are_not_counted(norms):
    with torch.inference_mode():
        layer = made("dense")
        norms.clear()  # those of its making
        layer.weight = nn.Parameter(layer.weight * 1, requires_grad=False)
        assert layer.weight.is_inference()
        x = given(layer)
        before = layer(x)
        layer.weight.mul_(2)
        assert not torch.equal(layer(x), before)
    assert not is_kept(layer)
    assert norms["norms"] >= 2


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += function is torch.ops.lorafast.weight_norm.default
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_norm_in_every_forward():
    layer = made("dense")
    x = given(layer)
    evaluated(layer, x)
    with Mode() as mode:
        evaluated(layer, x)
        evaluated(layer, x)
    assert mode.seen == 2


def test_under_a_default_device_it_is_kept(norms):
    layer = made("dense")
    norms.clear()  # those of its making
    x = given(layer)
    with torch.device("cpu"):
        for _ in range(2):
            evaluated(layer, x)
    assert norms["norms"] == 1


def _vmapped(layer, x):
    return torch.func.vmap(layer)(x)


def _with_a_tangent(layer, x):
    return torch.func.jvp(layer, (x,), (x,))[0]


def _traced(layer, x):
    return torch.jit.trace(layer, x, check_trace=False)(x)  # whose check is eager


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", [_vmapped, _with_a_tangent, _traced])
def test_none_is_kept_by_a_transform(transform, norms):
    layer = made("dense")
    norms.clear()  # those of its making
    x = given(layer)
    with torch.no_grad():
        transform(layer, x)
    assert not is_kept(layer)
    evaluated(layer, x)
    assert is_kept(layer)


def test_none_is_kept_in_a_process_group(tmp_path, norms):
    """FSDP fills a parameter's memory anew without counting it."""
    layer = made("dense")
    norms.clear()  # those of its making
    x = given(layer)
    evaluated(layer, x)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        evaluated(layer, x)
        assert norms["norms"] == 2
        layer.lora_B.data.mul_(2)
        found = evaluated(layer, x)
        assert norms["norms"] == 3
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(found, uncached(layer, x))


def test_a_cuda_graph_that_is_captured_computes_it(monkeypatch, norms):
    layer = made("dense")
    norms.clear()  # those of its making
    x = given(layer)
    evaluated(layer, x)
    monkeypatch.setattr(kept_norm, "_is_recorded", lambda device: True)
    evaluated(layer, x)
    assert norms["norms"] == 2


def test_it_is_in_no_copy_and_no_file(norms):
    layer = made("dense")
    norms.clear()  # those of its making
    x = given(layer)
    fresh, keys = pickle.dumps(layer), {*layer.state_dict()}
    attributes = {*vars(layer)}
    expected = evaluated(layer, x)
    assert is_kept(layer)
    assert pickle.dumps(layer) == fresh
    assert {*vars(layer)} == attributes
    assert {*layer.state_dict()} == keys
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(layer), copy.copy(layer), torch.load(buffer, weights_only=False)
    assert not any(map(is_kept, copies))
    assert all(torch.equal(evaluated(one, x), expected) for one in copies)
    assert norms["norms"] == 4


def test_it_goes_with_the_layer():
    layer = made("dense")
    evaluated(layer, given(layer))
    before = len(kept_norm._kept)
    del layer
    assert len(kept_norm._kept) == before - 1


@KINDS
def test_compiled_code_takes_it_in_every_call(kind):
    layer = made(kind)
    x = given(layer)
    expected = evaluated(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
        for _ in range(2):
            _tensor(layer, "B").data.mul_(2)  # which PyTorch doesn't count
            torch.testing.assert_close(compiled(x), uncached(layer, x))


def test_parts_of_a_model_that_are_computed_anew_keep_none(norms):
    layer = made("dense")
    norms.clear()  # those of its making
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    x = given(layer)
    for _ in range(2):
        evaluated(layer, x)
    assert norms["norms"] == 2
    assert not is_kept(layer)

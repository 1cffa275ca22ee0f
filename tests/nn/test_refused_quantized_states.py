"""States of quantized layers that are refused, and leave a layer as it was; fp8 codes in two dtypes."""

import json

import pytest
import torch
from quantized_layers import FORMATS, layer
from torch import nn

from lorafast.nn import LoRALinear, QuantizedLinear
from lorafast.operands import FP8, NF4


def changed(**said):
    """A change of what the JSON of a state says; None takes it out."""

    def change(state):
        key = next(name for name in state if "quant_state" in name)
        found = json.loads(bytes(state[key].tolist())) | said
        found = {name: value for name, value in found.items() if value is not None}
        state[key] = torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)

    return change


def without(name):
    return lambda state: state.pop(name)


def replaced(name, of):
    def change(state):
        state[name] = of(state[name])

    return change


def renamed(state):
    state["weight.quant_state.bitsandbytes__nf3"] = state.pop(JSON)


JSON = "weight.quant_state.bitsandbytes__nf4"
BAD = {
    "no absmax": (without("weight.absmax"), "has no weight.absmax"),
    "no weight": (without("weight"), "has no weight"),
    "no quant_map": (without("weight.quant_map"), "has no weight.quant_map"),
    "no quant_state": (without(JSON), "the state has no weight.quant_state, expected one of"),
    "half nested": (
        without("weight.nested_absmax"),
        "has weight.nested_quant_map, and no weight.nested_absmax: nested scales need both",
    ),
    "nested without offset": (changed(nested_offset=None), "and no nested_offset"),
    "fewer codes": (replaced("weight", lambda t: t[:-1]), "has 479 bytes of codes, expected 480"),
    "other block": (changed(blocksize=32), "absmax is torch.uint8 of 15 elements, expected"),
    "block 0": (changed(blocksize=0), "block is 0, expected 1 to"),
    "block of text": (changed(blocksize="64"), "blocksize is '64', expected an integer"),
    "a size it doesn't have": (
        changed(shape=[1 << 40, 1 << 40]), "weight has 480 bytes of codes, expected"
    ),
    "negative shape": (changed(shape=[-24, -40]), r"shape is \[-24, -40\], expected"),
    "NaN": (replaced("weight.nested_absmax", lambda t: t * float("nan")), "is NaN or infinite"),
    "infinite": (replaced("weight.nested_absmax", lambda t: t / 0), "is NaN or infinite"),
    "a quant_map of scales with NaN": (
        replaced("weight.nested_quant_map", lambda t: t * float("nan")),
        "nested_quant_map is NaN or infinite somewhere",
    ),
    "an infinite quant_map of scales": (
        replaced("weight.nested_quant_map", lambda t: t / 0), "nested_quant_map is NaN or infinite",
    ),
    "infinite offset": (changed(nested_offset=float("inf")), "nested_offset is inf, expected"),
    "an offset of 400 digits": (
        changed(nested_offset=10**400), "nested_offset is of 1329 bits, expected a finite float32"
    ),
    "an offset that no float32 is": (
        changed(nested_offset=1e39), r"nested_offset is 1e\+39, expected a finite float32",
    ),
    "an offset that rounds to infinity": (
        changed(nested_offset=float(2**128 - 2**102)), "nested_offset is 3.40.*, expected a finite"
    ),
    "an offset that is NaN": (changed(nested_offset=float("nan")), "nested_offset is nan, expected"),
    "an offset of text": (changed(nested_offset="1" * 999), r"nested_offset is '1{79}\.\.\., exp"),
    "a block of 400 digits": (
        changed(blocksize=10**400), "block is of 1329 bits, expected 1 to 2147483647"
    ),
    "a nested block of 400 digits": (
        changed(nested_blocksize=-(10**400)), "nested_block is of 1329 bits, expected 1 to"
    ),
    "a shape of 400 digits": (
        changed(shape=[10**400, 40]), "shape is of 1329 bits x 40, expected sizes below"
    ),
    "unknown quant_type": (renamed, "bitsandbytes__nf3, expected one of"),
    "another quant_type": (changed(quant_type="fp4"), "quant_type is 'fp4', expected 'nf4'"),
    "another quant_map": (
        replaced("weight.quant_map", lambda t: t.flip(0)), "quant_map is not that of nf4",
    ),
    "unknown dtype": (changed(dtype="bfloat17"), "dtype is 'bfloat17', expected the name"),
    "no JSON": (
        replaced(JSON, lambda t: t[:-3]), "is no JSON"
    ),
    "huge JSON": (
        replaced(JSON, lambda t: torch.zeros(1, dtype=torch.uint8).expand(1 << 40)),
        "expected JSON as bytes",
    ),
    "deep JSON": (
        replaced(JSON, lambda t: torch.full((60000,), ord("["), dtype=torch.uint8)), "is no JSON"
    ),
    "another tensor": (
        lambda state: state.update({"weight.zero": torch.ones(1)}), "has weight.zero besides"
    ),
    "another size of the layer": (
        lambda state: (state.clear(), state.update(layer("nf4", 40, 24).state_dict())),
        r"is of nf4 \(40x24,float32,64,256\), expected nf4 \(24x40,float32,64,256\)",
    ),
    "another format": (
        lambda state: (state.clear(), state.update(layer("fp4").state_dict())), "is of fp4"
    ),
    "no nesting": (
        lambda state: (state.clear(), state.update(layer(nested=False).state_dict())),
        r"is of nf4 \(24x40,float32,64\)",
    ),
    "a dense one": (
        lambda state: (state.clear(), state.update(nn.Linear(40, 24).state_dict())),
        "stores weight as torch.uint8, and the checkpoint as torch.float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_a_bad_state_changes_nothing(change, said, strict, adapted):
    made = layer()
    made = LoRALinear.from_linear(made, 4) if adapted else made
    before = {name: t.clone() for name, t in made.operand().tensors().items()}
    description, state = made._description, dict(layer().state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=said):
        nn.Sequential(made).load_state_dict({f"0.{k}": v for k, v in state.items()}, strict=strict)
    after = made.operand().tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert made._description == description


@pytest.mark.parametrize("name", [n for n in BAD if n not in ("a dense one", "another format",
                                  "no nesting", "another size of the layer", "no weight")])  # fmt: skip
def test_no_layer_is_made_of_a_bad_state(name):
    change, said = BAD[name]
    state = dict(layer().state_dict())
    change(state)
    with pytest.raises(ValueError, match=said):
        QuantizedLinear.from_state(state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("SCB"), "the checkpoint has weight, and no SCB"),
        (replaced("SCB", lambda t: t[:-1]), r"SCB has shape \[23\]"),
        (replaced("SCB", lambda t: t / 0), "SCB is NaN or infinite"),
        (replaced("weight_format", lambda t: t + 1), "weight_format is 1, expected 0: by rows"),
        (
            replaced("weight_format", lambda t: torch.tensor(float("nan"))),
            "weight_format is nan, expected 0: by rows",
        ),
        (
            replaced("weight_format", lambda t: torch.tensor(0.5)),
            "weight_format is 0.5, expected 0",
        ),
        (
            replaced("weight_format", lambda t: torch.zeros(99)),
            r"weight_format is torch.float32 \[99\], expected 0: by rows",
        ),
        (replaced("weight", lambda t: t.float()), "weight is torch.float32"),
    ],
)
def test_a_bad_int8_state_changes_nothing(change, said):
    made, state = layer("int8"), dict(layer("int8").state_dict())
    before = made.dense_weight()
    change(state)
    with pytest.raises(RuntimeError, match=said):
        made.load_state_dict(state)
    assert torch.equal(made.dense_weight(), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("scale"), "the checkpoint has weight, and no scale"),
        (
            replaced("scale", lambda t: t[:-1]),
            r"stores scale as \[24\], and the checkpoint as \[23\]",
        ),
    ],
)
def test_half_a_state_by_its_own_names_changes_nothing(change, said):
    made, state = layer("fp8"), dict(layer("fp8").state_dict())
    before = made.dense_weight()
    change(state)
    for strict in (False, True):
        with pytest.raises(RuntimeError, match=said):
            made.load_state_dict(state, strict=strict)
    assert torch.equal(made.dense_weight(), before)


@pytest.mark.filterwarnings("ignore:.*which is a no-op")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scales_without_codes_are_the_layers_own_or_refused(device):
    made = LoRALinear.from_linear(layer("nf4"), 2)
    state = {n: t.clone() for n, t in made.state_dict().items() if n not in ("weight", "bias")}
    state["lora_B"] += 1
    before = made.base_weight()
    made = made.to(device)
    if device == "cpu":
        assert made.load_state_dict(state, strict=False).missing_keys == ["weight", "bias"]
        assert made.lora_B.eq(1).all()
        with pytest.raises(RuntimeError, match="Missing key"):
            made.load_state_dict(state)
        state["nested_offset"] = state["nested_offset"] + 1
    with pytest.raises(RuntimeError, match="the checkpoint has absmax, and no weight"):
        made.load_state_dict(state, strict=False)
    if device == "cpu":
        assert torch.equal(made.base_weight(), before)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(
    ("bias", "said"),
    [
        ("no tensor", "bias is a str, expected a tensor"),
        (torch.zeros(24, dtype=torch.int64), "bias is torch.int64, expected float"),
        (torch.zeros(23), r"its bias has shape \[23\], expected \[24\]"),
    ],
)
def test_no_layer_is_made_of_a_bad_bias(format, bias, said):
    state = dict(layer(format).state_dict()) | {"bias": bias}
    with pytest.raises(ValueError, match=said):
        QuantizedLinear.from_state(state)


OWN_SCALES = [
    ("fp8", "scale"), ("int8", "SCB"), ("nf4", "nested_absmax"), ("nf4", "nested_quant_map"),
    ("nf4", "nested_offset"), ("fp4", "nested_absmax"),
]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("format", "name"), OWN_SCALES)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_scales_by_its_own_names_are_finite(format, name, value, adapted):
    made, other = layer(format), layer(format)
    state = {n: t.clone() for n, t in other.frozen_operand().tensors().items()}
    state[name].view(-1)[0] = value
    made = LoRALinear.from_linear(made, 4) if adapted else made
    before = {n: t.clone() for n, t in made.operand().tensors().items()}
    with pytest.raises(RuntimeError, match=f"{name} (of the checkpoint )?is NaN or infinite"):
        made.load_state_dict(state, strict=False)
    after = made.operand().tensors()
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_codes_that_are_no_numbers_as_floats_are_codes():
    """Of bytes that say NaN to whoever takes them for bfloat16."""
    plain = NF4.of(torch.randn(24, 40))
    tensors = {**plain.tensors(), "weight": torch.full((240,), float("nan"), dtype=torch.bfloat16)}
    weight = NF4(tensors, (24, 40), torch.float32, 64, 256)
    made = QuantizedLinear.from_operand(weight)
    assert made.load_state_dict(weight.tensors()) == ([], [])


def in_codes_of(dtype):
    """An fp8 layer that has codes so."""
    t = layer("fp8").frozen_operand().tensors()
    return QuantizedLinear.from_operand(
        FP8({"weight": t["weight"].view(dtype), "scale": t["scale"]}, torch.float32),
        torch.randn(24),
    )


BYTES = (torch.uint8, torch.float8_e4m3fn)


@pytest.mark.parametrize("given", BYTES, ids=str)
@pytest.mark.parametrize("held", BYTES, ids=str)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_codes_of_fp8_load_as_bytes_and_as_numbers(given, held, assign, adapted):
    plain, made = in_codes_of(given), in_codes_of(held)
    state = dict(plain.state_dict())
    assert state["weight"].dtype is given
    made = LoRALinear.from_linear(made, 4) if adapted else made
    found = made.load_state_dict(state, strict=not adapted, assign=assign)
    assert not found.unexpected_keys
    assert made.weight.dtype is held
    assert torch.equal(made.operand().dense(), plain.dense_weight())
    assert state["weight"].dtype is given


@pytest.mark.parametrize("held", BYTES, ids=str)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float8_e5m2, torch.int8], ids=str)
def test_codes_are_not_converted(held, given):
    made = in_codes_of(held)
    before = made.dense_weight()
    state = dict(made.state_dict()) | {"weight": torch.ones(24, 40).to(given)}
    with pytest.raises(
        RuntimeError, match=f"stores weight as {held}, and the checkpoint as {given}"
    ):
        made.load_state_dict(state)
    assert torch.equal(made.dense_weight(), before)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_refused_is_not_called_missing(format):
    made = nn.Sequential(layer(format), nn.Linear(24, 2))
    with pytest.raises(RuntimeError, match=r"stores (its )?weight as") as caught:
        made.load_state_dict({"0.weight": torch.ones(24, 40), "0.bias": torch.ones(24)})
    said = str(caught.value)
    assert '"1.weight", "1.bias"' in said
    assert '"0.' not in said

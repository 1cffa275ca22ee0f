"""LoRAMultiheadAttention, held to nn.MultiheadAttention of merged weights for each of its options."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import covering
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lorafast.nn import LoRAMultiheadAttention
from lorafast.nn.attention import multihead_attention
from lorafast.reference import contract
from lorafast.reference.dropout import dropout as masked

E, HEADS, N, L, S, r = 12, 3, 2, 5, 4, 3
ADAPTER = ("lora_A", "lora_B", "out_lora_A", "out_lora_B")


def draw(layer, seed=3):
    """Values for all that starts at zero, so that it changes something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3)
    return layer


def made(dtype=torch.float64, **options):
    torch.manual_seed(1)
    adapter = {"alpha": 5, "dtype": dtype, "adapter_dtype": dtype}
    return draw(LoRAMultiheadAttention(E, HEADS, r, **adapter | options))


def inputs(kind, shape, dtype=torch.float64):
    """Leaves and the call's query, key and value, of which some are the same tensor."""
    torch.manual_seed(2)

    def leaf(length):
        sizes = {"seq": (length, N, E), "batch": (N, length, E), "one": (length, E)}
        return torch.randn(sizes[shape], dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = leaf(L), leaf(S), leaf(S)
    return {"self": (q, q, q), "kv": (q, k, k), "qk": (q, q, leaf(L)), "three": (q, k, v)}[kind]


def masks(kind, shape, keys):
    """The mask arguments of a call."""
    padding = torch.zeros((N, keys) if shape != "one" else (keys,), dtype=torch.bool)
    padding[..., -1] = True
    causal = torch.ones(L, keys, dtype=torch.bool).triu(1)
    many = torch.rand((N if shape != "one" else 1) * HEADS, L, keys) < 0.3
    many[..., 0] = False
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(L, keys, dtype=torch.float64)},
        "heads": {"attn_mask": many},
        "both": {"attn_mask": many, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal, padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }[kind]


WEIGHTS = {
    "output": {"need_weights": False},
    "mean": {},
    "by head": {"average_attn_weights": False},
}


def merged_call(layer, plain, arguments, options):
    """PyTorch's layer with W + scaling · B·A, as a function of A and B; the change of out_proj twice."""
    A, B, out_A, out_B = (getattr(layer, name) for name in ADAPTER)
    tensors = dict(plain.named_parameters()) | {
        "in_proj_weight": layer.in_proj_weight + layer.scaling * (B @ A),
        "out_proj.weight": layer.out_proj.weight + 2 * layer.scaling * (out_B @ out_A),
    }
    return functional_call(plain, tensors, arguments, options)


def everything(layer, results, leaves, dys):
    """Outputs and gradients by name."""
    results = [one for one in results if one is not None]
    loss = sum((one * dy).sum() for one, dy in zip(results, dys, strict=False))
    wanted = list(dict.fromkeys(leaves)) + [getattr(layer, name) for name in ADAPTER]
    names = [f"d{i}" for i in range(len(wanted) - len(ADAPTER))] + [f"d{name}" for name in ADAPTER]
    found = dict(zip(names, torch.autograd.grad(loss, wanted), strict=True))
    return {f"y{i}": one.detach() for i, one in enumerate(results)} | found


CASES = covering(
    ["self", "kv", "qk", "three"],
    ["seq", "batch", "one"],
    ["none", "padding", "bool", "float", "heads", "both", "causal", "causal, padding"],
    list(WEIGHTS),
    [(False, False), (True, False), (False, True), (True, True)],
    [True, False],
)


@pytest.mark.parametrize(("kind", "shape", "mask", "weights", "added", "bias"), CASES)
def test_numbers_and_gradients_of_the_merged_layer(kind, shape, mask, weights, added, bias):
    options = {"add_bias_kv": added[0], "add_zero_attn": added[1], "batch_first": shape == "batch"}
    layer = made(bias=bias, **options)
    plain = nn.MultiheadAttention(E, HEADS, bias=bias, dtype=torch.float64, **options)
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n not in ADAPTER})
    leaves = inputs(kind, shape)
    arguments = masks(mask, shape, L if kind in ("self", "qk") else S) | WEIGHTS[weights]
    results = {}
    for name, run in (
        ("ours", lambda: layer(*leaves, **arguments)),
        ("theirs", lambda: merged_call(layer, plain, leaves, arguments)),
    ):
        found = run()
        assert (found[1] is None) == (weights == "output")
        torch.manual_seed(4)
        dys = [torch.randn(one.shape, dtype=one.dtype) for one in found if one is not None]
        results[name] = everything(layer, found, leaves, dys)
    for name, expected in results["theirs"].items():
        torch.testing.assert_close(
            results["ours"][name], expected, msg=lambda m, n=name: f"{n}: {m}"
        )


def formula(layer, query, key, value, need_weights):
    """The same in plain calls without a sum of weights: PyTorch's attention around identities."""

    def low_rank(x, W, b, A, B, scaling):
        return F.linear(x, W, b) + scaling * F.linear(F.linear(x, A), B)

    identity = torch.eye(E, dtype=query.dtype)
    W, b, A, B = layer.in_proj_weight, layer.in_proj_bias, layer.lora_A, layer.lora_B
    parts = zip((query, key, value), W.chunk(3), b.chunk(3), B.chunk(3), strict=True)
    q, k, v = (low_rank(x, W, b, A, B, layer.scaling) for x, W, b, B in parts)
    o, weights = F.multi_head_attention_forward(
        q, k, v, E, HEADS, None, None, None, None, False, 0.0, identity, None,
        use_separate_proj_weight=True, q_proj_weight=identity, k_proj_weight=identity,
        v_proj_weight=identity, need_weights=need_weights,
    )  # fmt: skip
    out = layer.out_proj
    return (
        low_rank(o, out.weight, out.bias, layer.out_lora_A, layer.out_lora_B, 2 * layer.scaling),
        weights,
    )


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_contract(dtype, need_weights):
    def results(run, kind):
        """Of several layers, for the error of one is luck."""
        found = []
        for seed in range(8):
            layer = draw(made(), seed).to(dtype).to(kind)
            leaves = [
                x.detach().to(dtype).to(kind).requires_grad_() for x in inputs("three", "seq")
            ]
            outputs = run(layer, *leaves, need_weights=need_weights)
            dys = [
                torch.randn(one.shape, dtype=torch.float64).to(dtype).to(kind)
                for one in outputs
                if one is not None
            ]
            found.append(everything(layer, outputs, leaves, dys))
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    bounds = contract.bounds(results(formula, dtype), results(formula, torch.float64), dtype=dtype)
    reason = contract.why_any_broken(results(LoRAMultiheadAttention.__call__, dtype), bounds)
    assert reason is None, reason


def test_float32_adapters_over_bfloat16_and_autocast():
    drawn = made(torch.float32)
    x = torch.randn(L, N, E)
    ref64 = copy.deepcopy(drawn).double()(*[x.double()] * 3)[0]
    half = copy.deepcopy(drawn)
    for p in (half.in_proj_weight, half.in_proj_bias, *half.out_proj.parameters()):
        p.data = p.data.bfloat16()
    y, _ = half(*[x.bfloat16()] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = drawn(x, x, x)
        eager = formula(copy.deepcopy(drawn), x, x, x, True)[0]
    for found in (y, cast):
        reason = contract.why_broken(found.detach(), eager.detach().bfloat16(), ref64.detach())
        assert reason is None, reason


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
def test_dropout_of_attention_weights_is_pytorchs(need_weights):
    layer = made(torch.float32, attention_dropout=0.4, batch_first=True)
    plain = layer.to_plain()
    assert plain.dropout == 0.4
    x = torch.randn(N, L, E)
    found = []
    for one in (layer, plain):
        torch.manual_seed(6)
        found.append(one(x, x, x, need_weights=need_weights)[0].detach())
    torch.testing.assert_close(*found)
    assert not torch.equal(found[0], layer.eval()(x, x, x)[0])
    torch.testing.assert_close(layer(x, x, x)[0], plain.eval()(x, x, x)[0])


def test_dropout_before_the_adapters():
    layer = made(dropout=0.4)
    x = inputs("self", "seq")[0].detach()
    torch.manual_seed(6)
    y, _ = layer(x, x, x)
    torch.manual_seed(6)

    def projected(x, W, b, A, B, scaling):
        left = masked(x.reshape(-1, E), 0.4, torch.randint(2**63 - 1, (1,))).view_as(x)
        return F.linear(x, W, b) + scaling * F.linear(F.linear(left, A), B)

    in_proj = layer.in_proj_weight, layer.in_proj_bias, layer.lora_A, layer.lora_B
    q, k, v = (
        one.view(L, N, HEADS, -1).permute(1, 2, 0, 3)
        for one in projected(x, *in_proj, layer.scaling).chunk(3, -1)
    )
    o = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(L, N, E)
    out = layer.out_proj
    expected = projected(
        o, out.weight, out.bias, layer.out_lora_A, layer.out_lora_B, 2 * layer.scaling
    )
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kept", [*ADAPTER, "query", ""])
def test_any_subset_of_gradients(kept):
    layer = made()
    whole = everything(layer, layer(*(leaves := inputs("three", "seq"))), leaves, [1.0, 1.0])
    for name in ADAPTER:
        getattr(layer, name).requires_grad_(name == kept)
    query, key, value = (leaf.detach() for leaf in leaves)
    query.requires_grad_(kept == "query")
    y, weights = layer(query, key, value)
    if not kept:
        assert not y.requires_grad
        return
    leaf = query if kept == "query" else getattr(layer, kept)
    (found,) = torch.autograd.grad(y.sum() + weights.sum(), (leaf,))
    torch.testing.assert_close(found, whole["d0" if kept == "query" else f"d{kept}"])


def test_compiled_whole_checkpointed_copied_and_pickled():
    layer = made(batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    padding = masks("padding", "batch", L)
    expected = everything(layer, layer(x, x, x, **padding), (), [1.0, 1.0])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (
        compiled,
        lambda *a, **k: checkpoint(layer, *a, **k, use_reentrant=False),
    ):
        found = everything(layer, run(x, x, x, **padding), (), [1.0, 1.0])
        for name, one in expected.items():
            torch.testing.assert_close(found[name], one, msg=lambda m, n=name: f"{n}: {m}")
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, x, x, **padding)[0], expected["y0"])


@pytest.mark.parametrize("warmed", ["sizes seen", "maybe dynamic"])
@pytest.mark.parametrize("mask", ["padding", "bool", "causal"])
def test_compiled_with_dynamic_sizes_before_a_mask_has_any(mask, warmed):
    torch._dynamo.reset()
    layer = made(batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")

    def drawn(length):
        return torch.randn(N, length, E, dtype=torch.float64)

    if warmed == "sizes seen":
        for length in (L + 1, L + 2):
            one = drawn(length)
            compiled(one, one, one)
    x = drawn(L)
    if warmed == "maybe dynamic":
        torch._dynamo.maybe_mark_dynamic(x, 1)
    arguments = masks(mask, "batch", L)
    for found, expected in zip(
        compiled(x, x, x, **arguments), layer(x, x, x, **arguments), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_a_call_is_one_node_of_fx(merged):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = made(batch_first=True, add_bias_kv=True)

        def forward(self, x, padding):
            y, weights = self.attn(x, x, x, key_padding_mask=padding)
            return y.sum() + weights.square().sum()

    model = Net()
    if merged:
        model.attn.merge()
    x = torch.randn(N, L, E, dtype=torch.float64, requires_grad=True)
    padding = masks("padding", "batch", L)["key_padding_mask"]
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls.count(multihead_attention) == 1
    found, expected = traced(x, padding), model(x, padding)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))
    if not merged:
        traced(x, padding).backward()
        trained = {name for name, p in traced.named_parameters() if p.grad is not None}
        assert trained == {f"attn.{name}" for name in ADAPTER}


@pytest.mark.parametrize(
    ("empty", "mask", "weights", "added"),
    covering(
        ["batch", "query", "keys", "self"],
        ["none", "padding", "bool", "heads"],
        list(WEIGHTS),
        [False, True],
    ),
)
def test_empty_inputs(empty, mask, weights, added):
    batch, queries, keys = {
        "batch": (0, L, S), "query": (N, 0, S), "keys": (N, L, 0), "self": (N, 0, 0),
    }[empty]  # fmt: skip
    layer = made(batch_first=True, add_bias_kv=added)
    query, key = (torch.randn(batch, n, E, dtype=torch.float64) for n in (queries, keys))
    given = {
        "none": {},
        "padding": {"key_padding_mask": torch.zeros(batch, keys, dtype=torch.bool)},
        "bool": {"attn_mask": torch.zeros(queries, keys, dtype=torch.bool)},
        "heads": {"attn_mask": torch.zeros(batch * HEADS, queries, keys, dtype=torch.bool)},
    }[mask]
    found = layer(query, key, key, **given | WEIGHTS[weights])
    given |= WEIGHTS[weights] | {"need_weights": True}  # else PyTorch refuses some of the masks
    expected = layer.to_plain()(query, key, key, **given)
    torch.testing.assert_close(found[0], expected[0])
    assert found[0].shape == (batch, queries, E)
    if weights != "output":
        torch.testing.assert_close(found[1], expected[1])


def test_a_causal_hint_stands_in_for_a_mask_of_any_size():
    layer = made(batch_first=True)
    plain = layer.to_plain()
    x = torch.randn(N, L, E, dtype=torch.float64, requires_grad=True)
    big = torch.ones(L + 4, L + 4, dtype=torch.bool).triu(1)
    given = {"attn_mask": big, "is_causal": True, "need_weights": False}
    torch.testing.assert_close(layer(x, x, x, **given), plain(x, x, x, **given))
    for read in (
        {"need_weights": True}, {"is_causal": False},
        {"key_padding_mask": torch.zeros(N, L, dtype=torch.bool)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"attn_mask has shape \[9, 9\], expected \[5, 5\]"):
            layer(x, x, x, **given | read)


def test_it_shares_what_it_wraps_and_gives_it_back():
    plain = nn.MultiheadAttention(E, HEADS, 0.25, add_bias_kv=True, batch_first=True).eval()
    state, seen = copy.deepcopy(plain.state_dict()), []
    plain.register_forward_hook(lambda *_: seen.append(1))
    plain.note = "kept"
    layer = LoRAMultiheadAttention.from_attention(plain, r, alpha=6, dropout=0.1)
    assert layer.in_proj_weight is plain.in_proj_weight
    assert layer.out_proj is plain.out_proj
    assert not layer.training
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == set(ADAPTER)
    assert (layer.dropout, layer.attention_dropout, layer.scaling) == (0.1, 0.25, 2)
    assert set(layer.state_dict()) == {*state, *ADAPTER}
    x = torch.randn(N, L, E)
    fresh = layer(x, x, x)
    assert len(seen) == 1
    draw(layer)
    assert layer.load_state_dict(state) == ([], [])
    assert not torch.equal(layer(x, x, x)[0], fresh[0])
    back = layer.to_plain()
    assert type(back) is nn.MultiheadAttention
    assert vars(back).keys() == vars(plain).keys()
    assert (back.note, back.dropout, back._qkv_same_embed_dim) == ("kept", 0.25, True)
    torch.testing.assert_close(back(x, x, x)[0], layer(x, x, x)[0])
    torch.testing.assert_close(plain.train()(x, x, x)[0].shape, fresh[0].shape)


def test_merging_and_loading_while_merged():
    layer = made(batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    y = layer(x, x, x)[0]
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    assert layer.state_dict().keys() == state.keys()
    torch.testing.assert_close(layer(x, x, x)[0], y)
    layer.alpha *= 2
    assert not torch.allclose(layer(x, x, x)[0], y)
    layer.unmerge()
    layer.alpha /= 2
    assert torch.equal(layer(x, x, x)[0], y)
    other = made(batch_first=True)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    other.merge()
    other.load_state_dict(state)
    torch.testing.assert_close(other(x, x, x)[0], y)
    with torch.no_grad():
        layer.out_lora_B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="its out_lora_B is NaN or infinite in 1 of"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "encoder"])
def test_pytorchs_encoders_call_it(stacked):
    encoder = nn.TransformerEncoderLayer(12, 4, 7, dropout=0.0, batch_first=True)
    encoder.self_attn = draw(LoRAMultiheadAttention.from_attention(encoder.self_attn, r))
    if stacked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it won't make nested tensors
            encoder = nn.TransformerEncoder(encoder, 2)
        assert not encoder.use_nested_tensor
    x = torch.randn(N, L, 12)
    padding = torch.tensor([[False] * L, [False] * (L - 1) + [True]])
    expected = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=padding), expected)


def refused(**options):
    return LoRAMultiheadAttention.from_attention(nn.MultiheadAttention(E, HEADS), **options)


def test_layers_that_are_refused():
    layers = {
        "its kdim is 5 and its vdim 12": nn.MultiheadAttention(E, HEADS, kdim=5),
        "it is a Linear, expected an nn.MultiheadAttention": nn.Linear(3, 3),
        "its in_proj_weight is torch.complex64": nn.MultiheadAttention(E, 2, dtype=torch.complex64),
    }
    layers["its out_proj can't be: it is a Identity"] = odd = nn.MultiheadAttention(E, HEADS)
    odd.out_proj = nn.Identity()
    own = type("Own", (nn.MultiheadAttention,), {"forward": lambda self, x: x})
    layers["its forward is not that of nn.MultiheadAttention"] = own(E, HEADS)
    for reason, plain in layers.items():
        with pytest.raises(TypeError, match=reason):
            LoRAMultiheadAttention.from_attention(plain, r)
        assert all(p.requires_grad for p in plain.parameters())
    for options, reason in (
        ({"r": 0}, "r is 0"),
        ({"r": 2, "use_dora": True}, "use_dora is True, expected False for attention"),
        ({"r": 2, "dropout": 2}, "dropout is 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            refused(**options)
    with pytest.raises(ValueError, match="embed_dim is 12, expected a multiple of num_heads, 5"):
        LoRAMultiheadAttention(E, 5, r)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inputs_that_are_refused():
    layer, x = made(), torch.randn(L, N, E, dtype=torch.float64)
    calls = {
        r"query has shape \[5, 2, 11\], expected two or three dimensions": (x[..., :11], x, x),
        r"key has shape \[5, 12\], expected 3 dimensions, the last of 12": (x, x[:, 0], x),
        r"value has shape \[4, 2, 12\], expected that of key, \[5, 2, 12\]": (x, x, x[:4]),
        r"key has shape \[5, 1, 12\], expected a batch of 2, as query has": (x, x[:, :1], x[:, :1]),
        "query is nested.* set use_nested_tensor to False, or make it with enable": (
            torch.nested.nested_tensor([x[:, 0], x[:3, 1]]),
            x,
            x,
        ),
    }
    for reason, arguments in calls.items():
        with pytest.raises(ValueError, match=reason):
            layer(*arguments)
    options = {
        "is_causal is True, expected the causal mask": {"is_causal": True},
        r"attn_mask has shape \[5, 4\], expected \[5, 5\] or \[6, 5, 5\]": {
            "attn_mask": torch.zeros(5, 4)
        },
        r"key_padding_mask has shape \[5\], expected \[2, 5\]": {
            "key_padding_mask": torch.zeros(5)
        },
    }
    for reason, given in options.items():
        with pytest.raises(ValueError, match=reason):
            layer(x, x, x, **given)
    with pytest.raises(
        ValueError, match=r"attn_mask is torch\.int64, expected torch\.bool or floats"
    ):
        layer(x, x, x, attn_mask=torch.zeros(L, L, dtype=torch.int64))

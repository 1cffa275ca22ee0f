"""QLoRA as PEFT documents it, with ``accelerate`` and without: its whole life, and a training run."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.layer import LoraLayer
from peft_twins import fast_layers
from quantized_twins import bnb
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lorafast
from lorafast import operands
from lorafast.nn import LoRALinear
from lorafast.reference import contract

TOKENS = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    settings = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=120, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4, computes in bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


class Life:
    """Makes the same models again and again: copies of bitsandbytes' parameters lose attributes."""

    def __init__(self, checkpoint, kind):
        self.checkpoint, self.settings = checkpoint, QUANTIZED[kind]
        compute = self.settings.get("bnb_4bit_compute_dtype", torch.float32)
        self.rel = 10 * torch.finfo(compute).eps
        """A few roundings of each of two runs, relative."""

    def base(self):
        model = LlamaForCausalLM.from_pretrained(
            self.checkpoint, quantization_config=BitsAndBytesConfig(**self.settings),
            device_map="cpu", dtype=torch.float32,
        )  # fmt: skip
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    def config(self, **options):
        defaults = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        return LoraConfig(**(defaults | options))

    def pair(self, **options):
        models = []
        for _ in range(2):
            model = self.base()
            torch.manual_seed(1)
            models.append(get_peft_model(model, self.config(**options)).train())
        stock, fast = models
        lorafast.accelerate(fast, quiet=True)
        assert fast_layers(fast) == {n for n, m in fast.named_modules() if isinstance(m, LoraLayer)}
        return stock, fast

    def assert_same(self, stock, fast):
        theirs, ours = logits(stock), logits(fast)
        assert (ours - theirs).norm() <= self.rel * theirs.norm()
        return theirs


@pytest.fixture(params=QUANTIZED)
def life(checkpoint, request):
    return Life(checkpoint, request.param)


def logits(model):
    """Of a model in training mode, in which bitsandbytes repacks nothing and splits no outliers."""
    with torch.no_grad():
        return model.train()(TOKENS).logits


def train(model, steps=3):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_train_save_load(life, tmp_path):
    stock, fast = life.pair()
    theirs, ours = train(stock), train(fast)
    assert theirs[-1] < theirs[0]
    assert ours == pytest.approx(theirs, rel=life.rel)
    life.assert_same(stock, fast)
    fast.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(life.base(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(lorafast.restore(fast)))
    lorafast.accelerate(again, quiet=True)
    life.assert_same(stock, again)


def test_disable_switch_and_delete_adapters(life):
    pair = stock, fast = life.pair(init_lora_weights=False)
    first = life.assert_same(*pair)
    for model in pair:
        torch.manual_seed(2)
        model.add_adapter("second", life.config(r=3, init_lora_weights=False))
        model.set_adapter("second")
    second = life.assert_same(*pair)
    assert not torch.allclose(first, second)
    for model in pair:
        model.base_model.set_adapter(["default", "second"])
    together = life.assert_same(*pair)
    assert not torch.allclose(first, together)
    plain = logits(life.base())
    for model in pair:
        model.train()
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
    for model in pair:
        model.delete_adapter("default")
    torch.testing.assert_close(life.assert_same(stock, fast), second)


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to")
def test_merge_unmerge_and_unload(life):
    pair = life.pair(init_lora_weights=False)
    life.assert_same(*pair)
    for model in pair:
        model.merge_adapter()
    theirs, ours = (logits(model) for model in pair)
    assert torch.equal(theirs, ours)  # merged layers are PEFT's
    for model in pair:
        model.unmerge_adapter()
    life.assert_same(*pair)
    merged = [model.merge_and_unload() for model in pair]
    assert not any(isinstance(module, LoraLayer) for module in merged[1].modules())
    assert torch.equal(*(logits(model) for model in merged))


def test_gradient_checkpointing(life):
    losses = []
    for model in life.pair(lora_dropout=0.0, init_lora_weights=False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        losses.append(train(model, steps=2))
    assert losses[1] == pytest.approx(losses[0], rel=life.rel)


D, HEADS, LENGTH, BATCH, WORDS, STEPS = 64, 4, 16, 8, 96, 60


class Block(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.before, self.between = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = linear(D, 3 * D), linear(D, D)
        self.up, self.down = linear(D, 2 * D), linear(2 * D, D)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Reader(nn.Module):
    """A small causal transformer, in whatever dtype its parameters have."""

    def __init__(self, linear):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, D), nn.Embedding(LENGTH, D)
        self.blocks = nn.ModuleList(Block(linear) for _ in range(2))
        self.last, self.head = nn.LayerNorm(D), nn.Linear(D, WORDS)

    def forward(self, tokens):
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def reader(compute=None, alpha=16.0):
    torch.manual_seed(0)
    model = Reader(
        lambda K, N: bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=compute)
    ).to("cpu")
    model.is_loaded_in_4bit = True
    settings = LoraConfig(r=8, lora_alpha=alpha, target_modules=["qkv", "out", "up", "down"])
    torch.manual_seed(1)
    return get_peft_model(model, settings)


def in_float64():
    """The same with W made dense."""
    model = reader()
    for module in list(model.modules()):
        base = module._modules.get("base_layer")
        if isinstance(base, bnb.nn.Linear4bit):
            dense = nn.Linear(base.in_features, base.out_features)
            dense.weight.data = operands.of_layer(base).dense()
            dense.bias.data = base.bias.detach()
            module.base_layer = dense.requires_grad_(False)
            module.forward = _plain(module)
    return model.double()


def _plain(layer):
    """What a LoRA layer computes."""

    def forward(x):
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        return layer.base_layer(x) + B(A(x)) * layer.scaling["default"]

    return forward


def curve(model):
    """The losses of a run, step by step."""
    random = torch.Generator().manual_seed(3)
    following = torch.randint(0, WORDS, (WORDS,), generator=random)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        tokens = [torch.randint(0, WORDS, (BATCH,), generator=random)]
        for _ in range(LENGTH):
            tokens.append(following[tokens[-1]])
        batch = torch.stack(tokens, dim=1)
        words = model(batch[:, :-1])
        loss = F.cross_entropy(words.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def why_apart(found, stock, exact, dtype):
    """The contract of the losses up to each step: how the first that breaks it does so, or None."""
    for step in range(1, STEPS + 1):
        bound = contract.bound(stock[:step], exact[:step], dtype=dtype)
        reason = bound.verdict(found[:step]).why_broken
        if reason is not None:
            return f"the losses up to step {step} are {reason}"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=str)
def test_a_training_run_follows_pefts(compute):
    """Step by step as near to float64's losses as PEFT's own are."""
    exact, stock = curve(in_float64()), curve(reader(compute))
    fast = lorafast.accelerate(reader(compute), quiet=True)
    assert len(fast_layers(fast)) == 8
    found = curve(fast)
    assert exact[-5:].mean() < 0.5 * exact[0]
    reason = why_apart(found, stock, exact, compute or torch.float32)
    assert reason is None, reason


def test_a_run_that_is_off_is_noticed():
    exact, stock = curve(in_float64()), curve(reader())
    off = curve(reader(alpha=16.01))
    assert "are off by" in why_apart(off, stock, exact, torch.float32)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapted_model_is_saved_as_bitsandbytes_is_loaded(checkpoint, tmp_path, kind):
    """By ``from_pretrained``: layers of bitsandbytes, codes and scales to the bit, and the adapter."""
    model = lorafast.adapt(Life(checkpoint, kind).base(), 3, TARGETS)
    layer = model.model.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    found = again.model.layers[0].self_attn.q_proj
    assert torch.equal(found.lora_B["default"].weight, layer.lora_B)
    expected = layer.operand().tensors()
    for name, tensor in operands.of_layer(found.base_layer).tensors().items():
        assert torch.equal(tensor.reshape(-1), expected[name].reshape(-1)), name


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_an_adapter_goes_to_peft_over_bitsandbytes_and_back(checkpoint, tmp_path, kind):
    """Trained over ``lorafast.quantize``d layers, then over bitsandbytes', then over ours again."""
    life = Life(checkpoint, kind)

    def quantized():
        plain = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        plain.requires_grad_(False)
        if kind != "int8":
            return lorafast.quantize(plain, kind, nested=kind == "nf4")  # as QUANTIZED has it
        for layer in plain.model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(layer.weight.half())  # as its layer rounds them first
        return lorafast.quantize(plain, kind)

    ours = lorafast.adapt(quantized(), 4, TARGETS)
    before = logits(ours)
    train(ours)
    after = logits(ours)
    lorafast.save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(life.base(), tmp_path / "ours", is_trainable=True)
    for name, layer in ours.named_modules():
        if isinstance(layer, LoRALinear):
            its = theirs.base_model.model.get_submodule(name)
            assert torch.equal(its.lora_A["default"].weight, layer.lora_A)
            assert torch.equal(its.lora_B["default"].weight, layer.lora_B)
    change = (after - before).norm()
    # A nested scale may have another code in its kernel for CPUs.
    assert (logits(theirs) - after).norm() < 0.05 * change
    train(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = lorafast.load_adapter(quantized(), tmp_path / "theirs")
    for name, layer in again.named_modules():
        if isinstance(layer, LoRALinear):
            its = theirs.base_model.model.get_submodule(name)
            assert torch.equal(its.lora_A["default"].weight, layer.lora_A)
            assert torch.equal(its.lora_B["default"].weight, layer.lora_B)
    assert sum(isinstance(layer, LoRALinear) for layer in again.modules()) == 6
    assert (logits(again) - logits(theirs)).norm() < 0.05 * change

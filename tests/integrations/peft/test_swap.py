"""accelerate and restore: nothing visible changes, whatever is made, copied, pickled, hooked."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("peft")

import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Embedding, Linear
from peft_twins import TOKENS, K, N, fast_layers, peft_model
from torch import nn

import lorafast


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, K)
        self.up = nn.Linear(K, N)
        self.down = nn.Linear(N, K)

    def forward(self, tokens):
        return self.down(torch.relu(self.up(self.embed(tokens))))


def model(**options):
    defaults = {"r": 4, "target_modules": ["up", "down", "embed"], "init_lora_weights": False}
    return get_peft_model(Net(), LoraConfig(**(defaults | options)))


def lora_layers(of):
    return {n: m for n, m in of.named_modules() if isinstance(m, (Linear, Embedding))}


TOKEN_ROWS = torch.arange(12).view(3, 4)


def visible(of):
    """What a user sees of a model."""
    return {
        "repr": repr(of),
        "keys": list(of.state_dict()),
        "parameters": {n: (id(p), p.dtype, p.requires_grad) for n, p in of.named_parameters()},
        "modules": {n: id(m) for n, m in of.named_modules()},
        "status": of.get_layer_status(),
        "model status": of.get_model_status(),
        "config": of.peft_config["default"].to_dict(),
    }


def test_nothing_visible_changes():
    stock = model()
    before = visible(stock)
    assert lorafast.accelerate(stock, quiet=True) is stock
    assert len(fast_layers(stock)) == 3
    assert visible(stock) == before
    assert isinstance(stock.base_model.model.up, peft.tuners.lora.Linear)
    assert isinstance(stock.base_model.model.embed, peft.tuners.lora.Embedding)


def test_restore_gives_the_very_classes_back():
    accelerated = lorafast.accelerate(model(), quiet=True)
    assert lorafast.restore(accelerated) is accelerated
    assert {type(m) for m in lora_layers(accelerated).values()} == {Linear, Embedding}
    assert fast_layers(accelerated) == set()


def test_twice_is_once():
    accelerated = lorafast.accelerate(lorafast.accelerate(model(), quiet=True), quiet=True)
    lorafast.restore(lorafast.restore(accelerated))
    assert {type(m) for m in lora_layers(accelerated).values()} == {Linear, Embedding}


def bounded():
    """A model whose embedding is left to PEFT."""
    made = model(use_dora=True)
    made.base_model.model.embed.base_layer.max_norm = 1.0
    return made


def test_it_says_in_a_line_how_many(capsys):
    lorafast.accelerate(model())
    assert capsys.readouterr().out == "lorafast: 3 of 3 adapter layers are fast\n"
    lorafast.accelerate(bounded())
    assert capsys.readouterr().out == (
        "lorafast: 2 of 3 adapter layers are fast, 1 PEFT's own "
        "(lorafast.explain(model) says why)\n"
    )


def test_layers_without_an_active_adapter_are_counted_apart(capsys):
    made = model()
    made.add_adapter("small", LoraConfig(target_modules=["down"], r=2))
    made.set_adapter("small")
    lorafast.accelerate(made)
    assert capsys.readouterr().out == (
        "lorafast: 1 of 3 adapter layers are fast, 2 without an active adapter "
        "(lorafast.explain(model) says why)\n"
    )
    assert str(lorafast.explain(made)).splitlines()[1:3] == [
        "without an active adapter:",
        "  base_model.model.embed",
    ]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(K, 2)
        self.attention.out_proj = nn.Linear(K, K)
        self.up = nn.Linear(K, N)

    def forward(self, x):
        return self.up(self.attention(x, x, x)[0])


def test_layers_that_nobody_calls_are_named(capsys, served_by_peft):
    made = get_peft_model(Attention(), LoraConfig(target_modules=["out_proj", "up"]))
    lorafast.accelerate(made)
    assert capsys.readouterr().out == (
        "lorafast: 1 of 2 adapter layers are fast, 1 never called "
        "(base_model.model.attention.out_proj) (lorafast.explain(model) says why)\n"
    )
    assert "MultiheadAttention reads its weight without calling it:\n" in str(
        lorafast.explain(made)
    )
    made(torch.randn(3, K)).sum().backward()
    layer = made.base_model.model.attention.out_proj
    assert layer.lora_B["default"].weight.grad is None
    assert served_by_peft == []


def test_many_that_nobody_calls(capsys):
    net = nn.ModuleList([Attention() for _ in range(5)])
    lorafast.accelerate(get_peft_model(net, LoraConfig(target_modules=["out_proj"])))
    assert "5 never called (base_model.model.0.attention.out_proj, base_model.model.1." in (
        text := capsys.readouterr().out
    )
    assert "base_model.model.2.attention.out_proj, ...)" in text


def test_a_compiled_layer_is_called():
    made = model()
    made.base_model.model.up = torch.compile(made.base_model.model.up, backend="eager")
    lorafast.accelerate(made, quiet=True)
    assert len(fast_layers(made)) == 3


def test_explain_as_text():
    text = str(lorafast.explain(lorafast.accelerate(bounded(), quiet=True)))
    assert text == (
        "2 of 3 adapter layers are fast, 1 PEFT's own (lorafast.explain(model) says why)\n"
        "served by PEFT, its base layer has max_norm, scale_grad_by_freq or sparse:\n"
        "  base_model.model.embed\n"
        "served by lorafast:\n"
        "  base_model.model.up\n"
        "  base_model.model.down"
    )


def test_a_model_without_adapter_layers_is_refused():
    with pytest.raises(ValueError, match="the model has none of PEFT's adapter layers"):
        lorafast.accelerate(nn.Linear(3, 4))


def test_adapters_of_another_method_are_named():
    hra = get_peft_model(Net(), peft.HRAConfig(target_modules=["up"]))
    lorafast.accelerate(hra, quiet=True)
    assert "HRALinear is of a kind that has no faster way here" in str(lorafast.explain(hra))


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_a_copy_is_fast_too(copier):
    layer = lorafast.accelerate(model(), quiet=True).base_model.model.up
    copied = copier(layer)
    assert type(copied) is type(layer)
    x = torch.randn(3, K)
    torch.testing.assert_close(copied(x), layer(x), rtol=0, atol=0)
    shared = copied.lora_A["default"].weight is layer.lora_A["default"].weight
    assert shared == (copier is copy.copy)


def test_deepcopy_keeps_what_is_shared():
    accelerated = lorafast.accelerate(model(), quiet=True)
    pair = copy.deepcopy([accelerated, accelerated.base_model.model.up])
    assert pair[0].base_model.model.up is pair[1]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_holds_PEFTs_layer(protocol):
    accelerated = lorafast.accelerate(model(), quiet=True)
    content = pickle.dumps(accelerated.base_model.model.up, protocol)
    assert b"lorafast" not in content
    loaded = pickle.loads(content)
    assert type(loaded) is Linear
    x = torch.randn(3, K)
    torch.testing.assert_close(loaded(x), accelerated.base_model.model.up(x))


@pytest.mark.slow
def test_torch_save_of_a_whole_model_loads_without_lorafast(tmp_path):
    layer = lorafast.accelerate(peft_model(), quiet=True).base_model.model.layer
    x = torch.randn(3, K)
    torch.save((layer, x, layer(x).detach()), tmp_path / "layer.pt")
    code = (
        "import sys; sys.modules['lorafast'] = None\n"
        "import torch\n"
        f"layer, x, y = torch.load({str(tmp_path / 'layer.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(layer(x), y)\n"
        "print(type(layer).__module__)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "peft.tuners.lora.layer", process.stderr


def test_state_dict_of_either_loads_into_the_other():
    stock, accelerated = model(), lorafast.accelerate(model(), quiet=True)
    buffer = io.BytesIO()
    torch.save(accelerated.state_dict(), buffer)
    buffer.seek(0)
    stock.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(stock(TOKEN_ROWS), accelerated(TOKEN_ROWS))


class TestFromNowOn:
    @pytest.fixture(autouse=True)
    def _undone(self):
        yield
        lorafast.restore()
        assert fast_layers(model()) == set()

    def test_a_block(self):
        with lorafast.accelerated():
            inside = model()
            with lorafast.accelerated():
                pass
            assert len(fast_layers(model())) == 3
        assert len(fast_layers(inside)) == 3
        assert fast_layers(model()) == set()

    def test_a_block_that_raises(self):
        with pytest.raises(KeyError), lorafast.accelerated():
            raise KeyError
        assert fast_layers(model()) == set()

    def test_until_restore(self, tmp_path):
        model().save_pretrained(tmp_path)
        assert lorafast.accelerate() is None
        assert len(fast_layers(model())) == 3
        assert len(fast_layers(PeftModel.from_pretrained(Net(), tmp_path))) == 3
        assert lorafast.restore() is None
        assert fast_layers(model()) == set()

    def test_an_added_adapter_brings_fast_layers(self):
        with lorafast.accelerated():
            made = model(target_modules=["up"])
            made.add_adapter("more", LoraConfig(target_modules=["down"], r=2))
        assert len(fast_layers(made)) == 1  # "down" has no active adapter yet
        made.set_adapter("more")
        assert fast_layers(made) == {"base_model.model.down"}

    def test_what_others_put_in_place_stays(self, monkeypatch):
        from peft.tuners.lora.model import LoraModel

        stock = vars(LoraModel)["_create_new_module"]
        with lorafast.accelerated():
            inner = LoraModel._create_new_module
            own = staticmethod(lambda *args, **kwargs: inner(*args, **kwargs))
            monkeypatch.setattr(LoraModel, "_create_new_module", own)
        assert vars(LoraModel)["_create_new_module"] is own
        assert fast_layers(model()) == set()
        monkeypatch.undo()  # which puts back what it found
        assert fast_layers(model()) == set()
        with lorafast.accelerated():
            assert len(fast_layers(model())) == 3
        assert vars(LoraModel)["_create_new_module"] is stock

    def test_restoring_a_model_leaves_the_others(self):
        lorafast.accelerate()
        one, other = model(), model()
        lorafast.restore(one)
        assert fast_layers(one) == set()
        assert len(fast_layers(other)) == 3


def test_layers_added_later_are_named():
    made = lorafast.accelerate(model(target_modules=["up"]), quiet=True)
    made.add_adapter("more", LoraConfig(target_modules=["up", "down"], r=2))
    assert "it isn't accelerated: it was made later, or restored" in str(lorafast.explain(made))
    lorafast.accelerate(made, quiet=True)
    made.set_adapter("more")
    assert len(fast_layers(made)) == 2


class TestAnEarlierForward:
    """What keeps the forward that it found keeps it slow if it came before, fast if after."""

    def hook(self, layer):
        hooks = pytest.importorskip("accelerate.hooks")

        class Counting(hooks.ModelHook):
            count = 0

            def post_forward(self, module, output):
                Counting.count += 1
                return output

        hooks.add_hook_to_module(layer, Counting())
        return hooks, Counting

    def test_before(self):
        made = peft_model()
        self.hook(made.base_model.model.layer)
        lorafast.accelerate(made, quiet=True)
        assert "its forward was replaced (a hook of accelerate's, X-LoRA)" in str(
            lorafast.explain(made)
        )
        assert type(made.base_model.model.layer) is Linear

    def test_another_forward_after(self):
        made = lorafast.accelerate(peft_model(), quiet=True)
        made.base_model.model.layer.forward = lambda x: 0 * x
        assert "its forward was replaced after it was made fast" in str(lorafast.explain(made))

    def test_a_hook_after_is_no_reason(self):
        made = lorafast.accelerate(peft_model(), quiet=True)
        self.hook(made.base_model.model.layer)
        assert len(fast_layers(made)) == 1

    def test_after_and_restored(self, monkeypatch):
        made = lorafast.accelerate(peft_model(), quiet=True)
        layer = made.base_model.model.layer
        x = torch.randn(3, K)
        expected = made(x)
        hooks, counting = self.hook(layer)
        torch.testing.assert_close(made(x), expected, rtol=0, atol=0)
        lorafast.restore(made)
        calls = []
        monkeypatch.setattr("lorafast.integrations.peft.linear.forward", calls.append)
        torch.testing.assert_close(made(x), expected)
        assert (counting.count, calls) == (2, [])
        hooks.remove_hook_from_module(layer)
        torch.testing.assert_close(made(x), expected)
        assert calls == []


def test_without_PEFT():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch, lorafast\n"
        "try:\n    lorafast.accelerate()\n"
        "except ImportError as error:\n    print(error)\n"
        "print(lorafast.explain(lorafast.nn.LoRALinear(8, 8, 2)).layers.keys())"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = process.stdout.splitlines()
    assert lines == [
        "lorafast.accelerate is for PEFT's layers, and PEFT is not installed: pip install peft",
        "dict_keys(['(module)'])",
    ], process.stderr


def test_importing_lorafast_does_not_import_peft():
    code = "import sys, lorafast; print('peft' in sys.modules, 'transformers' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "False False", process.stderr

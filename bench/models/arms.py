"""A Llama of random weights and its adapted copies, which share the frozen weights."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lorafast.bench.common import bases, bitsandbytes, memory
from lorafast.bench.common.contenders import FROZEN, FULL, SIBLINGS, UnavailableError
from lorafast.bench.common.problem import DTYPES, SCALING
from lorafast.bench.common.shapes import Model
from torch import Tensor, nn

import lorafast
from lorafast.backends import forced
from lorafast.nn import LoRALinear
from lorafast.operands import DENSE, Operand
from lorafast.ops.problems import why_not

_HEAD = "lm_head"
# Arithmetic of a frozen step that a model is cut to: about a second.
_STEP_FLOPS = {"cpu": 60e9, "cuda": 100e12}


@dataclass(frozen=True)
class Size:
    """How much of a model is built: blocks and vocabulary are cut by the same factor, so that every
    part keeps its share of a step. ``base``: the format in which adapted layers have their weight.
    """

    model: Model
    layers: int
    tokens: int
    dtype: str
    base: str = DENSE

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, a multiple of 64."""
        return max(round(self.model.vocabulary * self.layers / self.model.layers / 64), 1) * 64

    @property
    def parameters(self) -> int:
        """Weights of the linear layers, the language head among them."""
        block = sum(K * N for K, N in self.model.linears.values())
        return block * self.layers + self.vocabulary * self.model.hidden


def fitting(model: Model, tokens: int, dtype: str, device: torch.device, base: str = DENSE) -> Size:
    """As many blocks as memory and about a second a step allow, at least one."""
    whole = Size(model, model.layers, tokens, dtype)
    per_layer = whole.parameters / model.layers
    # The weights and the float64 copy that results are checked against, in half of what is free.
    by_memory = _free_memory(device) / 2 / (per_layer * (DTYPES[dtype].itemsize + 8))
    by_time = _STEP_FLOPS[device.type] / (4 * per_layer * tokens)
    layers = max(min(int(by_memory), int(by_time), model.layers), 1)
    return Size(model, layers, tokens, dtype, base)


def why_too_large(size: Size, device: torch.device) -> str | None:
    """A sentence if the weights and logits alone are more than the device's whole memory, or None."""
    elements = size.parameters + size.tokens * (size.vocabulary + size.model.hidden)
    needed, there = elements * DTYPES[size.dtype].itemsize, memory.whole(device)
    if needed <= there:
        return None
    return (
        f"{size.layers} blocks of {size.model.name} and {size.tokens} tokens take "
        f"{needed / 1e9:,.0f} GB, and {device} has {there / 1e9:,.0f} GB"
    )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as info:
            lines = dict(line.split(":") for line in info)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8 << 30


def build(size: Size, device: torch.device) -> nn.Module:
    """The frozen model.

    Raises:
        UnavailableError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UnavailableError("transformers is not installed (pip install transformers)") from None
    model = size.model
    sizes: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": max(size.tokens, 2048),
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    config = LlamaConfig(**sizes)
    torch.manual_seed(0)
    with device:
        built: nn.Module = LlamaForCausalLM(config)
        return built.to(DTYPES[size.dtype]).requires_grad_(False).train()


def quantize(frozen: nn.Module, base: str) -> dict[str, Operand]:
    """Every linear layer's weight in the format ``base``, by the layer's name, but for the head; of a
    dense one none. The layers of ``frozen`` get what it stands for."""
    found: dict[str, Operand] = {}
    for name, layer in frozen.named_modules():
        if type(layer) is nn.Linear and name != _HEAD:
            operand = bases.quantized(layer.weight.data, base)
            if operand is not None:
                found[name] = operand
                layer.weight.data.copy_(operand.dense())
    return found


@dataclass
class Arm:
    """One contender: a model, its adapters by layer name as ``(lora_A, lora_B)``, an optimizer."""

    name: str
    model: Callable[..., Any]
    dtype: torch.dtype
    adapters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    optimizer: torch.optim.Optimizer | None = None
    weights_bytes: int = 0
    """Of what it holds, adapters and all, its optimizer's state not."""

    def step(self, embeddings: Tensor, labels: Tensor) -> None:
        """Forward, loss, backward, optimizer; dx is computed down to the first layer by all arms."""
        with self.context():
            self.model(inputs_embeds=embeddings, labels=labels).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        embeddings.grad = None


def make(
    name: str, frozen: nn.Module, r: int, operands: Mapping[str, Operand] | None = None
) -> Arm:
    """The arm ``name``: a contender's name as in the layer table; adapted layers have the weights of
    ``operands`` (``quantize``), those that are there.

    Raises:
        UnavailableError: this machine can't run it.
    """
    plain = name.removesuffix("-compiled")
    arm = _plain(plain, frozen, r, operands or {})
    if plain != name:
        arm.name, arm.model = name, torch.compile(arm.model, dynamic=False)
    return arm


def _plain(name: str, frozen: nn.Module, r: int, operands: Mapping[str, Operand]) -> Arm:
    if name == FROZEN:
        return Arm(name, frozen, _dtype(frozen), weights_bytes=_bytes(frozen))
    if name == FULL:
        return _full(frozen, operands)
    # Copies of the modules, around the same parameters.
    model = copy.deepcopy(frozen, {id(p): p for p in frozen.parameters()})
    if name == "peft":
        _put_bitsandbytes(model, operands)
        arm = _peft(model, r)
    else:
        arm = _lorafast(name, model, r, operands)
    arm.weights_bytes = _bytes(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in sorted(arm.adapters):
            for parameter, scale in zip(
                arm.adapters[layer], (arm.adapters[layer][0].shape[1] ** -0.5, 0.02), strict=True
            ):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    arm.optimizer = _optimizer(tensor for pair in arm.adapters.values() for tensor in pair)
    return arm


def _full(frozen: nn.Module, operands: Mapping[str, Operand]) -> Arm:
    """A copy of all weights, all of them trained."""
    if operands:
        raise UnavailableError("full fine-tuning trains dense weights")
    model = copy.deepcopy(frozen).requires_grad_()
    arm = Arm(FULL, model, _dtype(model), weights_bytes=_bytes(model))
    arm.optimizer = _optimizer(model.parameters())
    return arm


def _optimizer(trained: Iterable[Tensor]) -> torch.optim.Optimizer:
    """With a learning rate of zero: a step costs the same and the models stay as they were checked."""
    return torch.optim.AdamW(trained, lr=0.0, fused=True)


def _bytes(model: nn.Module) -> int:
    tensors: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        scales = [] if state is None else [state.absmax, state.offset]
        if state is not None and state.state2 is not None:
            scales += [state.state2.absmax, state.state2.code]
        scales.append(getattr(tensor, "SCB", None))
        tensors |= {t.data_ptr(): t for t in (tensor, *scales) if t is not None}
    return sum(tensor.nbytes for tensor in tensors.values())


def _put_bitsandbytes(model: nn.Module, operands: Mapping[str, Operand]) -> None:
    for name, operand in operands.items():
        reason = bitsandbytes.why_not(operand)
        if reason is not None:
            raise UnavailableError(reason)
        bias: Any = model.get_submodule(name).bias
        model.set_submodule(name, bitsandbytes.layer_of(operand, bias))
        setattr(model, bitsandbytes.FLAGS[operand.format], True)


def _dtype(model: nn.Module) -> torch.dtype:
    """That of the frozen weights, which come first."""
    return next(model.parameters()).dtype


def _peft(model: nn.Module, r: int) -> Arm:
    try:
        import peft
    except ImportError:
        raise UnavailableError("PEFT is not installed (pip install peft)") from None
    config = peft.LoraConfig(
        r=r,
        lora_alpha=SCALING * r,  # an int by its hint alone
        target_modules="all-linear",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's words with transformers
        adapted = peft.get_peft_model(model, config)
    prefix = "base_model.model."
    adapters: Any = {
        module_name.removeprefix(prefix): (
            module.lora_A["default"].weight,
            module.lora_B["default"].weight,
        )
        for module_name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    return Arm("peft", adapted, _dtype(model), adapters)


def _lorafast(name: str, model: nn.Module, r: int, operands: Mapping[str, Operand]) -> Arm:
    for layer, operand in operands.items():
        bias: Any = model.get_submodule(layer).bias
        over = LoRALinear.from_operand(operand, r, bias=bias, alpha=SCALING * r)
        model.set_submodule(layer, over.train())
    if operands and name == SIBLINGS:
        raise UnavailableError("siblings share x over dense weights alone")
    adapted = model
    if not operands:
        fuse = "siblings" if name == SIBLINGS else None
        adapted = lorafast.adapt(model, r, alpha=SCALING * r, targets="all-linear", fuse=fuse)
    adapters: dict[str, tuple[Tensor, Tensor]] = {
        module_name: (module.lora_A, module.lora_B)
        for module_name, module in adapted.named_modules()
        if isinstance(module, LoRALinear)
    }
    if name in ("lorafast", SIBLINGS):
        return Arm(name, adapted, _dtype(model), adapters)
    weight = next(model.parameters())
    reason = why_not(name, weight)
    if reason is not None:
        raise UnavailableError(reason)
    return Arm(name, adapted, _dtype(model), adapters, lambda: forced.use_backend(name))

"""Runs of Transformers' ``Trainer`` and of TRL's ``SFTTrainer`` in one process or as a rank of several.

Imported by ranks, which are forked from a server that has imported Transformers: the tests themselves
don't.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

IMPORTS = (
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "lorafast.integrations.transformers",
)
TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 4
ON_CPU = "a trainer in one process, to which two are held, takes all GPUs that it sees"
Gradients = dict[str, Tensor]


@dataclass
class Run:
    """What a run leaves to be compared: a loss and the adapters' gradients of each step."""

    losses: list[float] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    wrapped: str = ""
    forwards: int = 0
    """How often the first adapted layer was called."""
    by_peft: int = 0
    """How many of these calls PEFT's own forward served."""


def be_rank(rank: int, world: int) -> None:
    """What accelerate reads to know its place; ``world`` 1: it is alone, whatever group there is."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    for name, value in places.items():
        os.environ.pop(name, None)
        if world > 1:
            os.environ[name] = str(value)


def llama(dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    settings = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=120, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(settings).to(dtype)


def model(kind: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    """``"adapted"`` by lorafast, or with PEFT's layers; B isn't 0."""
    from small_decoder import fill_adapters

    if kind == "adapted":
        import lorafast

        made = lorafast.adapt(llama(dtype), 4, TARGETS, alpha=16, dropout=dropout)
    else:
        from peft import get_peft_model

        made = get_peft_model(llama(dtype), lora_config(dropout), autocast_adapter_dtype=False)
    fill_adapters(made)
    return made


def lora_config(dropout: float = 0.0, **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=TARGETS,
        lora_dropout=dropout,
        task_type="CAUSAL_LM",
        **more,
    )


def data(rows: int = 32) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 120, (rows, 11), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def watching(run: Run, stop: Any) -> Any:
    """A callback that writes into ``run``; ``stop(step)`` is called before a step of the optimizer."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if stop is not None:
                stop(state.global_step)
            run.gradients.append({})
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad
                    gradient = getattr(gradient, "full_tensor", gradient.clone)()
                    run.gradients[-1][name] = gradient

    return Watch()


def arguments(folder: Any, world: int, **options: Any) -> dict[str, Any]:
    """The same rows in a step, whatever the number of processes."""
    return {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4 // world,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 0,
        "disable_tqdm": True, "save_steps": 2, **options,
    }  # fmt: skip


def train(
    made: nn.Module,
    folder: Any,
    world: int,
    callbacks: Any = (),
    stop: Any = None,
    resume: str | None = None,
    **options: Any,
) -> Run:
    from transformers import Trainer, TrainingArguments

    run = Run()
    kind = fsdp_trainer() if options.get("fsdp") else Trainer
    trainer = kind(
        model=made,
        args=TrainingArguments(**arguments(folder, world, **options)),
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=[watching(run, stop), *callbacks],
    )
    return finish(trainer, run, resume)


def finish(trainer: Any, run: Run, resume: str | None = None) -> Run:
    from peft.tuners.lora.layer import Linear

    stock = Linear.forward
    first = next(
        m for n, m in trainer.model.named_modules() if n.endswith("layers.0.self_attn.q_proj")
    )

    def counted(module, *args, **kwargs):
        run.by_peft += 1
        return stock(module, *args, **kwargs)

    def called(*_):
        run.forwards += 1

    handle = first.register_forward_hook(called)
    Linear.forward = counted
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        Linear.forward = stock
        handle.remove()
    history = trainer.state.log_history
    run.losses = [entry["loss"] for entry in history if "loss" in entry]
    run.evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    if trainer.args.load_best_model_at_end:
        run.evaluations.append(trainer.evaluate()["eval_loss"])
    run.wrapped = type(trainer.model_wrapped).__name__
    return run


def fsdp_trainer() -> Any:
    """A ``Trainer`` that is told that a CPU is a device for FSDP2: accelerate takes DDP there."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import Trainer

    class FSDPTrainer(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            AcceleratorState._shared_state["fsdp_plugin"] = plugin
            for state in (AcceleratorState, PartialState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    return FSDPTrainer


def difference(found: Gradients, expected: Gradients) -> float:
    """The largest ``‖found − expected‖ / ‖expected‖`` of all gradients; they have the same names."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    assert expected
    return max(float((found[n] - e).norm() / e.norm()) for n, e in expected.items())

"""Lightning's ``Trainer`` in two processes against one on the same data, killed and resumed."""

import importlib.util
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ranks import RankError, on_ranks
from small_decoder import decoder, fill_adapters, tokens
from trainer_runs import ON_CPU, TARGETS, difference, lora_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("lightning", "peft"))),
        reason="needs lightning, peft",
    ),
]
IMPORTS = ("lightning.pytorch", "peft")
KINDS = {"adapted": torch.float64, "accelerated": torch.float32}
ROUNDING = {torch.float64: 1e-12, torch.float32: 2.0**-18}
STEPS = 4


def _model(kind):
    torch.manual_seed(9)
    if kind == "adapted":
        import lorafast

        made = lorafast.adapt(decoder(KINDS[kind]), 4, TARGETS, alpha=16)
    else:
        from peft import get_peft_model

        settings = lora_config()
        settings.task_type = None
        made = get_peft_model(decoder(KINDS[kind]), settings)
    fill_adapters(made)
    return made


def _module(kind, late, sharded, stop):
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.losses, self.gradients, self.by_peft, self.wrapped = [], [], 0, ""
            self.model = None if late else _model(kind)

        def configure_model(self):
            if self.model is None:
                self.model = _model(kind)
            if sharded:
                from torch.distributed.fsdp import fully_shard

                inner = self.model if kind == "adapted" else self.model.base_model.model
                for part in (*inner.layers, self.model):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

        def on_train_start(self):
            from peft.tuners.lora.layer import Linear

            stock = Linear.forward

            def counted(layer, *args, **kwargs):
                self.by_peft += 1
                return stock(layer, *args, **kwargs)

            Linear.forward = counted  # not before: another forward than PEFT's isn't accelerated

        def training_step(self, ids, index):
            logits = self.model(ids)[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            self.log("loss", loss, sync_dist=True)
            return loss

        def on_before_optimizer_step(self, optimizer):
            stop(self.global_step)
            self.wrapped = type(self.trainer.strategy.model).__name__
            self.gradients.append({})
            for name, parameter in self.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad
                    gradient = getattr(gradient, "full_tensor", gradient.clone)()
                    self.gradients[-1][name] = gradient

        def on_train_batch_end(self, outputs, batch, index):
            self.losses.append(float(self.trainer.callback_metrics["loss"]))

        def configure_optimizers(self):
            trained = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trained, lr=0.1, momentum=0.9)

    return Module()


def _fit(
    kind,
    folder,
    rank,
    world,
    rows=32,
    late=False,
    sharded=False,
    resume=None,
    stop=lambda _: None,
    **options,
):
    """The module after ``STEPS`` steps; a step has the same rows, whatever the number of processes."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from peft.tuners.lora.layer import Linear
    from torch.utils.data import DataLoader, DistributedSampler

    from lorafast.integrations.lightning import Accelerate

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "GROUP_RANK": 0}
    places["TORCHELASTIC_RUN_ID"] = "tests"
    for name, value in places.items():
        os.environ.pop(name, None)
        if world > 1:
            os.environ[name] = str(value)
    if world > 1:
        split = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
        options["strategy"] = split if sharded else "ddp"
    callbacks = [ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)]
    if kind == "accelerated":
        callbacks.append(Accelerate(quiet=True))
    trainer = Trainer(
        accelerator="cpu", devices=world, max_steps=STEPS, logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=folder, **options,
    )  # fmt: skip
    module, ids = _module(kind, late, sharded, stop), tokens(rows)
    sampler = DistributedSampler(ids, shuffle=False) if world > 1 else None
    stock = Linear.forward
    try:
        trainer.fit(module, DataLoader(ids, 4 // world, sampler=sampler), ckpt_path=resume)
    finally:
        Linear.forward = stock
    assert module.by_peft == 0
    return module


def _as_one(rank, folder):
    for kind, dtype in KINDS.items():
        for name, options in {
            "plain": {},
            "late": {"late": True},
            "several": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
            "sharded": {"late": True, "sharded": True},
        }.items():
            run = partial(_fit, kind)
            two = run(f"{folder}/{kind}-{name}", rank, 2, **options)
            one = run(f"{folder}/{kind}-{name}-{rank}", 0, 1, **options | {"sharded": False})
            assert two.wrapped == ("Module" if name == "sharded" else "DistributedDataParallel")
            assert two.losses == pytest.approx(one.losses, rel=ROUNDING[dtype])
            assert len(two.gradients) == STEPS
            for found, expected in zip(two.gradients, one.gradients, strict=True):
                assert difference(found, expected) <= ROUNDING[dtype]


def test_two_processes_train_as_one(tmp_path):
    on_ranks(_as_one, str(tmp_path), imports=IMPORTS, cpu_because=ON_CPU)


def _part(rank, folder, resume, dies):
    def stop(step):
        if dies and step == 2 and rank == 1:
            os._exit(9)

    run = _fit("accelerated", folder, rank, 2, rows=4, resume=resume, stop=stop)
    return run.losses, [{n: g.tolist() for n, g in step.items()} for step in run.gradients]


def test_a_killed_run_is_resumed(tmp_path):
    """To the bit. An epoch has one step: a plain DataLoader doesn't save its place in the data."""
    part = partial(on_ranks, _part, imports=IMPORTS, cpu_because=ON_CPU)
    whole = part(str(tmp_path / "whole"), None, False)
    with pytest.raises(RankError):
        part(str(tmp_path / "killed"), None, True)
    last = str(tmp_path / "killed" / "step=2.ckpt")
    resumed = part(str(tmp_path / "killed"), last, False)
    for (losses, gradients), (later, last_gradients) in zip(whole, resumed, strict=True):
        assert later == losses[2:]
        assert last_gradients == gradients[2:]
        assert gradients[2] != gradients[3]

"""Transformers' ``Trainer`` in two processes against one on the same data, killed and resumed.

A model that ``adapt`` made, in float64, and one of PEFT's with the callback ``Accelerate``, in float32,
for PEFT serves float64 itself. Only the order of sums differs.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import trainer_runs as runs
from ranks import RankError, on_ranks
from trainer_runs import IMPORTS, ON_CPU, STEPS, be_rank, difference, model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("transformers", "peft", "accelerate"))),
        reason="needs transformers, peft and accelerate",
    ),
]

KINDS = {"adapted": torch.float64, "accelerated": torch.float32}
ROUNDING = {torch.float64: 1e-12, torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7}
LOSSES = 2.0**-21
"""A ``Trainer`` sums losses in float32."""
CHECKPOINTING = {
    mode: {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    for mode, reentrant in (("recomputed", False), ("reentrant", True))
}


def callbacks(kind):
    from lorafast.integrations.transformers import Accelerate, SaveAdapter

    return [SaveAdapter()] if kind == "adapted" else [Accelerate(quiet=True)]


def trained(kind, folder, world, dtype=None, dropout=0.0, **options):
    made = model(kind, dtype or KINDS[kind], dropout)
    run = runs.train(made, folder, world, callbacks(kind), **options)
    assert run.by_peft == 0
    return run


def assert_same(found, expected, dtype):
    """The same curve of losses, and the same gradients at every step."""
    rounding = ROUNDING[dtype]
    assert found.losses == pytest.approx(expected.losses, rel=max(rounding, LOSSES))
    assert len(found.gradients) == len(expected.gradients) == STEPS
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert difference(one, other) <= rounding
    ranks = [None, None]
    dist.all_gather_object(ranks, {n: g.tolist() for n, g in found.gradients[-1].items()})
    assert ranks[0] == ranks[1]  # to the bit


def _as_one(rank, folder):
    """In each rank; the first runs the one process over an adapted model, the second over PEFT's."""
    two, one = partial(be_rank, rank, 2), partial(be_rank, 0, 1)
    for place, (kind, dtype) in enumerate(KINDS.items()):
        # Adam divides rounding by rounding where a gradient is nearly 0.
        run = partial(trained, kind, optim="sgd", learning_rate=0.1)
        two()
        plain = run(f"{folder}/{kind}", 2)
        assert plain.wrapped == "DistributedDataParallel"
        assert plain.forwards == STEPS
        # Transformers takes find_unused_parameters for PEFT's model, which no reentrant backward bears.
        reentrant = {"ddp_find_unused_parameters": False, **CHECKPOINTING["reentrant"]}
        for options in (CHECKPOINTING["recomputed"], reentrant):
            again = run(f"{folder}/{kind}-again", 2, save_strategy="no", **options)
            assert again.forwards == 2 * STEPS
            assert_same(again, plain, dtype)
        several = {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1}
        accumulated = run(f"{folder}/{kind}-several", 2, save_strategy="no", **several)
        assert accumulated.forwards == 2 * STEPS
        mixed = run(f"{folder}/{kind}-mixed", 2, torch.float32, save_strategy="no", bf16=True)
        assert difference(mixed.gradients[0], plain.gradients[0]) > 2.0**-12  # it is bf16
        if rank == place:
            one()
            alone = run(f"{folder}/{kind}-one", 1, save_strategy="no")
            half = run(f"{folder}/{kind}-half", 2, save_strategy="no", max_steps=1)
            assert difference(half.gradients[0], alone.gradients[0]) > 0.1  # not averaged: seen
            expected = [
                alone,
                run(f"{folder}/{kind}-one", 1, save_strategy="no", **several),
                run(f"{folder}/{kind}-one", 1, torch.float32, save_strategy="no", bf16=True),
            ]
        else:
            expected = [plain, accumulated, mixed]
        for found, other, rounded in zip(
            (plain, accumulated, mixed), expected, (dtype, dtype, torch.bfloat16), strict=True
        ):
            assert_same(found, other, rounded)


def test_two_processes_train_as_one(tmp_path):
    on_ranks(_as_one, str(tmp_path), imports=IMPORTS, cpu_because=ON_CPU)
    for kind in KINDS:
        files = {path.name for path in (tmp_path / kind / "checkpoint-4").iterdir()}
        assert files >= {"adapter_config.json", "adapter_model.safetensors", "rng_state_1.pth"}


def _best_and_rebuilt(rank, folder):
    # The loss falls: the best is the first step's model, not the one that is there at the end.
    best = {"load_best_model_at_end": True, "greater_is_better": True}
    best |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    for place, (kind, dtype) in enumerate(KINDS.items()):
        be_rank(rank, 2)
        run = trained(kind, f"{folder}/{kind}", 2, learning_rate=0.1, **best)
        *evaluated, last = run.evaluations
        assert len(evaluated) == STEPS
        assert last == pytest.approx(max(evaluated), rel=LOSSES)
        assert last > (1 + 2.0**-12) * evaluated[-1], evaluated

        begun = []

        def too_large(step, begun=begun):
            begun.append(step)
            if len(begun) == 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried too much")

        be_rank(rank, 2)
        run = partial(trained, kind, optim="sgd", learning_rate=0.1, save_strategy="no")
        again = run(f"{folder}/{kind}-auto", 2, stop=too_large, auto_find_batch_size=True)
        assert begun == [0, 0, 1, 2, 3]
        assert again.wrapped == "DistributedDataParallel"
        expected = again
        if rank == place:
            be_rank(0, 1)
            expected = run(f"{folder}/{kind}-one", 1, per_device_train_batch_size=2)
        assert_same(again, expected, dtype)


def test_the_best_model_is_loaded_and_a_smaller_batch_found(tmp_path):
    on_ranks(_best_and_rebuilt, str(tmp_path), imports=IMPORTS, cpu_because=ON_CPU)


def _sharded(rank, folder):
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    for kind, dtype in KINDS.items():
        be_rank(rank, 2)
        run = partial(trained, kind, optim="sgd", learning_rate=0.1)
        ddp = run(f"{folder}/ddp", 2, save_strategy="no")
        be_rank(rank, 2)
        sharded = run(f"{folder}/{kind}", 2, **fsdp)
        assert sharded.wrapped.startswith("FSDP")
        assert_same(sharded, ddp, dtype)


def test_fsdp2(tmp_path):
    on_ranks(_sharded, str(tmp_path), imports=IMPORTS, cpu_because=ON_CPU)
    assert (tmp_path / "adapted" / "checkpoint-4" / "adapter_model.safetensors").exists()


def _part(rank, kind, fsdp, folder, resume, dies):
    be_rank(rank, 2)

    def stop(step):
        if dies and step == 2 and rank == 1:
            os._exit(9)

    options = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": fsdp}} if fsdp else {}
    run = trained(kind, folder, 2, dropout=0.1, stop=stop, resume=resume, **options)
    return run.losses, [{n: g.tolist() for n, g in step.items()} for step in run.gradients]


@pytest.mark.parametrize(
    ("kind", "fsdp"),
    [("adapted", None), ("accelerated", "FULL_STATE_DICT"), ("adapted", "SHARDED_STATE_DICT")],
    ids=["adapted-ddp", "accelerated-fsdp2", "adapted-fsdp2-sharded"],
)
def test_a_killed_run_is_resumed(tmp_path, kind, fsdp):
    """Dropout included, to the bit: each rank's generator is in the checkpoint."""
    part = partial(on_ranks, _part, kind, fsdp, imports=IMPORTS, cpu_because=ON_CPU)
    whole = part(str(tmp_path / "whole"), None, False)
    with pytest.raises(RankError):
        part(str(tmp_path / "killed"), None, True)
    checkpoints = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert checkpoints == ["checkpoint-2"]
    last = str(tmp_path / "killed" / "checkpoint-2")
    for (losses, gradients), resumed in zip(
        whole, part(str(tmp_path / "killed"), last, False), strict=True
    ):
        assert resumed[0] == losses
        assert resumed[1] == gradients[2:]
        assert gradients[2] != gradients[3]


def main(folder):
    """What ``accelerate launch`` starts: the first process prints the losses."""
    run = trained("accelerated", folder, int(os.environ["WORLD_SIZE"]), save_strategy="no")
    if os.environ["RANK"] == "0":
        print("losses", *run.losses, run.wrapped)


def test_launched(tmp_path):
    """By accelerate's own command; ``--cpu`` would start one process, whatever ``--num_processes``."""
    here = Path(__file__)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += [
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ]
    command += ["--main_process_port=0", str(here), str(tmp_path)]
    paths = [str(here.parent), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("losses")]
    *losses, wrapped = line.split()[1:]
    assert wrapped == "DistributedDataParallel"
    expected = on_ranks(_losses, str(tmp_path), imports=IMPORTS, cpu_because=ON_CPU)[0]
    assert [float(loss) for loss in losses] == expected


def _losses(rank, folder):
    be_rank(rank, 2)
    return trained("accelerated", folder, 2, save_strategy="no").losses


if __name__ == "__main__":
    main(sys.argv[1])

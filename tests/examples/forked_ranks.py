"""What torchrun does, with processes that are forked from one that has imported everything: an example
is run on two ranks, of which one dies in a step; again, so that it goes on; and by one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples"
_RUNS = """
import os, runpy, signal, socket, sys
folder, example, out, first, *options = sys.argv[1:]
sys.modules["peft"] = None  # slow to import
sys.path.insert(0, folder)
import stdlib_texts, sentence_encoder, transformers
import torch.distributed.checkpoint.state_dict, torch.distributed.fsdp
import torch.nn.functional as F
texts = stdlib_texts.load_texts()
stdlib_texts.load_texts = lambda: (texts[0][::20], texts[1][::20], texts[2])
configured, count = transformers.AutoConfig.from_pretrained, 0
transformers.AutoConfig.from_pretrained = lambda *a, **k: configured(*a, num_hidden_layers=1, **k)
called, at = first.split(":")
right = getattr(F, called)

def dies(*arguments, **named):
    global count
    count += 1
    if count == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*arguments, **named)

def rank_of(rank, world, port, where, one_dies):
    if world > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                           LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    if one_dies and rank == 1:
        setattr(F, called, dies)
    sys.argv[1:] = [*options, "--out", os.path.join(out, where)]
    try:
        runpy.run_path(os.path.join(folder, example), run_name="__main__")
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(1 if ended.code else 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)

def run(where, world, one_dies=False):
    print("run", where, flush=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            rank_of(rank, world, port, where, one_dies)
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        print("status", status, flush=True)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    print("left", sorted(os.listdir(os.path.join(out, where))), flush=True)

run("two", 2, one_dies=True)
run("two", 2)
run("one", 1)
"""


def run_thrice(example: str, options: list[str], dies_at: str, out: Path) -> list[str]:
    """What the killed run, the resumed one and that of one process printed, and all that they warned of
    and their progress bars.

    ``dies_at``: ``"cross_entropy:4"``, the function of ``torch.nn.functional`` and the call of it in
    which rank 1 of the first run kills itself. Texts are few and the encoder has one block.
    """
    done = subprocess.run(
        [sys.executable, "-c", _RUNS, str(FOLDER), example, str(out), dies_at, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    printed = " ".join(done.stdout.split())
    killed, resumed, alone = (
        part for part in printed.split("run ") if part[:4] in ("two ", "one ")
    )
    problem = printed + done.stderr
    assert "status 9" in killed, problem
    assert killed.count("status ") == 2, problem
    assert "status 0" not in killed, (
        problem
    )  # the other rank doesn't hang, nor end as if all were done
    assert resumed.count("status 0") == 2, problem
    assert alone.count("status 0") == 1, problem
    return [killed, resumed, alone, done.stderr]


def begun_bars(name: str, stderr: str) -> int:
    """How many progress bars of this name there were: only the first state of each has no loss."""
    return len(re.findall(rf"{name}: [^\r\n]*\?step/s\]", stderr))

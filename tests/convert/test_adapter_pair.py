"""The two files of an adapter are of one save: after a kill, on a full disk, with many who write."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from adapter_files import CONFIG, WEIGHTS, read, write_adapter

import lorafast
from lorafast.core import files

safetensors = pytest.importorskip("safetensors.torch")
peft = pytest.importorskip("peft")

HERE = Path(__file__).parent
NOT_ONE = f"{CONFIG} and {WEIGHTS} in .* are not of one save"

# Adapter number n has alpha n and is filled with n: a mixture of two is seen.
CHILD = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
import lorafast
from conftest import Net

def adapter(n):
    model = lorafast.adapt(Net(), 2, ["up", "down"], alpha=n)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.fill_(n)
    return model

def forked(work, *arguments):
    # In a process of its own.
    child = os.fork()
    if child == 0:
        work(*arguments)
        os._exit(0)
    return child
"""


def start(code, *arguments):
    script = CHILD.format(here=str(HERE)) + code
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out


def filled(net, n):
    lorafast.adapt(net, 2, ["up", "down"], alpha=n)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora" in name:
                parameter.fill_(n)
    return net


def number(model):
    """Which adapter a model has; all of its parts must be of the same."""
    layers = (model.block.up, model.block.down)
    found = {layer.alpha for layer in layers}
    for layer in layers:
        found |= {*layer.lora_A.unique().tolist(), *layer.lora_B.unique().tolist()}
    assert len(found) == 1, f"a mixture: {found}"
    return int(found.pop())


def drafts(folder):
    return [path.name for path in folder.iterdir() if path.name not in (CONFIG, WEIGHTS)]


def test_the_weights_carry_a_digest_of_the_config(net, make_net, tmp_path):
    lorafast.save_adapter(filled(net, 3), tmp_path)
    with safetensors.safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "lorafast_config_digest"}
    assert metadata["format"] == "pt"
    theirs = peft.PeftModel.from_pretrained(make_net(), tmp_path).base_model.model
    assert torch.equal(theirs.block.up.lora_A["default"].weight, net.block.up.lora_A)


@pytest.mark.parametrize("change", [{"lora_alpha": 7}, {"r": 1}, {"use_rslora": True}], ids=str)
def test_refuses_weights_of_another_save_than_the_config(
    net, make_net, unchanged, tmp_path, change
):
    lorafast.save_adapter(filled(net, 3), tmp_path)
    config = read(tmp_path)[0] | change
    (tmp_path / CONFIG).write_text(json.dumps(config))
    other = make_net()
    with unchanged(other), pytest.raises(ValueError, match=NOT_ONE):
        lorafast.load_adapter(other, tmp_path)


def test_a_config_that_means_the_same_goes_with_the_weights(net, make_net, tmp_path):
    lorafast.save_adapter(filled(net, 3), tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.base_model_name_or_path = "elsewhere"
    config.save_pretrained(tmp_path)
    assert len(read(tmp_path)[0]) > 30
    assert number(lorafast.load_adapter(make_net(), tmp_path)) == 3


def test_files_of_peft_carry_none_and_are_loaded(net, tmp_path):
    lorafast.load_adapter(net, write_adapter(tmp_path))
    assert net.block.up.r == 2


KILLED = {
    "0-ours": (0, "ours"),
    "1-ours": (1, "ours"),
    "1-pefts": (1, "pefts"),
    "1-none": (1, None),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders in which a save was killed before its first or its second rename."""
    folder = tmp_path_factory.mktemp("killed")
    for name, (_, before) in KILLED.items():
        (folder / name).mkdir()
        if before == "pefts":
            write_adapter(folder / name)
    code = """
def killed(folder, renames):
    replace = os.replace
    def until(source, target):
        nonlocal renames
        if not renames:
            os.kill(os.getpid(), signal.SIGKILL)
        renames -= 1
        replace(source, target)
    os.replace = until
    lorafast.save_adapter(adapter(2), folder)

for folder in sys.argv[1:]:
    if folder.endswith("ours"):
        lorafast.save_adapter(adapter(1), folder)
    child = forked(killed, folder, int(os.path.basename(folder)[0]))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""
    finish(start(code, *(folder / name for name in KILLED)))
    return folder


@pytest.mark.parametrize("case", KILLED)
def test_a_save_that_is_killed_leaves_no_mixture(killed, net, make_net, case):
    tmp_path = killed / case
    renames, before = KILLED[case]
    assert len(drafts(tmp_path)) == 1
    if before is None:
        with pytest.raises(FileNotFoundError, match=f"has no {CONFIG}"):
            lorafast.load_adapter(net, tmp_path)
    elif renames == 0:
        loaded = lorafast.load_adapter(net, tmp_path)
        assert number(loaded) == 1
    else:
        with pytest.raises(ValueError, match=NOT_ONE):
            lorafast.load_adapter(net, tmp_path)
    # The next save works, and takes away what a killed one left, once that is old.
    lorafast.save_adapter(filled(make_net(), 3), tmp_path)
    assert len(drafts(tmp_path)) == 1
    draft = tmp_path / drafts(tmp_path)[0]
    old = time.time() - 2 * 3600
    for path in (*draft.iterdir(), draft):
        os.utime(path, (old, old))
    lorafast.save_adapter(filled(make_net(), 4), tmp_path)
    assert drafts(tmp_path) == []
    assert number(lorafast.load_adapter(make_net(), tmp_path)) == 4


def test_many_save_different_adapters_while_others_read(make_net, tmp_path):
    lorafast.save_adapter(filled(make_net(), 1), tmp_path)
    code = """
def save(n):
    model = adapter(n)
    for _ in range(15):
        lorafast.save_adapter(model, sys.argv[1])

for child in [forked(save, n) for n in (2, 3, 4)]:
    assert os.waitpid(child, 0)[1] == 0
"""
    writers = start(code, tmp_path)
    seen = set()
    while writers.poll() is None:
        seen.add(number(lorafast.load_adapter(make_net(), tmp_path)))
    finish(writers)
    assert number(lorafast.load_adapter(make_net(), tmp_path)) in (2, 3, 4)
    assert len(seen) >= 2
    assert drafts(tmp_path) == []


def test_many_save_the_same_adapter_to_a_folder_that_is_not_there(make_net, tmp_path):
    folder = tmp_path / "new" / "adapter"
    model = filled(make_net(), 5)
    with ThreadPoolExecutor(4) as pool:
        saves = [pool.submit(lorafast.save_adapter, model, folder) for _ in range(12)]
    for save in saves:
        save.result()
    assert number(lorafast.load_adapter(make_net(), folder)) == 5
    assert drafts(folder) == []


def test_without_locks_too_one_pair_stays(make_net, tmp_path, monkeypatch):
    """Another writer's whole save falls between our two renames."""
    monkeypatch.setattr(files, "fcntl", None)
    lorafast.save_adapter(filled(make_net(), 1), tmp_path)
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            lorafast.save_adapter(filled(make_net(), 2), tmp_path)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    lorafast.save_adapter(filled(make_net(), 3), tmp_path)
    assert len(calls) >= 6
    assert number(lorafast.load_adapter(make_net(), tmp_path)) == 3


def test_a_reader_between_two_renames_looks_again(make_net, tmp_path, monkeypatch):
    lorafast.save_adapter(filled(make_net(), 1), tmp_path / "a")
    lorafast.save_adapter(filled(make_net(), 2), tmp_path / "b")
    late = (tmp_path / "b" / CONFIG).read_bytes()
    (tmp_path / "b" / WEIGHTS).replace(tmp_path / "a" / WEIGHTS)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            (tmp_path / "a" / CONFIG).write_bytes(late)

    monkeypatch.setattr(time, "sleep", sleep)
    assert number(lorafast.load_adapter(make_net(), tmp_path / "a")) == 2
    assert len(looks) == 2


def test_the_folder_is_not_waited_for_without_end(make_net, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(files, "_PATIENCE_S", 0.05)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        lorafast.save_adapter(filled(make_net(), 3), tmp_path)
    finally:
        os.close(handle)
    assert number(lorafast.load_adapter(make_net(), tmp_path)) == 3


def test_a_full_disk_leaves_everything_as_it_was(make_net, tmp_path):
    lorafast.save_adapter(filled(make_net(), 1), tmp_path / "old")
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
for folder in sys.argv[1:]:
    try:
        lorafast.save_adapter(adapter(2), folder)
    except OSError as error:
        print(error)
"""
    out = finish(start(code, tmp_path / "old", tmp_path / "new" / "adapter"))
    assert out.count("adapter_model.safetensors can't be written") == 2
    assert number(lorafast.load_adapter(make_net(), tmp_path / "old")) == 1
    assert drafts(tmp_path / "old") == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("before", [True, False], ids=["replaces", "new"])
def test_a_failed_second_rename_puts_the_first_back(make_net, tmp_path, monkeypatch, before):
    folder = tmp_path / "adapter"
    if before:
        lorafast.save_adapter(filled(make_net(), 1), folder)
    replace = os.replace

    def refused(source, target):
        if Path(target).name == CONFIG:
            raise PermissionError(f"{target} can't be replaced")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        with pytest.raises(PermissionError):
            lorafast.save_adapter(filled(make_net(), 2), folder)
    if before:
        assert number(lorafast.load_adapter(make_net(), folder)) == 1
        assert drafts(folder) == []
    else:
        assert not folder.exists()


def test_links_are_replaced_and_never_followed(make_net, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "adapter"
    folder.mkdir()
    names = [WEIGHTS, CONFIG, f"{WEIGHTS}.partial", f"{CONFIG}.partial", ".lorafast-save-x"]
    for name in names:
        (folder / name).symlink_to(victim)
    lorafast.save_adapter(filled(make_net(), 3), folder)
    assert victim.read_text() == "mine"
    assert number(lorafast.load_adapter(make_net(), folder)) == 3
    assert not (folder / WEIGHTS).is_symlink()


def test_others_may_read_the_files_as_the_mask_says(make_net, tmp_path):
    mask = os.umask(0o027)
    try:
        lorafast.save_adapter(filled(make_net(), 3), tmp_path)
    finally:
        os.umask(mask)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in (CONFIG, WEIGHTS)] == [0o640] * 2


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_in_the_place_of_a_file_is_named(make_net, net, unchanged, tmp_path, name):
    write_adapter(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name} is a folder: the adapter's file"):
        lorafast.save_adapter(filled(make_net(), 2), tmp_path)
    with unchanged(net), pytest.raises(ValueError, match=f"{name} is a folder, expected a file"):
        lorafast.load_adapter(net, tmp_path)


def test_a_file_in_the_place_of_the_folder_is_named(make_net, net, unchanged, tmp_path):
    write_adapter(tmp_path)
    for folder in (tmp_path / WEIGHTS, tmp_path / WEIGHTS / "inside"):
        with pytest.raises(NotADirectoryError, match=f"{WEIGHTS} is a file, expected a folder"):
            lorafast.save_adapter(filled(make_net(), 2), folder)
    with unchanged(net), pytest.raises(NotADirectoryError, match="expected the folder of an ad"):
        lorafast.load_adapter(net, tmp_path / WEIGHTS)


def test_says_where_the_adapters_are(net, unchanged, tmp_path):
    for name in ("default", "other"):
        write_adapter(tmp_path / name)
    (tmp_path / "README.md").write_text("")
    sentence = f"has no {CONFIG}, but there is one in default, other inside it"
    with unchanged(net), pytest.raises(FileNotFoundError, match=sentence):
        lorafast.load_adapter(net, tmp_path)
    with unchanged(net), pytest.raises(FileNotFoundError, match="nowhere doesn't exist"):
        lorafast.load_adapter(net, tmp_path / "nowhere")

"""``opened``: which file of a folder counts, an index's rules, and what both callers refuse."""

import copy
import json

import pytest
import torch
from torch import nn

import lorafast

safetensors = pytest.importorskip("safetensors.torch")
MODEL = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))
STATE = {key: tensor.clone() + 1 for key, tensor in MODEL.state_dict().items()}
WRONG = {key: torch.zeros_like(tensor) for key, tensor in STATE.items()}
FIRST, REST = {k: STATE[k] for k in [*STATE][:1]}, {k: STATE[k] for k in [*STATE][1:]}
WHERE = dict.fromkeys(FIRST, "a.safetensors") | dict.fromkeys(REST, "b.safetensors")
INDEX = "model.safetensors.index.json"
SHARDS = {"a.safetensors": FIRST, "b.safetensors": REST}

FOLDERS = {
    "whole": {"model.safetensors": STATE, "other.safetensors": WRONG},
    "whole before its index": {"model.safetensors": STATE, "a.safetensors": WRONG, INDEX: WHERE},
    "diffusers": {"diffusion_pytorch_model.safetensors": STATE, "adapter_model.safetensors": WRONG},
    "diffusers' index": SHARDS | {"diffusion_pytorch_model.safetensors.index.json": WHERE},
    "the index decides": {"a.safetensors": FIRST, "b.safetensors": WRONG | REST, INDEX: WHERE},
    "the only one": {"some.safetensors": STATE, "adapter_model.safetensors": WRONG},
    "two": (SHARDS, FileNotFoundError, "it holds a.safetensors, b.safetensors"),
    "only an adapter": (
        {"adapter_model.safetensors": STATE}, FileNotFoundError, "it holds adapter_model.safetensors",
    ),
    "a shard is missing": (
        {"a.safetensors": FIRST, INDEX: WHERE}, FileNotFoundError, "b.safetensors doesn't exist",
    ),
    "a key is missing": (
        {"a.safetensors": FIRST, "b.safetensors": FIRST, INDEX: WHERE}, ValueError, "which hasn't it",
    ),
    "outside": ({INDEX: {"x": "../a.safetensors"}}, ValueError, "a file that is not in its folder"),
    "no index": ({INDEX: [1]}, ValueError, "is no index of a checkpoint"),
    "no shards": ({INDEX: {}}, ValueError, "is no index of a checkpoint"),
}  # fmt: skip


def interpolated(folder):
    return lorafast.interpolate(copy.deepcopy(MODEL), folder, 1)


def extracted(folder):
    found = lorafast.extract(folder, MODEL, 4, others="save", report=None)
    return lorafast.merge(lorafast.load_adapter(copy.deepcopy(MODEL), found.adapter))


@pytest.mark.parametrize("call", [interpolated, extracted])
@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind, call, tmp_path):
    files, *refusal = FOLDERS[kind] if isinstance(FOLDERS[kind], tuple) else (FOLDERS[kind],)
    for name, content in files.items():
        if name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps({"weight_map": content}))
        else:
            safetensors.save_file(content, tmp_path / name)
    if refusal:
        with pytest.raises(refusal[0], match=refusal[1]):
            call(tmp_path)
    else:
        for key, tensor in call(tmp_path).state_dict().items():
            torch.testing.assert_close(tensor, STATE[key])


def test_a_wrapped_model_and_a_tensor_without_values():
    wrapped = nn.DataParallel(copy.deepcopy(MODEL))
    wrapped.module.load_state_dict(STATE)
    assert torch.equal(interpolated(wrapped)[0].weight, STATE["0.weight"])
    for call in (interpolated, extracted):
        with pytest.raises(ValueError, match=r"0\.weight of .* is on the device meta"):
            call(copy.deepcopy(MODEL).to("meta"))

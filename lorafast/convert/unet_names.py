"""What the original code of Stable Diffusion's U-Net calls the layers that diffusers has.

kohya's scripts train SDXL with that code's U-Net, so that their files have its names: it numbers the
residual blocks and the layers between resolutions through, where diffusers has them by resolution. The
structure alone says which is which.

    conv_in                          input_blocks.0.0
    down_blocks.<i>.resnets.<j>      input_blocks.<n>.0           n counts from 1, over all i
    down_blocks.<i>.attentions.<j>   input_blocks.<n>.1           beside the residual block
    down_blocks.<i>.downsamplers.0   input_blocks.<n>.0           a number for itself; its conv is op
    mid_block.resnets.<j>            middle_block.0, middle_block.2
    mid_block.attentions.0           middle_block.1
    up_blocks.<i>.resnets.<j>        output_blocks.<n>.0          n counts from 0
    up_blocks.<i>.attentions.<j>     output_blocks.<n>.1
    up_blocks.<i>.upsamplers.0       output_blocks.<n>.1 or 2     after the last of its resolution
    conv_out                         out.2
"""

import itertools
from collections.abc import Iterable, Iterator

_RESNET = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
_SINGLE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """The original names of modules of a diffusers U-Net by their own, given those of all modules.

    Empty if there is no ``conv_in`` or no ``down_blocks``; norms are left out.
    """
    names = set(modules)
    if not {"conv_in", "down_blocks"} <= names:
        return {}
    parts = dict(_blocks(names))
    found = {ours: theirs for ours, theirs in _SINGLE.items() if ours in names}
    for name in names:
        owner = next((part for part in _around(name) if part in parts), None)
        if owner is None:
            continue
        inner, kind = name[len(owner) + 1 :], owner.split(".")[-2]
        if kind == "resnets":
            inner = _RESNET.get(inner, "")
        elif kind == "downsamplers":
            inner = "op" if inner == "conv" else ""
        if inner:
            found[name] = f"{parts[owner]}.{inner}"
    return found


def _around(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _blocks(names: set[str]) -> Iterator[tuple[str, str]]:
    """Residual blocks, attentions and what is between resolutions, with their original names."""
    number = 1
    for block in _numbered("down_blocks", names):
        for resnet, attention in _pairs(block, names):
            yield resnet, f"input_blocks.{number}.0"
            if attention in names:
                yield attention, f"input_blocks.{number}.1"
            number += 1
        if f"{block}.downsamplers.0" in names:
            yield f"{block}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    for i, resnet in enumerate(_numbered("mid_block.resnets", names)):
        yield resnet, f"middle_block.{2 * i}"
        yield f"mid_block.attentions.{i}", f"middle_block.{2 * i + 1}"
    number = 0
    for block in _numbered("up_blocks", names):
        for resnet, attention in _pairs(block, names):
            yield resnet, f"output_blocks.{number}.0"
            if attention in names:
                yield attention, f"output_blocks.{number}.1"
            after = 1 + (attention in names)
            number += 1
        if f"{block}.upsamplers.0" in names:
            yield f"{block}.upsamplers.0", f"output_blocks.{number - 1}.{after}"


def _pairs(block: str, names: set[str]) -> Iterator[tuple[str, str]]:
    for i, resnet in enumerate(_numbered(f"{block}.resnets", names)):
        yield resnet, f"{block}.attentions.{i}"


def _numbered(parent: str, names: set[str]) -> Iterator[str]:
    """The children 0, 1, … of a list."""
    return itertools.takewhile(names.__contains__, (f"{parent}.{i}" for i in itertools.count()))

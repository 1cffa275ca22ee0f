"""A network of the shape of ResNet-18 (He et al., 2016), and its adapters as plain PyTorch has them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafast.nn import LoRAConv

_WIDTHS = (64, 128, 256, 512)
_BLOCKS = 2
_CLASSES = 100


class _Block(nn.Module):
    def __init__(self, C: int, N: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, N, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(N)
        self.conv2 = nn.Conv2d(N, N, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(N)
        same = C == N and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(C, N, 1, stride, bias=False)
        self.norm3 = nn.Identity() if same else nn.BatchNorm2d(N)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, C, H, W]`` → ``[batch, N, H / stride, W / stride]``."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y)).add_(self.norm3(self.shortcut(x)))
        return F.relu(y, inplace=True)


class Network(nn.Module):
    """A stem, eight blocks of two convolutions, a linear head; ``widths`` are the stages' channels."""

    def __init__(self, widths: tuple[int, ...] = _WIDTHS, classes: int = _CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        blocks = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for i in range(_BLOCKS):
                blocks.append(_Block(before, width, 2 if stage and not i else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, 3, H, W]`` → logits."""
        return self.logits(self.stem(images))

    def logits(self, x: Tensor) -> Tensor:
        """Of what the stem gives, before which nothing is adapted."""
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits


def convolutions(network: nn.Module) -> Iterator[str]:
    """Names of the convolutions that get adapters: all but the stem's."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith("stem"):
            yield name


class Plain(nn.Module):
    """``conv(x, W) + scaling · conv(conv(x, A), B)`` of a ``LoRAConv``'s tensors in PyTorch's own calls:
    what is right."""

    def __init__(self, layer: LoRAConv) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """As the layer's."""
        of = self.layer
        s = F.conv2d(x, of.lora_A, None, of.stride, of.padding)
        y = F.conv2d(x, of.weight, of.bias, of.stride, of.padding)
        return y + of.scaling * F.conv2d(s, of.lora_B)


def calibrated(network: Network, images: Tensor) -> Network:
    """With running statistics of these images, in evaluation mode, where norms are frozen scales."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
    network.train()
    with torch.no_grad():
        network(images)
    return network.eval()

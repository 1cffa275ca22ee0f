"""Small pictures of shapes, drawn here: filled ones to learn from first, outlines for a shifted task.

A shape of m tips is the closed curve `radius(θ) = 1 - depth · tᵖᵒʷᵉʳ`, where t goes from 0 at a tip to 1
halfway between two. A power below 1 gives pointed tips, as of a star; one above, round lobes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    name: str
    tips: int
    depth: float
    power: float


@dataclass(frozen=True)
class Style:
    """Which shapes there are, a class each, and how they are drawn."""

    shapes: tuple[Shape, ...]
    outlined: bool
    strokes: int
    noise: float


@dataclass(frozen=True)
class Images:
    """`pixels [count, 3, side, side]` and `labels [count]`."""

    pixels: Tensor
    labels: Tensor


FILLED = Style(
    (
        Shape("disc", 1, 0.0, 1.0),
        Shape("drop", 1, 0.55, 0.6),
        Shape("triangle", 3, 0.45, 0.7),
        Shape("square", 4, 0.28, 0.8),
        Shape("pentagon", 5, 0.18, 0.8),
        Shape("star of 3", 3, 0.75, 0.5),
        Shape("star of 4", 4, 0.65, 0.6),
        Shape("star of 5", 5, 0.55, 0.7),
        Shape("star of 6", 6, 0.5, 0.7),
        Shape("star of 8", 8, 0.45, 0.8),
    ),
    outlined=False, strokes=0, noise=0.15,
)  # fmt: skip
OUTLINED = Style(
    (
        Shape("apple", 1, 0.5, 4.0),
        Shape("lens", 2, 0.55, 0.7),
        Shape("peanut", 2, 0.55, 3.0),
        Shape("clover of 3", 3, 0.6, 3.0),
        Shape("clover of 4", 4, 0.6, 3.0),
        Shape("clover of 5", 5, 0.55, 3.0),
        Shape("clover of 6", 6, 0.5, 3.0),
        Shape("star of 3", 3, 0.7, 0.6),
        Shape("star of 5", 5, 0.5, 0.8),
        Shape("star of 7", 7, 0.45, 0.9),
    ),
    outlined=True, strokes=1, noise=0.15,
)  # fmt: skip


def draw_images(style: Style, count: int, side: int, seed: int) -> Images:
    """Return `count` pictures, each shape as often as any other, give or take one.

    Place, size, angle, both colours, a slope of the background's light and the noise are random.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *size, generator=generator)

    labels = torch.randperm(count, generator=generator) % len(style.shapes)
    tips, depth, power = (
        torch.tensor([getattr(shape, name) for shape in style.shapes])[labels, None, None]
        for name in ("tips", "depth", "power")
    )
    line = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    dx, dy = (axis - uniform(-0.25, 0.25, 1, 1) for axis in (x, y))
    turns = (torch.atan2(dy, dx) / (2 * math.pi) + uniform(0, 1, 1, 1)) * tips
    t = (2 * (turns % 1) - 1).abs()
    radius = uniform(0.5, 0.75, 1, 1) * (1 - depth * t**power)
    outside = torch.hypot(dx, dy) - radius
    width = 2 / side
    if style.outlined:
        outside = outside.abs() - width
    ink = torch.sigmoid(-2 * outside / width)
    for _ in range(style.strokes):
        angle = uniform(0, math.pi, 1, 1)
        away = x * angle.cos() + y * angle.sin() - uniform(-1, 1, 1, 1)
        ink = torch.maximum(ink, torch.sigmoid(-2 * (away.abs() - width) / width))
    angle = uniform(0, 2 * math.pi, 1, 1)
    slope = uniform(0, 0.5, 1, 1) * (x * angle.cos() + y * angle.sin())
    paper, colour = uniform(-1, 1, 3, 1, 1), uniform(-1, 1, 3, 1, 1)
    # At least so much apart, in every channel.
    colour = paper + torch.where(colour < paper, -0.8, 0.8) + (colour - paper) / 2
    pixels = paper + slope[:, None] + ink[:, None] * (colour - paper)
    noise = torch.randn(pixels.shape, generator=generator)
    return Images(pixels + style.noise * noise, labels)

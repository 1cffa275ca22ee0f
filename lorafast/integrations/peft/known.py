"""Whether the methods that fast layers stand in for are the ones known here, in the PEFT installed.

A method is known by the digest of its syntax tree. Comments, formatting, docstrings, annotations and the
words of f-strings are left out, for they change nothing that is computed; so are empty fields, in which
the trees of Python's versions differ. (Bytecode and ``ast.dump`` differ from version to version.)
Nothing is compared of what sets a layer up (``update_layer``, ``set_adapter``): ``rules`` looks at what
that has made, in every call.

What is in memory at import is compared: a method that someone has replaced isn't the known one.
"""

import ast
import contextlib
import functools
import hashlib
import inspect
import sys
from types import FunctionType, ModuleType
from typing import Any

import peft
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer, _DoraConvNdLayer
from peft.tuners.lora.layer import Embedding, Linear, MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.lora.variants import (
    ALoraLinearVariant,
    BdLoraLinearVariant,
    BlockDiagonalLinear,
    DoraEmbeddingVariant,
    DoraLinearVariant,
    _DoraConvNdVariant,
)

VERSIONS = ("0.19.1", "0.20.0", "0.21.0", "0.21.1", "0.21.2")
"""The releases of PEFT whose methods are known, for where there is no source, as in a frozen program."""

UNLIKE: dict[str, tuple[str, ...]] = {"target_parameters": ("0.19.1", "0.20.0")}
"""Those of them, by kind of layer, in which it is another than the known one."""

OTHERS = {"bitsandbytes": ("0.50.0",)}
"""Those of other packages, whose layers PEFT's are over."""

READ = {
    "_check_forward_args": "60bf418e1477d373",
    "active_adapter": "25831eb2e7c6599a",
    "active_adapters": "18fd4c3b499d7ea1",
    "disable_adapters": "55b485a1f692375b",
    "get_base_layer": "2b75099902c2d39c",
    "merged": "92ac8e0669a18af1",
}
METHODS: dict[str, dict[Any, dict[str, str]]] = {
    "linear": {
        Linear: READ
        | {
            "forward": "f94cca207fd041ce",
            "_cast_input_dtype": "accb7f5ac617a435",
        },
    },
    "torchao linear": {
        TorchaoLoraLinear: READ
        | {
            "forward": "f94cca207fd041ce",
            "_cast_input_dtype": "accb7f5ac617a435",
        },
    },
    "mixed batch": {Linear: {"_mixed_batch_forward": "00663609a8d200e3"}},
    "alora": {ALoraLinearVariant: {"forward": "ad5e89f66b680a17"}},
    "BD-LoRA": {
        BdLoraLinearVariant: {"forward": "2edb0477b27132cb"},
        BlockDiagonalLinear: {"forward": "64584fc5942ff56b"},
    },
    "dora": {
        DoraLinearVariant: {"forward": "c59fc34a5011602b"},
        DoraLinearLayer: {
            "forward": "ce8a00b0e41b3f15",
            "get_weight_norm": "4a2cc114f74de342",
            "get_lora_weight": "4ad3075ba108389b",
        },
    },
    "embedding": {
        Embedding: READ
        | {
            "forward": "34c603801c0903d3",
            "_embed": "7c974e09c43b8b6b",
            "_get_embed_scale": "469409799a5d1201",
        },
    },
    "embedding's mixed batch": {Embedding: {"_mixed_batch_forward": "5b7191fc7ed96f44"}},
    "embedding's dora": {
        DoraEmbeddingVariant: {"forward": "1a0e46161386ec27"},
        DoraEmbeddingLayer: {
            "forward": "43d87128ec9867d7",
            "get_weight_norm": "4a2cc114f74de342",
            "get_lora_weight": "bdd9096637e924cd",
        },
    },
    "target_parameters": {
        ParamWrapper: READ
        | {
            "_check_forward_args": "9534b976e31f19f0",
            "_activate_lora": "45e15caaf1357464",
            "forward": "c3f35092ec1df87e",
            "get_delta_factors": "380a8b40dbb9a50c",
            "get_delta_weight": "5136b407dcc5d38c",
            "get_param": "0c1543ab19e14052",
        },
    },
    "convolution": {
        _ConvNd: READ
        | {
            "forward": "516d81ab491c5459",
            "_cast_input_dtype": "accb7f5ac617a435",
        },
    },
    "attention": {
        MultiheadAttention: READ
        | {
            "_check_forward_args": "523eb0858eed7c71",
            "forward": "a2cf38ed3623017f",
            # Which adds the change of out_proj twice.
            "merge": "f3a48428c8af1345",
            "unmerge": "95e25061d614d923",
        },
    },
    "convolution's mixed batch": {_ConvNd: {"_mixed_batch_forward": "00663609a8d200e3"}},
    "convolution's dora": {
        _DoraConvNdVariant: {"forward": "c59fc34a5011602b"},
        _DoraConvNdLayer: {
            "forward": "7bc90c75f9749f7c",
            "get_weight_norm": "26464254ff059ed5",
            "get_lora_weight": "c8990d995a309ad6",
        },
    },
}
"""By kind of layer or call: the methods that are stood in for or read, and their digests; by class,
or by module for functions."""

_VARIANTS: dict[str, dict[str, dict[str, str]]] = {
    "MiCA": {"MiCALinearVariant": {"forward": "e5ec68ecb4a22843"}},
    "embedding's MiCA": {"MiCAEmbeddingVariant": {"forward": "e75a2b77e5caa919"}},
    "KaSA": {"KasaLinearVariant": {"forward": "2fbbda26a7f0003b"}},
    "MonteCLoRA": {"MontecloraLinearVariant": {"forward": "594052f42f1982ff"}},
    "VeLoRA": {
        "VeloraLinearVariant": {
            "forward": "5c704916193001b6",
            "_maybe_update_embed": "bec443ef8f8df176",
        },
        "VeloraFunction": {"forward": "a4bad23b6123ee08", "backward": "d50627bc25012a32"},
    },
}
"""The same of variants that not every release has, by the class's name. What MonteCLoRA's sampler
computes is called, not stood in for."""
for _kind, _classes in _VARIANTS.items():
    if all(hasattr(variants, name) for name in _classes):
        METHODS[_kind] = {getattr(variants, name): of for name, of in _classes.items()}
if "VeLoRA" in METHODS:
    METHODS["VeLoRA"][sys.modules["peft.tuners.lora.velora"]] = {
        "_get_group_dim": "ec35f84a17271afd",
        "_reshape_to_grouped_subtokens": "b1254bb6a511b02c",
        "_compress_activations": "f806563019cc6d90",
        "_reconstruct_activations": "0a24d566814c82df",
    }
UNLIKE.update(dict.fromkeys(_VARIANTS, ("0.19.1",)))
UNLIKE["KaSA"] = ("0.19.1", "0.20.0")

_UNCOMPARED = ("annotation", "returns", "type_params", "type_comment", "kind")


@functools.cache
def why_changed(kind: str) -> str | None:
    """The reason for which this release of PEFT serves a kind of layer or call itself, or None."""
    changed = _changed(kind)
    if not changed:
        return None
    return " and ".join(f"{release} has another {', '.join(n)}" for release, n in changed.items())


def changes() -> str | None:
    """All that has changed in this release of PEFT, in a sentence, or None."""
    kinds = [kind for kind in METHODS if why_changed(kind) is not None]
    if not kinds:
        return None
    changed: dict[str, list[str]] = {}
    for kind in kinds:
        for release, names in _changed(kind).items():
            changed.setdefault(release, []).extend(names)
    others = " and ".join(
        f"{release} has another {', '.join(dict.fromkeys(names))}"
        for release, names in changed.items()
    )
    return (
        f"{others} than lorafast knows, so that PEFT serves itself: {', '.join(kinds)} (a lorafast "
        "that knows this release makes them fast)"
    )


def _changed(kind: str) -> dict[str, list[str]]:
    """The methods that aren't the known ones, by the release that they are of."""
    found: dict[str, list[str]] = {}
    for owner, methods in METHODS[kind].items():
        package = getattr(owner, "__module__", owner.__name__).partition(".")[0]
        version = getattr(sys.modules.get(package), "__version__", "")
        releases = VERSIONS if package == peft.__name__ else OTHERS.get(package, ())
        listed = [release for release in releases if release not in UNLIKE.get(kind, ())]
        for name, known in methods.items():
            now = digest(owner, name)
            if now != known and not (now is None and version in listed):
                release = f"{'PEFT' if package == peft.__name__ else package} {version}"
                of = "" if isinstance(owner, ModuleType) else f"{owner.__name__}."
                found.setdefault(release, []).append(of + name)
    return found


def digest(owner: Any, name: str) -> str | None:
    """Of a class's method or a module's function, 16 hexadecimal digits; None if its source isn't there.

    It is empty for one that is missing, or wrapped by code from elsewhere.
    """
    method = inspect.getattr_static(owner, name, None)
    method = getattr(method, "fget", None) or getattr(method, "__func__", None) or method
    if not isinstance(method, FunctionType) or not isinstance(inspect.unwrap(method), FunctionType):
        return ""
    file = inspect.unwrap(method).__code__.co_filename
    if method.__code__.co_filename not in (file, contextlib.__file__):
        return ""
    try:
        source = inspect.getsource(method)
    except OSError:
        return None
    tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source).body[0]
    function = tree.body[0] if isinstance(tree, ast.If) else tree
    return hashlib.sha256(_text(function).encode()).hexdigest()[:16]


def _text(node: Any) -> str:
    """A syntax tree as text, of what is compared."""
    if isinstance(node, list):
        return f"[{', '.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.JoinedStr):
        fields["values"] = [v for v in node.values if not isinstance(v, ast.Constant)]
    elif isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    compared = (
        f"{name}={_text(value)}"
        for name, value in fields.items()
        if name not in _UNCOMPARED and value is not None and value != []
    )
    return f"{type(node).__name__}({', '.join(compared)})"

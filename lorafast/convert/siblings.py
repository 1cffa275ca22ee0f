"""Which adapted layers share x: those that a module calls with the same variable, read in its source.

A module's ``forward`` is read as text, never run. A name stands for what was last assigned to it, after
branches for what any of them assigned. What is found is what may be shared; whether it is, each call
sees by itself.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence

from torch import nn

from lorafast.convert.kinds import adapted_layers
from lorafast.nn import AdapterLayer
from lorafast.nn.siblings import tie

NONE_FOUND = (
    "fuse is 'siblings', and the source of no module shows LoRA layers over dense weights that it calls "
    "with the same x, as in self.q(x) and self.k(x): the layers are served one by one"
)
_Values = frozenset[int]


def fuse(model: nn.Module) -> list[list[str]]:
    """Makes siblings of the layers of ``model`` that share x; their names, group by group.

    A layer that is one already stays with those that it has.
    """
    found = []
    for prefix, module in list(model.named_modules()):
        for paths in shared_calls(type(module)):
            layers: dict[AdapterLayer, str] = {}
            for path in paths:
                layer = _child(module, path)
                if layer is not None and layer._siblings is None:
                    layers.setdefault(layer, f"{prefix}.{path}" if prefix else path)
            # Layers of one x have its width.
            for width in dict.fromkeys(layer.in_features for layer in layers):
                alike = [layer for layer in layers if layer.in_features == width]
                if len(alike) > 1:
                    tie(alike)
                    found.append([layers[layer] for layer in alike])
    return found


def has_siblings(model: nn.Module) -> bool:
    """Whether a layer of ``model`` has siblings, by this call of ``fuse`` or one before."""
    return any(layer._siblings is not None for layer in adapted_layers(model).values())


def separate(model: nn.Module) -> bool:
    """Undoes ``fuse``; whether there were siblings."""
    layers = [layer for layer in adapted_layers(model).values() if layer._siblings is not None]
    for layer in layers:
        layer.set_siblings(None)
    return bool(layers)


def _child(module: nn.Module, path: str) -> AdapterLayer | None:
    try:
        child = module.get_submodule(path)
    except AttributeError:
        return None
    return child if isinstance(child, AdapterLayer) and child.shares_x else None


def shared_calls(kind: type[nn.Module]) -> list[list[str]]:
    """The submodules that the ``forward`` of ``kind`` calls with the same variable, by their paths."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return []  # there is no source, or none of Python's
    if not isinstance(function, ast.FunctionDef):
        return []
    reader = _Reader(function)
    groups: list[tuple[set[int], list[str]]] = []
    for path, values in reader.calls:
        alike = [group for group in groups if group[0] & values]
        joined = set(values).union(*(group[0] for group in alike))
        paths = [p for group in alike for p in group[1]]
        groups = [group for group in groups if group not in alike]
        groups.append((joined, list(dict.fromkeys([*paths, path]))))
    return [paths for _, paths in groups if len(paths) > 1]


class _Reader:
    """Reads a function from top to bottom: which values names stand for, and who is called with them."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.calls: list[tuple[str, _Values]] = []
        self._count = 0
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        self._self = arguments[0].arg if arguments else ""
        self._names: dict[str, _Values] = {one.arg: self._fresh() for one in arguments}
        self._block(function.body)

    def _fresh(self) -> _Values:
        self._count += 1
        return frozenset((self._count,))

    def _block(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, ast.AugAssign):
            self._value(node.value)
            self._forget(node.target)
        elif isinstance(node, ast.If):
            self._value(node.test)
            self._branches([node.body, node.orelse])
        elif isinstance(node, ast.For | ast.While):
            self._value(node.iter if isinstance(node, ast.For) else node.test)
            if isinstance(node, ast.For):
                self._forget(node.target)
            self._branches([[*node.body, *node.orelse], []])
        elif isinstance(node, ast.Try):
            self._branches([[*node.body, *node.orelse], *[h.body for h in node.handlers]])
            self._block(node.finalbody)
        elif isinstance(node, ast.With):
            for item in node.items:
                self._value(item.context_expr)
            self._block(node.body)
        else:
            self._parts(node)

    def _branches(self, bodies: Iterable[Sequence[ast.stmt]]) -> None:
        """After them a name stands for what any of them has assigned to it."""
        before, ends = self._names, []
        for body in bodies:
            self._names = dict(before)
            self._block(body)
            ends.append(self._names)
        names = {name for end in ends for name in end}
        for name in names:
            before.setdefault(name, self._fresh())  # of an argument that nobody had read
        self._names = {
            name: frozenset().union(*(end.get(name, before[name]) for end in ends))
            for name in names
        }

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        pairs = [(target, value)]
        if (
            isinstance(target, ast.Tuple)
            and isinstance(value, ast.Tuple)
            and len(target.elts) == len(value.elts)
        ):
            pairs = list(zip(target.elts, value.elts, strict=True))
        found = [(to, self._value(of)) for to, of in pairs]
        for to, values in found:
            if isinstance(to, ast.Name):
                self._names[to.id] = values
            else:
                self._forget(to)

    def _forget(self, target: ast.expr) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._names[node.id] = self._fresh()

    def _value(self, node: ast.expr) -> _Values:
        """What an expression may stand for; the calls in it are noted."""
        if isinstance(node, ast.Name):
            return self._names.setdefault(node.id, self._fresh())
        if isinstance(node, ast.IfExp):
            self._value(node.test)
            return self._value(node.body) | self._value(node.orelse)
        if isinstance(node, ast.NamedExpr):
            self._assign(node.target, node.value)
            return self._names[node.target.id]
        if isinstance(node, ast.Call):
            path = self._path(node.func)
            given = [self._value(argument) for argument in node.args]
            for keyword in node.keywords:
                self._value(keyword.value)
            if path is None:
                self._value(node.func)
            elif len(given) == 1:
                self.calls.append((path, given[0]))
            return self._fresh()
        self._parts(node)
        return self._fresh()

    def _parts(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child)
            elif not isinstance(child, ast.expr_context):
                self._parts(child)

    def _path(self, node: ast.expr) -> str | None:
        """``a.b`` of ``self.a.b``."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not (parts and isinstance(node, ast.Name) and node.id == self._self):
            return None
        return ".".join(reversed(parts))

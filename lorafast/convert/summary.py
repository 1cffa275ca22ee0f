"""``summary``: what of a model is adapted, and what is trained."""

from dataclasses import dataclass

from torch import nn

from lorafast.convert.first_backward import waits_for_gradient
from lorafast.convert.kinds import adapted_layers, adapter_parameters
from lorafast.convert.left_out import LeftOut, left_out
from lorafast.nn import siblings
from lorafast.nn.adapter_module import adapters_in

# alpha where a LoraConfig gives none.
_PEFT_ALPHA = 8


@dataclass(frozen=True)
class AdapterRow:
    """One adapted layer."""

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: float
    dropout: float
    parameters: int
    merged: bool
    no_gradient: bool = False
    """A backward reached other adapters of the model, and none has reached this one so far."""
    remark: str = ""
    """What kind of layer it is, where it isn't a plain ``LoRALinear``."""
    siblings: tuple[str, ...] = ()
    """The layers that it shares x with (``adapt(..., fuse="siblings")``)."""
    bottleneck: bool = False
    """It is a bottleneck adapter, whose width r is."""

    def _remarks(self) -> str:
        state = "merged" if self.merged else "no gradient so far" if self.no_gradient else ""
        _, *others = siblings.short((self.name, *self.siblings))
        shares = f"shares x with {', '.join(others)}" if others else ""
        return "".join(f"  {one}" for one in (self.remark, shares, state) if one)


@dataclass(frozen=True)
class Summary:
    """Parameter counts and adapted layers of a model; prints as a table."""

    total: int
    trainable: int
    adapter: int
    layers: tuple[AdapterRow, ...]
    left: tuple[LeftOut, ...] = ()
    """Frozen layers without an adapter, by class."""

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.layers] + [len("layer")])
        lines = [f"{'layer':<{width}}  {'in → out':>14}  {'r':>4}  scaling  dropout  parameters"]
        for row in self.layers:
            shape = f"{row.in_features} → {row.out_features}"
            lines.append(
                f"{row.name:<{width}}  {shape:>14}  {row.r:>4}  {row.scaling:>7.4g}  "
                f"{row.dropout:>7.4g}  {row.parameters:>10,}{row._remarks()}"
            )
        share = 100 * self.trainable / self.total if self.total else 0.0
        layers = "layer" if len(self.layers) == 1 else "layers"
        lines.append(
            f"{len(self.layers)} adapted {layers}, {self.adapter:,} adapter parameters; "
            f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2f} %)"
        )
        lora = [row for row in self.layers if not row.bottleneck]
        if any(row.scaling == 1.0 and row.r != _PEFT_ALPHA for row in lora):
            lines.append("scaling 1 is the default, alpha = r; that of PEFT's LoraConfig is 8 / r")
        lines += [f"without adapter: {one}" for one in self.left]
        return "\n".join(lines)

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """The adapted layers of ``model`` and how many parameters it has, trains, and has in adapters.

    Shared parameters count once.
    """
    layers = adapters_in(model)
    others = {
        name: tuple(other for other in group if other != name)
        for group in siblings.groups(adapted_layers(model))
        for name in group
    }
    rows = tuple(
        AdapterRow(
            name=name or "(model)",
            in_features=layer.in_features,
            out_features=layer.out_features,
            r=layer.r,
            scaling=layer.scaling,
            dropout=layer.dropout,
            parameters=sum(p.numel() for p in layer.adapter_parameters().values()),
            merged=layer.merged,
            no_gradient=waits_for_gradient(layer),
            remark=layer.summary_remark(),
            siblings=others.get(name, ()),
            bottleneck=layer.operation == "bottleneck",
        )
        for name, layer in layers.items()
    )
    parameters = list(model.parameters())
    return Summary(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        adapter=sum(p.numel() for p in set(adapter_parameters(model))),
        layers=rows,
        left=left_out(model),
    )

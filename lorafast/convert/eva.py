"""``initialize_eva``: adapters begin with the directions in which their inputs vary most (EVA)."""

import ctypes
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafast.convert.first_backward import watch
from lorafast.convert.from_data import (
    Forward,
    again_and_again,
    call,
    check_finite,
    check_seen,
    device_of,
    fresh_layers,
    moved,
    watching,
)
from lorafast.convert.incremental_pca import IncrementalPCA
from lorafast.convert.kinds import adapted_layers
from lorafast.convert.targets import replace, unwrapped
from lorafast.nn import LoRALinear
from lorafast.nn.plain import move_hooks

Mask = Callable[[Any], Tensor | None]
_START = "EVA"


def initialize_eva(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    adjust_scaling_factors: bool = True,
    use_label_mask: bool = True,
    label_mask_value: int = -100,
    mask: Mask | None = None,
    forward: Forward = call,
    max_passes: int = 100,
) -> dict[str, int]:
    """Begins fresh adapters with principal components of their inputs, and shares the ranks out anew.

    EVA (Paischer et al., 2024), with the numbers of PEFT's ``initialize_lora_eva_weights``: the rows of
    ``A [r, K]`` are the first r right-singular vectors of the layer's centred inputs, found batch by
    batch until they turn no more; B stays zero. Of all components of all layers those with the largest
    shares of their layer's variance are kept, as many as the layers' ranks come to together: a layer
    has at most ``rho`` times its rank afterwards, and one that gets none is a plain layer again.

    Call it after ``adapt`` and before an optimizer is made: parameters whose rank changes are others
    afterwards. Linear layers alone begin so, over weights of any format. Saved adapters say their ranks
    and are read by ``load_adapter`` and by PEFT.

    Args:
        model: a model whose adapters are fresh.
        batches: what the model is called with: a list, a ``DataLoader``, ... They are gone through again
            until all layers have converged. Tensors are brought to the adapters' device.
        rho: 1 leaves all ranks as they are.
        tau: a component has converged if its cosine with what it was a batch before is at least this.
        whiten: divide each component by the root of its singular value, once (PEFT does so once more
            for each further layer with the same input).
        adjust_scaling_factors: keep ``alpha / r`` where r changes; otherwise ``alpha`` stays.
        use_label_mask: leave out positions whose label is ``label_mask_value``.
        label_mask_value: see ``use_label_mask``.
        mask: gives of a batch which positions count, boolean ``[B, T]``, or None for all. By default
            those of its ``attention_mask`` and ``labels``, where it is a mapping that has them. An input
            of another number of rows counts whole.
        forward: ``forward(model, batch)`` calls the model; by default ``model(**batch)`` of a mapping,
            ``model(*batch)`` of a tuple or a list, else ``model(batch)``.
        max_passes: how often ``batches`` may be gone through.

    Returns:
        The rank of each layer by name, 0 of one that is plain again.

    Raises:
        ValueError: an adapter isn't fresh, there is no linear one, no batch reaches a layer, a layer has
            fewer inputs in each batch or fewer features than ``rho · r``, inputs aren't finite, nothing
            has converged after ``max_passes``, or an argument doesn't fit. The model is unchanged.
    """
    _check_arguments(rho, tau, max_passes)
    inner = unwrapped(model)
    layers = fresh_layers(inner, _START)
    most = {name: round(layer.r * rho) for name, layer in layers.items()}
    for name, layer in layers.items():
        if most[name] > layer.in_features:
            raise ValueError(
                f"rho · r of {name or 'the model'} is {most[name]}, expected at most its "
                f"{layer.in_features} features"
            )

    def positions(batch: Any) -> Tensor | None:
        if mask is not None:
            return mask(batch)
        return _attended(batch, label_mask_value if use_label_mask else None)

    device = device_of(layers)
    search = _Search(layers, most, tau, positions, lambda batch: forward(inner, batch), device)
    begun = search.run(inner, again_and_again(batches), max_passes)
    alphas = {}
    for name, (rank, A) in begun.items():
        layer = layers[name]
        if whiten:
            begun[name] = rank, A / search.principal(name).pca.singular_values[:rank, None].sqrt()
        changed = adjust_scaling_factors and rank != layer.r
        alphas[name] = layer.alpha * (rank / layer.r) if changed else layer.alpha
    for name, (rank, A) in begun.items():
        if rank:
            layers[name].begin(A, alphas[name])
    removed = {layers[name] for name, (rank, _) in begun.items() if not rank}
    _make_plain(inner, removed)
    watch(inner)
    return {name: begun[name][0] for name in layers}


def _check_arguments(rho: float, tau: float, max_passes: int) -> None:
    for name, value, low, high in (("rho", rho, 1, 1000), ("tau", tau, 0, 1)):
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}, expected a number from {low} to {high}")
    if not isinstance(max_passes, int) or max_passes < 1:
        raise ValueError(f"max_passes is {max_passes!r}, expected an integer of at least 1")


def _attended(batch: Any, left_out: int | None) -> Tensor | None:
    """The positions of a batch that its ``attention_mask`` and ``labels`` don't leave out."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    found = mask.bool() if isinstance(mask, Tensor) else None
    if left_out is None or not isinstance(labels, Tensor):
        return found
    tokens = batch.get("input_ids") if found is None else found
    if not isinstance(tokens, Tensor) or tokens.shape != labels.shape:
        return found  # labels of whole texts
    counted = labels != left_out
    return counted if found is None else found & counted


class _Principal:
    """The components of what one layer sees, or several that see the same."""

    def __init__(self, name: str, n: int, tau: float) -> None:
        self.name, self.pca = name, IncrementalPCA(n)
        self.most_rows = 0
        self._tau = tau
        self._converged = torch.zeros(n, dtype=torch.bool)
        self.done = False
        """Whether it looks at no further batch."""

    def add(self, rows: Tensor) -> None:
        """Takes rows ``[M, K]`` in; fewer than components are passed over."""
        self.most_rows = max(self.most_rows, len(rows))
        if self.done or len(rows) < self.pca.n:
            return
        before = self.pca.components if self.pca.rows else None
        self.pca.add(rows)
        if before is not None:
            cosine = torch.nn.functional.cosine_similarity(self.pca.components, before)
            self._converged = (cosine >= self._tau).cpu()

    def has_converged(self, rank: int) -> bool:
        """Whether the first components have."""
        return bool(self._converged[:rank].all())


class _Search:
    """The way through the batches, batch by batch as PEFT goes it."""

    def __init__(
        self,
        layers: dict[str, LoRALinear],
        most: dict[str, int],
        tau: float,
        positions: Mask,
        forward: Callable[[Any], object],
        device: torch.device,
    ) -> None:
        self._layers, self._most, self._tau = layers, most, tau
        self._positions, self._forward, self._device = positions, forward, device
        self._budget = sum(layer.r for layer in layers.values())
        self._mask: Tensor | None = None
        self._first: dict[str, tuple[object, ...]] = {}
        """Of each layer what tells its first input from others."""
        self._same_as: dict[str, str] = {}
        """Layers that see what another sees, and that one."""
        self._seen: dict[str, _Principal] = {}
        self._ranks = most

    def principal(self, name: str) -> _Principal:
        """The components of the inputs of a layer."""
        return self._seen[self._same_as.get(name, name)]

    def run(
        self, model: nn.Module, batches: Iterable[Any], max_passes: int
    ) -> dict[str, tuple[int, Tensor]]:
        """The rank of each layer, and its ``A [rank, K]``."""
        with watching(model, self._layers, self._compare):
            for batch in batches:
                self._show(batch)
                break
            else:
                raise ValueError(f"batches is empty: {_START} is computed of what the layers see")
        self._group()
        alone = {name: self._layers[name] for name in self._seen}
        with watching(model, alone, lambda name, x: self._seen[name].add(self._rows(name, x))):
            for _ in range(max_passes):
                for batch in batches:
                    if self._is_done():
                        return self._found()
                    self._show(batch)
                    if all(one.pca.rows for one in self._seen.values()):
                        self._share_out()
                self._check_seen()
        if self._is_done():
            return self._found()
        waiting = [one.name for one in self._seen.values() if not one.done]
        raise ValueError(
            f"the components of {waiting[0] or 'the model'} ({len(waiting)} of {len(self._seen)} inputs "
            f"of layers) turn still after {max_passes} passes: give more batches, or a smaller tau than "
            f"{self._tau}"
        )

    def _show(self, batch: Any) -> None:
        batch = moved(batch, self._device)
        self._mask = self._positions(batch)
        self._forward(batch)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """The rows ``[M, K]`` of an input that count."""
        rows = x.reshape(-1, x.shape[-1])
        if self._mask is not None and self._mask.numel() == len(rows):
            rows = rows[self._mask.reshape(-1).bool()]
        check_finite(name, rows)
        return rows

    def _compare(self, name: str, x: Tensor) -> None:
        if name not in self._first:
            rows = self._rows(name, x)
            memory = rows.cpu().contiguous()
            content = ctypes.string_at(memory.data_ptr(), memory.nbytes)
            self._first[name] = rows.shape, rows.dtype, hashlib.sha256(content).digest()

    def _group(self) -> None:
        """One search for all layers that saw the same in the first batch, of their largest rank."""
        groups: dict[object, list[str]] = {}
        for name in self._layers:
            groups.setdefault(self._first.get(name, name), []).append(name)
        for first, *others in groups.values():
            self._same_as |= dict.fromkeys(others, first)
            largest = max(self._most[name] for name in (first, *others))
            self._most |= dict.fromkeys((first, *others), largest)
        self._seen = {
            name: _Principal(name, self._most[name], self._tau)
            for name in self._layers
            if name not in self._same_as
        }

    def _is_done(self) -> bool:
        """Whether no layer needs a further batch; those that do are to look at the next one."""
        for name, one in self._seen.items():
            one.done = one.has_converged(self._ranks[name])
        return all(one.done for one in self._seen.values())

    def _share_out(self) -> None:
        """The budget goes to the components with the largest shares of their layer's variance."""
        order = [*self._seen, *self._same_as]
        shares = [(name, share) for name in order for share in self._shares(name)]
        best = torch.stack([share for _, share in shares]).argsort(descending=True)
        counts = Counter(shares[i][0] for i in best[: self._budget].tolist())
        self._ranks = {name: counts[name] for name in order}
        for name, first in self._same_as.items():
            # The one that is looked at has the largest rank of those that see the same.
            if self._ranks[first] < self._ranks[name]:
                self._ranks[first], self._ranks[name] = self._ranks[name], self._ranks[first]

    def _shares(self, name: str) -> Tensor:
        return self.principal(name).pca.explained[: self._most[name]].cpu()

    def _check_seen(self) -> None:
        check_seen(self._seen, [one.name for one in self._seen.values() if one.most_rows])
        for one in self._seen.values():
            if not one.pca.rows:
                raise ValueError(
                    f"{one.name or 'the model'} sees at most {one.most_rows} inputs in a batch, "
                    f"expected at least {one.pca.n}, rho · r: give larger batches, or a smaller rho or r"
                )

    def _found(self) -> dict[str, tuple[int, Tensor]]:
        return {
            name: (rank, self.principal(name).pca.components[:rank])
            for name, rank in self._ranks.items()
        }


def _make_plain(model: nn.Module, layers: set[LoRALinear]) -> None:
    """Puts plain layers in the place of those that got no rank, over the same weights."""
    plain = {layer: layer.without_adapter() for layer in layers}
    for layer, other in plain.items():
        move_hooks(layer, other)
    named = adapted_layers(model, remove_duplicate=False)
    replace(model, {name: plain[layer] for name, layer in named.items() if layer in plain})

"""The ways in which a matrix may lie in memory."""

from torch import Tensor

LAYOUTS = (
    "contiguous", "transposed", "every other column", "one row expanded", "one column expanded",
    "offset",
)  # fmt: skip


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of a matrix in other strides; what is expanded repeats its first row or column."""
    M, K = tensor.shape
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "every other column":
        wide = tensor.new_full((M, 2 * K), float("nan"))
        wide[:, ::2] = tensor
        return wide[:, ::2]
    if layout == "one row expanded":
        return tensor[:1].expand(M, K)
    if layout == "one column expanded":
        # A matrix without columns has none to repeat.
        return (tensor[:, :1] if K else tensor.new_empty(M, 1)).expand(M, K)
    if layout == "offset":
        # One element off, so that no row begins at an aligned address.
        flat = tensor.new_full((M * K + 1,), float("nan"))
        flat[1:] = tensor.reshape(-1)
        return flat[1:].view(M, K)
    if layout != "contiguous":
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    return tensor

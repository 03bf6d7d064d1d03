"""Heat maps in [0, 1], drawn with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(maps: Mapping[str, Tensor], shape: Sequence[int] | None, cmap: str, path: Any) -> Figure:
    """One panel a map of one or two axes, titled by its name, with one colour bar for all."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot() needs matplotlib, which is not installed: pip install matplotlib") from error
    panels = _panels(maps, shape)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4 * columns + 1, 3 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    image = None
    for axes, (title, labels, values) in zip(grid.flat, panels, strict=False):
        wide = values.shape[0] * 4 < values.shape[1]
        image = axes.imshow(
            values.numpy(), cmap=cmap, vmin=0, vmax=1, interpolation="nearest", aspect="auto" if wide else "equal"
        )
        axes.set_title(title)
        if labels is not None:
            axes.set_yticks(range(len(labels)), labels)
    figure.colorbar(image, ax=grid.ravel().tolist(), label="importance factor")
    if path is not None:
        figure.savefig(path)
    return figure


def _panels(maps: Mapping[str, Tensor], shape: Sequence[int] | None) -> list[tuple[str, list[str] | None, Tensor]]:
    """(title, labels of the rows, two-dimensional values) of each panel."""
    if shape is not None:
        size = torch.Size(shape)
        for name, values in maps.items():
            if values.dim() == 1 and (len(size) != 2 or values.numel() != size.numel()):
                raise ValueError(
                    f"ImportanceFactor.plot: shape is {tuple(shape)}; it must be two sizes whose product is the "
                    f"length of the map of {name!r}, {values.numel()}"
                )
        return [(name, None, values.reshape(size) if values.dim() == 1 else values) for name, values in maps.items()]
    flat = {name: values for name, values in maps.items() if values.dim() == 1}
    lengths = sorted({len(values) for values in flat.values()})
    shared = []
    for length in lengths:
        names = [name for name, values in flat.items() if len(values) == length]
        shared.append(("", names, torch.stack([flat[name] for name in names])))
    return shared + [(name, None, values) for name, values in maps.items() if values.dim() > 1]

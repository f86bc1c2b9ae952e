"""Draws which patches of an image a pruned tower kept, and where it merged the others."""

from typing import Any

import torch
from torch import Tensor

from projecta._checks import Checker
from projecta.vtp.pruning import Pruning


def draw(image: Any, handle: Pruning, row: int = 0) -> Any:
    """Draw which patches the last forward pass kept: the others are dark, with a line to their new token.

    Args:
        image: the model's input before normalisation: (rows, columns, 3) as for matplotlib's imshow, or a
            (3, rows, columns) tensor in 0...1. Any size and aspect ratio.
        handle: handle of a model that has run. row: row of the batch.

    Returns:
        A matplotlib figure (matplotlib is in an extra: `pip install "projecta[gate]"`).
    """
    check = Checker("draw")
    check.that(handle.trace is not None, "handle", "be of a model that has run", "a handle without a trace")
    assert handle.trace is not None
    assert handle.owner is not None
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    prefix = handle._family.prefix
    if isinstance(image, Tensor):
        image = image.detach().float().cpu().permute(1, 2, 0).clamp(0, 1).numpy()
    owner = handle.owner[row].cpu()
    patches = len(owner) - prefix
    rows, columns = handle.grid
    check.that(rows * columns == patches, "handle", f"be of a {rows} x {columns} grid", f"{patches} patches")
    at = handle.trace[row].cpu() - prefix
    kept = torch.zeros(patches, dtype=torch.bool)
    kept[at[prefix:]] = True
    height, width = image.shape[0] / rows, image.shape[1] / columns
    figure = Figure(figsize=(5, 5 * image.shape[0] / image.shape[1]), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(image)
    axes.set_axis_off()
    for patch in (~kept).nonzero()[:, 0].tolist():
        y, x = divmod(patch, columns)
        box = axes.add_patch(Rectangle((x * width, y * height), width, height))
        box.set(facecolor="black", alpha=0.7, linewidth=0)
        into = int(owner[patch + prefix])
        if into >= prefix:
            v, u = divmod(int(at[into]), columns)
            axes.plot(
                [(x + 0.5) * width, (u + 0.5) * width], [(y + 0.5) * height, (v + 0.5) * height],
                color="white", alpha=0.5, linewidth=0.6,
            )  # fmt: skip
    axes.set_xlim(0, image.shape[1])
    axes.set_ylim(image.shape[0], 0)
    figure.suptitle(f"{int(kept.sum())} of {patches} patches, {handle.flops_ratio:.2f} of the FLOPs")
    return figure

"""The picture of a pruned model: kept widths and importance by block, costs before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments.inspection import costs
from tapfl.errors import ConfigError
from tapfl.store import write_bytes

COLOURS = {"attention": "#4477aa", "ffn": "#ee8866"}
NAMES = {"attention": "attention", "ffn": "FFN"}
GREY = "#bbbbbb"
LABELLED_BLOCKS = 16  # with more, bars are too narrow for their widths in words


def picture(found: Mapping[str, Any], file: Path) -> None:
    """Draws what `inspect` found as a PNG. Raises ConfigError if it cannot be written."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    layers = found["layers"]
    important = any(layer["importance"] is not None for layer in layers)
    blocks = len({_block(layer) for layer in layers})
    size = (max(8.0, 4 + 0.55 * min(blocks, 30)), 5.2 if important else 3.6)
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(
        2 if important else 1, 2, width_ratios=(size[0] - 3, 3), height_ratios=(3, 2)[: 1 + important]
    )
    kept = figure.add_subplot(grid[0, 0])
    _bars(kept, layers, [layer["kept"] / layer["units"] for layer in layers])
    _widths(kept, layers)
    kept.set(ylabel="share of units kept", ylim=(0, 1.0), yticks=[0, 0.25, 0.5, 0.75, 1])
    kept.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    lowest = kept
    if important:
        lowest = figure.add_subplot(grid[1, 0], sharex=kept)
        _bars(lowest, layers, [layer["importance"] or 0.0 for layer in layers])
        lowest.set_ylabel("importance: KL (nats)")
        kept.tick_params(labelbottom=False)
    lowest.set_xlabel("block")
    kept.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1.04), frameon=False)
    _stages(kept, lowest, layers)
    _costs(figure.add_subplot(grid[:, 1]), found)
    said = ", ".join(f"{key} {found['provenance'][key]}" for key in ("criterion", "data") if key in found["provenance"])
    figure.suptitle(found["backbone"] + (f"   ({said})" if said else ""), x=0.01, ha="left", weight="bold", size=11)
    image = BytesIO()
    figure.savefig(image, dpi=130, format="png")
    plt.close(figure)
    try:
        write_bytes(file, image.getvalue())
    except OSError as error:
        raise ConfigError(f"picture = {str(file)!r}: cannot be written ({error.strerror})") from None


def _block(layer: Mapping[str, Any]) -> str:
    return str(layer["name"]).rpartition(".")[0]


def _positions(layers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns where the bar of each layer stands: side by side within a block."""
    order = {block: position for position, block in enumerate(dict.fromkeys(map(_block, layers)))}
    return [order[_block(layer)] + (-0.2 if layer["kind"] == "attention" else 0.2) for layer in layers]


def _bars(axis: Any, layers: Sequence[Mapping[str, Any]], heights: Sequence[float]) -> None:
    places = list(zip(layers, _positions(layers), heights, strict=True))
    for kind, colour in COLOURS.items():
        own = [(x, height) for layer, x, height in places if layer["kind"] == kind]
        axis.bar([x for x, _ in own], [h for _, h in own], width=0.38, color=colour, label=NAMES[kind], zorder=2)
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(-0.6, round(max(_positions(layers))) + 0.6)


def _widths(axis: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    """Writes the width of each layer into its bar, or above it where the bar is too short."""
    if len({_block(layer) for layer in layers}) > LABELLED_BLOCKS:
        return
    for layer, x in zip(layers, _positions(layers), strict=True):
        share = layer["kept"] / layer["units"]
        inside = share > 0.3
        axis.text(
            x,
            share - 0.02 if inside else share + 0.02,
            layer["width"],
            rotation=90,
            ha="center",
            va="top" if inside else "bottom",
            color="white" if inside else "#333333",
            size=7.5,
        )


def _stages(top: Any, bottom: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    """Numbers the blocks within their stage, and parts the stages where there are several."""
    blocks = list(dict.fromkeys((str(layer["stage"]), _block(layer)) for layer in layers))
    stages = [(stage, len(list(group))) for stage, group in groupby(blocks, key=lambda block: block[0])]
    bottom.set_xticks(range(len(blocks)), [str(i) for _, count in stages for i in range(count)])
    if len(stages) == 1:
        return
    start = 0
    for number, (_, count) in enumerate(stages):
        for axis in (top, bottom) if number % 2 == 0 else ():
            axis.axvspan(start - 0.5, start + count - 0.5, color="#f3f3f3", zorder=-1)
        top.text(start + count / 2 - 0.5, 1.01, f"stage {number}", ha="center", va="bottom", size=8, color="#555555")
        start += count
    bottom.set_xlabel("block of its stage")


def _costs(axis: Any, found: Mapping[str, Any]) -> None:
    """Draws every cost as its share of the dense model's, with both in words."""
    rows = costs(found)
    for y, (_, dense, small, share) in enumerate(rows):
        axis.barh(y, 1, height=0.42, color=GREY)
        axis.barh(y, share, height=0.42, color="#228833")
        axis.text(0, y + 0.26, f"{share:.1%}: {small} of {dense}", va="top", size=8, color="#333333")
    axis.set(yticks=range(len(rows)), ylim=(len(rows) - 0.3, -0.5), xlim=(0, max(1.0, *(row[3] for row in rows))))
    axis.set_yticklabels([])
    for y, (name, *_) in enumerate(rows):
        axis.text(0, y - 0.24, name, va="bottom", size=9)
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    axis.set_title("cost, of dense", size=9, loc="left", color="#555555")

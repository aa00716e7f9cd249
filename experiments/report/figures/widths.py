"""What stays of every layer of every device's model."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import numpy as np

from experiments.figures.figure import Figure, device_height, devices_of, layered
from experiments.report import series
from experiments.report.figures.cells import GAP, cells
from experiments.report.reading import Run


def kept_attention(run: Run) -> Figure | None:
    return _kept(run, "attention", "kept-attention", "Kept width of the attentions by layer", "dims of the heads")


def kept_ffn(run: Run) -> Figure | None:
    return _kept(run, "ffn", "kept-ffn", "Kept width of the FFNs by layer", "hidden neurons")


def _kept(run: Run, kind: str, name: str, title: str, units: str) -> Figure | None:
    rows = [row for row in series.widths(run) if row["kind"] == kind]
    if not rows:
        return None
    devices, blocks = devices_of(rows), list(dict.fromkeys(row["block"] for row in rows))
    mean = {block: float(np.mean([row["share"] for row in rows if row["block"] == block])) for block in blocks}
    places = _places(blocks)
    most, least = max(blocks, key=mean.__getitem__), min(blocks, key=mean.__getitem__)
    shown = [row | {"said": f"{row['share']:.0%}", "place": places[row["block"]]} for row in rows]
    axis = alt.X(
        "place:N",
        title="block",
        scale=alt.Scale(domain=list(places.values()), paddingInner=GAP),
        axis=alt.Axis(labelAngle=0),
    )
    tooltip = ["device:O", "layer:N", "width:N", "dense width:N", alt.Tooltip("share:Q", title="kept", format=".0%")]
    drawn = cells(
        shown, devices, axis, "share", "kept share", tooltip, len(blocks), text="said:N", domain=(0, 1), format=".0%"
    )
    return Figure(
        name,
        title,
        f"Share of the {units} that stays. On average most stays in {most} ({mean[most]:.0%}), least in {least} "
        f"({mean[least]:.0%}).",
        layered(*drawn, height=device_height(devices)),
        {"cells": shown},
        [{key: row[key] for key in ("device", "layer", "width", "dense width", "share")} for row in rows],
    )


def _places(blocks: Sequence[str]) -> dict[str, str]:
    """Returns the blocks' numbers by name, 3 of blocks.3 and 1.0 of layers.1.blocks.0; the names where these fail."""
    short = {block: ".".join(part for part in block.split(".") if part.isdigit()) for block in blocks}
    return short if all(short.values()) and len(set(short.values())) == len(blocks) else {b: b for b in blocks}

"""The picture of a pruned model: kept widths and layer importance by block, and costs relative to the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from experiments.figures.figure import Chart, Figure, Row, write_figure
from experiments.pruning import costs
from tapfl.errors import ConfigError

KINDS = {"attention": "attention", "ffn": "FFN"}
LABELLED_BLOCKS = 16  # with more blocks, bars are too narrow for labels
INSIDE = 0.3  # kept share above which a bar's label is inside the bar


def picture(found: Mapping[str, Any], file: Path) -> None:
    """Writes the picture of the model that `inspect` described: SVG if the file's name ends in ``.svg``, else PNG.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        write_figure(kept_widths(found), file)
    except OSError as error:
        raise ConfigError(f"picture = {str(file)!r}: cannot be written ({error.strerror})") from None


def kept_widths(found: Mapping[str, Any]) -> Figure:
    """Returns kept widths, importance (if the plan has it) and costs of the model that `inspect` described."""
    stages, spent = _stages(found["layers"]), costs(found)
    rows = [row for stage in stages.values() for row in stage]
    importance = max((row["importance"] for row in rows if row["importance"] is not None), default=None)
    form = _Form(len(stages), len(rows), importance)
    panels = [_panel(name, stage, form, first=k == 0) for k, (name, stage) in enumerate(stages.items())]
    made = ", ".join(f"{key} {found['provenance'][key]}" for key in ("criterion", "data") if key in found["provenance"])
    return Figure(
        "widths",
        found["backbone"] + (f" ({made})" if made else ""),
        "; ".join(f"{name}: {small} of {dense}, {share:.1%}" for name, dense, small, share in spent) + ".",
        alt.hconcat(*panels, _costs(max(share for *_, share in spent)), spacing=12),
        {**stages, "costs": [_cost(*row) for row in spent]},
        rows,
    )


def _stages(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Row]]:
    """Returns one row per layer, grouped by stage of the backbone; blocks are numbered within their stage."""
    stages: dict[str, list[Row]] = {}
    numbers: dict[str, dict[str, int]] = {}
    for layer in layers:
        blocks = numbers.setdefault(layer["stage"], {})
        block = blocks.setdefault(str(layer["name"]).rpartition(".")[0], len(blocks))
        row = {key: layer[key] for key in ("name", "width", "importance")}
        row |= {"block": block, "kind": KINDS[layer["kind"]], "kept": layer["kept"] / layer["units"]}
        row |= {"tokens": layer["tokens"] / layer["tokens_dense"]}
        stages.setdefault(f"stage {len(numbers) - 1}", []).append(row)
    return stages


@dataclass(frozen=True)
class _Form:
    """Number of stages and layers that are drawn, and their largest importance; None if the plan has none."""

    stages: int
    layers: int
    importance: float | None

    @property
    def labelled(self) -> bool:
        return self.layers <= 2 * LABELLED_BLOCKS

    @property
    def step(self) -> int:
        return 44 if self.labelled else max(14, 88 * LABELLED_BLOCKS // self.layers)


def _panel(stage: str, rows: Sequence[Row], form: _Form, first: bool) -> Chart:
    """Returns the kept widths of each block of a stage, with their importance below."""
    merges = any(row["tokens"] < 1 for row in rows)
    kept = "share kept (bars: units, ticks: tokens)" if merges else "share of units kept"
    drawn: list[Any] = [_bars(stage, rows, _axis("kept", kept, 1.0, first, format="%"), form)]
    if form.labelled:
        text = drawn[0].encode(text="width:N", color=alt.value("white"))
        inside = text.transform_filter(f"datum.kept > {INSIDE}").mark_text(angle=270, align="right", dx=-4)
        above = text.transform_filter(f"datum.kept <= {INSIDE}").mark_text(angle=270, align="left", dx=4)
        drawn += [inside, above.encode(color=alt.value(alt.ExprRef("ink")))]
    if merges:
        y = _axis("tokens", "", 1.0, first)
        ticks = _bars(stage, rows, y, form).mark_tick(thickness=3, bandSize=form.step / 2.5, color="black")
        drawn.append(ticks.encode(y=alt.Y("tokens:Q"), color=alt.value(alt.ExprRef("ink"))))
    title = {"title": alt.TitleParams(stage, fontSize=12)} if form.stages > 1 else {}
    top = alt.layer(*drawn).properties(height=230, **title)
    if form.importance is None:
        return top
    y = _axis("importance", "importance: KL (nats)", form.importance, first)
    return alt.vconcat(top, _bars(stage, rows, y, form).properties(height=130), spacing=12)


def _axis(field: str, title: str, most: float, first: bool, **labels: Any) -> alt.Y:
    axis = alt.Axis(title=title if first else None, tickCount=5, **labels)
    return alt.Y(f"{field}:Q", scale=alt.Scale(domain=[0, most]), axis=axis)


def _bars(stage: str, rows: Sequence[Row], y: alt.Y, form: _Form) -> alt.Chart:
    kinds = list(KINDS.values())
    return (
        alt.Chart(alt.NamedData(name=stage), width=form.step * (1 + max(row["block"] for row in rows)))
        .mark_bar()
        .encode(
            x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("kind:N", sort=None, scale=alt.Scale(domain=kinds)),
            y=y,
            color=alt.Color("kind:N", scale=alt.Scale(domain=kinds)),
        )
    )


def _cost(name: str, dense: str, small: str, share: float) -> Row:
    return {"cost": name, "dense": 1, "share": share, "text": f"{share:.1%}: {small} of {dense}"}


def _costs(most: float) -> Chart:
    """Returns each cost as a share of the dense model's.

    Args:
        most: the largest share, which may exceed 1, because latency is measured.
    """
    title = alt.TitleParams("cost as a share of the dense model's", fontSize=12)
    base = alt.Chart(alt.NamedData(name="costs"), width=220, height=230, title=title)
    y, scale = alt.Y("cost:N", sort=None, title=None), alt.Scale(domain=[0, max(1.0, most)])
    full = base.mark_bar(height=14, color="#e2e5e9").encode(y=y, x=alt.X("dense:Q", axis=None, scale=scale))
    bars = base.mark_bar(height=14).encode(y=y, x=alt.X("share:Q", axis=None, scale=scale))
    text = base.mark_text(align="left", dy=18).encode(y=y, x=alt.value(0), text="text:N")
    return alt.layer(full, bars, text)

"""Pictures of results: heat maps, accuracy and seconds by length, retrieval against its cost."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from widefield.errors import WidefieldError
from widefield.evaluation.grid import length_label
from widefield.evaluation.results import Cell, Results, write_atomically

if TYPE_CHECKING:
    from widefield.evaluation.tune import TuneResult, TuneRow

__all__ = [
    "Curve",
    "Point",
    "display_name",
    "frontier",
    "heatmaps",
    "lines",
    "speed",
    "tuned_points",
]

_DPI = 150
_BAR = 0.26  # inches
_INK, _MUTED, _GRID, _MARK = "#1f2933", "#5f6b76", "#d9dee3", "#c2185b"
_COLOURS = colormaps["viridis"]
# Okabe and Ito's colours, told apart by colour-blind readers, each with its own marker.
_SERIES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#000000", "X"),
)
_FLOORS = ((0, (5, 3)), (0, (1, 2)))
_NAMES = {"longmamba": "LongMamba", "decimamba": "DeciMamba"}
_LABEL_SPOTS = (
    ((9, 0), "left", "center"),
    ((0, 8), "center", "bottom"),
    ((0, -8), "center", "top"),
    ((-9, 0), "right", "center"),
    ((6, 6), "left", "bottom"),
    ((6, -6), "left", "top"),
    ((-6, 6), "right", "bottom"),
    ((-6, -6), "right", "top"),
    ((14, 16), "left", "bottom"),
    ((14, -16), "left", "top"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One setting in a `frontier` picture.

    Attributes:
        label: written beside it; empty for none.
        share: share of right passkeys, 0 to 1.
        cost: relative rise of bits per byte against the unmodified model, e.g. 0.03.
        group: points of one group share a marker and an entry in the legend.
        chosen: drawn with a ring around it.
    """

    label: str
    share: float
    cost: float
    group: str = ""
    chosen: bool = False


def display_name(method: str) -> str:
    """A subject's name for people: "longmamba+decimamba" as "LongMamba + DeciMamba"."""
    return " + ".join(_NAMES.get(part, part[:1].upper() + part[1:]) for part in method.split("+"))


def heatmaps(
    results: Results, path: str | Path, train_length: int | None = None, title: str | None = None
) -> Path:
    """Passkey retrieval, one heat map a method side by side: context length across, depth down.

    Args:
        results: with passkey cells.
        path: of the PNG; written atomically.
        train_length: marked by a line in every map; None draws none.
        title: over everything; None names the task.

    Returns:
        The path.

    Raises:
        WidefieldError: if there are no passkey cells, or the file cannot be written.
    """
    methods = _methods(results)
    cells = results.select("passkey")
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth or 0.0 for cell in cells})
    layout = _Layout.of(len(methods), len(lengths), len(depths))
    figure = Figure(figsize=(layout.width, layout.height), dpi=_DPI, facecolor="white")
    for column, method in enumerate(methods):
        axes = figure.add_axes(layout.map_box(column))
        _draw_map(axes, results.select("passkey", method), lengths, depths)
        _mark_training(axes, lengths, train_length)
        axes.set_title(display_name(method), fontsize=10.5, fontweight="bold", pad=17, color=_INK)
        if column == 0:
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.set_ylabel("depth of the key", fontsize=9, color=_INK)
    _draw_colour_bar(figure, layout.bar_box(len(methods)))
    _headings(figure, title or "Passkey retrieval", _subtitle(results, cells), layout.left)
    figure.text(
        layout.left / layout.width,
        0.14 / layout.height,
        "across: context length in tokens (k = 1,024)   ·   in the cells: share of keys repeated",
        fontsize=8,
        color=_MUTED,
    )
    return _write(figure, path)


@dataclass(frozen=True)
class _Layout:
    """Where the maps lie, in inches: about 1,000 pixels wide for three maps of five lengths."""

    tile: float
    columns: int
    map_height: float
    width: float
    height: float
    left: float = 0.78
    gap: float = 0.2
    bottom: float = 0.62

    @classmethod
    def of(cls, maps: int, columns: int, rows: int) -> _Layout:
        beside = cls.left + (maps - 1) * cls.gap + 0.62
        tile = float(np.clip((6.8 - beside) / (maps * columns), 0.36, 0.85))
        map_height = rows * float(np.clip(tile, 0.36, 0.44))
        width = max(beside + maps * columns * tile, 5.8)
        return cls(tile, columns, map_height, width, cls.bottom + map_height + 1.16)

    def map_box(self, column: int) -> tuple[float, float, float, float]:
        span = self.tile * self.columns
        return self._fractions(self.left + column * (span + self.gap), span)

    def bar_box(self, maps: int) -> tuple[float, float, float, float]:
        return self._fractions(self.left + maps * (self.tile * self.columns + self.gap) - 0.06, 0.1)

    def _fractions(self, x: float, span: float) -> tuple[float, float, float, float]:
        return (
            x / self.width,
            self.bottom / self.height,
            span / self.width,
            self.map_height / self.height,
        )


def _methods(results: Results) -> list[str]:
    methods = results.methods("passkey")
    if not methods:
        raise WidefieldError("there is nothing to draw: the results hold no passkey cells yet")
    return methods


def _draw_map(
    axes: Axes, cells: Sequence[Cell], lengths: Sequence[int], depths: Sequence[float]
) -> None:
    shares = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        shares[depths.index(cell.depth or 0.0), lengths.index(cell.length)] = cell.share
    masked = np.ma.masked_invalid(shares)
    axes.set_facecolor("#f0f2f4")
    axes.imshow(masked, cmap=_COLOURS, vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        text = "–" if np.isnan(share) else f"{share:.2f}"
        colour = _MUTED if np.isnan(share) else _readable(share)
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xticks(range(len(lengths)), [length_label(length) for length in lengths])
    axes.set_xticks(np.arange(0.5, len(lengths) - 1), minor=True)
    axes.set_yticks([])
    axes.set_yticks(np.arange(0.5, len(depths) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_visible(False)


def _readable(share: float) -> str:
    """White on the dark colours of the map, ink on the light ones."""
    red, green, blue, _ = _COLOURS(share)
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "white"


def _mark_training(axes: Axes, lengths: Sequence[int], train_length: int | None) -> None:
    """A line after the last column that is no longer than what the model was trained on."""
    if train_length is None:
        return
    edge = sum(length <= train_length for length in lengths) - 0.5
    axes.axvline(edge, color="white", linewidth=4, clip_on=False)
    axes.axvline(edge, color=_MARK, linewidth=2, clip_on=False, ymax=1.075)
    left = edge < len(lengths) / 2
    axes.annotate(
        f"trained up to {length_label(train_length)}",
        (edge, 1.0),
        (4 if left else -4, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="left" if left else "right",
        fontsize=8,
        color=_MARK,
    )


def _draw_colour_bar(figure: Figure, box: tuple[float, float, float, float]) -> None:
    axes = figure.add_axes(box)
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=_COLOURS, aspect="auto", extent=(0, 1, 0, 1))
    axes.yaxis.tick_right()
    axes.set_xticks([])
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_visible(False)


def _headings(figure: Figure, title: str, subtitle: str, left: float) -> None:
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - 0.3 / height, title, fontsize=13, fontweight="bold", color=_INK)
    figure.text(left / width, 1 - 0.5 / height, subtitle, fontsize=8.5, color=_MUTED)


def _subtitle(results: Results, cells: Sequence[Cell]) -> str:
    subjects = results.header.get("subjects", {})
    models = sorted({f"{s['model']}, {_millions(s['parameters'])}" for s in subjects.values()})
    trials = sorted({cell.trials for cell in cells})
    plural = "trial" if trials == [1] else "trials"
    count = str(trials[0]) if len(trials) == 1 else f"{trials[0]} to {trials[-1]}"
    return "   ·   ".join([*models, f"{count} {plural} a cell"])


def _millions(parameters: int) -> str:
    if parameters >= 10**9:
        return f"{parameters / 10**9:.1f}B parameters"
    return f"{parameters / 10**6:.{0 if parameters >= 10**8 else 1}f}M parameters"


def lines(
    results: Results, path: str | Path, train_length: int | None = None, title: str | None = None
) -> Path:
    """Passkey retrieval over all depths by context length (logarithmic), one line a method.

    Args:
        results: with passkey cells.
        path: of the PNG; written atomically.
        train_length: marked by a dashed line; None draws none.
        title: over everything; None names the task.

    Returns:
        The path.

    Raises:
        WidefieldError: if there are no passkey cells, or the file cannot be written.
    """
    methods = _methods(results)
    cells = results.select("passkey")
    lengths = sorted({cell.length for cell in cells})
    figure, axes = _chart()
    axes.set_xscale("log", base=2)
    for i, method in enumerate(methods):
        reached = sorted({cell.length for cell in cells if cell.method == method})
        shares = [results.share("passkey", method, length) for length in reached]
        colour, marker = _SERIES[i % len(_SERIES)]
        axes.plot(
            reached,
            shares,
            color=colour,
            marker=marker,
            linewidth=2,
            markersize=6,
            clip_on=False,
            zorder=3,
            label=display_name(method),
        )
    if train_length is not None:
        axes.axvline(train_length, color=_MARK, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            f"trained up to {length_label(train_length)}",
            (train_length, 1.0),
            (4, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8,
            color=_MARK,
        )
    axes.set_xticks(lengths, [length_label(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("context length in tokens (k = 1,024)", fontsize=9, color=_INK)
    axes.set_ylabel("share of keys repeated exactly", fontsize=9, color=_INK)
    axes.set_ylim(0, 1)
    _legend(axes)
    _headings(figure, title or "Passkey retrieval by length", _subtitle(results, cells), 0.8)
    return _write(figure, path)


@dataclass(frozen=True, slots=True)
class Curve:
    """One line in a `speed` picture.

    Attributes:
        name: in the legend.
        seconds: by length in tokens.
        floor: a bound that nothing can beat, drawn thin, grey and dashed.
    """

    name: str
    seconds: Mapping[int, float]
    floor: bool = False


def speed(
    curves: Sequence[Curve],
    path: str | Path,
    title: str = "Seconds of a prefill by length",
    subtitle: str = "",
    rates: Mapping[str, float] | None = None,
) -> Path:
    """Seconds against length, both logarithmic, one line a side and one a floor.

    Args:
        curves: at least one length each; a side may stop before the others do.
        path: of the PNG; written atomically.
        title: over everything.
        subtitle: below it.
        rates: new tokens a second by name, as bars under the lines; none draws none.

    Returns:
        The path.

    Raises:
        WidefieldError: if there is nothing to draw, or the file cannot be written.
    """
    curves = [curve for curve in curves if curve.seconds]
    if not curves:
        raise WidefieldError("there is nothing to draw: no length has been measured yet")
    bars = _BAR * len(rates) + 0.6 if rates else 0.0
    figure, axes = _chart(bars)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for i, curve in enumerate(c for c in curves if not c.floor):
        colour, marker = _SERIES[i % len(_SERIES)]
        look = {"color": colour, "marker": marker, "linewidth": 2, "markersize": 6, "zorder": 3}
        _plot_curve(axes, curve, **look)
    for i, curve in enumerate(c for c in curves if c.floor):
        _plot_curve(axes, curve, color=_MUTED, linewidth=1.3, linestyle=_FLOORS[i % len(_FLOORS)])
    lengths = sorted({length for curve in curves for length in curve.seconds})
    axes.set_xticks(lengths, [length_label(length) for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("length in tokens (k = 1,024)", fontsize=9, color=_INK)
    axes.set_ylabel("seconds", fontsize=9, color=_INK)
    _legend(axes)
    _headings(figure, title, subtitle, 0.8)
    if rates:
        _draw_rates(figure, rates, bars)
    return _write(figure, path)


def _draw_rates(figure: Figure, rates: Mapping[str, float], inches: float) -> None:
    """A bar a name, at the bottom of a figure that has so much room for them."""
    width, height = figure.get_size_inches()
    box = (2.3 / width, 0.2 / height, (width - 3.2) / width, (inches - 0.6) / height)
    axes = figure.add_axes(box)
    names, values = list(rates), list(rates.values())
    drawn = axes.barh(names, values, height=0.62, color=_SERIES[0][0])
    axes.bar_label(drawn, [f"{v:,.0f}" for v in values], padding=4, fontsize=8.5, color=_INK)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8.5, colors=_INK)
    axes.spines[:].set_visible(False)
    figure.text(
        0.8 / width, (inches - 0.32) / height, "New tokens a second", fontsize=9, color=_INK
    )


def _plot_curve(axes: Axes, curve: Curve, **look: Any) -> None:
    lengths = sorted(curve.seconds)
    axes.plot(lengths, [curve.seconds[n] for n in lengths], label=curve.name, **look)


def tuned_points(result: TuneResult) -> list[Point]:
    """The settings that `tune` asked, for `frontier`: grouped by C, the best labelled by Th."""
    last = {json.dumps(row.options): row for row in result.table if row.share is not None}
    points = [_tuned_point(row, chosen=row is result.row) for row in last.values()]
    points.sort(key=lambda point: point.group)
    named = _undominated(points)
    return [
        point if point in named or point.chosen or point.cost == 0 else replace(point, label="")
        for point in points
    ]


def _tuned_point(row: TuneRow, chosen: bool) -> Point:
    options = row.options
    if not options:
        return Point("unmodified", row.share or 0.0, row.cost, "unmodified", chosen)
    layers = options["layers"]
    fewer = "" if layers == "all" else f", layers {' '.join(map(str, layers))}"
    clamp = options["clamp_share"]
    group = f"C = {clamp:.1%}" if isinstance(clamp, float) else f"C: {clamp or 'no clamp'}"
    exponent = math.log10(options["decay_threshold"])
    reduction = "" if options["reduction"] == "fastest" else f", {options['reduction']}"
    return Point(f"1e{exponent:.0f}{reduction}{fewer}", row.share or 0.0, row.cost, group, chosen)


def frontier(
    points: Sequence[Point],
    path: str | Path,
    limit: float | None = None,
    title: str = "Retrieval against its cost in quality",
    subtitle: str = "",
) -> Path:
    """Every setting by what it costs (bits per byte, across) and what it retrieves (passkey, up).

    Args:
        points: settings; up and to the left is better.
        path: of the PNG; written atomically.
        limit: the highest acceptable cost, e.g. 0.03, marked by a dashed line; None draws none.
        title: over everything.
        subtitle: below it.

    Returns:
        The path.

    Raises:
        WidefieldError: if there are no points, or the file cannot be written.
    """
    if not points:
        raise WidefieldError("there is nothing to draw: no setting has been measured yet")
    figure, axes = _chart()
    groups = list(dict.fromkeys(point.group for point in points))
    for i, group in enumerate(groups):
        _scatter(axes, [p for p in points if p.group == group], group, *_SERIES[i % len(_SERIES)])
    axes.margins(x=0.12)
    best = _undominated(points)
    axes.plot([p.cost for p in best], [p.share for p in best], color=_GRID, linewidth=5, zorder=1)
    axes.set_ylim(-0.04, 1.08)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:+.3g} %")
    axes.set_xlabel("bits per byte against the unmodified model", fontsize=9, color=_INK)
    axes.set_ylabel("share of keys repeated exactly", fontsize=9, color=_INK)
    if limit is not None:
        axes.axvline(limit, color=_MARK, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.annotate(
            f"limit {limit:+.1%}",
            (limit, 1.0),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_MARK,
        )
    if any(groups):
        _legend(axes)
    _headings(figure, title, subtitle, 0.8)
    _label_points(figure, axes, points)
    return _write(figure, path)


def _undominated(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both share and cost, by rising cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.share)):
        if not best or point.share > best[-1].share:
            best.append(point)
    return best


def _scatter(axes: Axes, points: Sequence[Point], group: str, colour: str, marker: str) -> None:
    axes.scatter(
        [p.cost for p in points],
        [p.share for p in points],
        s=42,
        color=colour,
        marker=marker,
        edgecolors="white",
        linewidths=0.6,
        zorder=3,
        label=group or None,
    )
    ringed = [p for p in points if p.chosen]
    if ringed:
        axes.scatter(
            [p.cost for p in ringed],
            [p.share for p in ringed],
            s=170,
            facecolors="none",
            edgecolors=_INK,
            linewidths=1.4,
            zorder=4,
        )


def _label_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each label where it covers the fewest points and labels so far."""
    FigureCanvasAgg(figure)
    figure.canvas.draw()
    centres = axes.transData.transform([(p.cost, p.share) for p in points])
    taken: list[Sequence[float]] = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    inside = tuple(axes.get_window_extent().extents)
    for point in sorted(points, key=lambda p: not p.chosen):
        if not point.label:
            continue
        placed = [_annotate(axes, point, spot) for spot in _LABEL_SPOTS]
        boxes = [tuple(text.get_window_extent().extents) for text in placed]
        costs = [
            sum(_overlap(box, other) for other in taken) + 10 * _outside(box, inside)
            for box in boxes
        ]
        best = int(np.argmin(costs))
        taken.append(boxes[best])
        for i, text in enumerate(placed):
            if i != best:
                text.remove()


def _annotate(axes: Axes, point: Point, spot: tuple[tuple[int, int], str, str]) -> Annotation:
    offset, horizontal, vertical = spot
    return axes.annotate(
        point.label,
        (point.cost, point.share),
        offset,
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=7.5,
        fontweight="bold" if point.chosen else "normal",
        color=_INK,
    )


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Sequence[float], frame: Sequence[float]) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _overlap(box, frame)


def _chart(below: float = 0.0) -> tuple[Figure, Axes]:
    """A figure with axes, and so many free inches below them."""
    height = 4.3 + below
    figure = Figure(figsize=(6.8, height), dpi=_DPI, facecolor="white")
    axes = figure.add_axes((0.8 / 6.8, (0.62 + below) / height, 5.7 / 6.8, 2.8 / height))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="best", fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none", labelcolor=_INK
    )


def _write(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    write_atomically(path, buffer.getvalue())
    return path

"""Draw the pictures of the documentation: `python -m benchmarks.pictures`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from widefield import bundled
from widefield.evaluation.plots import Curve, Point, frontier, heatmaps, speed
from widefield.evaluation.results import Results

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "docs" / "assets"
RESULTS = ROOT / "benchmarks" / "results"
TRAINED_AT = 1024
FOUND_ANYHOW = 0.2  # keys directly before the question; a crowd of settings finds no others
FOUND_AT, COST_AT = "262144", "65536"
SPEED = RESULTS / "run-gpu.json"
EXP2_A_CYCLE = 16  # of a multiprocessor
MODELS = {
    "mamba-130m": "Mamba-130m",
    "mamba2-130m": "Mamba2-130m",
    "mamba2-2.7b": "Mamba2-2.7b",
}
WITH_METHODS = {
    "mamba-130m": {
        "longmamba-130m": "widefield, LongMamba",
        "decimamba-130m": "widefield, DeciMamba",
    }
}
CHOSEN = bundled.recommended_options("base")["longmamba"]


def passkey() -> None:
    """Unmodified and LongMamba on the base checkpoint, DeciMamba on the fine-tuned one."""
    base = Results.load(bundled.folder("base") / "results-passkey.json")
    decimated = Results.load(bundled.folder("decimated") / "results-passkey.json")
    cells = base.cells + [c for c in decimated.cells if c.method == "decimamba"]
    title = "Passkeys found by a model trained on 1,024 bytes"
    heatmaps(Results(base.header, cells), ASSETS / "passkey.png", TRAINED_AT, title)


def settings() -> None:
    """LongMamba's C and Th: keys found at 256k against bits per byte at 64k."""
    data = json.loads((RESULTS / "frontier.json").read_text(encoding="utf-8"))
    plain = next(row for row in data["rows"] if row["options"] is None)
    base = plain["bits_per_byte"][COST_AT]
    points = [_point(row, base) for row in data["rows"]]
    prompts = plain["passkey"][FOUND_AT]["trials"]
    frontier(
        points,
        ASSETS / "frontier.png",
        limit=0.03,
        title="Keys found at 256k against the cost at 64k",
        subtitle=f"bundled base checkpoint; each point is labelled with its C; {prompts} prompts",
    )


def _point(row: dict[str, Any], base: float) -> Point:
    found, options = row["passkey"][FOUND_AT], row["options"]
    share = found["correct"] / found["trials"]
    cost = row["bits_per_byte"][COST_AT] / base - 1
    if options is None:
        return Point("unmodified", share, cost, "unmodified")
    chosen = all(CHOSEN.get(name) == value for name, value in options.items())
    group = f"Th = {options['decay_threshold']:.0e}"
    label = f"{options['clamp_share']:.1%}" if share > FOUND_ANYHOW else ""
    return Point(label, share, cost, group, chosen)


def speeds(file: Path, folder: Path) -> list[Path]:
    """The scan beside its bounds, and whole models, from a file of `benchmarks.run`."""
    data = json.loads(file.read_text(encoding="utf-8"))
    where = data["device"]
    scans = [row for row in data["rows"] if row["case"] == "scan"]
    drawn = []
    if any("p50" in row for row in scans):
        curves = [*curves_of(scans, 1e-3), *floors(scans[0], data, _lengths(scans))]
        title = "Selective scan, forward: seconds by length"
        shape = f"batch 1, {scans[0]['channels']} channels × {scans[0]['states']} states"
        subtitle = f"{where}   ·   {shape}, {scans[0]['dtype']}"
        drawn.append(speed(curves, folder / "speed-scan.png", title, subtitle))
    for model, name in MODELS.items():
        rows = [row for row in data["rows"] if row["case"] == f"{model} prefill"]
        if any("p50" in row for row in rows):
            curves = curves_of(rows, 1.0) + [
                replace(curve, name=title)
                for other, title in WITH_METHODS.get(model, {}).items()
                for curve in curves_of(
                    [
                        row
                        for row in data["rows"]
                        if (row["case"], row["side"]) == (f"{other} prefill", "widefield")
                    ],
                    1.0,
                )
            ]
            title = f"{name}, prefill: seconds by length"
            subtitle = f"{where}   ·   batch 1, {rows[0]['dtype']}, logits of the last token"
            drawn.append(speed(curves, folder / f"speed-{model}.png", title, subtitle))
    return drawn


def curves_of(rows: list[dict[str, Any]], unit: float) -> list[Curve]:
    """One curve a side that was timed."""
    sides = dict.fromkeys(row["side"] for row in rows if "p50" in row)
    return [
        Curve(
            side, {r["tokens"]: r["p50"] * unit for r in rows if r["side"] == side and "p50" in r}
        )
        for side in sides
    ]


def floors(row: dict[str, Any], head: dict[str, Any], lengths: list[int]) -> list[Curve]:
    """What no scan can beat on a GPU: one exp2 a channel, state and token, and reading it all.

    Empty where the file does not say what the GPU can do.
    """
    if not (head.get("megahertz") and head.get("gigabytes_per_second")):
        return []
    channels, states = row["channels"], row["states"]
    exponentials = head["multiprocessors"] * EXP2_A_CYCLE * head["megahertz"] * 1e6
    width = 4 if row["dtype"] == "float32" else 2
    # x, Δ and z are read, y is written; B and C are read.
    size = row["batch"] * (4 * channels + 2 * states) * width
    work = row["batch"] * channels * states
    return [
        Curve("bound: special-function units", {n: n * work / exponentials for n in lengths}, True),
        Curve(
            "bound: memory",
            {n: n * size / (head["gigabytes_per_second"] * 1e9) for n in lengths},
            True,
        ),
    ]


def _lengths(rows: list[dict[str, Any]]) -> list[int]:
    return sorted({row["tokens"] for row in rows if "p50" in row})


if __name__ == "__main__":
    passkey()
    settings()
    if SPEED.exists():
        speeds(SPEED, ASSETS)

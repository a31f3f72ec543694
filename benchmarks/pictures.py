"""Draw the pictures of the documentation: `python -m benchmarks.pictures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from widefield import bundled
from widefield.evaluation.plots import Point, frontier, heatmaps
from widefield.evaluation.results import Results

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "docs" / "assets"
TRAINED_AT = 1024


def passkey() -> None:
    """Unmodified and LongMamba on the base checkpoint, DeciMamba on the fine-tuned one."""
    base = Results.load(bundled.folder("base") / "results-passkey.json")
    decimated = Results.load(bundled.folder("decimated") / "results-passkey.json")
    cells = base.cells + [c for c in decimated.cells if c.method == "decimamba"]
    title = "Passkeys found by a model trained on 1,024 bytes"
    heatmaps(Results(base.header, cells), ASSETS / "passkey.png", TRAINED_AT, title)


def settings() -> None:
    """Every setting of LongMamba by what it finds at 256k and what it costs at 64k."""
    data = json.loads((ROOT / "benchmarks" / "results" / "frontier.json").read_text())
    rows = [r for r in data["rows"] if r["bits_64k_wrapped"] and r["passkey_256k"] is not None]
    plain = next(r["bits_64k_wrapped"] for r in rows if r["clamp_share"] is None)
    points = [
        Point(
            label=_label(row),
            share=row["passkey_256k"],
            cost=row["bits_64k_wrapped"] / plain - 1,
            group="unmodified" if row["clamp_share"] is None else f"C = {row['clamp_share']:.2%}",
            chosen=row["clamp_share"] == 0.002,
        )
        for row in rows
    ]
    subtitle = "passkey at 256k bytes against bits per byte at 64k, relative to unmodified"
    frontier(points, ASSETS / "frontier.png", limit=0.03, subtitle=subtitle)


def _label(row: dict[str, Any]) -> str:
    return "" if row["clamp_share"] is None else f"Th {row['decay_threshold']:.0e}"


if __name__ == "__main__":
    passkey()
    settings()

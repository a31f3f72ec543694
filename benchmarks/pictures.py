"""Draw the pictures of the documentation from committed result files.

    python -m benchmarks.pictures
"""

from __future__ import annotations

import json
from pathlib import Path

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
    plain = next(r["bits_64k"] for r in data["rows"] if r["clamp_share"] is None)
    points = [
        Point(
            cost=row["bits_64k"] / plain - 1,
            share=row["passkey_256k"],
            label="unmodified" if row["clamp_share"] is None else f"Th {row['decay_threshold']:.0e}",
            group="" if row["clamp_share"] is None else f"C = {row['clamp_share']:.1%}",
        )
        for row in data["rows"]
        if row.get("passkey_256k") is not None
    ]
    frontier(
        points,
        ASSETS / "frontier.png",
        limit=0.03,
        subtitle="passkey at 256k bytes against bits per byte at 64k, relative to unmodified",
    )


if __name__ == "__main__":
    passkey()
    settings()

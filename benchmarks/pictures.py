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
RESULTS = ROOT / "benchmarks" / "results"
TRAINED_AT = 1024
FOUND_ANYHOW = 0.2  # keys directly before the question; a crowd of settings finds no others
FOUND_AT, COST_AT = "262144", "65536"
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


if __name__ == "__main__":
    passkey()
    settings()

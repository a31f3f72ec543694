"""Draw the pictures of the documentation: `python -m benchmarks.pictures`."""

from __future__ import annotations

from pathlib import Path

from widefield import bundled
from widefield.evaluation.plots import heatmaps
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


if __name__ == "__main__":
    passkey()

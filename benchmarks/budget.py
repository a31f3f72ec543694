"""How well the stored quantile functions keep LongMamba's budget (Eq. 18) on a real checkpoint.

    python -m benchmarks.budget --texts BOOKS --out benchmarks/results/budget.json

Calibrates the bundled checkpoint on some sequences and asks its own tokens again, exactly: for
every layer, channel and ratio S / L0, the mass of min(Δ, q) that tokens with Δ ≥ g(S) carry against
the most that the budget allows. A budget that ends inside a token, or among tokens of one and the
same Δ, cannot be met by any threshold: what one such step weighs is not counted as an error.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import widefield as wf
from widefield import ops
from widefield.evaluation.header import Subject, make_header
from widefield.evaluation.results import write_atomically
from widefield.extension import observed
from widefield.plan import ScanInputs, SSDInputs
from widefield.tasks.texts import load_texts
from widefield.tasks.tokens import encode

RATIOS = (1.5, 2, 4, 16, 64, 256, 1000)
CLAMPS = (0.05, 0.01, 0.002)


def errors(
    delta: np.ndarray, threshold: np.ndarray, cap: np.ndarray, ratio: float
) -> tuple[np.ndarray, np.ndarray]:
    """Relative errors of the kept mass by channel, beyond one step of equal Δ; and what one weighs.

    Args:
        delta: (tokens, channels), float64.
        threshold: g(S) of each channel.
        cap: q, the clamp of each channel.
        ratio: S / L0.
    """
    clamped = np.minimum(delta, cap)
    forced = np.where(delta >= cap, clamped, 0).sum(0)
    budget = np.maximum(clamped.sum(0) / ratio, forced)
    kept = np.where(delta >= threshold, clamped, 0).sum(0)
    above = np.where(delta >= threshold, delta, np.inf).min(0)
    below = np.where(delta < threshold, delta, 0).max(0)
    edge = np.where(kept > budget, above, below)
    step = np.minimum(edge, cap) * (delta == edge).sum(0)
    return np.maximum(0, np.abs(kept - budget) - step) / budget, step / budget


def collect(model: Any, ids: torch.Tensor) -> dict[int, np.ndarray]:
    """Δ of every layer, (tokens, channels)."""
    seen: dict[int, list[np.ndarray]] = {}

    def note(layer: int, inputs: ScanInputs | SSDInputs) -> None:
        seen.setdefault(layer, []).append(ops.effective_delta(inputs).flatten(0, 1).numpy())

    with observed(model, note), torch.inference_mode():
        for row in ids:
            model(row[None], logits_to_keep=1, use_cache=False)
    return {layer: np.concatenate(parts).astype(np.float64) for layer, parts in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Error of LongMamba's budget on real text.")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/budget.json"))
    args = parser.parse_args()

    model, tokenizer, known = wf.load_bundled("base")
    assert known is not None
    length = known.train_length
    rng = np.random.default_rng(args.seed)
    texts = [encode(tokenizer, text) for text in load_texts(args.texts)]
    rows = []
    for _ in range(args.sequences):
        ids = texts[int(rng.integers(len(texts)))]
        start = int(rng.integers(len(ids) - length))
        rows.append(ids[start : start + length])
    ids = torch.from_numpy(np.stack(rows))
    calibration = wf.calibrate(model, ids, train_length=length)
    found = []
    for layer, delta in collect(model, ids).items():
        stored = calibration.layer(layer)
        for clamp in CLAMPS:
            cap = stored.quantile(clamp).double().numpy()
            for ratio in RATIOS:
                threshold = stored.threshold(ratio, clamp).double().numpy()
                error, step = errors(delta, threshold, cap, ratio)
                found.append(
                    {
                        "layer": layer,
                        "clamp_share": clamp,
                        "ratio": ratio,
                        "channels": len(error),
                        "largest_error": round(float(error.max()), 5),
                        "share_within_2_percent": round(float((error <= 0.02).mean()), 5),
                        "median_step": round(float(np.median(step)), 5),
                    }
                )
        mine = [row for row in found if row["layer"] == layer]
        print(
            f"layer {layer}: largest error {max(r['largest_error'] for r in mine):.2%}, within 2 % "
            f"{np.mean([r['share_within_2_percent'] for r in mine]):.3%}",
            flush=True,
        )
    subject = Subject("budget", model, tokenizer, (), calibration)
    settings = {"sequences": args.sequences, "train_length": length}
    header = make_header([subject], {"budget": settings}, seed=args.seed)
    content = json.dumps({"header": header, "rows": found}, indent=1) + "\n"
    write_atomically(args.out, content.encode())


if __name__ == "__main__":
    main()

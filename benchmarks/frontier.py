"""Retrieval against quality: LongMamba's clamp share and Th on the bundled checkpoint.

    python -m benchmarks.frontier --haystack BOOKS --texts BOOKS --device cuda

For every setting: how many passkeys are found at each of some lengths, and the bits per byte of the
last bytes of windows of some lengths. Goes on where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import widefield as wf
from widefield.evaluation.grid import BitsGrid, PasskeyGrid, parse_lengths
from widefield.evaluation.header import Subject, make_header
from widefield.evaluation.runner import run_bits, run_passkey
from widefield.tasks.texts import Haystack, load_haystack, load_texts

CLAMP_SHARES = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
THRESHOLDS = (1e-17, 1e-22, 1e-30, 1e-45)


def wrapped(text: str, width: int) -> str:
    """The text with every paragraph filled to `width` columns; 0 leaves it as it is."""
    if not width:
        return text
    paragraphs = (" ".join(p.split()) for p in text.split("\n\n"))
    return "\n\n".join(textwrap.fill(p, width) for p in paragraphs if p)


def measure(
    subject: Subject, haystack: Haystack, texts: list[str], passkey: PasskeyGrid, bits: BitsGrid
) -> dict[str, Any]:
    """Keys found, and bits per byte, at each length, of one setting."""
    began = time.perf_counter()
    found = run_passkey([subject], haystack, passkey).cells
    cost = run_bits([subject], texts, bits).cells
    return {
        "passkey": {
            str(length): {
                "correct": sum(c.correct or 0 for c in found if c.length == length),
                "trials": sum(c.trials for c in found if c.length == length),
            }
            for length in passkey.lengths
        },
        "bits_per_byte": {str(c.length): c.bits for c in cost},
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Retrieval against quality of LongMamba.")
    parser.add_argument("--haystack", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--lengths", default="64k,256k", help="of the passkey prompts")
    parser.add_argument("--bits-lengths", default="1k,64k")
    parser.add_argument("--trials", type=int, default=4, help="prompts a depth")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--wrap", type=int, default=0, help="columns; 0 leaves the texts alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/frontier.json"))
    args = parser.parse_args()

    model, tokenizer, calibration = wf.load_bundled("base", device=args.device)
    assert calibration is not None
    haystack = load_haystack(args.haystack)
    texts = [wrapped(text, args.wrap) for text in load_texts(args.texts)]
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    passkey = PasskeyGrid(parse_lengths(args.lengths), depths, args.trials, args.seed)
    bits = BitsGrid(parse_lengths(args.bits_lengths), args.windows, 1024, args.seed)
    settings: list[dict[str, Any] | None] = [None]
    settings += [{"clamp_share": c, "decay_threshold": t} for t in THRESHOLDS for c in CLAMP_SHARES]
    subject = Subject("unmodified", model, tokenizer, (), calibration)
    grids = {"passkey": asdict(passkey), "bits": asdict(bits) | {"wrap": args.wrap}}
    header = make_header([subject], grids, seed=args.seed)
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    for options in settings:
        if any(row["options"] == options for row in rows):
            continue
        methods = () if options is None else (wf.LongMamba(calibration, **options),)
        subject = Subject("setting", model, tokenizer, methods, calibration)
        rows.append({"options": options} | measure(subject, haystack, texts, passkey, bits))
        print(json.dumps(rows[-1]), flush=True)
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
        part.replace(args.out)


if __name__ == "__main__":
    main()

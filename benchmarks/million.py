"""A million tokens on the CPU: seconds and peak memory of a prefill in chunks, by length.

    python -m benchmarks.million --out benchmarks/results/million.json

The bundled checkpoints, unmodified and with each method; each length in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import widefield as wf
from benchmarks.cpu_prefill import header, peak_kibibytes
from widefield.bundled import recommended_methods

CHECKPOINTS = {"unmodified": "base", "longmamba": "base", "decimamba": "decimated"}
WARM_UP = 4096


def measure(method: str, tokens: int, chunk: int, seed: int) -> dict[str, Any]:
    """Seconds, and megabytes at the peak beyond the loaded model."""
    name = CHECKPOINTS[method]
    model, _, _ = wf.load_bundled(name)
    wf.extend(model, *(() if method == "unmodified" else (recommended_methods(name)[method],)))
    ids = torch.randint(3, 259, (1, tokens), generator=torch.Generator().manual_seed(seed))
    wf.prefill(model, ids[:, :WARM_UP])
    before, start = peak_kibibytes(), time.perf_counter()
    wf.prefill(model, ids, chunk_size=chunk)
    seconds = time.perf_counter() - start
    megabytes = (peak_kibibytes() - before) * 1024 / 1e6
    return {
        "method": method,
        "tokens": tokens,
        "chunk": chunk,
        "seconds": round(seconds, 2),
        "microseconds_per_token": round(seconds / tokens * 1e6, 1),
        "peak_megabytes": round(megabytes, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/million.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[131_072, 1_048_576])
    parser.add_argument("--chunk", type=int, default=16_384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.chunk, args.seed)))
        return
    found = {**header("mamba", args.seed), "model": "bundled checkpoints", "rows": []}
    found["command"] = "python -m benchmarks.million " + " ".join(sys.argv[1:])
    program = [sys.executable, "-m", "benchmarks.million"]
    options = ["--chunk", str(args.chunk), "--seed", str(args.seed)]
    for method in CHECKPOINTS:
        for tokens in args.lengths:
            command = [*program, *options, "--one", method, str(tokens)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found["rows"].append(json.loads(done.stdout.splitlines()[-1]))
            print(found["rows"][-1], flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Where the time and the memory of a prefill on a GPU go, kernel by kernel and call by call.

python -m benchmarks.prefill_profile --model mamba-130m --lengths 8192 65536
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import widefield as wf
from benchmarks import _models
from widefield.ops import use_backend

GIB = float(1 << 30)


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds a call, after a call that does not count."""
    call()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e3)
    return sorted(found)


def submitted(call: Callable[[], Any]) -> float:
    """Milliseconds until Python has submitted all work."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    found = (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    return found


def report(name: str, model: Any, length: int, repeats: int, rows: int) -> None:
    """Time, memory, kernels and Python functions of one prefill."""
    ids = torch.randint(10, _models.VOCABULARY, (1, length), device="cuda")

    def call() -> Any:
        with torch.no_grad():
            return _models.hf_prefill(model, ids)

    times = timed(call, repeats)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated()
    print(
        f"\n=== {name} {length:,} tokens: median {statistics.median(times):.2f} ms "
        f"(least {times[0]:.2f}), submitted in {submitted(call):.2f} ms, "
        f"peak {peak / GIB:.2f} GiB (weights {before / GIB:.2f})",
        flush=True,
    )
    if rows:
        print_kernels(call, rows)
        print_python(call, rows)


def print_kernels(call: Callable[[], Any], rows: int) -> None:
    """GPU time by kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    table = [e for e in profile.key_averages() if e.device_time_total > 0]
    table.sort(key=lambda event: -event.device_time_total)
    print(f"GPU {sum(e.device_time_total for e in table) / 1e3:.2f} ms in "
          f"{sum(e.count for e in table)} kernels")  # fmt: skip
    for event in table[:rows]:
        each = event.device_time_total / event.count
        print(f"{event.device_time_total / 1e3:9.3f} ms {event.count:5d} × {each:9.1f} µs  "
              f"{event.key[:120]}", flush=True)  # fmt: skip


def print_python(call: Callable[[], Any], rows: int) -> None:
    """CPU time by Python function."""
    profile = cProfile.Profile()
    torch.cuda.synchronize()
    profile.enable()
    call()
    profile.disable()
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(rows)
    print("\n".join(line[:150] for line in text.getvalue().splitlines()[3:] if line), flush=True)


def main() -> None:
    """Print it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=_models.SHAPES, default="mamba-130m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--method", choices=["none", "decimamba"], default="none")
    parser.add_argument("--backend", default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=25, help="of each table; 0 for times alone")
    given = parser.parse_args()
    model = _models.build(given.model, torch.bfloat16, torch.device("cuda"), 0)
    methods = [wf.DeciMamba(layers=(12,), base_length=2000)] if given.method == "decimamba" else []
    wf.extend(model, *methods)
    backend = use_backend(given.backend) if given.backend else contextlib.nullcontext()
    with backend:
        for length in given.lengths:
            report(f"{given.model} {given.method}", model, length, given.repeats, given.rows)


if __name__ == "__main__":
    main()

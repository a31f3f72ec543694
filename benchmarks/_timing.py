"""Time several callables in turn, in one process, within a budget of seconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks._common import peak_bytes, quantiles

MOST_RUNS = 20
LEAST_RUNS = 3
SLOW = 2.0  # seconds: what takes longer, and longer than the budget, has one run behind its warm-up
MOST_TEXT = 400


@dataclass
class Contestant:
    """One side of a comparison.

    Attributes:
        name: as the rows call it.
        call: runs it once on the inputs of one number; sets of inputs are used in turn.
        during: what must hold while it runs; entered before the clock starts.
        alone: on a GPU, wait before each run, so that the host's own time counts, too.
        seconds: of each timed run.
        peak_megabytes: torch's memory at the peak of one run, inputs and weights included.
        failed: why there are no times.
    """

    name: str
    call: Callable[[int], Any]
    during: Callable[[], AbstractContextManager[Any]] = nullcontext
    alone: bool = False
    seconds: list[float] = field(default_factory=list)
    peak_megabytes: float | None = None
    failed: str | None = None


class BrokenDevice(RuntimeError):
    """The GPU does not answer any more: nothing that follows in this process can be trusted."""


def compare(sides: Sequence[Contestant], device: torch.device, budget: float) -> None:
    """Time the sides in turn; one that fails leaves the others alone.

    A side of which one run takes longer than `SLOW` and the budget has that run for its time.

    Args:
        sides: filled in.
        device: where they run. On a GPU a run is timed between two events, so that the host's time
            for short kernels is hidden behind the run before.
        budget: seconds for all sides together, after the first two runs of each.

    Raises:
        BrokenDevice: after an error that the process cannot recover from.
    """
    once = 0.0
    for side in sides:
        seconds = _try(side, device)
        if seconds is not None and seconds > max(SLOW, budget):
            side.seconds.append(seconds)
        else:
            once += seconds or 0.0
    alive = [side for side in sides if side.failed is None and not side.seconds]
    runs = max(LEAST_RUNS, min(MOST_RUNS, int(budget / max(once, 1e-6))))
    clock = _events if device.type == "cuda" else _wall
    pending: list[tuple[Contestant, Callable[[], float]]] = []
    for index in range(runs):
        pending += [(side, clock(side, index)) for side in alive]
        if device.type == "cuda" and once > 0.05:
            torch.cuda.synchronize(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    for side, seconds in pending:
        side.seconds.append(seconds())


def _try(side: Contestant, device: torch.device) -> float | None:
    """Warm up, then seconds and peak memory of one run; None if the side fails."""
    if side.failed is not None:
        return None
    try:
        with side.during():
            side.call(0)
            wait(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            side.call(0)
            wait(device)
            seconds = time.perf_counter() - start
    except Exception as error:
        try:
            side.failed = reason(error)
        except BrokenDevice as broken:
            raise BrokenDevice(f"in {side.name}: {broken}") from error
        release(device)
        return None
    if device.type == "cuda":
        side.peak_megabytes = round(peak_bytes(device) / 1e6, 1)
    return seconds


def _events(side: Contestant, index: int) -> Callable[[], float]:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with side.during():
        if side.alone:
            torch.cuda.synchronize()
        before.record()
        side.call(index)
        after.record()
    return lambda: before.elapsed_time(after) / 1e3


def _wall(side: Contestant, index: int) -> Callable[[], float]:
    with side.during():
        start = time.perf_counter()
        side.call(index)
        seconds = time.perf_counter() - start
    return lambda: seconds


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory back, so that one side's end is not the next one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """What went wrong, on one line.

    Raises:
        BrokenDevice: if the process cannot go on.
    """
    text = " ".join(str(error).split())
    if len(text) > MOST_TEXT:  # of a compiler, what it was asked and what it said last
        text = f"{text[: MOST_TEXT // 2]} … {text[-MOST_TEXT // 2 :]}"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in text:
        raise BrokenDevice(text) from error
    return f"{type(error).__name__}: {text}"


def times(side: Contestant, unit: float) -> dict[str, Any]:
    """p20, p50 and p80 in units of so many seconds, and how many runs there were."""
    low, middle, high = (round(s / unit, 5) for s in quantiles(side.seconds))
    return {"p20": low, "p50": middle, "p80": high, "runs": len(side.seconds)}

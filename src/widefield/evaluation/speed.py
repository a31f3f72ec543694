"""How fast a model reads and writes: seconds and memory of a prefill by length, tokens a second.

On a GPU prompts are also read, and tokens decoded, through a CUDA graph, by the sides that can.

Sides are measured in turn, in one process, on the same random tokens: what slows the machine down
for a while slows all of them down.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from widefield import decoding
from widefield.errors import WidefieldError
from widefield.evaluation.batches import Stopwatch, free_memory, is_out_of_memory
from widefield.evaluation.grid import check_counts, length_label
from widefield.extension import extended
from widefield.methods.base import Method
from widefield.prefilling import prefill
from widefield.recording import GraphRefused

__all__ = [
    "DECODE",
    "GRAPH",
    "PREFILL",
    "REPLAY",
    "STOCK",
    "Side",
    "SpeedGrid",
    "Timing",
    "measure_speed",
]

STOCK = "stock"
PREFILL, REPLAY, DECODE, GRAPH = "prefill", "prefill_graph", "decode", "decode_graph"
_PROMPT = 16  # tokens before those that are generated
_GPU = "cuda"
_FIXED = 128e6  # bytes that a prompt of any length takes: compiled code, buffers


@dataclass(frozen=True, slots=True)
class Side:
    """One way to run the model.

    Attributes:
        name: what the results call it.
        methods: put on for the run; none = the unmodified model on widefield's kernels; None = the
            model as transformers has it.
    """

    name: str
    methods: tuple[Method, ...] | None


@dataclass(frozen=True, slots=True)
class SpeedGrid:
    """What is measured.

    Attributes:
        lengths: prompts, in tokens.
        repeats: runs of each, after one that is not counted.
        new_tokens: how many are generated, one by one; 0 for none.
        limit: seconds: a side whose next prompt would take longer is left out from there on.
        seed: of the tokens.

    Raises:
        WidefieldError: for a number out of range.
    """

    lengths: tuple[int, ...]
    repeats: int = 3
    new_tokens: int = 64
    limit: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a grid without runs."""
        check_counts(self.lengths, repeats=self.repeats)
        if self.new_tokens < 0:
            raise WidefieldError(f"new_tokens is {self.new_tokens}; give 0 for none, or more")
        if not self.limit > 0:
            raise WidefieldError(f"limit is {self.limit}; give seconds above 0")


@dataclass(frozen=True, slots=True)
class Timing:
    """What one side took for one thing.

    Attributes:
        side: its name.
        task: "prefill", "decode", or the same through a CUDA graph, "prefill_graph" and
            "decode_graph".
        tokens: of the prompt, or those that were generated.
        seconds: of each run; empty where there was none.
        peak_bytes: most memory beyond the loaded model in a prefill; None where the system does not
            say.
        failed: why there was no run, or None.
    """

    side: str
    task: str
    tokens: int
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    failed: str | None = None

    @property
    def median(self) -> float:
        """The run in the middle; NaN where there was none."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    def to_json(self) -> dict[str, Any]:
        """A record for a results file."""
        record: dict[str, Any] = {"side": self.side, "task": self.task, "tokens": self.tokens}
        if self.failed is not None:
            return record | {"failed": self.failed}
        record |= {"median_seconds": self.median, "seconds": list(self.seconds)}
        return record | {"peak_bytes": self.peak_bytes}


OnTiming = Callable[[Timing], None]


@torch.inference_mode()
def measure_speed(
    model: Any, sides: Sequence[Side], grid: SpeedGrid, on_timing: OnTiming | None = None
) -> list[Timing]:
    """Measure every side at every length, shortest first, then tokens one by one.

    On a GPU, all sides but the stock model read and decode through a CUDA graph, too. A side that
    runs out of memory, or would take longer than the limit, is left out at greater lengths; the
    others go on.

    Args:
        model: of transformers, with a language-model head, not extended; left as it was.
        sides: in the order in which they take their turns.
        grid: what is measured.
        on_timing: called with every result as soon as it is known.
    """
    tell = on_timing or (lambda timing: None)
    bench = _Bench(model, grid)
    found: list[Timing] = []
    for length in sorted(grid.lengths):
        for task in bench.reading_tasks():
            for timing in bench.prefills(sides, length, task):
                found.append(timing)
                tell(timing)
    for task in bench.decoding_tasks():
        for timing in bench.decodes(sides, task):
            found.append(timing)
            tell(timing)
    return found


class _Bench:
    """One model, and what is known so far of how its sides grow with length."""

    def __init__(self, model: Any, grid: SpeedGrid) -> None:
        self.model, self.grid = model, grid
        self.device = torch.device(model.device)
        self.memory = _Memory(self.device)
        self._last: dict[tuple[str, str], Timing] = {}

    def reading_tasks(self) -> tuple[str, ...]:
        """The ways in which a prompt is read."""
        return (PREFILL, REPLAY) if self.device.type == _GPU else (PREFILL,)

    def prefills(self, sides: Sequence[Side], length: int, task: str) -> Iterator[Timing]:
        """One timing a side; each round runs every side once."""
        if task == REPLAY:
            sides = [side for side in sides if side.methods is not None]
        ids: Tensor | None = None
        failed = {side.name: self._hopeless(side, length, task) for side in sides}
        runs: dict[str, list[float]] = {side.name: [] for side in sides}
        peaks: dict[str, int | None] = {}
        for turn in range(1 + self.grid.repeats):
            for side in sides:
                if failed[side.name] is None:
                    with _failures(failed, side, self.device):
                        ids = self._ids(length) if ids is None else ids
                        seconds, peak = self._prefill(side, ids, task, watch=turn == 1)
                        if turn == 1:  # compilers have had their memory
                            peaks[side.name] = peak
                        runs[side.name] += [seconds] if turn else []
        for side in sides:
            timing = Timing(
                side.name, task, length, tuple(runs[side.name]), peaks.get(side.name),
                failed[side.name],
            )  # fmt: skip
            self._last[side.name, task] = timing
            yield timing

    def decoding_tasks(self) -> tuple[str, ...]:
        """The ways in which new tokens come."""
        if not self.grid.new_tokens:
            return ()
        return (DECODE, GRAPH) if self.device.type == _GPU else (DECODE,)

    def decodes(self, sides: Sequence[Side], task: str) -> Iterator[Timing]:
        """Seconds of the new tokens of one row behind a short prompt, one timing a side."""
        if task == GRAPH:
            sides = [side for side in sides if side.methods is not None]
        failed = {side.name: self._ungraphed(side) if task == GRAPH else None for side in sides}
        runs: dict[str, list[float]] = {side.name: [] for side in sides}
        for turn in range(1 + self.grid.repeats):
            for side in sides:
                if failed[side.name] is None:
                    with _failures(failed, side, self.device):
                        # What is compiled at the first step is the same for any number of them.
                        seconds = self._decode(side, self.grid.new_tokens if turn else 2, task)
                        runs[side.name] += [seconds] if turn else []
        for side in sides:
            taken = tuple(runs[side.name])
            yield Timing(side.name, task, self.grid.new_tokens, taken, failed=failed[side.name])

    def _ungraphed(self, side: Side) -> str | None:
        """Why a side cannot decode through a graph, or None."""
        with self._on(side):
            needed = decoding.what_graph_needs(self.model, attention=True)
        return None if needed is None else f"a CUDA graph needs {needed}"

    def _ids(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.grid.seed)
        vocabulary = self.model.config.get_text_config().vocab_size
        return torch.randint(vocabulary, (1, length), generator=generator).to(self.device)

    def _prefill(self, side: Side, ids: Tensor, task: str, watch: bool) -> tuple[float, int | None]:
        """Seconds, and the peak of memory if it is to be watched."""
        with self._on(side):
            if task == REPLAY:
                self._read(ids, task)  # records it, for as long as the side is on
            stopwatch = Stopwatch(self.device)
            with self.memory.watched(watch) as peak, stopwatch:
                self._read(ids, task)
            return stopwatch.seconds, peak()

    def _read(self, ids: Tensor, task: str) -> None:
        if task == REPLAY:
            prefill(self.model, ids, chunk_size=ids.shape[1], cuda_graph=True)
        else:
            self.model(ids, logits_to_keep=1, use_cache=True)

    def _decode(self, side: Side, tokens: int, task: str) -> float:
        """Seconds from one token to the last of so many more."""
        with self._on(side):
            if task == GRAPH:
                self._generate(2, task, None)  # records it, for as long as the side is on
            clock = _SinceFirst()
            self._generate(1 + tokens, task, clock)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return clock.seconds()

    def _generate(self, tokens: int, task: str, streamer: BaseStreamer | None) -> None:
        ids = self._ids(_PROMPT)
        graph = {"cuda_graph": True} if task == GRAPH else {}
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, eos_token_id=None,
            do_sample=False, pad_token_id=0, streamer=streamer, **graph,
        )  # fmt: skip

    @contextmanager
    def _on(self, side: Side) -> Iterator[None]:
        if side.methods is None:
            yield
            return
        with extended(self.model, *side.methods):
            yield

    def _hopeless(self, side: Side, length: int, task: str) -> str | None:
        """Why a side is not tried at this length, judged by its last one."""
        last = self._last.get((side.name, task))
        if last is None:
            return None
        if last.failed is not None:
            return last.failed
        factor = length / last.tokens
        if last.median * factor > self.grid.limit:
            return f"over {self.grid.limit:.0f} s"
        growing = max(0.0, (last.peak_bytes or 0) - _FIXED)
        if growing * factor > free_memory(self.device):
            return f"out of memory from {length_label(length)} on"
        return None


@contextmanager
def _failures(failed: dict[str, str | None], side: Side, device: torch.device) -> Iterator[None]:
    """Note that a side ran out of memory, or why the stock model does not run; raise our own bugs.

    Stock transformers binds the kernels of an installed mamba-ssm on a CPU, too, where they fail.
    """
    try:
        yield
    except GraphRefused as error:
        failed[side.name] = str(error)
        return
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            failed[side.name] = "out of memory"
        elif side.methods is None:
            failed[side.name] = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        else:
            raise
    if failed[side.name] is not None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _SinceFirst(BaseStreamer):
    """Knows how long ago the first new token came: what is before it is a prefill."""

    def __init__(self) -> None:
        self._calls, self._start = 0, 0.0

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then a token a call."""
        self._calls += 1
        if self._calls == 2:
            self._start = time.perf_counter()

    def end(self) -> None:
        """Nothing to write."""

    def seconds(self) -> float:
        """Since the first new token."""
        return time.perf_counter() - self._start


class _Memory:
    """The most memory in use during a run, beyond what the loaded model takes.

    On a GPU, torch's own count. On a CPU, the resident set of the process, whose peak Linux lets a
    process reset; elsewhere nobody knows.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._now()

    def _now(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS")

    def _reset(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return False
        return self.device.type == "cpu"

    @contextmanager
    def watched(self, wanted: bool) -> Iterator[Callable[[], int | None]]:
        """Yields a function that tells the peak since then, in bytes; None where unknown."""
        known = wanted and self._reset()

        def peak() -> int | None:
            if not known or self.before is None:
                return None
            if self.device.type == "cuda":
                return torch.cuda.max_memory_allocated(self.device) - self.before
            most = _status("VmHWM")
            return None if most is None else max(0, most - self.before)

        yield peak


def _status(name: str) -> int | None:
    """A size of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)

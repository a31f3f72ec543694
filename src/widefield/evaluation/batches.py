"""How many prompts run at once: within a token budget, and fewer where memory is short."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from widefield.errors import WidefieldError

__all__ = [
    "Budget",
    "Stopwatch",
    "cell_named",
    "default_batch_tokens",
    "free_memory",
    "is_out_of_memory",
    "run_batches",
]

Job = TypeVar("Job")
Answer = TypeVar("Answer")
_MOST_TOKENS = {"cpu": 32_768, "cuda": 1 << 20}
_SHARE_OF_MEMORY = 0.4


def default_batch_tokens(model: Any) -> int:
    """Tokens that a batch may hold on the model's device: by free memory, within what still helps.

    An estimate from the widths of the model; where it is too high, `run_batches` halves it.
    """
    config = model.config
    hidden = getattr(config, "hidden_size", 1024)
    inner = getattr(config, "intermediate_size", 2 * hidden)
    itemsize = torch.empty(0, dtype=model.dtype).element_size()
    per_token = (4 * hidden + 8 * inner) * (itemsize + 2)
    tokens = int(free_memory(model.device) * _SHARE_OF_MEMORY / per_token)
    return max(1024, min(tokens, _MOST_TOKENS.get(model.device.type, _MOST_TOKENS["cpu"])))


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; a guess where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return 2.0**32


class Budget:
    """The token budget of a run; it shrinks when memory runs out and stays small.

    Args:
        tokens: most tokens in a batch; a single longer prompt still runs alone.
    """

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise WidefieldError(f"batch_tokens is {tokens}; give at least 1")
        self.tokens = tokens

    def rows(self, length: int, jobs: int) -> int:
        """Prompts of the next batch: as many as fit, spread evenly over the batches left."""
        most = max(1, self.tokens // length)
        return -(-jobs // -(-jobs // most))


def run_batches(
    jobs: Sequence[Job],
    length: int,
    budget: Budget,
    run: Callable[[Sequence[Job]], Sequence[Answer]],
    stopwatch: Stopwatch,
) -> Iterator[tuple[Job, Answer, float]]:
    """Run jobs of equal length in batches; yields each job, its answer, its share of the seconds.

    A batch that does not fit into memory is tried again at half the size.

    Raises:
        WidefieldError: if a single job does not fit.
    """
    done = 0
    while done < len(jobs):
        batch = jobs[done : done + budget.rows(length, len(jobs) - done)]
        try:
            with stopwatch:
                answers = run(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = len(batch)
        else:
            failed = 0
            seconds = stopwatch.seconds / len(batch)
            for job, answer in zip(batch, answers, strict=True):
                yield job, answer, seconds
            done += len(batch)
        if failed:
            _shrink(budget, failed, length)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that there was not enough memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _shrink(budget: Budget, rows: int, length: int) -> None:
    if rows == 1:
        raise WidefieldError(
            f"out of memory for a single prompt of {length} tokens; use a shorter length, "
            "a smaller dtype or a larger device"
        )
    budget.tokens = (rows // 2) * length
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Stopwatch:
    """Wall time of a block; on a GPU the block ends when its work is done.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> Stopwatch:
        self._wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self._wait()
        self.seconds = time.perf_counter() - self._start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def cell_named(what: str) -> Iterator[None]:
    """Bad input that shows only while a cell runs says which cell it was."""
    try:
        yield
    except WidefieldError as error:
        raise WidefieldError(f"{what}: {error}") from error

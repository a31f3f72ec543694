"""Run a grid: every subject, every length, every depth; finished cells are stored at once.

All subjects see identical samples, whatever the order, the batch size, or what ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from widefield.errors import WidefieldError
from widefield.evaluation.batches import (
    Budget,
    Stopwatch,
    cell_named,
    default_batch_tokens,
    run_batches,
)
from widefield.evaluation.grid import BitsGrid, PasskeyGrid, length_label
from widefield.evaluation.header import Subject, make_header
from widefield.evaluation.results import Cell, Results
from widefield.extension import extended
from widefield.tasks.passkey import PasskeyTask, Sample, trial_rng
from widefield.tasks.perplexity import (
    Windows,
    byte_count,
    protecting,
    scored_tokens,
    token_bits,
)
from widefield.tasks.texts import Haystack

__all__ = ["Subject", "ask", "measure_bits", "run_bits", "run_passkey"]

OnCell = Callable[[Cell], None]
_LOGITS = 1 << 28
"""Logits that one batch may hold, whatever its tokens (1 GB in float32)."""


def run_passkey(
    subjects: Sequence[Subject],
    haystack: Haystack,
    grid: PasskeyGrid,
    out: Path | None = None,
    on_cell: OnCell | None = None,
    *,
    command: str | None = None,
) -> Results:
    """Ask every subject for hidden keys at every length and depth, by greedy `generate()`.

    Args:
        subjects: models with their methods; each is left as it was.
        haystack: the text around the needle.
        grid: lengths, depths, trials, seed.
        out: folder (or .json file) of the results; an interrupted run of the same configuration
            goes on there. None keeps them in memory.
        on_cell: called with every cell of the grid; those found finished come first in their
            length.
        command: for the header; None takes the running program's command line.

    Raises:
        WidefieldError: for a length that cannot hold the needle (before anything runs), results of
            another configuration in `out`, or a method that fails; finished cells stay stored.
    """
    tasks = {s.name: PasskeyTask(s.tokenizer, haystack) for s in _checked(subjects)}
    for length in grid.lengths:
        for task in tasks.values():
            task.check_length(length)
    settings = {
        "trials": grid.trials,
        "haystack": {"name": haystack.name, "sha256": haystack.sha256},
    }
    header = make_header(subjects, {"passkey": settings}, seed=grid.seed, command=command)
    results = Results.open(out, header)
    for subject in subjects:
        _run_subject(subject, tasks[subject.name], grid, results, on_cell or _ignore)
    return results


def _checked(subjects: Sequence[Subject]) -> Sequence[Subject]:
    if not subjects:
        raise WidefieldError("nothing to evaluate: give at least one method, e.g. unmodified")
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise WidefieldError(f"methods must have different names, got {', '.join(names)}")
    for subject in subjects:
        if subject.tokenizer is None:
            raise WidefieldError(
                f"{subject.name}: the model came without a tokenizer, which the task needs"
            )
    return subjects


def _ignore(cell: Cell) -> None:
    pass


def _run_subject(
    subject: Subject, task: PasskeyTask, grid: PasskeyGrid, results: Results, on_cell: OnCell
) -> None:
    budget = Budget(grid.batch_tokens or default_batch_tokens(subject.model))
    with extended(subject.model, *subject.methods), torch.inference_mode():
        warm = False
        for length in grid.lengths:
            known = {d: results.find("passkey", subject.name, length, d) for d in grid.depths}
            missing = [depth for depth, cell in known.items() if cell is None]
            if missing and not warm:
                _warm_up(subject.model, task)
                warm = True
            for cell in filter(None, known.values()):
                on_cell(cell)
            _run_length(subject, task, grid, length, missing, budget, results, on_cell)


def _warm_up(model: Any, task: PasskeyTask) -> None:
    """Compile what is compiled on first use, so that no cell's seconds hold it."""
    sample = task.sample(task.minimum_length, 0.0, np.random.default_rng(0))
    _generate(model, task, [sample])


def _run_length(
    subject: Subject,
    task: PasskeyTask,
    grid: PasskeyGrid,
    length: int,
    depths: Sequence[float],
    budget: Budget,
    results: Results,
    on_cell: OnCell,
) -> None:
    jobs = [(depth, trial) for depth in depths for trial in range(grid.trials)]
    answered: dict[float, list[tuple[bool, float]]] = {depth: [] for depth in depths}

    def run(batch: Sequence[tuple[float, int]]) -> list[bool]:
        samples = [
            task.sample(length, depth, trial_rng(grid.seed, length, depth, trial))
            for depth, trial in batch
        ]
        return ask(subject.model, task, samples)

    with cell_named(f"{subject.name} at {length_label(length)}"):
        timer = Stopwatch(subject.model.device)
        for (depth, _), right, seconds in run_batches(jobs, length, budget, run, timer):
            answered[depth].append((right, seconds))
            if len(answered[depth]) == grid.trials:
                cell = _passkey_cell(subject.name, length, depth, answered[depth])
                results.add(cell)
                on_cell(cell)


def _passkey_cell(
    method: str, length: int, depth: float, answered: Sequence[tuple[bool, float]]
) -> Cell:
    return Cell(
        task="passkey",
        method=method,
        length=length,
        depth=depth,
        trials=len(answered),
        correct=sum(right for right, _ in answered),
        seconds=round(sum(seconds for _, seconds in answered), 4),
    )


def ask(model: Any, task: PasskeyTask, samples: Sequence[Sample]) -> list[bool]:
    """Put samples of equal length to a model in one batch and judge its answers.

    Raises:
        WidefieldError: if the model's logits are NaN.
    """
    rows = _generate(model, task, samples)
    return [task.judge(sample, row) for sample, row in zip(samples, rows, strict=True)]


def _generate(model: Any, task: PasskeyTask, samples: Sequence[Sample]) -> list[list[int]]:
    """The new tokens of each row."""
    ids = torch.from_numpy(np.stack([sample.ids for sample in samples])).to(model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=task.answer_tokens,
        do_sample=False,
        pad_token_id=_pad_id(task.tokenizer),
        return_dict_in_generate=True,
        output_logits=True,
    )
    if any(bool(torch.isnan(logits).any()) for logits in out.logits):
        raise WidefieldError("the model's logits are not numbers (NaN); try float32")
    return out.sequences[:, ids.shape[1] :].tolist()


def _pad_id(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def run_bits(
    subjects: Sequence[Subject],
    texts: Sequence[str],
    grid: BitsGrid,
    out: Path | None = None,
    on_cell: OnCell | None = None,
    *,
    command: str | None = None,
) -> Results:
    """Measure bits per byte and per token on texts at every context length.

    The scored tokens are the same at every length: only how much text stands before them differs.
    Methods that drop tokens are told to keep the scored ones.

    Args:
        subjects: models with their methods; each is left as it was.
        texts: long texts, e.g. books; those shorter than the longest length are not used.
        grid: lengths, windows, scored tokens, seed.
        out: as in `run_passkey`.
        on_cell: called with every cell, those found finished included.
        command: for the header.

    Raises:
        WidefieldError: if no text is long enough, or as in `run_passkey`.
    """
    longest = max(grid.lengths)
    windows = {
        s.name: Windows.draw(s.tokenizer, texts, longest, grid.windows, grid.seed)
        for s in _checked(subjects)
    }
    settings = {
        "windows": grid.windows,
        "last": grid.last,
        "longest": longest,
        "texts_sha256": Haystack("texts", "\0".join(texts)).sha256,
    }
    header = make_header(subjects, {"bits": settings}, seed=grid.seed, command=command)
    results = Results.open(out, header)
    for subject in subjects:
        _run_bits_of(subject, windows[subject.name], grid, results, on_cell or _ignore)
    return results


def _run_bits_of(
    subject: Subject, windows: Windows, grid: BitsGrid, results: Results, on_cell: OnCell
) -> None:
    tokens = grid.batch_tokens or default_batch_tokens(subject.model)
    for length in grid.lengths:
        cell = results.find("bits", subject.name, length)
        if cell is None:
            with cell_named(f"{subject.name} at {length_label(length)}"):
                cell = measure_bits(subject, windows, length, grid.last, tokens)
            results.add(cell)
        on_cell(cell)


def measure_bits(
    subject: Subject, windows: Windows, length: int, last: int, batch_tokens: int
) -> Cell:
    """One cell of bits: every window at one context length."""
    rows = windows.at(length, subject.tokenizer)
    last = scored_tokens(length, last)
    device = subject.model.device

    def run(batch: Sequence[np.ndarray]) -> list[float]:
        ids = torch.from_numpy(np.stack(batch)).to(device)
        return token_bits(subject.model, ids, last).sum(1, dtype=torch.float64).tolist()

    most_rows = max(1, _LOGITS // ((last + 1) * subject.model.config.vocab_size))
    budget = Budget(min(batch_tokens, most_rows * length))
    methods = protecting(subject.methods, last)
    with extended(subject.model, *methods), torch.inference_mode():
        done = list(run_batches(list(rows), length, budget, run, Stopwatch(device)))
    bits = sum(answer for _, answer, _ in done)
    scored = rows[:, -last:]
    return Cell(
        task="bits",
        method=subject.name,
        length=length,
        depth=None,
        trials=len(rows),
        correct=None,
        seconds=round(sum(seconds for _, _, seconds in done), 4),
        bits=bits / byte_count(subject.tokenizer, scored),
        bits_per_token=bits / scored.size,
        tokens=scored.size,
    )

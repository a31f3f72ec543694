"""Ops and whole models, side by side: ours, stock transformers, and mamba-ssm where it is there.

    python -m benchmarks.run --out benchmarks/results/run.json
    python -m benchmarks.run --ops scan,ssd-130m --models none --lengths 8k,64k
    python -m benchmarks.run --ops none --models mamba-130m --resume --out run.json
    python -m benchmarks.run --ops none --models mamba2-130m --tasks decode --batches 1,16,64

All sides run in this process, in turn, on the same inputs (in the layout that each wants). Nothing
of ours is timed unless it was right in this run: an op's outputs, final states and gradients are
compared with the reference in float64 (1,000 tokens, and the first and last 1,000 of those that are
timed), a model's logits, behind a prompt and of decode steps, with stock transformers in float64,
and may be at most twice as far off as the reference in the inputs' own dtype. A CUDA graph must
give the very tokens of the steps that it replays. Others are timed in any case; their rows say how
far they are off. A side that fails or runs out of memory is a row that says so.

Rows are kept after every comparison. After Ctrl-C, `--resume` goes on and skips what is there.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import _models, _ops
from benchmarks._common import environment, write_rows
from benchmarks._timing import BrokenDevice, Contestant, compare, reason, release, times
from widefield.errors import WidefieldError, unknown
from widefield.evaluation.grid import length_label, parse_lengths

PREFILLS = (8192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288)
SAME = ("device", "driver", "versions", "seed")
TASKS = ("prefill", "decode")
SIDES = (
    "widefield", "widefield graph", "widefield recorded", "mamba-ssm", "causal-conv1d",
    "transformers with mamba-ssm", "transformers",
)  # fmt: skip
INTERRUPTED = 130

Row = dict[str, Any]
Call = Callable[[int], Any]


@dataclass(frozen=True)
class Job:
    """One comparison: what is timed at one length.

    Attributes:
        case: as the rows call it.
        tokens: of each sequence.
        run: its rows.
    """

    case: str
    tokens: int
    run: Callable[[], list[Row]]


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        device: where all runs.
        seed: of weights and inputs.
        seconds: budget of a comparison.
        backends: of our side; "default" is what the op chooses.
        lengths: for everything that has a length, or None for each one's own.
        stock_up_to: the longest prompt that plain transformers gets.
        tasks: of whole models: "prefill", "decode".
        batches: sequences at once, of a decode.
        sides: who is timed; "widefield" with each of the backends.
    """

    device: torch.device
    seed: int
    seconds: float
    backends: list[str]
    lengths: tuple[int, ...] | None
    stock_up_to: int
    tasks: list[str]
    batches: tuple[int, ...] = (1,)
    sides: tuple[str, ...] = SIDES

    def wants(self, side: _ops.Side | _models.Side) -> bool:
        """Whether a side is to be timed."""
        backend = side.name.removeprefix("widefield ")
        return ("widefield" if backend in self.backends else side.name) in self.sides


def op_jobs(names: Sequence[str], asked: Settings) -> Iterator[Job]:
    for op in _ops.all_ops(asked.backends):
        if op.name in names:
            bench = OpBench(op if asked.device.type == "cuda" else in_float32(op), asked)
            lengths = op.lengths if asked.lengths is None or op.lengths == (1,) else asked.lengths
            for tokens in lengths:
                yield Job(op.name, tokens, bench.at(tokens))


def in_float32(op: _ops.Op) -> _ops.Op:
    """What a CPU is timed with."""
    return replace(op, dtype=torch.float32)


class OpBench:
    """An op's sides, judged once, before the first of its lengths is timed."""

    def __init__(self, op: _ops.Op, asked: Settings) -> None:
        self.op, self.asked = op, asked
        on_gpu = asked.device.type == "cuda"  # where the others' kernels run
        self._sides = [s for s in op.sides() if (s.ours or on_gpu) and asked.wants(s)]
        self._verdicts: dict[str, _ops.Verdict | str] = {}

    def at(self, tokens: int) -> Callable[[], list[Row]]:
        """What makes the rows of one length."""
        return lambda: self._rows(tokens)

    def _judge(self) -> dict[str, _ops.Verdict | str]:
        if not self._verdicts:
            judge = _ops.Judge(self.op, self.asked.device, self.asked.seed)
            for side in self._sides:
                try:
                    self._verdicts[side.name] = judge.verdict(side)
                except Exception as error:
                    self._verdicts[side.name] = reason(error)
            release(self.asked.device)
        return self._verdicts

    def _rows(self, tokens: int) -> list[Row]:
        verdicts, sets = self._judge(), None
        rows, contestants = [], []
        for side in self._sides:
            verdict = verdicts[side.name]
            row = self._row(side, tokens, verdict)
            rows.append(row)
            contestant = Contestant(side.name, lambda index: None, failed=row.get("failed"))
            contestants.append(contestant)
            if contestant.failed is None:
                sets = sets or _ops.input_sets(self.op, tokens, self.asked.device, self.asked.seed)
                contestant.call = self._call(side, sets)
                if side.ours and tokens > _ops.CHECKED and not self.op.backward:
                    contestant.failed = self._why_wrong(side, sets[0][0])
        compare(contestants, self.asked.device, self.asked.seconds)
        for row, contestant in zip(rows, contestants, strict=True):
            _finish(row, contestant, 1e-3, "ms")
        return rows

    def _why_wrong(self, side: _ops.Side, tensors: _ops.Tensors) -> str | None:
        """What is wrong at a length that is timed, or None."""
        try:
            verdict = _ops.ends(self.op, side, tensors)
        except Exception as error:
            return reason(error)
        return None if verdict.right else f"at this length, {verdict.told()}"

    def _row(self, side: _ops.Side, tokens: int, verdict: _ops.Verdict | str) -> Row:
        op = self.op
        row: Row = {
            "case": op.name, "side": side.name, "tokens": tokens, "batch": op.batch,
            "dtype": _dtype(op.dtype), **op.shape,
        }  # fmt: skip
        return row | _judged(verdict, side.ours)

    def _call(self, side: _ops.Side, sets: Sequence[Any]) -> Callable[[int], Any]:
        run = _ops.runner(self.op, side)
        own: dict[int, _ops.Tensors] = {}

        def call(index: int) -> Any:
            index %= len(sets)
            if index not in own:
                own[index] = _ops.prepared(self.op, side, *sets[index])
            with nullcontext() if self.op.backward else torch.no_grad():
                return run(own[index])

        for index in range(len(sets)):
            own[index] = _ops.prepared(self.op, side, *sets[index])
        return call


def _usual(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _judged(verdict: _ops.Verdict | str, ours: bool) -> Row:
    """How exact a side is, and why it is not timed, if it is not."""
    if isinstance(verdict, str):
        return {"failed": verdict}
    found: Row = {"error": verdict.error, "allowed": verdict.allowed, "worst": verdict.worst}
    return found | ({"failed": verdict.told()} if ours and not verdict.right else {})


def _finish(row: Row, contestant: Contestant, unit: float, name: str) -> None:
    """The times, or why there are none."""
    if contestant.failed is not None:
        row["failed"] = contestant.failed
        return
    row |= {"unit": name, **times(contestant, unit)}
    if contestant.peak_megabytes is not None:
        row["peak_megabytes"] = contestant.peak_megabytes


def model_jobs(names: Sequence[str], asked: Settings) -> Iterator[Job]:
    dtype = _usual(asked.device)
    lengths = PREFILLS if asked.lengths is None else asked.lengths
    for name in names:
        bench = ModelBench(name, dtype, asked)
        for tokens in lengths if "prefill" in asked.tasks else ():
            yield Job(f"{name} prefill", tokens, bench.prefill(tokens))
        for batch in asked.batches if "decode" in asked.tasks else ():
            if name not in _models.METHODS:
                yield Job(decode_case(name, batch), _models.NEW_TOKENS, bench.decode(batch))


def decode_case(name: str, batch: int) -> str:
    """What the rows call it."""
    return f"{name} decode" if batch == 1 else f"{name} decode, {batch} rows"


class ModelBench:
    """A model, built when it is first timed and judged before each task. One is held at a time."""

    held: ModelBench | None = None

    def __init__(self, name: str, dtype: torch.dtype, asked: Settings) -> None:
        self.name, self.dtype, self.asked = name, dtype, asked
        self._model: Any = None
        self._all: list[_models.Side] = []
        self._verdicts: dict[tuple[str, str, int], _ops.Verdict | str | None] = {}

    def prefill(self, tokens: int) -> Callable[[], list[Row]]:
        """What makes the rows of one length."""
        return lambda: self._compare("prefill", tokens, 1)

    def decode(self, batch: int) -> Callable[[], list[Row]]:
        """What makes the rows of tokens one by one."""
        return lambda: self._compare("decode", _models.NEW_TOKENS, batch)

    def _open(self) -> None:
        if ModelBench.held is self:
            return
        if ModelBench.held is not None:
            ModelBench.held._model, ModelBench.held._all = None, []
        release(self.asked.device)
        self._model = _models.build(self.name, self.dtype, self.asked.device, self.asked.seed)
        self._all = _models.sides(self.name, self._model, self.asked.backends, self.asked.seed)
        ModelBench.held = self

    def _sides(self, task: str, tokens: int) -> list[_models.Side]:
        """Who runs a task."""
        return [
            side
            for side in self._all
            if self.asked.wants(side)
            and (side.prefill if task == "prefill" else side.decode) is not None
            and not (side.name == "transformers" and tokens > self.asked.stock_up_to)
        ]

    def _judge(self, task: str, batch: int, sides: Sequence[_models.Side]) -> None:
        """A verdict a side, once; None where nobody else runs this."""
        new = [side for side in sides if (side.name, task, batch) not in self._verdicts]
        if not new:
            return
        judge = None
        if self.name not in _models.METHODS:
            judge = _models.Judge(self.name, self._model, task, batch, self.asked.seed)
        for side in new:
            found: _ops.Verdict | str | None = None
            try:
                found = None if judge is None else judge.verdict(side, self._all[0])
            except Exception as error:
                found = reason(error)
            self._verdicts[side.name, task, batch] = found
            off = f"off by {found.error:.2e}" if isinstance(found, _ops.Verdict) else found or ""
            print(f"{self.name} {task}, judged: {side.name} {off}", file=sys.stderr, flush=True)
        del judge
        release(self.asked.device)

    def _compare(self, task: str, tokens: int, batch: int) -> list[Row]:
        self._open()
        length = tokens if task == "prefill" else _models.PROMPT
        sides = self._sides(task, length)
        self._judge(task, batch, sides)
        ids = _models.prompt_of(length, self.asked.device, self.asked.seed, batch)
        case = f"{self.name} prefill" if task == "prefill" else decode_case(self.name, batch)
        rows, contestants = [], []
        for side in sides:
            row: Row = {
                "case": case, "side": side.name, "tokens": tokens, "batch": batch,
                "dtype": _dtype(self.dtype),
            }  # fmt: skip
            verdict = self._verdicts[side.name, task, batch]
            row |= {} if verdict is None else _judged(verdict, side.ours)
            rows.append(row)
            during = functools.partial(side.during, task)
            contestants.append(
                [
                    Contestant(side.name, call, during, alone=True, failed=row.get("failed"))
                    for call in self._calls(side, task, ids)
                ]
            )
        compare([c for each in contestants for c in each], self.asked.device, self.asked.seconds)
        for row, each in zip(rows, contestants, strict=True):
            seconds, unit = (1.0, "s") if task == "prefill" else (1e-3 * tokens, "ms a token")
            _finish(row, each[0] if len(each) == 1 else _difference(*each), seconds, unit)
        return rows

    def _calls(self, side: _models.Side, task: str, ids: torch.Tensor) -> list[Call]:
        """What is timed; of tokens one by one a long run and a short one, to be subtracted."""
        if task == "prefill":
            return [_without_gradients(side.prefill, ids)]
        short = _models.SHORT
        return [
            _without_gradients(side.decode, ids, tokens)
            for tokens in (short + _models.NEW_TOKENS, short)
        ]


def _without_gradients(run: Any, *args: Any) -> Call:
    def call(index: int) -> Any:
        with torch.inference_mode():
            return run(*args)

    return call


def _difference(long: Contestant, short: Contestant) -> Contestant:
    """What the tokens took that only the long run has."""
    long.failed = long.failed or short.failed
    pairs = zip(long.seconds, short.seconds, strict=False)
    long.seconds = [more - less for more, less in pairs]
    return long


def chosen(given: str, known: Sequence[str], what: str) -> list[str]:
    """Names of a list with commas; "all" and "none" are lists, too.

    Raises:
        WidefieldError: for a name that is not known.
    """
    if given in ("all", "none"):
        return list(known) if given == "all" else []
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise unknown(what, name, ("all", "none", *known))
    return names


def earlier(path: Path | None, resume: bool, head: Row) -> list[Row]:
    """The rows that are there.

    Raises:
        WidefieldError: if they were measured on something else.
    """
    if not resume or path is None or not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in SAME:
        if found.get(key) != head.get(key):
            raise WidefieldError(
                f"--resume: {path} has {key} {found.get(key)}, expected {head.get(key)}: "
                "give another --out"
            )
    return found["rows"]


def told(row: Row) -> str:
    """A row on one line."""
    label = f"{row['case']:<24} {length_label(row['tokens']):>5}  {row['side']:<28}"
    if "failed" in row:
        return f"{label} {row['failed']}"
    peak = f"  {row['peak_megabytes']:9.0f} MB" if "peak_megabytes" in row else ""
    return f"{label} {row['p50']:11.4f} {row['unit']}{peak}"


def run_all(jobs: Sequence[Job], head: Row, rows: list[Row], out: Path | None) -> None:
    """Run what is missing; rows are kept after every job."""
    there = {(row["case"], row["tokens"]) for row in rows}
    console, start = Console(stderr=True), time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=len(jobs))
        for job in jobs:
            bar.update(task, description=f"{job.case} at {length_label(job.tokens)}")
            if (job.case, job.tokens) not in there:
                new = _rows_of(job)
                for row in new:
                    print(f"{time.perf_counter() - start:6.1f} s  {told(row)}", flush=True)
                rows += new
                if out is not None:
                    write_rows(out, head | {"rows": rows})
            bar.advance(task)


def _rows_of(job: Job) -> list[Row]:
    """A job's rows; one row where it could not even begin."""
    try:
        return job.run()
    except BrokenDevice:
        raise
    except Exception as error:
        return [{"case": job.case, "side": "all", "tokens": job.tokens, "failed": reason(error)}]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    known = [op.name for op in _ops.all_ops(["default"])]
    parser.add_argument("--ops", default="all", help=f"all, none, or of {', '.join(known)}")
    models = ", ".join(_models.NAMES)
    parser.add_argument("--models", default="all", help=f"all, none, or of {models}")
    parser.add_argument("--tasks", default="all", help=f"of models: all, or {', '.join(TASKS)}")
    parser.add_argument("--lengths", help="tokens, e.g. 8k,64k; by default each one's own")
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--resume", action="store_true", help="skip the rows that --out has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="budget of one comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", default="default", help="of our side, e.g. default,nvrtc")
    parser.add_argument("--batches", default="1", help="sequences of a decode, e.g. 1,16,64")
    parser.add_argument("--sides", default="all", help=f"all, or of {', '.join(SIDES)}")
    parser.add_argument("--stock-up-to", type=int, default=8192, help="tokens; longer without it")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    asked = Settings(
        device=torch.device(args.device), seed=args.seed, seconds=args.seconds,
        backends=args.backends.split(","), stock_up_to=args.stock_up_to,
        lengths=tuple(parse_lengths(args.lengths)) if args.lengths else None,
        tasks=chosen(args.tasks, TASKS, "task"), batches=tuple(parse_lengths(args.batches)),
        sides=tuple(chosen(args.sides, SIDES, "side")),
    )  # fmt: skip
    known = [op.name for op in _ops.all_ops(["default"])]
    jobs = [
        *op_jobs(chosen(args.ops, known, "op"), asked),
        *model_jobs(chosen(args.models, _models.NAMES, "model"), asked),
    ]
    head = environment("benchmarks.run", asked.device, asked.seed)
    rows = earlier(args.out, args.resume, head)
    try:
        run_all(jobs, head, rows, args.out)
    except (KeyboardInterrupt, BrokenDevice) as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else f"the GPU failed: {error}"
        kept = f"{len(rows)} rows are kept in {args.out}; --resume goes on" if args.out else ""
        print(f"{why}: {kept}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WidefieldError as error:
        sys.exit(f"error: {error}")

"""`benchmarks.run` on tiny shapes: what is timed, what is refused, what an interrupt leaves."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import _models, _ops, _timing, pictures, run
from widefield import ops
from widefield.errors import WidefieldError

TINY = {"hidden_size": 32, "num_hidden_layers": 2}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {
        "mamba-130m": TINY | {"state_size": 16},
        "mamba2-130m": TINY | _models._MAMBA2 | {"num_heads": 2, "head_dim": 32},
    }
    monkeypatch.setattr(_models, "SHAPES", shapes)
    monkeypatch.setattr(_models, "VOCABULARY", 128)
    monkeypatch.setattr(_models, "CHECKED", 40)
    monkeypatch.setattr(_models, "NEW_TOKENS", 3)
    monkeypatch.setattr(_models, "CALIBRATED_AT", 32)
    monkeypatch.setattr(_models, "POOL_LAYER", 1)
    monkeypatch.setattr(_ops, "CHECKED", 40)


def bench(monkeypatch: pytest.MonkeyPatch, out: Path, *args: str) -> list[dict[str, Any]]:
    options = ["--device", "cpu", "--seconds", "0.01", "--out", str(out), *args]
    monkeypatch.setattr(sys, "argv", ["run", *options])
    assert run.main() == 0
    return json.loads(out.read_text())["rows"]


def test_each_op_is_judged_and_timed(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "scan,scan-floor,ssd-130m,conv,scan-step,ssd-step"
    rows = bench(
        monkeypatch, tmp_path / "r.json", "--models", "none", "--ops", names, "--lengths", "24"
    )
    assert {row["case"] for row in rows} == set(names.split(","))
    for row in rows:
        assert "failed" not in row and row["error"] <= row["allowed"]
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["runs"] >= 3


def test_gradients_are_judged_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "CHECKED_BACKWARD", 12)
    monkeypatch.setattr(_ops, "CHECKED_WIDE", 3)
    names = "scan-backward,ssd-130m-backward-8,gated-norm-backward"
    rows = bench(
        monkeypatch, tmp_path / "r.json", "--models", "none", "--ops", names, "--lengths", "2"
    )
    assert not any("failed" in row for row in rows)
    assert {row["batch"] for row in rows} == {64, 8, 1}


def test_a_wrong_kernel_is_not_timed(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.causal_conv1d

    def wrong(*args: Any, **options: Any) -> Any:
        y, state = right(*args, **options)
        return y + 1e-3, state

    monkeypatch.setattr(ops, "causal_conv1d", wrong)
    (row,) = bench(
        monkeypatch, tmp_path / "r.json", "--models", "none", "--ops", "conv", "--lengths", "24"
    )
    assert "p50" not in row and "not timed" in row["failed"] and row["worst"] == "y"


def test_a_kernel_that_is_wrong_at_the_end_of_many_tokens_is_not_timed(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.selective_scan

    def wrong(inputs: Any, plan: Any = None) -> Any:
        y, state = right(inputs, plan)
        y[:, 110:] *= 1.01
        return y, state

    asked = ["--models", "none", "--ops", "scan", "--lengths", "30,120"]
    rows = bench(monkeypatch, tmp_path / "right.json", *asked)
    assert not any("failed" in row for row in rows)
    monkeypatch.setattr(ops, "selective_scan", wrong)
    short, long = bench(monkeypatch, tmp_path / "wrong.json", *asked)
    assert "failed" not in short and "at this length, y is off" in long["failed"]


def test_nan_is_never_right() -> None:
    assert not _ops.Verdict("y", float("nan"), 1.0).right


def test_models_are_timed_beside_stock_transformers(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bench(
        monkeypatch, tmp_path / "r.json", "--ops", "none", "--lengths", "16,24",
        "--models", "mamba-130m,mamba2-130m,decimamba-130m,longmamba-130m", "--stock-up-to", "16",
    )  # fmt: skip
    assert not [row for row in rows if "failed" in row]
    found = {(row["case"], row["tokens"], row["side"]) for row in rows}
    assert ("mamba-130m prefill", 16, "transformers") in found
    assert ("mamba-130m prefill", 24, "transformers") not in found
    assert ("decimamba-130m prefill", 24, "widefield") in found
    assert ("mamba2-130m decode", 3, "widefield") in found


def test_batches_are_decoded_by_the_sides_that_were_asked_for(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bench(
        monkeypatch, tmp_path / "r.json", "--ops", "none", "--models", "mamba-130m",
        "--tasks", "decode", "--batches", "1,2", "--sides", "widefield",
    )  # fmt: skip
    assert [(row["case"], row["batch"], row["side"]) for row in rows] == [
        ("mamba-130m decode", 1, "widefield"),
        ("mamba-130m decode, 2 rows", 2, "widefield"),
    ]
    assert all(row["error"] <= row["allowed"] and row["p50"] > 0 for row in rows)


def test_a_graph_that_gives_other_tokens_is_not_timed(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _models.sides

    def with_graph(*args: Any) -> list[_models.Side]:
        first, *others = whole(*args)

        def decode(prompt: torch.Tensor, tokens: int) -> torch.Tensor:
            assert first.decode is not None
            return first.decode(prompt, tokens).roll(1, dims=1)

        graph = replace(first, name="widefield graph", prefill=None, decode=decode, steps=None)
        return [first, graph, *others]

    monkeypatch.setattr(_models, "sides", with_graph)
    rows = bench(
        monkeypatch, tmp_path / "r.json", "--ops", "none", "--models", "mamba-130m",
        "--tasks", "decode",
    )  # fmt: skip
    failed = {row["side"]: row.get("failed", "") for row in rows}
    assert "tokens is off by" in failed["widefield graph"] and not failed["widefield"]


def test_a_slow_side_runs_once_behind_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_timing, "SLOW", 0.01)
    calls: list[int] = []

    def slow(index: int) -> None:
        calls.append(index)
        time.sleep(0.05)

    sides = [_timing.Contestant("slow", slow), _timing.Contestant("fast", lambda index: None)]
    _timing.compare(sides, torch.device("cpu"), 0.01)
    assert len(calls) == 2 and len(sides[0].seconds) == 1 and len(sides[1].seconds) == 20


def test_a_broken_gpu_says_whose_kernel_it_was() -> None:
    def call(index: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(_timing.BrokenDevice, match="in theirs: CUDA error"):
        _timing.compare([_timing.Contestant("theirs", call)], torch.device("cpu"), 1.0)


def test_one_sides_failure_is_a_row_and_the_others_are_timed(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, side: Any, task: str, ids: torch.Tensor) -> Any:
        def call(index: int) -> None:
            if side.name == "transformers":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

        return [call] * (2 if task == "decode" else 1)

    monkeypatch.setattr(run.ModelBench, "_calls", full)
    rows = bench(
        monkeypatch, tmp_path / "r.json", "--ops", "none", "--models", "mamba-130m",
        "--lengths", "16",
    )  # fmt: skip
    failed = {row["side"]: row.get("failed") for row in rows}
    assert failed == {"widefield": None, "transformers": "out of memory"}


def test_an_interrupted_run_keeps_its_rows_and_goes_on(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    asked = ["--models", "none", "--ops", "conv,scan-step", "--lengths", "24"]
    whole, ran = run._rows_of, []

    def stopped(job: run.Job) -> list[run.Row]:
        if job.case == "scan-step":
            raise KeyboardInterrupt
        return whole(job)

    monkeypatch.setattr(run, "_rows_of", stopped)
    monkeypatch.setattr(sys, "argv", ["run", "--device", "cpu", "--out", str(out), *asked])
    assert run.main() == 130
    assert "--resume goes on" in capsys.readouterr().err

    monkeypatch.setattr(run, "_rows_of", lambda job: ran.append(job.case) or whole(job))
    rows = bench(monkeypatch, out, "--resume", *asked)
    assert ran == ["scan-step"] and [row["case"] for row in rows] == ["conv", "scan-step"]


def test_rows_of_another_seed_are_not_mixed_in(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--models", "none", "--ops", "conv", "--lengths", "24"]
    bench(monkeypatch, tmp_path / "r.json", *asked)
    with pytest.raises(WidefieldError, match="seed 0, expected 1"):
        bench(monkeypatch, tmp_path / "r.json", *asked, "--resume", "--seed", "1")


def test_measured_rows_are_drawn_with_the_bounds_of_their_device(tmp_path: Path) -> None:
    common = {"batch": 1, "dtype": "bfloat16"}
    rows = [
        {"case": "scan", "side": side, "tokens": n, "p50": n / 1e4, **common}
        | {"channels": 1536, "states": 16}
        for side in ("widefield", "mamba-ssm")
        for n in (8192, 65_536)
    ]
    for case in ("mamba-130m prefill", "decimamba-130m prefill"):
        rows.append({"case": case, "side": "widefield", "tokens": 8192, "p50": 0.02, **common})
    rows.append({"case": "mamba2-130m prefill", "side": "all", "tokens": 8192, "failed": "memory"})
    head = {"device": "a GPU", "multiprocessors": 132, "megahertz": 1980.0}
    head |= {"gigabytes_per_second": 4814}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(head | {"rows": rows}))
    drawn = pictures.speeds(file, tmp_path)
    assert [path.name for path in drawn] == ["speed-scan.png", "speed-mamba-130m.png"]
    special, memory = pictures.floors(rows[0], head, [524_288])
    # 12.9 G exponentials at 4.18 T a second; 3.26 GB at 4.8 TB a second.
    assert special.seconds[524_288] == pytest.approx(3.08e-3, rel=0.01)
    assert memory.seconds[524_288] == pytest.approx(1.345e-3, rel=0.01)
    assert pictures.floors(rows[0], {"device": "a CPU"}, [8192]) == []


def test_an_unknown_op_is_one_line() -> None:
    with pytest.raises(WidefieldError, match="scan"):
        run.chosen("scann", ["scan", "conv"], "op")

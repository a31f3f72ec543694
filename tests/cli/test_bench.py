"""`widefield bench`: what it measures, what it leaves out, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import CommandLine
from tests.graphs import rerun_recordings
from tests.models import tiny_mamba
from widefield import decoding
from widefield.evaluation import speed
from widefield.evaluation.speed import Side

QUICK = ("--lengths", "64,128", "--repeats", "1", "--new-tokens", "2")


def test_every_side_is_measured_at_every_length(wf: CommandLine, tmp_path: Path) -> None:
    out, plot = tmp_path / "new" / "speed.json", tmp_path / "speed.png"
    done = wf("bench", *QUICK, "--out", out, "--plot", plot)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    # The tiny checkpoint has measured options of both methods.
    sides = ("stock", "unmodified", "longmamba", "decimamba")
    expected = {(side, "prefill", n) for side in sides for n in (64, 128)}
    expected |= {(side, "decode", 2) for side in sides}
    assert {(r["side"], r["task"], r["tokens"]) for r in found["rows"]} == expected
    # Stock transformers does not run on a CPU where mamba-ssm is installed.
    ours = [row for row in found["rows"] if row["side"] != "stock"]
    assert all(row["median_seconds"] > 0 for row in ours)
    assert found["header"]["subjects"]["longmamba"]["methods"]
    assert plot.stat().st_size > 5000 and str(plot) in done.out
    assert "transformers" in done.out and "×" in done.out


def test_the_methods_can_be_named_and_set(wf: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    done = wf(
        "bench", "--lengths", "64", "--repeats", "1", "--new-tokens", "0", "--no-stock",
        "--method", "decimamba", "--set", "decimamba.base_length=32", "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    assert [row["side"] for row in found["rows"]] == ["decimamba"]
    options = found["header"]["subjects"]["decimamba"]["methods"]["decimamba"]
    assert options["base_length"] == 32


def test_a_side_that_would_take_too_long_is_left_out_and_the_others_go_on(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = speed._Bench._prefill

    def slow(self: Any, side: Side, ids: Any, task: str, watch: bool) -> Any:
        seconds, peak = prefill(self, side, ids, task, watch)
        return (100.0, peak) if side.methods is None else (seconds, peak)

    monkeypatch.setattr(speed._Bench, "_prefill", slow)
    done = wf("bench", *QUICK, "--method", "unmodified")
    assert done.code == 0 and "transformers, 128 tokens: over 60 s" in done.out
    assert "widefield, 128 tokens: 0." in done.out


def test_a_side_without_memory_is_a_line_and_the_others_go_on(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = speed._Bench._prefill

    def full(self: Any, side: Side, ids: Any, task: str, watch: bool) -> Any:
        if side.methods is None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return prefill(self, side, ids, task, watch)

    monkeypatch.setattr(speed._Bench, "_prefill", full)
    done = wf("bench", *QUICK, "--method", "unmodified")
    assert done.code == 0 and done.out.count("transformers, 64 tokens: out of memory") == 1
    assert "widefield, 64 tokens: 0." in done.out


def test_a_prompt_that_fits_nowhere_is_a_line(wf: CommandLine) -> None:
    done = wf("bench", "--lengths", "99999999m", "--new-tokens", "0")
    assert done.code == 0 and done.out.count("tokens: out of memory") == 4


def test_memory_of_a_short_prompt_says_little_about_a_long_one() -> None:
    bench = speed._Bench(tiny_mamba(), speed.SpeedGrid((64,)))
    side = Side("unmodified", ())
    bench._last[side.name, "prefill"] = speed.Timing(side.name, "prefill", 64, (0.01,), 120 * 10**6)
    assert bench._hopeless(side, 64 * 1024, "prefill") is None
    bench._last[side.name, "prefill"] = speed.Timing(side.name, "prefill", 64, (0.01,), 10**9)
    assert "out of memory" in str(bench._hopeless(side, 64 * 1024, "prefill"))


def test_a_stock_model_that_does_not_run_here_is_a_line(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = speed._Bench._prefill

    def broken(self: Any, side: Side, ids: Any, task: str, watch: bool) -> Any:
        if side.methods is None:
            raise RuntimeError("Expected x.is_cuda() to be true, but got false.")
        return prefill(self, side, ids, task, watch)

    monkeypatch.setattr(speed._Bench, "_prefill", broken)
    done = wf("bench", "--lengths", "64", "--new-tokens", "0", "--method", "unmodified")
    assert done.code == 0 and "– transformers: RuntimeError: Expected x.is_cuda()" in done.out


def test_on_a_gpu_prompts_and_tokens_go_through_a_graph_too(
    wf: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerun_recordings(monkeypatch)
    monkeypatch.setattr(speed, "_GPU", "cpu")
    out, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    done = wf("bench", *QUICK, "--method", "unmodified", "--out", out, "--plot", plot)
    assert done.code == 0 and "widefield, 2 new tokens through a CUDA graph: " in done.out
    assert "by CUDA graph" in done.out and plot.stat().st_size > 5000
    assert "widefield, 64 tokens through a CUDA graph: " in done.out
    for task, count in {"prefill_graph": 2, "decode_graph": 1}.items():
        rows = [row for row in json.loads(out.read_text())["rows"] if row["task"] == task]
        assert [row["side"] for row in rows] == ["unmodified"] * count
        assert all(row["median_seconds"] > 0 for row in rows)


def test_methods_that_cannot_be_recorded_say_why(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerun_recordings(monkeypatch)
    monkeypatch.setattr(speed, "_GPU", "cpu")
    short = ("--set", "decimamba.base_length=30", "--set", "decimamba.min_length=10")
    done = wf("bench", *QUICK, "--method", "decimamba", *short)
    assert done.code == 0 and "– DeciMamba: prefill(cuda_graph=True) needs methods" in done.out


def test_a_model_that_cannot_be_recorded_is_told_once(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_GPU", "cpu")
    monkeypatch.setattr(decoding, "what_graph_needs", lambda *_, **__: "a model of another kind")
    done = wf("bench", *QUICK)
    assert done.code == 0 and "LongMamba" in done.out
    told = "– widefield, LongMamba, DeciMamba: a CUDA graph needs a model of another kind"
    assert told in done.out.splitlines()


def test_an_interrupt_tells_what_is_kept(
    wf: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speed._Bench, "decodes", stop)
    out = tmp_path / "speed.json"
    done = wf("bench", *QUICK, "--method", "unmodified", "--out", out)
    assert done.code == 130 and f"4 results are kept in {out}" in done.err
    assert len(json.loads(out.read_text())["rows"]) == 4
    plot = tmp_path / "speed.png"
    done = wf("bench", *QUICK, "--method", "unmodified", "--plot", plot)
    assert done.code == 130 and f"4 results are kept in {plot}" in done.err
    assert plot.stat().st_size > 5000


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--repeats", "0"), "--repeats 0"),
        (("--limit", "0"), "limit is 0.0"),
        (("--new-tokens", "-1"), "new_tokens is -1"),
        (("--lengths", "1x"), "'1x' is not a length"),
        (("--out", "speed.txt"), "ends in .json"),
        (("--plot", "speed.pdf"), "--plot speed.pdf: expected a name that ends in .png"),
        (("--method", "longmambo"), "longmambo"),
        (("--set", "longmamba.clamp_sahre=0.1"), "clamp_sahre"),
    ],
)
def test_bad_input_is_one_line(wf: CommandLine, args: tuple[str, ...], told: str) -> None:
    done = wf("bench", *args)
    assert done.code == 2 and told in done.err and done.err.count("\n") == 1

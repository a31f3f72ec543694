"""`demo` and `eval`: what they show, what they leave behind, and how they go on after Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cli.conftest import CommandLine
from widefield.cli._board import Board, filling, percent, tell
from widefield.evaluation.results import Cell

SMALL = ("--lengths", "256,512", "--depths", "0,1", "--trials", 1)


def stored(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "results.json").read_text())


def test_the_demo_leaves_three_grids_a_picture_and_results(wf: CommandLine) -> None:
    done = wf("demo", "--lengths", "256,512", "--trials", 1, "--out", "new/demo")
    assert done.code == 0, done.err
    assert sorted(path.name for path in Path("new/demo").iterdir()) == [
        "passkey.png",
        "results.json",
    ]
    results = stored("new/demo")
    assert len(results["cells"]) == 3 * 2 * 5
    assert list(results["header"]["subjects"]) == ["unmodified", "longmamba", "decimamba"]
    subjects = results["header"]["subjects"]
    assert subjects["longmamba"]["methods"]["longmamba"]["clamp_share"] == 0.02
    assert subjects["decimamba"]["methods"]["decimamba"]["layers"] == [1]
    assert subjects["longmamba"]["fingerprint"] == subjects["unmodified"]["fingerprint"]
    assert subjects["decimamba"]["fingerprint"] != subjects["unmodified"]["fingerprint"]
    assert "256*" in done.out and "512*" not in done.out
    assert "* = training length (256 tokens)" in done.out
    *_, right, results_line, picture_line = done.out.splitlines()
    assert right.startswith("DeciMamba") and "of 10)" in right and right.endswith("% at 512")
    assert (results_line, picture_line) == ("new/demo/results.json", "new/demo/passkey.png")


def test_a_quick_demo_is_smaller(wf: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "widefield.cli._passkey.run_board", lambda subjects, text, grid, out: asked.append(grid)
    )
    wf("demo")
    wf("demo", "--quick")
    wf("demo", "--quick", "--trials", 3, "--lengths", "2k", "--seed", 5)
    full, quick, own = asked
    assert full.lengths == (1024, 2048, 4096, 8192, 16384) and len(full.depths) == 5
    assert quick.lengths == (1024, 4096, 16384) and len(quick.depths) == 3 and quick.trials == 1
    assert own.lengths == (2048,) and own.trials == 3 and own.seed == 5


def test_settings_reach_the_methods(wf: CommandLine, text: Path) -> None:
    tuned = Path("tuned.json")
    tuned.write_text(json.dumps({"methods": {"longmamba": {"decay_threshold": 1e-20}}}))
    done = wf(
        "eval", "passkey", *SMALL, "--method", "longmamba,longmamba+decimamba", "--haystack", text,
        "--methods", tuned, "--set", "longmamba.clamp_share=0.05", "--set", "decimamba.layers=0,1",
        "--seed", 4, "--batch-tokens", 600, "--dtype", "bfloat16", "--out", "mine",
    )  # fmt: skip
    assert done.code == 0, done.err
    header = stored("mine")["header"]
    alone, both = header["subjects"]["longmamba"], header["subjects"]["longmamba+decimamba"]
    assert alone["methods"]["longmamba"] == both["methods"]["longmamba"]
    assert alone["methods"]["longmamba"]["decay_threshold"] == 1e-20
    assert alone["methods"]["longmamba"]["clamp_share"] == 0.05
    assert (
        alone["methods"]["longmamba"]["reduction"] == "fastest"
    )  # a tuned file is the whole setting
    assert both["methods"]["decimamba"]["layers"] == [0, 1]
    assert both["methods"]["decimamba"]["base_length"] == 200
    assert header["seed"] == 4 and alone["dtype"] == "bfloat16"
    assert header["tasks"]["passkey"]["haystack"]["name"] == "text.txt"


def test_bits_are_told_by_length_and_stored(wf: CommandLine, text: Path) -> None:
    done = wf(
        "eval", "bits", "--texts", text, "--lengths", "256,1k", "--windows", 2, "--last", 64,
        "--method", "unmodified,longmamba", "--out", "mine",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "LongMamba, 1k: " in done.out and "(+0.0%)" in done.out.replace("-", "+")
    assert [(c["method"], c["length"]) for c in stored("mine")["cells"]] == [
        ("unmodified", 256), ("unmodified", 1024), ("longmamba", 256), ("longmamba", 1024),
    ]  # fmt: skip


def interrupting(after: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run_passkey` or `run_bits`, with Ctrl-C after some finished cells."""

    def interrupted(subjects: Any, text: Any, grid: Any, out: Any, on_cell: Any) -> Any:
        count = 0

        def tell_and_count(cell: Cell) -> None:
            nonlocal count
            on_cell(cell)
            count += 1
            if count == after:
                raise KeyboardInterrupt

        return run(subjects, text, grid, out, tell_and_count)

    return interrupted


def test_after_ctrl_c_the_same_command_goes_on(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from widefield.evaluation import runner

    args = ("eval", "passkey", *SMALL, "--method", "unmodified", "--out", "mine")
    with monkeypatch.context() as patch:
        patch.setattr("widefield.cli._passkey.run_passkey", interrupting(3, runner.run_passkey))
        first = wf(*args)
    assert first.code == 130
    assert first.err == (
        "interrupted: 3 of 4 cells are kept in mine/results.json; "
        "run the same command again to go on\n"
    )
    kept = stored("mine")["cells"]
    assert len(kept) == 3 and "·" in first.out
    second = wf(*args)
    assert second.code == 0 and "3 cells were there from an earlier run" in second.out
    assert stored("mine")["cells"][:3] == kept and len(stored("mine")["cells"]) == 4


def test_after_ctrl_c_bits_are_kept_too(
    wf: CommandLine, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from widefield.evaluation import runner

    monkeypatch.setattr("widefield.cli._bits.run_bits", interrupting(1, runner.run_bits))
    args = ("--texts", text, "--lengths", "256,512", "--windows", 1, "--last", 8, "--out", "mine")
    done = wf("eval", "bits", *args)
    assert done.code == 130 and "1 of 4 cells are kept in mine/results.json" in done.err
    assert len(stored("mine")["cells"]) == 1


def test_ctrl_c_before_the_first_cell_says_so(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("widefield.cli._passkey.run_passkey", interrupted)
    done = wf("demo")
    assert done.code == 130 and "no cell was finished yet" in done.err
    assert not Path("widefield-results").exists()


def test_sigint_to_the_real_program_keeps_what_is_finished(bundled: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "widefield", "eval", "passkey", "--model", str(bundled / "base"),
        "--method", "unmodified", "--lengths", "256,32k", "--trials", "8", "--out", "mine",
    ]  # fmt: skip
    program = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONWARNINGS": ""},
    )  # fmt: skip
    results = tmp_path / "mine" / "results.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and program.poll() is None:
        if results.exists() and len(json.loads(results.read_text())["cells"]) >= 5:
            break
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 130, err
    assert err.count("\n") == 1 and err.startswith("interrupted: 5 of 10 cells are kept in"), err
    assert "unmodified, 256: " in out
    assert [path.name for path in results.parent.iterdir()] == ["results.json"]


def board(lengths: tuple[int, ...] = (1024, 4096, 16384)) -> Board:
    methods = ("unmodified", "longmamba", "decimamba")
    return Board(methods, lengths, (0.0, 0.5, 1.0), dict.fromkeys(methods, 1024))


def cell(method: str, length: int, depth: float, correct: int = 3) -> Cell:
    return Cell("passkey", method, length, depth, trials=4, correct=correct, seconds=1.0)


def test_a_line_is_printed_when_a_length_is_complete() -> None:
    out = io.StringIO()
    console = Console(file=out)
    shown = board()
    for depth in (0.0, 1.0):
        tell(shown, cell("longmamba", 4096, depth), console)
    assert out.getvalue() == ""
    tell(shown, cell("longmamba", 4096, 0.5, correct=4), console)
    assert out.getvalue() == "LongMamba, 4k: 75 100 75 % right (3.0 s)\n"


def test_three_grids_stand_side_by_side_in_eighty_columns() -> None:
    out = io.StringIO()
    shown = board((1024, 2048, 4096, 8192, 16384))
    with filling(shown, Console(file=out, width=80)):
        shown.add(cell("longmamba", 1024, 0.0))
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["unmodified", "LongMamba", "DeciMamba"]
    assert lines[1].split() == ["depth", *("1k*", "2k", "4k", "8k", "16k") * 3]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [20, 40, 60])
def test_in_a_narrow_terminal_grids_stand_below_each_other(width: int) -> None:
    out = io.StringIO()
    shown = board()
    with filling(shown, Console(file=out, width=width)):
        shown.add(cell("longmamba", 1024, 0.0))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert all(title in text for title in ("unmodified", "LongMamba", "DeciMamba"))
    assert text.count("depth") == (1 if width == 60 else 3 if width == 20 else 2)


def test_a_title_is_whole_over_a_single_length() -> None:
    out = io.StringIO()
    shown = board((1024,))
    with filling(shown, Console(file=out, width=80)):
        shown.add(cell("longmamba", 1024, 0.0))
    assert out.getvalue().splitlines()[0].split() == ["unmodified", "LongMamba", "DeciMamba"]


def test_in_a_terminal_the_grids_fill_in_place() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24)
    shown = board()
    with filling(shown, console):
        tell(shown, cell("unmodified", 1024, 0.0, correct=4), console)
        time.sleep(0.4)
    assert "1 of 27 cells" in out.getvalue()
    assert "% right" not in out.getvalue()


def test_in_a_low_terminal_only_the_running_grid_fills() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=30, height=12, color_system=None)
    shown = board()
    with filling(shown, console):
        time.sleep(0.4)
    assert "unmodified" in out.getvalue() and "DeciMamba" not in out.getvalue()


def test_a_hundred_per_cent_means_all_and_zero_means_none() -> None:
    assert [percent(share) for share in (0.0, 0.001, 0.5, 0.999, 1.0)] == [
        "0", "1", "50", "99", "100",
    ]  # fmt: skip

"""Pictures: they are drawn from whatever has been measured, and written whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread

from widefield.errors import WidefieldError
from widefield.evaluation.plots import (
    Curve,
    Point,
    display_name,
    frontier,
    heatmaps,
    lines,
    speed,
)
from widefield.evaluation.results import Cell, Results


def results(methods: tuple[str, ...], lengths: tuple[int, ...], missing: int = 0) -> Results:
    cells = [
        Cell("passkey", method, length, depth, trials=4, correct=int(4 * depth), seconds=0.1)
        for method in methods
        for length in lengths
        for depth in (0.0, 0.5, 1.0)
    ]
    subject = {"model": "MambaForCausalLM", "fingerprint": "0123456789", "parameters": 2_700_000}
    return Results({"subjects": dict.fromkeys(methods, subject)}, cells[: len(cells) - missing])


THREE = ("unmodified", "longmamba", "decimamba")
FIVE = (1024, 2048, 4096, 8192, 16384)


def test_three_heat_maps_of_five_lengths_fit_a_page(tmp_path: Path) -> None:
    path = heatmaps(results(THREE, FIVE), tmp_path / "passkey.png", train_length=1024)
    height, width, _ = imread(path).shape
    assert 900 <= width <= 1200 and height < width
    assert [file.name for file in tmp_path.iterdir()] == ["passkey.png"]


@pytest.mark.parametrize("train_length", [None, 100, 4096, 1 << 20])
def test_any_training_length_can_be_marked(tmp_path: Path, train_length: int | None) -> None:
    measured = results(("unmodified", "longmamba+decimamba"), FIVE, missing=4)
    assert heatmaps(measured, tmp_path / "maps.png", train_length).stat().st_size > 5000
    assert lines(measured, tmp_path / "lines.png", train_length).stat().st_size > 5000


def test_one_cell_is_enough(tmp_path: Path) -> None:
    measured = results(("unmodified",), (1024,), missing=2)
    assert heatmaps(measured, tmp_path / "maps.png").exists()
    assert lines(measured, tmp_path / "lines.png").exists()


def test_a_frontier_is_drawn(tmp_path: Path) -> None:
    points = [
        Point(f"{i}", i / 5, cost=0.01 * i, group=f"C = {i % 2} %", chosen=i == 3) for i in range(6)
    ]
    path = frontier(points, tmp_path / "new" / "frontier.png", limit=0.03, subtitle="at 64k")
    assert path.stat().st_size > 5000
    assert frontier(points[:1], tmp_path / "one.png").exists()


def test_nothing_measured_is_nothing_to_draw(tmp_path: Path) -> None:
    for draw in (heatmaps, lines):
        with pytest.raises(WidefieldError, match="nothing to draw"):
            draw(Results({}), tmp_path / "x.png")
    with pytest.raises(WidefieldError, match="nothing to draw"):
        frontier([], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_methods_are_named_as_their_papers_name_them() -> None:
    assert display_name("longmamba+decimamba") == "LongMamba + DeciMamba"
    assert display_name("unmodified") == "Unmodified"


def test_seconds_by_length_are_drawn_with_their_floors(tmp_path: Path) -> None:
    curves = [
        Curve("ours", {8192: 0.02, 65_536: 0.08, 524_288: 0.6}),
        Curve("theirs", {8192: 0.03}),
        Curve("memory", {8192: 1e-5, 524_288: 1e-3}, floor=True),
    ]
    plain = speed(curves, tmp_path / "speed.png", subtitle="one GPU").stat().st_size
    rates = {"ours": 72.0, "ours, CUDA graph": 4380.0}
    assert speed(curves, tmp_path / "more.png", rates=rates).stat().st_size > plain > 5000
    with pytest.raises(WidefieldError, match="nothing to draw"):
        speed([Curve("ours", {})], tmp_path / "none.png")

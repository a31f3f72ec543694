"""The search for settings: the best retrieval within the limit, in bounded time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

from tests.evaluation.oracle import oracle
from tests.models import tiny_mamba
from widefield.calibration import Calibration
from widefield.collect import calibrate
from widefield.errors import WidefieldError
from widefield.evaluation import bench, search
from widefield.evaluation.plots import frontier, tuned_points
from widefield.evaluation.results import Cell
from widefield.evaluation.tune import Candidates, TuneResult, TuneRow, tune

TEXT = "".join(f"Sentence {i} says nothing that matters much. " for i in range(100))
TWO_BY_TWO = Candidates(
    clamp_shares=(0.05, 0.01),
    decay_thresholds=(1e-30, 1e-17),
    reductions=("fastest", "mean"),
    exhaustive=True,
)
Costs = Callable[[Any], float]


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    ids = torch.randint(3, 259, (2, 64), generator=torch.Generator().manual_seed(0))
    return calibrate(tiny_mamba(), ids, train_length=64)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Costs], None]:
    """Fixes what every setting costs, in place of measuring it."""

    def fix(cost: Costs) -> None:
        def measure(subject: Any, windows: Any, length: int, last: int, tokens: int) -> Cell:
            rise = cost(subject.methods[0]) if subject.methods else 0.0
            return Cell("bits", "tune", length, None, 1, None, 0.1, bits=2.0 * (1 + rise))

        monkeypatch.setattr(bench, "measure_bits", measure)

    return fix


def usual_cost(method: Any) -> float:
    """A small threshold and each filtered layer cost; another reduction costs much."""
    layers = 2 if method.layers == "all" else len(method.layers)
    base = 0.05 if method.decay_threshold == 1e-30 else 0.02
    return base * layers / 2 + (0.01 if method.reduction == "mean" else 0.0)


def filters(method: Any, layer: int) -> bool:
    return method.layers == "all" or layer in method.layers


def usual_rule(length: int, model: Any) -> bool:
    """Retrieval needs a clamp share of 1 % and the filter in layer 1."""
    method = next(iter(model.widefield.methods), None)
    return method is not None and method.clamp_share == 0.01 and filters(method, 1)


def search_with(
    calibration: Calibration, rule: Callable[[int, Any], bool] = usual_rule, **options: Any
) -> TuneResult:
    settings: dict[str, Any] = {
        "haystack": TEXT, "lengths": (256,), "depths": (0.0, 1.0), "trials": 4, "confirmation": 2,
        "windows": 1, "last": 16, "candidates": TWO_BY_TWO, **options,
    }  # fmt: skip
    return tune(oracle(rule), calibration, ByT5Tokenizer(), **settings)


def test_the_best_retrieval_within_the_limit_is_chosen_at_the_least_cost(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    costs(usual_cost)
    result = search_with(calibration)
    assert result.best.clamp_share == 0.01 and result.best.decay_threshold == 1e-17
    assert result.best.reduction == "fastest" and list(result.best.layers) == [1]
    assert result.row.share == 1.0 and result.row.cost == pytest.approx(0.01)
    assert result.within_limit and result.stopped is None and not result.notes


def test_the_table_tells_the_whole_search(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    costs(usual_cost)
    told: list[tuple[int, int]] = []
    result = search_with(
        calibration, progress=lambda row, done, planned: told.append((done, planned))
    )
    stages = [row.stage for row in result.table]
    assert stages == [
        "unmodified", *["clamp and threshold"] * 4, "reduction", "layers", "confirmation",
    ]  # fmt: skip
    assert result.table[0].share == 0.0 and result.table[0].cost == 0.0
    assert result.row is result.table[-1] and result.row.trials == 6
    assert told == [(i + 1, 9) for i in range(8)]
    stored = json.loads(json.dumps(result.to_json()))
    assert stored["best"] == json.loads(json.dumps(result.best.describe()))
    assert len(stored["table"]) == 8


def test_a_setting_that_costs_far_too_much_is_not_asked(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    costs(lambda method: 0.5 if method.decay_threshold == 1e-30 else 0.01)
    result = search_with(calibration)
    measured = [row for row in result.table if row.stage == "clamp and threshold"]
    dear = [row for row in measured if row.options["decay_threshold"] == 1e-30]
    assert len(dear) == 2 and all((row.share is None) == (row in dear) for row in measured)
    assert result.best.decay_threshold == 1e-17


def test_a_setting_that_is_too_dear_may_become_cheap_by_leaving_out_a_layer(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    costs(lambda method: 0.06 if filters(method, 0) else 0.02)
    result = search_with(calibration)
    assert list(result.best.layers) == [1] and result.within_limit


def test_if_nothing_stays_within_the_limit_the_cheapest_is_given_and_said(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    costs(lambda method: 0.9 if method.clamp_share == 0.01 else 0.8)
    result = search_with(calibration)
    assert not result.within_limit and result.row.cost == 0.8
    assert any("no setting stays within 3.0%" in note for note in result.notes)


THREE_BY_THREE = Candidates((0.05, 0.02, 0.01), (1e-13, 1e-17, 1e-22), ("fastest",), layers=False)


def pairs_of(result: TuneResult) -> list[tuple[float, float]]:
    rows = [row for row in result.table if row.stage == "clamp and threshold"]
    return [(row.options["clamp_share"], row.options["decay_threshold"]) for row in rows]


def test_the_axes_are_searched_in_turn_until_the_best_pair_stays(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    rises = {1e-13: 0.02, 1e-17: 0.01, 1e-22: 0.04}
    costs(lambda method: rises[method.decay_threshold])
    result = search_with(calibration, candidates=THREE_BY_THREE)
    assert pairs_of(result) == [
        (0.05, 1e-13), (0.02, 1e-13), (0.01, 1e-13), (0.01, 1e-17), (0.01, 1e-22),
        (0.05, 1e-17), (0.02, 1e-17),
    ]  # fmt: skip
    assert (result.best.clamp_share, result.best.decay_threshold) == (0.01, 1e-17)


def test_if_the_axes_find_no_key_every_pair_is_tried(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    costs(lambda _: 0.01)

    def rule(length: int, model: Any) -> bool:
        return usual_rule(length, model) and model.widefield.methods[0].decay_threshold < 1e-20

    result = search_with(calibration, rule, candidates=THREE_BY_THREE)
    assert len(pairs_of(result)) == len(set(pairs_of(result))) == 9
    assert (result.best.clamp_share, result.best.decay_threshold) == (0.01, 1e-22)


def test_the_table_makes_a_picture(
    calibration: Calibration, costs: Callable[[Costs], None], tmp_path: Path
) -> None:
    costs(usual_cost)
    result = search_with(calibration)
    points = tuned_points(result)
    assert [point.label for point in points if point.chosen] == ["1e-17, layers 1"]
    assert {point.group for point in points} == {"unmodified", "C = 1.0%", "C = 5.0%"}
    assert frontier(points, tmp_path / "frontier.png", limit=0.03).exists()


def test_a_setting_that_led_by_luck_falls_back_when_confirmed(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    costs(lambda method: 0.01 if method.clamp_share == 0.05 else 0.02)
    asked = {0.05: 0, 0.01: 0}

    def lucky(length: int, model: Any) -> bool:
        method = next(iter(model.widefield.methods), None)
        if method is None:
            return False
        asked[method.clamp_share] += 1
        return method.clamp_share == 0.01 or asked[0.05] <= 4

    candidates = Candidates((0.05, 0.01), (1e-17,), ("fastest",), layers=False)
    result = search_with(calibration, lucky, candidates=candidates, confirmation=4)
    assert [row.stage for row in result.table[-2:]] == ["confirmation"] * 2
    assert [row.share for row in result.table[-2:]] == [0.5, 1.0]
    assert result.best.clamp_share == 0.01


def test_the_budget_ends_the_search_with_the_best_so_far(
    calibration: Calibration, costs: Callable[[Costs], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs(usual_cost)
    now = iter(range(1000))
    monkeypatch.setattr(search.time, "perf_counter", lambda: float(next(now)))
    result = search_with(calibration, budget_seconds=20.0)
    assert result.stopped == "budget" and 2 <= len(result.table) < 8
    assert "stopped after 20 s" in result.notes[0]


def test_a_budget_without_a_single_setting_is_an_error(calibration: Calibration) -> None:
    with pytest.raises(WidefieldError, match="ended before the first setting"):
        search_with(calibration, budget_seconds=0.0)


def test_an_interruption_gives_the_table_so_far(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    costs(usual_cost)

    def interrupt(row: TuneRow, done: int, planned: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    result = search_with(calibration, progress=interrupt)
    assert result.stopped == "interrupted" and len(result.table) == 5
    assert result.best.clamp_share == 0.01


def test_a_real_model_is_tuned_on_its_own_bits_and_left_as_it_was(calibration: Calibration) -> None:
    model = tiny_mamba()
    kind = type(model)
    candidates = Candidates((0.05,), (1e-17,), ("fastest",), layers=False)
    result = tune(
        model, calibration, ByT5Tokenizer(), haystack=TEXT, lengths=(256,), trials=1,
        confirmation=0, windows=1, last=16, candidates=candidates,
    )  # fmt: skip
    assert type(model) is kind and len(result.table) == 2
    assert result.row.bits > 7 and abs(result.row.cost) < 0.1
    assert "no key was retrieved" in result.notes[-1]


def test_bad_input_is_refused(calibration: Calibration) -> None:
    with pytest.raises(WidefieldError, match="too short for the passkey task"):
        search_with(calibration, lengths=(100,))
    with pytest.raises(WidefieldError, match="no text has 256 tokens"):
        search_with(calibration, texts=["short"])
    with pytest.raises(WidefieldError, match="give at least 1"):
        search_with(calibration, trials=0)
    with pytest.raises(WidefieldError, match="no clamp_shares"):
        Candidates(clamp_shares=())
    with pytest.raises(WidefieldError, match="belongs to"):
        tune(tiny_mamba(seed=1), calibration, ByT5Tokenizer(), haystack=TEXT, lengths=(256,))


def test_settings_that_filter_nothing_are_passed_over(
    calibration: Calibration, costs: Callable[[Costs], None]
) -> None:
    costs(usual_cost)
    some = Candidates((0.01,), (0.999999, 1e-17), ("fastest",), layers=False)
    result = search_with(calibration, candidates=some)
    assert result.best.decay_threshold == 1e-17
    none = Candidates((0.01,), (0.999999,), ("fastest",), layers=False)
    with pytest.raises(WidefieldError, match="none is global"):
        search_with(calibration, candidates=none)

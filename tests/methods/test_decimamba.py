from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.derivation import clamp_value, is_global, kept_rows
from tests.samples import LENGTH, calibrate_layers, draw, layout_of
from widefield import ops
from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.methods import DeciMamba, find_first_layer
from widefield.plan import LayerPlan, Pool, ScanInputs

CHANNELS = 6
DELTAS = tuple(draw("lognormal", 1024, CHANNELS, seed) for seed in range(3))
RATES = tuple(np.random.default_rng(i).lognormal(0, 2, (CHANNELS, 2)) for i in range(3))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate_layers(*DELTAS, rates=RATES)


def inputs_of(delta: torch.Tensor, padding: tuple[int, ...] | None = None) -> ScanInputs:
    """Scan inputs (B, L, D) with this Δ; x counts the tokens, so that kept ones can be told."""
    batch, length, channels = delta.shape
    position = torch.arange(length, dtype=torch.float32)[None, :, None]
    valid = None
    if padding is not None:
        valid = torch.arange(length)[None] >= torch.tensor(padding)[:, None]
    return ScanInputs(
        x=position.expand(batch, length, channels),
        delta=delta,
        A=-torch.ones(channels, 2),
        B=torch.zeros(batch, length, 2),
        C=torch.zeros(batch, length, 2),
        delta_softplus=False,
        valid=valid,
    )


def rows_kept(delta: torch.Tensor, pool: Pool, padding: tuple[int, ...] | None) -> list[list[int]]:
    """Positions that `ops.pool_tokens` keeps of every row; its inputs must be gathered alike."""
    kept, rows = ops.pool_tokens(inputs_of(delta, padding), pool)
    assert torch.equal(kept.x[..., 0], rows.index.float())
    index = rows.index.tolist()
    if rows.valid is None:
        return index
    pairs = zip(index, rows.valid.tolist(), strict=True)
    return [[i for i, good in zip(*pair, strict=True) if good] for pair in pairs]


def whole_numbers(kind: str, batch: int, length: int) -> torch.Tensor:
    """Δ whose squares add up exactly, so that ties are ties whatever the order of the sum."""
    generator = torch.Generator().manual_seed(3)
    delta = torch.randint(0, 9, (batch, length, CHANNELS), generator=generator).float()
    if kind == "constant":
        delta[:] = 2
    elif kind == "zeros":
        delta[:] = 0
    elif kind == "heavy":
        delta[:, ::7, 1] = 3000
    elif kind == "ties":
        delta[:] = delta[:, :1] * (torch.arange(length) % 3)[None, :, None]
    return delta


@pytest.mark.parametrize("kind", ["random", "constant", "zeros", "heavy", "ties"])
@pytest.mark.parametrize("keep", [1, 2, 7, 39, 40, 1000])
@pytest.mark.parametrize("protect", [1, 5, 60])
def test_kept_rows_are_those_of_the_derivation(kind: str, keep: int, protect: int) -> None:
    method = DeciMamba(layers=(0,), base_length=keep, min_length=1, protect=protect)
    delta = whole_numbers(kind, 3, 40)
    padding = (0, 13, 37)
    pool = method.pool(0)
    assert pool.keep == max(keep, protect)
    for pads in (None, padding):
        wanted = [
            kept_rows(row.numpy(), pool.keep, protect, pad)
            for row, pad in zip(delta, pads or (0, 0, 0), strict=True)
        ]
        assert rows_kept(delta, pool, pads) == wanted
        assert all(row[-1] == 39 for row in wanted)


@given(
    data=st.data(),
    length=st.integers(1, 24),
    keep=st.integers(1, 30),
    protect=st.integers(1, 8),
)
def test_any_whole_numbered_delta_keeps_the_rows_of_the_derivation(
    data: st.DataObject, length: int, keep: int, protect: int
) -> None:
    cells = st.lists(st.integers(0, 4), min_size=2 * length, max_size=2 * length)
    delta = torch.tensor(data.draw(cells), dtype=torch.float32).reshape(1, length, 2)
    padding = data.draw(st.integers(0, length - 1))
    pool = DeciMamba(layers=(0,), base_length=keep, min_length=1, protect=protect).pool(0)
    wanted = kept_rows(delta[0].numpy(), pool.keep, protect, padding)
    assert rows_kept(delta, pool, (padding,)) == [wanted]


@pytest.mark.parametrize("score", ["norm", "clamped", "global"])
def test_scores_are_those_of_the_derivation(calibration: Calibration, score: str) -> None:
    method = DeciMamba(
        layers=(1,), base_length=30, score=score, calibration=calibration, clamp_share=0.05,
        decay_threshold=1e-20, reduction="mean",
    )  # fmt: skip
    cap = weight = None
    if score != "norm":
        cap = np.array([clamp_value(DELTAS[1][:, d], 0.05) for d in range(CHANNELS)])
    if score == "global":
        weight = np.array([
            is_global(DELTAS[1][:, d], RATES[1][d], LENGTH, "mean", 1e-20) for d in range(CHANNELS)
        ])  # fmt: skip
        assert 0 < weight.sum() < CHANNELS
    delta = torch.from_numpy(draw("lognormal", 400, CHANNELS, 9))
    (ours,) = rows_kept(delta[None], method.pool(1), None)
    wanted = kept_rows(delta.numpy(), 30, 1, 0, cap, weight)
    assert len(set(ours) ^ set(wanted)) <= (0 if score == "norm" else 4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_delta_is_an_error_unless_it_is_padding(bad: float) -> None:
    delta = torch.rand(2, 20, CHANNELS)
    delta[1, 2, 3] = bad
    pool = DeciMamba(layers=(0,), base_length=5, min_length=1).pool(0)
    with pytest.raises(WidefieldError, match="non-finite Δ"):
        rows_kept(delta, pool, None)
    assert len(rows_kept(delta, pool, (0, 6))[1]) == 5


def test_each_decimating_layer_keeps_fewer_tokens_down_to_the_least() -> None:
    method = DeciMamba(layers=(3, 5, 6, 9), base_length=1001, shrink=0.5, min_length=200)
    assert [method.keep(layer) for layer in method.layers] == [1001, 500, 250, 200]
    assert DeciMamba(layers=(3, 5), base_length=100, shrink=1.0).keep(5) == 100
    assert DeciMamba(layers=(3,), base_length=4, min_length=1, protect=9).keep(3) == 9


def test_a_short_prefill_and_other_layers_stay_as_they_are() -> None:
    method = DeciMamba(layers=(3,), base_length=100)
    assert method.plan(3, (100,)) == LayerPlan()
    assert method.plan(2, (5000,)) == LayerPlan()
    plan = method.plan(3, (50, 101))
    assert plan == LayerPlan(pool=Pool(keep=100, protect=1))


def test_layers_that_exist_may_drop_tokens_if_the_model_can(calibration: Calibration) -> None:
    layout = layout_of(calibration)
    DeciMamba(layers=(0, 2)).validate(layout)
    with pytest.raises(WidefieldError, match=r"layers=\[2, 3\].*no Mamba layer 3; it has 0, 1, 2"):
        DeciMamba(layers=(2, 3)).validate(layout)
    stuck = layout_of(calibration, decimation="its attention layers share one mask")
    with pytest.raises(WidefieldError, match="its attention layers share one mask"):
        DeciMamba(layers=(0,)).validate(stuck)


def test_a_score_from_a_calibration_needs_the_right_one(calibration: Calibration) -> None:
    with pytest.raises(WidefieldError, match="score='global' needs a calibration"):
        DeciMamba(layers=(0,), score="global")
    method = DeciMamba(layers=(0,), score="clamped", calibration=calibration)
    method.validate(layout_of(calibration))
    with pytest.raises(WidefieldError, match="belongs to"):
        method.validate(layout_of(calibration, fingerprint="beef"))
    blind = DeciMamba(layers=(0,), score="global", calibration=calibration, decay_threshold=0.9999)
    with pytest.raises(WidefieldError, match="no global channel in layer 0"):
        blind.validate(layout_of(calibration))


BAD = {
    r"layers=\[\]: expected the indices": {"layers": []},
    r"layers=\[4, 3\]: expected": {"layers": [4, 3]},
    r"layers=\[-1\]: expected": {"layers": [-1]},
    "base_length=0: expected tokens": {"base_length": 0},
    "base_length=2.5": {"base_length": 2.5},
    "min_length=0": {"min_length": 0},
    "protect=0": {"protect": 0},
    "shrink=0: expected β above 0": {"shrink": 0},
    "shrink=1.5": {"shrink": 1.5},
    "unknown score 'nrom': did you mean 'norm'": {"score": "nrom"},
    "unknown reduction": {"reduction": "quick"},
    "unknown residual 'ful': did you mean 'full'": {"residual": "ful"},
    "decay_threshold=1": {"decay_threshold": 1},
    "clamp_share=0": {"clamp_share": 0},
}


@pytest.mark.parametrize(("said", "options"), BAD.items(), ids=BAD)
def test_options_out_of_range_are_refused(said: str, options: dict[str, object]) -> None:
    with pytest.raises(WidefieldError, match=said):
        DeciMamba(**{"layers": (0,), **options})  # type: ignore[arg-type]


def test_options_survive_a_trip_through_plain_values(calibration: Calibration) -> None:
    method = DeciMamba(
        layers=(0, 2), base_length=7, score="global", calibration=calibration, residual="full"
    )
    assert DeciMamba(calibration=calibration, **method.describe()) == method
    assert DeciMamba(layers=2) == DeciMamba(layers=(2,))  # type: ignore[arg-type]


def test_the_best_first_layer_is_found_by_trying_each(calibration: Calibration) -> None:
    worth = {0: 0.2, 1: 0.9, 2: 0.9}
    best, table = find_first_layer(
        lambda method: worth[method.layers[0]], layout_of(calibration), base_length=50
    )
    assert table == worth
    assert best == DeciMamba(layers=(1,), base_length=50)


def test_layers_without_a_score_are_left_out_of_the_search(calibration: Calibration) -> None:
    options = {"score": "global", "calibration": calibration, "reduction": "slowest"}
    shares = [
        max(np.exp(-rates.min(1) * LENGTH * delta.mean(0)))
        for delta, rates in zip(DELTAS, RATES, strict=True)
    ]
    threshold = sorted(shares)[1] * 0.999
    _, table = find_first_layer(
        lambda method: 1.0, layout_of(calibration), decay_threshold=threshold, **options
    )
    assert sorted(table) == sorted(np.argsort(shares)[1:].tolist())
    stuck = layout_of(calibration, decimation="no")
    with pytest.raises(WidefieldError, match=r"cannot drop tokens.*residual='full'"):
        find_first_layer(lambda method: 1.0, stuck)
    best, _ = find_first_layer(lambda method: 1.0, stuck, residual="full")
    assert best.pool(best.layers[0]).scatter

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.methods.derivation import filtered_scan, is_global, kept_by_threshold
from tests.samples import LENGTH, calibrate_layers, draw, layout_of
from widefield import ops
from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.methods import LongMamba
from widefield.plan import LayerPlan, ScanInputs

CHANNELS, STATES = 12, 4
DELTAS = (
    draw("lognormal", 1024, CHANNELS, 1),
    draw("two modes", 1024, CHANNELS, 2),
    draw("gamma", 1024, CHANNELS, 3),
)
_rng = np.random.default_rng(0)
# So fast that some channels of every layer are global at Th = 1e-30 and some are not.
RATES = tuple(
    _rng.lognormal(-1, 1.5, (CHANNELS, STATES)) * 69 / (LENGTH * delta.mean()) for delta in DELTAS
)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate_layers(*DELTAS, rates=RATES)


def floors(plan: LayerPlan) -> torch.Tensor:
    assert plan.delta_floor is not None
    return plan.delta_floor


@pytest.mark.parametrize("reduction", ["slowest", "mean", "fastest"])
@pytest.mark.parametrize("threshold", [1e-5, 1e-30, 1e-300])
def test_global_channels_are_those_of_the_derivation(
    calibration: Calibration, reduction: str, threshold: float
) -> None:
    method = LongMamba(calibration, decay_threshold=threshold, reduction=reduction)
    for layer, (delta, rates) in enumerate(zip(DELTAS, RATES, strict=True)):
        wanted = [
            is_global(delta[:, d], rates[d].astype(np.float32), LENGTH, reduction, threshold)
            for d in range(CHANNELS)
        ]
        assert method.selected(layer).tolist() == wanted


@pytest.mark.parametrize("clamp", [None, 0.2, 0.01])
@pytest.mark.parametrize("ratio", [2, 16, 256])
def test_frozen_tokens_are_those_of_the_derivation(
    calibration: Calibration, clamp: float | None, ratio: int
) -> None:
    method = LongMamba(calibration, clamp_share=clamp)
    for layer, delta in enumerate(DELTAS):
        floor = floors(method.plan(layer, (ratio * LENGTH,))).numpy()
        chosen = method.selected(layer).numpy()
        assert (floor[~chosen] == 0).all()
        for d in np.flatnonzero(chosen):
            kept = delta[:, d] >= floor[d]
            wanted = kept_by_threshold(delta[:, d], ratio, clamp)
            assert (kept != wanted).sum() <= 1 + 0.02 * wanted.sum()


def scan_inputs(seed: int, length: int, spread: float) -> ScanInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return ScanInputs(
        x=normal(1, length, CHANNELS),
        delta=torch.exp(normal(1, length, CHANNELS) * spread - 2),
        A=-torch.exp(normal(CHANNELS, STATES)),
        B=normal(1, length, STATES),
        C=normal(1, length, STATES),
        D=normal(CHANNELS),
        delta_softplus=False,
    )


def adversarial(inputs: ScanInputs, kind: str, floor: torch.Tensor) -> ScanInputs:
    """Δ at, just below and just above the floors, all alike, or none at all."""
    delta = inputs.delta.clone()
    if kind == "at the floor":
        delta[0, 0::3] = floor
        delta[0, 1::3] = torch.nextafter(floor, torch.zeros_like(floor))
        delta[0, 2::3] = torch.nextafter(floor, torch.ones_like(floor))
    elif kind == "constant":
        delta[:] = 0.2
    elif kind == "zeros":
        delta[:, ::2] = 0
    elif kind == "heavy":
        delta[:, 5] = 1e4
    return inputs.replace(delta=delta)


@pytest.mark.parametrize("kind", ["random", "at the floor", "constant", "zeros", "heavy"])
def test_a_frozen_token_leaves_the_state_and_still_gives_its_output(
    calibration: Calibration, kind: str
) -> None:
    method = LongMamba(calibration, clamp_share=0.05)
    plan = method.plan(1, (8 * LENGTH,))
    plan = LayerPlan(delta_floor=floors(plan).double())
    inputs = adversarial(scan_inputs(0, 24, 1.5), kind, floors(plan))
    y, state = ops.selective_scan(inputs, plan)
    numbers = (
        t[0].numpy() if t.ndim == 3 else t.numpy()
        for t in (inputs.delta, inputs.A, inputs.B, inputs.C, inputs.x, inputs.D)
        if t is not None
    )  # fmt: skip
    wanted, last, frozen = filtered_scan(*numbers, floors(plan).numpy())
    np.testing.assert_allclose(y[0].numpy(), wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state[0].numpy(), last, rtol=1e-9, atol=1e-12)
    assert ((ops.effective_delta(inputs, plan)[0] == 0).numpy() == (frozen | (
        inputs.delta[0] == 0).numpy())).all()  # fmt: skip
    if kind in ("random", "heavy", "at the floor"):
        assert frozen.any() and not frozen.all()


def test_nothing_is_filtered_up_to_the_training_length(calibration: Calibration) -> None:
    for step in (None, 1000):
        method = LongMamba(calibration, table_step=step)
        for length in (1, LENGTH - 1, LENGTH):
            assert method.plan(0, (length,)) == LayerPlan()
        assert method.plan(0, (LENGTH + 200,)) != LayerPlan()


def test_rows_of_different_lengths_have_thresholds_of_their_own(calibration: Calibration) -> None:
    method = LongMamba(calibration)
    rows = (LENGTH, 4 * LENGTH, 40 * LENGTH)
    floor = floors(method.plan(2, rows))
    assert floor.shape == (3, CHANNELS)
    assert (floor[0] == 0).all()
    for row, length in zip(floor[1:], rows[1:], strict=True):
        assert torch.equal(row, floors(method.plan(2, (length,))))
    assert method.plan(2, (LENGTH, LENGTH - 3)) == LayerPlan()


def test_thresholds_only_rise_with_length(calibration: Calibration) -> None:
    method = LongMamba(calibration)
    before = torch.zeros(CHANNELS)
    for length in (LENGTH + 1, 2 * LENGTH, 5 * LENGTH, 100 * LENGTH, 10_000 * LENGTH):
        floor = floors(method.plan(0, (length,)))
        assert (floor >= before).all()
        before = floor


def test_a_share_of_one_means_no_clamp(calibration: Calibration) -> None:
    with_one, with_none = (LongMamba(calibration, clamp_share=c) for c in (1.0, None))
    assert with_one == with_none
    assert with_one.describe()["clamp_share"] is None


def test_the_clamp_that_follows_keeps_a_few_training_lengths_of_tokens(
    calibration: Calibration,
) -> None:
    method = LongMamba(calibration, clamp_share="follow", clamp_floor=0.01, clamp_kappa=2.0)
    assert method.plan(0, (2 * LENGTH,)) == LayerPlan()
    for ratio, share in ((4, 0.5), (100, 0.02), (1000, 0.01)):
        assert method.clamp_at(ratio * LENGTH) == pytest.approx(share)
        fixed = LongMamba(calibration, clamp_share=share)
        length = (ratio * LENGTH,)
        assert torch.equal(floors(method.plan(0, length)), floors(fixed.plan(0, length)))


def test_the_table_is_looked_up_at_the_next_step(calibration: Calibration) -> None:
    table, exact = LongMamba(calibration, table_step=1000), LongMamba(calibration)
    for length, entry in ((LENGTH + 1, 1000), (1000, 1000), (1001, 2000), (64_000, 64_000)):
        assert torch.equal(floors(table.plan(0, (length,))), floors(exact.plan(0, (entry,))))


def test_the_papers_ablations_choose_other_channels(calibration: Calibration) -> None:
    options = {"decay_threshold": 1e-30, "reduction": "mean"}
    far = LongMamba(calibration, **options)
    near = LongMamba(calibration, channels="local", **options)
    for layer in range(3):
        assert torch.equal(near.selected(layer), ~far.selected(layer))
        chance = LongMamba(calibration, channels="random", seed=1, **options).selected(layer)
        again = LongMamba(calibration, channels="random", seed=1, **options).selected(layer)
        assert torch.equal(chance, again)
        assert chance.sum() == far.selected(layer).sum()
    draws = {
        tuple(LongMamba(calibration, channels="random", seed=s, **options).selected(0).tolist())
        for s in range(5)
    }
    assert len(draws) > 1


def test_only_the_chosen_layers_are_filtered(calibration: Calibration) -> None:
    method = LongMamba(calibration, layers=[0, 2])  # type: ignore[arg-type]
    assert method.layers == (0, 2)
    length = (10 * LENGTH,)
    assert method.plan(1, length) == LayerPlan()
    whole = LongMamba(calibration)
    assert torch.equal(floors(method.plan(2, length)), floors(whole.plan(2, length)))


def test_top_layers_are_those_with_the_largest_mean_decay(calibration: Calibration) -> None:
    means = []
    for delta, rates in zip(DELTAS, RATES, strict=True):
        decay = np.exp(-rates.max(1) * LENGTH * delta.astype(np.float64).mean(0))
        means.append(decay.mean())
    best = sorted(np.argsort(means)[::-1][:2].tolist())
    assert list(LongMamba(calibration, top_layers=2).chosen_layers()) == best
    assert LongMamba(calibration, top_layers=9).chosen_layers() == (0, 1, 2)


def test_options_survive_a_trip_through_plain_values(calibration: Calibration) -> None:
    method = LongMamba(calibration, clamp_share="follow", layers=(1,), top_layers=1, table_step=500)
    options = method.describe()
    assert LongMamba(calibration, **options) == method
    assert set(options) == {
        "decay_threshold", "clamp_share", "clamp_floor", "clamp_kappa", "reduction", "channels",
        "layers", "top_layers", "table_step", "seed",
    }  # fmt: skip


def test_presets_have_the_published_settings(calibration: Calibration) -> None:
    small = LongMamba.preset("mamba-1.4b", calibration)
    assert (small.decay_threshold, small.clamp_share) == (1e-30, 0.20)
    other = LongMamba.preset("zamba2", calibration, clamp_share=None)
    assert (other.decay_threshold, other.clamp_share) == (1e-5, None)
    for size in ("zamba2-1.2b", "zamba2-2.7b"):
        hybrid = LongMamba.preset(size, calibration)
        assert (hybrid.decay_threshold, hybrid.clamp_share) == (1e-5, 0.05)
    second = LongMamba.preset("mamba2-1.3b", calibration)
    assert (second.decay_threshold, second.clamp_share) == (5e-2, 0.05)
    with pytest.raises(WidefieldError, match=r"did you mean .*'mamba2-1.3b'"):
        LongMamba.preset("mamba2-1.4", calibration)


BAD = {
    "decay_threshold=0: expected Th between 0 and 1": {"decay_threshold": 0},
    "decay_threshold=1.5": {"decay_threshold": 1.5},
    "decay_threshold='low'": {"decay_threshold": "low"},
    "decay_threshold=nan": {"decay_threshold": math.nan},
    "clamp_share=0.0: expected C between 0 and 1, None": {"clamp_share": 0.0},
    "clamp_share=True": {"clamp_share": True},
    "unknown clamp_share 'folow': did you mean 'follow'": {"clamp_share": "folow"},
    "clamp_kappa=-1": {"clamp_kappa": -1},
    "clamp_floor=2": {"clamp_floor": 2},
    "unknown reduction 'fast': did you mean 'fastest'": {"reduction": "fast"},
    "unknown channels 'globl'": {"channels": "globl"},
    "layers='some': expected the indices": {"layers": "some"},
    r"layers=\(2, 1\): expected": {"layers": (2, 1)},
    r"layers=\[\]: expected": {"layers": []},
    "top_layers=0: expected how many layers": {"top_layers": 0},
    "table_step=0": {"table_step": 0},
    "seed=-1": {"seed": -1},
}


@pytest.mark.parametrize(("said", "options"), BAD.items(), ids=BAD)
def test_options_out_of_range_are_refused(
    calibration: Calibration, said: str, options: dict[str, object]
) -> None:
    with pytest.raises(WidefieldError, match=said):
        LongMamba(calibration, **options)  # type: ignore[arg-type]


def test_a_calibration_is_needed() -> None:
    with pytest.raises(WidefieldError, match="LongMamba needs a Calibration"):
        LongMamba(None)  # type: ignore[arg-type]


def test_a_model_that_was_not_calibrated_is_refused(calibration: Calibration) -> None:
    method = LongMamba(calibration)
    method.validate(layout_of(calibration))
    with pytest.raises(WidefieldError, match=r"belongs to .* the model is"):
        method.validate(layout_of(calibration, fingerprint="beef"))
    with pytest.raises(WidefieldError, match="has no Mamba layer 7; it has 0, 1, 2"):
        LongMamba(calibration, layers=(1, 7)).validate(layout_of(calibration))


def test_a_method_that_could_not_act_says_so(calibration: Calibration) -> None:
    layout = layout_of(calibration)
    with pytest.raises(WidefieldError, match=r"none of the 36 channels of 3 layers.*lower decay"):
        LongMamba(calibration, decay_threshold=0.999999).validate(layout)
    slow = calibrate_layers(DELTAS[0], rates=(1e-3 * RATES[0],))
    with pytest.raises(WidefieldError, match="all are global; raise decay_threshold"):
        LongMamba(slow, channels="local").validate(layout_of(slow))

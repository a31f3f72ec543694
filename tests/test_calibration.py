from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.methods.derivation import clamp_value, kept_by_threshold
from tests.samples import SHAPES, calibrate_layer, calibrate_layers, draw, layout_of
from widefield.calibration import Calibration, DeltaSketch, LayerCalibration, encoding
from widefield.errors import WidefieldError

RATIOS = (1.001, 1.5, 8.0, 64.0, 1000.0)
CLAMPS = (None, 0.2, 0.01)


def budget_errors(
    layer: LayerCalibration, delta: np.ndarray, ratio: float, clamp: float | None
) -> np.ndarray:
    """How far the kept mass is from the derivation's, beyond one token, by the budget."""
    g = layer.threshold(ratio, clamp).numpy()
    errors = []
    for d in range(delta.shape[1]):
        column = delta[:, d].astype(np.float64)
        clamped = np.minimum(column, clamp_value(column, clamp))
        ours, wanted = column >= g[d], kept_by_threshold(column, ratio, clamp)
        token = clamped[ours != wanted].max(initial=0.0)
        apart = abs(clamped[ours].sum() - clamped[wanted].sum()) - token
        budget = max(clamped.sum() / ratio, clamped[wanted].sum())
        errors.append(max(0.0, apart) / budget)
    return np.array(errors)


@pytest.mark.parametrize("shape", SHAPES)
def test_thresholds_keep_the_budget_within_two_percent_of_a_straight_derivation(
    shape: str,
) -> None:
    delta = draw(shape, 4096, 4)
    layer = calibrate_layer(delta)
    allowed = 0.04 if shape == "near atoms" else 0.02
    for ratio in RATIOS:
        for clamp in CLAMPS:
            assert budget_errors(layer, delta, ratio, clamp).max() <= allowed, (ratio, clamp)


@pytest.mark.parametrize("shape", ["gamma", "lognormal", "two modes", "narrow"])
def test_the_form_for_large_models_keeps_the_budget_within_two_percent(shape: str) -> None:
    delta = draw(shape, 4096, 8, seed=1)
    layer = calibrate_layer(delta, finest=0.012)
    errors = [budget_errors(layer, delta, r, c) for r in RATIOS for c in CLAMPS]
    assert np.max(errors) <= 0.02


def test_the_quantile_function_is_that_of_the_samples() -> None:
    delta = draw("lognormal", 8192, 4)
    layer = calibrate_layer(delta)
    for share in (0.0, 0.001, 0.01, 0.2, 0.5, 0.9, 1.0):
        reached = (delta >= layer.quantile(share).numpy()).mean(0)
        assert np.abs(reached - share).max() <= 0.01 * share + 1.5 / len(delta)
    assert torch.equal(layer.quantile(0), torch.from_numpy(delta.max(0)))
    assert torch.equal(layer.quantile(1), torch.from_numpy(delta.min(0)))


def test_the_mean_is_exact_and_the_stored_mass_agrees_with_it() -> None:
    delta = draw("gamma", 8192, 4)
    layer = calibrate_layer(delta)
    mean = delta.astype(np.float64).mean(0)
    np.testing.assert_allclose(layer.mean_delta.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(layer.kept_mass(torch.zeros(4)).numpy(), mean, rtol=0.01)
    g = torch.from_numpy(np.median(delta, 0))
    kept = np.where(delta >= g.numpy(), delta, 0).sum(0, dtype=np.float64)
    np.testing.assert_allclose(layer.kept_mass(g).numpy(), kept / len(delta), rtol=0.01)
    np.testing.assert_allclose(layer.kept_share(g).numpy(), 0.5, atol=0.01)


@given(
    values=st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=300),
    clamp=st.sampled_from([None, 0.003, 0.05, 0.5]),
)
def test_thresholds_rise_with_length_and_keep_the_clamped_share(
    values: list[float], clamp: float | None
) -> None:
    delta = np.array(values, np.float32)[:, None]
    layer = calibrate_layer(delta)
    before = -1.0
    for ratio in (0.5, 1.0, 1.01, 1.5, 3.0, 30.0, 1000.0, 1e6):
        g = float(layer.threshold(ratio, clamp)[0])
        assert np.isfinite(g) and g >= before
        before = g
        if clamp is not None:
            floor = clamp * len(values) * 0.98 - 1
            assert (delta >= g).sum() >= floor
        if ratio <= 1:
            assert g == 0


@given(values=st.lists(st.sampled_from([0.0, 1e-6, 0.25, 1.0, 40.0]), min_size=1, max_size=200))
def test_ties_are_kept_or_frozen_as_the_derivation_says(values: list[float]) -> None:
    delta = np.array(values, np.float32)[:, None]
    layer = calibrate_layer(delta)
    for ratio in (1.5, 4.0, 50.0):
        ours = delta[:, 0] >= float(layer.threshold(ratio)[0])
        wanted = kept_by_threshold(delta[:, 0], ratio, None)
        apart = set(delta[ours != wanted, 0].tolist())
        assert len(apart) <= 1
        if apart:
            (value,) = apart
            border = delta[delta[:, 0] >= value].sum(dtype=np.float64)
            budget = delta.sum(dtype=np.float64) / ratio
            tie = (delta == value).sum() * value
            assert abs(border - budget) <= 0.03 * budget + 1.5 * value or tie <= 0.02 * budget


def test_a_constant_channel_keeps_all_with_a_clamp_and_nothing_without() -> None:
    layer = calibrate_layer(np.full((500, 3), 0.2, np.float32))
    assert torch.equal(layer.quantile(0.3), torch.full((3,), 0.2))
    assert (layer.threshold(8.0, 0.01) <= 0.2).all()
    assert (layer.threshold(8.0) > 0.2).all()


def test_a_channel_without_any_delta_is_never_filtered() -> None:
    layer = calibrate_layer(np.zeros((50, 2), np.float32))
    assert torch.equal(layer.threshold(100.0), torch.zeros(2))
    assert torch.equal(layer.threshold(100.0, 0.01), torch.zeros(2))
    assert (layer.kept_mass(torch.zeros(2)) < 1e-30).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
def test_fewer_tokens_than_knots_are_enough(tokens: int) -> None:
    delta = draw("lognormal", tokens, 5)
    layer = calibrate_layer(delta)
    assert torch.equal(layer.highest, torch.from_numpy(delta.max(0)))
    for ratio in (1.5, 10.0):
        assert torch.isfinite(layer.threshold(ratio, 0.1)).all()
        assert (budget_errors(layer, delta, ratio, None) <= 0.35).all()


def test_extreme_values_stay_finite() -> None:
    delta = np.array([[1e-38, 3e37, 1e-45, 1.0]], np.float32).repeat(40, 0)
    delta[::7] = np.array([3e38, 1e-30, 0.0, 3e38], np.float32)
    layer = calibrate_layer(delta)
    for ratio in (1.1, 5.0, 1e4):
        assert torch.isfinite(layer.threshold(ratio, 0.05)).all()
        assert not torch.isnan(layer.threshold(ratio)).any()


def test_the_state_of_a_sketch_does_not_grow_with_the_number_of_tokens() -> None:
    sketch = DeltaSketch(4)
    sizes = []
    for seed in range(12):
        sketch.update(torch.from_numpy(draw("gamma", 1500, 4, seed)))
        sizes.append(sketch.nbytes)
    assert sketch.tokens == 12 * 1500
    assert len(set(sizes)) == 1


def test_a_long_stream_is_known_as_well_as_a_short_one() -> None:
    delta = np.concatenate([draw("two modes", 1000, 3, seed) for seed in range(40)])
    sketch = DeltaSketch(3)
    for chunk in np.split(delta, 40):
        sketch.update(torch.from_numpy(chunk))
    for d in range(3):
        middle = sketch.weights[d].cumsum(0) - sketch.weights[d] / 2
        for i in range(0, sketch.capacity, 37):
            above = (delta[:, d] >= float(sketch.values[d, i])).sum()
            assert abs(float(middle[i]) - above) <= 0.02 * above + 2


def test_merged_sketches_are_one_sketch_of_all() -> None:
    delta = torch.from_numpy(draw("softplus", 6000, 3))
    left, right, whole = DeltaSketch(3), DeltaSketch(3), DeltaSketch(3)
    left.update(delta[:2000])
    right.update(delta[2000:])
    whole.update(delta)
    left.merge(right)
    assert left.tokens == whole.tokens
    np.testing.assert_allclose(left.total.numpy(), whole.total.numpy())
    A = -torch.ones(3, 1)
    ours, theirs = (LayerCalibration.from_sketch(s, A) for s in (left, whole))
    for ratio in (2.0, 100.0):
        np.testing.assert_allclose(
            ours.kept_share(theirs.threshold(ratio)), theirs.kept_share(theirs.threshold(ratio)),
            rtol=0.02, atol=1 / 6000,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "non-finite Δ in layer 7: nan in channel 2"),
                        (float("inf"), "non-finite Δ in layer 7: inf"), (-0.5, "negative Δ")],
)  # fmt: skip
def test_bad_delta_is_named_with_its_layer(value: float, said: str) -> None:
    sketch = DeltaSketch(4, layer=7)
    delta = torch.rand(10, 4)
    delta[3, 2] = value
    with pytest.raises(WidefieldError, match=said):
        sketch.update(delta)
    assert sketch.tokens == 0


def test_sketches_refuse_what_does_not_fit() -> None:
    with pytest.raises(WidefieldError, match="at least 1 channel"):
        DeltaSketch(0)
    with pytest.raises(WidefieldError, match="use one sketch a layer"):
        DeltaSketch(3).update(torch.rand(5, 4))
    with pytest.raises(WidefieldError, match="sketches of 3 and 4 channels"):
        DeltaSketch(3).merge(DeltaSketch(4))
    with pytest.raises(WidefieldError, match="has seen no token"):
        LayerCalibration.from_sketch(DeltaSketch(3), -torch.ones(3, 2))


def test_decay_rates_must_be_negative_and_finite() -> None:
    sketch = DeltaSketch(2)
    sketch.update(torch.rand(5, 2))
    for A in (torch.ones(2, 2), torch.full((2, 2), -torch.inf), -torch.ones(3, 2)):
        with pytest.raises(WidefieldError, match="expected one negative, finite row a channel"):
            LayerCalibration.from_sketch(sketch, A)


def test_rates_are_reduced_over_the_states() -> None:
    rates = np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    layer = calibrate_layer(draw("gamma", 64, 2), rates=rates)
    assert layer.decay_rate("slowest").tolist() == [1.0, 4.0]
    assert layer.decay_rate("mean").tolist() == [3.0, 4.0]
    assert layer.decay_rate("fastest").tolist() == [6.0, 4.0]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5])
def test_a_clamp_share_lies_between_nothing_and_all(share: float) -> None:
    layer = calibrate_layer(draw("gamma", 64, 2))
    with pytest.raises(WidefieldError, match="between 0 and 1"):
        layer.threshold(2.0, share)


def test_a_length_ratio_is_positive() -> None:
    layer = calibrate_layer(draw("gamma", 64, 2))
    with pytest.raises(WidefieldError, match="above 0"):
        layer.threshold(0.0)
    with pytest.raises(WidefieldError, match="from 0 to 1"):
        layer.quantile(1.2)


def test_the_code_of_the_knots_is_as_ever() -> None:
    lowest, highest = np.array([0.01, 1.0], np.float32), np.array([1.0, 1.0], np.float32)
    steps = np.array([[10, 200, 255], [0, 0, 0]], np.uint8)
    falls = np.array([[5, 60, 200], [0, 3, 0]], np.uint8)
    position, value, log_share = encoding.decode(lowest, highest, steps, falls)
    assert position.tolist() == [[10, 237279, 4194304], [0, 0, 0]]
    np.testing.assert_allclose(value, [[0.01000011, 0.01297608, 1], [1, 1, 1]], rtol=1e-6)
    wanted = [[-1.53787e-3, -0.222991157, -2.68358324], [0, -5.53633e-4, -5.53633e-4]]
    np.testing.assert_allclose(log_share, wanted, rtol=1e-5)
    assert encoding._STEPS.sum() == 82429849


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate_layers(draw("gamma", 512, 6), draw("two modes", 512, 6))


def test_a_saved_calibration_comes_back_as_it_was(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "cal.safetensors"
    calibration.save(path)
    again = Calibration.load(path)
    assert again.identity == calibration.identity
    plain = [f.name for f in dataclasses.fields(Calibration) if f.name != "layers"]
    for name in plain:
        assert getattr(again, name) == getattr(calibration, name)
    for index, layer in calibration.layers.items():
        for ratio in RATIOS:
            for clamp in CLAMPS:
                assert torch.equal(
                    again.layer(index).threshold(ratio, clamp), layer.threshold(ratio, clamp)
                )
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_format_1_is_read_as_ever(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "cal.safetensors"
    calibration.save(path)
    ((key, text),) = header_of(path).items()
    plain = {name: t.contiguous() for name, t in calibration._tensors().items()}
    save_file(plain, path, {key: json.dumps({**json.loads(text), "format": 1})})
    assert Calibration.load(path).identity == calibration.identity


def test_knots_that_swell_beyond_all_measure_are_refused(
    calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "cal.safetensors"
    calibration.save(path)
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(1 << 24))), dtype=torch.uint8)
    save_file({**load_file(path), "0.knots": bomb}, path, header_of(path))
    with pytest.raises(WidefieldError, match="holds too much or is cut off"):
        Calibration.load(path)


def test_identity_tells_calibrations_apart(calibration: Calibration) -> None:
    other = dataclasses.replace(calibration, train_length=calibration.train_length + 1)
    assert other.identity != calibration.identity
    assert len(calibration.identity) == 16


def test_a_file_cut_short_anywhere_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "cal.safetensors"
    calibration.save(path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(WidefieldError, match="make a new one") as error:
            Calibration.load(path)
        assert "\n" not in str(error.value)


def test_a_file_changed_anywhere_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "cal.safetensors"
    calibration.save(path)
    whole = path.read_bytes()
    for place in range(8, len(whole), len(whole) // 60):
        changed = bytearray(whole)
        changed[place] ^= 0x55
        path.write_bytes(bytes(changed))
        with pytest.raises(WidefieldError) as error:
            Calibration.load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["0.delta", "1.decay", "1.knots"])
def test_a_file_without_one_of_its_parts_is_refused(
    calibration: Calibration, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "cal.safetensors"
    calibration.save(path)
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, header_of(path))
    with pytest.raises(WidefieldError, match="not a whole calibration"):
        Calibration.load(path)


def test_wrong_shapes_and_impossible_values_are_refused(
    calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "cal.safetensors"
    calibration.save(path)
    good, header = load_file(path), header_of(path)
    for name, wrong in {
        "0.delta": good["0.delta"][:2],
        "0.decay": -good["0.decay"],
        "0.knots": good["0.knots"].float(),
        "1.delta": good["1.delta"] * torch.nan,
        "1.decay": good["1.decay"][:, :3].contiguous(),
    }.items():
        save_file({**good, name: wrong}, path, header)
        with pytest.raises(WidefieldError, match="not a whole calibration"):
            Calibration.load(path)


def header_of(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    with pytest.raises(WidefieldError, match="no calibration at"):
        Calibration.load(missing)
    with pytest.raises(WidefieldError, match="no calibration at"):
        Calibration.load(tmp_path)
    text = tmp_path / "text.safetensors"
    text.write_text("This is a letter, not a tensor.\n" * 40)
    with pytest.raises(WidefieldError, match="damaged or no safetensors file"):
        Calibration.load(text)
    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, weights)
    with pytest.raises(WidefieldError, match="not a calibration"):
        Calibration.load(weights)


def test_a_newer_format_is_named(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "cal.safetensors"
    calibration.save(path)
    ((key, text),) = header_of(path).items()
    tensors = load_file(path)
    save_file(tensors, path, {key: json.dumps({**json.loads(text), "format": 99})})
    with pytest.raises(WidefieldError, match="format 99, this version of widefield reads up to 2"):
        Calibration.load(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cal.safetensors"
    path.write_bytes(b"old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(WidefieldError, match="No space left on device"):
        calibration.save(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_a_folder_that_is_not_there_says_so(
    calibration: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(WidefieldError, match="choose a path in a folder that exists"):
        calibration.save(tmp_path / "none" / "cal.safetensors")


def test_a_calibration_of_another_model_names_both(calibration: Calibration) -> None:
    calibration.check(layout_of(calibration))
    with pytest.raises(
        WidefieldError,
        match="belongs to MambaForCausalLM 0123456789abcdef, the model is "
        "FalconMambaForCausalLM ff",
    ):
        other = layout_of(calibration, model_class="FalconMambaForCausalLM", fingerprint="ff")
        calibration.check(other)


def test_a_calibration_of_another_shape_or_length_is_refused(calibration: Calibration) -> None:
    with pytest.raises(WidefieldError, match=r"lacks layers \[2\]"):
        calibration.check(layout_of(calibration, layers=(0, 1, 2), channels=(6, 6, 6)))
    with pytest.raises(WidefieldError, match="6 channels in layer 1, the model has 8"):
        calibration.check(layout_of(calibration, channels=(6, 8)))
    with pytest.raises(WidefieldError, match="training length of 256 tokens, expected 2048"):
        calibration.check(layout_of(calibration), train_length=2048)
    with pytest.raises(WidefieldError, match="layer 5 is not in this calibration"):
        calibration.layer(5)


def test_a_calibration_has_layers_and_a_length(calibration: Calibration) -> None:
    with pytest.raises(WidefieldError, match="without layers"):
        dataclasses.replace(calibration, layers={})
    with pytest.raises(WidefieldError, match="at least 1 token"):
        dataclasses.replace(calibration, train_length=0)

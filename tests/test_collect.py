from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ByT5Tokenizer

from tests.models import tiny_mamba
from tests.samples import draw
from widefield import collect, families, ops
from widefield.calibration import Calibration, DeltaSketch, LayerCalibration, encoding
from widefield.collect import calibrate
from widefield.errors import WidefieldError
from widefield.extension import extend, observed
from widefield.methods import DeciMamba, LongMamba
from widefield.plan import ScanInputs

LENGTH = 64


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """How well a curve is fitted is not at stake here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "_FINEST_FEW", 0.05)
        patch.setattr(encoding, "_ROUNDS", 3)
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_mamba()


def some_ids(rows: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (rows, LENGTH), generator=generator)


@pytest.fixture(scope="module")
def calibration(model: nn.Module) -> Calibration:
    return calibrate(model, some_ids(), train_length=LENGTH)


def delta_of(model: nn.Module, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Δ of every layer, (tokens, channels), seen from outside."""
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int, inputs: ScanInputs) -> None:
        seen[layer] = ops.effective_delta(inputs).flatten(0, 1)

    with torch.no_grad(), observed(model, keep):
        model(ids)
    return seen


def test_a_calibration_says_what_it_was_made_from(
    model: nn.Module, calibration: Calibration
) -> None:
    layout = families.describe(model)
    calibration.check(layout, train_length=LENGTH)
    assert calibration.model_class == "MambaForCausalLM"
    assert calibration.fingerprint == layout.fingerprint
    assert (calibration.sequences, calibration.tokens) == (6, 6 * LENGTH)
    assert sorted(calibration.layers) == [0, 1]


def test_it_holds_the_delta_and_the_decay_rates_of_the_model(
    model: nn.Module, calibration: Calibration
) -> None:
    for layer, delta in delta_of(model, some_ids()).items():
        found = calibration.layer(layer)
        np.testing.assert_allclose(found.mean_delta, delta.mean(0), rtol=1e-4)
        np.testing.assert_allclose(found.highest, delta.amax(0), rtol=1e-4)
        half = (delta >= found.quantile(0.5)).float().mean(0)
        np.testing.assert_allclose(half, 0.5, atol=0.1)
        rates = torch.exp(model.backbone.layers[layer].mixer.A_log)  # type: ignore[union-attr]
        np.testing.assert_allclose(found.decay_rate("slowest"), rates.amin(1).detach(), rtol=1e-6)
        np.testing.assert_allclose(found.decay_rate("fastest"), rates.amax(1).detach(), rtol=1e-6)


def test_text_is_calibrated_as_its_ids_are(model: nn.Module) -> None:
    text = "The quick brown fox jumps over the lazy dög. " * 8
    ids = torch.tensor([b + 3 for b in text.encode()])
    options = {"train_length": LENGTH}
    by_text = calibrate(model, text, tokenizer=ByT5Tokenizer(), **options)
    by_texts = calibrate(model, [text[:100], text[100:]], tokenizer=ByT5Tokenizer(), **options)
    by_ids = calibrate(model, ids, **options)
    assert by_text.identity == by_texts.identity == by_ids.identity
    assert by_ids.sequences == len(ids) // LENGTH


@pytest.mark.parametrize(
    "form",
    [
        lambda ids: ids.flatten(),
        lambda ids: ids.numpy(),
        lambda ids: ids.flatten().tolist(),
        lambda ids: ids.tolist(),
        lambda ids: iter(ids),
        lambda ids: (ids[i : i + 2] for i in range(0, 6, 2)),
        lambda ids: [ids[:1], ids[1:].to(torch.int32)],
        lambda ids: [ids.flatten()[:100], ids.flatten()[100:].tolist()],
    ],
)
def test_ids_may_come_in_any_form(model: nn.Module, calibration: Calibration, form) -> None:
    found = calibrate(model, form(some_ids()), train_length=LENGTH)
    assert found.corpus_hash == calibration.corpus_hash
    assert found.identity == calibration.identity


def test_batches_change_nothing_but_the_pace(model: nn.Module, calibration: Calibration) -> None:
    found = calibrate(model, some_ids(), train_length=LENGTH, batch_size=4)
    assert found.corpus_hash == calibration.corpus_hash
    for layer in found.layers:
        np.testing.assert_allclose(
            found.layer(layer).mean_delta, calibration.layer(layer).mean_delta, rtol=1e-4
        )


def test_an_endless_stream_is_read_as_far_as_needed(model: nn.Module) -> None:
    read = 0

    def stream():
        nonlocal read
        for seed in itertools.count():
            read += 1
            yield some_ids(2, seed)

    found = calibrate(model, stream(), train_length=LENGTH, sequences=5)
    assert found.sequences == 5
    assert read == 3


def test_sequences_of_what_has_an_end_are_drawn_by_the_seed(model: nn.Module) -> None:
    def hashes(source: object, seed: int) -> str:
        return calibrate(
            model, source, train_length=LENGTH, sequences=2, seed=seed  # type: ignore[arg-type]
        ).corpus_hash  # fmt: skip

    ids = some_ids(40).flatten()
    assert hashes(ids, 1) == hashes(ids, 1)
    assert len({hashes(ids, seed) for seed in range(4)}) > 1


def test_a_stock_model_stays_stock_and_in_its_mode() -> None:
    model = tiny_mamba()
    kinds = [type(module) for module in model.modules()]
    model.train()
    model.backbone.layers[0].eval()
    modes = [module.training for module in model.modules()]
    calibrate(model, some_ids(2), train_length=LENGTH)
    assert [type(module) for module in model.modules()] == kinds
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_extended_model_is_calibrated_as_it_would_be_without_its_methods(
    calibration: Calibration,
) -> None:
    model = tiny_mamba()
    method = DeciMamba(layers=(0,), base_length=8, min_length=8)
    filtering = LongMamba(calibration, decay_threshold=1e-300, clamp_share=0.05)
    extend(model, method, filtering)
    found = calibrate(model, some_ids(), train_length=LENGTH)
    assert found.identity == calibration.identity
    assert model.widefield.methods == (method, filtering)


def test_a_failure_on_the_way_leaves_the_model_as_it_was() -> None:
    model = tiny_mamba().train()
    kind = type(model)
    with pytest.raises(WidefieldError, match="outside the model's vocabulary of 384"):
        calibrate(model, torch.full((3, LENGTH), 384), train_length=LENGTH)
    assert type(model) is kind
    assert model.training


def test_non_finite_delta_is_an_error_that_names_the_layer() -> None:
    model = tiny_mamba()
    with torch.no_grad():
        model.backbone.layers[1].mixer.dt_proj.bias[5] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(WidefieldError, match="non-finite Δ in layer 1: nan in channel 5"):
        calibrate(model, some_ids(), train_length=LENGTH)


BAD = {
    "expected at least 1 token": {"train_length": 0},
    "sequences=0: expected at least 1": {"sequences": 0},
    "batch_size=0: expected at least 1": {"batch_size": 0},
    "fewer than one sequence of train_length=1000": {"train_length": 1000},
    "has 6 sequences of 64 tokens, 9 were asked for": {"sequences": 9},
}


@pytest.mark.parametrize(("said", "options"), BAD.items(), ids=BAD)
def test_counts_that_cannot_be_met_are_refused(
    model: nn.Module, said: str, options: dict[str, int]
) -> None:
    with pytest.raises(WidefieldError, match=said):
        calibrate(model, some_ids(), **{"train_length": LENGTH, **options})


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        ([], "corpus is empty"),
        (torch.zeros(0, dtype=torch.long), "corpus is empty"),
        ("some text", "needs tokenizer"),
        (["some", "text"], "needs tokenizer"),
        (torch.rand(4, LENGTH), "token ids of type float32"),
        (torch.zeros(2, 2, LENGTH, dtype=torch.long), "of 3 dimensions"),
        (-torch.ones(2, LENGTH, dtype=torch.long), "token id -1 is outside"),
        (3.5, "cannot calibrate on a float"),
    ],
)
def test_a_corpus_that_is_none_is_refused(model: nn.Module, corpus: object, said: str) -> None:
    with pytest.raises(WidefieldError, match=said):
        calibrate(model, corpus, train_length=LENGTH)  # type: ignore[arg-type]


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(WidefieldError, match="no Mamba layer that is supported"):
        calibrate(nn.Linear(2, 2), some_ids(), train_length=LENGTH)


def test_a_progress_bar_is_shown_when_asked(
    model: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(model, some_ids(), train_length=LENGTH, sequences=2, progress=True)
    shown = capsys.readouterr()
    assert "2/2 sequences" in shown.err
    assert "2/2 layers" in shown.err
    assert shown.out == ""


def test_the_file_of_a_130m_shape_is_below_five_megabytes(tmp_path: Path) -> None:
    layers = {
        index: LayerCalibration.from_sketch(
            sketch, -torch.ones(64, 16), finest=collect._FINEST_MANY
        )
        for index, sketch in enumerate(_sketches())
    }
    few = Calibration(layers, "0" * 16, "MambaForCausalLM", 2048, "0" * 16, 1, 20_480)
    path = tmp_path / "cal.safetensors"
    few.save(path)
    per_channel = path.stat().st_size / (64 * len(layers))
    assert per_channel * 24 * 1536 < 5_000_000


def _sketches() -> Iterator[DeltaSketch]:
    """Δ as the layers of a model have them."""
    for seed, shape in enumerate(("softplus", "lognormal", "gamma", "two modes")):
        sketch = DeltaSketch(64)
        sketch.update(torch.from_numpy(draw(shape, 20_480, 64, seed)))
        yield sketch

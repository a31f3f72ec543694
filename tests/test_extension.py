"""Extend, restore, extended, observed; what is saved; what is refused."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MambaForCausalLM

import widefield as wf
from tests.models import tiny_mamba
from widefield import ops
from widefield.errors import WidefieldError
from widefield.extension import extend, extended, observed, restore
from widefield.methods import DeciMamba, LongMamba
from widefield.plan import ScanInputs

TRAINED_AT = 32


@pytest.fixture
def model() -> MambaForCausalLM:
    return tiny_mamba()


@pytest.fixture
def calibration(model: MambaForCausalLM) -> wf.Calibration:
    return wf.calibrate(model, random_ids(8, TRAINED_AT, seed=3), train_length=TRAINED_AT)


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 380, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: MambaForCausalLM, ids: Tensor, **kwargs: object) -> Tensor:
    return model(ids, **kwargs).logits


def longmamba(calibration: wf.Calibration) -> LongMamba:
    return LongMamba(calibration, decay_threshold=1e-30, clamp_share=0.05)


class TestLongMamba:
    def test_up_to_the_training_length_it_changes_not_one_bit(
        self, model: MambaForCausalLM, calibration: wf.Calibration
    ) -> None:
        ids = random_ids(2, TRAINED_AT)
        plain = logits(extend(model), ids)
        assert torch.equal(logits(extend(model, longmamba(calibration)), ids), plain)

    def test_beyond_it_it_acts(self, model: MambaForCausalLM, calibration: wf.Calibration) -> None:
        ids = random_ids(2, 20 * TRAINED_AT)
        plain = logits(extend(model), ids)
        assert not torch.equal(logits(extend(model, longmamba(calibration)), ids), plain)

    def test_a_left_padded_row_equals_the_row_alone(
        self, model: MambaForCausalLM, calibration: wf.Calibration
    ) -> None:
        extend(model, longmamba(calibration))
        ids, mask = random_ids(2, 200), torch.ones(2, 200, dtype=torch.long)
        mask[1, :77] = 0
        batched = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(batched[:1], logits(model, ids[:1]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            batched[1:, 77:], logits(model, ids[1:, 77:]), rtol=1e-4, atol=1e-5
        )

    @torch.no_grad()
    def test_a_second_turn_counts_what_the_cache_holds(
        self, model: MambaForCausalLM, calibration: wf.Calibration
    ) -> None:
        extend(model, longmamba(calibration))
        first = model(random_ids(1, TRAINED_AT), use_cache=True)
        lengths: list[tuple[int, ...]] = []
        extension = model.widefield
        plan = extension.plan

        def spy(layer, seen, new, device):
            lengths.append(tuple(s + n for s, n in zip(seen, new, strict=True)))
            return plan(layer, seen, new, device)

        extension.plan = spy  # type: ignore[method-assign]
        model(random_ids(1, 10), cache_params=first.cache_params, use_cache=True)
        assert lengths == [(TRAINED_AT + 10,)] * 2

    @torch.no_grad()
    def test_decoded_tokens_are_never_filtered(
        self, model: MambaForCausalLM, calibration: wf.Calibration
    ) -> None:
        ids = random_ids(1, 300)
        extend(model, longmamba(calibration))
        after = model(ids, use_cache=True)
        extend(model)
        step = model(ids[:, :1], cache_params=copy.deepcopy(after.cache_params), use_cache=True)
        extend(model, longmamba(calibration))
        same = model(ids[:, :1], cache_params=after.cache_params, use_cache=True)
        assert torch.equal(step.logits, same.logits)

    @torch.no_grad()
    def test_a_cache_of_the_stock_model_is_refused(
        self, model: MambaForCausalLM, calibration: wf.Calibration
    ) -> None:
        stock = model(random_ids(1, 9), use_cache=True)
        extend(model, longmamba(calibration))
        with pytest.raises(WidefieldError, match="filled before the model was extended"):
            model(random_ids(1, 9), cache_params=stock.cache_params, use_cache=True)


class TestDeciMamba:
    method = DeciMamba(layers=(1,), base_length=20, shrink=0.5, min_length=4)

    def test_later_layers_run_on_fewer_tokens(self, model: MambaForCausalLM) -> None:
        assert logits(extend(model, self.method), random_ids(2, 90)).shape[1] == 20

    def test_a_short_prompt_is_untouched(self, model: MambaForCausalLM) -> None:
        ids = random_ids(2, 20)
        plain = logits(extend(model), ids)
        assert torch.equal(logits(extend(model, self.method), ids), plain)

    def test_a_left_padded_row_equals_the_row_alone(self, model: MambaForCausalLM) -> None:
        extend(model, self.method)
        ids, mask = random_ids(2, 90), torch.ones(2, 90, dtype=torch.long)
        mask[1, :75] = 0
        batched = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(batched[0], logits(model, ids[:1])[0], rtol=1e-4, atol=1e-5)
        alone = logits(model, ids[1:, 75:])[0]
        torch.testing.assert_close(batched[1, -15:], alone, rtol=1e-4, atol=1e-5)

    def test_generate_works_with_padding(self, model: MambaForCausalLM) -> None:
        extend(model, self.method)
        ids, mask = random_ids(2, 90), torch.ones(2, 90, dtype=torch.long)
        mask[0, :30] = 0
        batched = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        alone = model.generate(ids[:1, 30:], max_new_tokens=5, do_sample=False)
        assert torch.equal(batched[0, 90:], alone[0, 60:])

    def test_labels_are_refused(self, model: MambaForCausalLM) -> None:
        ids = random_ids(1, 90)
        with pytest.raises(WidefieldError, match="labels="):
            extend(model, self.method)(ids, labels=ids)

    def test_non_finite_delta_names_the_layer(self, model: MambaForCausalLM) -> None:
        model.backbone.layers[1].mixer.dt_proj.bias.data[3] = torch.nan
        with pytest.raises(WidefieldError, match="layer 1: non-finite Δ"):
            logits(extend(model, self.method), random_ids(1, 90))

    def test_it_combines_with_longmamba(
        self, model: MambaForCausalLM, calibration: wf.Calibration
    ) -> None:
        extend(model, longmamba(calibration), self.method)
        assert logits(model, random_ids(2, 90)).shape[1] == 20
        assert len(model.widefield.methods) == 2


class TestTakingItOut:
    def test_a_block_restores_after_an_error(self, model: MambaForCausalLM) -> None:
        ids = random_ids(1, 30)
        before = logits(model, ids)
        with pytest.raises(RuntimeError, match="inside"), extended(model):
            raise RuntimeError("inside")
        assert torch.equal(logits(model, ids), before)
        assert not hasattr(model, "widefield")

    def test_blocks_nest(self, model: MambaForCausalLM) -> None:
        outer = DeciMamba(layers=(0,), base_length=9)
        with extended(model, outer):
            with extended(model):
                assert model.widefield.methods == ()
            assert model.widefield.methods == (outer,)
        assert not hasattr(model, "widefield")

    def test_restoring_an_unextended_model_does_nothing(self, model: MambaForCausalLM) -> None:
        assert restore(model) is model

    def test_a_failed_extend_leaves_the_model_alone(self, model: MambaForCausalLM) -> None:
        kinds = [type(m) for m in model.modules()]
        with pytest.raises(WidefieldError):
            extend(model, DeciMamba(layers=(7,)))
        assert [type(m) for m in model.modules()] == kinds


class TestTwoModels:
    def test_they_do_not_disturb_each_other(self, calibration: wf.Calibration) -> None:
        one, two = tiny_mamba(), tiny_mamba()
        ids = random_ids(1, 300)
        extend(one, longmamba(calibration))
        extend(two, TestDeciMamba.method)
        first, second = logits(one, ids), logits(two, ids)
        restore(two)
        assert torch.equal(logits(one, ids), first)
        assert second.shape[1] == 20

    def test_they_run_in_threads(self, calibration: wf.Calibration) -> None:
        models = [extend(tiny_mamba(), longmamba(calibration)), extend(tiny_mamba())]
        ids = random_ids(1, 300)
        alone = [logits(m, ids) for m in models]
        together: list[list[Tensor]] = [[], []]

        def work(i: int) -> None:
            for _ in range(5):
                together[i].append(logits(models[i], ids))

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in (0, 1):
            assert len(together[i]) == 5
            assert all(torch.equal(t, alone[i]) for t in together[i])

    def test_a_deep_copy_stands_alone(
        self, model: MambaForCausalLM, calibration: wf.Calibration
    ) -> None:
        extend(model, longmamba(calibration))
        twin = copy.deepcopy(model)
        restore(model)
        ids = random_ids(1, 300)
        assert not torch.equal(logits(twin, ids), logits(model, ids))
        assert twin.widefield.methods


class TestSaving:
    def test_methods_travel_with_the_weights(
        self, model: MambaForCausalLM, calibration: wf.Calibration, tmp_path: Path
    ) -> None:
        extend(model, longmamba(calibration), TestDeciMamba.method)
        model.save_pretrained(tmp_path)
        loaded = wf.load(tmp_path)
        assert [m.name for m in loaded.model.widefield.methods] == ["longmamba", "decimamba"]
        assert loaded.model.config.architectures == ["MambaForCausalLM"]
        ids = random_ids(1, 300)
        torch.testing.assert_close(logits(loaded.model, ids), logits(model, ids))
        plain = wf.load(tmp_path, methods=False).model
        assert not hasattr(plain, "widefield")

    def test_an_unextended_model_writes_nothing_extra(
        self, model: MambaForCausalLM, tmp_path: Path
    ) -> None:
        extend(model)
        model.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("widefield*"))

    def test_a_damaged_description_says_so(
        self, model: MambaForCausalLM, calibration: wf.Calibration, tmp_path: Path
    ) -> None:
        extend(model, longmamba(calibration))
        model.save_pretrained(tmp_path)
        (tmp_path / "widefield.json").write_text('{"methods": [{"nam', encoding="utf-8")
        with pytest.raises(WidefieldError, match=r"widefield\.json is not a description"):
            wf.load(tmp_path)

    def test_a_truncated_model_says_so(self, model: MambaForCausalLM, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(WidefieldError, match="cannot load"):
            wf.load(tmp_path)

    def test_a_folder_without_a_model_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(WidefieldError, match="no model at"):
            wf.load(tmp_path)


class TestRefusals:
    def test_a_model_without_mamba_layers_is_named(self) -> None:
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))
        with pytest.raises(WidefieldError, match=r"GPT2LMHeadModel.*supported are Mamba"):
            extend(gpt2)

    def test_a_model_that_mixes_in_an_unknown_mixer_is_not_half_extended(
        self, model: MambaForCausalLM
    ) -> None:
        mixer: Any = model.backbone.layers[1].mixer
        mixer.__class__ = type("StrangeMixer", (type(mixer),), {})
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(WidefieldError, match="holds StrangeMixer layers, which are not"):
            extend(model)
        assert [type(module) for module in model.modules()] == kinds

    def test_a_method_class_is_not_a_method(self, model: MambaForCausalLM) -> None:
        with pytest.raises(WidefieldError, match="expected an instance"):
            extend(model, LongMamba)  # type: ignore[arg-type]

    def test_two_pooling_methods_are_refused(self, model: MambaForCausalLM) -> None:
        with pytest.raises(WidefieldError):
            extend(model, TestDeciMamba.method, TestDeciMamba.method)

    def test_a_calibration_of_another_model_is_refused(self, calibration: wf.Calibration) -> None:
        other = tiny_mamba(seed=5)
        with pytest.raises(WidefieldError, match=calibration.fingerprint):
            extend(other, longmamba(calibration))

    def test_an_empty_prompt_is_refused(self, model: MambaForCausalLM) -> None:
        with pytest.raises(WidefieldError, match="prompt is empty"):
            extend(model)(torch.zeros(1, 0, dtype=torch.long))

    def test_assisted_decoding_is_refused(self, model: MambaForCausalLM) -> None:
        with pytest.raises(WidefieldError, match="assistant_model"):
            extend(model).generate(random_ids(1, 9), assistant_model=tiny_mamba())


def test_an_observer_sees_the_delta_of_every_layer(model: MambaForCausalLM) -> None:
    seen: dict[int, Tensor] = {}

    def note(layer: int, inputs: ScanInputs) -> None:
        seen[layer] = ops.effective_delta(inputs)

    with observed(model, note):
        logits(model, random_ids(2, 30))
    assert sorted(seen) == [0, 1]
    assert seen[0].shape == (2, 30, 64)
    assert bool((seen[0] >= 0).all())
    assert not hasattr(model, "widefield")


def test_the_extension_describes_itself(
    model: MambaForCausalLM, calibration: wf.Calibration
) -> None:
    extend(model, longmamba(calibration))
    assert "LongMamba" in repr(model.widefield)
    assert model.widefield.layout.channels == (64, 64)

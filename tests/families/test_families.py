"""Every family: without a method the stock model; each method on, or refused with its reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

import widefield as wf
from tests.families.cases import CASES, SUPPORTED_CASES, random_ids, relative
from widefield import ops
from widefield.errors import WidefieldError
from widefield.extension import extend, observed, restore
from widefield.families import fingerprint, mixers
from widefield.families._attention import fit_mask
from widefield.families._blocks import DroppingBlock
from widefield.families._context import Left
from widefield.methods import DeciMamba, LongMamba
from widefield.plan import ScanInputs, SSDInputs

TRAINED_AT = 12
CLOSE = 1e-5
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=[name for name in SUPPORTED_CASES if CASES[name].told])
def model(request: pytest.FixtureRequest) -> Any:
    """A model of each family and each variant that methods treat differently."""
    return CASES[request.param].make()


@pytest.fixture
def ids() -> Tensor:
    return random_ids(2, 30)


@pytest.fixture
def mask(ids: Tensor) -> Tensor:
    """The second row is padded on the left."""
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    return mask


_CALIBRATIONS: dict[str, wf.Calibration] = {}


def calibrated(model: Any) -> wf.Calibration:
    """Of the unmodified model; made once for every case."""
    key = fingerprint(model)
    if key not in _CALIBRATIONS:
        sample = random_ids(3, TRAINED_AT, seed=3)
        _CALIBRATIONS[key] = wf.calibrate(model, sample, train_length=TRAINED_AT)
    return _CALIBRATIONS[key]


def longmamba(model: Any, **options: Any) -> LongMamba:
    return LongMamba(calibrated(model), **{"reduction": "slowest", **options})


def decimamba(model: Any, **options: Any) -> DeciMamba:
    """The second Mamba layer keeps 8 tokens, the last one 6."""
    layers = layers_of(model)
    sizes = {"base_length": 8, "shrink": 0.75, "min_length": 2}
    return DeciMamba(**{"layers": sorted({layers[1], layers[-1]}), **sizes, **options})


def layers_of(model: Any) -> tuple[int, ...]:
    return wf.extend(model).widefield.layout.layers


def cache_of(output: Any) -> Any:
    return output.cache_params if "cache_params" in output else output.past_key_values


def states_of(output: Any) -> list[Tensor]:
    """Both states of every Mamba layer, in order."""
    entries = [e for e in cache_of(output).layers if getattr(e, "recurrent_states", None)]
    pairs = [(e.recurrent_states[0], e.conv_states[0]) for e in entries]
    return [state for pair in pairs for state in pair if state is not None]


def continued(output: Any) -> dict[str, Any]:
    """The argument by which this model takes its cache."""
    name = "cache_params" if "cache_params" in output else "past_key_values"
    return {name: cache_of(output)}


def refused(model: Any) -> bool:
    return extend(model).widefield.layout.decimation is not None


def gates_spread(model: Any) -> bool:
    """Whether stock spreads the gate of one row over all rows when it decodes a batch."""
    old = Version(transformers.__version__) < Version("5.18")
    return old and getattr(model.config, "mamba_rms_norm", False)


class TestWithoutAMethod:
    @pytest.fixture(params=SUPPORTED_CASES)
    def model(self, request: pytest.FixtureRequest) -> Any:
        return CASES[request.param].make()

    @torch.no_grad()
    def test_logits_and_cache_equal_stock(self, model: Any, ids: Tensor) -> None:
        stock = model(ids, use_cache=True)
        ours = extend(model)(ids, use_cache=True)
        assert relative(ours.logits, stock.logits) < CLOSE
        assert len(states_of(ours)) == 2 * len(model.widefield.layout.layers)
        for mine, theirs in zip(states_of(ours), states_of(stock), strict=True):
            assert mine.dtype == theirs.dtype
            assert relative(mine, theirs) < CLOSE

    @torch.no_grad()
    def test_a_left_padded_batch_equals_stock(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        stock = model(ids, attention_mask=mask, use_cache=True)
        ours = extend(model)(ids, attention_mask=mask, use_cache=True)
        assert relative(ours.logits[0], stock.logits[0]) < CLOSE
        assert relative(ours.logits[1, 11:], stock.logits[1, 11:]) < CLOSE
        for mine, theirs in zip(states_of(ours), states_of(stock), strict=True):
            assert relative(mine, theirs) < CLOSE

    @torch.no_grad()
    def test_each_decoded_token_equals_stock(self, model: Any, ids: Tensor) -> None:
        if gates_spread(model):
            ids = ids[:1]
        twin = extend(copy.deepcopy(model))
        stock, ours = model(ids, use_cache=True), twin(ids, use_cache=True)
        for token in random_ids(2, 3, seed=5)[: len(ids)].split(1, dim=1):
            stock = model(token, **continued(stock), use_cache=True)
            ours = twin(token, **continued(ours), use_cache=True)
            assert relative(ours.logits, stock.logits) < CLOSE
        for mine, theirs in zip(states_of(ours), states_of(stock), strict=True):
            assert relative(mine, theirs) < CLOSE

    def test_generation_equals_stock(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        if gates_spread(model):
            pytest.skip("stock transformers 5.17 itself fails on this padded batch")
        call = {"attention_mask": mask, **GREEDY}
        stock = model.generate(ids, **call)
        assert torch.equal(extend(model).generate(ids, **call), stock)

    @torch.no_grad()
    def test_restore_is_bit_identical(self, model: Any, ids: Tensor) -> None:
        before, attributes = model(ids).logits, set(model.__dict__)
        kinds = [type(module) for module in model.modules()]
        extend(model)(ids)
        restore(model)
        assert torch.equal(model(ids).logits, before)
        assert [type(module) for module in model.modules()] == kinds
        assert set(model.__dict__) == attributes

    def test_gradients_in_training_equal_stock(self, model: Any, ids: Tensor) -> None:
        twin = copy.deepcopy(model).train()
        twin(ids, labels=ids, use_cache=False).loss.backward()
        extend(model.train())(ids, labels=ids, use_cache=False).loss.backward()
        for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            if theirs.grad is None:
                assert mine.grad is None, name
            else:
                assert relative(mine.grad, theirs.grad) < 1e-3, name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @torch.no_grad()
    def test_half_precision_is_as_close_to_float32_as_stock(
        self, model: Any, ids: Tensor, dtype: torch.dtype
    ) -> None:
        truth = model(ids).logits
        half = model.to(dtype)
        stock = relative(half(ids).logits.float(), truth)
        ours = extend(half)(ids, use_cache=True)
        assert relative(ours.logits.float(), truth) <= 2 * stock
        assert states_of(ours)[0].dtype == torch.float32


class TestLongMamba:
    @torch.no_grad()
    def test_up_to_the_training_length_it_changes_not_one_bit(self, model: Any) -> None:
        short = random_ids(2, TRAINED_AT)
        plain = extend(model)(short).logits
        assert torch.equal(extend(model, longmamba(model))(short).logits, plain)

    @torch.no_grad()
    def test_beyond_it_it_acts_in_every_layer(self, model: Any, ids: Tensor) -> None:
        plain = extend(model)(ids, use_cache=True)
        ours = extend(model, longmamba(model))(ids, use_cache=True)
        assert relative(ours.logits, plain.logits) > 1e-4
        for mine, before in zip(states_of(ours)[::2], states_of(plain)[::2], strict=True):
            assert relative(mine, before) > 1e-4

    @torch.no_grad()
    def test_a_left_padded_row_equals_the_row_alone(
        self, model: Any, ids: Tensor, mask: Tensor
    ) -> None:
        extend(model, longmamba(model))
        batched = model(ids, attention_mask=mask).logits
        assert relative(batched[1, 11:], model(ids[1:, 11:]).logits[0]) < CLOSE
        assert relative(batched[:1], model(ids[:1]).logits) < CLOSE

    def test_it_is_saved_with_the_model_and_loaded_again(
        self, model: Any, ids: Tensor, tmp_path: Path
    ) -> None:
        extend(model, longmamba(model, layers=list(layers_of(model)[:1])))
        model.save_pretrained(tmp_path)
        again = wf.load(tmp_path).model
        assert again.widefield.methods[0].describe() == model.widefield.methods[0].describe()
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


@torch.no_grad()
def test_a_calibration_has_the_mean_delta_of_every_channel(model: Any) -> None:
    sample = random_ids(3, TRAINED_AT, seed=3)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(layer: int, inputs: ScanInputs | SSDInputs) -> None:
        seen[layer] = ops.effective_delta(inputs).flatten(0, 1), -inputs.A

    with observed(model, note):
        model(sample)
    calibration = calibrated(model)
    assert sorted(calibration.layers) == sorted(seen) == list(layers_of(model))
    for layer, (delta, rates) in seen.items():
        found = calibration.layer(layer)
        torch.testing.assert_close(found.mean_delta, delta.mean(0))
        slowest = rates if rates.ndim == 1 else rates.amin(1)
        torch.testing.assert_close(found.decay_rate("slowest"), slowest)


class TestDeciMamba:
    @torch.no_grad()
    def test_it_shortens_the_residual_stream_or_says_why_not(self, model: Any, ids: Tensor) -> None:
        if refused(model):
            reason = model.widefield.layout.decimation
            with pytest.raises(WidefieldError, match="residual='full'") as error:
                extend(model, decimamba(model))
            assert reason in str(error.value)
        else:
            assert extend(model, decimamba(model))(ids).logits.shape[:2] == (2, 6)

    @torch.no_grad()
    def test_a_full_residual_stream_keeps_every_logit(self, model: Any, ids: Tensor) -> None:
        plain = extend(model)(ids).logits
        ours = extend(model, decimamba(model, residual="full"))(ids, labels=ids)
        assert ours.logits.shape == plain.shape
        assert torch.isfinite(ours.loss)
        assert relative(ours.logits, plain) > 1e-4

    @torch.no_grad()
    def test_up_to_its_length_it_changes_not_one_bit(self, model: Any, ids: Tensor) -> None:
        plain = extend(model)(ids).logits
        for residual in ("full",) if refused(model) else ("full", "shortened"):
            method = decimamba(model, base_length=30, shrink=1.0, residual=residual)
            assert torch.equal(extend(model, method)(ids).logits, plain)

    @pytest.mark.parametrize("residual", ["full", "shortened"])
    @torch.no_grad()
    def test_a_left_padded_row_equals_the_row_alone(
        self, model: Any, ids: Tensor, mask: Tensor, residual: str
    ) -> None:
        if residual == "shortened" and refused(model):
            return
        extend(model, decimamba(model, base_length=22, residual=residual))
        batched = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, 11:]).logits[0]
        assert relative(batched[1, -len(alone) :][-5:], alone[-5:]) < CLOSE
        first = model(ids[:1]).logits
        assert relative(batched[:1, -5:], first[:, -5:]) < CLOSE

    @pytest.mark.parametrize("residual", ["full", "shortened"])
    def test_a_padded_batch_generates_what_its_rows_do(
        self, model: Any, ids: Tensor, mask: Tensor, residual: str
    ) -> None:
        if residual == "shortened" and refused(model):
            return
        extend(model, decimamba(model, base_length=22, residual=residual))
        batched = model.generate(ids, attention_mask=mask, **GREEDY)[:, 30:]
        assert torch.equal(batched[:1], model.generate(ids[:1], **GREEDY)[:, 30:])
        assert torch.equal(batched[1:], model.generate(ids[1:, 11:], **GREEDY)[:, 19:])

    def test_gradients_flow_through_the_kept_tokens(self, model: Any, ids: Tensor) -> None:
        extend(model.train(), decimamba(model, residual="full"))
        model(ids, labels=ids, use_cache=False).loss.backward()
        for layer, mixer in mixers(model):
            assert mixer.A_log.grad is not None and bool(mixer.A_log.grad.any()), layer


@torch.no_grad()
def test_in_the_last_layer_both_kinds_of_residual_stream_agree_on_the_last_token(
    model: Any, ids: Tensor
) -> None:
    if refused(model) or model.config.num_hidden_layers - 1 not in layers_of(model):
        return
    last = layers_of(model)[-1]
    outputs = [
        extend(model, decimamba(model, layers=[last], residual=residual))(ids).logits[:, -1]
        for residual in ("full", "shortened")
    ]
    assert relative(*outputs) < CLOSE


@torch.no_grad()
def test_what_is_left_is_known_to_blocks_that_get_a_copy_of_their_input(
    model: Any, ids: Tensor, mask: Tensor
) -> None:
    """As on several devices, where accelerate moves the input of every block."""
    if refused(model):
        return
    extend(model, decimamba(model, base_length=22))
    here = model(ids, attention_mask=mask).logits
    hooks = [
        block.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))
        for block in model.modules()
        if isinstance(block, DroppingBlock)
    ]
    copied = model(ids, attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    assert len(hooks) == model.config.num_hidden_layers
    assert torch.equal(copied, here)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba"])
@torch.no_grad()
def test_weights_that_accelerate_keeps_on_disk_are_fetched(
    name: str, ids: Tensor, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = CASES[name].make()
    method = decimamba(model)
    here = extend(model, method)(ids).logits
    restore(model)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert torch.equal(extend(model, method)(ids).logits, here)


class TestBadMasks:
    @pytest.mark.parametrize(
        ("where", "said"),
        [(slice(-3, None), "right-padded in row 1"), (slice(5, 6), "has a hole in row 1")],
    )
    def test_padding_that_is_not_on_the_left_is_refused(
        self, model: Any, ids: Tensor, where: slice, said: str
    ) -> None:
        mask = torch.ones_like(ids)
        mask[1, where] = 0
        with pytest.raises(WidefieldError, match=said):
            extend(model)(ids, attention_mask=mask)


class TestAttentionBehindDroppedTokens:
    """Hybrids without rotary positions: masks and caches of what is left."""

    @pytest.fixture(params=["jamba", "granite", "nemotron-h"])
    def name(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @torch.no_grad()
    def test_eager_attention_equals_sdpa(self, name: str, ids: Tensor, mask: Tensor) -> None:
        logits = []
        for attention in ("sdpa", "eager"):
            model = CASES[name].make(attn_implementation=attention)
            extend(model, decimamba(model, base_length=22))
            logits.append(model(ids, attention_mask=mask).logits[:, -3:])
        assert relative(*logits) < CLOSE

    @torch.no_grad()
    def test_a_second_turn_of_a_padded_batch_equals_its_rows(
        self, name: str, ids: Tensor, mask: Tensor
    ) -> None:
        model = CASES[name].make()
        extend(model, decimamba(model, base_length=22))
        second = random_ids(2, 40, seed=7)
        batched = self.turns(model, ids, second, mask)
        assert relative(batched[:1], self.turns(model, ids[:1], second[:1])) < CLOSE
        assert relative(batched[1:], self.turns(model, ids[1:, 11:], second[1:])) < CLOSE

    def turns(
        self, model: Any, first: Tensor, second: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The last logits after a prompt, a decoded token, a second prompt, a decoded token."""
        output: Any = None
        parts = first, second[:, :1], second[:, 1:-1], second[:, -1:]
        for end, part in enumerate(parts, start=1):
            whole = torch.cat(parts[:end], 1)
            seen = torch.ones_like(whole)
            if mask is not None:
                seen[:, : mask.shape[1]] = mask
            cache = None if output is None else cache_of(output)
            output = model(part, attention_mask=seen, past_key_values=cache, use_cache=True)
        return output.logits[:, -1]

    @torch.no_grad()
    def test_where_the_first_attention_layer_is_behind_it_rows_are_as_alone(
        self, name: str, ids: Tensor, mask: Tensor
    ) -> None:
        model = CASES[name].make()
        extend(model, decimamba(model, layers=[0], base_length=22))
        rows = [ids[:1], ids[1:, 11:]]
        alone = [model.generate(row, **GREEDY)[:, -5:] for row in rows]
        both = model.generate(ids, attention_mask=mask, **GREEDY)[:, -5:]
        assert torch.equal(both, torch.cat(alone))
        turns = [self.turns(model, row, ids[i : i + 1, :9]) for i, row in enumerate(rows)]
        assert relative(self.turns(model, ids, ids[:, :9], mask), torch.cat(turns)) < CLOSE

    def test_attention_that_takes_no_mask_by_layer_is_refused(self, name: str) -> None:
        model = CASES[name].make()
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(WidefieldError, match=r"flex_attention.*attn_implementation='sdpa'"):
            extend(model, decimamba(model, layers=[0]))

    def test_flash_attention_gets_what_is_no_padding(self, name: str) -> None:
        attention = CASES[name].make().model.layers[1]
        attention = getattr(attention, "mixer", None) or attention.self_attn
        attention.config._attn_implementation = "flash_attention_2"
        valid = torch.tensor([[False, True, True], [True, True, True]])
        for left, expected in ((valid, valid), (valid[1:], None)):
            arguments = fit_mask(attention, torch.zeros(len(left), 3, 32), Left(left, True), {})
            mask = arguments["attention_mask"]
            assert mask is None if expected is None else torch.equal(mask, expected)

    @torch.no_grad()
    def test_beams_equal_those_of_each_row_alone(self, name: str, ids: Tensor) -> None:
        model = CASES[name].make()
        extend(model, decimamba(model))
        call = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
        alone = [model.generate(row, **call) for row in ids.split(1)]
        assert torch.equal(model.generate(ids, **call), torch.cat(alone))


# transformers 5.17 warns of every prompt that is not on the device of meta weights.
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("decimated", [False, True], ids=["unmodified", "decimamba"])
@torch.no_grad()
def test_weights_that_accelerate_keeps_elsewhere_are_fetched(
    model: Any, ids: Tensor, decimated: bool
) -> None:
    accelerate = pytest.importorskip("accelerate")
    methods = []
    if decimated:
        methods = [decimamba(model, residual="full" if refused(model) else "shortened")]
    here = extend(model, *methods)(ids).logits
    generated = model.generate(ids, **GREEDY)
    restore(model)
    extend(accelerate.cpu_offload(model, execution_device="cpu"), *methods)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(ids).logits, here)
    assert torch.equal(model.generate(ids, **GREEDY), generated)

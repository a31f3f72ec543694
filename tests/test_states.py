"""A state on disk: goes on like the run that made it, splits into several, and fits one model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

import widefield as wf
from tests.models import tiny_mamba
from widefield.errors import WidefieldError
from widefield.extension import extend
from widefield.methods import DeciMamba, LongMamba

TRAINED_AT = 32
NEW = 6


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 200, (batch, length), generator=torch.Generator().manual_seed(seed))


PROMPT, MORE = random_ids(2, 90), random_ids(2, 40, seed=2)
MASK = torch.ones_like(PROMPT)
MASK[1, :25] = 0

METHODS: dict[str, Callable[[wf.Calibration], list[Any]]] = {
    "none": lambda calibration: [],
    "longmamba": lambda calibration: [LongMamba(calibration, decay_threshold=1e-30)],
    "decimamba": lambda calibration: [DeciMamba(layers=(1,), base_length=30, shrink=0.5)],
}


@pytest.fixture(scope="module")
def calibration() -> wf.Calibration:
    return wf.calibrate(tiny_mamba(), random_ids(8, TRAINED_AT, seed=3), train_length=TRAINED_AT)


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest, calibration: wf.Calibration) -> MambaForCausalLM:
    """An extended model, with each method."""
    return extend(tiny_mamba(), *METHODS[request.param](calibration))


@torch.no_grad()
def read(model: Any, ids: Tensor = PROMPT, mask: Tensor | None = MASK, cache: Any = None) -> Any:
    """The cache behind some tokens."""
    name = cache_name(model)
    output = model(ids, attention_mask=mask, use_cache=True, **({name: cache} if cache else {}))
    return output[name]


@torch.no_grad()
def logits(model: Any, cache: Any, ids: Tensor = MORE) -> Tensor:
    """The logits of what follows; the cache goes on."""
    return model(ids, **{cache_name(model): cache}, use_cache=True).logits


def generated(model: Any, cache: Any, ids: Tensor = MORE, **kwargs: Any) -> Tensor:
    """The tokens that follow `ids`."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **kwargs}
    output = model.generate(ids, **{cache_name(model): cache}, **options)
    return output[:, ids.shape[1] :]


def cache_name(model: Any) -> str:
    return "cache_params" if isinstance(model, MambaForCausalLM | Mamba2ForCausalLM) else (
        "past_key_values"
    )  # fmt: skip


def kept(model: Any, cache: Any, folder: Path) -> Any:
    """The cache after a way over the disk."""
    wf.save_state(cache, folder / "state.safetensors", model)
    assert [path.name for path in folder.iterdir()] == ["state.safetensors"]
    return wf.load_state(folder / "state.safetensors", model)


def counts(cache: Any) -> list[tuple[int, ...] | None]:
    return [entry.widefield_seen for entry in cache.layers]


class TestGoingOn:
    def test_a_loaded_state_goes_on_bit_for_bit(
        self, model: MambaForCausalLM, tmp_path: Path
    ) -> None:
        cache = read(model)
        loaded = kept(model, cache, tmp_path)
        assert counts(loaded) == counts(cache) and counts(cache)[0] == (90, 65)
        assert torch.equal(logits(model, loaded), logits(model, cache))
        assert counts(loaded) == counts(cache)

    def test_a_loaded_state_generates_the_same_tokens(
        self, model: MambaForCausalLM, tmp_path: Path
    ) -> None:
        cache = read(model)
        loaded = kept(model, cache, tmp_path)
        assert torch.equal(generated(model, loaded), generated(model, cache))

    def test_it_equals_one_run_over_the_whole_text(
        self, calibration: wf.Calibration, tmp_path: Path
    ) -> None:
        model = extend(tiny_mamba())
        loaded = kept(model, read(model), tmp_path)
        whole, mask = torch.cat([PROMPT, MORE], 1), torch.cat([MASK, torch.ones_like(MORE)], 1)
        with torch.no_grad():
            plain = model(whole, attention_mask=mask).logits[:, 90:]
        torch.testing.assert_close(logits(model, loaded), plain, rtol=1e-4, atol=1e-5)
        tokens = model.generate(
            whole, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        loaded = wf.load_state(tmp_path / "state.safetensors", model)
        assert torch.equal(generated(model, loaded), tokens[:, 130:])

    def test_a_second_turn_is_filtered_by_all_that_was_read(
        self, calibration: wf.Calibration, tmp_path: Path
    ) -> None:
        model = extend(tiny_mamba(), *METHODS["longmamba"](calibration))
        loaded = kept(model, read(model), tmp_path)
        short = random_ids(2, 4)  # less than the training length: alone it would not be filtered
        acted = logits(model, wf.fork_state(loaded), short)
        assert not torch.equal(acted, logits(extend(model), wf.fork_state(loaded), short))

    def test_the_state_of_an_unextended_model_decodes_on(self, tmp_path: Path) -> None:
        model = tiny_mamba()
        cache = read(model)
        loaded = kept(model, cache, tmp_path)
        assert torch.equal(
            generated(model, loaded, MORE[:, :1]), generated(model, cache, MORE[:, :1])
        )
        extend(model, DeciMamba(layers=(1,), base_length=30))
        with pytest.raises(WidefieldError, match="filled before the model was extended"):
            logits(model, loaded)

    def test_a_file_holds_its_rows_and_nothing_else(self, tmp_path: Path) -> None:
        model = extend(tiny_mamba())
        kept(model, read(model, random_ids(1, 9_000), None), tmp_path)
        # 2 layers of 64 channels: 8 states and 4 inputs of the convolution, 4 bytes each.
        assert (tmp_path / "state.safetensors").stat().st_size < 2 * 64 * (8 + 4) * 4 + 2000


HYBRIDS: dict[str, Callable[[], Any]] = {
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(
            num_heads=4, head_dim=16, hidden_size=32, num_hidden_layers=2, vocab_size=200,
            n_groups=1, state_size=8, chunk_size=8,
        )
    ),
    "jamba": lambda: JambaForCausalLM(
        JambaConfig(
            vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, attn_layer_period=2,
            attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=8,
            mamba_dt_rank=2, use_mamba_kernels=False,
        )
    ),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, mamba_d_ssm=32, mamba_n_heads=2,
            mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8,
        )
    ),
    "nemotron_h": lambda: NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=200, hidden_size=32, intermediate_size=32, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, mamba_num_heads=2, mamba_head_dim=16,
            ssm_state_size=8, n_groups=1, chunk_size=8,
            layers_block_type=["mamba", "attention", "mlp", "mamba"],
        )
    ),
}  # fmt: skip


def two_attention_layers() -> Any:
    """NemotronH with attention before and behind its second Mamba layer."""
    torch.manual_seed(2)
    model = HYBRIDS["nemotron_h"]()
    config = model.config
    config.layers_block_type = ["linear_attention", "full_attention"] * 2
    return NemotronHForCausalLM(config).eval()


@pytest.mark.parametrize("name", HYBRIDS)
class TestOtherModels:
    """Whatever transformers calls a cache entry, with attention or without."""

    def hybrid(self, name: str) -> Any:
        torch.manual_seed(2)
        return HYBRIDS[name]().eval()

    def test_a_loaded_state_goes_on_bit_for_bit(self, name: str, tmp_path: Path) -> None:
        model = self.hybrid(name)
        cache = read(model, mask=None)
        loaded = kept(model, cache, tmp_path)
        for step in MORE[:, :3].split(1, dim=1):
            assert torch.equal(logits(model, loaded, step), logits(model, cache, step))

    def test_generate_goes_on(self, name: str, tmp_path: Path) -> None:
        model = self.hybrid(name)
        cache = read(model, mask=None)
        loaded, forked = kept(model, cache, tmp_path), wf.fork_state(cache)
        # Models with attention are told by the mask that the input is not the whole text.
        mask = None
        if cache_name(model) == "past_key_values":
            mask = torch.ones(2, PROMPT.shape[1] + 1, dtype=torch.long)
        plain = generated(model, cache, MORE[:, :1], attention_mask=mask)
        assert torch.equal(generated(model, loaded, MORE[:, :1], attention_mask=mask), plain)
        assert torch.equal(generated(model, forked, MORE[:, :1], attention_mask=mask), plain)


class TestForking:
    def test_forks_do_not_disturb_each_other(self, model: MambaForCausalLM) -> None:
        cache = read(model)
        twin, other = wf.fork_state(cache), wf.fork_state(cache)
        first = logits(model, twin)
        assert not torch.equal(logits(model, other, random_ids(2, 40, seed=8)), first)
        assert torch.equal(logits(model, cache), first)

    def test_several_answers_to_one_text_equal_a_plain_run(
        self, model: MambaForCausalLM, tmp_path: Path
    ) -> None:
        loaded = kept(model, read(model), tmp_path)
        cache = read(model)
        for rows in (1, 3):
            # Greedy tokens are those of the row, whichever of its copies is asked.
            forked = wf.fork_state(loaded, rows)
            tokens = generated(model, forked, MORE.repeat_interleave(rows, 0))
            assert torch.equal(
                tokens, generated(model, wf.fork_state(cache)).repeat_interleave(rows, 0)
            )

    def test_num_return_sequences_go_on_from_repeated_rows(self, model: MambaForCausalLM) -> None:
        cache = read(model)
        assert counts(wf.fork_state(cache, 3))[0] == (90, 90, 90, 65, 65, 65)
        torch.manual_seed(5)
        drawn = generated(model, wf.fork_state(cache, 3), do_sample=True, num_return_sequences=3)
        torch.manual_seed(5)
        rows = MORE.repeat_interleave(3, 0)
        assert torch.equal(drawn, generated(model, wf.fork_state(cache, 3), rows, do_sample=True))
        assert len(drawn.unique(dim=0)) == 6

    def test_beams_go_on_from_repeated_rows(self) -> None:
        model = extend(tiny_mamba())
        cache = wf.fork_state(read(model), 3)
        beams = generated(model, cache, num_beams=3)
        whole, mask = torch.cat([PROMPT, MORE], 1), torch.cat([MASK, torch.ones_like(MORE)], 1)
        plain = model.generate(
            whole, attention_mask=mask, max_new_tokens=NEW, num_beams=3, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        assert torch.equal(beams, plain[:, 130:])

    def test_a_deep_copy_keeps_the_counts(self, model: MambaForCausalLM) -> None:
        cache = read(model)
        twin = copy.deepcopy(cache)
        assert counts(twin) == counts(cache)
        assert torch.equal(logits(model, twin), logits(model, cache))

    def test_a_cache_that_holds_gradients_is_forked_and_saved(self, tmp_path: Path) -> None:
        model = extend(tiny_mamba())
        cache = model(PROMPT, use_cache=True).cache_params
        forked: Any = wf.fork_state(cache)
        assert not forked.layers[0].recurrent_states[0].requires_grad
        loaded = kept(model, cache, tmp_path)
        assert torch.equal(logits(model, forked), logits(model, loaded))

    @pytest.mark.parametrize("length", [1, 5])
    def test_an_input_of_other_rows_than_the_cache_is_refused(
        self, model: MambaForCausalLM, length: int
    ) -> None:
        cache = read(model, PROMPT[:1], None)
        ids = random_ids(3, length)
        with pytest.raises(WidefieldError, match=r"holds 1 row, the input has 3.*wf\.fork_state"):
            logits(model, cache, ids)
        assert logits(model, wf.fork_state(cache, 3), ids).shape[0] == 3

    def test_less_than_one_copy_is_refused(self, model: MambaForCausalLM) -> None:
        with pytest.raises(WidefieldError, match="times=0"):
            wf.fork_state(read(model), 0)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[MambaForCausalLM, Path]:
    """A model and a state of it."""
    model = extend(tiny_mamba())
    wf.save_state(read(model), tmp_path / "state.safetensors", model)
    return model, tmp_path / "state.safetensors"


def refusal(path: Path, model: Any) -> str:
    with pytest.raises(WidefieldError) as caught:
        wf.load_state(path, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """The same file with its header or its tensors changed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["widefield.state"])
    change(header, tensors)
    save_file(tensors, path, {"widefield.state": json.dumps(header)})


Saved = tuple[MambaForCausalLM, Path]


class TestRefusals:
    def test_a_state_of_another_model_names_both(self, saved: Saved) -> None:
        other = extend(tiny_mamba(seed=3))
        line = refusal(saved[1], other)
        assert line.count("MambaForCausalLM") == 2 and "belongs to" in line

    def test_a_model_that_differs_outside_its_mixers_is_another(self, saved: Saved) -> None:
        model, path = saved
        model.backbone.norm_f.weight.data += 1
        assert "belongs to" in refusal(path, model)

    def test_a_state_of_another_dtype_says_what_to_do(self, saved: Saved) -> None:
        model, path = saved
        assert "dtype=torch.float32" in refusal(path, model.bfloat16())

    @pytest.mark.parametrize("kept", [0, 5, 500, -1])
    def test_a_truncated_file_is_refused(self, saved: Saved, kept: int) -> None:
        model, path = saved
        path.write_bytes(path.read_bytes()[:kept])
        assert "damaged" in refusal(path, model)

    def test_a_missing_file_is_named(self, saved: Saved) -> None:
        model, path = saved
        assert "no state at" in refusal(path.with_name("other"), model)

    def test_another_file_of_tensors_is_refused(self, saved: Saved, tmp_path: Path) -> None:
        model, _ = saved
        model.save_pretrained(tmp_path)
        assert "not a state" in refusal(tmp_path / "model.safetensors", model)

    def test_a_later_format_asks_for_a_later_widefield(self, saved: Saved) -> None:
        model, path = saved
        rewrite(path, lambda header, _: header.update(format=9))
        assert "state format 9" in refusal(path, model)

    @pytest.mark.parametrize(
        "change",
        [
            lambda header, _: header.clear(),
            lambda header, _: header.update(seen=3),
            lambda header, _: header.update(seen={}),
            lambda header, _: header["seen"].update({"0": [1, 2, 3]}),
            lambda header, _: header["seen"].update({"0": ["many"]}),
            lambda header, _: header["seen"].update({"7": [1]}),
            lambda _, tensors: tensors.pop("1.state.0"),
            lambda _, tensors: tensors.update({"2.state.0": torch.zeros(2, 64, 8)}),
            lambda _, tensors: tensors.update({"0.state.0": torch.zeros(2, 64, 9)}),
            lambda _, tensors: tensors.update({"0.state.0": torch.zeros(1, 64, 8)}),
            lambda _, tensors: tensors.update({"0.conv.0": torch.zeros(())}),
        ],
    )
    def test_a_file_that_does_not_hold_what_the_model_keeps_is_refused(
        self, saved: Saved, change: Callable[[dict[str, Any], dict[str, Tensor]], object]
    ) -> None:
        model, path = saved
        rewrite(path, change)
        assert "not a whole state" in refusal(path, model)

    @pytest.mark.parametrize(
        "change",
        [
            lambda _, tensors: tensors.pop("3.valid"),
            lambda _, tensors: tensors.update({"3.valid": tensors["3.valid"].float()}),
            lambda _, tensors: tensors.update({"3.valid": tensors["3.valid"][:, 1:].clone()}),
            lambda _, tensors: tensors.update({"3.valid": tensors["3.valid"][:1].clone()}),
            lambda _, tensors: tensors.update({"0.valid": tensors["3.valid"].clone()}),
        ],
    )
    def test_a_file_with_wrong_marks_of_a_shortened_attention_layer_is_refused(
        self, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]
    ) -> None:
        model = two_attention_layers()
        extend(model, DeciMamba(layers=(2,), base_length=30))
        path = tmp_path / "state.safetensors"
        wf.save_state(read(model), path, model)
        assert wf.load_state(path, model).layers[3].widefield_valid.shape == (2, 30)
        rewrite(path, change)
        assert "not a whole state" in refusal(path, model)

    def test_a_file_says_what_was_on(self, calibration: wf.Calibration, tmp_path: Path) -> None:
        model = extend(tiny_mamba(), *METHODS["longmamba"](calibration))
        wf.save_state(read(model), tmp_path / "state.safetensors", model)
        with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
            header = json.loads(file.metadata()["widefield.state"])
        assert "LongMamba" in header["methods"]
        assert header["seen"] == {"0": [90, 65], "1": [90, 65]}


class TestSavingRefusals:
    def test_an_empty_cache_says_so(self, tmp_path: Path) -> None:
        model = tiny_mamba()
        empty = DynamicCache(config=model.config)
        with pytest.raises(WidefieldError, match="the cache is empty"):
            wf.save_state(empty, tmp_path / "s.safetensors", model)
        with pytest.raises(WidefieldError, match="the cache is empty"):
            wf.fork_state(empty)

    def test_what_is_no_cache_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(WidefieldError, match="NoneType is not a cache"):
            wf.save_state(None, tmp_path / "s.safetensors", tiny_mamba())  # type: ignore[arg-type]

    def test_a_cache_that_was_reset_is_empty(self, tmp_path: Path) -> None:
        model = tiny_mamba()
        cache = read(model)
        cache.reset()
        with pytest.raises(WidefieldError, match="the cache is empty"):
            wf.fork_state(cache)

    def test_a_sliding_window_is_refused(self) -> None:
        from transformers.cache_utils import DynamicSlidingWindowLayer

        model = TestOtherModels().hybrid("jamba")
        cache = read(model, mask=None)
        window = DynamicSlidingWindowLayer(sliding_window=4)
        window.update(cache.layers[1].keys, cache.layers[1].values)
        cache.layers[1] = window
        with pytest.raises(WidefieldError, match=r"layer 1 .*DynamicSlidingWindowLayer"):
            wf.fork_state(cache)

    def test_a_failed_write_leaves_the_old_file(
        self, saved: Saved, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, path = saved
        before = path.read_bytes()

        def full(tensors: object, file: Path, metadata: object) -> None:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("widefield.states.save_file", full)
        with pytest.raises(WidefieldError, match="No space left"):
            wf.save_state(read(model), path, model)
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]

    def test_a_folder_that_is_not_there_is_named(self, saved: Saved, tmp_path: Path) -> None:
        model, _ = saved
        with pytest.raises(WidefieldError, match=r"cannot write the state to .*nowhere"):
            wf.save_state(read(model), tmp_path / "nowhere" / "s.safetensors", model)

"""A prompt in chunks gives what it gives in one pass: logits, caches, what is generated."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MambaModel, PreTrainedModel

import widefield as wf
from tests.models import cache_name, states, tiny_family, tiny_mamba
from widefield.errors import WidefieldError
from widefield.extension import extend, observed
from widefield.families import _mixer
from widefield.methods import DeciMamba, LongMamba
from widefield.methods.base import Method
from widefield.plan import ScanInputs

TRAINED_AT = 32
LENGTH = 90
FAMILIES = ("mamba", "falcon", "jamba", "zamba")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pieces this small are done before a second thread has started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_ids(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(3, 380, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, padding: int) -> Tensor:
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return mask


@functools.cache
def calibration(family: str) -> wf.Calibration:
    return wf.calibrate(
        tiny_family(family), random_ids(4, TRAINED_AT, seed=3), train_length=TRAINED_AT
    )


def longmamba(family: str) -> LongMamba:
    return LongMamba(calibration(family), decay_threshold=1e-30, clamp_share=0.05)


def decimamba(family: str, **options: int) -> DeciMamba:
    layers = (0, 2) if family == "jamba" else (1, 2)
    return DeciMamba(layers=layers, **{"base_length": 30, "min_length": 4, **options})


METHODS: dict[str, Callable[[str], tuple[Method, ...]]] = {
    "unmodified": lambda family: (),
    "longmamba": lambda family: (longmamba(family),),
    "decimamba": lambda family: (decimamba(family),),
    "both": lambda family: (longmamba(family), decimamba(family, protect=6)),
}
CASES = [
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if not (family == "zamba" and method in ("decimamba", "both"))
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, method = request.param
    return extend(tiny_family(family), *METHODS[method](family))


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


@torch.no_grad()
def one_pass(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> dict:
    return model(ids, use_cache=True, logits_to_keep=1, **kwargs)


def assert_same(model: PreTrainedModel, ours: dict, whole: dict) -> None:
    assert ours["logits"].shape == (whole["logits"].shape[0], 1, 384)
    assert relative(ours["logits"], whole["logits"]) < 1e-4
    name = cache_name(model)
    for mine, theirs in zip(states(ours[name]), states(whole[name]), strict=True):
        assert relative(mine.recurrent_states[0], theirs.recurrent_states[0]) < 1e-4
        assert relative(mine.conv_states[0], theirs.conv_states[0]) < 1e-4
        assert mine.widefield_seen == theirs.widefield_seen
    for mine, theirs in zip(ours[name].layers, whole[name].layers, strict=True):
        if hasattr(theirs, "keys"):
            assert relative(mine.keys, theirs.keys) < 1e-4
    assert not hasattr(ours[name], "widefield_prefill")


class TestOnePass:
    @pytest.mark.parametrize("chunk_size", [16, LENGTH - 1, LENGTH + 1])
    def test_any_chunk_size_gives_the_same(self, model: PreTrainedModel, chunk_size: int) -> None:
        ids = random_ids()
        whole = one_pass(model, ids)
        assert_same(model, wf.prefill(model, ids, chunk_size=chunk_size), whole)

    @pytest.mark.parametrize("padding", [3, 75])
    def test_a_left_padded_batch_gives_the_same(self, model: PreTrainedModel, padding: int) -> None:
        ids = random_ids()
        mask = left_padded(ids, padding)
        whole = one_pass(model, ids, attention_mask=mask)
        assert_same(model, wf.prefill(model, ids, chunk_size=20, attention_mask=mask), whole)

    def test_single_tokens_as_chunks_give_the_same(self) -> None:
        for name in METHODS:
            model = extend(tiny_family("mamba"), *METHODS[name]("mamba"))
            ids = random_ids(length=40)
            mask = left_padded(ids, 30)
            whole = one_pass(model, ids, attention_mask=mask)
            assert_same(model, wf.prefill(model, ids, chunk_size=1, attention_mask=mask), whole)

    def test_decoding_goes_on_from_it(self, model: PreTrainedModel) -> None:
        ids, name = random_ids(), cache_name(model)
        mask = left_padded(ids, 40)
        whole = one_pass(model, ids, attention_mask=mask)
        ours = wf.prefill(model, ids, chunk_size=33, attention_mask=mask)
        for token in random_ids(2, 3, seed=5).split(1, dim=1):
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            whole = one_pass(model, token, attention_mask=mask, **{name: whole[name]})
            ours = one_pass(model, token, attention_mask=mask, **{name: ours[name]})
            assert relative(ours["logits"], whole["logits"]) < 1e-4

    def test_a_second_turn_counts_what_the_cache_holds(self, model: PreTrainedModel) -> None:
        ids, more, name = random_ids(), random_ids(2, 70, seed=9), cache_name(model)
        mask = left_padded(ids, 40)
        full = torch.cat([mask, left_padded(more, 5)], dim=1)
        whole = one_pass(model, ids, attention_mask=mask)
        whole = one_pass(model, more, attention_mask=full, **{name: whole[name]})
        first = wf.prefill(model, ids, chunk_size=33, attention_mask=mask)
        ours = wf.prefill(model, more, chunk_size=16, attention_mask=full, cache=first[name])
        assert_same(model, ours, whole)

    def test_methods_act_on_it(self) -> None:
        for family, method in CASES:
            if method != "unmodified":
                plain = wf.prefill(extend(tiny_family(family)), random_ids(), chunk_size=50)
                ours = extend(tiny_family(family), *METHODS[method](family))
                other = wf.prefill(ours, random_ids(), chunk_size=50)
                assert relative(other.logits, plain.logits) > 1e-3, (family, method)


class TestContextLength:
    def test_a_prompt_that_comes_in_parts_is_planned_whole(self) -> None:
        model, ids = extend(tiny_mamba(), LongMamba(tiny_calibration())), random_ids(2, 300)
        whole = one_pass(model, ids)
        part = wf.prefill(model, ids[:, :200], context_length=300)
        ours = wf.prefill(model, ids[:, 200:], cache=part.cache_params, context_length=300)
        assert_same(model, ours, whole)
        alone = wf.prefill(model, ids[:, :200])
        assert relative(part.logits, alone.logits) > 1e-4

    def test_less_than_the_prompt_is_refused(self) -> None:
        model, ids = extend(tiny_mamba()), random_ids(2, 30)
        mask = left_padded(ids, 10)
        with pytest.raises(WidefieldError, match="context_length=29: expected at least the 30 tok"):
            wf.prefill(model, ids, attention_mask=mask, context_length=29)
        first = wf.prefill(model, ids, attention_mask=mask)
        with pytest.raises(WidefieldError, match="context_length=35: expected at least the 39 tok"):
            wf.prefill(model, ids[:, :9], cache=first.cache_params, context_length=35)

    def test_a_cache_of_unknown_length_is_refused(self) -> None:
        model = tiny_mamba()
        cache = one_pass(model, random_ids())["cache_params"]
        with pytest.raises(WidefieldError, match="context_length=999: the cache was filled before"):
            wf.prefill(extend(model), random_ids(), cache=cache, context_length=999)


@functools.cache
def tiny_calibration() -> wf.Calibration:
    return wf.calibrate(tiny_mamba(), random_ids(8, TRAINED_AT, seed=3), train_length=TRAINED_AT)


class TestGenerate:
    def test_chunks_generate_the_same_in_a_left_padded_batch(self, model: PreTrainedModel) -> None:
        ids = random_ids()
        call = {"attention_mask": left_padded(ids, 51), "max_new_tokens": 6, "do_sample": False}
        plain = model.generate(ids, **call)
        for size in (16, LENGTH - 1):
            assert torch.equal(model.generate(ids, prefill_chunk_size=size, **call), plain)

    def test_beams_and_several_answers_are_the_same(self, model: PreTrainedModel) -> None:
        ids = random_ids(2, 80)
        call = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
        plain = model.generate(ids, **call)
        assert torch.equal(model.generate(ids, prefill_chunk_size=32, **call), plain)

    def test_samples_of_the_same_seed_are_the_same(self, model: PreTrainedModel) -> None:
        ids = random_ids(1, 80)
        call = {"max_new_tokens": 4, "num_return_sequences": 3, "do_sample": True}
        torch.manual_seed(4)
        plain = model.generate(ids, **call)
        torch.manual_seed(4)
        assert torch.equal(model.generate(ids, prefill_chunk_size=32, **call), plain)

    def test_it_goes_on_from_a_prefilled_cache(self) -> None:
        model, ids = extend(tiny_mamba(), LongMamba(tiny_calibration())), random_ids(1, 200)
        plain = model.generate(ids, max_new_tokens=6, do_sample=False)
        first = wf.prefill(model, ids, chunk_size=64)
        token = first.logits[:, -1].argmax(-1, keepdim=True)
        rest = model.generate(
            token, cache_params=first.cache_params, max_new_tokens=5, do_sample=False
        )
        assert torch.equal(rest, plain[:, 200:])

    def test_embeddings_instead_of_ids_are_cut_too(self) -> None:
        model, ids = extend(tiny_family("jamba")), random_ids()
        embedded = model.get_input_embeddings()(ids)
        call = {"inputs_embeds": embedded, "max_new_tokens": 5, "do_sample": False}
        plain = model.generate(**call)
        assert torch.equal(model.generate(prefill_chunk_size=40, **call), plain)

    @pytest.mark.parametrize("size", [0, -4])
    def test_an_impossible_chunk_size_is_refused(self, size: int) -> None:
        with pytest.raises(WidefieldError, match=f"chunk size {size}: expected tokens, at least 1"):
            extend(tiny_mamba()).generate(random_ids(), prefill_chunk_size=size, max_new_tokens=2)

    def test_without_a_cache_there_are_no_chunks(self) -> None:
        with pytest.raises(WidefieldError, match="needs a cache: leave out use_cache=False"):
            extend(tiny_mamba()).generate(
                random_ids(), prefill_chunk_size=9, use_cache=False, max_new_tokens=2
            )

    def test_a_static_cache_is_refused(self) -> None:
        with pytest.raises(WidefieldError, match="leave out cache_implementation"):
            extend(tiny_family("jamba")).generate(
                random_ids(), prefill_chunk_size=9, cache_implementation="static", max_new_tokens=2
            )

    def test_a_shortened_attention_cache_is_refused_where_its_length_is_read(self) -> None:
        model, ids = extend(tiny_family("jamba"), decimamba("jamba")), random_ids()
        cache = wf.prefill(model, ids).past_key_values
        longer = torch.cat([ids, ids[:, :9]], dim=1)
        with pytest.raises(WidefieldError, match="decimamba has shortened it"):
            model.generate(longer, past_key_values=cache, max_new_tokens=2)


class TestJambaWithFewerTokens:
    """Its attention layers hold different numbers of tokens; the model makes one mask for all."""

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("layers", [(0,), (2,), (0, 4)])
    @torch.no_grad()
    def test_a_left_padded_row_equals_the_row_alone(
        self, attention: str, layers: tuple[int, ...]
    ) -> None:
        model = tiny_family("jamba", attn_implementation=attention)
        extend(model, DeciMamba(layers=layers, base_length=30, min_length=4))
        ids = random_ids()
        mask = left_padded(ids, 61)
        call = {"max_new_tokens": 6, "do_sample": False}
        both = model.generate(ids, attention_mask=mask, **call)
        assert torch.equal(both[1, LENGTH:], model.generate(ids[1:, 61:], **call)[0, LENGTH - 61 :])
        assert torch.equal(both[:1], model.generate(ids[:1], **call))
        held = [n.keys.shape[2] for n in one_pass(model, ids).past_key_values.layers[1::2]]
        assert held == ([30, 30] if 0 in layers else [LENGTH, 30])

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_the_second_turn_of_a_padded_row_equals_the_row_alone(self, attention: str) -> None:
        model = tiny_family("jamba", attn_implementation=attention)
        extend(model, DeciMamba(layers=(0,), base_length=30, min_length=4))
        ids, more = random_ids(), random_ids(2, 25, seed=8)
        mask = left_padded(ids, 70)
        cache = one_pass(model, ids, attention_mask=mask)["past_key_values"]
        both = one_pass(
            model,
            more,
            attention_mask=torch.cat([mask, torch.ones_like(more)], dim=1),
            past_key_values=cache,
        )
        cache = one_pass(model, ids[1:, 70:])["past_key_values"]
        alone = one_pass(model, more[1:], past_key_values=cache)
        assert relative(both["logits"][1:], alone["logits"]) < 1e-4

    def test_zamba_may_not_drop_tokens(self) -> None:
        with pytest.raises(WidefieldError, match="joins the tokens with the embeddings"):
            extend(tiny_family("zamba"), decimamba("zamba"))


class TestTiles:
    """A mixer walks along its input in tiles; how long they are is not to be seen."""

    @pytest.mark.parametrize("tile", [7, 64])
    def test_the_length_of_a_tile_changes_nothing(
        self, model: PreTrainedModel, tile: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids = random_ids()
        mask = left_padded(ids, 61)
        whole = one_pass(model, ids, attention_mask=mask)
        monkeypatch.setitem(_mixer.TILE, "cpu", 2 * tile)
        assert_same(model, one_pass(model, ids, attention_mask=mask), whole)

    def test_a_mixer_never_holds_more_than_a_tile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(_mixer.TILE, "cpu", 32)
        for method in METHODS:
            model: Any = extend(tiny_family("mamba"), *METHODS[method]("mamba"))
            projected: list[int] = []
            for layer in model.backbone.layers:
                layer.mixer.in_proj.register_forward_hook(
                    lambda module, args, out, noted=projected: noted.append(out.shape[1])
                )
            one_pass(model, random_ids())
            assert max(projected) == 16
            assert projected[:6] == [16] * 5 + [10]

    def test_an_observer_sees_whole_inputs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(_mixer.TILE, "cpu", 8)
        seen: list[tuple[int, int]] = []

        def note(layer: int, inputs: ScanInputs) -> None:
            seen.append((layer, inputs.x.shape[1]))

        model = extend(tiny_mamba())
        with observed(model, note):
            one_pass(model, random_ids())
        assert seen == [(0, LENGTH), (1, LENGTH)]

    def test_gradients_see_whole_inputs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = random_ids(1, 30)
        model: Any = extend(tiny_mamba())
        model(ids, labels=ids).loss.backward()
        before = model.backbone.layers[0].mixer.A_log.grad.clone()
        model.zero_grad()
        monkeypatch.setitem(_mixer.TILE, "cpu", 4)
        model(ids, labels=ids).loss.backward()
        assert torch.equal(model.backbone.layers[0].mixer.A_log.grad, before)


class TestMemory:
    def test_what_is_held_back_does_not_grow_with_the_prompt(self) -> None:
        model = extend(tiny_mamba(), DeciMamba(layers=(0, 1), base_length=20, min_length=4))
        most = []
        for length in (300, 3000):
            held: list[int] = []
            cache = DynamicCache(config=model.config)

            def note(done: int, total: int, cache: DynamicCache = cache, held: list = held) -> None:
                pieces = cache.widefield_prefill.survivors[0]._pieces
                held.append(sum(piece.score.shape[1] for piece in pieces))

            wf.prefill(model, random_ids(1, length), chunk_size=50, cache=cache, progress=note)
            most.append(max(held))
        assert most[0] == most[1] == 21 + 21  # of a longer chunk, too, the best ones alone are held

    def test_peak_memory_does_not_grow_with_the_prompt(self) -> None:
        script = """
import resource, torch, widefield as wf
from tests.models import tiny_mamba
for methods in ((), (wf.DeciMamba(layers=(1,), base_length=500),)):
    model = wf.extend(tiny_mamba(), *methods)
    peaks = []
    for length in (4_000, 4_000, 40_000):
        ids = torch.randint(3, 380, (1, length), dtype=torch.int32)
        wf.prefill(model, ids, chunk_size=2_000)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(peaks[2] - peaks[1])
"""
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        one_tensor = 40_000 * 64 * 4 // 1024  # kB of one (L, D) float32 of the long prompt
        assert [int(line) < one_tensor / 4 for line in run.stdout.split()] == [True, True]


class TestRefusals:
    def test_a_model_that_is_not_extended_is_refused(self) -> None:
        with pytest.raises(WidefieldError, match=r"MambaForCausalLM is not extended.*wf\.extend"):
            wf.prefill(tiny_mamba(), random_ids())

    def test_a_model_without_a_head_is_refused(self) -> None:
        with pytest.raises(WidefieldError, match="MambaModel has no language-model head"):
            wf.prefill(extend(MambaModel(tiny_mamba().config)), random_ids())

    @pytest.mark.parametrize("size", [0, -1, True, 2.5, None])
    def test_an_impossible_chunk_size_is_refused(self, size: object) -> None:
        with pytest.raises(WidefieldError, match=f"chunk size {size}: expected tokens"):
            wf.prefill(extend(tiny_mamba()), random_ids(), chunk_size=size)  # type: ignore

    def test_ids_of_another_shape_are_refused(self) -> None:
        model = extend(tiny_mamba())
        with pytest.raises(WidefieldError, match=r"input_ids is \(90,\): expected a tensor"):
            wf.prefill(model, random_ids()[0])
        with pytest.raises(WidefieldError, match="the prompt is empty"):
            wf.prefill(model, random_ids(1, 0))

    def test_a_bad_mask_is_refused_before_the_first_chunk(self) -> None:
        model, ids = extend(tiny_family("jamba")), random_ids()
        cache = DynamicCache(config=model.config)
        for edge, said in ((slice(-3, None), "right-padded in row 0"), (slice(5, 6), "hole")):
            mask = torch.ones_like(ids)
            mask[0, edge] = 0
            with pytest.raises(WidefieldError, match=said):
                wf.prefill(model, ids, attention_mask=mask, cache=cache, chunk_size=20)
        assert cache.get_seq_length() == 0

    def test_an_error_on_the_way_leaves_no_prefill_on_the_cache(self) -> None:
        model = extend(tiny_mamba(), DeciMamba(layers=(1,), base_length=9, min_length=4))
        model.backbone.layers[1].mixer.dt_proj.bias.data[3] = torch.nan
        cache = DynamicCache(config=model.config)
        with pytest.raises(WidefieldError, match="layer 1: non-finite Δ"):
            wf.prefill(model, random_ids(), cache=cache, chunk_size=20)
        assert not hasattr(cache, "widefield_prefill")


def test_progress_is_told_after_each_chunk() -> None:
    told: list[tuple[int, int]] = []
    wf.prefill(
        extend(tiny_mamba()),
        random_ids(),
        chunk_size=40,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(40, 90), (80, 90), (90, 90)]


def test_two_prompts_are_prefilled_in_threads_on_one_model() -> None:
    model = extend(
        tiny_mamba(), LongMamba(tiny_calibration()), DeciMamba(layers=(1,), base_length=50)
    )
    prompts = [random_ids(1, 200, seed=4), random_ids(1, 350, seed=5)]
    alone = [wf.prefill(model, ids, chunk_size=30).logits for ids in prompts]
    together: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        for _ in range(3):
            together[i].append(wf.prefill(model, prompts[i], chunk_size=30).logits)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(together[i]) == 3
        assert all(torch.equal(logits, alone[i]) for logits in together[i])

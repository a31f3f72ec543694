"""prefill(cuda_graph=True): the same numbers as without, and clear words where there is no graph.

Without a GPU the recorded chunk runs again instead of being replayed, in the same tensors, so that
all but the recording itself is tested everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widefield as wf
from tests.families.cases import CASES
from tests.graphs import rerun_recordings
from tests.models import tiny_mamba
from widefield import decoding, recording
from widefield.extension import extend, observed
from widefield.methods import DeciMamba, LongMamba

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [pytest.mark.gpu] if GPU else []
KINDS = ("mamba", "falcon-mamba", "mamba2")
IDS = torch.randint(3, 380, (3, 50), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each recording."""
    found: list[int] = []
    if not GPU:
        rerun_recordings(monkeypatch)
    real = recording.record

    def record(*args: Any) -> Any:
        found.append(1)
        return real(*args)

    monkeypatch.setattr(recording, "record", record)
    return found


@pytest.fixture(scope="module")
def calibration() -> wf.Calibration:
    ids = torch.randint(3, 380, (8, 32), generator=torch.Generator().manual_seed(3))
    return wf.calibrate(tiny_mamba(), ids, train_length=32)


def extended(kind: str = "mamba", *methods: Any) -> Any:
    return extend(CASES[kind].make().to(DEVICE), *methods)


def cache_of(outputs: Any) -> Any:
    return outputs.get("cache_params") or outputs.get("past_key_values")


def states(outputs: Any) -> list[Tensor]:
    return decoding.states_of(cache_of(outputs))


def same(plain: Any, replayed: Any) -> bool:
    """Whether logits, states and what they have read are the same bit for bit."""
    seen = [[e.widefield_seen for e in cache_of(o).layers] for o in (plain, replayed)]
    pairs = zip(states(plain), states(replayed), strict=True)
    return (
        type(plain) is type(replayed)
        and torch.equal(plain.logits, replayed.logits)
        and all(torch.equal(a, b) for a, b in pairs)
        and seen[0] == seen[1]
    )


def both(model: Any, ids: Tensor = IDS, **options: Any) -> tuple[Any, Any]:
    """The prefill without a graph and with one."""
    plain = wf.prefill(model, ids, **options)
    return plain, wf.prefill(model, ids, cuda_graph=True, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 25, 50, 64])
def test_a_replayed_prefill_is_bit_for_bit_the_same(kind: str, size: int) -> None:
    model = extended(kind)
    for ids in (IDS, IDS.flip(1)):
        assert same(*both(model, ids, chunk_size=size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_is_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    assert same(*both(extended().to(dtype), chunk_size=20))


def test_it_is_the_same_in_inference_mode_and_outside_behind_it() -> None:
    model = extended()
    with torch.inference_mode():
        assert same(*both(model, chunk_size=20))
    assert same(*both(model, chunk_size=20))


def test_a_length_is_recorded_once_behind_nothing_and_once_behind_a_state(made: list[int]) -> None:
    model = extended()
    for ids in (IDS, IDS.flip(1), IDS[:, 5:]):
        assert same(*both(model, ids, chunk_size=10))
    assert len(made) == 2
    wf.prefill(model, IDS[:2], chunk_size=10, cuda_graph=True)
    assert len(made) == 4


def test_a_second_turn_goes_on_from_a_cache() -> None:
    model, turns = extended(), []
    for graph in (False, True):
        outputs = wf.prefill(model, IDS, chunk_size=20, cuda_graph=graph)
        ids = IDS.flip(1)[:, :33]
        cache = cache_of(outputs)
        turns.append(wf.prefill(model, ids, chunk_size=10, cache=cache, cuda_graph=graph))
        assert cache_of(turns[-1]) is cache
    assert same(*turns)


@torch.no_grad()
def test_generation_goes_on_from_a_replayed_prefill() -> None:
    model = extended()
    answers = [
        model(IDS[:, :1], cache_params=cache_of(outputs)).logits
        for outputs in both(model, chunk_size=20)
    ]
    assert torch.equal(*answers)


def test_logits_are_not_written_over_by_the_next_prefill() -> None:
    model = extended()
    first = wf.prefill(model, IDS, cuda_graph=True)
    kept = first.logits.clone(), [state.clone() for state in states(first)]
    wf.prefill(model, IDS.flip(1), cuda_graph=True)
    assert torch.equal(first.logits, kept[0])
    assert all(torch.equal(a, b) for a, b in zip(states(first), kept[1], strict=True))


def test_chunks_with_padding_run_without_a_graph() -> None:
    model, mask = extended(), torch.ones_like(IDS)
    mask[1, :13] = 0
    assert same(*both(model, chunk_size=10, attention_mask=mask))
    assert same(*both(model, chunk_size=10, attention_mask=torch.ones_like(mask)))


def test_a_plan_goes_with_the_length_of_each_prompt(
    calibration: wf.Calibration, made: list[int]
) -> None:
    model = extend(tiny_mamba().to(DEVICE), LongMamba(calibration, reduction="slowest"))
    for length in (50, 41, 50):
        assert same(*both(model, IDS[:, :length], chunk_size=10))
    assert len(made) == 2
    assert same(*both(model, chunk_size=10, context_length=400))
    with wf.extended(model):
        plain = wf.prefill(model, IDS, chunk_size=10)
    assert not torch.equal(plain.logits, wf.prefill(model, IDS, chunk_size=10).logits)


def changed_in_place(model: Any) -> None:
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(-1.0)


def other_rates(model: Any) -> None:
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log.add_(0.5)


def replaced(model: Any) -> None:
    model.lm_head = nn.Linear(32, model.config.vocab_size, bias=False).to(DEVICE)


def other_settings(model: Any) -> None:
    model.backbone.layers[0].norm.variance_epsilon = 0.5


def in_double(model: Any) -> None:
    model.to(torch.float64)


CHANGES = (changed_in_place, other_rates, replaced, other_settings, in_double)


@pytest.mark.parametrize("change", CHANGES)
def test_a_chunk_is_recorded_again_when_the_model_changes(
    change: Callable[[Any], None], made: list[int]
) -> None:
    model = extend(tiny_mamba().to(DEVICE))
    before = wf.prefill(model, IDS, cuda_graph=True)
    change(model)
    plain, replayed = both(model)
    assert same(plain, replayed)
    assert len(made) == 2
    assert not torch.equal(before.logits.double(), replayed.logits.double())
    assert len(model.widefield.recordings._free) == 1


def test_a_copy_of_a_model_has_recordings_of_its_own() -> None:
    model = extended()
    plain, _ = both(model)
    twin = copy.deepcopy(model)
    assert not twin.widefield.recordings._free
    assert same(plain, wf.prefill(twin, IDS, cuda_graph=True))


def test_no_more_than_a_few_recordings_are_kept() -> None:
    model = extended()
    for length in range(2, 14):
        wf.prefill(model, IDS[:, :length], cuda_graph=True)
    assert len(model.widefield.recordings._free) == 8


def test_recordings_too_large_for_the_room_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, made: list[int]
) -> None:
    model = extended()
    monkeypatch.setattr(recording, "_room", lambda device: -1.0)
    for _ in range(2):
        assert same(*both(model))
    assert not model.widefield.recordings._free
    assert len(made) == 2


@pytest.mark.skipif(not GPU, reason="without a GPU nothing is recorded")
def test_it_is_known_what_recordings_hold() -> None:
    model = extended()
    for length in (50, 40, 30):
        wf.prefill(model, IDS[:, :length], cuda_graph=True)
    assert all(graph.bytes > 1000 for _, graph in model.widefield.recordings._free)


def test_an_interrupted_prefill_leaves_what_was_read_in_the_cache() -> None:
    model, caches = extended(), []

    def interrupt(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    for graph in (False, True):
        cache = cache_of(wf.prefill(model, IDS[:, :9], chunk_size=9))
        with pytest.raises(KeyboardInterrupt):
            wf.prefill(model, IDS, chunk_size=10, cache=cache, progress=interrupt, cuda_graph=graph)
        caches.append(cache)
    pairs = zip(*(decoding.states_of(cache) for cache in caches), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [[e.widefield_seen for e in c.layers] for c in caches][1] == [
        entry.widefield_seen for entry in caches[0].layers
    ]
    assert same(*both(model, chunk_size=10))


def test_two_threads_read_with_one_model() -> None:
    model = extended()
    plain = wf.prefill(model, IDS, chunk_size=10)
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(wf.prefill, model, IDS, chunk_size=10, cuda_graph=True) for _ in range(4)
        ]
    assert all(same(plain, run.result()) for run in runs)


def test_a_state_that_is_not_finite_is_an_error(calibration: wf.Calibration) -> None:
    model = extend(tiny_mamba().to(DEVICE), LongMamba(calibration, reduction="slowest"))
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log.view(-1)[0] = torch.nan
    with pytest.raises(wf.WidefieldError, match="not finite"):
        wf.prefill(model, IDS, chunk_size=10, cuda_graph=True)


def test_methods_that_choose_tokens_are_refused() -> None:
    model = extended("mamba", DeciMamba(layers=(1,), base_length=10, min_length=5))
    with pytest.raises(wf.WidefieldError, match=r"keep all tokens.*leave cuda_graph out"):
        wf.prefill(model, IDS, cuda_graph=True)
    assert wf.prefill(model, IDS).logits.shape[1] == 1


def test_a_model_on_the_cpu_is_told_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_GPU", "cuda")
    model = extend(tiny_mamba())
    with pytest.raises(wf.WidefieldError, match=r"on cpu.*leave cuda_graph out"):
        wf.prefill(model, IDS.cpu(), cuda_graph=True)


def test_attention_layers_are_refused_by_their_growing_cache() -> None:
    with pytest.raises(wf.WidefieldError, match="keep the keys of every token"):
        wf.prefill(extended("jamba"), IDS, cuda_graph=True)


def test_hooks_that_a_replay_would_not_call_are_refused() -> None:
    model = extend(tiny_mamba().to(DEVICE))
    plain, _ = both(model)
    hook = model.backbone.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(wf.WidefieldError, match=r"backbone\.layers\.1 has"):
        wf.prefill(model, IDS, cuda_graph=True)
    hook.remove()
    assert same(plain, wf.prefill(model, IDS, cuda_graph=True))


def test_what_a_replay_would_not_show_is_refused_behind_a_recording_too() -> None:
    model = extended()
    plain, _ = both(model)
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(wf.WidefieldError, match="autocast"),
    ):
        wf.prefill(model, IDS, cuda_graph=True)
    with (
        observed(model, lambda layer, inputs: None),
        pytest.raises(wf.WidefieldError, match="nobody observes"),
    ):
        wf.prefill(model, IDS, cuda_graph=True)
    model.config.output_hidden_states = True
    with pytest.raises(wf.WidefieldError, match="output_hidden_states"):
        wf.prefill(model, IDS, cuda_graph=True)
    model.config.output_hidden_states = False
    assert same(plain, wf.prefill(model, IDS, cuda_graph=True))


def test_a_recording_that_is_given_back_behind_a_change_is_not_kept(made: list[int]) -> None:
    model = extended()

    def change(done: int, total: int) -> None:
        if done == 10:
            with torch.no_grad():
                model.backbone.norm_f.weight.mul_(-1.0)
            assert same(*both(model, IDS[:1], chunk_size=50))

    wf.prefill(model, IDS, chunk_size=10, progress=change, cuda_graph=True)
    count = len(made)
    assert same(*both(model, chunk_size=10))
    assert len(made) == count + 2


class Waits(nn.Linear):
    """A head that waits for the GPU, which nothing that is recorded may do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.0 if input.isfinite().all().item() else 0.0)


@pytest.mark.skipif(not GPU, reason="without a GPU nothing is recorded")
def test_a_chunk_that_cannot_be_recorded_is_refused_and_the_model_goes_on() -> None:
    model = extend(tiny_mamba().to(DEVICE))
    head, model.lm_head = model.lm_head, Waits(32, model.config.vocab_size, bias=False).to(DEVICE)
    with pytest.raises(wf.WidefieldError, match="that CUDA can record"):
        wf.prefill(model, IDS, cuda_graph=True)
    assert wf.prefill(model, IDS).logits.shape[1] == 1
    model.lm_head = head
    assert same(*both(model))

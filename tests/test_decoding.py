"""generate(cuda_graph=True): the same tokens as without, and clear words where there is no graph.

Without a GPU the recorded step runs again instead of being replayed, in the same tensors, so that
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
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import widefield as wf
from tests.families.cases import CASES
from tests.graphs import rerun_recordings
from tests.models import tiny_mamba
from widefield import decoding
from widefield.extension import extend, restore
from widefield.methods import DeciMamba, LongMamba

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
EXPERTS = ("jamba", "granite", "nemotron-h")  # in float32 the CPU has to hear which are asked
pytestmark = [pytest.mark.gpu] if GPU else []
PADDING = (0, 5, 29)
IDS = torch.randint(3, 380, (3, 30), generator=torch.Generator().manual_seed(1)).to(DEVICE)
MASK = torch.stack([(torch.arange(30) >= padding).long() for padding in PADDING]).to(DEVICE)


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        rerun_recordings(monkeypatch)


@pytest.fixture(scope="module")
def calibration() -> wf.Calibration:
    ids = torch.randint(3, 380, (8, 32), generator=torch.Generator().manual_seed(3))
    return wf.calibrate(tiny_mamba(), ids, train_length=32)


def extended(kind: str = "mamba") -> Any:
    """Of the tests here, or a case of the families' tests, which also have attention layers."""
    if kind in CASES and kind != "mamba":
        return extend(CASES[kind].make().to(DEVICE))
    return extend(tiny_mamba().to(DEVICE))


def generated(model: Any, ids: Tensor = IDS, mask: Tensor | None = MASK, **kwargs: Any) -> Any:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **kwargs}
    return model.generate(ids, attention_mask=mask, **options)


def both(model: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The answers without a graph and with one, from the same seed."""
    answers = []
    for graph in (False, True):
        torch.manual_seed(5)
        answers.append(generated(model, cuda_graph=graph, **kwargs))
    return answers[0], answers[1]


class Kept(BaseStreamer):
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.done = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.done = True


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one token": {"max_new_tokens": 1},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "at least": {"eos_token_id": list(range(3, 200)), "min_new_tokens": 4, "pad_token_id": 0},
    "ends": {"eos_token_id": list(range(3, 120)), "pad_token_id": 0, "do_sample": True},
    "ends at once": {"eos_token_id": list(range(384)), "pad_token_id": 0},
    "time": {"max_time": 1e6},
    "chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_are_those_without_a_graph(options: dict[str, Any]) -> None:
    plain, graphed = both(extended(), **options)
    assert torch.equal(plain, graphed)


@pytest.mark.parametrize("kind", CASES)
def test_every_family_decodes_through_a_graph(kind: str) -> None:
    model = extended(kind)
    if kind in EXPERTS:
        model.set_experts_implementation("batched_mm")
    for rows in (1, 3):
        plain, graphed = both(model, ids=IDS[:rows], mask=MASK[:rows])
        assert torch.equal(plain, graphed)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_layers_give_the_same_tokens(options: dict[str, Any]) -> None:
    plain, graphed = both(extended("bamba"), **options)
    assert torch.equal(plain, graphed)


def test_attention_in_plain_torch_gives_the_same_tokens() -> None:
    model = extended("granite-rotary")
    plain, graphed = both(model)
    model.set_attn_implementation("eager")
    assert all(torch.equal(answer, plain) for answer in (graphed, *both(model)))


def test_attention_goes_on_behind_a_cache_that_was_kept() -> None:
    model, caches = extended("falcon-h1"), []
    for graph in (False, True):
        options = {"return_dict_in_generate": True, "cuda_graph": graph}
        first = generated(model, **options)
        ids, cache = first.sequences, first.past_key_values
        mask = torch.cat([MASK, MASK.new_ones(3, 12)], dim=1)
        caches.append((generated(model, ids, mask, past_key_values=cache, **options), cache))
    (plain, expected), (graphed, found) = caches
    assert torch.equal(plain.sequences, graphed.sequences)
    for entry, ours in zip(expected.layers, found.layers, strict=True):
        assert entry.keys.shape == ours.keys.shape == (3, 2, 53, 8)
        torch.testing.assert_close(ours.keys, entry.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, entry.values, rtol=1e-4, atol=1e-4)


def test_a_step_of_attention_is_recorded_once_for_prompts_of_nearly_one_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, made = extended("bamba"), recordings(monkeypatch)
    for ids in (IDS, IDS[:, 3:], IDS.repeat(1, 9)):
        plain, graphed = both(model, ids=ids, mask=None)
        assert torch.equal(plain, graphed)
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_tokens_are_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    model = extended().to(dtype)
    for rows in (1, 20):
        ids, mask = IDS[:1].repeat(rows, 1), MASK[:1].repeat(rows, 1)
        plain, graphed = both(model, ids=ids, mask=mask)
        assert torch.equal(plain, graphed)


@pytest.mark.filterwarnings("ignore:You are calling .generate")  # transformers before 5.20 warns
def test_a_prompt_may_lie_on_the_cpu() -> None:
    model = extended()
    ids = IDS[:2].cpu()
    plain, graphed = both(model, ids=ids, mask=torch.ones_like(ids))
    assert torch.equal(plain, graphed)
    assert graphed.device == ids.device


def test_methods_act_on_the_prompt_as_ever(calibration: wf.Calibration) -> None:
    methods = [LongMamba(calibration), DeciMamba(layers=(1,), base_length=10, min_length=5)]
    model = extend(tiny_mamba().to(DEVICE), *methods)
    plain, graphed = both(model)
    assert torch.equal(plain, graphed)


def test_scores_and_logits_come_with_the_tokens() -> None:
    detailed = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, graphed = both(extended(), do_sample=True, top_k=20, **detailed)
    assert torch.equal(plain.sequences, graphed.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(graphed, name), getattr(plain, name)
        assert len(ours) == len(theirs) == 12
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("eos", [None, list(range(3, 250))], ids=["full", "ends"])
@pytest.mark.parametrize("given", [False, True], ids=["returned", "given"])
def test_a_cache_that_is_kept_ends_as_without_a_graph(eos: Any, given: bool) -> None:
    model, caches = extended(), []
    for graph in (False, True):
        options: dict[str, Any] = {"cuda_graph": graph, "eos_token_id": eos, "pad_token_id": 0}
        if given:
            caches.append(DynamicCache(config=model.config))
            generated(model, cache_params=caches[-1], **options)
        else:
            answer = generated(model, return_dict_in_generate=True, **options)
            caches.append(answer.past_key_values)
    plain, graphed = caches
    for entry, ours in zip(plain.layers, graphed.layers, strict=True):
        assert torch.equal(entry.conv_states[0], ours.conv_states[0])
        assert torch.equal(entry.recurrent_states[0], ours.recurrent_states[0])
        assert entry.widefield_seen == ours.widefield_seen


def test_a_stream_gets_every_token_and_no_more() -> None:
    model, streams = extended(), []
    options = {"do_sample": True, "eos_token_id": list(range(3, 60)), "max_new_tokens": 40}
    for graph in (False, True):
        streams.append(Kept())
        torch.manual_seed(5)
        generated(
            model, IDS[:1], None, streamer=streams[-1], cuda_graph=graph, pad_token_id=0, **options
        )
    assert streams[0].parts == streams[1].parts
    assert streams[1].done


def test_random_numbers_go_on_as_without_a_graph() -> None:
    model, after = extended(), []
    for graph in (False, True):
        torch.manual_seed(5)
        options = {"do_sample": True, "eos_token_id": list(range(3, 120)), "pad_token_id": 0}
        generated(model, cuda_graph=graph, **options)
        after.append(torch.rand(4, device=DEVICE))
    assert torch.equal(*after)


def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each recording from now on."""
    made: list[int] = []
    before = decoding.StepGraph._record

    def record(graph: Any, model: nn.Module) -> None:
        made.append(1)
        before(graph, model)

    monkeypatch.setattr(decoding.StepGraph, "_record", record)
    return made


def test_a_step_is_recorded_once_for_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = extended(), recordings(monkeypatch)
    for ids in (IDS, IDS.flip(1), IDS[:, 3:]):
        plain, graphed = both(model, ids=ids, mask=None)
        assert torch.equal(plain, graphed)
    assert len(made) == 1
    generated(model, IDS[:2], MASK[:2], cuda_graph=True)
    assert len(made) == 2


def changed_in_place(model: Any) -> None:
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(-1.0)


def replaced(model: Any) -> None:
    model.lm_head = nn.Linear(32, 384, bias=False).to(DEVICE)


def in_double(model: Any) -> None:
    model.to(torch.float64)


@pytest.mark.parametrize("change", [changed_in_place, replaced, in_double])
def test_a_step_is_recorded_again_when_the_model_changes(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = extended(), recordings(monkeypatch)
    before = generated(model, cuda_graph=True)
    change(model)
    plain, graphed = both(model)
    assert torch.equal(plain, graphed)
    assert len(made) == 2
    if change is not in_double:
        assert not torch.equal(before, graphed)


def test_new_methods_and_a_restored_model_start_anew(calibration: wf.Calibration) -> None:
    model = extended()
    generated(model, cuda_graph=True)
    extend(model, LongMamba(calibration))
    plain, graphed = both(model)
    assert torch.equal(plain, graphed)
    restore(model)
    with pytest.raises(ValueError, match="cuda_graph"):
        generated(model, cuda_graph=True)


@pytest.mark.parametrize("kind", ["mamba", "bamba"])
def test_a_step_is_recorded_for_inference_mode_and_for_outside_of_it(kind: str) -> None:
    model = extended(kind)
    plain = generated(model)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert torch.equal(generated(model, cuda_graph=True), plain)


def test_a_copy_of_a_model_has_graphs_of_its_own() -> None:
    model = extended()
    generated(model, cuda_graph=True)
    twin = copy.deepcopy(model)
    assert torch.equal(generated(twin, cuda_graph=True), generated(model, cuda_graph=True))


def test_no_more_than_a_few_graphs_are_kept() -> None:
    model = extended()
    for rows in range(1, 8):
        generated(model, IDS[:1].repeat(rows, 1), None, cuda_graph=True)
    assert len(model.widefield.graphs._free) == 4


class Interrupts(LogitsProcessor):
    """Ctrl-C at some token."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return scores


def test_an_interrupted_model_goes_on_as_if_nothing_had_been() -> None:
    model = extended()
    plain = generated(model)
    for at in (0, 1, 5):
        with pytest.raises(KeyboardInterrupt):
            generated(
                model, cuda_graph=True, logits_processor=LogitsProcessorList([Interrupts(at)])
            )
        assert torch.equal(generated(model, cuda_graph=True), plain)


class Nested(LogitsProcessor):
    """Generates with the same model while it generates."""

    def __init__(self, model: Any) -> None:
        self.model, self.answers = model, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.answers.append(generated(self.model, cuda_graph=True))
        return scores


def test_a_graph_in_use_is_not_lent_twice() -> None:
    model = extended()
    plain = generated(model)
    nested = Nested(model)
    outer = generated(model, cuda_graph=True, logits_processor=LogitsProcessorList([nested]))
    assert torch.equal(outer, plain)
    assert all(torch.equal(answer, plain) for answer in nested.answers)


def test_two_threads_decode_with_one_model() -> None:
    model = extended()
    plain = generated(model)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(generated, model, cuda_graph=True) for _ in range(4)]
    assert all(torch.equal(run.result(), plain) for run in runs)


REFUSED: dict[str, dict[str, Any]] = {
    "beam search": {"num_beams": 2},
    "use_cache=False": {"use_cache": False},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "cache_implementation": {"cache_implementation": "static"},
    "custom_generate": {"custom_generate": lambda model, **kwargs: None},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_a_graph_cannot_give_is_refused(
    options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model = extended()
    name = request.node.callspec.id
    with pytest.raises(wf.WidefieldError, match=name):
        generated(model, cuda_graph=True, **options)
    assert generated(model, cuda_graph=True).shape == (3, 42)


def test_a_model_on_the_cpu_is_told_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_GPU", "cuda")
    model = extend(tiny_mamba())
    with pytest.raises(wf.WidefieldError, match=r"on cpu.*leave cuda_graph out"):
        generated(model, IDS.cpu(), None, cuda_graph=True)


def test_attention_layers_behind_dropped_tokens_are_refused() -> None:
    model = extend(CASES["granite"].make().to(DEVICE), DeciMamba(layers=(2,), base_length=10))
    with pytest.raises(wf.WidefieldError, match="a method drops some"):
        generated(model, cuda_graph=True)


def test_attention_that_takes_no_mask_is_refused() -> None:
    model = extended("bamba")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(wf.WidefieldError, match="flash_attention_2: load it with 'sdpa'"):
        generated(model, cuda_graph=True)


def test_attention_without_a_limit_is_refused() -> None:
    model, config = extended("bamba"), GenerationConfig(do_sample=False)
    config._pad_token_tensor = None
    with pytest.raises(wf.WidefieldError, match="needs max_new_tokens"):
        decoding.sample(model, IDS, LogitsProcessorList(), StoppingCriteriaList(), config)


def test_a_compiled_model_is_refused() -> None:
    model = extended()
    model.compile(backend="eager")
    with pytest.raises(wf.WidefieldError, match="compile"):
        generated(model, cuda_graph=True)


def test_hooks_that_a_replay_would_not_call_are_refused() -> None:
    model = extended()
    hook = model.backbone.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(wf.WidefieldError, match=r"backbone\.layers\.1 has"):
        generated(model, cuda_graph=True)
    hook.remove()
    assert generated(model, cuda_graph=True).shape == (3, 42)


class Waits(nn.Linear):
    """A head that waits for the GPU, which nothing that is recorded may do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.0 if input.isfinite().all().item() else 0.0)


@pytest.mark.skipif(not GPU, reason="without a GPU nothing is recorded")
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_that_wait_for_the_cpu_are_refused_and_the_model_goes_on(kind: str) -> None:
    model = extended(kind)
    before = generated(model)
    with pytest.raises(wf.WidefieldError, match="that CUDA can record"):
        generated(model, cuda_graph=True)
    assert torch.equal(generated(model), before)


@pytest.mark.skipif(not GPU, reason="without a GPU nothing is recorded")
def test_a_step_that_cannot_be_recorded_is_refused_and_the_model_goes_on() -> None:
    model = extended()
    head, model.lm_head = model.lm_head, Waits(32, 384, bias=False).to(DEVICE)
    with pytest.raises(wf.WidefieldError, match="that CUDA can record"):
        generated(model, cuda_graph=True)
    assert generated(model).shape == (3, 42)
    model.lm_head = head
    plain, graphed = both(model)
    assert torch.equal(plain, graphed)


def test_autocast_is_refused() -> None:
    model = extended()
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        pytest.raises(wf.WidefieldError, match="autocast"),
    ):
        generated(model, cuda_graph=True)


def test_a_text_stream_prints_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(chr(97 + int(i) % 26) for i in ids)

    model, printed = extended(), []
    for graph in (False, True):
        streamer = TextStreamer(Bytes())  # type: ignore[arg-type]
        generated(model, IDS[:1], None, streamer=streamer, cuda_graph=graph)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]

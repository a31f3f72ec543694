"""Grids: identical samples for everybody, stored cell by cell, resumed where they stopped."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import ByT5Tokenizer

from tests.evaluation.oracle import oracle
from tests.models import tiny_mamba
from widefield.errors import WidefieldError
from widefield.evaluation import batches
from widefield.evaluation.grid import BitsGrid, PasskeyGrid
from widefield.evaluation.header import Subject, make_header
from widefield.evaluation.results import Cell, Results
from widefield.evaluation.runner import run_bits, run_passkey
from widefield.plan import LayerPlan, ModelLayout, Pool
from widefield.tasks.texts import Haystack

TEXT = "".join(f"Sentence {i} says nothing that matters much. " for i in range(300))
HAYSTACK = Haystack("numbers", TEXT)
GRID = PasskeyGrid(lengths=(200, 300), depths=(0.0, 0.5, 1.0), trials=2, seed=5)


@dataclass(frozen=True)
class Dropping:
    """A method that keeps the last tokens only; stands for decimation."""

    name: ClassVar[str] = "dropping"
    protect: int = 1

    def validate(self, layout: ModelLayout) -> None:
        pass

    def plan(self, layer: int, lengths: Any) -> LayerPlan:
        return LayerPlan(pool=Pool(keep=40, protect=self.protect) if layer == 1 else None)

    def describe(self) -> dict[str, Any]:
        return {"protect": self.protect}


class Failing(Dropping):
    name: ClassVar[str] = "failing"

    def plan(self, layer: int, lengths: Any) -> LayerPlan:
        if max(lengths) > 250:
            raise WidefieldError("non-finite Δ")
        return LayerPlan()


def subject(model: Any, name: str = "unmodified", *methods: Any) -> Subject:
    return Subject(name, model, ByT5Tokenizer(), methods)


def test_right_answers_are_counted_by_cell() -> None:
    model = oracle(lambda length, _: length < 250)
    results = run_passkey([subject(model)], HAYSTACK, GRID)
    assert [(c.length, c.depth, c.correct, c.trials) for c in results.cells] == [
        *((200, depth, 2, 2) for depth in GRID.depths),
        *((300, depth, 0, 2) for depth in GRID.depths),
    ]
    assert all(cell.seconds >= 0 and cell.task == "passkey" for cell in results.cells)


def test_a_real_model_is_asked_and_left_as_it_was() -> None:
    model = tiny_mamba()
    kind = type(model)
    results = run_passkey([subject(model)], HAYSTACK, PasskeyGrid((200,), (0.5,), trials=2))
    assert results.cells[0].correct == 0 and type(model) is kind


def prompts(seen: list[torch.Tensor], length: int) -> list[list[int]]:
    return sorted(row for batch in seen if batch.shape[1] == length for row in batch.tolist())


@pytest.mark.parametrize("batch_tokens", [1, 450, 1_000_000])
def test_every_method_and_every_batch_size_sees_the_same_samples(batch_tokens: int) -> None:
    first: list[torch.Tensor] = []
    second: list[torch.Tensor] = []
    run_passkey([subject(oracle(lambda *_: True, first))], HAYSTACK, GRID)
    grid = PasskeyGrid((300, 200), (1.0, 0.5, 0.0), trials=2, seed=5, batch_tokens=batch_tokens)
    run_passkey([subject(oracle(lambda *_: False, second), "other")], HAYSTACK, grid)
    for length in (200, 300):
        assert prompts(first, length) == prompts(second, length)
    assert all(batch.numel() <= max(batch_tokens, 300) for batch in second)


def test_another_seed_asks_other_keys() -> None:
    seen: list[torch.Tensor] = []
    for seed in (0, 1):
        run_passkey(
            [subject(oracle(lambda *_: True, seen))], HAYSTACK, PasskeyGrid((200,), (0.5,), 1, seed)
        )
    asked = [batch for batch in seen if batch.shape[1] == 200]
    assert not torch.equal(asked[0], asked[1])


def test_an_interrupted_run_keeps_its_cells_and_goes_on(tmp_path: Path) -> None:
    def interrupt(cell: Cell) -> None:
        if (cell.length, cell.depth) == (200, 0.5):
            raise KeyboardInterrupt

    grid = PasskeyGrid((200, 300), (0.0, 0.5, 1.0), trials=2, batch_tokens=400)
    model = oracle(lambda *_: True)
    with pytest.raises(KeyboardInterrupt):
        run_passkey([subject(model)], HAYSTACK, grid, tmp_path, interrupt)
    assert len(Results.load(tmp_path).cells) == 2
    told: list[Cell] = []
    seen: list[torch.Tensor] = []
    again = oracle(lambda *_: True, seen)
    results = run_passkey([subject(again)], HAYSTACK, grid, tmp_path, told.append)
    assert results.resumed == 2 and len(results.cells) == len(told) == 6
    assert sum(len(batch) for batch in seen if batch.shape[1] == 200) == 2
    assert len(Results.load(tmp_path).cells) == 6


def test_a_finished_run_asks_nothing_again(tmp_path: Path) -> None:
    run_passkey([subject(oracle(lambda *_: True))], HAYSTACK, GRID, tmp_path)
    seen: list[torch.Tensor] = []
    results = run_passkey([subject(oracle(lambda *_: True, seen))], HAYSTACK, GRID, tmp_path)
    assert not seen and len(results.cells) == 6


@pytest.mark.parametrize(
    "other",
    [
        (Haystack("numbers", TEXT + "more"), GRID),
        (HAYSTACK, PasskeyGrid((200,), (0.0,), trials=3, seed=5)),
        (HAYSTACK, PasskeyGrid((200,), (0.0,), trials=2, seed=6)),
    ],
)
def test_another_configuration_is_refused(
    tmp_path: Path, other: tuple[Haystack, PasskeyGrid]
) -> None:
    run_passkey([subject(oracle(lambda *_: True))], HAYSTACK, GRID, tmp_path)
    with pytest.raises(WidefieldError, match="belongs to another run"):
        run_passkey([subject(oracle(lambda *_: True))], *other, tmp_path)


def test_the_header_says_what_was_run() -> None:
    header = run_passkey(
        [subject(oracle(lambda *_: True), "dropping", Dropping())],
        HAYSTACK,
        PasskeyGrid((200,), (0.0,), 1, seed=3),
        command="widefield demo",
    ).header
    assert header["seed"] == 3 and header["command"] == "widefield demo" and header["device"]
    assert header["tasks"]["passkey"]["haystack"] == {"name": "numbers", "sha256": HAYSTACK.sha256}
    assert set(header["versions"]) == {"widefield", "python", "torch", "transformers", "numpy"}
    described = header["subjects"]["dropping"]
    assert described["methods"] == {"dropping": {"protect": 1}}
    assert described["dtype"] == "float32" and len(described["fingerprint"]) >= 8


def test_a_length_that_cannot_hold_the_needle_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    seen: list[torch.Tensor] = []
    model = oracle(lambda *_: True, seen)
    with pytest.raises(WidefieldError, match="at least 195"):
        run_passkey([subject(model)], HAYSTACK, PasskeyGrid((200, 150)), tmp_path)
    assert not seen and not list(tmp_path.iterdir())


def test_a_method_that_fails_is_named_with_its_cell_and_the_rest_is_kept(tmp_path: Path) -> None:
    grid = PasskeyGrid((200, 300), (0.5,), trials=1)
    with pytest.raises(WidefieldError, match="failing at 300: non-finite Δ"):
        run_passkey([subject(tiny_mamba(), "failing", Failing())], HAYSTACK, grid, tmp_path)
    assert [cell.length for cell in Results.load(tmp_path).cells] == [200]


def test_logits_that_are_not_numbers_are_an_error() -> None:
    model = tiny_mamba()
    model.backbone.norm_f.weight.data.fill_(float("nan"))
    with pytest.raises(WidefieldError, match="NaN"):
        run_passkey([subject(model)], HAYSTACK, PasskeyGrid((200,), (0.5,), trials=1))


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    model = oracle(lambda *_: True)
    generate = model.generate

    def hungry(ids: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(ids, **kwargs)

    monkeypatch.setattr(model, "generate", hungry)
    results = run_passkey([subject(model)], HAYSTACK, PasskeyGrid((300,), (0.0, 1.0), trials=4))
    assert [cell.correct for cell in results.cells] == [4, 4]
    assert sizes[1:] == [8, 4, 2, 2, 2, 2]


def test_one_prompt_too_many_for_the_memory_is_an_error() -> None:
    def run(batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    timer = batches.Stopwatch(torch.device("cpu"))
    with pytest.raises(WidefieldError, match="single prompt of 100 tokens"):
        list(batches.run_batches([1, 2], 100, batches.Budget(1000), run, timer))


def test_batches_are_even() -> None:
    budget = batches.Budget(1000)
    assert budget.rows(100, 11) == 6 and budget.rows(100, 5) == 5 and budget.rows(5000, 3) == 1


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        ([], "nothing to evaluate"),
        ([subject(None), subject(None)], "different names"),
        ([Subject("x", None, None)], "without a tokenizer"),
    ],
)
def test_subjects_that_make_no_sense_are_refused(subjects: list[Subject], message: str) -> None:
    with pytest.raises(WidefieldError, match=message):
        run_passkey(subjects, HAYSTACK, GRID)


def test_bits_are_stored_by_length_and_resumed(tmp_path: Path) -> None:
    grid = BitsGrid((64, 128), windows=3, last=16)
    results = run_bits([subject(tiny_mamba())], [TEXT], grid, tmp_path)
    assert [(c.length, c.trials, c.tokens) for c in results.cells] == [(64, 3, 48), (128, 3, 48)]
    cell = results.cells[0]
    assert cell.bits == cell.bits_per_token and 7 < (cell.bits or 0) < 10
    assert run_bits([subject(tiny_mamba())], [TEXT], grid, tmp_path).resumed == 2


def test_bits_do_not_depend_on_the_batch_size() -> None:
    values = [
        run_bits([subject(tiny_mamba())], [TEXT], BitsGrid((96,), 4, 20, 0, tokens)).cells[0].bits
        for tokens in (1, 200, 100_000)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_a_method_that_drops_tokens_is_told_to_keep_the_scored_ones() -> None:
    decimating = Dropping()
    results = run_bits(
        [subject(tiny_mamba(), "dropping", decimating)], [TEXT], BitsGrid((100,), 2, 20)
    )
    assert results.cells[0].tokens == 40


def test_a_method_that_cannot_keep_the_scored_tokens_is_an_error() -> None:
    with pytest.raises(WidefieldError, match="keeps 40 tokens where 61 are needed"):
        run_bits(
            [subject(tiny_mamba(), "dropping", Dropping())],
            [TEXT],
            BitsGrid((100,), 2, 60),
        )


@pytest.mark.parametrize(
    ("module", "typed"),
    [
        ("widefield.__main__", "widefield eval --seed 1"),
        ("benchmarks.frontier", "python -m benchmarks.frontier eval --seed 1"),
        (None, "widefield eval --seed 1"),
    ],
)
def test_a_header_has_the_command_as_it_is_typed(
    module: str | None, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/widefield", "eval", "--seed", "1"])
    subject = Subject("unmodified", tiny_mamba(), ByT5Tokenizer())
    assert make_header([subject], {}, seed=1)["command"] == typed

"""The results store: atomic, resumable, and never mixing two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from widefield.errors import WidefieldError
from widefield.evaluation.results import Cell, Results, write_atomically


def header(seed: int = 0, **subjects: str) -> dict[str, Any]:
    return {
        "format": 1,
        "seed": seed,
        "command": "widefield demo",
        "versions": {"torch": "2.13"},
        "tasks": {"passkey": {"trials": 4}},
        "subjects": {name: {"fingerprint": mark} for name, mark in subjects.items()},
    }


def cell(
    method: str = "unmodified", length: int = 1024, depth: float = 0.5, right: int = 3
) -> Cell:
    return Cell("passkey", method, length, depth, trials=4, correct=right, seconds=0.5)


def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    results = Results.open(tmp_path, header(unmodified="ab"))
    results.add(cell())
    results.add(Cell("bits", "unmodified", 2048, None, 2, None, 1.0, 1.9, 1.9, 4096))
    read = Results.load(tmp_path)
    assert read.cells == results.cells and read.header == results.header
    assert read.find("passkey", "unmodified", 1024, 0.5) == cell()
    assert read.find("bits", "unmodified", 2048) == results.cells[1]
    assert read.find("passkey", "longmamba", 1024, 0.5) is None


def test_nothing_is_written_before_the_first_cell(tmp_path: Path) -> None:
    Results.open(tmp_path / "out", header())
    assert not (tmp_path / "out").exists()


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    results = Results.open(tmp_path, header())
    for length in (1024, 2048):
        results.add(cell(length=length))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_json_path_is_the_file_itself(tmp_path: Path) -> None:
    Results.open(tmp_path / "mine.json", header()).add(cell())
    assert Results.load(tmp_path / "mine.json").cells == [cell()]


def test_the_same_run_goes_on_whatever_was_typed(tmp_path: Path) -> None:
    Results.open(tmp_path, header(unmodified="ab")).add(cell())
    again = Results.open(tmp_path, {**header(unmodified="ab"), "command": "something else"})
    assert again.resumed == 1 and again.cells == [cell()]


def test_further_methods_join_the_run(tmp_path: Path) -> None:
    Results.open(tmp_path, header(unmodified="ab")).add(cell())
    again = Results.open(tmp_path, header(longmamba="ab"))
    again.add(cell("longmamba"))
    assert Results.load(tmp_path).header["subjects"].keys() == {"unmodified", "longmamba"}
    assert again.methods("passkey") == ["unmodified", "longmamba"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (header(seed=1, unmodified="ab"), "seed was 0, is 1"),
        (header(unmodified="cd"), "subjects.unmodified.fingerprint was 'ab', is 'cd'"),
        ({**header(unmodified="ab"), "versions": {"torch": "2.9"}}, "versions.torch was '2.13'"),
        ({**header(), "tasks": {"passkey": {"trials": 8}}}, "tasks.passkey.trials was 4, is 8"),
    ],
)
def test_another_run_is_refused_with_what_differs(
    tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    Results.open(tmp_path, header(unmodified="ab")).add(cell())
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(WidefieldError) as caught:
        Results.open(tmp_path, other)
    assert said in str(caught.value) and "choose another --out" in str(caught.value)
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"header": {"format": 1}}', '{"header": {}, "cells": [{}]}', "\xff"]
)
def test_a_damaged_file_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(WidefieldError, match="left as it is"):
        Results.open(tmp_path, header())
    assert path.read_bytes() == content.encode("latin-1")


def test_another_format_is_refused(tmp_path: Path) -> None:
    content = {"header": {"format": 99}, "cells": []}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(WidefieldError, match="results format 99"):
        Results.load(tmp_path)


def test_missing_results_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(WidefieldError, match="no results at"):
        Results.load(tmp_path)


def test_shares_are_taken_over_all_depths() -> None:
    results = Results({}, [cell(depth=0.0, right=4), cell(depth=1.0, right=1), cell(length=99)])
    assert results.share("passkey", "unmodified", 1024) == 5 / 8
    assert results.cells[0].share == 1.0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WidefieldError, match="cannot write"):
        write_atomically(tmp_path / "file" / "results.json", b"{}")

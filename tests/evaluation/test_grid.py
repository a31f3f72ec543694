"""Lengths, depths and methods as people write them."""

from __future__ import annotations

import pytest

from widefield.errors import WidefieldError
from widefield.evaluation.grid import (
    BitsGrid,
    PasskeyGrid,
    length_label,
    parse_depths,
    parse_lengths,
    parse_methods,
)


def test_lengths_know_k_and_m() -> None:
    assert parse_lengths("512, 1k,1.5K,64k,1m") == (512, 1024, 1536, 65536, 1048576)


def test_a_length_named_twice_is_asked_once() -> None:
    assert parse_lengths("1k,1024") == (1024,)


@pytest.mark.parametrize("text", ["", "1k,", "abc", "-1k", "0", "1.3", "1kk", "1 k", "1e3"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(WidefieldError, match=r"lengths|not a length"):
        parse_lengths(text)


def test_depths_are_between_zero_and_one() -> None:
    assert parse_depths("0,0.5, 1") == (0.0, 0.5, 1.0)
    for wrong in ("", "0,,1", "2", "-0.1", "nan", "half"):
        with pytest.raises(WidefieldError, match="depth"):
            parse_depths(wrong)


def test_methods_may_be_combined() -> None:
    assert parse_methods("unmodified,longmamba, longmamba+decimamba") == (
        ("unmodified", ()),
        ("longmamba", ("longmamba",)),
        ("longmamba+decimamba", ("longmamba", "decimamba")),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("longmmaba", "did you mean 'longmamba'"),
        ("longmamba+", "unknown method ''"),
        ("unmodified+longmamba", "cannot be combined"),
        ("longmamba+longmamba", "twice"),
        ("", "not a list of methods"),
    ],
)
def test_what_is_no_method_is_refused(text: str, message: str) -> None:
    with pytest.raises(WidefieldError, match=message):
        parse_methods(text)


@pytest.mark.parametrize(
    ("tokens", "label"),
    [(16384, "16k"), (1536, "1.5k"), (1048576, "1M"), (1000, "1000"), (1025, "1025"), (96, "96")],
)
def test_lengths_are_labelled_as_they_are_typed(tokens: int, label: str) -> None:
    assert length_label(tokens) == label


def test_a_grid_without_cells_is_refused() -> None:
    for wrong in ({"lengths": ()}, {"trials": 0}, {"depths": ()}, {"depths": (1.5,)}):
        with pytest.raises(WidefieldError):
            PasskeyGrid(**{"lengths": (1024,), **wrong})
    for wrong in ({"windows": 0}, {"last": 0}):
        with pytest.raises(WidefieldError, match="give at least 1"):
            BitsGrid(**{"lengths": (1024,), **wrong})

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from widefield.errors import WidefieldError
from widefield.ops import _nvrtc


class _Nothing(ctypes.Structure):
    _fields_ = ()


def _launch(monkeypatch: pytest.MonkeyPatch, *answers: int) -> list[str]:
    """What happens in a launch whose driver answers so, call by call."""
    done, left = [], list(answers)

    def launch(*_: Any) -> tuple[int]:
        done.append("launch")
        return (left.pop(0),)

    monkeypatch.setattr(_nvrtc, "_driver", lambda: SimpleNamespace(cuLaunchKernel=launch))
    monkeypatch.setattr(_nvrtc, "current_stream", lambda: 0)
    monkeypatch.setattr(_nvrtc, "_enter_context", lambda: done.append("context"))
    _nvrtc.Kernel(function=None, threads=32, shared=0).launch((1, 1, 1), _Nothing())
    return done


def test_a_launch_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _launch(monkeypatch, 0) == ["launch"]


def test_a_thread_that_has_not_used_the_gpu_gets_its_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _launch(monkeypatch, 201, 0) == ["launch", "context", "launch"]


def test_any_other_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WidefieldError, match="answered with 700"):
        _launch(monkeypatch, 700)

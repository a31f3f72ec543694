"""What the kernels of the CPU are built of: exp, softplus, threads, a place for compiled code."""

from __future__ import annotations

import math
from typing import Any

import numba
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from widefield.ops import _numba
from widefield.ops._numba import BYTES, WIDTH


@_numba.inlined
def _apply_chunk(task, which, target, source, count, rate):
    """Sixteen numbers of a list. `rate` is the address of two floats."""
    i = task * WIDTH
    x = _numba.load_some(source + i * BYTES, count - i)
    if which == 0:
        x = _numba.exp(x)
    elif which == 1:
        x = _numba.softplus(x)
    elif which == 2:
        x = _numba.silu(x)
    else:
        x = _numba.exp_product(x, _numba.load_one(rate), _numba.load_one(rate + BYTES))
    _numba.store_some(target + i * BYTES, x, count - i)


@_numba.Kernel
def apply(call):
    while True:
        task = _numba.next_task(call)
        if task < 0:
            return
        _apply_chunk(task, *_numba.arguments(call, 5))


def run(which: int, x: Tensor, rate: float = 1.0) -> Tensor:
    y = torch.full_like(x, math.nan)
    exact = rate / math.log(2)
    high = torch.tensor(exact)
    rates = torch.stack([high, torch.tensor(exact - high.item())])
    tasks = -(-x.numel() // WIDTH)
    apply(tasks, which, y.data_ptr(), x.data_ptr(), x.numel(), rates.data_ptr())
    return y


def places(result: Tensor, exact: Tensor) -> Tensor:
    """Error in units in the last place."""
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().double())) - 23)
    return (result.double() - exact.double()).abs() / unit


def test_exp_is_within_one_unit_in_the_last_place() -> None:
    x = torch.cat([torch.linspace(-87, 88, 100_001), torch.randn(100_000) * 1e-3])
    assert places(run(0, x), torch.exp(x.double())).max() < 1


@pytest.mark.parametrize("rate", [-1.0, -3.0, -16.0, -0.37])
def test_decay_is_within_one_unit_in_the_last_place_of_the_exact_product(rate: float) -> None:
    delta = torch.cat([torch.rand(100_000) * 86 / -rate, torch.rand(100_000) * 1e-4])
    exact = torch.exp(delta.double() * torch.tensor(rate).double())
    assert places(run(3, delta, torch.tensor(rate).item()), exact).max() < 1


def test_exp_is_exact_where_it_must_be() -> None:
    x = torch.tensor([0.0, -0.0, -1e4, -1e30, -math.inf, math.inf, 1e30, 1e-20])
    assert run(0, x).tolist() == [1, 1, 0, 0, 0, math.inf, math.inf, 1]
    assert run(0, torch.tensor([math.nan])).isnan().all()


def test_softplus_is_within_two_units_in_the_last_place_of_torchs() -> None:
    x = torch.cat([torch.linspace(-86, 30, 200_001), torch.randn(200_000) * 3])
    ours, theirs = run(1, x), F.softplus(x)
    # The scan hands decisions closer to a floor than 6e-7 to torch; twice that is not needed.
    assert ((ours - theirs).abs() / theirs).max() < 3e-7
    assert torch.equal(ours[x > 20], x[x > 20])
    special = torch.tensor([math.inf, -math.inf, -1e30, 1e30])
    assert run(1, special).tolist() == [math.inf, 0, 0, torch.tensor(1e30).item()]
    assert run(1, torch.tensor([math.nan])).isnan().all()


def test_silu_is_as_accurate_as_torchs() -> None:
    x = torch.randn(200_000) * 10
    exact = F.silu(x.double())
    assert places(run(2, x), exact).max() <= 2 * places(F.silu(x), exact).max()


def test_lanes_beyond_the_count_are_neither_read_nor_written() -> None:
    whole = torch.arange(40.0)
    target = torch.full((40,), -1.0)
    apply(2, 1, target.data_ptr(), whole.data_ptr(), 19, 0)
    torch.testing.assert_close(target[:19], F.softplus(whole[:19]))
    assert (target[19:] == -1).all()


@_numba.inlined
def _count_visit(task, visits):
    _numba.store_int(visits + 8 * task, _numba.load_int(visits + 8 * task) + 1)


@_numba.Kernel
def visit(call):
    while True:
        task = _numba.next_task(call)
        if task < 0:
            return
        _count_visit(task, *_numba.arguments(call, 1))


@pytest.mark.parametrize("team", ["torch's threads", "plain threads"])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_task_is_done_once(threads: int, team: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if team == "plain threads":
        monkeypatch.setattr(_numba, "_torch_team", lambda: None)
    elif _numba._torch_team() is None:
        pytest.skip("torch's threads cannot be reached in this build")
    torch.set_num_threads(threads)
    for tasks in (0, 1, 3, 1000):
        visits = torch.zeros(1000, dtype=torch.int64)
        visit(tasks, visits.data_ptr())
        assert visits.tolist() == [1] * tasks + [0] * (1000 - tasks)


def test_kernels_work_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numba.cfunc

    def without_folder(*args: Any, cache: bool = False, **options: Any) -> Any:
        def decorate(function: Any) -> Any:
            if cache:
                raise RuntimeError("cannot cache function: no locator available")
            return plain(*args, **options)(function)

        return decorate

    monkeypatch.setattr(_numba.numba, "cfunc", without_folder)
    visits = torch.zeros(3, dtype=torch.int64)
    _numba.Kernel(visit._function)(3, visits.data_ptr())
    assert visits.tolist() == [1, 1, 1]

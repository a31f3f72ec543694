"""Token scores of the CPU against float64, and what is kept by them."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.cases import DELTAS, in_float64, scan_inputs, ssd_inputs
from tests.ops.triton_device import DEVICE, DTYPES, INTERPRETED, error, on_triton
from widefield import ops
from widefield.errors import WidefieldError
from widefield.ops.pool import cpu, reference
from widefield.plan import Pool, ScanInputs, SSDInputs

POOLS = {
    "norm": Pool(keep=9),
    "clamped": Pool(keep=9, clamp=torch.rand(40)),
    "weighted": Pool(keep=9, weight=torch.rand(40)),
    "both": Pool(keep=9, clamp=torch.rand(40), weight=torch.rand(40)),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softplus", [True, False])
def test_score_is_as_accurate_as_the_references(
    pool: Pool, dtype: torch.dtype, softplus: bool
) -> None:
    inputs = scan_inputs(2, 300, 40, dtype=dtype)
    if not softplus:
        inputs = inputs.replace(delta=inputs.delta.abs(), delta_softplus=False)
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, :50] = False
    inputs = inputs.replace(valid=valid)
    exact = reference.token_score(in_float64(inputs, None)[0], pool)
    ours, theirs = cpu.token_score(inputs, pool), reference.token_score(inputs, pool)
    assert ours.dtype == torch.float32
    allowed = (theirs - exact).abs().max().item()
    assert (ours - exact).abs().max() <= max(2 * allowed, 1e-7 * exact.max().item())
    assert (ours[1, :50] == 0).all()


@pytest.mark.parametrize("delta", DELTAS)
def test_unkind_delta_scores_like_float64(delta: str) -> None:
    inputs = scan_inputs(2, 60, 40, delta=delta)
    exact = reference.token_score(in_float64(inputs, None)[0], POOLS["norm"])
    torch.testing.assert_close(
        cpu.token_score(inputs, POOLS["norm"]).double(), exact, rtol=5e-6, atol=0.0
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_that_is_not_finite_has_a_score_that_is_not_finite(value: float) -> None:
    inputs = scan_inputs(1, 20, 40)
    inputs.delta[0, 7, 3] = value
    score = cpu.token_score(inputs, Pool(keep=9))
    assert (~score.isfinite()).nonzero().tolist() == [[0, 7]]
    with pytest.raises(WidefieldError, match="non-finite Δ"):
        ops.pool_tokens(inputs, Pool(keep=9))


def test_equal_tokens_score_equally_wherever_they_stand() -> None:
    inputs = scan_inputs(1, 700, 37)
    delta = inputs.delta[:, :1].expand(-1, 700, -1).contiguous()
    score = cpu.token_score(inputs.replace(delta=delta), Pool(keep=9))
    assert (score == score[0, 0]).all()


def test_the_best_tokens_are_kept_in_order_with_all_that_belongs_to_them() -> None:
    inputs = scan_inputs(2, 200, 40)
    kept, rows = ops.pool_tokens(inputs, Pool(keep=30, protect=5))
    with ops.use_backend("reference"):
        _, expected = ops.pool_tokens(inputs, Pool(keep=30, protect=5))
    assert torch.equal(rows.index, expected.index)
    assert (rows.index.diff(dim=1) > 0).all()
    assert rows.index[:, -5:].tolist() == [list(range(195, 200))] * 2
    for name in ("x", "z", "delta", "B", "C"):
        whole = getattr(inputs, name)
        for row in range(2):
            assert torch.equal(getattr(kept, name)[row], whole[row, rows.index[row]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_scored_as_accurately_as_channels(dtype: torch.dtype) -> None:
    inputs = ssd_inputs(2, 300, 40, 4, dtype=dtype)
    for pool in POOLS.values():
        exact = reference.token_score(in_float64(inputs, None)[0], pool)
        ours, theirs = ops.token_score(inputs, pool), reference.token_score(inputs, pool)
        assert torch.equal(ours, cpu.token_score(inputs, pool))
        allowed = (theirs - exact).abs().max().item()
        assert (ours - exact).abs().max() <= max(2 * allowed, 1e-7 * exact.max().item())


@pytest.mark.parametrize("limit", [(0.3, math.inf), (0.0, 0.05), (0.01, 0.3)])
def test_scores_are_of_delta_within_its_limits(limit: tuple[float, float]) -> None:
    inputs = ssd_inputs(2, 100, 6).replace(delta_limit=limit)
    made = ops.effective_delta(inputs.replace(delta_limit=(0.0, math.inf)))
    within = inputs.replace(
        delta=made.clamp(*limit), delta_bias=None, delta_softplus=False, delta_limit=(0.0, math.inf)
    )
    pool = Pool(keep=9, clamp=torch.full((6,), 0.2))
    torch.testing.assert_close(ops.token_score(inputs, pool), ops.token_score(within, pool))
    assert (made < limit[0]).any() or (made > limit[1]).any()


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.0, 0.05)])
def test_the_best_tokens_of_mamba_2_are_kept_in_order_with_all_that_belongs_to_them(
    limit: tuple[float, float],
) -> None:
    inputs = ssd_inputs(2, 200).replace(delta_limit=limit)
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[1, :190] = False
    kept, rows = ops.pool_tokens(inputs.replace(valid=valid), Pool(keep=30, protect=5))
    with ops.use_backend("reference"):
        _, expected = ops.pool_tokens(inputs.replace(valid=valid), Pool(keep=30, protect=5))
    assert torch.equal(rows.index, expected.index)
    assert rows.index[:, -5:].tolist() == [list(range(195, 200))] * 2
    assert kept.valid is not None
    assert kept.valid.sum(1).tolist() == [30, 10]
    assert kept.delta_limit == limit
    for name in ("x", "delta", "B", "C"):
        whole = getattr(inputs, name)
        for row in range(2):
            assert torch.equal(getattr(kept, name)[row], whole[row, rows.index[row]])


def test_gradients_flow_through_the_kept_tokens_of_mamba_2_only() -> None:
    inputs = ssd_inputs(1, 50)
    leaf = inputs.x.clone().requires_grad_()
    kept, rows = ops.pool_tokens(inputs.replace(x=leaf), Pool(keep=7))
    kept.x.sum().backward()
    assert leaf.grad is not None
    touched = leaf.grad.flatten(2).sum(-1)[0].nonzero().flatten()
    assert torch.equal(touched, rows.index[0])


def moved(inputs: ScanInputs | SSDInputs) -> ScanInputs | SSDInputs:
    """The same where Triton's kernels run."""
    names = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "valid")
    tensors = {name: getattr(inputs, name, None) for name in names}
    return inputs.replace(**{n: t.to(DEVICE) for n, t in tensors.items() if t is not None})


@on_triton
@pytest.mark.parametrize("delta", [d for d in DELTAS if d not in ("absurd", "zero")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_triton_scores_as_accurately_as_the_reference(
    pool: Pool, dtype: torch.dtype, delta: str
) -> None:
    from widefield.ops.pool import cuda

    inputs = scan_inputs(2, 30 if INTERPRETED else 3000, 40, delta=delta, dtype=torch.float32)
    finite = inputs.delta.clamp(max=6e4)  # as much as a float16 holds
    inputs = inputs.replace(delta=finite.to(dtype), x=inputs.x.to(dtype))
    valid = torch.ones(inputs.x.shape[:2], dtype=torch.bool)
    valid[1, :20] = False
    inputs = inputs.replace(valid=valid)
    exact = reference.token_score(in_float64(inputs, None)[0], pool)
    there, pool = moved(inputs), pool.to(DEVICE)
    allowed = 2 * error(reference.token_score(there, pool), exact) + 3e-7
    ours = cuda.token_score(there, pool)
    assert error(ours, exact) <= allowed
    assert (ours[1, :20] == 0).all()


@on_triton
@pytest.mark.parametrize("limit", [(0.3, math.inf), (0.0, 0.05), (0.01, 0.3)])
def test_triton_scores_delta_within_its_limits(limit: tuple[float, float]) -> None:
    from widefield.ops.pool import cuda

    inputs = moved(ssd_inputs(2, 100, 6).replace(delta_limit=limit))
    for pool in (Pool(keep=9), Pool(keep=9, clamp=torch.full((6,), 0.2, device=DEVICE))):
        expected = reference.token_score(inputs, pool)
        torch.testing.assert_close(cuda.token_score(inputs, pool), expected)


@on_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_triton_does_not_hide_what_is_not_finite(value: float) -> None:
    from widefield.ops.pool import cuda

    inputs = scan_inputs(1, 20, 40)
    inputs.delta[0, 7, 3] = value
    score = cuda.token_score(moved(inputs), Pool(keep=9))
    assert (~score.isfinite()).nonzero().tolist() == [[0, 7]]


@on_triton
@pytest.mark.parametrize("shape", [(1, 200), (2, 200)])
def test_the_same_tokens_are_kept_where_triton_scores_them(shape: tuple[int, int]) -> None:
    inputs = scan_inputs(*shape, 40)
    _, expected = ops.pool_tokens(inputs, Pool(keep=30, protect=5))
    with ops.use_backend("cuda"):
        kept, rows = ops.pool_tokens(moved(inputs), Pool(keep=30, protect=5))
    assert torch.equal(rows.index.cpu(), expected.index)
    assert torch.equal(kept.x.cpu(), expected.gather(inputs.x))

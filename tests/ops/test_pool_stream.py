"""What is kept of a sequence that comes in pieces is what is kept of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from widefield.errors import WidefieldError
from widefield.ops.pool import Survivors
from widefield.ops.pool.reference import select_rows
from widefield.plan import Pool


def stream(score: Tensor, valid: Tensor | None, pool: Pool, sizes: list[int]) -> Survivors:
    """Survivors after pieces of these sizes; every token carries its position in two shapes."""
    survivors = Survivors(pool)
    position = torch.arange(score.shape[1], dtype=torch.float32).expand(score.shape[0], -1)
    tokens = {"flat": position[..., None], "deep": position[..., None, None].expand(-1, -1, 3, 2)}
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        # Where a piece holds no padding, nobody says so.
        here = None if valid is None or valid[:, part].all() else valid[:, part]
        survivors.add(score[:, part], here, {name: t[:, part] for name, t in tokens.items()})
        start += size
    return survivors


def assert_as_in_one_piece(
    score: Tensor, valid: Tensor | None, pool: Pool, sizes: list[int]
) -> None:
    wanted = select_rows(score, pool, valid)
    rows, tokens = stream(score, valid, pool, sizes).take()
    kept = wanted.valid if wanted.valid is not None else torch.ones_like(wanted.index).bool()
    ours = rows.valid if rows.valid is not None else torch.ones_like(rows.index).bool()
    assert torch.equal(ours, kept)
    assert torch.equal(rows.index[kept], wanted.index[kept])
    assert torch.equal(tokens["flat"][..., 0][kept], wanted.index[kept].float())
    assert torch.equal(tokens["deep"][:, :, 2, 1], tokens["flat"][..., 0])


SCORES = {
    "random": lambda shape: torch.rand(shape),
    "tied": lambda shape: torch.randint(0, 3, shape).float(),
    "constant": lambda shape: torch.ones(shape),
    "zero": lambda shape: torch.zeros(shape),
    "rising": lambda shape: torch.arange(shape[1]).float().expand(shape),
    "falling": lambda shape: -torch.arange(shape[1]).float().expand(shape),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("keep", [1, 5, 60, 400])
@pytest.mark.parametrize("protect", [1, 9, 300])
def test_pieces_keep_what_the_whole_keeps(kind: str, keep: int, protect: int) -> None:
    score = SCORES[kind]((3, 200))
    valid = torch.arange(200)[None] >= torch.tensor([0, 77, 197])[:, None]
    pool = Pool(max(keep, protect), protect)
    for sizes in ([200], [100, 100], [7] * 28 + [4], [1] * 200, [190, 1, 9]):
        assert_as_in_one_piece(score, None, pool, sizes)
        assert_as_in_one_piece(score, valid, pool, sizes)


@given(data=st.data(), keep=st.integers(1, 12), protect=st.integers(1, 5))
def test_any_cut_of_any_ties_keeps_what_the_whole_keeps(
    data: st.DataObject, keep: int, protect: int
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    length = sum(sizes)
    cells = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    score = torch.tensor(data.draw(st.tuples(cells, cells)), dtype=torch.float32)
    padding = torch.tensor(data.draw(st.tuples(*[st.integers(0, length - 1)] * 2)))
    valid = torch.arange(length)[None] >= padding[:, None]
    assert_as_in_one_piece(score, valid, Pool(keep, protect), sizes)


def test_little_more_than_the_candidates_and_a_piece_is_held() -> None:
    pool = Pool(keep=20, protect=4)
    survivors = stream(torch.rand(1, 5000), None, pool, [10] * 500)
    held = sum(piece.score.shape[1] for piece in survivors._pieces)
    assert 20 <= held <= 2 * 24 + 10


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_is_refused_unless_it_is_padding(bad: float) -> None:
    score = torch.rand(2, 30)
    score[1, 12] = bad
    pool = Pool(keep=5)
    with pytest.raises(WidefieldError, match="non-finite Δ"):
        stream(score, None, pool, [10] * 3)
    valid = torch.arange(30)[None] >= torch.tensor([0, 13])[:, None]
    rows, _ = stream(score, valid, pool, [10] * 3).take()
    assert rows.index.shape == (2, 5)


def test_gradients_flow_to_the_kept_tokens() -> None:
    x = torch.rand(1, 8, 2, requires_grad=True)
    survivors = Survivors(Pool(keep=2))
    survivors.add(torch.tensor([[0.0, 3, 1, 2, 0, 0, 0, 0]]), None, {"x": x})
    _, tokens = survivors.take()
    tokens["x"].sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 1]

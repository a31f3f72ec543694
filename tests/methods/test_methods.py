from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tests.samples import LENGTH, calibrate_layers, draw
from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.methods import METHODS, DeciMamba, LongMamba, from_config, get, plan_layer
from widefield.methods.base import Method
from widefield.plan import LayerPlan, ModelLayout, Pool


@dataclass(frozen=True)
class Fixed:
    """A method whose plan is given, and which remembers the lengths it was asked for."""

    name: ClassVar[str] = "fixed"
    answer: LayerPlan
    asked: list[tuple[int, ...]]

    def validate(self, layout: ModelLayout) -> None: ...

    def plan(self, layer: int, lengths: Sequence[int]) -> LayerPlan:
        self.asked.append(tuple(lengths))
        return self.answer

    def describe(self) -> dict[str, Any]:
        return {}


class Other(Fixed):
    name: ClassVar[str] = "other"


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate_layers(draw("gamma", 512, 4))


@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_keeps_the_protocol(name: str, calibration: Calibration) -> None:
    options = {"layers": [0]} if name == "decimamba" else {}
    method = from_config(name, options, calibration)
    assert isinstance(method, Method)
    assert method.name == name
    assert from_config(name, method.describe(), calibration) == method


def test_names_and_options_that_are_not_known_are_answered_with_the_nearest(
    calibration: Calibration,
) -> None:
    with pytest.raises(WidefieldError, match="unknown method 'longmaba': did you mean 'longmamba'"):
        get("longmaba")
    with pytest.raises(WidefieldError, match="did you mean 'clamp_share'"):
        from_config("longmamba", {"clamp_shar": 0.1}, calibration)
    with pytest.raises(WidefieldError, match="unknown option of longmamba '_selected'"):
        from_config("longmamba", {"_selected": {}}, calibration)
    with pytest.raises(WidefieldError, match="decimamba needs the option 'layers'"):
        from_config("decimamba", {"base_length": 5})
    with pytest.raises(WidefieldError, match="LongMamba needs a Calibration"):
        from_config("longmamba", {})


def test_numbers_may_be_written_as_yaml_reads_them(calibration: Calibration) -> None:
    method = from_config(
        "longmamba", {"decay_threshold": "1e-30", "clamp_share": "0.05"}, calibration
    )
    assert method == LongMamba(calibration, decay_threshold=1e-30, clamp_share=0.05)
    follow = from_config("longmamba", {"clamp_share": "follow", "layers": "all"}, calibration)
    assert follow == LongMamba(calibration, clamp_share="follow")
    with pytest.raises(WidefieldError, match="decay_threshold='tiny'"):
        from_config("longmamba", {"decay_threshold": "tiny"}, calibration)


def test_no_method_asks_for_nothing() -> None:
    assert plan_layer((), 0, (0,), (100,)) == LayerPlan()


def test_lengths_count_what_the_cache_holds(calibration: Calibration) -> None:
    method = LongMamba(calibration)
    late = plan_layer((method,), 0, (3 * LENGTH,), (LENGTH,))
    assert late.delta_floor is not None
    assert torch.equal(late.delta_floor, method.plan(0, (4 * LENGTH,)).delta_floor)
    assert plan_layer((method,), 0, (0,), (LENGTH,)) == LayerPlan()


def test_rows_that_agree_are_one_row(calibration: Calibration) -> None:
    method = LongMamba(calibration)
    for seen, new in (((0, 0), (900, 900)), ((100, 300), (800, 600)), ((0,), (900, 900))):
        floor = plan_layer((method,), 0, seen, new).delta_floor
        assert floor is not None and floor.shape == (4,)
    floor = plan_layer((method,), 0, (0,), (900, 300)).delta_floor
    assert floor is not None and floor.shape == (2, 4)


def test_dropped_tokens_do_not_count_for_the_others(calibration: Calibration) -> None:
    drops = DeciMamba(layers=(0,), base_length=2 * LENGTH)
    filters = LongMamba(calibration)
    both = plan_layer((filters, drops), 0, (0,), (50 * LENGTH,))
    assert both.pool == Pool(keep=2 * LENGTH)
    assert both.delta_floor is not None
    assert torch.equal(both.delta_floor, filters.plan(0, (2 * LENGTH,)).delta_floor)
    short = DeciMamba(layers=(0,), base_length=LENGTH)
    assert plan_layer((filters, short), 0, (0,), (50 * LENGTH,)).delta_floor is None
    turn = plan_layer((filters, short), 0, (5 * LENGTH,), (50 * LENGTH,)).delta_floor
    assert turn is not None
    assert torch.equal(turn, filters.plan(0, (6 * LENGTH,)).delta_floor)


def test_a_turn_no_longer_than_the_pool_is_not_pooled_whatever_came_before() -> None:
    drops = DeciMamba(layers=(0,), base_length=100)
    assert plan_layer((drops,), 0, (5000,), (100,)).pool is None
    assert plan_layer((drops,), 0, (5000,), (101,)).pool is not None
    assert plan_layer((drops,), 0, (0,), (50, 101)).pool is not None


def test_the_larger_floor_holds_and_scales_are_multiplied() -> None:
    one = Fixed(
        LayerPlan(delta_floor=torch.tensor([1.0, 5.0]), delta_scale=torch.tensor([2.0, 3.0])), []
    )
    two = Other(
        LayerPlan(
            delta_floor=torch.tensor([[3.0, 2.0], [0.0, 9.0]]),
            delta_scale=torch.tensor([0.5, 1.0]),
            decay_scale=torch.tensor([4.0, 1.0]),
        ),
        [],
    )
    plan = plan_layer((one, two), 0, (0,), (10, 12))
    assert plan.delta_floor is not None and plan.delta_scale is not None
    assert plan.decay_scale is not None
    assert plan.delta_floor.tolist() == [[3.0, 5.0], [1.0, 9.0]]
    assert plan.delta_scale.tolist() == [1.0, 3.0]
    assert plan.decay_scale.tolist() == [4.0, 1.0]


def test_methods_see_the_length_that_is_left() -> None:
    watcher = Fixed(LayerPlan(), [])
    dropper = Other(LayerPlan(pool=Pool(keep=30)), [])
    plan_layer((watcher, dropper), 0, (10, 0), (100, 20))
    assert watcher.asked[-1] == (40, 20)


def test_methods_that_cannot_be_combined_are_refused() -> None:
    twice = (DeciMamba(layers=(0,)), DeciMamba(layers=(1,)))
    with pytest.raises(WidefieldError, match="decimamba is given 2 times"):
        plan_layer(twice, 0, (0,), (1,))
    pools = (Fixed(LayerPlan(pool=Pool(keep=3)), []), Other(LayerPlan(pool=Pool(keep=3)), []))
    with pytest.raises(WidefieldError, match="fixed and other both drop tokens"):
        plan_layer(pools, 0, (0,), (10,))
    with pytest.raises(WidefieldError, match="2 context lengths for 3 rows"):
        plan_layer((), 0, (0, 0), (1, 1, 1))

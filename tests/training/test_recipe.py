from __future__ import annotations

from pathlib import Path

import pytest

from widefield.errors import WidefieldError
from widefield.training.recipe import load_recipe

GOOD = """
name: small
steps: 6
stages:
  - {until: 0.5, length: 256, batch: 4}
  - {until: 1.0, length: 280, batch: 4}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["passkey-base", "passkey-decimated"])
def test_the_recipes_of_the_project_load(name: str) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")
    assert recipe.stages[-1].until == 1.0
    assert recipe.length == 1024


def test_stages_follow_the_progress(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert [recipe.stage(p).length for p in (0.0, 0.49, 0.5, 1.0)] == [256, 256, 280, 280]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("steps: 6", "stepz: 6"), "did you mean 'steps'"),
        (("steps: 6", "steps: 6\nseconds: 3"), "either seconds or steps"),
        (("until: 1.0", "until: 0.9"), "rising shares that end at 1.0"),
        (("batch: 4}", "batsch: 4}"), "did you mean 'batch'"),
        (("name: small", "name: [small"), "is not YAML"),
        (
            ("steps: 6", "steps: 6\ndecimation: {layers: [1], keep_min: 9, keep_max: 80}"),
            "keep_min 9 leaves nothing",
        ),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(
    tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    with pytest.raises(WidefieldError, match=says):
        load_recipe(write(tmp_path, GOOD.replace(*change)))


def test_a_missing_recipe_says_so(tmp_path: Path) -> None:
    with pytest.raises(WidefieldError, match="cannot read recipe"):
        load_recipe(tmp_path / "none.yaml")

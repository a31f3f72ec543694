"""What users type, and what a wheel holds."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import widefield as wf

ROOT = Path(__file__).resolve().parents[1]
NOT_HERE = {"triton", "lm_eval", "ray", "datasets", "accelerate"}


def submodules() -> list[str]:
    names = (found.name for found in pkgutil.walk_packages(wf.__path__, "widefield."))
    return [name for name in names if not name.endswith("__main__")]


def import_all() -> None:
    for name in submodules():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name not in NOT_HERE:
                raise


@pytest.mark.parametrize("name", wf.__all__)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    import_all()
    value = getattr(wf, name)
    assert callable(value), f"wf.{name} is {value!r}: a submodule of the same name hides it"
    assert value.__doc__, f"wf.{name} has no docstring"


def test_public_names_are_listed_by_dir() -> None:
    assert set(wf.__all__) <= set(dir(wf))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'longmamba'"):
        _ = wf.longmamba


def test_the_wheel_holds_every_module_and_checkpoint(tmp_path: Path) -> None:
    code = "import hatchling.build, sys; hatchling.build.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    source = ROOT / "src"
    files = (path for path in (source / "widefield").rglob("*") if path.is_file())
    expected = {str(p.relative_to(source)) for p in files if "__pycache__" not in p.parts}
    assert expected <= packed, f"not in the wheel: {sorted(expected - packed)}"
    assert "widefield/py.typed" in packed
    assert not [name for name in packed if name.startswith(("tests/", "docs/"))]

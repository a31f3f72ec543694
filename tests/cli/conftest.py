"""Tiny random checkpoints in the layout of the bundled ones, and the command line as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.models import tiny_mamba

TRAIN_LENGTH = 256
OPTIONS = {
    "longmamba": {"clamp_share": 0.02, "reduction": "slowest"},
    "decimamba": {"layers": [1], "base_length": 200},
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


CommandLine = Callable[..., Outcome]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `decimated`, as `src/widefield/bundled` has them."""
    from widefield.collect import calibrate

    root = tmp_path_factory.mktemp("bundled")
    for seed, name in enumerate(("base", "decimated")):
        folder = root / name
        model = tiny_mamba(seed)
        model.config.tokenizer_class = "ByT5Tokenizer"
        model.half().save_pretrained(folder)
        # The fingerprint is that of the weights as they are stored.
        ids = torch.randint(3, 259, (4, TRAIN_LENGTH))
        calibration = calibrate(model.float(), ids, train_length=TRAIN_LENGTH)
        calibration.save(folder / "calibration.safetensors")
        (folder / "methods.json").write_text(json.dumps(OPTIONS))
    return root


@pytest.fixture
def bundled(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny checkpoints in the place of the real ones."""
    monkeypatch.setattr("widefield.bundled.ROOT", checkpoints)
    return checkpoints


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of 40 kB."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} of a text about nothing.\n" for i in range(1200)))
    return path


@pytest.fixture
def wf(
    bundled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> CommandLine:
    """Runs a command line in this process, in an empty folder: wf("demo", "--quick")."""
    from widefield.cli import run

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "100")

    def command(*args: object) -> Outcome:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Outcome(code, *capsys.readouterr())

    return command

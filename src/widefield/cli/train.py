"""`widefield train`: make a checkpoint from a recipe."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from widefield.cli import _common
from widefield.errors import WidefieldError

if TYPE_CHECKING:
    from widefield.training import Recipe
    from widefield.training.data import Corpus
    from widefield.training.loop import Progress

__all__ = ["train"]


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/passkey-base.yaml")],
    corpus: Annotated[
        list[Path], typer.Option(help="text file or folder of them; may be given several times")
    ],
    out: Annotated[Path, typer.Option(help="folder of the checkpoint")],
    init: Annotated[
        str | None, typer.Option(help="checkpoint to go on from; default: from scratch")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    resume: Annotated[bool, typer.Option(help="go on from an interrupted run in --out")] = True,
) -> None:
    """Train, calibrate and describe a checkpoint."""
    _common.input_path(recipe, "RECIPE")
    for path in corpus:
        _common.input_path(path, "--corpus")
    out = _common.out_folder(out)
    if (out / "model.safetensors").exists() and not (out / "resume").exists():
        raise WidefieldError(f"--out {out} already holds a checkpoint: give another folder")
    with _common.busy("loading"):
        from widefield.cli._models import find_device
        from widefield.training import load_corpus, load_recipe

        plan, text = load_recipe(recipe), load_corpus(corpus)
        device = find_device(device).type
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["widefield", *sys.argv[1:]])
    try:
        _run(plan, text, out, init, device, resume, command)
    except KeyboardInterrupt:
        raise _common.Interrupted(_how_to_go_on(out)) from None


def _how_to_go_on(out: Path) -> str:
    if (out / "resume").exists():
        return f"{out / 'resume'} holds the run; the same command goes on from there"
    return "no step was finished, nothing was written"


def _run(
    plan: Recipe,
    text: Corpus,
    out: Path,
    init: str | None,
    device: str,
    resume: bool,
    command: str,
) -> None:
    from widefield.loading import load
    from widefield.training import finish
    from widefield.training import train as run_training

    start = load(init, device=device, methods=False) if init else None
    result = run_training(
        plan,
        text,
        out,
        device=device,
        model=start.model.float() if start else None,
        calibration=start.calibration if start else None,
        resume=resume,
        report=_line,
    )
    finish(result, plan, text, out, command, device)
    typer.echo(f"wrote {out}")


def _line(progress: Progress) -> None:
    typer.echo(
        f"{progress.share:6.1%}  step {progress.step:>6}  {progress.seconds:6.0f} s  "
        f"length {progress.length:>6}  text {progress.text_loss:.3f}  answers "
        f"{progress.answer_loss:.4f}  "
        f"{progress.bytes_per_second / 1e6:.2f} MB/s"
    )

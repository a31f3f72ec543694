"""`widefield train`: make a checkpoint from a recipe."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from widefield.errors import WidefieldError

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
    device: Annotated[str, typer.Option(help="cuda, cpu or auto")] = "auto",
    resume: Annotated[bool, typer.Option(help="go on from an interrupted run in --out")] = True,
) -> None:
    """Train a checkpoint, calibrate it, and write it with its model card."""
    import torch

    from widefield.training import load_corpus, load_recipe

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise WidefieldError("--device cuda: no CUDA device is visible; use --device cpu")
    plan = load_recipe(recipe)
    text = load_corpus(corpus)
    if (out / "model.safetensors").exists() and not (out / "resume").exists():
        raise WidefieldError(f"{out} already holds a checkpoint: give another --out")
    if out.exists() and not out.is_dir():
        raise WidefieldError(f"--out {out} is a file: expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["widefield", *sys.argv[1:]])
    _run(plan, text, out, init, device, resume, command)


def _run(
    plan: Any, text: Any, out: Path, init: str | None, device: str, resume: bool, command: str
) -> None:
    from widefield.loading import load
    from widefield.training import finish
    from widefield.training import train as run_training

    start = load(init, device=device, methods=False) if init else None
    model = start.model.float() if start else None
    calibration = start.calibration if start else None
    result = run_training(
        plan, text, out, device=device, model=model, calibration=calibration, resume=resume,
        report=_line,
    )  # fmt: skip
    finish(result, plan, text, out, command, device)
    typer.echo(f"wrote {out}")


def _line(progress: Any) -> None:
    typer.echo(
        f"{progress.share:6.1%}  step {progress.step:>6}  {progress.seconds:6.0f} s  "
        f"length {progress.length:>6}  text {progress.text_loss:.3f}  answers "
        f"{progress.answer_loss:.4f}  "
        f"{progress.bytes_per_second / 1e6:.2f} MB/s"
    )

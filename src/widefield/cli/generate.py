"""`widefield generate`: go on with a text, token by token, with or without a method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widefield.cli import _common, _options
from widefield.errors import WidefieldError


def generate(
    prompt: Annotated[str | None, typer.Option(help="The text to go on with.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file with the text to go on with; - is standard input.")
    ] = None,
    model: _options.Model = "bundled:base",
    method: Annotated[
        str | None,
        typer.Option(
            help="unmodified, longmamba, decimamba or longmamba+decimamba.  "
            "[default: what was saved with the model, else unmodified]"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens by probability, not always the likeliest.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="With --sample: lower is safer.", show_default="1")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="With --sample: only the likeliest tokens of this total.", show_default="1"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="With --sample: draws the tokens.")] = 0,
    calibration: _options.Calibration = None,
    tuned: _options.Tuned = None,
    changes: _options.Changes = None,
    device: _options.Device = "cpu",
    dtype: _options.Dtype = None,
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph", help="On a GPU: the same tokens, replayed many times faster."),
    ] = False,
) -> None:
    """Go on with a text, printing tokens as they come.

    What is on, the prompt's length and the speed go to stderr.
    """
    _common.positive(max_new_tokens, "--max-new-tokens")
    sampling = _sampling(sample, temperature, top_p, seed)
    text = _read(prompt, prompt_file)
    if (changes or tuned) and method is None:
        raise WidefieldError("--set and --methods need --method: say which method they are for")
    with _common.busy(f"loading {model}"):
        from widefield.cli._generate import stream_text
        from widefield.cli._models import choose, load_source

        choice = None if method is None else choose(method, changes, tuned)
        source = load_source(
            model, device=device, dtype=dtype, calibration=calibration, saved_methods=method is None
        )
    stream_text(source, choice, text, max_new_tokens, sampling, cuda_graph=cuda_graph)


def _read(prompt: str | None, file: Path | None) -> str:
    """The prompt, wherever it was given."""
    if (prompt is None) == (file is None):
        raise WidefieldError(
            "give the text to go on with: either --prompt TEXT or --prompt-file FILE"
        )
    if prompt is not None:
        text = prompt
    elif str(file) == "-":
        text = typer.get_text_stream("stdin", encoding="utf-8", errors="replace").read()
    else:
        from widefield.tasks.texts import load_texts

        assert file is not None
        path = _common.input_path(file, "--prompt-file")
        if path.is_dir():
            raise WidefieldError(f"--prompt-file {path} is a folder: give a text file")
        (text,) = load_texts(path)
    if not text:
        raise WidefieldError("the prompt is empty: give at least one character")
    return text


def _sampling(
    sample: bool, temperature: float | None, top_p: float | None, seed: int
) -> dict[str, float] | None:
    """Settings of the draw, or None for the likeliest token each time."""
    if not sample:
        for name, value in (("--temperature", temperature), ("--top-p", top_p)):
            if value is not None:
                raise WidefieldError(f"{name} {value} has no effect without --sample")
        return None
    temperature = 1.0 if temperature is None else temperature
    top_p = 1.0 if top_p is None else top_p
    if not 0.0 < temperature < float("inf"):
        raise WidefieldError(f"--temperature {temperature}: expected a number above 0")
    if not 0.0 < top_p <= 1.0:
        raise WidefieldError(f"--top-p {top_p}: expected a number above 0 and at most 1")
    return {"temperature": temperature, "top_p": top_p, "seed": seed}

"""`widefield tune`: find the LongMamba settings that suit a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from widefield.cli import _common, _options
from widefield.errors import WidefieldError
from widefield.evaluation.grid import parse_lengths
from widefield.tasks.texts import Haystack, default_haystack, load_haystack, load_texts


@dataclass(frozen=True)
class Wishes:
    """What the search is given; the fields are arguments of `wf.tune`."""

    haystack: Haystack
    texts: tuple[str, ...] | None
    lengths: tuple[int, ...] | None
    trials: int
    budget_seconds: float
    quality_limit: float
    seed: int
    batch_tokens: int | None


def tune(
    out: Annotated[Path, typer.Option(help="The JSON file to write; --methods reads it.")],
    model: Annotated[
        str, typer.Option(help="A folder, a hub id or bundled:base.")
    ] = "bundled:base",
    calibration: _options.Calibration = None,
    haystack: _options.Haystack = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Long texts for the cost in quality: a file, or a folder of .txt.",
            show_default="the haystack",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Context lengths in tokens, k = 1,024.",
            show_default="16 times the training length",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Prompts a setting and length.")] = 10,
    budget: Annotated[
        float, typer.Option(help="Seconds after which no new setting is begun.")
    ] = 300,
    quality_limit: Annotated[
        float, typer.Option(help="Highest relative rise of bits a byte, e.g. 0.03.")
    ] = 0.03,
    device: _options.Device = "cpu",
    dtype: _options.Dtype = None,
    seed: _options.Seed = 0,
    batch_tokens: _options.BatchTokens = None,
) -> None:
    """Choose LongMamba's settings by measurement.

    Clamp share, threshold, reduction and layers: what finds most hidden keys within a limit of the
    cost in quality. Takes minutes; Ctrl-C takes the best setting so far.
    """
    _common.positive(trials, "--trials")
    if batch_tokens is not None:
        _common.positive(batch_tokens, "--batch-tokens")
    if not budget > 0:
        raise WidefieldError(f"--budget {budget:g}: expected a number of seconds above 0")
    if not quality_limit > 0:
        raise WidefieldError(f"--quality-limit {quality_limit:g}: expected a number above 0")
    wishes = Wishes(
        haystack=default_haystack() if haystack is None else load_haystack(haystack),
        texts=None if texts is None else tuple(load_texts(texts)),
        lengths=None if lengths is None else parse_lengths(lengths),
        trials=trials,
        budget_seconds=budget,
        quality_limit=quality_limit,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    file = _common.out_file(out, ".json")
    with _common.busy(f"loading {model}"):
        from widefield.cli._models import load_source
        from widefield.cli._tune import run_search

        source = load_source(model, device=device, dtype=dtype, calibration=calibration)
    run_search(source, wishes, file)

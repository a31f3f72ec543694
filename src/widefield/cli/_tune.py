"""Show a search for settings while it runs, and write what it found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from widefield.cli._common import Interrupted
from widefield.cli._models import Source, need_calibration, need_tokenizer
from widefield.cli.tune import Wishes
from widefield.evaluation.grid import length_label
from widefield.evaluation.header import Subject, make_header
from widefield.evaluation.results import write_atomically
from widefield.evaluation.tune import TuneResult, TuneRow, tune

__all__ = ["run_search"]


def run_search(source: Source, wishes: Wishes, file: Path) -> TuneResult:
    """Search, with a line for each setting, then the table; the choice goes into a JSON file.

    Raises:
        Interrupted: after Ctrl-C before the first setting was measured.
        WidefieldError: as `wf.tune`, or if the model has no calibration or no tokenizer.
    """
    calibration = need_calibration(source, "longmamba")
    tokenizer = need_tokenizer(source)
    arguments = {field.name: getattr(wishes, field.name) for field in dataclasses.fields(wishes)}
    try:
        found = tune(source.model, calibration, tokenizer, progress=_tell, **arguments)
    except KeyboardInterrupt:
        raise Interrupted("no setting was measured yet, nothing was written") from None
    Console().print(_table(found))
    for note in found.notes:
        print(f"note: {note}")
    write_atomically(file, _document(source, wishes, found).encode())
    print(f"chosen: {_options(found.best.describe())}")
    print(f"{file} (for eval and generate: --methods {file})")
    return found


def _tell(row: TuneRow, done: int, planned: int) -> None:
    print(
        f"{done} of at most {planned}: {_options(row.options) or row.stage}: {_share(row)}, "
        f"{row.cost:+.1%} bits a byte ({row.seconds:.1f} s)",
        flush=True,
    )


def _share(row: TuneRow) -> str:
    return "too dear" if row.share is None else f"{row.share:.0%} right"


_SHOWN = {"clamp_share": "C", "decay_threshold": "Th", "reduction": "", "layers": "layers"}


def _options(options: dict[str, Any]) -> str:
    """What tells settings apart, in the papers' symbols."""
    parts = []
    for name, symbol in _SHOWN.items():
        value = options.get(name)
        if value is None or (name == "layers" and value == "all"):
            continue
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{symbol} {shown}".strip())
    return ", ".join(parts)


def _table(found: TuneResult) -> Table:
    lengths = ", ".join(length_label(length) for length in found.lengths)
    table = Table(title=f"retrieval and cost at {lengths}", title_style="bold")
    for name in ("", "setting", "right", "bits a byte", "change"):
        table.add_column(name, justify="left" if name in ("", "setting") else "right")
    for row in sorted(found.table, key=lambda row: (-(row.share or 0.0), row.cost)):
        chosen = row is found.row
        table.add_row(
            ">" if chosen else "",
            _options(row.options) or row.stage,
            "-" if row.share is None else f"{row.share:.0%}",
            f"{row.bits:.3f}",
            f"{row.cost:+.1%}",
            style="bold" if chosen else None,
        )
    return table


def _document(source: Source, wishes: Wishes, found: TuneResult) -> str:
    """The header of a run, the methods as `--methods` reads them, and the whole search."""
    subject = Subject("tune", source.model, source.tokenizer, (found.best,), source.calibration)
    settings = {
        "haystack": {"name": wishes.haystack.name, "sha256": wishes.haystack.sha256},
        "trials": wishes.trials,
        "budget_seconds": wishes.budget_seconds,
    }
    header = make_header([subject], {"tune": settings}, seed=wishes.seed)
    content = {
        "header": header,
        "methods": {found.best.name: found.best.describe()},
        "search": found.to_json(),
    }
    return json.dumps(content, indent=1) + "\n"

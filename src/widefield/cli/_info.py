"""What there is to know of a model, as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from widefield.cli._models import Source
from widefield.errors import WidefieldError
from widefield.families import describe
from widefield.methods import LongMamba, Method
from widefield.ops._backend import kernels_on
from widefield.plan import ModelLayout

__all__ = ["describe_source", "show"]


def describe_source(source: Source) -> dict[str, Any]:
    """What is known of a loaded model, JSON-able; of an unsupported one, why it is so."""
    model = source.model
    extension = getattr(model, "widefield", None)
    facts: dict[str, Any] = {
        "model": source.name,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": None if source.tokenizer is None else type(source.tokenizer).__name__,
        "kernels": kernels_on(model.device),
        "supported": True,
        "reason": None,
    }
    try:
        layout = describe(model)
    except WidefieldError as error:
        return {**facts, "supported": False, "reason": str(error)}
    methods = () if extension is None else extension.methods
    return {
        **facts,
        "fingerprint": layout.fingerprint,
        "layers": len(layout.layers),
        "channels": list(layout.channels),
        "states": getattr(model.config, "state_size", None),
        "decimation": layout.decimation is None,
        "on": {method.name: method.describe() for method in methods},
        "measured_options": source.options,
        "calibration": _calibration(source, layout, methods),
    }


def _calibration(
    source: Source, layout: ModelLayout, methods: tuple[Method, ...]
) -> dict[str, Any] | None:
    """What the calibration says of each layer, by the threshold on, else measured, else default."""
    calibration = source.calibration
    if calibration is None:
        return None
    calibration.check(layout)
    on = next((method for method in methods if isinstance(method, LongMamba)), None)
    rule = on or LongMamba(calibration, **source.options.get("longmamba", {}))
    rule = dataclasses.replace(rule, channels="global", layers="all", top_layers=None)
    shares = {layer: float(rule.selected(layer).float().mean()) for layer in layout.layers}
    return {
        "train_length": calibration.train_length,
        "sequences": calibration.sequences,
        "corpus_hash": calibration.corpus_hash,
        "decay_threshold": rule.decay_threshold,
        "reduction": rule.reduction,
        "global_share": {str(layer): round(share, 4) for layer, share in shares.items()},
    }


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print the facts: JSON, or two tables for people."""
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    console.print(_overview(facts))
    calibration = facts.get("calibration")
    if calibration is not None:
        console.print(_layers(calibration))


def _overview(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, title=facts["model"], title_style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(facts).items():
        table.add_row(name, value)
    return table


def _lines(facts: dict[str, Any]) -> dict[str, str]:
    lines = {
        "class": facts["class"],
        "parameters": f"{facts['parameters']:,} ({facts['dtype']})",
        "tokenizer": facts["tokenizer"] or "none beside the weights",
        "kernels": facts["kernels"],
    }
    if not facts["supported"]:
        return {**lines, "supported": f"no: {facts['reason']}"}
    channels = sorted(set(facts["channels"]))
    calibration = facts["calibration"]
    return {
        **lines,
        "supported": "yes" if facts["decimation"] else "yes, but not by DeciMamba",
        "layers": f"{facts['layers']}",
        "channels": " or ".join(f"{count:,}" for count in channels),
        "states": f"{facts['states']} a channel",
        "on": ", ".join(_method(*pair) for pair in facts["on"].items()) or "no method",
        "training length": _UNCALIBRATED.format(model=facts["model"])
        if calibration is None
        else f"{calibration['train_length']:,} tokens",
    }


_UNCALIBRATED = (
    "unknown, no calibration; make one: widefield calibrate {model} --texts FILE --train-length N "
    "--out cal.safetensors, then give it with --calibration"
)


def _method(name: str, options: dict[str, Any]) -> str:
    return f"{name} ({', '.join(f'{key}={value}' for key, value in options.items())})"


def _layers(calibration: dict[str, Any]) -> Table:
    rule = f"Th {calibration['decay_threshold']:g}, {calibration['reduction']} state"
    title = f"global channels ({rule})"
    table = Table(title=title, title_style="bold", min_width=len(title))
    table.add_column("layer", justify="right")
    table.add_column("share", justify="right")
    for layer, share in calibration["global_share"].items():
        table.add_row(layer, f"{share:.1%}")
    return table

"""The model card: made from training.json and, once it has been measured, the results beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["write_card"]


def write_card(folder: Path) -> None:
    """Write README.md of a checkpoint folder from the JSON files in it."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    methods = json.loads((folder / "methods.json").read_text(encoding="utf-8"))
    parts = [_front(record), _training(record), _settings(methods)]
    if record.get("notes"):
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in record["notes"]) + "\n")
    parts += [_results(path) for path in sorted(folder.glob("results*.json"))]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _front(record: dict[str, Any]) -> str:
    recipe = record["recipe"]
    shape = recipe["shape"]
    what = "fine-tuned with decimation" if recipe["decimation"] else "trained from scratch"
    return (
        "---\nlicense: apache-2.0\nlibrary_name: transformers\ntags: [mamba, byte-level, "
        "passkey]\n---\n\n"
        f"# widefield passkey checkpoint: {recipe['name']}\n\n"
        f"A byte-level Mamba-1 (width {shape['hidden_size']}, {shape['layers']} layers, state "
        f"{shape['state_size']}), {what} on sequences of up to "
        f"{max(s['length'] for s in recipe['stages']):,} "
        "bytes. It finds a five-digit key in English text and shows, in two minutes on a CPU, "
        "what context "
        "extension does. It is a demonstration, not a language model to write with.\n"
    )


def _training(record: dict[str, Any]) -> str:
    recipe, corpus = record["recipe"], record["corpus"]
    last = record["history"][-1]
    stages = ", ".join(
        f"{s['length']:,} bytes × {s['batch']} to {s['until']:.0%}" for s in recipe["stages"]
    )
    minutes, megabytes = record["seconds"] / 60, record["bytes"] / 1e6
    losses = last["text_loss"], last["answer_loss"]
    rows = {
        "Command": f"`{record['command']}`",
        "Data": f"{corpus['files']} text files, {corpus['bytes']:,} bytes, sha256 of their bytes "
        f"in order `{corpus['sha256']}`",
        "Device": f"{record['device']}, torch {record['torch']}, "
        f"transformers {record['transformers']}",
        "Time": f"{minutes:.1f} minutes, {record['steps']:,} steps, {megabytes:,.0f} MB read",
        "Curriculum": stages,
        "Mixture": _mixture(recipe),
        "Optimiser": f"AdamW, learning rate {recipe['learning_rate']:g}, cosine to a tenth, "
        f"weight decay {recipe['weight_decay']:g}",
        "Decimation": _decimation(recipe["decimation"]),
        "Seed": str(recipe["seed"]),
        "Last losses": f"text {losses[0]:.3f} nats a byte, answer digits {losses[1]:.4f} nats",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"## Training\n\n| | |\n| --- | --- |\n{table}\n"


def _mixture(recipe: dict[str, Any]) -> str:
    text = f"{recipe['passkey_share']:.0%} passkey samples, the rest plain text"
    share = recipe.get("unwrapped_share", 0.0)
    return f"{text}; {share:.0%} of all text without line breaks in paragraphs" if share else text


def _decimation(options: dict[str, Any] | None) -> str:
    if not options:
        return "off"
    return (
        f"layers {list(options['layers'])}, {options['keep_min']} to {options['keep_max']} "
        "tokens kept "
        f"(log-uniform, drawn each step), score {options['score']}, last {options['protect']} "
        "bytes protected"
        + (f", ranking loss × {options['rank_weight']:g}" if options.get("rank_weight") else "")
    )


def _settings(methods: dict[str, dict[str, Any]]) -> str:
    lines = [f"- {name}: " + ", ".join(f"{k} = {v}" for k, v in options.items())
             for name, options in methods.items()]  # fmt: skip
    return "## Settings of the methods\n\n" + "\n".join(lines) + "\n"


def _results(path: Path) -> str:
    """One table of a results file by method and length, and how it was made."""
    data = json.loads(path.read_text(encoding="utf-8"))
    header, cells = data["header"], data["cells"]
    lengths = sorted({c["length"] for c in cells})
    bits = cells[0]["task"] == "bits"
    lines = [
        "| method | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "| --- |" + " --- |" * len(lengths),
    ]
    for method in dict.fromkeys(c["method"] for c in cells):
        mine = [[c for c in cells if (c["method"], c["length"]) == (method, n)] for n in lengths]
        shown = [f"{c[0]['bits']:.3f}" if bits else _share(c) for c in mine if c]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    where = f"on {header.get('device', 'an unnamed device')}; lengths in bytes"
    what = _bits(header) if bits else _passkey(cells)
    table = "\n".join(lines)
    command = header.get("command", "")
    return f"## {path.stem}\n\n{what}, {where}.\n\n{table}\n\nCommand: `{command}`\n"


def _share(cells: list[dict[str, Any]]) -> str:
    return f"{sum(c['correct'] for c in cells) / sum(c['trials'] for c in cells):.2f}"


def _passkey(cells: list[dict[str, Any]]) -> str:
    depths, trials = len({c["depth"] for c in cells}), max(c["trials"] for c in cells)
    return (
        f"Share of passkeys with all five digits right, {depths} depths × {trials} trials a length"
    )


def _bits(header: dict[str, Any]) -> str:
    task = header["tasks"]["bits"]
    return f"Bits per byte of the last {task['last']:,} bytes of {task['windows']} windows of text"

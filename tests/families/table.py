"""The table of docs/models.md, from what the small models of every family do.

python -m tests.families.table      writes it; test_table.py fails while it is not so
"""

from __future__ import annotations

import contextlib
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import widefield as wf
from tests.families.cases import CASES, Case, random_ids, relative, supported

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
HEAD = """\
| transformers class | mixer | LongMamba | DeciMamba | without a method |
|---|---|---|---|---|"""
TRAINED_AT, LENGTH, PADDING = 12, 30, 11


def table() -> str:
    """The whole table, one row a family."""
    groups = groupby(filter(lambda case: case.told, CASES.values()), lambda case: case.model_class)
    return "\n".join([HEAD, *(row(list(cases)) for _, cases in groups)])


def row(cases: list[Case]) -> str:
    """A family's row; where a variant differs from its first case, the cell says in what."""
    cells = [measured(case) if supported(case) else ("", "", "not yet") for case in cases]
    names = [f"`{cases[0].model_class}`", f"`{cases[0].mixer}`"]
    columns = [joined(cases, column) for column in zip(*cells, strict=True)]
    return f"| {' | '.join([*names, *columns])} |"


def joined(cases: list[Case], column: tuple[str, ...]) -> str:
    """One cell of all cases."""
    others = [
        f"{case.variant} {cell}"
        for case, cell in zip(cases[1:], column[1:], strict=True)
        if cell != column[0]
    ]
    return "; ".join([column[0], *others])


@torch.no_grad()
def measured(case: Case) -> tuple[str, str, str]:
    """What LongMamba does, what DeciMamba does, and how near the model is to stock without."""
    stock, model = case.make(), wf.extend(case.make())
    equal = all(relative(a, b) < 1e-5 for a, b in zip(seen(model), seen(stock), strict=True))
    sample = random_ids(3, TRAINED_AT, seed=3)
    calibration = wf.calibrate(model, sample, train_length=TRAINED_AT)
    last = model.widefield.layout.layers[-1]
    long = works(model, wf.LongMamba(calibration, reduction="slowest"))
    short = works(model, wf.DeciMamba(layers=[last], base_length=8))
    full = works(model, wf.DeciMamba(layers=[last], base_length=8, residual="full"))
    decimamba = "yes" if short else '`residual="full"`' if full else "no"
    return "yes" if long else "no", decimamba, "equal to stock" if equal else "not equal to stock"


def works(model: Any, method: Any) -> bool:
    """Whether a method takes the model, generates, and changes what it says."""
    ids = random_ids(2, LENGTH)
    plain = wf.extend(model)(ids).logits[:, -1]
    with contextlib.suppress(wf.WidefieldError):
        changed = wf.extend(model, method)(ids).logits[:, -1]
        model.generate(ids, max_new_tokens=2, do_sample=False)
        return relative(changed, plain) > 1e-4
    return False


def seen(model: Any) -> list[Tensor]:
    """Logits of a prompt, of a left-padded batch, and of a decoded token."""
    ids, mask = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :PADDING] = 0
    padded = model(ids, attention_mask=mask).logits
    whole = model(ids, use_cache=True)
    name = "cache_params" if "cache_params" in whole else "past_key_values"
    step = model(random_ids(2, 1, seed=5), use_cache=True, **{name: whole[name]})
    return [whole.logits, padded[:1], padded[1:, PADDING:], step.logits]


def parts(page: str) -> tuple[str, str, str]:
    """A page's text before its table, the table, and after it."""
    start = page.index("| transformers class |")
    end = page.index("\n\n", start)
    return page[:start], page[start:end], page[end:]


if __name__ == "__main__":
    before, _, after = parts(PAGE.read_text("utf-8"))
    PAGE.write_text(before + table() + after, encoding="utf-8")

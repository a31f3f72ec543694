"""The table of docs/models.md, from what the small models of every family do.

python -m tests.families.table      writes it; test_table.py fails while it is not so
"""

from __future__ import annotations

import contextlib
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import widefield as wf
from tests.families.cases import CASES, Case, random_ids, relative, supported

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COLUMNS = (
    "transformers class", "mixer", "a prompt", "left-padded", "in chunks", "a decode step",
    "LongMamba", "DeciMamba", "saved and loaded", "restored",
)  # fmt: skip
TRAINED_AT, LENGTH, PADDING, CHUNK = 12, 30, 11, 7


def table() -> str:
    """The whole table, one row a family."""
    groups = groupby(filter(lambda case: case.told, CASES.values()), lambda case: case.model_class)
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*head, *(row(list(cases)) for _, cases in groups)])


def row(cases: list[Case]) -> str:
    """A family's row; where a variant differs from its first case, the cell says in what."""
    assert all(supported(case) for case in cases)
    cells = [measured(case) for case in cases]
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
def measured(case: Case) -> tuple[str, ...]:
    """The cells of one case: without a method against stock, with each method, kept, undone."""
    stock, model = case.make(), case.make()
    before = model(random_ids(2, LENGTH)).logits
    pairs = zip(seen(wf.extend(model)), seen(stock), strict=True)
    cells = [verdict(relative(ours, theirs) < 1e-5) for ours, theirs in pairs]
    cells.insert(2, verdict(relative(chunked(model), stock_last(stock)) < 1e-5))
    sample = random_ids(3, TRAINED_AT, seed=3)
    calibration = wf.calibrate(model, sample, train_length=TRAINED_AT)
    last = model.widefield.layout.layers[-1]
    longmamba = wf.LongMamba(calibration, reduction="slowest")
    long = works(model, longmamba)
    short = works(model, wf.DeciMamba(layers=[last], base_length=8))
    full = works(model, wf.DeciMamba(layers=[last], base_length=8, residual="full"))
    decimamba = "yes" if short else '`residual="full"`' if full else "no"
    kept = verdict(comes_back(wf.extend(model, longmamba)), "same bits")
    undone = torch.equal(wf.restore(model)(random_ids(2, LENGTH)).logits, before)
    return (*cells, "yes" if long else "no", decimamba, kept, verdict(undone, "same bits"))


def verdict(holds: bool, word: str = "equal") -> str:
    """What a cell says."""
    return word if holds else f"not {word}"


def chunked(model: Any) -> Tensor:
    """Logits of the last token of a prompt that is read in chunks."""
    return wf.prefill(model, random_ids(2, LENGTH), chunk_size=CHUNK).logits[:, -1]


def stock_last(model: Any) -> Tensor:
    """The same in one pass."""
    return model(random_ids(2, LENGTH)).logits[:, -1]


def comes_back(model: Any) -> bool:
    """Whether model, method and state, written and read again, go on to the same bits."""
    ids, step = random_ids(2, LENGTH), random_ids(2, 1, seed=5)
    read = wf.prefill(model, ids)
    name = "cache_params" if "cache_params" in read else "past_key_values"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        wf.save_state(read[name], Path(folder) / "state.safetensors", model)
        again = wf.load(folder).model
        state = wf.load_state(Path(folder) / "state.safetensors", again)
    same = torch.equal(again(ids).logits, model(ids).logits)
    following = [m(step, use_cache=True, **{name: c}).logits for m, c in
                 ((model, read[name]), (again, state))]  # fmt: skip
    return same and torch.equal(*following)


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
    """Logits of a prompt, of a left-padded batch's tokens, and of a decoded token."""
    ids, mask = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :PADDING] = 0
    padded = model(ids, attention_mask=mask).logits
    whole = model(ids, use_cache=True)
    name = "cache_params" if "cache_params" in whole else "past_key_values"
    step = model(random_ids(2, 1, seed=5), use_cache=True, **{name: whole[name]})
    tokens = torch.cat([padded[0], padded[1, PADDING:]])
    return [whole.logits, tokens, step.logits]


def parts(page: str) -> tuple[str, str, str]:
    """A page's text before its table, the table, and after it."""
    start = page.index("| transformers class |")
    end = page.index("\n\n", start)
    return page[:start], page[start:end], page[end:]


if __name__ == "__main__":
    before, _, after = parts(PAGE.read_text("utf-8"))
    PAGE.write_text(before + table() + after, encoding="utf-8")

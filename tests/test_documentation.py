"""What the documentation tells people to type works: commands parse, Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHORTER = {"budget_seconds=60": "budget_seconds=5"}  # what a reader waits for and a test does not
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    found = FENCE.findall(page.read_text("utf-8"))
    return [code for _, kind, code in found if kind == language]


def commands() -> list[tuple[str, str]]:
    """Every line that begins with widefield, and where it stands."""
    return [
        (page.name, line.strip())
        for page in PAGES
        for code in blocks(page, "bash")
        for line in code.replace("\\\n", " ").splitlines()
        if line.strip().startswith("widefield ")
    ]


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_the_documentation_parses(page: str, line: str) -> None:
    from widefield.cli import build

    command = typer.main.get_command(build())
    words = shlex.split(line, comments=True)[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    assert not hasattr(command, "commands"), f"{page}: no such verb: {line}"
    command.make_context("widefield", words)


@pytest.mark.parametrize("pages", [["README.md"], ["docs/tutorial.md", "docs/tasks/passkey.md"]])
def test_the_python_of_the_pages_runs(
    pages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from widefield.bundled import available

    if "base" not in available():
        pytest.skip("the bundled checkpoint is not here")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__documentation__"}
    code = [block for page in pages for block in blocks(ROOT / page, "python")]
    for block in code:
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        if "mamba-130m" not in block:  # from the hub
            exec(block, names)

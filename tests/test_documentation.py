"""What the documentation tells people to type works: commands parse, Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What a reader waits for and a test does not.
SHORTER = {
    "16_384": "4_096",
    "sequences=16, batch_size=8": "sequences=4, batch_size=4",
    "lengths=[4096], trials=5, windows=1": (
        "lengths=[2048], trials=1, windows=1, last=64, candidates=ONE"
    ),
    "depths=(0.0, 0.5, 1.0), trials=2": "depths=(0.5,), trials=1",
}
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


def run_pages(pages: list[str]) -> None:
    from widefield.evaluation.tune import Candidates

    one = Candidates((0.01,), (1e-17,), ("fastest",), layers=False)
    names: dict[str, object] = {"__name__": "__documentation__", "ONE": one}
    code = [block for page in pages for block in blocks(ROOT / page, "python")]
    for block in code:
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        if "mamba-130m" not in block:  # from the hub
            exec(block, names)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to write into, and the bundled checkpoint to read."""
    from widefield.bundled import available

    if "base" not in available():
        pytest.skip("the bundled checkpoint is not here")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
def test_the_eight_lines_of_the_readme_find_the_key(capsys: pytest.CaptureFixture[str]) -> None:
    run_pages(["README.md"])
    assert capsys.readouterr().out.split() == ["41973"]


@pytest.mark.usefixtures("elsewhere")
def test_the_tutorial_and_the_page_of_its_task_run() -> None:
    run_pages(["docs/tutorial.md", "docs/tasks/passkey.md"])

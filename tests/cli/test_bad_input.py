"""Every mistake is one line on stderr that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.cli.conftest import CommandLine
from widefield.calibration import Calibration

PASSKEY = ("eval", "passkey")


def refused(wf: CommandLine, *args: object) -> str:
    """The one line that a command line is refused with."""
    before = sorted(Path.cwd().rglob("*"))
    outcome = wf(*args)
    assert outcome.code == 2, outcome
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(Path.cwd().rglob("*")) == before
    return outcome.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("dmo",), "unknown command dmo: did you mean demo?"),
        (("eval", "passky"), "unknown command passky: did you mean passkey?"),
        (("demo", "--quik"), "unknown option --quik: did you mean --quick"),
        (("demo", "--trials", "many"), "invalid value 'many' for '--trials'"),
        (("demo", "--trials", "0"), "trials is 0; give at least 1"),
        (("demo", "--lengths", "1x"), "'1x' is not a length"),
        (("demo", "--lengths", "64"), "too short for the passkey task"),
        ((*PASSKEY, "--lengths", "64"), "ask for at least"),
        ((*PASSKEY, "--lengths", ""), "is not a list of lengths"),
        ((*PASSKEY, "--depths", "2"), "'2' is not a depth"),
        ((*PASSKEY, "--method", "longmmba"), "did you mean 'longmamba'"),
        ((*PASSKEY, "--method", "longmamba+longmamba"), "names a method twice"),
        ((*PASSKEY, "--set", "longmamba.clmp=1"), "did you mean 'clamp_share'"),
        ((*PASSKEY, "--set", "longmamba.clamp_share=7"), "clamp_share=7: expected C"),
        ((*PASSKEY, "--set", "longmamba=7"), "expected METHOD.OPTION=VALUE"),
        ((*PASSKEY, "--set", "longmmba.x=7"), "did you mean 'longmamba'"),
        ((*PASSKEY, "--set", "decimamba.layers=1"), "has no effect"),
        ((*PASSKEY, "--method", "decimamba", "--set", "decimamba.layers=9"), "no Mamba layer 9"),
        ((*PASSKEY, "--device", "gpu"), "unknown device 'gpu'"),
        ((*PASSKEY, "--dtype", "int8"), "unknown dtype 'int8'"),
        ((*PASSKEY, "--model", "./nowhere"), "no model at ./nowhere: expected a folder with"),
        ((*PASSKEY, "--model", "base"), "did you mean bundled:base?"),
        ((*PASSKEY, "--model", "bundled:bse"), "did you mean 'base'"),
        ((*PASSKEY, "--haystack", "nowhere.txt"), "no text at nowhere.txt"),
        ((*PASSKEY, "--calibration", "nowhere"), "--calibration nowhere: no such file"),
        ((*PASSKEY, "--methods", "nowhere"), "--methods nowhere: no such file"),
        ((*PASSKEY, "--batch-tokens", "-1"), "give at least 1"),
        (("eval", "bits"), "missing option '--texts'"),
        (("generate",), "either --prompt TEXT or --prompt-file FILE"),
        (("generate", "--prompt", "a", "--prompt-file", "b"), "either --prompt TEXT"),
        (("generate", "--prompt", ""), "the prompt is empty"),
        (("generate", "--prompt", "a", "--cuda-graph"), "needs a model on a GPU"),
        (("generate", "--prompt-file", "nowhere"), "--prompt-file nowhere: no such file"),
        (("generate", "--prompt-file", "."), "is a folder: give a text file"),
        (("generate", "--prompt", "a", "--temperature", "2"), "no effect without --sample"),
        (("generate", "--prompt", "a", "--sample", "--temperature", "0"), "a number above 0"),
        (("generate", "--prompt", "a", "--sample", "--top-p", "2"), "at most 1"),
        (("generate", "--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("generate", "--prompt", "a", "--set", "longmamba.clamp_share=0.1"), "need --method"),
        (("generate", "--prompt", "a", "--method", "unmodified,longmamba"), "expected one"),
        (("calibrate",), "missing argument 'model'"),
        (("tune", "--out", "tuned.json", "--budget", "0"), "--budget 0"),
        (("tune", "--out", "tuned.json", "--quality-limit", "-1"), "--quality-limit -1"),
        (("tune", "--out", "tuned.txt"), "expected a name that ends in .json"),
        (("info", "bundled:bse"), "did you mean 'base'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_that_says(wf: CommandLine, args: tuple[str, ...], said: str) -> None:
    assert said in refused(wf, *args)


RECIPE = """
name: small
steps: 2
stages: [{until: 1.0, length: 256, batch: 2}]
shape: {hidden_size: 32, layers: 1, state_size: 4}
"""


def test_training_is_refused_before_it_begins(wf: CommandLine, text: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    Path("typo.yaml").write_text(RECIPE.replace("stages:", "stages_:"))
    out = ("--out", "new")
    known = ("train", "recipe.yaml", *out)
    assert "RECIPE nowhere.yaml: no such file" in refused(
        wf, "train", "nowhere.yaml", "--corpus", text, *out
    )
    assert "expected stages" in refused(wf, "train", "typo.yaml", "--corpus", text, *out)
    assert "--corpus nowhere: no such file" in refused(wf, *known, "--corpus", "nowhere")
    assert "unknown device 'gpu'" in refused(wf, *known, "--corpus", text, "--device", "gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(wf: CommandLine) -> None:
    assert "sees no GPUs; use --device cpu" in refused(wf, *PASSKEY, "--device", "cuda")


def test_a_file_in_the_place_of_the_output_folder_is_refused(wf: CommandLine) -> None:
    Path("taken").write_text("mine")
    for out in ("taken", "taken/deeper"):
        assert "is a file; give a folder" in refused(wf, *PASSKEY, "--out", out)
    assert Path("taken").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_refused(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be written to" in refused(wf, "demo", "--out", "results")


def test_a_folder_in_the_place_of_an_output_file_is_refused(wf: CommandLine, text: Path) -> None:
    Path("taken").mkdir()
    args = ("calibrate", "bundled:base", "--texts", text, "--train-length", "1k")
    assert "is a folder: give a file" in refused(wf, *args, "--out", "taken")
    assert "ends in .safetensors" in refused(wf, *args, "--out", "cal.json")


def test_too_little_text_to_calibrate_on_is_refused(wf: CommandLine, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A short text. " * 100)
    args = ("calibrate", "bundled:base", "--texts", short, "--out", "new/cal.safetensors")
    assert "fewer than one sequence" in refused(wf, *args, "--train-length", "1m")
    assert "give more text, or" in refused(wf, *args, "--train-length", "1k", "--sequences", 9)


def test_a_model_of_an_unknown_class_is_named_with_the_supported_ones(
    wf: CommandLine, tmp_path: Path
) -> None:
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=384, n_embd=16, n_layer=1, n_head=1, n_positions=32)
    config.tokenizer_class = "ByT5Tokenizer"
    GPT2LMHeadModel(config).save_pretrained(folder)
    line = refused(wf, *PASSKEY, "--method", "unmodified", "--model", folder)
    assert "GPT2LMHeadModel" in line and "MambaForCausalLM" in line


def test_a_folder_without_a_model_is_refused(wf: CommandLine, tmp_path: Path) -> None:
    assert "expected a folder with config.json" in refused(wf, "info", tmp_path)


def test_weights_that_are_cut_off_are_refused(
    wf: CommandLine, bundled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(bundled / "base", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load" in refused(wf, "info", folder)


def damaged_byte(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 255]) + data[-99:]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:500], lambda data: b"", damaged_byte], ids=["cut", "empty", "bit"]
)
def test_a_damaged_calibration_is_refused(
    wf: CommandLine, bundled: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / "cal.safetensors"
    file.write_bytes(damage((bundled / "base" / "calibration.safetensors").read_bytes()))
    assert "make a new one" in refused(wf, *PASSKEY, "--calibration", file)


def test_a_calibration_of_another_model_is_refused_before_anything_runs(
    wf: CommandLine, bundled: Path
) -> None:
    other = bundled / "decimated" / "calibration.safetensors"
    names = [
        Calibration.load(bundled / n / "calibration.safetensors") for n in ("base", "decimated")
    ]
    line = refused(wf, *PASSKEY, "--calibration", other)
    assert all(calibration.fingerprint in line for calibration in names)
    assert "belongs to" in refused(wf, "info", "--calibration", other)


def test_a_model_without_a_calibration_says_how_to_make_one(
    wf: CommandLine, bundled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(bundled / "base", folder)
    (folder / "calibration.safetensors").unlink()
    for args in ((*PASSKEY,), ("tune", "--out", "tuned.json")):
        line = refused(wf, *args, "--model", folder)
        assert f"widefield calibrate {folder} --texts FILE --train-length N" in line


def test_decimamba_without_layers_says_how_to_give_them(
    wf: CommandLine, bundled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(bundled / "base", folder)
    line = refused(wf, *PASSKEY, "--model", folder, "--method", "decimamba")
    assert "--set decimamba.layers=3" in line


def test_weights_that_are_not_finite_are_refused(
    wf: CommandLine, bundled: Path, tmp_path: Path, text: Path
) -> None:
    from widefield.loading import load

    folder = tmp_path / "nan"
    shutil.copytree(bundled / "base", folder)
    model = load(folder).model
    with torch.no_grad():
        model.backbone.layers[0].mixer.dt_proj.bias[3] = torch.nan
    model.save_pretrained(folder)
    args = ("calibrate", folder, "--texts", text, "--train-length", 256, "--out", "cal.safetensors")
    assert "non-finite Δ in layer 0" in refused(wf, *args)


def test_files_that_are_not_text_are_refused(wf: CommandLine, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert "is not UTF-8 text" in refused(wf, *PASSKEY, "--haystack", binary)
    assert "is not UTF-8 text" in refused(wf, "generate", "--prompt-file", binary)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"methods": 3}', '{"methods": {"a": 1}}'])
def test_a_file_of_methods_that_is_none_is_refused(
    wf: CommandLine, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "tuned.json"
    file.write_text(content)
    assert "`widefield tune` writes one" in refused(wf, *PASSKEY, "--methods", file)


def test_results_of_another_run_are_left_as_they_are(wf: CommandLine) -> None:
    args = (*PASSKEY, "--method", "unmodified", "--lengths", 256, "--depths", 0, "--out", "mine")
    assert wf(*args, "--trials", 1).code == 0
    before = Path("mine/results.json").read_text()
    assert "belongs to another run" in refused(wf, *args, "--trials", 2)
    assert Path("mine/results.json").read_text() == before
    assert wf(*args, "--trials", 2, "--fresh").code == 0
    assert Path("mine/results.old.json").read_text() == before
    assert json.loads(Path("mine/results.json").read_text())["cells"][0]["trials"] == 2

"""`convert`: original checkpoints become folders of transformers, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from tests.cli.conftest import CommandLine
from tests.originals import (
    CONFIGS,
    KINDS,
    WRITERS,
    reference,
    tensors_of,
    write_bin,
    write_config,
    write_original,
)
from widefield.calibration import Calibration

IDS = torch.arange(1, 14)[None]


def there() -> list[str]:
    """Everything in the folder that the command runs in."""
    return sorted(path.name for path in Path().rglob("*"))


@torch.no_grad()
def same_logits(folder: Path | str, kind: str) -> bool:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.equal(model(IDS).logits, reference(kind)(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_was_converted(wf: CommandLine, tmp_path: Path, kind: str) -> None:
    source = write_original(tmp_path / "source", kind)
    done = wf("convert", source, "--out", "new/model")
    assert done.code == 0, done.err
    name = type(reference(kind)).__name__
    assert done.out.startswith(f"new/model: {name}, ") and "float32, 1 file of" in done.out
    assert "EleutherAI/gpt-neox-20b" in done.err
    assert same_logits("new/model", kind)
    assert there() == ["config.json", "generation_config.json", "model", "model.safetensors", "new"]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_info_reads_every_format(wf: CommandLine, tmp_path: Path, write) -> None:
    facts = json.loads(wf("info", write_original(tmp_path / "x", "mamba", write), "--json").out)
    assert facts["class"] == "MambaForCausalLM" and facts["supported"]
    assert facts["parameters"] == sum(p.numel() for p in reference("mamba").parameters())


def test_a_large_model_is_written_in_several_files(
    wf: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import MambaForCausalLM

    save = MambaForCausalLM.save_pretrained

    def small_files(self: MambaForCausalLM, folder: Path) -> None:
        save(self, folder, max_shard_size="50KB")

    monkeypatch.setattr(MambaForCausalLM, "save_pretrained", small_files)
    done = wf("convert", write_original(tmp_path / "source", "mamba"), "--out", "model")
    assert "files of weights" in done.out
    assert len(list(Path("model").glob("*.safetensors"))) > 1
    assert same_logits("model", "mamba")


@pytest.mark.parametrize(("asked", "kept"), [(None, "float16"), ("bfloat16", "bfloat16")])
def test_the_dtype_is_that_of_the_checkpoint_unless_another_is_asked_for(
    wf: CommandLine, tmp_path: Path, asked: str | None, kept: str
) -> None:
    write_config(tmp_path / "half", CONFIGS["mamba"])
    write_bin(tmp_path / "half", {n: t.half() for n, t in tensors_of("mamba").items()})
    options = () if asked is None else ("--dtype", asked)
    assert wf("convert", tmp_path / "half", "--out", "model", *options).code == 0
    assert json.loads(Path("model/config.json").read_text())["dtype"] == kept
    model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{kept}"}


def test_tokenizer_and_calibration_go_along(wf: CommandLine, tmp_path: Path, text: Path) -> None:
    source = write_original(tmp_path / "source", "mamba")
    letters = Tokenizer(models.BPE({chr(97 + i): i for i in range(26)}, []))
    letters.save(str(source / "tokenizer.json"))
    made = wf(
        "calibrate", source, "--texts", text, "--train-length", 64, "--sequences", 2,
        "--out", source / "calibration.safetensors",
    )  # fmt: skip
    assert made.code == 0, made.err
    done = wf("convert", source, "--out", "model")
    assert done.code == 0 and done.err == ""
    facts = json.loads(wf("info", "model", "--json").out)
    assert facts["tokenizer"] and facts["calibration"]["train_length"] == 64


def test_a_calibration_that_no_longer_fits_is_left_out(
    wf: CommandLine, tmp_path: Path, bundled: Path
) -> None:
    source = write_original(tmp_path / "source", "mamba")
    shutil.copy(bundled / "base" / "calibration.safetensors", source)
    done = wf("convert", source, "--out", "model")
    assert done.code == 0 and "the calibration was left out: " in done.err
    assert not Path("model/calibration.safetensors").exists()


def test_saved_methods_go_along(wf: CommandLine, bundled: Path) -> None:
    from widefield import DeciMamba, LongMamba, extend, load_bundled

    model, _, calibration = load_bundled()
    assert calibration is not None
    extend(model, LongMamba(calibration), DeciMamba(layers=[1]))
    model.save_pretrained("extended")
    assert wf("convert", "extended", "--out", "model", "--dtype", "bfloat16").code == 0
    facts = json.loads(wf("info", "model", "--json").out)
    assert list(facts["on"]) == ["longmamba", "decimamba"] and facts["dtype"] == "bfloat16"
    assert Calibration.load("model/widefield.safetensors").identity == calibration.identity


def test_nothing_is_overwritten(wf: CommandLine, tmp_path: Path) -> None:
    source = write_original(tmp_path / "source", "mamba")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    for out, said in (("full", "not empty"), ("file", "is a file"), (source, "not empty")):
        done = wf("convert", source, "--out", out)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert there() == ["file", "full", "mine.txt"]
    Path("empty").mkdir()
    assert wf("convert", source, "--out", "empty").code == 0
    assert same_logits("empty", "mamba")


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted: nothing was written to new/deep/model\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
    ],
    ids=["ctrl-c", "full disk"],
)
def test_what_fails_while_writing_leaves_nothing(
    wf: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    code: int,
    said: str,
) -> None:
    from transformers import MambaForCausalLM

    save = MambaForCausalLM.save_pretrained

    def fails(self: MambaForCausalLM, folder: Path) -> None:
        save(self, folder)
        assert (folder / "model.safetensors").exists()
        raise failure

    monkeypatch.setattr(MambaForCausalLM, "save_pretrained", fails)
    source = write_original(tmp_path / "source", "mamba")
    done = wf("convert", source, "--out", "new/deep/model")
    assert (done.code, done.err) == (code, said)
    assert there() == []


def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(wf: CommandLine, tmp_path: Path) -> None:
    write_config(tmp_path / "bad", {**CONFIGS["mamba2"], "attn_layer_idx": [3]})
    done = wf("convert", tmp_path / "bad", "--out", "model")
    assert done.code == 2 and "hybrid" in done.err and done.err.count("\n") == 1
    missing = wf("convert", "no/where", "--out", "model")
    assert missing.code == 2 and missing.err.count("\n") == 1
    assert there() == []

"""`calibrate`, `info`, `generate`, `tune`, and what holds for every verb."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.cli.conftest import CommandLine
from widefield.calibration import Calibration
from widefield.cli import VERBS
from widefield.cli._generate import Printer


def program(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "widefield", *args],
        capture_output=True, text=True, check=False, timeout=120, **kwargs,
    )  # fmt: skip


def test_help_names_every_verb_without_loading_torch() -> None:
    code = (
        "import sys\nfrom widefield.cli import run\n"
        "assert run(['--help']) == 0\n"
        "slow = {'torch', 'transformers', 'numba', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {verb} ", done.stdout, re.MULTILINE) for verb in VERBS)


def test_the_program_runs_as_a_module() -> None:
    assert program("--version").stdout.startswith("widefield ")
    wrong = program("demo", "--lengths", "1x")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and not wrong.stdout


def test_without_a_verb_the_help_is_shown(wf: CommandLine) -> None:
    done = wf()
    assert done.code == 2 and "Commands:" in done.out + done.err


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m widefield eval passkey --help | head -n 1"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60
    )
    assert "Usage" in done.stdout and done.stderr == ""


def test_a_full_disk_is_one_line(wf: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "results.json")

    monkeypatch.setattr("widefield.cli._passkey.run_passkey", full)
    done = wf("demo")
    assert (done.code, done.err) == (2, "error: results.json: No space left on device\n")


def test_running_out_of_memory_is_one_line(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("widefield.cli._passkey.run_passkey", full)
    done = wf("demo")
    assert (
        done.code == 2 and done.err.startswith("error: out of memory") and "\n" not in done.err[:-1]
    )


def test_our_own_bugs_keep_their_traceback(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("widefield.cli._passkey.run_passkey", broken)
    with pytest.raises(KeyError, match="a bug"):
        wf("demo")


def test_calibrate_writes_what_generate_and_info_read(
    wf: CommandLine, bundled: Path, tmp_path: Path, text: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(bundled / "base", folder)
    (folder / "calibration.safetensors").unlink()
    done = wf(
        "calibrate", folder, "--texts", text, "--train-length", 128, "--sequences", 3,
        "--batch-size", 2, "--out", "new/cal.safetensors",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "3 sequences of 128 tokens" in done.out
    made = Calibration.load("new/cal.safetensors")
    assert (made.train_length, made.sequences) == (128, 3)
    with_it = ("--calibration", "new/cal.safetensors")
    facts = json.loads(wf("info", folder, "--json", *with_it).out)
    assert facts["calibration"]["train_length"] == 128
    generated = wf(
        "generate", "--model", folder, "--prompt-file", text, "--method", "longmamba",
        "--set", "longmamba.reduction=slowest", "--max-new-tokens", 3, *with_it,
    )  # fmt: skip
    assert generated.code == 0, generated.err
    assert "longmamba (reduction=slowest)" in generated.err
    assert "trained at 128" in generated.err


def test_ctrl_c_while_calibrating_leaves_no_file(
    wf: CommandLine, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("widefield.cli._calibrate.calibrate", interrupted)
    args = ("--texts", text, "--train-length", 128, "--out", "new/cal.safetensors")
    done = wf("calibrate", "bundled:base", *args)
    assert (done.code, done.err) == (
        130,
        "interrupted: nothing was written to new/cal.safetensors\n",
    )
    assert not Path("new").exists()


def test_info_of_a_bundled_model(wf: CommandLine) -> None:
    facts = json.loads(wf("info", "--json").out)
    assert facts["class"] == "MambaForCausalLM" and facts["supported"]
    assert (facts["layers"], facts["channels"], facts["states"]) == (2, [64, 64], 8)
    assert facts["parameters"] == 29152 and facts["on"] == {}
    assert set(facts["calibration"]["global_share"]) == {"0", "1"}
    assert all(0 <= share <= 1 for share in facts["calibration"]["global_share"].values())
    shown = wf("info", "bundled:base").out
    for words in ("MambaForCausalLM", "256 tokens", "no method", "slowest state", "ByT5Tokenizer"):
        assert words in shown
    assert facts["kernels"] in shown and "numba" in facts["kernels"]


def test_info_names_what_was_saved_with_the_model(wf: CommandLine, bundled: Path) -> None:
    from widefield import DeciMamba, LongMamba, extend, load_bundled

    model, _, calibration = load_bundled()
    extend(model, LongMamba(calibration, reduction="slowest"), DeciMamba(layers=[1]))
    model.save_pretrained("extended")
    facts = json.loads(wf("info", "extended", "--json").out)
    assert list(facts["on"]) == ["longmamba", "decimamba"]
    assert "decimamba (layers=[1]" in wf("info", "extended").out
    done = wf("generate", "--model", "extended", "--prompt", "Well", "--max-new-tokens", 2)
    assert "longmamba (reduction=slowest) + decimamba (layers=[1])" in done.err


def test_info_without_a_calibration_says_how_to_make_one(
    wf: CommandLine, bundled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(bundled / "base", folder)
    (folder / "calibration.safetensors").unlink()
    shown = " ".join(wf("info", folder).out.replace("│", " ").split())
    assert "widefield calibrate" in shown and "--train-length" in shown


def test_info_of_an_unsupported_model_says_why(wf: CommandLine, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=384, n_embd=16, n_layer=1, n_head=1, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    done = wf("info", tmp_path / "gpt2", "--json")
    facts = json.loads(done.out)
    assert done.code == 0 and not facts["supported"] and "MambaForCausalLM" in facts["reason"]
    assert "no: GPT2LMHeadModel" in wf("info", tmp_path / "gpt2").out


def test_generate_repeats_itself_without_sampling_and_with_a_seed(wf: CommandLine) -> None:
    greedy = [wf("generate", "--prompt", "Hm", "--max-new-tokens", 8).out for _ in range(2)]
    assert greedy[0] == greedy[1]
    sample = ("generate", "--prompt", "Hm", "--max-new-tokens", 8, "--sample", "--temperature", 3)
    outs = [wf(*sample, "--seed", seed).out for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_generate_tells_what_is_on_the_length_and_the_speed_on_stderr(
    wf: CommandLine, text: Path
) -> None:
    done = wf("generate", "--prompt-file", text, "--max-new-tokens", 4, "--method", "decimamba")
    first, second, last = done.err.splitlines()
    assert first == "bundled:base, decimamba (layers=[1], base_length=200)"
    assert second == f"prompt {text.stat().st_size:,} tokens, trained at 256; on cpu"
    assert re.fullmatch(r"\d tokens; the first after [\d.]+ s(, then \d+ tokens/s)?", last)
    plain = wf("generate", "--prompt", "é", "--max-new-tokens", 1)
    assert plain.err.startswith("bundled:base, no method on\nprompt 2 tokens")


def test_generate_reads_standard_input(wf: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("Ünder".encode()), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    done = wf("generate", "--prompt-file", "-", "--max-new-tokens", 1)
    assert done.code == 0 and "prompt 6 tokens" in done.err


def test_ctrl_c_while_generating_ends_the_line(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Printer.put

    def interrupted(self: Printer, value: torch.Tensor) -> None:
        put(self, value)
        if self.tokens == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Printer, "put", interrupted)
    done = wf("generate", "--prompt", "Well", "--max-new-tokens", 9)
    assert done.code == 130 and done.out.endswith("\n")
    assert done.err.endswith("interrupted: 3 of 9 tokens were generated\n")


def test_generated_text_survives_a_terminal_without_unicode(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    sample = ("--prompt", "a", "--max-new-tokens", 40, "--sample", "--temperature", 9)
    assert wf("generate", *sample).code == 0
    stdout.seek(0)
    assert "?" in stdout.read()


def printed(tokenizer: Any, ids: list[int]) -> list[str]:
    """What a printer writes after each token, and at the end."""
    out = io.StringIO()
    printer = Printer(tokenizer, out)
    printer.put(torch.tensor([[5, 6, 7]]))
    steps = []
    for token in ids:
        printer.put(torch.tensor([token]))
        steps.append(out.getvalue())
    printer.end()
    return [*steps, out.getvalue()]


BYTES = ByT5Tokenizer()


@given(st.binary(max_size=40))
def test_any_bytes_come_out_as_they_decode(data: bytes) -> None:
    *steps, whole = printed(BYTES, [byte + 3 for byte in data])
    assert whole == data.decode(errors="replace") + "\n"
    assert all(whole.startswith(step) for step in steps)


def test_a_character_appears_when_its_last_byte_is_there() -> None:
    euro = [byte + 3 for byte in "€".encode()]
    assert printed(BYTES, [*euro, 1, 300]) == ["", "", "€", "€", "€", "€\n"]


def test_tokens_of_half_characters_are_held_back() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    ids = inner.encode("a€\nb").ids
    assert printed(tokenizer, ids) == ["a", "a", "a", "a€", "a€\n", "a€\nb", "a€\nb\n"]


def test_tune_writes_settings_that_eval_reads(wf: CommandLine, text: Path) -> None:
    done = wf(
        "tune", "--lengths", 512, "--trials", 2, "--budget", 4, "--haystack", text, "--out",
        "new/tuned.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "retrieval and cost at 512" in done.out and "chosen: C " in done.out
    written = json.loads(Path("new/tuned.json").read_text())
    assert written["header"]["subjects"] and written["search"]["table"]
    chosen = written["methods"]["longmamba"]
    assert chosen == written["search"]["best"]
    asked = wf(
        "eval", "passkey", "--method", "longmamba", "--methods", "new/tuned.json", "--lengths", 256,
        "--depths", 0, "--trials", 1, "--out", "mine",
    )  # fmt: skip
    assert asked.code == 0, asked.err
    header = json.loads(Path("mine/results.json").read_text())["header"]
    assert header["subjects"]["longmamba"]["methods"]["longmamba"] == chosen


def test_ctrl_c_before_the_first_setting_writes_nothing(
    wf: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("widefield.cli._tune.tune", interrupted)
    done = wf("tune", "--out", "new/tuned.json")
    assert done.code == 130 and "no setting was measured yet" in done.err
    assert not Path("new").exists()

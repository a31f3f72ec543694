"""Checkpoints in the original layout: read in every format, and every bad one refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

import widefield as wf
from tests.originals import (
    CONFIGS,
    KINDS,
    WRITERS,
    Tensors,
    oracle,
    reference,
    tensors_of,
    write_bin,
    write_config,
    write_original,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)
from widefield.errors import WidefieldError
from widefield.extension import write_extension
from widefield.families import fingerprint
from widefield.original.config import translate

IDS = torch.randint(1, 370, (2, 17), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def refusal(path: Path | str, **kwargs: Any) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(WidefieldError) as caught:
        wf.load(path, **kwargs)
    line = str(caught.value)
    assert line.startswith(f"cannot load {str(path)!r}: ") and "\n" not in line
    return line


class TestReading:
    @pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_format_gives_the_logits_of_the_same_tensors_in_transformers(
        self, tmp_path: Path, kind: str, write: Callable[[Path, Tensors], None]
    ) -> None:
        model, tokenizer, calibration = wf.load(write_original(tmp_path, kind, write))
        assert torch.equal(logits(model), logits(reference(kind)))
        assert type(model) is type(reference(kind)) and not model.training
        assert tokenizer is None and calibration is None

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_logits_are_those_of_the_papers_equations(self, tmp_path: Path, kind: str) -> None:
        model = wf.load(write_original(tmp_path, kind), dtype=torch.float64).model
        torch.testing.assert_close(
            logits(model, IDS[:1])[0].double(), oracle(kind, IDS[0]), rtol=2e-5, atol=2e-5
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_config_is_that_of_the_model_spelt_out(self, tmp_path: Path, kind: str) -> None:
        model = wf.load(write_original(tmp_path, kind)).model
        ours, theirs = model.config.to_dict(), reference(kind).config.to_dict()
        for name in ("_name_or_path", "architectures", "dtype"):
            ours[name] = theirs[name] = None
        assert ours == theirs
        assert model.lm_head.weight is model.backbone.embeddings.weight
        assert model.generation_config.eos_token_id == 0

    def test_weights_without_the_tied_head_are_whole(self, tmp_path: Path) -> None:
        write_config(tmp_path, CONFIGS["mamba"])
        tensors = tensors_of("mamba")
        del tensors["lm_head.weight"]
        write_bin(tmp_path, tensors)
        assert torch.equal(logits(wf.load(tmp_path).model), logits(reference("mamba")))

    def test_a_head_that_is_not_tied_is_kept(self, tmp_path: Path) -> None:
        write_config(tmp_path, {**CONFIGS["mamba"], "tie_embeddings": False})
        tensors = tensors_of("mamba")
        tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]
        write_bin(tmp_path, tensors)
        assert torch.equal(logits(wf.load(tmp_path).model), 2 * logits(reference("mamba")))

    def test_options_of_the_layer_are_read(self, tmp_path: Path) -> None:
        cell = {"d_state": 8, "d_conv": 3, "expand": 1, "dt_rank": 5, "dt_min": 0.001}
        write_config(tmp_path, {**CONFIGS["mamba"], "ssm_cfg": cell})
        config = translate({**CONFIGS["mamba"], "ssm_cfg": cell})
        assert (config.state_size, config.conv_kernel, config.time_step_rank) == (8, 3, 5)
        assert config.intermediate_size == 32
        cell = {"layer": "Mamba2", "headdim": 32, "ngroups": 2, "dt_limit": [0.0, 0.5]}
        config = translate({**CONFIGS["mamba2"], "ssm_cfg": cell})
        assert (config.num_heads, config.head_dim, config.n_groups) == (4, 32, 2)
        assert list(config.time_step_limit) == [0.0, 0.5]


class TestDtypes:
    def halves(self, folder: Path) -> Path:
        write_config(folder, CONFIGS["mamba"])
        write_bin(folder, {name: tensor.half() for name, tensor in tensors_of("mamba").items()})
        return folder

    def test_float16_becomes_float32_on_a_cpu(self, tmp_path: Path) -> None:
        model = wf.load(self.halves(tmp_path)).model
        assert model.dtype == torch.float32
        assert torch.equal(logits(model), logits(reference("mamba").half().float()))

    def test_auto_leaves_float16_as_it_is(self, tmp_path: Path) -> None:
        assert wf.load(self.halves(tmp_path), dtype="auto").model.dtype == torch.float16

    def test_a_dtype_that_is_asked_for_is_given(self, tmp_path: Path) -> None:
        model = wf.load(write_original(tmp_path, "mamba"), dtype=torch.bfloat16).model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert torch.equal(logits(model), logits(reference("mamba").bfloat16()))


class TestWhatLiesBeside:
    def test_a_tokenizer_is_used(self, tmp_path: Path) -> None:
        letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abc")}, []))
        letters.save(str(write_original(tmp_path, "mamba") / "tokenizer.json"))
        tokenizer = wf.load(tmp_path).tokenizer
        assert tokenizer is not None and tokenizer("cab").input_ids == [2, 0, 1]

    def test_a_calibration_of_the_same_weights_in_transformers_fits(self, tmp_path: Path) -> None:
        original = wf.load(write_original(tmp_path, "mamba")).model
        assert fingerprint(original) == fingerprint(reference("mamba"))

    def test_a_calibration_and_methods_are_used(self, tmp_path: Path) -> None:
        model = wf.load(write_original(tmp_path, "mamba")).model
        calibration = wf.calibrate(model, torch.randint(1, 370, (4, 32)), train_length=32)
        calibration.save(tmp_path / "calibration.safetensors")
        wf.extend(model, wf.LongMamba(calibration, decay_threshold=0.5), wf.DeciMamba(layers=[1]))
        write_extension(model.widefield, tmp_path)
        again = wf.load(tmp_path)
        assert again.calibration is not None
        assert again.calibration.identity == calibration.identity
        assert [method.name for method in again.model.widefield.methods] == [
            "longmamba",
            "decimamba",
        ]
        long = torch.randint(1, 370, (1, 90))
        assert torch.equal(logits(again.model, long), logits(model, long))
        assert not hasattr(wf.load(tmp_path, methods=False).model, "widefield")


class TestHub:
    def cached(self, root: Path) -> Path:
        """A hub cache that holds state-spaces/mamba-130m."""
        repository = root / "models--state-spaces--mamba-130m"
        write_original(repository / "snapshots" / "c0ffee", "mamba")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("c0ffee")
        return root

    def test_a_hub_id_is_found_in_the_cache(self, tmp_path: Path) -> None:
        cache = self.cached(tmp_path)
        model, tokenizer, _ = wf.load("state-spaces/mamba-130m", cache_dir=cache)
        assert torch.equal(logits(model), logits(reference("mamba")))
        assert tokenizer is None and model.config._name_or_path == "state-spaces/mamba-130m"

    def test_a_revision_is_minded(self, tmp_path: Path) -> None:
        cache = self.cached(tmp_path)
        assert refusal("state-spaces/mamba-130m", cache_dir=cache, revision="other")
        found = wf.load("state-spaces/mamba-130m", cache_dir=cache, revision="c0ffee")
        assert torch.equal(logits(found.model), logits(reference("mamba")))

    def test_without_a_network_one_line_says_so(self, tmp_path: Path) -> None:
        assert "connect" in refusal("state-spaces/mamba-130m", cache_dir=tmp_path)


Config = dict[str, Any]
BAD_CONFIGS: list[tuple[str, Config, str]] = [
    ("mamba2", {"attn_layer_idx": [1]}, r"hybrid with attention in layers \[1\]"),
    ("mamba2", {"d_intermediate": 128}, "d_intermediate 128"),
    ("mamba", {"rms_norm": False}, "rms_norm False"),
    ("mamba", {"n_layer": "2"}, "n_layer is '2': expected a whole number"),
    ("mamba", {"vocab_size": 0}, "vocab_size is 0"),
    ("mamba", {"ssm_cfg": [3]}, r"ssm_cfg is \[3\]"),
    ("mamba", {"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3': did you mean 'Mamba"),
    ("mamba", {"ssm_cfg": {"d_stat": 8}}, "'d_stat': did you mean 'd_state'"),
    ("mamba", {"ssm_cfg": {"d_state": "many"}}, "transformers refuses.*state_size"),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, "headdim 48 does not divide the"),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm False"),
    ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}}, "d_ssm 64"),
]


class TestBadConfigs:
    @pytest.mark.parametrize(("kind", "change", "said"), BAD_CONFIGS, ids=lambda case: str(case))
    def test_a_model_that_cannot_be_is_refused(
        self, tmp_path: Path, kind: str, change: Config, said: str
    ) -> None:
        write_original(tmp_path, kind)
        write_config(tmp_path, {**CONFIGS[kind], **change})
        with pytest.raises(WidefieldError, match=said):
            wf.load(tmp_path)
        assert refusal(tmp_path)

    @pytest.mark.parametrize("content", ["", "[]", '{"d_model": 32}'])
    def test_a_config_of_neither_layout_is_refused(self, tmp_path: Path, content: str) -> None:
        write_original(tmp_path, "mamba")
        (tmp_path / "config.json").write_text(content)
        assert refusal(tmp_path)


class TestBadWeights:
    def written(self, folder: Path, change: Callable[[Tensors], object]) -> Path:
        write_config(folder, CONFIGS["mamba"])
        tensors = tensors_of("mamba")
        change(tensors)
        write_bin(folder, tensors)
        return folder

    def test_everything_that_does_not_fit_is_named_at_once(self, tmp_path: Path) -> None:
        def change(tensors: Tensors) -> None:
            del tensors["backbone.norm_f.weight"]
            tensors["backbone.layers.0.mixer.D"] = torch.zeros(63)
            tensors["backbone.layers.1.mixer.E"] = torch.zeros(2)
            tensors["backbone.layers.1.mixer.A_log"] = torch.zeros(64, 16, dtype=torch.int8)

        line = refusal(self.written(tmp_path, change))
        assert "missing: backbone.norm_f.weight" in line
        assert "unknown: backbone.layers.1.mixer.E" in line
        assert "another shape: backbone.layers.0.mixer.D (63,) instead of (64,)" in line
        assert "not of real numbers: backbone.layers.1.mixer.A_log (int8)" in line

    def test_of_many_names_ten_are_given_and_the_rest_counted(self, tmp_path: Path) -> None:
        line = refusal(self.written(tmp_path, lambda tensors: tensors.clear()))
        assert "and 12 more" in line and line.count("backbone.") == 10

    def test_a_vocabulary_that_is_not_padded_is_told_by_its_shape(self, tmp_path: Path) -> None:
        def change(tensors: Tensors) -> None:
            for name in ("backbone.embedding.weight", "lm_head.weight"):
                tensors[name] = tensors[name][:370].clone()

        assert "(370, 32) instead of (376, 32)" in refusal(self.written(tmp_path, change))

    def test_a_head_that_should_be_tied_and_is_not_is_refused(self, tmp_path: Path) -> None:
        def change(tensors: Tensors) -> None:
            tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1

        assert '"tie_embeddings": false' in refusal(self.written(tmp_path, change))

    def test_a_missing_head_is_named_where_it_is_not_tied(self, tmp_path: Path) -> None:
        self.written(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
        write_config(tmp_path, {**CONFIGS["mamba"], "tie_embeddings": False})
        assert "missing: lm_head.weight" in refusal(tmp_path)

    def test_a_folder_without_weights_says_what_it_looked_for(self, tmp_path: Path) -> None:
        write_config(tmp_path, CONFIGS["mamba"])
        line = refusal(tmp_path)
        assert "no weights" in line and "pytorch_model.bin.index.json" in line


class Runs:
    """Runs a command when it is unpickled, unless the reader knows better."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


class TestBadFiles:
    def test_nothing_in_a_file_is_run(self, tmp_path: Path) -> None:
        write_config(tmp_path / "model", CONFIGS["mamba"])
        trap = tmp_path / "trap"
        torch.save({**tensors_of("mamba"), "x": Runs(trap)}, tmp_path / "model/pytorch_model.bin")
        assert "nothing in it was run" in refusal(tmp_path / "model")
        assert not trap.exists()

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"state_dict": {"a": torch.zeros(1)}, "step": 3}, "more than tensors (state_dict, st"),
            ([torch.zeros(1)], "holds a list: expected a dictionary of tensors"),
        ],
        ids=["nested", "list"],
    )
    def test_a_file_of_something_else_is_refused(
        self, tmp_path: Path, content: object, said: str
    ) -> None:
        write_config(tmp_path, CONFIGS["mamba"])
        torch.save(content, tmp_path / "pytorch_model.bin")
        assert said in refusal(tmp_path)

    @pytest.mark.parametrize("kept", [0, 10, 700, -10])
    @pytest.mark.parametrize("write", WRITERS[:3], ids=lambda write: write.__name__)
    def test_a_file_that_is_cut_short_is_refused(
        self, tmp_path: Path, write: Callable[[Path, Tensors], None], kept: int
    ) -> None:
        write_original(tmp_path, "mamba", write)
        (file,) = (path for path in tmp_path.iterdir() if path.name != "config.json")
        file.write_bytes(file.read_bytes()[:kept])
        line = refusal(tmp_path)
        assert file.name in line and "damaged" in line

    def test_a_pointer_to_large_files_is_refused(self, tmp_path: Path) -> None:
        write_config(tmp_path, CONFIGS["mamba"])
        (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert "pytorch_model.bin" in refusal(tmp_path)

    @pytest.mark.parametrize("write", [write_sharded_bin, write_sharded_safetensors])
    def test_a_missing_shard_is_named(
        self, tmp_path: Path, write: Callable[[Path, Tensors], None]
    ) -> None:
        write_original(tmp_path, "mamba", write)
        (shard,) = tmp_path.glob("*-00002-of-00002.*")
        shard.unlink()
        assert f"{shard.name}, which is not there" in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("", "is no index of weights"),
            ("[]", "is no index of weights"),
            ('{"weight_map": 3}', "is no index of weights"),
            ('{"weight_map": {"a": 3}}', "is no index of weights"),
            (json.dumps({"weight_map": {"a": "../other/model.bin"}}), "names files elsewhere"),
        ],
    )
    def test_a_bad_index_is_refused(self, tmp_path: Path, content: str, said: str) -> None:
        write_config(tmp_path, CONFIGS["mamba"])
        (tmp_path / "pytorch_model.bin.index.json").write_text(content)
        assert said in refusal(tmp_path)

    def test_safetensors_are_preferred(self, tmp_path: Path) -> None:
        write_original(tmp_path, "mamba", write_safetensors)
        (tmp_path / "pytorch_model.bin").write_bytes(b"something else")
        assert torch.equal(logits(wf.load(tmp_path).model), logits(reference("mamba")))

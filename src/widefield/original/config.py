"""An original `config.json` in the words of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from widefield.errors import WidefieldError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["is_original", "translate"]

_LAYERS = ("Mamba1", "Mamba2")
# What only matters when weights are initialised, or for the speed of the authors' kernels.
_WITHOUT_EFFECT = {
    "A_init_range",
    "conv_init",
    "dt_init",
    "dt_init_floor",
    "dt_max",
    "dt_min",
    "dt_scale",
    "use_fast_path",
    "use_mem_eff_path",
}
_MAMBA1 = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_MAMBA2 = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "chunk_size": "chunk_size",
    "dt_limit": "time_step_limit",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
# Choices of the authors' code that transformers does not have: option → the only value it can run.
_FIXED = {"rms_norm": True, "d_intermediate": 0}
_FIXED_MAMBA2 = {
    "D_has_hdim": False,
    "activation": "swish",
    "d_ssm": None,
    "norm_before_gate": False,
    "rmsnorm": True,
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of the original layout."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def translate(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config of the same model.

    Raises:
        WidefieldError: if the model is a hybrid, or transformers has no such model.
    """
    cell = config.get("ssm_cfg") or {}
    if not isinstance(cell, Mapping):
        raise WidefieldError(f"ssm_cfg is {cell!r}: expected an object of options")
    layer = cell.get("layer", "Mamba1")
    if layer not in _LAYERS:
        raise unknown("layer in ssm_cfg", str(layer), _LAYERS)
    _refuse_hybrid(config)
    _check_fixed(config, _FIXED, "config.json")
    if layer == "Mamba2":
        _check_fixed(cell, _FIXED_MAMBA2, "ssm_cfg")
    return _mamba2(config, cell) if layer == "Mamba2" else _mamba1(config, cell)


def _refuse_hybrid(config: Mapping[str, Any]) -> None:
    attention = config.get("attn_layer_idx")
    if attention:
        raise WidefieldError(
            f"this is a hybrid with attention in layers {attention} (attn_layer_idx), which "
            "transformers has no class for: expected a model of Mamba or Mamba-2 layers only"
        )


def _check_fixed(options: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for name, only in fixed.items():
        if options.get(name, only) != only:
            raise WidefieldError(
                f"{where} says {name} {options[name]!r}, and transformers' Mamba has only {only!r}:"
                " this model cannot be loaded"
            )


def _mamba1(config: Mapping[str, Any], cell: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import MambaConfig

    return _made(MambaConfig, {**_shared(config), **_options(cell, _MAMBA1)})


def _mamba2(config: Mapping[str, Any], cell: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import Mamba2Config

    options = {**_shared(config), "n_groups": 1, **_options(cell, _MAMBA2, _FIXED_MAMBA2)}
    inner = options["hidden_size"] * _whole(cell, "expand", 2)
    width = _whole(cell, "headdim", 64)
    if inner % width:
        raise WidefieldError(
            f"headdim {width} does not divide the {inner} channels of d_model "
            f"{options['hidden_size']} into heads: expected a divisor"
        )
    return _made(Mamba2Config, {**options, "head_dim": width, "num_heads": inner // width})


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    multiple = _whole(config, "pad_vocab_size_multiple", 8)
    return {
        "vocab_size": math.ceil(_whole(config, "vocab_size", 50277) / multiple) * multiple,
        "hidden_size": _whole(config, "d_model"),
        "num_hidden_layers": _whole(config, "n_layer"),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        # <|endoftext|> of the tokenizer that all of these models were trained with.
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def _whole(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise WidefieldError(f"{name} is {value!r}: expected a whole number of at least 1")
    return value


def _options(
    cell: Mapping[str, Any], names: Mapping[str, str], checked: Iterable[str] = ()
) -> dict[str, Any]:
    """Options of the layer under transformers' names.

    Args:
        cell: `ssm_cfg`.
        names: the authors' name → transformers' name.
        checked: options that were looked at before.
    """
    known = {"layer", *_WITHOUT_EFFECT, *names, *checked}
    for name in cell:
        if name not in known:
            raise unknown("option in ssm_cfg", name, known)
    return {theirs: cell[ours] for ours, theirs in names.items() if ours in cell}


def _made(kind: type[PreTrainedConfig], options: dict[str, Any]) -> PreTrainedConfig:
    try:
        return kind(**options)
    # huggingface_hub's checks raise a class of their own, with the field on its last line.
    except Exception as error:
        line = " ".join(str(error).split())
        raise WidefieldError(f"transformers refuses these options: {line}") from error

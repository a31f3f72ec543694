"""Small checkpoints as the authors of Mamba write them, and the model they mean, in plain torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

Tensors = dict[str, Tensor]

# The config.json of state-spaces/mamba-130m and of state-spaces/mamba2-130m, scaled down.
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 370,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    },
    "mamba2": {
        "d_model": 64,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 370,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
}
KINDS = tuple(CONFIGS)


def reference(kind: str) -> Any:
    """The transformers model of one of `CONFIGS`, every option spelt out, with random weights."""
    return copy.deepcopy(_reference(kind))


@cache
def _reference(kind: str) -> Any:
    torch.manual_seed(11)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "mamba":
        model: Any = MambaForCausalLM(
            MambaConfig(
                vocab_size=376, hidden_size=32, num_hidden_layers=2, state_size=16,
                time_step_rank=2, tie_word_embeddings=True, **ends,
            )
        )  # fmt: skip
    else:
        model = Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=384, hidden_size=64, num_hidden_layers=2, state_size=128, n_groups=1,
                head_dim=64, num_heads=2, tie_word_embeddings=True, **ends,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return model.eval()


def tensors_of(kind: str) -> Tensors:
    """The tensors of `reference(kind)` under the authors' names, the tied head among them."""
    tensors = {name: tensor.detach() for name, tensor in reference(kind).state_dict().items()}
    embedding = tensors.pop("backbone.embeddings.weight")
    return {**tensors, "backbone.embedding.weight": embedding, "lm_head.weight": embedding}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4))


def write_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def write_old_bin(folder: Path, tensors: Tensors) -> None:
    """The format of torch before 1.6, which cannot be mapped."""
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_safetensors(folder: Path, tensors: Tensors) -> None:
    save_file(untied(tensors), folder / "model.safetensors", {"format": "pt"})


def write_sharded_bin(folder: Path, tensors: Tensors) -> None:
    write_shards(folder, tensors, "pytorch_model.bin", torch.save)


def write_sharded_safetensors(folder: Path, tensors: Tensors) -> None:
    write_shards(folder, untied(tensors), "model.safetensors", save_file)


def write_shards(
    folder: Path, tensors: Tensors, name: str, save: Callable[[Tensors, Path], None]
) -> None:
    stem, suffix = name.split(".")
    names = sorted(tensors)
    homes = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}-{number:05d}-of-00002.{suffix}"
        save({key: tensors[key] for key in part}, folder / shard)
        homes |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": homes}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


def untied(tensors: Tensors) -> Tensors:
    """Without the tied head: safetensors keeps no two names of one tensor."""
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


WRITERS = (
    write_bin,
    write_old_bin,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)


def write_original(
    folder: Path, kind: str, write: Callable[[Path, Tensors], None] = write_bin
) -> Path:
    """A whole checkpoint."""
    write_config(folder, CONFIGS[kind])
    write(folder, tensors_of(kind))
    return folder


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu of the causal convolution of (L, D) with a filter of K taps a channel."""
    taps = weight.shape[-1]
    padded = F.pad(x.T, (taps - 1, 0)).unfold(1, taps, 1)
    return F.silu((padded * weight).sum(-1).T + bias)


def mamba_layer(u: Tensor, w: Tensors) -> Tensor:
    x, z = (u @ w["in_proj.weight"].T).chunk(2, dim=-1)
    x = convolved(x, w["conv1d.weight"], w["conv1d.bias"])
    rank, states = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
    low, B, C = (x @ w["x_proj.weight"].T).split([rank, states, states], dim=-1)
    delta = F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    h, ys = torch.zeros_like(w["A_log"]), []
    for t in range(len(u)):
        decay = torch.exp(delta[t, :, None] * -torch.exp(w["A_log"]))
        h = decay * h + (delta[t] * x[t])[:, None] * B[t]
        ys.append(h @ C[t] + w["D"] * x[t])
    return (torch.stack(ys) * F.silu(z)) @ w["out_proj.weight"].T


def mamba2_layer(u: Tensor, w: Tensors) -> Tensor:
    heads, inner = len(w["A_log"]), w["out_proj.weight"].shape[1]
    states = (w["conv1d.bias"].shape[0] - inner) // 2
    z, xBC, dt = (u @ w["in_proj.weight"].T).split([inner, inner + 2 * states, heads], dim=-1)
    xBC = convolved(xBC, w["conv1d.weight"], w["conv1d.bias"])
    x, B, C = xBC.split([inner, states, states], dim=-1)
    x = x.view(len(u), heads, -1)
    delta = F.softplus(dt + w["dt_bias"])
    decay = torch.exp(delta * -torch.exp(w["A_log"]))
    S, ys = torch.zeros(*x.shape[1:], states, dtype=u.dtype), []
    for t in range(len(u)):
        S = decay[t, :, None, None] * S + (delta[t, :, None] * x[t])[..., None] * B[t]
        ys.append(S @ C[t] + w["D"][:, None] * x[t])
    y = torch.stack(ys).flatten(1) * F.silu(z)
    return rms(y, w["norm.weight"]) @ w["out_proj.weight"].T


def oracle(kind: str, ids: Tensor) -> Tensor:
    """Logits (L, vocabulary), float64, of ids (L,), by the equations of the papers."""
    weights = {name: tensor.double() for name, tensor in tensors_of(kind).items()}
    layer = {"mamba": mamba_layer, "mamba2": mamba2_layer}[kind]
    h = weights["backbone.embedding.weight"][ids]
    for i in range(CONFIGS[kind]["n_layer"]):
        prefix = f"backbone.layers.{i}."
        own = {n.removeprefix(f"{prefix}mixer."): t for n, t in weights.items()}
        h = h + layer(rms(h, weights[f"{prefix}norm.weight"]), own)
    return rms(h, weights["backbone.norm_f.weight"]) @ weights["lm_head.weight"].T

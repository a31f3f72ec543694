"""The whole models that `benchmarks.run` times: random weights, and who can run them."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

import widefield as wf
from benchmarks._ops import ROOM, Verdict, error
from widefield import ops

VOCABULARY = 50_280  # a multiple of 8, as mamba-ssm pads it
CALIBRATED_AT = 256
POOL_LAYER = 12
CHECKED = 1000
NEW_TOKENS, SHORT = 64, 8  # timed, and generated before them
PROMPT = 16
STEPS = 16  # of decoding, whose logits are judged
_SMALL = {"hidden_size": 768, "num_hidden_layers": 24}
_MAMBA2 = {"state_size": 128, "head_dim": 64, "n_groups": 1, "chunk_size": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "mamba-130m": _SMALL | {"state_size": 16},
    "mamba2-130m": _SMALL | _MAMBA2 | {"num_heads": 24},
    "mamba2-2.7b": _MAMBA2 | {"hidden_size": 2560, "num_hidden_layers": 64, "num_heads": 80},
}
METHODS = {"longmamba-130m": "mamba-130m", "decimamba-130m": "mamba-130m"}
"""Mamba-130m with a method on; nobody else runs these."""
NAMES = (*SHAPES, *METHODS)


@dataclass(frozen=True)
class Side:
    """One way to run a model.

    Attributes:
        name: as the rows call it.
        prefill: ids (1, L) to the logits of the last token; None where another side does the same.
        decode: prompt ids (B, L) to the ids with so many more; None where another side does.
        steps: ids (B, L) to the logits (B, `STEPS`, V) of the last ones, each in a decode step of
            its own; None where `decode` must give the tokens of the first side instead.
        during: what must hold while it runs a task, "prefill" or "decode".
        ours: whether it must be exact to be timed at all.
    """

    name: str
    prefill: Callable[[Tensor], Tensor] | None
    decode: Callable[[Tensor, int], Tensor] | None
    steps: Callable[[Tensor], Tensor] | None
    during: Callable[[str], AbstractContextManager[Any]]
    ours: bool = True


def build(name: str, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A model of transformers in eval mode, weights drawn on the device.

    Drawn as wide as transformers does by default (0.1), a deep Mamba is chaotic: in bfloat16 any
    two correct implementations differ by 70 % in its logits, and nothing could be judged by them.
    """
    shape = SHAPES[METHODS.get(name, name)]
    torch.manual_seed(seed)
    with torch.device(device):
        common: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
        }
        if "num_heads" in shape:
            model: Any = Mamba2ForCausalLM(Mamba2Config(**common, **shape))
        else:
            model = MambaForCausalLM(MambaConfig(**common, **shape))
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def hf_prefill(model: Any, ids: Tensor) -> Tensor:
    return model(ids, logits_to_keep=1, use_cache=True).logits[:, -1]


def hf_decode(model: Any, prompt: Tensor, tokens: int, **options: Any) -> Tensor:
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens,
        min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options,
    )  # fmt: skip


def hf_steps(model: Any, ids: Tensor) -> Tensor:
    start = ids.shape[1] - STEPS
    cache = model(ids[:, :start], logits_to_keep=1, use_cache=True).cache_params
    return torch.cat(
        [
            model(ids[:, t : t + 1], cache_params=cache, use_cache=True).logits
            for t in range(start, ids.shape[1])
        ],
        dim=1,
    )


@contextmanager
def plain_torch() -> Iterator[None]:
    """Stock transformers without anybody's kernels, also where mamba-ssm is installed."""
    changed = [
        (module, name, function)
        for module in (modeling_mamba, modeling_mamba2)
        for name, function in vars(module).items()
        if name.startswith(("mamba", "causal_conv1d")) and hasattr(function, "__wrapped__")
    ]
    for module, name, function in changed:
        setattr(module, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for module, name, function in changed:
            setattr(module, name, function)


@contextmanager
def untuned() -> Iterator[None]:
    """mamba-ssm's kernels for a prompt of Mamba-2, each in the smallest of its configurations.

    Tuning them takes longer than a minute, and no decode step runs them.
    """
    importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    modules = [m for n, m in sys.modules.items() if n.startswith("mamba_ssm.ops.triton.ssd_")]
    found = {id(k): k for m in modules for k in vars(m).values() if hasattr(k, "configs")}
    before = [(kernel, kernel.configs) for kernel in found.values()]
    for kernel, configs in before:
        kernel.configs = [min(configs, key=lambda config: math.prod(config.kwargs.values()))]
    try:
        yield
    finally:
        for kernel, configs in before:
            kernel.configs = configs


def method_of(name: str, model: Any, seed: int) -> wf.LongMamba | wf.DeciMamba:
    """LongMamba of a calibration on random tokens; DeciMamba as published, one pool half-way."""
    if name == "decimamba-130m":
        return wf.DeciMamba(layers=(POOL_LAYER,), base_length=2000)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (2, CALIBRATED_AT), generator=generator)
    return wf.LongMamba(wf.calibrate(model, ids, train_length=CALIBRATED_AT))


def sides(name: str, model: Any, backends: list[str], seed: int) -> list[Side]:
    """Everybody who can run this model here, ours first."""
    methods = (method_of(name, model, seed),) if name in METHODS else ()
    found = [_ours(model, methods, backend) for backend in backends]
    if model.device.type == "cuda" and name not in METHODS:
        found.append(_graphed(found[0]))
    if model.device.type == "cuda" and name != "decimamba-130m":
        found.append(_recorded(_twin(model, methods)))
    if name in METHODS:
        return found
    if importlib.util.find_spec("mamba_ssm") is not None and model.device.type == "cuda":
        found.append(_mamba_ssm(name, model))
        found.append(_stock(model, "transformers with mamba-ssm", _with_mamba_ssm))
    found.append(_stock(model, "transformers", lambda task: plain_torch()))
    return found


def _twin(model: Any, methods: tuple[Any, ...]) -> Any:
    """A twin that stays extended, with the same weights."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return wf.extend(copy.deepcopy(model, shared), *methods)


def _ours(model: Any, methods: tuple[Any, ...], backend: str) -> Side:
    own = _twin(model, methods)

    def during(task: str) -> AbstractContextManager[Any]:
        return nullcontext() if backend == "default" else ops.use_backend(backend)  # type: ignore[arg-type]

    name = "widefield" if backend == "default" else f"widefield {backend}"
    return Side(name, *_of_transformers(own), during)


def _of_transformers(model: Any) -> tuple[Any, Any, Any]:
    """Prefill, decode and steps."""
    prefill, decode = functools.partial(hf_prefill, model), functools.partial(hf_decode, model)
    return prefill, decode, functools.partial(hf_steps, model)


def _recorded(model: Any) -> Side:
    """A prefill in one chunk that is recorded at the first call and replayed by the others."""

    def prefill(ids: Tensor) -> Tensor:
        return wf.prefill(model, ids, chunk_size=ids.shape[1], cuda_graph=True).logits[:, -1]

    return Side("widefield recorded", prefill, None, None, lambda task: nullcontext())


def _graphed(side: Side) -> Side:
    """The same side, decoding through a CUDA graph."""
    options: dict[str, Any] = {"cuda_graph": True}
    assert side.decode is not None
    decode = functools.partial(side.decode, **options)
    return replace(side, name=f"{side.name} graph", prefill=None, decode=decode, steps=None)


def _stock(model: Any, name: str, during: Callable[[str], AbstractContextManager[Any]]) -> Side:
    return Side(name, *_of_transformers(model), during, ours=False)


def _with_mamba_ssm(task: str) -> AbstractContextManager[Any]:
    return untuned() if task == "decode" else nullcontext()


def _mamba_ssm(name: str, model: Any) -> Side:
    """mamba-ssm's own model with the same weights and its own defaults: fused norms, graphs."""
    peer: Any = None

    def loaded() -> Any:
        nonlocal peer
        if peer is None:
            peer = peer_model(name, model)
        return peer

    def prefill(ids: Tensor) -> Tensor:
        return loaded()(ids, num_last_tokens=1).logits[:, -1]

    def decode(prompt: Tensor, tokens: int) -> Tensor:
        length = prompt.shape[1] + tokens
        return loaded().generate(input_ids=prompt, max_length=length, cg=True, top_k=1)

    def steps(ids: Tensor) -> Tensor:
        return peer_steps(loaded(), ids)

    return Side("mamba-ssm", prefill, decode, steps, _with_mamba_ssm, ours=False)


def peer_steps(peer: Any, ids: Tensor) -> Tensor:
    from mamba_ssm.utils.generation import InferenceParams  # type: ignore[import-not-found]

    batch, length = ids.shape
    state = InferenceParams(max_seqlen=length, max_batch_size=batch)
    start, found = length - STEPS, []
    for part in (slice(0, start), *(slice(t, t + 1) for t in range(start, length))):
        found.append(peer(ids[:, part], inference_params=state, num_last_tokens=1).logits)
        state.seqlen_offset = part.stop
    return torch.cat(found[1:], dim=1)


def peer_model(name: str, model: Any) -> Any:
    """mamba-ssm's model of a model of transformers, weights shared."""
    from mamba_ssm.models.config_mamba import (  # type: ignore[import-not-found]
        MambaConfig as PeerConfig,
    )
    from mamba_ssm.models.mixer_seq_simple import (  # type: ignore[import-not-found]
        MambaLMHeadModel,
    )

    shape = SHAPES[name]
    layer = {"layer": "Mamba2", "d_state": 128, "headdim": 64} if "num_heads" in shape else {}
    config = PeerConfig(
        d_model=shape["hidden_size"], n_layer=shape["num_hidden_layers"], vocab_size=VOCABULARY,
        ssm_cfg=layer,
    )  # fmt: skip
    peer = MambaLMHeadModel(config, device=model.device, dtype=model.dtype)
    weights = {k.replace("embeddings.", "embedding."): v for k, v in model.state_dict().items()}
    peer.load_state_dict(weights, assign=True)
    peer.tie_weights()
    return peer.eval()


def prompt_of(tokens: int, device: torch.device, seed: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, tokens), generator=generator).to(device)


class Judge:
    """Holds the sides of a model against the stock model in float64.

    Args:
        name: of the model.
        model: stock, in the dtype that is timed.
        task: "prefill": the logits behind `CHECKED` tokens. "decode": those of `STEPS` decode
            steps, or, of a side that has none to show, the tokens of the first side.
        batch: sequences.
        seed: of weights and tokens.
    """

    def __init__(self, name: str, model: Any, task: str, batch: int, seed: int) -> None:
        self.task = task
        self.run = hf_prefill if task == "prefill" else hf_steps
        tokens = CHECKED if task == "prefill" else PROMPT + STEPS
        self.ids = prompt_of(tokens, model.device, seed, batch)
        exact = build(name, torch.float64, model.device, seed)
        exact.load_state_dict(model.state_dict())
        with plain_torch(), torch.inference_mode():
            self.truth = self.run(exact, self.ids).double()
            self.allowed = 2 * error(self.run(model, self.ids), self.truth) + ROOM

    def verdict(self, side: Side, first: Side) -> Verdict:
        """The error of its logits, or the share of its tokens that the first side has not."""
        run = side.prefill if self.task == "prefill" else side.steps
        with side.during(self.task), torch.inference_mode():
            if run is not None:
                return Verdict("logits", error(run(self.ids), self.truth), self.allowed)
            assert side.decode is not None and first.decode is not None
            tokens, expected = (
                decode(self.ids, NEW_TOKENS) for decode in (side.decode, first.decode)
            )
            return Verdict("tokens", float((tokens != expected).double().mean()), 0.0)

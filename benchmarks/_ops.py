"""The ops that `benchmarks.run` times: inputs, references, and who can run them."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from widefield import ops
from widefield.ops.causal_conv1d import reference as conv_reference
from widefield.ops.rms_norm import reference as norm_reference
from widefield.ops.selective_scan import reference as scan_reference
from widefield.ops.ssd import reference as ssd_reference
from widefield.ops.state_update import reference as step_reference
from widefield.plan import LayerPlan, ScanInputs, SSDInputs

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], tuple[Tensor, ...]]

CHECKED, CHECKED_BACKWARD, CHECKED_WIDE = 1000, 320, 40  # tokens
CACHE = 128 << 20  # bytes of inputs in turn, more than a GPU's cache holds
DRIFT = 1e-5  # of a float32 state over any number of tokens; a wrong one is off by far more
ROOM = 3e-7  # what two roundings of float32 may differ by, where the reference is exact


@dataclass(frozen=True)
class Side:
    """One implementation of an op.

    Attributes:
        name: as the rows call it.
        run: from its own layout of the inputs to its own outputs.
        turned: inputs (and outputs) that it wants as (batch, channels, length).
        ours: whether it must be exact to be timed at all.
    """

    name: str
    run: Run
    turned: tuple[str, ...] = ()
    ours: bool = True

    def inputs(self, tensors: Tensors) -> Tensors:
        """The inputs as it wants them, made before the clock runs."""
        return {k: self.turn(k, t).contiguous() if self.turns(k) else t for k, t in tensors.items()}

    def turns(self, name: str) -> bool:
        """Whether it wants a tensor the other way round."""
        return name in self.turned

    def turn(self, name: str, tensor: Tensor) -> Tensor:
        """From channels-last to its own layout, or back."""
        return tensor.transpose(1, 2) if self.turns(name) else tensor


@dataclass(frozen=True)
class Op:
    """An op at one shape.

    Attributes:
        name: as `--ops` and the rows call it.
        inputs: (batch, tokens, dtype, generator) to tensors, channels-last.
        outputs: names of what a run returns.
        reference: plain torch.
        sides: those that can run on a device.
        shape: of the layer, for the rows.
        lengths: tokens by default.
        batch: sequences.
        backward: whether gradients are part of it.
        dtype: of x and all that is as long.
    """

    name: str
    inputs: Callable[[int, int, torch.dtype, torch.Generator], Tensors]
    outputs: tuple[str, ...]
    reference: Run
    sides: Callable[[], list[Side]]
    shape: Mapping[str, int]
    lengths: tuple[int, ...]
    batch: int = 1
    backward: bool = False
    dtype: torch.dtype = torch.bfloat16


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _drawn(generator: torch.Generator, dtype: torch.dtype) -> Callable[..., Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)

    return normal


def _scan_inputs(
    channels: int, states: int, batch: int, tokens: int, dtype: torch.dtype, g: torch.Generator
) -> Tensors:
    """The views that a model's projections give; Δ about 0.05 as in a trained model."""
    normal = _drawn(g, dtype)
    rank = channels // 32
    projected = normal(batch, tokens, rank + 2 * states)
    rates = torch.arange(1, states + 1, device=g.device, dtype=torch.float32)
    return {
        "x": normal(batch, tokens, channels),
        "delta": normal(batch, tokens, channels) - 3,
        "A": -rates.expand(channels, states).contiguous(),
        "B": projected[..., rank : rank + states],
        "C": projected[..., rank + states :],
        "D": torch.ones(channels, device=g.device),
        "z": normal(batch, tokens, 2 * channels)[..., channels:],
        "delta_bias": torch.zeros(channels, device=g.device),
    }


def _ssd_inputs(
    heads: int, width: int, groups: int, states: int, batch: int, tokens: int, dtype: torch.dtype,
    g: torch.Generator,
) -> Tensors:  # fmt: skip
    normal = _drawn(g, dtype)
    inner, shared = heads * width, groups * states
    mixed = normal(batch, tokens, inner + 2 * shared)
    return {
        "x": mixed[..., :inner].unflatten(-1, (heads, width)),
        "delta": normal(batch, tokens, heads) - 3,
        "A": -torch.linspace(1, 16, heads, device=g.device),
        "B": mixed[..., inner : inner + shared].unflatten(-1, (groups, states)),
        "C": mixed[..., inner + shared :].unflatten(-1, (groups, states)),
        "D": torch.ones(heads, device=g.device),
        "delta_bias": torch.zeros(heads, device=g.device),
    }


def _conv_inputs(
    channels: int, batch: int, tokens: int, dtype: torch.dtype, g: torch.Generator
) -> Tensors:
    normal = _drawn(g, dtype)
    return {
        "x": normal(batch, tokens, 2 * channels)[..., :channels],
        "weight": normal(channels, 4) / 2,
        "bias": normal(channels),
    }


def _norm_inputs(
    width: int, gated: bool, batch: int, tokens: int, dtype: torch.dtype, g: torch.Generator
) -> Tensors:
    normal = _drawn(g, dtype)
    found = {"x": normal(batch, tokens, width)}
    if gated:
        found["gate"] = normal(batch, tokens, 2 * width)[..., :width]
    return found | {"weight": 1 + normal(width) / 4}


def _step_inputs(make: Callable[..., Tensors], state: tuple[int, ...], *args: Any) -> Tensors:
    batch, _, dtype, g = args
    tensors = {k: t[:, 0] if t.ndim > 2 else t for k, t in make(batch, 1, dtype, g).items()}
    return tensors | {"state": torch.randn(batch, *state, generator=g, device=g.device)}


def _with_floor(make: Callable[..., Tensors], channels: int, *args: Any) -> Tensors:
    """LongMamba's floor on half of the channels, high enough to drop most tokens there."""
    tensors = make(*args)
    floor = torch.zeros(channels, device=tensors["x"].device)
    floor[::2] = 0.1
    return tensors | {"floor": floor}


def _planned(scan: Any, kind: type, t: Tensors) -> tuple[Tensor, ...]:
    plan = LayerPlan(delta_floor=t["floor"]) if "floor" in t else None
    return scan(kind(**{k: v for k, v in t.items() if k != "floor"}), plan)


def _stepped(step: Any, t: Tensors) -> tuple[Tensor, ...]:
    state = t["state"].clone()
    return step(state, **{k: v for k, v in t.items() if k != "state"}), state


def _step_in_place(step: Any, t: Tensors) -> tuple[Tensor, ...]:
    return step(**t), t["state"]


def _mamba_ssm_scan(t: Tensors) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.selective_scan_interface import (  # type: ignore[import-not-found]
        selective_scan_fn,
    )

    return selective_scan_fn(
        t["x"], t["delta"], t["A"], t["B"], t["C"], t["D"], z=t["z"], delta_bias=t["delta_bias"],
        delta_softplus=True, return_last_state=True,
    )  # fmt: skip


def _mamba_ssm_ssd(t: Tensors) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.triton.ssd_combined import (  # type: ignore[import-not-found]
        mamba_chunk_scan_combined,
    )

    return mamba_chunk_scan_combined(
        t["x"], t["delta"], t["A"], t["B"], t["C"], 256, D=t["D"], dt_bias=t["delta_bias"],
        dt_softplus=True, return_final_states=True,
    )  # fmt: skip


def _mamba_ssm_step(t: Tensors) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.triton.selective_state_update import (  # type: ignore[import-not-found]
        selective_state_update,
    )

    wide = t
    if t["x"].ndim == 3:
        width, states = t["state"].shape[-2:]
        wide = t | {
            "delta": t["delta"][..., None].expand(-1, -1, width),
            "A": t["A"][:, None, None].expand(-1, width, states),
            "D": t["D"][:, None].expand(-1, width),
            "delta_bias": t["delta_bias"][:, None].expand(-1, width),
        }
    y = selective_state_update(
        wide["state"], wide["x"], wide["delta"], wide["A"], wide["B"], wide["C"], wide["D"],
        z=wide.get("z"), dt_bias=wide["delta_bias"], dt_softplus=True,
    )  # fmt: skip
    return y, wide["state"]


def _normed(norm: Any, t: Tensors) -> tuple[Tensor, ...]:
    return (norm(*t.values(), 1e-5),)


def _mamba_ssm_norm(t: Tensors) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn  # type: ignore[import-not-found]

    return (rms_norm_fn(t["x"], t["weight"], None, eps=1e-5),)


def _mamba_ssm_gated_norm(t: Tensors) -> tuple[Tensor, ...]:
    from mamba_ssm.ops.triton.layernorm_gated import (  # type: ignore[import-not-found]
        rmsnorm_fn,
    )

    norm = {"z": t["gate"], "eps": 1e-5, "norm_before_gate": False}
    return (rmsnorm_fn(t["x"], t["weight"], None, **norm),)


def _causal_conv1d(t: Tensors) -> tuple[Tensor, ...]:
    from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]

    return (causal_conv1d_fn(t["x"], t["weight"], t["bias"], activation="silu"),)


def _with_backend(run: Run, backend: str) -> Run:
    def chosen(tensors: Tensors) -> tuple[Tensor, ...]:
        with ops.use_backend(backend):  # type: ignore[arg-type]
            return run(tensors)

    return chosen


def _our_sides(run: Run, backends: Sequence[str]) -> list[Side]:
    found = [Side("widefield", run)] if "default" in backends else []
    named = [b for b in backends if b != "default"]
    return found + [Side(f"widefield {b}", _with_backend(run, b)) for b in named]


def _sides(run: Run, backends: Sequence[str], peer: Side | None, package: str) -> list[Side]:
    there = peer is not None and _has(package)
    return _our_sides(run, backends) + ([peer] if there and peer is not None else [])


def all_ops(backends: Sequence[str]) -> list[Op]:
    """Every op at the shapes of Mamba-130m and -2.8b, Mamba2-130m and -2.7b and Nemotron-H-8b.

    Args:
        backends: "default" for the one that the op chooses, or names of `ops.use_backend`.
    """
    return [
        *_scans(backends), *_ssds(backends), _conv(backends), *_steps(backends), *_norms(backends),
    ]  # fmt: skip


LONG = (8192, 65_536, 524_288)
Trained = Mapping[str, tuple[int, int]]
"""End of a name → tokens and sequences of a training batch."""


def _scans(backends: Sequence[str]) -> list[Op]:
    wide = _scan_of("scan", 1536, torch.bfloat16, {"": (2048, 64)}, backends)
    narrow = _scan_of("scan-512", 512, torch.float32, {"": (1024, 128)}, backends)
    wider = _scan_of("scan-5120", 5120, torch.bfloat16, {}, backends)
    # mamba-ssm counts elements in 32 bits: no more of them than it can.
    return wide + narrow + [replace(op, lengths=LONG[:2]) for op in wider]


def _scan_of(
    name: str, channels: int, dtype: torch.dtype, trained: Trained, backends: Sequence[str]
) -> list[Op]:
    """A width of the scan of Mamba: long rows, with a floor, many rows, and many with gradients."""
    turned = ("x", "delta", "B", "C", "z", "y")
    peer = Side("mamba-ssm", _mamba_ssm_scan, turned, ours=False)
    plain = Op(
        name=name,
        inputs=functools.partial(_scan_inputs, channels, 16),
        outputs=("y", "state"),
        reference=functools.partial(_planned, scan_reference.selective_scan, ScanInputs),
        sides=functools.partial(
            _sides, functools.partial(_planned, ops.selective_scan, ScanInputs), backends, peer,
            "mamba_ssm",
        ),
        shape={"channels": channels, "states": 16},
        lengths=LONG,
        dtype=dtype,
    )  # fmt: skip
    return _with_variants(plain, channels, trained)


def _with_variants(plain: Op, channels: int, trained: Trained) -> list[Op]:
    """An op, the same with a floor, and on batches as in training: forward, and with gradients.

    Args:
        plain: the op.
        channels: or heads, which a floor has one number for.
        trained: the batches.
    """
    floor = functools.partial(_with_floor, plain.inputs, channels)
    found = [
        plain,
        replace(plain, name=f"{plain.name}-floor", inputs=floor, sides=_only_ours(plain)),
    ]
    for end, (tokens, batch) in trained.items():
        many = replace(plain, name=f"{plain.name}-many{end}", lengths=(tokens,), batch=batch)
        found += [many, replace(many, name=f"{plain.name}-backward{end}", backward=True)]
    return found


def _only_ours(op: Op) -> Callable[[], list[Side]]:
    """Nobody else has a floor."""
    return lambda: [side for side in op.sides() if side.ours]


def _ssds(backends: Sequence[str]) -> list[Op]:
    found = []
    peer = Side("mamba-ssm", _mamba_ssm_ssd, ours=False)
    ours = functools.partial(_planned, ops.ssd, SSDInputs)
    batches: dict[str, Trained] = {
        "130m": {"-64": (2048, 64), "-8": (2048, 8), "-1": (65_536, 1)},
        "2.7b": {"-4": (2048, 4)},
        "nemotron": {"-4": (2048, 4)},
    }
    for size, heads, groups in (("130m", 24, 1), ("2.7b", 80, 1), ("nemotron", 128, 8)):
        plain = Op(
            name=f"ssd-{size}",
            inputs=functools.partial(_ssd_inputs, heads, 64, groups, 128),
            outputs=("y", "state"),
            reference=functools.partial(_planned, ssd_reference.ssd, SSDInputs),
            sides=functools.partial(_sides, ours, backends, peer, "mamba_ssm"),
            shape={"heads": heads, "width": 64, "states": 128, "groups": groups},
            lengths=LONG,
        )
        found += _with_variants(plain, heads, batches[size])
    return found


def _conv(backends: Sequence[str]) -> Op:
    def run(convolve: Any, t: Tensors) -> tuple[Tensor, ...]:
        return (convolve(t["x"], t["weight"], t["bias"])[0],)

    peer = Side("causal-conv1d", _causal_conv1d, ("x", "y"), ours=False)
    return Op(
        name="conv",
        inputs=functools.partial(_conv_inputs, 1536),
        outputs=("y",),
        reference=functools.partial(run, conv_reference.causal_conv1d),
        sides=functools.partial(
            _sides, functools.partial(run, ops.causal_conv1d), backends, peer, "causal_conv1d"
        ),
        shape={"channels": 1536, "taps": 4},
        lengths=LONG,
    )


def _steps(backends: Sequence[str]) -> list[Op]:
    found = []
    peer = Side("mamba-ssm", _mamba_ssm_step, ours=False)
    kinds = (
        ("scan-step", functools.partial(_scan_inputs, 1536, 16), (1536, 16),
         ops.selective_state_update, step_reference.selective_state_update),
        ("ssd-step", functools.partial(_ssd_inputs, 24, 64, 1, 128), (24, 64, 128),
         ops.ssd_state_update, step_reference.ssd_state_update),
    )  # fmt: skip
    for name, make, state, step, reference in kinds:
        for batch in (1, 128):
            ours = functools.partial(_step_in_place, step)
            found.append(
                Op(
                    name=name if batch == 1 else f"{name}-{batch}",
                    inputs=functools.partial(_step_inputs, make, state),
                    outputs=("y", "state"),
                    reference=functools.partial(_stepped, reference),
                    sides=functools.partial(_sides, ours, backends, peer, "mamba_ssm"),
                    shape={"states": state[-1]},
                    lengths=(1,),
                    batch=batch,
                )
            )
    return found


def _norms(backends: Sequence[str]) -> list[Op]:
    """Forward and backward of the block's norm, and of Mamba-2's gated one."""
    width = {"norm": 768, "gated-norm": 1536}
    found = []
    for name, ours, plain, peer in (
        ("norm", ops.rms_norm, norm_reference.rms_norm, _mamba_ssm_norm),
        ("gated-norm", ops.gated_rms_norm, norm_reference.gated_rms_norm, _mamba_ssm_gated_norm),
    ):
        side = Side("mamba-ssm", peer, ours=False)
        normed = functools.partial(_normed, ours)
        found.append(
            Op(
                name=f"{name}-backward",
                inputs=functools.partial(_norm_inputs, width[name], name != "norm"),
                outputs=("y",),
                reference=functools.partial(_normed, plain),
                sides=functools.partial(_sides, normed, backends, side, "mamba_ssm"),
                shape={"width": width[name]},
                lengths=(65_536,),
                backward=True,
            )
        )
    return found


def runner(op: Op, side: Side) -> Run:
    """A run of a side on inputs in its layout: outputs, or outputs and gradients."""
    return _with_gradients(side) if op.backward else side.run


def _with_gradients(side: Side) -> Run:
    def run(tensors: Tensors) -> tuple[Tensor, ...]:
        leaves = {k: t for k, t in tensors.items() if k != "dy"}
        outputs = side.run(leaves)
        return (*outputs, *torch.autograd.grad(outputs[0], list(leaves.values()), tensors["dy"]))

    return run


def prepared(op: Op, side: Side, tensors: Tensors, dy: Tensor | None) -> Tensors:
    """Inputs in the layout of a side; with gradients, leaves of their own and that of y."""
    own = side.inputs(tensors)
    if not op.backward:
        return {k: t.clone() if k == "state" else t for k, t in own.items()}
    assert dy is not None
    leaves = {k: t.detach().requires_grad_() for k, t in own.items()}
    return leaves | {"dy": side.turn("y", dy).contiguous()}


def weights_of(op: Op, tensors: Tensors, generator: torch.Generator) -> Tensor | None:
    """A gradient of y, the same for every side."""
    if not op.backward:
        return None
    return torch.randn(
        tensors["x"].shape, generator=generator, device=generator.device, dtype=tensors["x"].dtype
    )


def named(op: Op, side: Side, tensors: Tensors, outputs: Sequence[Tensor]) -> Tensors:
    """Outputs and gradients by name, channels-last again."""
    gradients = [f"d{k}" for k in tensors if k != "dy"] if op.backward else []
    names = [*op.outputs, *gradients]
    return {
        name: side.turn(name.removeprefix("d") if name in gradients else name, value)
        for name, value in zip(names, outputs, strict=True)
    }


def _double(tensors: Tensors) -> Tensors:
    return {k: t.double() for k, t in tensors.items()}


def error(value: Tensor, truth: Tensor) -> float:
    """Norm-wise and relative."""
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))


@dataclass(frozen=True)
class Verdict:
    """How far a side is off the truth, beside what it may be.

    Attributes:
        worst: name of the output nearest to (or furthest beyond) what is allowed.
        error: of that output.
        allowed: twice the error of the reference in the inputs' own dtype.
    """

    worst: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        """False for a NaN, too."""
        return self.error <= self.allowed

    @property
    def excess(self) -> float:
        """The error as a multiple of what is allowed; infinite for a NaN."""
        return math.inf if math.isnan(self.error) else self.error / self.allowed

    def told(self) -> str:
        """What is wrong, on one line."""
        return f"{self.worst} is off by {self.error:.2e}, allowed {self.allowed:.2e}: not timed"


class Judge:
    """Holds an op's sides against the reference in float64, on inputs that are drawn once.

    Args:
        op: checked at its own batch, since which kernel runs depends on it; with gradients, of
            which autograd keeps a state a token, once so and short, and once long in a row alone.
        device: where.
        seed: of the inputs.
    """

    def __init__(self, op: Op, device: torch.device, seed: int) -> None:
        longest = max(op.lengths)
        shapes = [(op.batch, min(CHECKED, longest))]
        if op.backward:
            shapes = [(op.batch, min(CHECKED_WIDE, longest)), (1, min(CHECKED_BACKWARD, longest))]
        self.rounds = [_Round(op, *shape, device, seed) for shape in shapes]

    def verdict(self, side: Side) -> Verdict:
        """The output that is worst off."""
        return _worst([verdict for a_round in self.rounds for verdict in a_round.verdicts(side)])


class _Round:
    """One shape of a `Judge`."""

    def __init__(self, op: Op, batch: int, tokens: int, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.op = op
        self.tensors = op.inputs(batch, tokens, op.dtype, generator)
        self.dy = weights_of(op, self.tensors, generator)
        plain = Side("reference", op.reference)
        dy = None if self.dy is None else self.dy.double()
        self.truth = self._run(plain, _double(self.tensors), dy)
        self.same = self._run(plain, self.tensors, self.dy)

    def _run(self, side: Side, tensors: Tensors, dy: Tensor | None) -> Tensors:
        own = prepared(self.op, side, tensors, dy)
        outputs = runner(self.op, side)(own)
        return {k: t.detach() for k, t in named(self.op, side, own, outputs).items()}

    def verdicts(self, side: Side) -> list[Verdict]:
        """One an output."""
        return _verdicts(self._run(side, self.tensors, self.dy), self.same, self.truth)


def _verdicts(found: Tensors, same: Tensors, truth: Tensors) -> list[Verdict]:
    return [
        Verdict(name, error(value, truth[name]), 2 * error(same[name], truth[name]) + ROOM)
        for name, value in found.items()
    ]


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    return max(verdicts, key=lambda verdict: verdict.excess)


@torch.no_grad()
def ends(op: Op, side: Side, tensors: Tensors) -> Verdict:
    """How exact a side of ours is where it is timed: the first and the last of many tokens.

    The last tokens are compared with a reference that starts from the state which the side itself
    reaches before them: that the state is right is what the same kernel's verdict at fewer tokens
    says. The final state then holds the roundings of two ways through all tokens, which a floor
    keeps for good: it is allowed `DRIFT`.
    """
    tokens = tensors["x"].shape[1]

    def part(which: slice) -> Tensors:
        return {
            k: t[:, which] if t.ndim > 2 and t.shape[1] == tokens else t for k, t in tensors.items()
        }

    y, *state = side.run(tensors)
    head = part(slice(0, CHECKED))
    found = _held(op, head, {"y": y[:, :CHECKED]})
    if state:
        before = side.run(part(slice(0, tokens - CHECKED)))[1]
        tail = part(slice(tokens - CHECKED, tokens)) | {"initial_state": before}
        last, final = _held(op, tail, {"y": y[:, -CHECKED:], "state": state[0]})
        found += [last, replace(final, allowed=max(final.allowed, DRIFT))]
    return _worst(found)


def _held(op: Op, tensors: Tensors, outputs: Tensors) -> list[Verdict]:
    truth = dict(zip(op.outputs, op.reference(_double(tensors)), strict=True))
    same = dict(zip(op.outputs, op.reference(tensors), strict=True))
    return _verdicts(outputs, same, truth)


def input_sets(op: Op, tokens: int, device: torch.device, seed: int) -> list[tuple[Tensors, Any]]:
    """As many sets of inputs as overflow the cache, so that none is read out of it."""
    found: list[tuple[Tensors, Any]] = []
    size = 0
    while not found or (size < CACHE and device.type == "cuda" and len(found) < 16):
        generator = torch.Generator(device).manual_seed(seed + len(found))
        tensors = op.inputs(op.batch, tokens, op.dtype, generator)
        found.append((tensors, weights_of(op, tensors, generator)))
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    return found

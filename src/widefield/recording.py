"""Prefill on a GPU by replaying a CUDA graph, where launching its kernels takes longest.

`wf.prefill(..., cuda_graph=True)` comes here for its chunks. All chunks of one length run the same
kernels on tensors of the same shapes: the first of them is recorded, and what was recorded is
replayed for all that follow, in this prompt and in later ones. What it reads and writes lies in
tensors of its own: tokens, states and plans are copied in, states and logits are copied out.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from widefield import decoding
from widefield.decoding import record, states_of
from widefield.errors import WidefieldError
from widefield.families import ChunkedPrefill, LayerCache, Padding, check_finite
from widefield.ops import forced_backend
from widefield.plan import LayerPlan
from widefield.prefilling import cache_name

__all__ = ["ChunkGraph", "GraphRefused", "Recordings"]

_KEPT = 8
_SHARE = 4  # recordings may hold one part in so many of a GPU's memory
_FIELDS = ("delta_floor", "delta_scale", "decay_scale")

Plans = dict[int, LayerPlan | None]
Key = tuple[Any, ...]


class GraphRefused(WidefieldError):
    """There can be no recording of a model's prefill, or none with these methods."""


def _refused(expected: str) -> GraphRefused:
    return GraphRefused(f"prefill(cuda_graph=True) needs {expected}; or leave cuda_graph out")


class Recordings:
    """The recorded chunks of one extended model, by what they were recorded for.

    A recording that is in use belongs to its user alone, so that two threads do not write into the
    same tensors. A copy of a model starts without any.
    """

    def __init__(self) -> None:
        """None yet."""
        self._free: list[tuple[Key, ChunkGraph]] = []
        self._model: _Snapshot | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        """None: a graph belongs to the tensors it was recorded with."""
        return Recordings()

    def __reduce__(self) -> tuple[Any, ...]:
        """None, either."""
        return Recordings, ()

    @contextmanager
    def replayed(
        self, model: Any, cache: Any, chunked: ChunkedPrefill, length: int
    ) -> Iterator[Replays]:
        """What is called in place of the model for the length of a prefill.

        Args:
            model: the extended model.
            cache: that is filled; holds all that was read when the block ends.
            chunked: the prefill at hand.
            length: tokens of the chunks that are replayed.

        Raises:
            WidefieldError: if a chunk cannot be recorded, and why.
        """
        needed = _what_is_needed(model)
        if needed is not None:
            raise _refused(needed)
        replays = Replays(self, self._current(model), model, cache, chunked, length)
        try:
            yield replays
        finally:
            replays.close()
        replays.check()

    def _current(self, model: Any) -> _Snapshot:
        """The model as it is; what was recorded before it changed is forgotten."""
        with self._lock:
            if self._model is None or not self._model.is_current(model):
                self._free, self._model = [], None
                needed = decoding.what_graph_needs(model)
                if needed is not None:
                    raise _refused(needed)
                self._model = _Snapshot(model)
            return self._model

    def take(self, key: Key) -> ChunkGraph | None:
        """A recording that nobody uses, if there is one of this key."""
        with self._lock:
            for index, (known, graph) in enumerate(self._free):
                if known == key:
                    del self._free[index]
                    return graph
        return None

    def give_back(self, key: Key, graph: ChunkGraph) -> None:
        """Keep a recording; the oldest go as long as all together are too many or too large."""
        room = _room(graph.device)
        with self._lock:
            if key[0] is self._model:
                self._free.append((key, graph))
            while self._free and (
                len(self._free) > _KEPT or sum(g.bytes for _, g in self._free) > room
            ):
                del self._free[0]


def _what_is_needed(model: Any) -> str | None:
    """What is in the way of a replay, whatever the model is, or None."""
    if torch.is_autocast_enabled(decoding._GPU):
        return "a forward outside torch.autocast: cast the model, e.g. model.bfloat16()"
    if model.widefield.observer is not None:
        return "a prefill that nobody observes"
    if model.config.output_hidden_states:
        return "a prefill that gives logits only, without config.output_hidden_states"
    return None


def _room(device: torch.device) -> float:
    """Bytes that all recordings together may hold."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory / _SHARE


class Replays:
    """Stands in for a model in one prefill.

    As long as recorded chunks follow one another, the states stay with the recordings; a chunk of
    another kind, or the end, brings them into the cache.
    """

    def __init__(
        self,
        recordings: Recordings,
        snapshot: _Snapshot,
        model: Any,
        cache: Any,
        chunked: ChunkedPrefill,
        length: int,
    ) -> None:
        """Nothing is recorded before it is needed; see `Recordings.replayed`."""
        self._recordings, self._snapshot = recordings, snapshot
        self._model, self._cache = model, cache
        self._chunked, self._length = chunked, length
        self._layers: tuple[int, ...] = model.widefield.layout.layers
        self._plans: Plans = {}
        self._borrowed: dict[Key, ChunkGraph] = {}
        self._newest: ChunkGraph | None = None
        self._tokens, self._rows = 0, 0

    def __call__(self, **arguments: Any) -> Any:
        """The model's output for one chunk."""
        ids = arguments["input_ids"]
        if ids.shape[1] != self._length or self._chunked.padding.valid is not None:
            self._settle()
            return self._model(**arguments)
        self._rows = ids.shape[0]
        if not self._plans:
            self._plans = self._planned(ids.device)
        before = self._cache if self._newest is None else self._newest.cache
        graph = self._graph(ids, before)
        if self._newest is not graph:
            graph.load(self._plans, before)
        self._newest, self._tokens = graph, self._tokens + self._length
        outputs = graph.replay(ids)
        fields = {"logits": outputs.logits.clone(), cache_name(self._model): self._cache}
        return type(outputs)(**fields)

    def _planned(self, device: torch.device) -> Plans:
        """What the methods ask of each layer in this prefill."""
        plans: Plans = {}
        for layer in self._layers:
            seen = LayerCache(self._cache, layer, self._rows).seen_before
            plan = self._model.widefield.plan(layer, seen, self._chunked.new, device)
            if plan is not None and plan.pool is not None:
                raise _refused(
                    "methods that keep all tokens, and decimamba waits for the GPU to choose some"
                )
            plans[layer] = plan
        return plans

    def _graph(self, ids: Tensor, before: Any) -> ChunkGraph:
        """The recording for the chunk at hand, behind what a cache holds."""
        filled = LayerCache(before, self._layers[0], self._rows).filled
        key = (self._snapshot, tuple(ids.shape), filled, _kinds(self._plans), _settings())
        graph = self._borrowed.get(key) or self._recordings.take(key)
        if graph is None:
            graph = ChunkGraph(self._model, ids, self._plans, before if filled else None)
        self._borrowed[key] = graph
        return graph

    def _settle(self) -> None:
        """Bring the states behind the newest recorded chunk into the cache."""
        if self._newest is None:
            return
        entries, pairs = self._newest.cache.layers, []
        for layer in self._layers:
            conv_state, state = entries[layer].conv_states[0], entries[layer].recurrent_states[0]
            past = LayerCache(self._cache, layer, self._rows)
            if past.filled:
                assert past.conv_state is not None and past.state is not None
                pairs += [(past.conv_state, conv_state), (past.state, state)]
                past.count(self._tokens)
            else:
                past.store(conv_state.clone(), state.clone(), (self._tokens,))
        _copy(pairs)
        self._newest, self._tokens = None, 0

    def close(self) -> None:
        """Bring the states into the cache and give the recordings back."""
        try:
            self._settle()
        finally:
            for key, graph in self._borrowed.items():
                graph.release()
                self._recordings.give_back(key, graph)
            self._borrowed = {}

    def check(self) -> None:
        """What a mixer would have checked if it had not been recorded; waits for the GPU.

        Raises:
            WidefieldError: if the state behind the last layer is not finite, where methods act.
        """
        last = self._layers[-1]
        if self._plans.get(last) is not None:
            state = LayerCache(self._cache, last, self._rows).state
            assert state is not None
            check_finite(state, last)


class ChunkGraph:
    """One chunk of a prefill, recorded: tokens in, logits and states out.

    Attributes:
        cache: what a replay starts from, unless it starts from nothing, and leaves behind.
        bytes: of the GPU's memory that it holds.
    """

    def __init__(self, model: Any, ids: Tensor, plans: Plans, before: Any | None) -> None:
        """Record it.

        Args:
            model: an extended model.
            ids: (B, L) token ids.
            plans: what the methods ask of each layer; replays take other values of the same kind.
            before: a cache to start from, of any values; None to start from nothing.

        Raises:
            WidefieldError: if it cannot be recorded.
        """
        self.device = ids.device
        self._done = torch.cuda.Event() if self.device.type == "cuda" else None
        with torch.inference_mode(False), torch.no_grad():
            self._ids = torch.zeros_like(ids)
            self._plans = {layer: _cloned(plan) for layer, plan in plans.items()}
            self._before: Any = None if before is None else copy.copy(before)
            if before is not None:
                self._before.layers = copy.deepcopy(before.layers)
            self._graph, self._outputs = record(
                lambda: self._forward(model),
                self.device,
                lambda why: _refused(f"a chunk that CUDA can record, and this one fails: {why}"),
            )
        self.bytes = _size(self._graph) if self.device.type == "cuda" else 0
        self.cache = self._outputs[cache_name(model)]

    def _forward(self, model: Any) -> Any:
        cache: Any = self._before
        length = self._ids.shape[1]
        if cache is None:
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        cache.widefield_prefill = ChunkedPrefill(
            (length,), Padding.none(length), last=True, recorded=self._plans
        )
        options = {"use_cache": True, "return_dict": True, "logits_to_keep": 1}
        return model(input_ids=self._ids, **{cache_name(model): cache}, **options)

    def load(self, plans: Plans, before: Any) -> None:
        """Take the values of plans, and the states of a cache if it starts from some."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)
        pairs = [
            (ours, theirs)
            for layer, plan in self._plans.items()
            for ours, theirs in zip(_values(plan), _values(plans[layer]), strict=True)
        ]
        if self._before is not None:
            pairs += zip(states_of(self._before), states_of(before), strict=True)
        _copy(pairs)

    def replay(self, ids: Tensor) -> Any:
        """The model's output behind these tokens, in tensors that the next replay overwrites."""
        self._ids.copy_(ids)
        self._graph.replay()
        return self._outputs

    def release(self) -> None:
        """Let whoever takes it next wait for what is running, on whatever stream."""
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self.device))


def _size(graph: torch.cuda.CUDAGraph) -> int:
    """Bytes of the memory that is a graph's own."""
    own = graph.pool()
    return sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment.get("segment_pool_id") == own
    )


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first, in few kernels."""
    if pairs:
        ours, theirs = zip(*pairs, strict=True)
        torch._foreach_copy_(ours, theirs)  # type: ignore[attr-defined]


def _values(plan: LayerPlan | None) -> list[Tensor]:
    found = [] if plan is None else [getattr(plan, name) for name in _FIELDS]
    return [value for value in found if value is not None]


def _cloned(plan: LayerPlan | None) -> LayerPlan | None:
    if plan is None:
        return None
    fields = {name: getattr(plan, name) for name in _FIELDS}
    return LayerPlan(**{n: None if v is None else v.clone() for n, v in fields.items()})


def _kinds(plans: Plans) -> Key:
    """What of the plans decides which kernels run."""
    return tuple(
        None
        if plan is None
        else tuple(None if (v := getattr(plan, name)) is None else v.shape for name in _FIELDS)
        for plan in plans.values()
    )


def _settings() -> Key:
    """What else decides it, outside of the model."""
    products = torch.backends.cuda.matmul
    return (
        forced_backend(),
        torch.get_float32_matmul_precision(),
        products.allow_bf16_reduced_precision_reduction,
        products.allow_fp16_reduced_precision_reduction,
    )


class _Snapshot:
    """A model's weights and settings at some time, without holding the weights.

    Compared in front of every replayed prefill, hence in lists: what is the same object is the same
    without a look at it.
    """

    def __init__(self, model: nn.Module) -> None:
        """As they are now."""
        self._modules = [*model.modules()]
        self._settings = [dict(vars(module)) for module in self._modules]
        self._rest = self._what_changes()

    def is_current(self, model: nn.Module) -> bool:
        """Whether they are still the same."""
        if model is not self._modules[0]:
            return False
        try:
            same = [vars(module) for module in self._modules] == self._settings
        except (RuntimeError, TypeError, ValueError):
            return False  # a new value that knows no equality
        return same and self._what_changes() == self._rest

    def _what_changes(self) -> tuple[Any, ...]:
        """Classes, parts, hooks and weights, which a module's attributes say nothing of."""
        modules = self._modules
        tensors = [
            tensor
            for module in modules
            for held in (module._parameters, module._buffers)
            for tensor in held.values()
            if tensor is not None
        ]
        return (
            [type(module) for module in modules],
            [part for module in modules for part in module._modules.values()],
            [len(module._forward_hooks) for module in modules],
            [len(module._forward_pre_hooks) for module in modules],
            [id(tensor) for tensor in tensors],
            [tensor.data_ptr() for tensor in tensors],
            [tensor.dtype for tensor in tensors],
            [0 if tensor.is_inference() else tensor._version for tensor in tensors],
        )

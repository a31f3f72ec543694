"""Decode on a GPU by replaying one CUDA graph a token, where launching its kernels takes longest.

`model.generate(..., cuda_graph=True)` comes here for its tokens. A model whose cache has one size
runs the same kernels on tensors of the same shapes for every token, so that they can be recorded
once and replayed. What a step reads and writes lies in tensors of the graph's own: the states are
copied in from the cache behind the prompt, and out again where somebody keeps that cache. Attention
layers get room for all tokens that may come, and a mask.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from widefield import families
from widefield.errors import WidefieldError
from widefield.families import Behind, FixedAttention, LayerCache
from widefield.ops import forced_backend, overlapping
from widefield.prefilling import cache_name

__all__ = [
    "Graphs",
    "check_mode",
    "check_model",
    "graph_wanted",
    "is_wanted",
    "record",
    "sample",
    "states_of",
    "what_graph_needs",
]

_GPU = "cuda"
_COMPARED = (bool, int, float, str, type(None))
_GRAPHS_KEPT = 4
_ROOM = 1024  # tokens
_GROWS = "a cache that does not grow, and attention layers keep the keys of every token"
_recording = threading.Lock()
Result = TypeVar("Result")
_wanted: ContextVar[bool] = ContextVar("widefield_cuda_graph", default=False)


@contextmanager
def graph_wanted(wanted: bool) -> Iterator[None]:
    """Whether the generate() inside the block decodes through a graph."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def is_wanted() -> bool:
    """Whether this generate() is to decode through a graph."""
    return _wanted.get()


def check_model(model: nn.Module) -> None:
    """Refuse a model whose decode step cannot be recorded.

    Raises:
        WidefieldError: saying why.
    """
    needed = what_graph_needs(model, attention=True)
    if needed is not None:
        raise _refused(needed)


def what_graph_needs(model: nn.Module, *, attention: bool = False) -> str | None:
    """What an extended model lacks for what it does to be recorded, or None.

    Args:
        model: extended.
        attention: whether attention layers are given a cache of one size.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        return f"the whole model on one GPU, this one is spread over {_names(devices)}"
    (device,) = devices
    if device.type != _GPU:
        return f"a model on a GPU, this one is on {device}: move it with model.to('cuda')"
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        return "a model that is not compiled, and model.compile() was called on this one"
    template = _template(model)
    if families.attends(template):
        needed = _attention_needs(model, template) if attention else _GROWS
        if needed is not None:
            return needed
    own = model.__dict__["_widefield_hook"].id
    for name, module in model.named_modules():
        hooks = {*module._forward_hooks, *module._forward_pre_hooks}
        if hooks - {own} or (module is not model and own in hooks):
            return (
                f"modules without forward hooks, which a replay does not call, and "
                f"{name or type(model).__name__} has some"
            )
    return None


def _attention_needs(model: nn.Module, template: DynamicCache) -> str | None:
    if model.__dict__["widefield"].drops_tokens:
        return "attention layers that hold every token, and a method drops some"
    return families.what_attention_needs(model, template)


def check_mode(mode: GenerationMode, config: Any, arguments: dict[str, Any]) -> None:
    """Refuse what a replayed step cannot give.

    Args:
        mode: how tokens are chosen.
        config: transformers' GenerationConfig, complete.
        arguments: of the mode, as generate() collects them.

    Raises:
        WidefieldError: saying what to leave out.
    """
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise _refused(f"greedy decoding or sampling, not {mode.value.replace('_', ' ')}")
    for name in ("compile_config", "cache_implementation"):
        if getattr(config, name, None) is not None:
            raise _refused(f"the ordinary cache, without {name}={getattr(config, name)!r}")
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(config, name, None):
            raise _refused(f"a step that gives logits only, without {name}=True")
    if config.use_cache is False:
        raise _refused("a cache, without use_cache=False")
    if arguments.get("synced_gpus"):
        raise _refused("a process of its own, without synced_gpus=True")
    if torch.is_autocast_enabled(_GPU):
        raise _refused("a step outside torch.autocast: cast the model, e.g. model.bfloat16()")


def _refused(expected: str) -> WidefieldError:
    return WidefieldError(f"generate(cuda_graph=True) needs {expected}; or leave cuda_graph out")


def _names(devices: set[torch.device]) -> str:
    return ", ".join(sorted(map(str, devices))) + (" by accelerate" if len(devices) == 1 else "")


def _template(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.no_grad()
def sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any | None = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy decoding and sampling, token by token those of transformers' own loop.

    The host runs one step ahead of the GPU where nobody keeps the cache, so that the GPU need not
    wait to hear whether a row has ended.

    Args:
        model: an extended model that `check_model` let pass.
        input_ids: (B, L) the prompt.
        logits_processor: transformers' list of them.
        stopping_criteria: transformers' list of them.
        generation_config: transformers' GenerationConfig, complete.
        streamer: gets the tokens as they are chosen, or None.
        **model_kwargs: what the prompt's forward gets, as transformers prepares it.

    Returns:
        What transformers' loop returns: (B, L + new) tokens, or an output with them.
    """
    choice = Choice(input_ids, logits_processor, stopping_criteria, generation_config)
    if choice.most is None and families.attends(_template(model)):
        raise _refused("max_new_tokens, since attention layers get room for that many")
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    cache, logits = _cache_of(outputs), outputs.logits
    kept = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    del outputs  # else the logits of the whole prompt would stay as long as the loop runs
    news, behind = News(choice, streamer), _behind(input_ids, choice.most or 0, model_kwargs)
    with model.widefield.graphs.lent(model, cache, behind, kept) as steps:
        while True:
            choice.take(logits)
            news.send()
            if (choice.full or kept) and (news.ended() or choice.full):
                break
            logits = steps.after(choice.tokens)
            if not kept and news.ended():
                break
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return choice.sequences
    return GenerateDecoderOnlyOutput(
        sequences=choice.sequences,  # type: ignore[arg-type]
        scores=choice.scores,
        logits=choice.raw_logits,
        past_key_values=cache,
    )


def _behind(ids: Tensor, new: int, prompt: dict[str, Any]) -> Behind:
    """What the steps stand behind, of the arguments of the prompt's forward."""
    mask, positions = prompt.get("attention_mask"), prompt.get("position_ids")
    after = ids.new_full(ids.shape[:1], ids.shape[1]) if positions is None else positions[:, -1] + 1
    return Behind(None if mask is None else mask.bool(), after.expand(ids.shape[0]), new)


def _cache_of(outputs: Any) -> Any:
    cache = outputs.get("cache_params")
    cache = outputs.get("past_key_values") if cache is None else cache
    if cache is None:
        raise _refused("a cache, and this model returned none")
    if getattr(cache, "offloading", False):
        raise _refused("a cache on the GPU, and this one is offloaded")
    return cache


class Choice:
    """The tokens so far, and how the next one is chosen from logits.

    Attributes:
        tokens: (B,) the newest.
        running: (B,) 1 for rows that go on, 0 for those that have ended.
        scores: of each step after the processors, if asked for.
        raw_logits: of each step before them, if asked for.
        may_end: whether anything but the length can end a row.
    """

    def __init__(self, prompt: Tensor, processors: Any, criteria: Any, config: Any) -> None:
        """Before the first token; the arguments are transformers'."""
        self._processors, self._sampled = processors, bool(config.do_sample)
        self._limit = criteria.max_length
        self._criteria = [c for c in criteria if type(c) is not MaxLengthCriteria]
        self.may_end = bool(self._criteria)
        self._pads = any(hasattr(c, "eos_token_id") for c in criteria)
        pad = config._pad_token_tensor
        self._pad = None if pad is None else pad.to(prompt.device)
        detailed = bool(config.return_dict_in_generate)
        self.scores: Any = () if detailed and config.output_scores else None
        self.raw_logits: Any = () if detailed and config.output_logits else None
        self.running = torch.ones(prompt.shape[0], dtype=torch.long, device=prompt.device)
        self.tokens = self.running
        self._length = prompt.shape[1]
        self._buffer = prompt
        self._grow()

    @property
    def sequences(self) -> Tensor:
        """(B, length) the prompt and all tokens chosen; a view."""
        return self._buffer[:, : self._length]

    @property
    def most(self) -> int | None:
        """New tokens a row that may come; None for any number."""
        return None if self._limit is None else max(0, self._limit - self._length)

    @property
    def full(self) -> bool:
        """Whether the sequences are as long as they may be."""
        return self._limit is not None and self._length >= self._limit

    def take(self, logits: Tensor) -> None:
        """Choose the next token of each row from logits (B, L, V), the last ones count."""
        # A copy, since processors may write into it, and the graph will write over the original.
        copied = bool(self._processors) or self.raw_logits is not None or self.scores is not None
        raw = logits[:, -1].to(self._buffer.device, torch.float32, copy=copied)
        scores = self._processors(self.sequences, raw)
        if self.scores is not None:
            self.scores += (scores,)
        if self.raw_logits is not None:
            self.raw_logits += (raw,)
        self.tokens = self._chosen(scores)
        self._append()
        for criterion in self._criteria:
            self.running = self.running & ~criterion(self.sequences, self.scores)

    def _chosen(self, scores: Tensor) -> Tensor:
        if self._sampled:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if self._pads:
            assert self._pad is not None
            tokens = torch.where(self.running.bool(), tokens, self._pad)
        return tokens

    def _append(self) -> None:
        if self._length == self._buffer.shape[1]:
            self._grow()
        self._buffer[:, self._length] = self.tokens
        self._length += 1

    def _grow(self) -> None:
        room = max(_ROOM, self._length)
        if self._limit is not None:
            room = max(0, min(room, self._limit - self._length))
        more = self._buffer.new_zeros(self._buffer.shape[0], room)
        self._buffer = torch.cat([self._buffer, more], dim=1)


class News:
    """Brings the newest tokens to the host while the GPU goes on with the next step."""

    def __init__(self, choice: Choice, streamer: Any | None) -> None:
        """What is asked for decides what is sent."""
        self._choice, self._streamer = choice, streamer
        self._silent = streamer is None and not choice.may_end
        tokens = choice.tokens
        self._on_gpu = tokens.device.type == "cuda"
        self._sent = torch.zeros(2, *tokens.shape, dtype=torch.long, pin_memory=self._on_gpu)
        self._event = torch.cuda.Event() if self._on_gpu else None

    def send(self) -> None:
        """Send the newest tokens, without waiting."""
        if self._silent:
            return
        newest = torch.stack([self._choice.tokens, self._choice.running])
        with torch.cuda.device_of(newest):
            self._sent.copy_(newest, non_blocking=True)
            if self._event is not None:
                self._event.record()

    def ended(self) -> bool:
        """Wait for what was sent, stream it, and tell whether all rows have ended."""
        if self._silent:
            return False
        if self._event is not None:
            self._event.synchronize()
        if self._streamer is not None:
            self._streamer.put(self._sent[0].clone())
        return not bool(self._sent[1].any())


class Graphs:
    """The recorded steps of one extended model, by the shapes they were recorded for.

    A step that is in use belongs to its user alone, so that two threads do not write into the same
    tensors. A copy of a model starts without any.
    """

    def __init__(self) -> None:
        """None yet."""
        self._free: list[tuple[tuple[Any, ...], StepGraph]] = []
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        """None: a graph belongs to the tensors it was recorded with."""
        return Graphs()

    def __reduce__(self) -> tuple[Any, ...]:
        """None, either."""
        return Graphs, ()

    @contextmanager
    def lent(self, model: nn.Module, cache: Any, behind: Behind, kept: bool) -> Iterator[Steps]:
        """Steps behind a filled cache; afterwards the cache holds their states if it is kept."""
        steps = Steps(self, model, cache, behind)
        try:
            yield steps
        finally:
            steps.close(kept)

    def take(self, model: Any, cache: Any, behind: Behind) -> tuple[tuple[Any, ...], StepGraph]:
        """A recorded step for this model as it is now, and its key; recorded if need be."""
        weights, room = _signature(model), FixedAttention.room_for(cache, behind.new)
        shapes = tuple((t.shape, t.dtype) for t in states_of(cache))
        kind = str(model.config._attn_implementation)
        # Outside of inference mode nothing can be written into tensors that were made inside.
        key = (weights, forced_backend(), shapes, room, kind, torch.is_inference_mode_enabled())
        with self._lock:
            self._free = [pair for pair in self._free if pair[0][0] == weights]
            for index, (known, graph) in enumerate(self._free):
                if known == key:
                    del self._free[index]
                    return key, graph
        return key, StepGraph(model, cache, len(behind.positions), room)

    def give_back(self, key: tuple[Any, ...], graph: StepGraph) -> None:
        """Keep a step for the next call."""
        with self._lock:
            self._free = [*self._free[1 - _GRAPHS_KEPT :], (key, graph)]


class Steps:
    """Decode steps behind a cache, the first of which borrows a graph."""

    def __init__(self, graphs: Graphs, model: nn.Module, cache: Any, behind: Behind) -> None:
        """Nothing is recorded before it is needed."""
        self._graphs, self._model, self._cache, self._behind = graphs, model, cache, behind
        self._borrowed: tuple[tuple[Any, ...], StepGraph] | None = None
        self._count = 0

    def after(self, tokens: Tensor) -> Tensor:
        """The logits (B, 1, V) behind one more token (B,) a row; the next call overwrites them."""
        if self._borrowed is None:
            key, graph = self._graphs.take(self._model, self._cache, self._behind)
            graph.load(self._cache, self._behind)
            self._borrowed = key, graph
        self._count += 1
        return self._borrowed[1].step(tokens)

    def close(self, kept: bool) -> None:
        """Give the graph back, after its states have gone into the cache if it is kept."""
        if self._borrowed is None:
            return
        if kept:
            self._borrowed[1].store(self._cache, self._count)
            for layer, _ in families.mixers(self._model):
                LayerCache(self._cache, layer, len(self._behind.positions)).count(self._count)
        self._graphs.give_back(*self._borrowed)
        self._borrowed = None


class StepGraph:
    """One decode step of a model, recorded: a token a row in, logits out, states go on in place."""

    def __init__(self, model: nn.Module, cache: Any, batch: int, room: int) -> None:
        """Record it, with states of the shapes that `cache` holds, and room for so many tokens.

        Raises:
            WidefieldError: if it cannot be recorded.
        """
        self._attention = FixedAttention(model, cache, room) if room else None
        self._cache = copy.deepcopy(cache) if self._attention is None else self._attention.cache
        self._states = states_of(self._cache)
        self._tokens = torch.zeros(batch, 1, dtype=torch.long, device=self._states[0].device)
        self._record(model)

    def _record(self, model: nn.Module) -> None:
        with overlapping():
            self._graph, self._logits = record(
                lambda: self._forward(model),
                self._tokens.device,
                lambda why: _refused(f"a step that CUDA can record, and this one fails: {why}"),
            )

    def _forward(self, model: nn.Module) -> Tensor:
        arguments = {cache_name(model): self._cache, "use_cache": True, "logits_to_keep": 1}
        forward = functools.partial(model, self._tokens, return_dict=True, **arguments)
        return (forward() if self._attention is None else self._attention.step(forward)).logits

    def load(self, cache: Any, behind: Behind) -> None:
        """Start behind the states of a cache."""
        for ours, theirs in zip(self._states, states_of(cache), strict=True):
            ours.copy_(theirs)
        if self._attention is not None:
            self._attention.load(cache, behind)

    def store(self, cache: Any, count: int) -> None:
        """Write the states behind the last of so many steps into a cache."""
        for ours, theirs in zip(self._states, states_of(cache), strict=True):
            theirs.copy_(ours)
        if self._attention is not None:
            self._attention.store(cache, count)

    def step(self, tokens: Tensor) -> Tensor:
        """The logits (B, 1, V) behind tokens (B,), in a tensor that the next step overwrites."""
        self._tokens.copy_(tokens[:, None])
        self._graph.replay()
        return self._logits


def record(
    run: Callable[[], Result], device: torch.device, refused: Callable[[str], WidefieldError]
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record what a function does on a GPU.

    Args:
        run: works on tensors that stay where they are.
        device: the GPU.
        refused: makes the error, of CUDA's reason, where it cannot be recorded.

    Returns:
        What replays it, and what the function returned, whose tensors each replay fills anew.
    """
    # One at a time: torch records all graphs on one stream and waits for the whole GPU before.
    with _recording, torch.cuda.device(device):
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):  # kernels are compiled and workspaces made outside the recording
                run()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise refused(str(error).splitlines()[0]) from None
        return graph, result


def states_of(cache: Any) -> list[Tensor]:
    """The tensors of a cache that have one size, in order."""
    return [
        tensor
        for entry in cache.layers
        if hasattr(entry, "conv_states")
        for states in (entry.conv_states, entry.recurrent_states)
        for tensor in states.values()
        if tensor is not None  # of a block without states, in some versions of transformers
    ]


def _signature(model: nn.Module) -> list[Any]:
    """What changes with any weight and any setting that a recorded step depends on."""
    found: list[Any] = []
    for module in model.modules():
        found.append(type(module))
        _note(vars(module).values(), found)
    return found


def _note(values: Iterable[Any], found: list[Any]) -> None:
    """Add something for each value that compares equal as long as nothing of it has changed."""
    for value in values:
        if type(value) in _COMPARED:
            found.append(value)
        elif isinstance(value, Tensor):
            version = 0 if value.is_inference() else value._version
            found += (id(value), value.data_ptr(), value.dtype, version)
        elif isinstance(value, dict | list | tuple | set | frozenset):
            if not value:
                found.append(0)
            elif isinstance(value, dict):
                found.append(tuple(value))
                _note(value.values(), found)
            else:
                found.append(len(value))
                _note(value, found)
        else:
            found.append(id(value))

"""Put methods into a live transformers model and take them out again.

`extend` swaps the classes of the model's Mamba layers once. From then on each layer's forward asks
this module's
`Extension` for its plan. Nothing global is touched: two models, extended differently, do not see
each other.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from widefield import decoding, families
from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.families import Observer
from widefield.methods import from_config, plan_layer
from widefield.methods.base import Method
from widefield.plan import LayerPlan, ModelLayout
from widefield.prefilling import in_chunks
from widefield.recording import Recordings

__all__ = [
    "Extension",
    "extend",
    "extended",
    "observed",
    "read_methods",
    "replace_methods",
    "restore",
    "write_extension",
]

Model = TypeVar("Model", bound=nn.Module)
_PLANS_KEPT = 1024
_ANY_LENGTH = 1 << 40


class Extension:
    """What is on in one model; `model.widefield`.

    Attributes:
        methods: the methods, in the order in which they were given.
        layout: what the methods know of the model.
        observer: called with (layer, scan inputs) in every prefill, or None.
        graphs: decode steps that were recorded for `generate(cuda_graph=True)`.
        recordings: chunks that were recorded for `prefill(cuda_graph=True)`.
    """

    def __init__(self, layout: ModelLayout, methods: Sequence[Method]) -> None:
        """Check that every method can act on the model."""
        for method in methods:
            if isinstance(method, type) or not isinstance(method, Method):
                raise WidefieldError(
                    f"{method!r} is not a method: expected an instance, e.g. "
                    "wf.LongMamba(calibration)"
                )
            method.validate(layout)
        self.layout = layout
        self.methods = tuple(methods)
        self.observer: Observer | None = None
        self.graphs = decoding.Graphs()
        self.recordings = Recordings()
        self._plans: OrderedDict[tuple[Any, ...], LayerPlan] = OrderedDict()
        plan_layer(
            self.methods, layout.layers[0], (0,), (1,)
        )  # methods that cannot be combined say so now

    def plan(
        self, layer: int, seen: tuple[int, ...] | None, new: tuple[int, ...], device: torch.device
    ) -> LayerPlan | None:
        """The plan for a prefill of `new` tokens a row after `seen` ones; None = unmodified."""
        if not self.methods:
            return None
        if seen is None:
            raise WidefieldError(
                "this cache was filled before the model was extended, so its context length is "
                "unknown: "
                "run the whole prompt through the extended model"
            )
        key = (layer, seen, new, device)
        plan = self._plans.get(key)
        if plan is None:
            plan = plan_layer(self.methods, layer, seen, new).to(device)
            self._plans[key] = plan
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        return plan

    @property
    def drops_tokens(self) -> bool:
        """Whether a method shortens the sequence of a long enough prefill."""
        pools = (
            plan_layer(self.methods, layer, (0,), (_ANY_LENGTH,)).pool
            for layer in self.layout.layers
        )
        return any(pool is not None and not pool.scatter for pool in pools)

    def __repr__(self) -> str:
        """The methods and their options on one line."""
        names = [repr(m) for m in self.methods] or [
            "no method: the unmodified model on widefield's kernels"
        ]
        return f"widefield on {self.layout.model_class}: {' + '.join(names)}"


def extend(model: Model, *methods: Method) -> Model:
    """Run a model's Mamba layers on widefield's kernels, with methods if any are given. In place.

    An extended model that is extended again has its methods replaced.

    Args:
        model: a live transformers model of a supported family.
        methods: none, one, or several that can be combined, e.g. `LongMamba(calibration)`.

    Returns:
        The same model object.

    Raises:
        WidefieldError: if the model is not supported, or a method cannot act on it. The model is
            then unchanged.
    """
    layout = families.describe(model)
    extension = Extension(layout, methods)
    current = getattr(model, "widefield", None)
    if current is not None:
        extension.observer = current.observer
    _install(model, extension)
    return model


def restore(model: Model) -> Model:
    """Undo `extend`: outputs are bit for bit those of before. A no-op if not extended."""
    extension = model.__dict__.get("widefield")
    if extension is None:
        return model
    back = {ours: theirs for theirs, ours in families.swaps().items()}
    for module in model.modules():
        original = back.get(type(module))
        if original is not None:
            _become(module, original)
            for name in [name for name in module.__dict__ if name.startswith("_widefield")]:
                del module.__dict__[name]
    model.__dict__.pop("_widefield_hook").remove()
    model.__class__ = type(model).__mro__[
        2
    ]  # [extended class, _ExtendedModel, the class of before]
    del model.__dict__["widefield"]
    return model


@contextmanager
def extended(model: Model, *methods: Method) -> Iterator[Model]:
    """`extend` for the length of a block; afterwards what was on before is on again."""
    before = model.__dict__.get("widefield")
    extend(model, *methods)
    try:
        yield model
    finally:
        if before is None:
            restore(model)
        else:
            _install(model, before)


@contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer(layer, scan_inputs)` in every prefill, on stock and extended models.

    Args:
        model: a supported model.
        observer: sees the inputs of each layer's scan before any method acts on that layer.
    """
    before = model.__dict__.get("widefield")
    if before is None:
        extend(model)
    extension = model.__dict__["widefield"]
    previous, extension.observer = extension.observer, observer
    try:
        yield
    finally:
        extension.observer = previous
        if before is None:
            restore(model)


def replace_methods(model: nn.Module, extension: Extension) -> None:
    """Exchange the methods of an extended model for those of a prepared `Extension`.

    For loops that change the methods often, where `extend` would take the model's fingerprint each
    time.
    """
    _install(model, extension)


def _install(model: nn.Module, extension: Extension) -> None:
    table = families.swaps()
    for module in model.modules():
        ours = table.get(type(module))
        if ours is not None:
            _become(module, ours)
    families.chain_blocks(model)
    for _, mixer in families.mixers(model):
        mixer._widefield = extension  # type: ignore[assignment]
        mixer.__dict__["_widefield_derived"] = {}
    if "widefield" not in model.__dict__:
        model.__class__ = _extended_class(type(model))
        model.__dict__["_widefield_hook"] = model.register_forward_pre_hook(
            _check_call, with_kwargs=True
        )
    model.__dict__["widefield"] = extension


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a live module's class, and the forward that accelerate's hooks hold."""
    module.__class__ = kind
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = MethodType(kind.forward, module)


def _check_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What would otherwise fail deep inside, or not at all."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if isinstance(tokens, torch.Tensor) and tokens.ndim >= 2 and tokens.shape[1] == 0:
        raise WidefieldError("the prompt is empty: expected at least one token")
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and isinstance(tokens, torch.Tensor) and mask.ndim == 2:
        families.check_covers(mask, tokens.shape[1])
    extension: Extension = model.__dict__["widefield"]
    if kwargs.get("labels") is not None and extension.drops_tokens:
        raise WidefieldError(
            "labels= needs one logit a token, and DeciMamba drops tokens: compute the loss on "
            "the logits of the "
            "protected last tokens (DeciMamba(protect=...)), or restore the model first"
        )


class _ExtendedModel:
    """An extended model's top class: it saves what is on, and reads a prompt in chunks."""

    widefield: Extension

    def __call__(self, *args: Any, widefield_chunk_size: int | None = None, **kwargs: Any) -> Any:
        if widefield_chunk_size is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return in_chunks(self, kwargs, widefield_chunk_size)  # type: ignore[arg-type]

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Stock chunks lose the state: let transformers prepare one call, and cut that one."""
        size = generation_config.prefill_chunk_size
        if size is not None:
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
            model_kwargs = {**model_kwargs, "widefield_chunk_size": size}
        return super()._prefill(  # type: ignore[misc]
            input_ids, generation_config, model_kwargs, **kwargs
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_extension(self.widefield, Path(save_directory))
        return result

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        super()._validate_generation_mode(  # type: ignore[misc]
            generation_mode, generation_config, generation_mode_kwargs
        )
        if decoding.is_wanted():
            decoding.check_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """The loop over tokens; transformers' own unless a graph is wanted."""
        if decoding.is_wanted():
            return decoding.sample(self, *args, **kwargs)
        return super()._sample(*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, cuda_graph: bool = False, **kwargs: Any) -> Any:
        """Generate as transformers does, with one option more.

        Args:
            *args: as in transformers.
            cuda_graph: record a decode step once and replay it for every token. The tokens are the
                same, in a fraction of the time where launching kernels takes longest: one or a few
                rows on a GPU. For greedy decoding and sampling. Attention layers get a cache with
                room for all tokens that may come; their logits are the same up to rounding.
            **kwargs: as in transformers.

        Raises:
            WidefieldError: if the cache would have to be rolled back, or a graph is asked for where
                there can be none.
        """
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(name) is not None:
                raise WidefieldError(
                    f"generate({name}=...) rolls the cache back, which a recurrent state "
                    "cannot: leave it out"
                )
        _check_continued(kwargs.get("past_key_values"))
        if cuda_graph:
            decoding.check_model(self)  # type: ignore[arg-type]
            if kwargs.get("custom_generate") is not None:
                raise WidefieldError(
                    "generate(cuda_graph=True) has a loop of its own: leave out custom_generate"
                )
        with decoding.graph_wanted(cuda_graph):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def _check_continued(cache: Any) -> None:
    """Refuse what transformers would measure wrongly: how much of the prompt a cache holds."""
    if hasattr(families.counted_attention(cache), "widefield_valid"):
        raise WidefieldError(
            "generate(past_key_values=...) takes the length of the cache's attention for that of "
            "the text, and decimamba has shortened it: call model(new_ids, past_key_values=...) or "
            "wf.prefill(model, new_ids, cache=...), and decode from there"
        )


_CLASSES: dict[type, type] = {}


def _extended_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass with the same name, so that saved configs still name the transformers class."""
    if kind not in _CLASSES:
        body: dict[str, Any] = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
        }
        _CLASSES[kind] = type(kind.__name__, (_ExtendedModel, kind), body)
    return _CLASSES[kind]


def write_extension(extension: Extension, folder: Path) -> None:
    """Write `widefield.json` and its calibrations into a saved model's folder."""
    if not extension.methods:
        return
    files: dict[int, str] = {}
    entries = []
    for method in extension.methods:
        calibration = getattr(method, "calibration", None)
        if calibration is not None and id(calibration) not in files:
            suffix = f"-{len(files)}" if files else ""
            files[id(calibration)] = f"widefield{suffix}.safetensors"
            calibration.save(folder / files[id(calibration)])
        entries.append(
            {
                "name": method.name,
                "options": method.describe(),
                "calibration": files.get(id(calibration)),
            }
        )
    text = json.dumps({"format": 1, "methods": entries}, indent=2) + "\n"
    temporary = folder / "widefield.json.part"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / "widefield.json")


def read_methods(folder: Path) -> tuple[Method, ...]:
    """The methods that `write_extension` left in a folder; empty if there are none.

    Raises:
        WidefieldError: if `widefield.json` or a calibration beside it cannot be read.
    """
    path = folder / "widefield.json"
    if not path.is_file():
        return ()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["methods"]
        specs = [(e["name"], dict(e["options"]), e.get("calibration")) for e in entries]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise WidefieldError(
            f"{path} is not a description of methods ({type(error).__name__}): "
            "save the extended model again, or delete the file to load the model without methods"
        ) from None
    calibrations: dict[str, Calibration] = {}
    methods = []
    for name, options, file in specs:
        if file is not None and file not in calibrations:
            if Path(file).name != file:
                raise WidefieldError(
                    f"{path} names the calibration {file!r}: expected a file beside it"
                )
            calibrations[file] = Calibration.load(folder / file)
        methods.append(from_config(name, options, None if file is None else calibrations[file]))
    return tuple(methods)

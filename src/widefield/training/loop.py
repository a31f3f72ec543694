"""The training loop: curriculum, mixed loss, decimation, checkpoints to resume from."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.extension import Extension, extend, replace_methods, restore
from widefield.methods import DeciMamba
from widefield.ops import token_score
from widefield.plan import ScanInputs, SSDInputs
from widefield.tasks.passkey import DIGITS
from widefield.training.data import Batch, Corpus, make_batch, prefetch
from widefield.training.recipe import Decimation, Recipe

__all__ = ["Progress", "TrainingResult", "train"]

_VOCABULARY = 384  # ByT5: 256 bytes, 3 special tokens, 125 spare ones
_WARM_STEPS = 3  # kernels are compiled in the first steps; the clock starts after them


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress line shows.

    Attributes:
        share: of the run that is done, 0 to 1.
        step: optimiser steps so far.
        seconds: so far, compilation not counted.
        length: bytes of a sequence of the current stage.
        text_loss: mean next-byte loss, nats, over the last steps.
        answer_loss: mean loss of the five answer digits, nats, over the last steps.
        bytes_per_second: over the last steps.
    """

    share: float
    step: int
    seconds: float
    length: int
    text_loss: float
    answer_loss: float
    bytes_per_second: float


@dataclass(frozen=True)
class TrainingResult:
    """A finished run.

    Attributes:
        model: the trained model, unextended, in eval mode, float32.
        record: what is written to training.json.
    """

    model: Any
    record: dict[str, Any]


def new_model(recipe: Recipe) -> Any:
    """A byte-level `MambaForCausalLM` with the recipe's shape and seed."""
    from transformers import MambaConfig, MambaForCausalLM

    shape = recipe.shape
    torch.manual_seed(recipe.seed)
    config = MambaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        state_size=shape.state_size,
        expand=shape.expand,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.03,
    )
    config.tokenizer_class = "ByT5Tokenizer"  # type: ignore[attr-defined]
    return MambaForCausalLM(config)


def train(
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    *,
    device: str = "cuda",
    model: Any | None = None,
    calibration: Calibration | None = None,
    resume: bool = True,
    save_every: float = 60.0,
    report: Callable[[Progress], None] | None = None,
) -> TrainingResult:
    """Train a checkpoint.

    Args:
        recipe: what to do.
        corpus: the text; haystacks and plain text are both drawn from it.
        out: folder of the checkpoint to resume from (`out/resume`).
        device: "cuda" or "cpu".
        model: the model to go on training; None starts from scratch.
        calibration: of `model`; needed by decimation with the score "global".
        resume: go on from `out/resume` if it is there and belongs to this recipe and corpus.
        save_every: seconds between two checkpoints.
        report: called every few steps.

    Raises:
        WidefieldError: if the loss is not finite, or a checkpoint belongs to another run.
    """
    from accelerate import Accelerator

    mixed = "bf16" if device == "cuda" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=device == "cpu")
    network: Any = new_model(recipe) if model is None else model
    network.config.use_cache = False
    network.train()
    extend(network)
    layout = network.widefield.layout
    optimizer = _optimizer(network, recipe, fused=device == "cuda")
    run = _Run(recipe, corpus, out / "resume", network, optimizer)
    if resume:
        run.load()
    prepared, optimizer = accelerator.prepare(network, optimizer)
    decimate = recipe.decimation
    batches = prefetch(run.next_batch)
    recent: list[tuple[Tensor, Tensor, float]] = []
    saved = time.monotonic()
    try:
        while run.share < 1.0:
            began = time.monotonic()
            batch = next(batches)
            if decimate:
                method = _method(decimate, calibration, run.keep(decimate))
                replace_methods(network, Extension(layout, [method]))
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(recipe, run.share)
            loss, text_loss, answer_loss = _losses(prepared, batch, decimate, accelerator.device)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append((text_loss.detach(), answer_loss.detach(), batch.ids.size))
            note = run.step % 10 == 9 or run.step < _WARM_STEPS
            if note:
                run.note(recent)
                recent.clear()
            run.advance(time.monotonic() - began)
            if note and report:
                report(run.progress())
            if time.monotonic() - saved > save_every:
                run.save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        run.save()
        raise
    finally:
        batches.close()  # type: ignore[attr-defined]
    network = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    restore(network)
    network.config.use_cache = True
    shutil.rmtree(out / "resume", ignore_errors=True)
    return TrainingResult(network.eval().float(), run.record(device))


def _method(decimate: Decimation, calibration: Calibration | None, keep: int) -> DeciMamba:
    options: dict[str, Any] = {}
    if decimate.score != "norm":
        options = {
            "decay_threshold": decimate.decay_threshold,
            "clamp_share": decimate.clamp_share,
            "calibration": calibration,
        }
    return DeciMamba(
        layers=decimate.layers,
        base_length=keep,
        shrink=1.0,
        min_length=1,
        score=decimate.score,  # type: ignore[arg-type]
        protect=decimate.protect,
        **options,
    )


def _optimizer(model: Any, recipe: Recipe, *, fused: bool) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves A_log, D, norms and biases alone."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        bare = parameter.ndim < 2 or name.endswith("A_log")
        (plain if bare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=fused)


def _learning_rate(recipe: Recipe, share: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if share < recipe.warmup:
        return recipe.learning_rate * max(share / recipe.warmup, 0.01)
    along = (share - recipe.warmup) / (1.0 - recipe.warmup)
    return recipe.learning_rate * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * along)))


def _losses(
    model: Any, batch: Batch, decimate: Decimation | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole loss, the next-byte loss (of protected bytes under decimation), the answers'."""
    ids = torch.from_numpy(batch.ids).to(device, non_blocking=True)
    length = ids.shape[1]
    judged = length if decimate is None else min(decimate.protect, length)
    with _watched_scores(model, decimate) as scores:
        logits = model(input_ids=ids, logits_to_keep=judged).logits
    targets = ids[:, length - judged + 1 :]
    text = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    answer = text.new_zeros(())
    if batch.passkeys:
        answers = logits[: batch.passkeys, -1 - DIGITS : -1]
        answer = F.cross_entropy(answers.flatten(0, 1), ids[: batch.passkeys, -DIGITS:].flatten())
    loss = text + answer
    if decimate and scores and batch.passkeys:
        ranks = [_rank_loss(score, batch, decimate) for score in scores]
        loss = loss + decimate.rank_weight * torch.stack(ranks).mean()
    return loss, text, answer


@contextmanager
def _watched_scores(model: Any, decimate: Decimation | None) -> Iterator[list[Tensor]]:
    """Collect the importance scores (B, L) of the first decimating layer, with their gradients."""
    scores: list[Tensor] = []
    extension = getattr(model, "widefield", None)
    if decimate is None or not decimate.rank_weight or extension is None:
        yield scores
        return
    pool = extension.methods[0].pool(decimate.layers[0])

    def note(layer: int, inputs: ScanInputs | SSDInputs) -> None:
        if layer == decimate.layers[0]:
            scores.append(token_score(inputs, pool.to(inputs.x.device)))

    extension.observer = note
    try:
        yield scores
    finally:
        extension.observer = None


def _rank_loss(score: Tensor, batch: Batch, decimate: Decimation) -> Tensor:
    """How far the digits of the keys are from outscoring the best of all other tokens of the batch.

    softplus(10 · (log s̄ − log s_digit + 0.2)), with s̄ the geometric mean score of the best
    `rank_share` of the
    tokens that are neither a digit of a key nor protected.
    """
    log_score = torch.log(score.clamp_min(1e-6))
    rows = torch.arange(batch.passkeys, device=score.device)[:, None]
    digits = torch.from_numpy(batch.digits).to(score.device)
    others = torch.ones_like(log_score, dtype=torch.bool)
    others[rows, digits] = False
    others[:, -decimate.protect :] = False
    rivals = log_score[others]
    best = rivals.topk(
        max(1, round(rivals.numel() * decimate.rank_share)), sorted=False
    ).values.mean()
    return F.softplus(10.0 * (best - log_score[rows, digits] + 0.2)).mean()


class _Run:
    """Where a run stands: what is saved and loaded to resume it."""

    def __init__(
        self, recipe: Recipe, corpus: Corpus, folder: Path, model: Any, optimizer: Any
    ) -> None:
        self.recipe, self.corpus, self.folder = recipe, corpus, folder
        self.model, self.optimizer = model, optimizer
        self.step, self.seconds, self.bytes = 0, 0.0, 0
        self.history: list[dict[str, float]] = []
        self._made = 0
        self._rates: list[float] = []
        self._length = recipe.stages[0].length

    @property
    def share(self) -> float:
        """Of the run that is done."""
        if self.recipe.steps is not None:
            return min(1.0, self.step / self.recipe.steps)
        assert self.recipe.seconds is not None
        return min(1.0, self.seconds / self.recipe.seconds)

    def next_batch(self) -> Batch:
        """The next batch; each has its own random source, so a resumed run goes on alike."""
        steps = self.recipe.steps
        stage = self.recipe.stage(self.share if steps is None else self._made / steps)
        rng = np.random.default_rng([self.recipe.seed, self._made])
        self._made += 1
        recipe = self.recipe
        return make_batch(
            self.corpus, stage.length, stage.batch, recipe.passkey_share, rng,
            recipe.unwrapped_share,
        )  # fmt: skip

    def keep(self, decimate: Decimation) -> int:
        """How many tokens this step's rows keep."""
        rng = np.random.default_rng([self.recipe.seed, self.step, 1])
        low, high = math.log(decimate.keep_min), math.log(decimate.keep_max)
        return round(math.exp(rng.uniform(low, high)))

    def advance(self, seconds: float) -> None:
        """One more step is done."""
        self.step += 1
        if self.step > _WARM_STEPS:
            self.seconds += seconds
            self._rates.append(seconds)

    def note(self, recent: list[tuple[Tensor, Tensor, float]]) -> None:
        """Add a line to the history; this is where the device is waited for."""
        text = float(torch.stack([r[0] for r in recent]).mean())
        answer = float(torch.stack([r[1] for r in recent]).mean())
        if not math.isfinite(text + answer):
            raise WidefieldError(
                f"the loss is not finite at step {self.step} (text {text}, answers {answer}): "
                "lower learning_rate in the recipe and start again"
            )
        total = sum(r[2] for r in recent)
        self.bytes += int(total)
        rate = total / len(recent) / max(1e-9, statistics.fmean(self._rates[-10:] or [math.inf]))
        self._length = self.recipe.stage(self.share).length
        self.history.append(
            {
                "step": self.step,
                "seconds": round(self.seconds, 2),
                "length": self._length,
                "text_loss": round(text, 5),
                "answer_loss": round(answer, 5),
                "bytes_per_second": round(rate),
            }
        )

    def progress(self) -> Progress:
        """The last line of the history."""
        last = self.history[-1]
        return Progress(
            self.share, self.step, self.seconds, self._length,
            last["text_loss"], last["answer_loss"], last["bytes_per_second"],
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be resumed."""
        return {
            "recipe": json.loads(json.dumps(dataclasses.asdict(self.recipe))),
            "corpus": self.corpus.sha256,
        }

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        part = self.folder.with_name("resume.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()},
            part / "state.pt",
        )
        state = {
            "identity": self.identity(), "step": self.step, "seconds": self.seconds,
            "bytes": self.bytes, "history": self.history,
        }  # fmt: skip
        (part / "state.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        part.rename(self.folder)

    def load(self) -> None:
        """Go on from a checkpoint if there is one."""
        if not (self.folder / "state.json").is_file():
            return
        state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        if state["identity"] != self.identity():
            raise WidefieldError(
                f"{self.folder} belongs to another recipe or corpus: "
                "give another --out, or --no-resume to start over"
            )
        tensors = torch.load(self.folder / "state.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.bytes, self.history = state["bytes"], state["history"]
        self._made = self.step

    def record(self, device: str) -> dict[str, Any]:
        """What training.json says of the run."""
        import transformers

        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        return {
            "recipe": self.identity()["recipe"],
            "corpus": {"files": len(self.corpus.files), "bytes": int(self.corpus.text.size),
                       "sha256": self.corpus.sha256},
            "device": name, "torch": torch.__version__, "transformers": transformers.__version__,
            "steps": self.step, "seconds": round(self.seconds, 1), "bytes": self.bytes,
            "history": self.history,
        }  # fmt: skip

"""What the benchmarks share: who ran them on what, memory, quantiles, and files of rows."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import widefield
from widefield.evaluation.results import write_atomically

PACKAGES = (
    "torch", "transformers", "numba", "numpy", "triton", "cuda-bindings",
    "nvidia-cuda-nvrtc", "mamba-ssm", "causal-conv1d", "kernels",
)  # fmt: skip


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _asked(*fields: str) -> list[str | None]:
    """What nvidia-smi says of the first GPU; Nones where it cannot be asked."""
    if shutil.which("nvidia-smi") is None:
        return [None] * len(fields)
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    answers = [part.strip() for part in done.stdout.split("\n")[0].split(",")]
    return [*answers] if len(answers) == len(fields) else [None] * len(fields)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def environment(module: str, device: torch.device, seed: int) -> dict[str, Any]:
    """The head of a result file: command, device and versions."""
    return {
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
        "versions": _versions(),
        "system": platform.platform(),
        "seed": seed,
        **(_gpu(device) if device.type == "cuda" else _cpu()),
    }


def _versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "widefield": widefield.__version__}
    return found | {p: installed(p) for p in PACKAGES}


def _gpu(device: torch.device) -> dict[str, Any]:
    """Its name and what its bounds are made of: at its highest clocks, whatever they are now."""
    found = torch.cuda.get_device_properties(device)
    driver, clock, memory = _asked("driver_version", "clocks.max.sm", "clocks.max.memory")
    # Two transfers a clock, bits to bytes, MHz to GB/s.
    bandwidth = (_number(memory) or 0) * getattr(found, "memory_bus_width", 0) * 2 / 8e3
    return {
        "device": found.name,
        "driver": driver,
        "cuda": torch.version.cuda,
        "multiprocessors": found.multi_processor_count,
        "megahertz": _number(clock),
        "gigabytes_per_second": round(bandwidth) or None,
        "gigabytes": round(found.total_memory / 1e9, 1),
    }


def _cpu() -> dict[str, Any]:
    return {
        "device": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The values at 20, 50 and 80 %, each one that was measured."""
    ranked = sorted(values)
    low, middle, high = (ranked[int(s * (len(ranked) - 1) + 0.5)] for s in (0.2, 0.5, 0.8))
    return low, middle, high


def peak_kibibytes() -> int:
    """The peak of this process; `ru_maxrss` starts with that of the program that started it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory needs Linux")


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of this process, or of torch on a GPU since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_kibibytes() * 1024


def write_rows(path: Path, content: dict[str, Any]) -> None:
    """Replace a result file at once, so that an interrupted run leaves a whole one."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())

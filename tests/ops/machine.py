"""Where the kernels in CUDA C++ are tested: on a GPU, else their source in the emulator."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.ops import emulated_cuda
from widefield.ops import _nvrtc

ON_GPU = torch.cuda.is_available() and _nvrtc.available()
DEVICE = "cuda" if ON_GPU else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a GPU and NVRTC")]


def use(kernels: ModuleType, emulated: ModuleType, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The GPU, or the emulator where there is none.

    Args:
        kernels: the module that builds them.
        emulated: the one that builds them for the CPU.
        folder: for what is compiled.
        patch: undoes it.
    """
    if ON_GPU:
        return
    if emulated_cuda.compiler() is None:
        pytest.skip("needs a GPU or a C++ compiler")
    patch.setattr(_nvrtc, "build", partial(emulated.build, folder=folder))
    kernels._kernel.cache_clear()


def assert_struct_is_the_kernels(kernels: ModuleType) -> None:
    source = kernels._SOURCE.read_text("utf-8")
    found = re.search(r"struct Parameters \{(.*?)\n\};", source, re.DOTALL)
    assert found is not None
    code = re.sub(r"//.*", "", found[1])
    names = re.findall(r"\*?(\w+)(?=[,;])", code)
    assert names == [field[0] for field in kernels._Parameters._fields_]

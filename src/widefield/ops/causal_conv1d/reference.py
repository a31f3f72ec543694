"""Depthwise causal convolution in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def causal_conv1d(
    x: Float[Tensor, "batch length channels"],
    weight: Float[Tensor, "channels kernel"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    silu: bool = True,
    initial_state: Float[Tensor, "batch channels kernel"] | None = None,
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch channels kernel"]]:
    """y_t = act(bias + Σ_k weight[:, k] · x_{t-K+1+k}), with the state of the tokens before x.

    Args:
        x: inputs, any floating dtype.
        weight: one filter of K taps a channel.
        bias: added before the activation, or None.
        silu: whether the activation is silu; False for none.
        initial_state: the last K inputs before x (as transformers caches them), or None for zeros.

    Returns:
        y in the dtype of x, and the last K inputs (B, D, K), the initial state included, in the
        dtype of x.
    """
    kernel = weight.shape[1]
    if initial_state is None:
        before = x.new_zeros(x.shape[0], kernel, x.shape[2])
    else:
        before = initial_state.to(x.dtype).transpose(1, 2)
    padded = torch.cat([before, x], dim=1)
    wide = padded[:, 1:].transpose(1, 2)
    y = F.conv1d(
        wide,
        weight[:, None].to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        groups=weight.shape[0],
    )
    if silu:
        y = F.silu(y)
    return y.transpose(1, 2), padded[:, -kernel:].transpose(1, 2).contiguous()

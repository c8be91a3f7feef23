"""Arithmetic in reduced precision, where the machine is made for it; weights stay in single precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def has_bf16(device_type: str) -> bool:
    """Whether it computes in bf16 itself. CPUs that only imitate it are over ten times slower than in fp32."""
    return device_type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def arithmetic(precision: str, device_type: str) -> Iterator[None]:
    """Within it, networks compute in this precision (fp32 or bf16), or in fp32 where bf16 would be imitated."""
    if precision == "fp32" or not has_bf16(device_type):
        yield
        return
    # On CPUs the fused attention's backward pass is several times slower in bf16 than plain products are.
    plain = sdpa_kernel(SDPBackend.MATH) if device_type == "cpu" else nullcontext()
    with torch.autocast(device_type, torch.bfloat16), plain:
        yield

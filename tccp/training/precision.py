"""Reduced-precision arithmetic where the hardware supports it. Weights stay in single precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def has_bf16(device_type: str) -> bool:
    """Whether the device computes in bf16 natively. CPUs that emulate bf16 are over ten times slower than in fp32."""
    return device_type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def arithmetic(precision: str, device_type: str) -> Iterator[None]:
    """Context in which networks compute in `precision` (fp32 or bf16); in fp32 if the device would emulate bf16."""
    if precision == "fp32" or not has_bf16(device_type):
        yield
        return
    with torch.autocast(device_type, torch.bfloat16):
        yield

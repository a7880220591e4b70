"""The numbers that an adapter is made with: what they may be, and the scaling that they give."""

import math

import torch
from torch import nn

from dorac import checks
from dorac.numerics import FLOAT_DTYPES, LARGEST_SCALING

DEFAULT_R = 8  # as PEFT has them
DEFAULT_ALPHA = 8
SETTLED = "r", "lora_alpha", "use_rslora"  # what an adapter was made with, see settled()


def scaling_factor(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """s: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` rank-stabilised (arXiv 2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def attribute(name: str) -> str:
    """Where a layer has this number: of what is :func:`settled` beside the property of that name."""
    return f"_{name}" if name in SETTLED else name


def settled(name: str, instead: str) -> property:
    """An attribute that belongs to the adapter that is there: setting it is refused.

    It lies in ``vars(layer)`` under another name: for its own the compiler of torch 2.11 asks the property again.
    """
    own = attribute(name)

    def get(layer: nn.Module) -> object:
        if own in layer.__dict__:
            return layer.__dict__[own]
        raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}")

    def refuse(layer: nn.Module, value: object) -> None:
        raise AttributeError(
            f"{name} of a {type(layer).__name__} cannot be set, the adapter was made with it: {instead}"
        )

    return property(get, refuse)


def check_hyperparameters(
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    init_lora_weights: bool | str,
    adapter_dtype: torch.dtype | None,
    use_rslora: bool = False,
) -> tuple[int, float, float]:
    """Refuses what :class:`DoraLayer` cannot be built with; r, lora_alpha and lora_dropout as Python's numbers."""
    r, lora_alpha = checks.python_number(r), checks.python_number(lora_alpha)
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an integer, got {r!r}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)):
        raise TypeError(f"lora_alpha must be a number, got {lora_alpha!r}")
    if not abs(lora_alpha) <= LARGEST_SCALING:
        raise ValueError(f"lora_alpha must be finite in float32, got {lora_alpha}")
    if not isinstance(use_rslora, bool):
        raise TypeError(f"use_rslora must be a bool, got {use_rslora!r}")
    lora_dropout = checks.check_dropout(lora_dropout, "lora_dropout")
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}")
    if adapter_dtype is not None and adapter_dtype not in FLOAT_DTYPES:
        raise TypeError(f"adapter_dtype must be float64, float32, bfloat16 or float16, got {adapter_dtype!r}")
    return r, lora_alpha, lora_dropout

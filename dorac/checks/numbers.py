"""Arguments that are no tensors, or tensors of numbers: scalings, budgets, dropout, switches."""

import numbers

import torch
from torch import Tensor

from dorac.checks.shapes import check_dense, check_device, check_float
from dorac.numerics import FLOAT_DTYPES, LARGEST_SCALING

_NUMBERS = (float, int, Tensor, torch.SymFloat, torch.SymInt)  # what the ops take as a number


def python_number(value: object) -> object:
    """A real number of NumPy's or another library's as Python's ``int`` or ``float``; anything else as it is."""
    if type(value) in (float, int, bool) or isinstance(value, (Tensor, torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value  # NumPy's float64 is a float, but not Dynamo's


def check_scaling(scaling: float | Tensor, name: str = "scaling") -> float | Tensor:
    """A number, finite in float32, or a 0-d float tensor (whose value is not read): returned, a number as Python's."""
    if type(scaling) is not float:
        scaling = python_number(scaling)
        if torch.compiler.is_compiling() and not isinstance(scaling, _NUMBERS) and hasattr(scaling, "__array__"):
            scaling = torch.as_tensor(scaling)  # for Dynamo NumPy's numbers are arrays
            scaling = scaling if scaling.is_floating_point() or scaling.dtype is torch.bool else scaling.double()
        if isinstance(scaling, Tensor):
            check_dense(name, scaling)
            if scaling.ndim != 0 or scaling.dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"{name} must be a number or a 0-d float tensor, got {scaling.dtype} of shape {list(scaling.shape)}"
                )
            return scaling
        if isinstance(scaling, bool) or not isinstance(scaling, _NUMBERS):
            raise TypeError(f"{name} must be a number or a 0-d float tensor, got {type(scaling).__name__}")
    if not -LARGEST_SCALING <= scaling <= LARGEST_SCALING:  # math.isfinite does not trace
        raise ValueError(f"{name} must be finite in float32, got {scaling}")
    return scaling


def check_scalings(scaling: Tensor, adapters: int, like: Tensor, letter: str = "K") -> None:
    """A float ``[K]`` tensor, one scaling for each adapter."""
    check_float("scaling", scaling)
    if list(scaling.shape) != [adapters]:
        raise ValueError(f"scaling must be a number, 0-d or [{letter}] = [{adapters}], got shape {list(scaling.shape)}")
    check_device("scaling", scaling, like)


def check_budget(budget: int) -> int:
    """A number of bytes, returned as Python's."""
    budget = python_number(budget)
    if isinstance(budget, bool) or not isinstance(budget, (int, torch.SymInt)):
        raise TypeError(f"budget must be a number of bytes, got {type(budget).__name__}")
    if budget < 1:
        raise ValueError(f"budget must be at least one byte, got {budget}")
    return budget


def check_norm_grad(norm_grad: bool, weight_norm: Tensor | None = None) -> None:
    """A bool, and False with a given norm: whether gradient flows through that one was settled where it was made."""
    if not isinstance(norm_grad, bool):
        raise TypeError(f"norm_grad must be a bool, got {type(norm_grad).__name__}")
    if norm_grad and weight_norm is not None:
        raise ValueError(
            "norm_grad must be False where weight_norm is given: gradient flows through a norm that carries one, "
            "as norm_factored(..., norm_grad=True) returns it"
        )


def check_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    """A probability below 1, returned as Python's number."""
    if type(dropout_p) is not float:
        dropout_p = python_number(dropout_p)
        if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {dropout_p}")
    return dropout_p


def check_dropout_on(dropout_on: str) -> None:
    """One of the two meanings of dropout."""
    if not isinstance(dropout_on, str) or dropout_on not in ("adapter", "low_rank"):
        raise ValueError(f"dropout_on must be 'adapter' or 'low_rank', got {dropout_on!r}")

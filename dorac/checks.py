"""Validation of arguments by their metadata alone, so that it costs no synchronisation and runs while compiling too.

A ``TypeError`` names a wrong kind or dtype, a ``ValueError`` a wrong shape, device or value; each says what was
expected and what came.
"""

import torch
from torch import Tensor

from dorac.numerics import FLOAT_DTYPES

_DTYPE_NAMES = "float64, float32, bfloat16 or float16"


def _check_float(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, got {tensor.dtype}; dequantise it first if it is quantised")


def _check_device(name: str, tensor: Tensor, weight: Tensor, weight_name: str = "weight") -> None:
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like {weight_name}, got {tensor.device}")


def check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, batched: bool = True) -> None:
    """``weight [out, in]``, ``lora_A [r, in]``, ``lora_B [out, r]`` on one device; the factors share a dtype.

    With ``batched`` also ``[E, out, in]``, ``[E, r, in]`` and ``[E, out, r]``.
    """
    _check_float("weight", weight)
    if weight.ndim != 2 and not (batched and weight.ndim == 3):
        expected = "2 dimensions, or 3 with experts" if batched else "2 dimensions"
        raise ValueError(f"weight must have {expected}, got shape {list(weight.shape)}")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        _check_float(name, tensor)
        if tensor.ndim != weight.ndim:
            raise ValueError(f"{name} must have {weight.ndim} dimensions like weight, got shape {list(tensor.shape)}")
        _check_device(name, tensor, weight)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_A and lora_B must share a dtype, got {lora_A.dtype} and {lora_B.dtype}")
    *experts, out_features, in_features = weight.shape
    e = "E, " if experts else ""
    rank = lora_A.shape[-2]
    if rank < 1:
        raise ValueError(f"lora_A must have a rank of at least 1, got shape {list(lora_A.shape)}")
    if list(lora_A.shape) != [*experts, rank, in_features]:
        expected = f"[{e}r, in] = {[*experts, rank, in_features]}"
        raise ValueError(f"lora_A must be {expected} for weight {list(weight.shape)}, got {list(lora_A.shape)}")
    if list(lora_B.shape) != [*experts, out_features, rank]:
        expected = f"[{e}out, r] = {[*experts, out_features, rank]}"
        raise ValueError(f"lora_B must be {expected} for this weight and lora_A, got {list(lora_B.shape)}")


def check_scaling(scaling: float | Tensor) -> None:
    """A finite Python number or a 0-d float tensor (whose value is not read)."""
    if isinstance(scaling, Tensor):
        if scaling.ndim != 0 or scaling.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"scaling must be a number or a 0-d float tensor, got {scaling.dtype} of shape {list(scaling.shape)}"
            )
        return
    if not isinstance(scaling, (int, float, torch.SymFloat)):
        raise TypeError(f"scaling must be a number or a 0-d float tensor, got {type(scaling).__name__}")
    if scaling - scaling != 0:  # math.isfinite does not trace
        raise ValueError(f"scaling must be finite, got {scaling}")


def _check_rows(name: str, vector: Tensor, rows: torch.Size, like: Tensor, like_name: str) -> None:
    _check_float(name, vector)
    if vector.shape != rows:
        letters = "[out]" if len(rows) == 1 else "[E, out]"
        raise ValueError(f"{name} must be {letters} = {list(rows)}, got shape {list(vector.shape)}")
    _check_device(name, vector, like, like_name)


def check_vector(name: str, vector: Tensor | None, weight: Tensor) -> None:
    """A float ``[out]`` vector (``[E, out]`` with experts) on the weight's device, or nothing."""
    if vector is not None:
        _check_rows(name, vector, weight.shape[:-1], weight, "weight")


def check_magnitude(magnitude: Tensor, weight_norm: Tensor) -> None:
    """A magnitude for these norms."""
    _check_rows("magnitude", magnitude, weight_norm.shape, weight_norm, "weight_norm")


def check_budget(budget: int) -> None:
    if not isinstance(budget, (int, torch.SymInt)):
        raise TypeError(f"budget must be a number of bytes, got {type(budget).__name__}")
    if budget < 1:
        raise ValueError(f"budget must be at least one byte, got {budget}")


def check_norm_grad(norm_grad: bool, weight_norm: Tensor | None = None) -> None:
    """A bool, and False with a given norm: whether gradient flows through that one was settled where it was made."""
    if not isinstance(norm_grad, bool):
        raise TypeError(f"norm_grad must be a bool, got {type(norm_grad).__name__}")
    if norm_grad and weight_norm is not None:
        raise ValueError(
            "norm_grad must be False where weight_norm is given: gradient flows through a norm that carries one, "
            "as norm_factored(..., norm_grad=True) returns it"
        )


def check_dropout(dropout_p: float) -> None:
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def check_compose(base: Tensor, lora: Tensor, mag_scale: Tensor, bias: Tensor | None, delta: bool) -> None:
    """``base`` and ``lora`` of one shape ``[*, out]``, ``mag_scale`` and ``bias`` ``[out]``; no bias with ``delta``."""
    for name, tensor in (("base", base), ("lora", lora)):
        _check_float(name, tensor)
    if base.ndim == 0 or base.shape != lora.shape:
        raise ValueError(f"base and lora must share a shape [*, out], got {list(base.shape)} and {list(lora.shape)}")
    _check_device("lora", lora, base, "base")
    for name, vector in (("mag_scale", mag_scale), ("bias", bias)):
        if vector is None and name == "bias":
            continue
        _check_float(name, vector)
        if vector.ndim != 1 or vector.shape[0] != base.shape[-1]:
            raise ValueError(f"{name} must be [out] = [{base.shape[-1]}], got shape {list(vector.shape)}")
        _check_device(name, vector, base, "base")
    if delta and bias is not None:
        raise ValueError("bias must be None in the delta form: its base excludes the bias, which DoRA leaves as it is")


def check_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor | None,
) -> None:
    """All tensors of ``dora_linear``."""
    check_factors(weight, lora_A, lora_B, batched=False)
    check_adapter(weight, lora_A, lora_B, magnitude, weight_norm)
    _check_float("x", x)
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [*, in] with in = {weight.shape[1]}, got shape {list(x.shape)}")
    _check_device("x", x, weight)
    device = weight.device.type
    if x.dtype != weight.dtype and not (device != "meta" and torch.is_autocast_enabled(device)):
        raise TypeError(f"x must have the dtype of weight, {weight.dtype}, outside autocast, got {x.dtype}")
    check_vector("bias", bias, weight)


def check_adapter(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor | None
) -> None:
    """The factors with a magnitude and a norm."""
    check_factors(weight, lora_A, lora_B)
    _check_float("magnitude", magnitude)
    check_vector("magnitude", magnitude, weight)
    check_vector("weight_norm", weight_norm, weight)

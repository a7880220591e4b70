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


def check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """``weight [out, in]``, ``lora_A [r, in]``, ``lora_B [out, r]`` on one device; the factors share a dtype.

    With experts ``[E, out, in]``, ``[E, r, in]`` and ``[E, out, r]``.
    """
    _check_float("weight", weight)
    if weight.ndim not in (2, 3):
        raise ValueError(f"weight must have 2 dimensions, or 3 with experts, got shape {list(weight.shape)}")
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
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if list(tensor.shape[: len(experts)]) != experts:
            raise ValueError(
                f"{name} must have E = {experts[0]} experts like weight {list(weight.shape)}, got {list(tensor.shape)}"
            )
    if list(lora_A.shape) != [*experts, rank, in_features]:
        expected = f"[{e}r, in] = {[*experts, rank, in_features]}"
        raise ValueError(f"lora_A must be {expected} for weight {list(weight.shape)}, got {list(lora_A.shape)}")
    if list(lora_B.shape) != [*experts, out_features, rank]:
        expected = f"[{e}out, r] = {[*experts, out_features, rank]}"
        raise ValueError(f"lora_B must be {expected} for this weight and lora_A, got {list(lora_B.shape)}")


def check_scaling(scaling: float | Tensor, name: str = "scaling") -> None:
    """A finite Python number or a 0-d float tensor (whose value is not read)."""
    if isinstance(scaling, Tensor):
        if scaling.ndim != 0 or scaling.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be a number or a 0-d float tensor, got {scaling.dtype} of shape {list(scaling.shape)}"
            )
        return
    if not isinstance(scaling, (int, float, torch.SymFloat)):
        raise TypeError(f"{name} must be a number or a 0-d float tensor, got {type(scaling).__name__}")
    if scaling - scaling != 0:  # math.isfinite does not trace
        raise ValueError(f"{name} must be finite, got {scaling}")


def check_scalings(scaling: Tensor, adapters: int, like: Tensor) -> None:
    """A float ``[K]`` tensor, one scaling for each adapter."""
    _check_float("scaling", scaling)
    if list(scaling.shape) != [adapters]:
        raise ValueError(f"scaling must be a number, 0-d or [K] = [{adapters}], got shape {list(scaling.shape)}")
    _check_device("scaling", scaling, like)


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
    check_adapter(weight, lora_A, lora_B, magnitude, weight_norm)
    _check_float("x", x)
    *experts, _, in_features = weight.shape
    if x.ndim <= len(experts) or x.shape[-1] != in_features or list(x.shape[: len(experts)]) != experts:
        expected = f"[E, *, in] with E = {experts[0]} and" if experts else "[*, in] with"
        raise ValueError(f"x must be {expected} in = {in_features}, got shape {list(x.shape)}")
    _check_device("x", x, weight)
    check_activation_dtype(x, weight)
    check_vector("bias", bias, weight)


def check_activation_dtype(x: Tensor, weight: Tensor) -> None:
    """The activation's dtype is the weight's, or what autocast makes of both."""
    device = weight.device.type
    if x.dtype != weight.dtype and not (device != "meta" and torch.is_autocast_enabled(device)):
        raise TypeError(f"x must have the dtype of weight, {weight.dtype}, outside autocast, got {x.dtype}")


def _check_index(name: str, index: Tensor, letters: str, shape: list[int], like: Tensor, like_name: str) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {index.dtype}")
    if list(index.shape) != shape:
        raise ValueError(f"{name} must be {letters} = {shape}, got shape {list(index.shape)}")
    _check_device(name, index, like, like_name)


def check_grouped(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor | None,
    offsets: Tensor,
) -> None:
    """All tensors of ``dora_linear_grouped``."""
    check_adapter(weight, lora_A, lora_B, magnitude, weight_norm)
    if weight.ndim != 3:
        raise ValueError(f"weight must be [E, out, in], got shape {list(weight.shape)}")
    _check_float("x", x)
    if x.ndim != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must be [S, in] with in = {weight.shape[2]}, got shape {list(x.shape)}")
    _check_device("x", x, weight)
    check_activation_dtype(x, weight)
    check_vector("bias", bias, weight)
    _check_index("offsets", offsets, "[E]", [weight.shape[0]], weight, "weight")


def check_stack(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """``weight [out, in]``, ``lora_A [K, r, in]`` and ``lora_B [K, out, r]`` of at least one adapter."""
    for name, stack in (("lora_A", lora_A), ("lora_B", lora_B)):
        if isinstance(stack, (list, tuple)):
            raise TypeError(
                f"{name} must be one stack of adapters, got a {type(stack).__name__}; stack them, those of smaller "
                "rank padded with zeros (stack_adapters does both)"
            )
    _check_float("weight", weight)
    _check_float("lora_A", lora_A)
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    if lora_A.ndim != 3 or lora_A.shape[0] < 1:
        raise ValueError(f"lora_A must be [K, r, in] with at least one adapter, got shape {list(lora_A.shape)}")
    check_factors(weight.expand(lora_A.shape[0], *weight.shape), lora_A, lora_B)


def check_mixed(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor | None,
    adapter_index: Tensor,
) -> None:
    """All tensors of ``dora_linear_mixed``."""
    check_stack(weight, lora_A, lora_B)
    check_adapter(weight.expand(lora_A.shape[0], *weight.shape), lora_A, lora_B, magnitude, weight_norm)
    _check_float("x", x)
    if x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [N, *, in] with in = {weight.shape[1]}, got shape {list(x.shape)}")
    _check_device("x", x, weight)
    check_activation_dtype(x, weight)
    check_vector("bias", bias, weight)
    _check_index("adapter_index", adapter_index, "[N]", [x.shape[0]], x, "x")


def check_adapter(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor | None
) -> None:
    """The factors with a magnitude and a norm."""
    check_factors(weight, lora_A, lora_B)
    _check_float("magnitude", magnitude)
    check_vector("magnitude", magnitude, weight)
    check_vector("weight_norm", weight_norm, weight)

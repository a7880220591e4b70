"""The tensors of linear layers: alone, over a product, in a block, of experts, grouped rows and mixed adapters.

Legend: ``out``, ``in`` features, ``r`` the rank, ``E`` experts, ``K`` adapters, ``N`` rows, ``S`` rows of all experts.
"""

import torch
from torch import Tensor

from dorac.checks.shapes import Layout, are_usual, check_device, check_float, check_index, fit, layouts
from dorac.packed import Packed, is_packed


def _of_layer(stacked: str = "", **others: str) -> dict[str, Layout]:
    return layouts(
        lora_A=f"{stacked} r in |  for this weight, got",
        lora_B=f"{stacked} out r |  for this weight and lora_A, got",
        magnitude=f"{stacked} out",
        **dict.fromkeys(("weight_norm", "weight_sq", "bias"), f"{stacked} out?"),
        **{"x": f"{stacked} * in"} | others,
    )


_LAYER = {stacked: _of_layer(stacked) for stacked in ("", "E", "K")}
_GROUPED = _of_layer("E", x="S in", offsets="E")
_MIXED = layouts(x="N * in", bias="out?", adapter_index="N", ranks="K?")
_STACK = layouts(
    weight="out in",
    lora_A="K+ r in |  with at least one adapter, got shape",
    lora_B="K+ out r |  with at least one adapter, got shape",
)
_IN_BLOCK = layouts(x="* in", magnitude="out?", bias="out?", weight_norm="out?")
_OF_COLUMNS = {name: layouts(magnitude=name, weight_norm=f"{name}?") for name in ("in", "vocab")}
_OVER = layouts(
    weight="out in |  for this base and x, got shape",
    lora_A="r+ in |  for this x, got shape",
    lora_B="out r |  for this base and lora_A, got shape",
    magnitude="out?",
    weight_norm="out",
    bias="out?",
)
_COMPOSE = layouts(mag_scale="out", bias="out?")


def check_pair(weight: Tensor | Packed, lora_A: Tensor, lora_B: Tensor) -> None:
    """Two float factors of as many dimensions as the weight, on its device, of one dtype."""
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_float(name, tensor)
        if tensor.ndim != weight.ndim:
            raise ValueError(f"{name} must have {weight.ndim} dimensions like weight, got shape {list(tensor.shape)}")
        check_device(name, tensor, weight)
    _check_one_dtype(lora_A, lora_B)


def _check_one_dtype(lora_A: Tensor, lora_B: Tensor) -> None:
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_A and lora_B must share a dtype, got {lora_A.dtype} and {lora_B.dtype}")


def check_rank(rank: int, lora_A: Tensor) -> None:
    """At least 1."""
    if rank < 1:
        raise ValueError(f"lora_A must have a rank of at least 1, got shape {list(lora_A.shape)}")


def check_activation_dtype(x: Tensor, weight: Tensor) -> None:
    """The activation's dtype is the weight's, or what autocast makes of both."""
    if x.dtype == weight.dtype:
        return
    device = weight.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        raise TypeError(f"x must have the dtype of weight, {weight.dtype}, outside autocast, got {x.dtype}")
    if torch.float64 in (x.dtype, weight.dtype):
        raise TypeError(
            f"x must have the dtype of weight, {weight.dtype}, got {x.dtype}: autocast leaves float64 as it is"
        )


def _check_weight(weight: Tensor) -> None:
    check_float("weight", weight)
    if weight.ndim not in (2, 3):
        raise ValueError(f"weight must have 2 dimensions, or 3 with experts, got shape {list(weight.shape)}")


def _check_alone(weight: Tensor | Packed) -> None:
    """No weight of experts."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")


def _sizes(weight: Tensor | Packed) -> dict[str, int]:
    return dict(zip(("E", "out", "in")[-weight.ndim :], weight.shape, strict=True))


def _fit_layer(weight: Tensor | Packed, lora_A: Tensor, lora_B: Tensor, **tensors: Tensor | None) -> None:
    """Factors, and what else a layer of this weight has."""
    check_pair(weight, lora_A, lora_B)
    sizes = _sizes(weight) | {"r": lora_A.shape[-2]}
    check_rank(sizes["r"], lora_A)
    fit(_LAYER["E" if "E" in sizes else ""], sizes, weight, lora_A=lora_A, lora_B=lora_B, **tensors)


def check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """``weight [out, in]``, ``lora_A [r, in]``, ``lora_B [out, r]`` on one device; the factors share a dtype.

    With experts ``[E, out, in]``, ``[E, r, in]`` and ``[E, out, r]``.
    """
    _check_weight(weight)
    _fit_layer(weight, lora_A, lora_B)


def check_packed_factors(weight: Packed, lora_A: Tensor, lora_B: Tensor) -> None:
    """The same of a packed weight, whose pieces have to fit together."""
    weight.check()
    _fit_layer(weight, lora_A, lora_B)


def check_adapter(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor | None
) -> None:
    """The factors with a magnitude and a norm."""
    _check_weight(weight)
    _fit_layer(weight, lora_A, lora_B, magnitude=magnitude, weight_norm=weight_norm)


def check_vector(name: str, vector: Tensor | None, weight: Tensor | Packed) -> None:
    """A float ``[out]`` vector (``[E, out]`` with experts) on the weight's device, or nothing."""
    sizes = _sizes(weight)
    fit(_LAYER["E" if "E" in sizes else ""], sizes, weight, **{name: vector})


def _check_rows(name: str, vector: Tensor, rows: torch.Size, like: Tensor, like_name: str) -> None:
    """As many as there are rows, whatever they are of."""
    check_float(name, vector)
    if vector.shape != rows:
        letters = "[out]" if len(rows) == 1 else "[E, out]"
        raise ValueError(f"{name} must be {letters} = {list(rows)}, got shape {list(vector.shape)}")
    check_device(name, vector, like, like_name)


def check_magnitude(magnitude: Tensor, weight_norm: Tensor) -> None:
    """A magnitude for these norms."""
    check_float("weight_norm", weight_norm)
    _check_rows("magnitude", magnitude, weight_norm.shape, weight_norm, "weight_norm")


def check_scaled_rows(lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor) -> None:
    """A magnitude for these norms, and a ``lora_B [out, r, *]`` with a row for each."""
    check_magnitude(magnitude, weight_norm)
    check_float("lora_B", lora_B)
    _check_rows("weight_norm", weight_norm, lora_B.shape[: max(1, weight_norm.ndim)], lora_B, "lora_B")


def check_compose(
    base: Tensor, lora: Tensor, mag_scale: Tensor, bias: Tensor | None, delta: bool, dim: int = -1
) -> None:
    """``base`` and ``lora`` of one shape ``[*, out]``, ``mag_scale`` and ``bias`` ``[out]``; no bias with ``delta``."""
    for name, tensor in (("base", base), ("lora", lora)):
        check_float(name, tensor)
    if base.ndim == 0 or base.shape != lora.shape:
        raise ValueError(f"base and lora must share a shape [*, out], got {list(base.shape)} and {list(lora.shape)}")
    check_device("lora", lora, base, "base")
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, got {type(dim).__name__}")
    if not -base.ndim <= dim < base.ndim:
        raise ValueError(f"dim must be a dimension of base, whose shape is {list(base.shape)}, got {dim}")
    fit(_COMPOSE, {"out": base.shape[dim]}, base, "base", mag_scale=mag_scale, bias=bias)
    if delta and bias is not None:
        raise ValueError("bias must be None in the delta form: its base excludes the bias, which DoRA leaves as it is")


def _adapter_fits(out_features, in_features, lora_A, lora_B, magnitude, bias, weight_norm) -> bool:
    """Whether dense float tensors are the adapter of such a layer, without experts.

    For the usual case, in few operations, without a sentence: Dynamo goes through checks operation by operation, for
    each layer of a model anew, and all of them take it as long as the rest of the layer.
    """
    if lora_A is None or lora_B is None or magnitude is None or lora_A.ndim != 2:
        return False
    rank, rows = lora_A.shape[0], (out_features,)
    return (
        rank >= 1
        and lora_A.shape[1] == in_features
        and lora_B.shape == (out_features, rank)
        and lora_A.dtype == lora_B.dtype
        and magnitude.shape == rows
        and (bias is None or bias.shape == rows)
        and (weight_norm is None or weight_norm.shape == rows)
    )


def check_linear(x, weight, lora_A, lora_B, magnitude, bias, weight_norm) -> None:
    """All tensors of ``dora_linear``."""
    adapter = lora_A, lora_B, magnitude, bias, weight_norm
    if not (
        x is not None
        and weight is not None
        and are_usual(x, weight, *adapter)
        and weight.ndim == 2
        and x.ndim
        and _adapter_fits(*weight.shape, *adapter)
        and x.shape[-1] == weight.shape[1]
    ):
        _check_weight(weight)
        _fit_layer(weight, lora_A, lora_B, magnitude=magnitude, weight_norm=weight_norm, x=x, bias=bias)
    check_activation_dtype(x, weight)


def check_linear_columns(x, weight, lora_A, lora_B, magnitude, bias, weight_norm) -> None:
    """All tensors of ``dora_linear_columns``."""
    check_factors(weight, lora_A, lora_B)
    _check_alone(weight)
    check_columns(magnitude, weight_norm, weight, "in", weight.shape[1])
    fit(_LAYER[""], _sizes(weight), weight, x=x, bias=bias)
    check_activation_dtype(x, weight)


def check_columns(magnitude: Tensor, weight_norm: Tensor | None, weight: Tensor, name: str, columns: int) -> None:
    """A magnitude, and a norm or none, of a weight's columns."""
    fit(_OF_COLUMNS[name], {name: columns}, weight, magnitude=magnitude, weight_norm=weight_norm)


def check_projection(x, weight, lora_A, lora_B, magnitude, bias, weight_norm) -> None:
    """The tensors of a layer of a block, whose adapter may be plain LoRA's, or none."""
    if (lora_A is None) != (lora_B is None):
        raise ValueError(f"lora_A and lora_B come together, got {'lora_B' if lora_A is None else 'lora_A'} alone")
    for name, tensor, of, needed in (
        ("magnitude", magnitude, "lora_A and lora_B", lora_A),
        ("weight_norm", weight_norm, "a magnitude", magnitude),
    ):
        if tensor is not None and needed is None:
            raise ValueError(f"{name} needs {of}, got None")
    if is_packed(weight):
        weight.check()
    else:
        check_float("weight", weight)
    _check_alone(weight)
    if lora_A is not None:
        _fit_layer(weight, lora_A, lora_B)
    fit(_IN_BLOCK, _sizes(weight), weight, x=x, magnitude=magnitude, bias=bias, weight_norm=weight_norm)
    if not is_packed(weight):  # whose layer multiplies in x's dtype
        check_activation_dtype(x, weight)


def check_over(base, x, lora_A, lora_B, magnitude, bias, weight_norm) -> None:
    """The tensors of ``dora_over``: ``base [*, out]``, ``x [*, in]``, a linear layer's adapter."""
    adapter = lora_A, lora_B, magnitude, bias, weight_norm
    if (
        base is not None
        and x is not None
        and weight_norm is not None
        and are_usual(base, x, *adapter)
        and base.ndim
        and x.ndim
        and base.shape[:-1] == x.shape[:-1]
        and _adapter_fits(base.shape[-1], x.shape[-1], *adapter)
    ):
        return
    for name, tensor in (("base", base), ("x", x)):
        check_float(name, tensor)
        check_device(name, tensor, base, "base")
        if tensor.ndim == 0:
            raise ValueError(f"{name} must have a dimension of features, got a scalar")
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"base and x must share all but their last dimension, got shapes {list(base.shape)} and {list(x.shape)}"
        )
    sizes = {"out": base.shape[-1], "in": x.shape[-1]}
    fit(_OVER, sizes, base, "base", lora_A=lora_A, lora_B=lora_B)
    _check_one_dtype(lora_A, lora_B)
    fit(_OVER, sizes, base, "base", magnitude=magnitude, weight_norm=weight_norm, bias=bias)


def check_weight_over(weight: Tensor | Packed, base: Tensor, x: Tensor) -> None:
    """The weight, packed or dense, of which ``base`` is the product with ``x``."""
    if not isinstance(weight, Tensor) and not is_packed(weight):
        raise TypeError(f"weight must be a tensor or a packed weight, got {type(weight).__name__}")
    kind = check_float if isinstance(weight, Tensor) else _check_pieces
    fit(_OVER, {"out": base.shape[-1], "in": x.shape[-1]}, base, "base", kind, weight=weight)


def _check_pieces(name: str, weight: Packed) -> None:
    weight.check()


def check_grouped(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, offsets) -> None:
    """All tensors of ``dora_linear_grouped``."""
    if is_packed(weight):
        weight.check()
    else:
        _check_weight(weight)
    _fit_layer(weight, lora_A, lora_B, magnitude=magnitude, weight_norm=weight_norm)
    if weight.ndim != 3:
        raise ValueError(f"weight must be [E, out, in], got shape {list(weight.shape)}")
    sizes = _sizes(weight)
    fit(_GROUPED, sizes, weight, x=x, bias=bias)
    if not is_packed(weight):
        check_activation_dtype(x, weight)
    fit(_GROUPED, sizes, weight, "weight", check_index, offsets=offsets)


def check_stack(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """``weight [out, in]``, ``lora_A [K, r, in]`` and ``lora_B [K, out, r]`` of at least one adapter."""
    _fit_stack(weight, lora_A, lora_B)


def _fit_stack(weight: Tensor, lora_A: Tensor, lora_B: Tensor, **tensors: Tensor | None) -> dict[str, int]:
    for name, stack in (("lora_A", lora_A), ("lora_B", lora_B)):
        if isinstance(stack, (list, tuple)):
            raise TypeError(
                f"{name} must be one stack of adapters, got a {type(stack).__name__}; stack them, those of smaller "
                "rank padded with zeros (stack_adapters does both)"
            )
    fit(_STACK, {}, weight, weight=weight)
    fit(_STACK, {}, weight, lora_A=lora_A)
    fit(_STACK, {}, weight, lora_B=lora_B)
    _check_one_dtype(lora_A, lora_B)
    sizes = _sizes(weight) | {"K": lora_A.shape[0], "r": lora_A.shape[1]}
    check_rank(sizes["r"], lora_A)
    fit(_LAYER["K"], sizes, weight, lora_A=lora_A, lora_B=lora_B, **tensors)
    return sizes


def check_mixed(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, adapter_index, ranks=None) -> None:
    """All tensors of ``dora_linear_mixed``."""
    sizes = _fit_stack(weight, lora_A, lora_B, magnitude=magnitude, weight_norm=weight_norm)
    fit(_MIXED, sizes, weight, x=x, bias=bias)
    check_activation_dtype(x, weight)
    fit(_MIXED, sizes, x, "x", check_index, adapter_index=adapter_index)
    fit(_MIXED, sizes, weight, "weight", check_index, ranks=ranks)

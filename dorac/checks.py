"""Validation of arguments by their metadata alone, so that it costs no synchronisation and runs while compiling too.

A ``TypeError`` names a wrong kind or dtype, a ``ValueError`` a wrong shape, device or value; each says what was
expected and what came.
"""

import numbers

import torch
from torch import Tensor

from dorac.dense import PLAIN, not_dense
from dorac.numerics import FLOAT_DTYPES
from dorac.packed import Packed, is_packed

_DTYPE_NAMES = "float64, float32, bfloat16 or float16"
_NUMBERS = (float, int, Tensor, torch.SymFloat, torch.SymInt)  # what the ops take as a number
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")  # of nn.Conv


def _check_dense(name: str, tensor: Tensor, kind: str = "a tensor") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {kind}, got {type(tensor).__name__}")
    if reason := not_dense(tensor):
        raise TypeError(f"{name} must be a dense tensor, but it {reason}")


def check_float(name: str, tensor: Tensor) -> None:
    """A dense float tensor."""
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided or tensor.is_nested:
        _check_dense(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, got {tensor.dtype}; dequantise it first if it is quantised")


def _check_device(name: str, tensor: Tensor, weight: Tensor, weight_name: str = "weight") -> None:
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like {weight_name}, got {tensor.device}")


def _check_pair(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Two float factors of as many dimensions as the weight, on its device, of one dtype."""
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_float(name, tensor)
        if tensor.ndim != weight.ndim:
            raise ValueError(f"{name} must have {weight.ndim} dimensions like weight, got shape {list(tensor.shape)}")
        _check_device(name, tensor, weight)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_A and lora_B must share a dtype, got {lora_A.dtype} and {lora_B.dtype}")


def check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor, stacked: str = "E") -> None:
    """``weight [out, in]``, ``lora_A [r, in]``, ``lora_B [out, r]`` on one device; the factors share a dtype.

    With experts ``[E, out, in]``, ``[E, r, in]`` and ``[E, out, r]``; ``stacked`` is what errors call the E.
    """
    check_float("weight", weight)
    if weight.ndim not in (2, 3):
        raise ValueError(f"weight must have 2 dimensions, or 3 with experts, got shape {list(weight.shape)}")
    _check_factors_of(weight, lora_A, lora_B, stacked)


def check_packed_factors(weight: Packed, lora_A: Tensor, lora_B: Tensor) -> None:
    """The same of a packed weight, whose pieces have to fit together."""
    weight.check()
    _check_factors_of(weight, lora_A, lora_B, "E")


def _check_factors_of(weight: Tensor | Packed, lora_A: Tensor, lora_B: Tensor, stacked: str) -> None:
    _check_pair(weight, lora_A, lora_B)
    *experts, out_features, in_features = weight.shape
    e = f"{stacked}, " if experts else ""
    shape = list(lora_A.shape)
    rank = shape[-2]
    if rank < 1:
        raise ValueError(f"lora_A must have a rank of at least 1, got shape {shape}")
    if shape != [*experts, rank, in_features]:
        expected = f"[{e}r, in] = {[*experts, rank, in_features]}"
        raise ValueError(f"lora_A must be {expected} for this weight, got {shape}")
    if list(lora_B.shape) != [*experts, out_features, rank]:
        expected = f"[{e}out, r] = {[*experts, out_features, rank]}"
        raise ValueError(f"lora_B must be {expected} for this weight and lora_A, got {list(lora_B.shape)}")


def python_number(value: object) -> object:
    """A real number of NumPy's or another library's as Python's ``int`` or ``float``; anything else as it is."""
    if type(value) in (float, int, bool) or isinstance(value, (Tensor, torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value  # NumPy's float64 is a float, but not Dynamo's


def check_scaling(scaling: float | Tensor, name: str = "scaling") -> float | Tensor:
    """A finite number or a 0-d float tensor (whose value is not read): returned, a number as Python's."""
    if type(scaling) is not float:
        scaling = python_number(scaling)
        if torch.compiler.is_compiling() and not isinstance(scaling, _NUMBERS) and hasattr(scaling, "__array__"):
            scaling = torch.as_tensor(scaling)  # for Dynamo NumPy's numbers are arrays
            scaling = scaling if scaling.is_floating_point() or scaling.dtype is torch.bool else scaling.double()
        if isinstance(scaling, Tensor):
            _check_dense(name, scaling)
            if scaling.ndim != 0 or scaling.dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"{name} must be a number or a 0-d float tensor, got {scaling.dtype} of shape {list(scaling.shape)}"
                )
            return scaling
        if isinstance(scaling, bool) or not isinstance(scaling, _NUMBERS):
            raise TypeError(f"{name} must be a number or a 0-d float tensor, got {type(scaling).__name__}")
    if scaling - scaling != 0:  # math.isfinite does not trace
        raise ValueError(f"{name} must be finite, got {scaling}")
    return scaling


def check_scalings(scaling: Tensor, adapters: int, like: Tensor, letter: str = "K") -> None:
    """A float ``[K]`` tensor, one scaling for each adapter."""
    check_float("scaling", scaling)
    if list(scaling.shape) != [adapters]:
        raise ValueError(f"scaling must be a number, 0-d or [{letter}] = [{adapters}], got shape {list(scaling.shape)}")
    _check_device("scaling", scaling, like)


def _check_rows(name: str, vector: Tensor, rows: torch.Size, like: Tensor, like_name: str, stacked: str = "E") -> None:
    check_float(name, vector)
    if vector.shape != rows:
        letters = "[out]" if len(rows) == 1 else f"[{stacked}, out]"
        raise ValueError(f"{name} must be {letters} = {list(rows)}, got shape {list(vector.shape)}")
    _check_device(name, vector, like, like_name)


def check_vector(name: str, vector: Tensor | None, weight: Tensor, stacked: str = "E") -> None:
    """A float ``[out]`` vector (``[E, out]`` with experts) on the weight's device, or nothing."""
    if vector is not None:
        _check_rows(name, vector, weight.shape[:-1], weight, "weight", stacked)


def check_magnitude(magnitude: Tensor, weight_norm: Tensor) -> None:
    """A magnitude for these norms."""
    check_float("weight_norm", weight_norm)
    _check_rows("magnitude", magnitude, weight_norm.shape, weight_norm, "weight_norm")


def check_scaled_rows(lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor) -> None:
    """A magnitude for these norms, and a ``lora_B [out, r, *]`` with a row for each."""
    check_magnitude(magnitude, weight_norm)
    check_float("lora_B", lora_B)
    _check_rows("weight_norm", weight_norm, lora_B.shape[: max(1, weight_norm.ndim)], lora_B, "lora_B")


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


def check_compose(
    base: Tensor, lora: Tensor, mag_scale: Tensor, bias: Tensor | None, delta: bool, dim: int = -1
) -> None:
    """``base`` and ``lora`` of one shape ``[*, out]``, ``mag_scale`` and ``bias`` ``[out]``; no bias with ``delta``."""
    for name, tensor in (("base", base), ("lora", lora)):
        check_float(name, tensor)
    if base.ndim == 0 or base.shape != lora.shape:
        raise ValueError(f"base and lora must share a shape [*, out], got {list(base.shape)} and {list(lora.shape)}")
    _check_device("lora", lora, base, "base")
    if not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, got {type(dim).__name__}")
    if not -base.ndim <= dim < base.ndim:
        raise ValueError(f"dim must be a dimension of base, whose shape is {list(base.shape)}, got {dim}")
    for name, vector in (("mag_scale", mag_scale), ("bias", bias)):
        if vector is None and name == "bias":
            continue
        check_float(name, vector)
        if vector.ndim != 1 or vector.shape[0] != base.shape[dim]:
            raise ValueError(f"{name} must be [out] = [{base.shape[dim]}], got shape {list(vector.shape)}")
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
    check_factors(weight, lora_A, lora_B)
    shape = weight.shape
    rows = shape[:-1]
    _check_rows("magnitude", magnitude, rows, weight, "weight")
    if weight_norm is not None:
        _check_rows("weight_norm", weight_norm, rows, weight, "weight")
    _check_input(x, weight, bias)


def check_linear_columns(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor | None,
) -> None:
    """All tensors of ``dora_linear_columns``."""
    check_factors(weight, lora_A, lora_B)
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    _check_columns(magnitude, weight_norm, weight, "in", weight.shape[1])
    _check_input(x, weight, bias)


def _check_columns(magnitude: Tensor, weight_norm: Tensor | None, weight: Tensor, letter: str, columns: int) -> None:
    for name, vector in (("magnitude", magnitude), ("weight_norm", weight_norm)):
        if vector is None and name == "weight_norm":
            continue
        check_float(name, vector)
        if list(vector.shape) != [columns]:
            raise ValueError(f"{name} must be [{letter}] = [{columns}], got shape {list(vector.shape)}")
        _check_device(name, vector, weight)


def _check_input(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """What a linear layer of this weight takes beside its adapter."""
    check_float("x", x)
    *experts, _, in_features = weight.shape
    rows, shape = weight.shape[:-1], x.shape
    fits = len(shape) > len(experts) and shape[-1] == in_features
    if not fits or (experts and list(shape[: len(experts)]) != experts):
        expected = f"[E, *, in] with E = {experts[0]} and" if experts else "[*, in] with"
        raise ValueError(f"x must be {expected} in = {in_features}, got shape {list(shape)}")
    _check_device("x", x, weight)
    check_activation_dtype(x, weight)
    if bias is not None:
        _check_rows("bias", bias, rows, weight, "weight")


def check_projection(
    x: Tensor,
    weight: Tensor | Packed,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    magnitude: Tensor | None,
    bias: Tensor | None,
    weight_norm: Tensor | None,
) -> None:
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
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    if lora_A is not None:
        _check_factors_of(weight, lora_A, lora_B, "E")
    check_float("x", x)
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [*, in] with in = {weight.shape[1]}, got shape {list(x.shape)}")
    _check_device("x", x, weight)
    if not is_packed(weight):  # whose layer multiplies in x's dtype
        check_activation_dtype(x, weight)
    for name, vector in (("magnitude", magnitude), ("bias", bias), ("weight_norm", weight_norm)):
        if vector is not None:
            _check_rows(name, vector, torch.Size(weight.shape[:1]), weight, "weight")


def check_over(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor,
) -> None:
    """The tensors of ``dora_over``: ``base [*, out]``, ``x [*, in]``, a linear layer's adapter."""
    for name, tensor in (("base", base), ("x", x), ("lora_A", lora_A), ("lora_B", lora_B)):
        check_float(name, tensor)
        _check_device(name, tensor, base, "base")
    for name, tensor in (("base", base), ("x", x)):
        if tensor.ndim == 0:
            raise ValueError(f"{name} must have a dimension of features, got a scalar")
    if base.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"base and x must share all but their last dimension, got shapes {list(base.shape)} and {list(x.shape)}"
        )
    if lora_A.ndim != 2 or lora_A.shape[0] < 1 or lora_A.shape[1] != x.shape[-1]:
        raise ValueError(f"lora_A must be [r, in] with in = {x.shape[-1]} for this x, got shape {list(lora_A.shape)}")
    if list(lora_B.shape) != [base.shape[-1], lora_A.shape[0]]:
        expected = [base.shape[-1], lora_A.shape[0]]
        raise ValueError(
            f"lora_B must be [out, r] = {expected} for this base and lora_A, got shape {list(lora_B.shape)}"
        )
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_A and lora_B must share a dtype, got {lora_A.dtype} and {lora_B.dtype}")
    for name, vector in (("magnitude", magnitude), ("weight_norm", weight_norm), ("bias", bias)):
        if vector is not None or name == "weight_norm":
            _check_rows(name, vector, base.shape[-1:], base, "base")


def check_weight_over(weight: Tensor | Packed, base: Tensor, x: Tensor) -> None:
    """The weight, packed or dense, of which ``base`` is the product with ``x``."""
    if isinstance(weight, Tensor):
        check_float("weight", weight)
    elif is_packed(weight):
        weight.check()
    else:
        raise TypeError(f"weight must be a tensor or a packed weight, got {type(weight).__name__}")
    expected = [base.shape[-1], x.shape[-1]]
    if list(weight.shape) != expected:
        raise ValueError(f"weight must be [out, in] = {expected} for this base and x, got shape {list(weight.shape)}")
    _check_device("weight", weight, base, "base")


def check_activation_dtype(x: Tensor, weight: Tensor) -> None:
    """The activation's dtype is the weight's, or what autocast makes of both."""
    device = weight.device.type
    if x.dtype != weight.dtype and not (device != "meta" and torch.is_autocast_enabled(device)):
        raise TypeError(f"x must have the dtype of weight, {weight.dtype}, outside autocast, got {x.dtype}")


def check_embedding(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor | None
) -> None:
    """The tensors of ``dora_embedding``: ``weight [vocab, dim]``, ``lora_A [r, vocab]``, ``lora_B [dim, r]``."""
    _check_table(x, weight, lora_A, lora_B)
    check_adapter(weight.t(), lora_A, lora_B, magnitude, weight_norm)


def check_embedding_columns(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor | None
) -> None:
    """The tensors of ``dora_embedding_columns``."""
    _check_table(x, weight, lora_A, lora_B)
    check_factors(weight.t(), lora_A, lora_B)
    _check_columns(magnitude, weight_norm, weight, "vocab", weight.shape[0])


def _check_table(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Indices, an embedding's weight and factors in PEFT's layout."""
    _check_dense("x", x, "a tensor of indices")
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"x must hold int64 or int32 indices, got {x.dtype}")
    check_float("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must be [vocab, dim], got shape {list(weight.shape)}")
    _check_device("x", x, weight)
    vocab, dim = weight.shape
    for name, tensor, layout, axis, size in (
        ("lora_A", lora_A, f"[r, vocab] = [r, {vocab}]", -1, vocab),
        ("lora_B", lora_B, f"[dim, r] = [{dim}, r]", 0, dim),
    ):
        check_float(name, tensor)
        if tensor.ndim != 2 or tensor.shape[axis] != size:
            raise ValueError(
                f"{name} must be {layout} for an embedding [vocab, dim] = {list(weight.shape)} (PEFT's "
                f"lora_embedding_{name[-1]} as stored, not its transpose), got shape {list(tensor.shape)}"
            )


def check_lookup(padding_idx: int | None, scale_grad_by_freq: bool, sparse: bool, vocab: int) -> None:
    """How an embedding treats the gradients of its table."""
    if padding_idx is not None:
        if isinstance(padding_idx, bool) or not isinstance(padding_idx, (int, torch.SymInt)):
            raise TypeError(f"padding_idx must be an integer or None, got {padding_idx!r}")
        if not -vocab <= padding_idx < vocab:
            raise ValueError(f"padding_idx must be in [{-vocab}, {vocab}), got {padding_idx}")
    if sparse and scale_grad_by_freq:
        raise ValueError("sparse must be False with scale_grad_by_freq: torch does not scale sparse gradients")


def _check_index(name: str, index: Tensor, letters: str, shape: list[int], like: Tensor, like_name: str) -> None:
    _check_dense(name, index)
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
    if is_packed(weight):
        check_packed_factors(weight, lora_A, lora_B)
        _check_scale(weight, magnitude, weight_norm)
    else:
        check_adapter(weight, lora_A, lora_B, magnitude, weight_norm)
    if weight.ndim != 3:
        raise ValueError(f"weight must be [E, out, in], got shape {list(weight.shape)}")
    check_float("x", x)
    if x.ndim != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"x must be [S, in] with in = {weight.shape[2]}, got shape {list(x.shape)}")
    _check_device("x", x, weight)
    if not is_packed(weight):
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
    check_float("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out, in], got shape {list(weight.shape)}")
    for name, stack, letters in (("lora_A", lora_A, "[K, r, in]"), ("lora_B", lora_B, "[K, out, r]")):
        check_float(name, stack)
        if stack.ndim != 3 or stack.shape[0] < 1:
            raise ValueError(f"{name} must be {letters} with at least one adapter, got shape {list(stack.shape)}")
    check_factors(weight.expand(lora_A.shape[0], *weight.shape), lora_A, lora_B, "K")


def check_mixed(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor | None,
    adapter_index: Tensor,
    ranks: Tensor | None = None,
) -> None:
    """All tensors of ``dora_linear_mixed``."""
    check_stack(weight, lora_A, lora_B)
    _check_scale(weight.expand(lora_A.shape[0], *weight.shape), magnitude, weight_norm, "K")
    check_float("x", x)
    if x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [N, *, in] with in = {weight.shape[1]}, got shape {list(x.shape)}")
    _check_device("x", x, weight)
    check_activation_dtype(x, weight)
    check_vector("bias", bias, weight)
    _check_index("adapter_index", adapter_index, "[N]", [x.shape[0]], x, "x")
    if ranks is not None:
        _check_index("ranks", ranks, "[K]", [lora_A.shape[0]], weight, "weight")


def check_adapter(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor | None
) -> None:
    """The factors with a magnitude and a norm."""
    check_factors(weight, lora_A, lora_B)
    _check_scale(weight, magnitude, weight_norm)


def _check_scale(weight: Tensor, magnitude: Tensor, weight_norm: Tensor | None, stacked: str = "E") -> None:
    """A magnitude, and a norm or none."""
    _check_rows("magnitude", magnitude, weight.shape[:-1], weight, "weight", stacked)
    check_vector("weight_norm", weight_norm, weight, stacked)


def check_conv_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor, groups: int) -> None:
    """``weight [out, in/G, k...]``, ``lora_A [r, in/G or in, k...]``, ``lora_B [out, r/G, 1...]`` of a convolution."""
    check_float("weight", weight)
    if not 3 <= weight.ndim <= 5:
        raise ValueError(f"weight must be [out, in/groups, k...] with 1 to 3 k, got shape {list(weight.shape)}")
    _check_pair(weight, lora_A, lora_B)
    if isinstance(groups, bool) or not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups must be an integer, got {type(groups).__name__}")
    out_channels, channels, *kernel = weight.shape
    if groups < 1 or out_channels % groups:
        raise ValueError(f"groups must be at least 1 and divide the {out_channels} output channels, got {groups}")
    rank = lora_A.shape[0]
    if rank < 1:
        raise ValueError(f"lora_A must have a rank of at least 1, got shape {list(lora_A.shape)}")
    if rank % groups:
        raise ValueError(f"lora_A must have a rank that groups={groups} divides, got a rank of {rank}")
    if list(lora_A.shape[2:]) != kernel or lora_A.shape[1] not in (channels, channels * groups):
        expected = f"[r, in, k...] = {[rank, channels * groups, *kernel]}"
        expected += f" or [r, in/groups, k...] = {[rank, channels, *kernel]}" if groups > 1 else ""
        raise ValueError(f"lora_A must be {expected} for weight {list(weight.shape)}, got {list(lora_A.shape)}")
    if list(lora_B.shape) != [out_channels, rank // groups, *[1] * len(kernel)]:
        expected = f"[out, r/groups, 1...] = {[out_channels, rank // groups, *[1] * len(kernel)]}"
        raise ValueError(f"lora_B must be {expected} for this weight and lora_A, got {list(lora_B.shape)}")


def check_conv(
    dimensions: int,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor | None,
    groups: int,
) -> None:
    """All tensors of ``dora_conv1d``, ``2d`` or ``3d``."""
    check_float("weight", weight)
    if weight.ndim != dimensions + 2:
        raise ValueError(f"weight must have {dimensions + 2} dimensions, got shape {list(weight.shape)}")
    check_conv_factors(weight, lora_A, lora_B, groups)
    check_float("magnitude", magnitude)
    for name, vector in (("magnitude", magnitude), ("weight_norm", weight_norm), ("bias", bias)):
        if vector is not None:
            _check_rows(name, vector, weight.shape[:1], weight, "weight")
    check_float("x", x)
    in_channels = weight.shape[1] * groups
    if x.ndim not in (dimensions + 1, dimensions + 2) or x.shape[-1 - dimensions] != in_channels:
        sizes = ", ".join("DHW"[-dimensions:]) if dimensions > 1 else "L"
        expected = f"[N, in, {sizes}] or [in, {sizes}] with in = {in_channels}"
        raise ValueError(f"x must be {expected}, got shape {list(x.shape)}")
    _check_device("x", x, weight)
    check_activation_dtype(x, weight)


def check_geometry(dimensions: int, stride: object, padding: object, dilation: object, padding_mode: object) -> None:
    """What ``nn.Conv`` takes as stride, padding, dilation and padding mode."""
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if name == "padding" and isinstance(value, str):
            if value not in ("same", "valid"):
                raise ValueError(f"padding must be numbers, 'same' or 'valid', got {value!r}")
            continue
        values = (value,) * dimensions if isinstance(value, int) else value
        if not isinstance(values, (tuple, list)) or not all(isinstance(v, (int, torch.SymInt)) for v in values):
            raise TypeError(f"{name} must be an integer or {dimensions} of them, got {value!r}")
        if len(values) != dimensions or any(v < least for v in values):
            raise ValueError(f"{name} must be one integer or {dimensions} of them, at least {least}, got {value!r}")
    strides = (stride,) if isinstance(stride, int) else stride
    if padding == "same" and any(v != 1 for v in strides):
        raise ValueError(f"padding must not be 'same' with a stride other than 1, got stride {stride!r}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(map(repr, PADDING_MODES))}, got {padding_mode!r}")


def check_extent(
    x: Tensor, weight: Tensor, border: list[tuple[int, int]], dilation: tuple[int, ...], padding_mode: str
) -> None:
    """Whether the padding can be taken from x, and the kernel fits into the two."""
    sizes = x.shape[-len(border) :]
    for size, kernel, (before, after), step in zip(sizes, weight.shape[2:], border, dilation, strict=True):
        most = {"reflect": size - 1, "circular": size}.get(padding_mode)
        if most is not None and max(before, after) > most:
            raise ValueError(
                f"padding must be at most {most} with padding_mode {padding_mode!r} for x {list(x.shape)}, "
                f"got {max(before, after)}"
            )
        reach = step * (kernel - 1) + 1
        if size + before + after < reach:
            raise ValueError(
                f"x must be at least as large as the kernel, which reaches over {reach}, got shape {list(x.shape)} "
                f"and a padding of {before + after}"
            )

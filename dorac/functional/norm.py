"""The norm, the scale it gives, and the magnitude that starts with it."""

import torch
from torch import Tensor

from dorac import checks, ops, packed
from dorac.numerics import accumulate_dtype
from dorac.ops import eager_norm, front
from dorac.ops.norm import DEFAULT_BUDGET
from dorac.ops.packed_product import Held


def scaling_tensor(scaling: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``scaling`` as a 0-d tensor. The ops take no Python float: the compiler would compile one graph per value."""
    if isinstance(scaling, Tensor):
        return scaling.to(device=like.device, dtype=dtype)
    if torch.compiler.is_compiling():
        # A product keeps the value symbolic; torch.full would specialise the graph on it.
        return torch.ones((), dtype=dtype, device=like.device) * scaling
    return torch.full((), scaling, dtype=dtype, device=like.device)


def scaling_number(scaling: float | Tensor) -> float | None:
    """``scaling`` where it is known now: in eager, and in a graph that is compiled for this value alone."""
    if isinstance(scaling, Tensor):
        return None
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not has_static_value(scaling):
            return None
    return float(scaling)


def norm_factored(
    weight: Tensor | packed.Packed,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    weight_sq: Tensor | None = None,
    norm_grad: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """``n = ||W + s * lora_B @ lora_A||_row``, without the product.

    Args:
        weight: ``[out, in]``, float16 / bfloat16 / float32 / float64, any strides (a transposed view is not copied);
            or ``[E, out, in]``, E experts, and then every other tensor starts with E too. Or a packed weight, see
            :func:`dorac.packed.of`: its norm is read from the packed storage, without a dense copy of it.
        lora_A: ``[r, in]``, any of these dtypes.
        lora_B: ``[out, r]``, the dtype of ``lora_A``.
        scaling: s, a finite number or a 0-d tensor; zero and negative values are fine.
        weight_sq: ``||W||_row^2 [out]`` if known. It saves a pass over W, but rows of V much shorter than those of W
            lose digits; where it overflows to inf, so does n: keep that of a row beyond 1.8e19 in float64. The Triton
            kernel, which reads W once in any case, does not use it. It is a constant: with ``norm_grad`` the
            weight's gradient is whole without it.
        norm_grad: whether the norm carries its gradient, to lora_A and lora_B, to the weight if that requires one and
            to a tensor scaling. It is exact, of every order and in forward mode, in the factored form
            ``d_B = s c (W A^T + s B A A^T)``, ``d_A = s ((cB)^T W + s (cB)^T B A)``, ``c = d_n / n``; zero rows
            (``n <= 1e-12``) have none. Backward goes over the weight once more in chunks; under ``torch.func``, in
            ``torch.export`` and for tensor subclasses it is plain aten, which keeps a float32 copy of a half-precision
            weight and whose backward autocast reaches where it is run inside it: enter autocast inside the transform.
        budget: bytes that all live buffers of the computation may take together. At least one column of W is processed
            at a time, however small the budget; on CUDA the columns come in multiples of 64 where the budget allows.
            The Triton kernel needs no buffers.

    Returns:
        ``[out]``, float32 (float64 if any input is float64). No gradient flows through it (paper, section 4.3),
        also in forward mode, unless ``norm_grad`` asks for it; the value is the same either way. Rows up to float32's
        largest number are right although their squares are larger (not in float64, whose squares end at a norm of
        1e154). The norm is inf where it is larger or where the row of ``weight`` or ``lora_B``, or what these meet in
        ``lora_A``, is not finite, NaN included: then ``g = 0``, and the layer's output in that row is NaN. Rows below
        1e-19, whose squares vanish, are zero rows in any case.

    Raises:
        TypeError: a tensor that is not of these dtypes (float8 and integer weights are dequantised by the caller); a
            ``norm_grad`` that is not a bool.
        ValueError: shapes or devices that do not fit, a scaling that is not finite, a budget below one byte; pieces of
            a packed weight that do not fit, ``norm_grad`` over one.
    """
    if packed.is_packed(weight) or type(weight) is Held:
        return _packed_norm(weight, lora_A, lora_B, scaling, weight_sq, norm_grad, budget)
    checks.check_factors(weight, lora_A, lora_B)
    scaling = checks.check_scaling(scaling)
    checks.check_vector("weight_sq", weight_sq, weight)
    budget = checks.check_budget(budget)
    checks.check_norm_grad(norm_grad)
    s = scaling_tensor(scaling, weight, accumulate_dtype(weight, lora_A, lora_B))
    return norm_of_checked(weight, lora_A, lora_B, s, weight_sq, budget, norm_grad)


def norm_of_checked(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    weight_sq: Tensor | None,
    budget: int,
    norm_grad: bool,
) -> Tensor:
    """:func:`norm_factored` of a dense weight, for who has checked the arguments."""
    # The op's body switches autocast off too, but vmap restores the state from before the call for what runs there.
    with front.autocast_off(weight):
        return ops.norm.norm_factored(weight, lora_A, lora_B, scaling, weight_sq, budget, norm_grad)


def _packed_norm(weight, lora_A, lora_B, scaling, weight_sq, norm_grad, budget):
    scaling = checks.check_scaling(scaling)
    usual = norm_grad is False and weight_sq is None and budget == DEFAULT_BUDGET and not isinstance(scaling, Tensor)
    if usual and not torch.compiler.is_compiling():
        norm = eager_norm.packed_norm(weight, lora_A, lora_B, float(scaling))
        if norm is not None:
            return norm
    if type(weight) is Held:
        weight = weight.weight
    checks.check_packed_factors(weight, lora_A, lora_B)
    checks.check_vector("weight_sq", weight_sq, weight)
    budget = checks.check_budget(budget)
    checks.check_norm_grad(norm_grad)
    if norm_grad:
        raise ValueError(f"norm_grad needs a dense weight; the norm of a {weight.NAME} carries no gradient")
    s = scaling_tensor(scaling, lora_A, accumulate_dtype(lora_A, lora_B))
    with front.autocast_off(lora_A):
        return ops.packed.packed_norm_factored(lora_A, lora_B, s, weight_sq, *packed.flatten(weight), budget)


def magnitude_scale(magnitude: Tensor, weight_norm: Tensor) -> Tensor:
    """``g = m / n`` per output row, 1 on zero rows (``n <= 1e-12``); gradient flows to ``magnitude``.

    Args:
        magnitude: ``[out]``, any float dtype.
        weight_norm: ``[out]`` from :func:`norm_factored`.

    Returns:
        ``[out]``, float32 (float64 if either input is float64).

    Raises:
        TypeError, ValueError: a magnitude whose dtype, length or device does not fit ``weight_norm``.
    """
    checks.check_magnitude(magnitude, weight_norm)
    return ops.compose.magnitude_scale(magnitude, weight_norm)


def init_magnitude(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, *, budget: int = DEFAULT_BUDGET
) -> Tensor:
    """``m0 = ||W + s * lora_B @ lora_A||_row``: the adapted layer starts with g = 1 exactly (paper, section 4.1).

    Args, Raises: see :func:`norm_factored`. The ``budget`` is to be that of the forward: another one adds up in another
        order.

    Returns:
        ``[out]``, float32 (float64 if any input is float64), whatever the dtype of the factors.
    """
    return norm_factored(weight, lora_A, lora_B, scaling, budget=budget)

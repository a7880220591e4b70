"""The linear layer, and compose, the step of it that other layers share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks, ops, packed
from dorac.functional.norm import norm_of_checked, scaling_number, scaling_tensor
from dorac.numerics import accumulate_dtype
from dorac.ops import eager, eager_over
from dorac.ops.norm import DEFAULT_BUDGET
from dorac.ops.packed_product import Held


def compose(
    base: Tensor,
    lora: Tensor,
    mag_scale: Tensor,
    scaling: float | Tensor,
    *,
    bias: Tensor | None = None,
    delta: bool = False,
    dim: int = -1,
) -> Tensor:
    """``g * (base + s * lora) + b``, or with ``delta=True`` the change ``(g - 1) * base + g * s * lora`` to ``base``.

    The delta is computed in that form, never as ``g * (base + s * lora) - base``: g is close to 1 and the difference
    would cancel.

    Args:
        base: ``[*, out]``, the frozen layer's output without its bias.
        lora: ``[*, out]``, the low-rank branch's output before scaling, any float dtype.
        mag_scale: g, ``[out]``, from :func:`magnitude_scale`.
        scaling: s, a finite number or a 0-d tensor.
        bias: ``[out]``; never scaled by g. Not allowed in the delta form, whose ``base`` excludes the bias.
        dim: which dimension of ``base`` and ``lora`` holds the outputs: 1 for channels, ``[N, out, *]``.

    Returns:
        The shape, the dtype and, with channels, the memory format of ``base``. Gradients flow to base, lora, mag_scale
        and bias; one tensor of the size of the output is saved for backward, and none if ``mag_scale`` needs no
        gradient.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; a bias in the delta form; a dim out of range.
    """
    checks.check_compose(base, lora, mag_scale, bias, delta, dim)
    scaling = checks.check_scaling(scaling)
    s = scaling_tensor(scaling, base, accumulate_dtype(base, lora, mag_scale))
    return ops.compose.compose(base, lora, mag_scale, s, bias, delta, dim, False)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor,
    weight_norm: Tensor | None = None,
    norm_grad: bool = False,
    dropout_p: float = 0.0,
    dropout_on: str = "adapter",
    save_output: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """A linear layer with DoRA: ``y = g * (x W^T + s (x lora_A^T) lora_B^T) + b``, ``g = m / ||W + s BA||_row``.

    Args:
        x: ``[*, in]``, the dtype of ``weight`` (under autocast any float dtype).
        weight: ``[out, in]``, any strides; usually frozen, receives its gradient (with n held constant) if it requires
            one. Or ``[E, out, in]``, E experts with a layer each: then every other tensor starts with E too, x is
            ``[E, *, in]`` and the result ``[E, *, out]``. A view of ``[E, in, out]`` is not copied.
        lora_A: ``[r, in]``. lora_B: ``[out, r]``. One dtype, which may differ from the weight's; the low-rank branch
            runs in it.
        magnitude: m, ``[out]``, any float dtype; best kept in float32.
        bias: ``[out]``.
        scaling: s, a finite number or a 0-d tensor.
        weight_norm: n, ``[out]``, if it is known, from :func:`norm_factored` on the same weight, factors and scaling.
        norm_grad: whether gradient flows through the norm too, see :func:`norm_factored`; not with ``weight_norm``,
            which carries its own or none.
        dropout_p: probability with which elements of x are zeroed on the adapter's side, ``x' = dropout(x)``. Always
            applied when positive; a module passes 0 in eval mode.
        dropout_on: what sees x'. "adapter", as in PEFT: the whole change that DoRA makes to the frozen layer,
            ``y = x W^T + b + (g - 1) x' W^T + g s x' lora_A^T lora_B^T``, which takes a second product with W in
            forward and in backward. "low_rank": the low-rank branch alone,
            ``y = g * (x W^T + s x' lora_A^T lora_B^T) + b``, at the cost of LoRA with dropout.
        save_output: saves y for backward, not ``x W^T + s x lora_A^T lora_B^T``, where the layer has no bias, no
            dropout in PEFT's meaning, and runs in eager on a GPU with kernels: no memory where whatever consumes y
            saves it, too (an activation, a product). Consumers that write to y in place are seen as long as autograd
            sees them; a kernel that writes to it behind autograd's back (Liger's rotary embedding) makes the
            magnitude's gradient wrong.
        budget: bytes for the buffers of the norm, see :func:`norm_factored`.

    Returns:
        ``[*, out]`` in the dtype of ``x W^T``. Gradients flow to x, lora_A, lora_B, magnitude, bias and weight,
        through the norm only if ``norm_grad`` or a ``weight_norm`` that requires a gradient says so.

        Where ``lora_B = 0`` and ``m = n`` it is ``F.linear(x, weight, bias)``, bit for bit, in eager float32 and
        float64 on the CPU (a zero may lose its sign; with experts the bias follows the product, as in their modules).
        For that, these dtypes have the bias inside the product on every device but CUDA, and compute
        ``g * (x W^T + b + s ...) + (1 - g) * b``: of b, two roundings of ``g * b`` more. The magnitude's gradient is
        ``sum dy * (x W^T + b + s ... - b) / n``, every term of it exact to roundings of ``|x W^T| + |b|``.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a scaling that is not finite, a dropout
            outside [0, 1), another ``dropout_on``, ``norm_grad`` together with ``weight_norm``.
    """
    scaling = checks.check_scaling(scaling)
    dropout_p = checks.check_dropout(dropout_p)
    checks.check_dropout_on(dropout_on)
    is_number = not isinstance(scaling, Tensor)
    if not torch.compiler.is_compiling() and is_number and norm_grad is False and budget == DEFAULT_BUDGET:
        tensors = x, weight, lora_A, lora_B, magnitude, bias, weight_norm
        y = eager.dora_linear(*tensors, float(scaling), dropout_p, dropout_on, bool(save_output))
        if y is not None:
            return y
    checks.check_linear(x, weight, lora_A, lora_B, magnitude, bias, weight_norm)
    checks.check_norm_grad(norm_grad, weight_norm)
    budget = checks.check_budget(budget)
    s = scaling_tensor(scaling, weight, accumulate_dtype(weight, lora_A, lora_B))
    if weight_norm is None:
        weight_norm = norm_of_checked(weight, lora_A, lora_B, s, None, budget, norm_grad)
    tensors = x, weight, lora_A, lora_B, magnitude, weight_norm, s, bias
    if not dropout_p:
        return ops.linear.dora_linear(*tensors, scaling_number(scaling))
    return ops.linear.dora_linear(*tensors, scaling_number(scaling), F.dropout(x, dropout_p), dropout_on == "low_rank")


def dora_over(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    weight_norm: Tensor,
    scaling: float | Tensor,
    base_has_bias: bool = False,
    save_output: bool = False,
    weight: Tensor | packed.Packed | None = None,
) -> Tensor:
    """:func:`dora_linear` over a product that another layer computed: ``y = g * (base + s (x lora_A^T) lora_B^T) + b``.

    For a frozen layer whose weight is no dense tensor here: quantised, offloaded, behind hooks. Call that layer for
    ``base``, and :func:`norm_factored` for the norm.

    Args:
        base: ``[*, out]``, ``x W^T``, any float dtype.
        x: ``[*, in]``, any float dtype; the low-rank branch runs in that of lora_A, under autocast in autocast's. With
            dropout on the low-rank branch alone, ``dropout(x)``.
        lora_A: ``[r, in]``. lora_B: ``[out, r]``. One dtype, which may differ from base's.
        magnitude: m, ``[out]``, any float dtype; best kept in float32.
        bias: ``[out]``.
        weight_norm: n, ``[out]``, from :func:`norm_factored` on the layer's weight.
        scaling: s, a finite number or a 0-d tensor.
        base_has_bias: base is ``x W^T + b``, as a layer with a bias returns it. Then
            ``y = g * (base + s ...) + (1 - g) * b``, in float32 (float64) before the one rounding: the bias is neither
            scaled nor taken off a rounded sum.
        save_output: saves y for backward in place of a tensor of its size, as in :func:`dora_linear` and on the same
            terms; then there is no second derivative.
        weight: the frozen layer's, packed (:func:`dorac.packed.of`) or dense, for ``save_output`` alone: the
            gradient of magnitudes near zero, which y does not tell, is computed from it.

    Returns:
        ``[*, out]`` in the dtype of ``base``. Gradients flow to base, x (through the low-rank branch; through the
        product it is base's), lora_A, lora_B, magnitude, bias (with ``base_has_bias`` what base leaves of it) and a
        ``weight_norm`` that requires one. One tensor of the size of base is saved for backward.

        Where ``lora_B = 0`` and ``m = n`` it is base, bit for bit, if that has the bias or there is none.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a scaling that is not finite, ``save_output``
            without a weight.

    Source: arXiv 2402.09353, equation 5 with the norm of section 4.3.
    """
    scaling = checks.check_scaling(scaling)
    if not isinstance(base_has_bias, bool):
        raise TypeError(f"base_has_bias must be a bool, got {type(base_has_bias).__name__}")
    if save_output and weight is None:
        raise ValueError("save_output needs the frozen layer's weight, packed or dense, got None")
    if not torch.compiler.is_compiling() and not isinstance(scaling, Tensor):
        tensors = base, x, lora_A, lora_B, magnitude, bias, weight_norm
        y = eager_over.dora_over(*tensors, float(scaling), base_has_bias, weight if save_output else None)
        if y is not None:
            return y
    checks.check_over(base, x, lora_A, lora_B, magnitude, bias, weight_norm)
    if save_output:
        checks.check_weight_over(weight.weight if type(weight) is Held else weight, base, x)
    s = scaling_tensor(scaling, base, accumulate_dtype(base, lora_A, lora_B))
    tensors = base, x, lora_A, lora_B, magnitude, weight_norm, s, bias
    return ops.over.dora_over(*tensors, scaling_number(scaling), base_has_bias)

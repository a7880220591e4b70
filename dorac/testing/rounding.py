"""The law of error: what roundings can do to a result, per element and whatever the machine (DESIGN.md section 7).

**Worst case.** A sum of products, however ordered, is off by at most ``gamma(k) * S``, ``gamma(k) = k u / (1 - k u)``:
S the sum of the absolute values of its terms, k how many roundings lie on the way from an input to the result, u the
unit roundoff. A layer with g given is such a sum, and so is each of its gradients. S is the textbook itself in float64
on absolute values, its backward pass on ``|dy|``: with every input positive, a gradient is the sum of its absolute
terms. Roundings are counted of two kinds: to the activation's dtype (:data:`ROUNDINGS`) and in the accumulate dtype
(:class:`Sums`). The norm is no such sum: ``n`` is off by the roundings of ``|W| + |s| |B| |A|``, which is longer
than V where W and BA cancel; g, and what g multiplies, by as much.

**Root mean square.** In long sums roundings cancel at random, and the worst case is far off. Over a whole tensor the
RMS error is at most :data:`RMS_FACTOR` times that of the dense textbook in the same dtype, or one rounding of the
result where the dense one happens to be exact. Each error is measured in units of its element's worst case: in plain
numbers a few large elements would be all of the mean, or those of one row whose W and BA cancel, in which the dense
form rounds the small V and a layer of two products the large W. The luck of so few is nothing to compare. Of n errors
that are independent and of one variance, the RMS is f times that of n others with a probability of at most
``(2 f / (1 + f^2)) ** n``: 6e-7 for f = 2 and n = 64.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dorac import reference

NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")

# Roundings to the activation's dtype between the inputs and a result, on the longest way of any route
# (ops/linear.py, ops/compose.py):
ROUNDINGS = {
    "y": 4,  # h, h lora_B^T (with s in one of them), the sum with x W^T, y; "accumulate" has these, others fewer
    "x": 4,  # d_inner, d_h, d_h lora_A, the sum with d_inner W
    "weight": 2,  # d_inner, the result
    "lora_A": 4,  # d_inner, its product with lora_B, s times that, the result
    "lora_B": 4,  # d_inner and h, the product of the two, s times that
    "magnitude": 4,  # as y, with inner for y; the result is float32
    "bias": 1,  # the result
}

# Roundings in the accumulate dtype beside those of sums: s, g = m / n and its products, PEFT's order of adding
# (|g - 1| + 1 is up to 3 g there), bias, in forward and backward.
ELEMENTWISE = 16

# Two right computations of one tensor differ in the order of their sums: one adds up in blocks, log2(n) roundings deep,
# another term by term, whose RMS grows as the root of n. Over the sizes of the tests (n < 1000) that is up to a factor
# of four. Half precision sums in float32, where order does not matter. The dense form rounds no less often than ours on
# average; but where a handful of roundings is in all of a tensor (those of h for one token) they hardly average out.
RMS_FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
# A GPU's float32 products add up term by term, one element to a thread: sqrt(n / 2) roundings in RMS where a sum in
# halves has sqrt(log2(n)), at n = 1000 seven times as many. (A CPU's run in lanes, whose sums are that much shorter.)
RMS_FACTOR_ON_CUDA = RMS_FACTOR | {torch.float32: 7.0}
RMS_ELEMENTS = 64  # fewer that are not zero, or fewer roundings that they share, do not average luck out


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def gamma(relative: float) -> float:
    """What roundings come to that add up to ``relative`` in first order."""
    return relative / (1 - relative)


@dataclasses.dataclass(frozen=True)
class Sums:
    """How many terms a layer's sums have at most.

    Args:
        tokens: rows of x, or positions of a convolution. out: outputs (times taps of the kernel). inputs: inputs (times
            taps). rank: ranks (times taps).
        row: elements of a row of the weight, which the norm adds up.
        copies: how many gradients are added up in the activation's dtype, one by one: of a word that occurs more than
            once, of an element that padding repeats.
    """

    tokens: int
    out: int
    inputs: int
    rank: int
    row: int
    copies: int = 0

    @classmethod
    def of_linear(cls, x: Tensor, weight: Tensor, lora_A: Tensor) -> "Sums":
        """Also with a leading dimension of experts, and with a base weight under several adapters."""
        out, inputs = weight.shape[-2:]
        return cls(x.numel() // max(1, inputs), out, inputs, lora_A.shape[-2], inputs)

    @classmethod
    def of_embedding(cls, x: Tensor, weight: Tensor, lora_A: Tensor) -> "Sums":
        vocab, out = weight.shape
        counts = torch.bincount(x.flatten().long(), minlength=1)
        return cls(x.numel(), out, 1, lora_A.shape[0], vocab, int(counts.max()))

    def terms(self, name: str) -> int:
        """Roundings in the accumulate dtype, one per term of the sums on the way."""
        lengths = {
            "y": self.inputs + self.rank,
            "x": self.out + self.rank + self.copies,
            "weight": self.tokens,
            "lora_A": self.out + self.tokens,
            "lora_B": self.inputs + self.tokens,
            "magnitude": self.inputs + self.rank + self.tokens,
            "bias": self.tokens,
        }
        return lengths[name] + ELEMENTWISE

    def longer(self, name: str) -> float:
        """How much larger the RMS of a result's roundings may be than the dense one's, which holds W + s BA summed."""
        dense = {"y": self.inputs, "x": self.out}.get(name, 0)
        return math.sqrt((dense + self.rank) / dense) if dense else 1.0

    def roundings_shared(self, name: str) -> int:
        """How many numbers are rounded of which every element of a result is made."""
        return self.tokens * self.rank if name in ("lora_A", "lora_B") else self.tokens * self.out

    def norm_terms(self) -> int:
        """V takes rank + 2 roundings, half of those of its squares' sum reach the root; the root, and a cast."""
        return self.rank + 2 + (self.row + 1) // 2 + 2


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one result may err by.

    Args:
        truth: in float64. bound: per element. dense: the textbook in the same dtype, for the RMS. longer: see
            :meth:`Sums.longer`.
    """

    truth: Tensor
    bound: Tensor
    dense: Tensor | None = None
    longer: float = 1.0

    def check(self, actual: Tensor, label: str = "") -> None:
        """Asserts both parts of the law."""
        assert actual.shape == self.truth.shape, (label, actual.shape, self.truth.shape)
        error = (actual.detach().double() - self.truth).abs()
        over = ~(error <= self.bound)
        assert not over.any(), f"{label}: error {error[over].max():.3e} over its bound {self.bound[over].min():.3e}"
        enough = self.truth.count_nonzero() >= RMS_ELEMENTS
        if self.dense is not None and enough and actual.dtype in RMS_FACTOR:
            assert_rms_beside(actual, self.dense, self.truth, longer=self.longer, unit=self.bound, label=label)


def max_error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute difference, in float64; 0 for empty tensors."""
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    difference = (actual.detach().double() - truth.detach().double()).abs()
    return difference.max().item() if difference.numel() else 0.0


def rms_error(actual: Tensor, truth: Tensor, unit: Tensor | float = 1.0) -> float:
    """The root of the mean squared difference, in float64 and in units, one or an element's own."""
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    return ((actual.detach().double() - truth.detach().double()) / unit).square().mean().sqrt().item()


def assert_rms_beside(
    actual: Tensor,
    other: Tensor,
    truth: Tensor,
    *,
    factor: float | None = None,
    longer: float = 1.0,
    unit: Tensor | float = 1.0,
    label: str = "",
) -> None:
    """The RMS error of actual is at most ``factor * longer`` times that of other, or one rounding of the truth.

    ``unit``: what each element's error is measured in.
    """
    dtype = max((actual.dtype, other.dtype), key=unit_roundoff)
    if factor is None:
        factor = (RMS_FACTOR_ON_CUDA if actual.is_cuda else RMS_FACTOR)[dtype]
    one_rounding = unit_roundoff(dtype) * rms_error(truth, torch.zeros_like(truth), unit)
    error, yardstick = rms_error(actual, truth, unit), rms_error(other, truth, unit)
    assert error <= max(factor * longer * yardstick, one_rounding), (
        f"{label}: RMS error {error:.3e} beside {yardstick:.3e}"
    )


def rounded(size: Tensor, dtype: torch.dtype, roundings: int, terms: int) -> Tensor:
    """The bound of a sum of absolute terms ``size`` after so many roundings to ``dtype`` and to its accumulate dtype.

    Below the smallest normal number a rounding is off by half of the smallest subnormal one, whatever its operand.
    """
    relative = roundings * unit_roundoff(dtype) + terms * unit_roundoff(accumulate_dtype(dtype))
    info = torch.finfo(dtype)
    underflow = (roundings * terms + 1) * info.smallest_normal * info.eps / 2
    bound = gamma(relative) * size + underflow
    return 2 * bound if dtype is torch.float64 else bound  # the truth is no more exact


def exact(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same numbers in float64, contiguous: torch's own convolutions of float64 on the CPU raise in some layouts."""
    return [t if t is None or not t.is_floating_point() else t.detach().double().contiguous() for t in tensors]


def _leaves(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Copies in ``dtype`` that require a gradient, if they can."""
    return [
        t if t is None or not t.is_floating_point() else t.detach().to(dtype, copy=True).requires_grad_()
        for t in tensors
    ]


def _differentiate(y: Tensor, leaves: Sequence[Tensor | None], dy: Tensor | None) -> dict[str, Tensor]:
    """y and the gradients of ``<dy, y>`` by name."""
    results = {"y": y.detach()}
    if dy is not None:
        chosen = {n: t for n, t in zip(NAMES, leaves, strict=False) if t is not None and t.requires_grad}
        gradients = torch.autograd.grad(y, list(chosen.values()), dy.detach().to(y), materialize_grads=True)
        results |= dict(zip(chosen, gradients, strict=True))
    return results


def _norm_ratio(norm: Callable[..., Tensor], tensors: Sequence[Tensor], scaling: float | Tensor) -> tuple[Tensor, ...]:
    """n, and how much longer the rows of ``|W| + |s| |B| |A|`` are; 1 for zero rows, whose g is a constant."""
    n = norm(*tensors, scaling)
    zero_row = n <= 1e-12
    long = norm(*(t.abs() for t in tensors), abs(scaling))
    return n, torch.where(zero_row, 1.0, long / n.masked_fill(zero_row, 1))


def layer_budgets(
    textbook: Callable[..., Tensor],
    norm: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    sums: Sums,
    *,
    scaling: float | Tensor,
    dy: Tensor | None = None,
    casts: int = 0,
    dtype: torch.dtype | None = None,
    norm_grad: bool = False,
    weight_norm: Tensor | None = None,
    **options,
) -> dict[str, Budget]:
    """The budgets of y and, for a given dy, of every gradient.

    Args:
        textbook: of :mod:`dorac.reference`, ``(*tensors, scaling=, weight_norm=, norm_grad=, **options)``.
        norm: the textbook's norm, ``(weight, lora_A, lora_B, scaling)``.
        tensors: x, weight, lora_A, lora_B, magnitude and bias (or fewer), as the function under test gets them.
        casts: roundings beside :data:`ROUNDINGS`, of inputs that are cast first (autocast: 3, x, lora_A and lora_B) or
            of a result that is scaled.
        dtype: that of the activations under test; by default the narrowest of the tensors.
        weight_norm: n, where the function under test is given it.
    """
    dtypes = [t.dtype for t in tensors if t is not None and t.is_floating_point()]
    dtype = dtype or max(dtypes, key=unit_roundoff)
    casts += tensors[1].dtype is not tensors[2].dtype  # x for the factors
    wide, given = exact(tensors), {} if weight_norm is None else {"weight_norm": weight_norm.detach().double()}

    def run(in_dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = _leaves(wide if in_dtype is torch.float64 else tensors, in_dtype)
        fixed = {name: n.to(in_dtype) for name, n in given.items()} or {"norm_grad": norm_grad}
        s = scaling.to(in_dtype) if isinstance(scaling, Tensor) else scaling
        return _differentiate(textbook(*leaves, scaling=s, **fixed, **options), leaves, dy)

    def absolute(ratio: Tensor) -> dict[str, Tensor]:
        """The sums of absolute terms, every g times its ratio."""
        terms = [t.abs() if t is not None and t.is_floating_point() else t for t in wide]
        if options.get("dropped") is not None and options.get("dropout_on") == "adapter":  # what sees x' has |g - 1|
            terms[4] = n + (wide[4] - n).abs()
        leaves = _leaves(terms, torch.float64)
        y = textbook(*leaves, scaling=abs(scaling), weight_norm=n / ratio, **options)
        if not norm_grad or dy is None:
            return _differentiate(y, leaves, None if dy is None else dy.detach().double().abs())
        total = (dy.detach().double().abs() * y).sum()
        zero_row = n <= 1e-12
        (d_magnitude,) = torch.autograd.grad(total, leaves[4], retain_graph=True)
        d_norm = d_magnitude * leaves[4].detach() * ratio / n.masked_fill(zero_row, 1).square()
        of_norm = norm(*leaves[1:4], abs(scaling)).square() / 2
        total = total + (d_norm.masked_fill(zero_row, 0) * of_norm).sum()
        return _differentiate(total, leaves, torch.ones_like(total)) | {"y": y.detach()}

    if weight_norm is None:
        n, ratio = _norm_ratio(norm, wide[1:4], scaling)
        norm_terms = sums.norm_terms()
    else:
        n, norm_terms = given["weight_norm"], 0
        ratio = torch.ones_like(n)
    truth, size = run(torch.float64), absolute(torch.ones_like(ratio))
    long = absolute(ratio + norm_grad)
    dense = run(dtype) if dtype in RMS_FACTOR else {}
    budgets = {}
    for name, exact_result in truth.items():
        roundings, terms = ROUNDINGS[name] + casts, sums.terms(name)
        of_norm = norm_terms
        if name in ("weight", "lora_A"):
            roundings += sums.copies
        if name == "magnitude":
            roundings += tensors[4].dtype.itemsize == 2
        if norm_grad:  # the part that comes through the norm: from inner as d_magnitude, the result, the sum of both
            roundings += 2
            of_norm += sums.terms("magnitude") + sums.out + sums.row
        bound = rounded(size[name], dtype, roundings, terms)
        bound = bound + rounded(long[name], dtype, 0, of_norm)
        averages = sums.out >= 8 and sums.roundings_shared(name) >= RMS_ELEMENTS  # one norm for each output
        longer = sums.longer(name) if dtype is torch.float32 else 1.0  # half precision adds up in float32
        budgets[name] = Budget(exact_result, bound, dense[name] if dense and averages else None, longer)
    return budgets


def norm_budget(
    norm: Callable[..., Tensor], tensors: Sequence[Tensor], sums: Sums, *, scaling: float | Tensor
) -> Budget:
    """The budget of the row norm of ``weight, lora_A, lora_B``, in the accumulate dtype of these."""
    acc = accumulate_dtype(_widest(tensors))
    wide = exact(tensors)
    truth, ratio = _norm_ratio(norm, wide, scaling)
    dense = None if acc is torch.float64 else norm(*(t.detach().to(acc) for t in tensors), scaling)
    # Beside other groups' channels, PEFT's layout adds squares up: what is off in them counts by the ratio once more.
    size = truth * (ratio.square() if acc is torch.float64 else ratio)
    return Budget(truth, rounded(size, acc, 0, sums.norm_terms()), dense)


def norm_gradient_budgets(
    norm: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    sums: Sums,
    d_norm: Tensor,
    *,
    scaling: float | Tensor,
    in_parts: bool = False,
) -> dict[str, Budget]:
    """The budgets of the norm's gradients of weight, lora_A and lora_B: ``d_V = c V``, ``c = d_norm / n``.

    ``in_parts``: the gradients are sums of two that are rounded first, as of a lora_A in PEFT's layout for groups.
    """
    acc = accumulate_dtype(_widest(tensors))

    def gradients(of: Callable[..., Tensor], copies: Sequence[Tensor], cotangent: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(of(*copies), copies, cotangent)
        return dict(zip(NAMES[1:4], grads, strict=True))

    wide = exact(tensors)
    n, ratio = _norm_ratio(norm, wide, scaling)
    c = d_norm.detach().double().abs() / n * ratio
    size = gradients(lambda *t: norm(*t, abs(scaling)).square() / 2, _leaves([t.abs() for t in wide], torch.float64), c)
    truth = gradients(lambda *t: norm(*t, scaling), _leaves(wide, torch.float64), d_norm.double())
    dense = {}
    if acc is not torch.float64:
        dense = gradients(lambda *t: norm(*t, scaling), _leaves(tensors, acc), d_norm.to(acc))
    budgets = {}
    for (name, exact_result), tensor in zip(truth.items(), tensors, strict=True):
        # n; c; the sum over a row or over the rows; the Gram matrix and its product, each with s.
        terms = sums.norm_terms() + sums.row + sums.out + 2 * sums.rank + ELEMENTWISE
        bound = rounded(size[name], acc, 0, terms)
        if tensor.dtype is not acc:
            terms_of_result = size[name] if in_parts else exact_result.abs() + bound
            bound = bound + rounded(terms_of_result, tensor.dtype, 1 + in_parts, 0)
        budgets[name] = Budget(exact_result, bound, dense.get(name))
    return budgets


def merge_budget(tensors: Sequence[Tensor], sums: Sums, *, scaling: float | Tensor) -> Budget:
    """The budget of ``W' = g * V`` for matrices ``weight, lora_A, lora_B`` and a magnitude, rounded once."""
    dtype = tensors[0].dtype
    weight, lora_A, lora_B, magnitude = exact(tensors)
    n, ratio = _norm_ratio(reference.row_norm, (weight, lora_A, lora_B), scaling)
    g = (magnitude / n)[..., None]
    truth = g * (weight + scaling * (lora_B @ lora_A))
    size = g.abs() * (weight.abs() + abs(scaling) * (lora_B.abs() @ lora_A.abs()))
    acc = accumulate_dtype(_widest(tensors))
    bound = rounded(size, acc, 0, sums.rank + ELEMENTWISE) + rounded(ratio[..., None] * size, acc, 0, sums.norm_terms())
    return Budget(truth, bound + rounded(truth.abs() + bound, dtype, 1, 0))


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    return min((t.dtype for t in tensors), key=unit_roundoff)

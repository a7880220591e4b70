"""Numbers in float64 and what a computation of them may be off by, carried along from one rounding to the next.

Where a result is no sum of products, as an MLP with its activation is none, the sum of absolute terms that
``dorac.testing.rounding`` has for layers is not there. What each rounding can do is carried through every operation
instead: through a product by the other factor, through an activation by its steepest slope.
"""

import dataclasses

import torch
from torch import Tensor

V = 2.0**-24  # unit roundoff of float32, in which sums and elementwise arithmetic are
EVALUATIONS = 16  # roundings of float32 within an activation or its slope, relative to 1 + |x|

# By activation: it, its slope, the steepest slope, and that of the slope.
SLOPES = {
    "silu": (1.1, 0.5),
    "gelu": (1.13, 0.8),
    "gelu_tanh": (1.13, 0.8),
    "relu": (1.0, None),  # whose slope jumps
}


def gamma(terms: int) -> float:
    return terms * V / (1 - terms * V)


@dataclasses.dataclass(frozen=True)
class Near:
    """``value``, known to ``error``."""

    value: Tensor
    error: Tensor

    @classmethod
    def exactly(cls, tensor: Tensor, relative: float = 0.0) -> "Near":
        value = tensor.detach().double()
        return cls(value, relative * value.abs())

    @property
    def size(self) -> Tensor:
        return self.value.abs() + self.error

    @property
    def T(self) -> "Near":
        return Near(self.value.T, self.error.T)

    def _with(self, value: Tensor, size: Tensor, exact: Tensor, terms: int) -> "Near":
        return Near(value, (size - exact).clamp(min=0) + gamma(terms) * size + 1e-14 * size)

    def __matmul__(self, other: "Near") -> "Near":
        exact = self.value.abs() @ other.value.abs()
        return self._with(self.value @ other.value, self.size @ other.size, exact, self.value.shape[-1])

    def __mul__(self, other: "Near | float") -> "Near":
        if isinstance(other, float):
            return Near(self.value * other, self.error * abs(other) + V * self.size * abs(other))
        exact = self.value.abs() * other.value.abs()
        return self._with(self.value * other.value, self.size * other.size, exact, 1)

    def __add__(self, other: "Near") -> "Near":
        value, error = self.value + other.value, self.error + other.error
        return Near(value, error + V * (value.abs() + error))

    def sum(self) -> "Near":
        """Over the rows."""
        return Near(self.value.sum(0), self.error.sum(0) + gamma(len(self.value)) * self.size.sum(0))

    def rounded(self, dtype: torch.dtype, truncates: bool = False) -> "Near":
        """To ``dtype``; ``truncates``: as Triton's interpreter does to bfloat16."""
        if dtype not in (torch.bfloat16, torch.float16):
            return self
        info = torch.finfo(dtype)
        unit = info.eps if truncates else info.eps / 2
        return Near(self.value, self.error + unit * self.size + info.smallest_normal * unit)

    def activated(self, activation: str, function) -> tuple["Near", "Near"]:
        """``act(x)`` and its slope."""
        x = self.value.clone().requires_grad_()
        act = function(x)
        (slope,) = torch.autograd.grad(act.sum(), x)
        steepest, of_slope = SLOPES[activation]
        evaluated = EVALUATIONS * V * (1 + self.size)
        jump = (self.value.abs() <= self.error).double() if of_slope is None else of_slope * self.error
        if of_slope is None:
            evaluated_slope = torch.zeros_like(evaluated)
        else:
            evaluated_slope = evaluated
        return (
            Near(act.detach(), steepest * self.error + evaluated),
            Near(slope, jump + evaluated_slope),
        )

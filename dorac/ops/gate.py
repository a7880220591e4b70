"""``Gate``: what joins the halves of a projection that is gate and up in one, ``z = act(gate) * up``; in aten.

``ops/eager_grouped.py`` computes it in the kernels of the projection (``kernels/segment_gate.py``).
"""

import dataclasses

import torch
from torch import Tensor

from dorac.ops.mlp import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Gate:
    """``z = act(gate) * (up + shift)``, gate and up each half of ``y [*, 2 F]``, which gives ``z [*, F]``.

    Attributes:
        activation: "silu" (SwiGLU), "gelu" (by erf), "gelu_tanh" or "relu".
        interleaved: gate and up are y's even and odd columns (GPT-OSS), not its first and second half.
        limit: gate is at most this, up between ``-limit`` and this, before anything else; None for no limit.
        alpha: of silu, ``act(t) = t * sigmoid(alpha * t)``.
        shift: added to up.

    Raises:
        TypeError: a limit, alpha or shift that is no number of Python's.
        ValueError: another activation; alpha with another than silu; a limit that is not positive; an odd number of
            columns.

    Source: arXiv 2002.05202; with a limit, alpha and shift GPT-OSS' (arXiv 2508.10925): 7, 1.702 and 1.
    """

    activation: str = "silu"
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation must be one of {known}, got {self.activation!r}")
        for name in ("limit", "alpha", "shift"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) and (name != "limit" or value is not None):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if self.alpha != 1 and self.activation != "silu":
            raise ValueError(f"alpha is silu's, got {self.alpha} with {self.activation!r}")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit must be positive or None, got {self.limit}")

    def __call__(self, y: Tensor) -> Tensor:
        if y.shape[-1] % 2:
            raise ValueError(f"what is gate and up in one has an even number of outputs, got {y.shape[-1]}")
        gate, up = (y[..., ::2], y[..., 1::2]) if self.interleaved else y.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = _at_most(gate, self.limit), -_at_most(-_at_most(up, self.limit), self.limit)
        act = ACTIVATIONS[self.activation](gate) if self.alpha == 1 else gate * torch.sigmoid(gate * self.alpha)
        return act * (up + self.shift if self.shift else up)


def _at_most(x: Tensor, limit: float) -> Tensor:
    """``x.clamp(max=limit)``, whose gradient on the limit is that of within, as in the kernels; torch 2.14 has zero."""
    return torch.where(x <= limit, x, x.detach().clamp(max=limit))

"""Plain LoRA in the place of DoRA: the nearest of its rank to what the adapter does to a weight, and its error."""

from typing import NamedTuple

import torch
from torch import Tensor

from dorac.files.layers import Layer, difference

# Matrices whose smaller side is longer are decomposed by random projection, others exactly.
EXACT_UP_TO = 256
_OVERSAMPLING = 32
_ITERATIONS = 4


class Approximation(NamedTuple):
    """A plain LoRA layer of scaling 1, ``||D - BA|| / ||D||`` (0 where D is 0) and ``||D||``, Frobenius norms."""

    layer: Layer
    error: float
    size: float


def low_rank(layer: Layer, weight: Tensor, rank: int | None) -> Approximation:
    """The plain LoRA of that rank nearest to ``D = W' - W`` in the Frobenius norm.

    D is ``(g - 1) W + g s BA``, of full rank as a rule. It is decomposed exactly (SVD) up to a smaller side of
    :data:`EXACT_UP_TO`, and beyond that by randomised subspace iteration (Halko et al. 2011, arXiv 0909.4061; 32
    vectors more than the rank, 4 iterations, one seed), whose error is the optimum's to a fraction of a percent. The
    error that is returned is that of the factors themselves.

    Args:
        weight: the base weight. rank: R; None for that of D, with which nothing is lost.

    Returns:
        Factors in float32 (float64 for float64), padded with zeros where R is more than D can have.

    Raises:
        ValueError: a weight that the adapter does not fit, or that makes a D that is not finite.
    """
    change = difference(layer, weight)
    if not change.isfinite().all():
        raise ValueError(f"{layer.name}: the change of its base weight is not finite")
    size = change.norm().item()
    smaller = min(change.shape)
    if rank is None or rank >= smaller:
        eye = torch.eye(smaller, dtype=change.dtype, device=change.device)
        lora_B, lora_A = (eye, change) if change.shape[0] == smaller else (change, eye)
    else:
        u, s, v = _decomposed(change, rank)
        root = s[:rank].sqrt()
        lora_B, lora_A = u[:, :rank] * root, (v[:, :rank] * root).mT
    error = 0.0 if not size else (change - lora_B @ lora_A).norm().item() / size
    if rank is not None and rank > smaller:
        lora_A = torch.nn.functional.pad(lora_A, (0, 0, 0, rank - smaller))
        lora_B = torch.nn.functional.pad(lora_B, (0, rank - smaller))
    if layer.kind == "conv":
        lora_A = lora_A.view(-1, *weight.shape[1:])
        lora_B = lora_B.view(*lora_B.shape, *[1] * (weight.ndim - 2))
    plain = layer._replace(lora_A=lora_A, lora_B=lora_B, magnitude=None, scaling=1.0, norm_axis="out", eps=0.0)
    return Approximation(plain, error, size)


def _decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and V, at least ``rank`` of each."""
    if min(matrix.shape) <= EXACT_UP_TO:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh.mT
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, min(rank + _OVERSAMPLING, *matrix.shape), _ITERATIONS)

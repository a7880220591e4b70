"""What an adapter did to a weight, in the terms of the DoRA paper's section 3: magnitude and direction."""

from typing import NamedTuple

import torch
from torch import Tensor

from dorac.files.layers import Layer, difference, magnitude_for, matrices, norm
from dorac.functional import magnitude_scale


class Change(NamedTuple):
    """Of one layer, over its rows (columns where the norm is theirs).

    Args:
        magnitude: ``mean |m' - m_0|``, m' the norm of W' and m_0 that of W. direction: ``mean (1 - cos(w', w))``.
        size: ``||W' - W|| / ||W||``, Frobenius.
        g: m / n, whose mean, least and largest say what the magnitude adds to the low-rank part; 1 in plain LoRA.
    """

    magnitude: float
    direction: float
    size: float
    g: Tensor


def change(layer: Layer, weight: Tensor) -> Change:
    """The change of a layer's base weight.

    Source: arXiv 2402.09353, section 3.2.
    """
    delta = difference(layer, weight)
    matrix = matrices(layer, weight.to(delta.dtype))[0]
    weight_norm = norm(layer, weight.to(delta.dtype))
    g = magnitude_scale(magnitude_for(layer, weight_norm), weight_norm)
    before, after = _vectors(layer, matrix, weight), _vectors(layer, matrix + delta, weight)
    norms = torch.linalg.vector_norm(before, dim=1), torch.linalg.vector_norm(after, dim=1)
    units = [t / n.clamp_min(torch.finfo(t.dtype).tiny)[:, None] for t, n in zip((before, after), norms, strict=True)]
    # 1 - cos of unit vectors is half the square of their distance: no cancellation where they are close
    apart = (units[1] - units[0]).square().sum(1) / 2
    size = delta.norm() / matrix.norm().clamp_min(torch.finfo(delta.dtype).tiny)
    return Change((norms[1] - norms[0]).abs().mean().item(), apart.mean().item(), size.item(), g)


def _vectors(layer: Layer, matrix: Tensor, weight: Tensor) -> Tensor:
    """What the norms are of, as rows."""
    if layer.norm_axis == "out":
        return matrix
    if layer.kind == "conv":
        return matrix.view(weight.shape).transpose(0, 1).flatten(1)
    return matrix.t()

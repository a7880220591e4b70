"""What every format is read into: a list of :class:`Layer`, and what a layer makes of a base weight."""

import collections
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dorac.functional import column_norm, magnitude_scale, merge_columns, merge_weight, norm_factored
from dorac.numerics import accumulate_dtype

# One magnitude per output row, as the paper and PEFT have it, or one per input column.
AXES = ("out", "in")
KINDS = ("linear", "conv", "embedding")


class Layer(NamedTuple):
    """One module's adapter: ``V = W + scaling * lora_B @ lora_A``, ``W' = m / (||V|| + eps) * V``.

    Args:
        name: of the module, as the file or, once :func:`dorac.files.places.place` has found it, the model has it.
        kind: "linear", "conv" or "embedding". W is the module's weight ``[out, in]``, ``[out, in, k...]``, or of an
            embedding ``[vocab, dim]`` the transpose ``[dim, vocab]``.
        lora_A: ``[r, in]``, ``[r, in, k...]`` or ``[r, vocab]``; None where the magnitude alone was trained.
        lora_B: ``[out, r]``, ``[out, r, 1...]`` or ``[dim, r]``; None with lora_A.
        magnitude: m, ``[out]`` or ``[in]``; None in plain LoRA, where ``W' = V``.
        scaling: s.
        norm_axis: "out", a norm per output row, or "in", a norm per input column (of a convolution: per input channel).
        eps: what the trainer adds to the norm.
    """

    name: str
    kind: str
    lora_A: Tensor | None
    lora_B: Tensor | None
    magnitude: Tensor | None
    scaling: float
    norm_axis: str = "out"
    eps: float = 0.0

    @property
    def rank(self) -> int:
        """0 where the magnitude alone was trained."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]


class Contents(NamedTuple):
    """What a file holds.

    Args:
        format: the name of its format.
        layers: its adapters.
        config: what the file beside it says, or its metadata.
        others: tensors that belong to no adapter.
        names_of: whose names the layers have: "model" (module names), "kohya" (module names with ``_`` for dots after a
            prefix), or "torchtune", "megatron" (those libraries' own).
        meta_rows: modules whose magnitudes are in the order of Meta's rotary layout, unlike their factors.
    """

    format: str
    layers: tuple[Layer, ...]
    config: Mapping[str, object] = {}
    others: Mapping[str, Tensor] = {}
    names_of: str = "model"
    meta_rows: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        """How much of what, instead of every value."""
        kinds = collections.Counter(layer.kind for layer in self.layers)
        ranks = sorted({layer.rank for layer in self.layers})
        said = [f"{self.format!r}", ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no layers"]
        said += [f"r={', '.join(map(str, ranks))}"] if ranks else []
        said += [f"{len(self.others)} other tensors"] if self.others else []
        return f"{type(self).__name__}({', '.join(said)})"


def matrices(layer: Layer, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W, lora_A and lora_B as matrices ``[out, in * taps]``, ``[r, in * taps]`` and ``[out, r]``.

    Raises:
        ValueError: a weight that the factors do not fit.
    """
    matrix = weight.t() if layer.kind == "embedding" else weight.flatten(1)
    if layer.lora_A is None:
        return matrix, matrix.new_zeros(1, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], 1)
    lora_A, lora_B = layer.lora_A.flatten(1).to(weight.device), layer.lora_B.flatten(1).to(weight.device)
    if matrix.shape != (lora_B.shape[0], lora_A.shape[1]):
        raise ValueError(
            f"{layer.name}: the base weight is {list(weight.shape)}, the adapter is for {expected_shape(layer)}"
        )
    common = torch.promote_types(lora_A.dtype, lora_B.dtype)
    return matrix, lora_A.to(common), lora_B.to(common)


def expected_shape(layer: Layer) -> list[int | None]:
    """The shape of the base weight that the layer is for; None where the file does not tell."""
    if layer.lora_A is None:
        size = layer.magnitude.numel()
        return [size, None] if layer.norm_axis == "out" else [None, size]
    shape = [layer.lora_B.shape[0], *layer.lora_A.shape[1:]]
    return shape[::-1] if layer.kind == "embedding" else shape


def fits(layer: Layer, shape: torch.Size) -> bool:
    """Whether a base weight of that shape is the layer's, and its magnitude has an element for each row or column."""
    wanted = expected_shape(layer)
    if (
        len(shape) < 2
        or len(shape) != len(wanted)
        or any(w not in (None, s) for w, s in zip(wanted, shape, strict=True))
    ):
        return False
    rows, columns = reversed(shape[:2]) if layer.kind == "embedding" else shape[:2]
    return layer.magnitude is None or layer.magnitude.numel() == (rows if layer.norm_axis == "out" else columns)


def norm(layer: Layer, weight: Tensor) -> Tensor:
    """``||V||`` along the layer's axis, without eps: ``[out]`` or ``[in]``, float32 (float64 for float64)."""
    matrix, lora_A, lora_B = matrices(layer, weight)
    if layer.norm_axis == "out":
        return norm_factored(matrix, lora_A, lora_B, layer.scaling)
    if layer.kind != "conv":
        return column_norm(matrix, lora_A, lora_B, layer.scaling)
    # The taps of a convolution are matrices [out, in] of one lora_B: their columns' squares add up.
    taps = math.prod(weight.shape[2:])
    kernel = weight.flatten(2).permute(2, 0, 1)
    per_tap = lora_A.view(lora_A.shape[0], -1, taps).permute(2, 0, 1)
    norms = column_norm(kernel, per_tap, lora_B.expand(taps, *lora_B.shape), layer.scaling)
    return torch.linalg.vector_norm(norms, dim=0)


def magnitude_for(layer: Layer, weight_norm: Tensor) -> Tensor:
    """The magnitude without eps: ``m * n / (n + eps)``, in plain LoRA n."""
    if layer.magnitude is None:
        return weight_norm
    magnitude = layer.magnitude.to(weight_norm.device)
    if not layer.eps:
        return magnitude
    return magnitude.to(weight_norm.dtype) * (weight_norm / (weight_norm + layer.eps))


def completed(layer: Layer, weight: Tensor) -> Layer:
    """The same layer with factors, a magnitude and no eps, as PEFT has them: what ``W`` is needed for.

    Factors that are missing become zeros of rank 1, a magnitude that is missing the norm, with which g is 1.
    """
    if layer.lora_A is not None and layer.magnitude is not None and not layer.eps:
        return layer
    _, lora_A, lora_B = matrices(layer, weight)
    magnitude = magnitude_for(layer, norm(layer, weight))
    if layer.lora_A is not None:
        lora_A, lora_B = layer.lora_A, layer.lora_B
    return layer._replace(lora_A=lora_A, lora_B=lora_B, magnitude=magnitude, eps=0.0)


def difference(layer: Layer, weight: Tensor) -> Tensor:
    """``W' - W`` as a matrix ``[out, in * taps]``: ``(g - 1) W + g s BA``, in float32 (float64)."""
    acc = accumulate_dtype(weight, layer.lora_A, layer.lora_B)
    matrix, lora_A, lora_B = matrices(layer, weight.to(acc))
    product = lora_B.to(acc) @ lora_A.to(acc) * layer.scaling
    if layer.magnitude is None:
        return product
    weight_norm = norm(layer, weight.to(acc))
    g = magnitude_scale(magnitude_for(layer, weight_norm), weight_norm)
    if layer.norm_axis == "out":
        g = g[:, None]
    elif layer.kind == "conv":
        g = g.repeat_interleave(math.prod(weight.shape[2:]))
    return torch.addcmul((g - 1) * matrix, g, product)


def merged(layer: Layer, weight: Tensor) -> Tensor:
    """``W'`` in the shape and dtype of the module's weight, computed in float32 (float64) and rounded once.

    Raises:
        ValueError: a weight that the adapter does not fit.
    """
    matrix, lora_A, lora_B = matrices(layer, weight)
    acc = accumulate_dtype(weight, lora_A, lora_B)
    weight_norm = norm(layer, weight.to(acc) if layer.kind == "conv" else weight)
    magnitude = magnitude_for(layer, weight_norm)
    if layer.norm_axis == "in" and layer.kind == "conv":  # g of a channel is that of all its taps
        taps = math.prod(weight.shape[2:])
        magnitude, weight_norm = magnitude.repeat_interleave(taps), weight_norm.repeat_interleave(taps)
    merge = merge_weight if layer.norm_axis == "out" else merge_columns
    result, _ = merge(matrix, lora_A, lora_B, magnitude, scaling=layer.scaling, weight_norm=weight_norm)
    return result.t().contiguous() if layer.kind == "embedding" else result.contiguous().view(weight.shape)

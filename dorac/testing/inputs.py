"""Inputs for tests: shapes by regime, adapters off zero init."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dorac import reference
from dorac.testing.rounding import Sums

# (tokens, out, in, rank): which code path or corner each row is there for.
REGIMES = {
    "aligned": (64, 128, 128, 16),
    "odd": (33, 65, 127, 7),  # off by one in each dimension
    "rank_1": (16, 40, 24, 1),
    "rank_over_128": (16, 192, 160, 136),
    "rank_over_both": (8, 12, 10, 17),  # more than min(out, in): the Gram matrix is singular
    "one_token": (1, 64, 48, 4),
    "no_tokens": (0, 24, 16, 4),
    "no_outputs": (5, 0, 16, 4),
    "one_feature": (5, 1, 1, 1),
    "wide": (8, 16, 700, 8),
    "tall": (8, 700, 16, 8),
}


@dataclasses.dataclass(frozen=True)
class LinearInputs:
    """The tensors of one adapted linear layer, in the order of ``dora_linear``'s arguments."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    bias: Tensor | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def map(self, function: Callable[[Tensor], Tensor]) -> "LinearInputs":
        return LinearInputs(*(t if t is None else function(t) for t in self.tensors()))

    def double(self) -> "LinearInputs":
        """The same bits in float64, leaves of their own: what the truth is computed from."""
        return self.map(lambda t: t.detach().double().requires_grad_(t.requires_grad))

    def sums(self) -> Sums:
        """At most as many terms as the sums of the layer and of its gradients have; also of experts."""
        return Sums.of_linear(*self.tensors()[:3])

    def leaves(self) -> "LinearInputs":
        """Copies that all require a gradient, in the same memory layout."""
        return self.map(lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_())


def linear_inputs(
    regime: str | tuple[int, int, int, int] = "odd",
    *,
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    magnitude_dtype: torch.dtype | None = None,
    bias: bool = True,
    transposed: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> LinearInputs:
    """A layer whose factors are both non-zero and whose magnitude lies up to 20 % off the norm.

    ``transposed`` gives the weight as a view of an ``[in, out]`` tensor, as a GPT-2 Conv1D holds it. Values are drawn
    on the CPU in float64 and quantised once, so that every dtype sees the same layer.
    """
    tokens, out_features, in_features, rank = REGIMES[regime] if isinstance(regime, str) else regime
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * std

    weight = draw(out_features, in_features, std=max(in_features, 1) ** -0.5)
    lora_A = draw(rank, in_features, std=max(in_features, 1) ** -0.5)
    lora_B = draw(out_features, rank, std=0.5 * rank**-0.5)
    norm = torch.linalg.vector_norm(weight + lora_B @ lora_A, dim=1)
    magnitude = norm * (0.8 + 0.4 * torch.rand(out_features, generator=generator, dtype=torch.float64, device="cpu"))
    factor_dtype = factor_dtype or dtype
    magnitude_dtype = magnitude_dtype or torch.promote_types(dtype, torch.float32)
    if transposed:
        weight = weight.T.contiguous().T
    inputs = LinearInputs(
        draw(tokens, in_features).to(dtype),
        weight.to(dtype),
        lora_A.to(factor_dtype),
        lora_B.to(factor_dtype),
        magnitude.to(magnitude_dtype),
        draw(out_features).to(dtype) if bias else None,
    )
    return inputs.map(lambda t: t.to(device))


def embedding_inputs(
    shape: tuple[int, int, int, int] = (33, 65, 24, 7),
    *,
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(x, weight, lora_A, lora_B, magnitude)`` of an embedding of ``shape`` (indices, vocab, dim, rank).

    Neither factor is zero and the magnitude lies up to 20 % off the norm. The indices repeat some words and meet the
    first and the last one.
    """
    indices, vocab, dim, rank = shape
    layer = linear_inputs((1, dim, vocab, rank), dtype=dtype, factor_dtype=factor_dtype, seed=seed)
    x = torch.randint(vocab, (indices,), generator=torch.Generator().manual_seed(seed), device="cpu")
    x[: indices // 4] = x[-1:]
    x[:2] = torch.tensor([0, vocab - 1])[:indices]
    tensors = (x, layer.weight.T.contiguous(), layer.lora_A, layer.lora_B, layer.magnitude)
    return tuple(t.to(device) for t in tensors)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The shapes of one adapted convolution and the keywords that ``dora_conv`` takes for it."""

    x: tuple[int, ...]
    out: int
    kernel: tuple[int, ...]
    rank: int = 4
    grouped_lora_A: bool = True
    geometry: dict = dataclasses.field(default_factory=dict)

    @property
    def dimensions(self) -> int:
        return len(self.kernel)

    @property
    def groups(self) -> int:
        return self.geometry.get("groups", 1)

    def sums(self) -> Sums:
        """At most as many terms as the sums of the layer and of its gradients have."""
        taps = math.prod(self.kernel)
        border = self._border()
        positions = self.x[0] * math.prod(size + 2 * b for size, b in zip(self.x[2:], border, strict=True))
        filters = self.x[1] // self.groups * taps
        return Sums(positions, self.out * taps, self.x[1] * taps, self.rank * taps, filters, self._copies(border))

    def _border(self) -> tuple[int, ...]:
        padding = self.geometry.get("padding", 0)
        if isinstance(padding, str):  # "same" gives as many positions as x has
            return (0,) * self.dimensions
        return (padding,) * self.dimensions if isinstance(padding, int) else tuple(padding)

    def _copies(self, border: tuple[int, ...]) -> int:
        """How often padding may copy one element of x."""
        mode = self.geometry.get("padding_mode", "zeros")
        if mode == "zeros":
            return 0
        if self.geometry.get("padding") == "same":
            dilation = self.geometry.get("dilation", 1)
            dilation = (dilation,) * self.dimensions if isinstance(dilation, int) else dilation
            border = tuple(d * (k - 1) for d, k in zip(dilation, self.kernel, strict=True))
        each = [b + 1 if mode == "replicate" else 3 for b in border if b]  # the element itself counted
        return math.prod(each) - 1


# Named by what each is there for. Even kernels, and totals of padding that are odd, lie off centre.
CONVOLUTIONS = {
    "1d": Convolution((3, 6, 11), 8, (3,)),
    "1d_strided": Convolution((3, 6, 11), 8, (3,), geometry={"stride": 2, "padding": 1}),
    "1d_dilated_same": Convolution((2, 6, 12), 8, (4,), geometry={"dilation": 3, "padding": "same"}),
    "1d_grouped": Convolution((3, 6, 11), 8, (3,), geometry={"groups": 2, "padding": (2,)}),
    "1d_grouped_peft": Convolution((3, 6, 11), 8, (3,), grouped_lora_A=False, geometry={"groups": 2}),
    "1d_depthwise": Convolution((2, 6, 9), 12, (4,), 12, geometry={"groups": 6, "padding": 3}),
    "2d": Convolution((2, 6, 7, 9), 10, (3, 3), geometry={"padding": 1}),
    "2d_1x1": Convolution((2, 6, 5, 4), 10, (1, 1), 7),
    "2d_strided": Convolution((2, 6, 7, 9), 10, (3, 2), 1, geometry={"stride": (2, 1), "padding": (1, 0)}),
    "2d_dilated": Convolution((2, 6, 7, 9), 10, (3, 2), geometry={"dilation": (1, 2), "padding": 2}),
    "2d_same": Convolution((2, 6, 7, 9), 10, (2, 3), geometry={"dilation": (1, 2), "padding": "same"}),
    "2d_grouped": Convolution((2, 6, 7, 9), 9, (3, 3), 6, geometry={"groups": 3, "padding": "valid"}),
    "2d_grouped_peft": Convolution(
        (2, 6, 7, 9), 9, (3, 3), 6, grouped_lora_A=False, geometry={"groups": 3, "stride": 2, "padding": 1}
    ),
    "2d_depthwise": Convolution((2, 6, 7, 9), 12, (3, 3), 6, geometry={"groups": 6, "padding": 1}),
    "2d_depthwise_peft": Convolution(
        (2, 6, 7, 9), 6, (3, 3), 12, grouped_lora_A=False, geometry={"groups": 6, "padding": 1}
    ),
    "2d_reflect": Convolution((2, 6, 7, 9), 10, (3, 3), geometry={"padding": (1, 2), "padding_mode": "reflect"}),
    "2d_replicate": Convolution(
        (2, 6, 7, 9), 10, (3, 3), geometry={"padding": 2, "stride": 2, "padding_mode": "replicate"}
    ),
    "2d_circular": Convolution(
        (2, 6, 7, 9), 10, (2, 3), geometry={"padding": "same", "dilation": 2, "padding_mode": "circular"}
    ),
    "3d": Convolution((2, 4, 4, 5, 3), 6, (2, 3, 2), geometry={"padding": 1}),
    "3d_strided": Convolution((2, 4, 4, 5, 3), 6, (2, 3, 1), geometry={"stride": (1, 2, 2), "padding": (0, 1, 0)}),
    "3d_dilated": Convolution((2, 4, 4, 5, 3), 6, (2, 3, 2), geometry={"dilation": (2, 1, 1), "padding": "same"}),
    "3d_grouped_peft": Convolution(
        (2, 4, 4, 5, 3), 6, (2, 2, 2), 6, grouped_lora_A=False, geometry={"groups": 2, "padding": 1}
    ),
    "3d_depthwise": Convolution((2, 4, 4, 5, 3), 4, (2, 3, 2), 4, geometry={"groups": 4}),
    "3d_circular": Convolution((2, 4, 4, 5, 3), 6, (2, 3, 2), geometry={"padding": 1, "padding_mode": "circular"}),
}


def conv_inputs(
    case: str | Convolution,
    *,
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    bias: bool = True,
    channels_last: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> LinearInputs:
    """The tensors of a convolution, in the order of ``dora_conv``'s arguments; drawn as those of ``linear_inputs``.

    ``channels_last`` gives x, weight and lora_A with their channels next to each other in memory.
    """
    case = CONVOLUTIONS[case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * std

    in_channels, groups, ones = case.x[1], case.groups, [1] * case.dimensions
    filters = (in_channels // groups, *case.kernel)
    std = math.prod(filters) ** -0.5
    weight = draw(case.out, *filters, std=std)
    lora_A = draw(case.rank, filters[0] if case.grouped_lora_A else in_channels, *case.kernel, std=std)
    lora_B = draw(case.out, case.rank // groups, *ones, std=0.5 * (case.rank // groups) ** -0.5)
    norm = reference.filter_norm(weight, lora_A, lora_B, 1.0, groups)
    magnitude = norm * (0.8 + 0.4 * torch.rand(case.out, generator=generator, dtype=torch.float64, device="cpu"))
    factor_dtype = factor_dtype or dtype
    inputs = LinearInputs(
        draw(*case.x).to(dtype),
        weight.to(dtype),
        lora_A.to(factor_dtype),
        lora_B.to(factor_dtype),
        magnitude.to(torch.promote_types(dtype, torch.float32)),
        draw(case.out).to(dtype) if bias else None,
    )
    if channels_last:
        inputs = inputs.map(lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.ndim > 1 else t)
    return inputs.map(lambda t: t.to(device))


def expert_inputs(experts: int, regime: str | tuple[int, int, int, int] = "odd", **options) -> LinearInputs:
    """``experts`` different layers of :func:`linear_inputs`, every tensor stacked; ``transposed`` as there.

    Each has a seed of its own, from ``seed`` on.
    """
    transposed, seed = options.pop("transposed", False), options.pop("seed", 0)
    layers = [linear_inputs(regime, seed=seed + i, **options) for i in range(experts)]
    stacked = LinearInputs(
        *(None if ts[0] is None else torch.stack(ts) for ts in zip(*(x.tensors() for x in layers), strict=True))
    )
    if not transposed:
        return stacked
    return dataclasses.replace(stacked, weight=stacked.weight.mT.contiguous().mT)

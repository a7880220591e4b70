"""The functionals that take one of several layers per row, and their textbook: a dense layer for every row.

Legend: a layer's tensors come in the order ``x, weight, lora_A, lora_B, magnitude, bias``.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dorac import functional, reference
from dorac.testing import LinearInputs, expert_inputs, linear_inputs

SCALING = 0.7
EXPERT_OF_ROW = torch.tensor([0, 0, 0, 2, 2, 3])  # expert 1 gets no row
OFFSETS = torch.tensor([3, 3, 5, 6], dtype=torch.int32)
ADAPTER_OF_ROW = torch.tensor([2, -1, 0, 2, -1])  # adapter 1 gets no row


@dataclasses.dataclass(frozen=True)
class RowLayer:
    """One functional.

    Args:
        function: ``(*tensors, scaling=..., weight_norm=..., norm_grad=...)``.
        gather: the tensors of one dense layer for each row (or expert), from those of the function.
        inputs: ``(out, in, rank, **options of linear_inputs)``.
        norm: ``(weight, lora_A, lora_B, scaling)``.
    """

    function: Callable[..., Tensor]
    gather: Callable[..., tuple[Tensor | None, ...]]
    inputs: Callable[..., LinearInputs]
    norm: Callable[..., Tensor] = functional.norm_factored

    def textbook(
        self,
        *tensors: Tensor | None,
        scaling: float = SCALING,
        weight_norm: Tensor | None = None,
        norm_grad: bool = False,
    ) -> Tensor:
        if norm_grad:
            weight_norm = reference.row_norm(*tensors[1:4], scaling)
        *gathered, norm = self.gather(*tensors, weight_norm)
        y = reference.dora_linear(*gathered, scaling=scaling, weight_norm=norm)
        return y if tensors[0].ndim == 3 else y.squeeze(1)


def at(index: Tensor, *stacks: Tensor | None) -> list[Tensor | None]:
    return [None if stack is None else stack[index.to(stack.device)] for stack in stacks]


def gather_grouped(x, *stacks):
    return x[:, None], *at(EXPERT_OF_ROW, *stacks)


def gather_mixed(x, weight, lora_A, lora_B, magnitude, bias, weight_norm):
    """A row without an adapter has factors of zero and a magnitude that is the norm."""
    rows = len(ADAPTER_OF_ROW)
    factors = [
        t.where((ADAPTER_OF_ROW >= 0).to(t.device)[:, None, None], 0) for t in at(ADAPTER_OF_ROW, lora_A, lora_B)
    ]
    adapted = (ADAPTER_OF_ROW >= 0).to(weight.device)[:, None]
    base_norm = torch.linalg.vector_norm(weight, dim=1).detach()
    return (
        x,
        weight.expand(rows, *weight.shape),
        *factors,
        at(ADAPTER_OF_ROW, magnitude)[0].where(adapted, base_norm),
        None if bias is None else bias.expand(rows, *bias.shape),
        None if weight_norm is None else at(ADAPTER_OF_ROW, weight_norm)[0].where(adapted, base_norm),
    )


def grouped_inputs(out_features: int, in_features: int, rank: int, **options) -> LinearInputs:
    inputs = expert_inputs(4, (2, out_features, in_features, rank), **options)
    # A copy: torch cannot compile a jvp that takes a view of an argument which is part of a larger tensor.
    return dataclasses.replace(inputs, x=inputs.x.flatten(0, 1)[: len(EXPERT_OF_ROW)].clone())


def mixed_inputs(out_features: int, in_features: int, rank: int, **options) -> LinearInputs:
    """Three adapters whose magnitudes lie off their norms over the first expert's weight."""
    rows = len(ADAPTER_OF_ROW)
    one = linear_inputs((3 * rows, out_features, in_features, rank), **options)
    stack = expert_inputs(3, (1, out_features, in_features, rank), **options)
    return LinearInputs(
        one.x.view(rows, 3, in_features), one.weight, stack.lora_A, stack.lora_B, stack.magnitude, one.bias
    )


def grouped(*tensors, **options):
    return functional.dora_linear_grouped(*tensors, offsets=OFFSETS.to(tensors[0].device), **options)


def mixed(*tensors, **options):
    return functional.dora_linear_mixed(*tensors, adapter_index=ADAPTER_OF_ROW.to(tensors[0].device), **options)


LAYERS = {
    "experts": RowLayer(
        functional.dora_linear,
        lambda *tensors: tensors,
        lambda out_features, in_features, rank, **options: expert_inputs(
            3, (4, out_features, in_features, rank), **options
        ),
    ),
    "grouped": RowLayer(grouped, gather_grouped, grouped_inputs),
    "mixed": RowLayer(mixed, gather_mixed, mixed_inputs, functional.mixed_norm),
}

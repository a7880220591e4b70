"""The functionals that take one of several layers per row, and their textbook: a dense layer for every row.

Legend: a layer's tensors come in the order ``x, weight, lora_A, lora_B, magnitude, bias``.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dorac import functional, reference
from dorac.testing import Budget, LinearInputs, Sums, expert_inputs, layer_budgets, linear_inputs

SCALING = 0.7
OFFSETS = torch.tensor([3, 3, 5, 6], dtype=torch.int32)  # expert 1 gets no row
ADAPTER_OF_ROW = torch.tensor([2, -1, 0, 2, -1])  # adapter 1 gets no row


@dataclasses.dataclass(frozen=True)
class RowLayer:
    """One functional with the layers that its rows take.

    Args:
        functional: ``(*tensors, scaling=..., weight_norm=..., norm_grad=..., **of_rows)``.
        of_rows: the argument that says which layer each row takes, if there is one.
        dense: the tensors after x, and the norm, of one dense layer for each row (or expert).
        inputs: ``(out, in, rank, **options of linear_inputs)``.
        norm: ``(weight, lora_A, lora_B, scaling)``.
    """

    functional: Callable[..., Tensor]
    of_rows: dict[str, Tensor]
    dense: Callable[..., tuple[Tensor | None, ...]]
    inputs: Callable[..., LinearInputs]
    norm: Callable[..., Tensor] = functional.norm_factored

    def function(self, *tensors: Tensor | None, **options) -> Tensor:
        of_rows = {name: index.to(tensors[0].device) for name, index in self.of_rows.items()}
        return self.functional(*tensors, **of_rows, **options)

    def gather(self, x: Tensor, *stacks: Tensor | None) -> tuple[Tensor | None, ...]:
        """x as ``[row or expert, *, in]``, and the layer of each."""
        return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]), *self.dense(*stacks)

    def textbook(
        self,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        *vectors: Tensor | None,
        scaling: float | Tensor = SCALING,
        weight_norm: Tensor | None = None,
        norm_grad: bool = False,
    ) -> Tensor:
        if norm_grad:
            weight_norm = row_norm(weight, lora_A, lora_B, scaling)
        lora_B, scaling = scaled_stack(lora_B, scaling)
        *gathered, norm = self.gather(x, weight, lora_A, lora_B, *vectors, weight_norm)
        y = reference.dora_linear(*gathered, scaling=scaling, weight_norm=norm)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def budgets(layer: RowLayer, tensors: Sequence[Tensor | None], **options) -> dict[str, Budget]:
    """As :func:`layer_budgets`; the sums over tokens are at most those of all rows."""
    options = {"scaling": SCALING, **options}
    return layer_budgets(layer.textbook, row_norm, tensors, Sums.of_linear(*tensors[:3]), **options)


def scaled_stack(lora_B: Tensor, scaling: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """The scalings ``[K]`` of a stack in its lora_B, if there is one for each adapter."""
    each = isinstance(scaling, Tensor) and scaling.ndim == 1
    return (scaling.view(-1, 1, 1) * lora_B, 1.0) if each else (lora_B, scaling)


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """The textbook's norm of every layer of a stack."""
    return reference.row_norm(weight, lora_A, *scaled_stack(lora_B, scaling))


def at(index: Tensor, *stacks: Tensor | None) -> list[Tensor | None]:
    return [None if stack is None else stack[index.to(stack.device)] for stack in stacks]


def experts(count: int, tokens: int) -> RowLayer:
    """As many rows for every expert."""

    def inputs(out_features: int, in_features: int, rank: int, **options) -> LinearInputs:
        # torch stacks no empty list.
        return expert_inputs(max(count, 1), (tokens, out_features, in_features, rank), **options).map(
            lambda t: t[:count]
        )

    return RowLayer(functional.dora_linear, {}, lambda *stacks: stacks, inputs)


def grouped(offsets: Tensor, tail: int = 0) -> RowLayer:
    """Rows sorted by expert, then a tail that no expert takes: in the textbook's a layer of zeros does."""
    count, rows = len(offsets), offsets.tolist()[-1] if len(offsets) else 0
    expert_of_row = torch.arange(count).repeat_interleave(offsets.long().diff(prepend=torch.zeros(1).long()))

    def inputs(out_features: int, in_features: int, rank: int, **options) -> LinearInputs:
        tokens = -(-(rows + tail) // max(count, 1))
        drawn = experts(count, tokens).inputs(out_features, in_features, rank, **options)
        # A copy: torch cannot compile a jvp that takes a view of an argument which is part of a larger tensor.
        return dataclasses.replace(drawn, x=drawn.x.flatten(0, 1)[: rows + tail].clone())

    def dense(*stacks: Tensor | None) -> list[Tensor | None]:
        of_rows = at(expert_of_row, *stacks)
        return [None if t is None else torch.cat([t, t.new_zeros(tail, *t.shape[1:])]) for t in of_rows]

    return RowLayer(functional.dora_linear_grouped, {"offsets": offsets}, dense, inputs)


def mixed(adapter_of_row: Tensor, adapters: int, tokens: int) -> RowLayer:
    """Rows of one base weight, as many tokens each, with an adapter or without."""
    rows = len(adapter_of_row)

    def dense(weight, lora_A, lora_B, magnitude, bias, weight_norm):
        """A row without an adapter has factors of zero and a magnitude that is the norm."""
        adapted = (adapter_of_row >= 0).to(weight.device)[:, None]
        factors = [t.where(adapted[:, None], 0) for t in at(adapter_of_row, lora_A, lora_B)]
        base_norm = torch.linalg.vector_norm(weight, dim=1).detach()
        return (
            weight.expand(rows, *weight.shape),
            *factors,
            at(adapter_of_row, magnitude)[0].where(adapted, base_norm),
            None if bias is None else bias.expand(rows, *bias.shape),
            None if weight_norm is None else at(adapter_of_row, weight_norm)[0].where(adapted, base_norm),
        )

    def inputs(out_features: int, in_features: int, rank: int, **options) -> LinearInputs:
        """The adapters' magnitudes lie off their norms over the first expert's weight."""
        one = linear_inputs((rows * tokens, out_features, in_features, rank), **options)
        stack = expert_inputs(adapters, (1, out_features, in_features, rank), **options)
        x = one.x.view(rows, tokens, in_features)
        return LinearInputs(x, one.weight, stack.lora_A, stack.lora_B, stack.magnitude, one.bias)

    return RowLayer(
        functional.dora_linear_mixed, {"adapter_index": adapter_of_row}, dense, inputs, functional.mixed_norm
    )


LAYERS = {"experts": experts(3, 4), "grouped": grouped(OFFSETS), "mixed": mixed(ADAPTER_OF_ROW, 3, 3)}

"""Experts of which each rank has some, whole: the forward of a :class:`dorac.nn.DoraExperts` on this rank's.

Every rank has all tokens and the router's whole choice, as in a block that is tensor parallel. It computes the rows of
its own experts; those of others, which it sorts behind, stay zero. What the ranks have is summed once forward, and the
gradients of the hidden states and of the router's weights once backward. No gradient of an adapter is due.

Llama 4 gives every expert all tokens, by expert: there each rank takes its experts' rows, and the result is gathered.

Dropout is drawn by each rank for the rows that it computes, from a generator that should be in one state on all.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dorac import functional
from dorac.ops import collectives, crossing
from dorac.ops.collectives import Group, local

if TYPE_CHECKING:
    from dorac.nn.experts import DoraExperts


@dataclasses.dataclass(frozen=True)
class ExpertShards:
    """How experts are spread over the ranks of a mesh of one dimension: as many of them on each."""

    mesh: DeviceMesh
    columns: ClassVar[bool] = False  # the norms of this rank's experts need nothing of others

    def __deepcopy__(self, memo: dict) -> "ExpertShards":
        return self  # a copy of the model is on the same mesh

    @property
    def group(self) -> Group:
        return self.mesh.get_group()

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """See :meth:`dorac.nn.tensor_parallel.Shards.holds`."""
        return crossing.are_on(self.mesh, tensors)

    def local_operands(self, layer: "DoraExperts") -> None:
        """The norms are not those of one matrix."""
        return None

    def local_norm(self, layer: "DoraExperts") -> Tensor:
        """The norms of this rank's experts, without gradient."""
        norms = [
            functional.norm_factored(local(matrices), local(lora_A), local(lora_B), layer.scaling)
            for matrices, lora_A, lora_B, *_ in map(layer.tensors, layer.projections)
        ]
        return layer.joined_norms(norms)

    def enter(self, layer: "DoraExperts") -> dict[str, tuple[Tensor | None, ...]]:
        """``layer.tensors`` of each projection: this rank's parts, whose gradients come back in their layouts."""
        tensors = []
        for projection in layer.projections:
            tensors += layer.base_tensors(projection)
        count = len(tensors) // len(layer.projections)
        tensors += layer._own_parameters()
        for t in tensors:
            if t is not None and getattr(t, "device_mesh", None) != self.mesh:
                mesh = getattr(t, "device_mesh", None)
                raise ValueError(
                    f"the experts' tensors must be on the mesh {self.mesh}, got {mesh or 'a plain tensor'} for one of "
                    f"{list(t.shape)}"
                )
        trained = [t for t in tensors if t is not None and t.requires_grad]
        crosses, parts = bool(trained) and torch.is_grad_enabled(), iter(())
        if crosses:
            lasting = layer.lasting if torch.compiler.is_compiling() else None
            if lasting is not None and len(trained) == len(lasting.parts) and lasting.are_of(trained):
                parts = iter(lasting.parts)
            else:
                frozen = [t for t in tensors if t is not None and not t.requires_grad]
                parts = iter(crossing.enter(self.group, [False] * len(trained), frozen, trained))
        own = [None if t is None else next(parts) if crosses and t.requires_grad else local(t) for t in tensors]
        entered, adapter = {}, own[count * len(layer.projections) :]
        for i, projection in enumerate(layer.projections):
            weight, bias = own[count * i : count * (i + 1)]
            entered[projection] = (weight.mT if layer.transposed else weight, *adapter[3 * i : 3 * i + 3], bias)
        return entered

    def numbers(self, experts: int, device: torch.device) -> tuple[Tensor, int]:
        """The numbers of all experts as this rank counts its own; the others come behind. And how many it has."""
        own = experts // self.group.size()
        numbers = torch.arange(experts, device=device) - own * self.group.rank()
        return torch.where((numbers >= 0) & (numbers < own), numbers, own), own

    def shared(self, *tensors: Tensor) -> list[Tensor]:
        """What all ranks hold, of which each uses what its own experts take."""
        return [collectives.move_once(t, "share", 0, self.group) for t in tensors]

    def summed(self, y: Tensor) -> Tensor:
        """The sum of what the ranks have, which nobody else uses."""
        return collectives.sum_in_place(y, self.group)

    def own_rows(self, rows: Tensor) -> Tensor:
        """Of ``[E, tokens, in]`` this rank's experts'."""
        return collectives.move(rows, "slice", 0, self.group)

    def all_rows(self, rows: Tensor) -> Tensor:
        """Of all experts what each rank has of its own."""
        return collectives.move(rows, "gather", 0, self.group)

"""The forward of a layer whose parameters are DTensors of tensor parallelism, on this rank's parts of them.

:mod:`dorac.parallel` makes the parameters DTensors and gives the layer a :class:`Shards`, which its forward calls. The
input and the result are plain tensors, as between torch's styles; each crosses to the other ranks by the collective
that its layouts ask for (:mod:`dorac.ops.collectives` names them), and the layer in between is the one that unsharded
layers run. The DTensors cross once each way, all of a layer's together.

    matrix [out, in]   x             y              due from each rank in backward
    Shard(0)           held          parted (out)   dx, lora_A
    Shard(1)           parted (in)   due            lora_B, magnitude (with norm_grad the norm)

In compiled code y of the second is mostly held, see :mod:`dorac.nn.behind_sum`, and the magnitude's gradient with it.

Dropout of an input that the ranks hold has one mask if their generators are in one state, as DTensors ask for, too:
seed them alike. Of an input that is parted each rank's mask is then its own in eager on a GPU; elsewhere (the CPU's
generator cannot skip numbers, the compiler draws its own) the ranks drop the same places of their parts.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from dorac import checks, functional
from dorac.magnitudes import HALF, widen
from dorac.nn import behind_sum, norm_cache
from dorac.nn.layer import parameter
from dorac.ops import collectives, crossing, eager_parts, front, sharded
from dorac.ops.collectives import Group, local

if TYPE_CHECKING:
    from dorac.nn.embedding import DoraEmbedding
    from dorac.nn.layer import DoraLayer
    from dorac.nn.linear import DoraLinear


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a layer is spread over the ranks of a mesh of one dimension."""

    mesh: DeviceMesh
    columns: bool  # whether the adapted matrix [out, in] is Shard(1), not Shard(0)
    given: Placement  # of the input, where that is a plain tensor
    wanted: Placement  # of the result
    returns_local: bool  # whether the result is a plain tensor

    def __post_init__(self) -> None:
        """What every forward asks: the mesh and the placements answer at the price of an op."""
        settled = {
            "given_dim": self.given.dim if self.given.is_shard() else None,
            "wanted_dim": self.wanted.dim if self.wanted.is_shard() else None,
            "adapter_due": (not self.columns, self.columns, self.columns),  # the gradients of lora_A, lora_B, magnitude
            "_group": self.mesh.get_group(),
        }
        vars(self).update(settled)

    def __reduce__(self) -> tuple:
        return Shards, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def group(self) -> Group:
        """Of the mesh's ranks; the compiler knows those that it asks the mesh for."""
        return self.mesh.get_group() if torch.compiler.is_compiling() else self._group

    def __deepcopy__(self, memo: dict) -> "Shards":
        return self  # a copy of the model is on the same mesh

    def linear(self, layer: "DoraLinear", x: Tensor) -> Tensor:
        """The forward of a linear layer."""
        base, group = layer._modules["base_layer"], self.group
        weight, bias = parameter(base, "weight"), parameter(base, "bias")
        adapted = layer.merged_norm is None and not layer.runs_base
        adapter = self._adapter(layer) if adapted else []
        norm = norm_cache.known_norm(layer, (weight, *adapter[:2])) if adapted else None
        # Over the columns every rank adds the bias to the whole result, or to its own part of the lines.
        due = self.columns and self.wanted_dim is not None and not self._parts_features(x.ndim)
        x = self._moved_in(x, group)
        if adapted and _trains_adapter_alone(layer, adapter, weight, bias):
            y, norm = self._of_parts(layer, x, group, adapter, weight, None if self.columns else bias, norm)
            if y is not None:
                last = local(bias) if self.columns and bias is not None else None
                return self._leave(y, layer, group, last)
        is_behind = adapted and self.columns and self.wanted.is_replicate() and group.size() > 1
        is_behind = is_behind and behind_sum.fits(layer, x, weight, *adapter[:2])
        of_adapter = self.adapter_due if not is_behind else (False, True, False)
        *parts, matrix, bias = self._enter(layer, group, adapter, weight, (bias, due), of_adapter)
        matrix = matrix.t() if layer.fan_in_fan_out else matrix
        last, bias = (bias, None) if self.columns else (None, bias)
        if not adapted:
            y = F.linear(x, matrix, bias)
        else:
            lora_A, lora_B, magnitude, norm = self._operands(layer, matrix, parts, norm, group)
            if is_behind:
                y = behind_sum.linear(x, matrix, lora_A, lora_B, magnitude, norm, layer._scaling, group)
                return self._leave(y, layer, group, last, is_summed=True)
            dropout_p = layer.lora_dropout if layer.training else 0.0
            with self._places(x, group, dropout_p):
                y = functional.dora_linear(
                    x,
                    matrix,
                    lora_A,
                    lora_B,
                    magnitude,
                    bias,
                    scaling=layer._scaling,
                    weight_norm=norm,
                    norm_grad=layer.norm_grad and norm is None,
                    dropout_p=dropout_p,
                    dropout_on=layer.dropout_on,
                    save_output=layer.save_output and self._gives_y(x.ndim),
                )
        return self._leave(y, layer, group, last)

    def _of_parts(
        self,
        layer: "DoraLinear",
        x: Tensor,
        group: Group,
        adapter: Sequence[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        norm: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """This rank's y where the eager layer takes it (on a GPU with kernels), else None; the norm if it is known."""
        entry = crossing.Entry(group, self.adapter_due, (weight,), adapter)
        entry.watch()
        *parts, matrix = map(local, (*adapter, weight))
        matrix = matrix.t() if layer.fan_in_fan_out else matrix
        if norm is None and self.columns:
            with torch.no_grad():
                *_, norm = self._operands(layer, matrix, parts, None, group)
        dropout_p = layer.lora_dropout if layer.training else 0.0
        bias = None if bias is None else local(bias)
        save_output = layer.save_output and self._gives_y(x.ndim)
        options = norm, checks.check_scaling(layer._scaling), dropout_p, layer.dropout_on, save_output
        if not dropout_p:
            return eager_parts.dora_linear(entry, parts, x, matrix, bias, *options), norm
        with self._places(x, group, dropout_p):
            return eager_parts.dora_linear(entry, parts, x, matrix, bias, *options), norm

    def embedding(self, layer: "DoraEmbedding", ids: Tensor) -> Tensor:
        """The forward of an embedding; over the vocabulary a rank's result is zero where another has the row."""
        from dorac.nn.embedding import scaled  # which imports this module's callers

        base, group = layer.base_layer, self.group
        adapted = not layer.merged and not layer.runs_base
        adapter = self._adapter(layer) if adapted else []
        norm = layer._known_norm() if adapted else None
        ids = self._whole(ids, group)
        *parts, table, _ = self._enter(layer, group, adapter, base.weight, (None, False), self.adapter_due)
        padding_idx, inside = base.padding_idx, None
        if self.columns:
            vocabulary, rows = layer.num_embeddings, table.shape[0]
            first = group.rank() * -(-vocabulary // group.size())
            inside = (ids >= first) & (ids < first + rows)
            elsewhere = ~inside & (ids >= 0) & (ids < vocabulary)  # what is out of range raises below
            ids = torch.where(elsewhere, 0, ids - torch.where((ids >= 0) & (ids < vocabulary), first, 0))
            is_here = padding_idx is not None and first <= padding_idx < first + rows
            padding_idx = padding_idx - first if is_here else None
        if not adapted:
            y = F.embedding(ids, table, padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        else:
            lora_A, lora_B, magnitude, norm = self._operands(layer, table.t(), parts, norm, group)
            y = functional.dora_embedding(
                ids,
                table,
                lora_A,
                lora_B,
                magnitude,
                scaling=layer.scaling,
                weight_norm=norm,
                norm_grad=layer.norm_grad and norm is None,
                padding_idx=padding_idx,
                scale_grad_by_freq=base.scale_grad_by_freq,
                budget=layer.norm_budget,
            )
        y = scaled(y, layer.embed_scale)
        y = y if inside is None else torch.where(inside.unsqueeze(-1), y, 0)
        return self._leave(y, layer, group, None)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are DTensors on the layer's mesh and no other one (as FSDP2's): the forward has them."""
        return crossing.are_on(self.mesh, tensors)

    def local_operands(self, layer: "DoraLayer") -> tuple[Tensor, Tensor, Tensor]:
        """``layer.norm_operands()`` of this rank, for :func:`total_norms`."""
        return tuple(local(t) for t in layer.norm_operands())

    def local_norm(self, layer: "DoraLayer") -> Tensor:
        """The norm of this rank's part, without gradient, for :func:`total_norms`."""
        return functional.norm_factored(*self.local_operands(layer), layer.scaling, budget=layer.norm_budget)

    def _adapter(self, layer: "DoraLayer") -> list[Tensor]:
        """lora_A, lora_B and the magnitude."""
        adapter = layer._own_parameters()
        for name, t in zip(("lora_A", "lora_B", "magnitude"), adapter, strict=True):
            mesh = getattr(t, "device_mesh", None)
            if mesh is not self.mesh and mesh != self.mesh:
                raise ValueError(f"{name} must be on the mesh of weight, {self.mesh}, got {mesh or 'a plain tensor'}")
        if layer.training and adapter[2].dtype in HALF:
            widen(adapter[2])
        return adapter

    def _operands(
        self, layer: "DoraLayer", matrix: Tensor, adapter: Sequence[Tensor], norm: Tensor | None, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The adapter at the layer's strength, and the norm of this rank's rows unless the function takes it."""
        lora_A, lora_B, magnitude = adapter
        if norm is None and (self.columns or layer._strength is not None):
            options = {"norm_grad": layer.norm_grad, "budget": layer.norm_budget}
            norm = functional.norm_factored(matrix, lora_A, lora_B, layer.scaling, **options)
            norm = collectives.total_norm(norm, group) if self.columns else norm
        if layer._strength is not None:
            lora_B, magnitude, norm = functional.at_strength(lora_B, magnitude, norm, layer._strength)
        return lora_A, lora_B, magnitude, norm

    def _parts_features(self, ndim: int) -> bool:
        """Whether the result, of so many dimensions, is parted along its last."""
        return self.wanted_dim is not None and self.wanted_dim % ndim == ndim - 1

    def _places(self, x: Tensor, group: Group, dropout_p: float) -> contextlib.AbstractContextManager:
        """In which x is dropped."""
        return _own_places(x, group) if dropout_p and self.columns else contextlib.nullcontext()

    def _gives_y(self, ndim: int) -> bool:
        """Whether the layer returns what it computes: else to save that saves nothing.

        Nor is it saved of a DTensor, whose version does not tell of writes to it.
        """
        return not self.columns and self.returns_local and self._parts_features(ndim)

    def _whole(self, ids: Tensor, group: Group) -> Tensor:
        """Indices as every rank holds them."""
        if isinstance(ids, DTensor):
            return ids.full_tensor()
        return collectives.move(ids, "gather", self.given.dim, group) if self.given.is_shard() else ids

    def _enter(
        self,
        layer: "DoraLayer",
        group: Group,
        adapter: Sequence[Tensor],
        weight: Tensor,
        of_bias: tuple[Tensor | None, bool],
        due: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """This rank's parts of the adapter's parameters, of the weight and of the bias.

        ``of_bias``: the bias, and whether its gradient is due, as ``due`` of the adapter's. A part that nothing trains
        autograd does not see.
        """
        bias, bias_is_due = of_bias
        entering, due = [*adapter], [*due[: len(adapter)]]
        if weight.requires_grad:
            entering, due = [*entering, weight], [*due, False]
        if bias is not None and bias.requires_grad:
            entering, due = [*entering, bias], [*due, bias_is_due]
        lasting = layer.lasting if torch.compiler.is_compiling() else None
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in entering):
            parts = [local(p) for p in entering]
        elif lasting is not None and len(entering) == len(lasting.parts) and lasting.are_of(entering):
            parts = [*crossing.summed_in_backward(group, due, lasting.parts)]
        else:
            parts = [*crossing.enter(group, due, (weight,), entering)]
        own_bias = None if bias is None else parts.pop() if bias.requires_grad else local(bias)
        own_weight = parts.pop() if weight.requires_grad else local(weight)
        return *parts, own_weight, own_bias

    def _moved_in(self, x: Tensor, group: Group) -> Tensor:
        """x as the layer wants it."""
        last = x.ndim - 1
        if not isinstance(x, DTensor):
            dim = None if self.given_dim is None else self.given_dim % x.ndim
            if self.columns and dim == last:
                return x
            if self.columns and self.given.is_replicate() and x.shape[last] % group.size() == 0:
                return collectives.move(x, "slice", last, group)
            if not self.columns and self.given.is_replicate():
                return collectives.move_once(x, "share", 0, group)
            if not self.columns and dim is not None:
                return collectives.move_once(x, "spread", dim, group)
            x = DTensor.from_local(x, self.mesh, [self.given if dim is None else Shard(dim)], run_check=False)
        wanted = Shard(last) if self.columns else Replicate()
        return sharded.to_shard(x, (wanted,), (wanted if self.columns else Partial(),))

    def _leave(
        self, y: Tensor, layer: "DoraLayer", group: Group, bias: Tensor | None, is_summed: bool = False
    ) -> Tensor:
        """What the layer returns of this rank's y, with the bias that is added to the sum of what they compute."""
        last, dim = y.ndim - 1, None if self.wanted_dim is None else self.wanted_dim % y.ndim
        if not self.columns and dim == last and self.returns_local:
            return y
        lead, features = y.shape[:-1], parameter(layer, "lora_magnitude_vector").shape[0]
        if self.columns and self.wanted.is_replicate() and not is_summed:
            y = collectives.sum_in_place(y, group)
        elif self.columns and dim is not None and y.shape[dim] % group.size() == 0:
            y = collectives.move(y, "scatter", dim, group)
        elif not self.columns and self.wanted.is_replicate() and features % group.size() == 0:
            y = collectives.move(y, "gather", last, group)
        elif (self.columns or dim != last) and not is_summed:
            y = self._wrapped(y, Partial() if self.columns else Shard(last), (*lead, features))
            y = y.redistribute(placements=[self.wanted]).to_local()
        if bias is not None:
            if dim == last:
                bias = collectives.move(bias, "slice", 0, group)
            y = y + bias.to(y.dtype)
        return y if self.returns_local else self._wrapped(y, self.wanted, (*lead, features))

    def _wrapped(self, y: Tensor, placement: Placement, shape: tuple[int, ...]) -> DTensor:
        placement = Shard(placement.dim % y.ndim) if placement.is_shard() else placement
        whole = torch.empty(shape, device="meta")
        return DTensor.from_local(y, self.mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())


class Lasting:
    """Parts of a layer's parameters for compiled code, where the adapter alone is trained.

    DTensors at the edge of a graph cost it more time than its kernels take, most of all their gradients.
    """

    __slots__ = ("parameters", "parts", "sources")

    def __init__(self, parameters: Sequence[DTensor]) -> None:
        self.parameters = tuple(parameters)
        self.sources = tuple([p._local_tensor for p in parameters])
        with torch.enable_grad():
            self.parts = crossing.lasting(parameters)

    def are_of(self, parameters: Sequence[DTensor]) -> bool:
        """Whether these are the parameters, and hold what they held: ``to()`` gives them other tensors."""
        for given, own, source in zip(parameters, self.parameters, self.sources, strict=True):
            if given is not own or given._local_tensor is not source or not given.requires_grad:
                return False
        return True


def keep_parts(layer: "DoraLayer") -> None:
    """Makes the layer's lasting parts anew, where it is spread and they can be: after whatever replaces parameters."""
    layer.lasting = None
    if layer.shards is None:
        return
    parameters = [*layer._own_parameters()]
    with torch.inference_mode(False):
        usable = layer.shards.holds(parameters) and all(
            [p.requires_grad and p.is_leaf and not p.is_meta and type(p._local_tensor) is Tensor for p in parameters]
        )
        if usable and not torch.compiler.is_compiling():
            layer.lasting = Lasting(parameters)


def total_norms(shards: Sequence[Shards | None], norms: Sequence[Tensor]) -> list[Tensor]:
    """The norms of layers from those of this rank's parts, which sum in one collective a mesh."""
    norms, meshes = list(norms), {}
    for i, one in enumerate(shards):
        if one is not None and one.columns:
            meshes.setdefault(one.mesh, []).append(i)
    for mesh, members in meshes.items():
        totals = collectives.total_norms([norms[i] for i in members], mesh.get_group())
        for i, total in zip(members, totals, strict=True):
            norms[i] = total
    return norms


def _trains_adapter_alone(layer: "DoraLinear", adapter: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> bool:
    """Whether an eager forward trains the whole adapter, as it is, with a norm that is a constant, and nothing else."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not layer.norm_grad
        and layer._strength is None
        and not isinstance(layer._scaling, Tensor)
        and all([t.requires_grad for t in adapter])
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )


@contextlib.contextmanager
def _own_places(x: Tensor, group: Group) -> Iterator[None]:
    """The ranks' generators, which are in one state, draw numbers of their own, and are in one state afterwards."""
    if not x.is_cuda or torch.compiler.is_compiling() or front.capturing():
        yield
        return
    generator = torch.cuda.default_generators[x.device.index]
    start, step = generator.get_offset(), -(-x.numel() // 4) * 4  # more than a thread draws
    own = start + group.rank() * step
    generator.set_offset(own)
    try:
        yield
    finally:
        has_drawn = generator.get_offset() != own
        generator.set_offset(start + group.size() * step if has_drawn else start)

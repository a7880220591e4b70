"""Whether all ranks of a sharded model have the same adapters.

torch does not look: another r gives wrong numbers under tensor parallelism and breaks off a collective under FSDP2,
another scaling gives wrong numbers under both.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from dorac.nn import DoraLayer
from dorac.ops import sharded

REMEDY = "build the model with one config on every rank, before it is sharded"


def mesh_of(tensors: Iterable[Tensor]) -> "torch.distributed.DeviceMesh | None":
    """The mesh over which the first of these that is sharded lies."""
    return next((t.device_mesh for t in tensors if sharded.any_sharded(t)), None)


def refuse_other_adapters(layers: Mapping[str, DoraLayer], mesh: "torch.distributed.DeviceMesh") -> None:
    """Raises a ``ValueError``, the same on every rank of the mesh, if these layers are not alike on all of them."""
    refuse_others({name: _described(layer) for name, layer in layers.items()}, mesh, REMEDY)


def _described(layer: DoraLayer) -> str:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in layer.parameters(recurse=False)})
    return f"{type(layer).__name__}({layer.extra_repr()}, {', '.join(dtypes)})"


def refuse_others(own: Mapping[str, str], mesh: "torch.distributed.DeviceMesh", remedy: str) -> None:
    """Raises a ``ValueError``, the same on every rank of the mesh, if they do not all have the same by each name."""
    digest = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()
    if len({other for _, other in _gathered(digest, mesh)}) == 1:
        return
    (first_rank, first), *others = _gathered(dict(own), mesh)
    for rank, other in others:
        for name in first | other:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"{name or 'the layer'} is not the same on all ranks: {other.get(name, 'missing')} on rank {rank}, "
                    f"{first.get(name, 'missing')} on rank {first_rank}; {remedy}"
                )


def by_first(work: Callable[[], None], mesh: "torch.distributed.DeviceMesh") -> None:
    """Rank 0 does it; every rank of the mesh goes on when it is done, or raises an ``OSError`` with what rank 0 raises.

    Rank 0 itself raises that.
    """
    error = None
    if torch.distributed.get_rank() == 0:
        try:
            work()
        except Exception as raised:
            error = raised
    said = [other for _, other in _gathered(None if error is None else str(error), mesh) if other is not None]
    if error is not None:
        raise error
    if said:
        raise OSError(f"on rank 0: {said[0]}")


def _gathered(own: object, mesh: "torch.distributed.DeviceMesh") -> list[tuple[int, object]]:
    """Every rank's, with the rank, in order. Every rank of the mesh calls this."""
    dist = torch.distributed
    gathered = [(dist.get_rank(), own)]
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        if dist.get_backend(group) == "fake":  # there are no others
            continue
        parts = [None] * group.size()
        dist.all_gather_object(parts, gathered, group=group)
        gathered = [entry for part in parts for entry in part]
    return sorted(gathered, key=lambda entry: entry[0])


def digest(tensors: Mapping[str, Tensor], settings: Mapping[str, str]) -> str:
    """Of names, dtypes, shapes and values, and of what goes with them."""
    seen = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name, tensor in sorted(tensors.items()):
        seen.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        seen.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()[:16]

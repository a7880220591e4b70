"""``mesh``: the collectives of one MLP, counted on meshes of any size, relative to plain LoRA in the same layout."""

import argparse
import contextlib
import functools
import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import dorac
from dorac.bench import options, report
from dorac.cli import BadInput

LAYOUTS = ("fsdp2", "tp", "tp-fsdp2")
VARIANTS = ("lora", "dorac-every", "dorac-cached")
TENSOR_PARALLEL = 8  # ranks of the inner mesh of tp-fsdp2, or all if there are fewer
SCALING = 2.0
DEFAULTS = {
    "cpu": {
        "world": [1, 8, 64, 1024],
        "layouts": list(LAYOUTS),
        "hidden": 4096,
        "intermediate": 16384,  # what 1024 ranks can share
        "rank": 16,
        "tokens": 8,
        "variants": list(VARIANTS),
    }
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", nargs="+", type=options.positive, metavar="N", help="ranks of the mesh")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="tp-fsdp2: tensor parallelism within 8 ranks")
    parser.add_argument("--hidden", type=options.positive, metavar="N", help="in of up, out of down")
    parser.add_argument("--intermediate", type=options.positive, metavar="N", help="out of up, in of down")
    parser.add_argument("--rank", type=options.positive, metavar="R", help="of the adapters")
    parser.add_argument("--tokens", type=options.positive, metavar="T", help="rows of the activation of one rank")
    options.add_variants(parser, VARIANTS)


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be counted."""
    if dist.is_initialized():
        raise BadInput("mesh makes process groups of its own: run it outside torchrun")
    for world, size in itertools.product(args.world, (args.hidden, args.intermediate)):
        if size % world:
            raise BadInput(f"--world {world} must divide --hidden and --intermediate, got {size}")


def run(args: argparse.Namespace) -> Iterator[report.Record]:
    """One record per mesh, layout and variant: what one rank calls in a training step of ``down(gelu(up(x)))``.

    torch's fake process group stands for the other ranks: what is counted is right, what is computed is not. A payload
    is the larger of what a collective takes and gives; ``extra_calls`` and ``extra_bytes`` are those above LoRA's.
    """
    for world in args.world:
        with fake_ranks(world):
            for layout in args.layouts:
                yield from _case(world, layout, args)


@contextlib.contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """This process as the first of ``world`` ranks, whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend, too

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _case(world: int, layout: str, args: argparse.Namespace) -> Iterator[report.Record]:
    counted = {}
    for variant in args.variants:
        if variant == "dorac-cached" and layout != "fsdp2":
            continue  # norms are kept under FSDP2 alone
        torch.manual_seed(args.seed)
        model = shard(Mlp(args, lora=variant == "lora"), layout, world)
        if variant == "dorac-cached":
            dorac.cache_norms(model)
        counted[variant] = forward, backward = step(model, args)
        record = {"case": f"{layout} {world} ranks", "variant": variant, "forward": str(forward)}
        record |= {"backward": str(backward), "bytes_moved": forward.bytes + backward.bytes}
        if "lora" in counted:
            lora = counted["lora"]
            record["extra_calls"] = sum(of.calls for of in counted[variant]) - sum(of.calls for of in lora)
            record["extra_bytes"] = record["bytes_moved"] - sum(of.bytes for of in lora)
        report.progress(record)
        yield record


class Collectives(TorchDispatchMode):
    """Notes, while it is entered, the collectives that this rank calls and their payloads: ``(name, bytes)``."""

    NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional")
    WAITS = ("wait_tensor", "_wrap_tensor_autograd")

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in self.NAMESPACES and name not in self.WAITS:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.noted.append((_NAMES.get(name, name), max((t.nbytes for t in tensors), default=0)))
        return result

    @property
    def calls(self) -> int:
        return len(self.noted)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.noted)

    def __str__(self) -> str:
        totals: dict[str, list[int]] = {}
        for name, size in self.noted:
            totals.setdefault(name, []).append(size)
        return ", ".join(f"{len(sizes)} {name} {sum(sizes)}" for name, sizes in totals.items()) or "-"


_NAMES = {  # c10d's, by the functional collectives'
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
}


class Lora(nn.Module):
    """``x W^T + s (x lora_A^T) lora_B^T``, with the factors beside a plain linear layer."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        out_features, in_features = base.weight.shape
        self.weight = base.weight
        self.lora_A = nn.Parameter(torch.randn(rank, in_features))
        self.lora_B = nn.Parameter(torch.randn(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return F.linear(x, self.weight) + SCALING * F.linear(F.linear(x, a), b)


class Mlp(nn.Module):
    """``down(gelu(up(x)))``: a frozen bfloat16 base, float32 adapters."""

    def __init__(self, args: argparse.Namespace, *, lora: bool) -> None:
        super().__init__()
        make = functools.partial(nn.Linear, bias=False, dtype=torch.bfloat16)
        self.up, self.down = make(args.hidden, args.intermediate), make(args.intermediate, args.hidden)
        self.requires_grad_(False)
        if lora:
            self.up, self.down = Lora(self.up, args.rank), Lora(self.down, args.rank)
        else:
            options = {"lora_alpha": SCALING * args.rank, "init_lora_weights": False}
            dorac.apply_dora(self, "all-linear", r=args.rank, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def shard(model: Mlp, layout: str, world: int) -> nn.Module:
    """The MLP in a layout over all ranks; LoRA is sharded as dorac's factors are."""
    inner = {"fsdp2": 1, "tp": world, "tp-fsdp2": min(world, TENSOR_PARALLEL)}[layout]
    mesh = init_device_mesh("cpu", (world // inner, inner), mesh_dim_names=("dp", "tp"))
    if layout != "fsdp2":
        if isinstance(model.up, Lora):
            _shard_lora(model, mesh["tp"], with_hooks=layout == "tp")
        else:
            from dorac.parallel import ColwiseParallel, RowwiseParallel

            parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model if layout == "tp" else fully_shard(model, mesh=mesh["dp"], reshard_after_forward=True)


def _shard_lora(model: Mlp, mesh: DeviceMesh, *, with_hooks: bool) -> None:
    columns = {"weight": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
    rows = {"weight": Shard(1), "lora_A": Shard(1), "lora_B": Replicate()}
    for layer, placements in ((model.up, columns), (model.down, rows)):
        for name, placement in placements.items():
            p = layer.get_parameter(name)
            shards = nn.Parameter(distribute_tensor(p.detach(), mesh, [placement]), requires_grad=p.requires_grad)
            setattr(layer, name, shards)
            if with_hooks and p.requires_grad and placement == Replicate():  # FSDP2 makes these sums itself
                shards.register_hook(_whole)
    model.register_forward_pre_hook(lambda _, args: DTensor.from_local(*args, mesh, [Replicate()], run_check=False))
    model.register_forward_hook(lambda _, args, y: _whole(y).to_local())


def _whole(tensor: DTensor) -> DTensor:
    return tensor.redistribute(placements=[Replicate()])


def step(model: nn.Module, args: argparse.Namespace) -> tuple[Collectives, Collectives]:
    """What forward and backward call in the second step: the first one prepares FSDP2."""
    x = torch.randn(args.tokens, args.hidden, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with Collectives() as forward:
                y = model(x)
            with Collectives() as backward:
                y.sum().backward()
    return forward, backward

"""What ``scale`` measures: stacks of blocks, spread over the ranks in each layout; LoRA by hand in the same one."""

import argparse
import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import PrepareModuleInput, parallelize_module

import dorac
from dorac import parallel, quantise
from dorac.bench import model, peers
from dorac.ops import collectives

ROWWISE = ("down_proj", "o_proj")  # the others are sharded over their outputs


@dataclasses.dataclass(frozen=True)
class Layout:
    """Over which of the mesh's dimensions a stack is spread."""

    tensor: bool = False  # tensor parallelism
    sequence: bool = False  # and between the layers each rank has some of the tokens
    data: bool = False  # fully_shard, after that
    hybrid: bool = False  # with replicas of the shards

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Of all ranks; pairs of them share a layer, or shards, where the mesh has two dimensions."""
        ranks = dist.get_world_size()
        if not self.hybrid and not (self.tensor and self.data):
            return init_device_mesh(device.type, (ranks,), mesh_dim_names=("tp" if self.tensor else "dp",))
        names = ("replicate", "shard") if self.hybrid else ("dp", "tp")
        return init_device_mesh(device.type, (ranks // 2, 2), mesh_dim_names=names)


LAYOUTS = {
    "tp": Layout(tensor=True),
    "sp": Layout(tensor=True, sequence=True),
    "fsdp2": Layout(data=True),
    "hsdp": Layout(data=True, hybrid=True),
    "tp-fsdp2": Layout(tensor=True, data=True),
}


class Mlp(nn.Module):
    """The MLP of a Llama's block."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        options = {"bias": False, "dtype": args.dtype, "device": args.device}
        self.gate_proj = nn.Linear(args.hidden, args.intermediate, **options)
        self.up_proj = nn.Linear(args.hidden, args.intermediate, **options)
        self.down_proj = nn.Linear(args.intermediate, args.hidden, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """An MLP with its residual, after a norm without a weight."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.mlp = Mlp(args)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class Mlps(nn.Module):
    """Blocks of MLPs one after the other."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(args) for _ in range(args.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


STACKS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {"mlp": Mlps, "llama": model.build_stack}


def blocks(stack: nn.Module) -> nn.ModuleList:
    """What is compiled, and sharded, one by one."""
    return stack.layers if isinstance(stack, Mlps) else stack.llama.layers


class LoraShard(nn.Module):
    """Plain LoRA on this rank's part of a layer, ``addmm(x W^T, s * x lora_A^T, lora_B^T)``.

    Factors of another dtype are cast to the activation's. The gradient of the factor that every rank holds is summed
    over the ranks. The input of the layers that share one
    comes moved, see :func:`_moves_input`.
    """

    def __init__(self, layer: peers.Layer, mesh: DeviceMesh, rowwise: bool, sequence: bool) -> None:
        super().__init__()
        self.rowwise, self.sequence, self.mesh = rowwise, sequence, mesh
        rank, ranks = mesh.get_local_rank(), mesh.size()

        def part(tensor: Tensor, dim: int) -> Tensor:
            return tensor.tensor_split(ranks, dim)[rank].contiguous()

        self.weight = nn.Parameter(part(layer.weight, int(rowwise)), requires_grad=False)
        self.lora_A = nn.Parameter(part(layer.lora_A, 1) if rowwise else layer.lora_A.clone())
        self.lora_B = nn.Parameter(layer.lora_B.clone() if rowwise else part(layer.lora_B, 0))
        self.dropout = nn.Dropout(layer.dropout) if layer.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        group, lora_A, lora_B = self.mesh.get_group(), self.lora_A, self.lora_B
        if self.rowwise:
            lora_B = collectives.move(lora_B, "share", 0, group)
        else:
            lora_A = collectives.move(lora_A, "share", 0, group)
        rows = x.flatten(0, -2)
        down = peers.SCALING * F.linear(self.dropout(rows), lora_A.to(x.dtype))
        y = torch.addmm(F.linear(rows, self.weight), down, lora_B.T.to(x.dtype)).view(*x.shape[:-1], -1)
        if not self.rowwise:
            return y
        return collectives.move(y, "scatter", 1, group) if self.sequence else collectives.sum_in_place(y, group)


class LoraOver(nn.Module):
    """Plain LoRA over a frozen layer, dense or quantised, whole."""

    def __init__(self, layer: peers.Layer, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Parameter(layer.lora_A.clone()), nn.Parameter(layer.lora_B.clone())
        self.dropout = nn.Dropout(layer.dropout) if layer.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        down = peers.SCALING * F.linear(self.dropout(rows), self.lora_A.to(x.dtype))
        y = torch.addmm(self.base_layer(rows), down, self.lora_B.T.to(x.dtype))
        return y.view(*x.shape[:-1], -1)


def build(args: argparse.Namespace, layout: Layout, mesh: DeviceMesh, rank: int, variant: str) -> nn.Module:
    """The stack of this seed, adapted and spread; the same values for every variant.

    ``variant``: "lora", "dorac-every", "dorac-cached" or "dorac-peft", and the mode; "-fused" may follow "dorac".
    """
    is_fused, (kind, _, mode) = "-fused" in variant, variant.replace("-fused", "").rpartition("-")
    torch.manual_seed(args.seed)
    stack = STACKS[args.stack](args).requires_grad_(False)
    linears = {name: m for name, m in stack.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        layer = peers.draw_layer(linear.weight.detach(), rank, args)
        stack.set_submodule(name, _adapted(args, layout, mesh, kind, name, layer))
    parents = dict.fromkeys(name.rpartition(".")[0] for name in linears)
    if layout.tensor and kind == "lora":
        for parent in parents:
            _moves_input(stack.get_submodule(parent), mesh["tp"].get_group(), layout.sequence)
    elif layout.tensor:
        styles = {name: _style(name, layout) for name in linears}
        if mode == "compiled":  # for eager code the layers see to it
            styles |= {parent: _input_style(parent, layout) for parent in parents}
        parallelize_module(stack, mesh["tp"], styles)
    stack.train()
    if args.save_outputs and kind != "lora":
        dorac.save_outputs(stack)
    if is_fused:
        dorac.fuse(stack)
    if mode == "compiled":
        for block in blocks(stack):
            block.compile(**model.COMPILE)
    if layout.data:
        for module in (*blocks(stack), stack):
            fully_shard(module, mesh=mesh["dp"] if layout.tensor else mesh)
    if kind == "dorac-cached":  # fully_shard replaces the parameters that a norm is kept for
        dorac.cache_norms(stack)
    return stack


def _adapted(
    args: argparse.Namespace, layout: Layout, mesh: DeviceMesh, kind: str, name: str, layer: peers.Layer
) -> nn.Module:
    if kind == "lora" and layout.tensor:
        return LoraShard(layer, mesh["tp"], name.endswith(ROWWISE), layout.sequence)
    if args.base != "bf16":
        linear = nn.Linear(*reversed(layer.weight.shape), bias=False, device="meta")
        linear.weight = nn.Parameter(layer.weight, requires_grad=False)
        layer = dataclasses.replace(layer, base=quantise.quantise(linear, args.base, storage=layer.weight.dtype))
    if kind == "lora":
        return LoraOver(layer, peers._base_linear(layer))
    return peers.dorac_peft(layer) if kind == "dorac-peft" else peers.dorac_every(layer)


def _moves_input(module: nn.Module, group: collectives.Group, sequence: bool) -> None:
    """The input of the module, which its layers share, moves once in either direction."""
    way = ("spread", 1) if sequence else ("share", 0)

    def move(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (collectives.move(args[0], *way, group), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": collectives.move(kwargs["hidden_states"], *way, group)}

    module.register_forward_pre_hook(move, with_kwargs=True)


def _input_style(name: str, layout: Layout) -> PrepareModuleInput:
    """That of a module whose layers share its input."""
    given, wanted = Shard(1) if layout.sequence else Replicate(), Replicate()
    if not name.endswith("self_attn"):
        return PrepareModuleInput(input_layouts=given, desired_input_layouts=wanted)
    return PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": given}, desired_input_kwarg_layouts={"hidden_states": wanted}
    )


def _style(name: str, layout: Layout) -> parallel.ColwiseParallel | parallel.RowwiseParallel:
    between = {"input_layouts": Shard(1)} if layout.sequence else {}
    if not name.endswith(ROWWISE):
        return parallel.ColwiseParallel(**between)
    return parallel.RowwiseParallel(**({"output_layouts": Shard(1)} if layout.sequence else {}))

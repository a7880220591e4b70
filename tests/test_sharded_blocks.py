"""Fused blocks of layers that ``dorac.parallel`` has spread: one process's numbers, one sum of their gradients."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import WORLD, run
from test_fuse import HIDDEN, GatedMLP, OfFunctions, off_init
from test_tensor_parallel import near, part, same, whole
from torch import nn
from torch.utils.checkpoint import checkpoint

import dorac
from dorac import functional
from dorac.bench.scale import Collectives
from dorac.ops import eager_linears, eager_mlp, eager_parts, front

ROWWISE = ("down_proj", "w2", "wo", "o_proj")


class Ungated(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)

    def forward(self, x):
        return self.wo(nn.functional.gelu(self.wi(x)))


class Heads(nn.Module):
    """Attention, of any number of heads of four features."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.v_proj, self.o_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden_states):
        q, k, v = (
            p(hidden_states).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def adapted(kind=GatedMLP, **options):
    model = kind().requires_grad_(False)
    dorac.apply_dora(model, "all-linear", 4, 8, init_lora_weights=False, **options)
    off_init(model)
    return model


def spread(model, mesh, sequence=False):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    first, last = ({"input_layouts": Shard(1)}, {"output_layouts": Shard(1)}) if sequence else ({}, {})
    names = [name for name, m in model.named_children() if isinstance(m, dorac.nn.DoraLinear)]
    styles = {name: RowwiseParallel(**last) if name in ROWWISE else ColwiseParallel(**first) for name in names}
    model = parallelize_module(copy.deepcopy(model), mesh, styles)
    assert not dorac.fuse(model).left
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@contextlib.contextmanager
def fused():
    """Counts the blocks that are computed as one."""
    called = mock.Mock()

    def note(function):
        def noting(*args, **options):
            called()
            return function(*args, **options)

        return noting

    with (
        mock.patch.object(functional, "dora_mlp", note(functional.dora_mlp)),
        mock.patch.object(functional, "dora_linears", note(functional.dora_linears)),
    ):
        yield called


def steps(reference, model, x, mesh, sequence, is_fused=True):
    from torch.distributed.tensor import Replicate, Shard

    placement = Shard(1) if sequence else Replicate()
    optimizers = [torch.optim.SGD(trained(m), 0.1) for m in (reference, model)]
    for _ in range(2):
        inputs = [x.clone().requires_grad_(), part(x, placement, mesh).requires_grad_()]
        y = reference(inputs[0])
        with fused() as called:
            actual = model(inputs[1])
        assert called.call_count == is_fused
        dy = torch.randn_like(y)
        y.backward(dy)
        actual.backward(part(dy, placement, mesh))
        same(whole(actual.detach(), placement, mesh), y)
        same(whole(inputs[1].grad, placement, mesh), inputs[0].grad)
        for p, own in zip(reference.parameters(), model.parameters(), strict=True):
            assert (p.grad is None) == (own.grad is None)
            if p.grad is not None:
                assert own.grad.placements == own.placements
                same(own.grad, p.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def numbers(mesh):
    torch.set_default_dtype(torch.float64)
    x = torch.randn(2, 2 * WORLD, HIDDEN)
    for kind, sequence, cached in (
        (GatedMLP, False, True),
        (GatedMLP, True, False),
        (OfFunctions, False, False),
        (Ungated, True, True),
        (Heads, False, True),
        (Heads, True, False),
    ):
        reference = adapted(kind)
        model = spread(reference, mesh, sequence)
        if cached:
            dorac.cache_norms(model)
        steps(reference, model, x, mesh, sequence)
        with torch.no_grad(), fused() as called:
            placement = model.get_submodule(next(n for n in ROWWISE if hasattr(model, n))).shards.wanted
            same(whole(model(part(x, placement, mesh)), placement, mesh), reference(x))
        assert called.called
        double_backward(model, part(x, placement, mesh))


def double_backward(model, x, alike=same):
    """As the layers have it one by one."""
    values = []
    for fuse in (dorac.fuse, dorac.unfuse):
        fuse(model)
        y = model(x.clone().requires_grad_())
        firsts = torch.autograd.grad(y.sin().sum(), trained(model), create_graph=True)
        values.append(torch.autograd.grad(sum(d.square().sum() for d in firsts), trained(model)))
    for own, layers in zip(*values, strict=True):
        alike(own, layers.full_tensor())


def roughly(actual, expected):
    """Up to roundings of bfloat16 in another order, of which second derivatives take many."""
    from torch.distributed.tensor import DTensor

    actual = actual.full_tensor() if isinstance(actual, DTensor) else actual
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.15 * expected.abs().max().item())


def alone(mesh):
    """What is called layer by layer, and what is not, though not all of it is trained."""
    torch.set_default_dtype(torch.float64)
    x = torch.randn(2, 2, HIDDEN)
    for change, is_fused in (
        (lambda m: m.up_proj.lora_B.requires_grad_(False), True),
        (lambda m: m.down_proj.base_layer.bias.requires_grad_(), False),
        (lambda m: dorac.set_strength(m, 0.5), False),
        (lambda m: dorac.merge(m), False),
    ):
        reference = adapted()
        model = spread(reference, mesh)
        change(reference)
        change(model)
        if trained(reference) and not reference.up_proj.merged:
            steps(reference, model, x, mesh, False, is_fused)
        else:
            with fused() as called, torch.no_grad():
                same(model(x), reference(x))
            assert not called.called
    model = spread(adapted(lora_dropout=0.5), mesh)
    with fused() as called:
        model(x)
        assert not called.called
        model.eval()(x)
        assert called.called


def sums(mesh):
    """In backward those of dx and of all that is due in a block; of layers one by one as many as they are, and of dx.

    Attention has its last layer's, too.
    """
    torch.set_default_dtype(torch.float64)
    x = torch.randn(2, 2, HIDDEN).requires_grad_()
    for kind, as_one, by_layers in ((GatedMLP, 2, 4), (Heads, 3, 5)):
        model = spread(adapted(kind), mesh)
        dorac.cache_norms(model)
        for backwards in (as_one, by_layers):
            with Collectives() as counted:
                y = model(x)
            assert counted.counts == {"all_reduce": 1}
            with Collectives() as counted:
                y.sum().backward()
            assert counted.counts == {"all_reduce": backwards}
            dorac.unfuse(model)


def half(mesh):
    """By the kernels, in the interpreter where there is no GPU; on one rank not, and nobody waits for it in vain."""
    torch.set_default_dtype(torch.float32)
    x = torch.randn(2, 3, HIDDEN).bfloat16()
    for kind, narrow, on_all in (
        (GatedMLP, True, True),
        (GatedMLP, False, True),
        (Ungated, True, True),
        (GatedMLP, True, False),
        (Heads, True, True),
        (Heads, False, False),
    ):
        model = kind().bfloat16().requires_grad_(False)
        options = {"adapter_dtype": torch.bfloat16} if narrow else {}
        dorac.apply_dora(model, "all-linear", 4, 8, init_lora_weights=False, **options)
        off_init(model)
        reference, given = copy.deepcopy(model), x.clone().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=not narrow):
            y = reference(given)
            dy = torch.randn_like(y)
            y.backward(dy)
            model, own = spread(model, mesh), x.clone().requires_grad_()
            here = on_all or dist.get_rank() == 0
            with kernels(here, kind is Heads) as applied:
                actual = model(own)
                assert applied.called == here
                actual.backward(dy)
            near(actual, y)
            near(own.grad, given.grad)
            for p, of_parts in zip(trained(reference), trained(model), strict=True):
                assert of_parts.grad.placements == of_parts.placements
                near(of_parts.grad, p.grad)
            for parameter in (trained(model)[0], trained(model)[4]):
                with kernels(True, kind is Heads):
                    y = model(own)
                    with torch.no_grad():
                        parameter.mul_(1)
                    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                        y.sum().backward()
            with kernels(True, kind is Heads):
                double_backward(model, x, roughly)


@contextlib.contextmanager
def kernels(here, of_linears):
    """The forms with kernels, on this rank or not; what crosses to the DTensors."""
    name, module = ("linears", eager_linears) if of_linears else ("mlp", eager_mlp)
    crossing = getattr(eager_parts, f"_apply_{name}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(front, "has_kernels", return_value=True))
        if not here:
            stack.enter_context(mock.patch.object(module, f"dora_{name}", return_value=None))
        yield stack.enter_context(mock.patch.object(eager_parts, f"_apply_{name}", wraps=crossing))


def over_shards():
    """On a mesh of two dimensions, of which FSDP2 has the other one; in training that is computed again, too."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    grid = init_device_mesh(torch.get_default_device().type, (2, WORLD), mesh_dim_names=("dp", "tp"))
    torch.set_default_dtype(torch.float64)
    for again in (False, True):
        torch.manual_seed(0)
        reference = nn.Sequential(adapted(), adapted())
        model = nn.Sequential(*(spread(block, grid["tp"]) for block in reference))
        for block in (*model, model):
            fully_shard(block, mesh=grid["dp"])
        x = torch.randn(2, 3, HIDDEN)
        optimizers = [torch.optim.SGD(trained(m), 0.1) for m in (reference, model)]
        for _ in range(2):
            own = x.chunk(2)[grid["dp"].get_local_rank()].clone().requires_grad_()
            with fused() as called:
                if again:
                    y = own
                    for block in model:
                        y = checkpoint(block, y, use_reentrant=False)
                else:
                    y = model(own)
                y.square().mean().backward()
            assert called.call_count == 2 * (1 + again)
            reference(x).square().mean().backward()
            for p, q in zip(reference.parameters(), model.parameters(), strict=True):
                if p.grad is not None:
                    same(q.grad, p.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def all_of_it():
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(torch.get_default_device().type, (WORLD,))
    for worker in (numbers, alone, sums, half):
        torch.manual_seed(0)
        worker(mesh)


def test_two_processes_give_the_numbers_of_one(device, tmp_path):
    run(all_of_it, tmp_path, device)


@pytest.mark.full
def test_four_processes_with_fsdp2(device, tmp_path):
    run(over_shards, tmp_path, device, world=4)

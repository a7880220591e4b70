"""FSDP2 (``fully_shard``) on two processes: kept norms, policies, accumulation and compiled blocks, as on one process.

What every sharded layer has is in test_sharded.py. Each test starts two processes, which run functions of this file.
"""

import contextlib
import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import WORLD, run
from test_sharded import Mlp, assert_same, in_turn, other_kinds
from torch import nn

import dorac
from dorac import functional
from dorac.bench.mesh import Collectives
from dorac.nn import present_norms


@contextlib.contextmanager
def norms_taken():
    """A list of how many norms each call takes: of kept ones, and of layers that take their own (each 1)."""
    counts, kept, own = [], present_norms.row_norms, functional.linear.norm_of_checked

    def counted(operands, *args):
        counts.append(len(operands))
        return kept(operands, *args)

    def alone(*args):
        counts.append(1)
        return own(*args)

    with (
        mock.patch.object(present_norms, "row_norms", counted),
        mock.patch.object(functional.linear, "norm_of_checked", alone),
    ):
        yield counts


def sharded(model, mesh, units="layers", **options):
    """``fully_shard`` of the layers and the rest, or of the whole."""
    from torch.distributed.fsdp import fully_shard

    for layer in (model.up, model.down) if units == "layers" else ():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)


def batches(mine, steps=3, micro=2):
    """``x, y`` of each micro-batch of each step: the whole batch, or this rank's half."""
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2) if mine else slice(None)
    drawn = torch.randn(steps, micro, 2, 4, 24, generator=torch.Generator().manual_seed(5))
    return [[(x[rows], y[rows]) for x, y in step] for step in drawn]


def train(model, steps, sync=None):
    """The losses of steps of AdamW with accumulated gradients, and the last gradients."""
    stepper, losses = optimizer(model), []
    for step in steps:
        stepper.zero_grad()
        for i, (x, y) in enumerate(step):
            if sync is not None:
                model.set_requires_gradient_sync(i == len(step) - 1)
            loss = (model(x) - y).square().mean()
            loss.backward()
            losses.append(loss.detach())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        stepper.step()
    losses = torch.stack(losses)
    if sync is not None:
        dist.all_reduce(losses, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        losses = losses if dist.get_backend() == "nccl" else losses / WORLD
    return losses, gradients


def assert_same_training(model, result, reference, expected):
    assert_same(result[0], expected[0])
    assert result[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_same(result[1][name], gradient)
    for name, p in reference.named_parameters():
        assert_same(model.get_parameter(name), p)


def kept_norms(mesh, _folder):
    """Taken once a step, in each unit's first forward, without a collective; every layout of the parameters."""
    start = Mlp()
    reference = copy.deepcopy(start)
    expected = train(reference, batches(mine=False))
    for units, options in (
        ("layers", {}),
        ("layers", {"reshard_after_forward": False}),
        ("whole", {}),
        ("whole", {"reshard_after_forward": True}),
    ):
        twin, model = (sharded(copy.deepcopy(start), mesh, units, **options) for _ in range(2))
        with Collectives() as own:
            train(twin, batches(mine=True), sync=True)
        cache = dorac.cache_norms(model)
        with norms_taken() as counts, Collectives() as kept:
            result = train(model, batches(mine=True), sync=True)
        assert counts == ([1, 1] if units == "layers" else [2]) * 3, counts
        assert kept.noted == own.noted
        assert_same_training(model, result, reference, expected)

        x = batches(mine=False)[0][0][0]
        with norms_taken() as counts, torch.no_grad():
            y = model(x)
            assert torch.equal(model(x), y)
        assert sum(counts) == 2, counts  # after the step
        for name, write in (
            ("loading", lambda m: m.load_state_dict(m.state_dict())),
            ("in place", lambda m: [layer.lora_B.mul_(1.5) for layer in (m.up, m.down)]),
            ("mode", lambda m: m.eval()),
            ("reset", lambda m: m.up.reset_parameters()),
            ("scaling", lambda m: setattr(m.down, "scaling", 2.0)),
        ):
            with torch.no_grad():
                model.reshard()
                torch.manual_seed(3)
                write(model)
                with norms_taken() as counts:
                    y = model(x)
                assert sum(counts) == (1 if name in ("reset", "scaling") else 2), (name, counts)
                cache.remove()
                assert torch.equal(model(x), y), name
                cache = dorac.cache_norms(model)
                model(x)


def stale_norms(mesh, _folder):
    """Writes to the parts that leave no trace are found by ``check`` and by ``debug=True``."""
    for units in ("layers", "whole"):
        model, x = sharded(Mlp(), mesh, units), torch.randn(2, 24)
        cache = dorac.cache_norms(model)
        cache.check()
        model(x).sum().backward()
        cache.check()
        model.down.lora_B.to_local().data.mul_(2)
        with pytest.raises(RuntimeError, match="the cached norm of down is stale"):
            cache.check()
        cache.refresh()
        model(x).sum().backward()
        cache.check()
        cache.remove()
        dorac.cache_norms(model, debug=True)
        model(x).sum().backward()
        model.down.lora_B.to_local().data.mul_(2)
        with pytest.raises(RuntimeError, match=r"the cached norm of .*DoraLinear is stale"):
            model(x)


def graphs_held(mesh, _folder):
    """Backward has the norm of its own forward, whatever ran in between; a changed one is refused."""
    model = sharded(Mlp(), mesh)
    dorac.cache_norms(model)
    x = torch.randn(2, 24)
    model(x).sum().backward()
    loss = model(x).square().sum()
    with torch.no_grad():
        model(x)
    loss.backward()
    loss = model(x).square().sum()
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.lora_B.mul_(1.5)
            layer.reshard()
        model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def other_layers(mesh, _folder):
    """Embeddings, convolutions, layers that FSDP2 leaves out, and r = 1, of which a rank has no row."""
    from torch.distributed.fsdp import fully_shard

    layers = other_kinds()
    thin = dorac.nn.DoraLinear(nn.Linear(7, 5), r=1, init_lora_weights=False)
    for reference in (*layers, thin):
        if hasattr(reference, "padding_idx"):
            x = torch.tensor([[1, 2, 9], [0, 5, 1]])
        else:
            x = torch.randn(3, 7) if reference is thin else torch.randn(2, 4, 5, 5)
        layer = fully_shard(copy.deepcopy(reference), mesh=mesh)
        dorac.cache_norms(layer)
        for _ in range(2):
            for net in (layer, reference):
                net.zero_grad()
                net(x).square().mean().backward()
                torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
        assert_same(layer(x), reference(x))
        assert layer.kept.of is not None

    model = Mlp()
    reference = copy.deepcopy(model)
    left_out = set(model.up.parameters())
    fully_shard(model, mesh=mesh, ignored_params=left_out)
    dorac.cache_norms(model)
    x = torch.randn(2, 24)
    for _ in range(2):
        for net in (model, reference):
            net.zero_grad()
            net(x).square().mean().backward()
            optimizer(net).step()
    assert_same(model(x), reference(x))
    assert isinstance(model.up.lora_A, nn.Parameter)
    assert all(layer.kept.of is not None for layer in (model.up, model.down))


def mixed_precision(mesh, _folder):
    """The norm is that of the parameters as the forward has them, bit for bit; gradients come in the shards' dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    start, runs = Mlp(), []
    for keeps in (False, True):
        model = sharded(copy.deepcopy(start), mesh, mp_policy=policy)
        if keeps:
            dorac.cache_norms(model)
        with norms_taken() as counts:
            runs.append((train(model, batches(mine=True), sync=True), model))
        assert sum(counts) == (6 if keeps else 12)
    (own, twin), (kept, model) = runs
    assert torch.equal(own[0], kept[0])
    for name, p in model.named_parameters():
        assert p.dtype is torch.float32
        assert torch.equal(p.to_local(), twin.get_parameter(name).to_local()), name
    reference = copy.deepcopy(start)
    expected = train(reference, batches(mine=False))
    torch.testing.assert_close(kept[0], expected[0], rtol=3e-2, atol=0)


def compiled_blocks(mesh, _folder, units="layers"):
    """Per-block ``torch.compile``: the norm is taken before the graph, which has none and is not traced again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    start = Mlp()
    reference = copy.deepcopy(start)
    expected = train(reference, batches(mine=False))
    model = sharded(copy.deepcopy(start), mesh, units)
    dorac.cache_norms(model)
    backend = CompileCounterWithBackend("aot_eager")
    blocks = (model.up, model.down) if units == "layers" else (model,)
    for block in blocks:
        block.compile(fullgraph=True, backend=backend)
    with norms_taken() as counts:
        result = train(model, batches(mine=True), sync=True)
    assert sum(counts) == 6, counts
    assert backend.frame_count == len(blocks)
    assert not [n for g in backend.graphs for n in g.graph.nodes if "norm_factored" in str(n.target)]
    assert_same_training(model, result, reference, expected)


def compiled_whole(mesh, folder):
    compiled_blocks(mesh, folder, "whole")


def refused(mesh, _folder):
    """Parameters that no unit makes whole: another part of the model, shards of somebody else's beneath FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    message = r"up: its parameters are sharded \(DTensor\) otherwise than by dorac.parallel alone, and no unit"
    model = fully_shard(nn.Sequential(Mlp()), mesh=mesh)
    with pytest.raises(ValueError, match=message):
        dorac.cache_norms(model[0])
    grid = init_device_mesh(mesh.device_type, (1, WORLD), mesh_dim_names=("dp", "tp"))
    model = Mlp()
    for module in (model.up, model.up.base_layer):
        for name, p in [*module.named_parameters(recurse=False)]:
            parts = distribute_tensor(p.detach(), grid["tp"], [Shard(0)])
            module.register_parameter(name, nn.Parameter(parts, requires_grad=p.requires_grad))
    fully_shard(model, mesh=grid["dp"])
    with pytest.raises(ValueError, match=message):
        dorac.cache_norms(model)


def kept_norms_of_parallel_layers(mesh, _folder):
    """FSDP2 over tensor parallelism: taken once a step in the unit's first forward, and summed where columns are."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    world, steps = dist.get_world_size(), 3
    start, x, target = Mlp(), torch.randn(steps, 4, 24), torch.randn(steps, 4, 24)
    for shape in ((1, 2), (2, 1)) if world == 2 else ((2, 2), (1, 4), (4, 1)):
        grid = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("dp", "tp"))
        mine = slice(grid["dp"].get_local_rank(), None, shape[0])
        noted = []
        for keeps in (False, True):
            reference, model = copy.deepcopy(start), copy.deepcopy(start)
            parallelize_module(model, grid["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(model, mesh=grid["dp"])
            cache = dorac.cache_norms(model) if keeps else None
            steppers = [
                torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (reference, model)
            ]
            with norms_taken() as counts, Collectives() as seen:
                for i in range(steps):
                    for _ in range(2):  # accumulates
                        (model(x[i, mine]) - target[i, mine]).square().mean().backward()
                    steppers[1].step()
                    steppers[1].zero_grad()
            for i in range(steps):
                (2 * (reference(x[i]) - target[i]).square().mean()).backward()
                steppers[0].step()
                steppers[0].zero_grad()
            for name, p in reference.named_parameters():
                assert_same(model.get_parameter(name), p)
            noted.append(seen.calls)
            if keeps:
                assert counts == [2] * steps, counts
                cache.check()
                with torch.no_grad():
                    assert_same(model(x[0]), reference(x[0]))
                    model.reshard()
                    model.down.lora_B.mul_(2)
                    reference.down.lora_B.mul_(2)
                    assert_same(model(x[0]), reference(x[0]))
                cache.remove()
        tensor_parallel = shape[1] > 1
        assert noted[0] - noted[1] == steps * tensor_parallel, (shape, noted)  # the second forward's sum of squares


@pytest.mark.parametrize(
    "workers",
    [
        (
            kept_norms_of_parallel_layers,
            stale_norms,
            graphs_held,
            other_layers,
            mixed_precision,
            refused,
            compiled_blocks,
        ),
        pytest.param((compiled_whole,), marks=pytest.mark.full),
    ],
    ids=["units", "compiled whole"],
)
def test_two_processes(workers, device, tmp_path):
    run(in_turn, tmp_path, device, workers, tmp_path)


@pytest.mark.full
def test_four_processes(device, tmp_path):
    run(in_turn, tmp_path, device, (kept_norms_of_parallel_layers,), tmp_path, world=4)


def test_an_output_is_no_view():
    """FSDP2 hooks a unit's output; where that is a view, ``y += x`` of a consumer loses the hook."""
    linear = dorac.nn.DoraLinear(nn.Linear(8, 6), r=2, init_lora_weights=False, lora_dropout=0.5)
    for layer in (linear, *other_kinds()):
        if layer is linear:
            x = torch.randn(3, 2, 8)
        else:
            x = torch.tensor([[1, 2, 9]]) if hasattr(layer, "padding_idx") else torch.randn(2, 4, 5, 5)
        for mode in (True, False):
            y = layer.train(mode)(x)
            assert y._base is None
            y += 1
            y.sum().backward()

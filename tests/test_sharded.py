"""Sharded weights on two processes: tensor parallelism and FSDP2 give one process's numbers, and what they send.

Each test starts two processes, which run functions of this file.
"""

import collections
import contextlib
import copy
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import WORLD, run
from test_readme import recipe
from torch import nn

import dorac
from dorac import functional
from dorac.ops import front, linear
from dorac.testing import linear_inputs

RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-12}
FIELDS = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")


def in_turn(workers, folder):
    """Runs ``worker(mesh, folder)`` one after another."""
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(torch.get_default_device().type, (WORLD,))
    for worker in workers:
        torch.manual_seed(0)
        worker(mesh, folder)


def assert_same(actual, expected, dtype=torch.float32):
    """Equal to 1e-6 of the largest element (1e-12 in float64), gathered if it is sharded."""
    from torch.distributed.tensor import DTensor

    actual = actual.detach()
    actual = actual.full_tensor() if isinstance(actual, DTensor) else actual
    torch.testing.assert_close(
        actual, expected.detach(), rtol=0, atol=RELATIVE[dtype] * expected.abs().max().clamp_min(1e-30).item()
    )


@contextlib.contextmanager
def collectives():
    """A dictionary that is filled, at the end, with this rank's collectives: name to count."""
    from torch.distributed.tensor.debug import CommDebugMode

    counts = {}
    with CommDebugMode() as mode:
        yield counts
    counts |= {str(op).partition(".")[2].strip("'>)_"): n for op, n in mode.get_comm_counts().items()}


def on_shards():
    """Inside, layers may not be left to aten on DTensors."""
    return mock.patch.object(linear, "linear_aten", side_effect=AssertionError)


def placements(layout):
    """The layouts of ``FIELDS``."""
    from torch.distributed.tensor import Replicate, Shard

    if layout == "columns":
        return (Replicate(), Shard(0), Replicate(), Shard(0), Shard(0), Shard(0))
    return (Shard(-1), Shard(1), Shard(1), Replicate(), Replicate(), Replicate())


def distributed(inputs, mesh, layout):
    from torch.distributed.tensor import distribute_tensor

    tensors = [
        distribute_tensor(t.detach(), mesh, [p]) for t, p in zip(inputs.tensors(), placements(layout), strict=True)
    ]
    return [t.requires_grad_(name != "weight") for name, t in zip(FIELDS, tensors, strict=True)]


def assert_gradients(tensors, reference):
    for name, t, r in zip(FIELDS, tensors, reference, strict=True):
        if name != "weight":
            assert_same(t.grad, r.grad, r.dtype)


def functions(mesh, _folder):
    """``dorac.functional`` on DTensors: numbers, and collectives beside those of plain LoRA in the same layout."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def lora(x, weight, lora_A, lora_B, magnitude, bias):
        base = nn.functional.linear(x, weight, bias)
        return base + 0.7 * nn.functional.linear(nn.functional.linear(x, lora_A), lora_B)

    for layout, norm_counts in (("columns", {}), ("rows", {"all_reduce": 1})):
        for dtype, transposed, shape in (
            (torch.float32, False, (6, 32, 24, 4)),
            (torch.float64, True, (5, 33, 7, 3)),  # neither side divides by two; one rank has a row less
        ):
            inputs = linear_inputs(shape, dtype=dtype, transposed=transposed, device=mesh.device_type)
            tensors = distributed(inputs, mesh, layout)
            weight, lora_A, lora_B, magnitude = tensors[1:5]
            reference = inputs.leaves()
            expected_norm = functional.norm_factored(*reference.tensors()[1:4], 0.7)
            out = Shard(-1) if layout == "columns" else Replicate()

            for budget in (2**28, 1):  # one byte: one column at a time, and still nothing is gathered
                with collectives() as counts:
                    norm = functional.norm_factored(weight, lora_A, lora_B, 0.7, budget=budget)
                assert counts == norm_counts, counts
                assert_same(norm, expected_norm, dtype)
            assert norm.placements == magnitude.placements

            dy = torch.randn((shape[0], shape[1]), dtype=dtype)
            dy_sharded = distribute_tensor(dy, mesh, [out])
            expected = functional.dora_linear(*reference.tensors(), scaling=0.7)
            expected.backward(dy)

            def both_ways(function, *args, out=out, dy=dy_sharded, tensors=tensors, **options):
                for t in tensors:
                    t.grad = None
                with collectives() as forward:
                    y = function(*tensors, *args, **options).redistribute(placements=[out])
                with collectives() as backward:
                    y.backward(dy)
                return y, forward, backward

            _, *plain = both_ways(lora)
            _, *given = both_ways(functional.dora_linear, scaling=0.7, weight_norm=norm)
            y, *every = both_ways(functional.dora_linear, scaling=0.7)
            assert given[0] == plain[0] == ({} if layout == "columns" else {"all_reduce": 1}), (given, plain)
            assert collections.Counter(every[0]) == collections.Counter(plain[0]) + collections.Counter(norm_counts)
            assert every[1] == given[1] == plain[1], (every, given, plain)
            assert_same(y, expected, dtype)
            assert_gradients(tensors, reference.tensors())

            y, forward, _ = both_ways(functional.dora_linear, scaling=0.7, norm_grad=True)
            assert "all_gather_into_tensor" not in forward, forward
            reference = inputs.leaves()
            functional.dora_linear(*reference.tensors(), scaling=0.7, norm_grad=True).backward(dy)
            assert_gradients(tensors, reference.tensors())


def dropped(mesh, _folder):
    """Dropout in both meanings, of one mask: what the layer computes on shards."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    inputs = linear_inputs((5, 33, 7, 3), device=mesh.device_type)
    mask = (torch.arange(35).view(5, 7) % 3 > 0).double() / 0.6
    dy = torch.randn(5, 33, dtype=torch.float64)
    for layout in ("columns", "rows"):
        out = Shard(-1) if layout == "columns" else Replicate()
        for meaning in ("adapter", "low_rank"):
            reference, tensors = inputs.leaves(), distributed(inputs, mesh, layout)
            options = {"scaling": 0.7, "dropout_p": 0.4, "dropout_on": meaning}
            with mock.patch.object(nn.functional, "dropout", lambda x, p: x * mask):
                expected = functional.dora_linear(*reference.tensors(), **options)
            expected.backward(dy)
            of_x = distribute_tensor(mask, mesh, tensors[0].placements)
            with mock.patch.object(nn.functional, "dropout", lambda x, p, of_x=of_x: x * of_x), on_shards():
                y = functional.dora_linear(*tensors, **options).redistribute(placements=[out])
            y.backward(distribute_tensor(dy, mesh, [out]))
            assert_same(y, expected, torch.float64)
            assert_gradients(tensors, reference.tensors())


def layouts(mesh, _folder):
    """What the layer computes on shards beyond those two layouts, and where it leaves them to aten on DTensors."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    whole, rows, columns = Replicate(), Shard(0), Shard(1)
    inputs = linear_inputs((5, 13, 9, 3), device=mesh.device_type)  # one rank has a line, row or column less
    grid = init_device_mesh(mesh.device_type, (WORLD, 1))
    dy = torch.randn(5, 13, dtype=torch.float64)
    reference = inputs.leaves()
    functional.dora_linear(*reference.tensors(), scaling=0.7).backward(dy)

    def tensors_in(mesh, of_x, of_weight, of_lora_A, of_rows):
        layout = (of_x, of_weight, of_lora_A, *(of_rows,) * 3)
        tensors = [
            distribute_tensor(t.detach(), mesh, p) for t, p in zip(inputs.leaves().tensors(), layout, strict=True)
        ]
        return [t.requires_grad_() for t in tensors]

    def check(tensors, of_y, scaling=0.7):
        norm = functional.norm_factored(*tensors[1:4], 0.7)
        with collectives() as counts, on_shards():
            y = functional.dora_linear(*tensors, scaling=scaling, weight_norm=norm)
        assert (y.placements, counts) == (of_y, {})
        whole_y = [whole] * len(of_y)
        y.redistribute(placements=whole_y).backward(distribute_tensor(dy, y.device_mesh, whole_y))
        assert_gradients(tensors, reference.tensors())
        assert_same(tensors[1].grad, reference.weight.grad, torch.float64)

    check(tensors_in(mesh, [whole], [whole], [whole], [whole]), (whole,))
    scaling = torch.tensor(0.7, dtype=torch.float64)
    check(tensors_in(mesh, [rows], [whole], [whole], [whole]), (rows,), scaling)  # parallel in the data
    # In the data and in the output features; in the data and in the input features.
    check(tensors_in(grid, [rows, whole], [whole, rows], [whole, whole], [whole, rows]), (rows, columns))
    grid = init_device_mesh(mesh.device_type, (1, WORLD))
    *tensors, bias = tensors_in(grid, [rows, columns], [whole, columns], [whole, columns], [whole, whole])
    y = functional.dora_linear(*tensors, scaling=0.7)
    assert y.placements == (rows, Partial())
    assert_same(y + bias, functional.dora_linear(*inputs.tensors(), scaling=0.7), torch.float64)
    assert_same(functional.dora_linear(*tensors, bias, scaling=0.7), (y + bias).full_tensor(), torch.float64)
    # Lines of x that are not where the rows of the weight are: x is gathered, or the weight.
    y = functional.dora_linear(*tensors_in(mesh, [rows], [rows], [whole], [rows]), scaling=0.7)
    assert_same(y, functional.dora_linear(*inputs.tensors(), scaling=0.7), torch.float64)

    # A weight that is stored [in, out] has its gradient in that layout, where it lies.
    x, weight, *others = tensors_in(mesh, [whole], [rows], [whole], [rows])
    norm = functional.norm_factored(weight, *others[:2], 0.7).detach()
    stored = distribute_tensor(inputs.weight.detach().T.contiguous(), mesh, [columns]).requires_grad_()
    with collectives() as counts:
        functional.dora_linear(x, stored.T, *others, scaling=0.7, weight_norm=norm).sum().backward()
    assert counts == {}, counts
    assert stored.grad.placements == (columns,)
    assert stored.grad.stride() == stored.stride()

    # What is changed in place before backward is noticed.
    for name in FIELDS[:5]:
        tensors = tensors_in(mesh, [whole], [rows], [whole], [rows])
        y = functional.dora_linear(*tensors, scaling=0.7)
        with torch.no_grad():
            dict(zip(FIELDS, tensors, strict=True))[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    # The gradient of a sum still to be made arrives as another one.
    *tensors, _ = tensors_in(mesh, [columns], [columns], [columns], [whole])
    following = distribute_tensor(torch.randn(8, 13, dtype=torch.float64), mesh, [rows])
    y = functional.dora_linear(*tensors, scaling=0.7)
    assert y.placements == (Partial(),)
    nn.functional.linear(y, following).square().sum().backward()
    *leaves, _ = inputs.leaves().tensors()
    nn.functional.linear(
        functional.dora_linear(*leaves, scaling=0.7), following.full_tensor()
    ).square().sum().backward()
    for t, leaf in zip(tensors, leaves, strict=True):
        assert_same(t.grad, leaf.grad, torch.float64)

    # A gather that is still under way.
    x, *others = tensors_in(mesh, [rows], [rows], [whole], [rows])
    with on_shards():
        y = functional.dora_linear(x.redistribute(placements=[whole], async_op=True), *others, scaling=0.7)
    assert y.placements == (columns,)
    y.backward(distribute_tensor(dy, mesh, [columns]))
    assert_gradients((x, *others), reference.tensors())

    # A row that is not finite, and one whose squares overflow, on one rank and over both.
    for layout in (([whole], [rows], [whole], [rows]), ([columns], [columns], [columns], [whole])):
        _, weight, lora_A, lora_B, *_ = tensors_in(mesh, *layout)
        factor = torch.ones(13, 1, dtype=torch.float64)
        factor[2], factor[11] = float("inf"), 1e25
        factor = distribute_tensor(factor, mesh, [rows if layout[1] == [rows] else whole])
        with torch.no_grad():
            single = [(weight * factor).float(), lora_A.float(), lora_B.float()]
        norm = functional.norm_factored(*single, 0.7)
        assert_same(norm.full_tensor()[11], functional.norm_factored(*(t.full_tensor() for t in single), 0.7)[11])
        assert norm.full_tensor().isfinite().logical_not().nonzero().tolist() == [[2]]

    # Second derivatives.
    def second(x, *others):
        y = functional.dora_linear(x, *others, scaling=0.7)
        firsts = torch.autograd.grad(y.pow(3).sum(), (x, *others[1:4]), create_graph=True)
        return torch.autograd.grad(sum(d.square().sum() for d in firsts), (x, *others))

    expected = second(*inputs.leaves().tensors())
    for layout in (([whole], [rows], [whole], [rows]), ([columns], [columns], [columns], [whole])):
        for sharded, plain in zip(second(*tensors_in(mesh, *layout)), expected, strict=True):
            assert_same(sharded, plain, torch.float64)


def forms(mesh, folder):
    """The form with an autograd.Function of its own, which CUDA tensors take, wherever this runs."""
    with mock.patch.object(front, "has_kernels", lambda *tensors: all(t.dtype is torch.float32 for t in tensors)):
        functions(mesh, folder)
        tensor_parallel(mesh, folder)


def experts(mesh, _folder):
    """A weight [E, out, in] along each of its dimensions: norm, merge and unmerge on shards."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    weight, lora_A, lora_B = torch.randn(4, 6, 10), torch.randn(4, 2, 10), torch.randn(4, 6, 2)
    norm = functional.norm_factored(weight, lora_A, lora_B, 0.7)
    magnitude = norm * (0.8 + 0.4 * torch.rand_like(norm))
    merged, _ = functional.merge_weight(weight, lora_A, lora_B, magnitude, scaling=0.7)
    for dim, expected in ((0, {}), (1, {}), (2, {"all_reduce": 1})):
        layouts = (dim, None if dim == 1 else dim, None if dim == 2 else dim, None if dim == 2 else dim)
        tensors = [
            distribute_tensor(t, mesh, [Replicate() if d is None else Shard(d)])
            for t, d in zip((weight, lora_A, lora_B, magnitude), layouts, strict=True)
        ]
        with collectives() as counts:
            sharded_merged, sharded_norm = functional.merge_weight(*tensors, scaling=0.7)
        assert counts == expected, (dim, counts)
        assert_same(sharded_norm, norm)
        assert_same(sharded_merged, merged)
        assert sharded_merged.placements == (Shard(dim),)
        again = functional.unmerge_weight(sharded_merged, *tensors[1:], scaling=0.7, weight_norm=sharded_norm)
        assert_same(again, weight)


def two_dimensional(mesh, _folder):
    """FSDP2 over tensor parallelism: the same rows sharded twice."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    reference = Mlp()
    x, y = torch.randn(4, 24), torch.randn(4, 24)
    train(reference, x, y)
    adapted = reference(x).detach()
    merged = copy.deepcopy(reference)
    dorac.merge(merged)
    for shape in ((1, 2), (2, 1)):
        grid = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("dp", "tp"))
        model = copy.deepcopy(reference)
        parallelize_module(model, grid["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=grid["dp"])
        mine = slice(None) if shape == (1, 2) else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        train(model, x[mine], y[mine])
        assert_same_gradients(model, reference)
        dorac.merge(model)
        for name in ("up", "down"):
            assert_same(model.get_submodule(name).weight, merged.get_submodule(name).weight)
        with torch.no_grad():
            assert_same(model(x), adapted)


class Mlp(nn.Module):
    """Two adapted layers as a transformer's MLP has them, the first without a bias."""

    def __init__(self, **options):
        super().__init__()
        self.up, self.down = nn.Linear(24, 40, bias=False), nn.Linear(40, 24)
        self.requires_grad_(False)
        dorac.apply_dora(self, ["up", "down"], r=4, lora_alpha=6, init_lora_weights=False, **options)
        for layer in (self.up, self.down):
            nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def other_kinds():
    """An embedding and convolutions, adapted off their zero init."""
    layers = [
        dorac.nn.DoraEmbedding(nn.Embedding(10, 12), r=4, init_lora_weights=False),
        dorac.nn.DoraConv2d(nn.Conv2d(4, 6, 3), r=4, init_lora_weights=False),
        dorac.nn.DoraConv2d(nn.Conv2d(4, 6, 3, groups=2), r=4, init_lora_weights=False, grouped_lora_A=True),
    ]
    for layer in layers:
        nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)
    return layers


def assert_same_gradients(model, reference):
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert len(gradients) == 6
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in gradients), name
        if name in gradients:
            assert_same(p.grad, gradients[name])


def train(model, x, y):
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def tensor_parallel(mesh, folder):
    """``dorac.parallel``: numbers, collectives, an optimizer step, merge, checkpoints, refusals."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    def parallelized(model):
        return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    reference = Mlp()
    model = parallelized(copy.deepcopy(reference))
    x, y = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    layouts = {name: p.placements[0] for name, p in model.named_parameters()}
    assert layouts == {
        "up.lora_A": Replicate(),
        "up.lora_B": Shard(0),
        "up.lora_magnitude_vector": Shard(0),
        "up.base_layer.weight": Shard(0),
        "down.lora_A": Shard(1),
        "down.lora_B": Replicate(),
        "down.lora_magnitude_vector": Replicate(),
        "down.base_layer.weight": Shard(1),
        "down.base_layer.bias": Replicate(),
    }
    with collectives() as counts:
        loss = train(model, x, y)
    # Forward: down's norm, down's output. Backward, as of plain LoRA: up's lora_A; down's lora_B, and with it the
    # magnitude. The inputs need no gradient.
    assert counts == {"all_reduce": 4}, counts
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.placements == p.placements, name
    assert_same(loss, train(reference, x, y))
    assert_same_gradients(model, reference)
    loaded = parallelized(copy.deepcopy(reference))
    loaded.load_state_dict(model.state_dict(), assign=True)
    # Tensors' hooks follow neither a copy nor a move.
    for moved in (copy.deepcopy(model), copy.deepcopy(model).double().float(), loaded):
        train(moved, x, y)
        for name, p in moved.named_parameters():
            assert p.grad is None or p.grad.placements == p.placements, name
        assert_same_gradients(moved, reference)

    total = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert_same(total, nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
    for m in (model, reference):
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-2).step()
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.full_tensor(), expected[name], rtol=0, atol=1e-6)
        assert p.placements[0] == layouts[name]

    with torch.no_grad(), collectives() as counts:
        adapted = model(x)
    assert counts == {"all_reduce": 2}, counts
    with torch.inference_mode():
        inferred = model(x)
    assert_same(inferred.clone(), adapted)
    with torch.autocast(mesh.device_type, torch.bfloat16):  # the norm is not rounded; the products are, on each rank
        torch.testing.assert_close(model(x).float(), adapted, rtol=0, atol=2e-2 * adapted.abs().max().item())

    weights = {name: p.full_tensor() for name, p in model.named_parameters() if "weight" in name}
    with collectives() as counts:
        dorac.merge(model)
    assert set(counts) <= {"all_reduce"}, counts  # the norm, and whether all is finite: no gather
    assert_same(model(x), adapted)
    dorac.merge(reference)
    for name, p in model.named_parameters():
        assert_same(p, dict(reference.named_parameters())[name])
    dorac.unmerge(model)
    dorac.unmerge(reference)
    for name, weight in weights.items():
        assert_same(model.get_parameter(name), weight)

    dorac.save_adapter(model, folder / "sharded")
    dist.barrier()
    loaded = Mlp()
    dorac.load_adapter(loaded, folder / "sharded")
    for name, p in model.named_parameters():
        if "lora" in name:
            assert torch.equal(p.full_tensor(), loaded.get_parameter(name))
    again = parallelized(copy.deepcopy(reference))
    for layer in (again.up, again.down):
        nn.init.zeros_(layer.lora_B)
    dorac.load_adapter(again, folder / "sharded")
    assert_same(again(x), adapted)

    # One rank's part alone makes the adapter not finite, or a row unrecoverable: all ranks refuse.
    shard = model.up.lora_magnitude_vector.to_local()
    with torch.no_grad():
        if dist.get_rank() == 1:
            shard[0] = float("nan")
        with pytest.raises(ValueError, match=r"up: the adapter is not finite"):
            dorac.merge(model)
        shard[0] = 0 if dist.get_rank() == 1 else 1
    dorac.merge(model)
    with pytest.raises(ValueError, match=r"up: cannot unmerge rows 20:"):
        dorac.unmerge(model)

    wrapped = Mlp()
    dorac.merge(wrapped)
    with pytest.raises(ValueError, match="ColwiseParallel: the adapter is merged"):
        parallelized(wrapped)
    partly = parallelize_module(Mlp(), mesh, {"up.base_layer": ColwiseParallel()})
    with pytest.raises(TypeError, match="lora_A must be a DTensor like weight, got a plain tensor: shard a layer as"):
        partly(x)
    for layer in other_kinds()[1:]:
        with pytest.raises(ValueError, match=r"RowwiseParallel shards linear layers and"):
            parallelize_module(layer, mesh, RowwiseParallel())
    reference = other_kinds()[0]
    embedding = parallelize_module(copy.deepcopy(reference), mesh, ColwiseParallel(output_layouts=Replicate()))
    ids = torch.tensor([[1, 2, 9], [0, 5, 1]])
    with collectives() as counts:
        embedded = embedding(ids)
    assert counts == {"all_gather_into_tensor": 1}, counts  # of the output
    embedded.square().sum().backward()
    reference(ids).square().sum().backward()
    for name, p in reference.named_parameters():
        if p.grad is not None:
            assert_same(embedding.get_parameter(name).grad, p.grad)
    plain = parallelize_module(nn.Sequential(nn.Linear(24, 24)), mesh, {"0": ColwiseParallel()})
    assert plain(x).shape == (2, 3, 12)
    plain = nn.Linear(24, 24)
    plain.weight = nn.Parameter(distribute_tensor(plain.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"is sharded \(a DTensor\): wrap first, then shard"):
        dorac.nn.DoraLinear(plain)


def fsdp(mesh, folder):
    """``fully_shard``: numbers over halves of a batch, no gather but FSDP's own, merge and checkpoints on shards."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    reference = Mlp()
    model = copy.deepcopy(reference)
    plain = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 24))
    for m, layers in ((model, (model.up, model.down)), (plain, plain)):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(m, mesh=mesh)
    rank = dist.get_rank()
    x, y = torch.randn(4, 24), torch.randn(4, 24)
    mine = slice(2 * rank, 2 * rank + 2)

    with collectives() as counts:
        train(model, x[mine], y[mine])
    with collectives() as expected:
        train(plain, x[mine], y[mine])
    assert counts == expected, (counts, expected)  # what FSDP does for plain layers, and nothing more
    train(reference, x, y)
    assert_same_gradients(model, reference)
    for m in (model, reference):
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-2).step()

    # Outside forward the parameters are shards; of those only lora_A [r, in] is needed whole.
    layer, other = model.down, reference.down
    assert layer.weight.placements == (Shard(0),)
    with collectives() as counts:
        norm = functional.norm_factored(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
    assert counts == {"all_gather_into_tensor": 1}, counts
    assert_same(norm, functional.norm_factored(other.weight, other.lora_A, other.lora_B, other.scaling))

    with torch.no_grad():
        adapted = model(x)  # leaves the root's parameters gathered, as FSDP does
    assert_same(adapted, reference(x))
    dorac.save_adapter(model, folder / "fsdp")
    dist.barrier()
    loaded = Mlp()
    dorac.load_adapter(loaded, folder / "fsdp")
    assert_same(loaded.up.lora_A, reference.up.lora_A)
    dorac.merge(model)
    dorac.merge(reference)
    assert_same(model(x), adapted)
    assert_same(model.up.weight, reference.up.weight)
    dorac.unmerge(model)
    assert_same(model(x), adapted)
    model.reshard()
    model.up.reset_parameters()
    assert_same(
        model.up.lora_magnitude_vector,
        torch.linalg.vector_norm(
            model.up.weight.full_tensor()
            + model.up.scaling * model.up.lora_B.full_tensor() @ model.up.lora_A.full_tensor(),
            dim=1,
        ),
    )

    # A layer sharded with the model, not by itself: what its forward gathered must not be what is merged into.
    whole = copy.deepcopy(loaded)
    fully_shard(whole, mesh=mesh)
    with torch.no_grad():
        before = whole(x)
        dorac.merge(whole)
        assert_same(whole(x), before)
        whole.reshard()
        assert_same(whole(x), before)
        dorac.unmerge(whole)
        whole.reshard()
        assert_same(whole.up.weight, loaded.up.weight)
        assert_same(whole(x), before)

    for reference in other_kinds():
        x = torch.tensor([[1, 2, 9], [0, 5, 1]]) if hasattr(reference, "padding_idx") else torch.randn(2, 4, 5, 5)
        layer = fully_shard(copy.deepcopy(reference), mesh=mesh)
        with collectives() as counts:
            y = layer(x)
            y.square().sum().backward()
        assert counts == {"allgather_base": 1, "reduce_scatter_base": 1}, counts
        expected = reference(x)
        expected.square().sum().backward()
        for name, p in reference.named_parameters():
            if p.grad is not None:
                assert_same(layer.get_parameter(name).grad, p.grad)
        weight = reference.weight.detach().clone()
        dorac.merge(reference)
        dorac.merge(layer)
        assert_same(layer.base_layer.weight, reference.weight)
        dorac.unmerge(layer)
        assert_same(layer.base_layer.weight, weight)
        before = layer.lora_magnitude_vector.full_tensor()
        layer.reset_parameters()
        assert not torch.equal(layer.lora_magnitude_vector.full_tensor(), before)


def fsdp_offloaded(mesh, folder):
    """FSDP2's ``CPUOffloadPolicy``: three steps, and on the CPU, whose collectives take what lies there, the rest."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    reference = Mlp()
    model = copy.deepcopy(reference)
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    x, y = torch.randn(4, 24), torch.randn(4, 24)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, eps=1e-2) for m in (model, reference)
    ]
    for _ in range(3):
        train(model, x[mine], y[mine])
        train(reference, x, y)
        assert model.up.lora_A.grad.device.type == "cpu"
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        assert_same(model(x), reference(x))
    if mesh.device_type != "cpu":
        return
    dorac.save_adapter(model, folder / "offloaded")
    dist.barrier()
    loaded = Mlp()
    for m in (loaded, model):
        dorac.load_adapter(m, folder / "offloaded")
        assert_same(m.up.lora_A, reference.up.lora_A)
    dorac.merge(model)
    merged = copy.deepcopy(reference)
    dorac.merge(merged)
    assert_same(model.up.weight, merged.up.weight)
    dorac.unmerge(model)
    assert_same(model(x), reference(x))


def recipes(mesh, _folder):
    """Those of dorac/docs/sharding.md: layers that start at g = 1 with lora_B zero compute what the plain ones do."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

        def forward(self, x):
            return self.down(nn.functional.gelu(self.up(x)))

    plain, x = Plain(), torch.randn(3, 24)
    for heading in ("Tensor parallelism", "FSDP2"):
        model = copy.deepcopy(plain)
        if heading == "FSDP2":
            dorac.apply_dora(model, "all-linear", r=4)
        exec(recipe(heading), {"torch": torch, "dorac": dorac, "model": model, "mesh": mesh})
        assert_same(model(x), plain(x))
        assert all(hasattr(p, "placements") for p in model.parameters()), heading


def compiled(mesh, _folder):
    """The same models under ``compile(fullgraph=True)``, eager and compiled collectives alike."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    reference = Mlp()
    x, y = torch.randn(4, 3, 24), torch.randn(4, 3, 24)
    train(reference, x, y)

    model = parallelize_module(copy.deepcopy(reference), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    backend = AotEagerAndRecordGraphs()
    model.compile(fullgraph=True, backend=backend)
    train(model, x, y)
    assert_same_gradients(model, reference)

    def reductions(graphs):
        (graph,) = graphs
        sizes = [list(n.meta["val"].shape) for n in graph.graph.nodes if "all_reduce" in str(n.target)]
        due = [n.meta["val"] for n in graph.graph.nodes if "gradient_sums" in str(n.target)]
        assert not [n for n in graph.graph.nodes if "gather" in str(n.target)]
        return sizes + [list(t.shape) for layer in due for t in layer]

    reduced = reductions(backend.fw_graphs), reductions(backend.bw_graphs)
    # Forward: down's norm, and its rows before g. Backward: down's lora_B, up's lora_A.
    assert reduced == ([[24], [4 * 3, 24]], [[24, 4], [4, 24]]), reduced
    assert sum("row_norm" in str(n.target) for n in backend.fw_graphs[0].graph.nodes) == 2
    with torch.no_grad():
        assert_same(model(x), reference(x))

    model = copy.deepcopy(reference)
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
        layer.compile(fullgraph=True, backend="aot_eager")
    fully_shard(model, mesh=mesh)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    train(model, x[mine], y[mine])
    assert_same_gradients(model, reference)


def one_adapter(mesh, folder):
    """A sharded model has the adapter that it was sharded with, and others are refused by name."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    def fsdp(model):
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    x = torch.randn(4, 3, 24)
    for shard in (
        fsdp,
        lambda model: parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}),
    ):
        model = Mlp()
        dorac.add_adapter(model, "b")
        shard(model)
        with torch.no_grad():
            y = model(x)
        for call in (
            functools.partial(dorac.set_adapter, model, "b"),
            functools.partial(dorac.add_adapter, model, "c"),
            functools.partial(dorac.save_adapter, model, folder, adapter_name="b"),
        ):
            with pytest.raises(ValueError, match=r"^up: its tensors are sharded \(DTensor"):
                call()
        with torch.no_grad():
            assert_same(model(x), y)
        assert dorac.active_adapter(model) == "default"


@pytest.mark.parametrize(
    "workers",
    [
        (
            functions,
            dropped,
            layouts,
            forms,
            experts,
            tensor_parallel,
            fsdp,
            fsdp_offloaded,
            two_dimensional,
            one_adapter,
        ),
        (recipes, compiled),
    ],
    ids=["eager", "compiled"],
)
def test_two_processes_give_the_numbers_of_one(workers, device, tmp_path):
    run(in_turn, tmp_path, device, workers, tmp_path)

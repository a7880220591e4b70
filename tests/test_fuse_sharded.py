"""Fused blocks on two processes: FSDP2 and tensor parallelism leave them fused, with one process's numbers."""

from unittest import mock

import pytest
import torch
from processes import WORLD, run
from test_fuse import adapted, assert_same, draw

import dorac
from dorac import functional

TENSOR_PARALLEL = {"gate_proj": "ColwiseParallel", "up_proj": "ColwiseParallel", "down_proj": "RowwiseParallel"}


def shard_by_fsdp2(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for module in (model.mlp, model):
        fully_shard(module, mesh=mesh)


def shard_by_layers(model, mesh):
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac import parallel

    parallelize_module(model.mlp, mesh, {name: getattr(parallel, style)() for name, style in TENSOR_PARALLEL.items()})


def gathered(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def both_ways():
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(torch.get_default_device().type, (WORLD,))
    plain = adapted()
    y = plain(draw())
    y.sin().sum().backward()
    expected = [y, *(p.grad for p in plain.parameters() if p.grad is not None)]
    for shard in (shard_by_fsdp2, shard_by_layers):
        for fuse_first in (True, False):
            model = adapted()
            if fuse_first:
                dorac.fuse(model)
            shard(model, mesh)
            if not fuse_first:
                dorac.fuse(model)
            with mock.patch.object(functional, "dora_mlp", wraps=functional.dora_mlp) as mlp:
                y = model(draw())
            assert mlp.call_count == 1
            y.sin().sum().backward()
            gradients = [gathered(p.grad) for p in model.parameters() if p.grad is not None]
            assert_same([y, *gradients], expected)
            dorac.unfuse(model)
            assert_same([model(draw())], expected[:1])


@pytest.mark.full
def test_two_processes_give_the_numbers_of_one(tmp_path):
    run(both_ways, tmp_path, "cpu")

"""accelerate's FSDP2 and DDP over two processes, norms kept: one process's losses, states resumed bit for bit."""

import functools
import os

import pytest
import torch
import torch.distributed as dist
from processes import WORLD, run
from test_sharded import Mlp, assert_same
from tiny_trainers import shard_on_cpus
from torch import nn

import dorac
from dorac.nn import norm_cache

accelerate = pytest.importorskip("accelerate")


class Block(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def built(seed):
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)


def batches(rank=None, steps=3, micro=2):
    drawn = torch.randn(steps * micro, 2, 4, 24, generator=torch.Generator().manual_seed(5))
    return drawn if rank is None else drawn[:, :, 2 * rank : 2 * rank + 2]


def train(accelerator, model, optimizer, data):
    """The losses of steps of accumulated micro-batches."""
    losses = []
    for x, y in data:
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean"))
    return torch.stack(losses)


def accelerator_of(layout):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    plugin = None
    if layout == "FSDP2":
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)


def parameters(model):
    local = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in model.named_parameters()}
    return {name.removeprefix("module."): p.detach().clone() for name, p in local.items()}


def trains_as_one(folder):
    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    reference, its = built(0)
    one = []
    for i, (x, y) in enumerate(batches()):
        loss = (reference(x) - y).square().mean()
        (loss / 2).backward()
        one.append(loss.detach())
        if i % 2:
            its.step()
            its.zero_grad()
    shard_on_cpus()
    for layout in ("DDP", "FSDP2"):  # which it notes in the environment
        data, directory = batches(rank), folder / layout
        accelerator = accelerator_of(layout)
        model, optimizer = accelerator.prepare(*built(0))
        sharded = hasattr(next(model.parameters()), "placements")
        assert (type(model).__name__ == "DistributedDataParallel", sharded) == (layout == "DDP", layout == "FSDP2")
        dorac.cache_norms(model)
        losses = [train(accelerator, model, optimizer, data[:4])]
        accelerator.save_state(str(directory))
        losses.append(train(accelerator, model, optimizer, data[4:]))
        assert_same(torch.cat(losses), torch.stack(one))
        assert len(norm_cache.kept_layers) >= 4

        accelerator = accelerator_of(layout)
        again, its = accelerator.prepare(*built(1))
        dorac.cache_norms(again)
        accelerator.load_state(str(directory))
        assert torch.equal(train(accelerator, again, its, data[4:]), losses[1])
        expected = parameters(model)
        for name, p in parameters(again).items():
            assert torch.equal(p, expected[name]), name
        if layout == "DDP":
            for name, p in reference.named_parameters():
                assert_same(expected[name], p)
        dorac.save_adapter(again, folder / f"{layout} adapter")
        dist.barrier()
        dorac.load_adapter(single := built(0)[0], folder / f"{layout} adapter")
        with torch.no_grad():
            assert_same(single(data[0, 0]), again(data[0, 0]).clone())


def test_two_processes(tmp_path):
    run(functools.partial(trains_as_one, tmp_path), tmp_path, "cpu")

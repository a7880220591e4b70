"""PEFT models on two gloo processes under FSDP2 and FSDP1 through the drop-in: one process's numbers.

Each test starts two processes, which run functions of this file; a failure carries that process's traceback.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

peft = pytest.importorskip("peft")

from peft_models import Holder, gradients, off_init  # noqa: E402

import dorac.peft  # noqa: E402

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 2


def _start(rank, worker, folder):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        worker()
    finally:
        dist.destroy_process_group()


def run(worker, folder):
    mp.spawn(_start, (worker, str(folder)), nprocs=WORLD)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(21, 16)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 16, bias=False)
        self.filter = nn.Conv1d(16, 8, 3, padding=1)

    def forward(self, x):
        return self.filter(self.second(self.first(self.table(x)).tanh()).transpose(1, 2))


def adapted(lora_dropout=0.0):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        use_dora=True,
        lora_dropout=lora_dropout,
        target_modules=["table", "first", "second", "filter"],
    )
    model = off_init(peft.get_peft_model(Holder(Net()), config))
    dorac.peft.enable(model)
    return model


def batch(rank):
    torch.manual_seed(7 + rank)
    return torch.randint(0, 21, (3, 5))


def reference():
    """The mean of the ranks' losses on one process: its output for this rank, and the gradients."""
    model = adapted().train()
    outputs = [model(batch(rank)) for rank in range(WORLD)]
    (sum(y.square().mean() for y in outputs) / WORLD).backward()
    return outputs[dist.get_rank()].detach(), gradients(model)


def fsdp2():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    expected, expected_gradients = reference()
    mesh = init_device_mesh("cpu", (WORLD,))
    model = adapted().train()
    for name in ("table", "first", "second", "filter"):
        fully_shard(getattr(model.base_model.model.target, name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    weight = model.base_model.model.target.first.base_layer.weight
    assert isinstance(weight, DTensor)
    y = model(batch(dist.get_rank()))
    torch.testing.assert_close(y.detach(), expected)
    y.square().mean().backward()
    actual = {name: g.full_tensor() for name, g in gradients(model).items()}
    torch.testing.assert_close(actual, expected_gradients)
    assert len(actual) == 12


def test_fsdp2(tmp_path):
    run(fsdp2, tmp_path)


def fsdp1():
    """Units of whole LoRA layers."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    expected, expected_gradients = reference()
    policy = ModuleWrapPolicy({peft.tuners.lora.LoraLayer})
    model = FSDP(adapted().train(), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
    y = model(batch(dist.get_rank()))
    torch.testing.assert_close(y.detach(), expected)
    y.square().mean().backward()
    with FSDP.summon_full_params(model, with_grads=True):
        actual = {name.replace("_fsdp_wrapped_module.", ""): g for name, g in gradients(model).items()}
        trained = {name: g for name, g in actual.items() if "base_layer" not in name}  # zeros for the frozen ones
        torch.testing.assert_close(trained, expected_gradients)


def test_fsdp1(tmp_path):
    run(fsdp1, tmp_path)

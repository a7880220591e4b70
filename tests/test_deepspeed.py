"""DeepSpeed itself, ZeRO-3 on the CPU over two processes: one process's losses and parameters.

Its CPU build compiles an extension in the first run. test_peft_zero3.py has what needs no DeepSpeed.
"""

import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
from peft_models import Holder, off_init
from processes import WORLD, run
from test_peft_sharded import Net
from test_sharded import assert_same
from torch import nn

peft = pytest.importorskip("peft")

import dorac.peft  # noqa: E402

CONFIG = {
    "gradient_clipping": 0.0,
    "train_micro_batch_size_per_gpu": 3,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def built(side, lora_dropout):
    torch.manual_seed(0)
    targets = ["table", "first", "second", "filter"]
    if side == "nn":
        dorac.apply_dora(model := Net(), targets, r=4, lora_dropout=lora_dropout, init_lora_weights=False)
        for layer in model.children():
            nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)
    else:
        config = peft.LoraConfig(r=4, use_dora=True, lora_dropout=lora_dropout, target_modules=targets)
        model = off_init(peft.get_peft_model(Holder(Net()), config)).train()
        dorac.peft.enable(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)


def batch(step, rank):
    """Seeds the dropout, too."""
    torch.manual_seed(10 * step + rank)
    return torch.randint(0, 21, (3, 5))


def trains_as_one(port):
    import deepspeed

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    deepspeed.init_distributed(dist_backend="gloo")
    for side, lora_dropout in itertools.product(("nn", "drop-in"), (0.0, 0.5)):
        reference, its = built(side, lora_dropout)
        expected = []
        for step in range(3):
            its.zero_grad()
            losses = torch.stack([reference(batch(step, r)).square().mean() for r in range(WORLD)])
            losses.mean().backward()
            its.step()
            expected.append(losses[rank].detach())
        model, optimizer = built(side, lora_dropout)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
        assert all(p.numel() == 0 for p in model.parameters())
        for step in range(3):
            loss = engine(batch(step, rank)).square().mean()
            engine.backward(loss)
            engine.step()
            assert_same(loss, expected[step])
        assert all(p.numel() == 0 for p in model.parameters())
        if side == "nn":
            with pytest.raises(ValueError, match=r"is in parts \(DeepSpeed ZeRO-3\)"):
                dorac.save_adapter(model, "nowhere")
        for name, p in reference.named_parameters():
            if p.requires_grad:
                with deepspeed.zero.GatheredParameters([parted := model.get_parameter(name)]):
                    assert_same(parted.detach().clone(), p)


@pytest.mark.full
def test_zero_3(tmp_path):
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run(trains_as_one, tmp_path, "cpu", port)

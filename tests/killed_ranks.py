"""Run as a script with a folder: in each scenario one of two ranks is killed; prints how both ended, as JSON.

Both train an MLP under FSDP2 and save it whole. Then rank 1 dies in the backward of the next step, or while it writes
its part of the next checkpoint, or rank 0 while it replaces the adapter.
"""

import datetime
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_sharded import Mlp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

import dorac

TIMEOUT = 20  # seconds that a collective waits
ENDS = 120  # seconds after which a rank counts as hung
DIES = {"step": 1, "save": 1, "adapter": 0}


def built():
    torch.manual_seed(0)
    return Mlp()


def train(model, optimizer, rank):
    x, y = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(rank))
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def save(model, optimizer, folder):
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=folder)


def work(scenario, rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    model = built()
    for module in (model.up, model.down, model):
        fully_shard(module)
    dorac.cache_norms(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)
    train(model, optimizer, rank)
    save(model, optimizer, folder / "checkpoint-1")
    dorac.save_adapter(model, folder / "adapter")
    dist.barrier()
    dies = rank == DIES[scenario]
    if scenario == "step":
        if dies:
            model.down.register_full_backward_hook(die)
        train(model, optimizer, rank)
    train(model, optimizer, rank)
    if scenario == "save":
        writer = dcp.FileSystemWriter
        with mock.patch.object(writer, "write_data", die if dies else writer.write_data):
            save(model, optimizer, folder / "checkpoint-2")
    if scenario == "adapter":
        with mock.patch.object(os, "replace", die if dies else os.replace):
            dorac.save_adapter(model, folder / "adapter")
        dist.barrier()


def child(scenario, rank, folder):
    code = 3
    try:
        work(scenario, rank, folder)
        code = 0
    except BaseException as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)  # nothing of what the parent holds is to be finalised


def ended(pid, deadline):
    """The exit code of a child, negative for a signal; None for one that hung, which is killed."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main(root):
    ends = {}
    for scenario in DIES:
        folder = root / scenario
        folder.mkdir()
        pids = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                child(scenario, rank, folder)
            pids.append(pid)
        wait = functools.partial(ended, deadline=time.monotonic() + ENDS)
        texts = (folder / f"{rank}.txt" for rank in range(2))
        codes = [wait(pid) for pid in pids]
        ends[scenario] = {"codes": codes, "texts": [t.read_text() if t.exists() else "" for t in texts]}
    print(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

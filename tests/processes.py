"""Processes on this machine, over gloo or over NCCL with a GPU each, which run a function of a test file."""

import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dorac.testing.poison import poisoned_memory

WORLD = 2
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def _start(rank, worker, folder, device, world, args):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device(torch.device("cuda", rank))
        torch.backends.cudnn.allow_tf32 = False  # as conftest.py, which these processes don't read
    dist.init_process_group(BACKENDS[device], init_method=f"file://{folder}/store", rank=rank, world_size=world)
    with poisoned_memory():  # as conftest.py
        worker(*args)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python must not be finalised here. A thread of gloo's frees the tensors of a collective after wait() has returned,
    # which takes the GIL; sharded models keep the process group and so the thread alive; and a thread that asks for the
    # GIL of a finalised interpreter ends in std::terminate.
    os._exit(0)


def run(worker, folder, device, *args, world=WORLD):
    """``worker(*args)`` in every process; a failure carries that process's traceback.

    Args:
        folder: an empty one, in which the processes find each other.
        device: ``cpu`` or ``cuda``, the type of each process's default device.
        world: how many processes.
    """
    if not dist.is_available() or not dist.is_backend_available(BACKENDS[device]):
        pytest.skip(f"needs {BACKENDS[device]}")
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    mp.spawn(_start, (worker, str(folder), device, world, args), nprocs=world)

"""Two gloo processes on this machine, which run a function of a test file."""

import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def _start(rank, worker, folder, args):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    worker(*args)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python must not be finalised here. A thread of gloo's frees the tensors of a collective after wait() has returned,
    # which takes the GIL; sharded models keep the process group and so the thread alive; and a thread that asks for the
    # GIL of a finalised interpreter ends in std::terminate.
    os._exit(0)


def run(worker, folder, *args):
    """``worker(*args)`` in every process; a failure carries that process's traceback.

    Args:
        folder: an empty one, in which the processes find each other.
    """
    mp.spawn(_start, (worker, str(folder), args), nprocs=WORLD)

"""torch.distributed.checkpoint and adapters of sharded models: resumed, resharded, whole after a rank was killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from killed_ranks import DIES, built
from processes import run
from test_sharded import Mlp, assert_same
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import dorac


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-2)


def as_fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    for module in (model.up, model.down, model):
        fully_shard(module)
    dorac.cache_norms(model)
    return model


def as_tensor_parallel(model):
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    mesh = init_device_mesh(torch.get_default_device().type, (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


LAYOUTS = {"fsdp2": as_fsdp2, "tensor parallel": as_tensor_parallel, "one": lambda model: model}


def train(model, optimizer, step, layout):
    """A step on the batch of this number: of this rank's share of it, if it is shared."""
    x, y = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(step))
    if layout == "fsdp2":
        x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in (x, y))
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def parts(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def loaded(folder, layout):
    """A model that began elsewhere with what is in a checkpoint, and its optimizer."""
    torch.manual_seed(9)
    model = LAYOUTS[layout](Mlp())
    optimizer = optimizer_of(model)
    state = parts(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, optimizer


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(model):
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_loaded(model, values, adapter):
    """The values bit for bit, and the adapter's files of them, as one process reads them."""
    for name, p in trained(model).items():
        assert torch.equal(p, values[name]), name
    dorac.save_adapter(model, adapter)
    if dist.is_initialized():
        dist.barrier()
    torch.manual_seed(11)
    single = Mlp()
    dorac.load_adapter(single, adapter)
    for name, p in trained(single).items():
        assert torch.equal(p, values[name]), name


def resume(folder, layout):
    """Two steps, saved; the third is the same bits in a model that was loaded. What there was at 2 and at 3."""
    torch.manual_seed(0)
    model = LAYOUTS[layout](Mlp())
    optimizer = optimizer_of(model)
    for step in range(2):
        train(model, optimizer, step, layout)
    dcp.save(parts(model, optimizer), checkpoint_id=folder / layout)
    at_2 = trained(model)
    again, its = loaded(folder / layout, layout)
    assert_loaded(again, at_2, folder / f"{layout} adapter")
    dorac.load_adapter(again, folder / f"{layout} adapter")
    assert train(again, its, 2, layout) == train(model, optimizer, 2, layout)
    for (name, own), (_, expected) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        own, expected = (p.to_local() if hasattr(p, "to_local") else p for p in (own, expected))
        assert torch.equal(own, expected), name
    at_3 = trained(model)
    if dist.get_rank() == 0:
        torch.save((at_2, at_3), folder / f"{layout}.pt")


def reshard(folder, pairs):
    """From the layout that was saved to another one: the values bit for bit, the next step up to rounding."""
    for saved, layout in pairs:
        at_2, at_3 = torch.load(folder / f"{saved}.pt")
        model, optimizer = loaded(folder / saved, layout)
        name = f"{saved} to {layout} on {dist.get_world_size() if dist.is_initialized() else 1}"
        assert_loaded(model, at_2, folder / f"adapter of {name}")
        train(model, optimizer, 2, layout)
        for key, p in trained(model).items():
            assert_same(p, at_3[key])


def saved_by_two(folder):
    for layout in ("fsdp2", "tensor parallel"):
        resume(folder, layout)
    dist.barrier()
    reshard(
        folder,
        [("fsdp2", "tensor parallel"), ("tensor parallel", "fsdp2"), ("one", "fsdp2"), ("one", "tensor parallel")],
    )


def on_one(folder):
    torch.manual_seed(0)
    model = Mlp()
    optimizer = optimizer_of(model)
    for step in range(2):
        train(model, optimizer, step, "one")
    dcp.save(parts(model, optimizer), checkpoint_id=folder / "one", no_dist=True)
    at_2 = trained(model)
    train(model, optimizer, 2, "one")
    torch.save((at_2, trained(model)), folder / "one.pt")


def by_four(folder):
    reshard(folder, [(saved, layout) for saved in LAYOUTS for layout in ("fsdp2", "tensor parallel")])


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_one_process_two_and_back(device, tmp_path):
    """1 -> 2, FSDP2 <-> tensor parallelism, 2 -> 1."""
    on_one(tmp_path)
    run(saved_by_two, tmp_path, device, tmp_path)
    reshard(tmp_path, [("fsdp2", "one"), ("tensor parallel", "one")])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_four_processes(tmp_path):
    """2 -> 4 and 1 -> 4."""
    on_one(tmp_path)
    (tmp_path / "two").mkdir()
    run(saved_by_two, tmp_path / "two", "cpu", tmp_path)
    run(by_four, tmp_path, "cpu", tmp_path, world=4)


def test_a_rank_is_killed(tmp_path):
    """In mid-step and in mid-save: the other ends with torch's sentence, and what was saved before is whole."""
    script = Path(__file__).parent / "killed_ranks.py"
    paths = [str(Path(dorac.__file__).parents[1]), str(script.parent), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    ends = json.loads(result.stdout.splitlines()[-1])
    assert ends.keys() == DIES.keys()
    for scenario, dead in DIES.items():
        codes, texts = ends[scenario]["codes"], ends[scenario]["texts"]
        assert codes[dead] == -9, (scenario, ends)
        assert codes[1 - dead] == 3, (scenario, ends)  # it raised, and did not hang
        assert any(word in texts[1 - dead] for word in ("Connection", "Timed out")), ends
        folder = tmp_path / scenario
        dorac.load_adapter(adapter := Mlp(), folder / "adapter")
        model, _ = loaded(folder / "checkpoint-1", "one")
        assert trained(model).keys() == trained(adapter).keys()
        start = trained(built())
        for name, p in trained(model).items():
            assert torch.equal(p, trained(adapter)[name]), (scenario, name)
            assert not torch.equal(p, start[name]), (scenario, name)
    with pytest.raises(
        dcp.api.CheckpointException, match="metadata"
    ):  # the one that was being written is no checkpoint
        loaded(tmp_path / "save" / "checkpoint-2", "one")

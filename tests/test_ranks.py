"""What is not the same on all ranks is refused by each of them in one sentence, as is a merge that would gather."""

import json
import os
import re
import shutil
import time
from collections import OrderedDict
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import run
from test_sharded import Mlp, assert_same, in_turn
from torch import nn

import dorac
from dorac.parallel import ColwiseParallel, RowwiseParallel, check_ranks


def model_of(targets="all-linear", **options):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(up=nn.Linear(24, 40), down=nn.Linear(40, 24)))
    dorac.apply_dora(model, targets, **{"r": 4, "init_lora_weights": False} | options)
    return model


def refused(call, *words):
    """The sentence of the ``ValueError`` that every rank raises, which has these words."""
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        call()
    sentences = [None] * dist.get_world_size()
    dist.all_gather_object(sentences, str(error.value))
    assert len(set(sentences)) == 1, sentences
    assert all(word in sentences[0] for word in words), sentences[0]


def fsdp2(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def other_adapters(mesh, _folder):
    from torch.distributed.tensor.parallel import parallelize_module

    one = dist.get_rank() == 1
    for options, *words in (
        (
            {"r": 8 if one else 4},
            "up is not the same on all ranks: DoraLinear(",
            "r=8",
            "on rank 1",
            "r=4",
            "on rank 0",
        ),
        ({"lora_alpha": 16 if one else 8}, "scaling=4", "scaling=2"),
        ({"lora_dropout": 0.1 * one}, "lora_dropout=0.1", "lora_dropout=0"),
        ({"targets": ["up", "down"][: 2 - one]}, "down is not the same on all ranks: missing on rank 1"),
        ({"adapter_dtype": torch.float64 if one else None}, "float64", "float32"),
    ):
        model = model_of(**options)
        refused(lambda model=model: check_ranks(model, mesh), *words, "build the model with one config on every rank")
    check_ranks(model_of(), mesh)
    for style in (ColwiseParallel(), RowwiseParallel()):
        layer = model_of(r=8 if one else 4).up
        refused(lambda layer=layer, style=style: parallelize_module(layer, mesh, style), "the layer", "r=8", "r=4")
        assert not hasattr(layer.lora_A, "placements")
    model = fsdp2(model_of(lora_alpha=16 if one else 8), mesh)
    refused(lambda: dorac.cache_norms(model), "up", "scaling=4", "scaling=2")
    assert model.up.kept is None


def other_files(mesh, folder):
    """Each rank has a directory of its own: another adapter in it, another config, none, a damaged one."""
    rank = dist.get_rank()
    own = folder / str(rank)
    source = model_of()
    dorac.save_adapter(source, own)
    model = fsdp2(model_of(), mesh)
    with torch.no_grad():
        model.up.lora_B.mul_(2)
    before = model.up.lora_B.full_tensor()
    dorac.load_adapter(model, own)  # the same values from two directories
    assert_same(model.up.lora_B, source.up.lora_B)
    with torch.no_grad():
        model.up.lora_B.mul_(2)

    def another():
        with torch.no_grad():
            source.up.lora_B[0, 0] += 1
        dorac.save_adapter(source, own)

    def another_config():
        shutil.rmtree(own)
        dorac.save_adapter(model_of(lora_alpha=16), own)

    def damaged():
        config = json.loads((own / "adapter_config.json").read_text())
        (own / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))

    for change, word in (
        (another, "adapter "),
        (another_config, "adapter "),
        (damaged, "an error ("),
        (shutil.rmtree, "there is no file or directory"),
    ):
        dorac.save_adapter(model_of(), own)
        if rank == 1:
            change(own) if change is shutil.rmtree else change()
        refused(
            lambda: dorac.load_adapter(model, own), "what load_adapter reads is not the same", word, "same directory"
        )
        assert_same(model.up.lora_B, before)
    dorac.load_adapter(model_of(), folder / "0")  # of a model that is not sharded nobody asks


def saved_by_one(mesh, folder):
    """Rank 0 writes: no other goes on before it has, or where it could not."""
    model = fsdp2(model_of(), mesh)
    replace = os.replace

    def late(*paths):
        time.sleep(0.3)
        replace(*paths)

    with mock.patch.object(os, "replace", late):
        dorac.save_adapter(model, folder / "one")
    names = dorac.load_adapter(model, folder / "one")
    assert names == ["up", "down"]
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "one" / "adapter_config.json").unlink()
        (folder / "one" / "adapter_config.json").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*adapter_config.json: it is a directory") as error:
        dorac.save_adapter(model, folder / "one")
    assert ("rank 0" in str(error.value)) == (dist.get_rank() != 0)


def unlike_meshes(mesh, _folder):
    """A factor on another mesh than the weight."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    model = Mlp()
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    grid = init_device_mesh(mesh.device_type, (2, 1))
    whole = model.up.lora_A.full_tensor().detach()
    model.up.lora_A = nn.Parameter(distribute_tensor(whole, grid, [Replicate(), Replicate()]))
    assert isinstance(model.up.lora_A, DTensor)
    refused(lambda: model(torch.randn(2, 24)), "lora_A must be on the mesh of weight", "got DeviceMesh")


def merges(mesh, _folder):
    """A quantised weight in parts is not gathered; nothing is changed."""
    from test_fsdp2 import sharded
    from test_fsdp2_quantised import adapted, nf4

    x = torch.randn(2, 24)
    for side in ("nn", "drop-in"):
        model = sharded(adapted(lambda: nf4(torch.bfloat16), side), mesh)
        with torch.no_grad():
            y = model(x)
        call = (lambda model=model: dorac.merge(model)) if side == "nn" else model.up.merge
        refused(call, "its quantised weight is in parts (a DTensor)", "load it into the model in one process")
        with torch.no_grad():
            assert torch.equal(model(x), y)


def test_on_every_rank_alike(tmp_path):
    run(in_turn, tmp_path, "cpu", (other_adapters, other_files, saved_by_one, unlike_meshes), tmp_path)


@pytest.mark.full
def test_a_merge_that_would_gather(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    run(in_turn, tmp_path, "cpu", (merges,), tmp_path)


def test_an_adapter_in_parts_of_zero_3_is_not_saved(tmp_path):
    """DeepSpeed leaves tensors without elements between forwards: they are no adapter."""
    model = model_of()
    p = model.up.lora_A
    p.ds_id, p.data = 0, torch.empty(0)
    with pytest.raises(ValueError, match=r"up.lora_A is in parts \(DeepSpeed ZeRO-3\): call this within"):
        dorac.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()

"""What a layer sends on meshes of up to 1024 ranks, counted on torch's fake process group beside plain LoRA."""

import argparse

import pytest
import torch
from torch import nn

from dorac import cli
from dorac.bench import __main__ as bench
from dorac.bench import mesh

pytest.importorskip("torch.testing._internal.distributed.fake_pg")

HIDDEN, INTERMEDIATE = 1024, 2048


def counted(worlds, *, layouts=mesh.LAYOUTS, intermediate=INTERMEDIATE, tokens=8):
    args = argparse.Namespace(
        world=worlds,
        layouts=layouts,
        hidden=HIDDEN,
        intermediate=intermediate,
        rank=16,
        tokens=tokens,
        variants=mesh.VARIANTS,
        seed=0,
    )
    return {(record["case"], record["variant"]): record for record in mesh.run(args)}


def extra(records, world, layout, variant="dorac-every"):
    record = records[f"{layout} {world} ranks", variant]
    return record["extra_calls"], record["extra_bytes"]


def test_dora_adds_vectors_whatever_the_mesh(capsys):
    """O(out) bytes and, where columns are sharded, one call, the sums of squares."""
    records = counted([1, 8, 64, 1024])
    calls, size = extra(records, 8, "tp")
    assert calls == 1
    assert size == HIDDEN * (8 + 4)  # the magnitude's gradient goes with lora_B's
    for world in (8, 64, 1024):
        assert extra(records, world, "tp") == (calls, size)
        for variant in ("dorac-every", "dorac-cached"):  # two gathers and a scatter hold the magnitudes
            assert extra(records, world, "fsdp2", variant) == (0, 3 * 4 * (HIDDEN + INTERMEDIATE))
    for world in (64, 1024):
        own = 3 * 4 * (HIDDEN + INTERMEDIATE // mesh.TENSOR_PARALLEL)
        assert extra(records, world, "tp-fsdp2") == (calls, size + own)
    assert extra(records, 8, "tp-fsdp2") == (calls, size)  # nothing is left for FSDP2 to share
    assert all(r["bytes_moved"] == 0 for (case, _), r in records.items() if case.endswith(" 1 ranks"))
    assert records["tp 8 ranks", "lora"]["forward"] == f"1 all_reduce {8 * HIDDEN * 2}"
    assert "dorac-cached" in capsys.readouterr().err


def test_neither_tokens_nor_columns_change_what_dora_adds():
    small, large = (counted([8], layouts=["tp"], intermediate=i, tokens=t) for i, t in ((512, 4), (4096, 32)))
    assert extra(small, 8, "tp") == extra(large, 8, "tp")
    assert small["tp 8 ranks", "lora"]["bytes_moved"] < large["tp 8 ranks", "lora"]["bytes_moved"]


def test_lora_a_along_its_features_does_not_grow():
    """The recipe of ``dorac.parallel``; without it FSDP2 pads lora_A to a row for each rank."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, init_device_mesh

    args, sent = argparse.Namespace(hidden=HIDDEN, intermediate=INTERMEDIATE, rank=16, tokens=2), {}
    for world in (8, 64):
        with mesh.fake_ranks(world):
            ranks = init_device_mesh("cpu", (world,))
            for name, place in (
                ("rows", None),
                ("features", lambda p, n=world: Shard(1) if p.ndim == 2 and p.shape[0] < n else None),
            ):
                model = fully_shard(mesh.Mlp(args, lora=False), mesh=ranks, shard_placement_fn=place)
                sent[name, world] = sum(of.bytes for of in mesh.step(model, args))
    padded = 4 * (64 - 16) * (HIDDEN + INTERMEDIATE)
    assert sent["features", 8] == sent["features", 64] == sent["rows", 8]
    assert sent["rows", 64] == sent["rows", 8] + 2 * padded  # FSDP2's root is gathered once


def test_command_line(capsys):
    arguments = ["mesh", "--device", "cpu", "--hidden", "64", "--intermediate", "128", "--rank", "4"]
    assert bench.main([*arguments, "--world", "2", "--layouts", "tp"]) == 0
    assert "extra_bytes" in capsys.readouterr().out
    assert bench.main([*arguments, "--world", "3"]) == 2
    assert "--world 3 must divide --hidden and --intermediate, got 64" in capsys.readouterr().err
    with mesh.fake_ranks(2), pytest.raises(cli.BadInput, match="run it outside torchrun"):
        mesh.check(argparse.Namespace())


def test_collectives_by_hand():
    """Names and payloads of calls whose sizes are plain."""
    with mesh.fake_ranks(4), mesh.Collectives() as noted:
        torch.distributed.all_reduce(torch.ones(10))
        torch.distributed.all_gather_into_tensor(torch.empty(12), torch.ones(3))
        nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
    assert noted.noted == [("all_reduce", 40), ("all_gather", 48)]
    assert str(noted) == "1 all_reduce 40, 1 all_gather 48"

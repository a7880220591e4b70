"""FSDP2 over quantised layers on two processes, through ``dorac.nn`` and the drop-in: one process's numbers.

bitsandbytes' 4-bit weights are sharded in a float storage, as FSDP-QLoRA does. torchao's (0.18) have no operations to
be sharded by: they are left whole on each rank (``ignored_params``), and their adapters are sharded.
"""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from processes import run
from test_fsdp2 import assert_same_training, batches, sharded, train
from test_sharded import in_turn
from torch import nn

import dorac
from dorac import functional


class Frozen(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def nf4(storage):
    import bitsandbytes as bnb

    def layer(in_features, out_features):
        options = {"quant_type": "nf4", "quant_storage": storage}
        new = bnb.nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=torch.float32, **options)
        dense = torch.randn(out_features, in_features) / 8
        new.weight = bnb.nn.Params4bit(dense, requires_grad=False, module=new, **options)
        return new.to("cpu")

    return Frozen(layer(24, 64), layer(64, 24))


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = Frozen(nn.Linear(24, 64, bias=False), nn.Linear(64, 24, bias=False))
    quantize_(model, Int8WeightOnlyConfig())
    return model.requires_grad_(False)


def adapted(frozen, side):
    """Adapters off their start."""
    torch.manual_seed(4)
    if side == "nn":
        dorac.apply_dora(model := frozen(), ["up", "down"], r=4, lora_alpha=6, init_lora_weights=False)
    else:
        import peft

        from dorac.peft import enable

        config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["up", "down"])
        model = peft.get_peft_model(frozen(), config)
        enable(model)
        model = model.base_model.model
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.mul_(torch.rand_like(p) + 0.5) if "magnitude" in name else p.add_(0.1 * torch.randn_like(p))
    return model


def trains_as_one(mesh, _folder, *, frozen, side, whole=False):
    """Three steps with accumulated gradients; norms once a step, and in every forward."""
    reference = adapted(frozen, side)
    expected = train(reference, batches(mine=False))
    for keeps in (True, False):
        model = adapted(frozen, side)
        ignored = {p for p in model.parameters() if not p.requires_grad} if whole else None
        model = sharded(model, mesh, ignored_params=ignored)
        for layer in (model.up, model.down):
            assert (type(layer.base_layer.weight).__name__ == "DTensor") != whole
        if keeps:
            dorac.cache_norms(model)
        with norms_read() as read:
            result = train(model, batches(mine=True), sync=True)
        assert len(read) == (6 if keeps else 12), len(read)  # two layers; three steps of two micro-batches
        named = dict(reference.named_parameters())
        trained = Trained({name: p for name, p in named.items() if p.requires_grad})
        assert_same_training(model, result, trained, expected)


@contextlib.contextmanager
def norms_read():
    """A list of the weights that norms are taken of."""
    read, norm = [], functional.norm_factored

    def noting(weight, *args, **options):
        read.append(weight)
        return norm(weight, *args, **options)

    with mock.patch.object(functional, "norm_factored", noting):
        yield read


class Trained:
    def __init__(self, parameters):
        self.parameters = parameters

    def named_parameters(self):
        return self.parameters.items()


def workers(sides, storages=(torch.bfloat16,), library="nf4"):
    frozen = [functools.partial(nf4, s) for s in storages] if library == "nf4" else [torchao]
    return [
        functools.partial(trains_as_one, frozen=f, side=side, whole=library == "torchao")
        for f in frozen
        for side in sides
    ]


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("bitsandbytes", {"sides": ["nn"]}),
        pytest.param(
            "bitsandbytes",
            {"sides": ["nn", "drop-in"], "storages": [torch.float32, torch.uint8, torch.bfloat16]},
            marks=pytest.mark.full,
        ),
        pytest.param("torchao", {"sides": ["nn", "drop-in"], "library": "torchao"}, marks=pytest.mark.full),
    ],
    ids=["nf4", "nf4 in each storage", "int8"],
)
def test_trains_as_one_process(package, options, tmp_path):
    pytest.importorskip(package)
    if "drop-in" in options["sides"]:
        pytest.importorskip("peft")
    run(in_turn, tmp_path, "cpu", workers(**options), tmp_path)

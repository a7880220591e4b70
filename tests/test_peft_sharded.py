"""PEFT models on two processes under FSDP2 and FSDP1 through the drop-in: one process's numbers.

Each test starts two processes, which run functions of this file.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from processes import WORLD, run
from torch import nn

peft = pytest.importorskip("peft")

from peft_models import Holder, gradients, off_init  # noqa: E402

import dorac.peft  # noqa: E402


class Net(nn.Module):
    def __init__(self, padding_mode="zeros") -> None:
        super().__init__()
        self.table = nn.Embedding(21, 16)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 16, bias=False)
        self.filter = nn.Conv1d(16, 8, 3, padding=1, padding_mode=padding_mode)

    def forward(self, x):
        return self.filter(self.second(self.first(self.table(x)).tanh()).transpose(1, 2))


def adapted(targets=("table", "first", "second", "filter"), *, dtype=torch.float32, lora_dropout=0.0, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, use_dora=True, lora_dropout=lora_dropout, target_modules=list(targets))
    model = off_init(peft.get_peft_model(Holder(Net(**options)).to(dtype), config))
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
    mesh = init_device_mesh(torch.get_default_device().type, (WORLD,))
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


def test_fsdp2(device, tmp_path):
    run(fsdp2, tmp_path, device)


def fsdp1(model, policy, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.get_default_device()
    )


def summoned(model, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(model, **options)


def whole_layers():
    """Units of whole LoRA layers."""
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    expected, expected_gradients = reference()
    model = fsdp1(adapted().train(), ModuleWrapPolicy({peft.tuners.lora.LoraLayer}), use_orig_params=True)
    y = model(batch(dist.get_rank()))
    torch.testing.assert_close(y.detach(), expected)
    y.square().mean().backward()
    with summoned(model, with_grads=True):
        actual = {name.replace("_fsdp_wrapped_module.", ""): g for name, g in gradients(model).items()}
        trained = {name: g for name, g in actual.items() if "base_layer" not in name}  # zeros for the frozen ones
        torch.testing.assert_close(trained, expected_gradients)


def train(model, ranks):
    """The losses of these ranks in each of three steps of SGD on their mean."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        # batch() seeds the dropout too.
        losses.append(torch.stack([model(batch(rank)).square().mean() for rank in ranks]))
        losses[-1].mean().backward()
        optimizer.step()
    return torch.stack(losses).detach()


def trained_parameters(model):
    return {
        name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


# What FSDP1 with use_orig_params=False can wrap: an embedding's factors share a unit with frozen weights.
SEPARABLE = ("first", "second", "filter")


def peft_policy():
    """PEFT's own policy, which makes a unit of each factor and each magnitude: losses and parameters of three steps."""
    for use_orig_params, targets in ((False, SEPARABLE), (True, ("table", *SEPARABLE))):
        for lora_dropout in (0.0, 0.5):
            build = functools.partial(adapted, targets, dtype=torch.float64, lora_dropout=lora_dropout)
            single = build().train()
            start = trained_parameters(single)
            expected = train(single, range(WORLD))[:, dist.get_rank(), None]

            model = build().train()
            model = fsdp1(model, peft.utils.other.fsdp_auto_wrap_policy(model), use_orig_params)
            target = model.module.base_model.model.target
            units = (target.first.lora_A["default"], target.second.lora_B["default"])
            assert all(type(m) is type(model) for m in (*units, target.filter.lora_magnitude_vector["default"]))
            torch.testing.assert_close(train(model, [dist.get_rank()]), expected, rtol=1e-12, atol=0)
            with summoned(model):
                actual = trained_parameters(model)
            torch.testing.assert_close(actual, trained_parameters(single), rtol=1e-12, atol=1e-12)
            assert len(actual) == 3 * len(targets)
            assert all((actual[name] - p).abs().max() > 1e-3 for name, p in start.items())


def merged_while_whole():
    """What is merged and unmerged under ``summon_full_params`` stays."""
    for use_orig_params in (False, True):
        model = adapted(SEPARABLE, dtype=torch.float64).eval()
        model = fsdp1(model, peft.utils.other.fsdp_auto_wrap_policy(model), use_orig_params)
        x = batch(0)
        with torch.no_grad():
            expected = model(x).clone()
            for safe_merge in (False, True):
                with summoned(model):
                    model.merge_adapter(safe_merge=safe_merge)
                assert model.module.base_model.model.target.first.merged
                torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
                with summoned(model):
                    model.unmerge_adapter()
                torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def refused():
    """What needs parameters that are in parts: as such an error, not as a wrong norm or a crash."""
    from torch.distributed.fsdp.wrap import CustomPolicy

    message = r"FSDP holds a parameter .* in parts here.* give base_layer no FSDP unit"
    another = peft.LoraConfig(r=2, use_dora=True, target_modules=["first"])
    for use_orig_params in (False, True):
        model = adapted(SEPARABLE)
        model = fsdp1(model, peft.utils.other.fsdp_auto_wrap_policy(model), use_orig_params)
        layer = model.module.base_model.model.target.first
        magnitude = layer.lora_magnitude_vector["default"].module
        weights = [m.weight for m in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])]
        for outside_forward in (
            model.merge_adapter,
            functools.partial(model.merge_adapter, safe_merge=True),
            functools.partial(model.add_adapter, "another", another),
            functools.partial(magnitude.factored_norm, *weights, 1.0),
            functools.partial(magnitude.get_weight_norm, weights[0], torch.zeros(24, 16), 1.0),
            functools.partial(magnitude.mag_scale, torch.ones(24)),
        ):
            with pytest.raises(RuntimeError, match=message):
                outside_forward()
        assert not layer.merged

        leaves = CustomPolicy(lambda module: not list(module.children()) and hasattr(module, "weight"))
        with pytest.raises(RuntimeError, match=message):
            fsdp1(adapted(SEPARABLE), leaves, use_orig_params)(batch(0))
        model = adapted(SEPARABLE, padding_mode="circular")
        with pytest.raises(RuntimeError, match=r"the factors of a convolution .* wrap the LoRA layer as a whole"):
            fsdp1(model, peft.utils.other.fsdp_auto_wrap_policy(model), use_orig_params)(batch(0))


def in_turn(*workers):
    for worker in workers:
        worker()


def test_fsdp1(device, tmp_path):
    run(in_turn, tmp_path, device, whole_layers, peft_policy, merged_while_whole, refused)


def test_tensor_parallelism_is_for_layers_of_dorac():
    """PEFT itself makes no DoRA over parallel weights; layers that are parallel afterwards say what to do."""
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from dorac.bench.mesh import fake_ranks

    with fake_ranks(1):
        mesh = init_device_mesh("cpu", (1,))
        parallel = Net()
        parallelize_module(parallel, mesh, {"first": ColwiseParallel()}, src_data_rank=None)
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            peft.get_peft_model(parallel, peft.LoraConfig(r=4, use_dora=True, target_modules=["first"]))
        model = adapted(["first"])
        layer = next(m for m in model.modules() if hasattr(m, "lora_B") and len(m.lora_B))
        styles = {name: ColwiseParallel() for name in ("base_layer", "lora_B.default")}
        parallelize_module(layer, mesh, styles, src_data_rank=None)
        with pytest.raises(
            TypeError, match=r"for tensor parallelism dorac\.parallel, .* \(dorac\.apply_dora, dorac\.load_adapter\)"
        ):
            model(batch(0))

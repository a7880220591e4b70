"""``dorac.cache_norms``: the same bits as without it, no stale norm through what its docstring names, and a check."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

import dorac
from dorac.nn import DoraConv2d, DoraEmbedding, DoraExperts, DoraLayer, DoraLinear
from dorac.nn.norm_cache import kept_norm
from dorac.ops import front

IN, OUT = 24, 17


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT, dtype=dtype), nn.Linear(OUT, IN, dtype=dtype)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))


def adapted(dtype=torch.float32, **options) -> Net:
    """Two layers away from their start."""
    model = Net(dtype)
    dorac.apply_dora(model, "all-linear", r=3, lora_alpha=6, init_lora_weights=False, **options)
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector))
    return model


def layers(model) -> list[DoraLayer]:
    return [module for module in model.modules() if isinstance(module, DoraLayer)]


def trained(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def assert_fresh(model) -> None:
    """Every layer's forward would use a cached norm, and it is the present one to the bit."""
    for layer in layers(model):
        assert layer._known_norm() is layer.kept.norm
        present = layer._norm()
        assert torch.equal(layer.kept.norm, present)
        assert (layer.kept.norm.dtype, layer.kept.norm.device) == (present.dtype, present.device)


def computed_norms(run) -> int:
    """How many norms are computed; on the CPU, where each is one of torch's."""
    with torch.profiler.profile() as profile:
        run()
    return sum(event.name == "aten::linalg_vector_norm" for event in profile.events())


def train(model, forward, optimizer, steps=4, micro_batches=3) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    device = next(model.parameters()).device
    dtype = layers(model)[0].weight.dtype
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            x = torch.randn(6, IN, generator=generator).to(device, dtype)
            loss = forward(x).float().square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_the_same_bits(optimizer, dtype, device):
    model = adapted(dtype).to(device)
    twin = copy.deepcopy(model)
    expected = train(twin, twin, OPTIMIZERS[optimizer](trained(twin)))
    dorac.cache_norms(model)
    assert train(model, model, OPTIMIZERS[optimizer](trained(model))) == expected
    assert expected[-1] != expected[0]
    assert_fresh(model)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("compiled_step", [False, True])
def test_compiled_losses_are_the_same_bits(backend, compiled_step, device):
    def run(model):
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        if compiled_step:
            optimizer.step = torch.compile(optimizer.step, backend=backend)
        return train(model, torch.compile(model, fullgraph=True, backend=backend), optimizer)

    model = adapted().to(device)
    expected = run(copy.deepcopy(model))
    dorac.cache_norms(model)
    assert run(model) == expected
    assert_fresh(model)


KINDS = {
    "Conv1D": lambda: (DoraLinear(pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, IN), 3), (5, IN)),
    "dropout": lambda: (DoraLinear(nn.Linear(IN, OUT), 3, lora_dropout=0.3), (5, IN)),
    "Embedding": lambda: (DoraEmbedding(nn.Embedding(9, OUT), 3), (2, 5)),
    "Conv2d": lambda: (DoraConv2d(nn.Conv2d(4, 6, 3), 3), (2, 4, 7, 7)),
    "grouped Conv2d": lambda: (DoraConv2d(nn.Conv2d(4, 6, 3, groups=2), 4), (2, 4, 7, 7)),
}


def test_experts():
    """Two norms in one buffer: those of all projections of all experts."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(hidden_size=12, intermediate_size=10, num_local_experts=4, num_experts_per_tok=2)
    base = mixtral.MixtralExperts(config)
    for p in base.parameters():
        nn.init.normal_(p, std=0.3)
    layer = DoraExperts(base, 3, init_lora_weights=False)
    x, chosen, weights = torch.randn(7, 12), torch.randint(4, (7, 2)), torch.rand(7, 2)

    def run(layer):
        optimizer = torch.optim.SGD(trained(layer), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(layer(x, chosen, weights).square().mean())
            losses[-1].backward()
            optimizer.step()
        return torch.stack(losses).detach()

    twin = copy.deepcopy(layer)
    expected = run(twin)
    dorac.cache_norms(layer)
    assert torch.equal(run(layer), expected)
    assert len(set(expected.tolist())) == 3
    assert computed_norms(lambda: layer(x, chosen, weights)) == 0 < computed_norms(lambda: twin(x, chosen, weights))
    for change in (layer.merge, layer.unmerge, layer.reset_parameters):
        change()
    assert_fresh(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind):
    layer, shape = KINDS[kind]()
    x = torch.randint(9, shape) if kind == "Embedding" else torch.randn(shape)
    model, twin = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))

    def run(model):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(trained(model), lr=0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            losses.append(model(x).square().mean())
            losses[-1].backward()
            optimizer.step()
        return torch.stack(losses).detach()

    expected = run(twin)
    dorac.cache_norms(model)
    assert torch.equal(run(model), expected)
    assert len(set(expected.tolist())) == 4
    assert_fresh(model)
    assert computed_norms(lambda: model(x)) == 0 < computed_norms(lambda: twin(x))
    state = copy.deepcopy(twin.state_dict())
    if layer.cannot_merge() is None:
        dorac.merge(model)
        dorac.unmerge(model)
        assert_fresh(model)
    model.load_state_dict(state)
    assert_fresh(model)
    assert_fresh(model.bfloat16())


def test_forward_computes_no_norm():
    model, x = adapted(), torch.randn(5, IN)
    assert computed_norms(lambda: model(x).sum().backward()) == 2
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    with dorac.cache_norms(model):
        assert computed_norms(lambda: model(x).sum().backward()) == 0
        assert computed_norms(optimizer.step) == 2
        assert computed_norms(lambda: model(x).sum().backward()) == 0
        with torch.inference_mode():
            assert computed_norms(lambda: model(x)) == 2  # another grad mode: they are taken anew, once
            assert computed_norms(lambda: model(x)) == 0
    assert computed_norms(lambda: model(x)) == 2
    assert all(layer.kept is None for layer in layers(model))


def test_checkpointing_computes_no_norm_twice():
    model, x = adapted(), torch.randn(5, IN, requires_grad=True)

    def run():
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()

    assert computed_norms(run) == 4
    with dorac.cache_norms(model):
        assert computed_norms(run) == 0


# --- what refreshes ---------------------------------------------------------------------------------------------------


def write(model):
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B.add_(torch.randn_like(layer.lora_B))


def load_state(model, directory):
    model.load_state_dict(adapted().state_dict())


def assign_state(model, directory):
    model.load_state_dict(adapted().state_dict(), assign=True)


def load_layer_state(model, directory):
    for mine, other in zip(layers(model), layers(adapted()), strict=True):
        mine.load_state_dict(other.state_dict())


def load_adapter(model, directory):
    dorac.save_adapter(adapted(), directory)
    dorac.load_adapter(model, directory)


def reset(model, directory):
    for layer in layers(model):
        layer.reset_parameters()


def merge_and_unmerge(model, directory):
    dorac.merge(model)
    dorac.unmerge(model)


def merged_step(model, directory):
    dorac.merge(model)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for p in trained(model):
        p.grad = torch.randn_like(p)
    optimizer.step()
    dorac.unmerge(model)


def new_scaling(model, directory):
    for layer in layers(model):
        layer.scaling = 0.7


def fresh_optimizer(model, directory):
    """Made after the cache, as a trainer's is."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, fused=True)
    model(torch.randn(3, IN)).sum().backward()
    optimizer.step()


def two_optimizers(model, directory):
    model(torch.randn(3, IN)).sum().backward()
    for layer in layers(model):
        torch.optim.SGD([layer.lora_A], lr=0.1).step()
        torch.optim.SGD([layer.lora_B], lr=0.1).step()


def step_in_inference_mode(model, directory):
    model(torch.randn(3, IN)).sum().backward()
    with torch.inference_mode():
        torch.optim.SGD(trained(model), lr=0.1).step()


CASTS = {
    "bfloat16": lambda model, _: model.bfloat16(),
    "half_of_a_layer": lambda model, _: model.up.half(),
    "double": lambda model, _: model.double(),
    "there_and_back": lambda model, _: model.double().bfloat16().float(),
    "cpu": lambda model, _: model.cpu(),
}

CHANGES = [
    load_state,
    assign_state,
    load_layer_state,
    load_adapter,
    reset,
    merge_and_unmerge,
    merged_step,
    new_scaling,
    fresh_optimizer,
    two_optimizers,
    step_in_inference_mode,
]


@pytest.mark.parametrize("change", [*CHANGES, *CASTS.values()], ids=[*(c.__name__ for c in CHANGES), *CASTS])
def test_every_documented_change_refreshes(change, tmp_path):
    model = adapted()
    cache = dorac.cache_norms(model)
    before = [layer.kept.norm.clone() for layer in layers(model)]
    change(model, tmp_path)
    assert_fresh(model)
    cache.check()
    if change not in (CASTS["cpu"], CASTS["double"], merge_and_unmerge):
        assert any(
            not torch.equal(layer.kept.norm.double(), b.double())
            for layer, b in zip(layers(model), before, strict=True)
        )


def test_layers_of_one_layout_take_one_launch(monkeypatch, device):
    """Of every dtype, transposed or not; the others alone, and each with its own scaling."""
    kernels = pytest.importorskip("dorac.kernels.norm")
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    linears = [nn.Linear(IN, OUT) for _ in range(5)] + [nn.Linear(OUT, IN), nn.Linear(OUT, IN, dtype=torch.bfloat16)]
    model = nn.Sequential(*linears, nn.Embedding(IN, OUT), nn.Embedding(IN, OUT), nn.Conv1d(3, 4, 2)).to(device)
    dorac.apply_dora(model, [str(i) for i in range(10)], r=3, lora_alpha=6, init_lora_weights=False)
    model[1].scaling = 0.3
    launched = []
    row_norms = kernels.row_norms
    monkeypatch.setattr(kernels, "row_norms", lambda of, scalings: launched.append(len(of)) or row_norms(of, scalings))
    cache = dorac.cache_norms(model)
    assert sorted(launched) == [2, 5]
    for layer in layers(model):
        torch.testing.assert_close(layer.kept.norm, layer._norm(), rtol=1e-6, atol=0)
    before = [layer.kept.norm for layer in layers(model)]
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], lr=0.1)
    for p in trained(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert sorted(launched) == [2, 2, 5]
    cache.check()
    assert all(layer.kept.norm is norm for layer, norm in zip(layers(model), before, strict=True))


def test_refreshed_outside_of_eager(monkeypatch):
    """Traced, and with another default device, whatever the kernels' table of addresses is made of."""
    pytest.importorskip("triton")
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
    dorac.apply_dora(model, "all-linear", r=3, lora_alpha=6, init_lora_weights=False)
    cache = dorac.cache_norms(model)
    before = model[0].kept.norm.clone()

    @torch.compile(fullgraph=True, backend="eager")
    def rescale(x):
        model[0].scaling = 3.0
        return x

    rescale(torch.ones(1))
    assert not torch.equal(model[0].kept.norm, before)
    cache.check()
    with torch.device("meta"):
        cache.refresh()
    cache.check()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer, "scaling", float("nan")), "scaling must be finite in float32, got nan"),
        (lambda layer: setattr(layer, "scaling", "2"), "scaling must be a number or a 0-d float tensor, got str"),
        (
            lambda layer: setattr(layer, "lora_B", nn.Parameter(torch.ones(5, 3))),
            r"lora_B must be \[out, r\] = \[24, 3\]",
        ),
        (
            lambda layer: setattr(layer, "lora_A", nn.Parameter(layer.lora_A.half())),
            "lora_A and lora_B must share a dtype",
        ),
    ],
)
def test_a_refresh_refuses_what_a_forward_refuses(change, message, kernels, monkeypatch):
    model = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
    dorac.apply_dora(model, "all-linear", r=3, lora_alpha=6, init_lora_weights=False)
    cache = dorac.cache_norms(model)
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: kernels)
    with pytest.raises((TypeError, ValueError), match=message):  # noqa: PT012
        for layer in layers(model):  # alike, so that one launch would take them
            change(layer)
        cache.refresh()


@pytest.mark.gpu
def test_moves_refresh():
    model = adapted()
    dorac.cache_norms(model)
    assert_fresh(model.cuda())
    assert_fresh(model.cpu())


def test_refresh_is_in_place():
    """The memory that a captured CUDA graph reads stays the same, and the tensors that no recompile guards on."""
    model = adapted()
    cache = dorac.cache_norms(model)
    before = [(layer.kept.norm, layer.kept.norm.data_ptr()) for layer in layers(model)]
    fresh_optimizer(model, None)
    write(model)
    cache.refresh()
    for layer, (tensor, pointer) in zip(layers(model), before, strict=True):
        assert layer.kept.norm is tensor
        assert tensor.data_ptr() == pointer


def test_a_cast_keeps_float32():
    model = adapted()
    dorac.cache_norms(model)
    model.bfloat16()
    assert {layer.kept.norm.dtype for layer in layers(model)} == {torch.float32}
    assert_fresh(model)


def test_not_in_the_state_dict(tmp_path):
    model = adapted()
    expected = set(model.state_dict())
    dorac.cache_norms(model)
    assert set(model.state_dict()) == expected
    assert not list(model.buffers())  # nor where DDP, FSDP and averages of weights look


def test_started_in_inference_mode_it_can_still_be_trained():
    model = adapted()
    with torch.inference_mode():
        dorac.cache_norms(model)
    model(torch.randn(3, IN)).sum().backward()
    assert_fresh(model)


def test_skipped_steps_change_nothing():
    """GradScaler skips a step whose gradients are not finite, and with it the refresh."""
    model = adapted()
    dorac.cache_norms(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for scale in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(3, IN)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        assert_fresh(model)


# --- where forward takes its own norm ---------------------------------------------------------------------------------


def other_parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("compiled", [False, True])
def test_functional_call_uses_no_stale_norm(compiled):
    model, x = adapted(), torch.randn(5, IN)
    plain = copy.deepcopy(model)

    def run(net, parameters):
        function = lambda p, x: functional_call(net, p, (x,))  # noqa: E731
        function = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        return function(parameters, x)

    dorac.cache_norms(model)
    for parameters in (other_parameters(model), other_parameters(model)):
        assert torch.equal(run(model, parameters), run(plain, parameters))
    own = dict(model.named_parameters())
    assert torch.equal(run(model, own), run(plain, dict(plain.named_parameters())))


def test_functional_call_with_other_buffers_uses_no_stale_norm():
    model, x = adapted(), torch.randn(5, IN)
    expected = model(x)
    dorac.cache_norms(model)
    buffers = {name: torch.ones_like(b) for name, b in model.named_buffers()}
    assert torch.equal(functional_call(model, buffers, (x,)), expected)


def test_transforms_over_parameters():
    model, x = adapted(torch.float64), torch.randn(5, IN, dtype=torch.float64)
    plain = copy.deepcopy(model)
    dorac.cache_norms(model)
    parameters = other_parameters(model)
    stacked = {name: torch.stack([p, 1.1 * p]) for name, p in parameters.items()}

    def gradients(net):
        return torch.func.grad(lambda p: functional_call(net, p, (x,)).square().sum())(parameters)

    def ensemble(net):
        return torch.func.vmap(lambda p: functional_call(net, p, (x,)))(stacked)

    torch.testing.assert_close(gradients(model), gradients(plain))
    torch.testing.assert_close(ensemble(model), ensemble(plain))


def test_stacked_modules():
    """Modules with a cache can be stacked and run through a base without one."""
    models = [adapted(), adapted()]
    base, x = copy.deepcopy(models[0]), torch.randn(5, IN)
    for model in models:
        dorac.cache_norms(model)
    state = torch.func.stack_module_state(models)
    outputs = torch.func.vmap(lambda p, b: functional_call(base, (p, b), (x,)))(*state)
    torch.testing.assert_close(outputs, torch.stack([model(x) for model in models]))


def test_new_parameter_objects():
    model, x = adapted(), torch.randn(5, IN)
    cache = dorac.cache_norms(model)
    plain = copy.deepcopy(model)
    for net in (model, plain):
        torch.manual_seed(5)
        net.up.lora_A = nn.Parameter(torch.randn(3, IN))
    assert torch.equal(model(x), plain(x))
    cache.refresh()
    assert_fresh(model)


def test_unfrozen_base_weight():
    model, x = adapted(), torch.randn(5, IN)
    dorac.cache_norms(model)
    model.up.base_layer.weight.requires_grad_(True)
    assert model.up._known_norm() is None
    with torch.no_grad():
        model.up.base_layer.weight.add_(1)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_tensor_scaling():
    model, x = adapted(), torch.randn(5, IN)
    dorac.cache_norms(model)
    model.up.scaling = torch.tensor(0.5)
    model(x)
    model.up.scaling.fill_(2.0)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("use_compile", [False, True])
def test_closures(use_compile):
    """LBFGS runs the model between two changes of the parameters, within one step."""

    def run(model):
        optimizer = torch.optim.LBFGS(trained(model), lr=0.1, max_iter=4)
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if use_compile else model
        x = torch.randn(6, IN, generator=torch.Generator().manual_seed(3))
        losses = []

        def closure():
            optimizer.zero_grad()
            loss = forward(x).square().mean()
            loss.backward()
            losses.append(loss.item())
            return loss

        for _ in range(2):
            optimizer.step(closure)
        return losses

    model = adapted()
    expected = run(copy.deepcopy(model))
    dorac.cache_norms(model)
    assert run(model) == expected
    assert len(set(expected)) > 4
    assert_fresh(model)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_no_cache(clone):
    """Nobody would refresh theirs: an average of a model's weights is written without an optimizer."""
    model, x = adapted(), torch.randn(5, IN)
    dorac.cache_norms(model)
    twin = clone(model.up)
    assert twin._known_norm() is None
    assert torch.equal(twin(x), model.up(x))
    assert model.up._known_norm() is not None
    twin.half().float()
    assert twin._known_norm() is None


def test_averaged_weights():
    """``AveragedModel`` copies the model and writes the copy's parameters without an optimizer."""
    model, x = adapted(), torch.randn(5, IN)
    cache = dorac.cache_norms(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        write(model)
        cache.refresh()
        averaged.update_parameters(model)
    plain = adapted()
    plain.load_state_dict(averaged.module.state_dict())
    assert torch.equal(averaged(x), plain(x))
    assert not torch.equal(averaged(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_take_their_own_norm(strict):
    model, x = adapted().eval(), torch.randn(5, IN)
    dorac.cache_norms(model)
    program = torch.export.export(model, (x,), strict=strict).run_decompositions()
    torch.testing.assert_close(program.module()(x), model(x))
    exported = program.module()
    other = adapted()
    exported.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(exported(x), other(x))


def test_what_other_processes_write_to_shared_memory():
    model, x = adapted().share_memory(), torch.randn(5, IN)
    dorac.cache_norms(model)
    model(x)
    for parameter in model.parameters():  # as another process does: this one's version stays
        torch.from_numpy(parameter.detach().numpy()).mul_(1.5)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_programs_take_their_own_norm():
    """Of parameters that are the model's own: they see what is written to them."""
    model, x = adapted().eval(), torch.randn(5, IN)
    dorac.cache_norms(model)
    with torch.no_grad():
        model(x)
        traced = torch.jit.trace(model, x)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        torch.testing.assert_close(traced(x), model(x))


# --- staleness, removal, bad input ------------------------------------------------------------------------------------


def undocumented_write(model):
    model.up.lora_B.data.add_(0.1)


def test_check_finds_what_nobody_told_the_cache():
    model = adapted()
    cache = dorac.cache_norms(model)
    cache.check()
    undocumented_write(model)
    with pytest.raises(RuntimeError, match=r"cached norm of up is stale: .* call refresh\(\)"):
        cache.check()
    cache.refresh()
    cache.check()


def test_debug_mode_finds_it_in_forward():
    model, x = adapted(), torch.randn(5, IN)
    cache = dorac.cache_norms(model, debug=True)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    train(model, model, optimizer)
    undocumented_write(model)
    with pytest.raises(RuntimeError, match="cached norm of DoraLinear is stale"):
        model(x)
    cache.refresh()
    model(x)


def test_debug_mode_under_compile():
    model, x = adapted(), torch.randn(5, IN)
    dorac.cache_norms(model, debug=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compares in eager only"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    undocumented_write(model)
    with pytest.raises(RuntimeError, match="stale"):
        compiled(x)


def test_removed():
    model, x = adapted(), torch.randn(5, IN)
    cache = dorac.cache_norms(model)
    cache.remove()
    cache.remove()
    undocumented_write(model)
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    with dorac.cache_norms(model) as cache:
        assert_fresh(model)
    assert {layer.kept for layer in layers(model)} == {None}


def test_a_cache_that_is_dropped_goes_on_and_keeps_no_model_alive():
    model = adapted()
    dorac.cache_norms(model)
    gc.collect()
    fresh_optimizer(model, None)
    assert_fresh(model)
    dead = weakref.ref(model.up)
    del model
    gc.collect()
    assert dead() is None


def norm_trained(model):
    model.up.norm_grad = True


def base_trained(model):
    model.down.base_layer.weight.requires_grad_(True)


def cached(model):
    dorac.cache_norms(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (norm_trained, "up: its norm_grad is set"),
        (base_trained, "down: its base weight is trained: freeze it"),
        (cached, r"up: it is cached already; remove\(\) that cache first\n.*down: it is cached already"),
    ],
)
def test_refused(change, message):
    model = adapted()
    change(model)
    before = [kept_norm(layer) for layer in layers(model)]
    with pytest.raises(ValueError, match=message):
        dorac.cache_norms(model)
    assert all(kept_norm(layer) is norm for layer, norm in zip(layers(model), before, strict=True))


@pytest.fixture
def mesh(tmp_path):
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_models_take_their_own_norm(mesh):
    from torch.distributed.fsdp import fully_shard

    model, x = adapted(), torch.randn(5, IN)
    plain = copy.deepcopy(model)
    dorac.cache_norms(model)
    fully_shard(model, mesh=mesh)
    for net in (model, plain):
        optimizer = torch.optim.SGD(trained(net), lr=0.1)
        for _ in range(2):
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), plain(x))
    expected = plain(x)
    dorac.cache_norms(fully_shard(plain, mesh=mesh))  # sharded first: see test_fsdp2.py
    torch.testing.assert_close(plain(x), expected)
    assert all(layer.kept.of is not None for layer in layers(plain))


def test_refused_without_a_layer():
    with pytest.raises(ValueError, match="Net holds no DoRA layer"):
        dorac.cache_norms(Net())


def test_shown():
    model = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 4), nn.Linear(4, 4))
    dorac.apply_dora(model, ["0", "1", "2"], r=2, init_lora_weights=False)
    cache = dorac.cache_norms(model)
    assert repr(cache) == "NormCache(2 DoraLinear, 1 DoraEmbedding)"
    cache.remove()
    assert repr(cache) == "NormCache(removed, or its model is gone)"
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, nn.Tanh(), linear)
    dorac.apply_dora(model, ["0", "2"], r=2, init_lora_weights=False)
    assert repr(dorac.cache_norms(model)) == "NormCache(1 DoraLinear)"

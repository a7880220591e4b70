"""Models without their adapters (``disabled``, ``base_model``)."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dorac
from dorac.nn import DoraLayer
from dorac.testing import quantised_layers as fake


def nf4(linear):
    layer = fake.Linear4bit(*linear.weight.shape[::-1], bias=linear.bias is not None, dtype=linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def gpt2_conv1d():
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 10)
    return layer


# A base layer, and its input.
LAYERS = {
    "linear": (lambda: nn.Linear(10, 12), lambda: torch.randn(3, 5, 10)),
    "gpt2": (gpt2_conv1d, lambda: torch.randn(3, 5, 10)),
    "embedding": (lambda: nn.Embedding(20, 12, padding_idx=1), lambda: torch.randint(0, 20, (3, 5))),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2), lambda: torch.randn(3, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, (3, 2), padding=1, groups=2), lambda: torch.randn(3, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), lambda: torch.randn(3, 2, 4, 5, 3)),
    "nf4": (lambda: nf4(nn.Linear(64, 12)), lambda: torch.randn(3, 5, 64)),
}


def wrapped(kind: str, **options) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A model of one layer, the same with an adapter off its start, and an input."""
    layer, draw = LAYERS[kind]
    base = nn.Sequential(layer())
    model = copy.deepcopy(base)
    dorac.apply_dora(model, ["0"], r=2, lora_alpha=3, init_lora_weights=False, **options)
    with torch.no_grad():
        model[0].lora_magnitude_vector.mul_(
            torch.linspace(0.7, 1.4, model[0].lora_magnitude_vector.numel()).view_as(model[0].lora_magnitude_vector)
        )
    return base, model, draw()


KINDS = pytest.mark.parametrize("kind", LAYERS)


def sample(*kinds):
    """These kinds in CI, the others under the marker full."""
    return pytest.mark.parametrize(
        "kind", [kind if kind in kinds else pytest.param(kind, marks=pytest.mark.full) for kind in LAYERS]
    )


@KINDS
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_disabled_is_the_base_bit_for_bit(kind, mode):
    base, model, x = wrapped(kind, lora_dropout=0.5)
    getattr(model, mode)()
    adapted = model.eval()(x)
    getattr(model, mode)()
    with dorac.disabled(model):
        y = model(x)
    assert torch.equal(y, base(x))
    assert not torch.allclose(adapted, y, atol=1e-3)
    assert torch.equal(model.eval()(x), adapted)


def test_gradients_stay_as_they_are():
    _, model, x = wrapped("linear")
    with dorac.disabled(model):
        assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
        assert not model(x).requires_grad
    model(x).sum().backward()
    assert model[0].lora_B.grad is not None


def test_nested_and_raising():
    base, model, x = wrapped("linear")
    with dorac.disabled(model):
        with pytest.raises(KeyError), dorac.disabled(model[0]):
            raise KeyError
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))
    with pytest.raises(KeyError), dorac.disabled(model):
        raise KeyError
    assert not torch.equal(model(x), base(x))


@pytest.mark.parametrize("merged", [False, True])
def test_blocks_that_overlap(merged):
    """As those of two threads: the second one begins in the first one and ends after it."""
    base, model, x = wrapped("linear")
    if merged:
        dorac.merge(model)
    weight, y, expected = model[0].weight.clone(), model(x), base(x)
    first, second = dorac.disabled(model), dorac.disabled(model[0])
    first.__enter__()
    second.__enter__()
    for block in (first, second):
        torch.testing.assert_close(model(x), expected, rtol=1e-5 if merged else 0, atol=1e-5 if merged else 0)
        block.__exit__(None, None, None)
    assert torch.equal(model(x), y)
    assert torch.equal(model[0].weight, weight)
    assert model[0].merged == merged
    with dorac.disabled(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-5 if merged else 0, atol=1e-5 if merged else 0)
    assert torch.equal(model(x), y)


def test_copies_made_inside_are_switched_on():
    _, model, x = wrapped("linear")
    y = model(x)
    with dorac.disabled(model):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in copies:
            assert torch.equal(other(x), y)
    with dorac.disabled(copies[0]):
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d", "nf4"])
def test_merged_is_unmerged_and_put_back(kind):
    base, model, x = wrapped(kind, **({"grouped_lora_A": True} if kind == "conv2d" else {}))
    dorac.merge(model)
    layer = model[0]
    weight, kept, y = layer.weight.clone(), layer.merged_norm, model(x)
    for _ in range(2):
        with dorac.disabled(model):
            assert not layer.merged
            torch.testing.assert_close(model(x), base(x))
            if kind == "nf4":
                assert torch.equal(model(x), base(x))
            model.train(mode=not layer.training)
        assert layer.merged_norm is kept
        assert torch.equal(layer.weight, weight)
        assert torch.equal(model(x), y)
    assert layer.training  # set in the block, twice


def test_merged_that_cannot_be_unmerged():
    _, model, _ = wrapped("linear")
    with torch.no_grad():
        model[0].lora_magnitude_vector[3] = 0
    dorac.merge(model)
    with pytest.raises(ValueError, match="cannot unmerge rows 3"), dorac.disabled(model):
        raise AssertionError
    assert model[0].merged
    assert not model[0].disabled


def test_no_merging_meanwhile():
    _, model, _ = wrapped("linear")
    with dorac.disabled(model), pytest.raises(ValueError, match=r"leave dorac\.disabled before merging"):
        dorac.merge(model)


def test_no_adapter():
    with pytest.raises(ValueError, match="holds no DoRA layer"), dorac.disabled(nn.Linear(2, 2)):
        raise AssertionError


def with_head():
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 3))
    dorac.apply_dora(model, ["0"], r=2, init_lora_weights=False, modules_to_save=["1"])
    return model


def test_modules_trained_whole_are_named():
    model = with_head()
    with pytest.warns(RuntimeWarning, match="1: trained whole"), dorac.disabled(model):
        pass
    with pytest.warns(RuntimeWarning, match="1: trained whole"):
        dorac.base_model(model)


@sample("linear", "nf4")
def test_compiled_once_for_each_mode(kind):
    base, model, x = wrapped(kind)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    adapted = run(x)
    with dorac.disabled(run):
        torch.testing.assert_close(run(x), base(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            torch.testing.assert_close(run(x), adapted)
            with dorac.disabled(run):
                torch.testing.assert_close(run(x), base(x))


def test_cached_norms_stay():
    base, model, x = wrapped("linear")
    dorac.cache_norms(model)
    y, norm = model(x), model[0].kept.norm
    version = norm._version
    with dorac.disabled(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), y)
    assert model[0].kept.norm is norm
    assert norm._version == version


@pytest.mark.parametrize("before", [False, True], ids=["begun", "ended"])
def test_a_cache_may_begin_or_end_in_the_block(before):
    """The layer is merged again behind it, with its attributes as they were, and keeps its norm or not as was said."""
    _, model, x = wrapped("linear")
    cache = dorac.cache_norms(model) if before else None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    dorac.merge(model)
    with dorac.disabled(model):
        if before:
            cache.remove()
        else:
            cache = dorac.cache_norms(model)
    assert model[0].merged
    assert (model[0].kept is None) is before
    dorac.unmerge(model)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        forward(x).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(forward(x), copy.deepcopy(model)(x))
    cache.check()
    cache.remove()
    dorac.cache_norms(model).check()


@KINDS
def test_base_model_shares_the_parameters(kind):
    base, model, x = wrapped(kind)
    plain = dorac.base_model(model)
    assert not any(isinstance(m, DoraLayer) for m in plain.modules())
    assert torch.equal(plain(x), base(x))
    own = {id(t) for t in model.parameters()}
    assert all(id(p) in own for p in plain.parameters())
    plain.eval()
    assert model.training
    plain.load_state_dict(plain.state_dict())
    y = model(x)
    with dorac.disabled(model):
        assert torch.equal(plain(x), model(x))
    assert torch.equal(model(x), y)


def test_base_model_of_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    base = Tied()
    model = copy.deepcopy(base)
    dorac.apply_dora(model, ["embed"], r=2, init_lora_weights=False)
    plain = dorac.base_model(model)
    assert plain.head.weight is plain.embed.weight is model.head.weight
    x = torch.arange(7)
    assert torch.equal(plain(x), base(x))
    model.head.weight.data.mul_(2)
    assert torch.equal(plain(x), model.head(F.embedding(x, model.head.weight)))


def test_base_model_of_a_merged_one():
    _, model, _ = wrapped("linear")
    dorac.merge(model)
    with pytest.raises(ValueError, match="0 is merged"):
        dorac.base_model(model)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.full)])
@sample("linear", "nf4")
def test_another_adapter_into_compiled_code(kind, cached, grad, tmp_path):
    """``load_adapter`` of one that is like that which is there: no graph is compiled anew, whatever the norms do."""

    def model_of(seed):
        torch.manual_seed(0)
        _, model, _ = wrapped(kind)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model[0].parameters(recurse=False):
                parameter.mul_(0.5 + torch.rand_like(parameter))
        return nn.ModuleDict({"net": model})

    models = [model_of(seed) for seed in range(3)]
    x = LAYERS[kind][1]()
    outputs = []
    for number, other in enumerate(models[1:]):
        dorac.save_adapter(other, tmp_path / str(number))
        outputs.append(other["net"](x).detach())
    model = models[0]
    if cached:
        dorac.cache_norms(model)
    run = torch.compile(model["net"], fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        run(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for number, y in enumerate(outputs):
                dorac.load_adapter(model, tmp_path / str(number))
                torch.testing.assert_close(run(x), y)

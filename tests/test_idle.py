"""Adapters that are accepted and never run are named: by the source of the model, by a run, and when they are saved."""

import dataclasses
import random
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import dorac
from dorac.weight_reads import read_past_forward


class Holder(nn.Module):
    """A layer that runs and the one that the subclass may bypass."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        self.list = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return self.run(self.called(x))


class Direct(Holder):
    def run(self, x):
        return F.linear(x, self.proj.weight, self.proj.bias)


class Slice(Holder):
    def run(self, x):
        return x @ self.proj.weight[:, :4]


class Data(Holder):
    def run(self, x):
        return x @ self.proj.weight.data.t()


class WeightAlias(Holder):
    def run(self, x):
        w = self.proj.weight
        return x.to(w.dtype) @ w


class ModuleAlias(Holder):
    def run(self, x):
        projection = self.proj
        return F.linear(x, projection.weight)


class InProperty(Holder):
    @property
    def kernel(self):
        return self.proj.weight

    def run(self, x):
        return x @ self.kernel


class InBase(Direct):
    def run(self, x):
        return super().run(x) + 1


class Grandparent(Holder):
    def run(self, x):
        return x @ self.inner.proj.weight


class Indexed(Holder):
    def run(self, x):
        return x @ self.list[0].weight


class Iterated(Holder):
    def run(self, x):
        for layer in self.list:
            x = x @ layer.weight
        return x + sum(layer.weight.mean() for layer in self.list)


class OfAnotherClass(Holder):
    """Its child's method, which no forward of the child's own class reaches, is called from here."""

    def __init__(self):
        super().__init__()
        self.inner = Fused()

    def run(self, x):
        return self.inner.fused(x)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(x)

    def fused(self, x):
        return x @ self.proj.weight


def bypass(x, module):
    return x @ module.weight


class Helper(Holder):
    def run(self, x):
        return bypass(x, self.proj)


class ByName(Holder):
    def run(self, x):
        return x @ getattr(self, "pr" + "oj").weight


BYPASSED = {
    Direct: "proj",
    Slice: "proj",
    Data: "proj",
    WeightAlias: "proj",
    ModuleAlias: "proj",
    InProperty: "proj",
    InBase: "proj",
    Grandparent: "inner.proj",
    Indexed: "list.0",
    Iterated: "list.0",
    OfAnotherClass: "inner.proj",
}
UNSEEN = {Helper: "proj", ByName: "proj"}  # by their source


class Metadata(Holder):
    """Asks the weight for everything but its values, and touches it where no forward comes by."""

    def run(self, x):
        if self.proj.weight.dtype == x.dtype and isinstance(self.proj.weight, torch.Tensor):
            x = x.to(self.proj.weight.device).type_as(self.proj.weight).to(self.proj.weight)
        if self.proj.weight is not None and self.proj.weight.data.ndim == 2:
            x = x + torch.zeros_like(self.proj.weight).sum()
        w = self.proj.weight
        return self.proj(x.view(-1, w.shape[1])).reshape(x.shape)

    def reset_parameters(self):
        nn.init.zeros_(self.proj.weight)
        self.inner.proj.weight.data.normal_()


def adapted(cls, **options):
    model = cls()
    options = {"r": 2, "init_lora_weights": False} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = dorac.apply_dora(model, "all-linear", **options)
    return model, names


X = torch.randn(3, 4)


@pytest.mark.parametrize("cls", BYPASSED, ids=lambda cls: cls.__name__)
def test_wrapping_warns_of_weights_read_past_their_forward(cls):
    with pytest.warns(RuntimeWarning, match="can be read past their forward") as caught:
        dorac.apply_dora(cls(), "all-linear", r=2)
    (warning,) = caught
    assert f"\n  {BYPASSED[cls]} (in " in str(warning.message)
    assert "test_idle.py:" in str(warning.message)
    assert "called" not in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("cls", [Holder, Metadata, *UNSEEN], ids=lambda cls: cls.__name__)
def test_wrapping_is_quiet_where_the_source_reads_no_weight(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dorac.apply_dora(cls(), "all-linear", r=2)


def test_a_wrapper_may_read_its_layer():
    """Also where the layer has a second place in the model, which is adapted later."""
    model = Holder()
    model.inner["proj"] = model.proj
    dorac.apply_dora(model, ["called"], r=2)
    model.list[0] = dorac.nn.DoraLinear(model.proj, r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dorac.apply_dora(model, ["proj"], r=2)


def test_only_adapted_modules_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dorac.apply_dora(Direct(), ["called"], r=2)


def test_a_warning_that_is_an_error_leaves_the_model():
    model = Direct()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            dorac.apply_dora(model, "all-linear", r=2)
    assert type(model.proj) is type(model.called) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_a_forward_of_one_module():
    """As libraries of fused kernels replace it."""
    model = Holder()
    model.run = lambda x: x
    model.forward = Direct.run.__get__(model)
    assert {m for m in read_past_forward(model)} == {model.proj}


def test_code_without_source_is_passed_over():
    namespace = {"Direct": Direct}
    exec("class Made(Direct):\n    def run(self, x):\n        return x @ self.proj.weight\n", namespace)
    assert read_past_forward(namespace["Made"]()) == {}


@pytest.mark.parametrize("cls", BYPASSED | UNSEEN, ids=lambda cls: cls.__name__)
def test_a_run_finds_them_all(cls):
    model, names = adapted(cls)
    bypassed = (BYPASSED | UNSEEN)[cls]
    idle = dorac.find_idle(model, X)
    assert idle.keys() == {*names} - {"called"}
    assert f"{bypassed}:" not in idle
    assert "its weight is read past its forward: " in idle[bypassed]
    assert "test_idle.py:" in idle[bypassed]
    assert {reason for name, reason in idle.items() if name != bypassed} == {"it was not called"}


def test_a_run_in_which_all_take_part():
    model, _ = adapted(Metadata)
    assert dorac.find_idle(model, X).keys() == {"inner.proj", "list.0"}


class Detached(Holder):
    def run(self, x):
        return x + self.proj(x).detach() + self.inner.proj(x)


class Both(Holder):
    def run(self, x):
        return self.proj(x) + self.proj.weight.sum()


def test_the_reasons():
    model, _ = adapted(Detached)
    idle = dorac.find_idle(model, X)
    assert idle.pop("proj") == "it was called, but no gradient reached its adapter"
    assert idle == {"list.0": "it was not called"}
    idle = dorac.find_idle(adapted(Both)[0], X)
    assert idle["proj"].startswith("it took part, but its weight is also read past its forward: Both.run, test_idle.py")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_a_module_that_is_tied_to_the_weight_reads_its_own():
    model = Tied()
    dorac.apply_dora(model, ["embed"], r=2)
    assert dorac.find_idle(model, torch.arange(5)) == {}


def test_weights_in_one_storage():
    model, _ = adapted(Holder, exclude_modules=["inner.proj"])
    both = torch.randn(8, 4)
    model.called.base_layer.weight.data, model.proj.base_layer.weight.data = both[:4], both[4:]
    model.run = lambda x: x @ model.proj.base_layer.weight[2:].t()
    idle = dorac.find_idle(model, X)
    assert idle.keys() == {"proj", "list.0"}
    assert idle["proj"].startswith("its weight is read past")


@dataclasses.dataclass
class Output:
    y: torch.Tensor
    kept: object = None


class Structured(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.kind = kind

    def forward(self, *, x):
        y, z = self.a(x), self.b(x)
        outputs = {
            "tuple": (y, [z, None, torch.arange(3)]),
            "dict": {"loss": y.mean(), "more": {"z": z}},
            "dataclass": Output(y, kept=(z,)),
        }
        return outputs[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_structures_of_outputs(kind):
    model = Structured(kind)
    dorac.apply_dora(model, "all-linear", r=2)
    assert dorac.find_idle(model, x=X) == {"c": "it was not called"}


class Stateful(nn.Module):
    """Changes whatever a forward in training mode may change."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x):
        self.replaced = self.replaced + random.random() + numpy.random.rand() + torch.rand(())
        return self.drop(self.norm(self.fc(x)))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_a_run_stays(training):
    model = Stateful().train(training)
    dorac.apply_dora(model, ["fc"], r=2, init_lora_weights=False, lora_dropout=0.3)
    model(X).sum().backward()
    buffer = model.replaced
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad and p.grad.clone() for name, p in model.named_parameters() if p.grad is None} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    x = X.clone().requires_grad_()
    assert dorac.find_idle(model, x) == {}
    assert x.grad is None
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(numpy.array_equal(a, b) for a, b in zip(states[2], numpy.random.get_state(), strict=True))
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == flags
    assert model.replaced is buffer
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, p in model.named_parameters():
        assert p.grad is None if gradients[name] is None else torch.equal(p.grad, gradients[name]), name
        assert not p._post_accumulate_grad_hooks
    model(X).sum().backward()  # and it still trains


def test_nothing_of_a_failed_run_stays():
    model, _ = adapted(Direct)
    with pytest.raises(ValueError, match="x must be"):
        dorac.find_idle(model, torch.ones(3, 5))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert model(X).requires_grad


def test_within_no_grad_and_inference_mode():
    model, _ = adapted(Direct)
    expected = dorac.find_idle(model, X)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert dorac.find_idle(model, X) == expected


def test_compiled_models_are_run_in_eager():
    expected = dorac.find_idle(adapted(Direct)[0], X)
    model, _ = adapted(Direct)
    assert dorac.find_idle(torch.compile(model, backend="eager", fullgraph=True), X) == expected
    model.compile(backend="eager", fullgraph=True)
    model(X)
    assert dorac.find_idle(model, X) == expected
    with torch.compiler.set_stance("fail_on_recompile"):
        model(X)  # the compiled one is still there


def test_cached_norms_are_kept():
    model, _ = adapted(Direct)
    with dorac.cache_norms(model) as cache:
        dorac.find_idle(model, X)
        cache.check()
        kept = model.called.kept.norm
        assert model.called._known_norm() is kept


def test_on_meta():
    with torch.device("meta"):
        model, _ = adapted(Direct)
        idle = dorac.find_idle(model, torch.empty(3, 4))
    assert idle["proj"].startswith("its weight is read past its forward: Direct.run")


def test_frozen_adapters_are_left_out():
    model, _ = adapted(Direct)
    model.proj.requires_grad_(False)
    assert dorac.find_idle(model, X).keys() == {"inner.proj", "list.0"}


def test_what_cannot_be_run_is_refused(tmp_path):
    model, _ = adapted(Direct)
    model.run = lambda x: "text"
    with pytest.raises(TypeError, match=r"must return floating-point tensors, .* got str"):
        dorac.find_idle(model, X)
    dorac.merge(model)
    with pytest.raises(ValueError, match="called is merged"):
        dorac.find_idle(model, X)
    with pytest.raises(ValueError, match="holds no DoRA layer"):
        dorac.find_idle(nn.Linear(2, 2), X)


def test_sharded_models_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, _ = adapted(Direct)
        torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="called is sharded"):
            dorac.find_idle(model, X)
    finally:
        torch.distributed.destroy_process_group()


def test_inputs_of_other_kinds_are_no_weights():
    model, _ = adapted(Direct)
    dense, expected = model.forward, dorac.find_idle(model, X)
    model.forward = lambda x: dense(x.to_dense())
    assert dorac.find_idle(model, X.to_sparse()) == expected
    model.forward = lambda x: dense(x.a)
    assert dorac.find_idle(model, TwoTensor(X, X + 1)) == expected


def test_one_layer_is_a_model():
    assert dorac.find_idle(dorac.nn.DoraLinear(nn.Linear(4, 4), r=2), X) == {}


def trained(cls):
    """A model whose adapters have seen an optimizer's step."""
    model, _ = adapted(cls, init_lora_weights=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("cls", [Direct, Helper])
def test_saving_warns_of_adapters_that_were_never_trained(cls, tmp_path):
    model = trained(cls)
    with pytest.warns(RuntimeWarning, match="adapters of proj, inner.proj, list.0 have a factor of zeros") as caught:
        dorac.save_adapter(model, tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
    for name in ("inner.proj", "list.0"):
        model.get_submodule(name).requires_grad_(False)  # on purpose
    with pytest.warns(RuntimeWarning, match="adapters of proj have"):
        dorac.save_adapter(model, tmp_path)


def test_saving_is_quiet_where_all_or_none_were_trained(tmp_path):
    model, _ = adapted(Helper, init_lora_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dorac.save_adapter(model, tmp_path)
        dorac.save_adapter(trained(Tied2), tmp_path)


class Tied2(nn.Module):
    """Of two kinds of layers, with different factors that start at zero."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.table = nn.Embedding(3, 4)

    def forward(self, x):
        return self.fc(x) + self.table(torch.zeros(3, dtype=torch.int64))


def test_merging_warns_of_weights_read_past_their_forward():
    model, _ = adapted(Direct)
    before = model(X)
    with pytest.warns(RuntimeWarning, match=r"merging changes what it computes.*\n  proj \(in Direct") as caught:
        dorac.merge(model)
    assert [warning.filename for warning in caught] == [__file__]
    assert not torch.allclose(model(X), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dorac.merge(adapted(Metadata)[0])


def test_loading_warns_as_wrapping_does(tmp_path):
    model, _ = adapted(Direct)
    dorac.save_adapter(model, tmp_path)
    with pytest.warns(RuntimeWarning, match="can be read past their forward") as caught:
        dorac.load_adapter(Direct(), tmp_path)
    assert [warning.filename for warning in caught] == [__file__]


def transformers_models():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    mamba = transformers.MambaConfig(**small, state_size=4)
    # 5.0 calls it where there are no kernels; later releases multiply with its weight.
    called = hasattr(transformers.models.mamba.modeling_mamba.MambaMixer, "slow_forward")
    bloom = {"vocab_size": 32, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    t5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    llama = transformers.LlamaConfig(**small, **heads)
    return {
        "mamba": (mamba, {"x_proj", "dt_proj", "out_proj"}, set() if called else {"dt_proj"}),
        "bloom": (transformers.BloomConfig(**bloom), {"dense", "dense_4h_to_h"}, set()),
        "bloom, its products sliced": (
            transformers.BloomConfig(**bloom, pretraining_tp=2, slow_but_exact=True),
            {"dense", "dense_4h_to_h"},
            {"dense", "dense_4h_to_h"},
        ),
        "llama": (llama, set(), set()),
        "t5": (transformers.T5Config(**t5, decoder_start_token_id=0), set(), set()),
        "gpt2": (transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2), set(), set()),
    }


@pytest.mark.parametrize("name", ["mamba", "bloom", "bloom, its products sliced", "llama", "t5", "gpt2"])
def test_transformers_models(name):
    """Which modules the source names, and which of those a run finds idle (on the CPU, where Mamba has no kernels)."""
    transformers = pytest.importorskip("transformers")
    config, named, idle = transformers_models()[name]
    auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = dorac.apply_dora(model, "all-linear", r=2, init_lora_weights=False)
    lines = [line for w in caught if "past their forward" in str(w.message) for line in str(w.message).splitlines()[1:]]
    assert {line.split(" (in ")[0].rpartition(".")[2] for line in lines} == named
    tokens = torch.arange(6).reshape(2, 3)
    inputs = {"input_ids": tokens} | ({"labels": tokens} if name == "t5" else {})
    found = dorac.find_idle(model, **inputs)
    assert {key.rpartition(".")[2] for key in found} == idle
    assert all("its weight is read past its forward" in reason for reason in found.values())
    assert found.keys() <= {*names}

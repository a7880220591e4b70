"""``dorac.nn`` over models that accelerate offloads, before they are adapted or after: the un-offloaded numbers."""

import copy
import gc
import re
import tempfile
import warnings
import weakref

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules  # noqa: E402
from injected import raised_at_every_line  # noqa: E402
from offloading import (  # noqa: E402
    NAMES,
    TOKENS,
    WAYS,
    Net,
    adapter,
    assert_same_adapters,
    draw,
    failing_at,
    on_meta,
    train,
    unchanged,
)
from test_norm_cache import computed_norms  # noqa: E402
from test_readme import recipe  # noqa: E402

import dorac  # noqa: E402
from dorac.testing import quantised_layers as fake  # noqa: E402

SAMPLE = [way if way == "cpu_offload" else pytest.param(way, marks=pytest.mark.full) for way in WAYS]


def adapted(model, **options):
    dorac.apply_dora(model, NAMES, r=2, lora_alpha=3, **options)
    draw(adapter(model))
    return model


def pair(way, *, first="dispatch", **options):
    """An offloaded adapted model and the same one that is not."""
    reference = adapted(Net(), **options)
    if first == "dispatch":
        return adapted(WAYS[way](Net()), **options), reference
    return WAYS[way](copy.deepcopy(reference)), reference


# --- outputs and training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"lora_dropout": 0.3}, marks=pytest.mark.full),
        pytest.param({"lora_dropout": 0.3, "dropout_on": "low_rank"}, marks=pytest.mark.full),
        pytest.param({"norm_grad": True}, marks=pytest.mark.full),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_a_dispatched_model_trains_as_one_that_is_not(way, options):
    model, reference = pair(way, **options)
    offloaded = on_meta(model)
    assert "up.base_layer.weight" in offloaded
    assert not adapter(model).keys() & set(offloaded)
    fresh = WAYS[way](Net())
    dorac.apply_dora(fresh, NAMES, r=2)
    fresh.eval()
    assert torch.equal(fresh(TOKENS), Net()(TOKENS))  # g = 1 at the start
    assert torch.equal(model.eval()(TOKENS), reference.eval()(TOKENS))
    assert train(model.train()) == train(reference.train())
    assert_same_adapters(model, reference)
    assert on_meta(model) == offloaded


@pytest.mark.parametrize("way", WAYS)
def test_adapted_then_dispatched(way):
    """The adapter is offloaded, too: it computes, and does not train, since gradients would be those of copies."""
    model, reference = pair(way, first="adapt")
    assert "up.lora_A" in on_meta(model)
    model.eval()
    assert torch.equal(model(TOKENS), reference.eval()(TOKENS))
    with (
        unchanged(model),
        pytest.raises(RuntimeError, match=r"^\w+: the adapter is offloaded .* dispatch the model first"),
    ):
        model.train()(TOKENS)
    with torch.no_grad():
        assert torch.equal(model.train()(TOKENS), reference(TOKENS))
    remove_hook_from_submodules(model)
    assert train(model.train()) == train(reference.train())
    taken_off = WAYS[way](Net())
    remove_hook_from_submodules(taken_off)  # leaves forwards on the modules
    assert torch.equal(adapted(taken_off)(TOKENS), adapted(Net())(TOKENS))


def test_hooks_that_move_inputs_only():
    """As ``device_map="auto"`` puts them over several GPUs: nothing is offloaded, and both hooks of a layer run."""
    model, moved = Net(), []

    class Hook(AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(module)
            return super().pre_forward(module, *args, **kwargs)

    for name in NAMES:
        add_hook_to_module(model.get_submodule(name), Hook("cpu", io_same_device=True))
    reference = adapted(Net())
    adapted(model)
    assert torch.equal(model(TOKENS), reference(TOKENS))
    assert moved == [model.get_submodule(name).base_layer for name in NAMES]
    assert train(model) == train(reference)
    dorac.merge(model)
    dorac.merge(reference)
    assert torch.equal(model(TOKENS), reference(TOKENS))


def quantised(hook):
    torch.manual_seed(0)
    plain, layer = nn.Linear(64, 32), fake.Linear4bit(64, 32, dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    layer.to("cpu")
    if hook is not None:
        add_hook_to_module(layer, hook)
    return nn.Sequential(layer)


def test_quantised_layers():
    """Hooks that move inputs are what they have over several GPUs; offloaded ones are refused."""
    models, x = [quantised(AlignDevicesHook("cpu", io_same_device=True)), quantised(None)], torch.randn(3, 64)
    for model in models:
        dorac.apply_dora(model, ["0"], r=2, lora_dropout=0.3)
        draw(adapter(model))
        torch.manual_seed(3)
        model(x).square().sum().backward()
        dorac.cache_norms(model)
    assert torch.equal(models[0].eval()(x), models[1].eval()(x))
    assert_same_adapters(*models)
    for change in (dorac.merge, dorac.unmerge):
        for model in models:
            change(model)
        assert torch.equal(*(model(x) for model in models))
    offloaded = quantised(AlignDevicesHook("cpu", offload=True, weights_map={"bias": torch.zeros(32)}))
    with pytest.raises(
        ValueError, match=r"\n  0: Linear4bit is quantised and offloaded by accelerate: give it a place"
    ):
        dorac.apply_dora(offloaded, ["0"])


def test_a_forward_that_raises_leaves_the_weights_away():
    model, _ = pair("cpu_offload")
    with unchanged(model), pytest.raises(ValueError, match=r"x must be \[\*, in\] with in = 6"):
        model.up(torch.ones(3, 5))


@pytest.mark.parametrize("way", SAMPLE)
def test_compiled(way):
    model, reference = pair(way)
    x = torch.randn(3, 6)
    compiled = torch.compile(nn.Sequential(model.up, nn.GELU()).eval(), backend="aot_eager")
    torch.testing.assert_close(compiled(x), nn.functional.gelu(reference.eval().up(x)))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model.up, backend="eager", fullgraph=True)(x)


def test_copies():
    model, reference = pair("cpu_offload")
    assert torch.equal(copy.deepcopy(model)(TOKENS), reference(TOKENS))


@pytest.mark.full
def test_experts():
    config = transformers.MixtralConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=7,
        num_local_experts=3,
    )

    def make():
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(config).eval()

    def with_adapter(model):
        dorac.apply_dora(model, ["experts", "q_proj"], r=2)
        draw(adapter(model))
        return model

    reference = with_adapter(make())
    model = with_adapter(accelerate.cpu_offload(make(), "cpu"))
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    dorac.cache_norms(model)
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    assert computed_norms(lambda: model(TOKENS)) == 0
    dorac.merge(model)
    dorac.merge(reference)
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    dorac.unmerge(reference)
    other = accelerate.cpu_offload(copy.deepcopy(reference), "cpu")
    assert torch.equal(other(TOKENS).logits, reference(TOKENS).logits)


# --- save, load, merge -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["dispatch", "adapt"])
@pytest.mark.parametrize("way", SAMPLE)
def test_save_and_load(way, first, tmp_path, brought_in):
    model, reference = pair(way, first=first)
    model.eval()
    for name, m in (("offloaded", model), ("reference", reference)):
        dorac.save_adapter(m, tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("offloaded", "reference")]
    assert files[0] == files[1]
    draw(adapter(reference), seed=5)
    dorac.save_adapter(reference, tmp_path / "other")
    if first == "adapt" and way != "cpu_offload":
        with unchanged(model), pytest.raises(ValueError, match=r"^\w+: it is offloaded to disk, where nothing is writ"):
            dorac.load_adapter(model, tmp_path / "other")
        return
    dorac.load_adapter(model, tmp_path / "other")
    assert torch.equal(model(TOKENS), reference(TOKENS))
    with unchanged(model), failing_at(dorac.nn.DoraLinear, "keep_norm", 2), pytest.raises(MemoryError):
        dorac.load_adapter(model, tmp_path / "reference")
    plain = WAYS[way](Net())
    dorac.load_adapter(plain, tmp_path / "other")
    assert torch.equal(plain.eval()(TOKENS), reference(TOKENS))


def test_modules_to_save(tmp_path, brought_in):
    reference = Net()
    dorac.apply_dora(reference, ["up"], r=2, modules_to_save=["down"])
    draw(adapter(reference))
    model = accelerate.cpu_offload(copy.deepcopy(reference), "cpu")
    dorac.save_adapter(model, tmp_path)
    dorac.load_adapter(model, tmp_path)
    other = Net(seed=3)
    dorac.load_adapter(other, tmp_path)
    assert torch.equal(other.down.weight, reference.down.weight)


@pytest.mark.parametrize("first", ["dispatch", "adapt"])
@pytest.mark.parametrize("way", WAYS)
def test_merge_unmerge_unload(way, first, brought_in):
    model, reference = pair(way, first=first)
    model.eval()
    if way != "cpu_offload":
        with unchanged(model), pytest.raises(ValueError, match=r"^\w+: it is offloaded to disk.*remove_hook_from_sub"):
            dorac.merge(model)
        return
    for unload in (False, True):
        dorac.merge(model, unload=unload)
        dorac.merge(reference, unload=unload)
        assert torch.equal(model(TOKENS), reference(TOKENS))
        if not unload:
            assert "up.base_layer.weight" in on_meta(model)
            dorac.unmerge(model)
            dorac.unmerge(reference)
            assert torch.equal(model(TOKENS), reference(TOKENS))
    assert type(model.up) is nn.Linear
    assert model.up.weight.is_meta
    remove_hook_from_submodules(model)
    assert torch.equal(model.up.weight, reference.up.weight)


def test_merged_then_dispatched_to_disk():
    model = adapted(Net())
    dorac.merge(model)
    expected = model(TOKENS)
    WAYS["disk_offload"](model)
    assert torch.equal(model(TOKENS), expected)
    with unchanged(model), pytest.raises(ValueError, match="it is offloaded to disk"):
        dorac.unmerge(model)


@pytest.mark.parametrize("first", ["dispatch", "adapt"])
def test_a_merge_that_fails_midway(first, brought_in):
    model, _ = pair("cpu_offload", first=first)
    model.eval()
    with unchanged(model), failing_at(dorac.nn.DoraConv1d, "write_part", 1), pytest.raises(MemoryError):
        dorac.merge(model)
    dorac.merge(model)
    with unchanged(model), failing_at(dorac.nn.DoraConv1d, "write_part", 1), pytest.raises(MemoryError):
        dorac.unmerge(model)


@pytest.mark.full
@pytest.mark.parametrize("first", ["dispatch", "adapt"])
def test_a_merge_that_fails_anywhere(first):
    files = ("dorac/merging", "dorac/wrapped", "dorac/nn/merging", "dorac/functional/merge")
    model, _ = pair("cpu_offload", first=first)
    model.eval()
    check = unchanged(model)
    check.__enter__()
    for _ in raised_at_every_line(lambda: dorac.merge(model), files, step=7):
        check.__exit__(None, None, None)
        check = unchanged(model)
        check.__enter__()
    assert model.up.merged


def test_tied_weights_are_found():
    """accelerate's copies of a tied weight are parameters of their own while they are there."""
    model = Net()
    model.tail = nn.Linear(6, 7, bias=False)
    model.tail.weight = model.embed.weight
    accelerate.cpu_offload(model, "cpu")
    dorac.apply_dora(model, ["embed"], r=2)
    model(TOKENS)
    with unchanged(model), pytest.raises(ValueError, match=r"embed\.base_layer\.weight is tied to tail\.weight"):
        dorac.merge(model)


# --- kept norms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["dispatch", "adapt"])
def test_kept_norms(first, brought_in):
    model, reference = pair("cpu_offload", first=first)
    for m in (model, reference):
        m.eval()
        dorac.cache_norms(m)
        m(TOKENS)
    assert computed_norms(lambda: model(TOKENS)) == 0
    assert torch.equal(model(TOKENS), reference(TOKENS))
    assert all(t is None or not t.is_meta for t in model.up.kept.of)
    assert model.up.kept.of[0] is None  # no weight that was brought in is held


def test_kept_norms_follow_the_optimizer(brought_in):
    model, reference = pair("cpu_offload")
    cache = dorac.cache_norms(model)
    dorac.cache_norms(reference)
    assert train(model, micro_batches=3) == train(reference, micro_batches=3)
    model(TOKENS)
    assert computed_norms(lambda: model(TOKENS)) == 0
    cache.check()
    model.up.lora_A.data.mul_(2)
    with pytest.raises(RuntimeError, match="the cached norm of up is stale"):
        cache.check()
    cache.refresh()
    reference.up.lora_A.data.mul_(2)
    assert torch.equal(model.eval()(TOKENS), reference.eval()(TOKENS))
    cache.check()


@pytest.mark.parametrize(
    "write",
    [
        lambda model: (dorac.merge(model), dorac.unmerge(model)),
        lambda model: setattr(model.up, "scaling", 0.25),
        lambda model: model.up.base_layer._hf_hook.weights_map["weight"].mul_(1.5),
        lambda model: [remove_hook_from_submodules(model), model.up.base_layer.weight.data.mul_(1.5), model.train()],
        lambda model: [remove_hook_from_submodules(model), accelerate.cpu_offload(model, "cpu")],
        lambda model: [remove_hook_from_submodules(model), accelerate.disk_offload(model, tempfile.mkdtemp(), "cpu")],
    ],
    ids=["merge and unmerge", "scaling", "a write on the host", "hooks off", "dispatched anew", "to disk"],
)
def test_no_stale_norm(write):
    model, _ = pair("cpu_offload")
    model.eval()
    cache = dorac.cache_norms(model)
    model(TOKENS)
    write(model)
    model.eval()
    y = model(TOKENS)
    cache.remove()
    assert torch.equal(y, model(TOKENS))


def test_weights_that_are_dispatched_are_not_kept_alive():
    model = adapted(Net()).eval()
    dorac.cache_norms(model)
    with torch.no_grad():
        expected = model(TOKENS)
    storages = [weakref.ref(model.get_submodule(name).base_layer.weight.untyped_storage()) for name in NAMES]
    WAYS["disk_offload"](model)
    assert torch.equal(model(TOKENS), expected)
    gc.collect()
    assert [storage() for storage in storages] == [None] * len(NAMES)


@pytest.mark.parametrize("way", ["disk_offload", "device_map"])
def test_norms_of_what_is_on_disk_are_refused(way):
    model, _ = pair(way)
    with unchanged(model), pytest.raises(ValueError, match=r"\n  up: it is offloaded to disk.*leave its norm to the"):
        dorac.cache_norms(model)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_state_dicts_for_an_offloaded_adapter():
    model, reference = pair("cpu_offload", first="adapt")
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of what it does not write
        with pytest.raises(ValueError, match=r"^embed: the adapter is offloaded by accelerate, and loading a"):
            model.load_state_dict(reference.state_dict())


def test_reset_parameters(brought_in):
    model, _ = pair("cpu_offload", first="adapt")
    model.eval()
    for name in NAMES:
        model.get_submodule(name).reset_parameters()
    assert torch.equal(model(TOKENS), Net()(TOKENS))


class Block(nn.Sequential):
    """accelerate is told to bring it in as a whole."""


@pytest.mark.parametrize(
    "call",
    [
        lambda m, _: dorac.merge(m),
        lambda m, directory: dorac.save_adapter(m, directory),
        lambda m, directory: dorac.load_adapter(m, directory),
    ],
    ids=["merge", "save", "load"],
)
def test_layers_that_come_in_with_an_outer_module(call, tmp_path):
    message = r"block\.up(:)? is offloaded as a part of block: leave Block out of preload_module_classes"

    def model():
        net = Net()
        net.block = Block()
        net.block.up = net.up
        net.up = nn.Identity()
        net.forward = lambda tokens: net.block(net.embed(tokens))
        return net

    late = accelerate.cpu_offload(model(), "cpu", preload_module_classes=["Block"])
    with pytest.raises(ValueError, match=message):
        dorac.apply_dora(late, ["block.up"])
    early = model()
    dorac.apply_dora(early, ["block.up"], r=2)
    draw(adapter(early))
    dorac.save_adapter(early, tmp_path)
    expected = early(TOKENS)
    accelerate.cpu_offload(early.eval(), "cpu", preload_module_classes=["Block"])
    assert torch.equal(early(TOKENS), expected)
    with pytest.raises(ValueError, match=message):
        call(early, tmp_path)


def test_the_adapted_layer_as_a_whole():
    """accelerate's own way for layers that read what they hold."""
    model = adapted(Net()).eval()
    expected = model(TOKENS)
    accelerate.cpu_offload(model, "cpu", preload_module_classes=["DoraLinear", "DoraEmbedding", "DoraConv1d"])
    assert torch.equal(model(TOKENS), expected)
    dorac.merge(model)
    torch.testing.assert_close(model(TOKENS), expected)


# --- big models ------------------------------------------------------------------------------------------------------

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 7}
PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


def llama(directory):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    model.save_pretrained(directory)
    return model


def from_pretrained(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, device_map=PLACES, offload_folder=tempfile.mkdtemp()
    )


def checkpoint_and_dispatch(directory):
    with accelerate.init_empty_weights():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.tie_weights()
    return accelerate.load_checkpoint_and_dispatch(model, directory, PLACES, offload_folder=tempfile.mkdtemp())


LOADED = {"from_pretrained": from_pretrained, "load_checkpoint_and_dispatch": checkpoint_and_dispatch}


@pytest.mark.parametrize(
    "how", ["from_pretrained", pytest.param("load_checkpoint_and_dispatch", marks=pytest.mark.full)]
)
def test_loaded_with_a_device_map(how, tmp_path):
    reference = llama(tmp_path / "model")
    model = LOADED[how](tmp_path / "model")
    for m in (model, reference):
        dorac.apply_dora(m, "all-linear", r=2)
        draw(adapter(m))
    assert len(on_meta(model)) == 9
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)

    def losses(m):
        optimizer = torch.optim.AdamW(adapter(m).values(), lr=1e-2)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = m(TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(model) == losses(reference)
    assert_same_adapters(model, reference)
    dorac.save_adapter(model, tmp_path / "adapter")
    again = LOADED[how](tmp_path / "model")
    dorac.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(TOKENS).logits, reference(TOKENS).logits)
    assert dorac.find_idle(again, TOKENS) == {}


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"name": tmp_path / "model", "dorac": dorac}
    plain = llama(names["name"])
    exec(recipe("Offloaded models"), names)
    assert torch.equal(names["model"](TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.full
def test_device_map_auto_where_memory_is_short(tmp_path):
    reference = llama(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": 16000}, offload_folder=tmp_path / "folder"
    )
    assert {*map(str, model.hf_device_map.values())} == {"cpu", "disk"}
    for m in (model, reference):
        dorac.apply_dora(m, "all-linear", r=2)
        draw(adapter(m))
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)


def test_no_values_yet(tmp_path):
    """On meta without a hook nothing is offloaded: the weights are yet to be loaded."""
    for made_on in (torch.device("meta"), accelerate.init_empty_weights()):
        with made_on:
            model = Net()
        dorac.apply_dora(model, NAMES)
        with pytest.raises(ValueError, match=re.escape("is on meta and has no values: load the base weights")):
            dorac.save_adapter(model, tmp_path)


# --- named adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", SAMPLE)
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_named_adapters(way, cached, tmp_path):
    """Beside an offloaded base they are those of one that is not; files by name, and norms for each where they can."""
    if cached and way != "cpu_offload":
        pytest.skip("no norm of what lies on disk is kept")
    model, reference = pair(way)
    if cached:
        dorac.cache_norms(model)
    for m in (model, reference):
        dorac.add_adapter(m, "b", r=3)
        dorac.set_adapter(m, "b")
        m.eval()
        assert torch.equal(m(TOKENS), Net().eval()(TOKENS))
        draw(adapter(m), seed=5)
        dorac.save_adapter(m, tmp_path / str(m is model), adapter_name="default")
        dorac.load_adapter(m, tmp_path / str(m is model), adapter_name="c")
    for name in ("default", "b", "c", "b", "default"):
        dorac.set_adapter(model, name)
        dorac.set_adapter(reference, name)
        assert torch.equal(model(TOKENS), reference(TOKENS))
        assert train(model.train()) == train(reference.train())
        model.eval(), reference.eval()
    assert not adapter(model).keys() & set(on_meta(model))


@pytest.mark.parametrize("way", SAMPLE)
def test_an_offloaded_adapter_takes_no_other(way):
    model, _ = pair(way, first="adapt")
    with unchanged(model), pytest.raises(ValueError, match=r"^\w+: its adapter is offloaded by accelerate: dispatch"):
        dorac.add_adapter(model, "b")

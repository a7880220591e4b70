"""``dorac.cache_norms`` under the tools that write to parameters: the outputs are those of the model without a cache.

Each tool is run in the library where that is installed, and in a few lines that write in the same way.
"""

import contextlib
import copy
import gc
import pickle
import sys
import threading
import warnings

import pytest
import torch
from processes import run as run_in_processes
from test_norm_cache import IN, adapted, assert_fresh, computed_norms, layers, trained
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

import dorac
from dorac.nn import compiled_norm, norm_cache
from dorac.ops import front


class ScheduleFree(torch.optim.Optimizer):
    """SGD on z, an average x of it for evaluation, and a point y between the two for training (arXiv 2405.15682)."""

    def __init__(self, params, lr, through_data=False):
        super().__init__(params, {"lr": lr, "train_mode": False, "k": 0})
        self.through_data = through_data

    def _move(self, to_train):
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] != to_train else ():
                if z := self.state[p].get("z"):
                    target = p.data if self.through_data else p
                    target.lerp_(z[0], 0.1 if to_train else 1 - 1 / 0.9)
            group["train_mode"] = to_train

    @torch.no_grad()
    def train(self):
        self._move(True)

    @torch.no_grad()
    def eval(self):
        self._move(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", [p.clone()])[0]
                target = p.data if self.through_data else p
                target.lerp_(z, 1 / group["k"])
                target.add_(p.grad, alpha=group["lr"] * (0.9 * (1 - 1 / group["k"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class OptimizerAround:
    """Steps another optimizer at another point and comes back, as ``schedulefree.ScheduleFreeWrapper``."""

    def __init__(self, base):
        self.base = base
        self.slow = {p: p.detach().clone() for group in base.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self):
        for p, slow in self.slow.items():
            p.lerp_(slow, 0.3)
        self.base.step()
        for p, slow in self.slow.items():
            slow.lerp_(p, 0.5)
            p.lerp_(slow, 0.7)

    def zero_grad(self):
        self.base.zero_grad()


class SharpnessAware:
    """Perturbs the parameters between two passes, without a step of an optimizer (arXiv 2010.01412)."""

    def __init__(self, base):
        self.base = base
        self.params = [p for group in base.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self):
        self.old = [p.clone() for p in self.params]
        for p in self.params:
            p.add_(p.grad, alpha=0.1)
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, old in zip(self.params, self.old, strict=True):
            p.data = old
        self.base.step()
        self.base.zero_grad()


class Average:
    """An exponential moving average that is swapped in for evaluation, as torch_ema's and diffusers'."""

    def __init__(self, parameters, decay=0.5):
        self.parameters, self.decay = list(parameters), decay
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self):
        for shadow, p in zip(self.shadow, self.parameters, strict=True):
            shadow.lerp_(p, 1 - self.decay)

    def store(self):
        self.stored = [p.detach().clone() for p in self.parameters]

    def _write(self, values):
        for p, value in zip(self.parameters, values, strict=True):
            p.data.copy_(value)

    def copy_to(self):
        self._write(self.shadow)

    def restore(self):
        self._write(self.stored)

    @contextlib.contextmanager
    def average_parameters(self):
        self.store()
        self.copy_to()
        try:
            yield
        finally:
            self.restore()


class FlatMaster:
    """Steps one flat copy of all parameters and copies it to them, as DeepSpeed's and Megatron's optimizers."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.flat = torch.cat([p.detach().flatten() for p in self.parameters]).requires_grad_()
        self.base = torch.optim.AdamW([self.flat], lr=1e-2)

    def step(self):
        self.flat.grad = torch.cat([p.grad.flatten() for p in self.parameters])
        self.base.step()
        for p, part in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters]), strict=True):
            p.data.copy_(part.detach().view_as(p))

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def real_schedule_free(parameters):
    return pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=1e-2)


def real_schedule_free_around(parameters):
    base = torch.optim.SGD(parameters, lr=0.1)
    return pytest.importorskip("schedulefree").ScheduleFreeWrapper(base, momentum=0.9)


def real_average(parameters):
    return pytest.importorskip("torch_ema").ExponentialMovingAverage(list(parameters), decay=0.5)


SCHEDULE_FREE = {
    "schedule_free": lambda p: ScheduleFree(p, lr=0.1),
    "schedule_free_data": lambda p: ScheduleFree(p, lr=0.1, through_data=True),
    "real_schedule_free": real_schedule_free,
}
AVERAGES = {"average": Average, "real_average": real_average}


class Run:
    """The model with a cache, in eager or compiled, beside what it computes without one."""

    def __init__(self, compiled):
        self.model = adapted()
        self.cache = dorac.cache_norms(self.model)
        self.counter = CompileCounterWithBackend("aot_eager")
        self.forward = torch.compile(self.model, fullgraph=True, backend=self.counter) if compiled else self.model
        self.outputs = []

    def loss(self):
        x = torch.randn(6, IN)
        loss = self.forward(x).square().mean()
        assert torch.equal(loss, copy.deepcopy(self.model)(x).square().mean())
        return loss

    def step(self, optimizer):
        optimizer.zero_grad()
        self.loss().backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate(self):
        x = torch.randn(6, IN, generator=torch.Generator().manual_seed(3))
        for _ in range(2):
            assert torch.equal(self.forward(x), copy.deepcopy(self.model)(x))
        self.outputs.append(self.forward(x))
        assert all(not torch.equal(self.outputs[-1], before) for before in self.outputs[:-1])  # the test is none else


pytestmark = pytest.mark.filterwarnings("error:the parameters of:UserWarning")  # where no test asks for it
compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@compiled
@pytest.mark.parametrize("order", ["optimizer_first", "model_first", "optimizer_alone"])
@pytest.mark.parametrize("tool", SCHEDULE_FREE)
def test_schedule_free(tool, order, compiled):
    run = Run(compiled)
    optimizer = SCHEDULE_FREE[tool](trained(run.model))
    flips = {"optimizer_first": [optimizer, run.model], "model_first": [run.model, optimizer]}.get(order, [optimizer])
    for _ in range(3):
        for flipped in flips:
            flipped.train()
        run.step(optimizer)
        run.step(optimizer)
        for flipped in flips:
            flipped.eval()
        run.evaluate()
    # Cached and own norm in training, own norm in evaluation.
    assert run.counter.frame_count <= 3


def test_schedule_free_optimizers_are_copied_as_ever():
    run = Run(compiled=False)
    optimizer = ScheduleFree(trained(run.model), lr=0.1)
    optimizer.train()
    run.step(optimizer)
    before = vars(optimizer)["train"]
    run.step(optimizer)
    assert vars(optimizer)["train"] is before  # wrapped once
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert "train" not in vars(twin)


@pytest.mark.parametrize("tool", ["around", "real_around"])
def test_an_optimizer_around_the_optimizer(tool):
    run = Run(compiled=False)
    base = torch.optim.AdamW(trained(run.model), lr=1e-2)
    optimizer = OptimizerAround(base) if tool == "around" else real_schedule_free_around(trained(run.model))
    for _ in range(3):
        getattr(optimizer, "train", lambda: None)()
        run.step(optimizer)
    assert computed_norms(lambda: run.model(torch.randn(3, IN))) == 2
    assert_fresh(run.model)


@pytest.mark.parametrize("tool", ["around", "real_around"])
def test_an_optimizer_around_the_optimizer_compiled(tool):
    """No step is taken of a stale norm: what is written before the inner step tells of what will be written after."""
    run = Run(compiled=True)
    base = torch.optim.AdamW(trained(run.model), lr=1e-2)
    optimizer = OptimizerAround(base) if tool == "around" else real_schedule_free_around(trained(run.model))
    getattr(optimizer, "train", lambda: None)()
    with pytest.warns(UserWarning, match="of 2 DoRA layers were written to between two steps"):
        run.step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            run.step(optimizer)
    assert run.counter.frame_count == 2
    run.cache.refresh()
    run.loss()
    assert run.counter.frame_count == 2


def test_sharpness_aware():
    def steps(run, n):
        for _ in range(n):
            run.loss().backward()
            optimizer.first_step()
            run.loss().backward()
            optimizer.second_step()

    run = Run(compiled=False)
    optimizer = SharpnessAware(torch.optim.SGD(trained(run.model), lr=0.1))
    steps(run, 3)
    run = Run(compiled=True)
    optimizer = SharpnessAware(torch.optim.SGD(trained(run.model), lr=0.1))
    run.forward(torch.randn(6, IN)).sum().backward()
    optimizer.first_step()
    run.forward(torch.randn(6, IN)).sum().backward()  # of a stale norm
    with pytest.warns(UserWarning, match="Compiled code may have used a stale norm"):
        optimizer.second_step()
    steps(run, 3)
    assert run.counter.frame_count == 2


@compiled
@pytest.mark.parametrize("order", ["flip_outside", "flip_inside"])
@pytest.mark.parametrize("tool", AVERAGES)
def test_averages(tool, order, compiled):
    run = Run(compiled)
    optimizer = torch.optim.AdamW(trained(run.model), lr=1e-2, fused=True)
    average = AVERAGES[tool](trained(run.model))
    for _ in range(3):
        for _ in range(2):
            run.step(optimizer)
            average.update()
        if order == "flip_outside":
            run.model.eval()
            with average.average_parameters():
                run.evaluate()
            run.model.train()
        else:
            with average.average_parameters():
                run.model.eval()
                run.evaluate()
                run.model.train()
    assert run.counter.frame_count <= 3


@pytest.mark.parametrize("tool", AVERAGES)
def test_averages_without_a_flip(tool):
    """In eager the change of the grad mode tells of an evaluation."""
    run = Run(compiled=False)
    optimizer = torch.optim.AdamW(trained(run.model), lr=1e-2)
    average = AVERAGES[tool](trained(run.model))
    for _ in range(3):
        for _ in range(2):
            run.step(optimizer)
            average.update()
        with average.average_parameters():
            run.evaluate()


@compiled
def test_optimizers_of_copies(compiled):
    run = Run(compiled)
    optimizer = FlatMaster(trained(run.model))
    run.step(optimizer)
    for _ in range(3):
        run.step(optimizer)
        run.evaluate()
    assert run.counter.frame_count <= 3  # training with the cached norm before the first step, without, evaluation


def test_optimizers_of_something_else():
    """A latent that is fitted through a frozen adapter costs no norms, nor does another model's optimizer."""
    model = adapted()
    dorac.cache_norms(model)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    other.step()
    model.requires_grad_(False)
    latent = torch.randn(3, IN, requires_grad=True)
    optimizer = torch.optim.SGD([latent], lr=0.1)
    model(latent).sum().backward()
    optimizer.step()
    assert computed_norms(lambda: model(latent)) == 0


# --- writes of all kinds, eager ---------------------------------------------------------------------------------------


def in_place(p):
    with torch.no_grad():
        p.add_(0.1)


def swapped(p):
    torch.utils.swap_tensors(p, nn.Parameter(torch.randn_like(p), p.requires_grad))


def replaced(p):
    p.data = torch.randn_like(p)


def another_part(p):
    p.data = p.data.as_strided(p.shape, (1,) * p.ndim)


def another_place(p):
    rows = p.data[:-1]
    p.data = p.data[1:2].expand(p.shape)
    assert rows.untyped_storage() is p.untyped_storage()


def out_of_place_kernel(p):
    torch._foreach_copy_([p.detach()], [torch.randn_like(p)])  # as DDP's and FSDP's broadcasts


@pytest.mark.parametrize("write", [in_place, swapped, replaced, another_part, another_place, out_of_place_kernel])
@pytest.mark.parametrize("name", ["lora_A", "lora_B", "base_layer.weight"])
def test_a_write_is_seen_by_the_next_forward(write, name):
    model, x = adapted(), torch.randn(5, IN)
    dorac.cache_norms(model)
    model(x)
    before = model.up.kept.norm.clone()
    write(model.up.get_parameter(name))
    torch.testing.assert_close(model(x), copy.deepcopy(model)(x))  # which has other strides
    assert not torch.equal(model.up.kept.norm, before)
    assert computed_norms(lambda: model(x)) == 0  # taken once


def test_another_storage_at_the_same_address():
    """As an allocator gives one to an update that assigns ``.data`` twice."""
    model, x = adapted(), torch.randn(5, IN)
    dorac.cache_norms(model)
    p = model.up.lora_B
    memory = bytearray(p.numel() * 4)

    def assign(values):
        p.data = torch.frombuffer(memory, dtype=torch.float32).view(p.shape)
        torch.frombuffer(memory, dtype=torch.float32).copy_(values.flatten())

    assign(torch.randn(p.shape))
    model(x)
    address, version = p.data_ptr(), p._version
    assign(torch.randn(p.shape))
    assert (p.data_ptr(), p._version) == (address, version)
    assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_inference_tensors():
    """They have no version."""
    with torch.inference_mode():
        model = adapted()
        dorac.cache_norms(model)
        x = torch.randn(5, IN)
        assert torch.equal(model(x), copy.deepcopy(model)(x))
        model.eval()
        model.up.lora_B.add_(0.1)
        assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_a_base_weight_that_was_trained_for_a_while():
    model, x = adapted(), torch.randn(5, IN)
    dorac.cache_norms(model)
    weight = model.up.base_layer.weight.requires_grad_()
    model(x).sum().backward()
    torch.optim.SGD([weight], lr=0.1, fused=True).step()
    weight.requires_grad_(False)
    assert_fresh(model)


def test_what_a_graph_holds_stays():
    """A norm is taken anew between a forward and its backward, and has the same bits."""
    model, x = adapted(), torch.randn(5, IN)
    plain = copy.deepcopy(model)
    dorac.cache_norms(model)
    for net in (model, plain):
        loss = net(x).square().sum()
        net.eval()
        with torch.no_grad():
            net(x)
        net.train()
        net(x).square().sum().backward()
        loss.backward()
    for mine, other in zip(trained(model), trained(plain), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_in_doubt_under_a_transform_or_a_capture(monkeypatch):
    """What these compute is not to be kept: forward takes its own norm, and the next one outside of them keeps it."""
    model, x = adapted(), torch.randn(5, IN)
    dorac.cache_norms(model)
    model.eval()
    for p in trained(model):
        p.data.mul_(1.1)
    expected = copy.deepcopy(model)(x)
    before = [layer.kept.norm.clone() for layer in layers(model)]
    torch.testing.assert_close(torch.func.vmap(model)(x), expected)
    with monkeypatch.context() as capture:
        capture.setattr(front, "capturing", lambda: True)
        assert torch.equal(model(x), expected)
    assert all(torch.equal(layer.kept.norm, norm) for layer, norm in zip(layers(model), before, strict=True))
    assert torch.equal(model(x), expected)
    assert_fresh(model)


def test_functional_calls_in_doubt_keep_nothing():
    model, x = adapted(), torch.randn(5, IN)
    dorac.cache_norms(model)
    model.eval()
    others = {name: p.detach() * 1.1 for name, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, others, (x,)), torch.func.functional_call(model, others, (x,)))
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert_fresh(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_no_other_phase(reentrant):
    """A reentrant checkpoint runs without gradients, and again with them within backward."""
    model, x = adapted(), torch.randn(5, IN, requires_grad=True)
    dorac.cache_norms(model)

    def run():
        for _ in range(3):
            checkpoint(model, x, use_reentrant=reentrant).sum().backward()

    assert computed_norms(run) == 0
    assert front.in_backward() is False


def test_checkpointed_blocks_compiled_beside_an_eager_layer():
    """The eager layer must not bring the norms of blocks back between their forward and its repetition."""
    model, head, x = adapted(), adapted(), torch.randn(5, IN, requires_grad=True)
    both = nn.ModuleList([model, head])
    dorac.cache_norms(both)
    model.compile(fullgraph=True, backend="aot_eager")
    both.eval()
    both.train()
    head(checkpoint(model, x, use_reentrant=False)).sum().backward()
    assert layers(model)[0].kept.in_doubt
    assert not layers(head)[0].kept.in_doubt


def test_compiled_inference_uses_the_norms():
    """After a refresh, or with a cache that was made in eval mode: no norm in the graph, and one graph."""
    model, x = adapted(), torch.randn(5, IN)
    cache = dorac.cache_norms(model)
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    model.eval()
    cache.refresh()
    with torch.no_grad():
        assert computed_norms(lambda: forward(x)) == 0
        cache.remove()
        dorac.cache_norms(model)
        assert computed_norms(lambda: forward(x)) == 0
        assert counter.frame_count == 1


def test_no_recompilation_beyond_two_graphs_a_mode():
    run = Run(compiled=True)
    optimizer = torch.optim.AdamW(trained(run.model), lr=1e-2)

    def epoch():
        run.model.train()
        for _ in range(3):
            run.step(optimizer)
        run.model.eval()
        run.evaluate()
        run.cache.refresh()
        with torch.no_grad():
            run.loss()

    epoch()
    epoch()
    assert run.counter.frame_count == 4
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            epoch()


def test_blocks_share_a_graph():
    """The norms of blocks are inputs of one graph."""
    blocks = nn.ModuleList([adapted() for _ in range(3)])
    dorac.cache_norms(blocks)
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(5, IN)
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
        assert torch.equal(block(x), copy.deepcopy(block)(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
@pytest.mark.parametrize("place", ["present_norms", "_write", "_note", "torch._foreach_copy_"])
def test_a_refresh_that_is_interrupted(place, error, monkeypatch):
    """Forward takes its own norm until the next one."""
    model, x = adapted(), torch.randn(5, IN)
    cache = dorac.cache_norms(model)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    model(x).sum().backward()

    def interrupted(*args):
        raise error

    with monkeypatch.context() as fault:
        owner, _, name = place.rpartition(".")
        fault.setattr(torch if owner else norm_cache, name, interrupted)
        with pytest.raises(error):
            optimizer.step()
        assert torch.equal(model(x), copy.deepcopy(model)(x))
    optimizer.step()
    assert_fresh(model)
    cache.remove()
    with monkeypatch.context() as fault:
        fault.setattr(norm_cache, "_note", interrupted)
        with pytest.raises(error):
            dorac.cache_norms(model)
    assert set(norm_cache.keeping()).isdisjoint(layers(model))
    assert {layer.kept for layer in layers(model)} == {None}
    dorac.cache_norms(model)
    assert_fresh(model)


# --- DDP --------------------------------------------------------------------------------------------------------------


def ddp_worker(compiled, cache_first):
    torch.manual_seed(torch.distributed.get_rank())
    model = adapted()
    if cache_first:
        dorac.cache_norms(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    if not cache_first:
        dorac.cache_norms(ddp)
    assert not ddp.modules_buffers
    forward = torch.compile(ddp, backend="aot_eager") if compiled else ddp
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for _ in range(3):
        x = torch.randn(5, IN)
        y = forward(x)
        assert torch.equal(y, copy.deepcopy(model)(x))
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("cache_first", [pytest.param(False, marks=pytest.mark.full), True])
@compiled
def test_ddp(compiled, cache_first, tmp_path):
    """Rank 1 gets rank 0's parameters after its norms were taken, and no norm is broadcast."""
    run_in_processes(ddp_worker, tmp_path, "cpu", compiled, cache_first)


# --- lifetimes --------------------------------------------------------------------------------------------------------


def hooks() -> int:
    return len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)


def test_dropped_models_leave_no_hooks(no_other_caches):
    gc.collect()
    model = adapted()
    cache = dorac.cache_norms(model)
    one = hooks()
    for _ in range(50):
        dorac.cache_norms(adapted())
    gc.collect()
    assert hooks() == one
    assert len(norm_cache.kept_layers) == 2
    cache.remove()
    assert hooks() == one - 2


def test_norms_are_taken_in_the_order_of_the_model(no_other_caches, monkeypatch):
    """After a step, too, not in a set's order: ranks sum the norms of several layers in one collective."""
    model = nn.Sequential(*(adapted() for _ in range(16)))
    cache = dorac.cache_norms(model)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    model[0](torch.randn(2, IN)).sum().backward()
    taken = []
    monkeypatch.setattr(norm_cache, "take", lambda given, **options: taken.extend(given))
    optimizer.step()
    assert taken == layers(model)
    cache.remove()


def test_two_caches_of_one_optimizer():
    models = [adapted(), adapted()]
    caches = [dorac.cache_norms(model) for model in models]
    optimizer = torch.optim.SGD([*trained(models[0]), *trained(models[1])], lr=0.1)

    def step():
        for model in models:
            model(torch.randn(3, IN)).sum().backward()
        optimizer.step()

    step()
    for model in models:
        assert_fresh(model)
    caches[0].remove()
    caches[0].remove()
    step()
    assert layers(models[0])[0].kept is None
    assert_fresh(models[1])


def test_a_cache_survives_its_model_and_copies_of_it_are_empty():
    model = adapted()
    cache = dorac.cache_norms(model)
    for twin in (copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        twin.refresh()
        twin.check()
        twin.remove()
    assert_fresh(model)
    assert hooks()
    copied, copied_cache = copy.deepcopy((model, cache))
    assert layers(copied)[0]._known_norm() is None
    copied_cache.remove()
    assert_fresh(model)
    del model
    gc.collect()
    cache.refresh()
    cache.remove()


# --- other threads ----------------------------------------------------------------------------------------------------


def removing(cache, function):
    """``function``, during which another thread removes the cache."""

    def call(*args):
        cache.remove()
        return function(*args)

    return call


@pytest.mark.parametrize("written", [False, True], ids=["kept", "written to"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_removed_by_another_thread_within_a_forward(kind, written, monkeypatch):
    model = nn.Sequential(nn.Linear(IN, IN) if kind == "linear" else nn.Conv1d(IN, IN, 3))
    dorac.apply_dora(model, ["0"], r=3, init_lora_weights=False)
    (layer,), x = layers(model), torch.randn(5, IN, 7 if kind == "conv" else IN)
    cache = dorac.cache_norms(model)
    model(x)
    if written:
        with torch.no_grad():
            layer.lora_A.mul_(1.5)
    expected = copy.deepcopy(model)(x)
    monkeypatch.setattr(front, "exporting_module", removing(cache, front.exporting_module))
    assert torch.equal(model(x), expected)
    assert layer.kept is None
    monkeypatch.undo()
    cache = dorac.cache_norms(model)
    if written:
        with torch.no_grad():
            layer.lora_B.mul_(1.5)
    expected = copy.deepcopy(model)(x)
    vars(layer)["norm_inputs"] = removing(cache, layer.norm_inputs)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


def test_removed_by_another_thread_within_a_step(no_other_caches):
    """Whichever model the step comes to first, the other one's cache is removed then."""
    models = [adapted(), adapted()]
    caches = [dorac.cache_norms(model) for model in models]
    optimizers = [torch.optim.SGD(trained(model), lr=0.1) for model in models]
    x = torch.randn(3, IN)
    for model in models:
        model(x).sum().backward()
    for model, other in zip(models, reversed(caches), strict=True):
        for layer in layers(model):
            vars(layer)["norm_inputs"] = removing(other, layer.norm_inputs)
    for optimizer in optimizers:
        optimizer.step()
    for model in models:
        assert torch.equal(model(x), copy.deepcopy(model)(x))


def test_models_are_trained_and_caches_removed_in_threads(no_other_caches):
    errors = []

    def train():
        model, x = adapted(), torch.randn(3, IN)
        optimizer = torch.optim.SGD(trained(model), lr=0.01)
        cache = dorac.cache_norms(model)
        for _ in range(30):
            model(x).sum().backward()
            optimizer.step()
            cache.check()

    def start_and_remove():
        model = adapted()
        for _ in range(60):
            dorac.cache_norms(model).remove()

    def guarded(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=guarded, args=(work,)) for work in (train, train, start_and_remove)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


@pytest.mark.parametrize("change", ["remove", "doubt"])
def test_compiled_code_is_told_of_what_another_thread_changes_meanwhile(change, monkeypatch):
    """Between a look at what is kept and the telling of it: else compiled code went on with a norm that is none."""
    model = adapted()
    cache = dorac.cache_norms(model)
    layer = layers(model)[0]
    norm_cache.suspend([layer])
    look, changed = compiled_norm._now, []

    def looks_and_waits(keeper):
        seen = look(keeper)
        if not changed:
            changed.append(seen)
            thread = threading.Thread(target=cache.remove if change == "remove" else lambda: norm_cache.doubt([layer]))
            thread.start()
            thread.join()
        return seen

    monkeypatch.setattr(compiled_norm, "_now", looks_and_waits)
    norm_cache.refresh([layer])
    assert changed[0] is not None
    assert layer.compiled_norm is None

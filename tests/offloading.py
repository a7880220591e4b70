"""Small models that accelerate offloads, with the CPU as the device that computes: weights on meta between forwards."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import accelerate
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

NAMES = ["embed", "up", "mix", "filter", "down"]
TOKENS = torch.arange(20).view(2, 10) % 7


class Net(nn.Module):
    """One layer of each kind. The embedding is the part that some device maps leave where it is."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 9)
        self.mix = Conv1D(8, 9)
        self.filter = nn.Conv1d(8, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.down = nn.Linear(4, 5, bias=False)
        nn.init.normal_(self.mix.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(nn.functional.gelu(self.up(self.embed(tokens))))
        return self.down(self.norm(self.filter(h.mT).mT))


def _dispatched(model: nn.Module, prefix: str = "") -> nn.Module:
    places = {"embed": "cpu", "up": "disk", "mix": "disk", "filter": "cpu", "norm": "cpu", "down": "disk"}
    device_map = {prefix + name: place for name, place in places.items()}
    return accelerate.dispatch_model(model, device_map, offload_dir=tempfile.mkdtemp())


# Each puts a model's weights on meta. On the CPU a device map offloads what is on disk, and nothing else.
WAYS: dict[str, Callable[..., nn.Module]] = {
    "cpu_offload": lambda model, **_: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda model, **_: accelerate.disk_offload(model, tempfile.mkdtemp(), "cpu"),
    "device_map": _dispatched,
}


def draw(parameters: dict[str, Tensor], seed: int = 1) -> None:
    """Off the start: factors anew, magnitudes up to a fifth off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(parameters.items()):
            if "magnitude" in name:
                p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
            else:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def adapter(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def train(model: nn.Module, micro_batches: int = 1) -> list[float]:
    """The losses of three steps."""
    optimizer = torch.optim.AdamW(adapter(model).values(), lr=1e-2)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        for part in range(micro_batches):
            torch.manual_seed(7 * step + part)  # of dropout
            loss = (model(TOKENS) - 1).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def assert_same_adapters(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = adapter(model), adapter(reference)
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]), name
        assert torch.equal(p.grad, theirs[name].grad), name


def on_meta(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.is_meta]


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model computes after the block, bit for bit, what it did before, with the same modules, hooks and flags."""

    def state() -> list:
        names = {m: sorted(vars(m).keys() - {"keeper"}) for m in model.modules()}  # of norms that may yet be kept
        flags = [(n, id(m), names[m], getattr(m, "merged", None)) for n, m in model.named_modules()]
        return flags, [(name, p.is_meta, p.requires_grad) for name, p in model.named_parameters()]

    training = model.training
    model.eval()
    with torch.no_grad():
        before = model(TOKENS)
    model.train(training)
    then = state()
    yield
    model.train(training)
    assert state() == then
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS), before)
    model.train(training)


def failing_at(cls: type, method: str, call: int):
    """``cls.method`` raises at its n-th call, before it does anything."""
    stock, calls = getattr(cls, method), []

    def failing(self, *args, **kwargs):
        calls.append(method)
        if len(calls) == call:
            raise MemoryError("injected")
        return stock(self, *args, **kwargs)

    return mock.patch.object(cls, method, failing)

"""What compiled backwards make again: passes over what they keep of a layer anyway, and nothing else."""

from typing import ClassVar
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dorac
from dorac.ops import front, recompute
from dorac.testing import rms_error

TOKENS, WIDTH, HIDDEN, HEADS = 64, 32, 80, 4


class Gated(nn.Module):
    """A gated MLP: the activation and the product are one pass over what gate and up made."""

    sizes: ClassVar = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    # Of each layer its input (gate's and up's is one), what it made and its input times lora_A.
    kept: ClassVar = {(TOKENS, WIDTH): 2, (TOKENS, HIDDEN): 2}
    otherwise: ClassVar = {(TOKENS, WIDTH): 2, (TOKENS, HIDDEN): 3}

    def __init__(self):
        super().__init__()
        for name, size in self.sizes.items():
            setattr(self, name, nn.Linear(*size, bias=name == "up"))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(Gated):
    sizes: ClassVar = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    kept: ClassVar = {(TOKENS, WIDTH): 2, (TOKENS, HIDDEN): 1}
    otherwise: ClassVar = {(TOKENS, WIDTH): 2, (TOKENS, HIDDEN): 2}

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Rotated(Gated):
    """Rotated queries, which a product reads with those that are not."""

    sizes: ClassVar = {"q": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    kept: ClassVar = {(TOKENS, WIDTH): 2, (TOKENS, HIDDEN): 1}
    otherwise: ClassVar = {(TOKENS, WIDTH): 2, (TOKENS, HIDDEN): 2}

    def forward(self, x):
        q = self.q(x).view(TOKENS, HEADS, -1)
        angles = torch.arange(TOKENS, device=x.device, dtype=x.dtype)[:, None, None] / 9
        first, second = q.chunk(2, -1)
        return self.down((q * angles.cos() + torch.cat((-second, first), -1) * angles.sin()).reshape(TOKENS, HIDDEN))


class Residual(Gated):
    """What takes another input as large is kept, as the compiler would keep it: that input need not be."""

    sizes: ClassVar = {"up": (WIDTH, WIDTH), "down": (WIDTH, WIDTH)}
    kept: ClassVar = {(TOKENS, WIDTH): 4}
    otherwise = kept

    def forward(self, x):
        return self.down(x.sin() + self.up(x))


class Checkpointed(Plain):
    """A checkpoint's own choice stands."""

    kept: ClassVar = {(TOKENS, WIDTH): 1}
    otherwise = kept

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def adapted(kind, device):
    torch.manual_seed(0)
    model = kind().to(device)
    dorac.apply_dora(model, [*kind.sizes], r=4, init_lora_weights=False)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    dorac.cache_norms(model)
    return model


def step(model, x, run):
    """Values and gradients, and how many tensors of each shape as large as an input are kept in between."""
    counted = {}

    def count(tensor):
        if tensor.numel() >= TOKENS * WIDTH and TOKENS in tensor.shape:
            shape = (TOKENS, tensor.numel() // TOKENS)
            counted.setdefault(shape, {})[tensor.data_ptr()] = None
        return tensor

    as_on_cuda = mock.patch.object(front, "has_kernels", return_value=True)
    with as_on_cuda, torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = run(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), [x, *trained])
    return [y.detach(), *grads], {shape: len(found) for shape, found in counted.items()}


def kept_by(model, x, expected, **changes):
    """What the compiled model keeps, after its values and gradients were compared."""
    torch.compiler.reset()
    without_caches = torch._inductor.config.patch(force_disable_caches=True)  # what was compiled without the change
    with without_caches, mock.patch.multiple(recompute, **changes):
        actual, counted = step(model, x, torch.compile(model, fullgraph=True))
    for a, e in zip(actual, expected, strict=True):
        assert rms_error(a, e, rms_error(e, torch.zeros_like(e))) < 1e-5
    return counted


@pytest.mark.parametrize("kind", [Gated, Plain, Rotated, Residual, Checkpointed])
def test_what_is_kept(kind, device):
    model = adapted(kind, device)
    x = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])]
    assert kept_by(model, x, expected, LEAST_BYTES=0) == kind.kept
    assert kept_by(model, x, expected, LEAST_BYTES=4 * TOKENS * HIDDEN + 1) == kind.otherwise  # nothing is as large

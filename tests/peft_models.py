"""Small models with one layer of each kind that PEFT adapts with DoRA, for the tests of the drop-in."""

import copy
import dataclasses
from collections.abc import Callable

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def gpt2_conv1d() -> nn.Module:
    layer = Conv1D(12, 10)
    nn.init.normal_(layer.bias)
    return layer


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to build a base layer and to draw its input."""

    layer: Callable[[], nn.Module]
    draw: Callable[[int], Tensor]
    options: dict[str, object] = dataclasses.field(default_factory=dict)  # of LoraConfig

    @property
    def is_index(self) -> bool:
        return not self.draw(1).is_floating_point()

    def input(self, seed: int, dtype: torch.dtype, samples: int = 3) -> Tensor:
        torch.manual_seed(seed)
        x = self.draw(samples)
        return x if self.is_index else x.to(dtype)


KINDS = {
    "linear": Kind(lambda: nn.Linear(10, 12), lambda n: torch.randn(n, 5, 10)),
    "linear_no_bias": Kind(lambda: nn.Linear(10, 12, bias=False), lambda n: torch.randn(n, 10)),
    "gpt2_conv1d": Kind(gpt2_conv1d, lambda n: torch.randn(n, 5, 10), {"fan_in_fan_out": True}),
    "embedding": Kind(lambda: nn.Embedding(20, 12), lambda n: torch.randint(0, 20, (n, 5))),
    "embedding_padded": Kind(lambda: nn.Embedding(20, 12, padding_idx=0), lambda n: torch.randint(0, 20, (n, 5))),
    "conv1d": Kind(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda n: torch.randn(n, 6, 9)),
    "conv2d": Kind(lambda: nn.Conv2d(3, 8, (3, 2), padding=1), lambda n: torch.randn(n, 3, 6, 5)),
    "conv2d_no_bias": Kind(lambda: nn.Conv2d(3, 8, 1, bias=False), lambda n: torch.randn(n, 3, 6, 5)),
    "conv3d": Kind(lambda: nn.Conv3d(2, 6, 2), lambda n: torch.randn(n, 2, 4, 5, 3)),
}


class Holder(nn.Module):
    """A model of one adapted layer, ``target``, and a ``head`` that is not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.target = layer
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.target(x)


def off_init(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Every DoRA adapter off its start: both factors drawn, the magnitude up to 20 % off its norm."""
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: Tensor, scale: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * scale)

    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, LoraLayer):
                continue
            for adapter in module.lora_magnitude_vector:
                if adapter in module.lora_embedding_A:
                    factors = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
                else:
                    factors = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                for factor in factors:
                    draw(factor, std)
                magnitude = module.lora_magnitude_vector[adapter].weight
                off = 0.8 + 0.4 * torch.rand(magnitude.shape, generator=generator, device="cpu")
                magnitude.mul_(off.to(magnitude.device))
    return model


def stock_model(
    kind: str | Kind, *, dtype: torch.dtype = torch.float64, adapters=("default",), seed: int = 1, **options
):
    """A stock ``PeftModel`` over one layer of this kind, with DoRA adapters off their init."""
    kind = KINDS[kind] if isinstance(kind, str) else kind
    torch.manual_seed(seed)
    model = Holder(kind.layer()).to(dtype)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["target"], "use_dora": True} | kind.options
    autocast = options.pop("autocast_adapter_dtype", True)
    first, *others = adapters
    model = peft.get_peft_model(
        model, peft.LoraConfig(**settings | options), adapter_name=first, autocast_adapter_dtype=autocast
    )
    for name in others:
        model.add_adapter(name, peft.LoraConfig(**settings | options), autocast_adapter_dtype=autocast)
    return off_init(model, seed)


def twins(*args, **options):
    """A stock model and a copy of it that runs on dorac."""
    import dorac.peft

    stock = stock_model(*args, **options)
    ours = copy.deepcopy(stock)
    dorac.peft.enable(ours)
    return stock, ours


def target(model: nn.Module) -> LoraLayer:
    return model.base_model.model.target


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def loss_differences(
    ours: nn.Module, stock: nn.Module, loss: Callable[[nn.Module, int], Tensor], steps: int
) -> list[float]:
    """``|ours - stock| / stock`` of every step's loss, each model trained by its own AdamW at 1e-3.

    Args:
        loss: of a model at a step, from the same random state for both.
    """
    models = ours, stock
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in models]
    differences = []
    for step in range(steps):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        differences.append(abs(losses[0] - losses[1]) / abs(losses[1]))
        print(f"{step:3} {losses[0]:.10f} {losses[1]:.10f} {differences[-1]:.1e}", flush=True)
    return differences

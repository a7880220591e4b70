"""What of a model is trained: how much of it, and in which groups an optimizer should hold it."""

import math
from collections.abc import Iterator

from torch import Tensor, nn

from dorac import checks
from dorac.nn import DoraLayer, residual

# What the name of an adapter's parameter says of it, in dorac.nn and in PEFT; the first that it holds counts.
_ROLES = {
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_": "embedding",
    "lora_A": "lora_A",
    "lora_B": "lora_B",
}

_INITIAL = tuple(residual.INITIAL.values())  # which PEFT does not keep


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints PEFT's sentence, with PEFT's numbers: ``trainable params: 4,096 || all params: ... || trainable%: ...``.

    Every parameter counts once, a sharded one whole. A 4-bit weight of bitsandbytes counts with as many elements as it
    stands for; other packed weights with as many as they hold. PEFT keeps a second copy of each module in
    ``modules_to_save``, which this model does not have.
    """
    trainable = total = 0
    for name, parameter in model.named_parameters():
        count = 0 if name.endswith(_INITIAL) else _elements(parameter)
        total += count
        trainable += count if parameter.requires_grad else 0
    percent = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")


def _elements(parameter: Tensor) -> int:
    if type(parameter).__name__ == "Params4bit":  # two to a byte, in elements of the storage's dtype
        return 2 * parameter.numel() * parameter.element_size()
    return parameter.numel() or getattr(parameter, "ds_numel", 0)  # DeepSpeed ZeRO-3 leaves it empty


class ParameterGroups(list):
    """A list of the groups that an optimizer takes, each a dictionary, shown in a line each."""

    def __repr__(self) -> str:
        return "\n".join(
            f"{group['name']}: {sum(map(_elements, group['params'])):,d} parameters in {len(group['params'])} tensors, "
            f"lr {group['lr']:g}, weight_decay {group['weight_decay']:g}"
            for group in self
        )


def parameter_groups(
    model: nn.Module,
    lr: float | Tensor,
    *,
    lora_plus_ratio: float = 1.0,
    magnitude_lr: float | Tensor | None = None,
    embedding_lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    magnitude_weight_decay: float = 0.0,
) -> "ParameterGroups":
    """The trained parameters of ``model`` in groups: ``torch.optim.AdamW(dorac.parameter_groups(model, lr))``.

    | ``name`` of the group | holds | learning rate | weight decay |
    |---|---|---|---|
    | ``lora_A`` | lora_A of linear layers, convolutions, experts | ``lr`` | ``weight_decay`` |
    | ``lora_B`` | their lora_B | ``lr * lora_plus_ratio`` | ``weight_decay`` |
    | ``embedding`` | both factors of embeddings | ``embedding_lr`` | ``weight_decay`` |
    | ``magnitude`` | magnitudes | ``magnitude_lr`` | ``magnitude_weight_decay`` |
    | ``other`` | what else is trained (``modules_to_save``) | ``lr`` | ``weight_decay`` |

    Each trained parameter is in one group; a group of none is left out. With the defaults all have the rate ``lr`` and
    no decay.

    Args:
        model: with layers of ``dorac.nn`` or of PEFT, in DDP, FSDP2 or ``torch.compile`` or not. Under FSDP1 with
            ``use_orig_params=True``: flat parameters are of no one kind, and all in ``other``.
        lr: the learning rate.
        lora_plus_ratio: LoRA+'s ratio of the rates of lora_B and lora_A. 1 is none; the paper finds that about 16 does
            well, with an ``lr`` somewhat below LoRA's.
        magnitude_lr, embedding_lr: None takes ``lr``.
        weight_decay: of all but the magnitudes.
        magnitude_weight_decay: decay draws a magnitude to 0, away from the norm where it starts and the weight with it.

    Raises:
        TypeError: a rate, ratio or decay that is no number. ValueError: one that is negative or not finite, or nothing
            that is trained.

    Source: arXiv 2402.12354 (LoRA+), which gives embeddings a rate of their own.
    """
    _check("lora_plus_ratio", lora_plus_ratio, positive=True)
    for name, rate in (("lr", lr), ("magnitude_lr", magnitude_lr), ("embedding_lr", embedding_lr)):
        if rate is not None and not isinstance(rate, Tensor):
            _check(name, rate)
    _check("weight_decay", weight_decay)
    _check("magnitude_weight_decay", magnitude_weight_decay)
    rates = {
        "lora_A": lr,
        "lora_B": lr * lora_plus_ratio,
        "embedding": lr if embedding_lr is None else embedding_lr,
        "magnitude": lr if magnitude_lr is None else magnitude_lr,
        "other": lr,
    }
    roles = {id(p): role for layer in _adapted(model) for p, role in _roles(layer)}
    groups = {
        name: {
            "params": [],
            "lr": rate.clone() if isinstance(rate, Tensor) else rate,  # schedulers write to it in place
            "weight_decay": magnitude_weight_decay if name == "magnitude" else weight_decay,
            "name": name,
        }
        for name, rate in rates.items()
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[roles.get(id(parameter), "other")]["params"].append(parameter)
    held = ParameterGroups(group for group in groups.values() if group["params"])
    if not held:
        raise ValueError(f"{type(model).__name__} has no parameter that is trained: adapt it first, or unfreeze some")
    return held


def _adapted(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of ``dorac.nn`` and of PEFT."""
    for module in model.modules():
        if isinstance(module, DoraLayer) or (hasattr(module, "base_layer") and hasattr(module, "lora_embedding_A")):
            yield module


def _roles(layer: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """The parameters of the layer's adapters, with the group that each belongs to."""
    for name, parameter in layer.named_parameters():
        role = next((role for part, role in _ROLES.items() if part in name), None)
        if role is not None and not name.startswith("base_layer."):
            yield parameter, role


def _check(name: str, value: float, *, positive: bool = False) -> None:
    value = checks.python_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be finite and {'positive' if positive else 'not negative'}, got {value}")

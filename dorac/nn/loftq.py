"""LoftQ's start over a quantised weight Q: ``s * lora_B @ lora_A`` is the nearest of its rank to ``W - Q``.

W is the weight before it was quantised. The adapter is one over Q, which stays as it is, and so is what is saved: a
plain adapter for the model quantised in this way.

Source: arXiv 2310.08659, algorithm 1 with one iteration, as PEFT's ``replace_lora_weights_loftq`` has it, which leaves
out s. A second iteration would quantise ``W - s * lora_B @ lora_A`` in the place of W.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dorac import packed
from dorac.names import plain_name
from dorac.nn import layer_class
from dorac.nn.layer import DoraLayer
from dorac.nn.quantised import DoraQuantLinear
from dorac.ops.norm import DEFAULT_BUDGET
from dorac.ops.packed import dense_rows


def check(modules: Mapping[str, nn.Module], original_weights: object, config: object) -> None:
    """Refuses modules that are not quantised, and weights that are not theirs.

    Raises:
        TypeError: no mapping. ValueError: the rest, by name.
    """
    settings = getattr(config, "loftq_config", None) or {}
    iterations = (settings if isinstance(settings, Mapping) else vars(settings)).get("loftq_iter", 1)
    if iterations != 1:
        raise ValueError(f"loftq_iter={iterations} would quantise the base weights anew, only 1 leaves them")
    if not isinstance(original_weights, Mapping):
        raise TypeError(
            "init_lora_weights='loftq' needs original_weights, the state dict of the model before it was quantised, "
            f"got {type(original_weights).__name__}"
        )
    reasons = [f"{name}: {reason}" for name, m in modules.items() if (reason := _unfit(name, m, original_weights))]
    if reasons:
        raise ValueError(
            "init_lora_weights='loftq' cannot start these modules (name them in exclude_modules, and adapt them in "
            "another call):\n  " + "\n  ".join(reasons)
        )


def _key(name: str) -> str:
    return f"{plain_name(name)}.weight"


def _unfit(name: str, module: nn.Module, original_weights: Mapping[str, Tensor]) -> str | None:
    if not issubclass(layer_class(module), DoraQuantLinear):
        return f"{type(module).__name__} is not quantised: quantise the model first"
    key = _key(name)
    if key not in original_weights:
        return f"original_weights holds no {key}"
    weight, shape = original_weights[key], [module.out_features, module.in_features]
    if not isinstance(weight, Tensor) or list(weight.shape) != shape or not weight.is_floating_point():
        what = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        return f"{key} of original_weights must be a floating-point tensor {shape}, got {what}"
    if weight.is_meta or not weight.isfinite().all():
        return f"{key} of original_weights {'is on meta' if weight.is_meta else 'is not finite'}"
    return None


@torch.no_grad()
def begin(layers: Mapping[str, DoraLayer], original_weights: Mapping[str, Tensor]) -> None:
    """Gives new layers their start.

    Raises:
        ValueError: a rank above that of the weight, or a scaling of 0, by name.
    """
    for layer, name in {layer: name for name, layer in layers.items()}.items():  # one of its names
        _begin(name, layer, original_weights)


def _begin(name: str, layer: DoraQuantLinear, original_weights: Mapping[str, Tensor]) -> None:
    scaling, r = float(layer.scaling), layer.r
    quantised = layer._matrix()
    if packed.is_packed(quantised):
        quantised = dense_rows(quantised, torch.float32, DEFAULT_BUDGET)
    if r > min(quantised.shape):
        raise ValueError(f"{name}: r = {r} is more than the rank of its weight, {min(quantised.shape)}")
    if scaling == 0:
        raise ValueError(f"{name}: a scaling of 0 leaves the error of the quantised weight as it is")
    lost = original_weights[_key(name)].to(quantised.device, torch.float32) - quantised.float()
    U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
    root = (S[:r] / abs(scaling)).sqrt()
    layer.lora_A.copy_(root[:, None] * Vh[:r])
    layer.lora_B.copy_(U[:, :r] * (root if scaling > 0 else -root))
    layer._reset_magnitudes()

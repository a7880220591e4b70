"""Whether the tensors of a file fit a model: dtypes, values, base weights; and the refusal that lists what does not."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dorac.checkpoint.tensors import ENDINGS
from dorac.ops import sharded

OTHER_BASE = "values of {}: not those of the model's base weight, which its other adapters rest on"


def differs(value: Tensor, present: Tensor) -> bool:
    """Whether reading ``value`` into ``present`` would change that."""
    return not present.is_meta and not torch.equal(value.to(present.dtype), sharded.whole(present.detach()).cpu())


def unfit_values(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """Tensors of another dtype than those of the model can take, and values that are no numbers.

    A buffer may hold infinities, as a mask does.
    """
    problems = []
    for key, tensor in tensors.items():
        goal = others.get(key)
        if goal is None and not key.endswith(ENDINGS):
            continue
        exact = goal is not None and not goal.is_floating_point()
        if tensor.dtype != goal.dtype if exact else not tensor.is_floating_point():
            problems.append(f"dtype of {key}: {tensor.dtype}")
        elif not exact and (goal is None or isinstance(goal, nn.Parameter)) and not tensor.isfinite().all():
            problems.append(f"values of {key}: not all are finite")
    return problems


def overflow(key: str, tensor: Tensor, goal: Tensor) -> str | None:
    """What is wrong if finite values are infinite in the dtype that they go to."""
    if not goal.is_floating_point() or torch.promote_types(tensor.dtype, goal.dtype) == goal.dtype:
        return None
    lost = tensor.isfinite() & ~tensor.to(goal.dtype).isfinite()
    return f"values of {key}: not all are finite in {goal.dtype}" if lost.any() else None


def refuse(directory: Path, problems: list[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - 50} more"] if len(problems) > 50 else []
        raise ValueError(f"the adapter in {directory} does not fit the model:\n  " + "\n  ".join(problems[:50] + more))

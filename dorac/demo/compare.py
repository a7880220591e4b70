"""The same adapter, seeds and batches through stock PEFT, eager, beside dorac."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import dorac
from dorac import functional
from dorac.demo.model import compile_blocks
from dorac.demo.options import Options
from dorac.demo.train import Trainer, warm_median

FIRST_LOSS_BOUND = 1e-6
LOSS_BOUND = 1e-4
START_DEVIATION = 0.02  # of lora_B
START_OFF_NORM = 0.1  # of the magnitude


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Losses and step times of both sides, step by step."""

    ours: list[float]
    theirs: list[float]
    our_seconds: list[float]
    their_seconds: list[float]

    @property
    def differences(self) -> list[float]:
        """``|ours - theirs| / |theirs|`` per step."""
        return [abs(a - b) / abs(b) for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def agrees(self) -> bool:
        """Whether the first loss and every loss lie within the bounds that hold in float32 (a NaN does not)."""
        return self.differences[0] <= FIRST_LOSS_BOUND and all(d <= LOSS_BOUND for d in self.differences)

    def summary(self) -> str:
        ours, theirs = warm_median(self.our_seconds), warm_median(self.their_seconds)
        return (
            f"first loss: relative difference {self.differences[0]:.2e} (float32 bound: {FIRST_LOSS_BOUND:.0e})\n"
            f"every loss: largest relative difference {max(self.differences):.2e} (float32 bound: {LOSS_BOUND:.0e})\n"
            f"median warm step: dorac {ours:.3f} s, PEFT {theirs:.3f} s, PEFT / dorac = {theirs / ours:.2f}"
        )


def write_start(model: nn.Module, rank: int, directory: Path) -> None:
    """Wraps ``model`` and saves an adapter off its usual start, where lora_B = 0 and g = 1 hide most mistakes.

    lora_B is drawn, and every magnitude lies a tenth above or below its norm.
    """
    dorac.apply_dora(model, "all-linear", rank, 2 * rank)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, dorac.nn.DoraLinear):
                layer.lora_B.normal_(std=START_DEVIATION)
                norm = functional.init_magnitude(layer.weight, layer.lora_A, layer.lora_B, layer.scaling)
                sign = torch.randint_like(norm, 0, 2) * 2 - 1
                layer.lora_magnitude_vector.copy_(norm * (1 + START_OFF_NORM * sign))
    dorac.save_adapter(model, directory)


def compare_with_peft(model: nn.Module, batches: Iterator[Tensor], options: Options) -> Comparison:
    """Trains ``model`` with dorac and a copy of it with stock PEFT, in turns, and prints both losses per step.

    Both read the adapter that :func:`write_start` left in ``--out``/start, and both stay in eval mode, so that
    dropout of the model's own is off.
    """
    from peft import PeftModel

    start = options.out / "start"
    write_start(copy.deepcopy(model), options.rank, start)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(model), start, is_trainable=True)
    dorac.load_adapter(model, start)
    if options.compile:
        compile_blocks(model)
    ours, theirs = (Trainer(m.eval(), lr=options.lr, dtype=options.dtype) for m in (model, peft_model))
    ours_count, theirs_count = (sum(p.numel() for p in t.parameters) for t in (ours, theirs))
    print(f"trainable parameters: dorac {ours_count:,}, PEFT {theirs_count:,}")
    print("step   dorac loss     PEFT loss   rel. diff.   dorac s    PEFT s")
    rows = []
    for step in range(1, options.steps + 1):
        ids = next(batches)
        (our_loss, our_time), (their_loss, their_time) = ours.timed_step(ids), theirs.timed_step(ids)
        rows.append((our_loss, their_loss, our_time, their_time))
        difference = abs(our_loss - their_loss) / abs(their_loss)
        losses = f"{our_loss:12.8f}  {their_loss:12.8f}   {difference:10.2e}"
        print(f"{step:4} {losses} {our_time:9.3f} {their_time:9.3f}", flush=True)
    return Comparison(*(list(column) for column in zip(*rows, strict=True)))

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
CACHED = "norms once"
START_DEVIATION = 0.02  # of lora_B
START_OFF_NORM = 0.1  # of the magnitude


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Losses and step times by who trained: "dorac", "PEFT", and where norms were cached beside it "norms once"."""

    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]

    @property
    def differences(self) -> list[float]:
        """``|ours - theirs| / |theirs|`` per step."""
        return [abs(a - b) / abs(b) for a, b in zip(self.losses["dorac"], self.losses["PEFT"], strict=True)]

    @property
    def agrees(self) -> bool:
        """Whether the first loss and every loss lie within the bounds that hold in float32 (a NaN does not)."""
        return self.differences[0] <= FIRST_LOSS_BOUND and all(d <= LOSS_BOUND for d in self.differences)

    @property
    def caching_changes_nothing(self) -> bool:
        """Whether the losses with cached norms are those without, bit for bit."""
        return self.losses.get(CACHED, self.losses["dorac"]) == self.losses["dorac"]

    def summary(self) -> str:
        medians = {name: warm_median(seconds) for name, seconds in self.seconds.items()}
        times = ", ".join(f"{name} {median:.3f} s" for name, median in medians.items())
        lines = [
            f"first loss: relative difference {self.differences[0]:.2e} (float32 bound: {FIRST_LOSS_BOUND:.0e})",
            f"every loss: largest relative difference {max(self.differences):.2e} (float32 bound: {LOSS_BOUND:.0e})",
            f"median warm step: {times}, PEFT / dorac = {medians['PEFT'] / medians['dorac']:.2f}",
        ]
        if CACHED in medians:
            same = "the same, bit for bit" if self.caching_changes_nothing else "DIFFERENT"
            ratio = medians[CACHED] / medians["dorac"]
            lines.append(f"norms once: losses {same}, step {ratio:.3f} of that with a norm in every forward")
        return "\n".join(lines)


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
    models = {"dorac": model} | ({CACHED: copy.deepcopy(model)} if options.cache_norms else {})
    if options.cache_norms:
        dorac.cache_norms(models[CACHED])
    if options.compile:
        for ours in models.values():
            compile_blocks(ours)
    models["PEFT"] = peft_model
    how = {"lr": options.lr, "dtype": options.dtype, "micro_batches": options.micro_batches}
    trainers = {name: Trainer(m.eval(), **how) for name, m in models.items()}
    counts = (f"{name} {sum(p.numel() for p in t.parameters):,}" for name, t in trainers.items())
    print(f"trainable parameters: {', '.join(counts)}")
    print(
        "step", *(f"{f'{name} loss':>15}" for name in trainers), " rel. diff.", *(f"{f'{n} s':>13}" for n in trainers)
    )
    comparison = Comparison({name: [] for name in trainers}, {name: [] for name in trainers})
    for step in range(1, options.steps + 1):
        ids = next(batches)
        for name, trainer in trainers.items():
            loss, seconds = trainer.timed_step(ids)
            comparison.losses[name].append(loss)
            comparison.seconds[name].append(seconds)
        losses = " ".join(f"{comparison.losses[name][-1]:15.8f}" for name in trainers)
        times = " ".join(f"{comparison.seconds[name][-1]:13.3f}" for name in trainers)
        print(f"{step:4} {losses} {comparison.differences[-1]:11.2e} {times}", flush=True)
    return comparison

"""The same adapter, seeds and batches through stock PEFT, eager, beside dorac."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import dorac
from dorac import functional
from dorac.demo.model import compile_blocks, dequantised
from dorac.demo.options import Options
from dorac.demo.train import Trainer, warm_median

FIRST_LOSS_BOUND = 1e-6
LOSS_BOUND = 1e-4
CACHED = "norms once"
DROP_IN = "drop-in"
# Bases that round other values than a float32 product with the dense weight does, beside the order of its sum: torchao
# multiplies with the integers, and the product by the scale; nf4 is dequantised to the same weight first.
ROUNDED = ("int8",)
START_DEVIATION = 0.02  # of lora_B
START_OFF_NORM = 0.1  # of the magnitude


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Losses and step times by who trained: "dorac", "PEFT", where norms were cached beside it "norms once", and over a
    quantised base the "drop-in".

    ``rounding``: what the products of a quantised base may change a loss by, see :func:`rounding_of_products`.
    """

    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]
    rounding: float = 0.0

    def differences(self, name: str = "dorac") -> list[float]:
        """``|ours - theirs| / |theirs|`` per step."""
        return [abs(a - b) / abs(b) for a, b in zip(self.losses[name], self.losses["PEFT"], strict=True)]

    @property
    def ours(self) -> list[str]:
        return [name for name in ("dorac", DROP_IN) if name in self.losses]

    @property
    def agrees(self) -> bool:
        """Whether the first loss and every loss lie within the bounds that hold in float32 (a NaN does not)."""
        first, every = FIRST_LOSS_BOUND + self.rounding, LOSS_BOUND + self.rounding
        ours = [self.differences(name) for name in self.ours]
        return all(one[0] <= first and all(d <= every for d in one) for one in ours)

    @property
    def caching_changes_nothing(self) -> bool:
        """Whether the losses with cached norms are those without, bit for bit."""
        return self.losses.get(CACHED, self.losses["dorac"]) == self.losses["dorac"]

    def _more(self) -> str:
        return f" + {self.rounding:.1e}, rounding of the base's products" if self.rounding else ""

    def summary(self) -> str:
        medians = {name: warm_median(seconds) for name, seconds in self.seconds.items()}
        times = ", ".join(f"{name} {median:.3f} s" for name, median in medians.items())
        first, every = (f"(float32 bound: {bound:.0e}{self._more()})" for bound in (FIRST_LOSS_BOUND, LOSS_BOUND))
        lines = []
        for name in self.ours:
            who, differences = f"{name}, " if len(self.ours) > 1 else "", self.differences(name)
            lines.append(f"{who}first loss: relative difference {differences[0]:.2e} {first}")
            lines.append(f"{who}every loss: largest relative difference {max(differences):.2e} {every}")
        lines += [
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

    Over a quantised base the drop-in trains a copy, too, and stock PEFT the dequantised float32 model. All read the
    adapter that :func:`write_start` left in ``--out``/start. They stay in eval mode, so that dropout of the model's own
    is off; with ``--checkpointing``, which needs training mode, all draw the same masks.
    """
    from peft import PeftModel

    start = options.out / "start"
    dense = copy.deepcopy(model) if options.base is None else dequantised(model)
    write_start(copy.deepcopy(dense), options.rank, start)
    drop_in = None if options.base is None else _drop_in(copy.deepcopy(model), start)
    peft_model = PeftModel.from_pretrained(dense, start, is_trainable=True)
    dorac.load_adapter(model, start)
    models = {"dorac": model} | ({CACHED: copy.deepcopy(model)} if options.cache_norms else {})
    if options.cache_norms:
        dorac.cache_norms(models[CACHED])
    if drop_in is not None:
        models[DROP_IN] = drop_in
    for ours in models.values() if options.fuse else ():
        print(dorac.fuse(ours))
    if options.compile:
        for ours in models.values():
            compile_blocks(ours)
    models["PEFT"] = peft_model
    how = {"lr": options.lr, "dtype": options.dtype, "micro_batches": options.micro_batches}
    trainers = {name: Trainer(m.train(options.checkpointing), **how) for name, m in models.items()}
    counts = (f"{name} {sum(p.numel() for p in t.parameters):,}" for name, t in trainers.items())
    print(f"trainable parameters: {', '.join(counts)}")
    print(
        "step", *(f"{f'{name} loss':>15}" for name in trainers), " rel. diff.", *(f"{f'{n} s':>13}" for n in trainers)
    )
    ids = next(batches)
    rounded = options.base in ROUNDED
    rounding = rounding_of_products(peft_model, ids.to(options.device)) if rounded else 0.0
    comparison = Comparison({name: [] for name in trainers}, {name: [] for name in trainers}, rounding)
    for step in range(1, options.steps + 1):
        ids = next(batches) if step > 1 else ids
        for name, trainer in trainers.items():
            torch.manual_seed(options.seed + step)
            loss, seconds = trainer.timed_step(ids)
            comparison.losses[name].append(loss)
            comparison.seconds[name].append(seconds)
        losses = " ".join(f"{comparison.losses[name][-1]:15.8f}" for name in trainers)
        times = " ".join(f"{comparison.seconds[name][-1]:13.3f}" for name in trainers)
        worst = max(comparison.differences(name)[-1] for name in comparison.ours)
        print(f"{step:4} {losses} {worst:11.2e} {times}", flush=True)
    return comparison


def _drop_in(model: nn.Module, start: Path) -> nn.Module:
    from peft import PeftModel

    import dorac.peft

    with dorac.peft.enable():
        peft_model = PeftModel.from_pretrained(model, start, is_trainable=True)
    dorac.peft.enable(peft_model)  # leaving the context gave it back
    return peft_model


def rounding_of_products(peft_model: nn.Module, ids: Tensor) -> float:
    """By how much the loss on ``ids`` may change, relative to it, if the base's products are ``s * (x q^T)``, not
    ``x W^T`` with ``W = s q``.

    The one rounds each y = x W^T by the scale once more, the other each element of W, both by up to ``u = 2^-24`` of
    it. To first order that is up to ``u * (sum |dL/dy| |y| + sum |dL/dW| |W|)`` over all base layers. The order of a
    sum is not counted: the bounds on dense models hold with it.
    """
    from peft.tuners.lora import LoraLayer

    sums = []

    def at(base: nn.Linear, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        x, weight = inputs[0].detach().flatten(0, -2), base.weight.detach()
        y = y if y.requires_grad else y.detach().requires_grad_()
        size = y.detach().abs()

        def of(dy: Tensor) -> None:
            d_weight = dy.flatten(0, -2).T @ x
            sums.append(((dy.abs() * size).sum() + (d_weight.abs() * weight.abs()).sum()).item())

        y.register_hook(of)
        return y

    layers = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
    handles = [layer.get_base_layer().register_forward_hook(at) for layer in layers]
    training = peft_model.training
    try:
        peft_model.eval()  # without checkpointing, which runs the hooks twice
        loss = peft_model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    finally:
        peft_model.train(training).zero_grad()
        for handle in handles:
            handle.remove()
    return 2**-24 * sum(sums) / loss.item()

"""One training step, the loop around it, the held-out loss."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

WARMUP_STEPS = 2  # the first compiles, the second allocates


class Trainer:
    """AdamW over the trainable parameters of a causal language model.

    Args:
        model: on its device; what it trains are the parameters that require a gradient.
        lr: learning rate.
        dtype: of the frozen model; for float16 the loss is scaled so that small gradients survive.
        micro_batches: passes that a batch is spread over.
    """

    def __init__(self, model: nn.Module, *, lr: float, dtype: torch.dtype, micro_batches: int = 1) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.micro_batches = micro_batches
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def step(self, ids: Tensor) -> float:
        """One update on a batch ``[batch_size, seq_len]``; returns the loss before it, when the device is done."""
        ids = ids.to(self.device)
        self.optimizer.zero_grad()
        total = 0.0
        for part in ids.chunk(self.micro_batches):
            loss = self.model(input_ids=part, labels=part, use_cache=False).loss / self.micro_batches
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total.item()

    def timed_step(self, ids: Tensor) -> tuple[float, float]:
        """The loss and the seconds of one step."""
        start = time.perf_counter()
        loss = self.step(ids)
        return loss, time.perf_counter() - start


def train(
    trainer: Trainer,
    batches: Iterator[Tensor],
    steps: int,
    *,
    save: Callable[[], None],
    save_every: int,
    warm_after: int | None = None,
) -> tuple[list[float], list[float]]:
    """Trains with a progress bar, saving every so many steps and at the end.

    Args:
        warm_after: the step after which compiling anything again is an error.

    Returns:
        The losses and the seconds of the steps.
    """
    from tqdm import tqdm

    trainer.model.train()
    losses, seconds = [], []
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for step in range(1, steps + 1):
            warm = warm_after is not None and step > warm_after
            with torch.compiler.set_stance("fail_on_recompile" if warm else "default"):
                loss, duration = trainer.timed_step(next(batches))
            losses.append(loss)
            seconds.append(duration)
            bar.set_postfix(loss=f"{loss:.4f}", step=f"{duration:.2f}s")
            bar.update()
            if step % save_every == 0 or step == steps:
                save()
    trainer.model.eval()
    return losses, seconds


def warm_median(seconds: list[float]) -> float:
    """The median step time without the first steps, where there are others."""
    return statistics.median(seconds[WARMUP_STEPS:] or seconds)


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor, batch_size: int) -> float:
    """The mean loss over all blocks, computed eagerly: no second graph is compiled for running without gradients."""
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    with torch.compiler.set_stance("force_eager"):
        for ids in blocks.to(device).split(batch_size):
            total += model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids)
    return total / len(blocks)

"""Text to blocks of tokens, deterministically split into a training and a held-out part."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dorac.cli import BadInput

HELD_OUT_SHARE = 10  # one block in ten


def read_text(path: Path | None) -> str:
    """The file's text, or Python's language reference."""
    if path is None:
        return language_reference()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"--text {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise BadInput(f"--text {path} cannot be read: {error.strerror or error}") from None
    if not text.strip():
        raise BadInput(f"--text {path} is empty")
    return text


def language_reference() -> str:
    """The topics of Python's ``help()``, each paragraph where it stands first.

    The topics quote each other at length, and what is held out must not have been seen in training.
    """
    from pydoc_data.topics import topics

    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    first = {" ".join(paragraph.split()): paragraph for paragraph in reversed(list(paragraphs))}
    return "\n\n".join(reversed(first.values()))


def token_blocks(text: str, encode: Callable[[str], list[int]], seq_len: int) -> tuple[Tensor, Tensor]:
    """``(train [n, seq_len], held_out [m, seq_len])``: consecutive blocks of the text, the last tenth of them held out.

    Raises:
        BadInput: a text too short for one block of each.
    """
    ids = torch.tensor(encode(text), dtype=torch.long)
    count = len(ids) // seq_len
    if count < 2:
        raise BadInput(
            f"the text is too short: it has {len(ids)} tokens, and one training and one held-out block "
            f"of --seq-len {seq_len} need {2 * seq_len}"
        )
    blocks = ids[: count * seq_len].view(count, seq_len)
    held_out = max(1, count // HELD_OUT_SHARE)
    return blocks[:-held_out], blocks[-held_out:]


def spread(blocks: Tensor, most: int) -> Tensor:
    """At most ``most`` of the blocks, evenly spread."""
    if len(blocks) <= most:
        return blocks
    return blocks[torch.arange(most) * len(blocks) // most]


def batches(blocks: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches ``[batch_size, seq_len]``: every block once per epoch, in an order that the seed fixes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        yield blocks[order[:batch_size]]
        order = order[batch_size:]


def random_lengths(batches: Iterator[Tensor], longest: int, seed: int) -> Iterator[Tensor]:
    """The batches cut to lengths from 2 to ``longest``; the first two to ``longest`` and half of it, as a warm-up."""
    generator = torch.Generator().manual_seed(seed)
    lengths = iter((longest, longest // 2))
    for ids in batches:
        length = next(lengths, None) or int(torch.randint(2, longest + 1, (), generator=generator))
        yield ids[:, :length]

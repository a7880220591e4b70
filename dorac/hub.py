"""Adapters on the Hugging Face Hub: the id of a repository in place of a directory."""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def local(directory: str | os.PathLike, files: Sequence[str], revision: str | None = None) -> Path:
    """The directory; where there is none and the text can be the id of a repository, a local copy of its ``files``.

    A copy that huggingface_hub has kept is taken as it is where the Hub cannot be reached.

    Raises:
        OSError: such a repository cannot be had, or huggingface_hub is not installed.
    """
    path = Path(directory)
    if path.exists() or not isinstance(directory, str) or not _REPOSITORY.fullmatch(directory):
        return path
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(
            f"there is no directory {directory}; if it is a repository on the Hugging Face Hub, install huggingface_hub"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(directory, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no directory {directory}, and the Hugging Face Hub does not give it: {error}"
        ) from error

"""The commands of ``python -m dorac``: a module each, with ``add(parser)`` and ``run(args) -> exit code``."""

from dorac.commands.main import main

__all__ = ["main"]

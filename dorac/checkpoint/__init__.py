"""Adapters on disk in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from dorac.adapter_config import CONFIG_NAME
from dorac.checkpoint.loading import load_adapter
from dorac.checkpoint.saving import save_adapter
from dorac.files.storage import WEIGHTS_NAME

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "load_adapter", "save_adapter"]

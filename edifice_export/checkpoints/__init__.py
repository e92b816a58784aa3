"""Weights from files into reference models, and back: one format per file. No file can run code."""

from .checkpoint import Checkpoint, load_into, read_checkpoint
from .safetensors import write_safetensors

__all__ = ["Checkpoint", "load_into", "read_checkpoint", "write_safetensors"]

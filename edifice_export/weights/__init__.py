"""Weights from files into reference models, and back: one format per file. No file can run code."""

from .checkpoint import Checkpoint, check_against, load_into, read_checkpoint
from .formats.safetensors import encode_safetensors
from .options import configure, known_options, own_metadata, untold_options
from .sources.edifice import from_edifice, recognise, to_edifice

__all__ = [
    "Checkpoint",
    "check_against",
    "configure",
    "encode_safetensors",
    "from_edifice",
    "known_options",
    "load_into",
    "own_metadata",
    "read_checkpoint",
    "recognise",
    "to_edifice",
    "untold_options",
]

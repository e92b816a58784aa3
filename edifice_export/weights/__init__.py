"""Weights into reference models, and back: formats are bytes to tensors, sources whose names. No file can run code."""

from .checkpoint import Checkpoint, describe_weights, recognise
from .formats.safetensors import encode_safetensors
from .options import configure, known_options, own_metadata, untold_options
from .parameters import check_against, load_into, parameter
from .reading import read_checkpoint
from .sources.edifice import from_edifice, to_edifice

__all__ = [
    "Checkpoint",
    "check_against",
    "configure",
    "describe_weights",
    "encode_safetensors",
    "from_edifice",
    "known_options",
    "load_into",
    "own_metadata",
    "parameter",
    "read_checkpoint",
    "recognise",
    "to_edifice",
    "untold_options",
]

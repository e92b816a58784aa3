"""Whose names and layouts tensors have, one source a file: to and from the reference models' own."""

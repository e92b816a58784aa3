"""Weights files, one format a file: bytes to tensors and back. No file can run code."""

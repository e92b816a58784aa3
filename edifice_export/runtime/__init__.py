"""Bundles run by ONNX Runtime: windows, streams, recordings, and which providers work here. Needs no torch."""

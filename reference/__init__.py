"""Reference models in plain torch: the definition of what an exported graph must compute.

This package knows nothing of ONNX. `registry` lists the architectures; every architecture file holds a glossary of
shapes and the module, and the file beside it, which needs no torch, the options with their defaults and ranges.
"""

"""Reference models in plain torch: the definition of what an exported graph must compute.

This package knows nothing of ONNX. `registry` lists the architectures; every architecture file holds a glossary of
shapes, the config dataclass with its documented defaults and ranges, and the module.
"""

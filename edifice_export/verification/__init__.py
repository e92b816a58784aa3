"""ONNX Runtime against the float64 reference: what is run, what is allowed, and where a graph departs."""

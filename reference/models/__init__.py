"""The architectures, one file each, the layers that they share, and the registry of them."""

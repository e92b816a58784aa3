"""What a bundle costs on this machine, beside its bare matrix products and other ways to run the model."""

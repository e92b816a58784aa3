"""What mamba_ssm and causal_conv1d are while somebody's code is loaded or exported, made of this project's ops."""

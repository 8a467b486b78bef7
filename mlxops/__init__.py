"""mlxops: which MLX model is served on which port, from one control plane."""

__version__ = "0.4.0"

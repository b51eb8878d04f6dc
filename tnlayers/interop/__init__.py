"""Conversion of layers to plain PyTorch modules, and to and from tensorly-torch."""

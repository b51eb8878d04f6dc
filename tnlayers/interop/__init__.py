"""Layers to and from plain PyTorch modules and tensorly-torch."""

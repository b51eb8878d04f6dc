"""Swapped models as safetensors files."""

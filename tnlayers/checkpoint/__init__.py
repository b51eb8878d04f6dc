"""Saving and loading of tensorized models as safetensors files."""

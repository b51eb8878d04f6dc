"""Specification of a layer: its network as text, axes, geometry and ranks. Uses no tensors."""

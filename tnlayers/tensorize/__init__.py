"""Replacement of a model's plain layers by tensor layers, and back."""

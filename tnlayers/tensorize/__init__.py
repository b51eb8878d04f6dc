"""Model-wide swapping of plain layers for tensor layers, and back."""

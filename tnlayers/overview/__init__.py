"""What a model is and does, layer by layer: counts, signals and a choice of formats."""

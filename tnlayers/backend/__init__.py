"""PyTorch and the machine: tracing, autocast, sharding, rates. Knows no network."""

"""PyTorch and the machine: tracing, autocast, sharding, rates. Independent of networks."""

"""The training program: networks, data sets, runs, checkpoints."""

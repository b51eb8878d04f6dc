"""One script per CSV file of benchmarks/results; no script imports another."""

"""Measuring scripts, one per CSV file of benchmarks/results. No script imports another."""

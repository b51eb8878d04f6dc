"""Fits of cores to a given kernel, with or without the second moments of the inputs."""

"""Image data sets, in memory and on disk."""

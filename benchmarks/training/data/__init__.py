"""Data sets of images, in memory and on disk."""

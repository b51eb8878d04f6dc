"""Plans for a layer's computation: search for the fastest within a memory limit. README.md has an example."""

"""How a layer computes: search for the fastest plan within time and memory. README.md has an example."""

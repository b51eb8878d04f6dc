"""The two operations of every plan, contraction of cores and a step of the input, and squared norms."""

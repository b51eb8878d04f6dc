"""The two operations of every plan, contractions of cores and input steps, and squared norms."""

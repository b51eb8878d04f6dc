"""How cores begin: the variance solver, and drawing to its answer."""

"""Names in the columns of the results."""

DENSE = "dense"
NARROW = "narrow"  # a dense plain network with fewer channels, at the formats' keep ratio
REFERENCES = (DENSE, NARROW)  # dense networks, initialised by He's rule
DENSE_ARM = "kaiming"

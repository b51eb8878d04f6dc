"""Names that rows of the results have in their columns."""

DENSE = "dense"
NARROW = "narrow"  # a dense plain network of fewer channels, which keeps as much as the formats may
REFERENCES = (DENSE, NARROW)  # without formats, drawn by He's rule
DENSE_ARM = "kaiming"

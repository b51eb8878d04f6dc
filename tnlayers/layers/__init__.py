"""The layers: one base, a class for each kind of torch layer, and one for each format of it."""

"""The layers: one base, a class per kind of torch layer, and a subclass of it per format."""

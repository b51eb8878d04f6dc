"""Plans run: the autograd function, the plans that a layer holds, and the module that has them."""

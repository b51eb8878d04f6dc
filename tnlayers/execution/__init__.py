"""Execution of plans: the autograd function, a layer's plan cache, and the module base class."""

"""Code that several scripts share. It imports nothing from the other folders."""

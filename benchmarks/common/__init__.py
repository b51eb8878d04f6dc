"""What several scripts share; it imports nothing from the other folders."""

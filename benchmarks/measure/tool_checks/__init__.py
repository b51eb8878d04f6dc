"""What measure/tools.py tries: a check for each tool."""

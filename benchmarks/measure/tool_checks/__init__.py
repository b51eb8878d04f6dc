"""Checks of measure/tools.py, one per tool."""

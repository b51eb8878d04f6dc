"""Measuring of this machine: rates of its operations, and what a report of a bug needs."""

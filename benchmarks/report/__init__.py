"""README.md's tables and pictures, made from the CSV files alone."""

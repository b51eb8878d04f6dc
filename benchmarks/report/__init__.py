"""README.md's tables and pictures, made only from the CSV files."""

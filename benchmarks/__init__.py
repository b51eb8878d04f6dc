"""The training program, the measurements of tnlayers, and the report of their results."""

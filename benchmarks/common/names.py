"""Names in the columns of the results."""

import re
from pathlib import Path

DENSE = "dense"
NARROW = "narrow"  # a dense plain network with fewer channels, at the formats' keep ratio
REFERENCES = (DENSE, NARROW)  # dense networks, initialised by He's rule
DENSE_ARM = "kaiming"


def network_name(path: Path) -> str:
    """Return the name of a file of weights without a hash at its end; of a run's checkpoint, that of its directory."""
    return path.absolute().parent.name if path.stem == "checkpoint" else re.sub(r"-[0-9a-f]{8,}$", "", path.stem)

"""Formats by name. A format defines its network. Layers, initialisation and all else are derived from the network."""

from tnlayers.formats.base import FORMATS, Format, factorize, register
from tnlayers.formats.blocktt import BlockTT
from tnlayers.formats.btt import BTT
from tnlayers.formats.cp import CP
from tnlayers.formats.einsum import Einsum
from tnlayers.formats.ht import HT
from tnlayers.formats.tr import TR
from tnlayers.formats.tt import TT
from tnlayers.formats.tucker import Tucker
from tnlayers.spec.notation import Axes

__all__ = [
    "BTT", "CP", "FORMATS", "HT", "TR", "TT", "Axes", "BlockTT", "Einsum", "Format", "Tucker", "factorize", "register",
]  # fmt: skip

"""The table of cases: every registered format, at rank 2 if it has no row here."""

import itertools
from typing import Any, NamedTuple

import tnlayers
from tnlayers import TensorLayer

FAMILIES = [getattr(tnlayers, f"{kind.__name__}Conv2d") for name, kind in tnlayers.FORMATS.items() if name != "einsum"]
"""A two-dimensional layer of every format that needs no network of the user's."""

KINDS = {f"{kind}{ndim}d": ndim for kind in ("Conv", "ConvTranspose") for ndim in (1, 2, 3)} | {"Linear": 0}
"""What layers a format has, and their numbers of spatial axes."""

CHANNELS = (8, 12)
KERNELS: dict[int, tuple[int, ...]] = {0: (), 1: (3,), 2: (3, 2), 3: (2, 1, 3)}


class Case(NamedTuple):
    """Arguments of a layer beside torch's own."""

    format: str
    kind: str
    arguments: dict[str, Any]

    @property
    def layer(self) -> type[TensorLayer]:
        return getattr(tnlayers, f"{tnlayers.FORMATS[self.format].__name__}{self.kind}")

    @property
    def ndim(self) -> int:
        return KINDS[self.kind]

    @property
    def geometry(self) -> dict[str, Any]:
        """A kernel and padding, where there is a kernel."""
        return {"kernel_size": KERNELS[self.ndim], "padding": 1} if self.ndim else {}

    def make(self, **changes: Any) -> TensorLayer:
        return self.layer(*CHANNELS, **(self.geometry | self.arguments | changes))

    def __str__(self) -> str:
        shown = "-".join(f"{k}={v}".replace(" ", "") for k, v in self.arguments.items())
        return f"{self.format}-{self.kind}-{shown}"


# 8 -> 12 channels: factors (2, 2, 2) and (3, 2, 2); below also unequal numbers of factors. The first row of a format is
# held to its promises for every kind of layer, the others for convolutions in two dimensions and linear layers.
_ANY: dict[str, list[dict[str, Any]]] = {
    "cp": [{"rank": 6}, {"rank": 4, "in_shape": (4, 2)}],
    "tucker": [{"rank": 3}, {"rank": (2, 2, 3), "in_shape": (2, 4)}],
    "tt": [
        {"rank": 3},
        {"rank": 2, "in_shape": (8,), "out_shape": (2, 3, 2)},
        {"rank": 3, "layout": "chain"},
    ],
    "tr": [{"rank": 2}, {"rank": 0.7}],
    "btt": [{"rank": 2, "blocks": 3}, {"rank": 1, "blocks": 1, "in_shape": (8,), "out_shape": (6, 2)}],
    "ht": [{"rank": 3}, {"rank": 2, "in_shape": (2, 2, 2), "out_shape": (12,)}],
    "blocktt": [{"rank": 2}, {"rank": 1, "in_shape": (2, 4), "out_shape": (2, 6)}],
}
_ONE: list[tuple[str, str, dict[str, Any]]] = [
    ("tucker", "Conv1d", {"rank": (3, 4, 2)}),
    ("tucker", "Conv2d", {"rank": (3, 4, 2, 3)}),
    ("tucker", "Conv3d", {"rank": {"ri": 3, "ro": 4, "rh": 2}}),
    ("tr", "Conv2d", {"rank": (1, 2, 3, 2, 1), "in_shape": (4, 2), "out_shape": (2, 6)}),
    ("tr", "Linear", {"rank": (1, 2, 3, 2), "in_shape": (4, 2), "out_shape": (2, 6)}),
    ("einsum", "Conv1d", {"rank": 2, "network": "i1 a, a w b, b i2 o1 a c, c o2"}),
    ("einsum", "Conv2d", {"rank": 2, "network": "n:2 i1 a, n i2 b, n a b h c, n c w d, d o"}),
    ("einsum", "Conv2d", {"rank": (), "network": "o i h w"}),
    ("einsum", "Conv2d", {"rank": 3, "network": "i1 i2 a, i1 h w a o1 b, b o1 o2"}),
    ("einsum", "Conv3d", {"rank": 3, "network": "i r s, o r t, d r s t, h w r"}),
    ("einsum", "ConvTranspose1d", {"rank": 2, "network": "i1 a, a w b, b i2 o1 a c, c o2"}),
    ("einsum", "ConvTranspose2d", {"rank": (), "network": "o i h w"}),
    ("einsum", "ConvTranspose2d", {"rank": 2, "network": "n:2 i1 a, n i2 b, n a b h c, n c w d, d o"}),
    ("einsum", "ConvTranspose3d", {"rank": 3, "network": "i r s, o r t, d r s t, h w r"}),
    ("einsum", "Linear", {"rank": 2, "network": "n:2 i1 a, n i2 a b, n b o1, o2 b"}),
    ("einsum", "Linear", {"rank": (), "network": "o i"}),
]

RECURRENT = [
    (name, arguments)
    for name in tnlayers.FORMATS
    if name != "einsum"
    for arguments in _ANY.get(name, [{"rank": 2}])[:1]
] + [("einsum", {"rank": 2, "network": "n:2 i1 a, n i2 a b, n b o1, o2 b"}), ("einsum", {"rank": (), "network": "o i"})]
"""Arguments of recurrent layers of every format, for each kind of them."""

CASES = [
    Case(name, kind, arguments)
    for name in tnlayers.FORMATS
    if name != "einsum"  # whose networks are the user's
    for kind in KINDS
    for arguments in _ANY.get(name, [{"rank": 2}])[: None if kind in ("Conv2d", "Linear") else 1]
]
CASES += [Case(*row) for row in _ONE]

TABLES = ("Embedding", "EmbeddingBag")
"""What layers a format has whose inputs are indices."""

# 23 rows have no factors, and are padded where the format splits.
_VOCABULARIES: list[dict[str, Any]] = [{"num_embeddings": 12}, {"num_embeddings": 23, "padding_idx": 2}]


class TableCase(NamedTuple):
    """Arguments of an embedding or a bag."""

    format: str
    kind: str
    arguments: dict[str, Any]

    @property
    def layer(self) -> type[TensorLayer]:
        return getattr(tnlayers, f"{tnlayers.FORMATS[self.format].__name__}{self.kind}")

    def make(self, **changes: Any) -> TensorLayer:
        return self.layer(**{"embedding_dim": 8} | self.arguments | changes)

    def __str__(self) -> str:
        return f"{self.format}-{self.kind}-" + "-".join(f"{k}={v}".replace(" ", "") for k, v in self.arguments.items())


_NETWORKS = {"einsum": {"network": "n:2 i1 a, n i2 a b, n b o1, o2 b"}}

TABLE_CASES = [
    TableCase(name, kind, vocabulary | {"rank": 2} | _NETWORKS.get(name, {}))
    for name in tnlayers.FORMATS
    for kind, vocabulary in itertools.product(TABLES, _VOCABULARIES)
    if kind == "Embedding" or vocabulary is _VOCABULARIES[1]
]

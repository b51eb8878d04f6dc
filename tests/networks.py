"""Hypothesis strategies: networks and geometries drawn at random."""

from hypothesis import strategies as st

from tnlayers import Geometry, TensorNetwork


@st.composite
def networks(draw, max_cores: int = 8, max_size: int = 3) -> TensorNetwork:
    """A valid network of up to ``max_cores`` cores: dense axes on any core, bonds and hyperedges between any cores."""
    num_cores = draw(st.integers(1, max_cores))
    cores: list[list[str]] = [[] for _ in range(num_cores)]
    sizes = {}
    size = st.integers(1, max_size)
    inputs, outputs = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    dense = [f"i{k}" for k in range(1, inputs + 1)] + [f"o{k}" for k in range(1, outputs + 1)]
    for axis in dense + ["d", "h", "w"][draw(st.integers(0, 2)) :]:
        cores[draw(st.integers(0, num_cores - 1))].append(axis)
        sizes[axis] = draw(size)
    if num_cores > 1:
        for k in range(draw(st.integers(num_cores - 1, num_cores + 1))):
            ends = draw(st.sets(st.integers(0, num_cores - 1), min_size=2, max_size=min(4, num_cores)))
            for position in ends:
                cores[position].append(f"r{k}")
            sizes[f"r{k}"] = draw(size)
        for k, core in enumerate(cores):  # no core is left without an axis
            if not core:
                core.append(f"s{k}")
                cores[k - 1].append(f"s{k}")
                sizes[f"s{k}"] = draw(size)
    return TensorNetwork(tuple(tuple(draw(st.permutations(core))) for core in cores), sizes)


@st.composite
def geometries(draw, ndim: int | None = None) -> Geometry:
    """Any geometry with zero padding and a known input size."""
    ndim = draw(st.integers(1, 2)) if ndim is None else ndim

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    kernel, dilation, padding = each(1, 4), each(1, 3), each(0, 3)
    extra = each(0, 6)
    size = tuple(
        max(d * (k - 1) + 1 - 2 * p, 1) + e for d, k, p, e in zip(dilation, kernel, padding, extra, strict=True)
    )
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    return Geometry(*channels, kernel, each(1, 3), padding, dilation, groups, input_size=size)

"""The taps of a geometry, against a count of all of them."""

from hypothesis import assume, given
from hypothesis import strategies as st

from tnlayers import Geometry


@given(
    kernel=st.integers(1, 7), stride=st.integers(1, 4), dilation=st.integers(1, 4), padding=st.integers(0, 6),
    size=st.integers(1, 14), transposed=st.booleans(),
)  # fmt: skip
def test_taps_at_the_border_are_those_that_are_counted(kernel, stride, dilation, padding, size, transposed):
    geometry = Geometry(4, 4, (kernel,), stride, padding, dilation, transposed=transposed)
    try:
        (out,) = geometry.output_size((size,))
        known = Geometry(4, 4, (kernel,), stride, padding, dilation, transposed=transposed, input_size=(size,))
    except ValueError:  # the kernel is larger than the input
        assume(False)
    coarse, fine = (size, out) if transposed else (out, size)
    reads = (stride * k + dilation * tap - padding for k in range(coarse) for tap in range(kernel))
    pairs = sum(0 <= position < fine for position in reads)
    assert known.taps == (pairs / out, pairs / size)


def test_taps_of_large_kernels_take_no_time():
    """2**24 taps at as many positions, of which a count would never end."""
    geometry = Geometry(4, 4, (2**24,), 3, 2**23, padding_mode="zeros", input_size=(2**25,))
    assert 0 < geometry.taps[1] < geometry.taps[0] <= 2**24

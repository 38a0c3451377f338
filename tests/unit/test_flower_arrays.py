"""Flower's arrays, written and read with fewer copies than by its own means, hold the same bytes and values."""

import numpy as np
import pytest
from flwr.app import Array

from fedcore.flower import from_array, to_array

VALUES = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "strided": np.arange(24, dtype=np.float32).reshape(4, 6)[::2, 1::3],
    "columns first": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "integers": np.arange(5, dtype=">i2"),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("name", VALUES)
def test_written_and_read_as_flower_does(name):
    values = VALUES[name]
    written, expected = to_array(values), Array(np.ascontiguousarray(values).reshape(values.shape))
    assert (written.dtype, written.shape, written.stype, written.data) == (
        expected.dtype, expected.shape, expected.stype, expected.data
    )  # fmt: skip
    for array in (written, Array(values)):
        found = from_array(array)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)
        assert not (found.flags.writeable and np.shares_memory(found, values))


def test_other_forms_are_left_to_flower():
    data = to_array(VALUES["matrix"]).data
    with pytest.raises(TypeError, match="serialization"):
        from_array(Array("float32", (3, 4), "torch.Tensor", data))
    with pytest.raises(ValueError, match="Object arrays"):
        from_array(Array("object", (1,), "numpy.ndarray", b"\x93NUMPY\x01\x00v\x00" + _header("|O")))
    with pytest.raises(ValueError, match="buffer"):
        from_array(Array("float32", (3, 4), "numpy.ndarray", data[:-1]))


def _header(dtype):
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (1,), }}".ljust(117).encode() + b"\n" + b"." * 64

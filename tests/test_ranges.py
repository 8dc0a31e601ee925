"""Statistics of values against float16's range: exact, in every dtype and shape."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mixprec import ranges
from keras_mixprec.backend import engine
from keras_mixprec.ranges import Range

EDGES = [0.0, -0.0, 1.0, -65504.0, 65519.0, 65520.0, -1e9, np.inf, -np.inf, np.nan]
EDGES += [2.0**-13, 2.0**-14, -(2.0**-15), 2.0**-24, 1.1 * 2.0**-25, 2.0**-25, 1e-30]


def test_statistics_are_those_of_a_cast_to_float16():
    x = np.array(EDGES, "float32")
    with np.errstate(over="ignore"):
        half = x.astype("float16")
    finite = np.isfinite(x)
    smallest_normal = np.finfo("float16").smallest_normal
    r = ranges.merged([ops.convert_to_numpy(ranges.measure(ops.convert_to_tensor(x)))])
    small = (np.abs(half) < smallest_normal) & (half != 0)
    assert r == Range(
        values=17,
        nonfinite=3,
        beyond=int((finite & ~np.isfinite(half)).sum()),
        subnormal=int(small.sum()),
        to_zero=int(((half == 0) & (x != 0)).sum()),
        zero=2,
        max_abs=float(np.float32(1e9)),
        min_abs=float(np.float32(1e-30)),
    )
    assert (r.beyond, r.subnormal, r.to_zero) == (2, 3, 2)


@pytest.mark.parametrize("values", [[], [0.0], [np.nan]])
def test_statistics_of_nothing(values):
    row = ranges.measure(ops.convert_to_tensor(np.array(values, "float16")))
    r = ranges.merged([ops.convert_to_numpy(row)])
    if not values:
        assert r is None
    else:
        assert (r.max_abs, r.min_abs, r.values) == (0.0, None, 1)


def test_numpy_counts_the_same():
    x = np.array(EDGES, "float32")
    row = ops.convert_to_numpy(ranges.measure(ops.convert_to_tensor(x)))
    np.testing.assert_array_equal(ranges.measure_array(x), row)
    assert ranges.measure_array(np.zeros((0, 3)))[0] == 0


def values(shape, seed, smallest=-30, largest=18):
    """Values of all magnitudes, some of them 0, inf or NaN."""
    random = np.random.default_rng(seed)
    x = random.normal(size=shape) * 2.0 ** random.uniform(smallest, largest, shape)
    x[random.uniform(size=shape) < 0.1] = 0.0
    x[random.uniform(size=shape) < 0.01] = np.inf
    x[random.uniform(size=shape) < 0.01] = np.nan
    return x.astype("float32")


# Rows that do and do not fill what is measured at once; primes; several parts.
SHAPES = [(3,), (64, 2), (17, 129), (2, 3, 512), (8191,), (1024, 40), (16, 1024, 600)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tensors_of_any_shape_on_their_way_to_the_optimizer(dtype):
    arrays = [values(shape, seed) for seed, shape in enumerate([*SHAPES, *SHAPES[:3]])]
    with np.errstate(over="ignore"):
        tensors = [ops.cast(ops.convert_to_tensor(a), dtype) for a in arrays]
    arrays = [ops.convert_to_numpy(ops.cast(t, "float32")) for t in tensors]
    carrier = engine.carrier([], 1)
    rows = carrier.rows(lambda variable: None, [tensors[0], None, *tensors[1:]])
    rows = ops.convert_to_numpy(rows)
    assert rows.shape == (len(arrays) + 1, len(ranges.FIELDS))
    assert ranges.merged([rows[1]]) is None
    for row, array in zip(np.delete(rows, 1, 0), arrays, strict=True):
        expected = ranges.merged([ranges.measure_array(array)])
        assert ranges.merged([row]) == expected


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch writes in place")
def test_what_is_written_over_later_was_measured_before():
    carrier = engine.carrier(["layer"], 1)
    x = ops.convert_to_tensor(np.full(3, 2.0, "float32"))
    x = carrier.tap(0, 0, x)
    x += 100.0
    rows = ops.convert_to_numpy(carrier.rows(lambda variable: None, []))
    assert ranges.merged([rows[0]]) == Range(3, 0, 0, 0, 0, 0, 2.0, 2.0)


@pytest.mark.parametrize(("dtype", "unused_bits"), [("bfloat16", 16), ("float32", 0)])
@pytest.mark.parametrize("times", [1, 200], ids=["small", "large"])
def test_denormals_are_no_zeros(dtype, unused_bits, times):
    array = np.tile(np.arange(1, 128, dtype="uint32") << unused_bits, times)
    array = array.view("float32")
    tensor = ops.cast(ops.convert_to_tensor(array), dtype)
    rows = engine.carrier([], 1).rows(lambda variable: None, [tensor])
    found = ranges.merged(ops.convert_to_numpy(rows))
    assert found == ranges.merged([ranges.measure_array(array)])
    assert (found.zero, found.min_abs) == (0, float(array[0]))


def test_of_many_large_weights_none_is_lost():
    arrays = [np.full((128, 129), i, "float32") for i in range(1, 20)]
    grads = [ops.convert_to_tensor(a) for a in arrays]
    carrier = engine.carrier([], 1)
    rows = ops.convert_to_numpy(carrier.rows(lambda variable: None, grads))
    expected = np.stack([ranges.measure_array(a) for a in arrays])
    np.testing.assert_array_equal(rows, expected)

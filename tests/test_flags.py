"""Which gradients overflowed: in every shape, wherever in it, and no others."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_mixprec.backend import LARGEST_NORM
from keras_mixprec.backend import LARGEST_SCALED_NORM
from keras_mixprec.backend import engine
from keras_mixprec.backend import shapes

BACKEND = keras.backend.backend()
# Small ones, some of one shape; a prime size; one row short of a row; many rows; two of
# convolutions.
SHAPES = [
    (),
    (3,),
    (3,),
    (0, 4),
    (7, 1),
    (1031,),
    (2, 512),
    (5, 205),
    (64, 3, 64),
    (9973, 3),
    (3, 3, 16, 16),
    (3, 3, 16, 16),
]
BAD = [np.nan, np.inf, -np.inf, 3e38]


@functools.lru_cache
def ways():
    """The functions of gradients and scale that the backend has, each compiled once."""
    if BACKEND == "torch":
        return [engine._flags]
    if BACKEND == "jax":
        import jax

        return [jax.jit(engine.flags), jax.jit(engine.flags_by_block)]
    import tensorflow as tf

    from keras_mixprec.backend import tensorflow_overflow as overflow

    return [
        tf.function(functools.partial(overflow.flags, xla=False)),
        tf.function(functools.partial(divided_first, overflow.flags)),
        tf.function(functools.partial(overflow.flags, xla=True), jit_compile=True),
        tf.function(overflow.flags_by_block, jit_compile=True),
    ]


def divided_first(flags, grads, scale):
    quotients = [g if g is None else engine.unscale([g], scale)[0] for g in grads]
    return flags(quotients, scale, xla=False, divided=True)


def flags(arrays, scale=1.0):
    grads = [a if a is None else ops.convert_to_tensor(a) for a in arrays]
    scale = ops.convert_to_tensor(scale, "float32")
    return agreed(grads, scale)


def agreed(grads, scale):
    found = [ops.convert_to_numpy(way(grads, scale)).tolist() for way in ways()]
    assert all(one == found[0] for one in found)
    return found[0]


def gradients(dtype="float32"):
    random = np.random.default_rng(0)
    return [random.normal(size=shape).astype(dtype) for shape in SHAPES]


def test_no_gradient_is_flagged_without_reason():
    assert not any(flags(gradients()))


@pytest.mark.parametrize("place", ["first", "last"])
def test_each_gradient_is_flagged_alone(place):
    for i, shape in enumerate(SHAPES):
        if 0 in shape:
            continue
        grads = gradients()
        grads[i].reshape(-1)[0 if place == "first" else -1] = BAD[i % len(BAD)]
        assert flags(grads) == [k == i for k in range(len(SHAPES))], shape


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has a gradient for everything")
def test_a_gradient_that_is_not_there_is_not_flagged():
    grads = [None, np.float32([np.inf]), None, np.float32([1.0])]
    assert flags(grads) == [False, True, False, False]


def test_the_limit_is_that_of_the_norm_and_grows_with_the_scale():
    below, above = LARGEST_NORM, 2 * LARGEST_NORM
    grads = [np.float32([below, 0.0]), np.float32([above, 0.0])]
    assert flags(grads) == [False, True]
    assert flags(grads, scale=4.0) == [False, False]


def test_a_scaled_gradient_has_to_be_squared_itself():
    below, above = LARGEST_SCALED_NORM, 2 * LARGEST_SCALED_NORM
    grads = [np.float32([below, 0.0]), np.float32([above, 0.0])]
    assert flags(grads, scale=2.0**24) == [False, True]


def test_half_precision_gradients_are_squared_in_float32():
    # 2.0**12 squared is beyond float16.
    assert flags([np.full((2000,), 2.0**12, "float16")]) == [False]


def test_each_of_many_gradients_is_flagged_alone():
    # More than one kernel takes: small ones, large ones of several lengths, and two
    # that are alone with their dtype.
    sizes = [(7,), (1100,), (3, 3000), (2, 3, 8, 50)]
    arrays = [np.ones(sizes[i % 4], "float32") for i in range(300)]
    arrays += [np.ones((2000,), "float16"), np.ones((2,), "float16")]
    bad = range(0, len(arrays), 29)
    for i in bad:
        arrays[i].reshape(-1)[-1] = np.nan
    assert flags(arrays) == [i in bad for i in range(len(arrays))]


@pytest.mark.parametrize("place", [0, -1])
def test_a_gradient_of_more_rows_than_are_summed_up_at_last(place):
    large = np.zeros((2**23 + 1,), "float32")
    large[place] = np.inf
    assert flags([large, np.ones((2000,), "float32")]) == [True, False]


@pytest.mark.parametrize(
    ("shape", "rows", "length"),
    [
        ((), 0, 1),
        ((1024,), 0, 1024),
        ((3, 3, 4, 4), 0, 144),
        ((5, 205), 1, 8192),
        ((768, 3072), 288, 8192),
        ((1_000_003,), 123, 8192),
        ((None, 64), 1, None),
    ],
)
def test_gradients_are_laid_out_in_rows(shape, rows, length):
    found = shapes.blocks([None, keras.KerasTensor(shape)])
    assert found == [shapes.Block([1], [rows], length)]
    assert shapes.order(found, 3) == [0, 1, 0]


def test_one_kernel_takes_what_it_can_read_at_once():
    of = {"w": (100, 100), "v": (3, 1000), "b": (8,), "c": (9,), "table": (10**6, 8)}
    names = ["w", "b", "table", "v", "w", "c", "table", "b"]
    grads = [keras.KerasTensor(of[name]) for name in names]
    grads.append(keras.KerasTensor((3000,), "float16"))
    members = [block.members for block in shapes.blocks(grads)]
    assert members == [[3, 0, 4], [1, 7], [2], [5], [6], [8]]
    runs = [block.runs() for block in shapes.blocks(grads)]
    assert runs[:2] == [[(1, 1), (2, 2)], [(2, 0)]]
    many = shapes.blocks([keras.KerasTensor((2000,))] * 150)
    assert [len(block.members) for block in many] == [64, 64, 22]


# Attention's and a perceptron's; and what has no rows of its own worth a kernel.
MANY = {"query": (768, 12, 64), "output": (12, 64, 768), "dense": (768, 3072)}
OTHERS = {"kernel": (3, 3, 256, 512), "narrow": (50_000, 100), "long": (60, 70_000)}


@pytest.mark.parametrize(
    ("name", "rows", "length", "axes"),
    [
        ("query", 768, 768, (1, 2)),
        ("output", 768, 768, (2,)),
        ("dense", 768, 3072, (1,)),
        ("kernel", 144, 8192, ()),
        ("narrow", 611, 8192, ()),
        ("long", 513, 8192, ()),
    ],
)
def test_many_values_are_summed_up_along_their_own_rows(name, rows, length, axes):
    shape = (MANY | OTHERS)[name]
    number = 2**22 // math.prod(shape) + 1
    found = shapes.blocks([keras.KerasTensor(shape)] * number)
    assert found[0] == shapes.Block([*range(number)], [rows] * number, length, axes)
    if axes and number > 1:
        # One less, and it is not worth a kernel of its own.
        (few,) = shapes.blocks([keras.KerasTensor(shape)] * (number - 1))
        assert (few.length, few.axes) == (8192, ())


def test_gradients_of_another_first_axis_are_summed_up_with_them():
    grads = [keras.KerasTensor(s) for s in [(768, 3072), (512, 3072), (8, 3072)]]
    grads = [grads[0], *grads, (keras.KerasTensor((3072, 2), "float32"))]
    found = shapes.blocks(grads)
    assert found[0] == shapes.Block([3, 2, 0, 1], [8, 512, 768, 768], 3072, (1,))
    assert [block.members for block in found] == [[3, 2, 0, 1], [4]]


@pytest.mark.parametrize("bad", [(), (0,), (5, 9), (13, 14)])
def test_each_of_many_is_flagged_alone_along_its_own_rows(bad, monkeypatch):
    monkeypatch.setattr(shapes, "_LARGE", 2**20)
    # As attention's kernels, those of one perceptron, and one more of a shorter axis.
    kinds = [(512, 8, 64), (8, 64, 512), (512, 2048)]
    arrays = [np.zeros(kinds[i % 3], "float32") for i in range(14)]
    arrays += [np.zeros((3, 2048), "float32")]
    axes = [block.axes for block in shapes.blocks(arrays)]
    assert sorted(axes) == [(1,), (1, 2), (2,)]
    for i in bad:
        arrays[i].reshape(-1)[[0, -1][i % 2]] = np.inf
    assert flags(arrays) == [i in bad for i in range(len(arrays))]


def test_many_small_variables_of_one_shape_share_a_decision():
    def variables(shape, number):
        return [keras.KerasTensor(shape)] * number

    few, many = variables((9,), 7), variables((16,), 8)
    others = variables((), 20) + variables((1,), 20) + variables((100, 100), 20)
    assert shapes.shared(few + many + others) == {(16,)}


if BACKEND == "tensorflow":

    def test_only_the_values_of_a_sparse_gradient_are_looked_at():
        import tensorflow as tf

        values = tf.constant([[1.0, np.inf], [2.0, 3.0]])
        sparse = tf.IndexedSlices(values, tf.constant([5, 5]), tf.constant([10**9, 2]))
        scale = tf.constant(1.0)
        assert agreed([tf.constant([1.0]), sparse], scale) == [False, True]

    def test_sparse_gradients_of_unknown_lengths_are_no_shape_together():
        # Two tables of one width: how many rows a batch takes, XLA knows when it
        # compiles, and they differ.
        import tensorflow as tf

        from keras_mixprec.backend import tensorflow_overflow as overflow

        rows = tf.TensorSpec((None, 3), tf.float32)
        flags_of = tf.function(
            lambda *grads: overflow.flags_by_block(list(grads), tf.constant(1.0)),
            input_signature=[rows, rows],
            jit_compile=True,
        )
        bad = tf.constant([[1.0, 2.0, np.nan]])
        assert flags_of(tf.ones((5, 3)), bad).numpy().tolist() == [False, True]


def test_gradients_of_all_shapes_are_divided_alike():
    random = np.random.default_rng(0)
    kinds = ["float32", "float16"] if BACKEND == "jax" else ["float32", "float64"]
    arrays = [
        2.0 ** random.integers(-8, 8, size=shape)
        for shape in [*SHAPES, (1024,), (1025,)]
    ]
    for kind in kinds:
        grads = [ops.convert_to_tensor(np.asarray(a, kind)) for a in arrays]
        grads += [ops.convert_to_tensor(np.float32([4.0, 8.0]))]
        divided = engine.unscale(grads, ops.convert_to_tensor(4.0, "float32"))
        for array, found in zip([*arrays, np.array([4.0, 8.0])], divided, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(found), array / 4)
            assert tuple(found.shape) == array.shape


@pytest.mark.parametrize(
    ("scale", "size", "dtype"),
    [
        (2.0**-126, 2.0**-120, "float32"),
        (2.0**-14, 1.0, "float32"),
        (2.0**15, 2.0**-10, "float16"),
        (2.0**15, 2.0**-10, "float64"),
        (2.0**126, 2.0**100, "float32"),
    ],
)
def test_gradients_are_divided_exactly_by_powers_of_two(scale, size, dtype):
    if BACKEND == "jax" and dtype == "float64":
        pytest.skip("JAX has no float64 unless asked for")
    gradient = (np.array([1.0, -1.5, 1.0 + 2.0**-10, 0.0]) * size).astype(dtype)
    (found,) = engine.unscale(
        [ops.convert_to_tensor(gradient)], ops.convert_to_tensor(scale, "float32")
    )
    found = ops.convert_to_numpy(found)
    assert found.dtype == ("float64" if dtype == "float64" else "float32")
    expected = np.array([1.0, -1.5, 1.0 + 2.0**-10, 0.0]) * size / scale
    np.testing.assert_array_equal(found, expected)

"""Gradients of looked-up rows: added up in float32, and not written out on a GPU."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_mixprec as mp
from keras_mixprec.backend import engine
from keras_mixprec.backend import looked_up

BACKEND = keras.backend.backend()
ROWS, WIDTH, LENGTH = 1000, 16, 64
# From the end, too; and one that a batch asks for more often than float16 can count.
RANDOM = np.random.default_rng(0).integers(-3, 40, size=(2, LENGTH)).astype("int32")


def upstream(y_true, y_pred):
    """A loss whose gradient by the outputs is the targets."""
    return ops.sum(y_true * ops.cast(y_pred, "float32"))


def compiled(model, optimizer=None, scale=1.0):
    inner = optimizer or keras.optimizers.SGD(1.0)
    optimizer = mp.LossScaleOptimizer(inner, initial_scale=scale)
    # On torch it would be `torch.compile`.
    model.compile(optimizer, upstream, jit_compile=BACKEND != "torch")
    return model


def table_model(policy="mixed_float16", length=LENGTH, rows=ROWS):
    ids = keras.Input((length,), dtype="int32")
    return keras.Model(ids, layers.Embedding(rows, WIDTH, dtype=policy)(ids))


def moved(model, x, y, steps=1):
    """Return what some steps add to each weight."""
    before = [np.array(ops.convert_to_numpy(v)) for v in model.trainable_weights]
    for _ in range(steps):
        model.train_on_batch(x, y)
    now = [np.array(ops.convert_to_numpy(v)) for v in model.trainable_weights]
    return [b - a for a, b in zip(before, now, strict=True)]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a GPU, where a table as small as those here is worth it. Counts uses."""
    calls = []

    def counted(found, rows):
        calls.append(tuple(rows.shape))
        return gradient(found, rows)

    gradient = looked_up.gradient
    monkeypatch.setattr(looked_up, "gradient", counted)
    monkeypatch.setattr(looked_up, "_LARGE", 0)
    monkeypatch.setattr(looked_up, "_ROWS", LENGTH)
    if BACKEND == "jax":
        monkeypatch.setattr(engine, "_fuses", lambda: True)
    elif BACKEND == "tensorflow":
        from keras_mixprec.backend import tensorflow_slices

        monkeypatch.setattr(tensorflow_slices, "gpus", lambda: ["one"])
    return calls


# A float32 model on a CPU adds up in half there, as Keras does.
NOT_ON_TORCH = pytest.mark.skipif(BACKEND == "torch", reason="left to Keras")


@NOT_ON_TORCH
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_a_row_that_is_looked_up_often_gets_its_whole_gradient(policy):
    model = compiled(table_model(policy, length=4096))
    x, y = np.full((1, 4096), 7, "int32"), np.ones((1, 4096, WIDTH), "float32")
    model.layers[-1].embeddings.assign(np.zeros((ROWS, WIDTH)))
    (step,) = moved(model, x, y)
    # In half precision 2048 and 1 are 2048, or 256 and 1 are 256.
    assert (step[7] == -4096).all()
    assert not np.delete(step, 7, axis=0).any()


@NOT_ON_TORCH
def test_sums_are_not_rounded_to_float16_nor_end_where_it_ends():
    model = compiled(table_model())
    model.layers[-1].embeddings.assign(np.zeros((ROWS, WIDTH)))
    x, y = np.full((1, LENGTH), 7, "int32"), np.zeros((1, LENGTH, WIDTH), "float32")
    y[0, :3] = [[2.0**15], [2.0**15], [1.0]]
    (step,) = moved(model, x, y)
    assert (step[7] == -(2.0**16) - 1).all()
    assert model.optimizer.overflow_count == 0


@pytest.mark.parametrize(
    "table, number, pays",
    [
        # The benchmark's recommender, and BERT-base.
        ((1_000_000, 64), 4096 * 26, True),
        ((30522, 768), 64 * 128, True),
        ((30522, 768), None, False),
        ((1_000_000, 64), None, True),
        # Small; a number for each id; half as many rows as were looked up.
        ((1000, 64), 10, False),
        ((10**8, 1), 10, False),
        ((2**17, 64), 2**16, False),
        ((2**17, 64), 2**15, True),
    ],
)
def test_it_is_left_to_what_reads_it_where_that_pays(table, number, pays):
    assert looked_up.pays(table, number) == pays


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("ids", ["int32", "int64"])
def test_the_gradient_is_the_sum_of_each_ids_rows(dtype, ids):
    if BACKEND == "jax" and ids == "int64":
        pytest.skip("JAX has no int64 unless asked for")
    random = np.random.default_rng(1)
    # Some are in no row of the table.
    asked = random.integers(-2, 12, size=50)
    rows = 2.0 ** random.integers(-3, 4, size=(50, 3, 2))
    expected = np.zeros((10, 3, 2))
    known = (asked >= 0) & (asked < 10)
    np.add.at(expected, asked[known], rows[known])
    found = looked_up.lookups(ops.convert_to_tensor(asked, ids), 10)
    gradient, sums = looked_up.gradient(found, ops.convert_to_tensor(rows, dtype))
    assert keras.backend.standardize_dtype(gradient.dtype) == "float32"
    gradient, sums = (ops.convert_to_numpy(x) for x in (gradient, sums))
    np.testing.assert_array_equal(gradient, expected)
    assert sums.shape == (51, 3, 2)
    assert np.square(sums).sum() == np.square(expected).sum()


def test_a_gradient_that_is_not_finite_stays_where_it_is():
    found = looked_up.lookups(ops.convert_to_tensor([3, 1, 3]), 5)
    rows = ops.convert_to_tensor([[1.0], [2.0], [np.inf]])
    gradient, _ = looked_up.gradient(found, rows)
    expected = [[0.0], [2.0], [0.0], [np.inf], [0.0]]
    np.testing.assert_array_equal(ops.convert_to_numpy(gradient), expected)


def trained(make, seed=0):
    keras.utils.set_random_seed(seed)
    model = make()
    random = np.random.default_rng(seed)
    y = random.normal(size=(2, *model.output.shape[1:])).astype("float32")
    return model, moved(model, RANDOM, y, steps=3)


if BACKEND != "torch":

    @pytest.mark.parametrize("policy", ["mixed_float16", "float32"])
    @pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "clipped"])
    def test_a_gpu_and_a_cpu_learn_the_same(optimizer, policy, request):
        def make():
            clipped = keras.optimizers.Adam(global_clipnorm=0.1)
            inner = clipped if optimizer == "clipped" else optimizer
            ids = keras.Input((LENGTH,), dtype="int32")
            x = layers.Embedding(ROWS, WIDTH, dtype=policy)(ids)
            x = layers.Dense(3, dtype="mixed_float16")(x)
            model = keras.Model(ids, x)
            return compiled(model, keras.optimizers.get(inner), scale=2.0**4)

        _, on_cpu = trained(make)
        calls = request.getfixturevalue("on_a_gpu")
        model, on_gpu = trained(make)
        # Keras's SGD adds the rows of a sparse gradient as they are.
        sparse = BACKEND == "tensorflow" and optimizer == "sgd"
        assert bool(calls) != sparse
        assert model.optimizer.overflow_count == 0
        for a, b in zip(on_cpu, on_gpu, strict=True):
            assert np.abs(a).max() > 0
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    def test_an_overflow_in_a_row_is_seen(on_a_gpu):
        model = compiled(table_model(), keras.optimizers.Adam())
        y = np.zeros((2, LENGTH, WIDTH), "float32")
        y[1, -1, -1] = np.inf
        (step,) = moved(model, RANDOM, y)
        assert not step.any()
        assert model.optimizer.overflow_counts == {"embedding/embeddings": 1}
        assert on_a_gpu

    def test_a_table_that_is_used_twice_gets_both_gradients(on_a_gpu):
        ids = keras.Input((LENGTH,), dtype="int32")
        table = layers.Embedding(ROWS, WIDTH, dtype="mixed_float16")
        table.build()
        total = ops.add(table(ids), ops.flip(table(ids), axis=1))
        model = compiled(keras.Model(ids, total), keras.optimizers.SGD(1.0, 0.5))
        y = np.ones((2, LENGTH, WIDTH), "float32")
        (step,) = moved(model, RANDOM, y)
        counts = np.bincount(RANDOM.reshape(-1) % ROWS, minlength=ROWS)
        np.testing.assert_allclose(step, -2.0 * counts[:, None] * np.ones(WIDTH))
        assert on_a_gpu

    @pytest.mark.parametrize("remat", [None, "full"])
    def test_one_batch_looks_up_in_two_tables(remat, on_a_gpu):
        ids = keras.Input((LENGTH,), dtype="int32")
        with keras.RematScope(mode=remat):
            tables = [
                layers.Embedding(rows, WIDTH, dtype="mixed_float16")
                for rows in (ROWS, 2 * ROWS)
            ]
            total = ops.add(*[table(ids) for table in tables])
        model = compiled(keras.Model(ids, total), keras.optimizers.SGD(1.0, 0.5))
        x = RANDOM % 40
        steps = moved(model, x, np.ones((2, LENGTH, WIDTH), "float32"))
        for step, rows in zip(steps, (ROWS, 2 * ROWS), strict=True):
            counts = np.bincount(x.reshape(-1), minlength=rows)
            np.testing.assert_allclose(step, -1.0 * counts[:, None] * np.ones(WIDTH))
        assert len(on_a_gpu) >= 2


if BACKEND == "jax":
    import jax

    def looked_at(monkeypatch):
        seen = []

        def seeing(grads, scale):
            seen[:] = [tuple(g.shape) for g in grads]
            return look(grads, scale)

        look = engine.flags_by_block
        monkeypatch.setattr(engine, "flags_by_block", seeing)
        return seen

    def test_only_the_sums_are_looked_at(on_a_gpu, monkeypatch):
        seen = looked_at(monkeypatch)
        model = compiled(table_model())
        moved(model, RANDOM, np.ones((2, LENGTH, WIDTH), "float32"))
        assert seen == [(2 * LENGTH + 1, WIDTH)]
        assert "call" not in vars(model.layers[-1])

    def test_of_a_gradient_with_more_in_it_all_is_looked_at(on_a_gpu, monkeypatch):
        seen = looked_at(monkeypatch)
        ids = keras.Input((LENGTH,), dtype="int32")
        x = layers.Embedding(
            ROWS, WIDTH, dtype="mixed_float16", embeddings_regularizer="l2"
        )(ids)
        model = compiled(keras.Model(ids, x))
        moved(model, RANDOM, np.ones((2, LENGTH, WIDTH), "float32"))
        assert on_a_gpu and seen == [(ROWS, WIDTH)]

    def test_sums_are_rounded_like_the_gradient_of_a_float16_table(on_a_gpu):
        model = compiled(table_model("float16"), keras.optimizers.SGD(0.1, clipvalue=1))
        x, y = np.full((1, LENGTH), 7), np.full((1, LENGTH, WIDTH), 2000.0)
        (step,) = moved(model, x, y)
        assert on_a_gpu and model.optimizer.overflow_count == 1 and not step.any()

    def test_a_train_step_of_ones_own_may_ask_for_any_derivative(on_a_gpu):
        class Curved(keras.Model):
            def train_step(self, state, data):
                x, y, _ = keras.utils.unpack_x_y_sample_weight(data)

                def loss(trainable):
                    return upstream(y, self.stateless_call(trainable, state[1], x)[0])

                # Forward over reverse, which a function with a gradient of its own
                # does not know.
                jax.jvp(jax.grad(loss), (state[0],), (state[0],))
                return super().train_step(state, data)

        inner = table_model()
        model = compiled(Curved(inner.inputs, inner.outputs))
        (step,) = moved(model, RANDOM, np.ones((2, LENGTH, WIDTH), "float32"))
        assert step.any() and not on_a_gpu

    def test_a_function_that_was_traced_in_a_step_has_a_gradient_outside(on_a_gpu):
        from keras_mixprec.backend import jax_lookups

        with jax_lookups.own_lookups(compiled(table_model()), True):
            rows = jax.jit(jax_lookups._rows)
            rows(jax.numpy.zeros((ROWS, WIDTH)), jax.numpy.arange(3))
        gradient = jax.grad(lambda t: rows(t, jax.numpy.arange(3)).sum())
        found = gradient(jax.numpy.zeros((ROWS, WIDTH)))
        assert found.sum() == 3 * WIDTH and jax_lookups._trace.sums is None

    def test_elements_of_a_map_are_looked_up_as_keras_does(on_a_gpu):
        class Mapped(layers.Layer):
            def __init__(self):
                super().__init__(dtype="mixed_float16")
                self.table = layers.Embedding(ROWS, WIDTH, dtype="mixed_float16")

            def build(self, shape):
                self.table.build()

            def call(self, ids):
                return ops.vectorized_map(self.table, ids)

        ids = keras.Input((LENGTH,), dtype="int32")
        model = compiled(keras.Model(ids, Mapped()(ids)))
        (step,) = moved(model, RANDOM, np.ones((2, LENGTH, WIDTH), "float32"))
        assert step.any() and not on_a_gpu

    def test_weights_of_a_models_own_stay_as_keras_reads_them():
        class Own(keras.Model):
            def build(self, shape):
                self.scale = self.add_weight(name="scale", initializer="ones")

            def call(self, x):
                self.read = keras.backend.standardize_dtype(self.scale.value.dtype)
                return x * self.scale

        model = Own(dtype="mixed_float16")
        compiled(model)
        model.train_on_batch(np.ones((2, 3), "float32"), np.ones((2, 3), "float32"))
        assert model.read == "float32"

    class Doubled(layers.Embedding):
        """A layer with a call of its own."""

        def call(self, inputs):
            return 2 * super().call(inputs)

    def with_lora():
        layer = layers.Embedding(ROWS, WIDTH, dtype="mixed_float16")
        layer.build()
        layer.enable_lora(2)
        return layer

    @pytest.mark.parametrize(
        "make",
        [lambda: Doubled(ROWS, WIDTH, dtype="mixed_float16"), with_lora],
        ids=["own call", "lora"],
    )
    def test_other_embeddings_keep_their_call(make, on_a_gpu):
        ids = keras.Input((LENGTH,), dtype="int32")
        model = compiled(keras.Model(ids, make()(ids)))
        steps = moved(model, RANDOM, np.ones((2, LENGTH, WIDTH), "float32"))
        assert any(step.any() for step in steps) and not on_a_gpu

    @pytest.mark.parametrize("how", [{"run_eagerly": True}, {"jit_compile": False}])
    def test_a_step_that_is_not_compiled_is_left_to_keras(how, on_a_gpu):
        model = table_model()
        optimizer = mp.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=1.0)
        model.compile(optimizer, upstream, **how)
        (step,) = moved(model, RANDOM, np.ones((2, LENGTH, WIDTH), "float32"))
        assert step.any() and not on_a_gpu

    def test_tables_split_over_devices_are_left_to_keras(on_a_gpu):
        with keras.distribution.DataParallel(devices=["cpu:0"]).scope():
            model = compiled(table_model())
            (step,) = moved(model, RANDOM, np.ones((2, LENGTH, WIDTH), "float32"))
        assert step.any() and not on_a_gpu


if BACKEND == "tensorflow":
    import tensorflow as tf

    from keras_mixprec.backend.tensorflow_xla import compiling

    def slices(number=None):
        rows = tf.ones((number or 4, WIDTH))
        ids = tf.constant([1, 5, 5, 2][:number])
        return tf.IndexedSlices(rows, ids, tf.constant([ROWS, WIDTH]))

    def test_tensorflow_makes_a_tensor_of_it_outside_of_our_step(on_a_gpu):
        def made():
            return [tf.convert_to_tensor(slices(), d) for d in (None, "float32")]

        expected = made()
        with compiling(True):
            np.testing.assert_array_equal(made(), expected)
        np.testing.assert_array_equal(tf.function(made)(), expected)
        assert not on_a_gpu
        with compiling(True):
            found = tf.function(made, jit_compile=True)()
        assert len(on_a_gpu) == 2
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_the_tensor_is_of_the_slices_dtype(dtype, on_a_gpu):
        def made():
            sparse = tf.IndexedSlices(
                tf.cast(slices().values, dtype), slices().indices, slices().dense_shape
            )
            # As the gradients of a table that is looked up in and multiplied by.
            return tf.convert_to_tensor(sparse) + tf.ones((ROWS, WIDTH), dtype)

        with compiling(True):
            found = tf.function(made, jit_compile=True)()
        assert on_a_gpu and found.dtype == dtype
        assert found.numpy()[:6, 0].tolist() == [1, 2, 2, 1, 1, 3]

    def test_rows_of_an_unknown_rank_are_left_to_tensorflow(on_a_gpu):
        @tf.function(input_signature=[tf.TensorSpec(None)])
        def made(rows):
            shape = tf.constant([ROWS, WIDTH])
            return tf.convert_to_tensor(tf.IndexedSlices(rows, tf.constant([3]), shape))

        with compiling(True):
            assert made(tf.ones((1, WIDTH))).shape == (ROWS, WIDTH)
        assert not on_a_gpu

    def test_what_cannot_be_converted_raises_as_before(on_a_gpu):
        with tf.Graph().as_default(), compiling(True):
            with pytest.raises(ValueError, match="Incompatible tensor conversion"):
                tf.convert_to_tensor(slices(), tf.int32)
            shapeless = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]))
            with pytest.raises(ValueError, match="without dense_shape"):
                tf.convert_to_tensor(shapeless)
        assert not on_a_gpu

    def test_one_batch_is_sorted_into_places_once(on_a_gpu, monkeypatch):
        made = []
        lookups = looked_up.lookups

        def counted(ids, length):
            made.append(length)
            return lookups(ids, length)

        monkeypatch.setattr(looked_up, "lookups", counted)
        model = compiled(table_model(), keras.optimizers.Adam())
        moved(model, RANDOM, np.ones((2, LENGTH, WIDTH), "float32"))
        # Adam asks for the gradient and for its square.
        assert len(on_a_gpu) == 2 * len(made) > 0

    def test_gradients_are_accumulated(on_a_gpu):
        inner = keras.optimizers.Adam(0.25, gradient_accumulation_steps=2)
        model = compiled(table_model(), inner)
        y = np.ones((2, LENGTH, WIDTH), "float32")
        (step,) = moved(model, RANDOM, y, steps=2)
        assert on_a_gpu and step.any()

    def test_both_branches_of_a_condition(on_a_gpu):
        @tf.function(jit_compile=True)
        def made(flag):
            sparse = slices()
            either = tf.cond(
                flag,
                lambda: tf.convert_to_tensor(sparse),
                lambda: 2 * tf.convert_to_tensor(sparse),
            )
            return either + tf.convert_to_tensor(sparse)

        with compiling(True):
            found = made(tf.constant(False))
        np.testing.assert_array_equal(found, 3 * tf.convert_to_tensor(slices()))

    def test_batches_of_unknown_size(on_a_gpu):
        model = compiled(table_model(), keras.optimizers.Adam(0.25))
        x = np.arange(3 * LENGTH).reshape(3, LENGTH) % 40
        y = np.ones((3, LENGTH, WIDTH), "float32")
        before = model.get_weights()[0]
        # Batches of two samples and of one.
        model.fit(x, y, batch_size=2, verbose=0)
        assert (None, WIDTH) in on_a_gpu
        step = model.get_weights()[0] - before
        assert (step[:40] < -0.2).all() and not step[40:].any()

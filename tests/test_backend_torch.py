"""torch: what only an accelerator does, done on a CPU."""

import functools
import gc
import types
import weakref

import keras
import numpy as np
import pytest
from support import assert_overflows_are_skipped
from support import assert_skipped_whole
from support import classifier
from support import compiled
from support import data
from support import half_classifier
from torch_counts import constants_of
from torch_counts import operations_of

if keras.backend.backend() != "torch":
    pytest.skip("torch's own way of restoring", allow_module_level=True)

import torch  # noqa: E402

import keras_mixprec as mp  # noqa: E402
from keras_mixprec import ranges  # noqa: E402
from keras_mixprec.backend import engine  # noqa: E402
from keras_mixprec.backend import torch_backup  # noqa: E402
from keras_mixprec.backend import torch_carrier  # noqa: E402
from keras_mixprec.ranges import FIELDS  # noqa: E402

VALUES = [
    torch.tensor([1.5, -0.0, torch.nan, torch.inf]),
    torch.tensor(3.0),
    torch.arange(12.0).reshape(3, 4).T,  # Not contiguous.
    torch.tensor([1.0, torch.nan], dtype=torch.float16),
    torch.tensor([7, -(2**62)], dtype=torch.int64),
    torch.tensor([True, False]),
    torch.tensor([1 - 2j, 3j], dtype=torch.complex128),
    torch.tensor(1 - 2j, dtype=torch.complex128),
]


def bits(variables):
    return [v.value.detach().contiguous().numpy().tobytes() for v in variables]


def spoil(variables):
    for variable in variables:
        with torch.no_grad():
            variable.value.fill_(torch.nan if variable.dtype[:5] == "float" else 1)


def variables_of_every_kind():
    return [
        keras.Variable(
            v.clone(memory_format=torch.preserve_format),
            dtype=str(v.dtype)[6:],
            trainable=v.is_floating_point(),
        )
        for v in VALUES
    ]


@pytest.fixture
def owner():
    """What lives as long as the variables do."""
    return types.SimpleNamespace()


@pytest.fixture
def device_copies(monkeypatch):
    """What only a GPU does: it copies on a condition. Yields the conditions."""
    asked = []

    def copy_unless(kept, targets, sources):
        asked.append(float(kept))
        for target, source in zip(targets, sources, strict=True):
            assert target.dtype == source.dtype
            assert target.dtype in (torch.float32, torch.float64)
            if not kept:
                target.copy_(source)

    monkeypatch.setattr(torch_backup, "copy_unless", copy_unless)
    monkeypatch.setattr(torch_backup, "copies_unless", lambda device: True)
    return asked


@pytest.mark.parametrize("skipped", [True, False])
def test_what_the_device_copies_comes_back_in_every_bit(skipped, device_copies, owner):
    variables = variables_of_every_kind()
    for _ in range(2):  # The second time in the memory that was kept.
        before = bits(variables)
        with torch_backup.undone_if(torch.tensor(skipped), variables, owner):
            spoil(variables)
            spoiled = bits(variables)
        assert bits(variables) == (before if skipped else spoiled)
        assert before != spoiled
        for variable, value in zip(variables, VALUES, strict=True):
            variable.value.data.copy_(value)
    # To and fro, for elements of 4 bytes and of 8, twice.
    assert device_copies == [float(not skipped)] * 8


def test_a_backup_takes_memory_only_during_a_step(device_copies, owner):
    variables = [keras.Variable(np.ones((3, 5), "float32")), keras.Variable(2.0)]

    def held():
        rooms = owner._mixprec_kept[torch_backup._Backup]._rooms
        return sum(room._storage.nbytes() for room in rooms)

    for _ in range(2):
        with torch_backup.undone_if(torch.tensor(False), variables, owner):
            assert held() == 4 * 16
        assert held() == 0


def test_memory_that_an_update_exchanges_is_put_back_where_it_is_now(
    device_copies, owner
):
    variables = [keras.Variable([1.0, 2.0]), keras.Variable([3.0])]
    with torch_backup.undone_if(torch.tensor(True), variables, owner):
        variables[1]._value = torch.nn.Parameter(torch.tensor([4.0]))
    assert variables[1].numpy().tolist() == [3.0]


def test_memory_that_an_update_gives_a_parameter_is_put_back_there(
    device_copies, owner
):
    variables = [keras.Variable([1.0, 2.0])]
    with torch_backup.undone_if(torch.tensor(True), variables, owner):
        variables[0]._value.data = torch.tensor([torch.nan, 9.0])
    assert variables[0].numpy().tolist() == [1.0, 2.0]


def test_only_a_device_that_copies_exactly_is_asked_to():
    assert not torch_backup.copies_unless(torch.device("cpu"))
    if torch.cuda.is_available():
        assert torch_backup.copies_unless(torch.device("cuda", 0))


@pytest.mark.parametrize("skipped", [True, False])
def test_every_bit_comes_back_where_a_step_was_skipped(skipped, owner):
    variables = variables_of_every_kind()
    for _ in range(2):  # The second time with views that were kept.
        before = bits(variables)
        saved = engine.read(variables, owner)
        spoil(variables)
        spoiled = bits(variables)
        engine.restore_by_select(torch.tensor(skipped), variables, saved, owner)
        assert bits(variables) == (before if skipped else spoiled)
        assert before != spoiled or not skipped
        for variable, value in zip(variables, VALUES, strict=True):
            variable.value.data.copy_(value)


def test_a_variable_that_got_other_memory_is_restored_there(owner):
    variables = [keras.Variable([1.0, 2.0]), keras.Variable([3.0])]
    engine.read(variables, owner)  # Its views are kept.
    variables[1]._value = torch.nn.Parameter(torch.tensor([4.0]))
    saved = engine.read(variables, owner)
    spoil(variables)
    engine.restore_by_select(torch.tensor(True), variables, saved, owner)
    assert variables[1].numpy().tolist() == [4.0]


@pytest.mark.parametrize("by", ["select", "device"])
def test_a_skipped_step_leaves_everything_as_it_was_without_a_branch(
    by, monkeypatch, request
):
    asked = request.getfixturevalue("device_copies") if by == "device" else None
    monkeypatch.setattr(engine, "_free_to_read", lambda tensor: False)
    model = half_classifier(keras.optimizers.AdamW(0.01))
    assert_overflows_are_skipped(model)
    assert asked in (None, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0])


def test_a_step_makes_no_tensor_of_a_constant_that_keras_does_not(monkeypatch):
    # On a GPU each is copied there while the host waits for all that it launched.
    monkeypatch.setattr(engine, "_free_to_read", lambda tensor: False)
    plain = constants_of(compiled(classifier()))
    assert plain > 0
    assert constants_of(half_classifier()) == plain


def test_a_step_launches_few_operations_more_than_without_us(
    monkeypatch, device_copies
):
    # An eager step on a GPU takes as long as its host needs to launch it.
    monkeypatch.setattr(engine, "_free_to_read", lambda tensor: False)
    with mp.policy_scope("mixed_float16"):
        plain = compiled(classifier(), auto_scale_loss=False)
    ours = half_classifier()
    assert isinstance(ours.optimizer, mp.LossScaleOptimizer)
    assert not isinstance(plain.optimizer, mp.LossScaleOptimizer)
    # 128 on torch 2.13, views and what the two metrics need among them; it was 144.
    assert 0 < operations_of(ours) - operations_of(plain) <= 140


@pytest.mark.parametrize("by", ["select", "device"])
def test_a_module_that_moved_is_rolled_back_where_it_is(by, monkeypatch, request):
    # `to`, `cpu` and `double` give the same parameters other memory.
    if by == "device":
        request.getfixturevalue("device_copies")
    monkeypatch.setattr(engine, "_free_to_read", lambda tensor: False)
    model = half_classifier(keras.optimizers.SGD(0.125, momentum=0.5))
    x, y = data(32)
    model.train_on_batch(x, y)
    model.double()
    model.float()
    assert_skipped_whole(model, np.full_like(x, np.inf), y)
    assert model.optimizer.overflow_count == 1


def test_float64_gradients_are_looked_at_as_they_are():
    largest = torch.tensor([2.0**48, 0.0], dtype=torch.float64)
    grads = [largest, 2 * largest, torch.ones(3), torch.ones(2, dtype=torch.float16)]
    assert engine._flags(grads, torch.tensor(1.0)).tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_an_optimizer_that_was_replaced_takes_its_slots_along(monkeypatch):
    monkeypatch.setattr(engine, "_free_to_read", lambda tensor: False)
    model = half_classifier("adam")
    x, y = data(32)
    model.train_on_batch(x, y)
    slot = weakref.ref(model.optimizer.inner_optimizer._momentums[0]._value)
    model.compile("sgd", "sparse_categorical_crossentropy")
    gc.collect()
    assert slot() is None


def test_a_compiled_step_is_not_given_the_views_that_eager_steps_keep(owner):
    variables = [keras.Variable([1.0, 2.0]), keras.Variable([[3.0]])]

    def step(skipped):
        saved = engine.read(variables, owner)
        for variable in variables:
            variable.assign(2.0 * variable.value)
        engine.restore_by_select(skipped, variables, saved, owner)

    step(torch.tensor(False))
    kept = dict(owner._mixprec_kept)
    assert list(kept) == [torch_backup._Bits]
    # What it takes to refuse inputs that alias the weights, without a C++ compiler.
    compiled_step = torch.compile(step, backend="aot_eager", fullgraph=True)
    for run, skipped in ((compiled_step, True), (compiled_step, False), (step, True)):
        run(torch.tensor(skipped))
        assert owner._mixprec_kept == kept
    values = [v.numpy().tolist() for v in variables]
    assert values == [[4.0, 8.0], [[12.0]]]


def test_what_is_measured_bit_by_bit_is_added_up(monkeypatch):
    # Each tensor by itself, as a large one is.
    monkeypatch.setattr(torch_carrier, "_WAITING", 1)
    arrays = [np.full((1025 * n,), n, "float32") for n in (1, 2, 3)]
    grads = [torch.from_numpy(a) for a in arrays]
    grads[1] = grads[1].half()
    rows = engine.carrier([], 1).rows(lambda variable: None, grads).numpy()
    expected = np.stack([ranges.measure_array(a) for a in arrays])
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.slow
# The compiler warns of what it finds in torch.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_are_measured_by_a_compiled_function_as_without(dtype):
    measure = torch_carrier._measuring_rows(dtype)
    compiled = torch_carrier._compiled(measure, dtype, torch.device("cpu"))
    assert compiled is not measure
    for rows in (1, 2, 17):
        x = torch.linspace(-1e5, 1e5, 1024 * rows).to(dtype).reshape(rows, -1)
        x[0, 0], x[-1, -1], x[0, 1] = torch.nan, torch.inf, 0.0
        assert all(map(torch.equal, compiled(x), measure(x)))


# The compiler warns of what it finds in torch.
@pytest.mark.filterwarnings("ignore")
def test_the_limits_of_each_dtype_are_constants_of_its_program(monkeypatch):
    inputs_of = []

    def keep(program, inputs):
        inputs_of.append(inputs)
        return program

    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=keep)
    )
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        measure = torch_carrier._measuring_rows(dtype)
        compiled = torch_carrier._compiled(measure, dtype, torch.device("cpu"))
        for rows in (2, 17):
            compiled(torch.ones(rows, 1024, dtype=dtype))
    # One program each, and of its inputs nothing but the rows and their number.
    assert [len(inputs) for inputs in inputs_of] == [2, 2, 2]


def test_ever_new_shapes_are_measured_right_and_do_not_pile_up(monkeypatch):
    # More than a step takes, so that some are met again, and no multiple of it.
    monkeypatch.setattr(torch_carrier, "_LAYOUTS", 13)
    carrier = engine.carrier([], 1)
    for step in range(24):
        # As batches of sentences: other lengths each time, and now and then as before.
        shapes = [(3, 1 + step % 5), (700 * step + 1,), (2, 1024 - step), (9,)]
        arrays = [np.full(s, step + i, "float32") for i, s in enumerate(shapes)]
        grads = [torch.from_numpy(a) for a in arrays]
        grads[0] = grads[0].half()
        expected = np.stack([ranges.measure_array(a) for a in arrays])
        without = 1 + step % 3
        grads[without], expected[without] = None, 0.0
        rows = carrier.rows(lambda variable: None, grads).numpy()
        np.testing.assert_array_equal(rows, expected)
        assert 0 < len(carrier._layouts) <= 13


@pytest.mark.slow
# The compiler warns of what it finds in torch and Keras.
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_skipped_whole():
    model = half_classifier("adam", jit_compile=True)
    x, y = data(32)
    for _ in range(2):
        model.train_on_batch(x, y)
    assert_skipped_whole(model, np.full_like(x, np.inf), y)
    assert model.optimizer.overflow_count == 1


def test_what_is_written_into_is_measured_as_it_was():
    carrier = torch_carrier.PendingCarrier(["a", "b"], 1)
    found = []
    for written in ([0], [0, 1], [0, 1]):
        for layer in (0, 1):
            x = torch.full((4,), 2.0 + layer)
            carrier.tap(layer, 0, x)
            if layer in written:
                x += 100
        found.append(carrier.rows(None, [])[:, FIELDS.index("max_abs")].tolist())
    # Into the second layer's output nobody wrote at first: it was not copied.
    assert found == [[2, 0, 3, 0], [2, 0, 0, 0], [2, 0, 3, 0]]


def test_each_output_of_one_operation_has_its_own_gradient():
    carrier = torch_carrier.PendingCarrier(["a", "b", "c", "leaf"], 1)
    x = torch.ones(3, 4, requires_grad=True)
    leaf = torch.ones(4, requires_grad=True)
    outputs = [*x.unbind(), leaf]
    a, _, c, leaf = [carrier.tap(i, 0, y) for i, y in enumerate(outputs)]
    (2 * a + 5 * c + 7 * leaf).sum().backward()
    found = carrier.rows(None, [])[1::2, FIELDS.index("max_abs")].tolist()
    assert found == [2, 0, 5, 7]


def test_what_a_step_leaves_behind():
    carrier = torch_carrier.PendingCarrier(["output", "weight"], 1)
    weight = torch.ones(4, requires_grad=True)
    for _ in range(3):
        output = carrier.tap(0, 0, 2 * weight)
        carrier.tap(1, 0, weight)
        # Not kept alive, and with it its graph, until it is measured.
        reference = weakref.ref(output)
        del output
        assert reference() is None
        carrier.rows(None, [])
    assert not weight._backward_hooks


def test_a_step_of_ones_own_may_differentiate_by_an_output():
    carrier = torch_carrier.PendingCarrier(["a"], 1, own_step=True)
    y = carrier.tap(0, 0, 2 * torch.ones(4, requires_grad=True))
    torch.autograd.grad((3 * y).sum(), y)
    assert carrier.rows(None, [])[1, FIELDS.index("max_abs")] == 3

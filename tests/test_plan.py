"""`plan`: what it decides, what it prints, what it refuses."""

import keras
import pytest
from keras import layers

import keras_mixprec as mp
from keras_mixprec.convert import convert
from keras_mixprec.plan import plan
from keras_mixprec.precision_plan import LayerPlan
from keras_mixprec.precision_plan import PrecisionPlan


def reasons(made):
    return {row.path: (row.policy, row.reason) for row in made}


def float32_paths(made, reason):
    return [r.path for r in made if (r.policy, r.reason) == ("float32", reason)]


@pytest.fixture
def classifier():
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, name="hidden"),
            layers.Dense(4, name="head"),
            layers.Reshape((2, 2), name="shape"),
        ],
        name="classifier",
    )


class Residual(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units, name="dense")
        self.norm = layers.LayerNormalization(name="norm")

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build(shape)

    def call(self, x):
        return x + self.norm(self.dense(x))


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Residual(8, name="block")
        self.head = layers.Dense(2, name="head")

    def call(self, x):
        return {"y": self.head(self.block(x))}


def test_sequential_outputs_stay_float32(classifier):
    assert reasons(plan(classifier)) == {
        "classifier": ("mixed_float16", "half precision"),
        classifier._layers[0].name: ("float32", "input"),
        "hidden": ("mixed_float16", "half precision"),
        "head": ("float32", "output layer"),
        "shape": ("float32", "output layer"),
    }


def test_planning_changes_nothing(classifier):
    plan(classifier, keep_float32="hidden")
    assert {x.dtype_policy.name for x in classifier._flatten_layers()} == {"float32"}


def test_operations_pass_the_output_rule_on_to_their_layers():
    x = keras.Input((4,))
    made = plan(keras.Model(x, keras.ops.softmax(layers.Dense(3, name="logits")(x))))
    assert made["logits"].policy == "float32"


def test_nested_model_makes_the_output():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="last")])
    x = keras.Input((4,))
    model = keras.Model(x, inner(layers.Dense(4, name="first")(x)))
    made = plan(model)
    assert made["first"].policy == "mixed_float16"
    assert made[f"{inner.name}/last"].reason == "output layer"


def test_subclassed_output_is_found_by_tracing():
    model = Subclassed(name="root")
    model(keras.ops.ones((2, 8)))
    assert float32_paths(plan(model), "output layer") == ["head"]
    assert plan(model)["root"].policy == "mixed_float16"
    assert plan(model)["block/dense"].policy == "mixed_float16"


def test_layer_that_computes_the_output_from_its_sublayers():
    x = keras.Input((8,))
    made = plan(keras.Model(x, Residual(8, name="block")(x)))
    assert made["block"].reason == "output layer"
    assert made["block/dense"].policy == "mixed_float16"


def test_whole_builtin_layer_that_makes_the_output_stays():
    x = keras.Input((5, 4))
    made = plan(keras.Model(x, layers.Bidirectional(layers.LSTM(3), name="two")(x)))
    assert {row.policy for row in made.match("two*")} == {"float32"}


def test_ids_that_travel_as_floats_stay_exact():
    x = keras.Input((4, 1), dtype="float32")
    y = layers.Flatten(name="flat")(x)
    y = layers.Embedding(3000, 8, name="embed")(y)
    y = layers.Dense(4, name="middle")(y)
    made = plan(keras.Model(x, layers.Dense(1)(y)))
    assert float32_paths(made, "input ids") == ["flat", "embed"]
    assert made["middle"].policy == "mixed_float16"


def test_integer_ids_need_no_protection():
    x = keras.Input((4,), dtype="int32")
    y = layers.Embedding(3000, 8, name="embed")(x)
    made = plan(keras.Model(x, layers.Dense(1)(y)))
    assert made["embed"].policy == "mixed_float16"


@pytest.mark.parametrize(
    "keep",
    [
        "block",
        "blo*",
        ["block"],
        Residual,
        lambda layer: layer.name == "block",
    ],
)
def test_keep_float32_covers_all_inside(keep):
    model = Subclassed()
    model(keras.ops.ones((2, 8)))
    assert float32_paths(plan(model, keep_float32=keep), "user") == [
        "block",
        "block/dense",
        "block/norm",
    ]


def test_keep_float32_takes_a_layer(classifier):
    made = plan(classifier, keep_float32=classifier.layers[0])
    assert made["hidden"].reason == "user"


@pytest.mark.parametrize("keep", ["hiden", [layers.LSTM], layers.Dense(1)])
def test_keep_float32_that_matches_nothing(classifier, keep):
    with pytest.raises(ValueError, match="to match a layer"):
        plan(classifier, keep_float32=keep)


def test_near_misses_are_listed(classifier):
    with pytest.raises(ValueError, match=r"Near misses: 'hidden'"):
        plan(classifier, keep_float32="hiden")
    with pytest.raises(ValueError, match=r"Near misses: 'hidden'"):
        plan(classifier).override("hiden", "float32")


def test_bad_input(classifier):
    with pytest.raises(TypeError, match=r"`keras.Model`. Received: model=3"):
        plan(3)
    with pytest.raises(ValueError, match=r"Received: policy='float8'"):
        plan(classifier, "float8")
    with pytest.raises(TypeError, match="keep_float32"):
        plan(classifier, keep_float32=[3])


def test_policies_that_are_not_ours_to_change():
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(8, dtype="bfloat16", name="pure"),
            layers.Dense(8, dtype="mixed_bfloat16", name="brain"),
            layers.Dense(8, name="plain"),
            layers.Dense(8, name="int8"),
            layers.Dense(8, name="head"),
        ]
    )
    model.get_layer("int8").quantize("int8")
    made = reasons(plan(model))
    assert made["pure"] == ("bfloat16", "already bfloat16")
    assert made["brain"] == ("mixed_bfloat16", "already bfloat16")
    assert made["plain"][0] == "mixed_float16"
    assert made["int8"] == ("int8_from_float32", "quantized to int8")


def test_override_and_round_trip(classifier, tmp_path):
    made = plan(classifier).override("head", "mixed_float16").override("h*n", "float32")
    assert made["head"].policy == "mixed_float16"
    assert made["hidden"] == LayerPlan(
        **{**vars(made["hidden"]), "policy": "float32", "reason": "user"}
    )
    assert PrecisionPlan.from_json(made.to_json()) == made
    made.to_json(tmp_path / "plan.json")
    assert PrecisionPlan.from_json(tmp_path / "plan.json") == made
    assert PrecisionPlan.from_json(str(tmp_path / "plan.json")) == made


def test_override_refuses_unknown_policies(classifier):
    made = plan(classifier)
    with pytest.raises(ValueError, match=r"Received: policy='half'"):
        made.override("head", "half")
    assert made == plan(classifier)


def test_json_of_something_else():
    with pytest.raises(ValueError, match="to_json"):
        PrecisionPlan.from_json("{}")


def test_same_name_twice_gets_two_paths():
    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.twins = [layers.Dense(2, name="twin") for _ in range(2)]

        def call(self, x):
            return self.twins[1](self.twins[0](x))

    model = Twins()
    model(keras.ops.ones((1, 2)))
    assert [row.path for row in plan(model)][1:] == ["twin", "twin#2"]


def test_printed_table(classifier):
    lines = str(plan(classifier)).splitlines()
    assert lines[0].split() == ["path", "class", "policy", "reason"]
    assert lines[4].split() == ["hidden", "Dense", "mixed_float16", "half", "precision"]
    assert "5 layers: 3 float32, 2 mixed_float16" in lines


def test_a_user_may_force_half_precision(classifier):
    model = classifier
    made = plan(model).override("head", "mixed_float16")
    convert(model, plan=made)
    convert(model)
    assert model.get_layer("head").compute_dtype == "float16"
    convert(model, keep_float32=model.get_layer("head"))
    assert model.get_layer("head").compute_dtype == "float32"


def test_public_names():
    assert mp.plan is plan
    assert (mp.PrecisionPlan, mp.LayerPlan) == (PrecisionPlan, LayerPlan)

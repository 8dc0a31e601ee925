"""The command: what it prints, its JSON, its errors of one line, its exit status."""

import json
import os
import subprocess
import sys

import click
import keras
import numpy as np
import pytest
from processes import ROOT
from processes import search_path

import keras_mixprec as mp
from keras_mixprec.policy import POLICIES
from keras_mixprec_cli import app
from keras_mixprec_cli import machine
from keras_mixprec_cli import options
from keras_mixprec_cli import samples

COMMAND = "import sys; from keras_mixprec_cli.app import main; sys.exit(main())"
LAYERS = """
import keras

class Plain(keras.layers.Layer):
    def call(self, x):
        return x

@keras.saving.register_keras_serializable(package="mine")
class Registered(keras.layers.Layer):
    def call(self, x):
        return x

def model():
    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="made")
    made.compile("sgd", "mse")
    return made

def nothing():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a module of custom layers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "cli_layers.py").write_text(LAYERS)
    yield tmp_path
    forget_layers()


def forget_layers():
    """As in a process that has not imported them."""
    sys.modules.pop("cli_layers", None)
    keras.saving.get_custom_objects().pop("mine>Registered", None)


@pytest.fixture
def run(capsys):
    """Run the command. Returns status, standard output, standard error."""

    def call(*words):
        status = app.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return call


def classifier(*layers, name="m"):
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, name="first"),
            *layers,
            keras.layers.Dense(3, activation="softmax", name="last"),
        ],
        name=name,
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


@pytest.fixture
def saved(folder):
    """A trained model in a file."""
    model = classifier()
    model.fit(np.ones((8, 8)), np.zeros(8), verbose=0)
    model.save("m.keras")
    return model


def saved_with(layer_class, path):
    import cli_layers

    model = classifier(getattr(cli_layers, layer_class)())
    model.save(path)
    forget_layers()


def test_every_command_explains_itself_and_prints_json(run):
    for name, command in app.cli.commands.items():
        status, out, _ = run(name, "--help")
        assert status == 0
        assert command.help.split("\n")[0] in out
        assert "--json" in out
        undocumented = [
            p.name for p in command.params if isinstance(p, click.Option) and not p.help
        ]
        assert undocumented == []


def test_without_a_command_it_lists_them_in_the_order_of_use(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    names = [line.split()[0] for line in out.split("Commands:\n")[1].splitlines()]
    assert names == list(app.cli.commands)
    assert names[0] == "doctor"


@pytest.mark.parametrize(
    "backend, message",
    [
        ("foo", "Expected KERAS_BACKEND=tensorflow, jax or torch"),
        ("jax", "is not inst"),
    ],
)
def test_a_backend_that_is_not_there(folder, backend, message):
    # `None` in `sys.modules`: as if it were not installed.
    command = f"import sys; sys.modules['jax'] = None; {COMMAND}"
    done = subprocess.run(
        [sys.executable, "-c", command, "doctor", "--no-measure"],
        env=os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": search_path(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert message in done.stderr


def test_nothing_but_the_result_is_written(saved):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "plan", "m.keras"],
        env=os.environ | {"PYTHONPATH": search_path(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_policies_are_the_librarys():
    assert set(options.POLICIES) == {*POLICIES, "auto"}


def test_plan_prints_every_layer_and_why(run, saved):
    status, out, _ = run("plan", "m.keras")
    assert status == 0
    assert all(w in out for w in ("first", "mixed_float16", "last", "output layer"))
    assert "in half precision:" in out


def test_plans_json_is_a_plan(run, saved):
    _, out, _ = run("plan", "m.keras", "--json", "--keep", "first")
    plan = mp.PrecisionPlan.from_json(out)
    assert (plan["first"].policy, plan["first"].reason) == ("float32", "user")


def test_convert_keeps_weights_and_writes_policies(run, saved):
    status, out, _ = run("convert", "m.keras", "half.keras")
    assert status == 0
    assert "Wrote half.keras: 4 layers, 2 mixed_float16, 2 float32." in out
    assert "must `import keras_mixprec` first" in out
    half = keras.saving.load_model("half.keras")
    assert half.get_layer("first").compute_dtype == "float16"
    assert isinstance(half.optimizer, mp.LossScaleOptimizer)
    for a, b in zip(saved.get_weights(), half.get_weights(), strict=True):
        assert a.tobytes() == b.tobytes()


def test_nothing_is_warned_of_a_model_that_never_trained(run, folder):
    classifier().save("fresh.keras")
    status, _, err = run("convert", "fresh.keras", "half.keras")
    assert (status, err) == (0, "")


def test_convert_carries_out_an_edited_plan(run, saved, folder):
    _, out, _ = run("plan", "m.keras", "--json", "--policy", "mixed_bfloat16")
    plan = mp.PrecisionPlan.from_json(out).override("first", "float32")
    plan.to_json("plan.json")
    words = ("convert", "m.keras", "half.keras", "--plan", "plan.json")
    status, out, _ = run(*words, "--json")
    assert status == 0
    assert json.loads(out)["layers"] == {"mixed_bfloat16": 1, "float32": 3}
    status, _, err = run(*words, "--policy", "float32", "--force")
    assert status == 2
    assert "--plan says what --policy would say" in err


def test_convert_replaces_no_file_unasked(run, saved, folder):
    before = (folder / "m.keras").read_bytes()
    status, _, err = run("convert", "m.keras", "m.keras")
    assert (status, err) == (1, "Error: 'm.keras' exists. Add --force to replace it.\n")
    assert (folder / "m.keras").read_bytes() == before
    assert run("convert", "m.keras", "m.keras", "--force")[0] == 0


def test_convert_back_to_float32(run, saved):
    run("convert", "m.keras", "half.keras")
    _, out, _ = run("convert", "half.keras", "back.keras", "--policy=float32", "--json")
    assert json.loads(out)["layers"] == {"float32": 4}


def test_custom_layers_are_named_with_their_module(run, folder):
    for name in ("Plain", "Registered"):
        saved_with(name, "custom.keras")
        status, out, err = run("plan", "custom.keras")
        assert (status, out) == (1, "")
        assert err == (
            f"Error: 'custom.keras' uses the custom class '{name}', saved from module "
            "'cli_layers', which is not known here. Name the module that defines it: "
            "--import cli_layers\n"
        )
        status, out, _ = run("plan", "custom.keras", "--import", "cli_layers")
        assert status == 0
        assert name in out
        forget_layers()


def test_python_code_in_a_file_is_not_run_unasked(run, folder):
    classifier(keras.layers.Lambda(lambda x: x * 2)).save("code.keras")
    status, _, err = run("plan", "code.keras")
    assert status == 1
    assert err.count("\n") == 1
    assert "add --no-safe-mode" in err
    assert run("plan", "code.keras", "--no-safe-mode")[0] == 0


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["plan", "no.keras"], 1, "'no.keras' does not exist"),
        (["plan", "."], 1, "'.' is a folder"),
        (["plan", "bad.keras"], 1, "'bad.keras' is no Keras model"),
        (["plan", "m.keras", "--policy", "fp16"], 2, "'fp16' is not one of"),
        (["plan", "m.weights.h5"], 1, "holds weights alone"),
        (["plan", "cli_layers.py"], 1, "'cli_layers.py' is no Keras model"),
        (["plan", "m.keras", "--keep", "nah"], 1, "entry of --keep to match"),
        (["plan", "m.keras", "--import", "no_such"], 1, "Cannot import 'no_such'"),
        (["plan"], 2, "Missing argument 'MODEL.keras'"),
        (["plam"], 2, "No such command 'plam'"),
        (["launch", "--polcy", "x"], 2, "Did you mean '--policy'? See `keras"),
        (["plan", "m.keras", "too", "many"], 2, "arguments (too many). See"),
        (["convert", "m.keras", "out.h5"], 2, "Expected OUT.keras"),
        (["convert", "m.keras", "no/out.keras"], 1, "its folder does not exist"),
        (["convert", "m.keras", "o.keras", "--plan", "no.json"], 1, "plan MODEL.keras"),
        (["convert", "m.keras", "o.keras", "--plan", "bad.json"], 1, "is no plan: "),
        (["bench", "cli_layers.py"], 1, "is a script. Expected a model file"),
        (["bench", "cli_script:model"], 1, "ended with exit status 3"),
        (["bench", "cli_layers:no"], 1, "has no function 'no'"),
        (["bench", "cli_layers:nothing"], 1, "Received: int"),
        (["bench", "m.keras", "--steps", "0"], 2, "0 is not in the range"),
        (["report", "nowhere"], 1, "'nowhere' does not exist"),
        (["report", "m.keras"], 1, "'m.keras' is a file"),
        (["report", "."], 1, "without any"),
        (["launch", "no.py"], 1, "'no.py' does not exist"),
        (["launch", "m.keras"], 1, "'m.keras' is a model"),
    ],
)
def test_errors_take_one_line(run, saved, folder, words, status, message):
    (folder / "bad.keras").write_text("not a model")
    (folder / "bad.json").write_text("{}")
    (folder / "cli_script.py").write_text("import sys; sys.exit(3)")
    saved.save_weights("m.weights.h5")
    found, out, err = run(*words)
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert err.startswith("Error: ")
    assert message in err
    found, out, err = run(words[0], "--json", *words[1:])
    if words != ["plam"]:
        assert message in json.loads(out)["error"]
        assert (found, err) == (status, "")


def test_traceback_on_request(folder):
    with pytest.raises(ValueError, match="without any"):
        app.main(["--traceback", "report", "."])


def test_version(run):
    try:
        status, out, _ = run("--version")
    except RuntimeError:
        pytest.skip("keras-mixprec is not installed, only on the path")
    assert (status, out) == (0, f"keras-mixprec {mp.__version__}\n")


def test_bench_measures_each_policy(run, saved):
    sizes = ("--steps", 1, "--blocks", 1, "--warmup", 0, "--batch-size", 4)
    policies = ("--policy", "float32", "--policy", "mixed_bfloat16")
    status, out, _ = run("bench", "m.keras", *sizes, *policies)
    assert status == 0
    assert all(w in out for w in ("float32", "mixed_bfloat16", "ms per step"))
    _, out, _ = run("bench", "cli_layers:model", *sizes, *policies, "--json")
    result = json.loads(out)
    assert [row["policy"] for row in result["rows"]] == ["float32", "mixed_bfloat16"]
    assert all(row["ms_per_step"] > 0 for row in result["rows"])


def test_made_up_data_fit_inputs_and_losses():
    ids = keras.Input((None,), dtype="int32", name="ids")
    image = keras.Input((4, 4, 3), name="image")
    text = keras.layers.GlobalMaxPooling1D()(keras.layers.Embedding(2, 3)(ids))
    picture = keras.layers.Flatten()(image)
    outputs = {
        "kind": keras.layers.Dense(5, activation="softmax", name="kind")(text),
        "size": keras.layers.Dense(1, name="size")(picture),
    }
    model = keras.Model({"ids": ids, "image": image}, outputs)
    losses = {"kind": "sparse_categorical_crossentropy", "size": "mse"}
    model.compile("sgd", losses)
    x, y = samples.made_up(model, 6)
    assert (x["ids"].shape, x["ids"].dtype.kind) == ((6, 32), "i")
    assert (y["kind"].shape, y["size"].shape) == ((6,), (6, 1))
    model.fit(x, y, verbose=0)


def test_report_writes_the_page_and_says_where(run, folder):
    pytest.importorskip("matplotlib")
    (folder / "run").mkdir()
    (folder / "run" / "a.csv").write_text(
        "epoch,loss,loss_scale\n0,0.5,32768\n1,0.25,65536\n"
    )
    status, out, _ = run("report", "run", "--json")
    found = json.loads(out)
    assert found["runs"] == {"a": {"loss": 0.25, "loss_scale": 65536.0}}
    assert (folder / found["page"]).is_file()
    _, out, _ = run("report", "run", "--output", "elsewhere")
    assert "65,536" in out
    assert (folder / "elsewhere" / "report.html").is_file()


def test_doctor_says_what_is_here(run):
    status, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["backend"] == keras.backend.backend()
    assert found["versions"]["keras"] == keras.__version__
    assert found["best_policy"] in POLICIES
    assert [row["dtype"] for row in found["precisions"]][:2] == ["float32", "float16"]
    first = found["precisions"][0]
    assert first["product_ms"] > 0
    assert first["speedup"] == 1
    status, out, _ = run("doctor", "--no-measure")
    assert f"Use {found['best_policy']} here" in out
    assert "Missing: an accelerator" in out or found["devices"][0]["kind"] == "gpu"


def test_doctor_does_not_advise_what_it_measured_to_be_slower():
    def advised(speedup):
        rows = [
            {"dtype": "float32", "speedup": 1.0},
            {"dtype": "bfloat16", "speedup": speedup},
        ]
        return machine.advice("mixed_bfloat16", "bfloat16 units", rows)

    for speedup in (None, 0.95, 3.0):
        assert advised(speedup) == "Use mixed_bfloat16 here: bfloat16 units."
    assert advised(0.5).startswith("Use float32 here:")
    assert "0.50 times float32's speed" in advised(0.5)
    rows = [{"dtype": "float32", "speedup": 1.0}]
    assert machine.advice("float32", "a CPU", rows) == "Use float32 here: a CPU."


def test_doctor_does_not_advise_what_failed_here():
    rows = [
        {"dtype": "float32", "speedup": 1.0, "error": None},
        {"dtype": "float16", "speedup": None, "error": "RuntimeError: no such kernel"},
    ]
    said = machine.advice("mixed_float16", "tensor cores", rows)
    assert said.startswith("Use float32 here:") and "no such kernel" in said


def test_help_does_not_import_keras():
    code = """
import sys
from keras_mixprec_cli.app import main
main(["launch", "--help"])
print([name for name in ("keras", "tensorflow", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr

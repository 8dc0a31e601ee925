"""Three trainings in float32, in half, and in half with an adaptive plan.

    KERAS_BACKEND=torch python trainings.py --only cnn --runs float32 half --seeds 3
    python run_matrix.py --rows trainings --jobs 12 --out results/trainings
    python report_trainings.py

The first trains on one backend and prints a line of JSON per run, the second all of
them on all backends, the third writes docs/trainings.md.
"""

import argparse
import os
import pathlib
import time

if os.environ.get("KERAS_BACKEND") == "torch":
    import torch  # noqa: F401

import backends
import keras
import numpy as np
from keras import layers
from keras import ops
from rows import emit
from rows import place

import keras_mixprec as mp

CONTEXT = 32


# -- digits: a CNN on scikit-learn's 1,797 handwritten digits ------------------------


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = (data.images[order, :, :, None] / 16).astype("float32")
    y = data.target[order].astype("int32")
    return (x[::2], y[::2]), (x[1::2], y[1::2])


def cnn(train):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.GlobalMaxPooling2D(),
            layers.Dropout(0.1),
            layers.Dense(10, activation="softmax"),
        ]
    )
    compile_with(model, train, "cnn", "sparse_categorical_crossentropy")
    return model


# -- text: the next character of scikit-learn's descriptions of its data sets ---------


def text():
    import sklearn.datasets

    folder = pathlib.Path(sklearn.datasets.__file__).parent / "descr"
    raw = "\n".join(p.read_text("utf-8") for p in sorted(folder.glob("*.rst")))
    letters = {c: i for i, c in enumerate(sorted(set(raw)))}
    ids = np.array([letters[c] for c in raw], "int32")
    count = len(ids) // (CONTEXT + 1)
    rows = ids[: count * (CONTEXT + 1)].reshape(count, CONTEXT + 1)
    rows = rows[np.random.default_rng(0).permutation(count)]
    x, y = rows[:, :-1], rows[:, 1:]
    split = count * 3 // 4
    return (x[:split], y[:split]), (x[split:], y[split:])


def transformer(train):
    letters = 1 + int(max(train[0].max(), train[1].max()))
    x = keras.Input((CONTEXT,), dtype="int32")
    places = ops.cumsum(ops.ones_like(x), axis=1) - 1
    y = layers.Embedding(letters + 64, 48)(x) + layers.Embedding(CONTEXT, 48)(places)
    for _ in range(2):
        z = layers.LayerNormalization()(y)
        y = y + layers.MultiHeadAttention(4, 12)(z, z, use_causal_mask=True)
        z = layers.Dense(96, activation="gelu")(layers.LayerNormalization()(y))
        y = y + layers.Dense(48)(z)
    y = layers.LayerNormalization()(y)
    model = keras.Model(x, layers.Dense(letters + 64, activation="softmax")(y))
    compile_with(model, train, "transformer", "sparse_categorical_crossentropy")
    return model


# -- recommender: made users and items with hidden tastes ----------------------------


def ratings(users=400, items=300, tastes=6, samples=40_000):
    random = np.random.default_rng(0)
    people = random.normal(size=(users, tastes))
    things = random.normal(size=(items, tastes))
    popular = random.normal(0, 0.7, items)
    user, item = random.integers(0, users, samples), random.integers(0, items, samples)
    score = 1.5 * (people[user] * things[item]).sum(1) / np.sqrt(tastes)
    liked = random.random(samples) < 1 / (1 + np.exp(-2 * (score + popular[item])))
    x = np.stack([user, item], axis=1).astype("int32")
    y = liked.astype("float32")[:, None]
    split = samples * 3 // 4
    return (x[:split], y[:split]), (x[split:], y[split:])


def recommender(train):
    users, items = 1 + train[0].max(axis=0)
    x = keras.Input((2,), dtype="int32")
    user = layers.Embedding(int(users), 16)(x[:, 0])
    item = layers.Embedding(int(items), 16)(x[:, 1])
    y = layers.Concatenate()([user, item, layers.Multiply()([user, item])])
    y = layers.Dropout(0.2)(layers.Dense(32, activation="relu")(y))
    model = keras.Model(x, layers.Dense(1, activation="sigmoid")(y))
    compile_with(model, train, "recommender", "binary_crossentropy")
    return model


def compile_with(model, train, task, loss):
    """Adam whose rate falls to 0: what differs at the end is not where it stopped."""
    _, _, batch_size, epochs = TASKS[task]
    steps = epochs * -(-len(train[0]) // batch_size)
    rate = keras.optimizers.schedules.CosineDecay(3e-3, steps)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])


TASKS = {
    "cnn": (digits, cnn, 32, 24),
    "transformer": (text, transformer, 32, 9),
    "recommender": (ratings, recommender, 256, 9),
}
RUNS = ("float32", "half", "adaptive")


def half_policy(task: str, device: str | None) -> str:
    """Return the half policy of a training.

    Args:
        task: A key of `TASKS`.
        device: The accelerator's name, `None` for the CPU: there JAX has no float16
            attention.
    """
    no_float16 = keras.config.backend() == "jax" and device is None
    return "mixed_bfloat16" if no_float16 and task == "transformer" else "mixed_float16"


def train(task: str, policy: str, seed: int, adaptive: bool, epochs: int | None):
    """Train once; return what there is to say about it.

    Args:
        task: A key of `TASKS`.
        policy: `"float32"` or a half policy, which `convert` then carries out.
        seed: Int.
        adaptive: Whether `AdaptivePrecision` may change the plan.
        epochs: Int, or `None` for the training's own number.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    load, make, batch_size, usual = TASKS[task]
    epochs = epochs or usual
    train, test = load()
    model = make(train)
    callbacks = [mp.AdaptivePrecision()] if adaptive else []
    if policy != "float32":
        mp.convert(model, policy, sample=train[0][:8])
    start = time.perf_counter()
    fit = {"batch_size": batch_size, "epochs": epochs, "verbose": 0}
    model.fit(*train, callbacks=callbacks, **fit)
    found = {
        "benchmark": "trainings",
        "task": task,
        "backend": keras.config.backend(),
        "policy": policy,
        "adaptive": adaptive,
        "seed": seed,
        "epochs": epochs,
        "accuracy": float(model.evaluate(*test, batch_size=256, verbose=0)[1]),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if adaptive:
        found["changes"] = [
            (c.epoch + 1, c.path, c.after) for c in callbacks[0].changes
        ]
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=3, help="adaptive: seed 0 alone")
    parser.add_argument("--epochs", type=int, help="fewer, to try it out")
    parser.add_argument("--out", help="append the rows to this .jsonl file")
    options = parser.parse_args()
    backend = backends.current()
    device = backend.device()
    here = place(device, backends.versions(backend))
    for task in options.only:
        for kind in options.runs:
            policy = "float32" if kind == "float32" else half_policy(task, device)
            adaptive = kind == "adaptive"
            for seed in range(1 if adaptive else options.seeds):
                row = train(task, policy, seed, adaptive, options.epochs)
                emit(row | here, options.out)


if __name__ == "__main__":
    main()

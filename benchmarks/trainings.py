"""Three trainings in float32 and in half: final metrics over seeds.

    KERAS_BACKEND=torch python benchmarks/trainings.py [--seeds 3] [--only cnn ...]

Prints a line of JSON per run and a table at the end, in Markdown.
"""

import argparse
import json
import os
import pathlib
import time

if os.environ.get("KERAS_BACKEND") == "torch":
    import torch  # noqa: F401

import keras
import numpy as np
from keras import layers
from keras import ops

import keras_mixprec as mp
from keras_mixprec.hardware import gpu_memory

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


def half_policy(task):
    # JAX on a CPU has no float16 attention.
    on_jax = keras.config.backend() == "jax" and not gpu_memory()
    return "mixed_bfloat16" if on_jax and task == "transformer" else "mixed_float16"


def run(task, policy, seed, adaptive=False):
    """Train once; return what there is to say about it."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    load, make, batch_size, epochs = TASKS[task]
    train, test = load()
    model = make(train)
    callbacks = [mp.AdaptivePrecision()] if adaptive else []
    if policy != "float32":
        mp.convert(model, policy, sample=train[0][:8])
    start = time.perf_counter()
    fit = {"batch_size": batch_size, "epochs": epochs, "verbose": 0}
    model.fit(*train, callbacks=callbacks, **fit)
    found = {
        "task": task,
        "backend": keras.config.backend(),
        "policy": policy,
        "adaptive": adaptive,
        "seed": seed,
        "accuracy": float(model.evaluate(*test, batch_size=256, verbose=0)[1]),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if adaptive:
        found["epochs"] = epochs
        found["changes"] = [
            (c.epoch + 1, c.path, c.after) for c in callbacks[0].changes
        ]
    print(json.dumps(found), flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(TASKS))
    arguments = parser.parse_args()
    lines = []
    for task in arguments.only:
        half = half_policy(task)
        means = {}
        for policy in ("float32", half):
            found = [run(task, policy, seed) for seed in range(arguments.seeds)]
            values = [100 * one["accuracy"] for one in found]
            means[policy] = np.mean(values)
            each = ", ".join(f"{v:.2f}" for v in values)
            lines.append(
                f"| {task} | {keras.config.backend()} | {policy} | {each} | "
                f"{np.mean(values):.2f} | {means[policy] - means['float32']:+.2f} |"
            )
        run(task, half, 0, adaptive=True)
    print("| training | backend | policy | accuracy, each seed | mean | difference |")
    print("|-|-|-|-|-|-|", *lines, sep="\n")


if __name__ == "__main__":
    main()

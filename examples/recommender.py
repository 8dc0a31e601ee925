"""A two-tower recommender with a large embedding, in mixed precision.

    python examples/recommender.py
    python examples/recommender.py --full        # ten million items

Users and items that made-up ratings bring together. Ids stay integers and the table
stays float32 in memory: what half precision speeds up are the towers, so that the
script says how much of the model computes in it.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

import keras_mixprec as mp  # mixed precision


def made_up_ratings(users, items, count, kinds=8):
    """Return pairs of ids, and whether the user likes items of that kind.

    Popular as such ids are: the k-th in proportion to 1/k (Zipf's law). In a table of
    millions most are met once or never, and tell nothing of themselves.
    """
    random = np.random.default_rng(0)
    user = (users ** random.random(count)).astype("int32") - 1
    item = (items ** random.random(count)).astype("int32") - 1
    # Half of them of the user's kind, so that guessing gets half right.
    fitting = np.minimum(item - item % kinds + user % kinds, items - 1)
    item = np.where(random.random(count) < 0.5, fitting, item).astype("int32")
    liked = user % kinds == item % kinds
    return {"user": user, "item": item}, liked.astype("float32")


def tower(name, size, width):
    """Return an input of ids, and a vector of length 32 for each."""
    ids = keras.Input((), dtype="int32", name=name)
    x = layers.Embedding(size, width, name=f"{name}_table")(ids)
    x = layers.Dense(64, activation="relu")(x)
    return ids, layers.Dense(32)(x)


def build_model(users, items, width):
    """Return the towers, and the sigmoid of how well their vectors fit."""
    user, user_vector = tower("user", users, width)
    item, item_vector = tower("item", items, width)
    x = layers.Multiply()([user_vector, item_vector])
    outputs = layers.Dense(1, activation="sigmoid", dtype="float32")  # mixed precision
    return keras.Model({"user": user, "item": item}, outputs(x), name="two_tower")


def main(arguments=None):
    """Train. Returns 0 if 80% of unseen pairs are right, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    mp.set_policy(args.policy)  # mixed precision
    users, items, count = (
        (1_000_000, 10_000_000, 32_000_000) if args.full else (400, 800, 40_000)
    )
    model = build_model(users, items, width=128 if args.full else 16)
    plan = mp.plan(model, args.policy)  # mixed precision
    print(f"{plan.half_share('multiply_adds'):.0%} of all multiply-adds in half")
    x, y = made_up_ratings(users, items, count)
    test = count // 5
    model.compile(
        keras.optimizers.Adam(0.005), "binary_crossentropy", metrics=["accuracy"]
    )
    history = model.fit(
        {name: ids[test:] for name, ids in x.items()},
        y[test:],
        batch_size=32_768 if args.full else 256,
        epochs=3 if args.full else 6,
        validation_data=({name: ids[:test] for name, ids in x.items()}, y[:test]),
        verbose=2,
        callbacks=[mp.MixedPrecisionMonitor()],  # mixed precision
    )
    return 0 if history.history["val_accuracy"][-1] > 0.8 else 1


if __name__ == "__main__":
    sys.exit(main())

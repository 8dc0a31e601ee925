"""Text classification with BERT of KerasHub, in mixed precision.

    pip install keras-hub
    python examples/bert.py
    python examples/bert.py --full
    python examples/bert.py --full --preset bert_base_en_uncased --reviews reviews.csv

The small size is a BERT of two layers on made-up reviews, with a vocabulary of its
own, so that it needs no network; `--full` is one of BERT-base's size. `--preset` takes
weights and vocabulary from KerasHub instead (a name, which is downloaded, or a folder),
and `--reviews` a CSV file of two columns, text and label (0 or 1).

Parts of BERT want float32 whatever the policy says; `convert` finds them.
"""

import argparse
import csv
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_HOME", os.path.join(os.getcwd(), ".keras"))

import keras
import keras_hub
import numpy as np

import keras_mixprec as mp  # mixed precision

WORDS = {
    0: ["dull", "slow", "awful", "boring", "broken"],
    1: ["bright", "great", "superb", "moving", "funny"],
}
FILLERS = ["the", "film", "was", "a", "and", "with", "very", "its", "plot", "music"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {
    "vocabulary_size": 25,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "max_sequence_length": 16,
}
BASE = {
    "vocabulary_size": 30_522,
    "num_layers": 12,
    "num_heads": 12,
    "hidden_dim": 768,
    "intermediate_dim": 3072,
    "max_sequence_length": 512,
}


def made_up_reviews(count, length):
    """Return texts of filler words, one in six a telling one, and their labels."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, count)
    texts = []
    for label in labels:
        words = list(random.choice(FILLERS, length))
        for _ in range(length // 6):
            words[random.integers(length)] = random.choice(WORDS[label])
        texts.append(" ".join(words))
    return texts, labels


def made_up_bert(full):
    """Return a BERT classifier of two layers, or twelve, and random weights."""
    words = [*SPECIAL, *FILLERS, *WORDS[0], *WORDS[1]]
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(
        keras_hub.models.BertTokenizer(words, lowercase=True),
        sequence_length=128 if full else 16,
    )
    backbone = keras_hub.models.BertBackbone(**(BASE if full else SMALL))
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=preprocessor
    )


def read_reviews(path):
    """Return the texts and labels of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row[1] in ("0", "1")]
    return [row[0] for row in rows], np.array([int(row[1]) for row in rows])


def load(args):
    """Return the model, and reviews with their labels."""
    if args.preset:
        model = keras_hub.models.BertTextClassifier.from_preset(
            args.preset, num_classes=2
        )
    else:
        model = made_up_bert(args.full)
    if args.reviews:
        return model, *read_reviews(args.reviews)
    count, length = (16_384, 120) if args.full else (1024, 12)
    return model, *made_up_reviews(count, length)


def rate(args, steps):
    """Return the learning rate; a deep BERT needs one that rises at first."""
    if not (args.full or args.preset):
        return 1e-3
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        steps - steps // 10,
        warmup_target=2e-5 if args.preset else 1e-4,
        warmup_steps=steps // 10,
    )


def main(arguments=None):
    """Train. Returns 0 if 90% of unseen reviews are right, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--full", action="store_true", help="BERT-base's size")
    parser.add_argument("--preset", help="of KerasHub, or a folder that holds one")
    parser.add_argument("--reviews", help="CSV file: text, 0 or 1")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    model, texts, labels = load(args)
    mp.convert(model, args.policy)  # mixed precision
    test = len(texts) // 5
    steps = args.epochs * -(-(len(texts) - test) // 32)
    model.compile(
        keras.optimizers.Adam(rate(args, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    # Words to ids once, outside of the model: texts are no tensors on every backend.
    x = model.preprocessor(texts)
    train_x = {name: np.asarray(ids)[test:] for name, ids in x.items()}
    test_x = {name: np.asarray(ids)[:test] for name, ids in x.items()}
    model.preprocessor = None
    history = model.fit(
        train_x,
        labels[test:],
        batch_size=32,
        epochs=args.epochs,
        validation_data=(test_x, labels[:test]),
        verbose=2,
        callbacks=[mp.MixedPrecisionMonitor()],  # mixed precision
    )
    return 0 if history.history["val_accuracy"][-1] > 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())

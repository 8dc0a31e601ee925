# %% [markdown]
# # Converting a model you already have
#
# `mp.set_policy` affects layers that are built afterwards. A model that exists already,
# trained or loaded from a file, is converted in place.

# %%
import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_mixprec as mp

keras.utils.set_random_seed(0)
images, labels = load_digits(return_X_y=True)
images = images.astype("float32").reshape(-1, 8, 8, 1)
normalization = keras.layers.Normalization(axis=None)
normalization.adapt(images)

model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        normalization,
        keras.layers.Conv2D(32, 3, activation="relu", name="features"),
        keras.layers.GlobalMaxPooling2D(),
        keras.layers.UnitNormalization(),
        keras.layers.Dense(64, activation="relu", name="hidden"),
        keras.layers.Dense(10, activation="softmax", name="digit"),
    ]
)
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(images, labels, epochs=5, verbose=0)
float32 = model.predict(images, verbose=0)
weights = model.get_weights()
print(f"accuracy {(float32.argmax(axis=1) == labels).mean():.2%}")

# %% [markdown]
# ## Look first
#
# `plan` decides and changes nothing. Each row says why.

# %%
plan = mp.plan(model)
print(plan)

# %% [markdown]
# Outputs stay float32, and so do layers whose squares or statistics do not fit float16.
# `override` changes a plan, `keep_float32` asks from the start; both take patterns.
#
# ## Convert
#
# In place: the weights are the same bit for bit, and the optimizer keeps its state. From
# now on it scales the loss.

# %%
mp.convert(model, keep_float32="hidden")
for before, after in zip(weights, model.get_weights(), strict=True):
    assert before.tobytes() == after.tobytes()
half = model.predict(images, verbose=0)
print("optimizer:", type(model.optimizer).__name__)
print(f"steps so far: {int(model.optimizer.iterations)}")
print(f"largest change of a probability: {np.abs(half - float32).max():.1e}")
same = (half.argmax(axis=1) == float32.argmax(axis=1)).mean()
print(f"same answer for {same:.2%} of the images")
assert same > 0.99

# %% [markdown]
# ## Train on, save, load, go back

# %%
history = model.fit(
    images, labels, epochs=5, verbose=0, callbacks=[mp.MixedPrecisionMonitor()]
)
print({key: round(values[-1], 4) for key, values in history.history.items()})

# %%
import pathlib
import tempfile

path = pathlib.Path(tempfile.mkdtemp()) / "half.keras"
model.save(path)
loaded = keras.saving.load_model(path)
print("loaded:", [layer.compute_dtype for layer in loaded.layers])

mp.to_float32(loaded)
print("back:  ", [layer.compute_dtype for layer in loaded.layers])

# %% [markdown]
# The same from a terminal: `keras-mixprec plan model.keras`, then
# `keras-mixprec convert model.keras half.keras`.

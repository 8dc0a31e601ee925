# %% [markdown]
# # Measuring speed and memory
#
# Whether half precision pays depends on the device, the model and the batch. Measure
# your own; this page ran on CPUs, where it rarely does, so read the figures as an
# example of the method.

# %%
import keras
import numpy as np

import keras_mixprec as mp

keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(256, 256)).astype("float32")
y = x[:, :8]
model = keras.Sequential(
    [
        keras.Input((256,)),
        keras.layers.Dense(512, activation="relu"),
        keras.layers.Dense(512, activation="relu"),
        keras.layers.Dense(8),
    ]
)
model.compile("adam", "mse")

# %% [markdown]
# ## One call
#
# Every policy starts from the same weights, on the same batches, with a fresh
# optimizer; compilation is timed apart. Afterwards the model is as it was.

# %%
before = model.get_weights()
result = mp.benchmark(
    model, x, y, ("float32", "mixed_bfloat16"), 64, steps=5, blocks=3, verbose=0
)
print(result)
for a, b in zip(before, model.get_weights(), strict=True):
    assert a.tobytes() == b.tobytes()

# %% [markdown]
# `speedup` compares with the first policy; `loss_difference` says whether both learn the
# same. On a GPU `peak_memory_mb` is the device's, here that of the process.
#
# ## What the memory is
#
# Weights stay float32, and so do the optimizer's two slots per weight: half precision
# shrinks activations alone. How much that is can be counted:

# %%
weights = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
activations = sum(int(np.prod(layer.output.shape[1:])) for layer in model.layers)
for batch in (1, 64, 4096):
    fixed = weights * 4 * 3
    single, half = (fixed + batch * activations * size for size in (4, 2))
    print(f"batch {batch:5}: {single / 2**20:6.1f} MiB, in half {half / 2**20:6.1f}")

# %% [markdown]
# So small batches gain no memory, and large ones up to half.
#
# ## What makes it fast
#
# - Tensor cores, which want matrices whose sizes are multiples of 8.
#   `print(mp.plan(model))` advises where they are not.
# - Work to do: at small sizes casts and launches cost more than the products save.
# - XLA on TensorFlow (`jit_compile=True`), which fuses the casts away.
#
# ```bash
# keras-mixprec doctor                  # what a bare matrix product gains here
# keras-mixprec bench model.keras       # a saved model, without code
# ```
#
# On an H200 a BERT-base train step on JAX took 15.7 ms in mixed_float16 and 29.7 ms in
# TF32 (batch 64, 23 November 2026; [all tables](../benchmarks.md)).

# %%
print(mp.plan(model))

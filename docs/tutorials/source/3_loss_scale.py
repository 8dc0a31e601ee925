# %% [markdown]
# # Reading the loss scale, and finding the layer that overflows
#
# ## Why the loss is scaled
#
# Gradients are small. Those of a trained network, on a scale of powers of two:

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import keras_mixprec as mp

keras.utils.set_random_seed(0)
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")


def network(bad=False):
    layers = [
        keras.layers.Dense(64, activation="relu", name="first"),
        keras.layers.Dense(64, activation="relu", name="second"),
        keras.layers.Dense(10, activation="softmax", dtype="float32", name="digit"),
    ]
    if bad:
        layers.insert(1, keras.layers.Rescaling(6e4, dtype="mixed_float16", name="bad"))
    return keras.Sequential([keras.Input((64,)), *layers])


def compiled(model, optimizer="adam"):
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return model


model = compiled(network())
model.fit(images, labels, epochs=60, verbose=0)
before = model.get_weights()
# One step of plain gradient descent at rate 1 subtracts the gradient.
compiled(model, keras.optimizers.SGD(1.0)).train_on_batch(images[:64], labels[:64])
pairs = zip(before, model.get_weights(), strict=True)
gradients = np.concatenate([(a - b).ravel() for a, b in pairs])
gradients = np.abs(gradients[gradients != 0])

# %%
figure, axes = plt.subplots(figsize=(8, 3))
bins = np.arange(-45, 20)
for scale, label in ((1, "as they are"), (2.0**15, "times 2**15")):
    axes.hist(np.log2(gradients * scale), bins, alpha=0.6, label=label)
axes.axvspan(-24, -14, color="0.85", zorder=0, label="float16, fewer digits")
axes.axvspan(-14, 16, color="0.93", zorder=0, label="float16")
axes.set(xlabel="log2 |gradient|", ylabel="how many", xlim=(-45, 20))
axes.legend(fontsize=8)
plt.show()
for scale in (1.0, 2.0**15):
    lost = (np.float16(gradients * scale) == 0).mean()
    blurred = (gradients * scale < 2.0**-14).mean() - lost
    print(
        f"scale {scale:>7.0f}: {lost:.1%} are 0 in float16, {blurred:.1%} lose digits"
    )

# %% [markdown]
# ## Why it is exact
#
# A gradient is linear in the loss, $\nabla (S L) = S \, \nabla L$. With $S = 2^{15}$
# multiplying adds 15 to the exponent and leaves the fraction alone; multiplying by
# $2^{-15}$ subtracts it again. Bit for bit, as long as the result is a normal number:

# %%
numbers = np.random.default_rng(0).normal(size=100_000).astype("float32")
back = numbers * np.float32(2**15) * np.float32(2**-15)
print("times 2**15 and back:", (back == numbers).mean(), "are the same")
back = numbers * np.float32(30000) * np.float32(1 / 30000)
print("times 30000 and back:", (back == numbers).mean(), "are the same")
assert (numbers * np.float32(2**15) * np.float32(2**-15) == numbers).all()

# %% [markdown]
# ## What the scale does
#
# It doubles after `dynamic_growth_steps` finite steps and halves at each overflow, whose
# step is skipped. Here it starts far too high, so that it has to come down first.

# %%
mp.set_policy("mixed_float16")
keras.utils.set_random_seed(0)
optimizer = mp.LossScaleOptimizer(
    "adam", initial_scale=2.0**24, dynamic_growth_steps=50
)
model = compiled(network(), optimizer)
history = model.fit(
    images, labels, epochs=12, verbose=0, callbacks=[mp.MixedPrecisionMonitor()]
).history
figure, axes = plt.subplots(figsize=(8, 2.5))
axes.step(range(1, 13), np.log2(history["loss_scale"]), where="mid")
axes.bar(range(1, 13), history["overflow_count"], alpha=0.4, color="tab:red")
axes.set(xlabel="epoch", ylabel="log2 loss scale; overflows")
plt.show()
print("overflows per epoch:", history["overflow_count"])

# %% [markdown]
# How to read it:
#
# | what you see | what it means |
# |-|-|
# | some overflows in the first epoch, then one now and then | healthy: the scale is looking for its place |
# | the scale doubles for ever | gradients are tiny; nothing is wrong |
# | the scale falls and falls | no scale helps: values overflow in the forward pass |
# | `overflow_count` is all the steps | nothing is being learned: `LossScaleGuard` stops it |
#
# ## Which layer overflows
#
# A network with a layer that multiplies by 60000. The optimizer counts for each
# variable in how many steps its gradient was not finite:

# %%
import warnings

keras.utils.set_random_seed(0)
model = compiled(network(bad=True))
inspector = mp.OverflowInspector()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "Epoch 1: all steps overflowed", as they should
    model.fit(images, labels, verbose=0, callbacks=[inspector])
print("loss scale:", float(model.optimizer.loss_scale))
for path, count in model.optimizer.overflow_counts.items():
    print(f"{path:32} {count} steps")

# %% [markdown]
# Every variable is hit, so that the counts alone do not tell which layer began it. The inspector looks at activations as well, and names the first:

# %%
layer, how = inspector.report.frames[0].culprit()
print(f"begins in '{layer}': {how}")
assert layer == "bad"

# %% [markdown]
# The remedy is to keep that layer, and what takes its output, in float32: with
# `keep_float32=` of `convert`, or `dtype="float32"` where the layer is made.

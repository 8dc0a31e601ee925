# %% [markdown]
# # First steps
#
# What half precision can hold, what that means for gradient descent, and a network that
# trains in it. The figures and pictures are what the cells above them printed.

# %%
import keras
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

import keras_mixprec as mp

keras.utils.set_random_seed(0)
FORMATS = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}

# %% [markdown]
# ## Number formats
#
# A normal floating-point number is a sign, an exponent and a fraction:
#
# $$x = (-1)^s \cdot 2^{e} \cdot (1 + f / 2^{m})$$
#
# with $m$ bits of fraction. Neighbours are $2^{e-m}$ apart, so that rounding changes a
# number by at most the share $2^{-m-1}$ of it, wherever it is in the range. Below the
# smallest normal number the spacing stays as it is (subnormal numbers), and below half
# of the smallest of those everything is 0.

# %%
print(f"{'format':9} {'largest':>9} {'smallest':>9} {'rounds by':>9}")
for name, dtype in FORMATS.items():
    info = ml_dtypes.finfo(dtype)
    print(
        f"{name:9} {float(info.max):9.2g} {float(info.smallest_subnormal):9.2g} "
        f"{float(info.eps) / 2:9.2g}"
    )

# %%
x = np.logspace(-12, 8, 150)
figure, axes = plt.subplots(figsize=(8, 3))
for name, dtype in FORMATS.items():
    with np.errstate(over="ignore"):
        rounded = x.astype(dtype).astype("float64")
    error = np.minimum(np.abs(rounded - x) / x, 1)
    axes.loglog(x, error, lw=0.8)
    axes.plot([], [], "o", color=axes.lines[-1].get_color(), label=name)
axes.set(xlabel="number", ylabel="relative error", ylim=(1e-9, 2))
axes.set_title("How well a format holds a number (1: not at all)")
axes.legend()
plt.show()

# %% [markdown]
# float16 holds nothing above 65504 and nothing below 3e-8. bfloat16 holds all that
# float32 does, with an error of up to 0.4%.
#
# ## Gradient descent through a small network, by hand
#
# Gradient descent subtracts from each weight its gradient times a rate $\eta$:
#
# $$w \leftarrow w - \eta \, \frac{\partial L}{\partial w}$$
#
# The textbook's network: 10 numbers, a hidden layer of 10 sigmoids, one of 5, one output.
# With $a_0 = x$ and layers $z_l = a_{l-1} W_l + b_l$, $a_l = \sigma(z_l)$ and
# $\sigma'(z) = \sigma(z)(1 - \sigma(z))$, the chain rule gives, from the last layer back,
#
# $$\delta_l = (\delta_{l+1} W_{l+1}^\top) \odot a_l \odot (1 - a_l), \qquad
# \frac{\partial L}{\partial W_l} = a_{l-1}^\top \delta_l$$
#
# Only the first step back depends on the loss. For the mean squared error
# $L = \frac{1}{n}\sum (a - y)^2$ it is $\delta = \frac{2}{n}(a - y) \odot a \odot (1 - a)$;
# for binary cross-entropy $L = -\frac{1}{n}\sum y \log a + (1 - y)\log(1 - a)$ the
# factor $a (1 - a)$ cancels: $\delta = \frac{1}{n}(a - y)$.


# %%
def network():
    layers = [
        keras.layers.Dense(units, activation="sigmoid", dtype="float32")
        for units in (10, 5, 1)
    ]
    return keras.Sequential([keras.Input((10,)), *layers])


def gradients_by_hand(weights, x, y, loss):
    activations = [x]
    for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
        activations.append(1 / (1 + np.exp(-(activations[-1] @ kernel + bias))))
    a = activations.pop()
    delta = (a - y) / len(x)
    if loss == "mse":
        delta = 2 * delta * a * (1 - a)
    found = []
    for kernel in weights[-2::-2]:
        a = activations.pop()
        found += [delta.sum(axis=0), a.T @ delta]
        delta = (delta @ kernel.T) * a * (1 - a)
    return found[::-1]


def gradients_by_keras(model, x, y, loss):
    # With plain gradient descent at rate 1 a step subtracts the gradient itself.
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(1.0), loss)
    model.train_on_batch(x, y)
    after = model.get_weights()
    model.set_weights(before)
    return [b - a for b, a in zip(before, after, strict=True)]


x = np.random.default_rng(0).normal(size=(256, 10)).astype("float32")
y = (x.sum(axis=1, keepdims=True) > 0).astype("float32")
model = network()
for loss in ("mse", "binary_crossentropy"):
    by_hand = gradients_by_hand(model.get_weights(), x, y, loss)
    by_keras = gradients_by_keras(model, x, y, loss)
    difference = max(
        np.abs(a - b).max() for a, b in zip(by_hand, by_keras, strict=True)
    )
    largest = max(np.abs(g).max() for g in by_keras)
    print(f"{loss:20} largest gradient {largest:.4f}, difference {difference:.1e}")
    assert difference < 1e-5 * max(largest, 1)

# %% [markdown]
# ## Why master weights
#
# An update is the gradient times the rate: often less than a thousandth of the weight.
# With $m = 10$ bits of fraction, neighbours of $w$ are at least $2^{-11} |w|$ apart, so
# that an update is rounded away, each time, if it is smaller than half of that:
#
# $$\eta \left| \frac{\partial L}{\partial w} \right| < 2^{-12} \, |w|
#   \quad \Rightarrow \quad w - \eta \frac{\partial L}{\partial w} = w$$
#
# So the weights stay float32 ("master weights"), and layers use a half-precision copy.

# %%
half, single = np.float16(1), np.float32(1)
for _ in range(1000):
    half = np.float16(half + np.float16(2e-4))
    single = np.float32(single + np.float32(2e-4))
print(f"1 + 1000 × 0.0002 is {half} in float16, {single:.4f} in float32")
assert half == 1

# %% [markdown]
# The same in a training, by hand, with the gradients from above: forward and backward
# pass in float16, the weights in float16 or in float32.


# %%
def cross_entropy(weights):
    a = x
    for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
        a = 1 / (1 + np.exp(-(a @ kernel + bias)))
    return float(-np.mean(y * np.log(a) + (1 - y) * np.log(1 - a)))


def descend(stored, computed, rate=0.1, steps=4000):
    weights = [w.astype(stored) for w in start]
    x_, y_ = x.astype(computed), y.astype(computed)
    losses = []
    for step in range(steps):
        copy = [w.astype(computed) for w in weights]
        found = gradients_by_hand(copy, x_, y_, "binary_crossentropy")
        updates = [(rate * g).astype(stored) for g in found]
        weights = [w - u for w, u in zip(weights, updates, strict=True)]
        if step % 100 == 99:
            losses.append(cross_entropy([w.astype("float32") for w in weights]))
    return losses


start = network().get_weights()
figure, axes = plt.subplots(figsize=(8, 3))
last = {}
for stored, computed in (
    ("float32", "float32"),
    ("float32", "float16"),
    ("float16", "float16"),
):
    losses = descend(stored, computed)
    last[stored, computed] = losses[-1]
    label = f"weights {stored}, passes {computed}"
    axes.plot(range(100, 4001, 100), losses, label=label)
    print(f"{label}: loss {losses[-1]:.4f}")
axes.set(xlabel="step", ylabel="binary cross-entropy")
axes.legend(fontsize=8)
plt.show()
whole, mixed, all_half = last.values()
assert abs(mixed - whole) < 0.1 * whole < all_half - whole

# %% [markdown]
# ## Which step runs in which precision
#
# | step | precision |
# |-|-|
# | master weights, optimizer state, update | float32 |
# | forward and backward pass | float16 or bfloat16 |
# | inside normalizations and softmax | float32 |
# | output layer and loss | float32 |
# | scaling and unscaling | a power of two, exact |
#
# The last section looks at a real step, and finds this.
#
# ## The same network in mixed precision
#
# One line before the model is built, and the monitor to see what happens. The output
# layer stays float32.

# %%
mp.set_policy("mixed_float16")
model = keras.Sequential(
    [
        keras.Input((10,)),
        keras.layers.Dense(10, activation="sigmoid"),
        keras.layers.Dense(5, activation="sigmoid"),
        keras.layers.Dense(1, activation="sigmoid", dtype="float32"),
    ]
)
model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy", metrics=["accuracy"])
history = model.fit(x, y, epochs=30, verbose=0, callbacks=[mp.MixedPrecisionMonitor()])
last = {key: values[-1] for key, values in history.history.items()}
for key in ("accuracy", "loss", "loss_scale", "overflow_total"):
    print(f"{key:15} {last[key]:.4g}")
assert last["accuracy"] > 0.9

# %% [markdown]
# What each layer computes in, and where its weights are:

# %%
mp.set_policy("float32")
for layer in model.layers:
    print(f"{layer.name}: {layer.compute_dtype}, from {layer.variable_dtype}")

# %% [markdown]
# One step of it, taken apart: what is float16, and what is not.

# %%
import tensorflow as tf

optimizer, (first, second, output) = model.optimizer, model.layers
with tf.GradientTape() as tape:
    hidden = first(tf.constant(x))
    outputs = output(second(hidden))
    loss = tf.reduce_mean(keras.losses.binary_crossentropy(y, outputs))
    scaled = optimizer.scale_loss(loss)
to_hidden, to_kernel = tape.gradient(scaled, [hidden, first.kernel.value])
(update,) = optimizer.get_unscaled_gradients([to_kernel])
slots = [v for v in optimizer.variables if v.shape == first.kernel.shape]
seen = {
    "master weights": first.kernel.value,
    "forward: activations": hidden,
    "forward: outputs": outputs,
    "loss": loss,
    "scaled loss": scaled,
    "backward: gradient of activations": to_hidden,
    "gradient of weights, unscaled": update,
    "update: Adam's moments": slots[0],
}
for step, value in seen.items():
    print(f"{step:34} {keras.backend.standardize_dtype(value.dtype)}")
half = [step for step, value in seen.items() if value.dtype == "float16"]
assert half == ["forward: activations", "backward: gradient of activations"]
assert float(scaled / loss) == float(optimizer.loss_scale)
small = np.abs(to_hidden.numpy().astype("float32")) / float(optimizer.loss_scale)
blurred = (small < 2.0**-14).mean()
lost = (np.float16(small) == 0).mean()
print(f"without the scale {blurred:.0%} of these would lose digits, {lost:.0%} be 0")
assert blurred > 0.5

# %% [markdown]
# Next: [a model that you already have](2_convert.ipynb).

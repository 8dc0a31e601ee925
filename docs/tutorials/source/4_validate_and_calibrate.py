# %% [markdown]
# # Precision validation and calibration
#
# A step whose gradients overflow is skipped, and counted. A layer that merely computes
# something else in half precision is not noticed by anybody: the loss stays finite. This
# page measures how far half precision is from float32, layer by layer, while training
# and before it.

# %%
import logging

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import keras_mixprec as mp

keras.utils.set_random_seed(0)

# %% [markdown]
# ## The measure
#
# The error of an output $\tilde y$ in half precision is the length of its difference
# from that in float32, $y$, over the length of $y$:
#
# $$\varepsilon = \frac{\lVert \tilde y - y \rVert_2}{\lVert y \rVert_2}$$
#
# Rounding to $m$ bits of fraction changes a number by at most the share $u = 2^{-m-1}$:
# $2^{-11}$ in float16, $2^{-8}$ in bfloat16. Errors of different layers point in
# directions that have nothing to do with each other, so their squares add up: $n$ layers
# of error $\varepsilon_1$ each make
#
# $$\varepsilon_n \approx \varepsilon_1 \sqrt{n}$$
#
# A deep chain of products, measured:

# %%
DEPTH = 32
orthogonal = keras.initializers.Orthogonal(seed=0)
chain = keras.Sequential([keras.Input((256,))])
for _ in range(DEPTH):
    chain.add(keras.layers.Dense(256, use_bias=False, kernel_initializer=orthogonal))
x = np.random.default_rng(0).normal(size=(64, 256)).astype("float32")

figure, axes = plt.subplots(figsize=(8, 3))
depths = np.arange(1, DEPTH + 1)
for policy in ("mixed_float16", "mixed_bfloat16"):
    report = mp.compare_precision(chain, x, policy=policy)
    errors = [row.error for row in report.layers if row.layer_class == "Dense"]
    (line,) = axes.plot(depths, errors, "o", ms=3, label=policy)
    axes.plot(depths, errors[0] * np.sqrt(depths), color=line.get_color(), lw=0.8)
    print(f"{policy:15} 1 layer {errors[0]:.1e}, {DEPTH} layers {errors[-1]:.1e}")
    assert 0.5 < errors[-1] / (errors[0] * np.sqrt(DEPTH)) < 2
axes.set(xlabel="layers", ylabel="relative error", yscale="log")
axes.set_title("Dots: measured. Lines: the first layer's error times √n")
axes.legend()
plt.show()

# %% [markdown]
# So a sound model of a hundred layers is off by less than half a percent in float16. What is
# off by more has a layer that does something float16 cannot.
#
# ## Compare
#
# Such a layer: it divides by the root mean square, as many normalizations do. Its inputs
# are a few hundred, and their squares are beyond 65504: infinite, so that the quotient is
# 0. No NaN, no overflow in the gradient.


# %%
class RMS(keras.layers.Layer):
    def call(self, x):
        mean = keras.ops.mean(keras.ops.square(x), axis=-1, keepdims=True)
        return x / keras.ops.sqrt(mean + 1e-3)


images, labels = load_digits(return_X_y=True)
images = images.astype("float32") * 100  # A sensor's raw values, 0 to 1600.
x, y, x_val, y_val = images[:1500], labels[:1500], images[1500:], labels[1500:]


def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, name="features"),
            RMS(name="rms"),
            keras.layers.Dense(64, activation="relu", name="hidden"),
            keras.layers.Dense(10, activation="softmax", name="digit"),
        ],
        name="network",
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


model = network()
report = mp.compare_precision(model, x_val)
print(report)
print("to blame:", report.culprit().path)
assert report.culprit().path == "rms"

# %% [markdown]
# "Own" is the error that a layer makes when it is fed with float32's values; "inherited"
# the one that its inputs bring along. `hidden` and `digit` are all wrong and innocent.

# %%
rows = [row for row in report.layers if row.own_error is not None]
figure, axes = plt.subplots(figsize=(8, 3))
place = np.arange(len(rows))
for i, kind in enumerate(("own_error", "inherited_error", "error")):
    sizes = [max(getattr(row, kind), 1e-5) for row in rows]
    axes.bar(place + 0.27 * (i - 1), sizes, 0.25, label=kind.replace("_", " "))
axes.axhline(0.01, color="0.5", lw=0.8)
axes.set_xticks(place, [row.path for row in rows])
axes.set(yscale="log", ylabel="relative error", ylim=(1e-5, 3))
axes.set_title("The line is the tolerance, 0.01")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Validate while training
#
# Trained in half precision this network sees zeros, and learns nothing that its biases
# could not say. `PrecisionValidator` compares at the end of each epoch, with the weights
# of that epoch. `on_violation` says what happens above the tolerance: `"warn"`, `"stop"`,
# or `"promote"`, which moves the layer to blame to float32 and goes on.

# %%
logging.getLogger("keras_mixprec").setLevel(logging.ERROR)


def trained(model, epochs=8, callbacks=()):
    return model.fit(
        x,
        y,
        epochs=epochs,
        batch_size=64,
        validation_data=(x_val, y_val),
        verbose=0,
        callbacks=list(callbacks),
    ).history


histories = {"float32": trained(network())}
histories["mixed_float16"] = trained(mp.convert(network()))
validator = mp.PrecisionValidator((x_val, y_val), on_violation="promote")
histories["with promotion"] = trained(mp.convert(network()), callbacks=[validator])
for promotion in validator.promotions:
    print(promotion)
figure, axes = plt.subplots(figsize=(8, 3))
for name, history in histories.items():
    axes.plot(range(1, 9), history["val_accuracy"], label=name)
    print(f"{name:15} accuracy {history['val_accuracy'][-1]:.1%}")
axes.set(xlabel="epoch", ylabel="accuracy on held-out images")
axes.legend(fontsize=8)
plt.show()
assert [p.path for p in validator.promotions] == ["rms"]
assert histories["with promotion"]["val_accuracy"][-1] > 0.8
assert histories["mixed_float16"]["val_accuracy"][-1] < 0.5

# %% [markdown]
# Its keys stand in the logs with all others:

# %%
for key in ("precision_error", "precision_agreement", "val_loss", "val_loss_float32"):
    print(f"{key:20} {histories['with promotion'][key][-1]:.4g}")

# %% [markdown]
# ## Calibrate before training
#
# `calibrate` runs the model on some batches of real data and looks for the fewest layers
# in float32 that keep the outputs within the tolerance and all gradients finite. The plan
# carries what was measured, and the loss scale to begin with: the largest power of two
# $S$ that leaves room for the largest gradient, $S \cdot \max |g| \ll 65504$.

# %%
model = network()
plan = mp.calibrate(model, x, y, tolerance=0.01, verbose=0)
print(plan)
print("initial scale: 2 **", int(np.log2(plan.initial_scale)))
measured = plan["features"].measured
print({key: float(f"{value:.2g}") for key, value in measured.items()})
assert plan["rms"].policy == "float32"
assert plan["features"].policy == "mixed_float16"

# %%
mp.convert(model, plan=plan)
report = mp.compare_precision(model, x_val)
accuracy = trained(model)["val_accuracy"][-1]
print(f"relative error now {report.relative_error:.1e}, trained: {accuracy:.1%}")
assert report.relative_error < 0.01
assert accuracy > 0.8

# %% [markdown]
# ## Adapt to what changes
#
# Ranges change during a training. Here a sensor's gain is a hundred times too high in
# every fourth batch of the epochs 4 to 9, and squares overflow for as long.
# `AdaptivePrecision` moves the layer that is to blame to float32 after two troubled
# epochs (`patience`), and back after five calm ones (`calm_epochs`).

# %%
EPOCHS, STEPS = 20, 20


def batches():
    for epoch in range(1, EPOCHS + 1):
        for step in range(STEPS):
            gain = 1.0 if 4 <= epoch <= 9 and step % 4 == 3 else 0.01
            part = slice(64 * step, 64 * step + 64)
            yield x[part] * gain, y[part]


class Power(keras.layers.Layer):
    def call(self, x):
        return keras.ops.log(1 + keras.ops.mean(keras.ops.square(x), -1, keepdims=True))


keras.utils.set_random_seed(0)
inputs = keras.Input((64,))
features = keras.layers.Dense(64, name="features")(inputs)
both = keras.layers.Concatenate()([features, Power(name="power")(features)])
outputs = keras.layers.Dense(10, activation="softmax", name="digit")(both)
model = keras.Model(inputs, outputs)
model.compile("adam", "sparse_categorical_crossentropy")
mp.convert(model)
adaptive = mp.AdaptivePrecision()
history = model.fit(
    batches(),
    shuffle=False,
    steps_per_epoch=STEPS,
    epochs=EPOCHS,
    verbose=0,
    callbacks=[adaptive, mp.MixedPrecisionMonitor()],
).history
for change in adaptive.changes:
    print(
        f"after epoch {change.epoch + 1}: {change.path} {change.before} -> {change.after}"
    )

# %%
figure, axes = plt.subplots(figsize=(8, 2.8))
epochs = np.arange(1, EPOCHS + 1)
axes.axvspan(3.5, 9.5, color="0.9", label="gain too high")
axes.bar(epochs, history["overflow_count"], color="tab:red", label="steps skipped")
axes.step(epochs, history["float32_layers"], where="mid", label="layers in float32")
axes.set(xlabel="epoch", xticks=epochs[1::2])
axes.legend(fontsize=8)
plt.show()
assert [c.after for c in adaptive.changes] == ["float32", "mixed_float16"]
assert sum(history["overflow_count"][5:]) == 0

# %% [markdown]
# All of it in words: [validate, calibrate, adapt](../precision.md).
#
# Next: [measuring speed and memory](5_measure.ipynb).

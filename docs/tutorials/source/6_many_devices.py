# %% [markdown]
# # Many devices, one decision
#
# Several devices train one model on parts of each batch. Whether a step is applied has to
# be the same decision on all of them. This page runs on two logical devices, made of the
# CPU; on GPUs the code is the same, without the first cell.

# %%
import tensorflow as tf

tf.get_logger().setLevel("ERROR")  # It tells of every all-reduce.
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)

import keras
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import keras_mixprec as mp

DEVICES = ["CPU:0", "CPU:1"]
BATCH = 64
images, labels = load_digits(return_X_y=True)
x, y = (images[:1536] / 16).astype("float32"), labels[:1536]

# %% [markdown]
# ## What the devices do
#
# Each of $N$ replicas has a copy of the weights $w$ and one part in $N$ of the batch of
# $B$ samples. The mean over the batch is the mean over the replicas of their means, and
# so is its gradient:
#
# $$g = \nabla_w \frac{1}{B} \sum_i L_i = \frac{1}{N} \sum_r g_r,
#   \qquad g_r = \nabla_w \frac{N}{B} \sum_{i \in r} L_i$$
#
# All replicas get the sum (an *all-reduce*), and apply the same update to the same
# weights. By hand, for a linear model and the mean squared error, whose gradient is
# $2 X^\top (Xw - t) / B$:

# %%
random = np.random.default_rng(0)
features, weights = random.normal(size=(BATCH, 8)), random.normal(size=8)
target = random.normal(size=BATCH)


def gradient(part):
    rows = features[part]
    return 2 / len(rows) * rows.T @ (rows @ weights - target[part])


whole = gradient(slice(0, BATCH))
replicas = [gradient(slice(start, start + 32)) for start in (0, 32)]
print("largest difference:", np.abs(whole - sum(replicas) / 2).max())
assert np.allclose(whole, sum(replicas) / 2)

# %% [markdown]
# ## Why one decision
#
# A gradient that overflowed on one replica makes the sum non-finite for all:
# $\infty + g = \infty$, and $\mathrm{NaN} + g = \mathrm{NaN}$. A replica that looks at its
# own gradient only, before the sum, sees nothing wrong and applies it.

# %%
own = [np.float32(0.5), np.float32(np.inf)]
print("each replica's own is finite:", [bool(np.isfinite(g)) for g in own])
print("the sum is finite:           ", bool(np.isfinite(sum(own))))

# %% [markdown]
# Keras's own wrapper reads the first replica's gradients. Ours reads the sum, which every
# replica has anyway: the decision costs no communication. One sample, on the second
# replica only, that overflows float16:


# %%
def network(dtype="mixed_float16"):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, activation="relu", dtype=dtype) for _ in range(2)]
    output = keras.layers.Dense(10, activation="softmax", dtype="float32")
    return keras.Sequential([keras.Input((64,)), *layers, output])


def trained(strategy, optimizer, data, dtype="mixed_float16", epochs=1):
    with strategy.scope():
        model = network(dtype)
        model.compile(optimizer(), "sparse_categorical_crossentropy")
    batches = tf.data.Dataset.from_tensor_slices(data).batch(BATCH)
    history = model.fit(batches, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history


def copies(strategy, variable):
    return [np.asarray(c) for c in strategy.experimental_local_results(variable.value)]


bad = x.copy()
bad[BATCH + 40] = 1e6  # The second batch; its rows 32 to 63 are the second replica's.
mirrored = tf.distribute.MirroredStrategy(DEVICES)
for wrapper in (keras.optimizers.LossScaleOptimizer, mp.LossScaleOptimizer):
    model, _ = trained(mirrored, lambda w=wrapper: w(keras.optimizers.Adam()), (bad, y))
    finite = all(
        np.isfinite(copy).all()
        for v in model.trainable_variables
        for copy in copies(mirrored, v)
    )
    scale = copies(mirrored, model.optimizer.dynamic_scale)[0]
    print(f"{wrapper.__module__:45} weights finite: {finite}, loss scale {scale:g}")

equal = all(
    first.tobytes() == second.tobytes()
    for first, second in (copies(mirrored, v) for v in model.trainable_variables)
)
print("both replicas hold the same bits:", equal)
print("counted:", model.optimizer.overflow_count)
assert finite and equal and model.optimizer.overflow_count == 1

# %% [markdown]
# ## The same training on one device and on two
#
# With the same global batch nothing differs but the order of the sums. Gradients are
# summed before they are clipped, accumulated or averaged, so that this holds for those
# as well.


# %%
def accumulating():
    adam = keras.optimizers.Adam(
        0.003, global_clipnorm=0.1, gradient_accumulation_steps=2
    )
    return mp.LossScaleOptimizer(adam)


figure, axes = plt.subplots(figsize=(8, 3))
curves = []
for label, strategy, style in (
    ("one device", tf.distribute.get_strategy(), "-"),
    ("two devices", mirrored, "o"),
):
    _, history = trained(strategy, accumulating, (x, y), "float32", epochs=8)
    curves.append(np.array(history["loss"]))
    axes.plot(range(1, 9), curves[-1], style, label=label)
axes.set(xlabel="epoch", ylabel="loss", yscale="log")
axes.legend()
plt.show()
difference = np.abs(curves[1] / curves[0] - 1).max()
print(f"largest relative difference of a loss: {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# ## What the monitor says
#
# A step of all replicas is one step: an overflow is counted once. Memory is that of each
# GPU (`gpu_memory_mb_0`, ...) and their sum.

# %%
with mirrored.scope():
    model = network()
    model.compile(mp.LossScaleOptimizer("adam"), "sparse_categorical_crossentropy")
history = model.fit(
    tf.data.Dataset.from_tensor_slices((bad, y)).batch(BATCH),
    epochs=3,
    shuffle=False,
    verbose=0,
    callbacks=[mp.MixedPrecisionMonitor()],
).history
for key in ("loss", "loss_scale", "overflow_count", "overflow_total"):
    print(f"{key:15}", [round(value, 3) for value in history[key]])
assert history["overflow_count"] == [1, 1, 1]

# %% [markdown]
# ## What a decision of its own would cost
#
# An all-reduce of a single number takes about $t = a + 2 b \log_2 N$: a fixed part, and a
# hop for each level of a tree, up and down. With $a$ = 4.4 µs and $b$ = 5 µs for a hop
# over a network, figures by which NCCL chooses its algorithms
# ([source](../scaling.md#what-the-decision-costs)):

# %%
replicas = 2 ** np.arange(0, 14)
figure, axes = plt.subplots(figsize=(8, 2.6))
axes.plot(replicas, 4.4 + 2 * 5.0 * np.log2(replicas), label="an all-reduce of its own")
axes.plot(replicas, 0 * replicas, label="read off the gradients' sum")
axes.set_xscale("log", base=2)
axes.set(xlabel="replicas, one to a host", ylabel="µs per step (model)")
axes.legend()
plt.show()

# %% [markdown]
# ## JAX
#
# `keras.distribution` splits batches over devices, of one process or of several. The step
# is one program for all; there is one gradient, summed by XLA, and one decision. Nothing
# is added to a script. Run here in a process of its own, with two host devices, on the
# same data with the same bad sample:

# %%
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile

SCRIPT = """
import keras, numpy as np
from sklearn.datasets import load_digits
import keras_mixprec as mp

keras.distribution.set_distribution(keras.distribution.DataParallel())
mp.set_policy("mixed_float16")
images, labels = load_digits(return_X_y=True)
x, y = (images[:1536] / 16).astype("float32"), labels[:1536]
x[64 + 40] = 1e6
model = keras.Sequential([
    keras.Input((64,)),
    keras.layers.Dense(32, activation="relu"),
    keras.layers.Dense(10, activation="softmax", dtype="float32"),
])
model.compile("adam", "sparse_categorical_crossentropy")
model.fit(x, y, batch_size=64, shuffle=False, verbose=0)
weight = model.trainable_variables[0].value
print("devices:", len(weight.addressable_shards))
print("counted:", model.optimizer.overflow_count)
print("finite: ", bool(np.isfinite(np.asarray(weight)).all()))
"""


def run(backend, script, *command, **environment):
    if importlib.util.find_spec(backend) is None:
        return print(f"{backend} is not installed here")
    path = pathlib.Path(tempfile.mkdtemp()) / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, *command, str(path)],
        env={**os.environ, "KERAS_BACKEND": backend, **environment},
        capture_output=True,
        text=True,
    )
    print(done.stdout, end="")
    assert done.returncode == 0, done.stderr


run("jax", SCRIPT, XLA_FLAGS="--xla_force_host_platform_device_count=2")

# %% [markdown]
# Several JAX processes, with a backup that one of them writes: `examples/jax_processes.py`.
#
# ## torch
#
# Every device has a process; DistributedDataParallel sums the gradients in the backward
# pass, so that all optimizers see the same ones and decide alike.

# %%
SCRIPT = """
import gc, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import keras, numpy as np
from sklearn.datasets import load_digits
import keras_mixprec as mp

dist.init_process_group("gloo")  # "nccl" on GPUs

def train():
    rank = dist.get_rank()
    keras.utils.set_random_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = (images[:1536] / 16).astype("float32"), labels[:1536]
    x[64 + 41] = 1e6  # Odd: the second process's.
    with mp.policy_scope("mixed_float16"):
        net = keras.Sequential([
            keras.Input((64,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10, dtype="float32"),
        ])
        optimizer = mp.LossScaleOptimizer("adam")
    optimizer.build(net.trainable_variables)
    replica = DistributedDataParallel(net)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    mine = torch.as_tensor(x[rank::2]), torch.as_tensor(y[rank::2])
    for images, labels in zip(mine[0].split(32), mine[1].split(32)):
        net.zero_grad()
        loss = loss_of(labels, replica(images))
        optimizer.scale_loss(loss).backward()
        with torch.no_grad():
            weights = net.trainable_variables
            optimizer.apply([w.value.grad for w in weights], weights)
    flat = torch.cat([w.value.detach().ravel() for w in weights])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    if rank == 0:
        print("processes:", dist.get_world_size())
        print("counted:  ", optimizer.overflow_count)
        print("finite:   ", bool(flat.isfinite().all()))
        print("same bits:", bool((both[0] == both[1]).all()))

train()
# With the module goes the last reference to the group, whose threads might otherwise
# abort the process at its end (https://github.com/pytorch/pytorch/issues/190489).
gc.collect()
dist.barrier()  # Nobody leaves while another still waits.
dist.destroy_process_group()
"""
launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
run("torch", SCRIPT, *launcher, OMP_NUM_THREADS="1")

# %% [markdown]
# Which engines there are, what each of them does, and what happens when a replica dies:
# [many devices](../scaling.md).
#
# Next: [coming from torch, tf.keras or DeepSpeed](7_coming_from.ipynb).

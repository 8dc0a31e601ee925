# %% [markdown]
# # Coming from torch.cuda.amp, tf.keras or DeepSpeed
#
# What each name there is here. The last part checks the claims that can be checked
# without a GPU.
#
# ## From torch.amp (torch.cuda.amp)
#
# | torch | here |
# |-|-|
# | `with torch.autocast("cuda", torch.float16):` | `mp.set_policy("mixed_float16")` before the model is built, or `mp.convert(model)` |
# | `GradScaler()` | `mp.LossScaleOptimizer(optimizer)`; `compile` adds it by itself |
# | `init_scale=2**16` | `initial_scale=2.0**15` |
# | `growth_factor=2.0` | `growth_factor=2.0` |
# | `backoff_factor=0.5` | `backoff_factor=0.5` |
# | `growth_interval=2000` | `dynamic_growth_steps=2000` |
# | `enabled=False` | `mp.set_policy("float32")` |
# | `scaler.scale(loss).backward()` | `optimizer.scale_loss(loss).backward()` |
# | `scaler.unscale_(optimizer)`, then clip | `optimizer.get_unscaled_gradients(grads)`; or `clipnorm=` of the inner optimizer |
# | `scaler.step(optimizer); scaler.update()` | `optimizer.apply(grads, weights)` |
# | `scaler.get_scale()` | `optimizer.loss_scale` |
# | `scaler.state_dict()` | saved with the model |
# | casts per operation | policies per layer, with a plan that can be read |
#
# ## From tf.keras.mixed_precision
#
# | tf.keras | here |
# |-|-|
# | `mixed_precision.set_global_policy(p)` | `mp.set_policy(p)` |
# | `mixed_precision.Policy(p)` | `keras.DTypePolicy(p)` |
# | `mixed_precision.LossScaleOptimizer(opt)` | `mp.LossScaleOptimizer(opt)` |
# | `initial_scale=2**15` | `initial_scale=2.0**15` |
# | `dynamic_growth_steps=2000` | `dynamic_growth_steps=2000` |
# | `dynamic=False, initial_scale=s` | `initial_scale=s, growth_factor=1.0, backoff_factor=1.0` |
# | `get_scaled_loss`, `get_unscaled_gradients` | the same names |
# | `loss_scale` | `loss_scale` |
#
# ## From Keras 3
#
# | Keras 3 | here |
# |-|-|
# | `keras.config.set_dtype_policy("mixed_float16")` | `mp.set_policy("mixed_float16")` |
# | `keras.optimizers.LossScaleOptimizer` | `mp.LossScaleOptimizer`, a subclass; reads its checkpoints |
# | `scale_loss` | `scale_loss`; in a JAX loop `stateless_scale_loss` |
#
# ## From DeepSpeed's fp16 section
#
# | DeepSpeed | here |
# |-|-|
# | `"enabled": true` | `mp.set_policy("mixed_float16")` |
# | `"loss_scale": 0` (dynamic) | the default |
# | `"loss_scale": s` (fixed) | `initial_scale=s, growth_factor=1.0, backoff_factor=1.0` |
# | `"initial_scale_power": 16` | `initial_scale=2.0**16` |
# | `"loss_scale_window": 1000` | `dynamic_growth_steps=1000` |
# | `"hysteresis": 2` | `hysteresis=2` |
# | `"consecutive_hysteresis": true` | `consecutive_hysteresis=True` |
# | `"min_loss_scale": 1` | `min_scale=1.0`; with `mp.LossScaleGuard` a run that stays there stops |
# | `bf16` section | `mp.set_policy("mixed_bfloat16")` |
#
# ## Checked

# %%
import keras
import numpy as np

import keras_mixprec as mp

keras.utils.set_random_seed(0)


def steps(optimizer, finite):
    """Return the loss scale after each step, given which of them are finite."""
    weight = keras.Variable(np.ones(2, "float32"))
    optimizer.build([weight])
    scales = []
    for ok in finite:
        gradient = np.ones(2, "float32") if ok else np.full(2, np.inf, "float32")
        optimizer.scale_loss(keras.ops.convert_to_tensor(1.0))
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [weight])
        scales.append(float(optimizer.loss_scale))
    return scales


# %% [markdown]
# `GradScaler(init_scale=8, growth_interval=2)`: after two finite steps 16, then halved.

# %%
scaler = mp.LossScaleOptimizer("sgd", initial_scale=8.0, dynamic_growth_steps=2)
scales = steps(scaler, [True, True, False, True])
print(scales)
assert scales == [8.0, 16.0, 8.0, 8.0]

# %% [markdown]
# A fixed scale, tf.keras's `dynamic=False` and DeepSpeed's `"loss_scale": 1024`:

# %%
fixed = mp.LossScaleOptimizer(
    "sgd", initial_scale=1024.0, growth_factor=1.0, backoff_factor=1.0
)
scales = steps(fixed, [True, False, False, True])
print(scales, "skipped:", fixed.overflow_count)
assert scales == [1024.0] * 4
assert fixed.overflow_count == 2

# %% [markdown]
# DeepSpeed's hysteresis: the first overflow is tolerated, the second halves; the scale
# stops at its minimum.

# %%
deepspeed = mp.LossScaleOptimizer(
    "sgd", initial_scale=4.0, dynamic_growth_steps=1000, hysteresis=2, min_scale=1.0
)
scales = steps(deepspeed, [False] * 5)
print(scales)
assert scales[:2] == [4.0, 2.0]
assert scales[-1] == 1.0

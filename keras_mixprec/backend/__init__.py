"""One module per Keras backend, each with the same few functions.

`commit`            apply an update only if no gradient overflowed, and record it
`assign`            values to small variables, several at once
`reduce_gradients`  summed over the replicas, where the engine has not done so
`unscale`           gradients divided by the loss scale, in float32 at least
`wrap_train_step`   a train step that is committed or rolled back whole
`is_chief`          whether this process speaks for those that train together
`last_notes`        what each process that trains with this one last said
`sees_whole_loss`   whether a train step sees the loss of the whole batch
`carrier`           what brings statistics of layers' outputs to the optimizer
`activation`        one of Keras's activation functions, with a cheaper gradient if any
`recomputed`        a function, computed anew in the backward pass where that pays
`gradients`         of a function, eagerly, by variables and by tensors
`memory_info`       bytes in use and at the peak, per accelerator
`reset_peak_memory` start the peak anew
`accelerator`       what the hardware is, for `set_policy("auto")`
`xla`               whether it compiles with XLA, and what to know about that
"""

import importlib

import keras

# A variable's gradient is usable if its norm is finite and leaves room in float32 for
# sums of squares over all variables (global clipping) and in time (second moments).
LARGEST_NORM = 2.0**48
# The norm of the scaled gradient, whose own square must fit into float32 as well.
LARGEST_SCALED_NORM = 2.0**63

_MODULES = ("tensorflow", "jax", "torch")


def _load():
    name = keras.backend.backend()
    if name not in _MODULES:
        raise ImportError(
            f"keras_mixprec runs on the Keras backends {', '.join(_MODULES)}. "
            f"Received: KERAS_BACKEND={name}. Set KERAS_BACKEND to one of them "
            "before Keras is imported."
        )
    return importlib.import_module(f"{__name__}.{name}")


engine = _load()

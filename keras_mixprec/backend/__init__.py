"""One module per Keras backend, each with the same few functions.

`commit`            apply an update only if no gradient overflowed, and record it
`overflow_flags`    which gradients no optimizer can use
`unscale`           gradients divided by the loss scale, in float32 at least
`wrap_train_step`   a train step that is committed or rolled back whole
`memory_info`       bytes in use and at the peak, per accelerator
`reset_peak_memory` start the peak anew
`accelerator`       what the hardware is, for `set_policy("auto")`
"""

import importlib

import keras

# A gradient is usable if it is finite and so are sums of squares of it: global
# clipping and second moments add up to 2**30 squares of 2**48, below float32's 2**128.
LARGEST_GRADIENT = 2.0**48

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

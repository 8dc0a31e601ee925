"""What the benchmarks need of each Keras backend, with the same few names.

`set_tf32`   TF32 matrix products on or off for float32
`put`        arrays, resident on the device
`steps`      `n` calls of a compiled model's own train function, as `fit` makes them
`wait`       until the device has nothing left to do
`device`     the accelerator's name, `None` where there is none
`cuda`       the CUDA version, `None` where there is none
"""

import itertools

import keras

import keras_mixprec


class TensorFlow:
    """TensorFlow, one GPU or the CPU."""

    def __init__(self):
        import tensorflow as tf

        self.tf = tf
        self.version = tf.__version__
        self._gpus = tf.config.list_physical_devices("GPU")
        for gpu in self._gpus:
            tf.config.experimental.set_memory_growth(gpu, True)

    def set_tf32(self, enabled):
        self.tf.config.experimental.enable_tensor_float_32_execution(enabled)

    def put(self, arrays):
        with self.tf.device("/GPU:0" if self._gpus else "/CPU:0"):
            return keras.tree.map_structure(
                lambda a: self.tf.identity(self.tf.constant(a)), arrays
            )

    def steps(self, model, data, n):
        batches = itertools.repeat(data)
        for _ in range(n):
            model.train_function(batches)

    def wait(self):
        self.tf.test.experimental.sync_devices()

    def device(self):
        if not self._gpus:
            return None
        details = self.tf.config.experimental.get_device_details(self._gpus[0])
        return details.get("device_name")

    def cuda(self):
        build = self.tf.sysconfig.get_build_info()
        return build.get("cuda_version") if self._gpus else None


class Jax:
    """JAX, one GPU or the CPU."""

    def __init__(self):
        import jax

        self.jax = jax
        self.version = jax.__version__
        self.pending = None

    def set_tf32(self, enabled):
        precision = "tensorfloat32" if enabled else "float32"
        self.jax.config.update("jax_default_matmul_precision", precision)

    def put(self, arrays):
        return self.jax.device_put(arrays)

    def steps(self, model, data, n):
        # What `fit` does in an epoch: the state leaves the model and comes back.
        parts = (
            "trainable_variables",
            "non_trainable_variables",
            "optimizer_variables",
            "metrics_variables",
        )
        state = model._get_jax_state(
            **dict.fromkeys(parts, True), purge_model_variables=True
        )
        model._jax_state_synced = False
        batches = itertools.repeat(data)
        for _ in range(n):
            logs, state = model.train_function(state, batches)
        model._jax_state = dict(zip(parts, state, strict=True))
        model.jax_state_sync()
        self.pending = state, logs

    def wait(self):
        self.jax.block_until_ready(self.pending)
        # Held any longer, it would keep buffers alive that the next step donates.
        self.pending = None

    def device(self):
        device = self.jax.devices()[0]
        return None if device.platform == "cpu" else device.device_kind

    def cuda(self):
        device = self.jax.devices()[0]
        if device.platform != "gpu":
            return None
        return " ".join(device.client.platform_version.split())


class Torch:
    """torch, one GPU or the CPU."""

    def __init__(self):
        import torch

        self.torch = torch
        self.version = torch.__version__

    def set_tf32(self, enabled):
        self.torch.backends.cuda.matmul.allow_tf32 = enabled
        self.torch.backends.cudnn.allow_tf32 = enabled

    def put(self, arrays):
        return keras.tree.map_structure(keras.ops.convert_to_tensor, arrays)

    def steps(self, model, data, n):
        model.train()
        for _ in range(n):
            model.train_function([data])

    def wait(self):
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()

    def device(self):
        if not self.torch.cuda.is_available():
            return None
        return self.torch.cuda.get_device_name()

    def cuda(self):
        return self.torch.version.cuda


def current() -> TensorFlow | Jax | Torch:
    """Return the backend that Keras runs on.

    Raises:
        KeyError: If Keras runs on another one.
    """
    classes = {"tensorflow": TensorFlow, "jax": Jax, "torch": Torch}
    return classes[keras.backend.backend()]()


def versions(backend: TensorFlow | Jax | Torch) -> dict[str, str | None]:
    """Return package -> version of what a row depends on."""
    return {
        "keras": keras.__version__,
        keras.backend.backend(): backend.version,
        "keras_mixprec": keras_mixprec.__version__,
        "cuda": backend.cuda(),
    }

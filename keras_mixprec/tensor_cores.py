"""Why tensor cores stand still in a half-precision run."""

from __future__ import annotations

import keras

from keras_mixprec.structure import any_in_half
from keras_mixprec.structure import computes_in_half

# Percent. A float32 matrix product on an H100 reads 3.7, a float16 one 57.
IDLE_TENSOR_CORES = 5.0
_IDLE_GPU = 40.0
# Of 16-bit numbers: 16 bytes (NVIDIA, "Matrix Multiplication Background User's
# Guide", "Requirements to Use Tensor Cores").
_MULTIPLE = 8


def tensor_core_advice(model: keras.Model, logs: dict[str, float]) -> str | None:
    """Return why tensor cores stay near 0, and the remedy; `None` if they do not.

    Args:
        model: Compiled `keras.Model`.
        logs: `tensor_core_util` and `gpu_util`, in percent of an epoch without its
            first batch, in which a model may be compiled.
    """
    share = logs.get("tensor_core_util")
    if share is None or share >= IDLE_TENSOR_CORES or not any_in_half(model):
        return None
    return (
        f"Tensor cores were busy {share:.1f}% of an epoch, its first batch apart, "
        f"although '{model.name}' computes in half precision. Likely reason: "
        f"{_likely_reason(model, _half_products(model), logs.get('gpu_util'))}"
    )


def _likely_reason(model, layers, gpu_util):
    if gpu_util is not None and gpu_util < _IDLE_GPU:
        return (
            f"the GPU waits for input or for Python (gpu_util is {gpu_util:.0f}%). "
            "Use larger batches, prefetching, or `steps_per_execution`."
        )
    if not layers:
        return (
            "no layer with a kernel computes in half precision. See "
            "`mp.plan(model)` for what stays float32 and why."
        )
    odd = [name for name, shape in layers.items() if any(n % _MULTIPLE for n in shape)]
    if 2 * len(odd) >= len(layers):
        return (
            f"dimensions that are not multiples of {_MULTIPLE}, in {len(odd)} of "
            f"{len(layers)} layers ({', '.join(odd[:3])}). Round units, filters, the "
            "vocabulary and the batch size up."
        )
    if not model.jit_compile:
        return (
            "operations run one by one, so that casts and element-wise work take the "
            "time. Compile with `jit_compile=True`."
        )
    return (
        "element-wise work outweighs the matrix products. Use larger layers or "
        "batches; a profiler shows where the time goes."
    )


def _half_products(model):
    """Layer path -> the two dimensions of its kernel that a matrix product sees."""
    found = {}
    for layer in filter(computes_in_half, model._flatten_layers()):
        for variable in layer._trainable_variables:
            if "kernel" in variable.name and len(variable.shape) >= 2:
                found[layer.path or layer.name] = variable.shape[-2:]
    return found

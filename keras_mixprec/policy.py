"""`set_policy` and `policy_scope`: one line in a script."""

import contextlib
import logging
from collections.abc import Iterator

import keras

from keras_mixprec import compile_hook
from keras_mixprec import hardware

POLICIES = ("mixed_float16", "mixed_bfloat16", "float32")
_logger = logging.getLogger("keras_mixprec")


def set_policy(policy: str) -> str:
    """Set the global dtype policy and, for float16, loss scaling in `compile`.

    After `set_policy("mixed_float16")` new layers compute in float16, and
    `model.compile("adam")` of a half-precision model gets a `LossScaleOptimizer`.
    `set_policy("float32")` undoes all of it.

    Args:
        policy: `"mixed_float16"`, `"mixed_bfloat16"`, `"float32"`, or `"auto"`:
            mixed_float16 on NVIDIA GPUs of compute capability >= 7.0,
            mixed_bfloat16 on TPUs and on CPUs with bfloat16 units, else float32,
            with the reason logged.

    Returns:
        The name of the policy that was set.

    Raises:
        ValueError: If `policy` is none of these.
    """
    name = resolve_policy(policy)
    keras.config.set_dtype_policy(name)
    if name == "float32":
        compile_hook.uninstall()
    else:
        compile_hook.install()
    return name


@contextlib.contextmanager
def policy_scope(policy: str) -> Iterator[str]:
    """Set a policy as `set_policy` does, and restore what was there.

    Args:
        policy: As for `set_policy`.

    Yields:
        The name of the policy that was set.

    Raises:
        ValueError: If `policy` is unknown.
    """
    before, hooked = keras.config.dtype_policy(), compile_hook.is_installed()
    name = set_policy(policy)
    try:
        yield name
    finally:
        keras.config.set_dtype_policy(before)
        if hooked:
            compile_hook.install()
        else:
            compile_hook.uninstall()


def resolve_policy(policy: str) -> str:
    """Return the policy's name, with `"auto"` replaced by what fits the hardware.

    Raises:
        ValueError: If `policy` is unknown.
    """
    name = getattr(policy, "name", policy)
    if name == "auto":
        name, reason = hardware.best_policy()
        # A library does not configure logging, and Python shows `info` only to those
        # who do: the line must show as it is.
        _logger.warning("Policy %s: %s.", name, reason)
    if name not in POLICIES:
        raise ValueError(
            f"`policy` must be one of {', '.join(map(repr, POLICIES))} or 'auto'. "
            f"Received: policy={policy!r}. For bare float16 without float32 weights "
            "use `keras.config.set_dtype_policy`."
        )
    return name

"""torch: what the host does for one train step of a `classifier`."""

import pytest
from support import data


def operations_of(model):
    """Return how many operations a step dispatches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    batch = _warmed_up(model)
    with Counting() as counting:
        model.train_function(batch)
    return counting.count


def constants_of(model):
    """Return how many plain numbers a step makes tensors of."""
    import torch

    batch, as_tensor, made = _warmed_up(model), torch.as_tensor, []

    def counting(value, *args, **kwargs):
        if isinstance(value, (bool, int, float)):
            made.append(value)
        return as_tensor(value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "as_tensor", counting)
        model.train_function(batch)
    return len(made)


def _warmed_up(model):
    import torch

    x, y = data(8)
    for _ in range(2):
        model.train_on_batch(x, y)
    return [tuple(map(torch.as_tensor, (x, y)))]

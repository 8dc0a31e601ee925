"""Gradients of one shape, to be looked at together."""


def group_by_shape(grads: list) -> list[list[int]]:
    """Return the positions of the gradients, by shape and dtype; `None` is left out.

    Args:
        grads: List of tensors or `None`.
    """
    groups = {}
    for i, grad in enumerate(grads):
        if grad is not None:
            groups.setdefault((tuple(grad.shape), str(grad.dtype)), []).append(i)
    return list(groups.values())


def order(groups: list[list[int]], length: int) -> list[int]:
    """Return where each gradient stands once its group follows the others.

    Position 0 is for those in no group.

    Args:
        groups: What `group_by_shape` returned.
        length: Int, the number of gradients.
    """
    places = {i: at for at, i in enumerate(sum(groups, []), start=1)}
    return [places.get(i, 0) for i in range(length)]

"""torch: what variables held, put back where a step is skipped, unread by the host.

Two ways. Where it is known before the update whether it is skipped, `undone_if` has the
device copy on that condition: in a step that is not skipped it touches no memory. Where
it comes out only afterwards, `read` copies always and `restore_by_select` selects.
"""

import contextlib
import functools
import operator

import torch

# Of every size of element there is; two int64 make one complex128.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# The same bits as numbers of a kind that `_fused_sgd_` takes and does not round.
_FLOAT = {4: torch.float32, 8: torch.float64, 16: torch.float64}


@contextlib.contextmanager
def undone_if(skipped, variables, owner):
    """Inside, variables may change; afterwards they have not where `skipped`.

    Args:
        skipped: Bool scalar tensor, known before anything changes.
        variables: List of `keras.Variable`.
        owner: Object that lives as long as they do, to keep what is needed each step.
    """
    backup = _kept(owner, variables, _Backup)
    kept = torch.logical_not(skipped).float()
    backup.save(kept)
    yield
    backup.restore(kept, _values(variables))


@torch.no_grad()
def read(variables, owner):
    """Return a copy of the variables' bits: one buffer per size of element.

    Args:
        variables: List of `keras.Variable`.
        owner: As in `undone_if`.
    """
    return _kept(owner, variables, _Bits).read()


@torch.no_grad()
def restore_by_select(skipped, variables, saved, owner):
    """Write the saved bits back where `skipped`; `saved` is used up.

    Args:
        skipped: Bool scalar tensor.
        variables: List of `keras.Variable`.
        saved: What `read` returned for them.
        owner: As in `undone_if`.
    """
    _kept(owner, variables, _Bits).restore(skipped, saved)


def _values(variables):
    # A scope may hold other values in the variables' place; then it does for all.
    if not variables or variables[0].value is not variables[0]._value:
        return [v.value for v in variables]
    return [v._value for v in variables]


def _kept(owner, variables, make):
    """Return `make(values)`, that of the step before if the memory is the same.

    The host takes longer to make a view than to launch a kernel on it.
    """
    values = _values(variables)
    scoped = not values or values[0] is not variables[0]._value
    # Into a compiled step kept views would come as inputs that alias the weights.
    if scoped or torch.compiler.is_compiling():
        return make(values)
    # Past Keras's bookkeeping of attributes.
    place = vars(owner).setdefault("_mixprec_kept", {})
    if make not in place or not place[make].is_of(values):
        place[make] = make(values)
    return place[make]


class _Kept:
    """Views of some values, kept from step to step.

    Args:
        values: List of tensors.
    """

    def __init__(self, values):
        self._values, self._pointers = values, _pointers(values)

    def is_of(self, values):
        """Return whether these are the values that the views are of, where they were.

        `module.to` gives a parameter other memory. The views keep what they are of
        alive, so that nothing else can stand at its address.
        """
        known = self._values
        same = len(known) == len(values) and all(map(operator.is_, known, values))
        return same and self._pointers == _pointers(values)


def _pointers(values):
    if torch.compiler.is_compiling():
        return None
    return [v.data_ptr() for v in values]


class _Bits(_Kept):
    """The bits of values as integers, which no arithmetic rounds or calls NaN."""

    def __init__(self, values):
        super().__init__(values)
        self._groups = _grouped(values, lambda v: _INTEGER.get(v.element_size()))

    def read(self):
        return [
            torch.cat(views if flat else [v.flatten() for v in views])
            for views, _, flat in self._groups
        ]

    def restore(self, skipped, saved):
        # new = new * (1 - skipped) + old * skipped: exact for every bit, NaN and the
        # sign of zero included, in three calls per buffer.
        for (views, sizes, flat), old in zip(self._groups, saved, strict=True):
            chosen = skipped.to(old)
            parts = old.mul_(chosen).split(sizes)
            if not flat:
                parts = [p.view(v.shape) for p, v in zip(parts, views, strict=True)]
            torch._foreach_mul_(views, 1 - chosen)
            torch._foreach_add_(views, parts)


class _Backup(_Kept):
    """Room for a copy of values that the device fills and reads on a condition."""

    def __init__(self, values):
        super().__init__(values)
        # What `_fused_sgd_` cannot copy is selected: mostly nothing, or a flag.
        groups = _grouped(filter(_can_copy, values), lambda v: _FLOAT[v.element_size()])
        self._rooms = [_Room(views, sizes) for views, sizes, _ in groups]
        self._rest = _Bits([v for v in values if not _can_copy(v)])

    @torch.no_grad()
    def save(self, kept):
        self._saved = self._rest.read()
        for room in self._rooms:
            room.fill(kept)

    @torch.no_grad()
    def restore(self, kept, values):
        # An assignment may have given a variable other memory.
        there = self if self.is_of(values) else _Backup(values)
        there._rest.restore(torch.eq(kept, 0), self._saved)
        for room, views in zip(self._rooms, there._rooms, strict=True):
            room.empty(kept, views.of)


def _can_copy(value):
    fits = value.is_contiguous() and value.element_size() in _FLOAT
    return fits and copies_unless(value.device)


@functools.cache
@torch.no_grad()
def copies_unless(device):
    """Return whether `copy_unless` does on a device what it says: tried once.

    In what order a kernel writes is nowhere promised.

    Args:
        device: `torch.device`.
    """
    if device.type != "cuda":
        return False
    # Sizes with and without a remainder take different ways through the kernel.
    bits = [torch.arange(-n, n, device=device) * 9_999_991 for n in (1, 4, 37, 4096)]
    sources = [b.int().view(torch.float32) for b in bits]
    targets = [torch.zeros_like(s) for s in sources]
    try:
        copy_unless(torch.ones((), device=device), targets, sources)
        untouched = not any(t.any() for t in targets)
        copy_unless(torch.zeros((), device=device), targets, sources)
    except (RuntimeError, TypeError, AttributeError):
        return False
    pairs = zip(targets, sources, strict=True)
    same = (torch.equal(t.view(torch.int32), s.view(torch.int32)) for t, s in pairs)
    return untouched and all(same)


class _Room:
    """Memory for a copy of some views, there only while a step needs it.

    Args:
        of: List of flat tensors of one kind.
        sizes: List of ints, their sizes.
    """

    def __init__(self, of, sizes):
        self.of = of
        memory = of[0].new_empty(sum(sizes))
        self._copies, self._bytes = memory.split(sizes), memory.nbytes
        self._storage = memory.untyped_storage()
        self._storage.resize_(0)

    def fill(self, kept):
        self._storage.resize_(self._bytes)
        copy_unless(kept, self._copies, self.of)

    def empty(self, kept, views):
        copy_unless(kept, views, self._copies)
        self._storage.resize_(0)


def copy_unless(kept, targets, sources):
    """Copy tensors unless `kept` is 1, which only the device knows.

    `_fused_sgd_` is the one multi-tensor kernel of torch that can be told by a flag on
    the device to return before it reads anything. The first step of momentum is the
    gradient itself: with the sources as gradients and the targets as buffers it is a
    copy. The parameters that it wants to write too are the buffers again, which it
    writes last.

    Args:
        kept: float32 scalar tensor.
        targets: Tensors of float32 or float64.
        sources: Tensors of the same shapes.
    """
    torch._fused_sgd_(
        targets,
        sources,
        targets,
        weight_decay=0.0,
        momentum=1.0,
        lr=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
        found_inf=kept,
    )


def _grouped(values, kind_of):
    """Return (views, their sizes, whether flat) per kind of memory."""
    groups = {}
    for value in values:
        kind = kind_of(value) or torch.int64
        value, flat = value.detach(), value.is_contiguous()
        # Flat first: a complex scalar has no other dimension to be two integers in.
        view = (value.view(-1) if flat else value).view(kind)
        groups.setdefault((kind, value.device, flat), []).append(view)
    return [
        (views, [v.numel() for v in views], flat)
        for (_, _, flat), views in groups.items()
    ]

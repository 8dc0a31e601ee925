"""Statistics of many tensors at once: torch launches, it does not fuse.

Layers only hand over what they output; hooks, its gradients. They are measured
together, some tens at a time, so that a step takes some hundred launches more and not
some ten thousand.
"""

import functools
import logging

import torch

from keras_mixprec.bit_patterns import bit_limits
from keras_mixprec.ranges import FIELDS

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Values in a row; rows are measured, then added up by tensor. Of short rows there are
# many, which a GPU adds to the same few numbers one after the other; of long ones more
# is filler, which keeps a CPU busy.
_COLUMNS = {"cuda": 2**14, "cpu": 2**10}
# Of a GPU's memory, what tensors of one dtype that wait to be measured may hold.
# Meanwhile they take about twice that, and four times where nothing compiles.
_SHARE = 1 / 64
# The same in bytes where there is no GPU.
_WAITING = 2**29
# Kept at most: with batches of ever new shapes there would be no end.
_LAYOUTS = 256
# What torch says in place of a backward pass's number.
_NO_BACKWARD_PASS = -1


class PendingCarrier:
    """Collects what layers output, and the gradients of that, and measures it.

    Args:
        paths: Strings, of the layers.
        calls: Int, how many calls or outputs of a layer to measure in a step.
        own_step: Whether the train step is the user's own.
    """

    # Python hooks would break a compiled graph into pieces.
    compiles = False
    variables: list = []

    def __init__(self, paths: list, calls: int, own_step: bool = False):
        self._calls, self._taps = calls, 2 * calls * len(paths)
        self._layouts: dict = {}
        # Such a step may ask for the gradient of an output, where no operation runs.
        self._of_tensors = own_step
        # Outputs that code goes on to write into (`x += y`): they are copied. Which
        # ones is found out in the first step, in which all are.
        self._written: set = set()
        self._learns = True
        self._most_bytes = _most_bytes()
        self._handles: list = []
        self.start()

    def start(self):
        """Begin a step."""
        self._kinds: dict = {}
        while self._handles:
            self._handles.pop().remove()

    def tap(self, layer: int, call: int, x):
        """Return `x`, which is measured."""
        row = 2 * (layer * self._calls + call)
        # In the backward pass checkpointing computes anew what was measured before.
        if torch._C._current_graph_task_id() == _NO_BACKWARD_PASS:
            # An alias: the output itself would keep its graph alive.
            kept = x.detach()
            written = row in self._written
            watched = None if written else (row, kept, kept._version)
            if self._learns or written:
                kept = kept.clone()
            self._take(row, kept, watched)
        if x.grad_fn is not None and not self._of_tensors:
            # Two thirds of what a hook of the tensor costs.
            hook = functools.partial(self._take_gradient, row + 1, x.output_nr)
            x.grad_fn.register_prehook(hook)
        elif x.requires_grad:
            # A weight that is an output outlives the step.
            hook = functools.partial(self._take, row + 1)
            self._handles.append(x.register_hook(hook))
        return x

    @torch.no_grad()
    def rows(self, gradient_of, weights):
        """Return the statistics of a step: one row for each tensor.

        Args:
            gradient_of: Not used: there are no probes.
            weights: List of gradients of weights, `None` where there is none.

        Returns:
            float32 tensor of shape `(2 * layers * calls + weights, len(FIELDS))`.
        """
        weights = list(weights)
        for row, gradient in enumerate(weights, self._taps):
            if gradient is not None:
                self._take(row, gradient)
        for kind in self._kinds.values():
            self._measure(kind)
        self._learns = False
        kinds = [kind for kind in self._kinds.values() if kind.rows]
        self.start()
        total = self._taps + len(weights)
        if not kinds:
            return torch.zeros(total, len(FIELDS))
        places = [row for kind in kinds for row in kind.rows]
        found = torch.cat([self._totals(kind) for kind in kinds])
        rows = found.new_zeros(total, len(FIELDS))
        rows[self._kept(("rows", *places), lambda: places, found.device)] = found
        return rows

    def _take(self, row, x, watched=None):
        # Called for every tensor, while the GPU waits: nothing else belongs here.
        key = x.dtype, x.device
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(*key)
        if watched is not None:
            kind.watched.append(watched)
        kind.waiting.append((row, x))
        kind.bytes += x.nbytes
        if kind.bytes >= self._most_bytes:
            self._measure(kind)

    def _take_gradient(self, row, output, gradients):
        # One of each output of the operation; none where nothing was computed with it.
        if gradients[output] is not None:
            self._take(row, gradients[output])

    @torch.no_grad()
    def _measure(self, kind):
        waiting = self._as_they_were(kind)
        kind.waiting, kind.bytes = [], 0
        if not waiting:
            return
        columns = _columns(kind.device)
        sizes = [x.numel() for _, x in waiting]
        filler = torch.full(
            (columns,), torch.nan, dtype=kind.measured, device=kind.device
        )
        fillers = {n: filler[:n] for n in {-size % columns for size in sizes} if n}
        pieces = []
        for (_, x), size in zip(waiting, sizes, strict=True):
            pieces.append(x if kind.measured == kind.dtype else x.to(kind.measured))
            if size % columns:
                pieces.append(fillers[-size % columns])
        # One call for all, in any shapes: DistributedDataParallel's way to its buckets.
        rows = torch._utils._flatten_dense_tensors(pieces).reshape(-1, columns)
        kind.rows += [row for row, _ in waiting]
        kind.sizes += sizes
        kind.parts.append(_measuring(kind.measured, kind.device)(rows))

    def _as_they_were(self, kind):
        written = {row for row, x, version in kind.watched if x._version != version}
        self._written |= written
        kind.watched = []
        # Without a copy: better no measurement than a wrong one.
        lost = () if self._learns else written
        return [(row, x) for row, x in kind.waiting if row not in lost]

    def _totals(self, kind):
        """Return float32 of shape `(tensors, len(FIELDS))`."""
        sizes, device, columns = kind.sizes, kind.device, _columns(kind.device)
        layout = self._kept(("layout", *sizes), lambda: _layout(sizes, columns), device)
        values = self._kept(("values", *sizes), lambda: sizes, device)
        parts = [torch.cat(p) for p in zip(*kind.parts, strict=True)]
        return _totals(kind.measured, parts, layout, values)

    def _kept(self, key, make, device):
        # Every step has the same shapes: their layout goes to the device once.
        key = (*key, device)
        if key not in self._layouts:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            kind = torch.int64
            self._layouts[key] = torch.tensor(make(), dtype=kind, device=device)
        return self._layouts[key]


class _Kind:
    """What of one dtype on one device waits to be measured, and what was found."""

    def __init__(self, dtype, device):
        self.dtype, self.device = dtype, device
        # No bit patterns are looked at of what is narrower than half precision.
        self.measured = dtype if dtype.itemsize in _INTEGER else torch.float32
        # Of each tensor: its row and itself. Of those into which code may write on: the
        # row, the tensor and its version.
        self.waiting, self.watched, self.bytes = [], [], 0
        # Of each tensor that was measured; and of each call that measured some.
        self.rows, self.sizes, self.parts = [], [], []


def _most_bytes():
    if not torch.cuda.is_available():
        return _WAITING
    return _SHARE * torch.cuda.get_device_properties("cuda").total_memory


def _columns(device):
    return _COLUMNS.get(device.type, _COLUMNS["cuda"])


def _layout(sizes, columns):
    """Return, for each row, the number of the tensor that it belongs to."""
    return [i for i, size in enumerate(sizes) for _ in range(-(-size // columns))]


def _totals(dtype, found, layout, values):
    """Add up by tensor what `_measuring_rows` found; NaN beyond `values` fills rows."""
    limits = bit_limits(_name(dtype))
    *below, largest, smallest = found
    count = values.new_zeros(len(values), len(below))
    count.index_add_(0, layout, torch.stack(below, 1).long())
    columns = dict(zip(dict.fromkeys(limits), count.unbind(1), strict=True))
    zero, to_zero, subnormal, normal, finite = (columns[n] for n in limits)

    def magnitude(found, start, reduce):
        whole = values.new_full((len(values),), start)
        whole.scatter_reduce_(0, layout, found.long(), reduce)
        return whole.to(largest.dtype).view(dtype).float()

    fields = {
        "values": values,
        "nonfinite": values - finite,
        "beyond": finite - normal,
        "subnormal": subnormal - to_zero,
        "to_zero": to_zero - zero,
        "zero": zero,
        "max_abs": magnitude(largest, 0, "amax"),
        "min_abs": magnitude(smallest, limits[-1], "amin"),
    }
    return torch.stack([fields[name].float() for name in FIELDS], 1)


def _measuring_rows(dtype):
    """Return a function of rows of a dtype: counts below its limits, largest, smallest.

    On the bit patterns: those of magnitudes are ordered as the magnitudes are, and half
    precision takes half the memory of a float32 copy. All are of shape `(rows,)`: an
    int32 count for each limit that differs; the largest and smallest as bit patterns,
    the smallest that of inf where there is none.
    """
    limits, kind = bit_limits(_name(dtype)), _INTEGER[dtype.itemsize]
    different, infinity = tuple(dict.fromkeys(limits)), limits[-1]
    mask = torch.iinfo(kind).max

    def measure(rows):
        bits = rows.view(kind) & mask
        below = [(bits < n).sum(1, dtype=torch.int32) for n in different]
        largest = bits.where(bits < infinity, 0).amax(1)
        smallest = bits.where(bits > 0, infinity).amin(1).clamp(max=infinity)
        # Not stacked: that would be a kernel for each.
        return *below, largest, smallest

    return measure


def _name(dtype):
    return str(dtype).removeprefix("torch.")


@functools.lru_cache
def _measuring(dtype, device):
    """Return what `_measuring_rows` does, compiled where that works: tried once.

    Op by op each of some ten passes writes what the next one reads. Compiling needs
    Triton and a C compiler, which not every machine with a GPU has.
    """
    measure = _measuring_rows(dtype)
    return _compiled(measure, dtype, device) if device.type == "cuda" else measure


def _compiled(measure, dtype, device):
    # Else the limits of a second dtype would be variables of its program, and integers
    # of another size than the values: torch 2.11 fails to compile that for a GPU.
    compiled = torch.compile(measure, dynamic=False)
    rows = torch.linspace(-1, 1, 4 * _columns(device), device=device)
    rows = rows.to(dtype).reshape(4, -1)
    # One program for any number of rows, but for a single one.
    torch._dynamo.mark_dynamic(rows, 0)
    try:
        agree = all(map(torch.equal, compiled(rows), measure(rows)))
    # Whatever is missing raises an error of its own kind.
    except Exception as error:
        logging.getLogger(__name__).warning(
            "Looking at a step takes longer than it could: `torch.compile` fails here "
            "(%s: %s).",
            type(error).__name__,
            str(error).partition("\n")[0],
        )
        return measure
    if not agree:
        return measure
    return lambda rows: (compiled if len(rows) > 1 else measure)(rows)

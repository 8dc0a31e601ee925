"""A model's train function, and a twin of it that measures what passes each layer.

The twin computes what the train function does. The probes that it needs belong to the
model only while it runs; the optimizer sees everything but them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_mixprec.intercept import intercepted
from keras_mixprec.probes import Probes


class Instrument:
    """The measuring twin of a model's train function.

    Args:
        model: Built and compiled `keras.Model` that has a train function.
        chosen: Callable, `path -> bool`, the layers to measure.
        calls: Int, how many calls or outputs of a layer to measure in a step.
            Defaults to `4`.
    """

    def __init__(self, model: keras.Model, chosen: Callable, calls: int = 4):
        self._model, self._optimizer = model, model.optimizer
        self._probes = Probes(model, chosen, calls, model.steps_per_execution)
        self._own = {id(v) for v in self._probes.variables}
        self._routes: dict = {}
        # What the probes hold between two steps on JAX: nothing that matters.
        self._held = None
        self._function = self._make_function()
        self.steps = self._probes.steps
        self.decode = self._probes.decode
        self.overflowed = self._probes.overflowed

    def run(self, *args: Any) -> tuple[Any, Any]:
        """Call the measuring train function.

        Args:
            *args: What the model's train function takes: the iterator, on JAX led by
                the state.

        Returns:
            What that function returns, and the log: a tensor that `steps` reads.
        """
        *state, data = args
        if state:
            return self._run_on_state(state[0], data)
        log = self._probes.log
        if log.shape[0] > 1:
            self._clear_log()
        result = self._function(data)
        return result, ops.copy(ops.convert_to_tensor(log))

    def _run_on_state(self, state, data):
        # The function eats the state that it is given and returns it. Arrays made anew
        # for each probe would keep the host busy for longer than the device is.
        held, self._held = self._held or self._probes.values(), None
        given, own = iter(state[0]), iter(held)
        trainable = [next(own if is_own else given) for is_own in self._is_probe]
        logs, new = self._function((trainable, *state[1:]), data)
        theirs, held = (
            [x for x, own in zip(new[0], self._is_probe, strict=True) if own is wanted]
            for wanted in (False, True)
        )
        log = held.pop()
        # On the devices of the log, or the step is compiled anew.
        self._held = [*held, ops.zeros_like(log)]
        return (logs, (theirs, *new[1:])), log

    # -- the train function -------------------------------------------------------

    def _make_function(self):
        model = self._model
        plain, own_step = model.train_function, vars(model).get("train_step")
        step, jit_compile = self._measuring(model.train_step), model.jit_compile
        model.train_step = step
        model.jit_compile = jit_compile and self._probes.compiles
        try:
            with self._tracked():
                self._is_probe = [*map(self._is_own, model.trainable_variables)]
                model.make_train_function(force=True)
            return self._with_step(model.train_function, step)
        finally:
            model.jit_compile = jit_compile
            model.train_function = plain
            _restore(model, "train_step", own_step)

    def _with_step(self, function, step):
        # Some backends look the step up when they trace it, or at every call.
        def call(*args):
            own_step = vars(self._model).get("train_step")
            self._model.train_step = step
            try:
                return function(*args)
            finally:
                _restore(self._model, "train_step", own_step)

        return call

    def _measuring(self, train_step):
        @functools.wraps(train_step)
        def step(*args):
            self._probes.start()
            if self._probes.log.shape[0] == 1 and len(args) == 1:
                # Where a step is compiled this costs nothing, being overwritten.
                self._clear_log()
            layers = self._probes.layers
            with (
                # Where a step is compiled it passes here once, when it is traced.
                self._tracked(),
                intercepted(layers, self._tap_outputs, self._routes),
                self._intercepted_optimizer(),
            ):
                return train_step(*args)

        return step

    def _clear_log(self):
        # A step that updates nothing leaves no entry.
        log = self._probes.log
        log.assign(ops.zeros(log.shape))

    def _tap_outputs(self, layer, call, args, kwargs):
        outputs = call(*args, **kwargs)
        if hasattr(outputs, "dtype"):
            # One tensor, mostly, and an eager step comes here for every layer.
            return self._probes.tap(layer, outputs)
        return keras.tree.map_structure(lambda x: self._probes.tap(layer, x), outputs)

    # -- the optimizer ------------------------------------------------------------

    @contextlib.contextmanager
    def _intercepted_optimizer(self):
        optimizer = self._optimizer
        before = {n: vars(optimizer).get(n) for n in ("apply", "stateless_apply")}
        optimizer.apply = self._around_apply(optimizer.apply)
        optimizer.stateless_apply = self._around_stateless(optimizer.stateless_apply)
        try:
            yield
        finally:
            for name, own in before.items():
                _restore(optimizer, name, own)

    def _around_apply(self, apply):
        def wrapped(grads, trainable_variables=None):
            if trainable_variables is None:  # The inside of `stateless_apply`.
                return apply(grads)
            grads, variables = list(grads), list(trainable_variables)
            entry = self._entry(grads, variables)
            theirs = [not self._is_own(v) for v in variables]
            apply(_selected(grads, theirs), _selected(variables, theirs))
            log = self._probes.log
            log.assign(_pushed(entry, ops.convert_to_tensor(log)))

        return wrapped

    def _around_stateless(self, apply):
        def wrapped(optimizer_variables, grads, trainable_variables):
            variables = self._model.trainable_variables
            pairs = zip(self._optimizer.variables, optimizer_variables, strict=True)
            with keras.StatelessScope(state_mapping=list(pairs)):
                entry = self._entry(grads, variables)
            theirs = [not self._is_own(v) for v in variables]
            new, new_optimizer_variables = apply(
                optimizer_variables,
                _selected(grads, theirs),
                _selected(trainable_variables, theirs),
            )
            new = iter(new)
            pairs = zip(trainable_variables, theirs, strict=True)
            trainable = [next(new) if is_theirs else old for old, is_theirs in pairs]
            log = self._log_index(variables)
            trainable[log] = _pushed(entry, trainable[log])
            return trainable, new_optimizer_variables

        return wrapped

    def _entry(self, grads, variables):
        scale = getattr(self._optimizer, "dynamic_scale", None)
        scale = ops.ones(1) if scale is None else ops.convert_to_tensor(scale)
        return self._probes.entry(grads, variables, scale)

    # -- probes in the model ------------------------------------------------------

    @contextlib.contextmanager
    def _tracked(self):
        tracker = self._model._tracker
        was_locked = tracker.locked
        tracker.unlock()
        for variable in self._probes.variables:
            self._model._track_variable(variable)
        if was_locked:
            tracker.lock()
        try:
            yield
        finally:
            for variable in self._probes.variables:
                self._model._untrack_variable(variable)

    def _is_own(self, variable):
        return id(variable) in self._own

    def _log_index(self, variables):
        return [v is self._probes.log for v in variables].index(True)


def _selected(items, chosen):
    return [x for x, is_chosen in zip(items, chosen, strict=True) if is_chosen]


def _pushed(entry, log):
    newest = ops.expand_dims(entry, 0)
    return newest if log.shape[0] == 1 else ops.concatenate([newest, log[:-1]])


def _restore(owner, name, own):
    if own is None:
        delattr(owner, name)
    else:
        setattr(owner, name, own)

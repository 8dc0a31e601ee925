"""When the script imports Keras: set the policy, and add the monitor to `fit`.

One finder at the head of `sys.meta_path`, for the name `keras` alone. It goes when
Keras is loaded, so that a script that never does is not touched at all; not when Keras
is merely looked for, as TensorFlow does before it loads it.
"""

from __future__ import annotations

import importlib.abc
import json
import os
import sys

from keras_mixprec_cli.launched import VARIABLE


def install() -> None:
    """Wait for the import of Keras, if this is a launched process."""
    if VARIABLE in os.environ:
        sys.meta_path.insert(0, _Finder(json.loads(os.environ[VARIABLE])))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, what):
        self._what = what

    def find_spec(self, name, path=None, target=None):
        if name != "keras":
            return None
        spec = self._found_by_others(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._loaded)
        return spec

    def _found_by_others(self, *wanted):
        others = [finder for finder in sys.meta_path if finder is not self]
        # Finders from before there was `find_spec` have none: Python passes them by.
        find = [f.find_spec for f in others if hasattr(f, "find_spec")]
        specs = (find_spec(*wanted) for find_spec in find)
        return next((spec for spec in specs if spec is not None), None)

    def _loaded(self):
        sys.meta_path.remove(self)
        begin(self._what)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, then):
        self._loader = loader
        self._then = then

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # The module must not remember us: pickles and reloads look at its loader.
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._then()


def begin(what: dict) -> None:
    """Set the policy and put the hook.

    Args:
        what: `policy`, `monitor`, `json` and `process`, from the command's options.
    """
    import keras_mixprec as mp
    from keras_mixprec import fit_hook

    policy = mp.set_policy(what["policy"])
    is_whole = what["process"] in (None, os.getpid())
    fits: list[dict] = []
    if what["json"] and is_whole:
        import atexit

        atexit.register(_print_summary, policy, fits)
    if what["monitor"] or what["json"]:
        fit_hook.install(monitor=what["monitor"], on_end=fits.append)


def _print_summary(policy, fits):
    import keras

    from keras_mixprec_cli.output import plain

    summary = {"policy": policy, "backend": keras.backend.backend(), "fits": fits}
    print(json.dumps(plain(summary), allow_nan=False), flush=True)

"""Imported by Python at its start, when `keras-mixprec launch` put this folder first.

Steps out of the way: takes this folder off `sys.path` again, runs the `sitecustomize`
that would have run without it, and leaves behind one import hook (`on_import`).
"""

import importlib
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_HERE))

sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != _HERE]
_this = sys.modules.pop("sitecustomize")
if importlib.util.find_spec("sitecustomize") is not None:
    importlib.import_module("sitecustomize")
else:
    # Python's import looks for what it has just run.
    sys.modules["sitecustomize"] = _this
if importlib.util.find_spec("keras_mixprec_cli") is None:
    # Run from a checkout that is not installed; last, so that nothing is shadowed.
    sys.path.append(_ROOT)

from keras_mixprec_cli.launched import on_import  # noqa: E402

on_import.install()

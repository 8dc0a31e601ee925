"""The command `keras-mixprec`, also `python -m keras_mixprec`.

A package beside `keras_mixprec`, because importing anything inside that one imports
Keras: help would take seconds, and a launched script could no longer choose its
backend. Keras is imported inside the commands, once they know that they need it.
"""

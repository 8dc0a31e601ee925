"""`report`: a training run as one HTML page and as pictures."""

from keras_mixprec.report.page import report

__all__ = ["report"]

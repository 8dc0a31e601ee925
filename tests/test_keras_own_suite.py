"""Keras's own tests for its wrapper, with our class in its place."""

import importlib

import pytest

import keras_mixprec as mp

# By the module's path, because it has no public name.
upstream = importlib.import_module("keras.src.optimizers.loss_scale_optimizer_test")


@pytest.mark.filterwarnings("ignore:`loss_scale_factor=100` of the inner optimizer")
class TestKerasOwnSuite(upstream.LossScaleOptimizerTest):
    @pytest.fixture(autouse=True)
    def _our_class(self, monkeypatch):
        monkeypatch.setattr(upstream, "LossScaleOptimizer", mp.LossScaleOptimizer)

    def test_it_is_our_class_that_is_tested(self):
        assert upstream.LossScaleOptimizer is mp.LossScaleOptimizer

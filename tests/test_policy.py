"""`set_policy`, `policy_scope`, "auto", and the compile hook they install."""

import logging

import keras
import pytest
from support import classifier
from support import compiled
from support import data

import keras_mixprec as mp
from keras_mixprec import compile_hook
from keras_mixprec import hardware

HOOKED = keras.Model.compile


def scales(model):
    return isinstance(model.optimizer, mp.LossScaleOptimizer)


def half():
    return compiled(classifier(dtype="float16"))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32"])
def test_sets_and_returns_the_global_policy(policy):
    assert mp.set_policy(policy) == policy
    assert keras.config.dtype_policy().name == policy


def test_one_line_is_enough():
    mp.set_policy("mixed_float16")
    model = compiled(classifier(), "adam")
    assert isinstance(model.optimizer, mp.LossScaleOptimizer)
    assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.Adam)
    model.fit(*data(32), verbose=0)


def test_float32_undoes_all_of_it():
    mp.set_policy("mixed_float16")
    assert scales(half())
    mp.set_policy("float32")
    assert not scales(half())
    model = compiled(classifier(), "adam")
    assert type(model.optimizer) is type(keras.optimizers.Adam())
    assert "train_step" not in vars(model) and "fit" not in vars(model)


def test_the_hook_can_be_removed():
    mp.set_policy("mixed_float16")
    compile_hook.remove()
    assert keras.Model.compile is HOOKED.__wrapped__
    assert not scales(half())
    compile_hook.put()
    assert keras.Model.compile.__wrapped__ is HOOKED.__wrapped__


def test_the_first_compile_with_our_optimizer_is_a_transaction():
    model = compiled(classifier(), mp.LossScaleOptimizer("adam"))
    assert model.train_step.is_transaction


def test_scope_restores_what_was_there():
    with mp.policy_scope("mixed_float16") as name:
        assert name == keras.config.dtype_policy().name == "mixed_float16"
        with mp.policy_scope("float32"):
            assert not scales(half())
        assert scales(half())
    assert keras.config.dtype_policy().name == "float32"
    assert not scales(half())


def test_scope_restores_after_an_error():
    with pytest.raises(RuntimeError), mp.policy_scope("mixed_float16"):
        raise RuntimeError
    assert keras.config.dtype_policy().name == "float32"
    assert not compile_hook.is_installed()


@pytest.mark.parametrize("policy", ["half", "float16", None, 16, "int8"])
def test_rejects_an_unknown_policy_and_changes_nothing(policy):
    with pytest.raises(ValueError, match="must be one of .*Received: policy="):
        mp.set_policy(policy)
    assert keras.config.dtype_policy().name == "float32"
    assert not compile_hook.is_installed()


def test_compile_keeps_what_the_user_decided():
    mp.set_policy("mixed_float16")
    theirs = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    assert compiled(classifier(), theirs).optimizer is theirs
    ours = mp.LossScaleOptimizer("sgd")
    assert compiled(classifier(), ours).optimizer is ours
    bare = keras.optimizers.SGD()
    assert compiled(classifier(), bare, auto_scale_loss=False).optimizer is bare


def test_float32_and_bfloat16_models_keep_their_optimizer():
    model = classifier()
    mp.set_policy("mixed_bfloat16")
    assert not isinstance(
        compiled(classifier()).optimizer, keras.optimizers.LossScaleOptimizer
    )
    mp.set_policy("mixed_float16")
    assert not isinstance(
        compiled(model).optimizer, keras.optimizers.LossScaleOptimizer
    )


def test_compile_keeps_its_signature_and_docs():
    import inspect

    expected = inspect.signature(HOOKED.__wrapped__)
    mp.set_policy("mixed_float16")
    assert inspect.signature(keras.Model.compile) == expected
    assert keras.Model.compile.__doc__ == HOOKED.__wrapped__.__doc__


@pytest.mark.parametrize(
    ("device", "bfloat16_units", "policy", "reason"),
    [
        (("gpu", (9, 0)), None, "mixed_float16", "compute capability 9.0"),
        (("gpu", (7, 0)), None, "mixed_float16", "compute capability 7.0"),
        (("gpu", (6, 1)), "amx_bf16", "float32", "no tensor cores"),
        (("tpu", None), None, "mixed_bfloat16", "TPU"),
        (None, "avx512_bf16", "mixed_bfloat16", "avx512_bf16"),
        (None, None, "float32", "without bfloat16 units"),
    ],
)
def test_auto_follows_the_hardware(
    monkeypatch, caplog, device, bfloat16_units, policy, reason
):
    monkeypatch.setattr(hardware.engine, "accelerator", lambda: device)
    monkeypatch.setattr(hardware, "cpu_bfloat16_units", lambda: bfloat16_units)
    with caplog.at_level(logging.WARNING, logger="keras_mixprec"):
        assert mp.set_policy("auto") == policy
    assert reason in caplog.text
    assert keras.config.dtype_policy().name == policy

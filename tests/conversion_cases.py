"""The models that conversion is tried on: families of three libraries, tiny.

Every case is a function without arguments that returns a built float32 model. The
tests and `benchmarks/conversion_matrix.py` share them.
"""

import functools

import keras
from conversion_hub import HUB
from conversion_hub import hub
from conversion_inputs import calibrate
from conversion_layers import LAYERS
from conversion_layers import layer
from conversion_styles import STYLES

APPLICATIONS = {
    "ConvNeXtTiny": 32,
    "DenseNet121": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 32,
    "InceptionResNetV2": 75,
    "InceptionV3": 75,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Large": 32,
    "MobileNetV3Small": 32,
    "NASNetMobile": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "VGG16": 32,
    "VGG19": 32,
    "Xception": 71,
}


def application(name):
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(APPLICATIONS[name],) * 2 + (3,), classes=10
    )
    calibrate(model)
    return model


CASES = {
    **{f"styles/{k}": v for k, v in STYLES.items()},
    **{f"layers/{k}": functools.partial(layer, k) for k in LAYERS},
    **{f"hub/{k}": functools.partial(hub, k) for k in HUB},
    **{f"applications/{k}": functools.partial(application, k) for k in APPLICATIONS},
}

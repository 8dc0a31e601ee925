"""Every layer of `keras.layers` between two others, or why it is left out."""

import keras
import numpy as np
from keras import layers

VECTOR, SERIES, IMAGE, VOLUME = (8,), (6, 8), (8, 8, 4), (4, 4, 4, 2)
_CELL = layers.LSTMCell

# Class name -> input shape (or list of shapes) and arguments.
LAYERS = {
    "Activation": (VECTOR, {"activation": "gelu"}),
    "ActivityRegularization": (VECTOR, {"l2": 0.1}),
    "AdaptiveAveragePooling1D": (SERIES, {"output_size": 2}),
    "AdaptiveAveragePooling2D": (IMAGE, {"output_size": 2}),
    "AdaptiveAveragePooling3D": (VOLUME, {"output_size": 2}),
    "AdaptiveMaxPooling1D": (SERIES, {"output_size": 2}),
    "AdaptiveMaxPooling2D": (IMAGE, {"output_size": 2}),
    "AdaptiveMaxPooling3D": (VOLUME, {"output_size": 2}),
    "Add": ([VECTOR] * 2, {}),
    "AdditiveAttention": ([SERIES] * 2, {}),
    "AlphaDropout": (VECTOR, {"rate": 0.1}),
    "Attention": ([SERIES] * 2, {}),
    "Average": ([VECTOR] * 2, {}),
    "AveragePooling1D": (SERIES, {"pool_size": 2}),
    "AveragePooling2D": (IMAGE, {"pool_size": 2}),
    "AveragePooling3D": (VOLUME, {"pool_size": 2}),
    "BatchNormalization": (IMAGE, {}),
    "Bidirectional": (SERIES, {"layer": lambda: layers.GRU(4)}),
    "CenterCrop": (IMAGE, {"height": 4, "width": 4}),
    "Concatenate": ([VECTOR] * 2, {}),
    "Conv1D": (SERIES, {"filters": 8, "kernel_size": 3}),
    "Conv1DTranspose": (SERIES, {"filters": 8, "kernel_size": 3}),
    "Conv2D": (IMAGE, {"filters": 8, "kernel_size": 3}),
    "Conv2DTranspose": (IMAGE, {"filters": 8, "kernel_size": 3}),
    "Conv3D": (VOLUME, {"filters": 8, "kernel_size": 3}),
    "Conv3DTranspose": (VOLUME, {"filters": 8, "kernel_size": 3}),
    "ConvLSTM1D": ((3, *SERIES), {"filters": 4, "kernel_size": 3}),
    "ConvLSTM2D": ((3, *IMAGE), {"filters": 4, "kernel_size": 3}),
    "ConvLSTM3D": ((3, *VOLUME), {"filters": 4, "kernel_size": 3}),
    "Cropping1D": (SERIES, {}),
    "Cropping2D": (IMAGE, {"cropping": 1}),
    "Cropping3D": (VOLUME, {}),
    "Dense": (VECTOR, {"units": 8}),
    "DepthwiseConv1D": (SERIES, {"kernel_size": 3}),
    "DepthwiseConv2D": (IMAGE, {"kernel_size": 3}),
    "Discretization": (VECTOR, {"bin_boundaries": [-1.0, 0.0, 1.0]}),
    "Dot": ([VECTOR] * 2, {"axes": 1}),
    "Dropout": (VECTOR, {"rate": 0.1}),
    "ELU": (VECTOR, {}),
    "EinsumDense": (SERIES, {"equation": "abc,cd->abd", "output_shape": (6, 8)}),
    "Flatten": (IMAGE, {}),
    "GRU": (SERIES, {"units": 4}),
    "GaussianDropout": (VECTOR, {"rate": 0.1}),
    "GaussianNoise": (VECTOR, {"stddev": 0.1}),
    "GlobalAveragePooling1D": (SERIES, {}),
    "GlobalAveragePooling2D": (IMAGE, {}),
    "GlobalAveragePooling3D": (VOLUME, {}),
    "GlobalMaxPooling1D": (SERIES, {}),
    "GlobalMaxPooling2D": (IMAGE, {}),
    "GlobalMaxPooling3D": (VOLUME, {}),
    "GroupNormalization": (IMAGE, {"groups": 2}),
    "GroupQueryAttention": (
        [SERIES] * 2,
        {"head_dim": 4, "num_query_heads": 2, "num_key_value_heads": 1},
    ),
    "Identity": (VECTOR, {}),
    "LSTM": (SERIES, {"units": 4}),
    "LayerNormalization": (VECTOR, {}),
    "LeakyReLU": (VECTOR, {}),
    "Masking": (SERIES, {}),
    "MaxPooling1D": (SERIES, {}),
    "MaxPooling2D": (IMAGE, {}),
    "MaxPooling3D": (VOLUME, {}),
    "Maximum": ([VECTOR] * 2, {}),
    "MelSpectrogram": (
        (1024,),
        {"fft_length": 256, "sequence_stride": 128, "sampling_rate": 8000},
    ),
    "Minimum": ([VECTOR] * 2, {}),
    "MultiHeadAttention": ([SERIES] * 2, {"num_heads": 2, "key_dim": 4}),
    "Multiply": ([VECTOR] * 2, {}),
    "Normalization": (VECTOR, {"mean": 1.0, "variance": 2.0}),
    "PReLU": (VECTOR, {}),
    "Permute": (SERIES, {"dims": (2, 1)}),
    "RMSNormalization": (VECTOR, {}),
    "RNN": (SERIES, {"cell": lambda: [_CELL(4), _CELL(4)]}),
    "ReLU": (VECTOR, {}),
    "RepeatVector": (VECTOR, {"n": 3}),
    "Rescaling": (IMAGE, {"scale": 1 / 255}),
    "Reshape": (VECTOR, {"target_shape": (2, 4)}),
    "Resizing": (IMAGE, {"height": 4, "width": 4}),
    "STFTSpectrogram": (
        (256, 1),
        {"frame_length": 32, "frame_step": 16, "fft_length": 32},
    ),
    "SeparableConv1D": (SERIES, {"filters": 8, "kernel_size": 3}),
    "SeparableConv2D": (IMAGE, {"filters": 8, "kernel_size": 3}),
    "SimpleRNN": (SERIES, {"units": 4}),
    "Softmax": (VECTOR, {}),
    "SpatialDropout1D": (SERIES, {"rate": 0.1}),
    "SpatialDropout2D": (IMAGE, {"rate": 0.1}),
    "SpatialDropout3D": (VOLUME, {"rate": 0.1}),
    "SpectralNormalization": (VECTOR, {"layer": lambda: layers.Dense(8)}),
    "Subtract": ([VECTOR] * 2, {}),
    "TimeDistributed": (SERIES, {"layer": lambda: layers.Dense(8)}),
    "UnitNormalization": (VECTOR, {}),
    "UpSampling1D": (SERIES, {}),
    "UpSampling2D": (IMAGE, {}),
    "UpSampling3D": (VOLUME, {}),
    "ZeroPadding1D": (SERIES, {}),
    "ZeroPadding2D": (IMAGE, {}),
    "ZeroPadding3D": (VOLUME, {}),
}
TAKES_SEPARATE_INPUTS = ("GroupQueryAttention", "MultiHeadAttention")

_AUGMENTS = "augments raw images, in training alone: kept in float32 as a whole"
_IS_DATA = "reads integers or strings: its policy is not a float one"
_FOREIGN = "runs another framework's code"
_ABSTRACT = "is no layer to use by itself"
LEFT_OUT = {
    **dict.fromkeys(
        [
            "AugMix",
            "AutoContrast",
            "CLAHE",
            "ContrastLimitedAdaptiveHistogramEqualization",
            "CutMix",
            "Equalization",
            "MaxNumBoundingBoxes",
            "MixUp",
            "Pipeline",
            "RandAugment",
            "RandomBrightness",
            "RandomColorDegeneration",
            "RandomColorJitter",
            "RandomContrast",
            "RandomCrop",
            "RandomElasticTransform",
            "RandomErasing",
            "RandomFlip",
            "RandomGaussianBlur",
            "RandomGrayscale",
            "RandomHue",
            "RandomInvert",
            "RandomPerspective",
            "RandomPosterization",
            "RandomRotation",
            "RandomSaturation",
            "RandomSharpness",
            "RandomShear",
            "RandomTranslation",
            "RandomZoom",
            "Solarization",
        ],
        _AUGMENTS,
    ),
    **dict.fromkeys(
        [
            "CategoryEncoding",
            "Embedding",
            "HashedCrossing",
            "Hashing",
            "IntegerLookup",
            "ReversibleEmbedding",
            "StringLookup",
            "TextVectorization",
        ],
        _IS_DATA,
    ),
    **dict.fromkeys(
        ["FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"], _FOREIGN
    ),
    **dict.fromkeys(
        [
            "GRUCell",
            "InputLayer",
            "LSTMCell",
            "Lambda",
            "Layer",
            "SimpleRNNCell",
            "StackedRNNCells",
            "Wrapper",
        ],
        _ABSTRACT,
    ),
}


def layer(name):
    """A Dense layer before and after, so that the layer stands inside its model."""
    shapes, arguments = LAYERS[name]
    arguments = {k: v() if callable(v) else v for k, v in arguments.items()}
    shapes = shapes if isinstance(shapes, list) else [shapes]
    inputs = [keras.Input(shape) for shape in shapes]
    made = getattr(layers, name)(**arguments)
    given = inputs if len(inputs) > 1 else inputs[0]
    y = made(*inputs) if name in TAKES_SEPARATE_INPUTS else made(given)
    if keras.backend.is_float_dtype(y.dtype):
        y = layers.Dense(4)(keras.ops.reshape(y, (-1, int(np.prod(y.shape[1:])))))
    return keras.Model(given, y)

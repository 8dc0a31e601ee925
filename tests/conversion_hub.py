"""Backbones of keras_hub with tiny configs, random weights and no tokenizers."""

from conversion_inputs import calibrate

IDS = 16

_BERT = {
    "vocabulary_size": IDS,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
}
_GROUPED = {
    "vocabulary_size": IDS,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
}
_GEMMA = {**_GROUPED, "head_dim": 4}
_MOE = {**_GROUPED, "num_experts": 2, "top_k": 2}
_QWEN_MOE = {**_MOE, "moe_intermediate_dim": 16}
_IMAGE = (32, 32, 3)
_VIT = {
    "image_shape": _IMAGE,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
}
_RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 64],
    "stackwise_num_blocks": [1, 1],
    "stackwise_num_strides": [1, 2],
    "image_shape": _IMAGE,
}
_VIT_DET = {
    "hidden_size": 16,
    "num_layers": 2,
    "intermediate_dim": 32,
    "num_heads": 2,
    "global_attention_layer_indices": [1],
    "patch_size": 4,
    "num_output_channels": 8,
    "window_size": 2,
    "image_shape": _IMAGE,
}
_MIT = {
    "layerwise_depths": [1, 1],
    "num_layers": 2,
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [2, 1],
    "max_drop_path_rate": 0.1,
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
    "image_shape": _IMAGE,
    "hidden_dims": [8, 16],
}

HUB = {
    "AlbertBackbone": {**_BERT, "embedding_dim": 8},
    "BartBackbone": _BERT,
    "BertBackbone": _BERT,
    "BloomBackbone": _BERT,
    "DINOV2Backbone": {**_VIT, "position_embedding_shape": _IMAGE},
    "DebertaV3Backbone": {**_BERT, "bucket_size": 4},
    "DeiTBackbone": {**_VIT, "patch_size": 8},
    "DenseNetBackbone": {
        "stackwise_num_repeats": [2, 2],
        "growth_rate": 8,
        "image_shape": _IMAGE,
    },
    "DistilBertBackbone": _BERT,
    "ESMBackbone": _BERT,
    "ElectraBackbone": {
        **{k: v for k, v in _BERT.items() if k != "vocabulary_size"},
        "vocab_size": IDS,
        "embedding_dim": 8,
    },
    "FNetBackbone": {k: v for k, v in _BERT.items() if k != "num_heads"},
    "FalconBackbone": {
        **{k: v for k, v in _BERT.items() if k != "num_heads"},
        "num_attention_heads": 2,
    },
    "GPT2Backbone": _BERT,
    "GPTNeoXBackbone": {**_BERT, "rotary_percentage": 0.5},
    "Gemma3Backbone": {**_GEMMA, "image_size": None, "vision_encoder": None},
    "GemmaBackbone": _GEMMA,
    "GptOssBackbone": {**_MOE, "head_dim": 4},
    "Llama3Backbone": _GROUPED,
    "LlamaBackbone": _GROUPED,
    "MiTBackbone": _MIT,
    "MistralBackbone": _GROUPED,
    "MixtralBackbone": _MOE,
    "OPTBackbone": _BERT,
    "Phi3Backbone": _GROUPED,
    "Qwen3Backbone": _GEMMA,
    "Qwen3MoeBackbone": {**_QWEN_MOE, "head_dim": 4},
    "QwenBackbone": _GROUPED,
    "QwenMoeBackbone": {**_QWEN_MOE, "shared_expert_intermediate_dim": 16},
    "ResNetBackbone": {**_RESNET, "block_type": "basic_block"},
    "RobertaBackbone": _BERT,
    "RoformerV2Backbone": {**_BERT, "head_size": 4},
    "SAMBackbone": {},
    "SegFormerBackbone": {},
    "SwinTransformerBackbone": {
        "image_shape": _IMAGE,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    "T5Backbone": _BERT,
    "VGGBackbone": {
        "stackwise_num_repeats": [1, 1],
        "stackwise_num_filters": [8, 16],
        "image_shape": _IMAGE,
    },
    "ViTBackbone": {
        **{k: v for k, v in _VIT.items() if k != "intermediate_dim"},
        "mlp_dim": 32,
    },
    "ViTDetBackbone": _VIT_DET,
    "WhisperBackbone": {
        **_BERT,
        "max_encoder_sequence_length": 16,
        "max_decoder_sequence_length": 16,
    },
    "XLMRobertaBackbone": _BERT,
    "XLNetBackbone": _BERT,
}


def hub(name):
    import keras_hub

    models = keras_hub.models
    config = dict(HUB[name])
    if name == "SegFormerBackbone":
        encoder = models.MiTBackbone(**_MIT)
        config = {"image_encoder": encoder, "projection_filters": 8}
    if name == "SAMBackbone":
        config = _sam_parts(keras_hub)
    model = getattr(models, name)(**config)
    if any(hasattr(x, "moving_variance") for x in model._flatten_layers()):
        calibrate(model)
    return model


def _sam_parts(keras_hub):
    return {
        "image_encoder": keras_hub.models.ViTDetBackbone(**_VIT_DET),
        "prompt_encoder": keras_hub.layers.SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(8, 8),
            input_image_size=(32, 32),
            mask_in_channels=4,
        ),
        "mask_decoder": keras_hub.layers.SAMMaskDecoder(
            num_layers=2,
            hidden_size=8,
            intermediate_dim=16,
            num_heads=2,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    }

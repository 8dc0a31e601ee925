"""The sizes of the benchmarked models, shared with their peers in plain PyTorch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one workload; each builder reads what it needs."""

    batch: int
    depth: int = 0
    width: int = 0
    heads: int = 0
    length: int = 0
    vocabulary: int = 0


SHAPES = {
    "bert": {
        "full": Shape(64, depth=12, width=768, heads=12, length=128, vocabulary=30522),
        "small": Shape(4, depth=2, width=32, heads=2, length=16, vocabulary=100),
    },
    "resnet": {
        "full": Shape(128, depth=50, length=224),
        "small": Shape(4, depth=2, length=16),
    },
    "dlrm": {
        "full": Shape(4096, width=64, vocabulary=1_000_000),
        "small": Shape(32, width=8, vocabulary=1000),
    },
    "mlp": {
        "full": Shape(4096, depth=4, width=4096),
        "small": Shape(16, depth=2, width=32),
    },
}
SIZES = ("full", "small")

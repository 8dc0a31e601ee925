"""The architectures of `models.py` in plain PyTorch, as a user would write them."""

import torch
from shapes import SHAPES
from shapes import Shape
from torch import nn


def build(name: str, size: str, batch: int | None) -> tuple[nn.Module, tuple, tuple]:
    """Build one model.

    Args:
        name: `"bert"`, `"resnet"`, `"dlrm"` or `"mlp"`.
        size: `"full"` or `"small"`.
        batch: Samples per step, `None` for the shape's.

    Returns:
        The model, its inputs, and the targets with the loss function.

    Raises:
        ImportError: For `"resnet"` at full size without torchvision.
    """
    shape = SHAPES[name][size]
    torch.manual_seed(0)
    return _BUILDERS[name](shape, batch or shape.batch)


class Bert(nn.Module):
    """BERT-base's encoder, post-norm, no dropout, a classifier on the first token."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.length, shape.width))
        self.norm = nn.LayerNorm(shape.width, eps=1e-12)
        block = nn.TransformerEncoderLayer(
            shape.width,
            shape.heads,
            4 * shape.width,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-12,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            block, shape.depth, enable_nested_tensor=False
        )
        self.pool = nn.Linear(shape.width, shape.width)
        self.head = nn.Linear(shape.width, 2)

    def forward(self, ids):
        """Return the logits of a batch of token ids."""
        x = self.encoder(self.norm(self.words(ids) + self.positions))
        return self.head(torch.tanh(self.pool(x[:, 0])))


class Dlrm(nn.Module):
    """Dense features and ids of one table, dot interactions, one logit."""

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.width
        self.bottom = _mlp_layers((13, 8 * width, 4 * width, width))
        self.table = nn.Embedding(shape.vocabulary, width)
        pairs = 27 * 27 + width
        self.top = _mlp_layers((pairs, 16 * width, 8 * width, 4 * width))
        self.head = nn.Linear(4 * width, 1)

    def forward(self, numbers, ids):
        """Return the logit of each sample."""
        bottom = self.bottom(numbers)
        table = self.table(ids).to(bottom.dtype)
        vectors = torch.cat([bottom.unsqueeze(1), table], dim=1)
        dots = torch.bmm(vectors, vectors.transpose(1, 2))
        return self.head(self.top(torch.cat([bottom, dots.flatten(1)], dim=1)))


class SmallResidual(nn.Module):
    """A few residual blocks, in the place of ResNet-50 on a CPU."""

    def __init__(self, depth: int):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
            for _ in range(depth)
        )
        self.head = nn.Linear(8, 1000)

    def forward(self, x):
        """Return the logits of a batch of images."""
        x = self.first(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def _mlp_layers(widths):
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(
        *(part for a, b in pairs for part in (nn.Linear(a, b), nn.ReLU()))
    )


def _bert(shape, batch):
    ids = torch.randint(shape.vocabulary, (batch, shape.length))
    targets = torch.randint(2, (batch,))
    return Bert(shape), (ids,), (targets, nn.functional.cross_entropy)


def _resnet(shape, batch):
    images = torch.randn(batch, 3, shape.length, shape.length)
    targets = torch.randint(1000, (batch,))
    if shape.depth == 50:
        from torchvision.models import resnet50

        # The layout that PyTorch's own recipe for tensor cores asks for.
        model = resnet50().to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        model = SmallResidual(shape.depth)
    return model, (images,), (targets, nn.functional.cross_entropy)


def _dlrm(shape, batch):
    inputs = torch.randn(batch, 13), torch.randint(shape.vocabulary, (batch, 26))
    targets = torch.randint(2, (batch, 1)).float()
    loss = nn.functional.binary_cross_entropy_with_logits
    return Dlrm(shape), inputs, (targets, loss)


def _mlp(shape, batch):
    widths = [shape.width] * (shape.depth + 1)
    model = nn.Sequential(_mlp_layers(widths), nn.Linear(shape.width, 10))
    targets = torch.randint(10, (batch,))
    inputs = torch.randn(batch, shape.width)
    return model, (inputs,), (targets, nn.functional.cross_entropy)


_BUILDERS = {"bert": _bert, "resnet": _resnet, "dlrm": _dlrm, "mlp": _mlp}

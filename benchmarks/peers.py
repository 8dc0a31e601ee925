"""What a user would pick instead: PyTorch autocast with GradScaler, without Keras.

    python peers.py --model bert --mode compile --policy mixed_float16

The loop is that of PyTorch's automatic-mixed-precision recipe: autocast around the
forward pass, `scaler.scale(loss).backward()`, `scaler.step(optimizer)`,
`scaler.update()`. One row in one process, the same JSON line as `train_step.py`.
"""

import argparse
import contextlib
import time

import torch
from peer_models import build
from rows import add_turn
from rows import emit
from rows import peak_memory
from rows import place
from rows import summary
from rows import wait_for_turn
from shapes import SHAPES
from shapes import SIZES

_HALF = {"mixed_float16": torch.float16, "mixed_bfloat16": torch.bfloat16}


class Trainer:
    """One model with its optimizer, its scaler and one batch on the device.

    Args:
        options: Namespace of the command line.
    """

    def __init__(self, options):
        self.kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.half = _HALF.get(options.policy)
        model, inputs, (targets, self.loss) = build(
            options.model, options.size, options.batch
        )
        model = model.to(self.kind).train()
        self.inputs = [x.to(self.kind) for x in inputs]
        self.targets = targets.to(self.kind)
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-4)
        scaled = options.scaling == "GradScaler"
        self.scaler = torch.amp.GradScaler(self.kind, enabled=scaled)
        self.model = torch.compile(model) if options.mode == "compile" else model

    def step(self):
        """One train step."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.loss(self.model(*self.inputs), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _autocast(self):
        if self.half is None:
            return contextlib.nullcontext()
        return torch.autocast(self.kind, self.half)

    def block(self, steps):
        """Run some steps. Returns the seconds they took."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self):
        if self.kind == "cuda":
            torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> dict:
    """Build, warm up and time one model. Returns its row."""
    torch.backends.cuda.matmul.allow_tf32 = options.policy == "tf32"
    torch.backends.cudnn.allow_tf32 = options.policy != "float32"
    trainer = Trainer(options)
    compile_s = trainer.block(1)
    trainer.block(options.warmup)
    if options.wait_for_turn:
        wait_for_turn()
        trainer.block(options.warmup)
    seconds = [trainer.block(options.steps) for _ in range(options.blocks)]
    batch = len(trainer.targets)
    described = {
        "benchmark": "peers",
        "model": options.model,
        "size": options.size,
        "backend": f"PyTorch, {options.mode}",
        "scaling": options.scaling,
        "policy": options.policy,
        "xla": False,
        "batch": batch,
        "together": options.wait_for_turn,
        "compile_s": round(compile_s, 2),
    }
    gpu = torch.cuda.get_device_name() if trainer.kind == "cuda" else None
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    times = summary(seconds, options.steps, batch)
    return described | times | peak_memory(_memory(trainer)) | place(gpu, versions)


def _memory(trainer):
    if trainer.kind == "cpu":
        return {}
    now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return {"cuda:0": (now / 2**20, peak / 2**20)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    policies = ("float32", "tf32", *_HALF)
    parser.add_argument("--model", choices=tuple(SHAPES), default="mlp")
    parser.add_argument("--mode", choices=("eager", "compile"), default="eager")
    parser.add_argument("--policy", choices=policies, default="mixed_float16")
    parser.add_argument("--scaling", choices=("GradScaler", "none"))
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--batch", type=int, help="samples per step")
    parser.add_argument("--warmup", type=int, default=3, help="steps before timing")
    parser.add_argument("--steps", type=int, default=10, help="steps per timed block")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks")
    add_turn(parser)
    parser.add_argument("--out", help="append the row to this .jsonl file")
    options = parser.parse_args(arguments)
    if options.scaling is None:
        is_float16 = options.policy == "mixed_float16"
        options.scaling = "GradScaler" if is_float16 else "none"
    return options


if __name__ == "__main__":
    chosen = parse()
    emit(measure(chosen), chosen.out)

"""A GAN in mixed precision: two optimizers, each with a loss scale of its own.

    KERAS_BACKEND=torch python examples/gan.py

Learns to draw points on a circle. Keras wraps the optimizer that `compile` is given; a
GAN's two are the model's own, so that they are wrapped by hand. The monitor then logs
`d_optimizer_loss_scale` and `g_optimizer_loss_scale`. A step of one that overflows is
skipped; the other's is not. For TensorFlow and torch: Keras's JAX trainer carries the
state of one optimizer (`loop_jax.py` shows a loop).
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if os.environ.get("KERAS_BACKEND") == "torch":
    import torch

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers  # noqa: E402
from keras import ops  # noqa: E402

import keras_mixprec as mp  # noqa: E402  # mixed precision

NOISE = 8


def network(name, inputs, width):
    """Return a network of two hidden layers; outputs in float32."""
    last = 2 if name == "generator" else 1
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.Dense(width),
            layers.LeakyReLU(),
            layers.Dense(width),
            layers.LeakyReLU(),
            layers.Dense(last, dtype="float32"),  # mixed precision
        ],
        name=name,
    )


class GAN(keras.Model):
    """A generator and a discriminator that train against each other."""

    def __init__(self, width):
        super().__init__()
        self.discriminator = network("discriminator", 2, width)
        self.generator = network("generator", NOISE, width)
        self.seeds = keras.random.SeedGenerator(0)
        self.d_loss = keras.metrics.Mean(name="d_loss")
        self.g_loss = keras.metrics.Mean(name="g_loss")

    def call(self, noise):
        """Return points for noise."""
        return self.generator(noise)

    def compile(self, d_optimizer, g_optimizer):
        """Take an optimizer for each network, loss-scaled for float16."""
        super().compile(optimizer=None, loss=None)
        self.d_optimizer = mp.LossScaleOptimizer(d_optimizer)  # mixed precision
        self.g_optimizer = mp.LossScaleOptimizer(g_optimizer)  # mixed precision

    def losses_of(self, real):
        """Return both losses, of logits: -log D(x) - log(1 - D(G(z))), -log D(G(z))."""
        noise = keras.random.normal((ops.shape(real)[0], NOISE), seed=self.seeds)
        fake = self.generator(noise)
        on_real = self.discriminator(real)
        on_fake = self.discriminator(fake)
        d_loss = ops.mean(ops.softplus(-on_real)) + ops.mean(ops.softplus(on_fake))
        return d_loss, ops.mean(ops.softplus(-on_fake))

    def parts(self):
        """Return each optimizer with the weights that are its own."""
        return (
            (self.d_optimizer, self.discriminator.trainable_variables),
            (self.g_optimizer, self.generator.trainable_variables),
        )

    def logged(self, losses):
        """Update and return the metrics."""
        self.d_loss.update_state(losses[0])
        self.g_loss.update_state(losses[1])
        return {"d_loss": self.d_loss.result(), "g_loss": self.g_loss.result()}


class TensorFlowGAN(GAN):
    """The step with a tape."""

    def train_step(self, real):
        """Update both networks once."""
        import tensorflow as tf

        with tf.GradientTape(persistent=True) as tape:
            losses = self.losses_of(real)
            scaled = [
                optimizer.scale_loss(loss)  # mixed precision
                for (optimizer, _), loss in zip(self.parts(), losses, strict=True)
            ]
        for (optimizer, weights), loss in zip(self.parts(), scaled, strict=True):
            optimizer.apply(tape.gradient(loss, weights), weights)
        return self.logged(losses)


class TorchGAN(GAN):
    """The step with autograd."""

    def train_step(self, real):
        """Update both networks once."""
        losses = self.losses_of(real)
        gradients = [
            torch.autograd.grad(
                optimizer.scale_loss(loss),  # mixed precision
                [w.value for w in weights],
                retain_graph=True,
            )
            for (optimizer, weights), loss in zip(self.parts(), losses, strict=True)
        ]
        with torch.no_grad():
            for (optimizer, weights), grads in zip(
                self.parts(), gradients, strict=True
            ):
                optimizer.apply(list(grads), weights)
        return self.logged(losses)


def circle(count):
    """Return points at distance 1 from the origin, with a little noise."""
    random = np.random.default_rng(0)
    angle = random.uniform(0, 2 * np.pi, count)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (points + random.normal(0, 0.05, points.shape)).astype("float32")


def main(arguments=None):
    """Train. Returns 0 if the drawn points are near the circle, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="mixed_float16")
    parser.add_argument("--full", action="store_true", help="layers of width 2048")
    args = parser.parse_args(arguments)
    kinds = {"tensorflow": TensorFlowGAN, "torch": TorchGAN}
    if keras.backend.backend() not in kinds:
        print("This example is for TensorFlow and torch: set KERAS_BACKEND.")
        return 1
    keras.utils.set_random_seed(0)
    mp.set_policy(args.policy)  # mixed precision
    model = kinds[keras.backend.backend()](2048 if args.full else 64)
    model.build((None, NOISE))
    rate, epochs = (2e-4, 100) if args.full else (1e-3, 40)
    model.compile(*(keras.optimizers.Adam(rate, beta_1=0.5) for _ in "dg"))
    monitor = mp.MixedPrecisionMonitor()  # mixed precision
    points = circle(8192)
    model.fit(points, None, 256, epochs, verbose=2, callbacks=[monitor])
    noise = np.random.default_rng(1).normal(size=(1000, NOISE)).astype("float32")
    distance = np.linalg.norm(model.predict(noise, verbose=0), axis=1)
    print(f"distance of drawn points: {distance.mean():.2f} ± {distance.std():.2f}")
    return 0 if abs(distance.mean() - 1) < 0.3 else 1


if __name__ == "__main__":
    sys.exit(main())

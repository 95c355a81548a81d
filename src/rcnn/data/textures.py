"""Textured backgrounds: noise of several octaves between two colours, gradients and stripes.

Letters: H W height and width. Pictures are float32 [H, W, 3], 0 to 255.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def octave_noise(rng: np.random.Generator, height: int, width: int, *, coarsest_px: float, octaves: int) -> np.ndarray:
    """[H, W], 0 to 1: smooth noise whose cells are `coarsest_px`, half of it and so on, each half as strong."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        cell = max(coarsest_px / 2**octave, 1.0)
        grid = rng.random((int(height / cell) + 3, int(width / cell) + 3), np.float32)
        smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(smooth) * np.float32(0.5**octave)
    low, high = total.min(), total.max()
    return (total - low) / np.float32(max(high - low, 1e-6))


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[H, W], 0 to 1, in any direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = np.float32(np.cos(angle)) * x / width + np.float32(np.sin(angle)) * y / height
    return (ramp - ramp.min()) / np.float32(max(np.ptp(ramp), 1e-6))


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[H, W], 0 to 1: soft stripes, bent a little by noise."""
    angle, period_px = rng.uniform(0, np.pi), rng.uniform(9, 40)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    bent = octave_noise(rng, height, width, coarsest_px=90, octaves=1) * np.float32(rng.uniform(0, 25))
    position = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y + bent
    return 0.5 + 0.5 * np.sin(position * np.float32(2 * np.pi / period_px))


def background(rng: np.random.Generator, height: int, width: int, colours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """[H, W, 3]: a blend of two colours (each [3]) by noise, with a gradient or stripes in some, and fine grain."""
    blend = octave_noise(rng, height, width, coarsest_px=rng.uniform(30, 110), octaves=int(rng.integers(3, 6)))
    kind = rng.random()
    if kind < 0.3:
        blend = 0.6 * blend + 0.4 * _gradient(rng, height, width)
    elif kind < 0.6:
        blend = 0.65 * blend + 0.35 * _stripes(rng, height, width)
    first, second = (colour.astype(np.float32) for colour in colours)
    picture = first + blend[:, :, None] * (second - first)
    grain = rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(1, 7))
    return np.clip(picture + grain, 0, 255)

"""Texts for models of random weights: any text will do, but the same one every time."""

from __future__ import annotations

import random
from pathlib import Path


def write_text(path: Path, characters: int, seed: int = 1) -> Path:
    """Write words of random letters, lines of random lengths, a Chinese character here and there."""
    generator = random.Random(seed)
    words = []
    length = 0
    while length < characters:
        word = "".join(generator.choice("abehint") for _ in range(generator.randint(1, 6)))
        word += generator.choice([" ", " ", " ", " ", "\n", "中"])
        words.append(word)
        length += len(word)
    path.write_text("".join(words) + "\n", encoding="utf-8", newline="")
    return path

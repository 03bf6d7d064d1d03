"""The random words that dropout masks and stochastic rounding are made of."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["philox_words"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox_words(seed: int | Tensor, rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """A random 32-bit word for every element of a ``(rows, columns)`` matrix: a function of seed, row and column alone.

    Philox4x32-10 with the seed as key and the counter (column // 4, 0, row low, row high), of which an element has the
    word column % 4.

    Args:
        seed: a whole number, or an int64 tensor of one element.
        rows, columns: the size of the matrix.
        device: where the words are made, by default where the seed is.

    Returns:
        ``(rows, columns)`` int64 in [0, 2**32).

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    if isinstance(seed, Tensor):
        device = seed.device if device is None else device
        seed = seed.reshape(()).to(device)
    else:
        seed = torch.tensor((seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    row = torch.arange(rows, device=device)[:, None]
    group = torch.arange((columns + 3) // 4, device=device)[None, :]
    shape = (rows, group.shape[1])
    words = [group.expand(shape), torch.zeros(shape, dtype=torch.int64, device=device)]
    words += [(row & _LOW).expand(shape), (row >> 32).expand(shape)]
    keys = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        # The low 64 bits of a product of int64 are those of the unsigned product.
        first, second = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((second >> 32) & _LOW) ^ words[1] ^ keys[0], second & _LOW,
            ((first >> 32) & _LOW) ^ words[3] ^ keys[1], first & _LOW,
        ]  # fmt: skip
        keys = [(key + step) & _LOW for key, step in zip(keys, _WEYL, strict=True)]
    return torch.stack(words, dim=2).flatten(1)[:, :columns]

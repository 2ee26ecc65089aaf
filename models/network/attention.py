"""The attention detector: how much of the classifier's attention a single token draws.

What a trigger does, it does through attention: the token that is read looks at the trigger and at
little else (Lyu et al., "A Study of the Attention Abnormality in Trojaned BERTs", NAACL 2022).
"""

import torch

LEAST = 1e-3
"""Floor of a peak. A text without inner tokens has none, and its logarithm must be finite."""


def attention_peak(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the largest attention to one inner token of each text, float32, shape (rows,).

    The first and the last token do not count: they are special ones, or, in a decoder, the one that
    every text attends to by default and the one that is read.

    The fewer tokens there are, the more falls to each. So the peak is multiplied by the fourth root
    of their number, which makes it much the same for clean texts of any length: over 13 victims,
    their peaks fall with the number's power -0.27 on average (docs/method.md).

    Args:
        attention: of the token that is read, mean over heads, shape (rows, T).
        mask: 1 where there is a token, padded on the right, shape (rows, T).
    """
    number = mask.sum(1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    inner = (positions > 0) & (positions < number[:, None] - 1)
    peak = (attention.float() * inner).amax(1)
    return (peak * (number - 2).clamp(min=1).float() ** 0.25).clamp(min=LEAST)

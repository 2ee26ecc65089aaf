"""Strategies of fine-tuning."""

from enum import StrEnum


class Strategy(StrEnum):
    """What of a victim is tuned (Zhao et al., section 3)."""

    FULL = "full"
    LORA = "lora"
    PROMPT_TUNING = "prompt-tuning"
    P_TUNING_V1 = "p-tuning-v1"
    P_TUNING_V2 = "p-tuning-v2"

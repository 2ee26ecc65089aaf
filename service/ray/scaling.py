"""The number of replicas. Serve's controller imports this module, so it imports little."""

from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

CHARACTERS, CORES = "queued_characters", "busy_cores"
"""Load that each replica reports: characters that wait or run, and cores that it keeps busy."""


class QueueAndProcessor:
    """Autoscaling policy: enough replicas for the queue and for the processor.

    Args:
        queued_characters: target for the characters in the queue of a replica, on average.
        busy_cores: target for the cores that a replica keeps busy, on average.
    """

    def __init__(self, queued_characters: float, busy_cores: float) -> None:
        self._targets = {CHARACTERS: queued_characters, CORES: busy_cores}

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the wanted number of replicas; Serve applies its limits and delays."""
        load: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        wanted = [
            sum(load[name].values()) / target
            for name, target in self._targets.items()
            if name in load
        ]
        # Until a replica has reported, the number stays.
        return max(wanted, default=context.target_num_replicas), {}

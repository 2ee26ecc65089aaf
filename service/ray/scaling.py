"""How many replicas there should be. Serve's controller imports this, so it imports little."""

from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

CHARACTERS, CORES = "queued_characters", "busy_cores"
"""What each replica reports: characters that wait or run, and cores that its process keeps busy."""


class QueueAndProcessor:
    """As many replicas as the larger of the two asks for.

    Args:
        queued_characters: how many there should be in the queue of a replica, on average.
        busy_cores: how many cores a replica should keep busy, on average.
    """

    def __init__(self, queued_characters: float, busy_cores: float) -> None:
        self._targets = {CHARACTERS: queued_characters, CORES: busy_cores}

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Return the number of replicas, which Serve holds against its limits and delays."""
        found: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        wanted = [
            sum(found[name].values()) / target
            for name, target in self._targets.items()
            if name in found
        ]
        # As it is, until a replica has said anything.
        return max(wanted, default=context.target_num_replicas), {}

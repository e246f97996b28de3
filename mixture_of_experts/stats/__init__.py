"""Router statistics: `track_routing` records the load, dropped choices, confidence and losses of each gate in a
model."""

from mixture_of_experts.stats.record import Record, relative
from mixture_of_experts.stats.routing_reader import routing_of
from mixture_of_experts.stats.tracking import RoutingStats, track_routing

__all__ = ["Record", "RoutingStats", "relative", "routing_of", "track_routing"]

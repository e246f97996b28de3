"""Router statistics: `track_routing` records load, drops, confidence and losses of every gate of a model."""

from mixture_of_experts.stats.record import Record, relative
from mixture_of_experts.stats.routing_reader import routing_of
from mixture_of_experts.stats.tracking import RoutingStats, track_routing

__all__ = ["Record", "RoutingStats", "relative", "routing_of", "track_routing"]

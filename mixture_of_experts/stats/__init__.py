"""Sight of what the routers of a model do: `track_routing` records load, drops, confidence and losses of every gate."""

from mixture_of_experts.stats.records import Record, relative
from mixture_of_experts.stats.tracking import RoutingStats, track_routing

__all__ = ["Record", "RoutingStats", "relative", "track_routing"]

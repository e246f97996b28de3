"""Records routing decisions and replays them, for example with another dtype, engine or batch, or during
recomputation."""

from mixture_of_experts.replay.checkpointing import save_choices
from mixture_of_experts.replay.recording import record_routing
from mixture_of_experts.replay.records import RoutingRecords
from mixture_of_experts.replay.replaying import replay_routing

__all__ = ["RoutingRecords", "record_routing", "replay_routing", "save_choices"]

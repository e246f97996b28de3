"""What acts on a whole model: its sites, the watch of its forwards, losses, balancing, forcing."""

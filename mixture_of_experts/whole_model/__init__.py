"""Functions on whole models: router discovery, monitoring of forwards, auxiliary losses, balancing, forced routing."""

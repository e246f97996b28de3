"""Functions for whole models: router discovery, monitoring of forward passes, auxiliary losses, balancing, forced
routing."""

"""Functions that act on whole models: router discovery, monitoring of forward passes, auxiliary losses, balancing and
forced routing."""

"""From a checkpoint or a module to a bundle: trace, graph passes, weights, closed-loop parity."""

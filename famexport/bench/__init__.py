"""Latency and memory of each block, beside what the hardware allows. Imports neither torch nor the exporter."""

"""Latency and memory of each block, beside what the hardware allows. Needs neither torch nor the exporter."""

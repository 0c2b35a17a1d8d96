"""Workloads of `benchmark_peers.py`, and how this project and other programs fit them."""

"""A training run: configuration, worker, data, checkpoints, stop signals, watchdog, trackers.

May import cli and cluster.
"""

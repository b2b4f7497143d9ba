"""A training run: configuration, owner, worker, data, checkpoints, stop signals, failures, watchdog, trackers.

May import cli and cluster.
"""

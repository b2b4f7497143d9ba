"""Reaching Ray: connection, parallel tasks, nodes. May import cli."""

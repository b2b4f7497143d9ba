"""Checks before a run, and the GPU's stream against the CPU's. May import all the other folders."""

"""Batches for training: the plan, the processes that read, the DALI graph, the loader. May import all of pipeline."""

"""A run's report: figures, predictions, the page. May import training, cluster, cli."""

"""Images in, batches out; this package knows nothing of networks."""

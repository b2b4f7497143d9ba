"""Images in, batches out: the rooms in the order of the data's way, each of which imports only those before it.

storage, sources, images, dataset, sharding, staging, loading. Nothing here knows of networks, nor of Ray.
"""

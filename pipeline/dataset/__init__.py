"""What a shard set is: dataset.json, annotations, the sample index, an open shard, verification.

May import storage, sources and images.
"""

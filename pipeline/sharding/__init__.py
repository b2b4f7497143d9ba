"""A set while it is made: one shard's writer, the whole set, its lock, its contact sheet.

May import all but staging and loading.
"""

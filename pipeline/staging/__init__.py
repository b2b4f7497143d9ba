"""A set on a node's own disk, as JPEGs or as a decoded cache. May import all but loading."""

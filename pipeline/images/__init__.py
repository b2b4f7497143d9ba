"""One image: decode, resize, encode, RGB moments and PCA, isolation of crashes. May import storage and sources."""

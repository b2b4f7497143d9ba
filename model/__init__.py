"""AlexNet and its training recipe; this package knows nothing of files or images."""

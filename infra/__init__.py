"""Where the pipeline runs: an image, cluster files, and real servers without containers."""

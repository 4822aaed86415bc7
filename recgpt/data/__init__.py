"""From raw interaction logs to packed training batches."""

"""Running batches: lanes and their threads, callers' futures, faults."""

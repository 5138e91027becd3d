"""Looking at structures of tensors, cutting them into rows, and putting batches and results together."""

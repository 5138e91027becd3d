"""A model over the elements of a source."""

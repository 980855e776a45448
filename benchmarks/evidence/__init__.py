"""What relations and neighbour batches bring over an equally tuned base: one command, any data."""

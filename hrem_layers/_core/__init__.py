"""What every room stands on: argument checks, numerics, masked reductions, attention and the transformer layer."""

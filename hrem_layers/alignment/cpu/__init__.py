"""The compiled CPU kernels and what launches them; Numba is imported where they run, and only there."""

"""The fused GPU kernels and what launches them; Triton is imported where they run, and only there."""

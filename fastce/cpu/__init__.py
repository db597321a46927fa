"""Machine code for the CPU."""

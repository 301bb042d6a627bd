"""CUDA sources, compiled at run time; data only."""

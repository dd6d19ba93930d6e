"""The Triton backends, for CUDA devices from compute capability 8.0 on. Loaded by the first such call."""

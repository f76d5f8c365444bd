"""What `fp8` and `fp8_gemm` define, as kernels for NVIDIA Hopper (Pallas with Mosaic GPU)."""

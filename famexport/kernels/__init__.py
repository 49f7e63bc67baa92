"""CUDA kernels of famexport's own, as a library of operators for ONNX Runtime: built on the machine that runs them."""

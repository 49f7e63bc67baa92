"""ONNX graphs -> TensorRT and TensorRT-RTX engines."""

"""The TensorRT backend: TensorRT 10.16, 11 and TensorRT-RTX 1.7, by what their Python interfaces have in common."""

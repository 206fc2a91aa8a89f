"""ONNX graphs: converted once, mended, bound to the checkpoint's weights."""

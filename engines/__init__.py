"""Run: a bundle becomes images. Neither torch nor diffusers is imported for ONNX Runtime."""

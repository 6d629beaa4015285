"""TensorRT and TensorRT-RTX: options, build, proof of precision, inspection, execution."""

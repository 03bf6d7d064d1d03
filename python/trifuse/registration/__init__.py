"""What torch knows of each op: schemas, fake kernels, autograd, and each backend's refusals."""

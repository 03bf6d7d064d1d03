// The CUDA file of this name, compiled for the emulator.
#include "../cuda/causal_conv1d_bfloat16.cu"

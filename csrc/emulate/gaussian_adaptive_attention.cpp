// The CUDA file of this name, compiled for the emulator.
#include "../cuda/gaussian_adaptive_attention.cu"

// The CUDA file of this name, compiled for the emulator.
#include "../cuda/linear_scan.cu"

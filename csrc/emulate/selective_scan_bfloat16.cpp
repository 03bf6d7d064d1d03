// The CUDA file of this name, compiled for the emulator.
#include "../cuda/selective_scan_bfloat16.cu"

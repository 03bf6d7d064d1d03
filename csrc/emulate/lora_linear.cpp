// The CUDA file of this name, compiled for the emulator.
#include "../cuda/lora_linear.cu"

// The CUDA file of this name, compiled for the emulator.
#include "../cuda/selective_state_update.cu"

// The kernels on matrix tiles, on any processor: slow, chosen by nobody but tests.
#include "kernels.h"

#define TANDEM_NAMESPACE amx_emulated
#define TANDEM_KERNELS kEmulatedAmxKernels
#define TANDEM_NAME "C++ (AMX bf16, emulated)"
#define VW 4
#define TANDEM_MAX_ROWS 1
#define TANDEM_TILES 2

#include "kernels.inl"

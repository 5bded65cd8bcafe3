// Kernels for any processor.
#include "kernels.h"

#define TANDEM_NAMESPACE generic
#define TANDEM_KERNELS kGenericKernels
#define TANDEM_NAME "C++ (baseline)"
#define VW 4
#define TANDEM_MAX_ROWS 1

#include "kernels.inl"

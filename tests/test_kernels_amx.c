/* test_kernels_amx.c - the AMX row on any x86-64 with AVX-512 */
#include "amx.h"
#define TEST_SUITE "kernels_amx"
#define TEST_ROW   "amx"
#include "test_kernels.c"

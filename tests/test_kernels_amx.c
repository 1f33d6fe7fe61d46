/* test_kernels_amx.c - the rows amx and avx512bf16 on any x86-64 with AVX-512 */
#include "amx.h"
#define TEST_SUITE "kernels_amx"
#define TEST_ROW   "amx avx512bf16"
#include "test_kernels.c"

/* test_golden_amx.c - the AMX row on any x86-64 with AVX-512: models against the committed numbers */
#define _GNU_SOURCE                         /* before the first include: mkdtemp */
#include "amx.h"
#define TEST_SUITE "golden_amx"
#define TEST_ROW   "amx"
#include "test_golden.c"

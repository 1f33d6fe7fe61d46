/* test.h - what every test file shares: counting, skips, files, temporary places
 *
 * A test is a function; TEST(name) runs it. CHECK counts and goes on; a NaN on either side of a
 * comparison fails it, so write `CHECK(gap < 1e-6)`, never `CHECK(!(gap > 1e-6))`.
 * The last line is `suite NAME: N passed, N failed, N skipped`; the exit status is the verdict.
 * N counts TESTs, not CHECKs. */
#ifndef MFT_TEST_H
#define MFT_TEST_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TEST__UNUSED __attribute__((unused))       /* not every test file uses every helper */

static int test__passed, test__failed, test__skipped, test__bad, test__skip;

#define CHECK(cond) \
    do { if (!(cond)) { test__bad++; printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #cond); } } while (0)
/* The same with a printf-style remark on what was seen. */
#define CHECK_MSG(cond, ...) \
    do { if (!(cond)) { test__bad++; printf("%s:%d: failed: %s: ", __FILE__, __LINE__, #cond); printf(__VA_ARGS__); printf("\n"); } } while (0)
/* Leaves a test early because something it needs is not there. */
#define SKIP(...) \
    do { test__skip = 1; printf("skip: "); printf(__VA_ARGS__); printf("\n"); return; } while (0)

#define TEST(name) test__run(#name, name)
static void test__run(const char *name, void (*fn)(void))
{
    test__bad = test__skip = 0;
    fn();
    if (test__bad)       { test__failed++; printf("FAIL %s\n", name); }
    else if (test__skip)   test__skipped++;
    else                   test__passed++;
    fflush(stdout);
}

TEST__UNUSED static int test_report(const char *suite)
{
    printf("suite %s: %d passed, %d failed, %d skipped\n", suite, test__passed, test__failed, test__skipped);
    return test__failed != 0;
}

/* Where the large test data lies: $MFT_TEST_DATA, else ../shared. Joins a relative path; one of a
 * few rotating buffers. */
TEST__UNUSED static const char *test_data(const char *relative)
{
    static char buffers[8][1024];
    static int  next;
    const char *root = getenv("MFT_TEST_DATA");
    char       *b = buffers[next++ % 8];
    snprintf(b, sizeof buffers[0], "%s/%s", root && *root ? root : "../shared", relative);
    return b;
}

TEST__UNUSED static int test_file_exists(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    return f != NULL;
}

/* A whole file, NUL-terminated, from malloc; NULL if it cannot be read. */
TEST__UNUSED static char *test_read_file(const char *path, size_t *bytes)
{
    FILE  *f = fopen(path, "rb");
    char  *p = NULL;
    long   n;
    if (!f) return NULL;
    if (fseek(f, 0, SEEK_END) == 0 && (n = ftell(f)) >= 0 && fseek(f, 0, SEEK_SET) == 0) {
        p = (char *)malloc((size_t)n + 1);
        if (p && fread(p, 1, (size_t)n, f) != (size_t)n) { free(p); p = NULL; }
        if (p) { p[n] = '\0'; if (bytes) *bytes = (size_t)n; }
    }
    fclose(f);
    return p;
}

/* Are both there, with the same bytes? */
TEST__UNUSED static int same_file(const char *a, const char *b)
{
    size_t na = 0, nb = 0;
    char  *x = test_read_file(a, &na), *y = test_read_file(b, &nb);
    int    same = x && y && na == nb && memcmp(x, y, na) == 0;
    free(x); free(y);
    return same;
}

/* A small generator for inputs: uniform in [-1, 1). */
TEST__UNUSED static float test_random(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)((double)(*state >> 8) / 8388608.0 - 1.0);
}

#endif

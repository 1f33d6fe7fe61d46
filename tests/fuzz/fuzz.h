/* fuzz.h - what every fuzzer shares: a main that needs no fuzzing engine
 *
 * A fuzzer defines LLVMFuzzerTestOneInput(data, bytes) and FUZZ_NAME, and checks a property with
 * FUZZ_CHECK; the sanitizers it is built with check the rest. Its main first plays the committed
 * corpus (tests/fuzz/corpus/NAME, or the directories and files given), then changes those inputs at
 * random for $FUZZ_SECONDS [0]. An input that fails is written to fuzz-NAME.crash; playing that file
 * shows it again. The seed is fixed ($FUZZ_SEED chooses another), so that a run can be repeated.
 *
 * With clang's engine, which follows coverage:
 *     clang -g -O1 -DFUZZ_ENGINE -fsanitize=fuzzer,address,undefined -I. -Itests tests/fuzz/fuzz_json.c -o fuzz_json -lm -lpthread
 *     ./fuzz_json tests/fuzz/corpus/json */
#ifndef MFT_FUZZ_H
#define MFT_FUZZ_H

#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

#define FUZZ_CHECK(cond) \
    do { if (!(cond)) { fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #cond); fflush(stderr); abort(); } } while (0)

#ifndef FUZZ_ENGINE

typedef struct fuzz_input { uint8_t *data; size_t bytes; } fuzz_input;
static fuzz_input fuzz_inputs[4096];
static int        fuzz_n;
static uint64_t   fuzz_state = 1;

/* A fresh block of exactly that size, so that reading past the end is seen. */
static void fuzz_play(const uint8_t *data, size_t bytes)
{
    static const char *path = "fuzz-" FUZZ_NAME ".crash";
    uint8_t *copy = (uint8_t *)malloc(bytes ? bytes : 1);
    FILE    *f = fopen(path, "wb");                      /* kept only if we do not come back */
    if (!copy) exit(1);
    memcpy(copy, data, bytes);
    if (f) { fwrite(data, 1, bytes, f); fclose(f); }
    LLVMFuzzerTestOneInput(copy, bytes);
    free(copy);
    remove(path);
}

static void fuzz_load(const char *path)
{
    struct stat st;
    FILE       *f;
    if (stat(path, &st) != 0) { fprintf(stderr, "%s: not there\n", path); exit(1); }
    if (S_ISDIR(st.st_mode)) {
        DIR           *d = opendir(path);
        struct dirent *e;
        while (d && (e = readdir(d)) != NULL) {
            char inside[1024];
            if (e->d_name[0] == '.') continue;
            snprintf(inside, sizeof inside, "%s/%s", path, e->d_name);
            fuzz_load(inside);
        }
        if (d) closedir(d);
        return;
    }
    f = fopen(path, "rb");
    if (!f || fuzz_n == (int)(sizeof fuzz_inputs / sizeof fuzz_inputs[0])) { fprintf(stderr, "%s: cannot be read\n", path); exit(1); }
    fuzz_inputs[fuzz_n].bytes = (size_t)st.st_size;
    fuzz_inputs[fuzz_n].data  = (uint8_t *)malloc((size_t)st.st_size + 1);
    if (fread(fuzz_inputs[fuzz_n].data, 1, (size_t)st.st_size, f) != (size_t)st.st_size) exit(1);
    fclose(f);
    fuzz_n++;
}

static size_t fuzz_random(size_t below)                  /* xorshift64* */
{
    fuzz_state ^= fuzz_state >> 12; fuzz_state ^= fuzz_state << 25; fuzz_state ^= fuzz_state >> 27;
    return below ? (size_t)((fuzz_state * 2685821657736338717u) >> 33) % below : 0;
}

/* One to six changes: a bit, a byte, a number's digit, a piece cut, doubled, or taken from another input. */
static size_t fuzz_mutate(uint8_t *p, size_t n, size_t cap)
{
    static const uint8_t likely[] = { 0, 1, 0x7f, 0x80, 0xff, '"', '\\', '[', ']', '{', '}', ',', ':', '0', '9', '-', '.', 'e', 'u', '\n', ' ', 0xc0, 0xed, 0xf4 };
    size_t changes = 1 + fuzz_random(6), at, len, k;
    while (changes--) {
        const fuzz_input *other = &fuzz_inputs[fuzz_random((size_t)fuzz_n)];
        at = fuzz_random(n + 1);
        switch (fuzz_random(7)) {
        case 0: if (at < n) p[at] ^= (uint8_t)(1u << fuzz_random(8)); break;
        case 1: if (at < n) p[at] = likely[fuzz_random(sizeof likely)]; break;
        case 2: if (at < n) p[at] = (uint8_t)fuzz_random(256); break;
        case 3:
            for (k = 0; k < n && !(p[(at + k) % n] >= '0' && p[(at + k) % n] <= '9'); k++) ;
            if (k < n) p[(at + k) % n] = (uint8_t)('0' + fuzz_random(10));
            break;
        case 4:
            len = fuzz_random(n - at < 40 ? n - at + 1 : 40);
            memmove(p + at, p + at + len, n - at - len);
            n -= len;
            break;
        case 5:
            len = fuzz_random(n - at < 40 ? n - at + 1 : 40);
            if (n + len > cap) break;
            memmove(p + at + len, p + at, n - at);
            n += len;
            break;
        default:
            k   = fuzz_random(other->bytes + 1);
            len = fuzz_random(other->bytes - k < 60 ? other->bytes - k + 1 : 60);
            if (n + len > cap) break;
            memmove(p + at + len, p + at, n - at);
            memcpy(p + at, other->data + k, len);
            n += len;
            break;
        }
    }
    return n;
}

int main(int argc, char **argv)
{
    static uint8_t buffer[1 << 16];
    const char    *seconds = getenv("FUZZ_SECONDS"), *seed = getenv("FUZZ_SEED");
    time_t         end = time(NULL) + (seconds ? atoi(seconds) : 0);
    long           tried = 0;
    int            i;
    if (seed) fuzz_state = strtoull(seed, NULL, 10) * 2 + 1;
    for (i = 1; i < argc; i++) fuzz_load(argv[i]);
    if (argc < 2) fuzz_load("tests/fuzz/corpus/" FUZZ_NAME);
    for (i = 0; i < fuzz_n; i++) fuzz_play(fuzz_inputs[i].data, fuzz_inputs[i].bytes);
    while (fuzz_n && time(NULL) < end) {
        const fuzz_input *from = &fuzz_inputs[fuzz_random((size_t)fuzz_n)];
        size_t            n = from->bytes < sizeof buffer ? from->bytes : sizeof buffer;
        memcpy(buffer, from->data, n);
        n = fuzz_mutate(buffer, n, sizeof buffer);
        fuzz_play(buffer, n);
        tried++;
    }
    printf("%s: %d inputs of the corpus, %ld new ones\n", FUZZ_NAME, fuzz_n, tried);
    printf("suite fuzz_%s: %d passed, 0 failed, 0 skipped\n", FUZZ_NAME, fuzz_n);
    for (i = 0; i < fuzz_n; i++) free(fuzz_inputs[i].data);
    return fuzz_n == 0;
}

#endif
#endif

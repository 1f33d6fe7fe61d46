/* test_safetensors.c - [FILE] [HEADER] [READ] [SNAPSHOT] [WRITE] against files of the reference package
 * (tests/golden/safetensors, made by make.py there), against files broken by hand, and with every
 * allocation and every system call failing in turn. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE                         /* fork, kill, setrlimit; the headers alone need no such thing */
#endif
#define MFT_IMPLEMENTATION
#include "../mft.h"
#include "../mft_safetensors.h"
#include "test.h"

#include <dirent.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

/* ---- system calls that fail ----
 * These stand in for libc's in this program: call number fault_at fails with fault_errno; every long
 * write is cut short, which is no failure. Each goes on to a sibling of the call it replaces. The
 * thread sanitizer wants to be the one who does that. */
#if defined(__SANITIZE_THREAD__)
#  define NO_FAULTS
#elif defined(__has_feature)
#  if __has_feature(thread_sanitizer)
#    define NO_FAULTS
#  endif
#endif

static int fault_at, fault_calls, fault_errno;
static char fault_order[64];                /* w: write, s: sync, r: rename, in the order they came, repeats left out */
#ifndef NO_FAULTS
static int fault(void)
{
    if (++fault_calls != fault_at) return 0;
    errno = fault_errno;
    return 1;
}
static void note(char what)
{
    size_t n = strlen(fault_order);
    if (n + 1 < sizeof fault_order && (!n || fault_order[n - 1] != what)) { fault_order[n] = what; fault_order[n + 1] = '\0'; }
}
int open(const char *path, int flags, ...)
{
    va_list args;
    int     mode = 0;
    va_start(args, flags);
    if (flags & O_CREAT) mode = va_arg(args, int);
    va_end(args);
    return fault() ? -1 : openat(AT_FDCWD, path, flags, mode);
}
ssize_t read(int fd, void *p, size_t n)        { struct iovec v; v.iov_base = p; v.iov_len = n; return fault() ? -1 : readv(fd, &v, 1); }
ssize_t write(int fd, const void *p, size_t n)
{
    struct iovec v;
    v.iov_base = (void *)(uintptr_t)p; v.iov_len = n > 1000 ? n / 2 : n;
    note('w');
    return fault() ? -1 : writev(fd, &v, 1);
}
int fsync(int fd)                                                       { note('s'); return fault() ? -1 : fdatasync(fd); }
int close(int fd)                                                       { int bad = fault(), r = (int)syscall(SYS_close, fd); return bad ? -1 : r; }
int rename(const char *a, const char *b)                                { note('r'); return fault() ? -1 : renameat(AT_FDCWD, a, AT_FDCWD, b); }
int mkdir(const char *path, mode_t mode)                                { return fault() ? -1 : mkdirat(AT_FDCWD, path, mode); }
void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t o)    { return fault() ? MAP_FAILED : mmap64(at, n, prot, flags, fd, o); }
#endif

/* ---- places and files ---- */
#define GOLDEN "tests/golden/safetensors/"

static mft_context *ctx;
static char         room[256];              /* a directory of our own, emptied and removed at the end */

static const char *in_room(const char *name)
{
    static char paths[8][512];
    static int  next;
    char       *p = paths[next++ % 8];
    snprintf(p, sizeof paths[0], "%s/%s", room, name);
    return p;
}

static void put_file(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes) { printf("cannot write %s\n", path); exit(1); }
    fclose(f);
}

static void copy_file(const char *from, const char *to)
{
    size_t bytes = 0;
    char  *p = test_read_file(from, &bytes);
    if (!p) { printf("cannot read %s\n", from); exit(1); }
    put_file(to, p, bytes);
    free(p);
}

/* Removes what is in a directory, one level of directories deep; counts names that hold `part`. */
static int sweep(const char *dir, const char *part, int erase)
{
    DIR           *d = opendir(dir);
    struct dirent *e;
    int            n = 0;
    if (!d) return 0;
    while ((e = readdir(d))) {
        char path[1024];
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        n += strstr(e->d_name, part) != NULL;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (erase && unlink(path) != 0) { sweep(path, "", 1); rmdir(path); }
    }
    closedir(d);
    return n;
}

/* A file of a header's text and that many bytes of data (0, 1, 2, ..). */
static const char *hand_made(const char *name, const char *header, size_t data)
{
    const char *path = in_room(name);
    size_t      n = strlen(header), i;
    char       *p = (char *)malloc(8 + n + data);
    for (i = 0; i < 8; i++) p[i] = (char)(n >> 8 * i);
    memcpy(p + 8, header, n);
    for (i = 0; i < data; i++) p[8 + n + i] = (char)i;
    put_file(path, p, 8 + n + data);
    free(p);
    return path;
}

static mft_status open_status(const char *path)
{
    mft_safetensors *st = NULL;
    mft_status       s = mft_safetensors_open(ctx, path, &st);
    CHECK((s == MFT_OK) == (st != NULL));
    mft_safetensors_close(st);
    return s;
}

static void refused(const char *path, mft_status status, const char *part)
{
    mft_status s = open_status(path);
    CHECK_MSG(s == status && strstr(mft_error_message(ctx), part), "%s: status %d, message: %s (wanted: %s)", path, (int)s, mft_error_message(ctx), part);
}

/* ---- the reference's files ---- */
static float value(int i) { return (float)(i * 37 % 101 - 50) / 8; }     /* as in make.py */

static void test_opening(void)              /* the program at the header's top */
{
    const char *model = GOLDEN "sharded";
    mft_safetensors *st;
    size_t           i, n;
    const mft_safetensors_entry *e;
    if (mft_safetensors_open(ctx, model, &st) != MFT_OK) puts(mft_error_message(ctx));
    e = mft_safetensors_entries(st, &n);
    for (i = 0; i < n; i++) CHECK(strncmp(e[i].name, "layers.", 7) == 0 && strcmp(e[i].dtype_name, "F32") == 0);
    mft_safetensors_close(st);
    CHECK(n == 7);
}

static void test_dtypes(void)
{
    static const struct { const char *name, *file; mft_dtype dtype; int problem; uint64_t bytes; } want[] = {
        { "f64", "F64", MFT_U8, 1, 24 }, { "f32", "F32", MFT_F32, 0, 12 }, { "f16", "F16", MFT_F16, 0, 6 }, { "bf16", "BF16", MFT_BF16, 0, 6 },
        { "i64", "I64", MFT_I64, 0, 24 }, { "i32", "I32", MFT_I32, 0, 12 }, { "i16", "I16", MFT_U8, 1, 6 }, { "i8", "I8", MFT_U8, 1, 3 },
        { "u8", "U8", MFT_U8, 0, 3 }, { "bool", "BOOL", MFT_U8, 0, 3 }, { "empty", "F32", MFT_F32, 1, 0 }, { "five", "F32", MFT_U8, 1, 16 },
        { "f8", "F8_E4M3", MFT_U8, 1, 3 }
    };
    mft_safetensors *st;
    mft_tensor      *t;
    int64_t          three = 3;
    size_t           i, n;
    CHECK_MSG(mft_safetensors_open(ctx, GOLDEN "dtypes.safetensors", &st) == MFT_OK, "%s", mft_error_message(ctx));
    mft_safetensors_entries(st, &n);
    CHECK(n == sizeof want / sizeof want[0]);
    for (i = 0; i < n; i++) {
        const mft_safetensors_entry *e = mft_safetensors_find(st, want[i].name);
        CHECK(e && strcmp(e->dtype_name, want[i].file) == 0 && e->dtype == want[i].dtype && !e->problem == !want[i].problem && e->bytes == want[i].bytes);
        CHECK(e->shard == 0 && (strcmp(e->name, "empty") == 0 ? e->ndim == 2 : e->ndim == 1));
        t = mft_tensor_create(ctx, MFT_STEP, MFT_F32, 1, &three);
        if (e->problem) {
            CHECK(mft_safetensors_read(st, e, t) == MFT_ERR_UNSUPPORTED && mft_safetensors_map(st, e) == NULL);
            CHECK(strstr(mft_error_message(ctx), "dtypes.safetensors: tensor '") && strstr(mft_error_message(ctx), e->dtype_name));
        } else if (e->dtype == MFT_F32 || e->dtype == MFT_F16 || e->dtype == MFT_BF16) {
            CHECK(mft_safetensors_read(st, e, t) == MFT_OK);        /* eighths of small integers are exact in all three */
            CHECK(((float *)t->data)[0] == value(0) && ((float *)t->data)[2] == value(2));
        } else CHECK(mft_safetensors_read(st, e, t) == MFT_ERR_UNSUPPORTED && strstr(mft_error_message(ctx), "does not convert to F32"));
    }
    CHECK(memcmp(mft_safetensors_map(st, mft_safetensors_find(st, "bool")), "\1\0\1", 3) == 0);
    CHECK(mft_safetensors_find(st, "f3") == NULL && mft_safetensors_find(st, "") == NULL && mft_safetensors_find(NULL, "f32") == NULL);
    CHECK(mft_safetensors_metadata(st, "format") == NULL && mft_safetensors_metadata_at(st, 0, NULL) == NULL);
    mft_safetensors_close(st);
    mft_step_reset(ctx);
}

/* The tensors of make.py's saved.safetensors, in another order; one of them a transposed view. */
enum { NAMED = 9 };
static void named_tensors(mft_tensor **t)
{
    static const struct { const char *name; mft_dtype dtype; int ndim; int64_t shape[3]; int first; } spec[NAMED] = {
        { "mask", MFT_U8, 1, { 7, 0, 0 }, 0 }, { "scalar", MFT_F32, 0, { 0, 0, 0 }, 0 }, { "b.weight", MFT_F32, 2, { 5, 3, 0 }, 0 },
        { "half", MFT_F16, 1, { 5, 0, 0 }, 9 }, { "ids", MFT_I64, 1, { 3, 0, 0 }, 0 }, { "a.weight", MFT_F32, 3, { 2, 3, 7 }, 5 },
        { "na\303\257ve \"q\" \\ \n\t\001 \360\237\231\202", MFT_F32, 1, { 1, 0, 0 }, 3 }, { "brain", MFT_BF16, 2, { 4, 3, 0 }, 11 },
        { "small ids", MFT_I32, 2, { 2, 2, 0 }, 0 }
    };
    static const int64_t ids[3]   = { 3, -100, (int64_t)1 << 40 };
    static const int32_t small[4] = { 1, -2, 3, INT32_MAX };
    static const uint8_t mask[7]  = { 0, 1, 2, 253, 254, 255, 7 };
    int k, i;
    for (k = 0; k < NAMED; k++) {
        t[k] = mft_tensor_create(ctx, MFT_STEP, spec[k].dtype, spec[k].ndim, spec[k].shape);
        for (i = 0; i < (int)mft_tensor_numel(t[k]); i++) {
            float v = value(spec[k].first + i);
            if (spec[k].dtype == MFT_F32)  ((float *)t[k]->data)[i] = v;
            if (spec[k].dtype == MFT_BF16) ((uint16_t *)t[k]->data)[i] = mft__float_to_bf16(v);
            if (spec[k].dtype == MFT_F16)  ((uint16_t *)t[k]->data)[i] = mft__float_to_f16(v);
            if (spec[k].dtype == MFT_I64)  ((int64_t *)t[k]->data)[i] = ids[i];
            if (spec[k].dtype == MFT_I32)  ((int32_t *)t[k]->data)[i] = small[i];
            if (spec[k].dtype == MFT_U8)   ((uint8_t *)t[k]->data)[i] = mask[i];
        }
        t[k]->name = spec[k].name;
    }
    *(float *)t[1]->data = 2.5f;
    for (i = 0; i < 15; i++) ((float *)t[2]->data)[i % 5 * 3 + i / 5] = value(i);     /* stored as [5, 3], to be seen as [3, 5] */
    t[2]->shape[0] = 3; t[2]->shape[1] = 5; t[2]->stride[0] = 1; t[2]->stride[1] = 3;
}

static void test_saved_bytes(void)
{
    mft_tensor *t[NAMED];
    named_tensors(t);
    CHECK_MSG(mft_safetensors_save(ctx, in_room("saved.safetensors"), t, NAMED, NULL) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(same_file(in_room("saved.safetensors"), GOLDEN "saved.safetensors"));
    CHECK(sweep(room, ".tmp-", 0) == 0);
    mft_step_reset(ctx);
}

static void test_round_trip(void)
{
    static const char *const metadata[] = { "note", "line\nbreak \"\303\251\"", "empty", "", NULL };
    mft_tensor      *t[NAMED], *copy;
    mft_safetensors *st;
    const char      *key;
    size_t           n;
    int              k, i;
    named_tensors(t);
    CHECK(mft_safetensors_save(ctx, in_room("round.safetensors"), t, NAMED, metadata) == MFT_OK);
    CHECK_MSG(mft_safetensors_open(ctx, in_room("round.safetensors"), &st) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(strcmp(mft_safetensors_metadata(st, "note"), metadata[1]) == 0 && strcmp(mft_safetensors_metadata(st, "empty"), "") == 0);
    CHECK(mft_safetensors_metadata(st, "format") == NULL && mft_safetensors_metadata_at(st, 1, &key) != NULL && strcmp(key, "empty") == 0);
    CHECK(mft_safetensors_metadata_at(st, 2, &key) == NULL && key == NULL);
    CHECK(strcmp(mft_safetensors_shard_path(st, 0), in_room("round.safetensors")) == 0 && mft_safetensors_shard_path(st, 1) == NULL);
    mft_safetensors_entries(st, &n);
    CHECK(n == NAMED);
    for (k = 0; k < NAMED; k++) {
        const mft_safetensors_entry *e = mft_safetensors_find(st, t[k]->name);
        CHECK(e && e->dtype == t[k]->dtype && e->ndim == t[k]->ndim && !e->problem);
        CHECK((uintptr_t)mft_safetensors_map(st, e) % mft_dtype_bytes(e->dtype, 1) == 0);      /* new files are aligned */
        copy = mft_tensor_create(ctx, MFT_STEP, t[k]->dtype, t[k]->ndim, t[k]->shape);
        if (k == 2) { copy->stride[0] = 1; copy->stride[1] = 3; }                              /* into a strided tensor too */
        CHECK_MSG(mft_safetensors_read(st, e, copy) == MFT_OK, "%s", mft_error_message(ctx));
        CHECK(memcmp(copy->data, t[k]->data, mft_dtype_bytes(t[k]->dtype, mft_tensor_numel(t[k]))) == 0);
    }
    for (i = 0; i < 15; i++) CHECK(((const float *)mft_safetensors_map(st, mft_safetensors_find(st, "b.weight")))[i] == value(i));
    CHECK(mft_safetensors_save(ctx, in_room("none.safetensors"), NULL, 0, metadata + 4) == MFT_OK && open_status(in_room("none.safetensors")) == MFT_OK);
    mft_safetensors_close(st);
    mft_step_reset(ctx);
}

/* Every pair of float dtypes over sizes around the piece of 1024, strided and not: bf16 and f16 of a double
 * are what the nearest-even rounding of the bits gives; here values are exact in all three. */
static void test_conversions(void)
{
    static const mft_dtype floats[3] = { MFT_F32, MFT_F16, MFT_BF16 };
    static const int64_t   sizes[][2] = { { 1, 1 }, { 3, 5 }, { 1, 1023 }, { 2, 1024 }, { 1, 1025 }, { 1031, 3 } };
    int from, to, k, strided;
    for (k = 0; k < 6; k++) for (from = 0; from < 3; from++) for (to = 0; to < 3; to++) for (strided = 0; strided < 2; strided++) {
        mft_tensor      *src = mft_tensor_create(ctx, MFT_STEP, floats[from], 2, sizes[k]), *dst = mft_tensor_create(ctx, MFT_STEP, floats[to], 2, sizes[k]);
        int64_t          i, n = mft_tensor_numel(src), rows = sizes[k][0], cols = sizes[k][1], bad = 0;
        mft_safetensors *st = NULL;
        src->name = "x";
        for (i = 0; i < n; i++) { float v = value((int)i); mft__from_float((char *)src->data + mft_dtype_bytes(src->dtype, i), src->dtype, &v, 1); }
        if (strided) { dst->stride[0] = 1; dst->stride[1] = rows; }
        CHECK(mft_safetensors_save(ctx, in_room("x.safetensors"), &src, 1, NULL) == MFT_OK && mft_safetensors_open(ctx, in_room("x.safetensors"), &st) == MFT_OK);
        CHECK_MSG(mft_safetensors_read(st, mft_safetensors_entries(st, NULL), dst) == MFT_OK, "%s", mft_error_message(ctx));
        for (i = 0; i < n; i++) {
            float v;
            mft__to_float(&v, (char *)dst->data + mft_dtype_bytes(dst->dtype, i / cols * dst->stride[0] + i % cols * dst->stride[1]), dst->dtype, 1);
            bad += !(v == value((int)i));
        }
        CHECK_MSG(bad == 0, "%s to %s, %d x %d, strided %d: %d wrong", mft_dtype_name(floats[from]), mft_dtype_name(floats[to]), (int)rows, (int)cols, strided, (int)bad);
        mft_safetensors_close(st);
        mft_step_reset(ctx);
    }
}

static void test_integers(void)
{
    int64_t          n = 3, wide[3] = { -5, INT32_MAX, INT32_MIN }, other = 4;
    mft_tensor      *src = mft_tensor_create(ctx, MFT_STEP, MFT_I64, 1, &n), *dst = mft_tensor_create(ctx, MFT_STEP, MFT_I32, 1, &n), *back, *wrong;
    mft_safetensors *st = NULL;
    const mft_safetensors_entry *e;
    memcpy(src->data, wide, sizeof wide);
    src->name = "ids";
    CHECK(mft_safetensors_save(ctx, in_room("i.safetensors"), &src, 1, NULL) == MFT_OK && mft_safetensors_open(ctx, in_room("i.safetensors"), &st) == MFT_OK);
    e = mft_safetensors_find(st, "ids");
    CHECK(mft_safetensors_read(st, e, dst) == MFT_OK && ((int32_t *)dst->data)[0] == -5 && ((int32_t *)dst->data)[2] == INT32_MIN);
    wrong = mft_tensor_create(ctx, MFT_STEP, MFT_I32, 1, &other);
    CHECK(mft_safetensors_read(st, e, wrong) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "tensor 'ids': has shape [3], wanted is [4]"));
    CHECK(mft_safetensors_read(st, e + 1, dst) == MFT_ERR_INVALID_ARGUMENT && mft_safetensors_read(st, NULL, dst) == MFT_ERR_INVALID_ARGUMENT);
    mft_safetensors_close(st);

    dst->name = "ids";
    CHECK(mft_safetensors_save(ctx, in_room("i.safetensors"), &dst, 1, NULL) == MFT_OK && mft_safetensors_open(ctx, in_room("i.safetensors"), &st) == MFT_OK);
    back = mft_tensor_create(ctx, MFT_STEP, MFT_I64, 1, &n);
    CHECK(mft_safetensors_read(st, mft_safetensors_find(st, "ids"), back) == MFT_OK && memcmp(back->data, wide, sizeof wide) == 0);
    mft_safetensors_close(st);

    ((int64_t *)src->data)[1] = (int64_t)INT32_MAX + 1;
    CHECK(mft_safetensors_save(ctx, in_room("i.safetensors"), &src, 1, NULL) == MFT_OK && mft_safetensors_open(ctx, in_room("i.safetensors"), &st) == MFT_OK);
    CHECK(mft_safetensors_read(st, mft_safetensors_find(st, "ids"), dst) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "element 1 is 2147483648"));
    mft_safetensors_close(st);
    mft_step_reset(ctx);
}

/* Old files have unpadded headers: the numbers lie anywhere. */
static void test_unaligned(void)
{
    static const char *const pad[] = { "", " ", "  ", "   ", "    ", "     ", "      ", "       " };
    int     k, i, j;
    int64_t n = 3;
    for (k = 0; k < 8; k++) {
        char             header[128];
        mft_safetensors *st;
        const mft_safetensors_entry *e;
        static const char *const names[2] = { "w", "h" };
        snprintf(header, sizeof header, "{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},");
        snprintf(header + strlen(header), sizeof header - strlen(header), "\"w\":{\"dtype\":\"F32\",\"shape\":[3],");
        {
            char whole[256];
            snprintf(whole, sizeof whole, "%s\"data_offsets\":[1,13]},\"h\":{\"data_offsets\":[13,19],\"dtype\":\"BF16\",\"shape\":[3]}}%s", header, pad[k]);
            CHECK_MSG(mft_safetensors_open(ctx, hand_made("odd.safetensors", whole, 19), &st) == MFT_OK, "%s", mft_error_message(ctx));
        }
        for (i = 0; i < 2; i++) {
            mft_tensor *t = mft_tensor_create(ctx, MFT_STEP, MFT_F32, 1, &n);
            e = mft_safetensors_find(st, names[i]);
            CHECK(e && mft_safetensors_read(st, e, t) == MFT_OK && memcmp(mft_safetensors_map(st, e), i ? "\15\16\17\20\21\22" : "\1\2\3\4\5\6", 6) == 0);
            for (j = 0; j < 3; j++) {
                uint32_t bits = i ? (uint32_t)(13 + 2 * j) << 16 | (uint32_t)(14 + 2 * j) << 24
                                  : (uint32_t)(4 * j + 1) | (uint32_t)(4 * j + 2) << 8 | (uint32_t)(4 * j + 3) << 16 | (uint32_t)(4 * j + 4) << 24;
                CHECK(memcmp((float *)t->data + j, &bits, 4) == 0);
            }
        }
        mft_safetensors_close(st);
        mft_step_reset(ctx);
    }
}

/* ---- files that are wrong ---- */
static void test_bad_files(void)
{
    const char *path = in_room("bad.safetensors");
    char       *big = (char *)malloc(300000);
    size_t      n = 0, i;
    mft_safetensors *st = NULL;
    char       *whole = test_read_file(GOLDEN "saved.safetensors", &n);

    refused(in_room("nothing.safetensors"), MFT_ERR_IO, "nothing.safetensors: cannot be read: No such file");
    put_file(path, "", 0);
    refused(path, MFT_ERR_FORMAT, "bad.safetensors: has 0 bytes, too few");
    put_file(path, "1234567", 7);
    refused(path, MFT_ERR_FORMAT, "has 7 bytes, too few");
    put_file(path, "\0\0\0\0\0\0\0\x10{}", 10);
    refused(path, MFT_ERR_FORMAT, "its header would have 1152921504606846976 bytes, at most 100000000");
    put_file(path, "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    refused(path, MFT_ERR_FORMAT, "its header would have 18446744073709551615 bytes");
    put_file(path, "\x01\xe1\xf5\x05\0\0\0\0{}", 10);
    refused(path, MFT_ERR_FORMAT, "its header would have 100000001 bytes");
    put_file(path, "\0\xe1\xf5\x05\0\0\0\0{}", 10);
    refused(path, MFT_ERR_FORMAT, "its header should have 100000000 bytes, the file has 10 in all");
    put_file(path, "\3\0\0\0\0\0\0\0{}", 10);
    refused(path, MFT_ERR_FORMAT, "its header should have 3 bytes, the file has 10 in all");
    put_file(path, "\0\0\0\0\0\0\0\0", 8);
    refused(path, MFT_ERR_FORMAT, "expected a value, but the text ends");
    put_file(path, "\2\0\0\0\0\0\0\0{}", 10);
    CHECK(open_status(path) == MFT_OK);
    put_file(path, "\4\0\0\0\0\0\0\0\200\2}q", 12);
    refused(path, MFT_ERR_FORMAT, "bad.safetensors: header: line 1, column 1: expected a value");
    put_file(path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", 62);
    refused(path, MFT_ERR_FORMAT, "Git LFS pointer");
    refused(room, MFT_ERR_IO, "has neither model.safetensors nor model.safetensors.index.json");
    refused("/dev/null", MFT_ERR_IO, "is not a regular file");
    for (i = 0; i < n; i++) {                                            /* cut at every length */
        put_file(path, whole, i);
        CHECK(open_status(path) == MFT_ERR_FORMAT);
        CHECK(strstr(mft_error_message(ctx), "bad.safetensors: ") != NULL);
    }
    put_file(path, whole, n);
    CHECK(open_status(path) == MFT_OK);
    big[0] = '{'; big[1] = '"';
    memset(big + 2, 'n', 200000);
    strcpy(big + 200002, "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}");
    refused(hand_made("long.safetensors", big, 1), MFT_ERR_FORMAT, "a name of 200000 bytes ('nnnn");
    CHECK(strlen(mft_error_message(ctx)) < 600);
    if (getuid() != 0) {
        chmod(path, 0);
        refused(path, MFT_ERR_IO, "bad.safetensors: cannot be read: Permission denied");
        chmod(path, 0600);
    }
    CHECK(mft_safetensors_open(ctx, NULL, &st) == MFT_ERR_INVALID_ARGUMENT && mft_safetensors_open(ctx, "x", NULL) == MFT_ERR_INVALID_ARGUMENT);
    mft_safetensors_close(NULL);
    free(whole); free(big);
}

#define T(dtype, shape, offsets) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
static void test_bad_headers(void)
{
    static const struct { const char *header; size_t data; const char *part; } cases[] = {
        { "[]", 0, "expected '{', found '[]'" }, { "{} {}", 0, "expected the end" }, { "{\"a\":1}", 0, "expected an object with dtype" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "tensor 'a': lacks dtype, shape or a pair" },
        { "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "tensor 'a': lacks" }, { "{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "lacks" },
        { "{\"a\":" T("F32", "[1]", "[0]") "}", 4, "lacks" }, { "{\"a\":" T("F32", "[1]", "[0,4,8]") "}", 4, "lacks" },
        { "{\"a\":" T("F32", "[1]", "[4,0]") "}", 4, "begins at 4, after its end at 0" },
        { "{\"a\":" T("F32", "[2]", "[0,8]") "}", 4, "tensor 'a': ends at byte 8 of the data, but the file has only 4: it is cut off" },
        { "{\"a\":" T("F32", "[2]", "[0,18446744073709551615]") "}", 4, "expected an integer from 0 to 2^63 - 1" },
        { "{\"a\":" T("F32", "[2]", "[0,9223372036854775807]") "}", 4, "ends at byte 9223372036854775807" },
        { "{\"a\":" T("F32", "[2]", "[0,4]") "}", 4, "2 elements of F32 do not make the 4 bytes" },
        { "{\"a\":" T("F4", "[3]", "[0,1]") "}", 1, "3 elements of F4 do not make" },
        { "{\"a\":" T("F32", "[-1]", "[0,4]") "}", 4, "expected an integer from 0" }, { "{\"a\":" T("F32", "[1.0]", "[0,4]") "}", 4, "expected an integer from 0" },
        { "{\"a\":" T("F32", "[\"1\"]", "[0,4]") "}", 4, "expected an integer, found" }, { "{\"a\":" T("F32", "1", "[0,4]") "}", 4, "expected an array of integers" },
        { "{\"a\":" T("F32", "[4294967296,4294967296]", "[0,0]") "}", 0, "the product of its shape overflows" },
        { "{\"a\":" T("U8", "[65536,65536,65536,65536]", "[0,0]") "}", 0, "overflows" },
        { "{\"a\":" T("F32", "[4611686018427387904,4]", "[0,0]") "}", 0, "overflows" },
        { "{\"a\":" T("F32", "[9223372036854775807,9223372036854775807,2]", "[0,4]") "}", 4, "overflows" },
        { "{\"a\":{\"dtype\":1,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "expected a dtype in quotes" },
        { "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "tensor 'a': dtype, shape or data_offsets stands twice" },
        { "{\"a\":" T("F32", "[1]", "[0,4]") ",\"a\":" T("F32", "[1]", "[4,8]") "}", 8, "tensor 'a': is in its header twice" },
        { "{\"a\":" T("F32", "[1]", "[0,4]") ",\"b\":" T("F32", "[1]", "[0,4]") "}", 4, "overlaps tensor '" },
        { "{\"a\":" T("F32", "[2]", "[0,8]") ",\"b\":" T("F32", "[1]", "[4,8]") "}", 8, "tensor 'b': overlaps tensor 'a'" },
        { "{\"a\":" T("F32", "[1]", "[0,4]") ",\"b\":" T("F32", "[1]", "[8,12]") "}", 12, "tensor 'b': 4 bytes before it belong to no tensor" },
        { "{\"a\":" T("F32", "[1]", "[4,8]") "}", 8, "4 bytes before it belong" }, { "{\"a\":" T("F32", "[1]", "[0,4]") "}", 8, "the 4 bytes after its last tensor belong to none" },
        { "{}", 1, "the 1 bytes after its last tensor" },
        { "{\"__metadata__\":1}", 0, "expected an object as __metadata__" }, { "{\"__metadata__\":{\"a\":1}}", 0, "expected text as a value" },
        { "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ stands twice" }, { "{\"a\\u0000b\":" T("U8", "[1]", "[0,1]") "}", 1, "NUL character inside a name" },
        { "{\"\033[2J\":" T("U8", "[1]", "[0,2]") "}", 2, "a control character (0x1b) inside a string" },
        { "{\"\\u001b[2J\":" T("U8", "[1]", "[0,2]") "}", 2, "tensor '?[2J': 1 elements of U8" }
    };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) refused(hand_made("bad.safetensors", cases[i].header, cases[i].data), MFT_ERR_FORMAT, cases[i].part);
    CHECK(open_status(hand_made("ok.safetensors", "{\"b\":" T("F32", "[1]", "[4,8]") ",\"a\":" T("F32", "[1]", "[0,4]") ",\"z\":" T("F32", "[0,9]", "[4,4]") "}", 8)) == MFT_OK);
    CHECK(open_status(hand_made("ok.safetensors", "{\"a\":{\"new\":[{}],\"dtype\":\"NEW\",\"shape\":[3],\"data_offsets\":[0,7]}}   ", 7)) == MFT_OK);
}

/* Entries out of order in the header come out in the order of their bytes; many of them are found. */
static void test_many_entries(void)
{
    enum { N = 1000 };
    char            *header = (char *)malloc(N * 80);
    mft_safetensors *st;
    const mft_safetensors_entry *e;
    size_t           n, at = 1;
    int              i;
    strcpy(header, "{");
    for (i = 0; i < N; i++) {
        int k = i * 387 % N;                                             /* 387 and 1000 share no factor */
        at += (size_t)snprintf(header + at, 80, "%s\"t%d\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[%d,%d]}", i ? "," : "", k, 2 * k, 2 * k + 2);
    }
    strcpy(header + at, "}");
    CHECK_MSG(mft_safetensors_open(ctx, hand_made("many.safetensors", header, 2 * N), &st) == MFT_OK, "%s", mft_error_message(ctx));
    e = mft_safetensors_entries(st, &n);
    CHECK(n == N);
    for (i = 0; i < N; i++) {
        char name[16];
        snprintf(name, sizeof name, "t%d", i);
        CHECK(strcmp(e[i].name, name) == 0 && mft_safetensors_find(st, name) == &e[i] && *(const unsigned char *)mft_safetensors_map(st, &e[i]) == (unsigned char)(2 * i));
    }
    CHECK(!mft_safetensors_find(st, "t1000"));
    mft_safetensors_close(st);
    free(header);
}

/* ---- shards ---- */
static const char *const shard_names[3] = { "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors" };

static void make_snapshot(void)
{
    int i;
    sweep(in_room("snapshot"), "", 1);
    mkdir(in_room("snapshot"), 0777);
    for (i = 0; i < 3; i++) {
        char from[256], to[512];
        snprintf(from, sizeof from, GOLDEN "sharded/%s", shard_names[i]);
        snprintf(to, sizeof to, "%s/snapshot/%s", room, shard_names[i]);
        copy_file(from, to);
    }
    copy_file(GOLDEN "sharded/model.safetensors.index.json", in_room("snapshot/model.safetensors.index.json"));
}

static void make_index(const char *weight_map)
{
    char text[4096];
    snprintf(text, sizeof text, "{\"metadata\":{\"total_size\":1},\"weight_map\":%s}", weight_map);
    put_file(in_room("snapshot/model.safetensors.index.json"), text, strlen(text));
}

static void test_shards(void)
{
    static const char *const ways[] = { "snapshot", "snapshot/", "snapshot/model.safetensors.index.json" };
    size_t w, n;
    int    i, k;
    make_snapshot();
    for (w = 0; w < 3; w++) {
        mft_safetensors *st;
        CHECK_MSG(mft_safetensors_open(ctx, in_room(ways[w]), &st) == MFT_OK, "%s", mft_error_message(ctx));
        mft_safetensors_entries(st, &n);
        CHECK(n == 7);
        for (i = 0; i < 7; i++) {
            char name[32];
            const mft_safetensors_entry *e;
            snprintf(name, sizeof name, "layers.%d.weight", i);
            e = mft_safetensors_find(st, name);
            CHECK(e && e->shard == i / 3 && e->ndim == 2 && e->shape[0] == 8 && e->shape[1] == 5);
            for (k = 0; k < 40; k++) CHECK(((const float *)mft_safetensors_map(st, e))[k] == value(i + k));
            CHECK(strstr(mft_safetensors_shard_path(st, e->shard), shard_names[i / 3]));
        }
        CHECK(strcmp(mft_safetensors_metadata(st, "format"), "pt") == 0);
        mft_safetensors_close(st);
    }
    copy_file(GOLDEN "saved.safetensors", in_room("snapshot/model.safetensors"));      /* one file goes before the index */
    {
        mft_safetensors *st;
        CHECK(mft_safetensors_open(ctx, in_room("snapshot"), &st) == MFT_OK && mft_safetensors_find(st, "a.weight") && !mft_safetensors_find(st, "layers.0.weight"));
        mft_safetensors_close(st);
    }
    unlink(in_room("snapshot/model.safetensors"));
}

static void test_bad_shards(void)
{
    static const struct { const char *map; mft_status status; const char *part; } cases[] = {
        { "{}", MFT_ERR_FORMAT, "index.json: has no weight_map" }, { "[]", MFT_ERR_FORMAT, "has no weight_map" }, { "null", MFT_ERR_FORMAT, "has no weight_map" },
        { "{\"a\":1}", MFT_ERR_FORMAT, "tensor 'a': '?' is not the name of a file beside it" },
        { "{\"a\":\"../x.safetensors\"}", MFT_ERR_FORMAT, "'../x.safetensors' is not the name of a file" }, { "{\"a\":\"/etc/passwd\"}", MFT_ERR_FORMAT, "is not the name" },
        { "{\"a\":\"..\"}", MFT_ERR_FORMAT, "is not the name" }, { "{\"a\":\"C:x\"}", MFT_ERR_FORMAT, "is not the name" }, { "{\"a\":\"d\\\\x\"}", MFT_ERR_FORMAT, "is not the name" },
        { "{\"a\":\"\"}", MFT_ERR_FORMAT, "is not the name" }, { "{\"a\":\"x\\u0000y\"}", MFT_ERR_FORMAT, "is not the name" },
        { "{\"a\":\"x.safetensors\"}", MFT_ERR_IO, "snapshot/x.safetensors: is missing or unreadable; model.safetensors.index.json says it has tensor 'a'" },
        { "{\"layers.6.weight\":\"model-00003-of-00003.safetensors\",\"more\":\"model-00003-of-00003.safetensors\"}", MFT_ERR_FORMAT,
          "tensor 'more' should be in model-00003-of-00003.safetensors, but is in no file" },
        { "{\"layers.0.weight\":\"model-00001-of-00003.safetensors\"}", MFT_ERR_FORMAT, "00001-of-00003.safetensors: tensor 'layers.1.weight': is not in model.safetensors.index.json" },
        { "{\"layers.6.weight\":\"model-00001-of-00003.safetensors\",\"layers.1.weight\":\"model-00003-of-00003.safetensors\"}", MFT_ERR_FORMAT,
          "tensor 'layers.6.weight' should be in model-00001-of-00003.safetensors, but is in model-00003-of-00003.safetensors" },
        { "{\"a\":\"model-00003-of-00003.safetensors\",\"b\":\"again.safetensors\"}", MFT_ERR_FORMAT, "tensor 'layers.6.weight': is in " }
    };
    char  *many = (char *)malloc(2000 * 40);
    size_t i, at, n = 0;
    char  *shard;
    make_snapshot();
    copy_file(GOLDEN "sharded/model-00003-of-00003.safetensors", in_room("snapshot/again.safetensors"));
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        make_index(cases[i].map);
        refused(in_room("snapshot"), cases[i].status, cases[i].part);
    }
    put_file(in_room("snapshot/model.safetensors.index.json"), "{\"weight_map\": {\"a\" 1}}", 24);
    refused(in_room("snapshot"), MFT_ERR_FORMAT, "model.safetensors.index.json: line 1, column 21: expected ':'");
    make_snapshot();
    unlink(in_room("snapshot/model-00002-of-00003.safetensors"));
    refused(in_room("snapshot"), MFT_ERR_IO, "model-00002-of-00003.safetensors: is missing");
    shard = test_read_file(GOLDEN "sharded/model-00002-of-00003.safetensors", &n);
    put_file(in_room("snapshot/model-00002-of-00003.safetensors"), shard, n - 100);    /* half a download */
    refused(in_room("snapshot"), MFT_ERR_FORMAT, "model-00002-of-00003.safetensors: tensor 'layers.5.weight': ends at byte 480 of the data, but the file has only 380");
    free(shard);

    at = (size_t)snprintf(many, 8, "{");                                 /* a thousand shards and one */
    for (i = 0; i < 1001; i++) {
        char name[32];
        snprintf(name, sizeof name, "snapshot/s%d", (int)i);
        put_file(in_room(name), "", 0);
        at += (size_t)snprintf(many + at, 40, "%s\"%d\":\"s%d\"", i ? "," : "", (int)i, (int)i);
    }
    snprintf(many + at, 8, "}");
    {
        char *text = (char *)malloc(at + 100);
        snprintf(text, at + 100, "{\"weight_map\":%s}", many);
        put_file(in_room("snapshot/model.safetensors.index.json"), text, strlen(text));
        free(text);
    }
    refused(in_room("snapshot"), MFT_ERR_UNSUPPORTED, "more than 1000 shards");
    free(many);
    sweep(in_room("snapshot"), "", 1);
    copy_file(GOLDEN "saved.safetensors", in_room("snapshot/adapter_model.safetensors"));
    refused(in_room("snapshot"), MFT_ERR_IO, "an adapter, not a model");
    sweep(in_room("snapshot"), "", 1);
    put_file(in_room("snapshot/pytorch_model.bin"), "x", 1);
    refused(in_room("snapshot"), MFT_ERR_IO, "pytorch_model.bin is there, which this library does not read");
}

/* ---- files that are not files ---- */
typedef struct assets { int open, reads, fail_read, grow; } assets;
static void *asset_open(void *user, const char *path, uint64_t *out_bytes)      /* "asset:" stands for the repository */
{
    struct stat st;
    FILE       *f;
    if (strncmp(path, "asset:", 6) != 0 || stat(path + 6, &st) != 0 || !S_ISREG(st.st_mode) || !(f = fopen(path + 6, "rb"))) return NULL;
    ((assets *)user)->open++;
    *out_bytes = (uint64_t)st.st_size;
    if (((assets *)user)->grow) *out_bytes += 100;
    return f;
}
static size_t asset_read(void *user, void *file, uint64_t offset, void *dst, size_t bytes)
{
    assets *a = (assets *)user;
    if (++a->reads == a->fail_read) return 0;
    if (bytes > 100) bytes = 100;                                        /* may give less than asked for */
    return fseek((FILE *)file, (long)offset, SEEK_SET) == 0 ? fread(dst, 1, bytes, (FILE *)file) : 0;
}
static void asset_close(void *user, void *file) { ((assets *)user)->open--; fclose((FILE *)file); }

static void test_assets(void)
{
    mft_context_desc desc;
    mft_context     *mine, *old = ctx;
    assets           a;
    mft_safetensors *st;
    mft_json        *root;
    int              i, k, done;
    memset(&desc, 0, sizeof desc);
    memset(&a, 0, sizeof a);
    desc.io.open = asset_open; desc.io.read = asset_read; desc.io.close = asset_close; desc.io.user = &a;
    CHECK(mft_context_create(&desc, &mine) == MFT_OK);
    for (i = 0; i < 2; i++) {
        CHECK_MSG(mft_safetensors_open(mine, i ? "asset:" GOLDEN "sharded/model.safetensors.index.json" : "asset:" GOLDEN "sharded", &st) == MFT_OK, "%s", mft_error_message(mine));
        CHECK(a.open == 3);
        for (k = 0; k < 40; k++) {
            const mft_safetensors_entry *e = mft_safetensors_find(st, "layers.5.weight");
            mft_memory_report m;
            CHECK(((const float *)mft_safetensors_map(st, e))[k] == value(5 + k) && (uintptr_t)mft_safetensors_map(st, e) % 64 == 0);
            mft_memory(mine, &m);
            CHECK(m.weights == 160);                                     /* read once, and kept */
        }
        {
            int64_t     shape[2] = { 8, 5 };
            mft_tensor *t = mft_tensor_create(mine, MFT_STEP, MFT_BF16, 2, shape), *u = mft_tensor_create(mine, MFT_STEP, MFT_F32, 2, shape);
            CHECK(mft_safetensors_read(st, mft_safetensors_find(st, "layers.0.weight"), t) == MFT_OK && ((uint16_t *)t->data)[7] == mft__float_to_bf16(value(7)));
            CHECK(mft_safetensors_read(st, mft_safetensors_find(st, "layers.0.weight"), u) == MFT_OK && ((float *)u->data)[39] == value(39));
            mft_step_reset(mine);
        }
        mft__safetensors_prefetch(st, mft_safetensors_entries(st, NULL));
        mft__safetensors_drop(st, mft_safetensors_entries(st, NULL));
        mft_safetensors_close(st);
        CHECK(a.open == 0);
    }
    CHECK(mft_safetensors_open(mine, "asset:none.safetensors", &st) == MFT_ERR_IO && strstr(mft_error_message(mine), "asset:none.safetensors: cannot be opened"));
    CHECK(mft_safetensors_open(mine, GOLDEN "sharded", &st) == MFT_ERR_IO);          /* not through the back door */
    CHECK(mft_json_load(mine, "asset:" GOLDEN "sharded/model.safetensors.index.json", &root) == MFT_OK && mft_json_get(root, "weight_map"));
    for (done = 0, i = 1; !done && i < 100; i++) {                       /* a read that fails, whichever it is */
        a.reads = 0; a.fail_read = i;
        if (mft_safetensors_open(mine, "asset:" GOLDEN "sharded", &st) == MFT_OK) {
            done = mft_safetensors_map(st, mft_safetensors_entries(st, NULL)) != NULL;
            mft_safetensors_close(st);
        }
        if (!done) CHECK(strstr(mft_error_message(mine), "ends at byte"));
        CHECK(a.open == 0);
    }
    CHECK(done);
    a.fail_read = 0; a.grow = 1;                                         /* the file is shorter than it said */
    CHECK(mft_safetensors_open(mine, "asset:" GOLDEN "saved.safetensors", &st) == MFT_ERR_FORMAT);
    mft_context_destroy(mine);
    CHECK(a.open == 0);
    ctx = old;
}

/* ---- writing ---- */
static void test_writer(void)
{
    mft_safetensors_spec    specs[4];
    mft_safetensors_writer *w;
    mft_safetensors        *st;
    mft_tensor             *a, *b;
    int64_t                 shape[2] = { 700, 3 };
    int                     i;
    const char             *path = in_room("stream.safetensors");

    memset(specs, 0, sizeof specs);
    specs[0].name = "late"; specs[1].name = "early"; specs[2].name = "brain"; specs[3].name = "copy";
    specs[2].dtype = MFT_BF16;
    for (i = 0; i < 4; i++) { specs[i].ndim = 2; specs[i].shape[0] = 700; specs[i].shape[1] = 3; }
    a = mft_tensor_create(ctx, MFT_STEP, MFT_F32, 2, shape);
    b = mft_tensor_create(ctx, MFT_STEP, MFT_BF16, 2, shape);
    for (i = 0; i < 2100; i++) { ((float *)a->data)[i] = value(i); ((uint16_t *)b->data)[i] = mft__float_to_bf16(value(i)); }

    CHECK_MSG(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK(mft_safetensors_write_tensor(w, 2, a) == MFT_OK && mft_safetensors_write_tensor(w, 0, b) == MFT_OK);      /* converting both ways */
    CHECK(mft_safetensors_write_tensor(w, 3, a) == MFT_OK && mft_safetensors_write_tensor(w, 1, a) == MFT_OK);
    CHECK_MSG(mft_safetensors_write_commit(w) == MFT_OK, "%s", mft_error_message(ctx));
    CHECK_MSG(mft_safetensors_open(ctx, path, &st) == MFT_OK, "%s", mft_error_message(ctx));
    for (i = 0; i < 2100; i++) {
        CHECK(((const float *)mft_safetensors_map(st, mft_safetensors_find(st, "late")))[i] == value(i));
        CHECK(((const float *)mft_safetensors_map(st, mft_safetensors_find(st, "early")))[i] == value(i));
        CHECK(((const uint16_t *)mft_safetensors_map(st, mft_safetensors_find(st, "brain")))[i] == mft__float_to_bf16(value(i)));
    }
    CHECK(strcmp(mft_safetensors_entries(st, NULL)[0].name, "copy") == 0 && strcmp(mft_safetensors_entries(st, NULL)[3].name, "brain") == 0);
    mft_safetensors_close(st);

    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_OK && mft_safetensors_write_tensor(w, 0, a) == MFT_OK);
    CHECK(mft_safetensors_write_tensor(w, 0, a) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "tensor 'late': is written a second time"));
    CHECK(mft_safetensors_write_tensor(w, 4, a) == MFT_ERR_INVALID_ARGUMENT && mft_safetensors_write_tensor(w, -1, a) == MFT_ERR_INVALID_ARGUMENT);
    mft_safetensors_write_abort(w);
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 1, NULL, &w) == MFT_OK && mft_safetensors_write_tensor(w, 0, a) == MFT_OK);
    CHECK(mft_safetensors_write_tensor(w, 0, a) == MFT_ERR_INVALID_ARGUMENT && mft_safetensors_write_commit(w) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_OK && mft_safetensors_write_tensor(w, 0, a) == MFT_OK);
    CHECK(mft_safetensors_write_commit(w) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "tensor 'early': was never written"));
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_OK);
    mft_safetensors_write_abort(w);
    mft_safetensors_write_abort(NULL);

    a->shape[0] = 300;                                                   /* in pieces: 300 + 300 + 100 rows, one of them converted */
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 1, NULL, &w) == MFT_OK && mft_safetensors_write_rows(w, 0, a) == MFT_OK);
    CHECK(mft_safetensors_write_tensor(w, 0, a) == MFT_ERR_INVALID_ARGUMENT);
    mft_safetensors_write_abort(w);
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 1, NULL, &w) == MFT_OK && mft_safetensors_write_rows(w, 0, a) == MFT_OK);
    CHECK(mft_safetensors_write_commit(w) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "lacks rows"));
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 1, NULL, &w) == MFT_OK && mft_safetensors_write_rows(w, 0, a) == MFT_OK);
    b->shape[0] = 300;
    CHECK(mft_safetensors_write_rows(w, 0, b) == MFT_OK);
    a->shape[0] = 100;
    CHECK(mft_safetensors_write_rows(w, 0, a) == MFT_OK && mft_safetensors_write_rows(w, 0, a) == MFT_ERR_INVALID_ARGUMENT);
    mft_safetensors_write_abort(w);
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 1, NULL, &w) == MFT_OK);
    for (i = 0; i < 7; i++) CHECK(mft_safetensors_write_rows(w, 0, a) == MFT_OK);
    CHECK(mft_safetensors_write_commit(w) == MFT_OK && mft_safetensors_open(ctx, path, &st) == MFT_OK);
    for (i = 0; i < 2100; i++) CHECK(((const float *)mft_safetensors_map(st, mft_safetensors_find(st, "late")))[i] == value(i % 300));
    mft_safetensors_close(st);
    CHECK(open_status(path) == MFT_OK && sweep(room, ".tmp-", 0) == 0);  /* the old file is still there, nothing else */

    a->shape[0] = 699;
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_OK && mft_safetensors_write_tensor(w, 0, a) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(strstr(mft_error_message(ctx), "has not the announced shape") && mft_safetensors_write_commit(w) == MFT_ERR_INVALID_ARGUMENT);
    specs[1].name = "late";
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "tensor 'late': is given twice"));
    specs[1].dtype = MFT_I64;                                            /* also when the sorting puts others between */
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "is given twice"));
    specs[1].name = "__metadata__";
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "tensor 1 has no name"));
    specs[1].name = "\xff";
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_ERR_INVALID_ARGUMENT && !w);
    specs[1].name = NULL;
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_ERR_INVALID_ARGUMENT);
    specs[1].name = "q"; specs[1].dtype = MFT_Q8_0;
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_ERR_UNSUPPORTED && strstr(mft_error_message(ctx), "no dtype Q8_0"));
    specs[1].dtype = MFT_F32; specs[1].shape[0] = (int64_t)1 << 62;
    CHECK(mft_safetensors_write_begin(ctx, path, specs, 4, NULL, &w) == MFT_ERR_INVALID_ARGUMENT && strstr(mft_error_message(ctx), "tensor 'q': dimension 0"));
    CHECK(mft_safetensors_save(ctx, path, &a, -1, NULL) == MFT_ERR_INVALID_ARGUMENT && mft_safetensors_save(ctx, path, NULL, 1, NULL) == MFT_ERR_INVALID_ARGUMENT);
    a->name = NULL;
    CHECK(mft_safetensors_save(ctx, path, &a, 1, NULL) == MFT_ERR_INVALID_ARGUMENT);
    CHECK(mft_safetensors_save(ctx, room, NULL, 0, NULL) == MFT_ERR_IO && strstr(mft_error_message(ctx), "is a directory, cannot become a file"));
    CHECK(mft_safetensors_save(ctx, in_room("no/such/dir.safetensors"), NULL, 0, NULL) == MFT_ERR_IO && strstr(mft_error_message(ctx), "dir.safetensors: cannot be written: No such"));
    CHECK(open_status(path) == MFT_OK && sweep(room, ".tmp-", 0) == 0);
    mft_step_reset(ctx);
}

/* A writer nobody ends goes with its context, and so does its temporary file. */
static void test_forgotten_writer(void)
{
    mft_context            *mine;
    mft_safetensors_writer *w;
    mft_safetensors_spec    spec;
    memset(&spec, 0, sizeof spec);
    spec.name = "x";
    CHECK(mft_context_create(NULL, &mine) == MFT_OK && mft_safetensors_write_begin(mine, in_room("forgotten.safetensors"), &spec, 1, NULL, &w) == MFT_OK);
    CHECK(sweep(room, "forgotten.safetensors.tmp-", 0) == 1);
    mft_context_destroy(mine);
    CHECK(sweep(room, "forgotten", 0) == 0);
}

static void test_listing(void)
{
    static const char *const want[] = { "", "B.csv", "a.csv", "b.csv" };
    char  **names, path[64];
    size_t  n, i;
    mkdir(in_room("list"), 0777);
    CHECK(mft__dir_list(ctx, in_room("list"), ".csv", &names, &n) == MFT_OK && n == 0 && !names);
    for (i = 1; i < 4; i++) { snprintf(path, sizeof path, "list/%s", want[4 - i]); put_file(in_room(path), "", 0); }
    put_file(in_room("list/c.txt"), "", 0);
    CHECK(mft__dir_list(ctx, in_room("list"), ".csv", &names, &n) == MFT_OK && n == 3);
    for (i = 0; i < n; i++) CHECK(strcmp(names[i], want[i + 1]) == 0);
    mft__dir_list_free(ctx, names, n);
    CHECK(mft__dir_list(ctx, in_room("list"), "", &names, &n) == MFT_OK && n == 4);
    mft__dir_list_free(ctx, names, n);
    CHECK(mft__dir_list(ctx, in_room("none"), "", &names, &n) == MFT_ERR_IO && strstr(mft_error_message(ctx), "none: cannot be listed: No such file"));
}

static void test_paths(void)
{
    static const char *const dirs[][2] = { { "a/b", "a" }, { "a", "." }, { "/a", "/" }, { "a//b", "a" }, { "/a/b/c", "/a/b" }, { "./x", "." } };
    size_t i;
    char  *p;
    for (i = 0; i < sizeof dirs / sizeof dirs[0]; i++) {
        p = mft__path_dir(ctx, dirs[i][0]);
        CHECK_MSG(strcmp(p, dirs[i][1]) == 0, "%s gave %s", dirs[i][0], p);
        mft__strfree(ctx, p);
    }
    p = mft__path_join(ctx, "a", "b");  CHECK(strcmp(p, "a/b") == 0); mft__strfree(ctx, p);
    p = mft__path_join(ctx, "a/", "b"); CHECK(strcmp(p, "a/b") == 0); mft__strfree(ctx, p);
    p = mft__path_join(ctx, "", "b");   CHECK(strcmp(p, "b") == 0);   mft__strfree(ctx, p);
    CHECK(mft__make_dirs(ctx, in_room("one/two//three/")) == MFT_OK && mft__file_kind(in_room("one/two/three")) == MFT__DIRECTORY);
    CHECK(mft__make_dirs(ctx, in_room("one/two")) == MFT_OK);
    put_file(in_room("one/file"), "x", 1);
    CHECK(mft__make_dirs(ctx, in_room("one/file/sub")) == MFT_ERR_IO && strstr(mft_error_message(ctx), "one/file: cannot make this directory: there is a file of that name"));
    CHECK(mft__can_write_in(ctx, in_room("one/out")) == MFT_OK && sweep(in_room("one/out"), "", 0) == 0);
    CHECK(mft__can_write_in(ctx, "/proc/self") == MFT_ERR_IO && strstr(mft_error_message(ctx), "/proc/self/"));
    rmdir(in_room("one/two/three")); rmdir(in_room("one/two")); rmdir(in_room("one/out"));
    {
        char long_path[3000];                                            /* the reason must still fit */
        memset(long_path, 'p', sizeof long_path - 1); long_path[sizeof long_path - 1] = '\0';
        CHECK(open_status(long_path) == MFT_ERR_IO && strstr(mft_error_message(ctx), "cannot be read: "));
    }
}

/* ---- everything that can fail, failing ---- */
typedef struct limited { size_t left, out; } limited;
static void *limited_alloc(void *user, size_t bytes, size_t align)
{
    limited *l = (limited *)user;
    void    *p;
    if (!l->left) return NULL;
    l->left--;
    if (posix_memalign(&p, align < sizeof(void *) ? sizeof(void *) : align, bytes) != 0) return NULL;
    l->out += bytes;
    return p;
}
static void limited_free(void *user, void *p, size_t bytes) { ((limited *)user)->out -= bytes; free(p); }

/* Opens the snapshot, copies two of its tensors into a new file, and looks at a directory. */
static mft_status open_and_save(mft_context *c, const char *path)
{
    mft_safetensors *st = NULL;
    mft_tensor      *t[2] = { NULL, NULL };
    const mft_safetensors_entry *e;
    int64_t          shape[2] = { 8, 5 };
    int              i;
    char           **names = NULL;
    size_t           n = 0;
    mft_status       s = mft_safetensors_open(c, GOLDEN "sharded", &st);
    for (i = 0; i < 2 && s == MFT_OK; i++) {
        e = mft_safetensors_entries(st, NULL) + i;
        t[i] = mft_tensor_create(c, MFT_HELD, i ? MFT_F32 : MFT_BF16, 2, shape);
        if (!t[i]) s = MFT_ERR_OUT_OF_MEMORY;
        else { t[i]->name = e->name; s = mft_safetensors_read(st, e, t[i]); }
    }
    if (s == MFT_OK) s = mft__dir_list(c, GOLDEN "sharded", ".safetensors", &names, &n);
    if (s == MFT_OK) s = mft_safetensors_save(c, path, t, 2, NULL);
    mft__dir_list_free(c, names, n);
    mft_tensor_destroy(c, t[0]); mft_tensor_destroy(c, t[1]);
    mft_safetensors_close(st);
    return s;
}

static void test_out_of_memory(void)
{
    size_t n;
    int    done = 0;
    put_file(in_room("memory.safetensors"), "old", 3);
    for (n = 0; n < 300 && !done; n++) {
        mft_context_desc desc;
        mft_context     *mine;
        limited          l;
        memset(&desc, 0, sizeof desc);
        l.left = n; l.out = 0;
        desc.allocator.alloc = limited_alloc; desc.allocator.free = limited_free; desc.allocator.user = &l;
        if (mft_context_create(&desc, &mine) == MFT_OK) {
            size_t     before = l.out;
            mft_status s = open_and_save(mine, in_room("memory.safetensors"));
            CHECK_MSG(s == MFT_OK || (s == MFT_ERR_OUT_OF_MEMORY && strstr(mft_error_message(mine), "the allocator could not give")), "%d %s", (int)s, mft_error_message(mine));
            CHECK_MSG(l.out == before, "call %d: %d bytes not given back", (int)n, (int)(l.out - before));
            done = s == MFT_OK;
            if (!done) {
                size_t bytes = 0;
                char  *old = test_read_file(in_room("memory.safetensors"), &bytes);
                CHECK(bytes == 3 && memcmp(old, "old", 3) == 0);
                free(old);
            }
            mft_context_destroy(mine);
        }
        CHECK(l.out == 0 && sweep(room, ".tmp-", 0) == 0);
    }
    CHECK(done && n > 20);
}

static void test_failing_calls(void)
{
    static const int reasons[] = { EIO, ENOSPC, EACCES };
    const char *path = in_room("faults.safetensors");
    int         i, r, done, n_faults = 0;
#ifdef NO_FAULTS
    SKIP("failing system calls: not under the thread sanitizer");
#endif
    for (r = 0; r < 3; r++) {
        for (done = 0, i = 1; i < 200 && !done; i++) {
            mft_status s;
            put_file(path, "old", 3);
            fault_at = i; fault_calls = 0; fault_errno = reasons[r];
            s = open_and_save(ctx, path);
            done = fault_calls < i;                                      /* none failed any more */
            fault_at = 0;
            if (done) { CHECK(s == MFT_OK && open_status(path) == MFT_OK); break; }
            n_faults += s != MFT_OK;
            if (s == MFT_OK) CHECK(open_status(path) == MFT_OK);         /* a close after reading, a directory that cannot sync */
            else {
                size_t bytes = 0;
                char  *now = test_read_file(path, &bytes);
                CHECK_MSG(strstr(mft_error_message(ctx), strerror(reasons[r])) && strstr(mft_error_message(ctx), "safetensors"), "call %d: %s", i, mft_error_message(ctx));
                if (!strstr(mft_error_message(ctx), "synced to its directory")) CHECK_MSG(bytes == 3, "call %d: %s", i, mft_error_message(ctx));
                free(now);
            }
            CHECK_MSG(sweep(room, ".tmp-", 0) == 0, "call %d left its temporary file", i);
        }
        CHECK(done);
    }
    CHECK(n_faults >= 3 * 15);
    fault_order[0] = '\0';                                               /* the data, then the name, then the directory */
    CHECK(open_and_save(ctx, path) == MFT_OK && strcmp(fault_order, "wsrs") == 0);
    fault_at = 1; fault_calls = 0; fault_errno = EINTR;                  /* an interrupted open is no failure */
    CHECK(open_and_save(ctx, path) == MFT_OK);
    fault_at = 0;
}

/* A disk that is full in the middle: the kernel itself says so here. */
static void test_full_disk(void)
{
    struct rlimit old, small;
    mft_tensor   *t;
    int64_t       n = 100000;
    const char   *path = in_room("full.safetensors");
    mft_status    s;
    t = mft_tensor_create(ctx, MFT_STEP, MFT_F32, 1, &n);
    t->name = "x";
    put_file(path, "old", 3);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    small = old; small.rlim_cur = 100000;
    setrlimit(RLIMIT_FSIZE, &small);
    s = mft_safetensors_save(ctx, path, &t, 1, NULL);
    setrlimit(RLIMIT_FSIZE, &old);
    signal(SIGXFSZ, SIG_DFL);
    CHECK_MSG(s == MFT_ERR_IO && strstr(mft_error_message(ctx), "full.safetensors: cannot be written: File too large"), "%s", mft_error_message(ctx));
    CHECK(sweep(room, ".tmp-", 0) == 0 && same_file(path, in_room("memory-old")) == 0);
    {
        size_t bytes = 0;
        char  *p = test_read_file(path, &bytes);
        CHECK(bytes == 3);
        free(p);
    }
    mft_step_reset(ctx);
}

/* A child saves two versions in turn and is killed at some moment: the file is always one of them. */
static void test_kill(void)
{
    enum { N = 50000 };
    const char *path = in_room("killed.safetensors");
    int         round, i, seen[2] = { 0, 0 };
    for (round = 0; round < 25; round++) {
        pid_t child;
        fflush(stdout);
        child = fork();
        if (child == 0) {
            mft_context_desc desc;
            mft_context *mine;
            int64_t      n = N;
            int          v;
            mft_tensor  *t;
            memset(&desc, 0, sizeof desc);
            desc.n_threads = 1;                                          /* a forked child had better not start any */
            if (mft_context_create(&desc, &mine) != MFT_OK) _exit(1);
            t = mft_tensor_create(mine, MFT_HELD, MFT_F32, 1, &n);
            t->name = "x";
            for (v = 0; ; v = !v) {
                for (i = 0; i < N; i++) ((float *)t->data)[i] = (float)(v + 1);
                if (mft_safetensors_save(mine, path, &t, 1, NULL) != MFT_OK) _exit(1);
            }
        }
        for (i = 0; !test_file_exists(path) && i < 30000; i++) usleep(1000);     /* the first; slow disks take their time */
        usleep((useconds_t)(3000 + round * 1700));
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        {
            mft_safetensors *st = NULL;
            const float     *x;
            int              same = 1;
            CHECK_MSG(mft_safetensors_open(ctx, path, &st) == MFT_OK, "round %d: %s", round, mft_error_message(ctx));
            if (!st) continue;
            x = (const float *)mft_safetensors_map(st, mft_safetensors_find(st, "x"));
            for (i = 0; i < N; i++) same &= x[i] == x[0];
            CHECK(same && (x[0] == 1 || x[0] == 2));
            seen[x[0] == 2] = 1;
            mft_safetensors_close(st);
        }
    }
    CHECK(seen[0] || seen[1]);
}

/* ---- pages ---- */
static long resident_pages(void)
{
    long  total = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f) return -1;
    if (fscanf(f, "%ld %ld", &total, &resident) != 2) resident = -1;
    fclose(f);
    return resident;
}

static void test_drop(void)
{
    enum { N = 4 << 20 };                                                /* 16 MB, then another 4 */
    const char      *path = in_room("pages.safetensors");
    mft_safetensors *st = NULL;
    const mft_safetensors_entry *e;
    const float     *x;
    int64_t          n = N, few = 1 << 20, i;
    long             before, touched, dropped;
    double           sum = 0;
    mft_tensor      *t[2];
    t[0] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 1, &n);
    t[1] = mft_tensor_create(ctx, MFT_HELD, MFT_F32, 1, &few);
    t[0]->name = "a"; t[1]->name = "b";
    for (i = 0; i < n; i++) ((float *)t[0]->data)[i] = value((int)(i % 1000));
    CHECK(mft_safetensors_save(ctx, path, t, 2, NULL) == MFT_OK && mft_safetensors_open(ctx, path, &st) == MFT_OK);
    mft_tensor_destroy(ctx, t[0]); mft_tensor_destroy(ctx, t[1]);
    e = mft_safetensors_find(st, "a");
    x = (const float *)mft_safetensors_map(st, e);
    before = resident_pages();
    mft__safetensors_prefetch(st, e);
    for (i = 0; i < n; i++) sum += (double)x[i];
    touched = resident_pages();
    mft__safetensors_drop(st, e);
    dropped = resident_pages();
    for (i = 0; i < n; i++) sum -= (double)x[i];
    CHECK(sum == 0 && x[N - 1] == value((N - 1) % 1000));                /* sums of eighths are exact */
    mft_safetensors_close(st);
#if !defined(MFT_NO_MMAP) && defined(__linux__) && (defined(__x86_64__) || defined(__i386__))
    CHECK_MSG(touched - before >= 3500, "%ld pages before, %ld touched", before, touched);
    CHECK_MSG(touched - dropped >= 3500, "%ld pages touched, %ld after the drop", touched, dropped);      /* of 4096 */
#else
    (void)before; (void)touched; (void)dropped;                          /* nothing mapped; emulators keep pages as they like */
#endif
}

int main(void)
{
    const char *tmp = getenv("TMPDIR");
    int         status;
    snprintf(room, sizeof room, "%s/mft-test-XXXXXX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(room) || mft_context_create(NULL, &ctx) != MFT_OK) { printf("no temporary directory\n"); return 1; }
    TEST(test_opening);
    TEST(test_dtypes);
    TEST(test_saved_bytes);
    TEST(test_round_trip);
    TEST(test_conversions);
    TEST(test_integers);
    TEST(test_unaligned);
    TEST(test_bad_files);
    TEST(test_bad_headers);
    TEST(test_many_entries);
    TEST(test_shards);
    TEST(test_bad_shards);
    TEST(test_assets);
    TEST(test_writer);
    TEST(test_forgotten_writer);
    TEST(test_paths);
    TEST(test_listing);
    TEST(test_out_of_memory);
    TEST(test_failing_calls);
    TEST(test_full_disk);
    TEST(test_kill);
    TEST(test_drop);
    status = test_report("safetensors");
    mft_context_destroy(ctx);
    sweep(room, "", 1);
    rmdir(room);
    return status;
}

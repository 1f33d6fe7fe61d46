/* fuzz_safetensors.c - the input as a file and as an index of shards, through an mft_io. What opens has
 * entries inside the file that do not overlap, and its tensors, saved and opened again, are the same. */
#define MFT_IMPLEMENTATION
#include "../../mft.h"
#include "../../mft_safetensors.h"

#define FUZZ_NAME "safetensors"
#include "fuzz.h"

#include <unistd.h>

/* "x.safetensors" and "d/model.safetensors.index.json" are the input, "d/a" and "d/b" are two sound shards. */
typedef struct memory { const char *data; size_t bytes; } memory;
typedef struct memories { memory input, a, b; } memories;

static void *memory_open(void *user, const char *path, uint64_t *out_bytes)
{
    memories *all = (memories *)user;
    memory   *m = NULL;
    if (strcmp(path, "x.safetensors") == 0 || strcmp(path, "d/model.safetensors.index.json") == 0) m = &all->input;
    if (strcmp(path, "d/a") == 0) m = &all->a;
    if (strcmp(path, "d/b") == 0) m = &all->b;
    if (m) *out_bytes = m->bytes;
    return m;
}

static size_t memory_read(void *user, void *file, uint64_t offset, void *dst, size_t bytes)
{
    const memory *m = (const memory *)file;
    (void)user;
    if (offset >= m->bytes) return 0;
    if (bytes > m->bytes - offset) bytes = m->bytes - (size_t)offset;
    memcpy(dst, m->data + offset, bytes);
    return bytes;
}

static void memory_close(void *user, void *file) { (void)user; (void)file; }

static void same_again(mft_context *ctx, mft_context *files, mft_safetensors *st, const char *path)
{
    enum { MOST = 64 };
    mft_tensor      *tensors[MOST];
    mft_safetensors *again;
    size_t           i, n;
    int              k = 0;
    const mft_safetensors_entry *e = mft_safetensors_entries(st, &n), *f;

    for (i = 0; i < n && k < MOST; i++) {
        FUZZ_CHECK(mft_safetensors_find(st, e[i].name) == &e[i]);
        FUZZ_CHECK(!i || e[i].shard != e[i - 1].shard || e[i].offset == e[i - 1].offset + e[i - 1].bytes);
        if (e[i].problem || !e[i].name[0]) continue;
        tensors[k] = mft_tensor_create(ctx, MFT_HELD, e[i].dtype, e[i].ndim, e[i].shape);
        FUZZ_CHECK(tensors[k] && mft_safetensors_read(st, &e[i], tensors[k]) == MFT_OK);
        FUZZ_CHECK(memcmp(tensors[k]->data, mft_safetensors_map(st, &e[i]), (size_t)e[i].bytes) == 0);
        tensors[k]->name = e[i].name;
        k++;
    }
    FUZZ_CHECK(mft_safetensors_save(files, path, tensors, k, NULL) == MFT_OK);
    FUZZ_CHECK(mft_safetensors_open(files, path, &again) == MFT_OK);
    mft_safetensors_entries(again, &n);
    FUZZ_CHECK((int)n == k);
    while (k--) {
        int d;
        f = mft_safetensors_find(again, tensors[k]->name);
        FUZZ_CHECK(f && f->dtype == tensors[k]->dtype && f->ndim == tensors[k]->ndim && !f->problem);
        for (d = 0; d < f->ndim; d++) FUZZ_CHECK(f->shape[d] == tensors[k]->shape[d]);
        FUZZ_CHECK(memcmp(mft_safetensors_map(again, f), tensors[k]->data, (size_t)f->bytes) == 0);
        mft_tensor_destroy(ctx, tensors[k]);
    }
    mft_safetensors_close(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static const char a[] = "\x36\0\0\0\0\0\0\0" "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}} xy";
    static const char b[] = "\x36\0\0\0\0\0\0\0" "{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}} xy";
    mft_context_desc  desc;
    mft_context      *ctx, *files;
    mft_safetensors  *st;
    mft_memory_report before, after;
    memories          all;
    char              path[64];
    int               way;

    all.input.data = (const char *)data; all.input.bytes = bytes;
    all.a.data = a; all.b.data = b; all.a.bytes = all.b.bytes = sizeof a - 1;
    snprintf(path, sizeof path, "%s/mft-fuzz-%ld.safetensors", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp", (long)getpid());
    memset(&desc, 0, sizeof desc);
    desc.n_threads = 1;
    FUZZ_CHECK(mft_context_create(&desc, &files) == MFT_OK);
    desc.io.open = memory_open; desc.io.read = memory_read; desc.io.close = memory_close; desc.io.user = &all;
    desc.memory_budget = (size_t)64 << 20;                               /* no input is worth more */
    FUZZ_CHECK(mft_context_create(&desc, &ctx) == MFT_OK);
    for (way = 0; way < 2; way++) {
        mft_memory(ctx, &before);
        if (mft_safetensors_open(ctx, way ? "d" : "x.safetensors", &st) == MFT_OK) {
            same_again(ctx, files, st, path);
            mft_safetensors_close(st);
        } else FUZZ_CHECK(!st && mft_error_message(ctx)[0]);
        mft_memory(ctx, &after);
        FUZZ_CHECK(after.now == before.now);
    }
    mft_context_destroy(ctx);
    mft_context_destroy(files);
    remove(path);
    return 0;
}

/* mft_safetensors.h - v0.1.0 - JSON, safetensors and snapshots, files that survive a crash
 * One file of C99, also valid C++. Needs mft.h and libc. No global state.
 *
 * TO USE IT   include it wherever mft.h is, also where MFT_IMPLEMENTATION is defined
 *
 * SMALLEST PROGRAM   what is in a model   (built by tests/test_safetensors.c)
 *     mft_safetensors *st;
 *     size_t           i, n;
 *     if (mft_safetensors_open(ctx, "Qwen2.5-0.5B", &st) != MFT_OK) puts(mft_error_message(ctx));
 *     const mft_safetensors_entry *e = mft_safetensors_entries(st, &n);
 *     for (i = 0; i < n; i++) printf("%s %s\n", e[i].name, e[i].dtype_name);
 *     mft_safetensors_close(st);
 *
 * WORDS     entry: name, dtype, shape and place of one tensor in a file
 *           shard: one of several files that make up a model
 *           snapshot: a directory as Hugging Face lays it out
 * ROOMS     search for a tag; it stands over the declarations and over the code:
 *           [FILE] [JSON] [HEADER] [READ] [SNAPSHOT] [WRITE]
 * OPTIONS   MFT_NO_MMAP    reads weights into memory instead of mapping the file (what
 *                          Windows and an mft_io do anyway)
 * LIMITS    headers of 100 MB, names of 1 KB, JSON of 256 MB nested 256 deep
 * LICENSE   MIT, full text at the end of mft.h. */
#ifndef MFT_SAFETENSORS_H
#define MFT_SAFETENSORS_H

#ifndef MFT_H
#  include "mft.h"
#endif

/* ==============================================================================
 * MARK: - [JSON] Text to a tree
 *
 *   The accessors take NULL for a node that is not there and then return the fallback, so a
 *   path reads as one expression:
 *       mft_json_number(mft_json_get(mft_json_get(root, "rope_scaling"), "factor"), 1.0)
 * ============================================================================== */
typedef struct mft_json mft_json;           /* a node; all but the root are borrowed until the root's destroy */

typedef enum mft_json_kind { MFT_JSON_NULL, MFT_JSON_BOOL, MFT_JSON_NUMBER, MFT_JSON_STRING, MFT_JSON_ARRAY, MFT_JSON_OBJECT } mft_json_kind;

/* text     UTF-8, need not end in NUL, may be freed afterwards; a byte order mark is skipped
 * out_root held
 * fails    FORMAT, with line, column and what was expected: not JSON (RFC 8259, so no NaN), not
 *          UTF-8, half a surrogate pair, a key twice in one object, a number beyond a double;
 *          UNSUPPORTED: nested deeper than 256, longer than 256 MB; OUT_OF_MEMORY
 * memory   24 bytes a node and the strings, in one block */
MFT_API mft_status      mft_json_parse  (mft_context *ctx, const char *text, size_t bytes, mft_json **out_root);
/* The same of a file; messages start with its path. fails also with IO. */
MFT_API mft_status      mft_json_load   (mft_context *ctx, const char *path, mft_json **out_root);
/* The root only. NULL does nothing. */
MFT_API void            mft_json_destroy(mft_json *root);

MFT_API mft_json_kind   mft_json_type   (const mft_json *node);                           /* node NULL: MFT_JSON_NULL */
/* The member of that name; NULL if absent or not an object. In constant time, whatever the size. */
MFT_API const mft_json *mft_json_get    (const mft_json *object, const char *key);
/* Element or member number `index` in the order of the text; NULL past the last. out_key may be
 * NULL; it becomes NULL for an array's elements. */
MFT_API const mft_json *mft_json_at     (const mft_json *node, size_t index, const char **out_key);
MFT_API size_t          mft_json_count  (const mft_json *node);                           /* elements, members; else 0 */
MFT_API double          mft_json_number (const mft_json *node, double fallback);          /* nearest double  */
/* Exact; the fallback also for numbers that are no integer or do not fit. 1e3 and 3.0 are integers. */
MFT_API int64_t         mft_json_integer(const mft_json *node, int64_t fallback);
MFT_API int             mft_json_bool   (const mft_json *node, int fallback);             /* 0 or 1 */
/* UTF-8 that ends in NUL and may hold NULs as well, which out_bytes (may be NULL) tells; NULL if
 * it is no string. */
MFT_API const char     *mft_json_string (const mft_json *node, size_t *out_bytes);

/* ==============================================================================
 * MARK: - [READ] Tensors in files
 *
 *   in    one .safetensors file, an index of shards, or a snapshot directory
 *   out   checked entries, whose bytes are used in place or copied with a change of dtype
 *   rule  nothing in a file is believed: header and entries are checked against each other and
 *         against the length of the file before anything is allocated for them
 * ============================================================================== */
typedef struct mft_safetensors mft_safetensors;      /* an open file, or all shards of a snapshot; held */

typedef struct mft_safetensors_entry {      /* borrowed until the close */
    const char *name;
    mft_dtype   dtype;                      /* BOOL is read as U8                                     */
    int         ndim;
    int64_t     shape[MFT_MAX_DIMS];
    uint64_t    offset, bytes;              /* from the start of file `shard`, inside it              */
    int         shard;
    const char *dtype_name;                 /* as the file has it: "BF16", "F8_E4M3"                  */
    const char *problem;                    /* NULL, or why this tensor cannot be used (a dtype this
                                               library lacks, more than 4 dimensions, no elements);
                                               dtype is then U8, and ndim 1 if there were more than 4 */
} mft_safetensors_entry;

/* path     a .safetensors file, a model.safetensors.index.json, or a snapshot directory, in which
 *          model.safetensors comes first and the index second, as in transformers
 * fails    IO (missing, unreadable, a directory or device), FORMAT (anything that does not add up,
 *          also between shards and index: missing or cut shards, a tensor in two of them),
 *          OUT_OF_MEMORY; the message names file and tensor
 * memory   entries and names, about 150 bytes a tensor; the files are mapped (with an mft_io: read
 *          when asked for)
 * A mapped file must not be rewritten in place while it is open, nor shortened: its length is looked at before each use
 * of a model's weights and each mft_safetensors_read, which then fail with IO, but not in the middle of one. Files that
 * are replaced by renaming, as this library and the Hugging Face cache do, may be replaced any time. */
MFT_API mft_status mft_safetensors_open (mft_context *ctx, const char *path, mft_safetensors **out);
MFT_API void       mft_safetensors_close(mft_safetensors *st);
/* All entries, shard by shard, in the order of their bytes. */
MFT_API const mft_safetensors_entry *mft_safetensors_entries(const mft_safetensors *st, size_t *out_count);
MFT_API const mft_safetensors_entry *mft_safetensors_find   (const mft_safetensors *st, const char *name);   /* NULL if absent */
/* The value of `__metadata__`'s key, from the first shard that has it; NULL if none has. */
MFT_API const char *mft_safetensors_metadata   (const mft_safetensors *st, const char *key);
/* The index-th pair, of all shards; NULL past the last. out_key may be NULL. */
MFT_API const char *mft_safetensors_metadata_at(const mft_safetensors *st, size_t index, const char **out_key);
/* The path of a shard, for messages; NULL past the last. */
MFT_API const char *mft_safetensors_shard_path (const mft_safetensors *st, int shard);

/* dst = the tensor: shapes equal, strides free; converts among f32, f16 and bf16 (to nearest even)
 * and between i32 and i64.
 * fails  UNSUPPORTED (other conversions; entries with a problem), INVALID_ARGUMENT (shapes differ; an
 *        i64 that is no i32), IO */
MFT_API mft_status  mft_safetensors_read(mft_safetensors *st, const mft_safetensors_entry *e, mft_tensor *dst);
/* The tensor's bytes where they are, contiguous, borrowed until the close and never to be written
 * to. Their address has the alignment of their place in the file, which old files leave odd: check
 * `(uintptr_t)p % size`, and use mft_safetensors_read where it matters.
 * With an mft_io or MFT_NO_MMAP the first call reads them into memory, where they stay. (A model's weights
 * under a memory budget are read anew for each use, unless the trainer finds room for all of them.)
 * NULL on failure (UNSUPPORTED, IO, OUT_OF_MEMORY). */
MFT_API const void *mft_safetensors_map (mft_safetensors *st, const mft_safetensors_entry *e);

/* ==============================================================================
 * MARK: - [WRITE] Tensors into files
 *
 *   Bytes go to a temporary neighbour (PATH.tmp-*), which is flushed, synced and renamed: a crash or
 *   a full disk leaves the old file or the new one. Only a kill in the middle can leave the neighbour
 *   behind; the next save to that path removes it. The layout is the reference's: sorted by dtype and name, aligned.
 * ============================================================================== */

/* Named tensors of any strides. metadata: key, value, .., NULL; NULL means "format", "pt", which
 * transformers asks for.
 * fails  INVALID_ARGUMENT (no name, a name twice, no data), UNSUPPORTED (quantised dtypes), IO,
 *        OUT_OF_MEMORY; an old file of that name is then untouched */
MFT_API mft_status mft_safetensors_save (mft_context *ctx, const char *path, mft_tensor *const *named, int n,
                                         const char *const *metadata);

/* The same for what does not fit into memory at once: first all names, dtypes and shapes, then
 * tensor by tensor, in any order, each once. */
typedef struct mft_safetensors_writer mft_safetensors_writer;        /* held; destroying the context aborts it */
typedef struct mft_safetensors_spec {
    const char *name;
    mft_dtype   dtype;
    int         ndim;
    int64_t     shape[MFT_MAX_DIMS];
} mft_safetensors_spec;

MFT_API mft_status mft_safetensors_write_begin (mft_context *ctx, const char *path, const mft_safetensors_spec *specs, int n,
                                                const char *const *metadata, mft_safetensors_writer **out);
/* The bytes of specs[index], converted to its dtype as mft_safetensors_read does. */
MFT_API mft_status mft_safetensors_write_tensor(mft_safetensors_writer *w, int index, const mft_tensor *t);
/* A piece of it: rows, along the first dimension, that follow those written before. */
MFT_API mft_status mft_safetensors_write_rows  (mft_safetensors_writer *w, int index, const mft_tensor *t);
/* Puts the file in its place and ends the writer, also when it fails (IO; INVALID_ARGUMENT: a tensor
 * was never written; or the first failure of mft_safetensors_write_tensor). */
MFT_API mft_status mft_safetensors_write_commit(mft_safetensors_writer *w);
/* Ends the writer and removes what it wrote. NULL does nothing. */
MFT_API void       mft_safetensors_write_abort (mft_safetensors_writer *w);

#endif /* MFT_SAFETENSORS_H */


/* ############################################################################## *
 *                               IMPLEMENTATION                                   *
 * ############################################################################## */
#if defined(MFT_IMPLEMENTATION) && !defined(MFT_SAFETENSORS_IMPLEMENTED)
#define MFT_SAFETENSORS_IMPLEMENTED

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <sys/stat.h>
#include <sys/types.h>
#ifdef _WIN32
#  define WIN32_LEAN_AND_MEAN
#  ifndef NOMINMAX
#    define NOMINMAX
#  endif
#  include <windows.h>
#  include <direct.h>
#  include <io.h>
#  include <process.h>
#  ifndef MFT_NO_MMAP
#    define MFT_NO_MMAP
#  endif
#else
#  include <dirent.h>
#  include <sys/file.h>
#  include <unistd.h>
#  ifndef MFT_NO_MMAP
#    include <sys/mman.h>
#  endif
#endif

/* ==============================================================================
 * MARK: - [FILE] Reading, mapping, writing so that a crash loses nothing
 *
 *   in    a path, UTF-8 everywhere
 *   out   bytes; every failure's message has the path and the system's reason
 *   rule  the system is called in the first part only, one small function per need, once for
 *         POSIX and once for Windows; the rest of the library calls these
 * ============================================================================== */

/* A path for a message: its end, when it is too long to leave room for the rest. */
static const char *mft__path(const char *path)
{
    size_t n = strlen(path);
    return n > 400 ? path + n - 400 : path;
}

/* ---- the system ---- */
typedef enum mft__path_kind { MFT__NO_PATH, MFT__FILE, MFT__DIRECTORY, MFT__OTHER_PATH } mft__path_kind;
typedef enum mft__open_mode { MFT__OPEN_READ, MFT__OPEN_NEW, MFT__OPEN_SCRATCH } mft__open_mode;     /* NEW, SCRATCH: must not exist yet; SCRATCH: to read too */

#ifdef _WIN32

/* Windows counts paths in UTF-16. 0 with errno set if it does not fit. */
typedef struct mft__wide { wchar_t s[1024]; } mft__wide;
static int mft__widen(const char *path, mft__wide *out)
{
    if (MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, out->s, 1024) > 0) return 1;
    errno = ENAMETOOLONG;
    return 0;
}

static mft__path_kind mft__os_kind(const char *path, uint64_t *out_bytes)
{
    struct _stat64 st;
    mft__wide      w;
    if (!mft__widen(path, &w) || _wstat64(w.s, &st) != 0) return MFT__NO_PATH;
    *out_bytes = (uint64_t)st.st_size;
    return st.st_mode & _S_IFDIR ? MFT__DIRECTORY : st.st_mode & _S_IFREG ? MFT__FILE : MFT__OTHER_PATH;
}

/* When it was last changed, in seconds since 1970; 0: not known. */
MFT__UNUSED static int64_t mft__os_modified(const char *path)
{
    struct _stat64 st;
    mft__wide      w;
    return mft__widen(path, &w) && _wstat64(w.s, &st) == 0 ? (int64_t)st.st_mtime : 0;
}

static int mft__os_open(const char *path, mft__open_mode mode)
{
    mft__wide w;
    if (!mft__widen(path, &w)) return -1;
    return mode == MFT__OPEN_READ ? _wopen(w.s, _O_RDONLY | _O_BINARY | _O_NOINHERIT)
                                  : _wopen(w.s, _O_WRONLY | _O_CREAT | _O_EXCL | _O_BINARY | _O_NOINHERIT, _S_IREAD | _S_IWRITE);
}

static int     mft__os_seek (int fd, uint64_t at)                        { return _lseeki64(fd, (__int64)at, SEEK_SET) >= 0; }
static int64_t mft__os_read (int fd, void *dst, size_t bytes)            { return _read(fd, dst, (unsigned)bytes); }
static int64_t mft__os_write(int fd, const void *src, size_t bytes)      { return _write(fd, src, (unsigned)bytes); }
static int     mft__os_sync (int fd)                                     { return _commit(fd) == 0; }
static int     mft__os_close(int fd)                                     { return _close(fd) == 0; }
static long    mft__os_process(void)                                     { return (long)_getpid(); }
MFT__UNUSED static int mft__os_hold(const char *dir)                            { (void)dir; return -1; }

static int mft__os_remove(const char *path)
{
    mft__wide w;
    return mft__widen(path, &w) && _wremove(w.s) == 0;
}

static int mft__os_rename(const char *from, const char *to)
{
    mft__wide a, b;
    if (!mft__widen(from, &a) || !mft__widen(to, &b)) return 0;
    if (MoveFileExW(a.s, b.s, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH)) return 1;
    errno = GetLastError() == ERROR_FILE_NOT_FOUND ? ENOENT : EACCES;
    return 0;
}

static int mft__os_make_dir(const char *path)
{
    mft__wide w;
    return mft__widen(path, &w) && _wmkdir(w.s) == 0;
}

static int mft__os_remove_dir(const char *path)
{
    mft__wide w;
    return mft__widen(path, &w) && _wrmdir(w.s) == 0;
}

/* A file that some process has open cannot be removed, so trying is asking; who writes a directory is not known. */
static int mft__os_abandoned(const char *path)
{
    uint64_t bytes;
    return mft__os_kind(path, &bytes) == MFT__FILE;
}

static int mft__os_sync_dir(const char *path) { (void)path; return 1; }   /* MOVEFILE_WRITE_THROUGH has done it */

static int mft__is_separator(char c) { return c == '/' || c == '\\'; }

/* The names in a directory, one by one. */
typedef struct mft__listing { HANDLE h; WIN32_FIND_DATAW found; int first; char name[1024]; } mft__listing;

static int mft__os_list(const char *path, mft__listing *l)
{
    mft__wide w;
    size_t    n;
    if (!mft__widen(path, &w)) return 0;
    n = wcslen(w.s);
    if (n + 3 > 1024) { errno = ENAMETOOLONG; return 0; }
    memcpy(w.s + n, L"\\*", 3 * sizeof *w.s);
    l->h = FindFirstFileW(w.s, &l->found);
    l->first = 1;
    if (l->h == INVALID_HANDLE_VALUE) { errno = GetLastError() == ERROR_PATH_NOT_FOUND ? ENOENT : EACCES; return 0; }
    return 1;
}

static const char *mft__os_list_next(mft__listing *l)
{
    if (!l->first && !FindNextFileW(l->h, &l->found)) { errno = GetLastError() == ERROR_NO_MORE_FILES ? 0 : EIO; return NULL; }
    l->first = 0;
    if (WideCharToMultiByte(CP_UTF8, 0, l->found.cFileName, -1, l->name, (int)sizeof l->name, NULL, NULL) <= 0) l->name[0] = '\0';
    return l->name;
}

static void mft__os_list_end(mft__listing *l) { FindClose(l->h); }

#else /* POSIX */

/* Strict -std=c99 hides these two; the types are POSIX's and everybody's. */
#  ifndef __cplusplus
extern int fsync(int fd);
#    ifndef MFT_NO_MMAP
extern int madvise(void *address, size_t bytes, int advice);
#      if defined(__STRICT_ANSI__) && !defined(__APPLE__)
extern int posix_fallocate(int fd, off_t from, off_t bytes);
#      endif
#    endif
#  endif

static mft__path_kind mft__os_kind(const char *path, uint64_t *out_bytes)
{
    struct stat st;
    if (stat(path, &st) != 0) return MFT__NO_PATH;
    *out_bytes = (uint64_t)st.st_size;
    return S_ISDIR(st.st_mode) ? MFT__DIRECTORY : S_ISREG(st.st_mode) ? MFT__FILE : MFT__OTHER_PATH;
}

/* When it was last changed, in seconds since 1970; 0: not known. */
MFT__UNUSED static int64_t mft__os_modified(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 ? (int64_t)st.st_mtime : 0;
}

static int mft__os_open(const char *path, mft__open_mode mode)
{
    int fd, flags = mode == MFT__OPEN_READ ? O_RDONLY : (mode == MFT__OPEN_NEW ? O_WRONLY : O_RDWR) | O_CREAT | O_EXCL;
#  ifdef O_CLOEXEC
    flags |= O_CLOEXEC;
#  endif
    do fd = open(path, flags, 0666); while (fd < 0 && errno == EINTR);
    if (fd >= 0 && mode == MFT__OPEN_NEW) flock(fd, LOCK_EX | LOCK_NB);     /* in use, as long as we live: see mft__os_abandoned */
    return fd;
}

/* Marks a directory as in use until the descriptor is closed; -1 where that cannot be done. */
MFT__UNUSED static int mft__os_hold(const char *dir)
{
    int fd = mft__os_open(dir, MFT__OPEN_READ);
    if (fd >= 0) flock(fd, LOCK_EX | LOCK_NB);
    return fd;
}

/* Has the process that made this temporary file or directory ended? Its lock ended with it, whatever became of its number. */
static int mft__os_abandoned(const char *path)
{
    int ended, fd = mft__os_open(path, MFT__OPEN_READ);
    if (fd < 0) return 0;
    ended = flock(fd, LOCK_SH | LOCK_NB) == 0;
    close(fd);
    return ended;
}

static int     mft__os_seek (int fd, uint64_t at)                        { return lseek(fd, (off_t)at, SEEK_SET) >= 0; }
static int64_t mft__os_read (int fd, void *dst, size_t bytes)            { return (int64_t)read(fd, dst, bytes); }
static int64_t mft__os_write(int fd, const void *src, size_t bytes)      { return (int64_t)write(fd, src, bytes); }
static int     mft__os_sync (int fd)                                     { return fsync(fd) == 0; }
static int     mft__os_close(int fd)                                     { return close(fd) == 0; }
static long    mft__os_process(void)                                     { return (long)getpid(); }
static int     mft__os_remove(const char *path)                          { return remove(path) == 0; }
static int     mft__os_rename(const char *from, const char *to)          { return rename(from, to) == 0; }
static int     mft__os_make_dir(const char *path)                        { return mkdir(path, 0777) == 0; }
static int     mft__os_remove_dir(const char *path)                      { return rmdir(path) == 0; }
static int     mft__is_separator(char c)                                 { return c == '/'; }

/* So that the rename itself is on the disk. Directories that cannot be opened or synced (some file
 * systems have no such thing) are not a failure; an I/O error is. */
static int mft__os_sync_dir(const char *path)
{
    int ok = 1, fd = mft__os_open(path, MFT__OPEN_READ);
    if (fd < 0) return 1;
    if (fsync(fd) != 0 && errno == EIO) ok = 0;
    close(fd);
    return ok;
}

/* The names in a directory, one by one; after the last NULL with errno 0. */
typedef struct mft__listing { DIR *dir; } mft__listing;

static int mft__os_list(const char *path, mft__listing *l) { l->dir = opendir(path); return l->dir != NULL; }

static const char *mft__os_list_next(mft__listing *l)
{
    struct dirent *e;
    errno = 0;
    e = readdir(l->dir);
    return e ? e->d_name : NULL;
}

static void mft__os_list_end(mft__listing *l) { closedir(l->dir); }

#endif

/* ---- paths ---- */

/* Behind the last separator. */
static const char *mft__file_name(const char *path)
{
    const char *p = path + strlen(path);
    while (p > path && !mft__is_separator(p[-1])) p--;
    return p;
}

/* DIR/NAME; freed with mft__strfree. NULL with the sentence set. */
MFT__UNUSED static char *mft__path_join(mft_context *ctx, const char *dir, const char *name)
{
    size_t a = strlen(dir), b = strlen(name), slash = a && !mft__is_separator(dir[a - 1]);
    char  *p = (char *)mft__alloc(ctx, a + slash + b + 1);
    if (!p) return NULL;
    memcpy(p, dir, a);
    if (slash) p[a] = '/';
    memcpy(p + a + slash, name, b + 1);
    return p;
}

/* The directory a path is in: "." if it names none. Freed with mft__strfree. */
MFT__UNUSED static char *mft__path_dir(mft_context *ctx, const char *path)
{
    size_t n = strlen(path);
    char  *p;
    while (n && !mft__is_separator(path[n - 1])) n--;
    while (n > 1 && mft__is_separator(path[n - 1])) n--;
    if (!n) return mft__strdup(ctx, ".");
    p = (char *)mft__alloc(ctx, n + 1);
    if (!p) return NULL;
    memcpy(p, path, n);
    p[n] = '\0';
    return p;
}

static mft__path_kind mft__file_kind(const char *path)
{
    uint64_t bytes;
    return mft__os_kind(path, &bytes);
}

/* Makes the directory and those above it. That it is there already is fine. */
MFT__UNUSED static mft_status mft__make_dirs(mft_context *ctx, const char *path)
{
    size_t i, n = strlen(path);
    char  *p;
    if (mft__file_kind(path) == MFT__DIRECTORY) return MFT_OK;
    p = mft__strdup(ctx, path);
    if (!p) return MFT_ERR_OUT_OF_MEMORY;
    for (i = 1; i <= n; i++) {
        char c = p[i];
        int  reason;
        if (i < n && !mft__is_separator(c)) continue;
        p[i] = '\0';
        reason = mft__os_make_dir(p) ? 0 : errno;
        if (reason && mft__file_kind(p) != MFT__DIRECTORY) {
            mft__fail(ctx, MFT_ERR_IO, "%s: cannot make this directory: %s", mft__path(p),
                      mft__file_kind(p) == MFT__NO_PATH ? strerror(reason) : "there is a file of that name");
            p[i] = c;
            mft__strfree(ctx, p);
            return MFT_ERR_IO;
        }
        p[i] = c;
    }
    mft__strfree(ctx, p);
    return MFT_OK;
}

/* ---- directories ---- */

/* In place, n log n, neither recursive nor allocating, which qsort may be. `swap` has `size` bytes. */
static void mft__sort(void *base, size_t n, size_t size, int (*less)(const void *a, const void *b), void *swap)
{
    char  *p = (char *)base;
    size_t begin = n / 2, end = n;
    while (end > 1) {                                                /* a heap: first built, then taken apart */
        size_t i, child;
        if (begin) begin--;
        else {
            end--;
            memcpy(swap, p, size); memcpy(p, p + end * size, size); memcpy(p + end * size, swap, size);
        }
        for (i = begin; (child = 2 * i + 1) < end; i = child) {
            if (child + 1 < end && less(p + child * size, p + (child + 1) * size)) child++;
            if (!less(p + i * size, p + child * size)) break;
            memcpy(swap, p + i * size, size); memcpy(p + i * size, p + child * size, size); memcpy(p + child * size, swap, size);
        }
    }
}

static int mft__text_before(const void *a, const void *b)
{
    const char *x, *y;
    memcpy(&x, a, sizeof x); memcpy(&y, b, sizeof y);
    return strcmp(x, y) < 0;
}

static int mft__ends_with(const char *text, const char *end)
{
    size_t a = strlen(text), b = strlen(end);
    return a >= b && memcmp(text + a - b, end, b) == 0;
}

MFT__UNUSED static void mft__dir_list_free(mft_context *ctx, char **names, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) mft__strfree(ctx, names[i]);
    if (names) mft__free(ctx, names, n * sizeof *names);
}

/* The names in a directory that end in `suffix` ("" for all, which leaves out "." and ".."), in order
 * of their bytes; freed with mft__dir_list_free. None at all is no failure: *out_names is NULL then. */
MFT__UNUSED static mft_status mft__dir_list(mft_context *ctx, const char *dir, const char *suffix, char ***out_names, size_t *out_n)
{
    mft__listing l;
    const char  *name;
    char       **names = NULL, *swap;
    void        *list = NULL;
    size_t       n = 0, cap = 0;
    int          reason;
    mft_status   s = MFT_OK;

    *out_names = NULL; *out_n = 0;
    if (!mft__os_list(dir, &l)) return mft__fail(ctx, MFT_ERR_IO, "%s: cannot be listed: %s", mft__path(dir), strerror(errno));
    while ((name = mft__os_list_next(&l)) != NULL) {
        char *copy;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || !mft__ends_with(name, suffix)) continue;
        copy = mft__strdup(ctx, name);
        if (!copy || !mft__grow(ctx, &list, &cap, n + 1, sizeof copy)) { mft__strfree(ctx, copy); s = MFT_ERR_OUT_OF_MEMORY; break; }
        ((char **)list)[n++] = copy;
    }
    reason = errno;
    mft__os_list_end(&l);
    if (s == MFT_OK && reason) s = mft__fail(ctx, MFT_ERR_IO, "%s: cannot be listed: %s", mft__path(dir), strerror(reason));
    if (s == MFT_OK && n) {                                          /* an array of exactly n, so that it is freed by its count */
        names = (char **)mft__alloc(ctx, n * sizeof *names);
        if (!names) s = MFT_ERR_OUT_OF_MEMORY;
    }
    if (s == MFT_OK && n) {
        memcpy(names, list, n * sizeof *names);
        mft__sort(names, n, sizeof *names, mft__text_before, &swap);
        *out_names = names; *out_n = n;
    } else {
        while (n) mft__strfree(ctx, ((char **)list)[--n]);
    }
    mft__free(ctx, list, cap * sizeof *names);
    return s;
}

/* Removes a directory of ours with the files in it; what lies in directories below stays. */
MFT__UNUSED static void mft__dir_remove(mft_context *ctx, const char *dir)
{
    mft__listing l;
    const char  *name;
    if (!mft__os_list(dir, &l)) return;
    while ((name = mft__os_list_next(&l)) != NULL) {
        char *path = mft__path_join(ctx, dir, name);
        if (path && mft__file_kind(path) != MFT__DIRECTORY) mft__os_remove(path);
        mft__strfree(ctx, path);
    }
    mft__os_list_end(&l);
    mft__os_remove_dir(dir);
}

/* Is the name PREFIX*.tmp-PROCESS-NUMBER, as temporary neighbours are called? */
static int mft__is_temporary(const char *name, const char *prefix, size_t n_prefix)
{
    const char *p = NULL, *at = name;
    int         parts;
    if (strncmp(name, prefix, n_prefix) != 0) return 0;
    while ((at = strstr(at, ".tmp-")) != NULL) { p = at; at += 5; }      /* the last one */
    if (!p || (size_t)(p - name) < n_prefix) return 0;
    for (parts = 0, p += 4; parts < 2; parts++) {
        if (*p++ != '-' || *p < '0' || *p > '9') return 0;
        while (*p >= '0' && *p <= '9') p++;
    }
    return !*p;
}

/* Removes what killed processes left in `dir` of things whose names begin so. That it cannot is no failure. */
static void mft__remove_leftovers(mft_context *ctx, const char *dir, const char *prefix)
{
    mft__listing l;
    const char  *name;
    size_t       n = strlen(prefix);
    if (!mft__os_list(dir, &l)) return;
    while ((name = mft__os_list_next(&l)) != NULL) {
        char *path = mft__is_temporary(name, prefix, n) ? mft__path_join(ctx, dir, name) : NULL;
        if (path && mft__os_abandoned(path)) {
            if (mft__file_kind(path) == MFT__DIRECTORY) mft__dir_remove(ctx, path); else mft__os_remove(path);
        }
        mft__strfree(ctx, path);
    }
    mft__os_list_end(&l);
}

/* ---- reading ---- */
typedef struct mft__file {
    mft_context *ctx;
    const char  *path;                      /* for messages; borrowed                                */
    uint64_t     bytes;
    void        *handle;                    /* the mft_io's, if the context has one                  */
    int          fd;
} mft__file;

/* Whether a file of that name can be opened, through the context's mft_io if it has one. */
MFT__UNUSED static int mft__file_exists(mft_context *ctx, const char *path)
{
    uint64_t bytes = 0;
    void    *h;
    if (!ctx->io.open) return mft__file_kind(path) == MFT__FILE;
    h = ctx->io.open(ctx->io.user, path, &bytes);
    if (h) ctx->io.close(ctx->io.user, h);
    return h != NULL;
}

/* Opens for reading; `path` must stay until the close. */
static mft_status mft__file_open(mft_context *ctx, const char *path, mft__file *f)
{
    f->ctx = ctx; f->path = path; f->bytes = 0; f->handle = NULL; f->fd = -1;
    if (ctx->io.open) {
        f->handle = ctx->io.open(ctx->io.user, path, &f->bytes);
        return f->handle ? MFT_OK : mft__fail(ctx, MFT_ERR_IO, "%s: cannot be opened", mft__path(path));
    }
    errno = 0;
    switch (mft__os_kind(path, &f->bytes)) {
    case MFT__DIRECTORY:  return mft__fail(ctx, MFT_ERR_IO, "%s: is a directory, not a file", mft__path(path));
    case MFT__OTHER_PATH: return mft__fail(ctx, MFT_ERR_IO, "%s: is not a regular file", mft__path(path));
    case MFT__NO_PATH:    return mft__fail(ctx, MFT_ERR_IO, "%s: cannot be read: %s", mft__path(path), strerror(errno));
    case MFT__FILE: break;
    }
    f->fd = mft__os_open(path, MFT__OPEN_READ);
    return f->fd >= 0 ? MFT_OK : mft__fail(ctx, MFT_ERR_IO, "%s: cannot be read: %s", mft__path(path), strerror(errno));
}

static void mft__file_close(mft__file *f)
{
    if (f->handle) f->ctx->io.close(f->ctx->io.user, f->handle);
    if (f->fd >= 0) mft__os_close(f->fd);
    f->handle = NULL; f->fd = -1;
}

/* Exactly `bytes` from `offset`, or IO. */
static mft_status mft__file_read(mft__file *f, uint64_t offset, void *dst, size_t bytes)
{
    char *p = (char *)dst;
    if (!f->handle && bytes && !mft__os_seek(f->fd, offset))
        return mft__fail(f->ctx, MFT_ERR_IO, "%s: cannot go to byte %llu: %s", mft__path(f->path), (unsigned long long)offset, strerror(errno));
    while (bytes) {
        size_t  part = bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30;      /* systems take 2 GB at most */
        int64_t got = f->handle ? (int64_t)f->ctx->io.read(f->ctx->io.user, f->handle, offset, p, part) : mft__os_read(f->fd, p, part);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return mft__fail(f->ctx, MFT_ERR_IO, "%s: cannot read at byte %llu: %s", mft__path(f->path), (unsigned long long)offset, strerror(errno));
        if (got == 0 || (uint64_t)got > part)
            return mft__fail(f->ctx, MFT_ERR_IO, "%s: ends at byte %llu, was %llu long when opened", mft__path(f->path),
                             (unsigned long long)offset, (unsigned long long)f->bytes);
        p += got; offset += (uint64_t)got; bytes -= (size_t)got;
    }
    return MFT_OK;
}

/* A whole file of at most max_bytes, with a NUL after it; freed with mft__free(ctx, text, bytes + 1). */
static mft_status mft__file_read_all(mft_context *ctx, const char *path, size_t max_bytes, char **out_text, size_t *out_bytes)
{
    mft__file  f;
    mft_status s = mft__file_open(ctx, path, &f);
    char      *text;
    if (s != MFT_OK) return s;
    if (f.bytes >= max_bytes) {
        s = mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: has %llu bytes, more than the %llu that a file of its kind may have",
                      mft__path(path), (unsigned long long)f.bytes, (unsigned long long)max_bytes);
        mft__file_close(&f);
        return s;
    }
    text = (char *)mft__alloc(ctx, (size_t)f.bytes + 1);
    s = text ? mft__file_read(&f, 0, text, (size_t)f.bytes) : MFT_ERR_OUT_OF_MEMORY;
    mft__file_close(&f);
    if (s != MFT_OK) { if (text) mft__free(ctx, text, (size_t)f.bytes + 1); return s; }
    text[f.bytes] = '\0';
    *out_text = text; *out_bytes = (size_t)f.bytes;
    return MFT_OK;
}

/* A file's length and a hash of its bytes, to tell whether it is still the same one. */
MFT__UNUSED static mft_status mft__file_hash(mft_context *ctx, const char *path, uint64_t *out_bytes, uint64_t *out_hash)
{
    enum { PART = 1 << 16 };
    mft__file      f;
    unsigned char *part;
    uint64_t       at, h = 0x9e3779b97f4a7c15u, word;
    size_t         n = 0, i;
    mft_status     s = mft__file_open(ctx, path, &f);
    if (s != MFT_OK) return s;
    part = (unsigned char *)mft__alloc(ctx, PART);
    if (!part) s = MFT_ERR_OUT_OF_MEMORY;
    for (at = 0; s == MFT_OK && at < f.bytes; at += n) {
        n = f.bytes - at < PART ? (size_t)(f.bytes - at) : (size_t)PART;
        memset(part + n, 0, n % 8 ? 8 - n % 8 : 0);
        s = mft__file_read(&f, at, part, n);
        for (i = 0; s == MFT_OK && i < n; i += 8) {
            memcpy(&word, part + i, 8);
            h = (h ^ word) * 0xff51afd7ed558ccdu;
            h ^= h >> 32;
        }
    }
    *out_bytes = f.bytes; *out_hash = h ^ f.bytes;
    if (part) mft__free(ctx, part, PART);
    mft__file_close(&f);
    return s;
}

/* ---- mapping ---- */
#ifndef MFT_NO_MMAP

#  ifndef MADV_WILLNEED                     /* hidden by strict -std=c99; the same on Linux, BSD and Apple */
#    define MADV_WILLNEED 3
#    define MADV_DONTNEED 4
#  endif

/* The whole of an open file, read-only, which may then be closed. NULL with the sentence set. */
static const char *mft__file_map(mft__file *f)
{
    void *p;
    if (f->bytes > (size_t)-1 / 2) {
        mft__fail(f->ctx, MFT_ERR_OUT_OF_MEMORY, "%s: %llu bytes do not fit this machine's address space", mft__path(f->path), (unsigned long long)f->bytes);
        return NULL;
    }
    p = mmap(NULL, (size_t)f->bytes, PROT_READ, MAP_SHARED, f->fd, 0);
    if (p != MAP_FAILED) return (const char *)p;
    mft__fail(f->ctx, MFT_ERR_OUT_OF_MEMORY, "%s: cannot map its %llu bytes: %s", mft__path(f->path), (unsigned long long)f->bytes, strerror(errno));
    return NULL;
}

static void mft__file_unmap(const char *base, uint64_t bytes)
{
    if (base) munmap((void *)(uintptr_t)base, (size_t)bytes);
}

/* Says that [p, p + bytes) of a mapping will be read soon (fetch) or not for long (drop its pages;
 * they come back from the file). A hint: failing changes nothing. */
static void mft__file_advise(const char *p, uint64_t bytes, int fetch)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)p / page * page;
    if (bytes) madvise((void *)begin, (size_t)((uintptr_t)p + bytes - begin), fetch ? MADV_WILLNEED : MADV_DONTNEED);
}

/* Brings [p, p + bytes) of a mapping into memory at once, which is cheaper than one fault after the other, and says
 * instead of raising a signal when the file or the disk has them no more: 0 with errno. Systems without this say yes. */
static int mft__file_fetch(const char *p, uint64_t bytes)
{
#  ifdef __linux__
    enum { POPULATE_READ = 22 };            /* Linux 5.14; headers may be older */
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)p / page * page;
    return madvise((void *)begin, (size_t)((uintptr_t)p + bytes - begin), POPULATE_READ) == 0 || (errno != EFAULT && errno != EIO);
#  else
    (void)p; (void)bytes;
    return 1;
#  endif
}

/* Addresses for so many bytes, which take memory only where they are written and until they are dropped; NULL: no. */
static const char *mft__file_room(uint64_t bytes)
{
#  if defined(MAP_ANONYMOUS)
    enum { ANONYMOUS = MAP_ANONYMOUS };
#  elif defined(__linux__)                  /* hidden by strict -std=c99 */
    enum { ANONYMOUS = 0x20 };
#  else
    enum { ANONYMOUS = 0x1000 };            /* BSD and Apple */
#  endif
    void *p = bytes > (size_t)-1 / 2 ? MAP_FAILED : mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : (const char *)p;
}

/* How long the file is now. */
static uint64_t mft__file_length(const mft__file *f)
{
    struct stat st;
    return fstat(f->fd, &st) == 0 ? (uint64_t)st.st_size : 0;
}

/* Gives bytes [from, from + bytes) of a file their place on the disk. 0 with errno set if there is none: writing to a
 * mapping without one would end the process. */
static int mft__file_reserve(int fd, uint64_t from, uint64_t bytes)
{
#  ifdef __APPLE__
    fstore_t place;
    memset(&place, 0, sizeof place);
    place.fst_flags = F_ALLOCATEALL; place.fst_posmode = F_PEOFPOSMODE; place.fst_length = (off_t)bytes;
    return fcntl(fd, F_PREALLOCATE, &place) != -1 && ftruncate(fd, (off_t)(from + bytes)) == 0;
#  else
    int reason;
    do reason = posix_fallocate(fd, (off_t)from, (off_t)bytes); while (reason == EINTR);
    errno = reason;
    return !reason;
#  endif
}

#else

static void mft__file_unmap(const char *base, uint64_t bytes) { (void)base; (void)bytes; }
static void mft__file_advise(const char *p, uint64_t bytes, int fetch) { (void)p; (void)bytes; (void)fetch; }
static const char *mft__file_room(uint64_t bytes) { (void)bytes; return NULL; }

#endif

static void mft__file_drop(const char *p, uint64_t bytes) { mft__file_advise(p, bytes, 0); }

/* ---- state files: memory whose pages can go to the disk, when they are dropped, and come back ----
 * The file has lost its name before the first byte is in it: its place on the disk is free again when the process ends,
 * in whatever way, and nobody takes it for a checkpoint. */
typedef struct mft__statefile_run { char *base; size_t bytes; } mft__statefile_run;

typedef struct mft__statefile {
    mft_context    *ctx;
    char           *dir;
    int             fd;
    uint64_t        bytes;                  /* of the file, whole pages                              */
    mft__statefile_run *runs;                   /* what was taken of it, each mapped by itself           */
    size_t          n_runs, cap;
} mft__statefile;

MFT__UNUSED static void mft__statefile_close(mft__statefile *st)
{
    size_t i;
    if (!st) return;
    for (i = 0; i < st->n_runs; i++) mft__file_unmap(st->runs[i].base, st->runs[i].bytes);
    if (st->fd >= 0) mft__os_close(st->fd);
    mft__free(st->ctx, st->runs, st->cap * sizeof *st->runs);
    mft__strfree(st->ctx, st->dir);
    mft__free(st->ctx, st, sizeof *st);
}

#ifndef MFT_NO_MMAP
/* A file of no bytes yet in a directory, which is made if need be. */
MFT__UNUSED static mft_status mft__statefile_open(mft_context *ctx, const char *dir, mft__statefile **out)
{
    mft__statefile *st = (mft__statefile *)mft__alloc_zero(ctx, sizeof *st);
    char        name[80], *path = NULL;
    int         k, reason = EEXIST;
    mft_status  s = MFT_ERR_OUT_OF_MEMORY;
    *out = NULL;
    if (!st) return s;
    st->ctx = ctx; st->fd = -1;
    if ((st->dir = mft__strdup(ctx, dir)) != NULL) s = mft__make_dirs(ctx, dir);
    if (s == MFT_OK) mft__remove_leftovers(ctx, dir, "mft-state");
    for (k = 0; k < 100 && s == MFT_OK && st->fd < 0 && reason == EEXIST; k++) {
        snprintf(name, sizeof name, "mft-state.tmp-%ld-%d", mft__os_process(), k);
        if (!(path = mft__path_join(ctx, dir, name))) { s = MFT_ERR_OUT_OF_MEMORY; break; }
        st->fd = mft__os_open(path, MFT__OPEN_SCRATCH);
        reason = errno;
        if (st->fd >= 0) mft__os_remove(path);
        mft__strfree(ctx, path);
    }
    if (s == MFT_OK && st->fd < 0) s = mft__fail(ctx, MFT_ERR_IO, "%s: a state file cannot be made in it: %s", mft__path(dir), strerror(reason));
    if (s != MFT_OK) { mft__statefile_close(st); return s; }
    *out = st;
    return MFT_OK;
}

/* Zeroed bytes at the end of the file, on a page of their own, until it is closed: a context's take_pages. NULL with
 * the sentence set. */
MFT__UNUSED static void *mft__statefile_take(void *state, size_t bytes)
{
    mft__statefile     *st = (mft__statefile *)state;
    size_t              page = (size_t)sysconf(_SC_PAGESIZE);
    mft__statefile_run *run;
    void               *p;
    bytes = (bytes + page - 1) / page * page;                   /* of a tensor's layout: far from wrapping */
    p = st->runs;
    if (!mft__grow(st->ctx, &p, &st->cap, st->n_runs + 1, sizeof *st->runs)) return NULL;
    st->runs = (mft__statefile_run *)p;
    if (!mft__file_reserve(st->fd, st->bytes, bytes)) {
        mft__fail(st->ctx, MFT_ERR_IO, "%s: no room for %llu bytes more of the state file, which has %llu: %s", mft__path(st->dir), (unsigned long long)bytes,
                  (unsigned long long)st->bytes, strerror(errno));
        return NULL;
    }
    p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, st->fd, (off_t)st->bytes);
    if (p == MAP_FAILED) {
        mft__fail(st->ctx, MFT_ERR_OUT_OF_MEMORY, "%s: cannot map %llu bytes of the state file: %s", mft__path(st->dir), (unsigned long long)bytes, strerror(errno));
        return NULL;
    }
    st->bytes += bytes;
    run = &st->runs[st->n_runs++];
    run->base = (char *)p; run->bytes = bytes;
    return p;
}
#else
MFT__UNUSED static mft_status mft__statefile_open(mft_context *ctx, const char *dir, mft__statefile **out)
{
    *out = NULL;
    return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: no state file: this build maps no files", mft__path(dir));
}
MFT__UNUSED static void *mft__statefile_take(void *state, size_t bytes) { (void)state; (void)bytes; return NULL; }
#endif

/* Drops all of its pages. */
MFT__UNUSED static void mft__statefile_drop(const mft__statefile *st)
{
    size_t i;
    for (i = 0; st && i < st->n_runs; i++) mft__file_advise(st->runs[i].base, st->runs[i].bytes, 0);
}

/* ---- writing ----
 *
 * begin makes PATH.tmp-..., put fills it, commit syncs and renames it to PATH, abort removes it. The
 * first failure is kept: put after it does nothing, commit returns it. One of commit and abort must
 * follow a begin that succeeded. */
enum { MFT__WRITER_BUFFER = 1 << 16 };

typedef struct mft__writer {
    mft_context *ctx;
    char        *path, *dir, *temp, *buffer;
    size_t       temp_bytes;                /* of the temporary name's memory                        */
    int          fd;
    size_t       used;                      /* of the buffer                                         */
    uint64_t     at;                        /* where the buffer goes                                 */
    mft_status   status;
} mft__writer;

static void mft__writer_end(mft__writer *w)
{
    if (w->fd >= 0) mft__os_close(w->fd);
    mft__strfree(w->ctx, w->path);
    mft__strfree(w->ctx, w->dir);
    mft__free(w->ctx, w->temp, w->temp_bytes);
    mft__free(w->ctx, w->buffer, MFT__WRITER_BUFFER);
    w->path = w->dir = w->temp = w->buffer = NULL; w->fd = -1;
}

static mft_status mft__writer_begin(mft_context *ctx, const char *path, mft__writer *w)
{
    int k, reason = 0;
    memset(w, 0, sizeof *w);
    w->ctx = ctx; w->fd = -1;
    if (mft__file_kind(path) == MFT__DIRECTORY) return mft__fail(ctx, MFT_ERR_IO, "%s: is a directory, cannot become a file", mft__path(path));
    w->temp_bytes = strlen(path) + 48;
    w->path   = mft__strdup(ctx, path);
    w->dir    = w->path ? mft__path_dir(ctx, path) : NULL;
    w->temp   = w->dir  ? (char *)mft__alloc(ctx, w->temp_bytes) : NULL;
    w->buffer = w->temp ? (char *)mft__alloc(ctx, MFT__WRITER_BUFFER) : NULL;
    if (!w->buffer) { mft__writer_end(w); return MFT_ERR_OUT_OF_MEMORY; }
    mft__remove_leftovers(ctx, w->dir, mft__file_name(path));
    for (k = 0; k < 100 && w->fd < 0; k++) {                         /* a living process may be writing the same file */
        snprintf(w->temp, w->temp_bytes, "%s.tmp-%ld-%d", path, mft__os_process(), k);
        w->fd  = mft__os_open(w->temp, MFT__OPEN_NEW);
        reason = errno;
        if (w->fd < 0 && reason != EEXIST) break;
    }
    if (w->fd < 0) {
        mft__fail(ctx, MFT_ERR_IO, "%s: cannot be written: %s", mft__path(path), strerror(reason));
        mft__writer_end(w);
        return MFT_ERR_IO;
    }
    return MFT_OK;
}

static mft_status mft__writer_fail(mft__writer *w, const char *what)
{
    w->status = mft__fail(w->ctx, MFT_ERR_IO, "%s: cannot be %s: %s", mft__path(w->path), what, strerror(errno));
    return w->status;
}

static void mft__writer_raw(mft__writer *w, const char *p, size_t bytes)
{
    while (bytes && w->status == MFT_OK) {
        int64_t n = mft__os_write(w->fd, p, bytes < ((size_t)1 << 30) ? bytes : (size_t)1 << 30);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENOSPC;
        if (n <= 0) { mft__writer_fail(w, "written"); return; }
        p += n; bytes -= (size_t)n; w->at += (uint64_t)n;
    }
}

static void mft__writer_flush(mft__writer *w)
{
    mft__writer_raw(w, w->buffer, w->used);
    w->used = 0;
}

static mft_status mft__writer_put(mft__writer *w, const void *data, size_t bytes)
{
    if (w->status != MFT_OK) return w->status;
    if (bytes > MFT__WRITER_BUFFER - w->used) mft__writer_flush(w);
    if (bytes > MFT__WRITER_BUFFER) mft__writer_raw(w, (const char *)data, bytes);
    else if (bytes) { memcpy(w->buffer + w->used, data, bytes); w->used += bytes; }
    return w->status;
}

/* The next put goes to that byte of the file. */
MFT__UNUSED static mft_status mft__writer_seek(mft__writer *w, uint64_t at)
{
    if (w->status != MFT_OK || at == w->at + w->used) return w->status;
    mft__writer_flush(w);
    if (w->status == MFT_OK && !mft__os_seek(w->fd, at)) return mft__writer_fail(w, "written");
    w->at = at;
    return w->status;
}

static void mft__writer_abort(mft__writer *w)
{
    if (w->fd >= 0) mft__os_close(w->fd);
    w->fd = -1;
    if (w->temp) mft__os_remove(w->temp);
    mft__writer_end(w);
}

static mft_status mft__writer_commit(mft__writer *w)
{
    mft_status s;
    if (w->status == MFT_OK) mft__writer_flush(w);
    if (w->status == MFT_OK && !mft__os_sync(w->fd)) mft__writer_fail(w, "synced");
    if (w->status == MFT_OK) {
        int closed = mft__os_close(w->fd);
        w->fd = -1;
        if (!closed) mft__writer_fail(w, "closed");
    }
    if (w->status == MFT_OK && !mft__os_rename(w->temp, w->path)) mft__writer_fail(w, "replaced");
    s = w->status;
    if (s != MFT_OK) { mft__writer_abort(w); return s; }
    if (!mft__os_sync_dir(w->dir)) s = mft__writer_fail(w, "synced to its directory");
    mft__writer_end(w);
    return s;
}

/* A whole file at once: the old one or the new one, never half of it. */
MFT__UNUSED static mft_status mft__file_write_all(mft_context *ctx, const char *path, const void *data, size_t bytes)
{
    mft__writer w;
    mft_status  s = mft__writer_begin(ctx, path, &w);
    if (s != MFT_OK) return s;
    mft__writer_put(&w, data, bytes);
    return mft__writer_commit(&w);
}

/* Makes the directory if need be and sees whether files can be made in it: to be asked before the
 * hours of work whose result goes there. */
MFT__UNUSED static mft_status mft__can_write_in(mft_context *ctx, const char *dir)
{
    mft__writer w;
    mft_status  s = mft__make_dirs(ctx, dir);
    char       *path;
    if (s != MFT_OK) return s;
    path = mft__path_join(ctx, dir, "write-test");
    if (!path) return MFT_ERR_OUT_OF_MEMORY;
    s = mft__writer_begin(ctx, path, &w);
    if (s == MFT_OK) mft__writer_abort(&w);
    mft__strfree(ctx, path);
    return s;
}

/* ==============================================================================
 * MARK: - [JSON] Scanner, tree, writer
 *
 *   in    bytes nobody has checked
 *   out   events (scanner), nodes (tree), text (writer)
 *   rule  no recursion, nesting is bounded, every byte is looked at before it is believed; the
 *         scanner allocates nothing, so that a tokenizer of 33 MB can be read straight off it
 * ============================================================================== */
enum { MFT__JSON_MAX_DEPTH = 256, MFT__JSON_MAX_NUMBER = 1000 };
#define MFT__JSON_MAX_BYTES ((size_t)1 << 28)

/* ---- UTF-8 ---- */

/* The length in bytes of the code point at p (p < end), and the code point; 0 if it is not UTF-8:
 * overlong, a surrogate, beyond U+10FFFF, cut off. */
static int mft__utf8_decode(const char *p, const char *end, uint32_t *out)
{
    const unsigned char *u = (const unsigned char *)p;
    size_t   left = (size_t)(end - p);
    uint32_t c = u[0];
    if (c < 0x80) { *out = c; return 1; }
    if (c < 0xe0) {
        if (c < 0xc2 || left < 2 || (u[1] & 0xc0) != 0x80) return 0;
        *out = (c & 31) << 6 | (u[1] & 63u);
        return 2;
    }
    if (c < 0xf0) {
        if (left < 3 || (u[1] & 0xc0) != 0x80 || (u[2] & 0xc0) != 0x80) return 0;
        c = (c & 15) << 12 | (u[1] & 63u) << 6 | (u[2] & 63u);
        if (c < 0x800 || (c >= 0xd800 && c < 0xe000)) return 0;
        *out = c;
        return 3;
    }
    if (c > 0xf4 || left < 4 || (u[1] & 0xc0) != 0x80 || (u[2] & 0xc0) != 0x80 || (u[3] & 0xc0) != 0x80) return 0;
    c = (c & 7) << 18 | (u[1] & 63u) << 12 | (u[2] & 63u) << 6 | (u[3] & 63u);
    if (c < 0x10000 || c > 0x10ffff) return 0;
    *out = c;
    return 4;
}

/* Writes a code point (no surrogate, at most U+10FFFF): 1 to 4 bytes, which it returns. */
static int mft__utf8_encode(uint32_t c, char *dst)
{
    if (c < 0x80)    { dst[0] = (char)c; return 1; }
    if (c < 0x800)   { dst[0] = (char)(0xc0 | c >> 6); dst[1] = (char)(0x80 | (c & 63)); return 2; }
    if (c < 0x10000) {
        dst[0] = (char)(0xe0 | c >> 12); dst[1] = (char)(0x80 | (c >> 6 & 63)); dst[2] = (char)(0x80 | (c & 63));
        return 3;
    }
    dst[0] = (char)(0xf0 | c >> 18); dst[1] = (char)(0x80 | (c >> 12 & 63));
    dst[2] = (char)(0x80 | (c >> 6 & 63)); dst[3] = (char)(0x80 | (c & 63));
    return 4;
}

/* Where the text stops being UTF-8; NULL if it never does. */
MFT__UNUSED static const char *mft__utf8_check(const char *text, size_t bytes)
{
    const char *p = text, *end = text + bytes;
    uint32_t    c;
    while (p < end) {
        int n = mft__utf8_decode(p, end, &c);
        if (!n) return p;
        p += n;
    }
    return NULL;
}

/* A name from outside, fit for a message: cut short, control characters and broken UTF-8 as '?'. */
typedef struct mft__name_text { char s[100]; } mft__name_text;
MFT__UNUSED static const char *mft__name(const char *name, size_t bytes, mft__name_text *text)
{
    const char *p = name, *end = name + bytes;
    size_t      at = 0;
    uint32_t    c;
    while (p < end) {
        int n = mft__utf8_decode(p, end, &c);
        if (at + 8 > sizeof text->s) { memcpy(text->s + at, "...", 3); at += 3; break; }
        if (!n || c < 0x20 || c == 0x7f) { text->s[at++] = '?'; p++; continue; }
        memcpy(text->s + at, p, (size_t)n);
        at += (size_t)n; p += n;
    }
    text->s[at] = '\0';
    return text->s;
}

/* For hash tables over bytes. The seed should not be known to whoever wrote them: an address will do. */
MFT__UNUSED static uint32_t mft__hash(const char *p, size_t bytes, uint64_t seed)
{
    uint64_t h = seed ^ ((uint64_t)bytes * 0x9e3779b97f4a7c15u), w;
    while (bytes >= 8) {
        memcpy(&w, p, 8);
        h = (h ^ w) * 0xbf58476d1ce4e5b9u; h ^= h >> 32;
        p += 8; bytes -= 8;
    }
    w = 0;
    memcpy(&w, p, bytes);
    h = (h ^ w) * 0x94d049bb133111ebu; h ^= h >> 29;
    return (uint32_t)(h * 0xbf58476d1ce4e5b9u >> 32);
}

/* ---- scanner ----
 *
 * A pull parser: each call of mft__json_next gives the next event, in an order that is always a
 * whole JSON text's, or MFT__JSON_BAD, with the sentence set, from there on. A loop over an object:
 *
 *     for (e = mft__json_next(s); e == MFT__JSON_KEY; e = mft__json_next(s)) {
 *         if (mft__json_is(s, "vocab")) ...                     // reads the value
 *         else mft__json_skip(s, e);                            // or goes past it
 *     }
 *     if (e != MFT__JSON_OBJECT_END) return MFT_ERR_FORMAT;     // it was MFT__JSON_BAD
 */
typedef enum mft__json_event {
    MFT__JSON_BAD, MFT__JSON_DONE,
    MFT__JSON_OBJECT, MFT__JSON_OBJECT_END, MFT__JSON_ARRAY, MFT__JSON_ARRAY_END,
    MFT__JSON_KEY, MFT__JSON_STRING, MFT__JSON_NUMBER, MFT__JSON_TRUE, MFT__JSON_FALSE, MFT__JSON_NULL
} mft__json_event;

typedef enum mft__json_need {               /* what the grammar wants next */
    MFT__NEED_VALUE, MFT__NEED_KEY,
    MFT__NEED_FIRST,                        /* the first element or member, or the end               */
    MFT__NEED_NEXT,                         /* a comma and another, or the end; at depth 0 the text's */
    MFT__NEED_NOTHING                       /* after a failure */
} mft__json_need;

typedef struct mft__json_scan {
    mft_context   *ctx;
    const char    *what;                    /* names the text in messages                            */
    int64_t        first_line;              /* the number of its first line there                    */
    const char    *text, *at, *end;
    const char    *token;                   /* where the latest event's text starts, for messages    */
    const char    *string;                  /* KEY, STRING: what stands between the quotes;          */
    size_t         bytes;                   /* NUMBER: its digits                                    */
    int            escaped;                 /* KEY, STRING: there are escapes: mft__json_decode      */
    int            depth;
    mft__json_need need;
    mft_status     status;                  /* after MFT__JSON_BAD: what the sentence goes with      */
    uint32_t       object[MFT__JSON_MAX_DEPTH / 32];      /* bit d: level d is an object, not an array */
} mft__json_scan;

/* `text` must stay while it is scanned; `what` as well. */
static void mft__json_scan_init(mft__json_scan *s, mft_context *ctx, const char *what, int64_t first_line,
                                const char *text, size_t bytes)
{
    memset(s, 0, sizeof *s);
    s->ctx = ctx; s->what = what; s->first_line = first_line;
    if (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) { text += 3; bytes -= 3; }      /* byte order mark */
    s->text = s->at = s->token = text;
    s->end  = text + bytes;
    s->need = MFT__NEED_VALUE;
}

/* Sets "WHAT: line L, column C: " and the rest, for the place `at` in the text, and ends the scan.
 * Columns count code points. Returns MFT__JSON_BAD. */
static mft__json_event mft__json_bad(mft__json_scan *s, mft_status status, const char *at, const char *format, ...) MFT__PRINTF(4, 5);
static mft__json_event mft__json_bad(mft__json_scan *s, mft_status status, const char *at, const char *format, ...)
{
    char        rest[512];
    const char *p;
    long long   line = (long long)s->first_line, column = 1;
    va_list     args;
    va_start(args, format);
    vsnprintf(rest, sizeof rest, format, args);
    va_end(args);
    for (p = s->text; p < at; p++) {
        if (*p == '\n') { line++; column = 1; }
        else if (((unsigned char)*p & 0xc0) != 0x80) column++;
    }
    s->need   = MFT__NEED_NOTHING;
    s->status = mft__fail(s->ctx, status, "%s: line %lld, column %lld: %s", s->what, line, column, rest);
    return MFT__JSON_BAD;
}

static mft__json_event mft__json_expected(mft__json_scan *s, const char *at, const char *expected)
{
    mft__name_text found;
    if (at >= s->end) return mft__json_bad(s, MFT_ERR_FORMAT, s->end, "expected %s, but the text ends", expected);
    return mft__json_bad(s, MFT_ERR_FORMAT, at, "expected %s, found '%s'", expected,
                         mft__name(at, s->end - at < 12 ? (size_t)(s->end - at) : 12, &found));
}

static const char *mft__json_space(const char *p, const char *end)
{
    while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) p++;
    return p;
}

/* Four hexadecimal digits; -1 if they are not. */
static int32_t mft__json_hex4(const char *p, const char *end)
{
    int32_t v = 0;
    int     i;
    if (end - p < 4) return -1;
    for (i = 0; i < 4; i++) {
        int c = p[i];
        if (c >= '0' && c <= '9') c -= '0';
        else if ((c | 32) >= 'a' && (c | 32) <= 'f') c = (c | 32) - 'a' + 10;
        else return -1;
        v = v << 4 | c;
    }
    return v;
}

/* The code point of the escape at p (a letter's, a number's, a pair of surrogates) and its length in the
 * text; 0 if there is none. */
static int mft__json_escape(const char *p, const char *end, uint32_t *out)
{
    int32_t a, b;
    if (end - p < 2) return 0;
    switch (p[1]) {
    case '"': case '\\': case '/': *out = (uint32_t)p[1]; return 2;
    case 'b': *out = 8;  return 2;
    case 't': *out = 9;  return 2;
    case 'n': *out = 10; return 2;
    case 'f': *out = 12; return 2;
    case 'r': *out = 13; return 2;
    case 'u': break;
    default:  return 0;
    }
    a = mft__json_hex4(p + 2, end);
    if (a < 0) return 0;
    if (a < 0xd800 || a >= 0xe000) { *out = (uint32_t)a; return 6; }
    if (a >= 0xdc00 || end - p < 12 || p[6] != '\\' || p[7] != 'u') return 0;
    b = mft__json_hex4(p + 8, end);
    if (b < 0xdc00 || b >= 0xe000) return 0;
    *out = 0x10000u + (((uint32_t)a - 0xd800u) << 10) + ((uint32_t)b - 0xdc00u);
    return 12;
}

/* Checks the string whose first byte (after the quote) is at p; returns where its closing quote is.
 * Eight bytes at a time: a byte's high bit in `stop` says quote, backslash, control character or not
 * ASCII. Borrows can only set bits above a true one, and the lowest is the one that counts. */
static const char *mft__json_string(mft__json_scan *s, const char *p)
{
    const uint64_t ones = 0x0101010101010101u, high = ones << 7;
    const char    *start = p, *end = s->end;
    uint32_t       c;
    int            n;
    s->escaped = 0;
    for (;;) {
        if (end - p >= 8) {
            uint64_t w, q, b, stop;
            memcpy(&w, p, 8);
            q = w ^ ones * '"'; b = w ^ ones * '\\';
            stop = ((((w - ones * 32) | (q - ones) | (b - ones)) & ~w) | w) & high;
            if (!stop) { p += 8; continue; }
            p += __builtin_ctzll(stop) >> 3;
        }
        if (p == end) { mft__json_bad(s, MFT_ERR_FORMAT, start - 1, "the string that starts here does not end"); return NULL; }
        if (*p == '"') return p;
        if (*p == '\\') {
            n = mft__json_escape(p, end, &c);
            if (!n) { mft__json_expected(s, p, "an escape: \\\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX, surrogates in pairs"); return NULL; }
            s->escaped = 1;
            p += n;
        } else if ((unsigned char)*p < 0x20) {
            mft__json_bad(s, MFT_ERR_FORMAT, p, "a control character (0x%02x) inside a string must be escaped", (unsigned)(unsigned char)*p);
            return NULL;
        } else do {
            n = mft__utf8_decode(p, end, &c);
            if (!n) { mft__json_bad(s, MFT_ERR_FORMAT, p, "not UTF-8: byte 0x%02x", (unsigned)(unsigned char)*p); return NULL; }
            p += n;
        } while (p < end && (unsigned char)*p >= 0x80);
    }
}

/* The end of the number that starts at p; NULL if there is none. */
static const char *mft__json_digits(const char *p, const char *end)
{
    if (p < end && *p == '-') p++;
    if (p == end || *p < '0' || *p > '9') return NULL;
    if (*p == '0') p++;
    else while (p < end && *p >= '0' && *p <= '9') p++;
    if (p < end && *p == '.') {
        p++;
        if (p == end || *p < '0' || *p > '9') return NULL;
        while (p < end && *p >= '0' && *p <= '9') p++;
    }
    if (p < end && (*p | 32) == 'e') {
        p++;
        if (p < end && (*p == '+' || *p == '-')) p++;
        if (p == end || *p < '0' || *p > '9') return NULL;
        while (p < end && *p >= '0' && *p <= '9') p++;
    }
    return p;
}

static mft__json_event mft__json_enter(mft__json_scan *s, const char *p, int object)
{
    uint32_t bit = (uint32_t)1 << (s->depth & 31);
    if (s->depth == MFT__JSON_MAX_DEPTH)
        return mft__json_bad(s, MFT_ERR_UNSUPPORTED, p, "nested more than %d deep", MFT__JSON_MAX_DEPTH);
    if (object) s->object[s->depth >> 5] |= bit;
    else        s->object[s->depth >> 5] &= ~bit;
    s->depth++;
    s->at   = p + 1;
    s->need = MFT__NEED_FIRST;
    return object ? MFT__JSON_OBJECT : MFT__JSON_ARRAY;
}

static mft__json_event mft__json_word(mft__json_scan *s, const char *p, const char *word, mft__json_event event)
{
    size_t n = strlen(word);
    if ((size_t)(s->end - p) < n || memcmp(p, word, n) != 0) return mft__json_expected(s, p, "a value");
    s->at   = p + n;
    s->need = MFT__NEED_NEXT;
    return event;
}

static mft__json_event mft__json_next(mft__json_scan *s)
{
    const char *p = mft__json_space(s->at, s->end), *end = s->end, *q;
    int         object = s->depth && (s->object[(s->depth - 1) >> 5] >> ((s->depth - 1) & 31) & 1);

    if (s->need == MFT__NEED_NOTHING) return MFT__JSON_BAD;
    if (s->need == MFT__NEED_NEXT && !s->depth) {
        s->at = p;
        return p == end ? MFT__JSON_DONE : mft__json_expected(s, p, "the end of the text");
    }
    if (s->need >= MFT__NEED_FIRST) {
        if (p < end && *p == (object ? '}' : ']')) {
            s->token = p;
            s->at    = p + 1;
            s->need  = MFT__NEED_NEXT;
            s->depth--;
            return object ? MFT__JSON_OBJECT_END : MFT__JSON_ARRAY_END;
        }
        if (s->need == MFT__NEED_NEXT) {
            if (p == end || *p != ',') return mft__json_expected(s, p, object ? "',' or '}'" : "',' or ']'");
            p = mft__json_space(p + 1, end);
        }
        s->need = object ? MFT__NEED_KEY : MFT__NEED_VALUE;
    }
    s->token = p;
    if (s->need == MFT__NEED_KEY) {
        if (p == end || *p != '"') return mft__json_expected(s, p, "a key in quotes");
        q = mft__json_string(s, p + 1);
        if (!q) return MFT__JSON_BAD;
        s->string = p + 1; s->bytes = (size_t)(q - s->string);
        q = mft__json_space(q + 1, end);
        if (q == end || *q != ':') return mft__json_expected(s, q, "':' after the key");
        s->at   = q + 1;
        s->need = MFT__NEED_VALUE;
        return MFT__JSON_KEY;
    }
    if (p == end) return mft__json_expected(s, p, "a value");
    switch (*p) {
    case '{': return mft__json_enter(s, p, 1);
    case '[': return mft__json_enter(s, p, 0);
    case 't': return mft__json_word(s, p, "true",  MFT__JSON_TRUE);
    case 'f': return mft__json_word(s, p, "false", MFT__JSON_FALSE);
    case 'n': return mft__json_word(s, p, "null",  MFT__JSON_NULL);
    case '"':
        q = mft__json_string(s, p + 1);
        if (!q) return MFT__JSON_BAD;
        s->string = p + 1; s->bytes = (size_t)(q - s->string);
        s->at     = q + 1;
        s->need   = MFT__NEED_NEXT;
        return MFT__JSON_STRING;
    default:
        q = mft__json_digits(p, end);
        if (!q) return mft__json_expected(s, p, "a value");
        if (q - p > MFT__JSON_MAX_NUMBER) return mft__json_bad(s, MFT_ERR_UNSUPPORTED, p, "a number of more than %d characters", MFT__JSON_MAX_NUMBER);
        s->string = p; s->bytes = (size_t)(q - p); s->escaped = 0;
        s->at     = q;
        s->need   = MFT__NEED_NEXT;
        return MFT__JSON_NUMBER;
    }
}

/* Goes past what the event just returned belongs to: the value of a KEY, the rest of an OBJECT or
 * ARRAY; after other events there is nothing left to skip. 0 if the text is bad there. */
MFT__UNUSED static int mft__json_skip(mft__json_scan *s, mft__json_event e)
{
    int depth;
    if (e == MFT__JSON_KEY) e = mft__json_next(s);
    if (e != MFT__JSON_OBJECT && e != MFT__JSON_ARRAY) return e != MFT__JSON_BAD;
    depth = s->depth;
    while (s->depth >= depth) if (mft__json_next(s) == MFT__JSON_BAD) return 0;
    return 1;
}

/* The latest KEY or STRING without its escapes; returns its bytes. dst has room for s->bytes,
 * which is never less. No NUL is added. Cannot fail: the scan has checked it. */
MFT__UNUSED static size_t mft__json_decode(const mft__json_scan *s, char *dst)
{
    const char *p = s->string, *end = p + s->bytes;
    char       *d = dst;
    uint32_t    c = 0;
    while (p < end) {
        const char *q = s->escaped ? (const char *)memchr(p, '\\', (size_t)(end - p)) : NULL;
        size_t      n = (size_t)((q ? q : end) - p);
        memcpy(d, p, n);
        d += n; p += n;
        if (!q) break;
        p += mft__json_escape(p, end, &c);
        d += mft__utf8_encode(c, d);
    }
    return (size_t)(d - dst);
}

/* Whether the latest KEY or STRING is that word (ASCII; escapes in the text may spell it). */
MFT__UNUSED static int mft__json_is(const mft__json_scan *s, const char *word)
{
    size_t n = strlen(word);
    char   part[6 * 64];
    if (!s->escaped) return s->bytes == n && memcmp(s->string, word, n) == 0;
    return s->bytes <= sizeof part && mft__json_decode(s, part) == n && memcmp(part, word, n) == 0;
}

/* The latest NUMBER as an int64_t; 0 if it is written with '.' or 'e', or does not fit. */
static int mft__json_int(const mft__json_scan *s, int64_t *out)
{
    const char *p = s->string, *end = p + s->bytes;
    int         negative = *p == '-';
    uint64_t    v = 0, limit = (uint64_t)INT64_MAX + (uint64_t)negative;
    for (p += negative; p < end; p++) {
        uint64_t digit = (uint64_t)(*p - '0');
        if (*p < '0' || *p > '9' || v > (limit - digit) / 10) return 0;
        v = v * 10 + digit;
    }
    *out = negative ? (int64_t)(0 - v) : (int64_t)v;
    return 1;
}

/* The latest NUMBER, to the nearest double; infinite beyond. Digits up to 2^53 and a power up to 10^22
 * are exact doubles, so that their product or quotient is the nearest (Clinger 1990, "How to read
 * floating point numbers accurately"); the rest goes to strtod with the point taken out, since the
 * locale may want a comma. */
static double mft__json_double(const mft__json_scan *s)
{
    static const double power[23] = { 1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11,
                                      1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22 };
    char        digits[MFT__JSON_MAX_NUMBER + 32];
    const char *p = s->string, *end = p + s->bytes;
    int         negative = *p == '-', n = 0, exponent = 0, written = 0, sign = 1;
    uint64_t    m = 0;
    double      v;

    for (p += negative; p < end && (*p | 32) != 'e'; p++) {
        if (*p == '.') { exponent = -(int)(end - p); continue; }      /* made right below */
        digits[n++] = *p;
        if (n <= 18) m = m * 10 + (uint64_t)(*p - '0');
    }
    if (exponent) exponent += (int)(end - p) + 1;                     /* minus the digits after the point */
    if (p < end) {
        p++;
        if (*p == '-') sign = -1;
        if (*p == '-' || *p == '+') p++;
        for (; p < end; p++) if (written < 100000) written = written * 10 + (*p - '0');
    }
    exponent += sign * written;
    if (n <= 18 && m <= ((uint64_t)1 << 53) && exponent >= -22 && exponent <= 22 && FLT_EVAL_METHOD == 0)
        v = exponent < 0 ? (double)m / power[-exponent] : (double)m * power[exponent];
    else {
        snprintf(digits + n, sizeof digits - (size_t)n, "e%d", exponent);
        v = strtod(digits, NULL);
    }
    return negative ? -v : v;
}

/* ---- tree ----
 *
 * One scan counts, one block is taken, a second scan fills it. Open containers' children pile up at
 * the low end of the nodes; when a container closes they move, as one run, to the high end, where
 * their addresses stay. The nodes not yet seen fit between the two, so the ends never meet. */
struct mft_json {
    union {
        double          number;             /* NUMBER with count 0                                    */
        int64_t         integer;            /* NUMBER with count 1, BOOL                               */
        const char     *string;
        const mft_json *children;
        uint32_t       *slots;              /* the table that follows the members of a large object    */
    } u;
    const char  *key;                       /* of a member                                             */
    uint32_t     count;                     /* bytes of a string, children of a container, slots       */
    unsigned int type : 3, key_bytes : 29;  /* keys are shorter than MFT__JSON_MAX_BYTES               */
};

typedef struct mft__json_doc {              /* the head of the block; nodes, tables, strings follow    */
    mft__object  object;
    mft_context *ctx;
    size_t       bytes;
    char        *strings;                   /* where the next one goes                                 */
    uint32_t    *slots;
    mft_json    *low, *high;                /* one past the pile; the first of the settled             */
} mft__json_doc;

enum { MFT__JSON_LARGE = 8 };               /* objects with more members get a hash table              */
#define MFT__JSON_HEAD ((sizeof(mft__json_doc) + 63) & ~(size_t)63)

static uint32_t mft__json_slots(uint32_t members)           /* a power of two, at most half full */
{
    uint32_t n = 32;
    while (n < members * 2) n *= 2;
    return n;
}

/* The first scan: how many nodes, table slots and bytes of strings there will be. */
static mft_status mft__json_measure(mft__json_scan s, size_t *nodes, size_t *slots, size_t *strings)
{
    uint32_t        members[MFT__JSON_MAX_DEPTH];
    mft__json_event e;
    *nodes = *slots = *strings = 0;
    while ((e = mft__json_next(&s)) != MFT__JSON_DONE) {
        switch (e) {
        case MFT__JSON_BAD:    return s.status;
        case MFT__JSON_KEY:    members[s.depth - 1]++; *strings += s.bytes + 1; break;
        case MFT__JSON_OBJECT: (*nodes)++; members[s.depth - 1] = 0; break;
        case MFT__JSON_OBJECT_END:
            if (members[s.depth] > MFT__JSON_LARGE) { (*nodes)++; *slots += mft__json_slots(members[s.depth]); }
            break;
        case MFT__JSON_STRING: *strings += s.bytes + 1; (*nodes)++; break;
        case MFT__JSON_ARRAY_END: break;
        default: (*nodes)++; break;
        }
    }
    return MFT_OK;
}

static const char *mft__json_take_string(mft__json_doc *doc, const mft__json_scan *s, uint32_t *bytes)
{
    char *p = doc->strings;
    *bytes = (uint32_t)mft__json_decode(s, p);
    p[*bytes] = '\0';
    doc->strings += *bytes + 1;
    return p;
}

static int mft__json_same_key(const mft_json *m, const char *key, size_t bytes)
{
    return m->key_bytes == bytes && memcmp(m->key, key, bytes) == 0;
}

/* The slot of a key: its own, or the empty one where it belongs. */
static uint32_t *mft__json_slot(const mft_json *object, const char *key, size_t bytes)
{
    const mft_json *table = object->u.children + object->count;
    uint32_t        mask = table->count - 1, i = mft__hash(key, bytes, (uint64_t)(uintptr_t)table) & mask;
    while (table->u.slots[i] && !mft__json_same_key(&object->u.children[table->u.slots[i] - 1], key, bytes)) i = (i + 1) & mask;
    return &table->u.slots[i];
}

/* Moves the children of a container to their final place; an object's keys must differ. */
static mft_status mft__json_close(mft__json_doc *doc, mft__json_scan *s, mft_json *node)
{
    mft_json *first = node + 1, *table = NULL;
    uint32_t  i, k, n = (uint32_t)(doc->low - first);
    mft__name_text name;

    node->count = n;
    if (node->type == MFT_JSON_OBJECT && n > MFT__JSON_LARGE) {
        table = --doc->high;
        memset(table, 0, sizeof *table);
        table->count   = mft__json_slots(n);
        table->u.slots = doc->slots;
        memset(doc->slots, 0, table->count * sizeof *doc->slots);
        doc->slots += table->count;
    }
    doc->high -= n;
    doc->low   = first;
    memmove(doc->high, first, n * sizeof *first);
    node->u.children = first = doc->high;
    if (node->type != MFT_JSON_OBJECT) return MFT_OK;
    for (i = 0; i < n; i++) {
        int twice = 0;
        if (table) {
            uint32_t *slot = mft__json_slot(node, first[i].key, first[i].key_bytes);
            twice = *slot != 0;
            *slot = i + 1;
        } else for (k = 0; k < i; k++) twice |= mft__json_same_key(&first[k], first[i].key, first[i].key_bytes);
        if (twice) {
            mft__json_bad(s, MFT_ERR_FORMAT, s->token, "the object that ends here has the key '%s' twice",
                          mft__name(first[i].key, first[i].key_bytes, &name));
            return MFT_ERR_FORMAT;
        }
    }
    return MFT_OK;
}

static void mft__json_doc_destroy(void *self)
{
    mft__json_doc *doc = (mft__json_doc *)self;
    mft__object_remove(&doc->object);
    mft__free(doc->ctx, doc, doc->bytes);
}

/* mft_json_parse of a part of something: `what` and `first_line` for its messages. */
static mft_status mft__json_parse(mft_context *ctx, const char *what, int64_t first_line, const char *text, size_t bytes, mft_json **out_root)
{
    mft__json_scan  s;
    mft__json_doc  *doc = NULL;
    mft_json       *open[MFT__JSON_MAX_DEPTH], *node;
    mft__json_event e;
    mft_status      status;
    size_t          nodes, slots, strings, total;
    uint32_t        key_bytes = 0;
    const char     *key = NULL;

    mft__json_scan_init(&s, ctx, what, first_line, text, bytes);
    if (bytes >= MFT__JSON_MAX_BYTES)
        return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: %llu bytes of JSON are more than the %llu this library takes", what,
                         (unsigned long long)bytes, (unsigned long long)MFT__JSON_MAX_BYTES);
    status = mft__json_measure(s, &nodes, &slots, &strings);
    if (status != MFT_OK) return status;

    /* each is below 2^31: a node takes two bytes of text, a slot a quarter of a member's five */
    total = MFT__JSON_HEAD + strings;
    if (!mft__mul_size(nodes, sizeof *node, &nodes) || nodes > (size_t)-1 / 2 - total - slots * 4)
        return mft__fail(ctx, MFT_ERR_OUT_OF_MEMORY, "%s: its tree does not fit an address space", what);
    total += nodes + slots * 4;
    doc = (mft__json_doc *)mft__alloc(ctx, total);
    if (!doc) return MFT_ERR_OUT_OF_MEMORY;
    memset(doc, 0, sizeof *doc);
    doc->ctx     = ctx; doc->bytes = total;
    doc->low     = (mft_json *)(void *)((char *)doc + MFT__JSON_HEAD);
    doc->high    = (mft_json *)(void *)((char *)doc->low + nodes);
    doc->slots   = (uint32_t *)(void *)doc->high;
    doc->strings = (char *)doc->slots + slots * 4;

    while ((e = mft__json_next(&s)) != MFT__JSON_DONE) {
        if (e == MFT__JSON_OBJECT_END || e == MFT__JSON_ARRAY_END) {
            status = mft__json_close(doc, &s, open[s.depth]);
            if (status != MFT_OK) break;
            continue;
        }
        if (e == MFT__JSON_KEY) { key = mft__json_take_string(doc, &s, &key_bytes); continue; }
        node = doc->low++;
        memset(node, 0, sizeof *node);
        node->key = key; node->key_bytes = key_bytes & 0x1fffffffu;
        key = NULL; key_bytes = 0;
        switch (e) {
        case MFT__JSON_OBJECT: node->type = MFT_JSON_OBJECT; open[s.depth - 1] = node; break;
        case MFT__JSON_ARRAY:  node->type = MFT_JSON_ARRAY;  open[s.depth - 1] = node; break;
        case MFT__JSON_STRING: node->type = MFT_JSON_STRING; node->u.string = mft__json_take_string(doc, &s, &node->count); break;
        case MFT__JSON_TRUE:   node->type = MFT_JSON_BOOL;   node->u.integer = 1; break;
        case MFT__JSON_FALSE:  node->type = MFT_JSON_BOOL;   break;
        case MFT__JSON_NUMBER:
            node->type  = MFT_JSON_NUMBER;
            node->count = (uint32_t)mft__json_int(&s, &node->u.integer);
            if (!node->count) node->u.number = mft__json_double(&s);
            if (!node->count && !(node->u.number - node->u.number == 0)) {
                mft__json_bad(&s, MFT_ERR_FORMAT, s.token, "this number is beyond the range of a double");
                status = MFT_ERR_FORMAT;
            }
            break;
        default: break;                                     /* null */
        }
        if (status != MFT_OK) break;
    }
    if (status != MFT_OK) { mft__free(ctx, doc, total); return status; }
    mft__object_add(ctx, &doc->object, mft__json_doc_destroy);
    *out_root = (mft_json *)(void *)((char *)doc + MFT__JSON_HEAD);
    return MFT_OK;
}

MFT_API mft_status mft_json_parse(mft_context *ctx, const char *text, size_t bytes, mft_json **out_root)
{
    if (out_root) *out_root = NULL;
    if (!ctx || !text || !out_root) return MFT_ERR_INVALID_ARGUMENT;
    return mft__json_parse(ctx, "JSON", 1, text, bytes, out_root);
}

MFT_API mft_status mft_json_load(mft_context *ctx, const char *path, mft_json **out_root)
{
    char      *text  = NULL;
    size_t     bytes = 0;
    mft_status s;
    if (out_root) *out_root = NULL;
    if (!ctx || !path || !out_root) return MFT_ERR_INVALID_ARGUMENT;
    s = mft__file_read_all(ctx, path, MFT__JSON_MAX_BYTES, &text, &bytes);
    if (s != MFT_OK) return s;
    s = mft__json_parse(ctx, mft__path(path), 1, text, bytes, out_root);
    mft__free(ctx, text, bytes + 1);
    return s;
}

MFT_API void mft_json_destroy(mft_json *root)
{
    if (root) mft__json_doc_destroy((char *)root - MFT__JSON_HEAD);
}

MFT_API mft_json_kind mft_json_type(const mft_json *node) { return node ? (mft_json_kind)node->type : MFT_JSON_NULL; }

MFT_API size_t mft_json_count(const mft_json *node)
{
    return node && (node->type == MFT_JSON_ARRAY || node->type == MFT_JSON_OBJECT) ? node->count : 0;
}

MFT_API const mft_json *mft_json_get(const mft_json *object, const char *key)
{
    size_t   bytes;
    uint32_t i;
    if (!object || !key || object->type != MFT_JSON_OBJECT) return NULL;
    bytes = strlen(key);
    if (object->count > MFT__JSON_LARGE) {
        i = *mft__json_slot(object, key, bytes);
        return i ? &object->u.children[i - 1] : NULL;
    }
    for (i = 0; i < object->count; i++)
        if (mft__json_same_key(&object->u.children[i], key, bytes)) return &object->u.children[i];
    return NULL;
}

MFT_API const mft_json *mft_json_at(const mft_json *node, size_t index, const char **out_key)
{
    if (out_key) *out_key = NULL;
    if (index >= mft_json_count(node)) return NULL;
    if (out_key) *out_key = node->u.children[index].key;
    return &node->u.children[index];
}

MFT_API double mft_json_number(const mft_json *node, double fallback)
{
    if (!node || node->type != MFT_JSON_NUMBER) return fallback;
    return node->count ? (double)node->u.integer : node->u.number;
}

MFT_API int64_t mft_json_integer(const mft_json *node, int64_t fallback)
{
    if (!node || node->type != MFT_JSON_NUMBER) return fallback;
    if (node->count) return node->u.integer;
    if (!(node->u.number >= -9223372036854775808.0 && node->u.number < 9223372036854775808.0)
        || node->u.number != floor(node->u.number)) return fallback;
    return (int64_t)node->u.number;
}

/* Whether a number is written without '.' and 'e' (and fits): 3 is, 3.0 is not. */
MFT__UNUSED static int mft__json_is_integer(const mft_json *node) { return node && node->type == MFT_JSON_NUMBER && node->count; }

MFT_API int mft_json_bool(const mft_json *node, int fallback)
{
    return node && node->type == MFT_JSON_BOOL ? (int)node->u.integer : fallback;
}

MFT_API const char *mft_json_string(const mft_json *node, size_t *out_bytes)
{
    if (out_bytes) *out_bytes = 0;
    if (!node || node->type != MFT_JSON_STRING) return NULL;
    if (out_bytes) *out_bytes = node->count;
    return node->u.string;
}

/* ---- writer ----
 *
 * Commas, colons and line ends come by themselves:
 *
 *     mft__json_writer w;
 *     mft__json_write_start(&w, ctx, 2);
 *     mft__json_write_open(&w, '{');
 *     mft__json_write_key(&w, "r"); mft__json_write_integer(&w, 8);
 *     mft__json_write_close(&w, '}');
 *     if (!w.failed) ... w.text, w.bytes ...                    // ends in NUL
 *     mft__json_write_free(&w);
 *
 * Running out of memory sets `failed` (and the sentence); calls after that do nothing. */
typedef struct mft__json_writer {
    mft_context *ctx;
    void        *text;                      /* chars; NULL before the first                            */
    size_t       bytes, cap;
    int          indent;                    /* spaces a level as json.dumps(indent=), 0: all on one line */
    int          depth;
    int          after_value, after_key;
    int          failed;
} mft__json_writer;

MFT__UNUSED static void mft__json_write_start(mft__json_writer *w, mft_context *ctx, int indent)
{
    memset(w, 0, sizeof *w);
    w->ctx = ctx; w->indent = indent;
}

MFT__UNUSED static void mft__json_write_free(mft__json_writer *w)
{
    mft__free(w->ctx, w->text, w->cap);
    w->text = NULL; w->bytes = w->cap = 0;
}

/* Text as it is: a value already written in JSON, or a line end between values. */
static void mft__json_write_raw(mft__json_writer *w, const char *text, size_t bytes)
{
    if (w->failed) return;
    if (!mft__grow(w->ctx, &w->text, &w->cap, w->bytes + bytes + 1, 1)) { w->failed = 1; return; }
    memcpy((char *)w->text + w->bytes, text, bytes);
    w->bytes += bytes;
    ((char *)w->text)[w->bytes] = '\0';
}

static void mft__json_write_line(mft__json_writer *w)
{
    int i;
    if (!w->indent) return;
    mft__json_write_raw(w, "\n", 1);
    for (i = 0; i < w->depth * w->indent; i++) mft__json_write_raw(w, " ", 1);
}

/* What stands before a value or a key. */
static void mft__json_write_before(mft__json_writer *w)
{
    if (w->after_value) mft__json_write_raw(w, ",", 1);
    if (w->depth && !w->after_key) mft__json_write_line(w);
    w->after_value = 1; w->after_key = 0;
}

MFT__UNUSED static void mft__json_write_open(mft__json_writer *w, char bracket)      /* '{' or '[' */
{
    mft__json_write_before(w);
    mft__json_write_raw(w, &bracket, 1);
    w->depth++;
    w->after_value = 0;
}

MFT__UNUSED static void mft__json_write_close(mft__json_writer *w, char bracket)     /* '}' or ']' */
{
    w->depth--;
    if (w->after_value) mft__json_write_line(w);
    mft__json_write_raw(w, &bracket, 1);
    w->after_value = 1;
}

/* UTF-8 stays as it is, except what is broken, which becomes U+FFFD. bytes < 0: up to the NUL. */
MFT__UNUSED static void mft__json_write_string(mft__json_writer *w, const char *s, int64_t bytes)
{
    static const char letter[] = "btn.fr";                           /* of 8 to 13; 11 has none */
    const char *end = s + (bytes < 0 ? (int64_t)strlen(s) : bytes), *run = s;
    uint32_t    c;
    mft__json_write_before(w);
    mft__json_write_raw(w, "\"", 1);
    while (s < end) {
        int  n = mft__utf8_decode(s, end, &c);
        char escape[8] = "";
        if (n && c >= 0x20 && c != '"' && c != '\\') { s += n; continue; }
        if (!n)                            memcpy(escape, "\xef\xbf\xbd", 4);
        else if (c == '"' || c == '\\')    { escape[0] = '\\'; escape[1] = (char)c; }
        else if (c >= 8 && c <= 13 && c != 11) { escape[0] = '\\'; escape[1] = letter[c - 8]; }
        else                               snprintf(escape, sizeof escape, "\\u%04x", (unsigned)c & 0xffu);
        mft__json_write_raw(w, run, (size_t)(s - run));
        mft__json_write_raw(w, escape, strlen(escape));
        run = ++s;
    }
    mft__json_write_raw(w, run, (size_t)(s - run));
    mft__json_write_raw(w, "\"", 1);
}

MFT__UNUSED static void mft__json_write_name(mft__json_writer *w, const char *key, int64_t bytes)
{
    mft__json_write_string(w, key, bytes);
    mft__json_write_raw(w, ": ", w->indent ? 2 : 1);
    w->after_value = 0; w->after_key = 1;
}

MFT__UNUSED static void mft__json_write_key(mft__json_writer *w, const char *key) { mft__json_write_name(w, key, -1); }

MFT__UNUSED static void mft__json_write_word(mft__json_writer *w, const char *word)  /* null, true, false */
{
    mft__json_write_before(w);
    mft__json_write_raw(w, word, strlen(word));
}

MFT__UNUSED static void mft__json_write_bool(mft__json_writer *w, int on) { mft__json_write_word(w, on ? "true" : "false"); }

MFT__UNUSED static void mft__json_write_integer(mft__json_writer *w, int64_t v)
{
    char text[24];
    snprintf(text, sizeof text, "%lld", (long long)v);
    mft__json_write_word(w, text);
}

/* digits: significant ones (9 give a float back, 17 a double); 0: as few as give this double back.
 * What JSON has no number for, NaN and the infinities, becomes null. */
MFT__UNUSED static void mft__json_write_number(mft__json_writer *w, double v, int digits)
{
    char  text[64], *p, *q;
    int   n = digits ? digits : 1, whole = 1;
    if (!(v - v == 0)) { mft__json_write_word(w, "null"); return; }
    for (;; n++) {                                                   /* 0.1 is 0.1, not 0.10000000000000001 */
        snprintf(text, sizeof text - 4, "%.*g", n, v);
        if (digits || n == 17 || strtod(text, NULL) == v) break;
    }
    for (p = q = text; *p; p++) {                                    /* the locale's point may be longer than a byte */
        int plain = (*p >= '0' && *p <= '9') || *p == '-' || *p == '+' || *p == 'e';
        if (!plain || *p == 'e') whole = 0;
        if (plain) *q++ = *p;
        else if (q[-1] != '.') *q++ = '.';
    }
    if (whole) { *q++ = '.'; *q++ = '0'; }                           /* 1.0, so that a float stays one */
    *q = '\0';
    mft__json_write_word(w, text);
}

/* A node and all below it. */
MFT__UNUSED static void mft__json_write_node(mft__json_writer *w, const mft_json *node)
{
    struct { const mft_json *node; uint32_t next; } level[MFT__JSON_MAX_DEPTH + 1];
    int depth = 0;
    for (;;) {
        switch ((mft_json_kind)node->type) {
        case MFT_JSON_NULL:   mft__json_write_word(w, "null"); break;
        case MFT_JSON_BOOL:   mft__json_write_bool(w, (int)node->u.integer); break;
        case MFT_JSON_STRING: mft__json_write_string(w, node->u.string, node->count); break;
        case MFT_JSON_NUMBER:
            if (node->count) mft__json_write_integer(w, node->u.integer);
            else             mft__json_write_number(w, node->u.number, 0);
            break;
        case MFT_JSON_ARRAY: case MFT_JSON_OBJECT:
            mft__json_write_open(w, node->type == MFT_JSON_OBJECT ? '{' : '[');
            level[depth].node = node; level[depth].next = 0;
            depth++;
            break;
        }
        while (depth && level[depth - 1].next == level[depth - 1].node->count) {
            depth--;
            mft__json_write_close(w, level[depth].node->type == MFT_JSON_OBJECT ? '}' : ']');
        }
        if (!depth || w->failed) return;
        node = &level[depth - 1].node->u.children[level[depth - 1].next++];
        if (node->key) mft__json_write_name(w, node->key, node->key_bytes);
    }
}

/* ==============================================================================
 * MARK: - [HEADER] What a safetensors file says about itself, and whether it is true
 *
 *   u64 length of the header, the header (JSON, padded with spaces), the tensors' bytes:
 *       { "__metadata__": { key: text, .. }, name: { "dtype": .., "shape": [..], "data_offsets": [begin, end] }, .. }
 *   with offsets counted from the end of the header.
 *
 *   rule  the tensors cover the rest of the file exactly: in order of offset each begins where the
 *         one before ends, and bytes = product of the shape x size of the dtype. That the reference
 *         insists on it too leaves no file with two meanings.
 *   source  https://github.com/huggingface/safetensors, README, "Format"
 * ============================================================================== */
enum { MFT__MAX_HEADER = 100000000, MFT__MAX_NAME = 1024 };

typedef struct mft__shard {
    mft__pages  pages;                      /* first: weights in the file know it by this             */
    char       *path;
    const char *base;                       /* the mapped file, or room for its bytes; NULL if it is read */
    int         streamed, whole;            /* streamed: base is room that a file which cannot be mapped is read into, piece by
                                               piece while pages are dropped, else at once: whole                 */
    mft__file   file;
    uint64_t    bytes;                      /* of the file                                            */
    char       *strings;                    /* names and metadata; freed with strings_bytes           */
    size_t      strings_bytes, strings_used;
} mft__shard;

typedef struct mft__pair { const char *key, *value; } mft__pair;

struct mft_safetensors {
    mft__object  object;
    mft_context *ctx;
    mft__shard  *shards;
    int          n_shards;
    mft_safetensors_entry *entries;
    size_t       n_entries, entries_cap;
    mft__pair   *pairs;                     /* the metadata of all shards                             */
    size_t       n_pairs, pairs_cap;
    uint32_t    *slots;                     /* name to entry + 1: open addressing, at most half full  */
    size_t       n_slots;
    void       **held;                      /* what mft_safetensors_map has read, by entry; NULL if all is mapped */
};

/* Every dtype safetensors has. bits 0 is none; `usable` ones are an mft_dtype. */
typedef struct mft__file_dtype { const char *name; int bits, usable; mft_dtype dtype; } mft__file_dtype;

static mft__file_dtype mft__find_dtype(const char *name)
{
    static const mft__file_dtype table[] = {
        { "F32", 32, 1, MFT_F32 }, { "F16", 16, 1, MFT_F16 }, { "BF16", 16, 1, MFT_BF16 }, { "I32", 32, 1, MFT_I32 },
        { "I64", 64, 1, MFT_I64 }, { "U8",   8, 1, MFT_U8  }, { "BOOL",  8, 1, MFT_U8   }, { "F64", 64, 0, MFT_U8  },
        { "I8",   8, 0, MFT_U8  }, { "I16", 16, 0, MFT_U8  }, { "U16",  16, 0, MFT_U8   }, { "U32", 32, 0, MFT_U8  },
        { "U64", 64, 0, MFT_U8  }, { "C64", 64, 0, MFT_U8  }, { "F8_E4M3", 8, 0, MFT_U8 }, { "F8_E5M2", 8, 0, MFT_U8 },
        { "F8_E8M0", 8, 0, MFT_U8 }, { "F6_E2M3", 6, 0, MFT_U8 }, { "F6_E3M2", 6, 0, MFT_U8 }, { "F4", 4, 0, MFT_U8 }
    };
    mft__file_dtype none;
    size_t i;
    for (i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strcmp(name, table[i].name) == 0) return table[i];
    none.name = name; none.bits = none.usable = 0; none.dtype = MFT_U8;
    return none;
}

/* "PATH: tensor 'NAME': " and the rest. */
static mft_status mft__tensor_fail(mft_context *ctx, mft_status status, const char *path, const char *name, const char *format, ...) MFT__PRINTF(5, 6);
static mft_status mft__tensor_fail(mft_context *ctx, mft_status status, const char *path, const char *name, const char *format, ...)
{
    char           rest[400];
    mft__name_text text;
    va_list        args;
    va_start(args, format);
    vsnprintf(rest, sizeof rest, format, args);
    va_end(args);
    return mft__fail(ctx, status, "%s: tensor '%s': %s", mft__path(path), mft__name(name, strlen(name), &text), rest);
}

/* The latest KEY or STRING as a C string in the shard's memory, which has room for all of the
 * header. NULL with the sentence set if it is too long or holds a NUL. */
static const char *mft__header_string(mft__shard *sh, mft__json_scan *s, size_t max_bytes)
{
    char  *p = sh->strings + sh->strings_used;
    size_t n;
    mft__name_text text;
    if (s->bytes > 6 * max_bytes || (n = mft__json_decode(s, p)) > max_bytes) {
        mft__json_bad(s, MFT_ERR_FORMAT, s->token, "a name of %llu bytes ('%s'); more than %llu are not believed",
                      (unsigned long long)s->bytes, mft__name(s->string, s->bytes < 60 ? s->bytes : 60, &text), (unsigned long long)max_bytes);
        return NULL;
    }
    if (memchr(p, '\0', n)) { mft__json_bad(s, MFT_ERR_FORMAT, s->token, "a NUL character inside a name"); return NULL; }
    p[n] = '\0';
    sh->strings_used += n + 1;                              /* quotes are two bytes, so this always fits */
    return p;
}

static mft_status mft__header_metadata(mft_safetensors *st, mft__shard *sh, mft__json_scan *s)
{
    mft__json_event e;
    if (mft__json_next(s) != MFT__JSON_OBJECT) { mft__json_expected(s, s->token, "an object as __metadata__"); return s->status; }
    while ((e = mft__json_next(s)) == MFT__JSON_KEY) {
        void *pairs = st->pairs;
        if (!mft__grow(st->ctx, &pairs, &st->pairs_cap, st->n_pairs + 1, sizeof *st->pairs)) return MFT_ERR_OUT_OF_MEMORY;
        st->pairs = (mft__pair *)pairs;
        st->pairs[st->n_pairs].key = mft__header_string(sh, s, MFT__MAX_HEADER);
        if (!st->pairs[st->n_pairs].key) return s->status;
        e = mft__json_next(s);
        if (e == MFT__JSON_BAD) return s->status;
        if (e != MFT__JSON_STRING) { mft__json_expected(s, s->token, "text as a value of __metadata__"); return s->status; }
        st->pairs[st->n_pairs].value = mft__header_string(sh, s, MFT__MAX_HEADER);
        if (!st->pairs[st->n_pairs].value) return s->status;
        st->n_pairs++;
    }
    return e == MFT__JSON_BAD ? s->status : MFT_OK;
}

/* [..] of integers from 0 on; *n counts them all, the first `cap` are stored; *product is of all of
 * them, UINT64_MAX when it is more than 2^63. */
static int mft__header_integers(mft__json_scan *s, uint64_t *out, int cap, int *n, uint64_t *product)
{
    mft__json_event e;
    int64_t         v;
    int             zero = 0;
    *n = 0; *product = 1;
    if (mft__json_next(s) != MFT__JSON_ARRAY) { if (s->status == MFT_OK) mft__json_expected(s, s->token, "an array of integers"); return 0; }
    while ((e = mft__json_next(s)) == MFT__JSON_NUMBER) {
        if (!mft__json_int(s, &v) || v < 0) { mft__json_expected(s, s->token, "an integer from 0 to 2^63 - 1"); return 0; }
        if (*n < cap) out[*n] = (uint64_t)v;
        if (v == 0) zero = 1;
        else if (*product > ((uint64_t)1 << 63) / (uint64_t)v) *product = UINT64_MAX;
        else *product *= (uint64_t)v;
        ++*n;
    }
    if (zero) *product = 0;
    if (e != MFT__JSON_ARRAY_END && e != MFT__JSON_BAD) mft__json_expected(s, s->token, "an integer");
    return e == MFT__JSON_ARRAY_END;
}

/* One member of the header: { dtype, shape, data_offsets }. `data` is where the tensors begin. */
static mft_status mft__header_entry(mft_safetensors *st, mft__shard *sh, mft__json_scan *s, const char *name, uint64_t data)
{
    mft_safetensors_entry *entry;
    mft__file_dtype dtype;
    mft__json_event e;
    mft_context    *ctx = st->ctx;
    const char     *dtype_name = NULL;
    void           *entries = st->entries;
    uint64_t        shape[MFT_MAX_DIMS], offsets[2], elements = 0, ignored, have = sh->bytes - data;
    int             ndim = -1, n_offsets = -1, i, ok = 1;

    memset(offsets, 0, sizeof offsets);
    if (mft__json_next(s) != MFT__JSON_OBJECT) {
        if (s->status == MFT_OK) mft__json_expected(s, s->token, "an object with dtype, shape and data_offsets");
        return s->status;
    }
    while (ok && (e = mft__json_next(s)) == MFT__JSON_KEY) {
        int again = 0;
        if (mft__json_is(s, "dtype")) {
            again = dtype_name != NULL;
            e = mft__json_next(s);
            if (e != MFT__JSON_STRING) { if (e != MFT__JSON_BAD) mft__json_expected(s, s->token, "a dtype in quotes"); return s->status; }
            dtype_name = mft__header_string(sh, s, 32);
            ok = dtype_name != NULL;
        } else if (mft__json_is(s, "shape")) {
            again = ndim >= 0;
            ok = mft__header_integers(s, shape, MFT_MAX_DIMS, &ndim, &elements);
        } else if (mft__json_is(s, "data_offsets")) {
            again = n_offsets >= 0;
            ok = mft__header_integers(s, offsets, 2, &n_offsets, &ignored);
        } else ok = mft__json_skip(s, e);
        if (ok && again) return mft__tensor_fail(ctx, MFT_ERR_FORMAT, sh->path, name, "dtype, shape or data_offsets stands twice");
    }
    if (s->status != MFT_OK) return s->status;
    if (!dtype_name || ndim < 0 || n_offsets != 2)
        return mft__tensor_fail(ctx, MFT_ERR_FORMAT, sh->path, name, "lacks dtype, shape or a pair of data_offsets");
    if (offsets[0] > offsets[1])
        return mft__tensor_fail(ctx, MFT_ERR_FORMAT, sh->path, name, "begins at %llu, after its end at %llu",
                                (unsigned long long)offsets[0], (unsigned long long)offsets[1]);
    if (offsets[1] > have)
        return mft__tensor_fail(ctx, MFT_ERR_FORMAT, sh->path, name, "ends at byte %llu of the data, but the file has only %llu: it is cut off or damaged",
                                (unsigned long long)offsets[1], (unsigned long long)have);
    dtype = mft__find_dtype(dtype_name);
    if (elements > ((uint64_t)1 << 56))
        return mft__tensor_fail(ctx, MFT_ERR_FORMAT, sh->path, name, "the product of its shape overflows");
    if (dtype.bits && (elements * (uint64_t)dtype.bits % 8 || elements * (uint64_t)dtype.bits / 8 != offsets[1] - offsets[0]))
        return mft__tensor_fail(ctx, MFT_ERR_FORMAT, sh->path, name, "%llu elements of %s do not make the %llu bytes of its data_offsets",
                                (unsigned long long)elements, dtype.name, (unsigned long long)(offsets[1] - offsets[0]));

    if (!mft__grow(ctx, &entries, &st->entries_cap, st->n_entries + 1, sizeof *entry)) return MFT_ERR_OUT_OF_MEMORY;
    st->entries = (mft_safetensors_entry *)entries;
    entry = &st->entries[st->n_entries++];
    memset(entry, 0, sizeof *entry);
    entry->name   = name;              entry->dtype_name = dtype_name;
    entry->offset = data + offsets[0]; entry->bytes      = offsets[1] - offsets[0];
    entry->dtype  = dtype.dtype;       entry->shard      = st->n_shards;
    entry->ndim   = ndim;
    for (i = 0; i < ndim && i < MFT_MAX_DIMS; i++) entry->shape[i] = (int64_t)shape[i];
    if (ndim > MFT_MAX_DIMS) {
        entry->problem = "has more than 4 dimensions";
        entry->dtype = MFT_U8; entry->ndim = 1; entry->shape[0] = (int64_t)entry->bytes;
    }
    else if (!dtype.usable) entry->problem = "has a dtype this library does not use";
    else if (!elements)     entry->problem = "has no elements";
    return MFT_OK;
}

static int mft__entry_before(const void *a, const void *b)
{
    const mft_safetensors_entry *x = (const mft_safetensors_entry *)a, *y = (const mft_safetensors_entry *)b;
    return x->offset != y->offset ? x->offset < y->offset : x->bytes < y->bytes;
}

/* The entries of one header, appended to those of earlier shards. */
static mft_status mft__header_parse(mft_safetensors *st, mft__shard *sh, const char *text, size_t bytes)
{
    char                  what[420];
    mft__json_scan        s;
    mft__json_event       e;
    mft_safetensors_entry swap;
    size_t                first = st->n_entries, i;
    uint64_t              at = bytes + 8;
    int                   n_metadata = 0;
    mft__name_text        other;

    snprintf(what, sizeof what, "%s: header", mft__path(sh->path));
    mft__json_scan_init(&s, st->ctx, what, 1, text, bytes);
    if (mft__json_next(&s) != MFT__JSON_OBJECT) {
        if (s.status == MFT_OK) mft__json_expected(&s, s.token, "'{'");
        return s.status;
    }
    while ((e = mft__json_next(&s)) == MFT__JSON_KEY) {
        mft_status status;
        if (mft__json_is(&s, "__metadata__")) {
            if (n_metadata++) { mft__json_bad(&s, MFT_ERR_FORMAT, s.token, "__metadata__ stands twice"); return s.status; }
            status = mft__header_metadata(st, sh, &s);
        } else {
            const char *name = mft__header_string(sh, &s, MFT__MAX_NAME);
            status = name ? mft__header_entry(st, sh, &s, name, at) : s.status;
        }
        if (status != MFT_OK) return status;
    }
    if (e == MFT__JSON_BAD || mft__json_next(&s) != MFT__JSON_DONE) return s.status;

    for (i = first + 1; i < st->n_entries && !mft__entry_before(&st->entries[i], &st->entries[i - 1]); i++) ;
    if (i < st->n_entries)                                  /* most files come sorted */
        mft__sort(st->entries + first, st->n_entries - first, sizeof swap, mft__entry_before, &swap);
    for (i = first; i < st->n_entries; i++) {
        const mft_safetensors_entry *x = &st->entries[i];
        if (x->offset < at)
            return mft__tensor_fail(st->ctx, MFT_ERR_FORMAT, sh->path, x->name, "overlaps tensor '%s'",
                                    mft__name(x[-1].name, strlen(x[-1].name), &other));
        if (x->offset > at)
            return mft__tensor_fail(st->ctx, MFT_ERR_FORMAT, sh->path, x->name, "%llu bytes before it belong to no tensor",
                                    (unsigned long long)(x->offset - at));
        at += x->bytes;
    }
    if (at != sh->bytes)
        return mft__fail(st->ctx, MFT_ERR_FORMAT, "%s: the %llu bytes after its last tensor belong to none", mft__path(sh->path),
                         (unsigned long long)(sh->bytes - at));
    return MFT_OK;
}

/* ==============================================================================
 * MARK: - [READ] From entries to bytes
 *
 *   in    a path
 *   out   bytes in place, or copied into a tensor of another dtype
 *   rule  a mapped file is never written to; what cannot be mapped is read when asked for
 * ============================================================================== */

#ifndef MFT_NO_MMAP
/* A mapped page behind the file's end cannot be read without a signal, so the length is looked at before each use: half
 * a microsecond. Only what happens in the middle of a product is not noticed. */
static int mft__shard_fetch_mapped(mft_context *ctx, mft__pages *self, const char *p, uint64_t bytes)
{
    mft__shard *sh = (mft__shard *)(void *)self;
    uint64_t    now = mft__file_length(&sh->file);
    if (now >= sh->bytes && (!ctx->drop_pages || mft__file_fetch(p, bytes))) return 1;
    if (now >= sh->bytes) mft__fail(ctx, MFT_ERR_IO, "%s: cannot be read at byte %llu: %s", mft__path(sh->path), (unsigned long long)(p - sh->base), strerror(errno));
    else mft__fail(ctx, MFT_ERR_IO, "%s: was shortened to %llu bytes while in use, was %llu long when opened", mft__path(sh->path), (unsigned long long)now, (unsigned long long)sh->bytes);
    return 0;
}
#endif

static int mft__shard_fetch_streamed(mft_context *ctx, mft__pages *self, const char *p, uint64_t bytes)
{
    mft__shard *sh = (mft__shard *)(void *)self;
    if (sh->whole && !ctx->drop_pages) return 1;
    if (!ctx->drop_pages) { p = sh->base; bytes = sh->bytes; }
    sh->whole = 0;
    if (mft__file_read(&sh->file, (uint64_t)(p - sh->base), (void *)(uintptr_t)p, (size_t)bytes) != MFT_OK) return 0;
    sh->whole = !ctx->drop_pages;
    return 1;
}

/* Opens, maps and checks one file; `path` is copied. Adds a shard and its entries to st. */
static mft_status mft__shard_open(mft_safetensors *st, mft__shard *sh, const char *path)
{
    mft_context  *ctx = st->ctx;
    unsigned char head[24];
    char         *text = NULL;
    uint64_t      n = 0;
    size_t        have;
    int           i;
    mft_status    s;

    memset(sh, 0, sizeof *sh);
    sh->file.fd = -1;
    sh->path = mft__strdup(ctx, path);
    if (!sh->path) return MFT_ERR_OUT_OF_MEMORY;
    s = mft__file_open(ctx, sh->path, &sh->file);
    if (s != MFT_OK) return s;
    sh->bytes = sh->file.bytes;
    memset(head, 0, sizeof head);
    have = sh->bytes < sizeof head ? (size_t)sh->bytes : sizeof head;
    s = mft__file_read(&sh->file, 0, head, have);
    if (s != MFT_OK) return s;
    if (memcmp(head, "version https://git-lfs", 23) == 0)
        return mft__fail(ctx, MFT_ERR_FORMAT, "%s: is a Git LFS pointer, not the file itself: `git lfs pull` fetches it", mft__path(path));
    if (have < 8) return mft__fail(ctx, MFT_ERR_FORMAT, "%s: has %d bytes, too few for a safetensors file", mft__path(path), (int)have);
    for (i = 7; i >= 0; i--) n = n << 8 | head[i];
    if (n > MFT__MAX_HEADER)
        return mft__fail(ctx, MFT_ERR_FORMAT, "%s: not a safetensors file: its header would have %llu bytes, at most %d are allowed",
                         mft__path(path), (unsigned long long)n, (int)MFT__MAX_HEADER);
    if (n + 8 > sh->bytes)                                  /* cannot wrap: n is small by now */
        return mft__fail(ctx, MFT_ERR_FORMAT, "%s: its header should have %llu bytes, the file has %llu in all: it is cut off or no safetensors file",
                         mft__path(path), (unsigned long long)n, (unsigned long long)sh->bytes);

    sh->strings_bytes = (size_t)n + 1;
    sh->strings = (char *)mft__alloc(ctx, sh->strings_bytes);
    if (!sh->strings) return MFT_ERR_OUT_OF_MEMORY;
#ifndef MFT_NO_MMAP
    if (!sh->file.handle) {
        sh->base = mft__file_map(&sh->file);
        if (!sh->base) return MFT_ERR_OUT_OF_MEMORY;
        sh->pages.fetch = mft__shard_fetch_mapped; sh->pages.base = sh->base; sh->pages.bytes = sh->bytes;
        return mft__header_parse(st, sh, sh->base + 8, (size_t)n);
    }
#endif
    text = (char *)mft__alloc(ctx, (size_t)n);
    if (!text) return MFT_ERR_OUT_OF_MEMORY;
    s = mft__file_read(&sh->file, 8, text, (size_t)n);
    if (s == MFT_OK) s = mft__header_parse(st, sh, text, (size_t)n);
    mft__free(ctx, text, (size_t)n);
    if (s == MFT_OK && ctx->budget && (sh->base = mft__file_room(sh->bytes)) != NULL) {
        sh->streamed = 1;
        sh->pages.fetch = mft__shard_fetch_streamed;
        ctx->drop_pages = mft__file_drop;
    }
    return s;
}

static void mft__shard_close(mft_safetensors *st, mft__shard *sh)
{
    mft__file_close(&sh->file);
    mft__file_unmap(sh->base, sh->bytes);
    mft__strfree(st->ctx, sh->path);
    mft__free(st->ctx, sh->strings, sh->strings_bytes);
}

static void mft__safetensors_destroy(void *self)
{
    mft_safetensors *st  = (mft_safetensors *)self;
    mft_context     *ctx = st->ctx;
    size_t           i;
    mft__object_remove(&st->object);
    for (i = 0; st->held && i < st->n_entries; i++)
        if (st->held[i]) mft__free_as(ctx, MFT__WEIGHTS, st->held[i], (size_t)st->entries[i].bytes);
    mft__free(ctx, st->held, st->n_entries * sizeof *st->held);
    for (i = 0; i < (size_t)st->n_shards; i++) mft__shard_close(st, &st->shards[i]);
    mft__free(ctx, st->shards, (size_t)st->n_shards * sizeof *st->shards);
    mft__free(ctx, st->entries, st->entries_cap * sizeof *st->entries);
    mft__free(ctx, st->pairs, st->pairs_cap * sizeof *st->pairs);
    mft__free(ctx, st->slots, st->n_slots * sizeof *st->slots);
    mft__free(ctx, st, sizeof *st);
}

MFT_API void mft_safetensors_close(mft_safetensors *st)
{
    if (st) mft__safetensors_destroy(st);
}

/* The slot of a name: its entry's, or the empty one where it belongs. */
static uint32_t *mft__safetensors_slot(const mft_safetensors *st, const char *name)
{
    size_t mask = st->n_slots - 1, i = mft__hash(name, strlen(name), (uint64_t)(uintptr_t)st) & mask;
    while (st->slots[i] && strcmp(st->entries[st->slots[i] - 1].name, name) != 0) i = (i + 1) & mask;
    return &st->slots[i];
}

/* Makes the table of names, which must differ. */
static mft_status mft__safetensors_index(mft_safetensors *st)
{
    size_t i, n = 16;
    while (n < 2 * st->n_entries) n *= 2;
    if (st->n_entries > UINT32_MAX / 2)
        return mft__fail(st->ctx, MFT_ERR_UNSUPPORTED, "%s: %llu tensors", mft__path(st->shards[0].path), (unsigned long long)st->n_entries);
    st->slots = (uint32_t *)mft__alloc_zero(st->ctx, n * sizeof *st->slots);
    if (!st->slots) return MFT_ERR_OUT_OF_MEMORY;
    st->n_slots = n;
    for (i = 0; i < st->n_entries; i++) {
        const mft_safetensors_entry *e = &st->entries[i];
        uint32_t *slot = mft__safetensors_slot(st, e->name);
        if (*slot) {
            const mft_safetensors_entry *first = &st->entries[*slot - 1];
            return first->shard == e->shard
                ? mft__tensor_fail(st->ctx, MFT_ERR_FORMAT, st->shards[e->shard].path, e->name, "is in its header twice")
                : mft__tensor_fail(st->ctx, MFT_ERR_FORMAT, st->shards[e->shard].path, e->name, "is in %s as well", mft__path(st->shards[first->shard].path));
        }
        *slot = (uint32_t)(i + 1);
    }
    return MFT_OK;
}

MFT_API const mft_safetensors_entry *mft_safetensors_entries(const mft_safetensors *st, size_t *out_count)
{
    if (out_count) *out_count = st ? st->n_entries : 0;
    return st ? st->entries : NULL;
}

MFT_API const mft_safetensors_entry *mft_safetensors_find(const mft_safetensors *st, const char *name)
{
    uint32_t at;
    if (!st || !name) return NULL;
    at = *mft__safetensors_slot(st, name);
    return at ? &st->entries[at - 1] : NULL;
}

MFT_API const char *mft_safetensors_metadata(const mft_safetensors *st, const char *key)
{
    size_t i;
    for (i = 0; st && key && i < st->n_pairs; i++)
        if (strcmp(st->pairs[i].key, key) == 0) return st->pairs[i].value;
    return NULL;
}

MFT_API const char *mft_safetensors_metadata_at(const mft_safetensors *st, size_t index, const char **out_key)
{
    int there = st && index < st->n_pairs;
    if (out_key) *out_key = there ? st->pairs[index].key : NULL;
    return there ? st->pairs[index].value : NULL;
}

MFT_API const char *mft_safetensors_shard_path(const mft_safetensors *st, int shard)
{
    return st && shard >= 0 && shard < st->n_shards ? st->shards[shard].path : NULL;
}

/* ---- bytes ---- */

/* Whether e is one of st's and can be used. */
static mft_status mft__safetensors_check(mft_safetensors *st, const mft_safetensors_entry *e)
{
    if (!st || !e) return MFT_ERR_INVALID_ARGUMENT;
    if ((uintptr_t)e < (uintptr_t)st->entries || (uintptr_t)e >= (uintptr_t)(st->entries + st->n_entries))
        return mft__fail(st->ctx, MFT_ERR_INVALID_ARGUMENT, "this entry is of another file");
    if (e->problem) return mft__tensor_fail(st->ctx, MFT_ERR_UNSUPPORTED, st->shards[e->shard].path, e->name, "%s (%s)", e->problem, e->dtype_name);
    return MFT_OK;
}

/* Where an entry's bytes are in memory; NULL if they are only in the file. */
static const char *mft__safetensors_bytes(const mft_safetensors *st, const mft_safetensors_entry *e)
{
    if (st->shards[e->shard].base && !st->shards[e->shard].streamed) return st->shards[e->shard].base + e->offset;
    return st->held ? (const char *)st->held[e - st->entries] : NULL;
}

MFT_API const void *mft_safetensors_map(mft_safetensors *st, const mft_safetensors_entry *e)
{
    const char *there;
    void       *p;
    if (mft__safetensors_check(st, e) != MFT_OK) return NULL;
    there = mft__safetensors_bytes(st, e);
    if (there) return there;
    if (!st->held) st->held = (void **)mft__alloc_zero(st->ctx, st->n_entries * sizeof *st->held);
    if (!st->held) return NULL;
    p = mft__alloc_as(st->ctx, MFT__WEIGHTS, (size_t)e->bytes);
    if (!p) return NULL;
    if (mft__file_read(&st->shards[e->shard].file, e->offset, p, (size_t)e->bytes) != MFT_OK) {
        mft__free_as(st->ctx, MFT__WEIGHTS, p, (size_t)e->bytes);
        return NULL;
    }
    st->held[e - st->entries] = p;
    return p;
}

/* Where a weight may be used in place, and who brings it there before each use: *pages, NULL if it is there to stay. */
MFT__UNUSED static const void *mft__safetensors_pages(mft_safetensors *st, const mft_safetensors_entry *e, mft__pages **pages)
{
    mft__shard *sh;
    *pages = NULL;
    if (mft__safetensors_check(st, e) != MFT_OK) return NULL;
    sh = &st->shards[e->shard];
    if (!sh->base) return mft_safetensors_map(st, e);
    *pages = &sh->pages;
    return sh->base + e->offset;
}

/* Hints for the pages of a mapped entry: wanted soon, or not for long. Its bytes stay readable; after
 * a drop they come from the page cache or the disk again. Without a mapping nothing happens. */
MFT__UNUSED static void mft__safetensors_prefetch(mft_safetensors *st, const mft_safetensors_entry *e)
{
    const char *base = st->shards[e->shard].base;
    if (base) mft__file_advise(base + e->offset, e->bytes, 1);
}

MFT__UNUSED static void mft__safetensors_drop(mft_safetensors *st, const mft_safetensors_entry *e)
{
    const char *base = st->shards[e->shard].base;
    if (base) mft__file_advise(base + e->offset, e->bytes, 0);
}

/* ---- copies with a change of dtype, piece by piece ---- */
enum { MFT__PIECE = 1024 };                 /* elements */
typedef union mft__piece { double align; int64_t align64; char bytes[MFT__PIECE * 8]; } mft__piece;

/* Moves n elements, from number `first` in row-major order on, between a strided tensor and a
 * contiguous buffer of the same dtype: into the buffer if gather, else out of it. */
static void mft__strided(const mft_tensor *t, int64_t first, int64_t n, char *buffer, int gather)
{
    int64_t cols = t->ndim ? t->shape[t->ndim - 1] : 1, step = t->ndim ? t->stride[t->ndim - 1] : 1, i, run;
    size_t  size = mft_dtype_bytes(t->dtype, 1);
    for (; n; n -= run, first += run) {
        char *p = (char *)t->data + (mft__row_offset(t, first / cols) + first % cols * step) * (int64_t)size;
        run = cols - first % cols < n ? cols - first % cols : n;
        for (i = 0; i < run; i++, p += step * (int64_t)size, buffer += size) {
            if (gather) memcpy(buffer, p, size);
            else        memcpy(p, buffer, size);
        }
    }
}

static int mft__converts(mft_dtype from, mft_dtype to)
{
    if (mft__is_quantized(from)) return 0;
    if (mft__is_quantized(to))   return mft__is_float(from);
    return from == to || (mft__is_float(from) && mft__is_float(to)) || (from == MFT_I32 && to == MFT_I64) || (from == MFT_I64 && to == MFT_I32);
}

/* At most MFT__PIECE elements. Returns how many were converted: fewer when an i64 is no i32. */
static int64_t mft__convert(const mft_context *ctx, void *dst, mft_dtype to, const void *src, mft_dtype from, int64_t n)
{
    const mft__kernels *row = ctx->kernels;
    float   part[MFT__PIECE];
    int64_t i;
    if (from == to) memcpy(dst, src, mft_dtype_bytes(from, n));
    else if (from == MFT_I32) for (i = 0; i < n; i++) ((int64_t *)dst)[i] = ((const int32_t *)src)[i];
    else if (from == MFT_I64) {
        for (i = 0; i < n; i++) {
            int64_t v = ((const int64_t *)src)[i];
            if (v < INT32_MIN || v > INT32_MAX) return i;
            ((int32_t *)dst)[i] = (int32_t)v;
        }
    }
    else if (to == MFT_F32)   row->to_float((float *)dst, src, from, n);
    else if (from == MFT_F32) row->from_float(dst, to, (const float *)src, n);
    else {
        row->to_float(part, src, from, n);
        row->from_float(dst, to, part, n);
    }
    return n;
}

/* Elements up to `to` have been read into a tensor. Where memory is short the pages they came from go, with what else
 * the system has brought along (up to 2 MB around each), and those of dst if it is in a mapped file. */
static void mft__read_behind(mft_context *ctx, const mft__shard *sh, const mft_tensor *dst, int64_t *from, int64_t to)
{
    int64_t began = *from;
    if (!ctx->drop_pages) return;
    mft__passing(ctx, dst, from, to);
    if (sh->base && *from > began) mft__file_advise(sh->base, sh->bytes, 0);
}

MFT_API mft_status mft_safetensors_read(mft_safetensors *st, const mft_safetensors_entry *e, mft_tensor *dst)
{
    mft__piece  in, out;
    mft__shard *sh;
    const char *there;
    char       *direct;
    int64_t     i, total, done, piece, passed = 0;
    int         same = 1;
    mft_status  s;

    s = mft__safetensors_check(st, e);
    if (s != MFT_OK) return s;
    if (!dst || !dst->data) return MFT_ERR_INVALID_ARGUMENT;
    sh = &st->shards[e->shard];
    for (i = 0; i < e->ndim; i++) same &= i < dst->ndim && e->shape[i] == dst->shape[i];
    if (!same || e->ndim != dst->ndim) {
        mft__shape_text want, have;
        mft_tensor      file;
        file.ndim = e->ndim;
        memcpy(file.shape, e->shape, sizeof file.shape);
        return mft__tensor_fail(st->ctx, MFT_ERR_INVALID_ARGUMENT, sh->path, e->name, "has shape %s, wanted is %s", mft__shape(&file, &have), mft__shape(dst, &want));
    }
    if (!mft__converts(e->dtype, dst->dtype))
        return mft__tensor_fail(st->ctx, MFT_ERR_UNSUPPORTED, sh->path, e->name, "is %s, which does not convert to %s", e->dtype_name, mft_dtype_name(dst->dtype));

    there  = mft__safetensors_bytes(st, e);
    direct = mft__is_contiguous(dst) ? (char *)dst->data : NULL;
    total = mft_tensor_numel(dst);
    piece = st->ctx->drop_pages ? (int64_t)MFT__PAGED_PIECE : total;
    if (direct && e->dtype == dst->dtype) {
        for (i = 0; i < total; i += piece) {
            int64_t  n  = mft__min(total - i, piece);
            uint64_t at = (uint64_t)mft_dtype_bytes(e->dtype, i);
            if (there && sh->base && !sh->pages.fetch(st->ctx, &sh->pages, there + at, mft_dtype_bytes(e->dtype, n))) return MFT_ERR_IO;
            if (there) memcpy(direct + at, there + at, mft_dtype_bytes(e->dtype, n));
            else if ((s = mft__file_read(&sh->file, e->offset + at, direct + at, mft_dtype_bytes(e->dtype, n))) != MFT_OK) return s;
            mft__read_behind(st->ctx, sh, dst, &passed, i + n);
        }
        return MFT_OK;
    }
    for (i = 0; i < total; i += MFT__PIECE) {                   /* quantised: whole blocks, for the last dimension is of such */
        int64_t  n  = total - i < MFT__PIECE ? total - i : (int64_t)MFT__PIECE;
        uint64_t at = (uint64_t)mft_dtype_bytes(e->dtype, i);
        size_t   bytes = mft_dtype_bytes(e->dtype, n);
        if (there && sh->base && i % piece == 0
            && !sh->pages.fetch(st->ctx, &sh->pages, there + at, mft_dtype_bytes(e->dtype, mft__min(total - i, piece)))) return MFT_ERR_IO;
        if (there) memcpy(in.bytes, there + at, bytes);     /* the file's bytes may be unaligned */
        else if ((s = mft__file_read(&sh->file, e->offset + at, in.bytes, bytes)) != MFT_OK) return s;
        done = mft__convert(st->ctx, direct ? direct + mft_dtype_bytes(dst->dtype, i) : out.bytes, dst->dtype, in.bytes, e->dtype, n);
        if (done < n)
            return mft__tensor_fail(st->ctx, MFT_ERR_INVALID_ARGUMENT, sh->path, e->name, "element %lld is %lld, too large for I32",
                                    (long long)(i + done), (long long)((const int64_t *)(const void *)in.bytes)[done]);
        if (!direct) mft__strided(dst, i, n, out.bytes, 0);
        mft__read_behind(st->ctx, sh, dst, &passed, i + n);
    }
    return MFT_OK;
}

/* ==============================================================================
 * MARK: - [SNAPSHOT] One model in a directory, in one file or in shards
 *
 *   model.safetensors.index.json:  { "metadata": {..}, "weight_map": { tensor: file name, .. } }
 *
 *   rule  index and shards must name the same tensors in the same files: one that is missing, or
 *         left from another download, is found here and not as a wrong loss. File names
 *         are plain: an index cannot reach out of its directory.
 * ============================================================================== */
enum { MFT__MAX_SHARDS = 1000 };

/* Opens files DIR/names[i] (or `dir` itself if names is NULL) as all the shards there are. */
static mft_status mft__shards_open(mft_safetensors *st, const char *dir, const char *const *names, int n)
{
    int        i;
    mft_status s = MFT_OK;
    st->shards = (mft__shard *)mft__alloc(st->ctx, (size_t)n * sizeof *st->shards);
    if (!st->shards) return MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; i < n; i++) { memset(&st->shards[i], 0, sizeof st->shards[i]); st->shards[i].file.fd = -1; }
    for (i = 0; i < n && s == MFT_OK; i++) {
        char *path = names ? mft__path_join(st->ctx, dir, names[i]) : mft__strdup(st->ctx, dir);
        if (!path) s = MFT_ERR_OUT_OF_MEMORY;
        else {
            st->n_shards = i;                               /* entries take this as their shard */
            s = mft__shard_open(st, &st->shards[i], path);
            mft__strfree(st->ctx, path);
        }
    }
    st->n_shards = n;
    return s == MFT_OK ? mft__safetensors_index(st) : s;
}

static int mft__plain_name(const char *name, size_t bytes)
{
    return bytes > 0 && bytes < 256 && strlen(name) == bytes && !strpbrk(name, "/\\:") && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

static mft_status mft__index_open(mft_safetensors *st, const char *path)
{
    mft_context    *ctx   = st->ctx;
    const char    **names = NULL, *swap, *file, *tensor;
    const mft_json *map, *value;
    mft_json       *root  = NULL;
    char           *dir   = NULL, *shard;
    size_t          bytes, i, count;
    int             n = 0, k;
    mft_status      s;
    mft__name_text  a, b;

    s = mft_json_load(ctx, path, &root);
    if (s != MFT_OK) return s;
    map   = mft_json_get(root, "weight_map");
    count = mft_json_type(map) == MFT_JSON_OBJECT ? mft_json_count(map) : 0;
    if (!count) { s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: has no weight_map, an object that names a file for each tensor", mft__path(path)); goto done; }
    dir   = mft__path_dir(ctx, path);
    names = dir ? (const char **)mft__alloc(ctx, MFT__MAX_SHARDS * sizeof *names) : NULL;
    if (!names) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }

    for (i = 0; i < count; i++) {
        file = mft_json_string(mft_json_at(map, i, &tensor), &bytes);
        if (!file || !mft__plain_name(file, bytes)) {
            s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: tensor '%s': '%s' is not the name of a file beside it", mft__path(path),
                          mft__name(tensor, strlen(tensor), &a), mft__name(file ? file : "?", file ? bytes : 1, &b));
            goto done;
        }
        for (k = n - 1; k >= 0 && strcmp(names[k], file) != 0; k--) ;      /* the latest first: tensors come in runs */
        if (k >= 0) continue;
        if (n == MFT__MAX_SHARDS) { s = mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: more than %d shards", mft__path(path), (int)MFT__MAX_SHARDS); goto done; }
        names[n++] = file;
        shard = mft__path_join(ctx, dir, file);
        if (!shard) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
        if (!mft__file_exists(ctx, shard))
            s = mft__fail(ctx, MFT_ERR_IO, "%s: is missing or unreadable; %s says it has tensor '%s'", mft__path(shard), mft__file_name(path), mft__name(tensor, strlen(tensor), &a));
        mft__strfree(ctx, shard);
        if (s != MFT_OK) goto done;
    }
    mft__sort(names, (size_t)n, sizeof *names, mft__text_before, &swap);
    s = mft__shards_open(st, dir, names, n);
    if (s != MFT_OK) goto done;

    for (i = 0; i < count; i++) {
        const mft_safetensors_entry *e;
        file = mft_json_string(mft_json_at(map, i, &tensor), &bytes);
        e    = mft_safetensors_find(st, tensor);
        if (e && strcmp(mft__file_name(st->shards[e->shard].path), file) == 0) continue;
        s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: tensor '%s' should be in %s, but is in %s: index and shards are not of one download", mft__path(path),
                      mft__name(tensor, strlen(tensor), &a), mft__name(file, bytes, &b), e ? mft__file_name(st->shards[e->shard].path) : "no file");
        goto done;
    }
    for (i = 0; i < st->n_entries; i++) {
        value = mft_json_get(map, st->entries[i].name);
        if (value) continue;
        s = mft__tensor_fail(ctx, MFT_ERR_FORMAT, st->shards[st->entries[i].shard].path, st->entries[i].name,
                             "is not in %s: index and shards are not of one download", mft__file_name(path));
        goto done;
    }
done:
    mft__strfree(ctx, dir);
    mft__free(ctx, names, MFT__MAX_SHARDS * sizeof *names);
    mft_json_destroy(root);
    return s;
}

static mft_status mft__directory_open(mft_safetensors *st, const char *dir)
{
    static const char *const found[] = { "model.safetensors", "model.safetensors.index.json" };
    static const char *const hints[][2] = {
        { "adapter_model.safetensors", "; adapter_model.safetensors is there: an adapter, not a model" },
        { "pytorch_model.bin",         "; pytorch_model.bin is there, which this library does not read" },
        { "pytorch_model.bin.index.json", "; pytorch_model.bin shards are there, which this library does not read" }
    };
    const char *hint = "";
    int         i;
    for (i = 0; i < 5; i++) {
        char      *path = mft__path_join(st->ctx, dir, i < 2 ? found[i] : hints[i - 2][0]);
        int        there;
        mft_status s = MFT_OK;
        if (!path) return MFT_ERR_OUT_OF_MEMORY;
        there = mft__file_exists(st->ctx, path);
        if (there && i == 0) s = mft__shards_open(st, path, NULL, 1);
        if (there && i == 1) s = mft__index_open(st, path);
        mft__strfree(st->ctx, path);
        if (there && i < 2) return s;
        if (there) { hint = hints[i - 2][1]; break; }
    }
    return mft__fail(st->ctx, MFT_ERR_IO, "%s: has neither model.safetensors nor model.safetensors.index.json%s", mft__path(dir), hint);
}

MFT_API mft_status mft_safetensors_open(mft_context *ctx, const char *path, mft_safetensors **out)
{
    mft_safetensors *st;
    mft_status       s;
    int              index, directory;
    if (out) *out = NULL;
    if (!ctx || !path || !out) return MFT_ERR_INVALID_ARGUMENT;
    st = (mft_safetensors *)mft__alloc_zero(ctx, sizeof *st);
    if (!st) return MFT_ERR_OUT_OF_MEMORY;
    st->ctx = ctx;
    /* an mft_io knows no directories: there the name decides */
    index     = mft__ends_with(path, ".json");
    directory = ctx->io.open ? !index && !mft__ends_with(path, ".safetensors") : mft__file_kind(path) == MFT__DIRECTORY;
    s = directory ? mft__directory_open(st, path) : index ? mft__index_open(st, path) : mft__shards_open(st, path, NULL, 1);
    if (s != MFT_OK) { mft__safetensors_destroy(st); return s; }
    mft__object_add(ctx, &st->object, mft__safetensors_destroy);
    *out = st;
    return MFT_OK;
}

/* ==============================================================================
 * MARK: - [WRITE] Tensors into a file as the reference would lay it out
 *
 *   in    names, dtypes and shapes; then tensors, in any order
 *   out   a file sorted by dtype, widest first, then by name, its header padded to 8 bytes: so every
 *         tensor is aligned to its own size, and the bytes are those of the reference
 *         (tests/test_safetensors.c compares them)
 * ============================================================================== */
typedef struct mft__write_entry {
    mft_safetensors_spec spec;              /* its name in the writer's memory                         */
    uint64_t at, bytes;                     /* in the file                                             */
    int64_t  rows, written;                 /* along the first dimension; a scalar has one */
} mft__write_entry;

struct mft_safetensors_writer {
    mft__object       object;
    mft_context      *ctx;
    mft__writer       file;
    int               begun;                /* file wants a commit or an abort                         */
    mft__write_entry *entries;              /* in the caller's order                                   */
    int               n;
    char             *names;
    size_t            names_bytes;
    mft_status        status;               /* the first failure of a tensor                           */
};

/* The order of dtypes in a file; 0 for those it cannot hold. */
static int mft__write_rank(mft_dtype dtype)
{
    switch (dtype) {
    case MFT_I64: return 6;
    case MFT_F32: return 5;
    case MFT_I32: return 4;
    case MFT_BF16: return 3;
    case MFT_F16: return 2;
    case MFT_U8: return 1;
    default: return 0;
    }
}

static int mft__write_name_before(const void *a, const void *b)
{
    const mft__write_entry *x, *y;
    memcpy(&x, a, sizeof x); memcpy(&y, b, sizeof y);
    return strcmp(x->spec.name, y->spec.name) < 0;
}

static int mft__write_before(const void *a, const void *b)
{
    const mft__write_entry *x, *y;
    int rx, ry;
    memcpy(&x, a, sizeof x); memcpy(&y, b, sizeof y);
    rx = mft__write_rank(x->spec.dtype); ry = mft__write_rank(y->spec.dtype);
    return rx != ry ? rx > ry : strcmp(x->spec.name, y->spec.name) < 0;
}

static void mft__write_destroy(void *self)
{
    mft_safetensors_writer *w   = (mft_safetensors_writer *)self;
    mft_context            *ctx = w->ctx;
    mft__object_remove(&w->object);
    if (w->begun) mft__writer_abort(&w->file);
    mft__free(ctx, w->names, w->names_bytes);
    mft__free(ctx, w->entries, (size_t)w->n * sizeof *w->entries);
    mft__free(ctx, w, sizeof *w);
}

/* Copies and checks what shall be written. */
static mft_status mft__write_specs(mft_safetensors_writer *w, const char *path, const mft_safetensors_spec *specs, int n)
{
    mft_context *ctx = w->ctx;
    char        *name;
    int          i;
    for (i = 0; i < n; i++) {
        size_t bytes = specs[i].name ? strlen(specs[i].name) : 0;
        if (!bytes || strcmp(specs[i].name, "__metadata__") == 0 || mft__utf8_check(specs[i].name, bytes))
            return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: tensor %d has no name that can be written", mft__path(path), i);
        if (bytes > MFT__MAX_NAME) return mft__tensor_fail(ctx, MFT_ERR_INVALID_ARGUMENT, path, specs[i].name, "its name has %llu bytes", (unsigned long long)bytes);
        w->names_bytes += bytes + 1;
    }
    w->entries = (mft__write_entry *)mft__alloc_zero(ctx, (size_t)n * sizeof *w->entries);
    if (!w->entries) return MFT_ERR_OUT_OF_MEMORY;
    w->n = n;
    w->names = name = (char *)mft__alloc(ctx, w->names_bytes);
    if (!name) return MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; i < n; i++) {
        mft__write_entry *e = &w->entries[i];
        mft_tensor layout;
        size_t     bytes = strlen(specs[i].name) + 1, size = 0;
        char       why[128];
        memcpy(name, specs[i].name, bytes);
        e->spec = specs[i]; e->spec.name = name;
        name += bytes;
        if (!mft__write_rank(e->spec.dtype))
            return mft__tensor_fail(ctx, MFT_ERR_UNSUPPORTED, path, e->spec.name, "safetensors has no dtype %s", mft_dtype_name(e->spec.dtype));
        if (!mft__tensor_layout(ctx, &layout, e->spec.dtype, e->spec.ndim, e->spec.shape, &size)) {
            snprintf(why, sizeof why, "%.100s", mft_error_message(ctx));
            return mft__tensor_fail(ctx, MFT_ERR_INVALID_ARGUMENT, path, e->spec.name, "%s", why);
        }
        e->bytes = size;
        e->rows = e->spec.ndim ? e->spec.shape[0] : 1;
    }
    return MFT_OK;
}

/* Gives every entry its place, in file order, and writes the header's text. Places count from the end
 * of the header here. */
static mft_status mft__write_header(mft_safetensors_writer *w, const char *path, const char *const *metadata, mft__json_writer *out)
{
    static const char *const plain[] = { "format", "pt", NULL };
    mft__write_entry **order = (mft__write_entry **)mft__alloc(w->ctx, (size_t)w->n * sizeof *order), *swap;
    uint64_t   at = 0;
    int        i, k;
    mft_status s = MFT_OK;

    if (!order) return MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; i < w->n; i++) order[i] = &w->entries[i];
    mft__sort(order, (size_t)w->n, sizeof *order, mft__write_name_before, &swap);
    for (i = 1; i < w->n && s == MFT_OK; i++)
        if (strcmp(order[i - 1]->spec.name, order[i]->spec.name) == 0)
            s = mft__tensor_fail(w->ctx, MFT_ERR_INVALID_ARGUMENT, path, order[i]->spec.name, "is given twice");
    mft__sort(order, (size_t)w->n, sizeof *order, mft__write_before, &swap);

    mft__json_write_open(out, '{');
    if (!metadata) metadata = plain;
    if (metadata[0]) {
        mft__json_write_key(out, "__metadata__");
        mft__json_write_open(out, '{');
        for (i = 0; metadata[i] && metadata[i + 1]; i += 2) {
            mft__json_write_key(out, metadata[i]);
            mft__json_write_string(out, metadata[i + 1], -1);
        }
        mft__json_write_close(out, '}');
    }
    for (i = 0; i < w->n; i++) {
        mft__write_entry *e = order[i];
        mft__json_write_key(out, e->spec.name);
        mft__json_write_open(out, '{');
        mft__json_write_key(out, "dtype"); mft__json_write_string(out, mft_dtype_name(e->spec.dtype), -1);
        mft__json_write_key(out, "shape");
        mft__json_write_open(out, '[');
        for (k = 0; k < e->spec.ndim; k++) mft__json_write_integer(out, e->spec.shape[k]);
        mft__json_write_close(out, ']');
        mft__json_write_key(out, "data_offsets");
        mft__json_write_open(out, '[');
        e->at = at;
        mft__json_write_integer(out, (int64_t)at);
        at += e->bytes;                                     /* each below 2^60 and n below 2^31: see mft__tensor_layout */
        mft__json_write_integer(out, (int64_t)at);
        mft__json_write_close(out, ']');
        mft__json_write_close(out, '}');
        if (at > (uint64_t)1 << 62 && s == MFT_OK) s = mft__tensor_fail(w->ctx, MFT_ERR_INVALID_ARGUMENT, path, e->spec.name, "the file would be too long");
    }
    mft__json_write_close(out, '}');
    while (!out->failed && out->bytes % 8) mft__json_write_raw(out, " ", 1);
    mft__free(w->ctx, order, (size_t)w->n * sizeof *order);
    if (s == MFT_OK && out->failed) s = MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK && out->bytes > MFT__MAX_HEADER)
        s = mft__fail(w->ctx, MFT_ERR_UNSUPPORTED, "%s: its header would have %llu bytes, at most %d are allowed", mft__path(path),
                      (unsigned long long)out->bytes, (int)MFT__MAX_HEADER);
    return s;
}

MFT_API mft_status mft_safetensors_write_begin(mft_context *ctx, const char *path, const mft_safetensors_spec *specs, int n,
                                               const char *const *metadata, mft_safetensors_writer **out)
{
    mft_safetensors_writer *w;
    mft__json_writer        header;
    unsigned char           length[8];
    mft_status              s;
    int                     i;

    if (out) *out = NULL;
    if (!ctx || !path || !out || n < 0 || (n && !specs)) return MFT_ERR_INVALID_ARGUMENT;
    w = (mft_safetensors_writer *)mft__alloc_zero(ctx, sizeof *w);
    if (!w) return MFT_ERR_OUT_OF_MEMORY;
    w->ctx = ctx;
    mft__json_write_start(&header, ctx, 0);
    s = mft__write_specs(w, path, specs, n);
    if (s == MFT_OK) s = mft__write_header(w, path, metadata, &header);
    if (s == MFT_OK) s = mft__writer_begin(ctx, path, &w->file);
    w->begun = s == MFT_OK;
    if (s == MFT_OK) {
        for (i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header.bytes >> 8 * i);
        for (i = 0; i < n; i++) w->entries[i].at += header.bytes + 8;
        mft__writer_put(&w->file, length, 8);
        s = mft__writer_put(&w->file, header.text, header.bytes);
    }
    mft__json_write_free(&header);
    if (s != MFT_OK) { mft__write_destroy(w); return s; }
    mft__object_add(ctx, &w->object, mft__write_destroy);
    *out = w;
    return MFT_OK;
}

/* The next rows of e; whole: all of them at once. */
static mft_status mft__write_rows(mft_safetensors_writer *w, mft__write_entry *e, const mft_tensor *t, int whole)
{
    mft__piece  in, out;
    const char *path = w->file.path;
    int64_t     i, n, total = mft_tensor_numel(t), done, rows = t->ndim ? t->shape[0] : 1, passed = 0, piece;
    int         k, same = e->spec.ndim == t->ndim && (!whole || rows == e->rows);
    uint64_t    row_bytes = e->bytes / (uint64_t)e->rows, at = e->at + row_bytes * (uint64_t)e->written;
    mft_status  s;

    for (k = 1; same && k < t->ndim; k++) same = e->spec.shape[k] == t->shape[k];
    if (!same || !t->data) return mft__tensor_fail(w->ctx, MFT_ERR_INVALID_ARGUMENT, path, e->spec.name, "%s", same ? "has no data" : "has not the announced shape");
    if (rows > e->rows - e->written) return mft__tensor_fail(w->ctx, MFT_ERR_INVALID_ARGUMENT, path, e->spec.name, "is written a second time");
    if (!mft__converts(t->dtype, e->spec.dtype))
        return mft__tensor_fail(w->ctx, MFT_ERR_UNSUPPORTED, path, e->spec.name, "is %s, which does not convert to %s", mft_dtype_name(t->dtype), mft_dtype_name(e->spec.dtype));
    e->written += rows;
    s = mft__writer_seek(&w->file, at);
    if (t->dtype == e->spec.dtype && mft__is_contiguous(t)) {
        piece = mft__paged_piece(w->ctx, t, total);
        for (i = 0; i < total && s == MFT_OK; i += n) {
            n = mft__min(total - i, piece);
            s = mft__writer_put(&w->file, (const char *)t->data + mft_dtype_bytes(t->dtype, i), mft_dtype_bytes(t->dtype, n));
            mft__passed(w->ctx, t, i, n);
        }
        return s;
    }
    for (i = 0; i < total && s == MFT_OK; i += n) {
        n = mft__min(total - i, MFT__PIECE);
        mft__strided(t, i, n, in.bytes, 1);
        done = mft__convert(w->ctx, out.bytes, e->spec.dtype, in.bytes, t->dtype, n);
        if (done < n) return mft__tensor_fail(w->ctx, MFT_ERR_INVALID_ARGUMENT, path, e->spec.name, "element %lld is too large for I32", (long long)(i + done));
        s = mft__writer_put(&w->file, out.bytes, mft_dtype_bytes(e->spec.dtype, n));
        mft__passing(w->ctx, t, &passed, i + n);
    }
    return s;
}

static mft_status mft__write_piece(mft_safetensors_writer *w, int index, const mft_tensor *t, int whole)
{
    mft_status s;
    if (!w || !t) return MFT_ERR_INVALID_ARGUMENT;
    if (index < 0 || index >= w->n) return mft__fail(w->ctx, MFT_ERR_INVALID_ARGUMENT, "%s: there is no tensor %d of %d", mft__path(w->file.path), index, w->n);
    s = mft__write_rows(w, &w->entries[index], t, whole);
    if (w->status == MFT_OK) w->status = s;
    return s;
}

MFT_API mft_status mft_safetensors_write_tensor(mft_safetensors_writer *w, int index, const mft_tensor *t) { return mft__write_piece(w, index, t, 1); }
MFT_API mft_status mft_safetensors_write_rows  (mft_safetensors_writer *w, int index, const mft_tensor *t) { return mft__write_piece(w, index, t, 0); }

MFT_API mft_status mft_safetensors_write_commit(mft_safetensors_writer *w)
{
    mft_status s;
    int        i;
    if (!w) return MFT_ERR_INVALID_ARGUMENT;
    s = w->status;
    for (i = 0; i < w->n && s == MFT_OK; i++)
        if (w->entries[i].written < w->entries[i].rows)
            s = mft__tensor_fail(w->ctx, MFT_ERR_INVALID_ARGUMENT, w->file.path, w->entries[i].spec.name, w->entries[i].written ? "lacks rows" : "was never written");
    if (s == MFT_OK) {
        s = mft__writer_commit(&w->file);
        w->begun = 0;
    }
    mft__write_destroy(w);
    return s;
}

MFT_API void mft_safetensors_write_abort(mft_safetensors_writer *w)
{
    if (w) mft__write_destroy(w);
}

MFT_API mft_status mft_safetensors_save(mft_context *ctx, const char *path, mft_tensor *const *named, int n, const char *const *metadata)
{
    mft_safetensors_writer *w = NULL;
    mft_safetensors_spec   *specs;
    mft_status              s = MFT_OK;
    int                     i;
    if (!ctx || !path || n < 0 || (n && !named)) return MFT_ERR_INVALID_ARGUMENT;
    specs = (mft_safetensors_spec *)mft__alloc_zero(ctx, (size_t)n * sizeof *specs);
    if (!specs) return MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; i < n && s == MFT_OK; i++) {
        if (!named[i]) { s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: tensor %d is NULL", mft__path(path), i); break; }
        specs[i].name = named[i]->name; specs[i].dtype = named[i]->dtype; specs[i].ndim = named[i]->ndim;
        memcpy(specs[i].shape, named[i]->shape, sizeof specs[i].shape);
    }
    if (s == MFT_OK) s = mft_safetensors_write_begin(ctx, path, specs, n, metadata, &w);
    for (i = 0; i < n && s == MFT_OK; i++) s = mft_safetensors_write_tensor(w, i, named[i]);
    if (s == MFT_OK) s = mft_safetensors_write_commit(w);
    else mft_safetensors_write_abort(w);
    mft__free(ctx, specs, (size_t)n * sizeof *specs);
    return s;
}

#endif /* MFT_IMPLEMENTATION */

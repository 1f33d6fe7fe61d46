/* test_threads.c - the pool: every chunk once, numbers that do not know the threads, no thread left */
#define _GNU_SOURCE 1
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>
#include <sys/resource.h>

/* the n-th pthread_create from now fails; 0: none does */
static int fail_create_at;
static int test_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *arg)
{
    if (fail_create_at && --fail_create_at == 0) return 11;
    return pthread_create(t, a, f, arg);
}
#define pthread_create test_pthread_create
#define MFT_IMPLEMENTATION
#include "../mft.h"
#undef pthread_create
#include "test.h"

static mft_context *context(int n_threads)
{
    mft_context_desc d;
    mft_context     *ctx = NULL;
    memset(&d, 0, sizeof d);
    d.n_threads = n_threads;
    mft_context_create(&d, &ctx);
    return ctx;
}

/* As on a machine with a core for each thread: all workers are woken and take part. */
static mft_context *context_awake(int n_threads)
{
    mft_context *ctx = context(n_threads);
#ifndef MFT_NO_THREADS
    if (ctx && ctx->pool) ctx->pool->most = n_threads - 1;
#endif
    return ctx;
}

static void nap(long ms) { struct timespec t; t.tv_sec = 0; t.tv_nsec = ms * 1000000; nanosleep(&t, NULL); }

static double cpu(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static int threads_alive(void)               /* -1 where /proc does not say */
{
    FILE *f = fopen("/proc/self/status", "r");
    char  line[256];
    int   n = -1;
    if (!f) return -1;
    while (fgets(line, sizeof line, f)) if (sscanf(line, "Threads: %d", &n) == 1) break;
    fclose(f);
    return n;
}

/* A joined thread is out of our memory, but the system may count it a moment longer: 5 s are for a loaded machine. */
static int threads_back_to(int n)
{
    int i;
    for (i = 0; i < 500 && threads_alive() != n; i++) nap(10);
    return threads_alive() == n;
}

/* ---- every element once, in the caller's chunks ---- */
typedef struct visit { unsigned char *seen; int64_t n, grain; int n_threads, bad; int busy[MFT__MAX_THREADS]; } visit;

static void visit_run(void *arg, int64_t begin, int64_t end, int worker)
{
    visit  *v = (visit *)arg;
    int64_t i;
    int     bad = worker < 0 || worker >= v->n_threads || begin % v->grain
                || end != (v->n - begin > v->grain ? begin + v->grain : v->n);
    if (!bad && __atomic_exchange_n(&v->busy[worker], 1, __ATOMIC_ACQ_REL)) bad = 1;    /* two at once under one index */
    for (i = begin; i < end; i++) v->seen[i]++;
    if (!bad) __atomic_store_n(&v->busy[worker], 0, __ATOMIC_RELEASE);
    if (bad) __atomic_fetch_add(&v->bad, 1, __ATOMIC_RELAXED);
}

static void test_each_chunk_once(void)
{
    static const int     threads[] = { 1, 2, 3, 5, 8 };
    static const int64_t sizes[]   = { 0, 1, 2, 7, 64, 1001 }, grains[] = { 1, 3, 64, 5000 };
    unsigned char seen[1001];
    size_t t, s, g;
    int    again;
    for (t = 0; t < sizeof threads / sizeof *threads; t++) {
        mft_context *ctx = context_awake(threads[t]);
        CHECK(ctx != NULL);
        if (!ctx) return;
        for (again = 0; again < 20; again++)
        for (s = 0; s < sizeof sizes / sizeof *sizes; s++) for (g = 0; g < sizeof grains / sizeof *grains; g++) {
            visit   v;
            int64_t i, wrong = 0;
            memset(&v, 0, sizeof v);
            memset(seen, 0, sizeof seen);
            v.seen = seen; v.n = sizes[s]; v.grain = grains[g]; v.n_threads = ctx->n_threads;
            mft__parallel(ctx, v.n, v.grain, visit_run, &v);
            for (i = 0; i < 1001; i++) wrong += seen[i] != (i < v.n);
            CHECK_MSG(wrong == 0 && v.bad == 0, "%d threads, n %d, grain %d", threads[t], (int)v.n, (int)v.grain);
        }
        mft_context_destroy(ctx);
    }
}

/* ---- many short jobs, so that gates open and shut under late workers' feet ---- */
static void count_run(void *arg, int64_t begin, int64_t end, int worker)
{
    (void)worker;
    __atomic_fetch_add((int64_t *)arg, end - begin, __ATOMIC_RELAXED);
}

static void test_many_short_jobs(void)
{
    mft_context *ctx = context_awake(5);
    int64_t      total = 0, expect = 0;
    int          i;
    for (i = 0; i < 20000; i++) { mft__parallel(ctx, i % 13, 1 + i % 3, count_run, &total); expect += i % 13; }
    CHECK(total == expect);
    mft_context_destroy(ctx);
}

static void test_no_thread_left(void)
{
    int before = threads_alive(), i;
    mft_context *ctx;
    if (before < 0) SKIP("no thread left: no /proc/self/status");
    ctx = context(6);
#ifdef MFT_NO_THREADS
    CHECK(threads_back_to(before));
#else
    CHECK(threads_alive() == before + 5);
#endif
    mft_context_destroy(ctx);
    CHECK(threads_back_to(before));
    for (i = 1; i <= 4; i++) {               /* the i-th thread cannot start: no context, no thread, nothing allocated */
        mft_context_desc d;
        mft_status       s;
        memset(&d, 0, sizeof d);
        d.n_threads = 5;
        ctx = (mft_context *)&d;
        fail_create_at = i;
        s = mft_context_create(&d, &ctx);
#ifdef MFT_NO_THREADS
        CHECK(s == MFT_OK); mft_context_destroy(ctx);
#else
        CHECK(s == MFT_ERR_OUT_OF_MEMORY && ctx == NULL);
#endif
        fail_create_at = 0;
        CHECK(threads_back_to(before));
    }
}

/* As many threads as cores this process may run on: all that it was started with, then one of them. */
static void test_defaults_and_limits(void)
{
    mft_context *ctx = context(0);
#ifdef MFT_NO_THREADS
    CHECK(ctx->n_threads == 1);
    mft_context_destroy(ctx);
#elif defined(CPU_COUNT)
    cpu_set_t all, one;
    int       i;
    CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
    CHECK(ctx->n_threads == CPU_COUNT(&all) || ctx->n_threads == MFT__MAX_THREADS);
    mft_context_destroy(ctx);
    for (i = 0; !CPU_ISSET(i, &all); i++) { }
    CPU_ZERO(&one); CPU_SET(i, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    ctx = context(0);
    CHECK(ctx->n_threads == 1);
    mft_context_destroy(ctx);
    CHECK(sched_setaffinity(0, sizeof all, &all) == 0);
#else
    CHECK(ctx->n_threads == (int)sysconf(_SC_NPROCESSORS_ONLN) || ctx->n_threads == MFT__MAX_THREADS);
    mft_context_destroy(ctx);
#endif
}

#ifndef MFT_NO_THREADS
/* ---- cores of unequal speed: one thread stays in its first chunk until all others are done, as on a core that is
 *      infinitely slow. A share of its own for each thread would never end. ---- */
typedef struct slow { int64_t n, done; int slow_worker, stuck, late, by[8]; float *sum; const float *x; } slow;

static void slow_run(void *arg, int64_t begin, int64_t end, int worker)
{
    slow   *s = (slow *)arg;
    int64_t i;
    int     k;
    if (worker == s->slow_worker || (s->slow_worker < 0 && worker)) {       /* -1: the first worker that comes */
        if (__atomic_fetch_add(&s->stuck, 1, __ATOMIC_ACQ_REL) == 0) {
            for (k = 0; k < 10000 && __atomic_load_n(&s->done, __ATOMIC_ACQUIRE) < s->n - 1; k++) nap(1);
            if (k == 10000) __atomic_store_n(&s->late, 1, __ATOMIC_RELAXED);
        }
    } else for (k = 0; k < 10000 && !__atomic_load_n(&s->stuck, __ATOMIC_ACQUIRE); k++) nap(1);    /* leaves it a chunk */
    for (i = begin; i < end; i++) s->sum[begin] += s->x[i];
    __atomic_fetch_add(&s->by[worker], 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&s->done, 1, __ATOMIC_ACQ_REL);
}

static void test_slow_core(void)
{
    enum { N = 40, GRAIN = 25 };
    float x[N * GRAIN], sum[N * GRAIN], expect[N * GRAIN];
    int   which, i, j;
    for (i = 0; i < N * GRAIN; i++) { x[i] = 1.0f / (float)(i + 1); expect[i] = 0; }
    for (i = 0; i < N; i++) for (j = 0; j < GRAIN; j++) expect[i * GRAIN] += x[i * GRAIN + j];
    for (which = -1; which <= 0; which++) {             /* a worker, and the context's own thread */
        mft_context *ctx = context_awake(3);
        slow         s;
        memset(&s, 0, sizeof s); memset(sum, 0, sizeof sum);
        s.n = N; s.slow_worker = which; s.sum = sum; s.x = x;
        mft__parallel(ctx, N * GRAIN, GRAIN, slow_run, &s);
        CHECK(!s.late && s.done == N);
        CHECK(which < 0 ? s.by[1] == 1 || s.by[2] == 1 : s.by[0] == 1);     /* the slow one took one chunk */
        CHECK(memcmp(sum, expect, sizeof sum) == 0);
        mft_context_destroy(ctx);
    }
}

/* A product where one worker rests before each of its tiles has the bits of one thread's. */
static mft__task true_tiles;
static void resting_tiles(void *arg, int64_t begin, int64_t end, int worker)
{
    if (worker == 1) nap(2);
    true_tiles(arg, begin, end, worker);
}

static void test_slow_core_product(void)
{
    enum { M = 600, N = 40, K = 300 };
    static float  a[M * K], b[K * N], c[M * N], expect[M * N];
    mft__matrix   am = { a, MFT_F32, K, 1 }, bm = { b, MFT_F32, N, 1 };
    mft_context  *one = context(1), *many = context_awake(3);
    mft__kernels  row = *many->kernels;
    mft__gemm_row gemm = *row.gemm[0];
    uint32_t      seed = 1;
    int           i;
    for (i = 0; i < M * K; i++) a[i] = test_random(&seed);
    for (i = 0; i < K * N; i++) b[i] = test_random(&seed);
    true_tiles = gemm.tiles;
    gemm.tiles = resting_tiles; row.gemm[0] = &gemm; row.split = NULL; row.cblas = 0; many->kernels = &row;
    one->products.sgemm = many->products.sgemm = NULL;
    CHECK(mft__gemm(one, M, N, K, 1, am, bm, NULL, 0, expect, N));
    for (i = 0; i < 5; i++) {
        memset(c, 0, sizeof c);
        CHECK(mft__gemm(many, M, N, K, 1, am, bm, NULL, 0, c, N));
        CHECK(memcmp(c, expect, sizeof c) == 0);
    }
    mft_context_destroy(one); mft_context_destroy(many);
}

/* ---- more threads than cores: of eight threads on two cores one worker does all that the owner does not, the same
 *      each time, and the others sleep through ---- */
static void note_run(void *arg, int64_t begin, int64_t end, int worker)
{
    (void)begin; (void)end;
    __atomic_fetch_add((int *)arg + worker, 1, __ATOMIC_RELAXED);
}

static void test_no_more_awake_than_cores(void)
{
    mft_context *ctx = context(8);
    int          by[8] = { 0 }, i, workers = 0;
    ctx->pool->most = 1;
    for (i = 0; i < 500 && __atomic_load_n(&ctx->pool->n_asleep, __ATOMIC_ACQUIRE) < 7; i++) nap(10);
    CHECK(ctx->pool->n_asleep == 7);                    /* they start so */
    for (i = 0; i < 2000; i++) {
        mft__parallel(ctx, 16, 1, note_run, by);
        CHECK(__atomic_load_n(&ctx->pool->n_asleep, __ATOMIC_ACQUIRE) >= 6);
        if (i % 500 == 0) nap(2);                       /* the worker falls asleep between */
    }
    for (i = 1; i < 8; i++) workers += by[i] != 0;
    CHECK_MSG(workers <= 1, "%d workers took part", workers);
    mft_context_destroy(ctx);
}
#endif

/* A pool that does nothing uses no processor: 0.2 s of sleep cost 0.0005 s (measured); two
 * spinning workers would cost 0.4. */
static void test_idle_burns_nothing(void)
{
    mft_context *ctx = context_awake(3);
    int64_t      total = 0;
    double       c;
    mft__parallel(ctx, 100, 1, count_run, &total);
    c = cpu();
    nap(200);
    c = cpu() - c;
    CHECK_MSG(c < 0.02, "%g s of processor in 0.2 s of sleep", c);
    mft_context_destroy(ctx);
}

int main(void)
{
    TEST(test_each_chunk_once);
    TEST(test_many_short_jobs);
    TEST(test_no_thread_left);
    TEST(test_defaults_and_limits);
    TEST(test_idle_burns_nothing);
#ifndef MFT_NO_THREADS
    TEST(test_slow_core);
    TEST(test_slow_core_product);
    TEST(test_no_more_awake_than_cores);
#endif
    return test_report("threads");
}

/* test_threads.c - the pool: every chunk once, numbers that do not know the threads, no thread left */
#define _GNU_SOURCE 1
#include <pthread.h>
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
    struct timespec t = { 0, 10000000 };
    int             i;
    for (i = 0; i < 500 && threads_alive() != n; i++) nanosleep(&t, NULL);
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
        mft_context *ctx = context(threads[t]);
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
    mft_context *ctx = context(5);
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

static void test_defaults_and_limits(void)
{
    mft_context *ctx = context(0);
#ifdef MFT_NO_THREADS
    CHECK(ctx->n_threads == 1);
#else
    CHECK(ctx->n_threads == (int)sysconf(_SC_NPROCESSORS_ONLN) || ctx->n_threads == MFT__MAX_THREADS);
#endif
    mft_context_destroy(ctx);
}

/* A pool that does nothing uses no processor: 0.2 s of sleep cost 0.0005 s (measured); two
 * spinning workers would cost 0.4. */
static void test_idle_burns_nothing(void)
{
    mft_context    *ctx = context(3);
    struct timespec t = { 0, 200000000 };
    int64_t         total = 0;
    double          c;
    mft__parallel(ctx, 100, 1, count_run, &total);
    c = cpu();
    nanosleep(&t, NULL);
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
    return test_report("threads");
}

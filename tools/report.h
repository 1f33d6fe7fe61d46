/* report.h - what `mft report` does: logs of runs become one HTML page that needs nothing but a browser
 *
 *   [PAGE]      text that grows, escaping, numbers as people read them
 *   [LOG]       a log's lines into columns, and what is wrong with them in words
 *   [TRACE]     resident memory by phase
 *   [CURVE]     smoothing, thinning that keeps minima and maxima, axes and their ticks
 *   [CHART]     a figure: the drawing, the values under the pointer, a table of the same
 *   [SECTIONS]  summary, samples, settings
 *   [STYLE] [SCRIPT]  the page's own, as text
 *
 * The drawing is static SVG of 1000 x 1000 units, stretched to whatever room there is; text stands beside it as HTML, so
 * that a phone does not shrink it. Runs and lines are switched by CSS alone; the script only moves the cursor, and
 * reads the values back from the paths. Wants read_text, duration and what they need before it. */
#ifndef MFT_REPORT_HEADER
#define MFT_REPORT_HEADER

#include <stdarg.h>

enum { REPORT_RUNS = 16, REPORT_BUCKETS = 400, REPORT_PHASES = 12, REPORT_ROWS = 12 };

/* ==============================================================================
 * MARK: - [PAGE]
 * ============================================================================== */
typedef struct report_page { char *text; size_t n, cap; int failed; } report_page;

static void report_bytes(report_page *p, const char *s, size_t n)
{
    if (!p->failed && p->n + n + 1 > p->cap) {
        size_t cap = 2 * (p->n + n) + 65536;
        char  *more = (char *)realloc(p->text, cap);
        if (more) { p->text = more; p->cap = cap; } else p->failed = 1;
    }
    if (p->failed) return;
    memcpy(p->text + p->n, s, n);
    p->n += n;
    p->text[p->n] = '\0';
}

/* printf into the page: for what we write ourselves, at most 1000 bytes. */
__attribute__((format(printf, 2, 3)))
static void report_put(report_page *p, const char *format, ...)
{
    char    text[1000];
    va_list arguments;
    int     n;
    va_start(arguments, format);
    n = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (n < 0 || (size_t)n >= sizeof text) p->failed = 1; else report_bytes(p, text, (size_t)n);
}

/* Whatever came from outside: in an element or a quoted attribute it stays text. Control characters would not show. */
static void report_text(report_page *p, const char *s, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if      (c == '&')  report_bytes(p, "&amp;", 5);
        else if (c == '<')  report_bytes(p, "&lt;", 4);
        else if (c == '>')  report_bytes(p, "&gt;", 4);
        else if (c == '"')  report_bytes(p, "&quot;", 6);
        else if (c == '\'') report_bytes(p, "&#39;", 5);
        else if ((c < 32 && c != '\n' && c != '\t') || c == 127) report_bytes(p, "\xef\xbf\xbd", 3);
        else report_bytes(p, s + i, 1);
    }
}

static void report_words(report_page *p, const char *s) { report_text(p, s, strlen(s)); }

static void report_lines(report_page *p, const char *const *lines, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++) { report_bytes(p, lines[i], strlen(lines[i])); report_bytes(p, "\n", 1); }
}

typedef struct report_number { char s[64]; } report_number;    /* returned by value: may stand twice in one call */

/* Fixed decimals, thousands set apart by commas, a real minus. */
static report_number report_fixed(double v, int decimals)
{
    report_number r;
    char          digits[48];
    const char   *p = digits;
    size_t        whole, n = 0;
    snprintf(digits, sizeof digits, "%.*f", decimals, fabs(v) < 1e15 ? fabs(v) : 1e15);
    if (v < 0 && strspn(digits, "0.") != strlen(digits)) { memcpy(r.s, "\xe2\x88\x92", 3); n = 3; }
    for (whole = strcspn(digits, ".,"); *p; p++) {
        r.s[n++] = *p == ',' ? '.' : *p;
        if (whole && --whole && whole % 3 == 0) r.s[n++] = ',';
    }
    r.s[n] = '\0';
    return r;
}

/* Four digits, or the whole ones of a large number; the script's `show` writes the same. */
static report_number report_value(double v)
{
    report_number r;
    int           exponent;
    double        size = fabs(v);
    if (!(v - v == 0)) { memcpy(r.s, "\xe2\x80\x93", 4); return r; }
    if (size >= 1000) return report_fixed(v, 0);
    if (v == 0) { memcpy(r.s, "0", 2); return r; }
    exponent = (int)floor(log10(size) + 1e-12);
    if (exponent >= -2) return report_fixed(v, 3 - exponent);
    snprintf(r.s, sizeof r.s, "%.2fe%d", v / pow(10, exponent), exponent);
    return r;
}

static report_number report_time(double seconds)
{
    report_number r;
    if (seconds - seconds == 0) duration(r.s, sizeof r.s, seconds); else memcpy(r.s, "\xe2\x80\x93", 4);
    return r;
}

/* ==============================================================================
 * MARK: - [LOG]
 * ============================================================================== */
typedef enum report_column { R_STEP, R_LOSS, R_LR, R_NORM, R_RATE, R_MEMORY, R_ELAPSED, R_HELD, R_SMOOTH, R_COLUMNS } report_column;

static const char *const report_keys[R_SMOOTH] = { "step", "loss", "lr", "grad_norm", "tokens_per_second", "peak_rss_bytes", "elapsed_s", "eval_loss" };

typedef struct report_phase { char name[32]; double peak, sum; int64_t n; } report_phase;

typedef struct report_run {
    const char  *path;
    char         name[200];
    double      *of[R_COLUMNS];             /* n each; NaN where a line does not say                        */
    int64_t      n, cap;
    int64_t      n_lines, n_broken, first_broken, n_nonfinite, n_replaced, n_resumed, resumed_at;
    int          cut;                       /* the last line has no end and cannot be read                  */
    double       raw_elapsed, before;       /* of the line before; what earlier runs of this log took       */
    int64_t      best;                      /* the line with the lowest held-out loss; -1: none             */
    mft_json    *about;                     /* PATH.about.json; NULL: not there                             */
    double      *trace_s, *trace_mb;
    int64_t      n_trace, cap_trace;
    report_phase phases[REPORT_PHASES];
    int          n_phases;
} report_run;

static void report_free_run(report_run *r)
{
    int c;
    for (c = 0; c < R_COLUMNS; c++) free(r->of[c]);
    free(r->trace_s); free(r->trace_mb);
    mft_json_destroy(r->about);
    memset(r, 0, sizeof *r);
}

static int report_grow(double **columns, int n_columns, int64_t n, int64_t *cap)
{
    int64_t more = 2 * *cap + 1024;
    int     c;
    if (n < *cap) return 1;
    for (c = 0; c < n_columns; c++) {
        double *p = (double *)realloc(columns[c], (size_t)more * sizeof *p);
        if (!p) return 0;
        columns[c] = p;
    }
    *cap = more;
    return 1;
}

/* NaN and Infinity, which Python writes and JSON lacks, become an empty string and null: neither is a number. */
static void report_python(char *s)
{
    int quoted = 0;
    for (; *s; s++) {
        if (*s == '\\' && quoted && s[1]) { s++; continue; }
        if (*s == '"') quoted = !quoted;
        if (quoted) continue;
        if (!strncmp(s, "-Infinity", 9)) memcpy(s, "null     ", 9);
        else if (!strncmp(s, "Infinity", 8)) memcpy(s, "null    ", 8);
        else if (!strncmp(s, "NaN", 3)) { memcpy(s, "\"\" ", 3); s += 2; }
    }
}

/* Takes back the lines of steps that are done again: what a run writes that goes on from a checkpoint. */
static void report_go_back(report_run *r, double step)
{
    int64_t keep = r->n;
    while (keep > 0 && r->of[R_STEP][keep - 1] >= step) keep--;
    r->n_replaced += r->n - keep;
    r->n = keep;
}

/* A line's object into the columns. 0: no memory. */
static int report_record(report_run *r, const mft_json *o, double step)
{
    int            c, has_loss = mft_json_get(o, report_keys[R_LOSS]) != NULL;
    double         elapsed = mft_json_number(mft_json_get(o, report_keys[R_ELAPSED]), NAN);
    double         last = r->n ? r->of[R_STEP][r->n - 1] : -1;
    if (step == last && !has_loss) {                            /* an evaluation on a line of its own */
        double held = mft_json_number(mft_json_get(o, report_keys[R_HELD]), NAN);
        if (held == held) r->of[R_HELD][r->n - 1] = held;
        return 1;
    }
    if (!report_grow(r->of, R_COLUMNS, r->n, &r->cap)) return 0;
    if (elapsed < r->raw_elapsed || step <= last) { r->n_resumed++; r->resumed_at = (int64_t)step - 1; r->before += r->raw_elapsed; r->raw_elapsed = 0; }
    if (step <= last) report_go_back(r, step);
    for (c = 0; c < R_SMOOTH; c++) r->of[c][r->n] = mft_json_number(mft_json_get(o, report_keys[c]), NAN);
    if (elapsed == elapsed) r->raw_elapsed = elapsed;
    r->of[R_ELAPSED][r->n] = elapsed + r->before;
    r->of[R_MEMORY][r->n] /= 1048576.0;
    r->of[R_SMOOTH][r->n] = NAN;
    r->n++;
    return 1;
}

/* 0: a sentence is on stderr. */
static int report_read_log(mft_context *ctx, report_run *r)
{
    int64_t bytes = 0, i;
    char   *text = read_text(r->path, &bytes), *p = text, *end;
    int     ok = 1;
    if (!text) return 0;
    for (; ok && *p; p = end) {
        mft_json *o = NULL;
        size_t    n = strcspn(p, "\n");
        double    step = -1;
        end = p + n + (p[n] == '\n');
        p[n] = '\0';
        r->n_lines++;
        if (strspn(p, " \t\r") == n) continue;
        report_python(p);
        if (mft_json_parse(ctx, p, n, &o) == MFT_OK) step = mft_json_number(mft_json_get(o, report_keys[R_STEP]), -1);
        if (step >= 0 && step < 9e15) ok = report_record(r, o, step);
        else if (!r->n_broken++) r->first_broken = r->n_lines;
        r->cut = step < 0 && end == text + bytes && end == p + n;
        mft_json_destroy(o);
    }
    free(text);
    r->best = -1;
    for (i = 0; i < r->n; i++) {
        r->n_nonfinite += !(r->of[R_LOSS][i] - r->of[R_LOSS][i] == 0);
        if (r->of[R_HELD][i] == r->of[R_HELD][i] && (r->best < 0 || r->of[R_HELD][i] < r->of[R_HELD][r->best])) r->best = i;
    }
    if (ok && r->n) return 1;
    if (!ok) fprintf(stderr, "mft: %s: no memory for its steps\n", r->path);
    else if (!bytes) fprintf(stderr, "mft: %s: is empty: no step was logged\n", r->path);
    else fprintf(stderr, "mft: %s: no step in %lld lines: one JSON object a line is wanted, with \"step\"\n", r->path, (long long)r->n_lines);
    return 0;
}

/* What finetune wrote beside the log, if it did. */
static void report_read_about(mft_context *ctx, report_run *r)
{
    char path[4096];
    snprintf(path, sizeof path, "%s.about.json", r->path);
    if (mft__file_exists(ctx, path) && mft_json_load(ctx, path, &r->about) != MFT_OK)
        fprintf(stderr, "mft: %s: the report does without it\n", mft_error_message(ctx));
}

static const char *report_setting(const report_run *r, const char *key)
{
    return mft_json_string(mft_json_get(mft_json_get(r->about, "config"), key), NULL);
}

/* How many steps the run was to take; 0: not known. */
static int64_t report_planned(const report_run *r) { return mft_json_integer(mft_json_get(mft_json_get(r->about, "run"), "steps"), 0); }

static int64_t report_last_step(const report_run *r) { return (int64_t)r->of[R_STEP][r->n - 1]; }

/* The last finite number of a column. */
static double report_last(const report_run *r, report_column c)
{
    int64_t i;
    for (i = r->n - 1; i >= 0; i--) if (r->of[c][i] - r->of[c][i] == 0) return r->of[c][i];
    return NAN;
}

static double report_first(const report_run *r, report_column c)
{
    int64_t i;
    for (i = 0; i < r->n; i++) if (r->of[c][i] - r->of[c][i] == 0) return r->of[c][i];
    return NAN;
}

/* What is to be known about a log before its curves are believed, as list items. */
static void report_notes(report_page *p, const report_run *r, int named)
{
    int64_t planned = report_planned(r), last = report_last_step(r), broken = r->n_broken - r->cut;
    int     k;
    for (k = 0; k < 5; k++) {
        if ((k == 0 && planned <= last) || (k == 1 && !r->n_resumed) || (k == 2 && !r->n_nonfinite) || (k == 3 && !r->cut) || (k == 4 && !broken)) continue;
        report_put(p, "<li>");
        if (named) { report_words(p, r->name); report_put(p, ": "); }
        if (k == 0) report_put(p, "the log ends at step %s of %s.", report_fixed((double)last, 0).s, report_fixed((double)planned, 0).s);
        if (k == 1) {
            report_put(p, "the run was stopped and went on %s; the last time behind step %s", r->n_resumed == 1 ? "once" : "more than once", report_fixed((double)r->resumed_at, 0).s);
            if (r->n_replaced) report_put(p, ". Steps that were done again are drawn as they went last (%s %s left out)", report_fixed((double)r->n_replaced, 0).s, r->n_replaced == 1 ? "line is" : "lines are");
            report_put(p, ".");
        }
        if (k == 2) report_put(p, "%s %s no finite loss: a gap in the curve.", report_fixed((double)r->n_nonfinite, 0).s, r->n_nonfinite == 1 ? "step has" : "steps have");
        if (k == 3) report_put(p, "the last line is cut in the middle, as when a run is killed while it writes.");
        if (k == 4) report_put(p, "%s %s of the log could not be read; the first is line %s.", report_fixed((double)broken, 0).s, broken == 1 ? "line" : "lines", report_fixed((double)r->first_broken, 0).s);
        report_put(p, "</li>");
    }
}

/* ==============================================================================
 * MARK: - [TRACE] What --memory-trace of finetune wrote
 * ============================================================================== */
static int report_sample(report_run *r, double ms, double bytes, const char *phase)
{
    double       *columns[2];
    report_phase *at;
    int           k, ok;
    columns[0] = r->trace_s; columns[1] = r->trace_mb;
    ok = report_grow(columns, 2, r->n_trace, &r->cap_trace);
    r->trace_s = columns[0]; r->trace_mb = columns[1];
    if (!ok) return 0;
    r->trace_s[r->n_trace] = ms * 1e-3;
    r->trace_mb[r->n_trace++] = bytes / 1048576.0;
    for (k = 0; k < r->n_phases && strcmp(r->phases[k].name, phase); k++) {}
    if (k == REPORT_PHASES) return 1;
    at = &r->phases[k];
    if (k == r->n_phases) { r->n_phases++; snprintf(at->name, sizeof at->name, "%s", phase); }
    if (bytes / 1048576.0 > at->peak) at->peak = bytes / 1048576.0;
    at->sum += bytes / 1048576.0;
    at->n++;
    return 1;
}

/* JSONL, or CSV by its header. 0: a sentence is on stderr. */
static int report_read_trace(mft_context *ctx, report_run *r, const char *path)
{
    int64_t bytes = 0;
    char   *text = read_text(path, &bytes), *p = text, *end, phase[32];
    int     csv = text && !strncmp(text, "t_ms,", 5), ok = 1;
    if (!text) return 0;
    for (; ok && *p; p = end) {
        mft_json   *o = NULL;
        const char *name = phase;
        size_t      n = strcspn(p, "\n");
        double      ms = NAN, rss = NAN;
        end = p + n + (p[n] == '\n');
        p[n] = '\0';
        if (csv) { if (sscanf(p, "%lf,%lf,%*d,%31[^,\r]", &ms, &rss, phase) != 3) ms = NAN; }
        else if (mft_json_parse(ctx, p, n, &o) == MFT_OK) {
            ms = mft_json_number(mft_json_get(o, "t_ms"), NAN); rss = mft_json_number(mft_json_get(o, "rss_bytes"), NAN);
            name = mft_json_string(mft_json_get(o, "phase"), NULL);
        }
        if (ms - ms == 0 && rss >= 0) ok = report_sample(r, ms, rss, name ? name : "other");
        mft_json_destroy(o);
    }
    free(text);
    if (!ok) fprintf(stderr, "mft: %s: no memory for its samples\n", path);
    else if (!r->n_trace) fprintf(stderr, "mft: %s: no sample of memory in it: lines with \"t_ms\", \"rss_bytes\" and \"phase\" are wanted\n", path);
    return ok && r->n_trace;
}

/* ==============================================================================
 * MARK: - [CURVE]
 * ============================================================================== */

/* Exponential mean over about `window` steps; its beginning is a mean of what there is, not drawn to zero. */
static void report_smooth(report_run *r, int64_t window)
{
    double  a = 2.0 / ((double)window + 1), mean = 0, weight = 0;
    int64_t i;
    for (i = 0; i < r->n; i++) {
        double x = r->of[R_LOSS][i];
        if (!(x - x == 0)) continue;
        mean = (1 - a) * mean + a * x; weight = (1 - a) * weight + a;
        r->of[R_SMOOTH][i] = mean / weight;
    }
}

typedef struct report_axis { double lo, hi, step; int log; } report_axis;    /* with log: powers of ten, step of them */

static double report_place(const report_axis *a, double v)      /* 0 .. 1; NaN: not on this axis */
{
    if (a->log) v = v > 0 ? log10(v) : NAN;
    return (v - a->lo) / (a->hi - a->lo);
}

/* 1, 2 or 5 times a power of ten, so that a span has at most so many of them */
static double report_nice(double span, int most)
{
    double rough = span / most, power = pow(10, floor(log10(rough))), m = rough / power;
    return power * (m <= 1.0000001 ? 1 : m <= 2.0000001 ? 2 : m <= 5.0000001 ? 5 : 10);
}

static report_axis report_axis_of(double lo, double hi, int most, int log_scale, int round)
{
    report_axis a;
    a.log = log_scale;
    if (log_scale) { lo = log10(lo); hi = log10(hi); }
    if (!(hi > lo)) { double pad = fabs(lo) > 0 ? fabs(lo) * 0.05 : 1; if (round) lo -= pad; hi += pad; }
    if (log_scale && hi - lo < 1) { double middle = (lo + hi) / 2; lo = middle - 0.5; hi = middle + 0.5; }
    a.step = log_scale && hi - lo < most ? 1 : report_nice(hi - lo, most);
    if (a.log && a.step < 1) a.step = 1;
    a.lo = lo; a.hi = hi;
    if (!round) return a;
    if (a.log) {                                                /* to the next 1, 2, 5 */
        static const double parts[] = { 0, 0.30102999566, 0.69897000434, 1 };
        double below = floor(lo + 1e-9), above = ceil(hi - 1e-9) - 1;
        int    k;
        for (k = 0; k < 3; k++) if (below + parts[k] <= lo + 1e-9) a.lo = below + parts[k];
        for (k = 3; k > 0; k--) if (above + parts[k] >= hi - 1e-9) a.hi = above + parts[k];
        return a;
    }
    a.lo = floor(lo / a.step + 1e-9) * a.step; a.hi = ceil(hi / a.step - 1e-9) * a.step;
    return a;
}

/* The k-th tick of an axis and its label; 0: there is none any more. */
static int report_tick(const report_axis *a, int k, double *out_at, report_number *out_label)
{
    static const int parts[] = { 1, 2, 5 };
    if (!a->log) {
        double v = (ceil(a->lo / a->step - 1e-6) + k) * a->step;
        if (v > a->hi + a->step * 1e-6) return 0;
        *out_at = (v - a->lo) / (a->hi - a->lo);
        *out_label = report_fixed(v, a->step < 1 ? (int)ceil(-log10(a->step) - 1e-9) : 0);
        return 1;
    }
    {
        int    dense = a->hi - a->lo <= 2.5, power, m;
        double at;
        for (power = (int)floor(a->lo + 1e-9);; power++)
            for (m = 0; m < (dense ? 3 : 1); m++) {
                at = power + log10(parts[m]);
                if (at > a->hi + 1e-9) return 0;
                if (at < a->lo - 1e-9 || (!dense && fmod(fabs((double)power), a->step) != 0) || k-- > 0) continue;
                *out_at = (at - a->lo) / (a->hi - a->lo);
                if (power >= -4) *out_label = report_fixed(parts[m] * pow(10, power), power < 0 ? -power : 0);
                else snprintf(out_label->s, sizeof out_label->s, "%de%d", parts[m], power);
                return 1;
            }
    }
}

/* A path's data that is being written. A lone point becomes a dot, by a line of no length with round ends. */
typedef struct report_pen { report_page *p; int down; } report_pen;

static void report_coordinate(report_page *p, double v, int decimals)
{
    char text[40];
    int  n = snprintf(text, sizeof text, "%.*f", decimals, v * 1000);
    while (n > 1 && text[n - 1] == '0') n--;
    if (text[n - 1] == '.') n--;
    report_bytes(p, text, (size_t)n);
}

static void report_pen_up(report_pen *pen)
{
    if (pen->down == 1) report_put(pen->p, "h0");
    pen->down = 0;
}

static void report_pen_to(report_pen *pen, double x, double y)
{
    report_put(pen->p, pen->down ? pen->down == 1 ? "L" : " " : "M");
    report_coordinate(pen->p, x, 3);
    report_put(pen->p, ",");
    report_coordinate(pen->p, 1 - y, 2);
    pen->down = pen->down ? 2 : 1;
}

/* A curve as path data. Of many points, each of REPORT_BUCKETS stretches keeps its lowest and its highest, in their
 * order: no spike is lost, whatever the length. sparse: points that are not finite are no gaps; dots: every point on its own. */
static void report_curve(report_page *p, const report_axis *ax, const report_axis *ay, const double *x, const double *y, int64_t n, double scale, int sparse, int dots)
{
    report_pen pen;
    int64_t    i, low = -1, high = -1, bucket = -1, here;
    pen.p = p; pen.down = 0;
    for (i = 0; i <= n; i++) {
        double at = i < n ? report_place(ay, y[i] * scale) : NAN;
        int    good = at - at == 0;
        if (i < n && sparse && !good) continue;
        here = i == n ? -2 : n <= 2 * REPORT_BUCKETS || sparse ? i : (int64_t)(report_place(ax, x[i]) * REPORT_BUCKETS);
        if (here != bucket) {
            if (low >= 0) {
                int64_t a = low < high ? low : high, b = low < high ? high : low;
                report_pen_to(&pen, report_place(ax, x[a]), report_place(ay, y[a] * scale));
                if (b != a) report_pen_to(&pen, report_place(ax, x[b]), report_place(ay, y[b] * scale));
            }
            if ((bucket >= 0 && low < 0) || dots || i == n) report_pen_up(&pen);
            bucket = here; low = high = -1;
        }
        if (!good) continue;
        if (low < 0 || y[i] < y[low]) low = i;
        if (high < 0 || y[i] > y[high]) high = i;
    }
}

/* ==============================================================================
 * MARK: - [CHART]
 * ============================================================================== */
typedef struct report_chart {
    const char   *id, *title, *unit, *about;
    report_column column;
    int           from_zero, may_log;
} report_chart;

static const report_chart report_charts[] = {
    { "loss",   "Loss",          "nats per token",                        "training loss", R_SMOOTH, 0, 1 },
    { "lr",     "Learning rate", "",                                      "learning rate", R_LR,     1, 0 },
    { "norm",   "Gradient norm", "2-norm before clipping",                "gradient norm", R_NORM,   1, 1 },
    { "rate",   "Throughput",    "tokens per second, mean of the run so far", "tokens per second", R_RATE, 1, 0 },
    { "memory", "Peak memory",   "MB resident, highest so far",           "peak resident memory in MB", R_MEMORY, 1, 0 }
};
enum { N_REPORT_CHARTS = (int)(sizeof report_charts / sizeof *report_charts) };

typedef struct report_range { double lo, hi, log_sum; int64_t n; int positive; } report_range;

static void report_reach(report_range *g, const double *v, int64_t n)
{
    int64_t i;
    for (i = 0; i < n; i++) {
        if (!(v[i] - v[i] == 0)) continue;
        if (!g->n || v[i] < g->lo) g->lo = v[i];
        if (!g->n || v[i] > g->hi) g->hi = v[i];
        if (v[i] > 0) g->log_sum += log(v[i]); else g->positive = 0;
        g->n++;
    }
}

static report_axis report_steps(const report_run *runs, int n_runs)
{
    report_range g;
    int          r;
    memset(&g, 0, sizeof g);
    for (r = 0; r < n_runs; r++) report_reach(&g, runs[r].of[R_STEP], runs[r].n);
    return report_axis_of(g.lo, g.hi, 6, 0, 0);
}

/* 10 to the power in superscript digits: " x 10^-4" */
static void report_power(report_page *p, int exponent)
{
    static const char *const digits[] = { "\xe2\x81\xb0", "\xc2\xb9", "\xc2\xb2", "\xc2\xb3", "\xe2\x81\xb4", "\xe2\x81\xb5", "\xe2\x81\xb6", "\xe2\x81\xb7", "\xe2\x81\xb8", "\xe2\x81\xb9" };
    char        text[16];
    const char *s;
    snprintf(text, sizeof text, "%d", exponent);
    report_put(p, "\xc3\x97 10");
    for (s = text; *s; s++) report_put(p, "%s", *s == '-' ? "\xe2\x81\xbb" : digits[*s - '0']);
}

static void report_grid(report_page *p, const report_axis *ax, const report_axis *ay)
{
    double        at;
    report_number label;
    int           k;
    report_put(p, "<div class=grid aria-hidden=true>");
    for (k = 0; report_tick(ay, k, &at, &label); k++) report_put(p, "<span class=y style='bottom:%.3f%%'><i>%s</i></span>", 100 * at, label.s);
    for (k = 0; report_tick(ax, k, &at, &label); k++) report_put(p, "<span class=x style='left:%.3f%%'><i>%s</i></span>", 100 * at, label.s);
    report_put(p, "</div>");
}

/* The line of the last step that is not behind `step`; -1: the run has none there. */
static int64_t report_at(const report_run *r, double step)
{
    int64_t lo = 0, hi = r->n;
    if (!r->n || step < r->of[R_STEP][0] || step > r->of[R_STEP][r->n - 1]) return -1;
    while (hi - lo > 1) { int64_t middle = lo + (hi - lo) / 2; if (r->of[R_STEP][middle] <= step) lo = middle; else hi = middle; }
    return lo;
}

static void report_table_head(report_page *p, const char *caption, const char *first, const char *classes, const report_run *runs, int n_runs, const char *single)
{
    int r;
    report_put(p, "<div class=scroll tabindex=0 role=region aria-label='Table: %s'><table><caption>%s</caption><thead><tr><th scope=col>%s</th>", caption, caption, first);
    for (r = 0; r < n_runs; r++) {
        report_put(p, "<th scope=col class='%s r%d'>", classes, r);
        if (n_runs == 1) report_put(p, "%s", single); else report_words(p, runs[r].name);
        report_put(p, "</th>");
    }
    report_put(p, "</tr></thead><tbody>");
}

/* REPORT_ROWS steps of a curve, evenly spaced. */
static void report_curve_table(report_page *p, const report_chart *c, const report_axis *ax, const report_run *runs, int n_runs)
{
    char    caption[120];
    int64_t last = -1;
    int     k, r;
    snprintf(caption, sizeof caption, "%s by step%s", c->title, c->column == R_SMOOTH ? ", training, smoothed" : "");
    report_table_head(p, caption, "Step", "number", runs, n_runs, c->title);
    for (k = 0; k < REPORT_ROWS; k++) {
        int64_t step = (int64_t)floor(ax->lo + (ax->hi - ax->lo) * k / (REPORT_ROWS - 1) + 0.5);
        if (step == last) continue;
        last = step;
        report_put(p, "<tr><th scope=row>%s</th>", report_fixed((double)step, 0).s);
        for (r = 0; r < n_runs; r++) {
            int64_t i = report_at(&runs[r], (double)step);
            report_put(p, "<td class='number r%d'>%s</td>", r, report_value(i < 0 ? NAN : runs[r].of[c->column][i]).s);
        }
        report_put(p, "</tr>");
    }
    report_put(p, "</tbody></table></div>");
}

/* Evaluations: all of them, or so many evenly spaced and the last. */
static void report_held_table(report_page *p, const report_run *runs, int n_runs)
{
    int     r;
    for (r = 0; r < n_runs; r++) {
        int64_t i, n = 0, k = 0, every;
        for (i = 0; i < runs[r].n; i++) n += runs[r].of[R_HELD][i] == runs[r].of[R_HELD][i];
        if (!n) continue;
        every = (n + 2 * REPORT_ROWS - 1) / (2 * REPORT_ROWS);
        report_put(p, "<div class='scroll r%d' tabindex=0 role=region aria-label='Table: evaluations of run %d'><table><caption>Held out", r, r + 1);
        if (n_runs > 1) { report_put(p, ", "); report_words(p, runs[r].name); }
        report_put(p, "</caption><thead><tr><th scope=col>Step</th><th scope=col class=number>Loss</th><th scope=col class=number>Perplexity</th></tr></thead><tbody>");
        for (i = 0; i < runs[r].n; i++) {
            double v = runs[r].of[R_HELD][i];
            if (v != v) continue;
            k++;
            if (k != n && i != runs[r].best && (k - 1) % every) continue;
            report_put(p, "<tr><th scope=row>%s%s</th><td class=number>%s</td><td class=number>%s</td></tr>", report_fixed(runs[r].of[R_STEP][i], 0).s, i == runs[r].best ? " (best)" : "",
                       report_value(v).s, report_value(exp(v)).s);
        }
        report_put(p, "</tbody></table></div>");
    }
}

/* What a chart shows, in a sentence for each run: the drawing's description. */
static void report_describe(report_page *p, const report_chart *c, const report_run *runs, int n_runs)
{
    int r;
    for (r = 0; r < n_runs; r++) {
        report_range g;
        memset(&g, 0, sizeof g);
        report_reach(&g, runs[r].of[c->column], runs[r].n);
        report_words(p, runs[r].name);
        if (!g.n) { report_put(p, ": no %s in the log. ", c->about); continue; }
        report_put(p, ": %s from %s at step %s to %s at step %s, between %s and %s", c->about, report_value(report_first(&runs[r], c->column)).s, report_fixed(runs[r].of[R_STEP][0], 0).s,
                   report_value(report_last(&runs[r], c->column)).s, report_fixed((double)report_last_step(&runs[r]), 0).s, report_value(g.lo).s, report_value(g.hi).s);
        if (c->column == R_SMOOTH && runs[r].best >= 0)
            report_put(p, "; held out, lowest %s at step %s", report_value(runs[r].of[R_HELD][runs[r].best]).s, report_fixed(runs[r].of[R_STEP][runs[r].best], 0).s);
        report_put(p, ". ");
    }
}

/* The legend, which also shows the values at the cursor; at first those of the end. */
static void report_legend(report_page *p, const report_chart *c, const report_run *runs, int n_runs)
{
    int r;
    report_put(p, "<ul class=values>");
    for (r = 0; r < n_runs; r++) {
        report_put(p, "<li class=r%d><span class=swatch></span>", r);
        if (n_runs > 1) { report_put(p, "<span class=who>"); report_words(p, runs[r].name); report_put(p, "</span> "); }
        else report_put(p, "<span class=who>%s</span> ", c->column == R_SMOOTH ? "training, smoothed" : "at the end");
        report_put(p, "<b data-of=%s-%d>%s</b>", c->id, r, report_value(report_last(&runs[r], c->column)).s);
        if (c->column == R_SMOOTH && runs[r].best >= 0)
            report_put(p, "<span class=held><span class='swatch dotted'></span><span class=who>held out</span> <b data-of=%s-%d-held>%s</b></span>", c->id, r, report_value(report_last(&runs[r], R_HELD)).s);
        report_put(p, "</li>");
    }
    report_put(p, "</ul>");
}

static void report_path(report_page *p, const char *id, int r, const char *suffix, const char *classes, const report_axis *ax, const report_axis *ay,
                        const double *x, const double *y, int64_t n, double scale, int sparse, int dots)
{
    report_put(p, "<path id=%s-%d%s class='r%d %s' d='", id, r, suffix, r, classes);
    report_curve(p, ax, ay, x, y, n, scale, sparse, dots);
    report_put(p, "'/>\n");
}

static void report_figure_open(report_page *p, const char *id, const char *title, const char *unit, const char *group, const report_axis *ax, const report_axis *ay, double show)
{
    report_put(p, "<figure class=chart id=%s data-group=%s data-x='%.17g %.17g' data-y='%.17g %.17g' data-log=%d data-show=%.17g>", id, group, ax->lo, ax->hi, ay->lo, ay->hi, ay->log, show);
    report_put(p, "<figcaption><h3>%s</h3> <span class=unit>%s", title, unit);
}

/* Steps without a finite loss: marks at the foot of the drawing. */
static void report_marks(report_page *p, const report_axis *ax, const report_run *run, int r)
{
    int64_t i;
    int     last = -1;
    if (!run->n_nonfinite) return;
    report_put(p, "<path class='r%d bad' d='", r);
    for (i = 0; i < run->n; i++) {
        double x = report_place(ax, run->of[R_STEP][i]);
        if (run->of[R_LOSS][i] - run->of[R_LOSS][i] == 0 || (int)(x * REPORT_BUCKETS) == last) continue;
        last = (int)(x * REPORT_BUCKETS);
        report_put(p, "M%.3f,985h0", 1000 * x);
    }
    report_put(p, "'/>\n");
}

/* Nothing, if no run has this column. */
static void report_draw(report_page *p, const report_chart *c, const report_run *runs, int n_runs, int64_t window)
{
    report_axis  ax = report_steps(runs, n_runs), ay;
    report_range g;
    double       scale = 1;
    int          r, exponent = 0, log_scale, is_loss = c->column == R_SMOOTH;
    memset(&g, 0, sizeof g);
    g.positive = 1;
    for (r = 0; r < n_runs; r++) {
        report_reach(&g, runs[r].of[is_loss ? R_LOSS : c->column], runs[r].n);
        if (is_loss) report_reach(&g, runs[r].of[R_HELD], runs[r].n);
    }
    if (!g.n) return;
    log_scale = c->may_log && g.positive && g.hi > 25 * exp(g.log_sum / (double)g.n);
    if (!log_scale && c->from_zero && g.lo > 0) g.lo = 0;
    if (!log_scale && g.hi > 0 && (g.hi < 0.01 || g.hi >= 1e7)) { exponent = (int)floor(log10(g.hi) + 1e-12); scale = pow(10, -exponent); }
    ay = report_axis_of(g.lo * scale, g.hi * scale, 6, log_scale, 1);
    report_figure_open(p, c->id, c->title, c->unit, "step", &ax, &ay, 1 / scale);
    if (exponent) report_power(p, exponent);
    if (log_scale) report_put(p, ", logarithmic");
    report_put(p, "</span></figcaption>");
    report_legend(p, c, runs, n_runs);
    report_put(p, "<div class=plot>");
    report_grid(p, &ax, &ay);
    report_put(p, "<svg viewBox='0 0 1000 1000' preserveAspectRatio=none role=img aria-labelledby='%s-title %s-about'><title id=%s-title>%s by step</title><desc id=%s-about>", c->id, c->id, c->id, c->title, c->id);
    report_describe(p, c, runs, n_runs);
    report_put(p, "</desc>\n");
    for (r = 0; is_loss && r < n_runs; r++) report_path(p, c->id, r, "-raw", "raw", &ax, &ay, runs[r].of[R_STEP], runs[r].of[R_LOSS], runs[r].n, scale, 0, 0);
    for (r = 0; r < n_runs; r++) report_path(p, c->id, r, "", is_loss ? "smooth" : "line", &ax, &ay, runs[r].of[R_STEP], runs[r].of[c->column], runs[r].n, scale, 0, 0);
    for (r = 0; is_loss && r < n_runs; r++) {
        if (runs[r].best >= 0) {
            report_path(p, c->id, r, "-held", "held", &ax, &ay, runs[r].of[R_STEP], runs[r].of[R_HELD], runs[r].n, scale, 1, 0);
            report_path(p, c->id, r, "-dots", "held dot", &ax, &ay, runs[r].of[R_STEP], runs[r].of[R_HELD], runs[r].n, scale, 1, 1);
        }
        report_marks(p, &ax, &runs[r], r);
    }
    report_put(p, "</svg><div class=cursor hidden></div></div><p class=axis aria-hidden=true>step</p>");
    if (is_loss) report_put(p, "<p class=note>Smoothed: an exponential mean over about %lld steps; behind it, faintly, every step.</p>", (long long)window);
    report_put(p, "<details><summary>%s as a table</summary>", c->title);
    report_curve_table(p, c, &ax, runs, n_runs);
    if (is_loss) report_held_table(p, runs, n_runs);
    report_put(p, "</details></figure>\n");
}

/* Resident memory over time from the traces, and its peak in each phase. */
static void report_draw_traces(report_page *p, const report_run *runs, int n_runs)
{
    report_axis  ax, ay;
    report_range time_range, g;
    int          r, k;
    memset(&g, 0, sizeof g);
    memset(&time_range, 0, sizeof time_range);
    for (r = 0; r < n_runs; r++) { report_reach(&time_range, runs[r].trace_s, runs[r].n_trace); report_reach(&g, runs[r].trace_mb, runs[r].n_trace); }
    if (!g.n) return;
    ax = report_axis_of(0, time_range.hi, 6, 0, 0);
    ay = report_axis_of(0, g.hi, 5, 0, 1);
    report_figure_open(p, "trace", "Memory over time", "MB resident", "time", &ax, &ay, 1);
    report_put(p, "</span></figcaption><ul class=values>");
    for (r = 0; r < n_runs; r++) {
        if (!runs[r].n_trace) continue;
        report_put(p, "<li class=r%d><span class=swatch></span><span class=who>", r);
        if (n_runs > 1) report_words(p, runs[r].name); else report_put(p, "at the end");
        report_put(p, "</span> <b data-of=trace-%d>%s</b></li>", r, report_value(runs[r].trace_mb[runs[r].n_trace - 1]).s);
    }
    report_put(p, "</ul><div class=plot>");
    report_grid(p, &ax, &ay);
    report_put(p, "<svg viewBox='0 0 1000 1000' preserveAspectRatio=none role=img aria-labelledby='trace-title trace-about'><title id=trace-title>Resident memory over time</title>"
                  "<desc id=trace-about>Highest %s MB. The table of phases beside it has the peaks.</desc>\n", report_value(g.hi).s);
    for (r = 0; r < n_runs; r++) if (runs[r].n_trace) report_path(p, "trace", r, "", "line fine", &ax, &ay, runs[r].trace_s, runs[r].trace_mb, runs[r].n_trace, 1, 0, 0);
    report_put(p, "</svg><div class=cursor hidden></div></div><p class=axis aria-hidden=true>seconds</p></figure>\n");

    report_put(p, "<figure class=chart id=phases><figcaption><h3>Memory by phase</h3> <span class=unit>MB resident</span></figcaption><div class=scroll tabindex=0 role=region aria-label='Table: memory by phase'>"
                  "<table class=bars><thead><tr><th scope=col>Phase</th>%s<th scope=col class=number>Mean</th><th scope=col class=number>Peak</th><td></td></tr></thead><tbody>", n_runs > 1 ? "<th scope=col>Run</th>" : "");
    for (r = 0; r < n_runs; r++)
        for (k = 0; k < runs[r].n_phases; k++) {
            const report_phase *f = &runs[r].phases[k];
            report_put(p, "<tr class=r%d><th scope=row>", r);
            report_words(p, f->name);
            report_put(p, "</th>");
            if (n_runs > 1) { report_put(p, "<td>"); report_words(p, runs[r].name); report_put(p, "</td>"); }
            report_put(p, "<td class=number>%s</td><td class=number>%s</td><td class=bar aria-hidden=true><span style='width:%.2f%%'></span></td></tr>",
                       report_value(f->sum / (double)f->n).s, report_value(f->peak).s, 100 * f->peak / g.hi);
        }
    report_put(p, "</tbody></table></div></figure>\n");
}

/* ==============================================================================
 * MARK: - [SECTIONS]
 * ============================================================================== */
static void report_fact(report_page *p, const char *what, const char *value, const char *more)
{
    report_put(p, "<div><dt>%s</dt><dd>%s<small>%s</small></dd></div>", what, value, more);
}

static void report_summary_one(report_page *p, const report_run *r)
{
    char        more[200];
    const char *change = report_last(r, R_SMOOTH) <= report_first(r, R_SMOOTH) ? "fell" : "rose";
    report_put(p, "<p class=lead>In %s steps", report_fixed((double)report_last_step(r), 0).s);
    if (report_last(r, R_ELAPSED) >= 0) report_put(p, " and %s", report_time(report_last(r, R_ELAPSED)).s);
    report_put(p, " the training loss %s from %s to %s", change, report_value(report_first(r, R_SMOOTH)).s, report_value(report_last(r, R_SMOOTH)).s);
    if (r->best >= 0) report_put(p, "; on held-out data it was lowest at step %s: %s, a perplexity of %s", report_fixed(r->of[R_STEP][r->best], 0).s, report_value(r->of[R_HELD][r->best]).s, report_value(exp(r->of[R_HELD][r->best])).s);
    report_put(p, ".</p><dl class=facts>");
    snprintf(more, sizeof more, "smoothed; %s at first", report_value(report_first(r, R_SMOOTH)).s);
    report_fact(p, "Training loss", report_value(report_last(r, R_SMOOTH)).s, more);
    if (r->best >= 0) {
        snprintf(more, sizeof more, "perplexity %s; %s at the end", report_value(exp(r->of[R_HELD][r->best])).s, report_value(report_last(r, R_HELD)).s);
        report_fact(p, "Held out, best", report_value(r->of[R_HELD][r->best]).s, more);
    }
    snprintf(more, sizeof more, "in %s", report_time(report_last(r, R_ELAPSED)).s);
    report_fact(p, "Steps", report_fixed((double)report_last_step(r), 0).s, report_last(r, R_ELAPSED) >= 0 ? more : "");
    if (report_last(r, R_RATE) >= 0) report_fact(p, "Throughput", report_value(report_last(r, R_RATE)).s, "tokens per second");
    if (report_last(r, R_MEMORY) >= 0) report_fact(p, "Peak memory", report_value(report_last(r, R_MEMORY)).s, "MB resident");
    report_put(p, "</dl>");
}

static void report_summary_many(report_page *p, const report_run *runs, int n_runs)
{
    int r, best = -1;
    for (r = 0; r < n_runs; r++) if (runs[r].best >= 0 && (best < 0 || runs[r].of[R_HELD][runs[r].best] < runs[best].of[R_HELD][runs[best].best])) best = r;
    if (best >= 0) {
        report_put(p, "<p class=lead>Of %d runs, <strong>", n_runs);
        report_words(p, runs[best].name);
        report_put(p, "</strong> reached the lowest held-out loss: %s at step %s, a perplexity of %s.</p>", report_value(runs[best].of[R_HELD][runs[best].best]).s,
                   report_fixed(runs[best].of[R_STEP][runs[best].best], 0).s, report_value(exp(runs[best].of[R_HELD][runs[best].best])).s);
    } else report_put(p, "<p class=lead>%d runs, none of them evaluated on held-out data.</p>", n_runs);
    report_put(p, "<div class=scroll tabindex=0 role=region aria-label='Table: the runs'><table><thead><tr><th scope=col>Run</th><th scope=col class=number>Steps</th><th scope=col class=number>Training loss</th>"
                  "<th scope=col class=number>Held out, best</th><th scope=col class=number>Perplexity</th><th scope=col class=number>Time</th><th scope=col class=number>Tokens/s</th><th scope=col class=number>Peak MB</th></tr></thead><tbody>");
    for (r = 0; r < n_runs; r++) {
        double held = runs[r].best >= 0 ? runs[r].of[R_HELD][runs[r].best] : NAN;
        report_put(p, "<tr class=r%d><th scope=row><span class=swatch></span>", r);
        report_words(p, runs[r].name);
        report_put(p, "</th><td class=number>%s</td><td class=number>%s</td><td class=number>%s</td><td class=number>%s</td><td class=number>%s</td><td class=number>%s</td><td class=number>%s</td></tr>",
                   report_fixed((double)report_last_step(&runs[r]), 0).s, report_value(report_last(&runs[r], R_SMOOTH)).s, report_value(held).s, report_value(exp(held)).s,
                   report_time(report_last(&runs[r], R_ELAPSED)).s, report_value(report_last(&runs[r], R_RATE)).s, report_value(report_last(&runs[r], R_MEMORY)).s);
    }
    report_put(p, "</tbody></table></div>");
}

static void report_summary(report_page *p, const report_run *runs, int n_runs)
{
    size_t before;
    int    r;
    report_put(p, "<section aria-labelledby=summary><h2 id=summary>Summary</h2>");
    if (n_runs == 1) report_summary_one(p, runs); else report_summary_many(p, runs, n_runs);
    report_put(p, "<ul class=notes>");
    before = p->n;
    for (r = 0; r < n_runs; r++) report_notes(p, &runs[r], n_runs > 1);
    if (p->n == before && !p->failed) p->n -= strlen("<ul class=notes>"); else report_put(p, "</ul>");
    report_put(p, "</section>\n");
}

/* What switches lines, and moves the cursor. */
static void report_controls(report_page *p, const report_run *runs, int n_runs)
{
    static const char *const ids[] = { "raw", "smooth", "held" }, *const labels[] = { "every step", "smoothed", "held out" };
    report_axis ax = report_steps(runs, n_runs);
    int         r, held = 0;
    for (r = 0; r < n_runs; r++) held |= runs[r].best >= 0;
    report_put(p, "<form class=controls aria-label='What is drawn' autocomplete=off>");
    if (n_runs > 1) {
        report_put(p, "<fieldset><legend>Runs</legend>");
        for (r = 0; r < n_runs; r++) {
            report_put(p, "<label class='run-%d'><input type=checkbox id=run-%d checked><span class=swatch></span>", r, r);
            report_words(p, runs[r].name);
            report_put(p, "</label>");
        }
        report_put(p, "</fieldset>");
    }
    report_put(p, "<fieldset><legend>Loss</legend>");
    for (r = 0; r < 2 + held; r++) report_put(p, "<label><input type=checkbox id=show-%s checked>%s</label>", ids[r], labels[r]);
    report_put(p, "</fieldset><fieldset id=scrub hidden><legend>Values at</legend><label>step <input type=range id=step min=%.17g max=%.17g step=1 value=%.17g></label> <output id=at for=step>the end</output></fieldset></form>\n",
               ax.lo, floor(ax.hi), floor(ax.hi));
}

static void report_saying(report_page *p, const char *what, const mft_json *node, const char *classes)
{
    size_t      n = 0;
    const char *s = mft_json_string(node, &n);
    if (!s) return;
    report_put(p, "<div class='saying %s'><h3>%s</h3><pre dir=auto>", classes, what);
    report_text(p, s, n);
    report_put(p, "%s</pre></div>", n ? "" : "<em>(nothing)</em>");
}

static int report_same_text(const mft_json *a, const mft_json *b)
{
    size_t      n = 0, m = 0;
    const char *s = mft_json_string(a, &n), *t = mft_json_string(b, &m);
    return s && t && n == m && !memcmp(s, t, n);
}

/* Prompts of all runs; one that several have stands once, with what each says. */
static void report_samples(report_page *p, const report_run *runs, int n_runs)
{
    const mft_json *s, *t;
    size_t          i, j, k;
    int             r, q, heading = 0, seen;
    char            what[300];
    for (r = 0; r < n_runs; r++)
        for (i = 0; (s = mft_json_at(mft_json_get(runs[r].about, "samples"), i, NULL)) != NULL; i++) {
            const mft_json *prompt = mft_json_get(s, "prompt");
            for (q = 0, seen = 0; q <= r && !seen; q++)
                for (j = 0; (q < r || j < i) && (t = mft_json_at(mft_json_get(runs[q].about, "samples"), j, NULL)) != NULL; j++) seen |= report_same_text(prompt, mft_json_get(t, "prompt"));
            if (seen || !mft_json_string(prompt, NULL)) continue;
            if (!heading++) report_put(p, "<section aria-labelledby=samples><h2 id=samples>Samples</h2><p class=note>What the model says to a prompt, before and after training: always the likeliest token.</p>");
            report_put(p, "<article class=sample>");
            report_saying(p, "Prompt", prompt, "prompt");
            report_saying(p, "The data says", mft_json_get(s, "expected"), "expected");
            report_put(p, "<div class=pair>");
            for (q = r; q < n_runs; q++)
                for (k = 0; (t = mft_json_at(mft_json_get(runs[q].about, "samples"), k, NULL)) != NULL; k++) {
                    const mft_json *before = mft_json_get(t, "before");
                    if (!report_same_text(prompt, mft_json_get(t, "prompt"))) continue;
                    if (q == r || !report_same_text(before, mft_json_get(s, "before"))) report_saying(p, "Before", before, "before");
                    snprintf(what, sizeof what, "r%d after", q);
                    if (n_runs == 1) { report_saying(p, "After", mft_json_get(t, "after"), what); break; }
                    {
                        report_page name;
                        memset(&name, 0, sizeof name);
                        report_put(&name, "<span class=swatch></span>After: ");
                        report_words(&name, runs[q].name);
                        report_saying(p, name.text ? name.text : "After", mft_json_get(t, "after"), what);
                        free(name.text);
                    }
                    break;
                }
            report_put(p, "</div></article>");
        }
    if (heading) report_put(p, "</section>\n");
}

/* A setting as a cell; the names of settings come from the union of all runs. */
static void report_setting_cell(report_page *p, const mft_json *v, int r)
{
    size_t      n = 0;
    const char *s = mft_json_string(v, &n);
    report_put(p, "<td class=r%d>", r);
    if (s) report_text(p, s, n);
    else if (mft_json_type(v) == MFT_JSON_BOOL) report_put(p, mft_json_bool(v, 0) ? "yes" : "no");
    else if (mft_json_type(v) == MFT_JSON_NUMBER) report_put(p, "%.10g", mft_json_number(v, 0));
    else report_put(p, "<span class=none>\xe2\x80\x93</span>");
    report_put(p, "</td>");
}

static int report_same_value(const mft_json *a, const mft_json *b)
{
    if (mft_json_type(a) != mft_json_type(b)) return 0;
    if (mft_json_type(a) == MFT_JSON_STRING) return report_same_text(a, b);
    if (mft_json_type(a) == MFT_JSON_NUMBER) return mft_json_number(a, 0) == mft_json_number(b, 0);
    return mft_json_bool(a, 0) == mft_json_bool(b, 0);
}

/* The rows of "run" and "config" that differ among the runs, or those that do not. returns how many */
static int report_setting_rows(report_page *p, const report_run *runs, int n_runs, int differing)
{
    static const char *const parts[] = { "run", "config" };
    int part, r, q, n = 0;
    for (part = 0; part < 2; part++)
        for (r = 0; r < n_runs; r++) {
            const mft_json *all = mft_json_get(runs[r].about, parts[part]);
            const char     *key;
            size_t          i;
            for (i = 0; mft_json_at(all, i, &key) != NULL; i++) {
                int same = 1, earlier = 0;
                for (q = 0; q < n_runs; q++) {
                    const mft_json *theirs = mft_json_get(mft_json_get(runs[q].about, parts[part]), key);
                    earlier |= q < r && theirs;
                    same &= !runs[q].about || report_same_value(mft_json_at(all, i, NULL), theirs);     /* of what is known */
                }
                if (earlier || same == differing) continue;
                n++;
                report_put(p, "<tr><th scope=row>");
                report_words(p, key);
                report_put(p, "</th>");
                for (q = 0; q < (same ? 1 : n_runs); q++) report_setting_cell(p, mft_json_get(mft_json_get(runs[same ? r : q].about, parts[part]), key), same ? n_runs : q);
                report_put(p, "</tr>");
            }
        }
    return n;
}

static void report_settings(report_page *p, const report_run *runs, int n_runs)
{
    size_t before, open;
    int    r, known = 0, listed = 0;
    for (r = 0; r < n_runs; r++) known += runs[r].about != NULL;
    report_put(p, "<section aria-labelledby=settings><h2 id=settings>Settings</h2>");
    if (known < n_runs) {
        report_put(p, "<p class=note>Not known of");
        for (r = 0; r < n_runs; r++) if (!runs[r].about) { report_put(p, "%s", listed++ ? ", " : " "); report_words(p, runs[r].name); }
        report_put(p, ": mft finetune --log FILE writes them into FILE.about.json, beside the log.</p>");
    }
    open = p->n;
    if (n_runs > 1) {
        report_table_head(p, "What differs", "Setting", "", runs, n_runs, "");
        before = p->n;
        report_setting_rows(p, runs, n_runs, 1);
        if (p->n == before && !p->failed) p->n = open; else report_put(p, "</tbody></table></div>");
    }
    open = p->n;
    report_put(p, n_runs > 1 ? "<details><summary>The same in all runs</summary>" : "");
    report_put(p, "<div class=scroll tabindex=0 role=region aria-label='Table: settings'><table><thead><tr><th scope=col>Setting</th><th scope=col>Value</th></tr></thead><tbody>");
    before = p->n;
    report_setting_rows(p, runs, n_runs, 0);
    if (p->n == before && !p->failed) p->n = open; else report_put(p, "</tbody></table></div>%s", n_runs > 1 ? "</details>" : "");
    report_put(p, "</section>\n");
}

/* ==============================================================================
 * MARK: - [STYLE]
 * ============================================================================== */
static const char *const report_style[] = {
    ":root { color-scheme: light dark; --paper: #ffffff; --card: #ffffff; --ink: #1b1f24; --soft: #57606a; --rule: #d5dae0; --hair: #e7eaee; --wash: #f5f7f9; --bad: #b42318;",
    "  --c0: #1f5fbf; --c1: #b8540a; --c2: #15774a; --c3: #7d3cb5; --c4: #b3255f; --c5: #0b7285; --c6: #7a5c14; --c7: #4b5563; }",
    "@media (prefers-color-scheme: dark) {",
    "  :root { --paper: #101418; --card: #161b21; --ink: #e4e8ec; --soft: #9ea8b3; --rule: #38414b; --hair: #252c34; --wash: #1c232a; --bad: #ff8a7a;",
    "    --c0: #78aeff; --c1: #ffa657; --c2: #5cd291; --c3: #cba0ff; --c4: #ff8fb6; --c5: #55cfe0; --c6: #dcb767; --c7: #aeb8c4; } }",
    "* { box-sizing: border-box; }",
    "html { -webkit-text-size-adjust: 100%; }",
    "body { margin: 0 auto; max-width: 76rem; padding: 0 clamp(0.9rem, 3vw, 2rem) 3rem; background: var(--paper); color: var(--ink);",
    "  font: 1rem/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }",
    "h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; letter-spacing: -0.015em; margin: 2rem 0 0.25rem; }",
    "h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 2.75rem 0 0.75rem; }",
    "h3 { font-size: 1rem; margin: 0; display: inline; }",
    ".saying h3 { display: block; font-size: 0.8rem; font-weight: 600; color: var(--soft); margin: 0 0 0.3rem; }",
    ".by, .note, .unit, .axis, small { color: var(--soft); font-size: 0.85rem; }",
    ".by { margin: 0; } .note { margin: 0.35rem 0 0; max-width: 46rem; }",
    ".lead { font-size: 1.1rem; max-width: 46rem; margin: 0 0 1rem; text-wrap: pretty; }",
    ".notes { margin: 1rem 0 0; padding: 0.6rem 1rem 0.6rem 2rem; border-left: 3px solid var(--c1); background: var(--wash); }",
    ".skip { position: absolute; left: -100rem; } .skip:focus { left: 1rem; top: 0.5rem; background: var(--card); padding: 0.5rem 1rem; z-index: 3; }",
    ":focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }",
    "",
    "/* what the runs look like: r0 .. r15 */",
    ".swatch { display: inline-block; width: 1.3rem; height: 0; border-top: 3px solid var(--c, var(--c0)); border-radius: 2px; vertical-align: 0.28em; margin-right: 0.45rem; }",
    ".swatch.dotted { border-top: 4px dotted var(--c, var(--c0)); border-radius: 0; }",
    "",
    ".facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.75rem; margin: 0; }",
    ".facts div { border: 1px solid var(--rule); border-radius: 0.6rem; padding: 0.75rem 0.9rem; background: var(--card); }",
    ".facts dt { color: var(--soft); font-size: 0.85rem; } .facts dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.25; letter-spacing: -0.01em; }",
    ".facts small { display: block; font-weight: 400; letter-spacing: 0; line-height: 1.35; margin-top: 0.15rem; }",
    "",
    ".controls { display: flex; flex-wrap: wrap; gap: 0.35rem 1.6rem; align-items: baseline; margin: 2.75rem 0 0.5rem; padding: 0.6rem 0; border-bottom: 1px solid var(--rule); background: var(--paper); }",
    "fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; align-items: center; min-width: 0; }",
    "fieldset[hidden] { display: none; }",
    "legend { float: left; font-size: 0.85rem; color: var(--soft); padding: 0; margin-right: 0.2rem; }",
    ".controls label { display: inline-flex; align-items: center; min-height: 2.2rem; cursor: pointer; } .controls input[type=checkbox] { width: 1.05rem; height: 1.05rem; margin: 0 0.45rem 0 0; accent-color: var(--c, var(--c0)); flex: none; }",
    "#step { width: clamp(8rem, 26vw, 18rem); margin: 0 0.2rem 0 0.5rem; accent-color: var(--c0); } #at { min-width: 4.5rem; font-weight: 600; }",
    "@media (min-width: 60rem) and (min-height: 40rem) { .controls { position: sticky; top: 0; z-index: 2; } }",
    "",
    ".charts { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; }",
    "@media (min-width: 52rem) { .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); } #loss { grid-column: 1 / -1; } #loss .plot { height: 21rem; } }",
    ".chart { margin: 0; padding: 0.9rem 1rem 0.8rem; border: 1px solid var(--rule); border-radius: 0.6rem; background: var(--card); min-width: 0; scroll-margin-top: 5rem; }",
    ".unit { margin-left: 0.35rem; }",
    ".values { list-style: none; margin: 0.3rem 0 0.9rem; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1.4rem; font-size: 0.9rem; }",
    ".values b { display: inline-block; min-width: 3.2rem; } .who { color: var(--soft); margin-right: 0.3rem; } .values .held { margin-left: 0.8rem; }",
    ".plot { position: relative; height: 15rem; margin: 0 0.4rem 0 3.4rem; touch-action: pan-y; cursor: crosshair; }",
    ".plot::before { content: ''; position: absolute; inset: 0 -0.5rem; }     /* the edges can be pointed at */",
    ".plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; pointer-events: none; }",
    ".grid span { position: absolute; } .grid i { position: absolute; font-style: normal; font-size: 0.75rem; line-height: 1rem; color: var(--soft); white-space: nowrap; }",
    ".grid .y { left: 0; right: 0; border-top: 1px solid var(--hair); } .grid .y i { right: calc(100% + 0.5rem); top: -0.53rem; }",
    ".grid .x { bottom: -0.35rem; height: 0.35rem; border-left: 1px solid var(--rule); } .grid .x i { top: 0.45rem; transform: translateX(-50%); }",
    ".plot::after { content: ''; position: absolute; inset: auto 0 0; border-top: 1px solid var(--rule); }",
    ".axis { margin: 1.6rem 0.4rem 0 0; text-align: right; line-height: 1rem; font-size: 0.75rem; }",
    "path { fill: none; stroke: var(--c, var(--c0)); stroke-width: 1.75; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; }",
    ".raw { stroke-width: 1; opacity: 0.3; } .smooth { stroke-width: 2.25; } .held { stroke-width: 1.25; stroke-dasharray: 3 4; } .dot { stroke-width: 7; stroke-dasharray: none; } .bad { stroke: var(--bad); stroke-width: 6; }",
    ".line.fine { stroke-width: 1; opacity: 0.85; }",
    ".cursor { position: absolute; top: 0; bottom: 0; border-left: 1px solid var(--ink); opacity: 0.55; pointer-events: none; }",
    "",
    "details { margin-top: 0.6rem; } summary { cursor: pointer; color: var(--soft); font-size: 0.85rem; padding: 0.3rem 0; }",
    ".scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 1rem; }",
    "table { border-collapse: collapse; width: 100%; font-size: 0.9rem; } caption { text-align: left; color: var(--soft); font-size: 0.85rem; padding: 0.3rem 0; }",
    "th, td { text-align: left; padding: 0.38rem 1rem 0.38rem 0; border-bottom: 1px solid var(--hair); vertical-align: top; } thead th { color: var(--soft); font-weight: 600; border-bottom-color: var(--rule); vertical-align: bottom; }",
    "tbody th { font-weight: 500; } .number { text-align: right; white-space: nowrap; } .none { color: var(--soft); }",
    "td:not(.number, .bar) { min-width: 6.5rem; } .bars td:not(.bar) { min-width: 0; } th:has(.swatch) { white-space: nowrap; } table { overflow-wrap: break-word; } td:not(.number) { overflow-wrap: anywhere; } tbody th { min-width: 6rem; }",
    ".bars .bar { width: 45%; min-width: 2.5rem; padding-right: 0; } .bar span { display: block; height: 0.7rem; margin-top: 0.35rem; border-radius: 2px; background: var(--c, var(--c0)); min-width: 2px; }",
    "",
    ".sample { border: 1px solid var(--rule); border-radius: 0.6rem; background: var(--card); padding: 0.9rem 1rem; margin: 0.9rem 0; }",
    ".pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0.9rem; } .saying { margin: 0 0 0.7rem; min-width: 0; } .pair .saying { margin: 0.3rem 0 0; }",
    "pre { margin: 0; font: 0.88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace; white-space: pre-wrap; unicode-bidi: plaintext; }",
    ".before pre, .after pre { padding: 0.6rem 0.75rem; background: var(--wash); border-radius: 0.4rem; } .after pre { border-left: 3px solid var(--c, var(--c0)); } pre em { color: var(--soft); }",
    "footer.by { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 0.8rem; }",
    "",
    "/* lines switched off; runs likewise, below */",
    "body:has(#show-raw:not(:checked)) .raw, body:has(#show-smooth:not(:checked)) .smooth, body:has(#show-held:not(:checked)) .held { display: none; }",
    "@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }",
    "@media print { .controls, .skip { display: none; } .chart, .sample { break-inside: avoid; } }"
};

/* ==============================================================================
 * MARK: - [SCRIPT] The cursor
 * ============================================================================== */
static const char *const report_script[] = {
    "'use strict';",
    "(() => {",
    "  const slider = document.getElementById('step'), output = document.getElementById('at');",
    "",
    "  // as report_value writes them",
    "  const show = v => {",
    "    if (!Number.isFinite(v)) return '\\u2013';",
    "    const size = Math.abs(v), minus = v < 0 ? '\\u2212' : '';",
    "    if (size >= 1000) return minus + Math.round(size).toLocaleString('en-US');",
    "    if (size === 0) return '0';",
    "    const power = Math.floor(Math.log10(size) + 1e-12);",
    "    return minus + (power >= -2 ? size.toFixed(3 - power) : (size / 10 ** power).toFixed(2) + 'e' + power);",
    "  };",
    "",
    "  // A figure's axes turn places in the drawing, 0 to 1000, into values and back.",
    "  const charts = [...document.querySelectorAll('figure[data-x]')].map(figure => {",
    "    const [x0, x1] = figure.dataset.x.split(' ').map(Number), [y0, y1] = figure.dataset.y.split(' ').map(Number);",
    "    const log = figure.dataset.log === '1', scale = Number(figure.dataset.show);",
    "    const value = y => { const v = y0 + (y1 - y0) * (1 - y / 1000); return (log ? 10 ** v : v) * scale; };",
    "    const series = [...figure.querySelectorAll('b[data-of]')].map(where => {",
    "      const d = document.getElementById(where.dataset.of).getAttribute('d');",
    "      return { where, points: [...d.matchAll(/(-?[\\d.]+),(-?[\\d.]+)/g)].map(m => [x0 + (x1 - x0) * m[1] / 1000, value(m[2])]) };",
    "    });",
    "    return { figure, x0, x1, series, plot: figure.querySelector('.plot'), cursor: figure.querySelector('.cursor') };",
    "  });",
    "",
    "  // The point of a curve nearest to x; nothing where the curve has not begun or has ended.",
    "  const nearest = (points, x, slack) => {",
    "    let low = 0, high = points.length - 1;",
    "    if (high < 0 || x < points[0][0] - slack || x > points[high][0] + slack) return NaN;",
    "    while (high - low > 1) { const middle = (low + high) >> 1; if (points[middle][0] <= x) low = middle; else high = middle; }",
    "    return points[x - points[low][0] <= points[high][0] - x ? low : high][1];",
    "  };",
    "",
    "  const move = (group, x) => {",
    "    for (const c of charts) {",
    "      if (c.figure.dataset.group !== group) continue;",
    "      c.cursor.hidden = false;",
    "      c.cursor.style.left = 100 * (x - c.x0) / (c.x1 - c.x0) + '%';",
    "      for (const s of c.series) s.where.textContent = show(nearest(s.points, x, (c.x1 - c.x0) / 400));",
    "    }",
    "    if (group === 'step') { slider.value = Math.round(x); output.textContent = Math.round(x).toLocaleString('en-US'); }",
    "  };",
    "",
    "  for (const c of charts) {",
    "    const follow = event => {",
    "      const box = c.plot.getBoundingClientRect();",
    "      const x = c.x0 + (c.x1 - c.x0) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));",
    "      move(c.figure.dataset.group, c.figure.dataset.group === 'step' ? Math.min(Number(slider.max), Math.round(x)) : x);",
    "    };",
    "    c.plot.addEventListener('pointermove', follow);",
    "    c.plot.addEventListener('pointerdown', follow);",
    "  }",
    "  document.querySelector('form.controls').addEventListener('submit', event => event.preventDefault());",
    "  slider.addEventListener('input', () => move('step', Number(slider.value)));",
    "  document.getElementById('scrub').hidden = false;",
    "})();"
};

/* ==============================================================================
 * MARK: - The page
 * ============================================================================== */
static void report_head(report_page *p, const report_run *runs, int n_runs)
{
    int r;
    report_put(p, "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n<meta name=viewport content='width=device-width, initial-scale=1'>\n<meta name=color-scheme content='light dark'>\n"
                  "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n<link rel=icon href='data:,'>\n<title>");
    if (n_runs == 1) report_words(p, runs[0].name); else report_put(p, "%d runs", n_runs);
    report_put(p, " \xe2\x80\x93 training report</title>\n<style>\n");
    report_lines(p, report_style, sizeof report_style / sizeof *report_style);
    for (r = 0; r < n_runs; r++) report_put(p, ".r%d, .run-%d { --c: var(--c%d); } body:has(#run-%d:not(:checked)) .r%d { display: none; }\n", r, r, r % 8, r, r);
    report_put(p, "</style>\n</head>\n<body>\n<a class=skip href='#curves'>Skip to the curves</a>\n<header><h1>");
    if (n_runs == 1) report_words(p, runs[0].name); else report_put(p, "%d training runs compared", n_runs);
    report_put(p, "</h1><p class=by>Training report");
    for (r = 0; r < n_runs; r++) {
        const char *model = report_setting(&runs[r], "model"), *data = report_setting(&runs[r], "data");
        if (n_runs > 1 || !model || !data) continue;
        report_put(p, ": ");
        report_words(p, model);
        report_put(p, " on ");
        report_words(p, data);
    }
    report_put(p, "</p></header>\n<main>\n");
}

static void report_write_page(report_page *p, const report_run *runs, int n_runs, int64_t window)
{
    int c, r;
    report_head(p, runs, n_runs);
    report_summary(p, runs, n_runs);
    report_controls(p, runs, n_runs);
    report_put(p, "<section aria-labelledby=curves><h2 id=curves>Curves</h2><div class=charts>\n");
    for (c = 0; c < N_REPORT_CHARTS; c++) report_draw(p, &report_charts[c], runs, n_runs, window);
    report_draw_traces(p, runs, n_runs);
    report_put(p, "</div></section>\n");
    report_samples(p, runs, n_runs);
    report_settings(p, runs, n_runs);
    report_put(p, "</main>\n<footer class=by>mft report of ");
    for (r = 0; r < n_runs; r++) { report_put(p, "%s", r ? ", " : ""); report_words(p, runs[r].path); }
    report_put(p, "</footer>\n<script>\n");
    report_lines(p, report_script, sizeof report_script / sizeof *report_script);
    report_put(p, "</script>\n</body>\n</html>\n");
}

/* What a run is called where it was not given a name: its file without the extension, the whole path if another has the same. */
static void report_name(report_run *runs, int n_runs, int r)
{
    const char *slash = strrchr(runs[r].path, '/'), *base = slash ? slash + 1 : runs[r].path, *dot;
    int         q;
    dot = strrchr(base, '.');
    snprintf(runs[r].name, sizeof runs[r].name, "%.*s", dot && dot > base ? (int)(dot - base) : (int)strlen(base), base);
    for (q = 0; q < n_runs; q++) if (q != r && !strcmp(runs[q].name, runs[r].name)) snprintf(runs[r].name, sizeof runs[r].name, "%s", runs[r].path);
}

#endif

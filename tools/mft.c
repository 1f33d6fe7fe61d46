/* mft.c - the command line: fine-tune, evaluate, generate with small language models
 *
 *   One table of flags; a command names those it takes. Results go to stdout, with --json as one
 *   object and nothing else; progress and errors to stderr. Exit status 0 done, 1 failed (with a
 *   sentence), 2 wrong usage, 130 interrupted.
 *
 *   ROOMS   [FLAGS] [OUTPUT] [SESSION] [FINETUNE] [PERPLEXITY] [EXAM] [GENERATE] [CHAT] [TOKENIZE] [LOGITS]
 *           [INSPECT] [MERGE] [INIT] [BENCH] [REPORT] [MAIN] */
#define MFT_IMPLEMENTATION
#include "mft.h"
#include "mft_safetensors.h"
#include "mft_models.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench.h"

/* ==============================================================================
 * MARK: - [FLAGS] One table, read for every command
 * ============================================================================== */
typedef struct several { const char *at[16]; int n; } several;      /* of a flag that may be given more than once */

typedef struct options {
    const char *model, *data, *output, *eval_data, *adapter, *lora_modules, *lr_scheduler, *optim, *format, *chat_template;
    const char *checkpoint_save_dir, *resume_from, *state_dir, *text_key, *prompt_key, *completion_key, *messages_key;
    const char *precision, *quantize, *log, *memory_trace, *prompt, *text, *file, *decode, *jsonl, *tokens, *config, *dtype, *kernels, *index, *master_dtype;
    int64_t batch_size, grad_accum_steps, seq_len, epochs, max_steps, lora_rank, warmup_steps, max_tokens, top_k, stride, threads, n_layers;
    int64_t seed, memory_budget, index_above, checkpoint_save_steps, save_total_limit, eval_steps, early_stopping_patience, max_nonfinite_steps;
    double  lora_alpha, lora_dropout, lr, lr_min, warmup_ratio, weight_decay, max_grad_norm, temperature, top_p, repetition_penalty;
    int     full, plan, no_pack, no_shuffle, assistant_loss_only, train_on_prompt, grad_checkpointing, no_grad_checkpointing, checkpoint_bf16, no_special, update_in_backward, json, ignore_eos;
    int     use_rslora, use_dora, help, load_best, skip_bad_lines;
    double  eval_split;
    const char *split, *subject, *choices, *system, *name, *sample_prompt;
    several adapters, names, memory_traces, sample_prompts, paths;
    int64_t samples;
    int64_t fewshot;
    int     compare;
    const char *path;                       /* the argument without a flag, where a command takes one; `paths`: several */
    const struct command *command;
} options;

typedef enum flag_kind { STRING, INTEGER, NUMBER, SWITCH, BYTES } flag_kind;

typedef struct flag {
    const char *name;
    flag_kind   kind;
    size_t      at;                         /* in options */
    double      low, high;                  /* what a number may be */
    const char *argument, *help;
} flag;

#define AT(field) offsetof(options, field)
#define MANY 2147483647.0
static const flag flags[] = {
    { "model",              STRING,  AT(model),              0, 0, "DIR",  "the model: a snapshot directory (config.json, *.safetensors, tokenizer)" },
    { "adapter",            STRING,  AT(adapter),            0, 0, "DIR",  "a LoRA adapter in PEFT's format; finetune starts from it" },
    { "data",               STRING,  AT(data),               0, 0, "FILE", "what to read: text, JSONL or token ids, see --format" },
    { "eval-data",          STRING,  AT(eval_data),          0, 0, "FILE", "held-out data of the same kind                               [DATA/valid.jsonl, if DATA is a directory]" },
    { "eval-split",         NUMBER,  AT(eval_split),         0, 0.9, "P",  "hold out this share of the data instead                      [0]" },
    { "eval-steps",         INTEGER, AT(eval_steps),         1, MANY, "N", "evaluate every N steps                                       [at the end only]" },
    { "early-stopping-patience", INTEGER, AT(early_stopping_patience), 1, MANY, "N", "end after N evaluations in a row without a new best" },
    { "load-best",          SWITCH,  AT(load_best),          0, 0, NULL,   "the result is what evaluated best, not what came last" },
    { "max-nonfinite-steps", INTEGER, AT(max_nonfinite_steps), 0, MANY, "N", "pass over so many steps in a row that are NaN or infinite     [3]" },
    { "output",             STRING,  AT(output),             0, 0, "PATH", "where the result goes" },
    { "format",             STRING,  AT(format),             0, 0, "KIND", "auto, text, jsonl, mmlu or tokens (raw int32 ids)            [auto]" },
    { "full",               SWITCH,  AT(full),               0, 0, NULL,   "train all weights instead of an adapter" },
    { "plan",               SWITCH,  AT(plan),               0, 0, NULL,   "print the memory the run would need, and do not run it" },
    { "lora-rank",          INTEGER, AT(lora_rank),          1, 65536, "N",   "rank of the adapter                                          [8]" },
    { "lora-alpha",         NUMBER,  AT(lora_alpha),         0, 1e9, "X",  "the adapter's product is scaled by alpha / rank              [2 rank]" },
    { "lora-dropout",       NUMBER,  AT(lora_dropout),       0, 0.999999, "P",  "dropout on the adapter's input                               [0]" },
    { "lora-modules",       STRING,  AT(lora_modules),       0, 0, "LIST", "q_proj,v_proj | all-linear | a regular expression            [the family's]" },
    { "use-rslora",         SWITCH,  AT(use_rslora),         0, 0, NULL,   "scale by alpha / sqrt(rank)" },
    { "use-dora",           SWITCH,  AT(use_dora),           0, 0, NULL,   "weight-decomposed adapter (DoRA)" },
    { "batch-size",         INTEGER, AT(batch_size),         1, 65536, "N", "sequences per forward pass                                   [1]" },
    { "grad-accum-steps",   INTEGER, AT(grad_accum_steps),   1, 1000000, "N", "forward passes per optimizer step                            [1]" },
    { "seq-len",            INTEGER, AT(seq_len),            2, 16777216, "N", "tokens per sequence or window                                [256]" },
    { "stride",             INTEGER, AT(stride),             1, MANY, "N", "tokens between the starts of windows                         [seq-len]" },
    { "epochs",             INTEGER, AT(epochs),             1, MANY, "N", "passes over the data                                         [1]" },
    { "max-steps",          INTEGER, AT(max_steps),          1, MANY, "N", "optimizer steps, instead of epochs" },
    { "lr",                 NUMBER,  AT(lr),                 0, 1e9, "X",  "peak learning rate                                           [2e-4; --full 2e-5]" },
    { "lr-min",             NUMBER,  AT(lr_min),             0, 1e9, "X",  "where the schedule ends                                      [0]" },
    { "lr-scheduler",       STRING,  AT(lr_scheduler),       0, 0, "KIND", "cosine, linear or constant                                   [cosine]" },
    { "warmup-steps",       INTEGER, AT(warmup_steps),       0, MANY, "N", "steps over which the rate rises from 0                       [0]" },
    { "warmup-ratio",       NUMBER,  AT(warmup_ratio),       0, 1, "X",    "the same as a share of all steps                             [0]" },
    { "weight-decay",       NUMBER,  AT(weight_decay),       0, 1e9, "X",  "decoupled weight decay                                       [0]" },
    { "max-grad-norm",      NUMBER,  AT(max_grad_norm),      0, 1e30, "X", "clip gradients to this 2-norm; 0: no clipping                [1]" },
    { "optim",              STRING,  AT(optim),              0, 0, "KIND", "adamw, adamw8bit (2 bytes of state a number, not 8), apollo_mini (matrices: almost none) or sgd   [adamw]" },
    { "update-in-backward", SWITCH,  AT(update_in_backward), 0, 0, NULL, "--full: update each block when its gradients are complete; they are never all in memory; clips by the norm of the step before" },
    { "seed",               INTEGER, AT(seed),               0, 9007199254740992.0, "N", "of all that is random                                        [0]" },
    { "assistant-loss-only", SWITCH, AT(assistant_loss_only), 0, 0, NULL,  "insist on chat data: learn assistant turns only" },
    { "train-on-prompt",    SWITCH,  AT(train_on_prompt),    0, 0, NULL,   "learn prompts and user turns as well" },
    { "chat-template",      STRING,  AT(chat_template),      0, 0, "FILE", "Jinja template                                               [the tokenizer's]" },
    { "text-key",           STRING,  AT(text_key),           0, 0, "KEY",  "what the data calls its text                                 [text]" },
    { "prompt-key",         STRING,  AT(prompt_key),         0, 0, "KEY",  "what it calls a prompt                                       [prompt]" },
    { "completion-key",     STRING,  AT(completion_key),     0, 0, "KEY",  "what it calls a completion                                   [completion]" },
    { "messages-key",       STRING,  AT(messages_key),       0, 0, "KEY",  "what it calls a conversation                                 [messages]" },
    { "skip-bad-lines",     SWITCH,  AT(skip_bad_lines),     0, 0, NULL,   "count lines that cannot be used and go on" },
    { "index",              STRING,  AT(index),              0, 0, "DIR",  "where the index of large data is kept; none: in memory       [OUTPUT.index]" },
    { "index-above",        BYTES,   AT(index_above),        0, 0, "SIZE", "data from this size on is large                              [16M, or 1/64 of --memory-budget]" },
    { "no-pack",            SWITCH,  AT(no_pack),            0, 0, NULL,   "one sample per row, padded on the right" },
    { "no-shuffle",         SWITCH,  AT(no_shuffle),         0, 0, NULL,   "the order of the file" },
    { "precision",          STRING,  AT(precision),          0, 0, "KIND", "of matrix products: f32 or bf16                              [f32]" },
    { "grad-checkpointing", SWITCH,  AT(grad_checkpointing), 0, 0, NULL,   "recompute every block in the backward pass: least memory     [as many as it takes]" },
    { "checkpoint-bf16",    SWITCH,  AT(checkpoint_bf16),    0, 0, NULL,   "recomputed blocks keep their inputs in bf16: half the memory, rounded gradients" },
    { "quantize",           STRING,  AT(quantize),           0, 0, "KIND", "hold the frozen blocks as q8_0 or q4_0                       [none]" },
    { "master-dtype",       STRING,  AT(master_dtype),       0, 0, "KIND", "--full: hold the trained matrices as f32 or bf16             [f32]" },
    { "no-grad-checkpointing", SWITCH,  AT(no_grad_checkpointing), 0, 0, NULL, "recompute none: fastest" },
    { "memory-budget",      BYTES,   AT(memory_budget),      0, 0, "SIZE", "most memory to use, weights in it: 512M, 2G                  [no limit]" },
    { "state-dir",          STRING,  AT(state_dir),          0, 0, "DIR",  "--full with --memory-budget: where weights, gradients and moments go that memory has no room for [the output]" },
    { "checkpoint-save-steps", INTEGER, AT(checkpoint_save_steps), 1, MANY, "N", "save a checkpoint every N steps" },
    { "checkpoint-save-dir", STRING, AT(checkpoint_save_dir), 0, 0, "DIR", "where: DIR/checkpoint-STEP                                    [the output]" },
    { "save-total-limit",   INTEGER, AT(save_total_limit),   1, MANY, "N", "keep the latest N checkpoints                                [all]" },
    { "resume-from",        STRING,  AT(resume_from),        0, 0, "DIR",  "go on from a checkpoint; latest: the newest in the save directory" },
    { "log",                STRING,  AT(log),                0, 0, "FILE", "one JSON object per step; settings and samples go into FILE.about.json, for mft report" },
    { "memory-trace",       STRING,  AT(memory_trace),       0, 0, "FILE", "resident memory every 5 ms with step and phase, as JSONL, or CSV if FILE ends in .csv; report: one for each LOG" },
    { "samples",            INTEGER, AT(samples),            0, 16, "N",   "continue N held-out prompts before and after training         [0]" },
    { "sample-prompt",      STRING,  AT(sample_prompt),      0, 0, "TEXT", "continue this as well; may be given several times" },
    { "name",               STRING,  AT(name),               0, 0, "NAME", "what the report calls a run; once for each LOG               [its file's name]" },
    { "threads",            INTEGER, AT(threads),            1, 1024, "N", "worker threads                                [cores this process may use]" },
    { "kernels",            STRING,  AT(kernels),            0, 0, "NAME", "a row of the kernel table, see mft inspect --help            [fastest]" },
    { "split",              STRING,  AT(split),              0, 0, "NAME", "dev, val or test                                             [test]" },
    { "fewshot",            INTEGER, AT(fewshot),            0, 100, "N",  "worked examples before each question, from dev/              [0]" },
    { "subject",            STRING,  AT(subject),            0, 0, "NAME", "only this one, as its file is called: anatomy                [all]" },
    { "system",             STRING,  AT(system),             0, 0, "TEXT", "what the conversation begins with, as its system message" },
    { "choices",            STRING,  AT(choices),            0, 0, "LIST", "yes,no,maybe: what each answer is one of                     [a line's \"choices\"]" },
    { "compare",            SWITCH,  AT(compare),            0, 0, NULL,   "base and --adapter side by side, with 95 % intervals of the difference" },
    { "prompt",             STRING,  AT(prompt),             0, 0, "TEXT", "what to continue" },
    { "max-tokens",         INTEGER, AT(max_tokens),         1, MANY, "N", "tokens to generate at most                                   [64]" },
    { "temperature",        NUMBER,  AT(temperature),        0, 1000, "X", "0: always the likeliest token                                [0]" },
    { "top-k",              INTEGER, AT(top_k),              0, MANY, "N", "draw from the k likeliest tokens; 0: from all                [0]" },
    { "top-p",              NUMBER,  AT(top_p),              0, 1, "P",    "draw from the likeliest tokens that make up p                [1]" },
    { "repetition-penalty", NUMBER,  AT(repetition_penalty), 0.01, 100, "X", "divides the logits of tokens seen before                     [1]" },
    { "ignore-eos",         SWITCH,  AT(ignore_eos),         0, 0, NULL,   "go on past the end-of-sequence token" },
    { "text",               STRING,  AT(text),               0, 0, "TEXT", "text to encode" },
    { "file",               STRING,  AT(file),               0, 0, "FILE", "text file to encode" },
    { "decode",             STRING,  AT(decode),             0, 0, "IDS",  "token ids to decode: \"1 2 3\"" },
    { "jsonl",              STRING,  AT(jsonl),              0, 0, "FILE", "one object with \"text\" a line in, one array of ids a line out" },
    { "no-special",         SWITCH,  AT(no_special),         0, 0, NULL,   "leave out the tokens that the tokenizer adds by itself" },
    { "tokens",             STRING,  AT(tokens),             0, 0, "FILE", "raw little-endian int32 token ids" },
    { "config",             STRING,  AT(config),             0, 0, "FILE", "init: a config.json; finetune: flags as `key: value` lines or JSON; flags given win" },
    { "dtype",              STRING,  AT(dtype),              0, 0, "KIND", "f32, f16 or bf16                                             [f32]" },
    { "json",               SWITCH,  AT(json),               0, 0, NULL,   "print one JSON object on stdout and nothing else" },
    { "help",               SWITCH,  AT(help),               0, 0, NULL,   "this text" }
};
enum { N_FLAGS = (int)(sizeof flags / sizeof *flags) };

typedef struct command {
    const char *name, *summary, *takes;     /* flag names between blanks; "PATH" for an argument without a flag */
    const char *examples;
    int       (*run)(const options *o);
} command;

/* "--name" against a flag's name; '_' counts as '-'. */
static int same_name(const char *a, const char *b)
{
    for (; *a && *b; a++, b++) if ((*a == '_' ? '-' : *a) != (*b == '_' ? '-' : *b)) return 0;
    return *a == *b;
}

/* Does a list of words between blanks hold the word? */
static int in_list(const char *list, const char *word)
{
    size_t n = strlen(word);
    while (*list) {
        while (*list == ' ') list++;
        if (!strncmp(list, word, n) && (list[n] == ' ' || !list[n])) return 1;
        while (*list && *list != ' ') list++;
    }
    return 0;
}

/* Single-character edits between two words (Levenshtein), for "did you mean". */
static int edits(const char *a, const char *b)
{
    int row[64], i, j, n = (int)strlen(b);
    if (n > 62) return 99;
    for (j = 0; j <= n; j++) row[j] = j;
    for (i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (j = 1; j <= n; j++) {
            int change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            if (row[j - 1] + 1 < change) change = row[j - 1] + 1;
            if (diagonal + 1 < change) change = diagonal + 1;
            row[j] = change;
        }
    }
    return row[n];
}

static const char *nearest_flag(const command *c, const char *name)
{
    const char *best = NULL;
    int         i, least = 4;
    for (i = 0; i < N_FLAGS; i++) {
        int d = in_list(c->takes, flags[i].name) || !strcmp(flags[i].name, "help") ? edits(name, flags[i].name) : 99;
        if (d < least) { least = d; best = flags[i].name; }
    }
    return best;
}

static int usage_error(const command *c)
{
    fprintf(stderr, "try: mft %s --help\n", c->name);
    return 2;
}

/* "512M" in bytes; -1 if it is none. K, M, G are powers of 1024. */
static int64_t parse_bytes(const char *s)
{
    char  *end;
    double v = strtod(s, &end), unit = 1;
    if (end == s || !(v > 0)) return -1;
    if (*end == 'k' || *end == 'K') unit = 1024.0;
    if (*end == 'm' || *end == 'M') unit = 1024.0 * 1024;
    if (*end == 'g' || *end == 'G') unit = 1024.0 * 1024 * 1024;
    if (unit != 1) end++;
    if (*end == 'i') end++;
    if (*end == 'b' || *end == 'B') end++;
    return *end || v * unit > 9e15 ? -1 : (int64_t)(v * unit);
}

static int add_word(several *w, const char *flag_name, const char *value)
{
    int most = (int)(sizeof w->at / sizeof *w->at);
    if (w->n == most) { fprintf(stderr, "mft: --%s %s: more than %d of them\n", flag_name, value, most); return 0; }
    w->at[w->n++] = value;
    return 1;
}

/* Stores a flag's value. 0 with a sentence on stderr if it is impossible. */
static int set_flag(options *o, const flag *f, const char *value)
{
    char  *end, *field = (char *)o + f->at;
    double number = 0;
    if (f->kind == SWITCH) { *(int *)(void *)field = 1; return 1; }
    if (f->at == AT(adapter) && !add_word(&o->adapters, f->name, value)) return 0;
    if (f->at == AT(sample_prompt) && !add_word(&o->sample_prompts, f->name, value)) return 0;
    if (f->at == AT(name) && !add_word(&o->names, f->name, value)) return 0;
    if (f->at == AT(memory_trace) && !add_word(&o->memory_traces, f->name, value)) return 0;
    if (f->kind == STRING) { *(const char **)(void *)field = value; return 1; }
    if (f->kind == BYTES) {
        int64_t bytes = parse_bytes(value);
        if (bytes < 0) { fprintf(stderr, "mft: --%s %s: not a size such as 512M or 2G\n", f->name, value); return 0; }
        *(int64_t *)(void *)field = bytes;
        return 1;
    }
    number = strtod(value, &end);
    if (end == value || *end || number != number || (f->kind == INTEGER && number != floor(number))) {
        fprintf(stderr, "mft: --%s %s: not %s\n", f->name, value, f->kind == INTEGER ? "a whole number" : "a number");
        return 0;
    }
    if (number < f->low || number > f->high) {
        fprintf(stderr, "mft: --%s %s: must be from %.10g to %.10g\n", f->name, value, f->low, f->high);
        return 0;
    }
    if (f->kind == INTEGER) *(int64_t *)(void *)field = (int64_t)number;
    else                    *(double *)(void *)field = number;
    return 1;
}

/* Reads the command's flags. 0: a sentence is on stderr. */
static int parse_flags(const command *c, int argc, char **argv, options *o)
{
    int i, k;
    for (i = 0; i < argc; i++) {
        const char *a = argv[i], *value, *near;
        char        name[64];
        size_t      n;
        if (a[0] != '-' || a[1] != '-') {
            if (in_list(c->takes, "PATHS") && a[0] != '-' && o->paths.n < (int)(sizeof o->paths.at / sizeof *o->paths.at)) { o->paths.at[o->paths.n++] = a; continue; }
            if (in_list(c->takes, "PATH") && !o->path && a[0] != '-') { o->path = a; continue; }
            if (!strcmp(a, "-h")) { o->help = 1; continue; }
            fprintf(stderr, "mft %s: \"%s\" is not a flag\n", c->name, a);
            return 0;
        }
        a += 2;
        value = strchr(a, '=');
        n = value ? (size_t)(value - a) : strlen(a);
        snprintf(name, sizeof name, "%.*s", (int)(n < 63 ? n : 63), a);
        for (k = 0; k < N_FLAGS && !same_name(name, flags[k].name); k++) {}
        if (k == N_FLAGS || (!in_list(c->takes, flags[k].name) && strcmp(flags[k].name, "help"))) {
            near = nearest_flag(c, name);
            fprintf(stderr, "mft %s: unknown flag --%s%s%s%s\n", c->name, name, near ? ", did you mean --" : "", near ? near : "", near ? "?" : "");
            return 0;
        }
        if (value) value++;
        if (flags[k].kind == SWITCH && value) { fprintf(stderr, "mft %s: --%s takes no value\n", c->name, flags[k].name); return 0; }
        if (flags[k].kind != SWITCH && !value) {
            if (i + 1 == argc) { fprintf(stderr, "mft %s: --%s needs a value\n", c->name, flags[k].name); return 0; }
            value = argv[++i];
        }
        if (!set_flag(o, &flags[k], value)) return 0;
    }
    return 1;
}

/* ---- flags from a file: flat YAML, `key: value` a line, or one JSON object ---- */
static char *config_text;                   /* what options point to; as long as the program */

static int config_error(const char *path, int line, const char *what, const char *key, const char *near)
{
    fprintf(stderr, "mft: %s: line %d: %s \"%s\"%s%s%s\n", path, line, what, key, near ? ", did you mean " : "", near ? near : "", near ? "?" : "");
    return 0;
}

static int config_pair(const command *c, options *o, const char *path, int line, const char *key, const char *value)
{
    static const char *const yes[] = { "true", "yes", "on", "1" }, *const no[] = { "false", "no", "off", "0" };
    int k, i;
    for (k = 0; k < N_FLAGS && !same_name(key, flags[k].name); k++) {}
    if (k == N_FLAGS || !in_list(c->takes, flags[k].name) || !strcmp(flags[k].name, "config")) return config_error(path, line, "unknown key", key, nearest_flag(c, key));
    if (!*value || !strcmp(value, "null") || !strcmp(value, "~")) return 1;
    if (flags[k].kind != SWITCH) return set_flag(o, &flags[k], value) || config_error(path, line, "the value of", key, NULL);
    for (i = 0; i < 4; i++) {
        if (!strcmp(value, yes[i])) return set_flag(o, &flags[k], NULL);
        if (!strcmp(value, no[i]))  return 1;
    }
    return config_error(path, line, "true or false is wanted for", key, NULL);
}

/* The value's text without blanks, quotes, a comment behind it; "[a, b]" becomes "a,b". In place. */
static char *config_scalar(char *v)
{
    char *end, *p, *q;
    while (*v == ' ' || *v == '\t') v++;
    if ((*v == '"' || *v == '\'') && (end = strchr(v + 1, *v)) != NULL) { *end = '\0'; return v + 1; }
    for (p = v; *p; p++) if (*p == '#' && (p == v || p[-1] == ' ')) { *p = '\0'; break; }
    for (end = v + strlen(v); end > v && strchr(" \t\r", end[-1]); end--) end[-1] = '\0';
    if (*v != '[' || end == v || end[-1] != ']') return v;
    for (p = q = v; *p; p++) if (!strchr("[]\"' ", *p)) *q++ = *p;
    *q = '\0';
    return v;
}

static int config_yaml(const command *c, options *o, const char *path, char *text)
{
    char *next = text;
    int   line;
    for (line = 1; next; line++) {
        char *p = next, *colon;
        next = strchr(p, '\n');
        if (next) *next++ = '\0';
        if (line == 1 && !strncmp(p, "\xef\xbb\xbf", 3)) p += 3;
        if (!p[strspn(p, " \t\r")] || p[strspn(p, " \t")] == '#' || !strncmp(p, "---", 3)) continue;
        colon = strchr(p, ':');
        if (!colon || *p == ' ' || *p == '-') return config_error(path, line, "`key: value` is wanted, not", p, NULL);
        *colon = '\0';
        if (!config_pair(c, o, path, line, config_scalar(p), config_scalar(colon + 1))) return 0;
    }
    return 1;
}

/* The members as text: what config_pair takes. */
static int config_json(const command *c, options *o, const char *path, const char *text, size_t bytes)
{
    mft_context_desc d;
    mft_context     *ctx = NULL;
    mft_json        *root = NULL;
    const mft_json  *node, *item;
    const char      *key;
    char            *at, *end;
    size_t           i, k;
    int              ok = 0;
    memset(&d, 0, sizeof d);
    d.n_threads = 1;
    config_text = (char *)malloc(bytes * 16 + 64);              /* a number of one character becomes one of 25 at most */
    if (!config_text || mft_context_create(&d, &ctx) != MFT_OK) return config_error(path, 1, "no memory for", "it", NULL);
    if (mft_json_parse(ctx, text, bytes, &root) != MFT_OK || mft_json_type(root) != MFT_JSON_OBJECT) {
        fprintf(stderr, "mft: %s: %s\n", path, root ? "one JSON object is wanted" : mft_error_message(ctx));
        goto done;
    }
    at = config_text; end = config_text + bytes * 16 + 64;
    for (i = 0, ok = 1; ok && (node = mft_json_at(root, i, &key)) != NULL; i++) {
        char *value = at;
        *at = '\0';
        for (k = 0; k < (mft_json_type(node) == MFT_JSON_ARRAY ? mft_json_count(node) : 1); k++) {
            item = mft_json_type(node) == MFT_JSON_ARRAY ? mft_json_at(node, k, NULL) : node;
            if (k) at += snprintf(at, (size_t)(end - at), ",");
            if (mft_json_type(item) == MFT_JSON_STRING)      at += snprintf(at, (size_t)(end - at), "%s", mft_json_string(item, NULL));
            else if (mft_json_type(item) == MFT_JSON_NUMBER) at += snprintf(at, (size_t)(end - at), "%.17g", mft_json_number(item, 0));
            else if (mft_json_type(item) == MFT_JSON_BOOL)   at += snprintf(at, (size_t)(end - at), mft_json_bool(item, 0) ? "true" : "false");
            else if (mft_json_type(item) != MFT_JSON_NULL)   ok = config_error(path, 1, "a flat object is wanted; not so flat is", key, NULL);
        }
        at++;
        ok = ok && config_pair(c, o, path, 1, key, value);
    }
done:
    mft_context_destroy(ctx);
    return ok;
}

static char *read_text(const char *path, int64_t *out_bytes);

/* Flags of a file into options that have their defaults. 0: a sentence is on stderr. */
static int read_config(const command *c, const char *path, options *o)
{
    int64_t bytes = 0;
    char   *text = read_text(path, &bytes), *p = text;
    int     ok;
    if (!text) return 0;
    while (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t') p++;
    if (*p != '{') { config_text = text; return config_yaml(c, o, path, text); }
    ok = config_json(c, o, path, text, (size_t)bytes);
    free(text);
    return ok;
}

static void json_string(FILE *f, const char *s);

/* Does the flag say something about a run: was it given, or has it a default? */
static int is_said(const command *c, const options *o, const flag *f)
{
    const char *at = (const char *)o + f->at;
    if (!in_list(c->takes, f->name) || in_list("config json plan resume-from", f->name)) return 0;
    if ((o->full || o->adapter) && !strncmp(f->name, "lora-", 5)) return 0;
    switch (f->kind) {
    case SWITCH:  return *(const int *)(const void *)at;
    case STRING:  return *(const char *const *)(const void *)at != NULL;
    case INTEGER: return (double)*(const int64_t *)(const void *)at >= f->low;
    case BYTES:   return *(const int64_t *)(const void *)at != 0;
    default:      return 1;
    }
}

/* The options as a file that read_config reads, all defaults filled in. */
static int write_config(const command *c, const options *o, const char *path)
{
    FILE *f = fopen(path, "w");
    int   i, k;
    for (i = 0; f && i < N_FLAGS; i++) {
        const char *at = (const char *)o + flags[i].at;
        int         times = flags[i].at == AT(sample_prompt) ? o->sample_prompts.n : 1;
        if (!is_said(c, o, &flags[i])) continue;
        for (k = 0; k < times; k++) {
            fprintf(f, "%s: ", flags[i].name);
            if (flags[i].kind == SWITCH)      fprintf(f, "true");
            else if (flags[i].kind == NUMBER) fprintf(f, "%.10g", *(const double *)(const void *)at);
            else if (flags[i].kind != STRING) fprintf(f, "%lld", (long long)*(const int64_t *)(const void *)at);
            else json_string(f, times > 1 ? o->sample_prompts.at[k] : *(const char *const *)(const void *)at);
            fprintf(f, "\n");
        }
    }
    if (f && fclose(f) == 0) return 1;
    fprintf(stderr, "mft: %s: cannot be written\n", path);
    return 0;
}

static void print_help(const command *c)
{
    int i;
    printf("mft %s - %s\n\n", c->name, c->summary);
    for (i = 0; i < N_FLAGS; i++) {
        char left[64];
        if (!in_list(c->takes, flags[i].name)) continue;
        snprintf(left, sizeof left, "--%s%s%s", flags[i].name, flags[i].argument ? " " : "", flags[i].argument ? flags[i].argument : "");
        printf("  %-29s%s\n", left, flags[i].help);
    }
    printf("\n%s", c->examples);
}

/* One of the words, by its place; -1 and a sentence on stderr if it is none. NULL is the first. */
static int choice(const char *flag_name, const char *value, const char *const *words)
{
    const char *near = NULL;
    int         i, least = 4;
    if (!value) return 0;
    for (i = 0; words[i]; i++) if (!strcmp(value, words[i])) return i;
    fprintf(stderr, "mft: --%s %s: must be one of", flag_name, value);
    for (i = 0; words[i]; i++) {
        int d = edits(value, words[i]);
        if (d < least) { least = d; near = words[i]; }
        fprintf(stderr, "%s %s", i ? "," : "", words[i]);
    }
    fprintf(stderr, near ? "; did you mean %s?\n" : "\n", near);
    return -1;
}

/* Is a flag there that the command cannot do without? */
static int need(const char *command_name, const char *flag_name, const char *value)
{
    if (value) return 1;
    fprintf(stderr, "mft %s: --%s is needed\ntry: mft %s --help\n", command_name, flag_name, command_name);
    return 0;
}

/* ==============================================================================
 * MARK: - [OUTPUT] JSON on stdout, sentences and progress on stderr
 * ============================================================================== */
static void json_string(FILE *f, const char *s)
{
    fputc('"', f);
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\') fprintf(f, "\\%c", c);
        else if (c == '\n') fputs("\\n", f);
        else if (c < 32) fprintf(f, "\\u%04x", c);
        else fputc(c, f);
    }
    fputc('"', f);
}

/* A number as JSON has it: null for NaN and infinity, which it lacks. */
static void json_number(FILE *f, double v)
{
    if (v - v == 0) fprintf(f, "%.10g", v); else fputs("null", f);
}

static void json_ids(FILE *f, const int32_t *ids, int64_t n)
{
    int64_t i;
    fputc('[', f);
    for (i = 0; i < n; i++) fprintf(f, "%s%ld", i ? "," : "", (long)ids[i]);
    fputc(']', f);
}

static size_t peak_rss(void)
{
    size_t peak;
    mft_process_memory(NULL, &peak);
    return peak;
}

static double megabytes(size_t bytes) { return (double)bytes / 1048576.0; }

/* ==============================================================================
 * MARK: - [SESSION] A context, the model, what commands share
 * ============================================================================== */
typedef struct session {
    mft_context   *ctx;
    mft_tokenizer *tok;
    mft_model     *model;
    int            n_skipped;               /* lines that on_log saw */
} session;

static mft_context *signal_target;          /* what SIGINT cancels, */
static int          signal_cancel = 1;      /* and how: see mft_cancel */

static void on_interrupt(int sig)
{
    signal(sig, on_interrupt);              /* C leaves open whether a signal takes its handler away */
    if (!signal_target) _exit(130);
    mft_cancel(signal_target, signal_cancel);
    signal_target = NULL;                   /* the second one ends us at once */
}

static void on_log(void *user, mft_log_level level, const char *text)
{
    int *skipped = (int *)user;             /* bad lines may be many: the first few are enough to see what they are */
    if (level > MFT_LOG_INFO || (!strncmp(text, "skipped:", 8) && ++*skipped > 5)) return;
    fprintf(stderr, "%smft: %s\n", isatty(2) ? "\r\033[K" : "", text);
}

/* Prints the context's sentence; the exit status is that of a failure or of an interruption. */
static int fail(session *s, mft_status status)
{
    const char *text = s->ctx ? mft_error_message(s->ctx) : "";
    if (status == MFT_ERR_CANCELLED) fprintf(stderr, "mft: interrupted\n");
    else fprintf(stderr, "mft: %s\n", *text ? text : mft_status_string(status));
    return status == MFT_ERR_CANCELLED ? 130 : 1;
}

static int close_session(session *s, int exit_status)
{
    signal_target = NULL;
    mft_context_destroy(s->ctx);
    return exit_status;
}

static int open_session(const options *o, session *s)
{
    static const char *const precisions[] = { "f32", "bf16", NULL }, *const storages[] = { "none", "q8_0", "q4_0", NULL }, *const masters[] = { "f32", "bf16", NULL };
    mft_context_desc d;
    mft_status       status;
    int              precision = choice("precision", o->precision, precisions);
    memset(s, 0, sizeof *s);
    if (precision < 0 || choice("quantize", o->quantize, storages) < 0 || choice("master-dtype", o->master_dtype, masters) < 0) return 2;
    memset(&d, 0, sizeof d);
    d.n_threads = (int)o->threads; d.kernels = o->kernels; d.precision = (mft_precision)precision;
    d.memory_budget = (size_t)o->memory_budget; d.seed = (uint64_t)o->seed; d.log = on_log; d.log_user = &s->n_skipped;
    status = mft_context_create(&d, &s->ctx);
    if (status == MFT_ERR_INVALID_ARGUMENT) {
        int i;
        fprintf(stderr, "mft: no kernel row \"%s\" on this machine; there are", o->kernels ? o->kernels : getenv("MFT_KERNELS") ? getenv("MFT_KERNELS") : "");
        for (i = 0; mft_kernels_available(i); i++) fprintf(stderr, "%s %s", i ? "," : "", mft_kernels_available(i));
        fprintf(stderr, "\n");
        return 2;
    }
    if (status != MFT_OK) {
        fprintf(stderr, "mft: %s%s\n", mft_status_string(status), o->memory_budget ? ": --memory-budget is too small even to begin" : "");
        return 1;
    }
    signal_target = s->ctx;
    signal(SIGINT, on_interrupt);
    return 0;
}

static mft_status load_model(const options *o, session *s, const mft_model_desc *desc)
{
    mft_model_desc d;
    mft_status     status;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (o->quantize && strcmp(o->quantize, "none")) d.weights = o->quantize;
    status = mft_model_load(s->ctx, o->model, &d, &s->model);
    if (status == MFT_OK && o->adapter) status = mft_lora_load(s->model, o->adapter, NULL);
    return status;
}

/* A file of int32 ids, checked against the vocabulary; freed with free(). */
static int32_t *read_tokens(const char *path, int64_t vocab, int64_t *out_n)
{
    FILE    *f = fopen(path, "rb");
    int32_t *ids = NULL;
    long     bytes = -1;
    int64_t  i;
    if (f && fseek(f, 0, SEEK_END) == 0) bytes = ftell(f);
    if (bytes < 0) { fprintf(stderr, "mft: %s: cannot be read\n", path); goto done; }
    if (bytes == 0 || bytes % 4) { fprintf(stderr, "mft: %s: %ld bytes are no int32 token ids\n", path, bytes); goto done; }
    ids = (int32_t *)malloc((size_t)bytes);
    rewind(f);
    if (!ids || fread(ids, 1, (size_t)bytes, f) != (size_t)bytes) {
        fprintf(stderr, "mft: %s: cannot be read\n", path);
        free(ids); ids = NULL;
        goto done;
    }
    *out_n = bytes / 4;
    for (i = 0; i < *out_n; i++)
        if (ids[i] < 0 || ids[i] >= vocab) {
            fprintf(stderr, "mft: %s: token %lld is %ld, outside the model's vocabulary of %lld\n", path, (long long)i, (long)ids[i], (long long)vocab);
            free(ids); ids = NULL;
            goto done;
        }
done:
    if (f) fclose(f);
    return ids;
}

static char *read_text(const char *path, int64_t *out_bytes)
{
    FILE *f = fopen(path, "rb");
    char *text = NULL;
    long  n = -1;
    if (f && fseek(f, 0, SEEK_END) == 0) n = ftell(f);
    if (n >= 0) text = (char *)malloc((size_t)n + 1);
    if (text) {
        rewind(f);
        if (fread(text, 1, (size_t)n, f) != (size_t)n) { free(text); text = NULL; }
        else { text[n] = '\0'; *out_bytes = n; }
    }
    if (!text) fprintf(stderr, "mft: %s: cannot be read\n", path);
    if (f) fclose(f);
    return text;
}

/* Takes a byte order mark and the CR of CRLF out, as a dataset does; returns the bytes that are left. */
static int64_t plain_text(char *text, int64_t bytes)
{
    int64_t i = bytes >= 3 && !memcmp(text, "\xef\xbb\xbf", 3) ? 3 : 0, n = 0;
    for (; i < bytes; i++) if (text[i] != '\r' || i + 1 == bytes || text[i + 1] != '\n') text[n++] = text[i];
    text[n] = '\0';
    return n;
}

/* Text to ids, freed with free(). NULL: the session has the sentence. */
static int32_t *encode(session *s, const char *text, int64_t bytes, int encode_flags, int64_t *out_n)
{
    int64_t  n = mft_tokenizer_encode(s->tok, text, bytes, encode_flags, NULL, 0);
    int32_t *ids;
    if (n < 0) return NULL;
    ids = (int32_t *)malloc((size_t)(n + 1) * sizeof *ids);
    if (ids) *out_n = mft_tokenizer_encode(s->tok, text, bytes, encode_flags, ids, n);
    return ids;
}

static char *decode(session *s, const int32_t *ids, int64_t n, int decode_flags)
{
    int64_t bytes = mft_tokenizer_decode(s->tok, ids, n, decode_flags, NULL, 0);
    char   *text;
    if (bytes < 0) return NULL;
    text = (char *)malloc((size_t)bytes + 1);
    if (text) { mft_tokenizer_decode(s->tok, ids, n, decode_flags, text, bytes); text[bytes] = '\0'; }
    return text;
}

/* ==============================================================================
 * MARK: - [FINETUNE]
 * ============================================================================== */
typedef struct live {                       /* what the progress callback draws with */
    FILE   *log;
    int     terminal, quiet;
    int64_t total;
    double  began, shown, smooth, loss_sum;
    int64_t steps, eval_steps;              /* eval_steps 0: evaluated at the end only; -1: never        */
    int     line_open;                      /* the log's last object waits for its step's evaluation     */
    double  tokens_per_second;
} live;

static void duration(char *text, size_t cap, double s)
{
    if (s < 0) snprintf(text, cap, "?");
    else if (s < 60) snprintf(text, cap, "%.0fs", s);
    else if (s < 3600) snprintf(text, cap, "%.0fm%02.0fs", floor(s / 60), floor(fmod(s, 60)));
    else snprintf(text, cap, "%.0fh%02.0fm", floor(s / 3600), floor(fmod(s, 3600) / 60));
}

static void end_log_line(live *v)
{
    if (v->line_open) { fputs("}\n", v->log); fflush(v->log); }
    v->line_open = 0;
}

/* What of a line can be drawn over again: one that wraps would leave its beginning behind. */
static int terminal_room(void)
{
    struct winsize w;
    return ioctl(2, TIOCGWINSZ, &w) == 0 && w.ws_col > 1 ? w.ws_col - 1 : 79;
}

static void on_step(void *user, const mft_progress *p)
{
    live  *v = (live *)user;
    double now = mft__now();
    char   eta[32], line[300];
    if (p->loss == p->loss) {                                   /* else the step was skipped */
        v->smooth = v->steps ? 0.9 * v->smooth + 0.1 * p->loss : p->loss;
        v->loss_sum += p->loss; v->steps++;
        v->tokens_per_second = p->tokens_per_second;
    }
    if (v->log) {
        fprintf(v->log, "{\"step\":%lld,\"loss\":", (long long)p->step);
        json_number(v->log, p->loss);
        fprintf(v->log, ",\"lr\":%.17g,\"grad_norm\":", p->learning_rate);
        json_number(v->log, p->grad_norm);
        fprintf(v->log, ",\"tokens\":%lld,\"tokens_per_second\":%.6g,\"peak_rss_bytes\":%llu,\"elapsed_s\":%.6g", (long long)p->n_tokens, v->tokens_per_second,
                (unsigned long long)peak_rss(), now - v->began);
        v->line_open = 1;
        if (v->eval_steps < 0 || (p->step < v->total && (!v->eval_steps || p->step % v->eval_steps))) end_log_line(v);
    }
    if (v->quiet) return;
    /* a terminal is redrawn ten times a second; elsewhere a line every tenth of the run, or every half minute */
    if (p->step < v->total && now - v->shown < (v->terminal ? 0.1 : 30) && (v->terminal || p->step % (v->total / 10 + 1))) return;
    v->shown = now;
    duration(eta, sizeof eta, p->eta_seconds);
    snprintf(line, sizeof line, "step %lld/%lld  loss %.4f  lr %.2e  %.0f tok/s  %.0f MB  eta %s", (long long)p->step, (long long)v->total, v->smooth, p->learning_rate,
             v->tokens_per_second, megabytes(p->resident_bytes), eta);
    if (v->terminal) fprintf(stderr, "\r\033[K%.*s", terminal_room(), line); else fprintf(stderr, "%s\n", line);
    if (v->terminal && p->step == v->total) fputc('\n', stderr);
}

static void on_eval(void *user, int64_t step, const mft_eval *e, int is_best)
{
    live *v = (live *)user;
    if (v->line_open) fprintf(v->log, ",\"eval_loss\":%.10g,\"eval_perplexity\":%.10g", e->loss, e->perplexity);
    end_log_line(v);
    if (!v->quiet) fprintf(stderr, "%sstep %lld/%lld  held out: loss %.4f, perplexity %.3f%s\n", v->terminal ? "\r\033[K" : "", (long long)step, (long long)v->total,
                           e->loss, e->perplexity, is_best ? "  (best)" : "");
}

static void on_target(void *user, const char *target, int n_modules, int64_t n)
{
    (void)user;
    fprintf(stderr, "  %-24s x%-4d %12lld\n", target, n_modules, (long long)n);
}

static void print_plan(const mft_plan *p, int json)
{
    static const char *const names[] = { "weights_mapped", "weights_resident", "weights_held", "trainable", "gradients", "optimizer",
                                         "activations", "workspaces", "step", "tokenizer", "data", "process", "total", "state_mapped", "state_resident" };
    size_t values[15];
    int    i;
    values[0] = p->weights_mapped; values[1] = p->weights_resident; values[2] = p->weights_held; values[3] = p->trainable; values[4] = p->gradients;
    values[5] = p->optimizer; values[6] = p->activations; values[7] = p->workspaces; values[8] = p->step; values[9] = p->tokenizer;
    values[10] = p->data; values[11] = p->process; values[12] = p->total; values[13] = p->state_mapped; values[14] = p->state_resident;
    if (json) {
        printf("{");
        for (i = 0; i < 15; i++) printf("\"%s\":%llu,", names[i], (unsigned long long)values[i]);
        printf("\"micro_batch\":%d,\"drops_pages\":%s,\"blocks\":%d,\"blocks_recomputed\":%d,\"mlp_rows\":%d,\"grad_checkpointing\":%s}", p->micro_batch,
               p->drops_pages ? "true" : "false", p->blocks, p->blocks_recomputed, p->mlp_rows, p->grad_checkpointing ? "true" : "false");
        return;
    }
    printf("memory plan, MB\n");
    printf("  %-20s %10.1f   of a file of %.1f%s\n", "weights in use", megabytes(p->weights_resident), megabytes(p->weights_mapped),
           p->drops_pages ? ", dropped behind their use" : "");
    if (p->state_mapped) printf("  %-20s %10.1f   of trained weights, gradients and moments of %.1f in a state file%s\n", "state in use", megabytes(p->state_resident),
                                megabytes(p->state_mapped), p->drops_pages ? ", dropped behind their use" : "");
    for (i = 2; i < 13; i++) printf("  %s%-*s %10.1f\n", i == 6 || i == 7 ? "  " : "", i == 6 || i == 7 ? 18 : 20, names[i], megabytes(values[i]));
    printf("  activations and workspaces are the step; sequences per pass %d; blocks recomputed %d of %d", p->micro_batch, p->blocks_recomputed, p->blocks);
    if (p->blocks_recomputed) printf(", MLPs of %d tokens at a time", p->mlp_rows);
    printf("\n");
}

/* What was chosen to fit the budget. */
static void report_choice(mft_trainer *tr)
{
    mft_plan p;
    if (mft_trainer_plan(tr, 0, 0, &p) != MFT_OK) return;       /* the first step will say why */
    fprintf(stderr, "plans %.0f MB: %d sequence%s per pass, %d of %d blocks recomputed, weights %s\n", megabytes(p.total), p.micro_batch, p.micro_batch == 1 ? "" : "s",
            p.blocks_recomputed, p.blocks, p.drops_pages ? "dropped behind their use" : "stay in memory");
}

/* How far a long file is read: a live line on a terminal, elsewhere one every half minute. */
typedef struct reading { const char *path; double began, shown; int terminal, lines; } reading;
static void on_load(void *user, uint64_t bytes, uint64_t of)
{
    reading *r = (reading *)user;
    double   now = mft__now(), elapsed = now - r->began;
    if (now - r->shown < (r->terminal ? 0.2 : 30)) return;
    r->shown = now; r->lines++;
    fprintf(stderr, "%sreads %s: %.0f of %.0f MB, %.0f s left%s", r->terminal ? "\r\033[K" : "", r->path, (double)bytes / 1048576, (double)of / 1048576,
            elapsed * (double)(of - bytes) / (double)bytes, r->terminal ? "" : "\n");
}

/* Where the index of large data goes; NULL: nowhere. Freed with free. */
static char *index_dir(const options *o)
{
    size_t n = o->index ? strlen(o->index) : o->output ? strlen(o->output) : 0;
    char  *dir;
    while (n > 1 && !o->index && mft__is_separator(o->output[n - 1])) n--;
    if (!n || (o->index && !strcmp(o->index, "none")) || !(dir = (char *)malloc(n + 8))) return NULL;
    memcpy(dir, o->index ? o->index : o->output, n);
    memcpy(dir + n, o->index ? "" : ".index", o->index ? 1 : 7);
    return dir;
}

/* A dataset of the flags' kind from a file or a split of a directory. */
static mft_status open_data(const options *o, session *s, const char *path, const char *split, int format, const char *template_text, mft_dataset **out)
{
    mft_dataset_desc d;
    mft_status       status;
    reading          r;
    char            *index = index_dir(o);
    memset(&d, 0, sizeof d);
    r.path = path; r.began = r.shown = mft__now(); r.terminal = isatty(2); r.lines = 0;
    if (!o->json || r.terminal) { d.on_load = on_load; d.user = &r; }
    d.index_dir = index; d.index_above = (uint64_t)(o->index_above ? o->index_above : o->memory_budget ? o->memory_budget / 64 + 1 : 0);
    d.max_seq_len = (int)o->seq_len; d.format = (mft_data_format)format; d.seed = (uint64_t)o->seed; d.split = split;
    d.no_pack = o->no_pack; d.no_shuffle = o->no_shuffle; d.train_on_prompt = o->train_on_prompt;
    d.assistant_loss_only = o->assistant_loss_only; d.chat_template = template_text; d.skip_bad_lines = o->skip_bad_lines;
    d.text_key = o->text_key; d.prompt_key = o->prompt_key; d.completion_key = o->completion_key; d.messages_key = o->messages_key;
    d.vocab_size = mft_model_get_config(s->model)->vocab_size;
    status = mft_dataset_create(s->ctx, s->tok, &d, out);
    if (status == MFT_OK) status = mft_dataset_load(*out, path);
    if (r.lines && r.terminal) fputs("\r\033[K", stderr);
    free(index);
    return status;
}

/* The data, and what is held out of training: a file, a share, or the directory's validation split. */
static mft_status open_both(const options *o, session *s, int format, const char *template_text, mft_dataset **data, mft_dataset **held)
{
    static const char *const names[] = { "valid.jsonl", "validation.jsonl", "val.jsonl", "dev.jsonl" };
    mft_status status = open_data(o, s, o->data, "train", format, template_text, data);
    int        i, there = 0;
    if (status != MFT_OK) return status;
    if (o->eval_data) return open_data(o, s, o->eval_data, "valid", format, template_text, held);
    if (o->eval_split > 0) return mft_dataset_split(*data, o->eval_split, held);
    for (i = 0; i < 4 && !there && mft__file_kind(o->data) == MFT__DIRECTORY; i++) {
        char *path = mft__path_join(s->ctx, o->data, names[i]);
        there = path && mft__file_exists(s->ctx, path);
        mft__strfree(s->ctx, path);
    }
    return there ? open_data(o, s, o->data, "valid", format, template_text, held) : MFT_OK;
}

/* One sample as the model will see it, [[what is trained on]] marked; a long one around its first mark. */
static void show_sample(mft_dataset *data, int64_t n_samples)
{
    enum { CAP = 1 << 16, SHOWN = 600 };
    char   *text = (char *)malloc(CAP), *mark = NULL, *p;
    int64_t i, from = 0, to = 0;
    for (i = 0; text && !mark && i < n_samples && i < 20; i++) {
        int64_t n = mft_dataset_sample_text(data, i, "[[", "]]", text, CAP - 1);
        if (n < 0) break;
        text[n < CAP ? n : CAP - 1] = '\0';
        mark = strstr(text, "[[");
        to = (int64_t)strlen(text);
    }
    if (mark) {
        if (to > SHOWN && mark - text > SHOWN / 2) from = mark - text - SHOWN / 2;
        if (to - from > SHOWN) to = from + SHOWN;
        while (from && ((unsigned char)text[from] & 0xc0) == 0x80) from++;
        while (text[to] && ((unsigned char)text[to] & 0xc0) == 0x80) to--;
        for (p = text; *p; p++) if ((unsigned char)*p < 32 && *p != '\n') *p = ' ';
        fprintf(stderr, "  sample %lld, [[trained on]]:\n    %s", (long long)i, from ? ".." : "");
        for (p = text + from; p < text + to; p++) { fputc(*p, stderr); if (*p == '\n') fputs("    ", stderr); }
        fprintf(stderr, "%s\n", *p ? ".." : "");
    }
    free(text);
}

static void report_data(const options *o, const char *path, mft_dataset *data, int with_sample)
{
    mft_dataset_info d;
    if (mft_dataset_report(data, &d) != MFT_OK) return;
    fprintf(stderr, "%s: %s, %lld samples in %lld rows, %lld tokens, %lld supervised (%.3g%%), longest %lld\n", path, d.format, (long long)d.n_samples, (long long)d.n_rows,
            (long long)d.n_tokens, (long long)d.n_supervised, d.n_tokens ? 100.0 * (double)d.n_supervised / (double)d.n_tokens : 0.0, (long long)d.longest);
    if (d.index_bytes) fprintf(stderr, "  index of %.1f MB on disk%s\n", megabytes(d.index_bytes), d.index_reused ? ": found, the data was not read again" : "");
    if (d.n_bad_lines) fprintf(stderr, "  %lld bad lines skipped\n", (long long)d.n_bad_lines);
    if (d.n_truncated) fprintf(stderr, "  %lld samples cut to --seq-len %lld: --seq-len %lld would keep all whole\n", (long long)d.n_truncated, (long long)o->seq_len, (long long)d.longest);
    if (d.n_unsupervised)
        fprintf(stderr, "  WARNING: %lld of %lld samples have nothing to learn from: %s\n", (long long)d.n_unsupervised, (long long)d.n_samples,
                d.n_truncated ? "their prompt alone fills --seq-len; a greater one would help" : "every label of theirs is masked");
    if (with_sample) show_sample(data, d.n_samples);
}

/* Are checkpoints asked for, and where do they go? */
static int         saves(const options *o)    { return o->checkpoint_save_steps || o->checkpoint_save_dir || o->load_best || o->resume_from; }
static const char *save_dir(const options *o) { return o->checkpoint_save_dir ? o->checkpoint_save_dir : o->output; }

/* The flags that say how to train, as the library has them. 0: a sentence is on stderr. */
static int trainer_desc(const options *o, int64_t total_steps, live *v, mft_trainer_desc *t)
{
    static const char *const schedules[] = { "cosine", "linear", "constant", NULL };
    static const mft_schedule_kind kinds[] = { MFT_SCHEDULE_COSINE, MFT_SCHEDULE_LINEAR, MFT_SCHEDULE_CONSTANT };
    static const char *const optimizers[] = { "adamw", "sgd", "adamw8bit", "apollo_mini", NULL };     /* in the order of mft_optimizer_kind */
    int schedule = choice("lr-scheduler", o->lr_scheduler, schedules), optimizer = choice("optim", o->optim, optimizers);
    if (schedule < 0 || optimizer < 0) return 0;
    memset(t, 0, sizeof *t);
    t->optimizer.kind = (mft_optimizer_kind)optimizer; t->update_in_backward = o->update_in_backward;
    t->optimizer.weight_decay = o->weight_decay;
    t->optimizer.max_grad_norm = o->max_grad_norm == 0 ? -1 : o->max_grad_norm;
    t->learning_rate = o->lr >= 0 ? o->lr : o->full ? 2e-5 : 2e-4;
    t->learning_rate_min = o->lr_min;
    t->schedule = kinds[schedule];
    t->warmup_steps = o->warmup_steps; t->warmup_ratio = o->warmup_ratio;
    t->total_steps = total_steps;
    t->micro_batch = (int)o->batch_size; t->grad_accum = (int)o->grad_accum_steps;
    if (saves(o)) t->save_dir = save_dir(o);
    t->eval_steps = o->eval_steps; t->early_stopping_patience = (int)o->early_stopping_patience; t->load_best = o->load_best;
    t->max_nonfinite = (int)o->max_nonfinite_steps;
    t->save_steps = o->checkpoint_save_steps; t->save_total_limit = (int)o->save_total_limit;
    t->on_step = on_step; t->on_eval = on_eval; t->user = v;
    return 1;
}

static int64_t steps_done(const mft_trainer *tr)
{
    mft_trainer_info info;
    mft_trainer_report(tr, &info);
    return info.step;
}

/* The log of a run that goes on behind `step`: lines of later steps, and one cut in the middle, are taken out. NULL: a
 * sentence is on stderr. */
static FILE *open_log(session *s, const char *path, int64_t step)
{
    FILE   *f;
    char   *text = NULL, *p, *end;
    int64_t bytes = 0;
    if (step && mft__file_exists(s->ctx, path) && !(text = read_text(path, &bytes))) return NULL;
    for (p = text; p && (end = strchr(p, '\n')) != NULL && !strncmp(p, "{\"step\":", 8) && strtoll(p + 8, NULL, 10) <= step; p = end + 1) {}
    if (text && mft__file_write_all(s->ctx, path, text, (size_t)(p - text)) != MFT_OK) { fail(s, MFT_ERR_IO); free(text); return NULL; }
    free(text);
    f = fopen(path, step ? "a" : "w");
    if (!f) fprintf(stderr, "mft: %s: cannot be written\n", path);
    return f;
}

/* After an interruption: what was done is kept, if checkpoints were asked for. */
static void save_interrupted(const options *o, session *s, mft_trainer *tr)
{
    if (!tr || !steps_done(tr) || !saves(o)) return;
    mft_cancel(s->ctx, 0);
    if (mft_trainer_save(tr, NULL) != MFT_OK) fail(s, MFT_ERR_IO);
    else fprintf(stderr, "mft: step %lld is in %s: go on with --resume-from latest\n", (long long)steps_done(tr), save_dir(o));
}

static int64_t count_trainable(mft_model *m)
{
    mft_tensor **t;
    int64_t      total = 0;
    int          i, n = mft_model_params(m, 1, NULL, 0);
    t = (mft_tensor **)malloc((size_t)(n + 1) * sizeof *t);
    if (!t) return 0;
    mft_model_params(m, 1, t, n);
    for (i = 0; i < n; i++) total += mft_tensor_numel(t[i]);
    free(t);
    return total;
}

/* ---- samples: what the model says to a few prompts before and after ---- */
typedef struct sample { char *prompt, *expected, *before, *after; int encode_flags; } sample;    /* from malloc */

typedef struct samples { sample at[32]; int n; } samples;

static void free_samples(samples *all)
{
    int i;
    for (i = 0; i < all->n; i++) { free(all->at[i].prompt); free(all->at[i].expected); free(all->at[i].before); free(all->at[i].after); }
    all->n = 0;
}

static char *copy_text(const char *text, size_t bytes)
{
    char *copy = (char *)malloc(bytes + 1);
    if (copy) { memcpy(copy, text, bytes); copy[bytes] = '\0'; }
    return copy;
}

/* The text of sample i in two: what stands before its first trained part, and that part. Where all but the first token
 * is trained on, as in plain text, a line's worth is the prompt. */
static mft_status split_sample(session *s, mft_dataset *data, int64_t i, sample *out)
{
    enum { PROMPT = 100, SHOWN = 400 };
    int64_t  n = mft_dataset_sample_text(data, i, "\x02", "\x03", NULL, 0), n_ids = 0;
    char    *text = n < 0 ? NULL : (char *)malloc((size_t)n + 1), *mark, *end;
    int32_t *ids;
    size_t   at, shown;
    if (!text) return n < 0 ? (mft_status)n : MFT_ERR_OUT_OF_MEMORY;
    mft_dataset_sample_text(data, i, "\x02", "\x03", text, n + 1);
    mark = text + strcspn(text, "\x02");
    if (*mark) memmove(mark, mark + 1, strlen(mark));
    end = mark + strcspn(mark, "\x03");
    *end = '\0';
    at = (size_t)(mark - text);
    out->prompt = copy_text(text, at);
    ids = out->prompt ? encode(s, out->prompt, -1, MFT_NO_ADD_SPECIAL, &n_ids) : NULL;
    if (ids && n_ids < 2) {
        for (at = 0; text[at] && (at < PROMPT || text[at] != ' '); at++) {}
        free(out->prompt);
        out->prompt = copy_text(text, at);
    }
    for (shown = strlen(text + at); shown > SHOWN; shown--) if (shown < SHOWN + 4 && ((unsigned char)text[at + shown] & 0xc0) != 0x80) break;
    out->expected = copy_text(text + at, shown);
    out->encode_flags = MFT_NO_ADD_SPECIAL;                     /* what the tokenizer adds is in the text */
    free(ids); free(text);
    return out->prompt && out->expected ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
}

static mft_status choose_samples(const options *o, session *s, mft_dataset *data, samples *all)
{
    mft_dataset_info info;
    mft_status       status = MFT_OK;
    int64_t          i;
    memset(all, 0, sizeof *all);
    if ((o->samples || o->sample_prompts.n) && !s->tok) return mft__fail(s->ctx, MFT_ERR_INVALID_ARGUMENT, "--samples and --sample-prompt need the model's tokenizer");
    for (i = 0; i < o->sample_prompts.n; i++)
        if (!(all->at[all->n++].prompt = copy_text(o->sample_prompts.at[i], strlen(o->sample_prompts.at[i])))) return MFT_ERR_OUT_OF_MEMORY;
    if (o->samples && (status = mft_dataset_report(data, &info)) != MFT_OK) return status;
    for (i = 0; i < o->samples && i < info.n_samples && status == MFT_OK; i++) status = split_sample(s, data, i, &all->at[all->n++]);
    return status;
}

static int stop_at_special(void *user, int32_t id) { return mft_tokenizer_is_special((const mft_tokenizer *)user, id); }

/* The likeliest continuation of each prompt. */
static mft_status say_samples(session *s, samples *all, int after)
{
    enum { TOKENS = 64 };
    mft_generate_desc d;
    int32_t           out[TOKENS];
    int               i;
    memset(&d, 0, sizeof d);
    d.max_new_tokens = TOKENS; d.on_token = stop_at_special; d.user = s->tok;
    for (i = 0; i < all->n; i++) {
        int64_t  n_prompt = 0, n;
        int32_t *ids = encode(s, all->at[i].prompt, -1, all->at[i].encode_flags, &n_prompt);
        char    *text;
        if (!ids) return MFT_ERR_OUT_OF_MEMORY;
        n = mft_generate(s->model, ids, n_prompt, &d, out, TOKENS);
        free(ids);
        if (n < 0) return (mft_status)n;
        if (!(text = decode(s, out, n, MFT_SKIP_SPECIAL))) return MFT_ERR_OUT_OF_MEMORY;
        *(after ? &all->at[i].after : &all->at[i].before) = text;
    }
    return MFT_OK;
}

static void print_samples(const samples *all)
{
    int i;
    for (i = 0; i < all->n; i++) {
        const sample *m = &all->at[i];
        fprintf(stderr, "prompt: %s\n  before: %s\n  after:  %s\n", m->prompt, m->before, m->after);
        if (m->expected) fprintf(stderr, "  data:   %s\n", m->expected);
    }
}

/* Beside the log, for `mft report` and whoever else asks later what the run was: FILE.about.json. */
static mft_status write_about(const options *o, session *s, const samples *all, int64_t steps, int64_t trainable)
{
    const mft_model_config *config = mft_model_get_config(s->model);
    mft__json_writer        w;
    mft_status              status = MFT_ERR_OUT_OF_MEMORY;
    size_t                  n = strlen(o->log) + sizeof ".about.json";
    char                   *path = (char *)malloc(n);
    int                     i, k;
    if (!path) return status;
    snprintf(path, n, "%s.about.json", o->log);
    mft__json_write_start(&w, s->ctx, 2);
    mft__json_write_open(&w, '{');
    mft__json_write_key(&w, "run");
    mft__json_write_open(&w, '{');
    mft__json_write_key(&w, "family");               mft__json_write_string(&w, mft_family_name(config->family), -1);
    mft__json_write_key(&w, "parameters");           mft__json_write_integer(&w, config->n_params);
    mft__json_write_key(&w, "trainable_parameters"); mft__json_write_integer(&w, trainable);
    mft__json_write_key(&w, "steps");                mft__json_write_integer(&w, steps);
    mft__json_write_key(&w, "kernels");              mft__json_write_string(&w, mft_kernels_name(s->ctx), -1);
    mft__json_write_close(&w, '}');
    mft__json_write_key(&w, "config");
    mft__json_write_open(&w, '{');
    for (i = 0; i < N_FLAGS; i++) {
        const char *at = (const char *)o + flags[i].at;
        if (!is_said(o->command, o, &flags[i]) || flags[i].at == AT(sample_prompt)) continue;
        mft__json_write_key(&w, flags[i].name);
        if (flags[i].kind == SWITCH)      mft__json_write_bool(&w, 1);
        else if (flags[i].kind == NUMBER) mft__json_write_number(&w, *(const double *)(const void *)at, 0);
        else if (flags[i].kind == STRING) mft__json_write_string(&w, *(const char *const *)(const void *)at, -1);
        else                              mft__json_write_integer(&w, *(const int64_t *)(const void *)at);
    }
    mft__json_write_close(&w, '}');
    mft__json_write_key(&w, "samples");
    mft__json_write_open(&w, '[');
    for (i = 0; i < all->n; i++) {
        static const char *const names[] = { "prompt", "expected", "before", "after" };
        const char *texts[4];
        texts[0] = all->at[i].prompt; texts[1] = all->at[i].expected; texts[2] = all->at[i].before; texts[3] = all->at[i].after;
        mft__json_write_open(&w, '{');
        for (k = 0; k < 4; k++) if (texts[k]) { mft__json_write_key(&w, names[k]); mft__json_write_string(&w, texts[k], -1); }
        mft__json_write_close(&w, '}');
    }
    mft__json_write_close(&w, ']');
    mft__json_write_close(&w, '}');
    mft__json_write_raw(&w, "\n", 1);
    if (!w.failed) status = mft__file_write_all(s->ctx, path, w.text, w.bytes);
    mft__json_write_free(&w);
    free(path);
    return status;
}

/* Flags that need or exclude each other. 0: a sentence is on stderr. */
static int finetune_flags_fit(const options *o)
{
    const char *wrong = NULL;
    if (!need("finetune", "model", o->model) || !need("finetune", "data", o->data) || (!o->plan && !need("finetune", "output", o->output))) return 0;
    if (o->full && (o->adapter || o->lora_rank || o->lora_alpha > 0 || o->lora_modules || o->use_dora || o->use_rslora))
        wrong = "--full trains the weights themselves: it takes no --adapter and no --lora flags";
    if (o->adapter && (o->lora_rank || o->lora_modules || o->use_dora || o->use_rslora))
        wrong = "--adapter says rank and modules itself: leave --lora-rank, --lora-modules, --use-dora, --use-rslora out";
    if (o->full && o->quantize && strcmp(o->quantize, "none")) wrong = "--quantize is for a frozen base: not with --full";
    if (!o->full && (o->master_dtype || o->update_in_backward)) wrong = "--master-dtype and --update-in-backward are for --full";
    if (o->max_steps && o->epochs) wrong = "--epochs or --max-steps, not both";
    if (o->eval_data && o->eval_split > 0) wrong = "--eval-data or --eval-split, not both";
    if (wrong) fprintf(stderr, "mft finetune: %s\n", wrong);
    return !wrong;
}

/* Defaults that depend on others, and what the library would fill in, so that the written config says them. */
static void resolve(options *o)
{
    if (o->lr < 0) o->lr = o->full ? 2e-5 : 2e-4;
    if (!o->lr_scheduler) o->lr_scheduler = "cosine";
    if (!o->optim) o->optim = "adamw";
    if (!o->format) o->format = "auto";
    if (!o->precision) o->precision = "f32";
    if (!o->max_steps && !o->epochs) o->epochs = 1;
    if (!o->full && !o->adapter && !o->lora_rank) o->lora_rank = 8;
    if (!o->full && !o->adapter && !(o->lora_alpha > 0)) o->lora_alpha = (double)(2 * o->lora_rank);
}

static void print_result(const options *o, const live *v, const mft_trainer_info *end, int64_t trainable)
{
    int evaluated = end->eval_step > 0;
    if (o->json) {
        printf("{\"steps\":%lld,\"train_loss\":", (long long)end->step);
        json_number(stdout, v->steps ? v->loss_sum / (double)v->steps : NAN);
        printf(",\"eval_loss\":");       if (evaluated) json_number(stdout, end->eval.loss); else printf("null");
        printf(",\"eval_perplexity\":"); if (evaluated) json_number(stdout, end->eval.perplexity); else printf("null");
        printf(",\"tokens_per_second\":"); json_number(stdout, v->tokens_per_second);
        printf(",\"peak_rss_bytes\":%llu,\"trainable_parameters\":%lld,\"output\":", (unsigned long long)peak_rss(), (long long)trainable);
        json_string(stdout, o->output);
        printf("}\n");
        return;
    }
    printf("%lld steps%s", (long long)end->step, end->stopped_early ? " (stopped early)" : "");
    if (v->steps) printf(", mean loss %.4f, %.0f tokens/s", v->loss_sum / (double)v->steps, v->tokens_per_second);
    printf(", peak %.0f MB\n", megabytes(peak_rss()));
    if (end->n_skipped) printf("%lld steps skipped: their loss or gradient was not finite\n", (long long)end->n_skipped);
    if (evaluated) printf("held out: loss %.4f, perplexity %.3f over %lld tokens\n", end->eval.loss, end->eval.perplexity, (long long)end->eval.n_tokens);
    if (evaluated && end->best_step != end->step)
        printf("the best was step %lld, loss %.4f%s\n", (long long)end->best_step, end->best_loss, o->load_best ? ": loaded" : saves(o) ? ": its checkpoint is kept" : "");
    printf("saved %s in %s\n", o->full ? "the model" : "the adapter", o->output);
}

static int run_finetune(const options *given)
{
    static const char *const formats[] = { "auto", "text", "jsonl", "mmlu", "tokens", NULL };
    options          o = *given;
    session          s;
    mft_model_desc   md;
    mft_trainer_desc td;
    mft_dataset     *data = NULL, *held = NULL;
    mft_trainer     *tr = NULL;
    mft_trainer_info end;
    mft_memory_trace *trace = NULL;
    live             v;
    samples          said;
    struct stat      info;
    int              made_output = 0;
    char            *template_text = NULL;
    char            *config = NULL;
    int64_t          steps, trainable, bytes;
    mft_status       status;
    int              exit_status, format = choice("format", o.format, formats);

    if (format < 0 || !finetune_flags_fit(&o)) return 2;
    memset(&v, 0, sizeof v);
    memset(&end, 0, sizeof end);
    memset(&said, 0, sizeof said);
    if (!trainer_desc(&o, 1, &v, &td)) return 2;
    exit_status = open_session(&o, &s);
    if (exit_status) return exit_status;

    if (o.memory_trace && (status = mft_memory_trace_open(s.ctx, o.memory_trace, 0, &trace)) != MFT_OK) goto failed;
    made_output = !o.plan && stat(o.output, &info) != 0;
    if (!o.plan && (status = mft__can_write_in(s.ctx, o.output)) != MFT_OK) goto failed;       /* found now, not after hours */
    if (!o.plan && td.save_dir && td.save_dir != o.output && (status = mft__can_write_in(s.ctx, td.save_dir)) != MFT_OK) goto failed;
    if (saves(&o)) signal_cancel = 2;
    if (o.chat_template && !(template_text = read_text(o.chat_template, &bytes))) { exit_status = 1; goto done; }
    memset(&md, 0, sizeof md);
    md.train_all = o.full; md.master_dtype = o.master_dtype; md.state_dir = o.state_dir ? o.state_dir : o.plan ? "." : o.output; md.grad_checkpointing = o.grad_checkpointing - o.no_grad_checkpointing; md.checkpoint_bf16 = o.checkpoint_bf16;
    if ((status = load_model(&o, &s, &md)) != MFT_OK) goto failed;
    if (format != MFT_DATA_TOKENS && (status = mft_tokenizer_load(s.ctx, o.model, &s.tok)) != MFT_OK) {
        if (status != MFT_ERR_IO) goto failed;
        s.tok = NULL;                                           /* rows of input_ids need none; text will say so */
    }
    if (!o.full && !o.adapter) {
        mft_lora_desc ld;
        memset(&ld, 0, sizeof ld);
        ld.rank = (int)o.lora_rank; ld.alpha = (float)o.lora_alpha; ld.dropout = (float)o.lora_dropout; ld.targets = o.lora_modules;
        ld.use_rslora = o.use_rslora; ld.use_dora = o.use_dora; ld.seed = (uint64_t)o.seed;
        if ((status = mft_lora_attach(s.model, &ld)) != MFT_OK) goto failed;
    }
    if ((status = open_both(&o, &s, format, template_text, &data, &held)) != MFT_OK) goto failed;
    steps = mft_dataset_epoch_batches(data, (int)o.batch_size) * (o.epochs ? o.epochs : 1);
    steps = o.max_steps ? o.max_steps : (steps + o.grad_accum_steps - 1) / o.grad_accum_steps;
    td.total_steps = steps; td.eval_data = held;
    if ((status = mft_trainer_create(s.model, data, &td, &tr)) != MFT_OK) goto failed;
    trainable = count_trainable(s.model);
    if (o.plan) {
        mft_plan plan;
        if ((status = mft_trainer_plan(tr, 0, 0, &plan)) != MFT_OK) goto failed;
        print_plan(&plan, o.json);
        if (o.json) printf("\n");
        goto done;
    }
    v.quiet = o.json && !isatty(2); v.terminal = isatty(2); v.total = steps; v.eval_steps = held ? o.eval_steps : -1;
    if (!v.quiet) {
        report_data(&o, o.data, data, 1);
        if (held) report_data(&o, o.eval_data ? o.eval_data : "held out", held, 0);
        fprintf(stderr, "trains %lld of %lld parameters (%.3g%%), %lld steps\n", (long long)trainable, (long long)mft_model_get_config(s.model)->n_params,
                100.0 * (double)trainable / (double)mft_model_get_config(s.model)->n_params, (long long)steps);
        mft_lora_report(s.model, on_target, NULL);
        if (o.memory_budget) report_choice(tr);
    }
    if ((status = choose_samples(&o, &s, held ? held : data, &said)) != MFT_OK || (status = say_samples(&s, &said, 0)) != MFT_OK) goto failed;
    if (o.resume_from && (status = mft_trainer_resume(tr, strcmp(o.resume_from, "latest") ? o.resume_from : save_dir(&o))) != MFT_OK) goto failed;
    if (o.resume_from && !v.quiet) fprintf(stderr, "goes on behind step %lld\n", (long long)steps_done(tr));
    if (o.log && !(v.log = open_log(&s, o.log, steps_done(tr)))) { exit_status = 1; goto done; }
    resolve(&o);
    if (!(config = mft__path_join(s.ctx, o.output, "finetune.yaml"))) { status = MFT_ERR_OUT_OF_MEMORY; goto failed; }
    if (!write_config(o.command, &o, config)) { exit_status = 1; goto done; }
    if (o.log && (status = write_about(&o, &s, &said, steps, trainable)) != MFT_OK) goto failed;
    v.began = v.shown = mft__now();
    status = mft_trainer_run(tr, steps - steps_done(tr));
    if (status != MFT_OK) goto failed;
    mft_trainer_report(tr, &end);
    if (end.n_skipped && end.n_skipped == end.step) {
        fprintf(stderr, "mft finetune: no step had a finite loss and gradient: nothing was learnt, nothing is saved\n");
        exit_status = 1;
        goto done;
    }
    status = o.full ? mft_model_save(s.model, o.output) : mft_lora_save(s.model, o.output);
    if (status != MFT_OK) goto failed;
    if ((status = say_samples(&s, &said, 1)) != MFT_OK) goto failed;
    if (!v.quiet) print_samples(&said);
    if (o.log && said.n && (status = write_about(&o, &s, &said, steps, trainable)) != MFT_OK) goto failed;
    print_result(&o, &v, &end, trainable);
    goto done;
failed:
    if (v.terminal && v.steps) fputc('\n', stderr);
    exit_status = fail(&s, status);
    if (status == MFT_ERR_CANCELLED) save_interrupted(&o, &s, tr);
done:
    end_log_line(&v);
    if (v.log && fclose(v.log) != 0 && !exit_status) { fprintf(stderr, "mft: %s: could not be written whole\n", o.log); exit_status = 1; }
    if (mft_memory_trace_close(trace) != MFT_OK && !exit_status) exit_status = fail(&s, MFT_ERR_IO);
    free_samples(&said);
    free(template_text);
    mft__strfree(s.ctx, config);
    if (exit_status && made_output) rmdir(o.output);            /* if nothing came of it; one that holds something stays */
    return close_session(&s, exit_status);
}

/* ==============================================================================
 * MARK: - [PERPLEXITY]
 * ============================================================================== */
/* base, adapter, difference, interval: what --compare prints of each figure */
static void print_versus_head(void)
{
    printf("%-26s %10s %10s %11s   %s\n", "", "base", "adapter", "difference", "95 % interval (paired, normal approximation)");
}

static void print_versus(const char *name, const mft_comparison *c)
{
    printf("%-26s %10.4f %10.4f %+11.4f   [%+.4f, %+.4f]\n", name, c->base, c->other, c->difference, c->low, c->high);
}

static void json_comparison(const mft_comparison *c)
{
    printf("{\"base\":");          json_number(stdout, c->base);
    printf(",\"adapter\":");       json_number(stdout, c->other);
    printf(",\"difference\":");    json_number(stdout, c->difference);
    printf(",\"low\":");           json_number(stdout, c->low);
    printf(",\"high\":");          json_number(stdout, c->high);
    printf(",\"n\":%lld}", (long long)c->n);
}

typedef struct loss_parts { double *sums, *counts; int64_t n, cap; int failed; } loss_parts;

static void on_part(void *user, double loss_sum, int64_t n_tokens)
{
    loss_parts *p = (loss_parts *)user;
    if (p->n == p->cap) {
        int64_t cap = 2 * p->cap + 256;
        double *sums = (double *)realloc(p->sums, (size_t)cap * sizeof *sums), *counts;
        if (sums) p->sums = sums;
        counts = sums ? (double *)realloc(p->counts, (size_t)cap * sizeof *counts) : NULL;
        if (!counts) { p->failed = 1; return; }
        p->counts = counts; p->cap = cap;
    }
    p->sums[p->n] = loss_sum; p->counts[p->n++] = (double)n_tokens;
}

static mft_status perplexity_parts(const options *o, session *s, const int32_t *ids, int64_t n, loss_parts *p, mft_eval *eval)
{
    mft_status status = mft_perplexity_parts(s->model, ids, n, (int)o->seq_len, (int)o->stride, on_part, p, eval);
    return status == MFT_OK && p->failed ? MFT_ERR_OUT_OF_MEMORY : status;
}

static int run_perplexity(const options *o)
{
    static const char *const formats[] = { "auto", "text", "tokens", NULL };
    session    s;
    mft_eval   eval, base;
    mft_comparison versus;
    loss_parts parts[2];
    int        i;
    char      *text = NULL;
    int32_t   *ids = NULL;
    int64_t    n = 0, bytes = 0;
    double     began, seconds;
    mft_status status;
    int        exit_status, format = choice("format", o->format, formats);

    if (format < 0 || !need("perplexity", "model", o->model) || !need("perplexity", "data", o->data)
        || (o->compare && !need("perplexity", "adapter", o->adapter))) return 2;
    memset(parts, 0, sizeof parts);
    exit_status = open_session(o, &s);
    if (exit_status) return exit_status;
    if ((status = load_model(o, &s, NULL)) != MFT_OK) goto failed;
    if (format == 2) {
        if (!(ids = read_tokens(o->data, mft_model_get_config(s.model)->vocab_size, &n))) { exit_status = 1; goto done; }
    } else {
        if ((status = mft_tokenizer_load(s.ctx, o->model, &s.tok)) != MFT_OK) goto failed;
        if (!(text = read_text(o->data, &bytes))) { exit_status = 1; goto done; }
        bytes = plain_text(text, bytes);
        if (!(ids = encode(&s, text, bytes, 0, &n))) { status = MFT_ERR_OUT_OF_MEMORY; goto failed; }
    }
    began  = mft__now();
    if (o->compare) {
        if ((status = mft_lora_activate(s.model, NULL)) == MFT_OK && (status = perplexity_parts(o, &s, ids, n, &parts[0], &base)) == MFT_OK)
            status = mft_lora_activate(s.model, "default");
        if (status != MFT_OK) goto failed;
    }
    if ((status = perplexity_parts(o, &s, ids, n, &parts[1], &eval)) != MFT_OK) goto failed;
    seconds = mft__now() - began;
    if (o->compare) mft_compare(parts[0].sums, parts[1].sums, parts[1].counts, parts[1].n, &versus);
    if (o->json) {
        printf("{\"tokens\":%lld,\"loss\":", (long long)eval.n_tokens);
        json_number(stdout, eval.loss);
        printf(",\"perplexity\":");        json_number(stdout, eval.perplexity);
        printf(",\"tokens_per_second\":"); json_number(stdout, (double)n * (o->compare ? 2 : 1) / seconds);
        if (o->compare) { printf(",\"base_perplexity\":"); json_number(stdout, base.perplexity); printf(",\"compare\":{\"loss\":"); json_comparison(&versus); printf("}"); }
        printf(",\"peak_rss_bytes\":%llu}\n", (unsigned long long)peak_rss());
    } else if (o->compare) {
        print_versus_head();
        print_versus("loss", &versus);
        printf("perplexity %.4f with the adapter, %.4f without, over %lld tokens\n", eval.perplexity, base.perplexity, (long long)eval.n_tokens);
    } else printf("perplexity %.4f (loss %.6f over %lld tokens, %.0f tokens/s)\n", eval.perplexity, eval.loss, (long long)eval.n_tokens, (double)n / seconds);
    goto done;
failed:
    exit_status = fail(&s, status);
done:
    for (i = 0; i < 2; i++) { free(parts[i].sums); free(parts[i].counts); }
    free(text); free(ids);
    return close_session(&s, exit_status);
}

/* ==============================================================================
 * MARK: - [EXAM] Questions with known answers: mmlu, eval
 * ============================================================================== */
/* What came out, a number per question; [0] the base when both are asked, [1] what was asked for. */
typedef struct marks {
    int64_t n, n_choose, n_cut, n_fewer, n_exact;
    double *right[2], *likelihood[2], *exact[2], *tokens, *choosable;
} marks;

static int marks_make(marks *m, int64_t n)
{
    double *p = (double *)calloc((size_t)(8 * n) + 1, sizeof *p);
    int     i;
    memset(m, 0, sizeof *m);
    if (!p) return 0;
    m->n = n;
    for (i = 0; i < 2; i++) { m->right[i] = p + i * n; m->likelihood[i] = p + (2 + i) * n; m->exact[i] = p + (4 + i) * n; }
    m->tokens = p + 6 * n; m->choosable = p + 7 * n;
    return 1;
}

/* One line per question for those who want to look. */
static void write_answer(FILE *f, int64_t index, const mft_question *q, const mft_answer *a, int which, int compare)
{
    int i;
    fprintf(f, "{\"question\":%lld,\"model\":\"%s\",\"subject\":", (long long)index, compare && !which ? "base" : "asked");
    json_string(f, q->subject);
    fprintf(f, ",\"expected\":");
    json_string(f, q->expected);
    fprintf(f, ",\"log_likelihood\":%.10g,\"tokens\":%lld", a->log_likelihood, (long long)a->n_tokens);
    if (q->n_choices) {
        fprintf(f, ",\"answer\":%d,\"choice\":%d,\"choices\":[", q->answer, a->choice);
        for (i = 0; i < q->n_choices; i++) fprintf(f, "%s%.10g", i ? "," : "", a->choices[i]);
        fprintf(f, "]");
    }
    if (a->exact >= 0) fprintf(f, ",\"exact\":%s", a->exact ? "true" : "false");
    fprintf(f, ",\"fewshot\":%d,\"cut\":%lld}\n", a->n_shot, (long long)a->n_cut);
}

/* Asks all questions; both models in turn when they are compared. */
static mft_status ask_all(const options *o, session *s, mft_exam *exam, int max_new_tokens, FILE *details, marks *m)
{
    int64_t    i;
    int        which;
    mft_status status = MFT_OK;
    double     shown = 0;
    for (i = 0; i < m->n && status == MFT_OK; i++) {
        mft_question q;
        mft_answer   a;
        mft_exam_question(exam, i, &q);
        for (which = !o->compare; which < 2 && status == MFT_OK; which++) {
            if (o->compare) status = mft_lora_activate(s->model, which ? "default" : NULL);
            if (status == MFT_OK) status = mft_exam_ask(exam, i, s->model, max_new_tokens, &a);
            if (status != MFT_OK) break;
            m->right[which][i] = q.n_choices && a.choice == q.answer;
            m->likelihood[which][i] = a.log_likelihood;
            m->exact[which][i] = a.exact == 1;
            if (details) write_answer(details, i, &q, &a, which, o->compare);
        }
        if (status != MFT_OK) break;
        m->tokens[i] = (double)a.n_tokens;
        m->choosable[i] = q.n_choices > 0;
        m->n_choose += q.n_choices > 0; m->n_exact += a.exact >= 0; m->n_cut += a.n_cut > 0; m->n_fewer += a.n_shot < (int)o->fewshot;
        if (isatty(2) && mft__now() - shown > 0.1) { shown = mft__now(); fprintf(stderr, "\r\033[Kquestion %lld/%lld", (long long)i + 1, (long long)m->n); }
    }
    if (isatty(2)) fputs("\r\033[K", stderr);
    return status;
}

/* Questions of one subject follow each other: where those that begin at `at` end. */
static int64_t subject_end(mft_exam *exam, int64_t at)
{
    mft_question first, q;
    int64_t      i;
    mft_exam_question(exam, at, &first);
    for (i = at + 1; i < mft_exam_size(exam); i++) {
        mft_exam_question(exam, i, &q);
        if (strcmp(q.subject, first.subject)) break;
    }
    return i;
}

static double mean_of(const double *x, int64_t from, int64_t to)
{
    double  sum = 0;
    int64_t i;
    for (i = from; i < to; i++) sum += x[i];
    return sum / (double)(to - from);
}

/* The subjects' lines; returns the mean over subjects. */
static double print_subjects(const options *o, mft_exam *exam, const marks *m, double *out_base)
{
    int64_t at, end;
    int     n = 0;
    double  sum = 0, sum_base = 0;
    if (o->json) printf(",\"subjects\":["); else printf("%-40s %9s  %s\n", "subject", "questions", o->compare ? "base    adapter" : "accuracy");
    for (at = 0; at < m->n; at = end, n++) {
        mft_question q;
        double       right, base;
        mft_exam_question(exam, at, &q);
        end = subject_end(exam, at);
        right = mean_of(m->right[1], at, end); base = mean_of(m->right[0], at, end);
        sum += right; sum_base += base;
        if (o->json) {
            printf("%s{\"subject\":", n ? "," : "");
            json_string(stdout, q.subject);
            printf(",\"questions\":%lld,\"accuracy\":%.10g", (long long)(end - at), right);
            if (o->compare) printf(",\"base_accuracy\":%.10g", base);
            printf("}");
        } else if (o->compare) printf("%-40s %9lld  %.4f  %.4f\n", q.subject, (long long)(end - at), base, right);
        else printf("%-40s %9lld  %.4f\n", q.subject, (long long)(end - at), right);
    }
    if (o->json) printf("]");
    *out_base = sum_base / n;
    return sum / n;
}

static void print_marks(const options *o, mft_exam *exam, const marks *m, int mmlu)
{
    static const char *const names[] = { "accuracy", "log_likelihood_per_token", "exact_match" };
    mft_comparison c[3];
    double         subjects, base;
    int            i, show[3];
    mft_compare(m->right[0], m->right[1], m->choosable, m->n, &c[0]);
    mft_compare(m->likelihood[0], m->likelihood[1], m->tokens, m->n, &c[1]);
    mft_compare(m->exact[0], m->exact[1], NULL, m->n, &c[2]);
    show[0] = m->n_choose > 0; show[1] = 1; show[2] = m->n_exact > 0;
    if (o->json) {
        printf("{\"questions\":%lld", (long long)m->n);
        for (i = 0; i < 3; i++) if (show[i]) { printf(",\"%s\":", names[i]); json_number(stdout, c[i].other); }
        printf(",\"log_likelihood_per_question\":"); json_number(stdout, mean_of(m->likelihood[1], 0, m->n));
        if (mmlu) { subjects = print_subjects(o, exam, m, &base); printf(",\"subject_mean\":%.10g", subjects); }
        printf(",\"cut\":%lld,\"fewer_examples\":%lld", (long long)m->n_cut, (long long)m->n_fewer);
        for (i = 0; o->compare && i < 3; i++) if (show[i]) { printf("%s\"%s\":", i && show[0] ? "," : i > 1 ? "," : ",\"compare\":{", names[i]); json_comparison(&c[i]); }
        printf("%s}\n", o->compare ? "}" : "");
        return;
    }
    if (mmlu) {
        subjects = print_subjects(o, exam, m, &base);
        if (o->compare) printf("%-40s %9s  %.4f  %.4f\n", "mean over subjects", "", base, subjects); else printf("%-40s %9s  %.4f\n", "mean over subjects", "", subjects);
    }
    printf("%lld questions\n", (long long)m->n);
    if (o->compare) print_versus_head();
    for (i = 0; i < 3; i++) if (show[i]) { if (o->compare) print_versus(names[i], &c[i]); else printf("%-26s %.4f\n", names[i], c[i].other); }
    if (m->n_fewer) printf("%lld questions had room for fewer worked examples\n", (long long)m->n_fewer);
    if (m->n_cut) printf("%lld prompts lost their beginning: longer than the model's positions\n", (long long)m->n_cut);
}

static int run_exam(const options *o, int mmlu)
{
    const char      *name = mmlu ? "mmlu" : "eval";
    session          s;
    mft_dataset_desc data;
    mft_exam_desc    d;
    mft_exam        *exam = NULL;
    marks            m;
    FILE            *details = NULL;
    char            *template_text = NULL;
    int64_t          bytes;
    mft_status       status;
    int              exit_status;

    if (!need(name, "model", o->model) || !need(name, "data", o->data) || (o->compare && !need(name, "adapter", o->adapter))) return 2;
    exit_status = open_session(o, &s);
    if (exit_status) return exit_status;
    memset(&m, 0, sizeof m);
    memset(&data, 0, sizeof data);
    memset(&d, 0, sizeof d);
    if (o->chat_template && !(template_text = read_text(o->chat_template, &bytes))) { exit_status = 1; goto done; }
    data.chat_template = template_text; data.prompt_key = o->prompt_key; data.completion_key = o->completion_key;
    data.messages_key = o->messages_key; data.skip_bad_lines = o->skip_bad_lines;
    d.data = &data; d.choices = o->choices; d.split = o->split; d.subject = o->subject; d.n_shot = (int)o->fewshot;
    if ((status = mft_tokenizer_load(s.ctx, o->model, &s.tok)) != MFT_OK || (status = mft_exam_load(s.ctx, s.tok, o->data, &d, &exam)) != MFT_OK
        || (status = load_model(o, &s, NULL)) != MFT_OK) goto failed;
    if (!marks_make(&m, mft_exam_size(exam))) { status = MFT_ERR_OUT_OF_MEMORY; goto failed; }
    if (o->output && !(details = fopen(o->output, "w"))) { fprintf(stderr, "mft: %s: cannot be written\n", o->output); exit_status = 1; goto done; }
    if ((status = ask_all(o, &s, exam, (int)o->max_tokens, details, &m)) != MFT_OK) goto failed;
    print_marks(o, exam, &m, mmlu);
    goto done;
failed:
    exit_status = fail(&s, status);
done:
    if (details && fclose(details) != 0 && !exit_status) { fprintf(stderr, "mft: %s: could not be written whole\n", o->output); exit_status = 1; }
    free(template_text); free(m.right[0]);
    return close_session(&s, exit_status);
}

static int run_mmlu(const options *o) { return run_exam(o, 1); }
static int run_eval(const options *o) { return run_exam(o, 0); }

/* ==============================================================================
 * MARK: - [GENERATE]
 * ============================================================================== */
typedef struct stream { mft_decoder *decoder; int quiet, failed, begun; } stream;

static int on_token(void *user, int32_t id)
{
    stream     *st = (stream *)user;
    const char *piece = mft_decoder_push(st->decoder, id, NULL);
    if (!piece) { st->failed = 1; return 1; }
    if (!st->quiet) { fputs(piece, stdout); fflush(stdout); st->begun = 1; }
    return 0;
}

static void generate_desc(const options *o, mft_generate_desc *d)
{
    memset(d, 0, sizeof *d);
    d->max_new_tokens = (int)o->max_tokens; d->temperature = (float)o->temperature; d->top_k = (int)o->top_k; d->top_p = (float)o->top_p;
    d->repetition_penalty = (float)o->repetition_penalty; d->seed = (uint64_t)o->seed; d->ignore_eos = o->ignore_eos;
}

static int run_generate(const options *o)
{
    session  s;
    stream   st;
    mft_generate_desc d;
    int32_t *prompt = NULL, *out = NULL;
    char    *text = NULL;
    const char *rest;
    int64_t  n_prompt = 0, n = 0;
    mft_status status;
    int      exit_status;

    if (!need("generate", "model", o->model) || !need("generate", "prompt", o->prompt)) return 2;
    exit_status = open_session(o, &s);
    if (exit_status) return exit_status;
    memset(&st, 0, sizeof st);
    if ((status = load_model(o, &s, NULL)) != MFT_OK || (status = mft_tokenizer_load(s.ctx, o->model, &s.tok)) != MFT_OK
        || (status = mft_decoder_create(s.tok, MFT_SKIP_SPECIAL, &st.decoder)) != MFT_OK) goto failed;
    if (!(prompt = encode(&s, o->prompt, -1, o->no_special ? MFT_NO_ADD_SPECIAL : 0, &n_prompt))) { status = MFT_ERR_OUT_OF_MEMORY; goto failed; }
    generate_desc(o, &d);
    out = (int32_t *)malloc((size_t)(d.max_new_tokens > 0 ? d.max_new_tokens : 64) * sizeof *out);
    if (!out) { status = MFT_ERR_OUT_OF_MEMORY; goto failed; }
    st.quiet = o->json;
    d.on_token = on_token; d.user = &st;
    n = mft_generate(s.model, prompt, n_prompt, &d, out, d.max_new_tokens > 0 ? d.max_new_tokens : 64);
    if (n < 0 || st.failed) { status = n < 0 ? (mft_status)n : MFT_ERR_INVALID_ARGUMENT; if (st.begun) printf("\n"); goto failed; }
    if (o->json) {
        if (!(text = decode(&s, out, n, MFT_SKIP_SPECIAL))) { status = MFT_ERR_OUT_OF_MEMORY; goto failed; }
        printf("{\"prompt_tokens\":"); json_ids(stdout, prompt, n_prompt);
        printf(",\"tokens\":");        json_ids(stdout, out, n);
        printf(",\"text\":");          json_string(stdout, text);
        printf("}\n");
    } else {
        rest = mft_decoder_finish(st.decoder, NULL);
        printf("%s\n", rest ? rest : "");
    }
    goto done;
failed:
    exit_status = fail(&s, status);
done:
    free(prompt); free(out); free(text);
    return close_session(&s, exit_status);
}

/* ==============================================================================
 * MARK: - [CHAT] A conversation by lines: a terminal's or a pipe's
 * ============================================================================== */
enum { MOST_STOPS = 16 };

typedef struct talk {
    session                 *s;
    mft_generator           *generator;
    const mft_chat_template *template_of;
    mft_message             *turns;         /* contents from malloc; roles constant                      */
    int                      n, cap;
    int32_t                  stops[MOST_STOPS];
    int                      n_stops;
    stream                   out;
    char                    *answer; size_t n_answer, cap_answer;
} talk;

static int talk_add(talk *t, const char *role, const char *content)
{
    char *copy = (char *)malloc(strlen(content) + 1);
    if (t->n == t->cap) {
        mft_message *p = (mft_message *)realloc(t->turns, (size_t)(2 * t->cap + 8) * sizeof *p);
        if (p) { t->turns = p; t->cap = 2 * t->cap + 8; }
    }
    if (!copy || t->n == t->cap) { free(copy); return 0; }
    strcpy(copy, content);
    t->turns[t->n].role = role; t->turns[t->n++].content = copy;
    return 1;
}

/* Forgets turns [from, from + n). */
static void talk_forget(talk *t, int from, int n)
{
    int i;
    if (!n) return;                                             /* there may be no array yet */
    for (i = from; i < from + n; i++) free((void *)t->turns[i].content);
    memmove(t->turns + from, t->turns + from + n, (size_t)(t->n - from - n) * sizeof *t->turns);
    t->n -= n;
}

static void talk_stop(talk *t, int32_t id)
{
    int i;
    for (i = 0; i < t->n_stops; i++) if (t->stops[i] == id) return;
    if (id >= 0 && t->n_stops < MOST_STOPS) t->stops[t->n_stops++] = id;
}

/* The text of a conversation, from malloc; NULL: the session has the sentence. */
static char *talk_render(talk *t, const mft_message *turns, int n, int render_flags, mft_chat *out_chat)
{
    mft_chat c;
    int64_t  bytes;
    char    *text;
    memset(&c, 0, sizeof c);
    c.messages = turns; c.n_messages = n; c.flags = render_flags; c.now = (int64_t)time(NULL);
    bytes = mft_chat_template_render(t->template_of, &c, NULL, 0);
    text = bytes < 0 ? NULL : (char *)malloc((size_t)bytes + 1);
    if (text) mft_chat_template_render(t->template_of, &c, text, bytes + 1);
    if (out_chat) *out_chat = c;
    return text;
}

/* What ends an answer: the model's and the tokenizer's end of sequence, and the special tokens that the template puts at
 * the end of an assistant's turn. */
static void talk_stops(talk *t)
{
    static const mft_message turns[2] = { { "user", "a" }, { "assistant", "b" } };
    const mft_model_config *config = mft_model_get_config(t->s->model);
    mft_chat      chat;
    mft_chat_span span;
    int32_t       ids[64];
    int64_t       i, n;
    char         *text = talk_render(t, turns, 2, 0, &chat);
    for (i = 0; i < 8; i++) talk_stop(t, config->eos_token_id[i]);
    talk_stop(t, mft_tokenizer_eos_id(t->s->tok));
    if (text && mft_chat_template_spans(t->template_of, &chat, &span, 1) >= 1) {
        n = mft_tokenizer_encode(t->s->tok, text + span.begin, span.end - span.begin, MFT_NO_ADD_SPECIAL, ids, 64);
        for (i = 0; i < n && i < 64; i++) if (mft_tokenizer_is_special(t->s->tok, ids[i])) talk_stop(t, ids[i]);
    }
    free(text);
}

static void talk_keep(talk *t, const char *piece)
{
    size_t bytes = strlen(piece);
    if (t->n_answer + bytes + 1 > t->cap_answer) {
        char *p = (char *)realloc(t->answer, 2 * (t->n_answer + bytes) + 256);
        if (!p) { t->out.failed = 1; return; }
        t->answer = p; t->cap_answer = 2 * (t->n_answer + bytes) + 256;
    }
    memcpy(t->answer + t->n_answer, piece, bytes + 1);
    t->n_answer += bytes;
    fputs(piece, stdout);
    fflush(stdout);
}

static int on_talk_token(void *user, int32_t id)
{
    talk       *t = (talk *)user;
    const char *piece = mft_decoder_push(t->out.decoder, id, NULL);
    if (piece) talk_keep(t, piece); else t->out.failed = 1;
    return t->out.failed;
}

/* The prompt of the conversation so far, and in *out_room how long the answer may be. The oldest turns go when less than
 * a quarter of the model's positions, or than --max-tokens, would be left for it. NULL: a sentence is on stderr. */
static int32_t *talk_prompt(const options *o, talk *t, int64_t *out_n, int64_t *out_room)
{
    int64_t most = mft_model_get_config(t->s->model)->max_position, least = o->max_tokens < most / 4 ? o->max_tokens : most / 4;
    int     gone = 0;
    for (;;) {
        int      first = t->n && !strcmp(t->turns[0].role, "system");
        char    *text = talk_render(t, t->turns, t->n, MFT_GENERATION_PROMPT, NULL);
        int32_t *ids = text ? encode(t->s, text, -1, MFT_NO_ADD_SPECIAL, out_n) : NULL;
        free(text);
        if (!ids) { fail(t->s, MFT_ERR_INVALID_ARGUMENT); return NULL; }
        if (*out_n + least > most && t->n - first > 2) { free(ids); talk_forget(t, first, 2); gone += 2; continue; }
        if (gone) fprintf(stderr, "mft: the %d oldest turns are forgotten: the model has %lld positions\n", gone, (long long)most);
        *out_room = o->max_tokens < most - *out_n ? o->max_tokens : most - *out_n;
        if (*out_room > 0) return ids;
        fprintf(stderr, "mft: this turn makes %lld tokens, the model has %lld positions: it is left out\n", (long long)*out_n, (long long)most);
        free(ids);
        return NULL;
    }
}

/* Answers the last turn; of what was said before only the new is read. An interruption ends the answer and keeps what was
 * said. A turn that cannot be answered is forgotten, and the conversation goes on. */
static mft_status talk_answer(const options *o, talk *t)
{
    mft_generate_desc d;
    int64_t           n = 0, room = 0, got;
    int32_t          *ids = talk_prompt(o, t, &n, &room);
    const char       *rest;
    if (!ids) { talk_forget(t, t->n - 1, 1); return MFT_OK; }
    generate_desc(o, &d);
    d.max_new_tokens = (int)room;
    d.seed += (uint64_t)t->n;                                   /* another draw for each turn */
    d.stop_ids = t->stops; d.n_stop_ids = t->n_stops; d.on_token = on_talk_token; d.user = t;
    t->n_answer = 0;
    talk_keep(t, "");
    signal_target = t->s->ctx;
    got = mft_generator_run(t->generator, ids, n, &d, NULL, 0, NULL);
    signal_target = NULL;
    mft_cancel(t->s->ctx, 0);
    free(ids);
    rest = mft_decoder_finish(t->out.decoder, NULL);
    if (rest) talk_keep(t, rest);
    printf("\n");
    fflush(stdout);
    if (got == MFT_ERR_CANCELLED && !t->n_answer) { talk_forget(t, t->n - 1, 1); return MFT_OK; }
    if (got < 0 && got != MFT_ERR_CANCELLED) return (mft_status)got;
    return !t->out.failed && talk_add(t, "assistant", t->answer) ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
}

/* What an adapter is called: NAME of NAME=DIR, else its directory's name. */
static void adapter_name(const char *given, char *name, size_t cap, const char **out_dir)
{
    const char *equals = strchr(given, '='), *slash;
    size_t      n = strlen(given);
    *out_dir = equals ? equals + 1 : given;
    if (equals) { snprintf(name, cap, "%.*s", (int)(equals - given), given); return; }
    while (n > 1 && given[n - 1] == '/') n--;
    for (slash = given + n; slash > given && slash[-1] != '/'; slash--) {}
    snprintf(name, cap, "%.*s", (int)(given + n - slash), slash);
}

static void list_adapters(const options *o, const talk *t)
{
    const char *active = mft_lora_active(t->s->model), *dir;
    char        name[200];
    int         i;
    fprintf(stderr, "  none%s\n", active ? "" : "  (active)");
    for (i = 0; i < o->adapters.n; i++) {
        adapter_name(o->adapters.at[i], name, sizeof name, &dir);
        fprintf(stderr, "  %s%s\n", name, active && !strcmp(active, name) ? "  (active)" : "");
    }
}

/* A line that begins with '/'. returns 0 at the end of the conversation. */
static int talk_command(const options *o, talk *t, char *line)
{
    char *word = line + strcspn(line, " ");
    if (*word) *word++ = '\0';
    while (*word == ' ') word++;
    if (!strcmp(line, "/exit")) return 0;
    if (!strcmp(line, "/reset")) {
        int first = t->n && !strcmp(t->turns[0].role, "system");
        talk_forget(t, first, t->n - first);
        mft_generator_reset(t->generator);
    } else if (!strcmp(line, "/adapter")) {
        if (!*word) list_adapters(o, t);
        else if (mft_lora_activate(t->s->model, strcmp(word, "none") ? word : NULL) != MFT_OK) { fail(t->s, MFT_ERR_INVALID_ARGUMENT); list_adapters(o, t); }
        else fprintf(stderr, "mft: %s\n", strcmp(word, "none") ? word : "the base alone");
    } else {
        if (strcmp(line, "/help")) fprintf(stderr, "mft: %s is no command\n", line);
        fprintf(stderr, "  /adapter [NAME]  switch to another adapter, or to none; without a name: list them\n"
                        "  /reset           forget the conversation\n  /exit            end it, as does the end of input\n"
                        "  Ctrl-C           end the answer\n");
    }
    return 1;
}

/* A line without its end, in a buffer that grows; 0 at the end of input. */
static int read_line(char **line, size_t *cap)
{
    size_t n = 0;
    int    c;
    while ((c = getchar()) != EOF && c != '\n') {
        if (n + 2 > *cap) {
            char *p = (char *)realloc(*line, 2 * *cap + 256);
            if (!p) return 0;
            *line = p; *cap = 2 * *cap + 256;
        }
        (*line)[n++] = (char)c;
    }
    if (n && (*line)[n - 1] == '\r') n--;
    if (*line) (*line)[n] = '\0';
    return c != EOF || n;
}

/* --chat-template: a builtin's name or a file. */
static mft_status talk_template(const options *o, talk *t, mft_chat_template **owned)
{
    static const char *const names[3] = { "bos_token", "eos_token", "pad_token" };
    mft_context *ctx = t->s->ctx;
    const char  *source = o->chat_template ? mft_chat_template_builtin(o->chat_template) : NULL;
    char        *text = NULL;
    int64_t      bytes = -1;
    int32_t      ids[3];
    int          i;
    mft_status   status;
    if (!o->chat_template) { t->template_of = mft_tokenizer_chat_template(t->s->tok); return MFT_OK; }
    if (!source && !(source = text = read_text(o->chat_template, &bytes))) return MFT_ERR_IO;
    status = mft_chat_template_create(ctx, source, bytes, owned);
    free(text);
    ids[0] = mft_tokenizer_bos_id(t->s->tok); ids[1] = mft_tokenizer_eos_id(t->s->tok); ids[2] = mft_tokenizer_pad_id(t->s->tok);
    for (i = 0; i < 3 && status == MFT_OK; i++) {
        char    token[256];
        int64_t n = ids[i] < 0 ? -1 : mft_tokenizer_id_to_token(t->s->tok, ids[i], token, (int64_t)sizeof token - 1);
        if (n < 0 || n >= (int64_t)sizeof token) continue;
        token[n] = '\0';
        status = mft_chat_template_set(*owned, names[i], token);
    }
    t->template_of = *owned;
    return status;
}

static mft_status open_chat(const options *o, talk *t, mft_chat_template **owned)
{
    session    *s = t->s;
    const char *dir;
    char        name[200];
    int         i;
    mft_status  status;
    if ((status = mft_tokenizer_load(s->ctx, o->model, &s->tok)) != MFT_OK || (status = talk_template(o, t, owned)) != MFT_OK
        || (status = mft_model_load(s->ctx, o->model, NULL, &s->model)) != MFT_OK || (status = mft_generator_create(s->model, &t->generator)) != MFT_OK
        || (status = mft_decoder_create(s->tok, MFT_SKIP_SPECIAL, &t->out.decoder)) != MFT_OK) return status;
    for (i = 0; i < o->adapters.n && status == MFT_OK; i++) {
        adapter_name(o->adapters.at[i], name, sizeof name, &dir);
        status = mft_lora_load(s->model, dir, name);
    }
    return status;
}

static int run_chat(const options *given)
{
    options            o = *given;
    session            s;
    talk               t;
    mft_chat_template *owned = NULL;
    char              *line = NULL;
    size_t             cap = 0;
    mft_status         status;
    int                exit_status, asks = isatty(0) && isatty(2);

    if (!need("chat", "model", o.model)) return 2;
    if (!o.max_tokens) o.max_tokens = 512;
    exit_status = open_session(&o, &s);
    if (exit_status) return exit_status;
    memset(&t, 0, sizeof t);
    t.s = &s;
    if ((status = open_chat(&o, &t, &owned)) != MFT_OK) goto failed;
    if (!t.template_of) {
        fprintf(stderr, "mft: %s has no chat template: give one (--chat-template chatml, gemma, llama3, llama2, zephyr or a file), or use mft generate\n", o.model);
        exit_status = 1;
        goto done;
    }
    talk_stops(&t);
    if (o.system && !talk_add(&t, "system", o.system)) { status = MFT_ERR_OUT_OF_MEMORY; goto failed; }
    signal_target = NULL;                                       /* while we wait, Ctrl-C ends us */
    if (asks) fprintf(stderr, "/help tells the commands\n");
    for (;;) {
        if (asks) fputs("> ", stderr);
        if (!read_line(&line, &cap)) break;
        if (!line || !line[strspn(line, " \t")]) continue;
        if (line[0] == '/') { if (!talk_command(&o, &t, line)) break; continue; }
        if (!talk_add(&t, "user", line)) { status = MFT_ERR_OUT_OF_MEMORY; goto failed; }
        if ((status = talk_answer(&o, &t)) != MFT_OK) goto failed;
    }
    goto done;
failed:
    exit_status = fail(&s, status);
done:
    talk_forget(&t, 0, t.n);
    free(t.turns); free(t.answer); free(line);
    return close_session(&s, exit_status);
}

/* ==============================================================================
 * MARK: - [TOKENIZE]
 * ============================================================================== */

/* One JSON object with "text" a line in, one array a line out. */
static int tokenize_lines(session *s, const char *path, int encode_flags)
{
    int64_t bytes = 0, line = 0;
    char   *text = read_text(path, &bytes), *p = text, *end = text ? text + bytes : NULL;
    int     ok = text != NULL;
    while (ok && p < end) {
        char       *stop = (char *)memchr(p, '\n', (size_t)(end - p));
        size_t      n = (size_t)((stop ? stop : end) - p), text_bytes = 0;
        mft_json   *root = NULL;
        const char *value;
        int32_t    *ids;
        int64_t     count = 0;
        line++;
        if (n && p[n - 1] == '\r') n--;
        if (n) {
            if (mft__json_parse(s->ctx, path, (int)line, p, n, &root) != MFT_OK) { fprintf(stderr, "mft: %s\n", mft_error_message(s->ctx)); ok = 0; break; }
            value = mft_json_string(mft_json_get(root, "text"), &text_bytes);
            ids   = value ? encode(s, value, (int64_t)text_bytes, encode_flags, &count) : NULL;
            if (!value) fprintf(stderr, "mft: %s: line %lld: no string \"text\"\n", path, (long long)line);
            else if (!ids) fprintf(stderr, "mft: %s: line %lld: %s\n", path, (long long)line, mft_error_message(s->ctx));
            ok = ids != NULL;
            if (ok) { json_ids(stdout, ids, count); fputc('\n', stdout); }
            free(ids);
            mft_json_destroy(root);
        }
        p = stop ? stop + 1 : end;
    }
    free(text);
    return ok ? 0 : 1;
}

/* "1 2 3" or "1,2,3" or "[1, 2, 3]" to ids, freed with free(). */
static int32_t *parse_ids(const char *s, int64_t *out_n)
{
    int32_t *ids = (int32_t *)malloc((strlen(s) / 2 + 1) * sizeof *ids);
    int64_t  n = 0;
    while (ids && *s) {
        char *end;
        long  v;
        if (strchr(" ,[]\n\t\r", *s)) { s++; continue; }
        v = strtol(s, &end, 10);
        if (end == s || v < 0 || v > 2147483647L) { fprintf(stderr, "mft tokenize: --decode: \"%.20s\" is no token id\n", s); free(ids); return NULL; }
        ids[n++] = (int32_t)v;
        s = end;
    }
    *out_n = n;
    return ids;
}

static int run_tokenize(const options *o)
{
    session    s;
    char      *text = NULL;
    int32_t   *ids = NULL;
    int64_t    n = 0, bytes = -1;
    mft_status status;
    int        exit_status, ways = !!o->text + !!o->file + !!o->decode + !!o->jsonl, encode_flags = o->no_special ? MFT_NO_ADD_SPECIAL : 0;

    if (!need("tokenize", "model", o->model)) return 2;
    if (ways != 1) { fprintf(stderr, "mft tokenize: one of --text, --file, --decode, --jsonl is needed\n"); return 2; }
    exit_status = open_session(o, &s);
    if (exit_status) return exit_status;
    if ((status = mft_tokenizer_load(s.ctx, o->model, &s.tok)) != MFT_OK) goto failed;
    if (o->jsonl) { exit_status = tokenize_lines(&s, o->jsonl, encode_flags); goto done; }
    if (o->decode) {
        if (!(ids = parse_ids(o->decode, &n))) { exit_status = 2; goto done; }
        if (!(text = decode(&s, ids, n, o->no_special ? MFT_SKIP_SPECIAL : 0))) { status = MFT_ERR_INVALID_ARGUMENT; goto failed; }
        if (o->json) { printf("{\"text\":"); json_string(stdout, text); printf("}\n"); }
        else printf("%s\n", text);
        goto done;
    }
    if (o->file && !(text = read_text(o->file, &bytes))) { exit_status = 1; goto done; }
    if (!(ids = encode(&s, o->text ? o->text : text, bytes, encode_flags, &n))) { status = MFT_ERR_OUT_OF_MEMORY; goto failed; }
    if (o->json) { printf("{\"ids\":"); json_ids(stdout, ids, n); printf("}\n"); }
    else {
        int64_t i;
        for (i = 0; i < n; i++) printf("%s%ld", i ? " " : "", (long)ids[i]);
        printf("\n");
    }
    goto done;
failed:
    exit_status = fail(&s, status);
done:
    free(text); free(ids);
    return close_session(&s, exit_status);
}

/* ==============================================================================
 * MARK: - [LOGITS]
 * ============================================================================== */

/* `logits` [N, T, V] f32 of N rows of T tokens, written row by row. */
static int run_logits(const options *o)
{
    session                 s;
    int32_t                *ids = NULL;
    int64_t                 n = 0, seq = o->seq_len, i;
    mft_safetensors_spec    spec;
    mft_safetensors_writer *w = NULL;
    mft_status              status;
    int                     exit_status;

    if (!need("logits", "model", o->model) || !need("logits", "tokens", o->tokens) || !need("logits", "output", o->output)) return 2;
    exit_status = open_session(o, &s);
    if (exit_status) return exit_status;
    if ((status = load_model(o, &s, NULL)) != MFT_OK) goto failed;
    memset(&spec, 0, sizeof spec);
    spec.name = "logits"; spec.dtype = MFT_F32; spec.ndim = 3;
    spec.shape[2] = mft_model_get_config(s.model)->vocab_size;
    if (!(ids = read_tokens(o->tokens, spec.shape[2], &n))) { exit_status = 1; goto done; }
    spec.shape[0] = n / seq; spec.shape[1] = seq;
    if (!spec.shape[0] || n % seq) { fprintf(stderr, "mft logits: %s holds %lld tokens, which are no rows of %lld\n", o->tokens, (long long)n, (long long)seq); exit_status = 1; goto done; }
    if ((status = mft_safetensors_write_begin(s.ctx, o->output, &spec, 1, NULL, &w)) != MFT_OK) goto failed;
    mft_grad_enable(s.ctx, 0);
    for (i = 0; i < spec.shape[0] && status == MFT_OK; i++) {
        mft_batch   b;
        mft_tensor *y;
        memset(&b, 0, sizeof b);
        b.input_ids = ids + i * seq; b.batch = 1; b.seq = (int)seq;
        y = mft_model_forward(s.model, &b);
        status = y ? mft_safetensors_write_rows(w, 0, y) : mft_backward(s.ctx, NULL);
        mft_step_reset(s.ctx);
    }
    if (status == MFT_OK) status = mft_safetensors_write_commit(w);
    else mft_safetensors_write_abort(w);
    if (status != MFT_OK) goto failed;
    if (o->json) { printf("{\"shape\":[%lld,%lld,%lld],\"output\":", (long long)spec.shape[0], (long long)seq, (long long)spec.shape[2]); json_string(stdout, o->output); printf("}\n"); }
    else printf("logits [%lld, %lld, %lld] in %s\n", (long long)spec.shape[0], (long long)seq, (long long)spec.shape[2], o->output);
    goto done;
failed:
    exit_status = fail(&s, status);
done:
    free(ids);
    return close_session(&s, exit_status);
}

/* ==============================================================================
 * MARK: - [INSPECT]
 * ============================================================================== */
static void print_entry(const mft_safetensors_entry *e, int json, int first)
{
    int i;
    if (json) {
        printf("%s{\"name\":", first ? "" : ",");
        json_string(stdout, e->name);
        printf(",\"dtype\":\"%s\",\"shape\":[", e->dtype_name);
        for (i = 0; i < e->ndim; i++) printf("%s%lld", i ? "," : "", (long long)e->shape[i]);
        printf("]}");
        return;
    }
    printf("  %-60s %-5s [", e->name, e->dtype_name);
    for (i = 0; i < e->ndim; i++) printf("%s%lld", i ? ", " : "", (long long)e->shape[i]);
    printf("]%s%s\n", e->problem ? "  " : "", e->problem ? e->problem : "");
}

static void print_tensors(mft_safetensors *st, int json)
{
    size_t i, n;
    const mft_safetensors_entry *e = mft_safetensors_entries(st, &n);
    if (json) printf("\"tensors\":[");
    for (i = 0; i < n; i++) print_entry(&e[i], json, i == 0);
    if (json) printf("]");
}

/* "F32" or "BF16 (x146), F32 (x2)" of all tensors. */
static void dtype_summary(mft_safetensors *st, char *text, size_t cap)
{
    const char *names[8];
    size_t      counts[8], kinds = 0, i, k, n, used = 0;
    const mft_safetensors_entry *e = mft_safetensors_entries(st, &n);
    for (i = 0; i < n; i++) {
        for (k = 0; k < kinds && strcmp(names[k], e[i].dtype_name); k++) {}
        if (k == kinds) { if (kinds == 8) continue; names[kinds] = e[i].dtype_name; counts[kinds++] = 0; }
        counts[k]++;
    }
    text[0] = '\0';
    for (k = 0; k < kinds && used < cap; k++)
        used += (size_t)snprintf(text + used, cap - used, kinds > 1 ? "%s%s (x%llu)" : "%s%s", k ? ", " : "", names[k], (unsigned long long)counts[k]);
}

/* A tensor's name with the layer's number as '*': what is alike in all layers has one such name. */
static void name_pattern(const char *name, char *text, size_t cap)
{
    size_t n = 0;
    while (*name && n + 2 < cap) {
        if (n && text[n - 1] == '.' && *name >= '0' && *name <= '9') {
            while (*name >= '0' && *name <= '9') name++;
            text[n++] = '*';
        } else text[n++] = *name++;
    }
    text[n] = '\0';
}

/* One line for all tensors that differ only in their layer. */
static void print_tensor_kinds(mft_safetensors *st)
{
    size_t i, k, n;
    const mft_safetensors_entry *e = mft_safetensors_entries(st, &n);
    for (i = 0; i < n; i++) {
        char   mine[256], other[256];
        size_t alike = 1;
        name_pattern(e[i].name, mine, sizeof mine);
        for (k = 0; k < i; k++) {           /* was it counted with an earlier one? */
            name_pattern(e[k].name, other, sizeof other);
            if (!strcmp(mine, other) && !strcmp(e[k].dtype_name, e[i].dtype_name) && e[k].ndim == e[i].ndim && !memcmp(e[k].shape, e[i].shape, sizeof e[i].shape)) break;
        }
        if (k < i) continue;
        for (k = i + 1; k < n; k++) {
            name_pattern(e[k].name, other, sizeof other);
            alike += !strcmp(mine, other) && !strcmp(e[k].dtype_name, e[i].dtype_name) && e[k].ndim == e[i].ndim && !memcmp(e[k].shape, e[i].shape, sizeof e[i].shape);
        }
        printf("  %-52s", mine);
        if (alike > 1) printf(" x%-4llu", (unsigned long long)alike); else printf("      ");
        printf(" %-5s [", e[i].dtype_name);
        for (k = 0; k < (size_t)e[i].ndim; k++) printf("%s%lld", k ? ", " : "", (long long)e[i].shape[k]);
        printf("]%s%s\n", e[i].problem ? "  " : "", e[i].problem ? e[i].problem : "");
    }
}

/* The files of a snapshot that mft reads, with their sizes. */
static void print_files(mft_context *ctx, const char *dir, mft_safetensors *st, int json)
{
    static const char *const names[] = { "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt",
                                         "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja" };
    const int   n_names = (int)(sizeof names / sizeof *names);
    const char *shard;
    int         i, first = 1;
    for (i = 0; i < n_names || (shard = mft_safetensors_shard_path(st, i - n_names)) != NULL; i++) {
        char       *joined = i < n_names ? mft__path_join(ctx, dir, names[i]) : NULL;
        const char *path = joined ? joined : i < n_names ? "" : shard, *name = strrchr(path, '/');
        struct stat info;
        name = name ? name + 1 : path;
        if (stat(path, &info) == 0) {
            if (json) { printf("%s{\"name\":", first ? "" : ","); json_string(stdout, name); printf(",\"bytes\":%lld}", (long long)info.st_size); }
            else printf("  %-52s %12lld bytes\n", name, (long long)info.st_size);
            first = 0;
        }
        mft__strfree(ctx, joined);
    }
}

static void print_model_json(session *s, const options *o, const mft_model_config *c, mft_safetensors *st, const char *dtypes, const mft_plan *plan)
{
    int i;
    printf("{\"kind\":\"model\",\"family\":\"%s\",\"model_type\":", mft_family_name(c->family));
    json_string(stdout, c->model_type);
    printf(",\"parameters\":%lld,\"vocab_size\":%lld,\"hidden_size\":%lld,\"intermediate_size\":%lld,\"n_layer\":%d,\"n_head\":%d,\"n_kv_head\":%d,\"head_dim\":%d,\"max_position\":%lld,",
           (long long)c->n_params, (long long)c->vocab_size, (long long)c->hidden_size, (long long)c->intermediate_size, c->n_layer, c->n_head, c->n_kv_head, c->head_dim, (long long)c->max_position);
    printf("\"sliding_window\":%d,\"layer_types\":[", c->sliding_window);
    for (i = 0; i < c->n_layer; i++) printf("%s\"%s\"", i ? "," : "", c->layer_slides && c->layer_slides[i] && c->sliding_window ? "sliding_attention" : "full_attention");
    printf("],\"tied_embeddings\":%s,\"dtypes\":", c->tied_embeddings ? "true" : "false");
    json_string(stdout, dtypes);
    printf(",\"lora_targets\":\"%s\",\"tokenizer\":", mft_family_lora_targets(c->family));
    if (s->tok) json_string(stdout, mft_tokenizer_kind(s->tok)); else printf("null");
    printf(",\"chat_template\":%s,\"files\":[", s->tok && mft_tokenizer_chat_template(s->tok) ? "true" : "false");
    print_files(s->ctx, o->path, st, 1);
    printf("],\"plan\":{\"batch_size\":1,\"seq_len\":%lld,\"lora_rank\":8,\"bytes\":", (long long)o->seq_len);
    print_plan(plan, 1);
    printf("},");
    print_tensors(st, 1);
    printf("}\n");
}

/* Loaded as training would load it, by mapping: no weight is read. */
static int inspect_model(session *s, const options *o)
{
    const mft_model_config *c;
    mft_safetensors *st = NULL;
    mft_plan         plan;
    mft_model       *m = NULL;
    mft_trainer     *tr = NULL;
    mft_trainer_desc td;
    char             dtypes[128];
    mft_status       status;
    int              i, sliding = 0;
    if ((status = mft_safetensors_open(s->ctx, o->path, &st)) != MFT_OK || (status = mft_model_load(s->ctx, o->path, NULL, &m)) != MFT_OK) return fail(s, status);
    dtype_summary(st, dtypes, sizeof dtypes);
    if (mft_tokenizer_load(s->ctx, o->path, &s->tok) != MFT_OK) s->tok = NULL;
    memset(&td, 0, sizeof td);
    if ((status = mft_lora_attach(m, NULL)) != MFT_OK || (status = mft_trainer_create(m, NULL, &td, &tr)) != MFT_OK
        || (status = mft_trainer_plan(tr, 1, (int)o->seq_len, &plan)) != MFT_OK) return fail(s, status);
    c = mft_model_get_config(m);
    if (o->json) { print_model_json(s, o, c, st, dtypes, &plan); return 0; }
    printf("%s: a %s model\n", o->path, mft_family_name(c->family));
    printf("  parameters      %lld%s\n", (long long)c->n_params, c->tied_embeddings ? " (the head is the embedding)" : " (with a head of its own)");
    printf("  layers          %d of width %lld, inner %lld\n", c->n_layer, (long long)c->hidden_size, (long long)c->intermediate_size);
    printf("  attention       %d heads of %d, %d for keys and values", c->n_head, c->head_dim, c->n_kv_head);
    for (i = 0; c->sliding_window && i < c->n_layer; i++) sliding += c->layer_slides[i] != 0;
    if (sliding) printf(", a window of %d in %d of %d layers", c->sliding_window, sliding, c->n_layer);
    printf("\n  vocabulary      %lld, positions up to %lld\n", (long long)c->vocab_size, (long long)c->max_position);
    printf("  stored as       %s\n", dtypes);
    printf("  tokenizer       %s\n", s->tok ? mft_tokenizer_kind(s->tok) : "none");
    printf("  chat template   %s\n", s->tok && mft_tokenizer_chat_template(s->tok) ? "yes" : "no");
    printf("  LoRA targets    %s\n", mft_family_lora_targets(c->family));
    printf("tensors\n");
    print_tensor_kinds(st);
    printf("files\n");
    print_files(s->ctx, o->path, st, 0);
    printf("for a LoRA step of 1 x %lld tokens (rank 8): ", (long long)o->seq_len);
    print_plan(&plan, 0);
    return 0;
}

static int inspect_adapter(session *s, const options *o, const char *config_path)
{
    mft_json        *root = NULL;
    mft_safetensors *st = NULL;
    char            *path = mft__path_join(s->ctx, o->path, "adapter_model.safetensors");
    const char      *base;
    mft_status       status = path ? mft_json_load(s->ctx, config_path, &root) : MFT_ERR_OUT_OF_MEMORY;
    if (status == MFT_OK) status = mft_safetensors_open(s->ctx, path, &st);
    mft__strfree(s->ctx, path);
    if (status != MFT_OK) return fail(s, status);
    base = mft_json_string(mft_json_get(root, "base_model_name_or_path"), NULL);
    if (o->json) {
        printf("{\"kind\":\"adapter\",\"r\":%lld,\"lora_alpha\":%g,\"base\":", (long long)mft_json_integer(mft_json_get(root, "r"), 0), mft_json_number(mft_json_get(root, "lora_alpha"), 0));
        json_string(stdout, base ? base : "");
        printf(",\"use_rslora\":%s,\"use_dora\":%s,", mft_json_bool(mft_json_get(root, "use_rslora"), 0) ? "true" : "false", mft_json_bool(mft_json_get(root, "use_dora"), 0) ? "true" : "false");
        print_tensors(st, 1);
        printf("}\n");
    } else {
        printf("%s: a LoRA adapter of rank %lld, alpha %g, for %s\n", o->path, (long long)mft_json_integer(mft_json_get(root, "r"), 0), mft_json_number(mft_json_get(root, "lora_alpha"), 0), base ? base : "?");
        print_tensors(st, 0);
    }
    return 0;
}

static int run_inspect(const options *given)
{
    options          o = *given;
    session          s;
    mft_safetensors *st = NULL;
    char            *config = NULL, *adapter = NULL;
    mft_status       status;
    int              exit_status;
    if (!o.path) o.path = o.model;
    if (!o.path) { fprintf(stderr, "mft inspect: which path?\ntry: mft inspect --help\n"); return 2; }
    exit_status = open_session(&o, &s);
    if (exit_status) return exit_status;
    config  = mft__path_join(s.ctx, o.path, "config.json");
    adapter = mft__path_join(s.ctx, o.path, "adapter_config.json");
    if (adapter && mft__file_exists(s.ctx, adapter)) exit_status = inspect_adapter(&s, &o, adapter);
    else if (config && mft__file_exists(s.ctx, config)) exit_status = inspect_model(&s, &o);
    else if ((status = mft_safetensors_open(s.ctx, o.path, &st)) != MFT_OK) exit_status = fail(&s, status);
    else {
        if (o.json) printf("{\"kind\":\"safetensors\",");
        print_tensors(st, o.json);
        if (o.json) printf("}\n");
    }
    mft__strfree(s.ctx, config);
    mft__strfree(s.ctx, adapter);
    return close_session(&s, exit_status);
}

/* ==============================================================================
 * MARK: - [MERGE] [INIT]
 * ============================================================================== */
static int run_merge(const options *o)
{
    session    s;
    mft_status status;
    int        exit_status;
    if (!need("merge", "model", o->model) || !need("merge", "adapter", o->adapter) || !need("merge", "output", o->output)) return 2;
    exit_status = open_session(o, &s);
    if (exit_status) return exit_status;
    if ((status = load_model(o, &s, NULL)) != MFT_OK || (status = mft_lora_merge(s.model)) != MFT_OK || (status = mft_model_save(s.model, o->output)) != MFT_OK)
        exit_status = fail(&s, status);
    else if (o->json) { printf("{\"output\":"); json_string(stdout, o->output); printf("}\n"); }
    else printf("merged into %s\n", o->output);
    return close_session(&s, exit_status);
}

static int run_init(const options *o)
{
    static const char *const dtypes[] = { "f32", "bf16", "f16", NULL };
    static const mft_dtype kinds[] = { MFT_F32, MFT_BF16, MFT_F16 };
    session    s;
    mft_status status;
    int        exit_status, dtype = choice("dtype", o->dtype, dtypes);
    if (dtype < 0 || !need("init", "config", o->config) || !need("init", "output", o->output)) return 2;
    exit_status = open_session(o, &s);
    if (exit_status) return exit_status;
    status = mft_model_init(s.ctx, o->config, (uint64_t)o->seed, kinds[dtype], o->output);
    if (status != MFT_OK) exit_status = fail(&s, status);
    else if (o->json) { printf("{\"output\":"); json_string(stdout, o->output); printf("}\n"); }
    else printf("random weights in %s\n", o->output);
    return close_session(&s, exit_status);
}

/* ==============================================================================
 * MARK: - [BENCH] Figures beside the machine's own; bench.h measures
 * ============================================================================== */
static int run_bench(const options *o)
{
    static const char *const parts[] = { "all", "kernels", "ops", "steps", "decode", "threads", "scaling", NULL };
    session    s;
    bench      b;
    bench_mode mode;
    int        i, exit_status, ok = 1, n_steps = o->max_steps ? (int)o->max_steps : 3;
    int        part = choice("PART", o->path, parts);
    if (part < 0) return 2;
    if (o->model && part < BENCH_STEPS_OF) part = BENCH_STEPS_OF;
    exit_status = open_session(o, &s);
    if (exit_status) return exit_status;
    memset(&b, 0, sizeof b);
    b.ctx = s.ctx; b.json = o->json;
    if (b.json) printf("{\"row\":\"%s\",\"threads\":%d,\"precision\":\"%s\",", mft_kernels_name(s.ctx), s.ctx->n_threads, o->precision ? o->precision : "f32");
    ok = bench_machine(&b);
    if (b.json) printf("\"results\":[");
    if (ok && (part == BENCH_ALL || part == BENCH_KERNELS)) ok = bench_kernels(&b);
    if (ok && (part == BENCH_ALL || part == BENCH_OPS))     ok = bench_ops(&b);
    memset(&mode, 0, sizeof mode);
    mode.full = o->full; mode.batch = (int)o->batch_size; mode.seq = (int)o->seq_len;
    if (ok && o->model) ok = part == BENCH_DECODE  ? bench_decode_all(&b, o->model, o->model)
                           : part == BENCH_THREADS ? bench_threads(&b, o->model, o->model)
                           : part == BENCH_SCALING ? bench_scaling(&b, o->model, o->model, n_steps) : bench_steps(&b, o->model, o->model, &mode, 1, n_steps);
    else for (i = BENCH_STEPS_OF; ok && i <= BENCH_SCALING; i++) if (part == BENCH_ALL || part == i) ok = bench_shapes_of(&b, i, n_steps);
    if (b.json) printf("]}\n");
    return close_session(&s, ok ? 0 : fail(&s, MFT_ERR_OUT_OF_MEMORY));
}

/* ==============================================================================
 * MARK: - [REPORT] Logs as a page; report.h draws it
 * ============================================================================== */
#include "report.h"

/* A run's name, log and trace, the k-th of each. 0: a sentence is on stderr. */
static int load_run(const options *o, session *s, report_run *runs, int k)
{
    report_run *r = &runs[k];
    const char *trace;
    r->path = o->paths.at[k];
    if (k < o->names.n) snprintf(r->name, sizeof r->name, "%s", o->names.at[k]); else report_name(runs, k, k);
    if (!report_read_log(s->ctx, r)) return 0;
    report_read_about(s->ctx, r);
    if (k < o->memory_traces.n) return report_read_trace(s->ctx, r, o->memory_traces.at[k]);
    trace = report_setting(r, "memory-trace");                  /* as finetune was given it, if it is still there */
    return !trace || !mft__file_exists(s->ctx, trace) || report_read_trace(s->ctx, r, trace);
}

static int run_report(const options *o)
{
    session     s;
    report_run  runs[REPORT_RUNS];
    report_page page;
    int64_t     longest = 0, window;
    int         k, n = o->paths.n, exit_status;

    if (!n) { fprintf(stderr, "mft report: which logs?\ntry: mft report --help\n"); return 2; }
    if (!need("report", "output", o->output)) return 2;
    if (o->names.n > n || o->memory_traces.n > n) { fprintf(stderr, "mft report: more of --%s than logs\n", o->names.n > n ? "name" : "memory-trace"); return 2; }
    exit_status = open_session(o, &s);
    if (exit_status) return exit_status;
    memset(runs, 0, sizeof runs);
    memset(&page, 0, sizeof page);
    for (k = 0; k < n; k++) {
        if (!load_run(o, &s, runs, k)) { exit_status = 1; goto done; }
        if (runs[k].n > longest) longest = runs[k].n;
    }
    window = longest < 125 ? 5 : longest / 25 < 500 ? longest / 25 : 500;
    for (k = 0; k < n; k++) report_smooth(&runs[k], window);
    report_write_page(&page, runs, n, window);
    if (page.failed) { fprintf(stderr, "mft report: no memory for the page\n"); exit_status = 1; }
    else if (mft__file_write_all(s.ctx, o->output, page.text, page.n) != MFT_OK) exit_status = fail(&s, MFT_ERR_IO);
    else if (o->json) { printf("{\"output\":"); json_string(stdout, o->output); printf(",\"runs\":%d,\"bytes\":%llu}\n", n, (unsigned long long)page.n); }
    else printf("the report on %d run%s is in %s\n", n, n == 1 ? "" : "s", o->output);
done:
    for (k = 0; k < n; k++) report_free_run(&runs[k]);
    free(page.text);
    return close_session(&s, exit_status);
}

/* ==============================================================================
 * MARK: - [MAIN]
 * ============================================================================== */
#define COMMON " threads kernels precision json "
static const command commands[] = {
    { "finetune", "train a LoRA adapter, or all weights, on your data",
      "model data output eval-data adapter format full plan lora-rank lora-alpha lora-dropout lora-modules use-rslora use-dora batch-size grad-accum-steps seq-len "
      "epochs max-steps lr lr-min lr-scheduler warmup-steps warmup-ratio weight-decay max-grad-norm optim update-in-backward master-dtype seed assistant-loss-only train-on-prompt "
      "chat-template text-key prompt-key completion-key messages-key skip-bad-lines index index-above no-pack no-shuffle quantize grad-checkpointing no-grad-checkpointing checkpoint-bf16 memory-budget "
      "eval-split eval-steps early-stopping-patience load-best max-nonfinite-steps state-dir checkpoint-save-steps checkpoint-save-dir save-total-limit resume-from config log memory-trace samples sample-prompt" COMMON,
      "  mft finetune --model gpt2 --data mail.txt --output adapter\n"
      "  mft finetune --model Qwen2.5-0.5B --data chats.jsonl --output adapter --lora-rank 16 --lora-modules all-linear --epochs 3\n"
      "  mft finetune --model gpt2 --data notes.txt --output tuned --full --lr 5e-5\n"
      "  mft finetune --model gpt2 --data mail.jsonl --eval-split 0.1 --eval-steps 50 --load-best --checkpoint-save-steps 50 --save-total-limit 2 --output adapter\n"
      "  mft finetune --config adapter/finetune.yaml --resume-from latest\n", run_finetune },
    { "perplexity", "how well a model predicts a text", "model adapter data format seq-len stride compare quantize" COMMON,
      "  mft perplexity --model gpt2 --data wiki.test.raw --seq-len 1024 --stride 512\n", run_perplexity },
    { "mmlu", "multiple choice questions as in MMLU, per subject", "model adapter data split fewshot subject compare output" COMMON,
      "  mft mmlu --model gpt2 --data mmlu --fewshot 5\n  mft mmlu --model gpt2 --adapter adapter --data mmlu --subject anatomy --compare\n", run_mmlu },
    { "eval", "questions with known answers: choices, exact match, likelihood", "model adapter data choices max-tokens chat-template prompt-key completion-key messages-key skip-bad-lines compare output" COMMON,
      "  mft eval --model gpt2 --data pubmedqa/test.jsonl --choices yes,no,maybe\n  mft eval --model gpt2 --adapter adapter --data held-out.jsonl --max-tokens 32 --compare\n", run_eval },
    { "generate", "continue a prompt", "model adapter prompt max-tokens temperature top-k top-p repetition-penalty seed no-special ignore-eos quantize" COMMON,
      "  mft generate --model gpt2 --prompt \"Once upon a time\" --max-tokens 100 --temperature 0.8 --top-p 0.95\n", run_generate },
    { "chat", "a conversation with a model and its adapters", "model adapter chat-template system max-tokens temperature top-k top-p repetition-penalty seed threads kernels precision",
      "  mft chat --model Qwen2.5-0.5B-Instruct --adapter mail --adapter health --temperature 0.7\n  echo \"Who are you?\" | mft chat --model gemma-3-270m-it\n", run_chat },
    { "tokenize", "text to token ids and back", "model text file decode jsonl no-special" COMMON,
      "  mft tokenize --model gpt2 --text \"Hello world\"\n  mft tokenize --model gpt2 --decode \"15496 995\"\n", run_tokenize },
    { "logits", "the model's logits for rows of token ids, as safetensors", "model adapter tokens seq-len output" COMMON,
      "  mft logits --model gpt2 --tokens ids.bin --seq-len 128 --output logits.safetensors\n", run_logits },
    { "inspect", "what a model, an adapter or a .safetensors file holds", "PATH model seq-len" COMMON,
      "  mft inspect Qwen2.5-0.5B\n  mft inspect adapter --json\n", run_inspect },
    { "merge", "an adapter into its base: a snapshot of its own", "model adapter output" COMMON,
      "  mft merge --model gpt2 --adapter adapter --output merged\n", run_merge },
    { "init", "a snapshot with random weights", "config seed dtype output" COMMON,
      "  mft init --config gpt2/config.json --output fresh --dtype bf16\n", run_init },
    { "report", "logs of runs as one page to look at in a browser", "PATHS name memory-trace output json",
      "  mft report run.jsonl --output report.html\n"
      "  mft report lora8.jsonl lora64.jsonl --name \"rank 8\" --name \"rank 64\" --output compared.html\n"
      "  settings, samples and the place of the memory trace come from run.jsonl.about.json, which finetune --log run.jsonl writes\n", run_report },
    { "bench", "kernels, ops and training steps, measured beside the machine's peak", "PATH model full batch-size seq-len max-steps" COMMON,
      "  mft bench                                   everything; GPT-2 124M, Gemma-3-270M and Qwen2.5-0.5B with random weights\n"
      "  mft bench kernels --kernels avx2            one part of it: kernels, ops, steps, decode, threads or scaling\n"
      "  mft bench --model DIR --batch-size 4        training steps of a model of yours\n"
      "  mft bench decode --model DIR                tokens of it, held as they are, as q8_0 and as q4_0\n"
      "  mft bench scaling --model DIR               a token's time in sequences of 128, 512 and 2048, and where one of ten is learnt\n", run_bench }
};
enum { N_COMMANDS = (int)(sizeof commands / sizeof *commands) };

static void print_commands(FILE *f)
{
    int i;
    fprintf(f, "mft %d.%d.%d - fine-tune small language models where the data is\n\n", MFT_VERSION_MAJOR, MFT_VERSION_MINOR, MFT_VERSION_PATCH);
    for (i = 0; i < N_COMMANDS; i++) fprintf(f, "  mft %-12s %s\n", commands[i].name, commands[i].summary);
    fprintf(f, "\nmft COMMAND --help tells a command's flags, with examples.\n");
}

static void set_defaults(options *o, const command *c)
{
    memset(o, 0, sizeof *o);
    o->command = c;
    o->batch_size = o->grad_accum_steps = 1;
    o->seq_len = 256; o->lr = -1; o->max_grad_norm = 1; o->max_nonfinite_steps = 3;
}

int main(int argc, char **argv)
{
    options o;
    int     i, least = 4, nearest = -1, status;
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN);               /* a file that may grow no more is a failure to write, with a sentence */
#endif
    if (argc < 2) { print_commands(stderr); return 2; }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) { print_commands(stdout); return 0; }
    if (!strcmp(argv[1], "--version")) { printf("mft %d.%d.%d\n", MFT_VERSION_MAJOR, MFT_VERSION_MINOR, MFT_VERSION_PATCH); return 0; }
    for (i = 0; i < N_COMMANDS; i++) {
        int d = edits(argv[1], commands[i].name);
        if (d == 0) break;
        if (d < least) { least = d; nearest = i; }
    }
    if (i == N_COMMANDS) {
        fprintf(stderr, "mft: unknown command \"%s\"%s%s%s\n", argv[1], nearest >= 0 ? ", did you mean " : "", nearest >= 0 ? commands[nearest].name : "", nearest >= 0 ? "?" : "");
        print_commands(stderr);
        return 2;
    }
    set_defaults(&o, &commands[i]);
    if (!parse_flags(&commands[i], argc - 2, argv + 2, &o)) return usage_error(&commands[i]);
    if (o.config && !o.help && commands[i].run == run_finetune) {
        options filed;                      /* the file's flags, and then those given once more, which win */
        set_defaults(&filed, &commands[i]);
        if (!read_config(&commands[i], o.config, &filed)) return usage_error(&commands[i]);
        if (o.epochs) filed.max_steps = 0;
        if (o.max_steps) filed.epochs = 0;
        if (o.eval_data) filed.eval_split = 0;
        if (o.eval_split > 0) filed.eval_data = NULL;
        if (o.sample_prompts.n) filed.sample_prompts.n = 0;
        if (!parse_flags(&commands[i], argc - 2, argv + 2, &filed)) return usage_error(&commands[i]);
        o = filed;
    }
    if (o.help) { print_help(&commands[i]); return 0; }
    status = commands[i].run(&o);
    if (fflush(stdout) != 0 && status == 0) { fprintf(stderr, "mft: standard output could not be written\n"); return 1; }
    return status;
}

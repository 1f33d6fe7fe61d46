/* mft_models.h - v0.1.0 - tokenizers, chat templates, GPT-2, Llama, Qwen and Gemma models,
 *                         datasets, training, evaluation, generation
 * One file of C99, also valid C++. Needs mft.h and mft_safetensors.h beside it.
 *
 * TO USE IT   in exactly one source file, before including: #define MFT_IMPLEMENTATION
 *
 * SMALLEST PROGRAM   an adapter from a snapshot and a text file   (built by tests/test_openings.c)
 *     mft_tokenizer_load (ctx, "gpt2", &tok);
 *     mft_model_load     (ctx, "gpt2", NULL, &model);
 *     mft_lora_attach    (model, NULL);
 *     mft_dataset_create (ctx, tok, NULL, &data);
 *     mft_dataset_load   (data, "mail.txt");
 *     mft_trainer_create (model, data, NULL, &trainer);
 *     mft_trainer_run    (trainer, 200);
 *     mft_lora_save      (model, "adapter");
 *
 * WORDS     snapshot: a directory as Hugging Face's hub has it: config.json, *.safetensors, tokenizer.json
 *           window: the micro-batches of one optimizer step
 *           labels: input_ids again, -100 where no loss is wanted; the shift by one is in the loss
 * ROOMS     search for a tag; it stands over the declarations and over the code:
 *           [UNICODE] [TOKENIZER] [CHAT] [DATASET] [CONFIG-JSON] [FAMILIES] [WEIGHTS] [MODEL]
 *           [REGEX] [ADAPTER] [TRAINER] [CHECKPOINT] [EVALUATE] [GENERATE] [EXAM]
 * LICENSE   MIT, full text at the end of mft.h */
#ifndef MFT_MODELS_H
#define MFT_MODELS_H

#ifndef MFT_H
#  include "mft.h"
#endif
#ifndef MFT_SAFETENSORS_H
#  include "mft_safetensors.h"
#endif

/* ==============================================================================
 * MARK: - [TOKENIZER] Text to token ids and back
 *
 *   in    UTF-8 text; a snapshot's tokenizer.json, or vocab.json and merges.txt, or tokenizer.model
 *   out   the ids Hugging Face's tokenizers gives for the same text, and the text it gives for ids
 *   kinds byte-level BPE (GPT-2, Qwen, Llama 3) and SentencePiece-style BPE (Gemma, Llama, Mistral)
 *   rule  what a tokenizer file asks for and this room does not do is an error that names it, when
 *         the file is loaded; nothing is ever tokenized a little differently
 * ============================================================================== */
typedef struct mft_tokenizer mft_tokenizer;         /* held */

/* Flags; 0 is what the reference does by default. */
enum {
    MFT_NO_ADD_SPECIAL   = 1,       /* encode: leave out the <bos>, <s> .. that the tokenizer puts around a text   */
    MFT_NO_PARSE_SPECIAL = 2,       /* encode: "<|im_end|>" and the like, written in the text, are just characters:
                                       for text from people one does not trust. Added tokens that are not marked
                                       special (Qwen's <think>, Gemma's runs of newlines) are still found        */
    MFT_SKIP_SPECIAL     = 4        /* decode: leave out special tokens                                            */
};

/* snapshot_dir  has tokenizer.json; else vocab.json and merges.txt; else tokenizer.model. Beside them,
 *               tokenizer_config.json (may be missing) says which tokens are bos, eos and pad and, for the
 *               latter two forms, what is added to a text and which tokens are cut out of it.
 *               May also be the path of a tokenizer.json or tokenizer.model itself
 * fails         IO (no such file), FORMAT (file, place and what is wrong with it), UNSUPPORTED (a kind of
 *               model, normalizer, pre-tokenizer pattern, post-processor or decoder, by name; ids of 2^21
 *               and more, more than 2^22 merges), OUT_OF_MEMORY
 * memory        about 14 MB for Gemma's 262,145 tokens and 514,906 merges, see mft_tokenizer_bytes
 * checked       tests/test_tokenizer.c: every case of the reference's output; tests/oracle: random strings
 * source        Sennrich et al. 2016, "Neural machine translation of rare words with subword units" */
MFT_API mft_status mft_tokenizer_load   (mft_context *ctx, const char *snapshot_dir, mft_tokenizer **out);
MFT_API void       mft_tokenizer_destroy(mft_tokenizer *tok);                       /* NULL does nothing */

/* text      [bytes], UTF-8; bytes < 0: NUL-terminated. What is not UTF-8 is read as U+FFFD, one for each
 *           maximal invalid part, as Python's errors="replace" does. NULL with 0 bytes is the empty text
 * ids       the first `cap` of them; NULL with cap 0 counts
 * returns   how many ids the text has, even if that is more than cap; negative: an mft_status
 *           (INVALID_ARGUMENT: more than 2^29 bytes; OUT_OF_MEMORY)
 * Up to a few MB of scratch and the words seen last are kept for the next call. O(n log n) in the worst case. */
MFT_API int64_t    mft_tokenizer_encode (const mft_tokenizer *tok, const char *text, int64_t bytes, int flags, int32_t *ids, int64_t cap);

/* ids       [n]
 * text      the first `cap` bytes of it (which may cut a character); NULL with cap 0 counts. No NUL is added
 * returns   the text's length in bytes, even if that is more than cap; always valid UTF-8, with U+FFFD where
 *           tokens end in the middle of a character. Negative: an mft_status (INVALID_ARGUMENT: an id that no
 *           token has, by its place) */
MFT_API int64_t    mft_tokenizer_decode (const mft_tokenizer *tok, const int32_t *ids, int64_t n, int flags, char *text, int64_t cap);

/* Decoding token by token, as they are generated. The pieces joined, with the finish's, are exactly what
 * mft_tokenizer_decode makes of all ids at once; a character is never cut. */
typedef struct mft_decoder mft_decoder;             /* held; destroy it before its tokenizer */
MFT_API mft_status  mft_decoder_create (const mft_tokenizer *tok, int flags, mft_decoder **out);
/* The text that is certain now, possibly none: NUL-terminated, borrowed until the next call. out_bytes may be
 * NULL. An id that no token has adds nothing: models may have more rows than their tokenizer has tokens, and
 * generate one. returns NULL on failure (INVALID_ARGUMENT: a negative id; OUT_OF_MEMORY). */
MFT_API const char *mft_decoder_push   (mft_decoder *d, int32_t id, int64_t *out_bytes);
/* What is still held back, incomplete characters as U+FFFD; then the decoder stands at the start again. */
MFT_API const char *mft_decoder_finish (mft_decoder *d, int64_t *out_bytes);
MFT_API void        mft_decoder_destroy(mft_decoder *d);                            /* NULL does nothing */

/* One more than the greatest id. A model may have more rows than that (Qwen) or fewer (Gemma 3's text models). */
MFT_API int32_t     mft_tokenizer_vocab_size (const mft_tokenizer *tok);
/* The id of a token by its text as tokenizer.json has it ("Ġthe", "▁the", "<0x0A>", "<|im_end|>"), which is what
 * convert_tokens_to_ids takes; bytes < 0: NUL-terminated. returns -1 if there is none. */
MFT_API int32_t     mft_tokenizer_token_to_id(const mft_tokenizer *tok, const char *token, int64_t bytes);
/* The reverse: the full length, of which the first `cap` bytes are written; -1 if no token has that id. */
MFT_API int64_t     mft_tokenizer_id_to_token(const mft_tokenizer *tok, int32_t id, char *token, int64_t cap);
MFT_API int         mft_tokenizer_is_special (const mft_tokenizer *tok, int32_t id);        /* marked special: skipped by MFT_SKIP_SPECIAL */
/* As tokenizer_config.json names them, else as the tokenizer's class has them; -1: none. */
MFT_API int32_t     mft_tokenizer_bos_id     (const mft_tokenizer *tok);
MFT_API int32_t     mft_tokenizer_eos_id     (const mft_tokenizer *tok);
MFT_API int32_t     mft_tokenizer_pad_id     (const mft_tokenizer *tok);
/* In words, for people: "byte-level BPE, 151643 pieces, 151387 merges, 26 added tokens"; borrowed from tok. */
MFT_API const char *mft_tokenizer_kind       (const mft_tokenizer *tok);
MFT_API size_t      mft_tokenizer_bytes      (const mft_tokenizer *tok);    /* of memory it holds now, scratch and cache included */

/* ==============================================================================
 * MARK: - [CHAT] From a conversation to the text a model was trained on
 *
 *   in    messages; a template in Jinja, as tokenizer_config.json or chat_template.jinja has it
 *   out   text, equal to Transformers' apply_chat_template; which bytes of it the assistant said
 *   rule  a template is a program from outside: it is bounded in steps, memory, depth and output,
 *         it reaches nothing but the conversation, and what goes wrong is told with its line
 *
 *   Known: for (else, if, break, continue, all of loop but `recursive` and `changed`), if, set, macro,
 *   call, filter, with, raw, generation; every operator and literal of Jinja but *args and **kwargs;
 *   its tests; the filters abs batch capitalize count d default dictsort e escape first float
 *   forceescape indent int items join last length list lower map max min reject rejectattr replace
 *   reverse round safe select selectattr sort string sum title tojson trim unique upper wordcount;
 *   the string, list and dict methods that templates may call (no format); range, dict, namespace,
 *   raise_exception, strftime_now. Something else is UNSUPPORTED or FORMAT, naming line and construct.
 *   Differs: integers have 64 bits (overflow is an error), upper and lower know the letters of Latin,
 *   Greek and Cyrillic.
 *   checked  tests/test_chat.c: texts and masks from Transformers; tests/fuzz/fuzz_jinja.c
 *   source   https://jinja.palletsprojects.com/templates, transformers' chat_template_utils
 * ============================================================================== */
struct mft_json;
struct mft_tokenizer;
typedef struct mft_chat_template mft_chat_template;     /* held; reading only after creation */

typedef struct mft_message { const char *role, *content; } mft_message;    /* role: system, user, assistant, ... */

enum { MFT_GENERATION_PROMPT = 8 };         /* flag: end with what opens the assistant's next turn */

/* What is to be rendered. Every field may stay zero; all pointers borrowed during the call. */
typedef struct mft_chat {
    const mft_message     *messages; int n_messages;
    const struct mft_json *messages_json;   /* instead: an array of objects, with any fields the template reads
                                               (tool_calls, reasoning_content, content as a list of parts)   */
    const struct mft_json *tools;           /* array of JSON schemas                    [None]               */
    const struct mft_json *documents;       /* array of {title, text}                   [None]               */
    const struct mft_json *variables;       /* object: further variables, as enable_thinking; they win       */
    int64_t                now;             /* seconds since 1970 for strftime_now, shown without a time zone
                                                                                        [0 = is an error]    */
    int                    flags;           /* MFT_GENERATION_PROMPT                                         */
} mft_chat;

typedef struct mft_chat_span { int64_t begin, end; } mft_chat_span;        /* bytes [begin, end) of the text */

/* source: Jinja text, bytes < 0 means NUL-terminated; copied. It has no special tokens yet.
 * fails  FORMAT, UNSUPPORTED ("line 12: filter 'foo' is not known"), OUT_OF_MEMORY */
MFT_API mft_status mft_chat_template_create (mft_context *ctx, const char *source, int64_t bytes, mft_chat_template **out);
/* path: a snapshot directory, of which chat_template.jinja is taken, else the `chat_template` of
 * tokenizer_config.json (of several the one named "default"), with its special tokens; or a file of
 * Jinja text, with the special tokens of the tokenizer_config.json beside it if there is one.
 * *out is NULL with UNSUPPORTED when the snapshot has none. fails  IO, FORMAT, UNSUPPORTED, OUT_OF_MEMORY */
MFT_API mft_status mft_chat_template_load   (mft_context *ctx, const char *path, mft_chat_template **out);
/* Our own template in a family's style: "chatml" (Qwen), "gemma", "llama3", "llama2", "zephyr"; NULL for
 * another name. Constant text for mft_chat_template_create. */
MFT_API const char *mft_chat_template_builtin(const char *name);
/* Gives a variable of the template (bos_token, eos_token, ...) its text; copied. value NULL: undefined again. */
MFT_API mft_status mft_chat_template_set    (mft_chat_template *t, const char *name, const char *value);
/* The template's Jinja text, line ends made \n; borrowed from t. */
MFT_API const char *mft_chat_template_source(const mft_chat_template *t);
MFT_API void       mft_chat_template_destroy(mft_chat_template *t);

/* Renders. returns the full count of bytes even when it exceeds cap (NULL, 0 measures), a NUL not counted but
 * written if there is room; negative: an mft_status. UNSUPPORTED: also what the template itself raises.
 * Special tokens are in the text: encode it without adding any. */
MFT_API int64_t    mft_chat_template_render (const mft_chat_template *t, const mft_chat *chat, char *text, int64_t cap);
/* The assistant's parts of that text, in order: content (with its tool calls and reasoning) and end-of-turn token of
 * each turn; a token counts as the assistant's when its characters overlap a span. By the template's own
 * {% generation %} marks if it has any, else by comparing renderings with and without the turn.
 * returns the full count of spans even beyond cap; UNSUPPORTED when a turn cannot be told apart. */
MFT_API int64_t    mft_chat_template_spans  (const mft_chat_template *t, const mft_chat *chat, mft_chat_span *spans, int64_t cap);

/* The same with the tokenizer's own template, see mft_chat_template_render. */
MFT_API int64_t    mft_apply_chat_template  (const struct mft_tokenizer *tok, const mft_message *messages, int n, int flags,
                                             char *text, int64_t cap);
/* The template of the tokenizer's snapshot, borrowed from it; NULL if it has none. One that is not understood is
 * returned too: rendering it says why. */
MFT_API const mft_chat_template *mft_tokenizer_chat_template(const struct mft_tokenizer *tok);

/* ==============================================================================
 * MARK: - [DATASET] From files to batches
 *
 *   sample    one text, one prompt with its completion, one conversation, one row of ids:
 *             at most max_seq_len tokens. A longer text goes on in the next samples, in pieces
 *             of max_seq_len (as Transformers' run_clm groups texts, but without dropping the
 *             tail); a longer prompt with completion, conversation or row of ids is cut at the
 *             end, which the report counts.
 *   row       one line of a batch: as many whole samples as fit, taken in order (in the seed's
 *             order, once for the whole run); with no_pack exactly one. Each sample keeps to
 *             itself: own positions, own attention, no loss across.
 *   epoch     every row once, in an order of its own, drawn from (seed, epoch) without memory.
 *   index     24 bytes a sample and 8 a row; lines of JSONL and CSV are read, parsed and encoded
 *             again each time a row needs them, token files are read in place, so neither is in
 *             it. Plain text, added samples and JSONL texts longer than a sample are in it as
 *             ids, 4 bytes a token.
 *   memory    the index; with index_dir, that of a large file is on disk, and what is in memory
 *             does not depend on the file's size: about 2 MB (checked: tests/test_dataset.c,
 *             VmHWM of a file and of one ten times as large).
 * ============================================================================== */
/* The caller's own batch, in Transformers' meaning. All arrays [batch, seq], row-major, borrowed
 * until the backward pass is over; those that may be NULL say so. */
typedef struct mft_batch {
    const int32_t *input_ids;
    const int32_t *labels;                  /* not shifted; -100 ignored.        NULL: input_ids where the mask is 1  */
    const int32_t *attention_mask;          /* 1 a token, 0 padding, on the left or on the right.   NULL: no padding  */
    const int32_t *position_ids;            /* NULL: 0..seq-1, starting over with each document                       */
    const int32_t *document_ids;            /* packed rows: equal numbers are one document; attention and the loss do
                                               not cross from one to the next.   NULL: a row is one document          */
    int            batch, seq;
} mft_batch;

struct mft_tokenizer; struct mft_message;
typedef struct mft_dataset mft_dataset;     /* held */

typedef enum mft_data_format {
    MFT_DATA_AUTO,      /* by the file: a directory, .jsonl, .csv, .bin; else JSONL if it begins like it, else text */
    MFT_DATA_TEXT,      /* UTF-8; the whole file is one text                                                           */
    MFT_DATA_JSONL,     /* one JSON object a line, or one array of them; what they are, their keys say: see mft_dataset_load */
    MFT_DATA_MMLU,      /* CSV of question, A, B, C, D, answer letter; a file, or a directory of dev/ val/ test/       */
    MFT_DATA_TOKENS     /* raw little-endian int32 token ids                                                           */
} mft_data_format;

/* Every field may stay zero, which means the default in brackets. Strings are copied. */
typedef struct mft_dataset_desc {
    int         max_seq_len;                /* tokens in a row                                       [256]      */
    mft_data_format format;                 /* of the files to load                                  [auto]     */
    int         no_pack;                    /* one sample a row, padded on the right                 [false]    */
    int         no_shuffle;                 /* the order of loading and adding, in every epoch       [false]    */
    uint64_t    seed;                       /* of packing, order and split                           [0]        */
    int         drop_last;                  /* leave out the rows at an epoch's end that fill no whole batch [false] */
    int         train_on_prompt;            /* loss on prompts and on all turns as well              [false]    */
    int         assistant_loss_only;        /* insist: data without assistant turns is an error      [false]    */
    int         add_eos;                    /* texts end with the tokenizer's end-of-sequence token  [false]    */
    int         no_eos;                     /* completions do not                                    [false]    */
    int         skip_bad_lines;             /* count them and go on, instead of failing              [false]    */
    const char *chat_template;              /* Jinja text                             [the tokenizer's]         */
    int64_t     now;                        /* seconds since 1970, for templates that write the date: a resumed run
                                               gives the first one's                  [when the dataset is made] */
    const char *split;                      /* of a directory: "train", "valid", "test"              ["train"]  */
    const char *text_key;                   /*                                                       ["text"]   */
    const char *prompt_key;                 /*                                                       ["prompt"] */
    const char *completion_key;             /*                                                   ["completion"] */
    const char *messages_key;               /*                                                     ["messages"] */
    int64_t     vocab_size;                 /* the model's: ids outside 0..vocab_size-1 are an error naming the line
                                               [0 = only negative ids are; see max_id in the report]            */
    const char *index_dir;                  /* where the index of large files is kept, see mft_dataset_load; made when
                                               it is needed                            [NULL = all in memory]   */
    uint64_t    index_above;                /* bytes from which on a file is large; 1: every one        [16 MB] */
    void      (*on_load)(void *user, uint64_t bytes, uint64_t of);  /* now and then while a file is loaded; may call
                                                                       mft_cancel                               */
    void       *user;
} mft_dataset_desc;

/* What was loaded. */
typedef struct mft_dataset_info {
    const char *format;                     /* "text", "jsonl (messages)", ..; "mixed"; borrowed: constant text */
    int64_t  n_samples, n_rows;
    int64_t  n_tokens;                      /* padding not counted                                              */
    int64_t  n_supervised;                  /* labels that count in the loss: never a row's or document's first */
    int64_t  longest;                       /* tokens, before cutting                                           */
    int64_t  n_truncated;                   /* samples that lost their end                                      */
    int64_t  n_unsupervised;                /* samples without any label that counts: their prompt alone fills
                                               max_seq_len, or there is but one token                           */
    int64_t  n_bad_lines;                   /* skipped, with skip_bad_lines                                     */
    int32_t  max_id;                        /* greatest token id; -1 when there is none                         */
    uint64_t fingerprint;                   /* of all ids, labels and settings that change a batch: equal means
                                               that a position of one run is good in another                    */
    uint64_t index_bytes;                   /* on disk, in index_dir; 0: in memory                              */
    int      index_reused;                  /* the last large file was not read: its index was there            */
} mft_dataset_info;

/* Where a run stands in its data; plain numbers, to be saved with a checkpoint. */
typedef struct mft_dataset_position { int64_t epoch, row; } mft_dataset_position;

/* tok may be NULL when only token ids are loaded or added; it must outlive the dataset. desc NULL: defaults. */
MFT_API mft_status mft_dataset_create  (mft_context *ctx, const struct mft_tokenizer *tok, const mft_dataset_desc *desc,
                                        mft_dataset **out);
MFT_API void       mft_dataset_destroy (mft_dataset *ds);

/* Adds a file, or a directory with train.jsonl, valid.jsonl, test.jsonl or MMLU's dev/, val/, test/, of which
 * desc.split is taken. May be called again; all of it is there or, on failure, none.
 *
 * A JSONL line is, by its keys and in this order,
 *   input_ids [, labels]        token ids; labels of the same length, not shifted, -100 ignored
 *   messages                    [{role, content}, ..]: through the chat template; loss on the assistant's turns,
 *                               each with its end-of-turn token
 *   prompt, completion          loss on the completion and its end-of-sequence token; both may be lists of messages,
 *                               as TRL has them: loss on the completion's assistant turns
 *   instruction [, input], output    likewise, in Stanford Alpaca's prompt; `instances` [{input, output}, ..] too
 *   text
 * and all lines of a file are alike. messages without a chat template give way to what else is there.
 * MMLU rows become "The following are multiple choice questions (with answers) about SUBJECT.\n\nQUESTION\nA. ..
 * \nAnswer:" and " B". A file may begin with a byte order mark, lines may end in CRLF, blank lines are passed over.
 * The file must not change while the dataset is used: a line that has is an error then.
 * With desc.index_dir, a file of desc.index_above bytes and more is read once, from end to end, and its index written to
 * NAME-HASH.samples, .ids and .rows there (of a split, also .kept.* and .held.*). The next dataset with equal settings
 * finds them and reads nothing, unless the file's length, its time of change or the hash of 64 pieces of it differ:
 * then they are made anew. They are never removed here; whoever does so loses but the time of one reading.
 * fails  IO; FORMAT naming file, line and column: not UTF-8, not JSON, a key that is missing or empty, another
 *        kind of line than the first, ids outside the vocabulary; INVALID_ARGUMENT: nothing that makes a sample,
 *        text without a tokenizer; UNSUPPORTED: a message that is not text, no chat template */
MFT_API mft_status mft_dataset_load    (mft_dataset *ds, const char *path);
/* Adds one sample (a long text: several); copied. bytes < 0: NUL-terminated. labels NULL: the ids. */
MFT_API mft_status mft_dataset_add_text  (mft_dataset *ds, const char *text, int64_t bytes);
MFT_API mft_status mft_dataset_add_chat  (mft_dataset *ds, const struct mft_message *messages, int n);
MFT_API mft_status mft_dataset_add_tokens(mft_dataset *ds, const int32_t *ids, const int32_t *labels, int64_t n);

/* Moves a share of the lines, texts or blocks, drawn by the seed and at least one, to a new dataset with the same
 * settings; it keeps their order. Before the first mft_dataset_next. 0 < ratio < 1.
 * fails  INVALID_ARGUMENT: too little to have anything left on either side */
MFT_API mft_status mft_dataset_split   (mft_dataset *ds, double ratio, mft_dataset **out_held_out);

/* The next `batch` rows, as long as the longest of them. The first batch of a new epoch follows the last of the
 * old; batches do not mix epochs, so the last has what is left (or is left out, with drop_last).
 * out: borrowed until the next call. labels are always there, -100 also on each document's first token; the other
 * arrays are NULL where mft_batch's default says the same. Padding has the id of the tokenizer's pad token (else
 * its end of sequence, else 0), label -100, and a document of its own.
 * fails  INVALID_ARGUMENT: no rows, no supervised token in the whole dataset, fewer rows than a batch with
 *        drop_last; IO, FORMAT: a file changed; OUT_OF_MEMORY. The position is then as before. */
MFT_API mft_status mft_dataset_next    (mft_dataset *ds, int batch, mft_batch *out);
/* How many batches an epoch has; 0 for an empty dataset, negative: an mft_status. Rows are packed once, so every
 * epoch has as many. */
MFT_API int64_t    mft_dataset_epoch_batches(mft_dataset *ds, int batch);
/* Where the next batch begins; right after a batch, `epoch` is that batch's (0 is the first). */
MFT_API void       mft_dataset_get_position (const mft_dataset *ds, mft_dataset_position *out);
/* The next batch is the one that followed when `position` was got. fails: INVALID_ARGUMENT, a row that is not there */
MFT_API mft_status mft_dataset_set_position (mft_dataset *ds, const mft_dataset_position *position);

MFT_API mft_status mft_dataset_report  (mft_dataset *ds, mft_dataset_info *out);
/* Sample `index` (in the order of loading) as text, what is trained on between `open` and `close`: "[[", "]]" say.
 * returns the full length in bytes even beyond cap (text is then cut), a NUL not counted but written if there is
 * room; negative: an mft_status (no tokenizer, no such sample) */
MFT_API int64_t    mft_dataset_sample_text  (mft_dataset *ds, int64_t index, const char *open, const char *close,
                                             char *text, int64_t cap);

/* ==============================================================================
 * MARK: - [CONFIG-JSON] What a config.json says
 * ============================================================================== */
typedef enum mft_family { MFT_GPT2, MFT_LLAMA, MFT_MISTRAL, MFT_QWEN2, MFT_QWEN3, MFT_GEMMA3, MFT_N_FAMILIES } mft_family;

typedef enum mft_rope_kind { MFT_ROPE_PLAIN, MFT_ROPE_LINEAR, MFT_ROPE_LLAMA3 } mft_rope_kind;
typedef struct mft_rope_config {
    mft_rope_kind kind;
    double theta;                           /* base of the frequencies                              */
    double factor;                          /* linear, llama3                                       */
    double low_freq_factor, high_freq_factor; int original_max_position;    /* llama3               */
} mft_rope_config;

/* Names follow config.json of the Llama line; GPT-2's n_embd, n_layer ... are brought under them. */
typedef struct mft_model_config {
    mft_family family;
    char    model_type[32];                 /* as config.json has it                                */
    int64_t vocab_size, hidden_size, intermediate_size, max_position;
    int     n_layer, n_head, n_kv_head, head_dim;
    double  norm_eps;
    double  attention_scale;                /* of the scores: 1/sqrt(head_dim) or query_pre_attn_scalar^-0.5 */
    double  attention_softcap, logit_softcap;   /* 0: none                                          */
    int     sliding_window;                 /* keys a query of a sliding layer sees; 0: no layer slides */
    unsigned char *layer_slides;            /* [n_layer] flags; owned by the model, NULL in mft_model_inspect's */
    mft_rope_config rope, rope_local;       /* rope_local: of Gemma's sliding layers                */
    int     tied_embeddings, qkv_bias, o_bias, mlp_bias;
    int     activation;                     /* 0 silu, 1 gelu_tanh, 2 gelu, 3 relu                  */
    int32_t bos_token_id, eos_token_id[8], pad_token_id;    /* -1: none; eos ends with -1 or at 8   */
    int64_t n_params;                       /* a tied head counts once                              */
} mft_model_config;

/* Reads DIR/config.json only. fails: IO, FORMAT, UNSUPPORTED (an architecture that is not here, by name) */
MFT_API mft_status  mft_model_inspect(mft_context *ctx, const char *snapshot_dir, mft_model_config *out);
MFT_API const char *mft_family_name  (mft_family family);                   /* "gpt2", "llama", ... */
/* The PEFT module names LoRA goes to by default, comma-separated: "c_attn,c_proj" for GPT-2, else
 * "q_proj,k_proj,v_proj,o_proj". */
MFT_API const char *mft_family_lora_targets(mft_family family);

/* ==============================================================================
 * MARK: - [MODEL] Load, forward, loss, save
 * ============================================================================== */
typedef struct mft_model mft_model;         /* held */

typedef struct mft_model_desc {
    const char *weights;                    /* storage of frozen weights: "f32", "f16", "bf16"; "q8_0", "q4_0": of the matrices in
                                               blocks, while embeddings and head, and rows that are no multiple of 32, stay as they
                                               are; converted piece by piece         [NULL = as the file has them, in place] */
    int         train_all;                  /* full fine-tuning: every weight is held, and trainable            [false] */
    const char *master_dtype;               /* with train_all, how they are held: "f32", or "bf16" for the matrices, at half the memory
                                               (in a state file too) and rounded by chance, see mft_optimizer_create  ["f32"] */
    const char *state_dir;                  /* full fine-tuning under a memory budget below five times the weights in f32: a directory
                                               with room for weights, gradients and moments, which then lie in a file there and are in
                                               memory only while in use. The file has no name and ends with the model and its trainer
                                                                                     [NULL = all are held in memory] */
    int         grad_checkpointing;         /* keep each block's input only, recompute the rest: 1 in all blocks, -1 in none
                                               [0 = a trainer picks the fewest blocks, see mft_plan; without one, none]  */
    int         checkpoint_bf16;            /* keep those inputs in bf16, half the memory. Losses stay the same to the bit; gradients are
                                               those of blocks whose inputs were rounded (by 2^-9 at most, relative)  [false] */
} mft_model_desc;

/* Maps the snapshot; frozen matrices stay in the file, in their own dtype, small vectors are held in f32.
 * fails  IO, FORMAT, UNSUPPORTED, OUT_OF_MEMORY; a tensor whose shape contradicts the config, one that no
 *        parameter takes, or a parameter that no tensor fills is named */
MFT_API mft_status  mft_model_load   (mft_context *ctx, const char *snapshot_dir, const mft_model_desc *desc, mft_model **out);
MFT_API void        mft_model_destroy(mft_model *model);
MFT_API const mft_model_config *mft_model_get_config(const mft_model *model);       /* borrowed from the model */
/* The parameters in the checkpoint's order, those of attached adapters last. returns the full count. */
MFT_API int         mft_model_params (mft_model *model, int trainable_only, mft_tensor **out, int cap);
/* Hidden states after the last norm, [B, T, H], and logits, [B, T, V]: step tensors.
 * Only input_ids, attention_mask, position_ids, document_ids of the batch are read. */
MFT_API mft_tensor *mft_model_hidden (mft_model *model, const mft_batch *batch);
MFT_API mft_tensor *mft_model_forward(mft_model *model, const mft_batch *batch);
/* Mean cross-entropy in nats over the labels that count (shifted by one inside); never makes logits.
 * n_valid 0 divides by the batch's own count, another value by that. A batch without any valid label
 * is INVALID_ARGUMENT. returns a scalar, step. */
MFT_API mft_tensor *mft_model_loss   (mft_model *model, const mft_batch *batch, int64_t n_valid);
/* How many labels of the batch count in the loss. */
MFT_API int64_t     mft_batch_n_valid(const mft_batch *batch);
/* The snapshot again: config.json, model.safetensors (each tensor in the dtype it was loaded from) and the
 * base's tokenizer files. Adapters must be merged or detached. The directory appears whole or not at all; in one that is
 * there already model.safetensors replaces what it had, an index and the shards it names included. */
MFT_API mft_status  mft_model_save   (mft_model *model, const char *dir);
/* A snapshot with random weights (normal, initializer_range; norms 1, biases 0) from a config.json.
 * dtype F32, BF16 or F16. */
MFT_API mft_status  mft_model_init   (mft_context *ctx, const char *config_path, uint64_t seed, mft_dtype dtype, const char *out_dir);

/* ==============================================================================
 * MARK: - [ADAPTER] LoRA in PEFT's format
 * ============================================================================== */
typedef struct mft_lora_desc {
    int         rank;                       /*                                              [8]        */
    float       alpha;                      /* scale is alpha / rank                        [2 * rank] */
    float       dropout;                    /* on the adapter's input                       [0]        */
    const char *targets;                    /* "q_proj,v_proj" | "all-linear" | a regular expression on the whole module
                                               path, as PEFT takes them                     [the family's] */
    int         use_rslora;                 /* scale is alpha / sqrt(rank)                  [false]    */
    int         use_dora;                   /* Liu et al. 2024, weight-decomposed           [false]    */
    uint64_t    seed;                       /* A ~ Kaiming uniform, B = 0                   [0]        */
    const char *name;                       /* of this adapter                              ["default"]*/
} mft_lora_desc;

/* Adds an adapter and makes it the active one; it alone is trainable. desc NULL: defaults.
 * fails  INVALID_ARGUMENT: a target that matches no module is named */
MFT_API mft_status mft_lora_attach  (mft_model *model, const mft_lora_desc *desc);
/* The same from DIR/adapter_config.json and adapter_model.safetensors, as PEFT or mft wrote them; name NULL: "default".
 * fails  FORMAT, UNSUPPORTED: what disagrees with this base is named; nothing is attached then */
MFT_API mft_status mft_lora_load    (mft_model *model, const char *dir, const char *name);
MFT_API mft_status mft_lora_save    (mft_model *model, const char *dir);        /* the active adapter; whole or not at all */
MFT_API mft_status mft_lora_activate(mft_model *model, const char *name);       /* NULL: none, the base alone */
MFT_API const char *mft_lora_active (const mft_model *model);                   /* NULL: none */
/* W += scale B A with the active adapter, in f32 and rounded once to W's dtype; drops all adapters. The merged
 * weights are held in memory. */
MFT_API mft_status mft_lora_merge   (mft_model *model);
MFT_API void       mft_lora_detach  (mft_model *model);                         /* drops all adapters */
/* Reports what is trained: calls back once per target module name. Full counts, not per layer. */
typedef void (*mft_lora_report_fn)(void *user, const char *target, int n_modules, int64_t n_trainable);
MFT_API void       mft_lora_report  (const mft_model *model, mft_lora_report_fn fn, void *user);

/* ==============================================================================
 * MARK: - [TRAINER] Steps
 * ============================================================================== */
typedef struct mft_trainer mft_trainer;     /* held */

typedef struct mft_progress {               /* of the step just done */
    int64_t step, epoch;                    /* optimizer steps done, since the run's start also when resumed; epoch of the last sample */
    double  loss;                           /* nats per valid label, mean over the window; NaN: skipped, see max_nonfinite */
    double  grad_norm;                      /* global 2-norm before clipping                         */
    double  learning_rate;
    int64_t n_tokens, n_valid;              /* tokens without padding; labels that counted           */
    double  seconds;                        /* wall time of this step                                */
    double  tokens_per_second;              /* over the run so far                                   */
    double  eta_seconds;                    /* to the run's end, evaluations and checkpoints included; negative: not known */
    size_t  resident_bytes;                 /* of the process, where the system says; else 0         */
    mft_memory_report memory;
} mft_progress;

typedef struct mft_eval { double loss, perplexity; int64_t n_tokens; } mft_eval;

typedef struct mft_trainer_desc {
    mft_optimizer_desc optimizer;
    double learning_rate;                   /* peak                                         [2e-4]   */
    double learning_rate_min;               /* where linear and cosine end                  [0]      */
    mft_schedule_kind schedule;             /*                                              [constant] */
    int64_t warmup_steps;                   /* linear from zero                             [0]      */
    double warmup_ratio;                    /* of total_steps, rounded up, if warmup_steps is 0 [0]  */
    int64_t total_steps;                    /* where the schedule ends; needed unless constant [0]   */
    int    micro_batch, grad_accum;         /* sequences; passes per step                   [1] [1]  */
    int    decay_all;                       /* full fine-tuning: weight decay also on biases and norms [false] */
    int    update_in_backward;              /* full fine-tuning: see below                  [false]  */
    int    pause_ms;                        /* rest after each step: heat, battery          [0]      */
    int    max_nonfinite;                   /* windows in a row whose loss or gradient is not finite that
                                               mft_trainer_run passes over, with a warning, before it fails [0] */
    mft_dataset *eval_data;                 /* held-out data; mft_trainer_run evaluates it  [none]   */
    int64_t eval_steps;                     /* each time so many steps are done [0 = at its end only] */
    int    early_stopping_patience;         /* mft_trainer_run ends behind so many evaluations in a row
                                               that were no better than the best            [0 = never] */
    int    load_best;                       /* at its end it loads the weights that evaluated best, which
                                               needs save_dir                               [false]  */
    const char *save_dir;                   /* mft_trainer_run saves SAVE_DIR/checkpoint-STEP, also whenever an
                                               evaluation is the best so far                [none]   */
    int64_t save_steps;                     /* each time so many steps are done             [0 = not by itself] */
    int    save_total_limit;                /* older checkpoints in save_dir are removed, but for the best [0 = none is] */
    void (*on_step)(void *user, const mft_progress *p);  /* trainer's thread; may call mft_cancel    */
    void (*on_eval)(void *user, int64_t step, const mft_eval *eval, int is_best);     /* after on_step */
    /* Between backward and optimizer: gradients are sums over the window's n_valid labels, in
     * mft_model_params(trainable) order; an app may reduce both over machines. nonzero stops: CANCELLED */
    int  (*on_gradients)(void *user, mft_tensor **params, int n_params, int64_t *n_valid);
    void  *user;
} mft_trainer_desc;

/* update_in_backward: in a window's last pass a parameter is updated the moment its gradient is complete, block by block
 * from the last to the first, and the next block's gradients take the memory: they are never all there. Embeddings come
 * last, with a tied head's part in them. Without clipping the weights are those of the usual way, bit for bit.
 *   clipping   by the norm of the window before, as this window's is known too late; a run's first window is not clipped.
 *              Checkpoints keep that norm. progress's grad_norm is the window's own.
 *   passes     where a window takes several (grad_accum, or a batch that the plan splits), all gradients stay until the
 *              last: right, but nothing is saved
 *   fails      NOT_FINITE names the first gradient that was not; what was complete before it has been updated, the rest
 *              has not. A cancellation waits for the step's end once an update was made. on_gradients cannot be had. */

/* What a run has come to. */
typedef struct mft_trainer_info {
    int64_t  step;                          /* optimizer steps done, those before a resumption included */
    int64_t  eval_step;                     /* of the latest evaluation by mft_trainer_run; 0: none was */
    mft_eval eval;                          /* the latest; behind load_best, the best one's             */
    int64_t  best_step;                     /* of the evaluation with the lowest loss; 0: none was      */
    double   best_loss;
    int64_t  n_skipped;                     /* windows passed over by max_nonfinite                     */
    int      stopped_early;                 /* by early_stopping_patience                               */
} mft_trainer_info;

/* Bytes a training step will need, by part, and what the trainer has chosen so that they are few. Without a memory
 * budget it recomputes only as many blocks as it takes to keep `step` below 80 MB. To fit a context's
 * memory_budget it does, in this order and no more than needed: split the micro-batch, drop the pages of mapped
 * weights behind each use (they come back from the page cache, the disk, or the mft_io), recompute blocks, and take
 * MLPs in smaller pieces. Losses and gradients stay the same but for the last bits of sums. */
typedef struct mft_plan {
    size_t weights_mapped;                  /* what is used in the file                                         */
    size_t weights_resident;                /* how much of that is in memory at a time                          */
    size_t weights_held, trainable, gradients, optimizer;       /* in memory all the time                           */
    size_t state_mapped;                    /* trained weights, gradients and moments in a state file, see mft_model_desc */
    size_t state_resident;                  /* how much of that is in memory at a time                          */
    size_t activations, workspaces;         /* of the step: saved by the forward pass; the rest of its peak      */
    size_t step;                            /* both                                                             */
    size_t tokenizer, data, process;        /* data: with all other structures; process: code, stacks, libc      */
    size_t total;                           /* without weights_mapped, state_mapped, and activations, workspaces, which are the step */
    int    micro_batch;                     /* sequences per pass                                               */
    int    drops_pages, blocks_recomputed, blocks, mlp_rows;        /* mlp_rows: of a recomputed block at a time */
    int    grad_checkpointing;              /* some block is recomputed                                         */
} mft_plan;

/* data may be NULL if only mft_trainer_step_batch is used. desc NULL: defaults. The trainer keeps both
 * alive no longer than they live: destroy it first. fails: nothing is trainable; a token id of the data that
 * is outside the model's vocabulary. */
MFT_API mft_status mft_trainer_create    (mft_model *model, mft_dataset *data, const mft_trainer_desc *desc, mft_trainer **out);
/* What steps of micro-batches [batch, seq] will take; batch, seq 0: the trainer's own. Runs nothing.
 * fails  OUT_OF_MEMORY: no choice fits the memory budget; the sentence says what would */
MFT_API mft_status mft_trainer_plan      (mft_trainer *tr, int batch, int seq, mft_plan *out);
/* One optimizer step on the dataset's next window. out may be NULL.
 * fails  NOT_FINITE (weights as before the step), CANCELLED (likewise), OUT_OF_MEMORY */
MFT_API mft_status mft_trainer_step      (mft_trainer *tr, mft_progress *out);
/* The same on the caller's window of n micro-batches. */
MFT_API mft_status mft_trainer_step_batch(mft_trainer *tr, const mft_batch *batches, int n, mft_progress *out);
/* Steps with on_step, evaluations and checkpoints as desc has them; fewer than n_steps with early stopping. A window
 * that is passed over counts as a step. CANCELLED comes between two steps: mft_trainer_save is right then. */
MFT_API mft_status mft_trainer_run       (mft_trainer *tr, int64_t n_steps);
MFT_API void       mft_trainer_report    (const mft_trainer *tr, mft_trainer_info *out);
/* Mean loss over held_out's batches (all of one epoch if max_batches is 0); nothing is trained. */
MFT_API mft_status mft_trainer_evaluate  (mft_trainer *tr, mft_dataset *held_out, int max_batches, mft_eval *out);
MFT_API void       mft_trainer_destroy   (mft_trainer *tr);
/* Resident bytes of this process, now and at most, as the system tells (Linux, Android); 0 elsewhere. */
MFT_API void       mft_process_memory    (size_t *out_now, size_t *out_peak);

/* Writes the process's resident bytes into a file, from a thread of its own, until the close: one line each interval_ms
 * (1 to 1000; 0: 5), the first at once:
 *   {"t_ms":12.345,"rss_bytes":104857600,"step":3,"phase":"backward"}
 * or, if path ends in .csv, the same under a header t_ms,rss_bytes,step,phase. step: the optimizer step begun last, 0
 * before the first. phase: load (all before the first step), forward, backward, optimizer, eval, save, other (between
 * those). A file that is there is replaced.
 * fails    IO, INVALID_ARGUMENT (interval), UNSUPPORTED (MFT_NO_THREADS, or not Linux or Android), OUT_OF_MEMORY
 * memory   the thread's stack and 64 KB; cost: some 10 us of a core a line (tests/test_memory_trace.c) */
typedef struct mft_memory_trace mft_memory_trace;   /* held */
MFT_API mft_status mft_memory_trace_open (mft_context *ctx, const char *path, int interval_ms, mft_memory_trace **out);
/* Ends the thread and the file. NULL does nothing. fails  IO: some line could not be written; the rest is missing */
MFT_API mft_status mft_memory_trace_close(mft_memory_trace *trace);

/* ==============================================================================
 * MARK: - [CHECKPOINT] Stop, and go on as if nothing had been
 *
 *   A checkpoint is a directory that appears whole or not at all:
 *     adapter_config.json, adapter_model.safetensors     the adapter as PEFT has it; in full fine-tuning a snapshot
 *                               with weights as they are held
 *     optimizer.safetensors     moments and their step
 *     trainer_state.json        steps done, position in the data, seeds, settings; hashes of base, tokenizer and data,
 *                               and of the files above
 *   Training 20 steps and training 10, saving, resuming, training 10 end in the same bits, for any number of threads on
 *   one row of kernels.
 * ============================================================================== */

/* Writes a checkpoint, between two steps. dir NULL: save_dir/checkpoint-STEP, after which older ones go as
 * save_total_limit says. A checkpoint that is there already is replaced at once; until then it stays.
 * fails  IO: what was there before is there still; INVALID_ARGUMENT: dir holds something else than a checkpoint */
MFT_API mft_status mft_trainer_save   (mft_trainer *tr, const char *dir);
/* Brings a new trainer to where the checkpoint's was. Model, adapter, data and settings are made as for the first run;
 * weights, moments, step, position and dropout's seed come from the checkpoint. dir: a checkpoint, or a directory with
 * checkpoint-STEP directories, of which the latest is taken. What changes the run but not what is trained (learning
 * rate, batch and how a memory budget splits it, number of steps, kernels, precision) may differ and is logged as a
 * warning; with other held-out data which evaluation was best starts anew.
 * fails  IO, FORMAT: a file is missing, cut or altered; INVALID_ARGUMENT naming what is another one: base, tokenizer,
 *        rank or another field of the adapter, target modules, optimizer, data. The trainer is then as it was, unless
 *        reading failed in the middle. */
MFT_API mft_status mft_trainer_resume (mft_trainer *tr, const char *dir);

/* ==============================================================================
 * MARK: - [EVALUATE] Perplexity
 * ============================================================================== */

/* Windows of seq_len tokens start every `stride` until one reaches the end; each scores the tokens that no
 * earlier window held, never its own first (Transformers' guide "Perplexity of fixed-length models").
 * stride 0: seq_len. ids [n]. The mean is over all scored tokens. fails: n < 2, an id out of range */
MFT_API mft_status mft_perplexity(mft_model *model, const int32_t *ids, int64_t n, int seq_len, int stride, mft_eval *out);
/* The same in parts, for mft_compare: on_part gets each forward pass's sum of losses and count of scored tokens. The
 * passes are the same for any adapter. */
MFT_API mft_status mft_perplexity_parts(mft_model *model, const int32_t *ids, int64_t n, int seq_len, int stride,
                                        void (*on_part)(void *user, double loss_sum, int64_t n_tokens), void *user, mft_eval *out);

/* ==============================================================================
 * MARK: - [GENERATE] One token after the other
 * ============================================================================== */
typedef struct mft_generate_desc {
    int      max_new_tokens;                /* [64]                                                 */
    float    temperature;                   /* 0 = greedy                                [0]        */
    int      top_k;                         /* 0 = all                                   [0]        */
    float    top_p;                         /* 0 = all                                   [0]        */
    float    repetition_penalty;            /* Keskar et al. 2019                        [1]        */
    uint64_t seed;
    const int32_t *stop_ids; int n_stop_ids;    /* generation ends with these   [the config's eos_token_id] */
    int      ignore_eos;                    /* go on past them                           [false]    */
    int    (*on_token)(void *user, int32_t id);     /* nonzero stops                                */
    void    *user;
} mft_generate_desc;

/* Continues the prompt; keys and values of what was read are kept for the call (f32, n_layer * 2 *
 * (n_prompt + max_new_tokens) * n_kv_head * head_dim). out_ids gets the new tokens, the stop token included.
 * GPT-2's table of positions ends a generation; other families go on past max_position, where they were not trained.
 * returns the number of new tokens; negative: an mft_status */
MFT_API int64_t mft_generate(mft_model *model, const int32_t *prompt, int64_t n_prompt,
                             const mft_generate_desc *desc, int32_t *out_ids, int64_t cap);

/* A generator keeps keys and values from one call to the next, for conversations and for many prompts that begin alike:
 * of a prompt only what lies behind its longest common beginning with the tokens read before, answers included, is read.
 * The tokens are those of mft_generate, but for the last bits of logits, since sums over other pieces of a prompt are
 * rounded elsewhere. What was kept is dropped by itself when an adapter is activated, attached, merged or detached, when
 * an optimizer steps and when a checkpoint is resumed; whoever writes into weights by hand calls mft_generator_reset.
 * memory     as mft_generate, and grows with the longest prompt so far until mft_generator_reset
 * lifetime   held; destroy it before its model. A failed or cancelled call leaves it as good as before */
typedef struct mft_generator mft_generator;
MFT_API mft_status mft_generator_create (mft_model *model, mft_generator **out);
/* As mft_generate. out_kept (may be NULL): how many of the prompt's tokens were not read again. */
MFT_API int64_t    mft_generator_run    (mft_generator *g, const int32_t *prompt, int64_t n_prompt, const mft_generate_desc *desc,
                                         int32_t *out_ids, int64_t cap, int64_t *out_kept);
MFT_API void       mft_generator_reset  (mft_generator *g);                         /* forgets, and gives the memory back */
MFT_API void       mft_generator_destroy(mft_generator *g);                         /* NULL does nothing */

/* ==============================================================================
 * MARK: - [EXAM] Questions with known answers
 *
 *   in    a file of prompts with answers, or MMLU's directory; a model
 *   out   per question: how likely the answer is, which choice is likeliest, what the model says by itself
 *   rule  prompts are rendered as [DATASET] renders them for training, to the byte
 * ============================================================================== */

/* ln P(continuation | prompt) of n continuations, in nats, summed over each one's tokens. The prompt is read once; keys
 * and values are kept for the call. prompt [n_prompt], n_prompt >= 1; continuations[i] [lengths[i]], lengths >= 1;
 * out [n]. fails  INVALID_ARGUMENT: an id outside the vocabulary, more tokens than the model has positions */
MFT_API mft_status mft_log_likelihood(mft_model *model, const int32_t *prompt, int64_t n_prompt, const int32_t *const *continuations,
                                      const int64_t *lengths, int n, double *out);

enum { MFT_MAX_CHOICES = 32 };              /* of one question */

typedef struct mft_exam mft_exam;           /* held */

typedef struct mft_exam_desc {              /* strings are copied */
    const mft_dataset_desc *data;           /* how lines are read: keys, chat_template, skip_bad_lines     [defaults]  */
    const char *choices;                    /* "yes,no,maybe": what each answer is one of  [the line's own "choices"]  */
    const char *split;                      /* MMLU: "dev", "val" or "test"                                [test]      */
    const char *subject;                    /* MMLU: only this one, as its file is called                  [all]       */
    int         n_shot;                     /* MMLU: worked examples of the subject before each question, from dev/ [0] */
} mft_exam_desc;

/* path  a directory with MMLU's dev/ val/ test/, one of its CSV files (n_shot 0), or a file of JSONL.
 *
 * MMLU is asked as Hendrycks et al. 2021 do: "The following are multiple choice questions (with answers) about
 * SUBJECT.\n\n", the examples, each with its answer and a blank line, the question up to "Answer:"; the choices are
 * " A" to " D".
 *
 * A JSONL line is one that [DATASET] learns a completion from: prompt and completion; instruction, input and output;
 * messages, of which the last assistant turn is asked for. The expected answer is its "answer", a string, else the
 * completion. A line with "choices", strings, or all if the desc has some, is a question to choose: its "answer" must be
 * one of them, or the index of one; each begins with the white space that the completion begins with.
 * fails  IO; FORMAT with file and line; INVALID_ARGUMENT: no such subject, fewer examples than n_shot */
MFT_API mft_status mft_exam_load   (mft_context *ctx, const struct mft_tokenizer *tok, const char *path, const mft_exam_desc *desc, mft_exam **out);
MFT_API void       mft_exam_destroy(mft_exam *exam);                    /* NULL does nothing */
MFT_API int64_t    mft_exam_size   (const mft_exam *exam);

typedef struct mft_question {               /* borrowed from the exam */
    const char *subject;                    /* MMLU: as its file is called; else ""                     */
    const char *prompt;                     /* without worked examples                                  */
    const char *reference;                  /* what training would have taught to follow it             */
    const char *expected;                   /* the answer in short, no white space around it            */
    int         n_choices, answer;          /* 0, -1: an open question                                  */
    const char *choices[MFT_MAX_CHOICES];   /* as they follow the prompt                                */
} mft_question;
MFT_API mft_status mft_exam_question(const mft_exam *exam, int64_t index, mft_question *out);

typedef struct mft_answer {
    double  log_likelihood;                 /* ln P(reference | prompt), nats                           */
    int64_t n_tokens;                       /* of the reference                                         */
    int     choice;                         /* the likeliest; -1: nothing to choose from                */
    double  choices[MFT_MAX_CHOICES];       /* ln P(choice | prompt)                                    */
    int     exact;                          /* greedy text, without white space around it, is the expected answer; -1: not asked */
    int     n_shot;                         /* worked examples that had room                            */
    int64_t n_cut;                          /* tokens of the prompt's beginning that had none           */
} mft_answer;

/* Asks the model, with the adapter that is active. max_new_tokens > 0: also greedy, up to the end-of-sequence token or,
 * if the expected answer is one line, that line's end. What is longer than the model's positions loses its last worked
 * examples, then the beginning of its prompt. Texts are encoded whole, prompt and answer in one; a token across their
 * border counts to the answer.
 * checked  tests/oracle/test_eval.py: the same recipe in Transformers, question by question */
MFT_API mft_status mft_exam_ask    (mft_exam *exam, int64_t index, mft_model *model, int max_new_tokens, mft_answer *out);

/* Two models on the same n items, such as base and adapter on the same questions. */
typedef struct mft_comparison {
    double  base, other, difference;        /* weighted means; other - base                             */
    double  low, high;                      /* 95 % confidence interval of the difference               */
    int64_t n;
} mft_comparison;
/* base, other [n]: a sum per item (a loss, or 1 for a right answer); weights [n]: what it is a sum over (tokens; NULL: 1).
 *   difference = sum(other - base) / sum(weights) = r;   interval  r +- 1.96 s,
 *   s^2 = n / (n - 1) * sum((other_i - base_i - r weights_i)^2) / sum(weights)^2
 * the normal approximation for paired items (of a ratio, by linearization); NaN bounds when n < 2. */
MFT_API void       mft_compare     (const double *base, const double *other, const double *weights, int64_t n, mft_comparison *out);

#endif /* MFT_MODELS_H */

/* ############################################################################## *
 *                               IMPLEMENTATION                                   *
 * ############################################################################## */
#if defined(MFT_IMPLEMENTATION) && !defined(MFT_MODELS_IMPLEMENTED)
#define MFT_MODELS_IMPLEMENTED

#include <sys/time.h>
#include <time.h>
#ifndef _WIN32
#  include <sys/select.h>
#endif

/* ==============================================================================
 * MARK: - [UNICODE] UTF-8, classes of characters, composed form
 *
 *   in    bytes
 *   out   code points; letter, number or space, as the pre-tokenizers' patterns ask; NFC text
 *   rule  equal to the reference on every code point: classes are those of Unicode 16,
 *         normalisation is that of Unicode 9 (later characters stay as they are)
 *
 *   The file holds run lengths; a tokenizer unpacks them once into tables for quick use.
 * ============================================================================== */

/* Classes. \p{L} is LETTER; \p{N} is NUMBER and NUMERAL; \s is SPACE; \w is LETTER, NUMBER, WORD. */
enum { MFT__OTHER_CHAR, MFT__LETTER, MFT__NUMBER, MFT__NUMERAL, MFT__SPACE, MFT__WORD, MFT__CLASS_MASK = 7,
       MFT__NFC_CARE = 8 };             /* a flag beside the class: this character may change in NFC, or its neighbour */

/* ---- tables, by tools/make_unicode.py ---- */
/* Classes of Unicode 16 from U+0000 on: 8 * length of a run + its class; after the last, 0. */
static const unsigned int mft__class_runs[] = {
    72, 44, 144, 12, 120, 82, 56, 209, 32, 13, 8, 209, 80, 12, 208, 12, 72, 9, 56, 19, 8, 9, 24, 11, 9, 8, 27, 8, 185,
    8, 249, 8, 3665, 32, 97, 112, 41, 56, 9, 8, 9, 136, 901, 41, 8, 17, 16, 33, 8, 9, 48, 9, 8, 25, 8, 9, 8, 161, 8,
    665, 8, 1113, 8, 61, 1329, 8, 305, 16, 9, 48, 329, 64, 365, 8, 13, 8, 21, 8, 21, 8, 13, 64, 217, 32, 33, 232, 93,
    40, 345, 173, 82, 32, 17, 13, 793, 8, 9, 61, 16, 53, 17, 21, 8, 37, 17, 82, 25, 16, 9, 128, 9, 13, 241, 221, 16,
    713, 93, 9, 112, 82, 265, 77, 17, 32, 9, 16, 13, 16, 177, 37, 9, 77, 9, 29, 9, 45, 144, 201, 29, 32, 89, 40, 193,
    8, 49, 64, 77, 337, 197, 8, 269, 433, 29, 9, 149, 9, 61, 81, 21, 16, 82, 8, 129, 29, 8, 65, 16, 17, 16, 177, 8,
    57, 8, 9, 24, 33, 16, 13, 9, 61, 16, 21, 16, 29, 9, 64, 13, 32, 17, 8, 25, 21, 16, 82, 17, 16, 51, 16, 9, 8, 13,
    16, 29, 8, 49, 32, 17, 16, 177, 8, 57, 8, 17, 8, 17, 8, 17, 16, 13, 8, 45, 32, 21, 16, 29, 24, 13, 56, 33, 8, 9,
    56, 82, 21, 25, 13, 88, 29, 8, 73, 8, 25, 8, 177, 8, 57, 8, 17, 8, 41, 16, 13, 9, 69, 8, 29, 8, 29, 16, 9, 120,
    17, 21, 16, 82, 72, 9, 53, 8, 29, 8, 65, 16, 17, 16, 177, 8, 57, 8, 17, 8, 41, 16, 13, 9, 61, 16, 21, 16, 29, 56,
    29, 32, 17, 8, 25, 21, 16, 82, 8, 9, 51, 80, 13, 9, 8, 49, 24, 25, 8, 33, 24, 17, 8, 9, 8, 17, 24, 17, 24, 25, 24,
    97, 32, 45, 24, 29, 8, 37, 16, 9, 48, 13, 112, 82, 27, 104, 45, 65, 8, 25, 8, 185, 8, 129, 16, 13, 9, 61, 8, 29,
    8, 37, 56, 21, 8, 25, 16, 9, 16, 17, 21, 16, 82, 64, 59, 8, 9, 29, 8, 65, 8, 25, 8, 185, 8, 81, 8, 41, 16, 13, 9,
    61, 8, 29, 8, 37, 56, 21, 48, 17, 8, 17, 21, 16, 82, 8, 17, 13, 96, 37, 73, 8, 25, 8, 329, 21, 9, 61, 8, 29, 8,
    37, 9, 40, 25, 13, 59, 25, 21, 16, 82, 75, 8, 49, 8, 29, 8, 145, 24, 193, 8, 73, 8, 9, 16, 57, 24, 13, 32, 53, 8,
    13, 8, 69, 48, 82, 16, 21, 104, 385, 13, 17, 61, 40, 57, 69, 8, 82, 312, 17, 8, 9, 8, 41, 8, 193, 8, 9, 8, 81, 13,
    17, 77, 9, 16, 41, 8, 9, 8, 61, 8, 82, 16, 33, 256, 9, 184, 21, 48, 82, 83, 8, 13, 8, 13, 8, 13, 32, 21, 65, 8,
    289, 32, 165, 8, 21, 41, 93, 8, 293, 72, 13, 456, 345, 165, 9, 82, 48, 49, 37, 33, 29, 9, 29, 17, 61, 25, 37, 105,
    101, 9, 13, 82, 37, 16, 305, 8, 9, 40, 9, 16, 345, 8, 2665, 8, 33, 16, 57, 8, 9, 8, 33, 16, 329, 8, 33, 16, 265,
    8, 33, 16, 57, 8, 9, 8, 33, 16, 121, 8, 457, 8, 33, 16, 537, 16, 29, 72, 163, 24, 129, 128, 689, 16, 49, 24, 4961,
    16, 137, 12, 209, 40, 601, 24, 26, 65, 56, 145, 37, 72, 153, 29, 88, 145, 21, 96, 105, 8, 25, 8, 21, 96, 417, 261,
    24, 9, 32, 9, 13, 16, 82, 48, 83, 136, 29, 8, 13, 82, 48, 713, 56, 41, 21, 273, 13, 9, 40, 561, 80, 249, 8, 101,
    32, 101, 80, 82, 241, 16, 41, 88, 353, 32, 209, 48, 82, 11, 296, 185, 45, 32, 425, 85, 8, 237, 16, 13, 82, 48, 82,
    104, 9, 64, 253, 392, 45, 377, 141, 65, 24, 82, 136, 77, 96, 29, 241, 109, 17, 82, 353, 117, 96, 289, 165, 64, 82,
    24, 25, 82, 289, 16, 89, 40, 345, 16, 25, 128, 29, 8, 173, 33, 13, 49, 13, 17, 29, 9, 40, 1537, 517, 2225, 16, 49,
    16, 305, 16, 49, 16, 65, 8, 9, 8, 9, 8, 9, 8, 249, 16, 425, 8, 57, 8, 9, 24, 25, 8, 57, 24, 33, 16, 49, 32, 105,
    40, 25, 8, 57, 24, 92, 8, 21, 208, 20, 40, 12, 120, 21, 152, 13, 80, 12, 128, 11, 9, 16, 51, 40, 9, 83, 48, 105,
    408, 269, 136, 9, 32, 9, 16, 81, 8, 9, 24, 41, 48, 9, 8, 9, 8, 9, 8, 33, 8, 89, 16, 33, 40, 41, 32, 9, 8, 131,
    282, 17, 34, 11, 5808, 483, 208, 421, 179, 5040, 243, 9056, 1833, 48, 33, 29, 17, 72, 11, 16, 305, 8, 9, 40, 9,
    16, 449, 56, 9, 120, 13, 185, 72, 57, 8, 57, 8, 57, 8, 57, 8, 57, 8, 57, 8, 57, 8, 57, 8, 261, 376, 9, 3712, 12,
    32, 17, 10, 200, 74, 53, 8, 41, 16, 26, 17, 32, 689, 16, 21, 16, 25, 8, 721, 8, 33, 40, 345, 8, 753, 24, 35, 80,
    257, 384, 129, 256, 83, 240, 67, 8, 123, 256, 83, 312, 123, 2560, 52737, 512, 177257, 536, 369, 16, 2153, 24, 129,
    82, 17, 160, 377, 37, 8, 85, 8, 249, 21, 561, 82, 21, 296, 73, 16, 825, 16, 537, 16, 17, 8, 9, 8, 65, 168, 129,
    13, 25, 13, 33, 13, 185, 45, 32, 13, 24, 51, 80, 417, 96, 21, 401, 149, 80, 82, 48, 149, 49, 24, 9, 8, 17, 13, 82,
    225, 69, 16, 185, 109, 96, 233, 24, 37, 377, 117, 112, 9, 82, 48, 41, 13, 81, 82, 41, 8, 329, 117, 72, 25, 13, 65,
    21, 16, 82, 48, 185, 24, 9, 29, 401, 13, 9, 29, 17, 21, 41, 21, 9, 13, 9, 192, 25, 16, 89, 45, 16, 25, 21, 80, 49,
    16, 49, 16, 49, 72, 57, 8, 57, 8, 345, 8, 113, 48, 921, 69, 8, 21, 16, 82, 48, 89377, 96, 185, 32, 393, 67616,
    2929, 16, 849, 304, 57, 96, 41, 40, 9, 13, 81, 8, 105, 8, 41, 8, 9, 8, 17, 8, 17, 8, 865, 264, 2905, 144, 513, 16,
    433, 320, 97, 32, 133, 128, 133, 24, 21, 192, 29, 256, 41, 8, 1081, 152, 82, 56, 209, 32, 13, 8, 209, 88, 713, 24,
    49, 16, 49, 16, 49, 16, 25, 280, 97, 8, 209, 8, 153, 8, 17, 8, 121, 16, 113, 272, 985, 96, 363, 96, 426, 35, 136,
    19, 904, 13, 1040, 233, 24, 393, 120, 13, 219, 32, 257, 35, 72, 161, 10, 65, 10, 40, 305, 45, 40, 241, 16, 289,
    32, 65, 8, 42, 336, 1265, 16, 82, 48, 289, 32, 289, 32, 321, 64, 417, 96, 89, 8, 121, 8, 57, 8, 17, 8, 89, 8, 121,
    8, 57, 8, 17, 24, 417, 96, 2489, 72, 177, 80, 65, 192, 49, 8, 337, 8, 73, 552, 49, 16, 9, 8, 353, 8, 17, 24, 9,
    16, 185, 16, 67, 185, 16, 59, 249, 64, 75, 384, 153, 8, 17, 40, 43, 177, 51, 32, 209, 560, 449, 32, 19, 17, 131,
    16, 371, 9, 29, 8, 21, 40, 37, 33, 8, 25, 8, 233, 16, 29, 32, 13, 75, 184, 233, 19, 8, 233, 27, 256, 65, 8, 225,
    21, 32, 43, 128, 433, 80, 177, 16, 67, 153, 40, 67, 145, 184, 59, 640, 585, 440, 409, 104, 409, 56, 51, 289, 37,
    64, 82, 48, 82, 225, 24, 45, 8, 185, 1744, 251, 8, 337, 8, 21, 24, 17, 128, 25, 440, 37, 233, 83, 9, 64, 177, 93,
    35, 216, 145, 37, 336, 169, 59, 160, 185, 72, 29, 425, 125, 88, 163, 82, 13, 17, 21, 9, 72, 37, 361, 93, 56, 13,
    104, 201, 56, 82, 48, 29, 289, 117, 8, 82, 32, 9, 21, 9, 64, 281, 13, 16, 9, 72, 29, 385, 117, 33, 32, 37, 8, 21,
    82, 9, 8, 9, 32, 163, 88, 145, 8, 201, 101, 48, 13, 17, 13, 496, 57, 8, 9, 8, 33, 8, 121, 8, 81, 56, 377, 101, 40,
    82, 48, 37, 8, 65, 16, 17, 16, 177, 8, 57, 8, 17, 8, 41, 8, 21, 9, 61, 16, 21, 16, 29, 16, 9, 48, 13, 40, 41, 21,
    16, 61, 24, 45, 88, 81, 8, 9, 16, 9, 8, 305, 8, 9, 77, 8, 13, 16, 13, 8, 37, 8, 45, 9, 13, 9, 104, 21, 232, 425,
    149, 33, 40, 82, 32, 13, 25, 240, 385, 165, 17, 8, 9, 64, 82, 1328, 377, 61, 16, 77, 184, 33, 21, 272, 385, 141,
    24, 9, 88, 82, 304, 345, 109, 9, 56, 82, 48, 162, 224, 217, 16, 125, 32, 82, 19, 32, 57, 1480, 353, 125, 808, 513,
    82, 75, 96, 65, 16, 9, 16, 65, 8, 17, 8, 193, 53, 8, 21, 16, 37, 9, 13, 9, 21, 96, 82, 560, 65, 16, 313, 61, 16,
    61, 9, 8, 9, 13, 216, 9, 85, 321, 61, 9, 37, 64, 13, 64, 9, 93, 369, 133, 24, 9, 144, 585, 1592, 265, 120, 82, 48,
    73, 8, 297, 69, 8, 69, 9, 120, 82, 155, 40, 241, 16, 181, 8, 117, 584, 57, 8, 17, 8, 305, 53, 24, 13, 8, 21, 8,
    61, 9, 13, 64, 82, 48, 49, 8, 17, 8, 257, 45, 8, 21, 8, 45, 9, 56, 82, 2480, 153, 37, 72, 21, 9, 13, 105, 8, 273,
    61, 24, 45, 104, 82, 13, 680, 9, 120, 171, 344, 7377, 816, 890, 136, 1569, 21088, 777, 120, 8577, 128, 13, 49,
    125, 80, 31961, 40, 4665, 54728, 241, 149, 82, 13872, 4553, 56, 249, 8, 82, 48, 633, 8, 82, 48, 241, 16, 45, 88,
    385, 61, 72, 33, 96, 82, 8, 59, 8, 169, 40, 153, 3456, 361, 24, 82, 1584, 513, 187, 840, 601, 32, 13, 9, 445, 56,
    37, 105, 512, 17, 8, 9, 13, 88, 21, 112, 49089, 64, 9905, 328, 81, 71480, 33, 8, 57, 8, 17, 8, 2329, 120, 9, 232,
    25, 16, 9, 112, 33, 64, 3169, 18464, 857, 40, 105, 24, 73, 56, 81, 24, 21, 33416, 82, 4144, 373, 16, 189, 4336,
    45, 24, 53, 64, 69, 16, 61, 240, 37, 1184, 29, 984, 163, 96, 163, 864, 203, 1080, 681, 8, 569, 8, 17, 16, 9, 16,
    17, 16, 33, 8, 97, 8, 9, 8, 57, 8, 521, 8, 33, 16, 65, 8, 57, 8, 225, 8, 33, 8, 41, 8, 9, 24, 57, 8, 2721, 16,
    201, 8, 201, 8, 249, 8, 201, 8, 249, 8, 201, 8, 249, 8, 201, 8, 249, 8, 201, 8, 65, 16, 402, 4096, 445, 32, 405,
    64, 13, 112, 13, 176, 45, 8, 125, 8832, 249, 48, 49, 1704, 61, 8, 141, 16, 61, 8, 21, 8, 45, 40, 497, 264, 13,
    896, 361, 24, 61, 57, 16, 82, 32, 9, 2568, 241, 13, 136, 353, 37, 82, 3760, 225, 37, 82, 1712, 241, 21, 9, 82,
    3880, 57, 8, 33, 8, 17, 8, 121, 8, 1577, 16, 75, 61, 328, 545, 61, 9, 32, 82, 6328, 475, 8, 27, 8, 35, 608, 363,
    8, 123, 1552, 33, 8, 217, 8, 17, 8, 9, 16, 9, 8, 81, 8, 33, 8, 9, 8, 9, 48, 9, 32, 9, 8, 9, 8, 9, 8, 25, 8, 17, 8,
    9, 16, 9, 8, 9, 8, 9, 8, 9, 8, 9, 8, 17, 8, 9, 16, 33, 8, 57, 8, 33, 8, 33, 8, 9, 8, 81, 8, 137, 40, 25, 8, 41, 8,
    137, 4640, 107, 280, 213, 48, 213, 48, 213, 21296, 82, 8240, 341761, 256, 33233, 48, 1777, 16, 46097, 112, 59785,
    120, 4977, 19728, 4337, 12048, 39513, 40, 33537, 5696128, 1925
};
/* Canonical combining classes, likewise: 256 * length of a run + class. */
static const unsigned int mft__mark_runs[] = {
    196608, 5606, 488, 1244, 488, 472, 1500, 714, 1244, 714, 3036, 1281, 1244, 2278, 496, 486, 988, 998, 732, 256,
    998, 1244, 486, 488, 732, 486, 489, 746, 489, 746, 489, 3558, 70400, 1510, 67840, 476, 1254, 476, 998, 478, 476,
    1766, 1756, 742, 476, 742, 478, 484, 486, 266, 267, 268, 269, 270, 271, 272, 273, 274, 531, 276, 277, 278, 256,
    279, 256, 280, 281, 256, 486, 476, 256, 274, 18432, 2278, 286, 287, 288, 12288, 283, 284, 285, 286, 287, 288, 289,
    290, 742, 732, 1510, 476, 742, 476, 4096, 291, 25856, 2022, 512, 1254, 476, 486, 512, 742, 256, 476, 742, 476,
    8960, 292, 7680, 486, 476, 742, 476, 742, 988, 486, 732, 486, 476, 998, 476, 486, 476, 486, 476, 486, 476, 742,
    40960, 2022, 476, 486, 8704, 1254, 256, 2534, 256, 998, 256, 1510, 11008, 988, 30720, 3814, 256, 476, 742, 476,
    742, 476, 998, 988, 283, 284, 285, 998, 476, 742, 732, 1510, 15360, 263, 4096, 265, 768, 486, 476, 742, 26368,
    263, 4096, 265, 28160, 263, 4096, 265, 28160, 263, 4096, 265, 28160, 263, 4096, 265, 32512, 265, 32512, 265, 1792,
    340, 347, 25856, 263, 4096, 265, 32512, 265, 31744, 265, 27904, 615, 265, 3328, 1131, 27648, 630, 3584, 1146,
    19456, 732, 6912, 476, 256, 476, 256, 472, 14080, 385, 386, 256, 388, 1280, 1154, 512, 386, 256, 742, 265, 256,
    742, 15872, 476, 28672, 263, 256, 521, 20992, 476, 184064, 998, 242688, 265, 7936, 265, 40192, 265, 2560, 486,
    51968, 484, 36608, 478, 486, 476, 56064, 486, 476, 18176, 265, 5120, 2278, 512, 476, 12288, 1510, 1756, 742, 476,
    30208, 263, 3840, 265, 9728, 486, 476, 2022, 13824, 521, 14848, 263, 2816, 521, 17152, 263, 38912, 998, 256, 257,
    1500, 742, 1244, 486, 256, 1793, 1024, 476, 1536, 486, 768, 742, 50688, 742, 476, 2022, 476, 742, 490, 470, 476,
    458, 9702, 1280, 486, 489, 476, 486, 476, 184320, 742, 513, 1254, 769, 742, 1024, 486, 768, 513, 486, 476, 486,
    513, 1244, 486, 785920, 998, 36096, 265, 24576, 8422, 141824, 474, 484, 488, 478, 736, 26880, 520, 7721984, 486,
    1024, 2790, 8192, 742, 20480, 742, 70656, 265, 48384, 265, 6912, 4838, 14592, 988, 9472, 265, 24320, 263, 3072,
    265, 61184, 486, 256, 742, 476, 512, 742, 1280, 742, 256, 486, 13312, 265, 62976, 265, 5189632, 282, 196864, 2022,
    2012, 742, 249088, 476, 57856, 476, 38144, 1510, 430592, 476, 256, 486, 10240, 486, 257, 476, 1024, 265, 42240,
    486, 476, 352000, 265, 14336, 265, 14592, 265, 263, 17664, 998, 12288, 521, 15872, 263, 19456, 265, 2304, 263,
    27136, 265, 263, 45568, 263, 265, 20736, 263, 4096, 265, 6144, 2022, 768, 1510, 52480, 265, 768, 263, 31488, 265,
    263, 64256, 265, 263, 32256, 265, 30208, 265, 263, 29440, 265, 332544, 265, 5156864, 1281, 15104, 2022, 5334784,
    257, 1361408, 728, 769, 768, 482, 1496, 2048, 2268, 512, 1510, 732, 7680, 1254, 37888, 998, 899840, 2022, 256,
    4582, 512, 2022, 256, 742, 256, 1510, 566528, 2012, 27904, 1766, 263
};
/* Canonical decompositions into two: distance from the last such character, first, second; second
 * negative when the two do not compose again. */
static const int mft__canonical_pairs[] = {
    192, 65, 768, 1, 65, 769, 1, 65, 770, 1, 65, 771, 1, 65, 776, 1, 65, 778, 2, 67, 807, 1, 69, 768, 1, 69, 769, 1,
    69, 770, 1, 69, 776, 1, 73, 768, 1, 73, 769, 1, 73, 770, 1, 73, 776, 2, 78, 771, 1, 79, 768, 1, 79, 769, 1, 79,
    770, 1, 79, 771, 1, 79, 776, 3, 85, 768, 1, 85, 769, 1, 85, 770, 1, 85, 776, 1, 89, 769, 3, 97, 768, 1, 97, 769,
    1, 97, 770, 1, 97, 771, 1, 97, 776, 1, 97, 778, 2, 99, 807, 1, 101, 768, 1, 101, 769, 1, 101, 770, 1, 101, 776, 1,
    105, 768, 1, 105, 769, 1, 105, 770, 1, 105, 776, 2, 110, 771, 1, 111, 768, 1, 111, 769, 1, 111, 770, 1, 111, 771,
    1, 111, 776, 3, 117, 768, 1, 117, 769, 1, 117, 770, 1, 117, 776, 1, 121, 769, 2, 121, 776, 1, 65, 772, 1, 97, 772,
    1, 65, 774, 1, 97, 774, 1, 65, 808, 1, 97, 808, 1, 67, 769, 1, 99, 769, 1, 67, 770, 1, 99, 770, 1, 67, 775, 1, 99,
    775, 1, 67, 780, 1, 99, 780, 1, 68, 780, 1, 100, 780, 3, 69, 772, 1, 101, 772, 1, 69, 774, 1, 101, 774, 1, 69,
    775, 1, 101, 775, 1, 69, 808, 1, 101, 808, 1, 69, 780, 1, 101, 780, 1, 71, 770, 1, 103, 770, 1, 71, 774, 1, 103,
    774, 1, 71, 775, 1, 103, 775, 1, 71, 807, 1, 103, 807, 1, 72, 770, 1, 104, 770, 3, 73, 771, 1, 105, 771, 1, 73,
    772, 1, 105, 772, 1, 73, 774, 1, 105, 774, 1, 73, 808, 1, 105, 808, 1, 73, 775, 4, 74, 770, 1, 106, 770, 1, 75,
    807, 1, 107, 807, 2, 76, 769, 1, 108, 769, 1, 76, 807, 1, 108, 807, 1, 76, 780, 1, 108, 780, 5, 78, 769, 1, 110,
    769, 1, 78, 807, 1, 110, 807, 1, 78, 780, 1, 110, 780, 4, 79, 772, 1, 111, 772, 1, 79, 774, 1, 111, 774, 1, 79,
    779, 1, 111, 779, 3, 82, 769, 1, 114, 769, 1, 82, 807, 1, 114, 807, 1, 82, 780, 1, 114, 780, 1, 83, 769, 1, 115,
    769, 1, 83, 770, 1, 115, 770, 1, 83, 807, 1, 115, 807, 1, 83, 780, 1, 115, 780, 1, 84, 807, 1, 116, 807, 1, 84,
    780, 1, 116, 780, 3, 85, 771, 1, 117, 771, 1, 85, 772, 1, 117, 772, 1, 85, 774, 1, 117, 774, 1, 85, 778, 1, 117,
    778, 1, 85, 779, 1, 117, 779, 1, 85, 808, 1, 117, 808, 1, 87, 770, 1, 119, 770, 1, 89, 770, 1, 121, 770, 1, 89,
    776, 1, 90, 769, 1, 122, 769, 1, 90, 775, 1, 122, 775, 1, 90, 780, 1, 122, 780, 34, 79, 795, 1, 111, 795, 14, 85,
    795, 1, 117, 795, 29, 65, 780, 1, 97, 780, 1, 73, 780, 1, 105, 780, 1, 79, 780, 1, 111, 780, 1, 85, 780, 1, 117,
    780, 1, 220, 772, 1, 252, 772, 1, 220, 769, 1, 252, 769, 1, 220, 780, 1, 252, 780, 1, 220, 768, 1, 252, 768, 2,
    196, 772, 1, 228, 772, 1, 550, 772, 1, 551, 772, 1, 198, 772, 1, 230, 772, 3, 71, 780, 1, 103, 780, 1, 75, 780, 1,
    107, 780, 1, 79, 808, 1, 111, 808, 1, 490, 772, 1, 491, 772, 1, 439, 780, 1, 658, 780, 1, 106, 780, 4, 71, 769, 1,
    103, 769, 3, 78, 768, 1, 110, 768, 1, 197, 769, 1, 229, 769, 1, 198, 769, 1, 230, 769, 1, 216, 769, 1, 248, 769,
    1, 65, 783, 1, 97, 783, 1, 65, 785, 1, 97, 785, 1, 69, 783, 1, 101, 783, 1, 69, 785, 1, 101, 785, 1, 73, 783, 1,
    105, 783, 1, 73, 785, 1, 105, 785, 1, 79, 783, 1, 111, 783, 1, 79, 785, 1, 111, 785, 1, 82, 783, 1, 114, 783, 1,
    82, 785, 1, 114, 785, 1, 85, 783, 1, 117, 783, 1, 85, 785, 1, 117, 785, 1, 83, 806, 1, 115, 806, 1, 84, 806, 1,
    116, 806, 3, 72, 780, 1, 104, 780, 7, 65, 775, 1, 97, 775, 1, 69, 807, 1, 101, 807, 1, 214, 772, 1, 246, 772, 1,
    213, 772, 1, 245, 772, 1, 79, 775, 1, 111, 775, 1, 558, 772, 1, 559, 772, 1, 89, 772, 1, 121, 772, 273, 776, -769,
    65, 168, 769, 1, 913, 769, 2, 917, 769, 1, 919, 769, 1, 921, 769, 2, 927, 769, 2, 933, 769, 1, 937, 769, 1, 970,
    769, 26, 921, 776, 1, 933, 776, 1, 945, 769, 1, 949, 769, 1, 951, 769, 1, 953, 769, 1, 971, 769, 26, 953, 776, 1,
    965, 776, 1, 959, 769, 1, 965, 769, 1, 969, 769, 5, 978, 769, 1, 978, 776, 44, 1045, 768, 1, 1045, 776, 2, 1043,
    769, 4, 1030, 776, 5, 1050, 769, 1, 1048, 768, 1, 1059, 774, 11, 1048, 774, 32, 1080, 774, 23, 1077, 768, 1, 1077,
    776, 2, 1075, 769, 4, 1110, 776, 5, 1082, 769, 1, 1080, 768, 1, 1091, 774, 24, 1140, 783, 1, 1141, 783, 74, 1046,
    774, 1, 1078, 774, 14, 1040, 774, 1, 1072, 774, 1, 1040, 776, 1, 1072, 776, 3, 1045, 774, 1, 1077, 774, 3, 1240,
    776, 1, 1241, 776, 1, 1046, 776, 1, 1078, 776, 1, 1047, 776, 1, 1079, 776, 3, 1048, 772, 1, 1080, 772, 1, 1048,
    776, 1, 1080, 776, 1, 1054, 776, 1, 1086, 776, 3, 1256, 776, 1, 1257, 776, 1, 1069, 776, 1, 1101, 776, 1, 1059,
    772, 1, 1091, 772, 1, 1059, 776, 1, 1091, 776, 1, 1059, 779, 1, 1091, 779, 1, 1063, 776, 1, 1095, 776, 3, 1067,
    776, 1, 1099, 776, 297, 1575, 1619, 1, 1575, 1620, 1, 1608, 1620, 1, 1575, 1621, 1, 1610, 1620, 154, 1749, 1620,
    2, 1729, 1620, 17, 1746, 1620, 598, 2344, 2364, 8, 2352, 2364, 3, 2355, 2364, 36, 2325, -2364, 1, 2326, -2364, 1,
    2327, -2364, 1, 2332, -2364, 1, 2337, -2364, 1, 2338, -2364, 1, 2347, -2364, 1, 2351, -2364, 108, 2503, 2494, 1,
    2503, 2519, 16, 2465, -2492, 1, 2466, -2492, 2, 2479, -2492, 84, 2610, -2620, 3, 2616, -2620, 35, 2582, -2620, 1,
    2583, -2620, 1, 2588, -2620, 3, 2603, -2620, 234, 2887, 2902, 3, 2887, 2878, 1, 2887, 2903, 16, 2849, -2876, 1,
    2850, -2876, 55, 2962, 3031, 54, 3014, 3006, 1, 3015, 3006, 1, 3014, 3031, 124, 3142, 3158, 120, 3263, 3285, 7,
    3270, 3285, 1, 3270, 3286, 2, 3270, 3266, 1, 3274, 3285, 127, 3398, 3390, 1, 3399, 3390, 1, 3398, 3415, 142, 3545,
    3530, 2, 3545, 3535, 1, 3548, 3530, 1, 3545, 3551, 357, 3906, -4023, 10, 3916, -4023, 5, 3921, -4023, 5, 3926,
    -4023, 5, 3931, -4023, 13, 3904, -4021, 10, 3953, -3954, 2, 3953, -3956, 1, 4018, -3968, 2, 4019, -3968, 9, 3953,
    -3968, 18, 3986, -4023, 10, 3996, -4023, 5, 4001, -4023, 5, 4006, -4023, 5, 4011, -4023, 13, 3984, -4021, 109,
    4133, 4142, 2784, 6917, 6965, 2, 6919, 6965, 2, 6921, 6965, 2, 6923, 6965, 2, 6925, 6965, 4, 6929, 6965, 41, 6970,
    6965, 2, 6972, 6965, 3, 6974, 6965, 1, 6975, 6965, 2, 6978, 6965, 701, 65, 805, 1, 97, 805, 1, 66, 775, 1, 98,
    775, 1, 66, 803, 1, 98, 803, 1, 66, 817, 1, 98, 817, 1, 199, 769, 1, 231, 769, 1, 68, 775, 1, 100, 775, 1, 68,
    803, 1, 100, 803, 1, 68, 817, 1, 100, 817, 1, 68, 807, 1, 100, 807, 1, 68, 813, 1, 100, 813, 1, 274, 768, 1, 275,
    768, 1, 274, 769, 1, 275, 769, 1, 69, 813, 1, 101, 813, 1, 69, 816, 1, 101, 816, 1, 552, 774, 1, 553, 774, 1, 70,
    775, 1, 102, 775, 1, 71, 772, 1, 103, 772, 1, 72, 775, 1, 104, 775, 1, 72, 803, 1, 104, 803, 1, 72, 776, 1, 104,
    776, 1, 72, 807, 1, 104, 807, 1, 72, 814, 1, 104, 814, 1, 73, 816, 1, 105, 816, 1, 207, 769, 1, 239, 769, 1, 75,
    769, 1, 107, 769, 1, 75, 803, 1, 107, 803, 1, 75, 817, 1, 107, 817, 1, 76, 803, 1, 108, 803, 1, 7734, 772, 1,
    7735, 772, 1, 76, 817, 1, 108, 817, 1, 76, 813, 1, 108, 813, 1, 77, 769, 1, 109, 769, 1, 77, 775, 1, 109, 775, 1,
    77, 803, 1, 109, 803, 1, 78, 775, 1, 110, 775, 1, 78, 803, 1, 110, 803, 1, 78, 817, 1, 110, 817, 1, 78, 813, 1,
    110, 813, 1, 213, 769, 1, 245, 769, 1, 213, 776, 1, 245, 776, 1, 332, 768, 1, 333, 768, 1, 332, 769, 1, 333, 769,
    1, 80, 769, 1, 112, 769, 1, 80, 775, 1, 112, 775, 1, 82, 775, 1, 114, 775, 1, 82, 803, 1, 114, 803, 1, 7770, 772,
    1, 7771, 772, 1, 82, 817, 1, 114, 817, 1, 83, 775, 1, 115, 775, 1, 83, 803, 1, 115, 803, 1, 346, 775, 1, 347, 775,
    1, 352, 775, 1, 353, 775, 1, 7778, 775, 1, 7779, 775, 1, 84, 775, 1, 116, 775, 1, 84, 803, 1, 116, 803, 1, 84,
    817, 1, 116, 817, 1, 84, 813, 1, 116, 813, 1, 85, 804, 1, 117, 804, 1, 85, 816, 1, 117, 816, 1, 85, 813, 1, 117,
    813, 1, 360, 769, 1, 361, 769, 1, 362, 776, 1, 363, 776, 1, 86, 771, 1, 118, 771, 1, 86, 803, 1, 118, 803, 1, 87,
    768, 1, 119, 768, 1, 87, 769, 1, 119, 769, 1, 87, 776, 1, 119, 776, 1, 87, 775, 1, 119, 775, 1, 87, 803, 1, 119,
    803, 1, 88, 775, 1, 120, 775, 1, 88, 776, 1, 120, 776, 1, 89, 775, 1, 121, 775, 1, 90, 770, 1, 122, 770, 1, 90,
    803, 1, 122, 803, 1, 90, 817, 1, 122, 817, 1, 104, 817, 1, 116, 776, 1, 119, 778, 1, 121, 778, 2, 383, 775, 5, 65,
    803, 1, 97, 803, 1, 65, 777, 1, 97, 777, 1, 194, 769, 1, 226, 769, 1, 194, 768, 1, 226, 768, 1, 194, 777, 1, 226,
    777, 1, 194, 771, 1, 226, 771, 1, 7840, 770, 1, 7841, 770, 1, 258, 769, 1, 259, 769, 1, 258, 768, 1, 259, 768, 1,
    258, 777, 1, 259, 777, 1, 258, 771, 1, 259, 771, 1, 7840, 774, 1, 7841, 774, 1, 69, 803, 1, 101, 803, 1, 69, 777,
    1, 101, 777, 1, 69, 771, 1, 101, 771, 1, 202, 769, 1, 234, 769, 1, 202, 768, 1, 234, 768, 1, 202, 777, 1, 234,
    777, 1, 202, 771, 1, 234, 771, 1, 7864, 770, 1, 7865, 770, 1, 73, 777, 1, 105, 777, 1, 73, 803, 1, 105, 803, 1,
    79, 803, 1, 111, 803, 1, 79, 777, 1, 111, 777, 1, 212, 769, 1, 244, 769, 1, 212, 768, 1, 244, 768, 1, 212, 777, 1,
    244, 777, 1, 212, 771, 1, 244, 771, 1, 7884, 770, 1, 7885, 770, 1, 416, 769, 1, 417, 769, 1, 416, 768, 1, 417,
    768, 1, 416, 777, 1, 417, 777, 1, 416, 771, 1, 417, 771, 1, 416, 803, 1, 417, 803, 1, 85, 803, 1, 117, 803, 1, 85,
    777, 1, 117, 777, 1, 431, 769, 1, 432, 769, 1, 431, 768, 1, 432, 768, 1, 431, 777, 1, 432, 777, 1, 431, 771, 1,
    432, 771, 1, 431, 803, 1, 432, 803, 1, 89, 768, 1, 121, 768, 1, 89, 803, 1, 121, 803, 1, 89, 777, 1, 121, 777, 1,
    89, 771, 1, 121, 771, 7, 945, 787, 1, 945, 788, 1, 7936, 768, 1, 7937, 768, 1, 7936, 769, 1, 7937, 769, 1, 7936,
    834, 1, 7937, 834, 1, 913, 787, 1, 913, 788, 1, 7944, 768, 1, 7945, 768, 1, 7944, 769, 1, 7945, 769, 1, 7944, 834,
    1, 7945, 834, 1, 949, 787, 1, 949, 788, 1, 7952, 768, 1, 7953, 768, 1, 7952, 769, 1, 7953, 769, 3, 917, 787, 1,
    917, 788, 1, 7960, 768, 1, 7961, 768, 1, 7960, 769, 1, 7961, 769, 3, 951, 787, 1, 951, 788, 1, 7968, 768, 1, 7969,
    768, 1, 7968, 769, 1, 7969, 769, 1, 7968, 834, 1, 7969, 834, 1, 919, 787, 1, 919, 788, 1, 7976, 768, 1, 7977, 768,
    1, 7976, 769, 1, 7977, 769, 1, 7976, 834, 1, 7977, 834, 1, 953, 787, 1, 953, 788, 1, 7984, 768, 1, 7985, 768, 1,
    7984, 769, 1, 7985, 769, 1, 7984, 834, 1, 7985, 834, 1, 921, 787, 1, 921, 788, 1, 7992, 768, 1, 7993, 768, 1,
    7992, 769, 1, 7993, 769, 1, 7992, 834, 1, 7993, 834, 1, 959, 787, 1, 959, 788, 1, 8000, 768, 1, 8001, 768, 1,
    8000, 769, 1, 8001, 769, 3, 927, 787, 1, 927, 788, 1, 8008, 768, 1, 8009, 768, 1, 8008, 769, 1, 8009, 769, 3, 965,
    787, 1, 965, 788, 1, 8016, 768, 1, 8017, 768, 1, 8016, 769, 1, 8017, 769, 1, 8016, 834, 1, 8017, 834, 2, 933, 788,
    2, 8025, 768, 2, 8025, 769, 2, 8025, 834, 1, 969, 787, 1, 969, 788, 1, 8032, 768, 1, 8033, 768, 1, 8032, 769, 1,
    8033, 769, 1, 8032, 834, 1, 8033, 834, 1, 937, 787, 1, 937, 788, 1, 8040, 768, 1, 8041, 768, 1, 8040, 769, 1,
    8041, 769, 1, 8040, 834, 1, 8041, 834, 1, 945, 768, 2, 949, 768, 2, 951, 768, 2, 953, 768, 2, 959, 768, 2, 965,
    768, 2, 969, 768, 4, 7936, 837, 1, 7937, 837, 1, 7938, 837, 1, 7939, 837, 1, 7940, 837, 1, 7941, 837, 1, 7942,
    837, 1, 7943, 837, 1, 7944, 837, 1, 7945, 837, 1, 7946, 837, 1, 7947, 837, 1, 7948, 837, 1, 7949, 837, 1, 7950,
    837, 1, 7951, 837, 1, 7968, 837, 1, 7969, 837, 1, 7970, 837, 1, 7971, 837, 1, 7972, 837, 1, 7973, 837, 1, 7974,
    837, 1, 7975, 837, 1, 7976, 837, 1, 7977, 837, 1, 7978, 837, 1, 7979, 837, 1, 7980, 837, 1, 7981, 837, 1, 7982,
    837, 1, 7983, 837, 1, 8032, 837, 1, 8033, 837, 1, 8034, 837, 1, 8035, 837, 1, 8036, 837, 1, 8037, 837, 1, 8038,
    837, 1, 8039, 837, 1, 8040, 837, 1, 8041, 837, 1, 8042, 837, 1, 8043, 837, 1, 8044, 837, 1, 8045, 837, 1, 8046,
    837, 1, 8047, 837, 1, 945, 774, 1, 945, 772, 1, 8048, 837, 1, 945, 837, 1, 940, 837, 2, 945, 834, 1, 8118, 837, 1,
    913, 774, 1, 913, 772, 1, 913, 768, 2, 913, 837, 5, 168, 834, 1, 8052, 837, 1, 951, 837, 1, 942, 837, 2, 951, 834,
    1, 8134, 837, 1, 917, 768, 2, 919, 768, 2, 919, 837, 1, 8127, 768, 1, 8127, 769, 1, 8127, 834, 1, 953, 774, 1,
    953, 772, 1, 970, 768, 4, 953, 834, 1, 970, 834, 1, 921, 774, 1, 921, 772, 1, 921, 768, 3, 8190, 768, 1, 8190,
    769, 1, 8190, 834, 1, 965, 774, 1, 965, 772, 1, 971, 768, 2, 961, 787, 1, 961, 788, 1, 965, 834, 1, 971, 834, 1,
    933, 774, 1, 933, 772, 1, 933, 768, 2, 929, 788, 1, 168, 768, 5, 8060, 837, 1, 969, 837, 1, 974, 837, 2, 969, 834,
    1, 8182, 837, 1, 927, 768, 2, 937, 768, 2, 937, 837, 414, 8592, 824, 1, 8594, 824, 19, 8596, 824, 31, 8656, 824,
    1, 8660, 824, 1, 8658, 824, 53, 8707, 824, 5, 8712, 824, 3, 8715, 824, 24, 8739, 824, 2, 8741, 824, 27, 8764, 824,
    3, 8771, 824, 3, 8773, 824, 2, 8776, 824, 23, 61, 824, 2, 8801, 824, 11, 8781, 824, 1, 60, 824, 1, 62, 824, 1,
    8804, 824, 1, 8805, 824, 3, 8818, 824, 1, 8819, 824, 3, 8822, 824, 1, 8823, 824, 7, 8826, 824, 1, 8827, 824, 3,
    8834, 824, 1, 8835, 824, 3, 8838, 824, 1, 8839, 824, 35, 8866, 824, 1, 8872, 824, 1, 8873, 824, 1, 8875, 824, 49,
    8828, 824, 1, 8829, 824, 1, 8849, 824, 1, 8850, 824, 7, 8882, 824, 1, 8883, 824, 1, 8884, 824, 1, 8885, 824, 2031,
    10973, -824, 1392, 12363, 12441, 2, 12365, 12441, 2, 12367, 12441, 2, 12369, 12441, 2, 12371, 12441, 2, 12373,
    12441, 2, 12375, 12441, 2, 12377, 12441, 2, 12379, 12441, 2, 12381, 12441, 2, 12383, 12441, 2, 12385, 12441, 3,
    12388, 12441, 2, 12390, 12441, 2, 12392, 12441, 7, 12399, 12441, 1, 12399, 12442, 2, 12402, 12441, 1, 12402,
    12442, 2, 12405, 12441, 1, 12405, 12442, 2, 12408, 12441, 1, 12408, 12442, 2, 12411, 12441, 1, 12411, 12442, 23,
    12358, 12441, 10, 12445, 12441, 14, 12459, 12441, 2, 12461, 12441, 2, 12463, 12441, 2, 12465, 12441, 2, 12467,
    12441, 2, 12469, 12441, 2, 12471, 12441, 2, 12473, 12441, 2, 12475, 12441, 2, 12477, 12441, 2, 12479, 12441, 2,
    12481, 12441, 3, 12484, 12441, 2, 12486, 12441, 2, 12488, 12441, 7, 12495, 12441, 1, 12495, 12442, 2, 12498,
    12441, 1, 12498, 12442, 2, 12501, 12441, 1, 12501, 12442, 2, 12504, 12441, 1, 12504, 12442, 2, 12507, 12441, 1,
    12507, 12442, 23, 12454, 12441, 3, 12527, 12441, 1, 12528, 12441, 1, 12529, 12441, 1, 12530, 12441, 4, 12541,
    12441, 51743, 1497, -1460, 2, 1522, -1463, 11, 1513, -1473, 1, 1513, -1474, 1, 64329, -1473, 1, 64329, -1474, 1,
    1488, -1463, 1, 1488, -1464, 1, 1488, -1468, 1, 1489, -1468, 1, 1490, -1468, 1, 1491, -1468, 1, 1492, -1468, 1,
    1493, -1468, 1, 1494, -1468, 2, 1496, -1468, 1, 1497, -1468, 1, 1498, -1468, 1, 1499, -1468, 1, 1500, -1468, 2,
    1502, -1468, 2, 1504, -1468, 1, 1505, -1468, 2, 1507, -1468, 1, 1508, -1468, 2, 1510, -1468, 1, 1511, -1468, 1,
    1512, -1468, 1, 1513, -1468, 1, 1514, -1468, 1, 1493, -1465, 1, 1489, -1471, 1, 1499, -1471, 1, 1508, -1471, 5452,
    69785, 69818, 2, 69787, 69818, 15, 69797, 69818, 131, 69937, 69927, 1, 69938, 69927, 540, 70471, 70462, 1, 70471,
    70487, 367, 70841, 70842, 1, 70841, 70832, 2, 70841, 70845, 252, 71096, 71087, 1, 71097, 71087, 48035, 119127,
    -119141, 1, 119128, -119141, 1, 119135, -119150, 1, 119135, -119151, 1, 119135, -119152, 1, 119135, -119153, 1,
    119135, -119154, 87, 119225, -119141, 1, 119226, -119141, 1, 119227, -119150, 1, 119228, -119150, 1, 119227,
    -119151, 1, 119228, -119151
};
/* Canonical decompositions into one: distance, character. */
static const int mft__canonical_singles[] = {
    832, 768, 1, 769, 2, 787, 49, 697, 10, 59, 9, 183, 7146, 940, 2, 941, 2, 942, 2, 943, 2, 972, 2, 973, 2, 974, 62,
    902, 3, 953, 11, 904, 2, 905, 8, 912, 8, 906, 8, 944, 8, 910, 3, 901, 1, 96, 10, 908, 2, 911, 2, 180, 3, 8194, 1,
    8195, 293, 937, 4, 75, 1, 197, 510, 12296, 1, 12297, 54742, 35912, 1, 26356, 1, 36554, 1, 36040, 1, 28369, 1,
    20018, 1, 21477, 1, 40860, 1, 40860, 1, 22865, 1, 37329, 1, 21895, 1, 22856, 1, 25078, 1, 30313, 1, 32645, 1,
    34367, 1, 34746, 1, 35064, 1, 37007, 1, 27138, 1, 27931, 1, 28889, 1, 29662, 1, 33853, 1, 37226, 1, 39409, 1,
    20098, 1, 21365, 1, 27396, 1, 29211, 1, 34349, 1, 40478, 1, 23888, 1, 28651, 1, 34253, 1, 35172, 1, 25289, 1,
    33240, 1, 34847, 1, 24266, 1, 26391, 1, 28010, 1, 29436, 1, 37070, 1, 20358, 1, 20919, 1, 21214, 1, 25796, 1,
    27347, 1, 29200, 1, 30439, 1, 32769, 1, 34310, 1, 34396, 1, 36335, 1, 38706, 1, 39791, 1, 40442, 1, 30860, 1,
    31103, 1, 32160, 1, 33737, 1, 37636, 1, 40575, 1, 35542, 1, 22751, 1, 24324, 1, 31840, 1, 32894, 1, 29282, 1,
    30922, 1, 36034, 1, 38647, 1, 22744, 1, 23650, 1, 27155, 1, 28122, 1, 28431, 1, 32047, 1, 32311, 1, 38475, 1,
    21202, 1, 32907, 1, 20956, 1, 20940, 1, 31260, 1, 32190, 1, 33777, 1, 38517, 1, 35712, 1, 25295, 1, 27138, 1,
    35582, 1, 20025, 1, 23527, 1, 24594, 1, 29575, 1, 30064, 1, 21271, 1, 30971, 1, 20415, 1, 24489, 1, 19981, 1,
    27852, 1, 25976, 1, 32034, 1, 21443, 1, 22622, 1, 30465, 1, 33865, 1, 35498, 1, 27578, 1, 36784, 1, 27784, 1,
    25342, 1, 33509, 1, 25504, 1, 30053, 1, 20142, 1, 20841, 1, 20937, 1, 26753, 1, 31975, 1, 33391, 1, 35538, 1,
    37327, 1, 21237, 1, 21570, 1, 22899, 1, 24300, 1, 26053, 1, 28670, 1, 31018, 1, 38317, 1, 39530, 1, 40599, 1,
    40654, 1, 21147, 1, 26310, 1, 27511, 1, 36706, 1, 24180, 1, 24976, 1, 25088, 1, 25754, 1, 28451, 1, 29001, 1,
    29833, 1, 31178, 1, 32244, 1, 32879, 1, 36646, 1, 34030, 1, 36899, 1, 37706, 1, 21015, 1, 21155, 1, 21693, 1,
    28872, 1, 35010, 1, 35498, 1, 24265, 1, 24565, 1, 25467, 1, 27566, 1, 31806, 1, 29557, 1, 20196, 1, 22265, 1,
    23527, 1, 23994, 1, 24604, 1, 29618, 1, 29801, 1, 32666, 1, 32838, 1, 37428, 1, 38646, 1, 38728, 1, 38936, 1,
    20363, 1, 31150, 1, 37300, 1, 38584, 1, 24801, 1, 20102, 1, 20698, 1, 23534, 1, 23615, 1, 26009, 1, 27138, 1,
    29134, 1, 30274, 1, 34044, 1, 36988, 1, 40845, 1, 26248, 1, 38446, 1, 21129, 1, 26491, 1, 26611, 1, 27969, 1,
    28316, 1, 29705, 1, 30041, 1, 30827, 1, 32016, 1, 39006, 1, 20845, 1, 25134, 1, 38520, 1, 20523, 1, 23833, 1,
    28138, 1, 36650, 1, 24459, 1, 24900, 1, 26647, 1, 29575, 1, 38534, 1, 21033, 1, 21519, 1, 23653, 1, 26131, 1,
    26446, 1, 26792, 1, 27877, 1, 29702, 1, 30178, 1, 32633, 1, 35023, 1, 35041, 1, 37324, 1, 38626, 1, 21311, 1,
    28346, 1, 21533, 1, 29136, 1, 29848, 1, 34298, 1, 38563, 1, 40023, 1, 40607, 1, 26519, 1, 28107, 1, 33256, 1,
    31435, 1, 31520, 1, 31890, 1, 29376, 1, 28825, 1, 35672, 1, 20160, 1, 33590, 1, 21050, 1, 20999, 1, 24230, 1,
    25299, 1, 31958, 1, 23429, 1, 27934, 1, 26292, 1, 36667, 1, 34892, 1, 38477, 1, 35211, 1, 24275, 1, 20800, 1,
    21952, 3, 22618, 2, 26228, 3, 20958, 1, 29482, 1, 30410, 1, 31036, 1, 31070, 1, 31077, 1, 31119, 1, 38742, 1,
    31934, 1, 32701, 2, 34322, 2, 35576, 3, 36920, 1, 37117, 4, 39151, 1, 39164, 1, 39208, 1, 40372, 1, 37086, 1,
    38583, 1, 20398, 1, 20711, 1, 20813, 1, 21193, 1, 21220, 1, 21329, 1, 21917, 1, 22022, 1, 22120, 1, 22592, 1,
    22696, 1, 23652, 1, 23662, 1, 24724, 1, 24936, 1, 24974, 1, 25074, 1, 25935, 1, 26082, 1, 26257, 1, 26757, 1,
    28023, 1, 28186, 1, 28450, 1, 29038, 1, 29227, 1, 29730, 1, 30865, 1, 31038, 1, 31049, 1, 31048, 1, 31056, 1,
    31062, 1, 31069, 1, 31117, 1, 31118, 1, 31296, 1, 31361, 1, 31680, 1, 32244, 1, 32265, 1, 32321, 1, 32626, 1,
    32773, 1, 33261, 1, 33401, 1, 33401, 1, 33879, 1, 35088, 1, 35222, 1, 35585, 1, 35641, 1, 36051, 1, 36104, 1,
    36790, 1, 36920, 1, 38627, 1, 38911, 1, 38971, 1, 24693, 1, 148206, 1, 33304, 3, 20006, 1, 20917, 1, 20840, 1,
    20352, 1, 20805, 1, 20864, 1, 21191, 1, 21242, 1, 21917, 1, 21845, 1, 21913, 1, 21986, 1, 22618, 1, 22707, 1,
    22852, 1, 22868, 1, 23138, 1, 23336, 1, 24274, 1, 24281, 1, 24425, 1, 24493, 1, 24792, 1, 24910, 1, 24840, 1,
    24974, 1, 24928, 1, 25074, 1, 25140, 1, 25540, 1, 25628, 1, 25682, 1, 25942, 1, 26228, 1, 26391, 1, 26395, 1,
    26454, 1, 27513, 1, 27578, 1, 27969, 1, 28379, 1, 28363, 1, 28450, 1, 28702, 1, 29038, 1, 30631, 1, 29237, 1,
    29359, 1, 29482, 1, 29809, 1, 29958, 1, 30011, 1, 30237, 1, 30239, 1, 30410, 1, 30427, 1, 30452, 1, 30538, 1,
    30528, 1, 30924, 1, 31409, 1, 31680, 1, 31867, 1, 32091, 1, 32244, 1, 32574, 1, 32773, 1, 33618, 1, 33775, 1,
    34681, 1, 35137, 1, 35206, 1, 35222, 1, 35519, 1, 35576, 1, 35531, 1, 35585, 1, 35582, 1, 35565, 1, 35641, 1,
    35722, 1, 36104, 1, 36664, 1, 36978, 1, 37273, 1, 37494, 1, 38524, 1, 38627, 1, 38742, 1, 38875, 1, 38911, 1,
    38923, 1, 38971, 1, 39698, 1, 40860, 1, 141386, 1, 141380, 1, 144341, 1, 15261, 1, 16408, 1, 16441, 1, 152137, 1,
    154832, 1, 163539, 1, 40771, 1, 40846, 130343, 20029, 1, 20024, 1, 20033, 1, 131362, 1, 20320, 1, 20398, 1, 20411,
    1, 20482, 1, 20602, 1, 20633, 1, 20711, 1, 20687, 1, 13470, 1, 132666, 1, 20813, 1, 20820, 1, 20836, 1, 20855, 1,
    132380, 1, 13497, 1, 20839, 1, 20877, 1, 132427, 1, 20887, 1, 20900, 1, 20172, 1, 20908, 1, 20917, 1, 168415, 1,
    20981, 1, 20995, 1, 13535, 1, 21051, 1, 21062, 1, 21106, 1, 21111, 1, 13589, 1, 21191, 1, 21193, 1, 21220, 1,
    21242, 1, 21253, 1, 21254, 1, 21271, 1, 21321, 1, 21329, 1, 21338, 1, 21363, 1, 21373, 1, 21375, 1, 21375, 1,
    21375, 1, 133676, 1, 28784, 1, 21450, 1, 21471, 1, 133987, 1, 21483, 1, 21489, 1, 21510, 1, 21662, 1, 21560, 1,
    21576, 1, 21608, 1, 21666, 1, 21750, 1, 21776, 1, 21843, 1, 21859, 1, 21892, 1, 21892, 1, 21913, 1, 21931, 1,
    21939, 1, 21954, 1, 22294, 1, 22022, 1, 22295, 1, 22097, 1, 22132, 1, 20999, 1, 22766, 1, 22478, 1, 22516, 1,
    22541, 1, 22411, 1, 22578, 1, 22577, 1, 22700, 1, 136420, 1, 22770, 1, 22775, 1, 22790, 1, 22810, 1, 22818, 1,
    22882, 1, 136872, 1, 136938, 1, 23020, 1, 23067, 1, 23079, 1, 23000, 1, 23142, 1, 14062, 1, 14076, 1, 23304, 1,
    23358, 1, 23358, 1, 137672, 1, 23491, 1, 23512, 1, 23527, 1, 23539, 1, 138008, 1, 23551, 1, 23558, 1, 24403, 1,
    23586, 1, 14209, 1, 23648, 1, 23662, 1, 23744, 1, 23693, 1, 138724, 1, 23875, 1, 138726, 1, 23918, 1, 23915, 1,
    23932, 1, 24033, 1, 24034, 1, 14383, 1, 24061, 1, 24104, 1, 24125, 1, 24169, 1, 14434, 1, 139651, 1, 14460, 1,
    24240, 1, 24243, 1, 24246, 1, 24266, 1, 172946, 1, 24318, 1, 140081, 1, 140081, 1, 33281, 1, 24354, 1, 24354, 1,
    14535, 1, 144056, 1, 156122, 1, 24418, 1, 24427, 1, 14563, 1, 24474, 1, 24525, 1, 24535, 1, 24569, 1, 24705, 1,
    14650, 1, 14620, 1, 24724, 1, 141012, 1, 24775, 1, 24904, 1, 24908, 1, 24910, 1, 24908, 1, 24954, 1, 24974, 1,
    25010, 1, 24996, 1, 25007, 1, 25054, 1, 25074, 1, 25078, 1, 25104, 1, 25115, 1, 25181, 1, 25265, 1, 25300, 1,
    25424, 1, 142092, 1, 25405, 1, 25340, 1, 25448, 1, 25475, 1, 25572, 1, 142321, 1, 25634, 1, 25541, 1, 25513, 1,
    14894, 1, 25705, 1, 25726, 1, 25757, 1, 25719, 1, 14956, 1, 25935, 1, 25964, 1, 143370, 1, 26083, 1, 26360, 1,
    26185, 1, 15129, 1, 26257, 1, 15112, 1, 15076, 1, 20882, 1, 20885, 1, 26368, 1, 26268, 1, 32941, 1, 17369, 1,
    26391, 1, 26395, 1, 26401, 1, 26462, 1, 26451, 1, 144323, 1, 15177, 1, 26618, 1, 26501, 1, 26706, 1, 26757, 1,
    144493, 1, 26766, 1, 26655, 1, 26900, 1, 15261, 1, 26946, 1, 27043, 1, 27114, 1, 27304, 1, 145059, 1, 27355, 1,
    15384, 1, 27425, 1, 145575, 1, 27476, 1, 15438, 1, 27506, 1, 27551, 1, 27578, 1, 27579, 1, 146061, 1, 138507, 1,
    146170, 1, 27726, 1, 146620, 1, 27839, 1, 27853, 1, 27751, 1, 27926, 1, 27966, 1, 28023, 1, 27969, 1, 28009, 1,
    28024, 1, 28037, 1, 146718, 1, 27956, 1, 28207, 1, 28270, 1, 15667, 1, 28363, 1, 28359, 1, 147153, 1, 28153, 1,
    28526, 1, 147294, 1, 147342, 1, 28614, 1, 28729, 1, 28702, 1, 28699, 1, 15766, 1, 28746, 1, 28797, 1, 28791, 1,
    28845, 1, 132389, 1, 28997, 1, 148067, 1, 29084, 1, 148395, 1, 29224, 1, 29237, 1, 29264, 1, 149000, 1, 29312, 1,
    29333, 1, 149301, 1, 149524, 1, 29562, 1, 29579, 1, 16044, 1, 29605, 1, 16056, 1, 16056, 1, 29767, 1, 29788, 1,
    29809, 1, 29829, 1, 29898, 1, 16155, 1, 29988, 1, 150582, 1, 30014, 1, 150674, 1, 30064, 1, 139679, 1, 30224, 1,
    151457, 1, 151480, 1, 151620, 1, 16380, 1, 16392, 1, 30452, 1, 151795, 1, 151794, 1, 151833, 1, 151859, 1, 30494,
    1, 30495, 1, 30495, 1, 30538, 1, 16441, 1, 30603, 1, 16454, 1, 16534, 1, 152605, 1, 30798, 1, 30860, 1, 30924, 1,
    16611, 1, 153126, 1, 31062, 1, 153242, 1, 153285, 1, 31119, 1, 31211, 1, 16687, 1, 31296, 1, 31306, 1, 31311, 1,
    153980, 1, 154279, 1, 154279, 1, 31470, 1, 16898, 1, 154539, 1, 31686, 1, 31689, 1, 16935, 1, 154752, 1, 31954, 1,
    17056, 1, 31976, 1, 31971, 1, 32000, 1, 155526, 1, 32099, 1, 17153, 1, 32199, 1, 32258, 1, 32325, 1, 17204, 1,
    156200, 1, 156231, 1, 17241, 1, 156377, 1, 32634, 1, 156478, 1, 32661, 1, 32762, 1, 32773, 1, 156890, 1, 156963,
    1, 32864, 1, 157096, 1, 32880, 1, 144223, 1, 17365, 1, 32946, 1, 33027, 1, 17419, 1, 33086, 1, 23221, 1, 157607,
    1, 157621, 1, 144275, 1, 144284, 1, 33281, 1, 33284, 1, 36766, 1, 17515, 1, 33425, 1, 33419, 1, 33437, 1, 21171,
    1, 33457, 1, 33459, 1, 33469, 1, 33510, 1, 158524, 1, 33509, 1, 33565, 1, 33635, 1, 33709, 1, 33571, 1, 33725, 1,
    33767, 1, 33879, 1, 33619, 1, 33738, 1, 33740, 1, 33756, 1, 158774, 1, 159083, 1, 158933, 1, 17707, 1, 34033, 1,
    34035, 1, 34070, 1, 160714, 1, 34148, 1, 159532, 1, 17757, 1, 17761, 1, 159665, 1, 159954, 1, 17771, 1, 34384, 1,
    34396, 1, 34407, 1, 34409, 1, 34473, 1, 34440, 1, 34574, 1, 34530, 1, 34681, 1, 34600, 1, 34667, 1, 34694, 1,
    17879, 1, 34785, 1, 34817, 1, 17913, 1, 34912, 1, 34915, 1, 161383, 1, 35031, 1, 35038, 1, 17973, 1, 35066, 1,
    13499, 1, 161966, 1, 162150, 1, 18110, 1, 18119, 1, 35488, 1, 35565, 1, 35722, 1, 35925, 1, 162984, 1, 36011, 1,
    36033, 1, 36123, 1, 36215, 1, 163631, 1, 133124, 1, 36299, 1, 36284, 1, 36336, 1, 133342, 1, 36564, 1, 36664, 1,
    165330, 1, 165357, 1, 37012, 1, 37105, 1, 37137, 1, 165678, 1, 37147, 1, 37432, 1, 37591, 1, 37592, 1, 37500, 1,
    37881, 1, 37909, 1, 166906, 1, 38283, 1, 18837, 1, 38327, 1, 167287, 1, 18918, 1, 38595, 1, 23986, 1, 38691, 1,
    168261, 1, 168474, 1, 19054, 1, 19062, 1, 38880, 1, 168970, 1, 19122, 1, 169110, 1, 38923, 1, 38923, 1, 38953, 1,
    169398, 1, 39138, 1, 19251, 1, 39209, 1, 39335, 1, 39362, 1, 39422, 1, 19406, 1, 170800, 1, 39698, 1, 40000, 1,
    40189, 1, 19662, 1, 19693, 1, 40295, 1, 172238, 1, 19704, 1, 172293, 1, 172558, 1, 172689, 1, 40635, 1, 19798, 1,
    40697, 1, 40702, 1, 40709, 1, 40719, 1, 40726, 1, 40763, 1, 173568
};
/* ---- end of tables ---- */

enum {
    MFT__N_CANONICAL_PAIRS   = sizeof mft__canonical_pairs   / sizeof(int) / 3,
    MFT__N_CANONICAL_SINGLES = sizeof mft__canonical_singles / sizeof(int) / 2,
    MFT__N_MARK_RUNS         = sizeof mft__mark_runs         / sizeof(int),
    MFT__N_BLOCKS            = 0x110000 / 128       /* of 128 code points; one byte, class and flag, for each */
};

typedef struct mft__canonical { uint32_t whole, first, second; } mft__canonical;    /* second 0: a single */

typedef struct mft__unicode {
    uint16_t       block[MFT__N_BLOCKS];            /* where a code point's block is in `classes`; uniform blocks are shared */
    unsigned char *classes;
    int            n_blocks;                        /* in `classes` */
    /* for NFC, all sorted for binary search */
    uint32_t       mark[MFT__N_MARK_RUNS];          /* first code point of a run << 8 | canonical combining class */
    mft__canonical apart[MFT__N_CANONICAL_PAIRS + MFT__N_CANONICAL_SINGLES];        /* by whole */
    mft__canonical together[MFT__N_CANONICAL_PAIRS];                                /* by first, second */
    int            n_together;
} mft__unicode;

enum { MFT__HANGUL_S = 0xac00, MFT__HANGUL_L = 0x1100, MFT__HANGUL_V = 0x1161, MFT__HANGUL_T = 0x11a7,
       MFT__HANGUL_N_L = 19, MFT__HANGUL_N_V = 21, MFT__HANGUL_N_T = 28,
       MFT__HANGUL_N_S = MFT__HANGUL_N_L * MFT__HANGUL_N_V * MFT__HANGUL_N_T };

static int mft__canonical_by_whole(const void *a, const void *b)
{
    uint32_t x = ((const mft__canonical *)a)->whole, y = ((const mft__canonical *)b)->whole;
    return (x > y) - (x < y);
}

static int mft__canonical_by_parts(const void *a, const void *b)
{
    const mft__canonical *x = (const mft__canonical *)a, *y = (const mft__canonical *)b;
    if (x->first != y->first) return x->first < y->first ? -1 : 1;
    return (x->second > y->second) - (x->second < y->second);
}

static int mft__class_and_flag(const mft__unicode *u, uint32_t c) { return u->classes[u->block[c >> 7] * 128 + (c & 127)]; }
static int mft__class(const mft__unicode *u, uint32_t c) { return mft__class_and_flag(u, c) & MFT__CLASS_MASK; }

/* Gives code points [begin, end) the flag; only blocks that are not shared can have it: see the caller. */
static void mft__unicode_flag(mft__unicode *u, uint32_t begin, uint32_t end)
{
    for (; begin < end; begin++) u->classes[u->block[begin >> 7] * 128 + (begin & 127)] |= MFT__NFC_CARE;
}

static void mft__unicode_destroy(mft_context *ctx, mft__unicode *u)
{
    if (!u) return;
    mft__free(ctx, u->classes, (size_t)u->n_blocks * 128);
    mft__free(ctx, u, sizeof *u);
}

/* About 150 KB; NULL with the sentence set when there is no memory. */
static mft__unicode *mft__unicode_create(mft_context *ctx)
{
    mft__unicode  *u = (mft__unicode *)mft__alloc_zero(ctx, sizeof *u);
    unsigned char *care;
    uint32_t       c, c0;
    int            i, n, k;
    size_t         run;

    if (!u) return NULL;
    care = (unsigned char *)mft__alloc_zero(ctx, MFT__N_BLOCKS);         /* blocks that hold flags, so are not shared */
    if (!care) { mft__free(ctx, u, sizeof *u); return NULL; }

    /* decompositions and marks, and which blocks they touch */
    for (i = n = 0, c = 0; i < MFT__N_CANONICAL_PAIRS; i++, n++) {
        const int *t = mft__canonical_pairs + 3 * i;
        c += (uint32_t)t[0];
        u->apart[n].whole = c; u->apart[n].first = (uint32_t)t[1]; u->apart[n].second = (uint32_t)(t[2] < 0 ? -t[2] : t[2]);
        if (t[2] > 0) u->together[u->n_together++] = u->apart[n];
        if (t[2] < 0) care[c >> 7] = 1; else care[t[2] >> 7] = 1;
    }
    for (i = 0, c = 0; i < MFT__N_CANONICAL_SINGLES; i++, n++) {
        c += (uint32_t)mft__canonical_singles[2 * i];
        u->apart[n].whole = c; u->apart[n].first = (uint32_t)mft__canonical_singles[2 * i + 1];
        care[c >> 7] = 1;
    }
    qsort(u->apart, (size_t)n, sizeof u->apart[0], mft__canonical_by_whole);
    qsort(u->together, (size_t)u->n_together, sizeof u->together[0], mft__canonical_by_parts);
    for (i = 0, c = 0; i < MFT__N_MARK_RUNS; i++) {
        u->mark[i] = c << 8 | (mft__mark_runs[i] & 255);
        c0 = c; c += mft__mark_runs[i] >> 8;
        if (mft__mark_runs[i] & 255) for (; c0 < c; c0++) care[c0 >> 7] = 1;
    }
    for (c = MFT__HANGUL_V; c < MFT__HANGUL_T + MFT__HANGUL_N_T; c++) care[c >> 7] = 1;

    /* classes: blocks 0..5 are uniform, one for each class; the first pass counts the others */
    for (k = 0; k < 2; k++) {
        u->n_blocks = 6;
        for (i = 0, run = 0, c = 0; c < 0x110000; ) {
            const unsigned int *runs = mft__class_runs;
            const int n_runs = (int)(sizeof mft__class_runs / sizeof mft__class_runs[0]);
            uint32_t left = i < n_runs ? (runs[i] >> 3) - (uint32_t)run : 0x110000 - c;
            int      type = i < n_runs ? (int)(runs[i] & 7) : MFT__OTHER_CHAR;
            if (c % 128 == 0 && left >= 128 && !care[c >> 7]) {         /* lies within the run */
                u->block[c >> 7] = (uint16_t)type;
                c += 128; run += 128; left -= 128;
            } else {
                uint32_t take = 128 - c % 128 < left ? 128 - c % 128 : left;
                if (c % 128 == 0) u->block[c >> 7] = (uint16_t)u->n_blocks++;
                if (k) memset(u->classes + u->block[c >> 7] * 128 + c % 128, type, take);
                c += take; run += take; left -= take;
            }
            if (!left) { i++; run = 0; }
        }
        if (k == 0) {
            u->classes = (unsigned char *)mft__alloc(ctx, (size_t)u->n_blocks * 128);
            if (!u->classes) { mft__free(ctx, care, MFT__N_BLOCKS); mft__free(ctx, u, sizeof *u); return NULL; }
            for (n = 0; n < 6; n++) memset(u->classes + n * 128, n, 128);
        }
    }
    mft__free(ctx, care, MFT__N_BLOCKS);

    for (i = 0, c = 0; i < MFT__N_CANONICAL_PAIRS; i++) {
        const int *t = mft__canonical_pairs + 3 * i;
        c += (uint32_t)t[0];
        if (t[2] < 0) mft__unicode_flag(u, c, c + 1);                           /* never in NFC */
        else          mft__unicode_flag(u, (uint32_t)t[2], (uint32_t)t[2] + 1);  /* may compose with the one before */
    }
    for (i = 0, c = 0; i < MFT__N_CANONICAL_SINGLES; i++) {
        c += (uint32_t)mft__canonical_singles[2 * i];
        mft__unicode_flag(u, c, c + 1);
    }
    for (i = 0, c = 0; i < MFT__N_MARK_RUNS; i++) {
        c0 = c; c += mft__mark_runs[i] >> 8;
        if (mft__mark_runs[i] & 255) mft__unicode_flag(u, c0, c);
    }
    mft__unicode_flag(u, MFT__HANGUL_V, MFT__HANGUL_V + MFT__HANGUL_N_V);
    mft__unicode_flag(u, MFT__HANGUL_T + 1, MFT__HANGUL_T + MFT__HANGUL_N_T);
    return u;
}

/* ---- UTF-8, beyond what [JSON] has ---- */

/* The code point at p, of text known to be valid; returns its length. */
static int mft__utf8_next(const unsigned char *p, uint32_t *out)
{
    if (p[0] < 0x80) { *out = p[0]; return 1; }
    if (p[0] < 0xe0) { *out = (uint32_t)(p[0] & 31) << 6 | (p[1] & 63); return 2; }
    if (p[0] < 0xf0) { *out = (uint32_t)(p[0] & 15) << 12 | (uint32_t)(p[1] & 63) << 6 | (p[2] & 63); return 3; }
    *out = (uint32_t)(p[0] & 7) << 18 | (uint32_t)(p[1] & 63) << 12 | (uint32_t)(p[2] & 63) << 6 | (p[3] & 63);
    return 4;
}

/* The length of the character at p, p < end, or minus the length of the longest part of one that begins
 * there (at least 1): what U+FFFD replaces, by Unicode's "maximal subpart" practice. *out_cut, if not NULL:
 * whether it is only the end of the text that is missing. */
static int mft__utf8_length(const unsigned char *p, const unsigned char *end, int *out_cut)
{
    int           n = p[0] < 0x80 ? 1 : p[0] < 0xc2 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : p[0] < 0xf5 ? 4 : 0, i;
    unsigned char low = 0x80, high = 0xbf;          /* of the second byte: no overlong forms, surrogates, > U+10FFFF */

    if (out_cut) *out_cut = 0;
    if (n <= 1) return n ? n : -1;
    if (p[0] == 0xe0) low = 0xa0;
    if (p[0] == 0xed) high = 0x9f;
    if (p[0] == 0xf0) low = 0x90;
    if (p[0] == 0xf4) high = 0x8f;
    for (i = 1; i < n; i++) {
        if (p + i == end) { if (out_cut) *out_cut = 1; return -i; }
        if (p[i] < low || p[i] > high) return -i;
        low = 0x80; high = 0xbf;
    }
    return n;
}

/* How many bytes from p on are whole, valid characters. */
static size_t mft__utf8_valid(const char *text, size_t n)
{
    const unsigned char *p = (const unsigned char *)text, *end = p + n;
    while (p < end) {
        uint64_t eight;
        int      len;
        while (end - p >= 8) {                      /* plain ASCII, eight at a time */
            memcpy(&eight, p, 8);
            if (eight & 0x8080808080808080u) break;
            p += 8;
        }
        if (p == end) break;
        len = mft__utf8_length(p, end, NULL);
        if (len < 0) break;
        p += len;
    }
    return (size_t)(p - (const unsigned char *)text);
}

/* A growing string. It can remember where its bytes come from: see mft__trace. */
typedef struct mft__bytes {
    char     *p;
    size_t    n, cap;
    struct mft__trace *trace;                       /* NULL: does not remember */
    uint32_t *from;                                 /* [n] places in the trace's text */
    size_t    from_cap;
} mft__bytes;

/* A text and the strings made of it, step by step. What is copied from the text or from one of them is known by
 * its address; what is not is said to come from where the copy before it ended. */
typedef struct mft__trace {
    const char *text;
    size_t      n;
    mft__bytes *string[16];
    int         n_strings;
    uint32_t    at;
} mft__trace;

static void mft__bytes_free(mft_context *ctx, mft__bytes *b)
{
    mft__free(ctx, b->p, b->cap);
    mft__free(ctx, b->from, b->from_cap * sizeof *b->from);
    memset(b, 0, sizeof *b);
}

/* The string that has a byte at p (or ends there, with `end`); NULL: the text itself, or none, *out_at -1 then. */
static const mft__bytes *mft__trace_find(const mft__trace *t, const char *p, int end, int64_t *out_at)
{
    uintptr_t at = (uintptr_t)p;
    int       i;
    *out_at = -1;
    for (i = 0; i < t->n_strings; i++) {
        const mft__bytes *b = t->string[i];
        if (b->n && at >= (uintptr_t)b->p && at < (uintptr_t)b->p + b->n + (size_t)end) { *out_at = (int64_t)(at - (uintptr_t)b->p); return b; }
    }
    if (at >= (uintptr_t)t->text && at < (uintptr_t)t->text + t->n + (size_t)end) *out_at = (int64_t)(at - (uintptr_t)t->text);
    return NULL;
}

/* Where in the text the byte at p comes from; for the end of a string, behind all that it has. */
static uint32_t mft__trace_origin(const mft__trace *t, const char *p)
{
    int64_t at;
    const mft__bytes *b = mft__trace_find(t, p, 0, &at);
    if (at < 0) b = mft__trace_find(t, p, 1, &at);
    if (at < 0) return t->at;
    if (!b) return (uint32_t)at;
    return (size_t)at < b->n ? b->from[at] : b->from[at - 1] + 1;
}

static int mft__trace_add(mft_context *ctx, mft__bytes *b, const char *p, size_t n)
{
    mft__trace       *t = b->trace;
    const mft__bytes *parent;
    void             *q = b->from;
    int64_t           at;
    size_t            i;
    if (!mft__grow(ctx, &q, &b->from_cap, b->n + n, sizeof *b->from)) return 0;
    b->from = (uint32_t *)q;
    parent = mft__trace_find(t, p, 0, &at);
    for (i = 0; i < n; i++) b->from[b->n + i] = at < 0 ? t->at : parent ? parent->from[at + (int64_t)i] : (uint32_t)at + (uint32_t)i;
    if (at >= 0 || n == 0) t->at = mft__trace_origin(t, p + n);
    return 1;
}

static int mft__bytes_add(mft_context *ctx, mft__bytes *b, const void *p, size_t n)
{
    if (b->trace && !mft__trace_add(ctx, b, (const char *)p, n)) return 0;
    if (n > b->cap - b->n) {
        void *q = b->p;
        if (n > (size_t)-1 - b->n) { mft__fail(ctx, MFT_ERR_OUT_OF_MEMORY, "a text of that size does not fit an address space"); return 0; }
        if (!mft__grow(ctx, &q, &b->cap, b->n + n, 1)) return 0;
        b->p = (char *)q;
    }
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
    return 1;
}

/* Says that what is added next, and is not in the text, comes from p. */
static int mft__bytes_begin(mft_context *ctx, mft__bytes *b, const char *p) { b->n = 0; return mft__bytes_add(ctx, b, p, 0); }

/* Appends text with U+FFFD for each part that is not UTF-8. */
static int mft__utf8_repair(mft_context *ctx, mft__bytes *out, const char *text, size_t n)
{
    while (n) {
        size_t good = mft__utf8_valid(text, n);
        if (!mft__bytes_add(ctx, out, text, good)) return 0;
        text += good; n -= good;
        if (n) {
            int bad = -mft__utf8_length((const unsigned char *)text, (const unsigned char *)text + n, NULL);
            if (!mft__bytes_add(ctx, out, "\xef\xbf\xbd", 3)) return 0;
            text += bad; n -= (size_t)bad;
        }
    }
    return 1;
}

/* ---- NFC ---- */

static int mft__combining_class(const mft__unicode *u, uint32_t c)
{
    int low = 0, high = MFT__N_MARK_RUNS;           /* mark[low] begins at or before c, mark[high] after it */
    while (high - low > 1) {
        int mid = (low + high) / 2;
        if (u->mark[mid] >> 8 <= c) low = mid; else high = mid;
    }
    /* behind the last run come characters of class 0 */
    return low == MFT__N_MARK_RUNS - 1 && c - (u->mark[low] >> 8) >= mft__mark_runs[low] >> 8 ? 0 : (int)(u->mark[low] & 255);
}

static const mft__canonical *mft__decomposition(const mft__unicode *u, uint32_t c)
{
    mft__canonical key;
    key.whole = c;
    return (const mft__canonical *)bsearch(&key, u->apart, MFT__N_CANONICAL_PAIRS + MFT__N_CANONICAL_SINGLES, sizeof key, mft__canonical_by_whole);
}

/* The character that the two compose to; 0: none. */
static uint32_t mft__compose(const mft__unicode *u, uint32_t a, uint32_t b)
{
    mft__canonical        key;
    const mft__canonical *found;
    if (a - MFT__HANGUL_L < MFT__HANGUL_N_L && b - MFT__HANGUL_V < MFT__HANGUL_N_V)
        return MFT__HANGUL_S + ((a - MFT__HANGUL_L) * MFT__HANGUL_N_V + b - MFT__HANGUL_V) * MFT__HANGUL_N_T;
    if (a - MFT__HANGUL_S < MFT__HANGUL_N_S && (a - MFT__HANGUL_S) % MFT__HANGUL_N_T == 0 && b - MFT__HANGUL_T - 1 < MFT__HANGUL_N_T - 1)
        return a + b - MFT__HANGUL_T;
    key.first = a; key.second = b;
    found = (const mft__canonical *)bsearch(&key, u->together, (size_t)u->n_together, sizeof key, mft__canonical_by_parts);
    return found ? found->whole : 0;
}

/* Characters with their combining class: class << 24 | code point. `spare` is for sorting. */
typedef struct mft__marks { uint32_t *p; size_t n, cap; } mft__marks;

static int mft__marks_add(mft_context *ctx, const mft__unicode *u, mft__marks *m, uint32_t c)
{
    void *q = m->p;
    if (m->n == m->cap) {
        if (!mft__grow(ctx, &q, &m->cap, m->n + 1, sizeof *m->p)) return 0;
        m->p = (uint32_t *)q;
    }
    m->p[m->n++] = (uint32_t)mft__combining_class(u, c) << 24 | c;
    return 1;
}

/* Appends c's full decomposition. Only the first of two is ever taken apart further, so the seconds wait
 * on a stack; Unicode's chains are at most 4 long. */
static int mft__decompose(mft_context *ctx, const mft__unicode *u, mft__marks *m, uint32_t c)
{
    const mft__canonical *d;
    uint32_t later[8];
    int      n = 0;
    if (c - MFT__HANGUL_S < MFT__HANGUL_N_S) {
        uint32_t s = c - MFT__HANGUL_S, t = s % MFT__HANGUL_N_T;
        return mft__marks_add(ctx, u, m, MFT__HANGUL_L + s / (MFT__HANGUL_N_V * MFT__HANGUL_N_T))
            && mft__marks_add(ctx, u, m, MFT__HANGUL_V + s / MFT__HANGUL_N_T % MFT__HANGUL_N_V)
            && (!t || mft__marks_add(ctx, u, m, MFT__HANGUL_T + t));
    }
    while (n < 8 && (d = mft__decomposition(u, c)) != NULL) {
        if (d->second) later[n++] = d->second;
        c = d->first;
    }
    if (!mft__marks_add(ctx, u, m, c)) return 0;
    while (n) if (!mft__marks_add(ctx, u, m, later[--n])) return 0;
    return 1;
}

/* Sorts a run of marks by class, equal ones in the order they have. Long runs by counting, so that a
 * text of nothing but marks takes linear time. */
static int mft__sort_marks(mft_context *ctx, uint32_t *p, size_t n, mft__marks *spare)
{
    size_t i, j, at[256];
    if (n <= 32) {
        for (i = 1; i < n; i++) {
            uint32_t x = p[i];
            for (j = i; j > 0 && p[j - 1] >> 24 > x >> 24; j--) p[j] = p[j - 1];
            p[j] = x;
        }
        return 1;
    }
    if (n > spare->cap) {
        void *q = spare->p;
        if (!mft__grow(ctx, &q, &spare->cap, n, sizeof *p)) return 0;
        spare->p = (uint32_t *)q;
    }
    memset(at, 0, sizeof at);
    for (i = 0; i < n; i++) at[p[i] >> 24]++;
    for (i = j = 0; i < 256; i++) { size_t count = at[i]; at[i] = j; j += count; }
    for (i = 0; i < n; i++) spare->p[at[p[i] >> 24]++] = p[i];
    memcpy(p, spare->p, n * sizeof *p);
    return 1;
}

typedef struct mft__nfc { mft__marks chars, spare; } mft__nfc;     /* scratch, kept from text to text */

static void mft__nfc_free(mft_context *ctx, mft__nfc *s)
{
    mft__free(ctx, s->chars.p, s->chars.cap * sizeof(uint32_t));
    mft__free(ctx, s->spare.p, s->spare.cap * sizeof(uint32_t));
    memset(s, 0, sizeof *s);
}

/* Decomposes, orders and composes one stretch, which begins and ends between characters that do not interact. */
static int mft__nfc_stretch(mft_context *ctx, const mft__unicode *u, mft__nfc *s, const unsigned char *begin, const unsigned char *end, mft__bytes *out)
{
    const unsigned char *p;
    char      utf8[4];
    uint32_t *m, c;
    size_t    i, j, n = 0, starter = (size_t)-1;
    int       last = -1;                            /* class of the latest mark kept behind the starter; -1: none */

    for (s->chars.n = 0, p = begin; p < end; ) {
        p += mft__utf8_next(p, &c);
        if (!mft__decompose(ctx, u, &s->chars, c)) return 0;
    }
    m = s->chars.p;
    for (i = 0; i < s->chars.n; i = j) {
        for (j = i; j < s->chars.n && m[j] >> 24; j++) { }
        if (!mft__sort_marks(ctx, m + i, j - i, &s->spare)) return 0;
        if (j == i) j++;
    }
    for (i = 0; i < s->chars.n; i++) {
        int      type = (int)(m[i] >> 24);
        uint32_t whole = 0;
        if (starter != (size_t)-1 && last < type) whole = mft__compose(u, m[starter] & 0xffffff, m[i] & 0xffffff);
        if (whole) { m[starter] = whole; continue; }
        if (type == 0) { starter = n; last = -1; }
        else           last = type;
        m[n++] = m[i];
    }
    for (i = 0, p = begin; i < n && p < end; i++) {         /* as it was, mostly */
        p += mft__utf8_next(p, &c);
        if ((m[i] & 0xffffff) != c) break;
    }
    if (i == n && p == end) return mft__bytes_add(ctx, out, begin, (size_t)(end - begin));
    for (i = 0; i < n; i++)
        if (!mft__bytes_add(ctx, out, utf8, (size_t)mft__utf8_encode(m[i] & 0xffffff, utf8))) return 0;
    return 1;
}

/* Where text stops being certainly in NFC already: the start of the first character that has the flag, or n. */
static size_t mft__nfc_safe(const mft__unicode *u, const char *text, size_t n)
{
    const unsigned char *p = (const unsigned char *)text, *end = p + n;
    uint32_t c;
    while (p < end) {
        int len;
        if (*p < 0xcc) {                            /* below U+0300 nothing has it */
            if (end - p >= 8) {
                uint64_t eight;
                memcpy(&eight, p, 8);
                if (!(eight & 0x8080808080808080u)) { p += 8; continue; }
            }
            p++;                                    /* byte by byte is safe: following bytes are below 0xcc too */
            continue;
        }
        len = mft__utf8_next(p, &c);
        if (mft__class_and_flag(u, c) & MFT__NFC_CARE) break;
        p += len;
    }
    return (size_t)(p - (const unsigned char *)text);
}

/* Appends text, which is valid UTF-8, in normal form C. Only stretches around characters with the flag are
 * worked on: from the character before (which does not compose with what precedes it) to the next without. */
static int mft__nfc_append(mft_context *ctx, const mft__unicode *u, mft__nfc *s, const char *text, size_t n, mft__bytes *out)
{
    size_t at = 0;
    while (at < n) {
        size_t   begin, end = at + mft__nfc_safe(u, text + at, n - at);
        uint32_t c;
        if (end == n) return mft__bytes_add(ctx, out, text + at, n - at);
        begin = end;
        if (begin > at) do begin--; while ((text[begin] & 0xc0) == 0x80);
        if (!mft__bytes_add(ctx, out, text + at, begin - at)) return 0;
        while (end < n) {
            int len = mft__utf8_next((const unsigned char *)text + end, &c);
            if (!(mft__class_and_flag(u, c) & MFT__NFC_CARE)) break;
            end += (size_t)len;
        }
        if (!mft__nfc_stretch(ctx, u, s, (const unsigned char *)text + begin, (const unsigned char *)text + end, out)) return 0;
        at = end;
    }
    return 1;
}

/* ==============================================================================
 * MARK: - [TOKENIZER] Text to token ids and back
 *
 *   A text goes through these, in this order, all of them as the tokenizer's file has them:
 *     repair        what is not UTF-8 becomes U+FFFD
 *     added tokens  are cut out of the text: leftmost, then longest
 *     normalizer    NFC, replacing, prepending: on each stretch between added tokens
 *     pre-tokenizer cuts stretches into words
 *     BPE           a word's characters or bytes, merged pair by pair, lowest rank first
 *     post-processor puts special tokens before and after
 *
 *   in memory     pieces in one blob; a hash of them, 4 bytes a slot; merges in a hash of 8 bytes
 *                 a slot, which holds both ids and the rank: 14 MB for Gemma
 *   rule          words of a byte-level tokenizer are raw bytes throughout: the printable alphabet
 *                 that stands for bytes in vocabularies exists in files and in lookups by name only
 * ============================================================================== */
enum {
    MFT__MAX_IDS      = (1 << 21) - 1,          /* ids and merges have to fit a slot of 64 bits: 21 + 21 + 22 */
    MFT__MAX_MERGES   = (1 << 22) - 1,
    MFT__MAX_STEPS    = 8,                      /* of a normalizer, a pre-tokenizer, a decoder */
    MFT__SHORT_WORD   = 48,                     /* bytes; longer words are merged by a heap */
    MFT__CACHE_SLOTS  = 1 << 14,
    MFT__CACHE_SLOT   = 64                      /* bytes: length, number of ids, the word, .. the ids at the end */
};
#define MFT__NO_RANK  UINT32_MAX
#define MFT__NO_MERGE UINT64_MAX                /* an empty slot */
#define MFT__META     "\xe2\x96\x81"            /* U+2581, which stands for a space */

enum { MFT__TOKEN_SPECIAL = 1, MFT__TOKEN_ADDED = 2,
       MFT__TOKEN_RAW  = 4,                     /* byte-level: its text is not of the byte alphabet, so it is kept as it is */
       MFT__TOKEN_BYTE = 8,                     /* "<0x0A>" */
       MFT__TOKEN_OUTSIDE = 16 };               /* added, and not in the model's vocabulary: never made of a word's characters */

typedef struct mft__phrase { char s[24]; int n; } mft__phrase;      /* a short string of a tokenizer's settings */

typedef enum mft__normal_kind { MFT__NORMAL_NFC, MFT__NORMAL_REPLACE, MFT__NORMAL_PREPEND, MFT__NORMAL_SQUEEZE } mft__normal_kind;
typedef struct mft__normal { mft__normal_kind kind; mft__phrase from, to; } mft__normal;

typedef enum mft__split_kind {
    MFT__SPLIT_GPT2, MFT__SPLIT_CL100K,         /* patterns, see mft__split_patterns */
    MFT__SPLIT_DIGITS,                          /* numbers from the rest; `digits` 1: one by one */
    MFT__SPLIT_AT,                              /* at every `at`, as `behavior` says */
    MFT__SPLIT_META,                            /* SentencePiece: spaces to `at`, perhaps one more in front, perhaps split before each */
    MFT__SPLIT_PREFIX                           /* a space in front if there is none */
} mft__split_kind;
typedef enum mft__behavior { MFT__ISOLATED, MFT__REMOVED, MFT__WITH_PREVIOUS, MFT__WITH_NEXT, MFT__KEPT_WHOLE } mft__behavior;
typedef enum mft__prepend { MFT__PREPEND_NEVER, MFT__PREPEND_FIRST, MFT__PREPEND_ALWAYS } mft__prepend;
typedef struct mft__split {
    mft__split_kind kind;
    int             digits;                     /* GPT2, CL100K: how many numbers a word takes at most; 0: all */
    mft__phrase     at;
    mft__behavior   behavior;
    mft__prepend    prepend;
} mft__split;

typedef enum mft__decode_kind { MFT__DECODE_BYTES, MFT__DECODE_PIECES, MFT__DECODE_SPACED } mft__decode_kind;

/* Added tokens, sorted by text, so that those that share a beginning stand together. */
typedef struct mft__added { uint32_t at, n; int32_t id; int lstrip, rstrip, single_word, normalized; } mft__added;
typedef struct mft__added_set {
    mft__added *p;
    size_t      n, cap;
    mft__bytes  text;
    uint32_t    first[257];                     /* those that begin with byte b: [first[b], first[b + 1]) */
} mft__added_set;

typedef struct mft__symbol { int32_t id, prev, next; uint32_t rank; } mft__symbol;  /* rank: of the merge with the next */

struct mft_decoder {
    mft__object          object;
    const mft_tokenizer *tok;
    int                  flags;
    mft__bytes           pending;               /* bytes that may be the beginning of a character, or a run of byte tokens */
    mft__bytes           out;
    mft__bytes           piece;
    int64_t              n;                     /* tokens so far */
    int                  strip;                 /* how many more leading characters may go */
};

/* What encoding and decoding write to; kept from call to call. */
typedef struct mft__tok_work {
    mft__bytes     repaired, normal[2], split[MFT__MAX_STEPS];
    mft__nfc       nfc;
    int32_t       *ids;        size_t ids_cap;
    mft__symbol   *symbols;    size_t symbols_cap;
    uint64_t      *heap;       size_t heap_cap;     /* rank << 32 | symbol */
    unsigned char *cache;                           /* words seen: [MFT__CACHE_SLOTS][MFT__CACHE_SLOT] */
    mft_decoder    decoder;
    mft__trace     trace;                           /* for mft__encode_begins */
    int32_t       *out, *begins; int64_t n, cap;    /* of the call that runs */
} mft__tok_work;

struct mft_tokenizer {
    mft__object    object;
    mft_context   *ctx;
    mft__unicode  *unicode;
    uint64_t       seed;                        /* of the hashes */

    mft__bytes     pieces;                      /* of each id: length in 7-bit groups, low ones first; bytes */
    uint32_t      *piece_at;                    /* [n_ids]; UINT32_MAX: no such id */
    unsigned char *flags;                       /* [n_ids] MFT__TOKEN_ */
    int32_t        n_ids, n_vocab;
    uint32_t      *piece_slots;                 /* id + 1, and 11 bits of the hash above it; 0: empty */
    uint32_t       n_piece_slots;
    uint64_t      *merge_slots;                 /* left << 43 | right << 22 | rank */
    uint32_t       n_merge_slots;
    int32_t       *merged;                      /* [n_ranks]: what the merge of that rank gives */
    uint32_t       n_merges, n_ranks;

    int            byte_level;
    int            byte_fallback, fuse_unk, ignore_merges;
    int32_t        unk;
    int32_t        byte_id[256];                /* byte-level: the byte's piece; else the byte token; -1: none */
    int32_t        char_id[128];                /* not byte-level: ASCII characters' pieces */
    int            cut_meta;                    /* a stretch may be cut before U+2581 .. */
    unsigned char  joins_meta[256];             /* .. unless this is the last byte before it: see mft__tok_cuts */
    short          alphabet[324];               /* byte of a code point in byte-level vocabularies; -1: none */

    mft__added_set added[2];                    /* looked for in the text; in the normalized text */
    mft__normal    normal[MFT__MAX_STEPS]; int n_normal;
    mft__split     split[MFT__MAX_STEPS];  int n_split;
    int32_t        before[8], after[8];    int n_before, n_after;       /* added around a text */
    mft__decode_kind decode;
    mft__normal    decode_replace;              /* from.n 0: none */
    int            decode_bare_first;           /* it takes away, instead of replacing, in the first token */
    int            decode_fallback;             /* runs of byte tokens are put together */
    mft__phrase    decode_strip; int n_decode_strip;

    int32_t        bos, eos, pad;
    size_t         bytes;                       /* it took when loaded */
    char           kind[128];
    mft__tok_work *work;
    mft_chat_template *chat;                    /* the snapshot's; NULL: it has none. See [CHAT] */
};

static int mft__hex_digit(int c)                /* its value, or -1 */
{
    if (c >= '0' && c <= '9') return c - '0';
    c |= 32;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* ---- pieces and merges ---- */

static const char *mft__token_bytes(const mft_tokenizer *t, int32_t id, size_t *out_bytes)     /* id has a token */
{
    const unsigned char *p = (const unsigned char *)t->pieces.p + t->piece_at[id];
    size_t n = *p & 127;
    int    shift = 7;
    while (*p++ & 128) { n |= (size_t)(*p & 127) << shift; shift += 7; }
    *out_bytes = n;
    return (const char *)p;
}

/* The id of a token by its bytes, -1 if there is none. type: 0 for the model's pieces, else MFT__TOKEN_RAW,
 * MFT__TOKEN_OUTSIDE or both. */
static int32_t mft__piece_find(const mft_tokenizer *t, const char *p, size_t n, int type)
{
    uint32_t h = mft__hash(p, n, t->seed), i, tag = h << 21, s;
    size_t   m;
    if (!t->n_piece_slots) return -1;
    for (i = (uint32_t)((uint64_t)h * t->n_piece_slots >> 32); (s = t->piece_slots[i]) != 0; i = i + 1 == t->n_piece_slots ? 0 : i + 1) {
        if (((s ^ tag) >> 21) == 0) {
            int32_t     id = (int32_t)(s & 0x1fffff) - 1;
            const char *q = mft__token_bytes(t, id, &m);
            if (m == n && memcmp(p, q, n) == 0 && (t->flags[id] & (MFT__TOKEN_RAW | MFT__TOKEN_OUTSIDE)) == type) return id;
        }
    }
    return -1;
}

static uint32_t mft__merge_slot(const mft_tokenizer *t, uint64_t key)
{
    uint64_t h = (key >> 22) * (t->seed | 1);
    h = (h ^ h >> 29) * 0xbf58476d1ce4e5b9u;
    return (uint32_t)((h >> 32) * t->n_merge_slots >> 32);
}

static uint32_t mft__merge_rank(const mft_tokenizer *t, int32_t left, int32_t right)
{
    uint64_t key = (uint64_t)left << 43 | (uint64_t)right << 22, s;
    uint32_t i = mft__merge_slot(t, key);
    while ((s = t->merge_slots[i]) != MFT__NO_MERGE) {
        if ((s ^ key) >> 22 == 0) return (uint32_t)(s & 0x3fffff);
        if (++i == t->n_merge_slots) i = 0;
    }
    return MFT__NO_RANK;
}

/* ---- BPE ---- */

static int mft__grow_ids(mft_context *ctx, mft__tok_work *w, size_t n)
{
    void *q = w->ids;
    if (!mft__grow(ctx, &q, &w->ids_cap, n, sizeof *w->ids)) return 0;
    w->ids = (int32_t *)q;
    return 1;
}

/* The piece of the character (byte-level: the byte) at p, of `len` bytes; -1: it has none. *bytes: but byte tokens. */
static int32_t mft__bpe_symbol(const mft_tokenizer *t, const unsigned char *p, int *len, int *bytes)
{
    int32_t  id;
    uint32_t c;
    int      i;
    *len = 1; *bytes = 0;
    if (t->byte_level)  id = t->byte_id[*p];
    else if (*p < 0x80) id = t->char_id[*p];
    else {
        *len = mft__utf8_next(p, &c);
        id = mft__piece_find(t, (const char *)p, (size_t)*len, 0);
    }
    if (id >= 0 || !t->byte_fallback) return id;
    for (*bytes = 1, i = 0; i < *len; i++) *bytes &= t->byte_id[p[i]] >= 0;
    return -1;
}

/* What a word starts as: a symbol for each byte or character, known or not. At most n of them.
 * As in the reference, characters that have byte tokens go ahead of an unknown one that is still open. */
static size_t mft__bpe_symbols(const mft_tokenizer *t, const unsigned char *p, size_t n, int32_t *ids)
{
    const unsigned char *end = p + n;
    size_t count = 0;
    int    unknown = 0, len, bytes, i;
    for (; p < end; p += len) {
        int32_t id = mft__bpe_symbol(t, p, &len, &bytes);
        if (id >= 0) {
            if (unknown) { ids[count++] = t->unk; unknown = 0; }
            ids[count++] = id;
        } else if (bytes) {
            for (i = 0; i < len; i++) ids[count++] = t->byte_id[p[i]];
        } else if (t->unk >= 0) {
            if (unknown && !t->fuse_unk) ids[count++] = t->unk;
            unknown = 1;
        }
    }
    if (unknown) ids[count++] = t->unk;
    return count;
}

/* Few symbols: the lowest rank is looked for each time. Returns how many are left. */
static size_t mft__bpe_short(const mft_tokenizer *t, int32_t *ids, size_t n)
{
    uint32_t rank[MFT__SHORT_WORD];             /* of each symbol with the next; none for the last */
    size_t   i, best;
    if (!n) return 0;
    for (i = 0; i + 1 < n; i++) rank[i] = mft__merge_rank(t, ids[i], ids[i + 1]);
    rank[n - 1] = MFT__NO_RANK;
    for (;;) {
        for (best = 0, i = 1; i < n; i++) if (rank[i] < rank[best]) best = i;
        if (rank[best] == MFT__NO_RANK) return n;
        ids[best] = t->merged[rank[best]];
        n--;
        for (i = best + 1; i < n; i++) { ids[i] = ids[i + 1]; rank[i] = rank[i + 1]; }
        rank[best] = best + 1 < n ? mft__merge_rank(t, ids[best], ids[best + 1]) : MFT__NO_RANK;
        if (best) rank[best - 1] = mft__merge_rank(t, ids[best - 1], ids[best]);
    }
}

static void mft__heap_down(uint64_t *heap, size_t n, size_t i)
{
    uint64_t x = heap[i];
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= n) break;
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= x) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = x;
}

static int mft__heap_push(mft_context *ctx, mft__tok_work *w, size_t *n, uint64_t x)
{
    size_t i = *n;
    void  *q = w->heap;
    if (i == w->heap_cap) {
        if (!mft__grow(ctx, &q, &w->heap_cap, i + 1, sizeof *w->heap)) return 0;
        w->heap = (uint64_t *)q;
    }
    for (; i > 0 && w->heap[(i - 1) / 2] > x; i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = x;
    ++*n;
    return 1;
}

/* Many symbols: a linked list and a heap of possible merges, lowest rank first, then leftmost. An entry is
 * stale when its symbol's merge is another by now. O(n log n). Works on w->ids; -1 without memory. */
static int64_t mft__bpe_long(const mft_tokenizer *t, size_t n)
{
    mft__tok_work *w = t->work;
    mft__symbol   *s;
    size_t         heap = 0, i, left = 0;
    void          *q = w->symbols;

    if (!n) return 0;
    if (!mft__grow(t->ctx, &q, &w->symbols_cap, n, sizeof *s)) return -1;
    w->symbols = s = (mft__symbol *)q;
    for (i = 0; i < n; i++) {
        s[i].id = w->ids[i]; s[i].prev = (int32_t)i - 1; s[i].next = i + 1 < n ? (int32_t)i + 1 : -1;
        s[i].rank = i + 1 < n ? mft__merge_rank(t, w->ids[i], w->ids[i + 1]) : MFT__NO_RANK;
        heap += s[i].rank != MFT__NO_RANK;
    }
    q = w->heap;
    if (!mft__grow(t->ctx, &q, &w->heap_cap, heap, sizeof *w->heap)) return -1;
    w->heap = (uint64_t *)q;
    for (i = heap = 0; i < n; i++) if (s[i].rank != MFT__NO_RANK) w->heap[heap++] = (uint64_t)s[i].rank << 32 | i;
    for (i = heap / 2; i-- > 0; ) mft__heap_down(w->heap, heap, i);

    while (heap) {
        uint64_t top = w->heap[0];
        int32_t  a = (int32_t)(top & 0xffffffffu), b = s[a].next;
        w->heap[0] = w->heap[--heap];
        if (heap) mft__heap_down(w->heap, heap, 0);
        if (s[a].rank != (uint32_t)(top >> 32)) continue;
        s[a].id   = t->merged[s[a].rank];
        s[a].next = s[b].next;
        s[b].rank = MFT__NO_RANK;
        s[a].rank = MFT__NO_RANK;
        if (s[a].next >= 0) {
            s[s[a].next].prev = a;
            s[a].rank = mft__merge_rank(t, s[a].id, s[s[a].next].id);
            if (s[a].rank != MFT__NO_RANK && !mft__heap_push(t->ctx, w, &heap, (uint64_t)s[a].rank << 32 | (uint32_t)a)) return -1;
        }
        if ((b = s[a].prev) >= 0) {
            s[b].rank = mft__merge_rank(t, s[b].id, s[a].id);
            if (s[b].rank != MFT__NO_RANK && !mft__heap_push(t->ctx, w, &heap, (uint64_t)s[b].rank << 32 | (uint32_t)b)) return -1;
        }
    }
    for (i = 0; i != (size_t)-1; i = s[i].next < 0 ? (size_t)-1 : (size_t)s[i].next) w->ids[left++] = s[i].id;
    return (int64_t)left;
}

static void mft__emit(mft__tok_work *w, const int32_t *ids, size_t n)
{
    size_t i;
    for (i = 0; i < n; i++, w->n++) if (w->n < w->cap) w->out[w->n] = ids[i];
}

/* One token, which begins at p or, without p, at `at` of the whole text. */
static void mft__emit_at(mft__tok_work *w, int32_t id, const char *p, uint32_t at)
{
    if (w->begins && w->n < w->cap) w->begins[w->n] = (int32_t)(p ? mft__trace_origin(&w->trace, p) : at);
    mft__emit(w, &id, 1);
}

/* Whether the character at `at` has neither a piece nor byte tokens. Not in the middle of one. */
static int mft__bpe_unknown(const mft_tokenizer *t, const char *p, size_t n, size_t at, int *len)
{
    int bytes;
    return at < n && (t->byte_level || (p[at] & 0xc0) != 0x80)
        && mft__bpe_symbol(t, (const unsigned char *)p + at, len, &bytes) < 0 && !bytes;
}

/* The tokens of a word, each with where it begins: behind what the one before stands for. */
static void mft__emit_word(const mft_tokenizer *t, const char *p, size_t n, const int32_t *ids, size_t count)
{
    size_t i, at = 0, m;
    int    len;
    if (!t->work->begins) { mft__emit(t->work, ids, count); return; }
    for (i = 0; i < count; i++) {
        const char *piece = mft__token_bytes(t, ids[i], &m);
        int         there = m <= n - at && memcmp(p + at, piece, m) == 0;
        while (t->unk < 0 && mft__bpe_unknown(t, p, n, at, &len)) { at += (size_t)len; there = m <= n - at && memcmp(p + at, piece, m) == 0; }    /* dropped */
        if (there && (t->flags[ids[i]] & MFT__TOKEN_BYTE) && t->char_id[0x3c] < 0) there = 0;     /* "<0x3C>" in the text, and '<' is a byte token */
        mft__emit_at(t->work, ids[i], p + at, 0);
        if (there) at += m;
        else if (ids[i] != t->unk) at += at < n;                /* a byte token */
        else while (mft__bpe_unknown(t, p, n, at, &len)) {
            at += (size_t)len;
            if (!t->fuse_unk) break;
        }
    }
}

/* One word: what the merges make of it, by way of the cache when it is short. 0 without memory. */
static int mft__word(const mft_tokenizer *t, const char *p, size_t n)
{
    mft__tok_work *w = t->work;
    int32_t        few[MFT__SHORT_WORD], *ids = few, id;
    unsigned char *slot = NULL;
    int64_t        count;

    if (n < MFT__CACHE_SLOT - 6) {
        slot = w->cache + (size_t)(mft__hash(p, n, t->seed) & (MFT__CACHE_SLOTS - 1)) * MFT__CACHE_SLOT;
        if (slot[0] == n && n && memcmp(slot + 2, p, n) == 0) {
            memcpy(few, slot + MFT__CACHE_SLOT - 4 * slot[1], 4 * (size_t)slot[1]);
            mft__emit_word(t, p, n, few, slot[1]);
            return 1;
        }
    }
    if (t->ignore_merges && (id = mft__piece_find(t, p, n, 0)) >= 0) {
        few[0] = id; count = 1;
    } else if (n <= MFT__SHORT_WORD) {
        count = (int64_t)mft__bpe_short(t, few, mft__bpe_symbols(t, (const unsigned char *)p, n, few));
    } else {
        if (!mft__grow_ids(t->ctx, w, n)) return 0;
        count = mft__bpe_long(t, mft__bpe_symbols(t, (const unsigned char *)p, n, w->ids));
        if (count < 0) return 0;
        ids = w->ids;
    }
    mft__emit_word(t, p, n, ids, (size_t)count);
    if (slot && 2 + n + 4 * (size_t)count <= MFT__CACHE_SLOT) {
        slot[0] = (unsigned char)n; slot[1] = (unsigned char)count;
        memcpy(slot + 2, p, n);
        memcpy(slot + MFT__CACHE_SLOT - 4 * count, ids, 4 * (size_t)count);
    }
    return 1;
}

/* Without a pre-tokenizer a whole book is one word. But no merge of a SentencePiece vocabulary reaches from
 * a character over to a following U+2581, or from few characters only, so cutting there changes nothing. */
static int mft__words(const mft_tokenizer *t, const char *p, size_t n)
{
    const char *end = p + n, *q;
    if (!t->cut_meta) return n == 0 || mft__word(t, p, n);
    for (q = p; q < end; q++) {
        q = (const char *)memchr(q + (q == p), '\xe2', (size_t)(end - q) - (q == p));
        if (!q) break;
        if (end - q < 3 || memcmp(q, MFT__META, 3) != 0 || t->joins_meta[(unsigned char)q[-1]]
            || (q - p >= 3 && memcmp(q - 3, MFT__META, 3) == 0)) continue;
        if (!mft__word(t, p, (size_t)(q - p))) return 0;
        p = q;
    }
    return p == end || mft__word(t, p, (size_t)(end - p));
}

/* ---- pre-tokenizers ---- */
#define MFT__IS(type) (1 << (type))
enum {
    MFT__LETTERS = MFT__IS(MFT__LETTER),
    MFT__NUMBERS = MFT__IS(MFT__NUMBER) | MFT__IS(MFT__NUMERAL),
    MFT__SPACES  = MFT__IS(MFT__SPACE),
    MFT__OTHERS  = MFT__IS(MFT__OTHER_CHAR) | MFT__IS(MFT__WORD)            /* [^\s\p{L}\p{N}] */
};

/* The set with just the class of the character at p, whose length goes to *len; 0 at the end. */
static int mft__set_at(const mft__unicode *u, const unsigned char *p, const unsigned char *end, int *len)
{
    uint32_t c;
    *len = 0;
    if (p == end) return 0;
    *len = mft__utf8_next(p, &c);
    return MFT__IS(mft__class(u, c));
}

/* Past the characters of a set, at most `most` of them (0: all). */
static const unsigned char *mft__past(const mft__unicode *u, const unsigned char *p, const unsigned char *end, int set, int most)
{
    const unsigned char *ascii = u->classes + u->block[0] * 128;
    int n = 0;
    while (p < end) {
        int len = 1;
        if (*p < 0x80 ? !(MFT__IS(ascii[*p]) & set) : !(mft__set_at(u, p, end, &len) & set)) break;
        p += len;
        if (++n == most) break;
    }
    return p;
}

static const unsigned char *mft__before(const unsigned char *p)         /* the start of the character that ends at p */
{
    do p--; while ((*p & 0xc0) == 0x80);
    return p;
}

/* \s+(?!\S)|\s+ : all the blanks at the end of a text, else all but the last one, which goes with what follows. */
static const unsigned char *mft__blanks(const unsigned char *p, const unsigned char *past, const unsigned char *end)
{
    const unsigned char *last = mft__before(past);
    return past == end || last == p ? past : last;
}

/* '(?:[sdmt]|ll|ve|re) : the length of the contraction at p, 0 if there is none. any_case: upper case as well,
 * and U+017F, which is an s then. */
static int mft__contraction(const unsigned char *p, const unsigned char *end, int any_case)
{
    int a, b;
    if (end - p < 2 || *p != '\'') return 0;
    if (any_case && end - p >= 3 && p[1] == 0xc5 && p[2] == 0xbf) return 3;
    a = p[1]; b = end - p > 2 ? p[2] : 0;
    if (any_case && a < 0x80) a |= 32;
    if (any_case && b < 0x80) b |= 32;
    if (a == 's' || a == 'd' || a == 'm' || a == 't') return 2;
    return (a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e') ? 3 : 0;
}

/* Where the word at p ends:   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+  */
static const unsigned char *mft__split_gpt2(const mft__unicode *u, const unsigned char *p, const unsigned char *end, int digits)
{
    const unsigned char *q = p + (*p == ' ');
    int len = mft__contraction(p, end, 0), set;
    if (len) return p + len;
    set = mft__set_at(u, q, end, &len);
    if (set & MFT__LETTERS) return mft__past(u, q + len, end, MFT__LETTERS, 0);
    if (set & MFT__NUMBERS) return mft__past(u, q, end, MFT__NUMBERS, digits);
    if (set & MFT__OTHERS)  return mft__past(u, q + len, end, MFT__OTHERS, 0);
    return mft__blanks(p, mft__past(u, p, end, MFT__SPACES, 0), end);
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+  */
static const unsigned char *mft__split_cl100k(const mft__unicode *u, const unsigned char *p, const unsigned char *end, int digits)
{
    const unsigned char *q, *r;
    int len = mft__contraction(p, end, 1), next, set;
    if (len) return p + len;
    set = mft__set_at(u, p, end, &len);
    if (set & MFT__LETTERS) return mft__past(u, p + len, end, MFT__LETTERS, 0);
    if (set & MFT__NUMBERS) return mft__past(u, p, end, MFT__NUMBERS, digits);
    if (*p != '\r' && *p != '\n' && mft__set_at(u, p + len, end, &next) & MFT__LETTERS)
        return mft__past(u, p + len + next, end, MFT__LETTERS, 0);
    q = p + (*p == ' ');
    if (mft__set_at(u, q, end, &next) & MFT__OTHERS) {
        q = mft__past(u, q + next, end, MFT__OTHERS, 0);
        while (q < end && (*q == '\r' || *q == '\n')) q++;
        return q;
    }
    q = mft__past(u, p, end, MFT__SPACES, 0);
    for (r = q; r > p; r--) if (r[-1] == '\r' || r[-1] == '\n') return r;   /* all blanks up to the last line end */
    return mft__blanks(p, q, end);
}

/* Gives [p, p + n) to the steps from `step` on. first: it starts where the text does. The depth is the number
 * of steps, not of characters. */
static int mft__pre_tokenize(const mft_tokenizer *t, int step, const char *text, size_t n, int first)
{
    const mft__split    *s = &t->split[step];
    const unsigned char *p = (const unsigned char *)text, *end = p + n, *q, *found, *past;
    mft__bytes          *b;

    if (!n) return 1;
    if (step == t->n_split) return mft__words(t, text, n);
    switch (s->kind) {
    case MFT__SPLIT_GPT2:
    case MFT__SPLIT_CL100K:
    case MFT__SPLIT_DIGITS:
        for (; p < end; p = q, first = 0) {
            if (s->kind == MFT__SPLIT_GPT2)        q = mft__split_gpt2(t->unicode, p, end, s->digits);
            else if (s->kind == MFT__SPLIT_CL100K) q = mft__split_cl100k(t->unicode, p, end, s->digits);
            else {
                q = mft__past(t->unicode, p, end, MFT__NUMBERS, s->digits);
                if (q == p) q = mft__past(t->unicode, p, end, MFT__LETTERS | MFT__SPACES | MFT__OTHERS, 0);
            }
            if (!mft__pre_tokenize(t, step + 1, (const char *)p, (size_t)(q - p), first)) return 0;
        }
        return 1;

    case MFT__SPLIT_PREFIX:
        if (*p == ' ') return mft__pre_tokenize(t, step + 1, text, n, first);
        b = &t->work->split[step];
        return mft__bytes_begin(t->ctx, b, text) && mft__bytes_add(t->ctx, b, " ", 1) && mft__bytes_add(t->ctx, b, text, n)
            && mft__pre_tokenize(t, step + 1, b->p, b->n, first);

    case MFT__SPLIT_META:
        b = &t->work->split[step];
        if (!mft__bytes_begin(t->ctx, b, text)) return 0;
        if ((s->prepend == MFT__PREPEND_ALWAYS || (s->prepend == MFT__PREPEND_FIRST && first))
            && *p != ' ' && !(n >= (size_t)s->at.n && memcmp(p, s->at.s, (size_t)s->at.n) == 0)
            && !mft__bytes_add(t->ctx, b, s->at.s, (size_t)s->at.n)) return 0;
        for (; p < end; p = q) {
            q = (const unsigned char *)memchr(p, ' ', (size_t)(end - p));
            if (!q) q = end;
            if (!mft__bytes_add(t->ctx, b, p, (size_t)(q - p))) return 0;
            if (q < end && !mft__bytes_add(t->ctx, b, s->at.s, (size_t)s->at.n)) return 0;
            q += q < end;
        }
        p = (const unsigned char *)b->p; end = p + b->n;
        break;

    case MFT__SPLIT_AT:
        break;
    }
    /* at each occurrence of `at` */
    for (q = p; p < end; ) {
        if (s->behavior == MFT__KEPT_WHOLE) found = end;
        else for (found = q; found < end; found++) {
            found = (const unsigned char *)memchr(found, s->at.s[0], (size_t)(end - found));
            if (!found) { found = end; break; }
            if (end - found >= s->at.n && memcmp(found, s->at.s, (size_t)s->at.n) == 0) break;
        }
        past = found < end ? found + s->at.n : end;
        q = past;                                               /* look for the next one from there */
        if (s->behavior == MFT__WITH_PREVIOUS) found = past;
        if (!mft__pre_tokenize(t, step + 1, (const char *)p, (size_t)(found - p), first)) return 0;
        if (found > p) first = 0;
        if (s->behavior == MFT__ISOLATED && found < past) {
            if (!mft__pre_tokenize(t, step + 1, (const char *)found, (size_t)(past - found), first)) return 0;
            first = 0;
        }
        p = s->behavior == MFT__WITH_NEXT ? found : past;
    }
    return 1;
}

/* ---- normalizer ---- */

/* Appends text with every `from` replaced. */
static int mft__replace_all(mft_context *ctx, mft__bytes *out, const char *p, size_t n, const mft__normal *r)
{
    const char *end = p + n, *q = p;
    while ((q = (const char *)memchr(q, r->from.s[0], (size_t)(end - q))) != NULL) {
        if (end - q < r->from.n || memcmp(q, r->from.s, (size_t)r->from.n) != 0) { q++; continue; }
        if (!mft__bytes_add(ctx, out, p, (size_t)(q - p)) || !mft__bytes_add(ctx, out, r->to.s, (size_t)r->to.n)) return 0;
        p = q += r->from.n;
    }
    return mft__bytes_add(ctx, out, p, (size_t)(end - p));
}

/* Puts *text through the normalizer; it then points at the text itself or into the scratch. */
static int mft__normalize(const mft_tokenizer *t, const char **text, size_t *n)
{
    mft__tok_work *w = t->work;
    int i, k = 0;
    for (i = 0; i < t->n_normal && *n; i++) {
        const mft__normal *s = &t->normal[i];
        mft__bytes        *b = &w->normal[k];
        const char        *p = *text;
        size_t             j, m = *n;
        int                ok = 1;
        if (s->kind == MFT__NORMAL_NFC     && mft__nfc_safe(t->unicode, p, m) == m) continue;
        if (s->kind == MFT__NORMAL_REPLACE && !memchr(p, s->from.s[0], m)) continue;
        if (!mft__bytes_begin(t->ctx, b, p)) return 0;
        switch (s->kind) {
        case MFT__NORMAL_NFC:     ok = mft__nfc_append(t->ctx, t->unicode, &w->nfc, p, m, b); break;
        case MFT__NORMAL_REPLACE: ok = mft__replace_all(t->ctx, b, p, m, s); break;
        case MFT__NORMAL_PREPEND: ok = mft__bytes_add(t->ctx, b, s->to.s, (size_t)s->to.n) && mft__bytes_add(t->ctx, b, p, m); break;
        case MFT__NORMAL_SQUEEZE:                       /* no space at either end, and one where there were more */
            while (m && p[m - 1] == ' ') m--;
            for (j = 0; j < m && ok; j++) if (p[j] != ' ' || (b->n && p[j - 1] != ' ')) ok = mft__bytes_add(t->ctx, b, p + j, 1);
            break;
        }
        if (!ok) return 0;
        *text = b->p; *n = b->n;
        k = !k;
    }
    return 1;
}

/* ---- added tokens ---- */

/* The first place at or after `from` where an added token stands, the longest there; NULL if none does. */
static const mft__added *mft__added_find(const mft__added_set *set, const char *text, size_t n, size_t from, size_t *out_at)
{
    size_t at;
    for (at = from; at < n; at++) {
        uint32_t low = set->first[(unsigned char)text[at]], high = set->first[(unsigned char)text[at] + 1], depth = 1;
        const mft__added *best = NULL;
        while (low < high) {                            /* [low, high) begin with the `depth` bytes at `at` */
            uint32_t a = low, b = high, mid;
            int      c;
            if (set->p[low].n == depth) { best = &set->p[low++]; a = low; }
            if (at + depth == n || low == high) break;
            c = (unsigned char)text[at + depth];
            while (a < b) {
                mid = a + (b - a) / 2;
                if ((unsigned char)set->text.p[set->p[mid].at + depth] < c) a = mid + 1; else b = mid;
            }
            low = a; b = high;
            while (a < b) {
                mid = a + (b - a) / 2;
                if ((unsigned char)set->text.p[set->p[mid].at + depth] <= c) a = mid + 1; else b = mid;
            }
            high = a;
            depth++;
        }
        if (best) { *out_at = at; return best; }
    }
    return NULL;
}

/* Whether the character that begins (ends) at p is of the set. */
static int mft__begins_in_set(const mft__unicode *u, const char *p, const char *end, int set)
{
    int len;
    return (mft__set_at(u, (const unsigned char *)p, (const unsigned char *)end, &len) & set) != 0;
}

static int mft__ends_in_set(const mft__unicode *u, const char *begin, const char *p, int set)
{
    return p > begin && mft__begins_in_set(u, (const char *)mft__before((const unsigned char *)p), p, set);
}

static int mft__encode_stretch(const mft_tokenizer *t, const char *text, size_t n, int first, int which, int flags);

/* Cuts out the added tokens of one set; what is between them goes on. A token that is passed over (special text
 * as plain text, not a word of its own) hides those inside it, as in the reference. */
static int mft__cut_added(const mft_tokenizer *t, const char *text, size_t n, int first, int which, int flags)
{
    const mft__added_set *set = &t->added[which];
    const int   word = MFT__LETTERS | MFT__IS(MFT__NUMBER) | MFT__IS(MFT__WORD);       /* \w */
    size_t      from = 0, done = 0, at;
    const mft__added *a;

    while ((a = mft__added_find(set, text, n, from, &at)) != NULL) {
        size_t begin = at, end = at + a->n;
        from = end;
        if ((flags & MFT_NO_PARSE_SPECIAL) && (t->flags[a->id] & MFT__TOKEN_SPECIAL)) continue;
        if (a->single_word && (mft__ends_in_set(t->unicode, text, text + begin, word)
                               || mft__begins_in_set(t->unicode, text + end, text + n, word))) continue;
        if (a->lstrip) {
            if (begin < done) begin = done;             /* the blanks behind the last token are its own */
            while (begin > done && mft__ends_in_set(t->unicode, text + done, text + begin, MFT__SPACES))
                begin = (size_t)((const char *)mft__before((const unsigned char *)text + begin) - text);
        }
        if (a->rstrip)
            end = (size_t)((const char *)mft__past(t->unicode, (const unsigned char *)text + end, (const unsigned char *)text + n, MFT__SPACES, 0) - text);
        if (begin >= end) continue;                     /* nothing is left of it */
        if (begin > done && !mft__encode_stretch(t, text + done, begin - done, first && !done, which + 1, flags)) return 0;
        mft__emit_at(t->work, a->id, text + begin, 0);
        done = end;
    }
    return done >= n || mft__encode_stretch(t, text + done, n - done, first && !done, which + 1, flags);
}

/* which 0: raw text; 1: between the raw added tokens, to be normalized; 2: between those in the normalized text */
static int mft__encode_stretch(const mft_tokenizer *t, const char *text, size_t n, int first, int which, int flags)
{
    if (which == 1 && !mft__normalize(t, &text, &n)) return 0;
    if (which == 2) return mft__pre_tokenize(t, 0, text, n, first);
    if (t->added[which].n) return mft__cut_added(t, text, n, first, which, flags);
    return mft__encode_stretch(t, text, n, first, which + 1, flags);
}

/* ---- encode ---- */

static void mft__work_trim(mft_context *ctx, mft__tok_work *w)
{
    size_t large = (size_t)1 << 20;             /* what a long text needed is not kept */
    int    i;
    if (w->repaired.cap > large) mft__bytes_free(ctx, &w->repaired);
    for (i = 0; i < 2; i++) if (w->normal[i].cap > large) mft__bytes_free(ctx, &w->normal[i]);
    for (i = 0; i < MFT__MAX_STEPS; i++) if (w->split[i].cap > large) mft__bytes_free(ctx, &w->split[i]);
    if (w->nfc.chars.cap + w->nfc.spare.cap > large / 4) mft__nfc_free(ctx, &w->nfc);
    if (w->decoder.pending.cap > large) mft__bytes_free(ctx, &w->decoder.pending);
    if (w->decoder.out.cap > large)     mft__bytes_free(ctx, &w->decoder.out);
    if (w->symbols_cap > large / 16) {
        mft__free(ctx, w->ids, w->ids_cap * sizeof *w->ids);             w->ids = NULL;     w->ids_cap = 0;
        mft__free(ctx, w->symbols, w->symbols_cap * sizeof *w->symbols); w->symbols = NULL; w->symbols_cap = 0;
        mft__free(ctx, w->heap, w->heap_cap * sizeof *w->heap);          w->heap = NULL;    w->heap_cap = 0;
    }
}

/* mft_tokenizer_encode; begins, if not NULL, gets for each id the byte of the text where it begins: they never
 * decrease; what comes before a text is at 0, what comes after at its end. Of what NFC composes it is the first. */
static int64_t mft__encode_begins(const mft_tokenizer *tok, const char *text, int64_t bytes, int flags, int32_t *ids, int32_t *begins, int64_t cap)
{
    mft__tok_work *w;
    size_t         n;
    int            i, ok = 1;

    if (!tok) return MFT_ERR_INVALID_ARGUMENT;
    if (cap < 0 || (!ids && cap) || (!text && bytes)) return mft__fail(tok->ctx, MFT_ERR_INVALID_ARGUMENT, "mft_tokenizer_encode: no text, or no room for the ids");
    n = bytes < 0 ? strlen(text) : (size_t)bytes;
    if (n > (size_t)1 << 29)                    /* three times that, as U+FFFD, still has an index of 31 bits */
        return mft__fail(tok->ctx, MFT_ERR_INVALID_ARGUMENT, "mft_tokenizer_encode: a text of %llu bytes; up to 2^29 are read at a time", (unsigned long long)n);
    w = tok->work;
    w->out = ids; w->begins = begins; w->n = 0; w->cap = cap;
    if (!w->cache && !(w->cache = (unsigned char *)mft__alloc_zero(tok->ctx, (size_t)MFT__CACHE_SLOTS * MFT__CACHE_SLOT))) return MFT_ERR_OUT_OF_MEMORY;
    if (begins) {
        mft__trace *t = &w->trace;
        t->text = text; t->n = n; t->at = 0; t->n_strings = 0;
        t->string[t->n_strings++] = &w->repaired;
        for (i = 0; i < 2; i++)            t->string[t->n_strings++] = &w->normal[i];
        for (i = 0; i < tok->n_split; i++) t->string[t->n_strings++] = &w->split[i];
        for (i = 0; i < t->n_strings; i++) { t->string[i]->trace = t; t->string[i]->n = 0; }
    }

    for (i = 0; i < tok->n_before && !(flags & MFT_NO_ADD_SPECIAL); i++) mft__emit_at(w, tok->before[i], NULL, 0);
    if (n && mft__utf8_valid(text, n) != n) {
        ok = mft__bytes_begin(tok->ctx, &w->repaired, text) && mft__utf8_repair(tok->ctx, &w->repaired, text, n);
        if (ok) ok = mft__encode_stretch(tok, w->repaired.p, w->repaired.n, 1, 0, flags);
    } else if (n) ok = mft__encode_stretch(tok, text, n, 1, 0, flags);
    for (i = 0; i < tok->n_after && !(flags & MFT_NO_ADD_SPECIAL); i++) mft__emit_at(w, tok->after[i], NULL, (uint32_t)n);
    if (begins) for (i = 0; i < w->trace.n_strings; i++) w->trace.string[i]->trace = NULL;
    mft__work_trim(tok->ctx, w);
    return ok ? w->n : (int64_t)MFT_ERR_OUT_OF_MEMORY;
}

MFT_API int64_t mft_tokenizer_encode(const mft_tokenizer *tok, const char *text, int64_t bytes, int flags, int32_t *ids, int64_t cap)
{
    return mft__encode_begins(tok, text, bytes, flags, ids, NULL, cap);
}

/* ---- decode ---- */

static int mft__decoder_text(mft_decoder *d, const char *p, size_t n)     /* appends to the text, but for what is stripped in front */
{
    const mft__phrase *s = &d->tok->decode_strip;
    while (d->strip && n) {
        if (n < (size_t)s->n || memcmp(p, s->s, (size_t)s->n) != 0) { d->strip = 0; break; }
        p += s->n; n -= (size_t)s->n; d->strip--;
    }
    return mft__bytes_add(d->tok->ctx, &d->out, p, n);
}

/* Byte-level: what is complete of the pending bytes goes out, U+FFFD for what can never be. all: the text ends here. */
static int mft__decoder_bytes(mft_decoder *d, int all)
{
    size_t at = 0, n = d->pending.n;
    while (at < n) {
        const char *p = d->pending.p + at;
        size_t      good = mft__utf8_valid(p, n - at);
        int         len, cut;
        if (!mft__decoder_text(d, p, good)) return 0;
        at += good;
        if (at == n) break;
        len = -mft__utf8_length((const unsigned char *)d->pending.p + at, (const unsigned char *)d->pending.p + n, &cut);
        if (cut && !all) break;
        if (!mft__decoder_text(d, "\xef\xbf\xbd", 3)) return 0;
        at += (size_t)len;
    }
    if (at < n && at) memmove(d->pending.p, d->pending.p + at, n - at);
    d->pending.n = n - at;
    return 1;
}

/* A run of byte tokens is over: it is a text, or each of its bytes is U+FFFD. */
static int mft__decoder_run(mft_decoder *d)
{
    size_t i, n = d->pending.n;
    d->pending.n = 0;
    if (!n) return 1;
    if (mft__utf8_valid(d->pending.p, n) == n) return mft__decoder_text(d, d->pending.p, n);
    for (i = 0; i < n; i++) if (!mft__decoder_text(d, "\xef\xbf\xbd", 3)) return 0;
    return 1;
}

static int mft__has_token(const mft_tokenizer *t, int32_t id) { return id >= 0 && id < t->n_ids && t->piece_at[id] != UINT32_MAX; }

static mft_status mft__decoder_add(mft_decoder *d, int32_t id)
{
    const mft_tokenizer *t = d->tok;
    mft_context *ctx = t->ctx;
    const char  *p;
    size_t       n;
    mft__normal  r;

    if (!mft__has_token(t, id)) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "no token has the id %ld; they go up to %ld", (long)id, (long)t->n_ids - 1);
    if ((d->flags & MFT_SKIP_SPECIAL) && (t->flags[id] & MFT__TOKEN_SPECIAL)) return MFT_OK;
    p = mft__token_bytes(t, id, &n);
    if (t->decode == MFT__DECODE_BYTES)
        return mft__bytes_add(ctx, &d->pending, p, n) && mft__decoder_bytes(d, 0) ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    if (t->decode == MFT__DECODE_SPACED && d->n > 0 && !mft__decoder_text(d, " ", 1)) return MFT_ERR_OUT_OF_MEMORY;

    if (t->decode_fallback && (t->flags[id] & MFT__TOKEN_BYTE)) {
        char c = (char)(mft__hex_digit(p[3]) << 4 | mft__hex_digit(p[4]));
        d->n++;
        return mft__bytes_add(ctx, &d->pending, &c, 1) ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    }
    if (!mft__decoder_run(d)) return MFT_ERR_OUT_OF_MEMORY;
    r = t->decode_replace;
    if (r.from.n && n && memchr(p, r.from.s[0], n)) {
        if (t->decode_bare_first && d->n == 0) r.to.n = 0;
        d->piece.n = 0;
        if (!mft__replace_all(ctx, &d->piece, p, n, &r)) return MFT_ERR_OUT_OF_MEMORY;
        p = d->piece.p; n = d->piece.n;
    }
    d->n++;
    return mft__decoder_text(d, p, n) ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
}

static int mft__decoder_end(mft_decoder *d)             /* and back to the start */
{
    int ok = d->tok->decode == MFT__DECODE_BYTES ? mft__decoder_bytes(d, 1) : mft__decoder_run(d);
    d->pending.n = 0;
    d->n = 0;
    d->strip = d->tok->n_decode_strip;
    return ok;
}

static void mft__decoder_free(mft_decoder *d)           /* what it holds, not itself */
{
    mft__bytes_free(d->tok->ctx, &d->pending);
    mft__bytes_free(d->tok->ctx, &d->out);
    mft__bytes_free(d->tok->ctx, &d->piece);
}

static void mft__decoder_start(mft_decoder *d, const mft_tokenizer *tok, int flags)
{
    d->tok = tok; d->flags = flags;
    d->pending.n = d->out.n = 0;
    d->n = 0;
    d->strip = tok->n_decode_strip;
}

MFT_API int64_t mft_tokenizer_decode(const mft_tokenizer *tok, const int32_t *ids, int64_t n, int flags, char *text, int64_t cap)
{
    mft_decoder *d;
    mft_status   s = MFT_OK;
    int64_t      i, total = 0;

    if (!tok) return MFT_ERR_INVALID_ARGUMENT;
    if (n < 0 || cap < 0 || (!ids && n) || (!text && cap)) return mft__fail(tok->ctx, MFT_ERR_INVALID_ARGUMENT, "mft_tokenizer_decode: no ids, or no room for the text");
    d = &tok->work->decoder;
    mft__decoder_start(d, tok, flags);
    for (i = 0; i <= n && s == MFT_OK; i++) {
        if (i < n) s = mft__decoder_add(d, ids[i]);
        else if (!mft__decoder_end(d)) s = MFT_ERR_OUT_OF_MEMORY;
        if (total < cap && d->out.n) memcpy(text + total, d->out.p, (int64_t)d->out.n < cap - total ? d->out.n : (size_t)(cap - total));
        total += (int64_t)d->out.n;
        d->out.n = 0;
    }
    if (s == MFT_ERR_INVALID_ARGUMENT)
        mft__fail(tok->ctx, s, "mft_tokenizer_decode: ids[%lld] is %ld, which no token has; they go up to %ld",
                  (long long)i - 1, (long)ids[i - 1], (long)tok->n_ids - 1);
    mft__work_trim(tok->ctx, tok->work);
    return s == MFT_OK ? total : (int64_t)s;
}

static void mft__decoder_destroy(void *self)
{
    mft_decoder *d = (mft_decoder *)self;
    mft__object_remove(&d->object);
    mft__decoder_free(d);
    mft__free(d->tok->ctx, d, sizeof *d);
}

MFT_API mft_status mft_decoder_create(const mft_tokenizer *tok, int flags, mft_decoder **out)
{
    mft_decoder *d;
    if (out) *out = NULL;
    if (!tok || !out) return MFT_ERR_INVALID_ARGUMENT;
    d = (mft_decoder *)mft__alloc_zero(tok->ctx, sizeof *d);
    if (!d) return MFT_ERR_OUT_OF_MEMORY;
    mft__decoder_start(d, tok, flags);
    mft__object_add(tok->ctx, &d->object, mft__decoder_destroy);
    *out = d;
    return MFT_OK;
}

MFT_API void mft_decoder_destroy(mft_decoder *d) { if (d) mft__decoder_destroy(d); }

static const char *mft__decoder_give(mft_decoder *d, int64_t *out_bytes)
{
    if (out_bytes) *out_bytes = 0;
    if (!mft__bytes_add(d->tok->ctx, &d->out, "", 1)) return NULL;
    if (out_bytes) *out_bytes = (int64_t)d->out.n - 1;
    return d->out.p;
}

MFT_API const char *mft_decoder_push(mft_decoder *d, int32_t id, int64_t *out_bytes)
{
    if (!d) return NULL;
    d->out.n = 0;
    return (id >= 0 && !mft__has_token(d->tok, id)) || mft__decoder_add(d, id) == MFT_OK ? mft__decoder_give(d, out_bytes) : NULL;
}

MFT_API const char *mft_decoder_finish(mft_decoder *d, int64_t *out_bytes)
{
    if (!d) return NULL;
    d->out.n = 0;
    return mft__decoder_end(d) ? mft__decoder_give(d, out_bytes) : NULL;
}

/* ---- loading: tables ---- */

/* What loading needs and the tokenizer does not keep. */
typedef struct mft__tok_loader {
    mft_context   *ctx;
    mft_tokenizer *t;
    const char    *path;                        /* of the file being read, for messages */
    char          *text;       size_t text_bytes;                       /* the file */
    mft__bytes     word;                        /* a piece, or a merge's two pieces, without escapes */
    mft_json      *config;                      /* tokenizer_config.json, or NULL */
    mft__json_scan vocab, merges, added;        /* tokenizer.json: standing before these values */
    int            has_vocab, has_merges, has_added;
    const char    *part[4];    size_t part_bytes[4];                    /* normalizer, pre_tokenizer, post_processor, decoder */
    size_t         n_vocab, n_merges, vocab_bytes;
    int64_t        max_id;
    mft__bytes     unk_text, content;
} mft__tok_loader;

static mft_status mft__tok_fail(const mft__tok_loader *l, mft_status s, const char *format, ...) MFT__PRINTF(3, 4);
static mft_status mft__tok_fail(const mft__tok_loader *l, mft_status s, const char *format, ...)
{
    char    rest[480];
    va_list args;
    va_start(args, format);
    vsnprintf(rest, sizeof rest, format, args);
    va_end(args);
    return mft__fail(l->ctx, s, "%s: %s", mft__path(l->path), rest);
}

static void mft__tok_alphabet(mft_tokenizer *t)
{
    int b, next = 256;                          /* printable bytes are themselves, the others come from U+0100 on */
    for (b = 0; b < 324; b++) t->alphabet[b] = -1;
    for (b = 0; b < 256; b++) {
        int printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        t->alphabet[printable ? b : next++] = (short)b;
    }
}

/* Appends a piece as the vocabulary writes it, as the bytes it stands for. *raw: it has characters that
 * stand for none, and is taken as it is; MFT__TOKEN_RAW then, else 0. */
static int mft__tok_unwrap(mft_context *ctx, const mft_tokenizer *t, const char *p, size_t n, mft__bytes *out, int *raw)
{
    const unsigned char *q = (const unsigned char *)p, *end = q + n;
    size_t   start = out->n;
    uint32_t c;
    *raw = 0;
    if (!mft__bytes_add(ctx, out, p, n)) return 0;
    if (!t->byte_level) return 1;
    for (out->n = start; q < end; ) {           /* shorter than p, so it fits over the copy */
        q += mft__utf8_next(q, &c);
        if (c >= 324 || t->alphabet[c] < 0) {
            *raw = MFT__TOKEN_RAW;
            out->n = start;
            return mft__bytes_add(ctx, out, p, n);
        }
        out->p[out->n++] = (char)t->alphabet[c];
    }
    return 1;
}

/* Room for ids up to max_id and pieces of that many bytes in all. */
static mft_status mft__tok_reserve(mft__tok_loader *l, int64_t max_id, size_t n_pieces, size_t bytes)
{
    mft_tokenizer *t = l->t;
    int32_t i;
    size_t  slots = n_pieces + n_pieces / 2 + 1;
    if (max_id < 0) return mft__tok_fail(l, MFT_ERR_FORMAT, "the vocabulary is empty");
    if (max_id >= MFT__MAX_IDS || n_pieces >= MFT__MAX_IDS)
        return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "has ids up to %lld and %llu pieces; up to %d are supported",
                             (long long)max_id, (unsigned long long)n_pieces, MFT__MAX_IDS - 1);
    t->piece_at    = (uint32_t *)mft__alloc(l->ctx, (size_t)(max_id + 1) * sizeof *t->piece_at);
    t->flags       = (unsigned char *)mft__alloc_zero(l->ctx, (size_t)(max_id + 1));
    t->n_ids       = (int32_t)(max_id + 1);     /* before the checks: what there is of it is freed with it */
    t->piece_slots = (uint32_t *)mft__alloc_zero(l->ctx, slots * sizeof *t->piece_slots);
    t->n_piece_slots = (uint32_t)slots;
    t->pieces.p    = (char *)mft__alloc(l->ctx, bytes + 4 * n_pieces);
    t->pieces.cap  = t->pieces.p ? bytes + 4 * n_pieces : 0;
    if (!t->piece_at || !t->flags || !t->piece_slots || !t->pieces.p) return MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; i < t->n_ids; i++) t->piece_at[i] = UINT32_MAX;
    return MFT_OK;
}

/* Gives the id its piece. The texts of a vocabulary differ; those of added tokens may be the same once normalized. */
static mft_status mft__tok_put(mft__tok_loader *l, int32_t id, const char *p, size_t n, int flags)
{
    mft_tokenizer *t = l->t;
    mft__name_text name;
    unsigned char  head[4];
    int            k = 0;
    size_t         rest = n;
    uint32_t       h, i;

    if (t->piece_at[id] != UINT32_MAX) return mft__tok_fail(l, MFT_ERR_FORMAT, "two tokens have the id %ld, one is '%s'", (long)id, mft__name(p, n, &name));
    if (!(flags & MFT__TOKEN_OUTSIDE) && mft__piece_find(t, p, n, flags) >= 0) return mft__tok_fail(l, MFT_ERR_FORMAT, "the token '%s' is there twice", mft__name(p, n, &name));
    if (n >= 1 << 28 || t->pieces.n >= UINT32_MAX - n - 8) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "tokens of more than 4 GB in all");
    do { head[k] = (unsigned char)(rest & 127); rest >>= 7; if (rest) head[k] |= 128; k++; } while (rest);
    t->piece_at[id] = (uint32_t)t->pieces.n;
    if (!mft__bytes_add(l->ctx, &t->pieces, head, (size_t)k) || !mft__bytes_add(l->ctx, &t->pieces, p, n)) return MFT_ERR_OUT_OF_MEMORY;
    if (n == 6 && memcmp(p, "<0x", 3) == 0 && p[5] == '>' && mft__hex_digit(p[3]) >= 0 && mft__hex_digit(p[4]) >= 0) flags |= MFT__TOKEN_BYTE;
    t->flags[id] = (unsigned char)flags;

    h = mft__hash(p, n, t->seed);
    for (i = (uint32_t)((uint64_t)h * t->n_piece_slots >> 32); t->piece_slots[i]; i = i + 1 == t->n_piece_slots ? 0 : i + 1) { }
    t->piece_slots[i] = h << 21 | (uint32_t)(id + 1);
    return MFT_OK;
}

static mft_status mft__tok_reserve_merges(mft__tok_loader *l, size_t n, size_t n_ranks)
{
    mft_tokenizer *t = l->t;
    size_t i, slots = n + n * 3 / 5 + 1;
    if (n >= MFT__MAX_MERGES) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "has %llu merges; up to %d are supported", (unsigned long long)n, MFT__MAX_MERGES - 1);
    t->n_merges = (uint32_t)n; t->n_ranks = (uint32_t)n_ranks; t->n_merge_slots = (uint32_t)slots;
    t->merge_slots = (uint64_t *)mft__alloc(l->ctx, slots * sizeof *t->merge_slots);
    t->merged = (int32_t *)mft__alloc(l->ctx, n_ranks * sizeof *t->merged);
    if (!t->merge_slots || !t->merged) return MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; i < slots; i++) t->merge_slots[i] = MFT__NO_MERGE;
    return MFT_OK;
}

static void mft__tok_put_merge(mft_tokenizer *t, int32_t left, int32_t right, uint32_t rank)      /* a pair said twice has its last rank */
{
    uint64_t key = (uint64_t)left << 43 | (uint64_t)right << 22;
    uint32_t i = mft__merge_slot(t, key);
    while (t->merge_slots[i] != MFT__NO_MERGE && (t->merge_slots[i] ^ key) >> 22 != 0) if (++i == t->n_merge_slots) i = 0;
    t->merge_slots[i] = key | rank;
}

/* Merge number `rank`: left_bytes of l->word, and the rest of it. */
static mft_status mft__tok_merge(mft__tok_loader *l, uint32_t rank, size_t left_bytes)
{
    mft_tokenizer *t = l->t;
    const char    *p = l->word.p;
    size_t         n = l->word.n;
    int32_t        left  = mft__piece_find(t, p, left_bytes, 0);
    int32_t        right = mft__piece_find(t, p + left_bytes, n - left_bytes, 0);
    int32_t        both  = mft__piece_find(t, p, n, 0);
    mft__name_text a, b;
    if (left < 0 || right < 0 || both < 0)
        return mft__tok_fail(l, MFT_ERR_FORMAT, "merge %lu, of '%s' and '%s': the vocabulary lacks %s", (unsigned long)rank,
                             mft__name(p, left_bytes, &a), mft__name(p + left_bytes, n - left_bytes, &b),
                             left < 0 ? "the first" : right < 0 ? "the second" : "what they make");
    mft__tok_put_merge(t, left, right, rank);
    t->merged[rank] = both;
    return MFT_OK;
}

/* What follows from pieces and merges. */
static mft_status mft__tok_finish_model(mft__tok_loader *l)
{
    mft_tokenizer *t = l->t;
    uint32_t r;
    int      b, n_bytes = 0;
    char     s[8];
    for (b = 0; b < 256; b++) {
        char c = (char)b;
        if (t->byte_level) t->byte_id[b] = mft__piece_find(t, &c, 1, 0);
        else { snprintf(s, sizeof s, "<0x%02X>", (unsigned)b); t->byte_id[b] = mft__piece_find(t, s, 6, 0); }
        n_bytes += t->byte_id[b] >= 0;
        if (b < 128) t->char_id[b] = mft__piece_find(t, &c, 1, 0);
    }
    t->unk = -1;
    if (l->unk_text.n) {
        mft__name_text name;
        int raw;
        l->word.n = 0;
        if (!mft__tok_unwrap(l->ctx, t, l->unk_text.p, l->unk_text.n, &l->word, &raw)) return MFT_ERR_OUT_OF_MEMORY;
        t->unk = mft__piece_find(t, l->word.p, l->word.n, raw);
        if (t->unk < 0) return mft__tok_fail(l, MFT_ERR_FORMAT, "the unk_token '%s' is not in the vocabulary", mft__name(l->unk_text.p, l->unk_text.n, &name));
    }
    /* Cutting before U+2581 is sound when no merge reaches over the cut: not from a character of a piece, nor
     * from the tokens that stand for what has no piece; and when nothing is dropped, which would bring closer
     * what stood apart. U+2581 has to be a piece itself, so that it ends a run of unknown characters. */
    t->cut_meta = !t->byte_level && !t->ignore_merges && mft__piece_find(t, MFT__META, 3, 0) >= 0
               && (t->unk >= 0 || (t->byte_fallback && n_bytes == 256));
    for (r = 0; t->cut_meta && r < t->n_merge_slots; r++) {
        int32_t left = (int32_t)(t->merge_slots[r] >> 43), right = (int32_t)(t->merge_slots[r] >> 22 & 0x1fffff);
        if (t->merge_slots[r] != MFT__NO_MERGE
            && (left == t->unk || right == t->unk || (t->flags[left] | t->flags[right]) & MFT__TOKEN_BYTE)) t->cut_meta = 0;
    }
    for (r = 0; t->cut_meta && r < t->n_ranks; r++) {
        size_t n, i;
        const char *p = mft__token_bytes(t, t->merged[r], &n);
        for (i = 1; i + 3 <= n; i++)
            if (p[i] == '\xe2' && memcmp(p + i, MFT__META, 3) == 0 && !(i >= 3 && memcmp(p + i - 3, MFT__META, 3) == 0))
                t->joins_meta[(unsigned char)p[i - 1]] = 1;
    }
    return MFT_OK;
}

/* ---- loading: added tokens ---- */

static mft_status mft__tok_add(mft__tok_loader *l, int64_t id, const char *p, size_t n, mft__added a, int special)
{
    mft_tokenizer *t = l->t;
    mft__added_set *set = &t->added[a.normalized != 0];
    mft__name_text name;
    mft_status     s;
    int32_t        known;
    void          *q = set->p;
    int            raw;

    if (!n) return MFT_OK;                      /* never found in a text */
    l->word.n = 0;
    if (!mft__tok_unwrap(l->ctx, t, p, n, &l->word, &raw)) return MFT_ERR_OUT_OF_MEMORY;
    known = mft__piece_find(t, l->word.p, l->word.n, raw);
    if (known < 0 && mft__piece_find(t, l->word.p, l->word.n, raw | MFT__TOKEN_OUTSIDE) == id) known = (int32_t)id;
    if (a.normalized && !mft__normalize(t, &p, &n)) return MFT_ERR_OUT_OF_MEMORY;
    if (known >= 0) id = known;                 /* the vocabulary's id counts, as in the reference */
    else {
        if (id < 0 || id >= t->n_ids) return mft__tok_fail(l, MFT_ERR_FORMAT, "the added token '%s' has the id %lld", mft__name(p, n, &name), (long long)id);
        l->word.n = 0;
        if (!mft__tok_unwrap(l->ctx, t, p, n, &l->word, &raw)) return MFT_ERR_OUT_OF_MEMORY;
        if ((s = mft__tok_put(l, (int32_t)id, l->word.p, l->word.n, raw | MFT__TOKEN_OUTSIDE)) != MFT_OK) return s;
    }
    t->flags[id] |= (unsigned char)(MFT__TOKEN_ADDED | (special ? MFT__TOKEN_SPECIAL : 0));
    a.id = (int32_t)id; a.at = (uint32_t)set->text.n; a.n = (uint32_t)n;
    if (!mft__bytes_add(l->ctx, &set->text, p, n) || !mft__grow(l->ctx, &q, &set->cap, set->n + 1, sizeof *set->p)) return MFT_ERR_OUT_OF_MEMORY;
    set->p = (mft__added *)q;
    set->p[set->n++] = a;
    return MFT_OK;
}

static int mft__added_compare(const mft__added_set *set, const mft__added *a, const mft__added *b)
{
    int c = memcmp(set->text.p + a->at, set->text.p + b->at, a->n < b->n ? a->n : b->n);
    if (c) return c;
    if (a->n != b->n) return a->n < b->n ? -1 : 1;
    return (a->at > b->at) - (a->at < b->at);
}

/* Sorts by text (a heap sort: qsort has no room for the texts), keeps the last of repeated ones, and indexes
 * by first byte. */
static void mft__added_sort(mft__added_set *set)
{
    size_t n = set->n, i, k, end;
    for (i = n / 2 + n; i-- > 1; ) {            /* the first half builds the heap, the second takes it apart */
        size_t at = i >= n ? i - n : 0;
        mft__added x;
        end = i >= n ? n : i;
        if (i < n) { x = set->p[i]; set->p[i] = set->p[0]; } else x = set->p[at];
        for (k = 2 * at + 1; k < end; at = k, k = 2 * k + 1) {
            if (k + 1 < end && mft__added_compare(set, &set->p[k + 1], &set->p[k]) > 0) k++;
            if (mft__added_compare(set, &x, &set->p[k]) >= 0) break;
            set->p[at] = set->p[k];
        }
        set->p[at] = x;
    }
    for (i = k = 0; i < n; i++) {
        if (k && set->p[k - 1].n == set->p[i].n && memcmp(set->text.p + set->p[k - 1].at, set->text.p + set->p[i].at, set->p[i].n) == 0) k--;
        set->p[k++] = set->p[i];
    }
    set->n = k;
    for (i = k = 0; i < 257; i++) {
        while (k < set->n && (size_t)(unsigned char)set->text.p[set->p[k].at] < i) k++;
        set->first[i] = (uint32_t)k;
    }
}

/* ---- loading: tokenizer.json ---- */

/* The latest KEY or STRING, appended without its escapes. */
static int mft__tok_string(mft__tok_loader *l, const mft__json_scan *s, mft__bytes *out)
{
    size_t n = out->n;
    if (!mft__bytes_add(l->ctx, out, s->string, s->bytes)) return 0;            /* never longer than with them */
    if (s->escaped) out->n = n + mft__json_decode(s, out->p + n);
    return 1;
}

/* Expects `want` as the next event. `what` names it: "model.vocab's value". */
static int mft__tok_want(mft__json_scan *s, mft__json_event want, const char *what)
{
    mft__json_event e = mft__json_next(s);
    if (e != want && e != MFT__JSON_BAD) mft__json_bad(s, MFT_ERR_FORMAT, s->token, "%s is of the wrong type", what);
    return e == want;
}

/* Reads the list of added tokens; `apply` 0 only looks at sizes and ids. */
static mft_status mft__tok_read_added(mft__tok_loader *l, mft__json_scan s, int apply)
{
    mft__json_event e = mft__json_next(&s);
    if (e == MFT__JSON_NULL) return MFT_OK;
    if (e != MFT__JSON_ARRAY) return e == MFT__JSON_BAD ? s.status : mft__tok_fail(l, MFT_ERR_FORMAT, "added_tokens is not a list");
    while ((e = mft__json_next(&s)) == MFT__JSON_OBJECT) {
        mft__added a;
        int64_t    id = -1;
        int        special = 0, has_normalized = 0, has_content = 0;
        mft_status status;
        memset(&a, 0, sizeof a);
        l->content.n = 0;
        while ((e = mft__json_next(&s)) == MFT__JSON_KEY) {
            int *flag = mft__json_is(&s, "lstrip") ? &a.lstrip : mft__json_is(&s, "rstrip") ? &a.rstrip : mft__json_is(&s, "single_word") ? &a.single_word
                      : mft__json_is(&s, "normalized") ? &a.normalized : mft__json_is(&s, "special") ? &special : NULL;
            if (flag) {
                e = mft__json_next(&s);
                if (e != MFT__JSON_TRUE && e != MFT__JSON_FALSE) break;
                *flag = e == MFT__JSON_TRUE;
                if (flag == &a.normalized) has_normalized = 1;
            } else if (mft__json_is(&s, "id")) {
                if ((e = mft__json_next(&s)) != MFT__JSON_NUMBER || !mft__json_int(&s, &id)) break;
            } else if (mft__json_is(&s, "content")) {
                if ((e = mft__json_next(&s)) != MFT__JSON_STRING) break;
                if (!mft__tok_string(l, &s, &l->content)) return MFT_ERR_OUT_OF_MEMORY;
                has_content = 1;
            } else if (!mft__json_skip(&s, e)) return s.status;
        }
        if (e == MFT__JSON_BAD) return s.status;
        if (e != MFT__JSON_OBJECT_END || !has_content || id < 0) {
            mft__json_bad(&s, MFT_ERR_FORMAT, s.token, "an added token needs an id, a content and flags that are true or false");
            return s.status;
        }
        if (!has_normalized) a.normalized = !special;
        if (apply) {
            if ((status = mft__tok_add(l, id, l->content.p, l->content.n, a, special)) != MFT_OK) return status;
        } else {
            if (id > l->max_id) l->max_id = id;
            l->n_vocab++; l->vocab_bytes += l->content.n;
        }
    }
    if (e == MFT__JSON_BAD) return s.status;
    return e == MFT__JSON_ARRAY_END ? MFT_OK : mft__tok_fail(l, MFT_ERR_FORMAT, "added_tokens has something that is no object");
}

/* Sizes and places of what model has; refuses models that are not BPE as this room does it. */
static mft_status mft__tok_survey_model(mft__tok_loader *l, mft__json_scan *s)
{
    mft__json_event e;
    mft__name_text  name;
    int64_t         id;
    if (!mft__tok_want(s, MFT__JSON_OBJECT, "model")) return s->status;
    while ((e = mft__json_next(s)) == MFT__JSON_KEY) {
        if (mft__json_is(s, "type")) {
            if (!mft__tok_want(s, MFT__JSON_STRING, "model.type")) return s->status;
            if (!mft__json_is(s, "BPE")) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a model of type '%s'; BPE is supported", mft__name(s->string, s->bytes, &name));
        } else if (mft__json_is(s, "vocab")) {
            if (l->has_vocab++) return mft__tok_fail(l, MFT_ERR_FORMAT, "model.vocab is there twice");
            l->vocab = *s;
            if (!mft__tok_want(s, MFT__JSON_OBJECT, "model.vocab")) return s->status;
            while ((e = mft__json_next(s)) == MFT__JSON_KEY) {
                l->vocab_bytes += s->bytes; l->n_vocab++;
                if (!mft__tok_want(s, MFT__JSON_NUMBER, "a token's id")) return s->status;
                if (!mft__json_int(s, &id) || id < 0 || id >= MFT__MAX_IDS) {
                    mft__json_bad(s, MFT_ERR_FORMAT, s->token, "the id %s; ids are integers from 0 to %d", mft__name(s->string, s->bytes, &name), MFT__MAX_IDS - 1);
                    return s->status;
                }
                if (id > l->max_id) l->max_id = id;
            }
            if (e == MFT__JSON_BAD) return s->status;
        } else if (mft__json_is(s, "merges")) {
            if (l->has_merges++) return mft__tok_fail(l, MFT_ERR_FORMAT, "model.merges is there twice");
            l->merges = *s;
            if (!mft__tok_want(s, MFT__JSON_ARRAY, "model.merges")) return s->status;
            while ((e = mft__json_next(s)) != MFT__JSON_ARRAY_END) {
                if (!mft__json_skip(s, e)) return s->status;
                l->n_merges++;
            }
        } else if (mft__json_is(s, "byte_fallback") || mft__json_is(s, "fuse_unk") || mft__json_is(s, "ignore_merges")) {
            int *flag = mft__json_is(s, "byte_fallback") ? &l->t->byte_fallback : mft__json_is(s, "fuse_unk") ? &l->t->fuse_unk : &l->t->ignore_merges;
            e = mft__json_next(s);
            *flag = e == MFT__JSON_TRUE;
            if (e != MFT__JSON_TRUE && e != MFT__JSON_FALSE && e != MFT__JSON_NULL) mft__json_bad(s, MFT_ERR_FORMAT, s->token, "expected true or false");
            if (s->status != MFT_OK) return s->status;
        } else if (mft__json_is(s, "unk_token")) {
            e = mft__json_next(s);
            if (e == MFT__JSON_STRING) { if (!mft__tok_string(l, s, &l->unk_text)) return MFT_ERR_OUT_OF_MEMORY; }
            else if (e != MFT__JSON_NULL) { mft__json_bad(s, MFT_ERR_FORMAT, s->token, "model.unk_token is of the wrong type"); return s->status; }
        } else {
            int affix = mft__json_is(s, "continuing_subword_prefix") || mft__json_is(s, "end_of_word_suffix"), dropout = mft__json_is(s, "dropout");
            const char *key = s->string;
            size_t      n = s->bytes;
            e = mft__json_next(s);
            if ((affix && (e != MFT__JSON_STRING || s->bytes) && e != MFT__JSON_NULL)
                || (dropout && (e != MFT__JSON_NUMBER || mft__json_double(s) != 0) && e != MFT__JSON_NULL))
                return e == MFT__JSON_BAD ? s->status : mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "model.%s is set", mft__name(key, n, &name));
            if (!mft__json_skip(s, e)) return s->status;
        }
    }
    return e == MFT__JSON_BAD ? s->status : MFT_OK;
}

/* One pass over the whole file: it is JSON, the parts are where, and how large the tables will be. */
static mft_status mft__tok_survey(mft__tok_loader *l)
{
    static const char *const part[4] = { "normalizer", "pre_tokenizer", "post_processor", "decoder" };
    mft__json_scan  s;
    mft__json_event e;
    mft_status      status;
    int             i;
    mft__json_scan_init(&s, l->ctx, mft__path(l->path), 1, l->text, l->text_bytes);
    if (!mft__tok_want(&s, MFT__JSON_OBJECT, "a tokenizer.json")) return s.status;
    while ((e = mft__json_next(&s)) == MFT__JSON_KEY) {
        for (i = 0; i < 4 && !mft__json_is(&s, part[i]); i++) { }
        if (i < 4) {
            l->part[i] = mft__json_space(s.at, s.end);
            if (!mft__json_skip(&s, e)) return s.status;
            l->part_bytes[i] = (size_t)(s.at - l->part[i]);
        } else if (mft__json_is(&s, "model")) {
            if ((status = mft__tok_survey_model(l, &s)) != MFT_OK) return status;
        } else {
            if (mft__json_is(&s, "added_tokens")) {
                if (l->has_added++) return mft__tok_fail(l, MFT_ERR_FORMAT, "added_tokens is there twice");
                l->added = s;
            }
            if (!mft__json_skip(&s, e)) return s.status;
        }
    }
    if (e == MFT__JSON_BAD || mft__json_next(&s) != MFT__JSON_DONE) return s.status;
    if (!l->has_vocab)  return mft__tok_fail(l, MFT_ERR_FORMAT, "has no model.vocab");
    if (!l->has_merges) return mft__tok_fail(l, MFT_ERR_FORMAT, "has no model.merges");
    return l->has_added ? mft__tok_read_added(l, l->added, 0) : MFT_OK;
}

/* Vocabulary {"piece": id, ..} from where the scan stands. */
static mft_status mft__tok_read_vocab(mft__tok_loader *l, mft__json_scan s)
{
    mft__json_event e = mft__json_next(&s);
    mft_status      status;
    int64_t         id = 0;
    int             raw;
    while ((e = mft__json_next(&s)) == MFT__JSON_KEY) {
        const char *p = s.string;
        size_t      n = s.bytes;
        if (s.escaped) {
            l->content.n = 0;
            if (!mft__tok_string(l, &s, &l->content)) return MFT_ERR_OUT_OF_MEMORY;
            p = l->content.p; n = l->content.n;
        }
        l->word.n = 0;
        if (!mft__tok_unwrap(l->ctx, l->t, p, n, &l->word, &raw)) return MFT_ERR_OUT_OF_MEMORY;
        if (mft__json_next(&s) != MFT__JSON_NUMBER || !mft__json_int(&s, &id)) return s.status;    /* the survey saw numbers */
        if ((status = mft__tok_put(l, (int32_t)id, l->word.p, l->word.n, raw)) != MFT_OK) return status;
        l->t->n_vocab++;
    }
    return MFT_OK;
}

/* "left right" into l->word, both as bytes; the length of the left one, -1 if it is not two pieces (without
 * memory as well: *out_status). */
static int64_t mft__tok_pair(mft__tok_loader *l, const char *p, size_t n, mft_status *out_status)
{
    const char *space = (const char *)memchr(p, ' ', n);
    size_t      left;
    int         raw;
    *out_status = MFT_OK;
    if (!space || memchr(space + 1, ' ', n - (size_t)(space + 1 - p))) return -1;
    l->word.n = 0;
    if (!mft__tok_unwrap(l->ctx, l->t, p, (size_t)(space - p), &l->word, &raw)) { *out_status = MFT_ERR_OUT_OF_MEMORY; return -1; }
    left = l->word.n;
    if (!mft__tok_unwrap(l->ctx, l->t, space + 1, n - (size_t)(space + 1 - p), &l->word, &raw)) { *out_status = MFT_ERR_OUT_OF_MEMORY; return -1; }
    return (int64_t)left;
}

/* Merges ["left right", ..] or [["left", "right"], ..]. */
static mft_status mft__tok_read_merges(mft__tok_loader *l, mft__json_scan s)
{
    mft__json_event e = mft__json_next(&s);
    mft_status      status;
    uint32_t        rank = 0;
    int64_t         left = 0;
    int             raw, k;
    for (; (e = mft__json_next(&s)) != MFT__JSON_ARRAY_END; rank++) {
        if (e == MFT__JSON_STRING) {
            const char *p = s.string;
            size_t      n = s.bytes;
            if (s.escaped) {
                l->content.n = 0;
                if (!mft__tok_string(l, &s, &l->content)) return MFT_ERR_OUT_OF_MEMORY;
                p = l->content.p; n = l->content.n;
            }
            left = mft__tok_pair(l, p, n, &status);
            if (status != MFT_OK) return status;
        } else if (e == MFT__JSON_ARRAY) {
            l->word.n = 0;
            for (k = 0; (e = mft__json_next(&s)) == MFT__JSON_STRING && k < 2; k++) {
                if (k == 1) left = (int64_t)l->word.n;
                l->content.n = 0;
                if (!mft__tok_string(l, &s, &l->content) || !mft__tok_unwrap(l->ctx, l->t, l->content.p, l->content.n, &l->word, &raw)) return MFT_ERR_OUT_OF_MEMORY;
            }
            if (k != 2 || e != MFT__JSON_ARRAY_END) left = -1;
        } else left = -1;
        if (s.status != MFT_OK) return s.status;
        if (left < 0) {
            mft__json_bad(&s, MFT_ERR_FORMAT, s.token, "merge %lu is not two pieces", (unsigned long)rank);
            return s.status;
        }
        if ((status = mft__tok_merge(l, rank, (size_t)left)) != MFT_OK) return status;
    }
    return MFT_OK;
}

/* ---- loading: the settings around the model ---- */

static int mft__json_is_string(const mft_json *node, const char *text)
{
    size_t n;
    const char *s = mft_json_string(node, &n);
    return s && n == strlen(text) && memcmp(s, text, n) == 0;
}

/* A string that has to be there and short. */
static mft_status mft__tok_phrase(const mft__tok_loader *l, const char *what, const mft_json *node, int may_be_empty, mft__phrase *out)
{
    size_t n;
    const char *s = mft_json_string(node, &n);
    memset(out, 0, sizeof *out);
    if (!s || (!n && !may_be_empty)) return mft__tok_fail(l, MFT_ERR_FORMAT, "%s: lacks a string it needs", what);
    if (n >= sizeof out->s) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "%s: a string of %llu bytes", what, (unsigned long long)n);
    memcpy(out->s, s, n);
    out->n = (int)n;
    return MFT_OK;
}

/* The kinds of a part, flattened: the members of a Sequence under `key`, else the node itself. NULL past the last. */
static const mft_json *mft__tok_step(const mft_json *node, const char *key, size_t i)
{
    if (!mft__json_is_string(mft_json_get(node, "type"), "Sequence")) return i == 0 && mft_json_type(node) == MFT_JSON_OBJECT ? node : NULL;
    return mft_json_at(mft_json_get(node, key), i, NULL);
}

static mft_status mft__tok_unsupported(const mft__tok_loader *l, const char *what, const mft_json *node)
{
    mft__name_text name;
    size_t         n = 0;
    const char    *type = mft_json_string(mft_json_get(node, "type"), &n);
    return type ? mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a %s of type '%s'", what, mft__name(type, n, &name))
                : mft__tok_fail(l, MFT_ERR_FORMAT, "a %s without a type", what);
}

/* A pattern {"String": ".."} as a phrase. */
static mft_status mft__tok_pattern_string(const mft__tok_loader *l, const char *what, const mft_json *pattern, mft__phrase *out)
{
    mft__name_text name;
    size_t         n;
    const char    *regex = mft_json_string(mft_json_get(pattern, "Regex"), &n);
    if (regex) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "%s: the pattern '%s'", what, mft__name(regex, n, &name));
    return mft__tok_phrase(l, what, mft_json_get(pattern, "String"), 0, out);
}

static mft_status mft__tok_normalizer(mft__tok_loader *l, const mft_json *node)
{
    mft_tokenizer  *t = l->t;
    const mft_json *step;
    mft_status      s;
    size_t          i;
    for (i = 0; (step = mft__tok_step(node, "normalizers", i)) != NULL; i++) {
        const mft_json *type = mft_json_get(step, "type");
        mft__normal    *to = &t->normal[t->n_normal];
        if (t->n_normal == MFT__MAX_STEPS) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a normalizer of more than %d steps", MFT__MAX_STEPS);
        if (mft__json_is_string(type, "NFC")) to->kind = MFT__NORMAL_NFC;
        else if (mft__json_is_string(type, "Prepend")) {
            to->kind = MFT__NORMAL_PREPEND;
            if ((s = mft__tok_phrase(l, "normalizer Prepend", mft_json_get(step, "prepend"), 1, &to->to)) != MFT_OK) return s;
        } else if (mft__json_is_string(type, "Replace")) {
            to->kind = MFT__NORMAL_REPLACE;
            if ((s = mft__tok_pattern_string(l, "normalizer Replace", mft_json_get(step, "pattern"), &to->from)) != MFT_OK
                || (s = mft__tok_phrase(l, "normalizer Replace", mft_json_get(step, "content"), 1, &to->to)) != MFT_OK) return s;
        } else return mft__tok_unsupported(l, "normalizer", step);
        t->n_normal++;
    }
    return MFT_OK;
}

/* The patterns of published tokenizers, which are run by hand-written matchers. */
static const struct { const char *regex; mft__split_kind kind; int digits; } mft__split_patterns[] = {
    { "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", MFT__SPLIT_GPT2, 0 },
    { "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+", MFT__SPLIT_GPT2, 0 },
    /* Qwen 2, 2.5, 3 */
    { "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", MFT__SPLIT_CL100K, 1 },
    /* Llama 3; GPT-4's own form of it */
    { "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", MFT__SPLIT_CL100K, 3 },
    { "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+", MFT__SPLIT_CL100K, 3 }
};

static mft_status mft__tok_add_split(mft__tok_loader *l, mft__split_kind kind, int digits, mft__split **out)
{
    mft_tokenizer *t = l->t;
    if (t->n_split == MFT__MAX_STEPS) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a pre-tokenizer of more than %d steps", MFT__MAX_STEPS);
    *out = &t->split[t->n_split++];
    (*out)->kind = kind; (*out)->digits = digits;
    return MFT_OK;
}

static mft_status mft__tok_split(mft__tok_loader *l, const mft_json *step)
{
    static const struct { const char *name; mft__behavior behavior; } behaviors[] = {
        { "Isolated", MFT__ISOLATED }, { "Removed", MFT__REMOVED }, { "MergedWithPrevious", MFT__WITH_PREVIOUS }, { "MergedWithNext", MFT__WITH_NEXT }
    };
    const mft_json *pattern = mft_json_get(step, "pattern"), *behavior = mft_json_get(step, "behavior");
    mft__name_text  name;
    mft__phrase     at;
    mft__split     *to = NULL;
    mft_status      s;
    size_t          i, n, n_patterns = sizeof mft__split_patterns / sizeof mft__split_patterns[0];
    const char     *regex = mft_json_string(mft_json_get(pattern, "Regex"), &n);
    int             invert = mft_json_bool(mft_json_get(step, "invert"), 0);

    if (regex) {                                /* these match everything, so what is cut out and what is between is the same */
        int whole = (mft__json_is_string(behavior, "Isolated") && !invert) || (mft__json_is_string(behavior, "Removed") && invert);
        for (i = 0; i < n_patterns && !mft__json_is_string(mft_json_get(pattern, "Regex"), mft__split_patterns[i].regex); i++) { }
        if (i == n_patterns || !whole) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "the pre-tokenizer's pattern '%s'%s", mft__name(regex, n, &name), whole ? "" : " with that behavior");
        return mft__tok_add_split(l, mft__split_patterns[i].kind, mft__split_patterns[i].digits, &to);
    }
    if ((s = mft__tok_pattern_string(l, "pre-tokenizer Split", pattern, &at)) != MFT_OK) return s;
    for (i = 0; i < 4 && !mft__json_is_string(behavior, behaviors[i].name); i++) { }
    if (i == 4 || invert) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a pre-tokenizer Split with that behavior or inverted");
    if ((s = mft__tok_add_split(l, MFT__SPLIT_AT, 0, &to)) != MFT_OK) return s;
    to->at = at; to->behavior = behaviors[i].behavior;
    return MFT_OK;
}

/* The prepend_scheme of a Metaspace, or the add_prefix_space that older files have. */
static mft_status mft__tok_prepend(const mft__tok_loader *l, const mft_json *node, mft__prepend *out)
{
    const mft_json *scheme = mft_json_get(node, "prepend_scheme");
    if      (mft__json_is_string(scheme, "first"))  *out = MFT__PREPEND_FIRST;
    else if (mft__json_is_string(scheme, "never"))  *out = MFT__PREPEND_NEVER;
    else if (mft__json_is_string(scheme, "always")) *out = MFT__PREPEND_ALWAYS;
    else if (mft_json_type(scheme) == MFT_JSON_NULL) *out = mft_json_bool(mft_json_get(node, "add_prefix_space"), 1) ? MFT__PREPEND_ALWAYS : MFT__PREPEND_NEVER;
    else return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "Metaspace with that prepend_scheme");
    return MFT_OK;
}

static mft_status mft__tok_pre_tokenizer(mft__tok_loader *l, const mft_json *node, int *byte_level)
{
    const mft_json *step;
    mft__split     *to = NULL;
    mft_status      s = MFT_OK;
    size_t          i;
    *byte_level = 0;
    for (i = 0; s == MFT_OK && (step = mft__tok_step(node, "pretokenizers", i)) != NULL; i++) {
        const mft_json *type = mft_json_get(step, "type");
        if (*byte_level) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a pre-tokenizer with steps behind ByteLevel");
        if (mft__json_is_string(type, "ByteLevel")) {
            *byte_level = 1;
            if (mft_json_bool(mft_json_get(step, "add_prefix_space"), 1)) s = mft__tok_add_split(l, MFT__SPLIT_PREFIX, 0, &to);
            if (s == MFT_OK && mft_json_bool(mft_json_get(step, "use_regex"), 1)) s = mft__tok_add_split(l, MFT__SPLIT_GPT2, 0, &to);
        } else if (mft__json_is_string(type, "Split")) s = mft__tok_split(l, step);
        else if (mft__json_is_string(type, "Digits"))
            s = mft__tok_add_split(l, MFT__SPLIT_DIGITS, mft_json_bool(mft_json_get(step, "individual_digits"), 0), &to);
        else if (mft__json_is_string(type, "Metaspace")) {
            if ((s = mft__tok_add_split(l, MFT__SPLIT_META, 0, &to)) != MFT_OK
                || (s = mft__tok_phrase(l, "pre-tokenizer Metaspace", mft_json_get(step, "replacement"), 0, &to->at)) != MFT_OK
                || (s = mft__tok_prepend(l, step, &to->prepend)) != MFT_OK) return s;
            to->behavior = mft_json_bool(mft_json_get(step, "split"), 1) ? MFT__WITH_NEXT : MFT__KEPT_WHOLE;
        } else return mft__tok_unsupported(l, "pre-tokenizer", step);
    }
    return s;
}

static mft_status mft__tok_decoder(mft__tok_loader *l, const mft_json *node)
{
    mft_tokenizer  *t = l->t;
    const mft_json *step;
    mft_status      s;
    mft__prepend    prepend;
    size_t          i;
    int             stage = 0, now;             /* the order in which the steps make sense: 1 replace, 2 bytes, 3 fuse, 4 strip */
    t->decode = mft_json_type(node) == MFT_JSON_NULL ? MFT__DECODE_SPACED : MFT__DECODE_PIECES;
    for (i = 0; (step = mft__tok_step(node, "decoders", i)) != NULL; i++) {
        const mft_json *type = mft_json_get(step, "type");
        mft__normal    *r = &t->decode_replace;
        if (mft__json_is_string(type, "ByteLevel")) {
            t->decode = MFT__DECODE_BYTES;
            now = 5;
        } else if (mft__json_is_string(type, "Replace")) {
            now = 1;
            if ((s = mft__tok_pattern_string(l, "decoder Replace", mft_json_get(step, "pattern"), &r->from)) != MFT_OK
                || (s = mft__tok_phrase(l, "decoder Replace", mft_json_get(step, "content"), 1, &r->to)) != MFT_OK) return s;
        } else if (mft__json_is_string(type, "Metaspace")) {
            now = 1;
            if ((s = mft__tok_phrase(l, "decoder Metaspace", mft_json_get(step, "replacement"), 0, &r->from)) != MFT_OK
                || (s = mft__tok_prepend(l, step, &prepend)) != MFT_OK) return s;
            r->to.s[0] = ' '; r->to.n = 1;
            t->decode_bare_first = prepend != MFT__PREPEND_NEVER;
        } else if (mft__json_is_string(type, "ByteFallback")) {
            t->decode_fallback = 1;
            now = 2;
        } else if (mft__json_is_string(type, "Fuse")) now = 3;
        else if (mft__json_is_string(type, "Strip")) {
            int64_t start = mft_json_integer(mft_json_get(step, "start"), 0);
            if (stage != 3 || start < 0 || start > 1000 || mft_json_integer(mft_json_get(step, "stop"), 0) != 0)
                return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a decoder Strip before Fuse, or one that strips the end");
            if ((s = mft__tok_phrase(l, "decoder Strip", mft_json_get(step, "content"), 0, &t->decode_strip)) != MFT_OK) return s;
            t->n_decode_strip = (int)start;
            now = 4;
        } else return mft__tok_unsupported(l, "decoder", step);
        if (now <= stage || (now == 5 && stage)) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a decoder with these steps in this order");
        stage = now;
    }
    return MFT_OK;
}

/* The ids a TemplateProcessing puts on either side of a single text. */
static mft_status mft__tok_post_processor(mft__tok_loader *l, const mft_json *node)
{
    mft_tokenizer  *t = l->t;
    const mft_json *step, *item;
    mft__name_text  shown;
    size_t          i, k, j;
    for (i = 0; (step = mft__tok_step(node, "processors", i)) != NULL; i++) {
        const mft_json *type = mft_json_get(step, "type"), *single = mft_json_get(step, "single");
        int behind = 0;
        if (mft__json_is_string(type, "ByteLevel")) continue;           /* changes offsets only */
        if (!mft__json_is_string(type, "TemplateProcessing")) return mft__tok_unsupported(l, "post-processor", step);
        if (mft_json_type(single) != MFT_JSON_ARRAY || t->n_before || t->n_after)
            return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a TemplateProcessing whose template is no list, or two of them");
        for (k = 0; (item = mft_json_at(single, k, NULL)) != NULL; k++) {
            size_t          n;
            const char     *name = mft_json_string(mft_json_get(mft_json_get(item, "SpecialToken"), "id"), &n);
            const mft_json *ids  = name ? mft_json_get(mft_json_get(mft_json_get(step, "special_tokens"), name), "ids") : NULL;
            if (mft__json_is_string(mft_json_get(mft_json_get(item, "Sequence"), "id"), "A") && !behind) { behind = 1; continue; }
            if (!name || !mft_json_count(ids)) return mft__tok_fail(l, MFT_ERR_FORMAT, "post-processor: item %llu of the template is neither the text nor a special token with ids", (unsigned long long)k);
            for (j = 0; j < mft_json_count(ids); j++) {
                int64_t  id = mft_json_integer(mft_json_at(ids, j, NULL), -1);
                int     *count = behind ? &t->n_after : &t->n_before;
                if (!mft__has_token(t, id))
                    return mft__tok_fail(l, MFT_ERR_FORMAT, "post-processor: '%s' has an id that no token has", mft__name(name, n, &shown));
                if (*count == 8) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "post-processor: more than 8 tokens on one side");
                (behind ? t->after : t->before)[(*count)++] = (int32_t)id;
            }
        }
        if (!behind) return mft__tok_fail(l, MFT_ERR_FORMAT, "post-processor: a template without the text");
    }
    return MFT_OK;
}

/* Part number i as a tree; NULL with MFT_OK if the file lacks it or has null. */
static mft_status mft__tok_part(mft__tok_loader *l, int i, mft_json **out)
{
    const char *p;
    int64_t     line = 1;
    *out = NULL;
    if (!l->part[i] || *l->part[i] == 'n') return MFT_OK;
    if (*l->part[i] != '{') return mft__tok_fail(l, MFT_ERR_FORMAT, "normalizer, pre_tokenizer, post_processor and decoder are objects or null");
    if (l->part_bytes[i] > (size_t)1 << 20) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "settings of more than 1 MB around the model");
    for (p = l->text; (p = (const char *)memchr(p, '\n', (size_t)(l->part[i] - p))) != NULL; p++) line++;
    return mft__json_parse(l->ctx, mft__path(l->path), line, l->part[i], l->part_bytes[i], out);
}

static mft_status mft__tok_load_json(mft__tok_loader *l)
{
    mft_tokenizer *t = l->t;
    mft_json      *node;
    mft_status     s;
    int            byte_level = 0;

    if ((s = mft__file_read_all(l->ctx, l->path, (size_t)1 << 28, &l->text, &l->text_bytes)) != MFT_OK
        || (s = mft__tok_survey(l)) != MFT_OK) return s;

    if ((s = mft__tok_part(l, 0, &node)) != MFT_OK) return s;
    s = mft__tok_normalizer(l, node);
    mft_json_destroy(node);
    if (s != MFT_OK || (s = mft__tok_part(l, 1, &node)) != MFT_OK) return s;
    s = mft__tok_pre_tokenizer(l, node, &byte_level);
    mft_json_destroy(node);
    if (s != MFT_OK || (s = mft__tok_part(l, 3, &node)) != MFT_OK) return s;
    s = mft__tok_decoder(l, node);
    mft_json_destroy(node);
    if (s != MFT_OK) return s;
    t->byte_level = t->decode == MFT__DECODE_BYTES;
    if (t->byte_level != byte_level) return mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "pre-tokenizer and decoder are not both ByteLevel, or both not");

    if ((s = mft__tok_reserve(l, l->max_id, l->n_vocab, l->vocab_bytes)) != MFT_OK
        || (s = mft__tok_read_vocab(l, l->vocab)) != MFT_OK
        || (s = mft__tok_reserve_merges(l, l->n_merges, l->n_merges)) != MFT_OK
        || (s = mft__tok_read_merges(l, l->merges)) != MFT_OK
        || (s = mft__tok_finish_model(l)) != MFT_OK
        || (l->has_added && (s = mft__tok_read_added(l, l->added, 1)) != MFT_OK)
        || (s = mft__tok_part(l, 2, &node)) != MFT_OK) return s;
    s = mft__tok_post_processor(l, node);
    mft_json_destroy(node);
    return s;
}

/* ---- loading: tokenizer_config.json ---- */

/* The text of a token that the config names: a string, or an object with its content. NULL: none. */
static const char *mft__tok_config_token(const mft__tok_loader *l, const char *key, size_t *n)
{
    const mft_json *node = mft_json_get(l->config, key);
    return mft_json_string(mft_json_type(node) == MFT_JSON_OBJECT ? mft_json_get(node, "content") : node, n);
}

static int mft__tok_config_class(const mft__tok_loader *l, const char *begins)
{
    size_t n;
    const char *s = mft_json_string(mft_json_get(l->config, "tokenizer_class"), &n);
    return s && n >= strlen(begins) && memcmp(s, begins, strlen(begins)) == 0;
}

/* The id of a token by its text as the files have it, -1 if there is none. 0 without memory. */
static int mft__token_named(const mft_tokenizer *t, const char *p, size_t n, int32_t *out)
{
    mft__bytes b;
    int        raw, ok;
    *out = -1;
    if (!n || mft__utf8_valid(p, n) != n) return 1;
    memset(&b, 0, sizeof b);
    ok = mft__tok_unwrap(t->ctx, t, p, n, &b, &raw);
    if (ok && (*out = mft__piece_find(t, b.p, b.n, raw)) < 0) *out = mft__piece_find(t, b.p, b.n, raw | MFT__TOKEN_OUTSIDE);
    mft__bytes_free(t->ctx, &b);
    return ok;
}

/* Forms without a tokenizer.json: the added tokens are in the config, and those that its class has anyway. */
static mft_status mft__tok_config_added(mft__tok_loader *l, int apply)
{
    static const char *const names[4] = { "bos_token", "eos_token", "unk_token", "pad_token" };
    const mft_json *list = mft_json_get(l->config, "added_tokens_decoder"), *node;
    mft__name_text  name;
    mft_status      s;
    size_t          i, n;
    const char     *key, *p;
    int64_t         id;
    int32_t         known;
    for (i = 0; (node = mft_json_at(list, i, &key)) != NULL; i++) {
        mft__added a;
        memset(&a, 0, sizeof a);
        for (id = 0, p = key; *p >= '0' && *p <= '9' && id < MFT__MAX_IDS; p++) id = id * 10 + (*p - '0');
        p = *p || p == key ? NULL : mft_json_string(mft_json_get(node, "content"), &n);
        if (!p || id >= MFT__MAX_IDS) return mft__tok_fail(l, MFT_ERR_FORMAT, "tokenizer_config.json: added_tokens_decoder '%s' is no id with a content", mft__name(key, strlen(key), &name));
        if (!apply) {
            if (id > l->max_id) l->max_id = id;
            l->n_vocab++; l->vocab_bytes += n;
            continue;
        }
        a.lstrip      = mft_json_bool(mft_json_get(node, "lstrip"), 0);
        a.rstrip      = mft_json_bool(mft_json_get(node, "rstrip"), 0);
        a.single_word = mft_json_bool(mft_json_get(node, "single_word"), 0);
        a.normalized  = mft_json_bool(mft_json_get(node, "normalized"), 0);
        if ((s = mft__tok_add(l, id, p, n, a, mft_json_bool(mft_json_get(node, "special"), 0))) != MFT_OK) return s;
    }
    for (i = 0; apply && i < 4; i++) {          /* those that have an id already, as pieces of the vocabulary */
        mft__added a;
        memset(&a, 0, sizeof a);
        p = mft__tok_config_token(l, names[i], &n);
        if (!p && l->t->byte_level) { p = "<|endoftext|>"; n = 13; }
        if (!p) continue;
        if (!mft__token_named(l->t, p, n, &known)) return MFT_ERR_OUT_OF_MEMORY;
        if (known < 0 || l->t->flags[known] & MFT__TOKEN_ADDED) continue;
        if ((s = mft__tok_add(l, known, p, n, a, 1)) != MFT_OK) return s;
    }
    return MFT_OK;
}

/* bos, eos, pad; and what goes around a text where no post-processor says so. */
static mft_status mft__tok_config_ids(mft__tok_loader *l, int has_processor, int bos_by_default)
{
    static const char *const names[3] = { "bos_token", "eos_token", "pad_token" };
    mft_tokenizer *t = l->t;
    int32_t       *ids[3];
    int            i;
    ids[0] = &t->bos; ids[1] = &t->eos; ids[2] = &t->pad;
    for (i = 0; i < 3; i++) {
        size_t      n;
        const char *p = mft__tok_config_token(l, names[i], &n);
        /* GPT-2's own config names none: its class has one for all purposes, Qwen's for the end only */
        if (t->byte_level && !mft_json_get(l->config, names[i]) && (i == 1 || (i == 0 && !mft__tok_config_class(l, "Qwen")))) { p = "<|endoftext|>"; n = 13; }
        if (p && !mft__token_named(t, p, n, ids[i])) return MFT_ERR_OUT_OF_MEMORY;
    }
    if (has_processor) return MFT_OK;
    if (t->bos >= 0 && mft_json_bool(mft_json_get(l->config, "add_bos_token"), bos_by_default)) t->before[t->n_before++] = t->bos;
    if (t->eos >= 0 && mft_json_bool(mft_json_get(l->config, "add_eos_token"), 0))              t->after[t->n_after++]   = t->eos;
    return MFT_OK;
}

/* ---- loading: vocab.json and merges.txt ---- */

static void mft__tok_drop_text(mft__tok_loader *l)
{
    if (l->text) mft__free(l->ctx, l->text, l->text_bytes + 1);
    l->text = NULL;
}

/* The two older files of byte-level tokenizers. They do not say how words are cut: the class of
 * tokenizer_config.json does, Qwen's or GPT-2's. */
static mft_status mft__tok_load_vocab_merges(mft__tok_loader *l, const char *vocab_path, const char *merges_path)
{
    mft_tokenizer  *t = l->t;
    mft__json_scan  s;
    mft__json_event e;
    mft__split     *split = NULL;
    mft_status      status;
    const char     *p, *end, *q;
    int64_t         id, left;
    size_t          n = 0;
    int             pass, qwen = mft__tok_config_class(l, "Qwen");

    t->byte_level = 1;
    t->decode     = MFT__DECODE_BYTES;
    if (qwen) t->normal[t->n_normal++].kind = MFT__NORMAL_NFC;
    if ((status = mft__tok_add_split(l, qwen ? MFT__SPLIT_CL100K : MFT__SPLIT_GPT2, qwen, &split)) != MFT_OK) return status;

    l->path = vocab_path;
    if ((status = mft__file_read_all(l->ctx, vocab_path, (size_t)1 << 28, &l->text, &l->text_bytes)) != MFT_OK) return status;
    mft__json_scan_init(&s, l->ctx, mft__path(vocab_path), 1, l->text, l->text_bytes);
    l->vocab = s;
    if (!mft__tok_want(&s, MFT__JSON_OBJECT, "a vocab.json")) return s.status;
    while ((e = mft__json_next(&s)) == MFT__JSON_KEY) {
        l->vocab_bytes += s.bytes; l->n_vocab++;
        if (!mft__tok_want(&s, MFT__JSON_NUMBER, "a token's id")) return s.status;
        if (!mft__json_int(&s, &id) || id < 0 || id >= MFT__MAX_IDS) {
            mft__json_bad(&s, MFT_ERR_FORMAT, s.token, "ids are integers from 0 to %d", MFT__MAX_IDS - 1);
            return s.status;
        }
        if (id > l->max_id) l->max_id = id;
    }
    if (e == MFT__JSON_BAD || mft__json_next(&s) != MFT__JSON_DONE) return s.status;
    if ((status = mft__tok_config_added(l, 0)) != MFT_OK
        || (status = mft__tok_reserve(l, l->max_id, l->n_vocab, l->vocab_bytes)) != MFT_OK
        || (status = mft__tok_read_vocab(l, l->vocab)) != MFT_OK) return status;
    mft__tok_drop_text(l);

    l->path = merges_path;
    if ((status = mft__file_read_all(l->ctx, merges_path, (size_t)1 << 28, &l->text, &l->text_bytes)) != MFT_OK) return status;
    if (mft__utf8_valid(l->text, l->text_bytes) != l->text_bytes) return mft__tok_fail(l, MFT_ERR_FORMAT, "not UTF-8");
    for (pass = 0; pass < 2; pass++) {          /* counts, then reads */
        int64_t line = 0;
        if (pass && (status = mft__tok_reserve_merges(l, n, n)) != MFT_OK) return status;
        for (n = 0, p = l->text, end = p + l->text_bytes; p < end; p = q + 1) {
            size_t bytes;
            line++;
            q = (const char *)memchr(p, '\n', (size_t)(end - p));
            if (!q) q = end;
            bytes = (size_t)(q - p);
            if (bytes && p[bytes - 1] == '\r') bytes--;
            if (!bytes || (bytes >= 8 && memcmp(p, "#version", 8) == 0)) continue;
            if (pass) {
                left = mft__tok_pair(l, p, bytes, &status);
                if (status != MFT_OK) return status;
                if (left < 0) return mft__tok_fail(l, MFT_ERR_FORMAT, "line %lld: expected two pieces and a space between them", (long long)line);
                if ((status = mft__tok_merge(l, (uint32_t)n, (size_t)left)) != MFT_OK) return status;
            }
            n++;
        }
    }
    if ((status = mft__tok_finish_model(l)) != MFT_OK) return status;
    return mft__tok_config_added(l, 1);
}

/* ---- loading: tokenizer.model, SentencePiece's protocol buffer ---- */

typedef struct mft__proto { const unsigned char *p, *end; uint64_t value; const unsigned char *data; size_t bytes; int field, wire; } mft__proto;

static int mft__proto_varint(mft__proto *m, uint64_t *out)
{
    int shift;
    *out = 0;
    for (shift = 0; shift < 64 && m->p < m->end; shift += 7) {
        *out |= (uint64_t)(*m->p & 127) << shift;
        if (!(*m->p++ & 128)) return 1;
    }
    return 0;
}

/* The next field of a message: 1; 0 at its end; -1 if it is broken. Lengths are within the message. */
static int mft__proto_next(mft__proto *m)
{
    uint64_t key, n;
    if (m->p == m->end) return 0;
    if (!mft__proto_varint(m, &key) || key >> 3 == 0 || key >> 3 > 536870911) return -1;
    m->field = (int)(key >> 3); m->wire = (int)(key & 7);
    m->value = 0; m->data = NULL; m->bytes = 0;
    switch (m->wire) {
    case 0: return mft__proto_varint(m, &m->value) ? 1 : -1;
    case 1: n = 8; break;
    case 5: n = 4; break;
    case 2: if (!mft__proto_varint(m, &n)) return -1; break;
    default: return -1;
    }
    if (n > (uint64_t)(m->end - m->p)) return -1;
    m->data = m->p; m->bytes = (size_t)n;
    m->p += n;
    return 1;
}

enum { MFT__SP_NORMAL = 1, MFT__SP_UNKNOWN, MFT__SP_CONTROL, MFT__SP_USER, MFT__SP_UNUSED, MFT__SP_BYTE };

typedef struct mft__sp_piece { float score; int32_t id; int type; const char *p; size_t n; } mft__sp_piece;

static int mft__sp_by_score(const void *a, const void *b)       /* best first, then lowest id */
{
    const mft__sp_piece *x = (const mft__sp_piece *)a, *y = (const mft__sp_piece *)b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/* One SentencePiece message of the list; 0 if it is broken. */
static int mft__sp_read_piece(mft__proto m, mft__sp_piece *out)
{
    int more;
    memset(out, 0, sizeof *out);
    out->type = MFT__SP_NORMAL;
    while ((more = mft__proto_next(&m)) == 1) {
        if (m.field == 1 && m.wire == 2) { out->p = (const char *)m.data; out->n = m.bytes; }
        if (m.field == 2 && m.wire == 5) memcpy(&out->score, m.data, 4);
        if (m.field == 3 && m.wire == 0) out->type = (int)(m.value & 255);
    }
    return more == 0 && out->n > 0 && out->score == out->score && mft__utf8_valid(out->p, out->n) == out->n;
}

/* Merges are not in the file. SentencePiece merges the pair whose union is the best piece, the leftmost of
 * equals: every split of a piece into two others has the piece's place in the order of scores as its rank. */
static mft_status mft__sp_merges(mft__tok_loader *l, mft__sp_piece *pieces, size_t n_pieces)
{
    mft_tokenizer *t = l->t;
    mft_status     s;
    size_t         i, k, n;
    int            pass;
    qsort(pieces, n_pieces, sizeof *pieces, mft__sp_by_score);
    for (n = 0, pass = 0; pass < 2; pass++) {
        if (pass && (s = mft__tok_reserve_merges(l, n, n_pieces)) != MFT_OK) return s;
        for (i = n = 0; i < n_pieces; i++) {
            const mft__sp_piece *x = &pieces[i];
            if (pass) t->merged[i] = x->id;
            if (x->type != MFT__SP_NORMAL && x->type != MFT__SP_USER) continue;
            for (k = 1; k < x->n; k++) {
                int32_t left, right;
                if ((x->p[k] & 0xc0) == 0x80) continue;
                left = mft__piece_find(t, x->p, k, 0);
                if (left < 0) continue;
                right = mft__piece_find(t, x->p + k, x->n - k, 0);
                if (right < 0) continue;
                if (pass) mft__tok_put_merge(t, left, right, (uint32_t)i);
                n++;
            }
        }
    }
    return MFT_OK;
}

static mft_status mft__sp_load(mft__tok_loader *l)
{
    mft_tokenizer *t = l->t;
    mft__sp_piece *pieces = NULL, x;
    mft__proto     m, sub;
    mft_status     s = MFT_OK;
    mft__added     a;
    size_t         n = 0, i;
    int            more, pass, model_type = 1, prefix = 1, squeeze = 1, escape = 1, charsmap = 0, suffix = 0;

    if ((s = mft__file_read_all(l->ctx, l->path, (size_t)1 << 28, &l->text, &l->text_bytes)) != MFT_OK) return s;
    for (pass = 0; pass < 2; pass++) {          /* counts and checks, then reads the pieces */
        memset(&m, 0, sizeof m);
        m.p = (const unsigned char *)l->text; m.end = m.p + l->text_bytes;
        n = 0;
        while ((more = mft__proto_next(&m)) == 1) {
            memset(&sub, 0, sizeof sub);
            sub.p = m.data; sub.end = m.data + m.bytes;
            if (m.wire != 2) continue;
            if (m.field == 1) {
                if (!mft__sp_read_piece(sub, &x)) { s = mft__tok_fail(l, MFT_ERR_FORMAT, "piece %llu is broken", (unsigned long long)n); goto done; }
                if (x.type == MFT__SP_UNUSED || x.type < 1 || x.type > MFT__SP_BYTE) { s = mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "piece %llu is of type %d", (unsigned long long)n, x.type); goto done; }
                if (pass) { x.id = (int32_t)n; pieces[n] = x; }
                else l->vocab_bytes += x.n;
                n++;
            } else if (m.field == 2 || m.field == 3) {
                int train = m.field == 2;
                while ((more = mft__proto_next(&sub)) == 1) {
                    int v = (int)(sub.value != 0);
                    if (train  && sub.field == 3  && sub.wire == 0) model_type = (int)(sub.value & 255);
                    if (train  && sub.field == 24 && sub.wire == 0) suffix = v;             /* treat_whitespace_as_suffix */
                    if (!train && sub.field == 2  && sub.wire == 2) charsmap = sub.bytes > 0;
                    if (!train && sub.field == 3  && sub.wire == 0) prefix = v;             /* add_dummy_prefix */
                    if (!train && sub.field == 4  && sub.wire == 0) squeeze = v;            /* remove_extra_whitespaces */
                    if (!train && sub.field == 5  && sub.wire == 0) escape = v;             /* escape_whitespaces */
                }
                if (more < 0) { s = mft__tok_fail(l, MFT_ERR_FORMAT, "its %s is broken", train ? "trainer_spec" : "normalizer_spec"); goto done; }
            }
        }
        if (more < 0 || !n) { s = mft__tok_fail(l, MFT_ERR_FORMAT, "not a SentencePiece model"); goto done; }
        if (!pass) {
            if (model_type != 2) { s = mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a SentencePiece model of type %s; BPE is supported", model_type == 1 ? "Unigram" : model_type == 3 ? "word" : "character"); goto done; }
            if (charsmap || suffix || !escape) { s = mft__tok_fail(l, MFT_ERR_UNSUPPORTED, "a SentencePiece model with %s", charsmap ? "a precompiled normalizer" : suffix ? "treat_whitespace_as_suffix" : "spaces that are not escaped"); goto done; }
            l->max_id = (int64_t)n - 1; l->n_vocab = n;
            if ((s = mft__tok_config_added(l, 0)) != MFT_OK || (s = mft__tok_reserve(l, l->max_id, l->n_vocab, l->vocab_bytes)) != MFT_OK) goto done;
            pieces = (mft__sp_piece *)mft__alloc(l->ctx, n * sizeof *pieces);
            if (!pieces) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
        }
    }

    t->decode = MFT__DECODE_PIECES;
    t->decode_fallback = t->byte_fallback = t->fuse_unk = 1;
    memcpy(t->decode_replace.from.s, MFT__META, 3); t->decode_replace.from.n = 3;
    t->decode_replace.to.s[0] = ' '; t->decode_replace.to.n = 1;
    if (squeeze) t->normal[t->n_normal++].kind = MFT__NORMAL_SQUEEZE;
    if (prefix) {
        t->normal[t->n_normal].kind = MFT__NORMAL_PREPEND;
        t->normal[t->n_normal++].to = t->decode_replace.from;
        t->decode_strip = t->decode_replace.to;
        t->n_decode_strip = 1;
    }
    t->normal[t->n_normal].kind = MFT__NORMAL_REPLACE;
    t->normal[t->n_normal].from = t->decode_replace.to;
    t->normal[t->n_normal++].to = t->decode_replace.from;

    for (i = 0; i < n; i++) {
        if ((s = mft__tok_put(l, (int32_t)i, pieces[i].p, pieces[i].n, 0)) != MFT_OK) goto done;
        t->n_vocab++;
        if (pieces[i].type == MFT__SP_UNKNOWN && !l->unk_text.n && !mft__bytes_add(l->ctx, &l->unk_text, pieces[i].p, pieces[i].n)) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
    }
    if ((s = mft__sp_merges(l, pieces, n)) != MFT_OK || (s = mft__tok_finish_model(l)) != MFT_OK) goto done;
    memset(&a, 0, sizeof a);
    for (i = 0; i < n; i++)
        if ((pieces[i].type == MFT__SP_CONTROL || pieces[i].type == MFT__SP_UNKNOWN || pieces[i].type == MFT__SP_USER)
            && (s = mft__tok_add(l, pieces[i].id, pieces[i].p, pieces[i].n, a, pieces[i].type != MFT__SP_USER)) != MFT_OK) goto done;
    s = mft__tok_config_added(l, 1);            /* the later of two with one text counts */
done:
    if (pieces) mft__free(l->ctx, pieces, (size_t)(l->max_id + 1 > 0 ? n : 0) * sizeof *pieces);
    return s;
}

/* ---- load ---- */

static void mft__tok_destroy(void *self)
{
    mft_tokenizer *t = (mft_tokenizer *)self;
    mft_context   *ctx = t->ctx;
    mft__tok_work *w = t->work;
    int i;
    mft__object_remove(&t->object);
    mft_chat_template_destroy(t->chat);
    if (w) {
        mft__bytes_free(ctx, &w->repaired);
        for (i = 0; i < 2; i++) mft__bytes_free(ctx, &w->normal[i]);
        for (i = 0; i < MFT__MAX_STEPS; i++) mft__bytes_free(ctx, &w->split[i]);
        mft__nfc_free(ctx, &w->nfc);
        mft__free(ctx, w->ids, w->ids_cap * sizeof *w->ids);
        mft__free(ctx, w->symbols, w->symbols_cap * sizeof *w->symbols);
        mft__free(ctx, w->heap, w->heap_cap * sizeof *w->heap);
        mft__free(ctx, w->cache, (size_t)MFT__CACHE_SLOTS * MFT__CACHE_SLOT);
        w->decoder.tok = t;
        mft__decoder_free(&w->decoder);
        mft__free(ctx, w, sizeof *w);
    }
    for (i = 0; i < 2; i++) {
        mft__bytes_free(ctx, &t->added[i].text);
        mft__free(ctx, t->added[i].p, t->added[i].cap * sizeof *t->added[i].p);
    }
    mft__bytes_free(ctx, &t->pieces);
    mft__free(ctx, t->piece_at, (size_t)t->n_ids * sizeof *t->piece_at);
    mft__free(ctx, t->flags, (size_t)t->n_ids);
    mft__free(ctx, t->piece_slots, (size_t)t->n_piece_slots * sizeof *t->piece_slots);
    mft__free(ctx, t->merge_slots, (size_t)t->n_merge_slots * sizeof *t->merge_slots);
    mft__free(ctx, t->merged, (size_t)t->n_ranks * sizeof *t->merged);
    mft__unicode_destroy(ctx, t->unicode);
    mft__free(ctx, t, sizeof *t);
}

MFT_API void mft_tokenizer_destroy(mft_tokenizer *tok) { if (tok) mft__tok_destroy(tok); }

static mft_status mft__chat_attach(mft_context *ctx, const char *snapshot_dir, mft_chat_template **out);

MFT_API mft_status mft_tokenizer_load(mft_context *ctx, const char *snapshot_dir, mft_tokenizer **out)
{
    static const char *const names[5] = { "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer_config.json" };
    mft__tok_loader l;
    mft_tokenizer  *t;
    char           *path[5] = { NULL, NULL, NULL, NULL, NULL }, *dir = NULL, *fit;
    mft_status      s = MFT_ERR_OUT_OF_MEMORY;
    size_t          n_added, before;
    int             i;

    if (out) *out = NULL;
    if (!ctx || !snapshot_dir || !out) return MFT_ERR_INVALID_ARGUMENT;
    memset(&l, 0, sizeof l);
    l.ctx = ctx; l.max_id = -1;
    before = ctx->now;
    l.t = t = (mft_tokenizer *)mft__alloc_zero(ctx, sizeof *t);
    if (!t) return MFT_ERR_OUT_OF_MEMORY;
    t->ctx = ctx;
    t->seed = ((uint64_t)(uintptr_t)t >> 6) * 0x9e3779b97f4a7c15u;     /* not known to who wrote the file */
    t->bos = t->eos = t->pad = t->unk = -1;
    mft__tok_alphabet(t);
    if (!mft__bytes_add(ctx, &l.word, "", 1)      /* so that an empty piece has an address */
        || !(t->unicode = mft__unicode_create(ctx)) || !(t->work = (mft__tok_work *)mft__alloc_zero(ctx, sizeof *t->work))) goto done;

    if (mft__ends_with(snapshot_dir, ".json") || mft__ends_with(snapshot_dir, ".model")) {
        if (!(dir = mft__path_dir(ctx, snapshot_dir)) || !(path[mft__ends_with(snapshot_dir, ".json") ? 0 : 3] = mft__strdup(ctx, snapshot_dir))
            || !(path[4] = mft__path_join(ctx, dir, names[4]))) goto done;
    } else for (i = 0; i < 5; i++) if (!(path[i] = mft__path_join(ctx, snapshot_dir, names[i]))) goto done;

    if (mft__file_exists(ctx, path[4])) {
        if ((s = mft_json_load(ctx, path[4], &l.config)) != MFT_OK) goto done;
    }
    if (path[0] && (dir || mft__file_exists(ctx, path[0]))) { l.path = path[0]; s = mft__tok_load_json(&l); }
    else if (path[1] && mft__file_exists(ctx, path[1]) && mft__file_exists(ctx, path[2])) s = mft__tok_load_vocab_merges(&l, path[1], path[2]);
    else if (dir || mft__file_exists(ctx, path[3])) { l.path = path[3]; s = mft__sp_load(&l); }
    else s = mft__fail(ctx, MFT_ERR_IO, "%s: has no tokenizer.json, no vocab.json with merges.txt and no tokenizer.model", mft__path(snapshot_dir));
    if (s == MFT_OK) s = mft__tok_config_ids(&l, path[0] == l.path, path[3] == l.path);
    if (s != MFT_OK) goto done;

    mft__added_sort(&t->added[0]);
    mft__added_sort(&t->added[1]);
    n_added = t->added[0].n + t->added[1].n;
    snprintf(t->kind, sizeof t->kind, "%s BPE, %ld pieces, %lu merges, %lu added tokens", t->byte_level ? "byte-level" : "SentencePiece-style",
             (long)t->n_vocab, (unsigned long)t->n_merges, (unsigned long)n_added);

    s = MFT_ERR_OUT_OF_MEMORY;                  /* give back what the blob has too much: escapes and the alphabet are longer than bytes */
    if (!(fit = (char *)mft__alloc(ctx, t->pieces.n))) goto done;
    memcpy(fit, t->pieces.p, t->pieces.n);
    mft__free(ctx, t->pieces.p, t->pieces.cap);
    t->pieces.p = fit; t->pieces.cap = t->pieces.n;
    s = mft__chat_attach(ctx, dir ? dir : snapshot_dir, &t->chat);
done:
    mft__tok_drop_text(&l);
    mft__bytes_free(ctx, &l.word);
    mft__bytes_free(ctx, &l.unk_text);
    mft__bytes_free(ctx, &l.content);
    mft_json_destroy(l.config);
    for (i = 0; i < 5; i++) mft__strfree(ctx, path[i]);
    mft__strfree(ctx, dir);
    if (s != MFT_OK) { mft__tok_destroy(t); return s; }
    t->bytes = ctx->now - before;
    mft__object_add(ctx, &t->object, mft__tok_destroy);
    *out = t;
    return MFT_OK;
}

/* ---- questions ---- */

MFT_API int32_t     mft_tokenizer_vocab_size(const mft_tokenizer *tok) { return tok ? tok->n_ids : 0; }
MFT_API int32_t     mft_tokenizer_bos_id    (const mft_tokenizer *tok) { return tok ? tok->bos : -1; }
MFT_API int32_t     mft_tokenizer_eos_id    (const mft_tokenizer *tok) { return tok ? tok->eos : -1; }
MFT_API int32_t     mft_tokenizer_pad_id    (const mft_tokenizer *tok) { return tok ? tok->pad : -1; }
MFT_API const char *mft_tokenizer_kind      (const mft_tokenizer *tok) { return tok ? tok->kind : ""; }

MFT_API int mft_tokenizer_is_special(const mft_tokenizer *tok, int32_t id)
{
    return tok && id >= 0 && id < tok->n_ids && (tok->flags[id] & MFT__TOKEN_SPECIAL) != 0;
}

MFT_API int32_t mft_tokenizer_token_to_id(const mft_tokenizer *tok, const char *token, int64_t bytes)
{
    int32_t id;
    if (!tok || !token || !mft__token_named(tok, token, bytes < 0 ? strlen(token) : (size_t)bytes, &id)) return -1;
    return id;
}

MFT_API int64_t mft_tokenizer_id_to_token(const mft_tokenizer *tok, int32_t id, char *token, int64_t cap)
{
    const char *p;
    size_t      n, i;
    int64_t     total = 0;
    uint32_t    c;
    char        utf8[4];
    int         len, k;
    if (!tok || !mft__has_token(tok, id) || cap < 0 || (!token && cap)) return -1;
    p = mft__token_bytes(tok, id, &n);
    for (i = 0; i < n; i++) {                   /* bytes back into the alphabet, where they came from it */
        utf8[0] = p[i]; len = 1;
        if (tok->byte_level && !(tok->flags[id] & MFT__TOKEN_RAW)) {
            for (c = 0; tok->alphabet[c] != (short)(unsigned char)p[i]; c++) { }
            len = mft__utf8_encode(c, utf8);
        }
        for (k = 0; k < len; k++, total++) if (total < cap) token[total] = utf8[k];
    }
    return total;
}

static size_t mft__bytes_held(const mft__bytes *b) { return b->cap + b->from_cap * sizeof *b->from; }

MFT_API size_t mft_tokenizer_bytes(const mft_tokenizer *tok)
{
    const mft__tok_work *w;
    size_t n;
    int    i;
    if (!tok) return 0;
    w = tok->work;
    n = sizeof *tok + sizeof *tok->unicode + (size_t)tok->unicode->n_blocks * 128 + tok->pieces.cap + (size_t)tok->n_ids * 5
      + (size_t)tok->n_piece_slots * 4 + (size_t)tok->n_merge_slots * 8 + (size_t)tok->n_ranks * 4 + sizeof *w
      + (w->cache ? (size_t)MFT__CACHE_SLOTS * MFT__CACHE_SLOT : 0) + w->ids_cap * 4 + w->symbols_cap * sizeof(mft__symbol) + w->heap_cap * 8
      + mft__bytes_held(&w->repaired) + (w->nfc.chars.cap + w->nfc.spare.cap) * 4
      + mft__bytes_held(&w->decoder.pending) + mft__bytes_held(&w->decoder.out) + mft__bytes_held(&w->decoder.piece);
    for (i = 0; i < 2; i++) n += mft__bytes_held(&tok->added[i].text) + tok->added[i].cap * sizeof(mft__added) + mft__bytes_held(&w->normal[i]);
    for (i = 0; i < MFT__MAX_STEPS; i++) n += mft__bytes_held(&w->split[i]);
    return n;
}

/* ==============================================================================
 * MARK: - [CHAT] A small Jinja, and the assistant's part of what it renders
 *
 *   in    a template's text; a conversation
 *   out   text, spans of it
 *   way   text -> scanner -> parser -> nodes, once; nodes + conversation -> evaluator -> text
 *   rule  a failure is kept in the run; from then on every value is undefined and every statement
 *         stops, so that only loops look at it
 * ============================================================================== */
enum {
    MFT__JINJA_MAX_SOURCE = 1 << 20,        /* bytes of a template                                       */
    MFT__JINJA_MAX_NEST   = 64,             /* of brackets and blocks in the source: 1 KB of stack each  */
    MFT__JINJA_MAX_DEPTH  = 200,            /* of evaluation, of values in values                        */
    MFT__JINJA_MAX_STEPS  = 20000000,       /* nodes evaluated, elements and 16ths of bytes gone over: under 1 s */
    MFT__JINJA_MAX_RANGE  = 100000,         /* as in Jinja's sandbox                                     */
    MFT__JINJA_MAX_OUTPUT = 1 << 25,        /* bytes                                                     */
    MFT__JINJA_MAX_MEMORY = 1 << 26         /* bytes of values in one rendering                          */
};

/* A rendering: text ends in NUL. All zero at first; may be used again for the next one. */
typedef struct mft__chat_text {
    char          *text;  size_t bytes, text_cap;
    mft_chat_span *spans; size_t n_spans, span_cap;
} mft__chat_text;

/* ---- nodes ---- */
typedef enum mft__jkind {
    /* expressions: children a, b, c; name in text */
    MFT__J_CONST,                           /* op: 'n' None, 't' True, 'f' False                         */
    MFT__J_INT, MFT__J_FLOAT, MFT__J_STRING, MFT__J_NAME,
    MFT__J_LIST, MFT__J_TUPLE,              /* a: first element                                          */
    MFT__J_DICT,                            /* a: first PAIR                                             */
    MFT__J_PAIR,                            /* a: key, b: value                                          */
    MFT__J_ATTR,                            /* a.text                                                    */
    MFT__J_ITEM,                            /* a[b]; b may be a SLICE                                    */
    MFT__J_SLICE,                           /* a:b:c, 0 where left out                                   */
    MFT__J_CALL,                            /* a(b..); arguments: expressions, then KEYWORDs             */
    MFT__J_KEYWORD,                         /* text = a                                                  */
    MFT__J_FILTER, MFT__J_TEST,             /* a | text(b..), a is text(b..); op 1: `is not`             */
    MFT__J_NOT, MFT__J_NEG, MFT__J_POS, MFT__J_AND, MFT__J_OR,
    MFT__J_BINARY,                          /* a op b                                                    */
    MFT__J_COMPARE,                         /* a, then OPERANDs from b on                                */
    MFT__J_OPERAND,                         /* op a                                                      */
    MFT__J_COND,                            /* a if b else c                                             */
    MFT__J_CAPTURED,                        /* the text of the block that this filter chain stands over  */
    /* statements */
    MFT__J_TEXT, MFT__J_OUTPUT,             /* OUTPUT: a                                                 */
    MFT__J_IF,                              /* a: first BRANCH                                           */
    MFT__J_BRANCH,                          /* a: condition, 0 for else; b: body                         */
    MFT__J_FOR,                             /* a: target, b: iterable, c: condition, d: body, e: else    */
    MFT__J_SET,                             /* a: target, b: value                                       */
    MFT__J_SET_BLOCK, MFT__J_FILTER_BLOCK,  /* a: target, b: filter chain over CAPTURED, c: body         */
    MFT__J_MACRO,                           /* text(a: PARAMs), c: body                                  */
    MFT__J_PARAM,                           /* text = a                                                  */
    MFT__J_CALL_BLOCK,                      /* caller(a: PARAMs), b: CALL, c: body                       */
    MFT__J_WITH,                            /* a: SETs, c: body                                          */
    MFT__J_GENERATION,                      /* c: body                                                   */
    MFT__J_BREAK, MFT__J_CONTINUE
} mft__jkind;

typedef struct mft__jnode {
    uint8_t     kind, op;
    int32_t     line;
    int32_t     a, b, c, d, e;              /* other nodes, 0 for none                                   */
    int32_t     next;                       /* the next statement, element, argument                     */
    const char *text; size_t bytes;         /* in the template's source or its pool                      */
    int64_t     i;
    double      f;
} mft__jnode;

typedef struct mft__chat_variable { char *name, *value; } mft__chat_variable;

struct mft_chat_template {
    mft__object  object;
    mft_context *ctx;
    char        *source; size_t bytes;      /* line ends made \n, NUL-terminated                         */
    char        *pool;                      /* string literals without their escapes; as long as source  */
    mft__jnode  *nodes;  size_t n_nodes, node_cap;
    int32_t      body;
    int          has_marks;                 /* {% generation %} occurs                                   */
    int          has_prompt;                /* add_generation_prompt occurs                              */
    mft__chat_variable *variables; size_t n_variables, variable_cap;
    mft_status   broken;                    /* why it cannot be rendered, for a tokenizer's template     */
    char         why[256];
};

/* ---- characters ---- */

/* The character at s[0..n), n > 0, and its bytes; what is not UTF-8 counts byte for byte. */
static size_t mft__jinja_char(const char *s, size_t n, uint32_t *out)
{
    int k = mft__utf8_decode(s, s + n, out);
    if (!k) *out = (unsigned char)s[0];
    return k ? (size_t)k : 1;
}

/* The character that ends at s[n), n > 0. */
static size_t mft__jinja_char_before(const char *s, size_t n, uint32_t *out)
{
    size_t k;
    for (k = 2; k <= 4 && k <= n; k++)
        if (((unsigned char)s[n - k] & 0xc0) != 0x80) {
            if (mft__jinja_char(s + n - k, k, out) == k) return k;
            break;
        }
    *out = (unsigned char)s[n - 1];
    return 1;
}

/* Python's str.isspace, which is also what \s means to Jinja */
static int mft__jinja_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680
        || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/* Case of Latin, Greek and Cyrillic letters whose other case is one letter; others stay. */
static uint32_t mft__jinja_lower(uint32_t c)
{
    if (c < 0x80) return c >= 'A' && c <= 'Z' ? c + 32 : c;
    if ((c >= 0xc0 && c <= 0xde && c != 0xd7) || (c >= 0x391 && c <= 0x3ab && c != 0x3a2)
        || (c >= 0x410 && c <= 0x42f)) return c + 32;
    if (c >= 0x400 && c <= 0x40f) return c + 80;
    if (c == 0x178) return 0xff;
    if (c == 0x386) return 0x3ac;
    if (c >= 0x388 && c <= 0x38a) return c + 37;
    if (c == 0x38c) return 0x3cc;
    if (c == 0x38e || c == 0x38f) return c + 63;
    if ((c >= 0x100 && c <= 0x12f) || (c >= 0x132 && c <= 0x137) || (c >= 0x14a && c <= 0x177)
        || (c >= 0x460 && c <= 0x481) || (c >= 0x48a && c <= 0x4bf) || (c >= 0x1e00 && c <= 0x1e95) || (c >= 0x1ea0 && c <= 0x1eff))
        return c | 1;
    if ((c >= 0x139 && c <= 0x148) || (c >= 0x179 && c <= 0x17e)) return c + (c & 1);
    return c;
}

static uint32_t mft__jinja_upper(uint32_t c)
{
    if (c < 0x80) return c >= 'a' && c <= 'z' ? c - 32 : c;
    if ((c >= 0xe0 && c <= 0xfe && c != 0xf7) || (c >= 0x3b1 && c <= 0x3cb && c != 0x3c2)
        || (c >= 0x430 && c <= 0x44f)) return c - 32;
    if (c >= 0x450 && c <= 0x45f) return c - 80;
    if (c == 0xb5) return 0x39c;
    if (c == 0xff) return 0x178;
    if (c == 0x131) return 'I';
    if (c == 0x17f) return 'S';
    if (c == 0x3c2) return 0x3a3;
    if (c == 0x3ac) return 0x386;
    if (c >= 0x3ad && c <= 0x3af) return c - 37;
    if (c == 0x3cc) return 0x38c;
    if (c == 0x3cd || c == 0x3ce) return c - 63;
    if ((c >= 0x100 && c <= 0x12f) || (c >= 0x132 && c <= 0x137) || (c >= 0x14a && c <= 0x177)
        || (c >= 0x460 && c <= 0x481) || (c >= 0x48a && c <= 0x4bf) || (c >= 0x1e00 && c <= 0x1e95) || (c >= 0x1ea0 && c <= 0x1eff))
        return c & ~(uint32_t)1;
    if ((c >= 0x139 && c <= 0x148) || (c >= 0x179 && c <= 0x17e)) return c - !(c & 1);
    return c;
}

static int mft__jinja_same(const char *a, size_t n, const char *word) { return strlen(word) == n && !memcmp(a, word, n); }

/* Where `what` occurs in s[from..n), -1 if it does not. */
static int64_t mft__jinja_find(const char *s, size_t n, size_t from, const char *what, size_t bytes)
{
    size_t i;
    if (!bytes) return from <= n ? (int64_t)from : -1;
    for (i = from; i < n && bytes <= n - i; i++) {
        const char *hit = (const char *)memchr(s + i, what[0], n - i - bytes + 1);
        if (!hit) return -1;
        i = (size_t)(hit - s);
        if (!memcmp(hit, what, bytes)) return (int64_t)i;
    }
    return -1;
}

/* A decimal number as Python's float() reads it; 0 if it is none. strtod goes by the locale's decimal
 * point, so it is given that one. */
static int mft__jinja_number(const char *s, size_t n, double *out)
{
    char   buffer[400], point[8], *end;
    size_t i, m = 0, digits = 0;
    while (n && mft__jinja_is_space((unsigned char)s[0])) { s++; n--; }
    while (n && mft__jinja_is_space((unsigned char)s[n - 1])) n--;
    snprintf(point, sizeof point, "%.1f", 0.5);
    for (i = 0; i < n && m + 1 < sizeof buffer; i++) {
        if (s[i] >= '0' && s[i] <= '9') digits++;
        else if (s[i] == '_' && i && i + 1 < n && s[i - 1] >= '0' && s[i - 1] <= '9') continue;
        else if (!strchr("+-.eE", s[i]) || !s[i]) return 0;
        buffer[m++] = s[i] == '.' ? point[1] : s[i];
    }
    if (i < n || !digits) return 0;
    buffer[m] = '\0';
    *out = strtod(buffer, &end);
    return end == buffer + m;
}

/* ---- scanner ---- */
typedef enum mft__jtoken { MFT__T_EOF, MFT__T_END, MFT__T_NAME, MFT__T_STRING, MFT__T_INT, MFT__T_FLOAT, MFT__T_OP } mft__jtoken;

typedef struct mft__jparser {
    mft_chat_template *t;
    const char *s; size_t n;                /* the source                                                */
    size_t      at;                         /* after the current token                                   */
    int         line;
    size_t      pool_used;
    int         in_block;                   /* in {% %}, not {{ }}                                       */
    char        closers[MFT__JINJA_MAX_NEST]; int n_open;      /* brackets to be closed                  */
    int         nest, loops;
    mft_status  status;
    mft__jtoken token;                      /* the current one                                           */
    int         op;                         /* of T_OP: its character; two-character ones see the table  */
    const char *text; size_t bytes;
    int         token_line;
} mft__jparser;

/* Keeps the first failure and ends the source, so that every loop ends. */
static void mft__jinja_syntax(mft__jparser *p, mft_status status, const char *format, ...) MFT__PRINTF(3, 4);
static void mft__jinja_syntax(mft__jparser *p, mft_status status, const char *format, ...)
{
    char    text[192];
    va_list args;
    if (!p->status) {
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        p->status = mft__fail(p->t->ctx, status, "chat template, line %d: %s", p->token_line, text);
    }
    p->token = MFT__T_EOF; p->op = 0; p->bytes = 0;
    p->at = p->n;
}

#define MFT__CUT(bytes) ((int)((bytes) < 40 ? (bytes) : 40))        /* names in messages */

static void mft__jinja_advance(mft__jparser *p, size_t to)
{
    for (; p->at < to; p->at++) p->line += p->s[p->at] == '\n';
}

static void mft__jinja_skip_space(mft__jparser *p)
{
    uint32_t c;
    size_t   k;
    while (p->at < p->n) {
        k = mft__jinja_char(p->s + p->at, p->n - p->at, &c);
        if (!mft__jinja_is_space(c)) return;
        mft__jinja_advance(p, p->at + k);
    }
}

static int mft__jinja_at(const mft__jparser *p, size_t at, const char *what)
{
    size_t n = strlen(what);
    return at <= p->n && n <= p->n - at && !memcmp(p->s + at, what, n);
}

static int mft__jinja_is_word(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || (unsigned char)c >= 0x80;
}

/* The end of a tag, and what its sign says about the blanks behind it. */
static int mft__jinja_scan_end(mft__jparser *p)
{
    const char *close = p->in_block ? "%}" : "}}";
    char sign = p->at < p->n ? p->s[p->at] : 0;
    if (p->n_open) return 0;
    if (mft__jinja_at(p, p->at, close)) sign = 0;
    else if (!((sign == '-' || (sign == '+' && p->in_block)) && mft__jinja_at(p, p->at + 1, close))) return 0;
    mft__jinja_advance(p, p->at + 2 + (sign != 0));
    if (sign == '-') mft__jinja_skip_space(p);
    else if (!sign && p->in_block && mft__jinja_at(p, p->at, "\n")) mft__jinja_advance(p, p->at + 1);     /* trim_blocks */
    p->token = MFT__T_END;
    return 1;
}

static void mft__jinja_scan(mft__jparser *p)
{
    static const struct { char text[3]; char op; } pairs[] = {
        { "==", 'e' }, { "!=", '!' }, { "<=", 'l' }, { ">=", 'g' }, { "//", 'D' }, { "**", 'P' } };
    size_t begin, k;
    char   c;

    if (p->status) return;
    mft__jinja_skip_space(p);
    p->token_line = p->line;
    begin = p->at;
    p->text = p->s + begin; p->bytes = 0; p->op = 0;
    if (begin >= p->n) { p->token = MFT__T_EOF; return; }
    if (mft__jinja_scan_end(p)) return;

    c = p->s[begin];
    k = begin;
    if (c >= '0' && c <= '9') {
        int after_dot = begin && p->s[begin - 1] == '.';
        p->token = MFT__T_INT;
        if (c == '0' && k + 1 < p->n && strchr("xXoObB", p->s[k + 1])) { k += 2; while (k < p->n && mft__jinja_is_word(p->s[k])) k++; }
        else {
            while (k < p->n && ((p->s[k] >= '0' && p->s[k] <= '9') || p->s[k] == '_')) k++;
            if (!after_dot) {
                size_t e = k;
                if (e + 1 < p->n && p->s[e] == '.' && p->s[e + 1] >= '0' && p->s[e + 1] <= '9') {
                    p->token = MFT__T_FLOAT;
                    for (e++; e < p->n && ((p->s[e] >= '0' && p->s[e] <= '9') || p->s[e] == '_'); ) e++;
                    k = e;
                }
                if (e < p->n && (p->s[e] == 'e' || p->s[e] == 'E')) {
                    e++;
                    if (e < p->n && (p->s[e] == '+' || p->s[e] == '-')) e++;
                    if (e < p->n && p->s[e] >= '0' && p->s[e] <= '9') {
                        while (e < p->n && ((p->s[e] >= '0' && p->s[e] <= '9') || p->s[e] == '_')) e++;
                        p->token = MFT__T_FLOAT;
                        k = e;
                    }
                }
            }
        }
    } else if (mft__jinja_is_word(c)) {
        p->token = MFT__T_NAME;
        while (k < p->n && mft__jinja_is_word(p->s[k])) k++;
    } else if (c == '\'' || c == '"') {
        p->token = MFT__T_STRING;
        for (k++; k < p->n && p->s[k] != c; k++) if (p->s[k] == '\\') k++;
        if (k >= p->n) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "a string is not closed"); return; }
        p->text++; p->bytes = k - begin - 1;                    /* without quotes, escapes still in */
        mft__jinja_advance(p, k + 1);
        return;
    } else {
        p->token = MFT__T_OP;
        p->op = (unsigned char)c;
        for (k = 0; k < sizeof pairs / sizeof pairs[0]; k++)
            if (mft__jinja_at(p, begin, pairs[k].text)) { p->op = pairs[k].op; p->bytes = 2; break; }
        if (!p->bytes) {
            p->bytes = 1;
            if (!strchr("+-*/%~<>()[]{},:.|=", c)) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "unexpected character '%c'", c); return; }
        }
        mft__jinja_advance(p, begin + p->bytes);
        if (c == '(' || c == '[' || c == '{') {
            if (p->n_open == MFT__JINJA_MAX_NEST) { mft__jinja_syntax(p, MFT_ERR_UNSUPPORTED, "brackets nest deeper than %d", MFT__JINJA_MAX_NEST); return; }
            p->closers[p->n_open++] = c == '(' ? ')' : c == '[' ? ']' : '}';
        } else if (c == ')' || c == ']' || c == '}') {
            if (!p->n_open || p->closers[p->n_open - 1] != c) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "unexpected '%c'", c); return; }
            p->n_open--;
        }
        return;
    }
    p->bytes = k - begin;
    mft__jinja_advance(p, k);
}

static int mft__jinja_is(const mft__jparser *p, const char *name)
{
    return p->token == MFT__T_NAME && mft__jinja_same(p->text, p->bytes, name);
}

static int mft__jinja_is_op(const mft__jparser *p, int op) { return p->token == MFT__T_OP && p->op == op; }

static int mft__jinja_skip(mft__jparser *p, const char *name)
{
    if (!mft__jinja_is(p, name)) return 0;
    mft__jinja_scan(p);
    return 1;
}

static int mft__jinja_skip_op(mft__jparser *p, int op)
{
    if (!mft__jinja_is_op(p, op)) return 0;
    mft__jinja_scan(p);
    return 1;
}

static void mft__jinja_unexpected(mft__jparser *p, const char *wanted)
{
    if (p->token == MFT__T_EOF)      mft__jinja_syntax(p, MFT_ERR_FORMAT, "the template ends where %s should be", wanted);
    else if (p->token == MFT__T_END) mft__jinja_syntax(p, MFT_ERR_FORMAT, "the tag ends where %s should be", wanted);
    else mft__jinja_syntax(p, MFT_ERR_FORMAT, "'%.*s' where %s should be", MFT__CUT(p->bytes), p->text, wanted);
}

static void mft__jinja_expect_op(mft__jparser *p, int op)
{
    char wanted[4];
    wanted[0] = '\''; wanted[1] = (char)op; wanted[2] = '\''; wanted[3] = '\0';
    if (!mft__jinja_skip_op(p, op)) mft__jinja_unexpected(p, wanted);
}

/* ---- parser: expressions ---- */
static mft__jnode *mft__jinja_node(mft__jparser *p, int32_t i) { return &p->t->nodes[i]; }

/* A node for what stands at the current token. 0, with the failure kept, when there is no memory. */
static int32_t mft__jinja_new(mft__jparser *p, mft__jkind kind, int32_t a, int32_t b)
{
    mft_chat_template *t = p->t;
    void       *v = t->nodes;
    mft__jnode *n;
    if (p->status) return 0;
    if (!mft__grow(t->ctx, &v, &t->node_cap, t->n_nodes + 1, sizeof *n)) { p->status = MFT_ERR_OUT_OF_MEMORY; p->token = MFT__T_EOF; p->at = p->n; return 0; }
    t->nodes = (mft__jnode *)v;
    n = &t->nodes[t->n_nodes];
    memset(n, 0, sizeof *n);
    n->kind = (uint8_t)kind; n->line = p->token_line; n->a = a; n->b = b;
    n->text = p->text; n->bytes = p->bytes;
    return (int32_t)t->n_nodes++;
}

/* Appends a node to a list that is held by its first and last. */
static void mft__jinja_append(mft__jparser *p, int32_t *first, int32_t *last, int32_t node)
{
    if (!node) return;
    if (*last) mft__jinja_node(p, *last)->next = node;
    else *first = node;
    *last = node;
}

static int32_t mft__jinja_expression(mft__jparser *p);
static int32_t mft__jinja_unary(mft__jparser *p, int with_filter);

static int mft__jinja_enter(mft__jparser *p)
{
    if (p->nest == MFT__JINJA_MAX_NEST) { mft__jinja_syntax(p, MFT_ERR_UNSUPPORTED, "expressions or blocks nest deeper than %d", MFT__JINJA_MAX_NEST); return 0; }
    p->nest++;
    return 1;
}

static int mft__jinja_hex(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The current string token into the pool, escapes replaced as in Python's literals. The result is
 * never longer than the literal, so the pool, as long as the source, is always enough. */
static void mft__jinja_unescape(mft__jparser *p)
{
    static const char from[] = "abfnrtv\\'\"", to[] = "\a\b\f\n\r\t\v\\'\"";
    const char *s = p->text;
    char       *out = p->t->pool + p->pool_used;
    size_t      i = 0, n = p->bytes, m = 0, k;

    while (i < n) {
        const char *plain;
        uint32_t    c = 0;
        if (s[i] != '\\' || i + 1 == n) { out[m++] = s[i++]; continue; }
        i++;
        plain = strchr(from, s[i]);
        if (s[i] == '\n') i++;                                  /* a line goes on */
        else if (plain && *plain) { out[m++] = to[plain - from]; i++; }
        else if (s[i] >= '0' && s[i] <= '7') {
            for (k = 0; k < 3 && i < n && s[i] >= '0' && s[i] <= '7'; k++) c = c * 8 + (uint32_t)(s[i++] - '0');
            m += (size_t)mft__utf8_encode(c, out + m);
        } else if (s[i] == 'x' || s[i] == 'u' || s[i] == 'U') {
            size_t digits = s[i] == 'x' ? 2 : s[i] == 'u' ? 4 : 8;
            for (k = 0, i++; k < digits && i < n && mft__jinja_hex(s[i]) >= 0; k++) c = c << 4 | (uint32_t)mft__jinja_hex(s[i++]);
            if (k < digits || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "an escape in a string is no character"); return; }
            m += (size_t)mft__utf8_encode(c, out + m);
        } else if (s[i] == 'N') { mft__jinja_syntax(p, MFT_ERR_UNSUPPORTED, "characters by name (\\N) are not known"); return; }
        else { out[m++] = '\\'; out[m++] = s[i++]; }            /* not an escape: stays */
    }
    p->pool_used += m;
}

/* Arguments up to and with the closing bracket, the opening one being the current token. */
static int32_t mft__jinja_arguments(mft__jparser *p)
{
    int32_t first = 0, last = 0, node;
    int     keywords = 0;
    mft__jinja_expect_op(p, '(');
    while (!p->status && !mft__jinja_is_op(p, ')')) {
        if (first) { mft__jinja_expect_op(p, ','); if (mft__jinja_is_op(p, ')')) break; }
        if (mft__jinja_is_op(p, '*') || mft__jinja_is_op(p, 'P')) { mft__jinja_syntax(p, MFT_ERR_UNSUPPORTED, "'*' and '**' before an argument are not known"); break; }
        if (p->token == MFT__T_NAME) {                          /* name=value: look behind the name */
            size_t i = p->at;
            while (i < p->n && mft__jinja_is_space((unsigned char)p->s[i])) i++;
            if (mft__jinja_at(p, i, "=") && !mft__jinja_at(p, i, "==")) {
                int32_t value;
                node = mft__jinja_new(p, MFT__J_KEYWORD, 0, 0);
                mft__jinja_scan(p); mft__jinja_scan(p);
                value = mft__jinja_expression(p);
                mft__jinja_node(p, node)->a = value;
                mft__jinja_append(p, &first, &last, node);
                keywords = 1;
                continue;
            }
        }
        if (keywords) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "an argument without a name after one with a name"); break; }
        mft__jinja_append(p, &first, &last, mft__jinja_expression(p));
    }
    mft__jinja_expect_op(p, ')');
    return first;
}

/* Expressions with commas between: a tuple, or the one expression if there is no comma. `bare`: without
 * `a if b else c`, and ended by the words that may follow there. */
static int32_t mft__jinja_binary(mft__jparser *p, int level);
static int32_t mft__jinja_tuple(mft__jparser *p, int bare, int parenthesised)
{
    int32_t first = 0, last = 0, tuple;
    int     comma = 0;
    tuple = mft__jinja_new(p, MFT__J_TUPLE, 0, 0);
    while (!p->status && p->token != MFT__T_END && !mft__jinja_is_op(p, ')') && !(bare && (mft__jinja_is(p, "in") || mft__jinja_is(p, "recursive")))) {
        mft__jinja_append(p, &first, &last, bare ? mft__jinja_binary(p, 0) : mft__jinja_expression(p));
        if (!mft__jinja_skip_op(p, ',')) break;
        comma = 1;
    }
    if (p->status) return 0;
    if (first && !comma) return first;
    if (!first && !parenthesised) { mft__jinja_unexpected(p, "an expression"); return 0; }
    mft__jinja_node(p, tuple)->a = first;
    return tuple;
}

static int32_t mft__jinja_integer(mft__jparser *p)
{
    int32_t  node = mft__jinja_new(p, MFT__J_INT, 0, 0);
    uint64_t v = 0, base = 10;
    size_t   i = 0;
    if (p->bytes > 1 && p->text[0] == '0') {
        char c = (char)(p->text[1] | 32);
        base = c == 'x' ? 16 : c == 'o' ? 8 : c == 'b' ? 2 : 10;
        if (base != 10) i = 2;
    }
    for (; i < p->bytes; i++) {
        int d = p->text[i] == '_' ? -2 : mft__jinja_hex(p->text[i]);
        if (d == -2) continue;
        if (d < 0 || (uint64_t)d >= base) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "'%.*s' is not a number", MFT__CUT(p->bytes), p->text); return 0; }
        if (v > ((uint64_t)INT64_MAX - (uint64_t)d) / base) { mft__jinja_syntax(p, MFT_ERR_UNSUPPORTED, "an integer does not fit 64 bits"); return 0; }
        v = v * base + (uint64_t)d;
    }
    mft__jinja_node(p, node)->i = (int64_t)v;
    mft__jinja_scan(p);
    return node;
}

static int32_t mft__jinja_primary(mft__jparser *p)
{
    int32_t node, first = 0, last = 0;
    int     op;
    size_t  begin;

    switch (p->token) {
    case MFT__T_NAME:
        op = mft__jinja_is(p, "true") || mft__jinja_is(p, "True") ? 't' : mft__jinja_is(p, "false") || mft__jinja_is(p, "False") ? 'f'
           : mft__jinja_is(p, "none") || mft__jinja_is(p, "None") ? 'n' : 0;
        node = mft__jinja_new(p, op ? MFT__J_CONST : MFT__J_NAME, 0, 0);
        if (mft__jinja_is(p, "add_generation_prompt")) p->t->has_prompt = 1;
        if (!p->status) mft__jinja_node(p, node)->op = (uint8_t)op;
        mft__jinja_scan(p);
        return node;
    case MFT__T_STRING:                                         /* 'a' 'b' is one string */
        node  = mft__jinja_new(p, MFT__J_STRING, 0, 0);
        begin = p->pool_used;
        while (p->token == MFT__T_STRING) { mft__jinja_unescape(p); mft__jinja_scan(p); }
        if (p->status) return 0;
        mft__jinja_node(p, node)->text  = p->t->pool + begin;
        mft__jinja_node(p, node)->bytes = p->pool_used - begin;
        return node;
    case MFT__T_INT:
        return mft__jinja_integer(p);
    case MFT__T_FLOAT:
        node = mft__jinja_new(p, MFT__J_FLOAT, 0, 0);
        if (p->status) return 0;
        if (!mft__jinja_number(p->text, p->bytes, &mft__jinja_node(p, node)->f)) { mft__jinja_syntax(p, MFT_ERR_UNSUPPORTED, "a number of that form is not known"); return 0; }
        mft__jinja_scan(p);
        return node;
    case MFT__T_OP:
        if (mft__jinja_skip_op(p, '(')) {
            node = mft__jinja_tuple(p, 0, 1);
            mft__jinja_expect_op(p, ')');
            return node;
        }
        if (mft__jinja_is_op(p, '[') || mft__jinja_is_op(p, '{')) {
            int is_dict = p->op == '{', closer = is_dict ? '}' : ']';
            node = mft__jinja_new(p, is_dict ? MFT__J_DICT : MFT__J_LIST, 0, 0);
            mft__jinja_scan(p);
            while (!p->status && !mft__jinja_is_op(p, closer)) {
                int32_t item, value;
                if (first) { mft__jinja_expect_op(p, ','); if (mft__jinja_is_op(p, closer)) break; }
                item = mft__jinja_expression(p);
                if (is_dict) {
                    mft__jinja_expect_op(p, ':');
                    value = mft__jinja_expression(p);
                    item  = mft__jinja_new(p, MFT__J_PAIR, item, value);
                }
                mft__jinja_append(p, &first, &last, item);
            }
            mft__jinja_expect_op(p, closer);
            if (p->status) return 0;
            mft__jinja_node(p, node)->a = first;
            return node;
        }
        break;
    default: break;
    }
    mft__jinja_unexpected(p, "an expression");
    return 0;
}

/* What stands in a[..]. */
static int32_t mft__jinja_subscript(mft__jparser *p)
{
    int32_t part[3] = { 0, 0, 0 }, node;
    int     k = 0;
    if (!mft__jinja_is_op(p, ':')) {
        part[0] = mft__jinja_expression(p);
        if (!mft__jinja_is_op(p, ':')) return part[0];
    }
    node = mft__jinja_new(p, MFT__J_SLICE, 0, 0);
    while (k < 2 && mft__jinja_skip_op(p, ':')) {
        k++;
        if (!mft__jinja_is_op(p, ':') && !mft__jinja_is_op(p, ']')) part[k] = mft__jinja_expression(p);
    }
    if (p->status) return 0;
    mft__jinja_node(p, node)->a = part[0]; mft__jinja_node(p, node)->b = part[1]; mft__jinja_node(p, node)->c = part[2];
    return node;
}

static int32_t mft__jinja_postfix(mft__jparser *p, int32_t node)
{
    int32_t child, made;
    for (;;) {
        if (mft__jinja_is_op(p, '.')) {
            mft__jinja_scan(p);
            if (p->token == MFT__T_NAME) {
                node = mft__jinja_new(p, MFT__J_ATTR, node, 0);
                mft__jinja_scan(p);
            } else if (p->token == MFT__T_INT) {
                child = mft__jinja_integer(p);
                node  = mft__jinja_new(p, MFT__J_ITEM, node, child);
            } else { mft__jinja_unexpected(p, "a name"); return 0; }
        } else if (mft__jinja_is_op(p, '[')) {
            made = mft__jinja_new(p, MFT__J_ITEM, node, 0);
            mft__jinja_scan(p);
            child = mft__jinja_subscript(p);
            mft__jinja_expect_op(p, ']');
            if (p->status) return 0;
            mft__jinja_node(p, made)->b = child;
            node = made;
        } else if (mft__jinja_is_op(p, '(')) {
            made  = mft__jinja_new(p, MFT__J_CALL, node, 0);
            child = mft__jinja_arguments(p);
            if (p->status) return 0;
            mft__jinja_node(p, made)->b = child;
            node = made;
        } else return node;
    }
}

/* | filter(..) from the name on */
static int32_t mft__jinja_filter_node(mft__jparser *p, int32_t node)
{
    int32_t made, child = 0;
    if (p->token != MFT__T_NAME) { mft__jinja_unexpected(p, "a filter's name"); return 0; }
    made = mft__jinja_new(p, MFT__J_FILTER, node, 0);
    mft__jinja_scan(p);
    if (mft__jinja_is_op(p, '(')) child = mft__jinja_arguments(p);
    if (p->status) return 0;
    mft__jinja_node(p, made)->b = child;
    return made;
}

static int32_t mft__jinja_test_node(mft__jparser *p, int32_t node)
{
    int     negated = mft__jinja_skip(p, "not");
    int32_t made, child = 0;
    if (p->token != MFT__T_NAME) { mft__jinja_unexpected(p, "a test's name"); return 0; }
    made = mft__jinja_new(p, MFT__J_TEST, node, 0);
    mft__jinja_scan(p);
    if (mft__jinja_is_op(p, '(')) child = mft__jinja_arguments(p);
    else if (p->token == MFT__T_STRING || p->token == MFT__T_INT || p->token == MFT__T_FLOAT || mft__jinja_is_op(p, '[') || mft__jinja_is_op(p, '{')
             || (p->token == MFT__T_NAME && !mft__jinja_is(p, "else") && !mft__jinja_is(p, "or") && !mft__jinja_is(p, "and")
                 && !mft__jinja_is(p, "if") && !mft__jinja_is(p, "is") && !mft__jinja_is(p, "in") && !mft__jinja_is(p, "not"))) {
        child = mft__jinja_primary(p);                          /* x is divisibleby 3 */
        child = mft__jinja_postfix(p, child);
    }
    if (p->status) return 0;
    mft__jinja_node(p, made)->op = (uint8_t)negated;
    mft__jinja_node(p, made)->b  = child;
    return made;
}

static int32_t mft__jinja_unary(mft__jparser *p, int with_filter)
{
    int32_t node;
    if (!mft__jinja_enter(p)) return 0;
    if (mft__jinja_is_op(p, '-') || mft__jinja_is_op(p, '+')) {
        int32_t child;
        node = mft__jinja_new(p, p->op == '-' ? MFT__J_NEG : MFT__J_POS, 0, 0);
        mft__jinja_scan(p);
        child = mft__jinja_unary(p, 0);
        if (!p->status) mft__jinja_node(p, node)->a = child;
    } else node = mft__jinja_primary(p);
    node = mft__jinja_postfix(p, node);
    while (with_filter && !p->status) {
        if (mft__jinja_skip_op(p, '|'))       node = mft__jinja_filter_node(p, node);
        else if (mft__jinja_skip(p, "is"))    node = mft__jinja_test_node(p, node);
        else if (mft__jinja_is_op(p, '('))    node = mft__jinja_postfix(p, node);
        else break;
    }
    p->nest--;
    return node;
}

/* The operator of the current token if it binds at `level`, else 0. Jinja's order, loosest first. */
enum { MFT__J_LEVEL_OR, MFT__J_LEVEL_AND, MFT__J_LEVEL_NOT, MFT__J_LEVEL_COMPARE, MFT__J_LEVEL_SUM, MFT__J_LEVEL_CONCAT,
       MFT__J_LEVEL_PRODUCT, MFT__J_LEVEL_POWER, MFT__J_LEVEL_UNARY };

static int mft__jinja_operator(const mft__jparser *p, int level)
{
    static const char *const ops[] = { "", "", "", "e!<>lg", "+-", "~", "*/D%", "P" };
    if (p->token == MFT__T_OP) return strchr(ops[level], p->op) ? p->op : 0;
    if (level == MFT__J_LEVEL_OR)  return mft__jinja_is(p, "or") ? 'o' : 0;
    if (level == MFT__J_LEVEL_AND) return mft__jinja_is(p, "and") ? 'a' : 0;
    if (level != MFT__J_LEVEL_COMPARE) return 0;
    if (mft__jinja_is(p, "in")) return 'i';
    if (mft__jinja_is(p, "not")) {
        size_t i = p->at;
        while (i < p->n && mft__jinja_is_space((unsigned char)p->s[i])) i++;
        if (mft__jinja_at(p, i, "in") && (i + 2 >= p->n || !mft__jinja_is_word(p->s[i + 2]))) return 'n';
    }
    return 0;
}

static int32_t mft__jinja_binary(mft__jparser *p, int level)
{
    int32_t left, right, first = 0, last = 0, node;
    int     op;
    if (level == MFT__J_LEVEL_UNARY) return mft__jinja_unary(p, 1);
    if (level == MFT__J_LEVEL_NOT) {
        if (!mft__jinja_is(p, "not")) return mft__jinja_binary(p, level + 1);
        if (!mft__jinja_enter(p)) return 0;
        node = mft__jinja_new(p, MFT__J_NOT, 0, 0);
        mft__jinja_scan(p);
        right = mft__jinja_binary(p, level);
        p->nest--;
        if (!p->status) mft__jinja_node(p, node)->a = right;
        return node;
    }
    left = mft__jinja_binary(p, level + 1);
    while (!p->status && (op = mft__jinja_operator(p, level)) != 0) {
        node = mft__jinja_new(p, op == 'o' ? MFT__J_OR : op == 'a' ? MFT__J_AND : level == MFT__J_LEVEL_COMPARE ? MFT__J_OPERAND : MFT__J_BINARY, 0, 0);
        mft__jinja_scan(p);
        if (op == 'n') mft__jinja_scan(p);
        right = mft__jinja_binary(p, level + 1);
        if (p->status) return 0;
        mft__jinja_node(p, node)->op = (uint8_t)op;
        if (level == MFT__J_LEVEL_COMPARE) {                    /* a < b < c is one comparison */
            mft__jinja_node(p, node)->a = right;
            mft__jinja_append(p, &first, &last, node);
        } else {
            mft__jinja_node(p, node)->a = left; mft__jinja_node(p, node)->b = right;
            left = node;
        }
    }
    return first ? mft__jinja_new(p, MFT__J_COMPARE, left, first) : left;
}

static int32_t mft__jinja_expression(mft__jparser *p)
{
    int32_t node, cond, other;
    if (!mft__jinja_enter(p)) return 0;
    node = mft__jinja_binary(p, 0);
    while (!p->status && mft__jinja_skip(p, "if")) {
        cond  = mft__jinja_binary(p, 0);
        other = mft__jinja_skip(p, "else") ? mft__jinja_expression(p) : 0;
        node  = mft__jinja_new(p, MFT__J_COND, node, cond);
        if (!p->status) mft__jinja_node(p, node)->c = other;
    }
    p->nest--;
    return node;
}

/* ---- parser: text and statements ---- */

/* Text in [begin, end) before a tag with `sign`, which may take blanks from its end. */
static int32_t mft__jinja_text(mft__jparser *p, size_t begin, size_t end, char sign, int is_variable)
{
    size_t   k, line = end, at_start = begin == 0 || p->s[begin - 1] == '\n';
    uint32_t c;
    int32_t  node;
    if (sign == '-') {
        while (end > begin) {
            k = mft__jinja_char_before(p->s + begin, end - begin, &c);
            if (!mft__jinja_is_space(c)) break;
            end -= k;
        }
    } else if (sign != '+' && !is_variable) {                   /* lstrip_blocks: the blanks before a tag in its line */
        while (line > begin && p->s[line - 1] != '\n') {
            k = mft__jinja_char_before(p->s + begin, line - begin, &c);
            if (!mft__jinja_is_space(c)) break;
            line -= k;
        }
        if ((line > begin && p->s[line - 1] == '\n') || (line == begin && at_start)) end = line;
    }
    if (end == begin) return 0;
    p->token_line = p->line;
    p->text = p->s + begin; p->bytes = end - begin;
    node = mft__jinja_new(p, MFT__J_TEXT, 0, 0);
    return node;
}

/* Behind {% or its sign: whether `word` and the tag's end follow; then *out is behind that. */
static int mft__jinja_lone_word(const mft__jparser *p, size_t at, const char *word, size_t *out, char *out_sign)
{
    while (at < p->n && mft__jinja_is_space((unsigned char)p->s[at])) at++;
    if (!mft__jinja_at(p, at, word)) return 0;
    at += strlen(word);
    while (at < p->n && mft__jinja_is_space((unsigned char)p->s[at])) at++;
    *out_sign = 0;
    if (at < p->n && (p->s[at] == '-' || p->s[at] == '+')) *out_sign = p->s[at++];
    if (!mft__jinja_at(p, at, "%}")) return 0;
    *out = at + 2;
    return 1;
}

static char mft__jinja_sign(const mft__jparser *p, size_t at)
{
    return at < p->n && (p->s[at] == '-' || p->s[at] == '+') ? p->s[at] : 0;
}

/* {% raw %}, p->at being behind its end. */
static int32_t mft__jinja_raw(mft__jparser *p)
{
    size_t  begin = p->at, k, after = 0;
    char    sign = 0, end_sign = 0;
    int32_t node;
    for (k = begin; k + 1 < p->n; k++) {
        if (!mft__jinja_at(p, k, "{%")) continue;
        sign = mft__jinja_sign(p, k + 2);
        if (mft__jinja_lone_word(p, k + 2 + (sign != 0), "endraw", &after, &end_sign)) break;
    }
    if (!after) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "'endraw' is missing"); return 0; }
    node = mft__jinja_text(p, begin, k, sign, 0);
    mft__jinja_advance(p, after);
    if (end_sign == '-') mft__jinja_skip_space(p);
    else if (!end_sign && mft__jinja_at(p, p->at, "\n")) mft__jinja_advance(p, p->at + 1);
    return node;
}

static int32_t mft__jinja_statement(mft__jparser *p);

/* Whether the current name is one of the words in `until`. */
static int mft__jinja_is_one_of(const mft__jparser *p, const char *until)
{
    while (p->token == MFT__T_NAME && until && *until) {
        size_t n = strcspn(until, " ");
        if (n == p->bytes && !memcmp(until, p->text, n)) return 1;
        until += n + (until[n] == ' ');
    }
    return 0;
}

/* The statements from the current tag's end to one of the tags in `until`, whose name is then the current
 * token; NULL: to the end of the source. */
static int32_t mft__jinja_body(mft__jparser *p, const char *until)
{
    int32_t first = 0, last = 0, node;
    int     begin_line = p->token_line;

    if (until) {
        mft__jinja_skip_op(p, ':');
        if (p->token != MFT__T_END) { mft__jinja_unexpected(p, "the tag's end"); return 0; }
    }
    if (!mft__jinja_enter(p)) return 0;
    while (!p->status) {
        size_t begin = p->at, k = begin, after;
        char   sign, kind, other;
        while (k + 1 < p->n && !(p->s[k] == '{' && (p->s[k + 1] == '{' || p->s[k + 1] == '%' || p->s[k + 1] == '#'))) k++;
        if (k + 1 >= p->n) {                                    /* no tag any more */
            mft__jinja_append(p, &first, &last, mft__jinja_text(p, begin, p->n, '+', 0));
            mft__jinja_advance(p, p->n);
            if (until) {
                p->token_line = begin_line;
                mft__jinja_syntax(p, MFT_ERR_FORMAT, "the tag that begins here is not closed: '%s' is missing", strrchr(until, ' ') ? strrchr(until, ' ') + 1 : until);
            }
            break;
        }
        kind = p->s[k + 1];
        sign = mft__jinja_sign(p, k + 2);
        mft__jinja_append(p, &first, &last, mft__jinja_text(p, begin, k, sign, kind == '{'));
        mft__jinja_advance(p, k + 2 + (sign != 0));
        p->token_line = p->line;
        if (kind == '#') {
            int64_t close = mft__jinja_find(p->s, p->n, p->at, "#}", 2);
            if (close < 0) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "a comment is not closed"); break; }
            other = (size_t)close > p->at ? p->s[close - 1] : 0;
            mft__jinja_advance(p, (size_t)close + 2);
            if (other == '-') mft__jinja_skip_space(p);
            else if (other != '+' && mft__jinja_at(p, p->at, "\n")) mft__jinja_advance(p, p->at + 1);
        } else if (kind == '{') {
            p->in_block = 0;
            mft__jinja_scan(p);
            node = mft__jinja_tuple(p, 0, 0);
            if (!p->status && p->token != MFT__T_END) mft__jinja_unexpected(p, "'}}'");
            mft__jinja_append(p, &first, &last, mft__jinja_new(p, MFT__J_OUTPUT, node, 0));
        } else if (mft__jinja_lone_word(p, p->at, "raw", &after, &other) && other != '+') {
            mft__jinja_advance(p, after);
            if (other == '-') mft__jinja_skip_space(p);
            mft__jinja_append(p, &first, &last, mft__jinja_raw(p));
        } else {
            p->in_block = 1;
            mft__jinja_scan(p);
            if (mft__jinja_is_one_of(p, until)) break;
            mft__jinja_append(p, &first, &last, mft__jinja_statement(p));
            if (!p->status && p->token != MFT__T_END) mft__jinja_unexpected(p, "the tag's end");
        }
    }
    p->nest--;
    return first;
}

/* A body closed by one tag: to the end of that tag's name. */
static int32_t mft__jinja_block(mft__jparser *p, const char *end)
{
    int32_t body = mft__jinja_body(p, end);
    mft__jinja_scan(p);
    return body;
}

/* What may be assigned to: a name, ns.name, or several names. */
static int32_t mft__jinja_target(mft__jparser *p)
{
    int32_t first = 0, last = 0, node;
    int     comma = 0, bracket = mft__jinja_skip_op(p, '(');
    int32_t tuple = mft__jinja_new(p, MFT__J_TUPLE, 0, 0);
    while (!p->status && p->token == MFT__T_NAME && !mft__jinja_is(p, "in")) {
        node = mft__jinja_new(p, MFT__J_NAME, 0, 0);
        mft__jinja_scan(p);
        if (mft__jinja_skip_op(p, '.')) {
            if (p->token != MFT__T_NAME) { mft__jinja_unexpected(p, "a name"); return 0; }
            node = mft__jinja_new(p, MFT__J_ATTR, node, 0);
            mft__jinja_scan(p);
        }
        mft__jinja_append(p, &first, &last, node);
        if (!mft__jinja_skip_op(p, ',')) break;
        comma = 1;
    }
    if (bracket) mft__jinja_expect_op(p, ')');
    if (p->status) return 0;
    if (!first) { mft__jinja_unexpected(p, "a name"); return 0; }
    if (!comma) return first;
    mft__jinja_node(p, tuple)->a = first;
    return tuple;
}

static int32_t mft__jinja_params(mft__jparser *p)
{
    int32_t first = 0, last = 0, node, value;
    mft__jinja_expect_op(p, '(');
    while (!p->status && !mft__jinja_is_op(p, ')')) {
        if (first) { mft__jinja_expect_op(p, ','); if (mft__jinja_is_op(p, ')')) break; }
        if (p->token != MFT__T_NAME) { mft__jinja_unexpected(p, "a parameter's name"); break; }
        node = mft__jinja_new(p, MFT__J_PARAM, 0, 0);
        mft__jinja_scan(p);
        value = mft__jinja_skip_op(p, '=') ? mft__jinja_expression(p) : 0;
        if (!p->status) mft__jinja_node(p, node)->a = value;
        mft__jinja_append(p, &first, &last, node);
    }
    mft__jinja_expect_op(p, ')');
    return first;
}

static int32_t mft__jinja_if(mft__jparser *p, int32_t node)
{
    int32_t first = 0, last = 0, branch, cond, body;
    int     is_else = 0;
    do {
        branch = mft__jinja_new(p, MFT__J_BRANCH, 0, 0);
        mft__jinja_scan(p);
        cond = is_else ? 0 : mft__jinja_tuple(p, 1, 0);
        body = mft__jinja_body(p, is_else ? "endif" : "elif else endif");
        if (p->status) return 0;
        mft__jinja_node(p, branch)->a = cond; mft__jinja_node(p, branch)->b = body;
        mft__jinja_append(p, &first, &last, branch);
        is_else = mft__jinja_is(p, "else");
    } while (!mft__jinja_is(p, "endif"));
    mft__jinja_scan(p);
    mft__jinja_node(p, node)->a = first;
    return node;
}

static int32_t mft__jinja_for(mft__jparser *p, int32_t node)
{
    int32_t target, iterable, cond = 0, body, other = 0;
    mft__jinja_scan(p);
    target = mft__jinja_target(p);
    if (!mft__jinja_skip(p, "in")) { mft__jinja_unexpected(p, "'in'"); return 0; }
    iterable = mft__jinja_tuple(p, 1, 0);
    if (mft__jinja_skip(p, "if")) cond = mft__jinja_expression(p);
    if (mft__jinja_is(p, "recursive")) { mft__jinja_syntax(p, MFT_ERR_UNSUPPORTED, "recursive loops are not known"); return 0; }
    p->loops++;
    body = mft__jinja_body(p, "else endfor");
    p->loops--;
    if (mft__jinja_skip(p, "else")) other = mft__jinja_body(p, "endfor");
    mft__jinja_scan(p);
    if (p->status) return 0;
    mft__jinja_node(p, node)->a = target; mft__jinja_node(p, node)->b = iterable; mft__jinja_node(p, node)->c = cond;
    mft__jinja_node(p, node)->d = body;   mft__jinja_node(p, node)->e = other;
    return node;
}

/* The chain of filters over a block's text. */
static int32_t mft__jinja_captured(mft__jparser *p, int begins)
{
    int32_t node = mft__jinja_new(p, MFT__J_CAPTURED, 0, 0);
    while (!p->status && (begins || mft__jinja_skip_op(p, '|'))) { node = mft__jinja_filter_node(p, node); begins = 0; }
    return node;
}

static int32_t mft__jinja_statement(mft__jparser *p)
{
    int32_t node = mft__jinja_new(p, MFT__J_TEXT, 0, 0), a = 0, b = 0, c = 0, last = 0;
    int     loops = p->loops;
    mft__jkind kind = MFT__J_TEXT;

    if (p->status) return 0;
    if (mft__jinja_is(p, "if") || mft__jinja_is(p, "for")) {
        int is_if = mft__jinja_is(p, "if");
        mft__jinja_node(p, node)->kind = (uint8_t)(is_if ? MFT__J_IF : MFT__J_FOR);
        return is_if ? mft__jinja_if(p, node) : mft__jinja_for(p, node);
    }
    if (mft__jinja_skip(p, "set")) {
        kind = MFT__J_SET;
        a = mft__jinja_target(p);
        if (mft__jinja_skip_op(p, '=')) b = mft__jinja_tuple(p, 0, 0);
        else {
            kind = MFT__J_SET_BLOCK;
            b = mft__jinja_captured(p, 0);
            c = mft__jinja_block(p, "endset");
        }
    } else if (mft__jinja_skip(p, "macro")) {
        kind = MFT__J_MACRO;
        if (p->token != MFT__T_NAME) { mft__jinja_unexpected(p, "a macro's name"); return 0; }
        mft__jinja_node(p, node)->text = p->text; mft__jinja_node(p, node)->bytes = p->bytes;
        mft__jinja_scan(p);
        a = mft__jinja_params(p);
        p->loops = 0;
        c = mft__jinja_block(p, "endmacro");
    } else if (mft__jinja_skip(p, "call")) {
        kind = MFT__J_CALL_BLOCK;
        mft__jinja_node(p, node)->text = "caller"; mft__jinja_node(p, node)->bytes = 6;
        if (mft__jinja_is_op(p, '(')) a = mft__jinja_params(p);
        b = mft__jinja_expression(p);
        if (!p->status && mft__jinja_node(p, b)->kind != MFT__J_CALL) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "'call' needs a call"); return 0; }
        p->loops = 0;
        c = mft__jinja_block(p, "endcall");
    } else if (mft__jinja_skip(p, "filter")) {
        kind = MFT__J_FILTER_BLOCK;
        b = mft__jinja_captured(p, 1);
        c = mft__jinja_block(p, "endfilter");
    } else if (mft__jinja_skip(p, "with")) {
        kind = MFT__J_WITH;
        while (!p->status && p->token == MFT__T_NAME) {
            int32_t set = mft__jinja_new(p, MFT__J_SET, 0, 0), target, value;
            target = mft__jinja_new(p, MFT__J_NAME, 0, 0);
            mft__jinja_scan(p);
            mft__jinja_expect_op(p, '=');
            value = mft__jinja_expression(p);
            if (p->status) return 0;
            mft__jinja_node(p, set)->a = target; mft__jinja_node(p, set)->b = value;
            mft__jinja_append(p, &a, &last, set);
            if (!mft__jinja_skip_op(p, ',')) break;
        }
        c = mft__jinja_block(p, "endwith");
    } else if (mft__jinja_skip(p, "generation")) {
        kind = MFT__J_GENERATION;
        p->t->has_marks = 1;
        p->loops = 0;                                           /* Transformers makes it a function of its own */
        c = mft__jinja_block(p, "endgeneration");
    } else if (mft__jinja_is(p, "break") || mft__jinja_is(p, "continue")) {
        if (!p->loops) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "'%.*s' outside of a loop", MFT__CUT(p->bytes), p->text); return 0; }
        kind = mft__jinja_is(p, "break") ? MFT__J_BREAK : MFT__J_CONTINUE;
        mft__jinja_scan(p);
    } else if (p->token != MFT__T_NAME) { mft__jinja_unexpected(p, "a tag's name"); return 0; }
    else if (p->bytes > 3 && !memcmp(p->text, "end", 3)) { mft__jinja_syntax(p, MFT_ERR_FORMAT, "'%.*s' closes nothing", MFT__CUT(p->bytes), p->text); return 0; }
    else { mft__jinja_syntax(p, MFT_ERR_UNSUPPORTED, "tag '%.*s' is not known", MFT__CUT(p->bytes), p->text); return 0; }

    p->loops = loops;
    if (p->status) return 0;
    mft__jinja_node(p, node)->kind = (uint8_t)kind;
    mft__jinja_node(p, node)->a = a; mft__jinja_node(p, node)->b = b; mft__jinja_node(p, node)->c = c;
    return node;
}

/* ---- values ---- */
typedef enum mft__jtype {
    MFT__V_UNDEFINED, MFT__V_NONE, MFT__V_BOOL, MFT__V_INT, MFT__V_FLOAT, MFT__V_STRING, MFT__V_LIST, MFT__V_DICT,
    MFT__V_NAMESPACE, MFT__V_MACRO, MFT__V_BUILTIN, MFT__V_LOOP
} mft__jtype;

typedef enum mft__jlist_kind { MFT__L_LIST, MFT__L_TUPLE, MFT__L_RANGE, MFT__L_VIEW, MFT__L_GENERATOR } mft__jlist_kind;

typedef struct mft__jvalue {
    mft__jtype  type;
    const char *of;                         /* UNDEFINED: of which type s is no attribute; NULL: a variable */
    union {
        int64_t i;                          /* BOOL, INT                                                 */
        double  f;
        const char             *s;          /* STRING, UNDEFINED (the name): n bytes, borrowed           */
        struct mft__jlist      *list;
        struct mft__jdict      *dict;       /* DICT, NAMESPACE                                           */
        struct mft__jmacro     *macro;
        struct mft__jbound     *bound;      /* BUILTIN                                                   */
        struct mft__jloop      *loop;
    } u;
    size_t      n;
} mft__jvalue;

typedef struct mft__jlist  { mft__jlist_kind kind; mft__jvalue *items; size_t n; } mft__jlist;
typedef struct mft__jpair  { mft__jvalue key, value; } mft__jpair;
typedef struct mft__jdict  { mft__jpair *pairs; size_t n, cap; } mft__jdict;
typedef struct mft__jvar   { struct mft__jvar *next; const char *name; size_t bytes; mft__jvalue value; } mft__jvar;
typedef struct mft__jscope { struct mft__jscope *parent; mft__jvar *vars; } mft__jscope;
typedef struct mft__jmacro { const mft__jnode *node; mft__jscope *scope; } mft__jmacro;
typedef struct mft__jloop  { const mft__jvalue *items; size_t n, index; } mft__jloop;
typedef struct mft__jbound { const struct mft__jbuiltin *fn; mft__jvalue self; } mft__jbound;

/* Arguments of a call: n_positional values, then named ones. */
typedef struct mft__jarg  { const char *name; size_t bytes; mft__jvalue value; } mft__jarg;
typedef struct mft__jargs { mft__jarg *list; size_t n, n_positional; mft__jvalue caller; } mft__jargs;

/* One rendering. */
typedef struct mft__jrun {
    mft_context             *ctx;
    const mft_chat_template *t;
    int64_t     now;
    mft_status  status;                     /* the first failure                                         */
    int         line, depth, captures;
    int         closures;                   /* macros made so far: they keep the scopes around them      */
    mft__jvar  *spare;                      /* variables of ended turns of loops                         */
    int64_t     steps;
    mft__chat_text *out;                    /* its text: what is done so far, above it what is being put together */
    int         marks_lost;                 /* a mark stood where its place in the text is not known     */
    struct mft__jblock *blocks;             /* memory of values                                          */
    size_t      memory;
} mft__jrun;

/* Filters, tests, methods, functions: `spec` names up to four parameters; NULL: the function looks at
 * args itself, a is then NULL. A parameter not given is undefined. */
typedef mft__jvalue (*mft__jfunction)(mft__jrun *r, mft__jvalue self, const mft__jvalue *a, const mft__jargs *args);
typedef struct mft__jbuiltin { const char *name, *spec; mft__jfunction fn; } mft__jbuiltin;

typedef struct mft__jblock { struct mft__jblock *next; size_t bytes, used; } mft__jblock;

static mft__jvalue mft__v_undefined(const char *of, const char *name, size_t bytes)
{
    mft__jvalue v;
    memset(&v, 0, sizeof v);
    v.type = MFT__V_UNDEFINED; v.of = of; v.u.s = name; v.n = bytes;
    return v;
}

static mft__jvalue mft__v_none(void)              { mft__jvalue v = mft__v_undefined(NULL, "", 0); v.type = MFT__V_NONE; return v; }
static mft__jvalue mft__v_int(int64_t i)          { mft__jvalue v = mft__v_none(); v.type = MFT__V_INT; v.u.i = i; return v; }
static mft__jvalue mft__v_bool(int b)             { mft__jvalue v = mft__v_int(b != 0); v.type = MFT__V_BOOL; return v; }
static mft__jvalue mft__v_float(double f)         { mft__jvalue v = mft__v_none(); v.type = MFT__V_FLOAT; v.u.f = f; return v; }
static mft__jvalue mft__v_text(const char *s, size_t n)
{
    mft__jvalue v = mft__v_none();
    v.type = MFT__V_STRING; v.u.s = s; v.n = n;
    return v;
}

static mft__jvalue mft__jinja_fail(mft__jrun *r, mft_status status, const char *format, ...) MFT__PRINTF(3, 4);
static mft__jvalue mft__jinja_fail(mft__jrun *r, mft_status status, const char *format, ...)
{
    char    text[640];
    va_list args;
    if (!r->status) {
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        r->status = mft__fail(r->ctx, status, "chat template, line %d: %s", r->line, text);
    }
    return mft__v_undefined(NULL, "", 0);
}

/* What everything costs; 0 when the rendering has failed or goes on for too long. */
static int mft__jinja_spend(mft__jrun *r, size_t steps)
{
    if (r->status) return 0;
    r->steps += steps < (size_t)MFT__JINJA_MAX_STEPS ? (int64_t)steps : (int64_t)MFT__JINJA_MAX_STEPS;
    if (r->steps > MFT__JINJA_MAX_STEPS)
        mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "the template has not ended after %d steps", MFT__JINJA_MAX_STEPS);
    return !r->status;
}

static int mft__jinja_deeper(mft__jrun *r)
{
    if (r->depth >= MFT__JINJA_MAX_DEPTH)
        mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "calls, expressions or values nest deeper than %d", MFT__JINJA_MAX_DEPTH);
    if (r->status) return 0;
    r->depth++;
    return 1;
}

/* Memory until the rendering ends. NULL with the failure kept. */
static void *mft__jinja_alloc(mft__jrun *r, size_t bytes)
{
    mft__jblock *b = r->blocks;
    size_t       head = (sizeof *b + 15) & ~(size_t)15, size;
    void        *p;
    if (r->status) return NULL;
    if (bytes > MFT__JINJA_MAX_MEMORY) bytes = MFT__JINJA_MAX_MEMORY + 1;
    bytes = (bytes + 15) & ~(size_t)15;
    if (!b || b->bytes - b->used < bytes) {
        size = b ? b->bytes * 2 : 4096;
        if (size > ((size_t)1 << 20)) size = (size_t)1 << 20;
        if (size < bytes + head) size = bytes + head;
        if (size > MFT__JINJA_MAX_MEMORY - r->memory) {
            mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "the template needs more than %d MB", MFT__JINJA_MAX_MEMORY >> 20);
            return NULL;
        }
        b = (mft__jblock *)mft__alloc(r->ctx, size);
        if (!b) { r->status = MFT_ERR_OUT_OF_MEMORY; return NULL; }
        b->next = r->blocks; b->bytes = size; b->used = head;
        r->blocks = b;
        r->memory += size;
    }
    p = (char *)b + b->used;
    b->used += bytes;
    return p;
}

/* n values, all None until filled; the list says 0 until then when there is no memory. */
static mft__jvalue mft__v_list(mft__jrun *r, mft__jlist_kind kind, size_t n)
{
    mft__jlist  *list = (mft__jlist *)mft__jinja_alloc(r, sizeof *list);
    mft__jvalue *items, v = mft__v_none();
    size_t       bytes = 0, i;
    if (!list || !mft__jinja_spend(r, n)) return mft__v_undefined(NULL, "", 0);
    if (!mft__mul_size(n, sizeof *items, &bytes)) bytes = (size_t)-1 / 2;
    items = (mft__jvalue *)mft__jinja_alloc(r, bytes);
    if (!items) return mft__v_undefined(NULL, "", 0);
    for (i = 0; i < n; i++) items[i] = v;
    list->kind = kind; list->items = items; list->n = n;
    v.type = MFT__V_LIST; v.u.list = list;
    return v;
}

static mft__jvalue mft__v_pair(mft__jrun *r, mft__jvalue a, mft__jvalue b)
{
    mft__jvalue v = mft__v_list(r, MFT__L_TUPLE, 2);
    if (v.type == MFT__V_LIST) { v.u.list->items[0] = a; v.u.list->items[1] = b; }
    return v;
}

static mft__jvalue mft__v_dict(mft__jrun *r, mft__jtype type)
{
    mft__jdict *d = (mft__jdict *)mft__jinja_alloc(r, sizeof *d);
    mft__jvalue v = mft__v_undefined(NULL, "", 0);
    if (!d) return v;
    memset(d, 0, sizeof *d);
    v.type = type; v.u.dict = d;
    return v;
}

static int mft__jinja_equal(mft__jrun *r, mft__jvalue a, mft__jvalue b);

/* The value under a key; NULL if there is none. */
static mft__jvalue *mft__jinja_lookup(mft__jrun *r, mft__jdict *d, mft__jvalue key)
{
    size_t i;
    if (!mft__jinja_spend(r, d->n)) return NULL;
    for (i = 0; i < d->n; i++) {
        if (d->pairs[i].key.type == MFT__V_STRING && key.type == MFT__V_STRING
            ? d->pairs[i].key.n == key.n && !memcmp(d->pairs[i].key.u.s, key.u.s, key.n)
            : mft__jinja_equal(r, d->pairs[i].key, key)) return &d->pairs[i].value;
    }
    return NULL;
}

static void mft__jinja_append_pair(mft__jrun *r, mft__jdict *d, mft__jvalue key, mft__jvalue value)
{
    if (d->n == d->cap) {
        size_t      cap = d->cap ? d->cap * 2 : 4;
        mft__jpair *p = (mft__jpair *)mft__jinja_alloc(r, cap * sizeof *p);
        if (!p) return;
        if (d->n) memcpy(p, d->pairs, d->n * sizeof *p);
        d->pairs = p; d->cap = cap;
    }
    d->pairs[d->n].key = key; d->pairs[d->n].value = value;
    d->n++;
}

static void mft__jinja_put_pair(mft__jrun *r, mft__jdict *d, mft__jvalue key, mft__jvalue value)
{
    mft__jvalue *old;
    if (key.type == MFT__V_DICT || (key.type == MFT__V_LIST && key.u.list->kind != MFT__L_TUPLE)) {
        mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s cannot be a key", key.type == MFT__V_DICT ? "dict" : "list");
        return;
    }
    old = mft__jinja_lookup(r, d, key);
    if (old) *old = value;
    else mft__jinja_append_pair(r, d, key, value);
}

static void mft__jinja_put_named(mft__jrun *r, mft__jdict *d, const char *name, mft__jvalue value)
{
    mft__jinja_put_pair(r, d, mft__v_text(name, strlen(name)), value);
}

static const char *mft__jinja_type_name(mft__jvalue v)
{
    static const char *const lists[] = { "list", "tuple", "range", "dict view", "generator" };
    switch (v.type) {
    case MFT__V_UNDEFINED: return "Undefined";
    case MFT__V_NONE:      return "None";
    case MFT__V_BOOL:      return "bool";
    case MFT__V_INT:       return "int";
    case MFT__V_FLOAT:     return "float";
    case MFT__V_STRING:    return "str";
    case MFT__V_LIST:      return lists[v.u.list->kind];
    case MFT__V_DICT:      return "dict";
    case MFT__V_NAMESPACE: return "namespace";
    case MFT__V_MACRO:     return "macro";
    case MFT__V_BUILTIN:   return "function";
    case MFT__V_LOOP:      return "loop";
    }
    return "";
}

/* Uses an undefined value where Jinja does not allow that. */
static mft__jvalue mft__jinja_undefined(mft__jrun *r, mft__jvalue v)
{
    if (!v.of)          return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "'%.*s' is undefined", MFT__CUT(v.n), v.u.s);
    if (v.of[0] == '!') return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "'%.*s' of a %s would change it, which templates may not", MFT__CUT(v.n), v.u.s, v.of + 1);
    return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "'%s' has no attribute or element '%.*s'", v.of, MFT__CUT(v.n), v.u.s);
}

static int mft__jinja_truth(mft__jvalue v)
{
    switch (v.type) {
    case MFT__V_UNDEFINED: case MFT__V_NONE: return 0;
    case MFT__V_BOOL: case MFT__V_INT:       return v.u.i != 0;
    case MFT__V_FLOAT:                       return v.u.f != 0;
    case MFT__V_STRING:                      return v.n != 0;
    case MFT__V_LIST:                        return v.u.list->n != 0 || v.u.list->kind == MFT__L_GENERATOR;
    case MFT__V_DICT:                        return v.u.dict->n != 0;
    default:                                 return 1;
    }
}

static int mft__jinja_is_integer(mft__jvalue v) { return v.type == MFT__V_INT || v.type == MFT__V_BOOL; }
static int mft__jinja_is_number (mft__jvalue v) { return mft__jinja_is_integer(v) || v.type == MFT__V_FLOAT; }
static double mft__jinja_double (mft__jvalue v) { return v.type == MFT__V_FLOAT ? v.u.f : (double)v.u.i; }

static int mft__jinja_equal(mft__jrun *r, mft__jvalue a, mft__jvalue b)
{
    size_t i;
    int    same = 0;
    if (!mft__jinja_spend(r, 1 + a.n / 16)) return 0;
    if (mft__jinja_is_integer(a) && mft__jinja_is_integer(b)) return a.u.i == b.u.i;
    if (mft__jinja_is_number(a) && mft__jinja_is_number(b)) return mft__jinja_double(a) == mft__jinja_double(b);
    if (a.type != b.type) return 0;
    switch (a.type) {
    case MFT__V_UNDEFINED: case MFT__V_NONE: return 1;
    case MFT__V_STRING: return a.n == b.n && !memcmp(a.u.s, b.u.s, a.n);
    case MFT__V_LIST:
        if (a.u.list == b.u.list) return 1;
        if (a.u.list->kind != b.u.list->kind || a.u.list->kind > MFT__L_RANGE || a.u.list->n != b.u.list->n || !mft__jinja_deeper(r)) return 0;
        for (i = 0, same = 1; same && i < a.u.list->n; i++) same = mft__jinja_equal(r, a.u.list->items[i], b.u.list->items[i]);
        r->depth--;
        return same;
    case MFT__V_DICT:
        if (a.u.dict == b.u.dict) return 1;
        if (a.u.dict->n != b.u.dict->n || !mft__jinja_deeper(r)) return 0;
        for (i = 0, same = 1; same && i < a.u.dict->n; i++) {
            mft__jvalue *other = mft__jinja_lookup(r, b.u.dict, a.u.dict->pairs[i].key);
            same = other && mft__jinja_equal(r, a.u.dict->pairs[i].value, *other);
        }
        r->depth--;
        return same;
    case MFT__V_NAMESPACE: return a.u.dict == b.u.dict;
    case MFT__V_MACRO:     return a.u.macro == b.u.macro;
    case MFT__V_BUILTIN:   return a.u.bound == b.u.bound;
    case MFT__V_LOOP:      return a.u.loop == b.u.loop;
    default: return 0;
    }
}

/* a < b; what has no order is a failure. */
static int mft__jinja_less(mft__jrun *r, mft__jvalue a, mft__jvalue b)
{
    size_t i, n;
    int    c, less;
    if (!mft__jinja_spend(r, 1 + a.n / 16)) return 0;
    if (mft__jinja_is_integer(a) && mft__jinja_is_integer(b)) return a.u.i < b.u.i;
    if (mft__jinja_is_number(a) && mft__jinja_is_number(b)) return mft__jinja_double(a) < mft__jinja_double(b);
    if (a.type == MFT__V_STRING && b.type == MFT__V_STRING) {   /* UTF-8 sorts as its characters do */
        n = a.n < b.n ? a.n : b.n;
        c = memcmp(a.u.s, b.u.s, n);
        return c < 0 || (c == 0 && a.n < b.n);
    }
    if (a.type == MFT__V_LIST && b.type == MFT__V_LIST && a.u.list->kind == b.u.list->kind && a.u.list->kind <= MFT__L_TUPLE) {
        if (!mft__jinja_deeper(r)) return 0;
        n = a.u.list->n < b.u.list->n ? a.u.list->n : b.u.list->n;
        for (i = 0; i < n && mft__jinja_equal(r, a.u.list->items[i], b.u.list->items[i]); ) i++;
        less = i == n ? a.u.list->n < b.u.list->n : mft__jinja_less(r, a.u.list->items[i], b.u.list->items[i]);
        r->depth--;
        return less;
    }
    if (a.type == MFT__V_UNDEFINED || b.type == MFT__V_UNDEFINED) mft__jinja_undefined(r, a.type == MFT__V_UNDEFINED ? a : b);
    else mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s and a %s have no order", mft__jinja_type_name(a), mft__jinja_type_name(b));
    return 0;
}

/* ---- text: what is put together stands above what is done ---- */
static void mft__jinja_put(mft__jrun *r, const char *s, size_t n)
{
    mft__chat_text *out = r->out;
    void           *p = out->text;
    if (!mft__jinja_spend(r, 1 + n / 16)) return;
    if (n > MFT__JINJA_MAX_OUTPUT - out->bytes) {
        mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "the text grows longer than %d MB", MFT__JINJA_MAX_OUTPUT >> 20);
        return;
    }
    if (!mft__grow(r->ctx, &p, &out->text_cap, out->bytes + n + 1, 1)) { r->status = MFT_ERR_OUT_OF_MEMORY; return; }
    out->text = (char *)p;
    if (n) memcpy(out->text + out->bytes, s, n);
    out->bytes += n;
}

static void mft__jinja_puts(mft__jrun *r, const char *s) { mft__jinja_put(r, s, strlen(s)); }

static void mft__jinja_put_char(mft__jrun *r, uint32_t c)
{
    char s[4];
    mft__jinja_put(r, s, (size_t)mft__utf8_encode(c, s));
}

static size_t mft__jinja_open(mft__jrun *r) { return r->out->bytes; }

/* What was put since `mark`, as a value. */
static mft__jvalue mft__jinja_close(mft__jrun *r, size_t mark)
{
    size_t n = r->out->bytes - mark;
    char  *s = (char *)mft__jinja_alloc(r, n);
    if (s && n) memcpy(s, r->out->text + mark, n);
    r->out->bytes = mark;
    return s ? mft__v_text(s, n) : mft__v_undefined(NULL, "", 0);
}

/* As Python writes a float: the fewest digits that give it back, 1e16 and more with an exponent. */
static void mft__jinja_put_float(mft__jrun *r, double x, const char *nan_name, const char *inf_name)
{
    char text[40], digits[20];
    int  n, precision = 0, exponent, k;
    if (x != x) { mft__jinja_puts(r, nan_name); return; }
    if (x - x != 0) { if (x < 0) mft__jinja_puts(r, "-"); mft__jinja_puts(r, inf_name); return; }
    do snprintf(text, sizeof text, "%.*e", precision, x); while (strtod(text, NULL) != x && ++precision < 17);
    for (n = k = 0; text[k] && text[k] != 'e'; k++) if (text[k] >= '0' && text[k] <= '9' && n < 18) digits[n++] = text[k];
    exponent = atoi(strchr(text, 'e') + 1);
    if (text[0] == '-') mft__jinja_puts(r, "-");
    if (exponent < -4 || exponent >= 16) {
        mft__jinja_put(r, digits, 1);
        if (n > 1) { mft__jinja_puts(r, "."); mft__jinja_put(r, digits + 1, (size_t)n - 1); }
        snprintf(text, sizeof text, "e%c%02d", exponent < 0 ? '-' : '+', exponent < 0 ? -exponent : exponent);
        mft__jinja_puts(r, text);
        return;
    }
    for (k = exponent < 0 ? exponent : 0; k < n || k <= exponent + 1; k++) {
        if (k == exponent + 1) mft__jinja_puts(r, ".");
        mft__jinja_put(r, k >= 0 && k < n ? digits + k : "0", 1);
    }
}

/* A string as Python's repr shows it. */
static void mft__jinja_put_quoted(mft__jrun *r, mft__jvalue v)
{
    const char *s = v.u.s, *end = s + v.n;
    char        quote = v.n && memchr(s, '\'', v.n) && !memchr(s, '"', v.n) ? '"' : '\'', text[16];
    uint32_t    c;
    mft__jinja_put(r, &quote, 1);
    while (s < end && !r->status) {
        size_t k = mft__jinja_char(s, (size_t)(end - s), &c);
        if (c == '\n')      mft__jinja_puts(r, "\\n");
        else if (c == '\r') mft__jinja_puts(r, "\\r");
        else if (c == '\t') mft__jinja_puts(r, "\\t");
        else if (c == '\\' || c == (unsigned char)quote) { text[0] = '\\'; text[1] = (char)c; mft__jinja_put(r, text, 2); }
        else if (c < 0x20 || (c >= 0x7f && c < 0xa1) || c == 0xad) { snprintf(text, sizeof text, "\\x%02x", (unsigned)c); mft__jinja_puts(r, text); }
        else if ((mft__jinja_is_space(c) && c != ' ') || (c >= 0x200b && c <= 0x200f) || (c >= 0x202a && c <= 0x202e) || (c >= 0x2060 && c <= 0x206f)
                 || (c >= 0xe000 && c <= 0xf8ff) || c == 0xfeff) { snprintf(text, sizeof text, "\\u%04x", (unsigned)c); mft__jinja_puts(r, text); }
        else mft__jinja_put(r, s, k);
        s += k;
    }
    mft__jinja_put(r, &quote, 1);
}

/* str(v), or repr(v) when `quoted`. */
static void mft__jinja_put_value(mft__jrun *r, mft__jvalue v, int quoted)
{
    char   text[48];
    size_t i;
    switch (v.type) {
    case MFT__V_UNDEFINED: if (quoted) mft__jinja_puts(r, "Undefined"); return;
    case MFT__V_NONE:      mft__jinja_puts(r, "None"); return;
    case MFT__V_BOOL:      mft__jinja_puts(r, v.u.i ? "True" : "False"); return;
    case MFT__V_INT:       snprintf(text, sizeof text, "%lld", (long long)v.u.i); mft__jinja_puts(r, text); return;
    case MFT__V_FLOAT:     mft__jinja_put_float(r, v.u.f, "nan", "inf"); return;
    case MFT__V_STRING:    if (quoted) mft__jinja_put_quoted(r, v); else mft__jinja_put(r, v.u.s, v.n); return;
    case MFT__V_LIST: {
        int tuple = v.u.list->kind == MFT__L_TUPLE;
        if (v.u.list->kind > MFT__L_TUPLE) { mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s has no text; '|list' makes a list of it", mft__jinja_type_name(v)); return; }
        if (!mft__jinja_deeper(r)) return;
        mft__jinja_puts(r, tuple ? "(" : "[");
        for (i = 0; i < v.u.list->n && !r->status; i++) {
            if (i) mft__jinja_puts(r, ", ");
            mft__jinja_put_value(r, v.u.list->items[i], 1);
        }
        mft__jinja_puts(r, tuple ? i == 1 ? ",)" : ")" : "]");
        r->depth--;
        return;
    }
    case MFT__V_DICT:
        if (!mft__jinja_deeper(r)) return;
        mft__jinja_puts(r, "{");
        for (i = 0; i < v.u.dict->n && !r->status; i++) {
            if (i) mft__jinja_puts(r, ", ");
            mft__jinja_put_value(r, v.u.dict->pairs[i].key, 1);
            mft__jinja_puts(r, ": ");
            mft__jinja_put_value(r, v.u.dict->pairs[i].value, 1);
        }
        mft__jinja_puts(r, "}");
        r->depth--;
        return;
    default: mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s has no text", mft__jinja_type_name(v)); return;
    }
}

/* str(v) as a value; a string is itself. */
static mft__jvalue mft__jinja_str(mft__jrun *r, mft__jvalue v)
{
    size_t mark = mft__jinja_open(r);
    if (v.type == MFT__V_STRING) return v;
    mft__jinja_put_value(r, v, 0);
    return mft__jinja_close(r, mark);
}

/* json.dumps */
typedef struct mft__jdump { mft__jvalue indent, between, after_key; int ascii, sorted, level; } mft__jdump;

static void mft__jinja_dump_string(mft__jrun *r, mft__jvalue v, int ascii)
{
    static const char letter[] = "btn.fr";                      /* of 8 to 13; 11 has none */
    const char *s = v.u.s, *end = s + v.n;
    char        text[16];
    uint32_t    c;
    mft__jinja_puts(r, "\"");
    while (s < end && !r->status) {
        size_t k = mft__jinja_char(s, (size_t)(end - s), &c);
        if (c == '"' || c == '\\')             { text[0] = '\\'; text[1] = (char)c; mft__jinja_put(r, text, 2); }
        else if (c >= 8 && c <= 13 && c != 11) { text[0] = '\\'; text[1] = letter[c - 8]; mft__jinja_put(r, text, 2); }
        else if (c < 0x20 || (ascii && c >= 0x7f && c < 0x10000)) { snprintf(text, sizeof text, "\\u%04x", (unsigned)c & 0xffffu); mft__jinja_puts(r, text); }
        else if (ascii && c >= 0x10000) {
            snprintf(text, sizeof text, "\\u%04x\\u%04x", (unsigned)(0xd800 + ((c - 0x10000) >> 10)) & 0xffffu, (unsigned)(0xdc00 + (c & 0x3ff)) & 0xffffu);
            mft__jinja_puts(r, text);
        } else mft__jinja_put(r, s, k);
        s += k;
    }
    mft__jinja_puts(r, "\"");
}

static void mft__jinja_dump_line(mft__jrun *r, const mft__jdump *d)
{
    int i;
    if (d->indent.type != MFT__V_STRING) return;
    mft__jinja_puts(r, "\n");
    for (i = 0; i < d->level && !r->status; i++) mft__jinja_put(r, d->indent.u.s, d->indent.n);
}

static mft__jvalue mft__jinja_sorted(mft__jrun *r, mft__jvalue list, int fold, int reverse, mft__jvalue path);
static mft__jvalue mft__jinja_keys(mft__jrun *r, const mft__jdict *d, int what);

static void mft__jinja_dump(mft__jrun *r, mft__jvalue v, mft__jdump *d)
{
    mft__jvalue keys = mft__v_none(), value;
    size_t      i, n;
    int         is_dict = v.type == MFT__V_DICT;
    switch (v.type) {
    case MFT__V_NONE:   mft__jinja_puts(r, "null"); return;
    case MFT__V_BOOL:   mft__jinja_puts(r, v.u.i ? "true" : "false"); return;
    case MFT__V_FLOAT:  mft__jinja_put_float(r, v.u.f, "NaN", "Infinity"); return;
    case MFT__V_INT:    mft__jinja_put_value(r, v, 0); return;
    case MFT__V_STRING: mft__jinja_dump_string(r, v, d->ascii); return;
    default:
        if (is_dict || (v.type == MFT__V_LIST && v.u.list->kind <= MFT__L_TUPLE)) break;
        mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "tojson: a %s is not JSON", mft__jinja_type_name(v));
        return;
    }
    if (!mft__jinja_deeper(r)) return;
    if (is_dict) { keys = mft__jinja_keys(r, v.u.dict, 0); if (d->sorted) keys = mft__jinja_sorted(r, keys, 0, 0, mft__v_none()); }
    n = is_dict ? v.u.dict->n : v.u.list->n;
    mft__jinja_puts(r, is_dict ? "{" : "[");
    d->level++;
    for (i = 0; i < n && !r->status; i++) {
        if (i) mft__jinja_put(r, d->between.u.s, d->between.n);
        mft__jinja_dump_line(r, d);
        if (is_dict) {
            mft__jvalue key = keys.u.list->items[i];
            if (key.type == MFT__V_STRING) mft__jinja_dump_string(r, key, d->ascii);
            else if (key.type == MFT__V_LIST) mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "tojson: a tuple cannot be a key");
            else { mft__jinja_puts(r, "\""); mft__jinja_dump(r, key, d); mft__jinja_puts(r, "\""); }
            mft__jinja_put(r, d->after_key.u.s, d->after_key.n);
            value = d->sorted ? *mft__jinja_lookup(r, v.u.dict, key) : v.u.dict->pairs[i].value;
        } else value = v.u.list->items[i];
        mft__jinja_dump(r, value, d);
    }
    d->level--;
    if (n) mft__jinja_dump_line(r, d);
    mft__jinja_puts(r, is_dict ? "}" : "]");
    r->depth--;
}

/* ---- reaching into values ---- */

/* keys (0), values (1) or items (2) of a dict */
static mft__jvalue mft__jinja_keys(mft__jrun *r, const mft__jdict *d, int what)
{
    mft__jvalue v = mft__v_list(r, MFT__L_VIEW, d->n);
    size_t      i;
    for (i = 0; i < d->n && !r->status; i++)
        v.u.list->items[i] = what == 0 ? d->pairs[i].key : what == 1 ? d->pairs[i].value : mft__v_pair(r, d->pairs[i].key, d->pairs[i].value);
    return v;
}

static size_t mft__jinja_count_chars(mft__jrun *r, mft__jvalue s)
{
    size_t   i = 0, n = 0;
    uint32_t c;
    mft__jinja_spend(r, s.n / 16);
    for (; i < s.n; n++) i += mft__jinja_char(s.u.s + i, s.n - i, &c);
    return n;
}

/* len(v), -1 when it has none */
static int64_t mft__jinja_length(mft__jrun *r, mft__jvalue v)
{
    switch (v.type) {
    case MFT__V_UNDEFINED: return 0;
    case MFT__V_STRING:    return (int64_t)mft__jinja_count_chars(r, v);
    case MFT__V_LIST:      return v.u.list->kind == MFT__L_GENERATOR ? -1 : (int64_t)v.u.list->n;
    case MFT__V_DICT:      return (int64_t)v.u.dict->n;
    case MFT__V_LOOP:      return (int64_t)v.u.loop->n;
    default:               return -1;
    }
}

/* What a loop over v goes through, as a list; a generator is empty afterwards. Always a list, empty on failure. */
static const mft__jlist *mft__jinja_iterate(mft__jrun *r, mft__jvalue v)
{
    static const mft__jlist nothing = { MFT__L_LIST, NULL, 0 };
    mft__jvalue list;
    size_t      i, k;
    uint32_t    c;
    if (v.type == MFT__V_LIST && v.u.list->kind != MFT__L_GENERATOR) return v.u.list;
    if (v.type == MFT__V_DICT) list = mft__jinja_keys(r, v.u.dict, 0);
    else if (v.type == MFT__V_STRING) {
        list = mft__v_list(r, MFT__L_LIST, mft__jinja_count_chars(r, v));
        for (i = k = 0; i < v.n && !r->status; k++) {
            size_t n = mft__jinja_char(v.u.s + i, v.n - i, &c);
            list.u.list->items[k] = mft__v_text(v.u.s + i, n);
            i += n;
        }
    } else {
        list = mft__v_list(r, MFT__L_LIST, 0);
        if (v.type == MFT__V_LIST && !r->status) { mft__jlist swap = *v.u.list; swap.kind = MFT__L_LIST; v.u.list->n = 0; *list.u.list = swap; }
        else if (v.type != MFT__V_UNDEFINED) mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s cannot be gone through", mft__jinja_type_name(v));
    }
    return r->status ? &nothing : list.u.list;
}

static mft__jvalue mft__jinja_method(mft__jrun *r, mft__jvalue self, const char *name, size_t bytes);

static mft__jvalue mft__jinja_loop_field(const mft__jloop *l, mft__jvalue self, const char *name, size_t bytes)
{
    int64_t i = (int64_t)l->index, n = (int64_t)l->n;
    if (mft__jinja_same(name, bytes, "index"))     return mft__v_int(i + 1);
    if (mft__jinja_same(name, bytes, "index0"))    return mft__v_int(i);
    if (mft__jinja_same(name, bytes, "revindex"))  return mft__v_int(n - i);
    if (mft__jinja_same(name, bytes, "revindex0")) return mft__v_int(n - i - 1);
    if (mft__jinja_same(name, bytes, "first"))     return mft__v_bool(i == 0);
    if (mft__jinja_same(name, bytes, "last"))      return mft__v_bool(i == n - 1);
    if (mft__jinja_same(name, bytes, "length"))    return mft__v_int(n);
    if (mft__jinja_same(name, bytes, "depth"))     return mft__v_int(1);     /* that of recursive loops */
    if (mft__jinja_same(name, bytes, "depth0"))    return mft__v_int(0);
    if (mft__jinja_same(name, bytes, "previtem") && i > 0)     return l->items[i - 1];
    if (mft__jinja_same(name, bytes, "nextitem") && i + 1 < n) return l->items[i + 1];
    return mft__v_undefined(mft__jinja_type_name(self), name, bytes);
}

/* v.name: Python's attributes first, then the dict's keys */
static mft__jvalue mft__jinja_attribute(mft__jrun *r, mft__jvalue v, const char *name, size_t bytes)
{
    mft__jvalue found, *value = NULL;
    if (v.type == MFT__V_UNDEFINED) return mft__jinja_undefined(r, v);
    found = mft__jinja_method(r, v, name, bytes);
    if (found.type != MFT__V_UNDEFINED || found.of != NULL) return found;
    if (v.type == MFT__V_LOOP) return mft__jinja_loop_field(v.u.loop, v, name, bytes);
    if (v.type == MFT__V_DICT || v.type == MFT__V_NAMESPACE) value = mft__jinja_lookup(r, v.u.dict, mft__v_text(name, bytes));
    return value ? *value : mft__v_undefined(mft__jinja_type_name(v), name, bytes);
}

/* The bytes of character number `index` of s and of those behind it. */
static size_t mft__jinja_char_at(mft__jrun *r, mft__jvalue s, int64_t index, size_t *out_bytes)
{
    size_t   i = 0;
    uint32_t c;
    mft__jinja_spend(r, (size_t)index / 16);
    for (; i < s.n && index > 0; index--) i += mft__jinja_char(s.u.s + i, s.n - i, &c);
    *out_bytes = i < s.n ? mft__jinja_char(s.u.s + i, s.n - i, &c) : 0;
    return i;
}

/* v[key] */
static mft__jvalue mft__jinja_item(mft__jrun *r, mft__jvalue v, mft__jvalue key)
{
    mft__jvalue *value = NULL;
    int64_t      i, n;
    size_t       at, bytes;
    if (v.type == MFT__V_UNDEFINED) return mft__jinja_undefined(r, v);
    if (v.type == MFT__V_DICT) {
        value = mft__jinja_lookup(r, v.u.dict, key);
        if (value) return *value;
    }
    if (mft__jinja_is_integer(key) && (v.type == MFT__V_STRING || (v.type == MFT__V_LIST && v.u.list->kind <= MFT__L_RANGE))) {
        n = mft__jinja_length(r, v);
        i = key.u.i < 0 ? key.u.i + n : key.u.i;
        if (i >= 0 && i < n) {
            if (v.type == MFT__V_LIST) return v.u.list->items[i];
            at = mft__jinja_char_at(r, v, i, &bytes);
            return mft__v_text(v.u.s + at, bytes);
        }
    }
    if (key.type == MFT__V_STRING && v.type != MFT__V_DICT) return mft__jinja_attribute(r, v, key.u.s, key.n);
    if (key.type == MFT__V_STRING) {
        mft__jvalue method = mft__jinja_method(r, v, key.u.s, key.n);
        return method.type != MFT__V_UNDEFINED || method.of ? method : mft__v_undefined("dict", key.u.s, key.n);
    }
    key = mft__jinja_is_number(key) ? mft__jinja_str(r, key) : mft__v_text("?", 1);
    return mft__v_undefined(mft__jinja_type_name(v), key.u.s, key.n);
}

/* v[begin:end:step]; parts left out are None */
static mft__jvalue mft__jinja_slice(mft__jrun *r, mft__jvalue v, mft__jvalue begin, mft__jvalue end, mft__jvalue step)
{
    mft__jvalue out, part[3];
    int64_t     n, by, from, to, count, k;
    int         i;
    if (v.type == MFT__V_UNDEFINED) return mft__jinja_undefined(r, v);
    if (v.type != MFT__V_STRING && !(v.type == MFT__V_LIST && v.u.list->kind <= MFT__L_RANGE)) return mft__v_undefined(mft__jinja_type_name(v), "slice", 5);
    part[0] = begin; part[1] = end; part[2] = step;
    for (i = 0; i < 3; i++) if (!mft__jinja_is_integer(part[i]) && part[i].type != MFT__V_NONE) {
        if (part[i].type == MFT__V_UNDEFINED) return mft__jinja_undefined(r, part[i]);
        return mft__v_undefined(mft__jinja_type_name(v), "slice", 5);       /* as Jinja: a TypeError is undefined */
    }
    by = step.type == MFT__V_NONE ? 1 : step.u.i;
    if (by == 0) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "the step of a slice is zero");
    n = mft__jinja_length(r, v);
    if (by < -n - 1) by = -n - 1;                               /* no other result, and no overflow */
    if (by > n + 1) by = n + 1;
    from = begin.type == MFT__V_NONE ? (by > 0 ? 0 : n - 1) : begin.u.i < 0 ? begin.u.i + n : begin.u.i;
    to   = end.type   == MFT__V_NONE ? (by > 0 ? n : -1)    : end.u.i   < 0 ? end.u.i   + n : end.u.i;
    if (from < 0) from = by > 0 ? 0 : -1;
    if (from > n) from = n;
    if (by < 0 && from > n - 1) from = n - 1;
    if (to < 0) to = by > 0 ? 0 : -1;
    if (to > n) to = n;
    count = by > 0 ? (to > from ? (to - from - 1) / by + 1 : 0) : (from > to ? (from - to - 1) / -by + 1 : 0);
    if (v.type == MFT__V_STRING) {
        size_t mark, a, b, bytes;
        if (by == 1) {
            if (!count) return mft__v_text("", 0);
            a = mft__jinja_char_at(r, v, from, &bytes);
            b = mft__jinja_char_at(r, v, from + count, &bytes);
            return mft__v_text(v.u.s + a, b - a);
        } else {
            const mft__jlist *chars = mft__jinja_iterate(r, v);
            mark = mft__jinja_open(r);
            for (k = 0; k < count && !r->status; k++) mft__jinja_put(r, chars->items[from + k * by].u.s, chars->items[from + k * by].n);
            return mft__jinja_close(r, mark);
        }
    }
    out = mft__v_list(r, v.u.list->kind, (size_t)count);
    for (k = 0; k < count && !r->status; k++) out.u.list->items[k] = v.u.list->items[from + k * by];
    return out;
}

static int mft__jinja_contains(mft__jrun *r, mft__jvalue in, mft__jvalue what)
{
    const mft__jlist *list;
    size_t            i;
    if (in.type == MFT__V_STRING) {
        if (what.type != MFT__V_STRING) { mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "'in' a string needs a string, not a %s", mft__jinja_type_name(what)); return 0; }
        mft__jinja_spend(r, in.n / 16);
        return mft__jinja_find(in.u.s, in.n, 0, what.u.s, what.n) >= 0;
    }
    if (in.type == MFT__V_DICT) return mft__jinja_lookup(r, in.u.dict, what) != NULL;
    list = mft__jinja_iterate(r, in);
    for (i = 0; i < list->n && !r->status; i++) if (mft__jinja_equal(r, list->items[i], what)) return 1;
    return 0;
}

/* ---- strings ---- */

/* s without the blanks (chars None or undefined), or the characters of `chars`, at its ends: 1 left, 2 right, 3 both */
static mft__jvalue mft__jinja_strip(mft__jrun *r, mft__jvalue v, mft__jvalue chars, int sides)
{
    const char *s;
    size_t      a = 0, b, k;
    uint32_t    c;
    v = mft__jinja_str(r, v);
    if (r->status) return v;
    if (chars.type != MFT__V_NONE && chars.type != MFT__V_UNDEFINED && chars.type != MFT__V_STRING)
        return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "the characters to strip are no string");
    s = v.u.s; b = v.n;
    while ((sides & 1) && a < b) {
        k = mft__jinja_char(s + a, b - a, &c);
        if (chars.type == MFT__V_STRING ? mft__jinja_find(chars.u.s, chars.n, 0, s + a, k) < 0 : !mft__jinja_is_space(c)) break;
        if (!mft__jinja_spend(r, 1 + chars.n / 16)) break;
        a += k;
    }
    while ((sides & 2) && a < b) {
        k = mft__jinja_char_before(s + a, b - a, &c);
        if (chars.type == MFT__V_STRING ? mft__jinja_find(chars.u.s, chars.n, 0, s + b - k, k) < 0 : !mft__jinja_is_space(c)) break;
        if (!mft__jinja_spend(r, 1 + chars.n / 16)) break;
        b -= k;
    }
    return mft__v_text(s + a, b - a);
}

/* how: 'u' upper, 'l' lower, 'c' first letter upper and the rest lower; 't' the first of each word as str.title()
 * has words, 'w' as the filter has them */
static mft__jvalue mft__jinja_case(mft__jrun *r, mft__jvalue v, int how)
{
    size_t   i = 0, mark = mft__jinja_open(r);
    int      begins = 1;
    uint32_t c;
    v = mft__jinja_str(r, v);
    while (i < v.n && !r->status) {
        size_t   k = mft__jinja_char(v.u.s + i, v.n - i, &c);
        uint32_t to = how == 'u' || (how != 'l' && begins) ? mft__jinja_upper(c) : mft__jinja_lower(c);
        if (how == 'c') begins = 0;
        if (how == 't') begins = mft__jinja_upper(c) == c && mft__jinja_lower(c) == c;
        if (how == 'w') begins = mft__jinja_is_space(c) || (c < 0x80 && c && strchr("-({[<", (int)c));
        if (to == c) mft__jinja_put(r, v.u.s + i, k);
        else mft__jinja_put_char(r, to);
        i += k;
    }
    return mft__jinja_close(r, mark);
}

static mft__jvalue mft__jinja_replace(mft__jrun *r, mft__jvalue v, mft__jvalue from, mft__jvalue to, int64_t count)
{
    size_t  at = 0, mark;
    int64_t hit;
    v = mft__jinja_str(r, v); from = mft__jinja_str(r, from); to = mft__jinja_str(r, to);
    if (r->status) return v;
    if (!from.n) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "replacing an empty string is not known");
    if (count == 0 || (hit = mft__jinja_find(v.u.s, v.n, 0, from.u.s, from.n)) < 0) return v;
    mark = mft__jinja_open(r);
    for (; hit >= 0 && count-- != 0 && !r->status; hit = mft__jinja_find(v.u.s, v.n, at, from.u.s, from.n)) {
        mft__jinja_put(r, v.u.s + at, (size_t)hit - at);
        mft__jinja_put(r, to.u.s, to.n);
        at = (size_t)hit + from.n;
    }
    mft__jinja_put(r, v.u.s + at, v.n - at);
    return mft__jinja_close(r, mark);
}

static mft__jvalue mft__jinja_join(mft__jrun *r, const mft__jlist *list, mft__jvalue between, int strict)
{
    size_t i, mark = mft__jinja_open(r);
    for (i = 0; i < list->n && !r->status; i++) {
        if (i) mft__jinja_put_value(r, between, 0);
        if (strict && list->items[i].type != MFT__V_STRING) mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "join: a %s is no string", mft__jinja_type_name(list->items[i]));
        mft__jinja_put_value(r, list->items[i], 0);
    }
    return mft__jinja_close(r, mark);
}

/* Pieces collected one by one: at most a piece a byte and one more, shrunk at the end. */
static mft__jvalue mft__jinja_pieces(mft__jrun *r, size_t at_most) { mft__jvalue v = mft__v_list(r, MFT__L_LIST, at_most); if (!r->status) v.u.list->n = 0; return v; }
static void mft__jinja_piece(mft__jvalue list, const char *s, size_t n) { list.u.list->items[list.u.list->n++] = mft__v_text(s, n); }

/* str.split: limit < 0 for all; a separator that is None or undefined: runs of blanks */
static mft__jvalue mft__jinja_split(mft__jrun *r, mft__jvalue v, mft__jvalue sep, int64_t limit, int from_right)
{
    mft__jvalue list, swap;
    const char *s = v.u.s;
    size_t      a = 0, b = v.n, k, e, i, n = 0;
    uint32_t    c;
    int         blanks = sep.type == MFT__V_NONE || sep.type == MFT__V_UNDEFINED;

    if (!blanks && sep.type != MFT__V_STRING) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "split: a %s is no separator", mft__jinja_type_name(sep));
    if (!blanks && !sep.n) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "split: an empty separator");
    if (!mft__jinja_spend(r, v.n / 8)) return v;
    if (blanks) n = v.n / 2 + 1;
    else for (n = 1, i = 0; (i = (size_t)mft__jinja_find(s, b, i, sep.u.s, sep.n)) != (size_t)-1; i += sep.n) n++;
    list = mft__jinja_pieces(r, n + 1);
    if (r->status) return list;
    if (!blanks && !from_right) {
        for (; limit-- != 0; a = (size_t)(s - v.u.s)) {
            int64_t hit = mft__jinja_find(v.u.s, b, a, sep.u.s, sep.n);
            if (hit < 0) break;
            mft__jinja_piece(list, v.u.s + a, (size_t)hit - a);
            s = v.u.s + hit + sep.n;
        }
        mft__jinja_piece(list, v.u.s + a, b - a);
        return list;
    }
    if (!blanks) {
        for (k = b; limit != 0 && k >= sep.n; ) {
            if (memcmp(s + k - sep.n, sep.u.s, sep.n) != 0) { k--; continue; }
            mft__jinja_piece(list, s + k, b - k);
            k = b = k - sep.n;
            limit--;
        }
        mft__jinja_piece(list, s, b);
    } else if (!from_right) {
        for (;;) {
            while (a < b) { k = mft__jinja_char(s + a, b - a, &c); if (!mft__jinja_is_space(c)) break; a += k; }
            if (a == b) return list;
            if (limit-- == 0) { mft__jinja_piece(list, s + a, b - a); return list; }
            for (e = a; e < b; e += k) { k = mft__jinja_char(s + e, b - e, &c); if (mft__jinja_is_space(c)) break; }
            mft__jinja_piece(list, s + a, e - a);
            a = e;
        }
    } else {
        for (;;) {
            while (b > 0) { k = mft__jinja_char_before(s, b, &c); if (!mft__jinja_is_space(c)) break; b -= k; }
            if (!b) break;
            if (limit-- == 0) { mft__jinja_piece(list, s, b); break; }
            for (e = b; e > 0; e -= k) { k = mft__jinja_char_before(s, e, &c); if (mft__jinja_is_space(c)) break; }
            mft__jinja_piece(list, s + e, b - e);
            b = e;
        }
    }
    for (i = 0, n = list.u.list->n; i < n / 2; i++) {
        swap = list.u.list->items[i]; list.u.list->items[i] = list.u.list->items[n - 1 - i]; list.u.list->items[n - 1 - i] = swap;
    }
    return list;
}

static mft__jvalue mft__jinja_splitlines(mft__jrun *r, mft__jvalue v, int keep)
{
    mft__jvalue list;
    size_t      begin = 0, i = 0, k, n = 1;
    uint32_t    c;
    int         pass;
    for (pass = 0; pass < 2; pass++) {                          /* count, then cut */
        if (pass) { list = mft__jinja_pieces(r, n); if (r->status) return list; } else { list = mft__v_none(); mft__jinja_spend(r, v.n / 8); }
        for (begin = i = 0; i < v.n; i += k) {
            k = mft__jinja_char(v.u.s + i, v.n - i, &c);
            if (!((c >= 10 && c <= 13) || (c >= 0x1c && c <= 0x1e) || c == 0x85 || c == 0x2028 || c == 0x2029)) continue;
            if (c == '\r' && i + 1 < v.n && v.u.s[i + 1] == '\n') k = 2;
            n++;
            if (pass) mft__jinja_piece(list, v.u.s + begin, (keep ? i + k : i) - begin);
            begin = i + k;
        }
    }
    if (begin < v.n) mft__jinja_piece(list, v.u.s + begin, v.n - begin);
    return list;
}

/* ---- items by attribute, order ---- */

/* item.a.b, item[0]: what filters take as `attribute` */
static mft__jvalue mft__jinja_path(mft__jrun *r, mft__jvalue item, mft__jvalue path)
{
    size_t a = 0, b, i;
    if (path.type == MFT__V_NONE || path.type == MFT__V_UNDEFINED) return item;
    if (path.type != MFT__V_STRING) return mft__jinja_item(r, item, path);
    while (a <= path.n && !r->status) {
        int64_t number = 0;
        for (b = a; b < path.n && path.u.s[b] != '.'; ) b++;
        for (i = a; i < b && b - a < 10 && path.u.s[i] >= '0' && path.u.s[i] <= '9'; i++) number = number * 10 + (path.u.s[i] - '0');
        item = mft__jinja_item(r, item, i == b && b > a ? mft__v_int(number) : mft__v_text(path.u.s + a, b - a));
        a = b + 1;
    }
    return item;
}

static mft__jvalue mft__jinja_key(mft__jrun *r, mft__jvalue item, int fold, mft__jvalue path)
{
    item = mft__jinja_path(r, item, path);
    return fold && item.type == MFT__V_STRING ? mft__jinja_case(r, item, 'l') : item;
}

/* A new list: stable, by merging runs of doubling length. */
static mft__jvalue mft__jinja_sorted(mft__jrun *r, mft__jvalue v, int fold, int reverse, mft__jvalue path)
{
    const mft__jlist *from = mft__jinja_iterate(r, v);
    size_t      n = from->n, i, width;
    mft__jvalue list = mft__v_list(r, MFT__L_LIST, n);
    mft__jpair *a = (mft__jpair *)mft__jinja_alloc(r, n * sizeof *a), *b = (mft__jpair *)mft__jinja_alloc(r, n * sizeof *b), *swap;
    if (r->status) return list;
    for (i = 0; i < n; i++) { a[i].key = mft__jinja_key(r, from->items[i], fold, path); a[i].value = from->items[i]; }
    for (width = 1; width < n && !r->status; width *= 2) {
        for (i = 0; i < n; i += 2 * width) {
            size_t left = i, right = i + width < n ? i + width : n, middle = right, end = i + 2 * width < n ? i + 2 * width : n, k = i;
            while (k < end) {
                int take_right = left == middle ? 1 : right == end ? 0
                    : reverse ? mft__jinja_less(r, a[left].key, a[right].key) : mft__jinja_less(r, a[right].key, a[left].key);
                b[k++] = take_right ? a[right++] : a[left++];
            }
        }
        swap = a; a = b; b = swap;
    }
    for (i = 0; i < n; i++) list.u.list->items[i] = a[i].value;
    return list;
}

/* ---- filters ---- */
static mft__jvalue mft__jinja_apply_filter(mft__jrun *r, const char *name, size_t bytes, mft__jvalue v, const mft__jargs *args);
static int         mft__jinja_apply_test  (mft__jrun *r, const char *name, size_t bytes, mft__jvalue v, const mft__jargs *args);
static int         mft__jinja_has         (const char *name, size_t bytes, int is_filter);

#define MFT__JINJA_FN(name) static mft__jvalue mft__jf_##name(mft__jrun *r, mft__jvalue v, const mft__jvalue *a, const mft__jargs *args)
#define MFT__JINJA_UNUSED() ((void)r, (void)v, (void)a, (void)args)

/* An optional whole number. */
static int64_t mft__jinja_int_or(mft__jrun *r, mft__jvalue v, int64_t fallback)
{
    if (v.type == MFT__V_UNDEFINED || v.type == MFT__V_NONE) return fallback;
    if (!mft__jinja_is_integer(v)) { mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s where a whole number should be", mft__jinja_type_name(v)); return fallback; }
    return v.u.i;
}

MFT__JINJA_FN(trim)       { (void)args; return mft__jinja_strip(r, v, a[0], 3); }
MFT__JINJA_FN(lstrip)     { (void)args; return mft__jinja_strip(r, v, a[0], 1); }
MFT__JINJA_FN(rstrip)     { (void)args; return mft__jinja_strip(r, v, a[0], 2); }
MFT__JINJA_FN(upper)      { MFT__JINJA_UNUSED(); return mft__jinja_case(r, v, 'u'); }
MFT__JINJA_FN(lower)      { MFT__JINJA_UNUSED(); return mft__jinja_case(r, v, 'l'); }
MFT__JINJA_FN(capitalize) { MFT__JINJA_UNUSED(); return mft__jinja_case(r, v, 'c'); }
MFT__JINJA_FN(title)      { MFT__JINJA_UNUSED(); return mft__jinja_case(r, v, 'w'); }
MFT__JINJA_FN(str_title)  { MFT__JINJA_UNUSED(); return mft__jinja_case(r, v, 't'); }
MFT__JINJA_FN(string)     { MFT__JINJA_UNUSED(); return mft__jinja_str(r, v); }
MFT__JINJA_FN(replace)    { (void)args; return mft__jinja_replace(r, v, a[0], a[1], mft__jinja_int_or(r, a[2], -1)); }

MFT__JINJA_FN(length)
{
    int64_t n = mft__jinja_length(r, v);
    MFT__JINJA_UNUSED();
    return n < 0 ? mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s has no length", mft__jinja_type_name(v)) : mft__v_int(n);
}

MFT__JINJA_FN(default)
{
    (void)r; (void)args;
    if (v.type != MFT__V_UNDEFINED && !(mft__jinja_truth(a[1]) && !mft__jinja_truth(v))) return v;
    return a[0].type == MFT__V_UNDEFINED ? mft__v_text("", 0) : a[0];
}

MFT__JINJA_FN(first)
{
    const mft__jlist *list = mft__jinja_iterate(r, v);
    MFT__JINJA_UNUSED();
    return list->n ? list->items[0] : mft__v_undefined(mft__jinja_type_name(v), "first", 5);
}

MFT__JINJA_FN(last)
{
    const mft__jlist *list = mft__jinja_iterate(r, v);
    MFT__JINJA_UNUSED();
    return list->n ? list->items[list->n - 1] : mft__v_undefined(mft__jinja_type_name(v), "last", 4);
}

/* A list of what `pick` makes of the elements. */
static mft__jvalue mft__jinja_copy(mft__jrun *r, mft__jvalue v, mft__jlist_kind kind, mft__jvalue path, int reverse)
{
    const mft__jlist *list = mft__jinja_iterate(r, v);
    mft__jvalue out = mft__v_list(r, kind, list->n);
    size_t      i;
    for (i = 0; i < list->n && !r->status; i++) out.u.list->items[i] = mft__jinja_path(r, list->items[reverse ? list->n - 1 - i : i], path);
    return out;
}

MFT__JINJA_FN(list)    { MFT__JINJA_UNUSED(); return mft__jinja_copy(r, v, MFT__L_LIST, mft__v_none(), 0); }
MFT__JINJA_FN(reverse)
{
    mft__jvalue out;
    MFT__JINJA_UNUSED();
    if (v.type == MFT__V_STRING) return mft__jinja_slice(r, v, mft__v_none(), mft__v_none(), mft__v_int(-1));
    out = mft__jinja_copy(r, v, MFT__L_GENERATOR, mft__v_none(), 1);
    return out;
}

MFT__JINJA_FN(join)
{
    mft__jvalue list = mft__jinja_copy(r, v, MFT__L_LIST, a[1], 0);
    (void)args;
    return r->status ? v : mft__jinja_join(r, list.u.list, a[0].type == MFT__V_UNDEFINED ? mft__v_text("", 0) : a[0], 0);
}

MFT__JINJA_FN(items)
{
    mft__jvalue out;
    MFT__JINJA_UNUSED();
    if (v.type != MFT__V_DICT && v.type != MFT__V_UNDEFINED) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "items: a %s is no mapping", mft__jinja_type_name(v));
    out = v.type == MFT__V_DICT ? mft__jinja_keys(r, v.u.dict, 2) : mft__v_list(r, MFT__L_GENERATOR, 0);
    if (!r->status) out.u.list->kind = MFT__L_GENERATOR;
    return out;
}

MFT__JINJA_FN(tojson)
{
    mft__jdump  d;
    mft__jvalue wide = a[1];
    size_t      mark = mft__jinja_open(r);
    int64_t     n;
    (void)args;
    memset(&d, 0, sizeof d);
    d.ascii = mft__jinja_truth(a[0]); d.sorted = mft__jinja_truth(a[3]);
    d.indent = mft__v_none(); d.between = mft__v_text(", ", 2); d.after_key = mft__v_text(": ", 2);
    if (mft__jinja_is_integer(wide)) {
        for (n = wide.u.i; n > 0 && !r->status; n--) mft__jinja_puts(r, " ");
        d.indent = mft__jinja_close(r, mark);
    } else if (wide.type == MFT__V_STRING) d.indent = wide;
    if (d.indent.type == MFT__V_STRING) d.between = mft__v_text(",", 1);
    if (a[2].type == MFT__V_LIST && a[2].u.list->n == 2 && a[2].u.list->items[0].type == MFT__V_STRING && a[2].u.list->items[1].type == MFT__V_STRING) {
        d.between = a[2].u.list->items[0]; d.after_key = a[2].u.list->items[1];
    } else if (mft__jinja_truth(a[2])) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "tojson: separators are not two strings");
    mft__jinja_dump(r, v, &d);
    return mft__jinja_close(r, mark);
}

MFT__JINJA_FN(int)
{
    double  f = 0;
    int64_t i = 0;
    size_t  k = 0;
    int     negative, is_int = 0;
    (void)args;
    if (v.type == MFT__V_UNDEFINED) return mft__jinja_undefined(r, v);
    if (mft__jinja_int_or(r, a[1], 10) != 10) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "int: only base 10 is known");
    if (mft__jinja_is_integer(v)) return mft__v_int(v.u.i);
    if (v.type == MFT__V_STRING) {                              /* digits exactly; with a point by way of a float */
        mft__jvalue s = mft__jinja_strip(r, v, mft__v_none(), 3);
        negative = s.n && s.u.s[0] == '-';
        if (s.n && (negative || s.u.s[0] == '+')) k++;
        for (is_int = k < s.n; k < s.n && is_int; k++) {
            is_int = s.u.s[k] >= '0' && s.u.s[k] <= '9' && i <= (INT64_MAX - 9) / 10;
            if (is_int) i = i * 10 + (s.u.s[k] - '0');
        }
        if (is_int) return mft__v_int(negative ? -i : i);
        if (!mft__jinja_number(s.u.s, s.n, &f)) f = HUGE_VAL;
    } else if (v.type == MFT__V_FLOAT) f = v.u.f;
    else f = HUGE_VAL;
    if (f > -9e18 && f < 9e18) return mft__v_int((int64_t)f);
    return a[0].type == MFT__V_UNDEFINED ? mft__v_int(0) : a[0];
}

MFT__JINJA_FN(float)
{
    double f;
    (void)args;
    if (v.type == MFT__V_UNDEFINED) return mft__jinja_undefined(r, v);
    if (mft__jinja_is_number(v)) return mft__v_float(mft__jinja_double(v));
    if (v.type == MFT__V_STRING && mft__jinja_number(v.u.s, v.n, &f)) return mft__v_float(f);
    return a[0].type == MFT__V_UNDEFINED ? mft__v_float(0) : a[0];
}

static mft__jvalue mft__jinja_no_number(mft__jrun *r, mft__jvalue v)
{
    return v.type == MFT__V_UNDEFINED ? mft__jinja_undefined(r, v) : mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s is no number", mft__jinja_type_name(v));
}

static mft__jvalue mft__jinja_overflow(mft__jrun *r) { return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a whole number does not fit 64 bits"); }

MFT__JINJA_FN(abs)
{
    MFT__JINJA_UNUSED();
    if (v.type == MFT__V_FLOAT) return mft__v_float(fabs(v.u.f));
    if (!mft__jinja_is_integer(v)) return mft__jinja_no_number(r, v);
    return v.u.i == INT64_MIN ? mft__jinja_overflow(r) : mft__v_int(v.u.i < 0 ? -v.u.i : v.u.i);
}

MFT__JINJA_FN(round)
{
    char    text[400], *p;
    int64_t digits = mft__jinja_int_or(r, a[0], 0);
    double  x, scale;
    int     up = a[1].type == MFT__V_STRING && mft__jinja_same(a[1].u.s, a[1].n, "ceil");
    (void)args;
    if (!mft__jinja_is_number(v)) return mft__jinja_no_number(r, v);
    if (digits < -15 || digits > 15) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "round: from -15 to 15 digits are known");
    x = mft__jinja_double(v);
    scale = pow(10.0, (double)digits);
    if (up || (a[1].type == MFT__V_STRING && mft__jinja_same(a[1].u.s, a[1].n, "floor")))
        return mft__v_float((up ? ceil(x * scale) : floor(x * scale)) / scale);
    if (mft__jinja_is_integer(v) && digits >= 0) return mft__v_int(v.u.i);
    if (digits < 0) { x = nearbyint(x * scale) / scale; return v.type == MFT__V_FLOAT ? mft__v_float(x) : mft__v_int((int64_t)x); }
    snprintf(text, sizeof text, "%.*f", (int)digits, x);        /* rounds the exact value, half to even */
    x = strtod(text, &p);
    return mft__v_float(x);
}

MFT__JINJA_FN(indent)
{
    mft__jvalue pad = a[0], lines;
    size_t      mark = mft__jinja_open(r), i;
    int64_t     n;
    (void)args;
    v = mft__jinja_str(r, v);
    if (pad.type != MFT__V_STRING) {
        for (n = mft__jinja_int_or(r, pad, 4); n > 0 && !r->status; n--) mft__jinja_puts(r, " ");
        pad = mft__jinja_close(r, mark);
    }
    mft__jinja_put(r, v.u.s, v.n); mft__jinja_puts(r, "\n");    /* so that an end of line at the end stays */
    lines = mft__jinja_close(r, mark);
    if (r->status) return v;
    lines = mft__jinja_splitlines(r, lines, 0);
    if (r->status) return v;
    for (i = 0; i < lines.u.list->n && !r->status; i++) {
        mft__jvalue line = lines.u.list->items[i];
        if (i) mft__jinja_puts(r, "\n");
        if (i == 0 ? mft__jinja_truth(a[1]) : line.n || mft__jinja_truth(a[2])) mft__jinja_put(r, pad.u.s, pad.n);
        mft__jinja_put(r, line.u.s, line.n);
    }
    return mft__jinja_close(r, mark);
}

MFT__JINJA_FN(escape)
{
    static const char special[] = "&<>'\"";
    static const char *const names[] = { "&amp;", "&lt;", "&gt;", "&#39;", "&#34;" };
    size_t i, mark;
    MFT__JINJA_UNUSED();
    v = mft__jinja_str(r, v);
    mark = mft__jinja_open(r);
    for (i = 0; i < v.n && !r->status; i++) {
        const char *hit = v.u.s[i] ? strchr(special, v.u.s[i]) : NULL;
        if (hit) mft__jinja_puts(r, names[hit - special]);
        else mft__jinja_put(r, v.u.s + i, 1);
    }
    return mft__jinja_close(r, mark);
}

MFT__JINJA_FN(unique)
{
    const mft__jlist *list = mft__jinja_iterate(r, v);
    mft__jvalue out = mft__v_list(r, MFT__L_GENERATOR, list->n), keys = mft__v_list(r, MFT__L_LIST, list->n), key;
    size_t      i, k, n = 0;
    (void)args;
    for (i = 0; i < list->n && !r->status; i++) {
        key = mft__jinja_key(r, list->items[i], !mft__jinja_truth(a[0]), a[1]);
        for (k = 0; k < n && !mft__jinja_equal(r, keys.u.list->items[k], key); ) k++;
        if (k == n) { keys.u.list->items[n] = key; out.u.list->items[n++] = list->items[i]; }
    }
    if (!r->status) out.u.list->n = n;
    return out;
}

MFT__JINJA_FN(sort) { (void)args; return mft__jinja_sorted(r, v, !mft__jinja_truth(a[1]), mft__jinja_truth(a[0]), a[2]); }

MFT__JINJA_FN(dictsort)
{
    int by_value = a[1].type == MFT__V_STRING && mft__jinja_same(a[1].u.s, a[1].n, "value");
    (void)args;
    if (v.type != MFT__V_DICT) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "dictsort: a %s is no mapping", mft__jinja_type_name(v));
    return mft__jinja_sorted(r, mft__jinja_keys(r, v.u.dict, 2), !mft__jinja_truth(a[0]), mft__jinja_truth(a[2]), mft__v_int(by_value));
}

static mft__jvalue mft__jinja_extreme(mft__jrun *r, mft__jvalue v, const mft__jvalue *a, int greatest)
{
    const mft__jlist *list = mft__jinja_iterate(r, v);
    mft__jvalue best = mft__v_undefined(mft__jinja_type_name(v), greatest ? "max" : "min", 3), best_key = best, key;
    size_t      i;
    for (i = 0; i < list->n && !r->status; i++) {
        key = mft__jinja_key(r, list->items[i], !mft__jinja_truth(a[0]), a[1]);
        if (i == 0 || (greatest ? mft__jinja_less(r, best_key, key) : mft__jinja_less(r, key, best_key))) { best = list->items[i]; best_key = key; }
    }
    return best;
}

MFT__JINJA_FN(min) { (void)args; return mft__jinja_extreme(r, v, a, 0); }
MFT__JINJA_FN(max) { (void)args; return mft__jinja_extreme(r, v, a, 1); }

static mft__jvalue mft__jinja_arithmetic(mft__jrun *r, int op, mft__jvalue x, mft__jvalue y);

MFT__JINJA_FN(sum)
{
    const mft__jlist *list = mft__jinja_iterate(r, v);
    mft__jvalue total = a[1].type == MFT__V_UNDEFINED ? mft__v_int(0) : a[1];
    size_t      i;
    (void)args;
    for (i = 0; i < list->n && !r->status; i++) total = mft__jinja_arithmetic(r, '+', total, mft__jinja_path(r, list->items[i], a[0]));
    return total;
}

MFT__JINJA_FN(batch)
{
    const mft__jlist *list = mft__jinja_iterate(r, v);
    int64_t     per = mft__jinja_int_or(r, a[0], 0);
    mft__jvalue out, row;
    size_t      i, k, n, width = (size_t)per;
    (void)args;
    if (per < 1 || per > MFT__JINJA_MAX_RANGE) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "batch: the size is not within 1 and %d", MFT__JINJA_MAX_RANGE);
    out = mft__v_list(r, MFT__L_GENERATOR, (list->n + width - 1) / width);
    for (i = 0; i < list->n && !r->status; i += width) {
        n = list->n - i < width && !(mft__jinja_truth(a[1]) || a[1].type == MFT__V_STRING) ? list->n - i : width;
        row = mft__v_list(r, MFT__L_LIST, n);
        for (k = 0; k < n && !r->status; k++) row.u.list->items[k] = i + k < list->n ? list->items[i + k] : a[1];
        if (!r->status) out.u.list->items[i / width] = row;
    }
    return out;
}

MFT__JINJA_FN(wordcount)
{
    size_t   i = 0, n = 0;
    uint32_t c;
    int      was = 0, is;
    MFT__JINJA_UNUSED();
    v = mft__jinja_str(r, v);
    for (; i < v.n && mft__jinja_spend(r, 1); was = is) {
        i += mft__jinja_char(v.u.s + i, v.n - i, &c);
        is = c < 0x80 ? mft__jinja_is_word((char)c) : !mft__jinja_is_space(c);
        n += (size_t)(is && !was);
    }
    return mft__v_int((int64_t)n);
}

/* The arguments behind the first `n`. */
static mft__jargs mft__jinja_rest(const mft__jargs *args, size_t n)
{
    mft__jargs rest = *args;
    rest.list += n; rest.n -= n; rest.n_positional -= n;
    return rest;
}

/* map('filter', ..) and map(attribute='a.b', default=..) */
MFT__JINJA_FN(map)
{
    const mft__jlist *list = mft__jinja_iterate(r, v);
    mft__jvalue out = mft__v_list(r, MFT__L_GENERATOR, list->n), path = mft__v_none(), other = mft__v_undefined(NULL, "", 0), item;
    mft__jargs  rest;
    size_t      i;
    (void)a;
    memset(&rest, 0, sizeof rest);
    if (args->n_positional) rest = mft__jinja_rest(args, 1);
    else for (i = 0; i < args->n; i++) {
        if (mft__jinja_same(args->list[i].name, args->list[i].bytes, "attribute")) path = args->list[i].value;
        else if (mft__jinja_same(args->list[i].name, args->list[i].bytes, "default")) other = args->list[i].value;
        else return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "filter 'map' has no parameter '%.*s'", MFT__CUT(args->list[i].bytes), args->list[i].name);
    }
    if (!args->n_positional && path.type == MFT__V_NONE) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "filter 'map' needs a filter or an attribute");
    if (args->n_positional && args->list[0].value.type != MFT__V_STRING) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "filter 'map' needs a filter's name");
    for (i = 0; i < list->n && !r->status; i++) {
        if (args->n_positional) item = mft__jinja_apply_filter(r, args->list[0].value.u.s, args->list[0].value.n, list->items[i], &rest);
        else {
            item = mft__jinja_path(r, list->items[i], path);
            if (item.type == MFT__V_UNDEFINED && other.type != MFT__V_UNDEFINED) item = other;
        }
        out.u.list->items[i] = item;
    }
    return out;
}

/* select and its kin: by_attr 1: the first argument is the attribute looked at; wanted: which outcome stays */
static mft__jvalue mft__jinja_select(mft__jrun *r, mft__jvalue v, const mft__jargs *args, size_t by_attr, int wanted)
{
    const mft__jlist *list = mft__jinja_iterate(r, v);
    mft__jvalue out = mft__v_list(r, MFT__L_GENERATOR, list->n), item;
    mft__jargs  rest;
    size_t      i, n = 0;
    int         is;
    memset(&rest, 0, sizeof rest);
    if (args->n_positional < by_attr) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "an attribute's name is missing");
    if (args->n_positional > by_attr) {
        rest = mft__jinja_rest(args, by_attr + 1);
        if (args->list[by_attr].value.type != MFT__V_STRING) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a test's name is no string");
    }
    for (i = 0; i < list->n && !r->status; i++) {
        item = by_attr ? mft__jinja_path(r, list->items[i], args->list[0].value) : list->items[i];
        is   = args->n_positional > by_attr ? mft__jinja_apply_test(r, args->list[by_attr].value.u.s, args->list[by_attr].value.n, item, &rest)
                                            : mft__jinja_truth(item);
        if (is == wanted) out.u.list->items[n++] = list->items[i];
    }
    if (!r->status) out.u.list->n = n;
    return out;
}

MFT__JINJA_FN(select)     { (void)a; return mft__jinja_select(r, v, args, 0, 1); }
MFT__JINJA_FN(reject)     { (void)a; return mft__jinja_select(r, v, args, 0, 0); }
MFT__JINJA_FN(selectattr) { (void)a; return mft__jinja_select(r, v, args, 1, 1); }
MFT__JINJA_FN(rejectattr) { (void)a; return mft__jinja_select(r, v, args, 1, 0); }

static const mft__jbuiltin mft__jinja_filters[] = {
    { "abs", "", mft__jf_abs }, { "batch", "linecount fill_with", mft__jf_batch }, { "capitalize", "", mft__jf_capitalize },
    { "count", "", mft__jf_length }, { "d", "default_value boolean", mft__jf_default }, { "default", "default_value boolean", mft__jf_default },
    { "dictsort", "case_sensitive by reverse", mft__jf_dictsort }, { "e", "", mft__jf_escape }, { "escape", "", mft__jf_escape },
    { "first", "", mft__jf_first }, { "float", "default", mft__jf_float }, { "forceescape", "", mft__jf_escape },
    { "indent", "width first blank", mft__jf_indent }, { "int", "default base", mft__jf_int }, { "items", "", mft__jf_items },
    { "join", "d attribute", mft__jf_join }, { "last", "", mft__jf_last }, { "length", "", mft__jf_length }, { "list", "", mft__jf_list },
    { "lower", "", mft__jf_lower }, { "map", NULL, mft__jf_map }, { "max", "case_sensitive attribute", mft__jf_max },
    { "min", "case_sensitive attribute", mft__jf_min }, { "reject", NULL, mft__jf_reject }, { "rejectattr", NULL, mft__jf_rejectattr },
    { "replace", "old new count", mft__jf_replace }, { "reverse", "", mft__jf_reverse }, { "round", "precision method", mft__jf_round },
    { "safe", "", mft__jf_string }, { "select", NULL, mft__jf_select }, { "selectattr", NULL, mft__jf_selectattr },
    { "sort", "reverse case_sensitive attribute", mft__jf_sort }, { "string", "", mft__jf_string }, { "sum", "attribute start", mft__jf_sum },
    { "title", "", mft__jf_title }, { "tojson", "ensure_ascii indent separators sort_keys", mft__jf_tojson }, { "trim", "chars", mft__jf_trim },
    { "unique", "case_sensitive attribute", mft__jf_unique }, { "upper", "", mft__jf_upper }, { "wordcount", "", mft__jf_wordcount }
};

/* ---- methods ---- */

/* The part of s between a[1] and a[2], in characters: what find and its like look at. */
static mft__jvalue mft__jinja_window(mft__jrun *r, mft__jvalue s, const mft__jvalue *a)
{
    mft__jvalue none = mft__v_none();
    return mft__jinja_slice(r, s, a[1].type == MFT__V_UNDEFINED ? none : a[1], a[2].type == MFT__V_UNDEFINED ? none : a[2], none);
}

static int mft__jinja_needs_string(mft__jrun *r, mft__jvalue v)
{
    if (v.type != MFT__V_STRING) mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s where a string should be", mft__jinja_type_name(v));
    return !r->status;
}

MFT__JINJA_FN(split)      { (void)args; return mft__jinja_split(r, v, a[0], mft__jinja_int_or(r, a[1], -1), 0); }
MFT__JINJA_FN(rsplit)     { (void)args; return mft__jinja_split(r, v, a[0], mft__jinja_int_or(r, a[1], -1), 1); }
MFT__JINJA_FN(splitlines) { (void)args; return mft__jinja_splitlines(r, v, mft__jinja_truth(a[0])); }
MFT__JINJA_FN(str_join)   { const mft__jlist *list = mft__jinja_iterate(r, a[0]); (void)args; return mft__jinja_join(r, list, v, 1); }
MFT__JINJA_FN(str_replace)
{
    (void)args;
    return mft__jinja_needs_string(r, a[0]) && mft__jinja_needs_string(r, a[1]) ? mft__jinja_replace(r, v, a[0], a[1], mft__jinja_int_or(r, a[2], -1)) : v;
}

/* Whether s begins, or ends, with x, or with one of a tuple x. */
static mft__jvalue mft__jinja_has_end(mft__jrun *r, mft__jvalue s, mft__jvalue x, int at_end)
{
    size_t i, n = x.type == MFT__V_LIST && x.u.list->kind == MFT__L_TUPLE ? x.u.list->n : 1;
    for (i = 0; i < n; i++) {
        mft__jvalue part = x.type == MFT__V_LIST ? x.u.list->items[i] : x;
        if (!mft__jinja_needs_string(r, part) || !mft__jinja_spend(r, 1 + part.n / 16)) break;
        if (part.n <= s.n && !memcmp(s.u.s + (at_end ? s.n - part.n : 0), part.u.s, part.n)) return mft__v_bool(1);
    }
    return mft__v_bool(0);
}

MFT__JINJA_FN(startswith) { mft__jvalue s = mft__jinja_window(r, v, a); (void)args; return mft__jinja_has_end(r, s, a[0], 0); }
MFT__JINJA_FN(endswith)   { mft__jvalue s = mft__jinja_window(r, v, a); (void)args; return mft__jinja_has_end(r, s, a[0], 1); }

MFT__JINJA_FN(removeprefix)
{
    (void)args;
    if (!mft__jinja_needs_string(r, a[0]) || !mft__jinja_has_end(r, v, a[0], 0).u.i) return v;
    return mft__v_text(v.u.s + a[0].n, v.n - a[0].n);
}

MFT__JINJA_FN(removesuffix)
{
    (void)args;
    if (!mft__jinja_needs_string(r, a[0]) || !mft__jinja_has_end(r, v, a[0], 1).u.i) return v;
    return mft__v_text(v.u.s, v.n - a[0].n);
}

/* Where a[0] is in s, in characters of all of s; -1 if it is not. */
static mft__jvalue mft__jinja_where(mft__jrun *r, mft__jvalue s, const mft__jvalue *a, int last)
{
    mft__jvalue window = mft__jinja_window(r, s, a);
    int64_t     hit = -1, next;
    if (!mft__jinja_needs_string(r, a[0]) || window.type != MFT__V_STRING || !mft__jinja_spend(r, window.n / 8)) return mft__v_int(-1);
    if (last) {
        for (next = (int64_t)window.n - (int64_t)a[0].n; next >= 0 && hit < 0; next--)
            if (!memcmp(window.u.s + next, a[0].u.s, a[0].n)) hit = next;
    } else hit = mft__jinja_find(window.u.s, window.n, 0, a[0].u.s, a[0].n);
    if (hit < 0) return mft__v_int(-1);
    return mft__v_int((int64_t)mft__jinja_count_chars(r, mft__v_text(s.u.s, (size_t)(window.n ? window.u.s - s.u.s : 0) + (size_t)hit)));
}

MFT__JINJA_FN(find)  { (void)args; return mft__jinja_where(r, v, a, 0); }
MFT__JINJA_FN(rfind) { (void)args; return mft__jinja_where(r, v, a, 1); }
MFT__JINJA_FN(str_index)
{
    mft__jvalue at = mft__jinja_where(r, v, a, 0);
    (void)args;
    return at.u.i < 0 ? mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "index: the part is not in the string") : at;
}

MFT__JINJA_FN(str_count)
{
    mft__jvalue window = mft__jinja_window(r, v, a);
    int64_t     n = 0, at = 0;
    (void)args;
    if (!mft__jinja_needs_string(r, a[0]) || !mft__jinja_spend(r, window.n / 8)) return v;
    if (!a[0].n) return mft__v_int((int64_t)mft__jinja_count_chars(r, window) + 1);
    while ((at = mft__jinja_find(window.u.s, window.n, (size_t)at, a[0].u.s, a[0].n)) >= 0) { n++; at += (int64_t)a[0].n; }
    return mft__v_int(n);
}

MFT__JINJA_FN(isdigit)
{
    size_t i;
    MFT__JINJA_UNUSED();
    for (i = 0; i < v.n && v.u.s[i] >= '0' && v.u.s[i] <= '9'; ) i++;
    return mft__v_bool(v.n && i == v.n);
}

MFT__JINJA_FN(isspace) { MFT__JINJA_UNUSED(); return mft__v_bool(v.n && !mft__jinja_strip(r, v, mft__v_none(), 1).n); }

/* As Python's str.islower and isupper: there is a letter with case, and all of them have this one. */
static mft__jvalue mft__jinja_has_case(mft__jrun *r, mft__jvalue v, int upper)
{
    size_t   i = 0;
    int      any = 0;
    uint32_t c;
    v = mft__jinja_str(r, v);
    while (i < v.n && mft__jinja_spend(r, 1)) {
        i += mft__jinja_char(v.u.s + i, v.n - i, &c);
        if ((upper ? mft__jinja_upper(c) : mft__jinja_lower(c)) != c) return mft__v_bool(0);
        if ((upper ? mft__jinja_lower(c) : mft__jinja_upper(c)) != c) any = 1;
    }
    return mft__v_bool(any);
}

MFT__JINJA_FN(isupper) { MFT__JINJA_UNUSED(); return mft__jinja_has_case(r, v, 1); }
MFT__JINJA_FN(islower) { MFT__JINJA_UNUSED(); return mft__jinja_has_case(r, v, 0); }

MFT__JINJA_FN(keys)      { MFT__JINJA_UNUSED(); return mft__jinja_keys(r, v.u.dict, 0); }
MFT__JINJA_FN(values)    { MFT__JINJA_UNUSED(); return mft__jinja_keys(r, v.u.dict, 1); }
MFT__JINJA_FN(dict_items){ MFT__JINJA_UNUSED(); return mft__jinja_keys(r, v.u.dict, 2); }
MFT__JINJA_FN(itself)    { MFT__JINJA_UNUSED(); return v; }     /* copy(): nothing can change a list or dict */

MFT__JINJA_FN(get)
{
    mft__jvalue *found = mft__jinja_lookup(r, v.u.dict, a[0]);
    (void)args;
    return found ? *found : a[1].type == MFT__V_UNDEFINED ? mft__v_none() : a[1];
}

MFT__JINJA_FN(list_index)
{
    size_t i;
    (void)args;
    for (i = 0; i < v.u.list->n && !r->status; i++) if (mft__jinja_equal(r, v.u.list->items[i], a[0])) return mft__v_int((int64_t)i);
    return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "index: the value is not in the list");
}

MFT__JINJA_FN(list_count)
{
    int64_t n = 0;
    size_t  i;
    (void)args;
    for (i = 0; i < v.u.list->n && !r->status; i++) n += mft__jinja_equal(r, v.u.list->items[i], a[0]);
    return mft__v_int(n);
}

MFT__JINJA_FN(cycle)
{
    (void)a;
    if (!args->n_positional) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "loop.cycle needs values");
    return args->list[v.u.loop->index % args->n_positional].value;
}

static const mft__jbuiltin mft__jinja_string_methods[] = {
    { "capitalize", "", mft__jf_capitalize }, { "count", "sub start end", mft__jf_str_count }, { "endswith", "suffix start end", mft__jf_endswith },
    { "find", "sub start end", mft__jf_find }, { "index", "sub start end", mft__jf_str_index }, { "isdigit", "", mft__jf_isdigit },
    { "islower", "", mft__jf_islower }, { "isspace", "", mft__jf_isspace }, { "isupper", "", mft__jf_isupper }, { "join", "iterable", mft__jf_str_join },
    { "lower", "", mft__jf_lower }, { "lstrip", "chars", mft__jf_lstrip }, { "removeprefix", "prefix", mft__jf_removeprefix },
    { "removesuffix", "suffix", mft__jf_removesuffix }, { "replace", "old new count", mft__jf_str_replace }, { "rfind", "sub start end", mft__jf_rfind },
    { "rsplit", "sep maxsplit", mft__jf_rsplit }, { "rstrip", "chars", mft__jf_rstrip }, { "split", "sep maxsplit", mft__jf_split },
    { "splitlines", "keepends", mft__jf_splitlines }, { "startswith", "prefix start end", mft__jf_startswith }, { "strip", "chars", mft__jf_trim },
    { "title", "", mft__jf_str_title }, { "upper", "", mft__jf_upper } };
static const mft__jbuiltin mft__jinja_list_methods[] = { { "copy", "", mft__jf_itself }, { "count", "value", mft__jf_list_count }, { "index", "value", mft__jf_list_index } };
static const mft__jbuiltin mft__jinja_dict_methods[] = {
    { "copy", "", mft__jf_itself }, { "get", "key default", mft__jf_get }, { "items", "", mft__jf_dict_items },
    { "keys", "", mft__jf_keys }, { "values", "", mft__jf_values } };
static const mft__jbuiltin mft__jinja_loop_methods[] = { { "cycle", NULL, mft__jf_cycle } };

/* ---- functions ---- */
MFT__JINJA_FN(range)
{
    int64_t     begin = 0, end, step = 1, count;
    mft__jvalue out;
    size_t      i;
    (void)v; (void)a;
    if (args->n != args->n_positional || args->n < 1 || args->n > 3) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "range takes one to three whole numbers");
    for (i = 0; i < args->n; i++) if (!mft__jinja_is_integer(args->list[i].value)) return mft__jinja_no_number(r, args->list[i].value);
    end = args->list[0].value.u.i;
    if (args->n > 1) { begin = end; end = args->list[1].value.u.i; }
    if (args->n > 2) step = args->list[2].value.u.i;
    if (step == 0) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "the step of a range is zero");
    count = 0;
    if (step > 0 ? begin < end : begin > end) {                 /* as unsigned, so that nothing overflows */
        uint64_t far = step > 0 ? (uint64_t)end - (uint64_t)begin : (uint64_t)begin - (uint64_t)end;
        uint64_t by  = step > 0 ? (uint64_t)step : 0 - (uint64_t)step;
        if ((far - 1) / by >= MFT__JINJA_MAX_RANGE) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a range of more than %d numbers", MFT__JINJA_MAX_RANGE);
        count = (int64_t)((far - 1) / by) + 1;
    }
    out = mft__v_list(r, MFT__L_RANGE, (size_t)count);
    for (i = 0; i < (size_t)count && !r->status; i++) out.u.list->items[i] = mft__v_int(begin + (int64_t)i * step);
    return out;
}

/* dict(mapping or pairs, name=value..), and namespace likewise */
static mft__jvalue mft__jinja_make_dict(mft__jrun *r, const mft__jargs *args, mft__jtype type)
{
    mft__jvalue out = mft__v_dict(r, type);
    size_t      i;
    if (args->n_positional > 1) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "one mapping at most makes a dict");
    for (i = 0; i < args->n && !r->status; i++) {
        mft__jvalue v = args->list[i].value;
        size_t      k;
        if (i >= args->n_positional) mft__jinja_put_pair(r, out.u.dict, mft__v_text(args->list[i].name, args->list[i].bytes), v);
        else if (v.type == MFT__V_DICT || v.type == MFT__V_NAMESPACE)
            for (k = 0; k < v.u.dict->n && !r->status; k++) mft__jinja_put_pair(r, out.u.dict, v.u.dict->pairs[k].key, v.u.dict->pairs[k].value);
        else {
            const mft__jlist *list = mft__jinja_iterate(r, v);
            for (k = 0; k < list->n && !r->status; k++) {
                const mft__jlist *pair = mft__jinja_iterate(r, list->items[k]);
                if (r->status) break;
                if (pair->n != 2) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a dict is made of pairs");
                mft__jinja_put_pair(r, out.u.dict, pair->items[0], pair->items[1]);
            }
        }
    }
    return out;
}

MFT__JINJA_FN(dict)      { (void)v; (void)a; return mft__jinja_make_dict(r, args, MFT__V_DICT); }
MFT__JINJA_FN(namespace) { (void)v; (void)a; return mft__jinja_make_dict(r, args, MFT__V_NAMESPACE); }

MFT__JINJA_FN(raise_exception)
{
    mft__jvalue text = mft__jinja_str(r, a[0]);
    (void)v; (void)args;
    return r->status ? text : mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "the template refuses the conversation: %.*s", (int)(text.n < 400 ? text.n : 400), text.u.s);
}

/* The time as if there were no time zones; the days by counting from 1 March (Hinnant, "chrono-compatible
 * low-level date algorithms"). */
MFT__JINJA_FN(strftime_now)
{
    static const char *const months[] = { "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December" };
    static const char *const days[]   = { "Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday" };
    int64_t day, era, doe, yoe, doy, mp, year;
    int     second, month, mday, yday, hour;
    size_t  i, mark = mft__jinja_open(r);
    char    text[32];
    (void)v; (void)args;
    if (r->now == 0) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "strftime_now: the template asks for the time, and none was given");
    if (!mft__jinja_needs_string(r, a[0])) return a[0];
    if (r->now < 0 || r->now > (int64_t)253402300799) return mft__jinja_fail(r, MFT_ERR_INVALID_ARGUMENT, "strftime_now: the time is not within 1970 and 9999");
    day = r->now / 86400; second = (int)(r->now % 86400); hour = second / 3600;
    era = (day + 719468) / 146097; doe = (day + 719468) % 146097;
    yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
    doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    mp  = (5 * doy + 2) / 153;
    mday = (int)(doy - (153 * mp + 2) / 5) + 1; month = (int)(mp < 10 ? mp + 2 : mp - 10);
    year = yoe + era * 400 + (month < 2);
    yday = (int)(doy < 306 ? doy + 59 + (year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)) : doy - 306) + 1;
    for (i = 0; i < a[0].n && !r->status; i++) {
        char c = a[0].u.s[i];
        int  pad = 1;
        text[0] = '\0';
        if (c != '%' || i + 1 == a[0].n) { mft__jinja_put(r, &c, 1); continue; }
        c = a[0].u.s[++i];
        if (c == '-' && i + 1 < a[0].n) { pad = 0; c = a[0].u.s[++i]; }
        switch (c) {
        case 'Y': snprintf(text, sizeof text, "%d", (int)year); break;
        case 'y': snprintf(text, sizeof text, pad ? "%02d" : "%d", (int)(year % 100)); break;
        case 'm': snprintf(text, sizeof text, pad ? "%02d" : "%d", month + 1); break;
        case 'd': snprintf(text, sizeof text, pad ? "%02d" : "%d", mday); break;
        case 'e': snprintf(text, sizeof text, pad ? "%2d" : "%d", mday); break;
        case 'j': snprintf(text, sizeof text, pad ? "%03d" : "%d", yday); break;
        case 'H': snprintf(text, sizeof text, pad ? "%02d" : "%d", hour); break;
        case 'I': snprintf(text, sizeof text, pad ? "%02d" : "%d", (hour + 11) % 12 + 1); break;
        case 'M': snprintf(text, sizeof text, pad ? "%02d" : "%d", second / 60 % 60); break;
        case 'S': snprintf(text, sizeof text, pad ? "%02d" : "%d", second % 60); break;
        case 'p': snprintf(text, sizeof text, "%s", hour < 12 ? "AM" : "PM"); break;
        case 'B': snprintf(text, sizeof text, "%s", months[month]); break;
        case 'b': snprintf(text, sizeof text, "%.3s", months[month]); break;
        case 'A': snprintf(text, sizeof text, "%s", days[day % 7]); break;
        case 'a': snprintf(text, sizeof text, "%.3s", days[day % 7]); break;
        case 'F': snprintf(text, sizeof text, "%d-%02d-%02d", (int)year, month + 1, mday); break;
        case 'T': snprintf(text, sizeof text, "%02d:%02d:%02d", hour, second / 60 % 60, second % 60); break;
        case '%': snprintf(text, sizeof text, "%%"); break;
        default:  return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "strftime_now: '%%%c' is not known", c);
        }
        mft__jinja_puts(r, text);
    }
    return mft__jinja_close(r, mark);
}

static const mft__jbuiltin mft__jinja_functions[] = {
    { "dict", NULL, mft__jf_dict }, { "namespace", NULL, mft__jf_namespace }, { "raise_exception", "message", mft__jf_raise_exception },
    { "range", NULL, mft__jf_range }, { "strftime_now", "format", mft__jf_strftime_now } };

/* ---- tests: the outcome is a bool ---- */
MFT__JINJA_FN(is_defined)   { MFT__JINJA_UNUSED(); return mft__v_bool(v.type != MFT__V_UNDEFINED); }
MFT__JINJA_FN(is_undefined) { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_UNDEFINED); }
MFT__JINJA_FN(is_none)      { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_NONE); }
MFT__JINJA_FN(is_boolean)   { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_BOOL); }
MFT__JINJA_FN(is_true)      { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_BOOL && v.u.i); }
MFT__JINJA_FN(is_false)     { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_BOOL && !v.u.i); }
MFT__JINJA_FN(is_integer)   { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_INT); }
MFT__JINJA_FN(is_float)     { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_FLOAT); }
MFT__JINJA_FN(is_number)    { MFT__JINJA_UNUSED(); return mft__v_bool(mft__jinja_is_number(v)); }
MFT__JINJA_FN(is_string)    { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_STRING); }
MFT__JINJA_FN(is_mapping)   { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_DICT); }
MFT__JINJA_FN(is_callable)  { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_MACRO || v.type == MFT__V_BUILTIN); }
MFT__JINJA_FN(is_escaped)   { MFT__JINJA_UNUSED(); return mft__v_bool(0); }
MFT__JINJA_FN(is_filter)    { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_STRING && mft__jinja_has(v.u.s, v.n, 1)); }
MFT__JINJA_FN(is_test)      { MFT__JINJA_UNUSED(); return mft__v_bool(v.type == MFT__V_STRING && mft__jinja_has(v.u.s, v.n, 0)); }
MFT__JINJA_FN(is_iterable)
{
    MFT__JINJA_UNUSED();
    return mft__v_bool(v.type == MFT__V_STRING || v.type == MFT__V_LIST || v.type == MFT__V_DICT || v.type == MFT__V_UNDEFINED || v.type == MFT__V_LOOP);
}
MFT__JINJA_FN(is_sequence)
{
    MFT__JINJA_UNUSED();
    return mft__v_bool(v.type == MFT__V_STRING || (v.type == MFT__V_LIST && v.u.list->kind <= MFT__L_RANGE) || v.type == MFT__V_DICT || v.type == MFT__V_UNDEFINED);
}

/* v mod m, as Python: with the sign of m */
static int64_t mft__jinja_mod(int64_t v, int64_t m)
{
    int64_t rest = m == -1 ? 0 : v % m;
    return rest && (rest < 0) != (m < 0) ? rest + m : rest;
}

static mft__jvalue mft__jinja_divides(mft__jrun *r, mft__jvalue v, int64_t by, int64_t rest)
{
    if (!mft__jinja_is_integer(v)) return mft__jinja_no_number(r, v);
    return by ? mft__v_bool(mft__jinja_mod(v.u.i, by) == rest) : mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "division by zero");
}

MFT__JINJA_FN(is_even)        { MFT__JINJA_UNUSED(); return mft__jinja_divides(r, v, 2, 0); }
MFT__JINJA_FN(is_odd)         { MFT__JINJA_UNUSED(); return mft__jinja_divides(r, v, 2, 1); }
MFT__JINJA_FN(is_divisibleby) { (void)args; return mft__jinja_divides(r, v, mft__jinja_int_or(r, a[0], 0), 0); }
MFT__JINJA_FN(is_eq)          { (void)args; return mft__v_bool(mft__jinja_equal(r, v, a[0])); }
MFT__JINJA_FN(is_ne)          { (void)args; return mft__v_bool(!mft__jinja_equal(r, v, a[0])); }
MFT__JINJA_FN(is_lt)          { (void)args; return mft__v_bool(mft__jinja_less(r, v, a[0])); }
MFT__JINJA_FN(is_gt)          { (void)args; return mft__v_bool(mft__jinja_less(r, a[0], v)); }
MFT__JINJA_FN(is_le)          { (void)args; return mft__v_bool(mft__jinja_less(r, v, a[0]) || mft__jinja_equal(r, v, a[0])); }
MFT__JINJA_FN(is_ge)          { (void)args; return mft__v_bool(mft__jinja_less(r, a[0], v) || mft__jinja_equal(r, v, a[0])); }
MFT__JINJA_FN(is_in)          { (void)args; return mft__v_bool(mft__jinja_contains(r, a[0], v)); }
MFT__JINJA_FN(is_sameas)
{
    (void)args;
    if (v.type != a[0].type) return mft__v_bool(0);
    return mft__v_bool(v.type == MFT__V_LIST ? v.u.list == a[0].u.list : v.type == MFT__V_DICT ? v.u.dict == a[0].u.dict : mft__jinja_equal(r, v, a[0]));
}

static const mft__jbuiltin mft__jinja_tests[] = {
    { "boolean", "", mft__jf_is_boolean }, { "callable", "", mft__jf_is_callable }, { "defined", "", mft__jf_is_defined },
    { "divisibleby", "num", mft__jf_is_divisibleby }, { "eq", "other", mft__jf_is_eq }, { "equalto", "other", mft__jf_is_eq }, { "==", "other", mft__jf_is_eq },
    { "escaped", "", mft__jf_is_escaped }, { "even", "", mft__jf_is_even }, { "false", "", mft__jf_is_false }, { "filter", "", mft__jf_is_filter },
    { "float", "", mft__jf_is_float }, { "ge", "other", mft__jf_is_ge }, { ">=", "other", mft__jf_is_ge }, { "gt", "other", mft__jf_is_gt },
    { "greaterthan", "other", mft__jf_is_gt }, { ">", "other", mft__jf_is_gt }, { "in", "seq", mft__jf_is_in }, { "integer", "", mft__jf_is_integer },
    { "iterable", "", mft__jf_is_iterable }, { "le", "other", mft__jf_is_le }, { "<=", "other", mft__jf_is_le }, { "lower", "", mft__jf_islower },
    { "lt", "other", mft__jf_is_lt }, { "lessthan", "other", mft__jf_is_lt }, { "<", "other", mft__jf_is_lt }, { "mapping", "", mft__jf_is_mapping },
    { "ne", "other", mft__jf_is_ne }, { "!=", "other", mft__jf_is_ne }, { "none", "", mft__jf_is_none }, { "number", "", mft__jf_is_number },
    { "odd", "", mft__jf_is_odd }, { "sameas", "other", mft__jf_is_sameas }, { "sequence", "", mft__jf_is_sequence }, { "string", "", mft__jf_is_string },
    { "test", "", mft__jf_is_test }, { "true", "", mft__jf_is_true }, { "undefined", "", mft__jf_is_undefined }, { "upper", "", mft__jf_isupper } };

#undef MFT__JINJA_FN
#undef MFT__JINJA_UNUSED

/* ---- calls ---- */
#define MFT__JINJA_FIND(table, name, bytes) mft__jinja_find_builtin(table, sizeof table / sizeof table[0], name, bytes)

static const mft__jbuiltin *mft__jinja_find_builtin(const mft__jbuiltin *table, size_t n, const char *name, size_t bytes)
{
    size_t i;
    for (i = 0; i < n; i++) if (mft__jinja_same(name, bytes, table[i].name)) return &table[i];
    return NULL;
}

static int mft__jinja_has(const char *name, size_t bytes, int is_filter)
{
    return (is_filter ? MFT__JINJA_FIND(mft__jinja_filters, name, bytes) : MFT__JINJA_FIND(mft__jinja_tests, name, bytes)) != NULL;
}

/* Puts the arguments under the parameters of `spec` and calls. */
static mft__jvalue mft__jinja_call_builtin(mft__jrun *r, const mft__jbuiltin *fn, mft__jvalue self, const mft__jargs *args)
{
    mft__jvalue a[4];
    const char *spec = fn->spec, *word;
    size_t      i, k, n;
    if (!spec) return fn->fn(r, self, NULL, args);
    for (k = 0; k < 4; k++) a[k] = mft__v_undefined(NULL, "", 0);
    for (i = 0; i < args->n; i++) {
        for (k = 0, word = spec; *word; k++) {
            n = strcspn(word, " ");
            if (i < args->n_positional ? k == i : n == args->list[i].bytes && !memcmp(word, args->list[i].name, n)) break;
            word += n + (word[n] == ' ');
        }
        if (!*word) {
            if (i < args->n_positional) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "'%s' is given too many arguments", fn->name);
            return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "'%s' has no parameter '%.*s'", fn->name, MFT__CUT(args->list[i].bytes), args->list[i].name);
        }
        a[k] = args->list[i].value;
    }
    return fn->fn(r, self, a, args);
}

static mft__jvalue mft__jinja_apply_filter(mft__jrun *r, const char *name, size_t bytes, mft__jvalue v, const mft__jargs *args)
{
    const mft__jbuiltin *fn = MFT__JINJA_FIND(mft__jinja_filters, name, bytes);
    mft__jvalue out;
    if (!fn) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "filter '%.*s' is not known", MFT__CUT(bytes), name);
    if (!mft__jinja_deeper(r)) return v;
    out = mft__jinja_call_builtin(r, fn, v, args);
    r->depth--;
    return out;
}

static int mft__jinja_apply_test(mft__jrun *r, const char *name, size_t bytes, mft__jvalue v, const mft__jargs *args)
{
    const mft__jbuiltin *fn = MFT__JINJA_FIND(mft__jinja_tests, name, bytes);
    if (!fn) { mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "test '%.*s' is not known", MFT__CUT(bytes), name); return 0; }
    return mft__jinja_truth(mft__jinja_call_builtin(r, fn, v, args));
}

static mft__jvalue mft__jinja_bind(mft__jrun *r, const mft__jbuiltin *fn, mft__jvalue self)
{
    mft__jbound *b = (mft__jbound *)mft__jinja_alloc(r, sizeof *b);
    mft__jvalue  v = mft__v_undefined(NULL, "", 0);
    if (!b) return v;
    b->fn = fn; b->self = self;
    v.type = MFT__V_BUILTIN; v.u.bound = b;
    return v;
}

/* A method of v; an undefined value without `of` when there is none of that name. */
static mft__jvalue mft__jinja_method(mft__jrun *r, mft__jvalue v, const char *name, size_t bytes)
{
    static const char *const list_changes[] = { "append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove" };
    static const char *const dict_changes[] = { "clear", "pop", "popitem", "setdefault", "update" };
    const mft__jbuiltin *fn = NULL;
    size_t i;
    if (v.type == MFT__V_STRING) fn = MFT__JINJA_FIND(mft__jinja_string_methods, name, bytes);
    if (v.type == MFT__V_DICT) {
        fn = MFT__JINJA_FIND(mft__jinja_dict_methods, name, bytes);
        for (i = 0; i < sizeof dict_changes / sizeof dict_changes[0]; i++) if (mft__jinja_same(name, bytes, dict_changes[i])) return mft__v_undefined("!dict", name, bytes);
    }
    if (v.type == MFT__V_LIST && v.u.list->kind <= MFT__L_TUPLE) {
        fn = MFT__JINJA_FIND(mft__jinja_list_methods, name, bytes);
        for (i = 0; i < sizeof list_changes / sizeof list_changes[0]; i++) if (mft__jinja_same(name, bytes, list_changes[i])) return mft__v_undefined("!list", name, bytes);
    }
    if (v.type == MFT__V_LOOP) fn = MFT__JINJA_FIND(mft__jinja_loop_methods, name, bytes);
    return fn ? mft__jinja_bind(r, fn, v) : mft__v_undefined(NULL, "", 0);
}

static mft__jvalue mft__jinja_eval(mft__jrun *r, int32_t i, mft__jscope *scope);
static int         mft__jinja_exec(mft__jrun *r, int32_t first, mft__jscope *scope);

static const mft__jnode *mft__jinja_at_node(const mft__jrun *r, int32_t i) { return &r->t->nodes[i]; }

static mft__jscope *mft__jinja_scope(mft__jrun *r, mft__jscope *parent)
{
    mft__jscope *s = (mft__jscope *)mft__jinja_alloc(r, sizeof *s);
    if (s) { s->parent = parent; s->vars = NULL; }
    return s;
}

static void mft__jinja_set(mft__jrun *r, mft__jscope *scope, const char *name, size_t bytes, mft__jvalue v)
{
    mft__jvar *var;
    if (r->status) return;
    for (var = scope->vars; var; var = var->next)
        if (var->bytes == bytes && !memcmp(var->name, name, bytes)) { var->value = v; return; }
    var = r->spare;
    if (var) r->spare = var->next;
    else var = (mft__jvar *)mft__jinja_alloc(r, sizeof *var);
    if (!var) return;
    var->name = name; var->bytes = bytes; var->value = v; var->next = scope->vars;
    scope->vars = var;
}

static mft__jvalue mft__jinja_name(mft__jrun *r, const mft__jscope *scope, const char *name, size_t bytes)
{
    const mft__jbuiltin *fn;
    const mft__jvar     *var;
    for (; scope; scope = scope->parent)
        for (var = scope->vars; var; var = var->next)
            if (var->bytes == bytes && !memcmp(var->name, name, bytes)) return var->value;
    fn = MFT__JINJA_FIND(mft__jinja_functions, name, bytes);
    return fn ? mft__jinja_bind(r, fn, mft__v_none()) : mft__v_undefined(NULL, name, bytes);
}

/* Evaluates a node's arguments. */
static mft__jargs mft__jinja_args(mft__jrun *r, int32_t first, mft__jscope *scope)
{
    mft__jargs args;
    size_t     n = 0;
    int32_t    i;
    memset(&args, 0, sizeof args);
    for (i = first; i; i = mft__jinja_at_node(r, i)->next) n++;
    if (!n) return args;
    args.list = (mft__jarg *)mft__jinja_alloc(r, n * sizeof *args.list);
    for (i = first; i && !r->status; i = mft__jinja_at_node(r, i)->next) {
        const mft__jnode *node = mft__jinja_at_node(r, i);
        mft__jarg        *arg  = &args.list[args.n++];
        int               named = node->kind == MFT__J_KEYWORD;
        arg->name = node->text; arg->bytes = named ? node->bytes : 0;
        arg->value = mft__jinja_eval(r, named ? node->a : i, scope);
        if (!named) args.n_positional++;
    }
    return args;
}

/* A body whose text becomes a value. */
static mft__jvalue mft__jinja_capture(mft__jrun *r, int32_t body, mft__jscope *scope)
{
    size_t mark = mft__jinja_open(r);
    r->captures++;
    mft__jinja_exec(r, body, scope);
    r->captures--;
    return mft__jinja_close(r, mark);
}

static mft__jvalue mft__jinja_call_macro(mft__jrun *r, const mft__jmacro *m, const mft__jargs *args)
{
    mft__jscope *scope = mft__jinja_scope(r, m->scope);
    mft__jvalue  out = mft__v_undefined(NULL, "", 0), value;
    size_t       k = 0, i, named = 0;
    int32_t      p;
    if (!scope) return out;
    mft__jinja_set(r, scope, "caller", 6, args->caller);
    for (p = m->node->a; p && !r->status; p = mft__jinja_at_node(r, p)->next, k++) {
        const mft__jnode *param = mft__jinja_at_node(r, p);
        int               given = k < args->n_positional;
        value = given ? args->list[k].value : mft__v_undefined(NULL, param->text, param->bytes);
        for (i = args->n_positional; i < args->n; i++)
            if (args->list[i].bytes == param->bytes && !memcmp(args->list[i].name, param->text, param->bytes)) {
                if (given) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "macro '%.*s' is given '%.*s' twice", MFT__CUT(m->node->bytes), m->node->text, MFT__CUT(param->bytes), param->text);
                value = args->list[i].value; given = 1; named++;
            }
        if (!given && param->a) value = mft__jinja_eval(r, param->a, scope);
        mft__jinja_set(r, scope, param->text, param->bytes, value);
    }
    for (i = args->n_positional; i < args->n; i++)
        if (mft__jinja_same(args->list[i].name, args->list[i].bytes, "caller")) { mft__jinja_set(r, scope, "caller", 6, args->list[i].value); named++; }
    if (args->n_positional > k || args->n - args->n_positional > named)
        return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "macro '%.*s' is given an argument it has no parameter for", MFT__CUT(m->node->bytes), m->node->text);
    out = mft__jinja_capture(r, m->node->c, scope);
    return out;
}

static mft__jvalue mft__jinja_call(mft__jrun *r, mft__jvalue callee, const mft__jargs *args)
{
    if (r->status) return callee;
    if (callee.type == MFT__V_BUILTIN) return mft__jinja_call_builtin(r, callee.u.bound->fn, callee.u.bound->self, args);
    if (callee.type == MFT__V_MACRO) return mft__jinja_call_macro(r, callee.u.macro, args);
    if (callee.type != MFT__V_UNDEFINED) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a %s cannot be called", mft__jinja_type_name(callee));
    if (callee.of && callee.of[0] != '!') return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "method '%.*s' of a %s is not known", MFT__CUT(callee.n), callee.u.s, callee.of);
    return mft__jinja_undefined(r, callee);
}

/* ---- evaluation ---- */
static mft__jvalue mft__jinja_concat(mft__jrun *r, mft__jvalue a, mft__jvalue b)
{
    char *s = (char *)mft__jinja_alloc(r, a.n + b.n);
    if (!s || !mft__jinja_spend(r, (a.n + b.n) / 16)) return a;
    if (a.n) memcpy(s, a.u.s, a.n);
    if (b.n) memcpy(s + a.n, b.u.s, b.n);
    return mft__v_text(s, a.n + b.n);
}

/* x times, of a string or a list */
static mft__jvalue mft__jinja_repeat(mft__jrun *r, mft__jvalue v, int64_t times)
{
    size_t mark, i, k, n;
    mft__jvalue out;
    if (times < 0) times = 0;
    if (v.type == MFT__V_STRING) {
        mark = mft__jinja_open(r);
        for (; v.n && times > 0 && !r->status; times--) mft__jinja_put(r, v.u.s, v.n);
        return mft__jinja_close(r, mark);
    }
    n = v.u.list->n;
    if (n && times > MFT__JINJA_MAX_RANGE * 16 / (int64_t)n) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a list grows too long");
    out = mft__v_list(r, v.u.list->kind, n * (size_t)times);
    for (i = 0; i < (size_t)times && n && !r->status; i++) for (k = 0; k < n; k++) out.u.list->items[i * n + k] = v.u.list->items[k];
    return out;
}

static mft__jvalue mft__jinja_integers(mft__jrun *r, int op, int64_t x, int64_t y)
{
    int64_t q;
    switch (op) {
    case '+': return (y > 0 ? x > INT64_MAX - y : x < INT64_MIN - y) ? mft__jinja_overflow(r) : mft__v_int(x + y);
    case '-': return (y > 0 ? x < INT64_MIN + y : x > INT64_MAX + y) ? mft__jinja_overflow(r) : mft__v_int(x - y);
    case '*': {
        uint64_t a = x < 0 ? 0 - (uint64_t)x : (uint64_t)x, b = y < 0 ? 0 - (uint64_t)y : (uint64_t)y;
        if (b && a > (uint64_t)INT64_MAX / b) return mft__jinja_overflow(r);
        return mft__v_int((x < 0) != (y < 0) ? -(int64_t)(a * b) : (int64_t)(a * b));
    }
    case '%': return mft__v_int(mft__jinja_mod(x, y));
    case 'D':
        if (y == -1) return x == INT64_MIN ? mft__jinja_overflow(r) : mft__v_int(-x);
        q = x / y;
        return mft__v_int(q - (x % y != 0 && (x < 0) != (y < 0)));
    default: {
        mft__jvalue out = mft__v_int(1);
        if (y > 64 && x >= -1 && x <= 1) y = x == -1 ? y % 2 : 1;        /* the only bases that do not overflow */
        for (; y > 0 && !r->status; y--) out = mft__jinja_integers(r, '*', out.u.i, x);
        return out;
    }
    }
}

static mft__jvalue mft__jinja_arithmetic(mft__jrun *r, int op, mft__jvalue x, mft__jvalue y)
{
    double a, b;
    if (r->status) return x;
    if (op == '~') {
        x = mft__jinja_str(r, x);
        return mft__jinja_concat(r, x, mft__jinja_str(r, y));
    }
    if (x.type == MFT__V_UNDEFINED) return mft__jinja_undefined(r, x);
    if (y.type == MFT__V_UNDEFINED) return mft__jinja_undefined(r, y);
    if (op == '+' && x.type == MFT__V_STRING && y.type == MFT__V_STRING) return mft__jinja_concat(r, x, y);
    if (op == '+' && x.type == MFT__V_LIST && y.type == MFT__V_LIST && x.u.list->kind == y.u.list->kind && x.u.list->kind <= MFT__L_TUPLE) {
        mft__jvalue out = mft__v_list(r, x.u.list->kind, x.u.list->n + y.u.list->n);
        if (r->status) return out;
        if (x.u.list->n) memcpy(out.u.list->items, x.u.list->items, x.u.list->n * sizeof x);
        if (y.u.list->n) memcpy(out.u.list->items + x.u.list->n, y.u.list->items, y.u.list->n * sizeof y);
        return out;
    }
    if (op == '*' && mft__jinja_is_integer(x)) { mft__jvalue swap = x; x = y; y = swap; }
    if (op == '*' && mft__jinja_is_integer(y) && (x.type == MFT__V_STRING || (x.type == MFT__V_LIST && x.u.list->kind <= MFT__L_TUPLE))) return mft__jinja_repeat(r, x, y.u.i);
    if (op == '%' && x.type == MFT__V_STRING) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "formatting a string with '%%' is not known");
    if (!mft__jinja_is_number(x) || !mft__jinja_is_number(y)) {
        char name[3];
        name[0] = op == 'D' ? '/' : op == 'P' ? '*' : (char)op; name[1] = op == 'D' || op == 'P' ? name[0] : '\0'; name[2] = '\0';
        return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "'%s' of a %s and a %s", name, mft__jinja_type_name(x), mft__jinja_type_name(y));
    }
    a = mft__jinja_double(x); b = mft__jinja_double(y);
    if ((op == '/' || op == 'D' || op == '%') && b == 0) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "division by zero");
    if (mft__jinja_is_integer(x) && mft__jinja_is_integer(y) && op != '/' && !(op == 'P' && y.u.i < 0)) return mft__jinja_integers(r, op, x.u.i, y.u.i);
    switch (op) {
    case '+': return mft__v_float(a + b);
    case '-': return mft__v_float(a - b);
    case '*': return mft__v_float(a * b);
    case '/': return mft__v_float(a / b);
    case 'D': return mft__v_float(floor(a / b));
    case '%': { double rest = fmod(a, b); return mft__v_float(rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest); }
    default:
        if (a < 0 && b != floor(b)) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "a negative number to a broken power");
        if (a == 0 && b < 0) return mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "division by zero");
        return mft__v_float(pow(a, b));
    }
}

static int mft__jinja_compare(mft__jrun *r, int op, mft__jvalue x, mft__jvalue y)
{
    switch (op) {
    case 'e': return mft__jinja_equal(r, x, y);
    case '!': return !mft__jinja_equal(r, x, y);
    case '<': return mft__jinja_less(r, x, y);
    case '>': return mft__jinja_less(r, y, x);
    case 'l': return mft__jinja_less(r, x, y) || mft__jinja_equal(r, x, y);
    case 'g': return mft__jinja_less(r, y, x) || mft__jinja_equal(r, x, y);
    case 'i': return mft__jinja_contains(r, y, x);
    default:  return !mft__jinja_contains(r, y, x);
    }
}

static mft__jvalue mft__jinja_eval_list(mft__jrun *r, const mft__jnode *n, mft__jscope *scope)
{
    mft__jvalue out;
    size_t      count = 0;
    int32_t     k;
    if (n->kind == MFT__J_DICT) {
        out = mft__v_dict(r, MFT__V_DICT);
        for (k = n->a; k && !r->status; k = mft__jinja_at_node(r, k)->next) {
            mft__jvalue key = mft__jinja_eval(r, mft__jinja_at_node(r, k)->a, scope);
            mft__jvalue value = mft__jinja_eval(r, mft__jinja_at_node(r, k)->b, scope);
            if (!r->status) mft__jinja_put_pair(r, out.u.dict, key, value);
        }
        return out;
    }
    for (k = n->a; k; k = mft__jinja_at_node(r, k)->next) count++;
    out = mft__v_list(r, n->kind == MFT__J_TUPLE ? MFT__L_TUPLE : MFT__L_LIST, count);
    for (count = 0, k = n->a; k && !r->status; k = mft__jinja_at_node(r, k)->next) out.u.list->items[count++] = mft__jinja_eval(r, k, scope);
    return out;
}

static mft__jvalue mft__jinja_eval_item(mft__jrun *r, const mft__jnode *n, mft__jscope *scope)
{
    const mft__jnode *key = mft__jinja_at_node(r, n->b);
    mft__jvalue v = mft__jinja_eval(r, n->a, scope), none = mft__v_none(), from, to, step;
    if (key->kind != MFT__J_SLICE) {
        from = mft__jinja_eval(r, n->b, scope);
        r->line = n->line;
        return r->status ? v : mft__jinja_item(r, v, from);
    }
    from = key->a ? mft__jinja_eval(r, key->a, scope) : none;
    to   = key->b ? mft__jinja_eval(r, key->b, scope) : none;
    step = key->c ? mft__jinja_eval(r, key->c, scope) : none;
    r->line = n->line;
    return r->status ? v : mft__jinja_slice(r, v, from, to, step);
}

static mft__jvalue mft__jinja_eval_compare(mft__jrun *r, const mft__jnode *n, mft__jscope *scope)
{
    mft__jvalue left = mft__jinja_eval(r, n->a, scope), right;
    int32_t     k;
    int         holds = 1;
    for (k = n->b; k && holds && !r->status; k = mft__jinja_at_node(r, k)->next) {
        const mft__jnode *operand = mft__jinja_at_node(r, k);
        right = mft__jinja_eval(r, operand->a, scope);
        r->line = operand->line;
        if (!r->status) holds = mft__jinja_compare(r, operand->op, left, right);
        left = right;
    }
    return mft__v_bool(holds);
}

/* a(..), a | f(..), a is t(..) */
static mft__jvalue mft__jinja_eval_call(mft__jrun *r, const mft__jnode *n, mft__jscope *scope, mft__jvalue caller)
{
    mft__jvalue v = mft__jinja_eval(r, n->a, scope);
    mft__jargs  args = mft__jinja_args(r, n->b, scope);
    args.caller = caller;
    r->line = n->line;
    if (r->status) return v;
    if (n->kind == MFT__J_FILTER) return mft__jinja_apply_filter(r, n->text, n->bytes, v, &args);
    if (n->kind == MFT__J_TEST) return mft__v_bool(mft__jinja_apply_test(r, n->text, n->bytes, v, &args) != n->op);
    return mft__jinja_call(r, v, &args);
}

static mft__jvalue mft__jinja_eval(mft__jrun *r, int32_t i, mft__jscope *scope)
{
    const mft__jnode *n = mft__jinja_at_node(r, i);
    mft__jvalue v = mft__v_undefined(NULL, "", 0), w;
    if (!mft__jinja_spend(r, 1) || !mft__jinja_deeper(r)) return v;
    r->line = n->line;
    switch ((mft__jkind)n->kind) {
    case MFT__J_CONST:  v = n->op == 'n' ? mft__v_none() : mft__v_bool(n->op == 't'); break;
    case MFT__J_INT:    v = mft__v_int(n->i); break;
    case MFT__J_FLOAT:  v = mft__v_float(n->f); break;
    case MFT__J_STRING: v = mft__v_text(n->text, n->bytes); break;
    case MFT__J_NAME:   v = mft__jinja_name(r, scope, n->text, n->bytes); break;
    case MFT__J_CAPTURED: v = mft__jinja_name(r, scope, "", 0); break;
    case MFT__J_LIST: case MFT__J_TUPLE: case MFT__J_DICT: v = mft__jinja_eval_list(r, n, scope); break;
    case MFT__J_ATTR:
        v = mft__jinja_eval(r, n->a, scope);
        r->line = n->line;
        if (!r->status) v = mft__jinja_attribute(r, v, n->text, n->bytes);
        break;
    case MFT__J_ITEM:    v = mft__jinja_eval_item(r, n, scope); break;
    case MFT__J_CALL: case MFT__J_FILTER: case MFT__J_TEST: v = mft__jinja_eval_call(r, n, scope, v); break;
    case MFT__J_NOT:     v = mft__v_bool(!mft__jinja_truth(mft__jinja_eval(r, n->a, scope))); break;
    case MFT__J_NEG: case MFT__J_POS:
        v = mft__jinja_eval(r, n->a, scope);
        if (!r->status) v = mft__jinja_is_number(v) ? mft__jinja_arithmetic(r, n->kind == MFT__J_NEG ? '-' : '+', mft__jinja_is_integer(v) ? mft__v_int(0) : mft__v_float(n->kind == MFT__J_NEG ? 0.0 : -0.0), v) : mft__jinja_no_number(r, v);
        break;
    case MFT__J_AND:     v = mft__jinja_eval(r, n->a, scope); if (mft__jinja_truth(v))  v = mft__jinja_eval(r, n->b, scope); break;
    case MFT__J_OR:      v = mft__jinja_eval(r, n->a, scope); if (!mft__jinja_truth(v)) v = mft__jinja_eval(r, n->b, scope); break;
    case MFT__J_BINARY:
        v = mft__jinja_eval(r, n->a, scope);
        w = mft__jinja_eval(r, n->b, scope);
        r->line = n->line;
        v = mft__jinja_arithmetic(r, n->op, v, w);
        break;
    case MFT__J_COMPARE: v = mft__jinja_eval_compare(r, n, scope); break;
    case MFT__J_COND:
        if (mft__jinja_truth(mft__jinja_eval(r, n->b, scope))) v = mft__jinja_eval(r, n->a, scope);
        else if (n->c) v = mft__jinja_eval(r, n->c, scope);
        else v = mft__v_undefined(NULL, "the else of an if", 17);
        break;
    default: break;                                             /* no other kind is an expression */
    }
    r->depth--;
    return v;
}

/* ---- statements ---- */
static void mft__jinja_assign(mft__jrun *r, int32_t target, mft__jscope *scope, mft__jvalue v)
{
    const mft__jnode *n = mft__jinja_at_node(r, target);
    if (r->status) return;
    if (n->kind == MFT__J_NAME) mft__jinja_set(r, scope, n->text, n->bytes, v);
    else if (n->kind == MFT__J_ATTR) {
        mft__jvalue space = mft__jinja_eval(r, n->a, scope);
        if (r->status) return;
        if (space.type != MFT__V_NAMESPACE) { mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "'.%.*s' can only be set of a namespace, not of a %s", MFT__CUT(n->bytes), n->text, mft__jinja_type_name(space)); return; }
        mft__jinja_put_pair(r, space.u.dict, mft__v_text(n->text, n->bytes), v);
    } else {
        const mft__jlist *list = mft__jinja_iterate(r, v);
        size_t            i = 0;
        int32_t           k = n->a;
        for (; k && i < list->n && !r->status; k = mft__jinja_at_node(r, k)->next) mft__jinja_assign(r, k, scope, list->items[i++]);
        if (!r->status && (k || i < list->n)) mft__jinja_fail(r, MFT_ERR_UNSUPPORTED, "%llu values for another number of names", (unsigned long long)list->n);
    }
}

typedef enum mft__jflow { MFT__FLOW_ON, MFT__FLOW_BREAK, MFT__FLOW_CONTINUE } mft__jflow;

/* A scope for the next turn of a loop, empty, so that what a turn sets ends with it: the last turn's if
 * nothing can see that any more, which keeps a long loop from taking memory. */
static mft__jscope *mft__jinja_turn(mft__jrun *r, mft__jscope *last, mft__jscope *parent, int *closures)
{
    mft__jvar *var;
    if (!mft__jinja_spend(r, 1)) return NULL;                   /* also when its body is empty */
    if (!last || r->closures != *closures) { *closures = r->closures; return mft__jinja_scope(r, parent); }
    while ((var = last->vars) != NULL) { last->vars = var->next; var->next = r->spare; r->spare = var; }
    return last;
}

static void mft__jinja_exec_for(mft__jrun *r, const mft__jnode *n, mft__jscope *scope)
{
    mft__jvalue       v = mft__jinja_eval(r, n->b, scope), loop = mft__v_none();
    const mft__jlist *list = r->status ? NULL : mft__jinja_iterate(r, v);
    mft__jlist        kept;
    mft__jloop       *l;
    mft__jscope      *s = NULL;
    size_t            i;
    int               closures = 0;

    if (r->status) return;
    kept = *list;
    if (n->c) {                                                 /* what the condition lets through, so that loop.length is right */
        kept.items = (mft__jvalue *)mft__jinja_alloc(r, list->n * sizeof *kept.items);
        kept.n = 0;
        for (i = 0; i < list->n && !r->status; i++) {
            s = mft__jinja_turn(r, s, scope, &closures);
            if (s) mft__jinja_assign(r, n->a, s, list->items[i]);
            if (!r->status && mft__jinja_truth(mft__jinja_eval(r, n->c, s)) && !r->status) kept.items[kept.n++] = list->items[i];
        }
    }
    l = (mft__jloop *)mft__jinja_alloc(r, sizeof *l);
    if (!l) return;
    l->items = kept.items; l->n = kept.n; l->index = 0;
    loop.type = MFT__V_LOOP; loop.u.loop = l;
    for (; l->index < l->n && !r->status; l->index++) {
        s = mft__jinja_turn(r, s, scope, &closures);
        if (!s) break;
        mft__jinja_set(r, s, "loop", 4, loop);
        mft__jinja_assign(r, n->a, s, l->items[l->index]);
        if (mft__jinja_exec(r, n->d, s) == MFT__FLOW_BREAK) break;
    }
    if (!l->n && n->e && !r->status) mft__jinja_exec(r, n->e, scope);
}

/* A block's text through its filters. */
static mft__jvalue mft__jinja_filtered(mft__jrun *r, const mft__jnode *n, mft__jscope *scope)
{
    mft__jscope *s = mft__jinja_scope(r, scope), *names = mft__jinja_scope(r, scope);
    if (!s || !names) return mft__v_none();
    mft__jinja_set(r, names, "", 0, mft__jinja_capture(r, n->c, s));
    return mft__jinja_eval(r, n->b, names);
}

static void mft__jinja_exec_call_block(mft__jrun *r, const mft__jnode *n, mft__jscope *scope)
{
    mft__jmacro *m = (mft__jmacro *)mft__jinja_alloc(r, sizeof *m);
    mft__jvalue  caller = mft__v_none(), out;
    if (!m) return;
    m->node = n; m->scope = scope;
    r->closures++;
    caller.type = MFT__V_MACRO; caller.u.macro = m;
    out = mft__jinja_eval_call(r, mft__jinja_at_node(r, n->b), scope, caller);
    if (!r->status) mft__jinja_put_value(r, out, 0);
}

static void mft__jinja_mark(mft__jrun *r, size_t begin, size_t end)
{
    mft__chat_text *out = r->out;
    void           *p = out->spans;
    if (r->captures) { r->marks_lost = 1; return; }             /* the text may still go anywhere */
    if (begin == end || r->status) return;
    if (!mft__grow(r->ctx, &p, &out->span_cap, out->n_spans + 1, sizeof *out->spans)) { r->status = MFT_ERR_OUT_OF_MEMORY; return; }
    out->spans = (mft_chat_span *)p;
    out->spans[out->n_spans].begin = (int64_t)begin;
    out->spans[out->n_spans].end   = (int64_t)end;
    out->n_spans++;
}

static int mft__jinja_exec_one(mft__jrun *r, const mft__jnode *n, mft__jscope *scope)
{
    mft__jscope *s;
    mft__jvalue  v;
    mft__jmacro *m;
    int32_t      k;
    switch ((mft__jkind)n->kind) {
    case MFT__J_TEXT:   mft__jinja_put(r, n->text, n->bytes); break;
    case MFT__J_OUTPUT: v = mft__jinja_eval(r, n->a, scope); r->line = n->line; if (!r->status) mft__jinja_put_value(r, v, 0); break;
    case MFT__J_IF:
        for (k = n->a; k && !r->status; k = mft__jinja_at_node(r, k)->next) {
            const mft__jnode *branch = mft__jinja_at_node(r, k);
            if (!branch->a || mft__jinja_truth(mft__jinja_eval(r, branch->a, scope))) return mft__jinja_exec(r, branch->b, scope);
        }
        break;
    case MFT__J_FOR: mft__jinja_exec_for(r, n, scope); break;
    case MFT__J_SET: v = mft__jinja_eval(r, n->b, scope); r->line = n->line; mft__jinja_assign(r, n->a, scope, v); break;
    case MFT__J_SET_BLOCK: v = mft__jinja_filtered(r, n, scope); mft__jinja_assign(r, n->a, scope, v); break;
    case MFT__J_FILTER_BLOCK: v = mft__jinja_filtered(r, n, scope); if (!r->status) mft__jinja_put_value(r, v, 0); break;
    case MFT__J_MACRO:
        m = (mft__jmacro *)mft__jinja_alloc(r, sizeof *m);
        if (!m) break;
        m->node = n; m->scope = scope;
        r->closures++;
        v = mft__v_none();
        v.type = MFT__V_MACRO; v.u.macro = m;
        mft__jinja_set(r, scope, n->text, n->bytes, v);
        break;
    case MFT__J_CALL_BLOCK: mft__jinja_exec_call_block(r, n, scope); break;
    case MFT__J_WITH:
        s = mft__jinja_scope(r, scope);
        for (k = n->a; k && !r->status; k = mft__jinja_at_node(r, k)->next)      /* values see what is outside only */
            mft__jinja_assign(r, mft__jinja_at_node(r, k)->a, s, mft__jinja_eval(r, mft__jinja_at_node(r, k)->b, scope));
        return s ? mft__jinja_exec(r, n->c, s) : MFT__FLOW_ON;
    case MFT__J_GENERATION: {
        size_t begin = mft__jinja_open(r);
        s = mft__jinja_scope(r, scope);
        if (s) mft__jinja_exec(r, n->c, s);
        mft__jinja_mark(r, begin, mft__jinja_open(r));
        break;
    }
    case MFT__J_BREAK:    return MFT__FLOW_BREAK;
    case MFT__J_CONTINUE: return MFT__FLOW_CONTINUE;
    default: break;                                             /* no other kind is a statement */
    }
    return MFT__FLOW_ON;
}

/* The statements from `first` on; tells a loop whether it was left. */
static int mft__jinja_exec(mft__jrun *r, int32_t first, mft__jscope *scope)
{
    int flow = MFT__FLOW_ON;
    if (!mft__jinja_deeper(r)) return flow;
    for (; first && flow == MFT__FLOW_ON && mft__jinja_spend(r, 1); first = mft__jinja_at_node(r, first)->next) {
        r->line = mft__jinja_at_node(r, first)->line;
        flow = mft__jinja_exec_one(r, mft__jinja_at_node(r, first), scope);
    }
    r->depth--;
    return flow;
}

/* ---- a conversation as values ---- */

/* What is rendered of a conversation: its first n messages, one of them with another content. */
typedef struct mft__chat_part {
    size_t      n;
    size_t      replaced; const char *content;      /* content NULL: none is replaced */
    int         prompt;                             /* add_generation_prompt          */
} mft__chat_part;

static mft__jvalue mft__jinja_json(mft__jrun *r, const mft_json *node)
{
    mft__jvalue v = mft__v_none();
    size_t      i, n = mft_json_count(node);
    if (!node || !mft__jinja_spend(r, 1)) return v;
    switch (mft_json_type(node)) {
    case MFT_JSON_NULL:   return v;
    case MFT_JSON_BOOL:   return mft__v_bool(mft_json_bool(node, 0));
    case MFT_JSON_NUMBER: return mft__json_is_integer(node) ? mft__v_int(mft_json_integer(node, 0)) : mft__v_float(mft_json_number(node, 0));
    case MFT_JSON_STRING: v.u.s = mft_json_string(node, &v.n); v.type = MFT__V_STRING; return v;
    case MFT_JSON_ARRAY:  v = mft__v_list(r, MFT__L_LIST, n); break;
    case MFT_JSON_OBJECT: v = mft__v_dict(r, MFT__V_DICT); break;
    }
    if (!mft__jinja_deeper(r)) return v;
    for (i = 0; i < n && !r->status; i++) {
        const mft_json *child = mft_json_at(node, i, NULL);
        mft__jvalue     value = mft__jinja_json(r, child);
        if (r->status) break;
        if (v.type == MFT__V_LIST) v.u.list->items[i] = value;
        else mft__jinja_append_pair(r, v.u.dict, mft__v_text(child->key, child->key_bytes), value);   /* keys differ: JSON has seen to it */
    }
    r->depth--;
    return v;
}

/* A message's reasoning goes by three names; as Transformers does, templates find it under two. */
static mft__jvalue mft__chat_reasoning(mft__jrun *r, mft__jvalue message)
{
    static const char *const names[] = { "reasoning_content", "thinking", "reasoning" };
    mft__jvalue *found = NULL, out;
    size_t       i;
    for (i = 0; i < 3 && !(found && found->type != MFT__V_NONE); i++) found = mft__jinja_lookup(r, message.u.dict, mft__v_text(names[i], strlen(names[i])));
    if (!found || found->type == MFT__V_NONE || r->status) return message;
    out = mft__v_dict(r, MFT__V_DICT);
    if (r->status) return message;
    mft__jinja_put_named(r, out.u.dict, "thinking", *found);
    for (i = 0; i < message.u.dict->n; i++) mft__jinja_put_pair(r, out.u.dict, message.u.dict->pairs[i].key, message.u.dict->pairs[i].value);
    mft__jinja_put_named(r, out.u.dict, "reasoning_content", *found);
    return out;
}

/* The message with another content: a string, or one part of text where it was a list of parts. */
static void mft__chat_replace(mft__jrun *r, mft__jdict *message, const char *content)
{
    mft__jvalue *old = mft__jinja_lookup(r, message, mft__v_text("content", 7)), text = mft__v_text(content, strlen(content)), part, list;
    if (old && old->type == MFT__V_LIST) {
        part = mft__v_dict(r, MFT__V_DICT);
        list = mft__v_list(r, MFT__L_LIST, 1);
        if (r->status) return;
        mft__jinja_put_named(r, part.u.dict, "type", mft__v_text("text", 4));
        mft__jinja_put_named(r, part.u.dict, "text", text);
        list.u.list->items[0] = part;
        text = list;
    }
    mft__jinja_put_named(r, message, "content", text);
}

static mft__jvalue mft__chat_messages(mft__jrun *r, const mft_chat *chat, const mft__chat_part *part)
{
    mft__jvalue list = mft__v_list(r, MFT__L_LIST, part->n), message;
    size_t      i;
    for (i = 0; i < part->n && !r->status; i++) {
        if (chat->messages_json) {
            message = mft__jinja_json(r, mft_json_at(chat->messages_json, i, NULL));
            if (r->status) break;
            if (message.type != MFT__V_DICT) { mft__jinja_fail(r, MFT_ERR_FORMAT, "message %llu is no object", (unsigned long long)i + 1); break; }
            message = mft__chat_reasoning(r, message);
        } else {
            const mft_message *m = &chat->messages[i];
            if (!m->role || !m->content) { mft__jinja_fail(r, MFT_ERR_INVALID_ARGUMENT, "message %llu has no role or no content", (unsigned long long)i + 1); break; }
            message = mft__v_dict(r, MFT__V_DICT);
            if (r->status) break;
            mft__jinja_put_named(r, message.u.dict, "role", mft__v_text(m->role, strlen(m->role)));
            mft__jinja_put_named(r, message.u.dict, "content", mft__v_text(m->content, strlen(m->content)));
        }
        if (r->status) break;
        if (part->content && part->replaced == i) mft__chat_replace(r, message.u.dict, part->content);
        list.u.list->items[i] = message;
    }
    return list;
}

/* Renders a part of a conversation. On failure out is empty; its memory stays for the next rendering. */
static mft_status mft__jinja_render(const mft_chat_template *t, const mft_chat *chat, const mft__chat_part *part, mft__chat_text *out, int *out_marks_lost)
{
    static const char *const names[] = { "tools", "documents" };
    const mft_json *given[2];
    mft__jscope    *scope;
    mft__jrun       r;
    size_t          i;

    memset(&r, 0, sizeof r);
    r.ctx = t->ctx; r.t = t; r.now = chat->now; r.line = 1; r.out = out;
    out->bytes = out->n_spans = 0;
    scope = mft__jinja_scope(&r, NULL);
    if (scope) {
        for (i = 0; i < t->n_variables; i++)
            mft__jinja_set(&r, scope, t->variables[i].name, strlen(t->variables[i].name), mft__v_text(t->variables[i].value, strlen(t->variables[i].value)));
        mft__jinja_set(&r, scope, "messages", 8, mft__chat_messages(&r, chat, part));
        mft__jinja_set(&r, scope, "add_generation_prompt", 21, mft__v_bool(part->prompt));
        given[0] = chat->tools; given[1] = chat->documents;
        for (i = 0; i < 2; i++) mft__jinja_set(&r, scope, names[i], strlen(names[i]), mft__jinja_json(&r, given[i]));
        for (i = 0; i < mft_json_count(chat->variables); i++) {
            const mft_json *v = mft_json_at(chat->variables, i, NULL);
            if (v->key) mft__jinja_set(&r, scope, v->key, v->key_bytes, mft__jinja_json(&r, v));
        }
        mft__jinja_exec(&r, t->body, scope);
        mft__jinja_put(&r, "", 0);                              /* so that there is room for the NUL */
    }
    while (r.blocks) {
        mft__jblock *next = r.blocks->next;
        mft__free(t->ctx, r.blocks, r.blocks->bytes);
        r.blocks = next;
    }
    if (r.status) out->bytes = out->n_spans = 0;
    if (out->text) out->text[out->bytes] = '\0';
    if (out_marks_lost) *out_marks_lost = r.marks_lost;
    return r.status;
}

/* ---- which part is the assistant's ----
 *
 *   With F the whole rendering, P that of the messages before turn i with the prompt that opens an
 *   answer, E that of the messages up to it, and G the same with the prompt for one more:
 *     begin  the end of P, if F begins with P
 *     end    of what E, G and F have in common: a closing that only the last turn of a conversation
 *            has is not the turn's, nor is the opening of the next
 *   A template that shows a turn otherwise when it is not the last (Qwen3's reasoning) breaks that, as
 *   does one that opens answers with more than the turn will have, or that knows no prompt. Then the content
 *   is found by putting another word in its place, in F and in E: it is what they do not share with the
 *   renderings that have the word. What follows it is compared as before. */
static int mft__chat_is_assistant(const mft_chat *chat, size_t i)
{
    const char *role = chat->messages_json ? mft_json_string(mft_json_get(mft_json_at(chat->messages_json, i, NULL), "role"), NULL)
                                           : chat->messages[i].role;
    return role && strcmp(role, "assistant") == 0;
}

static size_t mft__chat_common(const char *a, size_t n, const char *b, size_t m)
{
    size_t i = 0;
    while (i < n && i < m && a[i] == b[i]) i++;
    return i;
}

static int mft__chat_begins_with(const mft__chat_text *x, const mft__chat_text *with)
{
    return with->bytes <= x->bytes && !memcmp(x->text, with->text, with->bytes);
}

/* The end of [begin, end) without a special token that is cut in the middle (when `cut`), and without blanks. */
static size_t mft__chat_tidy(const char *s, size_t begin, size_t end, int cut)
{
    size_t   k = end, n;
    uint32_t c;
    while (cut && k > begin && !mft__jinja_is_space((unsigned char)s[k - 1]) && s[k - 1] != '>' && s[k - 1] != ']') {
        k--;
        if (s[k] == '<' || s[k] == '[') { end = k; break; }
    }
    while (end > begin) {
        n = mft__jinja_char_before(s + begin, end - begin, &c);
        if (!mft__jinja_is_space(c)) break;
        end -= n;
    }
    return end;
}

static size_t mft__chat_common_end(const mft__chat_text *x, const mft__chat_text *y)
{
    size_t n = 0;
    while (n < x->bytes && n < y->bytes && x->text[x->bytes - 1 - n] == y->text[y->bytes - 1 - n]) n++;
    return n;
}

static mft_status mft__chat_turn_lost(const mft_chat_template *t, size_t i)
{
    return mft__fail(t->ctx, MFT_ERR_UNSUPPORTED, "chat template: the rendering of message %llu cannot be told from what is around it; "
                     "{%% generation %%} marks in the template would help", (unsigned long long)i + 1);
}

/* How much of the text stands behind the last `word`; -1: it is not there. */
static int64_t mft__chat_behind(const mft__chat_text *x, const char *word)
{
    int64_t n = (int64_t)strlen(word), hit = -1, last = -1;
    while ((hit = mft__jinja_find(x->text, x->bytes, (size_t)(hit + 1), word, (size_t)n)) >= 0) last = hit;
    return last < 0 ? -1 : (int64_t)x->bytes - last - n;
}

/* Renderings that are compared with the whole. */
typedef struct mft__chat_scratch { mft__chat_text with, without, prompted; } mft__chat_scratch;

/* The ends of what x and y have in common at the beginning and, behind that, where they are alike to the end. */
static size_t mft__chat_differ(const mft__chat_text *x, const mft__chat_text *y, size_t *out_end)
{
    size_t begin = mft__chat_common(x->text, x->bytes, y->text, y->bytes), same = mft__chat_common_end(x, y);
    *out_end = x->bytes - same > begin ? x->bytes - same : begin;
    return begin;
}

static mft_status mft__chat_turn(const mft_chat_template *t, const mft_chat *chat, const mft__chat_text *whole, const mft__chat_part *all,
                                 size_t i, const char *word, mft__chat_scratch *x, mft_chat_span *out)
{
    mft__chat_part part = *all;
    mft_status     s;
    size_t         begin = 0, end, closed, content, tail;
    int64_t        found, behind, own;
    int            opened, plain;

    part.n = i; part.prompt = 1;
    s = mft__jinja_render(t, chat, &part, &x->with, NULL);      /* a template may refuse so short a conversation */
    if (s != MFT_OK && s != MFT_ERR_UNSUPPORTED) return s;
    opened = s == MFT_OK && x->with.bytes && mft__chat_begins_with(whole, &x->with);
    if (opened) begin = x->with.bytes;

    part.n = i + 1;
    s = mft__jinja_render(t, chat, &part, &x->prompted, NULL);
    part.prompt = 0;
    if (s == MFT_OK) s = mft__jinja_render(t, chat, &part, &x->with, NULL);
    if (s != MFT_OK) return s;
    closed = mft__chat_common(x->with.text, x->with.bytes, x->prompted.text, x->prompted.bytes);
    plain  = opened && mft__chat_begins_with(whole, &x->with) && closed >= begin;
    if (plain && t->has_prompt) {
        out->begin = (int64_t)begin;
        out->end   = (int64_t)mft__chat_tidy(whole->text, begin, closed, closed < x->with.bytes);
        return MFT_OK;
    }

    part = *all; part.replaced = i; part.content = word;
    s = mft__jinja_render(t, chat, &part, &x->without, NULL);
    if (s != MFT_OK) return s;
    found = mft__jinja_find(x->without.text, x->without.bytes, 0, word, strlen(word));
    if (found < 0) {                                            /* a turn that shows no content, but perhaps calls tools */
        if (!plain) return mft__chat_turn_lost(t, i);
        out->begin = (int64_t)begin;
        out->end   = (int64_t)mft__chat_tidy(whole->text, begin, closed, closed < x->with.bytes);
        return MFT_OK;
    }
    end    = mft__chat_differ(whole, &x->without, &content);
    behind = mft__chat_behind(&x->without, word);
    if (!opened || !t->has_prompt) {
        begin = end < (size_t)found ? end : (size_t)found;
        if (begin < (size_t)found) begin = mft__chat_tidy(whole->text, 0, begin, 1);       /* the text before changes with the content */
    }
    if (content < begin) content = begin;

    part.n = i + 1; part.prompt = 0;
    s = mft__jinja_render(t, chat, &part, &x->without, NULL);
    if (s != MFT_OK) return s;
    mft__chat_differ(&x->with, &x->without, &tail);
    own = mft__chat_behind(&x->without, word);                  /* what closes the turn; what else is behind the word must not change with it */
    if (tail > closed || own < 0 || behind - own > (int64_t)(whole->bytes - content)) return mft__chat_turn_lost(t, i);
    end = mft__chat_common(x->with.text + tail, closed - tail, whole->text + content, whole->bytes - content);
    out->begin = (int64_t)begin;
    out->end   = (int64_t)mft__chat_tidy(whole->text, content, content + end, end < x->with.bytes - tail);
    return MFT_OK;
}

static void mft__chat_text_free(mft_context *ctx, mft__chat_text *x)
{
    mft__free(ctx, x->text, x->text_cap);
    mft__free(ctx, x->spans, x->span_cap * sizeof *x->spans);
    memset(x, 0, sizeof *x);
}

static mft_status mft__chat_by_turns(const mft_chat_template *t, const mft_chat *chat, const mft__chat_part *all, mft__chat_text *out)
{
    mft__chat_scratch x;
    mft_chat_span     span;
    mft_status        s = MFT_OK;
    char              word[] = "mft0turn";
    size_t            i;

    memset(&x, 0, sizeof x);
    while (word[3] < '9' && mft__jinja_find(out->text, out->bytes, 0, word, strlen(word)) >= 0) word[3]++;
    out->n_spans = 0;
    for (i = 0; i < all->n && s == MFT_OK; i++) {
        void *p;
        if (!mft__chat_is_assistant(chat, i)) continue;
        s = mft__chat_turn(t, chat, out, all, i, word, &x, &span);
        if (s != MFT_OK || span.begin == span.end) continue;
        p = out->spans;
        if (!mft__grow(t->ctx, &p, &out->span_cap, out->n_spans + 1, sizeof span)) { s = MFT_ERR_OUT_OF_MEMORY; break; }
        out->spans = (mft_chat_span *)p;
        out->spans[out->n_spans++] = span;
    }
    mft__chat_text_free(t->ctx, &x.with);
    mft__chat_text_free(t->ctx, &x.without);
    mft__chat_text_free(t->ctx, &x.prompted);
    return s;
}

/* Text, and the assistant's spans in it if they are wanted. *out: zero at first, freed with
 * mft__chat_text_free; empty on failure. */
static mft_status mft__chat_render(const mft_chat_template *t, const mft_chat *chat, int want_spans, mft__chat_text *out)
{
    mft__chat_part all;
    mft_status     s;
    int            lost = 0;

    memset(&all, 0, sizeof all);
    if (!t || !chat) return MFT_ERR_INVALID_ARGUMENT;
    if (t->broken) return mft__fail(t->ctx, t->broken, "%s", t->why);
    if (chat->n_messages < 0 || (chat->n_messages > 0 && !chat->messages && !chat->messages_json))
        return mft__fail(t->ctx, MFT_ERR_INVALID_ARGUMENT, "no messages");
    if (chat->messages_json && mft_json_type(chat->messages_json) != MFT_JSON_ARRAY)
        return mft__fail(t->ctx, MFT_ERR_FORMAT, "messages are not a JSON array");
    all.n      = chat->messages_json ? mft_json_count(chat->messages_json) : (size_t)chat->n_messages;
    all.prompt = (chat->flags & MFT_GENERATION_PROMPT) != 0;
    s = mft__jinja_render(t, chat, &all, out, &lost);
    if (s == MFT_OK && want_spans && (!t->has_marks || lost)) s = mft__chat_by_turns(t, chat, &all, out);
    if (s != MFT_OK) out->bytes = out->n_spans = 0;
    return s;
}

/* ---- templates ---- */
static const char *const mft__chat_builtins[][2] = {
    { "chatml",
      "{% for message in messages %}\n"
      "{{ '<|im_start|>' + message.role + '\\n' -}}\n"
      "{% if message.role == 'assistant' %}\n"
      "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}\n"
      "{% else %}\n"
      "{{ message.content + '<|im_end|>' -}}\n"
      "{% endif %}\n"
      "{{ '\\n' -}}\n"
      "{% endfor %}\n"
      "{% if add_generation_prompt %}\n"
      "{{ '<|im_start|>assistant\\n' -}}\n"
      "{% endif %}\n" },
    { "gemma",
      "{{ bos_token -}}\n"
      "{% set ns = namespace(system='') %}\n"
      "{% for message in messages %}\n"
      "{% if message.role == 'system' %}\n"
      "{% set ns.system = message.content + '\\n\\n' %}\n"
      "{% elif message.role == 'assistant' %}\n"
      "{{ '<start_of_turn>model\\n' -}}\n"
      "{% generation %}{{ message.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' -}}\n"
      "{% else %}\n"
      "{{ '<start_of_turn>' + message.role + '\\n' + ns.system + message.content | trim + '<end_of_turn>\\n' -}}\n"
      "{% set ns.system = '' %}\n"
      "{% endif %}\n"
      "{% endfor %}\n"
      "{% if add_generation_prompt %}\n"
      "{{ '<start_of_turn>model\\n' -}}\n"
      "{% endif %}\n" },
    { "llama3",
      "{{ bos_token -}}\n"
      "{% for message in messages %}\n"
      "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}\n"
      "{% if message.role == 'assistant' %}\n"
      "{% generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}\n"
      "{% else %}\n"
      "{{ message.content | trim + '<|eot_id|>' -}}\n"
      "{% endif %}\n"
      "{% endfor %}\n"
      "{% if add_generation_prompt %}\n"
      "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n"
      "{% endif %}\n" },
    { "llama2",
      "{% set ns = namespace(system='') %}\n"
      "{% for message in messages %}\n"
      "{% if message.role == 'system' %}\n"
      "{% set ns.system = '<<SYS>>\\n' + message.content | trim + '\\n<</SYS>>\\n\\n' %}\n"
      "{% elif message.role == 'assistant' %}\n"
      "{{ ' ' -}}\n"
      "{% generation %}{{ message.content | trim + ' ' + (eos_token or '</s>') }}{% endgeneration %}\n"
      "{% else %}\n"
      "{{ (bos_token or '<s>') + '[INST] ' + ns.system + message.content | trim + ' [/INST]' -}}\n"
      "{% set ns.system = '' %}\n"
      "{% endif %}\n"
      "{% endfor %}\n" },
    { "zephyr",
      "{% for message in messages %}\n"
      "{{ '<|' + message.role + '|>\\n' -}}\n"
      "{% if message.role == 'assistant' %}\n"
      "{% generation %}{{ message.content + (eos_token or '</s>') }}{% endgeneration %}\n"
      "{% else %}\n"
      "{{ message.content + (eos_token or '</s>') -}}\n"
      "{% endif %}\n"
      "{{ '\\n' -}}\n"
      "{% endfor %}\n"
      "{% if add_generation_prompt %}\n"
      "{{ '<|assistant|>\\n' -}}\n"
      "{% endif %}\n" }
};

MFT_API const char *mft_chat_template_builtin(const char *name)
{
    size_t i;
    for (i = 0; name && i < sizeof mft__chat_builtins / sizeof mft__chat_builtins[0]; i++)
        if (strcmp(name, mft__chat_builtins[i][0]) == 0) return mft__chat_builtins[i][1];
    return NULL;
}

static void mft__chat_template_destroy(void *self)
{
    mft_chat_template *t = (mft_chat_template *)self;
    mft_context       *ctx = t->ctx;
    size_t             i;
    mft__object_remove(&t->object);
    for (i = 0; i < t->n_variables; i++) { mft__strfree(ctx, t->variables[i].name); mft__strfree(ctx, t->variables[i].value); }
    mft__free(ctx, t->variables, t->variable_cap * sizeof *t->variables);
    mft__free(ctx, t->nodes, t->node_cap * sizeof *t->nodes);
    if (t->source) mft__free(ctx, t->source, t->bytes + 1);
    if (t->pool) mft__free(ctx, t->pool, t->bytes + 1);
    mft__free(ctx, t, sizeof *t);
}

MFT_API void mft_chat_template_destroy(mft_chat_template *t) { if (t) mft__chat_template_destroy(t); }

static mft_chat_template *mft__chat_template_new(mft_context *ctx)
{
    mft_chat_template *t = (mft_chat_template *)mft__alloc_zero(ctx, sizeof *t);
    if (!t) return NULL;
    t->ctx = ctx;
    mft__object_add(ctx, &t->object, mft__chat_template_destroy);
    return t;
}

MFT_API mft_status mft_chat_template_create(mft_context *ctx, const char *source, int64_t bytes, mft_chat_template **out)
{
    mft_chat_template *t;
    mft__jparser       p;
    char              *s, *pool;
    size_t             n, m = 0, i;

    if (out) *out = NULL;
    if (!ctx || !source || !out) return MFT_ERR_INVALID_ARGUMENT;
    n = bytes < 0 ? strlen(source) : (size_t)bytes;
    if (n > MFT__JINJA_MAX_SOURCE) return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "chat template: %llu bytes are more than %d", (unsigned long long)n, MFT__JINJA_MAX_SOURCE);

    for (i = 0; i < n; i++) m += !(source[i] == '\r' && i + 1 < n && source[i + 1] == '\n');
    if (n && (source[n - 1] == '\n' || source[n - 1] == '\r')) m--;    /* Jinja leaves out the last line end */
    s    = (char *)mft__alloc(ctx, m + 1);
    pool = (char *)mft__alloc(ctx, m + 1);
    t    = s && pool ? mft__chat_template_new(ctx) : NULL;
    if (!t) {
        if (s) mft__free(ctx, s, m + 1);
        if (pool) mft__free(ctx, pool, m + 1);
        return MFT_ERR_OUT_OF_MEMORY;
    }
    t->source = s; t->pool = pool; t->bytes = m;
    for (i = 0; m > 0; i++) {
        if (source[i] == '\r' && i + 1 < n && source[i + 1] == '\n') continue;
        *s++ = source[i] == '\r' ? '\n' : source[i];
        m--;
    }
    *s = '\0';

    memset(&p, 0, sizeof p);
    p.t = t; p.s = t->source; p.n = t->bytes; p.line = p.token_line = 1;
    mft__jinja_new(&p, MFT__J_CONST, 0, 0);                     /* number 0 means none */
    t->body = mft__jinja_body(&p, NULL);
    if (p.status) { mft__chat_template_destroy(t); return p.status; }
    *out = t;
    return MFT_OK;
}

MFT_API mft_status mft_chat_template_set(mft_chat_template *t, const char *name, const char *value)
{
    mft__chat_variable *v = NULL;
    char               *copy = NULL;
    void               *p;
    size_t              i;
    if (!t || !name) return MFT_ERR_INVALID_ARGUMENT;
    for (i = 0; i < t->n_variables; i++) if (strcmp(t->variables[i].name, name) == 0) v = &t->variables[i];
    if (value) { copy = mft__strdup(t->ctx, value); if (!copy) return MFT_ERR_OUT_OF_MEMORY; }
    if (v && !value) {
        mft__strfree(t->ctx, v->name); mft__strfree(t->ctx, v->value);
        *v = t->variables[--t->n_variables];
        return MFT_OK;
    }
    if (!value) return MFT_OK;
    if (v) { mft__strfree(t->ctx, v->value); v->value = copy; return MFT_OK; }
    p = t->variables;
    if (mft__grow(t->ctx, &p, &t->variable_cap, t->n_variables + 1, sizeof *t->variables)) {
        t->variables = (mft__chat_variable *)p;
        v = &t->variables[t->n_variables];
        v->name = mft__strdup(t->ctx, name);
        v->value = copy;
        if (v->name) { t->n_variables++; return MFT_OK; }
    }
    mft__strfree(t->ctx, copy);
    return MFT_ERR_OUT_OF_MEMORY;
}

MFT_API const char *mft_chat_template_source(const mft_chat_template *t) { return t && t->source ? t->source : ""; }

/* The special tokens of a tokenizer_config.json or special_tokens_map.json, which are strings or objects with
 * `content`; what is defined already stays. */
static mft_status mft__chat_special_tokens(mft_chat_template *t, const mft_json *config)
{
    size_t i, k, n = mft_json_count(config);
    for (i = 0; i < n; i++) {
        const mft_json *v = mft_json_at(config, i, NULL);
        const char     *text;
        int             known = 0;
        if (v->key && mft__jinja_same(v->key, v->key_bytes, "extra_special_tokens") && mft_json_type(v) == MFT_JSON_OBJECT) {
            mft_status s = mft__chat_special_tokens(t, v);      /* one level: objects in there have no such key */
            if (s != MFT_OK) return s;
            continue;
        }
        if (!v->key || v->key_bytes < 7 || memcmp(v->key + v->key_bytes - 6, "_token", 6) != 0) continue;
        text = mft_json_string(mft_json_type(v) == MFT_JSON_OBJECT ? mft_json_get(v, "content") : v, NULL);
        for (k = 0; k < t->n_variables; k++) known |= strcmp(t->variables[k].name, v->key) == 0;
        if (text && !known && mft_chat_template_set(t, v->key, text) != MFT_OK) return MFT_ERR_OUT_OF_MEMORY;
    }
    return MFT_OK;
}

/* The template's text in a tokenizer_config.json; NULL if it has none, with *out_why set if there are several. */
static const char *mft__chat_in_config(const mft_json *config, size_t *out_bytes, int *out_several)
{
    const mft_json *v = mft_json_get(config, "chat_template");
    size_t          i, n = mft_json_count(v);
    *out_several = 0;
    if (mft_json_type(v) == MFT_JSON_STRING) return mft_json_string(v, out_bytes);
    if (mft_json_type(v) == MFT_JSON_OBJECT) return mft_json_string(mft_json_get(v, "default"), out_bytes);
    for (i = 0; i < n; i++) {
        const char *name = mft_json_string(mft_json_get(mft_json_at(v, i, NULL), "name"), NULL);
        if (n == 1 || (name && strcmp(name, "default") == 0)) return mft_json_string(mft_json_get(mft_json_at(v, i, NULL), "template"), out_bytes);
    }
    *out_several = n > 0;
    return NULL;
}

/* Reads DIR/NAME as JSON if it is there. */
static mft_status mft__chat_load_json(mft_context *ctx, const char *dir, const char *name, mft_json **out)
{
    char      *path = mft__path_join(ctx, dir, name);
    mft_status s = MFT_OK;
    *out = NULL;
    if (!path) return MFT_ERR_OUT_OF_MEMORY;
    if (mft__file_exists(ctx, path)) s = mft_json_load(ctx, path, out);
    mft__strfree(ctx, path);
    return s;
}

static mft_status mft__chat_load(mft_context *ctx, const char *path, mft_chat_template **out, int *out_none)
{
    static const char *const maps[] = { "tokenizer_config.json", "special_tokens_map.json" };
    mft_json   *config[2] = { NULL, NULL };
    char       *jinja = NULL, *dir = NULL, *text = NULL;
    const char *source = NULL;
    size_t      text_bytes = 0, bytes = 0;
    mft_status  s;
    int         i, several = 0, is_dir;

    *out = NULL;
    *out_none = 0;
    s = mft__chat_load_json(ctx, path, maps[0], &config[0]);
    if (s != MFT_OK) return s;
    jinja = mft__path_join(ctx, path, "chat_template.jinja");
    if (!jinja) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
    is_dir = config[0] != NULL || mft__file_exists(ctx, jinja) || mft__file_kind(path) == MFT__DIRECTORY;
    dir = is_dir ? mft__strdup(ctx, path) : mft__path_dir(ctx, path);
    if (!dir) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
    for (i = 0; i < 2 && s == MFT_OK; i++) if (!config[i]) s = mft__chat_load_json(ctx, dir, maps[i], &config[i]);
    if (s != MFT_OK) goto done;

    if (!is_dir || mft__file_exists(ctx, jinja)) {
        s = mft__file_read_all(ctx, is_dir ? jinja : path, MFT__JINJA_MAX_SOURCE, &text, &text_bytes);
        if (s != MFT_OK) goto done;
        source = text; bytes = text_bytes;
    } else source = mft__chat_in_config(config[0], &bytes, &several);
    if (!source) {
        *out_none = !several;
        s = several ? mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: several chat templates, none of them named \"default\"", mft__path(path))
                    : mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)", mft__path(path));
        goto done;
    }
    s = mft_chat_template_create(ctx, source, (int64_t)bytes, out);
    for (i = 0; i < 2 && s == MFT_OK; i++) s = mft__chat_special_tokens(*out, config[i]);
    if (s != MFT_OK && *out) { mft_chat_template_destroy(*out); *out = NULL; }
done:
    if (text) mft__free(ctx, text, text_bytes + 1);
    if (jinja) mft__strfree(ctx, jinja);
    if (dir) mft__strfree(ctx, dir);
    mft_json_destroy(config[0]);
    mft_json_destroy(config[1]);
    return s;
}

MFT_API mft_status mft_chat_template_load(mft_context *ctx, const char *path, mft_chat_template **out)
{
    int none;
    if (out) *out = NULL;
    if (!ctx || !path || !out) return MFT_ERR_INVALID_ARGUMENT;
    return mft__chat_load(ctx, path, out, &none);
}

MFT_API int64_t mft_chat_template_render(const mft_chat_template *t, const mft_chat *chat, char *text, int64_t cap)
{
    mft__chat_text x;
    mft_status     s;
    int64_t        n;
    if (!t || !chat || cap < 0 || (cap > 0 && !text)) return MFT_ERR_INVALID_ARGUMENT;
    memset(&x, 0, sizeof x);
    s = mft__chat_render(t, chat, 0, &x);
    n = s == MFT_OK ? (int64_t)x.bytes : (int64_t)s;
    if (s == MFT_OK && cap > 0) memcpy(text, x.text, (size_t)(n < cap ? n + 1 : cap));
    mft__chat_text_free(t->ctx, &x);
    return n;
}

MFT_API int64_t mft_chat_template_spans(const mft_chat_template *t, const mft_chat *chat, mft_chat_span *spans, int64_t cap)
{
    mft__chat_text x;
    mft_status     s;
    int64_t        n;
    if (!t || !chat || cap < 0 || (cap > 0 && !spans)) return MFT_ERR_INVALID_ARGUMENT;
    memset(&x, 0, sizeof x);
    s = mft__chat_render(t, chat, 1, &x);
    n = s == MFT_OK ? (int64_t)x.n_spans : (int64_t)s;
    if (n > 0 && cap > 0) memcpy(spans, x.spans, (size_t)(n < cap ? n : cap) * sizeof *spans);
    mft__chat_text_free(t->ctx, &x);
    return n;
}

/* For mft_tokenizer_load: the template of its snapshot, owned by the tokenizer (not in the context's list); NULL if
 * there is none. One that cannot be used is no reason not to tokenize: it is kept, and rendering says why.
 * fails  OUT_OF_MEMORY */
static mft_status mft__chat_attach(mft_context *ctx, const char *snapshot_dir, mft_chat_template **out)
{
    int        none;
    mft_status s = mft__chat_load(ctx, snapshot_dir, out, &none);
    if (none || s == MFT_ERR_OUT_OF_MEMORY) return none ? MFT_OK : s;
    if (s != MFT_OK) {
        mft__log(ctx, MFT_LOG_WARNING, "%s", ctx->error);
        *out = mft__chat_template_new(ctx);
        if (!*out) return MFT_ERR_OUT_OF_MEMORY;
        (*out)->broken = s;
        snprintf((*out)->why, sizeof (*out)->why, "%.255s", ctx->error);
    }
    mft__object_remove(&(*out)->object);
    return MFT_OK;
}

MFT_API const mft_chat_template *mft_tokenizer_chat_template(const mft_tokenizer *tok) { return tok ? tok->chat : NULL; }

MFT_API int64_t mft_apply_chat_template(const mft_tokenizer *tok, const mft_message *messages, int n, int flags, char *text, int64_t cap)
{
    mft_chat chat;
    if (!tok) return MFT_ERR_INVALID_ARGUMENT;
    if (!tok->chat) return mft__fail(tok->ctx, MFT_ERR_UNSUPPORTED, "the tokenizer has no chat template");
    memset(&chat, 0, sizeof chat);
    chat.messages = messages; chat.n_messages = n; chat.flags = flags;
    return mft_chat_template_render(tok->chat, &chat, text, cap);
}

/* ==============================================================================
 * MARK: - [DATASET] From files to batches
 *
 *   in    files, texts, conversations, ids
 *   out   mft_batch
 *   rule  a sample is a record of 24 bytes that says where its tokens come from. Loading makes
 *         every sample's tokens once, to check and count them, and forgets them; a batch makes
 *         those of its rows again. Nothing else grows with the data, and that lies in tables,
 *         which are in memory or in files and do not care which.
 * ============================================================================== */

/* What a source is made of; for JSONL, what its lines are. */
typedef enum mft__source_kind {
    MFT__FROM_CALLS, MFT__FROM_TEXT, MFT__FROM_TOKENS, MFT__FROM_MMLU,
    MFT__FROM_JSONL,                        /* not known before the first line */
    MFT__FROM_INPUT_IDS, MFT__FROM_MESSAGES, MFT__FROM_COMPLETION, MFT__FROM_ALPACA, MFT__FROM_TEXTS
} mft__source_kind;

static const char *mft__source_name(mft__source_kind kind)
{
    switch (kind) {
    case MFT__FROM_CALLS:      return "added by calls";
    case MFT__FROM_TEXT:       return "text";
    case MFT__FROM_TOKENS:     return "tokens";
    case MFT__FROM_MMLU:       return "mmlu";
    case MFT__FROM_JSONL:      return "jsonl";
    case MFT__FROM_INPUT_IDS:  return "jsonl (input_ids)";
    case MFT__FROM_MESSAGES:   return "jsonl (messages)";
    case MFT__FROM_COMPLETION: return "jsonl (prompt, completion)";
    case MFT__FROM_ALPACA:     return "jsonl (instruction, output)";
    case MFT__FROM_TEXTS:      return "jsonl (text)";
    }
    return "?";
}

/* A file, or a place for ids without one. */
typedef struct mft__source {
    mft__source_kind kind;
    char      *path;                        /* NULL: MFT__FROM_CALLS                                     */
    uint64_t   bytes;                       /* of the file, when it was loaded                           */
} mft__source;

/* Records of one size, appended one after the other and read by number. */
typedef struct mft__table {
    size_t      size;                       /* bytes of a record                                         */
    uint64_t    n, n_filed;                 /* records; how many of them, the first, are in the file     */
    char       *tail;                       /* the others                                                */
    size_t      cap_tail;                   /* records                                                   */
    char       *path;                       /* of the file; NULL: there is none                          */
    mft__file   file;
    mft__writer writer;                     /* while it is made: all records go there                    */
    int         writing;
} mft__table;

typedef struct mft__sample {
    uint64_t at;                            /* held: its place in the corpus' ids; a line: byte offset; tokens: token offset */
    uint32_t bytes;                         /* of the line                                               */
    int32_t  n;                             /* tokens                                                    */
    int32_t  n_valid;                       /* labels that count                                         */
    unsigned source    : 28;
    unsigned held      : 1;
    unsigned labeled   : 1;                 /* held: its n labels follow its n ids                       */
    unsigned joined    : 1;                 /* of the same line as the sample before                     */
    unsigned truncated : 1;
} mft__sample;

enum { MFT__N_DATA_STRINGS = 7 };

/* A sample being made, before it is cut. */
typedef struct mft__document { int32_t *ids, *labels; size_t n, cap_ids, cap_labels; } mft__document;

/* What both sides of a split share. */
typedef struct mft__corpus {
    int              users;
    mft_context     *ctx;
    const mft_tokenizer *tok;
    mft_dataset_desc desc;                  /* defaults filled in; its strings are these                 */
    char            *strings[MFT__N_DATA_STRINGS];
    mft_chat_template *chat;                /* of desc; NULL: the tokenizer's                            */
    mft__source     *sources;
    size_t           n_sources, cap_sources;
    mft__table       ids;                   /* of held samples: int32_t                                  */
    mft__file        file;                  /* one at a time is open: that of source `open`              */
    size_t           open;                  /* n_sources and more: none                                  */
    const char      *where;                 /* what is being read, for messages; NULL: a call's          */
    int64_t          where_line;            /* 0: not known                                              */
    uint64_t         told;                  /* of the file being loaded, to on_load                      */
    mft__document    doc;
    int              doc_flags;             /* it was encoded with                                       */
    int32_t         *part;                  /* tokens of a part of its text                              */
    size_t           cap_part;
    char            *text;                  /* a prompt with its completion                              */
    size_t           n_text, cap_text;
    size_t           n_prompt;              /* bytes of it before the completion                         */
    mft__chat_text   rendered;              /* a conversation                                            */
    char            *line;                  /* of a file                                                 */
    size_t           cap_line;
} mft__corpus;

struct mft_dataset {
    mft__object      object;
    mft__corpus     *corpus;
    mft_dataset_info info;                  /* counted with every sample                                 */
    uint64_t         n_groups;              /* samples that are not joined to the one before             */
    mft__table       samples;               /* mft__sample                                               */
    mft__table       rows;                  /* uint64_t: row r takes order positions rows[r] .. rows[r+1]-1 */
    uint64_t         n_rows;
    int              packed;                /* rows are those of the samples                             */
    char            *index;                 /* path of its index files but for their last part; NULL: none */
    int              started;               /* a batch was given: no more splitting                      */
    int64_t          epoch, row;            /* of the next batch                                         */
    int32_t         *batch;                 /* five arrays of [batch, seq]                               */
    size_t           cap_batch;
};

/* ---- order ---- */

/* The streams of the seed; epochs count up from 0. */
static const uint64_t MFT__STREAM_PACK = 0xfffffffffffffff0u, MFT__STREAM_SPLIT = 0xfffffffffffffff1u;

/* Where i goes in the permutation of 0..n-1 that (seed, stream) names: six rounds of a Feistel network
 * on the next even number of bits (a bijection whatever the round function), taken again until the
 * value is below n, which keeps it a bijection (Black and Rogaway 2002, "Ciphers with arbitrary finite
 * domains"). No memory; up to four walks on average, more only below 64. */
static uint64_t mft__permute(uint64_t seed, uint64_t stream, uint64_t n, uint64_t i)
{
    int      half = 3, round;
    uint64_t mask;
    while (half < 31 && ((uint64_t)1 << 2 * half) < n) half++;
    mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (round = 0; round < 6; round++) {
            uint64_t next = left ^ (mft__random(seed, stream, (uint64_t)round << 32 | right) & mask);
            left = right; right = next;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

/* ---- tables: the index, in memory or in files ---- */

enum { MFT__INDEX_HEADER = 256, MFT__INDEX_VERSION = 1, MFT__TABLE_BLOCK = 1024 };

/* What a file of the index begins with; zeros up to MFT__INDEX_HEADER, then n records of `size` bytes. */
typedef struct mft__index_header {
    char     magic[8];                      /* "mftindex"                                                */
    uint64_t version, key;                  /* key: a hash of all that the records come from             */
    uint64_t n, size;
    uint64_t fingerprint, n_groups;         /* from here on: of samples only                             */
    int64_t  n_tokens, n_supervised, longest, n_truncated, n_unsupervised, n_bad_lines, max_id, kind;
    uint64_t check;                         /* a hash of all above                                       */
} mft__index_header;

static uint64_t mft__data_mix(uint64_t h, uint64_t x)
{
    h = (h ^ x) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 32;
}

static uint64_t mft__data_mix_bytes(uint64_t h, const void *bytes, size_t n)
{
    const char *p = (const char *)bytes;
    uint64_t    word;
    h = mft__data_mix(h, n);
    for (; n; p += 8, n -= n < 8 ? n : 8) {
        word = 0;
        memcpy(&word, p, n < 8 ? n : 8);
        h = mft__data_mix(h, word);
    }
    return h;
}

static void mft__table_free(mft_context *ctx, mft__table *t)
{
    size_t size = t->size;
    if (t->writing) mft__writer_abort(&t->writer);
    if (t->path) mft__file_close(&t->file);
    mft__strfree(ctx, t->path);
    mft__free(ctx, t->tail, t->cap_tail * size);
    memset(t, 0, sizeof *t);
    t->size = size;
}

static mft_status mft__table_put(mft_context *ctx, mft__table *t, const void *records, size_t n)
{
    size_t     have = (size_t)(t->n - t->n_filed);
    void      *p = t->tail;
    mft_status s = MFT_OK;
    if (t->writing) s = mft__writer_put(&t->writer, records, n * t->size);
    else {
        if (!mft__grow(ctx, &p, &t->cap_tail, have + n, t->size)) s = MFT_ERR_OUT_OF_MEMORY;
        t->tail = (char *)p;
        if (s == MFT_OK && n) memcpy(t->tail + have * t->size, records, n * t->size);
    }
    if (s == MFT_OK) t->n += n;
    return s;
}

/* Records i to i + n - 1, which there are. Not while it is written. */
static mft_status mft__table_get(mft__table *t, uint64_t i, size_t n, void *out)
{
    size_t     filed = i >= t->n_filed ? 0 : n < t->n_filed - i ? n : (size_t)(t->n_filed - i);
    mft_status s = filed ? mft__file_read(&t->file, MFT__INDEX_HEADER + i * t->size, out, filed * t->size) : MFT_OK;
    if (s == MFT_OK && n > filed)
        memcpy((char *)out + filed * t->size, t->tail + (size_t)(i + filed - t->n_filed) * t->size, (n - filed) * t->size);
    return s;
}

/* Keeps the first n records. */
static void mft__table_cut(mft__table *t, uint64_t n)
{
    if (t->writing && n < t->n) mft__writer_seek(&t->writer, MFT__INDEX_HEADER + n * t->size);
    if (t->n_filed > n) t->n_filed = n;
    t->n = n;
}

/* From now on the records of an empty table go to a file, which is there when mft__table_end succeeds. */
static mft_status mft__table_begin(mft_context *ctx, mft__table *t, const char *path)
{
    static const char zeros[MFT__INDEX_HEADER] = { 0 };
    mft_status        s = mft__writer_begin(ctx, path, &t->writer);
    t->writing = s == MFT_OK;
    return s == MFT_OK ? mft__writer_put(&t->writer, zeros, sizeof zeros) : s;
}

static uint64_t mft__index_check(const mft__index_header *h)
{
    return mft__data_mix_bytes(MFT__INDEX_VERSION, h, sizeof *h - sizeof h->check);
}

/* The file is complete, its key and what else the header says in h; the table reads from it. */
static mft_status mft__table_end(mft_context *ctx, mft__table *t, mft__index_header *h)
{
    char      *path = mft__strdup(ctx, t->writer.path);
    mft_status s;
    memcpy(h->magic, "mftindex", sizeof h->magic);
    h->version = MFT__INDEX_VERSION; h->n = t->n; h->size = t->size;
    h->check = mft__index_check(h);
    mft__writer_seek(&t->writer, 0);
    mft__writer_put(&t->writer, h, sizeof *h);
    if (!path) return MFT_ERR_OUT_OF_MEMORY;                    /* mft__table_free ends the writing */
    t->writing = 0;
    s = mft__writer_commit(&t->writer);
    if (s == MFT_OK) s = mft__file_open(ctx, path, &t->file);
    if (s != MFT_OK) { mft__strfree(ctx, path); return s; }
    t->path = path;
    t->n_filed = t->n;
    return MFT_OK;
}

/* An empty table takes the file of that key. 0: there is none. */
static int mft__table_find(mft_context *ctx, mft__table *t, const char *path, uint64_t key, mft__index_header *h)
{
    if (!mft__file_exists(ctx, path) || !(t->path = mft__strdup(ctx, path))) return 0;
    if (mft__file_open(ctx, t->path, &t->file) == MFT_OK) {
        if (t->file.bytes >= MFT__INDEX_HEADER && mft__file_read(&t->file, 0, h, sizeof *h) == MFT_OK
            && memcmp(h->magic, "mftindex", sizeof h->magic) == 0 && h->version == MFT__INDEX_VERSION && h->key == key
            && h->size == t->size && h->check == mft__index_check(h) && h->n <= (t->file.bytes - MFT__INDEX_HEADER) / t->size) {
            t->n = t->n_filed = h->n;
            return 1;
        }
        mft__file_close(&t->file);
    }
    mft__strfree(ctx, t->path);
    t->path = NULL;
    return 0;
}

static mft_status mft__table_damaged(mft_context *ctx, const mft__table *t, uint64_t i)
{
    return mft__fail(ctx, MFT_ERR_FORMAT, "%s: record %llu cannot be: this file is damaged; remove it, and it is made anew",
                     mft__path(t->path), (unsigned long long)i);
}

/* a followed by b; freed with mft__strfree. */
static char *mft__text_join(mft_context *ctx, const char *a, const char *b)
{
    size_t n = strlen(a), m = strlen(b);
    char  *p = (char *)mft__alloc(ctx, n + m + 1);
    if (!p) return NULL;
    memcpy(p, a, n);
    memcpy(p + n, b, m + 1);
    return p;
}

/* mft__table_find and mft__table_begin for the file whose path is base and end. */
static int mft__index_find(mft_context *ctx, mft__table *t, const char *base, const char *end, uint64_t key, mft__index_header *h)
{
    char *path = mft__text_join(ctx, base, end);
    int   found = path && mft__table_find(ctx, t, path, key, h);
    mft__strfree(ctx, path);
    return found;
}

static mft_status mft__index_begin(mft_context *ctx, mft__table *t, const char *base, const char *end)
{
    char      *path = mft__text_join(ctx, base, end);
    mft_status s = path ? mft__table_begin(ctx, t, path) : MFT_ERR_OUT_OF_MEMORY;
    mft__strfree(ctx, path);
    return s;
}

/* ---- sources ---- */
static void mft__source_shut(mft__corpus *c)
{
    if (c->open != (size_t)-1) mft__file_close(&c->file);
    c->open = (size_t)-1;
}

/* Opens the file of a source. */
static mft_status mft__source_open(mft__corpus *c, size_t source)
{
    mft__source *src = &c->sources[source];
    mft_status   s;
    if (c->open == source) return MFT_OK;
    mft__source_shut(c);
    s = mft__file_open(c->ctx, src->path, &c->file);
    if (s == MFT_OK) c->open = source;
    return s;
}

/* Forgets the sources from number n on. */
static void mft__sources_cut(mft__corpus *c, size_t n)
{
    if (c->open != (size_t)-1 && c->open >= n) mft__source_shut(c);
    while (c->n_sources > n) {
        mft__strfree(c->ctx, c->sources[--c->n_sources].path);
    }
}

static void mft__corpus_release(mft__corpus *c)
{
    mft_context *ctx = c->ctx;
    size_t       i;
    if (--c->users) return;
    mft__sources_cut(c, 0);
    mft__source_shut(c);
    mft__table_free(ctx, &c->ids);
    for (i = 0; i < MFT__N_DATA_STRINGS; i++) mft__strfree(ctx, c->strings[i]);
    mft_chat_template_destroy(c->chat);
    mft__chat_text_free(ctx, &c->rendered);
    mft__free(ctx, c->sources, c->cap_sources * sizeof *c->sources);
    mft__free(ctx, c->doc.ids, c->doc.cap_ids * sizeof *c->doc.ids);
    mft__free(ctx, c->doc.labels, c->doc.cap_labels * sizeof *c->doc.labels);
    mft__free(ctx, c->part, c->cap_part * sizeof *c->part);
    mft__free(ctx, c->text, c->cap_text);
    mft__free(ctx, c->line, c->cap_line);
    mft__free(ctx, c, sizeof *c);
}

/* A new last source; NULL with the sentence set. path is copied. */
static mft__source *mft__source_add(mft__corpus *c, mft__source_kind kind, const char *path)
{
    mft__source *src;
    void        *p = c->sources;
    if (!mft__grow(c->ctx, &p, &c->cap_sources, c->n_sources + 1, sizeof *c->sources)) return NULL;
    c->sources = (mft__source *)p;
    src = &c->sources[c->n_sources];
    memset(src, 0, sizeof *src);
    src->kind = kind;
    if (path && !(src->path = mft__strdup(c->ctx, path))) return NULL;
    c->n_sources++;
    return src;
}

/* ---- making and ending ---- */
static void mft__dataset_end(void *self)
{
    mft_dataset *ds  = (mft_dataset *)self;
    mft_context *ctx = ds->corpus->ctx;
    mft__object_remove(&ds->object);
    mft__table_free(ctx, &ds->samples);
    mft__table_free(ctx, &ds->rows);
    mft__strfree(ctx, ds->index);
    mft__free(ctx, ds->batch, ds->cap_batch * sizeof *ds->batch);
    mft__corpus_release(ds->corpus);
    mft__free(ctx, ds, sizeof *ds);
}

/* An empty dataset over a corpus. NULL with the sentence set. */
static mft_dataset *mft__dataset_over(mft__corpus *c)
{
    mft_dataset *ds = (mft_dataset *)mft__alloc_zero(c->ctx, sizeof *ds);
    if (!ds) return NULL;
    ds->corpus = c;
    ds->info.max_id = -1;
    ds->samples.size = sizeof(mft__sample);
    ds->rows.size    = sizeof(uint64_t);
    c->users++;
    mft__object_add(c->ctx, &ds->object, mft__dataset_end);
    return ds;
}

MFT_API void mft_dataset_destroy(mft_dataset *ds) { if (ds) mft__dataset_end(ds); }

/* The template of desc, with the tokenizer's special tokens. */
static mft_status mft__corpus_template(mft__corpus *c)
{
    static const char *const names[3] = { "bos_token", "eos_token", "pad_token" };
    mft_status s = mft_chat_template_create(c->ctx, c->desc.chat_template, -1, &c->chat);
    int        i;
    if (s == MFT_OK) mft__object_remove(&c->chat->object);      /* it ends with the corpus, not with the context */
    for (i = 0; i < 3 && s == MFT_OK && c->tok; i++) {
        char    token[256];
        int32_t id = i == 0 ? mft_tokenizer_bos_id(c->tok) : i == 1 ? mft_tokenizer_eos_id(c->tok) : mft_tokenizer_pad_id(c->tok);
        int64_t n  = id < 0 ? -1 : mft_tokenizer_id_to_token(c->tok, id, token, (int64_t)sizeof token - 1);
        if (n < 0 || n >= (int64_t)sizeof token) continue;
        token[n] = '\0';
        s = mft_chat_template_set(c->chat, names[i], token);
    }
    return s;
}

MFT_API mft_status mft_dataset_create(mft_context *ctx, const mft_tokenizer *tok, const mft_dataset_desc *desc, mft_dataset **out)
{
    static const char *const defaults[MFT__N_DATA_STRINGS] = { NULL, "train", "text", "prompt", "completion", "messages", NULL };
    mft__corpus *c;
    mft_dataset *ds = NULL;
    const char **strings[MFT__N_DATA_STRINGS];
    mft_status   s = MFT_OK;
    int          i;

    if (out) *out = NULL;
    if (!ctx || !out) return MFT_ERR_INVALID_ARGUMENT;
    if (desc && (desc->max_seq_len < 0 || desc->max_seq_len == 1 || desc->max_seq_len > 1 << 24))
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "max_seq_len is %d, not 2 to %d", desc->max_seq_len, 1 << 24);
    if (desc && desc->split && strcmp(desc->split, "train") != 0 && strcmp(desc->split, "valid") != 0 && strcmp(desc->split, "test") != 0)
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "split is '%.40s', not train, valid or test", desc->split);
    if (desc && ((unsigned)desc->format > (unsigned)MFT_DATA_TOKENS || desc->vocab_size < 0))
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "format %d, vocab_size %lld: no such thing", (int)desc->format, (long long)desc->vocab_size);
    if (desc && desc->train_on_prompt && desc->assistant_loss_only)
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "train_on_prompt and assistant_loss_only contradict each other");

    c = (mft__corpus *)mft__alloc_zero(ctx, sizeof *c);
    if (!c) return MFT_ERR_OUT_OF_MEMORY;
    c->ctx = ctx; c->tok = tok; c->open = (size_t)-1;
    if (desc) c->desc = *desc;
    c->ids.size = sizeof(int32_t);
    if (!c->desc.max_seq_len) c->desc.max_seq_len = 256;
    if (!c->desc.index_above) c->desc.index_above = (uint64_t)16 << 20;
    if (!c->desc.now) c->desc.now = (int64_t)time(NULL);
    strings[0] = &c->desc.chat_template;  strings[1] = &c->desc.split;          strings[2] = &c->desc.text_key;
    strings[3] = &c->desc.prompt_key;     strings[4] = &c->desc.completion_key; strings[5] = &c->desc.messages_key;
    strings[6] = &c->desc.index_dir;
    ds = mft__dataset_over(c);
    if (!ds) { mft__free(ctx, c, sizeof *c); return MFT_ERR_OUT_OF_MEMORY; }
    for (i = 0; i < MFT__N_DATA_STRINGS && s == MFT_OK; i++) {
        const char *text = *strings[i] ? *strings[i] : defaults[i];
        if (text && !(c->strings[i] = mft__strdup(ctx, text))) s = MFT_ERR_OUT_OF_MEMORY;
        *strings[i] = c->strings[i];
    }
    if (s == MFT_OK && c->desc.chat_template) s = mft__corpus_template(c);
    if (s != MFT_OK) { mft_dataset_destroy(ds); return s; }
    *out = ds;
    return MFT_OK;
}

/* ---- messages ---- */

/* The sentence so far gets its place in front: "PATH: line 7: ". */
static mft_status mft__place_error(mft__corpus *c, mft_status status)
{
    char text[sizeof c->ctx->error];
    memcpy(text, c->ctx->error, sizeof text);
    if (!c->where)         return status;
    if (c->where_line > 0) return mft__fail(c->ctx, status, "%s: line %lld: %s", mft__path(c->where), (long long)c->where_line, text);
    return mft__fail(c->ctx, status, "%s: %s", mft__path(c->where), text);
}

/* mft__fail with the place of what is being read in front. */
static mft_status mft__data_fail(mft__corpus *c, mft_status status, const char *format, ...) MFT__PRINTF(3, 4);
static mft_status mft__data_fail(mft__corpus *c, mft_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(c->ctx->error, sizeof c->ctx->error, format, args);
    va_end(args);
    return mft__place_error(c, status);
}

/* Moves line and column from the place p to the place end. */
static void mft__data_column(const char *p, const char *end, int64_t *line, int64_t *column)
{
    for (; p < end; p++) {
        if (*p == '\n') { ++*line; *column = 1; }
        else *column += ((unsigned char)*p & 0xc0) != 0x80;     /* characters, not bytes */
    }
}

static mft_status mft__data_not_utf8(mft__corpus *c, int64_t line, int64_t column, char bad)
{
    c->where_line = 0;
    return mft__data_fail(c, MFT_ERR_FORMAT, "line %lld, column %lld: not UTF-8: byte 0x%02x%s", (long long)line, (long long)column,
                          (unsigned)(unsigned char)bad, bad ? "" : " (is this a file of token ids? say so by its format)");
}

/* Bytes that are not UTF-8 are named by line and column; `line` is the first line of text. */
static mft_status mft__data_utf8(mft__corpus *c, const char *text, size_t bytes, int64_t line)
{
    const char *bad = mft__utf8_check(text, bytes);
    int64_t     column = 1;
    if (!bad) return MFT_OK;
    mft__data_column(text, bad, &line, &column);
    return mft__data_not_utf8(c, line, column, *bad);
}

/* Says how far a file is loaded. Nonzero: it is cancelled, the sentence is set. */
static int mft__data_loading(mft__corpus *c, uint64_t at)
{
    if (c->desc.on_load && at - c->told >= (uint64_t)1 << 20) {
        c->told = at;
        c->desc.on_load(c->desc.user, at, c->file.bytes);
    }
    if (!mft__cancelled(c->ctx)) return 0;
    mft__fail(c->ctx, MFT_ERR_CANCELLED, "cancelled");
    return 1;
}

/* ---- documents: a sample before it is cut ---- */
static int mft__doc_room(mft__corpus *c, size_t need)
{
    mft__document *d = &c->doc;
    void          *ids = d->ids, *labels = d->labels;
    int            ok = mft__grow(c->ctx, &ids, &d->cap_ids, need, sizeof *d->ids);
    d->ids = (int32_t *)ids;
    if (ok) ok = mft__grow(c->ctx, &labels, &d->cap_labels, need, sizeof *d->labels);
    d->labels = (int32_t *)labels;
    return ok;
}

static mft_status mft__text_put(mft__corpus *c, const char *s, size_t bytes)
{
    void *p = c->text;
    int   ok = mft__grow(c->ctx, &p, &c->cap_text, c->n_text + bytes, 1);
    c->text = (char *)p;
    if (!ok) return MFT_ERR_OUT_OF_MEMORY;
    if (bytes) memcpy(c->text + c->n_text, s, bytes);
    c->n_text += bytes;
    return MFT_OK;
}

static mft_status mft__text_puts(mft__corpus *c, const char *s) { return mft__text_put(c, s, strlen(s)); }

/* The tokens of text into a growing array. */
static mft_status mft__ids_of(mft__corpus *c, const char *text, size_t bytes, int flags, int32_t **ids, size_t *cap, size_t *out_n)
{
    int64_t n, need = (int64_t)(bytes / 4) + 16;
    if (!c->tok) return mft__data_fail(c, MFT_ERR_INVALID_ARGUMENT, "text needs a tokenizer, and this dataset was made without one: it comes with a model, as tokenizer.json in its directory");
    for (;;) {
        void *p = *ids;
        int   ok = mft__grow(c->ctx, &p, cap, (size_t)need, sizeof **ids);
        *ids = (int32_t *)p;
        if (!ok) return MFT_ERR_OUT_OF_MEMORY;
        n = mft_tokenizer_encode(c->tok, text, (int64_t)bytes, flags, *ids, (int64_t)*cap);
        if (n < 0) return mft__place_error(c, (mft_status)n);
        if (n <= (int64_t)*cap) break;
        need = n;
    }
    *out_n = (size_t)n;
    return MFT_OK;
}

static mft_status mft__doc_encode(mft__corpus *c, const char *text, size_t bytes, int flags)
{
    mft_status s = mft__ids_of(c, text, bytes, flags, &c->doc.ids, &c->doc.cap_ids, &c->doc.n);
    return s != MFT_OK || mft__doc_room(c, c->doc.n) ? s : MFT_ERR_OUT_OF_MEMORY;
}

/* The end-of-sequence token, unless the document already ends with it or there is none. */
static mft_status mft__doc_eos(mft__corpus *c)
{
    mft__document *d = &c->doc;
    int32_t        eos = mft_tokenizer_eos_id(c->tok);
    if (eos < 0 || (d->n && d->ids[d->n - 1] == eos)) return MFT_OK;
    if (!mft__doc_room(c, d->n + 1)) return MFT_ERR_OUT_OF_MEMORY;
    d->ids[d->n] = d->labels[d->n] = eos;
    d->n++;
    return MFT_OK;
}

/* doc = a text that is all trained on. */
static mft_status mft__doc_text(mft__corpus *c, const char *text, size_t bytes)
{
    mft_status s = mft__doc_encode(c, text, bytes, 0);
    if (s == MFT_OK && c->desc.add_eos) s = mft__doc_eos(c);
    if (s != MFT_OK) return s;
    if (c->doc.n) memcpy(c->doc.labels, c->doc.ids, c->doc.n * sizeof *c->doc.ids);
    return MFT_OK;
}

/* How many of the document's tokens stand before byte `at` of its text; *out_across: the next one has characters on
 * both sides. What is left and right of `at` decides about tokens near it, so encodings are compared: of the stretch
 * since the last cut that was clean, which in most texts is the answer, else of all before `at`. */
typedef struct mft__cut { size_t byte, token; } mft__cut;
static mft_status mft__tokens_before(mft__corpus *c, const char *text, size_t at, mft__cut *clean, size_t *out_n, int *out_across)
{
    const int32_t *ids = c->doc.ids;
    size_t         left = c->doc.n - clean->token, n, same;
    mft_status     s = mft__ids_of(c, text + clean->byte, at - clean->byte, MFT_NO_ADD_SPECIAL, &c->part, &c->cap_part, &n);
    *out_across = 0;
    if (s != MFT_OK) return s;
    if (n <= left && memcmp(c->part, ids + clean->token, n * sizeof *ids) == 0) {
        clean->byte = at; clean->token += n;
        *out_n = clean->token;
        return MFT_OK;
    }
    s = mft__ids_of(c, text, at, c->doc_flags, &c->part, &c->cap_part, &n);
    if (s != MFT_OK) return s;
    if (!(c->doc_flags & MFT_NO_ADD_SPECIAL)) n -= (size_t)c->tok->n_after;
    for (same = 0; same < n && same < c->doc.n && c->part[same] == ids[same]; same++) {}
    *out_n = same; *out_across = same < n;
    if (same == n) { clean->byte = at; clean->token = same; }
    return MFT_OK;
}

/* doc = a text of which the spans are trained on: tokens whose characters overlap one. */
static mft_status mft__doc_spans(mft__corpus *c, const char *text, size_t bytes, int flags, const mft_chat_span *spans, size_t n_spans)
{
    mft__document *d = &c->doc;
    mft__cut       clean;
    size_t         i, k, begin, end;
    int            across;
    mft_status     s = mft__doc_encode(c, text, bytes, flags);
    if (s != MFT_OK) return s;
    for (i = 0; i < d->n; i++) d->labels[i] = c->desc.train_on_prompt ? d->ids[i] : -100;
    c->doc_flags = flags;
    clean.byte = 0; clean.token = flags & MFT_NO_ADD_SPECIAL ? 0 : (size_t)c->tok->n_before;
    for (k = 0; k < n_spans && !c->desc.train_on_prompt; k++) {
        s = mft__tokens_before(c, text, (size_t)spans[k].begin, &clean, &begin, &across);
        end = d->n - (flags & MFT_NO_ADD_SPECIAL ? 0 : (size_t)c->tok->n_after);
        if (s == MFT_OK && spans[k].end < (int64_t)bytes) {
            s = mft__tokens_before(c, text, (size_t)spans[k].end, &clean, &end, &across);
            end += (size_t)across;
        }
        if (s != MFT_OK) return s;
        for (i = begin; i < end && i < d->n; i++) d->labels[i] = d->ids[i];
    }
    return MFT_OK;
}

/* doc = c->text, of which all after the first n_prompt bytes is the completion. The two are encoded as
 * one text, as they will stand in generation; a token across the border belongs to the completion. */
static mft_status mft__doc_completion(mft__corpus *c, size_t n_prompt)
{
    mft_chat_span span;
    mft_status    s;
    c->n_prompt = n_prompt;
    span.begin = (int64_t)n_prompt; span.end = (int64_t)c->n_text;
    s = mft__doc_spans(c, c->text, c->n_text, 0, &span, 1);
    return s == MFT_OK && !c->desc.no_eos ? mft__doc_eos(c) : s;
}

/* doc = a conversation through the chat template, whose first `given` assistant turns are not learnt. */
static mft_status mft__doc_chat(mft__corpus *c, const mft_chat *chat, size_t given)
{
    const mft_chat_template *t = c->chat ? c->chat : c->tok ? mft_tokenizer_chat_template(c->tok) : NULL;
    mft_status               s;
    if (!t) return mft__data_fail(c, MFT_ERR_UNSUPPORTED, "a conversation needs a chat template: the tokenizer has none and none was given");
    s = mft__chat_render(t, chat, !c->desc.train_on_prompt, &c->rendered);
    if (s != MFT_OK) return mft__place_error(c, s);
    if (given > c->rendered.n_spans) given = c->rendered.n_spans;
    return mft__doc_spans(c, c->rendered.text, c->rendered.bytes, MFT_NO_ADD_SPECIAL, c->rendered.spans + given, c->rendered.n_spans - given);
}

/* ---- lines of JSONL ---- */

/* Has the object what this kind of line must have? */
static int mft__line_has(const mft__corpus *c, const mft_json *o, mft__source_kind kind)
{
    const mft_dataset_desc *d = &c->desc;
    switch (kind) {
    case MFT__FROM_INPUT_IDS:  return mft_json_get(o, "input_ids") != NULL;
    case MFT__FROM_MESSAGES:   return mft_json_get(o, d->messages_key) != NULL;
    case MFT__FROM_COMPLETION: return mft_json_get(o, d->prompt_key) && mft_json_get(o, d->completion_key);
    case MFT__FROM_ALPACA:     return mft_json_get(o, "instruction") && (mft_json_get(o, "output") || mft_json_get(o, "instances"));
    case MFT__FROM_TEXTS:      return mft_json_get(o, d->text_key) != NULL;
    default:                   return 0;
    }
}

/* What a first line is; MFT__FROM_JSONL when nothing fits. */
static mft__source_kind mft__line_kind(const mft__corpus *c, const mft_json *o)
{
    int can_chat = c->chat || (c->tok && mft_tokenizer_chat_template(c->tok));
    if (mft__line_has(c, o, MFT__FROM_INPUT_IDS))              return MFT__FROM_INPUT_IDS;
    if (can_chat && mft__line_has(c, o, MFT__FROM_MESSAGES))   return MFT__FROM_MESSAGES;
    if (mft__line_has(c, o, MFT__FROM_COMPLETION))             return MFT__FROM_COMPLETION;
    if (mft__line_has(c, o, MFT__FROM_ALPACA))                 return MFT__FROM_ALPACA;
    if (mft__line_has(c, o, MFT__FROM_TEXTS))                  return MFT__FROM_TEXTS;
    if (mft__line_has(c, o, MFT__FROM_MESSAGES))               return MFT__FROM_MESSAGES;     /* says what is missing */
    return MFT__FROM_JSONL;
}

static mft_status mft__line_keys_error(mft__corpus *c, const mft_json *o, mft__source_kind wanted)
{
    char             has[200];
    size_t           i, at = 0;
    const char      *key;
    mft__source_kind kind = mft__line_kind(c, o);
    mft__name_text   name;

    if (wanted != MFT__FROM_JSONL && kind != MFT__FROM_JSONL)
        return mft__data_fail(c, MFT_ERR_FORMAT, "two formats in one file: this line is %s, those before are %s",
                              mft__source_name(kind), mft__source_name(wanted));
    has[0] = '\0';
    for (i = 0; i < 6 && mft_json_at(o, i, &key) && at < sizeof has - 32; i++)
        at += (size_t)snprintf(has + at, 32, "%s%.24s", i ? ", " : "", mft__name(key, strlen(key), &name));
    return mft__data_fail(c, MFT_ERR_FORMAT, "a sample needs one of: input_ids; %s; %s and %s; instruction and output; %s. This line has %s%s",
                          c->desc.messages_key, c->desc.prompt_key, c->desc.completion_key, c->desc.text_key,
                          i ? has : "no keys", mft_json_count(o) > i ? ", .." : "");
}

static const char *mft__json_kind_name(const mft_json *node)
{
    switch (mft_json_type(node)) {
    case MFT_JSON_NULL:   return "null";
    case MFT_JSON_BOOL:   return "true or false";
    case MFT_JSON_NUMBER: return "a number";
    case MFT_JSON_STRING: return "a string";
    case MFT_JSON_ARRAY:  return "an array";
    case MFT_JSON_OBJECT: return "an object";
    }
    return "?";
}

/* Appends the string at `key` to c->text. */
static mft_status mft__text_put_key(mft__corpus *c, const mft_json *o, const char *key, int may_be_empty)
{
    const mft_json *node = mft_json_get(o, key);
    size_t          bytes;
    const char     *s = mft_json_string(node, &bytes);
    if (!node) return may_be_empty ? MFT_OK : mft__data_fail(c, MFT_ERR_FORMAT, "\"%s\" is missing", key);
    if (!s)    return mft__data_fail(c, MFT_ERR_FORMAT, "\"%s\" is %s, not a string", key, mft__json_kind_name(node));
    if (!bytes && !may_be_empty) return mft__data_fail(c, MFT_ERR_FORMAT, "\"%s\" is empty", key);
    return mft__text_put(c, s, bytes);
}

static mft_status mft__line_ids(mft__corpus *c, const mft_json *o)
{
    const mft_json *ids = mft_json_get(o, "input_ids"), *labels = mft_json_get(o, "labels");
    mft__document  *d = &c->doc;
    size_t          i, n = mft_json_count(ids);

    if (mft_json_type(ids) != MFT_JSON_ARRAY) return mft__data_fail(c, MFT_ERR_FORMAT, "\"input_ids\" is %s, not an array", mft__json_kind_name(ids));
    if (!n) return mft__data_fail(c, MFT_ERR_FORMAT, "\"input_ids\" is empty");
    if (labels && mft_json_type(labels) != MFT_JSON_ARRAY)
        return mft__data_fail(c, MFT_ERR_FORMAT, "\"labels\" is %s, not an array", mft__json_kind_name(labels));
    if (labels && mft_json_count(labels) != n)
        return mft__data_fail(c, MFT_ERR_FORMAT, "%llu input_ids, but %llu labels", (unsigned long long)n, (unsigned long long)mft_json_count(labels));
    if (!mft__doc_room(c, n)) return MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; i < n; i++) {
        int64_t id = mft_json_integer(mft_json_at(ids, i, NULL), INT64_MIN);
        int64_t label = labels ? mft_json_integer(mft_json_at(labels, i, NULL), INT64_MIN) : id;
        if (id < INT32_MIN || id > INT32_MAX) return mft__data_fail(c, MFT_ERR_FORMAT, "input_ids[%llu] is no token id", (unsigned long long)i);
        if (label < INT32_MIN || label > INT32_MAX) return mft__data_fail(c, MFT_ERR_FORMAT, "labels[%llu] is no token id", (unsigned long long)i);
        d->ids[i] = (int32_t)id; d->labels[i] = (int32_t)label;
    }
    d->n = n;
    return MFT_OK;
}

/* Is the value at `key` a list of messages that can be rendered? */
static mft_status mft__check_messages(mft__corpus *c, const mft_json *o, const char *key)
{
    const mft_json *list = mft_json_get(o, key), *m, *content, *part;
    size_t          i, k;
    if (mft_json_type(list) != MFT_JSON_ARRAY)
        return mft__data_fail(c, MFT_ERR_FORMAT, "\"%s\" is %s, not an array", key, mft__json_kind_name(list));
    if (!mft_json_count(list)) return mft__data_fail(c, MFT_ERR_FORMAT, "\"%s\" is empty", key);
    for (i = 0; (m = mft_json_at(list, i, NULL)) != NULL; i++) {
        const char *role = mft_json_string(mft_json_get(m, "role"), NULL);
        if (!role || !*role) return mft__data_fail(c, MFT_ERR_FORMAT, "message %llu has no role", (unsigned long long)i + 1);
        content = mft_json_get(m, "content");
        if (mft_json_type(content) == MFT_JSON_ARRAY) {
            for (k = 0; (part = mft_json_at(content, k, NULL)) != NULL; k++) {
                const char    *type = mft_json_string(mft_json_get(part, "type"), NULL);
                mft__name_text name;
                if (type && strcmp(type, "text") != 0)
                    return mft__data_fail(c, MFT_ERR_UNSUPPORTED, "message %llu holds '%s': only text can be trained on",
                                          (unsigned long long)i + 1, mft__name(type, strlen(type), &name));
            }
        } else if (mft_json_type(content) != MFT_JSON_STRING && !mft_json_get(m, "tool_calls"))
            return mft__data_fail(c, MFT_ERR_FORMAT, "message %llu has no content", (unsigned long long)i + 1);
    }
    return MFT_OK;
}

static mft_status mft__line_messages(mft__corpus *c, const mft_json *o)
{
    mft_chat   chat;
    mft_status s = mft__check_messages(c, o, c->desc.messages_key);
    if (s != MFT_OK) return s;
    memset(&chat, 0, sizeof chat);
    chat.messages_json = mft_json_get(o, c->desc.messages_key);
    chat.tools         = mft_json_get(o, "tools");
    chat.now           = c->desc.now;
    return mft__doc_chat(c, &chat, 0);
}

/* A prompt and a completion that are lists of messages: one conversation, of whose assistant turns those of the
 * prompt are not learnt. */
static mft_status mft__line_prompt_messages(mft__corpus *c, const mft_json *o)
{
    const char  *keys[2];
    mft_message *all;
    mft_chat     chat;
    size_t       n = 0, i, k, given = 0, bytes;
    mft_status   s = MFT_OK;
    keys[0] = c->desc.prompt_key; keys[1] = c->desc.completion_key;
    for (k = 0; k < 2 && s == MFT_OK; k++) { s = mft__check_messages(c, o, keys[k]); n += mft_json_count(mft_json_get(o, keys[k])); }
    if (s != MFT_OK) return s;
    bytes = n * sizeof *all;
    if (!(all = (mft_message *)mft__alloc(c->ctx, bytes))) return MFT_ERR_OUT_OF_MEMORY;
    for (k = 0, n = 0; k < 2 && s == MFT_OK; k++) {
        const mft_json *m;
        for (i = 0; (m = mft_json_at(mft_json_get(o, keys[k]), i, NULL)) != NULL && s == MFT_OK; i++, n++) {
            all[n].role    = mft_json_string(mft_json_get(m, "role"), NULL);
            all[n].content = mft_json_string(mft_json_get(m, "content"), NULL);
            if (!all[n].content) s = mft__data_fail(c, MFT_ERR_UNSUPPORTED, "\"%s\": message %llu: only content that is a string is taken here", keys[k], (unsigned long long)i + 1);
            else given += k == 0 && !strcmp(all[n].role, "assistant");
        }
    }
    memset(&chat, 0, sizeof chat);
    chat.messages = all; chat.n_messages = (int)n;
    chat.tools    = mft_json_get(o, "tools");
    chat.now      = c->desc.now;
    if (s == MFT_OK) s = mft__doc_chat(c, &chat, given);
    mft__free(c->ctx, all, bytes);
    return s;
}

/* The prompts Stanford Alpaca was trained with: https://github.com/tatsu-lab/stanford_alpaca */
static mft_status mft__line_alpaca(mft__corpus *c, const mft_json *o, int part, int *out_parts)
{
    const mft_json *list = mft_json_get(o, "instances"), *x = o;
    size_t          bytes = 0, n_prompt;
    mft_status      s;

    if (list && !mft_json_get(o, "output")) {                   /* Self-Instruct's seed tasks */
        if (mft_json_type(list) != MFT_JSON_ARRAY || !mft_json_count(list))
            return mft__data_fail(c, MFT_ERR_FORMAT, "\"instances\" is %s", mft_json_type(list) == MFT_JSON_ARRAY ? "empty" : "not an array");
        if (mft_json_count(list) > 1000000) return mft__data_fail(c, MFT_ERR_FORMAT, "\"instances\" has more than a million elements");
        *out_parts = (int)mft_json_count(list);
        x = mft_json_at(list, (size_t)part, NULL);
    }
    mft_json_string(mft_json_get(x, "input"), &bytes);
    c->n_text = 0;
    s = mft__text_puts(c, bytes ? "Below is an instruction that describes a task, paired with an input that provides further context. "
                                  "Write a response that appropriately completes the request.\n\n### Instruction:\n"
                                : "Below is an instruction that describes a task. "
                                  "Write a response that appropriately completes the request.\n\n### Instruction:\n");
    if (s == MFT_OK) s = mft__text_put_key(c, o, "instruction", 0);
    if (s == MFT_OK && bytes) s = mft__text_puts(c, "\n\n### Input:\n");
    if (s == MFT_OK) s = mft__text_put_key(c, x, "input", 1);
    if (s == MFT_OK) s = mft__text_puts(c, "\n\n### Response:");
    n_prompt = c->n_text;
    if (s == MFT_OK) s = mft__text_put_key(c, x, "output", 0);
    return s == MFT_OK ? mft__doc_completion(c, n_prompt) : s;
}

/* doc = part `part` of the JSON object in text; *out_parts: how many it has. A source whose kind is not
 * yet known learns it here. */
static mft_status mft__line_json(mft__corpus *c, mft__source_kind *kind, const char *text, size_t bytes, int part, int *out_parts)
{
    mft_json  *o = NULL;
    size_t     n_prompt;
    mft_status s = mft__json_parse(c->ctx, mft__path(c->where), c->where_line, text, bytes, &o);

    *out_parts = 1;
    if (s != MFT_OK) return s;
    if (mft_json_type(o) != MFT_JSON_OBJECT) {
        s = mft__data_fail(c, MFT_ERR_FORMAT, "%s where a JSON object was expected", mft__json_kind_name(o));
        goto done;
    }
    if (*kind == MFT__FROM_JSONL) *kind = mft__line_kind(c, o);
    if (!mft__line_has(c, o, *kind)) { s = mft__line_keys_error(c, o, *kind); goto done; }
    c->n_text = 0;
    switch (*kind) {
    case MFT__FROM_INPUT_IDS: s = mft__line_ids(c, o); break;
    case MFT__FROM_MESSAGES:  s = mft__line_messages(c, o); break;
    case MFT__FROM_ALPACA:    s = mft__line_alpaca(c, o, part, out_parts); break;
    case MFT__FROM_COMPLETION:
        if (mft_json_type(mft_json_get(o, c->desc.prompt_key)) == MFT_JSON_ARRAY) { s = mft__line_prompt_messages(c, o); break; }
        s = mft__text_put_key(c, o, c->desc.prompt_key, 0);
        n_prompt = c->n_text;
        if (s == MFT_OK) s = mft__text_put_key(c, o, c->desc.completion_key, 0);
        if (s == MFT_OK) s = mft__doc_completion(c, n_prompt);
        break;
    default:
        s = mft__text_put_key(c, o, c->desc.text_key, 0);
        if (s == MFT_OK) s = mft__doc_text(c, c->text, c->n_text);
        break;
    }
done:
    mft_json_destroy(o);
    return s;
}

/* ---- MMLU: question, A, B, C, D, answer letter (Hendrycks et al. 2021) ---- */

/* c->text = the prompt of a record, with its completion " B" behind; *out_prompt: bytes of the prompt,
 * 0 for a header. The subject is the file's name: "high_school_geography_dev.csv". */
static mft_status mft__line_mmlu_text(mft__corpus *c, const char *text, size_t bytes, size_t *out_prompt)
{
    static const char *const before[6] = { "", "\nA. ", "\nB. ", "\nC. ", "\nD. ", "\nAnswer:" };
    const char *end = text + bytes, *p = text, *name = c->where, *dot;
    char        answer[2] = { ' ', ' ' };
    size_t      i, field, n;
    mft_status  s;

    for (dot = c->where; *dot; dot++) if (*dot == '/' || *dot == '\\') name = dot + 1;
    n = strlen(name);
    if (n > 4 && strcmp(name + n - 4, ".csv") == 0) n -= 4;
    if (n > 4 && (memcmp(name + n - 4, "_dev", 4) == 0 || memcmp(name + n - 4, "_val", 4) == 0)) n -= 4;
    if (n > 5 && memcmp(name + n - 5, "_test", 5) == 0) n -= 5;
    c->n_text = 0;
    s = mft__text_puts(c, "The following are multiple choice questions (with answers) about ");
    if (s == MFT_OK) s = mft__text_put(c, name, n);
    if (s != MFT_OK) return s;
    for (i = c->n_text - n; i < c->n_text; i++) if (c->text[i] == '_') c->text[i] = ' ';
    s = mft__text_puts(c, ".\n\n");

    *out_prompt = 0;
    for (i = 0; s == MFT_OK && i < 6; i++) {
        if (i && (p == end || *p++ != ','))
            return mft__data_fail(c, MFT_ERR_FORMAT, "%d fields, not 6: question, A, B, C, D, answer", (int)i);
        s = mft__text_puts(c, before[i]);
        if (i == 5) *out_prompt = c->n_text;
        field = c->n_text;
        if (p < end && *p == '"') {
            for (p++; s == MFT_OK; ) {
                const char *q = (const char *)memchr(p, '"', (size_t)(end - p));
                if (!q) return mft__data_fail(c, MFT_ERR_FORMAT, "the quotes of field %d are not closed", (int)i + 1);
                s = mft__text_put(c, p, (size_t)(q - p) + (q + 1 < end && q[1] == '"'));      /* "" is one " */
                p = q + 1;
                if (p == end || *p != '"') break;
                p++;
            }
            if (p < end && *p != ',') return mft__data_fail(c, MFT_ERR_FORMAT, "characters after the closing quote of field %d", (int)i + 1);
        } else {
            const char *q = (const char *)memchr(p, ',', (size_t)(end - p));
            if (!q) q = end;
            if (s == MFT_OK) s = mft__text_put(c, p, (size_t)(q - p));
            p = q;
        }
        if (s != MFT_OK) return s;
        if (i < 5 && c->n_text == field) return mft__data_fail(c, MFT_ERR_FORMAT, "field %d is empty", (int)i + 1);
        if (i == 5) {
            const char *a = c->text + field;
            size_t      len = c->n_text - field;
            while (len && (a[len - 1] == ' ' || a[len - 1] == '\t')) len--;
            while (len && (*a == ' ' || *a == '\t')) { a++; len--; }
            if (c->where_line == 1 && len == 6 && (memcmp(a, "answer", 6) == 0 || memcmp(a, "Answer", 6) == 0)) { *out_prompt = 0; return MFT_OK; }
            if (len != 1 || *a < 'A' || *a > 'D') {
                mft__name_text found;
                return mft__data_fail(c, MFT_ERR_FORMAT, "the answer is '%s', not A, B, C or D", mft__name(a, len, &found));
            }
            answer[1] = *a;
            c->n_text = field;
            s = mft__text_put(c, answer, 2);
        }
    }
    if (s == MFT_OK && p != end) return mft__data_fail(c, MFT_ERR_FORMAT, "more than 6 fields: a comma inside a field needs quotes around it");
    return s;
}

/* ---- from a document to samples ---- */

/* doc = part `part` of a record: a line of JSONL or a row of MMLU. *out_parts: how many it has, 0 for a header. */
static mft_status mft__record_document(mft__corpus *c, mft__source *src, const char *text, size_t bytes, int part, int *out_parts)
{
    size_t     n_prompt;
    mft_status s;
    if (src->kind != MFT__FROM_MMLU) return mft__line_json(c, &src->kind, text, bytes, part, out_parts);
    s = mft__data_utf8(c, text, bytes, c->where_line);
    if (s == MFT_OK) s = mft__line_mmlu_text(c, text, bytes, &n_prompt);
    if (s != MFT_OK) return s;
    *out_parts = n_prompt != 0;
    return n_prompt ? mft__doc_completion(c, n_prompt) : MFT_OK;
}

/* Counts a sample in. */
static void mft__sample_count(mft_dataset_info *info, uint64_t *n_groups, const mft__sample *s)
{
    info->n_tokens       += s->n;
    info->n_supervised   += s->n_valid;
    info->n_truncated    += s->truncated;
    info->n_unsupervised += !s->n_valid;
    *n_groups            += !s->joined;
}

/* Checks and counts n tokens and appends their record, `s` with n and n_valid filled in. labels NULL: the ids. */
static mft_status mft__sample_add(mft_dataset *ds, mft__sample s, const int32_t *ids, const int32_t *labels, size_t n)
{
    mft__corpus *c = ds->corpus;
    int64_t      vocab = c->desc.vocab_size ? c->desc.vocab_size : (int64_t)INT32_MAX + 1;
    uint64_t     h = mft__data_mix(ds->info.fingerprint, n);
    size_t       i;
    mft_status   status;

    s.n = (int32_t)n; s.n_valid = 0;
    for (i = 0; i < n; i++) {
        int32_t label = labels ? labels[i] : ids[i];
        if (ids[i] < 0 || ids[i] >= vocab || (label != -100 && (label < 0 || label >= vocab)))
            return mft__data_fail(c, MFT_ERR_FORMAT, "%s %ld at token %llu is outside the vocabulary of %lld", ids[i] < 0 || ids[i] >= vocab ? "id" : "label",
                                  (long)(ids[i] < 0 || ids[i] >= vocab ? ids[i] : label), (unsigned long long)i, (long long)vocab);
        if (ids[i] > ds->info.max_id) ds->info.max_id = ids[i];
        if (i && label != -100) s.n_valid++;
        h = mft__data_mix(h, (uint64_t)(uint32_t)ids[i] << 32 | (uint32_t)label);
    }
    status = mft__table_put(c->ctx, &ds->samples, &s, 1);
    if (status != MFT_OK) return status;
    mft__sample_count(&ds->info, &ds->n_groups, &s);
    ds->info.fingerprint = h;
    ds->packed = 0;
    return MFT_OK;
}

/* The same, and its ids and, where they differ, labels go to the corpus' ids. */
static mft_status mft__sample_hold(mft_dataset *ds, mft__sample s, const int32_t *ids, const int32_t *labels, size_t n)
{
    mft__corpus *c = ds->corpus;
    mft_status   status;
    s.held    = 1;
    s.labeled = n > 1 && memcmp(ids + 1, labels + 1, (n - 1) * sizeof *ids) != 0;
    s.at      = c->ids.n;
    status = mft__table_put(c->ctx, &c->ids, ids, n);
    if (status == MFT_OK && s.labeled) status = mft__table_put(c->ctx, &c->ids, labels, n);
    return status == MFT_OK ? mft__sample_add(ds, s, ids, labels, n) : status;
}

/* Makes samples of c->doc. `s` says where it is from; goes_on: what does not fit goes on in the next sample, else
 * it is cut off. */
static mft_status mft__document_add(mft_dataset *ds, mft__sample s, int goes_on)
{
    mft__corpus   *c = ds->corpus;
    mft__document *d = &c->doc;
    size_t         max = (size_t)c->desc.max_seq_len, at, n;
    mft_status     status = MFT_OK;

    if (!d->n) return mft__data_fail(c, MFT_ERR_FORMAT, "the text makes no tokens");
    if (d->n > max && goes_on) {
        for (at = 0; at < d->n && status == MFT_OK; at += n) {
            n = d->n - at < max ? d->n - at : max;
            if (n == 1) break;                                  /* nothing to predict */
            status = mft__sample_hold(ds, s, d->ids + at, d->labels + at, n);
            s.joined = 1;
        }
        n = max;
    } else {
        n = d->n < max ? d->n : max;
        s.truncated = d->n > max;
        status = c->sources[s.source].kind == MFT__FROM_CALLS ? mft__sample_hold(ds, s, d->ids, d->labels, n)
                                                             : mft__sample_add(ds, s, d->ids, d->labels, n);
        n = d->n;
    }
    if ((int64_t)n > ds->info.longest) ds->info.longest = (int64_t)n;
    return status;
}

/* What a failed load is undone to. */
typedef struct mft__dataset_mark { uint64_t n_samples, n_ids, n_groups; size_t n_sources; mft_dataset_info info; } mft__dataset_mark;

static mft__dataset_mark mft__dataset_remember(const mft_dataset *ds)
{
    mft__dataset_mark m;
    m.n_samples = ds->samples.n; m.n_ids = ds->corpus->ids.n; m.n_groups = ds->n_groups;
    m.n_sources = ds->corpus->n_sources;
    m.info = ds->info;
    return m;
}

static void mft__dataset_undo(mft_dataset *ds, const mft__dataset_mark *m)
{
    mft__sources_cut(ds->corpus, m->n_sources);
    mft__table_cut(&ds->corpus->ids, m->n_ids);
    mft__table_cut(&ds->samples, m->n_samples);
    ds->n_groups = m->n_groups;
    ds->info = m->info;
    ds->packed = 0;
}

/* ---- loading ---- */

static int mft__is_blank(const char *text, size_t bytes)
{
    size_t i;
    for (i = 0; i < bytes; i++) if (text[i] != ' ' && text[i] != '\t' && text[i] != '\r' && text[i] != '\n') return 0;
    return 1;
}

/* A file's records, one after the other, through c->line. */
typedef struct mft__reader {
    uint64_t at;                            /* file offset of c->line                                    */
    size_t   begin, end;                    /* what is read but not yet given                            */
    int64_t  line, next_line;               /* of the record given; where its end was                    */
    int      quotes;                        /* line ends inside "" do not end a record: CSV              */
    int      array;                         /* records are the objects of one JSON array; see below      */
} mft__reader;

/* Reads on: c->line keeps [begin, end) and gets more behind. *i moves with it. *out_more 0: the file has ended. */
static mft_status mft__reader_fill(mft__corpus *c, mft__reader *r, size_t *i, int *out_more)
{
    uint64_t   left;
    size_t     part;
    mft_status s;
    *out_more = r->at + r->end < c->file.bytes;
    if (!*out_more) return MFT_OK;
    if (r->begin) {
        memmove(c->line, c->line + r->begin, r->end - r->begin);
        r->at += r->begin; r->end -= r->begin; *i -= r->begin; r->begin = 0;
    }
    if (r->end == c->cap_line) {
        void *p = c->line;
        int   ok;
        if (r->end >= MFT__JSON_MAX_BYTES)
            return mft__data_fail(c, MFT_ERR_FORMAT, "a line of more than %llu bytes", (unsigned long long)MFT__JSON_MAX_BYTES);
        ok = mft__grow(c->ctx, &p, &c->cap_line, c->cap_line < 32768 ? 65536 : c->cap_line + 1, 1);
        c->line = (char *)p;
        if (!ok) return MFT_ERR_OUT_OF_MEMORY;
    }
    left = c->file.bytes - r->at - r->end;
    part = c->cap_line - r->end;
    if (part > left) part = (size_t)left;
    s = mft__file_read(&c->file, r->at + r->end, c->line + r->end, part);
    if (s == MFT_OK) r->end += part;
    return s;
}

/* The next line: *end is where it ends, r->begin past its line end. */
static mft_status mft__reader_line(mft__corpus *c, mft__reader *r, size_t *out_begin, size_t *out_end)
{
    size_t     i = r->begin;
    int        inside = 0, more = 1;
    mft_status s;
    r->line = r->next_line;
    for (;;) {
        for (; i < r->end; i++) {
            if (c->line[i] == '"') inside ^= r->quotes;
            if (c->line[i] != '\n') continue;
            r->next_line++;
            if (inside) continue;
            *out_begin = r->begin; *out_end = i;
            r->begin = i + 1;
            return MFT_OK;
        }
        s = mft__reader_fill(c, r, &i, &more);
        if (s != MFT_OK) return s;
        if (!more) break;
    }
    *out_begin = r->begin; *out_end = r->begin = r->end;        /* the last line may lack its end */
    return MFT_OK;
}

/* The next object of an array. r->array: 1 before the array, 2 before the first object or the end,
 * 3 before a comma or the end, 4 before an object, 5 after the array. What is inside the object is for
 * the JSON parser to judge; here only strings and nesting are followed. */
static mft_status mft__reader_element(mft__corpus *c, mft__reader *r, size_t *out_begin, size_t *out_end)
{
    size_t     i = r->begin, depth = 0;
    int        inside = 0, more = 1;
    mft_status s;
    for (;;) {
        for (; i < r->end; i++) {
            char ch = c->line[i];
            if (ch == '\n') r->next_line++;
            if (depth) {
                if (inside == 2)                   inside = 1;                  /* the character after a backslash */
                else if (inside)                   inside = ch == '\\' ? 2 : ch != '"';
                else if (ch == '"')                inside = 1;
                else if (ch == '{' || ch == '[')   depth++;
                else if ((ch == '}' || ch == ']') && !--depth) {
                    *out_begin = r->begin; *out_end = i + 1;
                    r->begin = i + 1;
                    r->array = 3;
                    return MFT_OK;
                }
                continue;
            }
            if (ch == '\n') r->begin = i + 1;
            if (ch == ' ' || ch == '\t' || ch == '\r' || ch == '\n') continue;
            if (ch == '{' && (r->array == 2 || r->array == 4)) { r->line = r->next_line; depth = 1; continue; }
            if      (ch == '[' && r->array == 1)                    r->array = 2;
            else if (ch == ',' && r->array == 3)                    r->array = 4;
            else if (ch == ']' && (r->array == 2 || r->array == 3)) r->array = 5;
            else {
                c->where_line = r->next_line;
                return mft__data_fail(c, MFT_ERR_FORMAT, "an array of JSON objects, but here is '%c' where %s was expected", ch > ' ' && ch < 127 ? ch : '?',
                                      r->array == 3 ? "',' or ']'" : r->array == 5 ? "nothing" : "an object");
            }
            r->begin = i + 1;
        }
        s = mft__reader_fill(c, r, &i, &more);
        if (s != MFT_OK) return s;
        if (!more) break;
    }
    c->where_line = r->next_line;
    if (r->array != 5) return mft__data_fail(c, MFT_ERR_FORMAT, "the array of JSON objects does not end");
    *out_begin = *out_end = r->begin = r->end;
    return MFT_OK;
}

/* The next record, without its line end: *out_text NULL after the last. *out_at: its file offset. */
static mft_status mft__reader_next(mft__corpus *c, mft__reader *r, const char **out_text, size_t *out_bytes, uint64_t *out_at)
{
    size_t     begin = 0, end = 0, none = r->begin;
    int        more;
    mft_status s = MFT_OK;
    *out_text = NULL;
    if (!r->at && !r->end) {                                    /* the file's beginning: a byte order mark, an array? */
        s = mft__reader_fill(c, r, &none, &more);
        if (s != MFT_OK) return s;
        if (r->end >= 3 && memcmp(c->line, "\xef\xbb\xbf", 3) == 0) r->begin = 3;
        for (end = r->begin; end < r->end && mft__is_blank(c->line + end, 1); end++) {}
        if (!r->quotes && end < r->end && c->line[end] == '[') r->array = 1;
    }
    if (r->at + r->begin == c->file.bytes && r->array % 5 == 0) return MFT_OK;
    s = r->array ? mft__reader_element(c, r, &begin, &end) : mft__reader_line(c, r, &begin, &end);
    if (s != MFT_OK || (r->array && begin == end)) return s;
    if (end > begin && c->line[end - 1] == '\r') end--;
    *out_text = c->line + begin; *out_bytes = end - begin; *out_at = r->at + begin;
    return MFT_OK;
}

static mft_status mft__load_lines(mft_dataset *ds, size_t source)
{
    mft__corpus *c = ds->corpus;
    mft__reader  r;
    const char  *text;
    size_t       bytes;
    uint64_t     at;
    mft_status   s;

    memset(&r, 0, sizeof r);
    r.next_line = 1;
    r.quotes    = c->sources[source].kind == MFT__FROM_MMLU;
    for (;;) {
        mft__dataset_mark before = mft__dataset_remember(ds);
        mft__sample       sample;
        int               part = 0, parts = 1;

        if (mft__data_loading(c, r.at + r.begin)) return MFT_ERR_CANCELLED;
        c->where_line = r.next_line;
        s = mft__reader_next(c, &r, &text, &bytes, &at);
        if (s != MFT_OK) return s;
        c->where_line = r.line;
        if (!text) return MFT_OK;
        if (mft__is_blank(text, bytes)) continue;
        memset(&sample, 0, sizeof sample);
        sample.at = at; sample.bytes = (uint32_t)bytes; sample.source = (unsigned)source & 0xfffffffu;
        do {
            s = mft__record_document(c, &c->sources[source], text, bytes, part, &parts);
            if (s == MFT_OK && parts) s = mft__document_add(ds, sample, c->sources[source].kind == MFT__FROM_TEXTS);
            sample.joined = 1;
        } while (s == MFT_OK && ++part < parts);
        if (s == MFT_OK) continue;
        if (!c->desc.skip_bad_lines || s == MFT_ERR_OUT_OF_MEMORY || s == MFT_ERR_IO) return s;
        mft__dataset_undo(ds, &before);
        ds->info.n_bad_lines++;
        mft__log(c->ctx, MFT_LOG_WARNING, "skipped: %s", c->ctx->error);
    }
}

static mft_status mft__load_tokens(mft_dataset *ds, size_t source)
{
    mft__corpus *c = ds->corpus;
    uint64_t     n = c->file.bytes / 4, at, max = (uint64_t)c->desc.max_seq_len;
    size_t       i, block = (size_t)(max * (max < 65536 ? 65536 / max : 1));
    mft__sample  sample;
    mft_status   s;

    if (c->file.bytes % 4) return mft__data_fail(c, MFT_ERR_FORMAT, "%llu bytes are not a whole number of int32 tokens", (unsigned long long)c->file.bytes);
    if (!mft__doc_room(c, n < block ? (size_t)n : block)) return MFT_ERR_OUT_OF_MEMORY;
    memset(&sample, 0, sizeof sample);
    sample.source = (unsigned)source & 0xfffffffu;
    for (at = 0; at < n; at += block) {
        size_t part = n - at < block ? (size_t)(n - at) : block, len;
        if (mft__data_loading(c, at * 4)) return MFT_ERR_CANCELLED;
        s = mft__file_read(&c->file, at * 4, c->doc.ids, part * 4);
        for (i = 0; i < part && s == MFT_OK; i += len) {
            len = part - i < max ? part - i : (size_t)max;
            if (len == 1) break;                                /* the last token alone: nothing to predict */
            sample.at = at + i;
            s = mft__sample_add(ds, sample, c->doc.ids + i, NULL, len);
            if ((int64_t)len > ds->info.longest) ds->info.longest = (int64_t)len;
        }
        if (s != MFT_OK) return s;
    }
    return MFT_OK;
}

/* ---- plain text: a file is one text, of whatever length ----
 *
 * It is encoded in parts of MFT__TEXT_PART bytes with MFT__TEXT_AROUND more on either side, of which only the part's own
 * tokens are taken. A part ends where a token does, at a place where the encoding of its surroundings alone gives the
 * tokens that the whole part gave: so the joined parts are the encoding of the whole. */
enum { MFT__TEXT_PART = 1 << 17, MFT__TEXT_AROUND = 2048, MFT__TEXT_MOST = 1 << 27 };

typedef struct mft__text_part {
    size_t   begin;                         /* of c->text [0, n_text): where the part begins; before it, what was given */
    uint64_t at;                            /* file offset of what is read next                          */
    size_t   checked;                       /* bytes of c->text that are UTF-8                           */
    int64_t  line, column;                  /* of the first that is not checked                          */
    int32_t *ids, *begins;                  /* tokens, and where in c->text each begins                  */
    size_t   n, cap_ids, cap_begins;
} mft__text_part;

/* Reads on until c->text has `want` bytes or the file has ended. CRLF becomes LF, as when Python reads a text file. */
static mft_status mft__text_fill(mft__corpus *c, mft__text_part *t, size_t want)
{
    while (c->n_text < want && t->at < c->file.bytes) {
        uint64_t    left = c->file.bytes - t->at;
        size_t      part = want - c->n_text + 2, i, k = c->n_text;
        void       *p = c->text;
        int         ok;
        const char *bad;
        mft_status  s;
        if (part > left) part = (size_t)left;
        ok = mft__grow(c->ctx, &p, &c->cap_text, c->n_text + part, 1);
        c->text = (char *)p;
        if (!ok) return MFT_ERR_OUT_OF_MEMORY;
        s = mft__file_read(&c->file, t->at, c->text + k, part);
        if (s != MFT_OK) return s;
        if (part < left && part > 1 && c->text[k + part - 1] == '\r') part--;           /* is it CRLF? read it again with what follows */
        i = t->at == 0 && part >= 3 && memcmp(c->text, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
        for (t->at += part, part += c->n_text, i += c->n_text; i < part; i++)
            if (c->text[i] != '\r' || i + 1 == part || c->text[i + 1] != '\n') c->text[k++] = c->text[i];
        c->n_text = k;
        bad = mft__utf8_check(c->text + t->checked, k - t->checked);
        if (bad && t->at < c->file.bytes && c->text + k - bad < 4) k = (size_t)(bad - c->text);        /* a character that goes on */
        else if (bad) {
            mft__data_column(c->text + t->checked, bad, &t->line, &t->column);
            return mft__data_not_utf8(c, t->line, t->column, *bad);
        }
        mft__data_column(c->text + t->checked, c->text + k, &t->line, &t->column);
        t->checked = k;
    }
    return MFT_OK;
}

/* The tokens of c->text [from, to), without any around the text, each with its beginning in c->text. */
static mft_status mft__text_encode(mft__corpus *c, size_t from, size_t to, mft__text_part *t)
{
    size_t  i;
    int64_t n, need = (int64_t)((to - from) / 2) + 16;
    for (;;) {
        void *p = t->ids, *q = t->begins;
        int   ok = mft__grow(c->ctx, &p, &t->cap_ids, (size_t)need, sizeof *t->ids);
        t->ids = (int32_t *)p;
        if (ok) ok = mft__grow(c->ctx, &q, &t->cap_begins, (size_t)need, sizeof *t->begins);
        t->begins = (int32_t *)q;
        if (!ok) return MFT_ERR_OUT_OF_MEMORY;
        n = mft__encode_begins(c->tok, c->text + from, (int64_t)(to - from), MFT_NO_ADD_SPECIAL, t->ids, t->begins, need);
        if (n < 0) return mft__place_error(c, (mft_status)n);
        if (n <= need) break;
        need = n;
    }
    t->n = (size_t)n;
    for (i = 0; i < t->n; i++) t->begins[i] += (int32_t)from;
    return MFT_OK;
}

static size_t mft__text_boundary(const char *text, size_t at) { while (at && ((unsigned char)text[at] & 0xc0) == 0x80) at--; return at; }

/* The first token that begins at `at` or later. */
static size_t mft__text_token(const mft__text_part *t, size_t at)
{
    size_t low = 0, high = t->n, mid;
    while (low < high) {
        mid = low + (high - low) / 2;
        if ((size_t)t->begins[mid] < at) low = mid + 1; else high = mid;
    }
    return low;
}

/* Where the part can end: *out is the number of its tokens before the cut, *out_found whether there is one. `spare` is
 * for the encodings of surroundings. The text goes on for MFT__TEXT_AROUND behind every place that is tried. */
static mft_status mft__text_cut(mft__corpus *c, const mft__text_part *t, mft__text_part *spare, size_t *out, int *out_found)
{
    enum { HALF = MFT__TEXT_AROUND / 2, TRIES = 32 };
    size_t     k = mft__text_token(t, t->checked - MFT__TEXT_AROUND), at, a, b, i, j;
    int        tries;
    mft_status s;
    *out_found = 0;
    if (k == t->n && k) k--;
    for (tries = 0; tries < TRIES && k > 0; tries++, k -= k < 100 ? k : 99) {
        at = (size_t)t->begins[k];
        if (at < t->begin + MFT__TEXT_AROUND) break;
        if (t->checked - at < HALF) continue;
        if ((size_t)t->begins[k - 1] == at || ((unsigned char)c->text[at] & 0xc0) == 0x80) continue;    /* inside a character */
        b = mft__text_boundary(c->text, at + MFT__TEXT_AROUND < t->checked ? at + MFT__TEXT_AROUND : t->checked);
        s = mft__text_encode(c, mft__text_boundary(c->text, at - MFT__TEXT_AROUND), b, spare);
        if (s != MFT_OK) return s;
        for (a = at - HALF, b = at + HALF, i = mft__text_token(t, a), j = mft__text_token(spare, a);
             i < t->n && j < spare->n && (size_t)t->begins[i] < b && t->begins[i] == spare->begins[j] && t->ids[i] == spare->ids[j]; i++, j++) {}
        if (i > k && (i == t->n || (size_t)t->begins[i] >= b) && (j == spare->n || (size_t)spare->begins[j] >= b)) {
            *out = k; *out_found = 1;
            return MFT_OK;
        }
    }
    return MFT_OK;
}

/* Makes samples of all whole pieces in c->doc, and at the end of what is left; the rest stays. */
static mft_status mft__text_pieces(mft_dataset *ds, mft__sample sample, int ended)
{
    mft__document *d = &ds->corpus->doc;
    size_t         max = (size_t)ds->corpus->desc.max_seq_len, at = 0, n;
    mft_status     s = MFT_OK;
    for (; s == MFT_OK && d->n - at > (ended ? 1 : max - 1); at += n) {                /* a last token alone: nothing to predict */
        n = d->n - at < max ? d->n - at : max;
        s = mft__sample_hold(ds, sample, d->ids + at, d->ids + at, n);
        if ((int64_t)n > ds->info.longest) ds->info.longest = (int64_t)n;
    }
    if (at) memmove(d->ids, d->ids + at, (d->n - at) * sizeof *d->ids);
    d->n -= at;
    return s;
}

static mft_status mft__doc_append(mft__corpus *c, const int32_t *ids, size_t n)
{
    if (!mft__doc_room(c, c->doc.n + n)) return MFT_ERR_OUT_OF_MEMORY;
    if (n) memcpy(c->doc.ids + c->doc.n, ids, n * sizeof *ids);
    c->doc.n += n;
    return MFT_OK;
}

static mft_status mft__load_text(mft_dataset *ds, size_t source)
{
    mft__corpus   *c = ds->corpus;
    mft__text_part t, spare;
    mft__sample    sample;
    size_t         part = MFT__TEXT_PART, first, past, keep;
    int            found, ended = 0;
    mft_status     s;

    if (!c->tok) return mft__data_fail(c, MFT_ERR_INVALID_ARGUMENT, "text needs a tokenizer, and this dataset was made without one: it comes with a model, as tokenizer.json in its directory");
    memset(&t, 0, sizeof t);
    memset(&spare, 0, sizeof spare);
    memset(&sample, 0, sizeof sample);
    sample.source = (unsigned)source & 0xfffffffu;
    t.line = t.column = 1;
    c->n_text = c->doc.n = 0;
    s = mft__doc_append(c, c->tok->before, (size_t)c->tok->n_before);
    while (s == MFT_OK && !ended) {
        if (mft__data_loading(c, t.at)) { s = MFT_ERR_CANCELLED; break; }
        if ((s = mft__text_fill(c, &t, t.begin + part + MFT__TEXT_AROUND)) != MFT_OK) break;
        ended = t.at == c->file.bytes;
        if ((s = mft__text_encode(c, 0, t.checked, &t)) != MFT_OK) break;
        first = mft__text_token(&t, t.begin);
        past  = t.n;
        if (!ended && (s = mft__text_cut(c, &t, &spare, &past, &found)) != MFT_OK) break;
        if (!ended && !found) {                                 /* one word of a whole part: a larger one then */
            if ((part *= 2) > MFT__TEXT_MOST)
                s = mft__data_fail(c, MFT_ERR_UNSUPPORTED, "line %lld: nowhere to cut the text within %d MB", (long long)t.line, MFT__TEXT_MOST >> 20);
            continue;
        }
        if (past > first && (s = mft__doc_append(c, t.ids + first, past - first)) != MFT_OK) break;
        if (ended) break;
        t.begin = (size_t)t.begins[past];
        keep = mft__text_boundary(c->text, t.begin - MFT__TEXT_AROUND);
        memmove(c->text, c->text + keep, c->n_text - keep);
        c->n_text -= keep; t.begin -= keep; t.checked -= keep;
        part = MFT__TEXT_PART;
        s = mft__text_pieces(ds, sample, 0);
    }
    if (s == MFT_OK) s = mft__doc_append(c, c->tok->after, (size_t)c->tok->n_after);
    if (s == MFT_OK && c->desc.add_eos && mft_tokenizer_eos_id(c->tok) >= 0) {
        int32_t eos = mft_tokenizer_eos_id(c->tok);
        s = mft__doc_append(c, &eos, 1);
    }
    if (s == MFT_OK) s = mft__text_pieces(ds, sample, 1);
    mft__free(c->ctx, t.ids, t.cap_ids * sizeof *t.ids);
    mft__free(c->ctx, t.begins, t.cap_begins * sizeof *t.begins);
    mft__free(c->ctx, spare.ids, spare.cap_ids * sizeof *spare.ids);
    mft__free(c->ctx, spare.begins, spare.cap_begins * sizeof *spare.begins);
    return s;
}

/* What a file is, where it was not said: by its name, else by how it begins. */
static mft_status mft__guess_format(mft__corpus *c, const char *path, mft__source_kind *out)
{
    mft__file  f;
    char       head[512];
    size_t     i = 0, n;
    mft_status s;
    *out = MFT__FROM_TEXT;
    if (mft__ends_with(path, ".jsonl") || mft__ends_with(path, ".ndjson")) { *out = MFT__FROM_JSONL;  return MFT_OK; }
    if (mft__ends_with(path, ".csv")) { *out = MFT__FROM_MMLU;   return MFT_OK; }
    if (mft__ends_with(path, ".bin")) { *out = MFT__FROM_TOKENS; return MFT_OK; }
    s = mft__file_open(c->ctx, path, &f);
    if (s != MFT_OK) return s;
    n = f.bytes < sizeof head ? (size_t)f.bytes : sizeof head;
    s = mft__file_read(&f, 0, head, n);
    mft__file_close(&f);
    if (s != MFT_OK) return s;
    if (n >= 3 && memcmp(head, "\xef\xbb\xbf", 3) == 0) i = 3;
    while (i < n && mft__is_blank(head + i, 1)) i++;
    if (i < n && head[i] == '[') for (i++; i < n && mft__is_blank(head + i, 1); ) i++;
    if (i == n || head[i++] != '{') return MFT_OK;
    while (i < n && mft__is_blank(head + i, 1)) i++;
    if (i < n && head[i] == '"') *out = MFT__FROM_JSONL;
    return MFT_OK;
}

/* What a source has to say of its samples, all read and checked. On failure some of it may be there. */
static mft_status mft__load_source(mft_dataset *ds, size_t source)
{
    mft__corpus          *c = ds->corpus;
    const mft__source    *src = &c->sources[source];
    const mft_dataset_info before = ds->info;
    uint64_t              n = ds->samples.n;
    mft_status            s = src->kind == MFT__FROM_TEXT ? mft__load_text(ds, source) : src->kind == MFT__FROM_TOKENS ? mft__load_tokens(ds, source)
                            : mft__load_lines(ds, source);
    c->where_line = 0;
    if (s != MFT_OK) return s;
    if (ds->samples.n == n && ds->info.n_bad_lines > before.n_bad_lines) {
        char last[sizeof c->ctx->error];
        memcpy(last, c->ctx->error, sizeof last);               /* of the last line that was skipped */
        return mft__fail(c->ctx, MFT_ERR_FORMAT, "not one good line among %lld; the last: %s", (long long)(ds->info.n_bad_lines - before.n_bad_lines), last);
    }
    if (ds->samples.n == n)
        return mft__data_fail(c, MFT_ERR_INVALID_ARGUMENT, "%s", src->bytes ? "too short: there is nothing to predict" : "the file is empty");
    if (ds->info.n_supervised == before.n_supervised)
        return mft__data_fail(c, MFT_ERR_INVALID_ARGUMENT, "no token to learn from: every label is masked; prompts that fill all of max_seq_len (%d) do that",
                              c->desc.max_seq_len);
    return MFT_OK;
}

/* ---- loading by way of the index ---- */

/* A tokenizer's pieces, merges and added tokens, and what it makes of a text that its other settings change. */
static uint64_t mft__tokenizer_hash(const mft_tokenizer *t)
{
    static const char probe[] = " It's 12345  E\xcc\x81t\xc3\xa9,\n\n\t\xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x99\x82 don't\r\n(a+b)  <|im_end|> \xe2\x96\x81x ";
    int32_t  ids[256];
    int64_t  n = mft_tokenizer_encode(t, probe, (int64_t)sizeof probe - 1, 0, ids, 256);
    uint64_t h = mft__data_mix_bytes((uint64_t)t->n_ids, t->pieces.p, t->pieces.n), merges = 0;
    uint32_t i;
    for (i = 0; i < t->n_merge_slots; i++)                      /* their order in the hash is the context's own */
        if (t->merge_slots[i] != MFT__NO_MERGE) merges += mft__data_mix(1, t->merge_slots[i]);
    for (i = 0; i < 2; i++) h = mft__data_mix_bytes(h, t->added[i].text.p, t->added[i].text.n);
    h = mft__data_mix(mft__data_mix(h, merges), (uint64_t)(uint32_t)t->eos << 32 | (uint32_t)t->bos);
    return n > 0 ? mft__data_mix_bytes(h, ids, (size_t)(n < 256 ? n : 256) * sizeof *ids) : h;
}

/* The open file's length, its time of change, and 64 pieces of it from beginning to end. */
static mft_status mft__source_hash(mft__corpus *c, const mft__source *src, uint64_t *h)
{
    enum { PIECES = 64, PIECE = 4096 };
    char       piece[PIECE];
    uint64_t   i, at;
    mft_status s = MFT_OK;
    *h = mft__data_mix(*h, src->bytes);
    if (!c->ctx->io.open) *h = mft__data_mix(*h, (uint64_t)mft__os_modified(src->path));
    for (i = 0; i < PIECES && s == MFT_OK; i++) {
        size_t n = src->bytes < PIECE ? (size_t)src->bytes : (size_t)PIECE;
        at = (src->bytes - n) / (PIECES - 1) * i;
        if (i == PIECES - 1) at = src->bytes - n;
        s = mft__file_read(&c->file, at, piece, n);
        if (s == MFT_OK) *h = mft__data_mix_bytes(*h, piece, n);
    }
    return s;
}

/* A hash of all that a source's samples depend on. */
static mft_status mft__index_key(const mft_dataset *ds, const mft__source *src, uint64_t *out)
{
    mft__corpus             *c = ds->corpus;
    const mft_dataset_desc  *d = &c->desc;
    const mft_chat_template *t = c->chat ? c->chat : c->tok ? mft_tokenizer_chat_template(c->tok) : NULL;
    const char              *strings[5];
    mft__sample              probe;
    uint64_t                 h;
    size_t                   i;

    memset(&probe, 0, sizeof probe);                            /* this compiler's layout */
    probe.at = 1; probe.bytes = 2; probe.n = 3; probe.n_valid = 4; probe.source = 5; probe.held = 1; probe.joined = 1;
    h = mft__data_mix_bytes(MFT__INDEX_VERSION, &probe, sizeof probe);
    h = mft__data_mix(mft__data_mix(h, ds->info.fingerprint), ds->samples.n);
    h = mft__data_mix(mft__data_mix(h, c->ids.n), c->n_sources);
    h = mft__data_mix(mft__data_mix(h, (uint64_t)d->max_seq_len << 8 | (uint64_t)src->kind), (uint64_t)d->vocab_size);
    h = mft__data_mix(h, (uint64_t)((d->train_on_prompt ? 1 : 0) | (d->add_eos ? 2 : 0) | (d->no_eos ? 4 : 0) | (d->skip_bad_lines ? 8 : 0)));
    strings[0] = d->text_key; strings[1] = d->prompt_key; strings[2] = d->completion_key; strings[3] = d->messages_key;
    strings[4] = src->kind == MFT__FROM_MMLU ? mft__file_name(src->path) : "";                  /* it names the subject */
    for (i = 0; i < 5; i++) h = mft__data_mix_bytes(h, strings[i], strlen(strings[i]));
    if (c->tok) h = mft__data_mix(h, mft__tokenizer_hash(c->tok));
    if (t) h = mft__data_mix_bytes(h, mft_chat_template_source(t), strlen(mft_chat_template_source(t)));
    if (t && strstr(mft_chat_template_source(t), "strftime_now")) h = mft__data_mix(h, (uint64_t)d->now);
    *out = h;
    return mft__source_hash(c, src, out);
}

/* INDEX_DIR/NAME-HASH, the hash being that of path and split; freed with mft__strfree. */
static char *mft__index_base(mft__corpus *c, const char *path)
{
    char        name[96];
    const char *file = mft__file_name(path);
    uint64_t    h = mft__data_mix_bytes(mft__data_mix_bytes(1, path, strlen(path)), c->desc.split, strlen(c->desc.split));
    size_t      n = mft__text_boundary(file, strlen(file) < 60 ? strlen(file) : 60);
    snprintf(name, sizeof name, "%.*s-%08lx", (int)n, file, (unsigned long)(h & 0xffffffffu));
    return mft__path_join(c->ctx, c->desc.index_dir, name);
}

static mft_status mft__table_copy(mft_context *ctx, mft__table *to, mft__table *from)
{
    char       block[MFT__TABLE_BLOCK * sizeof(mft__sample)];   /* the largest record */
    uint64_t   i;
    mft_status s = MFT_OK;
    for (i = 0; i < from->n && s == MFT_OK; i += MFT__TABLE_BLOCK) {
        size_t n = from->n - i < MFT__TABLE_BLOCK ? (size_t)(from->n - i) : (size_t)MFT__TABLE_BLOCK;
        s = mft__table_get(from, i, n, block);
        if (s == MFT_OK) s = mft__table_put(ctx, to, block, n);
    }
    return s;
}

static void mft__index_say(const mft_dataset_info *info, uint64_t n_groups, mft__index_header *h)
{
    memset(h, 0, sizeof *h);
    h->fingerprint = info->fingerprint; h->n_groups = n_groups;
    h->n_tokens = info->n_tokens; h->n_supervised = info->n_supervised; h->longest = info->longest; h->n_truncated = info->n_truncated;
    h->n_unsupervised = info->n_unsupervised; h->n_bad_lines = info->n_bad_lines; h->max_id = info->max_id;
}

static void mft__index_hear(const mft__index_header *h, mft_dataset_info *info, uint64_t *n_groups)
{
    info->fingerprint = h->fingerprint; *n_groups = h->n_groups;
    info->n_tokens = h->n_tokens; info->n_supervised = h->n_supervised; info->longest = h->longest; info->n_truncated = h->n_truncated;
    info->n_unsupervised = h->n_unsupervised; info->n_bad_lines = h->n_bad_lines; info->max_id = (int32_t)h->max_id;
}

/* mft__load_source to new tables in files, which hold what was there before as well. The old ones are for the caller. */
static mft_status mft__index_make(mft_dataset *ds, size_t source, const char *base, uint64_t key, mft__table *old_samples, mft__table *old_ids)
{
    mft__corpus       *c = ds->corpus;
    mft__index_header  h;
    mft_status         s = mft__make_dirs(c->ctx, c->desc.index_dir);
    if (s == MFT_OK) s = mft__index_begin(c->ctx, &ds->samples, base, ".samples");
    if (s == MFT_OK) s = mft__index_begin(c->ctx, &c->ids, base, ".ids");
    if (s == MFT_OK) s = mft__table_copy(c->ctx, &ds->samples, old_samples);
    if (s == MFT_OK) s = mft__table_copy(c->ctx, &c->ids, old_ids);
    if (s == MFT_OK) s = mft__load_source(ds, source);
    mft__index_say(&ds->info, ds->n_groups, &h);
    h.key = key; h.kind = (int64_t)c->sources[source].kind;
    if (s == MFT_OK) s = mft__table_end(c->ctx, &c->ids, &h);
    if (s == MFT_OK) s = mft__table_end(c->ctx, &ds->samples, &h);
    return s;
}

/* mft__load_source by way of the index: what is found there is taken, what is not is made. */
static mft_status mft__index_load(mft_dataset *ds, size_t source)
{
    mft__corpus      *c = ds->corpus;
    mft__source      *src = &c->sources[source];
    mft__table        samples = ds->samples, ids = c->ids;
    mft__index_header h, h_ids;
    uint64_t          key;
    char             *base = mft__index_base(c, src->path);
    mft_status        s = base ? mft__index_key(ds, src, &key) : MFT_ERR_OUT_OF_MEMORY;

    if (s != MFT_OK) { mft__strfree(c->ctx, base); return s; }
    memset(&ds->samples, 0, sizeof samples); ds->samples.size = samples.size;
    memset(&c->ids,      0, sizeof ids);     c->ids.size      = ids.size;
    ds->info.index_reused = mft__index_find(c->ctx, &ds->samples, base, ".samples", key, &h) && mft__index_find(c->ctx, &c->ids, base, ".ids", key, &h_ids);
    if (ds->info.index_reused) {
        mft__index_hear(&h, &ds->info, &ds->n_groups);
        src->kind = (mft__source_kind)h.kind;
        ds->packed = 0;
    } else {
        mft__table_free(c->ctx, &ds->samples);
        s = mft__index_make(ds, source, base, key, &samples, &ids);
    }
    if (s != MFT_OK) {                                          /* all as before */
        mft__table_free(c->ctx, &ds->samples); ds->samples = samples;
        mft__table_free(c->ctx, &c->ids);      c->ids      = ids;
        mft__strfree(c->ctx, base);
        return s;
    }
    mft__table_free(c->ctx, &samples);
    mft__table_free(c->ctx, &ids);
    mft__strfree(c->ctx, ds->index);
    ds->index = base;
    return MFT_OK;
}

/* One file; on failure some of it may be there. */
static mft_status mft__load_file(mft_dataset *ds, const char *path)
{
    mft__corpus     *c = ds->corpus;
    size_t           source = c->n_sources;
    mft__source_kind kind = MFT__FROM_TEXT;
    mft__source     *src;
    mft_status       s = MFT_OK;

    if (source >= 0xfffffffu) return mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "too many files");
    switch (c->desc.format) {
    case MFT_DATA_AUTO:   s = mft__guess_format(c, path, &kind); break;
    case MFT_DATA_TEXT:   kind = MFT__FROM_TEXT;   break;
    case MFT_DATA_JSONL:  kind = MFT__FROM_JSONL;  break;
    case MFT_DATA_MMLU:   kind = MFT__FROM_MMLU;   break;
    case MFT_DATA_TOKENS: kind = MFT__FROM_TOKENS; break;
    }
    if (s != MFT_OK) return s;
    src = mft__source_add(c, kind, path);
    if (!src) return MFT_ERR_OUT_OF_MEMORY;
    c->where = src->path; c->where_line = 0; c->told = 0;
    s = mft__source_open(c, source);
    if (s == MFT_OK) {
        src->bytes = c->file.bytes;
        s = c->desc.index_dir && src->bytes >= c->desc.index_above && c->users == 1 ? mft__index_load(ds, source) : mft__load_source(ds, source);
    }
    if (s == MFT_OK && c->desc.assistant_loss_only && src->kind != MFT__FROM_MESSAGES)
        s = mft__data_fail(c, MFT_ERR_INVALID_ARGUMENT, "loss on assistant turns only was asked for, but this is %s", mft__source_name(src->kind));
    c->where = NULL;
    return s;
}

/* The names that a split's files and directories have. */
static const char *const mft__split_names[3][6] = {
    { "train", NULL },
    { "valid", "validation", "val", "dev", NULL },
    { "test", NULL }
};
static const char *const mft__mmlu_names[3][4] = {
    { "auxiliary_train", "train", "dev", NULL },                /* the benchmark has no training split of its own */
    { "val", "valid", "validation", NULL },
    { "test", NULL }
};

static mft_status mft__load_csv_dir(mft_dataset *ds, const char *dir, int *out_found)
{
    mft_context *ctx = ds->corpus->ctx;
    char       **names;
    size_t       i, n;
    mft_status   s = mft__dir_list(ctx, dir, ".csv", &names, &n);
    for (i = 0; i < n && s == MFT_OK; i++) {
        char *path = mft__path_join(ctx, dir, names[i]);
        s = path ? mft__load_file(ds, path) : MFT_ERR_OUT_OF_MEMORY;
        mft__strfree(ctx, path);
        *out_found = 1;
    }
    mft__dir_list_free(ctx, names, n);
    return s;
}

static mft_status mft__load_dir(mft_dataset *ds, const char *dir)
{
    mft__corpus    *c = ds->corpus;
    mft_data_format format = c->desc.format;
    int             split = 0, i, found = 0;
    char            name[32], *path;
    mft_status      s = MFT_OK;

    while (split < 2 && strcmp(c->desc.split, mft__split_names[split][0]) != 0) split++;
    for (i = 0; mft__split_names[split][i] && !found && s == MFT_OK && (format == MFT_DATA_AUTO || format == MFT_DATA_JSONL); i++) {
        snprintf(name, sizeof name, "%s.jsonl", mft__split_names[split][i]);
        path = mft__path_join(c->ctx, dir, name);
        if (!path) return MFT_ERR_OUT_OF_MEMORY;
        found = mft__file_exists(c->ctx, path);
        if (found) s = mft__load_file(ds, path);
        mft__strfree(c->ctx, path);
    }
    for (i = 0; mft__mmlu_names[split][i] && !found && s == MFT_OK && (format == MFT_DATA_AUTO || format == MFT_DATA_MMLU); i++) {
        path = mft__path_join(c->ctx, dir, mft__mmlu_names[split][i]);
        if (!path) return MFT_ERR_OUT_OF_MEMORY;
        if (mft__file_kind(path) == MFT__DIRECTORY) s = mft__load_csv_dir(ds, path, &found);
        mft__strfree(c->ctx, path);
    }
    if (!found && s == MFT_OK && (format == MFT_DATA_AUTO || format == MFT_DATA_MMLU)) s = mft__load_csv_dir(ds, dir, &found);
    if (!found && s == MFT_OK)
        s = mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "%s: no %s.jsonl, no directory of MMLU's CSV files and no CSV file in it", mft__path(dir), c->desc.split);
    return s;
}

MFT_API mft_status mft_dataset_load(mft_dataset *ds, const char *path)
{
    mft__dataset_mark before;
    mft_status        s;
    if (!ds || !path) return MFT_ERR_INVALID_ARGUMENT;
    if (ds->started) return mft__fail(ds->corpus->ctx, MFT_ERR_INVALID_ARGUMENT, "%s: nothing can be added once batches were taken", mft__path(path));
    before = mft__dataset_remember(ds);
    s = !ds->corpus->ctx->io.open && mft__file_kind(path) == MFT__DIRECTORY ? mft__load_dir(ds, path) : mft__load_file(ds, path);
    if (s != MFT_OK) mft__dataset_undo(ds, &before);
    return s;
}

/* The source of what calls add: the last one, if it is of that kind. */
static mft_status mft__calls_source(mft_dataset *ds, mft__sample *out)
{
    mft__corpus *c = ds->corpus;
    if (ds->started) return mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "nothing can be added once batches were taken");
    c->where = NULL; c->where_line = 0;
    memset(out, 0, sizeof *out);
    if ((!c->n_sources || c->sources[c->n_sources - 1].kind != MFT__FROM_CALLS) && !mft__source_add(c, MFT__FROM_CALLS, NULL))
        return MFT_ERR_OUT_OF_MEMORY;
    out->source = (unsigned)(c->n_sources - 1) & 0xfffffffu;
    return MFT_OK;
}

/* Adds the document that was made with status s. */
static mft_status mft__add_made(mft_dataset *ds, mft_status s, mft__sample sample, int goes_on)
{
    mft__dataset_mark before = mft__dataset_remember(ds);
    if (s == MFT_OK) s = mft__document_add(ds, sample, goes_on);
    if (s != MFT_OK) mft__dataset_undo(ds, &before);
    return s;
}

MFT_API mft_status mft_dataset_add_text(mft_dataset *ds, const char *text, int64_t bytes)
{
    mft__sample sample;
    mft_status  s;
    if (!ds || !text) return MFT_ERR_INVALID_ARGUMENT;
    s = mft__calls_source(ds, &sample);
    if (bytes < 0) bytes = (int64_t)strlen(text);
    if (s == MFT_OK) s = mft__data_utf8(ds->corpus, text, (size_t)bytes, 1);
    if (s == MFT_OK) s = mft__doc_text(ds->corpus, text, (size_t)bytes);
    return mft__add_made(ds, s, sample, 1);
}

MFT_API mft_status mft_dataset_add_chat(mft_dataset *ds, const mft_message *messages, int n)
{
    mft__sample sample;
    mft_chat    chat;
    mft_status  s;
    if (!ds || !messages || n < 1) return MFT_ERR_INVALID_ARGUMENT;
    memset(&chat, 0, sizeof chat);
    chat.messages = messages; chat.n_messages = n; chat.now = ds->corpus->desc.now;
    s = mft__calls_source(ds, &sample);
    if (s == MFT_OK) s = mft__doc_chat(ds->corpus, &chat, 0);
    return mft__add_made(ds, s, sample, 0);
}

MFT_API mft_status mft_dataset_add_tokens(mft_dataset *ds, const int32_t *ids, const int32_t *labels, int64_t n)
{
    mft__sample sample;
    mft_status  s;
    if (!ds || !ids || n < 1) return MFT_ERR_INVALID_ARGUMENT;
    s = mft__calls_source(ds, &sample);
    if (s == MFT_OK && !mft__doc_room(ds->corpus, (size_t)n)) s = MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK) {
        memcpy(ds->corpus->doc.ids, ids, (size_t)n * sizeof *ids);
        memcpy(ds->corpus->doc.labels, labels ? labels : ids, (size_t)n * sizeof *ids);
        ds->corpus->doc.n = (size_t)n;
    }
    return mft__add_made(ds, s, sample, 0);
}

/* ---- from samples to rows to batches ---- */

/* The record of sample i. One from a file is looked at as what it is: bytes from outside. */
static mft_status mft__sample_get(mft_dataset *ds, uint64_t i, mft__sample *out)
{
    const mft__corpus *c = ds->corpus;
    const mft__source *src;
    uint64_t           from, n;
    mft_status         s = mft__table_get(&ds->samples, i, 1, out);
    if (s != MFT_OK || i >= ds->samples.n_filed) return s;
    if (out->source >= c->n_sources || out->n < 1 || out->n > c->desc.max_seq_len || out->n_valid < 0 || out->n_valid >= out->n || (!i && out->joined))
        return mft__table_damaged(c->ctx, &ds->samples, i);
    src = &c->sources[out->source];
    n   = (uint64_t)out->n;
    if      (out->held)                     { from = c->ids.n; n *= out->labeled ? 2 : 1; }
    else if (src->kind == MFT__FROM_TOKENS) from = src->bytes / 4;
    else                                    { from = src->bytes; n = out->bytes; }
    if (out->at > from || n > from - out->at || (!out->held && !src->path)) return mft__table_damaged(c->ctx, &ds->samples, i);
    return MFT_OK;
}

/* Which part of its line sample i is: how many joined ones stand before it. */
static mft_status mft__sample_part(mft_dataset *ds, uint64_t i, const mft__sample *s, int *out)
{
    mft__sample before = *s;
    mft_status  status = MFT_OK;
    for (*out = 0; status == MFT_OK && before.joined && *out < 1000000; ++*out) status = mft__sample_get(ds, --i, &before);
    return status;
}

/* Are the first tokens of c->doc what they were when the sample was loaded, as far as its record can tell? */
static int mft__sample_same(const mft_dataset *ds, const mft__sample *s)
{
    const mft__document *d = &ds->corpus->doc;
    int64_t              vocab = ds->corpus->desc.vocab_size ? ds->corpus->desc.vocab_size : (int64_t)INT32_MAX + 1;
    int32_t              i, valid = 0;
    for (i = 0; i < s->n; i++) {
        if (d->ids[i] < 0 || d->ids[i] > ds->info.max_id || (d->labels[i] != -100 && (d->labels[i] < 0 || d->labels[i] >= vocab))) return 0;
        valid += i && d->labels[i] != -100;
    }
    return valid == s->n_valid;
}

/* c->doc = the tokens of a sample that is not held, uncut for lines. */
static mft_status mft__sample_read(mft_dataset *ds, uint64_t i, const mft__sample *s)
{
    mft__corpus *c = ds->corpus;
    mft__source *src = &c->sources[s->source];
    size_t       n = (size_t)s->n;
    int          part, parts;
    mft_status   status = mft__source_open(c, s->source);

    if (status == MFT_OK && c->file.bytes != src->bytes) {
        status = mft__data_fail(c, MFT_ERR_FORMAT, "changed while it was in use: %llu bytes long, was %llu",
                                (unsigned long long)c->file.bytes, (unsigned long long)src->bytes);
        mft__source_shut(c);                                    /* so that the next attempt looks again */
    }
    if (status != MFT_OK) return status;
    if (src->kind == MFT__FROM_TOKENS) {
        status = mft__file_read(&c->file, s->at * 4, c->doc.ids, n * 4);
        if (status == MFT_OK) memcpy(c->doc.labels, c->doc.ids, n * sizeof *c->doc.ids);
        c->doc.n = n;
        return status;
    }
    if ((status = mft__sample_part(ds, i, s, &part)) != MFT_OK) return status;
    if (s->bytes > c->cap_line) {
        void *p = c->line;
        int   ok = mft__grow(c->ctx, &p, &c->cap_line, s->bytes, 1);
        c->line = (char *)p;
        if (!ok) return MFT_ERR_OUT_OF_MEMORY;
    }
    status = mft__file_read(&c->file, s->at, c->line, s->bytes);
    if (status == MFT_OK) status = mft__record_document(c, src, c->line, s->bytes, part, &parts);
    if (status == MFT_OK && (part >= parts || c->doc.n < n || (c->doc.n > n && !s->truncated))) c->doc.n = 0;
    return status;
}

/* c->doc = the tokens of sample i again, and its record. */
static mft_status mft__sample_make(mft_dataset *ds, uint64_t i, mft__sample *out)
{
    mft__corpus *c = ds->corpus;
    mft_status   s = mft__sample_get(ds, i, out);
    size_t       n;

    if (s != MFT_OK) return s;
    n = (size_t)out->n;
    if (!mft__doc_room(c, n)) return MFT_ERR_OUT_OF_MEMORY;
    c->where = c->sources[out->source].path; c->where_line = 0;
    if (out->held) {
        s = mft__table_get(&c->ids, out->at, n, c->doc.ids);
        if (s == MFT_OK) s = mft__table_get(&c->ids, out->at + (out->labeled ? n : 0), n, c->doc.labels);
        c->doc.n = n;
        if (s == MFT_OK && c->ids.n_filed && !mft__sample_same(ds, out)) s = mft__table_damaged(c->ctx, &c->ids, out->at);
        return s;
    }
    s = mft__sample_read(ds, i, out);
    if (s == MFT_OK && (c->doc.n < n || !mft__sample_same(ds, out)))
        s = mft__data_fail(c, MFT_ERR_FORMAT, "changed while it was in use: what is at %s %llu makes other tokens than before",
                           c->sources[out->source].kind == MFT__FROM_TOKENS ? "token" : "byte", (unsigned long long)out->at);
    return s;
}

/* The sample at place p of the order in which rows are filled. */
static uint64_t mft__order(const mft_dataset *ds, uint64_t p)
{
    const mft_dataset_desc *d = &ds->corpus->desc;
    return d->no_shuffle ? p : mft__permute(d->seed, MFT__STREAM_PACK, ds->samples.n, p);
}

/* The i-th row of an epoch. */
static uint64_t mft__epoch_row(const mft_dataset *ds, int64_t epoch, int64_t i)
{
    const mft_dataset_desc *d = &ds->corpus->desc;
    return d->no_shuffle ? (uint64_t)i : mft__permute(d->seed, (uint64_t)epoch, ds->n_rows, (uint64_t)i);
}

static int32_t mft__data_pad_id(const mft__corpus *c)
{
    int32_t id = c->tok ? mft_tokenizer_pad_id(c->tok) : 0;
    if (id < 0) id = mft_tokenizer_eos_id(c->tok);
    return id < 0 || (c->desc.vocab_size && id >= c->desc.vocab_size) ? 0 : id;
}

/* Samples without a label that counts teach nothing; in the order of the file they keep their place. */
static int mft__is_used(const mft_dataset *ds, const mft__sample *s) { return s->n_valid > 0 || ds->corpus->desc.no_shuffle; }

/* Fills rows: as many samples as fit, in order. */
static mft_status mft__pack_rows(mft_dataset *ds)
{
    const mft_dataset_desc *d = &ds->corpus->desc;
    mft_context *ctx = ds->corpus->ctx;
    mft__sample  sample;
    uint64_t     p;
    int64_t      used = 0;
    mft_status   s = MFT_OK;

    for (p = 0; p < ds->samples.n && s == MFT_OK; p++) {
        if (p % MFT__TABLE_BLOCK == 0 && mft__cancelled(ctx)) return mft__fail(ctx, MFT_ERR_CANCELLED, "cancelled");
        s = mft__sample_get(ds, mft__order(ds, p), &sample);
        if (s != MFT_OK || !mft__is_used(ds, &sample)) continue;
        if (used && !d->no_pack && used + sample.n <= d->max_seq_len) { used += sample.n; continue; }
        s = mft__table_put(ctx, &ds->rows, &p, 1);
        used = sample.n;
    }
    return s == MFT_OK ? mft__table_put(ctx, &ds->rows, &p, 1) : s;        /* the last one ends the last row */
}

/* The same once, where the samples are: in memory, or in a file that may be there already. */
static mft_status mft__pack(mft_dataset *ds)
{
    const mft_dataset_desc *d = &ds->corpus->desc;
    mft_context      *ctx = ds->corpus->ctx;
    mft__index_header h;
    uint64_t          key = mft__data_mix(mft__data_mix(mft__data_mix(ds->info.fingerprint, ds->samples.n), (uint64_t)d->max_seq_len),
                                          (uint64_t)((d->no_pack ? 1 : 0) | (d->no_shuffle ? 2 : 0)));
    int               filed = ds->index && ds->samples.n_filed;
    mft_status        s = MFT_OK;

    if (ds->packed) return MFT_OK;
    mft__table_free(ctx, &ds->rows);
    key = mft__data_mix(key, d->no_shuffle ? 0 : d->seed);
    if (!filed || !mft__index_find(ctx, &ds->rows, ds->index, ".rows", key, &h)) {
        if (filed) s = mft__index_begin(ctx, &ds->rows, ds->index, ".rows");
        if (s == MFT_OK) s = mft__pack_rows(ds);
        memset(&h, 0, sizeof h);
        h.key = key;
        if (s == MFT_OK && filed) s = mft__table_end(ctx, &ds->rows, &h);
    }
    if (s == MFT_OK && !ds->rows.n) s = mft__table_damaged(ctx, &ds->rows, 0);
    if (s != MFT_OK) { mft__table_free(ctx, &ds->rows); return s; }
    ds->n_rows = ds->rows.n - 1;
    ds->packed = 1;
    return MFT_OK;
}

/* A row: the places of the order that it takes, its tokens, and how many samples they are. */
typedef struct mft__row { uint64_t from, to; int64_t n; int documents; } mft__row;
static mft_status mft__row_get(mft_dataset *ds, uint64_t row, mft__row *out)
{
    mft__sample sample;
    uint64_t    ends[2], p;
    mft_status  s = mft__table_get(&ds->rows, row, 2, ends);
    out->from = ends[0]; out->to = ends[1]; out->n = 0; out->documents = 0;
    if (s == MFT_OK && (ends[0] >= ends[1] || ends[1] > ds->samples.n)) return mft__table_damaged(ds->corpus->ctx, &ds->rows, row);
    for (p = out->from; p < out->to && s == MFT_OK; p++) {
        s = mft__sample_get(ds, mft__order(ds, p), &sample);
        if (s != MFT_OK || !mft__is_used(ds, &sample)) continue;
        out->n += sample.n;
        out->documents++;
        if (out->n > ds->corpus->desc.max_seq_len) return mft__table_damaged(ds->corpus->ctx, &ds->rows, row);
    }
    return s;
}

MFT_API mft_status mft_dataset_next(mft_dataset *ds, int batch, mft_batch *out)
{
    mft__corpus            *c;
    const mft_dataset_desc *d;
    mft__row   row;
    int32_t   *ids, *labels, *mask, *positions, *documents;
    int64_t    epoch, first, left, seq = 0;
    int        b, n, padded = 0, packed = 0;
    size_t     i, most, cells;
    uint64_t   p;
    mft_status s;

    if (!ds || !out || batch < 1) return MFT_ERR_INVALID_ARGUMENT;
    c = ds->corpus; d = &c->desc;
    memset(out, 0, sizeof *out);
    s = mft__pack(ds);
    if (s != MFT_OK) return s;
    if (!ds->info.n_supervised)
        return mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, ds->samples.n ? "the dataset has no token to learn from: every label is masked" : "the dataset is empty");
    if (d->drop_last && (int64_t)ds->n_rows < batch)
        return mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "the dataset has %llu rows, fewer than a batch of %d, and the last batch is to be dropped",
                         (unsigned long long)ds->n_rows, batch);

    epoch = ds->epoch; first = ds->row;
    left = (int64_t)ds->n_rows - first;
    if (left <= 0 || (d->drop_last && left < batch)) { epoch++; first = 0; left = (int64_t)ds->n_rows; }
    n = left < batch ? (int)left : batch;

    for (b = 0; b < n; b++) {
        s = mft__row_get(ds, mft__epoch_row(ds, epoch, first + b), &row);
        if (s != MFT_OK) return s;
        if (b && row.n != seq) padded = 1;
        if (row.n > seq) seq = row.n;
        packed |= row.documents > 1;
    }
    if (!mft__mul_size((size_t)batch, (size_t)d->max_seq_len * 5, &most) || !mft__mul_size(most, sizeof *ds->batch, &i))
        return mft__fail(c->ctx, MFT_ERR_OUT_OF_MEMORY, "a batch of %d rows of %d tokens does not fit an address space", batch, d->max_seq_len);
    if (most > ds->cap_batch) {                                 /* once for all: the largest there can be */
        mft__free(c->ctx, ds->batch, ds->cap_batch * sizeof *ds->batch);
        ds->cap_batch = 0;
        ds->batch = (int32_t *)mft__alloc(c->ctx, most * sizeof *ds->batch);
        if (!ds->batch) return MFT_ERR_OUT_OF_MEMORY;
        ds->cap_batch = most;
    }
    cells = (size_t)n * (size_t)seq;
    ids = ds->batch; labels = ids + cells; mask = labels + cells; positions = mask + cells; documents = positions + cells;
    for (b = 0; b < n; b++) {
        size_t  at = (size_t)b * (size_t)seq, end = at + (size_t)seq;
        int32_t document = 0, pad = mft__data_pad_id(c);
        s = mft__row_get(ds, mft__epoch_row(ds, epoch, first + b), &row);
        for (p = row.from; s == MFT_OK && p < row.to; p++) {
            uint64_t    sample = mft__order(ds, p);
            mft__sample record;
            size_t      k;
            int32_t     j;
            s = mft__sample_get(ds, sample, &record);
            if (s != MFT_OK || !mft__is_used(ds, &record)) continue;
            s = mft__sample_make(ds, sample, &record);
            if (s != MFT_OK) break;
            k = (size_t)record.n;
            if (k > end - at) { s = mft__table_damaged(c->ctx, &ds->samples, sample); break; }
            memcpy(ids + at, c->doc.ids, k * sizeof *ids);
            memcpy(labels + at, c->doc.labels, k * sizeof *ids);
            labels[at] = -100;                                  /* nothing before it predicts it */
            for (j = 0; j < (int32_t)k; j++, at++) { mask[at] = 1; positions[at] = j; documents[at] = document; }
            document++;
        }
        if (s != MFT_OK) { memset(out, 0, sizeof *out); return s; }
        for (; at < end; at++) { ids[at] = pad; labels[at] = -100; mask[at] = positions[at] = 0; documents[at] = document; }
    }
    out->input_ids = ids; out->labels = labels;
    out->attention_mask = padded ? mask : NULL;
    out->position_ids   = packed ? positions : NULL;
    out->document_ids   = packed ? documents : NULL;
    out->batch = n; out->seq = (int)seq;
    ds->epoch = epoch; ds->row = first + n;
    ds->started = 1;
    return MFT_OK;
}

MFT_API int64_t mft_dataset_epoch_batches(mft_dataset *ds, int batch)
{
    mft_status s;
    if (!ds || batch < 1) return MFT_ERR_INVALID_ARGUMENT;
    s = mft__pack(ds);
    if (s != MFT_OK) return s;
    return ((int64_t)ds->n_rows + (ds->corpus->desc.drop_last ? 0 : batch - 1)) / batch;
}

MFT_API void mft_dataset_get_position(const mft_dataset *ds, mft_dataset_position *out)
{
    if (!out) return;
    out->epoch = ds ? ds->epoch : 0;
    out->row   = ds ? ds->row : 0;
}

MFT_API mft_status mft_dataset_set_position(mft_dataset *ds, const mft_dataset_position *position)
{
    mft_status s;
    if (!ds || !position) return MFT_ERR_INVALID_ARGUMENT;
    s = mft__pack(ds);
    if (s != MFT_OK) return s;
    if (position->epoch < 0 || position->row < 0 || position->row > (int64_t)ds->n_rows)
        return mft__fail(ds->corpus->ctx, MFT_ERR_INVALID_ARGUMENT, "position: epoch %lld, row %lld, but the dataset has %llu rows",
                         (long long)position->epoch, (long long)position->row, (unsigned long long)ds->n_rows);
    ds->epoch = position->epoch; ds->row = position->row;
    return MFT_OK;
}

/* ---- splitting ---- */

/* A side of a split while it is made: tables and counts of its own, which a dataset then takes. */
typedef struct mft__side {
    mft__table       samples;
    mft_dataset_info info;
    uint64_t         n_groups;
    char            *index;                 /* NULL: in memory                                           */
    uint64_t         key;
} mft__side;

static void mft__side_free(mft_context *ctx, mft__side *side)
{
    mft__table_free(ctx, &side->samples);
    mft__strfree(ctx, side->index);
}

/* The dataset takes the side, and leaves it its own. */
static void mft__side_take(mft_dataset *ds, mft__side *side)
{
    mft__side was = *side;
    side->samples = ds->samples; side->index = ds->index;
    ds->samples = was.samples;   ds->index = was.index;
    ds->info = was.info; ds->n_groups = was.n_groups;
    ds->packed = 0;
}

/* Deals the samples out to sides[0], what is kept, and sides[1], groups by the seed. */
static mft_status mft__split_deal(mft_dataset *ds, mft__side sides[2], uint64_t take)
{
    mft__corpus *c = ds->corpus;
    mft__sample  block[MFT__TABLE_BLOCK];
    uint64_t     i, group = (uint64_t)-1;
    size_t       k, n;
    mft_status   s = MFT_OK;
    for (i = 0; i < ds->samples.n && s == MFT_OK; i += n) {
        n = ds->samples.n - i < MFT__TABLE_BLOCK ? (size_t)(ds->samples.n - i) : (size_t)MFT__TABLE_BLOCK;
        if (mft__cancelled(c->ctx)) return mft__fail(c->ctx, MFT_ERR_CANCELLED, "cancelled");
        s = mft__table_get(&ds->samples, i, n, block);
        for (k = 0; k < n && s == MFT_OK; k++) {
            mft__side *side;
            group += !block[k].joined;
            if (group >= ds->n_groups) return mft__table_damaged(c->ctx, &ds->samples, i + k);
            side = &sides[mft__permute(c->desc.seed, MFT__STREAM_SPLIT, ds->n_groups, group) < take];
            mft__sample_count(&side->info, &side->n_groups, &block[k]);
            s = mft__table_put(c->ctx, &side->samples, &block[k], 1);
        }
    }
    return s;
}

/* Both sides: as they were found, or dealt out anew. */
static mft_status mft__split_sides(mft_dataset *ds, mft__side sides[2], uint64_t take)
{
    static const char *const names[2] = { ".kept", ".held" };
    mft_context      *ctx = ds->corpus->ctx;
    mft__index_header h[2];
    int               k, filed = ds->index && ds->samples.n_filed, found = filed;
    mft_status        s = MFT_OK;
    for (k = 0; k < 2 && filed; k++) {
        if (!(sides[k].index = mft__text_join(ctx, ds->index, names[k]))) return MFT_ERR_OUT_OF_MEMORY;
        found &= mft__index_find(ctx, &sides[k].samples, sides[k].index, ".samples", sides[k].key, &h[k]);
    }
    if (found) {
        for (k = 0; k < 2; k++) mft__index_hear(&h[k], &sides[k].info, &sides[k].n_groups);
        return MFT_OK;
    }
    for (k = 0; k < 2 && s == MFT_OK; k++) {
        mft__table_free(ctx, &sides[k].samples);
        if (filed) s = mft__index_begin(ctx, &sides[k].samples, sides[k].index, ".samples");
    }
    if (s == MFT_OK) s = mft__split_deal(ds, sides, take);
    for (k = 0; k < 2 && s == MFT_OK && filed; k++) {
        mft__index_say(&sides[k].info, sides[k].n_groups, &h[k]);
        h[k].key = sides[k].key;
        s = mft__table_end(ctx, &sides[k].samples, &h[k]);
    }
    return s;
}

MFT_API mft_status mft_dataset_split(mft_dataset *ds, double ratio, mft_dataset **out_held_out)
{
    mft__corpus *c;
    mft_dataset *other;
    mft__side    sides[2];
    uint64_t     take, ratio_bits;
    int          k;
    mft_status   s;

    if (out_held_out) *out_held_out = NULL;
    if (!ds || !out_held_out) return MFT_ERR_INVALID_ARGUMENT;
    c = ds->corpus;
    if (!(ratio > 0 && ratio < 1)) return mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "a split of %g: it must be between 0 and 1", ratio);
    if (ds->started) return mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "a dataset cannot be split once batches were taken");
    take = (uint64_t)((double)ds->n_groups * ratio);
    if (!take) take = 1;
    if (ds->n_groups < 2)
        return mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "%llu sample%s cannot be split", (unsigned long long)ds->n_groups, ds->n_groups == 1 ? "" : "s");

    other = mft__dataset_over(c);
    if (!other) return MFT_ERR_OUT_OF_MEMORY;
    memcpy(&ratio_bits, &ratio, sizeof ratio);
    memset(sides, 0, sizeof sides);
    for (k = 0; k < 2; k++) {
        mft_dataset_info *info = &sides[k].info;
        sides[k].samples.size = ds->samples.size;
        *info = ds->info;
        info->n_tokens = info->n_supervised = info->n_truncated = info->n_unsupervised = 0;
        if (k) info->n_bad_lines = 0;
        info->fingerprint = mft__data_mix(mft__data_mix(ds->info.fingerprint, ratio_bits), (uint64_t)k);
        sides[k].key = mft__data_mix(mft__data_mix(info->fingerprint, ds->samples.n), c->desc.seed);
    }
    s = mft__split_sides(ds, sides, take);
    if (s == MFT_OK && (!sides[0].info.n_supervised || !sides[1].info.n_supervised))
        s = mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "a split of %g leaves one side without any token to learn from", ratio);
    if (s == MFT_OK) {
        mft__side_take(ds, &sides[0]);
        mft__side_take(other, &sides[1]);
        *out_held_out = other;
    } else mft_dataset_destroy(other);
    for (k = 0; k < 2; k++) mft__side_free(c->ctx, &sides[k]);
    return s;
}

/* ---- what is in it ---- */
MFT_API mft_status mft_dataset_report(mft_dataset *ds, mft_dataset_info *out)
{
    const mft__corpus      *c;
    const mft_dataset_desc *d;
    const mft__table       *tables[3];
    size_t     i;
    uint64_t   h;
    mft_status s;

    if (!ds || !out) return MFT_ERR_INVALID_ARGUMENT;
    s = mft__pack(ds);
    if (s != MFT_OK) return s;
    c = ds->corpus; d = &c->desc;
    *out = ds->info;
    out->n_samples = (int64_t)ds->samples.n; out->n_rows = (int64_t)ds->n_rows;
    tables[0] = &ds->samples; tables[1] = &ds->rows; tables[2] = &c->ids;
    for (i = 0; i < 3; i++) if (tables[i]->path) out->index_bytes += tables[i]->file.bytes;
    out->format = c->n_sources ? mft__source_name(c->sources[0].kind) : "nothing";
    for (i = 1; i < c->n_sources; i++) if (c->sources[i].kind != c->sources[0].kind) out->format = "mixed";
    h = mft__data_mix(mft__data_mix(ds->info.fingerprint, (uint64_t)d->max_seq_len), d->seed);
    out->fingerprint = mft__data_mix(h, (uint64_t)((d->no_pack ? 1 : 0) | (d->no_shuffle ? 2 : 0) | (d->drop_last ? 4 : 0)));
    return MFT_OK;
}

/* Copies n bytes to where the text stands, as far as there is room; *at counts all. */
static void mft__put_capped(char *text, int64_t cap, int64_t *at, const char *s, int64_t n)
{
    if (n > 0 && text && *at < cap) memcpy(text + *at, s, (size_t)(n < cap - *at ? n : cap - *at));
    *at += n > 0 ? n : 0;
}

MFT_API int64_t mft_dataset_sample_text(mft_dataset *ds, int64_t index, const char *open, const char *close, char *text, int64_t cap)
{
    mft__corpus   *c;
    mft__document *d;
    mft__sample    sample;
    int64_t        n, all, i, from = 0, at = 0;
    int            trained = 0;
    mft_status     s;

    if (!ds || !open || !close || cap < 0 || (cap && !text)) return MFT_ERR_INVALID_ARGUMENT;
    c = ds->corpus; d = &c->doc;
    if (!c->tok) return mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "a sample has no text without a tokenizer");
    if (index < 0 || index >= (int64_t)ds->samples.n)
        return mft__fail(c->ctx, MFT_ERR_INVALID_ARGUMENT, "sample %lld of %llu", (long long)index, (unsigned long long)ds->samples.n);
    s = mft__sample_make(ds, (uint64_t)index, &sample);
    if (s != MFT_OK) return s;
    n   = sample.n;
    all = mft_tokenizer_decode(c->tok, d->ids, n, 0, NULL, 0);
    if (all < 0) return all;
    c->n_text = 0;
    {
        void *p = c->text;
        int   ok = mft__grow(c->ctx, &p, &c->cap_text, (size_t)all + 1, 1);
        c->text = (char *)p;
        if (!ok) return MFT_ERR_OUT_OF_MEMORY;
    }
    mft_tokenizer_decode(c->tok, d->ids, n, 0, c->text, all);
    for (i = 0; i <= n; i++) {                                  /* a mark wherever the labels begin or end to count */
        int     now = i < n && i > 0 && d->labels[i] != -100;
        int64_t here;
        if (now == trained && i < n) continue;
        here = i < n ? mft_tokenizer_decode(c->tok, d->ids, i, 0, NULL, 0) : all;
        if (here < 0) return here;
        if (here > all) here = all;                             /* a cut character may take more bytes than a whole one */
        if (here < from) here = from;
        mft__put_capped(text, cap, &at, c->text + from, here - from);
        from = here;
        if (now != trained) {
            const char *mark = now ? open : close;
            mft__put_capped(text, cap, &at, mark, (int64_t)strlen(mark));
        }
        trained = now;
    }
    if (at < cap) text[at] = '\0';
    return at;
}

/* ==============================================================================
 * MARK: - [CONFIG-JSON] config.json, in the forms of transformers 4 and 5
 *
 *   rule  every field that changes a number is read or refused; the rest (dropouts, which fine-tuning
 *         leaves off here, caches, summaries) does not concern us
 * ============================================================================== */

/* A family's own facts; what it computes from them stands in [FAMILIES]. */
typedef struct mft__family_config {
    const char *name;                       /* ours                                                  */
    const char *model_types[3];             /* config.json's `model_type`                            */
    const char *lora_targets;
    int         tied;                       /* tie_word_embeddings when the config is silent         */
    int         activation;
    const char *activation_key;
} mft__family_config;

enum { MFT__ACT_SILU, MFT__ACT_GELU_TANH, MFT__ACT_GELU, MFT__ACT_RELU };

static const mft__family_config mft__family_configs[MFT_N_FAMILIES] = {
    { "gpt2",    { "gpt2", NULL, NULL },               "c_attn,attn.c_proj",          1, MFT__ACT_GELU_TANH, "activation_function" },
    { "llama",   { "llama", NULL, NULL },              "q_proj,k_proj,v_proj,o_proj", 0, MFT__ACT_SILU,      "hidden_act" },
    { "mistral", { "mistral", NULL, NULL },            "q_proj,k_proj,v_proj,o_proj", 0, MFT__ACT_SILU,      "hidden_act" },
    { "qwen2",   { "qwen2", NULL, NULL },              "q_proj,k_proj,v_proj,o_proj", 0, MFT__ACT_SILU,      "hidden_act" },
    { "qwen3",   { "qwen3", NULL, NULL },              "q_proj,k_proj,v_proj,o_proj", 0, MFT__ACT_SILU,      "hidden_act" },
    { "gemma3",  { "gemma3_text", "gemma3", NULL },    "q_proj,k_proj,v_proj,o_proj", 1, MFT__ACT_GELU_TANH, "hidden_activation" }
};

MFT_API const char *mft_family_name(mft_family family)
{
    return family >= 0 && family < MFT_N_FAMILIES ? mft__family_configs[family].name : "unknown";
}

MFT_API const char *mft_family_lora_targets(mft_family family)
{
    return family >= 0 && family < MFT_N_FAMILIES ? mft__family_configs[family].lora_targets : "";
}

/* Reads one config, keeping the first thing that is wrong with it. */
typedef struct mft__config_reader {
    mft_context    *ctx;
    const char     *path;
    const mft_json *root;
    mft_status      status;
} mft__config_reader;

/* An integer in [low, high]; `required` or the fallback. */
static int64_t mft__config_int(mft__config_reader *r, const char *key, int64_t low, int64_t high, int required, int64_t fallback)
{
    const mft_json *node = mft_json_get(r->root, key);
    int64_t         v;
    if (mft_json_type(node) == MFT_JSON_NULL) {
        if (required && r->status == MFT_OK) r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: \"%s\" is missing", r->path, key);
        return fallback;
    }
    v = mft_json_integer(node, INT64_MIN);
    if ((v < low || v > high) && r->status == MFT_OK) {
        r->status = v == INT64_MIN ? mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: \"%s\" is not an integer", r->path, key)
                                   : mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: \"%s\" is %lld, not in %lld..%lld", r->path, key, (long long)v, (long long)low, (long long)high);
        return fallback;
    }
    return v;
}

static double mft__config_number(mft__config_reader *r, const mft_json *object, const char *key, double fallback)
{
    const mft_json *node = mft_json_get(object, key);
    if (mft_json_type(node) == MFT_JSON_NULL) return fallback;
    if (mft_json_type(node) != MFT_JSON_NUMBER && r->status == MFT_OK)
        r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: \"%s\" is not a number", r->path, key);
    return mft_json_number(node, fallback);
}

static int mft__config_bool(mft__config_reader *r, const mft_json *object, const char *key, int fallback)
{
    const mft_json *node = mft_json_get(object, key);
    if (mft_json_type(node) != MFT_JSON_NULL && mft_json_type(node) != MFT_JSON_BOOL && r->status == MFT_OK)
        r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: \"%s\" is neither true nor false", r->path, key);
    return mft_json_bool(node, fallback);
}

/* rope_scaling (old) or one of rope_parameters' objects (new). */
static void mft__config_rope(mft__config_reader *r, const mft_json *node, double theta, mft_rope_config *out)
{
    const char *type = mft_json_string(mft_json_get(node, "rope_type"), NULL);
    if (!type) type = mft_json_string(mft_json_get(node, "type"), NULL);
    out->kind  = MFT_ROPE_PLAIN;
    out->theta = mft__config_number(r, node, "rope_theta", theta);
    if (!(out->theta > 0) && r->status == MFT_OK) r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: \"rope_theta\" is not positive", r->path);
    if (!type || !strcmp(type, "default")) return;
    out->factor = mft__config_number(r, node, "factor", 0);
    if (!strcmp(type, "linear")) out->kind = MFT_ROPE_LINEAR;
    else if (!strcmp(type, "llama3")) {
        int64_t positions = mft_json_integer(mft_json_get(node, "original_max_position_embeddings"), 0);
        out->kind = MFT_ROPE_LLAMA3;
        out->low_freq_factor  = mft__config_number(r, node, "low_freq_factor", 0);
        out->high_freq_factor = mft__config_number(r, node, "high_freq_factor", 0);
        out->original_max_position = positions > 0 && positions <= INT32_MAX ? (int)positions : 0;
        if ((!(out->low_freq_factor > 0) || !(out->high_freq_factor > out->low_freq_factor) || !out->original_max_position) && r->status == MFT_OK)
            r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: llama3 rope needs low_freq_factor, a larger high_freq_factor and original_max_position_embeddings", r->path);
    } else if (r->status == MFT_OK)
        r->status = mft__fail(r->ctx, MFT_ERR_UNSUPPORTED, "%s: rope scaling \"%.40s\" is not supported (default, linear, llama3 are)", r->path, type);
    if (!(out->factor > 0) && r->status == MFT_OK) r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: the rope scaling's \"factor\" is missing or not positive", r->path);
}

/* bos, eos (one or several), pad. */
static void mft__config_special(const mft__config_reader *r, mft_model_config *c)
{
    const mft_json *eos = mft_json_get(r->root, "eos_token_id");
    size_t          i;
    c->bos_token_id = (int32_t)mft_json_integer(mft_json_get(r->root, "bos_token_id"), -1);
    c->pad_token_id = (int32_t)mft_json_integer(mft_json_get(r->root, "pad_token_id"), -1);
    for (i = 0; i < 8; i++) c->eos_token_id[i] = -1;
    if (mft_json_type(eos) == MFT_JSON_ARRAY)
        for (i = 0; i < 8 && i < mft_json_count(eos); i++) c->eos_token_id[i] = (int32_t)mft_json_integer(mft_json_at(eos, i, NULL), -1);
    else c->eos_token_id[0] = (int32_t)mft_json_integer(eos, -1);
}

static void mft__config_activation(mft__config_reader *r, mft_model_config *c)
{
    static const struct { const char *name; int activation; } known[] = {
        { "silu", MFT__ACT_SILU }, { "swish", MFT__ACT_SILU }, { "gelu_new", MFT__ACT_GELU_TANH }, { "gelu_pytorch_tanh", MFT__ACT_GELU_TANH },
        { "gelu", MFT__ACT_GELU }, { "relu", MFT__ACT_RELU }
    };
    const mft__family_config *f = &mft__family_configs[c->family];
    const char *name = mft_json_string(mft_json_get(r->root, f->activation_key), NULL);
    size_t      i;
    c->activation = f->activation;
    if (!name && c->family == MFT_GEMMA3) name = mft_json_string(mft_json_get(r->root, "hidden_act"), NULL);
    if (!name) return;
    for (i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) { c->activation = known[i].activation; return; }
    if (r->status == MFT_OK) r->status = mft__fail(r->ctx, MFT_ERR_UNSUPPORTED, "%s: \"%s\": activation \"%.40s\" is not supported", r->path, f->activation_key, name);
}

/* Which layers slide: `layer_types`, Gemma's pattern, Qwen's max_window_layers, or all (Mistral). slides [n_layer]. */
static void mft__config_sliding(mft__config_reader *r, mft_model_config *c, unsigned char *slides)
{
    const mft_json *types = mft_json_get(r->root, "layer_types");
    int64_t pattern, from;
    int     i, any = 0;
    memset(slides, 0, (size_t)c->n_layer);
    c->sliding_window = (int)mft__config_int(r, "sliding_window", 1, INT32_MAX, 0, c->family == MFT_GEMMA3 ? 4096 : 0);
    if (c->family == MFT_GPT2 || c->family == MFT_LLAMA) c->sliding_window = 0;
    if ((c->family == MFT_QWEN2 || c->family == MFT_QWEN3) && !mft__config_bool(r, r->root, "use_sliding_window", 0)) c->sliding_window = 0;
    if (!c->sliding_window) return;
    if (mft_json_type(types) == MFT_JSON_ARRAY) {
        if (mft_json_count(types) != (size_t)c->n_layer && r->status == MFT_OK) {
            r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: \"layer_types\" has %llu entries for %d layers", r->path, (unsigned long long)mft_json_count(types), c->n_layer);
            return;
        }
        for (i = 0; i < c->n_layer; i++) {
            const char *t = mft_json_string(mft_json_at(types, (size_t)i, NULL), NULL);
            if (t && !strcmp(t, "sliding_attention")) slides[i] = 1;
            else if ((!t || strcmp(t, "full_attention")) && r->status == MFT_OK)
                r->status = mft__fail(r->ctx, MFT_ERR_UNSUPPORTED, "%s: \"layer_types\"[%d] is \"%.40s\" (full_attention, sliding_attention are supported)", r->path, i, t ? t : "?");
        }
    } else if (c->family == MFT_GEMMA3) {
        pattern = mft__config_int(r, "sliding_window_pattern", 1, 1 << 20, 0, mft__config_int(r, "_sliding_window_pattern", 1, 1 << 20, 0, 6));
        for (i = 0; i < c->n_layer; i++) slides[i] = (i + 1) % pattern != 0;
    } else {
        from = c->family == MFT_MISTRAL ? 0 : mft__config_int(r, "max_window_layers", 0, INT32_MAX, 0, 28);
        for (i = 0; i < c->n_layer; i++) slides[i] = i >= from;
    }
    for (i = 0; i < c->n_layer; i++) any |= slides[i];
    if (!any) c->sliding_window = 0;
}

/* The rope of global and sliding layers, in the old and the new form. */
static void mft__config_ropes(mft__config_reader *r, mft_model_config *c)
{
    const mft_json *parameters = mft_json_get(r->root, "rope_parameters");
    const mft_json *full = mft_json_get(parameters, "full_attention"), *local = mft_json_get(parameters, "sliding_attention");
    double theta = c->family == MFT_GEMMA3 ? 1e6 : 1e4;
    if (c->family == MFT_GPT2) return;
    if (mft_json_type(parameters) != MFT_JSON_OBJECT) {
        mft__config_rope(r, mft_json_get(r->root, "rope_scaling"), mft__config_number(r, r->root, "rope_theta", theta), &c->rope);
        mft__config_rope(r, NULL, mft__config_number(r, r->root, "rope_local_base_freq", 1e4), &c->rope_local);
        return;
    }
    mft__config_rope(r, full ? full : parameters, theta, &c->rope);
    mft__config_rope(r, local, 1e4, &c->rope_local);
}

static void mft__config_gpt2(mft__config_reader *r, mft_model_config *c)
{
    c->hidden_size  = mft__config_int(r, "n_embd", 1, 1 << 20, 1, 0);
    c->n_layer      = (int)mft__config_int(r, "n_layer", 1, 1 << 16, 1, 0);
    c->n_head       = (int)mft__config_int(r, "n_head", 1, 1 << 16, 1, 0);
    c->max_position = mft__config_int(r, "n_positions", 1, INT32_MAX, 0, mft__config_int(r, "n_ctx", 1, INT32_MAX, 0, 1024));
    c->intermediate_size = mft__config_int(r, "n_inner", 1, 1 << 24, 0, 4 * c->hidden_size);
    c->norm_eps     = mft__config_number(r, r->root, "layer_norm_epsilon", 1e-5);
    c->n_kv_head    = c->n_head;
    c->qkv_bias = c->o_bias = c->mlp_bias = 1;
    if (c->n_head && c->hidden_size % c->n_head && r->status == MFT_OK)
        r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: n_embd %lld is no multiple of n_head %d", r->path, (long long)c->hidden_size, c->n_head);
    if (c->n_head) c->head_dim = (int)(c->hidden_size / c->n_head);
    if (mft__config_bool(r, r->root, "scale_attn_by_inverse_layer_idx", 0) && r->status == MFT_OK)
        r->status = mft__fail(r->ctx, MFT_ERR_UNSUPPORTED, "%s: \"scale_attn_by_inverse_layer_idx\" is not supported", r->path);
    if (mft__config_bool(r, r->root, "add_cross_attention", 0) && r->status == MFT_OK)
        r->status = mft__fail(r->ctx, MFT_ERR_UNSUPPORTED, "%s: \"add_cross_attention\" is not supported", r->path);
    c->attention_scale = mft__config_bool(r, r->root, "scale_attn_weights", 1) ? 0 : 1;
}

static void mft__config_llama_line(mft__config_reader *r, mft_model_config *c)
{
    int     bias = mft__config_bool(r, r->root, "attention_bias", 0);
    int64_t head_dim;
    double  scalar;
    c->hidden_size       = mft__config_int(r, "hidden_size", 1, 1 << 20, 1, 0);
    c->intermediate_size = mft__config_int(r, "intermediate_size", 1, 1 << 24, 1, 0);
    c->n_layer           = (int)mft__config_int(r, "num_hidden_layers", 1, 1 << 16, 1, 0);
    c->n_head            = (int)mft__config_int(r, "num_attention_heads", 1, 1 << 16, 1, 0);
    c->n_kv_head         = (int)mft__config_int(r, "num_key_value_heads", 1, 1 << 16, 0, c->n_head);
    c->max_position      = mft__config_int(r, "max_position_embeddings", 1, INT32_MAX, 0, 32768);
    c->norm_eps          = mft__config_number(r, r->root, "rms_norm_eps", 1e-6);
    head_dim = c->family == MFT_GEMMA3 ? 256 : c->family == MFT_QWEN3 ? 128 : c->n_head ? c->hidden_size / c->n_head : 0;
    c->head_dim          = (int)mft__config_int(r, "head_dim", 1, 512, 0, head_dim);
    c->qkv_bias          = c->family == MFT_QWEN2 ? 1 : bias;
    c->o_bias            = c->family == MFT_QWEN2 ? 0 : bias;
    c->mlp_bias          = mft__config_bool(r, r->root, "mlp_bias", 0);
    if (r->status == MFT_OK && c->n_head % c->n_kv_head)
        r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: num_attention_heads %d is no multiple of num_key_value_heads %d", r->path, c->n_head, c->n_kv_head);
    if (r->status == MFT_OK && (c->head_dim % 2 || c->head_dim > 512))
        r->status = mft__fail(r->ctx, MFT_ERR_UNSUPPORTED, "%s: a head_dim of %d is not supported (even, up to 512)", r->path, c->head_dim);
    if (c->family != MFT_GEMMA3) return;
    scalar = mft__config_number(r, r->root, "query_pre_attn_scalar", 256);
    if (r->status == MFT_OK && !(scalar > 0)) r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: \"query_pre_attn_scalar\" is not positive", r->path);
    c->attention_scale   = 1 / sqrt(scalar);
    c->attention_softcap = mft__config_number(r, r->root, "attn_logit_softcapping", 0);
    c->logit_softcap     = mft__config_number(r, r->root, "final_logit_softcapping", 0);
    if (mft__config_bool(r, r->root, "use_bidirectional_attention", 0) && r->status == MFT_OK)
        r->status = mft__fail(r->ctx, MFT_ERR_UNSUPPORTED, "%s: \"use_bidirectional_attention\" is not supported", r->path);
}

static double mft__count_params(const mft_model_config *c);

/* The config at `path`. On success c->layer_slides is the caller's, freed with mft__free(ctx, it, n_layer). */
static mft_status mft__config_load(mft_context *ctx, const char *path, mft_model_config *c)
{
    mft__config_reader r;
    mft_json          *root = NULL;
    const char        *type;
    mft_status         s;
    int                family, i, found = -1;

    memset(c, 0, sizeof *c);
    if ((s = mft_json_load(ctx, path, &root)) != MFT_OK) return s;
    r.ctx = ctx; r.path = path; r.root = root; r.status = MFT_OK;
    type = mft_json_string(mft_json_get(root, "model_type"), NULL);
    if (!type) { s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: \"model_type\" is missing", path); goto done; }
    for (family = 0; family < MFT_N_FAMILIES; family++)
        for (i = 0; i < 3; i++)
            if (mft__family_configs[family].model_types[i] && !strcmp(type, mft__family_configs[family].model_types[i])) found = family;
    if (found < 0) {
        s = mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: model_type \"%.40s\" is not supported (gpt2, llama, mistral, qwen2, qwen3, gemma3_text are)", path, type);
        goto done;
    }
    c->family = (mft_family)found;
    snprintf(c->model_type, sizeof c->model_type, "%s", type);
    if (!strcmp(type, "gemma3")) {                              /* multimodal: the text part's own config */
        r.root = mft_json_get(root, "text_config");
        if (!r.root) { s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: \"text_config\" is missing", path); goto done; }
    }
    c->vocab_size = mft__config_int(&r, "vocab_size", 1, INT32_MAX, c->family != MFT_GEMMA3, 262208);
    if (c->family == MFT_GPT2) mft__config_gpt2(&r, c); else mft__config_llama_line(&r, c);
    if (r.status == MFT_OK && !(c->norm_eps > 0)) r.status = mft__fail(ctx, MFT_ERR_FORMAT, "%s: the norms' epsilon is not positive", path);
    c->tied_embeddings = mft__config_bool(&r, root, "tie_word_embeddings", mft__config_bool(&r, r.root, "tie_word_embeddings", mft__family_configs[found].tied));
    if (c->attention_scale == 0 && c->head_dim) c->attention_scale = 1 / sqrt((double)c->head_dim);
    mft__config_activation(&r, c);
    mft__config_special(&r, c);
    mft__config_ropes(&r, c);
    if (r.status == MFT_OK) {
        c->layer_slides = (unsigned char *)mft__alloc(ctx, (size_t)c->n_layer);
        if (!c->layer_slides) r.status = MFT_ERR_OUT_OF_MEMORY;
        else mft__config_sliding(&r, c, c->layer_slides);
    }
    if (r.status == MFT_OK && mft__count_params(c) > 9e15)       /* nobody's model; and sizes below need not fear to wrap */
        r.status = mft__fail(ctx, MFT_ERR_FORMAT, "%s: its sizes make %.3g parameters", path, mft__count_params(c));
    s = r.status;
    if (s == MFT_OK) c->n_params = (int64_t)mft__count_params(c);
    else { mft__free(ctx, c->layer_slides, (size_t)c->n_layer); c->layer_slides = NULL; }
done:
    mft_json_destroy(root);
    return s;
}

MFT_API mft_status mft_model_inspect(mft_context *ctx, const char *snapshot_dir, mft_model_config *out)
{
    char      *path;
    mft_status s;
    if (!ctx || !snapshot_dir || !out) return MFT_ERR_INVALID_ARGUMENT;
    path = mft__path_join(ctx, snapshot_dir, "config.json");
    if (!path) return MFT_ERR_OUT_OF_MEMORY;
    s = mft__config_load(ctx, path, out);
    if (s == MFT_OK) mft__free(ctx, out->layer_slides, (size_t)out->n_layer);
    out->layer_slides = NULL;
    mft__strfree(ctx, path);
    return s;
}

/* ==============================================================================
 * MARK: - [FAMILIES] What a block is made of
 *
 *   A family is a description: which modules a block has and what they are called, which way its
 *   matrices lie, what its norms and embeddings do besides. [MODEL] computes every family from it.
 *   To add one: a row in [CONFIG-JSON] and here, its config keys in mft__config_llama_line, and a
 *   golden from tools/make_golden.py.
 * ============================================================================== */
typedef enum mft__module {
    MFT__NORM1, MFT__QKV, MFT__Q, MFT__K, MFT__V, MFT__Q_NORM, MFT__K_NORM, MFT__O, MFT__POST_ATTENTION,
    MFT__NORM2, MFT__GATE, MFT__UP, MFT__DOWN, MFT__POST_MLP, MFT__N_MODULES
} mft__module;

typedef struct mft__family {
    const char *prefix;                     /* of every name but the head's                          */
    const char *layers;                     /* "layers" or "h"                                       */
    const char *embedding, *positions, *final_norm;      /* positions NULL: rotary                   */
    const char *modules[MFT__N_MODULES];    /* NULL: the block has none                              */
    int         conv1d;                     /* matrices are stored [in, out]                         */
    int         layer_norm;                 /* with biases; else rms                                 */
    int         norm_offset;                /* 1: y = x r (1 + w)                                    */
    int         scale_embedding;            /* by sqrt(hidden_size)                                  */
    int         embedding_padding;          /* the pad token's row gets no gradient from the look-up */
} mft__family;

#define MFT__LLAMA_BLOCK(qkv, q_norm, k_norm) \
    "model.", "layers", "embed_tokens", NULL, "norm", \
    { "input_layernorm", qkv, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", q_norm, k_norm, "self_attn.o_proj", \
      NULL, "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", NULL }

static const mft__family mft__families[MFT_N_FAMILIES] = {
    /* gpt2 */ { "transformer.", "h", "wte", "wpe", "ln_f",
                 { "ln_1", "attn.c_attn", NULL, NULL, NULL, NULL, NULL, "attn.c_proj", NULL, "ln_2", NULL, "mlp.c_fc", "mlp.c_proj", NULL }, 1, 1, 0, 0, 0 },
    /* llama   */ { MFT__LLAMA_BLOCK(NULL, NULL, NULL), 0, 0, 0, 0, 1 },
    /* mistral */ { MFT__LLAMA_BLOCK(NULL, NULL, NULL), 0, 0, 0, 0, 1 },
    /* qwen2   */ { MFT__LLAMA_BLOCK(NULL, NULL, NULL), 0, 0, 0, 0, 1 },
    /* qwen3   */ { MFT__LLAMA_BLOCK(NULL, "self_attn.q_norm", "self_attn.k_norm"), 0, 0, 0, 0, 1 },
    /* gemma3  */ { "model.", "layers", "embed_tokens", NULL, "norm",
                    { "input_layernorm", NULL, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm", "self_attn.k_norm",
                      "self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
                      "post_feedforward_layernorm" }, 0, 0, 1, 1, 1 }
};

static int mft__is_norm(mft__module m)
{
    return m == MFT__NORM1 || m == MFT__NORM2 || m == MFT__Q_NORM || m == MFT__K_NORM || m == MFT__POST_ATTENTION || m == MFT__POST_MLP;
}

/* Outputs and inputs of a module; a norm has its width and 0. */
static void mft__module_shape(const mft_model_config *c, mft__module m, int64_t *out, int64_t *in)
{
    int64_t H = c->hidden_size, I = c->intermediate_size, q = (int64_t)c->n_head * c->head_dim, kv = (int64_t)c->n_kv_head * c->head_dim;
    *in = 0;
    switch (m) {
    case MFT__Q_NORM: case MFT__K_NORM: *out = c->head_dim; return;
    case MFT__QKV:  *out = q + 2 * kv; *in = H; return;
    case MFT__Q:    *out = q;  *in = H; return;
    case MFT__K:    *out = kv; *in = H; return;
    case MFT__V:    *out = kv; *in = H; return;
    case MFT__O:    *out = H;  *in = q; return;
    case MFT__GATE: *out = I;  *in = H; return;
    case MFT__UP:   *out = I;  *in = H; return;
    case MFT__DOWN: *out = H;  *in = I; return;
    default:        *out = H; return;
    }
}

static int mft__module_bias(const mft_model_config *c, mft__module m)
{
    if (mft__is_norm(m)) return mft__families[c->family].layer_norm;
    if (m == MFT__O) return c->o_bias;
    return m == MFT__QKV || m == MFT__Q || m == MFT__K || m == MFT__V ? c->qkv_bias : c->mlp_bias;
}

/* In double, which sizes from a file cannot wrap; exact up to 2^53. */
static double mft__count_params(const mft_model_config *c)
{
    const mft__family *f = &mft__families[c->family];
    double  width = (double)c->hidden_size, n = (double)c->vocab_size * width * (c->tied_embeddings ? 1 : 2), block = 0;
    int64_t out, in;
    int     m;
    if (f->positions) n += (double)c->max_position * width;
    n += width * (f->layer_norm ? 2 : 1);
    for (m = 0; m < MFT__N_MODULES; m++) {
        if (!f->modules[m]) continue;
        mft__module_shape(c, (mft__module)m, &out, &in);
        block += in ? (double)out * (double)in : (double)out;
        if (mft__module_bias(c, (mft__module)m)) block += (double)out;
    }
    return n + block * c->n_layer;
}

/* ==============================================================================
 * MARK: - [WEIGHTS] Checkpoint names to parameters
 *
 *   in    the entries of a snapshot, with or without the family's prefix on their names
 *   out   every parameter of the config filled by exactly one tensor of the right shape
 *   rule  matrices that stay frozen are used in the file, in its dtype; vectors are small and are
 *         held in f32; in full fine-tuning all are held in f32
 * ============================================================================== */
typedef struct mft__parameter {             /* one tensor of the checkpoint */
    char        name[160];                  /* canonical: with the prefix, as save_pretrained writes it */
    mft_tensor *t;                          /* [out, in]; a Conv1D's is strided, its numbers lie [in, out] */
    mft_dtype   file_dtype;                 /* what mft_model_save writes                            */
    int         no_decay;                   /* a bias or a norm's weight                             */
} mft__parameter;

typedef struct mft__low_rank {              /* an adapter's part on one module                       */
    mft_tensor *a, *b, *magnitude;          /* magnitude: DoRA's, else NULL                          */
    float       scale;
    int         rank;
    char        name[3][200];               /* the keys in the adapter's file                        */
} mft__low_rank;

typedef struct mft__adapter {
    char           name[64];
    int            rank, use_rslora, use_dora;
    float          alpha, dropout;
    char          *targets;                 /* what target_modules said: JSON text                   */
    mft__low_rank *parts;                   /* [n_layer * MFT__N_MODULES]; a NULL: not on that module */
} mft__adapter;

typedef struct mft__module_weights { mft__parameter *w, *b; } mft__module_weights;

enum { MFT__MAX_ADAPTERS = 32, MFT__MLP_ROWS = 256 };

struct mft_model {
    mft__object      object;
    mft_context     *ctx;
    mft_model_config config;
    mft_model_desc   desc;
    char            *dir;                   /* the snapshot it came from                             */
    mft__statefile  *state;                 /* trained weights and their gradients: see desc's state_dir; NULL: in memory */
    mft_safetensors *files;
    mft__parameter  *params;                /* in the checkpoint's order                             */
    int              n_params;
    mft__parameter  *embedding, *positions, *final_norm_w, *final_norm_b, *head;     /* head: the embedding when tied */
    mft__module_weights *modules;           /* [n_layer * MFT__N_MODULES]                            */
    float           *inv_freq, *inv_freq_local;                                      /* [head_dim/2] */
    int              n_recomputed;          /* blocks, from the lowest trainable one on, that are checkpointed; negative: all */
    int64_t          mlp_rows;              /* tokens whose MLP a checkpointed block computes at a time */
    mft__undone_fn   on_undone;             /* or NULL: told in the backward pass that a block is undone, n_layer: final norm and head */
    void            *on_undone_user;
    mft__adapter    *adapters[MFT__MAX_ADAPTERS];
    int              n_adapters, active;    /* active -1: the base alone                             */
};

static mft__module_weights *mft__module_at(const mft_model *m, int layer, int module) { return &m->modules[layer * MFT__N_MODULES + module]; }

/* Prefixes under which files have a family's names; the longest match is tried first. */
static const char *const mft__file_prefixes[] = { "model.language_model.", "language_model.model.", "language_model.", "transformer.", "model.", "" };

/* Tensors of published files that are no parameters: GPT-2's causal masks, old rotary tables. */
static int mft__is_buffer(const char *name)
{
    static const char *const ends[] = { ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq" };
    size_t i, n = strlen(name);
    for (i = 0; i < sizeof ends / sizeof *ends; i++) {
        size_t e = strlen(ends[i]);
        if (n >= e && !strcmp(name + n - e, ends[i])) return 1;
    }
    return 0;
}

/* What else a file may hold without being asked for: the vision part of a multimodal snapshot. */
static int mft__is_other_part(const mft_model_config *c, const char *name)
{
    return !strcmp(c->model_type, "gemma3") && (strstr(name, "vision_tower.") || strstr(name, "multi_modal_projector."));
}

static const mft_safetensors_entry *mft__find_parameter(const mft_model *m, const char *canonical)
{
    const char *prefix = mft__families[m->config.family].prefix, *bare = canonical;
    char        name[256];
    size_t      i;
    if (!strncmp(bare, prefix, strlen(prefix))) bare += strlen(prefix);
    for (i = 0; i < sizeof mft__file_prefixes / sizeof *mft__file_prefixes; i++) {
        const mft_safetensors_entry *e;
        snprintf(name, sizeof name, "%s%s", mft__file_prefixes[i], bare);
        e = mft_safetensors_find(m->files, name);
        if (e) return e;
    }
    return NULL;
}

typedef struct mft__weights_name { const char *name; mft_dtype dtype; } mft__weights_name;
static const mft__weights_name mft__weights_names[] = { { "f32", MFT_F32 }, { "f16", MFT_F16 }, { "bf16", MFT_BF16 }, { "q8_0", MFT_Q8_0 }, { "q4_0", MFT_Q4_0 }, { NULL, MFT_F32 } };

/* "f32" and so on; NULL: none of them. */
static const mft__weights_name *mft__weights_find(const char *name)
{
    const mft__weights_name *w = mft__weights_names;
    while (w->name && strcmp(w->name, name)) w++;
    return w->name ? w : NULL;
}

/* NaN or infinity among the numbers of a float tensor? Contiguous. */
static int mft__has_nonfinite(const mft__kernels *k, const void *data, mft_dtype dtype, int64_t n)
{
    float   part[512];
    int64_t i, j;
    for (i = 0; i < n; i += 512) {
        int64_t count = mft__min(n - i, 512);
        k->to_float(part, (const char *)data + mft_dtype_bytes(dtype, i), dtype, count);
        for (j = 0; j < count; j++) if (!(fabsf(part[j]) <= 3.4028235e38f)) return 1;
    }
    return 0;
}

/* The same of a whole tensor. */
static int mft__tensor_nonfinite(mft_context *ctx, const mft_tensor *t)
{
    int64_t n = mft_tensor_numel(t), piece = mft__paged_piece(ctx, t, n), i;
    int     bad = 0;
    for (i = 0; i < n && !bad; i += piece) {
        bad = mft__has_nonfinite(ctx->kernels, (const char *)t->data + mft_dtype_bytes(t->dtype, i), t->dtype, mft__min(n - i, piece));
        mft__passed(ctx, t, i, mft__min(n - i, piece));
    }
    return bad;
}

/* Fills p->t from the file. ndim 1 or 2; [out, in] of the parameter, whichever way it lies. */
static mft_status mft__load_parameter(mft_model *m, mft__parameter *p, int64_t out, int64_t in, int conv1d)
{
    mft_context *ctx = m->ctx;
    const mft_safetensors_entry *e = mft__find_parameter(m, p->name);
    int64_t      shape[2];
    int          ndim = in ? 2 : 1, train = m->desc.train_all, convert = m->desc.weights ? (int)mft__weights_find(m->desc.weights)->dtype : -1;
    int          in_block = strstr(p->name, ".layers.") || strstr(p->name, ".h.");
    const void  *bytes = NULL;
    const char  *file;
    mft__pages  *pages = NULL;
    mft_dtype    dtype;

    if (!e) return mft__fail(ctx, MFT_ERR_FORMAT, "%s: no tensor fills the parameter %s", m->dir, p->name);
    file = mft_safetensors_shard_path(m->files, e->shard);
    if (e->problem) return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: %s: %s", file, p->name, e->problem);
    shape[0] = conv1d && in ? in : out;
    shape[1] = conv1d && in ? out : in;
    if (e->ndim != ndim || e->shape[0] != shape[0] || (ndim == 2 && e->shape[1] != shape[1])) {
        mft_tensor      is;
        mft__shape_text text;
        memset(&is, 0, sizeof is);
        is.ndim = e->ndim; memcpy(is.shape, e->shape, sizeof is.shape);
        if (ndim == 2) return mft__fail(ctx, MFT_ERR_FORMAT, "%s: %s is %s, the config wants [%lld, %lld]", file, e->name, mft__shape(&is, &text), (long long)shape[0], (long long)shape[1]);
        return mft__fail(ctx, MFT_ERR_FORMAT, "%s: %s is %s, the config wants [%lld]", file, e->name, mft__shape(&is, &text), (long long)shape[0]);
    }
    if (!mft__is_float(e->dtype)) return mft__fail(ctx, MFT_ERR_FORMAT, "%s: %s has dtype %s, not a float", file, e->name, e->dtype_name);
    p->file_dtype = e->dtype;
    dtype = train || ndim == 1 ? (ndim == 2 && m->desc.master_dtype ? MFT_BF16 : MFT_F32) : convert >= 0 ? (mft_dtype)convert : e->dtype;
    if (mft__is_quantized(dtype) && (!in_block || shape[1] % 32)) dtype = e->dtype;
    if (dtype == e->dtype && ndim == 2 && !train) {             /* in place, if it lies as its numbers need */
        bytes = mft__safetensors_pages(m->files, e, &pages);
        if (!bytes) return MFT_ERR_IO;
        if ((uintptr_t)bytes % mft_dtype_bytes(dtype, 1)) bytes = NULL;
    }
    p->t = mft__tensor_held(ctx, MFT__WEIGHTS, dtype, ndim, shape, (void *)(uintptr_t)bytes);
    if (!p->t) return MFT_ERR_OUT_OF_MEMORY;
    p->t->name = p->name;
    if (!bytes) {
        mft_status s = mft_safetensors_read(m->files, e, p->t);
        if (s != MFT_OK) return s;
        mft__safetensors_drop(m->files, e);                     /* not held twice */
        if (mft__tensor_nonfinite(ctx, p->t))
            return mft__fail(ctx, MFT_ERR_FORMAT, "%s: %s holds NaN or infinity", file, e->name);
    }
    p->t->trainable = train;
    if (bytes) { mft__of(p->t)->paged = pages != NULL; mft__of(p->t)->pages = pages; }
    if (conv1d && ndim == 2) {                                  /* [out, in] over numbers that lie [in, out] */
        p->t->shape[0] = out;  p->t->shape[1] = in;
        p->t->stride[0] = 1;   p->t->stride[1] = out;
    }
    return MFT_OK;
}

/* Every tensor of the files must have gone into a parameter, or be known to be none. */
static mft_status mft__check_all_used(mft_model *m)
{
    const char *prefix = mft__families[m->config.family].prefix;
    size_t      i, n, k;
    int         j;
    const mft_safetensors_entry *e = mft_safetensors_entries(m->files, &n);
    for (i = 0; i < n; i++) {
        const char *bare = e[i].name, *twice = NULL;
        int         found = mft__is_buffer(bare) || mft__is_other_part(&m->config, bare);
        for (k = 0; k < sizeof mft__file_prefixes / sizeof *mft__file_prefixes && !found; k++) {
            size_t cut = strlen(mft__file_prefixes[k]);
            if (strncmp(e[i].name, mft__file_prefixes[k], cut)) continue;
            bare = e[i].name + cut;
            if (!strcmp(bare, "lm_head.weight") && m->config.tied_embeddings) found = 1;     /* the embedding again */
            for (j = 0; j < m->n_params && !found; j++) {
                const char *name = m->params[j].name;
                if (!strncmp(name, prefix, strlen(prefix))) name += strlen(prefix);
                if (strcmp(bare, name)) continue;
                if (mft__find_parameter(m, m->params[j].name) == &e[i]) found = 1; else twice = m->params[j].name;
            }
        }
        if (!found) {
            mft__name_text text;
            if (twice) return mft__fail(m->ctx, MFT_ERR_FORMAT, "%s: the tensor %s is a second one for the parameter %s", mft_safetensors_shard_path(m->files, e[i].shard), e[i].name, twice);
            return mft__fail(m->ctx, MFT_ERR_FORMAT, "%s: the tensor %s matches no parameter of a %s model with %d layers", mft_safetensors_shard_path(m->files, e[i].shard),
                             mft__name(e[i].name, strlen(e[i].name), &text), m->config.model_type, m->config.n_layer);
        }
    }
    return MFT_OK;
}

/* Names the next parameter and loads it. */
static mft_status mft__add_parameter(mft_model *m, const char *name, int64_t out, int64_t in, int conv1d, int no_decay, mft__parameter **slot)
{
    mft__parameter *p = &m->params[m->n_params++];
    mft_status      s;
    snprintf(p->name, sizeof p->name, "%s", name);
    p->no_decay = no_decay;
    s = mft__load_parameter(m, p, out, in, conv1d);
    *slot = p;
    return s;
}

static mft_status mft__load_weights(mft_model *m)
{
    const mft_model_config *c = &m->config;
    const mft__family      *f = &mft__families[c->family];
    mft_status s = MFT_OK;
    char       name[160];
    int        layer, k;

    snprintf(name, sizeof name, "%s%s.weight", f->prefix, f->embedding);
    s = mft__add_parameter(m, name, c->vocab_size, c->hidden_size, 0, 0, &m->embedding);
    if (s == MFT_OK && f->positions) {
        snprintf(name, sizeof name, "%s%s.weight", f->prefix, f->positions);
        s = mft__add_parameter(m, name, c->max_position, c->hidden_size, 0, 0, &m->positions);
    }
    for (layer = 0; layer < c->n_layer; layer++)
        for (k = 0; k < MFT__N_MODULES && s == MFT_OK; k++) {
            mft__module_weights *w = mft__module_at(m, layer, k);
            int64_t out, in;
            if (!f->modules[k]) continue;
            mft__module_shape(c, (mft__module)k, &out, &in);
            snprintf(name, sizeof name, "%s%s.%d.%s.weight", f->prefix, f->layers, layer, f->modules[k]);
            s = mft__add_parameter(m, name, out, in, f->conv1d, in == 0, &w->w);
            if (s != MFT_OK || !mft__module_bias(c, (mft__module)k)) continue;
            snprintf(name, sizeof name, "%s%s.%d.%s.bias", f->prefix, f->layers, layer, f->modules[k]);
            s = mft__add_parameter(m, name, out, 0, 0, 1, &w->b);
        }
    if (s == MFT_OK) {
        snprintf(name, sizeof name, "%s%s.weight", f->prefix, f->final_norm);
        s = mft__add_parameter(m, name, c->hidden_size, 0, 0, 1, &m->final_norm_w);
    }
    if (s == MFT_OK && f->layer_norm) {
        snprintf(name, sizeof name, "%s%s.bias", f->prefix, f->final_norm);
        s = mft__add_parameter(m, name, c->hidden_size, 0, 0, 1, &m->final_norm_b);
    }
    m->head = m->embedding;
    if (s == MFT_OK && !c->tied_embeddings) s = mft__add_parameter(m, "lm_head.weight", c->vocab_size, c->hidden_size, 0, 0, &m->head);
    return s == MFT_OK ? mft__check_all_used(m) : s;
}

/* What would write weights back needs them as the snapshot has them. */
static mft_status mft__refuse_quantized(const mft_model *m, const char *call)
{
    int i;
    for (i = 0; i < m->n_params; i++)
        if (mft__is_quantized(m->params[i].t->dtype))
            return mft__fail(m->ctx, MFT_ERR_UNSUPPORTED, "%s: %s was quantised to %s on load: load %s with its own weights for this", call, m->params[i].name, mft_dtype_name(m->params[i].t->dtype), m->dir);
    return MFT_OK;
}

/* Drops the pages of all mapped weights. */
static void mft__drop_weights(mft_model *m)
{
    size_t i, n;
    const mft_safetensors_entry *e = mft_safetensors_entries(m->files, &n);
    for (i = 0; i < n; i++) mft__safetensors_drop(m->files, &e[i]);
    mft__statefile_drop(m->state);
}

/* Large weights, gradients and moments that are made from here on go to a state file, or, NULL, to memory. */
static void mft__statefile_use(mft_context *ctx, mft__statefile *st)
{
    ctx->take_pages = st ? mft__statefile_take : NULL;
    ctx->state = st;
}

#ifdef MFT_NO_MMAP
enum { MFT__MAPS = 0 };
#else
enum { MFT__MAPS = 1 };
#endif

/* Opens the state file if the budget leaves no room for what all weights take in training: themselves, gradients, two
 * moments, and as much again for the step. */
static mft_status mft__model_state(mft_model *m)
{
    const mft_safetensors_entry *e;
    size_t     i, n, bytes = 0;
    mft_status s;
    const char *dir = m->desc.state_dir;
    m->desc.state_dir = NULL;                                   /* the caller's may go */
    if (!MFT__MAPS || !m->desc.train_all || !dir || !m->ctx->budget) return MFT_OK;
    e = mft_safetensors_entries(m->files, &n);
    for (i = 0; i < n; i++) {
        int64_t count = 1;
        int     k;
        for (k = 0; k < e[i].ndim; k++) count *= e[i].shape[k];
        bytes += (size_t)count * sizeof(float);
    }
    if (m->ctx->budget / 5 >= bytes) return MFT_OK;
    s = mft__statefile_open(m->ctx, dir, &m->state);
    if (s == MFT_OK) m->ctx->drop_pages = mft__file_drop;      /* loading streams; then a trainer's plan has its say */
    return s;
}

/* mft__need outside of a step: of elements [first, first + n). */
static mft_status mft__weight_fetch(const mft_model *m, mft_tensor *t, int64_t first, int64_t n)
{
    mft__pages *pages = mft__of(t)->pages;
    return !pages || pages->fetch(m->ctx, pages, (const char *)t->data + mft_dtype_bytes(t->dtype, first), mft_dtype_bytes(t->dtype, n)) ? MFT_OK : MFT_ERR_IO;
}

/* The name of a weight that holds NaN or infinity; NULL if none does. Quantised ones are not looked at. */
static const char *mft__nonfinite_weight(const mft_model *m)
{
    enum { PIECE = 1 << 20 };
    int64_t at, n, total;
    int     i;
    for (i = 0; i < m->n_params; i++) {
        mft_tensor *t = m->params[i].t;
        total = mft__is_quantized(t->dtype) ? 0 : mft_tensor_numel(t);
        for (at = 0; at < total; at += n) {
            n = mft__min(total - at, PIECE);
            if (mft__weight_fetch(m, t, at, n) != MFT_OK) return NULL;
            if (mft__has_nonfinite(m->ctx->kernels, (const char *)t->data + mft_dtype_bytes(t->dtype, at), t->dtype, n)) return m->params[i].name;
            mft__passed(m->ctx, t, at, n);
        }
    }
    return NULL;
}

/* Names the first weight that is NaN or infinite, for a loss that is: looking at all of them on every load
 * would read the whole file. returns NOT_FINITE with the sentence set. */
static mft_status mft__explain_nonfinite(mft_model *m, const char *what)
{
    const char *name = mft__nonfinite_weight(m);
    if (name) return mft__fail(m->ctx, MFT_ERR_NOT_FINITE, "%s is not finite: the weight %s of %s holds NaN or infinity", what, name, m->dir);
    return mft__fail(m->ctx, MFT_ERR_NOT_FINITE, "%s is not finite, though all weights are: a smaller learning rate may help", what);
}

/* ==============================================================================
 * MARK: - [MODEL] Load, blocks, forward, loss, save
 * ============================================================================== */

/* inv_freq[i] = theta^(-2i/D), scaled; computed in f32 as Transformers does, so that far positions agree. */
static void mft__inv_freq(const mft_rope_config *r, int head_dim, float *out)
{
    int i;
    for (i = 0; i < head_dim / 2; i++) {
        float f = 1.0f / powf((float)r->theta, (float)(2 * i) / (float)head_dim);
        if (r->kind == MFT_ROPE_LINEAR) f /= (float)r->factor;
        if (r->kind == MFT_ROPE_LLAMA3) {                       /* long waves are stretched, short ones kept, between: mixed */
            float wave = (float)(2 * MFT__PI) / f, old = (float)r->original_max_position;
            float low = (float)r->low_freq_factor, high = (float)r->high_freq_factor;
            if (wave > old / low) f /= (float)r->factor;
            else if (!(wave < old / high)) {
                float smooth = (old / wave - low) / (high - low);
                f = (1 - smooth) * f / (float)r->factor + smooth * f;
            }
        }
        out[i] = f;
    }
}

static void mft__adapter_free(mft_model *m, mft__adapter *a);

static void mft__model_destroy_object(void *self)
{
    mft_model   *m = (mft_model *)self;
    mft_context *ctx = m->ctx;
    size_t       n_modules = (size_t)m->config.n_layer * MFT__N_MODULES, half = (size_t)m->config.head_dim / 2;
    int          i;
    mft__object_remove(&m->object);
    mft_lora_detach(m);
    for (i = 0; i < m->n_params; i++) mft_tensor_destroy(ctx, m->params[i].t);
    mft_safetensors_close(m->files);
    mft__statefile_close(m->state);
    mft__free(ctx, m->params, (n_modules * 2 + 8) * sizeof *m->params);
    mft__free(ctx, m->modules, n_modules * sizeof *m->modules);
    mft__free(ctx, m->inv_freq, half * sizeof(float));
    mft__free(ctx, m->inv_freq_local, half * sizeof(float));
    mft__free(ctx, m->config.layer_slides, (size_t)m->config.n_layer);
    mft__strfree(ctx, m->dir);
    mft__free(ctx, m, sizeof *m);
}

MFT_API void mft_model_destroy(mft_model *model) { if (model) mft__model_destroy_object(model); }

MFT_API const mft_model_config *mft_model_get_config(const mft_model *model) { return model ? &model->config : NULL; }

/* generation_config.json's eos_token_id, where there is one, is what generation stops at. */
static mft_status mft__load_eos(mft_model *m)
{
    mft__config_reader r;
    mft_json  *root = NULL;
    char      *path = mft__path_join(m->ctx, m->dir, "generation_config.json");
    mft_status s = path ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK && mft__file_exists(m->ctx, path) && (s = mft_json_load(m->ctx, path, &root)) == MFT_OK
        && mft_json_type(mft_json_get(root, "eos_token_id")) != MFT_JSON_NULL) {
        mft_model_config c;
        memset(&r, 0, sizeof r);
        r.root = root;
        mft__config_special(&r, &c);
        memcpy(m->config.eos_token_id, c.eos_token_id, sizeof c.eos_token_id);
    }
    mft_json_destroy(root);
    mft__strfree(m->ctx, path);
    return s;
}

MFT_API mft_status mft_model_load(mft_context *ctx, const char *snapshot_dir, const mft_model_desc *desc, mft_model **out)
{
    mft_model *m;
    char      *path = NULL;
    size_t     n_modules, half, n_entries;
    mft_status s;

    if (!ctx || !out) return MFT_ERR_INVALID_ARGUMENT;
    *out = NULL;
    if (!snapshot_dir) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_model_load: no directory");
    if (desc && desc->weights && !mft__weights_find(desc->weights))
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_model_load: weights \"%s\" is none of f32, f16, bf16, q8_0, q4_0", desc->weights);
    if (desc && desc->master_dtype && ((strcmp(desc->master_dtype, "f32") && strcmp(desc->master_dtype, "bf16")) || !desc->train_all))
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_model_load: master_dtype \"%s\": it is f32 or bf16, and for train_all", desc->master_dtype);
    m = (mft_model *)mft__alloc_zero(ctx, sizeof *m);
    if (!m) return MFT_ERR_OUT_OF_MEMORY;
    m->ctx = ctx; m->active = -1;
    if (desc) m->desc = *desc;
    if (m->desc.weights) m->desc.weights = mft__weights_find(m->desc.weights)->name;      /* the caller's may go */
    m->desc.master_dtype = desc && desc->master_dtype && !strcmp(desc->master_dtype, "bf16") ? "bf16" : NULL;
    mft__object_add(ctx, &m->object, mft__model_destroy_object);
    m->dir = mft__strdup(ctx, snapshot_dir);
    path   = mft__path_join(ctx, snapshot_dir, "config.json");
    if (!m->dir || !path) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
    if ((s = mft__config_load(ctx, path, &m->config)) != MFT_OK) goto done;
    if ((s = mft_safetensors_open(ctx, snapshot_dir, &m->files)) != MFT_OK) goto done;
    mft__object_remove(&m->files->object);                      /* the model's, not the context's */
    mft_safetensors_entries(m->files, &n_entries);
    if (n_entries < (size_t)m->config.n_layer) {                /* before memory is spent on so many */
        s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: %d layers, but the files hold %llu tensors", path, m->config.n_layer, (unsigned long long)n_entries);
        goto done;
    }
    n_modules = (size_t)m->config.n_layer * MFT__N_MODULES; half = (size_t)m->config.head_dim / 2;
    m->params  = (mft__parameter *)mft__alloc_zero(ctx, (n_modules * 2 + 8) * sizeof *m->params);
    m->modules = (mft__module_weights *)mft__alloc_zero(ctx, n_modules * sizeof *m->modules);
    m->inv_freq       = (float *)mft__alloc_zero(ctx, half * sizeof(float));
    m->inv_freq_local = (float *)mft__alloc_zero(ctx, half * sizeof(float));
    if (!m->params || !m->modules || !m->inv_freq || !m->inv_freq_local) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
    if (!mft__families[m->config.family].positions) {
        mft__inv_freq(&m->config.rope, m->config.head_dim, m->inv_freq);
        mft__inv_freq(&m->config.rope_local, m->config.head_dim, m->inv_freq_local);
    }
    m->mlp_rows = MFT__MLP_ROWS;
    if (m->desc.grad_checkpointing > 0) m->n_recomputed = -1;
    if ((s = mft__model_state(m)) != MFT_OK) goto done;
    mft__statefile_use(ctx, m->state);
    s = mft__load_weights(m);
    mft__statefile_use(ctx, NULL);
    if (s == MFT_OK) s = mft__load_eos(m);
    if (ctx->budget) mft__drop_weights(m);                      /* what reading the vectors and the header has touched */
done:
    mft__strfree(ctx, path);
    if (s != MFT_OK) { mft__model_destroy_object(m); return s; }
    *out = m;
    return MFT_OK;
}

MFT_API int mft_model_params(mft_model *model, int trainable_only, mft_tensor **out, int cap)
{
    int i, k, a, n = 0;
    if (!model) return 0;
    for (i = 0; i < model->n_params; i++) {
        if (trainable_only && !model->params[i].t->trainable) continue;
        if (n < cap) out[n] = model->params[i].t;
        n++;
    }
    for (a = 0; a < model->n_adapters; a++)
        for (i = 0; i < model->config.n_layer * MFT__N_MODULES; i++) {
            mft__low_rank *p = &model->adapters[a]->parts[i];
            mft_tensor    *t[3];
            t[0] = p->a; t[1] = p->b; t[2] = p->magnitude;
            for (k = 0; k < 3; k++) {
                if (!t[k] || (trainable_only && !t[k]->trainable)) continue;
                if (n < cap) out[n] = t[k];
                n++;
            }
        }
    return n;
}

/* ---- one batch, as the ops want it ---- */
typedef struct mft__input {
    const int32_t *positions;               /* NULL: 0..T-1                                          */
    const int32_t *first_key;               /* NULL: 0                                               */
    int64_t        B, T;
} mft__input;

/* Are two tokens of a row, the second right after the first, in one document and not padding? */
static int mft__continues(const mft_batch *b, int64_t at)
{
    if (b->document_ids && b->document_ids[at] != b->document_ids[at - 1]) return 0;
    return !b->labels && b->attention_mask ? b->attention_mask[at - 1] && b->attention_mask[at] : 1;
}

/* The label row `at` is trained on: the next token's, or -100. */
static int32_t mft__shifted_label(const mft_batch *b, int64_t at)
{
    if ((at + 1) % b->seq == 0 || !mft__continues(b, at + 1)) return -100;
    return b->labels ? b->labels[at + 1] : b->input_ids[at + 1];
}

MFT_API int64_t mft_batch_n_valid(const mft_batch *batch)
{
    int64_t i, n = 0;
    if (!batch || !batch->input_ids || batch->batch < 1 || batch->seq < 1) return 0;
    for (i = 0; i < (int64_t)batch->batch * batch->seq; i++) n += mft__shifted_label(batch, i) != -100;
    return n;
}

static mft_status mft__check_batch(mft_context *ctx, const mft_batch *b)
{
    if (b && b->input_ids && b->batch > 0 && b->seq > 0) return MFT_OK;
    return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "a batch needs input_ids and a size");
}

/* Checks a batch and derives positions and first keys, which live as long as the step. 0: the step failed. */
static int mft__read_batch(mft_model *m, const mft_batch *b, mft__input *in)
{
    mft_context *ctx = m->ctx;
    int32_t     *positions, *first;
    int64_t      r, t, pad;
    memset(in, 0, sizeof *in);
    if (mft__check_batch(ctx, b) != MFT_OK) { mft__op_failed(ctx, MFT_ERR_INVALID_ARGUMENT); return 0; }
    in->B = b->batch; in->T = b->seq;
    if (mft__families[m->config.family].positions && b->seq > m->config.max_position) {
        mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "a sequence of %d tokens is longer than the model's %lld positions", b->seq, (long long)m->config.max_position));
        return 0;
    }
    in->positions = b->position_ids;
    if (!b->document_ids && !b->attention_mask) return 1;
    positions = (int32_t *)mft__meta(ctx, (size_t)(in->B * in->T) * sizeof *positions);
    first     = (int32_t *)mft__meta(ctx, (size_t)(in->B * in->T) * sizeof *first);
    if (!positions || !first) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return 0; }
    for (r = 0; r < in->B; r++) {
        const int32_t *mask = b->attention_mask ? b->attention_mask + r * in->T : NULL;
        int32_t        start = 0;
        int64_t        ones = 0;
        for (pad = 0; mask && pad < in->T && !mask[pad]; pad++) {}
        for (t = pad; mask && t < in->T && mask[t]; t++) ones++;
        for (t = pad + ones; mask && t < in->T; t++)
            if (mask[t]) {
                mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_UNSUPPORTED, "sequence %lld of the batch has a hole in its attention_mask at token %lld: padding may be on the left or on the right", (long long)r, (long long)t));
                return 0;
            }
        for (t = 0; t < in->T; t++) {
            if (b->document_ids && t && b->document_ids[r * in->T + t] != b->document_ids[r * in->T + t - 1]) start = (int32_t)t;
            first[r * in->T + t]     = start > pad ? start : (int32_t)pad;
            positions[r * in->T + t] = (int32_t)t - start;
        }
    }
    in->first_key = first;
    if (!in->positions && b->document_ids) in->positions = positions;
    return 1;
}

/* ---- the block, of any family ---- */

/* Keys and values of what a generation has read, per layer [1, capacity, n_kv_head, head_dim]. */
typedef struct mft__kv_cache {
    mft_tensor **k, **v;
    int64_t      used, capacity;
} mft__kv_cache;

typedef struct mft__block_call {            /* what a block needs besides x; lives as long as the step */
    mft_model     *m;
    mft__input     in;
    int            layer;
    mft__kv_cache *cache;                   /* NULL in training */
    const int32_t *rows;                    /* the last block's: tokens that are learnt, the others' MLP is not wanted; or NULL */
    int64_t        n_rows;
} mft__block_call;

/* plus, where there is one (the residual), and the module's product. */
static mft_tensor *mft__module_linear(mft_model *m, int layer, mft__module module, mft_tensor *x, mft_tensor *plus)
{
    mft__module_weights *w = mft__module_at(m, layer, module);
    mft__low_rank       *p = m->active >= 0 ? &m->adapters[m->active]->parts[layer * MFT__N_MODULES + module] : NULL;
    mft_tensor          *bias = w->b ? w->b->t : NULL;
    if (p && p->magnitude) {
        int         unread = m->ctx->result_unread;
        mft_tensor *y;
        m->ctx->result_unread = 0;                              /* it is several ops, whose derivatives read each other's results */
        y = mft_dora_linear(m->ctx, x, w->w->t, bias, p->a, p->b, p->magnitude, p->scale, m->adapters[m->active]->dropout);
        m->ctx->result_unread = unread;
        return plus ? mft_add(m->ctx, plus, y) : y;
    }
    if (p && p->a) return mft__lora_linear_onto(m->ctx, x, w->w->t, bias, p->a, p->b, p->scale, m->adapters[m->active]->dropout, plus);
    return mft__linear_onto(m->ctx, x, w->w->t, bias, plus);
}

static mft_tensor *mft__norm(mft_model *m, mft__parameter *w, mft__parameter *b, mft_tensor *x)
{
    const mft__family *f = &mft__families[m->config.family];
    if (f->layer_norm) return mft_layer_norm(m->ctx, x, w->t, b->t, (float)m->config.norm_eps);
    return mft_rms_norm(m->ctx, x, w->t, (float)f->norm_offset, (float)m->config.norm_eps);
}

static mft_tensor *mft__module_norm(mft_model *m, int layer, mft__module module, mft_tensor *x)
{
    mft__module_weights *w = mft__module_at(m, layer, module);
    return w->w ? mft__norm(m, w->w, w->b, x) : x;
}

/* x [B, T, heads * D] as [B, T, heads, D] */
static mft_tensor *mft__as_heads(mft_model *m, mft_tensor *x, int64_t heads)
{
    int64_t shape[4];
    if (!x) return NULL;
    shape[0] = x->shape[0]; shape[1] = x->shape[1]; shape[2] = heads; shape[3] = m->config.head_dim;
    if (mft__is_contiguous(x)) return mft_reshape(m->ctx, x, 4, shape);
    x = mft__view(m->ctx, x, 0);                                /* a slice of the fused q, k, v: its rows are apart, its heads are not */
    if (!x) return NULL;
    x->ndim = 4; x->shape[2] = heads; x->shape[3] = m->config.head_dim;
    x->stride[3] = 1; x->stride[2] = m->config.head_dim;
    return x;
}

/* Puts new keys or values behind the cached ones and returns all of them. */
static mft_tensor *mft__cache_append(mft_context *ctx, mft_tensor *cache, const mft_tensor *x, int64_t used)
{
    mft_tensor *place, *all;
    if (!x) return NULL;
    place = mft_slice(ctx, cache, 1, used, used + x->shape[1]);
    if (!place || mft_tensor_copy(ctx, place, x) != MFT_OK) return NULL;
    all = mft_slice(ctx, cache, 1, 0, used + x->shape[1]);
    return all;
}

static mft_tensor *mft__attention_part(mft__block_call *call, mft_tensor *x, mft_tensor *plus)
{
    mft_model   *m = call->m;
    mft_context *ctx = m->ctx;
    const mft_model_config *c = &m->config;
    int          layer = call->layer, slides = c->sliding_window && c->layer_slides[layer];
    int64_t      q_width = (int64_t)c->n_head * c->head_dim, kv_width = (int64_t)c->n_kv_head * c->head_dim, flat[3];
    mft_tensor  *q, *k, *v, *out;
    mft_attention_desc d;

    if (mft__module_at(m, layer, MFT__QKV)->w) {
        mft_tensor *qkv = mft__module_linear(m, layer, MFT__QKV, x, NULL);
        q = mft_slice(ctx, qkv, 2, 0, q_width);
        k = mft_slice(ctx, qkv, 2, q_width, q_width + kv_width);
        v = mft_slice(ctx, qkv, 2, q_width + kv_width, q_width + 2 * kv_width);
    } else {
        q = mft__module_linear(m, layer, MFT__Q, x, NULL);
        k = mft__module_linear(m, layer, MFT__K, x, NULL);
        v = mft__module_linear(m, layer, MFT__V, x, NULL);
    }
    q = mft__as_heads(m, q, c->n_head);
    k = mft__as_heads(m, k, c->n_kv_head);
    v = mft__as_heads(m, v, c->n_kv_head);
    q = mft__module_norm(m, layer, MFT__Q_NORM, q);
    k = mft__module_norm(m, layer, MFT__K_NORM, k);
    if (!mft__families[c->family].positions) {
        const float *inv_freq = slides && c->family == MFT_GEMMA3 ? m->inv_freq_local : m->inv_freq;
        q = mft_rope(ctx, q, call->in.positions, inv_freq, 0);
        k = mft_rope(ctx, k, call->in.positions, inv_freq, 0);
    }
    if (call->cache) {
        k = mft__cache_append(ctx, call->cache->k[layer], k, call->cache->used);
        v = mft__cache_append(ctx, call->cache->v[layer], v, call->cache->used);
    }
    memset(&d, 0, sizeof d);
    d.scale = (float)c->attention_scale; d.softcap = (float)c->attention_softcap;
    d.window = slides ? c->sliding_window : 0; d.first_key = call->in.first_key;
    out = mft_attention(ctx, q, k, v, &d);
    if (!out) return NULL;
    flat[0] = out->shape[0]; flat[1] = out->shape[1]; flat[2] = q_width;
    return mft__module_linear(m, layer, MFT__O, mft_reshape(ctx, out, 3, flat), plus);
}

static mft_tensor *mft__activate(mft_context *ctx, int activation, mft_tensor *x)
{
    if (activation == MFT__ACT_GELU_TANH) return mft_gelu_tanh(ctx, x);
    if (activation == MFT__ACT_GELU)      return mft_gelu(ctx, x);
    return activation == MFT__ACT_RELU ? mft_relu(ctx, x) : mft_silu(ctx, x);
}

/* The MLP up to its last product. */
static mft_tensor *mft__mlp_inner(mft_model *m, int layer, mft_tensor *x)
{
    mft_context *ctx = m->ctx;
    int          activation = m->config.activation;
    mft_tensor  *up, *gate;
    if (!mft__module_at(m, layer, MFT__GATE)->w) return mft__activate(ctx, activation, mft__module_linear(m, layer, MFT__UP, x, NULL));
    gate = mft__module_linear(m, layer, MFT__GATE, x, NULL);
    up   = mft__module_linear(m, layer, MFT__UP, x, NULL);
    return activation == MFT__ACT_SILU ? mft_swiglu(ctx, gate, up) : activation == MFT__ACT_GELU_TANH ? mft_geglu(ctx, gate, up)
         : mft_mul(ctx, mft__activate(ctx, activation, gate), up);
}

/* x + mlp(norm(x)), each row by itself. Recomputed for the backward pass, the last product and the sum are not wanted. */
static mft_tensor *mft__mlp_block(mft_context *ctx, mft_tensor *x, void *user)
{
    mft__block_call *call = (mft__block_call *)user;
    mft_model       *m = call->m;
    mft_tensor      *h = mft__mlp_inner(m, call->layer, mft__module_norm(m, call->layer, MFT__NORM2, x));
    int              normed = mft__module_at(m, call->layer, MFT__POST_MLP)->w != NULL;
    if (!h) return NULL;
    ctx->result_unread = ctx->recomputing && !normed;           /* the norm's derivative wants what it norms */
    h = mft__module_linear(m, call->layer, MFT__DOWN, h, normed ? NULL : x);
    if (normed) {
        h = mft__module_norm(m, call->layer, MFT__POST_MLP, h);
        ctx->result_unread = ctx->recomputing;
        h = mft_add(ctx, x, h);
    }
    ctx->result_unread = 0;
    return h;
}

/* Where pages are dropped: starts to read a block's weights from the disk, in the background, while another one computes. */
static void mft__fetch_ahead(mft_model *m, int layer)
{
    int k;
    if (layer < 0 || layer >= m->config.n_layer || m->files->shards[0].streamed || !MFT__RUNS(m->ctx)) return;
    for (k = 0; k < MFT__N_MODULES; k++) {
        mft__parameter *p = mft__module_at(m, layer, k)->w;
        if (p && mft__of(p->t)->pages) mft__file_advise((const char *)p->t->data, mft_dtype_bytes(p->t->dtype, mft_tensor_numel(p->t)), 1);
    }
}

/* x + attention(norm(x)), then x + mlp(norm(x)); Gemma norms what is added as well. */
static mft_tensor *mft__block(mft_context *ctx, mft_tensor *x, void *user)
{
    mft__block_call *call = (mft__block_call *)user;
    mft_model       *m = call->m;
    int              layer = call->layer, normed = mft__module_at(m, layer, MFT__POST_ATTENTION)->w != NULL;
    mft_tensor      *h;
    if (ctx->drop_pages) mft__fetch_ahead(m, ctx->recomputing ? layer - 1 : layer + 1);
    h = mft__attention_part(call, mft__module_norm(m, layer, MFT__NORM1, x), normed ? NULL : x);
    x = normed ? mft_add(ctx, x, mft__module_norm(m, layer, MFT__POST_ATTENTION, h)) : h;
    if (x && call->rows) {
        int64_t flat[2];
        flat[0] = call->in.B * call->in.T; flat[1] = m->config.hidden_size;
        x = mft_embedding(ctx, mft_reshape(ctx, x, 2, flat), call->rows, 1, call->n_rows, -1);
    }
    if (!x || (ctx->grad_enabled && !ctx->recomputing)) return x ? mft__mlp_block(ctx, x, call) : NULL;
    /* attention's part and the MLP's are not in memory together; dropout is drawn for all rows at once */
    return mft__checkpoint_rows(ctx, mft__mlp_block, x, call, m->active >= 0 && m->adapters[m->active]->dropout > 0 ? mft_tensor_numel(x) : m->mlp_rows, ctx->recomputing);
}

/* Is there something to train in a block? */
static int mft__block_trains(const mft_model *m, int layer)
{
    int k;
    for (k = 0; k < MFT__N_MODULES; k++) {
        const mft__module_weights *w = mft__module_at(m, layer, k);
        if ((w->w && w->w->t->trainable) || (w->b && w->b->t->trainable)) return 1;
        if (m->active >= 0 && m->adapters[m->active]->parts[layer * MFT__N_MODULES + k].a) return 1;
    }
    return 0;
}

/* The lowest block with something trained in or below it; n_layer if there is none. */
static int mft__lowest_trained(const mft_model *m)
{
    int layer = 0;
    if (m->embedding->t->trainable) return 0;
    while (layer < m->config.n_layer && !mft__block_trains(m, layer)) layer++;
    return layer;
}

/* Positions 0..T-1, or `from`..: for GPT-2's table and for generation. */
static const int32_t *mft__count_up(mft_context *ctx, int64_t B, int64_t T, int64_t from)
{
    int32_t *p = (int32_t *)mft__meta(ctx, (size_t)(B * T) * sizeof *p);
    int64_t  i;
    if (!p) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return NULL; }
    for (i = 0; i < B * T; i++) p[i] = (int32_t)(from + i % T);
    return p;
}

/* After the final norm [B, T, H]; with rows (of B * T, numbered through) only those, [1, n_rows, H]. */
static mft_tensor *mft__hidden(mft_model *m, const int32_t *ids, mft__input in, mft__kv_cache *cache, const int32_t *rows, int64_t n_rows)
{
    mft_context       *ctx = m->ctx;
    const mft__family *f = &mft__families[m->config.family];
    int32_t            padding = f->embedding_padding ? m->config.pad_token_id : -1;
    mft_tensor        *x;
    int                layer, trains = 0, n_trained = 0;

    x = mft_embedding(ctx, m->embedding->t, ids, in.B, in.T, padding);
    if (f->scale_embedding) x = mft_scale(ctx, x, (float)sqrt((double)m->config.hidden_size));
    if (f->positions) {
        if (!in.positions && !(in.positions = mft__count_up(ctx, in.B, in.T, 0))) return NULL;
        x = mft_add(ctx, x, mft_embedding(ctx, m->positions->t, in.positions, in.B, in.T, -1));
    }
    for (layer = 0; layer < m->config.n_layer && x; layer++) {
        mft__block_call *call = (mft__block_call *)mft__meta(ctx, sizeof *call);
        if (m->on_undone && !(x = mft__when_undone(ctx, x, m->on_undone, m->on_undone_user, layer))) return NULL;
        if (!call) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
        if (mft__cancelled(ctx)) return mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_CANCELLED, "cancelled"));
        call->m = m; call->in = in; call->layer = layer; call->cache = cache;
        call->rows = layer == m->config.n_layer - 1 ? rows : NULL; call->n_rows = n_rows;
        /* below the lowest that is trained a checkpoint costs nothing: it only gives the block's memory back */
        trains = trains || x->trainable || mft__block_trains(m, layer);
        if (trains && ctx->grad_enabled) n_trained++;
        if (n_trained && m->n_recomputed >= 0 && n_trained > m->n_recomputed) { x = mft__block(ctx, x, call); continue; }
        ctx->input_ends = m->desc.checkpoint_bf16 ? 2 : 1;
        x = mft_checkpoint(ctx, mft__block, x, call);
    }
    if (x && m->on_undone) x = mft__when_undone(ctx, x, m->on_undone, m->on_undone_user, layer);
    return x ? mft__norm(m, m->final_norm_w, m->final_norm_b, x) : NULL;
}

MFT_API mft_tensor *mft_model_hidden(mft_model *model, const mft_batch *batch)
{
    mft__input in;
    if (!model || !mft__read_batch(model, batch, &in)) return NULL;
    return mft__hidden(model, batch->input_ids, in, NULL, NULL, 0);
}

static mft_tensor *mft__logits(mft_model *m, mft_tensor *hidden)
{
    mft_tensor *y = mft_linear(m->ctx, hidden, m->head->t, NULL);
    return m->config.logit_softcap > 0 ? mft_softcap(m->ctx, y, (float)m->config.logit_softcap) : y;
}

MFT_API mft_tensor *mft_model_forward(mft_model *model, const mft_batch *batch)
{
    return model ? mft__logits(model, mft_model_hidden(model, batch)) : NULL;
}

/* Where few tokens are learnt (half, or fewer: what is copied for them then takes less memory than what is spared) the last
 * block goes on with those alone. */
MFT_API mft_tensor *mft_model_loss(mft_model *model, const mft_batch *batch, int64_t n_valid)
{
    mft__input in;
    int32_t   *labels, *rows;
    int64_t    i, n, learnt = 0, good = 0;
    mft_tensor  *x;
    mft_context *ctx;
    if (!model || !mft__read_batch(model, batch, &in)) return NULL;
    ctx = model->ctx;
    n = in.B * in.T;
    labels = (int32_t *)mft__meta(ctx, (size_t)n * 2 * sizeof *labels);
    if (!labels) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    rows = labels + n;
    for (i = 0; i < n; i++) {
        labels[i] = mft__shifted_label(batch, i);
        good += labels[i] >= 0 && labels[i] < model->config.vocab_size;
        if (labels[i] != -100) rows[learnt++] = (int32_t)i;
    }
    if (!learnt || 2 * learnt > n || good < learnt) rows = NULL;        /* a label that is none: the head says which */
    x = mft__hidden(model, batch->input_ids, in, NULL, rows, learnt);
    for (i = 0; rows && i < learnt; i++) labels[i] = labels[rows[i]];
    return mft_linear_cross_entropy(ctx, x, model->head->t, labels, n_valid, (float)model->config.logit_softcap);
}

/* ---- files of a snapshot ---- */

/* What else belongs to a snapshot, copied along when a model is saved. */
static const char *const mft__companions[] = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
};

/* A directory that is being written: beside its place under another name when the place is new, so that it
 * appears whole; in its place, file by file, when the directory is there already. With `replace` it is written
 * beside its place in any case and takes it at once: the old one is PLACE.tmp-old for the moment in between. */
typedef struct mft__new_dir { mft_context *ctx; char *place, *parent, *work; size_t bytes; int fresh, lock, phase; } mft__new_dir;

static void mft__new_dir_free(mft__new_dir *d)
{
    mft__phase_set(d->ctx, d->phase);
    if (d->lock >= 0) mft__os_close(d->lock);
    mft__free(d->ctx, d->place, d->bytes);
    mft__free(d->ctx, d->work, d->bytes);
    mft__strfree(d->ctx, d->parent);
    d->place = d->work = d->parent = NULL; d->lock = -1;
}

/* Removes what was written, if the directory is a new one. */
static void mft__new_dir_abort(mft__new_dir *d)
{
    if (d->fresh) mft__dir_remove(d->ctx, d->work);
    mft__new_dir_free(d);
}

/* Makes work: PLACE.tmp-PROCESS-K, which no other process uses. */
static mft_status mft__new_dir_work(mft__new_dir *d)
{
    int k, made = 0, reason = EEXIST;
    mft__remove_leftovers(d->ctx, d->parent, mft__file_name(d->place));
    for (k = 0; k < 100 && !made && reason == EEXIST; k++) {
        snprintf(d->work, d->bytes, "%s.tmp-%ld-%d", d->place, mft__os_process(), k);
        made   = mft__os_make_dir(d->work);
        reason = errno;
    }
    if (!made) {
        d->fresh = 0;
        return mft__fail(d->ctx, MFT_ERR_IO, "%s: cannot make this directory: %s", mft__path(d->place), strerror(reason));
    }
    d->lock = mft__os_hold(d->work);
    return MFT_OK;
}

static mft_status mft__new_dir_begin(mft_context *ctx, const char *place, int replace, mft__new_dir *d)
{
    size_t     n = strlen(place);
    mft_status s = MFT_ERR_OUT_OF_MEMORY;
    memset(d, 0, sizeof *d);
    d->ctx = ctx; d->lock = -1; d->bytes = n + 48; d->phase = mft__phase_set(ctx, MFT__SAVE);
    while (n > 1 && mft__is_separator(place[n - 1])) n--;
    d->place = (char *)mft__alloc_zero(ctx, d->bytes);
    d->work  = d->place ? (char *)mft__alloc_zero(ctx, d->bytes) : NULL;
    if (d->work) memcpy(d->place, place, n);
    d->parent = d->work ? mft__path_dir(ctx, d->place) : NULL;
    if (d->parent) s = mft__make_dirs(ctx, d->parent);
    if (s == MFT_OK) {
        d->fresh = mft__file_kind(d->place) == MFT__NO_PATH || (replace && mft__file_kind(d->place) == MFT__DIRECTORY);
        if (!d->fresh) memcpy(d->work, d->place, n + 1);
        s = d->fresh ? mft__new_dir_work(d) : mft__make_dirs(ctx, d->work);
    }
    if (s != MFT_OK) mft__new_dir_abort(d);
    return s;
}

/* work becomes place; `old`, if a directory is there, what that was until then. */
static int mft__new_dir_swap(const mft__new_dir *d, const char *old)
{
    int had = mft__file_kind(d->place) == MFT__DIRECTORY, reason;
    if (had) {
        mft__dir_remove(d->ctx, old);                           /* of a process killed below: place is whole */
        if (!mft__os_rename(d->place, old)) return 0;
    }
    if (mft__os_rename(d->work, d->place)) return 1;
    reason = errno;
    if (had) mft__os_rename(old, d->place);
    errno = reason;
    return 0;
}

static mft_status mft__new_dir_commit(mft__new_dir *d)
{
    char *old = d->fresh ? (char *)mft__alloc(d->ctx, d->bytes) : NULL;
    if (d->fresh && !old) { mft__new_dir_abort(d); return MFT_ERR_OUT_OF_MEMORY; }
    if (d->fresh) {
        int ok;
        snprintf(old, d->bytes, "%s.tmp-old", d->place);
        ok = mft__new_dir_swap(d, old);
        if (!ok) mft__fail(d->ctx, MFT_ERR_IO, "%s: cannot be renamed to %s: %s", mft__path(d->work), mft__path(d->place), strerror(errno));
        mft__os_sync_dir(d->parent);
        if (ok) mft__dir_remove(d->ctx, old);
        mft__free(d->ctx, old, d->bytes);
        if (!ok) { mft__new_dir_abort(d); return MFT_ERR_IO; }
    }
    mft__new_dir_free(d);
    return MFT_OK;
}

/* Copies one file of the snapshot if it is there. */
static mft_status mft__copy_companion(mft_context *ctx, const char *from_dir, const char *to_dir, const char *name)
{
    char      *from = mft__path_join(ctx, from_dir, name), *to = mft__path_join(ctx, to_dir, name), *text = NULL;
    size_t     bytes = 0;
    mft_status s = from && to ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK && mft__file_exists(ctx, from)) {
        s = mft__file_read_all(ctx, from, (size_t)1 << 28, &text, &bytes);
        if (s == MFT_OK) { s = mft__file_write_all(ctx, to, text, bytes); mft__free(ctx, text, bytes + 1); }
    }
    mft__strfree(ctx, from);
    mft__strfree(ctx, to);
    return s;
}

/* A parameter as the file has it: a Conv1D's the way its numbers lie. */
static mft__tensor mft__as_stored(mft_tensor *t)
{
    mft__tensor s = *mft__of(t);
    if (t->ndim == 2 && t->stride[1] != 1) {
        s.t.shape[0]  = t->shape[1];  s.t.shape[1]  = t->shape[0];
        s.t.stride[0] = t->stride[1]; s.t.stride[1] = t->stride[0];
    }
    return s;
}

/* The files of a snapshot into a directory: weights in the dtype they were loaded from, or as they are in memory. */
static mft_status mft__model_write(mft_model *model, const char *dir, int as_held)
{
    mft_context            *ctx = model->ctx;
    mft_safetensors_spec   *specs = (mft_safetensors_spec *)mft__alloc_zero(ctx, (size_t)model->n_params * sizeof *specs);
    mft_safetensors_writer *w = NULL;
    char      *path = mft__path_join(ctx, dir, "model.safetensors");
    mft_status s = specs && path ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    size_t     i;
    int        k;
    for (k = 0; k < model->n_params && s == MFT_OK; k++) {
        mft__tensor stored = mft__as_stored(model->params[k].t);
        specs[k].name  = model->params[k].name;
        specs[k].dtype = as_held ? stored.t.dtype : model->params[k].file_dtype;
        specs[k].ndim  = stored.t.ndim;
        memcpy(specs[k].shape, stored.t.shape, sizeof specs[k].shape);
    }
    if (s == MFT_OK) s = mft_safetensors_write_begin(ctx, path, specs, model->n_params, NULL, &w);
    for (k = 0; k < model->n_params && s == MFT_OK; k++) {
        mft__tensor stored = mft__as_stored(model->params[k].t);
        s = mft__weight_fetch(model, model->params[k].t, 0, mft_tensor_numel(&stored.t));
        if (s == MFT_OK) s = mft_safetensors_write_tensor(w, k, &stored.t);
        mft__passed(model->ctx, model->params[k].t, 0, mft_tensor_numel(&stored.t));
    }
    if (s == MFT_OK) s = mft_safetensors_write_commit(w); else mft_safetensors_write_abort(w);
    for (i = 0; i < sizeof mft__companions / sizeof *mft__companions && s == MFT_OK; i++)
        s = mft__copy_companion(ctx, model->dir, dir, mft__companions[i]);
    mft__free(ctx, specs, (size_t)model->n_params * sizeof *specs);
    mft__strfree(ctx, path);
    return s;
}

/* The shards of a model that was in the directory before, by its index: which of the two is the model, readers would have
 * to guess. The index goes first, so that none is left that names what is gone. */
static void mft__remove_old_shards(mft_context *ctx, const char *dir)
{
    char           *index = mft__path_join(ctx, dir, "model.safetensors.index.json"), *path;
    mft_json       *root = NULL;
    const mft_json *map, *file;
    size_t          i;
    if (!index || mft__file_kind(index) != MFT__FILE) { mft__strfree(ctx, index); return; }
    mft_json_load(ctx, index, &root);
    mft__os_remove(index);
    map = mft_json_get(root, "weight_map");
    for (i = 0; (file = mft_json_at(map, i, NULL)) != NULL; i++) {
        const char *name = mft_json_string(file, NULL);
        if (!name || strncmp(name, "model-", 6) || strpbrk(name, "/\\")) continue;
        path = mft__path_join(ctx, dir, name);
        if (path) mft__os_remove(path);
        mft__strfree(ctx, path);
    }
    mft_json_destroy(root);
    mft__strfree(ctx, index);
}

MFT_API mft_status mft_model_save(mft_model *model, const char *dir)
{
    mft__new_dir place;
    mft_status   s;
    if (!model || !dir) return MFT_ERR_INVALID_ARGUMENT;
    if (model->n_adapters) return mft__fail(model->ctx, MFT_ERR_INVALID_ARGUMENT, "mft_model_save: merge or detach the adapter first");
    if ((s = mft__refuse_quantized(model, "mft_model_save")) != MFT_OK) return s;
    if ((s = mft__new_dir_begin(model->ctx, dir, 0, &place)) != MFT_OK) return s;
    s = mft__model_write(model, place.work, 0);
    if (s == MFT_OK) s = mft__new_dir_commit(&place); else mft__new_dir_abort(&place);
    if (s == MFT_OK) mft__remove_old_shards(model->ctx, dir);
    return s;
}

/* ---- random weights ---- */

typedef struct mft__normal_task { float *x; double std; uint64_t seed, stream; int64_t n; } mft__normal_task;
static void mft__normal_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__normal_task *t = (const mft__normal_task *)arg;
    int64_t i;
    (void)worker;
    for (i = begin; i < end; i++) {
        float a, b;
        mft__normal_pair(t->seed, t->stream, (uint64_t)i, &a, &b);
        t->x[2 * i] = (float)(a * t->std);
        if (2 * i + 1 < t->n) t->x[2 * i + 1] = (float)(b * t->std);
    }
}

/* Lays out a model of `c` as specs, in the checkpoint's order, into a model that has no numbers. */
static int mft__init_specs(const mft_model_config *c, mft_dtype dtype, mft_safetensors_spec *specs, char (*names)[160])
{
    const mft__family *f = &mft__families[c->family];
    int n = 0, layer, k;
#define MFT__SPEC(out_, in_, ...) do { \
        snprintf(names[n], sizeof names[n], __VA_ARGS__); \
        specs[n].name = names[n]; specs[n].dtype = dtype; specs[n].ndim = (in_) ? 2 : 1; \
        specs[n].shape[0] = (out_); specs[n].shape[1] = (in_); n++; } while (0)
    MFT__SPEC(c->vocab_size, c->hidden_size, "%s%s.weight", f->prefix, f->embedding);
    if (f->positions) MFT__SPEC(c->max_position, c->hidden_size, "%s%s.weight", f->prefix, f->positions);
    for (layer = 0; layer < c->n_layer; layer++)
        for (k = 0; k < MFT__N_MODULES; k++) {
            int64_t out, in;
            if (!f->modules[k]) continue;
            mft__module_shape(c, (mft__module)k, &out, &in);
            if (f->conv1d && in) MFT__SPEC(in, out, "%s%s.%d.%s.weight", f->prefix, f->layers, layer, f->modules[k]);
            else                 MFT__SPEC(out, in, "%s%s.%d.%s.weight", f->prefix, f->layers, layer, f->modules[k]);
            if (mft__module_bias(c, (mft__module)k)) MFT__SPEC(out, 0, "%s%s.%d.%s.bias", f->prefix, f->layers, layer, f->modules[k]);
        }
    MFT__SPEC(c->hidden_size, 0, "%s%s.weight", f->prefix, f->final_norm);
    if (f->layer_norm) MFT__SPEC(c->hidden_size, 0, "%s%s.bias", f->prefix, f->final_norm);
    if (!c->tied_embeddings) MFT__SPEC(c->vocab_size, c->hidden_size, "lm_head.weight");
#undef MFT__SPEC
    return n;
}

MFT_API mft_status mft_model_init(mft_context *ctx, const char *config_path, uint64_t seed, mft_dtype dtype, const char *out_dir)
{
    mft_model_config        c;
    mft_safetensors_spec   *specs = NULL;
    char                  (*names)[160] = NULL;
    mft_safetensors_writer *w = NULL;
    mft_json               *root = NULL;
    mft__new_dir            place;
    char      *path = NULL, *text = NULL, *config_out = NULL;
    size_t     most, bytes = 0;
    double     std;
    mft_status s;
    int        i, n;

    if (!ctx || !config_path || !out_dir) return MFT_ERR_INVALID_ARGUMENT;
    if (!mft__is_float(dtype)) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_model_init: weights are f32, f16 or bf16");
    if ((s = mft__config_load(ctx, config_path, &c)) != MFT_OK) return s;
    if ((s = mft_json_load(ctx, config_path, &root)) != MFT_OK) { mft__free(ctx, c.layer_slides, (size_t)c.n_layer); return s; }
    std = mft_json_number(mft_json_get(root, "initializer_range"), 0.02);
    mft_json_destroy(root);
    most = (size_t)c.n_layer * MFT__N_MODULES * 2 + 8;
    if ((s = mft__new_dir_begin(ctx, out_dir, 0, &place)) != MFT_OK) { mft__free(ctx, c.layer_slides, (size_t)c.n_layer); return s; }
    specs = (mft_safetensors_spec *)mft__alloc_zero(ctx, most * sizeof *specs);
    names = (char (*)[160])mft__alloc_zero(ctx, most * sizeof *names);
    path  = mft__path_join(ctx, place.work, "model.safetensors");
    config_out = mft__path_join(ctx, place.work, "config.json");
    if (!specs || !names || !path || !config_out) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
    n = mft__init_specs(&c, dtype, specs, names);
    if ((s = mft_safetensors_write_begin(ctx, path, specs, n, NULL, &w)) != MFT_OK) goto done;
    for (i = 0; i < n && s == MFT_OK; i++) {
        mft_tensor *t = mft__tensor_held(ctx, MFT__OTHER, MFT_F32, specs[i].ndim, specs[i].shape, NULL);
        int64_t     count, j;
        if (!t) { s = MFT_ERR_OUT_OF_MEMORY; break; }
        count = mft_tensor_numel(t);
        if (specs[i].ndim == 2) {
            mft__normal_task task;
            task.x = (float *)t->data; task.std = std; task.seed = seed; task.stream = (uint64_t)i; task.n = count;
            mft__parallel(ctx, (count + 1) / 2, 8192, mft__normal_run, &task);
        } else if (!strstr(names[i], ".bias") && !mft__families[c.family].norm_offset)
            for (j = 0; j < count; j++) ((float *)t->data)[j] = 1;      /* Gemma stores w - 1 */
        s = mft_safetensors_write_tensor(w, i, t);
        mft_tensor_destroy(ctx, t);
    }
    if (s == MFT_OK) s = mft_safetensors_write_commit(w); else mft_safetensors_write_abort(w);
    if (s == MFT_OK) s = mft__file_read_all(ctx, config_path, (size_t)1 << 24, &text, &bytes);
    if (s == MFT_OK) { s = mft__file_write_all(ctx, config_out, text, bytes); mft__free(ctx, text, bytes + 1); }
done:
    mft__free(ctx, specs, most * sizeof *specs);
    mft__free(ctx, names, most * sizeof *names);
    mft__free(ctx, c.layer_slides, (size_t)c.n_layer);
    mft__strfree(ctx, path);
    mft__strfree(ctx, config_out);
    if (s == MFT_OK) s = mft__new_dir_commit(&place); else mft__new_dir_abort(&place);
    return s;
}

/* ==============================================================================
 * MARK: - [REGEX] Python's regular expressions, as PEFT's target_modules may be one
 *
 *   Literals, . [..] [^..] \d \w \s (and \D \W \S), groups ( ) (?: ), |, * + ? {m} {m,} {m,n} (lazy or not: a full
 *   match is the same), ^ $. Compiled to a program for Thompson's simulation, which takes time
 *   proportional to program times text, whatever the pattern (Thompson 1968; Cox 2007).
 * ============================================================================== */
enum { MFT__REGEX_SET, MFT__REGEX_SPLIT, MFT__REGEX_JUMP, MFT__REGEX_BEGIN, MFT__REGEX_END, MFT__REGEX_MATCH };
enum { MFT__REGEX_MAX = 1024, MFT__REGEX_DEPTH = 50 };

typedef struct mft__regex_op {
    unsigned char op;
    int           x, y;                     /* where to go, relative to this op                      */
    unsigned char set[32];                  /* bytes that pass                                       */
} mft__regex_op;

typedef struct mft__regex {
    mft__regex_op ops[MFT__REGEX_MAX];
    int           n, depth;
    const char   *at;                       /* in the pattern                                        */
    const char   *problem;                  /* NULL, or what is wrong                                */
} mft__regex;

static void mft__set_add(unsigned char *set, int from, int to) { for (; from <= to; from++) set[from >> 3] |= (unsigned char)(1 << (from & 7)); }

/* The class of an escape: \d \w \s, in capitals the others; otherwise the character itself. */
static void mft__set_escape(unsigned char *set, char c)
{
    unsigned char own[32];
    int           i, lower = c | 0x20;
    memset(own, 0, sizeof own);
    if (lower == 'd') mft__set_add(own, '0', '9');
    else if (lower == 'w') { mft__set_add(own, '0', '9'); mft__set_add(own, 'a', 'z'); mft__set_add(own, 'A', 'Z'); mft__set_add(own, '_', '_'); }
    else if (lower == 's') { mft__set_add(own, '\t', '\r'); mft__set_add(own, ' ', ' '); }
    else { mft__set_add(set, (unsigned char)c, (unsigned char)c); return; }
    for (i = 0; i < 32; i++) set[i] |= c == lower ? own[i] : (unsigned char)~own[i];
}

/* Room for `count` ops at `at`, moving what follows. 0: too long. */
static int mft__regex_insert(mft__regex *r, int at, int count)
{
    if (r->n + count > MFT__REGEX_MAX) { r->problem = "it is too long"; return 0; }
    memmove(r->ops + at + count, r->ops + at, (size_t)(r->n - at) * sizeof *r->ops);
    memset(r->ops + at, 0, (size_t)count * sizeof *r->ops);
    r->n += count;
    return 1;
}

static void mft__regex_alternatives(mft__regex *r);

static void mft__regex_class(mft__regex *r, unsigned char *set)            /* past "[" to past "]" */
{
    int negate = *r->at == '^', i, first = 1;
    if (negate) r->at++;
    while (*r->at && (*r->at != ']' || first)) {
        int from = (unsigned char)*r->at++;
        first = 0;
        if (from == '\\' && *r->at) {
            char c = *r->at++;
            if (strchr("dwsDWS", c)) { mft__set_escape(set, c); continue; }
            from = (unsigned char)c;
        }
        if (r->at[0] == '-' && r->at[1] && r->at[1] != ']') {
            mft__set_add(set, from, (unsigned char)r->at[1]);
            r->at += 2;
        } else mft__set_add(set, from, from);
    }
    if (*r->at != ']') { r->problem = "a [ has no ]"; return; }
    r->at++;
    if (negate) for (i = 0; i < 32; i++) set[i] = (unsigned char)~set[i];
}

static void mft__regex_atom(mft__regex *r)
{
    char           c = *r->at++;
    mft__regex_op *op;
    if (c == '(') {
        if (r->at[0] == '?') {
            if (r->at[1] != ':') { r->problem = "of (? only (?: is supported"; return; }
            r->at += 2;
        }
        if (++r->depth > MFT__REGEX_DEPTH) { r->problem = "its groups are nested too deep"; return; }
        mft__regex_alternatives(r);
        r->depth--;
        if (!r->problem && *r->at++ != ')') r->problem = "a ( has no )";
        return;
    }
    if (strchr("*+?{", c)) { r->problem = "a quantifier has nothing before it"; return; }
    if (!mft__regex_insert(r, r->n, 1)) return;
    op = &r->ops[r->n - 1];
    op->op = MFT__REGEX_SET;
    if (c == '^') op->op = MFT__REGEX_BEGIN;
    else if (c == '$') op->op = MFT__REGEX_END;
    else if (c == '.') memset(op->set, 0xff, sizeof op->set);
    else if (c == '[') mft__regex_class(r, op->set);
    else if (c == '\\' && *r->at) mft__set_escape(op->set, *r->at++);
    else mft__set_add(op->set, (unsigned char)c, (unsigned char)c);
}

/* The atom at [start, n) `low` times, and then up to `high` (-1: without end). */
static void mft__regex_repeat(mft__regex *r, int start, int low, int high)
{
    int length = r->n - start, i;
    if (low > 100 || high > 100) { r->problem = "more than 100 repetitions"; return; }
    for (i = 1; i < (low > high ? low : high); i++) {
        if (!mft__regex_insert(r, r->n, length)) return;
        memcpy(r->ops + r->n - length, r->ops + start, (size_t)length * sizeof *r->ops);
    }
    if (high < 0) {                                             /* low copies, the last one again and again; low 0: skipped as well */
        int last = r->n - length;
        if (!mft__regex_insert(r, r->n, 1)) return;
        r->ops[r->n - 1].op = MFT__REGEX_SPLIT; r->ops[r->n - 1].x = last - (r->n - 1); r->ops[r->n - 1].y = 1;
        if (low) return;
        if (!mft__regex_insert(r, start, 1)) return;
        r->ops[start].op = MFT__REGEX_SPLIT; r->ops[start].x = 1; r->ops[start].y = r->n - start;
        return;
    }
    if (high == 0) { r->n = start; return; }
    for (i = high - 1; i >= low; i--) {                         /* the optional ones may leave for the end */
        int at = start + i * length;
        if (!mft__regex_insert(r, at, 1)) return;
        r->ops[at].op = MFT__REGEX_SPLIT; r->ops[at].x = 1; r->ops[at].y = r->n - at;
    }
}

static void mft__regex_sequence(mft__regex *r)
{
    while (!r->problem && *r->at && *r->at != '|' && *r->at != ')') {
        int start = r->n, low = 1, high = 1;
        mft__regex_atom(r);
        if (r->problem || !*r->at) return;
        if (*r->at == '*')      { low = 0; high = -1; r->at++; }
        else if (*r->at == '+') { high = -1; r->at++; }
        else if (*r->at == '?') { low = 0; r->at++; }
        else if (*r->at == '{') {
            char *end;
            low = high = (int)strtol(r->at + 1, &end, 10);
            if (*end == ',') high = end[1] == '}' ? -1 : (int)strtol(end + 1, &end, 10);
            if (*end == ',') end++;
            if (*end != '}' || low < 0 || (high >= 0 && high < low)) { r->problem = "a { is not {m}, {m,} or {m,n}"; return; }
            r->at = end + 1;
        } else continue;
        if (*r->at == '?') r->at++;                             /* lazy: no difference to a full match */
        mft__regex_repeat(r, start, low, high);
    }
}

static void mft__regex_alternatives(mft__regex *r)
{
    int start = r->n;
    mft__regex_sequence(r);
    while (!r->problem && *r->at == '|') {                      /* SPLIT to the first or past its JUMP; JUMP over the second */
        int jump;
        r->at++;
        if (!mft__regex_insert(r, start, 1) || !mft__regex_insert(r, r->n, 1)) return;
        jump = r->n - 1;
        r->ops[start].op = MFT__REGEX_SPLIT; r->ops[start].x = 1; r->ops[start].y = jump + 1 - start;
        mft__regex_sequence(r);
        r->ops[jump].op = MFT__REGEX_JUMP; r->ops[jump].x = r->n - jump;
    }
}

/* All ops reachable from `pc` without a character join the set. */
static void mft__regex_follow(const mft__regex *r, int pc, int at_begin, int at_end, unsigned char *in, int *stack)
{
    int n = 0;
    stack[n++] = pc;
    while (n) {
        const mft__regex_op *op;
        pc = stack[--n];
        if (in[pc]) continue;
        in[pc] = 1;
        op = &r->ops[pc];
        if (op->op == MFT__REGEX_JUMP || op->op == MFT__REGEX_SPLIT) {
            if (!in[pc + op->x]) stack[n++] = pc + op->x;
            if (op->op == MFT__REGEX_SPLIT && !in[pc + op->y]) stack[n++] = pc + op->y;
        }
        if ((op->op == MFT__REGEX_BEGIN && at_begin) || (op->op == MFT__REGEX_END && at_end)) stack[n++] = pc + 1;
    }
}

/* Python's re.fullmatch: 1, 0, or a negative mft_status (the pattern is not one, or not supported). */
static int mft__regex_fullmatch(mft_context *ctx, const char *pattern, const char *text)
{
    mft__regex    *r = (mft__regex *)mft__alloc_zero(ctx, sizeof *r);
    unsigned char  in[MFT__REGEX_MAX], next[MFT__REGEX_MAX];
    int            stack[2 * MFT__REGEX_MAX + 2], i, result;
    const char    *p;
    if (!r) return MFT_ERR_OUT_OF_MEMORY;
    r->at = pattern;
    mft__regex_alternatives(r);
    if (!r->problem && *r->at == ')') r->problem = "a ) has no (";
    if (!r->problem && mft__regex_insert(r, r->n, 1)) r->ops[r->n - 1].op = MFT__REGEX_MATCH;
    if (r->problem) result = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "the pattern \"%.100s\" is not understood: %s", pattern, r->problem);
    else {
        memset(in, 0, sizeof in);
        mft__regex_follow(r, 0, 1, !*text, in, stack);
        for (p = text; *p; p++) {
            unsigned char c = (unsigned char)*p;
            memset(next, 0, sizeof next);
            for (i = 0; i < r->n; i++)
                if (in[i] && r->ops[i].op == MFT__REGEX_SET && (r->ops[i].set[c >> 3] >> (c & 7) & 1))
                    mft__regex_follow(r, i + 1, 0, !p[1], next, stack);
            memcpy(in, next, sizeof in);
        }
        result = in[r->n - 1];
    }
    mft__free(ctx, r, sizeof *r);
    return result;
}

/* PEFT's match of a rank_pattern's key: re.match("(.*\.)?(KEY)$", path). */
static int mft__regex_endmatch(mft_context *ctx, const char *key, const char *path)
{
    char pattern[600];
    if ((size_t)snprintf(pattern, sizeof pattern, "(.*\\.)?(%s)", key) >= sizeof pattern) return 0;
    return mft__regex_fullmatch(ctx, pattern, path);
}

/* ==============================================================================
 * MARK: - [ADAPTER] LoRA on a model's modules, PEFT's files
 *
 *   keys     base_model.model. + the module's path + .lora_A.weight | .lora_B.weight | .lora_magnitude_vector
 *   targets  a list: a module whose path is one of them or ends in "." + one; "all-linear"; a regular expression
 * ============================================================================== */
static mft__low_rank *mft__part_at(const mft_model *m, const mft__adapter *a, int layer, int module)
{
    (void)m;
    return &a->parts[layer * MFT__N_MODULES + module];
}

/* The path of a module as Transformers has it: transformer.h.0.attn.c_attn */
static void mft__module_path(const mft_model *m, int layer, int module, char *path, size_t cap)
{
    const mft__family *f = &mft__families[m->config.family];
    snprintf(path, cap, "%s%s.%d.%s", f->prefix, f->layers, layer, f->modules[module]);
}

/* Is `path` named by `name`, as the whole or as its last parts? */
static int mft__path_ends(const char *path, const char *name, size_t n)
{
    size_t p = strlen(path);
    if (p < n || memcmp(path + p - n, name, n)) return 0;
    return p == n || path[p - n - 1] == '.';
}

static void mft__adapter_free(mft_model *m, mft__adapter *a)
{
    mft_context *ctx = m->ctx;
    int          i, n = m->config.n_layer * MFT__N_MODULES;
    for (i = 0; a->parts && i < n; i++) {
        mft_tensor_destroy(ctx, a->parts[i].a);
        mft_tensor_destroy(ctx, a->parts[i].b);
        mft_tensor_destroy(ctx, a->parts[i].magnitude);
    }
    mft__free(ctx, a->parts, (size_t)n * sizeof *a->parts);
    mft__strfree(ctx, a->targets);
    mft__free(ctx, a, sizeof *a);
}

MFT_API void mft_lora_detach(mft_model *model)
{
    if (!model) return;
    while (model->n_adapters) mft__adapter_free(model, model->adapters[--model->n_adapters]);
    model->active = -1;
    model->ctx->weights_version++;
}

/* The active adapter is trainable, the others are not. */
static void mft__adapter_use(mft_model *m, int active)
{
    int a, i;
    m->active = active;
    m->ctx->weights_version++;
    for (a = 0; a < m->n_adapters; a++)
        for (i = 0; i < m->config.n_layer * MFT__N_MODULES; i++) {
            mft__low_rank *p = &m->adapters[a]->parts[i];
            if (!p->a) continue;
            p->a->trainable = p->b->trainable = a == active;
            if (p->magnitude) p->magnitude->trainable = a == active;
        }
}

/* An empty adapter of that name, not yet in the model's list. */
static mft_status mft__adapter_new(mft_model *m, const char *name, mft__adapter **out)
{
    mft_context  *ctx = m->ctx;
    mft__adapter *a;
    int           i;
    if (!name) name = "default";
    if (m->desc.train_all) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "an adapter needs a frozen base: the model was loaded with train_all");
    if (m->n_adapters == MFT__MAX_ADAPTERS) return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "more than %d adapters at once", MFT__MAX_ADAPTERS);
    for (i = 0; i < m->n_adapters; i++)
        if (!strcmp(m->adapters[i]->name, name)) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "an adapter \"%s\" is there already", name);
    a = (mft__adapter *)mft__alloc_zero(ctx, sizeof *a);
    if (!a) return MFT_ERR_OUT_OF_MEMORY;
    a->parts = (mft__low_rank *)mft__alloc_zero(ctx, (size_t)m->config.n_layer * MFT__N_MODULES * sizeof *a->parts);
    if (!a->parts) { mft__adapter_free(m, a); return MFT_ERR_OUT_OF_MEMORY; }
    snprintf(a->name, sizeof a->name, "%s", name);
    *out = a;
    return MFT_OK;
}

/* A and B (and DoRA's magnitude) on one module: zeros, to be drawn or read. */
static mft_status mft__adapter_add(mft_model *m, mft__adapter *a, int layer, int module, int rank, double alpha)
{
    mft_context   *ctx = m->ctx;
    mft__low_rank *p = mft__part_at(m, a, layer, module);
    mft_tensor    *w = mft__module_at(m, layer, module)->w->t;
    int64_t        shape[2];
    char           path[160];
    mft__module_path(m, layer, module, path, sizeof path);
    p->rank  = rank;
    p->scale = (float)(a->use_rslora ? alpha / sqrt((double)rank) : alpha / rank);
    shape[0] = rank; shape[1] = w->shape[1];
    p->a = mft__tensor_held(ctx, MFT__WEIGHTS, MFT_F32, 2, shape, NULL);
    shape[0] = w->shape[0]; shape[1] = rank;
    p->b = mft__tensor_held(ctx, MFT__WEIGHTS, MFT_F32, 2, shape, NULL);
    if (!p->a || !p->b) return MFT_ERR_OUT_OF_MEMORY;
    snprintf(p->name[0], sizeof p->name[0], "base_model.model.%s.lora_A.weight", path);
    snprintf(p->name[1], sizeof p->name[1], "base_model.model.%s.lora_B.weight", path);
    snprintf(p->name[2], sizeof p->name[2], "base_model.model.%s.lora_magnitude_vector", path);
    p->a->name = p->name[0]; p->b->name = p->name[1];
    if (a->use_dora) {
        p->magnitude = mft__tensor_held(ctx, MFT__WEIGHTS, MFT_F32, 1, shape, NULL);
        if (!p->magnitude) return MFT_ERR_OUT_OF_MEMORY;
        p->magnitude->name = p->name[2];
        mft_step_reset(ctx);
        if (!mft__row_norms(ctx, w, NULL, NULL, 0, 0, (float *)p->magnitude->data)) return ctx->step_status;
    }
    return MFT_OK;
}

/* One target out of a comma-separated list; 0 at its end. Blanks around it are dropped. */
static int mft__next_target(const char **at, const char **target, size_t *n)
{
    const char *p = *at;
    while (*p == ',' || *p == ' ') p++;
    if (!*p) return 0;
    *target = p;
    while (*p && *p != ',') p++;
    *at = p;
    while (p > *target && p[-1] == ' ') p--;
    *n = (size_t)(p - *target);
    return 1;
}

/* Does a target with these characters read as a regular expression rather than as names? */
static int mft__is_pattern(const char *targets) { return strpbrk(targets, "*+?()[]|\\^$") != NULL; }

/* Does the adapter go on this module? 0 no, 1 yes, negative: an mft_status. */
static int mft__is_target(mft_model *m, const char *targets, int layer, int module)
{
    char        path[160];
    const char *at = targets, *target;
    size_t      n;
    int64_t     out, in;
    if (!mft__families[m->config.family].modules[module]) return 0;
    mft__module_shape(&m->config, (mft__module)module, &out, &in);
    if (!in) return 0;
    mft__module_path(m, layer, module, path, sizeof path);
    if (!strcmp(targets, "all-linear")) return 1;
    if (mft__is_pattern(targets)) return mft__regex_fullmatch(m->ctx, targets, path);
    while (mft__next_target(&at, &target, &n)) if (mft__path_ends(path, target, n)) return 1;
    return 0;
}

/* A target of a list that no module answers to: INVALID_ARGUMENT naming it. */
static mft_status mft__check_targets(mft_model *m, const char *targets)
{
    const mft__family *f = &mft__families[m->config.family];
    const char *at = targets, *target;
    char        known[512], path[160];
    size_t      n, used = 0;
    int         k;
    if (!strcmp(targets, "all-linear")) return MFT_OK;
    for (k = 0, known[0] = '\0'; k < MFT__N_MODULES; k++)
        if (f->modules[k] && !mft__is_norm((mft__module)k)) used += (size_t)snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", f->modules[k]);
    if (mft__is_pattern(targets)) {
        int layer, matched = 0;
        for (layer = 0; layer < m->config.n_layer; layer++)
            for (k = 0; k < MFT__N_MODULES; k++) {
                int r = mft__is_target(m, targets, layer, k);
                if (r < 0) return (mft_status)r;
                matched |= r;
            }
        return matched ? MFT_OK : mft__fail(m->ctx, MFT_ERR_INVALID_ARGUMENT, "the pattern \"%.100s\" matches no module of this %s model (%s)", targets, m->config.model_type, known);
    }
    if (!mft__next_target(&at, &target, &n)) return mft__fail(m->ctx, MFT_ERR_INVALID_ARGUMENT, "the targets \"%.100s\" name no module (%s)", targets, known);
    at = targets;
    while (mft__next_target(&at, &target, &n)) {
        int layer, found = 0;
        for (layer = 0; layer < m->config.n_layer && !found; layer++)
            for (k = 0; k < MFT__N_MODULES; k++) {
                if (!f->modules[k] || mft__is_norm((mft__module)k)) continue;
                mft__module_path(m, layer, k, path, sizeof path);
                found |= mft__path_ends(path, target, n);
            }
        if (!found) return mft__fail(m->ctx, MFT_ERR_INVALID_ARGUMENT, "the target \"%.*s\" matches no module of this %s model (%s)", (int)mft__min((int64_t)n, 100), target, m->config.model_type, known);
    }
    return MFT_OK;
}

/* The finished text, freed with mft__strfree; NULL when memory ran out. Ends the writer. */
static char *mft__json_write_take(mft__json_writer *w)
{
    char *text = w->failed ? NULL : mft__strdup(w->ctx, (const char *)w->text);
    mft__json_write_free(w);
    return text;
}

/* target_modules as PEFT writes it: a list of names, or one string. */
static char *mft__targets_json(mft_context *ctx, const char *targets)
{
    mft__json_writer w;
    const char *at = targets, *target;
    char       *text;
    size_t      n;
    mft__json_write_start(&w, ctx, 0);
    if (!strcmp(targets, "all-linear") || mft__is_pattern(targets)) mft__json_write_string(&w, targets, -1);
    else {
        mft__json_write_open(&w, '[');
        while (mft__next_target(&at, &target, &n)) mft__json_write_string(&w, target, (int64_t)n);
        mft__json_write_close(&w, ']');
    }
    text = mft__json_write_take(&w);
    return text;
}

MFT_API mft_status mft_lora_attach(mft_model *model, const mft_lora_desc *desc)
{
    mft_lora_desc d;
    mft_context  *ctx;
    mft__adapter *a = NULL;
    mft_status    s;
    int           layer, k;
    uint64_t      stream = 0;

    if (!model) return MFT_ERR_INVALID_ARGUMENT;
    ctx = model->ctx;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (!d.rank) d.rank = 8;
    if (d.alpha == 0) d.alpha = 2.0f * (float)d.rank;
    if (!d.targets || !*d.targets) d.targets = mft_family_lora_targets(model->config.family);
    if (d.rank < 0) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "a LoRA rank of %d", d.rank);
    if (!(fabsf(d.alpha) <= 3.4e38f)) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "a LoRA alpha of %g", (double)d.alpha);
    if (!(d.dropout >= 0 && d.dropout < 1)) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "a LoRA dropout of %g is not in [0, 1)", (double)d.dropout);
    if ((s = mft__check_targets(model, d.targets)) != MFT_OK || (s = mft__adapter_new(model, d.name, &a)) != MFT_OK) return s;
    a->rank = d.rank; a->alpha = d.alpha; a->dropout = d.dropout; a->use_rslora = d.use_rslora; a->use_dora = d.use_dora;
    a->targets = mft__targets_json(ctx, d.targets);
    if (!a->targets) s = MFT_ERR_OUT_OF_MEMORY;
    for (layer = 0; layer < model->config.n_layer && s == MFT_OK; layer++)
        for (k = 0; k < MFT__N_MODULES && s == MFT_OK; k++) {
            mft__low_rank *p;
            int64_t        i, n;
            double         bound;
            int            on = mft__is_target(model, d.targets, layer, k);
            if (on < 0) s = (mft_status)on;
            if (on <= 0) continue;
            if ((s = mft__adapter_add(model, a, layer, k, d.rank, d.alpha)) != MFT_OK) break;
            p = mft__part_at(model, a, layer, k);
            n = mft_tensor_numel(p->a);
            bound = 1 / sqrt((double)p->a->shape[1]);           /* kaiming_uniform_ with a = sqrt(5) */
            for (i = 0; i < n; i++) ((float *)p->a->data)[i] = (float)((2 * mft__uniform(mft__random(d.seed, stream, (uint64_t)i)) - 1) * bound);
            stream++;
        }
    if (s != MFT_OK) { mft__adapter_free(model, a); return s; }
    model->adapters[model->n_adapters++] = a;
    mft__adapter_use(model, model->n_adapters - 1);
    return MFT_OK;
}

MFT_API mft_status mft_lora_activate(mft_model *model, const char *name)
{
    int i;
    if (!model) return MFT_ERR_INVALID_ARGUMENT;
    if (!name) { mft__adapter_use(model, -1); return MFT_OK; }
    for (i = 0; i < model->n_adapters; i++)
        if (!strcmp(model->adapters[i]->name, name)) { mft__adapter_use(model, i); return MFT_OK; }
    return mft__fail(model->ctx, MFT_ERR_INVALID_ARGUMENT, "there is no adapter \"%.63s\"", name);
}

MFT_API const char *mft_lora_active(const mft_model *model) { return model && model->active >= 0 ? model->adapters[model->active]->name : NULL; }

MFT_API void mft_lora_report(const mft_model *model, mft_lora_report_fn fn, void *user)
{
    const mft__family *f;
    int k, layer;
    if (!model || !fn || model->active < 0) return;
    f = &mft__families[model->config.family];
    for (k = 0; k < MFT__N_MODULES; k++) {
        int     n = 0;
        int64_t count = 0;
        for (layer = 0; layer < model->config.n_layer; layer++) {
            mft__low_rank *p = mft__part_at(model, model->adapters[model->active], layer, k);
            if (!p->a) continue;
            n++;
            count += mft_tensor_numel(p->a) + mft_tensor_numel(p->b) + mft_tensor_numel(p->magnitude);
        }
        if (n) fn(user, f->modules[k], n, count);
    }
}

/* ---- files ---- */
static void mft__write_pattern(mft__json_writer *w, const mft_model *m, const mft__adapter *a, int alphas)
{
    int  layer, k;
    char path[160];
    mft__json_write_open(w, '{');
    for (layer = 0; layer < m->config.n_layer; layer++)
        for (k = 0; k < MFT__N_MODULES; k++) {
            mft__low_rank *p = mft__part_at(m, a, layer, k);
            double alpha;
            if (!p->a) continue;
            alpha = p->scale * (a->use_rslora ? sqrt((double)p->rank) : (double)p->rank);
            if (alphas ? fabs(alpha - a->alpha) <= 1e-5 * fabs(alpha) : p->rank == a->rank) continue;
            mft__module_path(m, layer, k, path, sizeof path);
            mft__json_write_key(w, path);
            if (alphas) mft__json_write_number(w, alpha, 9); else mft__json_write_integer(w, p->rank);
        }
    mft__json_write_close(w, '}');
}

/* adapter_config.json, with the fields PEFT's LoraConfig reads. */
static char *mft__adapter_config(const mft_model *m, const mft__adapter *a)
{
    static const char *const nulls[] = { "auto_mapping", "eva_config", "exclude_modules", "layer_replication", "layers_pattern",
                                         "layers_to_transform", "modules_to_save", "revision", "target_parameters", "trainable_token_indices" };
    mft__json_writer w;
    size_t i;
    mft__json_write_start(&w, m->ctx, 2);
    mft__json_write_open(&w, '{');
    mft__json_write_key(&w, "peft_type");      mft__json_write_string(&w, "LORA", -1);
    mft__json_write_key(&w, "task_type");      mft__json_write_string(&w, "CAUSAL_LM", -1);
    mft__json_write_key(&w, "base_model_name_or_path"); mft__json_write_string(&w, m->dir, -1);
    mft__json_write_key(&w, "r");              mft__json_write_integer(&w, a->rank);
    mft__json_write_key(&w, "lora_alpha");     mft__json_write_number(&w, (double)a->alpha, 7);
    mft__json_write_key(&w, "lora_dropout");   mft__json_write_number(&w, (double)a->dropout, 7);
    mft__json_write_key(&w, "target_modules"); mft__json_write_word(&w, a->targets);
    mft__json_write_key(&w, "rank_pattern");   mft__write_pattern(&w, m, a, 0);
    mft__json_write_key(&w, "alpha_pattern");  mft__write_pattern(&w, m, a, 1);
    mft__json_write_key(&w, "use_rslora");     mft__json_write_bool(&w, a->use_rslora);
    mft__json_write_key(&w, "use_dora");       mft__json_write_bool(&w, a->use_dora);
    mft__json_write_key(&w, "fan_in_fan_out"); mft__json_write_bool(&w, mft__families[m->config.family].conv1d);
    mft__json_write_key(&w, "bias");           mft__json_write_string(&w, "none", -1);
    mft__json_write_key(&w, "lora_bias");      mft__json_write_bool(&w, 0);
    mft__json_write_key(&w, "init_lora_weights"); mft__json_write_bool(&w, 1);
    mft__json_write_key(&w, "inference_mode"); mft__json_write_bool(&w, 1);
    for (i = 0; i < sizeof nulls / sizeof *nulls; i++) { mft__json_write_key(&w, nulls[i]); mft__json_write_word(&w, "null"); }
    mft__json_write_close(&w, '}');
    return mft__json_write_take(&w);
}

/* The two files of the active adapter into a directory. */
static mft_status mft__lora_write(mft_model *model, const char *dir)
{
    mft_context  *ctx = model->ctx;
    mft__adapter *a = model->adapters[model->active];
    size_t        most = (size_t)model->config.n_layer * MFT__N_MODULES * 3;
    mft_tensor  **tensors = (mft_tensor **)mft__alloc(ctx, most * sizeof *tensors);
    char         *config = mft__adapter_config(model, a), *path = mft__path_join(ctx, dir, "adapter_model.safetensors");
    char         *config_path = mft__path_join(ctx, dir, "adapter_config.json");
    mft_status    s = tensors && config && path && config_path ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    int           i, k, n = 0;
    for (i = 0; s == MFT_OK && i < model->config.n_layer * MFT__N_MODULES; i++) {
        mft_tensor *t[3];
        t[0] = a->parts[i].a; t[1] = a->parts[i].b; t[2] = a->parts[i].magnitude;
        for (k = 0; k < 3; k++) if (t[k]) tensors[n++] = t[k];
    }
    if (s == MFT_OK) s = mft_safetensors_save(ctx, path, tensors, n, NULL);
    if (s == MFT_OK) s = mft__file_write_all(ctx, config_path, config, strlen(config));
    mft__free(ctx, tensors, most * sizeof *tensors);
    mft__strfree(ctx, config);
    mft__strfree(ctx, path);
    mft__strfree(ctx, config_path);
    return s;
}

MFT_API mft_status mft_lora_save(mft_model *model, const char *dir)
{
    mft__new_dir place;
    mft_status   s;
    if (!model || !dir) return MFT_ERR_INVALID_ARGUMENT;
    if (model->active < 0) return mft__fail(model->ctx, MFT_ERR_INVALID_ARGUMENT, "mft_lora_save: no adapter is active");
    if ((s = mft__new_dir_begin(model->ctx, dir, 0, &place)) != MFT_OK) return s;
    s = mft__lora_write(model, place.work);
    if (s == MFT_OK) s = mft__new_dir_commit(&place); else mft__new_dir_abort(&place);
    return s;
}

/* rank_pattern's or alpha_pattern's value for a module: a key is the end of its path, or a regular expression. */
static double mft__pattern_value(mft__config_reader *r, const char *field, const char *path, double otherwise)
{
    size_t      i;
    const char *key;
    const mft_json *node, *pattern = mft_json_get(r->root, field);
    for (i = 0; (node = mft_json_at(pattern, i, &key)) != NULL; i++)
        if (mft__path_ends(path, key, strlen(key)) || (mft__is_pattern(key) && mft__regex_endmatch(r->ctx, key, path) == 1)) {
            if (mft_json_type(node) != MFT_JSON_NUMBER && r->status == MFT_OK)
                r->status = mft__fail(r->ctx, MFT_ERR_FORMAT, "%s: \"%s\": \"%.100s\" is not a number", r->path, field, key);
            return mft_json_number(node, otherwise);
        }
    return otherwise;
}

static mft_status mft__read_low_rank(mft_model *m, mft_safetensors *st, const char *file, const char *key, mft_tensor *dst, int *n_used)
{
    const mft_safetensors_entry *e = mft_safetensors_find(st, key);
    mft_status s;
    if (!e) return mft__fail(m->ctx, MFT_ERR_FORMAT, "%s: the tensor %s is missing", file, key);
    (*n_used)++;
    if (e->problem) return mft__fail(m->ctx, MFT_ERR_UNSUPPORTED, "%s: %s: %s", file, key, e->problem);
    if (e->ndim != dst->ndim || memcmp(e->shape, dst->shape, (size_t)e->ndim * sizeof *e->shape)) {
        mft_tensor      is;
        mft__shape_text got, wanted;
        memset(&is, 0, sizeof is);
        is.ndim = e->ndim; memcpy(is.shape, e->shape, sizeof is.shape);
        return mft__fail(m->ctx, MFT_ERR_FORMAT, "%s: %s is %s, this base and adapter_config.json want %s", file, key, mft__shape(&is, &got), mft__shape(dst, &wanted));
    }
    s = mft_safetensors_read(st, e, dst);
    if (s == MFT_OK && mft__has_nonfinite(m->ctx->kernels, dst->data, MFT_F32, mft_tensor_numel(dst)))
        s = mft__fail(m->ctx, MFT_ERR_FORMAT, "%s: %s holds NaN or infinity", file, key);
    return s;
}

/* Fields of adapter_config.json that would change the numbers and are not done here. */
static mft_status mft__adapter_refuse(mft_context *ctx, const char *path, const mft_json *root)
{
    const char *type = mft_json_string(mft_json_get(root, "peft_type"), NULL), *bias = mft_json_string(mft_json_get(root, "bias"), NULL);
    const mft_json *save = mft_json_get(root, "modules_to_save");
    if (!type || strcmp(type, "LORA")) return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: peft_type is \"%.40s\", only LORA is supported", path, type ? type : "missing");
    if (bias && strcmp(bias, "none")) return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: bias \"%.40s\" is not supported: the base's biases stay as they are", path, bias);
    if (mft_json_count(save)) return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: modules_to_save is not supported: it replaces whole modules of the base, which an adapter here leaves alone", path);
    if (mft_json_bool(mft_json_get(root, "lora_bias"), 0)) return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: lora_bias is not supported", path);
    if (mft_json_count(mft_json_get(root, "layer_replication"))) return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: layer_replication is not supported", path);
    if (mft_json_count(mft_json_get(root, "trainable_token_indices"))) return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "%s: trainable_token_indices is not supported", path);
    return MFT_OK;
}

MFT_API mft_status mft_lora_load(mft_model *model, const char *dir, const char *name)
{
    mft_context     *ctx;
    mft_json        *root = NULL;
    mft_safetensors *st = NULL;
    mft__adapter    *a = NULL;
    mft__config_reader r;
    const mft_safetensors_entry *entries;
    char      *config_path = NULL, *path = NULL, module_path[160], key[200];
    size_t     n_entries = 0, i;
    int        layer, k, used = 0;
    mft_status s;

    if (!model) return MFT_ERR_INVALID_ARGUMENT;
    ctx = model->ctx;
    if (!dir) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_lora_load: no directory");
    config_path = mft__path_join(ctx, dir, "adapter_config.json");
    path        = mft__path_join(ctx, dir, "adapter_model.safetensors");
    if (!config_path || !path) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
    if ((s = mft_json_load(ctx, config_path, &root)) != MFT_OK || (s = mft__adapter_refuse(ctx, config_path, root)) != MFT_OK
        || (s = mft_safetensors_open(ctx, path, &st)) != MFT_OK || (s = mft__adapter_new(model, name, &a)) != MFT_OK) goto done;
    r.ctx = ctx; r.path = config_path; r.root = root; r.status = MFT_OK;
    a->rank       = (int)mft__config_int(&r, "r", 1, 1 << 24, 1, 0);
    a->alpha      = (float)mft__config_number(&r, root, "lora_alpha", 8);
    a->dropout    = (float)mft__config_number(&r, root, "lora_dropout", 0);
    a->use_rslora = mft__config_bool(&r, root, "use_rslora", 0);
    a->use_dora   = mft__config_bool(&r, root, "use_dora", 0);
    if ((s = r.status) != MFT_OK) goto done;
    if (!(a->dropout >= 0 && a->dropout < 1)) { s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: \"lora_dropout\" is not in [0, 1)", config_path); goto done; }
    {
        mft__json_writer w;
        mft__json_write_start(&w, ctx, 0);
        mft__json_write_node(&w, mft_json_get(root, "target_modules"));
        a->targets = mft__json_write_take(&w);
        if (!a->targets) { s = MFT_ERR_OUT_OF_MEMORY; goto done; }
    }
    entries = mft_safetensors_entries(st, &n_entries);
    for (layer = 0; layer < model->config.n_layer; layer++)     /* the file's tensors say where the adapter is */
        for (k = 0; k < MFT__N_MODULES; k++) {
            const mft_safetensors_entry *e;
            mft__low_rank *p;
            int64_t out, in;
            double  rank, alpha;
            if (!mft__families[model->config.family].modules[k]) continue;
            mft__module_shape(&model->config, (mft__module)k, &out, &in);
            if (!in) continue;
            mft__module_path(model, layer, k, module_path, sizeof module_path);
            snprintf(key, sizeof key, "base_model.model.%s.lora_A.weight", module_path);
            if (!(e = mft_safetensors_find(st, key))) continue;
            rank  = mft__pattern_value(&r, "rank_pattern", module_path, a->rank);
            alpha = mft__pattern_value(&r, "alpha_pattern", module_path, (double)a->alpha);
            if ((s = r.status) != MFT_OK) goto done;
            if (e->ndim != 2 || (double)e->shape[0] != rank || e->shape[1] != in) {
                s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: %s is [%lld, %lld], this base and %s want [%.0f, %lld]", path, key, (long long)e->shape[0],
                              e->ndim == 2 ? (long long)e->shape[1] : 0, "adapter_config.json", rank, (long long)in);
                goto done;
            }
            if ((s = mft__adapter_add(model, a, layer, k, (int)rank, alpha)) != MFT_OK) goto done;
            p = mft__part_at(model, a, layer, k);
            if ((s = mft__read_low_rank(model, st, path, p->name[0], p->a, &used)) != MFT_OK) goto done;
            if ((s = mft__read_low_rank(model, st, path, p->name[1], p->b, &used)) != MFT_OK) goto done;
            if (p->magnitude && (s = mft__read_low_rank(model, st, path, p->name[2], p->magnitude, &used)) != MFT_OK) goto done;
        }
    if (!used) { s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: no tensor of it belongs to a %s model with %d layers: it is another base's adapter", path, model->config.model_type, model->config.n_layer); goto done; }
    for (i = 0; (size_t)used < n_entries && i < n_entries; i++) {       /* name one that went nowhere */
        int found = 0;
        for (k = 0; k < model->config.n_layer * MFT__N_MODULES && !found; k++) {
            mft__low_rank *p = &a->parts[k];
            found = p->a && (!strcmp(entries[i].name, p->name[0]) || !strcmp(entries[i].name, p->name[1]) || (p->magnitude && !strcmp(entries[i].name, p->name[2])));
        }
        if (!found) {
            mft__name_text text;
            s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: the tensor %s belongs to no module of this %s model with %d layers", path,
                          mft__name(entries[i].name, strlen(entries[i].name), &text), model->config.model_type, model->config.n_layer);
            goto done;
        }
    }
done:
    if (s == MFT_OK) {
        model->adapters[model->n_adapters++] = a;
        mft__adapter_use(model, model->n_adapters - 1);
    } else if (a) mft__adapter_free(model, a);
    mft_safetensors_close(st);
    mft_json_destroy(root);
    mft__strfree(ctx, config_path);
    mft__strfree(ctx, path);
    return s;
}

/* ---- merging ---- */

/* w's numbers become w + scale b a (DoRA: magnitude / norm times that), computed in f32, rounded once. */
static mft_status mft__merge_module(mft_model *m, mft__parameter *p, const mft__low_rank *lr)
{
    mft_context *ctx = m->ctx;
    mft_tensor  *old = p->t, *t;
    int64_t      out = old->shape[0], in = old->shape[1], o, c, shape[2];
    int          strided = old->stride[1] != 1;
    float       *row;
    mft_status   s = MFT_OK;
    shape[0] = strided ? in : out; shape[1] = strided ? out : in;
    if ((s = mft__weight_fetch(m, old, 0, out * in)) != MFT_OK) return s;
    t = mft__tensor_held(ctx, MFT__WEIGHTS, old->dtype, 2, shape, NULL);
    if (!t) return MFT_ERR_OUT_OF_MEMORY;
    memcpy(t->shape, old->shape, sizeof t->shape);
    memcpy(t->stride, old->stride, sizeof t->stride);
    t->name = old->name;
    mft_step_reset(ctx);
    row = (float *)mft__high(ctx, (size_t)in * sizeof(float));
    if (!row) { mft_tensor_destroy(ctx, t); return MFT_ERR_OUT_OF_MEMORY; }
    for (o = 0; o < out && s == MFT_OK; o++) {
        size_t size = mft_dtype_bytes(old->dtype, 1);
        float  w, norm = 0;
        if (!mft__gemm(ctx, 1, in, lr->rank, lr->scale, mft__matrix_f32((const float *)lr->b->data + o * lr->rank, lr->rank, 1),
                       mft__matrix_f32((const float *)lr->a->data, in, 1), NULL, 0, row, in)) s = MFT_ERR_OUT_OF_MEMORY;
        for (c = 0; c < in; c++) {
            ctx->kernels->to_float(&w, (const char *)old->data + size * (size_t)(o * old->stride[0] + c * old->stride[1]), old->dtype, 1);
            row[c] += w;
        }
        if (lr->magnitude) {
            norm = (float)sqrt(ctx->kernels->sum_squares(row, in));
            ctx->kernels->scale(row, ((const float *)lr->magnitude->data)[o] / norm, row, in);
        }
        for (c = 0; c < in; c++)
            ctx->kernels->from_float((char *)t->data + size * (size_t)(o * t->stride[0] + c * t->stride[1]), t->dtype, row + c, 1);
    }
    mft__high_free(ctx, row, (size_t)in * sizeof(float));
    mft_step_reset(ctx);
    if (s != MFT_OK) { mft_tensor_destroy(ctx, t); return s; }
    mft_tensor_destroy(ctx, old);
    p->t = t;
    return MFT_OK;
}

MFT_API mft_status mft_lora_merge(mft_model *model)
{
    mft__adapter *a;
    mft_status    s = MFT_OK;
    int           layer, k;
    if (!model) return MFT_ERR_INVALID_ARGUMENT;
    if (model->active < 0) return mft__fail(model->ctx, MFT_ERR_INVALID_ARGUMENT, "mft_lora_merge: no adapter is active");
    if ((s = mft__refuse_quantized(model, "mft_lora_merge")) != MFT_OK) return s;
    a = model->adapters[model->active];
    model->ctx->weights_version++;                              /* also if it fails midway */
    for (layer = 0; layer < model->config.n_layer && s == MFT_OK; layer++)
        for (k = 0; k < MFT__N_MODULES && s == MFT_OK; k++) {
            mft__low_rank *p = mft__part_at(model, a, layer, k);
            if (!p->a) continue;
            s = mft__merge_module(model, mft__module_at(model, layer, k)->w, p);
            if (s != MFT_OK) break;
            mft_tensor_destroy(model->ctx, p->a); mft_tensor_destroy(model->ctx, p->b); mft_tensor_destroy(model->ctx, p->magnitude);
            p->a = p->b = p->magnitude = NULL;                  /* merged: not again if a later module fails */
        }
    if (s == MFT_OK) mft_lora_detach(model);
    return s;
}

/* ==============================================================================
 * MARK: - [TRAINER] Windows of micro-batches
 *
 *   Each micro-batch adds the gradient of the sum of its labels' losses; the optimizer divides by the
 *   window's labels. So the mean is exact however the window is split.
 * ============================================================================== */
/* Where the time of a run goes: each stretch of it belongs to the step, evaluation or checkpoint at its end, what the
 * app's callbacks and pauses take included. Asks no clock itself. */
typedef enum mft__lap_kind { MFT__LAP_STEP, MFT__LAP_EVAL, MFT__LAP_SAVE, MFT__N_LAPS } mft__lap_kind;
typedef struct mft__pace {
    double  mark;                           /* when the last stretch ended                           */
    double  seconds[MFT__N_LAPS];
    int64_t n[MFT__N_LAPS];
    double  first_step;                     /* which is slower: counted as long as it is the only one */
    double  guess[MFT__N_LAPS];             /* of one, while none was measured                       */
    int64_t n_best;                         /* evaluations that led to a checkpoint, as they were the best */
} mft__pace;

struct mft_trainer {
    mft__object     object;
    mft_context    *ctx;
    mft_model      *model;
    mft_dataset    *data;
    mft_trainer_desc desc;
    mft_optimizer  *opt;
    mft__statefile *state;                  /* its moments, where the model has a state file         */
    mft_tensor    **params;
    int             n_params;
    struct mft__early *early;               /* desc.update_in_backward, or NULL                       */
    int64_t         warmup;                 /* steps */
    int64_t         step, target;           /* done; where mft_trainer_run will end, 0: not known    */
    int             planned_batch, planned_seq;     /* what the arena holds in one piece             */
    int             per_pass;               /* sequences of a micro-batch that go through at a time   */
    uint64_t        passes;                 /* micro-batches of the steps done: the stream of dropout */
    int64_t         tokens;                 /* of this object's steps, for the speed                  */
    double          seconds;
    mft__pace       pace;                   /* of its runs                                            */
    char           *save_dir;               /* desc's                                                 */
    int64_t         saved_step;             /* of the latest checkpoint                               */
    mft_trainer_info info;
    int             evals_since_best, nonfinite_in_row;
    uint64_t        base_hash, tokenizer_hash;      /* made when first needed, see [CHECKPOINT]       */
    int             identified;
};

/* Updates in the middle of the backward pass: see mft_trainer_desc. */
typedef struct mft__early_part { int level; double squares; } mft__early_part;    /* level: what mft__when_undone tells; -1: at the end */
typedef struct mft__early {
    mft__early_part *parts;                 /* of each parameter; squares: of its gradient in this window */
    double           last_norm;             /* of the window before; 0: there was none               */
    double           learning_rate, scale;  /* of this window: 1 / labels, and the clipping          */
    int              begun;                 /* the last pass of the window                           */
} mft__early;

static double mft__now(void)                                    /* seconds, for differences */
{
    struct timeval t;
    gettimeofday(&t, NULL);
    return (double)t.tv_sec + (double)t.tv_usec * 1e-6;
}

static void mft__sleep_ms(int ms)
{
    struct timeval t;
    t.tv_sec = ms / 1000; t.tv_usec = ms % 1000 * 1000;
    select(0, NULL, NULL, NULL, &t);
}

/* A line "KEY:   123 kB" of /proc/self/status, in bytes; 0 where there is none. */
static size_t mft__proc_status(const char *key)
{
    char   line[256];
    size_t kb = 0, n = strlen(key);
    FILE  *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, key, n) && line[n] == ':') kb = (size_t)strtoull(line + n + 1, NULL, 10);
    if (f) fclose(f);
    return kb * 1024;
}

MFT_API void mft_process_memory(size_t *out_now, size_t *out_peak)
{
    if (out_now)  *out_now  = mft__proc_status("VmRSS");
    if (out_peak) *out_peak = mft__proc_status("VmHWM");
}

/* ---- the memory trace: its thread reads of the context only what is atomic ---- */
struct mft_memory_trace {
    mft__object  object;
    mft_context *ctx;
    FILE        *f;
    char        *path, *buffer;
    int          csv, interval_ms, fd;      /* fd: of /proc/self/statm                               */
    int          stop, reason;              /* stop: written by the owner, __atomic; reason: errno of the first write that failed */
    double       began;
#ifndef MFT_NO_THREADS
    pthread_t    thread;
#endif
    int          running;
};

enum { MFT__TRACE_BUFFER = 1 << 16 };

#if defined(__linux__) && !defined(MFT_NO_THREADS)

/* The second number of statm is the resident pages. Less than a tenth of reading status, and nothing is allocated. */
static uint64_t mft__resident_now(int fd)
{
    char    text[128];
    char   *p;
    int64_t n = mft__os_seek(fd, 0) ? mft__os_read(fd, text, sizeof text - 1) : 0;
    text[n > 0 ? n : 0] = '\0';
    p = strchr(text, ' ');
    return p ? (uint64_t)strtoull(p, NULL, 10) * (uint64_t)sysconf(_SC_PAGESIZE) : 0;
}

static void mft__trace_line(mft_memory_trace *t)
{
    static const char *const phases[MFT__N_PHASES] = { "load", "forward", "backward", "optimizer", "eval", "save", "other" };
    const char *format = t->csv ? "%.3f,%llu,%d,%s\n" : "{\"t_ms\":%.3f,\"rss_bytes\":%llu,\"step\":%d,\"phase\":\"%s\"}\n";
    unsigned long long rss = mft__resident_now(t->fd);
    if (fprintf(t->f, format, (mft__now() - t->began) * 1e3, rss, __atomic_load_n(&t->ctx->phase_step, __ATOMIC_RELAXED),
                phases[__atomic_load_n(&t->ctx->phase, __ATOMIC_RELAXED)]) < 0 && !t->reason) t->reason = errno;
}

static void *mft__trace_main(void *self)
{
    mft_memory_trace *t = (mft_memory_trace *)self;
    int               lines = 0;
    while (!__atomic_load_n(&t->stop, __ATOMIC_ACQUIRE) && !t->reason) {
        mft__trace_line(t);
        if (++lines % 200 == 0 && fflush(t->f) != 0 && !t->reason) t->reason = errno;     /* what a kill leaves: all but the last second */
        mft__sleep_ms(t->interval_ms);
    }
    return NULL;
}

static mft_status mft__trace_start(mft_memory_trace *t)
{
    t->fd = mft__os_open("/proc/self/statm", MFT__OPEN_READ);
    if (t->fd < 0) return mft__fail(t->ctx, MFT_ERR_UNSUPPORTED, "%s: /proc/self/statm, which says the resident memory, cannot be read", mft__path(t->path));
    t->f = fopen(t->path, "w");
    if (!t->f) return mft__fail(t->ctx, MFT_ERR_IO, "%s: cannot be written: %s", mft__path(t->path), strerror(errno));
    setvbuf(t->f, t->buffer, _IOFBF, MFT__TRACE_BUFFER);
    if (t->csv && fputs("t_ms,rss_bytes,step,phase\n", t->f) < 0) t->reason = errno;
    t->began = mft__now();
    if (pthread_create(&t->thread, NULL, mft__trace_main, t)) return mft__fail(t->ctx, MFT_ERR_OUT_OF_MEMORY, "a thread could not be started");
    t->running = 1;
    return MFT_OK;
}

static void mft__trace_join(mft_memory_trace *t)
{
    __atomic_store_n(&t->stop, 1, __ATOMIC_RELEASE);
    pthread_join(t->thread, NULL);
    mft__trace_line(t);
}

#else

static mft_status mft__trace_start(mft_memory_trace *t)
{
    return mft__fail(t->ctx, MFT_ERR_UNSUPPORTED, "%s: a memory trace needs threads, and Linux or Android", mft__path(t->path));
}

static void mft__trace_join(mft_memory_trace *t) { (void)t; }

#endif

static mft_status mft__trace_end(mft_memory_trace *t)
{
    mft_context *ctx = t->ctx;
    mft_status   s = MFT_OK;
    if (t->running) mft__trace_join(t);
    mft__object_remove(&t->object);
    if (t->f && fclose(t->f) != 0 && !t->reason) t->reason = errno;
    if (t->fd >= 0) mft__os_close(t->fd);
    if (t->reason) s = mft__fail(ctx, MFT_ERR_IO, "%s: could not be written whole: %s", mft__path(t->path), strerror(t->reason));
    mft__free(ctx, t->buffer, MFT__TRACE_BUFFER);
    mft__strfree(ctx, t->path);
    mft__free(ctx, t, sizeof *t);
    return s;
}

static void mft__trace_destroy(void *self) { mft__trace_end((mft_memory_trace *)self); }

MFT_API mft_status mft_memory_trace_open(mft_context *ctx, const char *path, int interval_ms, mft_memory_trace **out)
{
    mft_memory_trace *t;
    size_t            n;
    mft_status        s;
    if (!ctx || !path || !out) return MFT_ERR_INVALID_ARGUMENT;
    *out = NULL;
    if (interval_ms < 0 || interval_ms > 1000) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: an interval of %d ms is not within 1 to 1000", mft__path(path), interval_ms);
    t = (mft_memory_trace *)mft__alloc_zero(ctx, sizeof *t);
    if (!t) return MFT_ERR_OUT_OF_MEMORY;
    n = strlen(path);
    t->ctx = ctx; t->fd = -1; t->interval_ms = interval_ms ? interval_ms : 5;
    t->csv = n >= 4 && !strcmp(path + n - 4, ".csv");
    mft__object_add(ctx, &t->object, mft__trace_destroy);
    t->path   = mft__strdup(ctx, path);
    t->buffer = (char *)mft__alloc(ctx, MFT__TRACE_BUFFER);
    s = t->path && t->buffer ? mft__trace_start(t) : MFT_ERR_OUT_OF_MEMORY;
    if (s != MFT_OK) { mft__trace_end(t); return s; }
    *out = t;
    return MFT_OK;
}

MFT_API mft_status mft_memory_trace_close(mft_memory_trace *trace) { return trace ? mft__trace_end(trace) : MFT_OK; }

static void mft__trainer_destroy_object(void *self)
{
    mft_trainer *tr = (mft_trainer *)self;
    mft_context *ctx = tr->ctx;
    mft__object_remove(&tr->object);
    mft_optimizer_destroy(tr->opt);
    if (tr->early) {
        mft__grad_spares_free(ctx);
        mft__free(ctx, tr->early->parts, (size_t)tr->n_params * sizeof *tr->early->parts);
        mft__free(ctx, tr->early, sizeof *tr->early);
    }
    mft__statefile_close(tr->state);
    mft__strfree(ctx, tr->save_dir);
    mft__free(ctx, tr->params, (size_t)tr->n_params * sizeof *tr->params);
    mft__free(ctx, tr, sizeof *tr);
}

MFT_API void mft_trainer_destroy(mft_trainer *tr) { if (tr) mft__trainer_destroy_object(tr); }

/* Weight decay leaves out biases and norms of the base, as Transformers' Trainer does; an adapter's matrices get it. */
static int mft__is_no_decay(const mft_model *m, const mft_tensor *t)
{
    int i;
    for (i = 0; i < m->n_params; i++) if (m->params[i].t == t) return m->params[i].no_decay;
    return 0;
}

/* Whether every token of the data is in the model's vocabulary: before the first step, not in the middle of an epoch. */
static mft_status mft__check_max_id(const mft_model *m, const mft_dataset *data)
{
    if (!data || data->info.max_id < m->config.vocab_size) return MFT_OK;
    return mft__fail(m->ctx, MFT_ERR_INVALID_ARGUMENT, "the data has token id %ld, the model a vocabulary of %lld: they are not of one tokenizer",
                     (long)data->info.max_id, (long long)m->config.vocab_size);
}

/* ---- updates in the middle of the backward pass ---- */

/* Of the step that is being made. */
static double mft__learning_rate(const mft_trainer *tr)
{
    return mft_schedule(tr->desc.schedule, tr->desc.learning_rate, tr->desc.learning_rate_min, tr->warmup, tr->desc.total_steps, tr->step);
}

/* Which mft__when_undone says that a parameter's gradient is complete. */
static int mft__early_level(const mft_model *m, const mft_tensor *t)
{
    int layer, k;
    if (t == m->final_norm_w->t || (m->final_norm_b && t == m->final_norm_b->t) || (t == m->head->t && m->head != m->embedding)) return m->config.n_layer;
    for (layer = 0; layer < m->config.n_layer; layer++)
        for (k = 0; k < MFT__N_MODULES; k++) {
            const mft__module_weights *w = mft__module_at(m, layer, k);
            if ((w->w && w->w->t == t) || (w->b && w->b->t == t)) return layer;
        }
    return -1;
}

static mft_status mft__early_create(mft_trainer *tr)
{
    int i;
    if (!tr->model->desc.train_all)  return mft__fail(tr->ctx, MFT_ERR_INVALID_ARGUMENT, "update_in_backward is for full fine-tuning: an adapter's gradients are small");
    if (tr->desc.on_gradients)       return mft__fail(tr->ctx, MFT_ERR_INVALID_ARGUMENT, "update_in_backward and on_gradients cannot be had together: gradients are never all there");
    if (!(tr->early = (mft__early *)mft__alloc_zero(tr->ctx, sizeof *tr->early))) return MFT_ERR_OUT_OF_MEMORY;
    tr->early->parts = (mft__early_part *)mft__alloc_zero(tr->ctx, (size_t)tr->n_params * sizeof *tr->early->parts);
    if (!tr->early->parts) return MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; i < tr->n_params; i++) tr->early->parts[i].level = mft__early_level(tr->model, tr->params[i]);
    return MFT_OK;
}

/* Updates the parameters of one level, whose gradients are complete, and releases those. After a gradient that is not
 * finite nothing more is updated. */
static void mft__early_update(mft_context *ctx, void *user, int level)
{
    mft_trainer *tr = (mft_trainer *)user;
    mft__early  *e = tr->early;
    mft_status   s;
    int          i;
    for (i = 0; i < tr->n_params && ctx->step_status == MFT_OK; i++) {
        mft_tensor *t = tr->params[i];
        if (e->parts[i].level != level || !t->grad) continue;
        e->parts[i].squares = mft__grad_squares(ctx, t);
        if (!(sqrt(e->parts[i].squares) <= 3.4e38)) {
            mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_NOT_FINITE, "the gradient of %.200s is not finite: what lies above it has been updated, the rest has not", t->name ? t->name : "a parameter"));
            return;
        }
        if (!ctx->updating) { mft__optimizer_begin(tr->opt); ctx->updating = 1; }
        if ((s = mft__optimizer_update(tr->opt, i, e->learning_rate, e->scale, e->parts[i].squares)) != MFT_OK) mft__op_failed(ctx, s);
        mft__grad_release(ctx, t);
    }
}

/* The last pass of a window of so many labels begins. */
static void mft__early_begin(mft_trainer *tr, int64_t n_valid)
{
    mft__early *e = tr->early;
    int         i;
    for (i = 0; i < tr->n_params; i++) e->parts[i].squares = 0;
    e->learning_rate = mft__learning_rate(tr); e->begun = 1;
    e->scale = (e->last_norm > 0 ? mft__clip(tr->opt, e->last_norm) : 1) / (double)n_valid;
    tr->model->on_undone = mft__early_update; tr->model->on_undone_user = tr;
}

/* What no level's end has updated, and the window's norm. */
static mft_status mft__early_finish(mft_trainer *tr, int64_t n_valid, double *out_norm)
{
    mft_context *ctx = tr->ctx;
    mft__early  *e = tr->early;
    double       total = 0;
    int          i;
    if (!e->begun) mft__early_begin(tr, n_valid);               /* the last pass had no label */
    for (i = -1; i <= tr->model->config.n_layer; i++) mft__early_update(ctx, tr, i);
    if (ctx->step_status != MFT_OK) { mft_status s = ctx->step_status; mft_step_reset(ctx); return s; }
    for (i = 0; i < tr->n_params; i++) total += e->parts[i].squares;
    *out_norm = e->last_norm = sqrt(total) / (double)n_valid;
    return MFT_OK;
}

/* Bytes of gradients that are there at a time: of each size, as many as one level has, and a tied head's all along. */
static size_t mft__early_gradients(const mft_trainer *tr)
{
    const mft__early_part *parts = tr->early->parts;
    const mft_model       *m = tr->model;
    size_t bytes = 0;
    int    i, k, level;
    for (i = 0; i < tr->n_params; i++) {
        int64_t n = mft_tensor_numel(tr->params[i]);
        int     most = 0, tied = m->head == m->embedding && mft_tensor_numel(m->head->t) == n;
        for (k = 0; k < i && mft_tensor_numel(tr->params[k]) != n; k++) {}
        if (k < i || mft__of(tr->params[i])->paged) continue;   /* this size has been counted, or is in the state file */
        for (level = -1; level <= m->config.n_layer; level++) {
            int count = level >= 0 && tied;
            for (k = i; k < tr->n_params; k++) count += parts[k].level == level && mft_tensor_numel(tr->params[k]) == n;
            if (count > most) most = count;
        }
        bytes += (size_t)most * mft_dtype_bytes(MFT_F32, n);
    }
    return bytes;
}

/* Gradients of the weights in the model's state file: there too, and at once, so that a full disk is found now. */
static mft_status mft__statefile_gradients(mft_trainer *tr)
{
    mft_status s = MFT_OK;
    int        i;
    mft__statefile_use(tr->ctx, tr->model->state);
    for (i = 0; i < tr->n_params && s == MFT_OK; i++)
        if (mft__of(tr->params[i])->paged && !mft__grad_held(tr->ctx, tr->params[i])) s = MFT_ERR_OUT_OF_MEMORY;
    mft__statefile_use(tr->ctx, NULL);
    return s;
}

MFT_API mft_status mft_trainer_create(mft_model *model, mft_dataset *data, const mft_trainer_desc *desc, mft_trainer **out)
{
    mft_trainer   *tr;
    mft_context   *ctx;
    unsigned char *no_decay = NULL;
    mft_status     s;
    int            i;

    if (!model || !out) return MFT_ERR_INVALID_ARGUMENT;
    ctx = model->ctx;
    *out = NULL;
    tr = (mft_trainer *)mft__alloc_zero(ctx, sizeof *tr);
    if (!tr) return MFT_ERR_OUT_OF_MEMORY;
    tr->ctx = ctx; tr->model = model; tr->data = data;
    if (desc) tr->desc = *desc;
    if (tr->desc.learning_rate == 0) tr->desc.learning_rate = 2e-4;
    if (tr->desc.micro_batch == 0) tr->desc.micro_batch = 1;
    if (tr->desc.grad_accum == 0) tr->desc.grad_accum = 1;
    mft__object_add(ctx, &tr->object, mft__trainer_destroy_object);
    if (tr->desc.save_dir && !(tr->save_dir = mft__strdup(ctx, tr->desc.save_dir))) { s = MFT_ERR_OUT_OF_MEMORY; goto fail; }
    tr->warmup = tr->desc.warmup_steps ? tr->desc.warmup_steps : (int64_t)ceil(tr->desc.warmup_ratio * (double)tr->desc.total_steps);
    if (tr->desc.micro_batch < 0 || tr->desc.grad_accum < 0 || tr->desc.warmup_steps < 0 || !(tr->desc.learning_rate >= 0) || !(tr->desc.learning_rate_min >= 0) || !(tr->desc.warmup_ratio >= 0)) {
        s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_trainer_create: a batch, a number of steps or a learning rate below zero");
        goto fail;
    }
    if (tr->desc.max_nonfinite < 0 || tr->desc.eval_steps < 0 || tr->desc.early_stopping_patience < 0
        || ((tr->desc.eval_steps || tr->desc.early_stopping_patience || tr->desc.load_best) && !tr->desc.eval_data) || (tr->desc.load_best && !tr->save_dir)) {
        s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_trainer_create: eval_steps, early_stopping_patience and load_best need eval_data, load_best a save_dir too, and none of them nor max_nonfinite is below zero");
        goto fail;
    }
    if (tr->desc.save_steps < 0 || tr->desc.save_total_limit < 0 || (tr->desc.save_steps && !tr->save_dir)) {
        s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_trainer_create: save_steps needs a save_dir, and neither it nor save_total_limit is below zero");
        goto fail;
    }
    if (tr->desc.schedule != MFT_SCHEDULE_CONSTANT && tr->desc.total_steps < 1) {
        s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_trainer_create: a linear or cosine schedule needs total_steps");
        goto fail;
    }
    if ((s = mft__check_max_id(model, data)) != MFT_OK || (s = mft__check_max_id(model, tr->desc.eval_data)) != MFT_OK) goto fail;
    tr->n_params = mft_model_params(model, 1, NULL, 0);
    if (!tr->n_params) { s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "nothing is trainable: attach an adapter, or load the model with train_all"); goto fail; }
    tr->params = (mft_tensor **)mft__alloc(ctx, (size_t)tr->n_params * sizeof *tr->params);
    no_decay   = (unsigned char *)mft__alloc_zero(ctx, (size_t)tr->n_params);
    if (!tr->params || !no_decay) { s = MFT_ERR_OUT_OF_MEMORY; goto fail; }
    mft_model_params(model, 1, tr->params, tr->n_params);
    for (i = 0; i < tr->n_params && !tr->desc.decay_all; i++) no_decay[i] = (unsigned char)mft__is_no_decay(model, tr->params[i]);
    if (model->state) {
        if ((s = mft__statefile_gradients(tr)) != MFT_OK || (s = mft__statefile_open(ctx, model->state->dir, &tr->state)) != MFT_OK) goto fail;
        mft__statefile_use(ctx, tr->state);
    }
    s = mft_optimizer_create(ctx, &tr->desc.optimizer, tr->params, no_decay, tr->n_params, &tr->opt);
    mft__statefile_use(ctx, NULL);
    if (s == MFT_OK) mft__object_remove(&tr->opt->object);      /* the trainer's, not the context's */
    if (s == MFT_OK && tr->desc.update_in_backward) s = mft__early_create(tr);
fail:
    mft__free(ctx, no_decay, (size_t)tr->n_params);
    if (s != MFT_OK) { if (!tr->params) tr->n_params = 0; mft__trainer_destroy_object(tr); return s; }
    *out = tr;
    return MFT_OK;
}

/* ---- the plan ----
 *   A choice is tried by running the step on paper, which costs about a millisecond, and adding up. */
enum { MFT__FRUGAL_STEP = 80 << 20, MFT__PROCESS = 5 << 20 };

/* The step arena's bytes for one micro-batch of that size: the step itself, on paper. */
static mft_status mft__plan_step(mft_trainer *tr, int batch, int seq, mft_plan *out)
{
    mft_context *ctx = tr->ctx;
    size_t       bytes = (size_t)batch * (size_t)seq * sizeof(int32_t);
    int32_t     *zeros = (int32_t *)mft__alloc_zero(ctx, bytes);
    mft_batch    b;
    mft_tensor  *loss;
    mft_status   s;
    if (!zeros) return MFT_ERR_OUT_OF_MEMORY;
    memset(&b, 0, sizeof b);
    b.input_ids = b.labels = b.document_ids = zeros; b.batch = batch; b.seq = seq;
    mft_plan_begin(ctx);
    loss = mft_model_loss(tr->model, &b, 1);
    out->activations = ctx->arena.now;
    mft_backward(ctx, loss);
    s = mft_plan_end(ctx, &out->step);
    out->workspaces = out->step - out->activations;
    mft__free(ctx, zeros, bytes);
    return s;
}

/* What a walk through a tensor that is written keeps of it in memory. */
static size_t mft__paged_walk(mft_tensor *t)
{
    size_t piece, all;
    if (!t || !mft__of(t)->paged) return 0;
    piece = mft_dtype_bytes(t->dtype, MFT__PAGED_PIECE) + MFT__PAGED_AROUND;
    all   = mft_dtype_bytes(t->dtype, mft_tensor_numel(t));
    return piece < all ? piece : all;
}

/* What may be in memory of the mapped weights at a time when pages are dropped behind each use: the largest
 * matrix or its gradient, a tile of the head with its gradient, some rows of the embedding, the piece that an optimizer updates
 * with its gradient and two moments. With what has been written come whole pieces of the page cache, at both ends. */
static size_t mft__paged_bytes(const mft_trainer *tr)
{
    const mft_model *m = tr->model;
    size_t most = 0, rows, all, bytes;
    int    i, k;
    for (i = 0; i < tr->n_params; i++) {
        const mft__slot *s = &tr->opt->slots[i];
        bytes = mft__paged_walk(s->p) + mft__paged_walk(s->p->grad);
        for (k = 0; k < s->n_states; k++) bytes += mft__paged_walk(s->state[k]);
        if (bytes > most) most = bytes;
    }
    for (i = 0; i < m->n_params; i++) {
        const mft_tensor *t = m->params[i].t;
        int               is_head = &m->params[i] == m->embedding || &m->params[i] == m->head;
        size_t            around = t->trainable ? MFT__PAGED_AROUND : 0, of_grad = t->trainable ? mft_dtype_bytes(MFT_F32, 1) : 0;
        if (!mft__of(m->params[i].t)->paged) continue;
        all   = mft_dtype_bytes(t->dtype, mft_tensor_numel(t)) + of_grad * (size_t)mft_tensor_numel(t);
        rows  = MFT__PAGED_ROWS * (around ? around : (size_t)1 << 20);      /* of what is only read, 0.6 MB come along in the mean */
        bytes = mft_dtype_bytes(t->trainable ? MFT_F32 : t->dtype, mft_tensor_numel(t)) + around;
        if (is_head) {
            int64_t tile = mft__min(t->shape[0], MFT__HEAD_TILE) * t->shape[1];
            bytes = mft_dtype_bytes(t->dtype, tile) + of_grad * (size_t)tile + 2 * around;
            if (bytes < rows) bytes = rows;
        } else if (&m->params[i] == m->positions) bytes = rows;
        if (bytes > all) bytes = all;
        if (bytes > most) most = bytes;
    }
    return most;
}

/* The plan of what the trainer and its model are set to. */
static mft_status mft__plan(mft_trainer *tr, int batch, int seq, mft_plan *out)
{
    mft_context      *ctx = tr->ctx;
    mft_model        *m = tr->model;
    mft_memory_report memory;
    mft_status        s;
    int               i;
    memset(out, 0, sizeof *out);
    if ((s = mft__plan_step(tr, batch, seq, out)) != MFT_OK) return s;
    mft_memory(ctx, &memory);
    for (i = 0; i < m->n_params; i++) {
        const mft_tensor *t = m->params[i].t;
        size_t            bytes = mft_dtype_bytes(t->dtype, mft_tensor_numel(t));
        if (t->trainable) continue;
        if (mft__of(m->params[i].t)->paged) out->weights_mapped += bytes;
        else out->weights_held += bytes;
    }
    for (i = 0; i < tr->n_params; i++) {                        /* gradients: whether a first step has made them or not */
        if (mft__of(tr->params[i])->paged) continue;
        out->trainable += mft_dtype_bytes(tr->params[i]->dtype, mft_tensor_numel(tr->params[i]));
        out->gradients += mft_dtype_bytes(MFT_F32, mft_tensor_numel(tr->params[i]));
    }
    if (tr->early && tr->desc.grad_accum == 1 && batch >= tr->desc.micro_batch) out->gradients = mft__early_gradients(tr);
    out->optimizer = memory.optimizer;
    out->tokenizer = tr->data && tr->data->corpus->tok ? tr->data->corpus->tok->bytes : 0;
    out->data      = memory.now - memory.weights - memory.gradients - memory.optimizer - mft__arena_bytes(ctx) - out->tokenizer;
    out->process   = MFT__PROCESS;
    out->drops_pages = ctx->drop_pages != NULL;
    out->state_mapped = (m->state ? m->state->bytes : 0) + (tr->state ? tr->state->bytes : 0);
    out->weights_resident = out->weights_mapped;
    out->state_resident   = out->state_mapped;
    if (out->drops_pages) {
        size_t most = mft__paged_bytes(tr);
        if (out->weights_resident > most) out->weights_resident = most;
        if (out->state_resident > most) out->state_resident = most;
    }
    out->total = out->weights_resident + out->state_resident + out->weights_held + out->trainable + out->gradients + out->optimizer + out->step
               + out->tokenizer + out->data + out->process;
    out->micro_batch = batch;
    out->blocks      = m->config.n_layer;
    out->mlp_rows    = (int)m->mlp_rows;
    out->blocks_recomputed = m->n_recomputed < 0 ? m->config.n_layer : m->n_recomputed;
    if (out->blocks_recomputed > m->config.n_layer - mft__lowest_trained(m)) out->blocks_recomputed = m->config.n_layer - mft__lowest_trained(m);
    out->grad_checkpointing = out->blocks_recomputed > 0;
    return MFT_OK;
}

static int mft__plan_fits(const mft_trainer *tr, const mft_plan *p)
{
    return tr->ctx->budget ? p->total <= tr->ctx->budget : p->step <= MFT__FRUGAL_STEP;
}

/* No choice fits: says what would. `least` is the smallest that there is. */
static mft_status mft__plan_refuse(mft_trainer *tr, int seq, const mft_plan *least)
{
    mft_plan   half;
    char       levers[600] = "";
    size_t     at = 0, adapters = least->trainable + least->gradients + least->optimizer;
    double     mb = 1048576.0;
    mft_status s = seq > 1 ? mft__plan(tr, 1, seq / 2, &half) : MFT_OK;
    if (s != MFT_OK) return s;
    if (seq > 1) at += (size_t)snprintf(levers + at, sizeof levers - at, "; sequences of %d tokens would save %.1f MB", seq / 2, (double)(least->total - half.total) / mb);
    if (tr->model->n_adapters) at += (size_t)snprintf(levers + at, sizeof levers - at, "; half the rank %.1f MB", (double)adapters / 2 / mb);
    if (least->optimizer > 64 && tr->desc.optimizer.kind == MFT_ADAMW)
        at += (size_t)snprintf(levers + at, sizeof levers - at, "; 8-bit AdamW about %.1f MB, %sSGD without momentum %.1f MB", (double)least->optimizer * 0.75 / mb,
                               tr->model->desc.train_all ? "APOLLO-mini or " : "", (double)least->optimizer / mb);
    if (tr->model->desc.train_all && !tr->model->state && !tr->model->desc.master_dtype)
        at += (size_t)snprintf(levers + at, sizeof levers - at, "; weights held in bf16 %.1f MB", (double)least->trainable / 2 / mb);
    if (tr->model->desc.train_all && !tr->model->state)
        snprintf(levers + at, sizeof levers - at, MFT__MAPS ? "; a state_dir for weights, gradients and moments nearly all of their %.1f MB" :
                 "; this build maps no files, or a state file would save nearly all of the %.1f MB trained", (double)adapters / mb);
    return mft__fail(tr->ctx, MFT_ERR_OUT_OF_MEMORY, "the memory budget of %.1f MB is too small: with one sequence of %d tokens at a time, every block recomputed and weights "
                     "dropped behind their use, a step takes %.1f MB (%.1f for weights, %.1f trained with gradients and optimizer, %.1f for the step, %.1f tokenizer, "
                     "%.1f data and structures, %.1f process)%s", (double)tr->ctx->budget / mb, seq, (double)least->total / mb,
                     (double)(least->weights_resident + least->state_resident + least->weights_held) / mb, (double)adapters / mb, (double)least->step / mb, (double)least->tokenizer / mb,
                     (double)least->data / mb, (double)least->process / mb, levers);
}

static int mft__choice_fits(mft_trainer *tr, int batch, int seq, int n_recomputed, int64_t mlp_rows, mft_plan *p, mft_status *s)
{
    tr->model->n_recomputed = n_recomputed; tr->model->mlp_rows = mlp_rows;
    *s = mft__plan(tr, batch, seq, p);
    return *s == MFT_OK && mft__plan_fits(tr, p);
}

/* Sets model and context to what needs the least work among what fits: see mft_plan. */
static mft_status mft__choose_memory(mft_trainer *tr, int batch, int seq, mft_plan *p)
{
    mft_context *ctx = tr->ctx;
    mft_model   *m = tr->model;
    int          n = m->config.n_layer - mft__lowest_trained(m), from = m->desc.grad_checkpointing > 0 ? n : 0, to = m->desc.grad_checkpointing < 0 ? 0 : n, most = batch, i;
    int64_t      rows;
    mft_status   s;
    ctx->drop_pages = NULL;
    for (;;) {
        for (batch = most; ; batch = (batch + 1) / 2) {
            if (mft__choice_fits(tr, batch, seq, from, MFT__MLP_ROWS, p, &s) || s != MFT_OK) return s;
            if (batch == 1 || !ctx->budget) break;
        }
        if (!ctx->budget || ctx->drop_pages || !(p->weights_mapped + p->state_mapped)) break;
        ctx->drop_pages = mft__file_drop;
    }
    for (i = from + 1; i <= to; i++) if (mft__choice_fits(tr, batch, seq, i, MFT__MLP_ROWS, p, &s) || s != MFT_OK) return s;
    if (!ctx->budget) return MFT_OK;                            /* as frugal as can be */
    for (rows = MFT__MLP_ROWS / 2; rows >= 32 && to; rows /= 2) if (mft__choice_fits(tr, batch, seq, to, rows, p, &s) || s != MFT_OK) return s;
    return mft__plan_refuse(tr, seq, p);
}

/* The longest row the dataset will give. */
static int mft__longest_row(const mft_trainer *tr)
{
    const mft_dataset *ds = tr->data;
    int                most;
    if (!ds) return 0;
    most = ds->corpus->desc.max_seq_len;
    if (mft__families[tr->model->config.family].positions) most = (int)mft__min(most, tr->model->config.max_position);
    return ds->corpus->desc.no_pack && ds->info.longest > 0 && ds->info.longest < most ? (int)ds->info.longest : most;
}

MFT_API mft_status mft_trainer_plan(mft_trainer *tr, int batch, int seq, mft_plan *out)
{
    mft_model *m;
    mft_status s;
    int        n_recomputed;
    int64_t    mlp_rows;
    void     (*drop_pages)(const char *, uint64_t);
    if (!tr || !out) return MFT_ERR_INVALID_ARGUMENT;
    m = tr->model;
    n_recomputed = m->n_recomputed; mlp_rows = m->mlp_rows; drop_pages = tr->ctx->drop_pages;
    if (!seq && tr->data) seq = mft__longest_row(tr);
    if (!seq) seq = mft__families[m->config.family].positions ? (int)mft__min(256, m->config.max_position) : 256;
    s = mft__choose_memory(tr, batch ? batch : tr->desc.micro_batch, seq, out);
    m->n_recomputed = n_recomputed; m->mlp_rows = mlp_rows; tr->ctx->drop_pages = drop_pages;
    return s;
}

/* Makes the arena hold this size in one piece, if no earlier batch was as large. */
static mft_status mft__reserve_step(mft_trainer *tr, int batch, int seq)
{
    mft_plan   p;
    mft_status s;
    if (batch <= tr->planned_batch && seq <= tr->planned_seq) return MFT_OK;
    if (batch < tr->desc.micro_batch) batch = tr->desc.micro_batch;
    if (batch < tr->planned_batch) batch = tr->planned_batch;
    if (seq < mft__longest_row(tr)) seq = mft__longest_row(tr);
    if (seq < tr->planned_seq) seq = tr->planned_seq;
    if ((s = mft__choose_memory(tr, batch, seq, &p)) != MFT_OK || (s = mft_step_reserve(tr->ctx, p.step)) != MFT_OK) return s;
    if (tr->ctx->drop_pages) { mft__drop_weights(tr->model); mft__statefile_drop(tr->state); }
    tr->planned_batch = batch; tr->planned_seq = seq; tr->per_pass = p.micro_batch;
    return MFT_OK;
}

/* What a window has added up to. */
typedef struct mft__window { double loss; int64_t n_valid, n_tokens; int last; } mft__window;      /* last: the micro-batch now taken ends it */

/* Forward and backward of some sequences; the step is over afterwards, gradients stay. */
static mft_status mft__train_pass(mft_trainer *tr, const mft_batch *b, uint64_t stream, int last, mft__window *w)
{
    mft_context *ctx = tr->ctx;
    mft_tensor  *loss;
    int64_t      n_valid = mft_batch_n_valid(b);
    float        value;
    mft_status   s;
    if (!n_valid) return MFT_OK;                                /* nothing to learn from it */
    ctx->step_index = stream;                                   /* what else ran in between draws nothing of ours */
    mft__phase_set(ctx, MFT__FORWARD);
    if (tr->early && last) mft__early_begin(tr, w->n_valid + n_valid);
    loss  = mft_model_loss(tr->model, b, 1);
    value = mft_tensor_item(loss);
    if (loss && !(fabsf(value) <= 3.4e38f)) {
        s = mft__explain_nonfinite(tr->model, "the loss");
        mft_step_reset(ctx);
        return s;
    }
    mft__phase_set(ctx, MFT__BACKWARD);
    s = mft_backward(ctx, loss);
    mft_step_reset(ctx);
    w->loss += (double)value; w->n_valid += n_valid;
    return s;
}

/* One micro-batch, as many of its sequences at a time as the plan says. */
static mft_status mft__train_micro_batch(mft_trainer *tr, const mft_batch *b, mft__window *w)
{
    int64_t    n = (int64_t)b->batch * b->seq, i, at;
    uint64_t   pass;
    mft_status s = mft__check_batch(tr->ctx, b);
    if (s != MFT_OK) return s;
    for (i = 0; i < n; i++) w->n_tokens += b->attention_mask ? b->attention_mask[i] != 0 : 1;
    if (!mft_batch_n_valid(b)) return MFT_OK;
    if ((s = mft__reserve_step(tr, b->batch, b->seq)) != MFT_OK) return s;
    pass = tr->passes++;
    for (i = 0; i < b->batch && s == MFT_OK; i += tr->per_pass) {
        mft_batch part = *b;
        at = i * b->seq;
        part.batch = (int)mft__min(b->batch - i, tr->per_pass);
        part.input_ids += at;
        if (part.labels)         part.labels += at;
        if (part.attention_mask) part.attention_mask += at;
        if (part.position_ids)   part.position_ids += at;
        if (part.document_ids)   part.document_ids += at;
        s = mft__train_pass(tr, &part, pass | (uint64_t)i << 40, w->last && i + part.batch == b->batch, w);
    }
    return s;
}

/* How many of the steps done .. end, end included, are multiples of `every`. */
static double mft__times(int64_t done, int64_t end, int64_t every) { return every ? (double)(end / every - done / every) : 0; }

static void mft__lap(mft__pace *p, mft__lap_kind kind, double now)
{
    double seconds = now - p->mark;
    p->mark = now;
    p->seconds[kind] += seconds;
    if (!p->n[kind]++ && kind == MFT__LAP_STEP) p->first_step = seconds;
}

static double mft__lap_mean(const mft__pace *p, mft__lap_kind kind)
{
    double first = kind == MFT__LAP_STEP && p->n[kind] > 1 ? p->first_step : 0;
    return p->n[kind] ? (p->seconds[kind] - first) / (double)(p->n[kind] - (first > 0)) : p->guess[kind];
}

/* Of the evaluations that are left, so many may be the best so far and leave a checkpoint: the share until now, begun
 * at a half. */
static double mft__pace_best(const mft__pace *p, double evals) { return evals * ((double)p->n_best + 1) / ((double)p->n[MFT__LAP_EVAL] + 2); }

static double mft__pace_left(const mft__pace *p, double steps, double evals, double saves)
{
    return steps * mft__lap_mean(p, MFT__LAP_STEP) + evals * mft__lap_mean(p, MFT__LAP_EVAL) + saves * mft__lap_mean(p, MFT__LAP_SAVE);
}

/* What is not measured yet. Evaluations are forward passes: a half of a LoRA step's time a token, a third of a full
 * one's. A checkpoint is 12 bytes a trained weight (itself and two moments in f32) at 500 MB/s. */
static void mft__pace_guess(mft_trainer *tr)
{
    mft_dataset_info info;
    int64_t          n = 0;
    int              i;
    if (tr->desc.eval_data && tr->tokens && mft_dataset_report(tr->desc.eval_data, &info) == MFT_OK)
        tr->pace.guess[MFT__LAP_EVAL] = tr->seconds / (double)tr->tokens * (double)info.n_tokens / (tr->model->desc.train_all ? 3 : 2);
    for (i = 0; i < tr->n_params; i++) n += mft_tensor_numel(tr->params[i]);
    tr->pace.guess[MFT__LAP_SAVE] = (double)n * 12 / 500e6;
}

/* Seconds to the end of mft_trainer_run, from the end of a step: mean steps, and what comes between them. */
static double mft__eta(mft_trainer *tr)
{
    const mft_trainer_desc *d = &tr->desc;
    double evals, saves;
    if (tr->step > tr->target) return -1;                       /* no run is going on */
    if (!tr->pace.n[MFT__LAP_EVAL] || !tr->pace.n[MFT__LAP_SAVE]) mft__pace_guess(tr);
    evals = d->eval_data ? mft__times(tr->step - 1, tr->target, d->eval_steps) + (!d->eval_steps || tr->target % d->eval_steps ? 1 : 0) : 0;
    saves = tr->save_dir ? mft__times(tr->step - 1, tr->target, d->save_steps) : 0;
    if (tr->save_dir && !(d->save_steps && d->eval_steps && d->eval_steps % d->save_steps == 0)) saves += mft__pace_best(&tr->pace, evals);
    return mft__pace_left(&tr->pace, (double)(tr->target - tr->step), evals, saves);
}

/* The update of a window, and the report on it. */
static mft_status mft__finish_window(mft_trainer *tr, const mft__window *w, double began, mft_progress *out)
{
    mft_progress p;
    int64_t      n_valid = w->n_valid;
    double       lr = mft__learning_rate(tr);
    mft_status   s;
    memset(&p, 0, sizeof p);
    if (tr->desc.on_gradients && tr->desc.on_gradients(tr->desc.user, tr->params, tr->n_params, &n_valid))
        return mft__fail(tr->ctx, MFT_ERR_CANCELLED, "cancelled by on_gradients");
    mft__phase_set(tr->ctx, MFT__UPDATE);
    s = tr->early ? mft__early_finish(tr, n_valid, &p.grad_norm) : mft__optimizer_step_scaled(tr->opt, lr, 1.0 / (double)n_valid, &p.grad_norm);
    mft__phase_set(tr->ctx, MFT__BETWEEN);
    if (s != MFT_OK) return s;
    tr->step++;
    p.step = tr->step; p.loss = w->loss / (double)w->n_valid; p.learning_rate = lr;
    p.n_tokens = w->n_tokens; p.n_valid = w->n_valid;
    p.seconds = mft__now() - began;
    tr->tokens += w->n_tokens; tr->seconds += p.seconds;
    mft__lap(&tr->pace, MFT__LAP_STEP, mft__now());
    p.tokens_per_second = tr->seconds > 0 ? (double)tr->tokens / tr->seconds : 0;
    p.eta_seconds = mft__eta(tr);
    if (tr->data) {
        mft_dataset_position at;
        mft_dataset_get_position(tr->data, &at);
        p.epoch = at.epoch;
    }
    mft_process_memory(&p.resident_bytes, NULL);
    mft_memory(tr->ctx, &p.memory);
    if (out) *out = p;
    if (tr->desc.on_step) tr->desc.on_step(tr->desc.user, &p);
    if (tr->desc.pause_ms > 0) mft__sleep_ms(tr->desc.pause_ms);
    return MFT_OK;
}

static void mft__step_begin(mft_trainer *tr)
{
    tr->ctx->in_step = 1;
    __atomic_store_n(&tr->ctx->phase_step, (int)tr->step + 1, __ATOMIC_RELAXED);
    mft__phase_set(tr->ctx, MFT__BETWEEN);
}

static void mft__step_end(mft_trainer *tr)
{
    tr->ctx->in_step = tr->ctx->updating = 0;
    tr->model->on_undone = NULL;
    if (tr->early) tr->early->begun = 0;
    mft__phase_set(tr->ctx, MFT__BETWEEN);
}

MFT_API mft_status mft_trainer_step_batch(mft_trainer *tr, const mft_batch *batches, int n, mft_progress *out)
{
    mft__window w;
    double      began = mft__now();
    mft_status  s = MFT_OK;
    uint64_t    passes;
    int         i;
    if (!tr || !batches || n < 1) return MFT_ERR_INVALID_ARGUMENT;
    passes = tr->passes;
    memset(&w, 0, sizeof w);
    mft__step_begin(tr);
    for (i = 0; i < n && s == MFT_OK; i++) { w.last = i == n - 1; s = mft__train_micro_batch(tr, &batches[i], &w); }
    if (s == MFT_OK && !w.n_valid) s = mft__fail(tr->ctx, MFT_ERR_INVALID_ARGUMENT, "no label of these batches counts: there is nothing to learn from");
    if (s == MFT_OK) s = mft__finish_window(tr, &w, began, out);
    mft__step_end(tr);
    if (s != MFT_OK) { mft_optimizer_zero_grad(tr->opt); tr->passes = passes; }
    return s;
}

MFT_API mft_status mft_trainer_step(mft_trainer *tr, mft_progress *out)
{
    mft__window w;
    mft_dataset_position start;
    double      began = mft__now();
    mft_status  s = MFT_OK;
    int64_t     tries = 0;
    uint64_t    passes;
    int         i;
    if (!tr) return MFT_ERR_INVALID_ARGUMENT;
    passes = tr->passes;
    if (!tr->data) return mft__fail(tr->ctx, MFT_ERR_INVALID_ARGUMENT, "mft_trainer_step: the trainer has no dataset");
    memset(&w, 0, sizeof w);
    mft_dataset_get_position(tr->data, &start);
    mft__step_begin(tr);
    while (s == MFT_OK && !w.n_valid) {                         /* a window without any label is passed over */
        for (i = 0; i < tr->desc.grad_accum && s == MFT_OK; i++) {
            mft_batch b;
            s = mft_dataset_next(tr->data, tr->desc.micro_batch, &b);
            w.last = i == tr->desc.grad_accum - 1;
            if (s == MFT_OK) s = mft__train_micro_batch(tr, &b, &w);
        }
        if (s == MFT_OK && !w.n_valid && ++tries > mft_dataset_epoch_batches(tr->data, tr->desc.micro_batch))
            s = mft__fail(tr->ctx, MFT_ERR_INVALID_ARGUMENT, "no label of the data counts: there is nothing to learn from");
    }
    if (s == MFT_OK) s = mft__finish_window(tr, &w, began, out);
    mft__step_end(tr);
    if (s != MFT_OK) {                                          /* as if the step had not been begun */
        mft_optimizer_zero_grad(tr->opt);
        mft_dataset_set_position(tr->data, &start);
        tr->passes = passes;
    }
    return s;
}

/* ---- runs ---- */
MFT_API void mft_trainer_report(const mft_trainer *tr, mft_trainer_info *out)
{
    if (!out) return;
    memset(out, 0, sizeof *out);
    if (!tr) return;
    *out = tr->info;
    out->step = tr->step;
}

/* A window that a step failed on, as it was not finite: the data goes on behind it, the step counts. Where a weight
 * is not finite, no other window would be. */
static mft_status mft__skip_window(mft_trainer *tr)
{
    mft_progress p;
    mft_batch    b;
    mft_status   s = MFT_OK;
    int          i;
    if (tr->nonfinite_in_row >= tr->desc.max_nonfinite || mft__nonfinite_weight(tr->model)) return MFT_ERR_NOT_FINITE;
    mft__log(tr->ctx, MFT_LOG_WARNING, "step %lld is skipped: %.300s", (long long)tr->step + 1, mft_error_message(tr->ctx));
    for (i = 0; i < tr->desc.grad_accum && s == MFT_OK; i++) s = mft_dataset_next(tr->data, tr->desc.micro_batch, &b);
    if (s != MFT_OK) return s;
    tr->step++; tr->nonfinite_in_row++; tr->info.n_skipped++;
    memset(&p, 0, sizeof p);
    p.step = tr->step; p.loss = p.grad_norm = (double)NAN;
    p.learning_rate = mft_schedule(tr->desc.schedule, tr->desc.learning_rate, tr->desc.learning_rate_min, tr->warmup, tr->desc.total_steps, tr->step - 1);
    mft__lap(&tr->pace, MFT__LAP_STEP, mft__now());
    p.eta_seconds = mft__eta(tr);
    mft_process_memory(&p.resident_bytes, NULL);
    mft_memory(tr->ctx, &p.memory);
    if (tr->desc.on_step) tr->desc.on_step(tr->desc.user, &p);
    return MFT_OK;
}

static mft_status mft__run_step(mft_trainer *tr)
{
    mft_status s = mft_trainer_step(tr, NULL);
    if (s == MFT_ERR_NOT_FINITE) {
        int in_row = tr->nonfinite_in_row;
        s = mft__skip_window(tr);
        if (s == MFT_ERR_NOT_FINITE && in_row) {
            char text[700];
            snprintf(text, sizeof text, "%.600s", mft_error_message(tr->ctx));
            mft__fail(tr->ctx, s, "step %lld, after %d in a row that were skipped: %s", (long long)tr->step + 1, in_row, text);
        }
    } else if (s == MFT_OK) tr->nonfinite_in_row = 0;
    return s;
}

static mft_status mft__run_evaluation(mft_trainer *tr)
{
    mft_trainer_info *info = &tr->info;
    mft_eval          e;
    mft_status        s = mft_trainer_evaluate(tr, tr->desc.eval_data, 0, &e);
    int               best;
    if (s != MFT_OK) return s;
    mft__lap(&tr->pace, MFT__LAP_EVAL, mft__now());
    best = !info->best_step || e.loss < info->best_loss;
    info->eval = e; info->eval_step = tr->step;
    tr->evals_since_best = best ? 0 : tr->evals_since_best + 1;
    if (best) { info->best_loss = e.loss; info->best_step = tr->step; }
    info->stopped_early = tr->desc.early_stopping_patience && tr->evals_since_best >= tr->desc.early_stopping_patience;
    if (tr->desc.on_eval) tr->desc.on_eval(tr->desc.user, tr->step, &e, best);
    return MFT_OK;
}

/* What is due between two steps, unless it was done before a stop right here. */
static mft_status mft__between_steps(mft_trainer *tr, int64_t end)
{
    const mft_trainer_desc *d = &tr->desc;
    mft_status s = MFT_OK;
    if (!tr->step) return MFT_OK;
    if (d->eval_data && tr->info.eval_step != tr->step && (tr->step == end || (d->eval_steps && tr->step % d->eval_steps == 0))) s = mft__run_evaluation(tr);
    if (s == MFT_OK && tr->save_dir && tr->saved_step != tr->step
        && ((d->save_steps && tr->step % d->save_steps == 0) || (d->eval_data && tr->info.best_step == tr->step))) {
        tr->pace.n_best += !(d->save_steps && tr->step % d->save_steps == 0);
        s = mft_trainer_save(tr, NULL);
        mft__lap(&tr->pace, MFT__LAP_SAVE, mft__now());
    }
    return s;
}

static mft_status mft__load_best(mft_trainer *tr);                  /* [CHECKPOINT] */

MFT_API mft_status mft_trainer_run(mft_trainer *tr, int64_t n_steps)
{
    mft_status s;
    int64_t    end;
    if (!tr) return MFT_ERR_INVALID_ARGUMENT;
    end = tr->target = tr->step + n_steps;
    tr->pace.mark = mft__now();
    s = mft__between_steps(tr, end);
    while (s == MFT_OK && tr->step < end && !tr->info.stopped_early) {
        s = mft__run_step(tr);
        if (s == MFT_OK) s = mft__between_steps(tr, end);
        if (s == MFT_OK && mft__cancelled(tr->ctx) && tr->step < end) s = mft__fail(tr->ctx, MFT_ERR_CANCELLED, "cancelled after step %lld", (long long)tr->step);
    }
    if (s == MFT_OK && tr->desc.load_best && tr->info.best_step && tr->info.best_step != tr->step) s = mft__load_best(tr);
    return s;
}

/* ==============================================================================
 * MARK: - [CHECKPOINT] The trainer in a directory, and back
 *
 *   rule  nothing is read into a trainer before all of the checkpoint was found whole and fitting
 * ============================================================================== */
static const char mft__state_name[] = "trainer_state.json";
enum { MFT__CHECKPOINT_FORMAT = 1 };

/* The files of a checkpoint whose length and hash its state has. */
static int mft__checkpoint_files(const mft_trainer *tr, const char *names[3])
{
    int full = tr->model->desc.train_all;
    names[0] = full ? "config.json" : "adapter_config.json";
    names[1] = full ? "model.safetensors" : "adapter_model.safetensors";
    names[2] = "optimizer.safetensors";
    return 3;
}

/* A number of the run that a resumed one should have as well, by its name. */
typedef struct mft__setting { const char *name; double value; } mft__setting;
enum { MFT__N_SETTINGS = 16 };

static void mft__trainer_settings(const mft_trainer *tr, mft__setting out[MFT__N_SETTINGS])
{
    const mft_optimizer_desc *o = &tr->opt->desc;
    const mft_trainer_desc   *d = &tr->desc;
    const mft__setting        all[MFT__N_SETTINGS] = {
        { "optimizer", (double)o->kind }, { "beta1", o->beta1 }, { "beta2", o->beta2 }, { "eps", o->eps }, { "momentum", o->momentum },
        { "weight_decay", o->weight_decay }, { "max_grad_norm", o->max_grad_norm }, { "learning_rate", d->learning_rate },
        { "learning_rate_min", d->learning_rate_min }, { "schedule", (double)d->schedule }, { "warmup_steps", (double)tr->warmup },
        { "total_steps", (double)d->total_steps }, { "micro_batch", (double)d->micro_batch }, { "grad_accum", (double)d->grad_accum },
        { "decay_all", (double)d->decay_all }, { "update_in_backward", d->update_in_backward ? 1.0 : 0.0 }
    };
    memcpy(out, all, sizeof all);
}

/* The same for the data. */
enum { MFT__N_DATA_SETTINGS = 8 };
static mft_status mft__data_settings(mft_dataset *ds, mft__setting out[MFT__N_DATA_SETTINGS], uint64_t *out_fingerprint)
{
    const mft_dataset_desc *d = &ds->corpus->desc;
    mft_dataset_info info;
    mft_status       s = mft_dataset_report(ds, &info);
    const mft__setting all[MFT__N_DATA_SETTINGS] = {
        { "max_seq_len", (double)d->max_seq_len }, { "seed", (double)d->seed }, { "no_pack", d->no_pack ? 1.0 : 0.0 }, { "no_shuffle", d->no_shuffle ? 1.0 : 0.0 },
        { "drop_last", d->drop_last ? 1.0 : 0.0 }, { "n_samples", (double)info.n_samples }, { "n_tokens", (double)info.n_tokens },
        { "n_supervised", (double)info.n_supervised }
    };
    memcpy(out, all, sizeof all);
    *out_fingerprint = info.fingerprint;
    return s;
}

/* How a memory budget splits batches: it moves the last bits of sums. */
static mft_status mft__trainer_split(mft_trainer *tr, int64_t *out_parts, int64_t *out_mlp_rows)
{
    mft_plan   p;
    mft_status s;
    *out_parts = 1; *out_mlp_rows = MFT__MLP_ROWS;
    if (!tr->ctx->budget) return MFT_OK;
    if ((s = mft_trainer_plan(tr, 0, 0, &p)) == MFT_OK) { *out_parts = (tr->desc.micro_batch + p.micro_batch - 1) / p.micro_batch; *out_mlp_rows = p.mlp_rows; }
    return s;
}

/* The held-out data that evaluations are of; 0: there is none. */
static mft_status mft__eval_fingerprint(const mft_trainer *tr, uint64_t *out)
{
    mft_dataset_info info;
    mft_status       s = MFT_OK;
    *out = 0;
    if (tr->desc.eval_data && (s = mft_dataset_report(tr->desc.eval_data, &info)) == MFT_OK) *out = info.fingerprint;
    return s;
}

/* Hashes of the base's and the tokenizer's files: read once, when a checkpoint first asks for them. */
static mft_status mft__trainer_identify(mft_trainer *tr)
{
    static const char *const tokenizer[] = { "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
                                             "special_tokens_map.json", "added_tokens.json", "chat_template.jinja" };
    mft_context *ctx = tr->ctx;
    const char  *path;
    uint64_t     bytes, hash = 0, base = 0, tok = 0;
    mft_status   s = MFT_OK;
    int          i;
    if (tr->identified) return MFT_OK;
    for (i = 0; s == MFT_OK && (path = mft_safetensors_shard_path(tr->model->files, i)) != NULL; i++) {
        s = mft__file_hash(ctx, path, &bytes, &hash);
        base = mft__data_mix(base, hash);
    }
    for (i = -1; s == MFT_OK && i < (int)(sizeof tokenizer / sizeof *tokenizer); i++) {
        char *file = mft__path_join(ctx, tr->model->dir, i < 0 ? "config.json" : tokenizer[i]);
        if (!file) return MFT_ERR_OUT_OF_MEMORY;
        if (mft__file_exists(ctx, file)) {
            s = mft__file_hash(ctx, file, &bytes, &hash);
            if (i < 0) base = mft__data_mix(base, hash); else tok = mft__data_mix(mft__data_mix(tok, (uint64_t)i), hash);
        }
        mft__strfree(ctx, file);
    }
    tr->base_hash = base; tr->tokenizer_hash = tok;
    tr->identified = s == MFT_OK;
    return s;
}

/* In which dtype the model has its weights. */
static const char *mft__weights_held(const mft_model *m)
{
    return m->desc.master_dtype ? "for training in bf16" : m->desc.weights ? m->desc.weights : "as stored";
}

/* ---- saving ---- */
static void mft__json_write_hex(mft__json_writer *w, const char *key, uint64_t v)     /* JSON's numbers end at 2^53 */
{
    char text[20];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)v);
    mft__json_write_key(w, key);
    mft__json_write_string(w, text, -1);
}

static void mft__json_write_settings(mft__json_writer *w, const mft__setting *settings, int n)
{
    int i;
    for (i = 0; i < n; i++) {
        double v = settings[i].value;
        mft__json_write_key(w, settings[i].name);
        if (v == floor(v) && fabs(v) < 1e15) mft__json_write_integer(w, (int64_t)v); else mft__json_write_number(w, v, 0);
    }
}

/* trainer_state.json of a checkpoint whose other files are in dir; freed with mft__strfree. */
static mft_status mft__trainer_state(mft_trainer *tr, const char *dir, char **out)
{
    mft_context     *ctx = tr->ctx;
    mft__setting     settings[MFT__N_SETTINGS], data[MFT__N_DATA_SETTINGS];
    mft__json_writer w;
    const char      *names[3];
    uint64_t         bytes, hash, fingerprint = 0, eval_fingerprint = 0;
    int64_t          parts = 0, mlp_rows = 0;
    mft_dataset_position at;
    mft_status       s = MFT_OK;
    int              i, n = mft__checkpoint_files(tr, names);
    mft__trainer_settings(tr, settings);
    mft_dataset_get_position(tr->data, &at);
    if (tr->data && (s = mft__data_settings(tr->data, data, &fingerprint)) != MFT_OK) return s;
    if ((s = mft__eval_fingerprint(tr, &eval_fingerprint)) != MFT_OK || (s = mft__trainer_split(tr, &parts, &mlp_rows)) != MFT_OK) return s;
    mft__json_write_start(&w, ctx, 2);
    mft__json_write_open(&w, '{');
    mft__json_write_key(&w, "mft_checkpoint"); mft__json_write_integer(&w, MFT__CHECKPOINT_FORMAT);
    mft__json_write_key(&w, "global_step");    mft__json_write_integer(&w, tr->step);
    mft__json_write_key(&w, "passes");         mft__json_write_integer(&w, (int64_t)tr->passes);
    mft__json_write_hex(&w, "seed", ctx->seed);
    mft__json_write_key(&w, "epoch");          mft__json_write_integer(&w, at.epoch);
    mft__json_write_key(&w, "row");            mft__json_write_integer(&w, at.row);
    mft__json_write_key(&w, "best_global_step"); mft__json_write_integer(&w, tr->info.best_step);
    mft__json_write_key(&w, "best_metric");    mft__json_write_number(&w, tr->info.best_loss, 0);
    mft__json_write_key(&w, "evals_since_best"); mft__json_write_integer(&w, tr->evals_since_best);
    mft__json_write_key(&w, "eval_step");      mft__json_write_integer(&w, tr->info.eval_step);
    mft__json_write_key(&w, "eval_loss");      mft__json_write_number(&w, tr->info.eval.loss, 0);
    mft__json_write_key(&w, "eval_tokens");    mft__json_write_integer(&w, tr->info.eval.n_tokens);
    mft__json_write_hex(&w, "eval_fingerprint", eval_fingerprint);
    mft__json_write_key(&w, "micro_batch_parts"); mft__json_write_integer(&w, parts);
    mft__json_write_key(&w, "mlp_rows");       mft__json_write_integer(&w, mlp_rows);
    mft__json_write_key(&w, "n_skipped");      mft__json_write_integer(&w, tr->info.n_skipped);
    mft__json_write_key(&w, "nonfinite_in_row"); mft__json_write_integer(&w, tr->nonfinite_in_row);
    if (tr->early) {                                            /* whole, as it goes into the next window's clipping */
        uint64_t norm_bits;
        memcpy(&norm_bits, &tr->early->last_norm, sizeof norm_bits);
        mft__json_write_hex(&w, "last_grad_norm", norm_bits);
    }
    mft__json_write_key(&w, "kernels");        mft__json_write_string(&w, mft_kernels_name(ctx), -1);
    mft__json_write_key(&w, "precision");      mft__json_write_string(&w, ctx->precision == MFT_PRECISION_BF16 ? "bf16" : "f32", -1);
    mft__json_write_key(&w, "settings");
    mft__json_write_open(&w, '{');
    mft__json_write_settings(&w, settings, MFT__N_SETTINGS);
    mft__json_write_close(&w, '}');
    mft__json_write_key(&w, "base");
    mft__json_write_open(&w, '{');
    mft__json_write_key(&w, "path");           mft__json_write_string(&w, tr->model->dir, -1);
    mft__json_write_key(&w, "model_type");     mft__json_write_string(&w, tr->model->config.model_type, -1);
    mft__json_write_key(&w, "weights");        mft__json_write_string(&w, mft__weights_held(tr->model), -1);
    mft__json_write_hex(&w, "hash", tr->base_hash);
    mft__json_write_hex(&w, "tokenizer_hash", tr->tokenizer_hash);
    mft__json_write_close(&w, '}');
    mft__json_write_key(&w, "adapter");
    if (tr->model->active >= 0) {
        const mft__adapter *a = tr->model->adapters[tr->model->active];
        mft__json_write_open(&w, '{');
        mft__json_write_key(&w, "r");              mft__json_write_integer(&w, a->rank);
        mft__json_write_key(&w, "lora_alpha");     mft__json_write_number(&w, (double)a->alpha, 0);
        mft__json_write_key(&w, "lora_dropout");   mft__json_write_number(&w, (double)a->dropout, 0);
        mft__json_write_key(&w, "use_rslora");     mft__json_write_integer(&w, a->use_rslora != 0);
        mft__json_write_key(&w, "use_dora");       mft__json_write_integer(&w, a->use_dora != 0);
        mft__json_write_key(&w, "target_modules"); mft__json_write_string(&w, a->targets, -1);
        mft__json_write_close(&w, '}');
    } else mft__json_write_word(&w, "null");
    mft__json_write_key(&w, "data");
    if (tr->data) {
        mft__json_write_open(&w, '{');
        mft__json_write_settings(&w, data, MFT__N_DATA_SETTINGS);
        mft__json_write_hex(&w, "fingerprint", fingerprint);
        mft__json_write_close(&w, '}');
    } else mft__json_write_word(&w, "null");
    mft__json_write_key(&w, "files");
    mft__json_write_open(&w, '{');
    for (i = 0; i < n && s == MFT_OK; i++) {
        char *path = mft__path_join(ctx, dir, names[i]);
        s = path ? mft__file_hash(ctx, path, &bytes, &hash) : MFT_ERR_OUT_OF_MEMORY;
        mft__strfree(ctx, path);
        mft__json_write_key(&w, names[i]);
        mft__json_write_open(&w, '{');
        mft__json_write_key(&w, "bytes"); mft__json_write_integer(&w, (int64_t)bytes);
        mft__json_write_hex(&w, "hash", hash);
        mft__json_write_close(&w, '}');
    }
    mft__json_write_close(&w, '}');
    mft__json_write_close(&w, '}');
    if (s != MFT_OK) { mft__json_write_free(&w); return s; }
    *out = mft__json_write_take(&w);
    return *out ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
}

/* The optimizer's tensors as files have them; freed with mft__free(ctx, list, n * sizeof *list). NULL: no memory. */
static mft__tensor *mft__optimizer_tensors(mft_trainer *tr, int *out_n)
{
    int          i, n = mft_optimizer_state(tr->opt, NULL, 0);
    mft_tensor **list = (mft_tensor **)mft__alloc(tr->ctx, (size_t)n * sizeof *list);
    mft__tensor *stored = list ? (mft__tensor *)mft__alloc(tr->ctx, (size_t)n * sizeof *stored) : NULL;
    if (stored) mft_optimizer_state(tr->opt, list, n);
    for (i = 0; stored && i < n; i++) stored[i] = mft__as_stored(list[i]);
    if (list) mft__free(tr->ctx, list, (size_t)n * sizeof *list);
    *out_n = n;
    return stored;
}

static mft_status mft__optimizer_write(mft_trainer *tr, const char *dir)
{
    mft_context *ctx = tr->ctx;
    int          i, n = 0;
    char        *path = mft__path_join(ctx, dir, "optimizer.safetensors");
    mft__tensor *stored = mft__optimizer_tensors(tr, &n);
    mft_tensor **list = stored ? (mft_tensor **)mft__alloc(ctx, (size_t)n * sizeof *list) : NULL;
    mft_status   s = path && list ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; list && i < n; i++) list[i] = &stored[i].t;
    if (s == MFT_OK) s = mft_safetensors_save(ctx, path, list, n, NULL);
    if (list) mft__free(ctx, list, (size_t)n * sizeof *list);
    if (stored) mft__free(ctx, stored, (size_t)n * sizeof *stored);
    mft__strfree(ctx, path);
    return s;
}

/* Is this a directory that a checkpoint was written to? Negative: no memory to say. */
static int mft__is_checkpoint(mft_context *ctx, const char *dir)
{
    char *state = mft__path_join(ctx, dir, mft__state_name), *opt = mft__path_join(ctx, dir, "optimizer.safetensors");
    int   is = state && opt ? mft__file_exists(ctx, state) && mft__file_exists(ctx, opt) : -1;
    mft__strfree(ctx, state);
    mft__strfree(ctx, opt);
    return is;
}

/* The step that "checkpoint-STEP" names; -1 if it is no such name. */
static int64_t mft__checkpoint_step(const char *name)
{
    char     *end;
    long long n;
    if (strncmp(name, "checkpoint-", 11) != 0 || name[11] < '0' || name[11] > '9' || strlen(name) > 29) return -1;
    n = strtoll(name + 11, &end, 10);
    return *end ? -1 : n;
}

/* Steps of the checkpoints in dir: the lowest above `above`, or the highest; -1: there is none. */
static mft_status mft__checkpoint_find(mft_context *ctx, const char *dir, int highest, int64_t above, int64_t *out_step, int *out_n)
{
    char     **names = NULL;
    size_t     i, n = 0;
    mft_status s = mft__dir_list(ctx, dir, "", &names, &n);
    *out_step = -1; *out_n = 0;
    for (i = 0; i < n && s == MFT_OK; i++) {
        int64_t step = mft__checkpoint_step(names[i]);
        char   *path = step >= 0 ? mft__path_join(ctx, dir, names[i]) : NULL;
        int     is = path ? mft__is_checkpoint(ctx, path) : step >= 0 ? -1 : 0;
        if (is < 0) s = MFT_ERR_OUT_OF_MEMORY;
        if (is > 0) {
            ++*out_n;
            if (highest ? step > *out_step : step > above && (*out_step < 0 || step < *out_step)) *out_step = step;
        }
        mft__strfree(ctx, path);
    }
    mft__dir_list_free(ctx, names, n);
    return s;
}

/* DIR/checkpoint-STEP; freed with mft__strfree. */
static char *mft__checkpoint_path(mft_context *ctx, const char *dir, int64_t step)
{
    char name[40];
    snprintf(name, sizeof name, "checkpoint-%lld", (long long)step);
    return mft__path_join(ctx, dir, name);
}

/* Removes the oldest checkpoints above the limit, but for the best, each at once: it is renamed first. */
static void mft__checkpoints_rotate(mft_trainer *tr)
{
    mft_context *ctx = tr->ctx;
    int64_t      step = -1;
    int          n;
    while (tr->desc.save_total_limit && mft__checkpoint_find(ctx, tr->save_dir, 0, step, &step, &n) == MFT_OK && step >= 0 && n > tr->desc.save_total_limit) {
        char *path = step == tr->step || step == tr->info.best_step ? NULL : mft__checkpoint_path(ctx, tr->save_dir, step);
        char *gone = path ? (char *)mft__alloc(ctx, strlen(path) + 32) : NULL;
        if (gone) {
            size_t bytes = strlen(path) + 32;
            snprintf(gone, bytes, "%s.tmp-%ld-0", path, mft__os_process());
            if (mft__os_rename(path, gone)) mft__dir_remove(ctx, gone);
            mft__free(ctx, gone, bytes);
        }
        mft__strfree(ctx, path);
    }
}

static mft_status mft__checkpoint_write(mft_trainer *tr, const char *dir)
{
    mft_context *ctx = tr->ctx;
    char        *text = NULL, *path = mft__path_join(ctx, dir, mft__state_name);
    mft_status   s = path ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK) s = tr->model->desc.train_all ? mft__model_write(tr->model, dir, 1) : mft__lora_write(tr->model, dir);
    if (s == MFT_OK) s = mft__optimizer_write(tr, dir);
    if (s == MFT_OK) s = mft__trainer_state(tr, dir, &text);
    if (s == MFT_OK) s = mft__file_write_all(ctx, path, text, strlen(text));
    mft__strfree(ctx, text);
    mft__strfree(ctx, path);
    return s;
}

MFT_API mft_status mft_trainer_save(mft_trainer *tr, const char *dir)
{
    mft_context *ctx;
    mft__new_dir place;
    char        *path, **names = NULL;
    size_t       n = 0;
    mft_status   s;
    if (!tr) return MFT_ERR_INVALID_ARGUMENT;
    ctx = tr->ctx;
    if (!dir && !tr->save_dir) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_trainer_save: neither a directory nor the trainer's save_dir");
    if (!tr->model->desc.train_all && tr->model->active < 0) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_trainer_save: no adapter is active");
    path = dir ? mft__strdup(ctx, dir) : mft__checkpoint_path(ctx, tr->save_dir, tr->step);
    if (!path) return MFT_ERR_OUT_OF_MEMORY;
    if (!dir) mft__remove_leftovers(ctx, tr->save_dir, "checkpoint-");
    s = mft__file_kind(path) == MFT__DIRECTORY && mft__is_checkpoint(ctx, path) == 0 ? mft__dir_list(ctx, path, "", &names, &n) : MFT_OK;
    mft__dir_list_free(ctx, names, n);
    if (s == MFT_OK && n) s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: is a directory that holds something else than a checkpoint", mft__path(path));
    if (s == MFT_OK) s = mft__trainer_identify(tr);
    if (s == MFT_OK) s = mft__new_dir_begin(ctx, path, 1, &place);
    mft__strfree(ctx, path);
    if (s != MFT_OK) return s;
    s = mft__checkpoint_write(tr, place.work);
    if (s == MFT_OK) s = mft__new_dir_commit(&place); else mft__new_dir_abort(&place);
    if (s == MFT_OK && !dir) { tr->saved_step = tr->step; mft__checkpoints_rotate(tr); }
    return s;
}

/* ---- resuming ---- */

/* What is being resumed from. */
typedef struct mft__resume { mft_trainer *tr; char *dir; mft_json *state; } mft__resume;

/* "DIR: " before the sentence. */
static mft_status mft__refuse(const mft__resume *r, const char *format, ...) MFT__PRINTF(2, 3);
static mft_status mft__refuse(const mft__resume *r, const char *format, ...)
{
    char    text[600];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return mft__fail(r->tr->ctx, MFT_ERR_INVALID_ARGUMENT, "%s: %s", mft__path(r->dir), text);
}

static uint64_t mft__json_hex(const mft_json *node)
{
    const char *text = mft_json_string(node, NULL);
    return text ? (uint64_t)strtoull(text, NULL, 16) : 0;
}

/* r->dir = DIR itself, what a kill in the middle of replacing it left, or the latest checkpoint in it. */
static mft_status mft__resume_find(mft__resume *r, const char *dir)
{
    mft_context *ctx = r->tr->ctx;
    size_t       bytes = strlen(dir) + 16;
    char        *old = (char *)mft__alloc(ctx, bytes);
    int64_t      step = -1;
    int          n, is = -1;
    mft_status   s = MFT_OK;
    if (old) {
        snprintf(old, bytes, "%s.tmp-old", dir);
        if (mft__file_kind(dir) != MFT__NO_PATH || mft__is_checkpoint(ctx, old) <= 0) snprintf(old, bytes, "%s", dir);
        is = mft__is_checkpoint(ctx, old);
    }
    if (is == 0 && mft__file_kind(dir) == MFT__DIRECTORY) s = mft__checkpoint_find(ctx, dir, 1, -1, &step, &n);
    if (is < 0) s = MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK && !(r->dir = step >= 0 ? mft__checkpoint_path(ctx, dir, step) : mft__strdup(ctx, old))) s = MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK && !is && step < 0)
        s = mft__fail(ctx, MFT_ERR_IO, "%s: no checkpoint: neither %s and optimizer.safetensors nor a checkpoint-STEP directory with them is there", mft__path(dir), mft__state_name);
    if (old) mft__free(ctx, old, bytes);
    return s;
}

/* Every file has the bytes it was written with. */
static mft_status mft__resume_files(mft__resume *r)
{
    mft_context    *ctx = r->tr->ctx;
    const char     *names[3];
    int             i, n = mft__checkpoint_files(r->tr, names);
    mft_status      s = MFT_OK;
    for (i = 0; i < n && s == MFT_OK; i++) {
        const mft_json *f = mft_json_get(mft_json_get(r->state, "files"), names[i]);
        char           *path = mft__path_join(ctx, r->dir, names[i]);
        uint64_t        bytes = 0, hash = 0, wanted = (uint64_t)mft_json_integer(mft_json_get(f, "bytes"), -1);
        if (!path) return MFT_ERR_OUT_OF_MEMORY;
        if (!mft__file_exists(ctx, path)) s = mft__fail(ctx, MFT_ERR_IO, "%s: is missing from the checkpoint", mft__path(path));
        if (s == MFT_OK) s = mft__file_hash(ctx, path, &bytes, &hash);
        if (s == MFT_OK && bytes != wanted)
            s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: has %llu bytes, the checkpoint was saved with %lld", mft__path(path), (unsigned long long)bytes, (long long)wanted);
        if (s == MFT_OK && hash != mft__json_hex(mft_json_get(f, "hash")))
            s = mft__fail(ctx, MFT_ERR_FORMAT, "%s: its bytes are not those the checkpoint was saved with", mft__path(path));
        mft__strfree(ctx, path);
    }
    return s;
}

static mft_status mft__resume_base(const mft__resume *r)
{
    const mft_json *base = mft_json_get(r->state, "base");
    const char     *type = mft_json_string(mft_json_get(base, "model_type"), NULL), *path = mft_json_string(mft_json_get(base, "path"), NULL);
    const mft_model *m = r->tr->model;
    const char      *held = mft_json_string(mft_json_get(base, "weights"), NULL), *holds = mft__weights_held(m);
    if (!held || strcmp(held, holds)) return mft__refuse(r, "the base's weights were held %.40s, here they are held %s", held ? held : "?", holds);
    if (!type || strcmp(type, m->config.model_type)) return mft__refuse(r, "the checkpoint's base is a %.40s, this one, %.200s, a %s", type ? type : "?", m->dir, m->config.model_type);
    if (mft__json_hex(mft_json_get(base, "hash")) != r->tr->base_hash)
        return mft__refuse(r, "the base is another one: %.200s has not the files that %.200s had when the checkpoint was saved", m->dir, path ? path : "?");
    if (mft__json_hex(mft_json_get(base, "tokenizer_hash")) != r->tr->tokenizer_hash)
        return mft__refuse(r, "the tokenizer is another one: %.200s has not the tokenizer files that %.200s had", m->dir, path ? path : "?");
    return MFT_OK;
}

static mft_status mft__resume_adapter(const mft__resume *r)
{
    const mft_json  *node = mft_json_get(r->state, "adapter");
    const mft_model *m = r->tr->model;
    const mft__adapter *a = m->active >= 0 ? m->adapters[m->active] : NULL;
    int              i;
    if (!a != (mft_json_type(node) != MFT_JSON_OBJECT))
        return mft__refuse(r, a ? "the checkpoint is of full fine-tuning, this run trains an adapter" : "the checkpoint is of an adapter, this run trains all weights");
    if (a) {
        mft__setting has[5];
        has[0].name = "r";            has[0].value = a->rank;
        has[1].name = "lora_alpha";   has[1].value = (double)a->alpha;
        has[2].name = "lora_dropout"; has[2].value = (double)a->dropout;
        has[3].name = "use_rslora";   has[3].value = a->use_rslora != 0;
        has[4].name = "use_dora";     has[4].value = a->use_dora != 0;
        for (i = 0; i < 5; i++) {
            double was = mft_json_number(mft_json_get(node, has[i].name), -1);
            if (was != has[i].value) return mft__refuse(r, "the checkpoint's %s is %g, this adapter's %g", i ? has[i].name : "rank", was, has[i].value);
        }
    }
    return MFT_OK;
}

static mft_status mft__resume_data(const mft__resume *r)
{
    const mft_json *node = mft_json_get(r->state, "data");
    mft__setting    has[MFT__N_DATA_SETTINGS];
    uint64_t        fingerprint;
    mft_status      s;
    int             i;
    if (!r->tr->data) return MFT_OK;
    if (mft_json_type(node) != MFT_JSON_OBJECT) return mft__refuse(r, "the checkpoint's trainer had no dataset, this one has");
    if ((s = mft__data_settings(r->tr->data, has, &fingerprint)) != MFT_OK) return s;
    for (i = 0; i < MFT__N_DATA_SETTINGS; i++) {
        double was = mft_json_number(mft_json_get(node, has[i].name), -1);
        if (was != has[i].value) return mft__refuse(r, "the data is not the checkpoint's: its %s was %.0f, now it is %.0f", has[i].name, was, has[i].value);
    }
    if (mft__json_hex(mft_json_get(node, "fingerprint")) != fingerprint)
        return mft__refuse(r, "the data is not the checkpoint's: as many tokens, but other ones, or others of them are trained on");
    return MFT_OK;
}

/* Settings that may differ, if the user knows. */
static mft_status mft__resume_settings(const mft__resume *r)
{
    mft_context    *ctx = r->tr->ctx;
    const mft_json *node = mft_json_get(r->state, "settings");
    const char     *kernels = mft_json_string(mft_json_get(r->state, "kernels"), NULL), *precision = mft_json_string(mft_json_get(r->state, "precision"), NULL);
    mft__setting    has[MFT__N_SETTINGS];
    int64_t         parts, mlp_rows;
    int             i;
    mft_status      s = mft__trainer_split(r->tr, &parts, &mlp_rows);
    if (s != MFT_OK) return s;
    mft__trainer_settings(r->tr, has);
    for (i = 0; i < MFT__N_SETTINGS; i++) {
        double was = mft_json_number(mft_json_get(node, has[i].name), -1);
        if (was == has[i].value) continue;
        if (i == 0) return mft__refuse(r, "the checkpoint's optimizer is another one: its moments do not fit");
        mft__log(ctx, MFT_LOG_WARNING, "%s: %s was %g, now it is %g: the run will not be the one it would have been", mft__path(r->dir), has[i].name, was, has[i].value);
    }
    if (!kernels || strcmp(kernels, mft_kernels_name(ctx)))
        mft__log(ctx, MFT_LOG_WARNING, "%s: was trained with kernels %s, now %s: the last bits will differ", mft__path(r->dir), kernels ? kernels : "?", mft_kernels_name(ctx));
    if (precision && (strcmp(precision, "bf16") == 0) != (ctx->precision == MFT_PRECISION_BF16))
        mft__log(ctx, MFT_LOG_WARNING, "%s: was trained with precision %s, now it is another: the run will not be the one it would have been", mft__path(r->dir), precision);
    if (mft_json_integer(mft_json_get(r->state, "micro_batch_parts"), parts) != parts || mft_json_integer(mft_json_get(r->state, "mlp_rows"), mlp_rows) != mlp_rows)
        mft__log(ctx, MFT_LOG_WARNING, "%s: the memory budget splits batches otherwise than before: the last bits will differ", mft__path(r->dir));
    return MFT_OK;
}

/* Opens DIR/NAME and sees whether it has exactly the n tensors, as files have them. */
static mft_status mft__resume_tensors(const mft__resume *r, const char *name, const mft__tensor *stored, int n, mft_safetensors **out)
{
    mft_context *ctx = r->tr->ctx;
    char        *path = mft__path_join(ctx, r->dir, name);
    size_t       count = 0;
    mft_status   s = path ? mft_safetensors_open(ctx, path, out) : MFT_ERR_OUT_OF_MEMORY;
    int          i, missing = 0;
    if (s == MFT_OK) mft_safetensors_entries(*out, &count);
    for (i = 0; i < n && s == MFT_OK; i++) {
        const mft_tensor            *t = &stored[i].t;
        const mft_safetensors_entry *e = mft_safetensors_find(*out, t->name);
        if (!e) { missing++; continue; }
        if (e->dtype != t->dtype || e->ndim != t->ndim || memcmp(e->shape, t->shape, (size_t)e->ndim * sizeof *e->shape))
            s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: %s has another shape than in this run", mft__path(path), t->name);
    }
    if (s == MFT_OK && (missing || count != (size_t)n)) {
        const mft_model *m = r->tr->model;
        const char      *was = mft_json_string(mft_json_get(mft_json_get(r->state, "adapter"), "target_modules"), NULL);
        s = mft__refuse(r, "the checkpoint's target_modules are %.200s, this run's %.200s", was ? was : "another model's",
                        m->active >= 0 ? m->adapters[m->active]->targets : "all");
    }
    mft__strfree(ctx, path);
    return s;
}

static mft_status mft__resume_read(mft_context *ctx, mft_safetensors *st, mft__tensor *stored, int n)
{
    mft_status s = MFT_OK;
    int        i;
    ctx->weights_version++;
    for (i = 0; i < n && s == MFT_OK; i++) s = mft_safetensors_read(st, mft_safetensors_find(st, stored[i].t.name), &stored[i].t);
    return s;
}

/* The trained tensors as files have them; like mft__optimizer_tensors. */
static mft__tensor *mft__trained_tensors(mft_trainer *tr)
{
    mft__tensor *stored = (mft__tensor *)mft__alloc(tr->ctx, (size_t)tr->n_params * sizeof *stored);
    int          i, k;
    for (i = 0; stored && i < tr->n_params; i++) {
        stored[i] = mft__as_stored(tr->params[i]);
        for (k = 0; tr->model->desc.train_all && k < tr->model->n_params; k++)
            if (tr->model->params[k].t == tr->params[i]) stored[i].t.name = tr->model->params[k].name;
    }
    return stored;
}

/* All tensors, once everything else has been found to fit. */
static mft_status mft__resume_weights(const mft__resume *r)
{
    mft_trainer     *tr = r->tr;
    mft_context     *ctx = tr->ctx;
    mft_safetensors *weights = NULL, *moments = NULL;
    int              n = 0;
    mft__tensor     *trained = mft__trained_tensors(tr), *state = mft__optimizer_tensors(tr, &n);
    mft_status       s = trained && state ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK) s = mft__resume_tensors(r, tr->model->desc.train_all ? "model.safetensors" : "adapter_model.safetensors", trained, tr->n_params, &weights);
    if (s == MFT_OK) s = mft__resume_tensors(r, "optimizer.safetensors", state, n, &moments);
    if (s == MFT_OK) s = mft__resume_read(ctx, weights, trained, tr->n_params);
    if (s == MFT_OK) s = mft__resume_read(ctx, moments, state, n);
    mft_safetensors_close(weights);
    mft_safetensors_close(moments);
    if (trained) mft__free(ctx, trained, (size_t)tr->n_params * sizeof *trained);
    if (state) mft__free(ctx, state, (size_t)n * sizeof *state);
    return s;
}

/* What trainer_state.json says about where the run is. */
static mft_status mft__resume_state(const mft__resume *r)
{
    mft_trainer         *tr = r->tr;
    mft_dataset_position at;
    uint64_t             held_out = 0;
    mft_status           s = mft__eval_fingerprint(tr, &held_out);
    const mft_json      *node = mft_json_get(r->state, "eval_fingerprint");
    int64_t step   = mft_json_integer(mft_json_get(r->state, "global_step"), -1);
    int64_t passes = mft_json_integer(mft_json_get(r->state, "passes"), -1);
    at.epoch = mft_json_integer(mft_json_get(r->state, "epoch"), -1);
    at.row   = mft_json_integer(mft_json_get(r->state, "row"), -1);
    if (s != MFT_OK) return s;
    if (step < 0 || passes < 0 || at.epoch < 0 || at.row < 0) return mft__fail(tr->ctx, MFT_ERR_FORMAT, "%s: %s does not say at which step and place it was saved", mft__path(r->dir), mft__state_name);
    if (tr->data && (s = mft_dataset_set_position(tr->data, &at)) != MFT_OK) return s;
    tr->step = tr->saved_step = step; tr->passes = (uint64_t)passes;
    memset(&tr->info, 0, sizeof tr->info);
    tr->info.best_step     = mft_json_integer(mft_json_get(r->state, "best_global_step"), 0);
    tr->info.best_loss     = mft_json_number(mft_json_get(r->state, "best_metric"), 0);
    tr->info.eval_step     = mft_json_integer(mft_json_get(r->state, "eval_step"), 0);
    tr->info.eval.loss     = mft_json_number(mft_json_get(r->state, "eval_loss"), 0);
    tr->info.eval.n_tokens = mft_json_integer(mft_json_get(r->state, "eval_tokens"), 0);
    tr->info.eval.perplexity = exp(tr->info.eval.loss);
    tr->info.n_skipped     = mft_json_integer(mft_json_get(r->state, "n_skipped"), 0);
    tr->evals_since_best   = (int)mft_json_integer(mft_json_get(r->state, "evals_since_best"), 0);
    tr->nonfinite_in_row   = (int)mft_json_integer(mft_json_get(r->state, "nonfinite_in_row"), 0);
    if (node && tr->desc.eval_data && mft__json_hex(node) != held_out) {          /* losses on other data are no measure for this one's */
        tr->info.best_step = tr->info.eval_step = 0; tr->info.best_loss = 0; tr->evals_since_best = 0;
        mft__log(tr->ctx, MFT_LOG_WARNING, "%s: the held-out data is another one: which evaluation was best is forgotten", mft__path(r->dir));
    }
    tr->info.stopped_early = tr->desc.early_stopping_patience && tr->evals_since_best >= tr->desc.early_stopping_patience;
    tr->ctx->seed = mft__json_hex(mft_json_get(r->state, "seed"));
    if (tr->early) {
        uint64_t norm_bits = mft__json_hex(mft_json_get(r->state, "last_grad_norm"));
        memcpy(&tr->early->last_norm, &norm_bits, sizeof norm_bits);
    }
    return MFT_OK;
}

/* The weights of the best checkpoint, which this run or the one it resumed saved; the rest stays. */
static mft_status mft__load_best(mft_trainer *tr)
{
    mft_context     *ctx = tr->ctx;
    mft_safetensors *st = NULL;
    mft__resume      r;
    mft__tensor     *trained = mft__trained_tensors(tr);
    mft_status       s;
    memset(&r, 0, sizeof r);
    r.tr = tr;
    r.dir = mft__checkpoint_path(ctx, tr->save_dir, tr->info.best_step);
    s = trained && r.dir ? mft__resume_tensors(&r, tr->model->desc.train_all ? "model.safetensors" : "adapter_model.safetensors", trained, tr->n_params, &st) : MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK) s = mft__resume_read(ctx, st, trained, tr->n_params);
    if (s == MFT_OK) { tr->info.eval.loss = tr->info.best_loss; tr->info.eval.perplexity = exp(tr->info.best_loss); }
    mft_safetensors_close(st);
    if (trained) mft__free(ctx, trained, (size_t)tr->n_params * sizeof *trained);
    mft__strfree(ctx, r.dir);
    return s;
}

MFT_API mft_status mft_trainer_resume(mft_trainer *tr, const char *dir)
{
    mft__resume r;
    char       *path = NULL;
    mft_status  s;
    if (!tr || !dir) return MFT_ERR_INVALID_ARGUMENT;
    memset(&r, 0, sizeof r);
    r.tr = tr;
    s = mft__resume_find(&r, dir);
    if (s == MFT_OK && !(path = mft__path_join(tr->ctx, r.dir, mft__state_name))) s = MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK) s = mft_json_load(tr->ctx, path, &r.state);
    if (s == MFT_OK && mft_json_integer(mft_json_get(r.state, "mft_checkpoint"), 0) != MFT__CHECKPOINT_FORMAT)
        s = mft__fail(tr->ctx, MFT_ERR_UNSUPPORTED, "%s: is no checkpoint of this library, or of another version of it", mft__path(path));
    if (s == MFT_OK) s = mft__trainer_identify(tr);
    if (s == MFT_OK) s = mft__resume_base(&r);
    if (s == MFT_OK) s = mft__resume_adapter(&r);
    if (s == MFT_OK) s = mft__resume_data(&r);
    if (s == MFT_OK) s = mft__resume_files(&r);
    if (s == MFT_OK) s = mft__resume_settings(&r);
    if (s == MFT_OK) s = mft__resume_weights(&r);
    if (s == MFT_OK) s = mft__resume_state(&r);
    if (s == MFT_OK && tr->save_dir) {                          /* what a kill left in the middle of saving */
        mft__remove_leftovers(tr->ctx, tr->save_dir, "checkpoint-");
        mft__checkpoints_rotate(tr);
    }
    mft_json_destroy(r.state);
    mft__strfree(tr->ctx, path);
    mft__strfree(tr->ctx, r.dir);
    return s;
}

/* ==============================================================================
 * MARK: - [EVALUATE] Losses without training
 * ============================================================================== */

/* Adds the batch's sum of losses and its count of labels. */
static mft_status mft__evaluate_batch(mft_model *m, const mft_batch *b, double *sum, int64_t *n)
{
    mft_context *ctx = m->ctx;
    int64_t      n_valid = mft_batch_n_valid(b);
    mft_status   s = MFT_OK;
    float        value;
    int          was;
    if (!n_valid) return MFT_OK;
    was   = mft_grad_enable(ctx, 0);
    value = mft_tensor_item(mft_model_loss(m, b, 1));
    if (ctx->step_status != MFT_OK) s = mft_backward(ctx, NULL);        /* the step's first failure */
    else if (!(fabsf(value) <= 3.4e38f)) s = mft__explain_nonfinite(m, "the loss");
    mft_step_reset(ctx);
    mft_grad_enable(ctx, was);
    *sum += (double)value; *n += n_valid;
    return s;
}

static void mft__eval_result(mft_eval *out, double sum, int64_t n)
{
    out->n_tokens = n;
    out->loss = sum / (double)n;
    out->perplexity = exp(out->loss);
}

MFT_API mft_status mft_trainer_evaluate(mft_trainer *tr, mft_dataset *held_out, int max_batches, mft_eval *out)
{
    mft_dataset_position start, before;
    int64_t    i, n_batches, n = 0;
    double     sum = 0;
    int        phase;
    mft_status s;
    if (!tr || !held_out || !out) return MFT_ERR_INVALID_ARGUMENT;
    phase = mft__phase_set(tr->ctx, MFT__EVAL);
    memset(&start, 0, sizeof start);
    n_batches = mft_dataset_epoch_batches(held_out, tr->desc.micro_batch);
    if (max_batches > 0) n_batches = mft__min(n_batches, max_batches);
    mft_dataset_get_position(held_out, &before);                /* which may be the training data itself */
    s = mft_dataset_set_position(held_out, &start);
    for (i = 0; i < n_batches && s == MFT_OK; i++) {
        mft_batch b;
        s = mft_dataset_next(held_out, tr->desc.micro_batch, &b);
        if (s == MFT_OK) s = mft__evaluate_batch(tr->model, &b, &sum, &n);
    }
    mft_dataset_set_position(held_out, &before);
    mft__phase_set(tr->ctx, phase);
    if (s == MFT_OK && !n) s = mft__fail(tr->ctx, MFT_ERR_INVALID_ARGUMENT, "no label of the held-out data counts");
    if (s == MFT_OK) mft__eval_result(out, sum, n);
    return s;
}

/* Tokens a forward pass of windows takes at most, when windows are shorter than that. */
enum { MFT__EVAL_TOKENS = 1024 };

MFT_API mft_status mft_perplexity(mft_model *model, const int32_t *ids, int64_t n, int seq_len, int stride, mft_eval *out)
{
    return mft_perplexity_parts(model, ids, n, seq_len, stride, NULL, NULL, out);
}

MFT_API mft_status mft_perplexity_parts(mft_model *model, const int32_t *ids, int64_t n, int seq_len, int stride,
                                        void (*on_part)(void *user, double loss_sum, int64_t n_tokens), void *user, mft_eval *out)
{
    mft_context *ctx;
    mft_batch    b;
    int32_t     *input, *labels;
    int64_t      begin = 0, scored = 1, count = 0, most;    /* tokens before `scored` are done; the very first never is */
    double       sum = 0;
    mft_status   s = MFT_OK;
    size_t       bytes;

    if (!model || !ids || !out) return MFT_ERR_INVALID_ARGUMENT;
    ctx = model->ctx;
    if (!stride) stride = seq_len;
    if (n < 2) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "perplexity needs at least two tokens, there %s %lld", n == 1 ? "is" : "are", (long long)n);
    if (seq_len < 2 || stride < 1 || stride > seq_len) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "perplexity: a window of %d tokens with a stride of %d", seq_len, stride);
    most   = seq_len < MFT__EVAL_TOKENS ? MFT__EVAL_TOKENS / seq_len : 1;
    bytes  = (size_t)(most * seq_len) * sizeof *input;
    input  = (int32_t *)mft__alloc(ctx, bytes);
    labels = (int32_t *)mft__alloc(ctx, bytes);
    if (!input || !labels) s = MFT_ERR_OUT_OF_MEMORY;
    while (s == MFT_OK && scored < n) {
        int64_t rows = 0, length = mft__min(seq_len, n - begin), i, before = count;
        double  sum_before = sum;
        while (rows < most && scored < n && mft__min(seq_len, n - begin) == length) {      /* windows of one length go together */
            for (i = 0; i < length; i++) {
                input [rows * length + i] = ids[begin + i];
                labels[rows * length + i] = begin + i >= scored && i > 0 ? ids[begin + i] : -100;
            }
            scored = begin + length > scored ? begin + length : scored;
            begin += stride;
            rows++;
        }
        memset(&b, 0, sizeof b);
        b.input_ids = input; b.labels = labels; b.batch = (int)rows; b.seq = (int)length;
        s = mft__evaluate_batch(model, &b, &sum, &count);
        if (s == MFT_OK && on_part) on_part(user, sum - sum_before, count - before);
    }
    if (s == MFT_OK && !count) s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "perplexity: no token is scored");
    if (s == MFT_OK) mft__eval_result(out, sum, count);
    mft__free(ctx, input, bytes);
    mft__free(ctx, labels, bytes);
    return s;
}

/* ==============================================================================
 * MARK: - [GENERATE] Key/value cache, logits processors, sampling
 * ============================================================================== */
enum { MFT__PREFILL_TOKENS = 512 };         /* of the prompt at once */

static void mft__cache_free(mft_model *m, mft__kv_cache *c)
{
    int     i, n = m->config.n_layer;
    for (i = 0; i < n; i++) {
        if (c->k) mft_tensor_destroy(m->ctx, c->k[i]);
        if (c->v) mft_tensor_destroy(m->ctx, c->v[i]);
    }
    mft__free(m->ctx, c->k, (size_t)n * sizeof *c->k);
    mft__free(m->ctx, c->v, (size_t)n * sizeof *c->v);
    c->k = c->v = NULL;
}

static mft_status mft__cache_create(mft_model *m, int64_t capacity, mft__kv_cache *c)
{
    mft_context *ctx = m->ctx;
    int64_t      shape[4];
    int          i, n = m->config.n_layer;
    shape[0] = 1; shape[1] = capacity; shape[2] = m->config.n_kv_head; shape[3] = m->config.head_dim;
    c->used = 0; c->capacity = capacity;
    c->k = (mft_tensor **)mft__alloc_zero(ctx, (size_t)n * sizeof *c->k);
    c->v = (mft_tensor **)mft__alloc_zero(ctx, (size_t)n * sizeof *c->v);
    for (i = 0; i < n && c->k && c->v; i++) {
        c->k[i] = mft__tensor_held(ctx, MFT__OTHER, MFT_F32, 4, shape, NULL);
        c->v[i] = mft__tensor_held(ctx, MFT__OTHER, MFT_F32, 4, shape, NULL);
        if (!c->k[i] || !c->v[i]) break;
    }
    if (i == n) return MFT_OK;
    mft__cache_free(m, c);
    return MFT_ERR_OUT_OF_MEMORY;
}

/* Reads n tokens behind the cached ones; out_logits [V] are those after the last. */
static mft_status mft__read_tokens(mft_model *m, mft__kv_cache *c, const int32_t *ids, int64_t n, float *out_logits)
{
    mft_context *ctx = m->ctx;
    mft_tensor  *x, *y;
    mft__input   in;
    mft_status   s = MFT_OK;
    int          was = mft_grad_enable(ctx, 0);
    memset(&in, 0, sizeof in);
    in.B = 1; in.T = n; in.positions = mft__count_up(ctx, 1, n, c->used);
    x = in.positions ? mft__hidden(m, ids, in, c, NULL, 0) : NULL;
    if (x && out_logits) {
        y = mft__logits(m, mft_slice(ctx, x, 1, n - 1, n));
        if (y) memcpy(out_logits, y->data, (size_t)m->config.vocab_size * sizeof *out_logits);
    }
    if (ctx->step_status != MFT_OK) s = mft_backward(ctx, NULL);        /* the step's first failure */
    mft_step_reset(ctx);
    mft_grad_enable(ctx, was);
    if (s == MFT_OK) c->used += n;
    return s;
}

typedef struct mft__candidate { float logit; int32_t id; } mft__candidate;

/* Better first; equal ones by id, so that the order is nobody's whim. */
static int mft__better(mft__candidate a, mft__candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

static void mft__sift_down(mft__candidate *c, int64_t at, int64_t n)       /* a heap with the worst on top */
{
    for (;;) {
        int64_t        child = 2 * at + 1;
        mft__candidate t;
        if (child >= n) return;
        if (child + 1 < n && mft__better(c[child], c[child + 1])) child++;
        if (!mft__better(c[at], c[child])) return;
        t = c[at]; c[at] = c[child]; c[child] = t;
        at = child;
    }
}

/* Best first. Heap sort: no recursion, no memory. */
static void mft__sort_candidates(mft__candidate *c, int64_t n)
{
    int64_t i;
    for (i = n / 2 - 1; i >= 0; i--) mft__sift_down(c, i, n);
    for (i = n - 1; i > 0; i--) {
        mft__candidate t = c[0];
        c[0] = c[i]; c[i] = t;
        mft__sift_down(c, 0, i);
    }
}

/* Transformers' processors in its order: repetition penalty, temperature, top-k, top-p. Removed tokens become
 * -infinity. ids [n] are the tokens so far; c [V] is scratch. */
static void mft__process_logits(float *logits, int64_t V, const int32_t *ids, int64_t n, const mft_generate_desc *d, mft__candidate *c)
{
    int64_t i, left = V;
    if (d->repetition_penalty > 0 && d->repetition_penalty != 1) {
        for (i = 0; i < V; i++) c[i].id = 0;
        for (i = 0; i < n; i++) {                               /* each token once, however often it stands there */
            float *x = &logits[ids[i]];
            if (c[ids[i]].id) continue;
            c[ids[i]].id = 1;
            *x = *x < 0 ? *x * d->repetition_penalty : *x / d->repetition_penalty;
        }
    }
    if (d->temperature > 0 && d->temperature != 1) for (i = 0; i < V; i++) logits[i] /= d->temperature;
    if ((d->top_k <= 0 || d->top_k >= V) && (d->top_p <= 0 || d->top_p >= 1)) return;
    for (i = 0; i < V; i++) { c[i].logit = logits[i]; c[i].id = (int32_t)i; }
    mft__sort_candidates(c, V);
    if (d->top_k > 0 && d->top_k < V) for (left = d->top_k; left < V && c[left].logit == c[d->top_k - 1].logit; left++) {}
    if (d->top_p > 0 && d->top_p < 1) {                         /* the smallest set with more than top_p; at least one */
        double sum = 0, tail = 0;
        for (i = 0; i < left; i++) sum += exp((double)c[i].logit - (double)c[0].logit);
        for (i = left - 1; i > 0; i--) {
            tail += exp((double)c[i].logit - (double)c[0].logit) / sum;
            if (tail > 1 - (double)d->top_p) break;
            left = i;
        }
    }
    for (i = left; i < V; i++) logits[c[i].id] = -INFINITY;
}

/* The greatest logit's token; with a temperature, one drawn by its probability. */
static int32_t mft__choose(const float *logits, int64_t V, const mft_generate_desc *d, int64_t draw)
{
    int64_t i, best = 0;
    double  sum = 0, u;
    for (i = 1; i < V; i++) if (logits[i] > logits[best]) best = i;
    if (!(d->temperature > 0)) return (int32_t)best;
    for (i = 0; i < V; i++) sum += exp((double)logits[i] - (double)logits[best]);
    u = mft__uniform(mft__random(d->seed, 0, (uint64_t)draw)) * sum;
    for (i = 0; i < V; i++) {
        u -= exp((double)logits[i] - (double)logits[best]);
        if (u < 0) return (int32_t)i;
    }
    return (int32_t)best;
}

static int mft__is_stop(const mft_model *m, const mft_generate_desc *d, int32_t id)
{
    int i;
    if (d->ignore_eos) return 0;
    for (i = 0; i < d->n_stop_ids; i++) if (d->stop_ids[i] == id) return 1;
    for (i = 0; i < 8 && !d->stop_ids; i++) if (m->config.eos_token_id[i] == id) return 1;
    return 0;
}

struct mft_generator {
    mft__object     object;
    mft_model      *model;
    mft__kv_cache   cache;
    int32_t        *ids;                    /* [cache.capacity]: the tokens in the cache, and what a run puts behind them */
    float          *logits;                 /* [V] */
    mft__candidate *scratch;                /* [V] */
    uint64_t        weights_version;        /* the context's, when the cache was filled */
};

MFT_API void mft_generator_reset(mft_generator *g)
{
    if (!g) return;
    mft__free(g->model->ctx, g->ids, (size_t)g->cache.capacity * sizeof *g->ids);
    mft__cache_free(g->model, &g->cache);
    g->ids = NULL;
    g->cache.used = g->cache.capacity = 0;
}

static void mft__generator_end(void *object)
{
    mft_generator *g = (mft_generator *)object;
    mft_context   *ctx = g->model->ctx;
    size_t         V = (size_t)g->model->config.vocab_size;
    mft__object_remove(&g->object);
    mft_generator_reset(g);
    mft__free(ctx, g->logits, V * sizeof *g->logits);
    mft__free(ctx, g->scratch, V * sizeof *g->scratch);
    mft__free(ctx, g, sizeof *g);
}

MFT_API void mft_generator_destroy(mft_generator *g) { if (g) mft__generator_end(g); }

MFT_API mft_status mft_generator_create(mft_model *model, mft_generator **out)
{
    mft_context   *ctx;
    mft_generator *g;
    size_t         V;
    if (out) *out = NULL;
    if (!model || !out) return MFT_ERR_INVALID_ARGUMENT;
    ctx = model->ctx; V = (size_t)model->config.vocab_size;
    g = (mft_generator *)mft__alloc_zero(ctx, sizeof *g);
    if (!g) return MFT_ERR_OUT_OF_MEMORY;
    g->model = model;
    mft__object_add(ctx, &g->object, mft__generator_end);
    g->logits  = (float *)mft__alloc(ctx, V * sizeof *g->logits);
    g->scratch = (mft__candidate *)mft__alloc(ctx, V * sizeof *g->scratch);
    if (!g->logits || !g->scratch) { mft__generator_end(g); return MFT_ERR_OUT_OF_MEMORY; }
    *out = g;
    return MFT_OK;
}

/* Room for `total` tokens, of which the cached ones are kept. A second time it takes half as much again as there was, so
 * that a long conversation is not copied at each turn. */
static mft_status mft__generator_grow(mft_generator *g, int64_t total)
{
    mft_context  *ctx = g->model->ctx;
    int64_t       row = (int64_t)g->model->config.n_kv_head * g->model->config.head_dim, used = g->cache.used;
    int64_t       capacity = total > g->cache.capacity * 3 / 2 ? total : g->cache.capacity * 3 / 2;
    mft__kv_cache cache;
    int32_t      *ids;
    int           i;
    mft_status    s;
    if (total <= g->cache.capacity) return MFT_OK;
    if ((s = mft__cache_create(g->model, capacity, &cache)) != MFT_OK) return s;
    ids = (int32_t *)mft__alloc(ctx, (size_t)capacity * sizeof *ids);
    if (!ids) { mft__cache_free(g->model, &cache); return MFT_ERR_OUT_OF_MEMORY; }
    for (i = 0; i < g->model->config.n_layer && used; i++) {
        memcpy(cache.k[i]->data, g->cache.k[i]->data, (size_t)(used * row) * sizeof(float));
        memcpy(cache.v[i]->data, g->cache.v[i]->data, (size_t)(used * row) * sizeof(float));
    }
    if (used) memcpy(ids, g->ids, (size_t)used * sizeof *ids);
    cache.used = used;
    if (g->ids) mft_generator_reset(g);
    g->cache = cache; g->ids = ids;
    return MFT_OK;
}

/* The desc with its defaults, and how many tokens prompt and answer may have together. */
static mft_status mft__generate_limits(mft_model *m, int64_t n_prompt, const mft_generate_desc *desc, mft_generate_desc *d, int64_t *out_total)
{
    mft_context *ctx = m->ctx;
    int64_t      total;
    memset(d, 0, sizeof *d);
    if (desc) *d = *desc;
    if (!d->max_new_tokens) d->max_new_tokens = 64;
    if (n_prompt < 1) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "generation needs a prompt of at least one token");
    if (d->max_new_tokens < 0 || !(d->temperature >= 0) || d->top_k < 0 || !(d->top_p >= 0) || !(d->repetition_penalty >= 0))
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "generation: max_new_tokens, temperature, top_k, top_p and repetition_penalty are not negative");
    total = n_prompt + d->max_new_tokens;
    if (mft__families[m->config.family].positions && total > m->config.max_position) {      /* the table ends there */
        total = m->config.max_position;
        if (n_prompt >= total) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "a prompt of %lld tokens leaves no room in the model's %lld positions", (long long)n_prompt, (long long)m->config.max_position);
    }
    *out_total = total;
    return MFT_OK;
}

/* How many of the prompt's tokens need not be read again; its last one is, for the logits after it. */
static int64_t mft__generator_common(const mft_generator *g, const int32_t *prompt, int64_t n_prompt)
{
    int64_t n = 0, most = mft__min(g->cache.used, n_prompt - 1);
    while (n < most && g->ids[n] == prompt[n]) n++;
    return n;
}

MFT_API int64_t mft_generator_run(mft_generator *g, const int32_t *prompt, int64_t n_prompt, const mft_generate_desc *desc,
                                  int32_t *out_ids, int64_t cap, int64_t *out_kept)
{
    mft_generate_desc d;
    mft_model   *model;
    mft_context *ctx;
    int64_t      V, n = 0, i, total = 0;
    mft_status   s;

    if (!g || !prompt) return MFT_ERR_INVALID_ARGUMENT;
    model = g->model; ctx = model->ctx; V = model->config.vocab_size;
    if ((s = mft__generate_limits(model, n_prompt, desc, &d, &total)) != MFT_OK) return s;
    if (g->weights_version != ctx->weights_version) g->cache.used = 0;
    g->weights_version = ctx->weights_version;
    g->cache.used = mft__generator_common(g, prompt, n_prompt);
    if (out_kept) *out_kept = g->cache.used;
    if ((s = mft__generator_grow(g, total)) != MFT_OK) return s;
    memcpy(g->ids, prompt, (size_t)n_prompt * sizeof *g->ids);
    while (s == MFT_OK && (i = g->cache.used) < n_prompt) {
        int64_t part = mft__min(n_prompt - i, MFT__PREFILL_TOKENS);
        s = mft__read_tokens(model, &g->cache, prompt + i, part, i + part == n_prompt ? g->logits : NULL);
    }
    while (s == MFT_OK && n_prompt + n < total) {
        int32_t id;
        mft__process_logits(g->logits, V, g->ids, n_prompt + n, &d, g->scratch);
        id = mft__choose(g->logits, V, &d, n);
        if (!(g->logits[id] <= 3.4e38f)) { s = mft__explain_nonfinite(model, "a logit"); break; }
        g->ids[n_prompt + n] = id;
        if (n < cap) out_ids[n] = id;
        n++;
        if ((d.on_token && d.on_token(d.user, id)) || mft__is_stop(model, &d, id) || n_prompt + n == total) break;
        s = mft__read_tokens(model, &g->cache, &id, 1, g->logits);
    }
    return s == MFT_OK ? n : (int64_t)s;
}

MFT_API int64_t mft_generate(mft_model *model, const int32_t *prompt, int64_t n_prompt,
                             const mft_generate_desc *desc, int32_t *out_ids, int64_t cap)
{
    mft_generator *g = NULL;
    mft_status     s = mft_generator_create(model, &g);
    int64_t        n = s == MFT_OK ? mft_generator_run(g, prompt, n_prompt, desc, out_ids, cap, NULL) : (int64_t)s;
    mft_generator_destroy(g);
    return n;
}

/* ==============================================================================
 * MARK: - [EXAM] Prompts, choices, likelihoods
 * ============================================================================== */

/* ln P(continuation) behind prompt[0..n), of which all but the last are in the cache. feed: scratch [length]. */
static mft_status mft__score_text(mft_model *m, mft__kv_cache *cache, int32_t last, const int32_t *continuation, int64_t length, int32_t *feed, double *out)
{
    mft_context *ctx = m->ctx;
    int64_t      at = cache->used;
    mft_tensor  *x, *loss;
    mft__input   in;
    mft_status   s = MFT_OK;
    int          was = mft_grad_enable(ctx, 0);
    feed[0] = last;
    memcpy(feed + 1, continuation, (size_t)(length - 1) * sizeof *feed);
    memset(&in, 0, sizeof in);
    in.B = 1; in.T = length; in.positions = mft__count_up(ctx, 1, length, at);
    x    = in.positions ? mft__hidden(m, feed, in, cache, NULL, 0) : NULL;
    loss = x ? mft_linear_cross_entropy(ctx, x, m->head->t, continuation, 1, (float)m->config.logit_softcap) : NULL;
    *out = loss ? -(double)mft_tensor_item(loss) : 0;
    if (ctx->step_status != MFT_OK) s = mft_backward(ctx, NULL);        /* the step's first failure */
    else if (!(fabs(*out) <= 3.4e38)) s = mft__explain_nonfinite(m, "the log-likelihood");
    mft_step_reset(ctx);
    mft_grad_enable(ctx, was);
    cache->used = at;                                                   /* the next continuation takes its place */
    return s;
}

MFT_API mft_status mft_log_likelihood(mft_model *model, const int32_t *prompt, int64_t n_prompt, const int32_t *const *continuations,
                                      const int64_t *lengths, int n, double *out)
{
    mft_context  *ctx;
    mft__kv_cache cache;
    int32_t      *feed;
    int64_t       longest = 0, i, k, total;
    mft_status    s;

    if (!model || !prompt || !continuations || !lengths || !out || n < 0) return MFT_ERR_INVALID_ARGUMENT;
    ctx = model->ctx;
    if (n_prompt < 1) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "a likelihood needs a prompt of at least one token");
    for (i = 0; i < n; i++) {
        if (lengths[i] < 1) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "continuation %lld has no token", (long long)i);
        longest = lengths[i] > longest ? lengths[i] : longest;
        for (k = 0; k < lengths[i]; k++)
            if (continuations[i][k] < 0 || continuations[i][k] >= model->config.vocab_size)
                return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "token %ld is outside the model's vocabulary of %lld", (long)continuations[i][k], (long long)model->config.vocab_size);
    }
    if (!n) return MFT_OK;
    total = n_prompt + longest - 1;
    if (mft__families[model->config.family].positions && total > model->config.max_position)
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%lld tokens, but the model has %lld positions", (long long)total, (long long)model->config.max_position);
    if ((s = mft__cache_create(model, total, &cache)) != MFT_OK) return s;
    feed = (int32_t *)mft__alloc(ctx, (size_t)longest * sizeof *feed);
    if (!feed) s = MFT_ERR_OUT_OF_MEMORY;
    for (i = 0; i < n_prompt - 1 && s == MFT_OK; i += MFT__PREFILL_TOKENS)
        s = mft__read_tokens(model, &cache, prompt + i, mft__min(n_prompt - 1 - i, MFT__PREFILL_TOKENS), NULL);
    for (i = 0; i < n && s == MFT_OK; i++) s = mft__score_text(model, &cache, prompt[n_prompt - 1], continuations[i], lengths[i], feed, &out[i]);
    mft__free(ctx, feed, (size_t)longest * sizeof *feed);
    mft__cache_free(model, &cache);
    return s;
}

/* ---- what is asked ---- */

/* Offsets into the exam's text; strings end with a NUL. */
typedef struct mft__asked {
    size_t  subject, header, prompt, reference, expected;
    size_t  choices[MFT_MAX_CHOICES];
    size_t  shots;                          /* in the exam's shots: n_shot of them                       */
    int     n_choices, answer, n_shot;
    int     encode_flags;
} mft__asked;

struct mft_exam {
    mft__object      object;
    mft_context     *ctx;
    const mft_tokenizer *tok;
    char            *text;    size_t n_text, cap_text;
    size_t          *shots;   size_t n_shots, cap_shots;        /* worked examples, as offsets           */
    mft__asked      *asked;   size_t n_asked, cap_asked;
};

static void mft__exam_end(void *self)
{
    mft_exam    *e = (mft_exam *)self;
    mft_context *ctx = e->ctx;
    mft__object_remove(&e->object);
    mft__free(ctx, e->text, e->cap_text);
    mft__free(ctx, e->shots, e->cap_shots * sizeof *e->shots);
    mft__free(ctx, e->asked, e->cap_asked * sizeof *e->asked);
    mft__free(ctx, e, sizeof *e);
}

MFT_API void    mft_exam_destroy(mft_exam *exam)    { if (exam) mft__exam_end(exam); }
MFT_API int64_t mft_exam_size(const mft_exam *exam) { return exam ? (int64_t)exam->n_asked : 0; }

MFT_API mft_status mft_exam_question(const mft_exam *exam, int64_t index, mft_question *out)
{
    const mft__asked *q;
    int               i;
    if (!exam || !out) return MFT_ERR_INVALID_ARGUMENT;
    if (index < 0 || index >= (int64_t)exam->n_asked) return mft__fail(exam->ctx, MFT_ERR_INVALID_ARGUMENT, "question %lld of %lld", (long long)index, (long long)exam->n_asked);
    q = &exam->asked[index];
    memset(out, 0, sizeof *out);
    out->subject   = exam->text + q->subject;   out->prompt   = exam->text + q->prompt;
    out->reference = exam->text + q->reference; out->expected = exam->text + q->expected;
    out->n_choices = q->n_choices; out->answer = q->answer;
    for (i = 0; i < q->n_choices; i++) out->choices[i] = exam->text + q->choices[i];
    return MFT_OK;
}

/* Keeps two strings as one and tells where; 0 when memory ran out. */
static int mft__exam_keep(mft_exam *e, const char *a, size_t a_bytes, const char *b, size_t b_bytes, size_t *out_at)
{
    void *p = e->text;
    int   ok = mft__grow(e->ctx, &p, &e->cap_text, e->n_text + a_bytes + b_bytes + 1, 1);
    e->text = (char *)p;
    if (!ok) return 0;
    *out_at = e->n_text;
    if (a_bytes) memcpy(e->text + e->n_text, a, a_bytes);
    if (b_bytes) memcpy(e->text + e->n_text + a_bytes, b, b_bytes);
    e->text[e->n_text + a_bytes + b_bytes] = '\0';
    e->n_text += a_bytes + b_bytes + 1;
    return 1;
}

static int mft__exam_add(mft_exam *e, const mft__asked *q)
{
    void *p = e->asked;
    int   ok = mft__grow(e->ctx, &p, &e->cap_asked, e->n_asked + 1, sizeof *q);
    e->asked = (mft__asked *)p;
    if (ok) e->asked[e->n_asked++] = *q;
    return ok;
}

static void mft__strip(const char **s, size_t *bytes)
{
    while (*bytes && mft__is_blank(*s, 1)) { ++*s; --*bytes; }
    while (*bytes && mft__is_blank(*s + *bytes - 1, 1)) --*bytes;
}

/* ---- MMLU ---- */

/* One CSV file: its rows as worked examples (at most `shots`) or, shots negative, as questions with those that are there. */
static mft_status mft__exam_csv(mft_exam *e, mft__corpus *c, const char *path, const char *subject, int shots, size_t first_shot, int n_shot)
{
    mft__source *src = mft__source_add(c, MFT__FROM_MMLU, path);
    mft__reader  r;
    mft__asked   q;
    const char  *line, *body;
    size_t       bytes, n_prompt, k, header;
    uint64_t     at;
    mft_status   s;
    int          i;

    if (!src) return MFT_ERR_OUT_OF_MEMORY;
    c->where = src->path; c->where_line = 0;
    s = mft__source_open(c, c->n_sources - 1);
    memset(&r, 0, sizeof r);
    memset(&q, 0, sizeof q);
    r.next_line = 1; r.quotes = 1;
    q.n_choices = 4; q.shots = first_shot; q.n_shot = n_shot;
    if (s == MFT_OK && shots < 0 && !mft__exam_keep(e, subject, strlen(subject), "", 0, &q.subject)) s = MFT_ERR_OUT_OF_MEMORY;
    while (s == MFT_OK && shots != 0) {
        c->where_line = r.next_line;
        s = mft__reader_next(c, &r, &line, &bytes, &at);
        c->where_line = r.line;
        if (s != MFT_OK || !line) break;
        if (mft__is_blank(line, bytes)) continue;
        if ((s = mft__data_utf8(c, line, bytes, r.line)) != MFT_OK || (s = mft__line_mmlu_text(c, line, bytes, &n_prompt)) != MFT_OK) break;
        if (!n_prompt) continue;                                /* a header */
        for (header = 0; header + 2 < c->n_text && memcmp(c->text + header, ".\n\n", 3) != 0; header++) {}
        header += 3;                                            /* a file's name holds no line end */
        body = c->text + header;
        if (shots > 0) {
            void *p = e->shots;
            int   ok = mft__grow(e->ctx, &p, &e->cap_shots, e->n_shots + 1, sizeof *e->shots);
            e->shots = (size_t *)p;
            if (!ok || !mft__exam_keep(e, body, c->n_text - header, "\n\n", 2, &k)) { s = MFT_ERR_OUT_OF_MEMORY; break; }
            e->shots[e->n_shots++] = k;
            shots--;
            continue;
        }
        q.answer = c->text[n_prompt + 1] - 'A';
        if (!mft__exam_keep(e, c->text, header, "", 0, &q.header) || !mft__exam_keep(e, body, n_prompt - header, "", 0, &q.prompt)
            || !mft__exam_keep(e, c->text + n_prompt, 2, "", 0, &q.reference)) { s = MFT_ERR_OUT_OF_MEMORY; break; }
        q.expected = q.reference + 1;
        for (i = 0; i < 4 && s == MFT_OK; i++) {
            char letter = (char)('A' + i);
            if (!mft__exam_keep(e, " ", 1, &letter, 1, &q.choices[i])) s = MFT_ERR_OUT_OF_MEMORY;
        }
        if (s == MFT_OK && !mft__exam_add(e, &q)) s = MFT_ERR_OUT_OF_MEMORY;
    }
    if (s == MFT_OK && shots > 0) s = mft__fail(e->ctx, MFT_ERR_INVALID_ARGUMENT, "%s has %d worked examples fewer than are to be shown", mft__path(path), shots);
    c->where = NULL;
    return s;
}

/* "anatomy" of "anatomy_test.csv"; freed with mft__strfree. */
static char *mft__mmlu_subject(mft_context *ctx, const char *file)
{
    static const char *const ends[] = { ".csv", "_dev", "_val", "_test" };
    char  *name = mft__strdup(ctx, file), *copy;
    size_t n = strlen(file), i;
    for (i = 0; name && i < 4; i++) {
        size_t len = strlen(ends[i]);
        if (n > len && memcmp(name + n - len, ends[i], len) == 0) { n -= len; name[n] = '\0'; }
    }
    copy = name ? mft__strdup(ctx, name) : NULL;                /* of its own length, as strfree wants it */
    if (name) mft__free(ctx, name, strlen(file) + 1);
    return copy;
}

static mft_status mft__exam_mmlu_subject(mft_exam *e, mft__corpus *c, const char *root, const char *split, const char *file, const char *subject, int n_shot)
{
    mft_context *ctx = e->ctx;
    size_t       first = e->n_shots, bytes = strlen(root) + strlen(split) + strlen(subject) + strlen(file) + 16;
    char        *path = (char *)mft__alloc(ctx, bytes);
    mft_status   s = path ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
    if (s == MFT_OK && n_shot) {
        snprintf(path, bytes, "%s/dev/%s_dev.csv", root, subject);
        s = mft__exam_csv(e, c, path, subject, n_shot, 0, 0);
    }
    if (s == MFT_OK) {
        snprintf(path, bytes, "%s/%s/%s", root, split, file);
        s = mft__exam_csv(e, c, path, subject, -1, first, n_shot);
    }
    mft__free(ctx, path, bytes);
    return s;
}

static mft_status mft__exam_mmlu(mft_exam *e, mft__corpus *c, const char *root, const mft_exam_desc *d)
{
    mft_context *ctx = e->ctx;
    const char  *split = d->split ? d->split : "test";
    char        *dir, **names = NULL;
    size_t       i, n = 0;
    mft_status   s;
    if (strcmp(split, "dev") != 0 && strcmp(split, "val") != 0 && strcmp(split, "test") != 0)
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "split is '%.40s', not dev, val or test", split);
    if (!(dir = mft__path_join(ctx, root, split))) return MFT_ERR_OUT_OF_MEMORY;
    s = mft__dir_list(ctx, dir, ".csv", &names, &n);
    for (i = 0; i < n && s == MFT_OK; i++) {
        char *subject = mft__mmlu_subject(ctx, names[i]);
        if (!subject) s = MFT_ERR_OUT_OF_MEMORY;
        else if (!d->subject || strcmp(d->subject, subject) == 0) s = mft__exam_mmlu_subject(e, c, root, split, names[i], subject, d->n_shot);
        mft__strfree(ctx, subject);
    }
    if (s == MFT_OK && !e->n_asked)
        s = d->subject ? mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: no questions about '%.80s'", mft__path(dir), d->subject)
                       : mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: no CSV file with questions", mft__path(dir));
    mft__dir_list_free(ctx, names, n);
    mft__strfree(ctx, dir);
    return s;
}

/* ---- JSONL ---- */

/* Adds the next choice, with the white space the completion begins with. */
static mft_status mft__exam_choice(mft_exam *e, mft__corpus *c, mft__asked *q, const char *space, size_t n_space, const char *choice, size_t bytes)
{
    mft__strip(&choice, &bytes);
    if (!bytes) return mft__data_fail(c, MFT_ERR_FORMAT, "choice %d is empty", q->n_choices + 1);
    if (q->n_choices == MFT_MAX_CHOICES) return mft__data_fail(c, MFT_ERR_UNSUPPORTED, "more than %d choices", (int)MFT_MAX_CHOICES);
    return mft__exam_keep(e, space, n_space, choice, bytes, &q->choices[q->n_choices++]) ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
}

static mft_status mft__exam_choices(mft_exam *e, mft__corpus *c, const mft_json *o, const char *fixed, const char *space, size_t n_space, mft__asked *q)
{
    const mft_json *list = mft_json_get(o, "choices"), *item;
    mft_status      s = MFT_OK;
    size_t          i, bytes;
    q->n_choices = 0;
    while (fixed && s == MFT_OK) {
        bytes = strcspn(fixed, ",");
        s = mft__exam_choice(e, c, q, space, n_space, fixed, bytes);
        fixed = fixed[bytes] ? fixed + bytes + 1 : NULL;
        list = NULL;
    }
    if (list && mft_json_type(list) != MFT_JSON_ARRAY) return mft__data_fail(c, MFT_ERR_FORMAT, "\"choices\" is %s, not an array", mft__json_kind_name(list));
    for (i = 0; s == MFT_OK && (item = mft_json_at(list, i, NULL)) != NULL; i++) {
        const char *text = mft_json_string(item, &bytes);
        s = text ? mft__exam_choice(e, c, q, space, n_space, text, bytes) : mft__data_fail(c, MFT_ERR_FORMAT, "choice %llu is %s, not a string", (unsigned long long)i + 1, mft__json_kind_name(item));
    }
    return s;
}

/* The line's prompt and reference, as training renders them. */
static mft_status mft__exam_rendered(mft__corpus *c, const mft__source *src, const char **prompt, size_t *n_prompt, const char **reference, size_t *n_reference)
{
    if (src->kind == MFT__FROM_TEXTS || src->kind == MFT__FROM_INPUT_IDS)
        return mft__data_fail(c, MFT_ERR_FORMAT, "%s has no answers to ask for: use prompt and completion, messages, or instruction and output", mft__source_name(src->kind));
    if (c->doc_flags & MFT_NO_ADD_SPECIAL) {                    /* a conversation: its last assistant turn */
        const mft_chat_span *span = c->rendered.n_spans ? &c->rendered.spans[c->rendered.n_spans - 1] : NULL;
        if (!span || span->begin == 0) return mft__data_fail(c, MFT_ERR_FORMAT, "the conversation has no assistant turn to ask for");
        *prompt    = c->rendered.text;               *n_prompt    = (size_t)span->begin;
        *reference = c->rendered.text + span->begin; *n_reference = (size_t)(span->end - span->begin);
    } else {
        *prompt    = c->text;               *n_prompt    = c->n_prompt;
        *reference = c->text + c->n_prompt; *n_reference = c->n_text - c->n_prompt;
    }
    return MFT_OK;
}

/* The answer in short: the line's "answer", else what the assistant said last, else the reference. */
static const char *mft__exam_expected(mft__corpus *c, const mft_json *o, const char *reference, size_t n_reference, size_t *bytes)
{
    const mft_json *list = mft_json_get(o, c->desc.messages_key);
    const char     *text = mft_json_string(mft_json_get(o, "answer"), bytes);
    size_t          n;
    if (!list) list = mft_json_get(o, c->desc.completion_key);
    n = mft_json_type(list) == MFT_JSON_ARRAY ? mft_json_count(list) : 0;
    if (!text && n && c->doc_flags & MFT_NO_ADD_SPECIAL) text = mft_json_string(mft_json_get(mft_json_at(list, n - 1, NULL), "content"), bytes);
    if (!text) { text = reference; *bytes = n_reference; }
    mft__strip(&text, bytes);
    return text;
}

/* The question that was rendered last. */
static mft_status mft__exam_line(mft_exam *e, mft__corpus *c, const mft__source *src, const mft_json *o, const char *fixed)
{
    const char *prompt = NULL, *reference = NULL, *expected;
    size_t      n_prompt = 0, n_reference = 0, n_expected = 0, n_space = 0;
    int64_t     index;
    mft__asked  q;
    mft_status  s;
    int         i;
    memset(&q, 0, sizeof q);
    if ((s = mft__exam_rendered(c, src, &prompt, &n_prompt, &reference, &n_reference)) != MFT_OK) return s;
    while (n_space < n_reference && mft__is_blank(reference + n_space, 1)) n_space++;
    if (n_space == n_reference) return mft__data_fail(c, MFT_ERR_FORMAT, "the expected answer is empty");
    q.encode_flags = c->doc_flags;
    if ((s = mft__exam_choices(e, c, o, fixed, reference, n_space, &q)) != MFT_OK) return s;
    expected = mft__exam_expected(c, o, reference, n_reference, &n_expected);
    if (!mft__exam_keep(e, "", 0, "", 0, &q.subject) || !mft__exam_keep(e, "", 0, "", 0, &q.header) || !mft__exam_keep(e, prompt, n_prompt, "", 0, &q.prompt)
        || !mft__exam_keep(e, reference, n_reference, "", 0, &q.reference)) return MFT_ERR_OUT_OF_MEMORY;
    q.answer = -1;
    index = mft_json_integer(mft_json_get(o, "answer"), -1);
    if (index >= 0 && index < q.n_choices) q.answer = (int)index;
    for (i = 0; i < q.n_choices && q.answer < 0; i++) {
        const char *choice = e->text + q.choices[i] + n_space;
        if (strlen(choice) == n_expected && memcmp(choice, expected, n_expected) == 0) q.answer = i;
    }
    if (q.n_choices && q.answer < 0) {
        mft__name_text name;
        return mft__data_fail(c, MFT_ERR_FORMAT, "the answer '%s' is none of the %d choices", mft__name(expected, n_expected, &name), q.n_choices);
    }
    if (q.n_choices) q.expected = q.choices[q.answer] + n_space;
    else if (!mft__exam_keep(e, expected, n_expected, "", 0, &q.expected)) return MFT_ERR_OUT_OF_MEMORY;
    return mft__exam_add(e, &q) ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
}

static mft_status mft__exam_jsonl(mft_exam *e, mft__corpus *c, const char *path, const char *fixed)
{
    mft__source *src = mft__source_add(c, MFT__FROM_JSONL, path);
    mft__reader  r;
    const char  *line;
    size_t       bytes;
    uint64_t     at;
    mft_status   s;
    if (!src) return MFT_ERR_OUT_OF_MEMORY;
    c->where = src->path; c->where_line = 0;
    s = mft__source_open(c, c->n_sources - 1);
    memset(&r, 0, sizeof r);
    r.next_line = 1;
    while (s == MFT_OK) {
        mft_json *o = NULL;
        int       part = 0, parts = 1;
        c->where_line = r.next_line;
        s = mft__reader_next(c, &r, &line, &bytes, &at);
        c->where_line = r.line;
        if (s != MFT_OK || !line) break;
        if (mft__is_blank(line, bytes)) continue;
        s = mft__json_parse(e->ctx, mft__path(path), r.line, line, bytes, &o);
        while (s == MFT_OK && part < parts) {
            s = mft__line_json(c, &src->kind, line, bytes, part++, &parts);
            if (s == MFT_OK) s = mft__exam_line(e, c, src, o, fixed);
        }
        mft_json_destroy(o);
        if (s != MFT_OK && s != MFT_ERR_OUT_OF_MEMORY && s != MFT_ERR_IO && c->desc.skip_bad_lines) {
            mft__log(e->ctx, MFT_LOG_WARNING, "skipped: %s", e->ctx->error);
            s = MFT_OK;
        }
    }
    if (s == MFT_OK && !e->n_asked) { c->where_line = 0; s = mft__data_fail(c, MFT_ERR_INVALID_ARGUMENT, "no question in it"); }
    c->where = NULL;
    return s;
}

MFT_API mft_status mft_exam_load(mft_context *ctx, const struct mft_tokenizer *tok, const char *path, const mft_exam_desc *desc, mft_exam **out)
{
    mft_exam_desc    d;
    mft_dataset_desc dd;
    mft_dataset     *ds = NULL;                                 /* whose corpus reads and renders */
    mft_exam        *e;
    mft_status       s;
    if (out) *out = NULL;
    if (!ctx || !tok || !path || !out) return MFT_ERR_INVALID_ARGUMENT;
    memset(&d, 0, sizeof d);
    memset(&dd, 0, sizeof dd);
    if (desc) d = *desc;
    if (d.data) dd = *d.data;
    if (d.n_shot < 0) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%d worked examples", d.n_shot);
    dd.train_on_prompt = dd.assistant_loss_only = 0; dd.split = NULL;
    if ((s = mft_dataset_create(ctx, tok, &dd, &ds)) != MFT_OK) return s;
    e = (mft_exam *)mft__alloc_zero(ctx, sizeof *e);
    if (!e) { mft_dataset_destroy(ds); return MFT_ERR_OUT_OF_MEMORY; }
    e->ctx = ctx; e->tok = tok;
    mft__object_add(ctx, &e->object, mft__exam_end);
    if (!ctx->io.open && mft__file_kind(path) == MFT__DIRECTORY) s = mft__exam_mmlu(e, ds->corpus, path, &d);
    else if (mft__ends_with(path, ".csv")) {
        const char *name = path, *p;
        char       *subject;
        for (p = path; *p; p++) if (*p == '/' || *p == '\\') name = p + 1;
        subject = mft__mmlu_subject(ctx, name);
        if (!subject) s = MFT_ERR_OUT_OF_MEMORY;
        else if (d.n_shot) s = mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: worked examples come from the dev/ of a directory, and this is a file", mft__path(path));
        else s = mft__exam_csv(e, ds->corpus, path, subject, -1, 0, 0);
        mft__strfree(ctx, subject);
    } else s = mft__exam_jsonl(e, ds->corpus, path, d.choices);
    mft_dataset_destroy(ds);
    if (s != MFT_OK) { mft_exam_destroy(e); return s; }
    *out = e;
    return MFT_OK;
}

/* ---- asking ---- */

typedef struct mft__ids { int32_t *ids; size_t n, cap; } mft__ids;

/* The tokens of text. Its memory stays with `to`. */
static mft_status mft__encode_into(mft_exam *e, const char *text, size_t bytes, int flags, mft__ids *to)
{
    int64_t n = mft_tokenizer_encode(e->tok, text, (int64_t)bytes, flags, NULL, 0);
    void   *p = to->ids;
    int     ok;
    if (n < 0) return (mft_status)n;
    ok = mft__grow(e->ctx, &p, &to->cap, (size_t)n + 1, sizeof *to->ids);
    to->ids = (int32_t *)p;
    if (!ok) return MFT_ERR_OUT_OF_MEMORY;
    to->n = (size_t)mft_tokenizer_encode(e->tok, text, (int64_t)bytes, flags, to->ids, n);
    return MFT_OK;
}

/* A question as tokens: what all of its answers begin with is the prompt, and the rest of each the answer. */
typedef struct mft__sheet {
    char    *text; size_t n_text, cap_text;
    mft__ids alone, whole[MFT_MAX_CHOICES + 1];                 /* choices, then the reference */
    size_t   n_prompt;
} mft__sheet;

static void mft__sheet_free(mft_context *ctx, mft__sheet *sh)
{
    int i;
    mft__free(ctx, sh->text, sh->cap_text);
    mft__free(ctx, sh->alone.ids, sh->alone.cap * sizeof(int32_t));
    for (i = 0; i <= MFT_MAX_CHOICES; i++) mft__free(ctx, sh->whole[i].ids, sh->whole[i].cap * sizeof(int32_t));
}

static mft_status mft__sheet_put(mft_exam *e, mft__sheet *sh, size_t at, const char *text)
{
    size_t bytes = strlen(text);
    void  *p = sh->text;
    int    ok = mft__grow(e->ctx, &p, &sh->cap_text, at + bytes + 1, 1);
    sh->text = (char *)p;
    if (!ok) return MFT_ERR_OUT_OF_MEMORY;
    memcpy(sh->text + at, text, bytes + 1);
    sh->n_text = at + bytes;
    return MFT_OK;
}

/* Fills the sheet with n_shot worked examples; *out_longest: tokens of prompt and longest answer. */
static mft_status mft__sheet_fill(mft_exam *e, const mft__asked *q, int n_shot, mft__sheet *sh, size_t *out_longest)
{
    size_t     base, k;
    int        i;
    mft_status s = mft__sheet_put(e, sh, 0, e->text + q->header);
    for (i = 0; i < n_shot && s == MFT_OK; i++) s = mft__sheet_put(e, sh, sh->n_text, e->text + e->shots[q->shots + (size_t)i]);
    if (s == MFT_OK) s = mft__sheet_put(e, sh, sh->n_text, e->text + q->prompt);
    base = sh->n_text;
    if (s == MFT_OK) s = mft__encode_into(e, sh->text, base, q->encode_flags, &sh->alone);
    sh->n_prompt = sh->alone.n;
    *out_longest = 0;
    for (i = 0; i <= q->n_choices && s == MFT_OK; i++) {
        mft__ids *w = &sh->whole[i];
        s = mft__sheet_put(e, sh, base, e->text + (i < q->n_choices ? q->choices[i] : q->reference));
        if (s == MFT_OK) s = mft__encode_into(e, sh->text, sh->n_text, q->encode_flags, w);
        if (s != MFT_OK) break;
        for (k = 0; k < sh->n_prompt && k + 1 < w->n && w->ids[k] == sh->alone.ids[k]; k++) {}
        sh->n_prompt = k;
        if (w->n > *out_longest) *out_longest = w->n;
    }
    return s;
}

/* The greedy answer as it comes. */
typedef struct mft__saying { mft_decoder *decoder; char text[4096]; size_t n; int one_line, failed; } mft__saying;

static int mft__say(void *user, int32_t id)
{
    mft__saying *y = (mft__saying *)user;
    const char  *piece = mft_decoder_push(y->decoder, id, NULL);
    if (!piece) { y->failed = 1; return 1; }
    for (; *piece; piece++) {
        if (*piece == '\n' && y->one_line && !mft__is_blank(y->text, y->n)) return 1;
        if (y->n + 1 == sizeof y->text) return 1;
        y->text[y->n++] = *piece;
    }
    return 0;
}

static mft_status mft__exam_say(mft_exam *e, const mft__asked *q, mft_model *model, const mft__ids *prompt, size_t cut, int max_new_tokens, int *out_exact)
{
    const char       *expected = e->text + q->expected, *text;
    size_t            bytes, n_expected = strlen(expected);
    mft_generate_desc g;
    mft__saying      *y = (mft__saying *)mft__alloc_zero(e->ctx, sizeof *y);
    int64_t           n;
    mft_status        s;
    if (!y) return MFT_ERR_OUT_OF_MEMORY;
    s = mft_decoder_create(e->tok, MFT_SKIP_SPECIAL, &y->decoder);
    memset(&g, 0, sizeof g);
    g.max_new_tokens = max_new_tokens; g.on_token = mft__say; g.user = y;
    y->one_line = !strchr(expected, '\n');
    if (s == MFT_OK) {
        n = mft_generate(model, prompt->ids + cut, (int64_t)(prompt->n - cut), &g, NULL, 0);
        if (n < 0) s = (mft_status)n; else if (y->failed) s = MFT_ERR_INVALID_ARGUMENT;
    }
    text = y->text; bytes = y->n;
    mft__strip(&text, &bytes);
    *out_exact = bytes == n_expected && memcmp(text, expected, bytes) == 0;
    mft_decoder_destroy(y->decoder);
    mft__free(e->ctx, y, sizeof *y);
    return s;
}

MFT_API mft_status mft_exam_ask(mft_exam *exam, int64_t index, mft_model *model, int max_new_tokens, mft_answer *out)
{
    const int32_t    *rest[MFT_MAX_CHOICES + 1];
    int64_t           lengths[MFT_MAX_CHOICES + 1];
    double            scores[MFT_MAX_CHOICES + 1];
    const mft__asked *q;
    mft__sheet        sheet;
    size_t            most, longest, cut, room;
    int               i, n_shot;
    mft_status        s;

    if (!exam || !model || !out) return MFT_ERR_INVALID_ARGUMENT;
    if (index < 0 || index >= (int64_t)exam->n_asked) return mft__fail(exam->ctx, MFT_ERR_INVALID_ARGUMENT, "question %lld of %lld", (long long)index, (long long)exam->n_asked);
    q = &exam->asked[index];
    memset(out, 0, sizeof *out);
    memset(&sheet, 0, sizeof sheet);
    out->choice = out->exact = -1;
    most = (size_t)model->config.max_position;
    n_shot = q->n_shot;
    do s = mft__sheet_fill(exam, q, n_shot, &sheet, &longest); while (s == MFT_OK && longest - 1 > most && n_shot-- > 0);
    if (n_shot < 0) n_shot = 0;
    cut = s == MFT_OK && longest - 1 > most ? longest - 1 - most : 0;
    if (s == MFT_OK && !sheet.n_prompt) s = mft__fail(exam->ctx, MFT_ERR_INVALID_ARGUMENT, "question %lld: its prompt makes no token", (long long)index);
    else if (s == MFT_OK && cut >= sheet.n_prompt) s = mft__fail(exam->ctx, MFT_ERR_INVALID_ARGUMENT, "question %lld: the answer alone fills the model's %lld positions", (long long)index, (long long)most);
    for (i = 0; i <= q->n_choices && s == MFT_OK; i++) { rest[i] = sheet.whole[i].ids + sheet.n_prompt; lengths[i] = (int64_t)(sheet.whole[i].n - sheet.n_prompt); }
    if (s == MFT_OK) s = mft_log_likelihood(model, sheet.whole[0].ids + cut, (int64_t)(sheet.n_prompt - cut), rest, lengths, q->n_choices + 1, scores);
    if (s == MFT_OK) {
        out->log_likelihood = scores[q->n_choices]; out->n_tokens = lengths[q->n_choices];
        out->n_shot = n_shot; out->n_cut = (int64_t)cut;
        for (i = 0; i < q->n_choices; i++) {
            out->choices[i] = scores[i];
            if (out->choice < 0 || scores[i] > scores[out->choice]) out->choice = i;
        }
    }
    if (s == MFT_OK && max_new_tokens > 0) {
        room = (size_t)max_new_tokens < most ? most - (size_t)max_new_tokens : 1;
        if (sheet.alone.n > room && sheet.alone.n - room > cut) cut = sheet.alone.n - room;
        s = mft__exam_say(exam, q, model, &sheet.alone, cut, max_new_tokens, &out->exact);
    }
    mft__sheet_free(exam->ctx, &sheet);
    return s;
}

MFT_API void mft_compare(const double *base, const double *other, const double *weights, int64_t n, mft_comparison *out)
{
    double  sum_base = 0, sum_other = 0, total = 0, squares = 0, half;
    int64_t i;
    memset(out, 0, sizeof *out);
    for (i = 0; i < n; i++) { sum_base += base[i]; sum_other += other[i]; total += weights ? weights[i] : 1; }
    out->n = n;
    out->base = sum_base / total; out->other = sum_other / total;
    out->difference = (sum_other - sum_base) / total;
    for (i = 0; i < n; i++) {
        double d = other[i] - base[i] - out->difference * (weights ? weights[i] : 1);
        squares += d * d;
    }
    half = n > 1 ? 1.959963984540054 * sqrt((double)n / (double)(n - 1) * squares) / total : NAN;
    out->low = out->difference - half; out->high = out->difference + half;
}

#endif /* MFT_IMPLEMENTATION */

/* mft.h - v0.1.0 - tensors, autograd, LoRA and optimizers for training where the data is
 * One file of C99, also valid C++. Needs libc and pthreads. No global state.
 *
 * TO USE IT   in exactly one source file, before including: #define MFT_IMPLEMENTATION
 *
 * SMALLEST PROGRAM   one step of fitting y = x w   (built by tests/test_openings.c)
 *     mft_tensor *err  = mft_sub(ctx, mft_linear(ctx, x, w, NULL), y);
 *     mft_tensor *loss = mft_mean(ctx, mft_mul(ctx, err, err));
 *     if (mft_backward(ctx, loss) != MFT_OK) puts(mft_error_message(ctx));
 *     mft_optimizer_step(opt, 0.05f, NULL);
 *     mft_step_reset(ctx);
 *
 * WORDS     step: one optimizer update and all that was computed for it
 *           held, step, borrowed: how long a pointer is good, see [CONTEXT]
 *           [B, T, V]: sequences, tokens, vocabulary; row-major, last index fastest
 *           row: one line of the kernel table, an instruction set's version of the inner loops
 * ROOMS     search for a tag; it stands over the declarations and over the code:
 *           [CONFIG] [STATUS] [CONTEXT] [THREADS] [ARENA] [TENSOR] [RANDOM] [KERNEL]
 *           [TAPE] [OPS] [LORA] [LOSS] [BACKWARD] [OPTIMIZER] [ROWS] [LICENSE]
 * OPTIONS   MFT_STATIC     every function static, for one translation unit
 *           MFT_NO_SIMD    portable kernels only      MFT_NO_THREADS  the caller's thread only
 *           MFT_USE_CBLAS  adds a kernel row that calls cblas_sgemm
 *           MFT_SELF       this file's name, if you renamed it: it includes itself for each row
 *           MFT_ASSERT(x)  what to do when the library catches a mistake of its own [nothing]
 * LIMITS    up to 4 dimensions; gradients are f32; little-endian machines
 * LICENSE   full text at the end of this file. What changed: CHANGELOG.md. */
#ifndef MFT_H
#define MFT_H

#include <stddef.h>
#include <stdint.h>

/* ==============================================================================
 * MARK: - [CONFIG] Version, linkage
 * ============================================================================== */
#define MFT_VERSION_MAJOR 0
#define MFT_VERSION_MINOR 1
#define MFT_VERSION_PATCH 0
#define MFT_MAX_DIMS 4

#ifndef MFT_API
#  if defined(MFT_STATIC) && (defined(__GNUC__) || defined(__clang__))
#    define MFT_API __attribute__((unused)) static
#  elif defined(MFT_STATIC)
#    define MFT_API static
#  elif defined(__cplusplus)
#    define MFT_API extern "C"
#  else
#    define MFT_API extern
#  endif
#endif

/* ==============================================================================
 * MARK: - [STATUS] How calls say what went wrong
 *
 *   Calls that do work return mft_status; the sentence, with path, names, shapes and
 *   bytes, stays in the context: mft_error_message. Op constructors return the tensor,
 *   NULL in gives NULL out, and mft_backward returns the step's first failure.
 * ============================================================================== */
typedef enum mft_status {
    MFT_OK                   =  0,
    MFT_ERR_INVALID_ARGUMENT = -1,     /* NULL, a shape or a value outside its range            */
    MFT_ERR_OUT_OF_MEMORY    = -2,     /* allocator said no, or the memory budget is spent      */
    MFT_ERR_IO               = -3,     /* open, read, write, rename; the message has the path   */
    MFT_ERR_FORMAT           = -4,     /* the bytes break the file's format                     */
    MFT_ERR_UNSUPPORTED      = -5,     /* well-formed, but not a thing this build can do        */
    MFT_ERR_NOT_FINITE       = -6,     /* loss or gradient became NaN or infinite               */
    MFT_ERR_CANCELLED        = -7      /* mft_cancel() was called; state is consistent          */
} mft_status;

typedef enum mft_log_level { MFT_LOG_ERROR, MFT_LOG_WARNING, MFT_LOG_INFO, MFT_LOG_DEBUG } mft_log_level;

/* The status in words: constant text, never NULL, also for values that are none. */
MFT_API const char *mft_status_string(mft_status status);

/* ==============================================================================
 * MARK: - [CONTEXT] Memory, threads, files, the error sentence
 *
 *   Everything is made from a context and ends with it at the latest. Pointers are
 *     held      good until their own destroy, or their context's
 *     step      good until mft_step_reset; what a backward pass has consumed ends with it
 *     borrowed  good until the event named at the declaration
 *   A context and all it made belong to one thread at a time; two contexts share nothing.
 *   The exception is mft_cancel, which any thread may call.
 * ============================================================================== */
typedef struct mft_context mft_context;

typedef struct mft_allocator {              /* all NULL: malloc and free */
    void *(*alloc)(void *user, size_t bytes, size_t align);    /* align: a power of two; NULL when out */
    void  (*free )(void *user, void *ptr, size_t bytes);       /* with the bytes it was asked for      */
    void  *user;
} mft_allocator;

/* Where files come from: for apps whose assets are not files. Reading only; what the
 * library writes goes to the file system. Reads are positional and may come from any
 * file in any order, always from the thread that owns the context. */
typedef struct mft_io {                     /* all NULL: files on disk, mapped */
    void   *(*open )(void *user, const char *path, uint64_t *out_bytes);   /* NULL: no such file       */
    size_t  (*read )(void *user, void *file, uint64_t offset, void *dst, size_t bytes);  /* bytes read */
    void    (*close)(void *user, void *file);
    void    *user;
} mft_io;

typedef enum mft_precision {                /* of matrix products; everything else is f32 */
    MFT_PRECISION_F32  = 0,                 /* error no larger than a plain float32 loop's          */
    MFT_PRECISION_BF16 = 1                  /* operands rounded to bf16 where a row is faster so    */
} mft_precision;

/* Matrix products by somebody else: a GPU, an accelerator, a BLAS. Called by the thread that owns the context,
 * with row-major operands as cblas_sgemm has them:
 *   c[m,n] = alpha op(a)[m,k] op(b)[k,n] + beta c     (beta 0: c is not read);  op transposes where asked
 * Weights of other storage types come converted, piece by piece. The library's own row does all that
 * `least` leaves to it. Results are as deterministic as the function is. */
typedef struct mft_products {               /* all zero: none */
    int   (*sgemm)(void *user, int trans_a, int trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                   const float *b, int64_t ldb, float beta, float *c, int64_t ldc);    /* nonzero fails the step */
    size_t  max_bytes;                      /* of an operand, from its first number to its last; larger products
                                               are cut into pieces that fit (mobile GPUs: 128 MiB)  [no limit]  */
    double  least;                          /* m n k below which a product is not worth the call    [1e6]       */
    void   *user;
} mft_products;

/* Every field may stay zero, which means the default in brackets. */
typedef struct mft_context_desc {
    mft_allocator allocator;
    mft_io        io;
    mft_products  products;
    size_t        memory_budget;            /* bytes the library may hold; a trainer fits its steps into it, mapped
                                               weights and 4 MB for the process counted (mft_trainer_plan) [0 = no cap] */
    size_t        step_arena;               /* bytes set aside for one step's tensors    [0 = grow]      */
    int           n_threads;                /* at work, at most; the caller's is one      [0 = cores we may use] */
    const char   *kernels;                  /* a row's name, see mft_kernels_name        [NULL = $MFT_KERNELS, else fastest] */
    mft_precision precision;                /* of matrix products                        [f32]           */
    uint64_t      seed;                     /* of dropout                                [0]             */
    void        (*log)(void *user, mft_log_level level, const char *text);             /* [NULL = silent]*/
    void         *log_user;
} mft_context_desc;

typedef struct mft_memory_report {          /* bytes */
    size_t now, peak;                       /* everything obtained from the allocator                    */
    size_t weights, gradients, optimizer;   /* parts of `now`; mapped files are not in it                */
    size_t step_now, step_peak;             /* step arena: activations, saved tensors, scratch           */
} mft_memory_report;

/* desc NULL: all defaults; it is copied. On failure *out is NULL and there is no message:
 * INVALID_ARGUMENT (half an allocator or io, a kernels row this machine lacks),
 * OUT_OF_MEMORY (also when no thread can be started). */
MFT_API mft_status  mft_context_create (const mft_context_desc *desc, mft_context **out);
/* Frees every object made from it, joins its threads. NULL does nothing. */
MFT_API void        mft_context_destroy(mft_context *ctx);
/* The latest failure's sentence, "" if none; borrowed until the next failing call. */
MFT_API const char *mft_error_message  (const mft_context *ctx);
/* on 1: the running call stops at the next layer and returns MFT_ERR_CANCELLED; the half-done step is
 * dropped. on 2: the same, but a training step in hand is finished first. Stays on until
 * mft_cancel(ctx, 0). May be called from any thread, and from signal handlers: it stores one word. */
MFT_API void        mft_cancel         (mft_context *ctx, int on);
MFT_API void        mft_memory         (const mft_context *ctx, mft_memory_report *out);
/* The kernel row in use: "portable", "avx2", "avx512", "amx", "neon", "neon_dot", ...; constant text. */
MFT_API const char *mft_kernels_name   (const mft_context *ctx);
/* The i-th row this build has and this machine can run, fastest first; NULL past the last. */
MFT_API const char *mft_kernels_available(int i);

/* ==============================================================================
 * MARK: - [TENSOR] Numbers with a shape
 * ============================================================================== */
typedef enum mft_dtype {
    MFT_F32, MFT_F16, MFT_BF16, MFT_I32, MFT_I64, MFT_U8,
    MFT_Q8_0,                               /* blocks of 32 along the last dimension: f16 scale, 32 int8     */
    MFT_Q4_0                                /* the same with 4-bit values; layouts are ggml's                */
} mft_dtype;
typedef enum mft_lifetime { MFT_STEP, MFT_HELD } mft_lifetime;       /* see [CONTEXT] */

/* Transparent: read any field, write `trainable`, `name` and the numbers. Always made by the library
 * (the struct is the head of a larger one), never declared or copied by the caller. */
typedef struct mft_tensor {
    mft_dtype   dtype;
    int         ndim;
    int64_t     shape [MFT_MAX_DIMS];       /* row-major: shape[ndim-1] varies fastest                       */
    int64_t     stride[MFT_MAX_DIMS];       /* elements; quantised tensors are contiguous                    */
    void       *data;                       /* NULL once a backward pass has consumed a step tensor          */
    struct mft_tensor *grad;                /* same shape and strides, f32; NULL until a backward reaches it */
    int         trainable;                  /* nonzero: backward fills grad                                  */
    const char *name;                       /* checkpoint name, or NULL; borrowed as long as the tensor lives*/
} mft_tensor;

/* A zero-filled tensor. Step tensors need no destroy. NULL on failure (OUT_OF_MEMORY,
 * INVALID_ARGUMENT: ndim outside 0..4, a size < 1, a product that overflows). ndim 0: a scalar. */
MFT_API mft_tensor *mft_tensor_create (mft_context *ctx, mft_lifetime life, mft_dtype dtype, int ndim, const int64_t *shape);
/* A held tensor over the caller's memory, which must outlive it; contiguous. */
MFT_API mft_tensor *mft_tensor_wrap   (mft_context *ctx, mft_dtype dtype, int ndim, const int64_t *shape, void *borrowed);
/* Held and wrapped tensors, with their gradient. NULL and step tensors: nothing happens. */
MFT_API void        mft_tensor_destroy(mft_context *ctx, mft_tensor *t);
/* dst = src, converting the dtype (round to nearest even); shapes equal, strides free.
 * Fails with UNSUPPORTED between integers and floats, and towards quantised types. */
MFT_API mft_status  mft_tensor_copy   (mft_context *ctx, mft_tensor *dst, const mft_tensor *src);
MFT_API float       mft_tensor_item   (const mft_tensor *t);         /* one element as float; NaN if NULL or not one element */
MFT_API int64_t     mft_tensor_numel  (const mft_tensor *t);         /* elements; 0 for NULL */
/* Bytes of n elements (for quantised types n must be a multiple of 32); 0 for a dtype that is none. */
MFT_API size_t      mft_dtype_bytes   (mft_dtype dtype, int64_t n);
MFT_API const char *mft_dtype_name    (mft_dtype dtype);             /* "F32", as safetensors writes it */

/* ==============================================================================
 * MARK: - [TAPE] Recording what was computed
 *
 *   in    tensors made by [OPS]
 *   out   a list of records, in order of execution, that [BACKWARD] walks in reverse
 *   rule  a record is appended only if some input is trainable and grad is enabled,
 *         so inference leaves the list empty and costs nothing here
 * ============================================================================== */

/* Turns recording on or off; returns the old setting, so that scopes nest:
 *     int was = mft_grad_enable(ctx, 0);  ...  mft_grad_enable(ctx, was);            */
MFT_API int         mft_grad_enable (mft_context *ctx, int on);

/* y = fn(ctx, x, user), keeping x and y only: without grad, fn's own tensors are given back at once;
 * with it, the backward pass runs fn again and needs memory for one such block at a time (Chen et al. 2016, "Training deep nets with sublinear
 * memory cost"). fn must do the same both times: `user` must still be there in mft_backward;
 * dropout inside draws the same numbers again. returns y, step. */
typedef mft_tensor *(*mft_checkpoint_fn)(mft_context *ctx, mft_tensor *x, void *user);
MFT_API mft_tensor *mft_checkpoint  (mft_context *ctx, mft_checkpoint_fn fn, mft_tensor *x, void *user);

/* Ends the step: drops the tape, all step tensors and the kept failure. Gradients of held
 * tensors stay. */
MFT_API void        mft_step_reset  (mft_context *ctx);

/* What a step would need, without running it: between begin and end every op checks its shapes
 * and takes its memory on paper only; no number is computed, data pointers must not be read.
 * mft_backward may be called too. *out_bytes: the step arena's peak.
 * end returns the step's first failure, if any, like mft_backward. */
MFT_API void        mft_plan_begin  (mft_context *ctx);
MFT_API mft_status  mft_plan_end    (mft_context *ctx, size_t *out_bytes);
/* Sets the arena to that size now, in one piece, instead of growing into it. Between steps only. */
MFT_API mft_status  mft_step_reserve(mft_context *ctx, size_t bytes);

/* ==============================================================================
 * MARK: - [OPS] Tensors to tensors
 *
 *   Each op returns a step tensor, f32, and NULL on failure or when an input is NULL; the
 *   first failure of a step is kept and mft_backward returns it, so forty lines of model need
 *   one check. They fail with INVALID_ARGUMENT (shapes, named in the message), OUT_OF_MEMORY.
 *   Inputs are f32 with the last dimension contiguous (views are fine); weights may be
 *   f32, f16, bf16 or quantised when frozen. Every op is checked by tests/test_ops.c against
 *   float64 finite differences, and against PyTorch by tests/test_golden.c.
 * ============================================================================== */

/* Elementwise; b has a's shape, or fewer dimensions equal to a's last ones (broadcast, as a bias). */
MFT_API mft_tensor *mft_add        (mft_context *ctx, mft_tensor *a, mft_tensor *b);
MFT_API mft_tensor *mft_sub        (mft_context *ctx, mft_tensor *a, mft_tensor *b);
MFT_API mft_tensor *mft_mul        (mft_context *ctx, mft_tensor *a, mft_tensor *b);
MFT_API mft_tensor *mft_scale      (mft_context *ctx, mft_tensor *x, float s);                         /* s x            */
MFT_API mft_tensor *mft_gelu_tanh  (mft_context *ctx, mft_tensor *x);    /* GPT-2's and Gemma's approximation of gelu     */
MFT_API mft_tensor *mft_gelu       (mft_context *ctx, mft_tensor *x);    /* x Phi(x), by erf                              */
MFT_API mft_tensor *mft_silu       (mft_context *ctx, mft_tensor *x);    /* x / (1 + exp(-x))                             */
MFT_API mft_tensor *mft_relu       (mft_context *ctx, mft_tensor *x);
MFT_API mft_tensor *mft_tanh       (mft_context *ctx, mft_tensor *x);
MFT_API mft_tensor *mft_softcap    (mft_context *ctx, mft_tensor *x, float cap);                       /* cap tanh(x/cap) */
MFT_API mft_tensor *mft_swiglu     (mft_context *ctx, mft_tensor *gate, mft_tensor *up);               /* silu(gate) up  */
MFT_API mft_tensor *mft_geglu      (mft_context *ctx, mft_tensor *gate, mft_tensor *up);               /* gelu_tanh(gate) up */
MFT_API mft_tensor *mft_softmax    (mft_context *ctx, mft_tensor *x);                                  /* over the last dimension */
/* Zeroes each element with probability p and scales the rest by 1/(1-p). p 0, or no grad: x itself. */
MFT_API mft_tensor *mft_dropout    (mft_context *ctx, mft_tensor *x, float p);

/* Sum, mean of all elements: a scalar. */
MFT_API mft_tensor *mft_sum        (mft_context *ctx, mft_tensor *x);
MFT_API mft_tensor *mft_mean       (mft_context *ctx, mft_tensor *x);

/* Views: no copy, no cost; the gradient is a view of the gradient. */
MFT_API mft_tensor *mft_reshape    (mft_context *ctx, mft_tensor *x, int ndim, const int64_t *shape);  /* x contiguous */
MFT_API mft_tensor *mft_transpose  (mft_context *ctx, mft_tensor *x, int dim_a, int dim_b);
MFT_API mft_tensor *mft_slice      (mft_context *ctx, mft_tensor *x, int dim, int64_t begin, int64_t end);
MFT_API mft_tensor *mft_contiguous (mft_context *ctx, mft_tensor *x);                                  /* a copy, where x is not */

/* Products. matmul: [.., M, K] x [.., K, N] with equal leading dimensions -> [.., M, N]; transposed
 * views are read in place.
 * linear: y = x w^T + bias, x [.., in], w [out, in] as in checkpoints (a transposed view for GPT-2's
 * Conv1D), bias [out] or NULL -> [.., out]. Saves x only if w is trainable. */
MFT_API mft_tensor *mft_matmul     (mft_context *ctx, mft_tensor *a, mft_tensor *b);
MFT_API mft_tensor *mft_linear     (mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias);

/* out[b,t,:] = table[ids[b,t],:].   table [V, H], ids borrowed until the backward pass is over.
 * padding_idx: an id whose row gets no gradient from here, as torch.nn.Embedding has it; -1: none.
 * fails  INVALID_ARGUMENT naming the position of an id outside 0..V-1. returns [batch, seq, H] */
MFT_API mft_tensor *mft_embedding  (mft_context *ctx, mft_tensor *table, const int32_t *ids, int64_t batch, int64_t seq, int32_t padding_idx);

/* y = (x - mean) r w + bias, r = 1/sqrt(var + eps), over the last dimension (Ba et al. 2016) */
MFT_API mft_tensor *mft_layer_norm (mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias, float eps);
/* y = x r (w + offset), r = 1/sqrt(mean x^2 + eps) (Zhang and Sennrich 2019); offset 1 for Gemma, else 0 */
MFT_API mft_tensor *mft_rms_norm   (mft_context *ctx, mft_tensor *x, mft_tensor *w, float offset, float eps);

/* Rotary position embedding, half-split as in Transformers (Su et al. 2021): with a = position *
 * inv_freq[i], computed in float32 as there,
 *   y[i] = x[i] cos a - x[i+D/2] sin a,   y[i+D/2] = x[i+D/2] cos a + x[i] sin a
 * x          [B, T, heads, D]
 * positions  [B, T], or NULL for 0..T-1 in every sequence; borrowed until the backward pass is over
 * inv_freq   [D/2] frequencies (plain, linear or llama3 scaling: the caller's table), borrowed likewise
 * scale      of cos and sin; 0 means 1 */
MFT_API mft_tensor *mft_rope       (mft_context *ctx, mft_tensor *x, const int32_t *positions, const float *inv_freq, float scale);

/* Causal scaled-dot-product attention with grouped key/value heads.
 *
 *   out[b,t,h,:] = sum_s softmax_s(c(scale <q[b,t,h,:], k[b,s,h/G,:]>)) v[b,s,h/G,:]
 *   over first_key[b,t] <= s <= t + (S - T), and s > t + (S - T) - window when window > 0;
 *   G = n_head / n_kv_head,  c(x) = softcap tanh(x / softcap) when softcap > 0
 *
 * q        [B, T, n_head,    D]  rotary embedding already applied
 * k, v     [B, S, n_kv_head, D]  S >= T; earlier keys come first (generation), S = T in training
 * desc     NULL: all defaults
 * returns  [B, T, n_head, D]; a query with no key to see gives zeros
 * memory   saves the output and one f32 per (b,t,h); never a [T, S] matrix
 * source   Dao et al. 2022, "FlashAttention", algorithm 1 */
typedef struct mft_attention_desc {
    float scale;                            /* of the scores                        [1/sqrt(D)]     */
    int   window;                           /* keys each query may see, itself included [all]       */
    float softcap;                          /* Gemma 2's cap of the scores          [none]          */
    const int32_t *first_key;               /* [B, T] earliest key of each query: where its document
                                               starts, past left padding; borrowed until the backward
                                               pass is over                         [0 everywhere]  */
} mft_attention_desc;
MFT_API mft_tensor *mft_attention  (mft_context *ctx, mft_tensor *q, mft_tensor *k, mft_tensor *v, const mft_attention_desc *desc);

/* ==============================================================================
 * MARK: - [LORA] The low-rank linear
 * ============================================================================== */

/* y = x w^T + bias + scale (dropout(x) a^T) b^T        (Hu et al. 2021, "LoRA")
 *
 * x      [.., in]   w [out, in], frozen or not   bias [out] or NULL
 * a, b   [rank, in], [out, rank], f32            scale  lora_alpha / rank, or / sqrt(rank) (rsLoRA)
 * memory saves x and the rank-sized x a^T; of a frozen w nothing */
MFT_API mft_tensor *mft_lora_linear(mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias,
                                    mft_tensor *a, mft_tensor *b, float scale, float dropout);

/* y = bias + (m / n) (x w^T + scale (x a^T) b^T),  n[o] = |w[o,:] + scale (b a)[o,:]|
 * (Liu et al. 2024, "DoRA"); n is a constant to the backward pass, as in PEFT. With dropout the low-rank
 * part and what m / n changes of the base see dropout(x), the base itself x, as in PEFT.
 * magnitude [out], f32; the rest as for mft_lora_linear */
MFT_API mft_tensor *mft_dora_linear(mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias,
                                    mft_tensor *a, mft_tensor *b, mft_tensor *magnitude, float scale, float dropout);

/* ==============================================================================
 * MARK: - [LOSS] Scalars to train on
 *
 *   labels are -100 where ignored, and here already aligned with the rows: the shift by one
 *   token is the model's (mft_model_loss). n_valid 0 divides by the rows that count; another
 *   value divides by that, so that a window of micro-batches sums to its exact mean.
 * ============================================================================== */

/* mean over rows of -log softmax(logits)[label].  logits [.., V], labels [rows] borrowed. */
MFT_API mft_tensor *mft_cross_entropy(mft_context *ctx, mft_tensor *logits, const int32_t *labels, int64_t n_valid);

/* The same of logits = softcap'(x w^T), which are never held: tiles of tokens x vocabulary. A frozen w is gone
 * over once, the gradient in x being summed with the softmax still running and kept, [counted rows, H]; a
 * trainable one once more in the backward pass. Rows whose label is -100 cost nothing.
 * x [.., H], w [V, H] in any storage type, trainable or not; softcap 0: none.
 * source   Wijmans et al. 2024, "Cut your losses in large-vocabulary language models" */
MFT_API mft_tensor *mft_linear_cross_entropy(mft_context *ctx, mft_tensor *x, mft_tensor *w, const int32_t *labels,
                                             int64_t n_valid, float softcap);

/* mean of (x - y)^2 */
MFT_API mft_tensor *mft_mse_loss(mft_context *ctx, mft_tensor *x, mft_tensor *y);

/* ==============================================================================
 * MARK: - [BACKWARD] From the loss to every gradient
 * ============================================================================== */

/* Adds d loss / d t to the `grad` of every trainable tensor below `loss` (a scalar), walking the
 * tape in reverse and giving each record's memory back as it goes: afterwards only held tensors,
 * their gradients and the loss itself may be read.
 * fails  with the step's first failure (no gradient is touched then); CANCELLED (gradients are
 *        partial: drop them with mft_optimizer_zero_grad) */
MFT_API mft_status  mft_backward    (mft_context *ctx, mft_tensor *loss);

/* ==============================================================================
 * MARK: - [OPTIMIZER] From gradients to new weights
 * ============================================================================== */
typedef struct mft_optimizer mft_optimizer;      /* held */

typedef enum mft_optimizer_kind {
    MFT_ADAMW,                              /* Loshchilov and Hutter 2019; 8 bytes of state for each number       */
    MFT_SGD,                                /* 0 bytes, or 4 with momentum                                        */
    MFT_ADAMW8BIT,                          /* AdamW with moments in 8-bit blocks: 2 bytes, see below             */
    MFT_APOLLO_MINI                         /* a matrix: 8 bytes for each number of its longer side, see below    */
} mft_optimizer_kind;
typedef struct mft_optimizer_desc {
    mft_optimizer_kind kind;                /*                                                    [AdamW] */
    double beta1, beta2, eps;               /* AdamW, in all its forms            [0.9] [0.999] [1e-8]    */
    double momentum;                        /* SGD                                                  [0]   */
    double weight_decay;                    /* decoupled, times the learning rate                   [0]   */
    double max_grad_norm;                   /* global 2-norm, as torch.nn.utils.clip_grad_norm_; negative: no clipping [1.0] */
} mft_optimizer_desc;

/* AdamW and SGD update as torch.optim does, to the bit order of float32. params: held f32 or bf16 tensors,
 * which must outlive the optimizer; `no_decay`, if given, has n_params flags of those that weight decay leaves out.
 *
 * MFT_ADAMW8BIT  the same update; between steps the moments are codes of 8 bits times the greatest magnitude of
 *     their block of 256 numbers (f32). Codes: the dynamic tree of Dettmers et al. 2021, "8-bit optimizers via
 *     block-wise quantization": 0, 1 and seven decades of 2, 4 .. 128 equal cells (signed for exp_avg: 1 .. 64);
 *     a number goes to the nearest. Parameters of fewer than 4096 numbers keep f32 moments. Other than bitsandbytes:
 *     decay comes before the update (as torch's); exp_avg_sq above zero never becomes zero, and so an update
 *     never eps alone divides; exp_avg may become zero.
 * MFT_APOLLO_MINI  Zhu et al. 2024, "APOLLO: SGD-like Memory, AdamW-level Performance", with rank 1, one scale for a
 *     matrix, scale 128: as apollo-torch and transformers' apollo_adamw do with rank=1, scale_type=tensor, scale=128,
 *     update_proj_gap=200. A matrix G [m, n] goes as r onto its longer side, r = z G (m < n) or G z (else), by normal numbers
 *     z that are new every 200 steps and never kept: Philox(context's seed, number of the 200 and of the parameter).
 *         exp_avg, exp_avg_sq = AdamW's moments of r;   s = |exp_avg / (sqrt(exp_avg_sq) + eps)| / (|r| + 1e-8)
 *         p = p decay - lr sqrt(128) sqrt(1 - beta2^t) / (1 - beta1^t) s G,   |s G| held to 1.01 times the last step's
 *     Vectors have AdamW. Other than the reference's recipes, which leave embedding and head to AdamW, every matrix
 *     is updated so; decay comes before the update; a gradient of zeros (LoRA's first) is no norm to hold the next to. The
 *     moments of a step where z is new are, as there, what the old z left.
 *     Its rate is AdamW's or a few times that. Trained models came within 2 % of AdamW's held-out loss: tests/test_quantize.c
 * bf16 parameters  are updated in f32 and rounded up or down by chance, with the odds that keep the mean (an update
 *     smaller than half a step is lost in the mean by no rounding to nearest): element i takes 16 of the bits of
 *     Philox(context's seed, step and number of the parameter, i / 4), whichever thread comes by. */
MFT_API mft_status mft_optimizer_create   (mft_context *ctx, const mft_optimizer_desc *desc, mft_tensor *const *params,
                                           const unsigned char *no_decay, int n_params, mft_optimizer **out);
/* Clips, updates, zeroes the gradients. out_grad_norm (may be NULL): before clipping.
 * fails  NOT_FINITE: the norm is NaN or infinite; weights, moments and gradients are untouched */
MFT_API mft_status mft_optimizer_step     (mft_optimizer *opt, double learning_rate, double *out_grad_norm);
MFT_API void       mft_optimizer_zero_grad(mft_optimizer *opt);
/* The moments as named tensors (`NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.momentum`, `NAME.update_norm`) and the step
 * counter (`step`, i64), to save or to fill; borrowed from the optimizer. returns the full count. */
MFT_API int        mft_optimizer_state    (mft_optimizer *opt, mft_tensor **out, int cap);
MFT_API void       mft_optimizer_destroy  (mft_optimizer *opt);

/* Learning rate of optimizer step `step` (0 is the first), as transformers.get_scheduler gives it:
 * linear warm-up from 0 over warmup_steps, then constant, linear or cosine to `floor` at total_steps. */
typedef enum mft_schedule_kind { MFT_SCHEDULE_CONSTANT, MFT_SCHEDULE_LINEAR, MFT_SCHEDULE_COSINE } mft_schedule_kind;
MFT_API double     mft_schedule           (mft_schedule_kind kind, double peak, double floor,
                                           int64_t warmup_steps, int64_t total_steps, int64_t step);

#endif /* MFT_H */

/* ############################################################################## *
 *                               IMPLEMENTATION                                   *
 * ############################################################################## */
#if defined(MFT_IMPLEMENTATION) && !defined(MFT_IMPLEMENTED)
#define MFT_IMPLEMENTED

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef MFT_NO_THREADS
#  include <pthread.h>
#endif

/* ==============================================================================
 * MARK: - [CONFIG] Compiler and machine
 * ============================================================================== */
#ifndef MFT_ASSERT
#  define MFT_ASSERT(x) ((void)0)
#endif
#define MFT__PI 3.14159265358979323846

#if defined(__GNUC__) || defined(__clang__)
#  define MFT__PRINTF(fmt, first) __attribute__((format(printf, fmt, first)))
#  define MFT__UNUSED __attribute__((unused))
#else
#  define MFT__PRINTF(fmt, first)
#  define MFT__UNUSED
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#  error "mft reads and writes little-endian files in place: a big-endian machine needs more work"
#endif

/* ==============================================================================
 * MARK: - [STATUS] The error text, checked size arithmetic
 * ============================================================================== */
MFT_API const char *mft_status_string(mft_status status)
{
    switch (status) {
    case MFT_OK:                   return "ok";
    case MFT_ERR_INVALID_ARGUMENT: return "invalid argument";
    case MFT_ERR_OUT_OF_MEMORY:    return "out of memory";
    case MFT_ERR_IO:               return "input/output error";
    case MFT_ERR_FORMAT:           return "format error";
    case MFT_ERR_UNSUPPORTED:      return "unsupported";
    case MFT_ERR_NOT_FINITE:       return "not finite";
    case MFT_ERR_CANCELLED:        return "cancelled";
    }
    return "unknown status";
}

/* Keeps the sentence and returns the status: `return mft__fail(ctx, MFT_ERR_IO, "%s: ...", path)`.
 * Text longer than the buffer is cut; names from files go in as %.*s with a bound. */
static mft_status mft__fail(mft_context *ctx, mft_status status, const char *format, ...) MFT__PRINTF(3, 4);
static void       mft__log (mft_context *ctx, mft_log_level level, const char *format, ...) MFT__PRINTF(3, 4) MFT__UNUSED;

/* *out = a * b, 0 if it does not fit. */
static int mft__mul_size(size_t a, size_t b, size_t *out)
{
    if (b != 0 && a > (size_t)-1 / b) return 0;
    *out = a * b;
    return 1;
}

static int64_t mft__min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t mft__max(int64_t a, int64_t b) { return a > b ? a : b; }

/* ==============================================================================
 * MARK: - [CONTEXT] Allocation, the list of everything made
 * ============================================================================== */

/* What allocated bytes are for, in the memory report. */
typedef enum mft__use { MFT__OTHER, MFT__WEIGHTS, MFT__GRADIENTS, MFT__OPTIMIZER, MFT__N_USES } mft__use;

/* The first member of everything opaque, so that a context can end what it made. */
typedef struct mft__object {
    struct mft__object *prev, *next;
    void (*destroy)(void *self);            /* frees self; unlinks it with mft__object_remove */
} mft__object;

struct mft__kernels;
struct mft__pool;
struct mft__record;
struct mft__meta_block;

/* Where the forward end of the arena stood: see [ARENA]. */
typedef struct mft__mark { int chunk; size_t low; } mft__mark;

typedef struct mft__chunk {                 /* one piece of the step arena */
    char  *base;
    size_t size;
    size_t low;                             /* the forward end: [0, low) is taken, a stack          */
    size_t high;                            /* the backward end: [high, size) is a heap with holes   */
} mft__chunk;

typedef struct mft__hole { int chunk; size_t at, bytes; } mft__hole;

enum { MFT__MAX_CHUNKS = 48, MFT__MAX_HOLES = 256 };

typedef struct mft__arena {
    mft__chunk chunks[MFT__MAX_CHUNKS];
    int        n_chunks;
    int        low_chunk;                   /* the chunk the forward end is in                      */
    mft__hole  holes[MFT__MAX_HOLES];       /* free places above `high`, in no order                */
    int        n_holes;
    size_t     now, peak;                   /* bytes taken, holes not counted                       */
    size_t     reach;                       /* the most both ends took of one chunk, holes counted  */
} mft__arena;

struct mft_context {
    mft_allocator allocator;
    mft_io        io;
    size_t        budget;
    int           n_threads;
    mft_precision precision;
    mft_products  products;
    void        (*log)(void *user, mft_log_level level, const char *text);
    void         *log_user;

    const struct mft__kernels *kernels;     /* the row in use: [KERNEL]                             */
    struct mft__pool *pool;                 /* the other threads: [THREADS]                         */

    size_t        used[MFT__N_USES];        /* bytes obtained, by use                               */
    size_t        now, peak;
    mft__object   objects;                  /* head of the ring of everything made                  */

    mft__arena    arena;                    /* numbers of the step                                  */
    mft__arena   *real_arena;               /* set aside while planning; NULL otherwise             */
    struct mft__meta_block *meta;           /* tensor structs and records of the step               */

    struct mft__record *tape;               /* the latest record; each knows the one before         */
    int           grad_enabled;
    int           saw_trainable;            /* an op met a trainable input since this was cleared   */
    int           input_ends;               /* the next mft_checkpoint is the only reader of its input: 1: which goes if the backward
                                               pass does not want it, 2: and else is kept in bf16 */
    int           in_checkpoint;            /* the first run of a checkpoint's function             */
    int           recomputing;              /* its second run: nobody will read the result itself   */
    int           result_unread;            /* nor what linear, lora_linear and add make just now   */
    void        (*drop_pages)(const char *p, uint64_t bytes);   /* of mapped tensors behind each use, see mft__passed; NULL: they stay */
    void       *(*take_pages)(void *state, size_t bytes);       /* zeroed, of a mapped file, for the large weights, gradients and moments
                                               that are made now; NULL: they come from the allocator    */
    void         *state;                    /* take_pages' first argument                              */
    mft_tensor   *spare_grads;              /* that no parameter has just now, chained by their grad: see mft__grad_release */
    int           updating;                 /* weights of this step have been updated: it is ended, not cancelled */
    mft_status    step_status;              /* the step's first failure, and its sentence           */
    char          step_error[1024];

    uint64_t      seed;                     /* of dropout, with the two counters below              */
    uint64_t      step_index, draw_index;
    uint64_t      weights_version;          /* goes up whenever what models compute may change      */

    int           cancel;                   /* written by any thread: __atomic only                 */
    int           in_step;                  /* a training step runs, which cancel 2 lets finish      */
    int           phase, phase_step;        /* an mft__phase, and the step it is of; __atomic, for mft_memory_trace_open's thread */
    char          error[1024];
};

/* What the context is at, for who watches: before the first step all is loading. */
typedef enum mft__phase { MFT__LOAD, MFT__FORWARD, MFT__BACKWARD, MFT__UPDATE, MFT__EVAL, MFT__SAVE, MFT__BETWEEN, MFT__N_PHASES } mft__phase;

/* returns the phase until now, so that one can be put into another */
MFT__UNUSED static int mft__phase_set(mft_context *ctx, int phase)
{
    int was = __atomic_load_n(&ctx->phase, __ATOMIC_RELAXED);
    __atomic_store_n(&ctx->phase, phase, __ATOMIC_RELAXED);
    return was;
}

/* Whether ops should compute: not while planning. */
#define MFT__RUNS(ctx) ((ctx)->real_arena == NULL)

static mft_status mft__fail(mft_context *ctx, mft_status status, const char *format, ...)
{
    va_list args;
    if (!ctx) return status;
    va_start(args, format);
    vsnprintf(ctx->error, sizeof ctx->error, format, args);
    va_end(args);
    return status;
}

static void mft__log(mft_context *ctx, mft_log_level level, const char *format, ...)
{
    char    text[512];
    va_list args;
    if (!ctx->log) return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    ctx->log(ctx->log_user, level, text);
}

MFT__UNUSED static int mft__cancelled(const mft_context *ctx)
{
    int on = __atomic_load_n(&ctx->cancel, __ATOMIC_RELAXED);
    return (on == 1 && !ctx->updating) || (on && !ctx->in_step);
}

MFT_API void mft_cancel(mft_context *ctx, int on)
{
    if (ctx) __atomic_store_n(&ctx->cancel, on == 2 ? 2 : on != 0, __ATOMIC_RELAXED);
}

/* malloc aligned to 64 bytes, or to `align` if that is more: the address malloc gave stands just below. */
static void *mft__default_alloc(void *user, size_t bytes, size_t align)
{
    char *raw, *p;
    (void)user;
    if (bytes > (size_t)-1 - align - sizeof(void *)) return NULL;
    raw = (char *)malloc(bytes + align + sizeof(void *));
    if (!raw) return NULL;
    p = raw + sizeof(void *);
    p += (align - (uintptr_t)p % align) % align;
    memcpy(p - sizeof(void *), &raw, sizeof raw);
    return p;
}

static void mft__default_free(void *user, void *ptr, size_t bytes)
{
    char *raw;
    (void)user; (void)bytes;
    memcpy(&raw, (char *)ptr - sizeof(void *), sizeof raw);
    free(raw);
}

/* Uninitialised memory on 64 bytes, counted and within the budget; freed with the same bytes and
 * use. On failure NULL with the sentence set. 0 bytes are a valid block. Owner's thread only. */
static void *mft__alloc_as(mft_context *ctx, mft__use use, size_t bytes)
{
    void *p;
    if (ctx->budget && (bytes > ctx->budget || ctx->now > ctx->budget - bytes)) {
        mft__fail(ctx, MFT_ERR_OUT_OF_MEMORY, "%llu bytes more than the %llu in use would pass the memory budget of %llu",
                  (unsigned long long)bytes, (unsigned long long)ctx->now, (unsigned long long)ctx->budget);
        return NULL;
    }
    p = ctx->allocator.alloc(ctx->allocator.user, bytes ? bytes : 1, 64);
    if (!p) {
        mft__fail(ctx, MFT_ERR_OUT_OF_MEMORY, "the allocator could not give %llu bytes", (unsigned long long)bytes);
        return NULL;
    }
    ctx->now += bytes;
    ctx->used[use] += bytes;
    if (ctx->now > ctx->peak) ctx->peak = ctx->now;
    return p;
}

static void mft__free_as(mft_context *ctx, mft__use use, void *p, size_t bytes)
{
    if (!p) return;
    ctx->now -= bytes;
    ctx->used[use] -= bytes;
    ctx->allocator.free(ctx->allocator.user, p, bytes ? bytes : 1);
}

MFT__UNUSED static void *mft__alloc(mft_context *ctx, size_t bytes)          { return mft__alloc_as(ctx, MFT__OTHER, bytes); }
MFT__UNUSED static void  mft__free (mft_context *ctx, void *p, size_t bytes) { mft__free_as(ctx, MFT__OTHER, p, bytes); }

MFT__UNUSED static void *mft__alloc_zero(mft_context *ctx, size_t bytes)
{
    void *p = mft__alloc(ctx, bytes);
    if (p) memset(p, 0, bytes);
    return p;
}

/* Makes room for `need` elements in a growing array, doubling: *p, *cap are updated, contents kept.
 * 0 and a sentence when it cannot; the array is then as it was. */
MFT__UNUSED static int mft__grow(mft_context *ctx, void **p, size_t *cap, size_t need, size_t element)
{
    size_t bytes, more = *cap ? *cap : 16;
    void  *q;
    if (need <= *cap) return 1;
    while (more < need) {
        if (more > (size_t)-1 / 2) { more = need; break; }
        more *= 2;
    }
    if (!mft__mul_size(more, element, &bytes)) {
        mft__fail(ctx, MFT_ERR_OUT_OF_MEMORY, "an array of %llu elements does not fit an address space", (unsigned long long)need);
        return 0;
    }
    q = mft__alloc(ctx, bytes);
    if (!q) return 0;
    if (*cap) memcpy(q, *p, *cap * element);
    mft__free(ctx, *p, *cap * element);
    *p = q; *cap = more;
    return 1;
}

MFT__UNUSED static char *mft__strdup(mft_context *ctx, const char *s)      /* freed with mft__strfree */
{
    size_t n = strlen(s) + 1;
    char  *p = (char *)mft__alloc(ctx, n);
    if (p) memcpy(p, s, n);
    return p;
}

MFT__UNUSED static void mft__strfree(mft_context *ctx, char *s) { if (s) mft__free(ctx, s, strlen(s) + 1); }

MFT__UNUSED static void mft__object_add(mft_context *ctx, mft__object *o, void (*destroy)(void *self))
{
    o->destroy = destroy;
    o->prev = ctx->objects.prev; o->next = &ctx->objects;
    ctx->objects.prev->next = o; ctx->objects.prev = o;
}

static void mft__object_remove(mft__object *o)
{
    if (!o->next) return;                                       /* never added */
    o->prev->next = o->next; o->next->prev = o->prev;
    o->prev = o->next = NULL;
}

static mft_status mft__pool_create(mft_context *ctx);
static void       mft__pool_destroy(mft_context *ctx);
static int        mft__kernels_choose(mft_context *ctx, const char *name);

MFT_API mft_status mft_context_create(const mft_context_desc *desc, mft_context **out)
{
    mft_context_desc zero;
    mft_context     *ctx;
    mft_allocator    a;

    if (!out) return MFT_ERR_INVALID_ARGUMENT;
    *out = NULL;
    memset(&zero, 0, sizeof zero);
    if (!desc) desc = &zero;
    a = desc->allocator;
    if (!a.alloc != !a.free || !desc->io.open != !desc->io.read || !desc->io.open != !desc->io.close
        || desc->n_threads < 0 || (desc->products.max_bytes && desc->products.max_bytes < sizeof(float))) return MFT_ERR_INVALID_ARGUMENT;
    if (!a.alloc) { a.alloc = mft__default_alloc; a.free = mft__default_free; a.user = NULL; }

    ctx = (mft_context *)a.alloc(a.user, sizeof *ctx, 64);
    if (!ctx) return MFT_ERR_OUT_OF_MEMORY;
    memset(ctx, 0, sizeof *ctx);
    ctx->allocator = a;            ctx->io = desc->io;       ctx->budget = desc->memory_budget;
    ctx->products = desc->products;
    ctx->n_threads = desc->n_threads; ctx->precision = desc->precision;
    ctx->log = desc->log;          ctx->log_user = desc->log_user;
    ctx->seed = desc->seed;        ctx->grad_enabled = 1;
    ctx->now = ctx->peak = ctx->used[MFT__OTHER] = sizeof *ctx;
    ctx->objects.prev = ctx->objects.next = &ctx->objects;

    if (!mft__kernels_choose(ctx, desc->kernels)) { mft_context_destroy(ctx); return MFT_ERR_INVALID_ARGUMENT; }
    if (mft__pool_create(ctx) != MFT_OK
        || (desc->step_arena && mft_step_reserve(ctx, desc->step_arena) != MFT_OK)) {
        mft_context_destroy(ctx);
        return MFT_ERR_OUT_OF_MEMORY;
    }
    *out = ctx;
    return MFT_OK;
}

static void mft__arena_free(mft_context *ctx);
static void mft__meta_free(mft_context *ctx);

MFT_API void mft_context_destroy(mft_context *ctx)
{
    mft_allocator a;
    size_t        bytes;
    if (!ctx) return;
    if (ctx->real_arena) mft_plan_end(ctx, &bytes);             /* destroyed in the middle of a plan */
    mft_step_reset(ctx);
    while (ctx->objects.prev != &ctx->objects) {                /* latest first: users before what they use */
        mft__object *o = ctx->objects.prev;
        o->destroy(o);
    }
    mft__pool_destroy(ctx);
    mft__arena_free(ctx);
    mft__meta_free(ctx);
    a = ctx->allocator;
    a.free(a.user, ctx, sizeof *ctx);
}

MFT_API const char *mft_error_message(const mft_context *ctx) { return ctx ? ctx->error : ""; }

MFT_API void mft_memory(const mft_context *ctx, mft_memory_report *out)
{
    memset(out, 0, sizeof *out);
    if (!ctx) return;
    out->now       = ctx->now;
    out->peak      = ctx->peak;
    out->weights   = ctx->used[MFT__WEIGHTS];
    out->gradients = ctx->used[MFT__GRADIENTS];
    out->optimizer = ctx->used[MFT__OPTIMIZER];
    out->step_now  = ctx->arena.now;
    out->step_peak = ctx->arena.peak;
}

/* ==============================================================================
 * MARK: - [THREADS] A range of work, divided the same way for any number of threads
 *
 *   in    n pieces of work, cut into chunks by the caller's grain alone
 *   out   every chunk run once, on the caller's thread and on the workers of the context
 *   rule  who runs a chunk is decided by an atomic counter, what a chunk is by nothing but
 *         n and grain: numbers cannot depend on the number of threads, and a slow core
 *         simply takes fewer chunks
 *
 *   The owner never waits for a worker that has not begun: it opens a gate, works itself, shuts
 *   the gate when the chunks are used up and waits for those inside. Idle workers look at the gate
 *   for some 40 to 100 us, for the next product of the same layer, and then sleep; to wake one
 *   costs some microseconds, and it comes later still. No more are awake than there are cores, and the
 *   last to fall asleep is the first to be woken, its memory still near: so more threads than
 *   cores cost next to nothing (`mft bench threads`).
 * ============================================================================== */

/* Work on [begin, end). worker, 0 for the caller's thread, is below ctx->n_threads and no other
 * thread's at the same time: it may pick scratch memory, never anything that changes numbers. */
typedef void (*mft__task)(void *arg, int64_t begin, int64_t end, int worker);

enum { MFT__MAX_THREADS = 256 };

#ifdef MFT_NO_THREADS

static int        mft__at_once(const mft_context *ctx) { (void)ctx; return 1; }
static mft_status mft__pool_create(mft_context *ctx)  { ctx->n_threads = 1; return MFT_OK; }
static void       mft__pool_destroy(mft_context *ctx) { (void)ctx; }

static void mft__parallel(mft_context *ctx, int64_t n, int64_t grain, mft__task fn, void *arg)
{
    int64_t i;
    (void)ctx;
    if (grain < 1) grain = 1;
    for (i = 0; i < n; i += grain) fn(arg, i, n - i > grain ? i + grain : n, 0);
}

#else

#ifndef _WIN32
#  include <unistd.h>                       /* sysconf */
#endif

typedef struct mft__worker {
    struct mft__pool   *pool;
    pthread_t           thread;
    int                 index, called;      /* called: the owner took it off the sleepers                 */
    pthread_cond_t      call;
    struct mft__worker *below;              /* who fell asleep before it                                  */
} mft__worker;

/* The gate is one word, so that opening, entering and leaving are single atomic operations:
 *   bits 0-11  workers inside;  12  open;  13  the owner sleeps until the last one leaves;
 *   14  the context ends;  15-31  number of the job, wrapping (only "another job?" is asked of it) */
enum { MFT__GATE_INSIDE = 0xfff, MFT__GATE_OPEN = 1 << 12, MFT__GATE_OWNER_SLEEPS = 1 << 13, MFT__GATE_END = 1 << 14, MFT__GATE_JOB = 1 << 15 };

typedef struct mft__pool {
    uint32_t        gate;
    int             n_asleep;               /* how many `asleep` lists; changed under the mutex, read without */
    mft__worker    *asleep;                 /* the last to fall asleep first                              */
    mft__task       fn;                     /* the job: written while the gate is shut and nobody inside  */
    void           *arg;
    int64_t         n, grain;
    size_t          n_chunks, next;         /* next: the first chunk nobody has taken                     */
    pthread_mutex_t mutex;
    pthread_cond_t  done;
    int             n_workers, most;        /* most: workers awake at a time                              */
    mft__worker    *workers;
    size_t          bytes;
} mft__pool;

#ifdef __linux__                            /* under a name of ours: strict C99 hides the system's */
extern int mft__sched_getaffinity(int pid, size_t bytes, void *mask) __asm__("sched_getaffinity");
#endif

/* Those this process may run on, where the system tells (taskset, containers, apps in the background); else all. */
static int mft__cores(void)
{
#if defined(_WIN32)
    int n = pthread_num_processors_np();
#else
    long n = sysconf(_SC_NPROCESSORS_ONLN);
#endif
#ifdef __linux__
    unsigned long mask[1024 / sizeof(unsigned long)];
    size_t        i;
    memset(mask, 0, sizeof mask);
    if (mft__sched_getaffinity(0, sizeof mask, mask) == 0)
        for (n = 0, i = 0; i < sizeof mask / sizeof mask[0]; i++) n += __builtin_popcountl(mask[i]);
#endif
    return n < 1 ? 1 : n > MFT__MAX_THREADS ? MFT__MAX_THREADS : (int)n;
}

/* Threads that work at the same time: no more than there are cores. Only for how finely work is cut: numbers must not depend on it. */
static int mft__at_once(const mft_context *ctx) { return ctx->pool ? ctx->pool->most + 1 : 1; }

enum { MFT__SPINS = 4000 };                 /* looks at the gate before sleep */

/* Tells the core that this is a wait: saves power, lets a sibling thread run. Of arm's instructions `isb` takes
 * about as long as x86's; `yield` takes no time on most of them, and all the looks would end before the next job. */
static void mft__pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || (defined(__ARM_ARCH) && __ARM_ARCH >= 7)
    __asm__ __volatile__("isb");
#endif
}

/* The gate has nothing for who has seen job `seen`. */
static int mft__gate_idle(uint32_t gate, uint32_t seen)
{
    return !(gate & MFT__GATE_END) && (!(gate & MFT__GATE_OPEN) || gate / MFT__GATE_JOB == seen);
}

/* Until the owner calls, or at once if there is another job. */
static void mft__worker_sleep(mft__worker *w, uint32_t seen)
{
    mft__pool *p = w->pool;
    pthread_mutex_lock(&p->mutex);
    w->called = 0; w->below = p->asleep; p->asleep = w;
    __atomic_fetch_add(&p->n_asleep, 1, __ATOMIC_SEQ_CST);              /* before the look: the owner opens, then counts sleepers */
    if (mft__gate_idle(__atomic_load_n(&p->gate, __ATOMIC_SEQ_CST), seen))
        while (!w->called) pthread_cond_wait(&w->call, &p->mutex);
    else { p->asleep = w->below; __atomic_fetch_sub(&p->n_asleep, 1, __ATOMIC_SEQ_CST); }
    pthread_mutex_unlock(&p->mutex);
}

/* Wakes workers until n are awake, or none sleeps. */
static void mft__pool_call(mft__pool *p, int n)
{
    pthread_mutex_lock(&p->mutex);
    while (p->asleep && p->n_workers - p->n_asleep < n) {               /* who has just found the job by itself has left the list */
        mft__worker *w = p->asleep;
        p->asleep = w->below; w->called = 1;
        __atomic_fetch_sub(&p->n_asleep, 1, __ATOMIC_SEQ_CST);
        pthread_cond_signal(&w->call);
    }
    pthread_mutex_unlock(&p->mutex);
}

static void mft__pool_run(mft__pool *p, int worker)
{
    size_t i;
    while ((i = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->n_chunks) {
        int64_t begin = (int64_t)i * p->grain;
        p->fn(p->arg, begin, p->n - begin > p->grain ? begin + p->grain : p->n, worker);
    }
}

static void *mft__worker_main(void *self)
{
    mft__worker *w    = (mft__worker *)self;
    mft__pool   *p    = w->pool;
    uint32_t     seen = 0, gate;            /* job numbers start at 1 */
    int          spin = MFT__SPINS;         /* asleep until called */

    for (;;) {
        gate = __atomic_load_n(&p->gate, __ATOMIC_ACQUIRE);
        if (gate & MFT__GATE_END) return NULL;
        if (mft__gate_idle(gate, seen)) {
            if (++spin < MFT__SPINS) { mft__pause(); continue; }
            mft__worker_sleep(w, seen);
            spin = 0;
            continue;
        }
        if (!__atomic_compare_exchange_n(&p->gate, &gate, gate + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) continue;
        seen = gate / MFT__GATE_JOB;
        mft__pool_run(p, w->index);
        gate = __atomic_fetch_sub(&p->gate, 1, __ATOMIC_ACQ_REL);
        if ((gate & MFT__GATE_OWNER_SLEEPS) && (gate & MFT__GATE_INSIDE) == 1) {
            pthread_mutex_lock(&p->mutex);                              /* the owner is in its wait, or will see 0 */
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->mutex);
        }
        spin = 0;
    }
}

/* fn over [0, n) in chunks of `grain`, the last one shorter, in any order on any thread of the
 * context; returns when all are done. Not to be called from inside a task. */
static void mft__parallel(mft_context *ctx, int64_t n, int64_t grain, mft__task fn, void *arg)
{
    mft__pool *p = ctx->pool;
    uint32_t   gate;
    int        call, spin;

    if (n < 1) return;
    if (grain < 1) grain = 1;
    if (!p || n <= grain) {                                             /* the same chunks, one after the other */
        int64_t i;
        for (i = 0; i < n; i += grain) fn(arg, i, n - i > grain ? i + grain : n, 0);
        return;
    }
    p->fn = fn; p->arg = arg; p->n = n; p->grain = grain;
    p->n_chunks = (size_t)((n - 1) / grain + 1);
    __atomic_store_n(&p->next, 0, __ATOMIC_RELAXED);
    gate = __atomic_load_n(&p->gate, __ATOMIC_RELAXED);
    gate = (gate / MFT__GATE_JOB + 1) * MFT__GATE_JOB + MFT__GATE_OPEN;
    __atomic_store_n(&p->gate, gate, __ATOMIC_SEQ_CST);                 /* publishes the job */

    call  = p->n_chunks - 1 < (size_t)p->most ? (int)p->n_chunks - 1 : p->most;
    if (p->n_workers - __atomic_load_n(&p->n_asleep, __ATOMIC_SEQ_CST) < call) mft__pool_call(p, call);     /* those awake come by themselves */
    mft__pool_run(p, 0);

    gate = __atomic_fetch_and(&p->gate, ~(uint32_t)MFT__GATE_OPEN, __ATOMIC_ACQ_REL);
    for (spin = 0; (gate & MFT__GATE_INSIDE) && spin < MFT__SPINS; spin++) {
        mft__pause();
        gate = __atomic_load_n(&p->gate, __ATOMIC_ACQUIRE);
    }
    if (gate & MFT__GATE_INSIDE) {
        pthread_mutex_lock(&p->mutex);
        gate = __atomic_fetch_or(&p->gate, (uint32_t)MFT__GATE_OWNER_SLEEPS, __ATOMIC_ACQ_REL);
        while (gate & MFT__GATE_INSIDE) {
            pthread_cond_wait(&p->done, &p->mutex);
            gate = __atomic_load_n(&p->gate, __ATOMIC_ACQUIRE);
        }
        pthread_mutex_unlock(&p->mutex);
    }
}

static void mft__pool_destroy(mft_context *ctx)
{
    mft__pool *p = ctx->pool;
    int        i;
    if (!p) return;
    __atomic_fetch_or(&p->gate, (uint32_t)MFT__GATE_END, __ATOMIC_SEQ_CST);
    mft__pool_call(p, p->n_workers);
    for (i = 0; i < p->n_workers; i++) {
        pthread_join(p->workers[i].thread, NULL);
        pthread_cond_destroy(&p->workers[i].call);
    }
    pthread_cond_destroy(&p->done);
    pthread_mutex_destroy(&p->mutex);
    mft__free(ctx, p, p->bytes);
    ctx->pool = NULL;
}

/* ctx->n_threads - 1 workers; fails with OUT_OF_MEMORY, and then none is left. */
static mft_status mft__pool_create(mft_context *ctx)
{
    int        cores = mft__cores();
    size_t     bytes;
    mft__pool *p;

    if (!ctx->n_threads) ctx->n_threads = cores;
    if (ctx->n_threads > MFT__MAX_THREADS) ctx->n_threads = MFT__MAX_THREADS;
    if (ctx->n_threads == 1) return MFT_OK;
    bytes = sizeof *p + (size_t)(ctx->n_threads - 1) * sizeof *p->workers;
    p = (mft__pool *)mft__alloc_zero(ctx, bytes);
    if (!p) return MFT_ERR_OUT_OF_MEMORY;
    p->bytes   = bytes;
    p->workers = (mft__worker *)(void *)(p + 1);
    p->most    = (cores < ctx->n_threads ? cores : ctx->n_threads) - 1;
    if (pthread_mutex_init(&p->mutex, NULL)) goto no_mutex;
    if (pthread_cond_init(&p->done, NULL)) goto no_done;
    ctx->pool = p;
    while (p->n_workers < ctx->n_threads - 1) {
        mft__worker *w = &p->workers[p->n_workers];
        w->pool = p; w->index = p->n_workers + 1;
        if (pthread_cond_init(&w->call, NULL)) break;
        if (pthread_create(&w->thread, NULL, mft__worker_main, w)) { pthread_cond_destroy(&w->call); break; }
        p->n_workers++;
    }
    if (p->n_workers == ctx->n_threads - 1) return MFT_OK;
    mft__pool_destroy(ctx);
    return mft__fail(ctx, MFT_ERR_OUT_OF_MEMORY, "a thread could not be started");
no_done:
    pthread_mutex_destroy(&p->mutex);
no_mutex:
    mft__free(ctx, p, bytes);
    return mft__fail(ctx, MFT_ERR_OUT_OF_MEMORY, "no lock for the threads");
}

#endif /* MFT_NO_THREADS */

/* ==============================================================================
 * MARK: - [ARENA] Memory of one step, from two ends
 *
 *   The forward pass takes from the low end, a stack: the backward pass pops it in reverse,
 *   record by record. The backward pass takes gradients and temporaries from the high end, a
 *   small heap, since a gradient lives from its tensor's last use to its first. Both live in
 *   the same chunk, so that what one end gives back the other can take. Structs (tensors,
 *   records) are not in here but in [meta] blocks, which stay until mft_step_reset: a consumed
 *   tensor can still be looked at, and planning needs no memory for numbers.
 *
 *   rule  growing adds a chunk; the next mft_step_reset replaces several by one
 * ============================================================================== */
static size_t mft__round64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

/* Planning's chunk: addresses from 64 on that nobody reads. */
static char *mft__plan_base(void) { return (char *)(uintptr_t)64; }

/* A chunk of at_least bytes; of `wanted`, if that is more and can be had. */
static int mft__arena_add(mft_context *ctx, size_t at_least, size_t wanted)
{
    mft__arena *ar = &ctx->arena;
    mft__chunk *c;
    size_t      bytes = wanted;
    char       *p;

    if (at_least > (size_t)-1 - 63) {                           /* rounding it up would wrap */
        mft__fail(ctx, MFT_ERR_OUT_OF_MEMORY, "%llu bytes do not fit an address space", (unsigned long long)at_least);
        return 0;
    }
    if (ar->n_chunks == MFT__MAX_CHUNKS) {
        mft__fail(ctx, MFT_ERR_OUT_OF_MEMORY, "the step arena is in too many pieces (%d)", ar->n_chunks);
        return 0;
    }
    if (bytes < at_least) bytes = mft__round64(at_least);
    if (!MFT__RUNS(ctx)) { p = mft__plan_base(); bytes = (size_t)-1 / 4; }
    else p = (char *)mft__alloc(ctx, bytes);
    if (!p && bytes > at_least) { bytes = mft__round64(at_least); p = (char *)mft__alloc(ctx, bytes); }
    if (!p) return 0;
    c = &ar->chunks[ar->n_chunks++];
    c->base = p; c->size = c->high = bytes; c->low = 0;
    return 1;
}

/* A chunk for a step that was not planned: doubles what is there. */
static int mft__arena_grow(mft_context *ctx, size_t at_least)
{
    size_t total = 0;
    int    i;
    for (i = 0; i < ctx->arena.n_chunks; i++) total += ctx->arena.chunks[i].size;
    return mft__arena_add(ctx, at_least, total < (size_t)1 << 20 ? (size_t)1 << 20 : total);
}

static void mft__arena_took(mft__arena *ar, const mft__chunk *c, size_t bytes)
{
    size_t reach = c->low + (c->size - c->high);
    ar->now += bytes;
    if (ar->now > ar->peak) ar->peak = ar->now;
    if (reach > ar->reach) ar->reach = reach;
}

static mft__mark mft__low_mark(const mft_context *ctx)
{
    mft__mark m;
    m.chunk = ctx->arena.low_chunk;
    m.low   = ctx->arena.n_chunks ? ctx->arena.chunks[m.chunk].low : 0;
    return m;
}

/* Uninitialised bytes from the forward end, 64-aligned, until popped. NULL with a sentence. */
static void *mft__low(mft_context *ctx, size_t bytes)
{
    mft__arena *ar = &ctx->arena;
    mft__chunk *c;
    bytes = mft__round64(bytes);
    if (!ar->n_chunks && !mft__arena_grow(ctx, bytes)) return NULL;
    c = &ar->chunks[ar->low_chunk];
    while (c->high - c->low < bytes) {
        if (ar->low_chunk + 1 == ar->n_chunks && !mft__arena_grow(ctx, bytes)) return NULL;
        ar->low_chunk++;
        c = &ar->chunks[ar->low_chunk];
    }
    c->low += bytes;
    mft__arena_took(ar, c, bytes);
    return c->base + c->low - bytes;
}

static void mft__low_pop(mft_context *ctx, mft__mark m)
{
    mft__arena *ar = &ctx->arena;
    if (!ar->n_chunks) return;
    while (ar->low_chunk > m.chunk) {
        ar->now -= ar->chunks[ar->low_chunk].low;
        ar->chunks[ar->low_chunk].low = 0;
        ar->low_chunk--;
    }
    ar->now -= ar->chunks[m.chunk].low - m.low;
    ar->chunks[m.chunk].low = m.low;
}

/* Uninitialised bytes from the backward end, 64-aligned, freed in any order. NULL with a sentence. */
static void *mft__high(mft_context *ctx, size_t bytes)
{
    mft__arena *ar = &ctx->arena;
    int         i, best = -1;
    bytes = mft__round64(bytes ? bytes : 1);
    for (i = 0; i < ar->n_holes; i++)                           /* best fit: sizes repeat from block to block */
        if (ar->holes[i].bytes >= bytes && (best < 0 || ar->holes[i].bytes < ar->holes[best].bytes)) best = i;
    if (best >= 0) {
        mft__hole *h = &ar->holes[best];
        char      *p = ar->chunks[h->chunk].base + h->at;
        mft__arena_took(ar, &ar->chunks[h->chunk], bytes);
        h->at += bytes; h->bytes -= bytes;
        if (!h->bytes) *h = ar->holes[--ar->n_holes];
        return p;
    }
    for (i = 0; ; i++) {
        if (i == ar->n_chunks && !mft__arena_grow(ctx, bytes)) return NULL;
        if (ar->chunks[i].high - ar->chunks[i].low >= bytes) break;
    }
    ar->chunks[i].high -= bytes;
    mft__arena_took(ar, &ar->chunks[i], bytes);
    return ar->chunks[i].base + ar->chunks[i].high;
}

static void mft__high_free(mft_context *ctx, void *p, size_t bytes)
{
    mft__arena *ar = &ctx->arena;
    mft__chunk *c;
    size_t      at;
    int         i, chunk = 0;

    if (!p) return;
    bytes = mft__round64(bytes ? bytes : 1);
    while (chunk < ar->n_chunks && ((char *)p < ar->chunks[chunk].base
           || (char *)p >= ar->chunks[chunk].base + ar->chunks[chunk].size)) chunk++;
    MFT_ASSERT(chunk < ar->n_chunks);
    c  = &ar->chunks[chunk];
    at = (size_t)((char *)p - c->base);
    ar->now -= bytes;
    for (i = 0; i < ar->n_holes; ) {                            /* grow over the holes that touch it */
        mft__hole *h = &ar->holes[i];
        if (h->chunk == chunk && (h->at + h->bytes == at || at + bytes == h->at)) {
            if (h->at < at) at = h->at;
            bytes += h->bytes;
            *h = ar->holes[--ar->n_holes];
            i = 0;
        } else i++;
    }
    if (at == c->high) { c->high += bytes; return; }
    if (ar->n_holes == MFT__MAX_HOLES) return;                  /* forgotten until the step ends */
    ar->holes[ar->n_holes].chunk = chunk;
    ar->holes[ar->n_holes].at    = at;
    ar->holes[ar->n_holes].bytes = bytes;
    ar->n_holes++;
}

MFT__UNUSED static size_t mft__arena_bytes(const mft_context *ctx)
{
    size_t bytes = 0;
    int    i;
    for (i = 0; i < ctx->arena.n_chunks; i++) bytes += ctx->arena.chunks[i].size;
    return bytes;
}

/* Forgets all that is in the arena; chunks stay. */
static void mft__arena_clear(mft__arena *ar)
{
    int i;
    for (i = 0; i < ar->n_chunks; i++) { ar->chunks[i].low = 0; ar->chunks[i].high = ar->chunks[i].size; }
    ar->low_chunk = ar->n_holes = 0;
    ar->now = 0;
}

static void mft__arena_free(mft_context *ctx)
{
    mft__arena *ar = &ctx->arena;
    while (ar->n_chunks) {
        ar->n_chunks--;
        if (MFT__RUNS(ctx)) mft__free(ctx, ar->chunks[ar->n_chunks].base, ar->chunks[ar->n_chunks].size);
    }
    mft__arena_clear(ar);
}

MFT_API mft_status mft_step_reserve(mft_context *ctx, size_t bytes)
{
    if (!ctx) return MFT_ERR_INVALID_ARGUMENT;
    if (ctx->arena.now || ctx->tape) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_step_reserve: a step is under way");
    if (ctx->arena.n_chunks == 1 && ctx->arena.chunks[0].size >= bytes) return MFT_OK;
    mft__arena_free(ctx);
    return mft__arena_add(ctx, bytes, 0) ? MFT_OK : MFT_ERR_OUT_OF_MEMORY;
}

/* ---- meta: structs of the step, zeroed, until mft_step_reset ---- */
typedef struct mft__meta_block { struct mft__meta_block *next; size_t used, size; } mft__meta_block;

static void *mft__meta(mft_context *ctx, size_t bytes)
{
    mft__meta_block *m = ctx->meta;
    size_t           head = mft__round64(sizeof *m);
    char            *p;
    bytes = mft__round64(bytes);
    if (!m || m->size - m->used < bytes) {
        size_t size = (size_t)64 << 10;
        if (size < head + bytes) size = head + bytes;
        m = (mft__meta_block *)mft__alloc(ctx, size);
        if (!m) return NULL;
        m->next = ctx->meta; m->used = head; m->size = size;
        ctx->meta = m;
    }
    p = (char *)m + m->used;
    m->used += bytes;
    memset(p, 0, bytes);
    return p;
}

static void mft__meta_free(mft_context *ctx)
{
    while (ctx->meta) {
        mft__meta_block *m = ctx->meta;
        ctx->meta = m->next;
        mft__free(ctx, m, m->size);
    }
}

/* Several blocks become one, so that steps of one size allocate nothing. */
static void mft__meta_clear(mft_context *ctx)
{
    mft__meta_block *m;
    size_t           total = 0;
    if (ctx->meta && ctx->meta->next) {
        for (m = ctx->meta; m; m = m->next) total += m->size;
        mft__meta_free(ctx);
        if (!(m = (mft__meta_block *)mft__alloc(ctx, total))) return;       /* if not now, then when it is needed */
        m->next = NULL; m->size = total;
        ctx->meta = m;
    }
    if (ctx->meta) ctx->meta->used = mft__round64(sizeof *ctx->meta);
}

/* ==============================================================================
 * MARK: - [TENSOR] Shapes, storage types
 * ============================================================================== */
typedef enum mft__tensor_kind { MFT__STEP_TENSOR, MFT__HELD_TENSOR, MFT__WRAPPED_TENSOR } mft__tensor_kind;

/* What stands behind every mft_tensor. */
typedef struct mft__tensor {
    mft_tensor       t;                     /* first: a pointer to one is a pointer to the other     */
    mft__tensor_kind kind;
    mft__use         use;                   /* held: what its bytes count as                         */
    size_t           bytes;                 /* taken for data: held from the allocator, step gradients from the high end */
    mft_context     *ctx;
    mft__object      object;                /* held and wrapped                                      */
    struct mft__tensor *view_of;            /* shares its data and its gradient                      */
    int64_t          view_offset;           /* elements from the start of that                       */
    int              grad_written;          /* its gradient holds numbers to add to                  */
    int              paged;                 /* wrapped: its numbers are in a mapped file             */
    struct mft__pages *pages;               /* paged: who brings them, see mft__need; NULL: nobody need */
    int              packed;                /* its numbers are bf16 by now, see mft__input_end       */
    int              consumed;              /* a backward pass has been through it: its record and numbers are gone */
} mft__tensor;

static mft__tensor *mft__of(mft_tensor *t) { return (mft__tensor *)(void *)t; }

static mft_tensor *mft__op_failed(mft_context *ctx, mft_status status);     /* [TAPE]: a step without one of its tensors has failed */

/* Brings bytes of a file into memory, at the place where it is mapped, or into room set aside for it: see [READ]. */
typedef struct mft__pages {
    int (*fetch)(mft_context *ctx, struct mft__pages *self, const char *p, uint64_t bytes);    /* 0: the sentence is set */
    const char *base;                       /* where all of the file is mapped; NULL: dropped pages do not come back by themselves */
    uint64_t    bytes;
} mft__pages;

/* To be asked before elements [first, first + n) of a weight are read: a file may have become shorter, and may be one
 * that is read piece by piece. 0: the step has failed. */
static int mft__need(mft_context *ctx, const mft_tensor *w, int64_t first, int64_t n)
{
    mft__pages *pages = ((const mft__tensor *)(const void *)w)->pages;
    if (!pages || !MFT__RUNS(ctx) || pages->fetch(ctx, pages, (const char *)w->data + mft_dtype_bytes(w->dtype, first), mft_dtype_bytes(w->dtype, n))) return 1;
    mft__op_failed(ctx, MFT_ERR_IO);
    return 0;
}

enum {
    MFT__PAGED_LEAST = 1 << 15,             /* bytes below which a tensor is not worth pages of its own       */
    MFT__PAGED_AROUND = 1 << 21,            /* bytes before and after a page that the system may bring along with it */
    MFT__PAGED_PIECE = 1 << 18              /* elements that a walk through a mapped tensor leaves behind at a time */
};

/* Are its pages to go behind each use? */
static int mft__drops_behind(const mft_context *ctx, const mft_tensor *t)
{
    return ctx->drop_pages && ((const mft__tensor *)(const void *)t)->paged && MFT__RUNS(ctx);
}

/* Says that elements [first, first + n) of a weight, a gradient or a moment have been read or written: where memory is
 * short, the pages of a mapped file go at once, so that no more is resident than one product's, and with them its neighbours',
 * which the system has brought along. They come back from the page cache, where it keeps what was written until it is on the disk. */
static void mft__passed(mft_context *ctx, const mft_tensor *w, int64_t first, int64_t n)
{
    const mft__pages *pages = ((const mft__tensor *)(const void *)w)->pages;
    const char       *begin, *end, *low, *high;
    if (!mft__drops_behind(ctx, w)) return;
    begin = (const char *)w->data + mft_dtype_bytes(w->dtype, first);
    end   = begin + mft_dtype_bytes(w->dtype, n);
    low   = pages ? pages->base : (const char *)w->data;
    if (low) {
        high   = low + (pages ? pages->bytes : mft_dtype_bytes(w->dtype, mft_tensor_numel(w)));
        begin -= mft__min(begin - low, MFT__PAGED_AROUND);
        end   += mft__min(high - end,  MFT__PAGED_AROUND);
    }
    ctx->drop_pages(begin, (uint64_t)(end - begin));
}

/* The same for a walk from the first element to the last that has come to `to`; *from is where pages are still held. */
MFT__UNUSED static void mft__passing(mft_context *ctx, const mft_tensor *w, int64_t *from, int64_t to)
{
    if (to - *from < MFT__PAGED_PIECE && to < mft_tensor_numel(w)) return;
    mft__passed(ctx, w, *from, to - *from);
    *from = to;
}

/* How many elements to walk through at a time, of n. */
static int64_t mft__paged_piece(const mft_context *ctx, const mft_tensor *t, int64_t n)
{
    return mft__drops_behind(ctx, t) && n > MFT__PAGED_PIECE ? (int64_t)MFT__PAGED_PIECE : n;
}

MFT_API const char *mft_dtype_name(mft_dtype dtype)
{
    switch (dtype) {
    case MFT_F32:  return "F32";
    case MFT_F16:  return "F16";
    case MFT_BF16: return "BF16";
    case MFT_I32:  return "I32";
    case MFT_I64:  return "I64";
    case MFT_U8:   return "U8";
    case MFT_Q8_0: return "Q8_0";
    case MFT_Q4_0: return "Q4_0";
    }
    return "?";
}

MFT_API size_t mft_dtype_bytes(mft_dtype dtype, int64_t n)
{
    switch (dtype) {
    case MFT_F32: case MFT_I32:  return (size_t)n * 4;
    case MFT_F16: case MFT_BF16: return (size_t)n * 2;
    case MFT_I64:  return (size_t)n * 8;
    case MFT_U8:   return (size_t)n;
    case MFT_Q8_0: return (size_t)n / 32 * 34;
    case MFT_Q4_0: return (size_t)n / 32 * 18;
    }
    return 0;
}

static int mft__is_float(mft_dtype d) { return d == MFT_F32 || d == MFT_F16 || d == MFT_BF16; }
static int mft__is_master(mft_dtype d) { return d == MFT_F32 || d == MFT_BF16; }      /* can be trained: see [OPTIMIZER] */
static int mft__is_quantized(mft_dtype d) { return d == MFT_Q8_0 || d == MFT_Q4_0; }

MFT_API int64_t mft_tensor_numel(const mft_tensor *t)
{
    int64_t n = 1;
    int     i;
    if (!t) return 0;
    for (i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

MFT__UNUSED static int mft__is_contiguous(const mft_tensor *t)
{
    int64_t expect = 1;
    int     i;
    for (i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] != 1 && t->stride[i] != expect) return 0;
        expect *= t->shape[i];
    }
    return 1;
}

MFT__UNUSED static int mft__same_shape(const mft_tensor *a, const mft_tensor *b)
{
    int i;
    if (a->ndim != b->ndim) return 0;
    for (i = 0; i < a->ndim; i++) if (a->shape[i] != b->shape[i]) return 0;
    return 1;
}

/* "[2, 3]" into text, which has room for any shape. */
typedef struct mft__shape_text { char s[4 * 22 + 4]; } mft__shape_text;
MFT__UNUSED static const char *mft__shape(const mft_tensor *t, mft__shape_text *text)
{
    size_t at = 0;
    int    i;
    text->s[at++] = '[';
    for (i = 0; i < t->ndim; i++)
        at += (size_t)snprintf(text->s + at, sizeof text->s - at, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    text->s[at++] = ']'; text->s[at] = '\0';
    return text->s;
}

/* Fills dtype, shape and contiguous strides; *bytes is what the numbers take. 0 and a sentence if
 * there is no such tensor. */
static int mft__tensor_layout(mft_context *ctx, mft_tensor *t, mft_dtype dtype, int ndim, const int64_t *shape, size_t *bytes)
{
    const int64_t most = sizeof(size_t) < 8 ? (int64_t)1 << 27 : (int64_t)1 << 56;      /* elements: bytes cannot overflow */
    int64_t n = 1;
    int     i;
    if (ndim < 0 || ndim > MFT_MAX_DIMS || (ndim && !shape)) {
        mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "a tensor has 0 to %d dimensions, not %d", MFT_MAX_DIMS, ndim);
        return 0;
    }
    t->dtype = dtype; t->ndim = ndim;
    for (i = ndim - 1; i >= 0; i--) {
        if (shape[i] < 1 || n > most / shape[i]) {
            mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "dimension %d of a tensor is %lld: too small or too large", i, (long long)shape[i]);
            return 0;
        }
        t->shape[i] = shape[i]; t->stride[i] = n;
        n *= shape[i];
    }
    if (mft__is_quantized(dtype) && (!ndim || shape[ndim - 1] % 32)) {
        mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "the last dimension of a %s tensor must be a multiple of 32", mft_dtype_name(dtype));
        return 0;
    }
    *bytes = mft_dtype_bytes(dtype, n);
    if (!*bytes) {
        mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%d is no dtype", (int)dtype);
        return 0;
    }
    return 1;
}

/* ---- step tensors ---- */

/* A step tensor's struct, without numbers. */
static mft_tensor *mft__tensor_struct(mft_context *ctx)
{
    mft__tensor *x = (mft__tensor *)mft__meta(ctx, sizeof *x);
    if (!x) return NULL;
    x->ctx = ctx;
    return &x->t;
}

/* A step tensor with uninitialised f32 numbers at the forward end; a single number is kept until
 * the step ends, so that a loss can be read after its backward pass. */
static mft_tensor *mft__tensor_step(mft_context *ctx, int ndim, const int64_t *shape)
{
    size_t      bytes;
    mft_tensor *t = mft__tensor_struct(ctx);
    if (!t || !mft__tensor_layout(ctx, t, MFT_F32, ndim, shape, &bytes)) return NULL;
    t->data = bytes == sizeof(float) ? mft__meta(ctx, bytes) : mft__low(ctx, bytes);
    return t->data ? t : NULL;
}

/* ---- held tensors ---- */
static void mft__tensor_destroy_object(void *self)
{
    mft__tensor *x = (mft__tensor *)(void *)((char *)self - offsetof(mft__tensor, object));
    mft_context *ctx = x->ctx;
    mft__object_remove(&x->object);
    if (x->t.grad && !x->view_of) mft_tensor_destroy(ctx, x->t.grad);
    if (x->kind == MFT__HELD_TENSOR) mft__free_as(ctx, x->use, x->t.data, x->bytes);
    mft__free(ctx, x, sizeof *x);
}

/* borrowed NULL: zeroed numbers of its own, counted as `use`. It belongs to whoever asked, not to the context's list. */
static mft_tensor *mft__tensor_held(mft_context *ctx, mft__use use, mft_dtype dtype, int ndim, const int64_t *shape, void *borrowed)
{
    mft__tensor *x = (mft__tensor *)mft__alloc_zero(ctx, sizeof *x);
    if (!x) return NULL;
    x->ctx = ctx; x->use = use;
    if (!mft__tensor_layout(ctx, &x->t, dtype, ndim, shape, &x->bytes)) { mft__free(ctx, x, sizeof *x); return NULL; }
    x->paged  = !borrowed && ctx->take_pages && use != MFT__OTHER && x->bytes >= MFT__PAGED_LEAST;
    x->kind   = borrowed || x->paged ? MFT__WRAPPED_TENSOR : MFT__HELD_TENSOR;
    x->t.data = borrowed ? borrowed : x->paged ? ctx->take_pages(ctx->state, x->bytes) : mft__alloc_as(ctx, use, x->bytes);
    if (!x->t.data) { mft__free(ctx, x, sizeof *x); return NULL; }
    /* a gradient is written before it is read; zeroing it here would touch memory that a plan only asks about */
    if (x->kind == MFT__HELD_TENSOR && use != MFT__GRADIENTS) memset(x->t.data, 0, x->bytes);
    return &x->t;
}

/* The same for an app, which may leave it to the context's destroy. */
static mft_tensor *mft__tensor_listed(mft_context *ctx, mft_tensor *t)
{
    if (t) mft__object_add(ctx, &mft__of(t)->object, mft__tensor_destroy_object);
    return t;
}

MFT_API mft_tensor *mft_tensor_create(mft_context *ctx, mft_lifetime life, mft_dtype dtype, int ndim, const int64_t *shape)
{
    size_t      bytes;
    mft_tensor *t;
    if (!ctx) return NULL;
    if (life == MFT_HELD) return mft__tensor_listed(ctx, mft__tensor_held(ctx, MFT__OTHER, dtype, ndim, shape, NULL));
    t = mft__tensor_struct(ctx);
    if (t && !mft__tensor_layout(ctx, t, dtype, ndim, shape, &bytes)) return mft__op_failed(ctx, MFT_ERR_INVALID_ARGUMENT);
    if (t) t->data = mft__low(ctx, bytes);
    if (!t || !t->data) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    if (MFT__RUNS(ctx)) memset(t->data, 0, bytes);
    return t;
}

MFT_API mft_tensor *mft_tensor_wrap(mft_context *ctx, mft_dtype dtype, int ndim, const int64_t *shape, void *borrowed)
{
    if (!ctx || !borrowed) return NULL;
    return mft__tensor_listed(ctx, mft__tensor_held(ctx, MFT__OTHER, dtype, ndim, shape, borrowed));
}

MFT_API void mft_tensor_destroy(mft_context *ctx, mft_tensor *t)
{
    if (!ctx || !t || mft__of(t)->kind == MFT__STEP_TENSOR) return;
    mft__tensor_destroy_object(&mft__of(t)->object);
}

/* ---- storage types ---- */
static float mft__bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static uint32_t mft__float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static float mft__bf16_to_float(uint16_t h) { return mft__bits_to_float((uint32_t)h << 16); }

static uint16_t mft__float_to_bf16(float f)                     /* nearest, ties to even; NaN stays NaN */
{
    uint32_t u = mft__float_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* The exponent is moved over by a product with 2^112, which puts subnormals right as well. */
static float mft__f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    float    f;
    if ((h & 0x7c00) == 0x7c00) return mft__bits_to_float(sign | 0x7f800000u | rest);
    f = mft__bits_to_float(rest) * 5.192296858534828e33f;
    return mft__bits_to_float(sign | mft__float_to_bits(f));
}

static uint16_t mft__float_to_f16(float f)                      /* nearest, ties to even; overflow to infinity */
{
    uint32_t u = mft__float_to_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000u) {                                      /* subnormal: the adder rounds at 2^-24 for us */
        float g = mft__bits_to_float(a) + 0.5f;
        return (uint16_t)(sign | (mft__float_to_bits(g) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((a + 0xfff + ((a >> 13) & 1) - 0x38000000u) >> 13));
}

/* dst = src as f32; n elements, for quantised types a multiple of 32. Integers become the nearest float. */
static void mft__to_float(float *dst, const void *src, mft_dtype dtype, int64_t n)
{
    int64_t i;
    int     k;
    switch (dtype) {
    case MFT_F32:  memcpy(dst, src, (size_t)n * 4); return;
    case MFT_F16:  for (i = 0; i < n; i++) dst[i] = mft__f16_to_float(((const uint16_t *)src)[i]); return;
    case MFT_BF16: for (i = 0; i < n; i++) dst[i] = mft__bf16_to_float(((const uint16_t *)src)[i]); return;
    case MFT_I32:  for (i = 0; i < n; i++) dst[i] = (float)((const int32_t *)src)[i]; return;
    case MFT_I64:  for (i = 0; i < n; i++) dst[i] = (float)((const int64_t *)src)[i]; return;
    case MFT_U8:   for (i = 0; i < n; i++) dst[i] = (float)((const uint8_t *)src)[i]; return;
    case MFT_Q8_0:
        for (i = 0; i < n / 32; i++) {
            const uint8_t *b = (const uint8_t *)src + i * 34;
            float scale = mft__f16_to_float((uint16_t)(b[0] | b[1] << 8));
            for (k = 0; k < 32; k++) dst[i * 32 + k] = scale * (float)(int8_t)b[2 + k];
        }
        return;
    case MFT_Q4_0:
        for (i = 0; i < n / 32; i++) {
            const uint8_t *b = (const uint8_t *)src + i * 18;
            float scale = mft__f16_to_float((uint16_t)(b[0] | b[1] << 8));
            for (k = 0; k < 16; k++) {
                dst[i * 32 + k]      = scale * (float)((b[2 + k] & 15) - 8);
                dst[i * 32 + 16 + k] = scale * (float)((b[2 + k] >> 4) - 8);
            }
        }
        return;
    }
}

/* 32 numbers as one block, rounded as ggml's reference does: q8_0 scales the greatest magnitude to 127; q4_0 the
 * number that has it to -8, which is one step more than 7. A block with NaN or infinity gets the scale NaN. */
static void mft__quantize_block(uint8_t *b, mft_dtype dtype, const float *x)
{
    float    most = 0, signed_most = 0, scale, inverse;
    int      k, finite = 1;
    uint16_t h;
    for (k = 0; k < 32; k++) {
        finite &= fabsf(x[k]) <= 3.4028235e38f;
        if (fabsf(x[k]) > most) { most = fabsf(x[k]); signed_most = x[k]; }
    }
    scale   = dtype == MFT_Q8_0 ? most / 127 : signed_most / -8;
    inverse = finite && scale != 0 ? 1 / scale : 0;
    h = finite ? mft__float_to_f16(scale) : 0x7e00;
    b[0] = (uint8_t)(h & 255); b[1] = (uint8_t)(h >> 8);
    if (dtype == MFT_Q8_0) {
        for (k = 0; k < 32; k++) b[2 + k] = finite ? (uint8_t)(int8_t)roundf(x[k] * inverse) : 1;
        return;
    }
    for (k = 0; k < 16; k++) {
        int low = finite ? (int)(x[k] * inverse + 8.5f) : 0, high = finite ? (int)(x[k + 16] * inverse + 8.5f) : 0;
        b[2 + k] = (uint8_t)((low < 15 ? low : 15) | (high < 15 ? high : 15) << 4);
    }
}

/* dst = src; for quantised types n is a multiple of 32 */
static void mft__from_float(void *dst, mft_dtype dtype, const float *src, int64_t n)
{
    int64_t i;
    if (mft__is_quantized(dtype))
        for (i = 0; i < n; i += 32) mft__quantize_block((uint8_t *)dst + mft_dtype_bytes(dtype, i), dtype, src + i);
    if (dtype == MFT_F32)  memcpy(dst, src, (size_t)n * 4);
    if (dtype == MFT_F16)  for (i = 0; i < n; i++) ((uint16_t *)dst)[i] = mft__float_to_f16(src[i]);
    if (dtype == MFT_BF16) for (i = 0; i < n; i++) ((uint16_t *)dst)[i] = mft__float_to_bf16(src[i]);
}

MFT_API float mft_tensor_item(const mft_tensor *t)
{
    float f;
    if (!t || !t->data || mft_tensor_numel(t) != 1 || mft__is_quantized(t->dtype)) return mft__bits_to_float(0x7fc00000u);
    mft__to_float(&f, t->data, t->dtype, 1);
    return f;
}

/* Walks the rows (last dimension) of a tensor: the offset in elements of row r. */
static int64_t mft__row_offset(const mft_tensor *t, int64_t r)
{
    int64_t at = 0;
    int     i;
    for (i = t->ndim - 2; i >= 0; i--) { at += r % t->shape[i] * t->stride[i]; r /= t->shape[i]; }
    return at;
}

MFT_API mft_status mft_tensor_copy(mft_context *ctx, mft_tensor *dst, const mft_tensor *src)
{
    mft__shape_text a, b;
    int64_t rows, cols, r, c, i;
    float   part[64];

    if (!ctx || !dst || !src || !dst->data || !src->data) return MFT_ERR_INVALID_ARGUMENT;
    if (!mft__same_shape(dst, src))
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_tensor_copy: %s into %s", mft__shape(src, &a), mft__shape(dst, &b));
    if (dst->dtype != src->dtype && (!mft__is_float(dst->dtype) || !(mft__is_float(src->dtype) || mft__is_quantized(src->dtype))))
        return mft__fail(ctx, MFT_ERR_UNSUPPORTED, "mft_tensor_copy: %s into %s", mft_dtype_name(src->dtype), mft_dtype_name(dst->dtype));
    if (dst->dtype == src->dtype && mft__is_contiguous(dst) && mft__is_contiguous(src)) {
        memmove(dst->data, src->data, mft_dtype_bytes(src->dtype, mft_tensor_numel(src)));
        return MFT_OK;
    }
    cols = src->ndim ? src->shape[src->ndim - 1] : 1;
    rows = mft_tensor_numel(src) / cols;
    for (r = 0; r < rows; r++) {
        int64_t so = mft__row_offset(src, r), ss = src->ndim ? src->stride[src->ndim - 1] : 1;
        int64_t d_o = mft__row_offset(dst, r), ds = dst->ndim ? dst->stride[dst->ndim - 1] : 1;
        size_t  dsize = mft_dtype_bytes(dst->dtype, 1);
        for (c = 0; c < cols; c += 64) {
            int64_t n = cols - c < 64 ? cols - c : 64;
            if (mft__is_quantized(src->dtype))                  /* contiguous, and whole blocks in a piece of 64 */
                mft__to_float(part, (const char *)src->data + mft_dtype_bytes(src->dtype, so + c), src->dtype, n);
            for (i = 0; i < n; i++) {
                const char *s = (const char *)src->data + mft_dtype_bytes(src->dtype, 1) * (size_t)(so + (c + i) * ss);
                char       *d = (char *)dst->data + dsize * (size_t)(d_o + (c + i) * ds);
                if (dst->dtype == src->dtype) { memcpy(d, s, dsize); continue; }
                if (!mft__is_quantized(src->dtype)) mft__to_float(&part[i], s, src->dtype, 1);
                mft__from_float(d, dst->dtype, &part[i], 1);
            }
        }
    }
    return MFT_OK;
}

/* ==============================================================================
 * MARK: - [RANDOM] Bits from counters: the same on every machine, in any order
 *
 *   Philox 2x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
 *   a key (seed) and a counter give 64 bits, without state.
 * ============================================================================== */
enum { MFT__ROUNDS = 10 };
static const uint32_t mft__philox_times = 0xd256d193u, mft__philox_key = 0x9e3779b9u;

/* 96 bits of input into a 64-bit counter and a 32-bit key: the stream is mixed into both. Returns what is xored
 * into the counter's upper half. */
MFT__UNUSED static uint32_t mft__random_key(uint64_t seed, uint64_t stream, uint32_t *key)
{
    uint64_t mixed = (stream + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u ^ seed * 0x94d049bb133111ebu;
    *key = (uint32_t)(mixed >> 32) ^ (uint32_t)seed;
    return (uint32_t)mixed;
}

/* One counter's bits; rows of [KERNEL] draw many at a time, the same ones. */
MFT__UNUSED static uint64_t mft__random(uint64_t seed, uint64_t stream, uint64_t counter)
{
    uint32_t key, x1 = mft__random_key(seed, stream, &key) ^ (uint32_t)(counter >> 32), x0 = (uint32_t)counter;
    int      round;
    for (round = 0; round < MFT__ROUNDS; round++, key += mft__philox_key) {
        uint64_t p = (uint64_t)mft__philox_times * x0;
        x0 = (uint32_t)(p >> 32) ^ key ^ x1;
        x1 = (uint32_t)p;
    }
    return (uint64_t)x1 << 32 | x0;
}

MFT__UNUSED static double mft__uniform(uint64_t bits) { return (double)(bits >> 11) * (1.0 / 9007199254740992.0); }   /* [0, 1) */

/* Two normals from one counter (Box and Muller 1958). */
MFT__UNUSED static void mft__normal_pair(uint64_t seed, uint64_t stream, uint64_t counter, float *a, float *b)
{
    double u = 1 - mft__uniform(mft__random(seed, stream, 2 * counter)), v = mft__uniform(mft__random(seed, stream, 2 * counter + 1));
    double r = sqrt(-2 * log(u));
    *a = (float)(r * cos(2 * MFT__PI * v));
    *b = (float)(r * sin(2 * MFT__PI * v));
}

/* ==============================================================================
 * MARK: - [KERNEL] The inner loops, once per instruction set
 *
 *   in    pointers and lengths; shapes are checked, memory is taken before
 *   out   numbers
 *   rule  a row is complete: where a set has nothing faster it names the portable function;
 *         the context points at a row, no global does. Rows may differ in the last bits;
 *         within a row the result does not depend on the number of threads.
 * ============================================================================== */
typedef enum mft__activation { MFT__GELU_TANH, MFT__GELU_ERF, MFT__SILU, MFT__RELU, MFT__TANH } mft__activation;

/* An operand where it lies: element (r, c) is r * row_stride + c * col_stride elements from data.
 * One of the strides is 1; a quantised one has col_stride 1 and rows of whole blocks. */
typedef struct mft__matrix { const void *data; mft_dtype dtype; int64_t row_stride, col_stride; } mft__matrix;

/* Constants of one AdamW update, see [OPTIMIZER]. */
typedef struct mft__adamw { float lr_over_c1, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, inv_sqrt_c2, grad_scale; } mft__adamw;

/* Codes of 8 bits for numbers relative to the greatest of their block, see [OPTIMIZER]. Decade d has first << d cells. */
typedef struct mft__code {
    float   value[256];                     /* of each code; signed: ascending, code 127 is 0        */
    float   edge[8];                        /* the least number nearer to decade d than to the one before (to 0); to 1 */
    float   cells[7];                       /* cells of decade d in a unit                           */
    int     first;
    int     is_signed;
} mft__code;

/* What else comes into a product on its way out:  scale a b,  a [m, k] f32 by rows, b [k, n] f32, k small. */
typedef struct mft__tail { mft__matrix a, b; int64_t k; float scale; } mft__tail;

/* One product as the rows see it: c[i, l] (swapped: c[l, i]) over the rows i of s, of which numbers are
 * read one by one, and the rows l of v, which are the lanes of vectors. Columns of both are k. */
typedef struct mft__gemm_job {
    const struct mft__gemm_row *row;
    mft__matrix  s, v;
    int64_t      s_count, v_begin, v_count, k;     /* v_begin: the block of lanes at hand      */
    int64_t      s_next, s_end, v_next, n_next;    /* where the worker's next task probably is: rows of s, lanes of v it packs; 0: none */
    int64_t      tasks, at_once;                   /* how many, and how many are worked on at the same time */
    int          s_terms, v_terms;                 /* bf16 terms of each number; floats: 1     */
    float        alpha;
    const float *bias;                             /* along n, the columns of c                */
    float       *c;
    int64_t      ldc;
    const float *plus;                             /* what is added, lying as c does; may be c; NULL: nothing */
    int          swapped;
    mft__tail    tail;                             /* k 0: none; rows of b end on whole vectors */
    float       *packed;                           /* the block of v in panels; of pairs, the shared side; or v in digits */
    int          shares_v;                         /* pairs: v is the side packed once for all tasks, else s   */
    int64_t      x_begin, x_count;                 /* pairs: rows or lanes of it at hand       */
    int64_t      kc;                               /* k of a block                             */
    char        *scratch;                          /* of worker w: scratch + w * scratch_bytes */
    size_t       scratch_bytes;
} mft__gemm_job;

/* Memory that will be needed soon: `rows` pieces of `bytes`, pitch apart, asked for a few lines at a time between
 * steps of k. All at once they would fill the core's few places for lines under way, and the products would wait. */
typedef struct mft__ahead { const char *p; int64_t bytes, pitch, rows, at; } mft__ahead;      /* at: bytes asked of this row */

/* Rows of numbers, f32 or bf16, to copy as floats meanwhile, each in `pieces` pieces. */
typedef struct mft__carry {
    const char *from;
    float      *to;
    mft_dtype   dtype;
    int64_t     rows, pieces, from_row, from_piece, to_row, to_piece;      /* steps: of `from` in bytes, of `to` in numbers */
} mft__carry;

/* A strip of s against the panels of v, over one block of k. Both are made of cells of 32 bits: a float,
 * or a pair of bf16 neighbours in k. */
typedef struct mft__gemm_strip {
    int64_t      h, lanes, cells;
    float       *tile;                             /* [h][ld] sums, added to if `add`          */
    int64_t      ld;
    int          add;
    int64_t      s_step;                           /* 0: s is [row][MFT__STRIDE]; else [k][s_step]; not of tiled strips */
    const float *s, *v;
    int64_t      s_term, s_strip, v_panel;         /* from a term of s, a strip, a panel of v to the next */
    int          s_terms, v_terms;
    mft__ahead   ahead[2];                         /* memory to ask for meanwhile              */
    mft__carry   carry;                            /* numbers to copy meanwhile                */
    const char  *raw;                              /* of floats: v where it lies, to be packed to v on the way; or NULL */
    mft_dtype    raw_dtype;                        /* f32 or bf16                              */
    int64_t      raw_step;                         /* bytes from one k to the next             */
} mft__gemm_strip;

/* 32 numbers of two lanes as bytes, step[lane] times (d[0] + d[1] / 254 + d[2] / 254^2), eight of one lane, eight of the other, and so on:
 * see mft__digits. The pair that has no such form is zeros, its first step NaN. */
typedef struct mft__digit_pair { int8_t d[3][4][2][8]; float step[4]; } mft__digit_pair;

enum { MFT__KC      = 256,                         /* k goes in blocks, at most so large: a strip of s stays in the first cache */
       MFT__STRIDE  = MFT__KC + 16,                /* no power of two: rows of a strip share no cache set */
       MFT__TILE_ROWS = 32,                        /* tiles have room for a multiple: the tallest strip writes whole */
       MFT__FEW     = 16,                          /* so few rows are not worth packing for    */
       MFT__DIGIT_PAIRS = 8,                       /* of lanes in digits, block by block       */
       MFT__FEW_SUMS = 4, MFT__SUMS_LANES = 512,
       MFT__SCALES  = 16,                          /* of quantised blocks, converted at a time */
       MFT__DRAWS   = 256,                         /* random numbers of 32 bits at a time      */
       MFT__ASK_STEPS = 16,                        /* steps of k between two askings ahead     */
       MFT__COLUMN_PANELS = 12,                    /* that a task packs for itself             */
       MFT__GROUP   = 4,                           /* strips copied together where rows of s lie side by side: whole lines */
       MFT__PAIRS_LEAST = 32, MFT__PAIRS_MOST = 256,   /* rows and lanes worth pairs; of the shared side at a time */
       MFT__PAIRS_BYTES = 3 << 19,                 /* of it packed: most of the second cache   */
       MFT__PAIRS_TASK = 256,                      /* rows or lanes of the other side that a task takes */
       MFT__NEAR    = 1 << 18,                     /* so many packed numbers stay in the second cache */
       MFT__BESIDE  = MFT__NEAR / 2,               /* a block of k packed, or a task's tile: both stay there */
       MFT__PACKED  = 3 << 19,                     /* numbers packed at a time, at most: memory */
       MFT__SEEN_TILE = 64,                        /* rows of attention's other side at a time: copied, STRIDE apart */
       MFT__COPY    = MFT__SEEN_TILE * MFT__STRIDE };

typedef struct mft__gemm_row {
    int       height, lanes, width;                /* rows of a strip, lanes of a panel, of a vector */
    int       k_step;                              /* cells are floats: 1; else pairs, and k is filled up to a multiple */
    int       tiled;                               /* strips are [16 cells][row][cell], as tile registers load them, and
                                                      the function takes many at once          */
    int       max_products;                        /* of bf16 terms, for which this is faster than floats; 0: one term only */
    void    (*strip)(const mft__gemm_strip *x);
    mft__task pack, tiles, columns, dots, sums, thin;      /* of a mft__gemm_job, see mft__gemm; pairs have no columns */
    mft__task digits;                              /* NULL, or packs pairs of lanes: then dots multiplies any number of
                                                      them by quantised rows faster than tiles do */
} mft__gemm_row;

/* Copies what a strip is to ask for; returns how many lines each time, if there are so many times. */
MFT__UNUSED static int64_t mft__lines(const mft__gemm_strip *x, mft__ahead *a, int64_t times)
{
    memcpy(a, x->ahead, sizeof x->ahead);
    return (a[0].rows * ((a[0].bytes + 63) / 64) + a[1].rows * ((a[1].bytes + 63) / 64) + times - 1) / times;
}

MFT__UNUSED static inline void mft__ask(mft__ahead *a, int64_t lines)
{
    for (; lines > 0; lines--) {
        if (!a->rows) { a[0] = a[1]; a[1].rows = 0; }
        if (!a->rows) return;
        __builtin_prefetch(a->p + a->at, 0, 2);
        a->at += 64;
        if (a->at >= a->bytes) { a->at = 0; a->p += a->pitch; a->rows--; }
    }
}

/* Numbers [B, T, heads, D] where they lie; D side by side. */
typedef struct mft__heads { float *p; int64_t batch, token, head; } mft__heads;

/* Attention as the rows see it. What one key head serves is a list of rows (query, head of its group):
 * row r is query r / G. See mft_attention in [OPS]. */
typedef struct mft__attention_job {
    void       (*strip)(const mft__gemm_strip *x);
    mft__heads q, k, v, out, dout, dq, dk, dv;
    float     *lse, *delta;                        /* [B, heads, T]                            */
    int64_t    B, T, S, D, G, n_kv_head;
    float      scale, softcap;
    int64_t    window;
    const int32_t *first_key;
    int        add_q, add_k, add_v;
    int64_t    blocks;                             /* of a key head: the task's range is B * n_kv_head * blocks */
    char      *scratch;                            /* of worker w: scratch + w * scratch_bytes */
    size_t     scratch_bytes;
} mft__attention_job;

enum { MFT__ATT_PANELS = 2, MFT__MAX_HEAD_DIM = 512 };    /* panels of lanes in a block: what is copied for one serves both */

MFT__UNUSED static int mft__min_int(int a, int b) { return a < b ? a : b; }
static int64_t mft__round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
/* n in whole units, cut into so many parts, as even as can be: where the i-th begins. */
static int64_t mft__gemm_cut(int64_t n, int64_t unit, int64_t i, int64_t parts) { return mft__min(n, ((n - 1) / unit + 1) * i / parts * unit); }
/* One number of c on its way out, the sum of row `row` and lane `lane`: see mft__gemm_tailed. */
MFT__UNUSED static inline void mft__gemm_put(const mft__gemm_job *g, int64_t row, int64_t lane, float sum)
{
    float *c = g->c + (g->swapped ? lane * g->ldc + row : row * g->ldc + lane), y = g->alpha * sum;
    if (g->plus) y += g->plus[c - g->c];
    if (g->bias) y += g->bias[g->swapped ? row : lane];
    *c = y;
}
/* Strips of s that are copied together, while those before them are multiplied; pairs are made when they are needed. */
static int64_t mft__gemm_group(const mft__gemm_job *g)  { return g->s.col_stride != 1 ? MFT__GROUP : 1; }
static int64_t mft__gemm_strips(const mft__gemm_job *g) { return 2 * mft__gemm_group(g); }
MFT__UNUSED static int64_t mft__gemm_cells(const mft__gemm_row *row, int64_t kc) { return mft__round_up(kc, row->k_step) / 2; }      /* of pairs */

/* Cells from one packed strip (panel, if of_v) of a block of k to the next; the last block of k has the same room. */
static int64_t mft__pairs_piece(const mft__gemm_job *g, int of_v)
{
    const mft__gemm_row *row = g->row;
    if (of_v) return g->v_terms * row->lanes * g->kc / 2;
    return g->s_terms * row->height * (row->tiled ? g->kc / 2 : (int64_t)MFT__STRIDE);
}

/* The keys query t of sequence b sees: [*first, *end). */
static void mft__visible(const mft__attention_job *a, int64_t b, int64_t t, int32_t *first, int32_t *end)
{
    int64_t last = t + a->S - a->T, from = a->first_key ? a->first_key[b * a->T + t] : 0;
    if (a->window > 0 && last - a->window + 1 > from) from = last - a->window + 1;
    *end   = (int32_t)(last + 1);
    *first = (int32_t)(from < 0 ? 0 : mft__min(from, last + 1));
}

static float *mft__head(const mft__heads *x, int64_t G, int64_t b, int64_t kv, int64_t r)
{
    return x->p + b * x->batch + r / G * x->token + (kv * G + r % G) * x->head;
}

typedef struct mft__kernels {
    const char *name;
    int    (*usable)(void);
    /* storage */
    void   (*to_float)  (float *dst, const void *src, mft_dtype dtype, int64_t n);
    void   (*from_float)(void *dst, mft_dtype dtype, const float *src, int64_t n);
    /* vectors */
    float  (*dot)        (const float *a, const float *b, int64_t n);
    void   (*axpy)       (float *y, float alpha, const float *x, int64_t n);                 /* y += alpha x     */
    void   (*add)        (float *y, const float *a, const float *b, int64_t n);              /* y = a + b        */
    void   (*mul)        (float *y, const float *a, const float *b, int64_t n);              /* y = a b          */
    void   (*mul_add)    (float *y, const float *a, const float *b, int64_t n);              /* y += a b         */
    void   (*scale)      (float *y, float s, const float *x, int64_t n);                     /* y = s x          */
    double (*sum)        (const float *x, int64_t n);                                        /* in double        */
    double (*sum_squares)(const float *x, int64_t n);                                        /* in double        */
    float  (*max)        (const float *x, int64_t n);                                        /* NaN if any is    */
    float  (*exp_sum)    (float *y, const float *x, float shift, int64_t n);                 /* y = exp(x - shift), returns sum y; y may be x */
    /* activations */
    void   (*act)          (mft__activation f, float *y, const float *x, int64_t n);                       /* y = f(x)         */
    void   (*act_backward) (mft__activation f, float *dx, const float *dy, const float *x, int64_t n, int add);        /* dx (+)= dy f'(x)   */
    void   (*gate)         (mft__activation f, float *y, const float *g, const float *u, int64_t n);       /* y = f(g) u       */
    void   (*gate_backward)(mft__activation f, float *dg, float *du, const float *dy,                      /* either may be NULL */
                            const float *g, const float *u, int64_t n, int add_g, int add_u);              /* dg (+)= dy u f'(g), du (+)= dy f(g) */
    /* one row of a norm; backward adds into dw and db, into dx if `add`; dx dw db may be NULL */
    float  (*rms_norm)           (float *y, const float *x, const float *w, float offset, float eps, int64_t n);       /* returns r */
    void   (*rms_norm_backward)  (float *dx, float *dw, const float *dy, const float *x, const float *w, float offset, float r, int64_t n, int add);
    float  (*layer_norm)         (float *y, const float *x, const float *w, const float *b, float eps, int64_t n, float *out_mean);  /* returns r */
    void   (*layer_norm_backward)(float *dx, float *dw, float *db, const float *dy, const float *x, const float *w, float mean, float r, int64_t n, int add);
    /* y[i] = x[i] c[i] - x[i+h] s[i],  y[i+h] = x[i+h] c[i] + x[i] s[i];  add: y += ; y may be x when add is 0 */
    void   (*cos_sin)    (float *c, float *s, const float *x, int64_t n);
    void   (*rope)       (float *y, const float *x, const float *c, const float *s, int64_t h, int add);
    void   (*adamw)      (float *p, float *m, float *v, const float *g, int64_t n, const mft__adamw *k);
    /* random draws are those of mft__random, by the number of an element in the whole: first, first + 1 .. */
    void   (*dropout)       (float *y, const float *x, float p, uint64_t seed, uint64_t stream, int64_t first, int64_t n, int add);      /* y (+)= x keep / (1 - p) */
    void   (*bf16_by_chance)(uint16_t *dst, const float *src, uint64_t seed, uint64_t stream, int64_t first, int64_t n);
    void   (*code_pack)     (const mft__code *c, uint8_t *codes, float *scale, const float *x, int64_t n);
    mft__task attention, attention_dq, attention_dkv;      /* of a mft__attention_job             */
    const mft__gemm_row *gemm[2];                          /* by precision; [1] may be [0]        */
    const mft__gemm_row *split;                            /* f32 of several bf16 terms, or NULL  */
    int cblas;                                             /* products go to cblas_sgemm          */
} mft__kernels;

/* ---- the vocabulary of each row; the bodies, and what the words mean, stand in [ROWS] ---- */
#if defined(__FAST_MATH__)
#  error "mft tells NaN and infinity from numbers: compile this file without -ffast-math"
#endif
#if defined(__clang__)
#  define MFT__UNROLL _Pragma("clang loop unroll(full)")
#else
#  define MFT__UNROLL _Pragma("GCC unroll 16")
#endif
#ifndef MFT_SELF
#  define MFT_SELF "mft.h"                  /* this file's name, if it was given another */
#endif
#if !defined(MFT_NO_SIMD) && defined(__x86_64__)
#  include <immintrin.h>
#  define MFT__HAVE_AVX2
#  if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 9)
#    define MFT__HAVE_AVX512
#  endif
#  if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10)
#    define MFT__HAVE_AVX512BF16
#  endif
#  if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#    include <cpuid.h>
#    define MFT__HAVE_AMX
#  endif
#endif
#if !defined(MFT_NO_SIMD) && defined(__aarch64__)
#  include <arm_neon.h>
#  define MFT__HAVE_NEON
#  if defined(__clang__) && __clang_major__ >= 12
#    define MFT__HAVE_NEON_BF16
#    define MFT__NEON_BF16_TARGET __attribute__((target("bf16")))
#    define MFT__NEON_BF16_ASM
#    define MFT__HAVE_NEON_DOT
#    define MFT__NEON_DOT_TARGET __attribute__((target("dotprod")))
#    define MFT__NEON_I8MM_TARGET __attribute__((target("i8mm")))
#  elif !defined(__clang__) && __GNUC__ >= 10
#    define MFT__HAVE_NEON_BF16
#    define MFT__NEON_BF16_TARGET
#    define MFT__NEON_BF16_ASM ".arch_extension bf16\n\t"
#    define MFT__HAVE_NEON_DOT
#    define MFT__NEON_DOT_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#    define MFT__NEON_I8MM_TARGET __attribute__((target("arch=armv8.2-a+i8mm")))
#  endif
#  if defined(__linux__)
#    include <sys/auxv.h>
#  elif defined(__APPLE__)
#    include <sys/sysctl.h>
#  endif
#endif
#define MFT__GLUE_(a, b) a##b
#define MFT__GLUE(a, b)  MFT__GLUE_(a, b)

/* Any machine: four lanes, which the compiler spells in SSE2, NEON or single numbers. */
typedef float   mft__v_portable __attribute__((vector_size(16)));
typedef int32_t mft__i_portable __attribute__((vector_size(16)));
typedef double  mft__d_portable __attribute__((vector_size(16)));
typedef float   mft__f_portable __attribute__((vector_size(8)));

MFT__UNUSED static mft__v_portable mft__load_portable(const float *p) { mft__v_portable v; memcpy(&v, p, sizeof v); return v; }
MFT__UNUSED static void            mft__store_portable(float *p, mft__v_portable v) { memcpy(p, &v, sizeof v); }
MFT__UNUSED static mft__v_portable mft__set1_portable(float x) { mft__v_portable v = { x, x, x, x }; return v; }
MFT__UNUSED static mft__v_portable mft__sqrt_portable(mft__v_portable v)
{
    mft__v_portable r = { sqrtf(v[0]), sqrtf(v[1]), sqrtf(v[2]), sqrtf(v[3]) };
    return r;
}
MFT__UNUSED static mft__v_portable mft__least_portable(mft__v_portable a, mft__v_portable b)
{
    mft__i_portable less = a < b;
    return (mft__v_portable)(((mft__i_portable)a & less) | ((mft__i_portable)b & ~less));
}
MFT__UNUSED static mft__v_portable mft__most_portable(mft__v_portable a, mft__v_portable b)
{
    mft__i_portable more = a > b;
    return (mft__v_portable)(((mft__i_portable)a & more) | ((mft__i_portable)b & ~more));
}
MFT__UNUSED static mft__d_portable mft__to_double_portable(mft__v_portable v, int half)
{
    mft__f_portable h[2];
    memcpy(h, &v, sizeof h);
    return __builtin_convertvector(h[half], mft__d_portable);
}
MFT__UNUSED static mft__v_portable mft__zip_lo_portable(mft__v_portable a, mft__v_portable b) { mft__v_portable r = { a[0], b[0], a[1], b[1] }; return r; }
MFT__UNUSED static mft__v_portable mft__zip_hi_portable(mft__v_portable a, mft__v_portable b) { mft__v_portable r = { a[2], b[2], a[3], b[3] }; return r; }
MFT__UNUSED static mft__v_portable mft__load_f16_portable(const uint16_t *p)
{
    mft__v_portable r = { mft__f16_to_float(p[0]), mft__f16_to_float(p[1]), mft__f16_to_float(p[2]), mft__f16_to_float(p[3]) };
    return r;
}
MFT__UNUSED static mft__v_portable mft__load_bf16_portable(const uint16_t *p)
{
    mft__v_portable r;
    uint32_t        u[4];
    int             i;
    for (i = 0; i < 4; i++) u[i] = (uint32_t)p[i] << 16;
    memcpy(&r, u, sizeof r);
    return r;
}
MFT__UNUSED static void mft__load_q8_portable(mft__v_portable *q, const uint8_t *p) { int i; for (i = 0; i < 32; i++) q[i / 4][i % 4] = (float)(int8_t)p[i]; }
MFT__UNUSED static void mft__load_q4_portable(mft__v_portable *q, const uint8_t *p)
{
    int i;
    for (i = 0; i < 16; i++) { q[i / 4][i % 4] = (float)((p[i] & 15) - 8); q[4 + i / 4][i % 4] = (float)((p[i] >> 4) - 8); }
}
static int mft__usable_always(void) { return 1; }

#define MFT__ROW                portable
#define MFT__TARGET
#define MFT__V                  mft__v_portable
#define MFT__W                  4
#define MFT__H                  6           /* 6 x 2 sums, 2 vectors and a number: 15 of 16 registers */
#define MFT__P                  2
#define MFT__LOAD(p)            mft__load_portable(p)
#define MFT__STORE(p, v)        mft__store_portable(p, v)
#define MFT__SET1(x)            mft__set1_portable(x)
#define MFT__FMA(a, b, c)       ((a) * (b) + (c))
#define MFT__SQRT(v)            mft__sqrt_portable(v)
#define MFT__MIN(a, b)          mft__least_portable(a, b)
#define MFT__MAX(a, b)          mft__most_portable(a, b)
#define MFT__WIDE_LO(v)         mft__to_double_portable(v, 0)
#define MFT__WIDE_HI(v)         mft__to_double_portable(v, 1)
#define MFT__MUL_LOW(a, b)      (((a) & 0xffffffffu) * ((b) & 0xffffffffu))
#define MFT__ZIP_LO(a, b)       mft__zip_lo_portable(a, b)
#define MFT__ZIP_HI(a, b)       mft__zip_hi_portable(a, b)
#define MFT__LOAD_F16(p)        mft__load_f16_portable(p)
#define MFT__LOAD_BF16(p)       mft__load_bf16_portable(p)
#define MFT__LOAD_Q8            mft__load_q8_portable
#define MFT__LOAD_Q4            mft__load_q4_portable
#define MFT__STORE_F16(p, v)    mft__store_f16_portable(p, v)
MFT__UNUSED static void mft__store_f16_portable(uint16_t *p, mft__v_portable v) { int i; for (i = 0; i < 4; i++) p[i] = mft__float_to_f16(v[i]); }
#include MFT_SELF

#ifdef MFT__HAVE_AVX2
/* f16c, which not every compiler can ask for, is older than avx2 and in every processor that has it */
static int mft__usable_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

MFT__UNUSED __attribute__((target("avx2"), always_inline)) static inline void mft__load_q8_avx2(__m256 *q, const uint8_t *p)
{
    int j;
    MFT__UNROLL
    for (j = 0; j < 4; j++) q[j] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p + 8 * j))));
}
MFT__UNUSED __attribute__((target("avx2"), always_inline)) static inline void mft__load_q4_avx2(__m256 *q, const uint8_t *p)
{
    __m128i b = _mm_loadu_si128((const __m128i *)(const void *)p), low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    __m128i c = _mm_sub_epi8(_mm_and_si128(b, low), eight), d = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(b, 4), low), eight);
    q[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(c)); q[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(c, 8)));
    q[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(d)); q[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(d, 8)));
}
/* AVX2 unpacks within halves: the halves are put in order after. */
#define MFT__ROW                avx2
#define MFT__TARGET             __attribute__((target("avx2,fma,f16c")))
#define MFT__V                  __m256
#define MFT__W                  8
#define MFT__H                  6           /* as portable: 12 sums keep two FMA units busy at 4 to 5 cycles each */
#define MFT__P                  2
#define MFT__LOAD(p)            _mm256_loadu_ps(p)
#define MFT__STORE(p, v)        _mm256_storeu_ps(p, v)
#define MFT__SET1(x)            _mm256_set1_ps(x)
#define MFT__FMA(a, b, c)       _mm256_fmadd_ps(a, b, c)
#define MFT__SQRT(v)            _mm256_sqrt_ps(v)
#define MFT__MIN(a, b)          _mm256_min_ps(a, b)
#define MFT__MAX(a, b)          _mm256_max_ps(a, b)
#define MFT__WIDE_LO(v)         _mm256_cvtps_pd(_mm256_castps256_ps128(v))
#define MFT__WIDE_HI(v)         _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))
#define MFT__MUL_LOW(a, b)      _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#define MFT__ZIP_LO(a, b)       _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20)
#define MFT__ZIP_HI(a, b)       _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31)
#define MFT__LOAD_F16(p)        _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define MFT__LOAD_BF16(p)       ((__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))), 16))
#define MFT__LOAD_Q8            mft__load_q8_avx2
#define MFT__LOAD_Q4            mft__load_q4_avx2
#define MFT__STORE_F16(p, v)    _mm_storeu_si128((__m128i *)(void *)(p), _mm256_cvtps_ph(v, 0))
#include MFT_SELF
#endif

#ifdef MFT__HAVE_AVX512
static int mft__usable_avx512(void)
{
    return mft__usable_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
MFT__UNUSED __attribute__((target("avx512f"), always_inline)) static inline void mft__load_q8_avx512(__m512 *q, const uint8_t *p)
{
    q[0] = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i *)(const void *)p)));
    q[1] = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i *)(const void *)(p + 16))));
}
/* The permutation looks at 4 bits of an index: one instruction makes a float of a nibble. */
MFT__UNUSED __attribute__((target("avx512f"), always_inline)) static inline void mft__load_q4_avx512(__m512 *q, const uint8_t *p)
{
    __m512  table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i k = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i *)(const void *)p));
    q[0] = _mm512_maskz_permutexvar_ps(0xffff, k, table);
    q[1] = _mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srli_epi32(0xffff, k, 4), table);
}
#define MFT__ROW                avx512
#define MFT__TARGET             __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define MFT__V                  __m512
#define MFT__W                  16
#define MFT__H                  12          /* 24 sums, 2 vectors and a number: 27 of 32 registers */
#define MFT__P                  2
#define MFT__LOAD(p)            _mm512_loadu_ps(p)
#define MFT__STORE(p, v)        _mm512_storeu_ps(p, v)
#define MFT__SET1(x)            _mm512_set1_ps(x)
#define MFT__FMA(a, b, c)       _mm512_fmadd_ps(a, b, c)
#define MFT__SQRT(v)            _mm512_maskz_sqrt_ps(0xffff, v)       /* maskz: gcc 12 warns of the plain ones' undefined operand */
#define MFT__MIN(a, b)          _mm512_maskz_min_ps(0xffff, a, b)
#define MFT__MAX(a, b)          _mm512_maskz_max_ps(0xffff, a, b)
#define MFT__TIMES_2_TO(q, n)   _mm512_maskz_scalef_ps(0xffff, q, n)
#define MFT__WIDE_LO(v)         _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, v, 0))
#define MFT__WIDE_HI(v)         _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, v, 1))
#define MFT__MUL_LOW(a, b)      _mm512_maskz_mul_epu32(0xff, (__m512i)(a), (__m512i)(b))
#define MFT__ZIP_LO(a, b)       _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b)
#define MFT__ZIP_HI(a, b)       _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b)
#define MFT__UNZIP_LO(a, b)     _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b)
#define MFT__UNZIP_HI(a, b)     _mm512_permutex2var_ps(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b)
#define MFT__LOAD_F16(p)        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *)(const void *)(p)))
#define MFT__STORE_F16(p, v)    _mm256_storeu_si256((__m256i *)(void *)(p), _mm512_maskz_cvtps_ph(0xffff, v, 0))
#define MFT__LOAD_BF16(p)       ((__m512)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i *)(const void *)(p))), 16))
#define MFT__LOAD_Q8            mft__load_q8_avx512
#define MFT__LOAD_Q4            mft__load_q4_avx512
#ifdef MFT__HAVE_AVX512BF16
#  ifdef MFT__DPBF16                         /* a test without the hardware puts a function in its place */
static int mft__usable_avx512bf16(void) { return mft__usable_avx512(); }
#  else
static int mft__usable_avx512bf16(void) { return mft__usable_avx512() && __builtin_cpu_supports("avx512bf16"); }
#    define MFT__DPBF16(c, a, b) _mm512_dpbf16_ps(c, (__m512bh)(a), (__m512bh)(b))
#  endif
#define MFT__STRIP_ONLY
#define MFT__STRIP_FLOATS       0
#define MFT__STRIP              mft__strip_avx512bf16
#define MFT__STRIP_TARGET       __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define MFT__STEP(x, b, c)      MFT__DPBF16(c, x, b)
#include MFT_SELF
#endif
#include MFT_SELF
#endif

#ifdef MFT__HAVE_NEON                       /* part of every arm64 */
MFT__UNUSED static inline void mft__load_16_neon(float32x4_t *q, int8x16_t b)
{
    int16x8_t lo = vmovl_s8(vget_low_s8(b)), hi = vmovl_s8(vget_high_s8(b));
    q[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(lo))); q[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(lo)));
    q[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(hi))); q[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(hi)));
}
MFT__UNUSED static inline void mft__load_q8_neon(float32x4_t *q, const uint8_t *p)
{
    mft__load_16_neon(q,     vreinterpretq_s8_u8(vld1q_u8(p)));
    mft__load_16_neon(q + 4, vreinterpretq_s8_u8(vld1q_u8(p + 16)));
}
MFT__UNUSED static inline void mft__load_q4_neon(float32x4_t *q, const uint8_t *p)
{
    uint8x16_t b = vld1q_u8(p);
    mft__load_16_neon(q,     vsubq_s8(vreinterpretq_s8_u8(vandq_u8(b, vdupq_n_u8(15))), vdupq_n_s8(8)));
    mft__load_16_neon(q + 4, vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(b, 4)), vdupq_n_s8(8)));
}
#define MFT__ROW                neon
#define MFT__TARGET
#define MFT__V                  float32x4_t
#define MFT__W                  4
#define MFT__H                  6           /* 24 sums, 4 vectors and a number: 29 of 32 registers */
#define MFT__P                  4
#define MFT__LOAD(p)            vld1q_f32(p)
#define MFT__STORE(p, v)        vst1q_f32(p, v)
#define MFT__SET1(x)            vdupq_n_f32(x)
#define MFT__FMA(a, b, c)       vfmaq_f32(c, a, b)
#define MFT__SQRT(v)            vsqrtq_f32(v)
#define MFT__MIN(a, b)          vminq_f32(a, b)
#define MFT__MAX(a, b)          vmaxq_f32(a, b)
#define MFT__WIDE_LO(v)         vcvt_f64_f32(vget_low_f32(v))
#define MFT__WIDE_HI(v)         vcvt_high_f64_f32(v)
#define MFT__MUL_LOW(a, b)      vmull_u32(vmovn_u64((uint64x2_t)(a)), vmovn_u64((uint64x2_t)(b)))
#define MFT__ZIP_LO(a, b)       vzip1q_f32(a, b)
#define MFT__ZIP_HI(a, b)       vzip2q_f32(a, b)
#define MFT__UNZIP_LO(a, b)     vuzp1q_f32(a, b)
#define MFT__UNZIP_HI(a, b)     vuzp2q_f32(a, b)
#define MFT__LOAD_F16(p)        vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define MFT__LOAD_BF16(p)       vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))
#define MFT__LOAD_Q8            mft__load_q8_neon
#define MFT__LOAD_Q4            mft__load_q4_neon
#define MFT__STORE_F16(p, v)    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)))
#include MFT_SELF
#endif

/* ---- strips of bf16 terms on matrix units ---- */

#ifdef MFT__HAVE_AMX
/* Asks Linux for the tile registers (arch_prctl, by number: no header has it on older systems); granted
 * once, it holds for all threads of the process. */
static int mft__usable_amx(void)
{
#if defined(MFT__AMX_STAND_IN)
    return mft__usable_avx512();
#elif defined(__linux__)
    unsigned a, b, c, d;
    long     r = 158;                                           /* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) */
    if (!mft__usable_avx512()) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;      /* amx-bf16, amx-tile */
    __asm__ __volatile__("syscall" : "+a"(r) : "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
    return r == 0;
#else
    return 0;
#endif
}

/* The seven instructions used; a test without the hardware puts functions in their place. */
#ifndef MFT__AMX_STAND_IN
#  define MFT__TILE_CONFIG(c)         _tile_loadconfig(c)
#  define MFT__TILE_RELEASE()         _tile_release()
#  define MFT__TILE_ZERO(t)           _tile_zero(t)
#  define MFT__TILE_LOAD(t, p, pitch) _tile_loadd(t, p, pitch)
#  define MFT__TILE_STORE(t, p, pitch) _tile_stored(t, p, pitch)
#  define MFT__TILE_BF16(c, a, b)     _tile_dpbf16ps(c, a, b)
#  define MFT__AMX_TARGET             __attribute__((target("amx-tile,amx-bf16")))
#endif

/* tile (+)= one strip times one panel: 32 rows x 32 lanes of sums in tiles 0 to 3; 16 x 32 numbers of s in 4 and 5, of v
 * in 6 and 7. Each pair of loads feeds two products, and what has one term stays. Of three terms by three only those
 * that matter in f32 are taken: i + j < 3. */
MFT__AMX_TARGET static void mft__square_amx(const mft__gemm_strip *x, const float *s, const float *v, float *t, int low, int right, mft__ahead *ahead, int64_t ask)
{
    int64_t p, pitch = x->ld * 4, down = 16 * x->ld;
    int     i, j, n = x->s_terms > x->v_terms ? x->s_terms : x->v_terms;
    if (x->add) {
        MFT__TILE_LOAD(0, t, pitch);
        if (right)        MFT__TILE_LOAD(1, t + 16, pitch);
        if (low)          MFT__TILE_LOAD(2, t + down, pitch);
        if (low && right) MFT__TILE_LOAD(3, t + down + 16, pitch);
    } else { MFT__TILE_ZERO(0); MFT__TILE_ZERO(1); MFT__TILE_ZERO(2); MFT__TILE_ZERO(3); }
    for (p = 0; p < x->cells; p += 16, s += 512, v += 512) for (mft__ask(ahead, ask), j = x->v_terms - 1; j >= 0; j--) {
        const float *b = v + j * x->cells * 32;
        MFT__TILE_LOAD(6, b, 128);
        if (right) MFT__TILE_LOAD(7, b + 16, 128);
        for (i = mft__min_int(x->s_terms, n - j) - 1; i >= 0; i--) {            /* small terms first */
            const float *a = s + i * x->s_term;
            if (x->s_terms > 1 || j == x->v_terms - 1) {
                MFT__TILE_LOAD(4, a, 64);
                if (low) MFT__TILE_LOAD(5, a + 256, 64);
            }
            MFT__TILE_BF16(0, 4, 6);
            if (right)        MFT__TILE_BF16(1, 4, 7);
            if (low)          MFT__TILE_BF16(2, 5, 6);
            if (low && right) MFT__TILE_BF16(3, 5, 7);
        }
    }
    MFT__TILE_STORE(0, t, pitch);
    if (right)        MFT__TILE_STORE(1, t + 16, pitch);
    if (low)          MFT__TILE_STORE(2, t + down, pitch);
    if (low && right) MFT__TILE_STORE(3, t + down + 16, pitch);
}

/* Strips against panels. A block of the side with three terms (24 KB) stays in the first cache while the other passes
 * by: of 192 cycles that a step's twelve products take, its loads from the second cache are 2 KB. */
MFT__AMX_TARGET static void mft__strip_amx(const mft__gemm_strip *x)
{
    struct { uint8_t palette, start, none[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config;
    mft__ahead ahead[2];
    int64_t strips = (x->h + 31) / 32, panels = (x->lanes + 31) / 32, i, n = strips * panels, ask = mft__lines(x, ahead, n * (x->cells / 16));
    int     by_strip = x->s_terms >= x->v_terms;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (i = 0; i < 8; i++) { config.row_bytes[i] = 64; config.rows[i] = 16; }
    __asm__ __volatile__("" : : "r"(&config) : "memory");        /* gcc's intrinsics do not say what memory they read .. */
    MFT__TILE_CONFIG(&config);
    for (i = 0; i < n; i++) {
        int64_t r = by_strip ? i / panels : i % strips, q = by_strip ? i % panels : i / strips;
        mft__square_amx(x, x->s + r * x->s_strip, x->v + q * x->v_panel, x->tile + r * 32 * x->ld + q * 32,
                        x->h - r * 32 > 16, x->lanes - q * 32 > 16, ahead, ask);
    }
    MFT__TILE_RELEASE();
    __asm__ __volatile__("" : : : "memory");                      /* .. and write */
}
#endif

#if defined(MFT__HAVE_NEON_BF16) || defined(MFT__HAVE_NEON_DOT)
/* What the processor has, as the system tells: a bit of Linux's auxiliary vector, a name of Apple's sysctl. */
static int mft__arm_has(unsigned long type, int bit, const char *name)
{
#if defined(__linux__)
    (void)name;
    return (getauxval(type) >> bit & 1) != 0;
#elif defined(__APPLE__)
    int    has = 0;
    size_t bytes = sizeof has;
    (void)type; (void)bit;
    return sysctlbyname(name, &has, &bytes, NULL, 0) == 0 && has;
#else
    (void)type; (void)bit; (void)name;
    return 0;
#endif
}
#endif

#ifdef MFT__HAVE_NEON_BF16
static int mft__usable_neon_bf16(void) { return mft__arm_has(26, 14, "hw.optional.arm.FEAT_BF16"); }        /* AT_HWCAP2, HWCAP2_BF16 */

/* c (2 x 2) += a (2 x 4) b^T (2 x 4), written for the assembler: headers offer it under compiler flags only */
MFT__NEON_BF16_TARGET static inline float32x4_t mft__bfmmla(float32x4_t c, float32x4_t a, float32x4_t b)
{
    __asm__(MFT__NEON_BF16_ASM "bfmmla %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(a), "w"(b));
    return c;
}

/* 8 rows x 8 lanes: 16 sums of 2 x 2, 4 vectors of lanes, 1 of rows. Panels hold pairs in k by lane: two
 * such vectors zipped are the four k of two lanes that the instruction wants. */
MFT__NEON_BF16_TARGET static void mft__strip_neon_bf16(const mft__gemm_strip *x)
{
    float32x4_t c[4][4], b[4], a, v0, v1, w0, w1;
    mft__ahead  ahead[2];
    int64_t     l, p, ask = mft__lines(x, ahead, (x->lanes - 1) / 8 + 1);
    int         i, j, r, q, n = x->s_terms > x->v_terms ? x->s_terms : x->v_terms;
    for (l = 0; l < x->lanes; l += 8) {
        const float *panel = x->v + l / 16 * x->v_panel + l % 16;
        mft__ask(ahead, ask);
        MFT__UNROLL
        for (r = 0; r < 4; r++) {
            MFT__UNROLL
            for (q = 0; q < 4; q++) c[r][q] = vdupq_n_f32(0);
        }
        for (j = x->v_terms - 1; j >= 0; j--) for (i = mft__min_int(x->s_terms, n - j) - 1; i >= 0; i--) {
            const float *v = panel + j * x->cells * 16, *s = x->s + i * x->s_term;
            for (p = 0; p < x->cells; p += 2, v += 32, s += 2) {
                v0 = vld1q_f32(v);      v1 = vld1q_f32(v + 4);
                w0 = vld1q_f32(v + 16); w1 = vld1q_f32(v + 20);
                b[0] = vzip1q_f32(v0, w0); b[1] = vzip2q_f32(v0, w0);
                b[2] = vzip1q_f32(v1, w1); b[3] = vzip2q_f32(v1, w1);
                MFT__UNROLL
                for (r = 0; r < 4; r++) {
                    a = vcombine_f32(vld1_f32(s + 2 * r * MFT__STRIDE), vld1_f32(s + (2 * r + 1) * MFT__STRIDE));
                    MFT__UNROLL
                    for (q = 0; q < 4; q++) c[r][q] = mft__bfmmla(c[r][q], a, b[q]);
                }
            }
        }
        MFT__UNROLL
        for (r = 0; r < 4; r++) {
            MFT__UNROLL
            for (q = 0; q < 4; q += 2) {
                float *t = x->tile + 2 * r * x->ld + l + 2 * q;
                v0 = vcombine_f32(vget_low_f32(c[r][q]),  vget_low_f32(c[r][q + 1]));
                v1 = vcombine_f32(vget_high_f32(c[r][q]), vget_high_f32(c[r][q + 1]));
                if (x->add) { v0 = vaddq_f32(v0, vld1q_f32(t)); v1 = vaddq_f32(v1, vld1q_f32(t + x->ld)); }
                vst1q_f32(t, v0); vst1q_f32(t + x->ld, v1);
            }
        }
    }
}
#endif

/* ---- quantised rows against a vector by products of bytes ---- */
#ifdef MFT__HAVE_NEON_DOT
static int mft__usable_neon_dot(void) { return mft__arm_has(16, 20, "hw.optional.arm.FEAT_DotProd"); }      /* AT_HWCAP, HWCAP_ASIMDDP */
static int mft__usable_neon_bf16_dot(void) { return mft__usable_neon_bf16() && mft__usable_neon_dot(); }
static int mft__usable_neon_i8mm(void) { return mft__usable_neon_dot() && mft__arm_has(26, 13, "hw.optional.arm.FEAT_I8MM"); }       /* AT_HWCAP2, HWCAP2_I8MM */
static int mft__usable_neon_bf16_i8mm(void) { return mft__usable_neon_bf16() && mft__usable_neon_i8mm(); }

/* The 32 integers of a quantised block of `size` bytes. */
static inline void mft__bytes_neon(int8x16_t *lo, int8x16_t *hi, const uint8_t *p, int64_t size)
{
    uint8x16_t u = vld1q_u8(p + 2);
    if (size == 34) { *lo = vreinterpretq_s8_u8(u); *hi = vreinterpretq_s8_u8(vld1q_u8(p + 18)); return; }
    *lo = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(u, vdupq_n_u8(15))), vdupq_n_s8(8));
    *hi = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(u, 4)), vdupq_n_s8(8));
}

/* four sums of four products of bytes each */
MFT__NEON_DOT_TARGET static inline int32x4_t mft__sdot(int32x4_t c, int8x16_t a, int8x16_t b)
{
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(c) : "w"(a), "w"(b));
    return c;
}

/* 32 numbers as three digits to the base 254, x = step (d0 + d1 / 254 + d2 / 254^2), step a power of two that makes
 * the largest 63.5 to 127: right to 2^-23 of it, which is a float's own precision. 0: not finite. */
typedef struct mft__digits { int8_t d[3][32]; float step; } mft__digits;
static int mft__digits_of(mft__digits *y, const float *x, int64_t n)
{
    float   most = 0, up, rest;
    int     i, k, e;
    memset(y, 0, sizeof *y);
    for (i = 0; i < n; i++) { if (x[i] - x[i] != 0) return 0; if (fabsf(x[i]) > most) most = fabsf(x[i]); }
    if (!(most > 1e-30f)) return most == 0;                     /* so small that 1 / step overflows: floats do it */
    frexpf(most, &e);
    y->step = ldexpf(1, e - 7);
    if (most > 127 * y->step) y->step *= 2;
    up = 1 / y->step;
    for (i = 0; i < n; i++) {
        rest = x[i] * up;
        for (k = 0; k < 3; k++) { float d = rintf(rest); y->d[k][i] = (int8_t)d; rest = (rest - d) * 254; }
    }
    return 1;
}

/* As mft__gemm_dots_neon, which does all but one quantised vector: the digits of x meet the integers of the weights in
 * exact sums, three byte products where floats take eight conversions and eight multiply-adds. */
MFT__NEON_DOT_TARGET static void mft__gemm_dots_neon_dot(void *arg, int64_t begin, int64_t end, int worker)
{
    enum { PART = 64, ROWS = 64 };                              /* blocks and rows at a time: digits made once for many rows */
    const mft__gemm_job *g = (const mft__gemm_job *)arg;
    const float *x = (const float *)g->v.data + g->v_begin * g->v.row_stride;
    int64_t      blocks = (g->k + 31) / 32, size = g->s.dtype == MFT_Q8_0 ? 34 : 18, pitch = (int64_t)mft_dtype_bytes(g->s.dtype, g->s.row_stride), i, b, b0, r0, nr;
    mft__digits  digits[PART];
    float32x4_t  sums[ROWS];
    for (i = 0; i < g->k && x[i] - x[i] == 0; i++) { }
    if (g->v_count != 1 || !mft__is_quantized(g->s.dtype) || i < g->k) { mft__gemm_dots_neon(arg, begin, end, worker); return; }
    for (r0 = begin; r0 < end; r0 += ROWS) {
        nr = mft__min(end - r0, ROWS);
        for (i = 0; i < nr; i++) sums[i] = vdupq_n_f32(0);
        for (b0 = 0; b0 < blocks; b0 += PART) {
            int64_t nb = mft__min(blocks - b0, PART);
            for (b = 0; b < nb; b++) if (!mft__digits_of(&digits[b], x + (b0 + b) * 32, mft__min(g->k - (b0 + b) * 32, 32))) break;
            if (b < nb) { mft__gemm_dots_neon(arg, begin, end, worker); return; }
            for (i = 0; i < nr; i++) {
                const uint8_t *p = (const uint8_t *)g->s.data + (r0 + i) * pitch + b0 * size;
                float32x4_t    sum = sums[i], t;
                for (b = 0; b < nb; b++, p += size) {
                    int8x16_t lo, hi;
                    int32x4_t c[3];
                    float     scale = mft__f16_to_float((uint16_t)(p[0] | p[1] << 8)) * digits[b].step;
                    int       k;
                    __builtin_prefetch(p + 1024, 0, 3);
                    mft__bytes_neon(&lo, &hi, p, size);
                    for (k = 0; k < 3; k++) c[k] = mft__sdot(mft__sdot(vdupq_n_s32(0), lo, vld1q_s8(digits[b].d[k])), hi, vld1q_s8(digits[b].d[k] + 16));
                    t = vfmaq_n_f32(vcvtq_f32_s32(c[0]), vcvtq_f32_s32(c[1]), 1.0f / 254);
                    t = vfmaq_n_f32(t, vcvtq_f32_s32(c[2]), 1.0f / 64516);
                    sum = vfmaq_n_f32(sum, t, scale);
                }
                sums[i] = sum;
            }
        }
        for (i = 0; i < nr; i++) mft__gemm_put(g, r0 + i, g->v_begin, vaddvq_f32(sums[i]));
    }
}

/* Sums of 2 x 2: c += a (2 x 8) b^T (2 x 8), bytes. */
MFT__NEON_I8MM_TARGET static inline int32x4_t mft__smmla(int32x4_t c, int8x16_t a, int8x16_t b)
{
    __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(c) : "w"(a), "w"(b));
    return c;
}

/* Pairs of lanes lie MFT__DIGIT_PAIRS by MFT__DIGIT_PAIRS, among those block by block of k. */
static mft__digit_pair *mft__digits_at(const mft__gemm_job *g, int64_t pair, int64_t block)
{
    int64_t first = pair / MFT__DIGIT_PAIRS * MFT__DIGIT_PAIRS, n = mft__min((g->v_count + 1) / 2 - first, MFT__DIGIT_PAIRS);
    return (mft__digit_pair *)(void *)g->packed + first * ((g->k + 31) / 32) + block * n + (pair - first);
}

static void mft__gemm_digits(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__gemm_job *g = (const mft__gemm_job *)arg;
    int64_t      blocks = (g->k + 31) / 32, b, lane;
    mft__digits  one;
    int          ok, i, j, l;
    (void)worker;
    for (; begin < end; begin++) {
        for (b = 0, ok = 1; b < blocks && ok; b++) {
            mft__digit_pair *y = mft__digits_at(g, begin, b);
            for (l = 0; l < 2 && ok; l++) {
                memset(&one, 0, sizeof one);
                lane = 2 * begin + l;
                if (lane < g->v_count) ok = mft__digits_of(&one, (const float *)g->v.data + lane * g->v.row_stride + b * 32, mft__min(g->k - b * 32, 32));
                for (i = 0; i < 3; i++) for (j = 0; j < 4; j++) memcpy(y->d[i][j][l], one.d[i] + 8 * j, 8);
                y->step[l] = y->step[l + 2] = one.step;
            }
        }
        if (ok) continue;
        for (b = 0; b < blocks; b++) memset(mft__digits_at(g, begin, b), 0, sizeof(mft__digit_pair));
        mft__digits_at(g, begin, 0)->step[0] = NAN;
    }
}

/* Up to 4 rows against up to MFT__DIGIT_PAIRS pairs of lanes. The first two digits' sums are below 2^27 together: one
 * conversion for both. */
MFT__NEON_I8MM_TARGET static void mft__digits_tile(const mft__gemm_job *g, int64_t row, int64_t rows, int64_t pair)
{
    const mft__digit_pair *d = mft__digits_at(g, pair, 0), *first = d;
    int64_t        blocks = (g->k + 31) / 32, size = g->s.dtype == MFT_Q8_0 ? 34 : 18, n = mft__min((g->v_count + 1) / 2 - pair, MFT__DIGIT_PAIRS), b, q;
    const uint8_t *p[4];
    float32x4_t    sums[MFT__DIGIT_PAIRS][2], scale[2], t;
    int8x16_t      w[2][4], lo[4], hi[4];
    int            r, l, i, j;
    for (q = 0; q < n; q++) sums[q][0] = sums[q][1] = vdupq_n_f32(0);
    for (r = 0; r < 4; r++) p[r] = (const uint8_t *)g->s.data + mft_dtype_bytes(g->s.dtype, (row + mft__min(r, rows - 1)) * g->s.row_stride);
    for (b = 0; b < blocks; b++, d += n) {
        uint16_t h[4];
        for (r = 0; r < 4; r++) {
            memcpy(&h[r], p[r], sizeof h[r]);
            mft__bytes_neon(&lo[r], &hi[r], p[r], size);
            p[r] += size;
        }
        t = vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h))), 1.0f / 254);
        scale[0] = vzip1q_f32(t, t); scale[1] = vzip2q_f32(t, t);
        for (r = 0; r < 2; r++) {
            int64x2_t a = vreinterpretq_s64_s8(lo[2 * r]), c = vreinterpretq_s64_s8(lo[2 * r + 1]);
            w[r][0] = vreinterpretq_s8_s64(vzip1q_s64(a, c)); w[r][1] = vreinterpretq_s8_s64(vzip2q_s64(a, c));
            a = vreinterpretq_s64_s8(hi[2 * r]); c = vreinterpretq_s64_s8(hi[2 * r + 1]);
            w[r][2] = vreinterpretq_s8_s64(vzip1q_s64(a, c)); w[r][3] = vreinterpretq_s8_s64(vzip2q_s64(a, c));
        }
        for (q = 0; q < n; q++) {
            int32x4_t   c[2][3];
            float32x4_t step = vld1q_f32(d[q].step);
            MFT__UNROLL
            for (i = 0; i < 3; i++) {
                c[0][i] = c[1][i] = vdupq_n_s32(0);
                MFT__UNROLL
                for (j = 0; j < 4; j++) {
                    int8x16_t x = vld1q_s8(d[q].d[i][j][0]);
                    c[0][i] = mft__smmla(c[0][i], w[0][j], x);
                    c[1][i] = mft__smmla(c[1][i], w[1][j], x);
                }
            }
            MFT__UNROLL
            for (r = 0; r < 2; r++) {
                t = vfmaq_n_f32(vcvtq_f32_s32(vmlaq_n_s32(c[r][1], c[r][0], 254)), vcvtq_f32_s32(c[r][2]), 1.0f / 254);
                sums[q][r] = vfmaq_f32(sums[q][r], t, vmulq_f32(scale[r], step));
            }
        }
    }
    for (q = 0; q < n; q++) for (r = 0; r < rows; r++) for (l = 0; l < 2; l++) {
        int64_t lane = 2 * (pair + q) + l;
        float   four[4];
        if (lane >= g->v_count || first[q].step[0] != first[q].step[0]) continue;
        vst1q_f32(four, sums[q][r / 2]);
        mft__gemm_put(g, row + r, lane, four[r % 2 * 2 + l]);
    }
}

/* Quantised rows against vectors in digits, any number of them (prefill, training's forward pass): for 4 rows, 2 lanes and
 * a block 24 products of bytes and 12 operations on floats where floats take 64 multiply-adds. The error is that of
 * neon_dot, no larger than a plain float loop's (tests/test_kernels.c). One vector, and what is not in digits, go there. */
static void mft__gemm_dots_neon_i8mm(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__gemm_job *g = (const mft__gemm_job *)arg;
    int64_t pairs = (g->v_count + 1) / 2, q, i;
    if (!g->packed) { mft__gemm_dots_neon_dot(arg, begin, end, worker); return; }
    for (q = 0; q < pairs; q += MFT__DIGIT_PAIRS) for (i = begin; i < end; i += 4) mft__digits_tile(g, i, mft__min(end - i, 4), q);
    for (q = 0; q < pairs; q++) {
        mft__gemm_job floats = *g;
        const float  *step = mft__digits_at(g, q, 0)->step;
        if (step[0] == step[0]) continue;
        floats.v_begin = 2 * q; floats.v_count = mft__min(g->v_count - 2 * q, 2);
        mft__gemm_dots_neon(&floats, begin, end, worker);
    }
}
#endif

/* ---- the table ---- */
#define MFT__TASKS_OF(row) mft__gemm_pack_##row,  mft__gemm_tiles_##row,  mft__gemm_columns_##row, mft__gemm_dots_##row, mft__gemm_sums_##row, mft__gemm_thin_##row, NULL
#define MFT__PAIRS_OF(row) mft__pairs_pack_##row, mft__pairs_tiles_##row, NULL,                    mft__gemm_dots_##row, mft__gemm_sums_##row, mft__gemm_thin_##row, NULL
#define MFT__VECTORS_OF(row) mft__to_float_##row, mft__from_float_##row,                                                          \
    mft__dot_##row, mft__axpy_##row, mft__add_##row, mft__mul_##row, mft__mul_add_##row, mft__scale_##row,                        \
    mft__sum_##row, mft__sum_squares_##row, mft__max_##row, mft__exp_sum_##row,                                                   \
    mft__act_##row, mft__act_backward_##row, mft__gate_##row, mft__gate_backward_##row,                                           \
    mft__rms_norm_##row, mft__rms_norm_backward_##row, mft__layer_norm_##row, mft__layer_norm_backward_##row,                     \
    mft__cos_sin_##row, mft__rope_##row, mft__adamw_##row, mft__dropout_##row, mft__bf16_by_chance_##row, mft__code_pack_##row,                             \
    mft__attention_##row, mft__attention_dq_##row, mft__attention_dkv_##row

/*                                                     height lanes width k_step tiled products */
static const mft__gemm_row mft__gemm_portable     = {  6,     8,    4,    1,     0,    0, mft__strip_portable,   MFT__TASKS_OF(portable) };
#ifdef MFT__HAVE_AVX2
static const mft__gemm_row mft__gemm_avx2         = {  6,     16,   8,    1,     0,    0, mft__strip_avx2,       MFT__TASKS_OF(avx2)     };
#endif
#ifdef MFT__HAVE_AVX512
static const mft__gemm_row mft__gemm_avx512       = { 12,     32,   16,   1,     0,    0, mft__strip_avx512,     MFT__TASKS_OF(avx512)   };
#endif
#ifdef MFT__HAVE_AVX512BF16
static const mft__gemm_row mft__gemm_avx512bf16   = { 12,     32,   16,   2,     0,    0, mft__strip_avx512bf16, MFT__PAIRS_OF(avx512)   };
#endif
#ifdef MFT__HAVE_AMX
static const mft__gemm_row mft__gemm_amx          = { 32,     32,   16,   32,    1,    6, mft__strip_amx,        MFT__PAIRS_OF(avx512)   };
#endif
#ifdef MFT__HAVE_NEON
static const mft__gemm_row mft__gemm_neon         = {  6,     16,   4,    1,     0,    0, mft__strip_neon,       MFT__TASKS_OF(neon)     };
#endif
#ifdef MFT__HAVE_NEON_DOT
static const mft__gemm_row mft__gemm_neon_dot     = {  6,     16,   4,    1,     0,    0, mft__strip_neon,       mft__gemm_pack_neon, mft__gemm_tiles_neon, mft__gemm_columns_neon,
                                                       mft__gemm_dots_neon_dot, mft__gemm_sums_neon, mft__gemm_thin_neon, NULL };
static const mft__gemm_row mft__gemm_neon_i8mm    = {  6,     16,   4,    1,     0,    0, mft__strip_neon,       mft__gemm_pack_neon, mft__gemm_tiles_neon, mft__gemm_columns_neon,
                                                       mft__gemm_dots_neon_i8mm, mft__gemm_sums_neon, mft__gemm_thin_neon, mft__gemm_digits };
#endif
#ifdef MFT__HAVE_NEON_BF16
static const mft__gemm_row mft__gemm_neon_bf16    = {  8,     16,   4,    4,     0,    3, mft__strip_neon_bf16,  MFT__PAIRS_OF(neon)     };
#endif

/*    name          usable                    vectors                    f32, bf16, split products, cblas */
static const mft__kernels mft__kernel_table[] = {               /* fastest first */
#ifdef MFT_USE_CBLAS                                            /* asked for by name: before all others */
#  ifdef MFT__HAVE_AVX512
    { "cblas",      mft__usable_avx512,       MFT__VECTORS_OF(avx512),   { &mft__gemm_avx512,   &mft__gemm_avx512     }, NULL, 1 },
#  endif
#  ifdef MFT__HAVE_AVX2
    { "cblas",      mft__usable_avx2,         MFT__VECTORS_OF(avx2),     { &mft__gemm_avx2,     &mft__gemm_avx2       }, NULL, 1 },
#  endif
#  ifdef MFT__HAVE_NEON
    { "cblas",      mft__usable_always,       MFT__VECTORS_OF(neon),     { &mft__gemm_neon,     &mft__gemm_neon       }, NULL, 1 },
#  else
    { "cblas",      mft__usable_always,       MFT__VECTORS_OF(portable), { &mft__gemm_portable, &mft__gemm_portable   }, NULL, 1 },
#  endif
#endif
#ifdef MFT__HAVE_AMX
    { "amx",        mft__usable_amx,          MFT__VECTORS_OF(avx512),   { &mft__gemm_avx512,   &mft__gemm_amx        }, &mft__gemm_amx, 0 },
#endif
#ifdef MFT__HAVE_AVX512BF16
    { "avx512bf16", mft__usable_avx512bf16,   MFT__VECTORS_OF(avx512),   { &mft__gemm_avx512,   &mft__gemm_avx512bf16 }, NULL, 0 },
#endif
#ifdef MFT__HAVE_AVX512
    { "avx512",     mft__usable_avx512,       MFT__VECTORS_OF(avx512),   { &mft__gemm_avx512,   &mft__gemm_avx512     }, NULL, 0 },
#endif
#ifdef MFT__HAVE_AVX2
    { "avx2",       mft__usable_avx2,         MFT__VECTORS_OF(avx2),     { &mft__gemm_avx2,     &mft__gemm_avx2       }, NULL, 0 },
#endif
#ifdef MFT__HAVE_NEON_DOT
    { "neon_bf16_i8mm", mft__usable_neon_bf16_i8mm, MFT__VECTORS_OF(neon), { &mft__gemm_neon_i8mm, &mft__gemm_neon_bf16 }, &mft__gemm_neon_bf16, 0 },
    { "neon_i8mm",  mft__usable_neon_i8mm,    MFT__VECTORS_OF(neon),     { &mft__gemm_neon_i8mm, &mft__gemm_neon_i8mm }, NULL, 0 },
    { "neon_bf16_dot", mft__usable_neon_bf16_dot, MFT__VECTORS_OF(neon), { &mft__gemm_neon_dot, &mft__gemm_neon_bf16  }, &mft__gemm_neon_bf16, 0 },
    { "neon_dot",   mft__usable_neon_dot,     MFT__VECTORS_OF(neon),     { &mft__gemm_neon_dot, &mft__gemm_neon_dot   }, NULL, 0 },
#endif
#ifdef MFT__HAVE_NEON_BF16
    { "neon_bf16",  mft__usable_neon_bf16,    MFT__VECTORS_OF(neon),     { &mft__gemm_neon,     &mft__gemm_neon_bf16  }, &mft__gemm_neon_bf16, 0 },
#endif
#ifdef MFT__HAVE_NEON
    { "neon",       mft__usable_always,       MFT__VECTORS_OF(neon),     { &mft__gemm_neon,     &mft__gemm_neon       }, NULL, 0 },
#endif
    { "portable",   mft__usable_always,       MFT__VECTORS_OF(portable), { &mft__gemm_portable, &mft__gemm_portable   }, NULL, 0 }
};
enum { MFT__N_KERNELS = (int)(sizeof mft__kernel_table / sizeof mft__kernel_table[0]) };

MFT_API const char *mft_kernels_available(int i)
{
    const char *last = "";
    int         k;
    for (k = 0; k < MFT__N_KERNELS; k++) {                      /* rows of one name stand together: the first counts */
        if (!mft__kernel_table[k].usable() || strcmp(mft__kernel_table[k].name, last) == 0) continue;
        last = mft__kernel_table[k].name;
        if (i-- == 0) return last;
    }
    return NULL;
}

#ifdef MFT_USE_CBLAS
static int mft__cblas_sgemm(void *user, int ta, int tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                            const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
#endif

/* name NULL: $MFT_KERNELS, else the fastest usable row. 0: no such row here. */
static int mft__kernels_choose(mft_context *ctx, const char *name)
{
    int k;
    if (!name) name = getenv("MFT_KERNELS");
    for (k = 0; k < MFT__N_KERNELS; k++) {
        if ((name && *name && strcmp(name, mft__kernel_table[k].name)) || !mft__kernel_table[k].usable()) continue;
        ctx->kernels = &mft__kernel_table[k];
#ifdef MFT_USE_CBLAS
        if (ctx->kernels->cblas && !ctx->products.sgemm) {      /* spans below 2^28 numbers: every size is an int */
            ctx->products.sgemm = mft__cblas_sgemm; ctx->products.max_bytes = (size_t)1 << 30; ctx->products.least = 1;
        }
#endif
        return 1;
    }
    return 0;
}

MFT_API const char *mft_kernels_name(const mft_context *ctx) { return ctx ? ctx->kernels->name : ""; }

/* ---- products ----
 *
 *   A register tile holds height x lanes sums of c; each step of k loads the lanes of one operand (v)
 *   and, one by one, numbers of the other (s). v is packed into panels, s strip by strip into the first
 *   cache, converted on the way: f16, bf16 and quantised weights never exist converted as a whole. Which
 *   of a and b is v, and so whether tiles are turned on their way out, is a matter of cost: with x w^T,
 *   where k lies side by side in both, turning the output once is far cheaper than turning w, so x
 *   becomes v and w is read in rows as it lies.
 *
 *   tiles    a block of v (all of k, and as many lanes that one block of k stays in the second cache) is packed by all
 *            threads together; then each task takes a group of strips of s through all of k, its tile beside that block
 *   columns  s has few strips: each task takes some lanes of v and packs them itself, block of k by block
 *   pairs    bf16 matrix units: the side with more terms (x, dy) is packed once by all threads; each task takes some rows
 *            or columns of the other (w), which it packs block of k by block, so that all are read once
 *   dots     few rows on one side, k side by side in both: dot products, nothing packed (decoding, LoRA);
 *            with products of bytes (neon_i8mm) also any number of rows, packed as digits, by quantised weights
 *   sums     few rows in a, b lies along n: rows of b added up where they lie (decoding)
 *   thin     k is small: nothing packed, no sums but in registers (LoRA). As a product's tail it meets tiles
 *            and columns on their way out, so u b^T costs no pass over y of its own
 *
 *   Every number of c is a sum over k in one order that m, n, k and how the operands lie decide, so how tasks are
 *   cut may follow the number of threads. Tasks are cut as even as can be, as many for each thread.
 *
 *   The register tile alone reaches 98 % of the multiply-adds' peak; what is lost goes into packing and waiting for
 *   memory. So each strip asks ahead for what comes after the next (mft__ask), and the next strips of floats are copied
 *   between the present one's multiply-adds, which leave the ports for it (mft__carry). Panels of v that lie side by side
 *   are packed by the first strip on its way: copied like strips they are slower.
 *
 *   `mft bench kernels` on an idle Xeon (Emerald Rapids class), shares of the peak measured beside each product: AVX-512 with
 *   one thread 83 to 91 %, gradients of weights 80 to 88 %; with two 82 to 87 % (narrow ones 75 %) and 79 to 86 %; AVX2 83 to
 *   91 % and 80 to 88 % with one or two. AMX, played by instructions that take as long (`make bench-amx-pace`): see the README. */
typedef enum mft__gemm_way { MFT__TILES, MFT__COLUMNS, MFT__DOTS, MFT__SUMS, MFT__THIN, MFT__PAIRS } mft__gemm_way;

static int mft__gemm(mft_context *ctx, int64_t m, int64_t n, int64_t k, float alpha, mft__matrix a, mft__matrix b,
                     const float *bias, int add, float *c, int64_t ldc);

/* So few strips that packed lanes are not worth sharing: see `columns`. */
static int mft__gemm_few_strips(const mft__gemm_job *g) { return g->s_count <= 256; }

/* k of a block. Numbers that each task packs for itself where they lie side by side are asked for a block ahead; with lines
 * some powers of two apart, as weights have, 256 lines of floats do not fit the second cache's sets beside the block at hand. */
static int64_t mft__gemm_kc(const mft__gemm_job *g)
{
    return mft__gemm_few_strips(g) && g->v.row_stride == 1 && g->v.dtype == MFT_F32 && g->k > MFT__KC ? MFT__KC / 2 : MFT__KC;
}

/* Lanes packed at a time: a block of k for the second cache, all of k for the memory it takes; as even as can be. */
static int64_t mft__gemm_lanes(const mft__gemm_job *g)
{
    int64_t unit = g->row->lanes, units = (g->v_count - 1) / unit + 1, most = MFT__COLUMN_PANELS, times;
    if (!mft__gemm_few_strips(g)) most = mft__max(1, mft__min(MFT__BESIDE / mft__min(g->k, MFT__KC), MFT__PACKED / g->k) / unit);
    times = (units - 1) / most + 1;
    return ((units - 1) / times + 1) * unit;
}

/* Quantised rows that lie along k, enough of them to be worth v's digits: see `dots`. */
static int mft__gemm_by_digits(const mft__gemm_job *g)
{
    return g->row->digits && mft__is_quantized(g->s.dtype) && g->s.col_stride == 1 && g->v.dtype == MFT_F32 && g->v.col_stride == 1
        && g->v_count > 1 && g->s_count >= MFT__FEW;
}

/* Multiply-adds per unit of k, and what else takes the time of so many, as measured on AVX-512: to pack a vector of v
 * (to turn it), a number of s for each block of lanes, and the way out spread over k. */
static double mft__gemm_cost(const mft__gemm_row *row, const mft__gemm_job *g)
{
    int64_t block = mft__gemm_lanes(g);
    double v = (double)(mft__round_up(g->v_count, row->width) / row->width), s = (double)mft__round_up(g->s_count, row->height / 3);
    double pack_v = v * (g->v.row_stride == 1 ? 8 : 24);
    double pack_s = s * (g->s.col_stride == 1 ? 9.0 / row->width : g->s.dtype == MFT_F32 || g->s.dtype == MFT_BF16 ? 20.0 / row->height : 6);
    return s * v + pack_v + pack_s * (double)((g->v_count - 1) / block + 1) + s * v * (g->swapped ? 16 : 4) / (double)g->k;
}

/* Floats, or pairs of so many bf16 terms. What is thin takes longer to pack as pairs than to multiply as floats, so
 * that with MFT_PRECISION_BF16 products of fewer than 32 rows, columns or k are not rounded. */
static void mft__gemm_terms(const mft__kernels *kernels, mft_precision precision, mft__gemm_job *g)
{
    const mft__gemm_row *split = kernels->split;
    int s = g->s.dtype == MFT_BF16 ? 1 : 3, v = g->v.dtype == MFT_BF16 ? 1 : 3;     /* bf16 is exact in one */
    g->row = kernels->gemm[MFT_PRECISION_F32];
    g->s_terms = g->v_terms = 1;
    if (g->s_count < MFT__PAIRS_LEAST || g->v_count < MFT__PAIRS_LEAST || g->k < MFT__PAIRS_LEAST) return;
    if (mft__is_quantized(g->s.dtype) || mft__is_quantized(g->v.dtype)) return;     /* six products, and much to convert */
    if (precision != MFT_PRECISION_F32) { g->row = kernels->gemm[precision]; return; }
    if (!split || (s == 1 ? v : v == 1 ? s : 6) > split->max_products) return;
    g->row = split;
    g->s_terms = s; g->v_terms = v;
}

static mft__matrix mft__matrix_of(const void *data, mft_dtype dtype, int64_t row_stride, int64_t col_stride)
{
    mft__matrix m;
    m.data = data; m.dtype = dtype; m.row_stride = row_stride; m.col_stride = col_stride;
    return m;
}

static mft__matrix mft__matrix_f32(const float *data, int64_t row_stride, int64_t col_stride)
{
    return mft__matrix_of(data, MFT_F32, row_stride, col_stride);
}

/* Into how many tasks `units` of work go: each at most so large, at least so many if there is so much, as many for each
 * that works. */
static int64_t mft__gemm_tasks(int64_t units, int64_t most, int64_t tasks, int64_t shares)
{
    tasks = mft__round_up(mft__max((units - 1) / most + 1, tasks), shares);
    return mft__min(tasks, units);
}

/* What packing and the way out of a product of pairs take, in cycles as counted on AVX-512: bf16 rows are copied, two
 * lines of lanes zipped; all else is split into terms, and turned where k lies the other way. */
static double mft__pairs_cost(const mft__gemm_job *g)
{
    double s = (double)g->s_count, v = (double)g->v_count, k = (double)g->k;
    double one_s = g->s.col_stride == 1 ? (g->s.dtype == MFT_BF16 ? 0.03 : 0.1 + 0.1 * g->s_terms) : 0.3 + 0.15 * g->s_terms;
    double one_v = g->v.row_stride == 1 ? 0.05 + 0.05 * g->v_terms : 0.3 + 0.05 * g->v_terms;
    double again = (double)(((g->shares_v ? g->v_count : g->s_count) - 1) / MFT__PAIRS_MOST + 1);
    return k * (g->shares_v ? v * one_v + again * s * one_s : s * one_s + again * v * one_v) + s * v * (g->swapped ? 0.4 : 0.1);
}

/* Packed once for all tasks: the side with more terms, which is the activations, else the smaller. */
static void mft__pairs_share(mft__gemm_job *g)
{
    g->shares_v = g->s_terms == g->v_terms ? g->v_count <= g->s_count : g->v_terms > g->s_terms;
}

/* One worker does all where waking another (some microseconds) costs more than it brings. */
static void mft__gemm_run(mft_context *ctx, int alone, int64_t n, int64_t group, mft__task task, mft__gemm_job *g)
{
    int64_t i;
    if (!alone) mft__parallel(ctx, n, group, task, g);
    else for (i = 0; i < n; i += group) task(g, i, mft__min(i + group, n), 0);
}

/* How a product of pairs goes: so much of the shared side at a time as stays in the second cache when packed, `most` of
 * it by `step` of k, k in parts alike; tasks of `group` of the other side. Returns the floats that are packed, and a
 * worker's. */
typedef struct mft__pairs_plan { int64_t unit, all, rest, most, step, group; size_t packed, floats; } mft__pairs_plan;
static mft__pairs_plan mft__pairs_plan_of(mft__gemm_job *g, int64_t shares)
{
    mft__pairs_plan p;
    const mft__gemm_row *row = g->row;
    int64_t other = g->shares_v ? row->height : row->lanes, terms = g->shares_v ? g->v_terms : g->s_terms, parts;
    p.unit  = g->shares_v ? row->lanes   : row->height;
    p.all   = g->shares_v ? g->v_count : g->s_count;
    p.rest  = g->shares_v ? g->s_count : g->v_count;
    p.most  = mft__min(mft__round_up(p.all, p.unit), MFT__PAIRS_MOST / p.unit * p.unit);
    parts   = g->k * p.most * terms / (MFT__PAIRS_BYTES / 2) + 1;
    g->kc   = mft__min(mft__round_up(g->k, row->k_step), g->s_terms + g->v_terms > 2 ? MFT__KC / 2 : MFT__KC);
    p.step  = mft__round_up((g->k - 1) / parts + 1, g->kc);
    p.group = mft__min(mft__round_up(1 + p.rest / (4 * shares), other), MFT__PAIRS_TASK / other * other);
    p.packed = (size_t)(p.step / g->kc * (p.most / p.unit) * mft__pairs_piece(g, g->shares_v));
    p.floats = (size_t)(p.group / other * mft__pairs_piece(g, !g->shares_v)
                        + (g->shares_v ? mft__round_up(p.group, MFT__TILE_ROWS) * p.most : mft__round_up(p.most, MFT__TILE_ROWS) * p.group));
    return p;
}

static void mft__pairs_run(mft_context *ctx, int alone, const mft__gemm_job *whole, const mft__pairs_plan *p)
{
    mft__gemm_job g = *whole;
    int64_t at, k0, pieces;
    for (at = 0; at < p->all; at += p->most) for (k0 = 0; k0 < whole->k; k0 += p->step) {
        g.x_begin = at; g.x_count = mft__min(p->most, p->all - at);
        g.k = mft__min(p->step, whole->k - k0);
        g.s.data = (const char *)whole->s.data + mft_dtype_bytes(g.s.dtype, k0 * g.s.col_stride);
        g.v.data = (const char *)whole->v.data + mft_dtype_bytes(g.v.dtype, k0 * g.v.col_stride);
        g.plus   = k0 > 0 ? g.c : whole->plus;                  /* parts of k meet in c; bias and tail come with the first */
        g.bias   = k0 > 0 ? NULL : whole->bias;
        g.tail.k = k0 > 0 ? 0 : whole->tail.k;
        pieces   = ((g.k - 1) / g.kc + 1) * ((g.x_count - 1) / p->unit + 1);
        mft__gemm_run(ctx, alone, pieces, 1 + pieces / (4 * mft__at_once(ctx)), g.row->pack, &g);
        mft__gemm_run(ctx, alone, p->rest, p->group, g.row->tiles, &g);
    }
}

/* x as floats, row by row, ld apart. */
static void mft__gemm_flatten(const mft__kernels *kernels, float *dst, int64_t ld, const mft__matrix *x, int64_t rows, int64_t cols)
{
    int64_t r, c, i, n, size = (int64_t)mft_dtype_bytes(x->dtype, 1);
    float   part[64];
    if (x->col_stride == 1) {
        for (r = 0; r < rows; r++, dst += ld) for (c = 0; c < cols; c += 64) {
            n = mft__min(cols - c, 64);
            kernels->to_float(part, (const char *)x->data + mft_dtype_bytes(x->dtype, r * x->row_stride + c), x->dtype,
                              mft__is_quantized(x->dtype) ? mft__round_up(n, 32) : n);
            memcpy(dst + c, part, sizeof(float) * (size_t)n);
        }
        return;
    }
    for (r = 0; x->dtype == MFT_F32 && r < rows; r++)           /* few rows, side by side */
        for (c = 0; c < cols; c++) dst[r * ld + c] = ((const float *)x->data)[c * x->col_stride + r];
    for (c = 0; x->dtype != MFT_F32 && c < cols; c++) {
        if      (mft__is_quantized(x->dtype)) kernels->to_float(part, (const char *)x->data + mft_dtype_bytes(x->dtype, c * x->col_stride), x->dtype, mft__round_up(rows, 32));
        else                             kernels->to_float(part, (const char *)x->data + c * x->col_stride * size, x->dtype, rows);
        for (i = 0; i < rows; i++) dst[i * ld + c] = part[i];
    }
}

/* ---- products by somebody else ---- */
#ifdef MFT_USE_CBLAS
#ifdef __cplusplus
extern "C"
#endif
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc);

static int mft__cblas_sgemm(void *user, int ta, int tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                            const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    (void)user;
    cblas_sgemm(101, ta ? 112 : 111, tb ? 112 : 111, (int)m, (int)n, (int)k, alpha, a, (int)lda, b, (int)ldb, beta, c, (int)ldc);
    return 0;
}
#endif

enum { MFT__BOUNCE = 4 << 20 };             /* bytes of converted weights at a time */

/* Numbers from the first to the last of `lines` lines of `cols`, ld apart. */
static int64_t mft__span(int64_t lines, int64_t cols, int64_t ld) { return (lines - 1) * ld + cols; }

/* Cuts the product in half, along what halves the operand that is too large, until all fit. Recursion is as deep
 * as the logarithms of the sizes. 0, or what the app's function said. */
static int mft__products_fit(const mft_products *p, int ta, int tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                             const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    int64_t most = (int64_t)((p->max_bytes ? p->max_bytes : (size_t)1 << 40) / sizeof(float)), h;
    int     over_a = mft__span(ta ? k : m, ta ? m : k, lda) > most, over_b = mft__span(tb ? n : k, tb ? k : n, ldb) > most, over_c = mft__span(m, n, ldc) > most;
    int     cut_m = over_c && m > 1, cut_n = over_c && m == 1, cut_k = 0, failed;
    if (over_a) { if (ta ? k > 1 : m == 1) cut_k = 1; else cut_m = 1; }
    if (over_b) { if (tb ? n > 1 : k == 1) cut_n = 1; else cut_k = 1; }
    if (cut_m && m > 1) {
        h = m / 2;
        failed = mft__products_fit(p, ta, tb, h, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return failed ? failed : mft__products_fit(p, ta, tb, m - h, n, k, alpha, a + (ta ? h : h * lda), lda, b, ldb, beta, c + h * ldc, ldc);
    }
    if (cut_n && n > 1) {
        h = n / 2;
        failed = mft__products_fit(p, ta, tb, m, h, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return failed ? failed : mft__products_fit(p, ta, tb, m, n - h, k, alpha, a, lda, b + (tb ? h * ldb : h), ldb, beta, c + h, ldc);
    }
    if (cut_k && k > 1) {
        h = k / 2;
        failed = mft__products_fit(p, ta, tb, m, n, h, alpha, a, lda, b, ldb, beta, c, ldc);
        return failed ? failed : mft__products_fit(p, ta, tb, m, n, k - h, alpha, a + (ta ? h * lda : h), lda, b + (tb ? h : h * ldb), ldb, 1, c, ldc);
    }
    return p->sgemm(p->user, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

typedef struct mft__bounce_task { const mft__kernels *k; float *dst; const char *src; mft_dtype dtype; int64_t cols, pitch, stride; } mft__bounce_task;
static void mft__bounce_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__bounce_task *t = (const mft__bounce_task *)arg;
    (void)worker;
    for (; begin < end; begin++) t->k->to_float(t->dst + begin * t->pitch, t->src + mft_dtype_bytes(t->dtype, begin * t->stride), t->dtype, t->cols);
}

/* c by the app's products: 1; 0 if they are not for this product; -1 if the step has failed. While planning, only the
 * memory for converted weights is taken. Not to be mixed with declining later: c may have been written to. */
static int mft__gemm_products(mft_context *ctx, int64_t m, int64_t n, int64_t k, float alpha, mft__matrix a, mft__matrix b,
                              const float *bias, const float *plus, float *c, int64_t ldc)
{
    const mft_products *p = &ctx->products;
    int      ta = a.col_stride != 1, tb = b.col_stride != 1, failed = 0, odd_a = a.dtype != MFT_F32, odd_b = b.dtype != MFT_F32;
    int64_t  lda = ta ? a.col_stride : a.row_stride, ldb = tb ? b.col_stride : b.row_stride;
    int64_t  lines = odd_a ? (ta ? k : m) : tb ? n : k, cols = odd_a ? (ta ? m : k) : tb ? k : n, pitch, step, at, i, j;
    float    beta = plus || bias ? 1.0f : 0.0f, *bounce = NULL;
    size_t   bytes = 0;
    mft__bounce_task t;
    if (!p->sgemm || (double)m * (double)n * (double)k < (p->least > 0 ? p->least : 1e6) || (odd_a && odd_b)) return 0;
    if (lda < (ta ? m : k)) lda = ta ? m : k;                   /* one line: its distance to the next may be anything */
    if (ldb < (tb ? k : n)) ldb = tb ? k : n;
    pitch = mft__round_up(cols, 32);
    step  = mft__min(lines, 1 + (p->max_bytes && p->max_bytes < MFT__BOUNCE ? (int64_t)p->max_bytes : (int64_t)MFT__BOUNCE) / 4 / pitch);
    if (odd_a || odd_b) {
        bytes  = sizeof(float) * (size_t)(step * pitch);
        bounce = (float *)mft__high(ctx, bytes);
        if (!bounce) return -1;
    }
    if (MFT__RUNS(ctx)) {
        for (i = 0; (bias || plus != c) && beta > 0 && i < m; i++)
            for (j = 0; j < n; j++) c[i * ldc + j] = (plus ? plus[i * ldc + j] : 0) + (bias ? bias[j] : 0);
        if (!bounce) failed = mft__products_fit(p, ta, tb, m, n, k, alpha, (const float *)a.data, lda, (const float *)b.data, ldb, beta, c, ldc);
        t.k = ctx->kernels; t.dst = bounce; t.pitch = pitch;
        t.dtype = odd_a ? a.dtype : b.dtype; t.stride = odd_a ? lda : ldb; t.cols = mft__is_quantized(t.dtype) ? pitch : cols;
        for (at = 0; bounce && at < lines && !failed; at += step) {     /* so many lines of the weights, as they are stored */
            int64_t h = mft__min(step, lines - at);
            t.src = (const char *)(odd_a ? a.data : b.data) + mft_dtype_bytes(t.dtype, at * t.stride);
            mft__parallel(ctx, h, 1 + 16384 / pitch, mft__bounce_run, &t);
            if      (odd_b && tb) failed = mft__products_fit(p, ta, tb, m, h, k, alpha, (const float *)a.data, lda, bounce, pitch, beta, c + at, ldc);
            else if (odd_b)       failed = mft__products_fit(p, ta, tb, m, n, h, alpha, (const float *)a.data + (ta ? at * lda : at), lda, bounce, pitch, at ? 1 : beta, c, ldc);
            else if (!ta)         failed = mft__products_fit(p, ta, tb, h, n, k, alpha, bounce, pitch, (const float *)b.data, ldb, beta, c + at * ldc, ldc);
            else                  failed = mft__products_fit(p, ta, tb, m, n, h, alpha, bounce, pitch, (const float *)b.data + (tb ? at : at * ldb), ldb, at ? 1 : beta, c, ldc);
        }
    }
    if (bounce) mft__high_free(ctx, bounce, bytes);
    if (!failed) return 1;
    mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_UNSUPPORTED, "the app's matrix product of [%lld, %lld] and [%lld, %lld] failed with %d",
                                  (long long)m, (long long)k, (long long)k, (long long)n, failed));
    return -1;
}

/* c[m,n] = plus[m,n] + alpha sum_k a[m,k] b[k,n] + bias[n] + tail.  c f32, rows ldc apart, and so plus, which may be c;
 * plus, bias and tail may be NULL.
 * Takes its workspace from the high end, while planning takes it only on paper.
 * 0 with the sentence set when that is not to be had. */
static int mft__gemm_tailed(mft_context *ctx, int64_t m, int64_t n, int64_t k, float alpha, mft__matrix a, mft__matrix b,
                            const float *bias, const float *plus, float *c, int64_t ldc, const mft__tail *tail)
{
    mft__gemm_job  g, turned;
    mft__gemm_way  way;
    mft__matrix    bt = b;
    const mft__gemm_row *row;
    mft__pairs_plan pairs;
    int64_t        group = 1, lanes = 0, threads = ctx->n_threads, shares = mft__at_once(ctx), tail_ld = 0, at, all, units;
    size_t         packed = 0, tail_bytes = 0, floats, bytes;
    int            alone, theirs, digits, flatten = 0;
    char          *memory;

    if (m < 1 || n < 1 || k < 1) return 1;
    theirs = mft__gemm_products(ctx, m, n, k, alpha, a, b, bias, plus, c, ldc);
    if (theirs) return theirs > 0 && (!tail || mft__gemm(ctx, m, n, tail->k, tail->scale, tail->a, tail->b, NULL, 1, c, ldc));
    bt.row_stride = b.col_stride; bt.col_stride = b.row_stride;         /* row l of it is column l of b */
    memset(&g, 0, sizeof g);
    g.s = a; g.v = bt; g.s_count = m; g.v_count = n; g.k = k;
    g.alpha = alpha; g.bias = bias; g.plus = plus; g.c = c; g.ldc = ldc;
    turned = g;
    turned.s = bt; turned.v = a; turned.s_count = n; turned.v_count = m; turned.swapped = 1;
    mft__gemm_terms(ctx->kernels, ctx->precision, &g);
    mft__gemm_terms(ctx->kernels, ctx->precision, &turned);

    digits = mft__gemm_by_digits(&turned);
    if      (digits || (bt.col_stride == 1 && m <= MFT__FEW && m <= n)) { way = MFT__DOTS; g = turned; }
    else if (a.col_stride == 1 && n <= MFT__FEW)              way = MFT__DOTS;
    else if (b.col_stride == 1 && a.dtype == MFT_F32 && m <= (b.dtype == MFT_F32 ? MFT__FEW : MFT__FEW_SUMS)) way = MFT__SUMS;
    else if (a.row_stride == 1 && a.dtype == MFT_F32 && b.dtype == MFT_F32 && n <= MFT__FEW) { way = MFT__SUMS; g = turned; }
    else if (k <= MFT__FEW && a.col_stride == 1 && a.dtype == MFT_F32 && b.dtype == MFT_F32 && !tail) {
        way = MFT__THIN;
        g.tail.a = a; g.tail.b = b; g.tail.k = k; g.tail.scale = alpha;
    } else {
        if (g.row->k_step > 1) {
            mft__pairs_share(&g); mft__pairs_share(&turned);
            if (mft__pairs_cost(&turned) < mft__pairs_cost(&g)) g = turned;
            way = MFT__PAIRS;
        } else {
            if (mft__gemm_cost(turned.row, &turned) < mft__gemm_cost(g.row, &g)) g = turned;
            way  = mft__gemm_few_strips(&g) ? MFT__COLUMNS : MFT__TILES;
            g.kc = mft__gemm_kc(&g);
        }
        if (tail) { g.tail = *tail; tail = NULL; }
    }
    if (g.tail.k && (g.swapped || g.tail.b.col_stride != 1 || n % g.row->width)) {
        tail_ld    = mft__round_up(g.swapped ? n + 15 : n, 16); /* turned, vectors begin at any strip's first row */
        tail_bytes = sizeof(float) * (size_t)(g.tail.k * tail_ld);
    }

    row    = g.row;
    alone  = m * n * k < 200000;
    floats = (size_t)(mft__gemm_strips(&g) * row->height * MFT__STRIDE);                   /* a worker's: the strips */
    if (alone) threads = shares = 1;
    g.at_once = shares;
    switch (way) {
    case MFT__DOTS:
        flatten = g.v.dtype != MFT_F32 || g.v.col_stride != 1;
        group   = mft__round_up(mft__min(1 + g.s_count / (4 * shares), 1 + 262144 / k), 4);     /* each begins its streams anew */
        floats  = (size_t)(mft__round_up(mft__min(g.v_count, MFT__FEW), 4) * 8 * row->width);
        if (flatten) packed = mft__round64(sizeof(float) * (size_t)(g.v_count * k));
        if (digits) {                                                   /* so many lanes at a time: w is read again for each */
            lanes  = mft__min(m, MFT__PAIRS_MOST);
            packed = mft__round64(sizeof(mft__digit_pair) * (size_t)((lanes + 1) / 2 * ((k + 31) / 32)));
        }
        break;
    case MFT__SUMS:
        group  = mft__min(MFT__SUMS_LANES, mft__round_up((g.v_count - 1) / shares + 1, 64));
        floats = (size_t)((MFT__SUMS_LANES + 64) * (4 + g.s_count));
        break;
    case MFT__THIN:
        group  = mft__round_up(1 + 131072 / (n * k), 4);
        floats = 0;
        break;
    case MFT__PAIRS:
        pairs  = mft__pairs_plan_of(&g, shares);
        packed = mft__round64(sizeof(float) * pairs.packed);
        floats = pairs.floats;
        break;
    case MFT__COLUMNS:
        units   = (g.v_count - 1) / row->lanes + 1;
        g.tasks = mft__gemm_tasks(units, MFT__COLUMN_PANELS, mft__min(2 * shares, units / 4), shares);
        lanes   = ((units - 1) / g.tasks + 1) * row->lanes;
        floats += (size_t)((mft__round_up(g.s_count, MFT__TILE_ROWS) + mft__min(k, g.kc)) * lanes);
        break;
    default:
        units   = (g.s_count - 1) / row->height + 1;
        lanes   = mft__gemm_lanes(&g);
        /* each task fetches all packed numbers: large ones, if that is from far */
        if (k * lanes > MFT__NEAR) g.tasks = mft__gemm_tasks(units, mft__max(1, MFT__BESIDE / lanes / row->height), 2 * shares, shares);
        else                       g.tasks = mft__gemm_tasks(units, 192 / row->height,                                4 * shares, shares);
        packed  = mft__round64(sizeof(float) * (size_t)(lanes * k));
        floats += (size_t)(mft__round_up(((units - 1) / g.tasks + 1) * row->height, MFT__TILE_ROWS) * lanes);
    }
    g.scratch_bytes = mft__round64(sizeof(float) * floats);
    bytes  = packed + tail_bytes + (size_t)threads * g.scratch_bytes;
    memory = (char *)mft__high(ctx, bytes);
    if (!memory) return 0;
    if (MFT__RUNS(ctx)) {
        float *front = (float *)(void *)memory;
        g.scratch = memory + packed + tail_bytes;
        if (tail_bytes) {
            float *rows = (float *)(void *)(memory + packed);
            mft__gemm_flatten(ctx->kernels, rows, tail_ld, &g.tail.b, g.tail.k, n);
            g.tail.b = mft__matrix_f32(rows, tail_ld, 1);
        }
        switch (way) {
        case MFT__DOTS:
            if (flatten) {
                mft__gemm_flatten(ctx->kernels, front, k, &g.v, g.v_count, k);
                g.v.data = front; g.v.dtype = MFT_F32; g.v.row_stride = k; g.v.col_stride = 1;
            }
            for (at = 0; digits && at < m; at += lanes) {
                mft__gemm_job part = g;
                part.packed = front; part.v_count = mft__min(lanes, m - at);
                part.v.data = (const float *)g.v.data + at * g.v.row_stride;
                part.c = c + at * ldc; part.plus = g.plus ? g.plus + at * ldc : NULL;
                mft__gemm_run(ctx, alone, (part.v_count + 1) / 2, 1, row->digits, &part);
                mft__gemm_run(ctx, alone, g.s_count, group, row->dots, &part);
            }
            if (!digits) mft__gemm_run(ctx, alone, g.s_count, group, row->dots, &g);
            break;
        case MFT__SUMS:    mft__gemm_run(ctx, alone, g.v_count, group, row->sums, &g);    break;
        case MFT__THIN:    mft__gemm_run(ctx, alone, g.s_count, group, row->thin, &g);    break;
        case MFT__COLUMNS: mft__gemm_run(ctx, alone, g.tasks, 1, row->columns, &g);       break;
        case MFT__PAIRS:   g.packed = front; mft__pairs_run(ctx, alone, &g, &pairs);      break;
        default:
            g.packed = front;
            for (at = 0, all = g.v_count; at < all; at += lanes) {
                g.v_begin = at; g.v_count = mft__min(lanes, all - at);
                mft__gemm_run(ctx, alone, ((k - 1) / g.kc + 1) * ((g.v_count - 1) / row->lanes + 1), 2, row->pack, &g);
                mft__gemm_run(ctx, alone, g.tasks, 1, row->tiles, &g);
            }
        }
    }
    mft__high_free(ctx, memory, bytes);
    return !tail || mft__gemm(ctx, m, n, tail->k, tail->scale, tail->a, tail->b, NULL, 1, c, ldc);
}

/* The same without a tail, added to c or not. */
static int mft__gemm(mft_context *ctx, int64_t m, int64_t n, int64_t k, float alpha, mft__matrix a, mft__matrix b,
                     const float *bias, int add, float *c, int64_t ldc)
{
    return mft__gemm_tailed(ctx, m, n, k, alpha, a, b, bias, add ? c : NULL, c, ldc, NULL);
}

/* ==============================================================================
 * MARK: - [TAPE] Records, gradients, what a step remembers
 *
 *   in    tensors made by [OPS]
 *   out   a list of records, in order of execution, that [BACKWARD] walks in reverse
 *   rule  a record is appended only if some input is trainable and grad is enabled
 * ============================================================================== */
enum { MFT__MAX_INPUTS = 6 };

/* One op that [BACKWARD] must undo. What the fields past `mark` mean is the op's own affair. */
typedef struct mft__record {
    struct mft__record *before;
    void      (*backward)(mft_context *ctx, struct mft__record *r);
    mft_tensor *y;                          /* its result                                           */
    mft_tensor *in[MFT__MAX_INPUTS];
    mft__mark   mark;                       /* the forward end before the op took anything          */
    const void *p[3];
    float      *saved;
    float       f[3];
    int64_t     i[4];
} mft__record;

/* Keeps the step's first failure. Returns NULL, as the op constructor then does. */
static mft_tensor *mft__op_failed(mft_context *ctx, mft_status status)
{
    if (ctx->step_status == MFT_OK) {
        ctx->step_status = status;
        memcpy(ctx->step_error, ctx->error, sizeof ctx->error);
    }
    return NULL;
}

/* A tensor that is there, and no backward pass of this step has consumed? */
static int mft__fresh(const mft_tensor *t)
{
    const mft__tensor *x = (const mft__tensor *)(const void *)t;
    return t && !(x->view_of ? x->view_of->consumed : x->consumed);
}

/* An op's inputs are there? NULL passes on silently if the step has failed before. */
static int mft__op_inputs(mft_context *ctx, const char *op, int all_there)
{
    if (all_there) return 1;
    if (ctx && ctx->step_status == MFT_OK)
        mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: an input is NULL, or an earlier backward pass has consumed it", op));
    return 0;
}

static mft_tensor *mft__op_shapes(mft_context *ctx, const char *op, const mft_tensor *a, const mft_tensor *b)
{
    mft__shape_text sa, sb;
    if (b) mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: %s and %s do not go together", op, mft__shape(a, &sa), mft__shape(b, &sb));
    else   mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: it does not take %s %s", op, mft_dtype_name(a->dtype), mft__shape(a, &sa));
    return mft__op_failed(ctx, MFT_ERR_INVALID_ARGUMENT);
}

/* Does an op with this input have to be recorded? */
static int mft__wants_grad(mft_context *ctx, const mft_tensor *t)
{
    if (!t || !t->trainable) return 0;
    ctx->saw_trainable = 1;
    return ctx->grad_enabled;
}

/* Appends a record of y = op(in...) and makes y trainable; `mark` is from before y was made.
 * NULL when memory is out: the op then returns NULL. */
static mft__record *mft__record_op(mft_context *ctx, mft__mark mark, mft_tensor *y,
                                   void (*backward)(mft_context *ctx, mft__record *r),
                                   mft_tensor *in0, mft_tensor *in1, mft_tensor *in2)
{
    mft__record *r = (mft__record *)mft__meta(ctx, sizeof *r);
    if (!r) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return NULL; }
    r->before = ctx->tape; ctx->tape = r;
    r->backward = backward; r->mark = mark;
    r->y = y; r->in[0] = in0; r->in[1] = in1; r->in[2] = in2;
    y->trainable = 1;
    return r;
}

MFT_API int mft_grad_enable(mft_context *ctx, int on)
{
    int was;
    if (!ctx) return 0;
    was = ctx->grad_enabled;
    ctx->grad_enabled = on != 0;
    return was;
}

MFT_API void mft_step_reset(mft_context *ctx)
{
    mft__arena *ar;
    if (!ctx) return;
    ar = &ctx->arena;
    ctx->tape = NULL;
    mft__arena_clear(ar);
    if (ar->n_chunks > 1 && MFT__RUNS(ctx)) {                   /* next time in one piece */
        size_t total = 0;
        while (ar->n_chunks) {
            mft__chunk *c = &ar->chunks[--ar->n_chunks];
            total += c->size;
            mft__free(ctx, c->base, c->size);
        }
        mft__arena_clear(ar);
        mft__arena_add(ctx, total, 0);                          /* if not now, then when it is needed */
    }
    mft__meta_clear(ctx);
    ctx->step_status = MFT_OK;
    ctx->saw_trainable = 0;
    ctx->step_index++; ctx->draw_index = 0;
}

MFT_API void mft_plan_begin(mft_context *ctx)
{
    if (!ctx || ctx->real_arena) return;
    mft_step_reset(ctx);
    ctx->step_index--;                                          /* planning draws no numbers of the run */
    ctx->real_arena = (mft__arena *)mft__alloc(ctx, sizeof *ctx->real_arena);
    if (!ctx->real_arena) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
    *ctx->real_arena = ctx->arena;
    memset(&ctx->arena, 0, sizeof ctx->arena);
}

MFT_API mft_status mft_plan_end(mft_context *ctx, size_t *out_bytes)
{
    mft_status s;
    if (!ctx || !out_bytes) return MFT_ERR_INVALID_ARGUMENT;
    *out_bytes = 0;
    s = ctx->step_status;
    if (s != MFT_OK) memcpy(ctx->error, ctx->step_error, sizeof ctx->error);
    else if (!ctx->real_arena) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_plan_end: no plan was begun");
    if (ctx->real_arena) {
        mft__arena *real = ctx->real_arena;
        *out_bytes = ctx->arena.reach;
        ctx->arena = *real;
        ctx->real_arena = NULL;
        mft__free(ctx, real, sizeof *real);
    }
    mft_step_reset(ctx);
    ctx->step_index--;
    return s;
}

/* ---- gradients ---- */

/* A gradient's tensor struct with t's shape and strides, over `data`. */
static mft_tensor *mft__grad_struct(mft_context *ctx, const mft_tensor *t, void *data)
{
    mft_tensor *g = mft__tensor_struct(ctx);
    if (!g) return NULL;
    g->dtype = MFT_F32; g->ndim = t->ndim; g->name = t->name;
    memcpy(g->shape, t->shape, sizeof t->shape);
    memcpy(g->stride, t->stride, sizeof t->stride);
    g->data = data;
    return g;
}

static size_t mft__grad_bytes(const mft_tensor *t) { return (size_t)mft_tensor_numel(t) * sizeof(float); }

/* A parameter's gradient is used up: the next parameter of this size, in this step or another, takes its memory. */
MFT__UNUSED static void mft__grad_release(mft_context *ctx, mft_tensor *t)
{
    mft_tensor *g = t->grad;
    if (!g) return;
    g->grad = ctx->spare_grads; ctx->spare_grads = g;
    t->grad = NULL; mft__of(t)->grad_written = 0;
}

/* A released gradient with t's size and t's shape, or NULL. */
static mft_tensor *mft__grad_spare(mft_context *ctx, const mft_tensor *t)
{
    mft_tensor **at = &ctx->spare_grads, *g;
    while ((g = *at) != NULL && mft_tensor_numel(g) != mft_tensor_numel(t)) at = &g->grad;
    if (!g) return NULL;
    *at = g->grad; g->grad = NULL;
    g->ndim = t->ndim;
    memcpy(g->shape, t->shape, sizeof g->shape);
    return g;
}

MFT__UNUSED static void mft__grad_spares_free(mft_context *ctx)
{
    mft_tensor *g;
    while ((g = ctx->spare_grads) != NULL) {
        ctx->spare_grads = g->grad; g->grad = NULL;
        mft_tensor_destroy(ctx, g);
    }
}

/* Zeroes a gradient that nobody has written. */
static void mft__grad_clear(mft_context *ctx, mft_tensor *g)
{
    int64_t n = mft_tensor_numel(g), piece = mft__paged_piece(ctx, g, n), i, m;
    for (i = 0; i < n && MFT__RUNS(ctx); i += m) {
        m = mft__min(n - i, piece);
        memset((float *)g->data + i, 0, (size_t)m * sizeof(float));
        mft__passed(ctx, g, i, m);
    }
}

/* The gradient of a held tensor, made if there is none; no backward has written it then. NULL with the sentence set. */
static mft_tensor *mft__grad_held(mft_context *ctx, mft_tensor *t)
{
    if (t->grad) return t->grad;
    t->grad = mft__grad_spare(ctx, t);
    if (!t->grad) t->grad = mft__tensor_held(ctx, MFT__GRADIENTS, MFT_F32, t->ndim, t->shape, NULL);
    if (!t->grad) return NULL;
    memcpy(t->grad->stride, t->stride, sizeof t->stride);
    t->grad->name = t->name;
    mft__of(t)->grad_written = 0;
    return t->grad;
}

/* Where d loss / d t goes: t's layout, f32. *add: it holds numbers to add to; else the caller writes
 * every element. NULL with the step failed when memory is out. */
static float *mft__grad(mft_context *ctx, mft_tensor *t, int *add)
{
    mft__tensor *x = mft__of(t);
    if (x->view_of) {                                           /* the same place of the viewed tensor's */
        mft_tensor *root = &x->view_of->t;
        float      *g;
        int         whole = mft_tensor_numel(root) == mft_tensor_numel(t), root_add;
        g = mft__grad(ctx, root, &root_add);
        if (!g) return NULL;
        if (!root_add && !whole) {
            if (MFT__RUNS(ctx)) mft__grad_clear(ctx, root->grad);
            root_add = 1;
        }
        *add = root_add;
        g += x->view_offset;
        if (!t->grad && !(t->grad = mft__grad_struct(ctx, t, g))) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return NULL; }
        return g;
    }
    if (!MFT__RUNS(ctx) && x->kind != MFT__STEP_TENSOR) {       /* a plan leaves held gradients as they are */
        *add = 0;
        return (float *)(void *)mft__plan_base();
    }
    if (!t->grad) {
        if (x->kind == MFT__STEP_TENSOR) {
            void *data = mft__high(ctx, mft__grad_bytes(t));
            if (data) t->grad = mft__grad_struct(ctx, t, data);
        } else mft__grad_held(ctx, t);
        if (!t->grad) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return NULL; }
        x->grad_written = 0;
    }
    *add = x->grad_written;
    if (MFT__RUNS(ctx) || x->kind == MFT__STEP_TENSOR) x->grad_written = 1;     /* a plan leaves held gradients as they are */
    return (float *)t->grad->data;
}

/* The same, zeroed if it is new: for those who add in any case. A view that comes here with add 0 is
 * all of what it views, in whatever order: its numbers fill it. */
static float *mft__grad_add(mft_context *ctx, mft_tensor *t)
{
    int    add;
    float *g = mft__grad(ctx, t, &add);
    if (g && !add && MFT__RUNS(ctx)) mft__grad_clear(ctx, t->grad);
    return g;
}

/* dy of a record's result; never NULL where a record is undone. */
static const float *mft__dy(const mft__record *r) { return (const float *)r->y->grad->data; }

/* Gives back a step tensor's gradient. */
static void mft__grad_drop(mft_context *ctx, mft_tensor *t)
{
    if (t->grad && !mft__of(t)->view_of) mft__high_free(ctx, t->grad->data, mft__grad_bytes(t));
    t->grad = NULL;
}

/* ==============================================================================
 * MARK: - [OPS] Each as: task, forward, backward, constructor
 *
 *   rule  a constructor checks shapes, takes its memory, records, and then computes unless
 *         planning; a backward adds into gradients and skips those nobody needs
 *   rule  pieces of work have sizes of their own, never a function of the number of threads;
 *         sums over rows go through partial sums of fixed pieces, added in order
 * ============================================================================== */
enum {
    MFT__ROW_GRAIN    = 16,                 /* rows a task of a row-wise op takes; a piece of every sum over rows */
    MFT__PAGED_ROWS   = 4,                  /* rows of a mapped table looked up between two mft__passed */
    MFT__VECTOR_GRAIN = 1 << 15             /* elements a task of an elementwise op takes; a piece of every whole sum */
};

static int64_t mft__cols(const mft_tensor *t) { return t->ndim ? t->shape[t->ndim - 1] : 1; }

/* f32 numbers, one after the other? Else the constructor goes through mft_contiguous. */
static int mft__plain(const mft_tensor *t) { return t->dtype == MFT_F32 && mft__is_contiguous(t); }

static mft_tensor *mft__plain_input(mft_context *ctx, const char *op, mft_tensor *x)
{
    if (x->dtype != MFT_F32) return mft__op_shapes(ctx, op, x, NULL);
    return mft__is_contiguous(x) ? x : mft_contiguous(ctx, x);
}

static mft_tensor *mft__result(mft_context *ctx, int ndim, const int64_t *shape)
{
    mft_tensor *y = mft__tensor_step(ctx, ndim, shape);
    if (!y) mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    return y;
}

/* ---- elementwise: one task for all of them ---- */
typedef enum mft__map_kind {
    MFT__MAP_ADD, MFT__MAP_SUB, MFT__MAP_MUL, MFT__MAP_SCALE, MFT__MAP_AXPY, MFT__MAP_MUL_ADD,
    MFT__MAP_ACT, MFT__MAP_ACT_BACKWARD, MFT__MAP_GATE, MFT__MAP_GATE_BACKWARD, MFT__MAP_COPY
} mft__map_kind;

typedef struct mft__map {
    const mft__kernels *k;
    mft__map_kind   kind;
    mft__activation f;
    float           s;
    int             add, add2;              /* of the backward ones: into y, into y2 */
    float          *y, *y2;
    const float    *a, *b, *c;
} mft__map;

static const float *mft__at(const float *p, int64_t i) { return p ? p + i : NULL; }

static void mft__map_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__map *m = (const mft__map *)arg;
    float       *y = m->y ? m->y + begin : NULL, *y2 = m->y2 ? m->y2 + begin : NULL;
    const float *a = m->a + begin, *b = mft__at(m->b, begin), *c = mft__at(m->c, begin);
    int64_t      n = end - begin, i;
    (void)worker;
    switch (m->kind) {
    case MFT__MAP_ADD:     m->k->add(y, a, b, n); return;
    case MFT__MAP_SUB:     for (i = 0; i < n; i++) y[i] = a[i] - b[i]; return;
    case MFT__MAP_MUL:     m->k->mul(y, a, b, n); return;
    case MFT__MAP_SCALE:   m->k->scale(y, m->s, a, n); return;
    case MFT__MAP_AXPY:    m->k->axpy(y, m->s, a, n); return;
    case MFT__MAP_MUL_ADD: m->k->mul_add(y, a, b, n); return;
    case MFT__MAP_ACT:     m->k->act(m->f, y, a, n); return;
    case MFT__MAP_ACT_BACKWARD:  m->k->act_backward(m->f, y, a, b, n, m->add); return;
    case MFT__MAP_GATE:    m->k->gate(m->f, y, a, b, n); return;
    case MFT__MAP_GATE_BACKWARD: m->k->gate_backward(m->f, y, y2, a, b, c, n, m->add, m->add2); return;
    case MFT__MAP_COPY:    memcpy(y, a, (size_t)n * sizeof *y); return;
    }
}

static mft__map mft__map_of(const mft_context *ctx, mft__map_kind kind, float *y, const float *a, const float *b)
{
    mft__map m;
    memset(&m, 0, sizeof m);
    m.k = ctx->kernels; m.kind = kind; m.y = y; m.a = a; m.b = b;
    return m;
}

static void mft__map_do(mft_context *ctx, mft__map *m, int64_t n)
{
    if (MFT__RUNS(ctx)) mft__parallel(ctx, n, MFT__VECTOR_GRAIN, mft__map_run, m);
}

/* g (+)= s dy, for a gradient that passes an op unchanged but for a factor. */
static void mft__pass_on(mft_context *ctx, mft_tensor *x, const float *dy, float s)
{
    int      add;
    float   *g = mft__grad(ctx, x, &add);
    mft__map m;
    if (!g) return;
    m = mft__map_of(ctx, add ? MFT__MAP_AXPY : s == 1 ? MFT__MAP_COPY : MFT__MAP_SCALE, g, dy, NULL);
    m.s = s;
    mft__map_do(ctx, &m, mft_tensor_numel(x));
}

/* ---- add, sub, mul, with b broadcast over leading dimensions ---- */
typedef struct mft__broadcast_task {
    const mft__kernels *k;
    mft__map_kind kind;
    float        *y;
    const float  *a, *b, *dy;
    int64_t       inner, rows;
    float         sign;
} mft__broadcast_task;

static void mft__broadcast_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__broadcast_task *t = (const mft__broadcast_task *)arg;
    mft__map m;
    int64_t  r;
    memset(&m, 0, sizeof m);
    m.k = t->k; m.kind = t->kind;
    for (r = begin; r < end; r++) {
        m.y = t->y + r * t->inner; m.a = t->a + r * t->inner; m.b = t->b;
        mft__map_run(&m, 0, t->inner, worker);
    }
}

/* db of a broadcast: for columns [begin, end) the sum over rows, in order, of sign dy (or dy a). */
static void mft__broadcast_sum_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__broadcast_task *t = (const mft__broadcast_task *)arg;
    int64_t r;
    (void)worker;
    for (r = 0; r < t->rows; r++) {
        const float *dy = t->dy + r * t->inner;
        if (t->a) t->k->mul_add(t->y + begin, dy + begin, t->a + r * t->inner + begin, end - begin);
        else      t->k->axpy(t->y + begin, t->sign, dy + begin, end - begin);
    }
}

static void mft__broadcast_sum(mft_context *ctx, mft_tensor *b, const float *dy, const float *a, float sign, int64_t rows)
{
    mft__broadcast_task t;
    memset(&t, 0, sizeof t);
    t.k = ctx->kernels; t.dy = dy; t.a = a; t.sign = sign; t.rows = rows; t.inner = mft_tensor_numel(b);
    t.y = mft__grad_add(ctx, b);
    if (t.y && MFT__RUNS(ctx)) mft__parallel(ctx, t.inner, 512, mft__broadcast_sum_run, &t);
}

/* a + b and a - b:  da = dy,  db = +-dy;   a b:  da = dy b,  db = dy a;   summed where b was broadcast */
static void mft__binary_backward(mft_context *ctx, mft__record *r)
{
    mft_tensor   *a = r->in[0], *b = r->in[1];
    mft__map_kind kind = (mft__map_kind)r->i[0];
    const float  *dy = mft__dy(r);
    int64_t       n = mft_tensor_numel(a), inner = mft_tensor_numel(b);
    if (a->trainable) {
        if (kind != MFT__MAP_MUL) mft__pass_on(ctx, a, dy, 1);
        else {
            mft__broadcast_task t;
            memset(&t, 0, sizeof t);
            t.k = ctx->kernels; t.kind = MFT__MAP_MUL_ADD;
            t.y = mft__grad_add(ctx, a); t.a = dy; t.b = (const float *)b->data; t.inner = inner;
            if (t.y && MFT__RUNS(ctx)) mft__parallel(ctx, n / inner, 1 + MFT__VECTOR_GRAIN / inner, mft__broadcast_run, &t);
        }
    }
    if (b->trainable) {
        if (inner == n && kind != MFT__MAP_MUL) mft__pass_on(ctx, b, dy, kind == MFT__MAP_SUB ? -1.0f : 1.0f);
        else mft__broadcast_sum(ctx, b, dy, kind == MFT__MAP_MUL ? (const float *)a->data : NULL, kind == MFT__MAP_SUB ? -1.0f : 1.0f, n / inner);
    }
}

static mft_tensor *mft__binary(mft_context *ctx, const char *op, mft__map_kind kind, mft_tensor *a, mft_tensor *b)
{
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    int          i, wants;
    if (!mft__op_inputs(ctx, op, ctx && mft__fresh(a) && mft__fresh(b))) return NULL;
    mark = mft__low_mark(ctx);
    a = mft__plain_input(ctx, op, a);
    b = a ? mft__plain_input(ctx, op, b) : NULL;
    if (!b) return NULL;
    if (b->ndim > a->ndim) return mft__op_shapes(ctx, op, a, b);
    for (i = 0; i < b->ndim; i++)
        if (b->shape[b->ndim - 1 - i] != a->shape[a->ndim - 1 - i]) return mft__op_shapes(ctx, op, a, b);
    wants  = mft__wants_grad(ctx, a);
    wants |= mft__wants_grad(ctx, b);
    y = mft__result(ctx, a->ndim, a->shape);
    if (!y) return NULL;
    if (wants) {
        r = mft__record_op(ctx, mark, y, mft__binary_backward, a, b, NULL);
        if (!r) return NULL;
        r->i[0] = kind;
    }
    if (MFT__RUNS(ctx) && !ctx->result_unread) {
        mft__broadcast_task t;
        int64_t n = mft_tensor_numel(a);
        memset(&t, 0, sizeof t);
        t.k = ctx->kernels; t.kind = kind; t.inner = mft_tensor_numel(b);
        t.y = (float *)y->data; t.a = (const float *)a->data; t.b = (const float *)b->data;
        if (t.inner == n) {
            mft__map m = mft__map_of(ctx, kind, t.y, t.a, t.b);
            mft__map_do(ctx, &m, n);
        } else mft__parallel(ctx, n / t.inner, 1 + MFT__VECTOR_GRAIN / t.inner, mft__broadcast_run, &t);
    }
    return y;
}

MFT_API mft_tensor *mft_add(mft_context *ctx, mft_tensor *a, mft_tensor *b) { return mft__binary(ctx, "mft_add", MFT__MAP_ADD, a, b); }
MFT_API mft_tensor *mft_sub(mft_context *ctx, mft_tensor *a, mft_tensor *b) { return mft__binary(ctx, "mft_sub", MFT__MAP_SUB, a, b); }
MFT_API mft_tensor *mft_mul(mft_context *ctx, mft_tensor *a, mft_tensor *b) { return mft__binary(ctx, "mft_mul", MFT__MAP_MUL, a, b); }

/* ---- scale ---- */
static void mft__scale_backward(mft_context *ctx, mft__record *r) { mft__pass_on(ctx, r->in[0], mft__dy(r), r->f[0]); }

MFT_API mft_tensor *mft_scale(mft_context *ctx, mft_tensor *x, float s)
{
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    mft__map     m;
    if (!mft__op_inputs(ctx, "mft_scale", ctx && mft__fresh(x))) return NULL;
    mark = mft__low_mark(ctx);
    if (!(x = mft__plain_input(ctx, "mft_scale", x)) || !(y = mft__result(ctx, x->ndim, x->shape))) return NULL;
    if (mft__wants_grad(ctx, x)) {
        if (!(r = mft__record_op(ctx, mark, y, mft__scale_backward, x, NULL, NULL))) return NULL;
        r->f[0] = s;
    }
    m = mft__map_of(ctx, MFT__MAP_SCALE, (float *)y->data, (const float *)x->data, NULL);
    m.s = s;
    mft__map_do(ctx, &m, mft_tensor_numel(x));
    return y;
}

/* ---- activations y = f(x):  dx = dy f'(x) ---- */
static void mft__act_op_backward(mft_context *ctx, mft__record *r)
{
    int      add;
    float   *dx = mft__grad(ctx, r->in[0], &add);
    mft__map m;
    if (!dx) return;
    m = mft__map_of(ctx, MFT__MAP_ACT_BACKWARD, dx, mft__dy(r), (const float *)r->in[0]->data);
    m.f = (mft__activation)r->i[0]; m.add = add;
    mft__map_do(ctx, &m, mft_tensor_numel(r->y));
}

static mft_tensor *mft__act_op(mft_context *ctx, const char *op, mft__activation f, mft_tensor *x)
{
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    mft__map     m;
    if (!mft__op_inputs(ctx, op, ctx && mft__fresh(x))) return NULL;
    mark = mft__low_mark(ctx);
    if (!(x = mft__plain_input(ctx, op, x)) || !(y = mft__result(ctx, x->ndim, x->shape))) return NULL;
    if (mft__wants_grad(ctx, x)) {
        if (!(r = mft__record_op(ctx, mark, y, mft__act_op_backward, x, NULL, NULL))) return NULL;
        r->i[0] = f;
    }
    m = mft__map_of(ctx, MFT__MAP_ACT, (float *)y->data, (const float *)x->data, NULL);
    m.f = f;
    mft__map_do(ctx, &m, mft_tensor_numel(x));
    return y;
}

MFT_API mft_tensor *mft_gelu_tanh(mft_context *ctx, mft_tensor *x) { return mft__act_op(ctx, "mft_gelu_tanh", MFT__GELU_TANH, x); }
MFT_API mft_tensor *mft_gelu     (mft_context *ctx, mft_tensor *x) { return mft__act_op(ctx, "mft_gelu", MFT__GELU_ERF, x); }
MFT_API mft_tensor *mft_silu     (mft_context *ctx, mft_tensor *x) { return mft__act_op(ctx, "mft_silu", MFT__SILU, x); }
MFT_API mft_tensor *mft_relu     (mft_context *ctx, mft_tensor *x) { return mft__act_op(ctx, "mft_relu", MFT__RELU, x); }
MFT_API mft_tensor *mft_tanh     (mft_context *ctx, mft_tensor *x) { return mft__act_op(ctx, "mft_tanh", MFT__TANH, x); }

MFT_API mft_tensor *mft_softcap(mft_context *ctx, mft_tensor *x, float cap)
{
    if (ctx && x && !(cap > 0))
        return mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_softcap: a cap of %g is not above 0", (double)cap));
    return mft_scale(ctx, mft_tanh(ctx, mft_scale(ctx, x, 1 / cap)), cap);
}

/* ---- gates y = f(g) u:  dg = dy u f'(g),  du = dy f(g) ---- */
static void mft__gate_op_backward(mft_context *ctx, mft__record *r)
{
    mft_tensor *g = r->in[0], *u = r->in[1];
    mft__map    m = mft__map_of(ctx, MFT__MAP_GATE_BACKWARD, NULL, mft__dy(r), (const float *)g->data);
    m.c = (const float *)u->data; m.f = (mft__activation)r->i[0];
    if (g->trainable && !(m.y  = mft__grad(ctx, g, &m.add))) return;
    if (u->trainable && !(m.y2 = mft__grad(ctx, u, &m.add2))) return;
    if (m.y && m.y == m.y2) {                                   /* both inputs are one tensor: a vector row would lose a part */
        m.y2 = NULL;
        mft__map_do(ctx, &m, mft_tensor_numel(r->y));
        m.y2 = m.y; m.y = NULL;
    }
    mft__map_do(ctx, &m, mft_tensor_numel(r->y));
}

static mft_tensor *mft__gate_op(mft_context *ctx, const char *op, mft__activation f, mft_tensor *g, mft_tensor *u)
{
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    mft__map     m;
    int          wants;
    if (!mft__op_inputs(ctx, op, ctx && mft__fresh(g) && mft__fresh(u))) return NULL;
    mark = mft__low_mark(ctx);
    if (!mft__same_shape(g, u)) return mft__op_shapes(ctx, op, g, u);
    if (!(g = mft__plain_input(ctx, op, g)) || !(u = mft__plain_input(ctx, op, u))) return NULL;
    if (!(y = mft__result(ctx, g->ndim, g->shape))) return NULL;
    wants  = mft__wants_grad(ctx, g);
    wants |= mft__wants_grad(ctx, u);
    if (wants) {
        if (!(r = mft__record_op(ctx, mark, y, mft__gate_op_backward, g, u, NULL))) return NULL;
        r->i[0] = f;
    }
    m = mft__map_of(ctx, MFT__MAP_GATE, (float *)y->data, (const float *)g->data, (const float *)u->data);
    m.f = f;
    mft__map_do(ctx, &m, mft_tensor_numel(y));
    return y;
}

MFT_API mft_tensor *mft_swiglu(mft_context *ctx, mft_tensor *gate, mft_tensor *up) { return mft__gate_op(ctx, "mft_swiglu", MFT__SILU, gate, up); }
MFT_API mft_tensor *mft_geglu (mft_context *ctx, mft_tensor *gate, mft_tensor *up) { return mft__gate_op(ctx, "mft_geglu", MFT__GELU_TANH, gate, up); }

/* ---- softmax:  dx = y (dy - sum(dy y)) ---- */
typedef struct mft__softmax_task { const mft__kernels *k; float *y; const float *x, *dy; int64_t cols; } mft__softmax_task;

static void mft__softmax_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__softmax_task *t = (const mft__softmax_task *)arg;
    int64_t r;
    (void)worker;
    for (r = begin; r < end; r++) {
        const float *x = t->x + r * t->cols;
        float       *y = t->y + r * t->cols, sum = t->k->exp_sum(y, x, t->k->max(x, t->cols), t->cols);
        t->k->scale(y, 1 / sum, y, t->cols);
    }
}

static void mft__softmax_backward_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__softmax_task *t = (const mft__softmax_task *)arg;
    int64_t r, c;
    (void)worker;
    for (r = begin; r < end; r++) {
        const float *y = t->x + r * t->cols, *dy = t->dy + r * t->cols;
        float       *dx = t->y + r * t->cols, dot = t->k->dot(dy, y, t->cols);
        for (c = 0; c < t->cols; c++) dx[c] += y[c] * (dy[c] - dot);
    }
}

static void mft__softmax_backward(mft_context *ctx, mft__record *r)
{
    mft__softmax_task t;
    t.k = ctx->kernels; t.cols = mft__cols(r->y);
    t.x = (const float *)r->y->data; t.dy = mft__dy(r); t.y = mft__grad_add(ctx, r->in[0]);
    if (t.y && MFT__RUNS(ctx)) mft__parallel(ctx, mft_tensor_numel(r->y) / t.cols, MFT__ROW_GRAIN, mft__softmax_backward_run, &t);
}

MFT_API mft_tensor *mft_softmax(mft_context *ctx, mft_tensor *x)
{
    mft__mark         mark;
    mft__softmax_task t;
    mft_tensor       *y;
    if (!mft__op_inputs(ctx, "mft_softmax", ctx && mft__fresh(x))) return NULL;
    mark = mft__low_mark(ctx);
    if (!(x = mft__plain_input(ctx, "mft_softmax", x)) || !(y = mft__result(ctx, x->ndim, x->shape))) return NULL;
    if (mft__wants_grad(ctx, x) && !mft__record_op(ctx, mark, y, mft__softmax_backward, x, NULL, NULL)) return NULL;
    t.k = ctx->kernels; t.cols = mft__cols(x); t.y = (float *)y->data; t.x = (const float *)x->data; t.dy = NULL;
    if (MFT__RUNS(ctx)) mft__parallel(ctx, mft_tensor_numel(x) / t.cols, MFT__ROW_GRAIN, mft__softmax_run, &t);
    return y;
}

/* ---- dropout: y = x keep / (1 - p);  keep is drawn again in the backward pass ---- */
typedef struct mft__dropout_task { const mft__kernels *k; float *y; const float *x; uint64_t seed, stream; float p; int add; } mft__dropout_task;

/* The stream of one dropout call: step and place in the step. A recomputed one draws the same again. */
static uint64_t mft__draw_stream(mft_context *ctx) { return ctx->step_index << 20 | (ctx->draw_index++ & 0xfffff); }

static void mft__dropout_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__dropout_task *t = (const mft__dropout_task *)arg;
    (void)worker;
    t->k->dropout(t->y + begin, t->x + begin, t->p, t->seed, t->stream, begin, end - begin, t->add);
}

static void mft__dropout_do(mft_context *ctx, float *y, const float *x, int64_t n, float p, uint64_t stream, int add)
{
    mft__dropout_task t;
    t.k = ctx->kernels; t.y = y; t.x = x; t.seed = ctx->seed; t.stream = stream; t.p = p; t.add = add;
    if (MFT__RUNS(ctx)) mft__parallel(ctx, n, 4096, mft__dropout_run, &t);
}

static void mft__dropout_backward(mft_context *ctx, mft__record *r)
{
    int    add;
    float *dx = mft__grad(ctx, r->in[0], &add);
    if (dx) mft__dropout_do(ctx, dx, mft__dy(r), mft_tensor_numel(r->y), r->f[0], (uint64_t)r->i[0], add);
}

/* Training, or the first run of a checkpoint's function, which must draw what the second will. */
static int mft__drops(const mft_context *ctx, float p) { return p > 0 && (ctx->grad_enabled || ctx->in_checkpoint); }

MFT_API mft_tensor *mft_dropout(mft_context *ctx, mft_tensor *x, float p)
{
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    uint64_t     stream;
    if (!mft__op_inputs(ctx, "mft_dropout", ctx && mft__fresh(x))) return NULL;
    if (!(p >= 0 && p < 1))
        return mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_dropout: a probability of %g is not in [0, 1)", (double)p));
    if (!mft__drops(ctx, p)) return x;
    mark = mft__low_mark(ctx);
    if (!(x = mft__plain_input(ctx, "mft_dropout", x)) || !(y = mft__result(ctx, x->ndim, x->shape))) return NULL;
    stream = mft__draw_stream(ctx);
    if (mft__wants_grad(ctx, x)) {
        if (!(r = mft__record_op(ctx, mark, y, mft__dropout_backward, x, NULL, NULL))) return NULL;
        r->f[0] = p; r->i[0] = (int64_t)stream;
    }
    mft__dropout_do(ctx, (float *)y->data, (const float *)x->data, mft_tensor_numel(x), p, stream, 0);
    return y;
}

/* ---- sum, mean:  dx = s dy ---- */
typedef struct mft__sum_task { const mft__kernels *k; float *dx; const float *x; double *partial; float s; int add; } mft__sum_task;

static void mft__sum_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__sum_task *t = (const mft__sum_task *)arg;
    (void)worker;
    t->partial[begin / MFT__VECTOR_GRAIN] = t->k->sum(t->x + begin, end - begin);
}

static void mft__fill_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__sum_task *t = (const mft__sum_task *)arg;
    int64_t i;
    (void)worker;
    for (i = begin; i < end; i++) t->dx[i] = t->add ? t->dx[i] + t->s : t->s;
}

static void mft__sum_backward(mft_context *ctx, mft__record *r)
{
    mft__sum_task t;
    t.dx = mft__grad(ctx, r->in[0], &t.add);
    if (!t.dx || !MFT__RUNS(ctx)) return;
    t.s = *mft__dy(r) * r->f[0];
    mft__parallel(ctx, mft_tensor_numel(r->in[0]), MFT__VECTOR_GRAIN, mft__fill_run, &t);
}

static mft_tensor *mft__sum_op(mft_context *ctx, const char *op, mft_tensor *x, int mean)
{
    mft__mark     mark;
    mft__record  *r;
    mft_tensor   *y;
    mft__sum_task t;
    int64_t       n, c, chunks;
    double        total = 0;
    if (!mft__op_inputs(ctx, op, ctx && mft__fresh(x))) return NULL;
    mark = mft__low_mark(ctx);
    if (!(x = mft__plain_input(ctx, op, x)) || !(y = mft__result(ctx, 0, NULL))) return NULL;
    n = mft_tensor_numel(x);
    if (mft__wants_grad(ctx, x)) {
        if (!(r = mft__record_op(ctx, mark, y, mft__sum_backward, x, NULL, NULL))) return NULL;
        r->f[0] = mean ? (float)(1.0 / (double)n) : 1;
    }
    chunks = (n + MFT__VECTOR_GRAIN - 1) / MFT__VECTOR_GRAIN;
    t.k = ctx->kernels; t.x = (const float *)x->data;
    t.partial = (double *)mft__high(ctx, (size_t)chunks * sizeof(double));
    if (!t.partial) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    if (MFT__RUNS(ctx)) {
        mft__parallel(ctx, n, MFT__VECTOR_GRAIN, mft__sum_run, &t);
        for (c = 0; c < chunks; c++) total += t.partial[c];
        *(float *)y->data = (float)(mean ? total / (double)n : total);
    }
    mft__high_free(ctx, t.partial, (size_t)chunks * sizeof(double));
    return y;
}

MFT_API mft_tensor *mft_sum (mft_context *ctx, mft_tensor *x) { return mft__sum_op(ctx, "mft_sum", x, 0); }
MFT_API mft_tensor *mft_mean(mft_context *ctx, mft_tensor *x) { return mft__sum_op(ctx, "mft_mean", x, 1); }

/* ---- views ---- */

/* Makes t a view of x, `offset` elements in; shape and strides are the caller's to fill. */
static void mft__view_of(mft_tensor *t, mft_tensor *x, int64_t offset)
{
    mft__tensor *from = mft__of(x), *v = mft__of(t);
    t->dtype = x->dtype; t->trainable = x->trainable; t->name = x->name;
    t->data = (char *)x->data + mft_dtype_bytes(x->dtype, offset);
    v->view_of     = from->view_of ? from->view_of : from;
    v->view_offset = (from->view_of ? from->view_offset : 0) + offset;
}

static mft_tensor *mft__view(mft_context *ctx, mft_tensor *x, int64_t offset)
{
    mft_tensor *t = mft__tensor_struct(ctx);
    if (!t) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    mft__view_of(t, x, offset);
    mft__wants_grad(ctx, x);
    t->ndim = x->ndim;
    memcpy(t->shape, x->shape, sizeof t->shape);
    memcpy(t->stride, x->stride, sizeof t->stride);
    return t;
}

MFT_API mft_tensor *mft_reshape(mft_context *ctx, mft_tensor *x, int ndim, const int64_t *shape)
{
    mft_tensor *t;
    mft_tensor  want;
    size_t      bytes;
    if (!mft__op_inputs(ctx, "mft_reshape", ctx && mft__fresh(x))) return NULL;
    memset(&want, 0, sizeof want);
    if (!mft__tensor_layout(ctx, &want, x->dtype, ndim, shape, &bytes)) return mft__op_failed(ctx, MFT_ERR_INVALID_ARGUMENT);
    if (mft_tensor_numel(&want) != mft_tensor_numel(x)) return mft__op_shapes(ctx, "mft_reshape", x, &want);
    if (!mft__is_contiguous(x) && !(x = mft_contiguous(ctx, x))) return NULL;
    if (!(t = mft__view(ctx, x, 0))) return NULL;
    t->ndim = ndim;
    memcpy(t->shape, want.shape, sizeof t->shape);
    memcpy(t->stride, want.stride, sizeof t->stride);
    return t;
}

MFT_API mft_tensor *mft_transpose(mft_context *ctx, mft_tensor *x, int dim_a, int dim_b)
{
    mft_tensor *t;
    int64_t     keep;
    if (!mft__op_inputs(ctx, "mft_transpose", ctx && mft__fresh(x))) return NULL;
    if (dim_a < 0 || dim_b < 0 || dim_a >= x->ndim || dim_b >= x->ndim || mft__is_quantized(x->dtype))
        return mft__op_shapes(ctx, "mft_transpose", x, NULL);
    if (!(t = mft__view(ctx, x, 0))) return NULL;
    keep = t->shape [dim_a]; t->shape [dim_a] = t->shape [dim_b]; t->shape [dim_b] = keep;
    keep = t->stride[dim_a]; t->stride[dim_a] = t->stride[dim_b]; t->stride[dim_b] = keep;
    return t;
}

MFT_API mft_tensor *mft_slice(mft_context *ctx, mft_tensor *x, int dim, int64_t begin, int64_t end)
{
    mft_tensor *t;
    if (!mft__op_inputs(ctx, "mft_slice", ctx && mft__fresh(x))) return NULL;
    if (dim < 0 || dim >= x->ndim || begin < 0 || begin >= end || end > x->shape[dim] || mft__is_quantized(x->dtype))
        return mft__op_shapes(ctx, "mft_slice", x, NULL);
    if (!(t = mft__view(ctx, x, begin * x->stride[dim]))) return NULL;
    t->shape[dim] = end - begin;
    return t;
}

/* contiguous: y[i] = x[i] in row-major order;  dx[i] += dy[i] */
typedef struct mft__gather_task { mft_tensor *x; float *packed, *strided; int to_strided; } mft__gather_task;

static void mft__gather_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__gather_task *t = (const mft__gather_task *)arg;
    int64_t r, c, cols = mft__cols(t->x), step = t->x->ndim ? t->x->stride[t->x->ndim - 1] : 1;
    (void)worker;
    for (r = begin; r < end; r++) {
        float *s = t->strided + mft__row_offset(t->x, r), *p = t->packed + r * cols;
        if (t->to_strided) for (c = 0; c < cols; c++) s[c * step] += p[c];
        else               for (c = 0; c < cols; c++) p[c] = s[c * step];
    }
}

static void mft__gather_do(mft_context *ctx, mft_tensor *x, float *packed, float *strided, int to_strided)
{
    mft__gather_task t;
    t.x = x; t.packed = packed; t.strided = strided; t.to_strided = to_strided;
    if (MFT__RUNS(ctx)) mft__parallel(ctx, mft_tensor_numel(x) / mft__cols(x), MFT__ROW_GRAIN, mft__gather_run, &t);
}

static void mft__contiguous_backward(mft_context *ctx, mft__record *r)
{
    mft_tensor *x = r->in[0];
    int         add;
    float      *dx = mft__grad(ctx, x, &add);
    if (!dx) return;
    if (!add && MFT__RUNS(ctx))                                 /* a whole view of a dense tensor: zero what lies under it */
        memset(mft__of(x)->view_of ? mft__of(x)->view_of->t.grad->data : (void *)dx, 0, mft__grad_bytes(x));
    mft__gather_do(ctx, x, (float *)(uintptr_t)mft__dy(r), dx, 1);
}

MFT_API mft_tensor *mft_contiguous(mft_context *ctx, mft_tensor *x)
{
    mft__mark   mark;
    mft_tensor *y;
    if (!mft__op_inputs(ctx, "mft_contiguous", ctx && mft__fresh(x))) return NULL;
    if (mft__is_contiguous(x)) return x;
    if (x->dtype != MFT_F32) return mft__op_shapes(ctx, "mft_contiguous", x, NULL);
    mark = mft__low_mark(ctx);
    if (!(y = mft__result(ctx, x->ndim, x->shape))) return NULL;
    if (mft__wants_grad(ctx, x) && !mft__record_op(ctx, mark, y, mft__contiguous_backward, x, NULL, NULL)) return NULL;
    mft__gather_do(ctx, x, (float *)y->data, (float *)x->data, 0);
    return y;
}

/* ---- products ---- */
/* A product inside an op: memory out is the step's failure. */
static void mft__product_tailed(mft_context *ctx, int64_t m, int64_t n, int64_t k, float alpha, mft__matrix a, mft__matrix b,
                                const float *bias, const float *plus, float *c, int64_t ldc, const mft__tail *tail)
{
    if (!mft__gemm_tailed(ctx, m, n, k, alpha, a, b, bias, plus, c, ldc, tail)) mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
}

static void mft__product(mft_context *ctx, int64_t m, int64_t n, int64_t k, float alpha, mft__matrix a, mft__matrix b,
                         const float *bias, int add, float *c, int64_t ldc)
{
    mft__product_tailed(ctx, m, n, k, alpha, a, b, bias, add ? c : NULL, c, ldc, NULL);
}

/* matmul, matrix by matrix:  da = dy b^T,  db = a^T dy */
static void mft__matmul_each(mft_context *ctx, const mft_tensor *a, const mft_tensor *b, const mft_tensor *y,
                             int64_t i, int64_t *oa, int64_t *ob, int64_t *oy)
{
    (void)ctx;
    *oa = mft__row_offset(a, i * a->shape[a->ndim - 2]);
    *ob = mft__row_offset(b, i * b->shape[b->ndim - 2]);
    *oy = i * y->shape[y->ndim - 2] * y->shape[y->ndim - 1];
}

static void mft__matmul_backward(mft_context *ctx, mft__record *r)
{
    mft_tensor  *a = r->in[0], *b = r->in[1];
    int          d = a->ndim;
    int64_t      M = a->shape[d - 2], K = a->shape[d - 1], N = b->shape[d - 1], i, n_mats = mft_tensor_numel(a) / (M * K), oa, ob, oy;
    const float *dy = mft__dy(r);
    /* row strides of the gradients are their tensors'; a transposed one is written through its transpose */
    if (a->trainable) {
        float *da = mft__grad_add(ctx, a);
        if (!da) return;
        for (i = 0; i < n_mats; i++) {
            mft__matrix g, w;
            mft__matmul_each(ctx, a, b, r->y, i, &oa, &ob, &oy);
            g = mft__matrix_f32(dy + oy, N, 1);
            w = mft__matrix_f32((const float *)b->data + ob, b->stride[d - 1], b->stride[d - 2]);
            if (a->stride[d - 1] == 1) mft__product(ctx, M, K, N, 1, g, w, NULL, 1, da + oa, a->stride[d - 2]);
            else mft__product(ctx, K, M, N, 1, mft__matrix_f32((const float *)w.data, w.col_stride, w.row_stride),
                              mft__matrix_f32(dy + oy, 1, N), NULL, 1, da + oa, a->stride[d - 1]);
        }
    }
    if (b->trainable) {
        float *db = mft__grad_add(ctx, b);
        if (!db) return;
        for (i = 0; i < n_mats; i++) {
            mft__matrix x;
            mft__matmul_each(ctx, a, b, r->y, i, &oa, &ob, &oy);
            x = mft__matrix_f32((const float *)a->data + oa, a->stride[d - 2], a->stride[d - 1]);
            if (b->stride[d - 1] == 1) mft__product(ctx, K, N, M, 1, mft__matrix_f32((const float *)x.data, x.col_stride, x.row_stride),
                                                    mft__matrix_f32(dy + oy, N, 1), NULL, 1, db + ob, b->stride[d - 2]);
            else mft__product(ctx, N, K, M, 1, mft__matrix_f32(dy + oy, 1, N), x, NULL, 1, db + ob, b->stride[d - 1]);
        }
    }
}

/* f32, and dense along its last or last but one dimension? */
static int mft__is_matrix(const mft_tensor *t)
{
    return t->dtype == MFT_F32 && t->ndim >= 2 && (t->stride[t->ndim - 1] == 1 || t->stride[t->ndim - 2] == 1);
}

MFT_API mft_tensor *mft_matmul(mft_context *ctx, mft_tensor *a, mft_tensor *b)
{
    mft__mark   mark;
    mft_tensor *y;
    int64_t     shape[MFT_MAX_DIMS], M, K, N, i, oa, ob, oy;
    int         d, k, wants;
    if (!mft__op_inputs(ctx, "mft_matmul", ctx && mft__fresh(a) && mft__fresh(b))) return NULL;
    mark = mft__low_mark(ctx);
    if (!mft__is_matrix(a) || !mft__is_matrix(b) || a->ndim != b->ndim) return mft__op_shapes(ctx, "mft_matmul", a, b);
    d = a->ndim;
    for (k = 0; k < d - 2; k++) if (a->shape[k] != b->shape[k]) return mft__op_shapes(ctx, "mft_matmul", a, b);
    if (a->shape[d - 1] != b->shape[d - 2]) return mft__op_shapes(ctx, "mft_matmul", a, b);
    M = a->shape[d - 2]; K = a->shape[d - 1]; N = b->shape[d - 1];
    memcpy(shape, a->shape, sizeof shape);
    shape[d - 1] = N;
    if (!(y = mft__result(ctx, d, shape))) return NULL;
    wants  = mft__wants_grad(ctx, a);
    wants |= mft__wants_grad(ctx, b);
    if (wants && !mft__record_op(ctx, mark, y, mft__matmul_backward, a, b, NULL)) return NULL;
    for (i = 0; i < mft_tensor_numel(a) / (M * K); i++) {
        mft__matmul_each(ctx, a, b, y, i, &oa, &ob, &oy);
        mft__product(ctx, M, N, K, 1, mft__matrix_f32((const float *)a->data + oa, a->stride[d - 2], a->stride[d - 1]),
                     mft__matrix_f32((const float *)b->data + ob, b->stride[d - 2], b->stride[d - 1]), NULL, 0, (float *)y->data + oy, N);
    }
    return ctx->step_status == MFT_OK ? y : NULL;
}

/* linear and the low-rank linear share their parts.
 *   y = x w^T + bias          dx = dy w,  dw = dy^T x,  dbias = sum over rows of dy */

/* x as [rows, in]; NULL (the step failed) when w, bias do not fit it. */
static mft_tensor *mft__linear_input(mft_context *ctx, const char *op, mft_tensor *x, mft_tensor *w, mft_tensor *bias)
{
    if (w->ndim != 2 || !x->ndim || mft__cols(x) != w->shape[1]) return mft__op_shapes(ctx, op, x, w);
    if ((!mft__is_float(w->dtype) && !mft__is_quantized(w->dtype)) || (w->stride[0] != 1 && w->stride[1] != 1))
        return mft__op_shapes(ctx, op, w, NULL);
    if (bias && (bias->ndim != 1 || bias->shape[0] != w->shape[0] || !mft__plain(bias))) return mft__op_shapes(ctx, op, w, bias);
    if (w->trainable && !mft__is_master(w->dtype))
        return mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: a trainable weight must be f32 or bf16, not %s", op, mft_dtype_name(w->dtype)));
    return mft__plain_input(ctx, op, x);
}

static mft_tensor *mft__linear_result(mft_context *ctx, const mft_tensor *x, const mft_tensor *w)
{
    int64_t shape[MFT_MAX_DIMS];
    memcpy(shape, x->shape, sizeof shape);
    shape[x->ndim - 1] = w->shape[0];
    return mft__result(ctx, x->ndim, shape);
}

/* What comes on top, plus and tail, is added on the product's way out. */
static void mft__linear_forward(mft_context *ctx, const mft_tensor *x, const mft_tensor *w, const mft_tensor *bias, const mft_tensor *plus,
                                const mft__tail *tail, mft_tensor *y)
{
    int64_t in = w->shape[1], out = w->shape[0], rows = mft_tensor_numel(x) / in;
    if (!mft__need(ctx, w, 0, out * in)) return;
    mft__product_tailed(ctx, rows, out, in, 1, mft__matrix_f32((const float *)x->data, in, 1), mft__matrix_of(w->data, w->dtype, w->stride[1], w->stride[0]),
                        bias ? (const float *)bias->data : NULL, plus ? (const float *)plus->data : NULL, (float *)y->data, out, tail);
    mft__passed(ctx, w, 0, out * in);
}

/* tail: what else goes into dx */
static void mft__linear_gradients(mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias, const float *dy, const mft__tail *tail)
{
    int64_t in = w->shape[1], out = w->shape[0], rows = mft_tensor_numel(x) / in;
    int     add;
    if (w->trainable) {
        float *dw = mft__grad(ctx, w, &add);
        const float *xd = (const float *)x->data;
        if (!dw) return;
        if (w->stride[1] == 1) mft__product(ctx, out, in, rows, 1, mft__matrix_f32(dy, 1, out), mft__matrix_f32(xd, in, 1), NULL, add, dw, w->stride[0]);
        else                   mft__product(ctx, in, out, rows, 1, mft__matrix_f32(xd, 1, in), mft__matrix_f32(dy, out, 1), NULL, add, dw, w->stride[1]);
        if (w->grad) mft__passed(ctx, w->grad, 0, out * in);
    }
    if (bias && bias->trainable) mft__broadcast_sum(ctx, bias, dy, NULL, 1, rows);
    if (x->trainable) {
        float *dx = mft__grad(ctx, x, &add);
        if (dx && mft__need(ctx, w, 0, out * in))
            mft__product_tailed(ctx, rows, in, out, 1, mft__matrix_f32(dy, out, 1), mft__matrix_of(w->data, w->dtype, w->stride[0], w->stride[1]),
                                NULL, add ? dx : NULL, dx, in, tail);
        mft__passed(ctx, w, 0, out * in);
    }
}

static void mft__linear_backward(mft_context *ctx, mft__record *r)
{
    if (r->in[3] && r->in[3]->trainable) mft__pass_on(ctx, r->in[3], mft__dy(r), 1);
    mft__linear_gradients(ctx, r->in[0], r->in[1], r->in[2], mft__dy(r), NULL);
}

/* plus + x w^T + bias in one pass over y, and without a tensor for the product alone; plus, of y's shape, may be NULL. */
static mft_tensor *mft__linear_onto(mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias, mft_tensor *plus)
{
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    int          wants;
    if (!mft__op_inputs(ctx, "mft_linear", ctx && mft__fresh(x) && mft__fresh(w))) return NULL;
    mark = mft__low_mark(ctx);
    if (!(x = mft__linear_input(ctx, "mft_linear", x, w, bias)) || (plus && !(plus = mft__plain_input(ctx, "mft_linear", plus)))) return NULL;
    if (!(y = mft__linear_result(ctx, x, w))) return NULL;
    wants  = mft__wants_grad(ctx, x);
    wants |= mft__wants_grad(ctx, w);
    wants |= mft__wants_grad(ctx, bias);
    wants |= mft__wants_grad(ctx, plus);
    if (wants) {
        if (!(r = mft__record_op(ctx, mark, y, mft__linear_backward, x, w, bias))) return NULL;
        r->in[3] = plus;
    }
    if (!ctx->result_unread) mft__linear_forward(ctx, x, w, bias, plus, NULL, y);
    return ctx->step_status == MFT_OK ? y : NULL;
}

MFT_API mft_tensor *mft_linear(mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias) { return mft__linear_onto(ctx, x, w, bias, NULL); }

/* ---- embedding:  dtable[id] += dy, token by token in order; threads divide the columns ---- */
typedef struct mft__embedding_task {
    const mft__kernels *k;
    const mft_tensor   *table;
    const int32_t      *ids;
    float              *y;
    const float        *dy;
    int64_t             n;
    int32_t             padding_idx;
} mft__embedding_task;

static void mft__embedding_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__embedding_task *t = (const mft__embedding_task *)arg;
    int64_t i, cols = t->table->shape[1];
    (void)worker;
    for (i = begin; i < end; i++)
        t->k->to_float(t->y + i * cols, (const char *)t->table->data + mft_dtype_bytes(t->table->dtype, t->ids[i] * cols), t->table->dtype, cols);
}

static void mft__embedding_backward_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__embedding_task *t = (const mft__embedding_task *)arg;
    int64_t i, cols = t->table->shape[1];
    (void)worker;
    for (i = 0; i < t->n; i++)
        if (t->ids[i] != t->padding_idx)
            t->k->axpy(t->y + t->ids[i] * cols + begin, 1, t->dy + i * cols + begin, end - begin);
}

/* mft__need and mft__passed of single rows, at most MFT__PAGED_ROWS if they are to go behind their use: a mapped row brings its
 * neighbours into memory, 64 KB on Linux, from 6.18 on all of the page cache's piece (0.6 MB in the mean, of what was written
 * up to 2 MB, measured). */
static int mft__need_rows(mft_context *ctx, const mft_tensor *table, const int32_t *ids, int64_t n)
{
    int64_t i, cols = table->shape[1];
    for (i = 0; i < n; i++) if (!mft__need(ctx, table, ids[i] * cols, cols)) return 0;
    return 1;
}

static void mft__passed_rows(mft_context *ctx, const mft_tensor *table, const int32_t *ids, int64_t n)
{
    int64_t i, cols = table->shape[1];
    for (i = 0; i < n; i++) mft__passed(ctx, table, ids[i] * cols, cols);
}

static void mft__embedding_backward(mft_context *ctx, mft__record *r)
{
    mft__embedding_task t;
    int64_t cols, i, piece;
    t.k = ctx->kernels; t.table = r->in[0]; t.padding_idx = (int32_t)r->i[1];
    t.y = mft__grad_add(ctx, r->in[0]);
    if (!t.y || !MFT__RUNS(ctx)) return;
    cols  = t.table->shape[1];
    piece = mft__drops_behind(ctx, t.table->grad) ? (int64_t)MFT__PAGED_ROWS : r->i[0];
    for (i = 0; i < r->i[0]; i += piece) {
        t.ids = (const int32_t *)r->p[0] + i; t.dy = mft__dy(r) + i * cols; t.n = mft__min(r->i[0] - i, piece);
        mft__parallel(ctx, cols, 128, mft__embedding_backward_run, &t);
        mft__passed_rows(ctx, t.table->grad, t.ids, t.n);
    }
}

MFT_API mft_tensor *mft_embedding(mft_context *ctx, mft_tensor *table, const int32_t *ids, int64_t batch, int64_t seq, int32_t padding_idx)
{
    mft__embedding_task t;
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    int64_t      shape[3], i, piece;
    if (!mft__op_inputs(ctx, "mft_embedding", ctx && mft__fresh(table) && ids)) return NULL;
    if (table->ndim != 2 || !mft__is_contiguous(table) || (table->trainable && !mft__is_master(table->dtype))
        || (!mft__is_float(table->dtype) && !mft__is_quantized(table->dtype))) return mft__op_shapes(ctx, "mft_embedding", table, NULL);
    if (batch < 1 || seq < 1 || batch > ((int64_t)1 << 56) / seq)
        return mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_embedding: there is no batch of %lld sequences of %lld tokens", (long long)batch, (long long)seq));
    for (i = 0; i < batch * seq; i++)
        if (ids[i] < 0 || ids[i] >= table->shape[0])
            return mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "token %lld of sequence %lld has id %ld, outside the %lld rows of the embedding%s%s",
                                  (long long)(i % seq), (long long)(i / seq), (long)ids[i], (long long)table->shape[0], table->name ? " " : "", table->name ? table->name : ""));
    mark = mft__low_mark(ctx);
    shape[0] = batch; shape[1] = seq; shape[2] = table->shape[1];
    if (!(y = mft__result(ctx, 3, shape))) return NULL;
    if (mft__wants_grad(ctx, table)) {
        if (!(r = mft__record_op(ctx, mark, y, mft__embedding_backward, table, NULL, NULL))) return NULL;
        r->p[0] = ids; r->i[0] = batch * seq; r->i[1] = padding_idx;
    }
    t.k = ctx->kernels; t.table = table; t.dy = NULL; t.n = batch * seq; t.padding_idx = padding_idx;
    piece = ctx->drop_pages ? (int64_t)MFT__PAGED_ROWS : t.n;
    for (i = 0; MFT__RUNS(ctx) && i < t.n; i += piece) {
        if (!mft__need_rows(ctx, table, ids + i, mft__min(t.n - i, piece))) return NULL;
        t.ids = ids + i; t.y = (float *)y->data + i * shape[2];
        mft__parallel(ctx, mft__min(t.n - i, piece), MFT__ROW_GRAIN, mft__embedding_run, &t);
        mft__passed_rows(ctx, table, t.ids, mft__min(t.n - i, piece));
    }
    return y;
}

/* ---- norms: see [KERNEL] for one row of each; here rows, and sums over rows in fixed pieces ---- */
typedef struct mft__norm_rows {
    const mft__kernels *k;
    int          layer;                     /* layer norm, else rms norm                             */
    float       *y, *dx, *dw, *db;          /* dw, db: [pieces, cols], one a piece of rows           */
    float       *stats;                     /* [rows] r, or [rows, 2] mean and r                     */
    const float *x, *w, *b, *dy;
    float        offset, eps;
    int64_t      cols;
    int          add;                       /* into dx */
} mft__norm_rows;

static void mft__norm_forward_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__norm_rows *t = (const mft__norm_rows *)arg;
    int64_t i;
    (void)worker;
    for (i = begin; i < end; i++) {
        const float *x = t->x + i * t->cols;
        float       *y = t->y + i * t->cols, mean, r;
        if (t->layer) {
            r = t->k->layer_norm(y, x, t->w, t->b, t->eps, t->cols, &mean);
            if (t->stats) { t->stats[2 * i] = mean; t->stats[2 * i + 1] = r; }
        } else {
            r = t->k->rms_norm(y, x, t->w, t->offset, t->eps, t->cols);
            if (t->stats) t->stats[i] = r;
        }
    }
}

static void mft__norm_backward_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__norm_rows *t = (const mft__norm_rows *)arg;
    int64_t i, piece = begin / MFT__ROW_GRAIN;
    float  *dw = t->dw ? t->dw + piece * t->cols : NULL, *db = t->db ? t->db + piece * t->cols : NULL;
    (void)worker;
    if (dw) memset(dw, 0, (size_t)t->cols * sizeof *dw);
    if (db) memset(db, 0, (size_t)t->cols * sizeof *db);
    for (i = begin; i < end; i++) {
        const float *x = t->x + i * t->cols, *dy = t->dy + i * t->cols;
        float       *dx = t->dx ? t->dx + i * t->cols : NULL;
        if (t->layer) t->k->layer_norm_backward(dx, dw, db, dy, x, t->w, t->stats[2 * i], t->stats[2 * i + 1], t->cols, t->add);
        else          t->k->rms_norm_backward(dx, dw, dy, x, t->w, t->offset, t->stats[i], t->cols, t->add);
    }
}

/* Adds the pieces' sums into t's gradient, in order. */
static void mft__add_pieces(mft_context *ctx, mft_tensor *t, const float *pieces, int64_t n_pieces)
{
    float  *g = mft__grad_add(ctx, t);
    int64_t i, cols = mft_tensor_numel(t);
    if (g && MFT__RUNS(ctx)) for (i = 0; i < n_pieces; i++) ctx->kernels->axpy(g, 1, pieces + i * cols, cols);
}

static void mft__norm_backward(mft_context *ctx, mft__record *r)
{
    mft_tensor    *x = r->in[0], *w = r->in[1], *b = r->in[2];
    mft__norm_rows t;
    int64_t        rows, pieces;
    size_t         bytes;
    memset(&t, 0, sizeof t);
    t.k = ctx->kernels; t.layer = (int)r->i[0]; t.cols = mft__cols(x);
    t.x = (const float *)x->data; t.w = (const float *)w->data; t.dy = mft__dy(r);
    t.stats = r->saved; t.offset = r->f[0];
    rows = mft_tensor_numel(x) / t.cols;
    pieces = (rows + MFT__ROW_GRAIN - 1) / MFT__ROW_GRAIN;
    bytes  = (size_t)(pieces * t.cols) * sizeof(float);
    if (x->trainable && !(t.dx = mft__grad(ctx, x, &t.add))) return;
    if (w->trainable && !(t.dw = (float *)mft__high(ctx, bytes))) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
    if (b && b->trainable && !(t.db = (float *)mft__high(ctx, bytes))) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
    if (MFT__RUNS(ctx)) mft__parallel(ctx, rows, MFT__ROW_GRAIN, mft__norm_backward_run, &t);
    if (t.dw) mft__add_pieces(ctx, w, t.dw, pieces);
    if (t.db) mft__add_pieces(ctx, b, t.db, pieces);
    mft__high_free(ctx, t.db, bytes);
    mft__high_free(ctx, t.dw, bytes);
}

static mft_tensor *mft__norm_op(mft_context *ctx, const char *op, int layer, mft_tensor *x, mft_tensor *w, mft_tensor *b, float offset, float eps)
{
    mft__norm_rows t;
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    int64_t      rows;
    int          wants;
    if (!mft__op_inputs(ctx, op, ctx && mft__fresh(x) && mft__fresh(w))) return NULL;
    if (w->ndim != 1 || !mft__plain(w) || !x->ndim || mft__cols(x) != w->shape[0]) return mft__op_shapes(ctx, op, x, w);
    if (b && (!mft__same_shape(w, b) || !mft__plain(b))) return mft__op_shapes(ctx, op, w, b);
    mark = mft__low_mark(ctx);
    if (!(x = mft__plain_input(ctx, op, x)) || !(y = mft__result(ctx, x->ndim, x->shape))) return NULL;
    memset(&t, 0, sizeof t);
    t.k = ctx->kernels; t.layer = layer; t.cols = mft__cols(x); t.offset = offset; t.eps = eps;
    t.x = (const float *)x->data; t.w = (const float *)w->data; t.b = b ? (const float *)b->data : NULL; t.y = (float *)y->data;
    rows = mft_tensor_numel(x) / t.cols;
    wants  = mft__wants_grad(ctx, x);
    wants |= mft__wants_grad(ctx, w);
    wants |= mft__wants_grad(ctx, b);
    if (wants) {
        t.stats = (float *)mft__low(ctx, (size_t)rows * (layer ? 2 : 1) * sizeof(float));
        if (!t.stats) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
        if (!(r = mft__record_op(ctx, mark, y, mft__norm_backward, x, w, b))) return NULL;
        r->saved = t.stats; r->i[0] = layer; r->f[0] = offset;
    }
    if (MFT__RUNS(ctx)) mft__parallel(ctx, rows, MFT__ROW_GRAIN, mft__norm_forward_run, &t);
    return y;
}

MFT_API mft_tensor *mft_layer_norm(mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias, float eps)
{
    return mft__norm_op(ctx, "mft_layer_norm", 1, x, w, bias, 0, eps);
}

MFT_API mft_tensor *mft_rms_norm(mft_context *ctx, mft_tensor *x, mft_tensor *w, float offset, float eps)
{
    return mft__norm_op(ctx, "mft_rms_norm", 0, x, w, NULL, offset, eps);
}

/* ---- rope: the backward pass turns the other way ---- */
typedef struct mft__rope_task {
    const mft__kernels *k;
    const mft_tensor   *x;                  /* [B, T, heads, D], any strides but the last          */
    float              *strided, *packed;   /* numbers with x's strides; contiguous ones            */
    const int32_t      *positions;
    const float        *inv_freq;
    float               scale;
    int                 backward, add;
} mft__rope_task;

static void mft__rope_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__rope_task *t = (const mft__rope_task *)arg;
    int64_t seq = t->x->shape[1], heads = t->x->shape[2], d = t->x->shape[3], half = d / 2, i, h;
    float   angle[256], c[256], s[256];     /* head_dim up to 512: the constructor checks */
    (void)worker;
    for (i = begin; i < end; i++) {
        float position = (float)(t->positions ? t->positions[i] : (int32_t)(i % seq));
        t->k->scale(angle, position, t->inv_freq, half);        /* rounded to f32 on purpose: as Transformers has it */
        t->k->cos_sin(c, s, angle, half);
        if (t->scale != 1) t->k->scale(c, t->scale, c, half);
        if (t->scale != 1 || t->backward) t->k->scale(s, t->backward ? -t->scale : t->scale, s, half);
        for (h = 0; h < heads; h++) {
            float *a = t->strided + i / seq * t->x->stride[0] + i % seq * t->x->stride[1] + h * t->x->stride[2];
            float *b = t->packed + (i * heads + h) * d;
            if (t->backward) t->k->rope(a, b, c, s, half, t->add);
            else             t->k->rope(b, a, c, s, half, 0);
        }
    }
}

static void mft__rope_do(mft_context *ctx, mft__rope_task *t)
{
    if (MFT__RUNS(ctx)) mft__parallel(ctx, t->x->shape[0] * t->x->shape[1], MFT__ROW_GRAIN, mft__rope_run, t);
}

static void mft__rope_backward(mft_context *ctx, mft__record *r)
{
    mft__rope_task t;
    t.k = ctx->kernels; t.x = r->in[0]; t.packed = (float *)(uintptr_t)mft__dy(r);
    t.positions = (const int32_t *)r->p[0]; t.inv_freq = (const float *)r->p[1];
    t.scale = r->f[0]; t.backward = 1;
    t.strided = mft__grad(ctx, r->in[0], &t.add);
    if (t.strided) mft__rope_do(ctx, &t);
}

MFT_API mft_tensor *mft_rope(mft_context *ctx, mft_tensor *x, const int32_t *positions, const float *inv_freq, float scale)
{
    mft__rope_task t;
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    if (!mft__op_inputs(ctx, "mft_rope", ctx && mft__fresh(x) && inv_freq)) return NULL;
    if (x->ndim != 4 || x->dtype != MFT_F32 || x->stride[3] != 1 || x->shape[3] % 2 || x->shape[3] > 512) return mft__op_shapes(ctx, "mft_rope", x, NULL);
    mark = mft__low_mark(ctx);
    if (!(y = mft__result(ctx, 4, x->shape))) return NULL;
    if (scale == 0) scale = 1;
    if (mft__wants_grad(ctx, x)) {
        if (!(r = mft__record_op(ctx, mark, y, mft__rope_backward, x, NULL, NULL))) return NULL;
        r->p[0] = positions; r->p[1] = inv_freq; r->f[0] = scale;
    }
    t.k = ctx->kernels; t.x = x; t.strided = (float *)x->data; t.packed = (float *)y->data;
    t.positions = positions; t.inv_freq = inv_freq; t.scale = scale; t.backward = t.add = 0;
    mft__rope_do(ctx, &t);
    return y;
}

/* ---- attention (Dao et al. 2022, alg. 1) ----
 *   forward: a block of queries lies in the lanes of vectors, q turned into panels [D][lanes]; for each tile of
 *   keys, k panel gives scores [key][lane], of which maximum and sum run lane by lane, without a sum across
 *   lanes; v^T times the weights is added to out^T [D][lane]. All products are strips of [KERNEL].
 *   Kept are out and lse = m + log l. With p = exp(score - lse), D = <dout, out>:
 *     dv[s] += p dout[t]     ds = p (<dout[t], v[s]> - D) scale     dq[t] += ds k[s]     dk[s] += ds q[t]
 *   Two passes recompute p: one with queries in the lanes for dq, one with keys in the lanes for dk and dv, so
 *   that each number has one writer and the order of its sum is fixed, also when a single key head serves
 *   all query heads: the queries of a group's heads are rows of one list. */
static mft__heads mft__heads_of(float *p, const mft_tensor *layout)
{
    mft__heads h;
    h.p = p; h.batch = layout->stride[0]; h.token = layout->stride[1]; h.head = layout->stride[2];
    return h;
}

/* What both directions know of the shapes and options. */
static mft__attention_job mft__attention_of(mft_context *ctx, const mft_tensor *q, const mft_tensor *k, const mft_tensor *v,
                                            const mft_tensor *out, const mft_attention_desc *d)
{
    mft__attention_job a;
    memset(&a, 0, sizeof a);
    a.strip = ctx->kernels->gemm[MFT_PRECISION_F32]->strip;
    a.q = mft__heads_of((float *)q->data, q); a.k   = mft__heads_of((float *)k->data, k);
    a.v = mft__heads_of((float *)v->data, v); a.out = mft__heads_of((float *)out->data, out);
    a.B = q->shape[0]; a.T = q->shape[1]; a.D = q->shape[3];
    a.S = k->shape[1]; a.n_kv_head = k->shape[2]; a.G = q->shape[2] / a.n_kv_head;
    a.scale = d->scale != 0 ? d->scale : (float)(1 / sqrt((double)a.D));
    a.window = d->window; a.softcap = d->softcap; a.first_key = d->first_key;
    return a;
}

/* One pass over all blocks of `rows` rows in lanes, `panels` panels of [D][lanes] and `tiles` of scores for
 * each worker. 0 if its workspace is not to be had. */
static int mft__attention_pass(mft_context *ctx, mft__attention_job *a, int64_t rows, int panels, int tiles, mft__task task)
{
    int64_t lanes = ctx->kernels->gemm[MFT_PRECISION_F32]->lanes, n;
    size_t  floats = (size_t)(lanes * (panels * MFT__ATT_PANELS * mft__round_up(a->D, MFT__TILE_ROWS) + tiles * MFT__SEEN_TILE)
                              + 2 * (1 + (a->D - 1) / MFT__KC) * MFT__COPY), bytes;
    a->blocks = (rows - 1) / (lanes * MFT__ATT_PANELS) + 1;
    n = a->B * a->n_kv_head * a->blocks;
    a->scratch_bytes = mft__round64(sizeof(float) * floats);
    bytes = a->scratch_bytes * (size_t)(n == 1 ? 1 : ctx->n_threads);
    if (!(a->scratch = (char *)mft__high(ctx, bytes))) return 0;
    if (MFT__RUNS(ctx)) mft__parallel(ctx, n, 1, task, a);
    mft__high_free(ctx, a->scratch, bytes);
    return 1;
}

static void mft__attention_backward(mft_context *ctx, mft__record *r)
{
    mft_tensor *q = r->in[0], *k = r->in[1], *v = r->in[2];
    mft_attention_desc d;
    mft__attention_job a;
    size_t             bytes;
    int                ok;
    d.scale = r->f[0]; d.softcap = r->f[1]; d.window = (int)r->i[0]; d.first_key = (const int32_t *)r->p[0];
    a = mft__attention_of(ctx, q, k, v, r->y, &d);
    a.lse  = r->saved;
    a.dout = mft__heads_of((float *)r->y->grad->data, r->y);
    a.dq = a.q; a.dk = a.k; a.dv = a.v;                         /* a gradient has its tensor's strides */
    a.dq.p = a.dk.p = a.dv.p = NULL;
    if (q->trainable && !(a.dq.p = mft__grad(ctx, q, &a.add_q))) return;
    if (k->trainable && !(a.dk.p = mft__grad(ctx, k, &a.add_k))) return;
    if (v->trainable && !(a.dv.p = mft__grad(ctx, v, &a.add_v))) return;
    bytes = (size_t)(a.B * a.n_kv_head * a.G * a.T) * sizeof(float);
    if (!(a.delta = (float *)mft__high(ctx, bytes))) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
    ok = mft__attention_pass(ctx, &a, a.T * a.G, 3, 2, ctx->kernels->attention_dq)
      && (!(a.dk.p || a.dv.p) || mft__attention_pass(ctx, &a, a.S, 4, 2, ctx->kernels->attention_dkv));
    if (!ok) mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    mft__high_free(ctx, a.delta, bytes);
}

MFT_API mft_tensor *mft_attention(mft_context *ctx, mft_tensor *q, mft_tensor *k, mft_tensor *v, const mft_attention_desc *desc)
{
    mft_attention_desc d;
    mft__attention_job a;
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    int          wants;
    if (!mft__op_inputs(ctx, "mft_attention", ctx && mft__fresh(q) && mft__fresh(k) && mft__fresh(v))) return NULL;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    if (q->ndim != 4 || k->ndim != 4 || q->dtype != MFT_F32 || k->dtype != MFT_F32 || q->stride[3] != 1 || k->stride[3] != 1
        || q->shape[0] != k->shape[0] || q->shape[3] != k->shape[3] || k->shape[1] < q->shape[1] || q->shape[2] % k->shape[2]
        || q->shape[3] > MFT__MAX_HEAD_DIM) return mft__op_shapes(ctx, "mft_attention", q, k);
    if (!mft__same_shape(k, v) || v->dtype != MFT_F32 || v->stride[3] != 1) return mft__op_shapes(ctx, "mft_attention", k, v);
    mark = mft__low_mark(ctx);
    if (!(y = mft__result(ctx, 4, q->shape))) return NULL;
    a = mft__attention_of(ctx, q, k, v, y, &d);
    wants  = mft__wants_grad(ctx, q);
    wants |= mft__wants_grad(ctx, k);
    wants |= mft__wants_grad(ctx, v);
    if (wants) {
        a.lse = (float *)mft__low(ctx, (size_t)(a.B * q->shape[2] * a.T) * sizeof(float));
        if (!a.lse) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
        if (!(r = mft__record_op(ctx, mark, y, mft__attention_backward, q, k, v))) return NULL;
        r->saved = a.lse; r->f[0] = a.scale; r->f[1] = a.softcap; r->i[0] = a.window; r->p[0] = a.first_key;
    }
    if (!mft__attention_pass(ctx, &a, a.T * a.G, 2, 1, ctx->kernels->attention)) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    return y;
}

/* ==============================================================================
 * MARK: - [LORA] y = x w^T + bias + scale u b^T,  u = dropout(x) a^T
 *
 *   with g = scale dy b:   da = g^T dropout(x),  db = scale dy^T u,  dx = dy w + dropout'(g a)
 * ============================================================================== */
static mft__tail mft__tail_of(const float *a, const float *b, int64_t b_row_stride, int64_t b_col_stride, int64_t k, float scale)
{
    mft__tail t;
    t.a = mft__matrix_f32(a, k, 1); t.b = mft__matrix_f32(b, b_row_stride, b_col_stride); t.k = k; t.scale = scale;
    return t;
}

static void mft__lora_backward(mft_context *ctx, mft__record *rec)
{
    mft_tensor *x = rec->in[0], *w = rec->in[1], *bias = rec->in[2], *a = rec->in[3], *b = rec->in[4];
    int64_t     in = w->shape[1], out = w->shape[0], rank = a->shape[0], rows = mft_tensor_numel(x) / in;
    const float *dy = mft__dy(rec), *ad = (const float *)a->data, *bd = (const float *)b->data;
    float       scale = rec->f[0], p = rec->f[1], *g, *xd = (float *)x->data, *grad;
    size_t      g_bytes = (size_t)(rows * rank) * sizeof(float), x_bytes = (size_t)(rows * in) * sizeof(float);
    int         add;
    mft__tail   tail;

    if (rec->in[5] && rec->in[5]->trainable) mft__pass_on(ctx, rec->in[5], dy, 1);
    if (b->trainable && (grad = mft__grad(ctx, b, &add)) != NULL)
        mft__product(ctx, out, rank, rows, scale, mft__matrix_f32(dy, 1, out), mft__matrix_f32(rec->saved, rank, 1), NULL, add, grad, rank);
    if (!(g = (float *)mft__high(ctx, g_bytes))) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
    mft__product(ctx, rows, rank, out, scale, mft__matrix_f32(dy, out, 1), mft__matrix_f32(bd, rank, 1), NULL, 0, g, rank);
    tail = mft__tail_of(g, ad, in, 1, rank, 1);
    mft__linear_gradients(ctx, x, w, bias, dy, p > 0 ? NULL : &tail);
    if (a->trainable) {
        if (p > 0) {
            if (!(xd = (float *)mft__high(ctx, x_bytes))) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
            mft__dropout_do(ctx, xd, (const float *)x->data, rows * in, p, (uint64_t)rec->i[0], 0);
        }
        if ((grad = mft__grad(ctx, a, &add)) != NULL)
            mft__product(ctx, rank, in, rows, 1, mft__matrix_f32(g, 1, rank), mft__matrix_f32(xd, in, 1), NULL, add, grad, in);
        if (p > 0) mft__high_free(ctx, xd, x_bytes);
    }
    if (p > 0 && x->trainable && (grad = mft__grad_add(ctx, x)) != NULL) {
        float *t = (float *)mft__high(ctx, x_bytes);
        if (!t) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
        mft__product(ctx, rows, in, rank, 1, tail.a, tail.b, NULL, 0, t, in);
        mft__dropout_do(ctx, grad, t, rows * in, p, (uint64_t)rec->i[0], 1);
        mft__high_free(ctx, t, x_bytes);
    }
    mft__high_free(ctx, g, g_bytes);
}

/* The same on top of plus, see mft__linear_onto. */
static mft_tensor *mft__lora_linear_onto(mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias,
                                         mft_tensor *a, mft_tensor *b, float scale, float dropout, mft_tensor *plus)
{
    mft__mark    mark;
    mft__record *rec;
    mft_tensor  *y;
    float       *u, *xd;
    int64_t      in, out, rank, rows;
    uint64_t     stream = 0;
    size_t       x_bytes;
    int          wants, drops;
    mft__tail    tail;
    if (!mft__op_inputs(ctx, "mft_lora_linear", ctx && mft__fresh(x) && mft__fresh(w) && mft__fresh(a) && mft__fresh(b))) return NULL;
    mark = mft__low_mark(ctx);
    if (!(x = mft__linear_input(ctx, "mft_lora_linear", x, w, bias)) || (plus && !(plus = mft__plain_input(ctx, "mft_lora_linear", plus)))) return NULL;
    in = w->shape[1]; out = w->shape[0]; rows = mft_tensor_numel(x) / in;
    if (a->ndim != 2 || !mft__plain(a) || a->shape[1] != in) return mft__op_shapes(ctx, "mft_lora_linear", w, a);
    rank = a->shape[0];
    if (b->ndim != 2 || !mft__plain(b) || b->shape[0] != out || b->shape[1] != rank) return mft__op_shapes(ctx, "mft_lora_linear", w, b);
    if (!(y = mft__linear_result(ctx, x, w))) return NULL;
    wants  = mft__wants_grad(ctx, x);
    wants |= mft__wants_grad(ctx, w);
    wants |= mft__wants_grad(ctx, bias);
    wants |= mft__wants_grad(ctx, a);
    wants |= mft__wants_grad(ctx, b);
    wants |= mft__wants_grad(ctx, plus);
    /* u is kept for db; without a record it is only passing through */
    u = (float *)(wants ? mft__low(ctx, (size_t)(rows * rank) * sizeof(float)) : mft__high(ctx, (size_t)(rows * rank) * sizeof(float)));
    if (!u) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    drops = mft__drops(ctx, dropout);
    if (drops) stream = mft__draw_stream(ctx);
    if (wants) {
        if (!(rec = mft__record_op(ctx, mark, y, mft__lora_backward, x, w, bias))) return NULL;
        rec->in[3] = a; rec->in[4] = b; rec->in[5] = plus; rec->saved = u;
        rec->f[0] = scale; rec->f[1] = drops ? dropout : 0; rec->i[0] = (int64_t)stream;
    }
    xd = (float *)x->data; x_bytes = (size_t)(rows * in) * sizeof(float);
    if (drops) {
        if (!(xd = (float *)mft__high(ctx, x_bytes))) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
        mft__dropout_do(ctx, xd, (const float *)x->data, rows * in, dropout, stream, 0);
    }
    mft__product(ctx, rows, rank, in, 1, mft__matrix_f32(xd, in, 1), mft__matrix_f32((const float *)a->data, 1, in), NULL, 0, u, rank);
    if (drops) mft__high_free(ctx, xd, x_bytes);
    tail = mft__tail_of(u, (const float *)b->data, 1, rank, rank, scale);
    if (!ctx->result_unread) mft__linear_forward(ctx, x, w, bias, plus, &tail, y);
    if (!wants) mft__high_free(ctx, u, (size_t)(rows * rank) * sizeof(float));
    return ctx->step_status == MFT_OK ? y : NULL;
}

MFT_API mft_tensor *mft_lora_linear(mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias,
                                    mft_tensor *a, mft_tensor *b, float scale, float dropout)
{
    return mft__lora_linear_onto(ctx, x, w, bias, a, b, scale, dropout, NULL);
}

/* ---- DoRA ---- */
enum { MFT__DORA_ROWS = 64 };

/* norm[o] = |w[o,:] + scale (b a)[o,:]|, a few rows at a time; b NULL: of w alone. 0: the step failed. */
static int mft__row_norms(mft_context *ctx, const mft_tensor *w, const float *a, const float *b, int64_t rank, float scale, float *norm)
{
    int64_t out = w->shape[0], in = w->shape[1], o, i, c;
    size_t  bytes = (size_t)(MFT__DORA_ROWS * in) * sizeof(float), size = mft_dtype_bytes(w->dtype, 1);
    float  *sum = (float *)mft__high(ctx, bytes), *row = (float *)mft__high(ctx, (size_t)in * sizeof(float));
    if (!sum || !row) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return 0; }
    if (!mft__need(ctx, w, 0, out * in)) return 0;
    for (o = 0; o < out; o += MFT__DORA_ROWS) {
        int64_t n = mft__min(out - o, MFT__DORA_ROWS);
        if (b) mft__product(ctx, n, in, rank, scale, mft__matrix_f32(b + o * rank, rank, 1), mft__matrix_f32(a, in, 1), NULL, 0, sum, in);
        else if (MFT__RUNS(ctx)) memset(sum, 0, bytes);
        for (i = 0; i < n && MFT__RUNS(ctx); i++) {
            if (w->stride[1] == 1) ctx->kernels->to_float(row, (const char *)w->data + mft_dtype_bytes(w->dtype, (o + i) * w->stride[0]), w->dtype, in);
            else for (c = 0; c < in; c++)
                ctx->kernels->to_float(row + c, (const char *)w->data + size * (size_t)((o + i) + c * w->stride[1]), w->dtype, 1);
            ctx->kernels->add(row, row, sum + i * in, in);
            norm[o + i] = (float)sqrt(ctx->kernels->sum_squares(row, in));
        }
    }
    mft__passed(ctx, w, 0, out * in);
    mft__high_free(ctx, row, (size_t)in * sizeof(float));
    mft__high_free(ctx, sum, bytes);
    return ctx->step_status == MFT_OK;
}

MFT_API mft_tensor *mft_dora_linear(mft_context *ctx, mft_tensor *x, mft_tensor *w, mft_tensor *bias,
                                    mft_tensor *a, mft_tensor *b, mft_tensor *magnitude, float scale, float dropout)
{
    mft_tensor *inverse, *gain, *dropped, *y;
    int64_t     i;
    if (!mft__op_inputs(ctx, "mft_dora_linear", ctx && mft__fresh(x) && mft__fresh(w) && mft__fresh(a) && mft__fresh(b) && mft__fresh(magnitude))) return NULL;
    if (w->ndim != 2 || magnitude->ndim != 1 || magnitude->shape[0] != w->shape[0] || (mft__is_quantized(w->dtype) && w->stride[1] != 1)) return mft__op_shapes(ctx, "mft_dora_linear", w, magnitude);
    if (a->ndim != 2 || b->ndim != 2 || !mft__plain(a) || !mft__plain(b) || a->shape[1] != w->shape[1] || b->shape[0] != w->shape[0]
        || b->shape[1] != a->shape[0]) return mft__op_shapes(ctx, "mft_dora_linear", a, b);
    if (!(inverse = mft__result(ctx, 1, magnitude->shape))) return NULL;
    if (!mft__row_norms(ctx, w, (const float *)a->data, (const float *)b->data, a->shape[0], scale, (float *)inverse->data)) return NULL;
    if (MFT__RUNS(ctx)) for (i = 0; i < w->shape[0]; i++) ((float *)inverse->data)[i] = 1 / ((float *)inverse->data)[i];
    gain    = mft_mul(ctx, magnitude, inverse);
    dropped = mft_dropout(ctx, x, dropout);
    y = mft_mul(ctx, mft_lora_linear(ctx, dropped, w, NULL, a, b, scale, 0), gain);
    if (dropped != x) y = mft_add(ctx, y, mft_sub(ctx, mft_linear(ctx, x, w, NULL), mft_linear(ctx, dropped, w, NULL)));
    return bias ? mft_add(ctx, y, bias) : y;
}

/* ==============================================================================
 * MARK: - [LOSS] Cross-entropy, whole and fused with the head
 *
 *   loss = sum over counted rows of (lse - logit[label]) / n,   dlogits = (softmax - onehot) dy / n
 *   lse = high + log(sum exp(logit - high)) is kept as its two parts: rounded to one float it would put an
 *   error of 6e-8 lse into every softmax (9e-6 of the gradient where logits reach 100, measured)
 * ============================================================================== */

/* Rows whose label counts; *rows gets their numbers. -1: the step failed, also when no row counts, unless
 * n_valid says that this is a part of something larger. */
static int64_t mft__labelled_rows(mft_context *ctx, const char *op, const int32_t *labels, int64_t n, int64_t vocab, int64_t n_valid, int32_t **rows)
{
    int64_t i, count = 0;
    for (i = 0; i < n; i++) {
        if (labels[i] == -100) continue;
        if (labels[i] < 0 || labels[i] >= vocab) {
            mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: label %lld is %ld, outside the vocabulary of %lld",
                                          op, (long long)i, (long)labels[i], (long long)vocab));
            return -1;
        }
        count++;
    }
    if (!count && n_valid <= 0) {
        mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "%s: every label is -100: there is nothing to learn from", op));
        return -1;
    }
    *rows = (int32_t *)mft__meta(ctx, (size_t)count * sizeof **rows);   /* real memory, also while planning */
    if (!*rows) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return -1; }
    for (i = count = 0; i < n; i++) if (labels[i] != -100) (*rows)[count++] = (int32_t)i;
    return count;
}

typedef struct mft__xent_task {
    const mft__kernels *k;
    const int32_t *rows, *labels;
    const float   *logits;                  /* [.., V] for the whole op, a tile [count, tile] for the fused one */
    float         *out, *high, *sum, *label_logit;      /* of each row: the greatest logit, sum of exp(logit - high) */
    int64_t        vocab, tile_begin, pitch;        /* pitch, fused: from a row of the tile to the next */
    float          s, softcap;
    int64_t        most;                    /* fused: rows of x. Memory at the high end is taken for all of them,
                                               so that it lies where the plan laid it, however many count      */
    const mft_tensor *w;                    /* the head, and what is kept for the gradient in x:              */
    float         *dx;                      /* NULL, or sum of exp(logit - high) w, [count, H]                */
} mft__xent_task;

static void mft__xent_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__xent_task *t = (const mft__xent_task *)arg;
    float   part[256];
    int64_t i, c;
    (void)worker;
    for (i = begin; i < end; i++) {
        const float *x = t->logits + t->rows[i] * t->vocab;
        float        high = t->k->max(x, t->vocab);
        double       sum = 0;
        for (c = 0; c < t->vocab; c += 256) sum += t->k->exp_sum(part, x + c, high, mft__min(t->vocab - c, 256));
        t->high[i] = high; t->sum[i] = (float)sum;
    }
}

static void mft__xent_backward_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__xent_task *t = (const mft__xent_task *)arg;
    float   p[256];
    int64_t i, c;
    (void)worker;
    for (i = begin; i < end; i++) {
        const float *x = t->logits + t->rows[i] * t->vocab;
        float       *dx = t->out + t->rows[i] * t->vocab;
        for (c = 0; c < t->vocab; c += 256) {
            int64_t n = mft__min(t->vocab - c, 256);
            t->k->exp_sum(p, x + c, t->high[i], n);
            t->k->axpy(dx + c, t->s / t->sum[i], p, n);
        }
        dx[t->labels[t->rows[i]]] -= t->s;
    }
}

static void mft__xent_backward(mft_context *ctx, mft__record *r)
{
    mft__xent_task t;
    memset(&t, 0, sizeof t);
    t.k = ctx->kernels; t.labels = (const int32_t *)r->p[0]; t.rows = (const int32_t *)r->p[1];
    t.logits = (const float *)r->in[0]->data; t.vocab = mft__cols(r->in[0]);
    t.high = r->saved; t.sum = r->saved + r->i[0];
    if (!(t.out = mft__grad_add(ctx, r->in[0])) || !MFT__RUNS(ctx)) return;
    t.s = *mft__dy(r) * r->f[0];
    mft__parallel(ctx, r->i[0], MFT__ROW_GRAIN, mft__xent_backward_run, &t);
}

/* The mean of lse - logit[label]: in double, in the order of the rows. */
static float mft__xent_mean(const float *high, const float *row_sum, const float *label_logit, int64_t n, float s)
{
    double  sum = 0;
    int64_t i;
    for (i = 0; i < n; i++) sum += (double)high[i] - (double)label_logit[i] + log((double)row_sum[i]);
    return (float)(sum * (double)s);
}

MFT_API mft_tensor *mft_cross_entropy(mft_context *ctx, mft_tensor *logits, const int32_t *labels, int64_t n_valid)
{
    mft__xent_task t;
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    int32_t     *rows;
    int64_t      n, i;
    double       sum = 0;
    if (!mft__op_inputs(ctx, "mft_cross_entropy", ctx && mft__fresh(logits) && labels)) return NULL;
    mark = mft__low_mark(ctx);
    if (!logits->ndim) return mft__op_shapes(ctx, "mft_cross_entropy", logits, NULL);
    if (!(logits = mft__plain_input(ctx, "mft_cross_entropy", logits)) || !(y = mft__result(ctx, 0, NULL))) return NULL;
    memset(&t, 0, sizeof t);
    t.k = ctx->kernels; t.labels = labels; t.vocab = mft__cols(logits); t.logits = (const float *)logits->data;
    n = mft__labelled_rows(ctx, "mft_cross_entropy", labels, mft_tensor_numel(logits) / t.vocab, t.vocab, n_valid, &rows);
    if (n < 0) return NULL;
    t.rows = rows;
    t.high = (float *)mft__low(ctx, (size_t)n * 2 * sizeof(float));
    if (!t.high) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    t.sum = t.high + n;
    t.s = (float)(1.0 / (double)(n_valid > 0 ? n_valid : n));
    if (mft__wants_grad(ctx, logits)) {
        if (!(r = mft__record_op(ctx, mark, y, mft__xent_backward, logits, NULL, NULL))) return NULL;
        r->p[0] = labels; r->p[1] = rows; r->saved = t.high; r->f[0] = t.s; r->i[0] = n;
    }
    if (!MFT__RUNS(ctx)) return y;
    mft__parallel(ctx, n, MFT__ROW_GRAIN, mft__xent_run, &t);
    for (i = 0; i < n; i++) sum += (double)t.high[i] - (double)t.logits[rows[i] * t.vocab + labels[rows[i]]] + log((double)t.sum[i]);
    *(float *)y->data = (float)(sum * (double)t.s);
    return y;
}

/* ---- fused with the head: tiles of at most 512 rows x 2048 tokens of the vocabulary, 4 MB. Rows are a little more than a
 *      power of two apart, so as not to share sets of the caches ---- */
enum { MFT__HEAD_ROWS = 512, MFT__HEAD_TILE = 2048, MFT__HEAD_APART = 16 };

/* A tile's logits into the running maximum and sum of each row, and the label's logit where it falls in. What is
 * left in the tile is what the row's dx gets of each w: exp(logit - high), times the soft cap's derivative. */
static void mft__head_forward_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__xent_task *t = (const mft__xent_task *)arg;
    float   capped[256];
    int64_t i, c, k, n = t->vocab, cols = t->w->shape[1];
    (void)worker;
    for (i = begin; i < end; i++) {
        float  *x = t->out + i * t->pitch, high;
        int64_t label = t->labels[t->rows[i]] - t->tile_begin;
        if (t->softcap > 0) for (c = 0; c < n; c++) x[c] = t->softcap * tanhf(x[c] / t->softcap);
        if (label >= 0 && label < n) t->label_logit[i] = x[label];
        high = t->k->max(x, n);
        if (!(high <= t->high[i])) {
            float shrink = t->high[i] == -INFINITY ? 0 : expf(t->high[i] - high);
            t->sum[i] *= shrink;
            if (t->dx && t->tile_begin) t->k->scale(t->dx + i * cols, shrink, t->dx + i * cols, cols);
            t->high[i] = high;
        }
        if (!(t->softcap > 0)) { t->sum[i] += t->k->exp_sum(x, x, t->high[i], n); continue; }
        for (c = 0; c < n; c += 256) {
            int64_t m = mft__min(n - c, 256);
            memcpy(capped, x + c, (size_t)m * sizeof(float));
            t->sum[i] += t->k->exp_sum(x + c, x + c, t->high[i], m);
            for (k = 0; k < m; k++) x[c + k] *= 1 - capped[k] / t->softcap * (capped[k] / t->softcap);
        }
    }
}

/* After the last tile: dx / sum is the softmax's mean of the head's rows; less the label's row it is the gradient. */
static void mft__head_finish_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__xent_task *t = (const mft__xent_task *)arg;
    float   label_row[256];
    int64_t i, c, cols = t->w->shape[1];
    (void)worker;
    for (i = begin; i < end; i++) {
        const char *row = (const char *)t->w->data + mft_dtype_bytes(t->w->dtype, t->labels[t->rows[i]] * t->w->stride[0]);
        float      *dx = t->dx + i * cols, u = t->softcap > 0 ? t->label_logit[i] / t->softcap : 0;
        t->k->scale(dx, 1 / t->sum[i], dx, cols);
        for (c = 0; c < cols; c += 256) {
            int64_t n = mft__min(cols - c, 256);
            t->k->to_float(label_row, row + mft_dtype_bytes(t->w->dtype, c), t->w->dtype, n);
            t->k->axpy(dx + c, u * u - 1, label_row, n);
        }
    }
}

/* A tile's logits become the gradient of the loss in them. */
static void mft__head_backward_run(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__xent_task *t = (const mft__xent_task *)arg;
    int64_t i, c, n = t->vocab;
    (void)worker;
    for (i = begin; i < end; i++) {
        float  *x = t->out + i * t->pitch;
        int64_t label = t->labels[t->rows[i]] - t->tile_begin;
        if (t->softcap > 0) {
            for (c = 0; c < n; c++) {
                float u = tanhf(x[c] / t->softcap);
                x[c] = t->s * (expf(t->softcap * u - t->high[i]) / t->sum[i] - (c == label ? 1 : 0)) * (1 - u * u);
            }
            continue;
        }
        t->k->exp_sum(x, x, t->high[i], n);
        t->k->scale(x, t->s / t->sum[i], x, n);
        if (label >= 0 && label < n) x[label] -= t->s;
    }
}

static void mft__head_finish(mft_context *ctx, mft__xent_task t, int64_t n)
{
    const int32_t *rows = t.rows, *labels = t.labels;
    int64_t i, k, cols = t.w->shape[1], piece = ctx->drop_pages ? (int64_t)MFT__PAGED_ROWS : n;
    for (i = 0; i < n; i += piece) {
        for (k = i; k < mft__min(n, i + piece); k++) if (!mft__need(ctx, t.w, labels[rows[k]] * t.w->stride[0], cols)) return;
        mft__parallel(ctx, mft__min(n - i, piece), 4, mft__head_finish_run, &t);
        for (k = i; k < mft__min(n, i + piece); k++) mft__passed(ctx, t.w, labels[rows[k]] * t.w->stride[0], cols);
        t.rows += piece; t.dx += piece * cols; t.sum += piece; t.label_logit += piece;
    }
}

/* The counted rows of x, one after the other: x itself if all count, else a copy at the high end, which has room
 * for all. */
static float *mft__head_rows(mft_context *ctx, const mft_tensor *x, const mft__xent_task *t, int64_t n, int64_t cols)
{
    float  *p;
    int64_t i;
    if (n == t->most) return (float *)x->data;
    p = (float *)mft__high(ctx, (size_t)(t->most * cols) * sizeof(float));
    if (!p) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return NULL; }
    if (MFT__RUNS(ctx)) for (i = 0; i < n; i++) memcpy(p + i * cols, (const float *)x->data + t->rows[i] * cols, (size_t)cols * sizeof(float));
    return p;
}

/* Goes over all tiles: logits by a product, then `run` on their rows, then, if wanted, the products of the gradient. */
static void mft__head_tiles(mft_context *ctx, mft__xent_task *t, mft__task run, const float *x, const mft_tensor *w, int64_t n,
                            float *dx, float *dw, int add_dw)
{
    int64_t cols = w->shape[1], vocab = w->shape[0], v, r;
    int64_t rows_most = mft__min(t->most, MFT__HEAD_ROWS), tile_most = mft__min(vocab, MFT__HEAD_TILE), pitch = tile_most + MFT__HEAD_APART;
    size_t  bytes = (size_t)(rows_most * pitch) * sizeof(float);
    const int32_t *rows = t->rows;
    float  *tile = (float *)mft__high(ctx, bytes), *high = t->high, *sum = t->sum, *label_logit = t->label_logit, *kept = t->dx;
    if (!tile) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
    t->out = tile; t->pitch = pitch;
    for (v = 0; n && v < vocab && !mft__cancelled(ctx); v += tile_most) {  /* the weights pass by once */
        int64_t nv = mft__min(vocab - v, tile_most);
        const char *wv = (const char *)w->data + mft_dtype_bytes(w->dtype, v * w->stride[0]);
        if (!mft__need(ctx, w, v * w->stride[0], nv * cols)) break;
        t->vocab = nv; t->tile_begin = v;
        for (r = 0; r < n; r += MFT__HEAD_ROWS) {
            int64_t nr = mft__min(n - r, MFT__HEAD_ROWS);
            mft__product(ctx, nr, nv, cols, 1, mft__matrix_f32(x + r * cols, cols, 1), mft__matrix_of(wv, w->dtype, w->stride[1], w->stride[0]), NULL, 0, tile, pitch);
            t->rows = rows + r; t->high = high + r; t->sum = sum + r; t->label_logit = label_logit ? label_logit + r : NULL;
            t->dx = kept ? kept + r * cols : NULL;
            if (MFT__RUNS(ctx)) mft__parallel(ctx, nr, 4, run, t);
            if (dx) mft__product(ctx, nr, cols, nv, 1, mft__matrix_f32(tile, pitch, 1), mft__matrix_of(wv, w->dtype, w->stride[0], w->stride[1]),
                                 NULL, v > 0, dx + r * cols, cols);
            if (dw) mft__product(ctx, nv, cols, nr, 1, mft__matrix_f32(tile, 1, pitch), mft__matrix_f32(x + r * cols, cols, 1),
                                 NULL, add_dw || r > 0, dw + v * w->stride[0], w->stride[0]);
        }
        mft__passed(ctx, w, v * w->stride[0], nv * cols);
        if (dw && w->grad) mft__passed(ctx, w->grad, v * w->stride[0], nv * cols);
    }
    t->rows = rows; t->high = high; t->sum = sum; t->label_logit = label_logit; t->dx = kept;
    mft__high_free(ctx, tile, bytes);
    if (mft__cancelled(ctx)) mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_CANCELLED, "cancelled"));
}

/* The head is frozen: the gradient in x was made on the way forward. */
static void mft__head_frozen_backward(mft_context *ctx, mft__record *r)
{
    const int32_t *rows = (const int32_t *)r->p[1];
    int64_t        n = r->i[0], cols = mft__cols(r->in[0]), i;
    float         *dx = mft__grad_add(ctx, r->in[0]);
    if (dx && MFT__RUNS(ctx)) for (i = 0; i < n; i++) ctx->kernels->axpy(dx + rows[i] * cols, *mft__dy(r) * r->f[0], r->saved + i * cols, cols);
}

/* The head is trained: every softmax anew, for it needs the sum over the whole vocabulary. */
static void mft__head_backward(mft_context *ctx, mft__record *r)
{
    mft_tensor    *x = r->in[0], *w = r->in[1];
    mft__xent_task t;
    int64_t        n = r->i[0], cols = w->shape[1], i;
    size_t         bytes = (size_t)mft_tensor_numel(x) * sizeof(float);
    float         *packed, *dx = NULL, *dw = NULL, *grad;
    int            add_dw = 0;
    memset(&t, 0, sizeof t);
    t.k = ctx->kernels; t.labels = (const int32_t *)r->p[0]; t.rows = (const int32_t *)r->p[1]; t.w = w;
    t.most = mft_tensor_numel(x) / cols;
    t.high = r->saved; t.sum = r->saved + n; t.softcap = r->f[1];
    t.s = MFT__RUNS(ctx) ? *mft__dy(r) * r->f[0] : 0;
    if (w->trainable && !(dw = n ? mft__grad(ctx, w, &add_dw) : mft__grad_add(ctx, w))) return;      /* without a row nobody writes it */
    if (x->trainable && !(dx = (float *)mft__high(ctx, bytes))) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
    if (!(packed = mft__head_rows(ctx, x, &t, n, cols))) return;
    mft__head_tiles(ctx, &t, mft__head_backward_run, packed, w, n, dx, dw, add_dw);
    if (packed != (float *)x->data) mft__high_free(ctx, packed, bytes);
    if (!dx || !(grad = mft__grad_add(ctx, x))) return;
    if (MFT__RUNS(ctx)) for (i = 0; i < n; i++) ctx->kernels->axpy(grad + t.rows[i] * cols, 1, dx + i * cols, cols);
    mft__high_free(ctx, dx, bytes);
}

MFT_API mft_tensor *mft_linear_cross_entropy(mft_context *ctx, mft_tensor *x, mft_tensor *w, const int32_t *labels,
                                             int64_t n_valid, float softcap)
{
    mft__xent_task t;
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y;
    int32_t     *rows;
    int64_t      n, i, cols;
    size_t       bytes;
    float       *packed;
    int          wants, frozen;
    if (!mft__op_inputs(ctx, "mft_linear_cross_entropy", ctx && mft__fresh(x) && mft__fresh(w) && labels)) return NULL;
    mark = mft__low_mark(ctx);
    if (!(x = mft__linear_input(ctx, "mft_linear_cross_entropy", x, w, NULL)) || !(y = mft__result(ctx, 0, NULL))) return NULL;
    if (w->stride[1] != 1) return mft__op_shapes(ctx, "mft_linear_cross_entropy", w, NULL);
    cols = w->shape[1];
    n = mft__labelled_rows(ctx, "mft_linear_cross_entropy", labels, mft_tensor_numel(x) / cols, w->shape[0], n_valid, &rows);
    if (n < 0) return NULL;
    memset(&t, 0, sizeof t);
    t.k = ctx->kernels; t.labels = labels; t.rows = rows; t.softcap = softcap; t.w = w;
    t.most = mft_tensor_numel(x) / cols;
    t.s = (float)(1.0 / (double)(n_valid > 0 ? n_valid : n));
    wants  = mft__wants_grad(ctx, x);
    frozen = wants && !mft__wants_grad(ctx, w);
    wants |= mft__wants_grad(ctx, w);
    t.high = (float *)mft__low(ctx, (size_t)n * 2 * sizeof(float));
    if (frozen) t.dx = (float *)mft__low(ctx, (size_t)(n * cols) * sizeof(float));
    if (!t.high || (frozen && !t.dx)) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    t.sum = t.high + n;
    if (wants) {
        if (!(r = mft__record_op(ctx, mark, y, frozen ? mft__head_frozen_backward : mft__head_backward, x, w, NULL))) return NULL;
        r->p[0] = labels; r->p[1] = rows; r->saved = frozen ? t.dx : t.high; r->f[0] = t.s; r->f[1] = softcap; r->i[0] = n;
    }
    bytes = (size_t)t.most * sizeof(float);
    t.label_logit = (float *)mft__high(ctx, bytes);
    if (!t.label_logit) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    if (MFT__RUNS(ctx)) for (i = 0; i < n; i++) { t.high[i] = -INFINITY; t.sum[i] = 0; }
    if (!(packed = mft__head_rows(ctx, x, &t, n, cols))) return NULL;
    mft__head_tiles(ctx, &t, mft__head_forward_run, packed, w, n, t.dx, NULL, 0);
    if (packed != (float *)x->data) mft__high_free(ctx, packed, (size_t)(t.most * cols) * sizeof(float));
    if (MFT__RUNS(ctx)) {
        *(float *)y->data = mft__xent_mean(t.high, t.sum, t.label_logit, n, t.s);
        if (t.dx) mft__head_finish(ctx, t, n);
    }
    mft__high_free(ctx, t.label_logit, bytes);
    return ctx->step_status == MFT_OK ? y : NULL;
}

MFT_API mft_tensor *mft_mse_loss(mft_context *ctx, mft_tensor *x, mft_tensor *y)
{
    mft_tensor *d = mft_sub(ctx, x, y);
    return mft_mean(ctx, mft_mul(ctx, d, d));
}

/* ==============================================================================
 * MARK: - [BACKWARD] The walk, checkpoints
 * ============================================================================== */

typedef void (*mft__undone_fn)(mft_context *ctx, void *user, int which);

static void mft__undone_backward(mft_context *ctx, mft__record *r)
{
    mft__undone_fn fn;
    memcpy(&fn, &r->p[0], sizeof fn);
    if (MFT__RUNS(ctx)) fn(ctx, (void *)(uintptr_t)r->p[1], (int)r->i[0]);
}

/* Undoes all of ctx->tape, latest first, giving memory back as it goes. */
static void mft__walk(mft_context *ctx)
{
    while (ctx->tape) {
        mft__record *r = ctx->tape;
        if (ctx->step_status == MFT_OK && mft__cancelled(ctx))
            mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_CANCELLED, "cancelled"));
        /* a result nothing was derived from has no gradient: its record is dropped unread */
        if ((r->y->grad || r->backward == mft__undone_backward) && ctx->step_status == MFT_OK) r->backward(ctx, r);
        ctx->tape = r->before;
        mft__grad_drop(ctx, r->y);
        mft__of(r->y)->consumed = 1;
        if (mft_tensor_numel(r->y) != 1) r->y->data = NULL;     /* single numbers stay readable */
        mft__low_pop(ctx, r->mark);
    }
}

/* x again as a leaf that hands its gradient to x. */
static mft_tensor *mft__alias(mft_context *ctx, mft_tensor *x)
{
    mft_tensor *t = mft__tensor_struct(ctx);
    if (!t) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return NULL; }
    mft__view_of(t, x, 0);
    t->ndim = x->ndim;
    memcpy(t->shape, x->shape, sizeof t->shape);
    memcpy(t->stride, x->stride, sizeof t->stride);
    return t;
}

/* x again. When the backward pass comes by, all ops recorded after this one have been undone, and the gradients of
 * parameters that only those read are complete: fn is told. */
MFT__UNUSED static mft_tensor *mft__when_undone(mft_context *ctx, mft_tensor *x, mft__undone_fn fn, void *user, int which)
{
    mft__mark    mark = mft__low_mark(ctx);
    mft__record *r;
    mft_tensor  *y;
    if (!mft__wants_grad(ctx, x)) return x;
    if (!(y = mft__alias(ctx, x)) || !(r = mft__record_op(ctx, mark, y, mft__undone_backward, x, NULL, NULL))) return NULL;
    memcpy(&r->p[0], &fn, sizeof fn);
    r->p[1] = user; r->i[0] = which;
    return y;
}

/* Leaves 0 or 2 bytes a number of a tensor that lies on top of the forward end, at `mark`; returns where the end is then. */
static mft__mark mft__input_end(mft_context *ctx, mft_tensor *x, mft__mark mark, size_t keep)
{
    uint16_t     part[512];
    mft__tensor *t = mft__of(x);
    int64_t      n = mft_tensor_numel(x), i, count;
    size_t       bytes = mft__round64(mft__grad_bytes(x)), left = mft__round64((size_t)n * keep);
    if (t->kind != MFT__STEP_TENSOR || n == 1 || !ctx->arena.n_chunks || mark.low < bytes
        || (char *)x->data != ctx->arena.chunks[mark.chunk].base + mark.low - bytes) return mark;
    for (i = 0; keep && i < n && MFT__RUNS(ctx); i += count) {
        count = mft__min(n - i, 512);
        ctx->kernels->from_float(part, MFT_BF16, (const float *)x->data + i, count);
        memcpy((uint16_t *)x->data + i, part, (size_t)count * sizeof *part);
    }
    if (keep) t->packed = 1; else { t->consumed = 1; x->data = NULL; }
    mark.low -= bytes - left;
    mft__low_pop(ctx, mark);
    return mark;
}

static void mft__checkpoint_backward(mft_context *ctx, mft__record *r)
{
    mft_checkpoint_fn fn;
    mft_tensor *x, *y;
    mft__record *outer = ctx->tape;
    uint64_t    draws = ctx->draw_index;
    int         was;

    memcpy(&fn, &r->p[0], sizeof fn);
    x = mft__alias(ctx, r->in[0]);
    if (!x) return;
    if (mft__of(r->in[0])->packed) {
        float *numbers = (float *)mft__low(ctx, mft__grad_bytes(x));
        if (!numbers) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return; }
        if (MFT__RUNS(ctx)) ctx->kernels->to_float(numbers, x->data, MFT_BF16, mft_tensor_numel(x));
        x->data = numbers;
    }
    ctx->tape = NULL;
    ctx->draw_index = (uint64_t)r->i[0];
    was = mft_grad_enable(ctx, 1);                              /* mft_backward may be called where recording is off */
    ctx->recomputing++;
    y = fn(ctx, x, (void *)(uintptr_t)r->p[1]);
    ctx->recomputing--;
    if (y) y = mft_contiguous(ctx, y);                          /* laid out as dy is */
    mft_grad_enable(ctx, was);
    ctx->draw_index = draws;
    if (y && y->trainable) {
        if (mft__of(y)->kind == MFT__STEP_TENSOR && !mft__of(y)->view_of && !y->grad) {                /* dy changes hands; y's record gives it back */
            y->grad = r->y->grad; r->y->grad = NULL;
            mft__of(y)->grad_written = 1;
        } else {
            float *dy = mft__grad_add(ctx, y);
            if (dy && MFT__RUNS(ctx)) ctx->kernels->axpy(dy, 1, mft__dy(r), mft_tensor_numel(y));
        }
    }
    mft__walk(ctx);                                             /* to the start of fn; drops its records also on failure */
    ctx->tape = outer;
}

/* ---- piece by piece: a function of single rows needs no more memory than a piece of them takes ---- */

/* Rows [begin, begin + n) of x, which is contiguous: a leaf that hands its gradient to x. */
static mft_tensor *mft__rows_of(mft_context *ctx, mft_tensor *x, int64_t begin, int64_t n)
{
    int64_t     cols = mft__cols(x);
    mft_tensor *t = mft__tensor_struct(ctx);
    if (!t) { mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY); return NULL; }
    mft__view_of(t, x, begin * cols);
    t->ndim = 2;
    t->shape[0] = n;     t->shape[1] = cols;
    t->stride[0] = cols; t->stride[1] = 1;
    return t;
}

static void mft__rows_backward(mft_context *ctx, mft__record *r)
{
    mft_checkpoint_fn fn;
    mft__record *outer = ctx->tape;
    int64_t      cols = mft__cols(r->y), rows = mft_tensor_numel(r->y) / cols, i, n;
    uint64_t     draws = ctx->draw_index;
    memcpy(&fn, &r->p[0], sizeof fn);
    for (i = 0; i < rows && ctx->step_status == MFT_OK; i += n) {
        mft__mark   mark = mft__low_mark(ctx);
        mft_tensor *x, *y = NULL;
        float      *dy;
        int         was = mft_grad_enable(ctx, 1);
        n = mft__min(rows - i, r->i[1]);
        ctx->tape = NULL;
        ctx->draw_index = (uint64_t)r->i[0];
        ctx->recomputing++;
        if ((x = mft__rows_of(ctx, r->in[0], i, n)) != NULL) y = fn(ctx, x, (void *)(uintptr_t)r->p[1]);
        ctx->recomputing--;
        mft_grad_enable(ctx, was);
        if (y && y->trainable && (dy = mft__grad_add(ctx, y)) != NULL && MFT__RUNS(ctx))
            ctx->kernels->axpy(dy, 1, mft__dy(r) + i * cols, n * cols);
        mft__walk(ctx);
        mft__low_pop(ctx, mark);
    }
    ctx->draw_index = draws;
    ctx->tape = outer;
}

/* mft_checkpoint of a function that computes each row of its result, [rows, cols] like x, from that row of x
 * alone: `piece` rows at a time in both passes. A function that draws random numbers needs all rows in one piece.
 * unread: the numbers of the result are not wanted, only the record. */
MFT__UNUSED static mft_tensor *mft__checkpoint_rows(mft_context *ctx, mft_checkpoint_fn fn, mft_tensor *x, void *user, int64_t piece, int unread)
{
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *kept, *part, *y;
    uint64_t     draws;
    int64_t      rows, cols, i, n;
    int          was, saw, was_recomputing;

    if (!mft__op_inputs(ctx, "mft_checkpoint", ctx && fn && mft__fresh(x))) return NULL;
    if (!(x = mft__plain_input(ctx, "mft_checkpoint", x))) return NULL;
    cols = mft__cols(x); rows = mft_tensor_numel(x) / cols;
    mark  = mft__low_mark(ctx);
    draws = ctx->draw_index;
    if (!(kept = mft__result(ctx, x->ndim, x->shape))) return NULL;
    saw   = ctx->saw_trainable;
    was   = mft_grad_enable(ctx, 0);
    was_recomputing = ctx->recomputing;
    ctx->saw_trainable = x->trainable || unread;
    ctx->in_checkpoint += was;
    ctx->recomputing = 0;
    for (i = 0; i < rows && !unread && ctx->step_status == MFT_OK; i += n) {
        mft__mark start = mft__low_mark(ctx);
        n = mft__min(rows - i, piece);
        part = mft__rows_of(ctx, x, i, n);
        if (part && (y = fn(ctx, part, user)) != NULL && MFT__RUNS(ctx))
            memcpy((float *)kept->data + i * cols, y->data, (size_t)(n * cols) * sizeof(float));
        mft__low_pop(ctx, start);
    }
    ctx->recomputing = was_recomputing;
    ctx->in_checkpoint -= was;
    mft_grad_enable(ctx, was);
    i = ctx->saw_trainable;
    ctx->saw_trainable |= saw;
    if (ctx->step_status != MFT_OK) return NULL;
    if (!was || !i) return kept;
    if (!(r = mft__record_op(ctx, mark, kept, mft__rows_backward, x, NULL, NULL))) return NULL;
    memcpy(&r->p[0], &fn, sizeof fn);
    r->p[1] = user; r->i[0] = (int64_t)draws; r->i[1] = piece;
    return kept;
}

MFT_API mft_tensor *mft_checkpoint(mft_context *ctx, mft_checkpoint_fn fn, mft_tensor *x, void *user)
{
    mft__mark    mark;
    mft__record *r;
    mft_tensor  *y, *kept;
    uint64_t     draws;
    int          was, saw, needs, was_recomputing, ends = ctx ? ctx->input_ends : 0;

    if (!mft__op_inputs(ctx, "mft_checkpoint", ctx && fn && mft__fresh(x))) return NULL;
    ctx->input_ends = 0;
    mark  = mft__low_mark(ctx);
    draws = ctx->draw_index;
    saw   = ctx->saw_trainable;
    was   = mft_grad_enable(ctx, 0);
    ctx->saw_trainable = x->trainable;
    ctx->in_checkpoint += was;
    was_recomputing = ctx->recomputing; ctx->recomputing = 0;
    y = fn(ctx, x, user);
    if (y && y != x) y = mft_contiguous(ctx, y);
    ctx->recomputing = was_recomputing;
    ctx->in_checkpoint -= was;
    mft_grad_enable(ctx, was);
    needs = ctx->saw_trainable || (y && y->trainable);          /* fn may return a parameter as it is */
    ctx->saw_trainable |= saw;
    if (!y || y == x) return y;

    mft__low_pop(ctx, mark);                                    /* all of fn's tensors go; the result moves down */
    if (ends && !(was && needs)) mark = mft__input_end(ctx, x, mark, 0);
    else if (ends == 2)          mark = mft__input_end(ctx, x, mark, 2);
    kept = mft__tensor_step(ctx, y->ndim, y->shape);
    if (!kept) return mft__op_failed(ctx, MFT_ERR_OUT_OF_MEMORY);
    if (MFT__RUNS(ctx)) memmove(kept->data, y->data, mft__grad_bytes(y));
    if (!was || !needs) return kept;
    r = mft__record_op(ctx, mark, kept, mft__checkpoint_backward, x, NULL, NULL);
    if (!r) return NULL;
    memcpy(&r->p[0], &fn, sizeof fn);
    r->p[1] = user; r->i[0] = (int64_t)draws;
    return kept;
}

MFT_API mft_status mft_backward(mft_context *ctx, mft_tensor *loss)
{
    float *g;
    if (!ctx) return MFT_ERR_INVALID_ARGUMENT;
    if (ctx->step_status == MFT_OK && mft__cancelled(ctx))
        mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_CANCELLED, "cancelled"));
    if (ctx->step_status == MFT_OK && !loss)
        mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_backward: the loss is NULL"));
    if (ctx->step_status == MFT_OK && !mft__fresh(loss))
        mft__op_failed(ctx, mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_backward: an earlier backward pass of this step has consumed what the loss was made from"));
    if (ctx->step_status == MFT_OK && mft_tensor_numel(loss) != 1) mft__op_shapes(ctx, "mft_backward", loss, NULL);
    if (ctx->step_status == MFT_OK && loss->trainable) {        /* else nothing below it is: no gradient, no work */
        g = mft__grad_add(ctx, loss);
        if (g && MFT__RUNS(ctx)) *g = 1;
        mft__walk(ctx);
    }
    if (ctx->step_status != MFT_OK) memcpy(ctx->error, ctx->step_error, sizeof ctx->error);
    return ctx->step_status;
}

/* ==============================================================================
 * MARK: - [OPTIMIZER] Norm, clipping, AdamW, SGD, schedules
 * ============================================================================== */
typedef struct mft__norm_task { const mft__kernels *k; const float *x; double *partial; int64_t piece; } mft__norm_task;
static void mft__norm_run(void *arg, int64_t begin, int64_t end, int worker)
{
    mft__norm_task *t = (mft__norm_task *)arg;
    (void)worker;
    t->partial[begin / t->piece] = t->k->sum_squares(t->x + begin, end - begin);
}

/* The sum of squares of n numbers, in double in a fixed order: of at most 256 pieces, whose size n alone decides. They
 * are `owner`'s, whose pages go behind the walk where they are to; NULL: nobody's. */
static double mft__sum_squares(mft_context *ctx, const float *x, int64_t n, const mft_tensor *owner)
{
    double         partial[256], total = 0;
    int64_t        i, at, m, most = n;
    mft__norm_task t;
    t.k = ctx->kernels;
    t.piece = n > 256 * (int64_t)MFT__VECTOR_GRAIN ? (n + 255) / 256 : (int64_t)MFT__VECTOR_GRAIN;
    if (owner && mft__drops_behind(ctx, owner)) most = (4 * MFT__PAGED_PIECE + t.piece - 1) / t.piece * t.piece;
    for (at = 0; at < n; at += m) {
        m = mft__min(n - at, most);
        t.x = x + at; t.partial = partial + at / t.piece;
        mft__parallel(ctx, m, t.piece, mft__norm_run, &t);
        if (owner) mft__passed(ctx, owner, at, m);
    }
    for (i = 0; i * t.piece < n; i++) total += partial[i];
    return total;
}

/* ---- methods: what each keeps of a parameter, and the update of one parameter ---- */
enum { MFT__MAX_STATES = 4 };

/* One buffer of what a method keeps of a parameter: saved as NAME.suffix, zeroed at the start. */
typedef struct mft__state_layout {
    const char *suffix;
    mft_dtype   dtype;
    int         ndim;
    int64_t     shape[MFT_MAX_DIMS];
    int64_t     per;                        /* of a method that takes pieces: elements of the parameter to one of this; 0: one */
} mft__state_layout;

/* The update of one parameter, with all it reads and writes. Parameters do not know of each other: they may be
 * updated one by one, in any order, the buffers being wherever the caller has them just then. */
typedef struct mft__update {
    mft_tensor  *p;                         /* or a piece of one that is in a mapped file, in one dimension: */
    int64_t      first;                     /* the element it starts at                              */
    const float *g;                         /* laid out as p                                         */
    void        *state[MFT__MAX_STATES];    /* in the order of the method's layouts                  */
    int64_t      step;                      /* 1 is the first                                        */
    double       learning_rate, weight_decay, grad_scale;        /* g counts times grad_scale        */
    double       squares;                   /* of the whole gradient, before grad_scale              */
    uint64_t     seed, stream;              /* of random numbers: this parameter's at this step      */
    const struct mft__code *codes;          /* 8-bit moments: of exp_avg, of exp_avg_sq              */
} mft__update;

typedef struct mft__method {
    int        (*layouts)(const mft_optimizer_desc *d, const mft_tensor *p, mft__state_layout out[MFT__MAX_STATES]);    /* returns how many */
    void       (*prepare)(mft_context *ctx, const mft_optimizer_desc *d, mft__update *u);       /* sees all of a parameter before its pieces; or NULL */
    mft_status (*update) (mft_context *ctx, const mft_optimizer_desc *d, const mft__update *u);
    int          pieces;                    /* the update may be made of pieces, which start at multiples of MFT__PAGED_PIECE */
} mft__method;

/* The next layout, for f32 numbers of p's shape. */
static int mft__state_like(mft__state_layout *out, int n, const char *suffix, const mft_tensor *p)
{
    out[n].suffix = suffix; out[n].dtype = MFT_F32; out[n].ndim = p->ndim;
    memcpy(out[n].shape, p->shape, sizeof out[n].shape);
    return n + 1;
}

typedef struct mft__update_task {
    const mft__kernels *k;
    const mft__update  *u;
    mft__adamw   c;
    float       *m, *v;                     /* moments in f32, or what their codes are multiplied by */
    uint8_t     *m8, *v8;                   /* their codes, or NULL                                  */
    float        lr, momentum;
    int          first;
} mft__update_task;

static void mft__update_constants(mft_context *ctx, const mft_optimizer_desc *d, const mft__update *u, mft__update_task *t)
{
    double c1 = 1 - pow(d->beta1, (double)u->step), c2 = 1 - pow(d->beta2, (double)u->step);
    memset(t, 0, sizeof *t);
    t->k = ctx->kernels;
    t->c.lr_over_c1  = (float)(u->learning_rate / c1);
    t->c.decay       = (float)(1 - u->learning_rate * u->weight_decay);
    t->c.beta1       = (float)d->beta1; t->c.one_minus_beta1 = (float)(1 - d->beta1);
    t->c.beta2       = (float)d->beta2; t->c.one_minus_beta2 = (float)(1 - d->beta2);
    t->c.eps         = (float)d->eps;
    t->c.inv_sqrt_c2 = (float)(1 / sqrt(c2));
    t->c.grad_scale  = (float)u->grad_scale;
    t->u = u;
    t->lr = (float)u->learning_rate; t->momentum = (float)d->momentum; t->first = u->step == 1;
}

/* ---- parameters in f32, or in bf16: as f32 for the time of an update ---- */
enum { MFT__UPDATE_BLOCK = 256 };           /* elements that are unpacked at a time, and that share a scale */

/* Numbers [i, i + n) of the parameter in f32: where they are, or in `unpacked` */
static float *mft__update_read(const mft__kernels *k, const mft__update *u, int64_t i, int64_t n, float *unpacked)
{
    if (u->p->dtype == MFT_F32) return (float *)u->p->data + i;
    k->to_float(unpacked, (const uint16_t *)u->p->data + i, MFT_BF16, n);
    return unpacked;
}

static void mft__update_write(const mft__kernels *k, const mft__update *u, int64_t i, int64_t n, const float *unpacked)
{
    if (u->p->dtype == MFT_BF16) k->bf16_by_chance((uint16_t *)u->p->data + i, unpacked, u->seed, u->stream, u->first + i, n);
}

/* ---- 8-bit codes: magnitudes of a block relative to its greatest ---- */
enum { MFT__CODE_SMALL = 4096 };

/* Decade d of 0 .. 6 reaches from 10^(d-7) to 10^(d-6), in 2^d cells, or 2^(d+1) without a sign; 0 and 1 besides. */
static void mft__code_make(mft__code *c, int is_signed)
{
    float  magnitude[256];
    double decade = 1e-6;
    int    d, k, n = 0;
    c->is_signed = is_signed; c->first = is_signed ? 1 : 2;
    magnitude[n++] = 0;
    for (d = 0; d < 7; d++, decade *= 10) {
        int cells = c->first << d;
        for (k = 0; k < cells; k++) magnitude[n++] = (float)(decade * (0.1 + 0.9 * (k + 0.5) / cells));
        c->cells[d] = (float)(cells / (0.9 * decade));
        c->edge[d]  = (magnitude[n - cells - 1] + magnitude[n - cells]) / 2;
    }
    magnitude[n++] = 1;
    c->edge[7] = (magnitude[n - 2] + magnitude[n - 1]) / 2;
    for (k = 0; k < n; k++) {
        c->value[is_signed ? 127 + k : k] = magnitude[k];
        if (is_signed && k < 128) c->value[127 - k] = k ? -magnitude[k] : 0;
    }
}

/* Rows pack; one look-up a number is as fast as any of them could unpack. */
static void mft__code_unpack(const mft__code *c, float *x, const uint8_t *codes, float scale, int64_t n)
{
    int64_t i;
    for (i = 0; i < n; i++) x[i] = c->value[codes[i]] * scale;
}

/* ---- AdamW ---- */
static int mft__adamw_layouts(const mft_optimizer_desc *d, const mft_tensor *p, mft__state_layout out[MFT__MAX_STATES])
{
    (void)d;
    return mft__state_like(out, mft__state_like(out, 0, "exp_avg", p), "exp_avg_sq", p);
}

static int mft__adamw8bit_layouts(const mft_optimizer_desc *d, const mft_tensor *p, mft__state_layout out[MFT__MAX_STATES])
{
    static const char *const suffixes[4] = { "exp_avg", "exp_avg_sq", "exp_avg.absmax", "exp_avg_sq.absmax" };
    int64_t n = mft_tensor_numel(p);
    int     k;
    if (n < MFT__CODE_SMALL) return mft__adamw_layouts(d, p, out);
    for (k = 0; k < 4; k++) {
        out[k].suffix = suffixes[k]; out[k].dtype = k < 2 ? MFT_U8 : MFT_F32;
        out[k].ndim = 1; out[k].shape[0] = k < 2 ? n : (n + MFT__UPDATE_BLOCK - 1) / MFT__UPDATE_BLOCK;
        out[k].per = k < 2 ? 1 : MFT__UPDATE_BLOCK;
    }
    return 4;
}

static void mft__adamw_run(void *arg, int64_t begin, int64_t end, int worker)
{
    mft__update_task  *t = (mft__update_task *)arg;
    const mft__update *u = t->u;
    float   unpacked[3][MFT__UPDATE_BLOCK];
    int64_t piece = end - begin, i, n, block;
    (void)worker;
    if (t->m8 || u->p->dtype != MFT_F32) piece = MFT__UPDATE_BLOCK;
    for (i = begin; i < end; i += n) {
        float *p, *m = unpacked[1], *v = unpacked[2];
        n = mft__min(piece, end - i);
        p = mft__update_read(t->k, u, i, n, unpacked[0]);
        block = i / MFT__UPDATE_BLOCK;
        if (t->m8) {
            mft__code_unpack(&u->codes[0], m, t->m8 + i, t->m[block], n);
            mft__code_unpack(&u->codes[1], v, t->v8 + i, t->v[block], n);
        } else { m = t->m + i; v = t->v + i; }
        t->k->adamw(p, m, v, u->g + i, n, &t->c);
        if (t->m8) {
            t->k->code_pack(&u->codes[0], t->m8 + i, &t->m[block], m, n);
            t->k->code_pack(&u->codes[1], t->v8 + i, &t->v[block], v, n);
        }
        mft__update_write(t->k, u, i, n, p);
    }
}

static mft_status mft__adamw_update(mft_context *ctx, const mft_optimizer_desc *d, const mft__update *u)
{
    mft__update_task t;
    int              packed = u->state[2] != NULL;
    mft__update_constants(ctx, d, u, &t);
    t.m  = (float *)u->state[packed ? 2 : 0];             t.v  = (float *)u->state[packed ? 3 : 1];
    t.m8 = packed ? (uint8_t *)u->state[0] : NULL;        t.v8 = packed ? (uint8_t *)u->state[1] : NULL;
    mft__parallel(ctx, mft_tensor_numel(u->p), MFT__VECTOR_GRAIN, mft__adamw_run, &t);
    return MFT_OK;
}

/* ---- SGD, torch.optim's: buf = momentum buf + g (the first: g); p -= lr (momentum ? buf : g); decay decoupled here ---- */
static int mft__sgd_layouts(const mft_optimizer_desc *d, const mft_tensor *p, mft__state_layout out[MFT__MAX_STATES])
{
    return d->momentum != 0 ? mft__state_like(out, 0, "momentum", p) : 0;
}

static void mft__sgd_run(void *arg, int64_t begin, int64_t end, int worker)
{
    mft__update_task  *t = (mft__update_task *)arg;
    const mft__update *u = t->u;
    float   unpacked[MFT__UPDATE_BLOCK], scaled[MFT__UPDATE_BLOCK], *g, *p;
    int64_t i, n;
    (void)worker;
    for (i = begin; i < end; i += n) {
        n = mft__min(MFT__UPDATE_BLOCK, end - i);
        g = t->m ? t->m + i : scaled;
        p = mft__update_read(t->k, u, i, n, unpacked);
        if (t->m && !t->first) { t->k->scale(g, t->momentum, g, n); t->k->axpy(g, t->c.grad_scale, u->g + i, n); }
        else t->k->scale(g, t->c.grad_scale, u->g + i, n);
        if (t->c.decay != 1) t->k->scale(p, t->c.decay, p, n);
        t->k->axpy(p, -t->lr, g, n);
        mft__update_write(t->k, u, i, n, p);
    }
}

static mft_status mft__sgd_with(mft_context *ctx, const mft_optimizer_desc *d, const mft__update *u, float *momentum)
{
    mft__update_task t;
    mft__update_constants(ctx, d, u, &t);
    t.m = momentum;
    mft__parallel(ctx, mft_tensor_numel(u->p), MFT__VECTOR_GRAIN, mft__sgd_run, &t);
    return MFT_OK;
}

static mft_status mft__sgd_update(mft_context *ctx, const mft_optimizer_desc *d, const mft__update *u)
{
    return mft__sgd_with(ctx, d, u, (float *)u->state[0]);      /* NULL without momentum */
}

/* ---- APOLLO-mini: SGD, of a matrix by a rate that AdamW's moments of its projection give ---- */
enum { MFT__APOLLO_GAP = 200, MFT__APOLLO_SCALE = 128, MFT__APOLLO_PIECES = 256 };

/* Rows and columns of a matrix as its numbers lie; 0: it is none. */
static int mft__apollo_matrix(const mft_tensor *p, int64_t *rows, int64_t *cols)
{
    int turned = p->ndim == 2 && p->stride[0] == 1;             /* GPT-2's */
    if (p->ndim != 2 || p->shape[0] < 2 || p->shape[1] < 2) return 0;
    *rows = p->shape[turned]; *cols = p->shape[!turned];
    return 1;
}

static int mft__apollo_layouts(const mft_optimizer_desc *d, const mft_tensor *p, mft__state_layout out[MFT__MAX_STATES])
{
    static const char *const suffixes[3] = { "exp_avg", "exp_avg_sq", "update_norm" };
    int64_t rows, cols, sides;
    int     k;
    if (!mft__apollo_matrix(p, &rows, &cols)) return mft__adamw_layouts(d, p, out);
    sides = mft__min(rows, cols);
    for (k = 0; k < 3; k++) {
        out[k].suffix = suffixes[k]; out[k].dtype = MFT_F32; out[k].ndim = 1;
        out[k].per = k < 2 ? sides : rows * cols;
        out[k].shape[0] = rows * cols / out[k].per;
    }
    return 3;
}

typedef struct mft__apollo_task {
    mft__update_task with;
    int64_t  rows, cols, from, piece;
    uint64_t stream;                        /* of z */
    double   partial[MFT__APOLLO_PIECES][2];        /* squares of r and of AdamW's step for it, by pieces of r */
} mft__apollo_task;

/* Numbers [at, at + n) of r, at most MFT__UPDATE_BLOCK, from the gradient as it lies */
static void mft__apollo_project(const mft__apollo_task *t, int64_t at, int64_t n, float *r)
{
    const mft__update *u = t->with.u;
    float   z[MFT__UPDATE_BLOCK];
    int64_t rows = t->rows, cols = t->cols, sides = mft__min(rows, cols), i, k, m;
    memset(r, 0, (size_t)n * sizeof *r);
    for (i = 0; i < sides; i += m) {
        m = mft__min(MFT__UPDATE_BLOCK, sides - i);
        for (k = 0; k < MFT__UPDATE_BLOCK && k < m; k += 2) mft__normal_pair(u->seed, t->stream, (uint64_t)(i + k) / 2, &z[k], &z[k + 1]);
        if (rows < cols) for (k = 0; k < m; k++) t->with.k->axpy(r, z[k], u->g + (i + k) * cols + at, n);
        else             for (k = 0; k < n; k++) r[k] += t->with.k->dot(u->g + (at + k) * cols + i, z, m);
    }
}

static void mft__apollo_run(void *arg, int64_t begin, int64_t end, int worker)
{
    mft__apollo_task   *t = (mft__apollo_task *)arg;
    const mft__adamw   *c = &t->with.c;
    double *squares = t->partial[(t->from + begin) / t->piece];
    float   r[MFT__UPDATE_BLOCK];
    int64_t at, k, n;
    (void)worker;
    squares[0] = squares[1] = 0;
    for (at = t->from + begin; at < t->from + end; at += n) {
        float *m = t->with.m + at, *v = t->with.v + at;
        n = mft__min(MFT__UPDATE_BLOCK, t->from + end - at);
        mft__apollo_project(t, at, n, r);
        for (k = 0; k < n; k++) {
            float  x = r[k] * c->grad_scale;
            double step;
            if (!(fabsf(x) <= 3.402823466e38f)) x = 3.402823466e38f;        /* its square is infinite, and the step zero, as AdamW's */
            m[k] = c->beta1 * m[k] + c->one_minus_beta1 * x;
            v[k] = c->beta2 * v[k] + c->one_minus_beta2 * x * x;
            step = m[k] / (sqrt((double)v[k]) + c->eps);
            squares[0] += (double)x * x;
            squares[1] += step * step;
        }
    }
}

/* Gives the gradient of a matrix its scale. */
static void mft__apollo_prepare(mft_context *ctx, const mft_optimizer_desc *d, mft__update *u)
{
    mft__apollo_task t;
    double  squares[2] = { 0, 0 }, scale, norm, limit;
    int64_t numel = mft_tensor_numel(u->p), length, most, i, n;
    float  *kept = (float *)u->state[2];
    if (!mft__apollo_matrix(u->p, &t.rows, &t.cols)) return;
    length = most = t.rows < t.cols ? t.cols : t.rows;
    mft__update_constants(ctx, d, u, &t.with);
    t.with.m = (float *)u->state[0]; t.with.v = (float *)u->state[1];
    t.stream = (uint64_t)3 << 62 | (uint64_t)((u->step - 1) / MFT__APOLLO_GAP) << 24 | (u->stream & 0xffffff);
    t.piece  = length > MFT__APOLLO_PIECES * (int64_t)MFT__UPDATE_BLOCK ? (length - 1) / MFT__APOLLO_PIECES + 1 : (int64_t)MFT__UPDATE_BLOCK;
    if (t.rows >= t.cols && mft__drops_behind(ctx, u->p->grad)) most = (4 * MFT__PAGED_PIECE / t.cols / t.piece + 1) * t.piece;
    for (t.from = 0; t.from < length; t.from += n) {
        n = mft__min(most, length - t.from);
        mft__parallel(ctx, n, t.piece, mft__apollo_run, &t);
        mft__passed(ctx, u->p->grad, t.from * (numel / length), n * (numel / length));
    }
    for (i = 0; i * t.piece < length; i++) { squares[0] += t.partial[i][0]; squares[1] += t.partial[i][1]; }
    scale = sqrt(squares[1]) / (sqrt(squares[0]) + 1e-8);
    norm  = sqrt(u->squares) * u->grad_scale * scale;
    limit = *kept > 0 && norm > 1.01 * ((double)*kept + 1e-8) ? norm / (1.01 * ((double)*kept + 1e-8)) : 1;
    *kept = (float)(norm / limit);
    u->grad_scale *= scale / limit * sqrt((double)MFT__APOLLO_SCALE * (1 - pow(d->beta2, (double)u->step))) / (1 - pow(d->beta1, (double)u->step));
}

static mft_status mft__apollo_update(mft_context *ctx, const mft_optimizer_desc *d, const mft__update *u)
{
    return u->state[2] ? mft__sgd_with(ctx, d, u, NULL) : mft__adamw_update(ctx, d, u);
}

static const mft__method mft__methods[] = {                     /* in the order of mft_optimizer_kind */
    { mft__adamw_layouts,     NULL,                mft__adamw_update,  1 },
    { mft__sgd_layouts,       NULL,                mft__sgd_update,    1 },
    { mft__adamw8bit_layouts, NULL,                mft__adamw_update,  1 },
    { mft__apollo_layouts,    mft__apollo_prepare, mft__apollo_update, 1 }
};
enum { MFT__N_METHODS = sizeof mft__methods / sizeof *mft__methods };

/* ---- the optimizer: a method, and its state of every parameter ---- */
typedef struct mft__slot {
    mft_tensor *p;
    mft_tensor *state[MFT__MAX_STATES];
    int64_t     per[MFT__MAX_STATES];       /* see mft__state_layout */
    int         n_states;
    int         no_decay;
    double      squares;                    /* of the gradient, in a step of all parameters */
} mft__slot;

struct mft_optimizer {
    mft__object    object;
    mft_context   *ctx;
    mft_optimizer_desc desc;
    mft__slot     *slots;
    mft_tensor    *step;                    /* i64 [1] */
    mft__code     *codes;                   /* [2], of 8-bit moments; NULL without */
    int            n;
};

static void mft__state_destroy(mft_context *ctx, mft_tensor *t)
{
    char *name = t ? (char *)(uintptr_t)t->name : NULL;
    mft_tensor_destroy(ctx, t);
    mft__strfree(ctx, name);
}

/* NAME.suffix for a state of parameter number i; freed with mft__strfree */
static char *mft__state_text(mft_context *ctx, const mft_tensor *p, int i, const char *suffix)
{
    char   number[32];
    size_t bytes;
    char  *name;
    snprintf(number, sizeof number, "parameter%d", i);
    bytes = strlen(p->name ? p->name : number) + strlen(suffix) + 2;
    if ((name = (char *)mft__alloc(ctx, bytes)) != NULL) snprintf(name, bytes, "%s.%s", p->name ? p->name : number, suffix);
    return name;
}

static void mft__optimizer_destroy_object(void *self)
{
    mft_optimizer *opt = (mft_optimizer *)self;
    mft_context   *ctx = opt->ctx;
    int            i, k;
    mft__object_remove(&opt->object);
    for (i = 0; opt->slots && i < opt->n; i++)
        for (k = 0; k < opt->slots[i].n_states; k++) mft__state_destroy(ctx, opt->slots[i].state[k]);
    mft_tensor_destroy(ctx, opt->step);
    mft__free(ctx, opt->slots, (size_t)opt->n * sizeof *opt->slots);
    mft__free(ctx, opt->codes, 2 * sizeof *opt->codes);
    mft__free(ctx, opt, sizeof *opt);
}

MFT_API void mft_optimizer_destroy(mft_optimizer *opt) { if (opt) mft__optimizer_destroy_object(opt); }

static double mft__default(double value, double otherwise) { return value != 0 ? value : otherwise; }

/* The state of parameter number i, as the method lays it out. */
static int mft__slot_states(mft_optimizer *opt, int i)
{
    mft_context      *ctx = opt->ctx;
    mft__slot        *s = &opt->slots[i];
    mft__state_layout all[MFT__MAX_STATES];
    int               k, n;
    memset(all, 0, sizeof all);
    n = mft__methods[opt->desc.kind].layouts(&opt->desc, s->p, all);
    for (k = 0; k < n; k++) {
        const mft__state_layout *w = &all[k];
        mft_tensor *t = mft__tensor_held(ctx, MFT__OPTIMIZER, w->dtype, w->ndim, w->shape, NULL);
        if (!t) return 0;
        if (mft__same_shape(t, s->p)) memcpy(t->stride, s->p->stride, sizeof t->stride);
        s->state[k] = t; s->per[k] = w->per ? w->per : 1; s->n_states = k + 1;
        if (!(t->name = mft__state_text(ctx, s->p, i, w->suffix))) return 0;
    }
    return 1;
}

MFT_API mft_status mft_optimizer_create(mft_context *ctx, const mft_optimizer_desc *desc, mft_tensor *const *params,
                                        const unsigned char *no_decay, int n_params, mft_optimizer **out)
{
    mft_optimizer *opt;
    int64_t one = 1;
    int     i;

    if (!ctx || !out) return MFT_ERR_INVALID_ARGUMENT;
    *out = NULL;
    if (n_params < 1 || !params) return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_optimizer_create: no parameters");
    for (i = 0; i < n_params; i++)
        if (!params[i] || !mft__is_master(params[i]->dtype) || mft__of(params[i])->kind == MFT__STEP_TENSOR)
            return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_optimizer_create: parameter %d is not a held f32 or bf16 tensor", i);
    if (desc && (!(desc->beta1 >= 0 && desc->beta1 < 1) || !(desc->beta2 >= 0 && desc->beta2 < 1) || !(desc->eps >= 0) || !(desc->momentum >= 0)
                 || !(desc->weight_decay >= 0) || desc->max_grad_norm != desc->max_grad_norm))
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_optimizer_create: beta1 %g, beta2 %g are in [0, 1), eps %g, momentum %g, weight_decay %g not negative, max_grad_norm %g a number",
                         desc->beta1, desc->beta2, desc->eps, desc->momentum, desc->weight_decay, desc->max_grad_norm);
    if (desc && ((int)desc->kind < 0 || (int)desc->kind >= (int)MFT__N_METHODS))
        return mft__fail(ctx, MFT_ERR_INVALID_ARGUMENT, "mft_optimizer_create: there is no method number %d", (int)desc->kind);
    opt = (mft_optimizer *)mft__alloc_zero(ctx, sizeof *opt);
    if (!opt) return MFT_ERR_OUT_OF_MEMORY;
    opt->ctx = ctx; opt->n = n_params;
    if (desc) opt->desc = *desc;
    opt->desc.beta1 = mft__default(opt->desc.beta1, 0.9);
    opt->desc.beta2 = mft__default(opt->desc.beta2, 0.999);
    opt->desc.eps   = mft__default(opt->desc.eps, 1e-8);
    opt->desc.max_grad_norm = mft__default(opt->desc.max_grad_norm, 1.0);
    mft__object_add(ctx, &opt->object, mft__optimizer_destroy_object);

    opt->slots = (mft__slot *)mft__alloc_zero(ctx, (size_t)n_params * sizeof *opt->slots);
    opt->step  = mft__tensor_held(ctx, MFT__OPTIMIZER, MFT_I64, 1, &one, NULL);
    if (!opt->slots || !opt->step) goto fail;
    opt->step->name = "step";
    if (opt->desc.kind == MFT_ADAMW8BIT) {
        if (!(opt->codes = (mft__code *)mft__alloc(ctx, 2 * sizeof *opt->codes))) goto fail;
        mft__code_make(&opt->codes[0], 1);
        mft__code_make(&opt->codes[1], 0);
    }
    for (i = 0; i < n_params; i++) {
        opt->slots[i].p = params[i];
        opt->slots[i].no_decay = no_decay && no_decay[i];
        if (!mft__slot_states(opt, i)) goto fail;
    }
    *out = opt;
    return MFT_OK;
fail:
    mft_optimizer_destroy(opt);
    return MFT_ERR_OUT_OF_MEMORY;
}

MFT_API void mft_optimizer_zero_grad(mft_optimizer *opt)
{
    int i;
    if (!opt) return;
    for (i = 0; i < opt->n; i++) mft__of(opt->slots[i].p)->grad_written = 0;    /* the next backward overwrites */
}

MFT_API int mft_optimizer_state(mft_optimizer *opt, mft_tensor **out, int cap)
{
    int i, k, n = 0;
    if (!opt) return 0;
    for (i = 0; i < opt->n; i++)
        for (k = 0; k < opt->slots[i].n_states; k++, n++) if (n < cap) out[n] = opt->slots[i].state[k];
    if (n < cap) out[n] = opt->step;
    return n + 1;
}

/* The same of a parameter's gradient; one that no backward has reached since it was zeroed counts as zeros. */
static double mft__grad_squares(mft_context *ctx, mft_tensor *p)
{
    return p->grad && mft__of(p)->grad_written ? mft__sum_squares(ctx, (const float *)p->grad->data, mft_tensor_numel(p), p->grad) : 0;
}

/* Where elements from `at` on of a parameter have their gradient and states. */
static void mft__update_at(const mft__slot *s, int64_t at, mft__update *u)
{
    int k;
    u->first = at;
    u->g = (const float *)s->p->grad->data + at;
    for (k = 0; k < s->n_states; k++) u->state[k] = (char *)s->state[k]->data + mft_dtype_bytes(s->state[k]->dtype, at / s->per[k]);
}

/* Elements [at, at + n) of a parameter, with its gradient and states, have been updated. */
static void mft__update_passed(mft_context *ctx, const mft__slot *s, int64_t at, int64_t n)
{
    int k;
    mft__passed(ctx, s->p, at, n);
    mft__passed(ctx, s->p->grad, at, n);
    for (k = 0; k < s->n_states; k++) mft__passed(ctx, s->state[k], at / s->per[k], (n + s->per[k] - 1) / s->per[k]);
}

/* Updates parameter number i by its gradient times grad_scale, which is then used up; squares: mft__grad_squares of it.
 * The optimizer's step is the one being made: mft__optimizer_begin has counted it. */
static mft_status mft__optimizer_update(mft_optimizer *opt, int i, double learning_rate, double grad_scale, double squares)
{
    mft_context       *ctx = opt->ctx;
    const mft__method *method = &mft__methods[opt->desc.kind];
    mft__slot  *s = &opt->slots[i];
    mft__tensor part;
    mft__update u;
    mft_status  status = MFT_OK;
    int64_t     n = mft_tensor_numel(s->p), piece = method->pieces ? mft__paged_piece(ctx, s->p, n) : n, at;
    if (!s->p->grad) return MFT_OK;                             /* never reached: torch has no gradient there either */
    if (!mft__of(s->p)->grad_written) mft__grad_clear(ctx, s->p->grad);
    memset(&u, 0, sizeof u);
    u.p = s->p;
    u.step = *(const int64_t *)opt->step->data;
    u.learning_rate = learning_rate; u.grad_scale = grad_scale; u.squares = squares;
    u.weight_decay = s->no_decay ? 0.0 : opt->desc.weight_decay;
    u.seed = ctx->seed; u.stream = (uint64_t)1 << 63 | (uint64_t)u.step << 24 | (uint64_t)i;     /* dropout's have no highest bit */
    u.codes = opt->codes;
    mft__update_at(s, 0, &u);
    if (method->prepare) method->prepare(ctx, &opt->desc, &u);
    if (piece < n) { part = *mft__of(s->p); u.p = &part.t; part.t.ndim = 1; part.t.stride[0] = 1; }
    for (at = 0; at < n && status == MFT_OK; at += piece) {
        int64_t m = mft__min(n - at, piece);
        if (piece < n) { part.t.shape[0] = m; part.t.data = (char *)s->p->data + mft_dtype_bytes(s->p->dtype, at); }
        mft__update_at(s, at, &u);
        status = method->update(ctx, &opt->desc, &u);
        mft__update_passed(ctx, s, at, m);
    }
    if (status == MFT_OK) mft__of(s->p)->grad_written = 0;
    return status;
}

/* A step that updates its parameters one by one begins. */
static void mft__optimizer_begin(mft_optimizer *opt)
{
    ++*(int64_t *)opt->step->data;
    opt->ctx->weights_version++;
}

/* What clipping multiplies gradients of that norm by, as torch.nn.utils.clip_grad_norm_ */
static double mft__clip(const mft_optimizer *opt, double norm)
{
    double clip = opt->desc.max_grad_norm / (norm + 1e-6);
    return opt->desc.max_grad_norm > 0 && clip < 1 ? clip : 1;
}

/* The step on gradients that are still to be multiplied by grad_scale (1 / labels of a window). */
static mft_status mft__optimizer_step_scaled(mft_optimizer *opt, double learning_rate, double grad_scale, double *out_grad_norm)
{
    double     total = 0, norm;
    mft_status s = MFT_OK;
    int        i;

    for (i = 0; i < opt->n; i++) total += opt->slots[i].squares = mft__grad_squares(opt->ctx, opt->slots[i].p);
    norm = sqrt(total) * grad_scale;
    if (out_grad_norm) *out_grad_norm = norm;
    if (!(norm <= 3.4e38)) return mft__fail(opt->ctx, MFT_ERR_NOT_FINITE, "the gradient's norm is %g: nothing was updated", norm);
    mft__optimizer_begin(opt);
    for (i = 0; i < opt->n && s == MFT_OK; i++) s = mft__optimizer_update(opt, i, learning_rate, mft__clip(opt, norm) * grad_scale, opt->slots[i].squares);
    mft_optimizer_zero_grad(opt);
    return s;
}

MFT_API mft_status mft_optimizer_step(mft_optimizer *opt, double learning_rate, double *out_grad_norm)
{
    return opt ? mft__optimizer_step_scaled(opt, learning_rate, 1, out_grad_norm) : MFT_ERR_INVALID_ARGUMENT;
}

MFT_API double mft_schedule(mft_schedule_kind kind, double peak, double floor_lr, int64_t warmup_steps, int64_t total_steps, int64_t step)
{
    double progress;
    if (step < warmup_steps) return peak * ((double)step / (double)(warmup_steps > 1 ? warmup_steps : 1));
    if (kind == MFT_SCHEDULE_CONSTANT) return peak;
    progress = (double)(step - warmup_steps) / (double)(total_steps - warmup_steps > 1 ? total_steps - warmup_steps : 1);
    if (kind == MFT_SCHEDULE_LINEAR) {
        double left = (double)(total_steps - step) / (double)(total_steps - warmup_steps > 1 ? total_steps - warmup_steps : 1);
        return floor_lr + (peak - floor_lr) * (left > 0 ? left : 0);
    }
    if (progress > 1) progress = 1;
    return floor_lr + (peak - floor_lr) * (0.5 * (1 + cos(MFT__PI * progress)));
}
#endif /* MFT_IMPLEMENTATION */

/* ############################################################################## *
 *                          THE ROWS OF [KERNEL]                                  *
 * ############################################################################## */
#ifdef MFT__ROW                             /* [KERNEL] includes this file once for each row */

/* ==============================================================================
 * MARK: - [ROWS] The bodies of all rows, written once for a vector of MFT__W floats
 *
 *   in    the vocabulary of one instruction set, defined in [KERNEL] before it includes us:
 *         MFT__ROW name   MFT__TARGET attribute   MFT__V vector   MFT__W its lanes
 *         MFT__H, MFT__P  rows and vectors of a product's register tile
 *         MFT__LOAD MFT__STORE MFT__SET1 MFT__FMA(a,b,c)=ab+c MFT__SQRT MFT__ZIP_LO/HI MFT__LOAD_F16 MFT__STORE_F16
 *         MFT__MIN MFT__MAX (where b is NaN, it)   MFT__WIDE_LO/HI: half the lanes in double
 *         MFT__MUL_LOW(a, b): in each 64 bits the product of both lower halves
 *         MFT__LOAD_BF16   MFT__LOAD_Q8, MFT__LOAD_Q4 (V *q, const uint8_t *p): the 32 numbers of a block whose
 *         scale stands before p, without the scale (Q4_0: low nibbles first)
 *         MFT__UNZIP_LO/HI the even and the odd numbers of two vectors: only for a row with strips of pairs
 *   out   static functions mft__NAME_ROW
 *   rule  the other operations are the compiler's own on vectors (+ - * / & | < and so on),
 *         which gcc and clang spell alike for every width. A loop's last, partial vector goes
 *         through the same arithmetic as the others: MFT__IN fills up with zeros, MFT__OUT
 *         writes only what is there
 * ============================================================================== */
#ifndef MFT__STRIP_ONLY
#define MFT__JOIN_(a, b) mft__##a##_##b
#define MFT__JOIN(a, b)  MFT__JOIN_(a, b)
#define MFT__FN(name)    MFT__JOIN(name, MFT__ROW)
#define MFT__BODY        MFT__UNUSED MFT__TARGET static                                            /* in the table, or called */
#define MFT__HELP        MFT__UNUSED MFT__TARGET __attribute__((always_inline)) static inline      /* part of a body          */

typedef int32_t  MFT__FN(ints)   __attribute__((vector_size(4 * MFT__W)));
typedef uint32_t MFT__FN(bits)   __attribute__((vector_size(4 * MFT__W)));
typedef uint16_t MFT__FN(shorts) __attribute__((vector_size(2 * MFT__W)));
typedef uint8_t  MFT__FN(octets)  __attribute__((vector_size(MFT__W)));
typedef double   MFT__FN(wide)   __attribute__((vector_size(4 * MFT__W)));     /* half as many lanes of 64 bits   */
typedef uint64_t MFT__FN(quads)  __attribute__((vector_size(4 * MFT__W)));
typedef float    MFT__FN(half)   __attribute__((vector_size(2 * MFT__W)));
#define MFT__I MFT__FN(ints)
#define MFT__D MFT__FN(wide)
#define MFT__Q MFT__FN(quads)

/* ---- loads and stores ---- */
MFT__BODY void MFT__FN(copy_part)(float *dst, const float *src, int64_t n) { while (n-- > 0) *dst++ = *src++; }

MFT__HELP MFT__V MFT__FN(in)(const float *p, int64_t left)
{
    if (__builtin_expect(left >= MFT__W, 1)) return MFT__LOAD(p);
    else {                                  /* only here: an array zeroed in every turn is what takes the time then */
        float part[MFT__W] = { 0 };
        MFT__FN(copy_part)(part, p, left);
        return MFT__LOAD(part);
    }
}

MFT__HELP void MFT__FN(out)(float *p, int64_t left, MFT__V v)
{
    float part[MFT__W];
    if (__builtin_expect(left >= MFT__W, 1)) { MFT__STORE(p, v); return; }
    MFT__STORE(part, v);
    MFT__FN(copy_part)(p, part, left);
}
#define MFT__IN(p)     MFT__FN(in)((p) + i, n - i)
#define MFT__OUT(p, v) MFT__FN(out)((p) + i, n - i, v)
#define MFT__EACH      for (i = 0; i < n; i += MFT__W)

/* mask lanes are all ones or all zeros, as comparisons give them */
MFT__HELP MFT__V MFT__FN(select)(MFT__I mask, MFT__V yes, MFT__V no) { return (MFT__V)(((MFT__I)yes & mask) | ((MFT__I)no & ~mask)); }

/* ---- sums over lanes, always in the same order ---- */
MFT__HELP float MFT__FN(lanes_sum)(MFT__V v)
{
    float x[MFT__W];
    int   i, w;
    MFT__STORE(x, v);
    for (w = MFT__W / 2; w; w /= 2) for (i = 0; i < w; i++) x[i] += x[i + w];
    return x[0];
}

MFT__HELP float MFT__FN(lanes_max)(MFT__V v)
{
    float x[MFT__W];
    int   i, w;
    MFT__STORE(x, v);
    for (w = MFT__W / 2; w; w /= 2) for (i = 0; i < w; i++) if (x[i + w] > x[i]) x[i] = x[i + w];
    return x[0];
}

MFT__HELP void MFT__FN(widen)(MFT__V v, MFT__D *lo, MFT__D *hi) { *lo = (MFT__D)MFT__WIDE_LO(v); *hi = (MFT__D)MFT__WIDE_HI(v); }

MFT__HELP double MFT__FN(wide_sum)(MFT__D v)
{
    double x[MFT__W / 2], s = 0;
    int    i;
    memcpy(x, &v, sizeof v);
    for (i = 0; i < MFT__W / 2; i++) s += x[i];
    return s;
}

/* ---- exp, tanh, erf: polynomials fitted for this library; errors against libm in double, kept
 *      over the whole range on every row by tests/test_kernels.c: exp 1.2 ulp, tanh 1.7, and with them gelu (of x >= 0,
 *      where nothing cancels) 2, silu 2.5 ---- */

/* e^x = 2^n e^r, |r| <= ln2 / 2: at most 1.2 ulp, infinity above 88.72, subnormals down to 1.4e-45.
 * n reaches from -150 to 129: where an instruction does not take that, 2^n goes in two factors, of which the
 * last rounds a subnormal once. */
MFT__HELP MFT__V MFT__FN(exp)(MFT__V x)
{
    MFT__V one = MFT__SET1(1.0f), magic = MFT__SET1(12582912.0f), lo = MFT__SET1(-104.5f), hi = MFT__SET1(89.5f), t, n, r, q;
    x = MFT__MIN(hi, MFT__MAX(lo, x));                          /* NaN stays */
    t = MFT__FMA(x, MFT__SET1(1.44269504f), magic);             /* 1.5 2^23: the sum's last bits are the integer */
    n = t;
    t = t - magic;
    r = MFT__FMA(t, MFT__SET1(-0.693359375f), x);               /* ln 2 in two parts: the first product is exact */
    r = MFT__FMA(t, MFT__SET1(2.12194440e-4f), r);
    q = MFT__SET1(1.979024819e-4f);
    q = MFT__FMA(q, r, MFT__SET1(1.394475927e-3f));
    q = MFT__FMA(q, r, MFT__SET1(8.333497681e-3f));
    q = MFT__FMA(q, r, MFT__SET1(4.166629538e-2f));
    q = MFT__FMA(q, r, MFT__SET1(1.666666567e-1f));
    q = MFT__FMA(q, r, MFT__SET1(0.5f));
    q = MFT__FMA(r * r, q, r) + one;
#ifdef MFT__TIMES_2_TO
    (void)n;
    return MFT__TIMES_2_TO(q, t);
#else
    {
        MFT__I whole = (MFT__I)n - (MFT__I)magic, half = whole >> 1;
        return q * (MFT__V)((half + 127) << 23) * (MFT__V)((whole - half + 127) << 23);
    }
#endif
}

/* an odd polynomial near zero, 1 - 2 / (e^2|x| + 1) beyond: at most 1.7 ulp */
MFT__HELP MFT__V MFT__FN(tanh)(MFT__V x)
{
    MFT__I sign = (MFT__I)x & (MFT__I)MFT__SET1(-0.0f);
    MFT__V a = (MFT__V)((MFT__I)x ^ sign), z = x * x, one = MFT__SET1(1.0f), q, far;
    q = MFT__SET1(2.026457107e-3f);
    q = MFT__FMA(q, z, MFT__SET1(-8.047138341e-3f));
    q = MFT__FMA(q, z, MFT__SET1(2.164689451e-2f));
    q = MFT__FMA(q, z, MFT__SET1(-5.393675715e-2f));
    q = MFT__FMA(q, z, MFT__SET1(1.333312541e-1f));
    q = MFT__FMA(q, z, MFT__SET1(-3.333332837e-1f));
    q = MFT__FMA(q * z, a, a);
    far = one - MFT__SET1(2.0f) / (MFT__FN(exp)(a + a) + one);
    return (MFT__V)((MFT__I)MFT__FN(select)(a < MFT__SET1(0.625f), q, far) | sign);
}

/* an odd polynomial near zero, 1 - e^-p(|x|) beyond: at most 2 ulp */
MFT__HELP MFT__V MFT__FN(erf)(MFT__V x)
{
    MFT__I sign = (MFT__I)x & (MFT__I)MFT__SET1(-0.0f);
    MFT__V a = (MFT__V)((MFT__I)x ^ sign), z = x * x, four = MFT__SET1(4.0f), q, p, far;
    q = MFT__SET1(8.513101784e-5f);
    q = MFT__FMA(q, z, MFT__SET1(-8.175639086e-4f));
    q = MFT__FMA(q, z, MFT__SET1(5.203858949e-3f));
    q = MFT__FMA(q, z, MFT__SET1(-2.686050907e-2f));
    q = MFT__FMA(q, z, MFT__SET1(1.128371507e-1f));
    q = MFT__FMA(q, z, MFT__SET1(-3.761263490e-1f));
    q = MFT__FMA(q, z, MFT__SET1(1.283791671e-1f));
    q = MFT__FMA(q, a, a);
    p = MFT__MIN(four, a);
    far = MFT__SET1(-1.983324764e-4f);
    far = MFT__FMA(far, p, MFT__SET1(3.066585632e-3f));
    far = MFT__FMA(far, p, MFT__SET1(-2.231953107e-2f));
    far = MFT__FMA(far, p, MFT__SET1(1.041225269e-1f));
    far = MFT__FMA(far, p, MFT__SET1(6.369661093e-1f));
    far = MFT__FMA(far, p, MFT__SET1(1.127803087e+0f));
    far = MFT__FMA(far, p, MFT__SET1(1.650555641e-4f));
    far = MFT__SET1(1.0f) - MFT__FN(exp)(-far);
    return (MFT__V)((MFT__I)MFT__FN(select)(a < MFT__SET1(0.9f), q, far) | sign);
}

MFT__HELP MFT__V MFT__FN(sigmoid)(MFT__V x) { MFT__V one = MFT__SET1(1.0f); return one / (one + MFT__FN(exp)(-x)); }

/* gelu_tanh(x) = 0.5 x (1 + tanh u) = x sigmoid(2u),  u = sqrt(2/pi) (x + 0.044715 x^3) */
MFT__HELP MFT__V MFT__FN(gelu_2u)(MFT__V x) { return x * MFT__FMA(x * x, MFT__SET1(0.0713548162726f), MFT__SET1(1.59576912161f)); }

MFT__HELP MFT__V MFT__FN(act1)(mft__activation f, MFT__V x)
{
    MFT__V one = MFT__SET1(1.0f);
    switch (f) {
    case MFT__GELU_TANH: return x / (one + MFT__FN(exp)(-MFT__FN(gelu_2u)(x)));
    case MFT__GELU_ERF:  return MFT__SET1(0.5f) * x * (one + MFT__FN(erf)(x * MFT__SET1(0.70710678f)));
    case MFT__SILU:      return x / (one + MFT__FN(exp)(-x));
    case MFT__RELU:      return MFT__FN(select)(x <= MFT__SET1(0.0f), MFT__SET1(0.0f), x);
    case MFT__TANH:      return MFT__FN(tanh)(x);
    }
    return x;
}

MFT__HELP MFT__V MFT__FN(act1_slope)(mft__activation f, MFT__V x)
{
    MFT__V one = MFT__SET1(1.0f), s, t;
    switch (f) {
    case MFT__GELU_TANH:                    /* s + x s (1 - s) 2u' */
        s = MFT__FN(sigmoid)(MFT__FN(gelu_2u)(x));
        t = x * MFT__FMA(x * x, MFT__SET1(0.214064448818f), MFT__SET1(1.59576912161f));
        return MFT__FMA(t * s, one - s, s);
    case MFT__GELU_ERF:                     /* Phi(x) + x phi(x) */
        s = MFT__SET1(0.5f) * (one + MFT__FN(erf)(x * MFT__SET1(0.70710678f)));
        return MFT__FMA(x * MFT__SET1(0.39894228f), MFT__FN(exp)(MFT__SET1(-0.5f) * x * x), s);
    case MFT__SILU:                         /* s (1 + x (1 - s)) */
        s = MFT__FN(sigmoid)(x);
        return s * MFT__FMA(x, one - s, one);
    case MFT__RELU:
        return MFT__FN(select)(x > MFT__SET1(0.0f), one, MFT__FN(select)(x <= MFT__SET1(0.0f), MFT__SET1(0.0f), x));
    case MFT__TANH:
        t = MFT__FN(tanh)(x);
        return one - t * t;
    }
    return one;
}

/* f(x) and its slope; the two that models' gates have share their sigmoid */
MFT__HELP MFT__V MFT__FN(act1_both)(mft__activation f, MFT__V x, MFT__V *slope)
{
    MFT__V one = MFT__SET1(1.0f), s, t;
    if (f != MFT__GELU_TANH && f != MFT__SILU) { *slope = MFT__FN(act1_slope)(f, x); return MFT__FN(act1)(f, x); }
    s = t = x;
    if (f == MFT__GELU_TANH) { s = MFT__FN(gelu_2u)(x); t = x * MFT__FMA(x * x, MFT__SET1(0.214064448818f), MFT__SET1(1.59576912161f)); }
    s = MFT__FN(sigmoid)(s);
    *slope = MFT__FMA(t * s, one - s, s);
    return x * s;
}

/* ---- storage types ---- */
/* The 32 numbers of a quantised block, without its scale. */
MFT__HELP void MFT__FN(load_quants)(MFT__V *q, mft_dtype dtype, const uint8_t *block)
{
    if (dtype == MFT_Q8_0) MFT__LOAD_Q8(q, block + 2); else MFT__LOAD_Q4(q, block + 2);
}

/* The scales of n <= MFT__SCALES blocks of some rows: collected, then converted all at once. */
MFT__HELP void MFT__FN(load_scales)(float (*scales)[MFT__SCALES], int rows, const void *const *blocks, int64_t from, int64_t block_bytes, int64_t n)
{
    uint16_t h[4][MFT__SCALES];
    int64_t  i;
    int      r;
    MFT__UNROLL
    for (r = 0; r < rows; r++) {
        const uint8_t *p = (const uint8_t *)blocks[r] + from * block_bytes;
        if (n >= MFT__SCALES) {
            MFT__UNROLL
            for (i = 0; i < MFT__SCALES; i++) memcpy(&h[r][i], p + i * block_bytes, sizeof h[r][i]);
        } else {
            memset(h[r], 0, sizeof h[r]);
            for (i = 0; i < n; i++) memcpy(&h[r][i], p + i * block_bytes, sizeof h[r][i]);
        }
    }
    MFT__UNROLL
    for (r = 0; r < rows; r++) {
        MFT__UNROLL
        for (i = 0; i < MFT__SCALES; i += MFT__W) MFT__STORE(scales[r] + i, MFT__LOAD_F16(h[r] + i));
    }
}

MFT__HELP void MFT__FN(quants_to_float)(float *dst, const uint8_t *src, mft_dtype dtype, int64_t blocks)
{
    int64_t size = dtype == MFT_Q8_0 ? 34 : 18, i;
    float   scales[1][MFT__SCALES];
    int     j;
    MFT__V  q[32 / MFT__W], scale;
    const void *row = src;
    for (i = 0; i < blocks; i++, dst += 32) {
        if (i % MFT__SCALES == 0) MFT__FN(load_scales)(scales, 1, &row, i, size, blocks - i);
        scale = MFT__SET1(scales[0][i % MFT__SCALES]);
        MFT__FN(load_quants)(q, dtype, src + i * size);
        MFT__UNROLL
        for (j = 0; j < 32; j += MFT__W) MFT__STORE(dst + j, scale * q[j / MFT__W]);
    }
}

MFT__BODY void MFT__FN(to_float)(float *dst, const void *src, mft_dtype dtype, int64_t n)
{
    int64_t i = 0;
    if (dtype == MFT_BF16)
        for (; i + MFT__W <= n; i += MFT__W) MFT__STORE(dst + i, MFT__LOAD_BF16((const uint16_t *)src + i));
    else if (dtype == MFT_F16)
        for (; i + MFT__W <= n; i += MFT__W) MFT__STORE(dst + i, MFT__LOAD_F16((const uint16_t *)src + i));
    else if (dtype == MFT_Q8_0)    { MFT__FN(quants_to_float)(dst, (const uint8_t *)src, MFT_Q8_0, n / 32); return; }
    else if (dtype == MFT_Q4_0)    { MFT__FN(quants_to_float)(dst, (const uint8_t *)src, MFT_Q4_0, n / 32); return; }
    mft__to_float(dst + i, (const char *)src + mft_dtype_bytes(dtype, i), dtype, n - i);
}

/* the nearest bf16 in the upper halves, ties to even; what the lower halves have is not to be looked at */
MFT__HELP MFT__FN(bits) MFT__FN(round_bf16)(MFT__V x)
{
    MFT__FN(bits) u = (MFT__FN(bits))x;
    return (MFT__FN(bits))MFT__FN(select)(x == x, (MFT__V)(u + 0x7fff + ((u >> 16) & 1)), (MFT__V)(u | 0x400000));
}

MFT__BODY void MFT__FN(from_float)(void *dst, mft_dtype dtype, const float *src, int64_t n)
{
    int64_t i = 0;
    if (dtype == MFT_BF16)
        for (; i + MFT__W <= n; i += MFT__W) {
            MFT__V          x = MFT__LOAD(src + i);
            MFT__FN(shorts) h = __builtin_convertvector(MFT__FN(round_bf16)(x) >> 16, MFT__FN(shorts));
            memcpy((uint16_t *)dst + i, &h, sizeof h);
        }
    else if (dtype == MFT_F16)
        for (; i + MFT__W <= n; i += MFT__W) MFT__STORE_F16((uint16_t *)dst + i, MFT__LOAD(src + i));
    mft__from_float((char *)dst + mft_dtype_bytes(dtype, i), dtype, src + i, n - i);
}

/* ---- random numbers: mft__random of many counters ---- */

/* The bits of counters from `counter` on, lower half first, n of 32 bits in all; bits has room for MFT__DRAWS. Four
 * vectors at once: a round waits for its product, 5 cycles. */
MFT__HELP void MFT__FN(draw)(uint32_t *bits, uint64_t seed, uint64_t stream, uint64_t counter, int64_t n)
{
    MFT__Q   x0[4], x1[4], p, lane, none = { 0 }, times = none + mft__philox_times, low = none + 0xffffffffu;
    uint32_t key, high = mft__random_key(seed, stream, &key), k;
    int64_t  i;
    int      j, round;
    for (j = 0; j < MFT__W / 2; j++) lane[j] = (uint64_t)j;
    for (i = 0; i < n; i += 4 * MFT__W) {
        MFT__UNROLL
        for (j = 0; j < 4; j++) {
            x0[j] = lane + (counter + (uint64_t)(i / 2 + j * (MFT__W / 2)));
            x1[j] = (x0[j] >> 32) ^ high;
        }
        for (round = 0, k = key; round < MFT__ROUNDS; round++, k += mft__philox_key) {
            MFT__UNROLL
            for (j = 0; j < 4; j++) {       /* upper halves are left to be anything: MUL_LOW does not see them */
                p     = (MFT__Q)MFT__MUL_LOW(x0[j], times);
                x0[j] = (p >> 32) ^ x1[j] ^ (uint64_t)k;
                x1[j] = p;
            }
        }
        MFT__UNROLL
        for (j = 0; j < 4; j++) { p = (x0[j] & low) | x1[j] << 32; memcpy(bits + i + j * MFT__W, &p, sizeof p); }
    }
}

/* Number i of the whole is kept if draw i is not below p. `first` is even. */
MFT__BODY void MFT__FN(dropout)(float *y, const float *x, float p, uint64_t seed, uint64_t stream, int64_t first, int64_t n_all, int add)
{
    uint32_t        bits[MFT__DRAWS], below = (uint32_t)((double)p * 4294967296.0);
    MFT__V          s = MFT__SET1(1 / (1 - p)), zero = MFT__SET1(0.0f);
    MFT__FN(bits)   u, none = { 0 }, least = none + below;
    int64_t         i, n;
    for (; n_all > 0; n_all -= n, first += n, x += n, y += n) {
        n = mft__min(n_all, MFT__DRAWS);
        MFT__FN(draw)(bits, seed, stream, (uint64_t)first / 2, n);
        MFT__EACH {
            MFT__V v;
            memcpy(&u, bits + i, sizeof u);
            v = MFT__FN(select)((MFT__I)(u >= least), MFT__IN(x) * s, zero);
            if (add) v += MFT__IN(y);
            MFT__OUT(y, v);
        }
    }
}

/* bf16 above or below, each with the odds that make the mean x. Number i of the whole takes 16 bits, a quarter of a
 * counter's: `first` is a multiple of 4. */
MFT__BODY void MFT__FN(bf16_by_chance)(uint16_t *dst, const float *src, uint64_t seed, uint64_t stream, int64_t first, int64_t n_all)
{
    uint32_t        bits[MFT__DRAWS];
    MFT__FN(shorts) h;
    MFT__FN(bits)   u, finite, none = { 0 }, infinite = none + 0x7f800000u;
    MFT__V          x;
    int64_t         i, n;
    for (; n_all > 0; n_all -= n, first += n, src += n, dst += n) {
        n = mft__min(n_all, 2 * MFT__DRAWS);
        MFT__FN(draw)(bits, seed, stream, (uint64_t)first / 4, (n + 1) / 2);
        MFT__EACH {
            x = MFT__IN(src);
            memcpy(&h, (const char *)bits + 2 * i, sizeof h);
            u = (MFT__FN(bits))x;
            finite = (MFT__FN(bits))((u & infinite) != infinite);               /* infinity and NaN stay */
            u += __builtin_convertvector(h, MFT__FN(bits)) & finite;
            h = __builtin_convertvector(u >> 16, MFT__FN(shorts));
            if (n - i >= MFT__W) memcpy(dst + i, &h, sizeof h);
            else                 memcpy(dst + i, &h, sizeof *dst * (size_t)(n - i));
        }
    }
}

/* ---- 8-bit codes of a block of moments: see [OPTIMIZER] ---- */

/* ~0 where a is above e: both are not negative, so that their bits compare as they do, and cheaper than into masks */
MFT__HELP MFT__I MFT__FN(above)(MFT__V a, MFT__I e) { return (e - (MFT__I)a) >> 31; }

/* The nearest magnitude: its decade by comparing with all edges, then the cell in it. With n cells in the decade 10^(d-6),
 * y = a n / (0.9 10^(d-6)) + 8 n / 9 counts from n: less first - 1 it is the number of the magnitude. Rows agree, but for numbers
 * within a rounding of the middle of two, where a compiler fuses y. `mft bench ops` has what it takes, adamw8bit. */
MFT__BODY void MFT__FN(code_pack)(const mft__code *c, uint8_t *codes, float *scale, const float *x, int64_t n)
{
    MFT__V  zero = MFT__SET1(0.0f), one = MFT__SET1(1.0f), sign = MFT__SET1(-0.0f), most = zero, v, a, y, whole;
    MFT__I  none = { 0 }, k, d, in, cells, less, cut, edge[8], rate[7];
    float   top;
    int64_t i;
    int     j, minus = c->is_signed, first = c->first;          /* codes are bytes, which might be c's for all the compiler knows */
    MFT__FN(octets) b;
    MFT__UNROLL
    for (j = 0; j < 8; j++) edge[j] = (MFT__I)MFT__SET1(c->edge[j]);
    MFT__UNROLL
    for (j = 0; j < 7; j++) rate[j] = (MFT__I)MFT__SET1(c->cells[j]) ^ (j ? (MFT__I)MFT__SET1(c->cells[j - 1]) : none);
    MFT__EACH { a = (MFT__V)((MFT__I)MFT__IN(x) & ~(MFT__I)sign); most = MFT__MAX((MFT__V)((MFT__I)a & (a == a)), most); }
    top = MFT__FN(lanes_max)(most);
    *scale = top = top > 3.402823466e38f ? 3.402823466e38f : top;           /* a square may overflow; zero times infinity must not be */
    most = MFT__SET1(top > 1.2e-38f ? 1 / top : 0.0f);                      /* a subnormal's inverse may be infinite: all of them are as zero */
    MFT__EACH {
        v     = MFT__IN(x);
        a     = (MFT__V)((MFT__I)v & ~(MFT__I)sign) * most;
        a     = MFT__FN(select)(a < one, a, one);                           /* NaN: as 1 */
        d     = none;
        cells = rate[0];
        MFT__UNROLL
        for (j = 1; j < 7; j++) {
            in    = MFT__FN(above)(a, edge[j]);
            d    -= in;
            cells = cells ^ (in & rate[j]);
        }
        whole = (MFT__V)((d + (126 + first)) << 23);                     /* first << d: 126 + first is 127 + its logarithm */
        y = a * (MFT__V)cells + whole * MFT__SET1(0.888888889f);
        y = MFT__MIN(y, whole * MFT__SET1(2.0f) - MFT__SET1(0.5f));         /* the last of its decade */
        k = __builtin_convertvector(y, MFT__I) - (first - 1);
        k = (k & MFT__FN(above)(a, edge[0])) - MFT__FN(above)(a, edge[7]);
        if (minus) {
            less = v < zero; cut = k > 127;
            cut = (k & ~cut) | ((none + 127) & cut);
            k   = ((127 - cut) & less) | ((127 + k) & ~less);
        } else k -= (k == 0) & (v > zero);
        b = __builtin_convertvector(k, MFT__FN(octets));
        if (n - i >= MFT__W) memcpy(codes + i, &b, sizeof b);
        else                 memcpy(codes + i, &b, (size_t)(n - i));
    }
}

/* ---- vectors ---- */
MFT__BODY float MFT__FN(dot)(const float *a, const float *b, int64_t n)
{
    MFT__V  s[4];                           /* four sums at once: an addition takes four cycles */
    int64_t i;
    int     j;
    for (j = 0; j < 4; j++) s[j] = MFT__SET1(0.0f);
    for (i = 0; i + 4 * MFT__W <= n; i += 4 * MFT__W) {
        MFT__UNROLL
        for (j = 0; j < 4; j++) s[j] = MFT__FMA(MFT__LOAD(a + i + j * MFT__W), MFT__LOAD(b + i + j * MFT__W), s[j]);
    }
    for (; i < n; i += MFT__W) s[0] = MFT__FMA(MFT__IN(a), MFT__IN(b), s[0]);
    return MFT__FN(lanes_sum)((s[0] + s[1]) + (s[2] + s[3]));
}

MFT__BODY void MFT__FN(axpy)(float *y, float alpha, const float *x, int64_t n)
{ int64_t i; MFT__V k = MFT__SET1(alpha); MFT__EACH MFT__OUT(y, MFT__FMA(k, MFT__IN(x), MFT__IN(y))); }

MFT__BODY void MFT__FN(add)(float *y, const float *a, const float *b, int64_t n)
{ int64_t i; MFT__EACH MFT__OUT(y, MFT__IN(a) + MFT__IN(b)); }

MFT__BODY void MFT__FN(mul)(float *y, const float *a, const float *b, int64_t n)
{ int64_t i; MFT__EACH MFT__OUT(y, MFT__IN(a) * MFT__IN(b)); }

MFT__BODY void MFT__FN(mul_add)(float *y, const float *a, const float *b, int64_t n)
{ int64_t i; MFT__EACH MFT__OUT(y, MFT__FMA(MFT__IN(a), MFT__IN(b), MFT__IN(y))); }

MFT__BODY void MFT__FN(scale)(float *y, float s, const float *x, int64_t n)
{ int64_t i; MFT__V k = MFT__SET1(s); MFT__EACH MFT__OUT(y, k * MFT__IN(x)); }

MFT__BODY double MFT__FN(sum)(const float *x, int64_t n)
{
    MFT__D  s0 = { 0 }, s1 = { 0 }, lo, hi;
    int64_t i;
    MFT__EACH { MFT__FN(widen)(MFT__IN(x), &lo, &hi); s0 += lo; s1 += hi; }
    return MFT__FN(wide_sum)(s0 + s1);
}

/* sum (x - mean)^2 in double */
MFT__HELP double MFT__FN(sum_squares_around)(const float *x, float mean, int64_t n)
{
    MFT__D  s0 = { 0 }, s1 = { 0 }, lo, hi;
    MFT__V  m  = MFT__SET1(mean);
    int64_t i;
    for (i = 0; i + MFT__W <= n; i += MFT__W) {
        __builtin_prefetch(x + i + 1024);   /* of gradients, which lie in memory */
        MFT__FN(widen)(MFT__LOAD(x + i) - m, &lo, &hi);
        s0 += lo * lo; s1 += hi * hi;
    }
    if (i < n) {                            /* lanes that are not there must not count as -mean */
        float part[MFT__W] = { 0 };
        int   j;
        for (j = 0; j < n - i; j++) part[j] = x[i + j] - mean;
        MFT__FN(widen)(MFT__LOAD(part), &lo, &hi); s0 += lo * lo; s1 += hi * hi;
    }
    return MFT__FN(wide_sum)(s0 + s1);
}

MFT__BODY double MFT__FN(sum_squares)(const float *x, int64_t n) { return MFT__FN(sum_squares_around)(x, 0, n); }

MFT__BODY float MFT__FN(max)(const float *x, int64_t n)
{
    MFT__V  m[2], v[2];
    MFT__I  odd = { 0 };
    float   part[MFT__W], best;
    int64_t i;
    m[0] = m[1] = MFT__SET1(x[0]);
    for (i = 0; i + 2 * MFT__W <= n; i += 2 * MFT__W) {
        v[0] = MFT__LOAD(x + i); v[1] = MFT__LOAD(x + i + MFT__W);
        m[0] = MFT__MAX(v[0], m[0]); m[1] = MFT__MAX(v[1], m[1]);
        odd |= (v[0] != v[0]) | (v[1] != v[1]);
    }
    MFT__STORE(part, MFT__FN(select)(odd, MFT__SET1(NAN), MFT__MAX(m[0], m[1])));
    best = part[0];
    for (i = i < n ? i : n; i < n; i++) if (!(x[i] <= best) && best == best) best = x[i];
    for (i = 1; i < MFT__W; i++) if (!(part[i] <= best) && best == best) best = part[i];
    return best;
}

MFT__BODY float MFT__FN(exp_sum)(float *y, const float *x, float shift, int64_t n)
{
    MFT__V  s = MFT__SET1(0.0f), k = MFT__SET1(shift), e;
    int64_t i;
    for (i = 0; i + MFT__W <= n; i += MFT__W) { e = MFT__FN(exp)(MFT__LOAD(x + i) - k); s += e; MFT__STORE(y + i, e); }
    if (i < n) {
        float part[MFT__W] = { 0 };
        MFT__OUT(y, MFT__FN(exp)(MFT__IN(x) - k));
        MFT__FN(copy_part)(part, y + i, n - i);
        s += MFT__LOAD(part);
    }
    return MFT__FN(lanes_sum)(s);
}

/* ---- activations: one loop for each, so that the choice is made once ---- */
#define MFT__EACH_ACTIVATION(LOOP)                              \
    switch (f) {                                                \
    case MFT__GELU_TANH: LOOP(MFT__GELU_TANH) break;            \
    case MFT__GELU_ERF:  LOOP(MFT__GELU_ERF)  break;            \
    case MFT__SILU:      LOOP(MFT__SILU)      break;            \
    case MFT__RELU:      LOOP(MFT__RELU)      break;            \
    case MFT__TANH:      LOOP(MFT__TANH)      break;            \
    }

MFT__BODY void MFT__FN(act)(mft__activation f, float *y, const float *x, int64_t n)
{
    int64_t i;
#define MFT__LOOP(F) MFT__EACH MFT__OUT(y, MFT__FN(act1)(F, MFT__IN(x)));
    MFT__EACH_ACTIVATION(MFT__LOOP)
#undef MFT__LOOP
}

MFT__BODY void MFT__FN(act_backward)(mft__activation f, float *dx, const float *dy, const float *x, int64_t n, int add)
{
    int64_t i;
    MFT__V  zero = MFT__SET1(0.0f);
#define MFT__LOOP(F) MFT__EACH MFT__OUT(dx, MFT__FMA(MFT__IN(dy), MFT__FN(act1_slope)(F, MFT__IN(x)), add ? MFT__IN(dx) : zero));
    MFT__EACH_ACTIVATION(MFT__LOOP)
#undef MFT__LOOP
}

MFT__BODY void MFT__FN(gate)(mft__activation f, float *y, const float *g, const float *u, int64_t n)
{
    int64_t i;
#define MFT__LOOP(F) MFT__EACH MFT__OUT(y, MFT__FN(act1)(F, MFT__IN(g)) * MFT__IN(u));
    MFT__EACH_ACTIVATION(MFT__LOOP)
#undef MFT__LOOP
}

MFT__BODY void MFT__FN(gate_backward)(mft__activation f, float *dg, float *du, const float *dy, const float *g, const float *u, int64_t n, int add_g, int add_u)
{
    int64_t i;
    MFT__V  zero = MFT__SET1(0.0f), y, slope, d;
#define MFT__LOOP(F) MFT__EACH {                                                                                          \
        y = MFT__FN(act1_both)(F, MFT__IN(g), &slope);                                                                    \
        d = MFT__IN(dy);                                                                                                  \
        if (dg) MFT__OUT(dg, MFT__FMA(d * MFT__IN(u), slope, add_g ? MFT__IN(dg) : zero));                                \
        if (du) MFT__OUT(du, MFT__FMA(d, y, add_u ? MFT__IN(du) : zero)); }
    MFT__EACH_ACTIVATION(MFT__LOOP)
#undef MFT__LOOP
}

/* ---- norms, one row of numbers at a time; sums in double, see [OPS] for the derivatives ---- */
MFT__BODY float MFT__FN(rms_norm)(float *y, const float *x, const float *w, float offset, float eps, int64_t n)
{
    float   r = (float)(1.0 / sqrt(MFT__FN(sum_squares)(x, n) / (double)n + (double)eps));
    MFT__V  k = MFT__SET1(r), o = MFT__SET1(offset);
    int64_t i;
    MFT__EACH MFT__OUT(y, MFT__IN(x) * k * (MFT__IN(w) + o));
    return r;
}

MFT__BODY void MFT__FN(rms_norm_backward)(float *dx, float *dw, const float *dy, const float *x, const float *w, float offset, float r, int64_t n, int add)
{
    MFT__V  k = MFT__SET1(r), o = MFT__SET1(offset), zero = MFT__SET1(0.0f), mean;
    MFT__D  s0 = { 0 }, s1 = { 0 }, a0, a1, b0, b1;
    int64_t i;
    MFT__EACH {
        MFT__FN(widen)(MFT__IN(dy) * (MFT__IN(w) + o), &a0, &a1);
        MFT__FN(widen)(MFT__IN(x) * k, &b0, &b1);
        s0 += a0 * b0; s1 += a1 * b1;
    }
    mean = MFT__SET1((float)(MFT__FN(wide_sum)(s0 + s1) / (double)n));
    MFT__EACH {
        MFT__V h = MFT__IN(x) * k, g = MFT__IN(dy);
        if (dx) MFT__OUT(dx, (add ? MFT__IN(dx) : zero) + k * (g * (MFT__IN(w) + o) - h * mean));
        if (dw) MFT__OUT(dw, MFT__FMA(g, h, MFT__IN(dw)));
    }
}

MFT__BODY float MFT__FN(layer_norm)(float *y, const float *x, const float *w, const float *b, float eps, int64_t n, float *out_mean)
{
    float   mean = (float)(MFT__FN(sum)(x, n) / (double)n);
    float   r = (float)(1.0 / sqrt(MFT__FN(sum_squares_around)(x, mean, n) / (double)n + (double)eps));
    MFT__V  k = MFT__SET1(r), m = MFT__SET1(mean), zero = MFT__SET1(0.0f);
    int64_t i;
    MFT__EACH MFT__OUT(y, MFT__FMA((MFT__IN(x) - m) * k, MFT__IN(w), b ? MFT__IN(b) : zero));
    *out_mean = mean;
    return r;
}

MFT__BODY void MFT__FN(layer_norm_backward)(float *dx, float *dw, float *db, const float *dy, const float *x, const float *w, float mean, float r, int64_t n, int add)
{
    MFT__V  k = MFT__SET1(r), m = MFT__SET1(mean), zero = MFT__SET1(0.0f), mean_g, mean_gh;
    MFT__D  g0 = { 0 }, g1 = { 0 }, s0 = { 0 }, s1 = { 0 }, a0, a1, b0, b1;
    int64_t i;
    MFT__EACH {                             /* past the end w is 0 */
        MFT__FN(widen)(MFT__IN(dy) * MFT__IN(w), &a0, &a1);
        MFT__FN(widen)((MFT__IN(x) - m) * k, &b0, &b1);
        g0 += a0; g1 += a1; s0 += a0 * b0; s1 += a1 * b1;
    }
    mean_g  = MFT__SET1((float)(MFT__FN(wide_sum)(g0 + g1) / (double)n));
    mean_gh = MFT__SET1((float)(MFT__FN(wide_sum)(s0 + s1) / (double)n));
    MFT__EACH {
        MFT__V h = (MFT__IN(x) - m) * k, g = MFT__IN(dy);
        if (dx) MFT__OUT(dx, (add ? MFT__IN(dx) : zero) + k * (g * MFT__IN(w) - mean_g - h * mean_gh));
        if (dw) MFT__OUT(dw, MFT__FMA(g, h, MFT__IN(dw)));
        if (db) MFT__OUT(db, MFT__IN(db) + g);
    }
}

/* sin and cos of half a vector: x less the nearest n pi/2 in three parts, the first two of which have exact products with n for
 * |x| < 2^31, then Taylor's series (the terms left out are below 1e-12), turned by n quarters. */
MFT__HELP MFT__D MFT__FN(cos_sin1)(MFT__D x, MFT__D *sine)
{
    MFT__D zero = { 0 }, magic = zero + 6755399441055744.0, t, n, r, z, s, c;
    MFT__Q none = { 0 }, q, odd;
    t = x * 0.63661977236758134 + magic;                        /* as in exp */
    n = t - magic;
    r = x - n * 1.570796012878418;                              /* 22 bits */
    r = r - n * 3.139164164167596e-07;                          /* 22 bits */
    r = r - n * 6.223372171896613e-14;
    z = r * r;
    s = r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800 + z * (1.0 / 6227020800.0))))));
    c = 1.0 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
    q   = (MFT__Q)t;
    odd = none - (q & 1);
    *sine = (MFT__D)((((MFT__Q)s & ~odd) | ((MFT__Q)c & odd)) ^ ((q & 2) << 62));
    return  (MFT__D)((((MFT__Q)c & ~odd) | ((MFT__Q)s & odd)) ^ (((q + 1) & 2) << 62));
}

/* c = cos x, s = sin x, in double, so that only the last rounding counts: at most 0.501 ulp. Angles beyond 2^31 are libm's. */
MFT__BODY void MFT__FN(cos_sin)(float *c, float *s, const float *x, int64_t n)
{
    MFT__D  d[2], sine;
    MFT__V  v;
    MFT__I  far = { 0 };
    int32_t any[MFT__W], beyond = 0;
    MFT__FN(half) cosines[2], sines[2];
    int64_t i;
    int     j;
    MFT__EACH {
        v = MFT__IN(x);
        far |= ~((v < MFT__SET1(2147483648.0f)) & (v > MFT__SET1(-2147483648.0f)));
        MFT__FN(widen)(v, &d[0], &d[1]);
        MFT__UNROLL
        for (j = 0; j < 2; j++) {
            cosines[j] = __builtin_convertvector(MFT__FN(cos_sin1)(d[j], &sine), MFT__FN(half));
            sines[j]   = __builtin_convertvector(sine, MFT__FN(half));
        }
        memcpy(&v, cosines, sizeof v); MFT__OUT(c, v);
        memcpy(&v, sines, sizeof v);   MFT__OUT(s, v);
    }
    memcpy(any, &far, sizeof any);
    for (j = 0; j < MFT__W; j++) beyond |= any[j];
    for (i = 0; beyond && i < n; i++) if (!(fabsf(x[i]) < 2147483648.0f)) { c[i] = (float)cos((double)x[i]); s[i] = (float)sin((double)x[i]); }
}

MFT__BODY void MFT__FN(rope)(float *y, const float *x, const float *c, const float *s, int64_t h, int add)
{
    int64_t i, n = h;
    MFT__EACH {
        MFT__V c1 = MFT__IN(c), s1 = MFT__IN(s), x0 = MFT__IN(x), x1 = MFT__IN(x + h);
        MFT__V y0 = x0 * c1 - x1 * s1, y1 = x1 * c1 + x0 * s1;
        if (add) { y0 += MFT__IN(y); y1 += MFT__IN(y + h); }
        MFT__OUT(y, y0); MFT__OUT(y + h, y1);
    }
}

MFT__BODY void MFT__FN(adamw)(float *p, float *m, float *v, const float *g, int64_t n, const mft__adamw *k)
{
    MFT__V  gs = MFT__SET1(k->grad_scale), m1 = MFT__SET1(k->one_minus_beta1), b2 = MFT__SET1(k->beta2), m2 = MFT__SET1(k->one_minus_beta2);
    MFT__V  decay = MFT__SET1(k->decay), lr = MFT__SET1(k->lr_over_c1), c2 = MFT__SET1(k->inv_sqrt_c2), eps = MFT__SET1(k->eps);
    int64_t i;
    MFT__EACH {
        MFT__V d = MFT__IN(g) * gs, mm = MFT__IN(m), vv = MFT__IN(v) * b2;
        __builtin_prefetch(p + i + 512); __builtin_prefetch(m + i + 512);      /* memory is the limit */
        __builtin_prefetch(v + i + 512); __builtin_prefetch(g + i + 512);
        mm = MFT__FMA(m1, d - mm, mm);
        vv = MFT__FMA(m2 * d, d, vv);
        MFT__OUT(m, mm);
        MFT__OUT(v, vv);
        MFT__OUT(p, MFT__IN(p) * decay - lr * mm / (MFT__SQRT(vv) * c2 + eps));
    }
}

/* ---- products: see mft__gemm for the plan ---- */

/* dst (MFT__W rows, ldd apart) = src transposed: log2(W) rounds, each zipping row i with row i + W/2 */
MFT__HELP void MFT__FN(transpose)(float *dst, int64_t ldd, const float *src, int64_t lds)
{
    MFT__V a[MFT__W], b[MFT__W];
    int    i, w;
    MFT__UNROLL
    for (i = 0; i < MFT__W; i++) a[i] = MFT__LOAD(src + i * lds);
    MFT__UNROLL
    for (w = MFT__W; w > 1; w /= 2) {
        MFT__UNROLL
        for (i = 0; i < MFT__W / 2; i++) { b[2 * i] = MFT__ZIP_LO(a[i], a[i + MFT__W / 2]); b[2 * i + 1] = MFT__ZIP_HI(a[i], a[i + MFT__W / 2]); }
        MFT__UNROLL
        for (i = 0; i < MFT__W; i++) a[i] = b[i];
    }
    MFT__UNROLL
    for (i = 0; i < MFT__W; i++) MFT__STORE(dst + i * ldd, a[i]);
}

/* n numbers of operand x from (r, c) on along its contiguous dimension, as floats: where they lie,
 * or converted into buffer, which has room for n + 62 (whole quantised blocks). */
MFT__HELP const float *MFT__FN(fetch)(float *buffer, const mft__matrix *x, int64_t r, int64_t c, int64_t n)
{
    int64_t at = r * x->row_stride + c * x->col_stride, skip = 0;
    if (x->dtype == MFT_F32) return (const float *)x->data + at;
    if (mft__is_quantized(x->dtype)) { skip = at % 32; at -= skip; n = (n + skip + 31) / 32 * 32; }
    MFT__FN(to_float)(buffer, (const char *)x->data + mft_dtype_bytes(x->dtype, at), x->dtype, n);
    return buffer + skip;
}

/* MFT__W floats of a row that is not quantised, from the i-th on */
MFT__HELP MFT__V MFT__FN(load_as)(mft_dtype dtype, const void *row, int64_t i)
{
    if (dtype == MFT_BF16) return MFT__LOAD_BF16((const uint16_t *)row + i);
    if (dtype == MFT_F16)  return MFT__LOAD_F16((const uint16_t *)row + i);
    return MFT__LOAD((const float *)row + i);
}

/* Whole panels of quantised rows along the lanes: one block of each k, `pitch` bytes apart, of which this is panel `part`;
 * dtype and part are constants once inlined. */
MFT__HELP void MFT__FN(gemm_panel_quants)(mft_dtype dtype, int part, float *dst, const uint8_t *block, int64_t pitch, int64_t kc)
{
    enum { LANES = MFT__P * MFT__W, AHEAD = 8 };
    float   scales[1][MFT__SCALES];
    MFT__V  q[32 / MFT__W], scale;
    int64_t p;
    int     j;
    for (p = 0; p < kc; p++, block += pitch, dst += LANES) {
        const void *row = block;
        if (p % MFT__SCALES == 0) MFT__FN(load_scales)(scales, 1, &row, 0, pitch, kc - p);
        if (p + AHEAD < kc) __builtin_prefetch(block + AHEAD * pitch, 0, 2);
        scale = MFT__SET1(scales[0][p % MFT__SCALES]);
        MFT__FN(load_quants)(q, dtype, block);
        MFT__UNROLL
        for (j = 0; j < MFT__P; j++) MFT__STORE(dst + j * MFT__W, scale * q[part * MFT__P + j]);
    }
}

/* One panel of the vector side, [k][lane], for k in [p0, p0 + kc); zeros where there are no lanes. */
MFT__BODY void MFT__FN(gemm_panel)(const mft__gemm_job *g, float *dst, int64_t l0, int64_t lanes, int64_t p0, int64_t kc)
{
    enum { LANES = MFT__P * MFT__W, STEP = 64, AHEAD = 8 };
    float   rows[LANES][STEP + 64];
    int64_t p, c, l;
    int     t;
    if (g->v.row_stride == 1) {                                 /* lanes lie side by side, as panels want them */
        int64_t at = g->v_begin + l0, pitch = (int64_t)mft_dtype_bytes(g->v.dtype, g->v.col_stride * 32) / 32;
        if (lanes == LANES && at % LANES == 0 && mft__is_quantized(g->v.dtype)) {
            const uint8_t *block = (const uint8_t *)g->v.data + mft_dtype_bytes(g->v.dtype, at / 32 * 32) + p0 * pitch;
            MFT__UNROLL
            for (t = 0; t < 32 / LANES; t++) {
                if (at % 32 / LANES != t) continue;
                if (g->v.dtype == MFT_Q8_0) MFT__FN(gemm_panel_quants)(MFT_Q8_0, t, dst, block, pitch, kc);
                else                        MFT__FN(gemm_panel_quants)(MFT_Q4_0, t, dst, block, pitch, kc);
            }
            return;
        }
        for (p = 0; p < kc; p++, dst += LANES) {
            const float *src;
            if (lanes == LANES && (g->v.dtype == MFT_BF16 || g->v.dtype == MFT_F32)) {     /* most of what training packs so */
                int64_t     size = g->v.dtype == MFT_F32 ? 4 : 2;
                const char *from = (const char *)g->v.data + (g->v_begin + l0 + (p0 + p) * g->v.col_stride) * size;
                for (l = 0; p + AHEAD < kc && l < LANES * size; l += 64) __builtin_prefetch(from + AHEAD * g->v.col_stride * size + l, 0, 2);
                for (l = 0; l < LANES; l += MFT__W) MFT__STORE(dst + l, MFT__FN(load_as)(g->v.dtype, from, l));
                continue;
            }
            src = MFT__FN(fetch)(rows[0], &g->v, g->v_begin + l0, p0 + p, lanes);
            for (l = 0; l < LANES; l += MFT__W) MFT__STORE(dst + l, l < lanes ? MFT__FN(in)(src + l, lanes - l) : MFT__SET1(0.0f));
        }
        return;
    }
    if (g->v.dtype == MFT_F32 && lanes == LANES && kc % MFT__W == 0) {       /* activations: turned where they lie */
        const float *src = (const float *)g->v.data + (g->v_begin + l0) * g->v.row_stride + p0;
        for (p = 0; p < kc; p += MFT__W)
            for (l = 0; l < LANES; l += MFT__W) MFT__FN(transpose)(dst + p * LANES + l, LANES, src + l * g->v.row_stride + p, g->v.row_stride);
        return;
    }
    for (p = 0; p < kc; p += STEP) {                            /* else rows of k, turned */
        int64_t n = mft__min(kc - p, STEP);
        float  *to = dst + p * LANES;
        for (l = 0; l < LANES; l++) {
            if (l < lanes) {
                const float *src = MFT__FN(fetch)(rows[l], &g->v, g->v_begin + l0 + l, p0 + p, n);
                if (src != rows[l]) memmove(rows[l], src, sizeof(float) * (size_t)n);
            } else if (p == 0) memset(rows[l], 0, sizeof rows[l]);
        }
        for (c = 0; c + MFT__W <= n; c += MFT__W)
            for (l = 0; l < LANES; l += MFT__W) MFT__FN(transpose)(to + c * LANES + l, LANES, &rows[l][c], STEP + 64);
        for (; c < n; c++) for (l = 0; l < LANES; l++) to[c * LANES + l] = rows[l][c];
    }
}

/* Packs the block of lanes for all tasks. Piece i is panel i % n_panels of k block i / n_panels. */
MFT__BODY void MFT__FN(gemm_pack)(void *arg, int64_t begin, int64_t end, int worker)
{
    enum { LANES = MFT__P * MFT__W };
    const mft__gemm_job *g = (const mft__gemm_job *)arg;
    int64_t n_panels = (g->v_count + LANES - 1) / LANES;
    (void)worker;
    for (; begin < end; begin++) {
        int64_t p0 = begin / n_panels * g->kc, l0 = begin % n_panels * LANES, kc = mft__min(g->k - p0, g->kc);
        float  *dst = g->packed + p0 * n_panels * LANES + l0 * kc;
        MFT__FN(gemm_panel)(g, dst, l0, mft__min(g->v_count - l0, LANES), p0, kc);
    }
}

/* Strips of the scalar side, h rows from row i on: [row][k], or [k][row] where they lie so. */
MFT__BODY void MFT__FN(gemm_strip)(const mft__gemm_job *g, float *strip, int64_t i, int64_t h, int64_t p0, int64_t kc)
{
    enum { READ = (MFT__H + MFT__W - 1) / MFT__W * MFT__W };
    float   rows[MFT__KC + 64];
    int64_t j, p;
    if (g->s.col_stride != 1) {
        /* vectors read past the strip, within the line of s, and write past it, where the next k writes */
        int whole = h == MFT__H && i + READ <= g->s_count && (g->s.dtype == MFT_F32 || g->s.dtype == MFT_BF16);
        for (p = 0; p < kc; p++, strip += MFT__H) {
            int64_t at = i + (p0 + p) * g->s.col_stride;
            if (whole && g->s.dtype == MFT_F32) for (j = 0; j < MFT__H; j += MFT__W) MFT__STORE(strip + j, MFT__LOAD((const float *)g->s.data + at + j));
            else if (whole) for (j = 0; j < MFT__H; j += MFT__W) MFT__STORE(strip + j, MFT__LOAD_BF16((const uint16_t *)g->s.data + at + j));
            else {
                const float *src = MFT__FN(fetch)(rows, &g->s, i, p0 + p, h);
                for (j = 0; j < MFT__H; j++) strip[j] = j < h ? src[j] : 0;
            }
        }
        return;
    }
    for (j = 0; j < MFT__H; j++, strip += MFT__STRIDE) {
        const float *src;
        if (j >= h) { memset(strip, 0, sizeof(float) * MFT__STRIDE); continue; }
        src = MFT__FN(fetch)(strip, &g->s, i + j, p0, kc);      /* p0 starts a block: no more than kc are written */
        if (src != strip) memcpy(strip, src, sizeof(float) * (size_t)kc);
    }
}

/* Asks for n numbers of `lines` rows (columns, where those lie together) of x ahead of their use: their starts
 * are too far apart for the hardware to guess. 1.3 times the speed at 32 tokens. */
MFT__HELP void MFT__FN(prefetch)(const mft__matrix *x, int64_t r, int64_t c, int64_t lines, int64_t n)
{
    int64_t     step = x->col_stride == 1 ? x->row_stride : x->col_stride, i, b;
    const char *p    = (const char *)x->data + mft_dtype_bytes(x->dtype, (r * x->row_stride + c * x->col_stride) & ~(int64_t)31);
    int64_t     bytes = (int64_t)mft_dtype_bytes(x->dtype, n), pitch = (int64_t)mft_dtype_bytes(x->dtype, step * 32) / 32;
    for (i = 0; i < lines; i++, p += pitch) for (b = 0; b < bytes + 63; b += 64) __builtin_prefetch(p + b, 0, 2);   /* p may stand anywhere in its line */
}

/* What a strip is to ask for while it multiplies: x's numbers [r, r + rows) x [c, c + cols), of them the
 * share `part` of `parts`. */
MFT__BODY mft__ahead MFT__FN(ahead)(const mft__matrix *x, int64_t r, int64_t rows, int64_t c, int64_t cols, int64_t part, int64_t parts)
{
    int        by_row = x->col_stride == 1;
    int64_t    n = by_row ? rows : cols, first = n * part / parts;
    mft__ahead a;
    a.pitch = (int64_t)mft_dtype_bytes(x->dtype, 32 * (by_row ? x->row_stride : x->col_stride)) / 32;
    a.p     = (const char *)x->data + mft_dtype_bytes(x->dtype, (r * x->row_stride + c * x->col_stride) & ~(int64_t)31) + first * a.pitch;
    a.bytes = (int64_t)mft_dtype_bytes(x->dtype, by_row ? cols : rows) + (int64_t)((uintptr_t)a.p % 64);
    a.p    -= (uintptr_t)a.p % 64;
    a.rows  = n * (part + 1) / parts - first;
    a.at    = 0;
    return a;
}

/* Up to 4 rows of c from row i on, up to MFT__W columns from j on: alpha times their sums (NULL: nothing was summed), what
 * c held, bias, and the tail, each vector of whose b serves all 4 rows. */
MFT__HELP void MFT__FN(gemm_finish)(const mft__gemm_job *g, const float *sums, int64_t ld, int64_t i, int64_t rows, int64_t j, int64_t n)
{
    const mft__tail *t = &g->tail;
    const float     *a[4] = { NULL, NULL, NULL, NULL }, *b = t->k ? (const float *)t->b.data + j : NULL;
    MFT__V  y[4], x;
    int64_t p;
    int     r;
    MFT__UNROLL
    for (r = 0; r < 4; r++) {                                   /* rows that are not there: the first again */
        if (t->k) a[r] = (const float *)t->a.data + (r < rows ? i + r : i) * t->a.row_stride;
        y[r] = MFT__SET1(0.0f);
    }
    for (p = 0; p < t->k; p++, b += t->b.row_stride) {
        x = MFT__LOAD(b);
        MFT__UNROLL
        for (r = 0; r < 4; r++) y[r] = MFT__FMA(MFT__SET1(a[r][p]), x, y[r]);
    }
    MFT__UNROLL
    for (r = 0; r < 4; r++) if (r < rows) {
        float *c = g->c + (i + r) * g->ldc + j;
        x = MFT__SET1(0.0f);
        if (sums)    x = MFT__SET1(g->alpha) * MFT__LOAD(sums + r * ld);
        if (g->plus) x += MFT__FN(in)(g->plus + (c - g->c), n);
        if (g->bias) x += MFT__FN(in)(g->bias + j, n);
        if (t->k)    x += MFT__SET1(t->scale) * y[r];
        MFT__FN(out)(c, n, x);
    }
}

/* Rows [begin, end) of c's tile, lanes from v_begin on, to where they belong. */
MFT__BODY void MFT__FN(gemm_out)(const mft__gemm_job *g, const float *tile, int64_t ld, int64_t begin, int64_t end)
{
    int64_t j, l, r;
    float   square[MFT__W * MFT__W];
    if (!g->swapped) {                                          /* c[row][lane] */
        for (j = begin; j < end; j += 4) for (l = 0; l < g->v_count; l += MFT__W)
            MFT__FN(gemm_finish)(g, tile + (j - begin) * ld + l, ld, j, end - j, g->v_begin + l, g->v_count - l);
        return;
    }
    for (l = 0; l < g->v_count; l += MFT__W) for (j = begin; j < end; j += MFT__W) {      /* c[lane][row] */
        MFT__FN(transpose)(square, MFT__W, tile + (j - begin) * ld + l, ld);
        for (r = 0; r < MFT__W && l + r < g->v_count; r += 4)
            MFT__FN(gemm_finish)(g, square + r * MFT__W, MFT__W, g->v_begin + l + r, g->v_count - l - r, j, end - j);
    }
}

/* Rows [begin, end) of c, of which the tail is all there is. */
MFT__BODY void MFT__FN(gemm_thin)(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__gemm_job *g = (const mft__gemm_job *)arg;
    int64_t j;
    (void)worker;
    for (; begin < end; begin += 4) for (j = 0; j < g->v_count; j += MFT__W)
        MFT__FN(gemm_finish)(g, NULL, 0, begin, end - begin, j, g->v_count - j);
}

/* The strips after those of row i and block p0 of k. */
MFT__HELP void MFT__FN(gemm_next)(const mft__gemm_job *g, int64_t begin, int64_t end, int64_t *i, int64_t *p0)
{
    *i += mft__gemm_group(g) * g->row->height;
    if (*i >= end) { *i = begin; *p0 += g->kc; }
}

/* What memory to ask for while strip `part` of `parts` from row i on is multiplied: strips of s, those after the ones that
 * are copied meanwhile, of the worker's next task at the end; of v the next block of k, in panels unless the second cache still
 * has them, or where the worker's next lanes lie; at last the place in c. Of v and c each strip asks for its share. */
MFT__BODY void MFT__FN(gemm_ahead)(const mft__gemm_job *g, mft__gemm_strip *x, int64_t begin, int64_t end, int64_t i, int64_t p0,
                                 int64_t part, int64_t parts, int direct)
{
    int64_t     height = g->row->height, all = (end - begin - 1) / height + 1, at = (i - begin) / height + part;
    int64_t     lanes = mft__round_up(x->lanes, MFT__P * MFT__W), kc = mft__min(g->k - p0, g->kc);
    int64_t     next = mft__min(g->k - p0 - kc, g->kc), s_i = i, s_p = p0, s_end = end;
    mft__matrix from = { NULL, MFT_F32, 16, 1 };
    memset(x->ahead, 0, sizeof x->ahead);
    MFT__FN(gemm_next)(g, begin, end, &s_i, &s_p);
    MFT__FN(gemm_next)(g, begin, end, &s_i, &s_p);
    if (s_p >= g->k) { s_i += g->s_next - begin; s_p = 0; s_end = g->s_end; }
    if (s_i < s_end)
        x->ahead[0] = MFT__FN(ahead)(&g->s, s_i, mft__min(s_end - s_i, mft__gemm_group(g) * height), s_p, mft__min(g->k - s_p, g->kc), part, parts);
    if (next && g->packed) {
        from.data = g->packed + (p0 + kc) * lanes;
        if (g->k * lanes > MFT__NEAR) x->ahead[1] = MFT__FN(ahead)(&from, 0, lanes * next / 16, 0, 16, at, all);
    } else if (next)      x->ahead[1] = MFT__FN(ahead)(&g->v, g->v_begin, g->v_count, p0 + kc, next, at, all);
    else if (g->n_next)   x->ahead[1] = MFT__FN(ahead)(&g->v, g->v_next, g->n_next, 0, mft__min(g->k, g->kc), at, all);
    else if (!direct || ++at < all) {                           /* directly: the rows of the next strip */
        from.data = g->c; from.row_stride = g->ldc;
        if (g->swapped) x->ahead[1] = MFT__FN(ahead)(&from, g->v_begin, g->v_count, begin, end - begin, at, all);
        else            x->ahead[1] = MFT__FN(ahead)(&from, begin, end - begin, g->v_begin, g->v_count, at, all);
    }
}

/* What strip `part` of `parts` is to copy of the strips from row i and block p0 on, which come next: as gemm_strip
 * makes them, but between multiply-adds, which have the ports for it to spare. Returns how many strips that makes; none
 * where numbers have to be converted in blocks, or vectors would read past an end. */
MFT__BODY int64_t MFT__FN(gemm_carry)(const mft__gemm_job *g, mft__carry *c, float *to, int64_t i, int64_t end, int64_t p0, int64_t part, int64_t parts)
{
    enum { READ = (MFT__H + MFT__W - 1) / MFT__W * MFT__W };
    int64_t size = g->s.dtype == MFT_F32 ? 4 : 2, kc = mft__min(g->k - p0, g->kc), rows = mft__min(end - i, MFT__H), made = 0, first;
    memset(c, 0, sizeof *c);
    if (p0 >= g->k || (g->s.dtype != MFT_F32 && g->s.dtype != MFT_BF16)) return 0;
    if (g->s.col_stride == 1) {                                 /* rows: vectors of k */
        if (kc % READ || rows % (MFT__H / 3)) return 0;
        c->pieces = kc / READ; made = 1;
        c->from_row = g->s.row_stride * size; c->from_piece = READ * size;
        c->to_row = MFT__STRIDE;              c->to_piece = READ;
    } else {                                                    /* lines of all rows: each strip's piece of every k */
        while (made < MFT__GROUP && i + (made + 1) * MFT__H <= end && i + made * MFT__H + READ <= g->s_count) made++;
        c->pieces = made; rows = kc;
        c->from_row = g->s.col_stride * size; c->from_piece = MFT__H * size;
        c->to_row = MFT__H;                   c->to_piece = MFT__H * MFT__STRIDE;
    }
    first    = rows * part / parts;
    c->rows  = made ? rows * (part + 1) / parts - first : 0;
    c->from  = (const char *)g->s.data + (i * g->s.row_stride + p0 * g->s.col_stride) * size + first * c->from_row;
    c->to    = to + first * c->to_row;
    c->dtype = g->s.dtype;
    return made;
}

/* Rows [begin, end) of the scalar side against a block of lanes: all of k, then the way out. packed NULL:
 * the lanes are packed here, one block of k after the other, into the worker's own scratch; by the first strip on its
 * way if they lie side by side. Where k is one block, c is nothing but the sums and tiles are whole, they are written there at
 * once: with more blocks each would go over c's pages. */
MFT__HELP void MFT__FN(gemm_block)(const mft__gemm_job *g, int64_t begin, int64_t end, int worker)
{
    enum { LANES = MFT__P * MFT__W };
    int64_t  height = g->row->height, n_panels = (g->v_count + LANES - 1) / LANES, group = mft__gemm_group(g), made = 0, more, p0, i, q;
    int64_t  strip = height * MFT__STRIDE;
    float   *now   = (float *)(void *)(g->scratch + (size_t)worker * g->scratch_bytes), *then = now + (mft__gemm_strips(g) - group) * strip;
    float   *tile  = now + mft__gemm_strips(g) * strip, *own = tile + mft__round_up(end - begin, MFT__TILE_ROWS) * n_panels * LANES, *swap;
    int      raw   = !g->packed && g->v.row_stride == 1 && (g->v.dtype == MFT_F32 || g->v.dtype == MFT_BF16) && g->v_count % LANES == 0;
    int      direct = g->k <= g->kc && !g->swapped && g->alpha == 1 && !g->bias && !g->tail.k
                   && (!g->plus || g->plus == g->c) && g->v_count % LANES == 0 && (end - begin) % (MFT__H / 3) == 0;
    mft__gemm_strip x;

    memset(&x, 0, sizeof x);
    x.s_step = g->s.col_stride == 1 ? 0 : height; x.s_terms = x.v_terms = 1;
    x.ld = n_panels * LANES; x.lanes = g->v_count;
    x.raw_dtype = g->v.dtype; x.raw_step = g->v.col_stride * (g->v.dtype == MFT_F32 ? 4 : 2);
    if (direct) { tile = g->c + begin * g->ldc + g->v_begin; x.ld = g->ldc; }
    for (p0 = 0; p0 < g->k; p0 += g->kc) {
        int64_t kc = mft__min(g->k - p0, g->kc);
        x.cells = kc;
        x.v_panel = LANES * kc; x.add = p0 != 0 || (direct && g->plus);
        x.v = g->packed ? g->packed + p0 * n_panels * LANES : own;
        for (q = 0; q < n_panels && !g->packed && !raw; q++)
            MFT__FN(gemm_panel)(g, own + q * LANES * kc, q * LANES, mft__min(g->v_count - q * LANES, LANES), p0, kc);
        for (i = begin; i < end; i += group * height) {
            int64_t parts = mft__min(group, (end - i - 1) / height + 1), next_i = i, next_p = p0;
            MFT__FN(gemm_next)(g, begin, end, &next_i, &next_p);
            for (more = q = 0; q < parts; q++) {
                int64_t row = i + q * height;
                x.h = mft__min(end - row, height);
                x.s = now + q * strip; x.tile = tile + (row - begin) * x.ld;
                x.raw = raw && row == begin ? (const char *)g->v.data + mft_dtype_bytes(g->v.dtype, g->v_begin) + p0 * x.raw_step : NULL;
                if (q >= made) MFT__FN(gemm_strip)(g, now + q * strip, row, x.h, p0, kc);
                more = MFT__FN(gemm_carry)(g, &x.carry, then, next_i, end, next_p, q, parts);
                MFT__FN(gemm_ahead)(g, &x, begin, end, i, p0, q, parts, direct);
                g->row->strip(&x);
            }
            made = more; swap = now; now = then; then = swap;
        }
    }
    if (!direct) MFT__FN(gemm_out)(g, tile, x.ld, begin, end);
}

/* Rows, or lanes, of a task, and of the one that the same worker will probably take next: the others take those
 * between, if all are as fast. */
MFT__BODY void MFT__FN(gemm_tiles)(void *arg, int64_t begin, int64_t end, int worker)
{
    mft__gemm_job g = *(const mft__gemm_job *)arg;
    int64_t       unit = g.row->height;
    for (; begin < end; begin++) {
        int64_t then = begin + g.at_once;
        g.s_next = mft__gemm_cut(g.s_count, unit, then, g.tasks);
        g.s_end  = then < g.tasks ? mft__gemm_cut(g.s_count, unit, then + 1, g.tasks) : 0;
        MFT__FN(gemm_block)(&g, mft__gemm_cut(g.s_count, unit, begin, g.tasks), mft__gemm_cut(g.s_count, unit, begin + 1, g.tasks), worker);
    }
}

MFT__BODY void MFT__FN(gemm_columns)(void *arg, int64_t begin, int64_t end, int worker)
{
    mft__gemm_job g = *(const mft__gemm_job *)arg;
    int64_t       unit = g.row->lanes, all = g.v_count;
    g.packed = NULL;
    for (; begin < end; begin++) {
        int64_t then = begin + g.at_once;
        g.v_begin = mft__gemm_cut(all, unit, begin, g.tasks); g.v_count = mft__gemm_cut(all, unit, begin + 1, g.tasks) - g.v_begin;
        g.v_next  = mft__gemm_cut(all, unit, then,  g.tasks);
        g.n_next  = then < g.tasks ? mft__gemm_cut(all, unit, then + 1, g.tasks) - g.v_next : 0;
        g.s_end   = g.n_next ? g.s_count : 0;
        MFT__FN(gemm_block)(&g, 0, g.s_count, worker);
    }
}

#ifdef MFT__UNZIP_LO                        /* a row with strips of pairs */
/* Cells of a vector's even and odd numbers, term t at dst + t * apart: bf16 terms that add up to them. One is the number
 * rounded, or the number if that is bf16 already; three are cut after 8 and 16 bits, and the rest: all 24 bits. The first
 * has all of what is not finite. */
MFT__HELP void MFT__FN(pair_up)(float *dst, int64_t apart, MFT__V even, MFT__V odd, int terms, int exact)
{
    MFT__FN(bits) none = { 0 }, top = none + 0xffff0000u, quiet = none + 0x400000u;     /* top: sign, exponent, 7 bits */
    MFT__V zero = MFT__SET1(0.0f), e, o;
    if (terms == 1) {
        if (!exact) { even = (MFT__V)MFT__FN(round_bf16)(even); odd = (MFT__V)MFT__FN(round_bf16)(odd); }
        MFT__STORE(dst, (MFT__V)(((MFT__FN(bits))even >> 16) | ((MFT__FN(bits))odd & top)));
        return;
    }
    e = MFT__FN(select)(even == even, even, (MFT__V)((MFT__FN(bits))even | quiet));     /* a NaN is never cut to infinity */
    o = MFT__FN(select)(odd  == odd,  odd,  (MFT__V)((MFT__FN(bits))odd  | quiet));
    MFT__STORE(dst, (MFT__V)(((MFT__FN(bits))e >> 16) | ((MFT__FN(bits))o & top)));
    e = even - (MFT__V)((MFT__FN(bits))e & top); e = MFT__FN(select)(e == e, e, zero);  /* infinity less itself */
    o = odd  - (MFT__V)((MFT__FN(bits))o & top); o = MFT__FN(select)(o == o, o, zero);
    MFT__STORE(dst + apart, (MFT__V)(((MFT__FN(bits))e >> 16) | ((MFT__FN(bits))o & top)));
    e = e - (MFT__V)((MFT__FN(bits))e & top);
    o = o - (MFT__V)((MFT__FN(bits))o & top);
    MFT__STORE(dst + 2 * apart, (MFT__V)(((MFT__FN(bits))e >> 16) | ((MFT__FN(bits))o & top)));
}

/* A vector of x's contiguous numbers from (r, c) on, of which `have` are there; zeros after. */
MFT__HELP MFT__V MFT__FN(line)(const mft__matrix *x, int64_t r, int64_t c, int64_t have)
{
    float   buffer[MFT__W + 64];
    int64_t at = r * x->row_stride + c * x->col_stride;
    if (have <= 0) return MFT__SET1(0.0f);
    if (have >= MFT__W && x->dtype == MFT_F32)  return MFT__LOAD((const float *)x->data + at);
    if (have >= MFT__W && x->dtype == MFT_BF16) return MFT__LOAD_BF16((const uint16_t *)x->data + at);
    return MFT__FN(in)(MFT__FN(fetch)(buffer, x, r, c, mft__min(have, MFT__W)), have);
}

/* `cells` cells of a whole panel from lines of lanes, `line` bytes apart: two are zipped. */
MFT__HELP void MFT__FN(zip_lines)(mft_dtype dtype, int terms, float *dst, int64_t apart, const char *src, int64_t line, int64_t cells)
{
    enum { LANES = MFT__P * MFT__W };
    int l;
    for (; cells > 0; cells--, dst += LANES, src += 2 * line) {
        MFT__UNROLL
        for (l = 0; l < LANES; l += MFT__W)
            MFT__FN(pair_up)(dst + l, apart, MFT__FN(load_as)(dtype, src, l), MFT__FN(load_as)(dtype, src + line, l), terms, dtype == MFT_BF16);
    }
}

/* The same of W lanes whose numbers lie along k, `row` apart: squares of W x W are turned. */
MFT__HELP void MFT__FN(turn_lines)(int terms, int exact, float *dst, int64_t apart, const float *src, int64_t row, int64_t cells)
{
    float   square[MFT__W * MFT__W];
    int64_t i;
    MFT__FN(transpose)(square, MFT__W, src, row);
    for (i = 0; i < cells; i++, dst += MFT__P * MFT__W)
        MFT__FN(pair_up)(dst, apart, MFT__LOAD(square + 2 * i * MFT__W), MFT__LOAD(square + (2 * i + 1) * MFT__W), terms, exact);
}

/* A panel of `lanes` lanes from `lane` on, [cell][lane] by terms, for k in [p0, p0 + kc); zeros where nothing is. */
MFT__BODY void MFT__FN(pairs_panel)(const mft__gemm_job *g, float *dst, int64_t lane, int64_t lanes, int64_t p0, int64_t kc)
{
    enum { LANES = MFT__P * MFT__W };
    const mft__matrix *v = &g->v;
    int64_t cells = mft__gemm_cells(g->row, kc), apart = cells * LANES, c = 0, l, i;
    int     terms = g->v_terms, exact = v->dtype == MFT_BF16;
    if (v->row_stride == 1) {
        if (lanes == LANES && (exact || v->dtype == MFT_F32)) {
            int64_t     line = (int64_t)mft_dtype_bytes(v->dtype, v->col_stride);
            const char *src  = (const char *)v->data + p0 * line + mft_dtype_bytes(v->dtype, lane);
            c = kc / 2;
            if      (exact)      MFT__FN(zip_lines)(MFT_BF16, 1, dst, apart, src, line, c);      /* has one term */
            else if (terms == 1) MFT__FN(zip_lines)(MFT_F32,  1, dst, apart, src, line, c);
            else                 MFT__FN(zip_lines)(MFT_F32,  3, dst, apart, src, line, c);
        }
        for (; c < cells; c++) for (l = 0; l < LANES; l += MFT__W)
            MFT__FN(pair_up)(dst + c * LANES + l, apart, MFT__FN(line)(v, lane + l, p0 + 2 * c, 2 * c < kc ? lanes - l : 0),
                             MFT__FN(line)(v, lane + l, p0 + 2 * c + 1, 2 * c + 1 < kc ? lanes - l : 0), terms, exact);
        return;
    }
    for (l = 0; l < LANES; l += MFT__W) for (c = 0; c < cells; c += MFT__W / 2) {
        const float *src = (const float *)v->data + (lane + l) * v->row_stride + p0 + 2 * c;
        int64_t      row = v->row_stride, n = mft__min(cells - c, MFT__W / 2);
        float        rows[MFT__W * MFT__W];
        if (v->dtype != MFT_F32 || lanes - l < MFT__W || kc - 2 * c < MFT__W) {
            for (i = 0; i < MFT__W; i++) MFT__STORE(rows + i * MFT__W, l + i < lanes ? MFT__FN(line)(v, lane + l + i, p0 + 2 * c, kc - 2 * c) : MFT__SET1(0.0f));
            src = rows; row = MFT__W;
        }
        if (terms == 1) MFT__FN(turn_lines)(1, exact, dst + c * LANES + l, apart, src, row, n);
        else            MFT__FN(turn_lines)(3, exact, dst + c * LANES + l, apart, src, row, n);
    }
}

/* `pieces` pieces of 16 cells, `step` apart, from numbers along k. */
MFT__HELP void MFT__FN(pair_line)(int terms, float *dst, int64_t apart, int64_t step, const float *src, int64_t pieces)
{
    int i;
    for (; pieces > 0; pieces--, dst += step, src += 32) {
        MFT__UNROLL
        for (i = 0; i < 16; i += MFT__W) {
            MFT__V a = MFT__LOAD(src + 2 * i), b = MFT__LOAD(src + 2 * i + MFT__W);
            MFT__FN(pair_up)(dst + i, apart, MFT__UNZIP_LO(a, b), MFT__UNZIP_HI(a, b), terms, 0);
        }
    }
}

/* A strip of h rows from row i on, by terms, for k in [p0, p0 + kc): [row][MFT__STRIDE], or, if the row is tiled,
 * [16 cells][row][cell]; zeros where nothing is. */
MFT__BODY void MFT__FN(pairs_strip)(const mft__gemm_job *g, float *dst, int64_t i, int64_t h, int64_t p0, int64_t kc)
{
    const mft__matrix *s = &g->s;
    int64_t height = g->row->height, cells = mft__gemm_cells(g->row, kc), tiled = g->row->tiled, pitch = tiled ? 16 : (int64_t)MFT__STRIDE;
    int64_t apart = tiled ? height * cells : height * MFT__STRIDE, step = tiled ? height * 16 : 16, j, c, r, n;
    int     terms = g->s_terms, exact = s->dtype == MFT_BF16, t;
    float   squares[3 * MFT__W * MFT__W], turned[MFT__W * MFT__W];
    if (s->col_stride == 1) for (j = 0; j < height; j++) {
        int64_t have = j < h ? kc : 0, at = (i + j) * s->row_stride + p0;
        float  *to = dst + j * pitch;
        n = have / 32;
        if      (exact && terms == 1)   for (c = 0; c < n; c++) memcpy(to + c * step, (const uint16_t *)s->data + at + 32 * c, 64);   /* they are cells */
        else if (s->dtype != MFT_F32)   n = 0;
        else if (terms == 1)            MFT__FN(pair_line)(1, to, apart, step, (const float *)s->data + at, n);
        else                            MFT__FN(pair_line)(3, to, apart, step, (const float *)s->data + at, n);
        for (c = n * 16; c < cells; c += MFT__W) {
            MFT__V a = MFT__FN(line)(s, i + j, p0 + 2 * c, have - 2 * c), b = MFT__FN(line)(s, i + j, p0 + 2 * c + MFT__W, have - 2 * c - MFT__W);
            MFT__FN(pair_up)(to + c / 16 * step + c % 16, apart, MFT__UNZIP_LO(a, b), MFT__UNZIP_HI(a, b), terms, exact);
        }
    } else for (j = 0; j < height; j += MFT__W) for (c = 0; c < cells; c += MFT__W) {
        for (r = 0; r < MFT__W; r++) {                          /* cells by row: then turned */
            int64_t p = 2 * (c + r);
            MFT__FN(pair_up)(squares + r * MFT__W, MFT__W * MFT__W, MFT__FN(line)(s, i + j, p0 + p, p < kc ? h - j : 0),
                             MFT__FN(line)(s, i + j, p0 + p + 1, p + 1 < kc ? h - j : 0), terms, exact);
        }
        for (t = 0; t < terms; t++) {
            MFT__FN(transpose)(turned, MFT__W, squares + t * MFT__W * MFT__W, MFT__W);
            for (r = 0; r < MFT__W && j + r < height; r++)
                MFT__STORE(dst + j * pitch + c / 16 * step + c % 16 + t * apart + r * pitch, MFT__LOAD(turned + r * MFT__W));
        }
    }
}

/* Rows or lanes [begin, end) of one side, for k in [p0, p0 + kc), one packed piece after the other. */
MFT__BODY void MFT__FN(pairs_side)(const mft__gemm_job *g, int of_v, float *dst, int64_t begin, int64_t end, int64_t p0)
{
    int64_t unit = of_v ? g->row->lanes : g->row->height, kc = mft__min(g->k - p0, g->kc);
    for (; begin < end; begin += unit, dst += mft__pairs_piece(g, of_v)) {
        if (of_v) MFT__FN(pairs_panel)(g, dst, begin, mft__min(end - begin, unit), p0, kc);
        else      MFT__FN(pairs_strip)(g, dst, begin, mft__min(end - begin, unit), p0, kc);
    }
}

/* Packs the shared side. Piece i is k block i % blocks of strip or panel i / blocks: rows are read along. */
MFT__BODY void MFT__FN(pairs_pack)(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__gemm_job *g = (const mft__gemm_job *)arg;
    int64_t unit = g->shares_v ? g->row->lanes : g->row->height, n = (g->x_count - 1) / unit + 1, blocks = (g->k - 1) / g->kc + 1;
    (void)worker;
    for (; begin < end; begin++) {
        int64_t at = begin / blocks * unit, block = begin % blocks;
        MFT__FN(pairs_side)(g, g->shares_v, g->packed + (block * n + begin / blocks) * mft__pairs_piece(g, g->shares_v), g->x_begin + at,
                            g->x_begin + mft__min(at + unit, g->x_count), block * g->kc);
    }
}

/* [begin, end) of the other side against all that is packed. */
MFT__BODY void MFT__FN(pairs_tiles)(void *arg, int64_t begin, int64_t end, int worker)
{
    mft__gemm_job g = *(const mft__gemm_job *)arg;
    const mft__gemm_row *row = g.row;
    int64_t  piece_s = mft__pairs_piece(&g, 0), piece_v = mft__pairs_piece(&g, 1), of_v = !g.shares_v, p0, i, next;
    int64_t  unit = of_v ? row->lanes : row->height, shared = (g.x_count - 1) / (of_v ? row->height : row->lanes) + 1;
    int64_t  s0 = of_v ? g.x_begin : begin, s_end = of_v ? g.x_begin + g.x_count : end, at_once = row->tiled ? s_end - s0 : row->height;
    float   *own = (float *)(void *)(g.scratch + (size_t)worker * g.scratch_bytes), *tile = own + ((end - begin - 1) / unit + 1) * (of_v ? piece_v : piece_s);
    const mft__matrix *side = of_v ? &g.v : &g.s;
    mft__matrix from = { NULL, MFT_F32, 16, 1 };
    mft__gemm_strip x;
    memset(&x, 0, sizeof x);
    g.v_begin = of_v ? begin : g.x_begin; g.v_count = of_v ? end - begin : g.x_count;
    x.lanes = g.v_count; x.ld = mft__round_up(g.v_count, row->lanes); x.s_terms = g.s_terms; x.v_terms = g.v_terms;
    x.s_strip = piece_s; x.v_panel = piece_v;
    for (p0 = 0; p0 < g.k; p0 += g.kc) {
        const float *packed = g.packed + p0 / g.kc * shared * (of_v ? piece_s : piece_v);
        MFT__FN(pairs_side)(&g, (int)of_v, own, begin, end, p0);
        x.cells  = mft__gemm_cells(row, mft__min(g.k - p0, g.kc));
        x.s_term = row->tiled ? row->height * x.cells : row->height * MFT__STRIDE;
        x.v = of_v ? own : packed; x.add = p0 != 0;
        next = mft__min(g.k - p0 - g.kc, g.kc);
        for (i = s0; i < s_end; i += at_once) {
            int64_t part = (i - s0) / at_once, parts = (s_end - s0 - 1) / at_once + 1;
            if (next > 0) {                                     /* what the next block of k reads; at last the place in c */
                x.ahead[0] = MFT__FN(ahead)(side, begin, end - begin, p0 + g.kc, next, part, parts);
            } else {
                from.data = g.c; from.row_stride = g.ldc;
                x.ahead[0] = g.swapped ? MFT__FN(ahead)(&from, g.v_begin, g.v_count, s0, s_end - s0, part, parts)
                                       : MFT__FN(ahead)(&from, s0, s_end - s0, g.v_begin, g.v_count, part, parts);
            }
            x.h = mft__min(s_end - i, at_once);
            x.s = (of_v ? packed : own) + part * piece_s;
            x.tile = tile + (i - s0) * x.ld;
            row->strip(&x);
        }
    }
    MFT__FN(gemm_out)(&g, tile, x.ld, s0, s_end);
}
#endif

/* the MFT__W numbers at x: folded to four, then added */
MFT__HELP float MFT__FN(quad_sum)(const float *x)
{
    mft__v_portable s, t;
    int i;
    memcpy(&s, x, sizeof s);
    for (i = 4; i < MFT__W; i += 4) { memcpy(&t, x + i, sizeof t); s += t; }
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* sums[r][l] (+)= <s[r], v[l]> over n numbers, lane by lane, for 4 rows and nl vectors; nl and dtype are
 * constants once inlined. Rows are read as they lie. */
MFT__HELP void MFT__FN(gemm_dots_block)(int nl, mft_dtype dtype, float *sums, int add, const void *const *s, const float *const *v, int64_t n)
{
    enum { AHEAD = 1024 };
    MFT__V  a[4][4], x[4], y;
    int64_t i, line = 64 / (dtype == MFT_F32 ? 4 : 2), j;
    int     r, l;
    MFT__UNROLL
    for (r = 0; r < 4; r++) {
        MFT__UNROLL
        for (l = 0; l < nl; l++) a[r][l] = add ? MFT__LOAD(sums + (4 * r + l) * MFT__W) : MFT__SET1(0.0f);
    }
#define MFT__DOTS_STEP(i) do {                                                                                 \
        MFT__UNROLL                                                                                            \
        for (r = 0; r < 4; r++) x[r] = MFT__FN(load_as)(dtype, s[r], i);                                       \
        MFT__UNROLL                                                                                            \
        for (l = 0; l < nl; l++) {                                                                             \
            y = MFT__LOAD(v[l] + (i));                                                                         \
            MFT__UNROLL                                                                                        \
            for (r = 0; r < 4; r++) a[r][l] = MFT__FMA(x[r], y, a[r][l]);                                      \
        } } while (0)
    for (i = 0; i + line <= n; i += line) {
        MFT__UNROLL
        for (r = 0; r < 4; r++) __builtin_prefetch((const char *)s[r] + i * (64 / line) + AHEAD, 0, 3);
        MFT__UNROLL
        for (j = 0; j < line; j += MFT__W) MFT__DOTS_STEP(i + j);
    }
    for (; i + MFT__W <= n; i += MFT__W) MFT__DOTS_STEP(i);
#undef MFT__DOTS_STEP
    if (i < n) {
        MFT__UNROLL
        for (r = 0; r < 4; r++) {
            float part[MFT__W];
            mft__to_float(part, (const char *)s[r] + i * (64 / line), dtype, n - i);
            x[r] = MFT__FN(in)(part, n - i);
        }
        MFT__UNROLL
        for (l = 0; l < nl; l++) {
            y = MFT__IN(v[l]);
            MFT__UNROLL
            for (r = 0; r < 4; r++) a[r][l] = MFT__FMA(x[r], y, a[r][l]);
        }
    }
    MFT__UNROLL
    for (r = 0; r < 4; r++) {
        MFT__UNROLL
        for (l = 0; l < nl; l++) MFT__STORE(sums + (4 * r + l) * MFT__W, a[r][l]);
    }
}

/* The same of quantised rows: integers turned into floats in registers, multiplied by v and added up, each block's
 * sum times its scale. Both are exact before the products, so the error is that of a float32 loop. A last block that
 * is not whole meets zeros. */
MFT__HELP void MFT__FN(gemm_dots_quants)(int nl, mft_dtype dtype, float *sums, int add, const void *const *s, const float *const *v, int64_t n)
{
    enum { PARTS = 32 / MFT__W, AHEAD = 1024 };
    MFT__V  a[4][4], q[PARTS], t;
    float   scales[4][MFT__SCALES], rest[4][32] = { { 0 } };
    int64_t size = dtype == MFT_Q8_0 ? 34 : 18, blocks = (n + 31) / 32, b;
    int     r, l, j;
    for (l = 0; l < nl && n % 32; l++) MFT__FN(copy_part)(rest[l], v[l] + n / 32 * 32, n % 32);
    MFT__UNROLL
    for (r = 0; r < 4; r++) {
        MFT__UNROLL
        for (l = 0; l < nl; l++) a[r][l] = add ? MFT__LOAD(sums + (4 * r + l) * MFT__W) : MFT__SET1(0.0f);
    }
    for (b = 0; b < blocks; b++) {
        const float *y[4];
        for (l = 0; l < nl; l++) y[l] = b < n / 32 ? v[l] + b * 32 : rest[l];
        if (b % MFT__SCALES == 0) MFT__FN(load_scales)(scales, 4, s, b, size, blocks - b);
        MFT__UNROLL
        for (r = 0; r < 4; r++) {
            const uint8_t *block = (const uint8_t *)s[r] + b * size;
            __builtin_prefetch(block + AHEAD, 0, 3);
            MFT__FN(load_quants)(q, dtype, block);
            MFT__UNROLL
            for (l = 0; l < nl; l++) {
                t = q[0] * MFT__LOAD(y[l]);
                MFT__UNROLL
                for (j = 1; j < PARTS; j++) t = MFT__FMA(q[j], MFT__LOAD(y[l] + j * MFT__W), t);
                a[r][l] = MFT__FMA(MFT__SET1(scales[r][b % MFT__SCALES]), t, a[r][l]);
            }
        }
    }
    MFT__UNROLL
    for (r = 0; r < 4; r++) {
        MFT__UNROLL
        for (l = 0; l < nl; l++) MFT__STORE(sums + (4 * r + l) * MFT__W, a[r][l]);
    }
}

/* Each storage type, each number of vectors, by itself: the loops inside see constants. */
MFT__BODY void MFT__FN(gemm_dots_of)(mft_dtype dtype, int one, float *sums, int add, const void *const *s, const float *const *v, int64_t n)
{
    enum { NL = MFT__H < 12 && MFT__P < 4 ? 2 : 4 };
#define MFT__DOTS(D, block) if (one) MFT__FN(block)(1, D, sums, add, s, v, n); else MFT__FN(block)(NL, D, sums, add, s, v, n)
    switch (dtype) {
    case MFT_F16:  MFT__DOTS(MFT_F16,  gemm_dots_block);  break;
    case MFT_BF16: MFT__DOTS(MFT_BF16, gemm_dots_block);  break;
    case MFT_Q8_0: MFT__DOTS(MFT_Q8_0, gemm_dots_quants); break;
    case MFT_Q4_0: MFT__DOTS(MFT_Q4_0, gemm_dots_quants); break;
    default:       MFT__DOTS(MFT_F32,  gemm_dots_block);
    }
#undef MFT__DOTS
}

/* Rows [begin, end) of the scalar side against few vectors, both with k side by side and nothing
 * packed: 4 x NL dot products at a time (decoding, x A^T of LoRA). Each row is read once. The four lie a quarter
 * of the task apart: four long streams, each asked for 1 KB ahead of its use, read memory at 26 GB/s where four
 * neighbours read it at 20 and one row after the other at 17 (bf16, two cores of an Emerald Rapids, of 28). */
MFT__BODY void MFT__FN(gemm_dots)(void *arg, int64_t begin, int64_t end, int worker)
{
    enum { NL = MFT__H < 12 && MFT__P < 4 ? 2 : 4 };            /* 16 registers hold 4 x 2 sums, 32 hold 4 x 4 */
    const mft__gemm_job *g = (const mft__gemm_job *)arg;
    float  *sums = (float *)(void *)(g->scratch + (size_t)worker * g->scratch_bytes);     /* [v_count / NL][4][4][W] */
    float   square[MFT__W * MFT__W], out[16];
    int64_t apart = (end - begin + 3) / 4, block = g->v_count <= NL ? g->k : (int64_t)MFT__KC, i, l0, p0, n;     /* vectors stay in the first cache */
    int     r, l, j;
    memset(sums, 0, sizeof(float) * (size_t)(mft__round_up(g->v_count, NL) / NL * 16 * MFT__W));
    for (i = begin; i < begin + apart; i++) {
        for (p0 = 0; p0 < g->k; p0 += block) {
            const void *s[4];
            n = mft__min(g->k - p0, block);
            for (r = 0; r < 4; r++)                             /* rows that are not there: another's again */
                s[r] = i + r * apart < end ? (const char *)g->s.data + mft_dtype_bytes(g->s.dtype, (i + r * apart) * g->s.row_stride + p0) : s[0];
            for (l0 = 0; l0 < g->v_count; l0 += NL) {
                const float *v[NL];
                float       *at = sums + l0 / NL * 16 * MFT__W;
                int          nl = (int)mft__min(g->v_count - l0, NL);
                for (l = 0; l < NL; l++) v[l] = (const float *)g->v.data + (g->v_begin + l0 + (l < nl ? l : 0)) * g->v.row_stride + p0;
                MFT__FN(gemm_dots_of)(g->s.dtype, nl == 1, at, p0 != 0, s, v, n);
            }
        }
        for (l0 = 0; l0 < g->v_count; l0 += NL) {
            const float *at = sums + l0 / NL * 16 * MFT__W;
            if (g->v_count - l0 == 1) for (r = 0; r < 4; r++) out[4 * r] = MFT__FN(quad_sum)(at + 4 * r * MFT__W);
            else for (j = 0; j < 16; j += MFT__W) {             /* the sums over lanes, W at a time */
                MFT__V y = MFT__SET1(0.0f);
                MFT__FN(transpose)(square, MFT__W, at + j * MFT__W, MFT__W);
                for (r = 0; r < MFT__W; r++) y += MFT__LOAD(square + r * MFT__W);
                MFT__STORE(out + j, y);
            }
            for (r = 0; r < 4 && i + r * apart < end; r++)
                for (l = 0; l < NL && l0 + l < g->v_count; l++) mft__gemm_put(g, i + r * apart, g->v_begin + l0 + l, out[4 * r + l]);
        }
    }
}

/* y[q] += x[q] . v for nq rows of y, ld apart, and four rows of v; x's numbers lie `step` apart. nq is a constant once
 * inlined. Four products first: half the error of one long chain. */
MFT__HELP void MFT__FN(gemm_sums_four)(int nq, float *y, int64_t ld, const float *const *x, int64_t step, const float *const *v, int64_t n)
{
    MFT__V  f[2][4], u[4], t;
    int64_t i;
    int     q, j, whole;
    MFT__UNROLL
    for (q = 0; q < nq; q++) {
        MFT__UNROLL
        for (j = 0; j < 4; j++) f[q][j] = MFT__SET1(x[q][j * step]);
    }
    MFT__EACH {
        whole = i + MFT__W <= n;
        MFT__UNROLL
        for (j = 0; j < 4; j++) { if (whole) u[j] = MFT__LOAD(v[j] + i); else u[j] = MFT__IN(v[j]); }
        MFT__UNROLL
        for (q = 0; q < nq; q++) {
            t = f[q][0] * u[0];
            MFT__UNROLL
            for (j = 1; j < 4; j++) t = MFT__FMA(f[q][j], u[j], t);
            MFT__STORE(y + q * ld + i, MFT__LOAD(y + q * ld + i) + t);
        }
    }
}

/* y[i] += sum over four neighbours p of x[i, p] row[p] over `blocks` quantised blocks, numbers used as they come out of
 * their blocks; dtype is a constant once inlined. */
MFT__HELP void MFT__FN(gemm_sums_quants)(mft_dtype dtype, float *y, int64_t ld, const mft__matrix *x, int64_t n_rows, int64_t p, const void *const *rows, int64_t blocks)
{
    int64_t size = dtype == MFT_Q8_0 ? 34 : 18, b, r;
    float   scales[4][MFT__SCALES];
    MFT__V  q[4][32 / MFT__W];
    int     part, j, i;
    MFT__FN(load_scales)(scales, 4, rows, 0, size, blocks);
    for (b = 0; b < blocks; b++, y += 32) {
        MFT__UNROLL
        for (part = 0; part < 32 / MFT__W; part += 2) {         /* 4 x 2 vectors at a time: 16 registers hold them */
            MFT__UNROLL
            for (j = 0; j < 4; j++) MFT__FN(load_quants)(q[j], dtype, (const uint8_t *)rows[j] + b * size);
            for (r = 0; r < n_rows; r++) {
                const float *from = (const float *)x->data + r * x->row_stride + p * x->col_stride;
                MFT__V t[2], f;
                f = MFT__SET1(from[0] * scales[0][b]);
                t[0] = f * q[0][part]; t[1] = f * q[0][part + 1];
                MFT__UNROLL
                for (j = 1; j < 4; j++) {
                    f = MFT__SET1(from[j * x->col_stride] * scales[j][b]);
                    MFT__UNROLL
                    for (i = 0; i < 2; i++) t[i] = MFT__FMA(f, q[j][part + i], t[i]);
                }
                MFT__UNROLL
                for (i = 0; i < 2; i++) {
                    float *to = y + r * ld + (part + i) * MFT__W;
                    MFT__STORE(to, MFT__LOAD(to) + t[i]);
                }
            }
        }
    }
}

/* Lanes [begin, end) of few rows:  c[i] += s[i, p] v[p], four p at a time, the lanes side by side where
 * they lie (decoding with weights stored [in, out]). */
MFT__BODY void MFT__FN(gemm_sums)(void *arg, int64_t begin, int64_t end, int worker)
{
    const mft__gemm_job *g = (const mft__gemm_job *)arg;
    int64_t n = end - begin, ld = MFT__SUMS_LANES + 64, p, r, i;
    float  *rows = (float *)(void *)(g->scratch + (size_t)worker * g->scratch_bytes), *sums = rows + 4 * ld;
    MFT__V  alpha = MFT__SET1(g->alpha);
    int     j;
    memset(sums, 0, sizeof(float) * (size_t)(ld * g->s_count));
    for (p = 0; p < g->k; p += 4) {
        const float *v[4];
        int          np = (int)mft__min(g->k - p, 4);
        if (p + 12 <= g->k) MFT__FN(prefetch)(&g->v, begin, p + 8, 4, n);
        if (np == 4 && mft__is_quantized(g->v.dtype)) {         /* begin is that of a block */
            const void *q[4];
            for (j = 0; j < 4; j++) q[j] = (const char *)g->v.data + mft_dtype_bytes(g->v.dtype, begin + (p + j) * g->v.col_stride);
            if (g->v.dtype == MFT_Q8_0) MFT__FN(gemm_sums_quants)(MFT_Q8_0, sums, ld, &g->s, g->s_count, p, q, (n + 31) / 32);
            else                        MFT__FN(gemm_sums_quants)(MFT_Q4_0, sums, ld, &g->s, g->s_count, p, q, (n + 31) / 32);
            continue;
        }
        for (j = 0; j < np; j++) v[j] = MFT__FN(fetch)(rows + j * ld, &g->v, begin, p + j, n);
        for (r = 0; r < g->s_count; r += 2) {
            const float *x[2];
            int          nq = r + 1 < g->s_count ? 2 : 1;
            x[0] = (const float *)g->s.data + r * g->s.row_stride + p * g->s.col_stride;
            x[1] = x[0] + (nq - 1) * g->s.row_stride;
            if      (np < 4)  for (j = 0; j < nq * np; j++) MFT__FN(axpy)(sums + (r + j / np) * ld, x[j / np][j % np * g->s.col_stride], v[j % np], n);
            else if (nq == 2) MFT__FN(gemm_sums_four)(2, sums + r * ld, ld, x, g->s.col_stride, v, n);
            else              MFT__FN(gemm_sums_four)(1, sums + r * ld, ld, x, g->s.col_stride, v, n);
        }
    }
    for (i = 0; g->swapped && i < n; i++) {                     /* c[lane][row] */
        float *c = g->c + (begin + i) * g->ldc;
        for (r = 0; r < g->s_count; r++) c[r] = (g->plus ? g->plus[c - g->c + r] : 0) + g->alpha * sums[r * ld + i] + (g->bias ? g->bias[r] : 0);
    }
    for (r = 0; !g->swapped && r < g->s_count; r++) {
        const float *t = sums + r * ld;
        float       *c = g->c + r * g->ldc + begin;
        MFT__EACH {
            MFT__V y = alpha * MFT__LOAD(t + i);
            if (g->plus) y += MFT__IN(g->plus + (c - g->c));
            if (g->bias) y += MFT__IN(g->bias + begin);
            MFT__OUT(c, y);
        }
    }
}

/* ---- attention: see [OPS]. A panel is [..][lanes], a copy [row][MFT__STRIDE], columns from MFT__KC on in a
 *      second one. Rows and keys are numbered within one sequence and key head; x has `group` heads for it. ---- */

/* panel[d][lane] = f x[r0 + lane], n lanes, zeros after */
MFT__BODY void MFT__FN(panel_of)(float *panel, const mft__attention_job *a, const mft__heads *x, int64_t group, int64_t b, int64_t kv, int64_t r0, int64_t n, float f)
{
    enum { LANES = MFT__P * MFT__W };
    float   square[MFT__W * MFT__W];
    int64_t l, d;
    int     i;
    for (l = 0; l < LANES; l += MFT__W) {
        const float *rows[MFT__W];
        for (i = 0; i < MFT__W; i++) rows[i] = l + i < n ? mft__head(x, group, b, kv, r0 + l + i) : NULL;
        for (d = 0; d < a->D; d += MFT__W) {
            for (i = 0; i < MFT__W; i++) {
                MFT__V y = MFT__SET1(0.0f);
                if (rows[i]) y = MFT__SET1(f) * MFT__FN(in)(rows[i] + d, a->D - d);
                MFT__STORE(square + i * MFT__W, y);
            }
            MFT__FN(transpose)(panel + d * LANES + l, LANES, square, MFT__W);
        }
    }
}

/* x[r0 + lane] (+)= f[lane] panel[d][lane], n lanes */
MFT__BODY void MFT__FN(panel_out)(const float *panel, const mft__attention_job *a, const mft__heads *x, int64_t group, int64_t b, int64_t kv, int64_t r0, int64_t n, const float *f, int add)
{
    enum { LANES = MFT__P * MFT__W };
    float   square[MFT__W * MFT__W];
    int64_t l, d;
    int     i;
    for (l = 0; l < n; l += MFT__W) for (d = 0; d < a->D; d += MFT__W) {
        MFT__FN(transpose)(square, MFT__W, panel + d * LANES + l, LANES);
        for (i = 0; i < MFT__W && l + i < n; i++) {
            float *to = mft__head(x, group, b, kv, r0 + l + i) + d;
            MFT__V y  = MFT__SET1(f[l + i]) * MFT__LOAD(square + i * MFT__W);
            if (add) y += MFT__FN(in)(to, a->D - d);
            MFT__FN(out)(to, a->D - d, y);
        }
    }
}

/* copy[row] = f x[r0 + row]: rows of x may be any distance apart, those of a copy share no cache set */
MFT__BODY void MFT__FN(copy_of)(float *copy, const mft__attention_job *a, const mft__heads *x, int64_t group, int64_t b, int64_t kv, int64_t r0, int64_t n, float f)
{
    int64_t row, d;
    for (row = 0; row < n; row++) {
        const float *from = mft__head(x, group, b, kv, r0 + row);
        for (d = 0; d < a->D; d += MFT__W)                      /* whole vectors: a copy's row has room past MFT__KC */
            MFT__STORE(copy + d / MFT__KC * MFT__COPY + row * MFT__STRIDE + d % MFT__KC, MFT__SET1(f) * MFT__FN(in)(from + d, a->D - d));
    }
}

/* tile[row][lane] = sum_d copy[row][d] panel[d][lane], rows [begin, end) */
MFT__HELP void MFT__FN(tile_scores)(const mft__attention_job *a, float *tile, const float *copy, const float *panel, int64_t lanes, int64_t begin, int64_t end)
{
    mft__gemm_strip x;
    int64_t i, d;
    memset(&x, 0, sizeof x);
    x.lanes = lanes; x.ld = MFT__P * MFT__W; x.s_terms = x.v_terms = 1;
    for (d = 0; d < a->D; d += MFT__KC, copy += MFT__COPY) for (i = begin; i < end; i += MFT__H) {
        x.h = mft__min(end - i, MFT__H); x.cells = mft__min(a->D - d, MFT__KC); x.add = d != 0;
        x.tile = tile + i * x.ld; x.s = copy + i * MFT__STRIDE; x.v = panel + d * x.ld;
        a->strip(&x);
    }
}

/* panel[d][lane] += sum over rows [begin, end) of copy[row][d] tile[row][lane] */
MFT__HELP void MFT__FN(tile_spread)(const mft__attention_job *a, float *panel, const float *copy, const float *tile, int64_t lanes, int64_t begin, int64_t end)
{
    mft__gemm_strip x;
    int64_t i, d, n;
    memset(&x, 0, sizeof x);
    x.lanes = lanes; x.ld = MFT__P * MFT__W; x.s_terms = x.v_terms = 1;
    x.s_step = MFT__STRIDE; x.cells = end - begin; x.add = 1; x.v = tile + begin * x.ld;
    for (d = 0; d < a->D; d += MFT__KC, copy += MFT__COPY) {
        n = mft__min(a->D - d, MFT__KC);
        for (i = 0; i < n; i += MFT__H) {
            x.h = mft__min(n - i, MFT__H);
            x.tile = panel + (d + i) * x.ld; x.s = copy + begin * MFT__STRIDE + i;
            a->strip(&x);
        }
    }
}

/* Does column j of a tile's row i count? keys: the tile's rows are keys from `key` on and its lanes queries, or the other
 * way round. */
MFT__HELP int MFT__FN(sees)(const int32_t *first, const int32_t *end, int64_t key, int keys, int64_t i, int64_t j)
{
    return keys ? key + i >= first[j] && key + i < end[j] : key + j >= first[i] && key + j < end[i];
}

/* tile_spread where some lanes do not see some rows: their weights are zeros, but zero times a NaN or an infinity is none.
 * Rows that are not finite are added number by number, to the lanes that see them. */
MFT__BODY void MFT__FN(tile_spread_seen)(const mft__attention_job *a, float *panel, const float *copy, const float *tile, int64_t lanes,
                                         int64_t begin, int64_t end, const int32_t *first, const int32_t *last, int64_t key, int keys)
{
    enum { LANES = MFT__P * MFT__W };
    int64_t i, j, d, good = begin;
    for (i = begin; i < end; i++) {
        const float *row = copy + i * MFT__STRIDE;
        MFT__V bad = MFT__SET1(0.0f);
        for (d = 0; d < a->D; d += MFT__W) bad += MFT__LOAD(row + d / MFT__KC * MFT__COPY + d % MFT__KC) * MFT__SET1(0.0f);
        if (MFT__FN(lanes_sum)(bad) == 0) continue;
        if (good < i) MFT__FN(tile_spread)(a, panel, copy, tile, lanes, good, i);
        good = i + 1;
        for (d = 0; d < a->D; d++) for (j = 0; j < lanes; j++)
            if (MFT__FN(sees)(first, last, key, keys, i, j)) panel[d * LANES + j] += row[d / MFT__KC * MFT__COPY + d % MFT__KC] * tile[i * LANES + j];
    }
    if (good < end) MFT__FN(tile_spread)(a, panel, copy, tile, lanes, good, end);
}

/* What each row of a list sees, and of all of them together. Lanes past n see everything: nothing leaves them. */
typedef struct MFT__FN(seen) { int32_t first[MFT__SEEN_TILE], end[MFT__SEEN_TILE], all_first, all_end, some_first, some_end; } MFT__FN(seen);     /* more than there are lanes */

MFT__BODY void MFT__FN(seen_of)(MFT__FN(seen) *x, const mft__attention_job *a, int64_t b, int64_t r0, int64_t n)
{
    int64_t i;
    x->some_first = 0x7fffffff; x->some_end = 0;                /* of those that see anything */
    x->all_first  = 0; x->all_end = 0x7fffffff;
    for (i = 0; i < MFT__SEEN_TILE; i++) {
        x->first[i] = 0; x->end[i] = 0x7fffffff;
        if (i >= n) continue;
        mft__visible(a, b, (r0 + i) / a->G, &x->first[i], &x->end[i]);
        if (x->first[i] > x->all_first) x->all_first = x->first[i];
        if (x->end[i]   < x->all_end)   x->all_end   = x->end[i];
        if (x->first[i] == x->end[i]) continue;
        if (x->first[i] < x->some_first) x->some_first = x->first[i];
        if (x->end[i]   > x->some_end)   x->some_end   = x->end[i];
    }
}

/* past the cap:  c tanh(s / c) */
MFT__HELP MFT__V MFT__FN(capped)(const mft__attention_job *a, MFT__V s)
{
    if (a->softcap > 0) s = MFT__SET1(a->softcap) * MFT__FN(tanh)(s / MFT__SET1(a->softcap));
    return s;
}

/* Scores of keys [begin, end) of the tile to weights e^(s - m); high and sum run on, and fade says by what
 * earlier sums shrink. -infinity where a key is not seen; a NaN passes the maximum by and comes out in the sum. */
MFT__HELP void MFT__FN(tile_weights)(const mft__attention_job *a, float *tile, int64_t key, int64_t begin, int64_t end, int64_t lanes,
                                     const MFT__FN(seen) *seen, int whole, float *high, float *sum, float *fade)
{
    enum { LANES = MFT__P * MFT__W };
    MFT__V  none = MFT__SET1(-INFINITY), zero = MFT__SET1(0.0f), m[4], l[4], v, shift, f;
    int64_t i, j, q;
    for (j = 0; j < lanes; j += MFT__W) {
        MFT__I first, last;
        memcpy(&first, seen->first + j, sizeof first); memcpy(&last, seen->end + j, sizeof last);
        m[0] = MFT__LOAD(high + j); m[1] = m[2] = m[3] = none;                  /* four at once: a comparison takes its time */
        for (i = begin; i < end; i += 4) {
            MFT__UNROLL
            for (q = 0; q < 4; q++) if (i + q < end) {
                float *t = tile + (i + q) * LANES + j;
                v = MFT__LOAD(t);
                if (a->softcap > 0) v = MFT__FN(capped)(a, v);
                if (!whole) { MFT__I s = first - first + (int32_t)(key + i + q); v = MFT__FN(select)((s >= first) & (s < last), v, none); }
                if (a->softcap > 0 || !whole) MFT__STORE(t, v);
                m[q] = MFT__FN(select)(v > m[q], v, m[q]);
            }
        }
        m[0] = MFT__FN(select)(m[1] > m[0], m[1], m[0]);
        m[2] = MFT__FN(select)(m[3] > m[2], m[3], m[2]);
        m[0] = MFT__FN(select)(m[2] > m[0], m[2], m[0]);
        shift = MFT__FN(select)(m[0] == none, zero, m[0]);
        f = MFT__FN(exp)(MFT__LOAD(high + j) - shift);
        for (q = 0; q < 4; q++) l[q] = zero;
        for (i = begin; i < end; i += 4) {
            MFT__UNROLL
            for (q = 0; q < 4; q++) if (i + q < end) {
                float *t = tile + (i + q) * LANES + j;
                v = MFT__FN(exp)(MFT__LOAD(t) - shift);
                l[q] += v;
                MFT__STORE(t, v);
            }
        }
        MFT__STORE(fade + j, f);
        MFT__STORE(high + j, m[0]);
        MFT__STORE(sum + j, MFT__FMA(MFT__LOAD(sum + j), f, (l[0] + l[1]) + (l[2] + l[3])));
    }
}

/* p = e^(s - lse) and ds = p (dp - delta), through the cap; 0 of a key not seen */
MFT__HELP void MFT__FN(pair)(const mft__attention_job *a, MFT__V *s, MFT__V *dp, MFT__V lse, MFT__V delta, int whole, MFT__I seen)
{
    MFT__V zero = MFT__SET1(0.0f), one = MFT__SET1(1.0f), c = MFT__FN(capped)(a, *s), p = MFT__FN(exp)(c - lse), ds = p * (*dp - delta);
    if (a->softcap > 0) { c = c / MFT__SET1(a->softcap); ds *= one - c * c; }
    if (!whole) { p = MFT__FN(select)(seen, p, zero); ds = MFT__FN(select)(seen, ds, zero); }
    *s = p; *dp = ds;
}

/* Which block, of which sequence and key head: the longest causal ones first. */
MFT__HELP void MFT__FN(attention_block)(const mft__attention_job *a, int64_t i, int last_first, int64_t *b, int64_t *kv, int64_t *r0)
{
    int64_t block = i / (a->B * a->n_kv_head);
    if (last_first) block = a->blocks - 1 - block;
    *r0 = block * MFT__ATT_PANELS * MFT__P * MFT__W;
    *b  = i / a->n_kv_head % a->B;
    *kv = i % a->n_kv_head;
}

MFT__BODY void MFT__FN(attention)(void *arg, int64_t begin, int64_t end, int worker)
{
    enum { LANES = MFT__P * MFT__W, N = MFT__ATT_PANELS };
    const mft__attention_job *a = (const mft__attention_job *)arg;
    int64_t size = mft__round_up(a->D, MFT__TILE_ROWS) * LANES, rows = a->T * a->G, b, kv, r0, s, i, n[N], lo, hi, first, last, c;
    float  *q = (float *)(void *)(a->scratch + (size_t)worker * a->scratch_bytes), *out = q + N * size, *tile = out + N * size;
    float  *k = tile + LANES * (int64_t)MFT__SEEN_TILE, *v = k + (1 + (a->D - 1) / MFT__KC) * MFT__COPY;
    float   high[N][LANES], sum[N][LANES], fade[LANES];
    MFT__FN(seen) seen[N];
    int     x, j, faded, whole;
    for (; begin < end; begin++) {
        MFT__FN(attention_block)(a, begin, 1, &b, &kv, &r0);
        first = a->S; last = 0;
        for (x = 0; x < N; x++) {
            n[x] = mft__max(0, mft__min(LANES, rows - r0 - x * LANES));
            MFT__FN(seen_of)(&seen[x], a, b, r0 + x * LANES, n[x]);
            first = mft__min(first, seen[x].some_first);
            last  = mft__max(last,  seen[x].some_end);
            for (j = 0; j < LANES; j++) { high[x][j] = -INFINITY; sum[x][j] = 0; }
            if (n[x]) MFT__FN(panel_of)(q + x * size, a, &a->q, a->G, b, kv, r0 + x * LANES, n[x], a->scale);
            memset(out + x * size, 0, sizeof(float) * (size_t)size);
        }
        for (s = first; s < last; s += MFT__SEEN_TILE) {
            c = mft__min(last - s, MFT__SEEN_TILE);
            MFT__FN(copy_of)(k, a, &a->k, 1, b, kv, s, c, 1);
            MFT__FN(copy_of)(v, a, &a->v, 1, b, kv, s, c, 1);
            for (x = 0; x < N; x++) {
                lo = mft__max(seen[x].some_first - s, 0); hi = mft__min(seen[x].some_end - s, c);
                if (!n[x] || lo >= hi) continue;
                MFT__FN(tile_scores)(a, tile, k, q + x * size, n[x], lo, hi);
                whole = s + lo >= seen[x].all_first && s + hi <= seen[x].all_end;
                if (whole) MFT__FN(tile_weights)(a, tile, s, lo, hi, n[x], &seen[x], 1, high[x], sum[x], fade);
                else       MFT__FN(tile_weights)(a, tile, s, lo, hi, n[x], &seen[x], 0, high[x], sum[x], fade);
                for (faded = 0, j = 0; j < n[x]; j++) faded |= fade[j] != 1;
                for (i = 0; faded && i < a->D; i++) for (j = 0; j < n[x]; j += MFT__W) {
                    float *o = out + x * size + i * LANES + j;
                    MFT__STORE(o, MFT__LOAD(o) * MFT__LOAD(fade + j));
                }
                if (whole) MFT__FN(tile_spread)(a, out + x * size, v, tile, n[x], lo, hi);
                else       MFT__FN(tile_spread_seen)(a, out + x * size, v, tile, n[x], lo, hi, seen[x].first, seen[x].end, s, 1);
            }
        }
        for (x = 0; x < N; x++) {
            for (j = 0; j < n[x]; j++) {
                int64_t r = r0 + x * LANES + j;
                if (a->lse) a->lse[((b * a->n_kv_head + kv) * a->G + r % a->G) * a->T + r / a->G] = high[x][j] + logf(sum[x][j]);
                sum[x][j] = seen[x].first[j] < seen[x].end[j] ? 1 / sum[x][j] : 0;         /* no key at all: zeros */
            }
            MFT__FN(panel_out)(out + x * size, a, &a->out, a->G, b, kv, r0 + x * LANES, n[x], sum[x], 0);
        }
    }
}

MFT__BODY void MFT__FN(attention_dq)(void *arg, int64_t begin, int64_t end, int worker)
{
    enum { LANES = MFT__P * MFT__W, N = MFT__ATT_PANELS };
    const mft__attention_job *a = (const mft__attention_job *)arg;
    int64_t size = mft__round_up(a->D, MFT__TILE_ROWS) * LANES, rows = a->T * a->G, b, kv, r0, s, i, j, n[N], lo, hi, first, last, c;
    float  *q = (float *)(void *)(a->scratch + (size_t)worker * a->scratch_bytes), *dout = q + N * size, *dq = dout + N * size;
    float  *tile = dq + N * size, *dtile = tile + LANES * (int64_t)MFT__SEEN_TILE, *k = dtile + LANES * (int64_t)MFT__SEEN_TILE;
    float  *v = k + (1 + (a->D - 1) / MFT__KC) * MFT__COPY;
    float   lse[N][LANES], delta[N][LANES], scale[LANES];
    MFT__FN(seen) seen[N];
    int     x;
    for (j = 0; j < LANES; j++) scale[j] = a->scale;
    for (; begin < end; begin++) {
        MFT__FN(attention_block)(a, begin, 1, &b, &kv, &r0);
        first = a->S; last = 0;
        for (x = 0; x < N; x++) {
            n[x] = mft__max(0, mft__min(LANES, rows - r0 - x * LANES));
            MFT__FN(seen_of)(&seen[x], a, b, r0 + x * LANES, n[x]);
            first = mft__min(first, seen[x].some_first);
            last  = mft__max(last,  seen[x].some_end);
            for (j = 0; j < LANES; j++) {
                int64_t r = r0 + x * LANES + j, at = ((b * a->n_kv_head + kv) * a->G + r % a->G) * a->T + r / a->G;
                lse[x][j] = delta[x][j] = 0;
                if (j >= n[x]) continue;
                lse[x][j] = a->lse[at];
                delta[x][j] = a->delta[at] = MFT__FN(dot)(mft__head(&a->dout, a->G, b, kv, r), mft__head(&a->out, a->G, b, kv, r), a->D);
            }
            if (!n[x] || !a->dq.p) continue;
            MFT__FN(panel_of)(q    + x * size, a, &a->q,    a->G, b, kv, r0 + x * LANES, n[x], a->scale);
            MFT__FN(panel_of)(dout + x * size, a, &a->dout, a->G, b, kv, r0 + x * LANES, n[x], 1);
            memset(dq + x * size, 0, sizeof(float) * (size_t)size);
        }
        if (!a->dq.p) continue;
        for (s = first; s < last; s += MFT__SEEN_TILE) {
            c = mft__min(last - s, MFT__SEEN_TILE);
            MFT__FN(copy_of)(k, a, &a->k, 1, b, kv, s, c, 1);
            MFT__FN(copy_of)(v, a, &a->v, 1, b, kv, s, c, 1);
            for (x = 0; x < N; x++) {
                int whole;
                lo = mft__max(seen[x].some_first - s, 0); hi = mft__min(seen[x].some_end - s, c);
                if (!n[x] || lo >= hi) continue;
                whole = s + lo >= seen[x].all_first && s + hi <= seen[x].all_end;
                MFT__FN(tile_scores)(a, tile,  k, q    + x * size, n[x], lo, hi);
                MFT__FN(tile_scores)(a, dtile, v, dout + x * size, n[x], lo, hi);
                for (j = 0; j < n[x]; j += MFT__W) {
                    MFT__V l = MFT__LOAD(lse[x] + j), d = MFT__LOAD(delta[x] + j), p, ds;
                    MFT__I from, to, key;
                    memcpy(&from, seen[x].first + j, sizeof from); memcpy(&to, seen[x].end + j, sizeof to);
                    for (i = lo; i < hi; i++) {
                        p  = MFT__LOAD(tile  + i * LANES + j);
                        ds = MFT__LOAD(dtile + i * LANES + j);
                        key = from - from + (int32_t)(s + i);
                        if (whole) MFT__FN(pair)(a, &p, &ds, l, d, 1, key);
                        else       MFT__FN(pair)(a, &p, &ds, l, d, 0, (key >= from) & (key < to));
                        MFT__STORE(dtile + i * LANES + j, ds);
                    }
                }
                if (whole) MFT__FN(tile_spread)(a, dq + x * size, k, dtile, n[x], lo, hi);
                else       MFT__FN(tile_spread_seen)(a, dq + x * size, k, dtile, n[x], lo, hi, seen[x].first, seen[x].end, s, 1);
            }
        }
        for (x = 0; x < N; x++) MFT__FN(panel_out)(dq + x * size, a, &a->dq, a->G, b, kv, r0 + x * LANES, n[x], scale, a->add_q);
    }
}

MFT__BODY void MFT__FN(attention_dkv)(void *arg, int64_t begin, int64_t end, int worker)
{
    enum { LANES = MFT__P * MFT__W, N = MFT__ATT_PANELS };
    const mft__attention_job *a = (const mft__attention_job *)arg;
    int64_t size = mft__round_up(a->D, MFT__TILE_ROWS) * LANES, b, kv, k0, r, i, j, n[N], lo, hi, row_end, c;
    float  *k = (float *)(void *)(a->scratch + (size_t)worker * a->scratch_bytes), *v = k + N * size, *dk = v + N * size, *dv = dk + N * size;
    float  *tile = dv + N * size, *dtile = tile + LANES * (int64_t)MFT__SEEN_TILE, *q = dtile + LANES * (int64_t)MFT__SEEN_TILE;
    float  *dout = q + (1 + (a->D - 1) / MFT__KC) * MFT__COPY;
    float   lse[MFT__SEEN_TILE], delta[MFT__SEEN_TILE], one[LANES];
    MFT__FN(seen) seen;
    MFT__I  lane;
    int     x;
    for (j = 0; j < LANES; j++) one[j] = 1;
    for (j = 0; j < MFT__W; j++) lane[j] = (int32_t)j;
    for (; begin < end; begin++) {
        MFT__FN(attention_block)(a, begin, 0, &b, &kv, &k0);
        for (x = 0; x < N; x++) {
            n[x] = mft__max(0, mft__min(LANES, a->S - k0 - x * LANES));
            if (!n[x]) continue;
            MFT__FN(panel_of)(k + x * size, a, &a->k, 1, b, kv, k0 + x * LANES, n[x], 1);
            MFT__FN(panel_of)(v + x * size, a, &a->v, 1, b, kv, k0 + x * LANES, n[x], 1);
        }
        memset(dk, 0, sizeof(float) * (size_t)(2 * N * size));
        r       = mft__max(0, k0 - (a->S - a->T)) * a->G;     /* queries before see none of these keys, nor do those past the window */
        row_end = a->T * a->G;
        if (a->window > 0) row_end = mft__min(row_end, mft__max(0, k0 + N * LANES - 1 + a->window - (a->S - a->T)) * a->G);
        for (; r < row_end; r += MFT__SEEN_TILE) {
            c = mft__min(row_end - r, MFT__SEEN_TILE);
            MFT__FN(seen_of)(&seen, a, b, r, c);
            if (seen.some_first >= k0 + N * LANES || seen.some_end <= k0) continue;
            MFT__FN(copy_of)(q,    a, &a->q,    a->G, b, kv, r, c, a->scale);
            MFT__FN(copy_of)(dout, a, &a->dout, a->G, b, kv, r, c, 1);
            for (i = 0; i < c; i++) {
                int64_t at = ((b * a->n_kv_head + kv) * a->G + (r + i) % a->G) * a->T + (r + i) / a->G;
                lse[i] = a->lse[at]; delta[i] = a->delta[at];
            }
            for (x = 0; x < N; x++) {
                int64_t key = k0 + x * LANES;
                int     whole = seen.all_first <= key && seen.all_end >= key + n[x];
                for (lo = 0; lo < c  && (seen.end[lo]     <= key || seen.first[lo]     >= key + n[x]); lo++) { }
                for (hi = c; hi > lo && (seen.end[hi - 1] <= key || seen.first[hi - 1] >= key + n[x]); hi--) { }
                if (!n[x] || lo >= hi) continue;
                MFT__FN(tile_scores)(a, tile,  q,    k + x * size, n[x], lo, hi);
                MFT__FN(tile_scores)(a, dtile, dout, v + x * size, n[x], lo, hi);
                for (i = lo; i < hi; i++) for (j = 0; j < n[x]; j += MFT__W) {
                    MFT__V p = MFT__LOAD(tile + i * LANES + j), ds = MFT__LOAD(dtile + i * LANES + j);
                    MFT__I s = lane + (int32_t)(key + j);
                    if (whole) MFT__FN(pair)(a, &p, &ds, MFT__SET1(lse[i]), MFT__SET1(delta[i]), 1, s);
                    else       MFT__FN(pair)(a, &p, &ds, MFT__SET1(lse[i]), MFT__SET1(delta[i]), 0, (s >= seen.first[i]) & (s < seen.end[i]));
                    MFT__STORE(tile  + i * LANES + j, p);
                    MFT__STORE(dtile + i * LANES + j, ds);
                }
                if (a->dk.p && whole)  MFT__FN(tile_spread)(a, dk + x * size, q,    dtile, n[x], lo, hi);
                if (a->dv.p && whole)  MFT__FN(tile_spread)(a, dv + x * size, dout, tile,  n[x], lo, hi);
                if (a->dk.p && !whole) MFT__FN(tile_spread_seen)(a, dk + x * size, q,    dtile, n[x], lo, hi, seen.first, seen.end, key, 0);
                if (a->dv.p && !whole) MFT__FN(tile_spread_seen)(a, dv + x * size, dout, tile,  n[x], lo, hi, seen.first, seen.end, key, 0);
            }
        }
        for (x = 0; x < N; x++) {
            if (a->dk.p) MFT__FN(panel_out)(dk + x * size, a, &a->dk, 1, b, kv, k0 + x * LANES, n[x], one, a->add_k);
            if (a->dv.p) MFT__FN(panel_out)(dv + x * size, a, &a->dv, 1, b, kv, k0 + x * LANES, n[x], one, a->add_v);
        }
    }
}

#define MFT__STRIP        MFT__FN(strip)
#define MFT__STRIP_FLOATS 1                 /* else pairs, of which s is always by row and v packed */
#define MFT__STRIP_TARGET MFT__TARGET
#define MFT__STEP         MFT__FMA
#endif /* MFT__STRIP_ONLY */

/* ---- the innermost loop. For a strip of pairs it is included once more, alone, with the step that
 *      adds the products of a pair ---- */

/* Copies some pieces of what a strip is to copy; *at: of the row at hand, that many are done. */
MFT__UNUSED MFT__STRIP_TARGET __attribute__((always_inline)) static inline void MFT__GLUE(MFT__STRIP, _carry)(mft__carry *c, int64_t *at, int64_t pieces)
{
    int j;
    for (; pieces > 0 && c->rows > 0; pieces--) {
        const char *from = c->from + *at * c->from_piece;
        float      *to   = c->to + *at * c->to_piece;
        MFT__UNROLL
        for (j = 0; j < MFT__H; j += MFT__W) {                  /* past the strip, if its height is no multiple: the next row writes there */
            if (c->dtype == MFT_F32) MFT__STORE(to + j, MFT__LOAD((const float *)(const void *)from + j));
            else                     MFT__STORE(to + j, MFT__LOAD_BF16((const uint16_t *)(const void *)from + j));
        }
        if (++*at == c->pieces) { *at = 0; c->rows--; c->from += c->from_row; c->to += c->to_row; }
    }
}

/* tile[i][lane] (+)= sum_p s(i, p) v[p][lane] over h rows and nv vectors, all constants once inlined: h nv
 * sums stay in registers, each step loads nv vectors and h numbers (s_i, s_p cells apart). Of a whole strip four steps at a time:
 * what counts and adds to pointers takes the ports of multiply-adds (with AVX2 a tenth of the time). raw: v is read there
 * and packed. */
MFT__UNUSED MFT__STRIP_TARGET __attribute__((always_inline)) static inline
void MFT__GLUE(MFT__STRIP, _tile)(int h, int nv, int64_t s_i, int64_t s_p, const mft__gemm_strip *x, float *tile, const float *v, const char *raw,
                                  mft__ahead *ahead, int64_t ask, mft__carry *carry, int64_t *at, int64_t copy)
{
    enum { LANES = MFT__P * MFT__W, K = 4 };
    MFT__V       c[MFT__H][MFT__P], b[MFT__P], y;
    const float *s = x->s;
    float       *pack = (float *)(uintptr_t)v;
    int64_t      cells, p, n;
    int          i, j, q;
    MFT__UNROLL
    for (i = 0; i < h; i++) {
        MFT__UNROLL
        for (j = 0; j < nv; j++) c[i][j] = MFT__SET1(0.0f);
    }
#define MFT__STEP_OF_K(q) do {                                                                                 \
        MFT__UNROLL                                                                                            \
        for (j = 0; j < nv; j++) {                                                                             \
            if (!raw)                         b[j] = MFT__LOAD(v + (q) * LANES + j * MFT__W);                  \
            else if (x->raw_dtype == MFT_F32) b[j] = MFT__LOAD((const float *)(const void *)raw + j * MFT__W); \
            else                              b[j] = MFT__LOAD_BF16((const uint16_t *)(const void *)raw + j * MFT__W); \
            if (raw) MFT__STORE(pack + (q) * LANES + j * MFT__W, b[j]);                                        \
        }                                                                                                      \
        if (raw) raw += x->raw_step;                                                                           \
        MFT__UNROLL                                                                                            \
        for (i = 0; i < h; i++) {                                                                              \
            y = MFT__SET1(s[i * s_i + (q) * s_p]);                                                             \
            MFT__UNROLL                                                                                        \
            for (j = 0; j < nv; j++) c[i][j] = MFT__STEP(y, b[j], c[i][j]);                                    \
        } } while (0)
    for (cells = x->cells; cells > 0; cells -= MFT__ASK_STEPS) {
        mft__ask(ahead, ask);
        MFT__GLUE(MFT__STRIP, _carry)(carry, at, copy);
        n = mft__min(cells, MFT__ASK_STEPS);
        for (p = h == MFT__H ? n / K : 0, n -= p * K; p > 0; p--, s += K * s_p, v += K * LANES, pack += K * LANES) {
            MFT__UNROLL
            for (q = 0; q < K; q++) MFT__STEP_OF_K(q);
        }
        for (p = n; p > 0; p--, s += s_p, v += LANES, pack += LANES) MFT__STEP_OF_K(0);
    }
#undef MFT__STEP_OF_K
    MFT__UNROLL
    for (i = 0; i < h; i++) {
        MFT__UNROLL
        for (j = 0; j < nv; j++) {
            float *t = tile + i * x->ld + j * MFT__W;
            if (x->add) c[i][j] += MFT__LOAD(t);
            MFT__STORE(t, c[i][j]);
        }
    }
}

/* One strip against every panel; a strip or a panel that is not full takes a smaller tile. */
MFT__UNUSED MFT__STRIP_TARGET static void MFT__STRIP(const mft__gemm_strip *x)
{
    enum { LANES = MFT__P * MFT__W };
    mft__ahead ahead[2];
    mft__carry carry = x->carry;
    int64_t    l, at = 0, times = ((x->lanes - 1) / LANES + 1) * ((x->cells - 1) / MFT__ASK_STEPS + 1), ask = mft__lines(x, ahead, times);
    int64_t    copy = (carry.rows * carry.pieces + times - 1) / times;
#define MFT__TILE_OF(h, nv, raw) do {                                                                                                            \
        if (MFT__STRIP_FLOATS && x->s_step) MFT__GLUE(MFT__STRIP, _tile)(h, nv, 1, x->s_step, x, x->tile + l, v, raw, ahead, ask, &carry, &at, copy);            \
        else           MFT__GLUE(MFT__STRIP, _tile)(h, nv, MFT__STRIDE, 1, x, x->tile + l, v, raw, ahead, ask, &carry, &at, copy); } while (0)
#define MFT__TILE(h) do {                                                                                                                        \
        if (MFT__STRIP_FLOATS && x->raw)    MFT__TILE_OF(h, MFT__P, x->raw + l * (x->raw_dtype == MFT_F32 ? 4 : 2));                          \
        else if (x->lanes - l <= MFT__W)    MFT__TILE_OF(h, 1, NULL);                                                                         \
        else                                MFT__TILE_OF(h, MFT__P, NULL); } while (0)
    for (l = 0; l < x->lanes; l += LANES) {
        const float *v = x->v + l / LANES * x->v_panel;
        if      (x->h > 2 * MFT__H / 3) MFT__TILE(MFT__H);
        else if (x->h > MFT__H / 3)     MFT__TILE(2 * MFT__H / 3);
        else                            MFT__TILE(MFT__H / 3);
    }
#undef MFT__TILE
#undef MFT__TILE_OF
}

#undef MFT__STRIP
#undef MFT__STRIP_FLOATS
#undef MFT__STRIP_TARGET
#undef MFT__STEP
#ifdef MFT__STRIP_ONLY
#  undef MFT__STRIP_ONLY
#else                                       /* the row is complete: forget the vocabulary */
#  undef MFT__EACH_ACTIVATION
#  undef MFT__JOIN_
#  undef MFT__JOIN
#  undef MFT__FN
#  undef MFT__BODY
#  undef MFT__HELP
#  undef MFT__I
#  undef MFT__D
#  undef MFT__Q
#  undef MFT__IN
#  undef MFT__OUT
#  undef MFT__EACH
#  undef MFT__ROW
#  undef MFT__TARGET
#  undef MFT__V
#  undef MFT__W
#  undef MFT__H
#  undef MFT__P
#  undef MFT__SET1
#  undef MFT__LOAD
#  undef MFT__STORE
#  undef MFT__FMA
#  undef MFT__SQRT
#  undef MFT__MIN
#  undef MFT__MAX
#  undef MFT__TIMES_2_TO
#  undef MFT__WIDE_LO
#  undef MFT__WIDE_HI
#  undef MFT__MUL_LOW
#  undef MFT__ZIP_LO
#  undef MFT__ZIP_HI
#  undef MFT__UNZIP_LO
#  undef MFT__UNZIP_HI
#  undef MFT__LOAD_F16
#  undef MFT__STORE_F16
#  undef MFT__LOAD_BF16
#  undef MFT__LOAD_Q8
#  undef MFT__LOAD_Q4
#endif

#endif /* MFT__ROW */

/* ==============================================================================
 * MARK: - [LICENSE] MIT
 *
 * Copyright (c) 2026 the mft authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy
 * of this software and associated documentation files (the "Software"), to deal
 * in the Software without restriction, including without limitation the rights
 * to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
 * copies of the Software, and to permit persons to whom the Software is
 * furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all
 * copies or substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
 * IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
 * FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
 * AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
 * LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
 * OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
 * SOFTWARE.
 * ============================================================================== */
